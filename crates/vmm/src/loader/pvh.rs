//! The PVH boot protocol (xen/include/public/arch-x86/hvm/start_info.h): 32-bit entry with EBX pointing to
//! `struct hvm_start_info`.

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::elf::{self, Segment};
use super::{
    BootSource, Entry, Image, InfoBlock, LoadError, MAX_COMMAND_LINE, Source, place_initrd_high,
    write_command_line,
};
use crate::layout;
use crate::memory::{self, GuestMemory};

/// Loads an ELF kernel with a PVH entry point.
pub fn load<K: Source, I: Source>(
    segments: &[Segment],
    entry: u32,
    memory: &GuestMemory,
    kernel: &mut Image<K>,
    initrd: Option<&mut Image<I>>,
    boot: &BootSource<'_>,
) -> Result<Entry, LoadError> {
    let end = elf::load_segments(segments, memory, kernel, entry.into())?;
    let limit = memory::low_ram_end(memory);
    let initrd = initrd.map(|image| place_initrd_high(memory, image, end, limit)).transpose()?;
    write_command_line(memory, boot.command_line, MAX_COMMAND_LINE)?;

    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: boot.rsdp,
        ..hvm_start_info::default()
    };
    let mut block = InfoBlock::new(size_of::<hvm_start_info>());
    if let Some(initrd) = initrd {
        let module =
            hvm_modlist_entry { paddr: initrd.start, size: initrd.length, ..hvm_modlist_entry::default() };
        info.nr_modules = 1;
        info.modlist_paddr = block.push(module.as_slice());
    }
    let map = memory::memory_map(memory);
    info.memmap_entries = map.len() as u32;
    let entries: Vec<u8> = map
        .iter()
        .flat_map(|range| {
            let (addr, size, type_) = (range.start, range.length, range.kind as u32);
            hvm_memmap_table_entry { addr, size, type_, reserved: 0 }.as_slice().to_vec()
        })
        .collect();
    info.memmap_paddr = block.push(&entries);
    let address = block.write(info.as_slice(), memory)?;
    Ok(Entry::Protected { eip: entry, eax: 0, ebx: address })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loader::tests::{boot_source, memory};
    use std::io::Cursor;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn start_info_points_to_everything() {
        let notes = elf::tests::note(b"Xen\0", 18, &0x10_0010_u32.to_le_bytes());
        let file = elf::tests::elf64(0x10_0000, &[0xf4; 64], &notes);
        let memory = memory(8 << 20);
        let mut kernel = Image::new(Cursor::new(&file[..]), "vmlinux").unwrap();
        let mut initrd = Image::new(Cursor::new(&[7_u8; 5000][..]), "rd").unwrap();
        let entry = crate::loader::load(&memory, &mut kernel, Some(&mut initrd), &boot_source("x")).unwrap();
        assert_eq!(entry, Entry::Protected { eip: 0x10_0010, eax: 0, ebx: layout::BOOT_INFO as u32 });

        let info: hvm_start_info = memory.read_obj(GuestAddress(layout::BOOT_INFO)).unwrap();
        assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), ((8 << 20) - 8192, 5000));
        let last = info.memmap_paddr + 24 * (u64::from(info.memmap_entries) - 1);
        let last: hvm_memmap_table_entry = memory.read_obj(GuestAddress(last)).unwrap();
        assert_eq!((last.addr, last.size, last.type_), (1 << 20, 7 << 20, 1));
    }
}
