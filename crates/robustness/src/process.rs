//! What this process holds: resident memory, threads, file descriptors.
#![expect(
    unsafe_code,
    reason = "asks the allocator to give back what is free, so that only what is held counts"
)]

use std::fs;

/// What a process holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Resident bytes of memory of its own, in KiB.
    pub resident: u64,
    /// Threads.
    pub threads: u64,
    /// Open file descriptors.
    pub files: u64,
    /// Memory mappings.
    pub mappings: u64,
}

/// Growth that is no leak: caches, and the allocator's fragments. In KiB.
const RESIDENT_SLACK: u64 = 4 << 10;
/// Mappings of the allocator.
const MAPPINGS_SLACK: u64 = 40;

impl Held {
    /// What this process holds now.
    pub fn now() -> Held {
        // SAFETY: only gives free memory back to the system.
        unsafe { libc::malloc_trim(0) };
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("");
            line.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0)
        };
        Held {
            resident: field("RssAnon:"),
            threads: field("Threads:"),
            files: fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64),
            mappings: fs::read_to_string("/proc/self/maps").map_or(0, |maps| maps.lines().count() as u64),
        }
    }

    /// What has grown since `before`, more than can be explained without a leak.
    pub fn growth(&self, before: &Held) -> Option<String> {
        let grown = [
            ("KiB of resident memory", self.resident, before.resident, RESIDENT_SLACK),
            ("threads", self.threads, before.threads, 0),
            ("file descriptors", self.files, before.files, 0),
            ("memory mappings", self.mappings, before.mappings, MAPPINGS_SLACK),
        ]
        .iter()
        .filter(|(_, after, before, slack)| *after > before + slack)
        .map(|(what, after, before, _)| format!("{what} grew from {before} to {after}"))
        .collect::<Vec<_>>();
        (!grown.is_empty()).then(|| grown.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leak_is_seen() {
        let before = Held::now();
        assert!(before.resident > 0 && before.threads > 0 && before.files > 2 && before.mappings > 10);
        // Opaque, or the optimizer leaves the allocation out.
        let leak = std::hint::black_box(vec![1u8; 32 << 20]);
        let text = Held::now().growth(&before).unwrap_or_default();
        assert!(text.starts_with("KiB of resident memory grew"), "{text:?}");
        drop(leak);
    }
}
