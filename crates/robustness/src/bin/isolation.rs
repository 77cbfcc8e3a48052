//! `isolation`: random guests, around whose stays in translated code all pages of the process are compared.
#![expect(unsafe_code, reason = "has processes that lie at the same addresses each time")]

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use robustness::isolation::{Bench, Break, Failure, Source};
use silicon::translate::Engine;

/// Runs random guests on the translator and reports whatever changes outside their memory.
#[derive(Parser, Clone, Debug)]
#[command(version)]
struct Arguments {
    /// Number of the first guest.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Guests to run; 1 if only a kind and a seed are given.
    #[arg(long)]
    guests: Option<u64>,
    /// Go on with further guests for this long, whatever --guests says.
    #[arg(long)]
    minutes: Option<u64>,
    /// Only guests of this kind.
    #[arg(long)]
    kind: Option<Source>,
    /// How often blocks run before they are translated; by default it differs from process to process.
    #[arg(long)]
    after: Option<u32>,
    /// The kernel to mutate; by default Debian's 6.12, if it can be had.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// Do what must be found.
    #[arg(long, hide = true)]
    broken: Option<Break>,
    /// Worker processes.
    #[arg(long, default_value_t = 2)]
    workers: u32,
    /// Run the guests in this process.
    #[arg(long, hide = true)]
    worker: bool,
}

/// Guests of one process.
const GUESTS: u64 = 100;
/// Guests, if nobody says how many.
const DEFAULT: u64 = 600;
/// How often blocks run before they are translated, in turn: at once, or together with those that they lead to.
const AFTER: [u32; 3] = [0, 2, 5];
/// The kernel writes the number of the processor into a thread's area for restartable sequences, whenever it changes: not here. And
/// what the allocator does not keep need not be compared.
const TUNABLES: &str = "glibc.pthread.rseq=0:glibc.malloc.mmap_threshold=131072";
/// What runs one guest again.
const AGAIN: &str = "cargo run --release -p robustness --bin isolation --";
/// Failures after which it stops.
const ENOUGH: usize = 5;

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.worker {
        return worker(&arguments);
    }
    if arguments.kernel.is_none() {
        arguments.kernel = xtask::packages::kernel("6.12").map(|kernel| kernel.image).ok();
        if arguments.kernel.is_none() {
            eprintln!("no kernel to mutate: random bytes take its place");
        }
    }
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("isolation: {error}");
            ExitCode::from(2)
        }
    }
}

/// Runs guests in this process: `at KIND SEED`, `found KIND SEED TEXT`, `ran KIND STAYS`, `total NUMBERS`.
fn worker(arguments: &Arguments) -> ExitCode {
    let mut bench = match Bench::new(arguments.kernel.as_deref()) {
        Ok(bench) => bench,
        Err(error) => {
            eprintln!("isolation: {error}");
            return ExitCode::from(2);
        }
    };
    for seed in (arguments.seed..).take(arguments.guests.unwrap_or(1) as usize) {
        let source = arguments.kind.unwrap_or_else(|| Source::of(seed));
        say(&format!("at {source} {seed}"));
        match bench.run(source, seed, arguments.broken) {
            Ok(stays) => say(&format!("ran {source} {stays}")),
            Err(Failure::Found(finding)) => {
                // What has been written cannot be taken back.
                say(&format!("found {source} {seed} {finding}"));
                return ExitCode::FAILURE;
            }
            Err(Failure::Refused(error)) => {
                say(&format!("found {source} {seed} could not be made: {error}"));
                return ExitCode::FAILURE;
            }
        }
    }
    let watched = bench.watched();
    let (stays, compared, pages) = (watched.stays, watched.compared, watched.pages);
    let (frozen, faults, instructions) = (watched.frozen, watched.faults, bench.instructions);
    say(&format!("total {stays} {compared} {pages} {frozen} {faults} {instructions}"));
    ExitCode::SUCCESS
}

/// Writes a line at once: this process may not live to write another. A parent that is gone needs none.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// What came of all processes.
#[derive(Default)]
struct Report {
    /// Guests and stays by kind.
    kinds: BTreeMap<String, [u64; 2]>,
    /// As [`worker`] gives them.
    totals: [u64; 6],
    failures: Vec<String>,
}

/// Runs worker processes until there were enough guests, or the time is over.
fn run(arguments: &Arguments) -> Result<bool, String> {
    let started = Instant::now();
    let limit = arguments.minutes.map(|minutes| Duration::from_secs(60 * minutes));
    let guests = arguments.guests.unwrap_or(if arguments.kind.is_some() { 1 } else { DEFAULT });
    let bar = ProgressBar::new(guests);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} guests, {per_sec}") {
        bar.set_style(style);
    }
    let (next, report) = (AtomicU64::new(0), Mutex::new(Report::default()));
    let round = || -> Result<(), String> {
        loop {
            let from = next.fetch_add(GUESTS, Ordering::Relaxed);
            let enough = lock(&report).failures.len() >= ENOUGH;
            if enough || limit.map_or(from >= guests, |limit| started.elapsed() >= limit) {
                return Ok(());
            }
            let count = if limit.is_some() { GUESTS } else { GUESTS.min(guests - from) };
            process(arguments, arguments.seed.wrapping_add(from), count, &report)?;
            bar.inc(count);
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..arguments.workers.max(1)).map(|_| scope.spawn(round)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err("a panic".into())))
    })?;
    bar.finish_and_clear();
    let report = lock(&report);
    print(&report, started.elapsed());
    Ok(report.failures.is_empty())
}

fn lock(report: &Mutex<Report>) -> MutexGuard<'_, Report> {
    report.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs guests in processes of their own. One that ends early is replaced, from the guest after its last.
fn process(
    arguments: &Arguments,
    mut first: u64,
    mut guests: u64,
    report: &Mutex<Report>,
) -> Result<(), String> {
    let after = arguments.after.unwrap_or(AFTER[(first / GUESTS) as usize % AFTER.len()]);
    while guests > 0 && lock(report).failures.len() < ENOUGH {
        let mut child = spawn(arguments, first, guests, after).map_err(|e| e.to_string())?;
        let (mut at, mut ran) = (None, 0);
        if let Some(out) = child.stdout.take() {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if let Some(guest) = heard(&line, &mut lock(report)) {
                    (at, ran) = (Some(guest), ran + 1);
                }
            }
        }
        let status = child.wait().map_err(|e| e.to_string())?;
        if !status.success() {
            let guest = at.ok_or_else(|| format!("a process cannot start: {status}"))?;
            lock(report).failures.push(format!("{status}; again: {AGAIN} --kind {guest} --after {after}"));
        }
        (first, guests) = (first.wrapping_add(ran), guests.saturating_sub(ran));
    }
    Ok(())
}

fn spawn(arguments: &Arguments, first: u64, guests: u64, after: u32) -> io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--worker", "--seed", &first.to_string(), "--guests", &guests.to_string()]);
    command.args(arguments.kind.map(|kind| format!("--kind={kind}")));
    command.args(broken(arguments).map(|name| format!("--broken={name}")));
    if let Some(kernel) = &arguments.kernel {
        command.arg("--kernel").arg(kernel);
    }
    command.env(Engine::VARIABLE, format!("translate:{after}")).env("MALLOC_ARENA_MAX", "1");
    command.env("GLIBC_TUNABLES", TUNABLES);
    // SAFETY: one call, which a process may make between fork and exec.
    unsafe {
        command.pre_exec(|| {
            // The same guest finds the same addresses again.
            libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong);
            Ok(())
        })
    };
    command.stdout(Stdio::piped()).spawn()
}

fn broken(arguments: &Arguments) -> Option<&'static str> {
    let broken = arguments.broken?;
    Break::ALL.iter().find(|(it, _)| *it == broken).map(|(_, name)| *name)
}

/// Takes in a worker's line; gives the guest that it begins, as arguments.
fn heard(line: &str, report: &mut Report) -> Option<String> {
    let (what, rest) = line.split_once(' ')?;
    match what {
        "at" => {
            let (kind, seed) = rest.split_once(' ')?;
            return Some(format!("{kind} --seed {seed}"));
        }
        "found" => report.failures.push(rest.to_string()),
        "ran" => {
            let (kind, stays) = rest.split_once(' ')?;
            let row = report.kinds.entry(kind.to_string()).or_default();
            *row = [row[0] + 1, row[1] + stays.parse::<u64>().unwrap_or(0)];
        }
        "total" => {
            let numbers = rest.split(' ').filter_map(|word| word.parse::<u64>().ok());
            report.totals.iter_mut().zip(numbers).for_each(|(total, number)| *total += number);
        }
        _ => {}
    }
    None
}

fn print(report: &Report, took: Duration) {
    println!("{:<13} {:>8} {:>10}", "kind", "guests", "stays");
    let mut guests = 0;
    for (kind, [count, stays]) in &report.kinds {
        println!("{kind:<13} {count:>8} {stays:>10}");
        guests += count;
    }
    let [stays, compared, pages, frozen, faults, instructions] = report.totals;
    println!(
        "{guests} guests, {instructions} instructions, {stays} stays in host code, {compared} of them between comparisons of \
         {} pages; {frozen} pages compared that cannot be written; {faults} faults in host code; {} failures in {:.1} s",
        pages.checked_div(compared).unwrap_or(0),
        report.failures.len(),
        took.as_secs_f64()
    );
    for failure in &report.failures {
        println!("FAILED: {failure}");
    }
}
