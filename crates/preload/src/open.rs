//! Opening files: `/dev/kvm`.
#![expect(unsafe_code, reason = "functions of the C library's")]

use std::ffi::CStr;
use std::panic::{AssertUnwindSafe, catch_unwind};

use abi::Errno;
use libc::{c_char, c_int, mode_t};

use crate::thread::Inside;
use crate::{interpose, next, process, raw};

/// A file that we answer for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    /// `/dev/kvm`.
    Kvm,
}

/// The path's bytes as far as they agree with one of ours: whoever asks for something else has no more of it read.
///
/// # Safety
///
/// `path` is null or points to a string.
unsafe fn special(path: *const c_char) -> Option<Special> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller's promise; no byte is read after the first that differs, and so none after the end.
    let is = |text: &CStr| unsafe {
        text.to_bytes_with_nul().iter().enumerate().all(|(i, byte)| *path.add(i).cast::<u8>() == *byte)
    };
    is(c"/dev/kvm").then_some(Special::Kvm)
}

/// Answers an open of one of our files; `None`: somebody else's file.
///
/// # Safety
///
/// `path` is null or points to a string.
unsafe fn answer(path: *const c_char, flags: c_int) -> Option<c_int> {
    // SAFETY: the caller's promise.
    let special = unsafe { special(path)? };
    let inside = Inside::enter();
    let open = || match special {
        Special::Kvm => process::open_system(flags),
    };
    let result = catch_unwind(AssertUnwindSafe(open)).unwrap_or(Err(Errno::IO));
    inside.leave();
    Some(result.unwrap_or_else(|errno| {
        raw::set_errno(errno.0);
        -1
    }))
}

/// Gives a new descriptor what the client's flags ask for.
pub(crate) fn apply_flags(fd: c_int, flags: c_int) {
    let descriptor_flags = if flags & libc::O_CLOEXEC != 0 { libc::FD_CLOEXEC } else { 0 };
    // SAFETY: changes flags of a descriptor of ours.
    unsafe { next::fcntl(fd, libc::F_SETFD, descriptor_flags as usize as *mut _) };
}

macro_rules! opens {
    ($(fn $name:ident($($argument:ident: $type:ty),*);)*) => {
        interpose! {$(
            fn $name($($argument: $type),*) -> c_int {
                // SAFETY: the client's arguments, as it gave them.
                unsafe { opens!(@path $($argument)*).unwrap_or_else(|| next::$name($($argument),*)) }
            }
        )*}
    };
    (@path $path:ident $flags:ident $($mode:ident)?) => { answer($path, $flags) };
}

opens! {
    fn open(path: *const c_char, flags: c_int, mode: mode_t);
    fn open64(path: *const c_char, flags: c_int, mode: mode_t);
    fn __open_2(path: *const c_char, flags: c_int);
    fn __open64_2(path: *const c_char, flags: c_int);
}

interpose! {
    fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
        // SAFETY: the client's arguments, as it gave them.
        unsafe { answer(path, flags).unwrap_or_else(|| next::openat(dir, path, flags, mode)) }
    }

    fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
        // SAFETY: as above.
        unsafe { answer(path, flags).unwrap_or_else(|| next::openat64(dir, path, flags, mode)) }
    }

    fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
        // SAFETY: as above.
        unsafe { answer(path, flags).unwrap_or_else(|| next::__openat_2(dir, path, flags)) }
    }

    fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
        // SAFETY: as above.
        unsafe { answer(path, flags).unwrap_or_else(|| next::__openat64_2(dir, path, flags)) }
    }
}
