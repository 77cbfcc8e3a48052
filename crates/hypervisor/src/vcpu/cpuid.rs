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
        self.own_features = self.cpuid.own_features();
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
        let mut values = self.cpuid.lookup(leaf, subleaf, &self.cpu.state, &self.cpuid_state());
        if (leaf, subleaf) == (7, 0) && self.msrs.hides_tsx() {
            values[1] &= !(1 << Feature::Rtm.row().bit | 1 << Feature::Hle.row().bit);
        }
        values
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

    /// Spec M6.
    #[test]
    fn ac_m6_tsx_ctrl_hides_transactional_memory() {
        let mut vcpu = vcpu();
        let mut table = vcpu.vm.system().supported_cpuid();
        let leaf = table.iter_mut().find(|e| (e.function, e.index) == (7, 0)).unwrap();
        leaf.ebx |= 1 << 4 | 1 << 11;
        vcpu.set_cpuid2(&table).unwrap();
        let tsx = |vcpu: &super::Vcpu| vcpu.cpuid_values(7, 0)[1] & (1 << 4 | 1 << 11);
        vcpu.write_msr(0x10a, 1 << 7, true).unwrap();
        for (value, seen) in [(0, 1 << 4 | 1 << 11), (1, 1 << 4 | 1 << 11), (2, 0), (3, 0)] {
            vcpu.write_msr(0x122, value, false).unwrap();
            assert_eq!(tsx(&vcpu), seen, "{value}");
        }
        vcpu.reset();
        assert_ne!(tsx(&vcpu), 0, "RESET clears the register");
    }

    /// Spec V2.
    #[test]
    fn ac_v2_a_feature_register_is_fixed_by_the_first_run() {
        let mut vcpu = vcpu();
        vcpu.write_msr(0x10a, 0b1011, true).unwrap();
        vcpu.has_run = true;
        vcpu.write_msr(0x10a, 0b1011, true).unwrap();
        assert!(vcpu.write_msr(0x10a, 0b1001, true).is_err());
        assert_eq!(vcpu.read_msr(0x10a, true), Ok(0b1011));
    }

    /// Spec V5.
    #[test]
    fn ac_v5_without_the_quirk_feature_registers_are_the_clients_to_set() {
        let vm = super::super::testing::vm();
        vm.disable_quirks2(kvm_bindings::KVM_X86_QUIRK_STUFF_FEATURE_MSRS.into()).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        assert_eq!((vcpu.read_msr(0x10a, true), vcpu.read_msr(0xce, true)), (Ok(0), Ok(0)));
        let mut stuffed = super::super::testing::vcpu();
        assert_ne!(stuffed.read_msr(0x10a, true), Ok(0));
    }

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
