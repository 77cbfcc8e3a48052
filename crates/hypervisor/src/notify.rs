//! Notify VM exits (instruction timeout): what a VM has asked for, how long the window is, and what is logged. What is done
//! at an exit is in [`vcpu`](crate::vcpu).
//!
//! The window is what KVM trusts the processor to choose ([`CpuModel::notify_threshold`](silicon::model::CpuModel) is the
//! vendor's part, which users of real processors cannot know); ring3 has its own, in time. docs/features/notify-exit.md.

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{KVM_X86_NOTIFY_VMEXIT_ENABLED, KVM_X86_NOTIFY_VMEXIT_USER};
use silicon::system::window::CRYSTAL_HZ;

use crate::error::Error;
use crate::split_lock::RateLimit;

/// The window of VMs that ask for none, in microseconds of the processor's time: a thousand times what the longest
/// combination of faults takes, a fortieth of a scheduler's tick at 250 Hz.
pub const DEFAULT_WINDOW_US: u32 = 100;
/// The longest window, in microseconds: what the field holds.
pub const LONGEST_WINDOW_US: u32 = (u32::MAX as u64 * 1_000_000 / CRYSTAL_HZ as u64) as u32;
/// The longest that a vCPU without progress is held back for after each exit, in milliseconds.
pub const DEFAULT_THROTTLE_MS: u32 = 2000;
/// What it begins with, in nanoseconds.
pub(crate) const FIRST_PAUSE_NS: u64 = 1_000_000;

/// Microseconds in ticks of the crystal.
pub fn ticks(microseconds: u32) -> u32 {
    let ticks = u64::from(microseconds) * u64::from(CRYSTAL_HZ) / 1_000_000;
    u32::try_from(ticks).unwrap_or(u32::MAX)
}

/// What holds for the vCPUs of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// The processor exits.
    pub enabled: bool,
    /// And the client hears of it.
    pub user: bool,
    /// Ticks of the crystal that come on top of the processor's threshold.
    pub window: u32,
}

impl Setting {
    /// The flags that there are (KVM_X86_NOTIFY_VMEXIT_*).
    pub const FLAGS: u32 = KVM_X86_NOTIFY_VMEXIT_ENABLED | KVM_X86_NOTIFY_VMEXIT_USER;

    /// A VM's, by the module parameter: microseconds, `None` for off.
    pub fn of_parameter(window: Option<u32>) -> Setting {
        Setting { enabled: window.is_some(), user: false, window: window.map_or(0, ticks) }
    }

    /// The argument of KVM_CAP_X86_NOTIFY_VMEXIT: flags below, the window above. EINVAL for flags that do not exist, and for
    /// telling the client of what is not enabled.
    pub fn from_bits(bits: u64) -> Result<Setting, Error> {
        let flags = bits as u32;
        let has = |flag| flags & flag != 0;
        let (enabled, user) = (has(KVM_X86_NOTIFY_VMEXIT_ENABLED), has(KVM_X86_NOTIFY_VMEXIT_USER));
        if flags & !Setting::FLAGS != 0 || user && !enabled {
            return Err(Error::Invalid("flags of the notify VM exit"));
        }
        Ok(Setting { enabled, user, window: (bits >> 32) as u32 })
    }

    /// The same.
    pub fn bits(self) -> u64 {
        u64::from(self.window) << 32 | u64::from(self.flags())
    }

    /// The lower half of the argument.
    pub fn flags(self) -> u32 {
        let flag = |on, flag| if on { flag } else { 0 };
        flag(self.enabled, KVM_X86_NOTIFY_VMEXIT_ENABLED) | flag(self.user, KVM_X86_NOTIFY_VMEXIT_USER)
    }
}

/// How many lines of a VM's go into the log: the kernel's DEFAULT_RATELIMIT_BURST and _INTERVAL.
#[derive(Debug)]
pub(crate) struct LogLimit {
    lines: RateLimit,
    suppressed: AtomicU64,
}

impl Default for LogLimit {
    fn default() -> LogLimit {
        let lines = RateLimit::new(LogLimit::BURST, LogLimit::INTERVAL_NS);
        LogLimit { lines, suppressed: AtomicU64::new(0) }
    }
}

impl LogLimit {
    /// Lines in each [`LogLimit::INTERVAL_NS`].
    pub(crate) const BURST: u32 = 10;
    pub(crate) const INTERVAL_NS: u64 = 5_000_000_000;

    /// Whether a line may be printed `now`, in nanoseconds, and how many were not since the last one.
    pub(crate) fn allows(&self, now: u64) -> Option<u64> {
        if self.lines.take(now).is_err() {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(self.suppressed.swap(0, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_is_stated_in_time() {
        assert_eq!((ticks(DEFAULT_WINDOW_US), ticks(0), ticks(1)), (2500, 0, 25));
        assert_eq!(ticks(u32::MAX), u32::MAX);
        assert!(ticks(LONGEST_WINDOW_US) > u32::MAX - 25 && ticks(LONGEST_WINDOW_US) < u32::MAX);
        assert_eq!(Setting::of_parameter(None), Setting::default());
        let on = Setting { enabled: true, user: false, window: 2500 };
        assert_eq!(Setting::of_parameter(Some(DEFAULT_WINDOW_US)), on);
    }

    #[test]
    fn the_argument_of_the_capability() {
        for bits in [0, 1, 3, 7 << 32 | 3, u64::from(u32::MAX) << 32 | 1] {
            assert_eq!(Setting::from_bits(bits).unwrap().bits(), bits);
        }
        for bits in [2, 4, 5, 1 << 31 | 1] {
            assert_eq!(Setting::from_bits(bits).unwrap_err().errno(), libc::EINVAL, "{bits:#x}");
        }
    }

    #[test]
    fn log_lines_are_bounded_and_the_rest_is_counted() {
        let limit = LogLimit::default();
        let printed = (0..1000).filter(|now| limit.allows(*now).is_some()).count();
        assert_eq!(printed as u32, LogLimit::BURST);
        assert_eq!(limit.allows(LogLimit::INTERVAL_NS), Some(990));
        assert_eq!(limit.allows(LogLimit::INTERVAL_NS), Some(0));
    }
}
