//! Pages of a descriptor that are mapped here and by the client.
#![expect(unsafe_code, reason = "mmap and munmap")]

use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;

use crate::error::Errno;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// A shared, writable mapping. It belongs to the value; the client may write any byte of it at any time, so it is to be
/// reached by volatile or atomic accesses only, and each thing read is to be checked.
pub(crate) struct SharedPages {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: the memory is shared with another party anyway; whoever reaches it does so as the type demands.
unsafe impl Send for SharedPages {}
// SAFETY: as above.
unsafe impl Sync for SharedPages {}

impl SharedPages {
    /// Maps `size` bytes of `fd` from `offset` on, both multiples of the page size.
    pub(crate) fn map(fd: &OwnedFd, offset: usize, size: usize) -> Result<SharedPages, Errno> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let (fd, offset) = (fd.as_raw_fd(), offset as libc::off_t);
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, fd, offset) };
        match NonNull::new(at.cast::<u8>()) {
            Some(start) if at != libc::MAP_FAILED => Ok(SharedPages { start, size }),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }

    /// A `T` `offset` bytes into the mapping. The caller keeps within it.
    pub(crate) fn at<T>(&self, offset: usize) -> *mut T {
        debug_assert!(offset + size_of::<T>() <= self.size);
        self.start.as_ptr().wrapping_add(offset).cast()
    }
}

impl Drop for SharedPages {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.size) };
    }
}
