//! ioctls on a VM (kernel: `kvm_vm_ioctl`, `kvm_arch_vm_ioctl`).

use std::sync::Arc;

use hypervisor::Vm;
use kvm_bindings::{
    kvm_ioeventfd, kvm_irq_level, kvm_irqfd, kvm_msi, kvm_pit_config, kvm_userspace_memory_region,
};

use crate::capability;
use crate::error::Errno;
use crate::object::{Created, Reply};
use crate::user::Argument;

/// Entries that KVM_SET_GSI_ROUTING takes (kernel: `KVM_MAX_IRQ_ROUTES`).
const ROUTES_MAX: u32 = 4096;
/// Where the entries of a `kvm_irq_routing` begin.
const ROUTING_ENTRIES: u64 = 8;

const DONE: Result<Reply, Errno> = Ok(Reply::Value(0));

pub(crate) fn check_extension(_: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    Ok(Reply::Value(capability::check_extension(argument.0)))
}

pub(crate) fn create_vcpu(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    let id = u32::try_from(argument.0).map_err(|_| Errno::INVALID)?;
    Ok(Reply::Created(Created::vcpu(vm.create_vcpu(id)?)?))
}

pub(crate) fn set_user_memory_region(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.set_user_memory_region(argument.read::<kvm_userspace_memory_region>()?)?;
    DONE
}

pub(crate) fn create_irqchip(vm: &Arc<Vm>, _: Argument) -> Result<Reply, Errno> {
    vm.create_irqchip()?;
    DONE
}

pub(crate) fn create_pit2(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.create_pit2(argument.read::<kvm_pit_config>()?)?;
    DONE
}

pub(crate) fn irq_line(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    let request: kvm_irq_level = argument.read()?;
    // The number is the first member; it shares its place with the status of KVM_IRQ_LINE_STATUS.
    let gsi = argument.read::<u32>()?;
    vm.irq_line(gsi, request.level != 0)?;
    DONE
}

pub(crate) fn signal_msi(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    Ok(Reply::Value(vm.signal_msi(&argument.read::<kvm_msi>()?)?.into()))
}

pub(crate) fn set_gsi_routing(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    let [count, flags] = [argument.read::<u32>()?, argument.read_at::<u32>(4)?];
    if count > ROUTES_MAX || flags != 0 {
        return Err(Errno::INVALID);
    }
    vm.set_gsi_routing(&argument.read_slice(ROUTING_ENTRIES, count as usize)?)?;
    DONE
}

pub(crate) fn irqfd(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.irqfd(&argument.read::<kvm_irqfd>()?)?;
    DONE
}

pub(crate) fn ioeventfd(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.ioeventfd(&argument.read::<kvm_ioeventfd>()?)?;
    DONE
}
