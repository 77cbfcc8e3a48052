//! Coalesced I/O: zones of ports and memory whose writes are put into a ring that the client reads when it likes
//! (kernel: virt/kvm/coalesced_mmio.c). The ring lies in memory that the client shares; [`Ring`] is its place.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use kvm_bindings::kvm_coalesced_mmio_zone;

use crate::error::Error;
use crate::eventfd::IoSpace;

/// The memory of a `kvm_coalesced_mmio_ring`. The client may write any of it at any time.
pub trait Ring: Send + Sync {
    /// Entries that there is room for.
    fn capacity(&self) -> u32;
    /// The client's index: the entry that it reads next.
    fn first(&self) -> u32;
    /// Our index: the entry that is filled next.
    fn last(&self) -> u32;
    /// Fills in an entry below the capacity.
    fn fill(&self, index: u32, address: u64, data: &[u8], port: bool);
    /// Sets our index, after all that was written before.
    fn publish(&self, last: u32);
}

/// One zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Zone {
    space: IoSpace,
    address: u64,
    size: u32,
}

impl Zone {
    fn from_client(zone: &kvm_coalesced_mmio_zone, port: u32) -> Result<Zone, Error> {
        let space = match port {
            0 => IoSpace::Mmio,
            1 => IoSpace::Pio,
            _ => return Err(Error::Invalid("a zone is of memory (0) or of ports (1)")),
        };
        Ok(Zone { space, address: zone.addr, size: zone.size })
    }

    /// Whether all of `size` bytes at `address` are in the zone.
    fn holds(&self, space: IoSpace, address: u64, size: u64) -> bool {
        let end = |from: u64, size: u64| from.checked_add(size);
        self.space == space
            && address >= self.address
            && end(address, size).is_some_and(|to| to <= self.address.wrapping_add(u64::from(self.size)))
    }
}

/// The zones of a VM and their ring.
#[derive(Default)]
pub struct CoalescedIo {
    zones: RwLock<Vec<Zone>>,
    count: AtomicUsize,
    ring: Mutex<Option<Box<dyn Ring>>>,
}

impl fmt::Debug for CoalescedIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoalescedIo").field("zones", &self.zones).finish_non_exhaustive()
    }
}

impl CoalescedIo {
    fn ring(&self) -> MutexGuard<'_, Option<Box<dyn Ring>>> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the VM its ring, unless it has one. `make` is not called then.
    pub fn attach_ring<E>(&self, make: impl FnOnce() -> Result<Box<dyn Ring>, E>) -> Result<(), E> {
        let mut ring = self.ring();
        if ring.is_none() {
            *ring = Some(make()?);
        }
        Ok(())
    }

    /// KVM_REGISTER_COALESCED_MMIO. `port`: the member `pio` of the zone.
    pub fn register(&self, zone: &kvm_coalesced_mmio_zone, port: u32) -> Result<(), Error> {
        /// Devices that a bus of KVM has room for (kernel: `NR_IOBUS_DEVS`).
        const ZONES_MAX: usize = 1000;
        let zone = Zone::from_client(zone, port)?;
        let mut zones = self.zones.write().unwrap_or_else(PoisonError::into_inner);
        if zones.iter().filter(|known| known.space == zone.space).count() >= ZONES_MAX {
            return Err(Error::NoSpace("coalesced zones"));
        }
        zones.push(zone);
        self.count.store(zones.len(), Ordering::Relaxed);
        Ok(())
    }

    /// KVM_UNREGISTER_COALESCED_MMIO: every zone that has all of `zone` goes.
    pub fn unregister(&self, zone: &kvm_coalesced_mmio_zone, port: u32) -> Result<(), Error> {
        let gone = Zone::from_client(zone, port)?;
        let mut zones = self.zones.write().unwrap_or_else(PoisonError::into_inner);
        zones.retain(|known| !known.holds(gone.space, gone.address, gone.size.into()));
        self.count.store(zones.len(), Ordering::Relaxed);
        Ok(())
    }

    /// A write of the guest's. True if it is in the ring now; false if it is in no zone or the ring is full: the
    /// client has to be asked, and empties the ring first.
    pub(crate) fn write(&self, space: IoSpace, address: u64, data: &[u8]) -> bool {
        if self.count.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let zones = self.zones.read().unwrap_or_else(PoisonError::into_inner);
        let hit = zones.iter().any(|zone| zone.holds(space, address, data.len() as u64));
        drop(zones);
        hit && self.ring().as_deref().is_some_and(|ring| push(ring, address, data, space == IoSpace::Pio))
    }
}

/// One entry stays free, so that a full ring can be told from an empty one. The indices are the client's to spoil.
fn push(ring: &dyn Ring, address: u64, data: &[u8], port: bool) -> bool {
    let (last, capacity) = (ring.last(), ring.capacity());
    if last >= capacity {
        return false;
    }
    let next = (last + 1) % capacity;
    if next == ring.first() {
        return false;
    }
    ring.fill(last, address, data, port);
    ring.publish(next);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    #[derive(Default)]
    struct Memory {
        first: AtomicU32,
        last: AtomicU32,
        entries: Mutex<Vec<(u32, u64, Vec<u8>, bool)>>,
    }

    impl Ring for Arc<Memory> {
        fn capacity(&self) -> u32 {
            4
        }
        fn first(&self) -> u32 {
            self.first.load(Ordering::SeqCst)
        }
        fn last(&self) -> u32 {
            self.last.load(Ordering::SeqCst)
        }
        fn fill(&self, index: u32, address: u64, data: &[u8], port: bool) {
            self.entries.lock().unwrap().push((index, address, data.to_vec(), port));
        }
        fn publish(&self, last: u32) {
            self.last.store(last, Ordering::SeqCst);
        }
    }

    fn zone(addr: u64, size: u32) -> kvm_coalesced_mmio_zone {
        kvm_coalesced_mmio_zone { addr, size, ..Default::default() }
    }

    fn with_ring() -> (CoalescedIo, Arc<Memory>) {
        let (io, memory) = (CoalescedIo::default(), Arc::new(Memory::default()));
        io.attach_ring(|| Ok::<_, ()>(Box::new(memory.clone()) as Box<dyn Ring>)).unwrap();
        (io, memory)
    }

    #[test]
    fn zones_hold_whole_accesses() {
        let (io, memory) = with_ring();
        io.register(&zone(0x1000, 0x10), 0).unwrap();
        io.register(&zone(0xcf8, 1), 1).unwrap();
        assert_eq!(io.register(&zone(0, 1), 2).map_err(|e| e.errno()), Err(libc::EINVAL));
        let cases = [
            (IoSpace::Mmio, 0x1000, 4, true),
            (IoSpace::Mmio, 0x100e, 4, false),
            (IoSpace::Mmio, 0xfff, 4, false),
            (IoSpace::Mmio, u64::MAX - 1, 4, false),
            (IoSpace::Pio, 0x1000, 4, false),
            (IoSpace::Pio, 0xcf8, 1, true),
            (IoSpace::Pio, 0xcf8, 4, false),
        ];
        for (space, address, len, taken) in cases {
            memory.first.store(memory.last.load(Ordering::SeqCst), Ordering::SeqCst);
            assert_eq!(io.write(space, address, &[0; 8][..len]), taken, "{space:?} {address:#x}");
        }
        io.unregister(&zone(0x1000, 0x20), 0).unwrap();
        memory.first.store(memory.last.load(Ordering::SeqCst), Ordering::SeqCst);
        assert!(io.write(IoSpace::Mmio, 0x1000, &[0]), "a zone that is not all of it stays");
        io.unregister(&zone(0x1004, 4), 0).unwrap();
        assert!(!io.write(IoSpace::Mmio, 0x1000, &[0]));
    }

    #[test]
    fn a_full_ring_is_never_overwritten() {
        let (io, memory) = with_ring();
        io.register(&zone(0, 0x1000), 0).unwrap();
        let write = |n: u8| io.write(IoSpace::Mmio, n.into(), &[n]);
        assert!(write(0) && write(1) && write(2) && !write(3));
        memory.first.store(1, Ordering::SeqCst);
        assert!(write(4) && !write(5));
        // Indices that the client made up.
        memory.last.store(4, Ordering::SeqCst);
        assert!(!write(6));
        memory.last.store(u32::MAX, Ordering::SeqCst);
        assert!(!write(7));
        let written: Vec<_> = memory.entries.lock().unwrap().iter().map(|e| (e.0, e.1)).collect();
        assert_eq!(written, [(0, 0), (1, 1), (2, 2), (3, 4)]);
    }

    #[test]
    fn without_a_ring_nothing_is_taken() {
        let io = CoalescedIo::default();
        io.register(&zone(0, 0x1000), 0).unwrap();
        assert!(!io.write(IoSpace::Mmio, 0, &[0]));
    }
}
