//! The local APIC's register page (SDM vol. 3A, table 11-1) and what is readable and writable in it.

use kvm_bindings::kvm_lapic_state;

pub(crate) const ID: usize = 0x20;
pub(crate) const VERSION: usize = 0x30;
pub(crate) const TPR: usize = 0x80;
pub(crate) const APR: usize = 0x90;
pub(crate) const PPR: usize = 0xa0;
pub(crate) const EOI: usize = 0xb0;
pub(crate) const LDR: usize = 0xd0;
pub(crate) const DFR: usize = 0xe0;
pub(crate) const SVR: usize = 0xf0;
pub(crate) const ISR: usize = 0x100;
pub(crate) const TMR: usize = 0x180;
pub(crate) const IRR: usize = 0x200;
pub(crate) const ESR: usize = 0x280;
pub(crate) const LVT_CMCI: usize = 0x2f0;
pub(crate) const ICR: usize = 0x300;
pub(crate) const ICR2: usize = 0x310;
pub(crate) const LVT_TIMER: usize = 0x320;
pub(crate) const LVT_THERMAL: usize = 0x330;
pub(crate) const LVT_PERFORMANCE: usize = 0x340;
pub(crate) const LVT_LINT0: usize = 0x350;
pub(crate) const LVT_LINT1: usize = 0x360;
pub(crate) const LVT_ERROR: usize = 0x370;
pub(crate) const TIMER_INITIAL: usize = 0x380;
pub(crate) const TIMER_CURRENT: usize = 0x390;
pub(crate) const TIMER_DIVIDE: usize = 0x3e0;
pub(crate) const SELF_IPI: usize = 0x3f0;

/// Bytes of the page that hold registers, and of `kvm_lapic_state`.
pub(crate) const PAGE_USED: usize = 0x400;

/// DFR[31:28] of the flat model, with the reserved ones below (SDM 11.6.2.2).
pub(crate) const DFR_FLAT: u32 = 0xffff_ffff;
/// DFR of the cluster model.
pub(crate) const DFR_CLUSTER: u32 = 0x0fff_ffff;
/// The bits of the LDR that software can write in xAPIC mode.
pub(crate) const LDR_MASK: u32 = 0xff00_0000;
/// SVR: the software enable bit.
pub(crate) const SVR_ENABLED: u32 = 1 << 8;
/// SVR: EOIs of level interrupts are not broadcast to the IOAPICs.
pub(crate) const SVR_SUPPRESS_EOI_BROADCAST: u32 = 1 << 12;
/// Version register: [`SVR_SUPPRESS_EOI_BROADCAST`] can be set.
pub(crate) const VERSION_DIRECTED_EOI: u32 = 1 << 24;
/// The version of an integrated APIC, as KVM reports it.
pub(crate) const VERSION_NUMBER: u32 = 0x14;
/// ICR: delivery status, reads as idle always.
pub(crate) const ICR_BUSY: u32 = 1 << 12;
/// ICR bits that must be zero in x2APIC mode (SDM 11.12.9).
pub(crate) const X2APIC_ICR_RESERVED: u64 = 0xfff0_0000 | 3 << 16 | 1 << 13;

/// LVT: the entry is masked.
pub(crate) const LVT_MASKED: u32 = 1 << 16;
/// LVT: level-triggered (LINT0, LINT1).
pub(crate) const LVT_LEVEL: u32 = 1 << 15;
/// LVT: delivery mode.
pub(crate) const LVT_MODE: u32 = 7 << 8;
/// LVT timer: periodic.
pub(crate) const LVT_TIMER_PERIODIC: u32 = 1 << 17;
/// LVT timer: TSC-deadline.
pub(crate) const LVT_TIMER_TSC_DEADLINE: u32 = 2 << 17;

const LVT_COMMON: u32 = LVT_MASKED | 1 << 12 | 0xff;
const LVT_WITH_MODE: u32 = LVT_COMMON | LVT_MODE;
const LVT_LINT: u32 = LVT_WITH_MODE | LVT_LEVEL | 1 << 14 | 1 << 13;

/// The LVT entries in the order in which the version register counts them, each with its writable bits. The timer's
/// mode bits come on top, as far as CPUID offers them.
pub(crate) const LVT: [(usize, u32); 7] = [
    (LVT_TIMER, LVT_COMMON),
    (LVT_THERMAL, LVT_WITH_MODE),
    (LVT_PERFORMANCE, LVT_WITH_MODE),
    (LVT_LINT0, LVT_LINT),
    (LVT_LINT1, LVT_LINT),
    (LVT_ERROR, LVT_COMMON),
    (LVT_CMCI, LVT_WITH_MODE),
];

/// Readable in every mode, a bit for each 16 bytes; CMCI comes with its LVT entry.
const READABLE: u64 = bits(&[
    ID,
    VERSION,
    TPR,
    PPR,
    LDR,
    SVR,
    ESR,
    ICR,
    LVT_TIMER,
    LVT_THERMAL,
    LVT_PERFORMANCE,
    LVT_LINT0,
    LVT_LINT1,
    LVT_ERROR,
    TIMER_INITIAL,
    TIMER_CURRENT,
    TIMER_DIVIDE,
]) | 0xff_ffff << (ISR >> 4);

/// Readable in xAPIC mode only.
const READABLE_XAPIC: u64 = bits(&[APR, DFR, ICR2]);

const fn bits(registers: &[usize]) -> u64 {
    let mut mask = 0;
    let mut i = 0;
    while i < registers.len() {
        mask |= 1 << (registers[i] >> 4);
        i += 1;
    }
    mask
}

/// Whether the register at `offset` can be read.
pub(crate) fn readable(offset: usize, x2apic: bool, lvt_entries: usize) -> bool {
    let mut mask = READABLE;
    if !x2apic {
        mask |= READABLE_XAPIC;
    }
    if lvt_entries == LVT.len() {
        mask |= bits(&[LVT_CMCI]);
    }
    offset < PAGE_USED && mask >> (offset >> 4) & 1 != 0
}

/// The registers: a 32-bit word at each multiple of 16 bytes.
#[derive(Clone)]
pub(crate) struct Registers([u32; PAGE_USED / 4]);

impl Registers {
    pub(crate) fn new() -> Self {
        Self([0; PAGE_USED / 4])
    }

    pub(crate) fn get(&self, offset: usize) -> u32 {
        self.0[(offset & 0x3f0) >> 2]
    }

    pub(crate) fn set(&mut self, offset: usize, value: u32) {
        self.0[(offset & 0x3f0) >> 2] = value;
    }

    /// Whether `vector` is set in the 256-bit register that starts at `base`.
    pub(crate) fn test(&self, base: usize, vector: u8) -> bool {
        self.get(word(base, vector)) >> (vector & 31) & 1 != 0
    }

    /// Sets or clears `vector` in the 256-bit register that starts at `base`.
    pub(crate) fn assign(&mut self, base: usize, vector: u8, value: bool) {
        let offset = word(base, vector);
        let bit = 1 << (vector & 31);
        let old = self.get(offset);
        self.set(offset, if value { old | bit } else { old & !bit });
    }

    /// The highest vector set in the 256-bit register that starts at `base`.
    pub(crate) fn highest(&self, base: usize) -> Option<u8> {
        (0..8u32).rev().find_map(|index| {
            let bits = self.get(base + 0x10 * index as usize);
            bits.checked_ilog2().map(|bit| (index * 32 + bit) as u8)
        })
    }

    /// As `struct kvm_lapic_state` holds them.
    pub(crate) fn to_image(&self) -> kvm_lapic_state {
        let mut image = kvm_lapic_state::default();
        for (place, byte) in image.regs.iter_mut().zip(self.0.iter().flat_map(|word| word.to_le_bytes())) {
            *place = byte as i8;
        }
        image
    }

    /// From `struct kvm_lapic_state`.
    pub(crate) fn from_image(image: &kvm_lapic_state) -> Self {
        let mut registers = Self::new();
        for (word, bytes) in registers.0.iter_mut().zip(image.regs.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(bytes.map(|byte| byte as u8));
        }
        registers
    }
}

fn word(base: usize, vector: u8) -> usize {
    base + 0x10 * usize::from(vector >> 5)
}
