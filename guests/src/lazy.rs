//! Memory whose pages somebody has to bring, behind a userfaultfd (include/uapi/linux/userfaultfd.h): for tests and benchmarks that are the
//! client of their machine.
#![expect(unsafe_code, reason = "maps memory, and serves its faults")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};

/// Bytes of a page.
pub const PAGE: usize = 4096;

const USER_MODE_ONLY: libc::c_int = 1;
const API: libc::c_ulong = 0xc018_aa3f;
const REGISTER: libc::c_ulong = 0xc020_aa00;
const COPY: libc::c_ulong = 0xc028_aa03;
const POISON: libc::c_ulong = 0xc020_aa08;
const MODE_MISSING: u64 = 1;

/// The memory.
#[derive(Debug)]
pub struct LazyMemory {
    host: u64,
    size: usize,
    faults: File,
}

impl LazyMemory {
    /// `size` bytes, registered.
    ///
    /// # Errors
    ///
    /// Nobody may have a userfaultfd, or there is no memory.
    pub fn new(size: usize) -> io::Result<LazyMemory> {
        let (rw, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        // SAFETY: a new mapping, and a descriptor that is nobody else's.
        let (host, faults) = unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, USER_MODE_ONLY | libc::O_CLOEXEC) as libc::c_int;
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let faults = File::from_raw_fd(fd);
            let host = libc::mmap(std::ptr::null_mut(), size, rw, flags, -1, 0);
            if host == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            (host as u64, faults)
        };
        let memory = LazyMemory { host, size, faults };
        memory.call(API, &mut [0xaa, 0, 0])?;
        memory.call(REGISTER, &mut [host, size as u64, MODE_MISSING, 0])?;
        Ok(memory)
    }

    /// Its address.
    pub fn host(&self) -> u64 {
        self.host
    }

    /// Its bytes.
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    fn call(&self, number: libc::c_ulong, structure: &mut [u64]) -> io::Result<()> {
        // SAFETY: each structure has the length that its number says.
        match unsafe { libc::ioctl(self.faults.as_raw_fd(), number, structure.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Waits until somebody waits for a page: its number.
    ///
    /// # Errors
    ///
    /// The descriptor cannot be read.
    pub fn next(&self) -> io::Result<u64> {
        let mut message = [0; 32];
        (&self.faults).read_exact(&mut message)?;
        let address = u64::from_le_bytes(std::array::from_fn(|i| message[16 + i]));
        Ok((address - self.host) / PAGE as u64)
    }

    /// Brings a page. One that is there already stays.
    ///
    /// # Errors
    ///
    /// It cannot be had.
    pub fn bring(&self, page: u64, content: &[u8; PAGE]) -> io::Result<()> {
        let to = self.host + page * PAGE as u64;
        match self.call(COPY, &mut [to, content.as_ptr() as u64, PAGE as u64, 0, 0]) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            result => result,
        }
    }

    /// From now on whoever touches the page gets SIGBUS, as where memory has failed.
    ///
    /// # Errors
    ///
    /// The host is older than Linux 6.6.
    pub fn poison(&self, page: u64) -> io::Result<()> {
        self.call(POISON, &mut [self.host + page * PAGE as u64, PAGE as u64, 0, 0])
    }
}

impl Drop for LazyMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which the VM is done with.
        unsafe { libc::munmap(self.host as *mut libc::c_void, self.size) };
    }
}
