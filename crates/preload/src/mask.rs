//! KVM_SET_SIGNAL_MASK: the signal mask that is in force during KVM_RUN (kernel: `kvm_sigset_activate`).
//!
//! A signal that this mask lets through and the thread's does not ends KVM_RUN and stays pending: clients take
//! it with sigwait(3), and its default action may be to end the process. So it is never really let through. Nothing but
//! the thread itself can see what is pending for it, so a vCPU that runs with such a mask is called out every half a
//! millisecond ([`Callers`]) to look.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use abi::{Argument, Errno, Reply, VcpuObject};
use hypervisor::VcpuHandle;

use crate::raw::{self, SIGNAL_SET_SIZE, SignalSet};
use crate::thread::{FAULTS, Inside};
use crate::{cancel, process};

/// KVM_SET_SIGNAL_MASK.
pub(crate) const SET_SIGNAL_MASK: u32 = 0x4004_ae8b;

/// Signals that cannot be blocked.
const UNBLOCKABLE: SignalSet = 1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1);

/// Between two looks.
const PERIOD: Duration = Duration::from_micros(500);

/// A vCPU's mask. (It concerns the thread that runs the vCPU, not the vCPU.)
#[derive(Debug, Default)]
pub(crate) struct RunMask {
    set: AtomicU64,
    /// There is one.
    active: AtomicBool,
}

impl RunMask {
    /// The mask for KVM_RUN, if there is one.
    #[inline]
    pub(crate) fn get(&self) -> Option<SignalSet> {
        self.active.load(Ordering::Acquire).then(|| self.set.load(Ordering::Relaxed))
    }

    /// KVM_SET_SIGNAL_MASK. The structure is a length in bytes and the set; none at all ends the mask.
    pub(crate) fn set(&self, argument: Argument) -> Result<Reply, Errno> {
        if argument.0 == 0 {
            self.active.store(false, Ordering::Release);
            return Ok(Reply::Value(0));
        }
        if argument.read::<u32>()? as usize != SIGNAL_SET_SIZE {
            return Err(Errno::INVALID);
        }
        self.set.store(argument.read_at::<SignalSet>(4)? & !UNBLOCKABLE, Ordering::Relaxed);
        self.active.store(true, Ordering::Release);
        Ok(Reply::Value(0))
    }
}

/// KVM_RUN, which is `enter`, with `mask` in force.
pub(crate) fn run(
    inside: &Inside,
    vcpu: &VcpuObject,
    mask: SignalSet,
    enter: impl Fn() -> Result<Reply, Errno>,
) -> Result<Reply, Errno> {
    let mask = mask & !FAULTS;
    let old = raw::change_mask(libc::SIG_BLOCK, mask);
    let (awaited, blocked) = (old & !mask & !UNBLOCKABLE, mask & !old);
    let result = if awaited == 0 { enter() } else { run_awaiting(inside, vcpu, awaited, enter) };
    raw::change_mask(libc::SIG_UNBLOCK, blocked);
    result
}

fn run_awaiting(
    inside: &Inside,
    vcpu: &VcpuObject,
    awaited: SignalSet,
    enter: impl Fn() -> Result<Reply, Errno>,
) -> Result<Reply, Errno> {
    let cancellations = cancel::count();
    let has_reason =
        || raw::pending() & awaited != 0 || inside.deferred() || cancel::count() != cancellations;
    let call = Call::begin(&vcpu.handle);
    loop {
        if has_reason() {
            vcpu.interrupt();
        }
        let result = enter();
        // It may have been for nothing. `immediate_exit` needs no asking: it counts each time.
        let called = call.0.called.swap(false, Ordering::SeqCst);
        if !called || result.as_ref().err() != Some(&Errno::INTERRUPTED) || has_reason() {
            drop(call);
            vcpu.settle();
            return result;
        }
        vcpu.settle();
    }
}

/// A vCPU that is to be called out again and again.
#[derive(Debug)]
struct Callee {
    vcpu: Arc<VcpuHandle>,
    called: AtomicBool,
}

/// The one thread of a process that calls, and whom.
#[derive(Default)]
struct Callers {
    list: Mutex<List>,
    more: Condvar,
}

#[derive(Default)]
struct List {
    callees: Vec<Arc<Callee>>,
    started: bool,
}

static CALLERS: AtomicPtr<Callers> = AtomicPtr::new(ptr::null_mut());

/// In a forked child: the thread is not there.
pub(crate) fn forget_callers() {
    CALLERS.store(ptr::null_mut(), Ordering::Release);
}

impl Callers {
    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls everybody, and sleeps while there is nobody to call.
    fn serve(&self) {
        let mut list = self.lock();
        loop {
            list = self
                .more
                .wait_while(list, |list| list.callees.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            for callee in &list.callees {
                callee.called.store(true, Ordering::SeqCst);
                callee.vcpu.interrupt();
            }
            drop(list);
            thread::sleep(PERIOD);
            list = self.lock();
        }
    }
}

/// The vCPU is called while this exists.
struct Call(Arc<Callee>);

impl Call {
    fn begin(vcpu: &Arc<VcpuHandle>) -> Call {
        let callers: &'static Callers = process::leaked(&CALLERS);
        let callee = Arc::new(Callee { vcpu: vcpu.clone(), called: AtomicBool::new(false) });
        let mut list = callers.lock();
        list.callees.push(callee.clone());
        if !list.started {
            let thread = thread::Builder::new().name("ring3-signals".into()).spawn(|| callers.serve());
            match thread {
                Ok(_) => list.started = true,
                Err(error) => tracing::error!("no thread to look for signals: {error}"),
            }
        }
        drop(list);
        callers.more.notify_one();
        Call(callee)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        process::leaked(&CALLERS).lock().callees.retain(|callee| !Arc::ptr_eq(callee, &self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_is_checked_as_by_the_kernel() {
        let mask = RunMask::default();
        let mut structure = [0u8; 12];
        structure[0] = 8;
        structure[4..].fill(0xff);
        let set = |structure: &[u8; 12]| mask.set(Argument(structure.as_ptr() as u64)).map(|_| ());
        assert_eq!(set(&structure), Ok(()));
        assert_eq!(mask.get(), Some(!UNBLOCKABLE));
        structure[0] = 4;
        assert_eq!(set(&structure), Err(Errno::INVALID));
        assert_eq!(mask.set(Argument(8)).map(|_| ()), Err(Errno::FAULT));
        assert_eq!(mask.get(), Some(!UNBLOCKABLE), "what is refused changes nothing");
        assert_eq!(mask.set(Argument(0)).map(|_| ()), Ok(()));
        assert_eq!(mask.get(), None);
    }
}
