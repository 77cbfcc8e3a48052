//! Memory whose pages somebody has to bring, behind a userfaultfd: for tests and benchmarks that are the client of their machine.
#![expect(unsafe_code, reason = "maps memory")]

use std::io;

use vmm::host::sys::{self, Waiter};
use vmm::host::userfaultfd::UserFaults;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// The memory.
#[derive(Debug)]
pub struct LazyMemory {
    host: u64,
    size: usize,
    faults: UserFaults,
}

impl LazyMemory {
    /// `size` bytes, registered.
    ///
    /// # Errors
    ///
    /// Nobody may have a userfaultfd, or there is no memory.
    pub fn new(size: usize) -> io::Result<LazyMemory> {
        let faults = UserFaults::new()?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping.
        let host = unsafe {
            libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if host == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = LazyMemory { host: host as u64, size, faults };
        memory.faults.register(memory.host, size as u64)?;
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

    fn address(&self, page: u64) -> u64 {
        self.host + page * PAGE as u64
    }

    /// Waits until somebody waits for a page: its number.
    ///
    /// # Errors
    ///
    /// The descriptor cannot be read.
    pub fn next(&self) -> io::Result<u64> {
        loop {
            if let Some(address) = self.faults.next()? {
                return Ok((address - self.host) / PAGE as u64);
            }
            sys::poll(&mut [Waiter::read(&self.faults)], None)?;
        }
    }

    /// Brings a page. One that is there already stays.
    ///
    /// # Errors
    ///
    /// It cannot be had.
    pub fn bring(&self, page: u64, content: &[u8; PAGE]) -> io::Result<()> {
        self.faults.bring(self.address(page), Some(content))
    }

    /// From now on whoever touches the page gets SIGBUS, as where memory has failed.
    ///
    /// # Errors
    ///
    /// The host is older than Linux 6.6.
    pub fn poison(&self, page: u64) -> io::Result<()> {
        self.faults.poison(self.address(page))
    }
}

impl Drop for LazyMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which the VM is done with.
        unsafe { libc::munmap(self.host as *mut libc::c_void, self.size) };
    }
}
