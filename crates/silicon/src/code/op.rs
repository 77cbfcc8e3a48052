//! The decoded form of one instruction.

use std::cell::Cell;

use crate::cpu::Cpu;
use crate::exception::Abort;

/// What the block loop does after an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Flow {
    /// Go on with the next operation of the block.
    Next,
    /// The block ends here; `state.rip` says where execution goes on.
    End,
}

/// Executes one operation. On `Err` nothing that the guest can see has changed (except what the instruction
/// defines to be kept, such as finished REP iterations).
pub(crate) type Handler = fn(&mut Cpu, &Op) -> Result<Flow, Abort>;

/// One decoded instruction. Which fields mean something is the handler's business; the address fields always
/// have the meaning that [`Cpu::ea`] gives them.
#[derive(Clone, Debug)]
#[repr(C)]
pub(crate) struct Op {
    /// Executes it. A cell, because invalidating a block replaces the handlers of its operations.
    pub handler: Cell<Handler>,
    /// Immediate, branch target relative to the page start, or a handler's own payload.
    pub imm: u64,
    /// Displacement, sign-extended; relative to the page start when `base` is IP_BASE.
    pub disp: i64,
    /// Base register slot ([`crate::state::reg`]).
    pub base: u8,
    /// Index register slot.
    pub index: u8,
    /// Shift of the index: 0 to 3.
    pub scale: u8,
    /// Segment of the memory operand: index into `ea_base` (6 = none).
    pub seg: u8,
    /// First register operand. For bytes, bit 4 selects bits 15:8 (AH, CH, DH, BH).
    pub r0: u8,
    /// Second register operand, likewise.
    pub r1: u8,
    /// Third register operand, likewise.
    pub r2: u8,
    /// [`Op::SLOW_EA`] and friends.
    pub flags: u8,
    /// Offset of the instruction's first byte in its page.
    pub page_offset: u16,
    /// Length in bytes.
    pub length: u8,
    /// Operand size in bytes, where a handler serves several sizes.
    pub size: u8,
    /// A handler's own extra payload.
    pub extra: u32,
    /// What the interpreter executes: what [`crate::code::thread::plain`] calls, or the threaded handler itself.
    pub body: Handler,
    /// Of the first operation of a block or of a translated run: how often it was met, then where its host code is
    /// ([`crate::translate`]).
    pub translation: Cell<u64>,
}

impl Op {
    /// The address needs segment checks or wraps at 16 or 32 bits.
    pub(crate) const SLOW_EA: u8 = 1 << 0;
    /// Address size is 32 bits.
    pub(crate) const ADDR32: u8 = 1 << 1;
    /// Address size is 16 bits.
    pub(crate) const ADDR16: u8 = 1 << 2;
    /// LOCK prefix.
    pub(crate) const LOCK: u8 = 1 << 3;
    /// REP or REPE prefix (F3).
    pub(crate) const REP: u8 = 1 << 4;
    /// REPNE prefix (F2).
    pub(crate) const REPNE: u8 = 1 << 5;

    /// The handler is a threaded one; see [`crate::code::thread`].
    pub(crate) const THREADED: u8 = 1 << 6;

    /// Whether flag bit `bit` is set.
    #[inline(always)]
    pub(crate) fn has(&self, bit: u8) -> bool {
        self.flags & bit != 0
    }

    /// Address-size mask.
    #[inline(always)]
    pub(crate) fn addr_mask(&self) -> u64 {
        if self.has(Op::ADDR32) {
            0xffff_ffff
        } else if self.has(Op::ADDR16) {
            0xffff
        } else {
            u64::MAX
        }
    }
}
