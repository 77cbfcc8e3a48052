//! Counters in a page that the client may read through a descriptor while they change (KVM_GET_STATS_FD).
//!
//! The descriptor is a memfd with the header, the name, the descriptions of the counters and, from a page boundary on,
//! the counters themselves. It is made when first asked for; its last page then takes the place of the anonymous one
//! that the counters were in, at the same address. So counting costs no call, reading is the host kernel's business,
//! and what the client reads is what we count.
#![expect(unsafe_code, reason = "mmap, memfd_create, and counters in mapped memory")]

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_STATS_BASE_POW10, KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_INSTANT, KVM_STATS_TYPE_LOG_HIST,
    KVM_STATS_UNIT_BOOLEAN, KVM_STATS_UNIT_NONE, KVM_STATS_UNIT_SECONDS,
};

const PAGE: usize = 4096;
/// Bytes of a name (kernel: KVM_STATS_NAME_SIZE).
const NAME_SIZE: usize = 48;
/// Bytes of `struct kvm_stats_header`, and of `struct kvm_stats_desc` with its name.
const HEADER_SIZE: usize = 24;
const DESCRIPTION_SIZE: usize = 16 + NAME_SIZE;

/// What a counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Events.
    Count,
    /// The present number of something.
    Present,
    /// Whether something is so now.
    Flag,
    /// Nanoseconds, added up.
    Nanoseconds,
    /// Durations: one count for each power of two of nanoseconds.
    DurationHistogram,
}

impl Kind {
    /// `flags` and `exponent` of `struct kvm_stats_desc`.
    fn encoded(self) -> (u32, i16) {
        match self {
            Kind::Count => (KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_UNIT_NONE | KVM_STATS_BASE_POW10, 0),
            Kind::Present => (KVM_STATS_TYPE_INSTANT | KVM_STATS_UNIT_NONE | KVM_STATS_BASE_POW10, 0),
            Kind::Flag => (KVM_STATS_TYPE_INSTANT | KVM_STATS_UNIT_BOOLEAN | KVM_STATS_BASE_POW10, 0),
            Kind::Nanoseconds => {
                (KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_UNIT_SECONDS | KVM_STATS_BASE_POW10, -9)
            }
            Kind::DurationHistogram => {
                (KVM_STATS_TYPE_LOG_HIST | KVM_STATS_UNIT_SECONDS | KVM_STATS_BASE_POW10, -9)
            }
        }
    }

    /// Words that it takes (kernel: HALT_POLL_HIST_COUNT for histograms).
    pub const fn words(self) -> usize {
        match self {
            Kind::DurationHistogram => 32,
            _ => 1,
        }
    }
}

/// One statistic: its name, what it counts, and its first word.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    /// The kernel's name, where it has this statistic.
    pub name: &'static str,
    /// What it counts.
    pub kind: Kind,
    /// Position among the counters, in words.
    pub word: usize,
}

/// The counters of one VM or vCPU.
#[derive(Debug)]
pub struct StatsPage {
    start: NonNull<AtomicU64>,
    /// The descriptor that shows them, once somebody has asked.
    file: Mutex<Option<File>>,
}

// SAFETY: the page belongs to the value and holds atomics only.
unsafe impl Send for StatsPage {}
// SAFETY: as above.
unsafe impl Sync for StatsPage {}

impl StatsPage {
    /// Words that a page has.
    pub const WORDS: usize = PAGE / 8;

    /// All counters zero.
    pub fn new() -> io::Result<StatsPage> {
        let start = map(std::ptr::null_mut(), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)?;
        Ok(StatsPage { start: start.cast(), file: Mutex::default() })
    }

    /// The counter in word `word`.
    pub fn counter(&self, word: usize) -> &AtomicU64 {
        let word = word % Self::WORDS;
        // SAFETY: within the page, which is mapped as long as we are; atomics have no invalid values, and everybody
        // else only reads.
        unsafe { self.start.add(word).as_ref() }
    }

    /// KVM_GET_STATS_FD: a new descriptor that reads from the start, close-on-exec.
    pub fn open(&self, name: &str, descriptions: &[Description]) -> io::Result<OwnedFd> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = match &*file {
            Some(shown) => shown,
            None => file.insert(self.show(name, descriptions)?),
        };
        // Opened anew, so that each descriptor has a position of its own and none can write.
        let path = format!("/proc/self/fd/{}", shown.as_raw_fd());
        Ok(OpenOptions::new().read(true).open(path)?.into())
    }

    fn show(&self, name: &str, descriptions: &[Description]) -> io::Result<File> {
        // SAFETY: the name ends with a zero byte; no other memory is involved.
        let fd = unsafe { libc::memfd_create(c"kvm-stats".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let words = descriptions.iter().map(|d| d.word + d.kind.words()).max().unwrap_or(0);
        let front = front(name, descriptions);
        let data_offset = front.len();
        file.write_all_at(&front, 0)?;
        let data: Vec<u8> =
            (0..words).flat_map(|word| self.counter(word).load(Ordering::Relaxed).to_ne_bytes()).collect();
        file.write_all_at(&data, data_offset as u64)?;
        let place = self.start.as_ptr().cast();
        map(place, libc::MAP_SHARED | libc::MAP_FIXED, file.as_raw_fd(), data_offset)?;
        Ok(file)
    }
}

impl Drop for StatsPage {
    fn drop(&mut self) {
        // SAFETY: our own page, which nobody uses any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), PAGE) };
    }
}

fn map(place: *mut libc::c_void, flags: i32, fd: i32, offset: usize) -> io::Result<NonNull<u8>> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: either at a place of the kernel's choice, or over a page of our own whose readers find the same values.
    let at = unsafe { libc::mmap(place, PAGE, protection, flags, fd, offset as libc::off_t) };
    match NonNull::new(at.cast::<u8>()) {
        Some(start) if at != libc::MAP_FAILED => Ok(start),
        _ => Err(io::Error::last_os_error()),
    }
}

fn fixed_name(name: &str) -> [u8; NAME_SIZE] {
    let mut bytes = [0; NAME_SIZE];
    for (to, from) in bytes.iter_mut().take(NAME_SIZE - 1).zip(name.bytes()) {
        *to = from;
    }
    bytes
}

/// All that comes before the counters (kernel: `struct kvm_stats_header`, `struct kvm_stats_desc`), up to a page
/// boundary.
fn front(name: &str, descriptions: &[Description]) -> Vec<u8> {
    let descriptions_offset = HEADER_SIZE + NAME_SIZE;
    let end = descriptions_offset + descriptions.len() * DESCRIPTION_SIZE;
    let data_offset = end.next_multiple_of(PAGE);
    let words = [0, NAME_SIZE, descriptions.len(), HEADER_SIZE, descriptions_offset, data_offset];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| (*word as u32).to_ne_bytes()).collect();
    bytes.extend(fixed_name(name));
    for description in descriptions {
        let (flags, exponent) = description.kind.encoded();
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(exponent.to_ne_bytes());
        bytes.extend((description.kind.words() as u16).to_ne_bytes());
        bytes.extend((description.word as u32 * 8).to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(fixed_name(description.name));
    }
    bytes.resize(data_offset, 0);
    bytes
}

/// One counter.
#[derive(Clone, Debug)]
pub struct Counter {
    page: Arc<StatsPage>,
    word: usize,
}

impl Counter {
    /// The counter in word `word` of `page`.
    pub fn new(page: &Arc<StatsPage>, word: usize) -> Counter {
        Counter { page: page.clone(), word }
    }

    /// Counts one more.
    pub fn count(&self) {
        self.fetch_add(1, Ordering::Relaxed);
    }
}

impl Deref for Counter {
    type Target = AtomicU64;

    fn deref(&self) -> &AtomicU64 {
        self.page.counter(self.word)
    }
}

/// The counters of a histogram of durations.
#[derive(Clone, Debug)]
pub struct Histogram(Counter);

impl Histogram {
    /// The histogram that begins in word `word` of `page`.
    pub fn new(page: &Arc<StatsPage>, word: usize) -> Histogram {
        Histogram(Counter::new(page, word))
    }

    /// Counts a duration: bucket 0 has zero, bucket n those from 2^(n-1) nanoseconds (kernel:
    /// `kvm_stats_log_hist_update`).
    pub fn add(&self, nanoseconds: u64) {
        let bucket = (64 - nanoseconds.leading_zeros() as usize).min(Kind::DurationHistogram.words() - 1);
        self.0.page.counter(self.0.word + bucket).fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    const TABLE: [Description; 2] = [
        Description { name: "exits", kind: Kind::Count, word: 0 },
        Description { name: "waits", kind: Kind::DurationHistogram, word: 1 },
    ];

    #[test]
    fn the_descriptor_shows_what_is_counted() {
        let page = Arc::new(StatsPage::new().unwrap());
        let exits = Counter::new(&page, 0);
        exits.count();
        let first = File::from(page.open("kvm-1/vcpu-0", &TABLE).unwrap());
        let mut header = [0u32; 6].map(u32::to_ne_bytes).concat();
        (&first).read_exact(&mut header).unwrap();
        let field = |n: usize| u32::from_ne_bytes(header[4 * n..][..4].try_into().unwrap());
        assert_eq!([field(0), field(1), field(2), field(3), field(4)], [0, 48, 2, 24, 72]);
        let mut name = [0; 48];
        (&first).read_exact(&mut name).unwrap();
        assert_eq!(&name[..13], b"kvm-1/vcpu-0\0");
        let value = |file: &File, word: u64| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, u64::from(field(5)) + 8 * word).unwrap();
            u64::from_ne_bytes(bytes)
        };
        assert_eq!(value(&first, 0), 1);
        exits.count();
        let histogram = Histogram::new(&page, 1);
        [0, 1, 5, u64::MAX].iter().for_each(|&nanoseconds| histogram.add(nanoseconds));
        let second = File::from(page.open("kvm-1/vcpu-0", &TABLE).unwrap());
        drop((page, exits, histogram));
        assert_eq!(value(&first, 0), 2, "it stays when the counters are gone");
        assert_eq!([0, 1, 3, 31].map(|bucket| value(&second, 1 + bucket)), [1; 4]);
        let mut again = [0; 4];
        (&second).read_exact(&mut again).unwrap();
        assert_eq!(again, [0; 4], "a position of its own");
        assert!(second.write_at(&[1], 0).is_err(), "nobody writes");
        assert_eq!(second.metadata().unwrap().len(), u64::from(field(5)) + 8 * 33);
    }

    #[test]
    fn names_are_cut() {
        let long = "x".repeat(100);
        let name = fixed_name(&long);
        assert!(name[..47].iter().all(|&b| b == b'x') && name[47] == 0);
    }
}
