//! Instruction execution, one file per family. Each file has the handlers of its family and a `lower`
//! function that recognises its instructions.

use iced_x86::Instruction;

use crate::code::lower::LowerCtx;
use crate::code::op::Op;

mod address;
pub mod alu;

/// Asks the families in turn.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    alu::lower(ins, ctx)
}
