//! Memory slots: KVM_SET_USER_MEMORY_REGION (kernel: virt/kvm/kvm_main.c, `__kvm_set_memory_region`).
//!
//! A VM has two address spaces ([`Space`]). Both are in one guest-physical map, one of them with
//! [`SMM_SPACE`] in its addresses.
#![expect(unsafe_code, reason = "slots are host memory of the VMM, reached by address")]

mod mappings;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use silicon::mmu::ept::{Ept, Lazy, Logging, Region, SMM_SPACE};
use silicon::mmu::host;

use crate::dirty_ring::DirtyRing;
use crate::error::Error;

/// Address spaces of a VM (the answer of KVM_CAP_MULTI_ADDRESS_SPACE).
pub const ADDRESS_SPACES: u32 = 2;
/// Slots that an address space can have: 32767 less the three that the kernel keeps for itself (`KVM_USER_MEM_SLOTS`).
pub const SLOTS_MAX: u32 = 32_764;
const PAGE: u64 = 4096;
/// Slots smaller than this are firmware and the like, whose pages nobody asks about.
const LAZY_SIZE: u64 = 2 << 20;
/// Pages that a slot can have (kernel: `KVM_MEM_MAX_NR_PAGES`).
const SLOT_PAGES_MAX: u64 = (1 << 31) - 1;
/// Where the addresses of processes end (kernel: `TASK_SIZE_MAX`).
const HOST_END: u64 = (1 << 47) - PAGE;

/// An address space of a VM. Bits 31:16 of a slot's number choose one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Space {
    /// What vCPUs and everybody else see.
    #[default]
    Normal = 0,
    /// What vCPUs in system management mode see.
    Smm = 1,
}

impl Space {
    /// That of a vCPU.
    pub fn of_vcpu(in_smm: bool) -> Space {
        if in_smm { Space::Smm } else { Space::Normal }
    }

    /// That of a slot, if there can be such a slot.
    fn of_slot(slot: u32) -> Option<Space> {
        match (slot >> 16, slot & 0xffff) {
            (0, 0..SLOTS_MAX) => Some(Space::Normal),
            (1, 0..SLOTS_MAX) => Some(Space::Smm),
            _ => None,
        }
    }

    /// An address in the guest-physical map, and back.
    fn address(self, gpa: u64) -> Option<u64> {
        let bits = if self == Space::Smm { SMM_SPACE } else { 0 };
        (gpa < SMM_SPACE).then_some(gpa | bits)
    }

    fn split(address: u64) -> (Space, u64) {
        (Space::of_vcpu(address & SMM_SPACE != 0), address & !SMM_SPACE)
    }
}

/// Has the process survive accesses of guests to memory that is not there, by handlers of SIGSEGV and SIGBUS that pass
/// on all other signals. For programs that use this crate directly; a front end with handlers of its own calls
/// [`silicon::mmu::host::recover`] from them.
pub fn catch_absence() {
    host::install();
}

/// The memory slots of a VM and the guest-physical map made from them.
#[derive(Debug)]
pub struct Memory {
    ept: Arc<Ept>,
    slots: Mutex<Slots>,
    /// With dirty rings: pages that were newly written by others than a processor, and belong into a vCPU's ring.
    modified: Mutex<Vec<u64>>,
    lists_pages: AtomicBool,
    /// Whether it matters that slots map MMIO of the host's, and whether one does.
    minds_mmio: bool,
    maps_mmio: AtomicBool,
    /// Where guest-physical addresses end.
    gpa_end: u64,
}

impl Default for Memory {
    /// With all the addresses that there can be.
    fn default() -> Memory {
        Memory::new(52)
    }
}

#[derive(Debug, Default)]
struct Slots {
    by_number: BTreeMap<u32, kvm_userspace_memory_region>,
    /// For each address space: slot by its first address.
    by_address: [BTreeMap<u64, u32>; ADDRESS_SPACES as usize],
    /// Slots that map MMIO of the host's.
    mmio: BTreeSet<u32>,
}

impl Slots {
    /// Whether another slot than `slot` has part of `from..to` of its address space.
    fn overlaps(&self, space: Space, slot: u32, from: u64, to: u64) -> bool {
        let below = self.by_address[space as usize].range(..to).rev();
        // They do not overlap each other, so the last one that begins below `to` ends last.
        below.map(|(_, number)| number).filter(|number| **number != slot).take(1).any(|number| {
            self.by_number.get(number).is_some_and(|s| s.guest_phys_addr + s.memory_size > from)
        })
    }

    /// The slot that has `gpa`.
    fn at(&self, space: Space, gpa: u64) -> Option<&kvm_userspace_memory_region> {
        let (_, number) = self.by_address[space as usize].range(..=gpa).next_back()?;
        self.by_number.get(number).filter(|slot| gpa - slot.guest_phys_addr < slot.memory_size)
    }

    fn remove(&mut self, space: Space, slot: u32) {
        if let Some(old) = self.by_number.remove(&slot) {
            self.by_address[space as usize].remove(&old.guest_phys_addr);
        }
    }

    fn insert(&mut self, space: Space, region: kvm_userspace_memory_region) {
        self.remove(space, region.slot);
        self.by_address[space as usize].insert(region.guest_phys_addr, region.slot);
        self.by_number.insert(region.slot, region);
    }
}

/// The pages that KVM_CLEAR_DIRTY_LOG clears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRange {
    /// The slot.
    pub slot: u32,
    /// The first page, a multiple of 64.
    pub first_page: u64,
    /// How many; a multiple of 64 unless they go to the end of the slot.
    pub pages: u64,
}

impl Memory {
    /// Guest-physical addresses of `physical_bits` bits.
    pub fn new(physical_bits: u8) -> Memory {
        Memory {
            ept: Arc::default(),
            slots: Mutex::default(),
            modified: Mutex::default(),
            lists_pages: AtomicBool::new(false),
            minds_mmio: false,
            maps_mmio: AtomicBool::new(false),
            gpa_end: 1 << physical_bits.min(52),
        }
    }

    /// The same, which finds out whether new slots map MMIO of the host's.
    pub(crate) fn minding_mmio(self) -> Memory {
        Memory { minds_mmio: true, ..self }
    }

    /// Whether a slot maps MMIO of the host's: what was mapped at the slot's addresses when it was made counts.
    pub fn maps_host_mmio(&self) -> bool {
        self.maps_mmio.load(Ordering::Relaxed)
    }

    /// What the CPUs translate through.
    pub fn ept(&self) -> &Arc<Ept> {
        &self.ept
    }

    /// Slots that there are.
    pub fn slot_count(&self) -> usize {
        self.slots().by_number.len()
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates, moves, changes or (size 0) deletes a slot. When it returns, no vCPU uses the old mapping.
    /// `all_dirty`: a slot whose writes begin to be logged starts with all pages dirty.
    pub fn set_region(&self, region: kvm_userspace_memory_region, all_dirty: bool) -> Result<(), Error> {
        let mut slots = self.slots();
        let (space, change) = self.check(&region, &slots)?;
        let address = |gpa| space.address(gpa).unwrap_or(gpa);
        let logging = match region.flags & KVM_MEM_LOG_DIRTY_PAGES {
            0 => Logging::Off,
            _ if all_dirty => Logging::OnAllDirty,
            _ => Logging::On,
        };
        let new = Region {
            gpa: address(region.guest_phys_addr),
            size: region.memory_size,
            host: region.userspace_addr,
            readonly: region.flags & KVM_MEM_READONLY != 0,
        };
        let done = match change {
            Change::None => true,
            Change::Delete { from } => self.ept.change_region(Some(address(from)), None),
            Change::Replace { from } => self.ept.change_region(Some(address(from)), Some((new, logging))),
            Change::Create => self.ept.change_region(None, Some((new, logging))),
        };
        if !done {
            return Err(refused(region.slot, "too large for the host", libc::ENOMEM));
        }
        match change {
            Change::None => {}
            Change::Delete { .. } => {
                slots.remove(space, region.slot);
                slots.mmio.remove(&region.slot);
            }
            Change::Replace { .. } => slots.insert(space, region),
            Change::Create => {
                slots.insert(space, region);
                let lazy = self.laziness(&region);
                if lazy != Lazy::No {
                    self.ept.set_lazy(address(region.guest_phys_addr), lazy);
                }
                if self.minds_mmio && mappings::maps_host_mmio(region.userspace_addr, region.memory_size) {
                    slots.mmio.insert(region.slot);
                }
            }
        }
        self.maps_mmio.store(!slots.mmio.is_empty(), Ordering::Relaxed);
        Ok(())
    }

    /// How it is known which pages of a slot somebody has to bring.
    fn laziness(&self, region: &kvm_userspace_memory_region) -> Lazy {
        match region.memory_size {
            0..LAZY_SIZE => Lazy::No,
            size => mappings::laziness(region.userspace_addr, size),
        }
    }

    /// The client has registered `size` bytes at `host` with a userfaultfd: slots there whose pages nobody has to bring so far may be such
    /// now (post-copy migration). Whether there are any.
    pub fn registered(&self, host: u64, size: u64) -> bool {
        let slots = self.slots();
        let touched = slots.by_number.values().filter(|slot| {
            slot.userspace_addr < host.saturating_add(size) && host < slot.userspace_addr + slot.memory_size
        });
        let mut any = false;
        for slot in touched {
            let address = Space::of_slot(slot.slot).and_then(|space| space.address(slot.guest_phys_addr));
            let lazy = self.laziness(slot);
            if let Some(address) = address
                && lazy != Lazy::No
            {
                any |= self.ept.set_lazy(address, lazy);
            }
        }
        any
    }

    /// What `region` asks for, checked as the kernel checks it, in its order.
    fn check(&self, region: &kvm_userspace_memory_region, slots: &Slots) -> Result<(Space, Change), Error> {
        let invalid = |why| Err(refused(region.slot, why, libc::EINVAL));
        let Some(space) = Space::of_slot(region.slot) else {
            return invalid("no such slot number or address space");
        };
        if region.flags & !(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY) != 0 {
            return invalid("unknown flags");
        }
        let (gpa, size, host) = (region.guest_phys_addr, region.memory_size, region.userspace_addr);
        if !(gpa | size | host).is_multiple_of(PAGE) {
            return invalid("address or size is not a multiple of the page size");
        }
        if host.checked_add(size).is_none_or(|end| end > HOST_END) {
            return invalid("host range is not the client's");
        }
        let Some(end) = gpa.checked_add(size) else {
            return invalid("guest-physical range wraps");
        };
        if size / PAGE > SLOT_PAGES_MAX {
            return invalid("too many pages");
        }
        let old = slots.by_number.get(&region.slot);
        if size == 0 {
            return match old {
                Some(old) => Ok((space, Change::Delete { from: old.guest_phys_addr })),
                None => invalid("deletes a slot that does not exist"),
            };
        }
        let change = match old {
            None => Change::Create,
            Some(old)
                if old.memory_size != size
                    || old.userspace_addr != host
                    || (old.flags ^ region.flags) & KVM_MEM_READONLY != 0 =>
            {
                return invalid("size, host address and read-only flag of a slot cannot change");
            }
            Some(old) if old.guest_phys_addr == gpa && old.flags == region.flags => {
                return Ok((space, Change::None));
            }
            Some(old) => Change::Replace { from: old.guest_phys_addr },
        };
        if slots.overlaps(space, region.slot, gpa, end) {
            return Err(refused(region.slot, "overlaps another slot", libc::EEXIST));
        }
        if end > self.gpa_end {
            return invalid("beyond the physical address width");
        }
        Ok((space, change))
    }

    /// A slot that logs writes, with its address in the map: EINVAL if there can be no such slot, ENOENT if it does not
    /// log.
    fn logged(&self, slots: &Slots, slot: u32) -> Result<(u64, kvm_userspace_memory_region), Error> {
        let Some(space) = Space::of_slot(slot) else {
            return Err(refused(slot, "no such slot number or address space", libc::EINVAL));
        };
        let logs = |s: &&kvm_userspace_memory_region| s.flags & KVM_MEM_LOG_DIRTY_PAGES != 0;
        let region = slots.by_number.get(&slot).filter(logs).copied().ok_or_else(|| not_logged(slot))?;
        let address = space.address(region.guest_phys_addr).ok_or_else(|| not_logged(slot))?;
        Ok((address, region))
    }

    /// KVM_GET_DIRTY_LOG: the bitmap of the slot's pages written since their bits were cleared; `clear`s them, too.
    pub fn dirty_log(&self, slot: u32, clear: bool) -> Result<Vec<u64>, Error> {
        let slots = self.slots();
        let (gpa, _) = self.logged(&slots, slot)?;
        let log = if clear { self.ept.take_dirty(gpa) } else { self.ept.dirty(gpa) };
        log.ok_or_else(|| not_logged(slot))
    }

    /// KVM_CLEAR_DIRTY_LOG: clears the bits of `range` that are set in what `mask` gives: it is asked, without a lock,
    /// for so many words once the range is known to be good.
    pub fn clear_dirty_log<E: From<Error>>(
        &self,
        range: DirtyRange,
        mask: impl FnOnce(usize) -> Result<Vec<u64>, E>,
    ) -> Result<(), E> {
        let DirtyRange { slot, first_page, pages } = range;
        if Space::of_slot(slot).is_some() && !first_page.is_multiple_of(64) {
            return Err(refused(slot, "the first page is not a multiple of 64", libc::EINVAL).into());
        }
        let (_, region) = self.logged(&self.slots(), slot)?;
        let left = (region.memory_size / PAGE).checked_sub(first_page);
        if left.is_none_or(|left| pages > left || pages < left && !pages.is_multiple_of(64)) {
            return Err(refused(slot, "the pages are not the slot's", libc::EINVAL).into());
        }
        let mask = mask(pages.div_ceil(64) as usize)?;
        let slots = self.slots();
        let (gpa, _) = self.logged(&slots, slot)?;
        match self.ept.clear_dirty(gpa, first_page, &mask) {
            true => Ok(()),
            false => Err(not_logged(slot).into()),
        }
    }

    /// Reads guest-physical memory. False if any byte of it is not in a slot, or the client has no memory there.
    pub fn read(&self, gpa: u64, out: &mut [u8]) -> bool {
        self.read_in(Space::Normal, gpa, out)
    }

    /// [`Memory::read`] in an address space.
    pub fn read_in(&self, space: Space, gpa: u64, out: &mut [u8]) -> bool {
        self.pieces(space, gpa, out.len() as u64, false, |host, from, len| {
            // SAFETY: `pieces` gives host ranges of registered slots.
            unsafe { host::read(host, &mut out[from..from + len]) }.is_ok()
        })
    }

    /// Writes guest-physical memory. False if any byte of it is not in a writable slot, or the client has no memory there.
    pub fn write(&self, gpa: u64, data: &[u8]) -> bool {
        self.write_in(Space::Normal, gpa, data)
    }

    /// [`Memory::write`] in an address space.
    pub fn write_in(&self, space: Space, gpa: u64, data: &[u8]) -> bool {
        let done = self.pieces(space, gpa, data.len() as u64, true, |host, from, len| {
            // SAFETY: as in `read`.
            unsafe { host::write(host, &data[from..from + len]) }.is_ok()
        });
        let Some(address) = space.address(gpa) else { return done };
        let fresh = self.ept.mark_dirty(address, (data.len() as u64).min(SMM_SPACE - gpa));
        if !fresh.is_empty() && self.lists_pages.load(Ordering::Relaxed) {
            self.modified().extend(fresh);
        }
        done
    }

    /// From now on vCPUs list pages in rings.
    pub(crate) fn list_pages(&self) {
        self.lists_pages.store(true, Ordering::Relaxed);
    }

    fn modified(&self) -> MutexGuard<'_, Vec<u64>> {
        self.modified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists the pages at the addresses `pages` of the map, and those that were written by others, in a vCPU's ring. What there is
    /// no room for stays in `pages`.
    pub(crate) fn list_modified(&self, pages: &mut Vec<u64>, ring: &DirtyRing) {
        pages.append(&mut self.modified());
        if pages.is_empty() {
            return;
        }
        let slots = self.slots();
        let listed = pages.iter().position(|&address| {
            let (space, gpa) = Space::split(address);
            match slots.at(space, gpa) {
                Some(slot) => !ring.push(slot.slot, (gpa - slot.guest_phys_addr) / PAGE),
                // The slot has gone meanwhile, and its pages with it.
                None => false,
            }
        });
        pages.drain(..listed.unwrap_or(pages.len()));
    }

    /// Lets writes to pages, given by slot and page, be listed again. Those that do not exist do not matter.
    pub(crate) fn reset_pages(&self, pages: &[(u32, u64)]) {
        let slots = self.slots();
        let address = |&(slot, page): &(u32, u64)| {
            let (space, slot) = (Space::of_slot(slot)?, slots.by_number.get(&slot)?);
            if page >= slot.memory_size / PAGE {
                return None;
            }
            space.address(slot.guest_phys_addr + page * PAGE)
        };
        let addresses: Vec<u64> = pages.iter().filter_map(address).collect();
        if !addresses.is_empty() {
            self.ept.clear_pages(&addresses);
        }
    }

    /// Has the host populate the memory behind at most `size` bytes, whole pages, from `gpa` on, as reads of it would;
    /// how many bytes, which all belong to one slot. ENOENT if no slot has the first.
    pub(crate) fn populate(&self, space: Space, gpa: u64, size: u64) -> Result<u64, Error> {
        let found = space.address(gpa).and_then(|at| Some((at, self.ept.find(at)?)));
        let (at, region) = found.ok_or(Error::NotFound("a slot of this address"))?;
        let inside = at - region.gpa;
        let size = size.min(region.size - inside);
        let host = region.host + inside;
        let populate = |size: u64| {
            // SAFETY: populating changes no byte; an address without memory is an error.
            let done =
                unsafe { libc::madvise(host as *mut libc::c_void, size as usize, libc::MADV_POPULATE_READ) };
            if done == 0 { Ok(size) } else { Err(std::io::Error::last_os_error()) }
        };
        // What there is before the first page that cannot be is populated.
        let error = match populate(size).or_else(|_| populate(PAGE)) {
            Ok(size) => return Ok(size),
            Err(error) => error,
        };
        match error.raw_os_error() {
            // A host kernel before 5.14: the guest's accesses will populate it.
            Some(libc::EINVAL) if populate(0).is_err() => Ok(size),
            // What is not mapped is ENOMEM here and what may not be read EINVAL; they are EFAULT to KVM.
            Some(libc::ENOMEM | libc::EINVAL) => Err(std::io::Error::from_raw_os_error(libc::EFAULT).into()),
            Some(libc::EHWPOISON) => Err(Error::MemoryFailed { gpa, host }),
            _ => Err(error.into()),
        }
    }

    fn pieces(
        &self,
        space: Space,
        gpa: u64,
        len: u64,
        write: bool,
        mut each: impl FnMut(u64, usize, usize) -> bool,
    ) -> bool {
        let mut done = 0;
        while done < len {
            let Some(at) = gpa.checked_add(done).and_then(|gpa| space.address(gpa)) else { return false };
            let Some(region) = self.ept.find(at) else { return false };
            if write && region.readonly {
                return false;
            }
            let inside = at - region.gpa;
            let piece = (region.size - inside).min(len - done);
            if !each(region.host + inside, done as usize, piece as usize) {
                return false;
            }
            done += piece;
        }
        true
    }
}

/// What a call asks for.
#[derive(Clone, Copy, Debug)]
enum Change {
    /// Nothing changes.
    None,
    Create,
    /// A move, or other flags.
    Replace {
        from: u64,
    },
    Delete {
        from: u64,
    },
}

fn refused(slot: u32, why: &'static str, errno: i32) -> Error {
    Error::MemorySlot { slot, why, errno }
}

fn not_logged(slot: u32) -> Error {
    refused(slot, "does not log writes", libc::ENOENT)
}

/// A page of the client's that is not memory.
#[cfg(test)]
pub(crate) fn kernel_page() -> u64 {
    mappings::tests::kernel_page().0
}

#[cfg(test)]
mod tests;
