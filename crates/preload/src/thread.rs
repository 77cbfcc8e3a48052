//! What this thread is doing in the engine, in a form that a signal handler on it can ask.
#![expect(unsafe_code, reason = "pthread_setcancelstate, and the vCPU that a thread runs by pointer")]

use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, compiler_fence};

use abi::VcpuObject;
use libc::c_int;

use crate::cancel;
use crate::raw::{self, SignalSet};

/// PTHREAD_CANCEL_DISABLE.
const CANCEL_DISABLE: c_int = 1;
/// PTHREAD_CANCEL_DEFERRED.
const CANCEL_DEFERRED: c_int = 0;

unsafe extern "C-unwind" {
    // Ends the thread, by unwinding, if it allows a cancellation that is due.
    fn pthread_setcancelstate(state: c_int, old: *mut c_int) -> c_int;
    // The same.
    fn pthread_setcanceltype(kind: c_int, old: *mut c_int) -> c_int;
}

/// Written by the thread itself and read by its signal handlers; atomic only so that both may.
struct State {
    /// How many of our calls it is inside of.
    depth: AtomicU32,
    /// The vCPU that it runs.
    running: AtomicPtr<VcpuObject>,
    /// Signals that came while it was inside. They are blocked, and pending again.
    deferred: AtomicU64,
}

thread_local! {
    // No destructor and a constant value: it is there whenever a handler asks, and nothing is allocated for it.
    static STATE: State = const {
        State { depth: AtomicU32::new(0), running: AtomicPtr::new(ptr::null_mut()), deferred: AtomicU64::new(0) }
    };
}

/// Whether this thread is inside.
pub(crate) fn is_inside() -> bool {
    STATE.with(|state| state.depth.load(Ordering::Relaxed) != 0)
}

/// Called by a signal handler: `signal` will come again once the thread is outside. Makes KVM_RUN return.
pub(crate) fn defer(signal: c_int) {
    STATE.with(|state| {
        state.deferred.fetch_or(raw::only(signal), Ordering::Relaxed);
        // SAFETY: the vCPU is there for as long as the pointer is (`Running`), and this thread is the one that
        // takes it away.
        if let Some(vcpu) = unsafe { state.running.load(Ordering::Relaxed).as_ref() } {
            vcpu.interrupt();
        }
    });
}

/// The thread is inside while this exists.
pub(crate) struct Inside {
    cancel_state: c_int,
    /// How many threads had been cancelled when this one entered.
    cancellations: u32,
    /// It belongs to one thread.
    _not_send: PhantomData<*const ()>,
}

impl Inside {
    /// From here on the client's handlers wait, and so does cancellation.
    #[inline]
    pub(crate) fn enter() -> Inside {
        STATE.with(|state| {
            let depth = state.depth.load(Ordering::Relaxed);
            state.depth.store(depth + 1, Ordering::Relaxed);
        });
        compiler_fence(Ordering::SeqCst);
        let cancellations = cancel::count();
        let mut cancel_state = 0;
        // SAFETY: the old state goes to our stack.
        unsafe { pthread_setcancelstate(CANCEL_DISABLE, &raw mut cancel_state) };
        Inside { cancel_state, cancellations, _not_send: PhantomData }
    }

    /// Signals that have come since the thread entered.
    pub(crate) fn deferred(&self) -> bool {
        compiler_fence(Ordering::SeqCst);
        STATE.with(|state| state.deferred.load(Ordering::Relaxed)) != 0
    }

    /// Lets handlers run that waited, and then an asynchronous cancellation. Either may not come back, so the caller
    /// must have nothing left to clean up.
    #[inline]
    pub(crate) fn leave(self) {
        let deferred: SignalSet = STATE.with(|state| {
            compiler_fence(Ordering::SeqCst);
            let depth = state.depth.load(Ordering::Relaxed) - 1;
            state.depth.store(depth, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
            if depth == 0 && state.deferred.load(Ordering::Relaxed) != 0 {
                state.deferred.swap(0, Ordering::Relaxed)
            } else {
                0
            }
        });
        if deferred != 0 {
            raw::change_mask(libc::SIG_UNBLOCK, deferred);
        }
        if cancel::count() == self.cancellations {
            // SAFETY: gives back the state that `enter` found.
            unsafe { pthread_setcancelstate(self.cancel_state, ptr::null_mut()) };
        } else {
            self.end_if_cancelled();
        }
    }

    /// Gives back the state that `enter` found; an asynchronous cancellation takes effect.
    #[cold]
    fn end_if_cancelled(&self) {
        let mut kind = 0;
        // SAFETY: old values go to our stack. The last call is the one that ends the thread: glibc up to 2.40
        // forgets the result of a thread that ends in pthread_setcancelstate.
        unsafe {
            pthread_setcanceltype(CANCEL_DEFERRED, &raw mut kind);
            pthread_setcancelstate(self.cancel_state, ptr::null_mut());
            pthread_setcanceltype(kind, ptr::null_mut());
        }
    }
}

/// This thread is in KVM_RUN while this exists.
pub(crate) struct Running<'a>(PhantomData<&'a VcpuObject>);

impl<'a> Running<'a> {
    /// From here on a signal interrupts `vcpu`.
    #[inline]
    pub(crate) fn begin(vcpu: &'a VcpuObject) -> Running<'a> {
        STATE.with(|state| state.running.store(ptr::from_ref(vcpu).cast_mut(), Ordering::Relaxed));
        compiler_fence(Ordering::SeqCst);
        Running(PhantomData)
    }
}

impl Drop for Running<'_> {
    #[inline]
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        STATE.with(|state| state.running.store(ptr::null_mut(), Ordering::Relaxed));
        compiler_fence(Ordering::SeqCst);
    }
}
