//! A virtual machine: memory, interrupt controllers, clock, and the list of its vCPUs.
//!
//! Locks: [`Vm::setup`] is taken before any other lock of a VM, and never while guest memory is touched.

pub mod clock;
mod interrupts;
mod memory;
pub mod policy;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use silicon::model::speculation::arch_cap::SKIP_L1DFL_VMENTRY;

use crate::async_pf::{HostPages, PageIns};
use crate::coalesced::CoalescedIo;
use crate::dirty_ring::DirtyRing;
use crate::error::Error;
use crate::eventfd::{IoEventFds, IrqFds};
use crate::irqchip::IrqChip;
use crate::irqchip::bus::ApicSettings;
use crate::irqchip::lapic::Waker;
use crate::kvmclock::ClockBase;
use crate::memory::Memory;
use crate::mitigations::selected::Flush;
use crate::msr::filter::MsrFilters;
use crate::notify::LogLimit;
use crate::processors::Processors;
use crate::split_lock;
use crate::stats::VmStats;
use crate::system::{System, VCPU_IDS_MAX, VCPUS_MAX};
use crate::tsc;
use crate::vcpu::{TscSync, Vcpu, VcpuHandle};
use policy::Policy;

/// One VM.
#[derive(Debug)]
pub struct Vm {
    system: Arc<System>,
    /// No two VMs of a system have the same.
    number: u32,
    /// IA32_ARCH_CAPABILITIES that its vCPUs begin with.
    arch_capabilities: u64,
    /// What entries of its vCPUs do at least, since the guest has been told that it need not do so itself.
    granted: Mutex<Option<Flush>>,
    memory: Memory,
    apic_settings: Arc<ApicSettings>,
    irqchip: OnceLock<Arc<IrqChip>>,
    /// Made when first used, since it brings threads with it.
    page_ins: OnceLock<PageIns>,
    /// Likewise.
    irqfds: OnceLock<IrqFds>,
    ioeventfds: IoEventFds,
    coalesced: CoalescedIo,
    msr_filters: MsrFilters,
    policy: Policy,
    /// Lines about notify VM exits.
    notify_log: LogLimit,
    dead: AtomicBool,
    dirty_ring_bytes: OnceLock<u32>,
    dirty_rings: Mutex<Vec<Arc<DirtyRing>>>,
    stats: VmStats,
    clock: Mutex<ClockBase>,
    /// Counts the changes of the clock that vCPUs have to tell their guest.
    clock_changes: AtomicU32,
    setup: Mutex<Setup>,
    /// The last counter that was set on a vCPU.
    tsc_sync: Mutex<TscSync>,
    /// Frequency of the TSC of vCPUs yet to be created, in kHz.
    tsc_khz: AtomicU32,
}

/// What calls that build up the VM agree on.
#[derive(Debug, Default)]
pub(crate) struct Setup {
    /// In the order of their creation.
    pub(crate) vcpus: Vec<Arc<VcpuHandle>>,
    /// The vCPU that is the bootstrap processor.
    boot_id: u32,
    /// Ids are below this; set once, by the client or by the first vCPU.
    ids_max: Option<u32>,
}

impl Vm {
    pub(crate) fn new(system: Arc<System>) -> Result<Arc<Vm>, Error> {
        let mut memory = Memory::new(system.model().features().physical_bits());
        if system.mitigations().selected().clear_for_mmio {
            memory = memory.minding_mmio();
        }
        let policy = Policy::new(system.host(), system.notify_setting());
        let vm = Arc::new(Vm {
            number: system.processors().number_vm(),
            arch_capabilities: system.mitigations().supported(),
            granted: Mutex::default(),
            system,
            memory,
            apic_settings: Arc::default(),
            irqchip: OnceLock::new(),
            page_ins: OnceLock::new(),
            irqfds: OnceLock::new(),
            ioeventfds: IoEventFds::default(),
            coalesced: CoalescedIo::default(),
            msr_filters: MsrFilters::default(),
            policy,
            notify_log: LogLimit::default(),
            dead: AtomicBool::new(false),
            dirty_ring_bytes: OnceLock::new(),
            dirty_rings: Mutex::default(),
            stats: VmStats::new()?,
            clock: Mutex::default(),
            clock_changes: AtomicU32::new(0),
            setup: Mutex::default(),
            tsc_sync: Mutex::default(),
            tsc_khz: AtomicU32::new(tsc::host_khz()),
        });
        vm.told(vm.arch_capabilities)?;
        Ok(vm)
    }

    /// No two VMs of a system have the same.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// IA32_ARCH_CAPABILITIES that its vCPUs begin with, all of them (B3): what was supported when the VM was made.
    pub fn arch_capabilities(&self) -> u64 {
        self.arch_capabilities
    }

    /// A vCPU is to have this in IA32_ARCH_CAPABILITIES. Once that has SKIP_L1DFL_VMENTRY the VM's entries flush for as long as it
    /// exists, whatever becomes of the parameter (B4).
    ///
    /// # Errors
    ///
    /// EINVAL as [`Mitigations::promise`](crate::mitigations::Mitigations).
    pub(crate) fn told(&self, arch_capabilities: u64) -> Result<(), Error> {
        let mut granted = self.granted.lock().unwrap_or_else(PoisonError::into_inner);
        if arch_capabilities & SKIP_L1DFL_VMENTRY != 0 && granted.is_none() {
            *granted = Some(self.system.mitigations().promise()?);
        }
        Ok(())
    }

    /// What entries of its vCPUs do about L1 terminal fault.
    pub fn flush(&self) -> Flush {
        let granted = *self.granted.lock().unwrap_or_else(PoisonError::into_inner);
        granted.unwrap_or(Flush::NotRequired).max(self.system.mitigations().flush())
    }

    /// The system that the VM belongs to.
    pub fn system(&self) -> &Arc<System> {
        &self.system
    }

    /// Guest-physical memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What KVM_ENABLE_CAP has set.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The host's thread that vCPU 0 runs on; those of the others follow ([`Processors`](crate::processors::Processors)).
    pub fn place(&self) -> u32 {
        Processors::place_of(self.number)
    }

    /// IA32_CORE_CAPABILITIES as the VM's guest may have it at best.
    pub fn core_capabilities(&self) -> u64 {
        split_lock::capabilities(self.system.model(), self.system.host(), self.policy.pinned())
    }

    /// Counters.
    pub fn stats(&self) -> &VmStats {
        &self.stats
    }

    /// KVM_GET_STATS_FD on the VM.
    pub fn stats_descriptor(&self) -> Result<OwnedFd, Error> {
        Ok(self.stats.descriptor(&format!("kvm-{}", std::process::id()))?)
    }

    /// Who brings pages that are elsewhere.
    pub(crate) fn page_ins(&self) -> &PageIns {
        self.page_ins.get_or_init(|| PageIns::new(self.memory.ept().clone(), Arc::new(HostPages)))
    }

    pub(crate) fn notify_log(&self) -> &LogLimit {
        &self.notify_log
    }

    /// KVM_CREATE_DEVICE: there are no devices of any type. ENODEV.
    pub fn create_device(&self, _kind: u32) -> Result<(), Error> {
        Err(Error::NoDevice("KVM_CREATE_DEVICE"))
    }

    /// KVM_X86_SET_MSR_FILTER's filter.
    pub fn msr_filters(&self) -> &MsrFilters {
        &self.msr_filters
    }

    /// Zones whose writes are put off (KVM_REGISTER_COALESCED_MMIO).
    pub fn coalesced(&self) -> &CoalescedIo {
        &self.coalesced
    }

    /// What holds for all local APICs.
    pub fn apic_settings(&self) -> &Arc<ApicSettings> {
        &self.apic_settings
    }

    pub(crate) fn setup(&self) -> MutexGuard<'_, Setup> {
        self.setup.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn tsc_sync(&self) -> MutexGuard<'_, TscSync> {
        self.tsc_sync.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM is in a state that it cannot be in: from now on each call on it gives EIO (kernel: `kvm_vm_dead`).
    pub(crate) fn kill(&self) {
        self.dead.store(true, Ordering::SeqCst);
        self.setup().vcpus.iter().for_each(|vcpu| vcpu.kick());
    }

    /// Whether no call on the VM and its vCPUs is served any more.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// Handles of the vCPUs created so far, in creation order.
    pub fn vcpus(&self) -> Vec<Arc<VcpuHandle>> {
        self.setup().vcpus.clone()
    }

    /// KVM_SET_TSS_ADDR. Hardware without unrestricted guests needs three pages there; this processor does not, so
    /// only the check remains.
    pub fn set_tss_addr(&self, address: u64) -> Result<(), Error> {
        if address > u64::from(u32::MAX - 3 * 4096 + 1) {
            return Err(Error::Invalid("the task-state segment lies above 4 GiB"));
        }
        Ok(())
    }

    /// KVM_SET_IDENTITY_MAP_ADDR: likewise for the page table of real mode; comes before the first vCPU.
    pub fn set_identity_map_addr(&self, _address: u64) -> Result<(), Error> {
        self.require_no_vcpus()
    }

    /// KVM_SET_NR_MMU_PAGES: a limit for shadow page tables, of which there are none.
    pub fn set_nr_mmu_pages(&self, pages: u64) -> Result<(), Error> {
        /// The kernel's `KVM_MIN_ALLOC_MMU_PAGES`.
        const LEAST: u64 = 64;
        if pages < LEAST {
            return Err(Error::Invalid("too few pages for page tables"));
        }
        Ok(())
    }

    fn require_no_vcpus(&self) -> Result<(), Error> {
        match self.setup().vcpus.is_empty() {
            true => Ok(()),
            false => Err(Error::Invalid("vCPUs exist already")),
        }
    }

    /// KVM_SET_BOOT_CPU_ID: EBUSY after the first vCPU.
    pub fn set_boot_cpu_id(&self, id: u64) -> Result<(), Error> {
        let mut setup = self.setup();
        if !setup.vcpus.is_empty() {
            return Err(Error::Busy("vCPUs exist already"));
        }
        match u32::try_from(id) {
            Ok(id) if id <= setup.ids_max.unwrap_or(VCPU_IDS_MAX) => setup.boot_id = id,
            _ => return Err(Error::Invalid("vCPU id too large")),
        }
        Ok(())
    }

    /// KVM_CAP_MAX_VCPU_ID: ids of vCPUs are below `limit`. It can be set once.
    pub fn set_vcpu_ids_max(&self, limit: u64) -> Result<(), Error> {
        let invalid = Error::Invalid("the limit of vCPU ids");
        let mut setup = self.setup();
        match u32::try_from(limit) {
            Ok(limit) if limit <= VCPU_IDS_MAX && setup.boot_id <= limit => {
                match setup.ids_max {
                    Some(old) if old == limit => {}
                    // Zero means no limit has been set.
                    None => setup.ids_max = (limit != 0).then_some(limit),
                    Some(_) => return Err(invalid),
                }
                Ok(())
            }
            _ => Err(invalid),
        }
    }

    /// Whether `id` is the bootstrap processor's.
    pub(crate) fn is_boot_cpu(setup: &Setup, id: u32) -> bool {
        setup.boot_id == id
    }

    /// KVM_CREATE_VCPU. EINVAL for an id beyond the VM's limit or a vCPU too many, EEXIST for an id in use.
    pub fn create_vcpu(self: &Arc<Vm>, id: u32) -> Result<Vcpu, Error> {
        if id >= VCPU_IDS_MAX {
            return Err(Error::Invalid("vCPU id too large"));
        }
        let mut setup = self.setup();
        if setup.vcpus.len() >= VCPUS_MAX as usize {
            return Err(Error::Invalid("too many vCPUs"));
        }
        if id >= *setup.ids_max.get_or_insert(VCPU_IDS_MAX) {
            return Err(Error::Invalid("vCPU id too large"));
        }
        if setup.vcpus.iter().any(|v| v.id() == id) {
            return Err(Error::Exists("a vCPU with this id"));
        }
        let vcpu = Vcpu::new(self.clone(), id, Vm::is_boot_cpu(&setup, id))?;
        setup.vcpus.push(vcpu.handle());
        self.stats.vcpus.store(setup.vcpus.len() as u64, Ordering::Relaxed);
        Ok(vcpu)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let granted = self.granted.get_mut().unwrap_or_else(PoisonError::into_inner);
        if granted.is_some_and(|flush| flush != Flush::NotRequired) {
            self.system.mitigations().release();
        }
    }
}

#[cfg(test)]
mod tests;
