//! The stack: PUSH, POP, PUSHA, POPA, ENTER, LEAVE, and what other families push and pop.
//!
//! POP of a segment register and PUSHF/POPF are system instructions and live elsewhere.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::code::lower::{LowerCtx, gpr, op_base, seg_index, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::code::thread::next;
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::exec::operand::{by_mode, by_size, gpr_operand, is_immediate, is_memory};
use crate::mmu::Word;
use crate::state::{CodeSize, Seg, reg};

/// Slot of the stack pointer.
const SP: usize = reg::RSP as usize;
/// Slot of the frame pointer.
const BP: usize = reg::RBP as usize;

impl Cpu {
    /// The mask that the stack pointer wraps at (SDM vol. 1, 6.2.3).
    #[inline(always)]
    pub(crate) fn stack_mask(&self) -> u64 {
        match (self.state.code_size, self.state.stack32) {
            (CodeSize::Bits64, _) => u64::MAX,
            (_, true) => 0xffff_ffff,
            (_, false) => 0xffff,
        }
    }

    /// Linear address of `size` bytes at stack offset `sp`.
    #[inline(always)]
    pub(crate) fn stack_linear(&mut self, sp: u64, size: usize, write: bool) -> Result<u64, Abort> {
        if self.state.code_size == CodeSize::Bits64 {
            return Ok(sp);
        }
        let offset = sp & self.stack_mask();
        self.linearize(Seg::Ss, offset, size, write)
    }

    /// Sets RSP, ESP or SP, whichever the stack's width says; a 16-bit stack keeps the upper bits.
    #[inline(always)]
    pub(crate) fn set_sp(&mut self, sp: u64) {
        let mask = self.stack_mask();
        let kept = if mask == 0xffff { self.state.regs[SP] & !mask } else { 0 };
        self.state.regs[SP] = kept | (sp & mask);
    }

    /// Loads the word `offset` bytes above the top of the stack.
    #[inline(always)]
    pub(crate) fn peek<T: Word>(&mut self, offset: u64) -> Result<T, Abort> {
        let lin = self.stack_linear(self.state.regs[SP].wrapping_add(offset), T::SIZE, false)?;
        self.load(Seg::Ss, lin)
    }

    /// Pushes a word. On a fault the stack pointer is what it was.
    #[inline(always)]
    pub(crate) fn push<T: Word>(&mut self, value: T) -> Result<(), Abort> {
        let sp = self.state.regs[SP].wrapping_sub(T::SIZE as u64);
        let lin = self.stack_linear(sp, T::SIZE, true)?;
        self.store(Seg::Ss, lin, value)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Pops a word. On a fault the stack pointer is what it was.
    #[inline(always)]
    pub(crate) fn pop<T: Word>(&mut self) -> Result<T, Abort> {
        let value = self.peek(0)?;
        self.set_sp(self.state.regs[SP].wrapping_add(T::SIZE as u64));
        Ok(value)
    }
}

/// Pushes `value` and goes on. `LONG`: made for 64-bit mode, where the stack has no segment to check.
#[inline(always)]
fn push_and_go<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op, value: T) -> Result<Flow, Abort> {
    if LONG {
        let sp = cpu.state.regs[SP].wrapping_sub(T::SIZE as u64);
        if cpu.quick_store(sp, value) {
            cpu.state.regs[SP] = sp;
            return next(cpu, op);
        }
    }
    push_and_go_slow(cpu, op, value)
}

#[inline(never)]
fn push_and_go_slow<T: Word>(cpu: &mut Cpu, op: &Op, value: T) -> Result<Flow, Abort> {
    cpu.at(op);
    cpu.push(value)?;
    next(cpu, op)
}

fn push_reg<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    push_and_go::<T, LONG>(cpu, op, cpu.get(op.r0))
}

fn push_imm<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    push_and_go::<T, LONG>(cpu, op, T::from_u64(op.imm))
}

fn push_mem<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let value: T = cpu.load_operand(op)?;
    cpu.push(value)?;
    next(cpu, op)
}

fn push_seg<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let selector = cpu.state.segs[usize::from(op.r0 % 6)].selector;
    cpu.push(T::from_u64(u64::from(selector)))?;
    next(cpu, op)
}

/// A 32-bit push of a segment register stores 16 bits only (SDM vol. 2, PUSH).
fn push_seg32(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let selector = cpu.state.segs[usize::from(op.r0 % 6)].selector;
    let sp = cpu.state.regs[SP].wrapping_sub(4);
    let lin = cpu.stack_linear(sp, 2, true)?;
    cpu.store(Seg::Ss, lin, selector)?;
    cpu.set_sp(sp);
    next(cpu, op)
}

fn pop_reg<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let sp = cpu.state.regs[SP];
    if LONG && let Some(value) = cpu.quick_load::<T>(sp) {
        cpu.state.regs[SP] = sp.wrapping_add(T::SIZE as u64);
        cpu.set(op.r0, value);
        return next(cpu, op);
    }
    pop_reg_slow::<T>(cpu, op)
}

#[inline(never)]
fn pop_reg_slow<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let value: T = cpu.pop()?;
    cpu.set(op.r0, value);
    next(cpu, op)
}

/// POP to memory: an address that uses the stack pointer uses it as it is after the increment.
fn pop_mem<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let before = cpu.state.regs[SP];
    let value: T = cpu.pop()?;
    let stored = cpu.store_operand(op, value);
    if let Err(abort) = stored {
        cpu.state.regs[SP] = before;
        return Err(abort);
    }
    next(cpu, op)
}

/// PUSHA: every word is checked before the first is written.
fn pusha<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let sp = cpu.state.regs[SP];
    let mut at = [0; 8];
    for (i, lin) in at.iter_mut().enumerate() {
        let offset = sp.wrapping_sub(((i + 1) * T::SIZE) as u64);
        *lin = cpu.stack_linear(offset, T::SIZE, true)?;
        cpu.probe(Seg::Ss, *lin, T::SIZE, true)?;
    }
    for (register, lin) in (0u8..).zip(at) {
        let value: T = cpu.get(register);
        cpu.store(Seg::Ss, lin, value)?;
    }
    cpu.set_sp(sp.wrapping_sub(8 * T::SIZE as u64));
    next(cpu, op)
}

/// POPA: the stack's image of the stack pointer is skipped.
fn popa<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let sp = cpu.state.regs[SP];
    let mut values = [T::default(); 8];
    for (i, value) in values.iter_mut().enumerate() {
        *value = cpu.peek((i * T::SIZE) as u64)?;
    }
    for (register, value) in (0..8u8).rev().zip(values) {
        if register != reg::RSP {
            cpu.set(register, value);
        }
    }
    cpu.set_sp(sp.wrapping_add(8 * T::SIZE as u64));
    next(cpu, op)
}

/// ENTER (SDM vol. 2). The registers change only when all of it has succeeded.
fn enter<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let (old_sp, old_bp) = (cpu.state.regs[SP], cpu.state.regs[BP]);
    if let Err(abort) = enter_frame::<T>(cpu, op) {
        (cpu.state.regs[SP], cpu.state.regs[BP]) = (old_sp, old_bp);
        return Err(abort);
    }
    next(cpu, op)
}

fn enter_frame<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<(), Abort> {
    let level = op.extra;
    let mut bp = cpu.state.regs[BP];
    cpu.push(T::from_u64(bp))?;
    let frame = cpu.state.regs[SP];
    if level > 0 {
        for _ in 1..level {
            bp = bp.wrapping_sub(T::SIZE as u64);
            let lin = cpu.stack_linear(bp, T::SIZE, false)?;
            let link: T = cpu.load(Seg::Ss, lin)?;
            cpu.push(link)?;
        }
        cpu.push(T::from_u64(frame))?;
    }
    let sp = cpu.state.regs[SP].wrapping_sub(op.imm);
    // ENTER faults wherever a write at the final stack pointer would; alignment is checked too.
    let top = cpu.stack_linear(sp, T::SIZE, true)?;
    cpu.load_for_write(Seg::Ss, top, T::SIZE)?;
    cpu.set(reg::RBP, T::from_u64(frame));
    cpu.set_sp(sp);
    Ok(())
}

fn leave<T: Word, const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let bp = cpu.state.regs[BP];
    if LONG && let Some(value) = cpu.quick_load::<T>(bp) {
        cpu.state.regs[SP] = bp.wrapping_add(T::SIZE as u64);
        cpu.set(reg::RBP, value);
        return next(cpu, op);
    }
    leave_slow::<T>(cpu, op)
}

#[inline(never)]
fn leave_slow<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let bp = cpu.state.regs[BP];
    let lin = cpu.stack_linear(bp, T::SIZE, false)?;
    let value: T = cpu.load(Seg::Ss, lin)?;
    cpu.set_sp(bp.wrapping_add(T::SIZE as u64));
    cpu.set(reg::RBP, value);
    next(cpu, op)
}

fn lower_push(ins: &Instruction, mut op: Op, long: bool) -> Option<Op> {
    let size = usize::try_from(-ins.stack_pointer_increment()).ok()?;
    let handler: Handler = if let Some(register) = gpr_operand(ins, 0) {
        op.r0 = gpr(register);
        by_mode!(long, LONG => by_size!(size, T in [u16 u32 u64] => push_reg::<T, LONG>))
    } else if is_immediate(ins, 0) {
        op.imm = ins.immediate(0);
        by_mode!(long, LONG => by_size!(size, T in [u16 u32 u64] => push_imm::<T, LONG>))
    } else if is_memory(ins, 0) {
        by_size!(size, T in [u16 u32 u64] => push_mem::<T>)
    } else if ins.op0_kind() == OpKind::Register && ins.op0_register().is_segment_register() {
        op.r0 = seg_index(ins.op0_register());
        if size == 4 { push_seg32 } else { by_size!(size, T in [u16 u64] => push_seg::<T>) }
    } else {
        return None;
    };
    op.handler.set(handler);
    Some(op)
}

fn lower_pop(ins: &Instruction, mut op: Op, long: bool) -> Option<Op> {
    let size = usize::try_from(ins.stack_pointer_increment()).ok()?;
    if let Some(register) = gpr_operand(ins, 0) {
        op.r0 = gpr(register);
        op.handler.set(by_mode!(long, LONG => by_size!(size, T in [u16 u32 u64] => pop_reg::<T, LONG>)));
    } else if is_memory(ins, 0) {
        op.handler.set(by_size!(size, T in [u16 u32 u64] => pop_mem::<T>));
    } else {
        return None;
    }
    Some(op)
}

/// Lowers this file's instructions.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let mut op = op_base(ins, ctx, undefined);
    let long = ctx.code_size == CodeSize::Bits64;
    let handler: Handler = match ins.mnemonic() {
        Mnemonic::Push => return lower_push(ins, op, long),
        Mnemonic::Pop => return lower_pop(ins, op, long),
        Mnemonic::Pusha => pusha::<u16>,
        Mnemonic::Pushad => pusha::<u32>,
        Mnemonic::Popa => popa::<u16>,
        Mnemonic::Popad => popa::<u32>,
        Mnemonic::Leave => {
            // LEAVE pops the frame pointer: its size is the operand size.
            let size = leave_size(ins);
            by_mode!(long, LONG => by_size!(size, T in [u16 u32 u64] => leave::<T, LONG>))
        }
        Mnemonic::Enter => {
            op.imm = u64::from(ins.immediate16());
            op.extra = u32::from(ins.immediate8_2nd() % 32);
            let size = enter_size(ins);
            by_size!(size, T in [u16 u32 u64] => enter::<T>)
        }
        _ => return None,
    };
    op.handler.set(handler);
    Some(op)
}

fn leave_size(ins: &Instruction) -> usize {
    match ins.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    }
}

fn enter_size(ins: &Instruction) -> usize {
    match ins.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use crate::exec::testing::{DATA, Guest, PF_READ, PF_WRITE, SS0, STACK, UNMAPPED};
    use crate::state::{CodeSize, reg};

    #[test]
    fn pushes_store_and_move_the_pointer() {
        // Code, mode, bytes pushed, word pushed. RAX is 0x1122334455667788, RBX points to its copy in memory.
        let value = 0x1122_3344_5566_7788u64;
        let cases: &[(&[u8], CodeSize, u64, u64)] = &[
            (&[0x50], CodeSize::Bits64, 8, value),
            (&[0x66, 0x50], CodeSize::Bits64, 2, 0x7788),
            (&[0x54], CodeSize::Bits64, 8, STACK),
            (&[0x6a, 0xff], CodeSize::Bits64, 8, !0),
            (&[0x68, 0, 0, 0, 0x80], CodeSize::Bits64, 8, 0xffff_ffff_8000_0000),
            (&[0xff, 0x33], CodeSize::Bits64, 8, value),
            (&[0x0f, 0xa0], CodeSize::Bits64, 8, 16),
            (&[0x50], CodeSize::Bits32, 4, 0x5566_7788),
            (&[0x1e], CodeSize::Bits32, 4, 0xdddd_0010),
            (&[0x66, 0x6a, 0xfe], CodeSize::Bits32, 2, 0xfffe),
            (&[0x50], CodeSize::Bits16, 2, 0x7788),
            (&[0x66, 0x50], CodeSize::Bits16, 4, 0x5566_7788),
        ];
        for &(code, mode, size, word) in cases {
            let mut guest = Guest::new(mode);
            guest.put(STACK - 8, &[0xdd; 8]);
            guest.put(DATA, &value.to_le_bytes());
            guest.set(reg::RAX, value).set(reg::RBX, DATA).finish(code);
            assert_eq!(guest.reg(reg::RSP), STACK - size, "{code:02x?} {mode:?}");
            assert_eq!(guest.word(STACK - size, size as usize), word, "{code:02x?} {mode:?}");
        }
    }

    #[test]
    fn pops_load_and_move_the_pointer() {
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.put(STACK - 16, &0x55u64.to_le_bytes());
        guest.set(reg::RSP, STACK - 16).finish(&[0x58]);
        assert_eq!((guest.reg(reg::RAX), guest.reg(reg::RSP)), (0x55, STACK - 8));
        // pop rsp
        guest.set(reg::RSP, STACK - 16).finish(&[0x5c]);
        assert_eq!(guest.reg(reg::RSP), 0x55);
        // pop [rsp+8]: addressed after the increment
        guest.set(reg::RSP, STACK - 16).finish(&[0x8f, 0x44, 0x24, 8]);
        assert_eq!((guest.word(STACK, 8), guest.reg(reg::RSP)), (0x55, STACK - 8));
    }

    #[test]
    fn pusha_and_popa_are_inverse() {
        let mut guest = Guest::new(CodeSize::Bits32);
        for r in 0..8 {
            if r != reg::RSP {
                guest.set(r, 0x100 + u64::from(r));
            }
        }
        guest.finish(&[0x60]);
        assert_eq!(guest.reg(reg::RSP), STACK - 32);
        assert_eq!(guest.word(STACK - 4, 4), 0x100);
        assert_eq!(guest.word(STACK - 20, 4), STACK);
        for r in 0..8 {
            if r != reg::RSP {
                guest.set(r, 0);
            }
        }
        guest.finish(&[0x61]);
        assert_eq!(guest.reg(reg::RSP), STACK);
        assert_eq!((guest.reg(reg::RAX), guest.reg(reg::RDI)), (0x100, 0x107));
    }

    #[test]
    fn enter_and_leave_keep_the_display() {
        let mut guest = Guest::new(CodeSize::Bits64);
        let frame = STACK + 0x100;
        guest.put(frame - 8, &0xaaaau64.to_le_bytes());
        // enter 0x20, 2
        guest.set(reg::RBP, frame).finish(&[0xc8, 0x20, 0, 2]);
        assert_eq!(guest.reg(reg::RBP), STACK - 8);
        assert_eq!(guest.reg(reg::RSP), STACK - 24 - 0x20);
        assert_eq!(guest.word(STACK - 8, 8), frame);
        assert_eq!(guest.word(STACK - 16, 8), 0xaaaa);
        assert_eq!(guest.word(STACK - 24, 8), STACK - 8);
        guest.finish(&[0xc9]);
        assert_eq!((guest.reg(reg::RBP), guest.reg(reg::RSP)), (frame, STACK));
    }

    #[test]
    fn faults_leave_the_registers_alone() {
        let mut guest = Guest::new(CodeSize::Bits64);
        // push rax; push [rsp+16]; call +0; enter 0, 0: the page below the stack is not there.
        let pushes: [&[u8]; 4] = [&[0x50], &[0xff, 0x74, 0x24, 16], &[0xe8, 0, 0, 0, 0], &[0xc8, 0, 0, 0]];
        for code in pushes {
            guest.set(reg::RSP, UNMAPPED + 0x1000).set(reg::RBP, DATA);
            assert_eq!(guest.fault(code), PF_WRITE, "{code:02x?}");
        }
        // enter 0x1000, 0: the frame fits, what lies below it does not.
        guest.set(reg::RSP, UNMAPPED + 0x1008);
        assert_eq!(guest.fault(&[0xc8, 0, 0x10, 0]), PF_WRITE);
        // pop rax; leave; ret; pop [rbx] to a page that is not there.
        guest.set(reg::RSP, UNMAPPED).set(reg::RBP, UNMAPPED).set(reg::RBX, UNMAPPED);
        for code in [0x58, 0xc9, 0xc3] {
            assert_eq!(guest.fault(&[code]), PF_READ, "{code:02x}");
        }
        guest.set(reg::RSP, STACK - 8);
        assert_eq!(guest.fault(&[0x8f, 0x03]), PF_WRITE);
        // A stack address that is not canonical is #SS.
        guest.set(reg::RSP, 1 << 63);
        assert_eq!(guest.fault(&[0x50]), SS0);
        assert_eq!(guest.fault(&[0xc3]), SS0);
    }

    #[test]
    fn sixteen_bit_stacks_wrap() {
        let mut guest = Guest::new(CodeSize::Bits16);
        guest.set(reg::RSP, 0x5_0000).set(reg::RAX, 0x1234).finish(&[0x50]);
        assert_eq!((guest.reg(reg::RSP), guest.word(0xfffe, 2)), (0x5_fffe, 0x1234));
        guest.finish(&[0x5b]);
        assert_eq!((guest.reg(reg::RSP), guest.reg(reg::RBX)), (0x5_0000, 0x1234));
        // A word across the end of the segment is #SS.
        guest.set(reg::RSP, 0xffff);
        assert_eq!(guest.fault(&[0x58]), SS0);
    }
}
