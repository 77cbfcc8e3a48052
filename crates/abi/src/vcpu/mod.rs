//! ioctls on a vCPU (kernel: `kvm_vcpu_ioctl`, `kvm_arch_vcpu_ioctl`). KVM_RUN is in [`crate::run`].

use hypervisor::Vcpu;
use hypervisor::vcpu::XSAVE_SIZE;
use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_debugregs,
    kvm_device_attr, kvm_enable_cap, kvm_fpu, kvm_guest_debug, kvm_interrupt, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_pre_fault_memory, kvm_regs, kvm_sregs, kvm_sregs2, kvm_tpr_access_ctl,
    kvm_translation, kvm_vcpu_events, kvm_x86_mce, kvm_xcrs,
};

use crate::error::Errno;
use crate::object::{Reply, VcpuObject};
use crate::system::{CPUID_ENTRIES, give_cpuid};
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

pub(crate) fn smi(vcpu: &mut Vcpu, _: Argument) -> Result<Reply, Errno> {
    vcpu.smi();
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
    Ok(Reply::File(vcpu.handle().stats_descriptor()?))
}

pub(crate) fn set_tsc_khz(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.set_tsc_khz(argument.0 as u32)?;
    DONE
}

pub(crate) fn get_cpuid2(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    give_cpuid(argument, &vcpu.cpuid2())
}

pub(crate) fn get_sregs2(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    argument.write(&vcpu.sregs2())?;
    DONE
}

pub(crate) fn set_sregs2(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.set_sregs2(&argument.read::<kvm_sregs2>()?)?;
    DONE
}

/// The first 4 KiB; EINVAL if that is not all.
pub(crate) fn get_xsave(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    argument.write_slice(0, &vcpu.xsave()?[..XSAVE_SIZE])?;
    DONE
}

pub(crate) fn get_xsave2(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    argument.write_slice(0, &vcpu.xsave2())?;
    DONE
}

/// Reads as much as KVM_GET_XSAVE2 gives, whatever the size in the number says.
pub(crate) fn set_xsave(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.set_xsave(&argument.read_slice(0, vcpu.xsave_size())?)?;
    DONE
}

pub(crate) fn get_xcrs(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    argument.write(&vcpu.xcrs())?;
    DONE
}

pub(crate) fn set_xcrs(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.set_xcrs(&argument.read::<kvm_xcrs>()?)?;
    DONE
}

pub(crate) fn get_lapic(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    argument.write(&vcpu.lapic_state()?)?;
    DONE
}

pub(crate) fn set_lapic(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.require_lapic()?;
    vcpu.set_lapic_state(&argument.read::<kvm_lapic_state>()?)?;
    DONE
}

pub(crate) fn tpr_access_reporting(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    let control: kvm_tpr_access_ctl = argument.read()?;
    vcpu.set_tpr_access_reporting(&control)?;
    argument.write(&control)?;
    DONE
}

pub(crate) fn set_vapic_addr(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.require_lapic()?;
    vcpu.set_vapic_address(argument.read()?)?;
    DONE
}

pub(crate) fn get_vcpu_events(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    argument.write(&vcpu.vcpu_events())?;
    DONE
}

pub(crate) fn set_vcpu_events(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.set_vcpu_events(&argument.read::<kvm_vcpu_events>()?)?;
    DONE
}

pub(crate) fn x86_setup_mce(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.setup_mce(argument.read()?)?;
    DONE
}

pub(crate) fn x86_set_mce(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.set_mce(&argument.read::<kvm_x86_mce>()?)?;
    DONE
}

pub(crate) fn kvmclock_ctrl(vcpu: &mut Vcpu, _: Argument) -> Result<Reply, Errno> {
    vcpu.kvmclock_ctrl()?;
    DONE
}

pub(crate) fn has_device_attr(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    let attribute: kvm_device_attr = argument.read()?;
    vcpu.has_device_attr(attribute.group, attribute.attr)?;
    DONE
}

pub(crate) fn get_device_attr(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    let attribute: kvm_device_attr = argument.read()?;
    vcpu.has_device_attr(attribute.group, attribute.attr)?;
    Argument(attribute.addr).write(&vcpu.tsc_offset())?;
    DONE
}

pub(crate) fn set_device_attr(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    let attribute: kvm_device_attr = argument.read()?;
    vcpu.has_device_attr(attribute.group, attribute.attr)?;
    vcpu.set_tsc_offset(Argument(attribute.addr).read()?);
    DONE
}

/// KVM_ENABLE_CAP on a vCPU: none takes flags.
pub(crate) fn enable_cap(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    let request: kvm_enable_cap = argument.read()?;
    match request.cap {
        _ if request.flags != 0 => Err(Errno::INVALID),
        KVM_CAP_ENFORCE_PV_FEATURE_CPUID => {
            vcpu.enforce_pv_features(request.args[0] != 0);
            DONE
        }
        _ => Err(Errno::INVALID),
    }
}

pub(crate) fn set_guest_debug(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    vcpu.set_guest_debug(&argument.read::<kvm_guest_debug>()?)?;
    DONE
}

pub(crate) fn translate(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    let request: kvm_translation = argument.read()?;
    argument.write(&vcpu.translate(request.linear_address))?;
    DONE
}

pub(crate) fn pre_fault_memory(object: &VcpuObject, argument: Argument) -> Result<Reply, Errno> {
    let mut range: kvm_pre_fault_memory = argument.read()?;
    let result = object.lock().pre_fault_memory(&mut range);
    // What is left is told in any case.
    argument.write(&range)?;
    result.inspect_err(|error| object.note(error))?;
    DONE
}

/// KVM_SET_CPUID: entries without subleaves.
pub(crate) fn set_cpuid(vcpu: &mut Vcpu, argument: Argument) -> Result<Reply, Errno> {
    let count: u32 = argument.read()?;
    if count > KVM_MAX_CPUID_ENTRIES as u32 {
        return Err(Errno::TOO_BIG);
    }
    // struct kvm_cpuid_entry: function, EAX, EBX, ECX, EDX, padding.
    let entries: Vec<[u32; 6]> = argument.read_slice(CPUID_ENTRIES, count as usize)?;
    let wide = |&[function, eax, ebx, ecx, edx, _]: &[u32; 6]| kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    vcpu.set_cpuid2(&entries.iter().map(wide).collect::<Vec<_>>())?;
    DONE
}

#[cfg(test)]
mod amx_tests;
#[cfg(test)]
mod notify_tests;
#[cfg(test)]
mod split_lock_tests;
#[cfg(test)]
mod tests;
