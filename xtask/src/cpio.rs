//! Writer of cpio archives in the "newc" format that the kernel unpacks as its initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::path::Path;

use crate::{Error, at};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive in memory.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Archive {
        Archive::default()
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.entries += 1;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            data.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Adds a directory; its parents must have been added.
    pub fn directory(&mut self, name: &str) -> &mut Archive {
        self.entry(name, DIRECTORY | 0o755, (0, 0), &[]);
        self
    }

    /// Adds a regular file with permission bits `mode`.
    pub fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> &mut Archive {
        self.entry(name, REGULAR | mode, (0, 0), data);
        self
    }

    /// Adds a copy of a host file.
    pub fn host_file(&mut self, name: &str, mode: u32, from: &Path) -> Result<&mut Archive, Error> {
        let data = at(from, std::fs::read(from))?;
        Ok(self.file(name, mode, &data))
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, name: &str, target: &str) -> &mut Archive {
        self.entry(name, SYMLINK | 0o777, (0, 0), target.as_bytes());
        self
    }

    /// Adds a character device node.
    pub fn device(&mut self, name: &str, major: u32, minor: u32) -> &mut Archive {
        self.entry(name, CHARACTER | 0o666, (major, minor), &[]);
        self
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let mut archive = Archive::new();
        archive
            .directory("dev")
            .device("dev/console", 5, 1)
            .file("init", 0o755, b"#!/bin/sh\n")
            .symlink("sh", "busybox");
        let bytes = archive.finish();
        assert!(bytes.starts_with(b"070701") && bytes.len().is_multiple_of(512));
        let at = bytes.windows(10).position(|w| w == b"TRAILER!!!").unwrap();
        assert_eq!((at - 110) % 4, 0, "headers stand on four-byte boundaries");
    }
}
