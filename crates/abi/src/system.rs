//! ioctls on `/dev/kvm` (kernel: `kvm_dev_ioctl`, `kvm_arch_dev_ioctl`).

use std::sync::Arc;

use hypervisor::System;
use kvm_bindings::{KVM_API_VERSION, kvm_cpuid_entry2};

use crate::capability;
use crate::error::Errno;
use crate::object::{Created, Reply};
use crate::run::RunArea;
use crate::user::Argument;

/// Where the entries of a `kvm_cpuid2` begin.
pub(crate) const CPUID_ENTRIES: u64 = 8;

pub(crate) fn get_api_version(_: &Arc<System>, argument: Argument) -> Result<Reply, Errno> {
    if argument.0 != 0 {
        return Err(Errno::INVALID);
    }
    Ok(Reply::Value(KVM_API_VERSION as i32))
}

pub(crate) fn create_vm(system: &Arc<System>, argument: Argument) -> Result<Reply, Errno> {
    // The argument is the type of VM; there is one.
    if argument.0 != 0 {
        return Err(Errno::INVALID);
    }
    Ok(Reply::Created(Created::vm(system.create_vm()?)?))
}

pub(crate) fn check_extension(_: &Arc<System>, argument: Argument) -> Result<Reply, Errno> {
    Ok(Reply::Value(capability::check_extension(argument.0)))
}

pub(crate) fn get_vcpu_mmap_size(_: &Arc<System>, argument: Argument) -> Result<Reply, Errno> {
    if argument.0 != 0 {
        return Err(Errno::INVALID);
    }
    Ok(Reply::Value(RunArea::SIZE as i32))
}

pub(crate) fn get_supported_cpuid(system: &Arc<System>, argument: Argument) -> Result<Reply, Errno> {
    give_cpuid(argument, &system.supported_cpuid())
}

/// Fills in the client's `kvm_cpuid2`: E2BIG if it has room for fewer entries.
pub(crate) fn give_cpuid(argument: Argument, entries: &[kvm_cpuid_entry2]) -> Result<Reply, Errno> {
    let room: u32 = argument.read()?;
    if (room as usize) < entries.len() {
        return Err(Errno::TOO_BIG);
    }
    argument.write_slice(CPUID_ENTRIES, entries)?;
    argument.write(&(entries.len() as u32))?;
    Ok(Reply::Value(0))
}
