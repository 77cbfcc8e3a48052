//! The local APIC (SDM vol. 3A, chapter 11), as KVM has it in `lapic.c`.
//!
//! [`Lapic`] is shared: its vCPU asks it for interrupts, and any thread delivers to it. The registers are behind one
//! lock, whose holder publishes what others need in atomic words: the vector that can be delivered now (so that the
//! vCPU's question costs one load), the address under which messages find the APIC, and IA32_APIC_BASE. INIT, SIPI,
//! NMI and SMI never touch the registers: they are bits in one more word.
//!
//! As with KVM, no error is ever gathered in the ESR, arbitration priority reads as zero, the ID can be written in xAPIC
//! mode, and interrupts pend while the APIC is software-disabled. Reserved bits of TPR and EOI in x2APIC mode give #GP,
//! as they do where the processor virtualises these registers for KVM.
//!
//! Lock order: a local APIC's lock is taken after the IOAPIC's and the bus's and before the timers'. IPIs and EOIs
//! leave after it is released, so no APIC's lock is ever held while another's is taken.

mod registers;
mod state;
mod timer;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use kvm_bindings::{KVM_X86_QUIRK_LAPIC_MMIO_HOLE, KVM_X86_QUIRK_LINT0_REENABLED, kvm_lapic_state};

use super::bus::{Address, ApicBus, ApicSettings, DeliveryMode, Message};
use crate::timer::{TimeSource, Timer, TimerClient, Timers};
use state::{Effects, State};

/// The first MSR of the x2APIC range; the last is 0x8ff.
pub const X2APIC_MSR_BASE: u32 = 0x800;
/// Bytes of the register page.
pub const LAPIC_PAGE_SIZE: u64 = 0x1000;

/// Why an access to a local APIC is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApicError {
    /// No such register, reserved bits, or an illegal change of mode: #GP(0) for the guest.
    #[error("the local APIC refuses the access")]
    Reserved,
    /// The image's x2APIC ID is not the vCPU's: EINVAL.
    #[error("the APIC ID of the image is not the vCPU's")]
    WrongId,
}

/// What makes a vCPU look at its local APIC.
pub trait Waker: Send + Sync {
    /// Wakes the vCPU if it sleeps, and lets it leave guest mode soon if it runs. Takes no lock under which the vCPU
    /// calls the interrupt controllers.
    fn kick(&self);
}

/// What CPUID and MCG_CAP say about this APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicFeatures {
    /// CPUID.1:ECX.x2APIC.
    pub x2apic: bool,
    /// CPUID.1:ECX.TSC_DEADLINE.
    pub tsc_deadline: bool,
    /// MCG_CAP.MCG_CMCI_P: there is an LVT entry for CMCI.
    pub cmci: bool,
    /// CPUID.80000008H:EAX\[7:0\].
    pub physical_address_bits: u8,
}

impl Default for ApicFeatures {
    fn default() -> Self {
        Self { x2apic: false, tsc_deadline: false, cmci: false, physical_address_bits: 36 }
    }
}

/// The end of an interrupt, as the IOAPIC hears it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Eoi {
    /// The vector that was in service.
    pub vector: u8,
    /// It was accepted as level-triggered.
    pub level: bool,
    /// Software has switched EOI broadcasts off.
    pub suppressed: bool,
}

/// Events that are not interrupts of the IRR, taken or looked at together. INIT comes before SIPI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ApicEvents {
    /// INIT.
    pub init: bool,
    /// Start-up, with the page to start at. It came after any INIT in the same set.
    pub sipi: Option<u8>,
    /// NMIs, at most two.
    pub nmi: u32,
    /// SMI.
    pub smi: bool,
    /// The end of a paravirtual halt.
    pub unhalt: bool,
    /// Split irqchip: the vector to tell userspace of with KVM_EXIT_IOAPIC_EOI.
    pub ioapic_eoi: Option<u8>,
}

const EVENT_INIT: u32 = 1 << 0;
const EVENT_SIPI: u32 = 1 << 1;
const EVENT_SMI: u32 = 1 << 2;
const EVENT_UNHALT: u32 = 1 << 3;
const EVENT_IOAPIC_EOI: u32 = 1 << 4;
const EVENT_SIPI_VECTOR: u32 = 0xff << 8;
const EVENT_NMI_COUNT: u32 = 3 << 16;
const EVENT_EOI_VECTOR: u32 = 0xff << 24;

/// The events that are not to be taken.
fn blocked(init_blocked: bool) -> u32 {
    if init_blocked { EVENT_INIT } else { 0 }
}

impl ApicEvents {
    fn from_bits(bits: u32) -> Self {
        Self {
            init: bits & EVENT_INIT != 0,
            sipi: (bits & EVENT_SIPI != 0).then_some((bits >> 8) as u8),
            nmi: (bits & EVENT_NMI_COUNT) >> 16,
            smi: bits & EVENT_SMI != 0,
            unhalt: bits & EVENT_UNHALT != 0,
            ioapic_eoi: (bits & EVENT_IOAPIC_EOI != 0).then_some((bits >> 24) as u8),
        }
    }
}

/// The local APIC of one vCPU.
pub struct Lapic {
    id: u32,
    state: Mutex<State>,
    /// The vector that can be delivered now; zero for none. Written under the lock.
    deliverable: AtomicU32,
    /// [`Address`]. Written under the lock.
    address: AtomicU64,
    /// IA32_APIC_BASE. Written under the lock.
    base: AtomicU64,
    events: AtomicU32,
    timer: Timer,
    clock: Arc<dyn TimeSource>,
    settings: Arc<ApicSettings>,
    bus: Weak<ApicBus>,
    waker: OnceLock<Arc<dyn Waker>>,
}

impl Lapic {
    /// A local APIC in its reset state, not yet on the bus. `directed_eoi`: the IOAPIC is not ours.
    pub(crate) fn new(
        id: u32,
        bsp: bool,
        directed_eoi: bool,
        bus: &Arc<ApicBus>,
        timers: &Timers,
    ) -> Arc<Self> {
        let settings = Arc::clone(bus.settings());
        let bus_cycle = settings.bus_cycle_ns.load(Ordering::Relaxed).max(1);
        let lapic = Arc::new_cyclic(|me: &Weak<Self>| Self {
            id,
            state: Mutex::new(State::new(id, bsp, directed_eoi, bus_cycle)),
            deliverable: AtomicU32::new(0),
            address: AtomicU64::new(0),
            base: AtomicU64::new(0),
            events: AtomicU32::new(0),
            timer: timers.register(Weak::clone(me) as Weak<dyn TimerClient>),
            clock: Arc::clone(timers.clock()),
            settings,
            bus: Arc::downgrade(bus),
            waker: OnceLock::new(),
        });
        lapic.reset(false);
        lapic
    }

    /// The x2APIC ID, which is the vCPU's.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Connects the vCPU, once. The waker lives as long as this APIC, so it must not hold on to it.
    pub fn set_waker(&self, waker: Arc<dyn Waker>) {
        if self.waker.set(waker).is_err() {
            tracing::warn!(id = self.id, "the local APIC has a waker already");
        }
    }

    /// What the vCPU's CPUID and MCG_CAP enumerate.
    pub fn set_features(&self, features: ApicFeatures) {
        self.enter(|state, _| state.set_features(features));
    }

    /// RESET, or INIT if `init`.
    pub fn reset(&self, init: bool) {
        let lint0_extint = self.settings.has_quirk(KVM_X86_QUIRK_LINT0_REENABLED);
        self.enter(|state, _| state.reset(init, lint0_extint));
        if !init {
            self.events.store(0, Ordering::SeqCst);
        }
    }

    // ---- the vCPU's questions

    /// Whether an interrupt can be delivered now. One load.
    pub fn has_interrupt(&self) -> bool {
        self.deliverable.load(Ordering::SeqCst) != 0
    }

    /// The vector that [`Lapic::acknowledge`] would take. One load.
    pub fn next_interrupt(&self) -> Option<u8> {
        match self.deliverable.load(Ordering::SeqCst) {
            0 => None,
            vector => Some(vector as u8),
        }
    }

    /// Takes the deliverable vector of the highest priority into service.
    pub fn acknowledge(&self) -> Option<u8> {
        if !self.has_interrupt() {
            return None;
        }
        self.enter(|state, _| state.acknowledge())
    }

    /// The vector that its timer sends, if it sends any.
    pub(crate) fn timer_vector(&self) -> Option<u8> {
        self.enter(|state, _| state.timer_vector())
    }

    /// Takes `vector`, which nobody has sent, into service, as an interrupt that the processor takes now. False: its priority does not allow
    /// it, or the APIC is disabled.
    pub(crate) fn take(&self, vector: u8) -> bool {
        self.enter(|state, _| state.take(vector))
    }

    /// Whether there are events to take. One load. `init_blocked`: the vCPU cannot take INIT now, which is left pending.
    pub fn has_events(&self, init_blocked: bool) -> bool {
        self.events.load(Ordering::SeqCst) & !blocked(init_blocked) != 0
    }

    /// The events, left in place.
    pub fn events(&self) -> ApicEvents {
        ApicEvents::from_bits(self.events.load(Ordering::SeqCst))
    }

    /// Takes all events. `init_blocked`: INIT stays, and a start-up IPI comes to nothing (kernel:
    /// `kvm_apic_accept_events`).
    pub fn take_events(&self, init_blocked: bool) -> ApicEvents {
        if !self.has_events(init_blocked) {
            return ApicEvents::default();
        }
        let kept = blocked(init_blocked);
        let taken = self.events.fetch_and(kept, Ordering::SeqCst) & !kept;
        ApicEvents::from_bits(if init_blocked { taken & !EVENT_SIPI } else { taken })
    }

    /// Takes an SMI alone.
    pub fn take_smi(&self) -> bool {
        self.events().smi && self.events.fetch_and(!EVENT_SMI, Ordering::SeqCst) & EVENT_SMI != 0
    }

    /// Takes the NMIs alone.
    pub fn take_nmis(&self) -> u32 {
        if !self.has_events(false) {
            return 0;
        }
        (self.events.fetch_and(!EVENT_NMI_COUNT, Ordering::SeqCst) & EVENT_NMI_COUNT) >> 16
    }

    /// Userspace restores, or clears, an INIT that waits (`kvm_vcpu_events`, smi.latched_init).
    pub fn latch_init(&self, waits: bool) {
        if waits {
            self.post(|events| events | EVENT_INIT);
        } else {
            self.events.fetch_and(!EVENT_INIT, Ordering::SeqCst);
        }
    }

    /// What KVM keeps at the address of KVM_SET_VAPIC_ADDR: the task priority in bits 7:0, the class of the interrupt in
    /// service in bits 15:8, the highest vector requested in bits 31:24.
    pub fn vapic_word(&self) -> u32 {
        self.lock().vapic_word()
    }

    /// Whether interrupts of the 8259 reach this vCPU: LINT0 is an unmasked ExtINT, or the APIC is disabled.
    pub fn accepts_pic(&self) -> bool {
        self.address().takes_pic()
    }

    /// The task priority register.
    pub fn tpr(&self) -> u8 {
        self.lock().tpr()
    }

    /// Writes the task priority register.
    pub fn set_tpr(&self, value: u8) {
        self.write_register(registers::TPR, u32::from(value));
    }

    /// CR8: bits 7:4 of the task priority register.
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr() >> 4)
    }

    /// A move to CR8, whose upper bits the processor has checked.
    pub fn set_cr8(&self, value: u64) {
        self.set_tpr((value as u8 & 0xf) << 4);
    }

    /// Ends the interrupt in service (a paravirtual EOI).
    pub fn end_of_interrupt(&self) {
        self.enter(|state, effects| state.end_of_interrupt(effects));
    }

    /// The vector in service, if nothing waits behind it: its EOI may be left to the guest's shared memory, provided
    /// that the IOAPIC does not want to hear of it.
    pub fn lone_in_service(&self) -> Option<u8> {
        self.lock().lone_in_service()
    }

    /// Whether `vector` is requested or in service.
    pub fn awaits_eoi(&self, vector: u8) -> bool {
        self.lock().awaits_eoi(vector)
    }

    // ---- register access

    /// IA32_APIC_BASE. One load.
    pub fn apic_base(&self) -> u64 {
        self.base.load(Ordering::Relaxed)
    }

    /// A write of IA32_APIC_BASE.
    pub fn set_apic_base(&self, value: u64, host_initiated: bool) -> Result<(), ApicError> {
        self.enter(|state, _| state.set_base(value, host_initiated))
    }

    /// RDMSR of 0x800 to 0x8ff.
    pub fn read_msr(&self, msr: u32) -> Result<u64, ApicError> {
        let offset = msr_offset(msr)?;
        self.lock().read_msr(offset, self.clock.now())
    }

    /// WRMSR of 0x800 to 0x8ff.
    pub fn write_msr(&self, msr: u32, value: u64) -> Result<(), ApicError> {
        let offset = msr_offset(msr)?;
        self.enter(|state, effects| state.write_msr(offset, value, self.clock.now(), effects))
    }

    /// A read of the register page. False: the page is not there, the access is somebody else's.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) -> bool {
        let address = self.address();
        if !address.is_present() || address.is_x2apic() {
            data.fill(0xff);
            return self.settings.has_quirk(KVM_X86_QUIRK_LAPIC_MMIO_HOLE);
        }
        data.fill(0);
        let (register, lane) = ((offset & !0xf) as usize, (offset & 0xf) as usize);
        let mut state = self.lock();
        if lane + data.len() <= 4 && state.readable(register) {
            let bytes = state.read(register, self.clock.now()).to_le_bytes();
            data.iter_mut().zip(&bytes[lane..]).for_each(|(place, &byte)| *place = byte);
        }
        true
    }

    /// A write to the register page. False: the page is not there, the access is somebody else's. Anything but 32
    /// bits at a multiple of 16 does nothing (SDM 11.4.1).
    pub fn mmio_write(&self, offset: u64, data: &[u8]) -> bool {
        let address = self.address();
        if !address.is_present() || address.is_x2apic() {
            return self.settings.has_quirk(KVM_X86_QUIRK_LAPIC_MMIO_HOLE);
        }
        if let (Ok(bytes), 0) = (<[u8; 4]>::try_from(data), offset & 0xf) {
            self.write_register(offset as usize & 0xff0, u32::from_le_bytes(bytes));
        }
        true
    }

    fn write_register(&self, offset: usize, value: u32) {
        // MMIO has no way to report an error.
        let _ = self.enter(|state, effects| state.write(offset, value, self.clock.now(), effects));
    }

    /// IA32_TSC_DEADLINE: zero unless the timer is in that mode and armed.
    pub fn tsc_deadline(&self) -> u64 {
        let state = self.lock();
        if state.hardware_enabled() && state.timer.mode() == timer::Mode::TscDeadline {
            state.timer.tsc_deadline()
        } else {
            0
        }
    }

    /// A write of IA32_TSC_DEADLINE; `now_tsc` and `tsc_khz` are the guest's. To be called again with the old deadline
    /// when the guest's TSC is changed.
    pub fn set_tsc_deadline(&self, deadline: u64, now_tsc: u64, tsc_khz: u32) {
        self.enter(|state, effects| {
            if !state.hardware_enabled() || state.timer.mode() != timer::Mode::TscDeadline {
                return;
            }
            let now = self.clock.now();
            if deadline == 0 || tsc_khz == 0 {
                state.timer.set_tsc_deadline(deadline, None);
            } else if deadline <= now_tsc {
                state.timer.set_tsc_deadline(deadline, Some(now));
                effects.timer_fired = state.timer.expired(now);
            } else {
                // Rounded up, so that the interrupt never comes before the TSC has reached the deadline.
                let left = (u128::from(deadline - now_tsc) * 1_000_000).div_ceil(u128::from(tsc_khz));
                let expiry = now.saturating_add(u64::try_from(left).unwrap_or(u64::MAX));
                state.timer.set_tsc_deadline(deadline, Some(expiry));
            }
        });
    }

    /// KVM_GET_LAPIC.
    pub fn state(&self) -> kvm_lapic_state {
        self.lock().image(self.clock.now(), self.settings.extended_ids())
    }

    /// KVM_SET_LAPIC.
    pub fn set_state(&self, image: &kvm_lapic_state) -> Result<(), ApicError> {
        let extended_ids = self.settings.extended_ids();
        self.enter(|state, _| state.set_image(image, self.clock.now(), extended_ids))?;
        self.kick();
        Ok(())
    }

    // ---- delivery, from any thread

    /// Takes a message that was found to be for this APIC; false if it comes to nothing.
    pub(crate) fn accept(&self, message: &Message) -> bool {
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if message.level && !message.assert {
                    return false;
                }
                let accepted = self.enter(|state, _| state.accept(message.vector, message.level));
                if accepted && self.has_interrupt() {
                    self.kick();
                }
                accepted
            }
            DeliveryMode::Smi => self.post(|events| events | EVENT_SMI),
            DeliveryMode::RemoteRead => self.post(|events| events | EVENT_UNHALT),
            DeliveryMode::Nmi => self.queue_nmi(),
            // The level de-assertion of an INIT synchronised arbitration IDs once; it does nothing since.
            DeliveryMode::Init if message.level && !message.assert => false,
            DeliveryMode::Init => self.post(|events| events & !(EVENT_SIPI | EVENT_SIPI_VECTOR) | EVENT_INIT),
            DeliveryMode::StartUp => self.post_sipi(message.vector),
            // ExtINT comes over LINT0 only, where `accepts_pic` speaks for it.
            DeliveryMode::ExtInt => false,
        }
    }

    /// An NMI from outside (KVM_NMI).
    pub fn queue_nmi(&self) -> bool {
        self.post(|events| match events & EVENT_NMI_COUNT {
            count if count >> 16 < 2 => events + (1 << 16),
            _ => events,
        })
    }

    /// A start-up IPI, or the pending one that userspace restores.
    pub fn post_sipi(&self, page: u8) -> bool {
        self.post(|events| events & !EVENT_SIPI_VECTOR | EVENT_SIPI | u32::from(page) << 8)
    }

    /// An INIT, or the pending one that userspace restores.
    pub fn post_init(&self) -> bool {
        self.post(|events| events & !(EVENT_SIPI | EVENT_SIPI_VECTOR) | EVENT_INIT)
    }

    /// Split irqchip: userspace's IOAPIC has to hear of this EOI.
    pub(crate) fn post_ioapic_eoi(&self, vector: u8) {
        self.post(|events| events & !EVENT_EOI_VECTOR | EVENT_IOAPIC_EOI | u32::from(vector) << 24);
    }

    fn post(&self, change: impl Fn(u32) -> u32) -> bool {
        self.events.update(Ordering::SeqCst, Ordering::SeqCst, change);
        self.kick();
        true
    }

    /// A performance monitoring interrupt.
    pub fn deliver_performance(&self) -> bool {
        self.deliver_local(registers::LVT_PERFORMANCE)
    }

    /// A signal at LINT0 that is not the 8259's.
    pub(crate) fn deliver_lint0(&self) -> bool {
        self.deliver_local(registers::LVT_LINT0)
    }

    /// A signal at LINT1, where KVM_NMI of an old userspace goes.
    pub fn deliver_lint1(&self) -> bool {
        self.deliver_local(registers::LVT_LINT1)
    }

    /// A corrected machine check.
    pub fn deliver_cmci(&self) -> bool {
        self.deliver_local(registers::LVT_CMCI)
    }

    fn deliver_local(&self, register: usize) -> bool {
        let message = self.enter(|state, _| state.local_interrupt(register));
        message.is_some_and(|message| self.accept(&message))
    }

    /// Wakes the vCPU.
    pub fn kick(&self) {
        if let Some(waker) = self.waker.get() {
            waker.kick();
        }
    }

    pub(crate) fn address(&self) -> Address {
        Address::from_bits(self.address.load(Ordering::Acquire))
    }

    // ---- the lock

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state under the lock, publishes what others see of it, and carries out the effects after it.
    fn enter<R>(&self, change: impl FnOnce(&mut State, &mut Effects) -> R) -> R {
        let mut effects = Effects::default();
        let result = {
            let mut state = self.lock();
            let result = change(&mut state, &mut effects);
            self.publish(&mut state);
            result
        };
        if effects.timer_fired {
            self.deliver_local(registers::LVT_TIMER);
        }
        if effects.message.is_some() || effects.eoi.is_some() {
            self.send(&effects);
        }
        result
    }

    fn publish(&self, state: &mut State) {
        let deliverable = state.deliverable().map_or(0, u32::from);
        self.deliverable.store(deliverable, Ordering::SeqCst);
        self.address.store(state.address().bits(), Ordering::Release);
        self.base.store(state.base(), Ordering::Relaxed);
        let armed = state.timer.armed();
        if armed != state.programmed {
            state.programmed = armed;
            match armed {
                Some(deadline) => self.timer.arm(deadline),
                None => self.timer.disarm(),
            }
        }
    }

    fn send(&self, effects: &Effects) {
        let Some(bus) = self.bus.upgrade() else { return };
        if let Some(message) = &effects.message {
            bus.deliver(Some(self), message);
        }
        if let Some(eoi) = effects.eoi {
            bus.end_of_interrupt(self, eoi);
        }
    }
}

impl TimerClient for Lapic {
    fn timer_expired(&self) {
        self.enter(|state, effects| {
            // The host's timer is used up, even if it was for a deadline that has moved since.
            state.programmed = None;
            effects.timer_fired = state.timer.expired(self.clock.now());
        });
    }
}

impl fmt::Debug for Lapic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lapic").field("id", &self.id).field("events", &self.events()).finish_non_exhaustive()
    }
}

fn msr_offset(msr: u32) -> Result<usize, ApicError> {
    match msr.checked_sub(X2APIC_MSR_BASE) {
        Some(index) if index <= 0xff => Ok((index as usize) << 4),
        _ => Err(ApicError::Reserved),
    }
}
