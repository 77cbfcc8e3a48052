//! `cargo xtask bench`: ring3 against QEMU's TCG and against no guest at all, and figures of single features, in
//! interleaved runs on this machine.

mod async_pf;
mod guests;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;

use clap::{Args, ValueEnum};
use xtask::{Error, at};

/// Options of `cargo xtask bench`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// What to measure.
    #[arg(value_enum, default_value_t = Subject::Guests)]
    subject: Subject,
    /// Interleaved runs of each.
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Kernel series: 6.12 or 6.1.
    #[arg(long, default_value = "6.12")]
    kernel: String,
    /// Write the tables to this file as Markdown as well.
    #[arg(long)]
    output: Option<PathBuf>,
    #[command(flatten)]
    guests: guests::Options,
}

const EXAMPLES: &str = "\
Examples:
  Everything, five to ten minutes, with a picture:
    cargo xtask bench --output bench.md --plot .

  Two groups, once, at a tenth of the work:
    cargo xtask bench --bench 'int.*,branch.*' --runs 1 --scale 100

  Only TCG in two settings against ring3, without memory:
    cargo xtask bench --with tcg,tcg-tuned,ring3 --bench 'all,-mem.*,-smp.*'

  Two processors:
    cargo xtask bench --smp

  Another subject:
    cargo xtask bench exits";

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Subject {
    /// Workloads in guests: ring3, QEMU's TCG and no guest at all.
    Guests,
    /// The way from KVM_RUN to an exit and back, by a client through the KVM API.
    Exits,
    /// From a signal to KVM_RUN's return, for guests in loops of several kinds.
    Notice,
    /// What a guest that makes split locks all the time does to its neighbour, by mode of the host.
    SplitLocks,
    /// What a guest whose event window never opens takes from another one on the same processor.
    Notify,
    /// AMX: a guest's products against the host's vector instructions, and what hosts pay to keep tiles.
    Amx,
    /// What a guest's task gets done beside one that waits for pages, with asynchronous page faults and without.
    AsyncPf,
}

pub(crate) fn run(options: &Options) -> Result<(), Error> {
    match options.subject {
        Subject::Guests => guests::run(options),
        Subject::Exits => {
            let title = |name: &str| match name {
                "port" => "port write, KVM_RUN to KVM_RUN, ns",
                "mmio" => "MMIO write, KVM_RUN to KVM_RUN, ns",
                "cpuid" => "CPUID, inside KVM_RUN, ns",
                "wake" => "irqfd to the halted guest's handler, ns",
                "kick" => "signal to KVM_RUN's return from an endless loop, ns",
                _ => "?",
            };
            client(options, "exits", 0, title)
        }
        Subject::Notice => client(options, "notice", 1, |loops| match loops {
            "a-host" => "no guest: to the signal's handler, us, median",
            "a-host-99" => "the same, 99 of 100",
            "jump" => "a jump to itself, us, median",
            "jump-99" => "the same, 99 of 100",
            "count" => "a loop of one instruction, us, median",
            "count-99" => "the same, 99 of 100",
            "calls" => "calls and returns, us, median",
            "calls-99" => "the same, 99 of 100",
            "stores" => "stores to ever other pages, us, median",
            "stores-99" => "the same, 99 of 100",
            "copies" => "REP MOVSB of 256 KiB, us, median",
            "copies-99" => "the same, 99 of 100",
            "divisions" => "divisions, us, median",
            "divisions-99" => "the same, 99 of 100",
            "sines" => "FSIN, us, median",
            "sines-99" => "the same, 99 of 100",
            "fences" => "MFENCE, us, median",
            "fences-99" => "the same, 99 of 100",
            "locked" => "locked additions, us, median",
            "locked-99" => "the same, 99 of 100",
            _ => "?",
        }),
        Subject::Notify => {
            let title = |name: &str| match name {
                "kept" => "what another guest on the same processor keeps of its speed, %",
                "share" => "the loop's share of the processor, %",
                "kill" => "signal to KVM_RUN's return from the loop, us, median",
                "kill-longest" => "the same, us, longest of 100",
                _ => "?",
            };
            client(options, "notify_loop", 2, title)
        }
        Subject::SplitLocks => split_locks(options),
        Subject::Amx => amx(options),
        Subject::AsyncPf => async_pf::run(options),
    }
}

/// Runs a measuring client of the end-to-end tests under `ring3 run` and prints the medians over the runs.
fn client(
    options: &Options,
    name: &str,
    decimals: usize,
    title: fn(&str) -> &'static str,
) -> Result<(), Error> {
    let packages = ["--package", "ring3", "--package", "preload", "--package", "e2e"];
    xtask::run(Command::new("cargo").args(["build", "--release"]).args(packages).current_dir(xtask::root()))?;
    let release = xtask::target_dir().join("release");
    let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for _ in 0..options.runs {
        let mut command = Command::new(release.join("ring3"));
        let text = xtask::run(command.args(["run", "--"]).arg(release.join(name)))?;
        for (name, value) in text.lines().filter_map(|line| line.split_once(' ')) {
            values.entry(name.to_string()).or_default().extend(value.parse::<f64>().ok());
        }
    }
    let mut table = format!("| {name} | median of {} |\n| --- | ---: |\n", options.runs);
    for (name, mut values) in values {
        values.sort_by(f64::total_cmp);
        let _ = writeln!(table, "| {} | {:.decimals$} |", title(&name), values[values.len() / 2]);
    }
    println!("{table}");
    options.output.as_ref().map_or(Ok(()), |path| at(path, std::fs::write(path, &table)))
}

/// Modes of the host that the split locks are measured under.
const SPLIT_LOCK_HOSTS: &[&str] = &[
    "split_lock_detect=off",
    "split_lock_detect=warn",
    "split_lock_detect=warn kernel.split_lock_mitigate=0",
    "split_lock_detect=fatal",
    "split_lock_detect=ratelimit:100",
    "split_lock_detect=fatal ring3.split_lock_policy=emulate",
];

/// Runs the two-VM client of the end-to-end tests under each mode, interleaved, and prints the medians over the runs.
fn split_locks(options: &Options) -> Result<(), Error> {
    let packages = ["--package", "ring3", "--package", "preload", "--package", "e2e"];
    xtask::run(Command::new("cargo").args(["build", "--release"]).args(packages).current_dir(xtask::root()))?;
    let release = xtask::target_dir().join("release");
    let mut figures = vec![(Vec::new(), Vec::new()); SPLIT_LOCK_HOSTS.len()];
    for _ in 0..options.runs {
        for (host, (speeds, locks)) in SPLIT_LOCK_HOSTS.iter().zip(&mut figures) {
            let mut command = Command::new(release.join("ring3"));
            command.args(["run", "--log", "error", "--host", host, "--"]).arg(release.join("splitters"));
            let text = xtask::run(&mut command)?;
            let mut numbers = text.split_whitespace().filter_map(|word| word.parse::<f64>().ok());
            speeds.extend(numbers.next());
            locks.extend(numbers.next());
        }
    }
    let mut table = String::from(
        "| host | neighbour's speed, of that alone | split locks a second |\n| --- | ---: | ---: |\n",
    );
    for (host, (speeds, locks)) in SPLIT_LOCK_HOSTS.iter().zip(figures) {
        let (speed, locks) = (median(speeds.into_iter()), median(locks.into_iter()));
        let _ = writeln!(table, "| `{host}` | {speed:.2} | {locks:.0} |");
    }
    let _ = writeln!(table, "\n{}", lock_detection()?.trim_end());
    println!("{table}");
    options.output.as_ref().map_or(Ok(()), |path| at(path, std::fs::write(path, &table)))
}

/// What detection costs locked accesses that are not split, in interleaved runs: a line of text.
fn lock_detection() -> Result<String, Error> {
    let example =
        ["run", "--release", "--quiet", "--package", "silicon", "--example", "mips", "lock-detection"];
    xtask::run(Command::new("cargo").args(example).current_dir(xtask::root()))
}

/// Runs the two programs that measure AMX.
fn amx(options: &Options) -> Result<(), Error> {
    let mut text = String::new();
    for (package, example) in [("silicon", "tmul"), ("hypervisor", "xfd_options")] {
        let arguments = ["run", "--release", "--quiet", "--package", package, "--example", example];
        text += &xtask::run(Command::new("cargo").args(arguments).current_dir(xtask::root()))?;
        text.push('\n');
    }
    println!("{text}");
    options.output.as_ref().map_or(Ok(()), |path| at(path, std::fs::write(path, &text)))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
