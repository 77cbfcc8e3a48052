//! The system object: what a client opens `/dev/kvm` for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use silicon::model::{CpuModel, Feature};

use crate::cpuid;
use crate::error::Error;
use crate::host::{HostParams, SplitLockDetect};
use crate::mitigations::Mitigations;
use crate::mitigations::command_line::{CommandLine, L1dFlush};
use crate::msr;
use crate::notify;
use crate::permissions::Permissions;
use crate::processors::Processors;
use crate::split_lock::{self, RateLimit};
use crate::time::{HostTime, Monotonic};
use crate::vm::Vm;

/// vCPUs that a VM can have (KVM_CAP_MAX_VCPUS; kernel: CONFIG_KVM_MAX_NR_VCPUS by default).
pub const VCPUS_MAX: u32 = 1024;
/// Ids of vCPUs are below this (KVM_CAP_MAX_VCPU_ID; kernel: four for each vCPU).
pub const VCPU_IDS_MAX: u32 = 4 * VCPUS_MAX;

/// The machine that VMs run on: a processor model and the parameters of the host kernel that we stand in for.
#[derive(Debug)]
pub struct System {
    model: CpuModel,
    permissions: Permissions,
    host: HostParams,
    processors: Arc<Processors>,
    mitigations: Mitigations,
    time: Box<dyn HostTime>,
    /// `kernel.split_lock_mitigate`.
    split_lock_mitigate: AtomicBool,
    /// `split_lock_detect=ratelimit:N`: N bus locks a second, of all VMs together.
    bus_locks: Option<RateLimit>,
    /// Messages about them are limited too.
    split_lock_messages: RateLimit,
    /// `kvm_intel.notify_window_us`, which can be written: microseconds, or [`NOTIFY_OFF`].
    notify_window: AtomicU64,
}

/// A second in nanoseconds.
const SECOND: u64 = 1_000_000_000;
/// The notify VM exit of new VMs is off.
const NOTIFY_OFF: u64 = u64::MAX;

impl System {
    /// A machine with processors of `model`, booted with `host`.
    pub fn new(model: CpuModel, host: HostParams) -> Arc<System> {
        System::with_time(model, host, Box::<Monotonic>::default())
    }

    /// The same with a clock of the caller's for what makes vCPUs wait.
    pub fn with_time(model: CpuModel, mut host: HostParams, time: Box<dyn HostTime>) -> Arc<System> {
        silicon::make_tables();
        let model = host.mitigations.model(model);
        let mitigations = Mitigations::new(&model, &host.mitigations);
        host.smt &= !mitigations.selected().nosmt;
        let capabilities = mitigations.hardware().arch_capabilities;
        let bus_locks = match host.split_lock_detect {
            SplitLockDetect::RateLimit(rate) => Some(RateLimit::new(rate, SECOND)),
            _ => None,
        };
        Arc::new(System {
            processors: Arc::new(Processors::new(&model, capabilities, &host)),
            mitigations,
            time,
            split_lock_mitigate: AtomicBool::new(host.split_lock_mitigate),
            bus_locks,
            // The kernel's DEFAULT_RATELIMIT_BURST and _INTERVAL.
            split_lock_messages: RateLimit::new(10, 5 * SECOND),
            notify_window: AtomicU64::new(host.notify_window_us.map_or(NOTIFY_OFF, u64::from)),
            permissions: Permissions::new(model.features().xcr0_mask()),
            model,
            host,
        })
    }

    /// The processors that vCPUs run on.
    pub fn processors(&self) -> &Arc<Processors> {
        &self.processors
    }

    /// What is done about speculation bugs.
    pub fn mitigations(&self) -> &Mitigations {
        &self.mitigations
    }

    /// The clock by which vCPUs are made to wait.
    pub(crate) fn time(&self) -> &dyn HostTime {
        &*self.time
    }

    /// Whether split locks are slowed down in warn mode (sysctl `kernel.split_lock_mitigate`).
    pub fn split_lock_mitigate(&self) -> bool {
        self.split_lock_mitigate.load(Ordering::Relaxed)
    }

    /// Sets the sysctl; it counts from the next split lock on.
    pub fn set_split_lock_mitigate(&self, on: bool) {
        self.split_lock_mitigate.store(on, Ordering::Relaxed);
    }

    /// The limit of `split_lock_detect=ratelimit:N`.
    pub(crate) fn bus_lock_limit(&self) -> Option<&RateLimit> {
        self.bus_locks.as_ref()
    }

    /// Whether a message about a split lock may be printed now.
    pub(crate) fn may_report_split_lock(&self) -> bool {
        self.split_lock_messages.take(self.time.now()).is_ok()
    }

    /// Whether bus locks can be made to exit (VMX bus-lock detection: there since the processors that have BLD).
    pub fn detects_bus_locks(&self) -> bool {
        self.model.has(Feature::BusLockDetect)
    }

    /// IA32_CORE_CAPABILITIES as the guests of this host may have it if their vCPUs are not pinned.
    pub fn core_capabilities(&self) -> u64 {
        split_lock::capabilities(&self.model, &self.host, false)
    }

    /// The processor model.
    pub fn model(&self) -> &CpuModel {
        &self.model
    }

    /// The host kernel's parameters at boot.
    pub fn host(&self) -> &HostParams {
        &self.host
    }

    /// The notify VM exit of VMs yet to be created (`kvm_intel.notify_window_us`).
    pub fn notify_setting(&self) -> notify::Setting {
        if !self.has_notify_exit() {
            return notify::Setting::default();
        }
        notify::Setting::of_parameter(u32::try_from(self.notify_window.load(Ordering::Relaxed)).ok())
    }

    /// Sets the parameter: microseconds, `None` for off. VMs that exist, and vCPUs of theirs yet to be created, keep what
    /// they have. EINVAL for more than the processor's field holds.
    pub fn set_notify_window(&self, microseconds: Option<u32>) -> Result<(), Error> {
        if microseconds.is_some_and(|us| us > notify::LONGEST_WINDOW_US) {
            return Err(Error::Invalid("kvm_intel.notify_window_us"));
        }
        self.notify_window.store(microseconds.map_or(NOTIFY_OFF, u64::from), Ordering::Relaxed);
        Ok(())
    }

    /// Writes `kvm_intel.vmentry_l1d_flush` ([`Mitigations::set_parameter`]).
    pub fn set_vmentry_l1d_flush(&self, parameter: L1dFlush) -> Result<(), Error> {
        self.mitigations.set_parameter(parameter)
    }

    /// Whether the processor has the notify VM exit.
    pub fn has_notify_exit(&self) -> bool {
        self.model.notify_threshold().is_some()
    }

    /// The host kernel's parameters as they are now.
    pub fn parameters(&self) -> HostParams {
        let window = u32::try_from(self.notify_window.load(Ordering::Relaxed)).ok();
        let mitigations =
            CommandLine { l1d_flush: self.mitigations.parameter(), ..self.host.mitigations.clone() };
        HostParams { notify_window_us: window, mitigations, ..self.host.clone() }
    }

    /// vCPUs that run well at the same time (KVM_CAP_NR_VCPUS): one for each processor of the host, but four on any; VMMs
    /// take it as advice, and that many have been tried on two.
    pub fn vcpus_recommended(&self) -> u32 {
        const ANYWHERE: u32 = 4;
        let host = std::thread::available_parallelism().map_or(1, |n| n.get());
        u32::try_from(host).unwrap_or(VCPUS_MAX).clamp(ANYWHERE, VCPUS_MAX)
    }

    /// Permission to use dynamically enabled XSAVE components.
    pub fn permissions(&self) -> &Permissions {
        &self.permissions
    }

    /// Bytes of the XSAVE area of vCPUs that are given all that guests may use now (KVM_CAP_XSAVE2).
    pub fn xsave_size(&self) -> usize {
        crate::vcpu::xstate::xsave_size(self.permissions.guest_xcr0())
    }

    /// KVM_CREATE_VM.
    pub fn create_vm(self: &Arc<System>) -> Result<Arc<Vm>, Error> {
        Vm::new(self.clone())
    }

    /// KVM_GET_SUPPORTED_CPUID: of XSAVE components only those that guests may use now.
    pub fn supported_cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        cpuid::supported(&self.model, &self.host, self.permissions.guest_xcr0())
    }

    /// KVM_GET_EMULATED_CPUID: what a guest may be given although the processor lacks it.
    pub fn emulated_cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        cpuid::emulated(&self.model)
    }

    /// KVM_GET_MSR_INDEX_LIST: the registers that a client saves and restores.
    pub fn msr_index_list(&self) -> Vec<u32> {
        msr::index_list(&self.model, self.core_capabilities())
    }

    /// KVM_GET_MSR_FEATURE_INDEX_LIST.
    pub fn msr_feature_index_list(&self) -> Vec<u32> {
        msr::feature_index_list(self.core_capabilities())
    }

    /// KVM_GET_MSRS on the system: fills in feature registers; how many were read before the first that is none.
    pub fn get_msrs(&self, entries: &mut [kvm_msr_entry]) -> usize {
        for (done, entry) in entries.iter_mut().enumerate() {
            let capabilities = self.mitigations.supported();
            match msr::feature_msr(entry.index, capabilities, self.core_capabilities()) {
                Some(value) => entry.data = value,
                None => return done,
            }
        }
        entries.len()
    }

    /// KVM_X86_GET_MCE_CAP_SUPPORTED: bits of MCG_CAP that KVM_X86_SETUP_MCE takes.
    pub fn mce_capabilities(&self) -> u64 {
        msr::MCE_CAPABILITIES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::VcpuHandle;
    use std::sync::atomic::AtomicU64;

    /// Time as the test says.
    #[derive(Debug, Default)]
    struct Manual(Arc<AtomicU64>);

    impl HostTime for Manual {
        fn now(&self) -> u64 {
            self.0.load(Ordering::SeqCst)
        }
        fn wait(&self, _: u64, _: &VcpuHandle) {}
    }

    /// V1: the feature registers of the system, and what a client may give its guest.
    #[test]
    fn ac_v1_capabilities_are_a_feature_register() {
        for line in ["", "ring3.part=skylake-sp", "ring3.part=ice-lake-sp"] {
            let system = System::new(CpuModel::default(), HostParams::parse(line).unwrap());
            assert!(
                system.msr_feature_index_list().contains(&0x10a) && system.msr_index_list().contains(&0x10a)
            );
            let mut entries = [0x10a, 0x123].map(|index| kvm_msr_entry { index, ..Default::default() });
            assert_eq!(system.get_msrs(&mut entries), 1, "IA32_MCU_OPT_CTRL is none");
            assert_eq!(entries[0].data, system.mitigations().supported(), "{line}");
            assert_eq!(system.create_vm().unwrap().arch_capabilities(), entries[0].data);
        }
    }

    /// Ten in five seconds, of all VMs together.
    #[test]
    fn sl_messages_are_limited() {
        let now = Arc::new(AtomicU64::new(7 * SECOND));
        let time = Box::new(Manual(now.clone()));
        let system = System::with_time(CpuModel::default(), HostParams::default(), time);
        let said = || (0..100).filter(|_| system.may_report_split_lock()).count();
        assert_eq!((said(), said()), (10, 0));
        now.store(12 * SECOND - 1, Ordering::SeqCst);
        assert_eq!(said(), 0);
        now.store(12 * SECOND, Ordering::SeqCst);
        assert_eq!(said(), 10);
    }
}
