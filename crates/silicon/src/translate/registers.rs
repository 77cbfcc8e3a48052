//! Where the guest's registers are while translated code runs.
//!
//! | host | holds |
//! |---|---|
//! | RAX | the status flags in the form of [`Status`](crate::flags::Status), when they are not in the host's RFLAGS |
//! | R14, R15 | nothing that lasts: [`VALUE`] and [`ADDRESS`] |
//! | R11, R13 | the guest's RAX and RSP |
//! | RSP | the host's stack |
//! | GS base | the [`Cpu`] |
//! | all others | the guest's register of the same name |
//!
//! The guest's R11, R13, R14 and R15 are in memory: compilers use them least.

use std::mem::offset_of;

use iced_x86::code_asm::{self, AsmMemoryOperand, AsmRegister64, dword_ptr, qword_ptr, word_ptr};
use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::Cpu;
use crate::hostexec::stub::nth;
use crate::state::reg;

/// Scratch for an operand.
pub(super) const VALUE: AsmRegister64 = code_asm::r14;
/// Scratch for an address; the address of an access once it is checked.
pub(super) const ADDRESS: AsmRegister64 = code_asm::r15;
/// The guest's RAX and RSP.
pub(super) const GUEST_RAX: AsmRegister64 = code_asm::r11;
pub(super) const GUEST_RSP: AsmRegister64 = code_asm::r13;

/// The guest's registers that are in registers of the host.
pub(super) const HELD: [(u8, AsmRegister64); 12] = [
    (reg::RAX, GUEST_RAX),
    (reg::RCX, code_asm::rcx),
    (reg::RDX, code_asm::rdx),
    (reg::RBX, code_asm::rbx),
    (reg::RSP, GUEST_RSP),
    (reg::RBP, code_asm::rbp),
    (reg::RSI, code_asm::rsi),
    (reg::RDI, code_asm::rdi),
    (reg::R8, code_asm::r8),
    (reg::R9, code_asm::r9),
    (reg::R10, code_asm::r10),
    (reg::R12, code_asm::r12),
];

/// Where a guest register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In a host register.
    Host(AsmRegister64),
    /// In the state, by its number.
    State(u8),
}

/// Where the guest register with this number is.
pub(super) fn place(number: u8) -> Place {
    let held = HELD.iter().find(|(guest, _)| *guest == number);
    held.map_or(Place::State(number), |(_, host)| Place::Host(*host))
}

/// Where the guest register of this name, of any width, is.
pub(super) fn place_of(register: Register) -> Place {
    place(register.full_register().number() as u8)
}

/// A field of the [`Cpu`] that translated code runs on: eight bytes, by offset.
pub(super) fn field(offset: usize) -> AsmMemoryOperand {
    qword_ptr(offset as u64).gs()
}

/// Four bytes, likewise.
pub(super) fn field32(offset: usize) -> AsmMemoryOperand {
    dword_ptr(offset as u64).gs()
}

/// Two bytes, likewise.
pub(super) fn field16(offset: usize) -> AsmMemoryOperand {
    word_ptr(offset as u64).gs()
}

/// Offset of a general register, or of one of the slots behind them, in the [`Cpu`].
pub(super) const fn slot_offset(number: u8) -> usize {
    offset_of!(Cpu, state.regs) + 8 * number as usize
}

/// A general register in the state.
pub(super) fn slot(number: u8) -> AsmMemoryOperand {
    field(slot_offset(number))
}

/// The part of `full` that is as wide as `like`; the low byte for bytes.
pub(super) fn sized(full: Register, like: Register) -> Option<Register> {
    let number = full.number();
    let first = match like.size() {
        1 if number >= 8 => return Some(nth(Register::R8L, number - 8)),
        1 if number >= 4 => return Some(nth(Register::SPL, number - 4)),
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        8 => Register::RAX,
        _ => return None,
    };
    Some(nth(first, number))
}

/// Whether the register is one of AH, CH, DH and BH.
pub(super) fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// How the decoder's crate is told that a displacement takes a byte, where it fits.
pub(super) fn displacement_size(base: Register, displacement: i64) -> u32 {
    match displacement {
        _ if base == Register::None => 8,
        0 => 0,
        -128..=127 => 1,
        _ => 8,
    }
}

/// Has operand `operand` be the memory at `at`.
pub(super) fn set_memory(ins: &mut Instruction, operand: u32, at: At) {
    ins.set_op_kind(operand, OpKind::Memory);
    ins.set_memory_index_scale(1);
    let (segment, base, index, displacement) = match at {
        At::Address => (Register::None, ADDRESS.into(), Register::None, 0),
        At::Near(displacement) => {
            (Register::None, ADDRESS.into(), Register::None, i64::from(displacement) as u64)
        }
        At::Sum(base, displacement) => {
            (Register::None, base.into(), VALUE.into(), i64::from(displacement) as u64)
        }
        At::Field(offset) => (Register::GS, Register::None, Register::None, offset as u64),
    };
    ins.set_segment_prefix(segment);
    ins.set_memory_base(base);
    ins.set_memory_index(index);
    ins.set_memory_displ_size(displacement_size(base, displacement as i64));
    ins.set_memory_displacement64(displacement);
}

/// A memory operand of translated code.
#[derive(Clone, Copy, Debug)]
pub(super) enum At {
    /// What [`ADDRESS`] points to.
    Address,
    /// What is so many bytes from there.
    Near(i32),
    /// What a register, a displacement and [`VALUE`], the page's addend, point to.
    Sum(AsmRegister64, i32),
    /// A field of the [`Cpu`].
    Field(usize),
}

impl At {
    /// Eight bytes there.
    pub(super) fn quad(self) -> AsmMemoryOperand {
        match self {
            At::Address => qword_ptr(ADDRESS),
            At::Near(displacement) => qword_ptr(ADDRESS + displacement),
            At::Sum(base, displacement) => qword_ptr(base + VALUE + displacement),
            At::Field(offset) => field(offset),
        }
    }

    /// Scratch registers that it leaves free.
    pub(super) fn free(self) -> &'static [AsmRegister64] {
        match self {
            At::Address | At::Near(_) => &[VALUE],
            At::Sum(base, _) if base == ADDRESS => &[],
            At::Sum(..) => &[ADDRESS],
            At::Field(_) => &[VALUE, ADDRESS],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_registers() {
        for (full, like, part) in [
            (Register::R11, Register::AL, Register::R11L),
            (Register::RSI, Register::CL, Register::SIL),
            (Register::RBX, Register::DL, Register::BL),
            (Register::R13, Register::SP, Register::R13W),
            (Register::RCX, Register::R9D, Register::ECX),
            (Register::R8, Register::RAX, Register::R8),
        ] {
            assert_eq!(sized(full, like), Some(part));
        }
    }

    #[test]
    fn scratch_registers_hold_nothing_of_the_guests() {
        for scratch in [VALUE, ADDRESS, code_asm::rax, code_asm::rsp] {
            assert!(HELD.iter().all(|(_, host)| *host != scratch));
        }
    }
}
