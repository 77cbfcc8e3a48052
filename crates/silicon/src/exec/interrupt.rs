//! INT n, INT3, INTO, INT1 (SDM vol. 2, INT n/INTO/INT3/INT1).

use iced_x86::{Code, Instruction};

use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception, vector};
use crate::state::cr4;
use crate::system::deliver::Event;
use crate::vmx::Exit;

/// INT n. In virtual-8086 mode it needs IOPL 3, unless VME sends it to the 8086 program's own handler.
fn int_n(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let (vector, next_ip) = (op.imm as u8, cpu.next_ip(op));
    if cpu.state.v8086() {
        if cpu.state.cr4 & cr4::VME != 0 && !cpu.v8086_uses_idt(vector)? {
            cpu.redirect_v8086(vector, next_ip)?;
            cpu.refresh_local();
            return Ok(Flow::End);
        }
        if cpu.state.iopl() < 3 {
            return Err(cpu.raise(Exception::gp(0)));
        }
    }
    cpu.deliver_instruction(Event::Software { vector, next_ip })?;
    Ok(Flow::End)
}

/// INT3 and INTO are exceptions too, so the exception bitmap selects them.
fn software_exception(cpu: &mut Cpu, op: &Op, vector: u8) -> Result<Flow, Abort> {
    check_bitmap(cpu, vector)?;
    let next_ip = cpu.next_ip(op);
    cpu.deliver_instruction(Event::Software { vector, next_ip })?;
    Ok(Flow::End)
}

fn check_bitmap(cpu: &mut Cpu, vector: u8) -> Result<(), Abort> {
    if cpu.controls.exception_bitmap & (1 << vector) == 0 {
        return Ok(());
    }
    Err(cpu.exit(Exit::Exception(Exception { vector, error_code: None, payload: 0 })))
}

fn int3(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    software_exception(cpu, op, vector::BP)
}

fn into(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if !cpu.state.status.of() {
        return Ok(Flow::Next);
    }
    software_exception(cpu, op, vector::OF)
}

fn int1(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    check_bitmap(cpu, vector::DB)?;
    let next_ip = cpu.next_ip(op);
    cpu.deliver_instruction(Event::Int1 { next_ip })?;
    Ok(Flow::End)
}

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let handler: Handler = match ins.code() {
        Code::Int_imm8 => int_n,
        Code::Int3 => int3,
        Code::Into => into,
        Code::Int1 => int1,
        _ => return None,
    };
    let mut op = op_base(ins, ctx, handler);
    if ins.code() == Code::Int_imm8 {
        op.imm = u64::from(ins.immediate8());
    }
    Some(op)
}
