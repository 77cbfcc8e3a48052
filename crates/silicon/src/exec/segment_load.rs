//! Loads and stores of segment registers: MOV, POP, LDS, LES, LFS, LGS, LSS (SDM vol. 2).

use iced_x86::{Code, Instruction, OpKind, Register};

use crate::code::lower::{LowerCtx, gpr, op_base, seg_index, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::state::{Seg, interruptibility};
use crate::system::stack::Stack;

impl Op {
    /// Whether there is a memory operand.
    pub(crate) fn is_memory(&self) -> bool {
        self.seg != 6
    }
}

impl Cpu {
    /// The 16-bit source operand in register `r` or memory.
    pub(crate) fn word_operand(&mut self, op: &Op, r: u8) -> Result<u16, Abort> {
        if !op.is_memory() {
            return Ok(self.get(r));
        }
        let lin = self.ea(op, 2, false)?;
        self.load(self.op_seg(op), lin)
    }

    /// Stores a selector-like value: 16 bits to memory, zero-extended to the operand size in a register.
    pub(crate) fn store_word_operand(&mut self, op: &Op, r: u8, value: u16) -> Result<(), Abort> {
        if op.is_memory() {
            let lin = self.ea(op, 2, true)?;
            return self.store(self.op_seg(op), lin, value);
        }
        match op.size {
            2 => self.set(r, value),
            _ => self.set(r, u64::from(value)),
        }
        Ok(())
    }

    /// Ends a load of `seg` by MOV or POP: after SS, interrupts and debug exceptions wait for the next
    /// instruction.
    fn after_segment_load(&mut self, op: &Op, seg: Seg) -> Flow {
        if seg != Seg::Ss {
            return Flow::Next;
        }
        self.state.interruptibility |= interruptibility::MOV_SS;
        self.refresh_local();
        self.end_after(op)
    }
}

fn mov_to_segment(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let seg = Seg::from_index(op.r0);
    let selector = cpu.word_operand(op, op.r1)?;
    cpu.load_segment(seg, selector)?;
    Ok(cpu.after_segment_load(op, seg))
}

fn mov_from_segment(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let selector = cpu.state.segs[usize::from(op.r1) % 6].selector;
    cpu.store_word_operand(op, op.r0, selector)?;
    Ok(Flow::Next)
}

fn pop_segment(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let seg = Seg::from_index(op.r0);
    let mut stack = Stack::current(&cpu.state);
    let selector = stack.pop(cpu, u64::from(op.size))? as u16;
    let segment = cpu.check_segment(seg, selector)?;
    stack.commit_pointer(cpu);
    cpu.set_segment(seg, segment);
    Ok(cpu.after_segment_load(op, seg))
}

fn load_far_pointer(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let seg = Seg::from_index(op.r1);
    let lin = cpu.ea(op, usize::from(op.size) + 2, false)?;
    let (selector, offset) = cpu.far_pointer(cpu.op_seg(op), lin, op.size)?;
    cpu.load_segment(seg, selector)?;
    match op.size {
        2 => cpu.set(op.r0, offset as u16),
        _ => cpu.set(op.r0, offset),
    }
    Ok(if seg == Seg::Ss { cpu.end_after(op) } else { Flow::Next })
}

/// Handler and operand size.
fn form(code: Code) -> Option<(Handler, u8)> {
    Some(match code {
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => (mov_to_segment, 2),
        Code::Mov_rm16_Sreg => (mov_from_segment, 2),
        Code::Mov_r32m16_Sreg => (mov_from_segment, 4),
        Code::Mov_r64m16_Sreg => (mov_from_segment, 8),
        Code::Popw_ES | Code::Popw_SS | Code::Popw_DS | Code::Popw_FS | Code::Popw_GS => (pop_segment, 2),
        Code::Popd_ES | Code::Popd_SS | Code::Popd_DS | Code::Popd_FS | Code::Popd_GS => (pop_segment, 4),
        Code::Popq_FS | Code::Popq_GS => (pop_segment, 8),
        _ => return None,
    })
}

/// Operand size and segment register of LDS and its kin.
fn far_form(code: Code) -> Option<(u8, Seg)> {
    Some(match code {
        Code::Les_r16_m1616 => (2, Seg::Es),
        Code::Les_r32_m1632 => (4, Seg::Es),
        Code::Lds_r16_m1616 => (2, Seg::Ds),
        Code::Lds_r32_m1632 => (4, Seg::Ds),
        Code::Lss_r16_m1616 => (2, Seg::Ss),
        Code::Lss_r32_m1632 => (4, Seg::Ss),
        Code::Lss_r64_m1664 => (8, Seg::Ss),
        Code::Lfs_r16_m1616 => (2, Seg::Fs),
        Code::Lfs_r32_m1632 => (4, Seg::Fs),
        Code::Lfs_r64_m1664 => (8, Seg::Fs),
        Code::Lgs_r16_m1616 => (2, Seg::Gs),
        Code::Lgs_r32_m1632 => (4, Seg::Gs),
        Code::Lgs_r64_m1664 => (8, Seg::Gs),
        _ => return None,
    })
}

/// Slot of operand `n` if it is a register.
fn register_slot(ins: &Instruction, n: u32) -> u8 {
    if n >= ins.op_count() || ins.op_kind(n) != OpKind::Register {
        return 0;
    }
    let register = ins.op_register(n);
    if register.is_segment_register() { seg_index(register) } else { gpr(register) }
}

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    if let Some((size, seg)) = far_form(ins.code()) {
        let mut op = op_base(ins, ctx, load_far_pointer);
        (op.size, op.r0, op.r1) = (size, register_slot(ins, 0), seg as u8);
        return Some(op);
    }
    let (mut handler, size) = form(ins.code())?;
    if ins.op0_register() == Register::CS {
        handler = undefined;
    }
    let mut op = op_base(ins, ctx, handler);
    (op.size, op.r0, op.r1) = (size, register_slot(ins, 0), register_slot(ins, 1));
    Some(op)
}
