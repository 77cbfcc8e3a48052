//! What the client has mapped where a slot's memory is, as `/proc/self` tells it (Documentation/filesystems/proc.rst).

#![expect(unsafe_code, reason = "asks for the kind of a file system")]

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use silicon::mmu::ept::Lazy;

/// Whether part of `size` bytes at the client's address `host` is MMIO of the host's: a device's registers that the client hands on to its
/// guest, by VFIO or without (kernel: `kvm_is_mmio_pfn` and, since 6.17, commit 83ebe7157483). That is a mapping of device memory or of
/// bare page frames. False if it cannot be known.
pub(super) fn maps_host_mmio(host: u64, size: u64) -> bool {
    any_flag(host, size, &["io", "pf"])
}

/// How it is known which pages of `size` bytes at `host` somebody has to bring: who serves a userfaultfd, the file system of a file on a disk, the host's
/// swap. Memory that can be none of that is always there.
pub(super) fn laziness(host: u64, size: u64) -> Lazy {
    if serves_faults() {
        // For minor faults pages are in memory, and not mapped.
        if any_flag(host, size, &["ui"]) {
            return Lazy::Mapped;
        }
        if any_flag(host, size, &["um"]) {
            return Lazy::Resident;
        }
    }
    if is_on_disk(host, size) {
        return Lazy::Resident;
    }
    if has_swap() { Lazy::Swapped } else { Lazy::No }
}

/// Whether the host can page out memory that is in no file.
fn has_swap() -> bool {
    fs::read_to_string("/proc/swaps").is_ok_and(|list| list.lines().count() > 1)
}

/// Whether a file that is not in memory only is mapped there.
fn is_on_disk(host: u64, size: u64) -> bool {
    let mut found = false;
    overlapping("/proc/self/maps", host, size, |line| {
        found = on_disk(line);
        found
    });
    found
}

/// The same for one mapping: `7f00-7f80 rw-s 00000000 fe:00 1234 /var/lib/vm/ram`.
fn on_disk(line: &str) -> bool {
    let mut fields = line.split_whitespace().skip(3);
    let (Some(device), Some(inode), Some(_)) = (fields.next(), fields.next(), fields.next()) else {
        return false;
    };
    // Block devices have major numbers; of file systems without, only those are in memory that are mounted as such.
    inode != "0" && (!device.starts_with("00:") || !in_memory(line))
}

/// Whether the file of a mapping is in a file system that has nothing but memory. Files that are gone are found among the process'
/// descriptors, or are taken to be.
fn in_memory(line: &str) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    const HUGETLBFS: i64 = 0x9584_58f6;
    let Some(path) = line.find('/').and_then(|start| line.get(start..)) else { return true };
    let fields: Vec<&str> = line.split_whitespace().collect();
    let inode = fields.get(4).and_then(|inode| inode.parse().ok()).unwrap_or(0);
    let path = PathBuf::from(path);
    let same = |path: &PathBuf| fs::metadata(path).is_ok_and(|meta| meta.ino() == inode);
    let open = || {
        let descriptors = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
        descriptors.map(|entry| entry.path()).find(same)
    };
    let Some(path) = Some(path).filter(same).or_else(open) else { return true };
    let Ok(path) = CString::new(path.into_os_string().into_encoded_bytes()) else { return true };
    let mut found = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: a path that ends, and a structure for the answer.
    let done = unsafe { libc::statfs(path.as_ptr(), found.as_mut_ptr()) };
    // SAFETY: all bytes zero is a valid value, too.
    done != 0 || matches!(unsafe { found.assume_init() }.f_type, TMPFS | HUGETLBFS)
}

/// Whether the process has a userfaultfd.
fn serves_faults() -> bool {
    let links = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    links
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|link| link.ends_with("anon_inode:[userfaultfd]"))
}

/// Whether a mapping there has one of the flags.
fn any_flag(host: u64, size: u64, flags: &[&str]) -> bool {
    let has = |line: &str| {
        let all = line.strip_prefix("VmFlags:");
        all.is_some_and(|all| all.split_whitespace().any(|flag| flags.contains(&flag)))
    };
    overlapping("/proc/self/smaps", host, size, has)
}

/// Whether `check` holds for a line that `list` has about a mapping that overlaps `size` bytes at `host`.
fn overlapping(list: &str, host: u64, size: u64, mut check: impl FnMut(&str) -> bool) -> bool {
    let Ok(file) = File::open(list) else { return false };
    let mut inside = false;
    for line in BufReader::new(file).lines() {
        let Ok(line) = line else { return false };
        if let Some((start, end)) = range(&line) {
            inside = start < host.saturating_add(size) && host < end;
        }
        if inside && check(&line) {
            return true;
        }
    }
    false
}

/// The addresses of a mapping, if the line begins one: `7f00-7f80 rw-p …`.
fn range(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The page through which the kernel gives every process the time: page frames that belong to no file.
    pub(crate) fn kernel_page() -> (u64, u64) {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().find(|line| line.ends_with("[vvar]")).and_then(range).unwrap()
    }

    #[test]
    fn ac_v7_device_memory_is_told_from_memory() {
        let (start, end) = kernel_page();
        assert!(maps_host_mmio(start, 4096) && maps_host_mmio(end - 4096, 8192));
        let page = vec![0u8; 8192];
        assert!(!maps_host_mmio(page.as_ptr() as u64, 8192));
        assert!(!maps_host_mmio(0, 4096), "nothing is mapped");
    }
}
