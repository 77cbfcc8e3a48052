//! A virtual machine: memory, interrupt controllers, clock, and the list of its vCPUs.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use kvm_bindings::{
    KVM_PIT_SPEAKER_DUMMY, kvm_ioeventfd, kvm_irq_routing_entry, kvm_irqfd, kvm_msi, kvm_pit_config,
    kvm_userspace_memory_region,
};

use crate::error::Error;
use crate::eventfd::{IoEventFds, IrqFds};
use crate::irqchip::bus::{ApicSettings, Delivery, Msi};
use crate::irqchip::{IrqChip, IrqChipKind};
use crate::kvmclock::ClockBase;
use crate::memory::Memory;
use crate::system::{System, VCPUS_MAX};
use crate::timer::Timers;
use crate::tsc;
use crate::vcpu::{Vcpu, VcpuHandle};

/// One VM.
#[derive(Debug)]
pub struct Vm {
    system: Arc<System>,
    memory: Memory,
    irqchip: OnceLock<Arc<IrqChip>>,
    /// Made when first used, since it brings a thread with it.
    irqfds: OnceLock<IrqFds>,
    ioeventfds: IoEventFds,
    clock: Mutex<ClockBase>,
    vcpus: RwLock<Vec<Arc<VcpuHandle>>>,
    /// Offset of every vCPU's TSC from the host's at creation, so that guests start near zero and in step.
    tsc_offset: u64,
}

impl Vm {
    pub(crate) fn new(system: Arc<System>) -> Result<Arc<Vm>, Error> {
        Ok(Arc::new(Vm {
            system,
            memory: Memory::default(),
            irqchip: OnceLock::new(),
            irqfds: OnceLock::new(),
            ioeventfds: IoEventFds::default(),
            clock: Mutex::default(),
            vcpus: RwLock::default(),
            tsc_offset: tsc::rdtsc().wrapping_neg(),
        }))
    }

    /// The system that the VM belongs to.
    pub fn system(&self) -> &Arc<System> {
        &self.system
    }

    /// Guest-physical memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(crate) fn clock(&self) -> MutexGuard<'_, ClockBase> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn initial_tsc_offset(&self) -> u64 {
        self.tsc_offset
    }

    /// The in-kernel interrupt controllers, if they were created.
    pub fn irqchip(&self) -> Option<&Arc<IrqChip>> {
        self.irqchip.get()
    }

    fn require_irqchip(&self) -> Result<&Arc<IrqChip>, Error> {
        self.irqchip().ok_or(Error::Missing("the interrupt controller (KVM_CREATE_IRQCHIP)"))
    }

    /// Handles of the vCPUs created so far, in creation order.
    pub fn vcpus(&self) -> Vec<Arc<VcpuHandle>> {
        self.vcpus.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// KVM_SET_USER_MEMORY_REGION.
    pub fn set_user_memory_region(&self, region: kvm_userspace_memory_region) -> Result<(), Error> {
        self.memory.set_region(region)
    }

    /// KVM_CREATE_IRQCHIP. Comes before the first vCPU.
    pub fn create_irqchip(&self) -> Result<(), Error> {
        if !self.vcpus().is_empty() {
            return Err(Error::Invalid("vCPUs exist already"));
        }
        let chip =
            IrqChip::new(IrqChipKind::Full, Arc::new(ApicSettings::default()), Arc::new(Timers::start()?));
        self.irqchip.set(chip).map_err(|_| Error::Exists("the interrupt controller"))
    }

    /// KVM_CREATE_PIT2.
    pub fn create_pit2(&self, config: kvm_pit_config) -> Result<(), Error> {
        self.require_irqchip()?.create_pit(config.flags & KVM_PIT_SPEAKER_DUMMY != 0)?;
        Ok(())
    }

    /// KVM_IRQ_LINE.
    pub fn irq_line(&self, gsi: u32, level: bool) -> Result<(), Error> {
        self.require_irqchip()?.irq_line(gsi, level);
        Ok(())
    }

    /// KVM_SIGNAL_MSI: whether any LAPIC took it.
    pub fn signal_msi(&self, msi: &kvm_msi) -> Result<bool, Error> {
        let message = Msi::from(msi);
        Ok(matches!(self.require_irqchip()?.send_msi(message)?, Delivery::Delivered(_)))
    }

    /// KVM_SET_GSI_ROUTING.
    pub fn set_gsi_routing(&self, entries: &[kvm_irq_routing_entry]) -> Result<(), Error> {
        Ok(self.require_irqchip()?.set_gsi_routing(entries)?)
    }

    /// KVM_IRQFD.
    pub fn irqfd(&self, request: &kvm_irqfd) -> Result<(), Error> {
        let chip = self.require_irqchip()?;
        let fresh = match self.irqfds.get() {
            Some(_) => None,
            None => Some(IrqFds::new(chip)?),
        };
        let irqfds = match fresh {
            Some(fresh) => self.irqfds.get_or_init(|| fresh),
            None => self.irqfds.get().ok_or(Error::Missing("irqfds"))?,
        };
        Ok(irqfds.request(request)?)
    }

    /// KVM_IOEVENTFD.
    pub fn ioeventfd(&self, request: &kvm_ioeventfd) -> Result<(), Error> {
        Ok(self.ioeventfds.request(request)?)
    }

    pub(crate) fn ioeventfds(&self) -> &IoEventFds {
        &self.ioeventfds
    }

    /// KVM_CREATE_VCPU.
    pub fn create_vcpu(self: &Arc<Vm>, id: u32) -> Result<Vcpu, Error> {
        if id >= VCPUS_MAX {
            return Err(Error::Invalid("vCPU id too large"));
        }
        let mut vcpus = self.vcpus.write().unwrap_or_else(PoisonError::into_inner);
        if vcpus.iter().any(|v| v.id() == id) {
            return Err(Error::Exists("a vCPU with this id"));
        }
        let vcpu = Vcpu::new(self.clone(), id)?;
        vcpus.push(vcpu.handle());
        Ok(vcpu)
    }
}
