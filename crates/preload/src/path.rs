//! Paths of files that we answer for.
#![expect(unsafe_code, reason = "the client's strings")]

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use abi::Errno;
use hypervisor::modules::{self, Module};
use libc::{c_char, c_int};

use crate::process;

/// The device.
const KVM: &[u8] = b"/dev/kvm\0";
/// The device, as seen from its directory.
const RELATIVE: &[u8] = b"kvm\0";
/// Modules whose parameters we answer for begin with this.
const MODULES: &[u8] = b"/sys/module/kvm";
/// The host kernel's sysctl that concerns guests. Clients read it; it is set as a parameter of the host.
const MITIGATE: &[u8] = b"/proc/sys/kernel/split_lock_mitigate\0";

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    /// `/dev/kvm`.
    Kvm,
    /// A file below `/sys/module`, or a sysctl, with what it says.
    Parameter(String),
    /// A directory there.
    Directory,
    /// Nothing, whatever the host has there.
    Absent,
}

impl Special {
    /// Whether it is there, and may be used in the ways of `mode` (access(2)).
    pub(crate) fn access(&self, mode: c_int) -> Result<(), Errno> {
        let refused = match self {
            Special::Kvm => libc::X_OK,
            Special::Parameter(_) => libc::W_OK | libc::X_OK,
            Special::Directory => libc::W_OK,
            Special::Absent => return Err(Errno::NOENT),
        };
        if mode & refused != 0 { Err(Errno(libc::EACCES)) } else { Ok(()) }
    }
}

/// Whether a client's string begins with `text`; nothing is read of it after the first byte that differs.
///
/// # Safety
///
/// `path` points to a string.
unsafe fn begins(path: *const c_char, text: &[u8]) -> bool {
    // SAFETY: no byte is read after one that differs, and so none after the string's end.
    text.iter().enumerate().all(|(i, byte)| unsafe { *path.add(i).cast::<u8>() } == *byte)
}

/// Whether [`special`] is worth asking: no more than a few bytes are looked at.
///
/// # Safety
///
/// `path` is null or points to a string.
#[inline]
pub(crate) unsafe fn may_be_special(path: *const c_char) -> bool {
    // SAFETY: the caller's promise.
    let begins = |text| unsafe { begins(path, text) };
    !path.is_null() && (begins(KVM) || begins(RELATIVE) || begins(MODULES) || begins(MITIGATE))
}

/// What we have at `path`, relative to the directory `dir`; `None` if it is none of our business.
///
/// # Safety
///
/// `path` is null or points to a string.
pub(crate) unsafe fn special(dir: c_int, path: *const c_char) -> Option<Special> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    unsafe {
        if begins(path, KVM) || begins(path, RELATIVE) && is_dev(dir) {
            Some(Special::Kvm)
        } else if begins(path, MODULES) {
            below_modules(CStr::from_ptr(path.add(b"/sys/module/".len())).to_bytes())
        } else if begins(path, MITIGATE) {
            let on = process::system().ok()?.split_lock_mitigate();
            Some(Special::Parameter(format!("{}\n", u8::from(on))))
        } else {
            None
        }
    }
}

/// Whether a directory's descriptor, or AT_FDCWD, is `/dev`.
fn is_dev(dir: c_int) -> bool {
    let link = if dir == libc::AT_FDCWD { "/proc/self/cwd".into() } else { format!("/proc/self/fd/{dir}") };
    std::fs::read_link(link).is_ok_and(|target| target == Path::new("/dev"))
}

fn below_modules(path: &[u8]) -> Option<Special> {
    let mut parts = path.split(|&byte| byte == b'/').filter(|part| !part.is_empty());
    let module = match parts.next()? {
        b"kvm" => Module::Kvm,
        b"kvm_intel" => Module::KvmIntel,
        // The processors that we model are Intel's.
        b"kvm_amd" => return Some(Special::Absent),
        _ => return None,
    };
    match (parts.next(), parts.next(), parts.next()) {
        (None, ..) | (Some(b"parameters"), None, _) => Some(Special::Directory),
        (Some(b"parameters"), Some(name), None) => {
            let system = process::system().ok()?;
            let name = OsStr::from_bytes(name).to_str()?;
            let text = modules::parameter(&system.parameters(), module, name);
            Some(text.map_or(Special::Absent, Special::Parameter))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &CStr) -> Option<Special> {
        // SAFETY: a string.
        let (special, asked) =
            unsafe { (special(libc::AT_FDCWD, path.as_ptr()), may_be_special(path.as_ptr())) };
        assert!(asked || special.is_none());
        special
    }

    #[test]
    fn paths_that_are_ours() {
        assert_eq!(at(c"/dev/kvm"), Some(Special::Kvm));
        assert_eq!(at(c"/sys/module/kvm_intel/parameters/ept"), Some(Special::Parameter("Y\n".into())));
        assert_eq!(at(c"/sys/module/kvm/parameters"), Some(Special::Directory));
        assert_eq!(at(c"/sys/module/kvm/"), Some(Special::Directory));
        assert_eq!(at(c"/sys/module/kvm/parameters/no_such"), Some(Special::Absent));
        assert_eq!(at(c"/sys/module/kvm_amd/parameters/npt"), Some(Special::Absent));
        assert_eq!(at(c"/proc/sys/kernel/split_lock_mitigate"), Some(Special::Parameter("1\n".into())));
        for other in [
            c"",
            c"/proc/sys/kernel/split_lock",
            c"/proc/sys/kernel/split_lock_mitigate2",
            c"/dev/kv",
            c"/dev/kvm2",
            c"kvm",
            c"/sys/module/kvmgt",
            c"/dev/null",
        ] {
            assert_eq!(at(other), None, "{other:?}");
        }
        let dev = std::fs::File::open("/dev").unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&dev);
        // SAFETY: a string.
        assert_eq!(unsafe { special(fd, c"kvm".as_ptr()) }, Some(Special::Kvm));
    }

    #[test]
    fn nothing_is_written_to_parameters() {
        let parameter = Special::Parameter(String::new());
        assert_eq!(parameter.access(libc::R_OK), Ok(()));
        assert_eq!(parameter.access(libc::W_OK), Err(Errno(libc::EACCES)));
        assert_eq!(Special::Kvm.access(libc::R_OK | libc::W_OK), Ok(()));
        assert_eq!(Special::Absent.access(libc::F_OK), Err(Errno::NOENT));
    }
}
