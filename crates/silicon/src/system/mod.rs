//! What the operating system sees of the processor: segmentation, control transfers, event delivery, control
//! and debug registers, MSRs.

pub mod debug;
pub mod deliver;
pub mod reset;
pub mod segment;
pub mod smm;
pub(crate) mod stack;
pub(crate) mod task;
#[cfg(test)]
mod tests;
pub mod window;
