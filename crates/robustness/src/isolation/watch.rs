//! Who is called around stays in host code, and looks at the pages and at the faults.
#![expect(unsafe_code, reason = "is called with a pointer to itself, and plants what it must find")]

use std::ffi::c_void;
use std::io;
use std::ptr;

use hypervisor::VcpuHandle;
use silicon::translate::{Stay, Watcher};

use super::faults::{self, Faults};
use super::mappings::Span;
use super::own::{Buffer, Own};
use super::pages::{Change, Frozen, Pages};

/// Memory of the watcher's own: what it remembers, its stacks. Only what is used is touched.
const OWN: usize = 4 << 30;
/// Its stack, and the one that signals are handled on.
const STACK: usize = 1 << 20;
/// Stays of one guest whose pages are compared at first without exception, how many are passed over then from one to the next, and how
/// many are compared at most; and how many stays a guest has at most.
const FIRST: u64 = 16;
const EVERY: u64 = 32;
const COMPARED: u64 = 48;
const STAYS: u64 = 4000;
/// Microseconds until the alarm: while host code runs, and while it does not.
const WITHIN: i64 = 2_000;
const BETWEEN: i64 = 8_000;

/// Something to be found: what the watcher does itself right after it has remembered the pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plant {
    /// The byte that is changed.
    pub(super) at: u64,
    /// It is in a page that cannot be written.
    pub(super) frozen: bool,
}

/// What has been found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Finding {
    /// Memory outside the VM has changed.
    #[error("stay {stay}, at {code:#x}: {change}")]
    Changed {
        /// Which of the guest's stays it was.
        stay: u64,
        /// Host code began there.
        code: u64,
        /// What has changed.
        change: Change,
    },
    /// A page that cannot be written has changed.
    #[error("a page that cannot be written: {0}")]
    Frozen(Change),
    /// Host code has tried to access other memory than the guest's.
    #[error("stay {stay}: access to {address:#x}: {fault}")]
    Stray {
        /// Which of the guest's stays it was.
        stay: u64,
        /// Host address.
        address: u64,
        /// What the kernel has said.
        fault: String,
    },
}

/// Counts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Watched {
    /// Stays in host code.
    pub stays: u64,
    /// Those around which pages were compared.
    pub compared: u64,
    /// Pages compared around stays.
    pub pages: u64,
    /// Pages compared that cannot be written.
    pub frozen: u64,
    /// Faults in host code that were looked at.
    pub faults: u64,
}

/// The watcher. It lies in its own memory.
#[derive(Debug)]
pub(super) struct Watch {
    own: Span,
    stack: *mut u8,
    pages: Pages,
    frozen: Frozen,
    faults: Faults,
    /// What the guest may write, and what others may write to reach the vCPU.
    may_change: Buffer<Span>,
    /// Guest memory.
    guest: Buffer<Span>,
    handle: *const VcpuHandle,
    comparing: bool,
    /// Of this guest.
    stays: u64,
    compared: u64,
    total: Watched,
    plant: Option<Plant>,
    finding: Option<Finding>,
}

impl Watch {
    /// The watcher of this process, for good; it handles signals on the running thread. After this, nothing may be loaded.
    pub(super) fn new() -> io::Result<&'static mut Watch> {
        let mut own = Own::new(OWN)?;
        let place: *mut Watch = own.take(size_of::<Watch>()).cast();
        let stack = own.take(STACK).wrapping_add(STACK);
        let signals = own.take(STACK);
        let watch = Watch {
            own: own.range().into(),
            stack,
            pages: Pages::new(&mut own)?,
            faults: Faults::new(&mut own),
            may_change: Buffer::new(&mut own, 64),
            guest: Buffer::new(&mut own, 64),
            frozen: Frozen::new(&mut own)?,
            handle: ptr::null(),
            comparing: false,
            stays: 0,
            compared: 0,
            total: Watched::default(),
            plant: None,
            finding: None,
        };
        // SAFETY: room of this size, aligned to a page, which is never given back; a stack that nobody else knows.
        unsafe {
            place.write(watch);
            faults::set_signal_stack(signals, STACK);
            faults::tell(&raw mut (*place).faults);
            Ok(&mut *place)
        }
    }

    /// Another guest begins: its memory, what of that it may write, and whom to interrupt. The handle lives until
    /// [`Watch::end`].
    pub(super) fn begin(&mut self, guest: &[Span], may_change: &[Span], handle: &VcpuHandle) {
        self.guest.clear();
        guest.iter().for_each(|&span| self.guest.push(span));
        self.may_change.clear();
        may_change.iter().for_each(|&span| self.may_change.push(span));
        (self.stays, self.compared, self.plant) = (0, 0, None);
        self.handle = handle;
        // SAFETY: until `end`.
        unsafe { faults::alarm_for(Some(handle)) };
        faults::set_alarm(BETWEEN);
    }

    /// What is planted at the guest's first stay; in a page that cannot be written, at once.
    pub(super) fn plant(&mut self, plant: Plant) {
        if plant.frozen { plant.grow() } else { self.plant = Some(plant) }
    }

    /// The guest has ended; what was found.
    pub(super) fn end(&mut self) -> Option<Finding> {
        // SAFETY: nobody is interrupted any more.
        unsafe { faults::alarm_for(None) };
        self.handle = ptr::null();
        self.finding.take().or_else(|| self.frozen.compare().map(Finding::Frozen))
    }

    /// Whether the guest has had enough stays, or something was found.
    pub(super) fn is_done(&self) -> bool {
        self.finding.is_some() || self.compared >= COMPARED || self.stays >= STAYS
    }

    /// The alarm rings if the guest does not come to host code.
    pub(super) fn wind(&self) {
        faults::set_alarm(BETWEEN);
    }

    /// Stays of this guest.
    pub(super) fn stays(&self) -> u64 {
        self.stays
    }

    pub(super) fn totals(&self) -> Watched {
        let (pages, frozen, faults) = (self.pages.compared, self.frozen.compared, self.faults.count);
        Watched { pages, frozen, faults, ..self.total }
    }

    /// For the vCPU.
    pub(super) fn watcher(&mut self) -> Watcher {
        Watcher { before, after, context: ptr::from_mut(self).cast(), stack: self.stack }
    }

    /// Everything that may change in a stay: see docs/robustness.md.
    fn before(&mut self, stay: &Stay) {
        self.stays += 1;
        self.comparing = self.stays <= FIRST || self.stays.is_multiple_of(EVERY);
        if self.comparing {
            let writes = stay.writes().iter().map(|written| Span::from(written.range.clone()));
            let others = [self.own, stay.stack().into()];
            self.pages.remember(writes.chain(others).chain(self.may_change.iter().copied()));
        }
        self.faults.listen();
        if let Some(plant) = self.plant.take() {
            plant.grow();
        }
        faults::set_alarm(WITHIN);
    }

    fn after(&mut self, stay: &Stay) {
        faults::set_alarm(0);
        let (number, code) = (self.stays, stay.code());
        if self.comparing {
            self.compared += 1;
            self.total.compared += 1;
            let change = self.pages.compare();
            let changed = change.map(|change| Finding::Changed { stay: number, code, change });
            self.finding = self.finding.take().or(changed);
        }
        let stray = self.faults.strays(&self.guest);
        let stray =
            stray.map(|(fault, address)| Finding::Stray { stay: number, address, fault: fault.describe() });
        self.finding = self.finding.take().or(stray);
        self.total.stays += 1;
        if let Some(finding) = &self.finding {
            // The process may not live to say it otherwise.
            eprintln!("{finding}");
        }
        // SAFETY: `begin` has been told that it lives.
        if let Some(handle) = unsafe { self.handle.as_ref() }.filter(|_| self.is_done()) {
            handle.interrupt();
        }
        faults::set_alarm(BETWEEN);
    }
}

impl Plant {
    fn grow(self) {
        let page = (self.at & !4095) as *mut c_void;
        let protect = |protection| {
            if self.frozen {
                // SAFETY: a page of constants, which stay what they are but for one that is there for this.
                unsafe { libc::mprotect(page, 4096, protection) };
            }
        };
        protect(libc::PROT_READ | libc::PROT_WRITE);
        let at = self.at as *mut u8;
        // SAFETY: whoever plants knows that nothing depends on the byte.
        unsafe { at.write_volatile(at.read_volatile() ^ 0x55) };
        protect(libc::PROT_READ);
    }
}

extern "C" fn before(context: *mut c_void, stay: &Stay) {
    // SAFETY: `Watch::watcher` has made the context of itself; meanwhile nobody else runs.
    unsafe { (*context.cast::<Watch>()).before(stay) }
}

extern "C" fn after(context: *mut c_void, stay: &Stay) {
    // SAFETY: as above.
    unsafe { (*context.cast::<Watch>()).after(stay) }
}
