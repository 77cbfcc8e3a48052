//! The client's memory: structures that ioctl arguments point to.
//!
//! The client's pointers are not to be trusted; a bad one is EFAULT, as `copy_from_user` makes it, and never a fault of
//! ours. The host kernel does the copying (process_vm_readv(2) on ourselves), since it alone can tell.
#![expect(unsafe_code, reason = "system calls that copy the client's memory")]

use std::mem::MaybeUninit;

use crate::error::Errno;

/// Structures that consist of integers only: each bit pattern is a value, and there is no padding that anybody
/// could learn something from.
///
/// # Safety
///
/// The type has no invalid bit patterns and no references.
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($type:ty),* $(,)?) => {
        // SAFETY: `repr(C)` structures and unions of integers (include/uapi/linux/kvm.h).
        $(unsafe impl Plain for $type {})*
    };
}

// SAFETY: as its elements.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

use kvm_bindings::*;
plain!(
    u8,
    u16,
    u32,
    u64,
    i32,
    i64,
    kvm_clock_data,
    kvm_clear_dirty_log,
    kvm_coalesced_mmio_zone,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_device_attr,
    kvm_dirty_log,
    kvm_enable_cap,
    kvm_fpu,
    kvm_guest_debug,
    kvm_interrupt,
    kvm_ioeventfd,
    kvm_irq_level,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_irqfd,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_msi,
    kvm_msr_entry,
    kvm_msr_filter,
    kvm_pit_config,
    kvm_pit_state,
    kvm_pit_state2,
    kvm_pre_fault_memory,
    kvm_regs,
    kvm_reinject_control,
    kvm_sregs,
    kvm_sregs2,
    kvm_tpr_access_ctl,
    kvm_translation,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
    kvm_vcpu_events,
    kvm_x86_mce,
    kvm_xcrs,
    kvm_create_device,
);

/// The third argument of an ioctl: a value, or the address of a structure of the client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argument(pub u64);

impl Argument {
    /// The structure that the argument points to.
    pub fn read<T: Plain>(self) -> Result<T, Errno> {
        self.read_at(0)
    }

    /// The structure `offset` bytes behind the start of the argument's.
    pub fn read_at<T: Plain>(self, offset: u64) -> Result<T, Errno> {
        let mut value = MaybeUninit::<T>::uninit();
        let bytes = std::ptr::slice_from_raw_parts_mut(value.as_mut_ptr().cast::<u8>(), size_of::<T>());
        // SAFETY: `bytes` is the memory of `value`; the copy fills it whole or fails.
        unsafe {
            copy_in(self.0.wrapping_add(offset), bytes)?;
            Ok(value.assume_init())
        }
    }

    /// `count` structures that begin `offset` bytes behind the start of the argument's. The caller bounds `count`.
    pub fn read_slice<T: Plain>(self, offset: u64, count: usize) -> Result<Vec<T>, Errno> {
        let mut values = Vec::<T>::with_capacity(count);
        let bytes =
            std::ptr::slice_from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), size_of::<T>() * count);
        // SAFETY: the vector has room for `count` values; the copy fills them all or fails.
        unsafe {
            copy_in(self.0.wrapping_add(offset), bytes)?;
            values.set_len(count);
        }
        Ok(values)
    }

    /// Fills in the structure that the argument points to.
    pub fn write<T: Plain>(self, value: &T) -> Result<(), Errno> {
        self.write_at(0, value)
    }

    /// Fills in the structure `offset` bytes behind the start of the argument's.
    pub fn write_at<T: Plain>(self, offset: u64, value: &T) -> Result<(), Errno> {
        self.write_slice(offset, std::slice::from_ref(value))
    }

    /// Fills in structures that begin `offset` bytes behind the start of the argument's.
    pub fn write_slice<T: Plain>(self, offset: u64, values: &[T]) -> Result<(), Errno> {
        copy_out(self.0.wrapping_add(offset), values.as_ptr().cast(), size_of_val(values))
    }
}

fn outcome(done: isize, wanted: usize) -> Result<(), Errno> {
    if done >= 0 && done.unsigned_abs() == wanted { Ok(()) } else { Err(Errno::FAULT) }
}

/// # Safety
///
/// `to` is writable memory of ours.
unsafe fn copy_in(from: u64, to: *mut [u8]) -> Result<(), Errno> {
    let length = to.len();
    if length == 0 {
        return Ok(());
    }
    let local = libc::iovec { iov_base: to.cast(), iov_len: length };
    let remote = libc::iovec { iov_base: from as *mut libc::c_void, iov_len: length };
    // SAFETY: the kernel writes `to` only, which the caller vouches for, and checks the client's side.
    let done = unsafe { libc::process_vm_readv(own_pid(), &raw const local, 1, &raw const remote, 1, 0) };
    outcome(done, length)
}

fn copy_out(to: u64, from: *const u8, length: usize) -> Result<(), Errno> {
    if length == 0 {
        return Ok(());
    }
    let local = libc::iovec { iov_base: from.cast_mut().cast(), iov_len: length };
    let remote = libc::iovec { iov_base: to as *mut libc::c_void, iov_len: length };
    // SAFETY: the kernel reads `from`, which is ours, and writes what the client named as the place for the result;
    // like the kernel's own copy_to_user it is checked against the page tables only.
    let done = unsafe { libc::process_vm_writev(own_pid(), &raw const local, 1, &raw const remote, 1, 0) };
    outcome(done, length)
}

fn own_pid() -> libc::pid_t {
    // SAFETY: no preconditions.
    unsafe { libc::getpid() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_copied() {
        let values = [1u64, 2, 3];
        let argument = Argument(values.as_ptr() as u64);
        assert_eq!(argument.read_at::<u64>(8), Ok(2));
        assert_eq!(argument.read_slice::<u64>(0, 3), Ok(vec![1, 2, 3]));
        let mut out = [0u32; 2];
        Argument(out.as_mut_ptr() as u64).write_at(4, &7u32).unwrap();
        assert_eq!(out, [0, 7]);
    }

    #[test]
    fn bad_pointers_are_efault() {
        for address in [0, 1, 0xffff_8000_0000_0000, u64::MAX - 3] {
            assert_eq!(Argument(address).read::<u64>(), Err(Errno::FAULT), "{address:#x}");
            assert_eq!(Argument(address).write(&1u64), Err(Errno::FAULT), "{address:#x}");
        }
        // Read-only memory of ours is not written.
        static CONSTANT: u64 = 5;
        assert_eq!(Argument(&raw const CONSTANT as u64).write(&6u64), Err(Errno::FAULT));
    }
}
