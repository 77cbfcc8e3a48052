//! The part of a vCPU that other threads may touch: waking it, stopping it, its counters.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use silicon::cpu::Requests;

use crate::irqchip::lapic::Waker;
use crate::stats::VcpuStats;

/// Shared with whoever interrupts or watches a vCPU.
#[derive(Debug)]
pub struct VcpuHandle {
    id: u32,
    requests: Arc<Requests>,
    immediate_exit: AtomicBool,
    sleeping: Mutex<()>,
    wake: Condvar,
    /// Counters.
    pub stats: VcpuStats,
}

impl VcpuHandle {
    pub(crate) fn new(id: u32, requests: Arc<Requests>) -> VcpuHandle {
        VcpuHandle {
            id,
            requests,
            immediate_exit: AtomicBool::new(false),
            sleeping: Mutex::new(()),
            wake: Condvar::new(),
            stats: VcpuStats::default(),
        }
    }

    /// The vCPU's id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Makes KVM_RUN return with [`Error::Interrupted`](crate::Error::Interrupted) as soon as it can, and at
    /// once when it is called, until this is set to false (`kvm_run.immediate_exit`).
    pub fn set_immediate_exit(&self, on: bool) {
        self.immediate_exit.store(on, Ordering::SeqCst);
        if on {
            self.kick();
        }
    }

    pub(crate) fn immediate_exit(&self) -> bool {
        self.immediate_exit.load(Ordering::SeqCst)
    }

    /// Sleeps until `ready` holds or KVM_RUN has to return. `ready` is asked again after every wake-up.
    pub(crate) fn sleep_until(&self, mut ready: impl FnMut() -> bool) {
        while !self.immediate_exit() && !ready() {
            let guard = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
            // Whoever wakes posts the request first and takes the lock then: either we see the request here or
            // the notification comes while we wait.
            if self.requests.take(Requests::KICK) == 0 {
                drop(self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner));
            }
        }
    }
}

impl Waker for VcpuHandle {
    fn kick(&self) {
        self.requests.post(Requests::KICK);
        drop(self.sleeping.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake.notify_all();
    }
}
