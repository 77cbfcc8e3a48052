//! Multiboot version 0.6.96 ("multiboot-1"): 32-bit protected-mode entry with EBX pointing to the information
//! structure. The image is an ELF file, or any file whose header gives its load addresses.

use super::elf;
use super::{BootSource, Entry, Image, InfoBlock, LoadError, MAX_COMMAND_LINE, Source, check_placement};
use super::{place_initrd_low, write_command_line};
use crate::layout;
use crate::memory::{self, GuestMemory};

/// Magic number of the header in the file.
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What EAX holds at entry.
const ENTRY_MAGIC: u32 = 0x2bad_b002;
/// The header lies in the first bytes of the file, on a 4-byte boundary.
const SEARCH: usize = 8192;
/// Header flags 0 to 15 must be understood: page-aligned modules, memory information; video mode (2) is a wish.
const KNOWN_REQUIREMENTS: u32 = 0b111;
/// Header flag: the address fields are valid.
const ADDRESSES: u32 = 1 << 16;

/// Why a file with a multiboot header cannot be booted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MultibootError {
    /// Asks for something that no loader of version 0.6.96 knows.
    #[error("the multiboot header asks for unknown features (flags {0:#x})")]
    Requirements(u32),
    /// The address fields contradict each other or the file.
    #[error("the multiboot header is corrupt: {0}")]
    Corrupt(&'static str),
    /// Neither ELF nor address fields.
    #[error("the file has a multiboot header without addresses and is no ELF file")]
    NoAddresses,
}

/// A multiboot header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where it was found in the file.
    offset: u32,
    flags: u32,
    /// `header_addr`, `load_addr`, `load_end_addr`, `bss_end_addr`, `entry_addr`.
    addresses: [u32; 5],
}

/// What to copy where, from the address fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Placement {
    file_offset: u64,
    load: u64,
    length: u64,
    memory_length: u64,
    entry: u32,
}

/// Finds the header in the first bytes of a file.
pub fn find_header(head: &[u8]) -> Option<Header> {
    let head = &head[..head.len().min(SEARCH)];
    (0..head.len()).step_by(4).find_map(|offset| {
        let word = |index: usize| {
            let bytes = head.get(offset + index * 4..)?.first_chunk()?;
            Some(u32::from_le_bytes(*bytes))
        };
        let (magic, flags, checksum) = (word(0)?, word(1)?, word(2)?);
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
            return None;
        }
        let mut addresses = [0; 5];
        if flags & ADDRESSES != 0 {
            for (i, address) in addresses.iter_mut().enumerate() {
                *address = word(3 + i)?;
            }
        }
        Some(Header { offset: offset as u32, flags, addresses })
    })
}

impl Header {
    /// Checks the header's wishes and address fields against a file of `length` bytes.
    fn placement(&self, length: u64) -> Result<Placement, MultibootError> {
        let [header, load, load_end, bss_end, entry] = self.addresses.map(u64::from);
        let corrupt = MultibootError::Corrupt;
        let before = header.checked_sub(load).ok_or(corrupt("load_addr lies above header_addr"))?;
        let file_offset = u64::from(self.offset)
            .checked_sub(before)
            .ok_or(corrupt("load_addr lies before the start of the file"))?;
        let available = length.saturating_sub(file_offset);
        let wanted = match load_end {
            0 => available,
            end => end.checked_sub(load).ok_or(corrupt("load_end_addr lies below load_addr"))?,
        };
        if wanted > available {
            return Err(corrupt("load_end_addr lies beyond the end of the file"));
        }
        let memory_length = match bss_end {
            0 => wanted,
            end => end.checked_sub(load).ok_or(corrupt("bss_end_addr lies below load_addr"))?,
        };
        if memory_length < wanted {
            return Err(corrupt("bss_end_addr lies below load_end_addr"));
        }
        if !(load..load + memory_length).contains(&entry) {
            return Err(corrupt("entry_addr lies outside of the image"));
        }
        Ok(Placement { file_offset, load, length: wanted, memory_length, entry: entry as u32 })
    }

    fn check_requirements(&self) -> Result<(), MultibootError> {
        let unknown = self.flags & 0xffff & !KNOWN_REQUIREMENTS;
        if unknown == 0 { Ok(()) } else { Err(MultibootError::Requirements(unknown)) }
    }

    /// Loads the image; gives its entry point and the end of the memory that it uses.
    fn load_image<K: Source>(
        &self,
        memory: &GuestMemory,
        kernel: &mut Image<K>,
    ) -> Result<(u32, u64), LoadError> {
        if self.flags & ADDRESSES != 0 {
            let place = self.placement(kernel.length())?;
            let end = check_placement(place.load, place.memory_length, memory::low_ram_end(memory))?;
            kernel
                .copy_to(place.file_offset, place.length, memory, place.load)
                .map_err(|e| LoadError::read(kernel.name(), e))?;
            return Ok((place.entry, end));
        }
        if !elf::is_elf(kernel.head()) {
            return Err(MultibootError::NoAddresses.into());
        }
        let header = elf::Header::parse(kernel.head(), kernel.length())?;
        let entry = u32::try_from(header.entry)
            .map_err(|_| MultibootError::Corrupt("the ELF entry point lies above 4 GiB"))?;
        let segments = header.segments(kernel)?;
        Ok((entry, elf::load_segments(&segments, memory, kernel, header.entry)?))
    }

    /// Loads image, command line and module, and writes the information structure.
    pub fn load<K: Source, I: Source>(
        &self,
        memory: &GuestMemory,
        kernel: &mut Image<K>,
        initrd: Option<&mut Image<I>>,
        boot: &BootSource<'_>,
    ) -> Result<Entry, LoadError> {
        self.check_requirements()?;
        let (entry, end) = self.load_image(memory, kernel)?;
        let module = initrd.map(|image| place_initrd_low(memory, image, end)).transpose()?;
        // By convention the first word of the command line is the image's name.
        let line = format!("{} {}", kernel.name(), boot.command_line);
        write_command_line(memory, line.trim_end(), MAX_COMMAND_LINE)?;

        let mut block = InfoBlock::new(Info::SIZE);
        let mut info = Info([0; Info::SIZE / 4]);
        let upper = memory::low_ram_end(memory) - layout::HIGH_MEMORY;
        info.set(Info::MEM_LOWER, (layout::EBDA / 1024) as u32);
        info.set(Info::MEM_UPPER, (upper / 1024) as u32);
        info.set(Info::CMDLINE, layout::CMDLINE as u32);
        info.set(Info::FLAGS, Info::HAS_MEM | Info::HAS_CMDLINE | Info::HAS_MMAP | Info::HAS_LOADER_NAME);
        if let Some(module) = module {
            let name = block.push(b"initrd\0") as u32;
            let words = [module.start as u32, (module.start + module.length) as u32, name, 0];
            info.set(Info::MODS_COUNT, 1);
            info.set(Info::MODS_ADDR, block.push(&words.map(u32::to_le_bytes).concat()) as u32);
            info.set(Info::FLAGS, info.0[Info::FLAGS] | Info::HAS_MODS);
        }
        let map = memory_map(memory);
        info.set(Info::MMAP_LENGTH, map.len() as u32);
        info.set(Info::MMAP_ADDR, block.push(&map) as u32);
        info.set(Info::LOADER_NAME, block.push(b"ring3\0") as u32);
        let bytes: Vec<u8> = info.0.iter().flat_map(|word| word.to_le_bytes()).collect();
        let address = block.write(&bytes, memory)?;
        Ok(Entry::Protected { eip: entry, eax: ENTRY_MAGIC, ebx: address })
    }
}

/// The information structure, in 32-bit words; the constants are word indices and flag bits.
struct Info([u32; Info::SIZE / 4]);

impl Info {
    const SIZE: usize = 88;
    const FLAGS: usize = 0;
    const MEM_LOWER: usize = 1;
    const MEM_UPPER: usize = 2;
    const CMDLINE: usize = 4;
    const MODS_COUNT: usize = 5;
    const MODS_ADDR: usize = 6;
    const MMAP_LENGTH: usize = 11;
    const MMAP_ADDR: usize = 12;
    const LOADER_NAME: usize = 16;

    const HAS_MEM: u32 = 1 << 0;
    const HAS_CMDLINE: u32 = 1 << 2;
    const HAS_MODS: u32 = 1 << 3;
    const HAS_MMAP: u32 = 1 << 6;
    const HAS_LOADER_NAME: u32 = 1 << 9;

    fn set(&mut self, word: usize, value: u32) {
        self.0[word] = value;
    }
}

/// The memory map as the protocol wants it: each entry preceded by its size.
fn memory_map(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = Vec::new();
    for range in memory::memory_map(memory) {
        bytes.extend_from_slice(&20_u32.to_le_bytes());
        bytes.extend_from_slice(&range.start.to_le_bytes());
        bytes.extend_from_slice(&range.length.to_le_bytes());
        bytes.extend_from_slice(&(range.kind as u32).to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loader::tests::{boot_source, memory};
    use std::io::Cursor;
    use vm_memory::{Bytes, GuestAddress};

    fn header_words(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
        let checksum = 0_u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
        let mut words = vec![HEADER_MAGIC, flags, checksum];
        words.extend(addresses);
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    /// A flat image with its header at offset 16.
    fn flat(addresses: [u32; 5]) -> Vec<u8> {
        let mut file = vec![0x90; 16];
        file.extend(header_words(ADDRESSES | 3, addresses));
        file.resize(256, 0xf4);
        file
    }

    fn load(file: &[u8]) -> Result<(Entry, GuestMemory), LoadError> {
        let memory = memory(4 << 20);
        let mut kernel = Image::new(Cursor::new(file), "guest.bin").unwrap();
        let mut initrd = Image::new(Cursor::new(&b"module"[..]), "rd").unwrap();
        let entry = crate::loader::load(&memory, &mut kernel, Some(&mut initrd), &boot_source("a=1"))?;
        Ok((entry, memory))
    }

    #[test]
    fn a_flat_image_gets_its_information() {
        let base = 0x10_0000;
        let (entry, memory) = load(&flat([base + 16, base, 0, base + 0x3000, base + 64])).unwrap();
        let Entry::Protected { eip, eax, ebx } = entry else { panic!("{entry:?}") };
        assert_eq!((eip, eax), (base + 64, ENTRY_MAGIC));
        let word = |address: u32| memory.read_obj::<u32>(GuestAddress(address.into())).unwrap();
        assert_eq!(word(ebx), 0x24d);
        assert_eq!((word(ebx + 4), word(ebx + 8)), (639, 3072));
        let module = word(ebx + 24);
        assert_eq!((word(module), word(module + 4)), (base + 0x3000, base + 0x3006));
        assert_eq!(word(base + 252), 0xf4f4_f4f4);
        let mut line = [0; 14];
        memory.read_slice(&mut line, GuestAddress(word(ebx + 16).into())).unwrap();
        assert_eq!(&line, b"guest.bin a=1\0");
    }

    #[test]
    fn an_elf_image_is_loaded_by_its_segments() {
        let mut code = header_words(0, [0; 5]);
        code.resize(64, 0xf4);
        let (entry, _) = load(&elf::tests::elf64(0x20_0000, &code, &[])).unwrap();
        assert!(matches!(entry, Entry::Protected { eip: 0x20_0000, .. }));
    }

    #[test]
    fn hostile_headers_are_refused() {
        let base = 0x10_0000;
        let table = [
            ([base - 1, base, 0, 0, base], "above header_addr"),
            ([base + 17, base, 0, 0, base], "before the start"),
            ([base + 16, base, base - 1, 0, base], "load_end_addr lies below"),
            ([base + 16, base, base + 257, 0, base], "beyond the end"),
            ([base + 16, base, 0, base - 1, base], "bss_end_addr lies below load_addr"),
            ([base + 16, base, 0, base + 1, base], "below load_end_addr"),
            ([base + 16, base, 0, 0, base + 256], "entry_addr"),
            ([base + 16, base, 0, u32::MAX, base], "does not fit"),
            ([u32::MAX, u32::MAX - 16, 0, 0, u32::MAX - 1], "does not fit"),
            ([0x1010, 0x1000, 0, 0, 0x1000], "reserved"),
        ];
        for (addresses, expected) in table {
            let text = load(&flat(addresses)).map(|_| ()).unwrap_err().to_string();
            assert!(text.contains(expected), "{text:?} lacks {expected:?}");
        }
        let mut file = header_words(1 << 5, [0; 5]);
        let text = load(&file).map(|_| ()).unwrap_err().to_string();
        assert!(text.contains("0x20"), "{text}");
        file = header_words(0, [0; 5]);
        assert!(load(&file).map(|_| ()).unwrap_err().to_string().contains("no ELF file"));
    }

    #[test]
    fn headers_are_found_only_where_they_may_be() {
        let good = header_words(0, [0; 5]);
        for (offset, found) in [(0, true), (4, true), (2, false), (8180, true), (8184, false)] {
            let mut file = vec![0; offset];
            file.extend(&good);
            assert_eq!(find_header(&file).is_some(), found, "{offset}");
        }
        let cut = header_words(ADDRESSES, [0; 5]);
        assert_eq!(find_header(&cut[..20]), None);
    }
}
