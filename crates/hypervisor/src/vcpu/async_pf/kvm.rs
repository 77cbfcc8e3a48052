//! Asynchronous page faults as the kernel's KVM has them (Documentation/virt/kvm/x86/msr.rst; `kvm_arch_async_page_not_present` and
//! `kvm_check_async_pf_completion`): #PF with a token in CR2, and an interrupt when the page has come.

use std::collections::VecDeque;

use silicon::exception::Exception;
use silicon::state::cr0;

use super::{BROADCAST, Told, Vcpu};
use crate::irqchip::bus::Message;
use crate::msr::{MsrError, async_pf};

/// `struct kvm_vcpu_pv_apf_data`: flags, bit 0 of them, and the token of a page that has come.
const FLAGS: u64 = 0;
const NOT_PRESENT: u32 = 1 << 0;
const TOKEN: u64 = 4;

/// What the guest is to hear.
#[derive(Debug, Default)]
pub(super) struct Ready {
    /// Tokens of pages that have come.
    came: VecDeque<u32>,
    /// The guest has not acknowledged the last interrupt.
    unacknowledged: bool,
}

impl Ready {
    pub(super) fn came(&mut self, token: u32) {
        self.came.push_back(token);
    }
}

impl Vcpu {
    /// MSR_KVM_ASYNC_PF_EN has been written.
    ///
    /// # Errors
    ///
    /// #GP, with the old value, if the guest's data is not in memory. (The kernel keeps the new one.)
    pub(in crate::vcpu) fn async_pf_enabled(&mut self, old: u64) -> Result<(), MsrError> {
        let Some(data) = self.msrs.async_pf_data() else {
            self.async_pf.forget(Told::PageFault);
            self.async_pf.kvm = Ready::default();
            return Ok(());
        };
        let mut word = [0; 4];
        if !self.vm.memory().read(data + TOKEN, &mut word) {
            self.msrs.put_async_pf(old);
            return Err(MsrError::Refused(async_pf::ENABLE));
        }
        // Whoever slept when the guest was saved is woken; once, however often the guest writes.
        if self.async_pf.kvm.came.is_empty() {
            self.async_pf.kvm.came(BROADCAST);
        }
        Ok(())
    }

    /// MSR_KVM_ASYNC_PF_ACK has been written with 1.
    pub(in crate::vcpu) fn async_pf_acknowledged(&mut self) {
        self.async_pf.kvm.unacknowledged = false;
    }

    /// Tells the guest that the page of `token` is not present, if it takes that now (kernel: `kvm_can_deliver_async_pf`).
    pub(super) fn tell_page_fault(&mut self, token: u32) -> bool {
        let anywhere = self.msrs.async_pf_enable() & async_pf::SEND_ALWAYS != 0;
        let state = &self.cpu.state;
        let wanted = (anywhere || state.cpl != 0) && state.cr0 & cr0::PG != 0;
        let Some(data) = self.msrs.async_pf_data().filter(|_| wanted && self.takes_event()) else {
            return false;
        };
        if !self.vm.memory().write(data + FLAGS, &NOT_PRESENT.to_le_bytes()) {
            return false;
        }
        self.handle.stats.async_pf_not_present.count();
        self.events.raise(Exception::pf(token.into(), 0));
        true
    }

    /// Tells the guest of pages that have come, one at a time, the next when it has read of the one before. Unlike the kernel this does not
    /// end a HLT by itself, only by the interrupt.
    pub(super) fn tell_ready(&mut self) {
        let Some(&token) = self.async_pf.kvm.came.front() else { return };
        let (Some(data), Some(lapic)) = (self.msrs.async_pf_data(), self.lapic.clone()) else {
            self.async_pf.kvm.came.clear();
            return;
        };
        let mut word = [0; 4];
        let free = self.vm.memory().read(data + TOKEN, &mut word) && word == [0; 4];
        if !lapic.address().is_software_enabled() || !free || self.async_pf.kvm.unacknowledged {
            return;
        }
        self.async_pf.kvm.came.pop_front();
        if self.vm.memory().write(data + TOKEN, &token.to_le_bytes()) {
            self.async_pf.kvm.unacknowledged = true;
            self.handle.stats.async_pf_ready.count();
            lapic.accept(&Message::from_icr(self.msrs.async_pf_vector().into(), 0));
        }
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_msr_entry;

    use super::super::super::testing::{Program, vm};
    use super::*;

    /// A guest that enables the events over and over, and takes no interrupt, once made the list longer each time.
    #[test]
    fn apf_t10_enabling_again_wakes_everybody_once() {
        let vm = vm();
        vm.create_irqchip().unwrap();
        let mut program = Program::on(vm, &[0xf4]);
        let vcpu = &mut program.vcpu;
        let table = vcpu.vm.system().supported_cpuid();
        vcpu.set_cpuid2(&table).unwrap();
        let enable = |data| [kvm_msr_entry { index: async_pf::ENABLE, data, ..Default::default() }];
        for _ in 0..1000 {
            assert_eq!(vcpu.set_msrs(&enable(0x2009)), 1);
        }
        assert_eq!(vcpu.async_pf.kvm.came.len(), 1);
        // T7: what was to be told is dropped; and an address without memory changes nothing.
        assert_eq!(vcpu.set_msrs(&enable(0)), 1);
        assert!(vcpu.async_pf.kvm.came.is_empty());
        assert_eq!((vcpu.set_msrs(&enable(0x8000_0009)), vcpu.msrs.async_pf_enable()), (0, 0));
    }
}
