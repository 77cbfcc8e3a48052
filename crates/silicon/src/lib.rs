//! A physical x86 processor in software.
//!
//! Guest state, instruction execution, paging, event delivery, and guest mode with the controls and exits of VMX.
//! This crate knows nothing of KVM: the hypervisor enters guest mode with [`Cpu::run`] and gets a [`vmx::Exit`].

pub mod buffers;
pub mod bus_lock;
pub mod clock;
pub(crate) mod code;
pub mod cpu;
mod engine;
pub mod exception;
pub mod exec;
pub mod flags;
mod hostexec;
pub mod mmu;
pub mod model;
pub mod state;
pub mod system;
pub mod tiles;
pub mod topology;
pub mod translate;
pub mod vmx;

pub use code::make_tables;
pub use cpu::Cpu;
