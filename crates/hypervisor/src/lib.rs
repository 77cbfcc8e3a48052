//! ring3 hypervisor.
