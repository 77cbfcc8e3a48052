//! Pages of guest memory that are elsewhere: who brings them while the guest does something else (kernel: virt/kvm/async_pf.c).
//!
//! A vCPU that meets one ([`Exit::MemoryElsewhere`](silicon::vmx::Exit::MemoryElsewhere)) asks for it here and goes on as
//! [`vcpu`](crate::vcpu)'s `async_pf` says. A worker makes the access in its place, and waits; the result is told to the vCPU.
#![expect(unsafe_code, reason = "touches memory of the client's by address")]

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use silicon::mmu::ept::Ept;
use silicon::mmu::host;

use crate::irqchip::lapic::Waker;
use crate::vcpu::VcpuHandle;

/// Workers of a VM: so many pages are waited for at a time.
const WORKERS: usize = 8;

/// A page that is wanted.
#[derive(Debug)]
pub(crate) struct Request {
    /// Its address in the guest-physical map.
    pub(crate) address: u64,
    /// Where the client has it.
    pub(crate) host: u64,
    /// Whom to tell.
    pub(crate) vcpu: Arc<VcpuHandle>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Request>,
    workers: usize,
    idle: usize,
    closed: bool,
}

#[derive(Debug)]
struct Shared {
    ept: Arc<Ept>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// Brings the pages of one VM. Workers come when there is something to do. One that waits for a page when the VM goes is left
/// to wait: nobody waits for it.
#[derive(Debug)]
pub(crate) struct PageIns(Arc<Shared>);

impl PageIns {
    /// For the memory behind `ept`.
    pub(crate) fn new(ept: Arc<Ept>) -> PageIns {
        PageIns(Arc::new(Shared { ept, queue: Mutex::default(), changed: Condvar::new() }))
    }

    /// Has a page brought.
    ///
    /// # Errors
    ///
    /// There is no worker, and none can be made.
    pub(crate) fn request(&self, request: Request) -> io::Result<()> {
        let mut queue = self.0.queue();
        if queue.idle <= queue.waiting.len() && queue.workers < WORKERS {
            let shared = self.0.clone();
            match thread::Builder::new().name("page-ins".into()).spawn(move || shared.work()) {
                Ok(_) => queue.workers += 1,
                Err(error) if queue.workers == 0 => return Err(error),
                Err(_) => {}
            }
        }
        queue.waiting.push_back(request);
        self.0.changed.notify_one();
        Ok(())
    }
}

impl Drop for PageIns {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        queue.closed = true;
        queue.waiting.clear();
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while let Some(request) = self.next() {
            let mut byte = [0];
            // SAFETY: reading changes nothing. What is no guest memory any more, or was never brought, is an error; the vCPU makes
            // the access itself then, and finds out what is wrong.
            let _ = unsafe { host::read(request.host, &mut byte) };
            self.ept.mark_present(request.address);
            request.vcpu.page_came(request.address);
        }
    }

    /// Waits for the next request; `None`: the VM is gone.
    fn next(&self) -> Option<Request> {
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
}

impl VcpuHandle {
    /// A page that the vCPU has asked for can be accessed.
    fn page_came(&self, address: u64) {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner).push(address);
        self.pages_came.store(true, Ordering::SeqCst);
        self.kick();
    }

    /// Pages that have come since this was last asked.
    pub(crate) fn take_pages(&self) -> Vec<u64> {
        // Before they are taken: one that comes meanwhile is asked for again.
        self.pages_came.store(false, Ordering::SeqCst);
        std::mem::take(&mut *self.pages.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether there are any.
    pub(crate) fn has_pages(&self) -> bool {
        self.pages_came.load(Ordering::SeqCst)
    }
}
