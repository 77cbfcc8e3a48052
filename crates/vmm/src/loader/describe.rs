//! What a file is that is not a kernel, in a few words for the person who gave it.

use crate::memory::Size;

/// A magic number at an offset, and what it tells.
struct Magic(usize, &'static [u8], &'static str);

const MAGICS: &[Magic] = &[
    Magic(0, b"\x1f\x8b", "gzip-compressed data; decompress it first"),
    Magic(0, b"\xfd7zXZ\0", "xz-compressed data; decompress it first"),
    Magic(0, b"\x28\xb5\x2f\xfd", "zstd-compressed data; decompress it first"),
    Magic(0, b"BZh", "bzip2-compressed data; decompress it first"),
    Magic(0, b"\x04\x22\x4d\x18", "lz4-compressed data; decompress it first"),
    Magic(0, b"\x02\x21\x4c\x18", "lz4-compressed data; decompress it first"),
    Magic(0, b"\x89LZO", "lzo-compressed data; decompress it first"),
    Magic(0, b"\x5d\0\0", "lzma-compressed data; decompress it first"),
    Magic(0, b"070701", "a cpio archive (an initrd? give it with --initrd)"),
    Magic(0, b"070702", "a cpio archive (an initrd? give it with --initrd)"),
    Magic(0, b"QFI\xfb", "a qcow2 disk image"),
    Magic(0, b"PK\x03\x04", "a zip archive"),
    Magic(0, b"!<arch>\n", "an ar archive (a Debian package or a static library)"),
    Magic(257, b"ustar", "a tar archive"),
    Magic(0x8001, b"CD001", "an ISO 9660 image (a disk? give it with --disk)"),
    Magic(0x438, b"\x53\xef", "an ext2/3/4 file system (a disk? give it with --disk)"),
    Magic(0, b"hsqs", "a squashfs file system (a disk? give it with --disk)"),
    Magic(0, b"\xd6\x50\x52\xe8", "a multiboot-2 header without a multiboot-1 header"),
    Magic(0, b"#!", "a script"),
    Magic(0, b"MZ", "a DOS or EFI program without the Linux boot header"),
    Magic(510, b"\x55\xaa", "a disk image with a boot sector (give it with --disk)"),
];

/// Describes a file by its first bytes.
pub fn describe(head: &[u8], length: u64) -> String {
    if length == 0 {
        return "an empty file".into();
    }
    let known = MAGICS
        .iter()
        .find(|Magic(offset, bytes, _)| head.get(*offset..).is_some_and(|rest| rest.starts_with(bytes)));
    if let Some(Magic(.., text)) = known {
        return (*text).into();
    }
    let sample = &head[..head.len().min(512)];
    if sample.iter().all(|&b| matches!(b, b'\t' | b'\n' | b'\r' | 0x20..=0x7e | 0x80..)) {
        return "a text file".into();
    }
    if head.iter().all(|&b| b == 0) {
        return format!("{} that begin with zeros only", Size(length));
    }
    format!("{} of unknown data", Size(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named() {
        let mut mbr = vec![1; 512];
        mbr[510..].copy_from_slice(b"\x55\xaa");
        for (head, expected) in [
            (&b""[..], "an empty file"),
            (b"\x1f\x8b\x08", "gzip"),
            (b"#!/bin/sh\n", "a script"),
            (b"hello\n", "a text file"),
            (b"070701000", "a cpio archive"),
            (b"\x00\x00", "zeros only"),
            (b"\x01\x02\x03", "3 bytes of unknown data"),
            (&mbr, "boot sector"),
        ] {
            let text = describe(head, head.len() as u64);
            assert!(text.contains(expected), "{text:?} lacks {expected:?}");
        }
    }
}
