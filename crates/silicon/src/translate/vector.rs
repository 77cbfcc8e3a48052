//! Vector and x87 instructions: the host executes them as they are.
//!
//! Vector registers are loaded when a run first needs them, as far as it needs them ([`Live`]), and stored when host code
//! leaves: the interpreter's handlers work on the state. x87 registers are the host's FPU's while
//! [`HostExec::gate`](crate::hostexec::HostExec) says so, and MXCSR is the host's in guest mode anyway. The gate is asked once
//! in a run for each class of instructions; what it holds back is the interpreter's.

use std::mem::offset_of;

use iced_x86::code_asm::{
    AsmMemoryOperand, AsmRegister32, AsmRegister64, AsmRegisterXmm, AsmRegisterYmm, AsmRegisterZmm,
    CodeAssembler, dword_ptr, get_xmm, get_ymm, get_zmm, k0, k1, k2, k3, k4, k5, k6, k7, qword_ptr, r14d,
    r15d, xmmword_ptr, ymmword_ptr, zmmword_ptr,
};
use iced_x86::{CpuidFeature, IcedError, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

use super::Failure;
use super::emit::{Emitter, Kind, Result};
use super::groups::Access;
use super::memory::{Rules, suits_memory};
use super::operands::wanted;
use super::registers::{ADDRESS, At, VALUE, field, field32, set_memory, slot};
use crate::cpu::Cpu;
use crate::exec::operand::is_immediate;
use crate::exec::{fpu, fpu_image, vector};
use crate::hostexec::stub::{STATUS, nth, writes};
use crate::hostexec::{MXCSR_DEFINED, MXCSR_FLAGS, MXCSR_MASKS, class};
use crate::mmu::host;
use crate::model::{Feature, Features};
use crate::state::reg;

/// What the assembler says.
type Emitted = std::result::Result<(), IcedError>;

/// How much of the guest's vector registers is in the host's. Each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub(super) enum Live {
    /// Nothing.
    Nothing = 0,
    /// XMM0 to XMM15, not what is above them: legacy instructions leave that alone.
    Xmm = 1,
    /// Registers 0 to 15 in full.
    Full = 2,
    /// All registers, and the mask registers.
    All = 3,
}

impl Live {
    /// All but nothing, in order.
    pub(super) const SOME: [Live; 3] = [Live::Xmm, Live::Full, Live::All];
}

/// What is known of vector and x87 registers, or needed: which classes of instructions ([`crate::hostexec::class`]) may run, and what
/// is live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) classes: u32,
    pub(super) live: Live,
}

impl Known {
    pub(super) const NOTHING: Known = Known { classes: 0, live: Live::Nothing };

    /// Both.
    pub(super) fn and(self, other: Known) -> Known {
        Known { classes: self.classes | other.classes, live: self.live.max(other.live) }
    }

    /// What is in both.
    pub(super) fn or(self, other: Known) -> Known {
        Known { classes: self.classes & other.classes, live: self.live.min(other.live) }
    }
}

/// What a vector or x87 instruction needs.
pub(super) fn needs(ins: &Instruction) -> Option<Known> {
    if fpu::is_x87(ins) {
        return Some(Known { classes: class::X87, live: Live::Nothing });
    }
    let classes = vector::classify(ins)?;
    let live = match () {
        () if is_mxcsr(ins) || classes == class::MMX => Live::Nothing,
        () if classes & class::AVX512 != 0 => Live::All,
        () if classes & class::AVX != 0 => Live::Full,
        () => Live::Xmm,
    };
    Some(Known { classes, live })
}

/// Whether this is a vector or x87 instruction that can be translated.
pub(super) fn suits(ins: &Instruction, features: &Features) -> bool {
    let Some(needs) = needs(ins) else { return false };
    let operands_suit = ins.op_kinds().enumerate().all(|(operand, kind)| match kind {
        OpKind::Register => true,
        OpKind::Memory => suits_memory(ins) && !ins.memory_index().is_vector_register(),
        _ => is_immediate(ins, operand as u32),
    });
    operands_suit && if needs.classes & class::X87 != 0 { suits_x87(ins, features) } else { !is_special(ins) }
}

/// The access of an instruction that [`suits`] which may be of a group: one whose alignment is not checked.
pub(super) fn access(ins: &Instruction, info: &mut InstructionInfoFactory) -> Option<Access> {
    let needs = needs(ins)?;
    if is_mxcsr(ins) || alignment_checked(ins, &needs) != 0 {
        return None;
    }
    let operand = ins.op_kinds().position(|kind| kind == OpKind::Memory)?;
    let writes = writes(info.info(ins).op_access(operand as u32));
    Access::operand(ins, if writes { Kind::Store } else { Kind::Load })
}

/// Bits of the address to be checked before the access. Where faults are recovered from the host's own check is enough, if it has one.
fn alignment_checked(ins: &Instruction, needs: &Known) -> u8 {
    let checks = needs.classes & class::X87 == 0 && (!host::recovers() || is_sha(ins));
    if checks { vector::alignment(ins) } else { 0 }
}

/// Instructions that take operands of any alignment on some of AMD's processors.
fn is_sha(ins: &Instruction) -> bool {
    ins.cpuid_features().contains(&CpuidFeature::SHA)
}

/// Loads and stores of MXCSR, which use no vector registers.
fn is_mxcsr(ins: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(ins.mnemonic(), Ldmxcsr | Vldmxcsr | Stmxcsr | Vstmxcsr)
}

/// Vector instructions with operands that are not named, or that change more than registers.
fn is_special(ins: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(ins.mnemonic(), Maskmovdqu | Vmaskmovdqu | Maskmovq)
        || matches!(
            ins.mnemonic(),
            Pcmpestri
                | Pcmpestrm
                | Pcmpestri64
                | Pcmpestrm64
                | Vpcmpestri
                | Vpcmpestrm
                | Vpcmpestri64
                | Vpcmpestrm64
        )
}

/// x87 instructions that take 20 ns and more: as many of them as are executed until the count says so would have requests wait.
fn is_slow(ins: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        ins.mnemonic(),
        Fsin | Fcos | Fsincos | Fptan | Fpatan | F2xm1 | Fyl2x | Fyl2xp1 | Fprem | Fprem1 | Fbld | Fbstp
    )
}

/// x87 instructions that change neither the control word nor whether exceptions are pending without computing, of
/// processors that note no data pointers and selectors.
fn suits_x87(ins: &Instruction, features: &Features) -> bool {
    use Mnemonic::*;
    let control =
        matches!(ins.mnemonic(), Fninit | Fnclex | Fneni | Fndisi | Fnsetpm | Fnstsw | Fnstcw | Fldcw | Wait);
    !control
        && fpu_image::handler(ins.mnemonic()).is_none()
        && features.has(Feature::FdpExceptionOnly)
        && features.has(Feature::ZeroFcsFds)
}

impl Emitter<'_> {
    /// Translates operation `index`, an instruction that [`suits`].
    pub(super) fn vector(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        let needs = needs(ins).ok_or(Failure::Unsuited)?;
        self.admit(&needs, index)?;
        if is_slow(ins) {
            self.look_for_requests(index)?;
        }
        if is_mxcsr(ins) {
            let stores = matches!(ins.mnemonic(), Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr);
            return if stores { self.store_mxcsr(ins, index) } else { self.load_mxcsr(ins, index) };
        }
        let memory = ins.op_kinds().position(|kind| kind == OpKind::Memory);
        let mut host = *ins;
        host.set_ip(0);
        let access = {
            let info = self.info.info(ins);
            [0, 1, 2, 3, 4].map(|operand| info.op_access(operand))
        };
        let mut free: &[AsmRegister64] = &[VALUE, ADDRESS];
        if let Some(operand) = memory {
            let kind = if writes(access[operand]) { Kind::Store } else { Kind::Load };
            let alignment = alignment_checked(ins, &needs);
            let rules = Rules { alignment, ..Rules::size(ins.memory_size().size()) };
            let at = self.access(ins, kind, rules, wanted(ins), index)?;
            free = at.free();
            set_memory(&mut host, operand as u32, at);
        }
        if ins.rflags_read() & STATUS != 0 || !matches!(ins.rflags_modified() & STATUS, 0 | STATUS) {
            self.load_flags()?;
        }
        let redirected = self.redirect(ins, &mut host, &access, free, false)?;
        if memory.is_some() {
            self.may_fault(index);
        }
        self.put(host)?;
        if ins.rflags_modified() & STATUS != 0 {
            self.flags_are_of(ins);
        }
        self.settle(redirected)?;
        if needs.classes & class::X87 != 0 {
            self.note_pointer(index)?;
        }
        Ok(())
    }

    /// Gives operation `index` to the interpreter, which looks at requests soon, if there are any.
    fn look_for_requests(&mut self, index: usize) -> Result<()> {
        self.free_host_flags()?;
        self.a.mov(ADDRESS, field(offset_of!(Cpu, translator.requests)))?;
        self.a.cmp(dword_ptr(ADDRESS), 0)?;
        let asked = self.interpreter_label(index);
        Ok(self.a.jne(asked)?)
    }

    /// Sees that instructions of these classes may run, and that their registers are live, unless that is known; else operation
    /// `index` is the interpreter's.
    pub(super) fn admit(&mut self, needs: &Known, index: usize) -> Result<()> {
        let classes = needs.classes & !self.known.classes;
        if classes != 0 {
            self.free_host_flags()?;
            self.a.test(field32(offset_of!(Cpu, hostexec.gate)), classes)?;
            let held_back = self.interpreter_label(index);
            self.a.jne(held_back)?;
        }
        if needs.live > self.known.live {
            self.free_host_flags()?;
            self.a.cmp(live_now(), needs.live as i32)?;
            let (at, mut back) = (self.a.create_label(), self.a.create_label());
            self.a.jb(at)?;
            self.a.set_label(&mut back)?;
            self.a.zero_bytes()?;
            self.raise_vectors(at, back, needs.live);
        }
        self.known = self.known.and(*needs);
        Ok(())
    }

    /// Stores MXCSR: the guest's controls, and flags that are in the state or in the host's register.
    fn store_mxcsr(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        let kept = offset_of!(Cpu, translator.kept);
        let to = self.access(ins, Kind::Store, Rules::size(4), 1, index)?;
        let (to, value) = self.spare_value(to)?;
        self.a.stmxcsr(field32(kept))?;
        self.a.mov(value, field32(kept))?;
        self.free_host_flags()?;
        self.a.and(value, MXCSR_FLAGS as i32)?;
        self.a.or(value, field32(offset_of!(Cpu, state.mxcsr)))?;
        self.may_fault(index);
        Ok(self.a.mov(to, value)?)
    }

    /// Loads MXCSR, if all exceptions are and stay masked: others make instructions the interpreter's.
    fn load_mxcsr(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        let from = self.access(ins, Kind::Load, Rules::size(4), 1, index)?;
        let (from, value) = self.spare_value(from)?;
        self.may_fault(index);
        self.a.mov(value, from)?;
        self.free_host_flags()?;
        let unsuited = self.interpreter_label(index);
        let guests = field32(offset_of!(Cpu, state.mxcsr));
        self.a.mov(r15d, guests)?;
        self.a.and(r15d, value)?;
        self.a.not(r15d)?;
        self.a.test(r15d, MXCSR_MASKS as i32)?;
        self.a.jne(unsuited)?;
        self.a.test(value, !MXCSR_DEFINED as i32)?;
        self.a.jne(unsuited)?;
        self.a.mov(guests, value)?;
        Ok(self.a.ldmxcsr(guests)?)
    }

    /// A doubleword in memory by an address that leaves [`VALUE`] free, and that. Not for accesses of groups.
    fn spare_value(&mut self, at: At) -> Result<(AsmMemoryOperand, AsmRegister32)> {
        if let At::Sum(base, displacement) = at {
            self.a.lea(ADDRESS, qword_ptr(base + VALUE + displacement))?;
        }
        Ok((dword_ptr(ADDRESS), r14d))
    }

    /// FIP: the address of the instruction.
    fn note_pointer(&mut self, index: usize) -> Result<()> {
        let offset = self.page_offset(index);
        self.a.mov(ADDRESS, slot(reg::IP_BASE))?;
        self.a.lea(ADDRESS, qword_ptr(ADDRESS + i32::from(offset)))?;
        Ok(self.a.mov(field(offset_of!(Cpu, state.x87.fip)), ADDRESS)?)
    }
}

fn zmm_offset(number: usize) -> usize {
    offset_of!(Cpu, state.zmm) + 64 * number
}

/// Registers as `live` has them, from the state or to it. `wide`: the host has AVX-512; without it nothing needs what that adds.
fn move_all(a: &mut CodeAssembler, live: Live, wide: bool, store: bool) -> Emitted {
    let count = if live == Live::All && wide { 32 } else { 16 };
    for number in 0..count {
        let at = zmm_offset(number) as u64;
        match (live, wide) {
            (Live::Nothing, _) => {}
            (Live::Xmm, _) => {
                let register = xmm(number)?;
                if store {
                    a.movaps(xmmword_ptr(at).gs(), register)?
                } else {
                    a.movaps(register, xmmword_ptr(at).gs())?
                }
            }
            (_, false) => {
                let register = ymm(number)?;
                if store {
                    a.vmovups(ymmword_ptr(at).gs(), register)?
                } else {
                    a.vmovups(register, ymmword_ptr(at).gs())?
                }
            }
            (_, true) => {
                let register = zmm(number)?;
                if store {
                    a.vmovups(zmmword_ptr(at).gs(), register)?
                } else {
                    a.vmovups(register, zmmword_ptr(at).gs())?
                }
            }
        }
    }
    if live == Live::All && wide {
        for (number, register) in [k0, k1, k2, k3, k4, k5, k6, k7].into_iter().enumerate() {
            let at = field(offset_of!(Cpu, state.k) + 8 * number);
            if store { a.kmovq(at, register)? } else { a.kmovq(register, at)? }
        }
    }
    Ok(())
}

fn absent() -> IcedError {
    unreachable!("register numbers are below 32")
}

fn xmm(number: usize) -> std::result::Result<AsmRegisterXmm, IcedError> {
    get_xmm(nth(Register::XMM0, number)).ok_or_else(absent)
}

fn ymm(number: usize) -> std::result::Result<AsmRegisterYmm, IcedError> {
    get_ymm(nth(Register::YMM0, number)).ok_or_else(absent)
}

fn zmm(number: usize) -> std::result::Result<AsmRegisterZmm, IcedError> {
    get_zmm(nth(Register::ZMM0, number)).ok_or_else(absent)
}

/// To be called to have `live` be live; changes flags alone.
pub(super) fn raise(a: &mut CodeAssembler, live: Live, wide: bool) -> Emitted {
    store(a, Live::SOME.into_iter().filter(|&less| less < live), wide)?;
    move_all(a, live, wide, false)?;
    a.mov(live_now(), live as u32)?;
    a.ret()
}

/// Stores all that is live: nothing is afterwards.
pub(super) fn store_all(a: &mut CodeAssembler, wide: bool) -> Emitted {
    let mut end = a.create_label();
    let mut clean = a.create_label();
    a.cmp(live_now(), Live::Nothing as i32)?;
    a.je(end)?;
    store(a, Live::SOME, wide)?;
    a.cmp(live_now(), Live::Full as i32)?;
    a.jb(clean)?;
    a.vzeroupper()?;
    a.set_label(&mut clean)?;
    a.mov(live_now(), Live::Nothing as u32)?;
    a.set_label(&mut end)?;
    a.zero_bytes()
}

/// Stores what is live, if that is one of `lives`.
fn store(a: &mut CodeAssembler, lives: impl IntoIterator<Item = Live>, wide: bool) -> Emitted {
    let mut end = a.create_label();
    for live in lives {
        let mut other = a.create_label();
        a.cmp(live_now(), live as i32)?;
        a.jne(other)?;
        move_all(a, live, wide, true)?;
        a.jmp(end)?;
        a.set_label(&mut other)?;
        a.zero_bytes()?;
    }
    a.set_label(&mut end)?;
    a.zero_bytes()
}

/// The [`Live`] of the CPU.
fn live_now() -> AsmMemoryOperand {
    field32(offset_of!(Cpu, translator.vectors))
}
