//! AAA, AAS, AAM, AAD, DAA, DAS (SDM vol. 2). The decoder makes them #UD in 64-bit mode, so the host cannot
//! execute them for us. Flags that the SDM calls undefined are those of the logical operation on AL.

use iced_x86::{Instruction, Mnemonic};

use crate::code::lower::{LowerCtx, op_base, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::flags::{Rflags, Status};
use crate::state::reg;

/// Slot of AH.
const AH: u8 = reg::RAX | 16;

/// SF, ZF and PF of `al`, with CF and AF as given; OF is clear.
fn status_of(al: u8, cf: bool, af: bool) -> Status {
    Status::default()
        .with(Rflags::CF, cf)
        .with(Rflags::AF, af)
        .with(Rflags::ZF, al == 0)
        .with(Rflags::SF, al & 0x80 != 0)
        .with(Rflags::PF, al.count_ones().is_multiple_of(2))
}

/// DAA and DAS.
fn decimal_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    let old: u8 = cpu.get(reg::RAX);
    let status = cpu.state.status;
    let low = old & 15 > 9 || status.af();
    let high = old > 0x99 || status.cf();
    let correction = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let al = if SUBTRACT { old.wrapping_sub(correction) } else { old.wrapping_add(correction) };
    // DAS also reports a borrow of the low digit's correction.
    let borrow = SUBTRACT && low && old < 6;
    cpu.set(reg::RAX, al);
    cpu.state.status = status_of(al, high || borrow, low);
    Ok(Flow::Next)
}

/// AAA and AAS.
fn ascii_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    let ax: u16 = cpu.get(reg::RAX);
    let adjust = ax & 15 > 9 || cpu.state.status.af();
    let adjusted = match (adjust, SUBTRACT) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(6).wrapping_sub(0x100),
    } & 0xff0f;
    cpu.set(reg::RAX, adjusted);
    cpu.state.status = status_of(adjusted as u8, adjust, adjust);
    Ok(Flow::Next)
}

fn aam(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let al: u8 = cpu.get(reg::RAX);
    let base = op.imm as u8;
    let (Some(quotient), Some(remainder)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(cpu.raise(Exception::DE));
    };
    cpu.set(reg::RAX, remainder);
    cpu.set(AH, quotient);
    cpu.state.status = status_of(remainder, false, false);
    Ok(Flow::Next)
}

fn aad(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let (al, ah): (u8, u8) = (cpu.get(reg::RAX), cpu.get(AH));
    let result = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
    cpu.set(reg::RAX, u16::from(result));
    cpu.state.status = status_of(result, false, false);
    Ok(Flow::Next)
}

/// Lowers this file's instructions.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let handler: Handler = match ins.mnemonic() {
        Mnemonic::Daa => decimal_adjust::<false>,
        Mnemonic::Das => decimal_adjust::<true>,
        Mnemonic::Aaa => ascii_adjust::<false>,
        Mnemonic::Aas => ascii_adjust::<true>,
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        _ => return None,
    };
    let mut op = op_base(ins, ctx, undefined);
    op.imm = u64::from(ins.immediate8());
    op.handler.set(handler);
    Some(op)
}

#[cfg(test)]
mod tests {
    use crate::exception::vector;
    use crate::exec::testing::Guest;
    use crate::flags::Rflags;
    use crate::state::{CodeSize, reg};

    #[test]
    fn adjustments() {
        let none = Rflags::empty();
        let both = Rflags::CF | Rflags::AF;
        // Code, AX and flags before; AX, CF and AF after.
        let cases: &[(&[u8], u64, Rflags, u64, Rflags)] = &[
            (&[0x27], 0xae, none, 0x14, both),
            (&[0x27], 0x79, none, 0x79, none),
            (&[0x27], 0x13, Rflags::AF, 0x19, Rflags::AF),
            (&[0x27], 0x9a, none, 0x00, both),
            (&[0x2f], 0x88, Rflags::AF, 0x82, Rflags::AF),
            (&[0x2f], 0x02, Rflags::AF, 0xfc, both),
            (&[0x37], 0x0f, none, 0x105, both),
            (&[0x37], 0x05, none, 0x05, none),
            (&[0x3f], 0x20f, none, 0x109, both),
            (&[0xd4, 10], 0x63, none, 0x909, none),
            (&[0xd5, 10], 0x909, none, 0x63, none),
        ];
        for &(code, ax, before, after, flags) in cases {
            let mut guest = Guest::new(CodeSize::Bits32);
            guest.set(reg::RAX, ax).set_flags(before).finish(code);
            assert_eq!((guest.reg(reg::RAX), guest.flags() & both), (after, flags), "{code:02x?} {ax:#x}");
        }
        assert_eq!(Guest::new(CodeSize::Bits32).fault(&[0xd4, 0]), (vector::DE, None));
        assert_eq!(Guest::new(CodeSize::Bits64).fault(&[0x27]), (vector::UD, None));
    }
}
