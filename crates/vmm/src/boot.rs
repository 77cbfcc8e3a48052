//! The first virtual CPU's registers as the boot protocols want them, with the GDT and page tables that they
//! refer to.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout;
use crate::loader::Entry;
use crate::memory::GuestMemory;

/// Selector of the code segment (`__BOOT_CS`).
const CODE: u16 = 0x10;
/// Selector of the data segment (`__BOOT_DS`).
const DATA: u16 = 0x18;
/// Selector of the task state segment.
const TASK: u16 = 0x20;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Page-table entry: present, writable.
const TABLE: u64 = 0b11;
/// Page-directory entry: present, writable, 2 MiB page.
const LARGE_PAGE: u64 = 0b1000_0011;
/// Page directories of the identity mapping: one per GiB.
const DIRECTORIES: u64 = 4;

/// A flat 4 GiB segment: 32-bit code, 64-bit code or data.
fn flat_segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        g: 1,
        l: long.into(),
        db: (!long).into(),
        ..kvm_segment::default()
    }
}

/// A segment in the form that descriptor tables hold (SDM vol. 3A, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g != 0 { segment.limit >> 12 } else { segment.limit });
    let base = segment.base;
    let bit = |value: u8, at: u32| u64::from(value & 1) << at;
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(segment.type_ & 15) << 40
        | bit(segment.s, 44)
        | u64::from(segment.dpl & 3) << 45
        | bit(segment.present, 47)
        | (limit >> 16 & 15) << 48
        | bit(segment.avl, 52)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
        | (base >> 24 & 0xff) << 56
}

/// Fills in segments and descriptor tables and writes the GDT.
fn write_segments(memory: &GuestMemory, sregs: &mut kvm_sregs, long: bool) -> Result<(), GuestMemoryError> {
    /// Code: execute, read, accessed.
    const CODE_TYPE: u8 = 0xb;
    /// Data: read, write, accessed.
    const DATA_TYPE: u8 = 0x3;
    /// Busy 32-bit (or 64-bit) TSS.
    const TSS_TYPE: u8 = 0xb;
    let code = flat_segment(CODE, CODE_TYPE, long);
    let data = kvm_segment { db: 1, l: 0, ..flat_segment(DATA, DATA_TYPE, false) };
    let task =
        kvm_segment { limit: 0x67, selector: TASK, type_: TSS_TYPE, present: 1, ..kvm_segment::default() };
    let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task), 0];
    let bytes: Vec<u8> = gdt.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(layout::BOOT_GDT))?;

    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = task;
    sregs.gdt = kvm_dtable { base: layout::BOOT_GDT, limit: bytes.len() as u16 - 1, ..kvm_dtable::default() };
    sregs.idt = kvm_dtable::default();
    Ok(())
}

/// Writes page tables that map the first 4 GiB to themselves.
fn write_page_tables(memory: &GuestMemory) -> Result<u64, GuestMemoryError> {
    let pml4 = layout::BOOT_PAGE_TABLES;
    let pdpt = pml4 + 0x1000;
    let directories = pdpt + 0x1000;
    let entries =
        |values: &mut dyn Iterator<Item = u64>| -> Vec<u8> { values.flat_map(u64::to_le_bytes).collect() };
    memory.write_slice(&(pdpt | TABLE).to_le_bytes(), GuestAddress(pml4))?;
    let pointers = entries(&mut (0..DIRECTORIES).map(|i| (directories + i * 0x1000) | TABLE));
    memory.write_slice(&pointers, GuestAddress(pdpt))?;
    let pages = entries(&mut (0..DIRECTORIES * 512).map(|i| (i << 21) | LARGE_PAGE));
    memory.write_slice(&pages, GuestAddress(directories))?;
    Ok(pml4)
}

/// Gives the registers for `entry`; `sregs` are the CPU's after reset.
pub fn registers(
    memory: &GuestMemory,
    entry: Entry,
    mut sregs: kvm_sregs,
) -> Result<(kvm_regs, kvm_sregs), GuestMemoryError> {
    let mut regs = kvm_regs { rflags: 2, rsp: layout::BOOT_STACK, ..kvm_regs::default() };
    match entry {
        Entry::Long { rip, zero_page } => {
            write_segments(memory, &mut sregs, true)?;
            sregs.cr3 = write_page_tables(memory)?;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rip = rip;
            regs.rsi = zero_page;
        }
        Entry::Protected { eip, eax, ebx } => {
            write_segments(memory, &mut sregs, false)?;
            sregs.cr4 = 0;
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.efer = 0;
            regs.rip = eip.into();
            regs.rax = eax.into();
            regs.rbx = ebx.into();
        }
    }
    Ok((regs, sregs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loader::tests::memory;

    fn quad(memory: &GuestMemory, address: u64) -> u64 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn long_mode_has_an_identity_mapping_of_4_gib() {
        let memory = memory(4 << 20);
        let entry = Entry::Long { rip: 0x100_0200, zero_page: 0x7000 };
        let (regs, sregs) = registers(&memory, entry, kvm_sregs::default()).unwrap();
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0200, 0x7000, 2));
        assert_eq!((sregs.cs.l, sregs.cs.db), (1, 0));
        for address in [0_u64, 0x1234_5678, 0xffff_ffff] {
            let pdpt = quad(&memory, sregs.cr3) & !0xfff;
            let directory = quad(&memory, pdpt + (address >> 30) * 8) & !0xfff;
            let page = quad(&memory, directory + (address >> 21 & 511) * 8);
            assert_eq!(page, address & !0x1f_ffff | LARGE_PAGE);
        }
        assert_eq!(quad(&memory, layout::BOOT_GDT + 0x10), 0x00af_9b00_0000_ffff);
        assert_eq!(quad(&memory, layout::BOOT_GDT + 0x18), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn protected_mode_has_flat_segments_and_no_paging() {
        let memory = memory(4 << 20);
        let entry = Entry::Protected { eip: 0x10_0000, eax: 1, ebx: 2 };
        let (regs, sregs) = registers(&memory, entry, kvm_sregs::default()).unwrap();
        assert_eq!((regs.rip, regs.rax, regs.rbx), (0x10_0000, 1, 2));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
        assert_eq!(quad(&memory, layout::BOOT_GDT + 0x10), 0x00cf_9b00_0000_ffff);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.ss.selector), (0, 1, DATA));
    }
}
