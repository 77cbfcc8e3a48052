//! Sets of the pages of a region, which CPUs and others change at once.
#![expect(unsafe_code, reason = "allocates zeroed atomics, and asks whether there is memory for them")]

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// A set of a region's pages: those written since their bits were last cleared, or those accessed. Bit order as in KVM's
/// dirty bitmap (bit 0 of word 0 is the region's first page).
#[derive(Debug)]
pub(crate) struct PageSet(Box<[AtomicU64]>);

impl PageSet {
    /// With no page marked; `None` if the host has no memory for so many.
    pub(crate) fn new(pages: usize) -> Option<PageSet> {
        Some(PageSet(zeroed(pages.div_ceil(64))?))
    }

    /// With all pages marked, and no bits behind the last.
    pub(crate) fn all_marked(pages: usize) -> Option<PageSet> {
        let set = PageSet::new(pages)?;
        for (index, word) in set.0.iter().enumerate() {
            let left = pages - index * 64;
            word.store(if left >= 64 { u64::MAX } else { (1 << left) - 1 }, Ordering::Relaxed);
        }
        Some(set)
    }

    /// Whether a page is marked.
    pub(crate) fn holds(&self, page: usize) -> bool {
        self.0.get(page / 64).is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (page % 64)) != 0)
    }

    /// Marks a page. True if it was not marked before.
    pub(crate) fn set(&self, page: usize) -> bool {
        let bit = 1 << (page % 64);
        match self.0.get(page / 64) {
            Some(word) if !self.holds(page) => word.fetch_or(bit, Ordering::SeqCst) & bit == 0,
            _ => false,
        }
    }

    /// The marks, 64 pages to a word.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        &self.0
    }

    /// Takes the mark of a page away.
    pub(crate) fn clear(&self, page: usize) {
        if let Some(word) = self.0.get(page / 64) {
            word.fetch_and(!(1 << (page % 64)), Ordering::SeqCst);
        }
    }
}

/// `count` zeroes in memory that is not touched before it is used; `None` if the host has none.
pub(crate) fn zeroed(count: usize) -> Option<Box<[AtomicU64]>> {
    if count == 0 {
        return Some(Box::default());
    }
    let layout = Layout::array::<AtomicU64>(count).ok()?;
    // SAFETY: the layout is not empty.
    let memory = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?;
    let slice = NonNull::slice_from_raw_parts(memory.cast::<AtomicU64>(), count);
    // SAFETY: allocated with the layout of this slice, and zeroes are atomics.
    Some(unsafe { Box::from_raw(slice.as_ptr()) })
}
