//! Asynchronous page faults as the kernel's KVM has them (Documentation/virt/kvm/x86/msr.rst; `kvm_arch_async_page_not_present` and
//! `kvm_check_async_pf_completion`): a guest that touches a page which is elsewhere is told so by #PF with a token in CR2, and by an
//! interrupt when it has come; or it is held until then, and takes interrupts meanwhile.

use std::collections::VecDeque;

use silicon::exception::Exception;
use silicon::state::cr0;

use super::Vcpu;
use crate::async_pf::Request;
use crate::irqchip::bus::Message;
use crate::msr::{MsrError, async_pf};

/// Pages that a vCPU waits for at most (kernel: ASYNC_PF_PER_VCPU).
const PAGES_MAX: usize = 64;
/// The token that wakes everybody.
const BROADCAST: u32 = !0;
/// `struct kvm_vcpu_pv_apf_data`: flags, bit 0 of them, and the token of a page that has come.
const FLAGS: u64 = 0;
const NOT_PRESENT: u32 = 1 << 0;
const TOKEN: u64 = 4;

/// A page that is on its way.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    address: u64,
    token: u32,
    /// The guest has been told.
    told: bool,
}

/// What a vCPU waits for.
#[derive(Debug, Default)]
pub(super) struct AsyncPf {
    wanted: Vec<Wanted>,
    /// Tokens of pages that have come, and whether the guest is to hear of them.
    came: VecDeque<(u32, bool)>,
    tokens: u32,
    /// The vCPU is held until something comes. The guest cannot tell, and neither can the client (kernel: `apf.halted`).
    pub(super) held: bool,
    /// The guest has not acknowledged the last interrupt.
    unacknowledged: bool,
}

impl AsyncPf {
    /// Never zero, and other than those of the VM's other vCPUs (kernel: `alloc_apf_token`).
    fn token(&mut self, vcpu: u32) -> u32 {
        self.tokens = self.tokens.wrapping_add(1);
        if self.tokens << 12 == 0 {
            self.tokens = 1;
        }
        self.tokens << 12 | vcpu & 0xfff
    }

    /// Nobody wants to hear of what is on its way.
    pub(super) fn clear(&mut self) {
        self.came.clear();
        self.wanted.iter_mut().for_each(|wanted| wanted.told = false);
        self.held = false;
        self.unacknowledged = false;
    }
}

impl Vcpu {
    /// MSR_KVM_ASYNC_PF_EN has been written.
    ///
    /// # Errors
    ///
    /// #GP, with the old value, if the guest's data is not in memory. (The kernel keeps the new one.)
    pub(super) fn async_pf_enabled(&mut self, old: u64) -> Result<(), MsrError> {
        let Some(data) = self.msrs.async_pf_data() else {
            self.async_pf.clear();
            return Ok(());
        };
        let mut word = [0; 4];
        if !self.vm.memory().read(data + TOKEN, &mut word) {
            self.msrs.put_async_pf(old);
            return Err(MsrError::Refused(async_pf::ENABLE));
        }
        // Whoever slept when the guest was saved is woken; once, however often the guest writes.
        if self.async_pf.came.is_empty() {
            self.async_pf.came.push_back((BROADCAST, true));
        }
        Ok(())
    }

    /// MSR_KVM_ASYNC_PF_ACK has been written with 1.
    pub(super) fn async_pf_acknowledged(&mut self) {
        self.async_pf.unacknowledged = false;
    }

    /// The guest has touched a page that is elsewhere.
    pub(super) fn memory_elsewhere(&mut self, address: u64, host: u64) {
        self.requeue_vectored();
        // A locked access that was about to be executed after all is refused again, and decided on again, when the page is there.
        self.locks.forget_step();
        if !self.can_go_on() || self.async_pf.wanted.len() >= PAGES_MAX {
            // The access itself waits.
            self.handle.stats.async_pf_waits.count();
            self.vm.memory().ept().mark_present(address);
            return;
        }
        if self.async_pf.wanted.iter().any(|wanted| wanted.address == address) {
            self.hold();
            return;
        }
        let request = Request { address, host, vcpu: self.handle.clone() };
        if let Err(error) = self.vm.page_ins().request(request) {
            tracing::warn!("a page of the guest's cannot be brought in its absence: {error}");
            self.vm.memory().ept().mark_present(address);
            return;
        }
        let token = self.async_pf.token(self.handle.id());
        let told = self.tell_not_present();
        self.async_pf.wanted.push(Wanted { address, token, told });
        if told {
            self.handle.stats.async_pf_not_present.count();
            self.events.raise(Exception::pf(token.into(), 0));
        } else {
            self.hold();
        }
    }

    fn hold(&mut self) {
        self.handle.stats.async_pf_holds.count();
        self.async_pf.held = true;
    }

    /// Whether the vCPU can do anything but wait (kernel: `kvm_can_do_async_pf`).
    fn can_go_on(&self) -> bool {
        let free = !self.events.reinjects() && !self.events.has_exception();
        // A guest whose HLT does not exit is never held.
        let may_hold = self.cpu.controls.hlt_exiting || self.can_tell();
        self.lapic.is_some() && free && may_hold && self.cpu.interrupt_allowed()
    }

    /// Whether the guest takes the event now (kernel: `kvm_can_deliver_async_pf`).
    fn can_tell(&self) -> bool {
        let anywhere = self.msrs.async_pf_enable() & async_pf::SEND_ALWAYS != 0;
        let state = &self.cpu.state;
        self.msrs.async_pf_data().is_some() && (anywhere || state.cpl != 0) && state.cr0 & cr0::PG != 0
    }

    /// Says in the guest's data that a page is not present.
    fn tell_not_present(&mut self) -> bool {
        let Some(data) = self.msrs.async_pf_data().filter(|_| self.can_tell()) else { return false };
        self.vm.memory().write(data + FLAGS, &NOT_PRESENT.to_le_bytes())
    }

    /// Pages have come: the guest hears of them, one at a time, and goes on.
    pub(super) fn take_pages(&mut self) {
        if self.handle.has_pages() {
            for address in self.handle.take_pages() {
                let found = self.async_pf.wanted.iter().position(|wanted| wanted.address == address);
                if let Some(index) = found {
                    let Wanted { token, told, .. } = self.async_pf.wanted.swap_remove(index);
                    self.async_pf.came.push_back((token, told));
                    self.async_pf.held = false;
                }
            }
        }
        while let Some(&(token, told)) = self.async_pf.came.front() {
            if told && !self.tell_ready(token) {
                break;
            }
            self.async_pf.came.pop_front();
        }
    }

    /// Tells the guest that a page has come; false: it has not read of the one before. Unlike the kernel this does not end a HLT
    /// by itself, only by the interrupt.
    fn tell_ready(&mut self, token: u32) -> bool {
        let (Some(data), Some(lapic)) = (self.msrs.async_pf_data(), self.lapic.clone()) else { return true };
        let mut word = [0; 4];
        let free = self.vm.memory().read(data + TOKEN, &mut word) && word == [0; 4];
        if !lapic.address().is_software_enabled() || !free || self.async_pf.unacknowledged {
            return false;
        }
        if self.vm.memory().write(data + TOKEN, &token.to_le_bytes()) {
            self.async_pf.unacknowledged = true;
            self.handle.stats.async_pf_ready.count();
            lapic.accept(&Message::from_icr(self.msrs.async_pf_vector().into(), 0));
        }
        true
    }

    /// Whether something that has come could be told, or lets the vCPU go on.
    pub(super) fn awaits_page(&self) -> bool {
        self.async_pf.held && !self.handle.has_pages()
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_msr_entry;

    use super::super::testing::{Program, vm};
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
        assert_eq!(vcpu.async_pf.came.len(), 1);
        // T7: what was to be told is dropped; and an address without memory changes nothing.
        assert_eq!(vcpu.set_msrs(&enable(0)), 1);
        assert!(vcpu.async_pf.came.is_empty());
        assert_eq!((vcpu.set_msrs(&enable(0x8000_0009)), vcpu.msrs.async_pf_enable()), (0, 0));
    }
}
