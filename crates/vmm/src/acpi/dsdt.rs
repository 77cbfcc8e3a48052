//! DSDT: the devices that cannot be discovered, and the sleep type of power-off.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;

use super::{Inventory, SLEEP_TYPE_S5, virtio_base, virtio_gsi};
use crate::layout;

/// Builds the table.
pub(super) fn build(inventory: &Inventory) -> Sdt {
    let mut aml = Vec::new();
    let zero = 0_u8;
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &zero, &zero]))
        .to_aml_bytes(&mut aml);

    let mut devices = Vec::new();
    isa_device(&mut devices, "COM1", "PNP0501", layout::PORT_COM1, 8, layout::GSI_COM1);
    isa_device(&mut devices, "RTC_", "PNP0B00", layout::PORT_CMOS, 2, 8);
    for index in 0..inventory.virtio_devices {
        virtio_device(&mut devices, index);
    }
    aml.extend(Scope::raw("_SB_".into(), devices));

    let mut table = super::table(b"DSDT", 36, 2);
    table.append_slice(&aml);
    table
}

/// A device with one range of ports and an edge-triggered ISA interrupt.
fn isa_device(aml: &mut Vec<u8>, name: &str, id: &str, port: u16, length: u8, irq: u32) {
    let ports = IO::new(port, port, 1, length);
    let interrupt = Interrupt::new(true, true, false, false, irq);
    Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(id)),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(aml);
}

/// A virtio-mmio device: its register block and a shared, level-triggered interrupt.
fn virtio_device(aml: &mut Vec<u8>, index: usize) {
    let registers = Memory32Fixed::new(true, virtio_base(index) as u32, layout::VIRTIO_MMIO_SIZE as u32);
    let interrupt = Interrupt::new(true, false, false, true, virtio_gsi(index));
    Device::new(
        format!("V{index:03}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(index as u32)),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    )
    .to_aml_bytes(aml);
}
