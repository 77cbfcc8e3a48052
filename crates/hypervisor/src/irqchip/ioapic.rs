//! The IOAPIC: an 82093AA with 24 pins, as KVM has it in `ioapic.c`.
//!
//! There is no EOI register (version 0x11): ends of interrupts come from the local APICs' broadcasts. The polarity
//! bits are kept and change nothing.
//!
//! Lock order: the IOAPIC's lock is taken first, before the bus's list and the local APICs. It is released while
//! listeners hear of an EOI, because they may raise and lower lines.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_bindings::kvm_ioapic_state;

use super::IrqSource;
use super::bus::{ApicBus, Delivery, DeliveryMode, Message, Shorthand};
use super::image;
use super::lapic::{Eoi, Lapic};
use crate::routing::{Chip, IOAPIC_PINS, Routing};
use crate::timer::{TimeSource, Timer, TimerClient, Timers};

/// Where the registers are.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
const LENGTH: u64 = 0x100;

const REGISTER_SELECT: u64 = 0x00;
const REGISTER_WINDOW: u64 = 0x10;

const INDEX_ID: u32 = 0;
const INDEX_VERSION: u32 = 1;
const INDEX_ARBITRATION: u32 = 2;
const INDEX_REDIRECTION: u32 = 0x10;

const VERSION: u32 = 0x11 | (IOAPIC_PINS as u32 - 1) << 16;

const ENTRY_LOGICAL: u64 = 1 << 11;
const ENTRY_DELIVERY_STATUS: u64 = 1 << 12;
const ENTRY_REMOTE_IRR: u64 = 1 << 14;
const ENTRY_LEVEL: u64 = 1 << 15;
const ENTRY_MASKED: u64 = 1 << 16;
const ENTRY_READ_ONLY: u64 = ENTRY_DELIVERY_STATUS | ENTRY_REMOTE_IRR;

/// The pin of the real-time clock, whose unacknowledged interrupts userspace is told of.
const RTC_PIN: usize = 8;

/// So many deliveries right after an EOI are taken for a storm, and the next one is put off, so that a guest that
/// does not handle the interrupt still makes progress.
const STORM: u32 = 10_000;
const STORM_DELAY_NS: u64 = 10_000_000;

/// The IOAPIC.
pub struct IoApic {
    state: Mutex<State>,
    /// The vectors whose EOI matters here. Written under the lock.
    handled: [AtomicU64; 4],
    bus: Arc<ApicBus>,
    routing: Arc<Routing>,
    timer: Timer,
    clock: Arc<dyn TimeSource>,
}

struct State {
    base: u64,
    select: u32,
    id: u32,
    /// Lines that are high, or were when they could not be delivered.
    irr: u32,
    /// Edges of `irr` that have been delivered: they are not part of the image.
    irr_delivered: u32,
    redirection: [u64; IOAPIC_PINS],
    /// For each pin the sources that drive it high.
    lines: [u64; IOAPIC_PINS],
    /// Deliveries right after an EOI, for each pin.
    successive: [u32; IOAPIC_PINS],
    /// Local APIC and vector of RTC interrupts without EOI.
    rtc_unacknowledged: Vec<(u32, u8)>,
}

impl State {
    fn new() -> Self {
        Self {
            base: IOAPIC_BASE,
            select: 0,
            id: 0,
            irr: 0,
            irr_delivered: 0,
            redirection: [ENTRY_MASKED; IOAPIC_PINS],
            lines: [0; IOAPIC_PINS],
            successive: [0; IOAPIC_PINS],
            rtc_unacknowledged: Vec::new(),
        }
    }

    fn read(&self) -> u32 {
        match self.select {
            INDEX_ID | INDEX_ARBITRATION => (self.id & 0xf) << 24,
            INDEX_VERSION => VERSION,
            select => {
                let entry = entry_index(select).map_or(u64::MAX, |pin| self.redirection[pin]);
                if select & 1 != 0 { (entry >> 32) as u32 } else { entry as u32 }
            }
        }
    }

    fn has(&self, pin: usize, bits: u64) -> bool {
        self.redirection[pin] & bits != 0
    }

    fn raised(&self, pin: usize) -> bool {
        self.irr & 1 << pin != 0
    }

    fn message(&self, pin: usize) -> Message {
        let entry = self.redirection[pin];
        Message {
            vector: entry as u8,
            mode: DeliveryMode::from_bits(entry as u32 >> 8),
            logical: entry & ENTRY_LOGICAL != 0,
            level: entry & ENTRY_LEVEL != 0,
            assert: true,
            shorthand: Shorthand::None,
            destination: (entry >> 56) as u32,
            redirection_hint: false,
        }
    }
}

/// The pin whose redirection entry the index register selects.
fn entry_index(select: u32) -> Option<usize> {
    let index = (select.wrapping_sub(INDEX_REDIRECTION) >> 1) as usize;
    (index < IOAPIC_PINS).then_some(index)
}

impl IoApic {
    pub(crate) fn new(bus: Arc<ApicBus>, routing: Arc<Routing>, timers: &Timers) -> Arc<Self> {
        Arc::new_cyclic(|me: &Weak<Self>| Self {
            state: Mutex::new(State::new()),
            handled: Default::default(),
            bus,
            routing,
            timer: timers.register(Weak::clone(me) as Weak<dyn TimerClient>),
            clock: Arc::clone(timers.clock()),
        })
    }

    /// Back to the state after power-on; the lines stay as they are driven.
    pub fn reset(&self) {
        let mut state = self.lock();
        *state = State { lines: state.lines, ..State::new() };
        self.timer.disarm();
        self.note_handled(&state);
    }

    // ---- lines

    /// Drives a pin for `source`. `line_status`: userspace asks what became of it, which matters for the RTC.
    pub fn set_irq(&self, pin: usize, source: IrqSource, level: bool, line_status: bool) -> Delivery {
        let mut state = self.lock();
        let Some(line) = state.lines.get_mut(pin) else { return Delivery::Ignored };
        let level = source.drive(line, level);
        self.set_line(&mut state, pin, level, line_status)
    }

    fn set_line(&self, state: &mut State, pin: usize, level: bool, line_status: bool) -> Delivery {
        let bit = 1 << pin;
        if !level {
            state.irr &= !bit;
            return Delivery::Delivered(1);
        }
        if pin == RTC_PIN && line_status && !state.rtc_unacknowledged.is_empty() {
            return Delivery::Coalesced;
        }
        let was_raised = state.raised(pin);
        state.irr |= bit;
        if !state.has(pin, ENTRY_LEVEL) {
            state.irr_delivered &= !bit;
            if was_raised {
                return Delivery::Coalesced;
            }
        }
        self.service(state, pin, line_status)
    }

    /// Sends the interrupt of a pin, unless it is masked or waits for its EOI.
    fn service(&self, state: &mut State, pin: usize, line_status: bool) -> Delivery {
        let level = state.has(pin, ENTRY_LEVEL);
        if state.has(pin, ENTRY_MASKED) || (level && state.has(pin, ENTRY_REMOTE_IRR)) {
            return Delivery::Ignored;
        }
        if !level {
            state.irr_delivered |= 1 << pin;
        }
        let message = state.message(pin);
        let delivery = if pin == RTC_PIN && line_status {
            let waiting = &mut state.rtc_unacknowledged;
            self.bus.deliver_each(None, &message, |lapic| waiting.push((lapic.id(), message.vector)))
        } else {
            self.bus.deliver(None, &message)
        };
        if level && delivery != Delivery::Coalesced {
            state.redirection[pin] |= ENTRY_REMOTE_IRR;
        }
        delivery
    }

    /// A local APIC has ended an interrupt.
    pub(crate) fn end_of_interrupt(&self, lapic: &Lapic, eoi: Eoi) {
        if !self.handles(eoi.vector) {
            return;
        }
        let pins: Vec<usize> = {
            let mut state = self.lock();
            let this = (lapic.id(), eoi.vector);
            state.rtc_unacknowledged.retain(|&waiting| waiting != this);
            (0..IOAPIC_PINS).filter(|&pin| state.redirection[pin] as u8 == eoi.vector).collect()
        };
        for &pin in &pins {
            self.routing.acknowledged(Chip::IoApic, pin);
        }
        if !eoi.level || eoi.suppressed {
            return;
        }
        let mut state = self.lock();
        for pin in pins {
            if state.has(pin, ENTRY_LEVEL) && state.redirection[pin] as u8 == eoi.vector {
                self.end_level(&mut state, pin);
            }
        }
    }

    fn end_level(&self, state: &mut State, pin: usize) {
        state.redirection[pin] &= !ENTRY_REMOTE_IRR;
        if state.has(pin, ENTRY_MASKED) || !state.raised(pin) {
            state.successive[pin] = 0;
            return;
        }
        state.successive[pin] += 1;
        if state.successive[pin] < STORM {
            self.service(state, pin, false);
        } else {
            state.successive[pin] = 0;
            self.timer.arm(self.clock.now() + STORM_DELAY_NS);
        }
    }

    /// Whether the EOI of `vector` matters here: a level pin has it, or one with a listener, or the RTC's.
    pub fn handles(&self, vector: u8) -> bool {
        self.handled[usize::from(vector >> 6)].load(Ordering::Acquire) >> (vector & 63) & 1 != 0
    }

    fn note_handled(&self, state: &State) {
        let mut handled = [0u64; 4];
        for pin in 0..IOAPIC_PINS {
            let listened = || self.routing.has_listener(Chip::IoApic, pin);
            if state.has(pin, ENTRY_LEVEL) || pin == RTC_PIN || listened() {
                let vector = state.redirection[pin] as u8;
                handled[usize::from(vector >> 6)] |= 1 << (vector & 63);
            }
        }
        for (place, bits) in self.handled.iter().zip(handled) {
            place.store(bits, Ordering::Release);
        }
    }

    /// The listeners or the routing have changed.
    pub(crate) fn listeners_changed(&self) {
        self.note_handled(&self.lock());
    }

    // ---- registers

    /// A read of guest-physical memory; false if it is not the IOAPIC's.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) -> bool {
        let state = self.lock();
        let Some(offset) = offset_in(state.base, address) else { return false };
        let value = match offset {
            REGISTER_SELECT => state.select,
            REGISTER_WINDOW => state.read(),
            _ => 0,
        };
        let value = if matches!(data.len(), 1 | 2 | 4 | 8) { u64::from(value) } else { 0 };
        let bytes = value.to_le_bytes().into_iter().chain(std::iter::repeat(0));
        data.iter_mut().zip(bytes).for_each(|(place, byte)| *place = byte);
        true
    }

    /// A write to guest-physical memory; false if it is not the IOAPIC's.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> bool {
        let mut state = self.lock();
        let Some(offset) = offset_in(state.base, address) else { return false };
        let value = match *data {
            [a] => u32::from(a),
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] | [a, b, c, d, _, _, _, _] => u32::from_le_bytes([a, b, c, d]),
            _ => return true,
        };
        match offset {
            REGISTER_SELECT => state.select = value & 0xff,
            REGISTER_WINDOW => {
                let mask_change = self.write_selected(&mut state, value);
                drop(state);
                if let Some((pin, masked)) = mask_change {
                    self.routing.mask_changed(Chip::IoApic, pin, masked);
                }
            }
            _ => {}
        }
        true
    }

    /// Writes the selected register; tells the pin that was masked or unmasked by it.
    fn write_selected(&self, state: &mut State, value: u32) -> Option<(usize, bool)> {
        match state.select {
            INDEX_ID => state.id = value >> 24 & 0xf,
            INDEX_VERSION | INDEX_ARBITRATION => {}
            select => return self.write_redirection(state, entry_index(select)?, select & 1 != 0, value),
        }
        None
    }

    fn write_redirection(
        &self,
        state: &mut State,
        pin: usize,
        high: bool,
        value: u32,
    ) -> Option<(usize, bool)> {
        let old = state.redirection[pin];
        let mut new = if high {
            old & 0xffff_ffff | u64::from(value) << 32
        } else {
            old & !0xffff_ffff | u64::from(value)
        };
        new = new & !ENTRY_READ_ONLY | old & ENTRY_READ_ONLY;
        if new & ENTRY_LEVEL == 0 {
            // Linux and Xen make an entry edge-triggered for a moment to end its interrupt without an EOI register.
            new &= !ENTRY_REMOTE_IRR;
        }
        state.redirection[pin] = new;
        self.note_handled(state);
        let waits = new & (ENTRY_LEVEL | ENTRY_MASKED | ENTRY_REMOTE_IRR) == ENTRY_LEVEL && state.raised(pin);
        if waits {
            // The line may have gone low while the pin was masked. Whoever can look again is asked to; if nobody can,
            // one interrupt too many is better than one too few.
            if self.routing.resample(Chip::IoApic, pin) {
                state.irr &= !(1 << pin);
            } else {
                self.service(state, pin, false);
            }
        }
        ((old ^ new) & ENTRY_MASKED != 0).then_some((pin, new & ENTRY_MASKED != 0))
    }

    // ---- KVM_GET_IRQCHIP, KVM_SET_IRQCHIP

    /// The image of the registers.
    pub fn state(&self) -> kvm_ioapic_state {
        let state = self.lock();
        let mut image = kvm_ioapic_state {
            base_address: state.base,
            ioregsel: state.select,
            id: state.id,
            irr: state.irr & !state.irr_delivered,
            ..Default::default()
        };
        for (place, &entry) in image.redirtbl.iter_mut().zip(&state.redirection) {
            place.bits = entry;
        }
        image
    }

    /// Takes over an image and delivers what is pending in it.
    pub fn set_state(&self, image: &kvm_ioapic_state) {
        let mut state = self.lock();
        state.base = image.base_address;
        state.select = image.ioregsel;
        state.id = image.id;
        state.irr = 0;
        state.irr_delivered = 0;
        state.redirection = image::redirection(image);
        state.rtc_unacknowledged.clear();
        self.note_handled(&state);
        for pin in (0..IOAPIC_PINS).filter(|&pin| image.irr & 1 << pin != 0) {
            self.set_line(&mut state, pin, true, true);
        }
        let rtc = state.message(RTC_PIN);
        let waiting = self.bus.targets(&rtc, |lapic| lapic.awaits_eoi(rtc.vector));
        state.rtc_unacknowledged = waiting.into_iter().map(|id| (id, rtc.vector)).collect();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The offset of `address` in the 256 bytes of registers at `base`.
fn offset_in(base: u64, address: u64) -> Option<u64> {
    address.checked_sub(base).filter(|&offset| offset < LENGTH).map(|_| address & 0xff)
}

impl TimerClient for IoApic {
    /// The delivery that was put off in a storm.
    fn timer_expired(&self) {
        let mut state = self.lock();
        for pin in 0..IOAPIC_PINS {
            if state.has(pin, ENTRY_LEVEL) && state.raised(pin) && !state.has(pin, ENTRY_REMOTE_IRR) {
                self.service(&mut state, pin, false);
            }
        }
    }
}
