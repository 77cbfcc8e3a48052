//! QEMU as a KVM client: Debian's unmodified `qemu-system-x86_64 -accel kvm` under `ring3 run`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use xtask::guest::{alarms, ring3};
use xtask::{Error, guest_dir, packages};

/// Kernel command line. QEMU 7.2 does not know the newer bits of IA32_ARCH_CAPABILITIES, so its guests take the processor
/// for a vulnerable one. Debian's 6.12 then warns of its own ITS mitigation (`set_memory_rw` of a page that is
/// executable, in arch/x86/kernel/alternative.c) and of RETBleed, which would hide warnings that are of our making.
pub const APPEND: &str = "console=ttyS0 panic=-1 mitigations=off";

/// How long anything may take before it counts as hung; far more than any machine needs.
const HUNG: Duration = Duration::from_secs(600);

/// A QEMU that runs.
pub struct Qemu {
    child: Child,
    input: ChildStdin,
    console: Arc<Mutex<Vec<u8>>>,
    errors: Arc<Mutex<Vec<u8>>>,
    monitor: Option<BufReader<UnixStream>>,
    socket: PathBuf,
}

/// Collects a pipe in the background.
fn collect(from: Option<impl Read + Send + 'static>) -> Arc<Mutex<Vec<u8>>> {
    let text = Arc::new(Mutex::new(Vec::new()));
    let into = text.clone();
    std::thread::spawn(move || {
        let (Some(mut from), mut chunk) = (from, [0; 4096]) else { return };
        while let Ok(read @ 1..) = from.read(&mut chunk) {
            into.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&chunk[..read]);
        }
    });
    text
}

fn text_of(bytes: &Mutex<Vec<u8>>) -> String {
    String::from_utf8_lossy(&bytes.lock().unwrap_or_else(PoisonError::into_inner)).replace('\r', "")
}

impl Qemu {
    /// Starts QEMU with `machine` (`-M`), `cpu` (`-cpu`) and more arguments. Its first serial port is the console.
    pub fn start(name: &str, machine: &str, cpu: &str, arguments: &[&str]) -> Result<Qemu, Error> {
        Qemu::start_with(name, "kvm", machine, cpu, arguments)
    }

    /// The same with options of the accelerator (`-accel`).
    pub fn start_with(
        name: &str,
        accel: &str,
        machine: &str,
        cpu: &str,
        arguments: &[&str],
    ) -> Result<Qemu, Error> {
        Qemu::start_on(Command::new(ring3()).arg("run"), name, accel, machine, cpu, arguments)
    }

    /// The same by a `ring3 run` that has its options and environment.
    pub fn start_on(
        command: &mut Command,
        name: &str,
        accel: &str,
        machine: &str,
        cpu: &str,
        arguments: &[&str],
    ) -> Result<Qemu, Error> {
        packages::require(&[("qemu-system-x86_64", "qemu-system-x86")])?;
        std::fs::create_dir_all(guest_dir()).map_err(|e| Error::Guest(e.to_string()))?;
        let socket = std::env::temp_dir().join(format!("ring3-{name}-{}.qmp", std::process::id()));
        let _ = std::fs::remove_file(&socket);
        command.args(["--", "qemu-system-x86_64", "-accel", accel, "-M", machine, "-cpu", cpu]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display())).args(arguments);
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|e| Error::Guest(format!("{command:?}: {e}")))?;
        let (console, errors) = (collect(child.stdout.take()), collect(child.stderr.take()));
        let input = child.stdin.take().ok_or_else(|| Error::Guest("no pipe to QEMU".into()))?;
        Ok(Qemu { child, input, console, errors, monitor: None, socket })
    }

    /// What is on the console so far.
    pub fn console(&self) -> String {
        text_of(&self.console)
    }

    /// What QEMU has written to stderr so far.
    pub fn errors(&self) -> String {
        text_of(&self.errors)
    }

    /// Waits until stderr has `text`.
    pub fn wait_for_error(&mut self, text: &str) -> Result<(), Error> {
        let started = Instant::now();
        while !self.errors().contains(text) {
            if started.elapsed() > HUNG || matches!(self.child.try_wait(), Ok(Some(_))) {
                return Err(self.failed(&format!("QEMU did not say {text:?}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn failed(&self, what: &str) -> Error {
        let console = self.console();
        let tail: Vec<&str> = console.lines().rev().take(40).collect();
        let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
        Error::Guest(format!("{what}\nstderr:\n{}\nconsole:\n{tail}", text_of(&self.errors)))
    }

    /// Waits until the console has `text`, `times` times.
    pub fn wait_for(&mut self, text: &str, times: usize) -> Result<(), Error> {
        let started = Instant::now();
        while self.console().matches(text).count() < times {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.failed(&format!("QEMU ended ({status}) before the guest said {text:?}")));
            }
            if started.elapsed() > HUNG {
                return Err(self.failed(&format!("the guest did not say {text:?}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Waits for QEMU to end with status 0.
    pub fn wait(&mut self) -> Result<(), Error> {
        let started = Instant::now();
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(self.failed(&format!("QEMU ended: {status}"))),
                Ok(None) if started.elapsed() < HUNG => std::thread::sleep(Duration::from_millis(20)),
                Ok(None) => return Err(self.failed("QEMU hung")),
                Err(e) => return Err(Error::Guest(e.to_string())),
            }
        }
    }

    /// Types on the console.
    pub fn say(&mut self, text: &str) -> Result<(), Error> {
        let written = self.input.write_all(text.as_bytes()).and_then(|()| self.input.flush());
        written.map_err(|e| self.failed(&format!("typing: {e}")))
    }

    fn line(&mut self) -> Result<String, Error> {
        let mut line = String::new();
        let read = self.monitor.as_mut().map(|monitor| monitor.read_line(&mut line));
        match read {
            Some(Ok(1..)) => Ok(line),
            other => Err(self.failed(&format!("the monitor: {other:?}"))),
        }
    }

    fn connect(&mut self) -> Result<(), Error> {
        let started = Instant::now();
        let stream = loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => break stream,
                Err(_) if started.elapsed() < HUNG => std::thread::sleep(Duration::from_millis(20)),
                Err(e) => return Err(self.failed(&format!("the monitor's socket: {e}"))),
            }
        };
        stream.set_read_timeout(Some(HUNG)).map_err(|e| Error::Guest(e.to_string()))?;
        self.monitor = Some(BufReader::new(stream));
        self.line()?;
        self.command(r#"{"execute":"qmp_capabilities"}"#).map(|_| ())
    }

    /// Makes a QMP request and gives the line of its answer; events are passed over.
    pub fn command(&mut self, request: &str) -> Result<String, Error> {
        if self.monitor.is_none() {
            self.connect()?;
        }
        // In one piece: QEMU takes a request for whole at its last brace, and may be gone (`quit`) before a second write.
        let line = format!("{request}\n");
        let sent = self.monitor.as_mut().map(|monitor| monitor.get_mut().write_all(line.as_bytes()));
        if !matches!(sent, Some(Ok(()))) {
            return Err(self.failed(&format!("the monitor does not take {request}")));
        }
        loop {
            let line = self.line()?;
            if line.contains("\"error\"") {
                return Err(self.failed(&format!("{request}: {line}")));
            }
            if line.contains("\"return\"") {
                return Ok(line);
            }
        }
    }

    /// A command of the human monitor; an answer that is not empty is a complaint.
    pub fn human(&mut self, command: &str) -> Result<(), Error> {
        let request =
            format!(r#"{{"execute":"human-monitor-command","arguments":{{"command-line":"{command}"}}}}"#);
        let answer = self.command(&request)?;
        if answer.contains(r#""return": """#) { Ok(()) } else { Err(self.failed(&answer)) }
    }

    /// Repeats `request` until its answer has `text`.
    pub fn until(&mut self, request: &str, text: &str) -> Result<(), Error> {
        let started = Instant::now();
        loop {
            let answer = self.command(request)?;
            if answer.contains(text) {
                return Ok(());
            }
            if started.elapsed() > HUNG || answer.contains("\"failed\"") {
                return Err(self.failed(&format!("{request}: {answer}")));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Fails if the console has a line that no healthy guest prints.
    pub fn healthy(&self) {
        let console = self.console();
        assert_eq!(alarms(&console), Vec::<&str>::new(), "console:\n{console}");
    }

    /// The number of a thread or process that tools may look at.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// A name in the temporary directory that no other test uses.
pub fn scratch(name: &str) -> PathBuf {
    guest_dir().join(format!("{name}-{}", std::process::id()))
}

/// The path as an argument.
pub fn text(path: &Path) -> String {
    path.display().to_string()
}
