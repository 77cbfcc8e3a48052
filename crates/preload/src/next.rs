//! The functions that we put ourselves in front of, as the rest of the process has them.
#![expect(unsafe_code, reason = "calls of functions found by dlsym(3)")]

use std::ffi::CStr;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{
    FILE, c_char, c_int, c_uint, c_ulong, c_void, mode_t, msghdr, off_t, pthread_t, size_t, ssize_t,
    stat as Stat, statx as Statx,
};

/// A function found by name, behind this library in the search order.
struct Symbol {
    name: &'static CStr,
    address: AtomicPtr<c_void>,
}

impl Symbol {
    const fn new(name: &'static CStr) -> Symbol {
        Symbol { name, address: AtomicPtr::new(std::ptr::null_mut()) }
    }

    #[inline(always)]
    fn address(&self) -> *mut c_void {
        let address = self.address.load(Ordering::Relaxed);
        if address.is_null() { self.find() } else { address }
    }

    #[cold]
    fn find(&self) -> *mut c_void {
        // SAFETY: strings end with zero bytes. Functions that new programs are not linked with any more are found
        // by version only.
        let address = unsafe {
            let newest = libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr());
            if newest.is_null() {
                libc::dlvsym(libc::RTLD_NEXT, self.name.as_ptr(), c"GLIBC_2.2.5".as_ptr())
            } else {
                newest
            }
        };
        self.address.store(address, Ordering::Relaxed);
        address
    }
}

/// `fn name(arguments) -> result, value-if-there-is-none;`
macro_rules! functions {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $result:ty, $missing:expr;)*) => {$(
        /// The function of this name; ENOSYS if there is none.
        ///
        /// # Safety
        ///
        /// As for the C library's.
        #[inline]
        pub(crate) unsafe fn $name($($argument: $type),*) -> $result {
            static SYMBOL: Symbol = Symbol::new(match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => c"",
            });
            let address = SYMBOL.address();
            if address.is_null() {
                crate::raw::set_errno(libc::ENOSYS);
                return $missing;
            }
            // SAFETY: a function of that name has this signature; variadic ones take their arguments in the same
            // registers.
            unsafe {
                let function: unsafe extern "C-unwind" fn($($type),*) -> $result = std::mem::transmute(address);
                function($($argument),*)
            }
        }
    )*};
}

functions! {
    fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int, -1;
    fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int, -1;
    fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int, -1;
    fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int, -1;
    fn __open_2(path: *const c_char, flags: c_int) -> c_int, -1;
    fn __open64_2(path: *const c_char, flags: c_int) -> c_int, -1;
    fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int, -1;
    fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int, -1;

    fn fopen(path: *const c_char, mode: *const c_char) -> *mut FILE, std::ptr::null_mut();
    fn fopen64(path: *const c_char, mode: *const c_char) -> *mut FILE, std::ptr::null_mut();

    fn stat(path: *const c_char, out: *mut Stat) -> c_int, -1;
    fn stat64(path: *const c_char, out: *mut Stat) -> c_int, -1;
    fn lstat(path: *const c_char, out: *mut Stat) -> c_int, -1;
    fn lstat64(path: *const c_char, out: *mut Stat) -> c_int, -1;
    fn fstat(fd: c_int, out: *mut Stat) -> c_int, -1;
    fn fstat64(fd: c_int, out: *mut Stat) -> c_int, -1;
    fn fstatat(dir: c_int, path: *const c_char, out: *mut Stat, flags: c_int) -> c_int, -1;
    fn fstatat64(dir: c_int, path: *const c_char, out: *mut Stat, flags: c_int) -> c_int, -1;
    fn __xstat(version: c_int, path: *const c_char, out: *mut Stat) -> c_int, -1;
    fn __xstat64(version: c_int, path: *const c_char, out: *mut Stat) -> c_int, -1;
    fn __lxstat(version: c_int, path: *const c_char, out: *mut Stat) -> c_int, -1;
    fn __lxstat64(version: c_int, path: *const c_char, out: *mut Stat) -> c_int, -1;
    fn __fxstat(version: c_int, fd: c_int, out: *mut Stat) -> c_int, -1;
    fn __fxstat64(version: c_int, fd: c_int, out: *mut Stat) -> c_int, -1;
    fn __fxstatat(version: c_int, dir: c_int, path: *const c_char, out: *mut Stat, flags: c_int) -> c_int, -1;
    fn __fxstatat64(version: c_int, dir: c_int, path: *const c_char, out: *mut Stat, flags: c_int) -> c_int, -1;
    fn statx(dir: c_int, path: *const c_char, flags: c_int, mask: c_uint, out: *mut Statx) -> c_int, -1;
    fn access(path: *const c_char, mode: c_int) -> c_int, -1;
    fn eaccess(path: *const c_char, mode: c_int) -> c_int, -1;
    fn euidaccess(path: *const c_char, mode: c_int) -> c_int, -1;
    fn faccessat(dir: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int, -1;

    fn ioctl(fd: c_int, number: c_ulong, argument: *mut c_void) -> c_int, -1;

    fn close(fd: c_int) -> c_int, -1;
    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int, -1;
    fn dup(fd: c_int) -> c_int, -1;
    fn dup2(from: c_int, to: c_int) -> c_int, -1;
    fn dup3(from: c_int, to: c_int, flags: c_int) -> c_int, -1;
    fn fcntl(fd: c_int, command: c_int, argument: *mut c_void) -> c_int, -1;
    fn fcntl64(fd: c_int, command: c_int, argument: *mut c_void) -> c_int, -1;

    fn mmap(
        address: *mut c_void,
        length: size_t,
        protection: c_int,
        flags: c_int,
        fd: c_int,
        offset: off_t,
    ) -> *mut c_void, libc::MAP_FAILED;
    fn mmap64(
        address: *mut c_void,
        length: size_t,
        protection: c_int,
        flags: c_int,
        fd: c_int,
        offset: off_t,
    ) -> *mut c_void, libc::MAP_FAILED;

    fn sendmsg(socket: c_int, message: *const msghdr, flags: c_int) -> ssize_t, -1;

    fn sigaction(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int, -1;
    fn pthread_sigmask(how: c_int, set: *const libc::sigset_t, old: *mut libc::sigset_t) -> c_int, libc::ENOSYS;
    fn sigprocmask(how: c_int, set: *const libc::sigset_t, old: *mut libc::sigset_t) -> c_int, -1;
    fn pthread_cancel(thread: pthread_t) -> c_int, libc::ENOSYS;
    fn pthread_create(
        thread: *mut pthread_t,
        attributes: *const libc::pthread_attr_t,
        start: *mut c_void,
        argument: *mut c_void,
    ) -> c_int, libc::ENOSYS;
}
