//! Memory of the guest's that has failed, as QEMU tells of it: machine checks with the page's address (`kvm_arch_on_sigbus_vcpu` and
//! `kvm_mce_inject` in its target/i386/kvm/kvm.c).
//!
//! *Action required* is for the virtual CPU that has touched it, *action optional* for failures that somebody else has found.
//! The host tells of failures only when somebody touches the memory (prctl(2), PR_MCE_KILL_LATE, the default), so all of its are of the
//! first kind; the second is the memory device's ([`crate::devices::memory`]).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use hypervisor::{Error, Vcpu, VcpuHandle};
use kvm_bindings::{kvm_msr_entry, kvm_x86_mce};

use crate::devices::bus::lock;

/// MCG_CAP: MCG_CTL_P, MCG_SER_P, MCG_LMCE_P, and as many banks as QEMU has.
const CAPABILITIES: u64 = 1 << 8 | 1 << 24 | 1 << 27 | 10;
/// IA32_FEATURE_CONTROL, which firmware locks: lock, VMX outside SMX, LMCE_ENABLED.
const FEATURE_CONTROL: u32 = 0x3a;
const LOCKED: u64 = 1 << 0;
const VMX: u64 = 1 << 2;
const LMCE: u64 = 1 << 20;

/// IA32_MCG_EXT_CTL, and LMCE_EN in it: the guest takes machine checks on one virtual CPU only.
const MCG_EXT_CTL: u32 = 0x4d0;
const LMCE_EN: u64 = 1 << 0;

/// Bank of memory errors.
const BANK: u8 = 9;
/// IA32_MCG_STATUS: RIPV, EIPV, MCIP, LMCE_S.
mod mcg {
    pub(super) const RIPV: u64 = 1 << 0;
    pub(super) const EIPV: u64 = 1 << 1;
    pub(super) const MCIP: u64 = 1 << 2;
    pub(super) const LMCE_S: u64 = 1 << 3;
}

/// IA32_MCi_STATUS.
mod status {
    pub(super) const AR: u64 = 1 << 55;
    /// VAL, UC, EN, MISCV, ADDRV, S.
    pub(super) const ALL: u64 = 1 << 63 | 1 << 61 | 1 << 60 | 1 << 59 | 1 << 58 | 1 << 56;
    /// Codes: a load of data, and memory scrubbing.
    pub(super) const DATA_LOAD: u64 = 0x134;
    pub(super) const SCRUBBING: u64 = 0xc0;
}

/// IA32_MCi_MISC: the address is a physical one, and right but for its lowest 12 bits.
const MISC: u64 = 2 << 6 | 0xc;

/// What is to be done about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// The instruction cannot go on without.
    Required,
    /// Nobody has used the memory so far.
    Optional,
}

/// Sets the registers as firmware does.
pub(crate) fn set_up(vcpu: &mut Vcpu) -> Result<(), Error> {
    vcpu.setup_mce(CAPABILITIES)?;
    let control = |data| [kvm_msr_entry { index: FEATURE_CONTROL, data, ..kvm_msr_entry::default() }];
    if vcpu.set_msrs(&control(LOCKED | VMX | LMCE)) == 0 && vcpu.set_msrs(&control(LOCKED | LMCE)) == 0 {
        tracing::debug!("machine checks are for all virtual CPUs");
    }
    Ok(())
}

fn machine_check(gpa: u64, action: Action, local: bool) -> kvm_x86_mce {
    let (status, mcg) = match action {
        Action::Required => (status::AR | status::DATA_LOAD, mcg::EIPV),
        Action::Optional => (status::SCRUBBING, 0),
    };
    kvm_x86_mce {
        status: status::ALL | status,
        addr: gpa,
        misc: MISC,
        mcg_status: mcg::MCIP | mcg::RIPV | mcg | if local { mcg::LMCE_S } else { 0 },
        bank: BANK,
        ..kvm_x86_mce::default()
    }
}

/// What the others are told of a machine check that is for all virtual CPUs.
fn elsewhere() -> kvm_x86_mce {
    let status = 1 << 63 | 1 << 61;
    kvm_x86_mce { status, mcg_status: mcg::MCIP | mcg::RIPV, bank: 1, ..kvm_x86_mce::default() }
}

/// A virtual CPU, and whether it is to take a machine check because another one does.
type Bystander = (Arc<VcpuHandle>, AtomicBool);

/// The machine checks of a machine.
#[derive(Debug, Default)]
pub(crate) struct MachineChecks {
    /// Failures that a virtual CPU is to hear of when it leaves a device.
    found: Mutex<VecDeque<u64>>,
    cpus: OnceLock<Vec<Bystander>>,
    /// Somebody has been told on the host.
    logged: AtomicBool,
}

impl MachineChecks {
    /// The machine's virtual CPUs are these.
    pub(crate) fn set_cpus(&self, cpus: &[Vcpu]) {
        self.cpus.get_or_init(|| cpus.iter().map(|cpu| (cpu.handle(), AtomicBool::new(false))).collect());
    }

    /// Tells the guest that its memory at `gpa` has failed, on this virtual CPU or, if it cannot have it otherwise, on all.
    pub(crate) fn tell(&self, vcpu: &mut Vcpu, gpa: u64, action: Action) -> Result<(), Error> {
        // A guest that takes no machine checks touches it over and over.
        if !self.logged.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "memory of the guest's has failed at {gpa:#x}, and it gets a machine check; further ones are not logged"
            );
        }
        let mut control = [kvm_msr_entry { index: MCG_EXT_CTL, ..kvm_msr_entry::default() }];
        let local = vcpu.get_msrs(&mut control) == 1 && control[0].data & LMCE_EN != 0;
        vcpu.set_mce(&machine_check(gpa, action, local))?;
        let own = vcpu.handle().id();
        for (cpu, due) in self.cpus.get().into_iter().flatten().filter(|(cpu, _)| !local && cpu.id() != own) {
            due.store(true, Ordering::SeqCst);
            cpu.interrupt();
        }
        Ok(())
    }

    /// Gives `vcpu`, which has been interrupted, the machine check of another one, if there is any.
    pub(crate) fn attend(&self, vcpu: &mut Vcpu) -> Result<(), Error> {
        let own = vcpu.handle().id();
        let mine = self.cpus.get().and_then(|cpus| cpus.iter().find(|(cpu, _)| cpu.id() == own));
        match mine {
            Some((_, due)) if due.swap(false, Ordering::SeqCst) && !vcpu.awaits_init() => {
                vcpu.set_mce(&elsewhere())
            }
            _ => Ok(()),
        }
    }

    /// Somebody has found that the memory at `gpa` has failed.
    pub(crate) fn found(&self, gpa: u64) {
        lock(&self.found).push_back(gpa);
    }

    /// Tells `vcpu` of what has been found.
    pub(crate) fn tell_found(&self, vcpu: &mut Vcpu) -> Result<(), Error> {
        let Some(gpa) = lock(&self.found).pop_front() else { return Ok(()) };
        self.tell(vcpu, gpa, Action::Optional)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of QEMU's.
    #[test]
    fn machine_checks_are_those_of_qemu() {
        let required = machine_check(0x1234_5000, Action::Required, false);
        assert_eq!((required.status, required.mcg_status), (0xbd80_0000_0000_0134, 7));
        assert_eq!((required.addr, required.misc, required.bank), (0x1234_5000, 0x8c, 9));
        let optional = machine_check(0x1000, Action::Optional, true);
        assert_eq!((optional.status, optional.mcg_status), (0xbd00_0000_0000_00c0, 13));
    }
}
