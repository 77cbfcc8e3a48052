//! KVM_GET/SET_XSAVE, KVM_GET_XSAVE2, KVM_GET/SET_XCRS.

use kvm_bindings::kvm_xcrs;
use silicon::model::Feature;
use silicon::model::xstate::{SSE, X87, size_standard};

use super::Vcpu;
use crate::error::Error;

/// Bytes of `struct kvm_xsave` without what follows its fixed part.
pub const XSAVE_SIZE: usize = 4096;

impl Vcpu {
    /// Bytes that KVM_GET_XSAVE2 gives and KVM_SET_XSAVE takes (KVM_CAP_XSAVE2): room for every component of the
    /// processor model, at least [`XSAVE_SIZE`].
    pub fn xsave_size(&self) -> usize {
        self.vm.system().xsave_size()
    }

    /// KVM_GET_XSAVE: EINVAL if the model has components that do not fit.
    pub fn xsave(&self) -> Result<Vec<u8>, Error> {
        if self.xsave_size() > XSAVE_SIZE {
            return Err(Error::Invalid("the XSAVE area is too large for KVM_GET_XSAVE"));
        }
        Ok(self.xsave2())
    }

    /// KVM_GET_XSAVE2: an XSAVE area in the standard format, with the components that the guest's CPUID enumerates.
    pub fn xsave2(&self) -> Vec<u8> {
        let mut area = vec![0; self.xsave_size()];
        self.cpu.save_xstate(self.cpu.features.xcr0_mask() | X87 | SSE, &mut area);
        area
    }

    /// KVM_SET_XSAVE: takes any component of the processor model, whatever the guest's CPUID says.
    pub fn set_xsave(&mut self, area: &[u8]) -> Result<(), Error> {
        let allowed = self.vm.system().model().features().xcr0_mask() | X87 | SSE;
        self.cpu.load_xstate(allowed, area).map_err(|error| {
            tracing::debug!("KVM_SET_XSAVE: {error}");
            Error::Invalid("the XSAVE area")
        })
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
