//! KVM's policy for model-specific registers: what the guest's RDMSR and WRMSR and the client's KVM_GET_MSRS and
//! KVM_SET_MSRS do for each of them. The table is in [`table`]; this file has what it acts on. (Kernel:
//! `kvm_get_msr_common` and `kvm_set_msr_common` in arch/x86/kvm/x86.c, `vmx_get_msr` and `vmx_set_msr` in
//! arch/x86/kvm/vmx/vmx.c.)

pub(crate) mod async_pf;
mod env;
pub mod filter;
mod mce;
mod mtrr;
pub(crate) mod page_not_present;
mod speculation;
mod table;

use silicon::buffers::Cleared;
use silicon::model::msrs::{Kept, StateMsr, find as find_state};
use silicon::model::{CpuModel, Feature, Features};

use crate::host::HostParams;
use crate::split_lock;
pub use env::CpuEnv;
use kvm_bindings::kvm_x86_mce;
pub use mce::BANKS as MCE_BANKS;
pub use mce::Injected;
use mce::MachineCheck;
pub use mce::SUPPORTED as MCE_CAPABILITIES;
use mtrr::Mtrrs;
pub use speculation::SETTABLE as SETTABLE_ARCH_CAPABILITIES;
use table::{Read, Row, Slot, Write, rows};

/// Why an access is refused: #GP(0) for the guest; the client's call stops there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MsrError {
    /// KVM does not know the register, or does not know it for this access (kernel: KVM_MSR_RET_UNSUPPORTED).
    #[error("MSR {0:#x} is not supported")]
    Unsupported(u32),
    /// The register is known, the access or the value is wrong.
    #[error("MSR {0:#x} refuses the access")]
    Refused(u32),
}

/// What registers act on outside [`MsrState`]: the processor and its local APIC.
pub trait MsrEnv {
    /// What the guest's CPUID enumerates.
    fn features(&self) -> &Features;
    /// The paravirtual features that the guest's CPUID enumerates.
    fn pv_features(&self) -> u32;
    /// Those of ring3's own.
    fn own_features(&self) -> u32;
    /// Whether the local APIC is ours.
    fn has_lapic(&self) -> bool;
    /// IA32_DEBUGCTL.
    fn debugctl(&mut self) -> &mut u64;
    /// The guest has commanded that buffers be cleared.
    fn clear_buffers(&mut self, what: Cleared);
    /// A register of the processor's state.
    fn state_msr(&self, msr: StateMsr) -> u64;
    /// Writes one as the guest (`host`: as the client) may; false: not with this value.
    fn set_state_msr(&mut self, msr: StateMsr, value: u64, host: bool) -> bool;
    /// Moves the guest's time-stamp counter.
    fn shift_tsc(&mut self, by: u64);
    /// IA32_APIC_BASE.
    fn apic_base(&self) -> u64;
    /// Writes IA32_APIC_BASE; false: not with this value.
    fn set_apic_base(&mut self, value: u64, host: bool) -> bool;
    /// Reads an x2APIC register, 0x800 to 0x8ff.
    fn x2apic(&mut self, index: u32) -> Option<u64>;
    /// Writes an x2APIC register; false: refused.
    fn set_x2apic(&mut self, index: u32, value: u64) -> bool;
    /// IA32_TSC_DEADLINE.
    fn tsc_deadline(&self) -> u64;
    /// Writes IA32_TSC_DEADLINE.
    fn set_tsc_deadline(&mut self, value: u64);
}

/// IA32_BIOS_SIGN_ID of a vCPU that nobody gave a microcode revision.
const UCODE_REV: u64 = 1 << 32;
/// IA32_MISC_ENABLE after reset: no BTS, no PEBS.
const MISC_ENABLE_RESET: u64 = MISC_ENABLE_PMU;
/// IA32_MISC_ENABLE bits that tell of the performance unit and cannot be written.
const MISC_ENABLE_PMU: u64 = 1 << 11 | 1 << 12;
/// IA32_MISC_ENABLE.EMON: writes are ignored.
const MISC_ENABLE_EMON: u64 = 1 << 7;
/// IA32_MISC_ENABLE.MWAIT.
pub const MISC_ENABLE_MWAIT: u64 = 1 << 18;
/// MSR_PLATFORM_INFO and MSR_MISC_FEATURES_ENABLES: CPUID faulting.
const PLATFORM_INFO_CPUID_FAULT: u64 = 1 << 31;
const CPUID_FAULT: u64 = 1 << 0;
/// IA32_FEATURE_CONTROL.LOCK.
const FEATURE_CONTROL_LOCKED: u64 = 1 << 0;
/// IA32_FEATURE_CONTROL.LMCE_ENABLED, which MCG_CAP.MCG_LMCE_P gives the guest.
const FEATURE_CONTROL_LMCE: u64 = 1 << 20;
/// IA32_FEATURE_CONTROL bits that the client may set: lock, VMX, SGX, LMCE.
const FEATURE_CONTROL_SUPPORTED: u64 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 17 | 1 << 18 | 1 << 20;

/// The registers that KVM keeps for one vCPU.
#[derive(Clone, Debug)]
pub struct MsrState {
    slots: [u64; Slot::COUNT],
    mtrrs: Mtrrs,
    mce: MachineCheck,
    /// MSR_KVM_SYSTEM_TIME(_NEW) was written, or the TSC moved: the clock page wants an update.
    pub clock_changed: bool,
    /// MSR_KVM_WALL_CLOCK(_NEW) was written: the structure at [`MsrState::wall_clock`] wants to be filled in.
    pub wall_clock_changed: bool,
    ignore_unknown: bool,
    report_ignored: bool,
    core_capabilities_offered: u64,
}

impl MsrState {
    /// A new vCPU's registers, with its VM's IA32_ARCH_CAPABILITIES.
    pub fn new(arch_capabilities: u64, host: &HostParams) -> MsrState {
        let mut state = MsrState {
            slots: [0; Slot::COUNT],
            mtrrs: Mtrrs::default(),
            mce: MachineCheck::default(),
            clock_changed: false,
            wall_clock_changed: false,
            ignore_unknown: host.ignore_msrs,
            report_ignored: host.report_ignored_msrs,
            core_capabilities_offered: 0,
        };
        state.put(Slot::ArchCapabilities, arch_capabilities);
        state.put(Slot::UcodeRevision, UCODE_REV);
        state.put(Slot::PlatformInfo, PLATFORM_INFO_CPUID_FAULT);
        state.put(Slot::PollControl, 1);
        state.reset();
        state
    }

    /// The client has switched KVM_X86_QUIRK_STUFF_FEATURE_MSRS off: it sets the feature registers itself.
    pub fn clear_feature_msrs(&mut self) {
        self.put(Slot::ArchCapabilities, 0);
        self.put(Slot::PlatformInfo, 0);
    }

    /// A new vCPU may have these bits of IA32_CORE_CAPABILITIES, and has them at first.
    pub fn offer_core_capabilities(&mut self, offered: u64) {
        self.core_capabilities_offered = offered;
        self.put(Slot::CoreCapabilities, offered);
    }

    /// MSR_TEST_CTRL as the guest has it; what the processor does is another matter ([`split_lock`]).
    pub fn test_ctrl(&self) -> u64 {
        self.get(Slot::TestControl)
    }

    /// Bits of MSR_TEST_CTRL that the guest can write.
    pub fn test_ctrl_bits(&self) -> u64 {
        split_lock::test_ctrl_bits(self.get(Slot::CoreCapabilities))
    }

    /// RESET (not INIT): the registers that it sets (kernel: `kvm_vcpu_reset`).
    pub fn reset(&mut self) {
        self.init();
        self.put(Slot::MiscEnable, MISC_ENABLE_RESET);
        self.put(Slot::Smbase, 0x3_0000);
        for slot in [
            Slot::MiscFeatures,
            Slot::SpecCtrl,
            Slot::FeatureControl,
            Slot::UmwaitControl,
            Slot::TestControl,
            Slot::TsxControl,
            Slot::McuOptControl,
        ] {
            self.put(slot, 0);
        }
    }

    /// INIT (and RESET): what the guest shares with us is its business no more (kernel: `kvm_vcpu_reset`).
    pub fn init(&mut self) {
        self.put(Slot::SystemTime, 0);
        self.put(Slot::StealTime, 0);
        self.put(Slot::SmiCount, 0);
        self.put(Slot::AsyncPfEnable, 0);
        for slot in [Slot::AsyncPfInterrupt, Slot::PnpVectors, Slot::PnpRing, Slot::PnpData, Slot::PnpRequest]
        {
            self.put(slot, 0);
        }
        self.clock_changed = true;
    }

    /// The value of a register that this structure keeps.
    fn get(&self, slot: Slot) -> u64 {
        self.slots[slot as usize]
    }

    fn put(&mut self, slot: Slot, value: u64) {
        self.slots[slot as usize] = value;
    }

    /// MSR_KVM_SYSTEM_TIME: address of the clock page, bit 0 enables it.
    pub fn system_time(&self) -> u64 {
        self.get(Slot::SystemTime)
    }

    /// MSR_KVM_WALL_CLOCK: address of the wall-clock structure.
    pub fn wall_clock(&self) -> u64 {
        self.get(Slot::WallClock)
    }

    /// MSR_KVM_STEAL_TIME: address of the structure, bit 0 enables it.
    pub fn steal_time(&self) -> u64 {
        self.get(Slot::StealTime)
    }

    /// IA32_SMBASE.
    pub fn smbase(&self) -> u64 {
        self.get(Slot::Smbase)
    }

    /// RSM has found another SMBASE in the state-save area.
    pub fn set_smbase(&mut self, value: u32) {
        self.put(Slot::Smbase, value.into());
    }

    /// MSR_SMI_COUNT: an SMI has been taken.
    pub fn count_smi(&mut self) {
        self.put(Slot::SmiCount, self.get(Slot::SmiCount).wrapping_add(1));
    }

    /// IA32_MISC_ENABLE.
    pub fn misc_enable(&self) -> u64 {
        self.get(Slot::MiscEnable)
    }

    /// CPUID at CPL above 0 gives #GP.
    pub fn cpuid_faulting(&self) -> bool {
        self.get(Slot::MiscFeatures) & CPUID_FAULT != 0
    }

    /// KVM_X86_SETUP_MCE; false: EINVAL.
    pub fn setup_mce(&mut self, mcg_cap: u64) -> bool {
        self.mce.setup(mcg_cap)
    }

    /// KVM_X86_SET_MCE; `None`: EINVAL. `takes_exceptions`: CR4.MCE.
    pub fn inject_mce(&mut self, mce: &kvm_x86_mce, takes_exceptions: bool) -> Option<Injected> {
        self.mce.inject(mce, takes_exceptions)
    }

    /// MCG_CAP.MCG_SER_P.
    pub(crate) fn has_recovery(&self) -> bool {
        self.mce.has_recovery()
    }

    /// MCG_CAP.MCG_CMCI_P.
    pub fn has_cmci(&self) -> bool {
        self.mce.has_cmci()
    }

    /// RDMSR, or KVM_GET_MSRS if `host`.
    pub fn read(&mut self, index: u32, host: bool, env: &mut dyn MsrEnv) -> Result<u64, MsrError> {
        let result = self.read_known(index, host, env);
        match result {
            Err(MsrError::Unsupported(_)) if host && table::advertised(index) => Ok(0),
            Err(MsrError::Unsupported(_)) if self.ignore_unknown => {
                self.report("rdmsr", index, 0);
                Ok(0)
            }
            other => other,
        }
    }

    /// WRMSR, or KVM_SET_MSRS if `host`.
    pub fn write(
        &mut self,
        index: u32,
        value: u64,
        host: bool,
        env: &mut dyn MsrEnv,
    ) -> Result<(), MsrError> {
        let result = self.write_known(index, value, host, env);
        match result {
            Err(MsrError::Unsupported(_)) if host && value == 0 && table::advertised(index) => Ok(()),
            Err(MsrError::Unsupported(_)) if self.ignore_unknown => {
                self.report("wrmsr", index, value);
                Ok(())
            }
            other => other,
        }
    }

    /// The row of `index`, if the guest's CPUID (or the caller being the client) gives access to it.
    fn known(&self, index: u32, host: bool, env: &dyn MsrEnv) -> Result<&'static Row, MsrError> {
        let row = table::find(index).ok_or(MsrError::Unsupported(index))?;
        let not_offered = row.split_lock && self.core_capabilities_offered == 0;
        if not_offered || row.pv.is_some_and(|bit| env.pv_features() & (1 << bit) == 0) {
            return Err(MsrError::Unsupported(index));
        }
        if !host && row.own & !env.own_features() != 0 {
            return Err(MsrError::Unsupported(index));
        }
        if !host && row.feature.is_some_and(|feature| !env.features().has(feature)) {
            return Err(MsrError::Refused(index));
        }
        Ok(row)
    }

    fn report(&self, what: &str, index: u32, value: u64) {
        if self.report_ignored {
            tracing::warn!("ignored {what}: {index:#x} data {value:#x}");
        }
    }

    fn read_known(&self, index: u32, host: bool, env: &mut dyn MsrEnv) -> Result<u64, MsrError> {
        if let Some(msr) = state_msr(index) {
            return match host || guest_has(msr, env) {
                true => Ok(env.state_msr(msr)),
                false => Err(MsrError::Refused(index)),
            };
        }
        let row = self.known(index, host, env)?;
        match row.read {
            Read::No => Err(MsrError::Unsupported(index)),
            Read::Host(_) if !host => Err(MsrError::Refused(index)),
            Read::Host(slot) | Read::Slot(slot) => Ok(self.get(slot)),
            Read::Value(value) => Ok(value),
            Read::Call(read) => read(self, index, host, env).ok_or(MsrError::Refused(index)),
        }
    }

    fn write_known(
        &mut self,
        index: u32,
        value: u64,
        host: bool,
        env: &mut dyn MsrEnv,
    ) -> Result<(), MsrError> {
        let done = |ok: bool| if ok { Ok(()) } else { Err(MsrError::Refused(index)) };
        if let Some(msr) = state_msr(index) {
            if msr == StateMsr::Tsc {
                return done(self.write_tsc(value, host, env));
            }
            return done((host || guest_has(msr, env)) && env.set_state_msr(msr, value, host));
        }
        let row = self.known(index, host, env)?;
        match row.write {
            Write::No => Err(MsrError::Unsupported(index)),
            Write::Ignore => Ok(()),
            Write::Host(_) if !host => Err(MsrError::Refused(index)),
            Write::Host(slot) => {
                self.put(slot, value);
                Ok(())
            }
            Write::HostElseIgnore(slot) => {
                if host {
                    self.put(slot, value);
                }
                Ok(())
            }
            Write::Bits(slot, bits) => {
                if value & !bits == 0 {
                    self.put(slot, value);
                }
                done(value & !bits == 0)
            }
            Write::Call(write) => done(write(self, index, value, host, env)),
        }
    }

    /// The guest's write moves IA32_TSC_ADJUST by as much as the counter (SDM vol. 3B, 18.17.3).
    fn write_tsc(&mut self, value: u64, host: bool, env: &mut dyn MsrEnv) -> bool {
        let by = value.wrapping_sub(env.state_msr(StateMsr::Tsc));
        if !host {
            self.put(Slot::TscAdjust, self.get(Slot::TscAdjust).wrapping_add(by));
        }
        env.shift_tsc(by);
        self.clock_changed = true;
        true
    }
}

/// The part of the processor's state that MSR `index` is.
fn state_msr(index: u32) -> Option<StateMsr> {
    match find_state(index)?.kept {
        Kept::State(msr) => Some(msr),
        Kept::Physical | Kept::Command(_) => None,
    }
}

/// KVM checks the guest's CPUID for these alone.
fn guest_has(msr: StateMsr, env: &dyn MsrEnv) -> bool {
    let features = env.features();
    match msr {
        StateMsr::Xss => features.has(Feature::Xsaves),
        StateMsr::Xfd | StateMsr::XfdErr => features.has(Feature::Xfd),
        StateMsr::TscAux => features.has(Feature::Rdtscp) || features.has(Feature::Rdpid),
        _ => true,
    }
}

/// KVM_GET_MSR_INDEX_LIST: the registers that a client saves and restores, for processors of `model` whose guests may have
/// these bits of IA32_CORE_CAPABILITIES.
pub fn index_list(model: &CpuModel, core_capabilities: u64) -> Vec<u32> {
    let features = model.features();
    let state = silicon::model::msrs::MSRS.iter().filter(|row| {
        let saved = !matches!(row.kept, Kept::State(StateMsr::Efer | StateMsr::FsBase | StateMsr::GsBase));
        saved && matches!(row.kept, Kept::State(_)) && row.enumerated.there(&features, 0)
    });
    let kept = rows().iter().filter(|row| {
        let offered = !row.split_lock || core_capabilities != 0;
        row.listed && offered && row.feature.is_none_or(|f| features.has(f))
    });
    state.map(|row| row.index).chain(kept.flat_map(|row| row.first..=row.last)).collect()
}

/// Whether a vCPU that has run keeps its value of the register (kernel: `kvm_is_immutable_feature_msr`).
pub(crate) fn is_immutable(index: u32) -> bool {
    matches!(index, table::ARCH_CAPABILITIES | table::PERF_CAPABILITIES)
}

/// KVM_GET_MSR_FEATURE_INDEX_LIST.
pub fn feature_index_list(core_capabilities: u64) -> Vec<u32> {
    let mut list = vec![table::UCODE_REV, table::ARCH_CAPABILITIES, table::PERF_CAPABILITIES];
    if core_capabilities != 0 {
        list.push(table::CORE_CAPABILITIES);
    }
    list
}

/// KVM_GET_MSRS on the system: the value that a feature register would have at best.
pub fn feature_msr(index: u32, arch_capabilities: u64, core_capabilities: u64) -> Option<u64> {
    match index {
        table::CORE_CAPABILITIES if core_capabilities != 0 => Some(core_capabilities),
        table::UCODE_REV => Some(UCODE_REV),
        table::ARCH_CAPABILITIES => Some(arch_capabilities),
        table::PERF_CAPABILITIES => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
