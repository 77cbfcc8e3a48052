//! KVM_RUN and the `kvm_run` area that it reports through (kernel: `kvm_arch_vcpu_ioctl_run`).
#![expect(unsafe_code, reason = "memory that is shared with the client")]

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;

use hypervisor::split_lock::Policy;
use hypervisor::vcpu::RunRequest;
use hypervisor::{Vcpu, VcpuExit};
use kvm_bindings::{
    KVM_EXIT_INTR, KVM_EXIT_UNKNOWN, KVM_RUN_X86_BUS_LOCK, KVM_RUN_X86_SMM, KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, KVM_SYNC_X86_VALID_FIELDS, kvm_run,
};

use crate::error::Errno;
use crate::exit::{self, Answer};
use crate::object::{Reply, VcpuObject};
use crate::user::Argument;

const PAGE: usize = 4096;
/// Where the data of a port access lies (`kvm_run.io.data_offset`; kernel: `KVM_PIO_PAGE_OFFSET`).
pub(crate) const PIO_DATA: usize = PAGE;

/// The `kvm_run` area: the structure, a page of port data, and the ring of coalesced writes.
///
/// The client may write any byte of it at any time, also while we look: each field is read once and then checked.
pub struct RunArea(NonNull<u8>);

// SAFETY: the mapping belongs to the value and is reached by volatile accesses only; the memory is shared with another
// party anyway.
unsafe impl Send for RunArea {}
// SAFETY: as above.
unsafe impl Sync for RunArea {}

impl fmt::Debug for RunArea {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RunArea({:p})", self.0)
    }
}

impl Drop for RunArea {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), RunArea::SIZE) };
    }
}

/// The address of a field of the `kvm_run` structure, for [`RunArea::get`] and [`RunArea::set`].
macro_rules! field {
    ($area:expr, $($path:tt)+) => {
        // SAFETY: only an address is computed, within the mapped page.
        unsafe { &raw mut (*$area.structure()).$($path)+ }
    };
}
pub(crate) use field;

impl RunArea {
    /// KVM_GET_VCPU_MMAP_SIZE in bytes.
    pub const SIZE: usize = 3 * PAGE;

    /// Maps the descriptor of a new vCPU.
    pub(crate) fn map(fd: &OwnedFd) -> Result<RunArea, Errno> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), Self::SIZE, protection, flags, fd.as_raw_fd(), 0) };
        match NonNull::new(at.cast::<u8>()) {
            Some(area) if at != libc::MAP_FAILED => Ok(RunArea(area)),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }

    /// The structure at the beginning.
    pub(crate) fn structure(&self) -> *mut kvm_run {
        self.0.as_ptr().cast()
    }

    /// Reads one field.
    pub(crate) fn get<T: Copy>(&self, field: *mut T) -> T {
        debug_assert!(self.holds(field));
        // SAFETY: callers pass a field of this area, which is mapped; its types have no invalid values.
        unsafe { field.read_volatile() }
    }

    /// Writes one field.
    pub(crate) fn set<T: Copy>(&self, field: *mut T, value: T) {
        debug_assert!(self.holds(field));
        // SAFETY: as in `get`.
        unsafe { field.write_volatile(value) };
    }

    fn holds<T>(&self, field: *mut T) -> bool {
        let start = self.0.as_ptr() as usize;
        (start..=start + Self::SIZE - size_of::<T>()).contains(&(field as usize))
    }

    pub(crate) fn pio_data(&self) -> *mut u64 {
        // SAFETY: the second of three pages.
        unsafe { self.0.as_ptr().add(PIO_DATA).cast() }
    }

    fn immediate_exit(&self) -> bool {
        self.get(field!(self, immediate_exit)) != 0
    }
}

/// Registers that `kvm_run` can carry to and fro (KVM_CAP_SYNC_REGS).
pub(crate) const SYNC_REGS: u32 = KVM_SYNC_X86_VALID_FIELDS;

/// Takes over the registers that the client has changed in `kvm_run` (kernel: `sync_regs`). EINVAL for fields that do not
/// exist.
fn sync_in(vcpu: &mut Vcpu, area: &RunArea, valid: u64) -> Result<(), Errno> {
    let dirty = area.get(field!(area, kvm_dirty_regs));
    if (valid | dirty) & !u64::from(SYNC_REGS) != 0 {
        return Err(Errno::INVALID);
    }
    // Each is marked clean once it has been taken.
    let mut left = dirty;
    let mut taken = |field: u32| {
        left &= !u64::from(field);
        area.set(field!(area, kvm_dirty_regs), left);
    };
    if dirty & u64::from(KVM_SYNC_X86_REGS) != 0 {
        vcpu.set_regs(&area.get(field!(area, s.regs.regs)));
        taken(KVM_SYNC_X86_REGS);
    }
    if dirty & u64::from(KVM_SYNC_X86_SREGS) != 0 {
        vcpu.set_sregs(&area.get(field!(area, s.regs.sregs)))?;
        taken(KVM_SYNC_X86_SREGS);
    }
    if dirty & u64::from(KVM_SYNC_X86_EVENTS) != 0 {
        vcpu.set_vcpu_events(&area.get(field!(area, s.regs.events)))?;
        taken(KVM_SYNC_X86_EVENTS);
    }
    Ok(())
}

/// Shows the registers that the client wants to see in `kvm_run` (kernel: `store_regs`).
fn sync_out(vcpu: &mut Vcpu, area: &RunArea, valid: u64) {
    if valid & u64::from(KVM_SYNC_X86_REGS) != 0 {
        area.set(field!(area, s.regs.regs), vcpu.regs());
    }
    if valid & u64::from(KVM_SYNC_X86_SREGS) != 0 {
        area.set(field!(area, s.regs.sregs), vcpu.sregs());
    }
    if valid & u64::from(KVM_SYNC_X86_EVENTS) != 0 {
        area.set(field!(area, s.regs.events), vcpu.vcpu_events());
    }
}

/// KVM_RUN.
pub(crate) fn run(object: &VcpuObject, argument: Argument) -> Result<Reply, Errno> {
    if argument.0 != 0 {
        return Err(Errno::INVALID);
    }
    let (mut vcpu, area) = (object.lock(), &object.run);
    area.set(field!(area, flags), 0);
    let valid = area.get(field!(area, kvm_valid_regs));
    // A vCPU that waits for INIT does nothing else.
    if !vcpu.awaits_init() {
        sync_in(&mut vcpu, area, valid)?;
        let answer = std::mem::take(&mut vcpu.answer);
        answer.give(&mut vcpu, area);
    }
    // Sampled once, at entry; whoever wants a vCPU out later sends a signal.
    let request = RunRequest {
        immediate_exit: area.immediate_exit(),
        interrupt_window: area.get(field!(area, request_interrupt_window)) != 0,
        cr8: area.get(field!(area, cr8)),
    };
    let result = vcpu.run_request(request);
    sync_out(&mut vcpu, area, valid);
    let state = vcpu.run_state();
    let flag = |set: bool, flag: u32| if set { flag as u16 } else { 0 };
    let flags = flag(state.bus_lock, KVM_RUN_X86_BUS_LOCK) | flag(state.smm, KVM_RUN_X86_SMM);
    area.set(field!(area, flags), flags);
    area.set(field!(area, if_flag), state.interrupt_flag.into());
    area.set(field!(area, ready_for_interrupt_injection), state.ready_for_interrupt.into());
    area.set(field!(area, cr8), state.cr8);
    area.set(field!(area, apic_base), state.apic_base);
    match result {
        Ok(exit) => {
            let reads = vcpu.port_reads();
            vcpu.answer = Answer::to(&exit, reads);
            exit::report(area, &exit, reads);
            let killed = matches!(exit, VcpuExit::SplitLock(exit) if exit.policy == Policy::Kill);
            Ok(if killed { Reply::AlignmentError } else { Reply::Value(0) })
        }
        Err(error) => {
            use hypervisor::Error;
            object.note(&error);
            match error {
                Error::Interrupted if request.immediate_exit => {}
                Error::Interrupted | Error::MemoryFailed { .. } => {
                    area.set(field!(area, exit_reason), KVM_EXIT_INTR);
                }
                // KVM_EXIT_MEMORY_FAULT is for private memory alone.
                Error::MemoryAbsent { .. } => area.set(field!(area, exit_reason), KVM_EXIT_UNKNOWN),
                _ => {}
            }
            Err(error.into())
        }
    }
}
