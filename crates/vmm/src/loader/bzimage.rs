//! Linux bzImage, booted by the 64-bit protocol (Documentation/arch/x86/boot.rst).

use linux_loader::loader::bootparam::{
    SETUP_RNG_SEED, XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{BootSource, Entry, Image, LoadError, Source, place_initrd_high, write_command_line};
use crate::layout;
use crate::memory::{self, GuestMemory, Size};

/// Offset of the setup header in the file and in `struct boot_params`.
const SETUP_HEADER: usize = 0x1f1;
/// The 64-bit entry point lies here, after the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader`: a loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the protected-mode code is loaded at 1 MiB.
const LOADED_HIGH: u8 = 1 << 0;

/// Why a file with the Linux boot header cannot be booted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BzImageError {
    /// Ends inside the setup part.
    #[error("the Linux kernel image is cut off: its setup part needs {} and the file has {}", Size(*.needed), Size(*.length))]
    Truncated {
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        length: u64,
    },
    /// zImage, or a protocol before 2.12.
    #[error("the Linux kernel uses boot protocol {}.{:02}; 2.12 (Linux 3.8) or later is needed", .0 >> 8, .0 & 0xff)]
    TooOld(u16),
    /// No 64-bit entry point.
    #[error("the Linux kernel is a 32-bit one: it has no 64-bit entry point")]
    Not64Bit,
    /// Not loaded at 1 MiB.
    #[error("the Linux kernel is a zImage, which loads below 1 MiB; only bzImage is supported")]
    LoadedLow,
    /// An address or a size in the header makes no sense.
    #[error("the Linux boot header is corrupt: {field} is {value:#x}")]
    Corrupt {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// The facts of a bzImage that matter for loading it.
#[derive(Clone, Copy, Debug)]
pub struct BzImage {
    /// The setup header as found in the file.
    header: setup_header,
    /// Offset of the protected-mode code.
    payload: u64,
    /// Length of the protected-mode code.
    payload_length: u64,
}

/// Whether the file claims to be a Linux kernel image.
pub fn is_bzimage(head: &[u8]) -> bool {
    head.get(0x1fe..0x200) == Some(b"\x55\xaa") && head.get(0x202..0x206) == Some(b"HdrS")
}

/// Checks the setup header of a file of `length` bytes that begins with `head`.
pub fn parse(head: &[u8], length: u64) -> Result<BzImage, BzImageError> {
    let truncated = |needed: u64| BzImageError::Truncated { needed, length };
    // The header ends where the jump at its start leads (boot.rst, "Details of harder fields", `jump`).
    let jump = *head.get(0x201).ok_or_else(|| truncated(0x202))?;
    let end = (0x202 + usize::from(jump)).min(SETUP_HEADER + size_of::<setup_header>());
    let bytes = head.get(SETUP_HEADER..end).ok_or_else(|| truncated(end as u64))?;
    let mut header = setup_header::default();
    header.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);

    if header.loadflags & LOADED_HIGH == 0 {
        return Err(BzImageError::LoadedLow);
    }
    if header.version < 0x20c {
        return Err(BzImageError::TooOld(header.version));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BzImageError::Not64Bit);
    }
    let corrupt = |field, value| Err(BzImageError::Corrupt { field, value });
    if header.relocatable_kernel != 0 && !header.kernel_alignment.is_power_of_two() {
        return corrupt("kernel_alignment", header.kernel_alignment.into());
    }
    if header.pref_address < layout::HIGH_MEMORY || header.pref_address >= layout::LOW_RAM_END {
        return corrupt("pref_address", header.pref_address);
    }
    // 0 sectors means 4 for historical reasons; the boot sector itself comes before them.
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let payload = (sectors + 1) * 512;
    match length.checked_sub(payload) {
        Some(payload_length) if payload_length > ENTRY_64 => Ok(BzImage { header, payload, payload_length }),
        _ => Err(truncated(payload + ENTRY_64 + 1)),
    }
}

impl BzImage {
    /// Where the protected-mode code is loaded: at the preferred address, or, if RAM is short, at 1 MiB.
    fn load_address(&self, ram_end: u64) -> u64 {
        let preferred = self.header.pref_address;
        if self.header.relocatable_kernel != 0 && preferred + self.payload_length > ram_end {
            layout::HIGH_MEMORY
        } else {
            preferred
        }
    }

    /// First byte that the kernel leaves free while it decompresses itself.
    fn memory_end(&self, load: u64) -> u64 {
        let alignment = u64::from(self.header.kernel_alignment).max(1);
        let runtime = if self.header.relocatable_kernel != 0 {
            load.next_multiple_of(alignment).max(self.header.pref_address)
        } else {
            self.header.pref_address
        };
        (runtime + u64::from(self.header.init_size)).max(load + self.payload_length)
    }

    /// Loads kernel, command line, initial RAM disk and zero page.
    pub fn load<K: Source, I: Source>(
        &self,
        memory: &GuestMemory,
        kernel: &mut Image<K>,
        initrd: Option<&mut Image<I>>,
        boot: &BootSource<'_>,
    ) -> Result<Entry, LoadError> {
        let ram_end = memory::low_ram_end(memory);
        let load = self.load_address(ram_end);
        let end = self.memory_end(load);
        if end > ram_end {
            return Err(LoadError::KernelDoesNotFit { needed: end, ram: ram_end });
        }
        kernel
            .copy_to(self.payload, self.payload_length, memory, load)
            .map_err(|e| LoadError::read(kernel.name(), e))?;

        let limit = ram_end.min(u64::from(self.header.initrd_addr_max) + 1);
        let initrd = initrd.map(|image| place_initrd_high(memory, image, end, limit)).transpose()?;
        write_command_line(memory, boot.command_line, u64::from(self.header.cmdline_size))?;

        let mut header = self.header;
        header.type_of_loader = LOADER_UNDEFINED;
        header.cmd_line_ptr = layout::CMDLINE as u32;
        if let Some(initrd) = initrd {
            header.ramdisk_image = initrd.start as u32;
            header.ramdisk_size = initrd.length as u32;
        }
        header.setup_data = write_rng_seed(memory, boot.rng_seed)?;
        write_zero_page(memory, header, boot.rsdp)?;
        Ok(Entry::Long { rip: load + ENTRY_64, zero_page: layout::ZERO_PAGE })
    }
}

/// Puts a `struct setup_data` with a seed for the guest's random number generator; gives its address.
fn write_rng_seed(memory: &GuestMemory, seed: Option<[u8; 32]>) -> Result<u64, LoadError> {
    let Some(seed) = seed else { return Ok(0) };
    let mut node = Vec::with_capacity(48);
    node.extend_from_slice(&0_u64.to_le_bytes());
    node.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    node.extend_from_slice(&(seed.len() as u32).to_le_bytes());
    node.extend_from_slice(&seed);
    memory.write_slice(&node, GuestAddress(layout::SETUP_DATA))?;
    Ok(layout::SETUP_DATA)
}

fn write_zero_page(memory: &GuestMemory, header: setup_header, rsdp: u64) -> Result<(), LoadError> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..boot_params::default() };
    let map = memory::memory_map(memory);
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: range.start, size: range.length, r#type: range.kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = map.len().min(table.len()) as u8;
    memory.write_slice(params.as_slice(), GuestAddress(layout::ZERO_PAGE))?;
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::loader::tests::{boot_source, memory};
    use std::io::Cursor;

    /// A bzImage with a payload of 0xc3 bytes, and a hook to spoil its header.
    pub(crate) fn synthetic(spoil: impl FnOnce(&mut setup_header)) -> Vec<u8> {
        let mut header = setup_header {
            setup_sects: 1,
            boot_flag: 0xaa55,
            jump: 0x6aeb,
            header: 0x5372_6448,
            version: 0x20f,
            loadflags: LOADED_HIGH,
            code32_start: 0x10_0000,
            initrd_addr_max: 0x7fff_ffff,
            kernel_alignment: 0x20_0000,
            relocatable_kernel: 1,
            xloadflags: XLF_KERNEL_64,
            cmdline_size: 2047,
            pref_address: 0x100_0000,
            init_size: 0x80_0000,
            ..setup_header::default()
        };
        spoil(&mut header);
        let mut file = vec![0; 1024];
        file[SETUP_HEADER..SETUP_HEADER + size_of::<setup_header>()].copy_from_slice(header.as_slice());
        file.resize(1024 + 5000, 0xc3);
        file
    }

    #[test]
    fn a_good_image_boots_at_its_preferred_address() {
        let memory = memory(64 << 20);
        let file = synthetic(|_| ());
        let mut kernel = Image::new(Cursor::new(&file[..]), "k").unwrap();
        let mut initrd = Image::new(Cursor::new(&b"initrd bytes"[..]), "i").unwrap();
        let image = parse(kernel.head(), kernel.length()).unwrap();
        let entry = image.load(&memory, &mut kernel, Some(&mut initrd), &boot_source("quiet")).unwrap();
        assert_eq!(entry, Entry::Long { rip: 0x100_0200, zero_page: layout::ZERO_PAGE });

        let byte: u8 = memory.read_obj(GuestAddress(0x100_0000 + 4999)).unwrap();
        assert_eq!(byte, 0xc3);
        let params: boot_params = memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
        let header = params.hdr;
        assert_eq!({ header.ramdisk_size }, 12);
        assert_eq!({ header.ramdisk_image }, (64 << 20) - 4096);
        assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
        assert_eq!(params.e820_entries, 4);
        let mut seed = [0; 48];
        memory.read_slice(&mut seed, GuestAddress(header.setup_data)).unwrap();
        assert_eq!(seed[8..16], [9, 0, 0, 0, 32, 0, 0, 0]);
        let mut line = [0; 6];
        memory.read_slice(&mut line, GuestAddress(layout::CMDLINE)).unwrap();
        assert_eq!(&line, b"quiet\0");
    }

    #[test]
    fn hostile_headers_are_refused() {
        type Spoil = fn(&mut setup_header);
        let table: [(Spoil, &str); 7] = [
            (|h| h.loadflags = 0, "zImage"),
            (|h| h.version = 0x20b, "2.11"),
            (|h| h.xloadflags = 0, "32-bit"),
            (|h| h.kernel_alignment = 3, "kernel_alignment is 0x3"),
            (|h| h.pref_address = u64::MAX, "pref_address"),
            (|h| h.pref_address = 0x1000, "pref_address"),
            (|h| h.setup_sects = 255, "cut off"),
        ];
        for (spoil, expected) in table {
            let file = synthetic(spoil);
            let text = parse(&file, file.len() as u64).unwrap_err().to_string();
            assert!(text.contains(expected), "{text:?} lacks {expected:?}");
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let file = synthetic(|_| ());
        for length in (0..1024 + ENTRY_64 as usize).step_by(7) {
            assert!(parse(&file[..length], length as u64).is_err(), "{length}");
        }
    }

    #[test]
    fn what_does_not_fit_is_told_with_sizes() {
        let memory = memory(64 << 20);
        let load = |spoil: fn(&mut setup_header), initrd_size: usize, line: &str| {
            let file = synthetic(spoil);
            let mut kernel = Image::new(Cursor::new(&file[..]), "k").unwrap();
            let bytes = vec![0; initrd_size];
            let mut initrd = Image::new(Cursor::new(&bytes[..]), "rd").unwrap();
            let image = parse(kernel.head(), kernel.length()).unwrap();
            image.load(&memory, &mut kernel, Some(&mut initrd), &boot_source(line)).map_err(|e| e.to_string())
        };
        assert!(load(|_| (), 40 << 20, "").is_ok());
        let text = load(|_| (), 41 << 20, "").unwrap_err();
        assert!(text.contains("41 MiB") && text.contains("40 MiB"), "{text}");
        let text = load(|h| h.init_size = u32::MAX, 1, "").unwrap_err();
        assert!(text.contains("64 MiB"), "{text}");
        let text = load(|h| h.initrd_addr_max = 0, 1, "").unwrap_err();
        assert!(text.contains("does not fit"), "{text}");
        let text = load(|_| (), 1, &"x".repeat(2048)).unwrap_err();
        assert!(text.contains("2048") && text.contains("2047"), "{text}");
    }
}
