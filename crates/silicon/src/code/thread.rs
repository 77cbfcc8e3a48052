//! Threaded code: how one operation goes on to the next.
//!
//! The handlers of a block call each other in tail position, so that a block runs without coming back to a loop
//! in between; optimized, each such call is a jump. (Where it is not, a block's length bounds the stack.) The
//! engine learns from [`Cpu::at`] which operation ended the block.
//!
//! A *threaded* handler ends with [`next`], and has called [`Cpu::at`] on every path on which it returns
//! something else. A plain handler, which returns [`Flow::Next`] instead, is wrapped by [`plain`].
#![expect(unsafe_code, reason = "the next operation is reached by pointer")]

use crate::code::op::{Flow, Op};
use crate::cpu::Cpu;
use crate::exception::Abort;

/// Goes on with the operation after `op`, which must be in a block.
#[inline(always)]
pub(crate) fn next(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    // SAFETY: operations are only executed in blocks, and the last operation of every block (`fall_through`)
    // does not come here, so another operation follows in the same allocation.
    let following = unsafe { &*std::ptr::from_ref(op).add(1) };
    (following.handler.get())(cpu, following)
}

/// Handler of all operations whose own handler is a plain one.
pub(crate) fn plain(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    match (op.body)(cpu, op) {
        Ok(Flow::Next) => next(cpu, op),
        other => other,
    }
}

/// Makes `op`, as lowering gave it, fit to stand in a block.
pub(crate) fn thread(op: &mut Op) {
    if !op.has(Op::THREADED) {
        op.body = op.handler.get();
        op.handler.set(plain);
    }
}

impl Cpu {
    /// `op` is where the block ends if the handler returns now.
    #[inline(always)]
    pub(crate) fn at(&mut self, op: &Op) {
        self.current_op = std::ptr::from_ref(op).addr();
    }

    /// Index in `ops` of the operation that ended the block.
    #[inline(always)]
    pub(crate) fn ended_at(&self, ops: &[Op]) -> usize {
        self.current_op.wrapping_sub(ops.as_ptr().addr()) / size_of::<Op>()
    }
}
