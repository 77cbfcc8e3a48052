//! Pages of guest memory that are elsewhere: who brings them while the guest does something else (kernel: virt/kvm/async_pf.c), and who
//! finds out that the host has taken some away.
//!
//! A vCPU that meets one ([`Exit::MemoryElsewhere`](silicon::vmx::Exit::MemoryElsewhere)) asks for it here and goes on as
//! [`vcpu`](crate::vcpu)'s `async_pf` says. A worker has it brought by the [`PageSource`], and waits; the [`Outcome`] is told to all vCPUs
//! that have asked.

mod source;

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use silicon::mmu::ept::Ept;

use crate::irqchip::lapic::Waker;
use crate::vcpu::VcpuHandle;

pub(crate) use source::{HostPages, why_absent};
pub use source::{Outcome, PageSource};

/// Workers of a VM: so many pages are waited for at a time. More than a vCPU is told of ([`vcpu`](crate::vcpu)'s 64), so that a page that it is
/// held for does not wait behind those.
const WORKERS: usize = 128;
/// Bytes of a worker's stack.
const STACK: usize = 64 << 10;
/// How often it is looked whether the host has taken pages away; and how often after it has.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A page that is wanted.
#[derive(Debug)]
pub(crate) struct Request {
    /// Its address in the guest-physical map.
    pub(crate) page: u64,
    /// Where the client has it.
    pub(crate) host: u64,
    /// Whom to tell.
    pub(crate) vcpu: Arc<VcpuHandle>,
}

#[derive(Debug, Default)]
struct Queue {
    /// Page and host address.
    waiting: VecDeque<(u64, u64)>,
    /// Whom to tell, of those and of what workers are at.
    wanted: HashMap<u64, Vec<Arc<VcpuHandle>>>,
    /// Pages that are known to be lost.
    failed: HashSet<u64>,
    workers: usize,
    idle: usize,
    watched: bool,
    closed: bool,
}

#[derive(Debug)]
struct Shared {
    ept: Arc<Ept>,
    source: Arc<dyn PageSource>,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Wakes the thread that looks for pages that are gone.
    over: Condvar,
}

/// Brings the pages of one VM. Workers come when there is something to do. One that waits for a page when the VM goes is left
/// to wait: nobody waits for it.
#[derive(Debug)]
pub(crate) struct PageIns(Arc<Shared>);

impl PageIns {
    /// For the memory behind `ept`, whose pages `source` has.
    pub(crate) fn new(ept: Arc<Ept>, source: Arc<dyn PageSource>) -> PageIns {
        let (queue, changed, over) = (Mutex::default(), Condvar::new(), Condvar::new());
        PageIns(Arc::new(Shared { ept, source, queue, changed, over }))
    }

    /// Has a page brought.
    ///
    /// # Errors
    ///
    /// There is no worker, and none can be made.
    pub(crate) fn request(&self, request: Request) -> io::Result<()> {
        let Request { page, host, vcpu } = request;
        let mut queue = self.0.queue();
        if let Some(others) = queue.wanted.get_mut(&page) {
            others.push(vcpu);
            return Ok(());
        }
        if queue.idle <= queue.waiting.len() && queue.workers < WORKERS {
            let shared = self.0.clone();
            let worker = thread::Builder::new().name("page-ins".into()).stack_size(STACK);
            match worker.spawn(move || shared.work()) {
                Ok(_) => queue.workers += 1,
                Err(error) if queue.workers == 0 => return Err(error),
                Err(_) => {}
            }
        }
        queue.wanted.insert(page, vec![vcpu]);
        queue.waiting.push_back((page, host));
        self.0.changed.notify_one();
        Ok(())
    }

    /// Whether the contents of a page are known to be lost.
    pub(crate) fn has_failed(&self, page: u64) -> bool {
        self.0.queue().failed.contains(&page)
    }

    /// Whoever touches the page next has it looked at again: it may have been repaired.
    pub(crate) fn forget_failure(&self, page: u64) {
        self.0.queue().failed.remove(&page);
    }

    /// Looks, from now on, from time to time, whether the host has taken pages away.
    pub(crate) fn watch(&self) {
        let mut queue = self.0.queue();
        if !queue.watched {
            let shared = self.0.clone();
            let thread = thread::Builder::new().name("page-watch".into()).spawn(move || shared.look());
            queue.watched = thread.is_ok();
            if let Err(error) = thread {
                tracing::warn!("nobody looks which pages of the guest's the host takes away: {error}");
            }
        }
    }
}

impl Drop for PageIns {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        queue.closed = true;
        queue.waiting.clear();
        self.0.changed.notify_all();
        self.0.over.notify_all();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while let Some((page, host)) = self.next() {
            let outcome = self.source.bring(page, host);
            if outcome != Outcome::Failed {
                self.ept.mark_present(page);
            }
            let mut queue = self.queue();
            if outcome == Outcome::Failed {
                queue.failed.insert(page);
            } else {
                queue.failed.remove(&page);
            }
            let wanted = queue.wanted.remove(&page);
            drop(queue);
            wanted.into_iter().flatten().for_each(|vcpu| vcpu.page_came(page, outcome));
        }
    }

    /// Waits for the next request; `None`: the VM is gone.
    fn next(&self) -> Option<(u64, u64)> {
        let mut queue = self.queue();
        loop {
            if queue.closed {
                return None;
            }
            if let Some(request) = queue.waiting.pop_front() {
                return Some(request);
            }
            queue.idle += 1;
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }

    fn look(&self) {
        let mut pause = LOOK_EVERY;
        loop {
            let waited = self.over.wait_timeout_while(self.queue(), pause, |queue| !queue.closed);
            if waited.unwrap_or_else(PoisonError::into_inner).0.closed {
                return;
            }
            pause = if self.ept.find_gone() != 0 { LOOK_AGAIN } else { LOOK_EVERY };
        }
    }
}

impl VcpuHandle {
    /// What has become of a page that the vCPU has asked for.
    pub(crate) fn page_came(&self, page: u64, outcome: Outcome) {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner).push((page, outcome));
        self.pages_came.store(true, Ordering::SeqCst);
        self.kick();
    }

    /// Pages that have come since this was last asked.
    pub(crate) fn take_pages(&self) -> Vec<(u64, Outcome)> {
        // Before they are taken: one that comes meanwhile is asked for again.
        self.pages_came.store(false, Ordering::SeqCst);
        std::mem::take(&mut *self.pages.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether there are any.
    pub(crate) fn has_pages(&self) -> bool {
        self.pages_came.load(Ordering::SeqCst)
    }
}
