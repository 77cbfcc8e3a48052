//! The machine's devices.

pub mod bus;
pub mod cmos;
pub mod irq;
pub mod memory;
pub mod power;
pub mod serial;
pub mod virtio;

use std::sync::Arc;

/// How a guest ends its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndRequest {
    /// ACPI S5.
    PowerOff,
    /// Reset by keyboard controller, reset register or ACPI.
    Reset,
    /// A value written to the debug-exit port.
    DebugExit(u32),
}

/// Where devices send a guest's wish to end.
pub type EndSink = Arc<dyn Fn(EndRequest) + Send + Sync>;
