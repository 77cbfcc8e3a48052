//! Who has the pages that are elsewhere.
#![expect(unsafe_code, reason = "touches memory of the client's by address")]

use std::fmt::Debug;
use std::io;

use silicon::mmu::host;

const PAGE: usize = 4096;

/// What has become of a page that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is there.
    Came,
    /// Its contents are lost: the memory has failed (hardware poison, UFFDIO_POISON), or its file has become too short.
    Failed,
    /// There is nothing where it should be, or nothing that may be read: a mistake of the client's, which KVM_RUN is to tell it.
    Unmapped,
}

/// Brings pages. Called by threads of the VM's, several at a time, which may wait as long as it takes.
pub trait PageSource: Debug + Send + Sync {
    /// Brings the page at guest-physical address `gpa`, which the client has at `host`. (In system management mode's address space,
    /// `gpa` has [`SMM_SPACE`](silicon::mmu::ept::SMM_SPACE).)
    fn bring(&self, gpa: u64, host: u64) -> Outcome;
}

/// The host kernel, and whoever serves its userfaultfd: the page comes by being accessed.
#[derive(Debug)]
pub(crate) struct HostPages;

impl PageSource for HostPages {
    fn bring(&self, _: u64, host: u64) -> Outcome {
        let mut byte = [0];
        // In user mode: some userfaultfds serve nothing else.
        // SAFETY: reading changes nothing. What is no guest memory any more is an error.
        match unsafe { host::read(host, &mut byte) } {
            Ok(()) => Outcome::Came,
            Err(_) => why_absent(host),
        }
    }
}

/// Why the page at `host`, whose access was a signal, is not there. Without CONFIG_MEMORY_FAILURE the signal is the same for failed
/// memory and for a file that is too short; the kernel tells them apart where it is asked to populate. Both are lost.
pub(crate) fn why_absent(host: u64) -> Outcome {
    // SAFETY: populating changes no byte; an address without memory is an error.
    let done = unsafe { libc::madvise(host as *mut libc::c_void, PAGE, libc::MADV_POPULATE_READ) };
    match io::Error::last_os_error().raw_os_error() {
        _ if done == 0 => Outcome::Came,
        Some(libc::EHWPOISON) => Outcome::Failed,
        // SIGBUS: there is a mapping.
        Some(libc::EFAULT) => Outcome::Failed,
        _ => Outcome::Unmapped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    /// G1: whoever ignores the error has the guest try again for ever.
    #[test]
    fn apf_g1_a_truncated_file_is_a_lost_page() {
        host::install();
        let file = tempfile();
        file.set_len(2 * PAGE as u64).unwrap();
        // SAFETY: a new mapping.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), 2 * PAGE, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
        } as u64;
        assert_eq!(HostPages.bring(0, at), Outcome::Came);
        file.set_len(PAGE as u64).unwrap();
        assert_eq!(
            [at, at + PAGE as u64].map(|host| HostPages.bring(0, host)),
            [Outcome::Came, Outcome::Failed]
        );
        // SAFETY: our own mapping.
        unsafe { libc::munmap(at as *mut libc::c_void, 2 * PAGE) };
        assert_eq!(HostPages.bring(0, at), Outcome::Unmapped);
    }

    fn tempfile() -> std::fs::File {
        use std::os::fd::FromRawFd;
        // SAFETY: a new descriptor.
        unsafe { std::fs::File::from_raw_fd(libc::memfd_create(c"pages".as_ptr(), libc::MFD_CLOEXEC)) }
    }
}
