//! mmap of a vCPU: what its mappings may not be. All others are the host kernel's affair.
#![expect(unsafe_code, reason = "functions of the C library's")]

use abi::Object;
use libc::{c_int, c_void, off_t, size_t};

use crate::{interpose, next, raw, table, thread};

/// Whether a mapping is of the part of a vCPU that must be shared and not executable.
fn refused(fd: c_int, offset: off_t, length: size_t, protection: c_int, flags: c_int) -> bool {
    let shared = flags & (libc::MAP_SHARED | libc::MAP_PRIVATE) == libc::MAP_SHARED;
    let executable = protection & libc::PROT_EXEC != 0;
    if fd < 0 || flags & libc::MAP_ANONYMOUS != 0 || shared && !executable || thread::is_inside() {
        return false;
    }
    let entry = table::find(fd);
    match entry.as_ref().map(|entry| &entry.object) {
        Some(Object::Vcpu(vcpu)) => vcpu.has_dirty_ring(offset, length),
        _ => false,
    }
}

/// MAP_FAILED with EINVAL.
fn invalid() -> *mut c_void {
    raw::set_errno(libc::EINVAL);
    libc::MAP_FAILED
}

interpose! {
    fn mmap(address: *mut c_void, length: size_t, protection: c_int, flags: c_int, fd: c_int, offset: off_t) -> *mut c_void {
        if refused(fd, offset, length, protection, flags) {
            return invalid();
        }
        // SAFETY: the client's arguments.
        unsafe { next::mmap(address, length, protection, flags, fd, offset) }
    }

    fn mmap64(address: *mut c_void, length: size_t, protection: c_int, flags: c_int, fd: c_int, offset: off_t) -> *mut c_void {
        if refused(fd, offset, length, protection, flags) {
            return invalid();
        }
        // SAFETY: the client's arguments.
        unsafe { next::mmap64(address, length, protection, flags, fd, offset) }
    }
}
