//! MOVS and STOS, alone and repeated: the host executes the same on the pages of the operands.
//!
//! RCX, RSI and RDI are in the host's registers of the same names, so that for the instruction alone the addends of the two pages
//! are added to the addresses, and taken off afterwards; also if it faults within, for then it has got as far as the registers say. What
//! does not lie in one page each, goes downwards, or is longer than a page, is the interpreter's: it works through it in pieces
//! ([`crate::exec`]).

use std::mem::offset_of;

use iced_x86::code_asm::{AsmRegister64, qword_ptr, r15d, rax, rcx, rdi, rsi};
use iced_x86::{Code, Instruction, OpKind, Register};

use super::Failure;
use super::emit::{Cold, Emitter, Kind, Linear, Result};
use super::memory::Rules;
use super::registers::{ADDRESS, GUEST_RAX, VALUE, field};
use crate::cpu::Cpu;
use crate::flags::Rflags;
use crate::mmu::tlb::{PAGE_MASK, PAGE_SIZE};
use crate::state::reg;

/// What there is to know of a string instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Bytes of an element.
    size: usize,
    /// It loads what it stores from RSI; else it stores RAX.
    moves: bool,
    repeats: bool,
}

impl Shape {
    /// `None`: it is no such instruction, or the interpreter's.
    fn of(ins: &Instruction) -> Option<Shape> {
        use Code::*;
        let (size, moves) = match ins.code() {
            Movsb_m8_m8 => (1, true),
            Movsw_m16_m16 => (2, true),
            Movsd_m32_m32 => (4, true),
            Movsq_m64_m64 => (8, true),
            Stosb_m8_AL => (1, false),
            Stosw_m16_AX => (2, false),
            Stosd_m32_EAX => (4, false),
            Stosq_m64_RAX => (8, false),
            _ => return None,
        };
        let wide =
            ins.op0_kind() == OpKind::MemoryESRDI && (!moves || ins.op1_kind() == OpKind::MemorySegRSI);
        let segment = moves && matches!(ins.memory_segment(), Register::FS | Register::GS);
        let plain = wide && !segment && !ins.has_repne_prefix() && !ins.has_lock_prefix();
        plain.then_some(Shape { size, moves, repeats: ins.has_rep_prefix() })
    }

    /// Elements in a page.
    fn most(self) -> u64 {
        PAGE_SIZE / self.size as u64
    }
}

/// Whether the instruction can be translated.
pub(super) fn suits(ins: &Instruction) -> bool {
    Shape::of(ins).is_some()
}

/// The bytes that such an instruction stores with these registers, if they lie in one page; `None` for another instruction, or if the
/// interpreter sees to it.
pub(super) fn stores(ins: &Instruction, count: u64, to: u64) -> Option<usize> {
    let shape = Shape::of(ins)?;
    let count = if shape.repeats { count } else { 1 };
    let bytes = (count <= shape.most()).then_some(count as usize * shape.size)?;
    ((to & PAGE_MASK) + bytes as u64 <= PAGE_SIZE).then_some(bytes)
}

impl Emitter<'_> {
    /// Translates operation `index`, an instruction that [`suits`].
    pub(super) fn string(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        let shape = Shape::of(ins).ok_or(Failure::Unsuited)?;
        let done = self.a.create_label();
        self.free_host_flags()?;
        let interpreter = self.interpreter_label(index);
        if shape.repeats {
            self.a.test(rcx, rcx)?;
            self.a.je(done)?;
            self.a.cmp(rcx, shape.most() as i32)?;
            self.a.ja(interpreter)?;
        }
        self.a.test(field(offset_of!(Cpu, state.rflags_system)), Rflags::DF.bits() as i32)?;
        self.a.jne(interpreter)?;
        let operands: &[_] = match shape.moves {
            true => &[(rsi, reg::RSI, Kind::Load), (rdi, reg::RDI, Kind::Store)],
            false => &[(rdi, reg::RDI, Kind::Store)],
        };
        for &(pointer, ..) in operands {
            self.leave_pages(shape, pointer, index)?;
        }
        let kept = field(offset_of!(Cpu, translator.kept));
        for &(pointer, number, kind) in operands {
            let recent = self.recent(kind, usize::from(number));
            self.check(Linear::Register(pointer, 0), recent, kind, Rules::size(shape.size), 1, index)?;
            if kind == Kind::Load {
                self.a.mov(kept, VALUE)?;
            }
        }
        self.a.add(rdi, VALUE)?;
        if shape.moves {
            self.a.mov(ADDRESS, kept)?;
            self.a.add(rsi, ADDRESS)?;
        } else {
            self.a.xchg(rax, GUEST_RAX)?;
        }
        let (at, interpreter) = (self.a.create_label(), self.interpreter_label(index));
        self.may_fault_to(at);
        self.cold.push(Cold::StringFaulted { at, shape, interpreter });
        let mut host = *ins;
        host.set_ip(0);
        host.set_segment_prefix(Register::None);
        self.put(host)?;
        self.end_string(shape)?;
        self.place(done)
    }

    /// Leaves to the interpreter what is not in one page at `pointer`.
    fn leave_pages(&mut self, shape: Shape, pointer: AsmRegister64, index: usize) -> Result<()> {
        let interpreter = self.interpreter_label(index);
        self.a.mov(ADDRESS, pointer)?;
        self.a.and(r15d, PAGE_MASK as i32)?;
        if shape.repeats {
            self.a.lea(ADDRESS, qword_ptr(ADDRESS + rcx * shape.size as u32))?;
            self.a.cmp(r15d, PAGE_SIZE as i32)?;
        } else {
            self.a.cmp(r15d, PAGE_SIZE as i32 - shape.size as i32)?;
        }
        Ok(self.a.ja(interpreter)?)
    }

    /// The registers are the guest's again. [`VALUE`] is the addend of RDI, [`ADDRESS`] that of RSI.
    pub(super) fn end_string(&mut self, shape: Shape) -> Result<()> {
        self.a.sub(rdi, VALUE)?;
        if shape.moves {
            self.a.sub(rsi, ADDRESS)?
        } else {
            self.a.xchg(rax, GUEST_RAX)?
        };
        Ok(())
    }
}
