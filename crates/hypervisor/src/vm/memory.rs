//! Calls on the memory of a VM.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use kvm_bindings::{kvm_userspace_memory_region, kvm_userspace_memory_region2};

use silicon::mmu::ept::Lazy;

use super::Vm;
use crate::async_pf::{PageIns, PageSource};
use crate::dirty_ring::{DirtyRing, check_size};
use crate::error::Error;
use crate::memory::DirtyRange;

impl Vm {
    /// KVM_SET_USER_MEMORY_REGION.
    pub fn set_user_memory_region(&self, region: kvm_userspace_memory_region) -> Result<(), Error> {
        // Rings have each page listed, however the log starts.
        let all_dirty = self.policy().dirty_log_initially_set() && self.dirty_ring_bytes().is_none();
        self.memory().set_region(region, all_dirty)?;
        self.stats().slots.store(self.memory().slot_count() as u64, Ordering::Relaxed);
        self.count_flush();
        self.watch_pages();
        Ok(())
    }

    /// Has vCPUs not wait for pages of the slot that begins at `gpa` which somebody has to bring
    /// ([`async_pf`](crate::async_pf)), or wait. Slots behind a userfaultfd, those of files on disks and, where the host has swap, all
    /// others are so from the beginning. ENOENT if there is no such slot.
    pub fn set_lazy(&self, gpa: u64, lazy: Lazy) -> Result<(), Error> {
        if !self.memory().ept().set_lazy(gpa, lazy) {
            return Err(Error::NotFound("a slot that begins at this address"));
        }
        self.watch_pages();
        Ok(())
    }

    /// The client has registered memory with a userfaultfd ([`Memory::registered`](crate::memory::Memory::registered)).
    pub fn registered(&self, host: u64, size: u64) {
        if self.memory().registered(host, size) {
            self.watch_pages();
        }
    }

    /// `size` bytes of guest memory from `gpa` on, in a slot with [`Lazy::Own`], are elsewhere now. ENOENT if there is none.
    pub fn evict(&self, gpa: u64, size: u64) -> Result<(), Error> {
        match self.memory().ept().evict(gpa, size) {
            true => Ok(()),
            false => Err(Error::NotFound("a slot of this address whose pages the caller keeps track of")),
        }
    }

    /// Looks at once which pages of lazy slots the host has taken away, as the VM does from time to time; how many. When this returns no vCPU
    /// takes them to be there.
    pub fn find_gone(&self) -> usize {
        self.memory().ept().find_gone()
    }

    /// Who brings pages that are elsewhere, in the place of the host kernel. EEXIST once somebody has been asked for one.
    pub fn set_page_source(&self, source: Arc<dyn PageSource>) -> Result<(), Error> {
        let page_ins = PageIns::new(self.memory().ept().clone(), source);
        self.page_ins.set(page_ins).map_err(|_| Error::Exists("a source of pages"))
    }

    /// Pages may be taken away.
    fn watch_pages(&self) {
        if self.memory().ept().is_lazy() {
            self.page_ins().watch();
        }
    }

    /// All vCPUs dropped translations.
    fn count_flush(&self) {
        self.stats().flush_requests.count();
        self.stats().flushes.count();
    }

    /// KVM_SET_USER_MEMORY_REGION2. There is no guest_memfd, so its flag is EINVAL and its members do not matter.
    pub fn set_user_memory_region2(&self, region: &kvm_userspace_memory_region2) -> Result<(), Error> {
        self.set_user_memory_region(kvm_userspace_memory_region {
            slot: region.slot,
            flags: region.flags,
            guest_phys_addr: region.guest_phys_addr,
            memory_size: region.memory_size,
            userspace_addr: region.userspace_addr,
        })
    }

    /// KVM_GET_DIRTY_LOG: the bitmap of a slot, 64 pages to a word. It is cleared, unless the client does that by hand
    /// (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
    pub fn dirty_log(&self, slot: u32) -> Result<Vec<u64>, Error> {
        self.require_dirty_bitmap()?;
        let clear = !self.policy().manual_dirty_log();
        let log = self.memory().dirty_log(slot, clear)?;
        if clear {
            self.count_flush();
        }
        Ok(log)
    }

    /// KVM_CLEAR_DIRTY_LOG; see [`Memory::clear_dirty_log`](crate::memory::Memory::clear_dirty_log).
    pub fn clear_dirty_log<E: From<Error>>(
        &self,
        range: DirtyRange,
        mask: impl FnOnce(usize) -> Result<Vec<u64>, E>,
    ) -> Result<(), E> {
        self.require_dirty_bitmap()?;
        self.memory().clear_dirty_log(range, mask)?;
        self.count_flush();
        Ok(())
    }

    /// With dirty rings there are no bitmaps: ENXIO.
    fn require_dirty_bitmap(&self) -> Result<(), Error> {
        match self.dirty_ring_bytes() {
            None => Ok(()),
            Some(_) => Err(Error::Missing("a dirty bitmap: the VM has dirty rings")),
        }
    }

    /// Bytes of each vCPU's dirty ring, if they were asked for.
    pub fn dirty_ring_bytes(&self) -> Option<u32> {
        self.dirty_ring_bytes.get().copied()
    }

    /// KVM_CAP_DIRTY_LOG_RING: every vCPU gets a ring of so many bytes. Comes before the first vCPU, and once.
    pub fn set_dirty_ring(&self, bytes: u64) -> Result<(), Error> {
        let bytes = check_size(bytes)?;
        let setup = self.setup();
        if !setup.vcpus.is_empty() || self.dirty_ring_bytes.set(bytes).is_err() {
            return Err(Error::Invalid("vCPUs exist already, or the size of dirty rings is set"));
        }
        self.memory().list_pages();
        Ok(())
    }

    pub(crate) fn add_dirty_ring(&self, ring: Arc<DirtyRing>) {
        self.dirty_rings().push(ring);
    }

    fn dirty_rings(&self) -> MutexGuard<'_, Vec<Arc<DirtyRing>>> {
        self.dirty_rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// KVM_RESET_DIRTY_RINGS: takes back the entries that the client has read, of all rings; how many. EINVAL without
    /// dirty rings.
    pub fn reset_dirty_rings(&self) -> Result<u32, Error> {
        if self.dirty_ring_bytes().is_none() {
            return Err(Error::Invalid("the VM has no dirty rings"));
        }
        let rings = self.dirty_rings();
        let pages: Vec<_> = rings.iter().flat_map(|ring| ring.take_read()).collect();
        self.memory().reset_pages(&pages);
        self.count_flush();
        Ok(pages.len() as u32)
    }
}
