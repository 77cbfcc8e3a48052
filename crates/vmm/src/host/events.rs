//! The event thread: input for the guest, rests of output, signals, and the machine's end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vmm_sys_util::eventfd::EventFd;

use super::console::OutputHandle;
use super::escape::{Command, EscapeParser, HELP};
use super::sys::{self, Waiter};
use crate::devices::serial::SerialInput;

/// How long a rest of output may wait for its line end.
const REST_DELAY: Duration = Duration::from_millis(10);

/// Why the host ends the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostEnd {
    /// Ctrl-A x.
    Quit,
    /// A signal, by its number.
    Signal(i32),
}

/// Signals that end the machine, each with the pipe that its handler writes to. Dropping gives them back their
/// former meaning.
pub struct Signals {
    pipes: Vec<(i32, SigId, UnixStream)>,
}

impl Signals {
    /// Catches SIGINT, SIGTERM and SIGHUP.
    pub fn catch() -> io::Result<Signals> {
        let mut signals = Signals { pipes: Vec::new() };
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let (reader, writer) = UnixStream::pair()?;
            let id = signal_hook::low_level::pipe::register(signal, writer)?;
            signals.pipes.push((signal, id, reader));
        }
        Ok(signals)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (_, id, _) in &self.pipes {
            signal_hook::low_level::unregister(*id);
        }
    }
}

/// Input from the person to the serial port.
pub struct Input {
    /// Where keys come from, until their end.
    pub source: Option<File>,
    /// They are typed: they are looked at for the escape key even while the guest takes none, and what a guest
    /// that takes none is sent beyond [`SerialInput::CAPACITY`] is lost. Input from elsewhere waits instead.
    pub typed: bool,
    /// Where they go.
    pub port: SerialInput,
    /// Signalled when the port has room again.
    pub room: Arc<EventFd>,
}

/// Everything that the event thread looks after.
pub struct EventLoop {
    /// Readable once the machine ends.
    pub stop: EventFd,
    /// Signalled when a rest of output begins to wait.
    pub pending: Arc<EventFd>,
    /// Outputs whose rests are flushed.
    pub outputs: Vec<OutputHandle>,
    /// Signals that end the machine.
    pub signals: Signals,
    /// Input.
    pub input: Option<Input>,
    /// Ends the machine.
    pub end: Box<dyn Fn(HostEnd) + Send>,
}

/// What [`EventLoop::wait`] found.
#[derive(Default)]
struct Ready {
    stop: bool,
    pending: bool,
    room: bool,
    source: bool,
    signal: Option<i32>,
}

impl EventLoop {
    /// Runs until the machine ends.
    pub fn run(mut self) {
        let mut escape = EscapeParser::default();
        let mut flush_at: Option<Instant> = None;
        loop {
            let timeout = flush_at.map(|at| at.saturating_duration_since(Instant::now()));
            let ready = match self.wait(timeout) {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!("cannot wait for events: {error}");
                    return;
                }
            };
            if ready.stop {
                return;
            }
            if let Some(signal) = ready.signal {
                (self.end)(HostEnd::Signal(signal));
            }
            if ready.pending {
                drain(&self.pending);
                flush_at.get_or_insert_with(|| Instant::now() + REST_DELAY);
            }
            if flush_at.is_some_and(|at| at <= Instant::now()) {
                let unfinished = self.outputs.iter().filter(|output| !output.try_flush()).count();
                flush_at = (unfinished != 0).then(|| Instant::now() + REST_DELAY);
            }
            if ready.room
                && let Some(input) = &mut self.input
            {
                drain(&input.room);
                input.port.pump();
            }
            if ready.source {
                self.read_input(&mut escape);
            }
        }
    }

    fn wait(&self, timeout: Option<Duration>) -> io::Result<Ready> {
        let mut waiters = vec![Waiter::read(&self.stop), Waiter::read(&*self.pending)];
        waiters.extend(self.signals.pipes.iter().map(|(_, _, pipe)| Waiter::read(pipe)));
        let first_input = waiters.len();
        if let Some(input) = &self.input {
            waiters.push(Waiter::read(&*input.room));
            if let Some(source) = input.source.as_ref().filter(|_| input.typed || input.port.room() > 0) {
                waiters.push(Waiter::read(source));
            }
        }
        sys::poll(&mut waiters, timeout)?;
        let is_ready = |index: usize| waiters.get(index).is_some_and(|waiter| waiter.ready);
        let signal = self.signals.pipes.iter().enumerate().find(|(i, _)| is_ready(2 + i));
        Ok(Ready {
            stop: is_ready(0),
            pending: is_ready(1),
            signal: signal.map(|(_, (number, ..))| *number),
            room: is_ready(first_input),
            source: is_ready(first_input + 1),
        })
    }

    /// Reads what is typed. The end of input is no error: the guest just gets no more.
    fn read_input(&mut self, escape: &mut EscapeParser) {
        let Some(input) = &mut self.input else { return };
        let Some(source) = &mut input.source else { return };
        let mut buffer = [0; 1024];
        let room = if input.typed { buffer.len() } else { input.port.room().min(buffer.len()) };
        let count = match source.read(&mut buffer[..room]) {
            Ok(count) => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                return;
            }
            Err(error) => {
                tracing::debug!("console input ends: {error}");
                0
            }
        };
        if count == 0 {
            // Bytes that wait for room still go to the guest.
            input.source = None;
            return;
        }
        let mut guest = Vec::with_capacity(count);
        let command = escape.feed(&buffer[..count], &mut guest);
        guest.truncate(input.port.room());
        input.port.push(&guest);
        match command {
            Some(Command::Quit) => (self.end)(HostEnd::Quit),
            Some(Command::Help) => {
                let _ = io::stderr().write_all(HELP.as_bytes());
            }
            None => {}
        }
    }
}

/// Takes back an event's signal.
fn drain(event: &EventFd) {
    // An event that is not signalled has nothing to take back.
    let _ = event.read();
}
