//! Instructions that go on to the next one: copied, with their registers redirected and their memory accesses checked.

use std::mem::offset_of;

use iced_x86::code_asm::{AsmRegister64, ax, byte_ptr, qword_ptr, r11, r11b, r11d, r11w, rax, rbp};
use iced_x86::{
    Code, ConditionCode, CpuidFeature, EncodingKind, FlowControl, Instruction, InstructionInfoFactory,
    MemoryOperand, Mnemonic, OpAccess, OpKind, Register,
};

use super::Failure;
use super::emit::{Emitter, Kind, Result};
use super::groups::Access;
use super::memory::{Rules, suits_memory};
use super::operands::{part, wanted};
use super::registers::{
    ADDRESS, At, GUEST_RAX, GUEST_RSP, Place, VALUE, field, field16, is_high_byte, place_of, set_memory,
    sized, slot,
};
use crate::cpu::Cpu;
use crate::exec::mov;
use crate::exec::operand::{is_immediate, is_memory, operand_size};
use crate::flags::Rflags;
use crate::hostexec::stub::{STATUS, writes};
use crate::state::{Seg, Segment};

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// The host executes the same on other operands.
    Copy,
    /// Nothing is to be done.
    Nothing,
    Lea,
    Push,
    Pop,
    Leave,
    /// MUL and IMUL with one operand.
    Multiply,
    /// DIV and IDIV of four and eight bytes.
    Divide,
    /// CMPXCHG of memory.
    CompareExchange,
    /// PUSHFQ.
    PushFlags,
    /// CLI at the highest privilege.
    ClearInterrupts,
    /// SWAPGS at the highest privilege.
    SwapGs,
    /// CBW, CWDE, CDQE.
    ExtendRax,
    /// CWD, CDQ, CQO.
    ExtendIntoRdx,
}

/// How the instruction is translated, judged by what it is; `None`: it is the interpreter's.
fn how(ins: &Instruction) -> Option<How> {
    use Mnemonic::*;
    if ins.is_invalid() {
        return None;
    }
    if mov::is_nop(ins) {
        return Some(How::Nothing);
    }
    if ins.has_rep_prefix() || ins.has_repne_prefix() {
        return None;
    }
    if ins.has_lock_prefix() && !suits_lock(ins) {
        return None;
    }
    Some(match ins.mnemonic() {
        Lea => How::Lea,
        Push => How::Push,
        Pop => How::Pop,
        Leave => How::Leave,
        Mul => How::Multiply,
        Imul if ins.op_count() == 1 => How::Multiply,
        Cbw | Cwde | Cdqe => How::ExtendRax,
        Cwd | Cdq | Cqo => How::ExtendIntoRdx,
        Div | Idiv if operand_size(ins, 0) >= 4 => How::Divide,
        Cmpxchg if is_memory(ins, 0) => How::CompareExchange,
        Pushfq => How::PushFlags,
        Cli => How::ClearInterrupts,
        Swapgs => How::SwapGs,
        Bt | Btc | Btr | Bts if is_memory(ins, 0) && !is_immediate(ins, 1) => return None,
        Bswap if ins.op0_register().size() == 2 => return None,
        Mov | Movzx | Movsx | Movsxd | Movbe | Xchg | Bswap | Add | Or | Adc | Sbb | And | Sub | Xor
        | Cmp | Test | Neg | Not | Inc | Dec | Imul | Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr
        | Shld | Shrd | Bt | Btc | Btr | Bts | Bsf | Bsr | Tzcnt | Lzcnt | Popcnt | Andn | Bextr | Blsi
        | Blsmsk | Blsr | Bzhi | Mulx | Pdep | Pext | Rorx | Sarx | Shlx | Shrx | Adcx | Adox | Crc32
        | Xadd | Movnti | Mfence | Lfence | Sfence => How::Copy,
        _ if is_conditional(ins) => How::Copy,
        _ => return None,
    })
}

/// Whether the instruction, which has a LOCK prefix, is one of those that need no more than their operands.
fn suits_lock(ins: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        ins.mnemonic(),
        Add | Or
            | Adc
            | Sbb
            | And
            | Sub
            | Xor
            | Inc
            | Dec
            | Neg
            | Not
            | Xadd
            | Xchg
            | Btc
            | Btr
            | Bts
            | Cmpxchg
    )
}

/// Whether the access is locked: XCHG's is with or without the prefix.
fn locks(ins: &Instruction) -> bool {
    ins.has_lock_prefix() || ins.mnemonic() == Mnemonic::Xchg
}

/// CMOVcc and SETcc.
fn is_conditional(ins: &Instruction) -> bool {
    let conditional = ins.condition_code() != ConditionCode::None;
    conditional && ins.flow_control() == FlowControl::Next && ins.encoding() == EncodingKind::Legacy
}

/// Whether the host has the instruction. The interpreter computes integer instructions itself, so guests may have some that
/// the host has not.
fn host_executes(ins: &Instruction) -> bool {
    ins.cpuid_features().iter().all(|feature| match feature {
        CpuidFeature::BMI1 => is_x86_feature_detected!("bmi1"),
        CpuidFeature::BMI2 => is_x86_feature_detected!("bmi2"),
        CpuidFeature::ADX => is_x86_feature_detected!("adx"),
        CpuidFeature::MOVBE => is_x86_feature_detected!("movbe"),
        CpuidFeature::POPCNT => is_x86_feature_detected!("popcnt"),
        CpuidFeature::LZCNT => is_x86_feature_detected!("lzcnt"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        // SSE2's fences and MOVNTI, and what every 64-bit processor has.
        _ => true,
    })
}

/// Whether the instruction can be translated, and goes on to the next one if it is.
pub(super) fn suits(ins: &Instruction) -> bool {
    let operands_suit = ins.op_kinds().enumerate().all(|(operand, kind)| match kind {
        OpKind::Register => {
            let register = ins.op_register(operand as u32);
            register.is_gpr() && (!is_high_byte(register) || suits_high_bytes(ins))
        }
        OpKind::Memory => suits_memory(ins),
        _ => is_immediate(ins, operand as u32),
    });
    match how(ins) {
        None => false,
        Some(How::Nothing) => true,
        Some(_) if !host_executes(ins) => false,
        Some(How::Push | How::Pop) => suits_stack(ins),
        Some(How::Leave) => ins.code() == Code::Leaveq,
        Some(_) => operands_suit,
    }
}

/// Whether AH, CH, DH or BH can be operands: the host cannot name them beside its upper registers, so they are turned to
/// where low bytes are, which RORX does without changing flags. A register that is turned must not be in an address.
fn suits_high_bytes(ins: &Instruction) -> bool {
    use Mnemonic::*;
    let memory = ins.op_kinds().any(|kind| kind == OpKind::Memory);
    let suits = match ins.mnemonic() {
        Cmp | Test | Movzx | Movsx => true,
        Mov | Add | Or | Adc | Sbb | And | Sub | Xor => !memory || is_memory(ins, 0),
        Neg | Not | Inc | Dec => true,
        _ => false,
    };
    suits && is_x86_feature_detected!("bmi2")
}

/// PUSH and POP of eight bytes, to and from registers other than RSP, and PUSH of immediates and memory.
fn suits_stack(ins: &Instruction) -> bool {
    match ins.op0_kind() {
        OpKind::Register => ins.op0_register().is_gpr64() && ins.op0_register() != Register::RSP,
        OpKind::Immediate8to64 | OpKind::Immediate32to64 => true,
        OpKind::Memory => ins.code() == Code::Push_rm64 && suits_memory(ins),
        _ => false,
    }
}

/// The form of `code` that does not have AL, AX, EAX or RAX for its operand.
pub(super) fn general_form(code: Code) -> Code {
    macro_rules! forms {
        ($($short:ident $long:ident)*) => {
            match code { $(Code::$short => Code::$long,)* _ => code }
        };
    }
    forms! {
        Add_AL_imm8 Add_rm8_imm8 Add_AX_imm16 Add_rm16_imm16 Add_EAX_imm32 Add_rm32_imm32 Add_RAX_imm32 Add_rm64_imm32
        Or_AL_imm8 Or_rm8_imm8 Or_AX_imm16 Or_rm16_imm16 Or_EAX_imm32 Or_rm32_imm32 Or_RAX_imm32 Or_rm64_imm32
        Adc_AL_imm8 Adc_rm8_imm8 Adc_AX_imm16 Adc_rm16_imm16 Adc_EAX_imm32 Adc_rm32_imm32 Adc_RAX_imm32 Adc_rm64_imm32
        Sbb_AL_imm8 Sbb_rm8_imm8 Sbb_AX_imm16 Sbb_rm16_imm16 Sbb_EAX_imm32 Sbb_rm32_imm32 Sbb_RAX_imm32 Sbb_rm64_imm32
        And_AL_imm8 And_rm8_imm8 And_AX_imm16 And_rm16_imm16 And_EAX_imm32 And_rm32_imm32 And_RAX_imm32 And_rm64_imm32
        Sub_AL_imm8 Sub_rm8_imm8 Sub_AX_imm16 Sub_rm16_imm16 Sub_EAX_imm32 Sub_rm32_imm32 Sub_RAX_imm32 Sub_rm64_imm32
        Xor_AL_imm8 Xor_rm8_imm8 Xor_AX_imm16 Xor_rm16_imm16 Xor_EAX_imm32 Xor_rm32_imm32 Xor_RAX_imm32 Xor_rm64_imm32
        Cmp_AL_imm8 Cmp_rm8_imm8 Cmp_AX_imm16 Cmp_rm16_imm16 Cmp_EAX_imm32 Cmp_rm32_imm32 Cmp_RAX_imm32 Cmp_rm64_imm32
        Test_AL_imm8 Test_rm8_imm8 Test_AX_imm16 Test_rm16_imm16 Test_EAX_imm32 Test_rm32_imm32
        Test_RAX_imm32 Test_rm64_imm32
        Xchg_r16_AX Xchg_rm16_r16 Xchg_r32_EAX Xchg_rm32_r32 Xchg_r64_RAX Xchg_rm64_r64
        Mov_AL_moffs8 Mov_r8_rm8 Mov_AX_moffs16 Mov_r16_rm16 Mov_EAX_moffs32 Mov_r32_rm32 Mov_RAX_moffs64 Mov_r64_rm64
        Mov_moffs8_AL Mov_rm8_r8 Mov_moffs16_AX Mov_rm16_r16 Mov_moffs32_EAX Mov_rm32_r32 Mov_moffs64_RAX Mov_rm64_r64
    }
}

/// Whether the flags after it may depend on those before it.
fn needs_flags(ins: &Instruction) -> bool {
    use Mnemonic::*;
    let modified = ins.rflags_modified() & STATUS;
    let partly = modified != 0 && modified != STATUS;
    let shifts = matches!(
        ins.mnemonic(),
        Shl | Sal
            | Shr
            | Sar
            | Rol
            | Ror
            | Rcl
            | Rcr
            | Shld
            | Shrd
            | Bsf
            | Bsr
            | Tzcnt
            | Lzcnt
            | Bextr
            | Bzhi
    );
    let by_count = shifts && {
        let last = ins.op_count() - 1;
        // A count of nothing changes no flags.
        !is_immediate(ins, last) || ins.immediate(last) & 0x1f == 0
    };
    // What the SDM leaves undefined some processors leave alone, and for the decoder some rotations do nothing.
    let keeps = matches!(ins.mnemonic(), Mnemonic::Imul | Mnemonic::Rcl | Mnemonic::Rcr);
    ins.rflags_read() & STATUS != 0 || partly || by_count || keeps
}

/// Whether there may be other flags after it than before it. RCL and RCR by as many bits as they have, and the carry, change
/// nothing for Intel's processors and the decoder; AMD's compute OF.
pub(super) fn changes_flags(ins: &Instruction) -> bool {
    ins.rflags_modified() & STATUS != 0 || matches!(ins.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr)
}

/// The access of an instruction that [`suits`] which may be of a group ([`super::groups`]).
pub(super) fn access(ins: &Instruction, info: &mut InstructionInfoFactory) -> Option<Access> {
    let operand = || ins.op_kinds().position(|kind| kind == OpKind::Memory);
    match how(ins)? {
        How::Push if ins.op0_kind() != OpKind::Memory => Some(Access::stack(-8, Kind::Store)),
        How::Pop => Some(Access::stack(0, Kind::Load)),
        How::Multiply | How::Divide => operand().and_then(|_| Access::operand(ins, Kind::Load)),
        How::Copy if !locks(ins) => {
            let writes = writes(info.info(ins).op_access(operand()? as u32));
            Access::operand(ins, if writes { Kind::Store } else { Kind::Load })
        }
        _ => None,
    }
}

/// What an instruction that is translated does with the status flags.
pub(super) struct Effect {
    /// It needs them where they are.
    pub(super) reads: bool,
    /// It overwrites them all, whatever they were.
    pub(super) overwrites: bool,
}

/// `None`: it ends the block, or is something else for which it does not matter.
pub(super) fn effect_on_flags(ins: &Instruction) -> Option<Effect> {
    let modified = ins.rflags_modified() & STATUS;
    let (reads, overwrites) = match how(ins) {
        Some(How::Copy) if suits(ins) => (needs_flags(ins), modified == STATUS && !needs_flags(ins)),
        Some(How::Nothing | How::Lea | How::ExtendRax | How::Push | How::Pop | How::Leave) => (false, false),
        Some(_) => return None,
        None if ins.flow_control() != FlowControl::Next => return None,
        None => (ins.rflags_read() & STATUS != 0 || !matches!(modified, 0 | STATUS), modified == STATUS),
    };
    Some(Effect { reads, overwrites })
}

/// Whether these instructions overwrite all status flags before anything can see them.
pub(super) fn lose_flags(instructions: &[Instruction]) -> bool {
    for ins in instructions {
        let plain = matches!(how(ins), Some(How::Copy | How::Lea | How::Nothing | How::ExtendRax));
        let accesses = how(ins) == Some(How::Copy) && ins.op_kinds().any(|kind| kind == OpKind::Memory);
        if !plain || accesses || !suits(ins) || needs_flags(ins) {
            return false;
        }
        if ins.rflags_modified() & STATUS == STATUS {
            return true;
        }
    }
    false
}

/// Whether its registers are written only when it can no longer be given to the interpreter.
pub(super) fn writes_last(ins: &Instruction) -> bool {
    suits(ins) && matches!(how(ins), Some(How::Copy | How::Pop))
}

impl Emitter<'_> {
    /// Translates operation `index`, an instruction that [`suits`].
    pub(super) fn instruction(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        match how(ins).ok_or(Failure::Unsuited)? {
            How::Copy => self.copy(ins, index),
            How::Nothing => Ok(()),
            How::Lea => self.lea(ins),
            How::Push => self.push(ins, index),
            How::Pop => self.pop(ins, index),
            How::Leave => self.leave(index),
            How::Multiply => self.multiply(ins, index),
            How::Divide => self.divide(ins, index),
            How::CompareExchange => self.compare_exchange(ins, index),
            How::PushFlags => self.push_flags(index),
            How::ClearInterrupts => self.clear_interrupts(index),
            How::SwapGs => self.swap_gs(index),
            How::ExtendRax => self.extend_rax(ins),
            How::ExtendIntoRdx => self.extend_into_rdx(ins),
        }
    }

    fn copy(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        let memory = ins.op_kinds().any(|kind| kind == OpKind::Memory);
        let mut host = *ins;
        host.set_ip(0);
        host.set_code(general_form(ins.code()));
        let access: [OpAccess; 4] = {
            let info = self.info.info(ins);
            [0, 1, 2, 3].map(|operand| info.op_access(operand))
        };
        let mut free: &[AsmRegister64] = &[VALUE, ADDRESS];
        if memory {
            let operand = ins.op_kinds().position(|kind| kind == OpKind::Memory).unwrap_or(0);
            let size = ins.memory_size().size();
            let kind = match () {
                () if locks(ins) => Kind::Lock,
                () if writes(access[operand]) => Kind::Store,
                () => Kind::Load,
            };
            let rules = Rules { within_line: kind == Kind::Lock, ..Rules::size(size) };
            let at = self.access(ins, kind, rules, wanted(ins), index)?;
            free = at.free();
            set_memory(&mut host, operand as u32, at);
        }
        if needs_flags(ins) {
            self.load_flags()?;
        }
        let redirected = self.redirect(ins, &mut host, &access, free, !memory)?;
        if memory {
            self.may_fault(index);
        }
        self.put(host)?;
        if changes_flags(ins) {
            self.flags_are_of(ins);
        }
        self.settle(redirected)
    }

    fn lea(&mut self, ins: &Instruction) -> Result<()> {
        let to = ins.op0_register();
        let mut host = *ins;
        host.set_ip(0);
        self.operand(ins, &mut host)?;
        match place_of(to) {
            Place::Host(full) => {
                host.set_op0_register(sized(full.into(), to).ok_or(Failure::Unsuited)?);
                self.put(host)
            }
            Place::State(number) => {
                if to.size() < 4 {
                    self.offset(ins)?;
                    set_memory(&mut host, 1, At::Address);
                    self.a.mov(VALUE, slot(number))?;
                }
                host.set_op0_register(sized(VALUE.into(), to).ok_or(Failure::Unsuited)?);
                self.put(host)?;
                Ok(self.a.mov(slot(number), VALUE)?)
            }
        }
    }

    fn push(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        let kept = field(offset_of!(Cpu, translator.kept));
        let memory = ins.op0_kind() == OpKind::Memory;
        if memory {
            let from = self.access(ins, Kind::Load, Rules::size(8), 0, index)?;
            self.may_fault(index);
            self.a.mov(ADDRESS, from.quad())?;
            self.a.mov(kept, ADDRESS)?;
        }
        let to = self.stack(-8, Kind::Store, index)?.quad();
        if memory {
            self.a.mov(ADDRESS, kept)?;
            self.may_fault(index);
            self.a.mov(to, ADDRESS)?;
        } else if ins.op0_kind() == OpKind::Register {
            let value = self.in_register(ins.op0_register(), ADDRESS)?;
            self.may_fault(index);
            self.a.mov(to, value)?;
        } else {
            self.may_fault(index);
            self.a.mov(to, ins.immediate(0) as i32)?;
        }
        Ok(self.a.lea(GUEST_RSP, qword_ptr(GUEST_RSP - 8))?)
    }

    fn push_flags(&mut self, index: usize) -> Result<()> {
        let to = self.stack(-8, Kind::Store, index)?.quad();
        self.load_flags()?;
        self.a.pushfq()?;
        self.a.pop(ADDRESS)?;
        self.free_host_flags()?;
        self.a.and(ADDRESS, Rflags::STATUS.bits() as i32)?;
        self.a.or(ADDRESS, field(offset_of!(Cpu, state.rflags_system)))?;
        self.may_fault(index);
        self.a.mov(to, ADDRESS)?;
        Ok(self.a.lea(GUEST_RSP, qword_ptr(GUEST_RSP - 8))?)
    }

    /// At other privileges the operation is the interpreter's.
    fn is_supervisor(&mut self, index: usize) -> Result<()> {
        self.free_host_flags()?;
        self.a.cmp(byte_ptr(offset_of!(Cpu, state.cpl) as u64).gs(), 0)?;
        let interpreter = self.interpreter_label(index);
        Ok(self.a.jne(interpreter)?)
    }

    fn clear_interrupts(&mut self, index: usize) -> Result<()> {
        self.is_supervisor(index)?;
        let cleared = !(Rflags::IF.bits() as i32);
        Ok(self.a.and(field(offset_of!(Cpu, state.rflags_system)), cleared)?)
    }

    fn swap_gs(&mut self, index: usize) -> Result<()> {
        self.is_supervisor(index)?;
        let base =
            offset_of!(Cpu, state.segs) + size_of::<Segment>() * Seg::Gs as usize + offset_of!(Segment, base);
        let other = offset_of!(Cpu, state.kernel_gs_base);
        let current = offset_of!(Cpu, state.ea_base) + 8 * Seg::Gs as usize;
        self.a.mov(VALUE, field(base))?;
        self.a.mov(ADDRESS, field(other))?;
        self.a.mov(field(other), VALUE)?;
        self.a.mov(field(base), ADDRESS)?;
        Ok(self.a.mov(field(current), ADDRESS)?)
    }

    fn pop(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        let from = self.stack(0, Kind::Load, index)?.quad();
        self.may_fault(index);
        match place_of(ins.op0_register()) {
            Place::Host(host) => self.a.mov(host, from)?,
            Place::State(number) => {
                self.a.mov(ADDRESS, from)?;
                self.a.mov(slot(number), ADDRESS)?;
            }
        }
        Ok(self.a.lea(GUEST_RSP, qword_ptr(GUEST_RSP + 8))?)
    }

    fn leave(&mut self, index: usize) -> Result<()> {
        let from = self.saved_rbp(index)?.quad();
        self.may_fault(index);
        self.a.mov(ADDRESS, from)?;
        self.a.lea(GUEST_RSP, qword_ptr(rbp + 8))?;
        Ok(self.a.mov(rbp, ADDRESS)?)
    }

    /// The register that operand 0 is in, or is loaded into.
    fn factor(&mut self, ins: &Instruction, index: usize) -> Result<Register> {
        if ins.op0_kind() != OpKind::Memory {
            let register = ins.op0_register();
            let full = self.in_register(register, VALUE)?;
            return part(full, register.size());
        }
        let size = ins.memory_size().size();
        let at = self.access(ins, Kind::Load, Rules::size(size), 0, index)?;
        let factor = part(VALUE, size)?;
        let load = match size {
            1 => Code::Mov_r8_rm8,
            2 => Code::Mov_r16_rm16,
            4 => Code::Mov_r32_rm32,
            _ => Code::Mov_r64_rm64,
        };
        let mut load = Instruction::with2(load, factor, MemoryOperand::with_base(ADDRESS.into()))?;
        set_memory(&mut load, 1, at);
        self.may_fault(index);
        self.put(load)?;
        Ok(factor)
    }

    /// The instruction on RAX, with another register for its operand. The guest's flags are loaded first: what comes of those
    /// that the SDM calls undefined is up to the host.
    fn on_rax(&mut self, ins: &Instruction, operand: Register) -> Result<()> {
        let mut host = *ins;
        host.set_ip(0);
        host.set_op0_kind(OpKind::Register);
        host.set_op0_register(operand);
        self.free_rax()?;
        self.a.mov(rax, GUEST_RAX)?;
        self.put(plain(host))?;
        self.flags_are_of(ins);
        Ok(self.a.mov(GUEST_RAX, rax)?)
    }

    fn multiply(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        let factor = self.factor(ins, index)?;
        self.on_rax(ins, factor)
    }

    /// What might not fit is the interpreter's; of IDIV everything but what CDQ and CQO make.
    fn divide(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        let divisor = self.factor(ins, index)?;
        self.free_host_flags()?;
        let interpreter = self.interpreter_label(index);
        let wide = operand_size(ins, 0) == 8;
        let [compare, extend, test, immediate] = if wide {
            [Code::Cmp_r64_rm64, Code::Sar_rm64_imm8, Code::Test_rm64_r64, Code::Cmp_rm64_imm8]
        } else {
            [Code::Cmp_r32_rm32, Code::Sar_rm32_imm8, Code::Test_rm32_r32, Code::Cmp_rm32_imm8]
        };
        let [high, sign] =
            if wide { [Register::RDX, Register::R15] } else { [Register::EDX, Register::R15D] };
        if ins.mnemonic() == Mnemonic::Div {
            self.put(Instruction::with2(compare, high, divisor)?)?;
            self.a.jae(interpreter)?;
        } else {
            self.a.mov(ADDRESS, GUEST_RAX)?;
            self.put(Instruction::with2(extend, sign, if wide { 63 } else { 31 })?)?;
            self.put(Instruction::with2(compare, high, sign)?)?;
            self.a.jne(interpreter)?;
            self.put(Instruction::with2(test, divisor, divisor)?)?;
            self.a.je(interpreter)?;
            self.put(Instruction::with2(immediate, divisor, -1)?)?;
            self.a.je(interpreter)?;
        }
        self.on_rax(ins, divisor)
    }

    fn compare_exchange(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        let locks = ins.has_lock_prefix();
        let rules = Rules { within_line: locks, ..Rules::size(ins.memory_size().size()) };
        let kind = if locks { Kind::Lock } else { Kind::Store };
        let at = self.access(ins, kind, rules, wanted(ins), index)?;
        let mut host = *ins;
        host.set_ip(0);
        set_memory(&mut host, 0, at);
        let access = [OpAccess::ReadWrite, OpAccess::Read];
        self.redirect(ins, &mut host, &access, at.free(), false)?;
        self.save_flags()?;
        self.a.mov(field16(offset_of!(Cpu, state.status)), ax)?;
        self.a.mov(rax, GUEST_RAX)?;
        self.may_fault_without_rax(index);
        self.put(host)?;
        self.a.mov(GUEST_RAX, rax)?;
        self.flags_are_of(ins);
        Ok(())
    }

    fn extend_rax(&mut self, ins: &Instruction) -> Result<()> {
        let extended = match ins.mnemonic() {
            Mnemonic::Cbw => self.a.movsx(r11w, r11b),
            Mnemonic::Cwde => self.a.movsx(r11d, r11w),
            _ => self.a.movsxd(r11, r11d),
        };
        Ok(extended?)
    }

    fn extend_into_rdx(&mut self, ins: &Instruction) -> Result<()> {
        self.free_rax()?;
        self.a.mov(rax, GUEST_RAX)?;
        let mut host = *ins;
        host.set_ip(0);
        self.put(host)
    }
}

/// The instruction without a memory operand's traces.
fn plain(mut ins: Instruction) -> Instruction {
    ins.set_memory_base(Register::None);
    ins.set_memory_index(Register::None);
    ins.set_segment_prefix(Register::None);
    ins.set_memory_displ_size(0);
    ins.set_memory_displacement64(0);
    ins
}
