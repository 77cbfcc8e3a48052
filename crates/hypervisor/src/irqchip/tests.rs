//! Tests of the controllers together: what reaches which vCPU, by which way.

mod ioapic;
mod pic;
mod pit;
mod random;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, kvm_irq_routing_msi};

use super::testing::{Machine, reg};
use super::*;

const MSI_LEVEL: u32 = 1 << 15 | 1 << 14;

fn msi_route(gsi: u32, address_lo: u32, data: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi { address_lo, data, ..Default::default() };
    entry
}

fn receivers(machine: &Machine, vector: u8) -> Vec<usize> {
    (0..machine.cpus.len()).filter(|&cpu| machine.cpus[cpu].awaits_eoi(vector)).collect()
}

#[test]
fn msi_destinations() {
    // Address bits besides 0xfee, CPUs in x2APIC mode, receivers.
    let cases: &[(u32, bool, &[usize])] = &[
        (2 << 12, false, &[2]),
        (7 << 12, false, &[]),
        (0xff << 12, false, &[0, 1, 2]),
        (0xff << 12, true, &[0, 1, 2]),
        (6 << 12 | 1 << 2, false, &[1, 2]),
        (6 << 12 | 1 << 2, true, &[1, 2]),
        // The redirection hint chooses one: 0x51 % 2 = 1.
        (6 << 12 | 1 << 2 | 1 << 3, false, &[2]),
        (1 << 12, true, &[1]),
    ];
    for &(address, x2apic, expected) in cases {
        let machine = Machine::enabled(3);
        for cpu in 0..3 {
            machine.write(cpu, reg::LDR, 1 << (24 + cpu));
            if x2apic {
                machine.enter_x2apic(cpu);
            }
        }
        let msi = Msi { address_lo: 0xfee0_0000 | address, address_hi: 0, data: 0x51 };
        let delivery = machine.chip.send_msi(msi).expect("a valid MSI");
        assert_eq!(receivers(&machine, 0x51), expected, "{address:#x}");
        assert_eq!(delivery.status(), expected.len() as i32);
    }
}

#[test]
fn msi_with_extended_destination() {
    let machine = Machine::enabled(0x102);
    (0..0x102).for_each(|cpu| machine.enter_x2apic(cpu));
    let msi = Msi { address_lo: 0xfee0_1000, address_hi: 0x100, data: 0x51 };
    machine.chip.send_msi(msi).expect("a valid MSI");
    assert_eq!(receivers(&machine, 0x51), [1], "the upper address is ignored");
    machine.chip.settings().x2apic_format.store(true, Ordering::Relaxed);
    machine.chip.send_msi(msi).expect("a valid MSI");
    assert_eq!(receivers(&machine, 0x51), [1, 0x101]);
    assert_eq!(machine.chip.send_msi(Msi { address_hi: 1, ..msi }), Err(IrqChipError::Invalid));
    // 0xff is a broadcast of a device, unless the quirk is off.
    let broadcast = Msi { address_lo: 0xfeef_f000, address_hi: 0, data: 0x52 };
    machine.chip.settings().broadcast_quirk_disabled.store(true, Ordering::Relaxed);
    machine.chip.send_msi(broadcast).expect("a valid MSI");
    assert_eq!(receivers(&machine, 0x52), [0xff]);
    machine.chip.settings().broadcast_quirk_disabled.store(false, Ordering::Relaxed);
    machine.chip.send_msi(broadcast).expect("a valid MSI");
    assert_eq!(receivers(&machine, 0x52).len(), 0x102);
}

#[test]
fn a_line_goes_to_both_controllers() {
    let machine = Machine::enabled(1);
    machine.redirect(4, 0, 0x44);
    machine.out(0x20, 0x11);
    machine.out(0x21, 0x20);
    machine.out(0x21, 0x04);
    machine.out(0x21, 0x01);
    machine.kicks[0].take();
    let delivery = machine.chip.irq_line_status(4, true);
    assert_eq!(delivery, Delivery::Delivered(2));
    assert!(machine.kicks[0].take() >= 2);
    let lapic = &machine.cpus[0];
    assert!(machine.chip.has_interrupt(lapic) && machine.chip.has_extint(lapic));
    assert_eq!(machine.chip.acknowledge(lapic), Some(0x24), "the 8259's comes first");
    assert_eq!(machine.chip.acknowledge(lapic), Some(0x44));
    assert_eq!(machine.chip.acknowledge(lapic), None);
    assert_eq!(
        machine.chip.irq_line_status(4, true),
        Delivery::Delivered(1),
        "no edge; the 8259 does not tell"
    );
    assert_eq!(machine.chip.acknowledge(lapic), None);
    assert_eq!(machine.chip.irq_line_status(24, true), Delivery::Ignored);
    assert_eq!(machine.chip.irq_line_status(u32::MAX, true), Delivery::Ignored);
}

#[test]
fn the_8259_needs_lint0() {
    let machine = Machine::enabled(2);
    machine.chip.irq_line(3, true);
    assert!(machine.chip.has_interrupt(&machine.cpus[0]));
    assert!(!machine.chip.has_interrupt(&machine.cpus[1]), "masked after reset");
    machine.write(0, reg::LVT_LINT0, 0x1_0700);
    machine.write(1, reg::LVT_LINT0, 0x700);
    assert!(!machine.chip.has_interrupt(&machine.cpus[0]));
    assert!(machine.chip.has_interrupt(&machine.cpus[1]));
}

#[test]
fn sources_share_a_line() {
    let machine = Machine::enabled(1);
    machine.redirect(10, 0, 0x4a | 1 << 15);
    let chip = &machine.chip;
    let high = || machine.chip.ioapic().expect("not split").state().irr & 1 << 10 != 0;
    for (source, level, expected) in [
        (IrqSource::USERSPACE, true, true),
        (IrqSource::RESAMPLE, true, true),
        (IrqSource::USERSPACE, false, true),
        (IrqSource::USERSPACE, false, true),
        (IrqSource::RESAMPLE, false, false),
    ] {
        chip.set_irq(source, 10, level);
        assert_eq!(high(), expected, "{source:?} {level}");
    }
}

#[test]
fn routes_can_be_replaced() {
    let machine = Machine::enabled(1);
    let routes = [msi_route(4, 0xfee0_0000, 0x71), msi_route(30, 0xfee0_0000, 0x72)];
    machine.chip.set_gsi_routing(&routes).expect("valid routes");
    assert_eq!(machine.chip.irq_line_status(30, true), Delivery::Delivered(1));
    assert_eq!(machine.chip.irq_line_status(30, false), Delivery::Ignored);
    assert_eq!(machine.chip.irq_line_status(5, true), Delivery::Ignored, "no route any more");
    assert_eq!(machine.cpus[0].acknowledge(), Some(0x72));
    assert!(machine.chip.set_gsi_routing(&[routes[0], routes[0]]).is_err());
    assert_eq!(
        machine.chip.irq_line_status(4, true),
        Delivery::Delivered(1),
        "a refused table changes nothing"
    );
}

#[test]
fn a_split_irqchip_tells_userspace_of_eois() {
    let machine = Machine::of_kind(IrqChipKind::Split { reserved_pins: 24 }, 1);
    machine.enable();
    let routes = [
        msi_route(4, 0xfee0_0000, MSI_LEVEL | 0x71),
        msi_route(5, 0xfee0_0000, 0x72),
        msi_route(30, 0xfee0_0000, MSI_LEVEL | 0x73),
    ];
    machine.chip.set_gsi_routing(&routes).expect("valid routes");
    for (gsi, vector, told) in [(4, 0x71, Some(0x71)), (5, 0x72, None), (30, 0x73, None)] {
        machine.chip.irq_line(gsi, true);
        assert_eq!(machine.cpus[0].acknowledge(), Some(vector));
        assert_eq!(machine.chip.eoi_left_to_memory(&machine.cpus[0]).is_none(), told.is_some());
        machine.write(0, reg::EOI, 0);
        assert_eq!(machine.cpus[0].take_events(false).ioapic_eoi, told);
    }
    assert!(machine.chip.chip_state(KVM_IRQCHIP_IOAPIC).is_err());
    assert!(machine.chip.create_pit(true).is_err());
    assert_eq!(machine.chip.pio_read(0x20, 1), None);
    assert!(!machine.chip.mmio_read(&machine.cpus[0], 0xfec0_0000, &mut [0; 4]));
}

#[test]
fn images_of_the_chips() {
    let machine = Machine::enabled(1);
    machine.out(0x21, 0xab);
    machine.out(0xa1, 0xcd);
    machine.redirect(3, 0, 0x1_0043);
    let other = Machine::enabled(1);
    for chip_id in 0..3 {
        let image = machine.chip.chip_state(chip_id).expect("a chip");
        other.chip.set_chip_state(&image).expect("its image");
    }
    assert_eq!((other.inb(0x21), other.inb(0xa1), other.redirection(3)), (0xab, 0xcd, 0x1_0043));
    assert_eq!(machine.chip.chip_state(3).err(), Some(IrqChipError::Invalid));
    let wrong = kvm_irqchip { chip_id: 3, ..Default::default() };
    assert_eq!(machine.chip.set_chip_state(&wrong), Err(IrqChipError::Invalid));
}

#[test]
fn hostile_images_do_no_harm() {
    for byte in [0x55u8, 0xaa, 0xff] {
        let machine = Machine::enabled(2);
        machine.chip.create_pit(true).expect("the first");
        for chip_id in 0..3 {
            let mut image = kvm_irqchip { chip_id, ..Default::default() };
            image.chip.dummy = [byte as i8; 512];
            machine.chip.set_chip_state(&image).expect("any image is taken");
        }
        for gsi in 0..24 {
            machine.chip.irq_line(gsi, true);
            machine.chip.irq_line(gsi, false);
        }
        for port in [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61] {
            (0..=255).for_each(|value| machine.out(port, value));
            (0..4).for_each(|_| _ = machine.inb(port));
            machine.chip.acknowledge(&machine.cpus[0]);
        }
        machine.pass(50_000_000);
    }
}

#[test]
fn ids_and_the_pit_exist_once() {
    let machine = Machine::new(1);
    assert_eq!(machine.chip.create_lapic(0, false).err(), Some(IrqChipError::Exists));
    assert!(machine.chip.create_pit(false).is_ok());
    assert_eq!(machine.chip.create_pit(false).err(), Some(IrqChipError::Exists));
    assert_eq!(machine.chip.pio_read(0x61, 1), None, "no speaker asked for");
}

#[test]
fn nothing_keeps_a_dead_vm_alive() {
    let machine = Machine::enabled(2);
    machine.chip.create_pit(true).expect("the first");
    machine.write(0, reg::TIMER_INITIAL, 1_000_000);
    let (chip, lapic) = (Arc::downgrade(&machine.chip), Arc::downgrade(&machine.cpus[0]));
    drop(machine);
    assert!(chip.upgrade().is_none() && lapic.upgrade().is_none());
}

#[test]
fn paravirtual_ipis_go_to_a_set() {
    let machine = Machine::enabled(4);
    machine.enter_x2apic(3);
    let message = Message::from_icr(0x61, 0);
    assert_eq!(machine.chip.bus().send_to_set(&message, 1, 0b1101), 2);
    assert_eq!(receivers(&machine, 0x61), [1, 3]);
}

#[test]
fn an_eoi_is_left_to_memory_if_nobody_wants_it() {
    let machine = Machine::enabled(1);
    let (chip, lapic) = (&machine.chip, &machine.cpus[0]);
    machine.redirect(20, 0, 0x45 | 1 << 15);
    machine.redirect(21, 0, 0x56);
    assert_eq!(chip.eoi_left_to_memory(lapic), None, "nothing in service");
    for (gsi, vector, expected) in [(20, 0x45, None), (21, 0x56, Some(0x56))] {
        chip.irq_line(gsi, true);
        chip.irq_line(gsi, false);
        assert_eq!(lapic.acknowledge(), Some(vector));
        assert_eq!(chip.eoi_left_to_memory(lapic), expected);
        machine.write(0, reg::EOI, 0);
    }
    chip.irq_line(21, true);
    lapic.acknowledge();
    machine.send(0, 0, 0x31);
    assert_eq!(chip.eoi_left_to_memory(lapic), None, "another one waits");
}
