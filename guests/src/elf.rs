//! The little of ELF that our own images need.

/// A loadable segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Physical address.
    pub address: u64,
    /// Bytes in the file; memory beyond them is zero.
    pub bytes: &'a [u8],
}

/// An image: where it starts, and its segments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image<'a> {
    /// Entry point.
    pub entry: u64,
    /// Loadable segments.
    pub segments: Vec<Segment<'a>>,
}

fn quad(file: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(file.get(at..at + 8)?.try_into().ok()?))
}

fn word(file: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(file.get(at..at + 2)?.try_into().ok()?))
}

/// Parses a 64-bit little-endian ELF file; `None` if it is none.
pub fn parse(file: &[u8]) -> Option<Image<'_>> {
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let headers = quad(file, 32)? as usize;
    let (size, count) = (usize::from(word(file, 54)?), usize::from(word(file, 56)?));
    let mut segments = Vec::new();
    for i in 0..count {
        let header = file.get(headers + i * size..)?;
        if header.first() != Some(&1) {
            continue;
        }
        let (offset, address, length) = (quad(header, 8)?, quad(header, 24)?, quad(header, 32)?);
        let bytes = file.get(offset as usize..)?.get(..length as usize)?;
        segments.push(Segment { address, bytes });
    }
    Some(Image { entry: quad(file, 24)?, segments })
}

#[cfg(test)]
mod tests {
    #[test]
    fn our_images_are_multiboot_at_1_mib() {
        for program in crate::PROGRAMS {
            let image = super::parse(program.image).expect(program.name);
            let first = image.segments[0];
            assert_eq!(first.address, 0x10_0000, "{}", program.name);
            assert_eq!(first.bytes[..4], 0x1bad_b002u32.to_le_bytes(), "{}", program.name);
            assert!(image.entry >= first.address);
        }
    }

    #[test]
    fn garbage_is_no_image() {
        assert_eq!(super::parse(b""), None);
        assert_eq!(super::parse(b"\x7fELF\x02\x01"), None);
        assert_eq!(super::parse(&[0; 64]), None);
    }
}
