//! Calls on the memory of a VM.

use std::sync::atomic::Ordering;

use kvm_bindings::{kvm_userspace_memory_region, kvm_userspace_memory_region2};

use super::Vm;
use crate::error::Error;
use crate::memory::DirtyRange;

impl Vm {
    /// KVM_SET_USER_MEMORY_REGION.
    pub fn set_user_memory_region(&self, region: kvm_userspace_memory_region) -> Result<(), Error> {
        self.memory().set_region(region, self.policy().dirty_log_initially_set())?;
        self.stats().slots.store(self.memory().slot_count() as u64, Ordering::Relaxed);
        self.count_flush();
        Ok(())
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
        self.memory().clear_dirty_log(range, mask)?;
        self.count_flush();
        Ok(())
    }
}
