//! What this thread is doing in the engine, in a form that a signal handler on it can ask.
#![expect(unsafe_code, reason = "pthread_setcancelstate, and the vCPU that a thread runs by pointer")]

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, compiler_fence};

use abi::VcpuObject;
use libc::{c_int, siginfo_t};

use crate::raw::{self, SignalSet};
use crate::{cancel, signal};

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
    /// Those of [`FAULTS`] that came while it was inside, and were no faults. They are not blocked, for the engine may
    /// fault any time, but kept here.
    kept: AtomicU64,
    /// What was said of the kept ones.
    told: [UnsafeCell<MaybeUninit<siginfo_t>>; 2],
    /// Those of [`FAULTS`] that the thread has blocked, and are unblocked only while it is inside.
    opened: AtomicU64,
    /// The thread is known to block none of [`FAULTS`].
    open: AtomicBool,
}

/// The signals of accesses to memory that is not there. A thread that is inside must not block them: the engine recovers
/// from those that are a guest's.
pub(crate) const FAULTS: SignalSet = 1 << (libc::SIGSEGV - 1) | 1 << (libc::SIGBUS - 1);

/// Which of `told` is a signal's.
fn place(signal: c_int) -> usize {
    usize::from(signal == libc::SIGBUS)
}

thread_local! {
    // No destructor and a constant value: it is there whenever a handler asks, and nothing is allocated for it.
    static STATE: State = const {
        State {
            depth: AtomicU32::new(0),
            running: AtomicPtr::new(ptr::null_mut()),
            deferred: AtomicU64::new(0),
            kept: AtomicU64::new(0),
            told: [const { UnsafeCell::new(MaybeUninit::uninit()) }; 2],
            opened: AtomicU64::new(0),
            open: AtomicBool::new(false),
        }
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
        state.interrupt();
    });
}

impl State {
    /// Makes KVM_RUN return.
    fn interrupt(&self) {
        // SAFETY: the vCPU is there for as long as the pointer is (`Running`), and this thread is the one that
        // takes it away.
        if let Some(vcpu) = unsafe { self.running.load(Ordering::Relaxed).as_ref() } {
            vcpu.interrupt();
        }
    }
}

/// One of [`FAULTS`] is sent again, with `info`, once the thread is outside. Makes KVM_RUN return, unless the thread has
/// the signal blocked.
///
/// # Safety
///
/// `info` points to a siginfo.
pub(crate) unsafe fn keep(signal: c_int, info: *const siginfo_t) {
    STATE.with(|state| {
        let set = raw::only(signal);
        if state.kept.load(Ordering::Relaxed) & set == 0 {
            // SAFETY: the place is this thread's, and filled only while the signal is not kept; signals of one number do
            // not interrupt each other's handlers. The kernel's structure may be copied.
            unsafe { ptr::copy_nonoverlapping(info, (*state.told[place(signal)].get()).as_mut_ptr(), 1) };
            compiler_fence(Ordering::SeqCst);
            state.kept.fetch_or(set, Ordering::Relaxed);
        }
        if state.opened.load(Ordering::Relaxed) & set == 0 {
            state.interrupt();
        }
    });
}

/// The thread's signal mask may be another than it was.
pub(crate) fn mask_changed() {
    STATE.with(|state| state.open.store(false, Ordering::Relaxed));
}

/// [`FAULTS`] are not blocked while this exists, which is only while the thread is inside.
pub(crate) struct Open {
    /// What the thread had blocked.
    blocked: SignalSet,
}

impl Open {
    #[inline]
    pub(crate) fn begin() -> Open {
        let known = STATE.with(|state| state.open.load(Ordering::Relaxed)) || !signal::guards();
        if known { Open { blocked: 0 } } else { Open::look() }
    }

    #[cold]
    fn look() -> Open {
        let blocked = raw::change_mask(libc::SIG_BLOCK, 0) & FAULTS;
        STATE.with(|state| match blocked {
            0 => state.open.store(true, Ordering::Relaxed),
            _ => {
                state.opened.store(blocked, Ordering::Relaxed);
                raw::change_mask(libc::SIG_UNBLOCK, blocked);
            }
        });
        Open { blocked }
    }
}

impl Drop for Open {
    #[inline]
    fn drop(&mut self) {
        if self.blocked != 0 {
            raw::change_mask(libc::SIG_BLOCK, self.blocked);
            STATE.with(|state| state.opened.store(0, Ordering::Relaxed));
        }
    }
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
        STATE.with(|state| {
            let kept = state.kept.load(Ordering::Relaxed) & !state.opened.load(Ordering::Relaxed);
            state.deferred.load(Ordering::Relaxed) | kept
        }) != 0
    }

    /// Lets handlers run that waited, and then an asynchronous cancellation. Either may not come back, so the caller
    /// must have nothing left to clean up.
    #[inline]
    pub(crate) fn leave(self) {
        let (deferred, kept): (SignalSet, SignalSet) = STATE.with(|state| {
            compiler_fence(Ordering::SeqCst);
            let depth = state.depth.load(Ordering::Relaxed) - 1;
            state.depth.store(depth, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
            let waits = |set: &AtomicU64| set.load(Ordering::Relaxed) != 0;
            if depth == 0 && (waits(&state.deferred) || waits(&state.kept)) {
                (state.deferred.swap(0, Ordering::Relaxed), state.kept.load(Ordering::Relaxed))
            } else {
                (0, 0)
            }
        });
        if kept != 0 {
            send_kept(kept);
        }
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

/// Sends the signals of `kept` again, whose handlers may not come back.
#[cold]
fn send_kept(kept: SignalSet) {
    for signal in [libc::SIGSEGV, libc::SIGBUS].into_iter().filter(|&signal| kept & raw::only(signal) != 0) {
        STATE.with(|state| {
            // SAFETY: it was filled when the signal was kept.
            let info = unsafe { (*state.told[place(signal)].get()).assume_init_read() };
            state.kept.fetch_and(!raw::only(signal), Ordering::Relaxed);
            // SAFETY: a siginfo of ours.
            unsafe { raw::queue_to_self(signal, &raw const info) };
        });
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
