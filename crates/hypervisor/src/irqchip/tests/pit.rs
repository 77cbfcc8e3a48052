//! Tests of the 8254 through its ports, on virtual time.

use kvm_bindings::{KVM_PIT_FLAGS_HPET_LEGACY, kvm_pit_state2};

use super::*;
use crate::irqchip::pit::PIT_HZ;

/// Nanoseconds until `counts` have gone by.
fn ns(counts: u64) -> u64 {
    (counts * 1_000_000_000).div_ceil(PIT_HZ)
}

fn machine() -> Machine {
    let machine = Machine::enabled(1);
    machine.chip.create_pit(true).expect("the first");
    machine
}

fn load(machine: &Machine, channel: u8, mode: u8, count: u16) {
    machine.out(0x43, channel << 6 | 0x30 | mode << 1);
    let [low, high] = count.to_le_bytes();
    machine.out(0x40 + u16::from(channel), low);
    machine.out(0x40 + u16::from(channel), high);
}

fn count(machine: &Machine, channel: u8) -> u16 {
    machine.out(0x43, channel << 6);
    let port = 0x40 + u16::from(channel);
    u16::from_le_bytes([machine.inb(port), machine.inb(port)])
}

fn output(machine: &Machine) -> bool {
    machine.inb(0x61) & 0x20 != 0
}

#[test]
fn modes() {
    // Mode, then after so many counts of 1000: the count and the output.
    type Case<'a> = (u8, &'a [(u64, u16, bool)]);
    let cases: &[Case] = &[
        (0, &[(0, 1000, false), (999, 1, false), (1000, 0, true), (1001, 0xffff, true)]),
        (1, &[(0, 1000, true), (999, 1, true), (1000, 0, false), (1002, 0xfffe, false)]),
        (2, &[(0, 1000, false), (1, 999, false), (999, 1, false), (1000, 1000, true), (1001, 999, false)]),
        (
            3,
            &[
                (0, 1000, true),
                (1, 998, true),
                (499, 2, true),
                (500, 1000, false),
                (999, 2, false),
                (1000, 1000, true),
            ],
        ),
        (4, &[(0, 1000, false), (999, 1, false), (1000, 0, true), (1001, 0xffff, false)]),
        (5, &[(0, 1000, false), (1000, 0, true), (1001, 0xffff, false)]),
        (6, &[(1, 999, false), (1000, 1000, true)]),
        (7, &[(499, 2, true), (500, 1000, false)]),
    ];
    for &(mode, points) in cases {
        for &(after, expected, out) in points {
            let machine = machine();
            load(&machine, 2, mode, 1000);
            machine.pass(ns(after));
            assert_eq!((count(&machine, 2), output(&machine)), (expected, out), "mode {mode} after {after}");
        }
    }
}

#[test]
fn bytes_of_the_count() {
    let machine = machine();
    // Low byte only, high byte only.
    machine.out(0x43, 0x90);
    machine.out(0x42, 0x34);
    assert_eq!((machine.inb(0x42), machine.inb(0x42)), (0x34, 0x34));
    machine.out(0x43, 0xa0);
    machine.out(0x42, 0x12);
    assert_eq!((machine.inb(0x42), machine.inb(0x42)), (0x12, 0x12));
    // Both in turn, read without a latch.
    load(&machine, 2, 0, 0x1234);
    assert_eq!((machine.inb(0x42), machine.inb(0x42), machine.inb(0x42)), (0x34, 0x12, 0x34));
    // A count of zero is 65536.
    load(&machine, 1, 2, 0);
    machine.pass(ns(1));
    assert_eq!(count(&machine, 1), 0xffff);
    assert_eq!(machine.inb(0x43), 0, "the control word cannot be read");
}

#[test]
fn latches_hold() {
    let machine = machine();
    load(&machine, 2, 0, 0x1234);
    machine.out(0x43, 0x80);
    machine.pass(ns(0x100));
    machine.out(0x43, 0x80);
    assert_eq!((machine.inb(0x42), machine.inb(0x42)), (0x34, 0x12), "the first latch counts");
    assert_eq!(machine.inb(0x42), 0x34, "then the count runs");
    assert_eq!(machine.inb(0x42), 0x11);
    // Read-back of status and count of channels 1 and 2: the status comes first.
    load(&machine, 1, 3, 0x2000);
    machine.out(0x43, 0xcc);
    assert_eq!(machine.inb(0x42), 0x30, "output low, both bytes, mode 0");
    assert_eq!((machine.inb(0x42), machine.inb(0x42)), (0x34, 0x11));
    assert_eq!((machine.inb(0x41), machine.inb(0x41), machine.inb(0x41)), (0xb6, 0x00, 0x20));
}

#[test]
fn speaker_port() {
    let machine = machine();
    assert_eq!(machine.inb(0x61) & 0x03, 0);
    load(&machine, 2, 3, 1000);
    machine.pass(ns(700));
    assert!(!output(&machine));
    machine.out(0x61, 0x03);
    assert_eq!(machine.inb(0x61) & 0x23, 0x23, "a rising gate starts mode 3 anew");
    machine.out(0x61, 0x00);
    assert_eq!(machine.inb(0x61) & 0x03, 0);
    let refresh = |machine: &Machine| machine.inb(0x61) & 0x10;
    let before = refresh(&machine);
    machine.pass(1 << 14);
    assert_ne!(refresh(&machine), before);
}

/// What Linux does to measure the TSC: channel 2 in mode 0 with the gate open, until the output rises.
#[test]
fn linux_calibrates_by_channel_2() {
    let machine = machine();
    machine.out(0x61, machine.inb(0x61) & !0x02 | 0x01);
    machine.out(0x43, 0xb0);
    let latch = PIT_HZ as u32 / 20;
    machine.out(0x42, latch as u8);
    machine.out(0x42, (latch >> 8) as u8);
    let mut waited = 0;
    while !output(&machine) {
        machine.pass(10_000);
        waited += 10_000;
    }
    assert_eq!(waited, 50_000_000);
}

/// Ticks that have reached the IOAPIC's pin 0, each ended as a guest does.
fn ticks(machine: &Machine) -> u32 {
    let mut count = 0;
    while machine.cpus[0].acknowledge().is_some() {
        count += 1;
        machine.write(0, reg::EOI, 0);
    }
    count
}

#[test]
fn channel_0_interrupts() {
    for (mode, expected) in
        [(0, [1, 0, 0]), (1, [1, 0, 0]), (2, [1, 1, 1]), (3, [1, 1, 1]), (4, [1, 0, 0]), (5, [0; 3])]
    {
        let machine = machine();
        machine.redirect(0, 0, 0x30);
        load(&machine, 0, mode, 11_932);
        machine.pass(ns(11_932) - 1_000);
        assert_eq!(ticks(&machine), 0, "mode {mode}");
        for ticked in expected {
            machine.pass(10_000_000);
            assert_eq!(ticks(&machine), ticked, "mode {mode}");
        }
    }
}

#[test]
fn missed_ticks_are_made_up_for() {
    for (reinject, expected) in [(true, 5), (false, 1)] {
        let machine = machine();
        machine.redirect(0, 0, 0x30);
        machine.chip.pit().expect("created").set_reinject(reinject);
        load(&machine, 0, 2, 11_932);
        (0..5).for_each(|_| machine.pass(ns(11_932)));
        assert_eq!(ticks(&machine), expected);
        assert_eq!(ticks(&machine), 0);
        machine.pass(ns(11_932));
        assert_eq!(ticks(&machine), 1);
    }
}

#[test]
fn ticks_through_the_8259_are_made_up_for() {
    let machine = machine();
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, 0x01), (0x21, 0xfe)] {
        machine.out(port, value);
    }
    load(&machine, 0, 2, 11_932);
    (0..3).for_each(|_| machine.pass(ns(11_932)));
    for _ in 0..3 {
        assert_eq!(machine.chip.acknowledge(&machine.cpus[0]), Some(0x30));
        machine.out(0x20, 0x60);
    }
    assert_eq!(machine.chip.acknowledge(&machine.cpus[0]), None);
}

#[test]
fn unmasking_forgets_missed_ticks() {
    let machine = machine();
    machine.redirect(0, 0, 0x1_0030);
    load(&machine, 0, 2, 11_932);
    (0..5).for_each(|_| machine.pass(ns(11_932)));
    machine.redirect(0, 0, 0x30);
    machine.pass(ns(11_932));
    assert_eq!(ticks(&machine), 1);
}

#[test]
fn a_short_period_is_stretched() {
    let machine = machine();
    machine.redirect(0, 0, 0x30);
    load(&machine, 0, 2, 1);
    let mut total = 0;
    for _ in 0..100 {
        machine.pass(10_000);
        total += ticks(&machine);
    }
    assert!((4..=6).contains(&total), "{total} ticks in a millisecond");
}

#[test]
fn watchdog_at_lint0() {
    let machine = machine();
    machine.write(0, reg::LVT_LINT0, 0x400);
    load(&machine, 0, 2, 11_932);
    machine.pass(ns(11_932));
    assert_eq!(machine.cpus[0].take_events(false).nmi, 1);
    machine.write(0, reg::LVT_LINT0, 0x1_0400);
    machine.pass(ns(11_932));
    assert_eq!(machine.cpus[0].take_events(false).nmi, 0);
}

#[test]
fn image() {
    let machine = machine();
    load(&machine, 0, 2, 11_932);
    load(&machine, 2, 3, 1000);
    machine.out(0x61, 0x03);
    let state = machine.chip.pit().expect("created").state();
    let other = self::machine();
    other.redirect(0, 0, 0x30);
    let pit = other.chip.pit().expect("created");
    pit.set_state(&state);
    assert_eq!(pit.state().flags, state.flags);
    assert_eq!((other.inb(0x61) & 3, count(&other, 2)), (3, 1000));
    other.pass(ns(11_932));
    assert_eq!(ticks(&other), 1);
    // While the HPET has the interrupt, channel 0 is silent and keeps its mode.
    pit.set_state(&kvm_pit_state2 { flags: KVM_PIT_FLAGS_HPET_LEGACY, ..state });
    other.pass(50_000_000);
    assert_eq!((ticks(&other), pit.state().channels[0].mode), (0, 2));
    pit.set_channels(&machine.chip.pit().expect("created").channels());
    pit.reset();
    assert_eq!(pit.state().channels[0].mode, 0xff);
}
