//! KVM_SET_CPUID2 and KVM_GET_CPUID2.

use kvm_bindings::{KVM_X86_DISABLE_EXITS_HLT, KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT, kvm_cpuid_entry2};
use silicon::model::Feature;

use super::Vcpu;
use crate::cpuid::{Cpuid, CpuidError, CpuidState, pv};
use crate::error::Error;
use crate::irqchip::lapic::ApicFeatures;
use crate::msr::MISC_ENABLE_MWAIT;
use crate::permissions::{Beneficiary, DYNAMIC};

impl Vcpu {
    /// KVM_SET_CPUID2: what the guest sees, and what the processor offers it from now on. Once the vCPU has run, only
    /// what it has already can be set: EINVAL for anything else. EPERM for XSAVE components that guests may not use. The vCPU is
    /// as it was where the table is refused.
    pub fn set_cpuid2(&mut self, entries: &[kvm_cpuid_entry2]) -> Result<(), Error> {
        let mut cpuid = Cpuid::from_entries(entries)?;
        if self.vm.policy().disabled_exits() & KVM_X86_DISABLE_EXITS_HLT != 0 {
            // Without exits a halt cannot be ended by a hypercall.
            cpuid.hide_pv_features(1 << pv::UNHALT);
        }
        if self.has_run {
            let (state, runtime) = (&self.cpu.state, self.cpuid_state());
            let same = cpuid.entries(state, &runtime) == self.cpuid.entries(state, &runtime);
            return if same {
                Ok(())
            } else {
                Err(Error::Invalid("the vCPU has run with another CPUID table"))
            };
        }
        self.dynamic_xcr0 |= self.permitted_dynamic(cpuid.xcr0())?;
        self.cpuid = cpuid;
        self.pv_features = self.cpuid.pv_features();
        self.cpu.set_features(self.cpuid.features());
        self.update_apic_features();
        Ok(())
    }

    /// The dynamically enabled components among those that a CPUID table has. EPERM if guests may not use them. (Memory for
    /// them is only allocated once the guest needs it; the kernel does it here, and makes EFAULT of a lack of it.)
    fn permitted_dynamic(&self, xcr0: u64) -> Result<u64, CpuidError> {
        let permissions = self.vm.system().permissions();
        let wanted = xcr0 & DYNAMIC;
        match wanted & !(permissions.permitted(Beneficiary::Guests) | self.dynamic_xcr0) {
            0 => Ok(wanted),
            refused => Err(CpuidError::NotPermitted(refused)),
        }
    }

    /// KVM_GET_CPUID2: the table with the bits that follow the vCPU's state.
    pub fn cpuid2(&self) -> Vec<kvm_cpuid_entry2> {
        self.cpuid.entries(&self.cpu.state, &self.cpuid_state())
    }

    /// EAX, EBX, ECX, EDX of a leaf as the guest sees them.
    pub(super) fn cpuid_values(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.cpuid.lookup(leaf, subleaf, &self.cpu.state, &self.cpuid_state())
    }

    fn cpuid_state(&self) -> CpuidState {
        let shows_mwait = !self.vm.has_quirk(KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT);
        CpuidState {
            apic_base: self.apic_base(),
            mwait: shows_mwait.then(|| self.msrs.misc_enable() & MISC_ENABLE_MWAIT != 0),
        }
    }

    /// What CPUID and MCG_CAP say of the local APIC.
    pub(super) fn update_apic_features(&mut self) {
        if let Some(lapic) = &self.lapic {
            let has = |feature| self.cpu.features.has(feature);
            lapic.set_features(ApicFeatures {
                x2apic: has(Feature::X2apic),
                tsc_deadline: has(Feature::TscDeadline),
                cmci: self.msrs.has_cmci(),
                physical_address_bits: self.cpu.features.physical_bits(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::vcpu;

    #[test]
    fn after_the_first_run_only_the_same_table() {
        let mut vcpu = vcpu();
        let table = vcpu.vm.system().supported_cpuid();
        vcpu.set_cpuid2(&table).unwrap();
        vcpu.set_cpuid2(&table[1..]).unwrap();
        vcpu.set_cpuid2(&table).unwrap();
        vcpu.has_run = true;
        vcpu.set_cpuid2(&vcpu.cpuid2().clone()).unwrap();
        let mut other = table.clone();
        other[1].ebx ^= 1;
        for wrong in [&other[..], &table[1..]] {
            assert_eq!(vcpu.set_cpuid2(wrong).unwrap_err().errno(), libc::EINVAL);
        }
        assert_eq!(vcpu.cpuid2().len(), table.len());
    }
}
