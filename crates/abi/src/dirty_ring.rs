//! The memory of a dirty ring, which lies at page 64 of a vCPU's descriptor (kernel: `struct kvm_dirty_gfn`).
#![expect(unsafe_code, reason = "memory that is shared with the client")]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};

use hypervisor::dirty_ring::Entries;
use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};

use crate::error::Errno;
use crate::shared::{PAGE, SharedPages};

/// Where the ring begins in the descriptor, in bytes.
pub(crate) const RING_OFFSET: usize = KVM_DIRTY_LOG_PAGE_OFFSET as usize * PAGE;

/// The ring in a vCPU's descriptor.
pub(crate) struct SharedEntries {
    pages: SharedPages,
    count: u32,
}

impl SharedEntries {
    /// Maps a ring of `bytes` bytes.
    pub(crate) fn map(fd: &OwnedFd, bytes: u32) -> Result<SharedEntries, Errno> {
        let pages = SharedPages::map(fd, RING_OFFSET, bytes as usize)?;
        Ok(SharedEntries { pages, count: bytes / size_of::<kvm_dirty_gfn>() as u32 })
    }

    fn entry(&self, index: u32) -> *mut kvm_dirty_gfn {
        self.pages.at((index % self.count) as usize * size_of::<kvm_dirty_gfn>())
    }

    fn flags_of(&self, index: u32) -> &AtomicU32 {
        // SAFETY: an aligned word of the mapping, which lives as long as we do; the client's accesses to it are atomic
        // by the protocol of the ring.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.entry(index)).flags) }
    }
}

impl Entries for SharedEntries {
    fn count(&self) -> u32 {
        self.count
    }

    fn flags(&self, index: u32) -> u32 {
        self.flags_of(index).load(Ordering::Acquire)
    }

    fn set_flags(&self, index: u32, flags: u32) {
        self.flags_of(index).store(flags, Ordering::Release);
    }

    fn page(&self, index: u32) -> (u32, u64) {
        let entry = self.entry(index);
        // SAFETY: members of an entry of the mapping.
        unsafe { ((&raw const (*entry).slot).read_volatile(), (&raw const (*entry).offset).read_volatile()) }
    }

    fn set_page(&self, index: u32, slot: u32, page: u64) {
        let entry = self.entry(index);
        // SAFETY: members of an entry of the mapping.
        unsafe {
            (&raw mut (*entry).slot).write_volatile(slot);
            (&raw mut (*entry).offset).write_volatile(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_the_kernels_layout() {
        let fd = crate::object::memfd(c"test", (RING_OFFSET + 0x4000) as u64).unwrap();
        let ring = SharedEntries::map(&fd, 0x4000).unwrap();
        assert_eq!(ring.count(), 1024);
        ring.set_page(1023, 2, 3 << 40);
        ring.set_flags(1023, 1);
        let client = SharedPages::map(&fd, RING_OFFSET, 0x4000).unwrap();
        // SAFETY: within the mapping.
        let words: [u32; 4] = unsafe { client.at::<[u32; 4]>(0x3ff0).read_volatile() };
        assert_eq!(words, [1, 2, 0, 3 << 8]);
        assert_eq!((ring.flags(1023), ring.page(1023)), (1, (2, 3 << 40)));
    }
}
