//! The objects that file descriptors stand for, and the descriptors themselves.
//!
//! Each object gets a descriptor of the kernel's own: a memfd, whose inode identifies the object whoever duplicates or
//! passes the descriptor. A vCPU's memfd *is* its `kvm_run` area, so the client's mmap(2) needs nobody's help.

#![expect(unsafe_code, reason = "memfd_create, ftruncate and seals")]

use std::ffi::CStr;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hypervisor::{System, Vcpu, VcpuHandle, Vm};

use crate::dirty_ring::{RING_OFFSET, SharedEntries};
use crate::error::Errno;
use crate::exit::Answer;
use crate::run::RunArea;

/// What an ioctl is made on.
#[derive(Clone, Debug)]
pub enum Object {
    /// `/dev/kvm`.
    System(Arc<System>),
    /// What KVM_CREATE_VM returns.
    Vm(Arc<Vm>),
    /// What KVM_CREATE_VCPU returns.
    Vcpu(Arc<VcpuObject>),
}

impl Object {
    /// Whether it belongs to a VM that cannot go on.
    pub(crate) fn is_dead(&self) -> bool {
        match self {
            Object::System(_) => false,
            Object::Vm(vm) => vm.is_dead(),
            Object::Vcpu(vcpu) => vcpu.vm.is_dead(),
        }
    }
}

/// A new object, and the descriptor that the client gets for it.
#[derive(Debug)]
pub struct Created {
    /// The object.
    pub object: Object,
    /// Its descriptor, close-on-exec.
    pub fd: OwnedFd,
}

/// What an ioctl gives back.
#[derive(Debug)]
pub enum Reply {
    /// The return value.
    Value(i32),
    /// The return value is 0, and the calling thread is to get SIGBUS (BUS_ADRALN) as from the kernel: with its default
    /// action if it is blocked or ignored.
    AlignmentError,
    /// A new object; the return value is its descriptor.
    Created(Created),
    /// A file that nobody needs to serve; the return value is its descriptor.
    File(OwnedFd),
}

/// A vCPU with the memory that it shares with its client.
#[derive(Debug)]
pub struct VcpuObject {
    vcpu: Mutex<LockedVcpu>,
    /// The VM that it belongs to.
    vm: Arc<Vm>,
    /// For those who interrupt and watch it while it runs.
    pub handle: Arc<VcpuHandle>,
    /// The `kvm_run` area.
    pub run: RunArea,
    /// The address of memory that has failed, if the last call met any.
    pub(crate) failed_memory: AtomicU64,
    /// Bytes of the dirty ring behind it; zero if the VM has none.
    dirty_ring: u32,
}

impl VcpuObject {
    /// The vCPU, once nobody else uses it: as in the kernel, calls on one vCPU wait for each other.
    pub(crate) fn lock(&self) -> MutexGuard<'_, LockedVcpu> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `length` bytes of the descriptor from `offset` on have a part of the dirty ring, which is only mapped shared
    /// and not executable (kernel: `kvm_vcpu_mmap`; otherwise EINVAL).
    pub fn has_dirty_ring(&self, offset: i64, length: usize) -> bool {
        let ring = RING_OFFSET..RING_OFFSET + self.dirty_ring as usize;
        match usize::try_from(offset) {
            Ok(offset) => offset < ring.end && offset.saturating_add(length) > ring.start && !ring.is_empty(),
            Err(_) => false,
        }
    }

    /// Remembers what the error of a call means to the client's thread.
    pub(crate) fn note(&self, error: &hypervisor::Error) {
        if let hypervisor::Error::MemoryFailed { host, .. } = error {
            self.failed_memory.store(*host, Ordering::Relaxed);
        }
    }

    /// Whether the last call returned EINTR because the guest needs memory that has failed: its address. The thread is
    /// to get SIGBUS with BUS_MCEERR_AR for it, once it is outside.
    pub fn take_failed_memory(&self) -> Option<u64> {
        let host = self.failed_memory.load(Ordering::Relaxed);
        (host != 0).then(|| self.failed_memory.swap(0, Ordering::Relaxed))
    }

    /// Makes a KVM_RUN in progress, and each later one, return EINTR until [`VcpuObject::settle`]. Safe in a signal
    /// handler.
    pub fn interrupt(&self) {
        self.handle.interrupt();
    }

    /// The reason for [`VcpuObject::interrupt`] has been dealt with.
    pub fn settle(&self) {
        self.handle.settle();
    }
}

/// What one caller at a time may use.
#[derive(Debug)]
pub(crate) struct LockedVcpu {
    vcpu: Vcpu,
    /// The answer that the client owes to the last exit.
    pub(crate) answer: Answer,
}

impl Deref for LockedVcpu {
    type Target = Vcpu;
    fn deref(&self) -> &Vcpu {
        &self.vcpu
    }
}

impl DerefMut for LockedVcpu {
    fn deref_mut(&mut self) -> &mut Vcpu {
        &mut self.vcpu
    }
}

/// An anonymous file of `size` bytes, for ever: what we have mapped must not go away because a client truncates it.
pub(crate) fn memfd(name: &CStr, size: u64) -> Result<OwnedFd, Errno> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: `name` ends with a zero byte; no other memory is involved.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: the kernel has just given us this descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: no memory is involved.
    if size != 0 && unsafe { libc::ftruncate(fd.as_raw_fd(), size as libc::off_t) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: no memory is involved.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(fd)
}

impl Created {
    /// The system, as open(2) of `/dev/kvm` gives it.
    pub fn system(system: Arc<System>) -> Result<Created, Errno> {
        Ok(Created { object: Object::System(system), fd: memfd(c"kvm", 0)? })
    }

    /// A VM.
    pub fn vm(vm: Arc<Vm>) -> Result<Created, Errno> {
        Ok(Created { object: Object::Vm(vm), fd: memfd(c"kvm-vm", 0)? })
    }

    /// A vCPU.
    pub fn vcpu(mut vcpu: Vcpu) -> Result<Created, Errno> {
        let dirty_ring = vcpu.vm().dirty_ring_bytes();
        let size = dirty_ring.map_or(RunArea::SIZE, |bytes| RING_OFFSET + bytes as usize);
        let fd = memfd(c"kvm-vcpu", size as u64)?;
        let run = RunArea::map(&fd)?;
        if let Some(bytes) = dirty_ring {
            vcpu.attach_dirty_ring(Box::new(SharedEntries::map(&fd, bytes)?));
        }
        let (handle, vm) = (vcpu.handle(), vcpu.vm().clone());
        let vcpu = Mutex::new(LockedVcpu { vcpu, answer: Answer::None });
        let object = VcpuObject {
            vcpu,
            vm,
            handle,
            run,
            failed_memory: AtomicU64::new(0),
            dirty_ring: dirty_ring.unwrap_or(0),
        };
        Ok(Created { object: Object::Vcpu(Arc::new(object)), fd })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypervisor::HostParams;
    use silicon::model::CpuModel;

    #[test]
    fn the_dirty_ring_lies_at_page_64() {
        let vm = System::new(CpuModel::default(), HostParams::default()).create_vm().unwrap();
        vm.set_dirty_ring(0x4000).unwrap();
        let created = Created::vcpu(vm.create_vcpu(0).unwrap()).unwrap();
        let Object::Vcpu(vcpu) = &created.object else { unreachable!() };
        let cases = [
            (0, 3 * 4096, false),
            (0, 64 * 4096, false),
            (0, 64 * 4096 + 1, true),
            (64 * 4096, 0x4000, true),
            (67 * 4096, 4096, true),
            (68 * 4096, 4096, false),
            (-4096, 4096, false),
            (4096, usize::MAX, true),
        ];
        for (offset, length, expected) in cases {
            assert_eq!(vcpu.has_dirty_ring(offset, length), expected, "{offset} {length}");
        }
    }
}
