//! `cargo xtask bench`: ring3 against QEMU's TCG, the same kernel and the same program as the guest's init, in
//! interleaved runs on this machine.
//!
//! What is compared is CPU time of the whole process (user and system), because this may be a shared machine:
//! between the BEGIN and END lines of each workload, and from process start to the guest's init.
#![expect(unsafe_code, reason = "a child's CPU clock is read with clock_gettime")]

mod async_pf;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use xtask::cpio::Archive;
use xtask::guest::Boot;
use xtask::packages::Kernel;
use xtask::{Error, at, guest_dir, packages};

/// Options of `cargo xtask bench`.
#[derive(Args)]
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
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Subject {
    /// Guests: ring3's interpreter against QEMU's TCG.
    Guests,
    /// The way from KVM_RUN to an exit and back, by a client through the KVM API.
    Exits,
    /// What a guest that makes split locks all the time does to its neighbour, by mode of the host.
    SplitLocks,
    /// What a guest whose event window never opens takes from another one on the same processor.
    Notify,
    /// AMX: a guest's products against the host's vector instructions, and what hosts pay to keep tiles.
    Amx,
    /// What a guest's task gets done beside one that waits for pages, with asynchronous page faults and without.
    AsyncPf,
}

/// Kernel command line of all runs.
const APPEND: &str = "console=ttyS0 quiet nokaslr panic=-1";

/// A mapping larger than this is the guest's memory.
const LARGE_KIB: u64 = 200 * 1024;

/// CPU seconds by phase ("boot" and the workloads), with checksums, of one run.
#[derive(Clone, Debug, Default)]
struct Run {
    phases: BTreeMap<String, f64>,
    order: Vec<String>,
    checks: BTreeMap<String, String>,
    resident_mib: (u64, u64),
}

pub(crate) fn run(options: &Options) -> Result<(), Error> {
    match options.subject {
        Subject::Guests => guests(options),
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

fn guests(options: &Options) -> Result<(), Error> {
    packages::require(&[
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("cc", "gcc"),
        ("/usr/lib/x86_64-linux-gnu/libm.a", "libc6-dev"),
    ])?;
    xtask::run(Command::new("cargo").args(["build", "--release", "--package", "ring3"]))?;
    let kernel = packages::kernel(&options.kernel)?;
    let initrd = build_initrd()?;
    let mut runs: [Vec<Run>; 2] = [Vec::new(), Vec::new()];
    let bar = ProgressBar::new(u64::from(options.runs) * 2).with_style(
        ProgressStyle::with_template("{elapsed_precise} run {pos} of {len}: {msg}")
            .unwrap_or(ProgressStyle::default_bar()),
    );
    for _ in 0..options.runs {
        for (side, command) in [qemu(&kernel, &initrd), ring3(&kernel, &initrd)].into_iter().enumerate() {
            bar.set_message(if side == 0 { "QEMU TCG" } else { "ring3" });
            runs[side].push(measure(command)?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let table = report(&kernel, &runs, first_instruction(&guest_dir())?);
    println!("{table}");
    options.output.as_ref().map_or(Ok(()), |path| at(path, std::fs::write(path, &table)))
}

/// The initramfs: the benchmark program as /init.
fn build_initrd() -> Result<PathBuf, Error> {
    let dir = guest_dir();
    at(&dir, std::fs::create_dir_all(&dir))?;
    let program = dir.join("bench-init");
    let source = xtask::root().join("guests/bench/bench.c");
    xtask::run(Command::new("cc").args(["-O2", "-static", "-o"]).arg(&program).arg(source).arg("-lm"))?;
    let mut archive = Archive::new();
    archive.directory("dev").device("dev/console", 5, 1).host_file("init", 0o755, &program)?;
    let initrd = dir.join("bench.cpio");
    at(&initrd, std::fs::write(&initrd, archive.finish()))?;
    Ok(initrd)
}

fn ring3(kernel: &Kernel, initrd: &Path) -> Command {
    let boot = Boot {
        kernel: kernel.image.clone(),
        initrd: Some(initrd.to_path_buf()),
        append: APPEND.into(),
        memory: 512,
        ..Boot::default()
    };
    boot.command()
}

fn qemu(kernel: &Kernel, initrd: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg,thread=single", "-M", "q35", "-cpu", "max", "-m", "512", "-nodefaults"]);
    command.args(["-no-reboot", "-display", "none", "-serial", "stdio", "-append", APPEND]);
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initrd);
    command
}

/// CPU time (user and system, all threads) of a running process, in seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both calls only write to the locals passed; a bad pid gives an error code.
    let read = unsafe {
        libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) == 0
            && libc::clock_gettime(clock, &mut time) == 0
    };
    if read { time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9 } else { 0.0 }
}

fn measure(mut command: Command) -> Result<Run, Error> {
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child: Child = spawned.map_err(|e| Error::Guest(format!("{command:?}: {e}")))?;
    let pid = child.id();
    let mut result = Run::default();
    let mut begun = 0.0;
    let mut done = false;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim().to_string();
            let now = cpu_seconds(pid);
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["INIT"] => result.add("boot to /init", now, ""),
                ["BEGIN", _] => begun = now,
                ["END", name, check] => result.add(name, now - begun, check),
                ["DONE"] => {
                    result.resident_mib = resident_mib(pid);
                    done = true;
                }
                _ => {}
            }
        }
    }
    let status = child.wait().map_err(|e| Error::Guest(e.to_string()))?;
    if done { Ok(result) } else { Err(Error::Guest(format!("{command:?} ended early with {status}"))) }
}

/// Resident MiB of a process: all of it, and what the guest has touched of its memory (the one large mapping).
fn resident_mib(pid: u32) -> (u64, u64) {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let kib = |line: &str, key: &str| -> Option<u64> {
        line.strip_prefix(key)?.split_whitespace().next()?.parse().ok()
    };
    let (mut size, mut all, mut guest) = (0, 0, 0);
    for line in smaps.lines() {
        if let Some(value) = kib(line, "Size:") {
            size = value;
        }
        if let Some(value) = kib(line, "Rss:") {
            all += value;
            guest += if size > LARGE_KIB { value } else { 0 };
        }
    }
    (all / 1024, guest / 1024)
}

impl Run {
    fn add(&mut self, name: &str, seconds: f64, check: &str) {
        self.order.push(name.to_string());
        self.phases.insert(name.to_string(), seconds);
        self.checks.insert(name.to_string(), check.to_string());
    }
}

/// Milliseconds from process start to the exit of a guest whose first instruction writes to the exit port: an
/// upper bound for the time to the first instruction. Median of eleven.
fn first_instruction(dir: &Path) -> Result<f64, Error> {
    let image = dir.join("exit.bin");
    // A multiboot-1 header with addresses, then: mov al, 0; out 0xf4, al; hlt.
    let words: [u32; 8] = [0x1bad_b002, 0x1_0000, 0, 0x10_0000, 0x10_0000, 0x10_0028, 0x10_0028, 0x10_0020];
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    bytes[8..12].copy_from_slice(&0u32.wrapping_sub(0x1bad_b002 + 0x1_0000).to_le_bytes());
    bytes.extend([0xb0, 0x00, 0xe6, 0xf4, 0xf4, 0x90, 0x90, 0x90]);
    at(&image, std::fs::write(&image, bytes))?;
    let boot = Boot { kernel: image, extra: vec!["--exit-port".into()], ..Boot::default() };
    let mut times: Vec<f64> = Vec::new();
    for _ in 0..11 {
        let mut command = boot.command();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let started = Instant::now();
        let status = command.status().map_err(|e| Error::Guest(format!("{command:?}: {e}")))?;
        if status.code() != Some(1) {
            return Err(Error::Guest(format!("the exit-port guest ended with {status}")));
        }
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn report(kernel: &Kernel, runs: &[Vec<Run>; 2], first_ms: f64) -> String {
    let mut out = String::new();
    let count = runs[0].len();
    let _ =
        writeln!(out, "Guest kernel {}, {count} interleaved runs, medians of CPU seconds.\n", kernel.release);
    let _ = writeln!(out, "| work | TCG s | ring3 s | ring3 / TCG | same result |");
    let _ = writeln!(out, "| --- | ---: | ---: | ---: | --- |");
    let names = runs[1].first().map(|r| r.order.clone()).unwrap_or_default();
    for name in &names {
        let of = |side: usize| median(runs[side].iter().filter_map(|r| r.phases.get(name).copied()));
        let (tcg, ours) = (of(0), of(1));
        let same = runs
            .iter()
            .flatten()
            .map(|r| r.checks.get(name))
            .collect::<std::collections::BTreeSet<_>>()
            .len()
            == 1;
        let _ = writeln!(
            out,
            "| {name} | {tcg:.3} | {ours:.3} | {:.2} | {} |",
            ours / tcg,
            if same { "yes" } else { "NO" }
        );
    }
    let simple = median(runs[1].iter().filter_map(|r| r.phases.get("int.simple").copied()));
    let resident = median(runs[1].iter().map(|r| r.resident_mib.0 as f64));
    let touched = median(runs[1].iter().map(|r| r.resident_mib.1 as f64));
    let _ = writeln!(
        out,
        "\nSimple instructions: {:.0} million per second (int.simple: 200 million).",
        200.0 / simple
    );
    let _ = writeln!(
        out,
        "Resident memory at the end: {resident:.0} MiB, of which {touched:.0} MiB are the guest's."
    );
    let _ = writeln!(out, "Process start to the end of a one-instruction guest: {first_ms:.1} ms.");
    out
}
