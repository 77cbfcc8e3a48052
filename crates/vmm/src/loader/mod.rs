//! Boot loaders: a file is recognized by its content, placed in guest memory, and gets the information that its
//! boot protocol promises.

pub mod bzimage;
pub mod describe;
pub mod elf;
mod image;
pub mod multiboot;
pub mod pvh;

use std::io;

use vm_memory::{Bytes, GuestAddress};

pub use image::{Image, Source};

use crate::layout;
use crate::memory::{self, GuestMemory, PAGE_SIZE, Size};

/// Longest command line of protocols that set no limit themselves.
pub const MAX_COMMAND_LINE: u64 = layout::CMDLINE_END - layout::CMDLINE - 1;

/// How the first virtual CPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode with identity paging; RSI points to the zero page.
    Long {
        /// Instruction pointer.
        rip: u64,
        /// `struct boot_params`.
        zero_page: u64,
    },
    /// 32-bit protected mode without paging.
    Protected {
        /// Instruction pointer.
        eip: u32,
        /// The protocol's magic number.
        eax: u32,
        /// The protocol's information structure.
        ebx: u32,
    },
}

/// What a kernel is told.
#[derive(Clone, Copy, Debug)]
pub struct BootSource<'a> {
    /// Kernel command line.
    pub command_line: &'a str,
    /// Address of the ACPI root pointer.
    pub rsdp: u64,
    /// Seed for the guest's random number generator.
    pub rng_seed: Option<[u8; 32]>,
}

/// An initial RAM disk or module in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Why nothing can be booted.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot read {name}: {error}")]
    Read {
        /// The file.
        name: String,
        /// The reason.
        error: io::Error,
    },
    /// No known kernel format.
    #[error(
        "{name} is no kernel: it is {found}. A Linux bzImage, an ELF file with a PVH note or a multiboot-1 \
         image is needed"
    )]
    NotAKernel {
        /// The file.
        name: String,
        /// What it is.
        found: String,
    },
    /// A Linux image that cannot be booted.
    #[error(transparent)]
    BzImage(#[from] bzimage::BzImageError),
    /// An ELF image that cannot be booted.
    #[error(transparent)]
    Elf(#[from] elf::ElfError),
    /// A multiboot image that cannot be booted.
    #[error(transparent)]
    Multiboot(#[from] multiboot::MultibootError),
    /// More memory is needed.
    #[error(
        "the kernel does not fit: it needs memory up to {}, and the machine has {} below 4 GiB; give more \
         with --memory",
        Size(*.needed), Size(*.ram)
    )]
    KernelDoesNotFit {
        /// End of what the kernel needs.
        needed: u64,
        /// End of RAM.
        ram: u64,
    },
    /// The kernel wants memory that is the machine's.
    #[error(
        "the kernel loads at {start:#x} to {end:#x}, over memory that is reserved for firmware and boot data"
    )]
    Reserved {
        /// First byte.
        start: u64,
        /// End.
        end: u64,
    },
    /// Too large.
    #[error(
        "the initrd {name} does not fit: it has {}, and {} are free for it below {limit:#x}; give more with \
         --memory",
        Size(*.length), Size(*.room)
    )]
    InitrdDoesNotFit {
        /// The file.
        name: String,
        /// Its size.
        length: u64,
        /// What there is.
        room: u64,
        /// The end of the room.
        limit: u64,
    },
    /// Too long.
    #[error("the kernel command line has {length} bytes; this kernel takes at most {limit}")]
    CommandLineTooLong {
        /// Its length.
        length: u64,
        /// The limit.
        limit: u64,
    },
    /// Contains a NUL.
    #[error("the kernel command line contains a zero byte")]
    CommandLineNul,
    /// More boot information than its room holds.
    #[error("the boot information needs {} and has room for {}", Size(*.needed), Size(*.room))]
    InfoTooLong {
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        room: u64,
    },
    /// Guest memory is not where it should be.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

impl LoadError {
    fn read(name: &str, error: io::Error) -> LoadError {
        LoadError::Read { name: name.into(), error }
    }
}

/// Whether the image is likely a Linux kernel, which wants a command line of its own kind: a bzImage, or an ELF file
/// that is no multiboot image.
pub fn is_linux<S: Source>(kernel: &Image<S>) -> bool {
    bzimage::is_bzimage(kernel.head())
        || elf::is_elf(kernel.head()) && multiboot::find_header(kernel.head()).is_none()
}

/// Recognizes `kernel`, loads it with its initial RAM disk and command line, and says how to start it.
pub fn load<K: Source, I: Source>(
    memory: &GuestMemory,
    kernel: &mut Image<K>,
    initrd: Option<&mut Image<I>>,
    boot: &BootSource<'_>,
) -> Result<Entry, LoadError> {
    if bzimage::is_bzimage(kernel.head()) {
        let image = bzimage::parse(kernel.head(), kernel.length())?;
        return image.load(memory, kernel, initrd, boot);
    }
    let multiboot = multiboot::find_header(kernel.head());
    if elf::is_elf(kernel.head()) {
        let header = elf::Header::parse(kernel.head(), kernel.length())?;
        let segments = header.segments(kernel)?;
        if let Some(entry) = elf::pvh_entry(&segments, kernel)? {
            return pvh::load(&segments, entry, memory, kernel, initrd, boot);
        }
        if multiboot.is_none() {
            return Err(elf::ElfError::NoEntry { bits: header.bits() }.into());
        }
    }
    match multiboot {
        Some(header) => header.load(memory, kernel, initrd, boot),
        None => Err(LoadError::NotAKernel {
            name: kernel.name().into(),
            found: describe::describe(kernel.head(), kernel.length()),
        }),
    }
}

/// Checks that a kernel's range lies in RAM below 4 GiB and outside of what the machine uses itself; gives its end.
fn check_placement(start: u64, length: u64, ram: u64) -> Result<u64, LoadError> {
    let end = start.saturating_add(length);
    if end > ram {
        return Err(LoadError::KernelDoesNotFit { needed: end, ram });
    }
    let taken = [(layout::BOOT_INFO, layout::CMDLINE_END), (layout::EBDA, layout::FIRMWARE_END)];
    if taken.iter().any(|&(from, to)| start < to && end > from) {
        return Err(LoadError::Reserved { start, end });
    }
    Ok(end)
}

/// Puts the initial RAM disk as high as possible between `lowest` and `limit`.
fn place_initrd_high<S: Source>(
    memory: &GuestMemory,
    image: &mut Image<S>,
    lowest: u64,
    limit: u64,
) -> Result<Placed, LoadError> {
    let start = limit
        .checked_sub(image.length())
        .map(|start| start & !(PAGE_SIZE - 1))
        .filter(|&start| start >= lowest)
        .ok_or_else(|| does_not_fit(image, lowest, limit))?;
    copy_initrd(memory, image, start)
}

/// Puts a module on the first page after `lowest`.
fn place_initrd_low<S: Source>(
    memory: &GuestMemory,
    image: &mut Image<S>,
    lowest: u64,
) -> Result<Placed, LoadError> {
    let limit = memory::low_ram_end(memory);
    let start = lowest.max(layout::HIGH_MEMORY).next_multiple_of(PAGE_SIZE);
    if start.saturating_add(image.length()) > limit {
        return Err(does_not_fit(image, start, limit));
    }
    copy_initrd(memory, image, start)
}

fn does_not_fit<S: Source>(image: &Image<S>, lowest: u64, limit: u64) -> LoadError {
    let room = limit.saturating_sub(lowest);
    LoadError::InitrdDoesNotFit { name: image.name().into(), length: image.length(), room, limit }
}

fn copy_initrd<S: Source>(
    memory: &GuestMemory,
    image: &mut Image<S>,
    start: u64,
) -> Result<Placed, LoadError> {
    let length = image.length();
    image.copy_to(0, length, memory, start).map_err(|e| LoadError::read(image.name(), e))?;
    Ok(Placed { start, length })
}

/// Writes the command line with its terminating zero; `limit` counts the bytes before it.
fn write_command_line(memory: &GuestMemory, line: &str, limit: u64) -> Result<(), LoadError> {
    let length = line.len() as u64;
    let limit = limit.min(MAX_COMMAND_LINE);
    if length > limit {
        return Err(LoadError::CommandLineTooLong { length, limit });
    }
    if line.contains('\0') {
        return Err(LoadError::CommandLineNul);
    }
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, GuestAddress(layout::CMDLINE))?;
    Ok(())
}

/// Boot information in the making: a main structure at [`layout::BOOT_INFO`], and behind it what it points to.
struct InfoBlock {
    bytes: Vec<u8>,
}

impl InfoBlock {
    /// Keeps `main` bytes free for the main structure.
    fn new(main: usize) -> Self {
        Self { bytes: vec![0; main] }
    }

    /// Appends `part` on an 8-byte boundary and gives its address.
    fn push(&mut self, part: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let address = layout::BOOT_INFO + self.bytes.len() as u64;
        self.bytes.extend_from_slice(part);
        address
    }

    /// Fills in the main structure and writes everything; gives its address.
    fn write(mut self, main: &[u8], memory: &GuestMemory) -> Result<u32, LoadError> {
        let room = layout::BOOT_INFO_END - layout::BOOT_INFO;
        let needed = self.bytes.len() as u64;
        if needed > room {
            return Err(LoadError::InfoTooLong { needed, room });
        }
        self.bytes[..main.len()].copy_from_slice(main);
        memory.write_slice(&self.bytes, GuestAddress(layout::BOOT_INFO))?;
        Ok(layout::BOOT_INFO as u32)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Cursor;

    pub(crate) fn memory(size: u64) -> GuestMemory {
        memory::allocate(size).unwrap()
    }

    pub(crate) fn boot_source(command_line: &str) -> BootSource<'_> {
        BootSource { command_line, rsdp: layout::ACPI_TABLES, rng_seed: Some([5; 32]) }
    }

    fn try_load(file: &[u8]) -> Result<Entry, String> {
        let memory = memory(32 << 20);
        let mut kernel = Image::new(Cursor::new(file), "file").unwrap();
        let none: Option<&mut Image<Cursor<&[u8]>>> = None;
        load(&memory, &mut kernel, none, &boot_source("")).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_no_kernel_is_named() {
        for (file, expected) in [
            (&b""[..], "an empty file"),
            (b"\x1f\x8b\x08\0\0\0", "gzip"),
            (b"#!/bin/sh\nexit 0\n", "a script"),
            (b"just words\n", "a text file"),
            (&elf::tests::elf64(0x10_0000, &[0x90; 16], &[]), "neither a PVH note nor a multiboot-1 header"),
        ] {
            let text = try_load(file).unwrap_err();
            assert!(text.contains(expected), "{text:?} lacks {expected:?}");
        }
    }

    /// A small generator of pseudo-random numbers (xorshift64*), for mutations that are the same in every run.
    fn random(state: &mut u64) -> u64 {
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    #[test]
    fn mutated_images_never_panic() {
        let notes = elf::tests::note(b"Xen\0", 18, &0x10_0010_u32.to_le_bytes());
        let mut state = 0x1234_5678;
        for good in [bzimage::tests::synthetic(|_| ()), elf::tests::elf64(0x10_0000, &[0xf4; 64], &notes)] {
            for _ in 0..300 {
                let mut file = good.clone();
                for _ in 0..1 + random(&mut state) % 4 {
                    let at = random(&mut state) as usize % file.len().min(0x280);
                    file[at] = random(&mut state) as u8;
                }
                let _ = try_load(&file);
            }
        }
    }
}
