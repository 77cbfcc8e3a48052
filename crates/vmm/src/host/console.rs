//! Console output: what the guest sends, gathered into lines, so that a boot's output costs a thousand system
//! calls rather than a hundred thousand.
//!
//! A line is written by the thread that ends it. A rest without line end is written a moment later by the event
//! thread, which [`OutputHandle::new`]'s event wakes. A reader who stops reading blocks the guest, as a real
//! serial line with flow control would, but never the machine's end.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::sys::{self, Waiter};
use crate::devices::bus::lock;

/// What a pipe that is ready to write takes without blocking (POSIX: PIPE_BUF).
const CHUNK: usize = 4096;

/// How long to wait for a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patience {
    /// Until there is room, or the machine ends.
    WhileRunning,
    /// At most so long, whether the machine runs or not.
    AtMost(Duration),
}

/// A target with its unwritten bytes.
struct Output {
    target: File,
    waiting: Vec<u8>,
    /// The target failed; output is dropped.
    broken: bool,
    stop: EventFd,
}

impl Output {
    fn push(&mut self, bytes: &[u8]) -> bool {
        let was_empty = self.waiting.is_empty();
        if !self.broken {
            self.waiting.extend_from_slice(bytes);
        }
        was_empty && !self.waiting.is_empty()
    }

    /// Whether there is room for a write that does not block.
    fn ready(&self, patience: Patience) -> io::Result<bool> {
        let mut waiters = vec![Waiter::write(&self.target)];
        let deadline = match patience {
            Patience::WhileRunning => {
                waiters.push(Waiter::read(&self.stop));
                None
            }
            Patience::AtMost(time) => Some(Instant::now() + time),
        };
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            sys::poll(&mut waiters, left)?;
            if waiters.iter().any(|waiter| waiter.ready) || left == Some(Duration::ZERO) {
                return Ok(waiters[0].ready);
            }
        }
    }

    fn flush(&mut self, patience: Patience) {
        let mut done = 0;
        while done < self.waiting.len() {
            let chunk = &self.waiting[done..self.waiting.len().min(done + CHUNK)];
            let result = self.ready(patience).and_then(|ready| {
                if ready { (&self.target).write(chunk) } else { Err(io::ErrorKind::TimedOut.into()) }
            });
            match result {
                Ok(count) => done += count,
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => {}
                    io::ErrorKind::TimedOut => break,
                    _ => {
                        tracing::warn!("console output is lost from here on: {error}");
                        self.broken = true;
                        done = self.waiting.len();
                    }
                },
            }
        }
        self.waiting.drain(..done);
    }
}

/// A console output that devices and the event thread share.
#[derive(Clone)]
pub struct OutputHandle {
    output: Arc<Mutex<Output>>,
    pending: Arc<EventFd>,
}

impl OutputHandle {
    /// Output to `target`. `pending` is signalled when a rest begins to wait; once `stop` is readable, nothing
    /// waits for a reader any more.
    pub fn new(target: File, pending: Arc<EventFd>, stop: &EventFd) -> io::Result<Self> {
        let output = Output { target, waiting: Vec::new(), broken: false, stop: stop.try_clone()? };
        Ok(Self { output: Arc::new(Mutex::new(output)), pending })
    }

    /// Writes the waiting rest if that is possible without blocking; says whether nothing is left.
    pub fn try_flush(&self) -> bool {
        let mut output = match self.output.try_lock() {
            Ok(output) => output,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        output.flush(Patience::AtMost(Duration::ZERO));
        output.waiting.is_empty()
    }

    /// Writes everything that is left, after the machine's end; a reader who takes nothing for longer than
    /// `patience` loses it.
    pub fn finish(&self, patience: Duration) {
        lock(&self.output).flush(Patience::AtMost(patience));
    }
}

impl Write for OutputHandle {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = lock(&self.output);
        let begins = output.push(bytes);
        if bytes.contains(&b'\n') || output.waiting.len() >= CHUNK {
            output.flush(Patience::WhileRunning);
        } else if begins {
            self.pending.write(1)?;
        }
        Ok(bytes.len())
    }

    /// Nothing: lines are the unit of writing, whatever a device thinks.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    fn pipe() -> (File, File) {
        let (reader, writer) = io::pipe().unwrap();
        (File::from(OwnedFd::from(reader)), File::from(OwnedFd::from(writer)))
    }

    fn handle(target: File) -> (OutputHandle, Arc<EventFd>, EventFd) {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (pending, stop) = (Arc::new(event()), event());
        (OutputHandle::new(target, pending.clone(), &stop).unwrap(), pending, stop)
    }

    #[test]
    fn lines_are_written_at_once_and_rests_on_request() {
        let (mut reader, writer) = pipe();
        let (mut output, pending, _stop) = handle(writer);
        let mut buffer = [0; 64];
        for byte in b"one\ntw" {
            output.write_all(&[*byte]).unwrap();
        }
        assert_eq!(reader.read(&mut buffer).unwrap(), 4);
        assert!(pending.read().is_ok());
        assert!(output.try_flush());
        assert_eq!(reader.read(&mut buffer).unwrap(), 2);
        assert_eq!(&buffer[..2], b"tw");
    }

    #[test]
    fn a_reader_who_stops_does_not_hold_up_the_end() {
        let (_reader, writer) = pipe();
        let (mut output, _pending, stop) = handle(writer);
        stop.write(1).unwrap();
        for _ in 0..40 {
            output.write_all(&[b'x'; CHUNK]).unwrap();
        }
        assert!(!output.try_flush());
        output.finish(Duration::ZERO);
    }

    #[test]
    fn a_closed_reader_loses_output_and_nothing_else() {
        let (reader, writer) = pipe();
        drop(reader);
        let (mut output, ..) = handle(writer);
        output.write_all(b"line\n").unwrap();
        output.write_all(b"line\n").unwrap();
        assert!(output.try_flush());
    }
}
