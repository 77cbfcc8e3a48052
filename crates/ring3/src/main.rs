//! The `ring3` command.

mod cli;
mod client;
mod doctor;
mod mitigations;
mod run;
mod status;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use vmm::{Machine, Outcome, Report, StartError};

use crate::cli::{Arguments, BootArguments, Command};

/// Environment variable with the log filter.
const LOG_VARIABLE: &str = "RING3_LOG";
/// Warnings of ours; the virtio queue crate calls errors what a guest does wrong.
const DEFAULT_LOG: &str = "warn,virtio_queue=off";

fn main() -> ExitCode {
    let started = Instant::now();
    let Arguments { command } = Arguments::parse();
    start_logging();
    ExitCode::from(match command {
        Command::Boot(arguments) => boot(*arguments, started),
        Command::Run(arguments) => {
            // Comes back only if it cannot be done.
            say(&format!("ring3: {}", run::run(&arguments)));
            status::BAD_INPUT
        }
        Command::Mitigations(arguments) => {
            let written = io::stdout().write_all(mitigations::show(&arguments).as_bytes());
            if written.is_ok() { status::SUCCESS } else { status::INTERNAL_ERROR }
        }
        Command::Doctor { program } => {
            let (report, well) = doctor::examine(program.as_deref());
            let written = io::stdout().write_all(report.as_bytes());
            if well && written.is_ok() { status::SUCCESS } else { status::NOT_WELL }
        }
    })
}

/// Logs go to stderr, filtered by [`LOG_VARIABLE`].
fn start_logging() {
    let wanted = std::env::var(LOG_VARIABLE).unwrap_or_else(|_| DEFAULT_LOG.into());
    let filter = EnvFilter::try_new(&wanted).unwrap_or_else(|error| {
        say(&format!("ring3: {LOG_VARIABLE}={wanted} is no log filter ({error}); using {DEFAULT_LOG}"));
        EnvFilter::new(DEFAULT_LOG)
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
}

/// Says something on stderr. Where that cannot be said there is nobody to tell it to.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Boots a machine and gives the exit status.
fn boot(arguments: BootArguments, started: Instant) -> u8 {
    let with_statistics = arguments.stats;
    let lost = arguments.cpu.lost();
    if !lost.is_empty() {
        let names: Vec<String> = lost.iter().map(|lost| lost.feature.to_string()).collect();
        tracing::info!("the CPU model {} goes without {}", arguments.cpu.name(), names.join(" "));
    }
    // A guest whose memory fails ends with a report.
    hypervisor::memory::catch_absence();
    let result = Machine::new(arguments.into_config(started)).and_then(Machine::run);
    match result {
        Ok(report) => {
            if with_statistics {
                say(format!("ring3 statistics\n{}", report.statistics).trim_end());
            }
            explain(&report);
            status::of_outcome(&report.outcome)
        }
        Err(error) => {
            say(&format!("ring3: {error}"));
            if error.is_bad_input() { status::BAD_INPUT } else { failed_to_start(&error) }
        }
    }
}

fn failed_to_start(error: &StartError) -> u8 {
    tracing::debug!("{error:?}");
    status::INTERNAL_ERROR
}

/// Tells on stderr of an end that the guest did not ask for.
fn explain(report: &Report) {
    match &report.outcome {
        Outcome::PowerOff => tracing::info!("the guest powered off"),
        Outcome::Reset => tracing::info!("the guest asked for a reset"),
        Outcome::DebugExit(value) => tracing::info!("the guest wrote {value:#x} to the exit port"),
        Outcome::Host(end) => tracing::info!("ended from outside: {end:?}"),
        Outcome::TripleFault { cpu, registers } => {
            say(&format!("ring3: triple fault on vCPU {cpu}\n{registers}"));
        }
        Outcome::InternalError { cpu, reason, registers } => {
            say(format!("ring3: internal error on vCPU {cpu}: {reason}\n{registers}").trim_end());
        }
    }
}
