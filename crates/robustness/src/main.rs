//! `robustness`: random guests on the software processor.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use robustness::batch::{self, Event, Plan};
use robustness::kinds::Kind;
use robustness::run::Totals;

/// Runs random guests and reports whatever one of them does to the processor that runs it.
#[derive(Parser, Clone, Debug)]
#[command(version)]
struct Arguments {
    /// Number of the first image.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Images to run; 1 if only a kind and a seed are given.
    #[arg(long)]
    images: Option<u64>,
    /// Only images of this kind.
    #[arg(long)]
    kind: Option<Kind>,
    /// Go on with further images for this long, whatever --images says.
    #[arg(long)]
    minutes: Option<u64>,
    /// The kernel to mutate; by default Debian's 6.12, if it can be had.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// Worker processes.
    #[arg(long, default_value_t = 2)]
    workers: u64,
    /// Run the images in this process, every so many, and tell about them on standard output.
    #[arg(long, hide = true)]
    stride: Option<u64>,
}

/// What a worker says, one line each: `at KIND SEED`, `fail KIND SEED TEXT`, `grew TEXT`, `total KIND …`,
/// `kicks …`, `resident …`.
enum Message {
    Line(u64, String),
    Ended(u64),
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    let result = match arguments.stride {
        Some(stride) => worker(&arguments, stride),
        None => {
            if arguments.kernel.is_none() && arguments.kind.is_none_or(|kind| kind == Kind::Kernel) {
                arguments.kernel = xtask::packages::kernel("6.12").map(|kernel| kernel.image).ok();
                if arguments.kernel.is_none() {
                    eprintln!("no kernel to mutate: random bytes take its place");
                }
            }
            run(&arguments)
        }
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("robustness: {message}");
            ExitCode::from(2)
        }
    }
}

fn worker(arguments: &Arguments, stride: u64) -> Result<bool, String> {
    let images = arguments.images.unwrap_or(1);
    let plan = Plan { seed: arguments.seed, images, kind: arguments.kind, stride };
    let summary = batch::run(&plan, arguments.kernel.as_deref(), |event| {
        let line = match event {
            Event::Begins(kind, seed) => format!("at {kind} {seed}"),
            Event::Failed(kind, seed, text) => format!("fail {kind} {seed} {}", text.replace('\n', " ")),
            Event::Grew(text) => format!("grew {text}"),
        };
        say(&line);
    })?;
    for (kind, t) in summary.kinds {
        let (images, shutdowns) = (t.images, t.shutdowns);
        say(&format!("total {kind} {images} {} {} {} {shutdowns}", t.instructions, t.exceptions, t.exits));
    }
    let (slowest, label) = summary.slowest;
    say(&format!("kicks {} {} {label}", summary.kicks, slowest.as_micros()));
    if summary.resident.0 != 0 {
        say(&format!("resident {} {}", summary.resident.0, summary.resident.1));
    }
    Ok(true)
}

/// Writes a line at once, since this process may not live to write another. A parent that is gone needs none.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// What came of all workers.
#[derive(Default)]
struct Report {
    totals: BTreeMap<String, Totals>,
    failures: Vec<String>,
    kicks: u64,
    slowest: (Duration, String),
    /// Of each worker, in KiB: after its first images and at its end.
    resident: Vec<(u64, u64)>,
}

/// A worker and what it has still to do.
struct Job {
    child: Child,
    at: Option<(Kind, u64)>,
    left: u64,
}

fn run(arguments: &Arguments) -> Result<bool, String> {
    let started = Instant::now();
    let one = arguments.kind.is_some() && arguments.images.is_none() && arguments.minutes.is_none();
    let images = arguments.images.unwrap_or(if one { 1 } else { 10_000 });
    let end = arguments.minutes.map(|minutes| started + Duration::from_secs(minutes * 60));
    let progress = ProgressBar::hidden();
    if io::stderr().is_terminal() {
        progress.set_draw_target(indicatif::ProgressDrawTarget::stderr());
    }
    progress.set_length(images);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} images, {per_sec}, {eta} left") {
        progress.set_style(style);
    }
    let mut report = Report::default();
    let mut first = arguments.seed;
    loop {
        round(arguments, first, images, &progress, &mut report)?;
        first = first.wrapping_add(images);
        if end.is_none_or(|end| Instant::now() >= end) {
            break;
        }
        progress.inc_length(images);
    }
    progress.finish_and_clear();
    print(&report, started.elapsed());
    Ok(report.failures.is_empty())
}

/// Runs `images` images in several processes. One that dies is replaced, from the image after its last.
fn round(
    arguments: &Arguments,
    first: u64,
    images: u64,
    progress: &ProgressBar,
    report: &mut Report,
) -> Result<(), String> {
    let workers = arguments.workers.clamp(1, images.max(1));
    let (sender, receiver) = mpsc::channel();
    let mut jobs = BTreeMap::new();
    for i in 0..workers {
        let left = (images + workers - 1 - i) / workers;
        let child = spawn(arguments, i, first.wrapping_add(i), left, workers, &sender)?;
        jobs.insert(i, Job { child, at: None, left });
    }
    while !jobs.is_empty() {
        let message = receiver.recv().map_err(|e| e.to_string())?;
        match message {
            Message::Line(i, line) => {
                let Some(job) = jobs.get_mut(&i) else { continue };
                if let Some((kind, seed)) = heard(&line, report) {
                    (job.at, job.left) = (Some((kind, seed)), job.left.saturating_sub(1));
                    progress.inc(1);
                }
            }
            Message::Ended(i) => {
                let Some(mut job) = jobs.remove(&i) else { continue };
                let status = job.child.wait().map_err(|e| e.to_string())?;
                if status.success() {
                    continue;
                }
                let Some((kind, seed)) = job.at else {
                    return Err(format!("a worker cannot start: {status}"));
                };
                let command = batch::reproducer(kind, seed);
                report.failures.push(format!("the process died ({status}): {command}"));
                if job.left > 0 {
                    let next = seed.wrapping_add(workers);
                    let child = spawn(arguments, i, next, job.left, workers, &sender)?;
                    jobs.insert(i, Job { child, at: None, left: job.left });
                }
            }
        }
    }
    Ok(())
}

/// Takes in a worker's line; gives the image that it begins.
fn heard(line: &str, report: &mut Report) -> Option<(Kind, u64)> {
    let (what, rest) = line.split_once(' ')?;
    let mut words = rest.splitn(3, ' ');
    let mut image = || Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?));
    match what {
        "at" => return image(),
        "fail" => {
            let (kind, seed) = image()?;
            let text = words.next().unwrap_or("");
            report.failures.push(format!("{text}: {}", batch::reproducer(kind, seed)));
        }
        "grew" => report.failures.push(rest.to_string()),
        "total" => {
            let (kind, numbers) = rest.split_once(' ')?;
            let numbers: Vec<u64> = numbers.split(' ').filter_map(|word| word.parse().ok()).collect();
            if let [images, instructions, exceptions, exits, shutdowns] = numbers[..] {
                let totals = Totals { images, instructions, exceptions, exits, shutdowns };
                report.totals.entry(kind.to_string()).or_default().add(&totals);
            }
        }
        "resident" => {
            let (before, after) = rest.split_once(' ')?;
            report.resident.push((before.parse().ok()?, after.parse().ok()?));
        }
        "kicks" => {
            let mut words = rest.splitn(3, ' ');
            report.kicks += words.next()?.parse().unwrap_or(0);
            let slowest = Duration::from_micros(words.next()?.parse().unwrap_or(0));
            if slowest > report.slowest.0 {
                report.slowest = (slowest, words.next().unwrap_or("").to_string());
            }
        }
        _ => {}
    }
    None
}

fn spawn(
    arguments: &Arguments,
    i: u64,
    first: u64,
    images: u64,
    stride: u64,
    sender: &Sender<Message>,
) -> Result<Child, String> {
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut command = Command::new(own);
    command.args(["--seed", &first.to_string(), "--images", &images.to_string()]);
    command.args(["--stride", &stride.to_string()]);
    if let Some(kind) = arguments.kind {
        command.args(["--kind", kind.name()]);
    }
    if let Some(kernel) = &arguments.kernel {
        command.arg("--kernel").arg(kernel);
    }
    // With an arena for each thread that ever was, what stays resident says little about what is held.
    command.env("MALLOC_ARENA_MAX", "1");
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|e| e.to_string())?;
    let Some(out) = child.stdout.take() else { return Err("a worker has no output".into()) };
    let sender = sender.clone();
    thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            // Nobody listens any more only if the run has failed already.
            let _ = sender.send(Message::Line(i, line));
        }
        let _ = sender.send(Message::Ended(i));
    });
    Ok(child)
}

fn print(report: &Report, took: Duration) {
    println!(
        "{:<13} {:>7} {:>14} {:>12} {:>10} {:>10}",
        "kind", "images", "instructions", "exceptions", "exits", "shutdowns"
    );
    let mut all = Totals::default();
    let row = |name: &str, t: &Totals| {
        println!(
            "{name:<13} {:>7} {:>14} {:>12} {:>10} {:>10}",
            t.images, t.instructions, t.exceptions, t.exits, t.shutdowns
        );
    };
    for (kind, totals) in &report.totals {
        row(kind, totals);
        all.add(totals);
    }
    row("all", &all);
    println!(
        "{} guests were kicked; the slowest came back after {:?} ({}); {} failures in {:.1} s",
        report.kicks,
        report.slowest.0,
        report.slowest.1,
        report.failures.len(),
        took.as_secs_f64()
    );
    for (before, after) in &report.resident {
        println!("a worker held {before} KiB after its first images and {after} KiB at its end");
    }
    for failure in &report.failures {
        println!("FAILED: {failure}");
    }
}
