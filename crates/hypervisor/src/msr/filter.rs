//! KVM_X86_SET_MSR_FILTER: which registers the guest may read and write at all (kernel: `kvm_msr_allowed` in
//! arch/x86/kvm/x86.c). What the filter denies is #GP, or the client's business with KVM_MSR_EXIT_REASON_FILTER.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use kvm_bindings::{
    KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_MAX_RANGES,
    KVM_MSR_FILTER_RANGE_VALID_MASK, KVM_MSR_FILTER_READ, KVM_MSR_FILTER_VALID_MASK, KVM_MSR_FILTER_WRITE,
};

use crate::error::Error;

/// What the guest does to a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrAccess {
    /// RDMSR.
    Read,
    /// WRMSR.
    Write,
}

impl MsrAccess {
    fn flag(self) -> u32 {
        match self {
            MsrAccess::Read => KVM_MSR_FILTER_READ,
            MsrAccess::Write => KVM_MSR_FILTER_WRITE,
        }
    }
}

/// A range of `kvm_msr_filter`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterRange {
    /// The accesses that it is about: KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE.
    pub flags: u32,
    /// The first register.
    pub base: u32,
    /// How many registers.
    pub count: u32,
    /// A bit for each register: set allows the access.
    pub bitmap: Vec<u64>,
}

impl FilterRange {
    /// Words of the bitmap of `count` registers, after the checks that come before the bitmap is read. `None`: the
    /// range is not in use. EINVAL for flags that do not exist, for none at all, or for too many registers.
    pub fn words(flags: u32, count: u32) -> Result<Option<usize>, Error> {
        if count == 0 {
            return Ok(None);
        }
        let words = count.div_ceil(64) as usize;
        if flags == 0 || flags & !KVM_MSR_FILTER_RANGE_VALID_MASK != 0 {
            return Err(Error::Invalid("flags of an MSR filter range"));
        }
        if words * 8 > KVM_MSR_FILTER_MAX_BITMAP_SIZE as usize {
            return Err(Error::Invalid("an MSR filter range is too large"));
        }
        Ok(Some(words))
    }

    /// What the range says of an access, if it is about it.
    fn allows(&self, index: u32, access: MsrAccess) -> Option<bool> {
        let offset = index.checked_sub(self.base).filter(|&offset| offset < self.count)?;
        if self.flags & access.flag() == 0 {
            return None;
        }
        let word = self.bitmap.get(offset as usize / 64)?;
        Some(word >> (offset % 64) & 1 != 0)
    }
}

/// One filter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MsrFilter {
    default_deny: bool,
    ranges: Vec<FilterRange>,
}

impl MsrFilter {
    /// The filter with the `flags` of `kvm_msr_filter` and the `ranges` in use. EINVAL for flags that do not exist, and
    /// for one that denies everything.
    pub fn new(flags: u32, ranges: Vec<FilterRange>) -> Result<MsrFilter, Error> {
        if flags & !KVM_MSR_FILTER_VALID_MASK != 0 {
            return Err(Error::Invalid("flags of an MSR filter"));
        }
        if ranges.len() > KVM_MSR_FILTER_MAX_RANGES as usize {
            return Err(Error::Invalid("too many ranges of an MSR filter"));
        }
        let default_deny = flags & KVM_MSR_FILTER_DEFAULT_DENY != 0;
        if default_deny && ranges.is_empty() {
            return Err(Error::Invalid("an MSR filter that denies everything"));
        }
        Ok(MsrFilter { default_deny, ranges })
    }

    /// Whether the guest may do this. The first range that is about an access decides. x2APIC registers are never
    /// filtered.
    pub fn allows(&self, index: u32, access: MsrAccess) -> bool {
        if matches!(index, 0x800..=0x8ff) {
            return true;
        }
        let said = self.ranges.iter().find_map(|range| range.allows(index, access));
        said.unwrap_or(!self.default_deny)
    }
}

/// The filter of a VM, which may be exchanged while vCPUs run.
#[derive(Debug, Default)]
pub struct MsrFilters {
    present: AtomicBool,
    /// Some register that the processor keeps is denied.
    restricts_processor: AtomicBool,
    filter: RwLock<Arc<MsrFilter>>,
}

impl MsrFilters {
    /// KVM_X86_SET_MSR_FILTER: accesses that begin after this go by `filter`.
    pub fn set(&self, filter: MsrFilter) {
        let trivial = filter == MsrFilter::default();
        let denied =
            |index| !filter.allows(index, MsrAccess::Read) || !filter.allows(index, MsrAccess::Write);
        let restricts = silicon::model::msrs::MSRS.iter().any(|row| denied(row.index));
        self.restricts_processor.store(restricts, Ordering::Release);
        *self.filter.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(filter);
        self.present.store(!trivial, Ordering::Release);
    }

    /// Whether accesses to registers that the processor keeps have to be looked at.
    pub fn restricts_processor(&self) -> bool {
        self.restricts_processor.load(Ordering::Acquire)
    }

    /// Whether the guest may do this.
    pub fn allows(&self, index: u32, access: MsrAccess) -> bool {
        !self.present.load(Ordering::Acquire)
            || self.filter.read().unwrap_or_else(PoisonError::into_inner).allows(index, access)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: u32 = KVM_MSR_FILTER_READ;
    const WRITE: u32 = KVM_MSR_FILTER_WRITE;

    fn range(flags: u32, base: u32, count: u32, bitmap: &[u64]) -> FilterRange {
        FilterRange { flags, base, count, bitmap: bitmap.to_vec() }
    }

    fn errno<T>(result: Result<T, Error>) -> Result<T, i32> {
        result.map_err(|e| e.errno())
    }

    #[test]
    fn ranges_are_checked() {
        assert_eq!(errno(FilterRange::words(0, 0)), Ok(None));
        assert_eq!(errno(FilterRange::words(READ, 1)), Ok(Some(1)));
        assert_eq!(errno(FilterRange::words(READ | WRITE, 0x3000)), Ok(Some(192)));
        for (flags, count) in [(0, 1), (4, 1), (READ, 0x3001), (READ, u32::MAX)] {
            assert_eq!(errno(FilterRange::words(flags, count)), Err(libc::EINVAL), "{flags} {count}");
        }
        assert_eq!(errno(MsrFilter::new(2, vec![])), Err(libc::EINVAL));
        assert_eq!(errno(MsrFilter::new(1, vec![])), Err(libc::EINVAL));
        assert!(MsrFilter::new(0, vec![]).is_ok());
    }

    #[test]
    fn the_first_range_decides_then_the_default() {
        let ranges = vec![
            range(READ, 0x10, 4, &[0b0101]),
            range(READ | WRITE, 0x10, 66, &[0b1010, 0b10]),
            range(READ | WRITE, u32::MAX, 1, &[1]),
        ];
        let deny = MsrFilter::new(1, ranges).unwrap();
        let cases = [
            (0x10, true, false),
            (0x11, false, true),
            (0x13, false, true),
            (0x51, true, true),
            (0x50, false, false),
            (0x52, false, false),
            (0xf, false, false),
            (u32::MAX, true, true),
            (0x800, true, true),
            (0x900, false, false),
        ];
        for (index, read, write) in cases {
            assert_eq!(deny.allows(index, MsrAccess::Read), read, "read {index:#x}");
            assert_eq!(deny.allows(index, MsrAccess::Write), write, "write {index:#x}");
        }
        let allow = MsrFilter::new(0, vec![range(WRITE, 0x1, 1, &[0])]).unwrap();
        assert!(allow.allows(1, MsrAccess::Read) && !allow.allows(1, MsrAccess::Write));
    }

    #[test]
    fn filters_are_exchanged() {
        let filters = MsrFilters::default();
        assert!(filters.allows(1, MsrAccess::Write));
        filters.set(MsrFilter::new(0, vec![range(WRITE, 1, 1, &[0])]).unwrap());
        assert!(!filters.allows(1, MsrAccess::Write));
        filters.set(MsrFilter::default());
        assert!(filters.allows(1, MsrAccess::Write));
    }
}
