//! Tests of the 8259 pair through its ports.

use super::*;

/// Initialises both chips as Linux does; ICW4 as given.
fn initialized(icw4: u8) -> Machine {
    let machine = Machine::new(1);
    for (command, data, base, cascade) in [(0x20, 0x21, 0x30, 0x04), (0xa0, 0xa1, 0x38, 0x02)] {
        machine.out(command, 0x11);
        machine.out(data, base);
        machine.out(data, cascade);
        machine.out(data, icw4);
    }
    machine
}

fn take(machine: &Machine) -> Option<u8> {
    machine.chip.has_extint(&machine.cpus[0]).then(|| machine.chip.pic().expect("not split").acknowledge())
}

fn pulse(machine: &Machine, irq: u32) {
    machine.chip.irq_line(irq, true);
    machine.chip.irq_line(irq, false);
}

#[test]
fn linux_handles_interrupts() {
    let machine = initialized(0x01);
    machine.out(0x21, 0xfb);
    machine.out(0xa1, 0xff);
    pulse(&machine, 0);
    assert_eq!(take(&machine), None, "masked");
    machine.out(0x21, 0xfa);
    assert_eq!(take(&machine), Some(0x30), "the edge is remembered");
    pulse(&machine, 0);
    assert_eq!(take(&machine), None, "in service");
    machine.out(0x20, 0x60);
    assert_eq!(take(&machine), Some(0x30));
    machine.out(0x20, 0x60);
    // The slave's interrupts come by input 2, and need two EOIs.
    machine.out(0xa1, 0xef);
    pulse(&machine, 12);
    assert_eq!(take(&machine), Some(0x3c));
    machine.out(0xa0, 0x0b);
    assert_eq!(machine.inb(0xa0), 0x10, "in service at the slave");
    machine.out(0x20, 0x0b);
    assert_eq!(machine.inb(0x20), 0x04, "and at the master");
    machine.out(0xa0, 0x64);
    machine.out(0x20, 0x62);
    assert_eq!((machine.inb(0x20), machine.inb(0xa0), take(&machine)), (0, 0, None));
}

#[test]
fn lower_numbers_come_first_and_interrupt_higher_ones() {
    let machine = initialized(0x01);
    for irq in [7, 5, 9, 1] {
        pulse(&machine, irq);
    }
    assert_eq!(take(&machine), Some(0x31));
    assert_eq!(take(&machine), None);
    machine.out(0x20, 0x20);
    assert_eq!(take(&machine), Some(0x39));
    pulse(&machine, 0);
    assert_eq!(take(&machine), Some(0x30));
    for (expected, slave) in [(None, false), (Some(0x35), true), (Some(0x37), false)] {
        machine.out(0x20, 0x20);
        if slave {
            machine.out(0xa0, 0x20);
        }
        assert_eq!(take(&machine), expected);
    }
}

#[test]
fn rotation() {
    // The command after IRQ 3 has been taken, and what then comes of IRQs 2 and 5 together.
    for (command, first) in [(0x20, 0x32), (0x63, 0x32), (0xa0, 0x35), (0xe3, 0x35)] {
        let machine = initialized(0x01);
        machine.out(0xa1, 0xff);
        pulse(&machine, 3);
        assert_eq!(take(&machine), Some(0x33));
        machine.out(0x20, command);
        machine.out(0x20, 0x0a);
        machine.chip.irq_line(5, true);
        machine.chip.pic().expect("not split").set_irq(2, IrqSource::USERSPACE, true);
        let request = machine.inb(0x20);
        assert_eq!(request, 0x24, "{command:#x}");
        // Input 2 is the cascade, so its vector is the slave's spurious one.
        let expected = if first == 0x32 { 0x3f } else { first };
        assert_eq!(take(&machine), Some(expected), "{command:#x}");
    }
    // Set priority: IRQ 4 lowest, so 5 before 1.
    let machine = initialized(0x01);
    machine.out(0x20, 0xc4);
    pulse(&machine, 1);
    pulse(&machine, 5);
    assert_eq!(take(&machine), Some(0x35));
}

#[test]
fn automatic_eoi() {
    let machine = initialized(0x03);
    pulse(&machine, 4);
    pulse(&machine, 6);
    assert_eq!((take(&machine), take(&machine), take(&machine)), (Some(0x34), Some(0x36), None));
    // With rotation the one just taken becomes the last.
    machine.out(0x20, 0x80);
    pulse(&machine, 4);
    assert_eq!(take(&machine), Some(0x34));
    pulse(&machine, 4);
    pulse(&machine, 6);
    assert_eq!(take(&machine), Some(0x36));
}

#[test]
fn special_fully_nested_mode_lets_the_slave_interrupt_itself() {
    for (icw4, second) in [(0x01, None), (0x11, Some(0x39))] {
        let machine = initialized(icw4);
        pulse(&machine, 12);
        assert_eq!(take(&machine), Some(0x3c));
        pulse(&machine, 9);
        assert_eq!(take(&machine), second, "{icw4:#x}");
    }
}

#[test]
fn level_triggered_inputs() {
    let machine = initialized(0x01);
    machine.out(0x4d0, 0xff);
    machine.out(0x4d1, 0xff);
    assert_eq!(
        (machine.inb(0x4d0), machine.inb(0x4d1)),
        (0xf8, 0xde),
        "timer, keyboard, RTC and FPU stay edges"
    );
    machine.chip.irq_line(10, true);
    for _ in 0..2 {
        assert_eq!(take(&machine), Some(0x3a));
        machine.out(0xa0, 0x62);
        machine.out(0x20, 0x62);
    }
    assert_eq!(take(&machine), Some(0x3a));
    machine.chip.irq_line(10, false);
    machine.out(0xa0, 0x62);
    machine.out(0x20, 0x62);
    assert_eq!(take(&machine), None);
}

#[test]
fn requests_that_go_are_spurious() {
    let machine = initialized(0x01);
    machine.out(0x4d0, 0xf8);
    machine.out(0x4d1, 0xde);
    machine.chip.irq_line(5, true);
    machine.chip.irq_line(5, false);
    let pic = machine.chip.pic().expect("not split");
    assert!(!pic.pending());
    assert_eq!(pic.acknowledge(), 0x37);
    machine.chip.irq_line(10, true);
    machine.chip.irq_line(10, false);
    assert_eq!(pic.acknowledge(), 0x3f);
}

#[test]
fn polling() {
    let machine = initialized(0x01);
    machine.out(0x20, 0x0c);
    assert_eq!(machine.inb(0x20), 0x07, "nothing");
    pulse(&machine, 5);
    machine.out(0x20, 0x0c);
    assert_eq!(machine.inb(0x20), 0x85);
    machine.out(0x20, 0x0a);
    assert_eq!(machine.inb(0x20), 0, "taken");
    pulse(&machine, 9);
    machine.out(0xa0, 0x0c);
    assert_eq!(machine.inb(0xa0), 0x81);
    assert_eq!(take(&machine), None);
}

#[test]
fn registers_and_widths() {
    let machine = initialized(0x01);
    machine.out(0x21, 0x5a);
    assert_eq!(machine.inb(0x21), 0x5a);
    assert_eq!(machine.chip.pio_read(0x21, 2), Some(0));
    assert!(machine.chip.pio_write(0x21, 0, 2));
    assert_eq!(machine.inb(0x21), 0x5a, "only bytes");
    machine.out(0x20, 0x11);
    assert_eq!(machine.inb(0x21), 0, "ICW1 clears the mask");
    machine.out(0x21, 0x47);
    assert_eq!(machine.chip.pic().expect("not split").state(0).irq_base, 0x40, "bits 2:0 are the input's");
    // Without ICW4 there are two words after ICW1.
    machine.out(0x20, 0x10);
    machine.out(0x21, 0x30);
    machine.out(0x21, 0x04);
    machine.out(0x21, 0x77);
    assert_eq!(machine.inb(0x21), 0x77);
}

#[test]
fn a_request_wakes_once() {
    let machine = initialized(0x01);
    machine.kicks[0].take();
    pulse(&machine, 5);
    pulse(&machine, 6);
    assert_eq!(machine.kicks[0].take(), 1);
    assert_eq!(take(&machine), Some(0x35));
    machine.out(0x20, 0x20);
    assert_eq!(machine.kicks[0].take(), 1, "the next one");
}
