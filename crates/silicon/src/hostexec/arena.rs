//! Memory that machine code is written to and run from.
//!
//! One anonymous file is mapped twice: readable and writable, and behind that, within reach of RIP-relative addresses, readable and
//! executable. No page is ever writable and executable at the same address.
#![expect(unsafe_code, reason = "maps memory and writes machine code")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

/// Pieces of code begin at multiples of this.
const ALIGN: usize = 16;

/// A bounded, append-only store of machine code, and of data that the code reads.
#[derive(Debug)]
pub(crate) struct Arena {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    size: usize,
    /// Bytes of code, from the start.
    used: usize,
    /// Where code begins that seldom runs; the arena's end, if there is none.
    far_start: usize,
    /// Where it ends.
    far_end: usize,
    /// Bytes of data, at the end.
    data: usize,
}

/// Data in an arena.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Data {
    /// Where code reads it.
    pub(crate) address: u64,
    /// Where it is written.
    pub(crate) writable: NonNull<u8>,
}

// SAFETY: the mappings belong to the arena alone and are not tied to a thread.
unsafe impl Send for Arena {}

impl Arena {
    /// An empty arena of `size` bytes, whole pages. They are only touched as stubs fill them.
    pub(crate) fn new(size: usize) -> io::Result<Arena> {
        Arena::with_far_code(size, size)
    }

    /// One whose code that seldom runs lies at `far_start` and behind, so that the other code lies close together.
    pub(crate) fn with_far_code(size: usize, far_start: usize) -> io::Result<Arena> {
        // SAFETY: the name is a NUL-terminated constant; the call touches no memory of ours.
        let fd = unsafe { libc::memfd_create(c"ring3-stubs".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and nobody else owns it.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sizes the file that we own.
        if unsafe { libc::ftruncate(file.as_raw_fd(), size as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new mapping of nothing, at an address that the kernel chooses.
        let room = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(ptr::null_mut(), 2 * size, libc::PROT_NONE, flags, -1, 0)
        };
        if room == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let room = NonNull::new(room.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: the second half of the room.
        let executable = unsafe { room.add(size) };
        let arena =
            Arena { writable: room, executable, size, used: 0, far_start, far_end: far_start, data: 0 };
        map(&file, arena.writable, size, libc::PROT_READ | libc::PROT_WRITE)?;
        map(&file, arena.executable, size, libc::PROT_READ | libc::PROT_EXEC)?;
        Ok(arena)
    }

    /// Adds `code`; the address to call, or `None` when the arena is full.
    pub(crate) fn add(&mut self, code: &[u8]) -> Option<u64> {
        let start = self.used.next_multiple_of(ALIGN);
        let end =
            start.checked_add(code.len()).filter(|&end| end <= self.far_start.min(self.size - self.data))?;
        self.write(start, code);
        self.used = end;
        Some(self.executable.as_ptr() as u64 + start as u64)
    }

    /// Likewise, `far` as code that seldom runs; the address of `code`.
    pub(crate) fn add_both(&mut self, code: &[u8], far: &[u8]) -> Option<u64> {
        let start = self.far_end.next_multiple_of(ALIGN);
        let end = start.checked_add(far.len()).filter(|&end| end <= self.size - self.data)?;
        let address = self.add(code)?;
        self.write(start, far);
        self.far_end = end;
        Some(address)
    }

    fn write(&mut self, start: usize, code: &[u8]) {
        assert!(start + code.len() <= self.size, "the caller has seen that there is room");
        // SAFETY: that lies within the writable view, and no reference to it exists.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), self.writable.as_ptr().add(start), code.len()) };
    }

    /// Replaces bytes of code wherever they are; how often they were there.
    #[cfg(test)]
    pub(crate) fn replace(&mut self, old: &[u8], new: &[u8]) -> usize {
        assert_eq!(old.len(), new.len());
        // SAFETY: the part of the writable view that code has been written to; nobody else has a reference.
        let code = unsafe { std::slice::from_raw_parts_mut(self.writable.as_ptr(), self.used) };
        let found: Vec<usize> = (0..code.len()).filter(|&at| code[at..].starts_with(old)).collect();
        found.iter().for_each(|&at| code[at..at + new.len()].copy_from_slice(new));
        found.len()
    }

    /// Where the next code that is added will be.
    pub(crate) fn next(&self) -> u64 {
        self.executable.as_ptr() as u64 + self.used.next_multiple_of(ALIGN) as u64
    }

    /// Where the next code will be that seldom runs.
    pub(crate) fn next_far(&self) -> u64 {
        self.executable.as_ptr() as u64 + self.far_end.next_multiple_of(ALIGN) as u64
    }

    /// Room for `size` bytes of data, a multiple of eight, far from all code; `None` when the arena is full.
    pub(crate) fn data(&mut self, size: usize) -> Option<Data> {
        let data = self.data.checked_add(size)?;
        let used = if self.far_end > self.far_start { self.far_end } else { self.used };
        if data > self.size - used {
            return None;
        }
        self.data = data;
        self.data_at(self.executable.as_ptr() as u64 + (self.size - data) as u64)
    }

    /// The data that code reads at `address`.
    pub(crate) fn data_at(&self, address: u64) -> Option<Data> {
        let offset = address.wrapping_sub(self.executable.as_ptr() as u64) as usize;
        let is_data = (self.size - self.data..self.size).contains(&offset);
        // SAFETY: within the writable view.
        is_data.then(|| Data { address, writable: unsafe { self.writable.add(offset) } })
    }

    /// Addresses that code has.
    pub(crate) fn range(&self) -> Range<u64> {
        let start = self.executable.as_ptr() as u64;
        start..start + self.size as u64
    }

    /// Forgets everything. Nobody may call any of the code afterwards.
    pub(crate) fn clear(&mut self) {
        (self.used, self.far_end, self.data) = (0, self.far_start, 0);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: our own room, of both views; the owner of the code's addresses is gone.
        unsafe { libc::munmap(self.writable.as_ptr().cast(), 2 * self.size) };
    }
}

/// Maps the file at `at`, in room of our own.
fn map(file: &OwnedFd, at: NonNull<u8>, size: usize, protection: libc::c_int) -> io::Result<()> {
    let (flags, fd) = (libc::MAP_SHARED | libc::MAP_FIXED, file.as_raw_fd());
    // SAFETY: the caller's room.
    let mapped = unsafe { libc::mmap(at.as_ptr().cast(), size, protection, flags, fd, 0) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_arena_refuses_and_a_cleared_one_takes_again() {
        let mut arena = Arena::new(4096).unwrap();
        let block = vec![0x90; 2048];
        let first = arena.add(&block);
        assert!(first.is_some());
        assert!(arena.add(&block).is_some());
        assert_eq!(arena.add(&[0xc3]), None);
        arena.clear();
        assert_eq!(arena.add(&[0xc3]), first);
    }
}
