//! Time as the processor sees it. Where it comes from is the machine's choice: the host's clock, or the count
//! of instructions executed, which makes a run repeatable.
#![expect(unsafe_code, reason = "RDTSC is an intrinsic")]

use std::arch::x86_64::{_mm_lfence, _rdtsc};

const NANOSECONDS: u128 = 1_000_000_000;

/// The source of the time-stamp counter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The host's own time-stamp counter.
    Host {
        /// Its frequency, for the conversions to and from nanoseconds.
        hz: u64,
    },
    /// Executed instructions stand for time.
    Virtual {
        /// Ticks per second.
        hz: u64,
        /// Instructions that make a second.
        instructions_per_second: u64,
        /// Time, in nanoseconds, that passed while no instruction was executed.
        skipped: u64,
    },
}

impl Clock {
    /// Ticks per second.
    pub fn hz(&self) -> u64 {
        match self {
            Clock::Host { hz } | Clock::Virtual { hz, .. } => *hz,
        }
    }

    /// Nanoseconds since some fixed moment, on a CPU that has executed `instructions`.
    pub fn nanoseconds(&self, instructions: u64) -> u64 {
        match self {
            Clock::Host { hz } => scale(host_ticks(), NANOSECONDS as u64, *hz),
            Clock::Virtual { instructions_per_second, skipped, .. } => {
                scale(instructions, NANOSECONDS as u64, *instructions_per_second).wrapping_add(*skipped)
            }
        }
    }

    /// The counter's value then.
    pub fn ticks(&self, instructions: u64) -> u64 {
        match self {
            Clock::Host { .. } => host_ticks(),
            Clock::Virtual { .. } => self.ticks_at(self.nanoseconds(instructions)),
        }
    }

    /// The counter's value when the clock reads `nanoseconds`.
    pub fn ticks_at(&self, nanoseconds: u64) -> u64 {
        scale(nanoseconds, self.hz(), NANOSECONDS as u64)
    }

    /// When the counter reads `ticks`, in nanoseconds: not before.
    pub fn nanoseconds_at(&self, ticks: u64) -> u64 {
        let hz = u128::from(self.hz().max(1));
        (u128::from(ticks) * NANOSECONDS).div_ceil(hz).min(u128::from(u64::MAX)) as u64
    }

    /// Lets virtual time pass without instructions (a halted CPU); the host's clock cannot be moved.
    pub fn skip(&mut self, nanoseconds: u64) {
        if let Clock::Virtual { skipped, .. } = self {
            *skipped = skipped.wrapping_add(nanoseconds);
        }
    }
}

impl Default for Clock {
    /// The host's counter; conversions take it to run at 2.1 GHz.
    fn default() -> Clock {
        Clock::Host { hz: 2_100_000_000 }
    }
}

/// The guest's view of a counter at `ticks` (SDM vol. 3C, 26.5.3: "use TSC scaling"): a 16.48 fixed-point
/// `multiplier`, then the offset.
pub fn guest_tsc(ticks: u64, multiplier: u64, offset: u64) -> u64 {
    ((u128::from(ticks) * u128::from(multiplier)) >> 48).wrapping_add(u128::from(offset)) as u64
}

/// The host's time-stamp counter now. The fence keeps it from being read ahead of what the guest has loaded before: it is
/// nearer to those loads on the guest's processor than here, and CPUs that compare their counters through memory would
/// see them go back.
pub fn host_ticks() -> u64 {
    // SAFETY: RDTSC has no preconditions: Linux leaves CR4.TSD clear, and with it set we would be sent SIGSEGV. LFENCE is
    // part of x86-64.
    unsafe {
        _mm_lfence();
        _rdtsc()
    }
}

/// `value` × `numerator` / `denominator`, in full width, wrapped to 64 bits.
fn scale(value: u64, numerator: u64, denominator: u64) -> u64 {
    (u128::from(value) * u128::from(numerator) / u128::from(denominator.max(1))) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_time_is_a_function_of_instructions() {
        let mut clock =
            Clock::Virtual { hz: 2_000_000_000, instructions_per_second: 1_000_000_000, skipped: 0 };
        assert_eq!((clock.nanoseconds(5), clock.ticks(5)), (5, 10));
        clock.skip(100);
        assert_eq!((clock.nanoseconds(5), clock.ticks(5)), (105, 210));
    }

    #[test]
    fn host_time_moves_on() {
        let clock = Clock::default();
        let first = clock.ticks(0);
        assert!(clock.ticks(0) >= first);
    }

    #[test]
    fn deadlines_are_not_early() {
        let clock = Clock::Host { hz: 2_099_999_999 };
        for ticks in [0, 1, 2, 1000, 2_099_999_999, 1 << 40] {
            let at = clock.nanoseconds_at(ticks);
            assert!(clock.ticks_at(at) >= ticks, "{ticks}");
            assert!(at == 0 || clock.ticks_at(at - 1) < ticks, "{ticks}");
        }
        assert_eq!(clock.nanoseconds_at(u64::MAX), 8_784_163_848_806_531_174);
    }

    #[test]
    fn scaling_and_offset() {
        assert_eq!(guest_tsc(1000, 1 << 48, 5), 1005);
        assert_eq!(guest_tsc(1000, 1 << 47, 5), 505);
        assert_eq!(guest_tsc(10, 1 << 48, 0u64.wrapping_sub(20)), 0u64.wrapping_sub(10));
    }
}
