//! The system object: what a client opens `/dev/kvm` for.

use std::sync::Arc;

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use silicon::model::CpuModel;

use crate::cpuid;
use crate::error::Error;
use crate::host::HostParams;
use crate::msr;
use crate::vm::Vm;

/// vCPUs that a VM can have (KVM_CAP_MAX_VCPUS; kernel: CONFIG_KVM_MAX_NR_VCPUS by default).
pub const VCPUS_MAX: u32 = 1024;
/// Ids of vCPUs are below this (KVM_CAP_MAX_VCPU_ID; kernel: four for each vCPU).
pub const VCPU_IDS_MAX: u32 = 4 * VCPUS_MAX;

/// The machine that VMs run on: a processor model and the parameters of the host kernel that we stand in for.
#[derive(Debug)]
pub struct System {
    model: CpuModel,
    host: HostParams,
}

impl System {
    /// A machine with processors of `model`, booted with `host`.
    pub fn new(model: CpuModel, host: HostParams) -> Arc<System> {
        Arc::new(System { model, host })
    }

    /// The processor model.
    pub fn model(&self) -> &CpuModel {
        &self.model
    }

    /// The host kernel's parameters.
    pub fn host(&self) -> &HostParams {
        &self.host
    }

    /// vCPUs that run well at the same time (KVM_CAP_NR_VCPUS): one for each processor of the host, but four on any; VMMs
    /// take it as advice, and that many have been tried on two.
    pub fn vcpus_recommended(&self) -> u32 {
        const ANYWHERE: u32 = 4;
        let host = std::thread::available_parallelism().map_or(1, |n| n.get());
        u32::try_from(host).unwrap_or(VCPUS_MAX).clamp(ANYWHERE, VCPUS_MAX)
    }

    /// Extended-state components that a guest can have (KVM_X86_XCOMP_GUEST_SUPP), as in XCR0.
    pub fn guest_xcr0(&self) -> u64 {
        self.model.features().xcr0_mask()
    }

    /// Bytes of the XSAVE area of its vCPUs (KVM_CAP_XSAVE2).
    pub fn xsave_size(&self) -> usize {
        crate::vcpu::xstate::xsave_size(self.model.features().xcr0_mask())
    }

    /// KVM_CREATE_VM.
    pub fn create_vm(self: &Arc<System>) -> Result<Arc<Vm>, Error> {
        Vm::new(self.clone())
    }

    /// KVM_GET_SUPPORTED_CPUID.
    pub fn supported_cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        cpuid::supported(&self.model)
    }

    /// KVM_GET_EMULATED_CPUID: what a guest may be given although the processor lacks it.
    pub fn emulated_cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        cpuid::emulated(&self.model)
    }

    /// KVM_GET_MSR_INDEX_LIST: the registers that a client saves and restores.
    pub fn msr_index_list(&self) -> Vec<u32> {
        msr::index_list(&self.model)
    }

    /// KVM_GET_MSR_FEATURE_INDEX_LIST.
    pub fn msr_feature_index_list(&self) -> Vec<u32> {
        msr::feature_index_list()
    }

    /// KVM_GET_MSRS on the system: fills in feature registers; how many were read before the first that is none.
    pub fn get_msrs(&self, entries: &mut [kvm_msr_entry]) -> usize {
        for (done, entry) in entries.iter_mut().enumerate() {
            match msr::feature_msr(entry.index, &self.model) {
                Some(value) => entry.data = value,
                None => return done,
            }
        }
        entries.len()
    }

    /// KVM_X86_GET_MCE_CAP_SUPPORTED: bits of MCG_CAP that KVM_X86_SETUP_MCE takes.
    pub fn mce_capabilities(&self) -> u64 {
        msr::MCE_CAPABILITIES
    }
}
