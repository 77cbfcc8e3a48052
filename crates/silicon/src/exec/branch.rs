//! Near control flow: JMP, CALL, RET, Jcc, JCXZ, LOOP.
//!
//! A handler is made for 64-bit mode (`LONG`) or for the modes with a code-segment limit. A target that may not
//! be gone to faults at the branch, with nothing changed.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::code::lower::{LowerCtx, gpr, op_base, undefined};
use crate::code::op::{Flow, Op};
use crate::code::thread::go_on;
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::exec::operand::{by_condition, by_mode, by_size, condition, gpr_operand, is_memory, operand_size};
use crate::mmu::Word;
use crate::state::{CodeSize, cr4, reg};

/// Slot of the stack pointer.
const SP: usize = reg::RSP as usize;

impl Cpu {
    /// Checks that execution may go on at `target` in the current code segment: canonical in 64-bit mode,
    /// within the limit of CS otherwise.
    #[inline(always)]
    pub(super) fn check_target<const LONG: bool>(&mut self, target: u64) -> Result<(), Abort> {
        let fine = if LONG {
            (((target << 16) as i64) >> 16) as u64 == target
        } else {
            target <= u64::from(self.state.segs[1].limit)
        };
        if fine { Ok(()) } else { self.check_target_again(LONG, target) }
    }

    #[cold]
    fn check_target_again(&mut self, long: bool, target: u64) -> Result<(), Abort> {
        let canonical_57 = (((target << 7) as i64) >> 7) as u64 == target;
        if long && self.state.cr4 & cr4::LA57 != 0 && canonical_57 {
            return Ok(());
        }
        Err(self.raise(Exception::gp(0)))
    }

    #[inline(always)]
    fn jump<const LONG: bool>(&mut self, op: &Op, target: u64) -> Result<Flow, Abort> {
        self.check_target::<LONG>(target)?;
        self.state.rip = target;
        go_to_rip::<LONG>(self, op)
    }

    /// The return address is stored before the target is looked at: a target that may not be gone to leaves it
    /// below the stack pointer, as on silicon.
    #[inline(always)]
    fn call<T: Word, const LONG: bool>(&mut self, op: &Op, target: u64) -> Result<Flow, Abort> {
        let next = T::from_u64(self.next_of::<LONG>(op));
        if LONG {
            let sp = self.state.regs[SP].wrapping_sub(T::SIZE as u64);
            if self.quick_store(sp, next) {
                self.check_target::<LONG>(target)?;
                self.state.regs[SP] = sp;
                self.state.rip = target;
                return go_on(self, op);
            }
        }
        self.call_slow::<T, LONG>(target, next)
    }

    #[inline(never)]
    fn call_slow<T: Word, const LONG: bool>(&mut self, target: u64, next: T) -> Result<Flow, Abort> {
        let sp = self.state.regs[SP];
        self.push(next)?;
        if let Err(abort) = self.check_target::<LONG>(target) {
            self.state.regs[SP] = sp;
            return Err(abort);
        }
        self.state.rip = target;
        Ok(Flow::End)
    }

    /// Target of a relative branch: outside 64-bit mode truncated to the operand size, whose mask is in
    /// `extra`.
    #[inline(always)]
    pub(super) fn relative<const LONG: bool>(&self, op: &Op) -> u64 {
        let target = self.state.regs[usize::from(reg::IP_BASE)].wrapping_add(op.imm);
        if LONG { target } else { target & u64::from(op.extra) }
    }

    #[inline(always)]
    fn next_of<const LONG: bool>(&self, op: &Op) -> u64 {
        let next = u64::from(op.page_offset) + u64::from(op.length);
        let next = self.state.regs[usize::from(reg::IP_BASE)].wrapping_add(next);
        if LONG { next } else { next & self.state.eip_mask() }
    }
}

/// RIP is set; the block of `op` ends.
#[inline(always)]
fn go_to_rip<const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if LONG { go_on(cpu, op) } else { Ok(Flow::End) }
}

fn jmp_relative<const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    cpu.jump::<LONG>(op, cpu.relative::<LONG>(op))
}

fn jmp_reg<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    cpu.jump::<LONG>(op, cpu.get::<T>(op.r0).to_u64())
}

fn jmp_mem<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let target: T = cpu.load_operand(op)?;
    cpu.jump::<LONG>(op, target.to_u64())
}

fn jcc<const CC: u8, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    if cpu.state.status.condition(CC) {
        return cpu.jump::<LONG>(op, cpu.relative::<LONG>(op));
    }
    cpu.state.rip = cpu.next_of::<LONG>(op);
    go_to_rip::<LONG>(cpu, op)
}

fn call_relative<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    cpu.call::<T, LONG>(op, cpu.relative::<LONG>(op))
}

fn call_reg<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    cpu.call::<T, LONG>(op, cpu.get::<T>(op.r0).to_u64())
}

fn call_mem<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let target: T = cpu.load_operand(op)?;
    cpu.call::<T, LONG>(op, target.to_u64())
}

/// RET; `imm` is the number of bytes to release besides the return address.
fn ret<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let sp = cpu.state.regs[SP];
    if LONG && let Some(target) = cpu.quick_load::<T>(sp) {
        cpu.check_target::<LONG>(target.to_u64())?;
        cpu.state.regs[SP] = sp.wrapping_add(T::SIZE as u64).wrapping_add(op.imm);
        cpu.state.rip = target.to_u64();
        return go_on(cpu, op);
    }
    ret_slow::<T, LONG>(cpu, op)
}

#[inline(never)]
fn ret_slow<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let target = cpu.peek::<T>(0)?.to_u64();
    cpu.check_target::<LONG>(target)?;
    cpu.set_sp(cpu.state.regs[SP].wrapping_add(T::SIZE as u64).wrapping_add(op.imm));
    cpu.state.rip = target;
    Ok(Flow::End)
}

/// JCXZ, JECXZ, JRCXZ: `T` is the address size.
fn jump_if_count_zero<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    if cpu.get::<T>(reg::RCX) == T::default() {
        return cpu.jump::<LONG>(op, cpu.relative::<LONG>(op));
    }
    cpu.state.rip = cpu.next_of::<LONG>(op);
    go_to_rip::<LONG>(cpu, op)
}

/// LOOP, LOOPE, LOOPNE: `T` is the address size, `r2` the kind.
fn loop_count<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let count = T::from_u64(cpu.get::<T>(reg::RCX).to_u64().wrapping_sub(1));
    let zf = cpu.state.status.zf();
    let wanted = match op.r2 {
        LOOPE => zf,
        LOOPNE => !zf,
        _ => true,
    };
    if count != T::default() && wanted {
        let target = cpu.relative::<LONG>(op);
        cpu.check_target::<LONG>(target)?;
        cpu.state.rip = target;
    } else {
        cpu.state.rip = cpu.next_of::<LONG>(op);
    }
    cpu.set(reg::RCX, count);
    go_to_rip::<LONG>(cpu, op)
}

const LOOPE: u8 = 1;
const LOOPNE: u8 = 2;

/// Fills in the target of a relative branch; the operand size in bytes.
pub(super) fn relative_target(ins: &Instruction, op: &mut Op) -> Option<usize> {
    op.imm = ins.near_branch_target();
    let (size, mask) = match ins.op0_kind() {
        OpKind::NearBranch16 => (2, 0xffff),
        OpKind::NearBranch32 => (4, 0xffff_ffff),
        OpKind::NearBranch64 => (8, u32::MAX),
        _ => return None,
    };
    op.extra = mask;
    Some(size)
}

fn lower_jmp(ins: &Instruction, mut op: Op, long: bool) -> Option<Op> {
    let handler = if ins.is_jmp_short_or_near() {
        relative_target(ins, &mut op)?;
        by_mode!(long, LONG => jmp_relative::<LONG>)
    } else if !ins.is_jmp_near_indirect() {
        return None;
    } else if is_memory(ins, 0) {
        by_mode!(long, LONG => by_size!(operand_size(ins, 0), T in [u16 u32 u64] => jmp_mem::<T, LONG>))
    } else {
        op.r0 = gpr(gpr_operand(ins, 0)?);
        by_mode!(long, LONG => by_size!(operand_size(ins, 0), T in [u16 u32 u64] => jmp_reg::<T, LONG>))
    };
    op.handler.set(handler);
    Some(op)
}

fn lower_call(ins: &Instruction, mut op: Op, long: bool) -> Option<Op> {
    let handler = if ins.is_call_near() {
        let size = relative_target(ins, &mut op)?;
        by_mode!(long, LONG => by_size!(size, T in [u16 u32 u64] => call_relative::<T, LONG>))
    } else if !ins.is_call_near_indirect() {
        return None;
    } else if is_memory(ins, 0) {
        by_mode!(long, LONG => by_size!(operand_size(ins, 0), T in [u16 u32 u64] => call_mem::<T, LONG>))
    } else {
        op.r0 = gpr(gpr_operand(ins, 0)?);
        by_mode!(long, LONG => by_size!(operand_size(ins, 0), T in [u16 u32 u64] => call_reg::<T, LONG>))
    };
    op.handler.set(handler);
    Some(op)
}

fn lower_ret(ins: &Instruction, mut op: Op, long: bool) -> Option<Op> {
    let size = match ins.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        Code::Retnq | Code::Retnq_imm16 => 8,
        _ => return None,
    };
    if ins.op_count() == 1 {
        op.imm = u64::from(ins.immediate16());
    }
    op.handler.set(by_mode!(long, LONG => by_size!(size, T in [u16 u32 u64] => ret::<T, LONG>)));
    Some(op)
}

/// Address size in bytes of LOOP, LOOPE, LOOPNE: the width of the count.
fn loop_count_size(code: Code) -> usize {
    match code {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 2,
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX => 8,
        _ => 4,
    }
}

fn lower_loop(ins: &Instruction, mut op: Op, long: bool) -> Option<Op> {
    relative_target(ins, &mut op)?;
    op.r2 = match ins.mnemonic() {
        Mnemonic::Loope => LOOPE,
        Mnemonic::Loopne => LOOPNE,
        _ => 0,
    };
    let size = loop_count_size(ins.code());
    op.handler.set(by_mode!(long, LONG => by_size!(size, T in [u16 u32 u64] => loop_count::<T, LONG>)));
    Some(op)
}

fn lower_count_zero(ins: &Instruction, mut op: Op, long: bool, size: usize) -> Option<Op> {
    relative_target(ins, &mut op)?;
    op.handler
        .set(by_mode!(long, LONG => by_size!(size, T in [u16 u32 u64] => jump_if_count_zero::<T, LONG>)));
    Some(op)
}

/// Lowers this file's instructions.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let mut op = op_base(ins, ctx, undefined);
    let long = ctx.code_size == CodeSize::Bits64;
    match ins.mnemonic() {
        Mnemonic::Jmp => lower_jmp(ins, op, long),
        Mnemonic::Call => lower_call(ins, op, long),
        Mnemonic::Ret => lower_ret(ins, op, long),
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => lower_loop(ins, op, long),
        Mnemonic::Jcxz => lower_count_zero(ins, op, long, 2),
        Mnemonic::Jecxz => lower_count_zero(ins, op, long, 4),
        Mnemonic::Jrcxz => lower_count_zero(ins, op, long, 8),
        _ if ins.is_jcc_short_or_near() => {
            relative_target(ins, &mut op)?;
            let cc = condition(ins)?;
            op.handler.set(by_mode!(long, LONG => by_condition!(cc, CC => jcc::<CC, LONG>)));
            Some(op)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use crate::exec::testing::{GP0, Guest, STACK};
    use crate::state::{CodeSize, reg};

    #[test]
    fn branches_go_where_they_should() {
        // jmp +2; ud2; nop
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.finish(&[0xeb, 2, 0x0f, 0x0b, 0x90]);
        // call +0; pop rax
        guest.finish(&[0xe8, 0, 0, 0, 0, 0x58]);
        assert_eq!(guest.reg(reg::RAX), 0x1005);
        // mov ecx, 5; 1: inc eax; loop 1b
        guest.set(reg::RAX, 0).finish(&[0xb9, 5, 0, 0, 0, 0xff, 0xc0, 0xe2, 0xfc]);
        assert_eq!((guest.reg(reg::RAX), guest.reg(reg::RCX)), (5, 0));
        // jrcxz +2; ud2
        guest.finish(&[0xe3, 2, 0x0f, 0x0b]);
        // push imm32; ret 8
        guest.set(reg::RSP, STACK).finish(&[0x68, 8, 0x10, 0, 0, 0xc2, 8, 0]);
        assert_eq!(guest.reg(reg::RSP), STACK + 8);
        // jmp rax to a non-canonical address
        guest.set(reg::RAX, 1 << 47);
        assert_eq!(guest.fault(&[0xff, 0xe0]), GP0);
        assert_eq!(guest.fault(&[0xff, 0xd0]), GP0);
        // In 16-bit code the target is truncated, and the limit of CS holds.
        let mut guest = Guest::new(CodeSize::Bits16);
        guest.finish(&[0xe9, 0, 0]);
        guest.set(reg::RAX, 0x1_0000);
        assert_eq!(guest.fault(&[0x66, 0xff, 0xe0]), GP0);
    }
}
