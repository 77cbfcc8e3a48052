//! stat and access: on a machine without the device node, `/dev/kvm` is there all the same.
#![expect(unsafe_code, reason = "functions of the C library's")]

use std::ffi::CStr;

use abi::{Errno, Object};
use libc::{AT_EMPTY_PATH, AT_FDCWD, c_char, c_int, c_uint, stat as Stat, statx as Statx};

use crate::open::answered;
use crate::path::{self, Special};
use crate::{interpose, next, table, thread};

/// Major and minor number of `/dev/kvm` (kernel: `MISC_MAJOR`, `KVM_MINOR`).
const KVM_DEVICE: (u32, u32) = (10, 232);

/// Type and permissions, and the device that a node stands for.
fn mode_of(special: &Special) -> Result<(u32, (u32, u32)), Errno> {
    match special {
        Special::Kvm => Ok((libc::S_IFCHR | 0o666, KVM_DEVICE)),
        Special::Parameter(_) => Ok((libc::S_IFREG | 0o444, (0, 0))),
        Special::Directory => Ok((libc::S_IFDIR | 0o755, (0, 0))),
        Special::Absent => Err(Errno::NOENT),
    }
}

/// # Safety
///
/// `path` is null or a string, `out` has room for the structure.
unsafe fn stat_path(dir: c_int, path: *const c_char, out: *mut Stat) -> Option<c_int> {
    // SAFETY: the caller's promise.
    if !unsafe { path::may_be_special(path) } || thread::is_inside() {
        return None;
    }
    answered(|| {
        // SAFETY: the caller's promise.
        let special = unsafe { path::special(dir, path)? };
        Some(mode_of(&special).map(|(mode, (major, minor))| {
            // SAFETY: all bytes zero is a valid value.
            let mut stat: Stat = unsafe { std::mem::zeroed() };
            (stat.st_mode, stat.st_nlink, stat.st_blksize) = (mode, 1, 4096);
            stat.st_rdev = libc::makedev(major, minor);
            // SAFETY: the caller's promise.
            unsafe { out.write(stat) };
            0
        }))
    })
}

/// # Safety
///
/// As for [`stat_path`].
unsafe fn statx_path(dir: c_int, path: *const c_char, out: *mut Statx) -> Option<c_int> {
    // SAFETY: the caller's promise.
    if !unsafe { path::may_be_special(path) } || thread::is_inside() {
        return None;
    }
    answered(|| {
        // SAFETY: the caller's promise.
        let special = unsafe { path::special(dir, path)? };
        Some(mode_of(&special).map(|(mode, (major, minor))| {
            // SAFETY: all bytes zero is a valid value.
            let mut stat: Statx = unsafe { std::mem::zeroed() };
            (stat.stx_mask, stat.stx_blksize, stat.stx_nlink) = (libc::STATX_BASIC_STATS, 4096, 1);
            (stat.stx_mode, stat.stx_rdev_major, stat.stx_rdev_minor) = (mode as u16, major, minor);
            // SAFETY: the caller's promise.
            unsafe { out.write(stat) };
            0
        }))
    })
}

/// Whether a descriptor is one of `/dev/kvm`.
fn is_system(fd: c_int) -> bool {
    !thread::is_inside()
        && table::is_ours(fd)
        && answered(|| {
            let system = table::verify(fd).is_some_and(|entry| matches!(entry.object, Object::System(_)));
            Some(Ok(system.into()))
        }) == Some(1)
}

/// Says of a descriptor of `/dev/kvm` that it is a device's.
///
/// # Safety
///
/// `out` has been filled in if `result` is 0.
unsafe fn correct(fd: c_int, result: c_int, out: *mut Stat) -> c_int {
    if result == 0 && is_system(fd) {
        // SAFETY: the caller's promise.
        unsafe {
            (*out).st_mode = libc::S_IFCHR | 0o666;
            (*out).st_rdev = libc::makedev(KVM_DEVICE.0, KVM_DEVICE.1);
        }
    }
    result
}

/// # Safety
///
/// `path` is null or a string.
unsafe fn access_path(dir: c_int, path: *const c_char, mode: c_int) -> Option<c_int> {
    // SAFETY: the caller's promise.
    if !unsafe { path::may_be_special(path) } || thread::is_inside() {
        return None;
    }
    // SAFETY: the caller's promise.
    answered(|| Some(unsafe { path::special(dir, path)? }.access(mode).map(|()| 0)))
}

/// Whether a call is about the descriptor itself.
///
/// # Safety
///
/// `path` is null or a string.
unsafe fn is_about_descriptor(path: *const c_char, flags: c_int) -> bool {
    // SAFETY: the caller's promise.
    flags & AT_EMPTY_PATH != 0 && (path.is_null() || unsafe { CStr::from_ptr(path) }.is_empty())
}

macro_rules! stat_by_path {
    ($($name:ident $versioned:ident)*) => {
        interpose! {$(
            fn $name(path: *const c_char, out: *mut Stat) -> c_int {
                // SAFETY: the client's arguments.
                unsafe { stat_path(AT_FDCWD, path, out).unwrap_or_else(|| next::$name(path, out)) }
            }

            fn $versioned(version: c_int, path: *const c_char, out: *mut Stat) -> c_int {
                // SAFETY: the client's arguments. There is one version on this architecture.
                unsafe { stat_path(AT_FDCWD, path, out).unwrap_or_else(|| next::$versioned(version, path, out)) }
            }
        )*}
    };
}

macro_rules! stat_by_descriptor {
    ($($name:ident $versioned:ident)*) => {
        interpose! {$(
            fn $name(fd: c_int, out: *mut Stat) -> c_int {
                // SAFETY: the client's arguments.
                unsafe { correct(fd, next::$name(fd, out), out) }
            }

            fn $versioned(version: c_int, fd: c_int, out: *mut Stat) -> c_int {
                // SAFETY: the client's arguments.
                unsafe { correct(fd, next::$versioned(version, fd, out), out) }
            }
        )*}
    };
}

macro_rules! stat_at {
    ($($name:ident $versioned:ident)*) => {
        interpose! {$(
            fn $name(dir: c_int, path: *const c_char, out: *mut Stat, flags: c_int) -> c_int {
                // SAFETY: the client's arguments.
                unsafe {
                    stat_path(dir, path, out).unwrap_or_else(|| {
                        let result = next::$name(dir, path, out, flags);
                        if is_about_descriptor(path, flags) { correct(dir, result, out) } else { result }
                    })
                }
            }

            fn $versioned(version: c_int, dir: c_int, path: *const c_char, out: *mut Stat, flags: c_int) -> c_int {
                // SAFETY: the client's arguments.
                unsafe {
                    let other = || next::$versioned(version, dir, path, out, flags);
                    stat_path(dir, path, out).unwrap_or_else(other)
                }
            }
        )*}
    };
}

stat_by_path! { stat __xstat stat64 __xstat64 lstat __lxstat lstat64 __lxstat64 }
stat_by_descriptor! { fstat __fxstat fstat64 __fxstat64 }
stat_at! { fstatat __fxstatat fstatat64 __fxstatat64 }

interpose! {
    fn statx(dir: c_int, path: *const c_char, flags: c_int, mask: c_uint, out: *mut Statx) -> c_int {
        // SAFETY: the client's arguments, here and below.
        unsafe {
            statx_path(dir, path, out).unwrap_or_else(|| {
                let result = next::statx(dir, path, flags, mask, out);
                if result == 0 && is_about_descriptor(path, flags) && is_system(dir) {
                    (*out).stx_mode = (libc::S_IFCHR | 0o666) as u16;
                    ((*out).stx_rdev_major, (*out).stx_rdev_minor) = KVM_DEVICE;
                }
                result
            })
        }
    }

    fn access(path: *const c_char, mode: c_int) -> c_int {
        // SAFETY: as above.
        unsafe { access_path(AT_FDCWD, path, mode).unwrap_or_else(|| next::access(path, mode)) }
    }

    fn eaccess(path: *const c_char, mode: c_int) -> c_int {
        // SAFETY: as above.
        unsafe { access_path(AT_FDCWD, path, mode).unwrap_or_else(|| next::eaccess(path, mode)) }
    }

    fn euidaccess(path: *const c_char, mode: c_int) -> c_int {
        // SAFETY: as above.
        unsafe { access_path(AT_FDCWD, path, mode).unwrap_or_else(|| next::euidaccess(path, mode)) }
    }

    fn faccessat(dir: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int {
        // SAFETY: as above.
        unsafe { access_path(dir, path, mode).unwrap_or_else(|| next::faccessat(dir, path, mode, flags)) }
    }
}
