//! Restricted transactional memory: XBEGIN, XEND, XABORT, XTEST (SDM vol. 1, chapter 16). No transaction ever commits: XBEGIN aborts at
//! once, as on a processor with IA32_TSX_CTRL.RTM_DISABLE, so software takes the other way that it must have.

use iced_x86::{Code, Instruction};

use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::exec::branch::relative_target;
use crate::exec::operand::by_mode;
use crate::flags::{Rflags, Status};
use crate::state::{CodeSize, reg};

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let begins = matches!(ins.code(), Code::Xbegin_rel16 | Code::Xbegin_rel32);
    let handler: Handler = match ins.code() {
        _ if begins => by_mode!(ctx.code_size == CodeSize::Bits64, LONG => xbegin::<LONG>),
        Code::Xend => xend,
        Code::Xabort_imm8 => xabort,
        Code::Xtest => xtest,
        _ => return None,
    };
    let mut op = op_base(ins, ctx, handler);
    if begins {
        relative_target(ins, &mut op)?;
    }
    Some(op)
}

/// The abort status, zero: no reason is given and another attempt is not advised.
const ABORTED: u64 = 0;

fn xbegin<const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let target = cpu.relative::<LONG>(op);
    cpu.check_target::<LONG>(target)?;
    cpu.state.rip = target;
    cpu.state.regs[usize::from(reg::RAX)] = ABORTED;
    Ok(Flow::End)
}

/// There is no transaction to end.
fn xend(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    Err(cpu.raise(Exception::gp(0)))
}

/// Nor one to abort: no operation.
fn xabort(_: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    Ok(Flow::Next)
}

/// ZF: not in a transaction.
fn xtest(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    cpu.state.status = Status::from_rflags(0).with(Rflags::ZF, true);
    Ok(Flow::Next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::testing::{CODE, Guest};
    use crate::flags::Rflags;
    use crate::model::{Feature, FeatureSet, Features};
    use crate::vmx::Exit;

    /// The exception that the code ends with.
    fn raised(guest: &mut Guest, code: &[u8]) -> Exception {
        match guest.run(code) {
            Exit::Exception(exception) => exception,
            exit => panic!("{exit:?}"),
        }
    }

    /// XBEGIN over one byte, in each mode.
    #[test]
    fn xbegin_goes_to_the_other_way_with_status_zero() {
        for size in [CodeSize::Bits16, CodeSize::Bits32, CodeSize::Bits64] {
            let mut guest = Guest::new(size);
            guest.cpu.state.regs[usize::from(reg::RAX)] = u64::MAX;
            let mut code =
                if size == CodeSize::Bits16 { vec![0xc7, 0xf8, 1, 0] } else { vec![0xc7, 0xf8, 1, 0, 0, 0] };
            let length = code.len() as u64;
            code.extend([0xcc, 0x0f, 0x0b]);
            assert_eq!(raised(&mut guest, &code), Exception::UD, "{size:?}");
            assert_eq!(guest.cpu.state.rip, CODE + length + 1, "{size:?}");
            assert_eq!(guest.cpu.state.regs[usize::from(reg::RAX)], 0, "{size:?}");
        }
    }

    #[test]
    fn outside_of_transactions() {
        let mut guest = Guest::new(CodeSize::Bits64);
        assert_eq!(raised(&mut guest, &[0x0f, 0x01, 0xd5]), Exception::gp(0), "xend");
        assert_eq!(raised(&mut guest, &[0xc6, 0xf8, 7, 0x0f, 0x0b]), Exception::UD, "xabort does nothing");
        assert_eq!(guest.cpu.state.rip, CODE + 3);
        guest.cpu.state.status = Status::from_rflags(0x8d5);
        assert_eq!(raised(&mut guest, &[0x0f, 0x01, 0xd6, 0x0f, 0x0b]), Exception::UD, "xtest");
        assert_eq!(guest.cpu.state.status.to_rflags() & 0x8d5, Rflags::ZF.bits());
    }

    #[test]
    fn processors_without_transactions_have_none_of_them() {
        for code in
            [&[0xc7, 0xf8, 0, 0, 0, 0][..], &[0x0f, 0x01, 0xd5], &[0xc6, 0xf8, 7], &[0x0f, 0x01, 0xd6]]
        {
            let mut guest = Guest::new(CodeSize::Bits64);
            let set = guest.cpu.features.set().minus(FeatureSet::of(&[Feature::Rtm]));
            guest.cpu.features = Features::new(set, 46);
            guest.cpu.refresh_mode();
            assert_eq!(raised(&mut guest, code), Exception::UD, "{code:02x?}");
            assert_eq!(guest.cpu.state.rip, CODE);
        }
    }
}
