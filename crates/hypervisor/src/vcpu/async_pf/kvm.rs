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
    use crate::async_pf::Outcome;

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

    /// A vCPU, in real mode with paging off, whose guest waits for a page by token 5.
    fn waiting(code: &[u8]) -> Program {
        let vm = vm();
        vm.create_irqchip().unwrap();
        let mut program = Program::on(vm, code);
        let vcpu = &mut program.vcpu;
        let table = vcpu.vm.system().supported_cpuid();
        vcpu.set_cpuid2(&table).unwrap();
        vcpu.lapic.as_ref().unwrap().mmio_write(0xf0, &0x1ffu32.to_le_bytes());
        let write = |index, data| [kvm_msr_entry { index, data, ..Default::default() }];
        assert_eq!(vcpu.set_msrs(&write(async_pf::INTERRUPT, 0xf3)), 1);
        assert_eq!(vcpu.set_msrs(&write(async_pf::ENABLE, 0x2009)), 1);
        vcpu.async_pf.kvm = Ready::default();
        vcpu.add_wanted(0x5000, 5, Told::PageFault);
        program
    }

    fn token(vcpu: &Vcpu) -> u32 {
        let mut word = [0; 4];
        assert!(vcpu.vm.memory().read(0x2004, &mut word));
        u32::from_le_bytes(word)
    }

    #[test]
    fn apf_t8_init_drops_what_is_on_its_way() {
        let mut program = waiting(&[0xf4]);
        let vcpu = &mut program.vcpu;
        vcpu.lapic.as_ref().unwrap().post_init();
        vcpu.take_apic_events();
        assert_eq!((vcpu.msrs.async_pf_enable(), vcpu.async_pf.told()), (0, 0));
        vcpu.handle.page_came(0x5000, Outcome::Came);
        vcpu.take_pages();
        assert_eq!((token(vcpu), vcpu.async_pf.wanted.len()), (0, 0));
    }

    /// Kernels before ab4e41eb9fab forgot the pages of a guest whose CR0.PG was cleared meanwhile, as system management mode does.
    #[test]
    fn apf_t9_a_page_comes_whatever_the_paging_mode() {
        let mut program = waiting(&[0xf4]);
        let vcpu = &mut program.vcpu;
        vcpu.cpu.state.cr0 |= cr0::PG;
        vcpu.take_pages();
        vcpu.cpu.state.cr0 &= !cr0::PG;
        vcpu.handle.page_came(0x5000, Outcome::Came);
        vcpu.take_pages();
        assert_eq!(token(vcpu), 5);
        assert_eq!(vcpu.lapic.as_ref().unwrap().next_interrupt(), Some(0xf3));
    }

    /// G11: the kernel makes a vCPU that halts runnable when a page comes that the guest is not told of yet.
    #[test]
    fn apf_t11_a_page_that_comes_ends_no_halt() {
        let mut program = waiting(&[0xf4]);
        let vcpu = &mut program.vcpu;
        vcpu.async_pf.kvm.unacknowledged = true;
        let handle = vcpu.handle();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while handle.stats.blocking.load(std::sync::atomic::Ordering::Relaxed) == 0 {
                    std::thread::yield_now();
                }
                handle.page_came(0x5000, Outcome::Came);
                while handle.has_pages() {
                    std::thread::yield_now();
                }
                handle.interrupt();
            });
            assert!(matches!(vcpu.run(), Err(crate::Error::Interrupted)));
        });
        assert_eq!(vcpu.mp_state().mp_state, kvm_bindings::KVM_MP_STATE_HALTED);
        assert_eq!((token(vcpu), vcpu.async_pf.wanted.len()), (0, 0));
    }

    /// R11 of the protocol, too.
    #[test]
    fn pnp_r11_tokens_of_eight_vcpus_are_unique() {
        let mut seen = std::collections::HashSet::new();
        for vcpu in 0..8 {
            let mut tokens = super::super::AsyncPf::default();
            assert!((0..10_000).map(|_| tokens.token(vcpu)).all(|token| token != 0 && seen.insert(token)));
        }
    }
}
