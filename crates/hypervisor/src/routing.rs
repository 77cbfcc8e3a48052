//! Interrupt routing: where a GSI goes, and who listens to it (KVM's `irqchip.c`).
//!
//! Locks: all of this module's locks are leaves, except that no lock at all is held while a listener is called with
//! [`LineListener::acknowledged`], which may raise and lower lines.

use std::sync::{Arc, PoisonError, RwLock};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MSI_VALID_DEVID, kvm_irq_routing_entry,
};

use crate::irqchip::bus::Msi;
use crate::irqchip::image;

/// GSIs that can be routed (`KVM_MAX_IRQ_ROUTES`).
pub const MAX_ROUTES: u32 = 4096;
/// Pins of the IOAPIC.
pub const IOAPIC_PINS: usize = 24;
/// Pins of the two 8259s together.
pub const PIC_PINS: usize = 16;

/// Why a routing table is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RoutingError {
    /// An entry names what does not exist, or clashes with another: EINVAL.
    #[error("the routing entry for GSI {0} is not valid")]
    Invalid(u32),
}

/// An interrupt controller with pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chip {
    /// The first 8259, pins 0 to 7.
    PicMaster,
    /// The second 8259, pins 8 to 15.
    PicSlave,
    /// The IOAPIC.
    IoApic,
}

impl Chip {
    /// The 8259 that has pin `pin` of 16.
    pub fn of_pic_pin(pin: usize) -> Self {
        if pin < 8 { Self::PicMaster } else { Self::PicSlave }
    }
}

/// Where a GSI goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// To a pin; the pins of the second 8259 count from 8.
    Pin(Chip, u8),
    /// To local APICs, as a message.
    Msi(Msi),
}

/// The circumstances under which a table is checked.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoutingRules {
    /// Only the local APICs are ours: there are no pins to route to.
    pub split: bool,
    /// MSI addresses have 32-bit destinations, and reserved bits for it.
    pub extended_ids: bool,
}

/// A routing table, never changed once made.
#[derive(Debug, Default)]
pub struct RoutingTable {
    by_gsi: Vec<Vec<Target>>,
    by_pin: [[Option<u32>; IOAPIC_PINS]; 3],
}

impl RoutingTable {
    /// KVM's default: every GSI below 24 goes to the IOAPIC's pin of that number, and those below 16 to the 8259s too.
    pub fn default_pc() -> Self {
        let mut table = Self::default();
        for gsi in 0..IOAPIC_PINS as u32 {
            table.insert(gsi, Target::Pin(Chip::IoApic, gsi as u8));
            if gsi < PIC_PINS as u32 {
                table.insert(gsi, Target::Pin(Chip::of_pic_pin(gsi as usize), gsi as u8));
            }
        }
        table
    }

    /// Checks and takes over the entries of KVM_SET_GSI_ROUTING.
    pub fn new(entries: &[kvm_irq_routing_entry], rules: RoutingRules) -> Result<Self, RoutingError> {
        let mut table = Self::default();
        for entry in entries {
            let invalid = RoutingError::Invalid(entry.gsi);
            let target = target(entry, rules).ok_or(invalid)?;
            if entry.gsi >= MAX_ROUTES || table.clashes(entry.gsi, target) {
                return Err(invalid);
            }
            table.insert(entry.gsi, target);
        }
        Ok(table)
    }

    /// A GSI goes to each controller at most once, and to an MSI alone.
    fn clashes(&self, gsi: u32, target: Target) -> bool {
        self.targets(gsi).iter().any(|&other| match (other, target) {
            (Target::Pin(old, _), Target::Pin(new, _)) => old == new,
            _ => true,
        })
    }

    fn insert(&mut self, gsi: u32, target: Target) {
        let index = gsi as usize;
        if self.by_gsi.len() <= index {
            self.by_gsi.resize_with(index + 1, Vec::new);
        }
        self.by_gsi[index].push(target);
        if let Target::Pin(chip, pin) = target
            && let Some(place) = self.by_pin[chip as usize].get_mut(usize::from(pin))
        {
            *place = Some(gsi);
        }
    }

    /// Where `gsi` goes.
    pub fn targets(&self, gsi: u32) -> &[Target] {
        self.by_gsi.get(gsi as usize).map_or(&[], Vec::as_slice)
    }

    /// The GSI that comes in at a pin.
    pub fn gsi_of(&self, chip: Chip, pin: usize) -> Option<u32> {
        *self.by_pin[chip as usize].get(pin)?
    }

    /// The MSIs of the first `count` GSIs: in a split irqchip, the pins of userspace's IOAPIC.
    pub fn msis(&self, count: usize) -> impl Iterator<Item = Msi> {
        self.by_gsi.iter().take(count).flatten().filter_map(|target| match target {
            Target::Msi(msi) => Some(*msi),
            Target::Pin(..) => None,
        })
    }
}

/// Whether an MSI's address has bits set that the 32-bit format reserves.
pub fn msi_is_valid(msi: Msi, extended_ids: bool) -> bool {
    !(extended_ids && msi.address_hi & 0xff != 0)
}

fn target(entry: &kvm_irq_routing_entry, rules: RoutingRules) -> Option<Target> {
    let allowed_flags = if entry.type_ == KVM_IRQ_ROUTING_MSI { KVM_MSI_VALID_DEVID } else { 0 };
    if entry.flags & !allowed_flags != 0 {
        return None;
    }
    match entry.type_ {
        KVM_IRQ_ROUTING_IRQCHIP if !rules.split => {
            let (chip, pin) = image::routed_pin(entry);
            match chip {
                KVM_IRQCHIP_PIC_MASTER if pin < 8 => Some(Target::Pin(Chip::PicMaster, pin as u8)),
                KVM_IRQCHIP_PIC_SLAVE if pin < 8 => Some(Target::Pin(Chip::PicSlave, pin as u8 + 8)),
                KVM_IRQCHIP_IOAPIC if pin < IOAPIC_PINS as u32 => Some(Target::Pin(Chip::IoApic, pin as u8)),
                _ => None,
            }
        }
        KVM_IRQ_ROUTING_MSI => {
            let msi = image::routed_msi(entry);
            msi_is_valid(msi, rules.extended_ids).then_some(Target::Msi(msi))
        }
        _ => None,
    }
}

/// Who wants to know what the guest does with an interrupt line.
pub trait LineListener: Send + Sync {
    /// The guest has ended the line's interrupt.
    fn acknowledged(&self, gsi: u32);

    /// The guest has masked or unmasked the line at a controller.
    fn mask_changed(&self, _gsi: u32, _masked: bool) {}

    /// A level interrupt is being unmasked whose line may be low by now: tell the device to raise it again if it is
    /// not. False if that is not possible. Called under the IOAPIC's lock: takes leaf locks only.
    fn resample(&self, _gsi: u32) -> bool {
        false
    }
}

/// The present routing table and the listeners, shared by all controllers.
#[derive(Default)]
pub struct Routing {
    table: RwLock<Arc<RoutingTable>>,
    listeners: RwLock<Vec<(u32, Arc<dyn LineListener>)>>,
}

impl Routing {
    /// The present table.
    pub fn table(&self) -> Arc<RoutingTable> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts another table in place.
    pub fn replace(&self, table: RoutingTable) {
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
    }

    /// Adds a listener to `gsi`. The IOAPIC has to be told, see `IrqChip::listen`.
    pub(crate) fn listen(&self, gsi: u32, listener: Arc<dyn LineListener>) {
        self.listeners.write().unwrap_or_else(PoisonError::into_inner).push((gsi, listener));
    }

    /// Removes a listener from `gsi`.
    pub(crate) fn unlisten(&self, gsi: u32, listener: &Arc<dyn LineListener>) {
        let other = |(at, known): &(u32, Arc<dyn LineListener>)| *at != gsi || !Arc::ptr_eq(known, listener);
        self.listeners.write().unwrap_or_else(PoisonError::into_inner).retain(other);
    }

    fn listeners_of(&self, chip: Chip, pin: usize) -> Vec<(u32, Arc<dyn LineListener>)> {
        let Some(gsi) = self.table().gsi_of(chip, pin) else { return Vec::new() };
        let listeners = self.listeners.read().unwrap_or_else(PoisonError::into_inner);
        listeners.iter().filter(|(at, _)| *at == gsi).cloned().collect()
    }

    /// Whether anybody listens to a pin.
    pub(crate) fn has_listener(&self, chip: Chip, pin: usize) -> bool {
        !self.listeners_of(chip, pin).is_empty()
    }

    /// The guest has ended the interrupt of a pin.
    pub(crate) fn acknowledged(&self, chip: Chip, pin: usize) {
        for (gsi, listener) in self.listeners_of(chip, pin) {
            listener.acknowledged(gsi);
        }
    }

    /// The guest has masked or unmasked a pin.
    pub(crate) fn mask_changed(&self, chip: Chip, pin: usize, masked: bool) {
        for (gsi, listener) in self.listeners_of(chip, pin) {
            listener.mask_changed(gsi, masked);
        }
    }

    /// Asks whoever drives a pin to raise it again; false if nobody can.
    pub(crate) fn resample(&self, chip: Chip, pin: usize) -> bool {
        let mut any = false;
        for (gsi, listener) in self.listeners_of(chip, pin) {
            any |= listener.resample(gsi);
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin(gsi: u32, chip: u32, pin: u32) -> kvm_irq_routing_entry {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip = kvm_bindings::kvm_irq_routing_irqchip { irqchip: chip, pin };
        entry
    }

    fn msi(gsi: u32, address_lo: u32, address_hi: u32) -> kvm_irq_routing_entry {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
        entry.u.msi = kvm_bindings::kvm_irq_routing_msi { address_lo, address_hi, ..Default::default() };
        entry
    }

    #[test]
    fn default_table_is_that_of_a_pc() {
        let table = RoutingTable::default_pc();
        assert_eq!(table.targets(0), [Target::Pin(Chip::IoApic, 0), Target::Pin(Chip::PicMaster, 0)]);
        assert_eq!(table.targets(12), [Target::Pin(Chip::IoApic, 12), Target::Pin(Chip::PicSlave, 12)]);
        assert_eq!(table.targets(23), [Target::Pin(Chip::IoApic, 23)]);
        assert_eq!(table.targets(24), []);
        assert_eq!(table.gsi_of(Chip::PicSlave, 12), Some(12));
        assert_eq!(table.gsi_of(Chip::PicMaster, 12), None);
    }

    #[test]
    fn entries_are_checked() {
        let with = |change: fn(&mut kvm_irq_routing_entry)| {
            let mut entry = pin(1, KVM_IRQCHIP_IOAPIC, 1);
            change(&mut entry);
            entry
        };
        let ours = RoutingRules::default();
        let split = RoutingRules { split: true, ..ours };
        let extended = RoutingRules { extended_ids: true, ..ours };
        let cases: &[(&str, Vec<kvm_irq_routing_entry>, RoutingRules, bool)] = &[
            ("empty", vec![], ours, true),
            ("one GSI to each chip", vec![pin(4, 0, 4), pin(4, 1, 0), pin(4, 2, 4)], ours, true),
            ("twice to one chip", vec![pin(4, 2, 4), pin(4, 2, 5)], ours, false),
            ("two GSIs to one pin", vec![pin(4, 2, 4), pin(5, 2, 4)], ours, true),
            ("MSI", vec![msi(100, 0xfee0_0000, 0)], ours, true),
            ("MSI beside a pin", vec![pin(4, 2, 4), msi(4, 0xfee0_0000, 0)], ours, false),
            ("two MSIs", vec![msi(4, 0xfee0_0000, 0), msi(4, 0xfee0_0000, 0)], ours, false),
            ("PIC pin 8", vec![pin(4, 0, 8)], ours, false),
            ("IOAPIC pin 24", vec![pin(4, 2, 24)], ours, false),
            ("no such chip", vec![pin(4, 3, 0)], ours, false),
            ("last GSI", vec![pin(MAX_ROUTES - 1, 2, 0)], ours, true),
            ("GSI too high", vec![pin(MAX_ROUTES, 2, 0)], ours, false),
            ("no such type", vec![with(|entry| entry.type_ = 9)], ours, false),
            ("flags at a pin", vec![with(|entry| entry.flags = 1)], ours, false),
            ("pin in a split irqchip", vec![pin(4, 2, 4)], split, false),
            ("MSI in a split irqchip", vec![msi(4, 0xfee0_0000, 0)], split, true),
            ("reserved address bits", vec![msi(4, 0xfee0_0000, 1)], extended, false),
            ("extended destination", vec![msi(4, 0xfee0_0000, 0x100)], extended, true),
        ];
        for (name, entries, rules, valid) in cases {
            assert_eq!(RoutingTable::new(entries, *rules).is_ok(), *valid, "{name}");
        }
    }
}
