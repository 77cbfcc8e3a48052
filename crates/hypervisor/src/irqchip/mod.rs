//! The interrupt controllers of a PC, as KVM has them in the kernel.
//!
//! [`IrqChip`] ties them together: every vCPU's [`Lapic`](lapic::Lapic) on one [`ApicBus`](bus::ApicBus), the
//! [`IoApic`](ioapic::IoApic), the two 8259s ([`Pic`](pic::Pic)), the [`Pit`](pit::Pit), and the routing of GSIs to
//! them. In a *split* irqchip only the local APICs are here, and userspace has the rest.
//!
//! # Locks
//!
//! Each device has one lock. They are taken in this order, and no others are held meanwhile:
//!
//! 1. the tables of irqfds and an irqfd's own lock (`eventfd.rs`), while it drives its line;
//! 2. the IOAPIC's; the 8259s'; the PIT's (none of these three under another);
//! 3. the bus's list of local APICs (shared), then one local APIC's;
//! 4. leaves: the timer queue, the routing table, the listeners.
//!
//! What a device tells others — an IPI, an EOI, an acknowledgement to a listener, a tick — leaves after its own lock
//! is released; the IOAPIC's messages to local APICs are the exception, in the order above. [`lapic::Waker::kick`]
//! may be called under any of these locks and calls nothing of this module. None of it touches guest memory.

pub mod bus;
pub(crate) mod image;
pub mod ioapic;
pub mod lapic;
pub mod pic;
pub mod pit;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, OnceLock, Weak};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irq_routing_entry, kvm_irqchip,
};

use crate::routing::{
    Chip, LineListener, Routing, RoutingError, RoutingRules, RoutingTable, Target, msi_is_valid,
};
use crate::timer::Timers;
use bus::{ApicBus, ApicSettings, Delivery, EoiSink, Message, Msi};
use ioapic::IoApic;
use lapic::{Eoi, LAPIC_PAGE_SIZE, Lapic};
use pic::Pic;
use pit::{PIT_GSI, Pit, PitOutput};

/// The page address in IA32_APIC_BASE, as far as KVM looks at it.
const APIC_BASE_ADDRESS: u64 = 0xffff_f000;

/// Who drives an interrupt line; the line is high while any source drives it high.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqSource(u8);

impl IrqSource {
    /// KVM_IRQ_LINE and irqfds.
    pub const USERSPACE: Self = Self(0);
    /// irqfds with a resample descriptor.
    pub const RESAMPLE: Self = Self(1);
    /// The PIT.
    pub const PIT: Self = Self(2);

    /// Drives a line, given by the set of sources that hold it high; gives its level.
    fn drive(self, line: &mut u64, level: bool) -> bool {
        let bit = 1 << self.0;
        *line = if level { *line | bit } else { *line & !bit };
        *line != 0
    }
}

/// Which controllers are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqChipKind {
    /// All of them (KVM_CREATE_IRQCHIP).
    Full,
    /// The local APICs only (KVM_CAP_SPLIT_IRQCHIP).
    Split {
        /// GSIs that stand for the pins of userspace's IOAPIC, whose EOIs it wants to hear of.
        reserved_pins: usize,
    },
}

/// Why an interrupt controller refuses a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IrqChipError {
    /// There is one already: EEXIST.
    #[error("the device exists already")]
    Exists,
    /// The irqchip is split, or has no such device: ENXIO.
    #[error("there is no such device")]
    NoDevice,
    /// An identifier or a message that does not exist: EINVAL.
    #[error("the request is not valid")]
    Invalid,
    /// A routing table that is not valid: EINVAL.
    #[error(transparent)]
    Routing(#[from] RoutingError),
}

/// The interrupt controllers of one VM.
pub struct IrqChip {
    kind: IrqChipKind,
    bus: Arc<ApicBus>,
    routing: Arc<Routing>,
    timers: Arc<Timers>,
    /// IOAPIC and 8259s, unless userspace has them.
    chips: Option<(Arc<IoApic>, Pic)>,
    pit: OnceLock<Arc<Pit>>,
    /// Ourselves, for devices that call back.
    me: Weak<Self>,
}

impl IrqChip {
    /// The controllers of a new VM.
    pub fn new(kind: IrqChipKind, settings: Arc<ApicSettings>, timers: Arc<Timers>) -> Arc<Self> {
        let bus = Arc::new(ApicBus::new(settings));
        let routing = Arc::new(Routing::default());
        let chips = (kind == IrqChipKind::Full).then(|| {
            routing.replace(RoutingTable::default_pc());
            let ioapic = IoApic::new(Arc::clone(&bus), Arc::clone(&routing), &timers);
            (ioapic, Pic::new(Arc::clone(&bus), Arc::clone(&routing)))
        });
        let chip = Arc::new_cyclic(|me: &Weak<Self>| {
            let me = Weak::clone(me);
            Self { kind, bus, routing, timers, chips, pit: OnceLock::new(), me }
        });
        chip.bus.connect(Weak::clone(&chip.me) as Weak<dyn EoiSink>);
        chip
    }

    /// The local APIC of a new vCPU.
    pub fn create_lapic(&self, id: u32, bsp: bool) -> Result<Arc<Lapic>, IrqChipError> {
        if self.lapic(id).is_some() {
            return Err(IrqChipError::Exists);
        }
        let lapic = Lapic::new(id, bsp, self.is_split(), &self.bus, &self.timers);
        self.bus.attach(Arc::clone(&lapic));
        Ok(lapic)
    }

    /// The PIT (KVM_CREATE_PIT2); `speaker`: with port 0x61.
    pub fn create_pit(&self, speaker: bool) -> Result<Arc<Pit>, IrqChipError> {
        if self.is_split() {
            return Err(IrqChipError::NoDevice);
        }
        let pit = Pit::new(speaker, Weak::clone(&self.me) as Weak<dyn PitOutput>, &self.timers);
        self.pit.set(Arc::clone(&pit)).map_err(|_| IrqChipError::Exists)?;
        self.listen(PIT_GSI, Arc::clone(&pit) as Arc<dyn LineListener>);
        Ok(pit)
    }

    /// Whether userspace has all but the local APICs.
    pub fn is_split(&self) -> bool {
        self.chips.is_none()
    }

    /// The local APIC of a vCPU.
    pub fn lapic(&self, id: u32) -> Option<Arc<Lapic>> {
        self.bus.lapic(id)
    }

    /// The bus of the local APICs.
    pub fn bus(&self) -> &Arc<ApicBus> {
        &self.bus
    }

    /// What holds for all local APICs.
    pub fn settings(&self) -> &Arc<ApicSettings> {
        self.bus.settings()
    }

    /// The IOAPIC.
    pub fn ioapic(&self) -> Option<&Arc<IoApic>> {
        self.chips.as_ref().map(|(ioapic, _)| ioapic)
    }

    /// The 8259s.
    pub fn pic(&self) -> Option<&Pic> {
        self.chips.as_ref().map(|(_, pic)| pic)
    }

    /// The PIT.
    pub fn pit(&self) -> Option<&Arc<Pit>> {
        self.pit.get()
    }

    /// All but the local APICs back to their state after power-on; those are reset by their vCPUs.
    pub fn reset(&self) {
        if let Some((ioapic, pic)) = &self.chips {
            ioapic.reset();
            pic.reset();
        }
        if let Some(pit) = self.pit() {
            pit.reset();
        }
    }

    // ---- interrupts to a vCPU

    /// Whether the vCPU of `lapic` has an interrupt to take: of the 8259, if its LINT0 lets it through, or its own.
    pub fn has_interrupt(&self, lapic: &Lapic) -> bool {
        lapic.has_interrupt() || self.has_extint(lapic)
    }

    /// Whether the 8259 has an interrupt for the vCPU of `lapic`. In a split irqchip that is userspace's to say.
    pub fn has_extint(&self, lapic: &Lapic) -> bool {
        self.pic().is_some_and(|pic| pic.pending() && lapic.accepts_pic())
    }

    /// Takes the interrupt that the vCPU of `lapic` has to handle now; the 8259's come first.
    pub fn acknowledge(&self, lapic: &Lapic) -> Option<u8> {
        if let Some(pic) = self.pic().filter(|_| self.has_extint(lapic)) {
            return Some(pic.acknowledge());
        }
        lapic.acknowledge()
    }

    /// The vector in service whose EOI the guest may leave in shared memory (MSR_KVM_PV_EOI_EN): nothing waits behind
    /// it, and no IOAPIC wants to hear of it.
    pub fn eoi_left_to_memory(&self, lapic: &Lapic) -> Option<u8> {
        lapic.lone_in_service().filter(|&vector| !self.wants_eoi(vector))
    }

    fn wants_eoi(&self, vector: u8) -> bool {
        match self.kind {
            IrqChipKind::Full => self.ioapic().is_some_and(|ioapic| ioapic.handles(vector)),
            IrqChipKind::Split { reserved_pins } => {
                let extended = self.settings().extended_ids();
                let wanted = |message: Message| message.level && message.vector == vector;
                self.routing.table().msis(reserved_pins).any(|msi| wanted(Message::from_msi(msi, extended)))
            }
        }
    }

    // ---- lines and messages

    /// Drives a GSI for `source`, at every controller that it is routed to.
    pub fn set_irq(&self, source: IrqSource, gsi: u32, level: bool) -> Delivery {
        self.drive(source, gsi, level, false)
    }

    /// KVM_IRQ_LINE.
    pub fn irq_line(&self, gsi: u32, level: bool) {
        self.set_irq(IrqSource::USERSPACE, gsi, level);
    }

    /// KVM_IRQ_LINE_STATUS: userspace asks what became of it, and an RTC interrupt is held back while the last one
    /// has not been acknowledged.
    pub fn irq_line_status(&self, gsi: u32, level: bool) -> Delivery {
        self.drive(IrqSource::USERSPACE, gsi, level, true)
    }

    fn drive(&self, source: IrqSource, gsi: u32, level: bool, line_status: bool) -> Delivery {
        self.bus.note_outside();
        let table = self.routing.table();
        let deliver = |target: &Target| match (*target, &self.chips) {
            (Target::Pin(Chip::IoApic, pin), Some((ioapic, _))) => {
                ioapic.set_irq(usize::from(pin), source, level, line_status)
            }
            (Target::Pin(_, pin), Some((_, pic))) => pic.set_irq(usize::from(pin), source, level),
            (Target::Msi(msi), _) if level => self.deliver_msi(msi),
            _ => Delivery::Ignored,
        };
        table.targets(gsi).iter().map(deliver).fold(Delivery::Ignored, Delivery::and)
    }

    /// KVM_SIGNAL_MSI.
    pub fn send_msi(&self, msi: Msi) -> Result<Delivery, IrqChipError> {
        if !msi_is_valid(msi, self.settings().extended_ids()) {
            return Err(IrqChipError::Invalid);
        }
        Ok(self.deliver_msi(msi))
    }

    fn deliver_msi(&self, msi: Msi) -> Delivery {
        let extended = self.settings().extended_ids();
        if !msi_is_valid(msi, extended) {
            return Delivery::Ignored;
        }
        self.bus.deliver(None, &Message::from_msi(msi, extended))
    }

    /// KVM_SET_GSI_ROUTING.
    pub fn set_gsi_routing(&self, entries: &[kvm_irq_routing_entry]) -> Result<(), IrqChipError> {
        let rules = RoutingRules { split: self.is_split(), extended_ids: self.settings().extended_ids() };
        self.routing.replace(RoutingTable::new(entries, rules)?);
        self.listeners_changed();
        Ok(())
    }

    /// Adds a listener to a GSI.
    pub fn listen(&self, gsi: u32, listener: Arc<dyn LineListener>) {
        self.routing.listen(gsi, listener);
        self.listeners_changed();
    }

    /// Removes a listener from a GSI.
    pub fn unlisten(&self, gsi: u32, listener: &Arc<dyn LineListener>) {
        self.routing.unlisten(gsi, listener);
        self.listeners_changed();
    }

    fn listeners_changed(&self) {
        if let Some(ioapic) = self.ioapic() {
            ioapic.listeners_changed();
        }
    }

    // ---- exits

    /// A read of guest-physical memory by the vCPU of `lapic`; false if it is none of the controllers'.
    pub fn mmio_read(&self, lapic: &Lapic, address: u64, data: &mut [u8]) -> bool {
        match lapic_offset(lapic, address) {
            Some(offset) if lapic.mmio_read(offset, data) => true,
            _ => self.ioapic().is_some_and(|ioapic| ioapic.mmio_read(address, data)),
        }
    }

    /// A write to guest-physical memory by the vCPU of `lapic`; false if it is none of the controllers'.
    pub fn mmio_write(&self, lapic: &Lapic, address: u64, data: &[u8]) -> bool {
        match lapic_offset(lapic, address) {
            Some(offset) if lapic.mmio_write(offset, data) => true,
            _ => self.ioapic().is_some_and(|ioapic| ioapic.mmio_write(address, data)),
        }
    }

    /// A port read of `size` bytes; `None` if the port is none of the controllers'.
    pub fn pio_read(&self, port: u16, size: usize) -> Option<u32> {
        let of_pic = self.pic().and_then(|pic| pic.read(port, size));
        of_pic.or_else(|| self.pit()?.read(port))
    }

    /// A port write of `size` bytes; false if the port is none of the controllers'.
    pub fn pio_write(&self, port: u16, value: u32, size: usize) -> bool {
        self.pic().is_some_and(|pic| pic.write(port, value, size))
            || self.pit().is_some_and(|pit| pit.write(port, value))
    }

    // ---- KVM_GET_IRQCHIP, KVM_SET_IRQCHIP

    /// The image of the controller `chip_id`.
    pub fn chip_state(&self, chip_id: u32) -> Result<kvm_irqchip, IrqChipError> {
        let (ioapic, pic) = self.chips.as_ref().ok_or(IrqChipError::NoDevice)?;
        let mut image = kvm_irqchip { chip_id, ..Default::default() };
        match chip_id {
            KVM_IRQCHIP_PIC_MASTER => image.chip.pic = pic.state(0),
            KVM_IRQCHIP_PIC_SLAVE => image.chip.pic = pic.state(1),
            KVM_IRQCHIP_IOAPIC => image.chip.ioapic = ioapic.state(),
            _ => return Err(IrqChipError::Invalid),
        }
        Ok(image)
    }

    /// Takes over an image of the controller that it names.
    pub fn set_chip_state(&self, image: &kvm_irqchip) -> Result<(), IrqChipError> {
        let (ioapic, pic) = self.chips.as_ref().ok_or(IrqChipError::NoDevice)?;
        match image.chip_id {
            KVM_IRQCHIP_PIC_MASTER => pic.set_state(0, image::pic(image)),
            KVM_IRQCHIP_PIC_SLAVE => pic.set_state(1, image::pic(image)),
            KVM_IRQCHIP_IOAPIC => ioapic.set_state(&image::ioapic(image)),
            _ => return Err(IrqChipError::Invalid),
        }
        Ok(())
    }
}

fn lapic_offset(lapic: &Lapic, address: u64) -> Option<u64> {
    let base = lapic.apic_base() & APIC_BASE_ADDRESS;
    address.checked_sub(base).filter(|&offset| offset < LAPIC_PAGE_SIZE)
}

impl EoiSink for IrqChip {
    fn end_of_interrupt(&self, lapic: &Lapic, eoi: Eoi) {
        match self.ioapic() {
            Some(ioapic) => ioapic.end_of_interrupt(lapic, eoi),
            None if self.wants_eoi(eoi.vector) => lapic.post_ioapic_eoi(eoi.vector),
            None => {}
        }
    }
}

impl PitOutput for IrqChip {
    /// A pulse on GSI 0, and at the LINT0 of those who have it as NMI watchdog.
    fn tick(&self) {
        self.set_irq(IrqSource::PIT, PIT_GSI, true);
        self.set_irq(IrqSource::PIT, PIT_GSI, false);
        self.bus.deliver_watchdog();
    }
}

impl fmt::Debug for IrqChip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqChip").field("kind", &self.kind).finish_non_exhaustive()
    }
}
