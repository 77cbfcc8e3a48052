//! Runs many programs in worker processes, and tells the differences.

use std::io::{self, Write};
use std::sync::atomic::Ordering;

use iced_x86::Code;
use silicon::model::Features;

use super::bench::{Bench, Difference, Outcome};
use super::forms::Forms;
use super::program::Program;
use super::shrink::shrink;
use super::writer::Programs;
use crate::capabilities::Capabilities;
use crate::forms::Form;
use crate::run::{Progress, RunError, in_workers};

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Seed of all programs.
    pub seed: u64,
    /// Number of the first program, and how many.
    pub first: u64,
    /// As it says.
    pub programs: u64,
    /// Forms that programs are drawn from.
    pub forms: Vec<Form>,
    /// Worker processes.
    pub workers: usize,
    /// Differences that each worker tells; the rest is counted.
    pub told: u64,
    /// A form that translators are made to do wrong.
    pub planted: Option<Code>,
}

/// What came out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Programs run.
    pub programs: u64,
    /// Instructions in them.
    pub length: u64,
    /// Runs of them.
    pub runs: u64,
    /// Runs that the host was the reference of.
    pub native: u64,
    /// Runs that ended in a fault.
    pub faults: u64,
    /// Instructions executed in each engine.
    pub instructions: u64,
    /// Programs that did not end: they had changed what their ends depend on.
    pub endless: u64,
    /// Programs with a difference.
    pub different: u64,
    /// The differences, in lines.
    pub told: Vec<String>,
    /// Workers that died, with the program that they were at.
    pub crashes: Vec<String>,
}

impl Summary {
    /// Whether nothing was found.
    pub fn is_clean(&self) -> bool {
        self.different == 0 && self.crashes.is_empty() && self.told.is_empty()
    }

    fn add(&mut self, program: &Program, outcome: &Outcome) {
        self.programs += 1;
        self.length += program.items.len() as u64;
        self.runs += outcome.runs;
        self.native += outcome.native;
        self.faults += outcome.faults;
        self.instructions += outcome.instructions;
        self.endless += u64::from(outcome.endless);
        self.different += u64::from(outcome.difference.is_some());
    }

    fn counts(&mut self) -> [&mut u64; 8] {
        let Summary { programs, length, runs, native, faults, instructions, endless, different, .. } = self;
        [programs, length, runs, native, faults, instructions, endless, different]
    }

    /// Takes a worker's output: lines `C counts` and `T text`.
    fn merge(&mut self, text: &str) {
        for line in text.lines() {
            if let Some(told) = line.strip_prefix("T ") {
                self.told.push(told.to_owned());
            } else if let Some(counts) = line.strip_prefix("C ") {
                for (sum, count) in self.counts().into_iter().zip(counts.split(' ')) {
                    *sum += count.parse::<u64>().unwrap_or_default();
                }
            }
        }
    }
}

/// Runs `plan`; `tick` is called now and then with the number of programs done.
pub fn run(plan: &Plan, features: &Features, tick: impl FnMut(u64)) -> Result<Summary, RunError> {
    let task =
        |worker: usize, progress: &Progress, out: &mut dyn Write| work(plan, features, worker, progress, out);
    let mut summary = Summary::default();
    for end in in_workers(plan.workers, task, tick)? {
        summary.merge(&end.text);
        if end.status != 0 {
            let number = end.progress.number.load(Ordering::Relaxed);
            let Plan { seed, .. } = plan;
            let status = end.status;
            summary.crashes.push(format!(
                "a worker died (wait status {status:#x}) at --blocks --seed {seed} --case {number}"
            ));
        }
    }
    Ok(summary)
}

/// The worker: every `workers`th program.
fn work(
    plan: &Plan,
    features: &Features,
    worker: usize,
    progress: &Progress,
    out: &mut dyn Write,
) -> Result<(), RunError> {
    let mut bench = Bench::new(features.clone(), plan.seed)?;
    bench.plant(plan.planted);
    let mut programs = Programs::new(Capabilities::of_host()?, Forms::new(&plan.forms));
    let failed = |e: io::Error| RunError::System("writing results", e);
    let mut summary = Summary::default();
    for number in (plan.first..plan.first + plan.programs).skip(worker).step_by(plan.workers) {
        progress.number.store(number, Ordering::Relaxed);
        let mut program = programs.program(plan.seed, number);
        let outcome = bench.run(&mut program);
        progress.done.fetch_add(1, Ordering::Relaxed);
        summary.add(&program, &outcome);
        if let Some(difference) = outcome.difference.filter(|_| summary.different <= plan.told) {
            for line in tell(&mut bench, plan.seed, number, &program, &difference) {
                writeln!(out, "T {line}").map_err(failed)?;
            }
        }
    }
    let counts = summary.counts().map(|count| count.to_string()).join(" ");
    writeln!(out, "C {counts}").map_err(failed)
}

/// A difference: the line that repeats it, then the smallest program that still shows it, with what differs then.
pub fn tell(bench: &mut Bench, seed: u64, number: u64, program: &Program, found: &Difference) -> Vec<String> {
    let Difference { run, other, items } = found;
    let mut lines = vec![format!(
        "DIFFERENT --blocks --seed {seed} --case {number}: run {run}, {other} / interpreter: {}",
        items.join("; ")
    )];
    let differs = |bench: &mut Bench, candidate: &mut Program| {
        bench.renew();
        bench.run(candidate).difference.filter(|difference| difference.other == *other)
    };
    if differs(bench, &mut program.clone()).is_none() {
        lines.push("  (not by itself: only after other programs)".into());
        return lines;
    }
    let mut smallest = shrink(program, |candidate| differs(bench, candidate).is_some());
    lines.extend(smallest.disassemble().into_iter().map(|line| format!("  {line}")));
    if let Some(Difference { run, items, .. }) = differs(bench, &mut smallest) {
        lines.push(format!("  run {run} of {}: {}", smallest.machines.len(), items.join("; ")));
        lines.push(format!("  {}", registers(&smallest, run)));
    }
    lines
}

/// The general registers that a run starts from.
fn registers(program: &Program, run: usize) -> String {
    let machine = &program.machines[run];
    let gpr: Vec<String> = machine.gpr.iter().map(|value| format!("{value:#x}")).collect();
    format!(
        "from RAX to R15: {}; rflags {:#x}, mxcsr {:#x}",
        gpr.join(" "),
        machine.rflags,
        machine.vectors.mxcsr
    )
}
