//! Mitigations of speculation bugs: what a guest makes of what it is told.

pub mod linux;
