//! kvmclock: the paravirtual clock page of each vCPU (kernel: Documentation/virt/kvm/x86/msr.rst, pvclock-abi.h).
//!
//! The TSC of all vCPUs runs in step, so all pages carry the same base and TSC_STABLE is set.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::memory::Memory;
use crate::tsc;

/// Flag of `pvclock_vcpu_time_info`: readings of different vCPUs can be compared.
const PVCLOCK_TSC_STABLE: u8 = 1 << 0;
/// Flag: the guest was paused by the VMM (KVM_KVMCLOCK_CTRL).
const PVCLOCK_GUEST_STOPPED: u8 = 1 << 1;

/// The common base of a VM's clock pages: at host TSC `tsc`, the clock read `nanos`.
#[derive(Clone, Copy, Debug)]
pub struct ClockBase {
    tsc: u64,
    nanos: u64,
}

impl ClockBase {
    /// A clock that reads zero now.
    pub fn new() -> ClockBase {
        ClockBase { tsc: tsc::rdtsc(), nanos: 0 }
    }

    /// Nanoseconds that the clock shows now.
    pub fn now(&self) -> u64 {
        self.at(tsc::rdtsc())
    }

    /// What the clock shows when the host's TSC is `tsc`, as a guest computes it from its page.
    pub fn at(&self, tsc: u64) -> u64 {
        let (mul, shift) = scale(tsc::host_khz());
        // A reading from before the base counts as one at the base.
        let elapsed = (tsc.wrapping_sub(self.tsc) as i64).max(0) as u128;
        let shifted = if shift < 0 { elapsed >> -shift } else { elapsed << shift };
        self.nanos.wrapping_add(((shifted * u128::from(mul)) >> 32) as u64)
    }

    /// The clock reads `nanos` when the host's TSC is `tsc`, and goes on from there (KVM_SET_CLOCK).
    pub fn set(&mut self, tsc: u64, nanos: u64) {
        *self = ClockBase { tsc, nanos };
    }

    /// The host's TSC at the moment that the base is of.
    pub fn tsc(&self) -> u64 {
        self.tsc
    }

    /// Wall-clock time at which the clock read zero.
    fn boot_time(&self) -> Duration {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        now.saturating_sub(Duration::from_nanos(self.now()))
    }

    /// Writes the `pvclock_wall_clock` structure at `gpa` (MSR_KVM_WALL_CLOCK_NEW).
    pub fn write_wall_clock(&self, memory: &Memory, gpa: u64) {
        let boot = self.boot_time();
        let mut page = [0u8; 12];
        let mut version = [0u8; 4];
        if !memory.read(gpa, &mut version) {
            return;
        }
        // Odd while the structure changes, as the guest's read protocol demands.
        let version = u32::from_le_bytes(version) | 1;
        page[0..4].copy_from_slice(&version.to_le_bytes());
        page[4..8].copy_from_slice(&(boot.as_secs() as u32).to_le_bytes());
        page[8..12].copy_from_slice(&boot.subsec_nanos().to_le_bytes());
        memory.write(gpa, &page);
        memory.write(gpa, &version.wrapping_add(1).to_le_bytes());
    }
}

impl Default for ClockBase {
    fn default() -> ClockBase {
        ClockBase::new()
    }
}

/// MSR_KVM_SYSTEM_TIME of one vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClockPage {
    /// The MSR's value: address with bit 0 as the enable bit.
    pub msr: u64,
    /// The VMM says that it paused the guest.
    pub guest_stopped: bool,
    version: u32,
}

impl ClockPage {
    /// Writes the vCPU's `pvclock_vcpu_time_info`. `tsc` is what the guest's TSC reads at the moment of `base`.
    pub fn update(&mut self, memory: &Memory, base: &ClockBase, tsc: u64, guest_khz: u32) {
        if self.msr & 1 == 0 {
            return;
        }
        let gpa = self.msr & !1;
        let (mul, shift) = scale(guest_khz);
        let mut flags = PVCLOCK_TSC_STABLE;
        if std::mem::take(&mut self.guest_stopped) {
            flags |= PVCLOCK_GUEST_STOPPED;
        }
        self.version = (self.version | 1).wrapping_add(2);
        let mut info = [0u8; 32];
        info[0..4].copy_from_slice(&self.version.to_le_bytes());
        info[8..16].copy_from_slice(&tsc.to_le_bytes());
        info[16..24].copy_from_slice(&base.nanos.to_le_bytes());
        info[24..28].copy_from_slice(&mul.to_le_bytes());
        info[28] = shift as u8;
        info[29] = flags;
        memory.write(gpa, &info);
        self.version = self.version.wrapping_add(1);
        memory.write(gpa, &self.version.to_le_bytes());
    }
}

/// Multiplier and shift that turn TSC ticks into nanoseconds: `((ticks << shift) * mul) >> 32`
/// (kernel: arch/x86/kvm/x86.c, `kvm_get_time_scale`).
fn scale(khz: u32) -> (u32, i8) {
    let mut ticks = u64::from(khz.max(1)) * 1000;
    let mut nanos = 1_000_000_000u64;
    let mut shift = 0i8;
    while ticks > nanos * 2 || ticks >> 32 != 0 {
        ticks >>= 1;
        shift -= 1;
    }
    while ticks <= nanos || nanos >> 32 != 0 {
        if nanos >> 32 != 0 || ticks & (1 << 31) != 0 {
            nanos >>= 1;
        } else {
            ticks <<= 1;
        }
        shift += 1;
    }
    (((nanos << 32) / ticks) as u32, shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_is_exact_to_a_part_in_a_million() {
        for khz in [1_000, 999_999, 1_000_000, 2_300_000, 2_599_999, 5_000_000] {
            let (mul, shift) = scale(khz);
            let ticks = u128::from(khz) * 1000;
            let shifted = if shift < 0 { ticks >> -shift } else { ticks << shift };
            let nanos = (shifted * u128::from(mul)) >> 32;
            assert!(nanos.abs_diff(1_000_000_000) < 1_000, "{khz} kHz: {nanos} ns");
        }
    }
}
