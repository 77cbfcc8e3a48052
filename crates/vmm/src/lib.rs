//! ring3 vmm.
