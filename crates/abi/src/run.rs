//! KVM_RUN and the `kvm_run` area that it reports through (kernel: `kvm_arch_vcpu_ioctl_run`).
#![expect(unsafe_code, reason = "memory that is shared with the client")]

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;

use hypervisor::VcpuExit;
use kvm_bindings::*;

use crate::error::Errno;
use crate::object::{Reply, VcpuObject};
use crate::user::Argument;

const PAGE: usize = 4096;
/// Where the data of a port access lies (`kvm_run.io.data_offset`; kernel: `KVM_PIO_PAGE_OFFSET`).
const PIO_DATA: usize = PAGE;

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

macro_rules! field {
    ($area:expr, $($path:tt)+) => {
        // SAFETY: only an address is computed, within the mapped page.
        unsafe { &raw mut (*$area.0.as_ptr().cast::<kvm_run>()).$($path)+ }
    };
}

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

    fn pio_data(&self) -> *mut u64 {
        // SAFETY: the second of three pages.
        unsafe { self.0.as_ptr().add(PIO_DATA).cast() }
    }

    fn immediate_exit(&self) -> bool {
        self.get(field!(self, immediate_exit)) != 0
    }

    /// Says why KVM_RUN returned.
    fn report(&self, exit: &VcpuExit) {
        let reason = match *exit {
            VcpuExit::Io { port, size, write } => {
                let io = field!(self, __bindgen_anon_1.io);
                let direction = if write.is_some() { KVM_EXIT_IO_OUT } else { KVM_EXIT_IO_IN } as u8;
                let access = kvm_run__bindgen_ty_1__bindgen_ty_4 {
                    direction,
                    size,
                    port,
                    count: 1,
                    data_offset: PIO_DATA as u64,
                };
                self.set(io, access);
                self.set(self.pio_data(), write.unwrap_or(0).into());
                KVM_EXIT_IO
            }
            VcpuExit::Mmio { gpa, size, write } => {
                let mmio = kvm_run__bindgen_ty_1__bindgen_ty_6 {
                    phys_addr: gpa,
                    data: write.unwrap_or(0).to_le_bytes(),
                    len: size.into(),
                    is_write: write.is_some().into(),
                };
                self.set(field!(self, __bindgen_anon_1.mmio), mmio);
                KVM_EXIT_MMIO
            }
            VcpuExit::Hlt => KVM_EXIT_HLT,
            VcpuExit::Shutdown => KVM_EXIT_SHUTDOWN,
            VcpuExit::IrqWindowOpen => KVM_EXIT_IRQ_WINDOW_OPEN,
            VcpuExit::InternalError { .. } => {
                let failure = kvm_run__bindgen_ty_1__bindgen_ty_13 {
                    suberror: KVM_INTERNAL_ERROR_EMULATION,
                    ndata: 0,
                    ..Default::default()
                };
                self.set(field!(self, __bindgen_anon_1.internal), failure);
                KVM_EXIT_INTERNAL_ERROR
            }
            // Only tools set a limit.
            VcpuExit::Budget => KVM_EXIT_UNKNOWN,
        };
        self.set(field!(self, exit_reason), reason);
    }
}

/// Where the client puts the answer to the last exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Answer {
    /// No answer is awaited.
    #[default]
    None,
    /// IN: this many bytes of the port data.
    Port(u8),
    /// A read: this many bytes of `kvm_run.mmio.data`.
    Mmio(u8),
}

impl Answer {
    /// What the client has to answer to `exit`.
    fn to(exit: &VcpuExit) -> Answer {
        match *exit {
            VcpuExit::Io { size, write: None, .. } => Answer::Port(size),
            VcpuExit::Mmio { size, write: None, .. } => Answer::Mmio(size),
            _ => Answer::None,
        }
    }

    fn value(self, area: &RunArea) -> u64 {
        let (data, size) = match self {
            Answer::None => return 0,
            Answer::Port(size) => (area.get(area.pio_data()), size),
            Answer::Mmio(size) => {
                (u64::from_le_bytes(area.get(field!(area, __bindgen_anon_1.mmio.data))), size)
            }
        };
        if size < 8 { data & ((1 << (size * 8)) - 1) } else { data }
    }
}

/// KVM_RUN.
pub(crate) fn run(object: &VcpuObject, argument: Argument) -> Result<Reply, Errno> {
    if argument.0 != 0 {
        return Err(Errno::INVALID);
    }
    let (mut vcpu, area) = (object.lock(), &object.run);
    area.set(field!(area, flags), 0);
    let answer = std::mem::take(&mut vcpu.answer);
    vcpu.complete(answer.value(area));
    // Sampled once, at entry; whoever wants a vCPU out later sends a signal.
    if area.immediate_exit() {
        object.handle.interrupt();
    }
    let result = vcpu.run();
    let state = vcpu.run_state();
    area.set(field!(area, if_flag), state.interrupt_flag.into());
    area.set(field!(area, ready_for_interrupt_injection), state.ready_for_interrupt.into());
    area.set(field!(area, cr8), state.cr8);
    area.set(field!(area, apic_base), state.apic_base);
    match result {
        Ok(exit) => {
            vcpu.answer = Answer::to(&exit);
            area.report(&exit);
            Ok(Reply::Value(0))
        }
        Err(error) => {
            if matches!(error, hypervisor::Error::Interrupted) {
                area.set(field!(area, exit_reason), KVM_EXIT_INTR);
            }
            Err(error.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_the_width_of_the_access() {
        let fd = crate::object::memfd(c"test", RunArea::SIZE as u64).unwrap();
        let area = RunArea::map(&fd).unwrap();
        area.set(area.pio_data(), 0x1122_3344_5566_7788);
        area.set(field!(area, __bindgen_anon_1.mmio.data), [0xff; 8]);
        assert_eq!(Answer::Port(1).value(&area), 0x88);
        assert_eq!(Answer::Port(4).value(&area), 0x5566_7788);
        assert_eq!(Answer::Mmio(8).value(&area), u64::MAX);
        assert_eq!(Answer::Mmio(2).value(&area), 0xffff);
        assert_eq!(Answer::None.value(&area), 0);
    }
}
