//! Intel MultiProcessor Specification 1.4 tables, for guests that do not use ACPI.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout;
use crate::memory::GuestMemory;

/// Length of the floating pointer structure; the configuration table follows it.
const POINTER_LENGTH: u64 = 16;
/// Length of the configuration table's header.
const HEADER_LENGTH: usize = 44;
/// Version byte of APICs with integrated local APICs.
const APIC_VERSION: u8 = 0x14;
/// ISA interrupts.
const ISA_INTERRUPTS: u8 = 16;

/// Makes the bytes of a table sum to zero.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[at] = bytes[at].wrapping_sub(sum);
}

/// Entries of the configuration table (MP 1.4, section 4.3), and their number.
fn entries(cpus: u8) -> (Vec<u8>, u16) {
    let ioapic_id = cpus;
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..cpus {
        let flags = if id == 0 { 0b11 } else { 0b01 };
        let mut processor = vec![0, id, APIC_VERSION, flags];
        processor.resize(20, 0);
        entries.push(processor);
    }
    entries.push(b"\x01\x00ISA   ".to_vec());
    let mut ioapic = vec![2, ioapic_id, APIC_VERSION, 1];
    ioapic.extend_from_slice(&(layout::IOAPIC as u32).to_le_bytes());
    entries.push(ioapic);
    // ISA interrupts reach the input of the same number, but IRQ 0 (timer), which is wired to input 2.
    for irq in (0..ISA_INTERRUPTS).filter(|&irq| irq != 2) {
        let input = if irq == 0 { 2 } else { irq };
        entries.push(vec![3, 0, 0, 0, 0, irq, ioapic_id, input]);
    }
    // Local interrupts of all processors: ExtINT on LINT0, NMI on LINT1.
    entries.push(vec![4, 3, 0, 0, 0, 0, 0xff, 0]);
    entries.push(vec![4, 1, 0, 0, 0, 0, 0xff, 1]);
    let count = entries.len() as u16;
    (entries.concat(), count)
}

/// Builds the floating pointer and the configuration table, to be put at [`layout::MP_TABLE`].
pub fn build(cpus: u8) -> Vec<u8> {
    let (entries, count) = entries(cpus);
    let mut table = b"PCMP".to_vec();
    table.extend_from_slice(&((HEADER_LENGTH + entries.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[4, 0]);
    table.extend_from_slice(b"RING3   RING3VM     ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&(layout::LOCAL_APIC as u32).to_le_bytes());
    table.resize(HEADER_LENGTH, 0);
    table.extend_from_slice(&entries);
    set_checksum(&mut table, 7);

    let mut bytes = b"_MP_".to_vec();
    bytes.extend_from_slice(&((layout::MP_TABLE + POINTER_LENGTH) as u32).to_le_bytes());
    bytes.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut bytes, 10);
    bytes.extend(table);
    bytes
}

/// Writes the tables.
pub fn write(memory: &GuestMemory, cpus: u8) -> Result<(), GuestMemoryError> {
    memory.write_slice(&build(cpus), GuestAddress(layout::MP_TABLE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_and_lengths_are_right() {
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        for cpus in [1, 8] {
            let bytes = build(cpus);
            let (pointer, table) = bytes.split_at(POINTER_LENGTH as usize);
            assert_eq!((&pointer[..4], sum(pointer), sum(table)), (&b"_MP_"[..], 0, 0));
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(table.len(), HEADER_LENGTH + usize::from(cpus) * 20 + (1 + 1 + 15 + 2) * 8);
            assert_eq!(u16::from_le_bytes([table[34], table[35]]), u16::from(cpus) + 19);
            assert_eq!(u32::from_le_bytes(table[36..40].try_into().unwrap()), 0xfee0_0000);
        }
    }
}
