//! The little of GDB's remote protocol that the debugging tests need.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use xtask::Error;

/// A connection to a stub.
pub struct Gdb(UnixStream);

fn failed(what: &str, error: impl std::fmt::Debug) -> Error {
    Error::Guest(format!("gdb stub: {what}: {error:?}"))
}

impl Gdb {
    /// Connects to the stub's socket as soon as it is there.
    pub fn connect(socket: &Path) -> Result<Gdb, Error> {
        let started = Instant::now();
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => {
                    stream
                        .set_read_timeout(Some(Duration::from_secs(300)))
                        .map_err(|e| failed("socket", e))?;
                    return Ok(Gdb(stream));
                }
                Err(_) if started.elapsed() < Duration::from_secs(60) => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(e) => return Err(failed("connecting", e)),
            }
        }
    }

    /// Sends a packet and gives the answer's contents.
    pub fn ask(&mut self, packet: &str) -> Result<String, Error> {
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        write!(self.0, "${packet}#{sum:02x}").map_err(|e| failed(packet, e))?;
        self.answer(packet)
    }

    fn byte(&mut self, asked: &str) -> Result<u8, Error> {
        let mut byte = [0];
        self.0.read_exact(&mut byte).map_err(|e| failed(asked, e))?;
        Ok(byte[0])
    }

    fn answer(&mut self, asked: &str) -> Result<String, Error> {
        while self.byte(asked)? != b'$' {}
        let mut text = String::new();
        loop {
            match self.byte(asked)? {
                b'#' => break,
                byte => text.push(char::from(byte)),
            }
        }
        let _checksum = [self.byte(asked)?, self.byte(asked)?];
        self.0.write_all(b"+").map_err(|e| failed(asked, e))?;
        Ok(text)
    }

    /// Sends a packet whose answer has to be `OK`.
    pub fn done(&mut self, packet: &str) -> Result<(), Error> {
        let answer = self.ask(packet)?;
        if answer == "OK" { Ok(()) } else { Err(failed(packet, answer)) }
    }

    /// General register `number` of the x86-64 (or, in 16-bit code, still 64-bit) register file: RAX is 0, RIP 16.
    pub fn register(&mut self, number: usize) -> Result<u64, Error> {
        let all = self.ask("g")?;
        let hex = all.get(number * 16..number * 16 + 16).ok_or_else(|| failed("registers", &all))?;
        let value = u64::from_str_radix(hex, 16).map_err(|e| failed(hex, e))?;
        Ok(value.swap_bytes())
    }
}
