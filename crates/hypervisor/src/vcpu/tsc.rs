//! The time-stamp counter of a vCPU: KVM_SET/GET_TSC_KHZ, the device attribute KVM_VCPU_TSC_OFFSET, and the client's
//! writes of IA32_TIME_STAMP_COUNTER, which KVM takes to mean the same counter on every vCPU.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET};
use silicon::clock::guest_tsc;
use silicon::vmx::Controls;

use super::Vcpu;
use crate::error::Error;
use crate::msr::MsrEnv;
use crate::tsc;

/// IA32_TIME_STAMP_COUNTER.
pub(super) const IA32_TSC: u32 = 0x10;
/// Multiplier of the TSC that means one: 16.48 bits fixed point.
const RATIO_ONE: u64 = 1 << 48;
/// Frequencies that differ by less are not worth scaling, in parts per million (kernel: `tsc_tolerance_ppm`).
const TOLERANCE_PPM: u64 = 250;

/// The last counter that was set on any vCPU of a VM: what a client writes on the next ones soon after, or as zero, means
/// the same counter, and so does the creation of a vCPU (kernel: `kvm_synchronize_tsc`).
#[derive(Clone, Copy, Debug, Default)]
pub struct TscSync {
    /// Offset of that vCPU's TSC.
    offset: u64,
    /// Its frequency; zero before there is a vCPU.
    khz: u32,
    /// A client has written or set the counter, so that it is not the one of creation any more.
    written: bool,
}

impl TscSync {
    /// Sets the counter of a new vCPU: in step with the last one, or else near zero.
    pub(super) fn begin(&mut self, controls: &mut Controls, khz: u32) -> Result<(), Error> {
        controls.tsc_multiplier = ratio(khz).ok_or(Error::Invalid("frequency of the TSC"))?;
        if self.khz != khz {
            self.offset = guest_tsc(tsc::rdtsc(), controls.tsc_multiplier, 0).wrapping_neg();
            self.khz = khz;
        }
        controls.tsc_offset = self.offset;
        Ok(())
    }
}

/// Multiplier that makes the host's counter run at `khz`; `None` if there is none.
fn ratio(khz: u32) -> Option<u64> {
    let host = u64::from(tsc::host_khz().max(1));
    let tolerance = host * TOLERANCE_PPM / 1_000_000;
    if u64::from(khz).abs_diff(host) <= tolerance {
        return Some(RATIO_ONE);
    }
    let ratio = (u128::from(RATIO_ONE) * u128::from(khz)) / u128::from(host);
    u64::try_from(ratio).ok().filter(|&ratio| ratio != 0)
}

impl Vcpu {
    /// KVM_GET_TSC_KHZ: the guest's TSC frequency in kHz.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// KVM_SET_TSC_KHZ; 0 is the host's frequency. EINVAL for one that the counter cannot be scaled to.
    pub fn set_tsc_khz(&mut self, khz: u32) -> Result<(), Error> {
        let khz = if khz == 0 { tsc::host_khz() } else { khz };
        if khz > tsc::MAX_KHZ {
            return Err(Error::Invalid("frequency of the TSC"));
        }
        self.cpu.controls.tsc_multiplier = ratio(khz).ok_or(Error::Invalid("frequency of the TSC"))?;
        self.tsc_khz = khz;
        self.msrs.clock_changed = true;
        self.rearm_deadline();
        Ok(())
    }

    /// KVM_HAS_DEVICE_ATTR on a vCPU: ENXIO for anything but KVM_VCPU_TSC_OFFSET.
    pub fn has_device_attr(&self, group: u32, attribute: u64) -> Result<(), Error> {
        match (group, attribute) {
            (KVM_VCPU_TSC_CTRL, attribute) if attribute == u64::from(KVM_VCPU_TSC_OFFSET) => Ok(()),
            _ => Err(Error::Missing("the attribute")),
        }
    }

    /// KVM_GET_DEVICE_ATTR, KVM_VCPU_TSC_OFFSET: what the scaled counter of the host and the guest's differ by.
    pub fn tsc_offset(&self) -> u64 {
        self.cpu.controls.tsc_offset
    }

    /// KVM_SET_DEVICE_ATTR, KVM_VCPU_TSC_OFFSET.
    pub fn set_tsc_offset(&mut self, offset: u64) {
        let by = offset.wrapping_sub(self.cpu.controls.tsc_offset);
        self.shift_tsc(by);
        *self.vm.tsc_sync() = TscSync { offset, khz: self.tsc_khz, written: true };
    }

    /// The client writes the counter. Zero is a vCPU's start, and a value within a second of what another vCPU's counter
    /// shows is meant to be that: both get its offset.
    pub(super) fn write_tsc(&mut self, value: u64) {
        let now = self.cpu.tsc();
        let here = self.cpu.controls.tsc_offset;
        let vm = self.vm.clone();
        let mut last = vm.tsc_sync();
        let expected = now.wrapping_sub(here).wrapping_add(last.offset);
        let second = u64::from(self.tsc_khz) * 1000;
        let close = value < expected.saturating_add(second) && value.saturating_add(second) > expected;
        let together = last.khz == self.tsc_khz && (value == 0 || last.written && close);
        let offset = if together { last.offset } else { here.wrapping_add(value.wrapping_sub(now)) };
        *last = TscSync { offset, khz: self.tsc_khz, written: true };
        drop(last);
        self.shift_tsc(offset.wrapping_sub(here));
    }

    fn shift_tsc(&mut self, by: u64) {
        self.msrs().1.shift_tsc(by);
        self.msrs.clock_changed = true;
    }

    /// The deadline is a value of the counter, which now runs at another speed.
    fn rearm_deadline(&mut self) {
        self.msrs().1.shift_tsc(0);
    }

    /// Reads the host's counter `ticks` as the guest's.
    pub(super) fn guest_tsc(&self, ticks: u64) -> u64 {
        guest_tsc(ticks, self.cpu.controls.tsc_multiplier, self.cpu.controls.tsc_offset)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::vm;
    use super::*;

    #[test]
    fn frequencies() {
        let mut vcpu = vm().create_vcpu(0).unwrap();
        let host = tsc::host_khz();
        assert_eq!(vcpu.tsc_khz(), host);
        vcpu.set_tsc_khz(0).unwrap();
        assert_eq!((vcpu.tsc_khz(), vcpu.cpu.controls.tsc_multiplier), (host, RATIO_ONE));
        vcpu.set_tsc_khz(host / 2).unwrap();
        assert!(vcpu.cpu.controls.tsc_multiplier.abs_diff(RATIO_ONE / 2) < 1 << 30);
        vcpu.set_tsc_khz(host + 1).unwrap();
        assert_eq!((vcpu.tsc_khz(), vcpu.cpu.controls.tsc_multiplier), (host + 1, RATIO_ONE));
        assert!(vcpu.set_tsc_khz(u32::MAX).is_err());
    }

    #[test]
    fn the_offset_is_an_attribute() {
        let mut vcpu = vm().create_vcpu(0).unwrap();
        assert!(vcpu.has_device_attr(0, 0).is_ok());
        assert_eq!(vcpu.has_device_attr(0, 1).unwrap_err().errno(), libc::ENXIO);
        assert_eq!(vcpu.has_device_attr(1, 0).unwrap_err().errno(), libc::ENXIO);
        vcpu.set_tsc_offset(12345);
        assert_eq!(vcpu.tsc_offset(), 12345);
    }

    #[test]
    fn counters_that_are_written_alike_run_in_step() {
        let vm = vm();
        let mut vcpus = [0, 1].map(|id| vm.create_vcpu(id).unwrap());
        let offsets = |vcpus: &[Vcpu; 2]| (vcpus[0].tsc_offset(), vcpus[1].tsc_offset());
        let begin = offsets(&vcpus);
        assert_eq!(begin.0, begin.1);
        // Zero keeps the counter of the VM's creation.
        vcpus.iter_mut().for_each(|vcpu| vcpu.write_tsc(0));
        assert_eq!(offsets(&vcpus), begin);
        vcpus.iter_mut().for_each(|vcpu| vcpu.write_tsc(1 << 50));
        let (first, second) = offsets(&vcpus);
        assert_eq!(first, second);
        assert_ne!(first, begin.0);
        // A vCPU that comes later joins them.
        assert_eq!(vm.create_vcpu(2).unwrap().tsc_offset(), first);
        // Farther away than a second: a counter of its own.
        vcpus[1].write_tsc(1 << 40);
        assert_ne!(vcpus[1].tsc_offset(), first);
    }
}
