//! Opening files: `/dev/kvm`, the parameters of the kernel's modules, and a sysctl.
#![expect(unsafe_code, reason = "functions of the C library's")]

use std::ffi::CStr;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{FromRawFd, IntoRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use abi::{Argument, Created, Errno};
use libc::{AT_FDCWD, FILE, c_char, c_int, c_long, mode_t};

use crate::path::{self, Special};
use crate::syscall::finish;
use crate::thread::{self, Inside};
use crate::{interpose, next, process, raw, table};

/// Answers an open of one of our files; `None`: somebody else's file.
///
/// # Safety
///
/// `path` is null or points to a string.
unsafe fn answer(dir: c_int, path: *const c_char, flags: c_int) -> Option<c_int> {
    // SAFETY: the caller's promise.
    if !unsafe { path::may_be_special(path) } || thread::is_inside() {
        return None;
    }
    // SAFETY: as above.
    answered(|| match unsafe { path::special(dir, path) } {
        Some(Special::Kvm) => Some(open_system(flags)),
        Some(Special::Parameter(text)) => Some(open_parameter(&text, flags)),
        Some(Special::Absent) => Some(Err(Errno::NOENT)),
        Some(Special::Directory) | None => None,
    })
}

/// openat2(2), which has no function in the C library.
///
/// # Safety
///
/// The arguments of openat2(2).
pub(crate) unsafe fn openat2(dir: c_int, path: *const c_char, how: usize, size: usize) -> c_long {
    // Flags, mode and how to resolve the path: the first edition of `struct open_how`. What restricts the way to a file
    // is the kernel's to say.
    let flags = match Argument(how as u64).read::<[u64; 3]>() {
        Ok([flags, _, 0]) if size >= size_of::<[u64; 3]>() => c_int::try_from(flags).ok(),
        _ => None,
    };
    // SAFETY: the caller's promise.
    match flags.and_then(|flags| unsafe { answer(dir, path, flags) }) {
        Some(fd) => fd.into(),
        // SAFETY: as above.
        None => finish(unsafe { raw::syscall(libc::SYS_openat2, [dir as usize, path as usize, how, size]) }),
    }
}

/// A call of ours that may turn out to be none: its result as the C library gives it.
pub(crate) fn answered(work: impl FnOnce() -> Option<Result<c_int, Errno>>) -> Option<c_int> {
    let inside = Inside::enter();
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or(Some(Err(Errno::IO)));
    inside.leave();
    Some(result?.unwrap_or_else(|errno| {
        raw::set_errno(errno.0);
        -1
    }))
}

fn open_system(flags: c_int) -> Result<c_int, Errno> {
    table::sweep();
    let fd = table::adopt(Created::system(process::system()?)?)?;
    apply_flags(fd, flags);
    Ok(fd)
}

fn open_parameter(text: &str, flags: c_int) -> Result<c_int, Errno> {
    if flags & libc::O_ACCMODE != libc::O_RDONLY {
        return Err(Errno(libc::EACCES));
    }
    // SAFETY: the name ends with a zero byte.
    let fd = unsafe { libc::memfd_create(c"parameter".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: the kernel has just given us this descriptor.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    let fd = file.into_raw_fd();
    apply_flags(fd, flags);
    Ok(fd)
}

/// Gives a new descriptor what the client's flags ask for.
fn apply_flags(fd: c_int, flags: c_int) {
    if flags & libc::O_CLOEXEC == 0 {
        // SAFETY: changes a flag of a descriptor of ours.
        unsafe { next::fcntl(fd, libc::F_SETFD, std::ptr::null_mut()) };
    }
}

/// The flags of open(2) that fopen(3) means by `mode`.
fn flags_of(mode: &[u8]) -> c_int {
    let access = match (mode.first(), mode.contains(&b'+')) {
        (_, true) => libc::O_RDWR,
        (Some(b'r'), _) => libc::O_RDONLY,
        _ => libc::O_WRONLY,
    };
    access | if mode.contains(&b'e') { libc::O_CLOEXEC } else { 0 }
}

/// fopen(3) of one of our files.
///
/// # Safety
///
/// The arguments of fopen(3).
unsafe fn answer_stream(path: *const c_char, mode: *const c_char) -> Option<*mut FILE> {
    // SAFETY: the caller's promise.
    unsafe {
        let flags = flags_of(CStr::from_ptr(mode).to_bytes());
        let fd = answer(AT_FDCWD, path, flags)?;
        Some(if fd < 0 { std::ptr::null_mut() } else { libc::fdopen(fd, mode) })
    }
}

interpose! {
    fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
        // SAFETY: the client's arguments, here and below.
        unsafe { answer(AT_FDCWD, path, flags).unwrap_or_else(|| next::open(path, flags, mode)) }
    }

    fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
        // SAFETY: as above.
        unsafe { answer(AT_FDCWD, path, flags).unwrap_or_else(|| next::open64(path, flags, mode)) }
    }

    fn __open_2(path: *const c_char, flags: c_int) -> c_int {
        // SAFETY: as above.
        unsafe { answer(AT_FDCWD, path, flags).unwrap_or_else(|| next::__open_2(path, flags)) }
    }

    fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
        // SAFETY: as above.
        unsafe { answer(AT_FDCWD, path, flags).unwrap_or_else(|| next::__open64_2(path, flags)) }
    }

    fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
        // SAFETY: as above.
        unsafe { answer(dir, path, flags).unwrap_or_else(|| next::openat(dir, path, flags, mode)) }
    }

    fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
        // SAFETY: as above.
        unsafe { answer(dir, path, flags).unwrap_or_else(|| next::openat64(dir, path, flags, mode)) }
    }

    fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
        // SAFETY: as above.
        unsafe { answer(dir, path, flags).unwrap_or_else(|| next::__openat_2(dir, path, flags)) }
    }

    fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
        // SAFETY: as above.
        unsafe { answer(dir, path, flags).unwrap_or_else(|| next::__openat64_2(dir, path, flags)) }
    }

    fn fopen(path: *const c_char, mode: *const c_char) -> *mut FILE {
        // SAFETY: as above.
        unsafe { answer_stream(path, mode).unwrap_or_else(|| next::fopen(path, mode)) }
    }

    fn fopen64(path: *const c_char, mode: *const c_char) -> *mut FILE {
        // SAFETY: as above.
        unsafe { answer_stream(path, mode).unwrap_or_else(|| next::fopen64(path, mode)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_of_streams() {
        assert_eq!(flags_of(b"r"), libc::O_RDONLY);
        assert_eq!(flags_of(b"re"), libc::O_RDONLY | libc::O_CLOEXEC);
        assert_eq!(flags_of(b"r+b"), libc::O_RDWR);
        assert_eq!(flags_of(b"w"), libc::O_WRONLY);
    }
}
