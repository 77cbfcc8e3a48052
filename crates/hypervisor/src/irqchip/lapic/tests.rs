//! Tests of the local APIC, through its registers and on virtual time.

use std::sync::Arc;
use std::thread;

use super::*;
use crate::irqchip::IrqChipKind;
use crate::irqchip::bus::Shorthand;
use crate::irqchip::testing::{FEATURES, Machine, reg};

const MS: u64 = 1_000_000;

fn fixed(vector: u8, level: bool) -> Message {
    Message {
        vector,
        mode: DeliveryMode::Fixed,
        logical: false,
        level,
        assert: true,
        shorthand: Shorthand::None,
        destination: 0,
        redirection_hint: false,
    }
}

#[test]
fn registers_after_reset() {
    let machine = Machine::new(2);
    let cases: &[(u32, u32, &str)] = &[
        (reg::ID, 0x0100_0000, "ID"),
        (0x30, 0x0005_0014, "version"),
        (reg::TPR, 0, "TPR"),
        (reg::LDR, 0, "LDR"),
        (reg::DFR, 0xffff_ffff, "DFR"),
        (reg::SVR, 0xff, "SVR"),
        (0x280, 0, "ESR"),
        (reg::ICR, 0, "ICR"),
        (reg::LVT_TIMER, 0x1_0000, "LVT timer"),
        (0x330, 0x1_0000, "LVT thermal"),
        (0x340, 0x1_0000, "LVT performance"),
        (reg::LVT_LINT0, 0x1_0000, "LVT LINT0"),
        (0x360, 0x1_0000, "LVT LINT1"),
        (0x370, 0x1_0000, "LVT error"),
        (reg::TIMER_INITIAL, 0, "initial count"),
        (reg::TIMER_CURRENT, 0, "current count"),
        (reg::TIMER_DIVIDE, 0, "divide"),
        (0x2f0, 0, "CMCI does not exist"),
        (0x400, 0, "beyond the registers"),
    ];
    for &(register, value, name) in cases {
        assert_eq!(machine.read(1, register), value, "{name}");
    }
    assert_eq!(machine.read(0, reg::LVT_LINT0), 0x700, "the BSP's LINT0 is ExtINT");
    assert_eq!(machine.cpus[0].apic_base(), 0xfee0_0900);
    assert_eq!(machine.cpus[1].apic_base(), 0xfee0_0800);
    machine.cpus[1].set_features(ApicFeatures { cmci: true, ..FEATURES });
    assert_eq!(machine.read(1, 0x30), 0x0006_0014);
    assert_eq!(machine.read(1, 0x2f0), 0x1_0000);
}

#[test]
fn init_keeps_base_and_id() {
    let machine = Machine::enabled(1);
    machine.write(0, reg::ID, 0x0700_0000);
    machine.write(0, reg::TPR, 0x20);
    machine.cpus[0].accept(&fixed(0x41, false));
    machine.cpus[0].reset(true);
    assert_eq!(machine.read(0, reg::ID), 0x0700_0000);
    assert_eq!(machine.read(0, reg::SVR), 0xff);
    assert_eq!(machine.read(0, reg::TPR), 0);
    assert!(!machine.cpus[0].has_interrupt());
    machine.enter_x2apic(0);
    machine.cpus[0].reset(true);
    assert_eq!(machine.cpus[0].apic_base(), 0xfee0_0d00);
    assert_eq!(machine.cpus[0].read_msr(0x80d), Ok(1), "LDR");
    machine.cpus[0].reset(false);
    assert_eq!(machine.cpus[0].apic_base(), 0xfee0_0900);
    assert_eq!(machine.read(0, reg::ID), 0);
}

#[test]
fn register_writes_keep_what_is_writable() {
    let machine = Machine::enabled(1);
    let cases: &[(u32, u32, u32)] = &[
        (reg::ID, 0xffff_ffff, 0xff00_0000),
        (0x30, 0, 0x0005_0014),
        (reg::TPR, 0xffff_ffff, 0xff),
        (reg::LDR, 0xffff_ffff, 0xff00_0000),
        (reg::DFR, 0x0000_0000, 0x0fff_ffff),
        (reg::SVR, 0xffff_ffff, 0x3ff),
        (reg::ICR2, 0xffff_ffff, 0xff00_0000),
        (reg::LVT_TIMER, 0xffff_ffff, 0x0007_10ff),
        (0x330, 0xffff_ffff, 0x0001_17ff),
        (0x340, 0xffff_ffff, 0x0001_17ff),
        (reg::LVT_LINT0, 0xffff_ffff, 0x0001_f7ff),
        (0x360, 0xffff_ffff, 0x0001_f7ff),
        (0x370, 0xffff_ffff, 0x0001_10ff),
        (reg::TIMER_DIVIDE, 0xffff_ffff, 0xb),
    ];
    for &(register, written, read) in cases {
        machine.write(0, register, written);
        assert_eq!(machine.read(0, register), read, "{register:#x}");
    }
    let mut bytes = [0; 2];
    assert!(machine.cpus[0].mmio_read(0x32, &mut bytes));
    assert_eq!(bytes, [5, 0], "the upper half of the version");
    assert!(machine.cpus[0].mmio_write(0x82, &[0, 0, 0, 0]) && machine.cpus[0].mmio_write(0x80, &[0]));
    assert_eq!(machine.read(0, reg::TPR), 0xff, "only aligned 32-bit writes count");
}

#[test]
fn priorities_decide_what_is_delivered() {
    // TPR, vectors in service, requested vectors, the one that is delivered, PPR.
    type Case<'a> = (u32, &'a [u8], &'a [u8], Option<u8>, u32);
    let cases: &[Case] = &[
        (0, &[], &[], None, 0),
        (0, &[], &[0x31, 0x41, 0x32], Some(0x41), 0),
        (0x40, &[], &[0x41, 0x4f], None, 0x40),
        (0x40, &[], &[0x41, 0x50], Some(0x50), 0x40),
        (0x3f, &[], &[0x40], Some(0x40), 0x3f),
        (0, &[0x51], &[0x5f], None, 0x50),
        (0, &[0x51], &[0x60], Some(0x60), 0x50),
        (0x62, &[0x51], &[0x60], None, 0x62),
        (0x51, &[0x51], &[0x61], Some(0x61), 0x51),
        (0, &[], &[0x0f], None, 0),
        (0, &[], &[0x10, 0xff], Some(0xff), 0),
    ];
    for &(tpr, in_service, requested, delivered, ppr) in cases {
        let machine = Machine::enabled(1);
        let lapic = &machine.cpus[0];
        for &vector in in_service {
            assert!(lapic.accept(&fixed(vector, false)));
            assert_eq!(lapic.acknowledge(), Some(vector));
        }
        machine.write(0, reg::TPR, tpr);
        requested.iter().for_each(|&vector| assert!(lapic.accept(&fixed(vector, false))));
        let case = (tpr, in_service, requested);
        assert_eq!(lapic.next_interrupt(), delivered, "{case:x?}");
        assert_eq!(lapic.has_interrupt(), delivered.is_some(), "{case:x?}");
        assert_eq!(machine.read(0, reg::PPR), ppr, "{case:x?}");
        assert_eq!(lapic.acknowledge(), delivered, "{case:x?}");
    }
}

#[test]
fn eoi_ends_the_highest_in_service() {
    let machine = Machine::enabled(1);
    let lapic = &machine.cpus[0];
    for vector in [0x31, 0x52, 0x73] {
        lapic.accept(&fixed(vector, false));
        assert_eq!(lapic.acknowledge(), Some(vector));
    }
    lapic.accept(&fixed(0x45, false));
    for (next, left) in [(None, Some(0x52)), (Some(0x45), Some(0x31)), (Some(0x45), None), (Some(0x45), None)]
    {
        machine.write(0, reg::EOI, 0);
        assert_eq!(lapic.next_interrupt(), next);
        assert_eq!((0..=255).rev().find(|&vector| vector != 0x45 && lapic.awaits_eoi(vector)), left);
    }
}

#[test]
fn cr8_is_the_upper_half_of_tpr() {
    let machine = Machine::enabled(1);
    let lapic = &machine.cpus[0];
    lapic.accept(&fixed(0x55, false));
    lapic.set_cr8(5);
    assert_eq!((machine.read(0, reg::TPR), lapic.cr8(), lapic.has_interrupt()), (0x50, 5, false));
    lapic.set_cr8(4);
    assert_eq!((lapic.tpr(), lapic.has_interrupt()), (0x40, true));
}

#[test]
fn a_kick_comes_only_for_what_can_be_delivered() {
    let machine = Machine::enabled(1);
    let (lapic, kicks) = (&machine.cpus[0], &machine.kicks[0]);
    kicks.take();
    machine.write(0, reg::TPR, 0x40);
    lapic.accept(&fixed(0x41, false));
    assert_eq!(kicks.take(), 0);
    lapic.accept(&fixed(0x51, false));
    assert_eq!(kicks.take(), 1);
    lapic.queue_nmi();
    assert_eq!(kicks.take(), 1);
}

#[test]
fn a_disabled_apic_accepts_nothing_and_keeps_what_it_has() {
    let machine = Machine::new(1);
    let lapic = &machine.cpus[0];
    assert!(!lapic.accept(&fixed(0x41, false)), "software-disabled after reset");
    machine.enable();
    machine.write(0, reg::LVT_TIMER, 0x31);
    assert!(lapic.accept(&fixed(0x41, false)));
    machine.write(0, reg::SVR, 0xff);
    assert_eq!(machine.read(0, reg::LVT_TIMER), 0x1_0031, "the LVT is masked");
    machine.write(0, reg::LVT_TIMER, 0x32);
    assert_eq!(machine.read(0, reg::LVT_TIMER), 0x1_0032, "and stays so");
    assert_eq!(lapic.next_interrupt(), Some(0x41));
    lapic.set_apic_base(0xfee0_0000, false).expect("disabling is legal");
    assert!(!lapic.has_interrupt());
    assert!(lapic.accepts_pic());
    let mut data = [0; 4];
    assert!(lapic.mmio_read(0x30, &mut data), "the hole is ours while the quirk is on");
    assert_eq!(data, [0xff; 4]);
    let quirk = u64::from(KVM_X86_QUIRK_LAPIC_MMIO_HOLE);
    machine.chip.settings().disabled_quirks.store(quirk, Ordering::Relaxed);
    assert!(!lapic.mmio_read(0x30, &mut data) && !lapic.mmio_write(0x80, &data));
}

#[test]
fn base_transitions() {
    const OFF: u64 = 0xfee0_0000;
    const XAPIC: u64 = OFF | 1 << 11;
    const X2APIC: u64 = XAPIC | 1 << 10;
    const INVALID: u64 = OFF | 1 << 10;
    // From, to, by the guest, by the host.
    let cases = [
        (OFF, XAPIC, true, true),
        (OFF, X2APIC, false, true),
        (XAPIC, OFF, true, true),
        (XAPIC, X2APIC, true, true),
        (XAPIC, INVALID, false, false),
        (X2APIC, XAPIC, false, true),
        (X2APIC, OFF, true, true),
        (X2APIC, X2APIC, true, true),
        (OFF, INVALID, false, false),
        (XAPIC, XAPIC | 1, false, false),
        (XAPIC, XAPIC | 1 << 9, false, false),
        (XAPIC, XAPIC | 1 << 46, false, false),
        (XAPIC, XAPIC | 1 << 45, true, true),
        (XAPIC, 0x1000 | 1 << 11, true, true),
    ];
    for (from, to, guest, host) in cases {
        for (host_initiated, legal) in [(false, guest), (true, host)] {
            let machine = Machine::new(1);
            let lapic = &machine.cpus[0];
            lapic.set_apic_base(from, true).expect("the host may");
            let result = lapic.set_apic_base(to, host_initiated);
            assert_eq!(result.is_ok(), legal, "{from:#x} to {to:#x}, host {host_initiated}");
            assert_eq!(lapic.apic_base(), if legal { to } else { from });
        }
    }
    let machine = Machine::new(1);
    machine.cpus[0].set_features(ApicFeatures { x2apic: false, ..FEATURES });
    assert_eq!(machine.cpus[0].set_apic_base(X2APIC, true), Err(ApicError::Reserved));
}

#[test]
fn x2apic_msrs() {
    let machine = Machine::new(0x13);
    let lapic = &machine.cpus[0x12];
    assert_eq!(lapic.read_msr(0x802), Err(ApicError::Reserved), "in xAPIC mode");
    machine.enter_x2apic(0x12);
    let reads: &[(u32, Option<u64>)] = &[
        (0x800, None),
        (0x802, Some(0x12)),
        (0x803, Some(0x0005_0014)),
        (0x808, Some(0)),
        (0x809, None),
        (0x80a, Some(0)),
        (0x80b, None),
        (0x80d, Some(0x0001_0004)),
        (0x80e, None),
        (0x80f, Some(0xff)),
        (0x810, Some(0)),
        (0x827, Some(0)),
        (0x828, Some(0)),
        (0x82f, None),
        (0x830, Some(0)),
        (0x831, None),
        (0x832, Some(0x1_0000)),
        (0x839, Some(0)),
        (0x83e, Some(0)),
        (0x83f, None),
        (0x840, None),
        (0x8ff, None),
    ];
    for &(msr, value) in reads {
        assert_eq!(lapic.read_msr(msr).ok(), value, "{msr:#x}");
    }
    let writes: &[(u32, u64, bool)] = &[
        (0x802, 0x12, false),
        (0x803, 0, false),
        (0x808, 0xff, true),
        (0x808, 0x100, false),
        (0x80b, 0, true),
        (0x80b, 1, false),
        (0x80d, 4, false),
        (0x80e, 0, false),
        (0x80f, 0x1ff, true),
        (0x80f, 1 << 32, false),
        (0x828, 0, true),
        (0x828, 1, false),
        (0x830, 0x41 | 0x12 << 32, true),
        (0x830, 1 << 12 | 0x41 | 0x12 << 32, true),
        (0x830, 1 << 13, false),
        (0x830, 1 << 16, false),
        (0x830, 1 << 20, false),
        (0x831, 0, false),
        (0x832, 0x2_0030, true),
        (0x838, 0, true),
        (0x839, 0, false),
        (0x83e, 0xb, true),
        (0x83f, 0x42, true),
        (0x83f, 0x142, false),
        (0x840, 0, false),
    ];
    for &(msr, value, legal) in writes {
        assert_eq!(lapic.write_msr(msr, value).is_ok(), legal, "{msr:#x} = {value:#x}");
    }
    assert_eq!(lapic.read_msr(0x830), Ok(0x12_0000_0041), "busy is never seen");
    lapic.set_tpr(0);
    assert_eq!((lapic.acknowledge(), lapic.acknowledge()), (Some(0x42), None), "one class at a time");
    lapic.end_of_interrupt();
    assert_eq!(lapic.acknowledge(), Some(0x41));
}

/// The targets of an IPI, told by who has its vector.
fn receivers(machine: &Machine, vector: u8) -> Vec<usize> {
    (0..machine.cpus.len()).filter(|&cpu| machine.cpus[cpu].awaits_eoi(vector)).collect()
}

#[test]
fn ipi_destinations_in_xapic_mode() {
    const LOGICAL: u32 = 1 << 11;
    const LOWEST: u32 = 1 << 8;
    let flat: &[u32] = &[0x01, 0x02, 0x04, 0x08];
    let cluster: &[u32] = &[0x11, 0x12, 0x21, 0x22];
    // Logical IDs, DFR, ICR without vector, destination, receivers of an IPI of CPU 1.
    type Case<'a> = (&'a [u32], u32, u32, u32, &'a [usize]);
    let cases: &[Case] = &[
        (flat, 0xffff_ffff, 0, 2, &[2]),
        (flat, 0xffff_ffff, 0, 1, &[1]),
        (flat, 0xffff_ffff, 0, 9, &[]),
        (flat, 0xffff_ffff, 0, 0xff, &[0, 1, 2, 3]),
        (flat, 0xffff_ffff, LOGICAL, 0x05, &[0, 2]),
        (flat, 0xffff_ffff, LOGICAL, 0xff, &[0, 1, 2, 3]),
        (flat, 0xffff_ffff, LOGICAL, 0xf0, &[]),
        (cluster, 0x0fff_ffff, LOGICAL, 0x13, &[0, 1]),
        (cluster, 0x0fff_ffff, LOGICAL, 0x22, &[3]),
        (cluster, 0x0fff_ffff, LOGICAL, 0x33, &[]),
        (cluster, 0x0fff_ffff, LOGICAL, 0xff, &[0, 1, 2, 3]),
        (flat, 0x3fff_ffff, LOGICAL, 0x05, &[]),
        (flat, 0xffff_ffff, 1 << 18, 0, &[1]),
        (flat, 0xffff_ffff, 2 << 18, 0, &[0, 1, 2, 3]),
        (flat, 0xffff_ffff, 3 << 18, 0, &[0, 2, 3]),
        // The lowest priority among n is the one at vector % n: 0x40 % 3 = 1, 0x40 % 4 = 0.
        (flat, 0xffff_ffff, LOGICAL | LOWEST, 0x0e, &[2]),
        (flat, 0xffff_ffff, LOGICAL | LOWEST, 0x0f, &[0]),
        (flat, 0xffff_ffff, LOWEST, 0xff, &[0, 1, 2, 3]),
        // De-asserted levels come to nothing.
        (flat, 0xffff_ffff, 1 << 15, 2, &[]),
        (flat, 0xffff_ffff, 1 << 15 | 1 << 14, 2, &[2]),
    ];
    for &(ids, dfr, icr, destination, expected) in cases {
        let machine = Machine::enabled(4);
        for (cpu, &id) in ids.iter().enumerate() {
            machine.write(cpu, reg::DFR, dfr);
            machine.write(cpu, reg::LDR, id << 24);
        }
        machine.send(1, destination, icr | 0x40);
        assert_eq!(receivers(&machine, 0x40), expected, "{icr:#x} to {destination:#x}");
    }
}

#[test]
fn ipi_destinations_in_x2apic_mode() {
    // ICR, receivers among 34 CPUs of an IPI of CPU 17.
    let cases: &[(u64, &[usize])] = &[
        (0x21 << 32, &[33]),
        (0x1 << 32 | 1 << 18, &[17]),
        (0x2_0003 << 32 | 1 << 11, &[32, 33]),
        (0x1_8001 << 32 | 1 << 11, &[16, 31]),
        (0x3_0001 << 32 | 1 << 11, &[]),
        (0xff << 32, &[]),
    ];
    for &(icr, expected) in cases {
        let machine = Machine::enabled(34);
        (0..34).for_each(|cpu| machine.enter_x2apic(cpu));
        machine.cpus[17].write_msr(0x830, icr | 0x40).expect("no reserved bit");
        assert_eq!(receivers(&machine, 0x40), expected, "{icr:#x}");
    }
    let machine = Machine::enabled(3);
    (0..3).for_each(|cpu| machine.enter_x2apic(cpu));
    machine.cpus[1].write_msr(0x830, 0xffff_ffff << 32 | 0x40).expect("broadcast");
    assert_eq!(receivers(&machine, 0x40), [0, 1, 2]);
    machine.cpus[1].write_msr(0x83f, 0x50).expect("self IPI");
    assert_eq!(receivers(&machine, 0x50), [1]);
}

#[test]
fn init_sipi_nmi_and_smi_are_events() {
    const INIT: u32 = 5 << 8 | 1 << 14;
    let machine = Machine::new(2);
    let target = &machine.cpus[1];
    let events = ApicEvents::default();
    let cases: &[(&[u32], ApicEvents)] = &[
        (&[INIT], ApicEvents { init: true, ..events }),
        (&[5 << 8 | 1 << 15], events),
        (&[5 << 8 | 1 << 15 | 1 << 14], ApicEvents { init: true, ..events }),
        (&[INIT, 6 << 8 | 0x9a], ApicEvents { init: true, sipi: Some(0x9a), ..events }),
        (&[6 << 8 | 0x9a, INIT], ApicEvents { init: true, ..events }),
        (&[6 << 8 | 0x9a, 6 << 8 | 0x12], ApicEvents { sipi: Some(0x12), ..events }),
        (&[4 << 8], ApicEvents { nmi: 1, ..events }),
        (&[4 << 8; 5], ApicEvents { nmi: 2, ..events }),
        (&[2 << 8], ApicEvents { smi: true, ..events }),
        (&[3 << 8], ApicEvents { unhalt: true, ..events }),
        (&[7 << 8 | 0x40], events),
        (&[0x40], events),
    ];
    for (icrs, expected) in cases {
        icrs.iter().for_each(|&icr| machine.send(0, 1, icr));
        assert_eq!(target.has_events(false), *expected != events, "{icrs:x?}");
        assert_eq!((target.events(), target.take_events(false)), (*expected, *expected), "{icrs:x?}");
        assert!(!target.has_events(false));
    }
}

#[test]
fn divide_configuration() {
    for (register, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        let machine = Machine::enabled(1);
        machine.write(0, reg::TIMER_DIVIDE, register);
        machine.write(0, reg::TIMER_INITIAL, 1_000_000);
        machine.pass(256_000);
        assert_eq!(machine.read(0, reg::TIMER_CURRENT), 1_000_000 - 256_000 / divisor, "{register}");
    }
}

#[test]
fn one_shot_timer_fires_once() {
    let machine = Machine::enabled(1);
    machine.write(0, reg::TIMER_DIVIDE, 0xb);
    machine.write(0, reg::LVT_TIMER, 0x31);
    machine.write(0, reg::TIMER_INITIAL, 5_000_000);
    machine.pass(4_999_999);
    assert_eq!((machine.cpus[0].has_interrupt(), machine.read(0, reg::TIMER_CURRENT)), (false, 1));
    machine.pass(1);
    assert_eq!(machine.read(0, reg::TIMER_CURRENT), 0);
    assert_eq!(machine.cpus[0].acknowledge(), Some(0x31));
    machine.write(0, reg::EOI, 0);
    machine.pass(20 * MS);
    assert!(!machine.cpus[0].has_interrupt());
    // A masked timer counts, and its interrupt is lost.
    machine.write(0, reg::LVT_TIMER, 0x1_0031);
    machine.write(0, reg::TIMER_INITIAL, 5_000_000);
    machine.pass(5 * MS);
    machine.write(0, reg::LVT_TIMER, 0x31);
    machine.pass(5 * MS);
    assert!(!machine.cpus[0].has_interrupt());
    // A zero count stops it.
    machine.write(0, reg::TIMER_INITIAL, 5_000_000);
    machine.write(0, reg::TIMER_INITIAL, 0);
    machine.pass(10 * MS);
    assert!(!machine.cpus[0].has_interrupt() && machine.timers.next_deadline().is_none());
}

#[test]
fn periodic_timer_goes_on() {
    let machine = Machine::enabled(1);
    machine.write(0, reg::TIMER_DIVIDE, 0xb);
    machine.write(0, reg::LVT_TIMER, 0x2_0031);
    machine.write(0, reg::TIMER_INITIAL, 1_000_000);
    for _ in 0..5 {
        machine.pass(600_000);
        assert!(!machine.cpus[0].has_interrupt());
        assert_eq!(machine.read(0, reg::TIMER_CURRENT), 400_000);
        machine.pass(400_000);
        assert_eq!(machine.cpus[0].acknowledge(), Some(0x31));
        machine.write(0, reg::EOI, 0);
    }
    // Missed periods give one interrupt, and the next one is a whole period later.
    machine.pass(100 * MS);
    assert_eq!(machine.cpus[0].acknowledge(), Some(0x31));
    machine.write(0, reg::EOI, 0);
    assert!(!machine.cpus[0].has_interrupt());
    machine.pass(MS);
    assert!(machine.cpus[0].has_interrupt());
    // A tiny period is stretched to 200 µs.
    machine.write(0, reg::TIMER_INITIAL, 1);
    machine.pass(0);
    assert_eq!(machine.timers.next_deadline(), Some(machine.clock.now() + 200_000));
}

#[test]
fn a_new_divisor_scales_what_is_left() {
    let machine = Machine::enabled(1);
    machine.write(0, reg::TIMER_DIVIDE, 0xb);
    machine.write(0, reg::LVT_TIMER, 0x31);
    machine.write(0, reg::TIMER_INITIAL, 4_000_000);
    machine.pass(MS);
    machine.write(0, reg::TIMER_DIVIDE, 0);
    assert_eq!(machine.read(0, reg::TIMER_CURRENT), 3_000_000);
    machine.pass(6 * MS - 1);
    assert!(!machine.cpus[0].has_interrupt());
    machine.pass(1);
    assert!(machine.cpus[0].has_interrupt());
}

#[test]
fn tsc_deadline_timer() {
    const KHZ: u32 = 2_000_000;
    let machine = Machine::enabled(1);
    let lapic = &machine.cpus[0];
    lapic.set_tsc_deadline(4_000_000, 0, KHZ);
    assert_eq!(lapic.tsc_deadline(), 0, "not in this mode");
    machine.write(0, reg::TIMER_INITIAL, 1_000_000);
    machine.write(0, reg::LVT_TIMER, 0x4_0031);
    assert_eq!(machine.read(0, reg::TIMER_INITIAL), 0, "the change of mode stops the counter");
    lapic.set_tsc_deadline(4_000_001, 0, KHZ);
    assert_eq!(lapic.tsc_deadline(), 4_000_001);
    assert_eq!(machine.read(0, reg::TIMER_CURRENT), 0);
    machine.pass(2 * MS);
    assert!(!lapic.has_interrupt(), "half a nanosecond early");
    machine.pass(1);
    assert_eq!((lapic.acknowledge(), lapic.tsc_deadline()), (Some(0x31), 0));
    machine.write(0, reg::EOI, 0);
    // A deadline in the past fires at once.
    lapic.set_tsc_deadline(100, 4_000_000, KHZ);
    assert_eq!((lapic.acknowledge(), lapic.tsc_deadline()), (Some(0x31), 0));
    machine.write(0, reg::EOI, 0);
    // Zero disarms; a far one does no harm; leaving the mode disarms.
    lapic.set_tsc_deadline(8_000_000, 4_000_000, KHZ);
    lapic.set_tsc_deadline(0, 4_000_000, KHZ);
    assert_eq!(machine.timers.next_deadline(), None);
    lapic.set_tsc_deadline(u64::MAX, 4_000_000, 1);
    assert_eq!(machine.timers.next_deadline(), Some(u64::MAX));
    machine.write(0, reg::LVT_TIMER, 0x31);
    assert_eq!(machine.timers.next_deadline(), None);
    machine.cpus[0].set_features(ApicFeatures { tsc_deadline: false, ..FEATURES });
    machine.write(0, reg::LVT_TIMER, 0x4_0031);
    assert_eq!(machine.read(0, reg::LVT_TIMER), 0x31, "not enumerated");
}

#[test]
fn image_round_trip() {
    let machine = Machine::enabled(2);
    let (source, target) = (&machine.cpus[0], &machine.cpus[1]);
    machine.write(0, reg::TIMER_DIVIDE, 0xb);
    machine.write(0, reg::LVT_TIMER, 0x2_0031);
    machine.write(0, reg::TIMER_INITIAL, 10_000_000);
    source.accept(&fixed(0x61, true));
    source.acknowledge();
    source.accept(&fixed(0x81, false));
    machine.pass(4 * MS);
    let image = source.state();
    target.set_state(&image).expect("an xAPIC's image");
    assert_eq!(machine.read(1, reg::TIMER_CURRENT), 6_000_000);
    assert_eq!(target.acknowledge(), Some(0x81));
    assert!(target.awaits_eoi(0x61));
    machine.pass(6 * MS);
    assert!(target.awaits_eoi(0x31));
    // A one-shot that has run out fires again: its interrupt may not have been in the image.
    machine.write(0, reg::LVT_TIMER, 0x32);
    machine.write(0, reg::TIMER_INITIAL, 1_000);
    machine.pass(MS);
    target.set_state(&source.state()).expect("an xAPIC's image");
    machine.pass(0);
    assert!(target.awaits_eoi(0x32));
}

#[test]
fn image_of_an_x2apic() {
    let machine = Machine::enabled(0x12);
    let lapic = &machine.cpus[0x11];
    machine.enter_x2apic(0x11);
    let word = |image: &kvm_lapic_state, at: usize| {
        u32::from_le_bytes([0, 1, 2, 3].map(|byte| image.regs[at + byte] as u8))
    };
    let image = lapic.state();
    assert_eq!((word(&image, 0x20), word(&image, 0xd0)), (0x1100_0000, 0x0001_0002));
    lapic.set_state(&Machine::enabled(1).cpus[0].state()).expect("the ID is ignored");
    assert_eq!((lapic.read_msr(0x802), lapic.read_msr(0x80d)), (Ok(0x11), Ok(0x0001_0002)));
    machine.chip.settings().x2apic_format.store(true, Ordering::Relaxed);
    assert_eq!(word(&lapic.state(), 0x20), 0x11);
    assert_eq!(lapic.set_state(&image), Err(ApicError::WrongId));
    lapic.set_state(&lapic.state()).expect("its own");
}

#[test]
fn hostile_images_do_no_harm() {
    for byte in [0x00, 0x55, 0xaa_u8 as i8, -1] {
        let machine = Machine::enabled(1);
        let image = kvm_lapic_state { regs: [byte; 1024] };
        for x2apic in [false, true] {
            if x2apic {
                machine.cpus[0].set_apic_base(0xfee0_0d00, true).expect("the host may");
            }
            machine.cpus[0].set_state(&image).expect("no ID is checked");
            machine.pass(1_000 * MS);
            while machine.cpus[0].acknowledge().is_some() {}
            (0..300).for_each(|_| machine.cpus[0].end_of_interrupt());
            machine.cpus[0].state();
        }
    }
}

#[test]
fn suppressed_broadcast_is_offered_without_an_ioapic_only() {
    let full = Machine::new(1);
    full.write(0, reg::SVR, 0x11ff);
    assert_eq!((full.read(0, 0x30) >> 24, full.read(0, reg::SVR)), (0, 0x1ff));
    let split = Machine::of_kind(IrqChipKind::Split { reserved_pins: 24 }, 1);
    split.write(0, reg::SVR, 0x11ff);
    assert_eq!((split.read(0, 0x30) >> 24, split.read(0, reg::SVR)), (1, 0x11ff));
}

#[test]
fn threads_lose_no_interrupt() {
    const ROUNDS: u32 = 2_000;
    let machine = Machine::enabled(3);
    // CPUs 1 and 2 send; CPU 0 takes, and acknowledges each one to its sender through the vector it reads.
    let receiver = Arc::clone(&machine.cpus[0]);
    let senders: Vec<_> = [1usize, 2]
        .into_iter()
        .map(|cpu| {
            let (lapic, receiver) = (Arc::clone(&machine.cpus[cpu]), Arc::clone(&receiver));
            thread::spawn(move || {
                let vector = 0x40 * cpu as u32;
                for _ in 0..ROUNDS {
                    while receiver.awaits_eoi(vector as u8) {
                        thread::yield_now();
                    }
                    assert!(lapic.mmio_write(0x300, &vector.to_le_bytes()));
                }
            })
        })
        .collect();
    let mut taken = 0;
    while taken < 2 * ROUNDS {
        match receiver.acknowledge() {
            Some(_) => {
                taken += 1;
                receiver.end_of_interrupt();
            }
            None => thread::yield_now(),
        }
    }
    senders.into_iter().for_each(|sender| sender.join().expect("a sender"));
    assert!(!receiver.has_interrupt());
}
