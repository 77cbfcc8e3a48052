//! Whether a slot's memory is MMIO of the host's: a device's registers that a client has mapped and hands on to its guest, by VFIO or
//! without (kernel: `kvm_is_mmio_pfn` and, since 6.17, commit 83ebe7157483).

use std::fs::File;
use std::io::{BufRead, BufReader};

/// Whether part of `size` bytes at the client's address `host` is a mapping of device memory or of bare page frames: what the
/// kernel marks `io` or `pf` among the flags of a mapping (Documentation/filesystems/proc.rst). False if it cannot be known.
pub(super) fn maps_host_mmio(host: u64, size: u64) -> bool {
    let Ok(file) = File::open("/proc/self/smaps") else { return false };
    let is_device = |flags: &str| flags.split_whitespace().any(|flag| flag == "io" || flag == "pf");
    let mut inside = false;
    for line in BufReader::new(file).lines() {
        let Ok(line) = line else { return false };
        if let Some((start, end)) = range(&line) {
            inside = start < host.saturating_add(size) && host < end;
        } else if inside && line.strip_prefix("VmFlags:").is_some_and(is_device) {
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
