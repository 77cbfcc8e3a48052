//! The console's escape key, Ctrl-A, as in QEMU's `-nographic`.

/// Ctrl-A.
const ESCAPE: u8 = 1;

/// What the help key shows.
pub const HELP: &str =
    "\r\nCtrl-A x  quit\r\nCtrl-A h  this help\r\nCtrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

/// A command typed after the escape key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// End the machine.
    Quit,
    /// Show the keys.
    Help,
}

/// Separates what is typed for us from what is typed for the guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct EscapeParser {
    escaped: bool,
}

impl EscapeParser {
    /// Passes on the guest's bytes by `guest` and gives the first command, after which input is not looked at.
    pub fn feed(&mut self, input: &[u8], guest: &mut Vec<u8>) -> Option<Command> {
        for &byte in input {
            if !std::mem::take(&mut self.escaped) {
                if byte == ESCAPE {
                    self.escaped = true;
                } else {
                    guest.push(byte);
                }
                continue;
            }
            match byte {
                b'x' | b'X' => return Some(Command::Quit),
                b'h' | b'H' | b'?' => return Some(Command::Help),
                ESCAPE | b'a' => guest.push(ESCAPE),
                // Not a command: both bytes are for the guest.
                _ => guest.extend([ESCAPE, byte]),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_separated() {
        for (input, guest, command) in [
            (&b"ls\n"[..], &b"ls\n"[..], None),
            (b"a\x01x", b"a", Some(Command::Quit)),
            (b"\x01hq", b"", Some(Command::Help)),
            (b"\x01\x01x", b"\x01x", None),
            (b"\x01ax", b"\x01x", None),
            (b"\x01bx", b"\x01bx", None),
        ] {
            let mut out = Vec::new();
            assert_eq!(EscapeParser::default().feed(input, &mut out), command);
            assert_eq!(out, guest);
        }
        let (mut parser, mut out) = (EscapeParser::default(), Vec::new());
        assert_eq!(parser.feed(b"\x01", &mut out), None);
        assert_eq!(parser.feed(b"x", &mut out), Some(Command::Quit));
    }
}
