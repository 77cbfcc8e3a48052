//! A guest image: what memory holds and how the vCPUs start.

use std::sync::Arc;

use kvm_bindings::{kvm_debugregs, kvm_fpu, kvm_regs, kvm_sregs};

use crate::memory::Snapshot;

/// What a slot's memory holds at the start.
#[derive(Clone, Debug)]
pub enum Contents {
    /// These bytes; the rest of the last page is zero.
    Bytes(Vec<u8>),
    /// A shared snapshot with some bytes changed (offset, bytes).
    Changed(Arc<Snapshot>, Vec<(u64, Vec<u8>)>),
}

/// One memory slot.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Guest-physical address.
    pub gpa: u64,
    /// What it holds.
    pub contents: Contents,
    /// The guest cannot write it.
    pub readonly: bool,
}

/// How a vCPU starts. What is absent stays as it is after reset.
#[derive(Clone, Debug, Default)]
pub struct Start {
    /// General registers.
    pub regs: Option<kvm_regs>,
    /// System registers. The APIC base is left as it is.
    pub sregs: Option<Box<kvm_sregs>>,
    /// x87 and SSE.
    pub fpu: Option<Box<kvm_fpu>>,
    /// Debug registers.
    pub debugregs: Option<kvm_debugregs>,
    /// MSRs, each set on its own.
    pub msrs: Vec<(u32, u64)>,
    /// XCR0, if the processor takes it.
    pub xcr0: Option<u64>,
    /// Extended control registers of vectors and masks are filled from this.
    pub vectors: Option<u64>,
}

/// A guest.
#[derive(Clone, Debug)]
pub struct Image {
    /// Memory.
    pub slots: Vec<Slot>,
    /// The vCPUs.
    pub cpus: Vec<Start>,
    /// With the in-kernel interrupt controllers.
    pub irqchip: bool,
    /// Instructions that each vCPU may execute.
    pub limit: u64,
    /// CPUID bits to take away, in percent of the entries.
    pub cripple: u64,
}

impl Image {
    /// An image of one vCPU.
    pub fn new(slots: Vec<Slot>, start: Start, limit: u64) -> Image {
        Image { slots, cpus: vec![start], irqchip: false, limit, cripple: 0 }
    }
}

impl Slot {
    /// Writable memory that holds `bytes`.
    pub fn ram(gpa: u64, bytes: Vec<u8>) -> Slot {
        Slot { gpa, contents: Contents::Bytes(bytes), readonly: false }
    }

    /// Memory that the guest can only read.
    pub fn rom(gpa: u64, bytes: Vec<u8>) -> Slot {
        Slot { gpa, contents: Contents::Bytes(bytes), readonly: true }
    }
}
