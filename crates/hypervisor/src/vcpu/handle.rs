//! The part of a vCPU that other threads may touch: waking it, stopping it, its counters.
#![expect(unsafe_code, reason = "futex(2), the one way to wake a sleeper that a signal handler may use")]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use silicon::cpu::Requests;

use crate::async_pf::Outcome;
use crate::error::Error;
use crate::irqchip::lapic::Waker;
use crate::stats::VcpuStats;

/// Shared with whoever interrupts or watches a vCPU.
#[derive(Debug)]
pub struct VcpuHandle {
    id: u32,
    requests: Arc<Requests>,
    interrupted: AtomicBool,
    /// Counts the kicks; the futex that a sleeping vCPU waits on.
    kicks: AtomicU32,
    sleeping: AtomicBool,
    /// Pages that have come ([`async_pf`](crate::async_pf)).
    pub(crate) pages: Mutex<Vec<(u64, Outcome)>>,
    /// There are some: asked at each entry.
    pub(crate) pages_came: AtomicBool,
    /// Counters.
    pub stats: VcpuStats,
}

impl VcpuHandle {
    pub(crate) fn new(id: u32, requests: Arc<Requests>) -> io::Result<VcpuHandle> {
        Ok(VcpuHandle {
            id,
            requests,
            interrupted: AtomicBool::new(false),
            kicks: AtomicU32::new(0),
            sleeping: AtomicBool::new(false),
            pages: Mutex::default(),
            pages_came: AtomicBool::new(false),
            stats: VcpuStats::new()?,
        })
    }

    /// KVM_GET_STATS_FD on the vCPU.
    pub fn stats_descriptor(&self) -> Result<OwnedFd, Error> {
        let name = format!("kvm-{}/vcpu-{}", std::process::id(), self.id);
        Ok(self.stats.descriptor(&name)?)
    }

    /// The vCPU's id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Makes KVM_RUN return with [`Error::Interrupted`](crate::Error::Interrupted) as soon as it can, and at
    /// once when it is called, until [`VcpuHandle::settle`]. It may be called in a signal handler.
    pub fn interrupt(&self) {
        self.interrupted.store(true, Ordering::SeqCst);
        self.kick();
    }

    /// KVM_RUN may run again.
    pub fn settle(&self) {
        self.interrupted.store(false, Ordering::SeqCst);
    }

    pub(crate) fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::SeqCst)
    }

    /// Sleeps for `time`, or until KVM_RUN has to return or somebody wants the vCPU's attention.
    pub(crate) fn pause(&self, time: Duration) {
        self.sleeping.store(true, Ordering::SeqCst);
        let seen = self.kicks.load(Ordering::SeqCst);
        if !self.interrupted() {
            futex(&self.kicks, libc::FUTEX_WAIT, seen, Some(time));
        }
        self.sleeping.store(false, Ordering::SeqCst);
    }

    /// Sleeps until `ready` holds or KVM_RUN has to return. `ready` is asked again after every wake-up, and all the time
    /// for the first `poll` nanoseconds (KVM_CAP_HALT_POLL).
    pub(crate) fn sleep_until(&self, poll: u32, mut ready: impl FnMut() -> bool) {
        self.sleeping.store(true, Ordering::SeqCst);
        self.stats.blocking.store(1, Ordering::Relaxed);
        let since = Instant::now();
        let (mut waited, mut polling) = (false, poll != 0);
        loop {
            // A kick posts its request before it counts: what is not seen below changes the count that we wait on.
            let seen = self.kicks.load(Ordering::SeqCst);
            if self.interrupted() || ready() {
                break;
            }
            if polling && !waited {
                self.stats.polls.count();
            }
            waited = true;
            polling &= since.elapsed() < Duration::from_nanos(poll.into());
            if self.requests.take(Requests::KICK) != 0 {
                continue;
            }
            if polling {
                std::hint::spin_loop();
            } else {
                futex(&self.kicks, libc::FUTEX_WAIT, seen, None);
            }
        }
        self.sleeping.store(false, Ordering::SeqCst);
        self.stats.blocking.store(0, Ordering::Relaxed);
        if waited && polling {
            self.stats.successful_polls.count();
        } else if waited {
            self.stats.slept(since.elapsed(), !self.interrupted());
        }
    }
}

/// FUTEX_WAIT while the word holds `value`, at most for `time`, or FUTEX_WAKE of `value` waiters. Returns early for any
/// reason.
fn futex(word: &AtomicU32, operation: i32, value: u32, time: Option<Duration>) {
    let time = time.map(|time| libc::timespec {
        tv_sec: time.as_secs().min(i64::MAX as u64) as libc::time_t,
        tv_nsec: time.subsec_nanos().into(),
    });
    let timeout = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word outlives the call, and the kernel only compares it; the time is on our stack.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), operation | libc::FUTEX_PRIVATE_FLAG, value, timeout);
    }
}

impl Waker for VcpuHandle {
    fn kick(&self) {
        self.requests.post(Requests::KICK);
        self.kicks.fetch_add(1, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) {
            futex(&self.kicks, libc::FUTEX_WAKE, u32::MAX >> 1, None);
        }
    }
}
