//! MOV to and from debug registers (SDM vol. 2, MOV; vol. 3B, 17.2).

use iced_x86::{Code, Instruction, Register};

use crate::code::lower::{LowerCtx, gpr, op_base, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::state::{CodeSize, cr4};
use crate::system::debug::{DR6_BD, dr7};
use crate::vmx::Exit;

/// What both directions check first; `dr` is the debug register's number, `register` the general one's.
fn check(cpu: &mut Cpu, dr: u8, register: u8, read: bool) -> Result<(), Abort> {
    if matches!(dr, 4 | 5) && cpu.state.cr4 & cr4::DE != 0 {
        return Err(cpu.raise(Exception::UD));
    }
    if cpu.state.cpl != 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    if cpu.state.dr7 & dr7::GD != 0 {
        return Err(cpu.raise(Exception::db(DR6_BD)));
    }
    if cpu.controls.mov_dr_exiting {
        return Err(cpu.exit(Exit::MovDr { dr, register, read }));
    }
    Ok(())
}

fn mov_from(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    check(cpu, op.r1, op.r0, true)?;
    let value = cpu.debug_register(op.r1);
    match cpu.state.code_size {
        CodeSize::Bits64 => cpu.set(op.r0, value),
        _ => cpu.set(op.r0, value as u32),
    }
    Ok(Flow::Next)
}

fn mov_to(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    check(cpu, op.r0, op.r1, false)?;
    let value = match cpu.state.code_size {
        CodeSize::Bits64 => cpu.get::<u64>(op.r1),
        _ => u64::from(cpu.get::<u32>(op.r1)),
    };
    if op.r0 >= 4 && value >> 32 != 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    cpu.set_debug_register(op.r0, value);
    Ok(cpu.end_after(op))
}

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let (handler, dr): (Handler, u8) = match ins.code() {
        Code::Mov_r32_dr | Code::Mov_r64_dr => (mov_from, number(ins.op1_register())),
        Code::Mov_dr_r32 | Code::Mov_dr_r64 => (mov_to, number(ins.op0_register())),
        _ => return None,
    };
    // REX.R names DR8 to DR15, which do not exist.
    let mut op = op_base(ins, ctx, if dr < 8 { handler } else { undefined });
    (op.r0, op.r1) = match ins.op0_register() {
        general if general.is_gpr() => (gpr(general), dr),
        _ => (dr, gpr(ins.op1_register())),
    };
    Some(op)
}

fn number(register: Register) -> u8 {
    (register as u32).wrapping_sub(Register::DR0 as u32) as u8
}
