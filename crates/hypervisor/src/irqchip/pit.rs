//! The 8254 programmable interval timer and the speaker port, as KVM has them in `i8254.c`.
//!
//! Channel 0 drives GSI 0 through the VM's timers. Ticks that the guest has not acknowledged yet are counted and
//! made up for ("reinject"), unless userspace has switched that off. As in KVM, BCD counting and the null-count bit
//! of the status do not exist, and a low gate does not stop a counter.
//!
//! Lock order: the PIT's lock is taken before the timers'. It is not held while the line is driven.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_bindings::{
    KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_FLAGS_SPEAKER_DATA_ON, kvm_pit_channel_state, kvm_pit_state,
    kvm_pit_state2,
};

use crate::routing::LineListener;
use crate::timer::{TimeSource, Timer, TimerClient, Timers};

/// Counts per second.
pub const PIT_HZ: u64 = 1_193_181;
/// The GSI of channel 0.
pub const PIT_GSI: u32 = 0;

const NS_PER_SECOND: u64 = 1_000_000_000;
/// The shortest period that a guest gets (KVM's `min_timer_period_us`).
const MIN_PERIOD_NS: u64 = 200_000;
const PORT_BASE: u16 = 0x40;
const PORT_SPEAKER: u16 = 0x61;
/// The mode of a channel that has not been programmed, and of channel 0 while the HPET has its interrupt.
const MODE_NONE: u8 = 0xff;

/// How a count is read and written: by its low byte (1), its high byte, or both in turn.
const HIGH: u8 = 2;
const BOTH_LOW: u8 = 3;
const BOTH_HIGH: u8 = 4;

/// The other side of channel 0's output.
pub(crate) trait PitOutput: Send + Sync {
    /// One pulse on the interrupt line. Called without a lock.
    fn tick(&self);
}

/// The PIT.
pub struct Pit {
    state: Mutex<State>,
    /// Ticks wait for the guest's acknowledgement and are made up for.
    reinject: AtomicBool,
    /// Ticks that the guest has not seen yet.
    pending: AtomicU32,
    /// The guest has acknowledged the last tick.
    acknowledged: AtomicBool,
    /// Port 0x61 is ours (`KVM_PIT_SPEAKER_DUMMY`).
    has_speaker: bool,
    timer: Timer,
    clock: Arc<dyn TimeSource>,
    output: Weak<dyn PitOutput>,
}

struct State {
    channels: [kvm_pit_channel_state; 3],
    flags: u32,
    /// Channel 0: from load to zero, in nanoseconds; zero before the first load.
    period: u64,
    periodic: bool,
    /// Channel 0: the time of the next or last zero.
    deadline: u64,
}

impl State {
    /// Counts since a channel was loaded; for channel 0 since its last reload.
    fn elapsed(&self, index: usize, now: u64) -> u64 {
        let nanoseconds = if index == 0 {
            if self.period == 0 {
                return 0;
            }
            (self.period + now).saturating_sub(self.deadline)
        } else {
            now.saturating_sub(self.channels[index].count_load_time as u64)
        };
        (u128::from(nanoseconds) * u128::from(PIT_HZ) / u128::from(NS_PER_SECOND)) as u64
    }

    /// The present count (8254 data sheet, "Mode Definitions").
    fn count(&self, index: usize, now: u64) -> u16 {
        let channel = &self.channels[index];
        let initial = initial_count(channel);
        let elapsed = self.elapsed(index, now);
        let count = match channel.mode {
            0 | 1 | 4 | 5 => initial.wrapping_sub(elapsed),
            3 => initial - elapsed.wrapping_mul(2) % initial,
            _ => initial - elapsed % initial,
        };
        count as u16
    }

    /// The level of a channel's output.
    fn out(&self, index: usize, now: u64) -> bool {
        let channel = &self.channels[index];
        let initial = initial_count(channel);
        let elapsed = self.elapsed(index, now);
        match channel.mode {
            1 => elapsed < initial,
            2 => elapsed != 0 && elapsed.is_multiple_of(initial),
            3 => elapsed % initial < initial.div_ceil(2),
            4 | 5 => elapsed == initial,
            _ => elapsed >= initial,
        }
    }

    /// The gate input: in the triggered modes a rising edge starts the count anew.
    fn set_gate(&mut self, index: usize, gate: bool, now: u64) {
        let channel = &mut self.channels[index];
        if matches!(channel.mode, 1 | 2 | 3 | 5) && channel.gate == 0 && gate {
            channel.count_load_time = now as i64;
        }
        channel.gate = u8::from(gate);
    }

    fn latch_count(&mut self, index: usize, now: u64) {
        if self.channels[index].count_latched == 0 {
            let count = self.count(index, now);
            let channel = &mut self.channels[index];
            channel.latched_count = count;
            channel.count_latched = channel.rw_mode;
        }
    }

    fn latch_status(&mut self, index: usize, now: u64) {
        if self.channels[index].status_latched == 0 {
            let out = u8::from(self.out(index, now));
            let channel = &mut self.channels[index];
            channel.status = out << 7 | channel.rw_mode << 4 | channel.mode << 1 | channel.bcd;
            channel.status_latched = 1;
        }
    }

    /// The control word at port 0x43.
    fn write_control(&mut self, value: u8, now: u64) {
        let index = usize::from(value >> 6);
        if index == 3 {
            // Read-back: the bits that are zero say what is latched.
            for channel in (0..3).filter(|channel| value & 2 << channel != 0) {
                if value & 0x20 == 0 {
                    self.latch_count(channel, now);
                }
                if value & 0x10 == 0 {
                    self.latch_status(channel, now);
                }
            }
            return;
        }
        let access = value >> 4 & 3;
        if access == 0 {
            self.latch_count(index, now);
            return;
        }
        let mode = value >> 1 & 7;
        let channel = &mut self.channels[index];
        channel.rw_mode = access;
        channel.read_state = access;
        channel.write_state = access;
        channel.mode = if mode > 5 { mode - 4 } else { mode };
        channel.bcd = value & 1;
    }

    /// A write of a count; gives the whole count once it is there.
    fn write_count(&mut self, index: usize, value: u8) -> Option<u32> {
        let channel = &mut self.channels[index];
        let value = u32::from(value);
        match channel.write_state {
            HIGH => Some(value << 8),
            BOTH_LOW => {
                channel.write_latch = value as u8;
                channel.write_state = BOTH_HIGH;
                None
            }
            BOTH_HIGH => {
                channel.write_state = BOTH_LOW;
                Some(u32::from(channel.write_latch) | value << 8)
            }
            _ => Some(value),
        }
    }

    fn read(&mut self, index: usize, now: u64) -> u8 {
        let count = self.count(index, now);
        let channel = &mut self.channels[index];
        if channel.status_latched != 0 {
            channel.status_latched = 0;
            return channel.status;
        }
        let [low, high] = channel.latched_count.to_le_bytes();
        match std::mem::take(&mut channel.count_latched) {
            0 => {}
            HIGH => return high,
            BOTH_LOW => {
                channel.count_latched = HIGH;
                return low;
            }
            _ => return low,
        }
        let [low, high] = count.to_le_bytes();
        match channel.read_state {
            HIGH => high,
            BOTH_LOW => {
                channel.read_state = BOTH_HIGH;
                low
            }
            BOTH_HIGH => {
                channel.read_state = BOTH_LOW;
                high
            }
            _ => low,
        }
    }
}

/// The count that a channel starts from; a programmed zero is the largest.
fn initial_count(channel: &kvm_pit_channel_state) -> u64 {
    match channel.count {
        0 => 0x1_0000,
        count => u64::from(count),
    }
}

impl Pit {
    /// A PIT in its power-on state; `speaker`: port 0x61 belongs to it.
    pub(crate) fn new(speaker: bool, output: Weak<dyn PitOutput>, timers: &Timers) -> Arc<Self> {
        let clock = Arc::clone(timers.clock());
        let pit = Arc::new_cyclic(|me: &Weak<Self>| Self {
            state: Mutex::new(State {
                channels: Default::default(),
                flags: 0,
                period: 0,
                periodic: false,
                deadline: 0,
            }),
            reinject: AtomicBool::new(true),
            pending: AtomicU32::new(0),
            acknowledged: AtomicBool::new(true),
            has_speaker: speaker,
            timer: timers.register(Weak::clone(me) as Weak<dyn TimerClient>),
            clock,
            output,
        });
        pit.reset();
        pit
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.flags = 0;
        for index in 0..3 {
            let channel = &mut state.channels[index];
            *channel =
                kvm_pit_channel_state { mode: MODE_NONE, gate: u8::from(index != 2), ..Default::default() };
            self.load(&mut state, index, 0);
        }
        state.period = 0;
        self.reset_reinject();
    }

    fn load(&self, state: &mut State, index: usize, count: u32) {
        let count = if count == 0 { 0x1_0000 } else { count };
        let now = self.clock.now();
        let channel = &mut state.channels[index];
        channel.count = count;
        if index != 0 {
            channel.count_load_time = now as i64;
            return;
        }
        match channel.mode {
            0 | 1 | 4 => self.start(state, count, false, now),
            2 | 3 => self.start(state, count, true, now),
            _ => self.timer.disarm(),
        }
    }

    fn start(&self, state: &mut State, count: u32, periodic: bool, now: u64) {
        if state.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0 {
            return;
        }
        let interval = (u128::from(count) * u128::from(NS_PER_SECOND) / u128::from(PIT_HZ)) as u64;
        state.period = if periodic { interval.max(MIN_PERIOD_NS) } else { interval };
        state.periodic = periodic;
        state.deadline = now + interval;
        self.reset_reinject();
        self.timer.arm(state.deadline);
    }

    fn reset_reinject(&self) {
        self.pending.store(0, Ordering::SeqCst);
        self.acknowledged.store(true, Ordering::SeqCst);
    }

    /// Whether ticks are made up for.
    pub fn reinject(&self) -> bool {
        self.reinject.load(Ordering::SeqCst)
    }

    /// KVM_REINJECT_CONTROL.
    pub fn set_reinject(&self, reinject: bool) {
        let _state = self.lock();
        if self.reinject.swap(reinject, Ordering::SeqCst) != reinject && reinject {
            self.reset_reinject();
        }
    }

    /// One tick to the guest, unless the last one is still unacknowledged.
    fn tick(&self) {
        if self.reinject() && !self.acknowledged.swap(false, Ordering::SeqCst) {
            return;
        }
        if let Some(output) = self.output.upgrade() {
            output.tick();
        }
    }

    // ---- ports

    /// A port read; `None` if the port is not the PIT's.
    pub fn read(&self, port: u16) -> Option<u32> {
        let now = self.clock.now();
        match port {
            PORT_SPEAKER if self.has_speaker => Some(self.read_speaker(now)),
            0x43 => Some(0),
            0x40..0x43 => Some(u32::from(self.lock().read(usize::from(port - PORT_BASE), now))),
            _ => None,
        }
    }

    /// A port write, of which the low byte counts; false if the port is not the PIT's.
    pub fn write(&self, port: u16, value: u32) -> bool {
        let value = value as u8;
        let now = self.clock.now();
        match port {
            PORT_SPEAKER if self.has_speaker => {
                let mut state = self.lock();
                state.flags &= !KVM_PIT_FLAGS_SPEAKER_DATA_ON;
                if value & 2 != 0 {
                    state.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
                }
                state.set_gate(2, value & 1 != 0, now);
            }
            0x43 => self.lock().write_control(value, now),
            0x40..0x43 => {
                let index = usize::from(port - PORT_BASE);
                let mut state = self.lock();
                if let Some(count) = state.write_count(index, value) {
                    self.load(&mut state, index, count);
                }
            }
            _ => return false,
        }
        true
    }

    /// Port 0x61: gate and output of channel 2, and a refresh signal that toggles about every 15 µs.
    fn read_speaker(&self, now: u64) -> u32 {
        let state = self.lock();
        let data = u32::from(state.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0);
        let gate = u32::from(state.channels[2].gate != 0);
        let out = u32::from(state.out(2, now));
        let refresh = (now >> 14 & 1) as u32;
        gate | data << 1 | refresh << 4 | out << 5
    }

    // ---- KVM_GET_PIT2, KVM_SET_PIT2

    /// The image of the registers.
    pub fn state(&self) -> kvm_pit_state2 {
        let state = self.lock();
        kvm_pit_state2 { channels: state.channels, flags: state.flags, ..Default::default() }
    }

    /// KVM_GET_PIT: without the flags.
    pub fn channels(&self) -> kvm_pit_state {
        kvm_pit_state { channels: self.lock().channels }
    }

    /// Takes over an image; the counters start from their initial counts.
    pub fn set_state(&self, image: &kvm_pit_state2) {
        let mut state = self.lock();
        let was_legacy = state.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0;
        let legacy_starts = !was_legacy && image.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0;
        state.flags = image.flags;
        self.restore(&mut state, &image.channels, legacy_starts);
    }

    /// KVM_SET_PIT: without the flags.
    pub fn set_channels(&self, image: &kvm_pit_state) {
        self.restore(&mut self.lock(), &image.channels, false);
    }

    fn restore(&self, state: &mut State, channels: &[kvm_pit_channel_state; 3], legacy_starts: bool) {
        state.channels = *channels;
        for (index, channel) in channels.iter().enumerate() {
            if legacy_starts && index == 0 {
                state.channels[0].mode = MODE_NONE;
            }
            self.load(state, index, channel.count);
            state.channels[index].mode = channel.mode;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TimerClient for Pit {
    fn timer_expired(&self) {
        {
            let mut state = self.lock();
            // The channel may have been loaded anew meanwhile.
            if state.period == 0 || state.deadline > self.clock.now() {
                return;
            }
            if state.periodic {
                state.deadline += state.period;
                self.timer.arm(state.deadline);
            }
        }
        if self.reinject() {
            self.pending.fetch_add(1, Ordering::SeqCst);
        }
        self.tick();
    }
}

impl LineListener for Pit {
    /// The guest has seen a tick: the next one that waits can follow.
    fn acknowledged(&self, _gsi: u32) {
        if !self.reinject() {
            return;
        }
        self.acknowledged.store(true, Ordering::SeqCst);
        let one_less = |pending: u32| pending.checked_sub(1);
        let before = self.pending.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less);
        if before.is_ok_and(|before| before > 1) {
            self.tick();
        }
    }

    fn mask_changed(&self, _gsi: u32, masked: bool) {
        if self.reinject() && !masked {
            self.reset_reinject();
        }
    }
}
