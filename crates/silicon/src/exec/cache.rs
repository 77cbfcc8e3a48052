//! Cache control and direct stores. Nothing that a guest can see depends on caches here, so what is left of
//! these instructions is who may use them, and the checks of their addresses.

use iced_x86::{Code, Instruction};

use super::control::{allowed_if, privileged};
use crate::code::lower::{LowerCtx, gpr, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::state::Seg;
use crate::vmx::Exit;

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let (handler, register): (Handler, u32) = match ins.code() {
        Code::Invd => (invd, 0),
        Code::Wbinvd | Code::Wbnoinvd => (wbinvd, 0),
        Code::Clflush_m8 | Code::Clflushopt_m8 | Code::Clwb_m8 => (touch_line, 0),
        Code::Movdiri_m32_r32 => (movdiri::<u32>, 1),
        Code::Movdiri_m64_r64 => (movdiri::<u64>, 1),
        Code::Movdir64b_r16_m512 | Code::Movdir64b_r32_m512 | Code::Movdir64b_r64_m512 => (movdir64b, 0),
        _ => return None,
    };
    let mut op = op_base(ins, ctx, handler);
    if ins.op_count() > register && ins.op_register(register).is_gpr() {
        op.r0 = gpr(ins.op_register(register));
    }
    Some(op)
}

fn invd(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    privileged(cpu)?;
    Err(cpu.exit(Exit::Invd))
}

/// WBINVD and WBNOINVD.
fn wbinvd(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    privileged(cpu)?;
    Err(cpu.exit(Exit::Wbinvd))
}

/// CLFLUSH, CLFLUSHOPT, CLWB: checked as a load of a byte, which sets the accessed flag.
fn touch_line(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let lin = cpu.ea(op, 1, false)?;
    cpu.probe(cpu.op_seg(op), lin, 1, false)?;
    Ok(Flow::Next)
}

fn movdiri<T: crate::mmu::Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let lin = cpu.ea(op, T::SIZE, true)?;
    let value = cpu.get::<T>(op.r0);
    cpu.store(cpu.op_seg(op), lin, value)?;
    Ok(Flow::Next)
}

/// MOVDIR64B: the destination is ES:register and must be aligned to 64 bytes.
fn movdir64b(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let source = cpu.ea(op, 64, false)?;
    let offset = cpu.state.regs[usize::from(op.r0)] & op.addr_mask();
    let destination = cpu.linearize(Seg::Es, offset, 64, true)?;
    allowed_if(cpu, destination & 63 == 0)?;
    let mut line = [0; 64];
    cpu.read_bytes(cpu.op_seg(op), source, &mut line)?;
    cpu.write_bytes(Seg::Es, destination, &line)?;
    Ok(Flow::Next)
}
