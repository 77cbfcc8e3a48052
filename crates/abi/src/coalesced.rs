//! The ring of coalesced writes, which lies behind the first vCPU's `kvm_run` (kernel: `struct kvm_coalesced_mmio_ring`).
#![expect(unsafe_code, reason = "memory that is shared with the client")]

use std::os::fd::OwnedFd;
use std::sync::atomic::{Ordering, fence};

use hypervisor::coalesced::Ring;
use kvm_bindings::{kvm_coalesced_mmio, kvm_coalesced_mmio_ring};

use crate::error::Errno;
use crate::shared::{PAGE, SharedPages};

/// The page of a vCPU's area that the ring is (KVM_CAP_COALESCED_MMIO; kernel: KVM_COALESCED_MMIO_PAGE_OFFSET).
pub(crate) const RING_PAGE: u32 = 2;
/// Entries that fit into the page (kernel: KVM_COALESCED_MMIO_MAX).
const ENTRIES: u32 = ((PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

/// The ring in a vCPU's area; a mapping of its own, since it outlives the vCPU's.
pub(crate) struct SharedRing(SharedPages);

impl SharedRing {
    /// Maps the ring in the descriptor of a vCPU.
    pub(crate) fn map(fd: &OwnedFd) -> Result<SharedRing, Errno> {
        Ok(SharedRing(SharedPages::map(fd, RING_PAGE as usize * PAGE, PAGE)?))
    }

    fn header(&self) -> *mut kvm_coalesced_mmio_ring {
        self.0.at(0)
    }

    /// The entry `index`, which is below [`ENTRIES`].
    fn entry(&self, index: u32) -> *mut kvm_coalesced_mmio {
        let index = (index % ENTRIES) as usize;
        self.0.at(size_of::<kvm_coalesced_mmio_ring>() + index * size_of::<kvm_coalesced_mmio>())
    }
}

impl Ring for SharedRing {
    fn capacity(&self) -> u32 {
        ENTRIES
    }

    fn first(&self) -> u32 {
        // SAFETY: a member of the mapped header.
        unsafe { (&raw const (*self.header()).first).read_volatile() }
    }

    fn last(&self) -> u32 {
        // SAFETY: a member of the mapped header.
        unsafe { (&raw const (*self.header()).last).read_volatile() }
    }

    fn fill(&self, index: u32, address: u64, data: &[u8], port: bool) {
        let mut entry =
            kvm_coalesced_mmio { phys_addr: address, len: data.len() as u32, ..Default::default() };
        entry.__bindgen_anon_1.pio = port.into();
        for (to, from) in entry.data.iter_mut().zip(data) {
            *to = *from;
        }
        // SAFETY: an entry of the mapped page.
        unsafe { self.entry(index).write_volatile(entry) };
    }

    fn publish(&self, last: u32) {
        // The client reads `last` first and then what lies before it.
        fence(Ordering::Release);
        // SAFETY: a member of the mapped header.
        unsafe { (&raw mut (*self.header()).last).write_volatile(last) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_has_the_kernels_layout() {
        assert_eq!(ENTRIES, 170);
        let fd = crate::object::memfd(c"test", 3 * PAGE as u64).unwrap();
        let ring = SharedRing::map(&fd).unwrap();
        ring.fill(169, 0xcf8, &[1, 2, 3, 4], true);
        ring.publish(1);
        let client = SharedPages::map(&fd, 0, 3 * PAGE).unwrap();
        let word = |offset: usize| {
            // SAFETY: within the mapping.
            unsafe { client.at::<u32>(2 * PAGE + offset).read_volatile() }
        };
        assert_eq!((word(0), word(4)), (0, 1));
        let entry = 8 + 169 * 24;
        let read: Vec<u32> = (0..6).map(|i| word(entry + 4 * i)).collect();
        assert_eq!(read, [0xcf8, 0, 4, 1, 0x0403_0201, 0]);
    }
}
