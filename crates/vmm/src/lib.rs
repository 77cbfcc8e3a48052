//! The machine that `ring3 boot` runs: guest memory, boot loaders, firmware tables, devices, and the threads
//! that drive the hypervisor's virtual CPUs.

pub mod acpi;
pub mod boot;
pub mod devices;
pub mod layout;
pub mod loader;
pub mod memory;
pub mod mptable;
