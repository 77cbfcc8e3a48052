//! What translated code changes often in memory: the guest's registers that no host register holds, the base of RIP, and the count of
//! instructions.
//!
//! While host code runs these are not in the [`Cpu`], which GS points to, but in a frame near the code, reached relative to RIP:
//! processors forward what was stored to loads from the same address much faster where no segment has a base. Code is emitted
//! as if they were in the [`Cpu`] all the time; [`Frame::place`] has it use the frame.
//!
//! The count in the frame is relative to [`STOP`]: once it is not negative, it is time to look for requests.

use std::mem::offset_of;
use std::ops::Range;

use iced_x86::code_asm::{CodeAssembler, rcx};
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, OpKind, Register};

use super::edges::rip_relative;
use super::emit::COUNT;
use super::registers::{field, slot_offset};
use crate::cpu::Cpu;
use crate::hostexec::arena::Arena;
use crate::state::reg;

/// Offset in the [`Cpu`] of the count of instructions at which host code looks for requests next.
pub(super) const STOP: usize = offset_of!(Cpu, translator.stop);

/// Where the frame is, for code to reach.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame(u64);

/// Offsets in the [`Cpu`] of what is in the frame, eight bytes each.
const FIELDS: [usize; 6] = [
    slot_offset(reg::R11),
    slot_offset(reg::R13),
    slot_offset(reg::R14),
    slot_offset(reg::R15),
    slot_offset(reg::IP_BASE),
    COUNT,
];

impl Frame {
    /// Places behind the fields for what checks have found that several accesses share, eight bytes each.
    pub(super) const SHARED: usize = 6;
    /// Places for what the windows of a loop have found.
    pub(super) const WINDOWS: usize = 6;

    /// Numbers for loops, each for several.
    const PATIENCE: usize = 16;

    /// Bytes. The last place but those is that of [`Frame::iterations`].
    const SIZE: usize = 8 * (FIELDS.len() + Frame::SHARED + Frame::WINDOWS + 1 + Frame::PATIENCE);

    /// A frame in the arena.
    pub(super) fn new(arena: &mut Arena) -> Option<Frame> {
        arena.data(Frame::SIZE).map(|data| Frame(data.writable.as_ptr() as u64))
    }

    /// Where it lies.
    pub(super) fn range(self) -> Range<u64> {
        self.0..self.0 + Frame::SIZE as u64
    }

    /// Has instructions use the frame for what is in it.
    pub(super) fn place(self, instructions: &mut [Instruction]) {
        for ins in instructions {
            let of_cpu = ins.segment_prefix() == Register::GS
                && ins.memory_base() == Register::None
                && ins.op_kinds().any(|kind| kind == OpKind::Memory);
            let field =
                FIELDS.iter().position(|&field| of_cpu && field as u64 == ins.memory_displacement64());
            if let Some(field) = field {
                ins.set_segment_prefix(Register::None);
                ins.set_memory_base(Register::RIP);
                ins.set_memory_displ_size(8);
                ins.set_memory_displacement64(self.0 + 8 * field as u64);
            }
        }
    }

    /// Copies the fields from the [`Cpu`]. Changes RCX and RFLAGS.
    pub(super) fn load(self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        for (at, offset) in FIELDS.into_iter().enumerate() {
            a.mov(rcx, field(offset))?;
            if offset == COUNT {
                a.sub(rcx, field(STOP))?;
            }
            a.add_instruction(Instruction::with2(Code::Mov_rm64_r64, self.field(at), Register::RCX)?)?;
        }
        Ok(())
    }

    /// Copies them back. Changes RCX and RFLAGS.
    pub(super) fn store(self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        for (at, offset) in FIELDS.into_iter().enumerate() {
            a.add_instruction(Instruction::with2(Code::Mov_r64_rm64, Register::RCX, self.field(at))?)?;
            if offset == COUNT {
                a.add(rcx, field(STOP))?;
            }
            a.mov(field(offset), rcx)?;
        }
        Ok(())
    }

    /// Place `slot` of [`Frame::SHARED`].
    pub(super) fn shared(self, slot: usize) -> MemoryOperand {
        self.field(FIELDS.len() + slot)
    }

    /// Place `window` of [`Frame::WINDOWS`].
    pub(super) fn window(self, window: usize) -> MemoryOperand {
        self.field(FIELDS.len() + Frame::SHARED + window)
    }

    /// How many iterations of a loop may follow, while that is found out.
    pub(super) fn iterations(self) -> MemoryOperand {
        self.field(FIELDS.len() + Frame::SHARED + Frame::WINDOWS)
    }

    /// How often the loop at this address is not looked at.
    pub(super) fn patience(self, loop_: u64) -> MemoryOperand {
        let number = (loop_.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60) as usize % Frame::PATIENCE;
        self.field(FIELDS.len() + Frame::SHARED + Frame::WINDOWS + 1 + number)
    }

    fn field(self, at: usize) -> MemoryOperand {
        rip_relative(self.0 + 8 * at as u64)
    }
}
