//! `ioctls`: random calls of the KVM API, which must neither crash nor hang nor leak.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use robustness::calls::{Arena, session};
use robustness::process::Held;

/// Makes random calls of the KVM API from several threads and reports whatever goes wrong.
#[derive(Parser, Debug)]
#[command(version)]
struct Arguments {
    /// First session.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long to go on.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// As --seconds, in minutes.
    #[arg(long)]
    minutes: Option<u64>,
    /// Calls by each thread of a session.
    #[arg(long, default_value_t = 2000)]
    calls: u64,
    /// Run this many sessions in this process.
    #[arg(long, hide = true)]
    sessions: Option<u64>,
}

/// Sessions of one process; then a new one begins, and this one must hold no more than after its first few.
const SESSIONS: u64 = 40;
const WARM: u64 = 8;
/// Failures after which it stops.
const ENOUGH: u32 = 5;
/// Lines that are shown of what a failed process said.
const SAID: usize = 24;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.sessions {
        Some(sessions) => worker(&arguments, sessions),
        None => run(&arguments),
    }
}

/// Runs sessions in this process and prints how many calls they made.
fn worker(arguments: &Arguments, sessions: u64) -> ExitCode {
    let Some(arena) = Arena::new() else {
        eprintln!("no memory for the arena");
        return ExitCode::from(2);
    };
    let (mut calls, mut before) = (0, Held::default());
    for number in 0..sessions {
        let seed = arguments.seed + number;
        let outcome = session(seed, arguments.calls, arena);
        calls += outcome.calls;
        if let Some(failure) = outcome.failure {
            eprintln!("session {seed}: {failure}");
            return ExitCode::FAILURE;
        }
        if number + 1 == WARM {
            arena.mend();
            before = Held::now();
        }
    }
    arena.mend();
    if sessions > WARM
        && let Some(growth) = Held::now().growth(&before)
    {
        eprintln!("sessions from {}: {growth}", arguments.seed);
        return ExitCode::FAILURE;
    }
    println!("{calls}");
    ExitCode::SUCCESS
}

/// Runs worker processes until the time is over.
fn run(arguments: &Arguments) -> ExitCode {
    let started = Instant::now();
    let limit = Duration::from_secs(arguments.minutes.map_or(arguments.seconds, |minutes| minutes * 60));
    let bar = ProgressBar::new(limit.as_secs());
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} s, {msg}") {
        bar.set_style(style);
    }
    let (mut seed, mut calls, mut failures) = (arguments.seed, 0u64, 0u32);
    while started.elapsed() < limit && failures < ENOUGH {
        let own = std::env::current_exe().unwrap_or_else(|_| "ioctls".into());
        let mut command = Command::new(own);
        command.args(["--seed", &seed.to_string(), "--sessions", &SESSIONS.to_string()]);
        command.args(["--calls", &arguments.calls.to_string()]).env("MALLOC_ARENA_MAX", "1");
        let output = match command.output() {
            Ok(output) => output,
            Err(error) => {
                eprintln!("ioctls: {error}");
                return ExitCode::from(2);
            }
        };
        if output.status.success() {
            calls += String::from_utf8_lossy(&output.stdout).trim().parse::<u64>().unwrap_or(0);
        } else {
            failures += 1;
            let said = String::from_utf8_lossy(&output.stderr);
            let said: Vec<&str> = said.lines().take(SAID).collect();
            println!("FAILED: sessions from {seed}: {}: {}", output.status, said.join("\n"));
            println!(
                "again: cargo run --release -p robustness --bin ioctls -- --seed {seed} --sessions {SESSIONS}"
            );
        }
        seed += SESSIONS;
        bar.set_position(started.elapsed().as_secs());
        bar.set_message(format!("{calls} calls"));
    }
    bar.finish_and_clear();
    println!("{calls} calls in {} sessions, {failures} failures", seed - arguments.seed);
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
