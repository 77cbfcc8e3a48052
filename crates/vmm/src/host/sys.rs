//! The few system calls that no safe wrapper of our dependencies offers.
#![expect(unsafe_code, reason = "poll, terminal attributes and clocks are C calls")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

/// A descriptor to wait for.
#[derive(Debug)]
pub struct Waiter<'a> {
    fd: RawFd,
    owner: PhantomData<&'a ()>,
    events: i16,
    /// Whether something happened (also an error or a hang-up, which the next read or write tells of).
    pub ready: bool,
}

impl<'a> Waiter<'a> {
    /// Waits until `owner` can be read.
    pub fn read(owner: &'a impl AsRawFd) -> Self {
        Self { fd: owner.as_raw_fd(), owner: PhantomData, events: libc::POLLIN, ready: false }
    }

    /// Waits until `owner` can be written.
    pub fn write(owner: &'a impl AsRawFd) -> Self {
        Self { fd: owner.as_raw_fd(), owner: PhantomData, events: libc::POLLOUT, ready: false }
    }
}

/// Waits until a descriptor is ready or `timeout` is over (`None`: for ever). Works for regular files too, which
/// epoll refuses. An interrupting signal counts as nothing ready.
pub fn poll(waiters: &mut [Waiter<'_>], timeout: Option<Duration>) -> io::Result<()> {
    let mut fds: Vec<libc::pollfd> =
        waiters.iter().map(|w| libc::pollfd { fd: w.fd, events: w.events, revents: 0 }).collect();
    let timeout = timeout.map(|t| libc::timespec {
        tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: t.subsec_nanos().into(),
    });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `fds` is a valid array of its length for the time of the call, and the time is there or null.
    let result =
        unsafe { libc::ppoll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout, std::ptr::null()) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
    }
    for (waiter, fd) in waiters.iter_mut().zip(&fds) {
        waiter.ready = fd.revents != 0;
    }
    Ok(())
}

/// Terminal attributes of `fd`.
pub fn terminal_attributes(fd: BorrowedFd<'_>) -> io::Result<libc::termios> {
    // SAFETY: all-zero bytes are a valid `termios`, a plain C structure of integers.
    let mut attributes: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a `termios` that lives through the call.
    match unsafe { libc::tcgetattr(fd.as_raw_fd(), &raw mut attributes) } {
        0 => Ok(attributes),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets terminal attributes of `fd`.
pub fn set_terminal_attributes(fd: BorrowedFd<'_>, attributes: &libc::termios) -> io::Result<()> {
    // SAFETY: the pointer is to a `termios` that lives through the call.
    match unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, attributes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets the host use huge pages for a range of this process's memory.
pub fn advise_huge_pages(start: usize, length: usize) -> io::Result<()> {
    // SAFETY: this advice changes neither the contents of memory nor what is mapped; a range that is not mapped
    // is an error.
    match unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_HUGEPAGE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a `timespec` that lives through the call.
    unsafe { libc::clock_gettime(id, &raw mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// CPU time of this process, all threads.
pub fn process_cpu_time() -> Duration {
    clock(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// Time since some fixed point, never going back.
pub fn monotonic_nanoseconds() -> u64 {
    u64::try_from(clock(libc::CLOCK_MONOTONIC).as_nanos()).unwrap_or(u64::MAX)
}

/// Random bytes from the kernel.
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the pointer and length describe `bytes`.
    let length = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    if usize::try_from(length) == Ok(N) { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}
