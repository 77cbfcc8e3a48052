//! userfaultfd(2): serving the page faults of our own memory (include/uapi/linux/userfaultfd.h).
#![expect(unsafe_code, reason = "ioctls, and the memory that they are about")]

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use crate::memory::PAGE_SIZE;

const USER_MODE_ONLY: libc::c_int = 1;
/// USERFAULTFD_IOC_NEW of /dev/userfaultfd.
const NEW: libc::c_ulong = 0xaa00;
const API: libc::c_ulong = 0xc018_aa3f;
const REGISTER: libc::c_ulong = 0xc020_aa00;
const UNREGISTER: libc::c_ulong = 0x8010_aa01;
const WAKE: libc::c_ulong = 0x8010_aa02;
const COPY: libc::c_ulong = 0xc028_aa03;
const ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const POISON: libc::c_ulong = 0xc020_aa08;

/// `uffdio_api.api`.
const VERSION: u64 = 0xaa;
const FEATURE_WP: u64 = 1 << 0;
const FEATURE_POISON: u64 = 1 << 14;
const REGISTER_MISSING: u64 = 1 << 0;
const REGISTER_WP: u64 = 1 << 1;
const PROTECT: u64 = 1 << 0;
/// `uffd_msg.event`, and the flag of `uffd_msg.arg.pagefault` for writes to protected pages.
const EVENT_PAGEFAULT: u8 = 0x12;
const FLAG_WP: u64 = 1 << 1;
/// Bytes of `struct uffd_msg`.
const MESSAGE: usize = 32;

/// A descriptor that tells of faults. Nobody waits in its calls.
#[derive(Debug)]
pub struct UserFaults {
    file: File,
    poisons: bool,
    /// Faults of system calls are served, too.
    serves_kernel: bool,
}

impl UserFaults {
    /// A new descriptor: one that serves system calls, too, if we may have that.
    pub fn new() -> io::Result<UserFaults> {
        let (file, serves_kernel) = match create(0).or_else(|_| from_device()) {
            Ok(file) => (file, true),
            Err(_) => (create(USER_MODE_ONLY)?, false),
        };
        let poisons = call(&file, API, &mut [VERSION, FEATURE_WP | FEATURE_POISON, 0]).is_ok();
        if !poisons {
            call(&file, API, &mut [VERSION, FEATURE_WP, 0])?;
        }
        Ok(UserFaults { file, poisons, serves_kernel })
    }

    /// Whether [`UserFaults::poison`] is possible.
    pub fn poisons(&self) -> bool {
        self.poisons
    }

    /// Whether system calls wait for pages, in place of failing.
    pub fn serves_kernel(&self) -> bool {
        self.serves_kernel
    }

    /// From now on whoever accesses a missing page of the range, or writes to a protected one, waits for us.
    pub fn register(&self, start: u64, length: u64) -> io::Result<()> {
        call(&self.file, REGISTER, &mut [start, length, REGISTER_MISSING | REGISTER_WP, 0])
    }

    /// Nobody waits for pages of the range any more: missing ones are zeroes.
    pub fn unregister(&self, start: u64, length: u64) -> io::Result<()> {
        call(&self.file, UNREGISTER, &mut [start, length])
    }

    /// The page of the next access to a missing one; `None`: there is none now.
    pub fn next(&self) -> io::Result<Option<u64>> {
        let mut message = [0; MESSAGE];
        loop {
            match (&self.file).read(&mut message) {
                Ok(MESSAGE) => {}
                Ok(_) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let word = |at: usize| message[at..at + 8].iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
            let (flags, address) = (word(8), word(16));
            // Who writes to a protected page is woken by whoever has protected it.
            if message[0] == EVENT_PAGEFAULT && flags & FLAG_WP == 0 {
                return Ok(Some(address / PAGE_SIZE * PAGE_SIZE));
            }
        }
    }

    /// Brings a page with `content`, or zeroes, and wakes who waits for it. One that is there stays as it is.
    pub fn bring(&self, page: u64, content: Option<&[u8]>) -> io::Result<()> {
        let done = match content {
            Some(content) if content.len() as u64 != PAGE_SIZE => {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            Some(content) => call(&self.file, COPY, &mut [page, content.as_ptr() as u64, PAGE_SIZE, 0, 0]),
            None => call(&self.file, ZEROPAGE, &mut [page, PAGE_SIZE, 0, 0]),
        };
        match done {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                call(&self.file, WAKE, &mut [page, PAGE_SIZE])
            }
            other => other,
        }
    }

    /// Whoever writes to the range waits, until it is allowed again.
    pub fn protect(&self, start: u64, length: u64) -> io::Result<()> {
        call(&self.file, WRITEPROTECT, &mut [start, length, PROTECT])
    }

    /// Allows writes again, and wakes who waits.
    pub fn unprotect(&self, start: u64, length: u64) -> io::Result<()> {
        call(&self.file, WRITEPROTECT, &mut [start, length, 0])
    }

    /// Makes a missing page one whose memory has failed.
    pub fn poison(&self, page: u64) -> io::Result<()> {
        call(&self.file, POISON, &mut [page, PAGE_SIZE, 0, 0])
    }
}

impl AsRawFd for UserFaults {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn create(flags: libc::c_int) -> io::Result<File> {
    // SAFETY: the descriptor is nobody else's.
    unsafe { descriptor(libc::syscall(libc::SYS_userfaultfd, flags | libc::O_CLOEXEC | libc::O_NONBLOCK)) }
}

fn from_device() -> io::Result<File> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: the call takes flags and gives a descriptor, which is nobody else's.
    unsafe { descriptor(libc::ioctl(device.as_raw_fd(), NEW, libc::O_CLOEXEC | libc::O_NONBLOCK).into()) }
}

/// # Safety
///
/// If `result` is a descriptor nobody else has it.
unsafe fn descriptor(result: libc::c_long) -> io::Result<File> {
    match libc::c_int::try_from(result) {
        // SAFETY: the caller's promise.
        Ok(fd) if fd >= 0 => Ok(unsafe { File::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn call(file: &File, number: libc::c_ulong, structure: &mut [u64]) -> io::Result<()> {
    debug_assert_eq!(structure.len() as u64 * 8, u64::from(number as u32 >> 16 & 0x3fff));
    // SAFETY: the structure has the length that the number says. What the calls do to memory they do to missing pages, or have
    // accesses wait.
    match unsafe { libc::ioctl(file.as_raw_fd(), number, structure.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Which pages of the range are in memory: one byte each, of which bit 0 counts.
pub fn resident(start: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut there = vec![0; length.div_ceil(PAGE_SIZE) as usize];
    // SAFETY: no memory is accessed but the bytes for the answer, one for each page.
    match unsafe { libc::mincore(start as *mut libc::c_void, length as usize, there.as_mut_ptr()) } {
        0 => Ok(there),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has every page of the range that was never written be a page of zeroes that is there.
pub fn populate(start: u64, length: u64) -> io::Result<()> {
    // SAFETY: changes no byte.
    match unsafe { libc::madvise(start as *mut libc::c_void, length as usize, libc::MADV_POPULATE_READ) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Drops the pages of a range: they are missing.
///
/// # Safety
///
/// The range is memory whose contents are accessed only in ways that allow for any change of them, as a guest's are.
pub unsafe fn discard(start: u64, length: u64) -> io::Result<()> {
    // SAFETY: the caller's promise.
    match unsafe { libc::madvise(start as *mut libc::c_void, length as usize, libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
