//! What the client has mapped where a slot's memory is, as `/proc/self` tells it (Documentation/filesystems/proc.rst).

use std::fs::{self, File};
use std::io::{BufRead, BufReader};

/// Whether part of `size` bytes at the client's address `host` is MMIO of the host's: a device's registers that the client hands on to its
/// guest, by VFIO or without (kernel: `kvm_is_mmio_pfn` and, since 6.17, commit 83ebe7157483). That is a mapping of device memory or of
/// bare page frames. False if it cannot be known.
pub(super) fn maps_host_mmio(host: u64, size: u64) -> bool {
    any_flag(host, size, &["io", "pf"])
}

/// Whether pages of `size` bytes at `host` may have to be brought by somebody who serves a userfaultfd.
pub(super) fn may_be_elsewhere(host: u64, size: u64) -> bool {
    serves_faults() && any_flag(host, size, &["um", "ui"])
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
fn overlapping(list: &str, host: u64, size: u64, check: impl Fn(&str) -> bool) -> bool {
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
