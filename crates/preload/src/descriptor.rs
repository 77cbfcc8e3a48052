//! close, dup and fcntl: what makes and ends descriptors.
#![expect(unsafe_code, reason = "functions of the C library's")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use libc::{c_int, c_uint, c_void, msghdr, ssize_t};

use crate::thread::{self, Inside};
use crate::{interpose, next, process, raw, table};

/// CLOSE_RANGE_CLOEXEC.
const CLOSE_RANGE_CLOEXEC: c_int = 1 << 2;

/// Does bookkeeping as a call of ours. Errors of ours are no reason to tell the client of one.
fn inside(work: impl FnOnce()) {
    let inside = Inside::enter();
    let _ = catch_unwind(AssertUnwindSafe(work));
    inside.leave();
}

/// A call that makes `new` the same as `old`.
fn duplicated(old: c_int, new: c_int) -> c_int {
    let concerns_us = new >= 0 && new != old && (table::is_ours(old) || table::is_ours(new));
    // (The descriptors of a vfork(2) child are its own, the table is its parent's.)
    if concerns_us && !thread::is_inside() && !process::is_guest_in_memory() {
        inside(|| {
            let entry = table::find(old).clone();
            table::set(new, entry);
        });
    }
    new
}

/// Closes descriptors by `close`, and then lets go of what they stood for.
fn closing(descriptors: &[c_int], close: impl FnOnce() -> c_int) -> c_int {
    // The table must have forgotten a number when it is free again, for another thread may get it.
    let mut taken = Vec::new();
    inside(|| taken = descriptors.iter().map(|&fd| table::take(fd)).collect());
    let result = close();
    let error = std::io::Error::last_os_error().raw_os_error();
    inside(|| taken.into_iter().for_each(table::discard));
    if result < 0 {
        raw::set_errno(error.unwrap_or(libc::EBADF));
    }
    result
}

/// F_DUPFD and F_DUPFD_CLOEXEC are the commands that concern us.
fn fcntl_done(fd: c_int, command: c_int, result: c_int) -> c_int {
    match command {
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => duplicated(fd, result),
        _ => result,
    }
}

interpose! {
    fn close(fd: c_int) -> c_int {
        // SAFETY: the client's argument.
        let close = || unsafe { next::close(fd) };
        if !table::is_ours(fd) || thread::is_inside() {
            return close();
        }
        closing(&[fd], close)
    }

    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
        // SAFETY: the client's arguments.
        let close = || unsafe { next::close_range(first, last, flags) };
        if flags & CLOSE_RANGE_CLOEXEC != 0 || first > last {
            return close();
        }
        let highest = |fd: c_uint| c_int::try_from(fd).unwrap_or(c_int::MAX);
        closing(&table::between(highest(first), highest(last)), close)
    }

    fn closefrom(first: c_int) -> () {
        // As the C library: it cannot fail.
        let first = first.max(0) as c_uint;
        // SAFETY: no memory is involved.
        unsafe { close_range(first, c_uint::MAX, 0) };
    }

    fn dup(fd: c_int) -> c_int {
        // SAFETY: the client's argument.
        duplicated(fd, unsafe { next::dup(fd) })
    }

    fn dup2(from: c_int, to: c_int) -> c_int {
        // SAFETY: the client's arguments.
        duplicated(from, unsafe { next::dup2(from, to) })
    }

    fn dup3(from: c_int, to: c_int, flags: c_int) -> c_int {
        // SAFETY: the client's arguments.
        duplicated(from, unsafe { next::dup3(from, to, flags) })
    }

    fn fcntl(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
        // SAFETY: the client's arguments.
        fcntl_done(fd, command, unsafe { next::fcntl(fd, command, argument) })
    }

    fn fcntl64(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
        // SAFETY: the client's arguments.
        fcntl_done(fd, command, unsafe { next::fcntl64(fd, command, argument) })
    }

    // The object of a descriptor that is on its way may be needed when the client has closed its own.
    fn sendmsg(socket: c_int, message: *const msghdr, flags: c_int) -> ssize_t {
        if !thread::is_inside() {
            // SAFETY: the client's message, as the C library takes it.
            let sent = unsafe { descriptors_in(message) };
            if sent.iter().any(|&fd| table::is_ours(fd)) {
                inside(|| sent.iter().filter(|&&fd| table::is_ours(fd)).for_each(|&fd| table::keep(fd)));
            }
        }
        // SAFETY: the client's arguments.
        unsafe { next::sendmsg(socket, message, flags) }
    }
}

/// The descriptors that a message carries (SCM_RIGHTS).
///
/// # Safety
///
/// The argument of sendmsg(2).
unsafe fn descriptors_in(message: *const msghdr) -> Vec<c_int> {
    let mut descriptors = Vec::new();
    // SAFETY: the caller's promise; the macros stay within the control data.
    unsafe {
        let Some(message) = message.as_ref().filter(|message| message.msg_controllen != 0) else {
            return descriptors;
        };
        let mut header = libc::CMSG_FIRSTHDR(message);
        while let Some(part) = header.as_ref() {
            if (part.cmsg_level, part.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let data = libc::CMSG_DATA(header).cast::<c_int>();
                let length = part.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize) / size_of::<c_int>();
                descriptors.extend((0..length).map(|i| data.add(i).read_unaligned()));
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    descriptors
}
