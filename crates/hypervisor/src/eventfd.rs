//! irqfd and ioeventfd: interrupts from, and guest writes to, event descriptors (KVM's `eventfd.c`).
//!
//! [`IrqFds`] has one worker thread that waits for all of a VM's irqfds. [`IoEventFds`] is a table that is asked at
//! every port or MMIO write.
//!
//! Locks: the tables of irqfds and resamplers come first of all the VM's interrupt locks, then an irqfd's own, which is
//! held while the line is driven, so that no interrupt comes after a deassignment has returned. The resample
//! descriptors' and the ioeventfds' are leaves.

#![expect(
    unsafe_code,
    reason = "borrowing descriptors that userspace names by number, and a read that never blocks"
)]

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::thread::{self, JoinHandle};

use kvm_bindings::{
    KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_max, kvm_ioeventfd_flag_nr_pio,
    kvm_ioeventfd_flag_nr_virtio_ccw_notify, kvm_irqfd,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::irqchip::{IrqChip, IrqSource};
use crate::routing::LineListener;

/// Why a request about an event descriptor is refused.
#[derive(Debug, thiserror::Error)]
pub enum EventFdError {
    /// The number is no open descriptor: EBADF.
    #[error("{0} is no open descriptor")]
    NoDescriptor(RawFd),
    /// Not an eventfd, or arguments that make no sense: EINVAL.
    #[error("the request is not valid")]
    Invalid,
    /// The descriptor is another irqfd already: EBUSY.
    #[error("the descriptor is in use for another interrupt")]
    Busy,
    /// There is such an ioeventfd already: EEXIST.
    #[error("there is such an ioeventfd already")]
    Exists,
    /// There is no such ioeventfd: ENOENT.
    #[error("there is no such ioeventfd")]
    NotFound,
    /// The host refuses.
    #[error(transparent)]
    Host(#[from] io::Error),
}

impl EventFdError {
    /// The error number that KVM gives.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoDescriptor(_) => libc::EBADF,
            Self::Invalid => libc::EINVAL,
            Self::Busy => libc::EBUSY,
            Self::Exists => libc::EEXIST,
            Self::NotFound => libc::ENOENT,
            Self::Host(error) => error.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// An eventfd of userspace: our own descriptor of it, and what tells it from others whatever its number.
#[derive(Debug)]
struct Event {
    file: File,
    identity: u64,
}

impl Event {
    fn new(descriptor: RawFd) -> Result<Self, EventFdError> {
        let identity = identity(descriptor)?;
        // SAFETY: the borrow ends in this statement, and the descriptor was open a moment ago. Should userspace close
        // it meanwhile, or put another in its place, the duplicate fails or is of that other, as with the kernel.
        let owned = unsafe { BorrowedFd::borrow_raw(descriptor) }.try_clone_to_owned()?;
        Ok(Self { file: File::from(owned), identity })
    }

    fn signal(&self) {
        if let Err(error) = (&self.file).write_all(&1u64.to_ne_bytes()) {
            tracing::warn!(%error, "cannot signal an event descriptor");
        }
    }

    /// Takes what has been signalled, without waiting even if the descriptor is a blocking one.
    fn take(&self) {
        let mut count = 0u64;
        let place = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: size_of::<u64>() };
        let descriptor = self.file.as_raw_fd();
        // SAFETY: `place` describes the eight bytes of `count`, which outlive the call.
        let result = unsafe { libc::preadv2(descriptor, &raw const place, 1, -1, libc::RWF_NOWAIT) };
        if result < 0 && io::Error::last_os_error().kind() != io::ErrorKind::WouldBlock {
            // A kernel without this kind of read. The descriptor was readable a moment ago, so this one returns,
            // unless userspace reads its own irqfd; any error leaves the signal for the next round.
            let _ = (&self.file).read_exact(&mut [0; 8]);
        }
    }
}

/// The kernel's number of an eventfd; duplicates of a descriptor have the same.
fn identity(descriptor: RawFd) -> Result<u64, EventFdError> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}"))
        .map_err(|_| EventFdError::NoDescriptor(descriptor))?;
    let field = info.lines().find_map(|line| line.strip_prefix("eventfd-id:"));
    field.and_then(|value| value.trim().parse().ok()).ok_or(EventFdError::Invalid)
}

/// Checks that `descriptor` is an open eventfd.
pub(crate) fn check_eventfd(descriptor: RawFd) -> Result<(), EventFdError> {
    identity(descriptor).map(|_| ())
}

// ---- irqfd

/// An eventfd that raises a GSI.
struct IrqFd {
    event: Event,
    gsi: u32,
    /// With a resample descriptor the line stays high until the guest ends the interrupt.
    resampler: Option<Arc<Resampler>>,
    /// False once deassigned. Locked while the line is driven.
    active: Mutex<bool>,
}

/// The resample descriptors of one GSI, which share a line source.
struct Resampler {
    chip: Weak<IrqChip>,
    gsi: u32,
    events: Mutex<Vec<Arc<Event>>>,
}

impl Resampler {
    fn events(&self) -> MutexGuard<'_, Vec<Arc<Event>>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LineListener for Resampler {
    /// The line goes low once, then every device is told: those that still want attention raise it again.
    fn acknowledged(&self, gsi: u32) {
        if let Some(chip) = self.chip.upgrade() {
            chip.set_irq(IrqSource::RESAMPLE, gsi, false);
        }
        self.resample(gsi);
    }

    fn resample(&self, _gsi: u32) -> bool {
        let events = self.events();
        events.iter().for_each(|event| event.signal());
        !events.is_empty()
    }
}

/// The irqfds of one VM. Dropping it ends the worker and all irqfds.
pub struct IrqFds {
    chip: Weak<IrqChip>,
    shared: Arc<Shared>,
    resamplers: Mutex<Vec<Assigned>>,
    worker: Option<JoinHandle<()>>,
    /// Closed to end the worker. Not an eventfd: its number is one of the client's descriptors, too, and a client that
    /// names it as an irqfd would have the signal taken from us; a hang-up nobody can take.
    alive: Option<PipeWriter>,
}

/// A resampler and the resample descriptors by the irqfd that brought them.
struct Assigned {
    resampler: Arc<Resampler>,
    brought: Vec<(u64, Arc<Event>)>,
}

struct Shared {
    epoll: Epoll,
    irqfds: Mutex<HashMap<u64, Arc<IrqFd>>>,
    /// Hangs up when the owner goes.
    _owner: PipeReader,
    stopping: AtomicBool,
}

/// The token of the owner's pipe; eventfd identities are 31 bits wide.
const STOP: u64 = u64::MAX;

impl std::fmt::Debug for IrqFds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IrqFds").finish_non_exhaustive()
    }
}

impl IrqFds {
    /// Starts the worker for the irqfds of `chip`.
    pub fn new(chip: &Arc<IrqChip>) -> Result<Self, EventFdError> {
        let (owner, alive) = io::pipe()?;
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, owner.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
        let shared = Arc::new(Shared {
            epoll,
            irqfds: Mutex::default(),
            _owner: owner,
            stopping: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        let chip = Arc::downgrade(chip);
        let target = Weak::clone(&chip);
        let worker = thread::Builder::new().name("irqfd".into()).spawn(move || serving.serve(&target))?;
        Ok(Self { chip, shared, resamplers: Mutex::default(), worker: Some(worker), alive: Some(alive) })
    }

    /// KVM_IRQFD: assigns or deassigns, by the flags.
    pub fn request(&self, request: &kvm_irqfd) -> Result<(), EventFdError> {
        if request.flags & !(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE) != 0 {
            return Err(EventFdError::Invalid);
        }
        let descriptor = request.fd as RawFd;
        if request.flags & KVM_IRQFD_FLAG_DEASSIGN != 0 {
            return self.deassign(descriptor, request.gsi);
        }
        let resample = request.flags & KVM_IRQFD_FLAG_RESAMPLE != 0;
        self.assign(descriptor, request.gsi, resample.then_some(request.resamplefd as RawFd))
    }

    /// Makes every signal of `descriptor` an interrupt of `gsi`. With `resample` the line goes high at a signal, and
    /// low when the guest ends the interrupt, of which that descriptor is told.
    pub fn assign(&self, descriptor: RawFd, gsi: u32, resample: Option<RawFd>) -> Result<(), EventFdError> {
        let chip = self.chip.upgrade().ok_or(EventFdError::Invalid)?;
        if resample.is_some() && chip.is_split() {
            return Err(EventFdError::Invalid);
        }
        let event = Event::new(descriptor)?;
        let resample = resample.map(Event::new).transpose()?;
        let identity = event.identity;
        let mut irqfds = self.shared.irqfds();
        if irqfds.contains_key(&identity) {
            return Err(EventFdError::Busy);
        }
        let number = event.file.as_raw_fd();
        let resampler = resample.map(|resample| self.add_resampler(&chip, identity, gsi, resample));
        irqfds.insert(identity, Arc::new(IrqFd { event, gsi, resampler, active: Mutex::new(true) }));
        // What was signalled before counts: the descriptor is readable at once.
        let added =
            self.shared.epoll.ctl(ControlOperation::Add, number, EpollEvent::new(EventSet::IN, identity));
        if let Err(error) = added {
            let irqfd = irqfds.remove(&identity);
            drop(irqfds);
            irqfd.iter().for_each(|irqfd| self.remove_resampler(&chip, irqfd));
            return Err(error.into());
        }
        Ok(())
    }

    /// Undoes an assignment. No interrupt comes of it once this has returned. It is no error if there was none.
    pub fn deassign(&self, descriptor: RawFd, gsi: u32) -> Result<(), EventFdError> {
        let identity = identity(descriptor)?;
        let irqfd = {
            let mut irqfds = self.shared.irqfds();
            if irqfds.get(&identity).is_none_or(|irqfd| irqfd.gsi != gsi) {
                return Ok(());
            }
            irqfds.remove(&identity)
        };
        irqfd.iter().for_each(|irqfd| self.shut_down(irqfd));
        Ok(())
    }

    fn shut_down(&self, irqfd: &IrqFd) {
        let number = irqfd.event.file.as_raw_fd();
        if let Err(error) = self.shared.epoll.ctl(ControlOperation::Delete, number, EpollEvent::default()) {
            tracing::warn!(%error, "cannot stop waiting for an irqfd");
        }
        *irqfd.active.lock().unwrap_or_else(PoisonError::into_inner) = false;
        if let Some(chip) = self.chip.upgrade() {
            self.remove_resampler(&chip, irqfd);
        }
    }

    fn add_resampler(&self, chip: &Arc<IrqChip>, by: u64, gsi: u32, event: Event) -> Arc<Resampler> {
        let event = Arc::new(event);
        let mut resamplers = self.resamplers.lock().unwrap_or_else(PoisonError::into_inner);
        let known = resamplers.iter_mut().find(|known| known.resampler.gsi == gsi);
        if let Some(known) = known {
            known.resampler.events().push(Arc::clone(&event));
            known.brought.push((by, event));
            return Arc::clone(&known.resampler);
        }
        let events = Mutex::new(vec![Arc::clone(&event)]);
        let resampler = Arc::new(Resampler { chip: Arc::downgrade(chip), gsi, events });
        chip.listen(gsi, Arc::clone(&resampler) as Arc<dyn LineListener>);
        resamplers.push(Assigned { resampler: Arc::clone(&resampler), brought: vec![(by, event)] });
        resampler
    }

    /// The last one of a GSI takes the line down.
    fn remove_resampler(&self, chip: &IrqChip, irqfd: &IrqFd) {
        let Some(resampler) = &irqfd.resampler else { return };
        let mut resamplers = self.resamplers.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = resamplers.iter().position(|known| Arc::ptr_eq(&known.resampler, resampler)) else {
            return;
        };
        let known = &mut resamplers[index];
        known.brought.retain(|(by, _)| *by != irqfd.event.identity);
        let left: Vec<_> = known.brought.iter().map(|(_, event)| Arc::clone(event)).collect();
        let last = left.is_empty();
        *resampler.events() = left;
        if last {
            resamplers.remove(index);
            drop(resamplers);
            chip.unlisten(resampler.gsi, &(Arc::clone(resampler) as Arc<dyn LineListener>));
            chip.set_irq(IrqSource::RESAMPLE, resampler.gsi, false);
        }
    }
}

impl Drop for IrqFds {
    fn drop(&mut self) {
        let Some(worker) = self.worker.take() else { return };
        self.shared.stopping.store(true, Ordering::SeqCst);
        drop(self.alive.take());
        // The worker may have held the last reference to the VM, and so to us.
        if worker.thread().id() != thread::current().id() && worker.join().is_err() {
            tracing::error!("the irqfd worker has panicked");
        }
        let irqfds: Vec<_> = self.shared.irqfds().drain().map(|(_, irqfd)| irqfd).collect();
        irqfds.iter().for_each(|irqfd| self.shut_down(irqfd));
    }
}

impl Shared {
    fn irqfds(&self) -> MutexGuard<'_, HashMap<u64, Arc<IrqFd>>> {
        self.irqfds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, chip: &Weak<IrqChip>) {
        let mut events = [EpollEvent::default(); 16];
        while !self.stopping.load(Ordering::SeqCst) {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "the irqfd worker cannot wait");
                    return;
                }
            };
            let Some(chip) = chip.upgrade() else { return };
            for event in events.iter().take(count).filter(|event| event.data() != STOP) {
                let irqfd = self.irqfds().get(&event.data()).cloned();
                irqfd.iter().for_each(|irqfd| irqfd.raise(&chip));
            }
        }
    }
}

impl IrqFd {
    fn raise(&self, chip: &IrqChip) {
        let active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        if !*active {
            return;
        }
        self.event.take();
        if self.resampler.is_some() {
            chip.set_irq(IrqSource::RESAMPLE, self.gsi, true);
        } else {
            chip.set_irq(IrqSource::USERSPACE, self.gsi, true);
            chip.set_irq(IrqSource::USERSPACE, self.gsi, false);
        }
    }
}

// ---- ioeventfd

const FLAG_DATAMATCH: u32 = 1 << kvm_ioeventfd_flag_nr_datamatch;
const FLAG_PIO: u32 = 1 << kvm_ioeventfd_flag_nr_pio;
const FLAG_DEASSIGN: u32 = 1 << kvm_ioeventfd_flag_nr_deassign;
const FLAG_VIRTIO_CCW: u32 = 1 << kvm_ioeventfd_flag_nr_virtio_ccw_notify;
const FLAGS: u32 = (1 << kvm_ioeventfd_flag_nr_max) - 1;

/// Where the write is that an ioeventfd waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoSpace {
    /// Ports.
    Pio,
    /// Guest-physical memory.
    Mmio,
    /// s390's virtio notifications, which this machine never sends.
    VirtioCcw,
}

/// An eventfd that is signalled by a write of the guest.
#[derive(Debug)]
struct IoEventFd {
    event: Event,
    /// The width of the write; zero for any.
    length: u32,
    /// The value of the write; `None` for any.
    value: Option<u64>,
}

impl IoEventFd {
    /// Whether one and the same write could signal both.
    fn collides(&self, length: u32, value: Option<u64>) -> bool {
        let any_value = self.value.is_none() || value.is_none() || self.value == value;
        self.length == 0 || length == 0 || (self.length == length && any_value)
    }

    fn matches(&self, data: &[u8]) -> bool {
        if self.length == 0 {
            return true;
        }
        self.length as usize == data.len() && self.value.is_none_or(|value| value == zero_extended(data))
    }
}

/// The little-endian value of at most eight bytes.
fn zero_extended(data: &[u8]) -> u64 {
    data.iter().take(8).rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// The ioeventfds of one VM.
#[derive(Debug, Default)]
pub struct IoEventFds {
    table: RwLock<HashMap<(IoSpace, u64), Vec<IoEventFd>>>,
    count: AtomicUsize,
}

impl IoEventFds {
    /// KVM_IOEVENTFD: assigns or deassigns, by the flags.
    pub fn request(&self, request: &kvm_ioeventfd) -> Result<(), EventFdError> {
        let space = match request.flags {
            flags if flags & FLAG_PIO != 0 => IoSpace::Pio,
            flags if flags & FLAG_VIRTIO_CCW != 0 => IoSpace::VirtioCcw,
            _ => IoSpace::Mmio,
        };
        let value = (request.flags & FLAG_DATAMATCH != 0).then_some(request.datamatch);
        if request.flags & FLAG_DEASSIGN != 0 {
            return self.deassign(space, request.addr, request.len, value, request.fd);
        }
        if request.flags & !FLAGS != 0 || space == IoSpace::VirtioCcw {
            return Err(EventFdError::Invalid);
        }
        self.assign(space, request.addr, request.len, value, request.fd)
    }

    /// Signals `descriptor` at every write of `length` bytes to `address`, with `value` if it is given.
    pub fn assign(
        &self,
        space: IoSpace,
        address: u64,
        length: u32,
        value: Option<u64>,
        descriptor: RawFd,
    ) -> Result<(), EventFdError> {
        let sensible = matches!(length, 0 | 1 | 2 | 4 | 8)
            && address.checked_add(u64::from(length)).is_some()
            && !(length == 0 && value.is_some());
        if !sensible {
            return Err(EventFdError::Invalid);
        }
        let event = Event::new(descriptor)?;
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let entries = table.entry((space, address)).or_default();
        if entries.iter().any(|entry| entry.collides(length, value)) {
            return Err(EventFdError::Exists);
        }
        entries.push(IoEventFd { event, length, value });
        self.count.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Undoes an assignment, which must have been made with the same arguments.
    pub fn deassign(
        &self,
        space: IoSpace,
        address: u64,
        length: u32,
        value: Option<u64>,
        descriptor: RawFd,
    ) -> Result<(), EventFdError> {
        let identity = identity(descriptor)?;
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let entries = table.get_mut(&(space, address)).ok_or(EventFdError::NotFound)?;
        let same = |entry: &IoEventFd| {
            entry.event.identity == identity && entry.length == length && entry.value == value
        };
        let index = entries.iter().position(same).ok_or(EventFdError::NotFound)?;
        entries.remove(index);
        if entries.is_empty() {
            table.remove(&(space, address));
        }
        self.count.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    /// A write of the guest. True if a descriptor was signalled: the write is then done with.
    pub fn signal(&self, space: IoSpace, address: u64, data: &[u8]) -> bool {
        if self.count.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let entry =
            table.get(&(space, address)).and_then(|entries| entries.iter().find(|entry| entry.matches(data)));
        if let Some(entry) = entry {
            entry.event.signal();
        }
        entry.is_some()
    }
}

#[cfg(test)]
mod tests;
