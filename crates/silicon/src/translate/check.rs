//! [`Engine::Check`](super::Engine::Check): both engines on the same input.
//!
//! Before a translated run goes on in host code, the interpreter executes its operations one by one, and what it leaves
//! behind after each is kept. Then memory and registers are put back, host code runs to its end, and both must have done the same.
//! Each run is checked the first few times, then now and then. Other vCPUs and devices that write the same memory meanwhile
//! look like differences: this is for guests with one vCPU.
#![expect(unsafe_code, reason = "reaches the operations of the running block")]

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use iced_x86::{Formatter, Instruction, InstructionInfoFactory, IntelFormatter, Register, UsedMemory};

use super::link::Link;
use super::run::call;
use super::{Family, LEAVE_INDIRECT, LEAVE_LINK};
use crate::code::op::{Flow, Op};
use crate::code::thread::interpreted;
use crate::cpu::{Counters, Cpu, Pending};
use crate::hostexec::stub::{STATUS, writes};
use crate::state::{CpuState, Seg, reg};

/// How often each run is checked at first.
const FIRST: u32 = 16;
/// After that, it is checked once in so many times.
const EVERY: u32 = 256;

/// How often runs have been executed, by where their host code is, and how often something was compared.
#[derive(Debug, Default)]
pub(super) struct Checks {
    seen: HashMap<u64, u32>,
    pub(super) compared: u64,
}

impl Drop for Checks {
    fn drop(&mut self) {
        let Checks { seen, compared } = self;
        tracing::info!("both engines did the same in {compared} executions of {} runs", seen.len());
    }
}

impl Checks {
    fn is_due(&mut self, code: u64) -> bool {
        let times = self.seen.entry(code).or_default();
        *times = times.wrapping_add(1);
        *times <= FIRST || times.is_multiple_of(EVERY)
    }
}

/// What an operation stored.
struct Stored {
    lin: u64,
    old: Vec<u8>,
    new: Vec<u8>,
}

/// What the interpreter made of one operation.
pub(super) struct Step {
    after: Box<CpuState>,
    mxcsr: u32,
    stored: Vec<Stored>,
    /// Status flags, as RFLAGS bits, that the SDM leaves undefined here.
    undefined: u64,
}

/// What the engines must agree on before an operation.
pub(super) struct Before {
    state: Box<CpuState>,
    mxcsr: u32,
    counters: Counters,
    x87_live: bool,
}

impl Cpu {
    /// As [`call`], for the run that begins with `first`; stops the process at a difference.
    ///
    /// # Safety
    ///
    /// As for [`call`], and `code` is the host code of the run that begins with `first`.
    pub(super) unsafe fn checked_call(&mut self, way_in: u64, code: u64, first: &Op) -> (u64, u64) {
        let due = self.translator.checks.as_mut().is_some_and(|checks| checks.is_due(code));
        // Links and the jump cache would lead on to other blocks.
        (self.translator.validity, self.translator.validity_within) = (u64::MAX, u64::MAX);
        // SAFETY: `enter_block` gave the running block's first operation its address.
        let block = self.block_of(unsafe { &*(self.block_start as *const Op) }).map(|(block, _)| block);
        let (true, Some(block)) = (due && self.replay.done.is_empty(), block) else {
            // SAFETY: the caller's promise.
            return unsafe { call(way_in, code) };
        };
        let start = (std::ptr::from_ref(first).addr() - self.block_start) / size_of::<Op>();
        let instructions = self.decode_again(block);
        let generation = self.code.generation;
        let before = self.before();
        let (block_start, current) = (self.block_start, self.current_op);
        let steps = self.interpret_apart(&block.ops()[start..], &instructions[start..]);
        (self.block_start, self.current_op) = (block_start, current);
        if self.code.generation != generation && !steps.is_empty() {
            // It has changed code, perhaps its own. What the interpreter has done stands.
            self.counters = before.counters;
            self.counters.instructions += (start + steps.len()) as u64;
            return (LEAVE_INDIRECT, 0);
        }
        for stored in steps.iter().rev().flat_map(|step| step.stored.iter().rev()) {
            self.put_back(stored.lin, &stored.old);
        }
        self.go_back(&before);
        // SAFETY: the caller's promise.
        let (exit, extra) = unsafe { call(way_in, code) };
        if self.leaves_for_nowhere(exit) {
            return (exit, extra);
        }
        let done = if exit == LEAVE_INDIRECT || exit & LEAVE_LINK != 0 {
            instructions.len() - start
        } else {
            extra as usize - start
        };
        if let Err(difference) = self.compare(&before, &steps, done) {
            report(&before.state, &instructions[start..], done, &difference);
        }
        if let Some(checks) = &mut self.translator.checks {
            checks.compared += 1;
        }
        (exit, extra)
    }

    /// Whether host code has left by a branch to an address that nothing can be at: it is about to be taken back.
    fn leaves_for_nowhere(&self, exit: u64) -> bool {
        if exit == LEAVE_INDIRECT {
            return !self.state.canonical(self.state.rip);
        }
        let link = Some(exit & !LEAVE_LINK).filter(|_| exit & LEAVE_LINK != 0);
        let target =
            link.zip(self.translator.code.as_ref()).and_then(|(at, code)| Link::target(&code.arena, at));
        let ip_base = self.state.regs[usize::from(reg::IP_BASE)];
        target.is_some_and(|(target, _)| !self.state.canonical(ip_base.wrapping_add_signed(target)))
    }

    pub(super) fn before(&mut self) -> Before {
        let x87_live = self.x87_is_live();
        self.sync_x87();
        let (mxcsr, counters) = (self.mxcsr(), self.counters);
        let before = Before { state: Box::new(self.state.clone()), mxcsr, counters, x87_live };
        if x87_live {
            self.load_x87();
        }
        before
    }

    fn go_back(&mut self, before: &Before) {
        self.sync_x87();
        self.state = (*before.state).clone();
        self.counters = before.counters;
        self.set_mxcsr(before.mxcsr);
        if before.x87_live {
            self.load_x87();
        }
    }

    /// Has the interpreter execute operations, as long as they can be translated and complete.
    fn interpret_apart(&mut self, ops: &[Op], instructions: &[Instruction]) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut undefined = 0;
        let mut info = InstructionInfoFactory::new();
        for (op, ins) in ops.iter().zip(instructions) {
            if Family::of(ins, &self.features).is_none() {
                break;
            }
            let before = self.before();
            let Some(mut stored) = self.about_to_be_stored(ins, &mut info) else {
                self.forget_attempt();
                self.go_back(&before);
                break;
            };
            if !self.interpret_one(op) {
                self.forget_attempt();
                self.go_back(&before);
                break;
            }
            for place in &mut stored {
                place.new = self.bytes_at(place.lin, place.old.len()).unwrap_or_default();
            }
            let written = (ins.rflags_written() | ins.rflags_cleared() | ins.rflags_set()) & STATUS;
            undefined = (undefined & !rflags(written)) | rflags(ins.rflags_undefined() & STATUS);
            let Before { state, mxcsr, .. } = self.before();
            steps.push(Step { after: state, mxcsr, stored, undefined });
        }
        steps
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

    fn bytes_at(&mut self, lin: u64, size: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; size];
        self.read_bytes(Seg::Ds, lin, &mut bytes).ok().map(|()| bytes)
    }

    fn put_back(&mut self, lin: u64, bytes: &[u8]) {
        if self.write_bytes(Seg::Ds, lin, bytes).is_err() {
            self.forget_attempt();
        }
    }

    /// Compares what host code has left after `done` operations.
    pub(super) fn compare(&mut self, before: &Before, steps: &[Step], done: usize) -> Result<(), String> {
        if done > steps.len() {
            let next = steps.len();
            return Err(format!(
                "host code did {done} instructions; the interpreter stopped before number {next}"
            ));
        }
        let now = self.before();
        let last = done.checked_sub(1).map(|at| &steps[at]);
        let (wanted, mxcsr) = last.map_or((&before.state, before.mxcsr), |step| (&step.after, step.mxcsr));
        let undefined = last.map_or(0, |step| step.undefined);
        let mut text = String::new();
        let mut differ = |what: &str, interpreted: u64, translated: u64| {
            if interpreted != translated {
                let _ = writeln!(
                    text,
                    "  {what:<8} interpreted {interpreted:#018x}  translated {translated:#018x}"
                );
            }
        };
        for (number, name) in NAMES.iter().enumerate() {
            differ(name, wanted.regs[number], now.state.regs[number]);
        }
        differ("rflags", wanted.rflags() & !undefined, now.state.rflags() & !undefined);
        differ("mxcsr", mxcsr.into(), now.mxcsr.into());
        for number in 0..32 {
            for part in 0..8 {
                let word = |state: &CpuState| {
                    let bytes = &state.zmm[number].0[part * 8..part * 8 + 8];
                    bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
                };
                differ(&format!("zmm{number}.{part}"), word(wanted), word(&now.state));
            }
        }
        for number in 0..8 {
            differ(&format!("k{number}"), wanted.k[number], now.state.k[number]);
        }
        let same_x87 = wanted.x87 == now.state.x87;
        differ("x87", 0, u64::from(!same_x87));
        let stored: BTreeMap<u64, u8> = (steps[..done].iter())
            .flat_map(|step| &step.stored)
            .flat_map(|place| (place.lin..).zip(place.new.iter().copied()))
            .collect();
        for (lin, byte) in stored {
            let there = self.bytes_at(lin, 1).map_or(0x100, |bytes| bytes[0].into());
            differ(&format!("[{lin:#x}]"), byte.into(), there);
        }
        if text.is_empty() { Ok(()) } else { Err(text) }
    }
}

/// The general registers, by number.
const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// iced-x86's flags as RFLAGS bits.
fn rflags(bits: u32) -> u64 {
    use crate::flags::Rflags;
    use iced_x86::RflagsBits as Bits;
    let pairs = [
        (Bits::OF, Rflags::OF),
        (Bits::SF, Rflags::SF),
        (Bits::ZF, Rflags::ZF),
        (Bits::AF, Rflags::AF),
        (Bits::CF, Rflags::CF),
        (Bits::PF, Rflags::PF),
    ];
    pairs.iter().filter(|(bit, _)| bits & bit != 0).fold(0, |all, (_, flag)| all | flag.bits())
}

/// Says what differs, and ends the process.
fn report(before: &CpuState, instructions: &[Instruction], done: usize, difference: &str) -> ! {
    let mut text = String::from("the engines differ. Before:\n");
    for (number, name) in NAMES.iter().enumerate() {
        let _ = write!(
            text,
            "  {name:<3} {:#018x}{}",
            before.regs[number],
            if number % 4 == 3 { "\n" } else { "" }
        );
    }
    let _ = writeln!(text, "  rflags {:#x}", before.rflags());
    let base = before.regs[usize::from(reg::IP_BASE)];
    let mut formatter = IntelFormatter::new();
    for ins in instructions.iter().take(done.max(1)) {
        let mut line = String::new();
        formatter.format(ins, &mut line);
        let _ = writeln!(text, "  {:#x}  {line}", base.wrapping_add(ins.ip()));
    }
    let _ = write!(text, "After:\n{difference}");
    tracing::error!("{text}");
    std::process::abort()
}
