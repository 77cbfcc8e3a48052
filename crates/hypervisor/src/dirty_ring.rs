//! Dirty rings: each vCPU lists the pages that it was the first to write in a ring that it shares with the client
//! (KVM_CAP_DIRTY_LOG_RING; kernel: virt/kvm/dirty_ring.c, Documentation/virt/kvm/api.rst 8.29).
//!
//! An entry is invalid (0), then dirty (1) when we have filled it in, then to be reset (2) when the client has read it,
//! and invalid again after KVM_RESET_DIRTY_RINGS. A page is listed once between two resets of it: its mark in the dirty
//! log, which no client of a ring can read, says that it is listed.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_DIRTY_GFN_F_MASK, kvm_dirty_gfn};

use crate::error::Error;

/// Flags of an entry (include/uapi/linux/kvm.h).
const DIRTY: u32 = 1 << 0;
const RESET: u32 = 1 << 1;
const _: () = assert!(DIRTY | RESET == KVM_DIRTY_GFN_F_MASK);

/// Entries of a ring at most (kernel: KVM_DIRTY_RING_MAX_ENTRIES).
const ENTRIES_MAX: u32 = 65_536;
/// Entries that are kept for what a vCPU does before it comes out of guest mode (kernel:
/// KVM_DIRTY_RING_RSVD_ENTRIES, and 512 for the page-modification log).
const RESERVED: u32 = 64 + 512;
/// Bytes of an entry.
const ENTRY: u32 = size_of::<kvm_dirty_gfn>() as u32;
/// Bytes of a ring at most (the answer of the capability).
pub const BYTES_MAX: u32 = ENTRIES_MAX * ENTRY;

/// Checks the size of a ring in bytes: a power of two with room for more than the reserved entries. E2BIG if it is too
/// large.
pub(crate) fn check_size(bytes: u64) -> Result<u32, Error> {
    match u32::try_from(bytes) {
        Ok(bytes) if bytes.is_power_of_two() && bytes >= (RESERVED * ENTRY).max(4096) => {
            if bytes > BYTES_MAX { Err(Error::TooMany(ENTRIES_MAX as usize)) } else { Ok(bytes) }
        }
        _ => Err(Error::Invalid("bytes of a dirty ring")),
    }
}

/// The memory of a ring: a power of two of `kvm_dirty_gfn`. The client may write any of it at any time. An index is
/// below the number of entries.
pub trait Entries: Send + Sync {
    /// How many there are.
    fn count(&self) -> u32;
    /// The flags of an entry; what the client wrote before them is seen after this.
    fn flags(&self, index: u32) -> u32;
    /// Sets the flags of an entry, after all that was written before.
    fn set_flags(&self, index: u32, flags: u32);
    /// Slot and page of an entry.
    fn page(&self, index: u32) -> (u32, u64);
    /// Sets slot and page of an entry.
    fn set_page(&self, index: u32, slot: u32, page: u64);
}

/// The ring of one vCPU.
pub struct DirtyRing {
    entries: Box<dyn Entries>,
    /// Entries ever listed; written by the vCPU's thread alone.
    listed: AtomicU32,
    /// Entries ever reset.
    reset: Mutex<u32>,
    /// The same, for who only looks.
    reset_seen: AtomicU32,
}

impl fmt::Debug for DirtyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyRing").field("listed", &self.listed).finish_non_exhaustive()
    }
}

impl DirtyRing {
    /// An empty ring in zeroed memory.
    pub fn new(entries: Box<dyn Entries>) -> DirtyRing {
        DirtyRing { entries, listed: AtomicU32::new(0), reset: Mutex::new(0), reset_seen: AtomicU32::new(0) }
    }

    fn used(&self) -> u32 {
        self.listed.load(Ordering::Acquire).wrapping_sub(self.reset_seen.load(Ordering::Acquire))
    }

    /// So full that the vCPU must not run before the client has reset entries.
    pub(crate) fn is_nearly_full(&self) -> bool {
        self.used() >= self.entries.count().saturating_sub(RESERVED)
    }

    /// Lists a page of a slot. False if there is no room at all.
    pub(crate) fn push(&self, slot: u32, page: u64) -> bool {
        if self.used() >= self.entries.count() {
            return false;
        }
        let listed = self.listed.load(Ordering::Relaxed);
        let index = listed & (self.entries.count() - 1);
        self.entries.set_page(index, slot, page);
        self.entries.set_flags(index, DIRTY);
        self.listed.store(listed.wrapping_add(1), Ordering::Release);
        true
    }

    /// Takes back what the client has read, in order: slots and pages.
    pub(crate) fn take_read(&self) -> Vec<(u32, u64)> {
        let mut reset: MutexGuard<'_, u32> = self.reset.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = Vec::new();
        // An entry that was never listed is no entry, whatever the client writes into it.
        while *reset != self.listed.load(Ordering::Acquire) {
            let index = *reset & (self.entries.count() - 1);
            if self.entries.flags(index) & RESET == 0 {
                break;
            }
            taken.push(self.entries.page(index));
            self.entries.set_flags(index, 0);
            *reset = reset.wrapping_add(1);
            self.reset_seen.store(*reset, Ordering::Release);
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    struct Memory(Mutex<Vec<(u32, u32, u64)>>);

    impl Entries for Arc<Memory> {
        fn count(&self) -> u32 {
            1024
        }
        fn flags(&self, index: u32) -> u32 {
            self.0.lock().unwrap()[index as usize].0
        }
        fn set_flags(&self, index: u32, flags: u32) {
            self.0.lock().unwrap()[index as usize].0 = flags;
        }
        fn page(&self, index: u32) -> (u32, u64) {
            let entry = self.0.lock().unwrap()[index as usize];
            (entry.1, entry.2)
        }
        fn set_page(&self, index: u32, slot: u32, page: u64) {
            let entry = &mut self.0.lock().unwrap()[index as usize];
            (entry.1, entry.2) = (slot, page);
        }
    }

    fn ring() -> (DirtyRing, Arc<Memory>) {
        let memory = Arc::new(Memory(Mutex::new(vec![(0, 0, 0); 1024])));
        (DirtyRing::new(Box::new(memory.clone())), memory)
    }

    #[test]
    fn sizes() {
        let cases = [
            (0, Err(libc::EINVAL)),
            (4096, Err(libc::EINVAL)),
            (8192, Err(libc::EINVAL)),
            (16384, Ok(16384)),
            (16385, Err(libc::EINVAL)),
            (1 << 20, Ok(1 << 20)),
            (1 << 21, Err(libc::E2BIG)),
            (1 << 32, Err(libc::EINVAL)),
        ];
        for (bytes, expected) in cases {
            assert_eq!(check_size(bytes).map_err(|e| e.errno()), expected, "{bytes}");
        }
    }

    #[test]
    fn entries_go_round_in_order() {
        let (ring, memory) = ring();
        for round in 0..5u64 {
            for n in 0..400 {
                assert!(ring.push(3, round * 1000 + n));
            }
            assert!(ring.take_read().is_empty());
            // The client reads all but the third of the last hundred.
            let first = round * 400;
            let index = |n: u64| ((first + n) % 1024) as usize;
            (0..400).filter(|n| *n != 302).for_each(|n| memory.0.lock().unwrap()[index(n)].0 |= RESET);
            let taken = ring.take_read();
            assert_eq!(taken.len(), 302);
            assert!(taken.iter().zip(0..).all(|(entry, n)| *entry == (3, round * 1000 + n)));
            memory.0.lock().unwrap()[index(302)].0 |= RESET;
            assert_eq!(ring.take_read().len(), 98);
        }
    }

    #[test]
    fn a_full_ring_takes_no_more() {
        let (ring, memory) = ring();
        (0..1024 - 576).for_each(|n| {
            assert!(!ring.is_nearly_full() && ring.push(0, n));
        });
        assert!(ring.is_nearly_full());
        (0..576).for_each(|n| assert!(ring.push(0, n)));
        assert!(!ring.push(0, 0));
        // The client says that it has read everything twice over.
        memory.0.lock().unwrap().iter_mut().for_each(|entry| entry.0 = RESET);
        assert_eq!(ring.take_read().len(), 1024);
        memory.0.lock().unwrap().iter_mut().for_each(|entry| entry.0 = RESET);
        assert!(ring.take_read().is_empty() && !ring.is_nearly_full());
    }
}
