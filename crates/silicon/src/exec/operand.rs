//! Recognising how the operands of integer instructions are given.

use iced_x86::{ConditionCode, Instruction, OpKind, Register};

use crate::code::lower::gpr;
use crate::code::op::Op;

/// Where the two operands of an integer instruction are. Named destination first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Registers `r0` and `r1`.
    RegReg,
    /// Register `r0` and the immediate.
    RegImm,
    /// Register `r0` and memory.
    RegMem,
    /// Memory and register `r1`.
    MemReg,
    /// Memory and the immediate.
    MemImm,
}

/// Picks the handler for an operand size in bytes: `by_size!(size, handler::<Op, _>)` with `_` standing for the
/// unsigned integer of that size. The list of sizes can be restricted.
macro_rules! by_size {
    ($size:expr, $t:ident => $handler:expr) => {
        by_size!($size, $t in [u8 u16 u32 u64] => $handler)
    };
    ($size:expr, $t:ident in [$($ty:ident)*] => $handler:expr) => {
        match $size {
            $(n if n == size_of::<$ty>() => { type $t = $ty; $handler as $crate::code::op::Handler })*
            _ => return None,
        }
    };
}
pub(crate) use by_size;

/// Picks the handler for the form of `op`'s address: `by_address!(op, A => handler::<A>)`.
macro_rules! by_address {
    ($op:expr, $a:ident => $handler:expr) => {
        if $crate::exec::address::BaseAddress::serves($op) {
            type $a = $crate::exec::address::BaseAddress;
            $handler as $crate::code::op::Handler
        } else {
            type $a = $crate::exec::address::AnyAddress;
            $handler as $crate::code::op::Handler
        }
    };
}
pub(crate) use by_address;

/// Picks the handler for the mode: `by_mode!(long, LONG => handler::<LONG>)`.
macro_rules! by_mode {
    ($long:expr, $l:ident => $handler:expr) => {
        if $long {
            const $l: bool = true;
            $handler as $crate::code::op::Handler
        } else {
            const $l: bool = false;
            $handler as $crate::code::op::Handler
        }
    };
}
pub(crate) use by_mode;

/// Picks the handler for a condition code, 0 to 15: `by_condition!(cc, CC => handler::<CC>)`.
macro_rules! by_condition {
    ($cc:expr, $c:ident => $handler:expr) => {
        by_condition!(@ $cc, $c => $handler, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $cc:expr, $c:ident => $handler:expr, $($n:literal)*) => {
        match $cc {
            $($n => { const $c: u8 = $n; $handler as $crate::code::op::Handler })*
            _ => return None,
        }
    };
}
pub(crate) use by_condition;

/// Whether operand `i` is an immediate.
pub(crate) fn is_immediate(ins: &Instruction, i: u32) -> bool {
    matches!(
        ins.op_kind(i),
        OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// The general register that operand `i` is, if it is one.
pub(crate) fn gpr_operand(ins: &Instruction, i: u32) -> Option<Register> {
    let register = ins.op_register(i);
    (ins.op_kind(i) == OpKind::Register && register.is_gpr()).then_some(register)
}

/// Whether operand `i` is a memory operand.
pub(crate) fn is_memory(ins: &Instruction, i: u32) -> bool {
    ins.op_kind(i) == OpKind::Memory
}

/// Size in bytes of operand `i`, a general register or memory; 0 if it is neither.
pub(crate) fn operand_size(ins: &Instruction, i: u32) -> usize {
    match (gpr_operand(ins, i), is_memory(ins, i)) {
        (Some(register), _) => register.size(),
        (None, true) => ins.memory_size().size(),
        (None, false) => 0,
    }
}

/// The form of a two-operand instruction, its registers and immediate filled into `op`. `None` if an operand is
/// anything else (a segment, control or vector register).
pub(crate) fn form(ins: &Instruction, op: &mut Op) -> Option<Form> {
    if is_memory(ins, 0) {
        if is_immediate(ins, 1) {
            op.imm = ins.immediate(1);
            return Some(Form::MemImm);
        }
        op.r1 = gpr(gpr_operand(ins, 1)?);
        return Some(Form::MemReg);
    }
    op.r0 = gpr(gpr_operand(ins, 0)?);
    if is_immediate(ins, 1) {
        op.imm = ins.immediate(1);
        return Some(Form::RegImm);
    }
    if is_memory(ins, 1) {
        return Some(Form::RegMem);
    }
    op.r1 = gpr(gpr_operand(ins, 1)?);
    Some(Form::RegReg)
}

/// Condition code of a conditional instruction, 0 to 15 as in the opcode.
pub(crate) fn condition(ins: &Instruction) -> Option<u8> {
    (ins.condition_code() as u8).checked_sub(ConditionCode::o as u8)
}
