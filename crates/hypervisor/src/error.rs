//! Errors of the typed calls, each with the errno that KVM gives.

use thiserror::Error;

use silicon::tiles::TileDataError;

use crate::cpuid::CpuidError;
use crate::eventfd::EventFdError;
use crate::irqchip::IrqChipError;

/// Why a call failed.
#[derive(Debug, Error)]
pub enum Error {
    /// A memory slot that KVM_SET_USER_MEMORY_REGION refuses.
    #[error("memory slot {slot}: {why}")]
    MemorySlot {
        /// Slot number as given.
        slot: u32,
        /// What is wrong with it.
        why: &'static str,
        /// Errno that KVM gives for it.
        errno: i32,
    },
    /// The object is there already.
    #[error("{0} exists already")]
    Exists(&'static str),
    /// The call needs an object that has not been created.
    #[error("{0} has not been created")]
    Missing(&'static str),
    /// The call needs something that is not there, and the kernel calls it not found.
    #[error("there is no {0}")]
    NotFound(&'static str),
    /// The call comes too late.
    #[error("busy: {0}")]
    Busy(&'static str),
    /// A table of a fixed size is full.
    #[error("there is no space for more {0}")]
    NoSpace(&'static str),
    /// There is no such device or device type.
    #[error("there is no such device: {0}")]
    NoDevice(&'static str),
    /// An argument is out of range.
    #[error("invalid argument: {0}")]
    Invalid(&'static str),
    /// Too many entries.
    #[error("too many entries: at most {0}")]
    TooMany(usize),
    /// KVM_RUN was interrupted (signal, kick or immediate exit).
    #[error("interrupted")]
    Interrupted,
    /// KVM_RUN has done what there was to do before the guest runs: call it again.
    #[error("try again")]
    Again,
    /// The guest has made a split lock, on a host where it must not (Policy::Efault).
    #[error(
        "split lock at {rip:#x}; the host has split_lock_detect=fatal: fix the guest, let it set bit 29 of MSR_TEST_CTRL, \
         or set another policy (RING3_CAP_SPLIT_LOCK_POLICY)"
    )]
    SplitLock {
        /// The guest's RIP.
        rip: u64,
    },
    /// The processor has lost the guest's registers (a notify VM exit with KVM_NOTIFY_CONTEXT_INVALID).
    #[error(
        "the guest's context is lost: set the registers (KVM_SET_SREGS, KVM_SET_REGS) or give the guest up"
    )]
    ContextLost,
    /// KVM_RUN: the client has no memory behind a slot's page, or none that allows the guest's access. The vCPU can be run
    /// again once it has.
    #[error("there is no memory behind guest-physical address {gpa:#x}: map it and run the vCPU again")]
    MemoryAbsent {
        /// The page.
        gpa: u64,
    },
    /// KVM_RUN: the host says that the memory behind a slot's page has failed. KVM sends the thread SIGBUS with
    /// BUS_MCEERR_AR and the page's address; so must whoever gets this, where a signal is in place.
    #[error(
        "the memory at {host:#x}, behind guest-physical address {gpa:#x}, has failed: map other memory there"
    )]
    MemoryFailed {
        /// The page.
        gpa: u64,
        /// Where the client has it.
        host: u64,
    },
    /// KVM_RUN, KVM_SET_XSAVE: there is no memory for the AMX tiles of the vCPU, which is as it was. RIP is at the guest's
    /// instruction that needs it.
    #[error(
        "{0}: free some and run the vCPU again, or let the guest go on without tiles (#GP for its XSETBV or WRMSR at RIP, by \
         KVM_SET_VCPU_EVENTS)"
    )]
    NoRoom(TileDataError),
    /// The interrupt controllers refuse.
    #[error(transparent)]
    IrqChip(#[from] IrqChipError),
    /// KVM_SET_CPUID2 refuses a table.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// An irqfd or ioeventfd is refused.
    #[error(transparent)]
    EventFd(#[from] EventFdError),
    /// The VM cannot go on, and neither can its calls.
    #[error("the VM is dead: {0}")]
    Dead(&'static str),
    /// The host refused a resource.
    #[error("the host refused: {0}")]
    Host(#[from] std::io::Error),
}

impl Error {
    /// The errno of the KVM API.
    pub fn errno(&self) -> i32 {
        match self {
            Error::MemorySlot { errno, .. } => *errno,
            Error::Exists(_) => libc::EEXIST,
            Error::Missing(_) => libc::ENXIO,
            Error::NotFound(_) => libc::ENOENT,
            Error::Busy(_) => libc::EBUSY,
            Error::NoSpace(_) => libc::ENOSPC,
            Error::NoDevice(_) => libc::ENODEV,
            Error::Invalid(_) => libc::EINVAL,
            Error::TooMany(_) => libc::E2BIG,
            Error::IrqChip(IrqChipError::Exists) => libc::EEXIST,
            Error::IrqChip(IrqChipError::NoDevice) => libc::ENXIO,
            Error::IrqChip(IrqChipError::Invalid | IrqChipError::Routing(_)) => libc::EINVAL,
            Error::EventFd(e) => e.errno(),
            Error::Cpuid(e) => e.errno(),
            Error::NoRoom(_) => libc::ENOMEM,
            Error::MemoryAbsent { .. } => libc::EFAULT,
            // The signal has interrupted it.
            Error::Interrupted | Error::MemoryFailed { .. } => libc::EINTR,
            Error::Again => libc::EAGAIN,
            Error::SplitLock { .. } => libc::EFAULT,
            Error::ContextLost => libc::EIO,
            Error::Dead(_) => libc::EIO,
            Error::Host(e) => e.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}
