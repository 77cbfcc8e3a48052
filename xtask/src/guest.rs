//! Runs `ring3 boot` and collects what the guest's console says.
#![expect(unsafe_code, reason = "kill(2) of a process group")]

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::{Error, target_dir};

/// How long a guest may take before it counts as hung. Far above what the slowest machine needs.
const HUNG: Duration = Duration::from_secs(900);

/// Console lines that no healthy boot prints.
const ALARMS: &[&str] = &[
    "BUG:",
    "WARNING:",
    "Oops",
    "Kernel panic",
    "unchecked MSR access",
    "clocksource unstable",
    "rcu_preempt detected stalls",
    "soft lockup",
    "Call Trace:",
    "segfault at",
    "general protection",
];

/// A guest to boot.
#[derive(Clone, Debug, Default)]
pub struct Boot {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub append: String,
    /// Megabytes of memory; 0 for the command's default.
    pub memory: u32,
    /// vCPUs; 0 for the command's default.
    pub cpus: u32,
    /// Disk images, as `--disk` takes them.
    pub disks: Vec<String>,
    /// More arguments.
    pub extra: Vec<String>,
    /// More environment variables.
    pub environment: Vec<(&'static str, &'static str)>,
}

/// What a guest left behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Everything on the console, carriage returns removed.
    pub console: String,
    /// Everything on stderr.
    pub stderr: String,
    /// Exit status; `None` if a signal ended it.
    pub status: Option<i32>,
}

impl Boot {
    /// The command line.
    pub fn command(&self) -> Command {
        let mut command = Command::new(ring3());
        command.arg("boot").arg("--kernel").arg(&self.kernel).envs(self.environment.iter().copied());
        if let Some(initrd) = &self.initrd {
            command.arg("--initrd").arg(initrd);
        }
        if !self.append.is_empty() {
            command.arg("--append").arg(&self.append);
        }
        if self.memory != 0 {
            command.arg("--memory").arg(format!("{}M", self.memory));
        }
        if self.cpus != 0 {
            command.arg("--cpus").arg(self.cpus.to_string());
        }
        for disk in &self.disks {
            command.arg("--disk").arg(disk);
        }
        command.args(&self.extra);
        command
    }

    /// Boots the guest and waits for its end.
    pub fn run(&self) -> Result<Outcome, Error> {
        let mut command = self.command();
        let started = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = started.map_err(|e| Error::Guest(format!("{command:?}: {e}")))?;
        let console = reader(child.stdout.take());
        let stderr = reader(child.stderr.take());
        let status = wait(&mut child, HUNG)?;
        let text = |thread: std::thread::JoinHandle<String>| thread.join().unwrap_or_default();
        let (console, stderr) = (text(console).replace('\r', ""), text(stderr));
        let Some(status) = status else {
            let tail: Vec<&str> = console.lines().rev().take(40).collect();
            let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
            let seconds = HUNG.as_secs();
            return Err(Error::Guest(format!("the guest hung for {seconds} s\n{stderr}\nconsole:\n{tail}")));
        };
        Ok(Outcome { console, stderr, status: status.code() })
    }
}

/// The command under test, beside the running program or in the release directory.
pub fn ring3() -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|exe| {
        let dir = exe.parent()?;
        [dir.join("ring3"), dir.parent()?.join("ring3")].into_iter().find(|p| p.is_file())
    });
    beside.unwrap_or_else(|| target_dir().join("release/ring3"))
}

fn reader(from: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            let _ = from.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Runs a command for at most `limit`: `None` if it had to be killed then. Whatever it has started and left behind is
/// killed as well.
pub fn within(command: &mut Command, limit: Duration) -> Result<Option<ExitStatus>, Error> {
    let mut child =
        command.process_group(0).spawn().map_err(|e| Error::Guest(format!("{command:?}: {e}")))?;
    let status = wait(&mut child, limit);
    // SAFETY: no memory is involved; the group is the child's own.
    unsafe { libc::kill(-(child.id() as libc::pid_t), libc::SIGKILL) };
    status
}

fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>, Error> {
    let started = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(Some(status)),
            Ok(None) if started.elapsed() < limit => std::thread::sleep(Duration::from_millis(20)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Ok(None);
            }
            Err(e) => return Err(Error::Guest(e.to_string())),
        }
    }
}

/// Console lines that a healthy guest does not print.
pub fn alarms(console: &str) -> Vec<&str> {
    console.lines().filter(|line| ALARMS.iter().any(|alarm| line.contains(alarm))).collect()
}

/// What a console has between the lines `BEGIN name` and `END name`.
pub fn section<'a>(console: &'a str, name: &str) -> Option<&'a str> {
    let (begin, end) = (format!("BEGIN {name}\n"), format!("END {name}\n"));
    let from = console.find(&begin)? + begin.len();
    let len = console[from..].find(&end)?;
    Some(&console[from..from + len])
}

impl Outcome {
    /// Console lines that a healthy guest does not print.
    pub fn alarms(&self) -> Vec<&str> {
        alarms(&self.console)
    }

    /// What the guest printed between the lines `BEGIN name` and `END name`.
    pub fn section(&self, name: &str) -> Option<&str> {
        section(&self.console, name)
    }
}
