//! Signals: the client's handlers run as always, but never on top of the engine.
//!
//! A handler of the client's is entered in [`ACTIONS`] and [`trampoline`] is installed in its place. On a thread that is
//! outside, the trampoline calls the handler. On a thread that is inside, it puts the signal back, blocked, and
//! makes KVM_RUN return; when the thread leaves, the mask is as it was and the kernel delivers the signal where the
//! client may do anything in its handler. So KVM_RUN returns EINTR after the handler has run, as from the kernel.
//! Faults of the thread's own cannot wait: those go to the handler at once.
//!
//! The trampoline serves the engine, too: an access of a guest to memory that the client has taken away is a SIGSEGV or SIGBUS
//! of the engine's, and [`recover`] has the access fail. From the first VM on ([`guard`]) the trampoline is
//! installed for these two signals whether the client has handlers or not, and does what the client has asked for, or
//! the default action, when a signal is none of the engine's.
#![expect(unsafe_code, reason = "sigaction, and calls of handlers")]

use std::cell::UnsafeCell;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use silicon::mmu::host::{announce_recovery, recover};

use libc::{SIG_DFL, SIG_IGN, c_int, c_void, sigaction as SigAction, sighandler_t, siginfo_t, ucontext_t};

use crate::raw::{self, SignalSet};
use crate::{interpose, next, process, thread};

/// One more than the highest signal number.
const SIGNALS: usize = 65;

/// SIGBUS for memory that has failed and is being used (`BUS_MCEERR_AR`).
const MEMORY_FAILED_HERE: c_int = 4;

/// SIGBUS for memory that has failed but is not being used (`BUS_MCEERR_AO`).
const MEMORY_FAILED_ELSEWHERE: c_int = 5;

/// What is to happen at a signal.
struct Action {
    /// The client's handler; the last one, if it has none any more: its signal may be on the way.
    handler: AtomicUsize,
    /// The handler is to be called once (`SA_RESETHAND`).
    once: AtomicBool,
    /// What is in force: `SIG_DFL`, `SIG_IGN` or a handler. Looked at only where the trampoline is installed in any case.
    disposition: AtomicUsize,
    /// What the client thinks that is installed; `None` while it has not asked for anything.
    client: UnsafeCell<Option<SigAction>>,
}

// SAFETY: `client` is only used by the holder of the lock (`Locked`).
unsafe impl Sync for Action {}

static ACTIONS: [Action; SIGNALS] = [const {
    Action {
        handler: AtomicUsize::new(SIG_DFL),
        once: AtomicBool::new(false),
        disposition: AtomicUsize::new(SIG_DFL),
        client: UnsafeCell::new(None),
    }
}; SIGNALS];

/// Permission to use what the client thinks. Signals are blocked meanwhile, for handlers may call sigaction too.
struct Locked(SignalSet);

static LOCK: AtomicBool = AtomicBool::new(false);

impl Locked {
    fn acquire() -> Locked {
        let mask = raw::change_mask(libc::SIG_BLOCK, SignalSet::MAX);
        while LOCK.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            std::hint::spin_loop();
        }
        Locked(mask)
    }

    fn client(&mut self, action: &'static Action) -> &mut Option<SigAction> {
        // SAFETY: whoever holds the lock is alone.
        unsafe { &mut *action.client.get() }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        LOCK.store(false, Ordering::Release);
        raw::change_mask(libc::SIG_SETMASK, self.0);
    }
}

/// In a forked child: another thread may have had the lock.
pub(crate) fn unlock() {
    LOCK.store(false, Ordering::Release);
}

/// An action with all bytes zero: the default one.
fn no_action() -> SigAction {
    // SAFETY: a valid value.
    unsafe { mem::zeroed() }
}

fn is_function(handler: sighandler_t) -> bool {
    handler != SIG_DFL && handler != SIG_IGN
}

/// The action that is really installed: the client's, with the trampoline for its handler.
fn in_front_of(client: &SigAction) -> SigAction {
    let mut action = *client;
    action.sa_sigaction = trampoline as *const () as sighandler_t;
    // Whether it counts once is known to the trampoline: a signal that is put back must find it again.
    action.sa_flags = client.sa_flags & !libc::SA_RESETHAND | libc::SA_SIGINFO;
    action
}

/// The action that is really installed for a guarded signal.
fn guarded_action(client: &SigAction) -> SigAction {
    if is_function(client.sa_sigaction) {
        return in_front_of(client);
    }
    let mut action = no_action();
    action.sa_sigaction = trampoline as *const () as sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    action
}

/// Whether the trampoline is installed for [`FAULTS`](thread::FAULTS) in any case.
static GUARDING: AtomicBool = AtomicBool::new(false);

/// Whether the engine's faults are recovered from.
#[inline]
pub(crate) fn guards() -> bool {
    GUARDING.load(Ordering::Relaxed)
}

/// From now on the engine's faults are recovered from.
pub(crate) fn guard() {
    if GUARDING.swap(true, Ordering::SeqCst) {
        return;
    }
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        let action = &ACTIONS[signal as usize];
        let mut locked = Locked::acquire();
        let client = locked.client(action);
        let mut now = no_action();
        if client.is_none() && install(signal, None, &mut now) == 0 && is_function(now.sa_sigaction) {
            // Installed behind our back.
            action.handler.store(now.sa_sigaction, Ordering::Release);
        }
        let wanted = *client.get_or_insert(now);
        action.disposition.store(wanted.sa_sigaction, Ordering::Release);
        install(signal, Some(&guarded_action(&wanted)), &mut now);
    }
    announce_recovery();
}

fn is_guarded(signal: c_int) -> bool {
    matches!(signal, libc::SIGSEGV | libc::SIGBUS) && guards()
}

/// Installs and shows the client's actions, as sigaction(2).
pub(crate) fn change(signal: c_int, new: Option<SigAction>, old: Option<&mut SigAction>) -> c_int {
    let action = usize::try_from(signal).ok().and_then(|number| ACTIONS.get(number)).filter(|_| signal > 0);
    let Some(action) = action else {
        raw::set_errno(libc::EINVAL);
        return -1;
    };
    if process::is_guest_in_memory() {
        // Its actions are its own, the table is its parent's.
        let mut before = no_action();
        let result = install(signal, new.as_ref(), &mut before);
        if let Some(old) = old.filter(|_| result == 0) {
            *old = before;
        }
        return result;
    }
    let mut locked = Locked::acquire();
    let client = locked.client(action);
    let mut before = no_action();
    let result = match new {
        None => install(signal, None, &mut before),
        Some(new) if is_function(new.sa_sigaction) => {
            action.once.store(new.sa_flags & libc::SA_RESETHAND != 0, Ordering::Relaxed);
            action.handler.store(new.sa_sigaction, Ordering::Release);
            action.disposition.store(new.sa_sigaction, Ordering::Release);
            install(signal, Some(&in_front_of(&new)), &mut before)
        }
        Some(new) if is_guarded(signal) => {
            action.disposition.store(new.sa_sigaction, Ordering::Release);
            install(signal, Some(&guarded_action(&new)), &mut before)
        }
        Some(new) => install(signal, Some(&new), &mut before),
    };
    if result == 0 {
        if let Some(old) = old {
            *old = client.unwrap_or(before);
        }
        if new.is_some() {
            *client = new;
        }
    }
    result
}

/// SIGBUS for this thread as the kernel forces it on who makes a split lock (kernel: `force_sig_fault`): one that blocks or
/// ignores it gets the default action. Called outside, for the handler may not come back.
pub(crate) fn force_alignment_error() {
    let mut now = no_action();
    change(libc::SIGBUS, None, Some(&mut now));
    let set = raw::only(libc::SIGBUS);
    let blocked = raw::change_mask(libc::SIG_BLOCK, set) & set != 0;
    if blocked || now.sa_sigaction == SIG_IGN {
        change(libc::SIGBUS, Some(no_action()), None);
    }
    // SAFETY: all bytes zero is a valid value; the address is null, as the kernel gives it.
    let mut info: siginfo_t = unsafe { mem::zeroed() };
    info.si_signo = libc::SIGBUS;
    info.si_code = libc::BUS_ADRALN;
    // SAFETY: a structure of ours.
    unsafe { raw::queue_to_self(libc::SIGBUS, &raw const info) };
    raw::change_mask(libc::SIG_UNBLOCK, set);
}

/// The C library's sigaction.
fn install(signal: c_int, new: Option<&SigAction>, old: &mut SigAction) -> c_int {
    // SAFETY: both are structures of ours.
    unsafe { next::sigaction(signal, new.map_or(ptr::null(), ptr::from_ref), old) }
}

/// Whether the signal is the thread's own doing, at the very instruction that it is at.
fn is_fault(signal: c_int, code: c_int) -> bool {
    let kind = matches!(
        signal,
        libc::SIGSEGV | libc::SIGBUS | libc::SIGFPE | libc::SIGILL | libc::SIGTRAP | libc::SIGSYS
    );
    kind && code > 0 && !(signal == libc::SIGBUS && code == MEMORY_FAILED_ELSEWHERE)
}

type Handler = unsafe extern "C-unwind" fn(c_int, *mut siginfo_t, *mut c_void);

/// What the kernel calls in place of the client's handlers.
unsafe extern "C-unwind" fn trampoline(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let Some(action) = ACTIONS.get(signal as usize) else { return };
    // SAFETY: the kernel passes a siginfo.
    let fault = is_fault(signal, unsafe { (*info).si_code });
    // SAFETY: the kernel's arguments.
    if fault && unsafe { recover(signal, info, context) } {
        return;
    }
    if thread::is_inside() && !fault {
        // SAFETY: the kernel's own structures.
        unsafe { put_back(signal, info, context.cast()) };
        return;
    }
    if is_guarded(signal) {
        let disposition = action.disposition.load(Ordering::Acquire);
        if !is_function(disposition) {
            if disposition == SIG_DFL || fault {
                // SAFETY: the kernel's siginfo.
                unsafe { default_action(signal, info) };
            }
            return;
        }
    }
    if action.once.load(Ordering::Relaxed) && action.once.swap(false, Ordering::Relaxed) {
        change(signal, Some(no_action()), None);
    }
    let handler = action.handler.load(Ordering::Acquire);
    if is_function(handler) {
        // It runs with a mask of its own, and may not come back here.
        thread::mask_changed();
        // SAFETY: the client's handler. One that takes a single argument does not see the others.
        unsafe { mem::transmute::<usize, Handler>(handler)(signal, info, context) };
    }
}

/// Ends the process as the signal does.
///
/// # Safety
///
/// What the kernel passes to handlers.
#[cold]
unsafe fn default_action(signal: c_int, info: *const siginfo_t) {
    install(signal, Some(&no_action()), &mut no_action());
    // SAFETY: the caller's promise. It is blocked now, and delivered before the next instruction of the client's.
    unsafe { raw::queue_to_self(signal, info) };
}

/// The client's thread gets SIGBUS for the page at `host`, which has failed, once it is outside (kernel:
/// `kvm_send_hwpoison_signal`).
pub(crate) fn send_memory_failure(host: u64) {
    /// `siginfo_t` of BUS_MCEERR_AR.
    #[repr(C)]
    struct Failure {
        signal: c_int,
        errno: c_int,
        code: c_int,
        address: u64,
        /// Base-2 logarithm of how much has failed.
        size: i16,
    }
    let failure =
        Failure { signal: libc::SIGBUS, errno: 0, code: MEMORY_FAILED_HERE, address: host, size: 12 };
    // SAFETY: all bytes zero is a valid value, and the structure has the layout of its first bytes.
    unsafe {
        let mut info: siginfo_t = mem::zeroed();
        ptr::copy_nonoverlapping(
            (&raw const failure).cast::<u8>(),
            (&raw mut info).cast::<u8>(),
            size_of::<Failure>(),
        );
        thread::keep(libc::SIGBUS, &raw const info);
    }
}

/// Makes the signal pending again and keeps it blocked until the thread has left the engine.
///
/// # Safety
///
/// What the kernel passes to handlers.
unsafe fn put_back(signal: c_int, info: *const siginfo_t, context: *mut ucontext_t) {
    if is_guarded(signal) {
        // SAFETY: the caller's promise.
        return unsafe { thread::keep(signal, info) };
    }
    raw::change_mask(libc::SIG_BLOCK, raw::only(signal));
    // SAFETY: the mask that is in force after the handler: its first word is the kernel's set.
    unsafe {
        let mask = (&raw mut (*context).uc_sigmask).cast::<SignalSet>();
        *mask |= raw::only(signal);
        raw::queue_to_self(signal, info);
    }
    thread::defer(signal);
}

/// As signal(2): `flags` are those of the flavour.
fn simple(signal: c_int, handler: sighandler_t, flags: c_int, block_itself: bool) -> sighandler_t {
    let mut new = no_action();
    new.sa_sigaction = handler;
    new.sa_flags = flags;
    if block_itself {
        // SAFETY: a set of ours; a number that is none is refused below.
        unsafe { libc::sigaddset(&raw mut new.sa_mask, signal) };
    }
    let mut old = no_action();
    if change(signal, Some(new), Some(&mut old)) == 0 { old.sa_sigaction } else { libc::SIG_ERR }
}

/// # Safety
///
/// The arguments of sigaction(2).
unsafe fn client_sigaction(signal: c_int, new: *const SigAction, old: *mut SigAction) -> c_int {
    // SAFETY: each is null or the client's structure, as for the C library.
    unsafe {
        let new = new.as_ref().copied();
        change(signal, new, old.as_mut())
    }
}

interpose! {
    fn sigaction(signal: c_int, new: *const SigAction, old: *mut SigAction) -> c_int {
        // SAFETY: the client's arguments.
        unsafe { client_sigaction(signal, new, old) }
    }

    fn __sigaction(signal: c_int, new: *const SigAction, old: *mut SigAction) -> c_int {
        // SAFETY: the client's arguments.
        unsafe { client_sigaction(signal, new, old) }
    }

    fn signal(signal: c_int, handler: sighandler_t) -> sighandler_t {
        simple(signal, handler, libc::SA_RESTART, true)
    }

    fn bsd_signal(signal: c_int, handler: sighandler_t) -> sighandler_t {
        simple(signal, handler, libc::SA_RESTART, true)
    }

    fn sysv_signal(signal: c_int, handler: sighandler_t) -> sighandler_t {
        simple(signal, handler, libc::SA_RESETHAND | libc::SA_NODEFER, false)
    }

    fn __sysv_signal(signal: c_int, handler: sighandler_t) -> sighandler_t {
        simple(signal, handler, libc::SA_RESETHAND | libc::SA_NODEFER, false)
    }
}

interpose! {
    fn pthread_sigmask(how: c_int, set: *const libc::sigset_t, old: *mut libc::sigset_t) -> c_int {
        if !set.is_null() {
            thread::mask_changed();
        }
        // SAFETY: the client's arguments.
        unsafe { next::pthread_sigmask(how, set, old) }
    }

    fn sigprocmask(how: c_int, set: *const libc::sigset_t, old: *mut libc::sigset_t) -> c_int {
        if !set.is_null() {
            thread::mask_changed();
        }
        // SAFETY: the client's arguments.
        unsafe { next::sigprocmask(how, set, old) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::thread::Inside;
    use std::sync::atomic::AtomicI32;

    /// The sum of the codes by signal: the tests run at the same time, each with a signal of its own.
    static CODES: [AtomicI32; SIGNALS] = [const { AtomicI32::new(0) }; SIGNALS];

    extern "C" fn handler(signal: c_int, info: *mut siginfo_t, _: *mut c_void) {
        // SAFETY: the kernel passes a siginfo.
        CODES[signal as usize].fetch_add(unsafe { (*info).si_code }, Ordering::SeqCst);
    }

    fn codes(signal: c_int) -> i32 {
        CODES[signal as usize].load(Ordering::SeqCst)
    }

    fn action(handler: sighandler_t, flags: c_int) -> SigAction {
        let mut action = no_action();
        (action.sa_sigaction, action.sa_flags) = (handler, flags);
        action
    }

    fn shown(signal: c_int) -> SigAction {
        let mut shown = no_action();
        assert_eq!(change(signal, None, Some(&mut shown)), 0);
        shown
    }

    /// Sends this thread a signal that says that it is from `SI_QUEUE`, which is -1.
    fn send(signal: c_int) {
        // SAFETY: all bytes zero is a valid value.
        let mut info: siginfo_t = unsafe { mem::zeroed() };
        (info.si_signo, info.si_code) = (signal, libc::SI_QUEUE);
        // SAFETY: a siginfo of ours.
        unsafe { raw::queue_to_self(signal, &raw const info) };
    }

    #[test]
    fn handlers_wait_until_the_thread_is_outside() {
        let handler = handler as *const () as sighandler_t;
        assert_eq!(change(libc::SIGUSR2, Some(action(handler, libc::SA_NODEFER)), None), 0);
        let mask = raw::change_mask(libc::SIG_BLOCK, 0);
        send(libc::SIGUSR2);
        assert_eq!(codes(libc::SIGUSR2), libc::SI_QUEUE);
        let inside = Inside::enter();
        assert!(!inside.deferred());
        send(libc::SIGUSR2);
        assert!(inside.deferred());
        assert_eq!(codes(libc::SIGUSR2), libc::SI_QUEUE);
        inside.leave();
        assert_eq!(codes(libc::SIGUSR2), 2 * libc::SI_QUEUE, "with what was said of it");
        assert_eq!(raw::change_mask(libc::SIG_BLOCK, 0), mask, "the mask is as before");
    }

    #[test]
    fn the_client_sees_its_own_actions() {
        assert_eq!(shown(libc::SIGURG).sa_sigaction, SIG_DFL);
        let handler = handler as *const () as sighandler_t;
        let mut old = no_action();
        assert_eq!(change(libc::SIGURG, Some(action(handler, libc::SA_RESETHAND)), Some(&mut old)), 0);
        assert_eq!(old.sa_sigaction, SIG_DFL);
        let now = shown(libc::SIGURG);
        assert_eq!((now.sa_sigaction, now.sa_flags), (handler, libc::SA_RESETHAND));
        send(libc::SIGURG);
        assert_eq!(codes(libc::SIGURG), libc::SI_QUEUE);
        assert_eq!(shown(libc::SIGURG).sa_sigaction, SIG_DFL, "it was for one time");
        assert_eq!(simple(libc::SIGURG, SIG_IGN, libc::SA_RESTART, true), SIG_DFL);
        assert_eq!(simple(libc::SIGURG, SIG_DFL, libc::SA_RESTART, true), SIG_IGN);
        for wrong in [0, -1, 65, libc::SIGKILL] {
            assert_eq!(change(wrong, Some(no_action()), None), -1, "{wrong}");
        }
    }

    #[test]
    fn faults_do_not_wait() {
        assert!(is_fault(libc::SIGSEGV, 1) && is_fault(libc::SIGSYS, 1) && is_fault(libc::SIGBUS, 4));
        assert!(!is_fault(libc::SIGSEGV, libc::SI_USER) && !is_fault(libc::SIGSEGV, libc::SI_TKILL));
        assert!(!is_fault(libc::SIGBUS, MEMORY_FAILED_ELSEWHERE) && !is_fault(libc::SIGIO, 1));
    }
}
