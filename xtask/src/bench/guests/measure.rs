//! Runs a launcher and takes its CPU time at each line that means something.
#![expect(unsafe_code, reason = "CPU time of children: clock_gettime, wait4")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use xtask::guest::Boot;
use xtask::{Error, at, guest_dir};

use super::protocol::{Line, Run};

/// A guest that says nothing for so long is stuck.
pub(super) const STUCK: Duration = Duration::from_secs(900);
/// How long a guest that has said that it is done may take to end.
const LEAVING: Duration = Duration::from_secs(10);
/// A mapping larger than this is the guest's memory.
const LARGE_KIB: u64 = 200 * 1024;

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

fn not_started(command: &Command, error: &std::io::Error) -> Error {
    Error::Guest(format!("{command:?}: {error}"))
}

/// Runs a guest to its end; `on_line` hears of what it says. What the launcher itself says goes to `log`.
pub(super) fn guest(
    mut command: Command,
    log: &Path,
    silence: Duration,
    on_line: &mut dyn FnMut(Line),
) -> Result<Run, Error> {
    let stderr = at(log, File::create(log))?;
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).spawn();
    let mut child = spawned.map_err(|e| not_started(&command, &e))?;
    let lines = reader(&mut child);
    let mut run = Run::default();
    let mut console = Vec::new();
    let mut done = false;
    let mut silence = silence;
    loop {
        let text = match lines.recv_timeout(silence) {
            Ok(text) => text,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                let _ = child.kill();
                break;
            }
        };
        let cpu = cpu_seconds(child.id());
        if let Some(line) = Line::parse(&text) {
            run.hear(line, cpu);
            if line == Line::Done {
                run.resident = resident_mib(child.id());
                (done, silence) = (true, LEAVING);
            }
            on_line(line);
        }
        console.push(text);
    }
    let status = child.wait().map_err(|e| not_started(&command, &e))?;
    if done {
        return Ok(run);
    }
    let tail = console[console.len().saturating_sub(15)..].join("\n");
    let log = log.display();
    Err(Error::Guest(format!(
        "the guest did not get to its end ({status}): {command:?}\nIts last lines:\n{tail}\nMessages are in {log}"
    )))
}

/// A thread that reads lines, so that one that does not come can be given up.
fn reader(child: &mut Child) -> Receiver<String> {
    let (to, lines) = channel();
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_string();
                if to.send(line).is_err() {
                    return;
                }
            }
        });
    }
    lines
}

/// Runs one workload on the host, as a process of its own: CPU time of all its children, however short they lived, is
/// exact only when it has ended. `overhead` is what a process without a workload takes.
pub(super) fn native(mut command: Command, overhead: f64) -> Result<Run, Error> {
    let (text, cpu) = to_its_end(&mut command)?;
    let mut run = Run::default();
    for line in text.lines().filter_map(Line::parse) {
        run.hear(line, 0.0);
    }
    run.boot = None;
    for figures in run.figures.values_mut() {
        figures.cpu = (cpu - overhead).max(0.0);
    }
    Ok(run)
}

/// CPU seconds of a process that does no work; median of five.
pub(super) fn overhead(command: impl Fn() -> Command) -> Result<f64, Error> {
    let mut times = [0.0; 5];
    for time in &mut times {
        *time = to_its_end(&mut command())?.1;
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// What a program says, and CPU seconds of it and of its children.
fn to_its_end(command: &mut Command) -> Result<(String, f64), Error> {
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn();
    let mut child = spawned.map_err(|e| not_started(command, &e))?;
    let mut text = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_end(&mut text).map_err(|e| not_started(command, &e))?;
    }
    let mut status = 0;
    // SAFETY: a rusage is numbers, for which zeroes are values.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the call only writes to the locals passed; the child is ours, and nobody else waits for it.
    let waited = unsafe { libc::wait4(child.id() as libc::pid_t, &mut status, 0, &mut usage) };
    let text = String::from_utf8_lossy(&text).into_owned();
    if waited < 0 || status != 0 || !text.contains("DONE") {
        return Err(Error::Guest(format!("{command:?} did not get to its end ({status:#x}):\n{text}")));
    }
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
    Ok((text, seconds(usage.ru_utime) + seconds(usage.ru_stime)))
}

/// Resident MiB of a process: all of it, and what the guest has touched of its memory (the one large mapping).
fn resident_mib(pid: u32) -> Option<(u64, u64)> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
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
    (all > 0).then_some((all / 1024, guest / 1024))
}

/// Milliseconds from process start to the exit of a guest whose first instruction writes to the exit port: an
/// upper bound for the time to the first instruction. Median of eleven.
pub(super) fn first_instruction() -> Result<f64, Error> {
    let image = guest_dir().join("exit.bin");
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
        let status = command.status().map_err(|e| not_started(&command, &e))?;
        if status.code() != Some(1) {
            return Err(Error::Guest(format!("the exit-port guest ended with {status}")));
        }
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
