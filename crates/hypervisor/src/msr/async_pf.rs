//! The registers of asynchronous page faults (kernel: Documentation/virt/kvm/x86/msr.rst; `kvm_pv_enable_async_pf` in
//! arch/x86/kvm/x86.c).

use super::table::Slot;
use super::{MsrEnv, MsrState};
use crate::cpuid::pv;

/// MSR_KVM_ASYNC_PF_EN.
pub(crate) const ENABLE: u32 = 0x4b56_4d02;
/// MSR_KVM_ASYNC_PF_INT.
pub(crate) const INTERRUPT: u32 = 0x4b56_4d06;
/// MSR_KVM_ASYNC_PF_ACK.
pub(crate) const ACKNOWLEDGE: u32 = 0x4b56_4d07;

/// Bits of MSR_KVM_ASYNC_PF_EN: on.
const ENABLED: u64 = 1 << 0;
/// At CPL 0, too.
pub(crate) const SEND_ALWAYS: u64 = 1 << 1;
/// To a hypervisor in the guest as an exit.
const AS_VM_EXIT: u64 = 1 << 2;
/// Pages that have come are told by an interrupt. Without it the register is accepted and nothing comes of it.
const BY_INTERRUPT: u64 = 1 << 3;
const RESERVED: u64 = 0b11 << 4;
/// The guest's data: 64 bytes, aligned.
const DATA: u64 = !0x3f;

impl MsrState {
    /// MSR_KVM_ASYNC_PF_EN.
    pub(crate) fn async_pf_enable(&self) -> u64 {
        self.get(Slot::AsyncPfEnable)
    }

    /// Puts a value back that was there before.
    pub(crate) fn put_async_pf(&mut self, value: u64) {
        self.put(Slot::AsyncPfEnable, value);
    }

    /// Where the guest's data is, if it has asked for the events.
    pub(crate) fn async_pf_data(&self) -> Option<u64> {
        let (value, both) = (self.async_pf_enable(), ENABLED | BY_INTERRUPT);
        (value & both == both).then_some(value & DATA)
    }

    /// The vector of the interrupt.
    pub(crate) fn async_pf_vector(&self) -> u8 {
        self.get(Slot::AsyncPfInterrupt) as u8
    }
}

/// Each way of delivery needs its CPUID bit; without a local APIC of ours only zero can be written.
pub(super) fn write_enable(state: &mut MsrState, _: u32, value: u64, _: bool, env: &mut dyn MsrEnv) -> bool {
    let has = |bit: u8| env.pv_features() & 1 << bit != 0;
    let valid = value & RESERVED == 0
        && (value & AS_VM_EXIT == 0 || has(pv::ASYNC_PF_VMEXIT))
        && (value & BY_INTERRUPT == 0 || has(pv::ASYNC_PF_INT))
        && (value == 0 || env.has_lapic());
    if valid {
        state.put(Slot::AsyncPfEnable, value);
    }
    valid
}

pub(super) fn write_interrupt(
    state: &mut MsrState,
    _: u32,
    value: u64,
    _: bool,
    env: &mut dyn MsrEnv,
) -> bool {
    // (The kernel refuses zero, too, which clients without its local APIC then cannot restore.)
    let valid = value >> 8 == 0 && (value == 0 || env.has_lapic());
    if valid {
        state.put(Slot::AsyncPfInterrupt, value);
    }
    valid
}
