//! Raw mode of the person's terminal, undone whatever happens.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use super::sys;

/// A terminal in raw mode: keys go to the guest one by one, without echo and without meaning for the host.
/// Dropping it, also while a panic unwinds, restores the terminal.
pub struct RawMode {
    terminal: File,
    saved: libc::termios,
}

impl RawMode {
    /// Puts `terminal` into raw mode; `None` if it is no terminal.
    pub fn enter(terminal: &File) -> io::Result<Option<RawMode>> {
        if !terminal.is_terminal() {
            return Ok(None);
        }
        let saved = sys::terminal_attributes(terminal.as_fd())?;
        let terminal = terminal.try_clone()?;
        let mut raw = saved;
        // Output processing stays on: what we log on the same terminal still wants its carriage returns.
        raw.c_iflag &= !(libc::IGNBRK
            | libc::BRKINT
            | libc::PARMRK
            | libc::ISTRIP
            | libc::INLCR
            | libc::IGNCR
            | libc::ICRNL
            | libc::IXON);
        raw.c_lflag &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::ISIG | libc::IEXTEN);
        raw.c_cc[libc::VMIN] = 1;
        raw.c_cc[libc::VTIME] = 0;
        sys::set_terminal_attributes(terminal.as_fd(), &raw)?;
        Ok(Some(RawMode { terminal, saved }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Err(error) = sys::set_terminal_attributes(self.terminal.as_fd(), &self.saved) {
            tracing::warn!("cannot restore the terminal: {error}");
        }
    }
}
