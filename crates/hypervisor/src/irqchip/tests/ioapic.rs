//! Tests of the IOAPIC through its registers.

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use super::*;

const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;
const REMOTE_IRR: u32 = 1 << 14;

#[test]
fn registers() {
    let machine = Machine::enabled(1);
    assert_eq!(machine.ioapic_read(1), 0x0017_0011);
    assert_eq!(machine.ioapic_read(0x10), MASKED);
    machine.ioapic_write(0, 0xffff_ffff);
    assert_eq!((machine.ioapic_read(0), machine.ioapic_read(2)), (0x0f00_0000, 0x0f00_0000));
    machine.ioapic_write(1, 0);
    assert_eq!(machine.ioapic_read(1), 0x0017_0011);
    machine.ioapic_write(0x3e, 0xffff_ffff);
    assert_eq!(machine.ioapic_read(0x3e), !(REMOTE_IRR | 1 << 12), "read-only bits");
    for index in [0x40, 0x50, 0x0f, 0xff] {
        machine.ioapic_write(index, 0x1234);
        assert_eq!(machine.ioapic_read(index), 0xffff_ffff, "{index:#x} does not exist");
    }
    let cpu = &machine.cpus[0];
    let mut wide = [1; 8];
    assert!(machine.chip.mmio_read(cpu, 0xfec0_0000, &mut wide));
    assert_eq!(wide, [0xff, 0, 0, 0, 0, 0, 0, 0]);
    let mut odd = [1; 3];
    assert!(
        machine.chip.mmio_read(cpu, 0xfec0_0000, &mut odd) && machine.chip.mmio_write(cpu, 0xfec0_0000, &odd)
    );
    assert_eq!(odd, [0; 3]);
    assert!(
        !machine.chip.mmio_read(cpu, 0xfec0_0100, &mut wide)
            && !machine.chip.mmio_write(cpu, 0xfebf_ffff, &wide)
    );
}

#[test]
fn edges() {
    let machine = Machine::enabled(1);
    machine.redirect(5, 0, 0x45);
    let lapic = &machine.cpus[0];
    assert_eq!(machine.chip.irq_line_status(5, true).status(), 2, "both controllers");
    assert_eq!(lapic.acknowledge(), Some(0x45));
    machine.write(0, reg::EOI, 0);
    machine.chip.irq_line(5, true);
    assert!(!lapic.has_interrupt(), "no second edge");
    machine.chip.irq_line(5, false);
    machine.chip.irq_line(5, true);
    assert!(lapic.has_interrupt());
    assert_eq!(machine.redirection(5) & REMOTE_IRR, 0);
    assert_eq!(
        machine.chip.ioapic().expect("not split").state().irr,
        0,
        "a delivered edge is not in the image"
    );
}

#[test]
fn a_masked_edge_is_kept_in_the_image_only() {
    let machine = Machine::enabled(1);
    machine.redirect(20, 0, MASKED | 0x45);
    assert_eq!(machine.chip.irq_line_status(20, true), Delivery::Ignored);
    machine.redirect(20, 0, 0x45);
    assert!(!machine.cpus[0].has_interrupt(), "unmasking does not deliver edges");
    let image = machine.chip.chip_state(KVM_IRQCHIP_IOAPIC).expect("a chip");
    machine.chip.set_chip_state(&image).expect("its image");
    assert_eq!(machine.cpus[0].acknowledge(), Some(0x45), "restoring does");
}

#[test]
fn levels_are_delivered_again_while_high() {
    let machine = Machine::enabled(1);
    machine.redirect(20, 0, LEVEL | 0x45);
    let lapic = &machine.cpus[0];
    machine.chip.irq_line(20, true);
    assert_eq!(machine.redirection(20) & REMOTE_IRR, REMOTE_IRR);
    for _ in 0..3 {
        assert_eq!(lapic.acknowledge(), Some(0x45));
        assert_eq!(machine.chip.irq_line_status(20, true), Delivery::Ignored, "waits for the EOI");
        assert_eq!(lapic.next_interrupt(), None);
        machine.write(0, reg::EOI, 0);
    }
    assert_eq!(lapic.acknowledge(), Some(0x45));
    machine.chip.irq_line(20, false);
    machine.write(0, reg::EOI, 0);
    assert_eq!((lapic.next_interrupt(), machine.redirection(20) & REMOTE_IRR), (None, 0));
}

#[test]
fn a_masked_level_comes_when_unmasked() {
    let machine = Machine::enabled(1);
    machine.redirect(20, 0, MASKED | LEVEL | 0x45);
    machine.chip.irq_line(20, true);
    assert!(!machine.cpus[0].has_interrupt());
    machine.redirect(20, 0, LEVEL | 0x45);
    assert_eq!(machine.cpus[0].acknowledge(), Some(0x45));
    // Masked in service: the EOI clears remote IRR, unmasking delivers.
    machine.redirect(20, 0, MASKED | LEVEL | 0x45);
    machine.write(0, reg::EOI, 0);
    assert_eq!((machine.cpus[0].next_interrupt(), machine.redirection(20) & REMOTE_IRR), (None, 0));
    machine.redirect(20, 0, LEVEL | 0x45);
    assert_eq!(machine.cpus[0].next_interrupt(), Some(0x45));
    // To edge and back ends it, as Linux does without an EOI register.
    machine.redirect(20, 0, MASKED | 0x45);
    machine.redirect(20, 0, MASKED | LEVEL | 0x45);
    assert_eq!(machine.redirection(20) & REMOTE_IRR, 0);
}

#[test]
fn delivery_modes() {
    for (low, events, vector) in [
        (0x45, (false, 0, false), Some(0x45)),
        (0x145, (false, 0, false), Some(0x45)),
        (0x245, (true, 0, false), None),
        (0x445, (false, 1, false), None),
        (0x545, (false, 0, true), None),
        (0x745, (false, 0, false), None),
    ] {
        let machine = Machine::enabled(1);
        machine.redirect(20, 0, low);
        machine.chip.irq_line(20, true);
        let taken = machine.cpus[0].take_events(false);
        assert_eq!((taken.smi, taken.nmi, taken.init), events, "{low:#x}");
        assert_eq!(machine.cpus[0].next_interrupt(), vector, "{low:#x}");
    }
}

#[test]
fn an_eoi_ends_every_pin_with_the_vector_on_any_cpu() {
    let machine = Machine::enabled(2);
    machine.redirect(20, 1, LEVEL | 0x45);
    machine.redirect(21, 1, LEVEL | 0x45);
    machine.chip.irq_line(20, true);
    machine.chip.irq_line(21, true);
    machine.chip.irq_line(20, false);
    machine.chip.irq_line(21, false);
    assert_eq!(machine.cpus[1].acknowledge(), Some(0x45));
    machine.write(1, reg::EOI, 0);
    assert_eq!((machine.redirection(20) | machine.redirection(21)) & REMOTE_IRR, 0);
}

#[test]
fn a_storm_is_slowed_down() {
    let machine = Machine::enabled(1);
    machine.redirect(20, 0, LEVEL | 0x45);
    machine.chip.irq_line(20, true);
    let mut deliveries = 0;
    while machine.cpus[0].acknowledge().is_some() {
        deliveries += 1;
        machine.write(0, reg::EOI, 0);
    }
    assert_eq!(deliveries, 10_000);
    machine.pass(9_999_999);
    assert!(!machine.cpus[0].has_interrupt());
    machine.pass(1);
    assert_eq!(machine.cpus[0].next_interrupt(), Some(0x45));
}

#[test]
fn userspace_hears_of_lost_rtc_interrupts() {
    let machine = Machine::enabled(2);
    machine.redirect(8, 0xff, 0x48);
    let pulse = || {
        let delivery = machine.chip.ioapic().expect("not split").set_irq(8, IrqSource::USERSPACE, true, true);
        machine.chip.irq_line(8, false);
        delivery
    };
    assert_eq!(pulse(), Delivery::Delivered(2));
    assert_eq!(pulse(), Delivery::Coalesced);
    for cpu in 0..2 {
        assert_eq!(pulse(), Delivery::Coalesced);
        assert_eq!(machine.cpus[cpu].acknowledge(), Some(0x48));
        machine.write(cpu, reg::EOI, 0);
    }
    assert_eq!(pulse(), Delivery::Delivered(2));
}

/// Remembers what it is told.
#[derive(Default)]
struct Device {
    told: Mutex<Vec<String>>,
    can_resample: AtomicBool,
}

impl Device {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.told.lock().expect("no panic"))
    }

    fn note(&self, what: String) {
        self.told.lock().expect("no panic").push(what);
    }
}

impl LineListener for Device {
    fn acknowledged(&self, gsi: u32) {
        self.note(format!("ack {gsi}"));
    }

    fn mask_changed(&self, gsi: u32, masked: bool) {
        self.note(format!("mask {gsi} {masked}"));
    }

    fn resample(&self, gsi: u32) -> bool {
        self.note(format!("resample {gsi}"));
        self.can_resample.load(Ordering::SeqCst)
    }
}

#[test]
fn listeners() {
    let machine = Machine::enabled(1);
    let device = Arc::new(Device::default());
    let listener: Arc<dyn LineListener> = Arc::clone(&device) as _;
    machine.redirect(20, 0, 0x45);
    machine.chip.listen(20, Arc::clone(&listener));
    machine.chip.irq_line(20, true);
    machine.cpus[0].acknowledge();
    machine.write(0, reg::EOI, 0);
    assert_eq!(device.take(), ["ack 20"], "edges too");
    machine.redirect(20, 0, MASKED | LEVEL | 0x45);
    assert_eq!(device.take(), ["mask 20 true"]);
    // Unmasking a level that may be stale asks the device, if it can be asked.
    device.can_resample.store(true, Ordering::SeqCst);
    machine.redirect(20, 0, LEVEL | 0x45);
    assert_eq!(device.take(), ["resample 20", "mask 20 false"]);
    assert!(!machine.cpus[0].has_interrupt());
    machine.redirect(20, 0, MASKED | LEVEL | 0x45);
    machine.chip.irq_line(20, true);
    device.can_resample.store(false, Ordering::SeqCst);
    machine.redirect(20, 0, LEVEL | 0x45);
    assert!(machine.cpus[0].has_interrupt());
    device.take();
    machine.chip.unlisten(20, &listener);
    machine.cpus[0].acknowledge();
    machine.write(0, reg::EOI, 0);
    assert!(device.take().is_empty());
}
