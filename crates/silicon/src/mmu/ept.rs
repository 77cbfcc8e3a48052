//! Guest-physical memory: which ranges of guest-physical addresses are backed by which host memory.
//! This is what EPT expresses on hardware; what is not here exits with an EPT violation.
//!
//! The map is immutable once published; each CPU keeps a reference to the one it uses. A change stops all CPUs
//! of the VM ([`World`]), publishes a new map and lets them go on with their cached translations dropped, so
//! that when the call returns no CPU uses what was removed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use crate::mmu::page_set::{PageSet, zeroed};
pub use crate::mmu::presence::Lazy;
use crate::mmu::presence::Presence;
use crate::mmu::tlb::{PAGE_MASK, PAGE_SHIFT};
use crate::mmu::world::{Mail, World};

/// Set in the guest-physical addresses of accesses that are made in system management mode, of which chipsets make an
/// address space of its own (SDM vol. 3C, 31.4: SMRAM, and the processor's SMI-acknowledge transaction). It is above
/// all that a processor can address (MAXPHYADDR is 52 at most). Regions with it are seen there alone, all others
/// elsewhere alone. No exit carries it.
pub const SMM_SPACE: u64 = 1 << 52;

/// One contiguous range of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest-physical address; page-aligned. May have [`SMM_SPACE`].
    pub gpa: u64,
    /// Bytes; a multiple of the page size.
    pub size: u64,
    /// Host virtual address of the first byte. Until the region is removed, nothing but the guest's memory may be
    /// mapped there; where nothing is, or nothing that allows an access, the guest's access exits
    /// ([`Exit::MemoryAbsent`](crate::vmx::Exit::MemoryAbsent)), if somebody catches the signal
    /// ([`super::host`]).
    pub host: u64,
    /// Guest writes exit instead of being done.
    pub readonly: bool,
}

/// What becomes of the record of writes to a region that is put into the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logging {
    /// Writes are not recorded.
    Off,
    /// They are. The record of the region that is replaced goes on; a new one has all pages clean.
    On,
    /// They are. The record of the region that is replaced goes on; a new one has all pages marked.
    OnAllDirty,
}

/// The guest-physical address space of one VM, shared by all of its CPUs.
#[derive(Debug, Default)]
pub struct Ept {
    map: RwLock<Arc<Map>>,
    generation: AtomicU64,
    /// Some region is lazy, or was.
    lazy: AtomicBool,
    /// Held by whoever looks for pages that are gone.
    looking: Mutex<()>,
    pub(crate) world: World,
}

/// All regions at one time, in order of address.
#[derive(Debug, Default)]
pub(crate) struct Map {
    backings: Vec<Arc<Backing>>,
}

/// A region and what is known about its pages.
#[derive(Clone, Debug)]
pub(crate) struct Backing {
    pub(crate) region: Region,
    pub(crate) pages: Arc<Pages>,
    pub(crate) dirty: Option<Arc<PageSet>>,
    /// Which pages are there, of a region whose pages may be elsewhere; `None`: whoever accesses one that is waits.
    presence: Option<Arc<Presence>>,
    /// Pages whose violations may become #VE: bit 63 of their entries is clear. `None`: no page's.
    convertible: Option<Arc<PageSet>>,
    /// Pages that CPUs have accessed, for a region whose writes have been recorded since it was put there; `None`: any
    /// may have been.
    accessed: Option<Arc<PageSet>>,
}

impl Map {
    /// Position of the region that holds `gpa`.
    pub(crate) fn position(&self, gpa: u64) -> Option<usize> {
        let after = self.backings.partition_point(|b| b.region.gpa <= gpa);
        let index = after.checked_sub(1)?;
        self.backings.get(index).filter(|b| b.holds(gpa)).map(|_| index)
    }

    /// The region at a position.
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<&Backing> {
        self.backings.get(index).map(|b| &**b)
    }

    /// Position of the region that begins at `gpa`.
    fn index(&self, gpa: u64) -> Option<usize> {
        self.backings.binary_search_by_key(&gpa, |b| b.region.gpa).ok()
    }

    fn at(&self, gpa: u64) -> Option<&Arc<Backing>> {
        self.index(gpa).and_then(|index| self.backings.get(index))
    }
}

impl Backing {
    #[inline]
    pub(crate) fn holds(&self, gpa: u64) -> bool {
        gpa.wrapping_sub(self.region.gpa) < self.region.size
    }

    /// Host address of `gpa`, which the region holds.
    #[inline]
    pub(crate) fn host(&self, gpa: u64) -> u64 {
        self.region.host.wrapping_add(gpa - self.region.gpa)
    }

    fn page_count(&self) -> usize {
        (self.region.size >> PAGE_SHIFT) as usize
    }

    /// Number of `gpa`'s page within the region.
    #[inline]
    pub(crate) fn page(&self, gpa: u64) -> usize {
        ((gpa - self.region.gpa) >> PAGE_SHIFT) as usize
    }

    /// Whether an access to `gpa`'s page would wait for somebody to bring it.
    #[inline]
    pub(crate) fn is_elsewhere(&self, gpa: u64) -> bool {
        self.presence.as_ref().is_some_and(|presence| presence.is_elsewhere(self.page(gpa), self.host(gpa)))
    }

    /// Bit 63 of the entry of `gpa`'s page.
    pub(crate) fn suppresses_ve(&self, gpa: u64) -> bool {
        self.convertible.as_ref().is_none_or(|convertible| !convertible.holds(self.page(gpa)))
    }

    /// Records a write to `gpa`'s page if writes are logged. True if the page was not marked before.
    #[inline]
    pub(crate) fn log(&self, gpa: u64) -> bool {
        self.dirty.as_ref().is_some_and(|dirty| dirty.set(self.page(gpa)))
    }

    /// Records a CPU's access to `gpa`'s page if writes are logged: writes, and, as KVM does, the first access of any
    /// kind, for it makes a translation through which the page could be written (kernel: `make_spte` in
    /// arch/x86/kvm/mmu/spte.c; a page that the host itself has only read so far is an exception there). True if the page
    /// was not marked before.
    #[inline]
    pub(crate) fn log_access(&self, gpa: u64, write: bool) -> bool {
        let first = self.accessed.as_ref().is_some_and(|accessed| accessed.set(self.page(gpa)));
        (write || first) && !self.region.readonly && self.log(gpa)
    }
}

/// Which CPUs hold decoded code of each page, and which may store to it without looking: two words per page,
/// bit per CPU. Only touched pages take memory.
#[derive(Debug)]
pub(crate) struct Pages(Box<[AtomicU64]>);

impl Pages {
    fn new(pages: usize) -> Option<Pages> {
        Some(Pages(zeroed(pages.checked_mul(2)?)?))
    }

    /// CPUs with decoded code of a page.
    pub(crate) fn code(&self, page: usize) -> Option<&AtomicU64> {
        self.0.get(page * 2)
    }

    /// CPUs that may hold permissions to store to a page.
    pub(crate) fn writers(&self, page: usize) -> Option<&AtomicU64> {
        self.0.get(page * 2 + 1)
    }
}

impl Ept {
    /// Nothing is mapped.
    pub fn new() -> Ept {
        Ept::default()
    }

    /// Replaces the whole map. When this returns no CPU uses a region that is no longer there; the caller may
    /// unmap its memory. Must not be called by a thread that is in guest mode. Dirty logging goes on for regions
    /// that keep their address and size.
    ///
    /// False, with nothing changed, if the host has no memory to keep track of so many pages.
    pub fn set_regions(&self, regions: Vec<Region>) -> bool {
        self.change(|old| {
            let mut backings: Vec<_> = regions.iter().map(|r| renew(old, *r)).collect::<Option<_>>()?;
            backings.sort_by_key(|b| b.region.gpa);
            Some(Map { backings })
        })
    }

    /// Takes the region that begins at `old` out of the map and puts `new` in, which overlaps no other. As with
    /// [`Ept::set_regions`] no CPU uses what was removed when this returns. False, with nothing changed, if the host
    /// has no memory to keep track of so many pages.
    pub fn change_region(&self, old: Option<u64>, new: Option<(Region, Logging)>) -> bool {
        self.world.stop(|world| {
            let mut map = self.map.write().unwrap_or_else(|e| e.into_inner());
            let before = old.and_then(|gpa| map.at(gpa)).cloned();
            let after = match new {
                Some((region, logging)) => match replacement(before.as_deref(), region, logging) {
                    Some(after) => Some(after),
                    None => return false,
                },
                None => None,
            };
            // In place if no CPU has this map.
            let backings = match Arc::get_mut(&mut map) {
                Some(map) => &mut map.backings,
                None => {
                    let backings = map.backings.clone();
                    *map = Arc::new(Map { backings });
                    match Arc::get_mut(&mut map) {
                        Some(map) => &mut map.backings,
                        None => return false,
                    }
                }
            };
            if let Some(before) = before
                && let Ok(index) = backings.binary_search_by_key(&before.region.gpa, |b| b.region.gpa)
            {
                backings.remove(index);
            }
            if let Some(after) = after {
                let index = backings.partition_point(|b| b.region.gpa < after.region.gpa);
                backings.insert(index, Arc::new(after));
            }
            self.generation.fetch_add(1, Ordering::Release);
            world.send_all(Mail::Flush);
            true
        })
    }

    /// Starts or ends the recording of writes to the region that begins at `gpa`. It starts with all pages
    /// clean. False if there is no such region, or no memory for the log.
    pub fn set_dirty_log(&self, gpa: u64, enabled: bool) -> bool {
        self.change_backing(gpa, |b| {
            let dirty = match (enabled, &b.dirty) {
                (false, _) => None,
                (true, Some(log)) => Some(log.clone()),
                (true, None) => Some(Arc::new(PageSet::new(b.page_count())?)),
            };
            let accessed = b.accessed.clone().filter(|_| enabled);
            Some(Backing { dirty, accessed, ..b.clone() })
        })
    }

    /// Whether, from now on, CPUs exit ([`Exit::MemoryElsewhere`](crate::vmx::Exit::MemoryElsewhere)) rather than wait for pages of
    /// the region that begins at `gpa` which somebody has to bring. False if there is no such region, or no memory to keep track of its
    /// pages.
    pub fn set_lazy(&self, gpa: u64, lazy: Lazy) -> bool {
        self.lazy.fetch_or(lazy != Lazy::No, Ordering::Relaxed);
        self.change_backing(gpa, |b| {
            let presence = match lazy {
                Lazy::No => None,
                _ => Some(Arc::new(Presence::new(lazy, b.page_count())?)),
            };
            Some(Backing { presence, ..b.clone() })
        })
    }

    /// Whether an access may exit because a page is elsewhere.
    pub fn is_lazy(&self) -> bool {
        self.lazy.load(Ordering::Relaxed)
    }

    /// The next access to `gpa`'s page is made, whether the page is there or not.
    pub fn mark_present(&self, gpa: u64) {
        let map = self.map();
        if let Some(backing) = map.position(gpa).and_then(|i| map.get(i))
            && let Some(presence) = &backing.presence
        {
            presence.mark(backing.page(gpa));
        }
    }

    /// Whether an access to `gpa` would exit because its page is elsewhere.
    pub fn is_elsewhere(&self, gpa: u64) -> bool {
        let map = self.map();
        map.position(gpa).and_then(|i| map.get(i)).is_some_and(|backing| backing.is_elsewhere(gpa))
    }

    /// Pages of `size` bytes from `gpa` on, in one region, are elsewhere now ([`Lazy::Own`]): when this returns no CPU accesses them
    /// without exiting. False if the region does not keep track of its pages that way.
    pub fn evict(&self, gpa: u64, size: u64) -> bool {
        self.world.stop(|world| {
            let map = self.map();
            let Some(backing) = map.position(gpa).and_then(|i| map.get(i)) else { return false };
            let Some(presence) = &backing.presence else { return false };
            let first = backing.page(gpa);
            let last = first + (size >> PAGE_SHIFT) as usize;
            let done = presence.evict(first..last.min(backing.page_count()));
            world.send_all(Mail::Flush);
            done
        })
    }

    /// Sets or clears the suppress-#VE bit of the pages of `size` bytes from `gpa` on, in one region. All are set at first (kernel:
    /// `SHADOW_NONPRESENT_VALUE`). False if there is no such region, or no memory to keep track of its pages.
    pub fn set_suppress_ve(&self, gpa: u64, size: u64, suppress: bool) -> bool {
        let map = self.map();
        let Some(backing) = map.position(gpa).and_then(|i| map.get(i)) else { return false };
        let (first, count) = (backing.page(gpa), backing.page_count());
        self.change_backing(backing.region.gpa, |b| {
            let set = match &b.convertible {
                Some(set) => set.clone(),
                None if suppress => return Some(b.clone()),
                None => Arc::new(PageSet::new(count)?),
            };
            for page in first..count.min(first + (size >> PAGE_SHIFT) as usize) {
                if suppress {
                    set.clear(page);
                } else {
                    set.set(page);
                }
            }
            Some(Backing { convertible: Some(set), ..b.clone() })
        })
    }

    /// The regions whose pages may be elsewhere: address and size.
    pub fn lazy_regions(&self) -> Vec<(u64, u64)> {
        let map = self.map();
        let lazy = map.backings.iter().filter(|b| b.presence.is_some());
        lazy.map(|b| (b.region.gpa, b.region.size)).collect()
    }

    /// Looks which pages the host has taken away since they were last seen; how many. When this returns no CPU accesses them
    /// without exiting.
    pub fn find_gone(&self) -> usize {
        // Whoever finds a page's mark taken away by another one must not return before CPUs have heard of it.
        let _alone = self.looking.lock().unwrap_or_else(|e| e.into_inner());
        let map = self.map();
        let gone =
            |b: &Arc<Backing>| b.presence.as_ref().map_or(0, |p| p.find_gone(b.region.host, b.page_count()));
        let gone = map.backings.iter().map(gone).sum();
        if gone != 0 {
            self.world.stop(|world| world.send_all(Mail::Flush));
        }
        gone
    }

    /// Whether writes to the region that begins at `gpa` are recorded.
    pub fn logs_dirty(&self, gpa: u64) -> bool {
        self.dirty_log(gpa).is_some()
    }

    /// The bitmap of pages of the region at `gpa` written since they were last cleared, and clears it. `None`
    /// if writes are not recorded.
    pub fn take_dirty(&self, gpa: u64) -> Option<Vec<u64>> {
        let log = self.dirty_log(gpa)?;
        // With the CPUs stopped no write can fall between the clearing and the loss of write permissions.
        Some(self.world.stop(|world| {
            world.send_all(Mail::DropWrites);
            log.words().iter().map(|word| word.swap(0, Ordering::SeqCst)).collect()
        }))
    }

    /// The bitmap as it is.
    pub fn dirty(&self, gpa: u64) -> Option<Vec<u64>> {
        let log = self.dirty_log(gpa)?;
        Some(log.words().iter().map(|word| word.load(Ordering::SeqCst)).collect())
    }

    /// Clears the bits set in `mask`, whose first word is for the 64 pages from `first_page`, a multiple of 64.
    /// False if writes are not recorded.
    pub fn clear_dirty(&self, gpa: u64, first_page: u64, mask: &[u64]) -> bool {
        let Some(log) = self.dirty_log(gpa) else { return false };
        self.world.stop(|world| {
            world.send_all(Mail::DropWrites);
            let words = log.words().iter().skip((first_page / 64) as usize);
            for (word, clear) in words.zip(mask) {
                word.fetch_and(!clear, Ordering::SeqCst);
            }
        });
        true
    }

    /// Takes the marks of single pages away, each given by an address in it. Writes to them are recorded again when
    /// this returns. Pages whose writes are not recorded do not matter.
    pub fn clear_pages(&self, pages: &[u64]) {
        self.world.stop(|world| {
            world.send_all(Mail::DropWrites);
            let map = self.map();
            for &gpa in pages {
                if let Some(backing) = map.position(gpa).and_then(|i| map.get(i))
                    && let Some(log) = &backing.dirty
                {
                    log.clear(backing.page(gpa));
                }
            }
        });
    }

    /// Records a write to guest memory by someone else than a CPU (a device); gives the pages that were not marked
    /// before.
    pub fn mark_dirty(&self, gpa: u64, len: u64) -> Vec<u64> {
        let map = self.map();
        let (mut page, mut fresh) = (gpa & !PAGE_MASK, Vec::new());
        while len != 0 && page <= gpa.saturating_add(len - 1) {
            if map.position(page).and_then(|i| map.get(i)).is_some_and(|backing| backing.log(page)) {
                fresh.push(page);
            }
            let Some(next) = page.checked_add(PAGE_MASK + 1) else { break };
            page = next;
        }
        fresh
    }

    /// Memory may have been written under another of its addresses, where nobody looks for code: CPUs compare the
    /// blocks that they use from now on.
    pub fn code_may_have_changed(&self) {
        self.world.send_all(Mail::CompareCode);
    }

    /// Counts the changes of the map.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The region that holds `gpa`.
    pub fn find(&self, gpa: u64) -> Option<Region> {
        let map = self.map();
        map.position(gpa).and_then(|i| map.get(i)).map(|b| b.region)
    }

    /// The guest-physical address of the host address `host`; the first, if there are several.
    pub(crate) fn address_of(&self, host: u64) -> Option<u64> {
        let map = self.map();
        let inside = |b: &&Arc<Backing>| host.wrapping_sub(b.region.host) < b.region.size;
        map.backings.iter().find(inside).map(|b| b.region.gpa + (host - b.region.host))
    }

    /// The current map.
    pub(crate) fn map(&self) -> Arc<Map> {
        self.map.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn dirty_log(&self, gpa: u64) -> Option<Arc<PageSet>> {
        self.map().at(gpa)?.dirty.clone()
    }

    /// Puts what `make` makes of the region that begins at `gpa` in its place. False, with nothing changed, if there is no such region
    /// or nothing is made.
    fn change_backing(&self, gpa: u64, make: impl FnOnce(&Backing) -> Option<Backing>) -> bool {
        self.change(|old| {
            let index = old.index(gpa)?;
            let mut backings = old.backings.clone();
            let backing = backings.get_mut(index)?;
            *backing = Arc::new(make(backing)?);
            Some(Map { backings })
        })
    }

    /// Publishes a new map while no CPU is in guest mode; each drops what it has cached before it goes on. False
    /// if there is none to publish.
    fn change(&self, make: impl FnOnce(&Map) -> Option<Map>) -> bool {
        self.world.stop(|world| {
            let mut map = self.map.write().unwrap_or_else(|e| e.into_inner());
            let Some(new) = make(&map) else { return false };
            *map = Arc::new(new);
            self.generation.fetch_add(1, Ordering::Release);
            world.send_all(Mail::Flush);
            true
        })
    }
}

/// The entry for `region`, which takes the place of `before`.
fn replacement(before: Option<&Backing>, region: Region, logging: Logging) -> Option<Backing> {
    let count = (region.size >> PAGE_SHIFT) as usize;
    let same_pages = before.filter(|b| b.region.gpa == region.gpa && b.region.size == region.size);
    let pages = match same_pages {
        Some(before) => before.pages.clone(),
        None => Arc::new(Pages::new(count)?),
    };
    let kept = before.filter(|b| b.region.size == region.size).and_then(|b| b.dirty.clone());
    let dirty = match (logging, kept) {
        (Logging::Off, _) => None,
        (_, Some(log)) => Some(log),
        (Logging::On, None) => Some(Arc::new(PageSet::new(count)?)),
        (Logging::OnAllDirty, None) => Some(Arc::new(PageSet::all_marked(count)?)),
    };
    let accessed = match (logging, before) {
        (Logging::Off, _) => None,
        (_, Some(before)) if same_pages.is_some() => before.accessed.clone(),
        _ => Some(Arc::new(PageSet::new(count)?)),
    };
    let presence = same_pages.filter(|b| b.region.host == region.host).and_then(|b| b.presence.clone());
    let convertible = same_pages.and_then(|b| b.convertible.clone());
    Some(Backing { region, pages, dirty, presence, convertible, accessed })
}

/// The entry for `region` in a new map: what is known of its pages is kept if it was there before.
fn renew(old: &Map, region: Region) -> Option<Arc<Backing>> {
    Some(match old.at(region.gpa) {
        Some(b) if b.region == region => b.clone(),
        Some(b) if b.region.size == region.size => Arc::new(Backing { region, ..Backing::clone(b) }),
        _ => {
            let pages = Arc::new(Pages::new((region.size >> PAGE_SHIFT) as usize)?);
            Arc::new(Backing {
                region,
                pages,
                dirty: None,
                presence: None,
                convertible: None,
                accessed: None,
            })
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(gpa: u64, size: u64) -> Region {
        Region { gpa, size, host: 0x7000_0000 + gpa, readonly: false }
    }

    #[test]
    fn regions_are_found_by_address() {
        let ept = Ept::new();
        ept.set_regions(vec![region(0x10_0000, 0x2000), region(0, 0x1000)]);
        for (gpa, found) in [
            (0, Some(0)),
            (0xfff, Some(0)),
            (0x1000, None),
            (0xf_ffff, None),
            (0x10_0000, Some(0x10_0000)),
            (0x10_1fff, Some(0x10_0000)),
            (0x10_2000, None),
            (u64::MAX, None),
        ] {
            assert_eq!(ept.find(gpa).map(|r| r.gpa), found, "{gpa:#x}");
        }
        let before = ept.generation();
        ept.set_regions(vec![]);
        assert_ne!(ept.generation(), before);
        assert_eq!(ept.find(0), None);
    }

    #[test]
    fn a_region_too_large_to_keep_track_of_is_refused() {
        let ept = Ept::new();
        assert!(ept.set_regions(vec![region(0x1000, 0x1000)]));
        assert!(!ept.set_regions(vec![Region { size: 1 << 62, ..region(0, 0) }]));
        assert!(ept.find(0x1000).is_some() && ept.find(0x10_0000).is_none());
    }

    #[test]
    fn regions_change_one_by_one() {
        let ept = Ept::new();
        let found = |gpa| ept.find(gpa).map(|r| r.host);
        assert!(ept.change_region(None, Some((region(0x10_0000, 0x2000), Logging::Off))));
        assert!(ept.change_region(None, Some((region(0, 0x1000), Logging::OnAllDirty))));
        assert_eq!((found(0), found(0x10_1000)), (Some(0x7000_0000), Some(0x7010_0000)));
        assert_eq!(ept.dirty(0), Some(vec![1]));
        // A CPU has the map: it is not changed under it.
        let held = ept.map();
        let moved = Region { gpa: 0x20_0000, ..region(0, 0x1000) };
        assert!(ept.change_region(Some(0), Some((moved, Logging::On))));
        assert_eq!((found(0), found(0x20_0000)), (None, Some(0x7000_0000)));
        assert!(held.position(0).is_some() && held.position(0x20_0000).is_none());
        assert_eq!(ept.dirty(0x20_0000), Some(vec![1]), "the record moves along");
        assert!(ept.change_region(Some(0x20_0000), Some((moved, Logging::Off))));
        assert!(!ept.logs_dirty(0x20_0000));
        assert!(!ept.change_region(None, Some((Region { size: 1 << 62, ..region(0, 0) }, Logging::Off))));
        assert!(ept.change_region(Some(0x10_0000), None) && ept.change_region(Some(0x20_0000), None));
        assert_eq!((found(0x10_0000), found(0x20_0000)), (None, None));
    }

    #[test]
    fn the_dirty_log_has_kvms_layout() {
        let ept = Ept::new();
        ept.set_regions(vec![region(0x10_0000, 100 << 12)]);
        assert_eq!(ept.take_dirty(0x10_0000), None);
        assert!(!ept.set_dirty_log(0, true));
        assert!(
            !ept.logs_dirty(0x10_0000) && ept.set_dirty_log(0x10_0000, true) && ept.logs_dirty(0x10_0000)
        );
        ept.mark_dirty(0x10_0fff, 2);
        ept.mark_dirty(0x10_0000 + (64 << 12), 1);
        ept.mark_dirty(0x10_0000 + (99 << 12), 0x8000);
        ept.mark_dirty(0x10_2000, 0);
        ept.mark_dirty(u64::MAX, u64::MAX);
        assert_eq!(ept.dirty(0x10_0000), Some(vec![3, 1 | 1 << 35]));
        assert_eq!(ept.mark_dirty(0x10_1fff, 2), [0x10_2000], "the others are marked already");
        ept.clear_pages(&[0x10_2123, 0, u64::MAX]);
        assert_eq!(ept.dirty(0x10_0000), Some(vec![3, 1 | 1 << 35]));
        assert!(ept.clear_dirty(0x10_0000, 64, &[1]));
        // A change of the map that keeps the region keeps its log.
        ept.set_regions(vec![region(0, 0x1000), region(0x10_0000, 100 << 12)]);
        assert_eq!(ept.take_dirty(0x10_0000), Some(vec![3, 1 << 35]));
        assert_eq!(ept.take_dirty(0x10_0000), Some(vec![0, 0]));
        assert!(ept.set_dirty_log(0x10_0000, false));
        assert_eq!(ept.dirty(0x10_0000), None);
    }
}
