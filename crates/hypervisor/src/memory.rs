//! Memory slots: KVM_SET_USER_MEMORY_REGION (kernel: virt/kvm/kvm_main.c, `__kvm_set_memory_region`).
#![expect(unsafe_code, reason = "slots are host memory of the VMM, reached by address")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use silicon::mmu::ept::{Ept, Region};

use crate::error::Error;

/// Slots that a VM can have.
pub const SLOTS_MAX: u32 = 32_764;
const PAGE: u64 = 4096;
/// Pages that a slot can have (kernel: `KVM_MEM_MAX_NR_PAGES`).
const SLOT_PAGES_MAX: u64 = (1 << 31) - 1;

/// The memory slots of a VM and the guest-physical map made from them.
#[derive(Debug, Default)]
pub struct Memory {
    ept: Arc<Ept>,
    slots: Mutex<BTreeMap<u32, kvm_userspace_memory_region>>,
}

impl Memory {
    /// What the CPUs translate through.
    pub fn ept(&self) -> &Arc<Ept> {
        &self.ept
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<u32, kvm_userspace_memory_region>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates, moves, changes or (size 0) deletes a slot. When it returns, no vCPU uses the old mapping.
    pub fn set_region(&self, region: kvm_userspace_memory_region) -> Result<(), Error> {
        let mut slots = self.slots();
        check(&region, &slots)?;
        let before = if region.memory_size == 0 {
            slots.remove(&region.slot)
        } else {
            slots.insert(region.slot, region)
        };
        let regions = slots.values().map(|s| Region {
            gpa: s.guest_phys_addr,
            size: s.memory_size,
            host: s.userspace_addr,
            readonly: s.flags & KVM_MEM_READONLY != 0,
        });
        if !self.ept.set_regions(regions.collect()) {
            match before {
                Some(before) => slots.insert(region.slot, before),
                None => slots.remove(&region.slot),
            };
            return Err(Error::MemorySlot {
                slot: region.slot,
                why: "too large for the host",
                errno: libc::ENOMEM,
            });
        }
        let logged = region.flags & KVM_MEM_LOG_DIRTY_PAGES != 0;
        if region.memory_size != 0 && logged != self.ept.logs_dirty(region.guest_phys_addr) {
            self.ept.set_dirty_log(region.guest_phys_addr, logged);
        }
        Ok(())
    }

    /// KVM_GET_DIRTY_LOG: the bitmap of the slot's pages written since the last call. ENOENT for a slot that is
    /// not there or does not log.
    pub fn take_dirty(&self, slot: u32) -> Result<Vec<u64>, Error> {
        let slots = self.slots();
        let log = slots.get(&slot).and_then(|s| self.ept.take_dirty(s.guest_phys_addr));
        log.ok_or(Error::MemorySlot { slot, why: "does not log writes", errno: libc::ENOENT })
    }

    /// Reads guest-physical memory. False if any byte of it is not in a slot.
    pub fn read(&self, gpa: u64, out: &mut [u8]) -> bool {
        self.pieces(gpa, out.len() as u64, false, |host, from, len| {
            // SAFETY: `pieces` gives host ranges of registered slots, which the VMM keeps mapped; `from..from + len`
            // lies within `out`.
            unsafe {
                std::ptr::copy_nonoverlapping(host as *const u8, out[from..from + len].as_mut_ptr(), len)
            };
        })
    }

    /// Writes guest-physical memory. False if any byte of it is not in a writable slot.
    pub fn write(&self, gpa: u64, data: &[u8]) -> bool {
        let done = self.pieces(gpa, data.len() as u64, true, |host, from, len| {
            // SAFETY: as in `read`.
            unsafe { std::ptr::copy_nonoverlapping(data[from..from + len].as_ptr(), host as *mut u8, len) };
        });
        self.ept.mark_dirty(gpa, data.len() as u64);
        done
    }

    fn pieces(&self, gpa: u64, len: u64, write: bool, mut each: impl FnMut(u64, usize, usize)) -> bool {
        let mut done = 0;
        while done < len {
            let Some(at) = gpa.checked_add(done) else { return false };
            let Some(region) = self.ept.find(at) else { return false };
            if write && region.readonly {
                return false;
            }
            let inside = at - region.gpa;
            let piece = (region.size - inside).min(len - done);
            each(region.host + inside, done as usize, piece as usize);
            done += piece;
        }
        true
    }
}

fn check(
    region: &kvm_userspace_memory_region,
    slots: &BTreeMap<u32, kvm_userspace_memory_region>,
) -> Result<(), Error> {
    let fail = |why, errno| Err(Error::MemorySlot { slot: region.slot, why, errno });
    if region.slot >= SLOTS_MAX {
        return fail("slot number too large", libc::EINVAL);
    }
    if region.flags & !(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY) != 0 {
        return fail("unknown flags", libc::EINVAL);
    }
    let (gpa, size, host) = (region.guest_phys_addr, region.memory_size, region.userspace_addr);
    if !(gpa | size | host).is_multiple_of(PAGE) {
        return fail("address or size is not a multiple of the page size", libc::EINVAL);
    }
    if size / PAGE > SLOT_PAGES_MAX {
        return fail("too many pages", libc::EINVAL);
    }
    let Some(end) = gpa.checked_add(size) else {
        return fail("guest-physical range wraps", libc::EINVAL);
    };
    if end > 1 << 52 {
        return fail("beyond the physical address width", libc::EINVAL);
    }
    if host.checked_add(size).is_none_or(|end| end > 1 << 56) {
        return fail("host range wraps", libc::EINVAL);
    }
    let Some(old) = slots.get(&region.slot) else {
        if size == 0 {
            return fail("deletes a slot that does not exist", libc::EINVAL);
        }
        return check_overlap(region, slots);
    };
    if size == 0 {
        return Ok(());
    }
    if old.memory_size != size
        || old.userspace_addr != host
        || (old.flags ^ region.flags) & KVM_MEM_READONLY != 0
    {
        return fail("size, host address and read-only flag of a slot cannot change", libc::EINVAL);
    }
    check_overlap(region, slots)
}

fn check_overlap(
    region: &kvm_userspace_memory_region,
    slots: &BTreeMap<u32, kvm_userspace_memory_region>,
) -> Result<(), Error> {
    let (from, to) = (region.guest_phys_addr, region.guest_phys_addr + region.memory_size);
    let overlaps = (slots.values())
        .any(|s| s.slot != region.slot && s.guest_phys_addr < to && from < s.guest_phys_addr + s.memory_size);
    if overlaps {
        return Err(Error::MemorySlot {
            slot: region.slot,
            why: "overlaps another slot",
            errno: libc::EEXIST,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(slot: u32, gpa: u64, size: u64, host: u64) -> kvm_userspace_memory_region {
        kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: host,
        }
    }

    #[test]
    fn slots_are_checked_as_kvm_checks_them() {
        let memory = Memory::default();
        let cases = [
            (region(SLOTS_MAX, 0, 4096, 0x1000), libc::EINVAL),
            (region(0, 1, 4096, 0x1000), libc::EINVAL),
            (region(0, 0, 4095, 0x1000), libc::EINVAL),
            (region(0, 0, 4096, 0x1001), libc::EINVAL),
            (region(0, u64::MAX - 4095, 8192, 0x1000), libc::EINVAL),
            (region(0, 0, 0, 0), libc::EINVAL),
            (region(0, 0, 1 << 43, 0x1000), libc::EINVAL),
        ];
        for (bad, errno) in cases {
            assert_eq!(memory.set_region(bad).map_err(|e| e.errno()), Err(errno), "{bad:?}");
        }
        memory.set_region(region(0, 0, 0x2000, 0x10_0000)).unwrap();
        let overlap = memory.set_region(region(1, 0x1000, 0x1000, 0x20_0000));
        assert_eq!(overlap.map_err(|e| e.errno()), Err(libc::EEXIST));
        memory.set_region(region(0, 0x4000, 0x2000, 0x10_0000)).unwrap();
        assert!(memory.ept().find(0).is_none() && memory.ept().find(0x5000).is_some());
        memory.set_region(region(0, 0, 0, 0)).unwrap();
        assert!(memory.ept().find(0x4000).is_none());
    }

    #[test]
    fn reads_and_writes_cross_slots() {
        let (mut a, mut b) = (vec![0u8; 8192], vec![0u8; 8192]);
        let align = |v: &mut Vec<u8>| (v.as_mut_ptr() as u64 + 4095) & !4095;
        let memory = Memory::default();
        memory.set_region(region(0, 0, 4096, align(&mut a))).unwrap();
        memory.set_region(region(1, 4096, 4096, align(&mut b))).unwrap();
        assert!(memory.write(4094, b"abcd"));
        let mut out = [0; 4];
        assert!(memory.read(4094, &mut out) && &out == b"abcd");
        assert!(!memory.write(8190, b"abcd"));
        let readonly = KVM_MEM_READONLY;
        let rom =
            kvm_userspace_memory_region { flags: readonly, ..region(2, 0x10_0000, 4096, align(&mut b)) };
        memory.set_region(rom).unwrap();
        assert!(!memory.write(0x10_0000, b"a") && memory.read(0x10_0000, &mut out));
    }

    #[test]
    fn slots_log_writes_while_they_are_told_to() {
        let mut bytes = vec![0u8; 12288];
        let host = (bytes.as_mut_ptr() as u64 + 4095) & !4095;
        let memory = Memory::default();
        let plain = region(3, 0x10_0000, 8192, host);
        memory.set_region(plain).unwrap();
        assert_eq!(memory.take_dirty(3).map_err(|e| e.errno()), Err(libc::ENOENT));
        memory.set_region(kvm_userspace_memory_region { flags: KVM_MEM_LOG_DIRTY_PAGES, ..plain }).unwrap();
        assert!(memory.write(0x10_1000, b"a"));
        assert_eq!(memory.take_dirty(3).unwrap(), [2]);
        assert_eq!(memory.take_dirty(3).unwrap(), [0]);
        memory.set_region(plain).unwrap();
        assert!(memory.take_dirty(3).is_err() && memory.take_dirty(4).is_err());
    }
}
