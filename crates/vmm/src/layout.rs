//! Where everything lies in the guest-physical and port address spaces.
//!
//! One page of facts: loaders, tables and devices take their addresses from here, and the e820 map is derived
//! from the same constants, so that they cannot disagree.

/// End of guest RAM below 4 GiB; more RAM continues at [`HIGH_RAM_START`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Start of guest RAM above the MMIO hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// Information block of the PVH and multiboot protocols, with everything that it points to.
pub const BOOT_INFO: u64 = 0x1000;
/// End of the room for [`BOOT_INFO`].
pub const BOOT_INFO_END: u64 = 0x7000;
/// `struct boot_params` of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer (grows down from here).
pub const BOOT_STACK: u64 = 0x9000;
/// First of the six pages of the initial identity mapping: PML4, PDPT, four page directories.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Initial global descriptor table.
pub const BOOT_GDT: u64 = 0xf000;
/// Linux `struct setup_data` list.
pub const SETUP_DATA: u64 = 0x1_0000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// End of the room for the command line.
pub const CMDLINE_END: u64 = 0x3_0000;
/// End of conventional memory; the extended BIOS data area begins.
pub const EBDA: u64 = 0x9_fc00;
/// End of the extended BIOS data area.
pub const EBDA_END: u64 = 0xa_0000;
/// Start of the firmware area: the RSDP and all ACPI tables.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the room for ACPI tables, and the MP floating pointer with its table.
pub const MP_TABLE: u64 = 0xf_0000;
/// End of the firmware area.
pub const FIRMWARE_END: u64 = 0x10_0000;
/// Where kernels are loaded unless they say otherwise.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// First virtio-mmio device; each next one follows at [`VIRTIO_MMIO_STRIDE`].
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// Distance of two virtio-mmio devices.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// Size of one virtio-mmio register block.
pub const VIRTIO_MMIO_SIZE: u64 = 0x200;
/// First interrupt line of virtio-mmio devices.
pub const VIRTIO_GSI_BASE: u32 = 16;
/// Number of interrupt lines that virtio-mmio devices share.
pub const VIRTIO_GSI_COUNT: u32 = 8;
/// I/O APIC (in the hypervisor).
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APIC (in the hypervisor).
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Interrupt lines of the I/O APIC.
pub const GSI_COUNT: u32 = 24;

/// i8042 keyboard controller: data and command ports at offsets 0 and 4.
pub const PORT_I8042: u16 = 0x60;
/// CMOS index and data.
pub const PORT_CMOS: u16 = 0x70;
/// Power-on self-test codes; firmware and old kernels use it for delays.
pub const PORT_POST: u16 = 0x80;
/// ISA debug-exit device.
pub const PORT_DEBUG_EXIT: u16 = 0xf4;
/// First serial port.
pub const PORT_COM1: u16 = 0x3f8;
/// Interrupt of the first serial port.
pub const GSI_COM1: u32 = 4;
/// ACPI PM1a event block (status, enable).
pub const PORT_PM1_EVENT: u16 = 0x600;
/// ACPI PM1a control register.
pub const PORT_PM1_CONTROL: u16 = 0x604;
/// ACPI PM timer.
pub const PORT_PM_TIMER: u16 = 0x608;
/// Size of the whole PM block.
pub const PM_BLOCK_SIZE: u16 = 0xc;
/// Interrupt of the PM block (SCI), level triggered.
pub const GSI_SCI: u32 = 9;
/// Memory device.
pub const PORT_MEMORY: u16 = 0x700;
/// PCI configuration address and data ports; the reset control register 0xcf9 lies among them.
pub const PORT_PCI_CONFIG: u16 = 0xcf8;
/// Reset control register.
pub const PORT_RESET: u16 = 0xcf9;
