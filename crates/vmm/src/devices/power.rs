//! How a guest ends its machine: ACPI power management, the reset control register, the keyboard controller's
//! reset line, and the ISA debug-exit port.

use std::sync::Arc;

use vm_superio::{I8042Device, Trigger};

use super::bus::Device;
use super::{EndRequest, EndSink};
use crate::acpi::SLEEP_TYPE_S5;
use crate::layout;

/// Nanoseconds of some monotonic clock.
pub type MonotonicClock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Frequency of the ACPI PM timer in Hz (ACPI 6.4, section 4.8.3.3).
const PM_TIMER_HZ: u128 = 3_579_545;

/// Offsets into the PM block.
mod pm {
    use crate::layout;

    pub(super) const STATUS: u64 = 0;
    pub(super) const ENABLE: u64 = 2;
    pub(super) const CONTROL: u64 = (layout::PORT_PM1_CONTROL - layout::PORT_PM1_EVENT) as u64;
    pub(super) const TIMER: u64 = (layout::PORT_PM_TIMER - layout::PORT_PM1_EVENT) as u64;
}

/// PM1 control: ACPI owns the hardware (always; there is no legacy mode).
const SCI_EN: u16 = 1 << 0;
/// PM1 control: enter the sleep state chosen by SLP_TYP.
const SLP_EN: u16 = 1 << 13;

/// ACPI fixed hardware: PM1a event and control blocks and the PM timer. No event ever comes, so the SCI stays low.
pub struct PowerManagement {
    clock: MonotonicClock,
    end: EndSink,
    enable: u16,
    control: u16,
}

impl PowerManagement {
    /// Fixed hardware whose timer runs from `clock`.
    pub fn new(clock: MonotonicClock, end: EndSink) -> Self {
        Self { clock, end, enable: 0, control: 0 }
    }

    fn timer(&self) -> u32 {
        (u128::from((self.clock)()) * PM_TIMER_HZ / 1_000_000_000) as u32
    }

    fn write_control(&mut self, value: u16) {
        // SLP_EN is write-only.
        self.control = value & !SLP_EN;
        let sleep_type = (value >> 10 & 7) as u8;
        if value & SLP_EN != 0 && sleep_type == SLEEP_TYPE_S5 {
            (self.end)(EndRequest::PowerOff);
        }
    }

    /// The block as 16-bit registers.
    fn register(&self, offset: u64) -> u16 {
        match offset {
            pm::ENABLE => self.enable,
            pm::CONTROL => self.control | SCI_EN,
            pm::TIMER => self.timer() as u16,
            _ if offset == pm::TIMER + 2 => (self.timer() >> 16) as u16,
            _ => 0,
        }
    }
}

impl Device for PowerManagement {
    fn read(&mut self, offset: u64, size: u8) -> u64 {
        if (offset, size) == (pm::TIMER, 4) {
            return self.timer().into();
        }
        let low = u64::from(self.register(offset & !1)) >> (8 * (offset & 1));
        if size <= 2 { low } else { low | u64::from(self.register((offset & !1) + 2)) << 16 }
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) {
        match (offset, size) {
            (pm::ENABLE, 2) => self.enable = value as u16,
            (pm::STATUS, 4) => self.enable = (value >> 16) as u16,
            (pm::CONTROL, 2 | 4) => self.write_control(value as u16),
            // Byte-wide writes of the control register: its high byte holds SLP_TYP and SLP_EN.
            (pm::CONTROL, 1) => self.control = self.control & 0xff00 | value as u16 & 0xff,
            (offset, 1) if offset == pm::CONTROL + 1 => {
                self.write_control(self.control & 0xff | (value as u16) << 8);
            }
            _ => {}
        }
    }
}

/// PCI configuration ports without a PCI bus behind them: everything reads as ones. The reset control register
/// 0xcf9 lies between them.
pub struct PciConfigPorts {
    end: EndSink,
    reset_control: u8,
}

/// Reset control: reset the CPU.
const RST_CPU: u8 = 1 << 2;

impl PciConfigPorts {
    /// Ports whose reset register asks `end` for a reset.
    pub fn new(end: EndSink) -> Self {
        Self { end, reset_control: 0 }
    }
}

impl Device for PciConfigPorts {
    fn read(&mut self, offset: u64, size: u8) -> u64 {
        if offset == RESET_OFFSET && size == 1 { self.reset_control.into() } else { u64::MAX }
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) {
        if offset == RESET_OFFSET && size == 1 {
            self.reset_control = value as u8;
            if self.reset_control & RST_CPU != 0 {
                (self.end)(EndRequest::Reset);
            }
        }
    }
}

/// Offset of the reset control register into the configuration ports.
const RESET_OFFSET: u64 = (layout::PORT_RESET - layout::PORT_PCI_CONFIG) as u64;

/// Sends a fixed request when triggered.
struct ResetTrigger(EndSink);

impl Trigger for ResetTrigger {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        (self.0)(EndRequest::Reset);
        Ok(())
    }
}

/// Ports of the keyboard controller that are attached to it: 0x60 and 0x64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum I8042Port {
    /// 0x60.
    Data,
    /// 0x64.
    Command,
}

/// The keyboard controller, of which only the reset line exists.
pub struct I8042 {
    controller: I8042Device<ResetTrigger>,
    port: I8042Port,
}

impl I8042 {
    /// One port of a controller whose reset line asks `end` for a reset.
    pub fn new(port: I8042Port, end: EndSink) -> Self {
        Self { controller: I8042Device::new(ResetTrigger(end)), port }
    }

    fn offset(&self) -> u8 {
        if self.port == I8042Port::Data { 0 } else { 4 }
    }
}

impl Device for I8042 {
    fn read(&mut self, _offset: u64, _size: u8) -> u64 {
        let offset = self.offset();
        self.controller.read(offset).into()
    }

    fn write(&mut self, _offset: u64, _size: u8, value: u64) {
        let offset = self.offset();
        let Ok(()) = self.controller.write(offset, value as u8);
    }
}

/// QEMU's isa-debug-exit: a write of any width ends the machine with a status made of the value.
pub struct DebugExit(EndSink);

impl DebugExit {
    /// Number of ports.
    pub const LENGTH: u64 = 4;

    /// A port that sends what is written to `end`.
    pub fn new(end: EndSink) -> Self {
        Self(end)
    }
}

impl Device for DebugExit {
    fn read(&mut self, _offset: u64, _size: u8) -> u64 {
        u64::MAX
    }

    fn write(&mut self, _offset: u64, _size: u8, value: u64) {
        (self.0)(EndRequest::DebugExit(value as u32));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::bus::lock;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn end() -> (EndSink, Arc<Mutex<Vec<EndRequest>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = seen.clone();
        (Arc::new(move |request| lock(&sink).push(request)), seen)
    }

    #[test]
    fn only_s5_powers_off() {
        let (sink, seen) = end();
        let mut device = PowerManagement::new(Arc::new(|| 0), sink);
        assert_eq!(device.read(pm::CONTROL, 2), 1);
        device.write(pm::CONTROL, 2, 5 << 10);
        device.write(pm::CONTROL, 2, 1 << 13 | 3 << 10);
        assert!(lock(&seen).is_empty());
        device.write(pm::CONTROL, 2, 1 << 13 | 5 << 10);
        assert_eq!(device.read(pm::CONTROL, 2), 5 << 10 | 1);
        device.write(pm::CONTROL + 1, 1, 0x34);
        assert_eq!(*lock(&seen), [EndRequest::PowerOff; 2]);
    }

    #[test]
    fn the_timer_has_its_frequency_and_wraps() {
        let now = Arc::new(AtomicU64::new(1_000_000_000));
        let clock = now.clone();
        let mut device = PowerManagement::new(Arc::new(move || clock.load(Ordering::Relaxed)), end().0);
        assert_eq!(device.read(pm::TIMER, 4), 3_579_545);
        assert_eq!(device.read(pm::TIMER + 2, 2), 3_579_545 >> 16);
        now.store(1_200_000_000_000, Ordering::Relaxed);
        assert_eq!(device.read(pm::TIMER, 4), 3_579_545 * 1200 % (1 << 32));
    }

    #[test]
    fn the_event_block_keeps_its_enables() {
        let mut device = PowerManagement::new(Arc::new(|| 0), end().0);
        device.write(pm::ENABLE, 2, 0x121);
        assert_eq!((device.read(pm::STATUS, 2), device.read(pm::STATUS, 4)), (0, 0x121 << 16));
        for offset in 0..12 {
            for size in [1, 2, 4, 8] {
                device.read(offset, size);
                device.write(offset, size, 0);
            }
        }
    }

    #[test]
    fn every_way_to_reset_works() {
        let (sink, seen) = end();
        let mut ports = PciConfigPorts::new(sink.clone());
        assert_eq!(ports.read(0, 4) as u32, u32::MAX);
        ports.write(0, 4, 0x8000_0600);
        ports.write(RESET_OFFSET, 1, 2);
        assert!(lock(&seen).is_empty());
        ports.write(RESET_OFFSET, 1, 6);
        let mut data = I8042::new(I8042Port::Data, sink.clone());
        data.write(0, 1, 0xfe);
        assert_eq!(lock(&seen).len(), 1);
        let mut command = I8042::new(I8042Port::Command, sink.clone());
        command.write(0, 1, 0xfe);
        assert_eq!(*lock(&seen), [EndRequest::Reset; 2]);
        DebugExit::new(sink).write(0, 1, 0x21);
        assert_eq!(lock(&seen)[2], EndRequest::DebugExit(0x21));
    }
}
