//! The unions in KVM's structures. All their members are plain integers without padding bytes of their own, so any
//! bit pattern is a value of every member.

#![expect(unsafe_code, reason = "reading a member of a C union")]

use kvm_bindings::{kvm_ioapic_state, kvm_irq_routing_entry, kvm_irqchip, kvm_pic_state};

use super::bus::Msi;
use crate::routing::IOAPIC_PINS;

/// Chip and pin of a `KVM_IRQ_ROUTING_IRQCHIP` entry.
pub(crate) fn routed_pin(entry: &kvm_irq_routing_entry) -> (u32, u32) {
    // SAFETY: integers only, and the whole entry is initialised.
    let pin = unsafe { entry.u.irqchip };
    (pin.irqchip, pin.pin)
}

/// The message of a `KVM_IRQ_ROUTING_MSI` entry.
pub(crate) fn routed_msi(entry: &kvm_irq_routing_entry) -> Msi {
    // SAFETY: integers only, and the whole entry is initialised.
    let msi = unsafe { entry.u.msi };
    Msi { address_lo: msi.address_lo, address_hi: msi.address_hi, data: msi.data }
}

/// The 8259 in a `kvm_irqchip`.
pub(crate) fn pic(chip: &kvm_irqchip) -> kvm_pic_state {
    // SAFETY: integers only, and the whole structure is initialised.
    unsafe { chip.chip.pic }
}

/// The IOAPIC in a `kvm_irqchip`.
pub(crate) fn ioapic(chip: &kvm_irqchip) -> kvm_ioapic_state {
    // SAFETY: integers only, and the whole structure is initialised.
    unsafe { chip.chip.ioapic }
}

/// The redirection table of an IOAPIC.
pub(crate) fn redirection(state: &kvm_ioapic_state) -> [u64; IOAPIC_PINS] {
    // SAFETY: integers only, and the whole structure is initialised.
    state.redirtbl.map(|entry| unsafe { entry.bits })
}
