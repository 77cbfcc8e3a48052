//! ACPI tables: RSDP, XSDT, FADT, FACS, MADT and DSDT (ACPI 6.4, chapter 5), laid out from
//! [`layout::ACPI_TABLES`] on.

mod dsdt;
mod fadt;
mod madt;

use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout;
use crate::memory::GuestMemory;

const OEM_ID: [u8; 6] = *b"RING3 ";
const OEM_TABLE_ID: [u8; 8] = *b"RING3VM ";
const OEM_REVISION: u32 = 1;

/// Sleep type of S5 in PM1 control, as the DSDT's `_S5` tells it.
pub const SLEEP_TYPE_S5: u8 = 5;

/// What the tables describe beyond the fixed parts of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Inventory {
    /// Virtual CPUs; their APIC IDs are 0, 1, 2 …
    pub cpus: u8,
    /// virtio-mmio devices.
    pub virtio_devices: usize,
}

/// Interrupt line of the virtio-mmio device `index`.
pub fn virtio_gsi(index: usize) -> u32 {
    layout::VIRTIO_GSI_BASE + (index as u32) % layout::VIRTIO_GSI_COUNT
}

/// Register block of the virtio-mmio device `index`.
pub fn virtio_base(index: usize) -> u64 {
    layout::VIRTIO_MMIO_BASE + index as u64 * layout::VIRTIO_MMIO_STRIDE
}

/// A table with its header and `length` zero bytes in all.
fn table(signature: &[u8; 4], length: u32, revision: u8) -> Sdt {
    Sdt::new(*signature, length, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION)
}

/// Builds all tables; the first byte belongs to the RSDP at [`layout::ACPI_TABLES`].
pub fn build(inventory: &Inventory) -> Vec<u8> {
    let mut bytes = vec![0; Rsdp::len()];
    // Tables are aligned to 64 bytes, which the FACS asks for.
    let mut place = |table: &dyn Aml| {
        bytes.resize(bytes.len().next_multiple_of(64), 0);
        let address = layout::ACPI_TABLES + bytes.len() as u64;
        table.to_aml_bytes(&mut bytes as &mut dyn AmlSink);
        address
    };
    let facs = place(&FACS::new());
    let dsdt = place(&Raw(dsdt::build(inventory)));
    let fadt = place(&Raw(fadt::build(facs as u32, dsdt as u32)));
    let madt = place(&Raw(madt::build(inventory.cpus)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&xsdt);

    let mut root = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut root);
    bytes[..root.len()].copy_from_slice(&root);
    bytes
}

/// Writes all tables and gives the address of the RSDP.
pub fn write(memory: &GuestMemory, inventory: &Inventory) -> Result<u64, GuestMemoryError> {
    memory.write_slice(&build(inventory), GuestAddress(layout::ACPI_TABLES))?;
    Ok(layout::ACPI_TABLES)
}

/// A finished system description table.
struct Raw(Sdt);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], address: u64) -> u32 {
        let at = (address - layout::ACPI_TABLES) as usize;
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn table_at(bytes: &[u8], address: u64) -> &[u8] {
        let at = (address - layout::ACPI_TABLES) as usize;
        &bytes[at..at + word(bytes, address + 4) as usize]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn tables_are_linked_and_their_checksums_are_right() {
        let bytes = build(&Inventory { cpus: 8, virtio_devices: 32 });
        assert!(bytes.len() as u64 <= layout::MP_TABLE - layout::ACPI_TABLES);
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));

        let xsdt = table_at(&bytes, word(&bytes, layout::ACPI_TABLES + 24).into());
        assert_eq!((&xsdt[..4], sum(xsdt), xsdt.len()), (&b"XSDT"[..], 0, 36 + 16));
        let entry = |i: usize| u64::from_le_bytes(xsdt[36 + 8 * i..][..8].try_into().unwrap());
        let fadt = table_at(&bytes, entry(0));
        assert_eq!((&fadt[..4], sum(fadt), fadt.len()), (&b"FACP"[..], 0, 276));
        let madt = table_at(&bytes, entry(1));
        assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));

        let dsdt = table_at(&bytes, word(fadt, layout::ACPI_TABLES + 40).into());
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        let facs = u64::from(word(fadt, layout::ACPI_TABLES + 36));
        assert_eq!(facs % 64, 0);
        assert_eq!(table_at(&bytes, facs)[..4], *b"FACS");
    }

    #[test]
    fn the_dsdt_names_every_device() {
        let bytes = build(&Inventory { cpus: 1, virtio_devices: 3 });
        let find = |needle: &[u8]| bytes.windows(needle.len()).filter(|window| *window == needle).count();
        assert_eq!(find(b"LNRO0005"), 3);
        for name in [b"_S5_", b"COM1", b"RTC_", b"V000", b"V002"] {
            assert_eq!(find(name), 1, "{}", String::from_utf8_lossy(name));
        }
    }
}
