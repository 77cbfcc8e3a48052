//! System calls without the C library: they touch neither `errno` nor any function that we put ourselves in front of, and
//! may be made in a signal handler.
#![expect(unsafe_code, reason = "the SYSCALL instruction")]

use std::arch::asm;

use libc::{c_int, c_long, siginfo_t};

/// The kernel's signal set: bit `n - 1` is signal `n`.
pub(crate) type SignalSet = u64;

/// Bytes of a [`SignalSet`], as the kernel's signal calls want to be told.
pub(crate) const SIGNAL_SET_SIZE: usize = size_of::<SignalSet>();

/// The set of one signal.
pub(crate) fn only(signal: c_int) -> SignalSet {
    1 << (signal - 1)
}

/// Makes a system call; a negative result is an errno.
///
/// # Safety
///
/// As for the call.
#[inline(always)]
pub(crate) unsafe fn syscall(number: c_long, arguments: [usize; 4]) -> isize {
    let result;
    // SAFETY: the kernel keeps all registers but these; memory is the caller's affair.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Changes this thread's signal mask (`SIG_BLOCK`, `SIG_UNBLOCK`, `SIG_SETMASK`) and gives the one before.
pub(crate) fn change_mask(how: c_int, set: SignalSet) -> SignalSet {
    let mut old: SignalSet = 0;
    let arguments = [how as usize, &raw const set as usize, &raw mut old as usize, SIGNAL_SET_SIZE];
    // SAFETY: both sets are the caller's stack.
    unsafe { syscall(libc::SYS_rt_sigprocmask, arguments) };
    old
}

/// Signals that wait for this thread.
pub(crate) fn pending() -> SignalSet {
    let mut set: SignalSet = 0;
    // SAFETY: the set is on our stack.
    unsafe { syscall(libc::SYS_rt_sigpending, [&raw mut set as usize, SIGNAL_SET_SIZE, 0, 0]) };
    set
}

/// This process.
pub(crate) fn pid() -> i32 {
    // SAFETY: no arguments.
    unsafe { syscall(libc::SYS_getpid, [0; 4]) as i32 }
}

/// Sends this thread `signal` as if it had come with `info` from where `info` says.
///
/// # Safety
///
/// `info` points to a siginfo.
pub(crate) unsafe fn queue_to_self(signal: c_int, info: *const siginfo_t) {
    // SAFETY: the caller's promise; the kernel reads it.
    unsafe {
        let thread = syscall(libc::SYS_gettid, [0; 4]) as usize;
        let arguments = [pid() as usize, thread, signal as usize, info as usize];
        syscall(libc::SYS_rt_tgsigqueueinfo, arguments);
    }
}

/// What makes a file that file: device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
}

/// The file behind a descriptor; `None` if there is none.
pub(crate) fn identity(fd: c_int) -> Option<Identity> {
    // SAFETY: all bytes zero is a valid value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills in the structure, which on this architecture is its own.
    let result = unsafe { syscall(libc::SYS_fstat, [fd as usize, &raw mut stat as usize, 0, 0]) };
    (result == 0).then_some(Identity { device: stat.st_dev, inode: stat.st_ino })
}

/// Writes to a descriptor, as far as it takes it.
pub(crate) fn write(fd: c_int, bytes: &[u8]) -> isize {
    // SAFETY: the kernel reads the slice.
    unsafe { syscall(libc::SYS_write, [fd as usize, bytes.as_ptr() as usize, bytes.len(), 0]) }
}

/// Closes a descriptor without anybody's knowledge.
#[cfg(test)]
pub(crate) fn close(fd: c_int) {
    // SAFETY: no memory is involved; a test's own descriptor.
    unsafe { syscall(libc::SYS_close, [fd as usize, 0, 0, 0]) };
}

/// Sets `errno`.
pub(crate) fn set_errno(value: c_int) {
    // SAFETY: the C library gives the address of this thread's.
    unsafe { *libc::__errno_location() = value };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_duplicate_is_the_same_file() {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let copy = file.try_clone().unwrap();
        let other = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(identity(file.as_raw_fd()), identity(copy.as_raw_fd()));
        assert_ne!(identity(file.as_raw_fd()), identity(other.as_raw_fd()));
        assert_eq!(identity(-1), None);
    }

    #[test]
    fn a_blocked_signal_is_pending_when_sent() {
        let set = only(libc::SIGWINCH);
        let old = change_mask(libc::SIG_BLOCK, set);
        // SAFETY: all bytes zero is a valid value.
        let mut info: siginfo_t = unsafe { std::mem::zeroed() };
        info.si_signo = libc::SIGWINCH;
        info.si_code = libc::SI_QUEUE;
        // SAFETY: a siginfo of ours.
        unsafe { queue_to_self(libc::SIGWINCH, &raw const info) };
        assert_eq!(pending() & set, set);
        // Its default action is none.
        change_mask(libc::SIG_SETMASK, old);
        assert_eq!(pending() & set, 0);
    }
}
