//! Capabilities: what KVM_CHECK_EXTENSION answers and what KVM_ENABLE_CAP does, one row each (kernel:
//! `kvm_vm_ioctl_check_extension_generic`, `kvm_vm_ioctl_check_extension`, `kvm_vm_ioctl_enable_cap`).
//!
//! A capability is listed when all of it works; what is not listed answers 0 and cannot be enabled.

use hypervisor::cpuid::own;
use hypervisor::dirty_ring::BYTES_MAX;
use hypervisor::msr::MCE_BANKS;
use hypervisor::notify::Setting;
use hypervisor::routing::MAX_ROUTES;
use hypervisor::split_lock::VmPolicy;
use hypervisor::system::{VCPU_IDS_MAX, VCPUS_MAX};
use hypervisor::vcpu::GUEST_DEBUG_FLAGS;
use hypervisor::vm::clock::CLOCK_FLAGS;
use hypervisor::vm::policy::{
    BUS_LOCK_EXIT, DISABLE_EXITS, EXIT_HYPERCALLS, MANUAL_DIRTY_LOG, QUIRKS, X2APIC_API,
};
use hypervisor::{Error, System, Vm};
use kvm_bindings::*;

use crate::coalesced::RING_PAGE;
use crate::error::Errno;
use crate::ring3::{
    RING3_CAP_LIVE_XSTATE, RING3_CAP_NOTIFY, RING3_CAP_NOTIFY_WINDOW, RING3_CAP_PAGE_NOT_PRESENT,
    RING3_CAP_PINNED_VCPUS, RING3_CAP_SPLIT_LOCK_MITIGATE, RING3_CAP_SPLIT_LOCK_POLICY,
    RING3_CAP_VMENTRY_L1D_FLUSH, RING3_NOTIFY_THERE, RING3_THERE,
};
use crate::run::SYNC_REGS;

/// What KVM_CHECK_EXTENSION answers.
#[derive(Clone, Copy)]
pub enum Answer {
    /// Always this.
    Value(u32),
    /// It depends on the machine.
    Of(fn(&System) -> u32),
    /// It depends on the machine and, on the descriptor of one, on the VM.
    OfVm(fn(&System, Option<&Vm>) -> u32),
}

/// What KVM_ENABLE_CAP does with the first argument.
type Enable = fn(&Vm, u64) -> Result<(), Error>;

/// One capability.
#[derive(Clone, Copy)]
pub struct Capability {
    /// The kernel's name, less `KVM_CAP_`.
    pub name: &'static str,
    /// Its number.
    pub number: u32,
    /// What KVM_CHECK_EXTENSION answers.
    pub answer: Answer,
    /// What KVM_ENABLE_CAP on a VM does; `None`: there is nothing to enable (EINVAL).
    pub enable: Option<Enable>,
}

impl Capability {
    /// The answer on the system's descriptor, or on that of `vm`.
    pub fn check(&self, system: &System, vm: Option<&Vm>) -> u32 {
        match self.answer {
            Answer::Value(value) => value,
            Answer::Of(answer) => answer(system),
            Answer::OfVm(answer) => answer(system, vm),
        }
    }
}

macro_rules! capabilities {
    ($($name:ident $number:ident $answer:expr $(, enable $enable:expr)?;)*) => {
        /// Every capability that there is.
        pub static CAPABILITIES: &[Capability] = &[$(Capability {
            name: stringify!($name),
            number: $number,
            answer: $answer,
            enable: capabilities!(@ $($enable)?),
        }),*];
    };
    (@) => { None };
    (@ $enable:expr) => { Some($enable) };
}

use Answer::{Of, OfVm, Value};

capabilities! {
    // The system and its VMs.
    USER_MEMORY               KVM_CAP_USER_MEMORY                 Value(1);
    USER_MEMORY2              KVM_CAP_USER_MEMORY2                Value(1);
    NR_MEMSLOTS               KVM_CAP_NR_MEMSLOTS                 Value(hypervisor::memory::SLOTS_MAX);
    MULTI_ADDRESS_SPACE       KVM_CAP_MULTI_ADDRESS_SPACE         Value(hypervisor::memory::ADDRESS_SPACES);
    READONLY_MEM              KVM_CAP_READONLY_MEM                Value(1);
    SYNC_MMU                  KVM_CAP_SYNC_MMU                    Value(1);
    DESTROY_MEMORY_REGION_WORKS KVM_CAP_DESTROY_MEMORY_REGION_WORKS Value(1);
    JOIN_MEMORY_REGIONS_WORKS KVM_CAP_JOIN_MEMORY_REGIONS_WORKS   Value(1);
    MMU_SHADOW_CACHE_CONTROL  KVM_CAP_MMU_SHADOW_CACHE_CONTROL    Value(1);
    MANUAL_DIRTY_LOG_PROTECT2 KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2   Value(MANUAL_DIRTY_LOG), enable Vm::set_manual_dirty_log;
    DIRTY_LOG_RING            KVM_CAP_DIRTY_LOG_RING              Value(BYTES_MAX), enable Vm::set_dirty_ring;
    DIRTY_LOG_RING_ACQ_REL    KVM_CAP_DIRTY_LOG_RING_ACQ_REL      Value(BYTES_MAX), enable Vm::set_dirty_ring;
    PRE_FAULT_MEMORY          KVM_CAP_PRE_FAULT_MEMORY            Value(1);
    MEMORY_FAULT_INFO         KVM_CAP_MEMORY_FAULT_INFO           Value(1);
    SET_TSS_ADDR              KVM_CAP_SET_TSS_ADDR                Value(1);
    SET_IDENTITY_MAP_ADDR     KVM_CAP_SET_IDENTITY_MAP_ADDR       Value(1);
    COALESCED_MMIO            KVM_CAP_COALESCED_MMIO              Value(RING_PAGE);
    COALESCED_PIO             KVM_CAP_COALESCED_PIO               Value(1);
    IOEVENTFD                 KVM_CAP_IOEVENTFD                   Value(1);
    IOEVENTFD_NO_LENGTH       KVM_CAP_IOEVENTFD_NO_LENGTH         Value(1);
    IOEVENTFD_ANY_LENGTH      KVM_CAP_IOEVENTFD_ANY_LENGTH        Value(1);
    CHECK_EXTENSION_VM        KVM_CAP_CHECK_EXTENSION_VM          Value(1);
    ENABLE_CAP                KVM_CAP_ENABLE_CAP                  Value(1);
    ENABLE_CAP_VM             KVM_CAP_ENABLE_CAP_VM               Value(1);
    SYS_ATTRIBUTES            KVM_CAP_SYS_ATTRIBUTES              Value(1);
    VM_TYPES                  KVM_CAP_VM_TYPES                    Value(1 << KVM_X86_DEFAULT_VM);
    PCI_SEGMENT               KVM_CAP_PCI_SEGMENT                 Value(1);
    NOP_IO_DELAY              KVM_CAP_NOP_IO_DELAY                Value(1);
    BINARY_STATS_FD           KVM_CAP_BINARY_STATS_FD             Value(1);
    // KVM_CREATE_DEVICE is there, though no device is (the kernel has one type, VFIO, by configuration).
    DEVICE_CTRL               KVM_CAP_DEVICE_CTRL                 Value(1);
    LAST_CPU                  KVM_CAP_LAST_CPU                    Value(1);

    // vCPUs.
    NR_VCPUS                  KVM_CAP_NR_VCPUS                    Of(System::vcpus_recommended);
    MAX_VCPUS                 KVM_CAP_MAX_VCPUS                   Value(VCPUS_MAX);
    MAX_VCPU_ID               KVM_CAP_MAX_VCPU_ID                 Value(VCPU_IDS_MAX), enable Vm::set_vcpu_ids_max;
    SET_BOOT_CPU_ID           KVM_CAP_SET_BOOT_CPU_ID             Value(1);
    MP_STATE                  KVM_CAP_MP_STATE                    Value(1);
    HLT                       KVM_CAP_HLT                         Value(1);
    USER_NMI                  KVM_CAP_USER_NMI                    Value(1);
    X86_SMM                   KVM_CAP_X86_SMM                     Value(1);
    VAPIC                     KVM_CAP_VAPIC                       Value(1);
    VCPU_EVENTS               KVM_CAP_VCPU_EVENTS                 Value(1);
    VCPU_ATTRIBUTES           KVM_CAP_VCPU_ATTRIBUTES             Value(1);
    SYNC_REGS                 KVM_CAP_SYNC_REGS                   Value(SYNC_REGS);
    SET_GUEST_DEBUG           KVM_CAP_SET_GUEST_DEBUG             Value(1);
    SET_GUEST_DEBUG2          KVM_CAP_SET_GUEST_DEBUG2            Value(GUEST_DEBUG_FLAGS);
    X86_ROBUST_SINGLESTEP     KVM_CAP_X86_ROBUST_SINGLESTEP       Value(1);
    INTERNAL_ERROR_DATA       KVM_CAP_INTERNAL_ERROR_DATA         Value(1);
    DEBUGREGS                 KVM_CAP_DEBUGREGS                   Value(1);
    SREGS2                    KVM_CAP_SREGS2                      Value(1);
    XSAVE                     KVM_CAP_XSAVE                       Value(1);
    XSAVE2                    KVM_CAP_XSAVE2                      Of(|system| system.xsave_size() as u32);
    XCRS                      KVM_CAP_XCRS                        Value(1);
    X86_GUEST_MODE            KVM_CAP_X86_GUEST_MODE              Value(1);
    IMMEDIATE_EXIT            KVM_CAP_IMMEDIATE_EXIT              Value(1);
    HALT_POLL                 KVM_CAP_HALT_POLL                   Value(1), enable Vm::set_halt_poll;
    X86_DISABLE_EXITS         KVM_CAP_X86_DISABLE_EXITS           Value(DISABLE_EXITS), enable Vm::disable_exits;
    EXCEPTION_PAYLOAD         KVM_CAP_EXCEPTION_PAYLOAD           Value(1), enable Vm::set_exception_payload;
    X86_TRIPLE_FAULT_EVENT    KVM_CAP_X86_TRIPLE_FAULT_EVENT      Value(1), enable Vm::set_triple_fault_event;
    EXIT_ON_EMULATION_FAILURE KVM_CAP_EXIT_ON_EMULATION_FAILURE   Value(1), enable Vm::set_exit_on_emulation_failure;
    EXIT_HYPERCALL            KVM_CAP_EXIT_HYPERCALL              Value(EXIT_HYPERCALLS), enable Vm::set_exit_hypercalls;
    X86_BUS_LOCK_EXIT         KVM_CAP_X86_BUS_LOCK_EXIT           Of(bus_lock_exit), enable Vm::set_bus_lock_exit;
    X86_NOTIFY_VMEXIT         KVM_CAP_X86_NOTIFY_VMEXIT           Of(|system| system.has_notify_exit().into()), enable Vm::set_notify_vmexit;
    DISABLE_QUIRKS            KVM_CAP_DISABLE_QUIRKS              Value(1), enable Vm::disable_quirks;
    DISABLE_QUIRKS2           KVM_CAP_DISABLE_QUIRKS2             Value(QUIRKS), enable Vm::disable_quirks2;

    // CPUID and MSRs.
    EXT_CPUID                 KVM_CAP_EXT_CPUID                   Value(1);
    EXT_EMUL_CPUID            KVM_CAP_EXT_EMUL_CPUID              Value(1);
    GET_MSR_FEATURES          KVM_CAP_GET_MSR_FEATURES            Value(1);
    MCE                       KVM_CAP_MCE                         Value(MCE_BANKS as u32);
    MSR_PLATFORM_INFO         KVM_CAP_MSR_PLATFORM_INFO           Value(1), enable Vm::show_platform_info;
    X86_MSR_FILTER            KVM_CAP_X86_MSR_FILTER              Value(1);
    X86_USER_SPACE_MSR        KVM_CAP_X86_USER_SPACE_MSR          Value(1), enable Vm::set_user_space_msrs;

    // Interrupt controllers.
    IRQCHIP                   KVM_CAP_IRQCHIP                     Value(1);
    SPLIT_IRQCHIP             KVM_CAP_SPLIT_IRQCHIP               Value(1), enable Vm::split_irqchip;
    X2APIC_API                KVM_CAP_X2APIC_API                  Value(X2APIC_API), enable Vm::set_x2apic_api;
    X86_APIC_BUS_CYCLES_NS    KVM_CAP_X86_APIC_BUS_CYCLES_NS      Value(1), enable Vm::set_apic_bus_cycles;
    IOAPIC_POLARITY_IGNORED   KVM_CAP_IOAPIC_POLARITY_IGNORED     Value(1);
    IRQ_ROUTING               KVM_CAP_IRQ_ROUTING                 Value(MAX_ROUTES);
    IRQ_INJECT_STATUS         KVM_CAP_IRQ_INJECT_STATUS           Value(1);
    SIGNAL_MSI                KVM_CAP_SIGNAL_MSI                  Value(1);
    IRQFD                     KVM_CAP_IRQFD                       Value(1);
    IRQFD_RESAMPLE            KVM_CAP_IRQFD_RESAMPLE              Value(1);
    TSC_DEADLINE_TIMER        KVM_CAP_TSC_DEADLINE_TIMER          Value(1);
    PIT                       KVM_CAP_PIT                         Value(1);
    PIT2                      KVM_CAP_PIT2                        Value(1);
    PIT_STATE2                KVM_CAP_PIT_STATE2                  Value(1);
    REINJECT_CONTROL          KVM_CAP_REINJECT_CONTROL            Value(1);

    // Clocks.
    CLOCKSOURCE               KVM_CAP_CLOCKSOURCE                 Value(1);
    ADJUST_CLOCK              KVM_CAP_ADJUST_CLOCK                Value(CLOCK_FLAGS);
    GET_TSC_KHZ               KVM_CAP_GET_TSC_KHZ                 Value(1);
    TSC_CONTROL               KVM_CAP_TSC_CONTROL                 Value(1);
    VM_TSC_CONTROL            KVM_CAP_VM_TSC_CONTROL              Value(1);
    KVMCLOCK_CTRL             KVM_CAP_KVMCLOCK_CTRL               Value(1);
    ASYNC_PF                  KVM_CAP_ASYNC_PF                    Value(1);
    ASYNC_PF_INT              KVM_CAP_ASYNC_PF_INT                Value(1);
    STEAL_TIME                KVM_CAP_STEAL_TIME                  Value(1);
    ENFORCE_PV_FEATURE_CPUID  KVM_CAP_ENFORCE_PV_FEATURE_CPUID    Value(1);

    // ring3's own.
    RING3_SPLIT_LOCK_POLICY   RING3_CAP_SPLIT_LOCK_POLICY         Value(VmPolicy::BITS), enable Vm::set_split_lock_policy;
    RING3_PINNED_VCPUS        RING3_CAP_PINNED_VCPUS              Value(1), enable Vm::declare_pinned;
    RING3_NOTIFY              RING3_CAP_NOTIFY                    OfVm(notify), enable Vm::set_notify;
    RING3_NOTIFY_WINDOW       RING3_CAP_NOTIFY_WINDOW             OfVm(notify_window);
    RING3_LIVE_XSTATE         RING3_CAP_LIVE_XSTATE               Value(1), enable Vm::set_live_xstate;
    RING3_SPLIT_LOCK_MITIGATE RING3_CAP_SPLIT_LOCK_MITIGATE       OfVm(mitigate), enable Vm::set_split_lock_mitigate;
    RING3_VMENTRY_L1D_FLUSH   RING3_CAP_VMENTRY_L1D_FLUSH         OfVm(l1d_flush), enable Vm::set_vmentry_l1d_flush;
    RING3_PAGE_NOT_PRESENT    RING3_CAP_PAGE_NOT_PRESENT          Value(own::VERSION);
}

/// The modes of bus-lock detection, where there is any.
fn bus_lock_exit(system: &System) -> u32 {
    if system.detects_bus_locks() { BUS_LOCK_EXIT } else { 0 }
}

/// A VM's setting, or that of new ones.
fn notify_setting(system: &System, vm: Option<&Vm>) -> Setting {
    vm.map_or_else(|| system.notify_setting(), |vm| vm.policy().notify())
}

fn notify(system: &System, vm: Option<&Vm>) -> u32 {
    RING3_NOTIFY_THERE | notify_setting(system, vm).flags()
}

fn notify_window(system: &System, vm: Option<&Vm>) -> u32 {
    notify_setting(system, vm).window
}

fn mitigate(system: &System, _: Option<&Vm>) -> u32 {
    RING3_THERE | u32::from(system.split_lock_mitigate())
}

fn l1d_flush(system: &System, _: Option<&Vm>) -> u32 {
    RING3_THERE | system.mitigations().parameter() as u32
}

fn find(number: u64) -> Option<&'static Capability> {
    CAPABILITIES.iter().find(|row| u64::from(row.number) == number)
}

/// KVM_CHECK_EXTENSION on the system, or on `vm`.
pub fn check_extension(system: &System, vm: Option<&Vm>, number: u64) -> i32 {
    find(number).map_or(0, |row| row.check(system, vm) as i32)
}

/// KVM_ENABLE_CAP on a VM.
///
/// # Errors
///
/// EINVAL for a capability that cannot be enabled, and for flags; else what the capability says.
pub fn enable(vm: &Vm, request: &kvm_enable_cap) -> Result<(), Errno> {
    let enable = find(request.cap.into()).and_then(|row| row.enable);
    match enable {
        Some(enable) if request.flags == 0 => Ok(enable(vm, request.args[0])?),
        _ => Err(Errno::INVALID),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypervisor::HostParams;
    use silicon::model::CpuModel;

    fn request(cap: u32, flags: u32, argument: u64) -> kvm_enable_cap {
        kvm_enable_cap { cap, flags, args: [argument, 0, 0, 0], ..Default::default() }
    }

    #[test]
    fn unknown_capabilities_answer_zero() {
        let system = System::new(CpuModel::default(), HostParams::default());
        let check = |number| check_extension(&system, None, number);
        assert_eq!(check(u64::MAX), 0);
        assert_eq!(check(1 << 32 | u64::from(KVM_CAP_USER_MEMORY)), 0);
        assert_eq!(check(KVM_CAP_USER_MEMORY.into()), 1);
        assert_eq!(check(KVM_CAP_NR_MEMSLOTS.into()), 32764);
        assert_eq!(check(KVM_CAP_MAX_VCPU_ID.into()), 4096);
    }

    /// G8: the kernel takes EXIT on processors that cannot do it, and has no way back from it.
    #[test]
    fn bus_lock_exits_are_honest() {
        let on = |model: &str, mode| {
            let system = System::new(CpuModel::parse(model).unwrap(), HostParams::default());
            let vm = system.create_vm().unwrap();
            let result = enable(&vm, &request(KVM_CAP_X86_BUS_LOCK_EXIT, 0, mode));
            let checked = check_extension(&system, Some(&vm), KVM_CAP_X86_BUS_LOCK_EXIT.into());
            (checked, result, vm)
        };
        for mode in [0, 3, 4, 7, 1 << 32 | 2, u64::MAX] {
            assert_eq!(on("sapphire-rapids", mode).1, Err(Errno::INVALID), "{mode}");
        }
        let (checked, result, vm) = on("sapphire-rapids", 2);
        assert_eq!((checked, result, vm.policy().bus_lock_exit()), (3, Ok(()), true));
        enable(&vm, &request(KVM_CAP_X86_BUS_LOCK_EXIT, 0, 1)).unwrap();
        assert!(!vm.policy().bus_lock_exit(), "and off again");
        let (checked, result, _) = on("nehalem", 2);
        assert_eq!((checked, result), (0, Err(Errno::INVALID)));
        assert_eq!(on("nehalem", 1).1, Ok(()), "there is nothing to switch off");
    }

    #[test]
    fn split_lock_policies_are_set_for_one_vm() {
        let system = System::new(CpuModel::default(), HostParams::default());
        let (vm, other) = (system.create_vm().unwrap(), system.create_vm().unwrap());
        let set = |value| enable(&vm, &request(RING3_CAP_SPLIT_LOCK_POLICY, 0, value));
        assert_eq!(check_extension(&system, None, RING3_CAP_SPLIT_LOCK_POLICY.into()), 0x11f);
        for value in [0, 3, 0x100, 1 << 9 | 1, 1 << 32 | 1] {
            assert_eq!(set(value), Err(Errno::INVALID), "{value:#x}");
        }
        for value in [0x1, 0x2, 0x4, 0x8, 0x10, 0x110] {
            assert_eq!((set(value), u64::from(vm.policy().split_locks().bits())), (Ok(()), value));
        }
        assert_eq!(other.policy().split_locks().bits(), 1);
        let off = HostParams::parse("split_lock_detect=off").unwrap();
        let vm = System::new(CpuModel::default(), off).create_vm().unwrap();
        let forced = enable(&vm, &request(RING3_CAP_SPLIT_LOCK_POLICY, 0, 0x101));
        assert_eq!(forced, Err(Errno::INVALID), "nothing detects them");
    }

    /// Parameters of the host that can be written while VMs run.
    #[test]
    fn parameters_of_the_host_are_set_for_all_vms() {
        let host = HostParams::parse("ring3.part=skylake-sp ring3.l1d_flush_promise=refuse").unwrap();
        let system = System::new(CpuModel::default(), host);
        let read = |cap: u32| check_extension(&system, None, cap.into()) as u32;
        let vm = system.create_vm().unwrap();
        let set = |cap, value| enable(&vm, &request(cap, 0, value));
        assert_eq!(read(RING3_CAP_SPLIT_LOCK_MITIGATE), RING3_THERE | 1);
        set(RING3_CAP_SPLIT_LOCK_MITIGATE, 0).unwrap();
        assert!(!system.split_lock_mitigate() && read(RING3_CAP_SPLIT_LOCK_MITIGATE) == RING3_THERE);
        assert_eq!(set(RING3_CAP_SPLIT_LOCK_MITIGATE, 2), Err(Errno::INVALID));
        set(RING3_CAP_VMENTRY_L1D_FLUSH, 3).unwrap();
        assert_eq!(read(RING3_CAP_VMENTRY_L1D_FLUSH), RING3_THERE | 3);
        assert_eq!(set(RING3_CAP_VMENTRY_L1D_FLUSH, 1), Err(Errno(libc::EBUSY)), "this VM relies on it");
        assert_eq!(set(RING3_CAP_VMENTRY_L1D_FLUSH, 4), Err(Errno::INVALID));
        assert_eq!(read(RING3_CAP_VMENTRY_L1D_FLUSH), RING3_THERE | 3);
    }

    #[test]
    fn vcpus_are_declared_pinned_before_there_are_any() {
        let system = System::new(CpuModel::default(), HostParams::parse("smt=on").unwrap());
        let vm = system.create_vm().unwrap();
        assert_eq!(vm.core_capabilities(), 0);
        enable(&vm, &request(RING3_CAP_PINNED_VCPUS, 0, 1)).unwrap();
        assert_eq!(vm.core_capabilities(), 0x30);
        let _vcpu = vm.create_vcpu(0).unwrap();
        assert_eq!(enable(&vm, &request(RING3_CAP_PINNED_VCPUS, 0, 0)), Err(Errno::INVALID));
    }

    #[test]
    fn every_capability_stands_once() {
        for (i, a) in CAPABILITIES.iter().enumerate() {
            assert!(!CAPABILITIES[i + 1..].iter().any(|b| b.number == a.number), "{}", a.name);
        }
    }

    #[test]
    fn what_cannot_be_enabled_is_einval() {
        let system = System::new(CpuModel::default(), HostParams::default());
        let vm = system.create_vm().unwrap();
        for (cap, flags, argument) in
            [(KVM_CAP_USER_MEMORY, 0, 1), (u32::MAX, 0, 0), (KVM_CAP_EXCEPTION_PAYLOAD, 1, 1)]
        {
            assert_eq!(enable(&vm, &request(cap, flags, argument)), Err(Errno::INVALID), "{cap}");
        }
        enable(&vm, &request(KVM_CAP_EXCEPTION_PAYLOAD, 0, 1)).unwrap();
        assert!(vm.policy().exception_payload());
        enable(&vm, &request(KVM_CAP_SPLIT_IRQCHIP, 0, 24)).unwrap();
        assert_eq!(enable(&vm, &request(KVM_CAP_SPLIT_IRQCHIP, 0, 24)), Err(Errno::EXISTS));
    }
}
