//! What the interpreter makes of what host code is about to execute, and how that is taken back.

use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Register, UsedMemory};

use super::Family;
use super::check::Bounds;
use super::difference::rflags;
use super::string;
use crate::bus_lock::LockedAccess;
use crate::code::BlockRef;
use crate::code::op::{Flow, Op};
use crate::code::thread::interpreted;
use crate::cpu::{Counters, Cpu, Pending};
use crate::hostexec::stub::{STATUS, writes};
use crate::state::{CpuState, Seg, reg};

/// An operation of a block.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) block: BlockRef,
    pub(super) index: usize,
}

/// Where an operation has stored something.
pub(super) struct Stored {
    pub(super) lin: u64,
    pub(super) old: Vec<u8>,
    pub(super) new: Vec<u8>,
}

/// What the interpreter made of one operation.
pub(super) struct Step {
    pub(super) ins: Instruction,
    /// It begins a block.
    pub(super) begins: bool,
    pub(super) after: Snapshot,
    pub(super) stored: Vec<Stored>,
    /// Status flags, as RFLAGS bits, that the SDM leaves undefined here.
    pub(super) undefined: u64,
}

/// What the interpreter made of the operations.
#[derive(Default)]
pub(super) struct Trial {
    pub(super) steps: Vec<Step>,
    /// The last one has changed code.
    pub(super) changed_code: bool,
}

impl Trial {
    /// How often the first `done` operations go on from one block to the next.
    pub(super) fn branches(&self, done: usize) -> usize {
        self.steps[..done].iter().skip(1).filter(|step| step.begins).count()
    }
}

/// What the engines must agree on at an operation.
pub(super) struct Snapshot {
    pub(super) state: Box<CpuState>,
    pub(super) mxcsr: u32,
    pub(super) counters: Counters,
    x87_live: bool,
}

/// What operations that are not to count may leave behind otherwise.
struct Aside {
    ept_violation_ve: bool,
    bus_lock_taken: bool,
    step_next: bool,
    refused_lock: Option<LockedAccess>,
}

impl Cpu {
    /// The blocks that host code of `block`, which runs now, goes on to without asking; `None` if some are not at hand.
    pub(super) fn region_of(&self, block: BlockRef) -> Option<Vec<BlockRef>> {
        let starts = block.region();
        let region: Vec<BlockRef> =
            starts.iter().map_while(|&start| self.block_in_page_of(block.first(), start)).collect();
        (!starts.is_empty() && region.len() == starts.len()).then_some(region)
    }

    pub(super) fn snapshot(&mut self) -> Snapshot {
        let x87_live = self.x87_is_live();
        self.sync_x87();
        let (mxcsr, counters) = (self.mxcsr(), self.counters);
        let snapshot = Snapshot { state: Box::new(self.state.clone()), mxcsr, counters, x87_live };
        if x87_live {
            self.load_x87();
        }
        snapshot
    }

    fn go_back(&mut self, to: &Snapshot) {
        self.sync_x87();
        self.state = (*to.state).clone();
        self.counters = to.counters;
        self.set_mxcsr(to.mxcsr);
        if to.x87_live {
            self.load_x87();
        }
    }

    /// Has the interpreter execute what begins at `start`, until host code has certainly left: as long as operations can be translated and
    /// complete, and blocks of the region follow each other within bounds.
    pub(super) fn attempt(
        &mut self,
        region: &[BlockRef],
        start: Place,
        before: &Snapshot,
        bounds: Bounds,
    ) -> Trial {
        let aside = self.set_aside();
        let generation = self.code.generation;
        let (mut trial, mut late) = (Trial::default(), 0);
        let mut at = Some(start);
        while let Some(place) = at {
            let next = self.attempt_block(place, before, &mut trial, generation);
            at = next.and_then(|offset| {
                let block = region.iter().copied().find(|block| block.first().page_offset == offset)?;
                let backwards = offset <= place.block.first().page_offset;
                let ends = backwards && bounds.ends(trial.steps.len(), &mut late);
                (!ends).then_some(Place { block, index: 0 })
            });
        }
        trial.changed_code = self.code.generation != generation && !trial.steps.is_empty();
        self.controls.ept_violation_ve = aside.ept_violation_ve;
        if !trial.changed_code {
            self.bus_lock_taken = aside.bus_lock_taken;
            self.step_next = aside.step_next;
            self.refused_lock = aside.refused_lock;
        }
        trial
    }

    /// Attempts leave nothing behind: not in the guest's information area either.
    fn set_aside(&mut self) -> Aside {
        Aside {
            ept_violation_ve: std::mem::take(&mut self.controls.ept_violation_ve),
            bus_lock_taken: self.bus_lock_taken,
            step_next: self.step_next,
            refused_lock: self.refused_lock,
        }
    }

    /// Attempts the operations from `place` to the end of its block; where host code may go on in the page after that.
    fn attempt_block(
        &mut self,
        place: Place,
        before: &Snapshot,
        trial: &mut Trial,
        generation: u64,
    ) -> Option<u16> {
        let instructions = self.decode_again(place.block);
        let mut info = InstructionInfoFactory::new();
        for (index, ins) in instructions.iter().enumerate().skip(place.index) {
            let last = trial.steps.last();
            let (from, undefined) = last.map_or((before, 0), |step| (&step.after, step.undefined));
            let mut step = self.attempt_one(&place.block.ops()[index], ins, from, undefined, &mut info)?;
            step.begins = index == 0;
            trial.steps.push(step);
            if self.code.generation != generation {
                return None;
            }
        }
        let stays = matches!(
            instructions.last()?.flow_control(),
            FlowControl::Next
                | FlowControl::UnconditionalBranch
                | FlowControl::ConditionalBranch
                | FlowControl::Call
        );
        let offset = self.state.rip.wrapping_sub(self.state.regs[usize::from(reg::IP_BASE)]);
        u16::try_from(offset).ok().filter(|_| stays)
    }

    /// Attempts one operation; `None` if it is the interpreter's, or does not complete: nothing of it remains.
    fn attempt_one(
        &mut self,
        op: &Op,
        ins: &Instruction,
        from: &Snapshot,
        undefined: u64,
        info: &mut InstructionInfoFactory,
    ) -> Option<Step> {
        Family::of(ins, &self.features)?;
        let stored = self.about_to_be_stored(ins, info);
        let Some(mut stored) = stored.filter(|_| self.interpret_one(op)) else {
            self.forget_attempt();
            self.go_back(from);
            return None;
        };
        for place in &mut stored {
            place.new = self.bytes_at(place.lin, place.old.len()).unwrap_or_default();
        }
        let written = (ins.rflags_written() | ins.rflags_cleared() | ins.rflags_set()) & STATUS;
        let undefined = (undefined & !rflags(written)) | rflags(ins.rflags_undefined() & STATUS);
        Some(Step { ins: *ins, begins: false, after: self.snapshot(), stored, undefined })
    }

    /// Executes one operation alone; false if it did not complete.
    fn interpret_one(&mut self, op: &Op) -> bool {
        let alone = op.clone();
        alone.handler.set(interpreted(op));
        let mut end = op.clone();
        end.handler.set(|cpu, op| {
            cpu.state.rip = cpu.ip_of(op);
            Ok(Flow::End)
        });
        end.page_offset = op.page_offset + u16::from(op.length);
        let pair = [alone, end];
        let chain = std::mem::replace(&mut self.chain, 0);
        let result = (pair[0].handler.get())(self, &pair[0]);
        self.chain = chain;
        result.is_ok()
    }

    /// Takes back what has been attempted since `before`.
    pub(super) fn take_back_trial(&mut self, before: &Snapshot, trial: &Trial) {
        for stored in trial.steps.iter().rev().flat_map(|step| step.stored.iter().rev()) {
            if self.write_bytes(Seg::Ds, stored.lin, &stored.old).is_err() {
                self.forget_attempt();
            }
        }
        self.go_back(before);
    }

    /// An operation did not complete: nothing of it remains.
    fn forget_attempt(&mut self) {
        self.pending = Pending::None;
        self.replay.waiting = None;
        self.replay.cursor = 0;
        self.replay.done.clear();
    }

    /// The memory that the instruction is about to write; `None` if it cannot be read.
    fn about_to_be_stored(
        &mut self,
        ins: &Instruction,
        info: &mut InstructionInfoFactory,
    ) -> Option<Vec<Stored>> {
        if string::suits(ins) {
            let [count, lin] = [reg::RCX, reg::RDI].map(|register| self.state.regs[usize::from(register)]);
            let size = string::stores(ins, count, lin)?;
            return Some(vec![Stored { lin, old: self.bytes_at(lin, size)?, new: Vec::new() }]);
        }
        let used: Vec<UsedMemory> = info.info(ins).used_memory().to_vec();
        let mut stored = Vec::new();
        for memory in used.iter().filter(|memory| writes(memory.access())) {
            let lin = self.linear_of(ins, memory);
            let size = memory.memory_size().size();
            stored.push(Stored { lin, old: self.bytes_at(lin, size)?, new: Vec::new() });
        }
        Some(stored)
    }

    fn linear_of(&self, ins: &Instruction, memory: &UsedMemory) -> u64 {
        let register = |register: Register| match register {
            Register::None | Register::RIP => 0,
            Register::FS => self.state.ea_base[Seg::Fs as usize],
            Register::GS => self.state.ea_base[Seg::Gs as usize],
            other if other.is_segment_register() => 0,
            other => self.state.regs[other.full_register().number() & 15],
        };
        let index = register(memory.index()).wrapping_mul(u64::from(memory.scale()));
        let base = if ins.is_ip_rel_memory_operand() && memory.base() != Register::RSP {
            self.state.regs[usize::from(reg::IP_BASE)]
        } else {
            register(memory.base())
        };
        register(memory.segment()).wrapping_add(base).wrapping_add(index).wrapping_add(memory.displacement())
    }

    pub(super) fn bytes_at(&mut self, lin: u64, size: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; size];
        self.read_bytes(Seg::Ds, lin, &mut bytes).ok().map(|()| bytes)
    }
}
