//! ring3 hypervisor.

pub mod irqchip;
pub mod routing;
pub mod timer;
