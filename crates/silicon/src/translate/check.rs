//! [`Engine::Check`](super::Engine::Check): both engines on the same input.
//!
//! Before host code runs, the interpreter executes the same operations one by one, and what it leaves behind after each is kept
//! ([`trial`](super::trial)). Then memory and registers are put back, host code runs, and the count of instructions says what it must
//! have left ([`difference`](super::difference)). Each way into host code is checked the first few times, then now and then. Other
//! vCPUs and devices that write the same memory meanwhile look like differences: this is for guests with one vCPU.
//!
//! # How far host code goes
//!
//! It is what would run otherwise, with its branches within the region; but links and the cache of jumps lead nowhere, so that
//! it leaves at the end of the region, calls included. And it is asked to leave ([`Requests::COMPARING`]): where it looks at the count of
//! instructions it leaves once [`Bounds::count`] are counted; where it goes backwards by a load that faults, the handler has it go on
//! [`Bounds::laps`] times. So the interpreter knows when to stop: [`Bounds::ends`].
#![expect(unsafe_code, reason = "reaches the operations of the running block, and calls host code")]

use std::collections::HashMap;

use super::difference::report;
use super::link::Link;
use super::region::LONGEST;
use super::run::call;
use super::trial::{Place, Snapshot, Trial};
use super::{Engine, LEAVE_INDIRECT, LEAVE_LINK};
use crate::code::BlockRef;
use crate::code::op::Op;
use crate::cpu::{Cpu, Requests};
use crate::mmu::host;
use crate::state::reg;

/// How often each way in is checked at first.
const FIRST: u32 = 16;
/// After that, it is checked once in so many times.
const EVERY: u32 = 256;
/// What [`Bounds::count`] and [`Bounds::laps`] are in turn. With a count of zero regions are left as if it were time to look for
/// requests, and a block that is a loop by itself is not executed at all.
const COUNTS: [u64; 4] = [64, 0, 128, 32];
const LAPS: [u32; 3] = [1, 0, 3];

/// How often host code has been entered, by where it is, and what has been compared.
#[derive(Debug, Default)]
pub(super) struct Checks {
    seen: HashMap<u64, u32>,
    /// Executions.
    pub(super) compared: u64,
    /// Instructions of them.
    pub(super) instructions: u64,
    /// How often they have gone on from one block of a region to the next.
    pub(super) branches: u64,
}

impl Drop for Checks {
    fn drop(&mut self) {
        let Checks { seen, compared, instructions, branches } = self;
        tracing::info!(
            "both engines did the same in {compared} executions of {} runs: {instructions} instructions, {branches} branches within \
             regions",
            seen.len()
        );
    }
}

impl Checks {
    /// Host code at `code` is entered; how often that has happened.
    fn enter(&mut self, code: u64) -> u32 {
        let times = self.seen.entry(code).or_default();
        *times = times.wrapping_add(1);
        *times
    }

    /// How far host code goes this time.
    fn bounds(&self) -> Bounds {
        let turn = self.compared as usize;
        // Where nobody recovers from faults, it does not go backwards at all.
        let laps = if host::recovers() { LAPS[turn % LAPS.len()] } else { 0 };
        Bounds { count: COUNTS[turn % COUNTS.len()], laps }
    }

    /// Everything is checked as if for the first time.
    #[cfg(test)]
    pub(super) fn forget(&mut self) {
        self.seen.clear();
    }

    /// Host code has done the same as the interpreter in `done` operations.
    fn passed(&mut self, trial: &Trial, done: usize) {
        self.compared += 1;
        self.instructions += done as u64;
        self.branches += trial.branches(done) as u64;
    }
}

/// How far host code goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Where it counts instructions, it leaves if there have been so many.
    pub(super) count: u64,
    /// How often it goes backwards where it does not look at the count.
    pub(super) laps: u32,
}

impl Bounds {
    /// Whether host code has certainly left: so many instructions have been executed, and it would go backwards once more. `late`
    /// counts how often it has done so when it should have left, had it looked at the count.
    pub(super) fn ends(&self, executed: usize, late: &mut u32) -> bool {
        // What has been executed and not counted are less than a region's.
        if executed as u64 >= self.count + LONGEST as u64 {
            *late += 1;
        }
        *late > self.laps
    }
}

/// Where host code has left.
pub(super) struct Outcome {
    /// After so many operations.
    pub(super) done: usize,
    pub(super) rip: u64,
}

impl Cpu {
    /// As [`call`], for the run that begins with `first`; stops the process at a difference.
    ///
    /// # Safety
    ///
    /// As for [`call`], and `code` is the host code of the run that begins with `first`.
    pub(super) unsafe fn checked_call(&mut self, way_in: u64, code: u64, first: &Op) -> (u64, u64) {
        // Links and the jump cache would lead on to other regions.
        (self.translator.validity, self.translator.validity_within) = (u64::MAX, u64::MAX);
        // SAFETY: `enter_block` gave the running block's first operation its address.
        let block = self.block_of(unsafe { &*(self.block_start as *const Op) }).map(|(block, _)| block);
        let Some(block) = block.filter(|_| self.replay.done.is_empty()) else {
            // SAFETY: the caller's promise.
            return unsafe { call(way_in, code) };
        };
        let index = (std::ptr::from_ref(first).addr() - self.block_start) / size_of::<Op>();
        let place = Place { block, index };
        let mut times = self.translator.checks.as_mut().map_or(0, |checks| checks.enter(code));
        let mut code = code;
        if times == Engine::HOT && index == 0 && block.may_join() {
            (code, times) = self.grow(block, code, times);
        }
        let is_due = times <= FIRST || times.is_multiple_of(EVERY);
        let region = if is_due { self.region_of(block) } else { None };
        match region {
            // SAFETY: the caller's promise, and what `grow` says.
            Some(region) => unsafe { self.compare_engines(way_in, code, &region, place) },
            // SAFETY: likewise.
            None => unsafe { call(way_in, code) },
        }
    }

    /// A block whose host code has been at `code` has run as often as blocks usually do before they are translated: it is translated
    /// again, with those that it is known to lead to by now. Where its host code is now, and how often that has been entered.
    fn grow(&mut self, block: BlockRef, code: u64, times: u32) -> (u64, u32) {
        let first = block.first();
        let (generation, members) = (self.code.generation, block.region().len());
        if self.translate_block(first).is_err() && self.code.generation == generation {
            // What there is holds.
            first.handler.set(self.enter());
        }
        let new = first.translation.get();
        if new == code || self.code.generation != generation {
            return (code, times);
        }
        let more = block.region().len() > members;
        let seen = self.translator.checks.as_mut().map(|checks| checks.seen.entry(new).or_default());
        // As good as the same code has been checked already.
        let times = if more { 1 } else { Engine::HOT + 1 };
        seen.into_iter().for_each(|seen| *seen = times);
        (new, times)
    }

    /// Has the interpreter execute what begins at `start`, then host code at `code`, and compares.
    ///
    /// # Safety
    ///
    /// As for [`call`], and `code` is the host code of what begins at `start`, in this region.
    unsafe fn compare_engines(
        &mut self,
        way_in: u64,
        code: u64,
        region: &[BlockRef],
        start: Place,
    ) -> (u64, u64) {
        let bounds = self.translator.checks.as_ref().map_or(Bounds { count: 0, laps: 0 }, Checks::bounds);
        let (block_start, current) = (self.block_start, self.current_op);
        let mut before = self.snapshot();
        before.state.rip = self.ip_of(&start.block.ops()[start.index]);
        let trial = self.attempt(region, start, &before, bounds);
        (self.block_start, self.current_op) = (block_start, current);
        if trial.changed_code {
            // Perhaps its own. What the interpreter has done stands.
            self.counters = before.counters;
            self.counters.instructions += (start.index + trial.steps.len()) as u64;
            return (LEAVE_INDIRECT, 0);
        }
        self.take_back_trial(&before, &trial);
        // SAFETY: the caller's promise.
        let (exit, extra) = unsafe { self.bounded_call(way_in, code, bounds) };
        let Some(outcome) = self.outcome(exit, extra, &before, start.index) else { return (exit, extra) };
        if let Err(difference) = self.compare(&before, &trial, &outcome) {
            report(&before, &trial, &outcome, &difference);
        }
        if let Some(checks) = &mut self.translator.checks {
            checks.passed(&trial, outcome.done);
        }
        (exit, extra)
    }

    /// As [`call`], but host code is asked to leave.
    ///
    /// # Safety
    ///
    /// As for [`call`].
    unsafe fn bounded_call(&mut self, way_in: u64, code: u64, bounds: Bounds) -> (u64, u64) {
        self.translator.stop = self.counters.instructions.wrapping_add(bounds.count);
        self.requests.post(Requests::COMPARING);
        host::allow_laps(bounds.laps);
        // SAFETY: the caller's promise.
        let left = unsafe { call(way_in, code) };
        host::allow_laps(0);
        self.requests.take(Requests::COMPARING);
        left
    }

    /// Where host code has left, which began with operation `index` of its block; `None`: by a branch to an address that nothing can be at,
    /// which is about to be taken back.
    fn outcome(&self, exit: u64, extra: u64, before: &Snapshot, index: usize) -> Option<Outcome> {
        let ip_base = self.state.regs[usize::from(reg::IP_BASE)];
        let mut counted = self.counters.instructions.wrapping_sub(before.counters.instructions);
        let rip = if exit == LEAVE_INDIRECT {
            self.state.rip
        } else if exit & LEAVE_LINK != 0 {
            let code = self.translator.code.as_ref()?;
            ip_base.wrapping_add_signed(Link::target(&code.arena, exit & !LEAVE_LINK)?.0)
        } else {
            // The interpreter counts what comes before the operation in its block.
            counted = counted.wrapping_add(extra);
            // SAFETY: host code names operations of its own blocks, which are not dropped while it runs.
            self.ip_of(unsafe { &*(exit as *const Op) })
        };
        let done = counted.wrapping_sub(index as u64) as usize;
        self.state.canonical(rip).then_some(Outcome { done, rip })
    }
}
