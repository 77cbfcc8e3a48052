//! FADT (ACPI 6.4, table 5.9): fixed hardware with PM1a event and control blocks, PM timer and reset register.
//! GPE blocks, C-states beyond C1 and S-states other than S5 are absent.

use acpi_tables::sdt::Sdt;

use crate::layout;

/// IAPC_BOOT_ARCH: devices of the ISA kind exist (serial port, RTC).
const LEGACY_DEVICES: u16 = 1 << 0;
/// IAPC_BOOT_ARCH: there is no VGA hardware to probe for.
const VGA_NOT_PRESENT: u16 = 1 << 2;

/// WBINVD works.
const WBINVD: u32 = 1 << 0;
/// C1 (HLT) is supported on all processors.
const PROC_C1: u32 = 1 << 2;
/// No fixed power button.
const PWR_BUTTON: u32 = 1 << 4;
/// No fixed sleep button.
const SLP_BUTTON: u32 = 1 << 5;
/// The RTC cannot wake the machine.
const FIX_RTC: u32 = 1 << 6;
/// The PM timer has 32 bits.
const TMR_VAL_EXT: u32 = 1 << 8;
/// The reset register works.
const RESET_REG_SUP: u32 = 1 << 10;

/// Value for the reset register: a full reset (see the reset device).
const RESET_VALUE: u8 = 0x06;

/// Writes a generic address structure for an I/O port register of `bytes` bytes.
fn port_address(table: &mut Sdt, offset: usize, port: u16, bytes: u8) {
    /// Address space: system I/O.
    const SYSTEM_IO: u8 = 1;
    table.write_u8(offset, SYSTEM_IO);
    table.write_u8(offset + 1, bytes * 8);
    let access = if bytes >= 4 { 3 } else { bytes };
    table.write_u8(offset + 3, access);
    table.write_u64(offset + 4, port.into());
}

/// Builds the table.
pub(super) fn build(facs: u32, dsdt: u32) -> Sdt {
    let mut t = super::table(b"FACP", 276, 6);
    t.write_u32(36, facs);
    t.write_u32(40, dsdt);
    t.write_u16(46, layout::GSI_SCI as u16);
    t.write_u32(56, layout::PORT_PM1_EVENT.into());
    t.write_u32(64, layout::PORT_PM1_CONTROL.into());
    t.write_u32(76, layout::PORT_PM_TIMER.into());
    t.write_u8(88, 4); // PM1_EVT_LEN
    t.write_u8(89, 2); // PM1_CNT_LEN
    t.write_u8(91, 4); // PM_TMR_LEN
    t.write_u16(96, 0xfff); // P_LVL2_LAT: no C2
    t.write_u16(98, 0xfff); // P_LVL3_LAT: no C3
    t.write_u8(108, 0x32); // CENTURY
    t.write_u16(109, LEGACY_DEVICES | VGA_NOT_PRESENT);
    let flags = WBINVD | PROC_C1 | PWR_BUTTON | SLP_BUTTON | FIX_RTC | TMR_VAL_EXT | RESET_REG_SUP;
    t.write_u32(112, flags);
    port_address(&mut t, 116, layout::PORT_RESET, 1);
    t.write_u8(128, RESET_VALUE);
    t.write_u8(131, 4); // minor version
    t.write_u64(140, dsdt.into());
    port_address(&mut t, 148, layout::PORT_PM1_EVENT, 4);
    port_address(&mut t, 172, layout::PORT_PM1_CONTROL, 2);
    port_address(&mut t, 208, layout::PORT_PM_TIMER, 4);
    t.write_bytes(268, b"RING3VM\0"); // hypervisor vendor identity
    t
}
