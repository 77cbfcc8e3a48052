//! The system object: what a client opens `/dev/kvm` for.

use std::sync::Arc;

use kvm_bindings::kvm_cpuid_entry2;
use silicon::model::CpuModel;

use crate::cpuid;
use crate::error::Error;
use crate::host::HostParams;
use crate::vm::Vm;

/// vCPUs that a VM can have (KVM_CAP_MAX_VCPUS).
pub const VCPUS_MAX: u32 = 64;

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

    /// KVM_CREATE_VM.
    pub fn create_vm(self: &Arc<System>) -> Result<Arc<Vm>, Error> {
        Vm::new(self.clone())
    }

    /// KVM_GET_SUPPORTED_CPUID.
    pub fn supported_cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        cpuid::supported(&self.model)
    }
}
