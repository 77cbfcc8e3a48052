//! KVM_GET/SET_LAPIC and what old clients ask about the task priority: KVM_TPR_ACCESS_REPORTING, KVM_SET_VAPIC_ADDR.

use kvm_bindings::{kvm_lapic_state, kvm_tpr_access_ctl};

use super::Vcpu;
use crate::error::Error;
use crate::irqchip::lapic::Lapic;

impl Vcpu {
    /// The in-kernel local APIC: EINVAL without one.
    pub fn require_lapic(&self) -> Result<&Lapic, Error> {
        self.lapic.as_deref().ok_or(Error::Invalid("the VM has no in-kernel local APICs"))
    }

    /// KVM_GET_LAPIC.
    pub fn lapic_state(&self) -> Result<kvm_lapic_state, Error> {
        Ok(self.require_lapic()?.state())
    }

    /// KVM_SET_LAPIC. EINVAL for an ID that is not the vCPU's in x2APIC mode with 32-bit IDs.
    pub fn set_lapic_state(&mut self, image: &kvm_lapic_state) -> Result<(), Error> {
        self.require_lapic()?.set_state(image).map_err(|_| Error::Invalid("the APIC ID of the image"))?;
        self.cpu.state.cr8 = self.cr8();
        Ok(())
    }

    /// KVM_TPR_ACCESS_REPORTING: EINVAL for flags. Nothing is ever reported: accesses to the task priority are no exits
    /// here, as on processors that virtualise the APIC's registers.
    pub fn set_tpr_access_reporting(&mut self, control: &kvm_tpr_access_ctl) -> Result<(), Error> {
        if control.flags != 0 {
            return Err(Error::Invalid("flags of kvm_tpr_access_ctl"));
        }
        Ok(())
    }

    /// KVM_SET_VAPIC_ADDR: where the guest keeps its task priority, if the client has patched the guest to do so, which
    /// it does on reports of accesses only. EINVAL for an address that no memory backs.
    pub fn set_vapic_address(&mut self, gpa: u64) -> Result<(), Error> {
        self.require_lapic()?;
        if gpa != 0 && !self.vm.memory().read(gpa, &mut [0; 4]) {
            return Err(Error::Invalid("no memory at the address of the virtual APIC"));
        }
        self.vapic_address = gpa;
        Ok(())
    }

    /// Before an entry: tells the guest what its APIC holds (kernel: `kvm_lapic_sync_to_vapic`).
    pub(super) fn sync_to_vapic(&self) {
        if self.vapic_address != 0
            && let Some(lapic) = &self.lapic
        {
            self.vm.memory().write(self.vapic_address, &lapic.vapic_word().to_le_bytes());
        }
    }

    /// After an exit: takes over the task priority (kernel: `kvm_lapic_sync_from_vapic`).
    pub(super) fn sync_from_vapic(&self) {
        let mut word = [0; 4];
        if self.vapic_address != 0
            && let Some(lapic) = &self.lapic
            && self.vm.memory().read(self.vapic_address, &mut word)
        {
            lapic.set_tpr(word[0]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{vcpu, vcpu_with_apic};
    use super::*;

    #[test]
    fn without_an_apic_there_is_nothing() {
        let mut vcpu = vcpu();
        let errors = [
            vcpu.lapic_state().map(drop),
            vcpu.set_lapic_state(&kvm_lapic_state::default()),
            vcpu.set_vapic_address(0),
        ];
        assert!(errors.into_iter().all(|result| result.is_err_and(|e| e.errno() == libc::EINVAL)));
    }

    #[test]
    fn images_come_back() {
        let mut vcpu = vcpu_with_apic();
        let mut image = vcpu.lapic_state().unwrap();
        image.regs[0x80] = 0x50;
        vcpu.set_lapic_state(&image).unwrap();
        assert_eq!(vcpu.lapic_state().unwrap().regs[0x80], 0x50);
        assert_eq!(vcpu.sregs().cr8, 5);
    }

    #[test]
    fn task_priority_reports() {
        let mut vcpu = vcpu_with_apic();
        let control = |flags| kvm_tpr_access_ctl { enabled: 1, flags, ..Default::default() };
        assert!(vcpu.set_tpr_access_reporting(&control(0)).is_ok());
        assert!(vcpu.set_tpr_access_reporting(&control(1)).is_err());
        assert!(vcpu.set_vapic_address(0).is_ok());
        assert!(vcpu.set_vapic_address(0x1000).is_err(), "no memory there");
    }
}
