//! KVM itself: virtual machines and vCPUs over [`silicon`].
//!
//! The objects are KVM's: [`System`] (what `/dev/kvm` stands for), [`Vm`], [`Vcpu`]. Each ioctl of the KVM API is
//! one typed call here; the ABI layer and our own VMM use the same ones. This crate decodes no instruction: it
//! enters guest mode with [`silicon::Cpu::run`] and acts on the exit.

pub mod async_pf;
pub mod coalesced;
pub mod cpuid;
pub mod dirty_ring;
pub mod error;
pub mod eventfd;
pub mod host;
pub mod irqchip;
pub mod kvmclock;
pub mod memory;
pub mod mitigations;
pub mod modules;
pub mod msr;
pub mod nested;
pub mod notify;
pub mod permissions;
pub mod processors;
pub mod routing;
pub mod split_lock;
pub mod stats;
pub mod system;
pub mod time;
pub mod timer;
pub mod tsc;
pub mod vcpu;
pub mod vm;

pub use error::Error;
pub use host::HostParams;
pub use system::System;
pub use vcpu::{Vcpu, VcpuExit, VcpuHandle};
pub use vm::Vm;
