//! Split locks and bus locks: what the processor refuses, and what it reports.
//!
//! A *split lock* is a locked access whose bytes lie in two cache lines; a *bus lock* is a split lock, or any locked
//! access to memory that is not write-back. Both cost the whole machine thousands of cycles, so processors can refuse
//! them (MSR_TEST_CTRL, SDM vol. 4, table 2-20) or report them (IA32_DEBUGCTL.BLD, SDM vol. 3B, 17.3.1.6; VMX bus-lock
//! detection, SDM vol. 3C, 25.6.2).
//!
//! Locked accesses go through one place, [`crate::mmu`]'s `lock`, which asks here. What the SDM leaves open is decided so:
//! - An accessed or busy bit that has to be set is set by a locked access to the eight bytes of the descriptor (its first half
//!   in IA-32e mode), with supervisor rights, so it is split if the table is not aligned to 8 bytes and they lie in two lines.
//!   If the bit is set already there is no locked access. LAR, LSL, VERR and VERW set none.
//! - In the delivery of an event such an access can be refused too: #AC(0) then arises during delivery and is delivered
//!   serially, being benign.
//! - BLD's #DB is pending only if CPL is above 0 both at the access and when the instruction is complete.
//! - A bus-lock exit comes before the #DB that the instruction causes, which stays pending
//!   ([`Cpu::pending_debug`]). Monitor-trap exits, and exits in the middle of the instruction, replace it.
//! - A locked access that a device answers outside guest mode is reported once, when it is complete.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::system::debug::DR6_BUS_LOCK;

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

impl Cpu {
    /// Whether anything but a counter wants to know of a bus lock.
    fn reports_bus_locks(&self) -> bool {
        let trapped = self.state.cpl != 0 && self.state.debugctl & debugctl::BUS_LOCK_DETECT != 0;
        trapped || self.controls.bus_lock_detection
    }

    /// Refuses `lock`, which is about to be taken, if MSR_TEST_CTRL says so; `uncached`: some of it is not write-back memory.
    /// Sees to it that what follows a bus lock comes right after its instruction.
    pub(crate) fn claim_bus_lock(&mut self, lock: LockedAccess, uncached: bool) -> Result<(), Abort> {
        let control = self.test_ctrl.get();
        let permitted = self.permitted_lock;
        if lock.kind == LockKind::Split && permitted.is_none() && control & test_ctrl::SPLIT_LOCK_DETECT != 0
        {
            self.counters.split_lock_faults += 1;
            return Err(self.refuse_lock(lock, Exception::AC));
        }
        let permitted = permitted == Some(LockKind::Uncached);
        if uncached && !permitted && control & test_ctrl::UC_LOCK_DISABLE != 0 {
            self.counters.uc_lock_faults += 1;
            let exception = if self.test_ctrl.uc_lock_is_ac() { Exception::AC } else { Exception::gp(0) };
            return Err(self.refuse_lock(LockedAccess { kind: LockKind::Uncached, ..lock }, exception));
        }
        self.step_for_bus_locks()
    }

    fn refuse_lock(&mut self, lock: LockedAccess, exception: Exception) -> Abort {
        let abort = self.raise(exception);
        self.refused_lock = Some(lock);
        abort
    }

    /// Gives the instruction up for another attempt as a single step if bus locks are to be reported: a block would go on
    /// with the next instruction.
    pub(crate) fn step_for_bus_locks(&mut self) -> Result<(), Abort> {
        if self.stepping || !self.reports_bus_locks() {
            return Ok(());
        }
        self.step_next = true;
        self.refresh_local();
        Err(self.retry())
    }

    /// The instruction is given up only to be made a single step.
    pub(crate) fn awaits_step(&self) -> bool {
        self.step_next && !self.stepping
    }

    /// MSR_TEST_CTRL says that a split access goes without LOCK#.
    pub(crate) fn lock_is_suppressed(&self) -> bool {
        self.permitted_lock.is_none() && self.test_ctrl.get() & test_ctrl::SUPPRESS_LOCK != 0
    }

    /// `lock`, if there is one, has been taken.
    pub(crate) fn record_bus_lock(&mut self, lock: Option<LockedAccess>) {
        if lock.is_some() {
            self.counters.bus_locks += 1;
            self.bus_lock_taken |= self.reports_bus_locks();
        }
    }

    /// An instruction or the delivery of an event is complete. If it took a bus lock, #DB becomes pending under BLD, unless
    /// CPL is 0 by now; true if [`Exit::BusLock`](crate::vmx::Exit::BusLock) is due.
    pub(crate) fn bus_lock_is_due(&mut self) -> bool {
        if !self.bus_lock_taken {
            return false;
        }
        if self.state.cpl != 0 && self.state.debugctl & debugctl::BUS_LOCK_DETECT != 0 {
            self.pending_debug |= DR6_BUS_LOCK;
        }
        self.bus_lock_taken = self.controls.bus_lock_detection;
        self.bus_lock_taken
    }

    /// The instruction at RIP is over or given up for good: what was asked for it alone ends.
    pub(crate) fn end_lock_permission(&mut self) {
        self.permitted_lock = None;
        self.step_next = false;
    }
}
