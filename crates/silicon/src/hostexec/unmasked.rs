//! Unmasked SIMD floating-point exceptions.
//!
//! The host never traps for the guest: a stub runs with all exceptions masked and its flags cleared, and what it
//! found says what the guest's own masks would have made of it (SDM vol. 1, 4.9 and 11.5):
//!
//! - Flags of all elements are gathered. If a pre-computation exception (#I, #D, #Z) is unmasked and found in any
//!   element, post-computation ones (#O, #U, #P) are not looked for.
//! - Unmasked underflow is tininess alone, exact or not; a masked run tells tininess when results are flushed to
//!   zero (MXCSR.FTZ), which hardware heeds only while underflow is masked.
//! - An unmasked overflow or underflow leaves it to the result with unbounded exponent whether #P is found as
//!   well. [`super::rounding`] computes that, for the exact result is lost in a masked run.
//!
//! A fault leaves registers and memory as they were: what the stub wrote is put back, and memory is only
//! written once it is clear that there is none. The change to MMX (TOP = 0, all registers valid) stays.
#![expect(unsafe_code, reason = "runs stubs, saves and restores the host's FPU")]

use std::arch::asm;

use super::arithmetic::{Arithmetic, Inputs};
use super::rounding::Control;
use super::{MXCSR_FLAGS, MXCSR_MASKS, class, ldmxcsr, stmxcsr, x87};
use crate::code::op::Op;
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::flags::Status;
use crate::mmu::host;
use crate::state::{Zmm, cr4};

/// MXCSR's exception flags by name.
pub(super) mod flag {
    pub(crate) const INVALID: u32 = 1 << 0;
    pub(crate) const DENORMAL: u32 = 1 << 1;
    pub(crate) const ZERO_DIVIDE: u32 = 1 << 2;
    pub(crate) const OVERFLOW: u32 = 1 << 3;
    pub(crate) const UNDERFLOW: u32 = 1 << 4;
    pub(crate) const PRECISION: u32 = 1 << 5;
    /// Those found in the operands, before anything is computed.
    pub(crate) const BEFORE: u32 = INVALID | DENORMAL | ZERO_DIVIDE;
}

/// MXCSR.FTZ.
pub(super) const FTZ: u32 = 1 << 15;

/// A memory operand's copy.
#[repr(C, align(64))]
struct Copy64([u8; 64]);

/// What a stub may write, as it was before.
struct Before {
    zmm: [Zmm; 32],
    k: [u64; 8],
    regs: [u64; 32],
    status: Status,
    /// The x87 registers, for instructions with MMX operands.
    x87: Option<x87::Image>,
}

impl Before {
    fn of(cpu: &Cpu, op: &Op) -> Before {
        let state = &cpu.state;
        let x87 = (op.extra & class::MMX != 0).then(x87::Image::of_host);
        Before { zmm: state.zmm, k: state.k, regs: state.regs, status: state.status, x87 }
    }

    fn restore(self, cpu: &mut Cpu) {
        let state = &mut cpu.state;
        (state.zmm, state.k, state.regs, state.status) = (self.zmm, self.k, self.regs, self.status);
        if let Some(image) = self.x87 {
            image.load();
            cpu.enter_mmx();
        }
    }
}

/// The guest's exception flags as hardware with `control`'s masks sets them, where a masked run found `found`;
/// `after` computes the post-computation ones.
pub(super) fn decide(found: u32, control: Control, after: impl FnOnce() -> u32) -> u32 {
    let before = found & flag::BEFORE;
    if before & control.unmasked() != 0 {
        return before;
    }
    if found & control.unmasked() & (flag::OVERFLOW | flag::UNDERFLOW) != 0 {
        before | after()
    } else {
        found
    }
}

impl Cpu {
    /// As [`Cpu::call_stub`], with the guest's exceptions unmasked: #XM, or #UD if the guest has not enabled it.
    ///
    /// # Safety
    ///
    /// As for [`Cpu::call_stub`]; all of the memory operand can be read.
    #[cold]
    #[inline(never)]
    pub(crate) unsafe fn call_stub_unmasked(&mut self, op: &Op, mem: *mut u8) -> Result<(), Abort> {
        let control = Control::new(self.mxcsr());
        let before = Before::of(self, op);
        let mut copy = Copy64([0; 64]);
        if !mem.is_null() {
            // SAFETY: the operand has `size` bytes, 64 at most.
            let copied = unsafe { host::copy(mem, copy.0.as_mut_ptr(), usize::from(op.size).min(64)) };
            self.present(copied)?;
        }
        let memory = copy.0;

        let arithmetic = self.hostexec.stubs.instruction(op.imm).and_then(Arithmetic::of);
        ldmxcsr(control.rehearsal(arithmetic.is_some()));
        // SAFETY: the copy has 64 bytes, the most that an operand has.
        unsafe { self.call_stub(op, copy.0.as_mut_ptr())? };
        let found = stmxcsr() & MXCSR_FLAGS;

        let inputs = Inputs { zmm: &before.zmm, k: &before.k, memory: &memory };
        let flags = match arithmetic {
            Some(arithmetic) => arithmetic.flags(found, control, &inputs),
            None => decide(found, control, || found & !flag::BEFORE),
        };
        self.state.mxcsr = control.mxcsr | flags;
        ldmxcsr(self.state.mxcsr | MXCSR_MASKS);
        if flags & control.unmasked() != 0 {
            before.restore(self);
            let enabled = self.state.cr4 & cr4::OSXMMEXCPT != 0;
            return Err(self.raise(if enabled { Exception::XM } else { Exception::UD }));
        }
        if copy.0 != memory {
            // A store. It writes no register, and masked-out elements must not be written at all.
            // SAFETY: the caller's promise.
            unsafe { self.call_stub(op, mem)? };
        }
        Ok(())
    }
}

/// Runs one scalar single- or double-precision addition or multiplication with the host's MXCSR.
macro_rules! scalar {
    ($name:ident, $bits:ty, $instruction:literal, $move:literal, $register:literal) => {
        pub(super) fn $name(a: $bits, b: $bits) -> $bits {
            let result: $bits;
            // SAFETY: works on registers alone; exceptions are masked, and the flags are read with STMXCSR.
            unsafe {
                asm!(
                    concat!($move, " {x}, {a", $register, "}"),
                    concat!($move, " {y}, {b", $register, "}"),
                    concat!($instruction, " {x}, {y}"),
                    concat!($move, " {r", $register, "}, {x}"),
                    x = out(xmm_reg) _, y = out(xmm_reg) _, a = in(reg) a, b = in(reg) b,
                    r = lateout(reg) result, options(nostack, preserves_flags)
                );
            }
            result
        }
    };
}

scalar!(add_single, u32, "addss", "movd", ":e");
scalar!(multiply_single, u32, "mulss", "movd", ":e");
scalar!(add_double, u64, "addsd", "movq", "");
scalar!(multiply_double, u64, "mulsd", "movq", "");

/// Clears the host's exception flags and returns those that `run` sets.
pub(super) fn host_flags<T>(control: Control, run: impl FnOnce() -> T) -> (T, u32) {
    ldmxcsr(control.rehearsal(true));
    let result = run();
    (result, stmxcsr() & MXCSR_FLAGS)
}
