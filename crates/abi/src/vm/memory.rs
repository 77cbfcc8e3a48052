//! Memory slots, their dirty logs, and zones of coalesced writes.

use std::sync::Arc;

use hypervisor::Vm;
use hypervisor::memory::DirtyRange;
use kvm_bindings::{
    kvm_clear_dirty_log, kvm_coalesced_mmio_zone, kvm_dirty_log, kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
};

use super::DONE;
use crate::error::Errno;
use crate::object::Reply;
use crate::user::Argument;

/// Where the bitmap's address is in `kvm_dirty_log` and in `kvm_clear_dirty_log`.
const DIRTY_BITMAP: u64 = 8;
const CLEAR_DIRTY_BITMAP: u64 = 16;
/// Where `pio` is in `kvm_coalesced_mmio_zone`.
const ZONE_PIO: u64 = 12;

pub(crate) fn set_user_memory_region(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.set_user_memory_region(argument.read::<kvm_userspace_memory_region>()?)?;
    DONE
}

pub(crate) fn set_user_memory_region2(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    vm.set_user_memory_region2(&argument.read::<kvm_userspace_memory_region2>()?)?;
    DONE
}

pub(crate) fn get_dirty_log(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    let request: kvm_dirty_log = argument.read()?;
    let bitmap: u64 = argument.read_at(DIRTY_BITMAP)?;
    Argument(bitmap).write_slice(0, &vm.dirty_log(request.slot)?)?;
    DONE
}

pub(crate) fn clear_dirty_log(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    let request: kvm_clear_dirty_log = argument.read()?;
    let bitmap: u64 = argument.read_at(CLEAR_DIRTY_BITMAP)?;
    let range =
        DirtyRange { slot: request.slot, first_page: request.first_page, pages: request.num_pages.into() };
    vm.clear_dirty_log(range, |words| Argument(bitmap).read_slice(0, words))?;
    DONE
}

fn zone(argument: Argument) -> Result<(kvm_coalesced_mmio_zone, u32), Errno> {
    Ok((argument.read()?, argument.read_at(ZONE_PIO)?))
}

pub(crate) fn register_coalesced_mmio(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    let (zone, port) = zone(argument)?;
    vm.coalesced().register(&zone, port)?;
    DONE
}

pub(crate) fn unregister_coalesced_mmio(vm: &Arc<Vm>, argument: Argument) -> Result<Reply, Errno> {
    let (zone, port) = zone(argument)?;
    vm.coalesced().unregister(&zone, port)?;
    DONE
}

pub(crate) fn reset_dirty_rings(vm: &Arc<Vm>, _: Argument) -> Result<Reply, Errno> {
    Ok(Reply::Value(vm.reset_dirty_rings()? as i32))
}
