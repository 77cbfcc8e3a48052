//! Instruction execution, one file per family. Each file has the handlers of its family and a `lower`
//! function that recognises its instructions.

use iced_x86::Instruction;

use crate::code::lower::LowerCtx;
use crate::code::op::Op;

#[cfg(test)]
mod absent_tests;
mod address;
mod alu;
mod amx;
mod atomic;
mod bits;
mod bmi;
mod branch;
mod cache;
mod control;
mod debug_registers;
mod decimal;
mod far;
mod flag_ops;
mod flags_system;
pub(crate) mod fpu;
pub(crate) mod fpu_image;
mod interrupt;
mod io;
mod iret;
mod misc_system;
pub(crate) mod mov;
pub mod msr;
mod muldiv;
#[cfg(test)]
mod offer_tests;
pub(crate) mod operand;
mod segment_load;
mod shift;
pub mod stack;
mod string;
mod syscall;
#[cfg(test)]
mod system_tests;
mod tables;
#[cfg(test)]
pub(crate) mod testing;
mod transaction;
pub(crate) mod vector;
mod vector_gather;
mod vector_masked;
mod vector_moves;
#[cfg(test)]
mod vector_tests;
mod xsave;
mod xsave_area;
pub mod xstate_image;

/// A family's `lower`: the operation for an instruction of its own, `None` for any other.
type Lower = fn(&Instruction, &LowerCtx) -> Option<Op>;

/// The families whose handlers are threaded ([`crate::code::thread`]), the most frequent first.
#[rustfmt::skip]
const THREADED: &[Lower] = &[
    mov::lower,
    alu::lower,
    branch::lower,
    stack::lower,
    shift::lower,
    muldiv::lower,
    bits::lower,
    bmi::lower,
    flag_ops::lower,
];

/// The families with plain handlers.
#[rustfmt::skip]
const PLAIN: &[Lower] = &[
    string::lower,
    io::lower,
    atomic::lower,
    decimal::lower,
    control::lower,
    misc_system::lower,
    msr::lower,
    cache::lower,
    vector::lower,
    fpu::lower,
    xsave::lower,
    amx::lower,
    flags_system::lower,
    segment_load::lower,
    syscall::lower,
    iret::lower,
    interrupt::lower,
    far::lower,
    tables::lower,
    debug_registers::lower,
    transaction::lower,
];

/// Asks the families in turn.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let ask = |family: &Lower| family(ins, ctx);
    if let Some(mut op) = THREADED.iter().find_map(ask) {
        op.flags |= Op::THREADED;
        return Some(op);
    }
    PLAIN.iter().find_map(ask)
}
