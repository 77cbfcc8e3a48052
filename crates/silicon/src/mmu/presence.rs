//! Which pages of a region are in memory, where somebody else may have to bring them: so that a CPU exits before it waits.
#![expect(unsafe_code, reason = "asks the host about pages")]

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use crate::mmu::page_set::PageSet;
use crate::mmu::tlb::{PAGE_MASK, PAGE_SHIFT};

/// Pages that the host is asked about at a time; a multiple of 64.
const CHUNK: usize = 1 << 14;

/// Whether CPUs exit for pages of a region that are elsewhere, and how it is known which are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lazy {
    /// They do not: an access waits.
    #[default]
    No,
    /// What is not in memory (mincore(2)) is elsewhere: userfaultfd, files. A page is asked about once, and again when
    /// [`Ept::find_gone`](super::ept::Ept::find_gone) has found that it is gone.
    Resident,
    /// What this process has not mapped is: a userfaultfd for minor faults, whose pages are in memory.
    Mapped,
    /// What was in memory and is not any more: swap. Whoever touches a page for the first time gets an empty one at once.
    Swapped,
    /// What was not marked as present, or evicted ([`Ept::evict`](super::ept::Ept::evict)): the caller keeps track.
    Own,
}

/// What is known about the pages of a region.
#[derive(Debug)]
pub(super) struct Presence {
    rule: Lazy,
    /// Pages that are there, as far as anybody has looked.
    present: PageSet,
    /// [`Lazy::Swapped`]: pages that have been in memory.
    seen: Option<PageSet>,
}

impl Presence {
    /// `None` if there is no memory to keep track of so many pages.
    pub(super) fn new(rule: Lazy, pages: usize) -> Option<Presence> {
        let swapped = rule == Lazy::Swapped;
        let present = if swapped { PageSet::all_marked(pages)? } else { PageSet::new(pages)? };
        let seen = if swapped { Some(PageSet::new(pages)?) } else { None };
        Some(Presence { rule, present, seen })
    }

    /// Whether the page, at `host`, is elsewhere.
    #[inline]
    pub(super) fn is_elsewhere(&self, page: usize, host: u64) -> bool {
        !self.present.holds(page) && self.look(page, host)
    }

    #[cold]
    fn look(&self, page: usize, host: u64) -> bool {
        let mut there = [0];
        if matches!(self.rule, Lazy::Resident | Lazy::Mapped) {
            self.ask(host & !PAGE_MASK, &mut there);
        }
        if there[0] & 1 != 0 {
            self.present.set(page);
        }
        there[0] & 1 == 0
    }

    /// The page can be accessed, or the access is to find out why not.
    pub(super) fn mark(&self, page: usize) {
        self.present.set(page);
    }

    /// The pages are elsewhere. False: it is not the caller who keeps track.
    pub(super) fn evict(&self, pages: Range<usize>) -> bool {
        let own = self.rule == Lazy::Own;
        if own {
            pages.for_each(|page| self.present.clear(page));
        }
        own
    }

    /// Pages of the region at `host` that were there and are not any more.
    pub(super) fn find_gone(&self, host: u64, pages: usize) -> usize {
        if self.rule == Lazy::Own {
            return 0;
        }
        let mut there = vec![0; CHUNK.min(pages)];
        let mut gone = 0;
        for first in (0..pages).step_by(CHUNK) {
            let count = CHUNK.min(pages - first);
            let words = first / 64..(first + count).div_ceil(64);
            let known = self.present.words().get(words.clone()).unwrap_or_default();
            if known.iter().all(|word| word.load(Ordering::Relaxed) == 0) {
                continue;
            }
            self.ask(host + ((first as u64) << PAGE_SHIFT), &mut there[..count]);
            for (word, there) in words.zip(there[..count].chunks(64)) {
                gone += self.take_gone(word, there);
            }
        }
        gone
    }

    /// The same for the 64 pages of one word, of which `there` says whether they are.
    fn take_gone(&self, word: usize, there: &[u8]) -> usize {
        let resident = there.iter().rev().fold(0, |all, one| all << 1 | u64::from(one & 1));
        let Some(present) = self.present.words().get(word) else { return 0 };
        // Before this look they may have been there without anybody having seen it.
        let known = match self.seen.as_ref().and_then(|seen| seen.words().get(word)) {
            Some(seen) => seen.swap(resident, Ordering::SeqCst),
            None => u64::MAX,
        };
        let gone = present.load(Ordering::SeqCst) & known & !resident;
        if gone != 0 {
            present.fetch_and(!gone, Ordering::SeqCst);
        }
        gone.count_ones() as usize
    }

    /// Bit 0 of each byte of `there`: the page of `host` and those after it are in memory. What cannot be known is taken to be there.
    fn ask(&self, host: u64, there: &mut [u8]) {
        if self.rule == Lazy::Mapped {
            return mapped(host, there);
        }
        let size = there.len() << PAGE_SHIFT;
        // SAFETY: no memory is accessed but the bytes for the answer.
        if unsafe { libc::mincore(host as *mut libc::c_void, size, there.as_mut_ptr()) } != 0 {
            there.fill(1);
        }
    }
}

/// The same, for pages that are mapped (Documentation/admin-guide/mm/pagemap.rst: bit 63 present, bit 62 swapped).
fn mapped(host: u64, there: &mut [u8]) {
    static PAGEMAP: OnceLock<Option<File>> = OnceLock::new();
    let mut entries = vec![0; there.len() * 8];
    let file = PAGEMAP.get_or_init(|| File::open("/proc/self/pagemap").ok());
    let known =
        file.as_ref().is_some_and(|file| file.read_exact_at(&mut entries, (host >> PAGE_SHIFT) * 8).is_ok());
    for (there, entry) in there.iter_mut().zip(entries.as_chunks().0) {
        *there = u8::from(!known || u64::from_le_bytes(*entry) >> 63 != 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: usize = 256;
    const SIZE: usize = PAGES << PAGE_SHIFT;

    fn map(flags: libc::c_int) -> u64 {
        // SAFETY: a new mapping.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), SIZE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(at, libc::MAP_FAILED);
        at as u64
    }

    fn touch(host: u64, page: usize) {
        // SAFETY: our own mapping.
        unsafe { ((host + ((page as u64) << PAGE_SHIFT)) as *mut u8).write_volatile(1) };
    }

    fn drop_page(host: u64, page: usize, advice: libc::c_int) {
        // SAFETY: our own mapping.
        let done = unsafe {
            libc::madvise((host + ((page as u64) << PAGE_SHIFT)) as *mut libc::c_void, 4096, advice)
        };
        assert_eq!(done, 0);
    }

    /// What was found once was never asked for again.
    #[test]
    fn pages_that_the_host_takes_away_later_are_found() {
        for (rule, flags, advice) in [
            (Lazy::Resident, libc::MAP_PRIVATE, libc::MADV_DONTNEED),
            (Lazy::Resident, libc::MAP_SHARED, libc::MADV_REMOVE),
            (Lazy::Mapped, libc::MAP_SHARED, libc::MADV_DONTNEED),
        ] {
            let host = map(flags | libc::MAP_ANONYMOUS);
            let presence = Presence::new(rule, PAGES).unwrap();
            let elsewhere = |page: usize| presence.is_elsewhere(page, host + ((page as u64) << PAGE_SHIFT));
            assert!(elsewhere(3) && elsewhere(200));
            [3, 200].into_iter().for_each(|page| touch(host, page));
            assert!(!elsewhere(3) && !elsewhere(200) && elsewhere(4), "{rule:?}");
            assert_eq!(presence.find_gone(host, PAGES), 0);
            drop_page(host, 200, advice);
            assert!(!elsewhere(200), "nobody has looked");
            assert_eq!(presence.find_gone(host, PAGES), 1, "{rule:?}");
            assert!(elsewhere(200) && !elsewhere(3));
            presence.mark(200);
            assert!(!elsewhere(200));
            // SAFETY: our own mapping.
            unsafe { libc::munmap(host as *mut libc::c_void, SIZE) };
        }
    }

    #[test]
    fn what_was_never_there_is_not_swapped_out() {
        let host = map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let presence = Presence::new(Lazy::Swapped, PAGES).unwrap();
        touch(host, 7);
        assert_eq!(presence.find_gone(host, PAGES), 0);
        drop_page(host, 7, libc::MADV_DONTNEED);
        assert_eq!(presence.find_gone(host, PAGES), 1);
        let elsewhere = |page| presence.is_elsewhere(page, host);
        assert!(elsewhere(7) && !elsewhere(8));
        presence.mark(7);
        assert_eq!((presence.find_gone(host, PAGES), elsewhere(7)), (0, false), "once");
        // SAFETY: our own mapping.
        unsafe { libc::munmap(host as *mut libc::c_void, SIZE) };
    }

    #[test]
    fn a_caller_may_keep_track() {
        let presence = Presence::new(Lazy::Own, PAGES).unwrap();
        assert!(presence.is_elsewhere(1, 0));
        presence.mark(1);
        presence.mark(2);
        assert!(!presence.is_elsewhere(1, 0) && presence.evict(1..2));
        assert!(presence.is_elsewhere(1, 0) && !presence.is_elsewhere(2, 0));
    }
}
