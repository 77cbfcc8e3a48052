//! KVM_X86_SETUP_MCE and KVM_X86_SET_MCE: machine checks that the client injects.

use kvm_bindings::kvm_x86_mce;
use silicon::exception::{Exception, vector};
use silicon::state::cr4;

use super::Vcpu;
use crate::error::Error;
use crate::msr::Injected;

impl Vcpu {
    /// KVM_X86_SETUP_MCE: MCG_CAP, with the number of banks in bits 7:0. EINVAL for more banks than there can be, or for
    /// capabilities that do not exist.
    pub fn setup_mce(&mut self, capabilities: u64) -> Result<(), Error> {
        if !self.msrs.setup_mce(capabilities) {
            return Err(Error::Invalid("MCG_CAP"));
        }
        self.update_apic_features();
        Ok(())
    }

    /// KVM_X86_SET_MCE: an error in a bank. EINVAL for a bank that does not exist, and for a status that is not valid.
    pub fn set_mce(&mut self, mce: &kvm_x86_mce) -> Result<(), Error> {
        let takes_exceptions = self.cpu.state.cr4 & cr4::MCE != 0;
        match self.msrs.inject_mce(mce, takes_exceptions).ok_or(Error::Invalid("kvm_x86_mce"))? {
            Injected::Recorded => {}
            Injected::Cmci => {
                if let Some(lapic) = &self.lapic {
                    lapic.deliver_cmci();
                }
            }
            Injected::Exception => {
                self.events.raise(Exception { vector: vector::MC, error_code: None, payload: 0 });
            }
            Injected::Shutdown => self.events.triple_fault = true,
        }
        Ok(())
    }
}
