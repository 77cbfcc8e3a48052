//! In what host code and the interpreter differ, and how that is told.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use iced_x86::{Formatter, IntelFormatter};

use super::check::Outcome;
use super::trial::{Snapshot, Trial};
use crate::cpu::Cpu;
use crate::state::{CpuState, Seg, reg};

/// So many instructions of a report at most, the last ones.
const TOLD: usize = 64;

/// The general registers, by number.
const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// What is found to differ, line by line.
#[derive(Default)]
struct Differences(String);

impl Differences {
    fn note(&mut self, what: &str, interpreted: u64, translated: u64) {
        if interpreted != translated {
            let _ = writeln!(
                self.0,
                "  {what:<8} interpreted {interpreted:#018x}  translated {translated:#018x}"
            );
        }
    }

    fn registers(&mut self, wanted: &CpuState, now: &CpuState) {
        for (number, name) in NAMES.iter().enumerate() {
            self.note(name, wanted.regs[number], now.regs[number]);
        }
        let gs = Seg::Gs as usize;
        self.note("gs base", wanted.segs[gs].base, now.segs[gs].base);
        self.note("gs used", wanted.ea_base[gs], now.ea_base[gs]);
        self.note("kernel gs", wanted.kernel_gs_base, now.kernel_gs_base);
    }

    fn vectors(&mut self, wanted: &CpuState, now: &CpuState) {
        for (number, (wanted, now)) in wanted.zmm.iter().zip(&now.zmm).enumerate() {
            for (part, (wanted, now)) in wanted.0.chunks(8).zip(now.0.chunks(8)).enumerate() {
                if wanted != now {
                    let word =
                        |bytes: &[u8]| bytes.iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte));
                    self.note(&format!("zmm{number}.{part}"), word(wanted), word(now));
                }
            }
        }
        for number in 0..8 {
            self.note(&format!("k{number}"), wanted.k[number], now.k[number]);
        }
        self.note("x87", 0, u64::from(wanted.x87 != now.x87));
    }
}

impl Cpu {
    /// Compares what host code has left.
    pub(super) fn compare(
        &mut self,
        before: &Snapshot,
        trial: &Trial,
        outcome: &Outcome,
    ) -> Result<(), String> {
        let (done, steps) = (outcome.done, &trial.steps);
        if done > steps.len() {
            let next = steps.len();
            return Err(format!(
                "  host code did {} instructions; the interpreter stopped before number {next}\n",
                done as i64
            ));
        }
        let now = self.snapshot();
        let last = done.checked_sub(1).map(|at| &steps[at]);
        let wanted = last.map_or(before, |step| &step.after);
        let defined = !last.map_or(0, |step| step.undefined);
        let mut differences = Differences::default();
        differences.note("rip", wanted.state.rip, outcome.rip);
        differences.registers(&wanted.state, &now.state);
        differences.note("rflags", wanted.state.rflags() & defined, now.state.rflags() & defined);
        differences.note("mxcsr", wanted.mxcsr.into(), now.mxcsr.into());
        differences.vectors(&wanted.state, &now.state);
        self.compare_memory(trial, done, &mut differences);
        if differences.0.is_empty() { Ok(()) } else { Err(differences.0) }
    }

    /// What the first `done` operations have stored is there, and nothing that those after them would have.
    fn compare_memory(&mut self, trial: &Trial, done: usize, differences: &mut Differences) {
        let (done, not_done) = trial.steps.split_at(done);
        let later = not_done.iter().rev().flat_map(|step| step.stored.iter().rev());
        let later = later.map(|place| (place.lin, &place.old));
        let earlier = done.iter().flat_map(|step| &step.stored).map(|place| (place.lin, &place.new));
        let bytes = |(lin, bytes): (u64, &Vec<u8>)| (lin..).zip(bytes.clone());
        let wanted: BTreeMap<u64, u8> = later.chain(earlier).flat_map(bytes).collect();
        for (lin, byte) in wanted {
            let there = self.bytes_at(lin, 1).map_or(0x100, |bytes| bytes[0].into());
            differences.note(&format!("[{lin:#x}]"), byte.into(), there);
        }
    }
}

/// iced-x86's flags as RFLAGS bits.
pub(super) fn rflags(bits: u32) -> u64 {
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
pub(super) fn report(before: &Snapshot, trial: &Trial, outcome: &Outcome, difference: &str) -> ! {
    let state = &before.state;
    let mut text = String::from("the engines differ. Before:\n");
    for (number, name) in NAMES.iter().enumerate() {
        let end = if number % 4 == 3 { "\n" } else { "" };
        let _ = write!(text, "  {name:<3} {:#018x}{end}", state.regs[number]);
    }
    let _ = writeln!(text, "  rip {:#018x}  rflags {:#x}", state.rip, state.rflags());
    let base = state.regs[usize::from(reg::IP_BASE)];
    let told = outcome.done.clamp(1, trial.steps.len().max(1)).min(trial.steps.len());
    let left_out = told.saturating_sub(TOLD);
    if left_out != 0 {
        let _ = writeln!(text, "  {left_out} instructions, then:");
    }
    let mut formatter = IntelFormatter::new();
    for (number, step) in trial.steps.iter().enumerate().take(told).skip(left_out) {
        let mut line = String::new();
        formatter.format(&step.ins, &mut line);
        // Where one block of the region goes on to another.
        let mark = if step.begins && number != 0 { "->" } else { "  " };
        let _ = writeln!(text, "{mark}{:#x}  {line}", base.wrapping_add(step.ins.ip()));
    }
    let _ = write!(text, "After {} instructions:\n{difference}", outcome.done as i64);
    tracing::error!("{text}");
    stop(&text)
}

/// Ends the process; tests see a panic.
fn stop(text: &str) -> ! {
    if cfg!(test) {
        panic!("{text}");
    }
    std::process::abort()
}
