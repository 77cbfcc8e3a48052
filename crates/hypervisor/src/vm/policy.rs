//! What KVM_ENABLE_CAP sets for a VM (kernel: `kvm_vm_ioctl_enable_cap` in arch/x86/kvm/x86.c). Most may be set at any
//! time, also while vCPUs run; each is one word that counts from the next event on that it is about.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{
    KVM_BUS_LOCK_DETECTION_EXIT, KVM_BUS_LOCK_DETECTION_OFF, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MSR_EXIT_REASON_VALID_MASK,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, KVM_X86_DISABLE_EXITS_CSTATE,
    KVM_X86_DISABLE_EXITS_HLT, KVM_X86_DISABLE_EXITS_MWAIT, KVM_X86_DISABLE_EXITS_PAUSE,
    KVM_X86_QUIRK_CD_NW_CLEARED, KVM_X86_QUIRK_FIX_HYPERCALL_INSN, KVM_X86_QUIRK_LAPIC_MMIO_HOLE,
    KVM_X86_QUIRK_LINT0_REENABLED, KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT, KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS,
    KVM_X86_QUIRK_OUT_7E_INC_RIP, KVM_X86_QUIRK_SLOT_ZAP_ALL, KVM_X86_QUIRK_STUFF_FEATURE_MSRS,
};

use silicon::bus_lock::core_capabilities;

use super::Vm;
use crate::error::Error;
use crate::host::HostParams;
use crate::irqchip::lapic::Waker;
use crate::mitigations::command_line::L1dFlush;
use crate::notify::Setting;
use crate::split_lock::VmPolicy;

/// Quirks that KVM_CAP_DISABLE_QUIRKS2 switches off.
pub const QUIRKS: u32 = KVM_X86_QUIRK_LINT0_REENABLED
    | KVM_X86_QUIRK_CD_NW_CLEARED
    | KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    | KVM_X86_QUIRK_OUT_7E_INC_RIP
    | KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
    | KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    | KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
    | KVM_X86_QUIRK_SLOT_ZAP_ALL
    | KVM_X86_QUIRK_STUFF_FEATURE_MSRS;
/// What KVM_CAP_X86_DISABLE_EXITS takes.
pub const DISABLE_EXITS: u32 = KVM_X86_DISABLE_EXITS_MWAIT
    | KVM_X86_DISABLE_EXITS_HLT
    | KVM_X86_DISABLE_EXITS_PAUSE
    | KVM_X86_DISABLE_EXITS_CSTATE;
/// What KVM_CAP_X86_BUS_LOCK_EXIT takes, one of both.
pub const BUS_LOCK_EXIT: u32 = KVM_BUS_LOCK_DETECTION_OFF | KVM_BUS_LOCK_DETECTION_EXIT;
/// What KVM_CAP_X2APIC_API takes.
pub const X2APIC_API: u32 = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
/// Hypercalls that KVM_CAP_EXIT_HYPERCALL sends to the client: KVM_HC_MAP_GPA_RANGE alone.
pub const EXIT_HYPERCALLS: u32 = 1 << 12;
/// What KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 takes.
pub const MANUAL_DIRTY_LOG: u32 = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;

/// The settings that vCPUs look at.
#[derive(Debug)]
pub struct Policy {
    disabled_exits: AtomicU32,
    user_space_msrs: AtomicU32,
    exit_hypercalls: AtomicU32,
    exception_payload: AtomicBool,
    triple_fault_event: AtomicBool,
    exit_on_emulation_failure: AtomicBool,
    hide_platform_info: AtomicBool,
    halt_poll_ns: AtomicU32,
    manual_dirty_log: AtomicU64,
    bus_lock_exit: AtomicBool,
    /// [`VmPolicy`] as its bits.
    split_locks: AtomicU32,
    pinned: AtomicBool,
    notify: AtomicU64,
    live_xstate: AtomicBool,
}

impl Policy {
    /// What VMs begin with on `host`.
    pub(super) fn new(host: &HostParams, notify: Setting) -> Policy {
        let split_locks = VmPolicy { policy: host.split_lock_policy, enforced: false };
        Policy {
            bus_lock_exit: AtomicBool::new(false),
            split_locks: AtomicU32::new(split_locks.bits()),
            pinned: AtomicBool::new(false),
            disabled_exits: AtomicU32::new(0),
            user_space_msrs: AtomicU32::new(0),
            exit_hypercalls: AtomicU32::new(0),
            exception_payload: AtomicBool::new(false),
            triple_fault_event: AtomicBool::new(false),
            exit_on_emulation_failure: AtomicBool::new(false),
            hide_platform_info: AtomicBool::new(false),
            halt_poll_ns: AtomicU32::new(0),
            manual_dirty_log: AtomicU64::new(0),
            notify: AtomicU64::new(notify.bits()),
            live_xstate: AtomicBool::new(false),
        }
    }
}

/// `value`, if it has no bits but those of `valid`.
fn bits(value: u64, valid: u32) -> Result<u32, Error> {
    match u32::try_from(value) {
        Ok(value) if value & !valid == 0 => Ok(value),
        _ => Err(Error::Invalid("unknown bits in the first argument of KVM_ENABLE_CAP")),
    }
}

impl Policy {
    /// Saving and restoring carries XSAVE components that IA32_XFD disables.
    pub fn live_xstate(&self) -> bool {
        self.live_xstate.load(Ordering::Relaxed)
    }

    /// The notify VM exit.
    pub fn notify(&self) -> Setting {
        Setting::from_bits(self.notify.load(Ordering::Relaxed)).unwrap_or_default()
    }

    /// The exits that the guest's HLT, MWAIT, PAUSE and C-states do not cause (KVM_X86_DISABLE_EXITS_*).
    pub fn disabled_exits(&self) -> u32 {
        self.disabled_exits.load(Ordering::Relaxed)
    }

    /// Which refused accesses to MSRs go to the client (KVM_MSR_EXIT_REASON_*).
    pub fn user_space_msrs(&self) -> u32 {
        self.user_space_msrs.load(Ordering::Relaxed)
    }

    /// Whether hypercall `number` goes to the client as KVM_EXIT_HYPERCALL.
    pub fn exits_on_hypercall(&self, number: u64) -> bool {
        number < 32 && self.exit_hypercalls.load(Ordering::Relaxed) & 1 << number != 0
    }

    /// KVM_GET_VCPU_EVENTS tells pending exceptions from injected ones, with their payload.
    pub fn exception_payload(&self) -> bool {
        self.exception_payload.load(Ordering::Relaxed)
    }

    /// KVM_GET_VCPU_EVENTS has the triple fault.
    pub fn triple_fault_event(&self) -> bool {
        self.triple_fault_event.load(Ordering::Relaxed)
    }

    /// An instruction that cannot be emulated is the client's business whoever executes it, with its bytes.
    pub fn exits_on_emulation_failure(&self) -> bool {
        self.exit_on_emulation_failure.load(Ordering::Relaxed)
    }

    /// The guest may read MSR_PLATFORM_INFO (KVM_CAP_MSR_PLATFORM_INFO).
    pub fn platform_info(&self) -> bool {
        !self.hide_platform_info.load(Ordering::Relaxed)
    }

    /// How long a halted vCPU may poll before it sleeps, in nanoseconds.
    pub fn halt_poll_ns(&self) -> u32 {
        self.halt_poll_ns.load(Ordering::Relaxed)
    }

    /// Every bus lock ends KVM_RUN (KVM_CAP_X86_BUS_LOCK_EXIT).
    pub fn bus_lock_exit(&self) -> bool {
        self.bus_lock_exit.load(Ordering::Relaxed)
    }

    /// What becomes of split locks (RING3_CAP_SPLIT_LOCK_POLICY).
    pub fn split_locks(&self) -> VmPolicy {
        VmPolicy::from_bits(self.split_locks.load(Ordering::Relaxed).into()).unwrap_or_default()
    }

    /// vCPUs are pinned, no core is shared with another VM (RING3_CAP_PINNED_VCPUS).
    pub fn pinned(&self) -> bool {
        self.pinned.load(Ordering::Relaxed)
    }

    /// KVM_GET_DIRTY_LOG leaves the bits for KVM_CLEAR_DIRTY_LOG to clear.
    pub fn manual_dirty_log(&self) -> bool {
        self.manual_dirty_log.load(Ordering::Relaxed) & u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) != 0
    }

    /// A slot whose writes begin to be logged starts with all pages dirty.
    pub fn dirty_log_initially_set(&self) -> bool {
        self.manual_dirty_log.load(Ordering::Relaxed) & u64::from(KVM_DIRTY_LOG_INITIALLY_SET) != 0
    }
}

/// KVM_ENABLE_CAP. Arguments are those of `kvm_enable_cap`; what is not said to be wrong is taken.
impl Vm {
    /// KVM_CAP_DISABLE_QUIRKS2: EINVAL for quirks that do not exist.
    pub fn disable_quirks2(&self, quirks: u64) -> Result<(), Error> {
        bits(quirks, QUIRKS)?;
        self.disable_quirks(quirks)
    }

    /// KVM_CAP_DISABLE_QUIRKS. Quirks that do not exist are ignored.
    pub fn disable_quirks(&self, quirks: u64) -> Result<(), Error> {
        self.apic_settings().disabled_quirks.fetch_or(quirks & u64::from(QUIRKS), Ordering::Relaxed);
        Ok(())
    }

    /// Whether a quirk (KVM_X86_QUIRK_*) is on.
    pub fn has_quirk(&self, quirk: u32) -> bool {
        self.apic_settings().disabled_quirks.load(Ordering::Relaxed) & u64::from(quirk) == 0
    }

    /// KVM_CAP_X2APIC_API. What has been set stays set.
    pub fn set_x2apic_api(&self, flags: u64) -> Result<(), Error> {
        let flags = bits(flags, X2APIC_API)?;
        let settings = self.apic_settings();
        if flags & KVM_X2APIC_API_USE_32BIT_IDS != 0 {
            settings.x2apic_format.store(true, Ordering::Relaxed);
        }
        if flags & KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK != 0 {
            settings.broadcast_quirk_disabled.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// KVM_CAP_X86_DISABLE_EXITS. What has been set stays set.
    pub fn disable_exits(&self, exits: u64) -> Result<(), Error> {
        self.policy().disabled_exits.fetch_or(bits(exits, DISABLE_EXITS)?, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_CAP_MSR_PLATFORM_INFO.
    pub fn show_platform_info(&self, show: u64) -> Result<(), Error> {
        self.policy().hide_platform_info.store(show == 0, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_CAP_EXCEPTION_PAYLOAD.
    pub fn set_exception_payload(&self, on: u64) -> Result<(), Error> {
        self.policy().exception_payload.store(on != 0, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_CAP_X86_TRIPLE_FAULT_EVENT.
    pub fn set_triple_fault_event(&self, on: u64) -> Result<(), Error> {
        self.policy().triple_fault_event.store(on != 0, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_CAP_X86_USER_SPACE_MSR.
    pub fn set_user_space_msrs(&self, reasons: u64) -> Result<(), Error> {
        let reasons = bits(reasons, KVM_MSR_EXIT_REASON_VALID_MASK)?;
        self.policy().user_space_msrs.store(reasons, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_CAP_EXIT_HYPERCALL.
    pub fn set_exit_hypercalls(&self, hypercalls: u64) -> Result<(), Error> {
        self.policy().exit_hypercalls.store(bits(hypercalls, EXIT_HYPERCALLS)?, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_CAP_EXIT_ON_EMULATION_FAILURE.
    pub fn set_exit_on_emulation_failure(&self, on: u64) -> Result<(), Error> {
        self.policy().exit_on_emulation_failure.store(bits(on, 1)? != 0, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_CAP_HALT_POLL: 32 bits of nanoseconds.
    pub fn set_halt_poll(&self, nanoseconds: u64) -> Result<(), Error> {
        self.policy().halt_poll_ns.store(bits(nanoseconds, u32::MAX)?, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    pub fn set_manual_dirty_log(&self, flags: u64) -> Result<(), Error> {
        let enabled = flags & u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) != 0;
        let flags = bits(flags, if enabled { MANUAL_DIRTY_LOG } else { 0 })?;
        self.policy().manual_dirty_log.store(flags.into(), Ordering::Relaxed);
        Ok(())
    }

    /// KVM_CAP_X86_BUS_LOCK_EXIT: one of OFF and EXIT, from the next entry to the guest on. EINVAL for both, for neither, and
    /// for EXIT where the processor cannot tell (the kernel takes it without a word and never exits).
    pub fn set_bus_lock_exit(&self, mode: u64) -> Result<(), Error> {
        let on = match bits(mode, BUS_LOCK_EXIT)? {
            KVM_BUS_LOCK_DETECTION_OFF => false,
            KVM_BUS_LOCK_DETECTION_EXIT if self.system().detects_bus_locks() => true,
            _ => return Err(Error::Invalid("not one mode of bus-lock detection that there is")),
        };
        self.policy().bus_lock_exit.store(on, Ordering::Relaxed);
        Ok(())
    }

    /// RING3_CAP_LIVE_XSTATE: 1 for on, 0 for off; it counts from the next KVM_GET_XSAVE2 or KVM_SET_XSAVE on.
    pub fn set_live_xstate(&self, on: u64) -> Result<(), Error> {
        self.policy().live_xstate.store(bits(on, 1)? != 0, Ordering::Relaxed);
        Ok(())
    }

    /// RING3_CAP_SPLIT_LOCK_POLICY ([`VmPolicy`]); it counts from the next split lock on. EINVAL to enforce what the host does
    /// not detect, or cannot for one VM alone.
    pub fn set_split_lock_policy(&self, policy: u64) -> Result<(), Error> {
        let policy = VmPolicy::from_bits(policy)?;
        if policy.enforced && self.core_capabilities() & core_capabilities::SPLIT_LOCK_DETECT == 0 {
            return Err(Error::Invalid("split locks are not detected for this VM"));
        }
        self.policy().split_locks.store(policy.bits(), Ordering::Relaxed);
        Ok(())
    }

    /// RING3_CAP_SPLIT_LOCK_MITIGATE: the sysctl, for all VMs of the host.
    pub fn set_split_lock_mitigate(&self, on: u64) -> Result<(), Error> {
        self.system().set_split_lock_mitigate(bits(on, 1)? != 0);
        Ok(())
    }

    /// RING3_CAP_VMENTRY_L1D_FLUSH: the module parameter ([`System::set_vmentry_l1d_flush`](crate::System)).
    pub fn set_vmentry_l1d_flush(&self, value: u64) -> Result<(), Error> {
        const VALUES: [L1dFlush; 4] = [L1dFlush::Auto, L1dFlush::Never, L1dFlush::Cond, L1dFlush::Always];
        let parameter = usize::try_from(value).ok().and_then(|value| VALUES.get(value));
        self.system().set_vmentry_l1d_flush(*parameter.ok_or(Error::Invalid("kvm_intel.vmentry_l1d_flush"))?)
    }

    /// RING3_CAP_PINNED_VCPUS: the client declares that each vCPU stays on one thread of the host, and that the other threads
    /// of its core run vCPUs of this VM only. EINVAL after the first vCPU.
    pub fn declare_pinned(&self, pinned: u64) -> Result<(), Error> {
        let pinned = bits(pinned, 1)? != 0;
        let setup = self.setup();
        if !setup.vcpus.is_empty() {
            return Err(Error::Invalid("vCPUs exist already"));
        }
        self.policy().pinned.store(pinned, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_CAP_X86_NOTIFY_VMEXIT: EINVAL without the flag that enables it, on processors that have no such exit, and once
    /// there are vCPUs. The window is in ticks of the crystal.
    pub fn set_notify_vmexit(&self, bits: u64) -> Result<(), Error> {
        if !Setting::from_bits(bits)?.enabled {
            return Err(Error::Invalid(
                "the notify VM exit cannot be switched off by KVM_CAP_X86_NOTIFY_VMEXIT",
            ));
        }
        let setup = self.setup();
        if !setup.vcpus.is_empty() {
            return Err(Error::Invalid("vCPUs exist already"));
        }
        self.store_notify(bits)
    }

    /// The same at any time, also off; each vCPU has it from its next entry on, which comes at once.
    pub fn set_notify(&self, bits: u64) -> Result<(), Error> {
        Setting::from_bits(bits)?;
        self.store_notify(bits)?;
        self.vcpus().iter().for_each(|vcpu| vcpu.kick());
        Ok(())
    }

    fn store_notify(&self, bits: u64) -> Result<(), Error> {
        if Setting::from_bits(bits)?.enabled && !self.system().has_notify_exit() {
            return Err(Error::Invalid("the processor has no notify VM exit"));
        }
        self.policy().notify.store(bits, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_CAP_X86_APIC_BUS_CYCLES_NS: ENXIO without in-kernel APICs, EINVAL after the first vCPU or for a value that
    /// makes the longest timer overflow 64 bits.
    pub fn set_apic_bus_cycles(&self, nanoseconds: u64) -> Result<(), Error> {
        // The largest initial count, divided by the largest divider.
        let longest = u64::from(u32::MAX) * 128;
        if nanoseconds == 0 || longest.checked_mul(nanoseconds).is_none() {
            return Err(Error::Invalid("nanoseconds of an APIC bus cycle"));
        }
        let setup = self.setup();
        if self.irqchip().is_none() {
            return Err(Error::Missing("the local APICs (KVM_CREATE_IRQCHIP)"));
        }
        if !setup.vcpus.is_empty() {
            return Err(Error::Invalid("vCPUs exist already"));
        }
        self.apic_settings().bus_cycle_ns.store(nanoseconds, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::System;
    use silicon::model::CpuModel;

    fn vm() -> std::sync::Arc<Vm> {
        System::new(CpuModel::default(), HostParams::default()).create_vm().unwrap()
    }

    #[test]
    fn bits_that_do_not_exist_are_einval() {
        let calls: &[(&str, fn(&Vm, u64) -> Result<(), Error>, u64, u64)] = &[
            ("quirks2", Vm::disable_quirks2, QUIRKS.into(), 1 << 20),
            ("x2apic", Vm::set_x2apic_api, 3, 4),
            ("exits", Vm::disable_exits, 15, 16),
            ("exits, upper half", Vm::disable_exits, 1, 1 << 32),
            ("MSRs", Vm::set_user_space_msrs, 7, 8),
            ("hypercalls", Vm::set_exit_hypercalls, 1 << 12, 1 << 11),
            ("emulation", Vm::set_exit_on_emulation_failure, 1, 2),
            ("halt poll", Vm::set_halt_poll, u32::MAX.into(), 1 << 32),
            ("dirty log", Vm::set_manual_dirty_log, 3, 4),
            ("bus locks", Vm::set_bus_lock_exit, 2, 3),
            ("bus locks, neither", Vm::set_bus_lock_exit, 1, 0),
            ("split locks", Vm::set_split_lock_policy, 0x110, 0x18),
            ("pinned", Vm::declare_pinned, 1, 2),
            ("live state", Vm::set_live_xstate, 1, 2),
            ("dirty log, initially set alone", Vm::set_manual_dirty_log, 0, 2),
        ];
        for (name, call, good, bad) in calls {
            let vm = vm();
            assert!(call(&vm, *good).is_ok(), "{name}");
            assert_eq!(call(&vm, *bad).map_err(|e| e.errno()), Err(libc::EINVAL), "{name}");
        }
    }

    #[test]
    fn quirks_stay_off() {
        let vm = vm();
        vm.disable_quirks(u64::MAX << 32 | 1).unwrap();
        vm.disable_quirks2(2).unwrap();
        assert!(!vm.has_quirk(1) && !vm.has_quirk(2) && vm.has_quirk(4));
    }

    #[test]
    fn the_bus_clock_is_set_between_irqchip_and_vcpus() {
        let vm = vm();
        let set = |ns| vm.set_apic_bus_cycles(ns).map_err(|e| e.errno());
        assert_eq!(set(0), Err(libc::EINVAL));
        assert_eq!(set(u64::MAX), Err(libc::EINVAL));
        assert_eq!(set(10), Err(libc::ENXIO));
        vm.create_irqchip().unwrap();
        assert_eq!(set(10), Ok(()));
        let _vcpu = vm.create_vcpu(0).unwrap();
        assert_eq!(set(20), Err(libc::EINVAL));
    }
}
