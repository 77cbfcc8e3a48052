//! Guest-physical memory: which ranges of guest-physical addresses are backed by which host memory.
//! This is what EPT expresses on hardware; what is not here exits with an EPT violation.

use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// One contiguous range of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest-physical address; page-aligned.
    pub gpa: u64,
    /// Bytes; a multiple of the page size.
    pub size: u64,
    /// Host virtual address of the first byte. Whoever adds the region keeps the mapping alive until it is
    /// removed.
    pub host: u64,
    /// Guest writes exit instead of being done.
    pub readonly: bool,
}

/// The guest-physical address space of one VM, shared by all of its CPUs.
#[derive(Debug, Default)]
pub struct Ept {
    regions: RwLock<Vec<Region>>,
    generation: AtomicU64,
}

impl Ept {
    /// Nothing is mapped.
    pub fn new() -> Ept {
        Ept::default()
    }

    /// Replaces the whole map. Running CPUs notice at their next request check.
    pub fn set_regions(&self, regions: Vec<Region>) {
        *self.regions.write().unwrap_or_else(|e| e.into_inner()) = regions;
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Counts the changes of the map.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The region that holds `gpa`.
    pub fn find(&self, gpa: u64) -> Option<Region> {
        let regions = self.regions.read().unwrap_or_else(|e| e.into_inner());
        regions.iter().find(|r| gpa.wrapping_sub(r.gpa) < r.size).copied()
    }
}
