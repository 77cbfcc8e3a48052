//! ring3 hypervisor.

pub mod cpuid;
pub mod eventfd;
pub mod host;
pub mod irqchip;
pub mod msr;
pub mod routing;
pub mod timer;
