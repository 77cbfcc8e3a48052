//! ring3 hypervisor.

pub mod eventfd;
pub mod cpuid;
pub mod host;
pub mod irqchip;
pub mod msr;
pub mod routing;
pub mod timer;
