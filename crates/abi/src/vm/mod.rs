//! ioctls on a VM (kernel: `kvm_vm_ioctl`, `kvm_arch_vm_ioctl`).

mod interrupts;
mod memory;

use std::sync::Arc;

use hypervisor::Vm;
use hypervisor::msr::filter::{FilterRange, MsrFilter};
use kvm_bindings::{kvm_clock_data, kvm_create_device, kvm_enable_cap, kvm_msr_filter};

use crate::capability;
use crate::coalesced::SharedRing;
use crate::error::Errno;
use crate::object::{Created, Reply};
use crate::user::Argument;

pub(crate) use interrupts::*;
pub(crate) use memory::*;

const DONE: Result<Reply, Errno> = Ok(Reply::Value(0));

pub(crate) fn check_extension(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    Ok(Reply::Value(capability::check_extension(vm.system(), Some(vm), argument.0)))
}

pub(crate) fn enable_cap(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    capability::enable(vm, &argument.read::<kvm_enable_cap>()?)?;
    DONE
}

pub(crate) fn create_vcpu(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    let id = u32::try_from(argument.0).map_err(|_| Errno::INVALID)?;
    let created = Created::vcpu(vm.create_vcpu(id)?)?;
    vm.coalesced().attach_ring(|| Ok::<_, Errno>(Box::new(SharedRing::map(&created.fd)?)))?;
    Ok(Reply::Created(created))
}

pub(crate) fn set_tss_addr(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.set_tss_addr(argument.0)?;
    DONE
}

pub(crate) fn set_identity_map_addr(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.set_identity_map_addr(argument.read()?)?;
    DONE
}

pub(crate) fn set_nr_mmu_pages(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.set_nr_mmu_pages(argument.0)?;
    DONE
}

pub(crate) fn set_boot_cpu_id(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.set_boot_cpu_id(argument.0)?;
    DONE
}

pub(crate) fn get_clock(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    argument.write(&vm.get_clock())?;
    DONE
}

pub(crate) fn set_clock(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.set_clock(&argument.read::<kvm_clock_data>()?)?;
    DONE
}

pub(crate) fn set_tsc_khz(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.set_tsc_khz(argument.0 as u32)?;
    DONE
}

pub(crate) fn get_tsc_khz(vm: &Arc<Vm>, _: Argument) -> Result<Reply, Errno> {
    Ok(Reply::Value(vm.tsc_khz() as i32))
}

pub(crate) fn create_device(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.create_device(argument.read::<kvm_create_device>()?.type_)?;
    DONE
}

pub(crate) fn get_stats_fd(vm: &Arc<Vm>, _: Argument) -> Result<Reply, Errno> {
    Ok(Reply::File(vm.stats_descriptor()?))
}

pub(crate) fn set_msr_filter(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    let request: kvm_msr_filter = argument.read()?;
    let mut ranges = Vec::new();
    for range in &request.ranges {
        if let Some(words) = FilterRange::words(range.flags, range.nmsrs)? {
            let bitmap = Argument(range.bitmap as u64).read_slice(0, words)?;
            ranges.push(FilterRange { flags: range.flags, base: range.base, count: range.nmsrs, bitmap });
        }
    }
    vm.msr_filters().set(MsrFilter::new(request.flags, ranges)?);
    DONE
}

#[cfg(test)]
mod tests;
