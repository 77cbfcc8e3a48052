//! Split locks and bus locks: what the processor refuses, and what it reports.
//!
//! A *split lock* is a locked access whose bytes lie in two cache lines; a *bus lock* is a split lock, or any locked
//! access to memory that is not write-back. Both cost the whole machine thousands of cycles, so processors can refuse
//! them (MSR_TEST_CTRL, SDM vol. 4, table 2-20) or report them (IA32_DEBUGCTL.BLD, SDM vol. 3B, 17.3.1.6; VMX bus-lock
//! detection, SDM vol. 3C, 25.6.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bits of MSR_TEST_CTRL (33H).
pub mod test_ctrl {
    /// UC-lock disable: a locked access to memory that is not write-back is #AC(0), or #GP(0) on processors that
    /// only enumerate it by [`core_capabilities::UC_LOCK_DISABLE`](super::core_capabilities::UC_LOCK_DISABLE).
    pub const UC_LOCK_DISABLE: u64 = 1 << 28;
    /// Split-lock detection: a split lock is #AC(0).
    pub const SPLIT_LOCK_DETECT: u64 = 1 << 29;
    /// Legacy: a split access goes without LOCK#, and is not atomic.
    pub const SUPPRESS_LOCK: u64 = 1 << 31;
}

/// Bits of IA32_CORE_CAPABILITIES (CFH).
pub mod core_capabilities {
    /// [`test_ctrl::UC_LOCK_DISABLE`](super::test_ctrl::UC_LOCK_DISABLE) exists, as #GP(0).
    pub const UC_LOCK_DISABLE: u64 = 1 << 4;
    /// [`test_ctrl::SPLIT_LOCK_DETECT`](super::test_ctrl::SPLIT_LOCK_DETECT) exists.
    pub const SPLIT_LOCK_DETECT: u64 = 1 << 5;
}

/// Bits of IA32_DEBUGCTL (1D9H) that silicon acts on.
pub mod debugctl {
    /// BLD: a bus lock above CPL 0 is followed by #DB.
    pub const BUS_LOCK_DETECT: u64 = 1 << 2;
}

/// The physical MSR_TEST_CTRL that a CPU works under: that of the thread that it is loaded on
/// ([`Thread::test_ctrl`](crate::topology::Thread::test_ctrl)). Writes to the register through any thread that shares it
/// act on the next locked access. The default is a private one that holds zero.
#[derive(Clone, Debug, Default)]
pub struct TestCtrl {
    cell: Arc<AtomicU64>,
    uc_lock_is_ac: bool,
}

impl TestCtrl {
    /// The register in `cell`; `uc_lock_is_ac`: CPUID.(7,2):EDX\[6\], a refused UC lock is #AC(0) and not #GP(0).
    pub fn new(cell: Arc<AtomicU64>, uc_lock_is_ac: bool) -> TestCtrl {
        TestCtrl { cell, uc_lock_is_ac }
    }

    /// Its value now.
    #[inline]
    pub fn get(&self) -> u64 {
        self.cell.load(Ordering::Acquire)
    }

    /// Sets the register without a check, for whoever has no [`Topology`](crate::topology::Topology).
    pub fn set(&self, value: u64) {
        self.cell.store(value, Ordering::Release);
    }

    /// Whether a refused UC lock is #AC(0); #GP(0) otherwise.
    pub fn uc_lock_is_ac(&self) -> bool {
        self.uc_lock_is_ac
    }
}

/// Why a locked access is a bus lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LockKind {
    /// Its bytes lie in two cache lines.
    Split,
    /// It lies in one cache line of memory that is not write-back.
    Uncached,
}

/// A locked access that takes a bus lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockedAccess {
    /// Linear address of its first byte.
    pub lin: u64,
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Bytes: 2, 4, 8 or 16.
    pub size: u8,
    /// What makes it a bus lock.
    pub kind: LockKind,
    /// Made by the processor itself on a descriptor table (accessed and busy bits), not by the instruction's operand.
    pub implicit: bool,
}
