//! Guest memory between guards: a canary page on each side, and unmapped space beyond.
#![expect(unsafe_code, reason = "maps guest memory and looks at the pages around it")]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;

use crate::image::Contents;

const PAGE: usize = 4096;
/// Unmapped space on each side, so that a wild access nearby faults.
const GAP: usize = 1 << 20;
/// Every word of a canary page.
const CANARY: u64 = 0x5ca1_ab1e_0ddb_a11d;

/// Memory contents that many images share; each gets a private copy of the pages that it changes.
#[derive(Debug)]
pub struct Snapshot {
    file: File,
    size: usize,
}

impl Snapshot {
    /// A snapshot of the guest memory of `size` bytes that `pieces` (offset, bytes) are written to.
    pub fn new(size: usize, pieces: &[(u64, &[u8])]) -> io::Result<Snapshot> {
        // SAFETY: a valid name; the descriptor is new and ours.
        let mut file = unsafe {
            match libc::memfd_create(c"snapshot".as_ptr(), libc::MFD_CLOEXEC) {
                -1 => return Err(io::Error::last_os_error()),
                fd => File::from_raw_fd(fd),
            }
        };
        file.set_len(size as u64)?;
        for (offset, bytes) in pieces {
            io::Seek::seek(&mut file, io::SeekFrom::Start(*offset))?;
            file.write_all(bytes)?;
        }
        Ok(Snapshot { file, size })
    }
}

/// Memory of one slot.
#[derive(Debug)]
pub struct GuestMemory {
    reservation: *mut u8,
    size: usize,
}

fn checked(pointer: *mut libc::c_void) -> io::Result<*mut u8> {
    if pointer == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(pointer.cast()) }
}

impl GuestMemory {
    /// Maps memory that holds `contents`.
    pub fn new(contents: &Contents) -> io::Result<GuestMemory> {
        let size = match contents {
            Contents::Bytes(bytes) => bytes.len().max(1).next_multiple_of(PAGE),
            Contents::Changed(snapshot, _) => snapshot.size.next_multiple_of(PAGE),
        };
        let (none, private) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
        // SAFETY: a new anonymous mapping.
        let reservation = checked(unsafe {
            let flags = private | libc::MAP_ANONYMOUS;
            libc::mmap(ptr::null_mut(), size + 2 * (GAP + PAGE), none, flags, -1, 0)
        })?;
        let memory = GuestMemory { reservation, size };
        memory.map(GAP, size + 2 * PAGE, None)?;
        if let Contents::Changed(snapshot, _) = contents {
            memory.map(GAP + PAGE, size, Some(&snapshot.file))?;
        }
        for page in memory.canaries() {
            // SAFETY: `canaries` gives whole mapped pages that nothing else refers to.
            unsafe { std::slice::from_raw_parts_mut(page, PAGE / 8) }.fill(CANARY);
        }
        match contents {
            Contents::Bytes(bytes) => memory.write(0, bytes),
            Contents::Changed(_, changes) => {
                changes.iter().for_each(|(offset, bytes)| memory.write(*offset, bytes));
            }
        }
        Ok(memory)
    }

    /// Maps part of the reservation readable and writable.
    fn map(&self, offset: usize, size: usize, file: Option<&File>) -> io::Result<()> {
        let kind = if file.is_some() { 0 } else { libc::MAP_ANONYMOUS };
        let fd = file.map_or(-1, |file| file.as_raw_fd());
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_FIXED);
        // SAFETY: inside our own reservation, of which nothing is in use yet.
        checked(unsafe {
            let at = self.reservation.add(offset).cast();
            libc::mmap(at, size, protection, flags | kind | libc::MAP_NORESERVE, fd, 0)
        })
        .map(|_| ())
    }

    /// Host address of the guest's first byte.
    pub fn host(&self) -> u64 {
        self.reservation as u64 + (GAP + PAGE) as u64
    }

    /// Bytes of guest memory.
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    /// Has the host protect all of it: every access faults.
    pub(crate) fn protect_all(&self) {
        protect(self.host() as *mut u8, self.size);
    }

    /// Likewise the pages before and after, whose canaries cannot be asked for any more.
    pub(crate) fn protect_canaries(&self) {
        self.canaries().into_iter().for_each(|page| protect(page.cast(), PAGE));
    }

    /// The pages right before and after.
    fn canaries(&self) -> [*mut u64; 2] {
        // SAFETY: both lie in the reservation.
        unsafe { [self.reservation.add(GAP).cast(), self.reservation.add(GAP + PAGE + self.size).cast()] }
    }

    /// Whether nobody wrote beside the guest's memory.
    pub fn canaries_live(&self) -> bool {
        self.canaries().into_iter().all(|page| {
            // SAFETY: a mapped page of ours; nothing writes it, or this is what we are here to find out.
            (0..PAGE / 8).all(|i| unsafe { page.add(i).read_volatile() } == CANARY)
        })
    }

    /// Writes guest memory, which no vCPU uses yet.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        let length = bytes.len().min(self.size.saturating_sub(offset));
        // SAFETY: within the guest's memory, which no vCPU uses yet.
        unsafe {
            let to = self.reservation.add(GAP + PAGE + offset.min(self.size));
            ptr::copy_nonoverlapping(bytes.as_ptr(), to, length);
        }
    }
}

/// Has accesses to pages of a [`GuestMemory`] fault.
fn protect(start: *mut u8, size: usize) {
    // SAFETY: whole pages of its own reservation, to which there are no references.
    unsafe { libc::mprotect(start.cast(), size, libc::PROT_NONE) };
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: our own reservation; the VM that used it is gone before its memory.
        unsafe { libc::munmap(self.reservation.cast(), self.size + 2 * (GAP + PAGE)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_beside_guest_memory_kills_the_canary() {
        let memory = GuestMemory::new(&Contents::Bytes(vec![7; 5000])).unwrap();
        assert_eq!(memory.size(), 8192);
        assert!(memory.canaries_live());
        let end = (memory.host() + memory.size()) as *mut u8;
        // SAFETY: the canary page, which nothing else uses.
        unsafe { end.add(100).write_volatile(0) };
        assert!(!memory.canaries_live());
    }
}
