//! Exit statuses. Ours are even, so that none can be taken for one of a guest (`--exit-port`), which are odd;
//! `ring3 doctor` has no guest and says 1.

use vmm::Outcome;
use vmm::host::events::HostEnd;

/// The guest powered off or rebooted, or the person quit.
pub(crate) const SUCCESS: u8 = 0;
/// `ring3 doctor` has found something that will not work.
pub(crate) const NOT_WELL: u8 = 1;
/// Bad arguments or files.
pub(crate) const BAD_INPUT: u8 = 2;
/// Triple fault.
pub(crate) const TRIPLE_FAULT: u8 = 4;
/// An error of ours or of the host.
pub(crate) const INTERNAL_ERROR: u8 = 6;
/// Ended by a signal: this and its number, as shells have it.
pub(crate) const SIGNAL: u8 = 128;

/// The status for the way in which a machine ended.
pub(crate) fn of_outcome(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::PowerOff | Outcome::Reset | Outcome::Host(HostEnd::Quit) => SUCCESS,
        Outcome::DebugExit(value) => (*value as u8) << 1 | 1,
        Outcome::Host(HostEnd::Signal(number)) => SIGNAL.wrapping_add(*number as u8),
        Outcome::TripleFault { .. } => TRIPLE_FAULT,
        Outcome::InternalError { .. } => INTERNAL_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_as_documented() {
        for (outcome, status) in [
            (Outcome::PowerOff, 0),
            (Outcome::Reset, 0),
            (Outcome::DebugExit(0), 1),
            (Outcome::DebugExit(0x10), 0x21),
            (Outcome::DebugExit(0x1ff), 0xff),
            (Outcome::Host(HostEnd::Signal(15)), 143),
            (Outcome::TripleFault { cpu: 0, registers: String::new() }, 4),
        ] {
            assert_eq!(of_outcome(&outcome), status, "{outcome:?}");
        }
    }
}
