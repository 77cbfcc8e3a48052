//! Threads: cancellation of those that run a vCPU, and the engine's own.
#![expect(unsafe_code, reason = "functions of the C library's")]

use std::cell::RefCell;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use hypervisor::VcpuHandle;
use libc::{c_int, c_void, pthread_attr_t, pthread_t};

use crate::raw::SignalSet;
use crate::thread::{self, Inside};
use crate::{interpose, next, process, raw};

/// Which vCPU a thread ran last.
#[derive(Clone, Debug)]
struct Runner {
    thread: pthread_t,
    vcpu: Weak<VcpuHandle>,
}

/// Calls of pthread_cancel that have begun, and those that have been made.
static CANCELLATIONS: AtomicU32 = AtomicU32::new(0);

/// Changes whenever a thread is cancelled.
#[inline]
pub(crate) fn count() -> u32 {
    CANCELLATIONS.load(Ordering::Relaxed)
}

static RUNNERS: AtomicPtr<Mutex<Vec<Runner>>> = AtomicPtr::new(ptr::null_mut());

fn runners() -> MutexGuard<'static, Vec<Runner>> {
    process::leaked(&RUNNERS).lock().unwrap_or_else(PoisonError::into_inner)
}

/// In a forked child: the old list may be locked for ever by a thread that is not there.
pub(crate) fn forget_runners() {
    RUNNERS.store(ptr::null_mut(), Ordering::Release);
}

/// This thread's entry in the list.
struct Noted(Weak<VcpuHandle>);

impl Drop for Noted {
    fn drop(&mut self) {
        let thread = this_thread();
        runners().retain(|runner| runner.thread != thread);
    }
}

thread_local! {
    static NOTED: RefCell<Option<Noted>> = const { RefCell::new(None) };
}

fn this_thread() -> pthread_t {
    // SAFETY: no preconditions.
    unsafe { libc::pthread_self() }
}

/// Notes that this thread is about to run `vcpu`, which costs next to nothing if it did so last time. True if that is
/// news: who cancelled the thread before that did not find it in the list, so it has to look once whether it is to end.
#[inline]
pub(crate) fn note_vcpu(vcpu: &Arc<VcpuHandle>) -> bool {
    // A thread that is ending has no entry any more, and is not cancelled.
    NOTED
        .try_with(|noted| {
            let mut noted = noted.borrow_mut();
            let same = noted.as_ref().is_some_and(|noted| ptr::eq(noted.0.as_ptr(), Arc::as_ptr(vcpu)));
            if !same {
                note_new(&mut noted, vcpu);
            }
            !same
        })
        .unwrap_or(false)
}

#[cold]
fn note_new(noted: &mut Option<Noted>, vcpu: &Arc<VcpuHandle>) {
    let (thread, vcpu) = (this_thread(), Arc::downgrade(vcpu));
    let mut runners = runners();
    runners.retain(|runner| runner.thread != thread);
    runners.push(Runner { thread, vcpu: vcpu.clone() });
    drop(runners);
    match noted {
        Some(noted) => noted.0 = vcpu,
        None => *noted = Some(Noted(vcpu)),
    }
}

/// Makes a thread come out of KVM_RUN. If it is not in there, its next KVM_RUN returns EINTR.
fn interrupt(thread: pthread_t) {
    let vcpu =
        runners().iter().find(|runner| runner.thread == thread).and_then(|runner| runner.vcpu.upgrade());
    if let Some(vcpu) = vcpu {
        vcpu.interrupt();
    }
}

interpose! {
    fn pthread_cancel(thread: pthread_t) -> c_int {
        CANCELLATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the client's argument.
        let result = unsafe { next::pthread_cancel(thread) };
        CANCELLATIONS.fetch_add(1, Ordering::SeqCst);
        if result == 0 && !RUNNERS.load(Ordering::Relaxed).is_null() {
            let inside = Inside::enter();
            interrupt(thread);
            inside.leave();
        }
        result
    }

    // The engine's own threads take no signals: those are for the client's.
    fn pthread_create(
        thread: *mut pthread_t,
        attributes: *const pthread_attr_t,
        start: *mut c_void,
        argument: *mut c_void,
    ) -> c_int {
        let old = thread::is_inside().then(|| raw::change_mask(libc::SIG_BLOCK, SignalSet::MAX));
        // SAFETY: the client's arguments.
        let result = unsafe { next::pthread_create(thread, attributes, start, argument) };
        if let Some(old) = old {
            raw::change_mask(libc::SIG_SETMASK, old);
        }
        result
    }
}
