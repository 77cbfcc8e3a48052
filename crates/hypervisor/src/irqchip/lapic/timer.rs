//! The APIC timer (SDM vol. 3A, 11.5.4): one-shot, periodic and TSC-deadline, on a clock in nanoseconds.

use super::registers::{LVT_TIMER_PERIODIC, LVT_TIMER_TSC_DEADLINE};

/// The shortest period that a guest gets (KVM's `min_timer_period_us`).
const MIN_PERIOD_NS: u64 = 200_000;

/// LVT timer bits 18:17.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mode {
    #[default]
    OneShot,
    Periodic,
    TscDeadline,
    /// Both bits set: a reserved mode, in which nothing counts.
    Reserved,
}

impl Mode {
    pub(super) fn from_lvt(lvt: u32) -> Self {
        match (lvt & LVT_TIMER_PERIODIC != 0, lvt & LVT_TIMER_TSC_DEADLINE != 0) {
            (false, false) => Self::OneShot,
            (true, false) => Self::Periodic,
            (false, true) => Self::TscDeadline,
            (true, true) => Self::Reserved,
        }
    }

    fn counts(self) -> bool {
        matches!(self, Self::OneShot | Self::Periodic)
    }
}

/// The counter, told as the time of its next zero.
#[derive(Clone, Debug)]
pub(super) struct ApicTimer {
    mode: Mode,
    /// The divide configuration, decoded: 1 to 128.
    divide: u32,
    /// Nanoseconds per tick before the divider.
    bus_cycle_ns: u64,
    /// From initial count to zero; zero while the counter stands still.
    period: u64,
    /// The time of the next or last zero.
    target: u64,
    /// IA32_TSC_DEADLINE.
    tsc_deadline: u64,
    /// When the host's timer has to fire.
    armed: Option<u64>,
}

impl ApicTimer {
    pub(super) fn new(bus_cycle_ns: u64) -> Self {
        Self {
            mode: Mode::OneShot,
            divide: 2,
            bus_cycle_ns,
            period: 0,
            target: 0,
            tsc_deadline: 0,
            armed: None,
        }
    }

    pub(super) fn mode(&self) -> Mode {
        self.mode
    }

    pub(super) fn armed(&self) -> Option<u64> {
        self.armed
    }

    pub(super) fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// Stops the counter, as a reset does.
    pub(super) fn stop(&mut self) {
        self.armed = None;
        self.period = 0;
        self.target = 0;
        self.tsc_deadline = 0;
    }

    /// Takes over the mode of the LVT entry. True if the counter was cleared because the mode went to or from
    /// TSC-deadline.
    pub(super) fn set_mode(&mut self, mode: Mode) -> bool {
        if mode == self.mode {
            return false;
        }
        let clear = (mode == Mode::TscDeadline) != (self.mode == Mode::TscDeadline);
        if clear {
            self.stop();
        }
        self.mode = mode;
        self.limit_period();
        clear
    }

    /// Decodes the divide configuration register, bits 3 and 1:0. With `rescale` the time that is left changes with it.
    pub(super) fn set_divide(&mut self, register: u32, initial: u32, rescale: Option<u64>) {
        let old = self.divide;
        let code = (register & 3 | (register & 8) >> 1) + 1;
        self.divide = 1 << (code & 7);
        let Some(now) = rescale.filter(|_| self.divide != old && self.period != 0) else { return };
        self.period = self.duration(initial);
        self.limit_period();
        if self.armed.is_some() {
            let left =
                u128::from(self.target.saturating_sub(now)) * u128::from(self.divide) / u128::from(old);
            self.target = now.saturating_add(u64::try_from(left).unwrap_or(u64::MAX));
            self.armed = Some(self.target);
        }
    }

    /// A write of the initial count: the counter starts, or stops if it is zero.
    pub(super) fn start(&mut self, initial: u32, now: u64) {
        self.armed = None;
        self.period = self.duration(initial);
        self.limit_period();
        if self.period != 0 && self.mode.counts() {
            self.target = now.saturating_add(self.period);
            self.armed = Some(self.target);
        }
    }

    /// Starts with a current count from a saved image. A one-shot that had run out fires at once, because its
    /// interrupt may not have been in the image yet; a count beyond the initial one is taken for the initial one.
    pub(super) fn resume(&mut self, initial: u32, current: u32, now: u64) {
        if self.mode == Mode::TscDeadline {
            return;
        }
        self.start(initial, now);
        if self.armed.is_none() {
            return;
        }
        let left = match self.duration(current) {
            0 if self.mode == Mode::Periodic => self.period,
            left => left.min(self.period),
        };
        self.target = now.saturating_add(left);
        self.armed = Some(self.target);
    }

    /// A write of IA32_TSC_DEADLINE; `expiry` is the host time at which the TSC gets there, `None` disarms.
    pub(super) fn set_tsc_deadline(&mut self, deadline: u64, expiry: Option<u64>) {
        self.tsc_deadline = deadline;
        self.armed = expiry;
    }

    /// The current count (SDM: the count goes down from the initial one; zero in TSC-deadline mode).
    pub(super) fn current_count(&self, now: u64) -> u32 {
        if self.period == 0 || !self.mode.counts() {
            return 0;
        }
        let left = self.target.saturating_sub(now) % self.period;
        (left / self.tick()) as u32
    }

    /// The host's timer has fired at `now`: true if the counter has really reached zero.
    pub(super) fn expired(&mut self, now: u64) -> bool {
        if self.armed.is_none_or(|deadline| deadline > now) {
            return false;
        }
        self.armed = None;
        if self.mode == Mode::Periodic && self.period != 0 {
            // Missed periods are not made up for: only one interrupt can be pending anyway.
            self.target = self.target.saturating_add(self.period).max(now);
            self.armed = Some(self.target);
        } else {
            self.tsc_deadline = 0;
        }
        true
    }

    fn tick(&self) -> u64 {
        self.bus_cycle_ns.saturating_mul(u64::from(self.divide)).max(1)
    }

    fn duration(&self, count: u32) -> u64 {
        u64::from(count).saturating_mul(self.tick())
    }

    fn limit_period(&mut self) {
        if self.mode == Mode::Periodic && self.period != 0 {
            self.period = self.period.max(MIN_PERIOD_NS);
        }
    }
}
