//! ioctls on a vCPU (kernel: `kvm_vcpu_ioctl`, `kvm_arch_vcpu_ioctl`). KVM_RUN is in [`crate::run`].

use std::os::fd::IntoRawFd;

use hypervisor::Vcpu;
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_debugregs, kvm_fpu, kvm_interrupt, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs,
};

use crate::error::Errno;
use crate::object::Reply;
use crate::system::CPUID_ENTRIES;
use crate::user::Argument;

/// Entries that KVM_GET_MSRS and KVM_SET_MSRS take (kernel: `MAX_IO_MSRS`).
pub(crate) const MSRS_MAX: u32 = 256;
/// Where the entries of a `kvm_msrs` begin.
pub(crate) const MSR_ENTRIES: u64 = 8;

const DONE: Result<Reply, Errno> = Ok(Reply::Value(0));

pub(crate) fn get_regs(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    argument.write(&vcpu.regs())?;
    DONE
}

pub(crate) fn set_regs(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.set_regs(&argument.read::<kvm_regs>()?);
    DONE
}

pub(crate) fn get_sregs(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    argument.write(&vcpu.sregs())?;
    DONE
}

pub(crate) fn set_sregs(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.set_sregs(&argument.read::<kvm_sregs>()?)?;
    DONE
}

pub(crate) fn interrupt(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    let request: kvm_interrupt = argument.read()?;
    vcpu.interrupt(u8::try_from(request.irq).map_err(|_| Errno::INVALID)?)?;
    DONE
}

pub(crate) fn read_msrs(argument: Argument) -> Result<Vec<kvm_msr_entry>, Errno> {
    let count: u32 = argument.read()?;
    if count >= MSRS_MAX {
        return Err(Errno::TOO_BIG);
    }
    argument.read_slice(MSR_ENTRIES, count as usize)
}

pub(crate) fn get_msrs(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    let mut entries = read_msrs(argument)?;
    let done = vcpu.get_msrs(&mut entries);
    argument.write_slice(MSR_ENTRIES, &entries)?;
    Ok(Reply::Value(done as i32))
}

pub(crate) fn set_msrs(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    Ok(Reply::Value(vcpu.set_msrs(&read_msrs(argument)?) as i32))
}

pub(crate) fn get_fpu(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    argument.write(&vcpu.fpu())?;
    DONE
}

pub(crate) fn set_fpu(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.set_fpu(&argument.read::<kvm_fpu>()?);
    DONE
}

pub(crate) fn set_cpuid2(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    let count: u32 = argument.read()?;
    if count > KVM_MAX_CPUID_ENTRIES as u32 {
        return Err(Errno::TOO_BIG);
    }
    vcpu.set_cpuid2(&argument.read_slice(CPUID_ENTRIES, count as usize)?)?;
    DONE
}

pub(crate) fn get_mp_state(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    argument.write(&vcpu.mp_state())?;
    DONE
}

pub(crate) fn set_mp_state(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.set_mp_state(argument.read::<kvm_mp_state>()?)?;
    DONE
}

pub(crate) fn nmi(vcpu: &mut Vcpu, _: Argument) -> Result<Reply, Errno> {
    vcpu.nmi();
    DONE
}

pub(crate) fn get_debugregs(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    argument.write(&vcpu.debugregs())?;
    DONE
}

pub(crate) fn set_debugregs(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.set_debugregs(&argument.read::<kvm_debugregs>()?)?;
    DONE
}

pub(crate) fn get_tsc_khz(vcpu: &mut Vcpu, _: Argument) -> Result<Reply, Errno> {
    Ok(Reply::Value(vcpu.tsc_khz() as i32))
}

pub(crate) fn get_stats_fd(vcpu: &mut Vcpu, _: Argument) -> Result<Reply, Errno> {
    Ok(Reply::Value(vcpu.handle().stats_descriptor()?.into_raw_fd()))
}
