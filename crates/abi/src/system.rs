//! ioctls on `/dev/kvm` (kernel: `kvm_dev_ioctl`, `kvm_arch_dev_ioctl`).

use std::sync::Arc;

use hypervisor::System;
use kvm_bindings::{KVM_API_VERSION, KVM_X86_XCOMP_GUEST_SUPP, kvm_cpuid_entry2, kvm_device_attr};

use crate::capability;
use crate::error::Errno;
use crate::object::{Created, Reply};
use crate::run::RunArea;
use crate::user::Argument;
use crate::vcpu::{MSR_ENTRIES, read_msrs};

/// Where the entries of a `kvm_cpuid2` begin.
pub(crate) const CPUID_ENTRIES: u64 = 8;
/// Where the numbers of a `kvm_msr_list` begin.
const MSR_LIST_INDICES: u64 = 4;

const DONE: Result<Reply, Errno> = Ok(Reply::Value(0));

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

pub(crate) fn check_extension(system: &Arc<System>, argument: Argument) -> Result<Reply, Errno> {
    Ok(Reply::Value(capability::check_extension(system, None, argument.0)))
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

pub(crate) fn get_emulated_cpuid(system: &Arc<System>, argument: Argument) -> Result<Reply, Errno> {
    give_cpuid(argument, &system.emulated_cpuid())
}

/// Fills in the client's `kvm_cpuid2`: E2BIG if it has room for fewer entries.
pub(crate) fn give_cpuid(argument: Argument, entries: &[kvm_cpuid_entry2]) -> Result<Reply, Errno> {
    let room: u32 = argument.read()?;
    if (room as usize) < entries.len() {
        return Err(Errno::TOO_BIG);
    }
    argument.write_slice(CPUID_ENTRIES, entries)?;
    argument.write(&(entries.len() as u32))?;
    DONE
}

pub(crate) fn get_msr_index_list(system: &Arc<System>, argument: Argument) -> Result<Reply, Errno> {
    give_msr_list(argument, &system.msr_index_list())
}

pub(crate) fn get_msr_feature_index_list(system: &Arc<System>, argument: Argument) -> Result<Reply, Errno> {
    give_msr_list(argument, &system.msr_feature_index_list())
}

/// Fills in the client's `kvm_msr_list`: the number always, also with E2BIG when it has room for fewer.
fn give_msr_list(argument: Argument, indices: &[u32]) -> Result<Reply, Errno> {
    let room: u32 = argument.read()?;
    argument.write(&(indices.len() as u32))?;
    if (room as usize) < indices.len() {
        return Err(Errno::TOO_BIG);
    }
    argument.write_slice(MSR_LIST_INDICES, indices)?;
    DONE
}

pub(crate) fn get_msrs(system: &Arc<System>, argument: Argument) -> Result<Reply, Errno> {
    let mut entries = read_msrs(argument)?;
    let done = system.get_msrs(&mut entries);
    argument.write_slice(MSR_ENTRIES, &entries)?;
    Ok(Reply::Value(done as i32))
}

pub(crate) fn get_mce_cap_supported(system: &Arc<System>, argument: Argument) -> Result<Reply, Errno> {
    argument.write(&system.mce_capabilities())?;
    DONE
}

/// The value of an attribute of the system.
fn attribute(system: &System, attribute: &kvm_device_attr) -> Result<u64, Errno> {
    match (attribute.group, attribute.attr) {
        (0, id) if id == u64::from(KVM_X86_XCOMP_GUEST_SUPP) => Ok(system.permissions().supported()),
        _ => Err(Errno::NXIO),
    }
}

pub(crate) fn get_device_attr(system: &Arc<System>, argument: Argument) -> Result<Reply, Errno> {
    let request: kvm_device_attr = argument.read()?;
    let value = attribute(system, &request)?;
    Argument(request.addr).write(&value)?;
    DONE
}

pub(crate) fn has_device_attr(system: &Arc<System>, argument: Argument) -> Result<Reply, Errno> {
    attribute(system, &argument.read()?)?;
    DONE
}
