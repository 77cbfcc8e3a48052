//! ELF files: headers, loadable segments, and the note that carries the PVH entry point.

use super::{Image, LoadError, Source, check_placement};
use crate::memory::{self, GuestMemory, Size};

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
/// XEN_ELFNOTE_PHYS32_ENTRY (xen/include/public/elfnote.h): the 32-bit physical entry point.
const NOTE_PHYS32_ENTRY: u32 = 18;
/// Notes longer than this are not read.
const MAX_NOTES: u64 = 1 << 20;

/// Why an ELF file cannot be booted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ElfError {
    /// Ends inside its own headers.
    #[error("the ELF file is cut off: {what} ends at byte {end} of {}", Size(*.length))]
    Truncated {
        /// What is missing.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// The file's length.
        length: u64,
    },
    /// Big-endian, or an unknown class.
    #[error("the ELF file is neither 32-bit nor 64-bit little-endian")]
    Format,
    /// For another processor.
    #[error("the ELF file is for another processor (machine {0}); x86 is needed")]
    Machine(u16),
    /// A relocatable object, a core file …
    #[error("the ELF file is {}, not an executable", kind_name(*.0))]
    Kind(u16),
    /// A field makes no sense.
    #[error("the ELF file is corrupt: {0}")]
    Corrupt(&'static str),
    /// Neither a PVH note nor a multiboot header.
    #[error(
        "the file is a {bits}-bit ELF executable with neither a PVH note nor a multiboot-1 header, so there is \
         no way to enter it (a Linux vmlinux needs CONFIG_PVH=y; a bzImage always works)"
    )]
    NoEntry {
        /// 32 or 64.
        bits: u8,
    },
}

fn kind_name(kind: u16) -> &'static str {
    match kind {
        1 => "a relocatable object",
        4 => "a core dump",
        _ => "of an unknown type",
    }
}

/// The file header's facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// 64-bit class.
    pub is_64: bool,
    /// Entry point.
    pub entry: u64,
    /// Offset of the program headers.
    segments: u64,
    /// How many there are.
    segment_count: u16,
}

/// One program header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    kind: u32,
    offset: u64,
    physical: u64,
    file_size: u64,
    memory_size: u64,
    alignment: u64,
}

/// Whether the file claims to be an ELF file.
pub fn is_elf(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

/// Little-endian fields at fixed offsets of a byte slice that may be too short.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.get(offset..)?.first_chunk().copied()
    }
    fn u16(&self, offset: usize) -> Option<u16> {
        self.take(offset).map(u16::from_le_bytes)
    }
    fn u32(&self, offset: usize) -> Option<u32> {
        self.take(offset).map(u32::from_le_bytes)
    }
    fn u64(&self, offset: usize) -> Option<u64> {
        self.take(offset).map(u64::from_le_bytes)
    }
    /// An address-sized field: its offset in the 64-bit or in the 32-bit form.
    fn word(&self, is_64: bool, offset_64: usize, offset_32: usize) -> Option<u64> {
        if is_64 { self.u64(offset_64) } else { self.u32(offset_32).map(u64::from) }
    }
}

impl Header {
    /// Parses the ELF header at the start of `head`.
    pub fn parse(head: &[u8], length: u64) -> Result<Header, ElfError> {
        let fields = Fields(head);
        let truncated = ElfError::Truncated { what: "its header", end: 64, length };
        let is_64 = match (head.get(4), head.get(5)) {
            (Some(1), Some(1)) => false,
            (Some(2), Some(1)) => true,
            (Some(_), Some(_)) => return Err(ElfError::Format),
            _ => return Err(truncated),
        };
        let get = || -> Option<_> {
            let (kind, machine) = (fields.u16(16)?, fields.u16(18)?);
            let header = Header {
                is_64,
                entry: fields.word(is_64, 24, 24)?,
                segments: fields.word(is_64, 32, 28)?,
                segment_count: fields.u16(if is_64 { 56 } else { 44 })?,
            };
            Some((kind, machine, fields.u16(if is_64 { 54 } else { 42 })?, header))
        };
        let (kind, machine, entry_size, header) = get().ok_or(truncated)?;
        if !matches!(machine, EM_386 | EM_X86_64) {
            return Err(ElfError::Machine(machine));
        }
        if !matches!(kind, ET_EXEC | ET_DYN) {
            return Err(ElfError::Kind(kind));
        }
        if usize::from(entry_size) != header.segment_size() {
            return Err(ElfError::Corrupt("the size of a program header is wrong"));
        }
        Ok(header)
    }

    /// 32 or 64.
    pub fn bits(&self) -> u8 {
        if self.is_64 { 64 } else { 32 }
    }

    fn segment_size(&self) -> usize {
        if self.is_64 { 56 } else { 32 }
    }

    /// Reads the program headers.
    pub fn segments<S: Source>(&self, image: &mut Image<S>) -> Result<Vec<Segment>, LoadError> {
        let size = self.segment_size() * usize::from(self.segment_count);
        let length = image.length();
        let end = self.segments.saturating_add(size as u64);
        if end > length {
            return Err(ElfError::Truncated { what: "its program header table", end, length }.into());
        }
        let bytes = image.read(self.segments, size).map_err(|e| LoadError::read(image.name(), e))?;
        Ok(self.parse_segments(&bytes, length)?)
    }

    /// Parses program headers; every one returned lies within a file of `length` bytes.
    fn parse_segments(&self, bytes: &[u8], length: u64) -> Result<Vec<Segment>, ElfError> {
        bytes.chunks_exact(self.segment_size()).map(|chunk| self.parse_segment(chunk, length)).collect()
    }

    fn parse_segment(&self, bytes: &[u8], length: u64) -> Result<Segment, ElfError> {
        let (fields, is_64) = (Fields(bytes), self.is_64);
        let get = || -> Option<_> {
            Some(Segment {
                kind: fields.u32(0)?,
                offset: fields.word(is_64, 8, 4)?,
                physical: fields.word(is_64, 24, 12)?,
                file_size: fields.word(is_64, 32, 16)?,
                memory_size: fields.word(is_64, 40, 20)?,
                alignment: fields.word(is_64, 48, 28)?,
            })
        };
        let segment = get().ok_or(ElfError::Corrupt("a program header is cut off"))?;
        if matches!(segment.kind, PT_LOAD | PT_NOTE) {
            let end = segment.offset.saturating_add(segment.file_size);
            if end > length {
                return Err(ElfError::Truncated { what: "a segment", end, length });
            }
            if segment.kind == PT_LOAD && segment.file_size > segment.memory_size {
                return Err(ElfError::Corrupt("a segment is larger in the file than in memory"));
            }
        }
        Ok(segment)
    }
}

/// Finds the PVH entry point in the notes of a file.
pub fn pvh_entry<S: Source>(segments: &[Segment], image: &mut Image<S>) -> Result<Option<u32>, LoadError> {
    for segment in segments.iter().filter(|s| s.kind == PT_NOTE && s.file_size <= MAX_NOTES) {
        let bytes = image
            .read(segment.offset, segment.file_size as usize)
            .map_err(|e| LoadError::read(image.name(), e))?;
        if let Some(entry) = find_pvh_note(&bytes, if segment.alignment == 8 { 8 } else { 4 }) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Searches a note segment for Xen's PHYS32_ENTRY.
pub fn find_pvh_note(mut notes: &[u8], alignment: usize) -> Option<u32> {
    loop {
        let fields = Fields(notes);
        let name_size = fields.u32(0)? as usize;
        let value_size = fields.u32(4)? as usize;
        let kind = fields.u32(8)?;
        let value_start = name_size.checked_add(12)?.checked_next_multiple_of(alignment)?;
        let value_end = value_start.checked_add(value_size)?;
        let name = notes.get(12..name_size.checked_add(12)?)?;
        let value = notes.get(value_start..value_end)?;
        if kind == NOTE_PHYS32_ENTRY && name == b"Xen\0" {
            return match *value {
                [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => Some(u32::from_le_bytes([a, b, c, d])),
                _ => None,
            };
        }
        notes = notes.get(value_end.checked_next_multiple_of(alignment)?..)?;
    }
}

/// Copies all loadable segments to their physical addresses; gives the end of the highest one. Memory is new,
/// so what lies beyond a segment's bytes in the file is zero already.
pub fn load_segments<S: Source>(
    segments: &[Segment],
    memory: &GuestMemory,
    image: &mut Image<S>,
    entry: u64,
) -> Result<u64, LoadError> {
    let ram = memory::low_ram_end(memory);
    let mut end = 0;
    let mut entry_found = false;
    for segment in segments.iter().filter(|s| s.kind == PT_LOAD && s.memory_size != 0) {
        let segment_end = check_placement(segment.physical, segment.memory_size, ram)?;
        image
            .copy_to(segment.offset, segment.file_size, memory, segment.physical)
            .map_err(|e| LoadError::read(image.name(), e))?;
        entry_found |= (segment.physical..segment_end).contains(&entry);
        end = end.max(segment_end);
    }
    if !entry_found {
        return Err(ElfError::Corrupt("its entry point lies outside of its segments").into());
    }
    Ok(end)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::loader::tests::memory;
    use std::io::Cursor;

    /// A note as it stands in a PT_NOTE segment.
    pub(crate) fn note(name: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [name.len() as u32, value.len() as u32, kind] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        for part in [name, value] {
            bytes.extend_from_slice(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    /// A 64-bit ELF file with one loadable segment of `code` at `physical` and one note segment.
    pub(crate) fn elf64(physical: u64, code: &[u8], notes: &[u8]) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        for half in [ET_EXEC, EM_X86_64] {
            file.extend_from_slice(&half.to_le_bytes());
        }
        file.extend_from_slice(&1_u32.to_le_bytes());
        for word in [physical, 64, 0] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(&0_u32.to_le_bytes());
        for half in [64_u16, 56, 2, 0, 0, 0] {
            file.extend_from_slice(&half.to_le_bytes());
        }
        let code_offset = 64 + 2 * 56;
        let note_offset = code_offset + code.len() as u64;
        let headers = [
            (PT_LOAD, code_offset, physical, code.len() as u64, code.len() as u64 + 100),
            (PT_NOTE, note_offset, 0, notes.len() as u64, notes.len() as u64),
        ];
        for (kind, offset, address, file_size, memory_size) in headers {
            file.extend_from_slice(&kind.to_le_bytes());
            file.extend_from_slice(&7_u32.to_le_bytes());
            for word in [offset, address, address, file_size, memory_size, 4] {
                file.extend_from_slice(&word.to_le_bytes());
            }
        }
        file.extend_from_slice(code);
        file.extend_from_slice(notes);
        file
    }

    #[test]
    fn the_pvh_note_is_found_among_others() {
        let mut notes = note(b"GNU\0", 3, &[1; 20]);
        notes.extend(note(b"Xen\0", 5, b"x"));
        notes.extend(note(b"Xen\0", NOTE_PHYS32_ENTRY, &0x100_0000_u64.to_le_bytes()));
        assert_eq!(find_pvh_note(&notes, 4), Some(0x100_0000));
        for length in 0..notes.len() {
            assert_eq!(find_pvh_note(&notes[..length], 4), None, "{length}");
        }
        assert_eq!(find_pvh_note(&note(b"Xen\0", NOTE_PHYS32_ENTRY, &[1, 2]), 4), None);
        assert_eq!(find_pvh_note(&note(b"Xen\0", NOTE_PHYS32_ENTRY, &u64::MAX.to_le_bytes()), 4), None);
        assert_eq!(find_pvh_note(&[0xff; 64], 4), None);
    }

    #[test]
    fn hostile_headers_are_refused() {
        let good = elf64(0x10_0000, &[0x90; 64], &[]);
        // (offset of a field, its new bytes, what the message says)
        let table: [(usize, &[u8], &str); 10] = [
            (5, &[2], "little-endian"),
            (18, &[40, 0], "machine 40"),
            (16, &[1, 0], "relocatable object"),
            (16, &[4, 0], "core dump"),
            (54, &[1, 0], "program header is wrong"),
            (32, &[0xff; 8], "program header table"),
            (56, &[0xff; 2], "program header table"),
            (64 + 8, &[0xff; 8], "a segment ends"),
            (64 + 32, &[0xff; 8], "a segment ends"),
            (64 + 40, &[1, 0, 0, 0], "larger in the file"),
        ];
        for (offset, bytes, expected) in table {
            let mut file = good.clone();
            file[offset..offset + bytes.len()].copy_from_slice(bytes);
            let mut image = Image::new(Cursor::new(&file[..]), "elf").unwrap();
            let result = Header::parse(image.head(), image.length()).map_err(LoadError::from);
            let text = result.and_then(|h| h.segments(&mut image)).unwrap_err().to_string();
            assert!(text.contains(expected), "{text:?} lacks {expected:?}");
        }
        for length in 0..good.len() - 1 {
            let mut image = Image::new(Cursor::new(&good[..length]), "elf").unwrap();
            let result = Header::parse(image.head(), image.length()).map_err(LoadError::from);
            assert!(result.and_then(|h| h.segments(&mut image)).is_err(), "{length}");
        }
    }

    #[test]
    fn segments_stay_inside_ram() {
        let memory = memory(4 << 20);
        let load = |physical: u64, memory_size: u64| {
            let mut file = elf64(physical, &[0x90; 64], &[]);
            file[64 + 40..64 + 48].copy_from_slice(&memory_size.to_le_bytes());
            let mut image = Image::new(Cursor::new(&file[..]), "elf").unwrap();
            let header = Header::parse(image.head(), image.length()).unwrap();
            let segments = header.segments(&mut image).unwrap();
            load_segments(&segments, &memory, &mut image, header.entry)
        };
        assert_eq!(load(0x10_0000, 0x1000).unwrap(), 0x10_1000);
        for (physical, size) in [
            (0x7000, 0x1000),
            (0x9_f000, 0x2000),
            (0xf_ffff, 0x1000),
            (0x3f_f000, 0x1001),
            (0x10_0000, u64::MAX),
            (u64::MAX - 10, 100),
            (0xc000_0000, 64),
        ] {
            assert!(load(physical, size).is_err(), "{physical:#x} {size:#x}");
        }
    }
}
