//! A machine of interrupt controllers on virtual time, for the tests of this crate.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::lapic::{ApicFeatures, Lapic, Waker};
use super::{IrqChip, IrqChipKind};
use crate::timer::{TimeSource, Timers, VirtualTime};

/// Offsets of local APIC registers, by the SDM's names.
pub(crate) mod reg {
    pub(crate) const ID: u32 = 0x20;
    pub(crate) const TPR: u32 = 0x80;
    pub(crate) const PPR: u32 = 0xa0;
    pub(crate) const EOI: u32 = 0xb0;
    pub(crate) const LDR: u32 = 0xd0;
    pub(crate) const DFR: u32 = 0xe0;
    pub(crate) const SVR: u32 = 0xf0;
    pub(crate) const ICR: u32 = 0x300;
    pub(crate) const ICR2: u32 = 0x310;
    pub(crate) const LVT_TIMER: u32 = 0x320;
    pub(crate) const LVT_LINT0: u32 = 0x350;
    pub(crate) const TIMER_INITIAL: u32 = 0x380;
    pub(crate) const TIMER_CURRENT: u32 = 0x390;
    pub(crate) const TIMER_DIVIDE: u32 = 0x3e0;
}

/// Counts kicks.
#[derive(Default)]
pub(crate) struct Kicks(AtomicUsize);

impl Kicks {
    pub(crate) fn take(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

impl Waker for Kicks {
    fn kick(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

pub(crate) struct Machine {
    pub(crate) clock: Arc<VirtualTime>,
    pub(crate) timers: Arc<Timers>,
    pub(crate) chip: Arc<IrqChip>,
    pub(crate) cpus: Vec<Arc<Lapic>>,
    pub(crate) kicks: Vec<Arc<Kicks>>,
}

pub(crate) const FEATURES: ApicFeatures =
    ApicFeatures { x2apic: true, tsc_deadline: true, cmci: false, physical_address_bits: 46 };

impl Machine {
    pub(crate) fn new(cpus: u32) -> Self {
        Self::of_kind(IrqChipKind::Full, cpus)
    }

    pub(crate) fn of_kind(kind: IrqChipKind, cpus: u32) -> Self {
        let clock = Arc::new(VirtualTime::default());
        let timers = Arc::new(Timers::manual(Arc::clone(&clock) as Arc<dyn TimeSource>));
        let chip = IrqChip::new(kind, Arc::default(), Arc::clone(&timers));
        let kicks: Vec<_> = (0..cpus).map(|_| Arc::new(Kicks::default())).collect();
        let cpus = (0..cpus)
            .map(|id| {
                let lapic = chip.create_lapic(id, id == 0).expect("a new ID");
                lapic.set_features(FEATURES);
                lapic.set_waker(Arc::clone(&kicks[id as usize]) as Arc<dyn Waker>);
                lapic
            })
            .collect();
        Self { clock, timers, chip, cpus, kicks }
    }

    /// A machine whose local APICs are all software-enabled.
    pub(crate) fn enabled(cpus: u32) -> Self {
        let machine = Self::new(cpus);
        machine.enable();
        machine
    }

    pub(crate) fn enable(&self) {
        self.cpus.iter().for_each(|lapic| _ = lapic.mmio_write(u64::from(reg::SVR), &0x1ffu32.to_le_bytes()));
    }

    /// Time goes by.
    pub(crate) fn pass(&self, nanoseconds: u64) {
        self.clock.advance(nanoseconds);
        self.timers.fire_due();
    }

    pub(crate) fn read(&self, cpu: usize, register: u32) -> u32 {
        let mut data = [0; 4];
        assert!(self.chip.mmio_read(&self.cpus[cpu], 0xfee0_0000 + u64::from(register), &mut data));
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&self, cpu: usize, register: u32, value: u32) {
        let address = 0xfee0_0000 + u64::from(register);
        assert!(self.chip.mmio_write(&self.cpus[cpu], address, &value.to_le_bytes()));
    }

    pub(crate) fn enter_x2apic(&self, cpu: usize) {
        let base = self.cpus[cpu].apic_base();
        self.cpus[cpu].set_apic_base(base | 1 << 10, false).expect("xAPIC to x2APIC is legal");
    }

    /// An IPI in xAPIC mode.
    pub(crate) fn send(&self, cpu: usize, destination: u32, icr: u32) {
        self.write(cpu, reg::ICR2, destination << 24);
        self.write(cpu, reg::ICR, icr);
    }

    pub(crate) fn ioapic_read(&self, index: u32) -> u32 {
        let mut data = [0; 4];
        assert!(self.chip.mmio_write(&self.cpus[0], 0xfec0_0000, &index.to_le_bytes()));
        assert!(self.chip.mmio_read(&self.cpus[0], 0xfec0_0010, &mut data));
        u32::from_le_bytes(data)
    }

    pub(crate) fn ioapic_write(&self, index: u32, value: u32) {
        assert!(self.chip.mmio_write(&self.cpus[0], 0xfec0_0000, &index.to_le_bytes()));
        assert!(self.chip.mmio_write(&self.cpus[0], 0xfec0_0010, &value.to_le_bytes()));
    }

    /// Programs a redirection entry, as Linux does: the high half first.
    pub(crate) fn redirect(&self, pin: u32, destination: u32, low: u32) {
        self.ioapic_write(0x11 + 2 * pin, destination << 24);
        self.ioapic_write(0x10 + 2 * pin, low);
    }

    pub(crate) fn redirection(&self, pin: u32) -> u32 {
        self.ioapic_read(0x10 + 2 * pin)
    }

    pub(crate) fn out(&self, port: u16, value: u8) {
        assert!(self.chip.pio_write(port, u32::from(value), 1));
    }

    pub(crate) fn inb(&self, port: u16) -> u8 {
        self.chip.pio_read(port, 1).expect("a port of the machine") as u8
    }
}
