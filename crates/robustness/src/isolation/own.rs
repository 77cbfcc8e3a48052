//! Memory of the watcher's own: one mapping that is never compared, so that what the watcher remembers does not change what it looks at.
#![expect(unsafe_code, reason = "maps memory and hands out parts of it")]

use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::ptr;

/// A mapping that parts are taken of, and that stays for as long as the process.
#[derive(Debug)]
pub(super) struct Own {
    start: *mut u8,
    size: usize,
    used: usize,
}

impl Own {
    /// So many bytes, of which only those are touched that are used.
    pub(super) fn new(size: usize) -> io::Result<Own> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Own { start: start.cast(), size, used: 0 })
    }

    /// Where it is.
    pub(super) fn range(&self) -> Range<u64> {
        self.start as u64..self.start as u64 + self.size as u64
    }

    /// Room for `size` bytes, at a page of its own, zeroed.
    pub(super) fn take(&mut self, size: usize) -> *mut u8 {
        let at = self.used;
        self.used += size.next_multiple_of(4096);
        assert!(self.used <= self.size, "the watcher has as much memory as it needs");
        // SAFETY: within the mapping.
        unsafe { self.start.add(at) }
    }
}

/// Values in a row, in such memory.
#[derive(Debug)]
pub(super) struct Buffer<T> {
    start: *mut T,
    length: usize,
    room: usize,
}

impl<T: Copy> Buffer<T> {
    /// Room for so many.
    pub(super) fn new(own: &mut Own, room: usize) -> Buffer<T> {
        Buffer { start: own.take(room * size_of::<T>()).cast(), length: 0, room }
    }

    /// One more, or the process ends: half of what there is would prove nothing.
    pub(super) fn push(&mut self, value: T) {
        assert!(self.length < self.room, "there is room for {} only", self.room);
        // SAFETY: within the room.
        unsafe { self.start.add(self.length).write(value) };
        self.length += 1;
    }

    pub(super) fn clear(&mut self) {
        self.length = 0;
    }
}

impl Buffer<u8> {
    /// Adds the `length` bytes at `from`; where they are now.
    ///
    /// # Safety
    ///
    /// They are mapped and readable, and nobody writes them meanwhile.
    pub(super) unsafe fn add(&mut self, from: u64, length: usize) -> *const u8 {
        assert!(self.length + length <= self.room, "there is room for {} bytes only", self.room);
        // SAFETY: the caller's promise, and within the room.
        unsafe {
            let to = self.start.add(self.length);
            ptr::copy_nonoverlapping(from as *const u8, to, length);
            self.length += length;
            to
        }
    }

    /// Takes in what the file has from `offset` on, `length` bytes at most.
    pub(super) fn read(&mut self, file: libc::c_int, offset: u64, length: usize) {
        self.length = 0;
        let wanted = length.min(self.room);
        while self.length < wanted {
            // SAFETY: within the room.
            let got = unsafe {
                let to = self.start.add(self.length).cast();
                libc::pread(file, to, wanted - self.length, (offset + self.length as u64) as i64)
            };
            match got {
                1.. => self.length += got as usize,
                _ => return,
            }
        }
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: so many have been written.
        unsafe { std::slice::from_raw_parts(self.start, self.length) }
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }
}
