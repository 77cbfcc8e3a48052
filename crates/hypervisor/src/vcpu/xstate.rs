//! KVM_GET/SET_XSAVE, KVM_GET_XSAVE2, KVM_GET/SET_XCRS; IA32_XFD until the guest has a use for tiles, and the room for them.
//!
//! The kernel allocates room for tiles at KVM_SET_CPUID2 and gives IA32_XFD to the guest at its first write that is not
//! zero. Here it is as the thread "Thoughts of AMX KVM support based on latest kernel" (kvm, 2021-11-10) has it: both
//! happen when XCR0\[18\] = 1 and IA32_XFD\[18\] = 0 come together, whichever comes last, after the write has been found
//! valid, outside guest mode, and before anything has changed.

use std::sync::atomic::Ordering;

use kvm_bindings::kvm_xcrs;
use silicon::exec::xstate_image::XstateError;
use silicon::model::Feature;
use silicon::model::msrs::StateMsr;
use silicon::model::xstate::{SSE, TILEDATA, X87, size_standard};

use super::Vcpu;
use crate::error::Error;
use crate::msr::filter::MsrAccess;
use crate::permissions::DYNAMIC;

/// IA32_XFD.
const IA32_XFD: u32 = 0x1c4;
/// Where an XSAVE area has XSTATE_BV.
const XSTATE_BV: usize = 512;

/// Bytes of `struct kvm_xsave` without what follows its fixed part.
pub const XSAVE_SIZE: usize = 4096;

impl Vcpu {
    /// Bytes that KVM_GET_XSAVE2 gives and KVM_SET_XSAVE takes: room for every component of the processor model but for those
    /// that KVM_SET_CPUID2 has not given the vCPU; at least [`XSAVE_SIZE`].
    pub fn xsave_size(&self) -> usize {
        xsave_size(self.settable_xcr0())
    }

    /// Components that KVM_SET_XSAVE takes, whatever the guest's CPUID says.
    fn settable_xcr0(&self) -> u64 {
        self.vm.system().model().features().xcr0_mask() & !DYNAMIC | self.dynamic_xcr0
    }

    /// Components that KVM_GET_XSAVE2 and KVM_SET_XSAVE carry, as far as IA32_XFD decides it: KVM's do not carry what it
    /// disables. With RING3_CAP_LIVE_XSTATE they do.
    fn carried(&self) -> u64 {
        if self.vm.policy().live_xstate() { u64::MAX } else { !self.cpu.state.xfd }
    }

    /// KVM_GET_XSAVE: EINVAL if the vCPU has components that do not fit.
    pub fn xsave(&self) -> Result<Vec<u8>, Error> {
        if self.xsave_size() > XSAVE_SIZE {
            return Err(Error::Invalid("the XSAVE area is too large for KVM_GET_XSAVE"));
        }
        Ok(self.xsave2())
    }

    /// KVM_GET_XSAVE2: an XSAVE area in the standard format, with the components that the guest's CPUID enumerates.
    pub fn xsave2(&self) -> Vec<u8> {
        let mut area = vec![0; self.xsave_size()];
        let components = (self.cpu.features.xcr0_mask() | X87 | SSE) & self.carried();
        self.cpu.save_xstate(components, &mut area);
        area
    }

    /// KVM_SET_XSAVE: takes any component of the processor model that the vCPU can have, whatever the guest's CPUID says.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for an area that is none, [`Error::NoRoom`] for tiles.
    pub fn set_xsave(&mut self, area: &[u8]) -> Result<(), Error> {
        let mut area = area.to_vec();
        if let Some(bits) = area.get_mut(XSTATE_BV..XSTATE_BV + 8) {
            let mask = (!DYNAMIC | self.carried()).to_le_bytes();
            bits.iter_mut().zip(mask).for_each(|(byte, mask)| *byte &= mask);
        }
        let loaded = self.cpu.load_xstate(self.settable_xcr0() | X87 | SSE, &area);
        self.count_tiles();
        loaded.map_err(|error| match error {
            XstateError::TileData(error) => Error::NoRoom(error),
            error => {
                tracing::debug!("KVM_SET_XSAVE: {error}");
                Error::Invalid("the XSAVE area")
            }
        })
    }

    /// RDMSR or WRMSR of a register has exited.
    pub(super) fn count_xfd_exit(&mut self, index: u32) {
        if index == IA32_XFD {
            self.handle.stats.xfd_exits.count();
        }
    }

    /// The guest writes an MSR: if it is IA32_XFD, and the write is one that will be done, there must be room for what it
    /// enables.
    pub(super) fn prepare_xfd_write(&mut self, index: u32, value: u64) -> Result<(), Error> {
        self.count_xfd_exit(index);
        let valid = index == IA32_XFD
            && self.cpu.features.has(Feature::Xfd)
            && self.cpu.valid_state_msr(StateMsr::Xfd, value)
            && self.vm.msr_filters().allows(index, MsrAccess::Write);
        if valid { self.make_room(self.cpu.state.xcr0, value) } else { Ok(()) }
    }

    /// Makes room for tiles if the guest can use them with these values of XCR0 and IA32_XFD. From then on IA32_XFD is the
    /// guest's without exits.
    ///
    /// # Errors
    ///
    /// [`Error::NoRoom`], with nothing changed.
    pub(super) fn make_room(&mut self, xcr0: u64, xfd: u64) -> Result<(), Error> {
        if xcr0 & !xfd & TILEDATA == 0 {
            return Ok(());
        }
        self.reserve_tiles()?;
        self.cpu.controls.xfd_exiting = false;
        Ok(())
    }

    /// Makes room for tiles.
    pub(super) fn reserve_tiles(&mut self) -> Result<(), Error> {
        let reserved = self.cpu.reserve_tile_data();
        self.count_tiles();
        reserved.map_err(|error| {
            tracing::warn!("vCPU {}: {error}", self.handle.id());
            Error::NoRoom(error)
        })
    }

    fn count_tiles(&self) {
        self.handle.stats.tile_bytes.store(self.cpu.tile_data_bytes() as u64, Ordering::Relaxed);
    }

    /// KVM_GET_XCRS.
    pub fn xcrs(&self) -> kvm_xcrs {
        let mut out = kvm_xcrs::default();
        if self.vm.system().model().has(Feature::Xsave) {
            out.nr_xcrs = 1;
            out.xcrs[0].value = self.cpu.state.xcr0;
        }
        out
    }

    /// KVM_SET_XCRS: EINVAL for flags, for too many registers, and for a value of XCR0 that the guest cannot set.
    pub fn set_xcrs(&mut self, given: &kvm_xcrs) -> Result<(), Error> {
        let count = given.nr_xcrs as usize;
        let known = self.vm.system().model().has(Feature::Xsave);
        if !known || given.flags != 0 || count > given.xcrs.len() {
            return Err(Error::Invalid("kvm_xcrs"));
        }
        let Some(xcr0) = given.xcrs.iter().take(count).find(|xcr| xcr.xcr == 0) else { return Ok(()) };
        // Without XSAVE in the guest's CPUID, x87 is all that can be enabled: the value after reset.
        let valid = self.cpu.features.valid_xcr0(xcr0.value) || xcr0.value == X87;
        if !valid {
            return Err(Error::Invalid("XCR0"));
        }
        self.cpu.state.xcr0 = xcr0.value;
        self.cpu.refresh_mode();
        Ok(())
    }
}

/// What KVM_CAP_XSAVE2 answers for processors whose XCR0 can be `xcr0`.
pub(crate) fn xsave_size(xcr0: u64) -> usize {
    (size_standard(xcr0) as usize).max(XSAVE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::super::testing::vcpu;

    #[test]
    fn areas_come_back() {
        let mut vcpu = vcpu();
        let features = vcpu.vm.system().model().features();
        vcpu.cpu.set_features(features);
        vcpu.cpu.state.zmm[3].0[..32].fill(0x5a);
        vcpu.cpu.state.x87.fcw = 0x37f;
        let area = vcpu.xsave2();
        assert_eq!(area.len(), vcpu.xsave_size());
        vcpu.cpu.state.zmm[3].0.fill(0);
        vcpu.set_xsave(&area).unwrap();
        assert!(vcpu.cpu.state.zmm[3].0[..16].iter().all(|&byte| byte == 0x5a));
        let mut wrong = area.clone();
        wrong[512 + 7] = 0x40;
        assert_eq!(vcpu.set_xsave(&wrong).unwrap_err().errno(), libc::EINVAL);
    }

    #[test]
    fn xcr0_is_checked() {
        let mut vcpu = vcpu();
        let features = vcpu.vm.system().model().features();
        vcpu.cpu.set_features(features);
        let mut xcrs = vcpu.xcrs();
        assert_eq!((xcrs.nr_xcrs, xcrs.xcrs[0].value), (1, 1));
        for (value, valid) in [(3, true), (2, false), (1, true), (1 << 62 | 3, false)] {
            xcrs.xcrs[0].value = value;
            assert_eq!(vcpu.set_xcrs(&xcrs).is_ok(), valid, "{value:#x}");
        }
        xcrs.xcrs[0] = kvm_bindings::kvm_xcr { xcr: 1, value: 77, ..Default::default() };
        vcpu.set_xcrs(&xcrs).unwrap();
        xcrs.nr_xcrs = 17;
        assert!(vcpu.set_xcrs(&xcrs).is_err());
        assert_eq!(vcpu.xcrs().xcrs[0].value, 1);
    }
}
