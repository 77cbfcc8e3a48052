//! Data-path instructions on the host's own silicon.
//!
//! Guest and host are both x86-64, so x87, MMX, SSE, AVX and AVX-512 instructions are executed by the host CPU:
//! [`stub`] makes host code for each form, [`arena`] holds it, [`x87`] keeps the guest's x87 registers in the
//! host's FPU, and [`unmasked`] decides unmasked SIMD exceptions from what a masked run finds.
//!
//! While the CPU is in guest mode ([`Cpu::run`](crate::Cpu::run)) the host's MXCSR is the guest's with all
//! exceptions masked, so its sticky flags gather there; the x87 registers are in the host's FPU once an x87 or
//! MMX instruction has run. Both return to [`CpuState`] on the way out, and whenever something asks for
//! [`Cpu::mxcsr`] or calls [`Cpu::sync_x87`].
#![expect(unsafe_code, reason = "loads and stores MXCSR and calls stubs")]

use std::arch::asm;

pub(crate) mod arena;
pub(crate) mod arithmetic;
mod rounding;
pub(crate) mod stub;
pub(crate) mod unmasked;
pub(crate) mod x87;

use crate::code::op::{Flow, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::mmu::host::{self, Absent, on_fault};
use crate::model::Feature;
use crate::state::{CpuState, cr0, cr4};
use stub::Stubs;

/// MXCSR after reset.
pub(crate) const MXCSR_RESET: u32 = 0x1f80;
/// MXCSR's exception masks.
pub(crate) const MXCSR_MASKS: u32 = 0x1f80;
/// MXCSR's exception flags.
pub(crate) const MXCSR_FLAGS: u32 = 0x3f;
/// Bits that MXCSR has (MXCSR_MASK of the FXSAVE image).
pub(crate) const MXCSR_DEFINED: u32 = 0xffff;
/// MXCSR: denormal operands are taken for zero.
const MXCSR_DENORMALS_ARE_ZERO: u32 = 1 << 6;
/// MXCSR: denormal results are flushed to zero.
const MXCSR_FLUSH_TO_ZERO: u32 = 1 << 15;
/// x87 exception masks in the control word.
const FCW_MASKS: u16 = 0x3f;

/// Instruction classes that share their conditions for #UD and #NM. An operation carries the classes that it
/// belongs to; [`HostExec::gate`] has those set that need a look before they run.
pub(crate) mod class {
    /// x87.
    pub(crate) const X87: u32 = 1 << 0;
    /// MMX registers.
    pub(crate) const MMX: u32 = 1 << 1;
    /// Legacy-encoded XMM instructions.
    pub(crate) const SSE: u32 = 1 << 2;
    /// VEX-encoded vector instructions.
    pub(crate) const AVX: u32 = 1 << 3;
    /// EVEX-encoded and mask-register instructions.
    pub(crate) const AVX512: u32 = 1 << 4;
    /// May raise SIMD floating-point exceptions.
    pub(crate) const FP: u32 = 1 << 5;
    /// All of them.
    pub(crate) const ALL: u32 = 0x3f;
}

/// Host execution state of one CPU.
pub(crate) struct HostExec {
    /// Classes that cannot simply run: disabled by control registers, x87 state not loaded, or exceptions unmasked.
    pub(crate) gate: u32,
    /// Host code for guest instructions.
    pub(crate) stubs: Stubs,
    /// The guest's x87 registers are in the host's FPU.
    x87_live: bool,
    /// The host's MXCSR holds the guest's flags and controls.
    mxcsr_live: bool,
    /// The host's own MXCSR.
    host_mxcsr: u32,
    /// x87 instructions always note their data pointer (no FDP_EXCPTN_ONLY).
    pub(crate) x87_data_pointer: bool,
    /// FCS and FDS exist (not deprecated).
    pub(crate) x87_selectors: bool,
}

impl Default for HostExec {
    fn default() -> HostExec {
        HostExec {
            gate: class::ALL,
            stubs: Stubs::default(),
            x87_live: false,
            mxcsr_live: false,
            host_mxcsr: MXCSR_RESET,
            x87_data_pointer: false,
            x87_selectors: false,
        }
    }
}

impl HostExec {
    /// Recomputes the gate after a change of control registers, XCR0, the mode, or what is unmasked.
    pub(crate) fn refresh(&mut self, state: &CpuState) {
        let ts = state.cr0 & cr0::TS != 0;
        let no_fpu = ts || state.cr0 & cr0::EM != 0;
        let unmasked = state.x87.fcw & FCW_MASKS != FCW_MASKS;
        let x87 = no_fpu || unmasked || !self.x87_live;
        let sse = no_fpu || state.cr4 & cr4::OSFXSR == 0;
        let avx = ts || !avx_enabled(state);
        let avx512 = avx || !avx512_enabled(state);
        let fp = state.mxcsr & MXCSR_MASKS != MXCSR_MASKS;
        let bit = |on: bool, class: u32| if on { class } else { 0 };
        self.gate = bit(x87, class::X87 | class::MMX)
            | bit(sse, class::SSE)
            | bit(avx, class::AVX)
            | bit(avx512, class::AVX512)
            | bit(fp, class::FP);
    }
}

/// VEX-encoded vector instructions are enabled (SDM vol. 2A, 2.3.12, exception type 4).
fn avx_enabled(state: &CpuState) -> bool {
    state.cr4 & cr4::OSXSAVE != 0 && state.xcr0 & 6 == 6 && !state.real_mode() && !state.v8086()
}

/// EVEX-encoded instructions are enabled (SDM vol. 2A, 2.7.11).
fn avx512_enabled(state: &CpuState) -> bool {
    avx_enabled(state) && state.xcr0 & 0xe6 == 0xe6
}

/// Reads the host's MXCSR.
fn stmxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: writes four bytes of our own.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

/// Writes the host's MXCSR; `value` has no reserved bits.
fn ldmxcsr(value: u32) {
    // SAFETY: all callers pass defined bits; silicon does no floating-point arithmetic of its own.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags)) };
}

/// Calls `compute` with an MXCSR that rounds to nearest, takes denormals for zero and flushes results to zero, all
/// exceptions masked. Flags that it sets are lost.
pub(crate) fn flushing_denormals<R>(compute: impl FnOnce() -> R) -> R {
    let before = stmxcsr();
    ldmxcsr(MXCSR_RESET | MXCSR_DENORMALS_ARE_ZERO | MXCSR_FLUSH_TO_ZERO);
    let result = compute();
    ldmxcsr(before);
    result
}

impl Cpu {
    /// Entry to guest mode: the host's MXCSR becomes the guest's.
    pub(crate) fn hostexec_enter(&mut self) {
        self.hostexec.host_mxcsr = stmxcsr();
        self.hostexec.mxcsr_live = true;
        host::stubs_lie_at(self.hostexec.stubs.range());
        self.hostexec.x87_data_pointer = !self.features.has(Feature::FdpExceptionOnly);
        self.hostexec.x87_selectors = !self.features.has(Feature::ZeroFcsFds);
        self.set_mxcsr(self.state.mxcsr & MXCSR_DEFINED);
    }

    /// Exit from guest mode: guest state returns to [`CpuState`], the host gets its own back.
    pub(crate) fn hostexec_leave(&mut self) {
        self.state.mxcsr = self.mxcsr();
        self.hostexec.mxcsr_live = false;
        ldmxcsr(self.hostexec.host_mxcsr);
        self.sync_x87();
    }

    /// The guest's MXCSR.
    pub(crate) fn mxcsr(&self) -> u32 {
        if self.hostexec.mxcsr_live { self.state.mxcsr | (stmxcsr() & MXCSR_FLAGS) } else { self.state.mxcsr }
    }

    /// Writes the guest's MXCSR; `value` has no reserved bits.
    pub(crate) fn set_mxcsr(&mut self, value: u32) {
        self.state.mxcsr = value;
        if self.hostexec.mxcsr_live {
            ldmxcsr(value | MXCSR_MASKS);
        }
        self.hostexec.refresh(&self.state);
    }

    /// Makes instructions of `classes` runnable, or says why they are not: #UD, then #NM, then #MF.
    #[cold]
    #[inline(never)]
    pub(crate) fn admit(&mut self, classes: u32) -> Result<(), Abort> {
        let state = &self.state;
        let (em, ts) = (state.cr0 & cr0::EM != 0, state.cr0 & cr0::TS != 0);
        let vector = classes & (class::SSE | class::AVX | class::AVX512 | class::MMX) != 0;
        let undefined = classes & (class::SSE | class::MMX) != 0 && em
            || classes & class::SSE != 0 && state.cr4 & cr4::OSFXSR == 0
            || classes & class::AVX != 0 && !avx_enabled(state)
            || classes & class::AVX512 != 0 && !avx512_enabled(state);
        if undefined {
            return Err(self.raise(Exception::UD));
        }
        if ts && vector || classes & class::X87 != 0 && (em || ts) {
            return Err(self.raise(Exception::NM));
        }
        self.hostexec.refresh(&self.state);
        if classes & (class::X87 | class::MMX) != 0 {
            self.load_x87();
            if self.x87_exception_pending() {
                return Err(self.raise(Exception::MF));
            }
        }
        Ok(())
    }

    /// Runs the stub of `op` on the guest's registers, with its memory operand at `mem`. Leaves guest mode, with
    /// nothing done, if the host has no memory there.
    ///
    /// # Safety
    ///
    /// `op` was lowered with a stub, and `mem` is valid for the accesses of its memory operand, if it has one, or
    /// guest memory, which may be absent.
    #[inline(always)]
    pub(crate) unsafe fn call_stub(&mut self, op: &Op, mem: *mut u8) -> Result<(), Abort> {
        // SAFETY: lowering put the address of a stub into `imm`; stubs are dropped only together with all
        // blocks. The state is ours alone, and the caller vouches for `mem`. If the access to it faults, the stub
        // ends and the label is where it returns to.
        unsafe {
            asm!(
                "call {stub}", "2:", on_fault!("2b" => "{absent}"),
                stub = in(reg) op.imm, in("rdi") &raw mut self.state, in("rsi") mem,
                absent = label { return Err(self.absent(Absent)) }, clobber_abi("sysv64")
            );
        }
        Ok(())
    }
}

/// The arena is full: drops all stubs, and all code with them, so that the block is decoded anew.
pub(crate) fn make_room(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    cpu.code.clear();
    cpu.hostexec.stubs.clear();
    Err(cpu.retry())
}
