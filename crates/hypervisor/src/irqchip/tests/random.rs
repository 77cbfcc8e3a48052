//! Random operations: nothing that a guest or userspace does may panic, hang, or break what is published.

use kvm_bindings::{kvm_lapic_state, kvm_pit_state2};

use super::*;
use crate::irqchip::lapic::ApicFeatures;
use crate::irqchip::testing::FEATURES;

/// Marsaglia's xorshift: plenty for choosing operations.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Random bits, more often than not only a few of them.
    fn value(&mut self) -> u64 {
        match self.below(3) {
            0 => self.next(),
            1 => self.next() & self.next() & self.next(),
            _ => self.below(256),
        }
    }

    fn lapic_image(&mut self) -> kvm_lapic_state {
        kvm_lapic_state { regs: std::array::from_fn(|_| self.value() as i8) }
    }

    fn chip_image(&mut self) -> kvm_irqchip {
        let mut image = kvm_irqchip { chip_id: self.below(4) as u32, ..Default::default() };
        image.chip.dummy = std::array::from_fn(|_| self.value() as i8);
        if image.chip_id == KVM_IRQCHIP_IOAPIC {
            image.chip.ioapic.base_address = 0xfec0_0000;
        }
        image
    }

    fn pit_image(&mut self) -> kvm_pit_state2 {
        let mut image = kvm_pit_state2 { flags: self.value() as u32, ..Default::default() };
        for channel in &mut image.channels {
            channel.count = self.value() as u32;
            channel.mode = self.value() as u8;
            channel.rw_mode = self.value() as u8;
            channel.read_state = self.value() as u8;
            channel.write_state = self.value() as u8;
            channel.count_latched = self.value() as u8;
            channel.count_load_time = self.next() as i64;
        }
        image
    }
}

fn step(machine: &Machine, random: &mut Random) {
    const PORTS: [u16; 11] = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61];
    let chip = &machine.chip;
    let lapic = &machine.cpus[random.below(machine.cpus.len() as u64) as usize];
    let value = random.value();
    let register = random.below(0x40) << 4;
    match random.below(40) {
        0..8 => _ = lapic.mmio_write(register, &(value as u32).to_le_bytes()),
        8..12 => _ = lapic.write_msr(0x800 + random.below(0x100) as u32, value),
        12 => _ = lapic.read_msr(0x800 + random.below(0x100) as u32),
        13 => _ = lapic.mmio_read(random.below(0x1000), &mut vec![0; random.below(9) as usize]),
        14 => _ = lapic.set_apic_base(0xfee0_0000 | random.below(4) << 10, random.below(2) == 0),
        15 => _ = lapic.set_apic_base(value, true),
        16..20 => {
            machine.chip.mmio_write(lapic, 0xfec0_0000, &[random.below(0x42) as u8]);
            machine.chip.mmio_write(lapic, 0xfec0_0010, &(value as u32).to_le_bytes());
        }
        20..24 => _ = chip.pio_write(PORTS[random.below(11) as usize], value as u32, 1),
        24 => _ = chip.pio_read(PORTS[random.below(11) as usize], 1 + random.below(4) as usize),
        25..28 => chip.irq_line(random.below(25) as u32, value & 1 != 0),
        28 => _ = chip.irq_line_status(random.below(25) as u32, value & 1 != 0),
        29 => _ = chip.send_msi(Msi { address_lo: value as u32, address_hi: 0, data: random.value() as u32 }),
        30..33 => _ = chip.acknowledge(lapic),
        33 => lapic.end_of_interrupt(),
        34 => machine.pass(random.below(3_000_000)),
        35 => lapic.set_tsc_deadline(value, random.value(), random.value() as u32),
        36 => _ = lapic.take_events(false),
        37 => lapic.set_features(ApicFeatures {
            cmci: value & 1 != 0,
            tsc_deadline: value & 2 != 0,
            ..FEATURES
        }),
        38 => lapic.reset(value & 1 != 0),
        _ => match random.below(8) {
            0 => _ = lapic.set_state(&random.lapic_image()),
            1 => _ = chip.set_chip_state(&random.chip_image()),
            2 => chip.pit().expect("created").set_state(&random.pit_image()),
            _ => machine.enable(),
        },
    }
}

#[test]
fn random_operations_keep_what_is_published() {
    for seed in 1..=8 {
        let machine = Machine::enabled(3);
        machine.chip.create_pit(true).expect("the first");
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ seed);
        for _ in 0..5_000 {
            step(&machine, &mut random);
            for lapic in &machine.cpus {
                let published = lapic.next_interrupt();
                // Asking for the image works everything out anew, and changes nothing.
                lapic.state();
                assert_eq!(lapic.next_interrupt(), published);
                assert!(published.is_none_or(|vector| vector >= 0x10 && lapic.awaits_eoi(vector)));
            }
        }
        // Every interrupt can still be brought to an end.
        for lapic in &machine.cpus {
            machine.timers.fire_due();
            for _ in 0..600 {
                lapic.acknowledge();
                lapic.end_of_interrupt();
            }
        }
    }
}
