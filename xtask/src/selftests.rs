//! `cargo xtask selftests`: the Linux kernel's own KVM tests (tools/testing/selftests/kvm), built from Debian's source
//! package and run under `ring3 run`. What each is expected to give is the table of docs/kvm-selftests.md.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use xtask::{Error, at, guest_dir, packages, root, target_dir};

use crate::verdicts::{self, Outcome, Results, Verdict, conclude};

/// Options of `cargo xtask selftests`.
#[derive(Args)]
pub(crate) struct Options {
    /// Only tests whose name contains one of these.
    only: Vec<String>,
    /// Tests that run at the same time. Some compare what two of their threads see within milliseconds.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Seconds that a test may take (the kernel's own harness gives 120).
    #[arg(long, default_value_t = 600)]
    limit: u64,
    /// Only tests that the table expects to pass, whatever else the machine does: without those that measure time.
    #[arg(long)]
    passing: bool,
    /// Write the results into docs/kvm-selftests.md instead of comparing with it.
    #[arg(long)]
    update: bool,
}

/// Tests that a busy machine fails: the first compares two clocks within 5 % over milliseconds, the second takes it that no
/// thread is put off for 20 ms between a load and a store, the third that so many KVM_RUNs fit between so many migrations.
const TIMED: &[&str] = &["x86_64/apic_bus_clock_test", "dirty_log_test", "rseq_test"];

/// Tests that ask the machine's own CPUID who made its processor, and expect KVM's guests to have the same one. Those of
/// our models have one of Intel's: elsewhere their results mean nothing.
const VENDOR: &[&str] = &["x86_64/fix_hypercall_test", "x86_64/xapic_state_test"];

/// Whether the machine's processor is Intel's.
fn host_is_intel() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("GenuineIntel"))
}

pub(crate) fn run(options: &Options) -> Result<(), Error> {
    let dir = build()?;
    xtask::run(Command::new("cargo").args([
        "build",
        "--release",
        "--package",
        "ring3",
        "--package",
        "preload",
    ]))?;
    let doc = root().join("docs/kvm-selftests.md");
    let expected = verdicts::expected(&doc)?;
    let passes = |name: &String| expected.get(name).is_some_and(|outcome| outcome.verdict == Verdict::Pass);
    let wanted = |name: &String| {
        let named = options.only.is_empty() || options.only.iter().any(|o| name.contains(o.as_str()));
        named && (!options.passing || passes(name) && !TIMED.contains(&name.as_str()))
    };
    let (names, foreign): (Vec<String>, Vec<String>) = (programs(&dir)?.into_iter().filter(wanted))
        .partition(|name| host_is_intel() || !VENDOR.contains(&name.as_str()));
    if !foreign.is_empty() {
        eprintln!(
            "left out, for they expect guests to have this machine's make of processor: {}",
            foreign.join(", ")
        );
    }
    let complete = options.only.is_empty() && !options.passing && foreign.is_empty();
    let results = run_all(&dir, names, options)?;
    conclude(&doc, results, options.update, complete)
}

/// Builds the tests once and gives their directory.
fn build() -> Result<PathBuf, Error> {
    packages::require(&[
        ("cc", "gcc"),
        ("/usr/include/stdio.h", "libc6-dev"),
        ("make", "make"),
        ("xz", "xz-utils"),
    ])?;
    let source = packages::kernel_source()?;
    let dir = source.join("tools/testing/selftests/kvm");
    let done = dir.join(".ring3-built");
    if !done.exists() {
        eprintln!("building the kernel's KVM selftests");
        let headers = format!("KHDR_INCLUDES=-isystem {}", source.join("usr/include").display());
        xtask::run(Command::new("make").args(["-s", "headers"]).env("ARCH", "x86").current_dir(&source))?;
        let mut make = Command::new("make");
        make.args(["-s", "-j2", "-C"]).arg(&dir).arg(&headers).env("ARCH", "x86");
        xtask::run(&mut make)?;
        at(&done, std::fs::write(&done, ""))?;
    }
    Ok(dir)
}

/// The programs that the tests' Makefile lists for this architecture.
fn programs(dir: &Path) -> Result<Vec<String>, Error> {
    let makefile = dir.join("Makefile");
    let text = at(&makefile, std::fs::read_to_string(&makefile))?;
    let names = text.lines().filter_map(|line| {
        let (variable, value) = line.split_once('=')?;
        let variable = variable.trim().trim_end_matches('+').trim();
        matches!(variable, "TEST_GEN_PROGS_x86_64" | "TEST_GEN_PROGS_EXTENDED_x86_64").then(|| value.trim())
    });
    Ok(names.filter(|name| dir.join(name).is_file()).map(str::to_string).collect())
}

fn run_all(dir: &Path, names: Vec<String>, options: &Options) -> Result<Results, Error> {
    let logs = guest_dir().join("selftests");
    at(&logs, std::fs::create_dir_all(&logs))?;
    let style = ProgressStyle::with_template("{elapsed_precise} {pos} of {len}: {msg}");
    let bar = ProgressBar::new(names.len() as u64).with_style(style.unwrap_or(ProgressStyle::default_bar()));
    let (queue, results) = (Mutex::new(names.into_iter()), Mutex::new(Results::new()));
    let next = || queue.lock().ok().and_then(|mut names| names.next());
    let worker = || {
        while let Some(name) = next() {
            bar.set_message(name.clone());
            let outcome = run_one(dir, &name, &logs, Duration::from_secs(options.limit));
            if let Ok(mut results) = results.lock() {
                results.insert(name, outcome);
            }
            bar.inc(1);
        }
    };
    std::thread::scope(|scope| (0..options.jobs.max(1)).for_each(|_| drop(scope.spawn(worker))));
    bar.finish_and_clear();
    Ok(results.into_inner().unwrap_or_default())
}

/// Tests that are about AMX. Where the machine's own CPUID does not describe it, clients get it only if it is asked for.
const AMX: &[&str] = &["x86_64/amx_test", "x86_64/xcr0_cpuid_test"];
/// The processor that they run on.
const AMX_CPU: &str = "sapphire-rapids,+xfd,+amx_tile,+amx_int8,+amx_bf16";

fn run_one(dir: &Path, name: &str, logs: &Path, limit: Duration) -> Outcome {
    let log = logs.join(format!("{}.log", name.replace('/', "-")));
    let (Ok(out), Ok(err)) = (File::create(&log), File::options().append(true).open(&log)) else {
        return Outcome::fail(&format!("{} cannot be written", log.display()));
    };
    let mut command = Command::new(target_dir().join("release/ring3"));
    command.arg("run");
    if AMX.contains(&name) {
        command.args(["--cpu", AMX_CPU]);
    }
    command.arg("--").arg(dir.join(name)).current_dir(dir);
    command.stdin(Stdio::null()).stdout(out).stderr(err);
    let status = xtask::guest::within(&mut command, limit);
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    match status {
        Err(error) => Outcome::fail(&error.to_string()),
        Ok(None) => Outcome::fail(&format!("not done after {} s", limit.as_secs())),
        Ok(Some(status)) => match status.code() {
            Some(0) => Outcome::pass(),
            // KSFT_SKIP
            Some(4) => Outcome::skip(skip_reason(&text)),
            _ => Outcome::fail(&format!("{status}: {}", fail_reason(&text))),
        },
    }
}

/// What a test that skips says of it.
fn skip_reason(log: &str) -> &str {
    let said =
        log.lines().rev().find(|line| line.to_lowercase().contains("skip")).unwrap_or("no reason given");
    let text = said.split_once("SKIP").map_or(said, |(_, reason)| reason);
    text.trim_start_matches([' ', '-', ':'])
}

/// The assertion that failed, or the last line.
fn fail_reason(log: &str) -> &str {
    let said = log.lines().position(|line| line.contains("Test Assertion Failure"));
    said.and_then(|at| log.lines().nth(at + 1)).or_else(|| log.lines().last()).unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_found_in_logs() {
        assert_eq!(
            skip_reason("x\n1..0 # SKIP - Requirement not met: a || b\n"),
            "Requirement not met: a || b"
        );
        assert_eq!(
            fail_reason("==== Test Assertion Failure ====\n  a.c:1: x == y\n  pid=1\n"),
            "a.c:1: x == y"
        );
    }
}
