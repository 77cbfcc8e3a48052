//! ring3 hypervisor.

pub mod eventfd;
pub mod irqchip;
pub mod routing;
pub mod timer;
