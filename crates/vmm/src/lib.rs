//! The machine that `ring3 boot` runs: guest memory, boot loaders, firmware tables, devices, and the threads
//! that drive the hypervisor's virtual CPUs.

pub mod acpi;
mod assembly;
pub mod boot;
pub mod config;
pub mod devices;
pub mod host;
pub mod layout;
pub mod loader;
pub mod machine;
mod machine_check;
pub mod memory;
mod moving;
pub mod mptable;
pub mod paging;
mod registers;
pub mod report;

pub use config::Config;
pub use machine::{Machine, StartError};
pub use report::{Outcome, Report, Statistics};
