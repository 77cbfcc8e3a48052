//! Threaded code: how one operation goes on to the next.
//!
//! The handlers of a block call each other in tail position, so that a block runs without coming back to a loop
//! in between; optimized, each such call is a jump. (Where it is not, a block's length bounds the stack.) Near
//! branches in 64-bit mode go on to the next block in the same way. What is counted and where RIP goes back to
//! after a fault follows from the operation that [`Cpu::at`] noted last.
//!
//! A *threaded* handler ends with [`next`], and has called [`Cpu::at`] on every path on which it returns
//! something else. A plain handler, which returns [`Flow::Next`] instead, is wrapped by [`plain`].
#![expect(unsafe_code, reason = "the next operation is reached by pointer")]

use crate::code::BlockRef;
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::state::reg;

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
    op.body = op.handler.get();
    op.handler.set(interpreted(op));
}

/// The handler with which the interpreter executes `op`, an operation in a block.
#[inline(always)]
pub(crate) fn interpreted(op: &Op) -> Handler {
    if op.has(Op::THREADED) { op.body } else { plain }
}

/// Ends the block of `op`, a control transfer that has set RIP in 64-bit mode, and goes on with the block there
/// if it is at hand and nothing asks for attention.
#[inline(always)]
pub(crate) fn go_on(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    if cfg!(debug_assertions) || cpu.chain == 0 || cpu.requests.any() {
        // Unoptimized, calls in tail position use up stack.
        return Ok(Flow::End);
    }
    let rip = cpu.state.rip;
    let Some(block) = cpu.block_at_hand(rip) else { return Ok(Flow::End) };
    // SAFETY: blocks live until the engine looks for one that is not at hand, after the handlers have returned.
    let first = unsafe { &*std::ptr::from_ref(block.first()) };
    cpu.chain -= 1;
    cpu.count_block();
    cpu.enter_block(first);
    cpu.state.regs[usize::from(reg::IP_BASE)] = rip & !(PAGE - 1);
    (first.handler.get())(cpu, first)
}

/// Blocks that may follow each other without a look around by the engine.
const CHAIN_LONGEST: u32 = 1024;
/// Bytes in a page.
const PAGE: u64 = 4096;

impl Cpu {
    /// `op` is where the block ends if the handler returns now.
    #[inline(always)]
    pub(crate) fn at(&mut self, op: &Op) {
        self.current_op = std::ptr::from_ref(op).addr();
    }

    /// The block that begins with `first` runs now, and the current operation is one of its own.
    #[inline(always)]
    pub(crate) fn enter_block(&mut self, first: &Op) {
        self.at(first);
        self.block_start = self.current_op;
    }

    /// Runs the block, and those that it leads to if `chain`, up to the end of one or to the operation that
    /// aborts.
    #[inline(always)]
    pub(crate) fn run_block(&mut self, block: BlockRef, chain: bool) -> Result<(), Abort> {
        let first = block.first();
        self.chain = if chain { CHAIN_LONGEST } else { 0 };
        self.enter_block(first);
        match (first.handler.get())(self, first) {
            Ok(_) => {
                self.count_block();
                Ok(())
            }
            Err(abort) => {
                self.undone();
                Err(abort)
            }
        }
    }

    /// Instructions of the block before the operation that ended it.
    #[inline(always)]
    fn done_before(&self) -> u64 {
        (self.current_op.wrapping_sub(self.block_start) / size_of::<Op>()) as u64
    }

    /// The block came to its end: its instructions are counted.
    #[inline(always)]
    pub(crate) fn count_block(&mut self) {
        self.counters.instructions = self.counters.instructions.wrapping_add(self.done_before() + 1);
    }

    /// The current operation did not complete: RIP goes back to it.
    #[cold]
    fn undone(&mut self) {
        self.counters.instructions = self.counters.instructions.wrapping_add(self.done_before());
        // SAFETY: `enter_block` and `at` give the current operation an address in the running block, and blocks
        // live until the engine looks for another one.
        let op = unsafe { &*(self.current_op as *const Op) };
        self.state.rip = self.ip_of(op);
        self.exit_instruction_length = op.length;
    }
}
