//! The bus between the interrupt controllers: messages to local APICs, and who accepts them.
//!
//! What KVM does in `irq_comm.c` and in the destination matching of `lapic.c`. KVM has a fast and a slow path for
//! matching; this is the slow one, on addresses that every local APIC publishes in one atomic word, so no lock is
//! taken for those that do not match.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, Weak};

use kvm_bindings::kvm_msi;

use super::lapic::{Eoi, Lapic};

/// Destination of a physical message to every xAPIC.
const XAPIC_BROADCAST: u32 = 0xff;
/// Destination of a message to every x2APIC.
const X2APIC_BROADCAST: u32 = 0xffff_ffff;

/// How an interrupt message acts on its target (SDM 11.6.1, ICR bits 10:8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector, at every target.
    Fixed,
    /// The vector, at one of the targets.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Reserved by the SDM; KVM's own message that ends a paravirtual halt (`APIC_DM_REMRD`).
    RemoteRead,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI; the vector is the page to start at.
    StartUp,
    /// The vector comes from the 8259.
    ExtInt,
}

impl DeliveryMode {
    /// From the three bits of an ICR, LVT entry, redirection entry or MSI.
    pub fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::RemoteRead,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => Self::ExtInt,
        }
    }
}

/// A set of targets that needs no destination (ICR bits 19:18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// No shorthand: the destination counts.
    None,
    /// The sender.
    Itself,
    /// Everyone.
    All,
    /// Everyone but the sender.
    Others,
}

impl Shorthand {
    /// From ICR bits 19:18.
    pub fn from_bits(bits: u32) -> Self {
        match bits & 3 {
            0 => Self::None,
            1 => Self::Itself,
            2 => Self::All,
            _ => Self::Others,
        }
    }
}

/// An interrupt on its way to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The vector, or the start-up page.
    pub vector: u8,
    /// What it does at its targets.
    pub mode: DeliveryMode,
    /// The destination is a logical one.
    pub logical: bool,
    /// Level-triggered: the target's EOI is told to the IOAPIC.
    pub level: bool,
    /// Assertion, as opposed to the de-assertion of a level.
    pub assert: bool,
    /// Targets without destination.
    pub shorthand: Shorthand,
    /// The APIC ID or logical address.
    pub destination: u32,
    /// MSI redirection hint: one of the targets suffices.
    pub redirection_hint: bool,
}

impl Message {
    /// The message that a value of the ICR sends (SDM 11.6.1). `destination` is the ICR's, as wide as the mode has it.
    pub fn from_icr(low: u32, destination: u32) -> Self {
        Self {
            vector: low as u8,
            mode: DeliveryMode::from_bits(low >> 8),
            logical: low & 1 << 11 != 0,
            level: low & 1 << 15 != 0,
            assert: low & 1 << 14 != 0,
            shorthand: Shorthand::from_bits(low >> 18),
            destination,
            redirection_hint: false,
        }
    }

    /// The message of an MSI (SDM 11.11). With `extended` the upper address holds bits 31:8 of the destination.
    pub fn from_msi(msi: Msi, extended: bool) -> Self {
        let low = msi.address_lo >> 12 & 0xff;
        Self {
            vector: msi.data as u8,
            mode: DeliveryMode::from_bits(msi.data >> 8),
            logical: msi.address_lo & 1 << 2 != 0,
            level: msi.data & 1 << 15 != 0,
            assert: true,
            shorthand: Shorthand::None,
            destination: if extended { low | msi.address_hi & !0xff } else { low },
            redirection_hint: msi.address_lo & 1 << 3 != 0,
        }
    }

    /// Whether one target is chosen among those that match.
    fn one_of_many(&self) -> bool {
        self.mode == DeliveryMode::LowestPriority || self.redirection_hint
    }
}

/// Address and data of a message-signalled interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msi {
    /// Address bits 31:0.
    pub address_lo: u32,
    /// Address bits 63:32.
    pub address_hi: u32,
    /// The data.
    pub data: u32,
}

impl From<&kvm_msi> for Msi {
    fn from(msi: &kvm_msi) -> Self {
        Self { address_lo: msi.address_lo, address_hi: msi.address_hi, data: msi.data }
    }
}

/// What became of an interrupt; [`Delivery::status`] is what `KVM_IRQ_LINE_STATUS` tells userspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Masked, or nobody there.
    Ignored,
    /// The previous one is still pending.
    Coalesced,
    /// Accepted by so many targets.
    Delivered(u32),
}

impl Delivery {
    /// KVM's number: below zero, zero, or the number of targets.
    pub fn status(self) -> i32 {
        match self {
            Self::Ignored => -1,
            Self::Coalesced => 0,
            Self::Delivered(count) => count as i32,
        }
    }

    /// The result of one line that goes to two controllers.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Ignored, other) => other,
            (first, Self::Ignored) => first,
            (first, second) => Self::of((first.status() + second.status()) as u32),
        }
    }

    /// Delivered to `count` targets, of which there may be none.
    pub fn of(count: u32) -> Self {
        if count == 0 { Self::Coalesced } else { Self::Delivered(count) }
    }
}

/// Where an APIC listens: its identity and mode, packed in a word that is published for every other thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address(u64);

impl Address {
    const PRESENT: u64 = 1 << 40;
    const X2APIC: u64 = 1 << 41;
    const SOFTWARE_ENABLED: u64 = 1 << 42;
    const FLAT: u64 = 1 << 43;
    const CLUSTER: u64 = 1 << 44;
    const ACCEPTS_PIC: u64 = 1 << 45;
    const LINT0_NMI: u64 = 1 << 46;

    pub(crate) fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    pub(crate) fn new(ldr: u32, xapic_id: u8) -> Self {
        Self(u64::from(ldr) | u64::from(xapic_id) << 32)
    }

    #[must_use]
    pub(crate) fn present(self, value: bool) -> Self {
        self.with(Self::PRESENT, value)
    }

    #[must_use]
    pub(crate) fn x2apic(self, value: bool) -> Self {
        self.with(Self::X2APIC, value)
    }

    #[must_use]
    pub(crate) fn software_enabled(self, value: bool) -> Self {
        self.with(Self::SOFTWARE_ENABLED, value)
    }

    #[must_use]
    pub(crate) fn flat(self, value: bool) -> Self {
        self.with(Self::FLAT, value)
    }

    #[must_use]
    pub(crate) fn cluster(self, value: bool) -> Self {
        self.with(Self::CLUSTER, value)
    }

    #[must_use]
    pub(crate) fn accepts_pic(self, value: bool) -> Self {
        self.with(Self::ACCEPTS_PIC, value)
    }

    #[must_use]
    pub(crate) fn lint0_nmi(self, value: bool) -> Self {
        self.with(Self::LINT0_NMI, value)
    }

    fn with(self, bit: u64, value: bool) -> Self {
        Self(if value { self.0 | bit } else { self.0 & !bit })
    }

    fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    /// The APIC is enabled in IA32_APIC_BASE.
    pub(crate) fn is_present(self) -> bool {
        self.has(Self::PRESENT)
    }

    pub(crate) fn is_x2apic(self) -> bool {
        self.has(Self::X2APIC)
    }

    pub(crate) fn is_software_enabled(self) -> bool {
        self.has(Self::SOFTWARE_ENABLED)
    }

    pub(crate) fn takes_pic(self) -> bool {
        self.has(Self::ACCEPTS_PIC)
    }

    /// LINT0 is set up as an NMI: the PIT's tick is a watchdog.
    pub(crate) fn takes_watchdog(self) -> bool {
        self.has(Self::LINT0_NMI)
    }

    /// SDM 11.6.2.1; an ID beyond eight bits also finds an xAPIC by its x2APIC ID, as KVM's hot-plug hack has it.
    fn matches_physical(self, x2apic_id: u32, destination: u32) -> bool {
        if self.is_broadcast(destination) {
            true
        } else if self.is_x2apic() || destination > 0xff {
            destination == x2apic_id
        } else {
            destination == (self.0 >> 32 & 0xff) as u32
        }
    }

    /// SDM 11.6.2.2 and 11.12.10.2.
    fn matches_logical(self, destination: u32) -> bool {
        let ldr = self.0 as u32;
        if self.is_broadcast(destination) {
            return true;
        }
        if self.is_x2apic() {
            return ldr >> 16 == destination >> 16 && ldr & destination & 0xffff != 0;
        }
        let ldr = ldr >> 24;
        if self.has(Self::FLAT) {
            ldr & destination != 0
        } else if self.has(Self::CLUSTER) {
            ldr >> 4 == destination >> 4 && ldr & destination & 0xf != 0
        } else {
            false
        }
    }

    fn is_broadcast(self, destination: u32) -> bool {
        destination == if self.is_x2apic() { X2APIC_BROADCAST } else { XAPIC_BROADCAST }
    }
}

/// What a VM's owner sets for all its APICs.
#[derive(Debug)]
pub struct ApicSettings {
    /// `KVM_X2APIC_API_USE_32BIT_IDS`: MSIs and the APIC image have 32-bit IDs.
    pub x2apic_format: AtomicBool,
    /// `KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK`: 0xff is an ordinary destination for x2APICs.
    pub broadcast_quirk_disabled: AtomicBool,
    /// `KVM_CAP_DISABLE_QUIRKS`: the quirks that are off.
    pub disabled_quirks: AtomicU64,
    /// `KVM_CAP_X86_APIC_BUS_CYCLES_NS`: nanoseconds per tick of the APIC timer before its divider.
    pub bus_cycle_ns: AtomicU64,
}

impl Default for ApicSettings {
    fn default() -> Self {
        Self {
            x2apic_format: AtomicBool::new(false),
            broadcast_quirk_disabled: AtomicBool::new(false),
            disabled_quirks: AtomicU64::new(0),
            bus_cycle_ns: AtomicU64::new(1),
        }
    }
}

impl ApicSettings {
    /// Whether a `KVM_X86_QUIRK_*` is still on.
    pub fn has_quirk(&self, quirk: u32) -> bool {
        self.disabled_quirks.load(Ordering::Relaxed) & u64::from(quirk) == 0
    }

    /// Whether IDs and MSIs are in the 32-bit format.
    pub fn extended_ids(&self) -> bool {
        self.x2apic_format.load(Ordering::Relaxed)
    }
}

/// Who wants to know of EOIs: the owner of the IOAPIC.
pub(crate) trait EoiSink: Send + Sync {
    /// `lapic` has ended an interrupt. Called without a lock.
    fn end_of_interrupt(&self, lapic: &Lapic, eoi: Eoi);
}

/// All local APICs of a VM.
///
/// Lock order: the list's lock comes before every local APIC's, and after the IOAPIC's.
pub struct ApicBus {
    lapics: RwLock<Vec<Arc<Lapic>>>,
    settings: Arc<ApicSettings>,
    eoi_sink: OnceLock<Weak<dyn EoiSink>>,
    outside: AtomicU64,
}

impl ApicBus {
    pub(crate) fn new(settings: Arc<ApicSettings>) -> Self {
        Self { lapics: RwLock::default(), settings, eoi_sink: OnceLock::new(), outside: AtomicU64::new(0) }
    }

    /// The settings, which can be changed at any time.
    pub fn settings(&self) -> &Arc<ApicSettings> {
        &self.settings
    }

    /// Counts what may tell a processor of memory that devices or the client have written. Interrupts that processors send each other
    /// tell of no more than what the sender has been told of.
    pub(crate) fn outside(&self) -> u64 {
        self.outside.load(Ordering::SeqCst)
    }

    /// An interrupt comes from outside, or the client has had its turn.
    pub(crate) fn note_outside(&self) {
        self.outside.fetch_add(1, Ordering::SeqCst);
    }

    /// Connects the receiver of EOIs, once.
    pub(crate) fn connect(&self, sink: Weak<dyn EoiSink>) {
        // A second receiver would be a mistake of ours that changes nothing.
        let _ = self.eoi_sink.set(sink);
    }

    pub(crate) fn attach(&self, lapic: Arc<Lapic>) {
        self.lapics.write().unwrap_or_else(PoisonError::into_inner).push(lapic);
    }

    /// The local APIC of the vCPU `id`.
    pub fn lapic(&self, id: u32) -> Option<Arc<Lapic>> {
        self.with(|lapics| lapics.iter().find(|lapic| lapic.id() == id).cloned())
    }

    pub(crate) fn with<R>(&self, f: impl FnOnce(&[Arc<Lapic>]) -> R) -> R {
        f(&self.lapics.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends `message`, from the local APIC `source` or from a device.
    pub fn deliver(&self, source: Option<&Lapic>, message: &Message) -> Delivery {
        self.deliver_each(source, message, |_| ())
    }

    /// As [`ApicBus::deliver`]; tells every target that has accepted.
    pub(crate) fn deliver_each(
        &self,
        source: Option<&Lapic>,
        message: &Message,
        mut accepted: impl FnMut(&Lapic),
    ) -> Delivery {
        if source.is_none() {
            self.note_outside();
        }
        let mut count = 0;
        let mut offer = |lapic: &Lapic, message: &Message| {
            if lapic.accept(message) {
                count += 1;
                accepted(lapic);
            }
        };
        match (message.shorthand, source) {
            (Shorthand::Itself, Some(source)) => offer(source, message),
            (Shorthand::Itself, None) => return Delivery::Ignored,
            _ => self.with(|lapics| self.offer_to_matching(lapics, source, message, &mut offer)),
        }
        Delivery::of(count)
    }

    fn offer_to_matching(
        &self,
        lapics: &[Arc<Lapic>],
        source: Option<&Lapic>,
        message: &Message,
        offer: &mut dyn FnMut(&Lapic, &Message),
    ) {
        let mut message = *message;
        let physical_broadcast = !message.logical && message.destination == XAPIC_BROADCAST;
        if physical_broadcast && message.one_of_many() {
            message.mode = DeliveryMode::Fixed;
            message.redirection_hint = false;
        }
        let matching = || lapics.iter().filter(|lapic| self.matches(lapic, source, &message));
        if !message.one_of_many() {
            matching().for_each(|lapic| offer(lapic, &message));
            return;
        }
        // The lowest priority is found by hashing the vector, as KVM does by default ("vector_hashing").
        let able = || matching().filter(|lapic| lapic.address().is_software_enabled());
        let candidates = able().count();
        if candidates != 0
            && let Some(chosen) = able().nth(usize::from(message.vector) % candidates)
        {
            offer(chosen, &message);
        }
    }

    fn matches(&self, target: &Lapic, source: Option<&Lapic>, message: &Message) -> bool {
        let address = target.address();
        if !address.is_present() {
            return false;
        }
        let is_source = source.is_some_and(|source| std::ptr::eq(source, target));
        match message.shorthand {
            Shorthand::Itself => is_source,
            Shorthand::All => true,
            Shorthand::Others => !is_source,
            Shorthand::None => {
                let destination = self.destination(address, source, message);
                if message.logical {
                    address.matches_logical(destination)
                } else {
                    address.matches_physical(target.id(), destination)
                }
            }
        }
    }

    /// A device's broadcast reaches x2APICs too, unless userspace has switched that off.
    fn destination(&self, target: Address, source: Option<&Lapic>, message: &Message) -> u32 {
        let quirk = !self.settings.broadcast_quirk_disabled.load(Ordering::Relaxed);
        if quirk && source.is_none() && target.is_x2apic() && message.destination == XAPIC_BROADCAST {
            X2APIC_BROADCAST
        } else {
            message.destination
        }
    }

    /// The IDs of those that `message` of a device is for and that fulfil `condition`.
    pub(crate) fn targets(&self, message: &Message, condition: impl Fn(&Lapic) -> bool) -> Vec<u32> {
        let fits = |lapic: &&Arc<Lapic>| self.matches(lapic, None, message) && condition(lapic);
        self.with(|lapics| lapics.iter().filter(fits).map(|lapic| lapic.id()).collect())
    }

    /// The hypercall `KVM_HC_SEND_IPI`: `message` without destination to the APIC IDs `first + n` for each bit n of
    /// `targets`. Gives the number of vCPUs that have accepted.
    pub fn send_to_set(&self, message: &Message, first: u32, targets: u128) -> u32 {
        self.with(|lapics| {
            let wanted = |lapic: &&Arc<Lapic>| {
                let address = lapic.address();
                let id = if address.is_x2apic() { lapic.id() } else { (address.bits() >> 32 & 0xff) as u32 };
                let index = id.wrapping_sub(first);
                address.is_present() && index < 128 && targets >> index & 1 != 0
            };
            lapics.iter().filter(wanted).filter(|lapic| lapic.accept(message)).count() as u32
        })
    }

    /// Tells the IOAPIC of an EOI.
    pub(crate) fn end_of_interrupt(&self, lapic: &Lapic, eoi: Eoi) {
        if let Some(sink) = self.eoi_sink.get().and_then(Weak::upgrade) {
            sink.end_of_interrupt(lapic, eoi);
        }
    }

    /// Wakes the first vCPU that takes interrupts of the 8259.
    pub(crate) fn wake_for_pic(&self) {
        self.with(|lapics| {
            if let Some(lapic) = lapics.iter().find(|lapic| lapic.accepts_pic()) {
                lapic.kick();
            }
        });
    }

    /// The PIT's tick at LINT0 of those who have it as NMI.
    pub(crate) fn deliver_watchdog(&self) {
        self.with(|lapics| {
            lapics
                .iter()
                .filter(|lapic| lapic.address().takes_watchdog())
                .for_each(|lapic| _ = lapic.deliver_lint0());
        });
    }
}
