//! MADT (ACPI 6.4, section 5.2.12): local APICs, the I/O APIC, and how ISA interrupts reach it.

use acpi_tables::sdt::Sdt;

use crate::layout;

/// The machine also has a pair of 8259s.
const PCAT_COMPAT: u32 = 1;
/// Interrupt source flags: active high, level triggered.
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;

/// Builds the table for `cpus` processors.
pub(super) fn build(cpus: u8) -> Sdt {
    let mut t = super::table(b"APIC", 44, 5);
    t.write_u32(36, layout::LOCAL_APIC as u32);
    t.write_u32(40, PCAT_COMPAT);
    for id in 0..cpus {
        // Type 0, processor local APIC: UID, APIC ID, flags (enabled).
        t.append_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    // Type 1, I/O APIC: its ID follows the processors' ones.
    let mut ioapic = vec![1, 12, cpus, 0];
    ioapic.extend_from_slice(&(layout::IOAPIC as u32).to_le_bytes());
    ioapic.extend_from_slice(&0_u32.to_le_bytes());
    t.append_slice(&ioapic);
    interrupt_override(&mut t, 0, 2, 0);
    interrupt_override(&mut t, layout::GSI_SCI as u8, layout::GSI_SCI, ACTIVE_HIGH_LEVEL);
    // Type 4, local APIC NMI: LINT1 of all processors.
    t.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    t
}

/// Type 2: the ISA interrupt `irq` is wired to `gsi`.
fn interrupt_override(table: &mut Sdt, irq: u8, gsi: u32, flags: u16) {
    let mut entry = vec![2, 10, 0, irq];
    entry.extend_from_slice(&gsi.to_le_bytes());
    entry.extend_from_slice(&flags.to_le_bytes());
    table.append_slice(&entry);
}
