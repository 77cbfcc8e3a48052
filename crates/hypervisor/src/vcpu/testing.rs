//! vCPUs for unit tests.

use std::sync::Arc;

use silicon::model::CpuModel;

use super::Vcpu;
use crate::{HostParams, System, Vm};

/// A VM without interrupt controllers and memory.
pub(super) fn vm() -> Arc<Vm> {
    System::new(CpuModel::default(), HostParams::default()).create_vm().unwrap()
}

/// A vCPU of such a VM.
pub(super) fn vcpu() -> Vcpu {
    vm().create_vcpu(0).unwrap()
}

/// A vCPU with an in-kernel local APIC.
pub(super) fn vcpu_with_apic() -> Vcpu {
    let vm = vm();
    vm.create_irqchip().unwrap();
    vm.create_vcpu(0).unwrap()
}
