//! What the operating system sees of the processor: segmentation, control transfers, event delivery, control
//! and debug registers, MSRs.

pub mod deliver;
pub mod segment;
