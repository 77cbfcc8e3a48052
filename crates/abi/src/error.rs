//! Error numbers, as the kernel's ioctls return them.

use std::fmt;

/// A positive errno value (`EINVAL`, …) that goes to the client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// A pointer leads outside of the client's memory.
    pub const FAULT: Errno = Errno(libc::EFAULT);
    /// The arguments make no sense.
    pub const INVALID: Errno = Errno(libc::EINVAL);
    /// The ioctl does not exist on this object.
    pub const NOTTY: Errno = Errno(libc::ENOTTY);
    /// A structure of the client is too small, or its table too large.
    pub const TOO_BIG: Errno = Errno(libc::E2BIG);
    /// There is no such attribute, or the object that the call needs is missing.
    pub const NXIO: Errno = Errno(libc::ENXIO);
    /// The object exists already.
    pub const EXISTS: Errno = Errno(libc::EEXIST);
    /// There is no such entry.
    pub const NOENT: Errno = Errno(libc::ENOENT);
    /// A signal or `immediate_exit` ended the call.
    pub const INTERRUPTED: Errno = Errno(libc::EINTR);
    /// Try again: nothing was done.
    pub const AGAIN: Errno = Errno(libc::EAGAIN);
    /// The object belongs to another process, or its VM is dead.
    pub const IO: Errno = Errno(libc::EIO);
    /// The host has no memory for it.
    pub const NO_MEMORY: Errno = Errno(libc::ENOMEM);
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

impl From<hypervisor::Error> for Errno {
    fn from(error: hypervisor::Error) -> Errno {
        tracing::debug!("refused: {error}");
        Errno(error.errno())
    }
}

impl From<std::io::Error> for Errno {
    fn from(error: std::io::Error) -> Errno {
        Errno(error.raw_os_error().unwrap_or(libc::EIO))
    }
}
