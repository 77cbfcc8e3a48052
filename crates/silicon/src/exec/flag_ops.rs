//! CLC, STC, CMC, CLD, STD, LAHF, SAHF, SALC: instructions on flags that no privilege guards; and BOUND.

use iced_x86::{Instruction, Mnemonic};

use crate::code::lower::{LowerCtx, gpr, op_base, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::code::thread::next;
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::exec::mov::sign_extend;
use crate::exec::operand::{by_size, gpr_operand, operand_size};
use crate::flags::{Rflags, Status};
use crate::mmu::Word;
use crate::state::reg;

/// Slot of AH.
const AH: u8 = reg::RAX | 16;

fn clc(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.state.status = cpu.state.status.with(Rflags::CF, false);
    next(cpu, op)
}

fn stc(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.state.status = cpu.state.status.with(Rflags::CF, true);
    next(cpu, op)
}

fn cmc(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.state.status = cpu.state.status.with(Rflags::CF, !cpu.state.status.cf());
    next(cpu, op)
}

fn cld(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.state.rflags_system &= !Rflags::DF.bits();
    next(cpu, op)
}

fn std(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.state.rflags_system |= Rflags::DF.bits();
    next(cpu, op)
}

fn lahf(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let low = cpu.state.status.to_rflags() | Rflags::FIXED.bits();
    cpu.set(AH, low as u8);
    next(cpu, op)
}

fn sahf(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let low: u8 = cpu.get(AH);
    let of = cpu.state.status.of();
    cpu.state.status = Status::from_rflags(u64::from(low)).with(Rflags::OF, of);
    next(cpu, op)
}

/// SALC (undocumented): AL becomes 0xff or 0 by CF.
fn salc(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let value: u8 = if cpu.state.status.cf() { 0xff } else { 0 };
    cpu.set(reg::RAX, value);
    next(cpu, op)
}

fn bound<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let lin = cpu.ea(op, 2 * T::SIZE, false)?;
    let seg = cpu.op_seg(op);
    let lower: T = cpu.load(seg, lin)?;
    let upper: T = cpu.load(seg, lin.wrapping_add(T::SIZE as u64) & 0xffff_ffff)?;
    let signed = |value: T| sign_extend(value) as i64;
    let index = signed(cpu.get(op.r0));
    if index < signed(lower) || index > signed(upper) {
        return Err(cpu.raise(Exception::BR));
    }
    next(cpu, op)
}

/// Lowers this file's instructions.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let mut op = op_base(ins, ctx, undefined);
    let handler: Handler = match ins.mnemonic() {
        Mnemonic::Clc => clc,
        Mnemonic::Stc => stc,
        Mnemonic::Cmc => cmc,
        Mnemonic::Cld => cld,
        Mnemonic::Std => std,
        Mnemonic::Lahf => lahf,
        Mnemonic::Sahf => sahf,
        Mnemonic::Salc => salc,
        Mnemonic::Bound => {
            op.r0 = gpr(gpr_operand(ins, 0)?);
            by_size!(operand_size(ins, 0), T in [u16 u32] => bound::<T>)
        }
        _ => return None,
    };
    op.handler.set(handler);
    Some(op)
}

#[cfg(test)]
mod tests {
    use crate::exception::vector;
    use crate::exec::testing::{DATA, Guest};
    use crate::flags::Rflags;
    use crate::state::{CodeSize, reg};

    #[test]
    fn carry_direction_and_ah() {
        let mut guest = Guest::new(CodeSize::Bits64);
        // stc; cmc; stc; std; lahf
        guest.set_flags(Rflags::OF | Rflags::SF).finish(&[0xf9, 0xf5, 0xf9, 0xfd, 0x9f]);
        assert_eq!(guest.reg(reg::RAX), 0x8300);
        assert!(guest.cpu.state.flag(Rflags::DF));
        // cld; clc; sahf
        guest.set(reg::RAX, 0x4400).finish(&[0xfc, 0xf8, 0x9e]);
        assert_eq!(guest.flags(), Rflags::OF | Rflags::ZF | Rflags::PF);
        assert!(!guest.cpu.state.flag(Rflags::DF));
    }

    #[test]
    fn bounds_are_signed_and_inclusive() {
        let mut guest = Guest::new(CodeSize::Bits32);
        guest.put(DATA, &(-2i32).to_le_bytes());
        guest.put(DATA + 4, &3i32.to_le_bytes());
        guest.set(reg::RBX, DATA);
        for index in [-2i32, 0, 3] {
            guest.set(reg::RAX, u64::from(index as u32)).finish(&[0x62, 0x03]);
        }
        for index in [-3i32, 4] {
            guest.set(reg::RAX, u64::from(index as u32));
            assert_eq!(guest.fault(&[0x62, 0x03]), (vector::BR, None));
        }
    }
}
