//! Every ioctl that is served, as a table (kernel: include/uapi/linux/kvm.h): number, structure, object, handler.

use std::sync::Arc;

use hypervisor::{System, Vcpu, Vm};
use kvm_bindings::*;

use crate::error::Errno;
use crate::object::{Object, Reply, VcpuObject};
use crate::user::Argument;
use crate::{run, system, vcpu, vm};

/// KVM's ioctl type byte.
pub const KVMIO: u8 = 0xae;

/// Who writes the structure that an ioctl points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// No structure: the argument is a value (`_IO`).
    Value,
    /// The client's structure is read (`_IOW`).
    In,
    /// The structure is filled in (`_IOR`).
    Out,
    /// Both (`_IOWR`).
    InOut,
}

/// The function that serves an ioctl, by the kind of object that it takes.
#[derive(Clone, Copy)]
pub enum Handler {
    /// On `/dev/kvm`.
    System(fn(&Arc<System>, Argument) -> Result<Reply, Errno>),
    /// On a VM.
    Vm(fn(&Arc<Vm>, Argument) -> Result<Reply, Errno>),
    /// On a vCPU, which is locked for the call.
    Vcpu(fn(&mut Vcpu, Argument) -> Result<Reply, Errno>),
    /// On a vCPU with what it shares with its client; locks it itself.
    Run(fn(&VcpuObject, Argument) -> Result<Reply, Errno>),
}

impl Handler {
    /// Makes the call; ENOTTY on another kind of object.
    fn call(self, object: &Object, argument: Argument) -> Result<Reply, Errno> {
        match (self, object) {
            (Handler::System(f), Object::System(system)) => f(system, argument),
            (Handler::Vm(f), Object::Vm(vm)) => f(vm, argument),
            (Handler::Vcpu(f), Object::Vcpu(vcpu)) => f(&mut vcpu.lock(), argument),
            (Handler::Run(f), Object::Vcpu(vcpu)) => f(vcpu, argument),
            _ => Err(Errno::NOTTY),
        }
    }

    /// Whether it is for this kind of object.
    pub fn takes(self, object: &Object) -> bool {
        matches!(
            (self, object),
            (Handler::System(_), Object::System(_))
                | (Handler::Vm(_), Object::Vm(_))
                | (Handler::Vcpu(_) | Handler::Run(_), Object::Vcpu(_))
        )
    }
}

/// One row of the API.
#[derive(Clone, Copy)]
pub struct Ioctl {
    /// The kernel's name.
    pub name: &'static str,
    /// Low byte of the number.
    pub nr: u8,
    /// Direction of the structure.
    pub direction: Direction,
    /// Size of the structure in bytes (of its fixed part, where entries follow).
    pub size: usize,
    /// What serves it.
    pub handler: Handler,
}

impl Ioctl {
    /// The number as clients pass it (asm-generic/ioctl.h: direction 31:30, size 29:16, type 15:8, number 7:0).
    pub const fn number(&self) -> u32 {
        let direction = match self.direction {
            Direction::Value => 0,
            Direction::In => 1,
            Direction::Out => 2,
            Direction::InOut => 3,
        };
        direction << 30 | (self.size as u32 & 0x3fff) << 16 | (KVMIO as u32) << 8 | self.nr as u32
    }
}

macro_rules! ioctls {
    ($($name:ident $nr:literal $direction:ident $structure:ty => $kind:ident $handler:path;)*) => {
        /// Every ioctl that is served.
        pub static IOCTLS: &[Ioctl] = &[$(Ioctl {
            name: stringify!($name),
            nr: $nr,
            direction: Direction::$direction,
            size: size_of::<$structure>(),
            handler: Handler::$kind($handler),
        }),*];
    };
}

ioctls! {
    KVM_GET_API_VERSION            0x00 Value ()                           => System system::get_api_version;
    KVM_CREATE_VM                  0x01 Value ()                           => System system::create_vm;
    KVM_GET_MSR_INDEX_LIST         0x02 InOut kvm_msr_list                 => System system::get_msr_index_list;
    KVM_CHECK_EXTENSION            0x03 Value ()                           => System system::check_extension;
    KVM_GET_VCPU_MMAP_SIZE         0x04 Value ()                           => System system::get_vcpu_mmap_size;
    KVM_GET_SUPPORTED_CPUID        0x05 InOut kvm_cpuid2                   => System system::get_supported_cpuid;
    KVM_GET_EMULATED_CPUID         0x09 InOut kvm_cpuid2                   => System system::get_emulated_cpuid;
    KVM_GET_MSR_FEATURE_INDEX_LIST 0x0a InOut kvm_msr_list                 => System system::get_msr_feature_index_list;
    KVM_GET_MSRS                   0x88 InOut kvm_msrs                     => System system::get_msrs;
    KVM_X86_GET_MCE_CAP_SUPPORTED  0x9d Out   u64                          => System system::get_mce_cap_supported;
    KVM_GET_DEVICE_ATTR            0xe2 In    kvm_device_attr              => System system::get_device_attr;
    KVM_HAS_DEVICE_ATTR            0xe3 In    kvm_device_attr              => System system::has_device_attr;

    KVM_CHECK_EXTENSION            0x03 Value ()                           => Vm vm::check_extension;
    KVM_CREATE_VCPU                0x41 Value ()                           => Vm vm::create_vcpu;
    KVM_GET_DIRTY_LOG              0x42 In    kvm_dirty_log                => Vm vm::get_dirty_log;
    KVM_SET_NR_MMU_PAGES           0x44 Value ()                           => Vm vm::set_nr_mmu_pages;
    KVM_SET_USER_MEMORY_REGION     0x46 In    kvm_userspace_memory_region  => Vm vm::set_user_memory_region;
    KVM_SET_TSS_ADDR               0x47 Value ()                           => Vm vm::set_tss_addr;
    KVM_SET_IDENTITY_MAP_ADDR      0x48 In    u64                          => Vm vm::set_identity_map_addr;
    KVM_SET_USER_MEMORY_REGION2    0x49 In    kvm_userspace_memory_region2 => Vm vm::set_user_memory_region2;
    KVM_CREATE_IRQCHIP             0x60 Value ()                           => Vm vm::create_irqchip;
    KVM_IRQ_LINE                   0x61 In    kvm_irq_level                => Vm vm::irq_line;
    KVM_GET_IRQCHIP                0x62 InOut kvm_irqchip                  => Vm vm::get_irqchip;
    KVM_SET_IRQCHIP                0x63 Out   kvm_irqchip                  => Vm vm::set_irqchip;
    KVM_CREATE_PIT                 0x64 Value ()                           => Vm vm::create_pit;
    KVM_GET_PIT                    0x65 InOut kvm_pit_state                => Vm vm::get_pit;
    KVM_SET_PIT                    0x66 Out   kvm_pit_state                => Vm vm::set_pit;
    KVM_IRQ_LINE_STATUS            0x67 InOut kvm_irq_level                => Vm vm::irq_line_status;
    KVM_REGISTER_COALESCED_MMIO    0x67 In    kvm_coalesced_mmio_zone      => Vm vm::register_coalesced_mmio;
    KVM_UNREGISTER_COALESCED_MMIO  0x68 In    kvm_coalesced_mmio_zone      => Vm vm::unregister_coalesced_mmio;
    KVM_SET_GSI_ROUTING            0x6a In    kvm_irq_routing              => Vm vm::set_gsi_routing;
    KVM_REINJECT_CONTROL           0x71 Value ()                           => Vm vm::reinject_control;
    KVM_IRQFD                      0x76 In    kvm_irqfd                    => Vm vm::irqfd;
    KVM_CREATE_PIT2                0x77 In    kvm_pit_config               => Vm vm::create_pit2;
    KVM_SET_BOOT_CPU_ID            0x78 Value ()                           => Vm vm::set_boot_cpu_id;
    KVM_IOEVENTFD                  0x79 In    kvm_ioeventfd                => Vm vm::ioeventfd;
    KVM_SET_CLOCK                  0x7b In    kvm_clock_data               => Vm vm::set_clock;
    KVM_GET_CLOCK                  0x7c Out   kvm_clock_data               => Vm vm::get_clock;
    KVM_GET_PIT2                   0x9f Out   kvm_pit_state2               => Vm vm::get_pit2;
    KVM_SET_PIT2                   0xa0 In    kvm_pit_state2               => Vm vm::set_pit2;
    KVM_SET_TSC_KHZ                0xa2 Value ()                           => Vm vm::set_tsc_khz;
    KVM_ENABLE_CAP                 0xa3 In    kvm_enable_cap               => Vm vm::enable_cap;
    KVM_GET_TSC_KHZ                0xa3 Value ()                           => Vm vm::get_tsc_khz;
    KVM_SIGNAL_MSI                 0xa5 In    kvm_msi                      => Vm vm::signal_msi;
    KVM_CLEAR_DIRTY_LOG            0xc0 InOut kvm_clear_dirty_log          => Vm vm::clear_dirty_log;
    KVM_X86_SET_MSR_FILTER         0xc6 In    kvm_msr_filter               => Vm vm::set_msr_filter;
    KVM_RESET_DIRTY_RINGS          0xc7 Value ()                           => Vm vm::reset_dirty_rings;
    KVM_GET_STATS_FD               0xce Value ()                           => Vm vm::get_stats_fd;
    KVM_CREATE_DEVICE              0xe0 InOut kvm_create_device            => Vm vm::create_device;

    KVM_RUN                        0x80 Value ()                          => Run run::run;
    KVM_GET_REGS                   0x81 Out   kvm_regs                    => Vcpu vcpu::get_regs;
    KVM_SET_REGS                   0x82 In    kvm_regs                    => Vcpu vcpu::set_regs;
    KVM_GET_SREGS                  0x83 Out   kvm_sregs                   => Vcpu vcpu::get_sregs;
    KVM_SET_SREGS                  0x84 In    kvm_sregs                   => Vcpu vcpu::set_sregs;
    KVM_TRANSLATE                  0x85 InOut kvm_translation             => Vcpu vcpu::translate;
    KVM_INTERRUPT                  0x86 In    kvm_interrupt               => Vcpu vcpu::interrupt;
    KVM_GET_MSRS                   0x88 InOut kvm_msrs                    => Vcpu vcpu::get_msrs;
    KVM_SET_MSRS                   0x89 In    kvm_msrs                    => Vcpu vcpu::set_msrs;
    KVM_SET_CPUID                  0x8a In    kvm_cpuid                   => Vcpu vcpu::set_cpuid;
    KVM_GET_FPU                    0x8c Out   kvm_fpu                     => Vcpu vcpu::get_fpu;
    KVM_SET_FPU                    0x8d In    kvm_fpu                     => Vcpu vcpu::set_fpu;
    KVM_GET_LAPIC                  0x8e Out   kvm_lapic_state             => Vcpu vcpu::get_lapic;
    KVM_SET_LAPIC                  0x8f In    kvm_lapic_state             => Vcpu vcpu::set_lapic;
    KVM_SET_CPUID2                 0x90 In    kvm_cpuid2                  => Vcpu vcpu::set_cpuid2;
    KVM_GET_CPUID2                 0x91 InOut kvm_cpuid2                  => Vcpu vcpu::get_cpuid2;
    KVM_TPR_ACCESS_REPORTING       0x92 InOut kvm_tpr_access_ctl          => Vcpu vcpu::tpr_access_reporting;
    KVM_SET_VAPIC_ADDR             0x93 In    u64                         => Vcpu vcpu::set_vapic_addr;
    KVM_GET_MP_STATE               0x98 Out   kvm_mp_state                => Vcpu vcpu::get_mp_state;
    KVM_SET_MP_STATE               0x99 In    kvm_mp_state                => Vcpu vcpu::set_mp_state;
    KVM_NMI                        0x9a Value ()                          => Vcpu vcpu::nmi;
    KVM_SET_GUEST_DEBUG            0x9b In    kvm_guest_debug             => Vcpu vcpu::set_guest_debug;
    KVM_X86_SETUP_MCE              0x9c In    u64                         => Vcpu vcpu::x86_setup_mce;
    KVM_X86_SET_MCE                0x9e In    kvm_x86_mce                 => Vcpu vcpu::x86_set_mce;
    KVM_GET_VCPU_EVENTS            0x9f Out   kvm_vcpu_events             => Vcpu vcpu::get_vcpu_events;
    KVM_SET_VCPU_EVENTS            0xa0 In    kvm_vcpu_events             => Vcpu vcpu::set_vcpu_events;
    KVM_GET_DEBUGREGS              0xa1 Out   kvm_debugregs               => Vcpu vcpu::get_debugregs;
    KVM_SET_DEBUGREGS              0xa2 In    kvm_debugregs               => Vcpu vcpu::set_debugregs;
    KVM_SET_TSC_KHZ                0xa2 Value ()                          => Vcpu vcpu::set_tsc_khz;
    KVM_GET_TSC_KHZ                0xa3 Value ()                          => Vcpu vcpu::get_tsc_khz;
    KVM_ENABLE_CAP                 0xa3 In    kvm_enable_cap              => Vcpu vcpu::enable_cap;
    KVM_GET_XSAVE                  0xa4 Out   kvm_xsave                   => Vcpu vcpu::get_xsave;
    KVM_SET_XSAVE                  0xa5 In    kvm_xsave                   => Vcpu vcpu::set_xsave;
    KVM_GET_XCRS                   0xa6 Out   kvm_xcrs                    => Vcpu vcpu::get_xcrs;
    KVM_SET_XCRS                   0xa7 In    kvm_xcrs                    => Vcpu vcpu::set_xcrs;
    KVM_SMI                        0xb7 Value ()                          => Vcpu vcpu::smi;
    KVM_KVMCLOCK_CTRL              0xad Value ()                          => Vcpu vcpu::kvmclock_ctrl;
    KVM_GET_SREGS2                 0xcc Out   kvm_sregs2                  => Vcpu vcpu::get_sregs2;
    KVM_SET_SREGS2                 0xcd In    kvm_sregs2                  => Vcpu vcpu::set_sregs2;
    KVM_GET_XSAVE2                 0xcf Out   kvm_xsave                   => Vcpu vcpu::get_xsave2;
    KVM_PRE_FAULT_MEMORY           0xd5 InOut kvm_pre_fault_memory        => Run vcpu::pre_fault_memory;
    KVM_SET_DEVICE_ATTR            0xe1 In    kvm_device_attr             => Vcpu vcpu::set_device_attr;
    KVM_GET_DEVICE_ATTR            0xe2 In    kvm_device_attr             => Vcpu vcpu::get_device_attr;
    KVM_HAS_DEVICE_ATTR            0xe3 In    kvm_device_attr             => Vcpu vcpu::has_device_attr;
    KVM_GET_STATS_FD               0xce Value ()                          => Vcpu vcpu::get_stats_fd;
}

/// The row for `number` on `object`.
fn lookup(object: &Object, number: u32) -> Option<&'static Ioctl> {
    IOCTLS.iter().find(|row| row.number() == number && row.handler.takes(object))
}

/// Makes an ioctl: the one entry of the KVM API.
///
/// # Errors
///
/// EIO once the VM is dead. ENOTTY for a number that the object does not have; else what the kernel gives for the call.
pub fn ioctl(object: &Object, number: u32, argument: Argument) -> Result<Reply, Errno> {
    if object.is_dead() {
        return Err(Errno::IO);
    }
    // The one call that must cost nothing before it begins.
    if let (Object::Vcpu(vcpu), RUN) = (object, number) {
        return run::run(vcpu, argument);
    }
    let row = lookup(object, number).ok_or_else(|| {
        tracing::debug!("no ioctl {number:#x} on {object:?}");
        Errno::NOTTY
    })?;
    let result = row.handler.call(object, argument);
    tracing::trace!("{} {:#x}: {result:?}", row.name, argument.0);
    result
}

/// KVM_RUN.
const RUN: u32 = (KVMIO as u32) << 8 | 0x80;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        let known = [
            ("KVM_GET_API_VERSION", 0x0000_ae00),
            ("KVM_CREATE_VM", 0x0000_ae01),
            ("KVM_GET_SUPPORTED_CPUID", 0xc008_ae05),
            ("KVM_SET_USER_MEMORY_REGION", 0x4020_ae46),
            ("KVM_IRQ_LINE", 0x4008_ae61),
            ("KVM_GET_MSR_INDEX_LIST", 0xc004_ae02),
            ("KVM_X86_GET_MCE_CAP_SUPPORTED", 0x8008_ae9d),
            ("KVM_SET_USER_MEMORY_REGION2", 0x40a0_ae49),
            ("KVM_SET_IRQCHIP", 0x8208_ae63),
            ("KVM_IRQ_LINE_STATUS", 0xc008_ae67),
            ("KVM_REGISTER_COALESCED_MMIO", 0x4010_ae67),
            ("KVM_REINJECT_CONTROL", 0x0000_ae71),
            ("KVM_SET_CLOCK", 0x4030_ae7b),
            ("KVM_GET_PIT2", 0x8070_ae9f),
            ("KVM_ENABLE_CAP", 0x4068_aea3),
            ("KVM_CLEAR_DIRTY_LOG", 0xc018_aec0),
            ("KVM_X86_SET_MSR_FILTER", 0x4188_aec6),
            ("KVM_RUN", RUN),
            ("KVM_GET_REGS", 0x8090_ae81),
            ("KVM_SET_SREGS", 0x4138_ae84),
            ("KVM_GET_MSRS", 0xc008_ae88),
            ("KVM_SET_CPUID2", 0x4008_ae90),
            ("KVM_TPR_ACCESS_REPORTING", 0xc028_ae92),
            ("KVM_SET_VAPIC_ADDR", 0x4008_ae93),
            ("KVM_GET_VCPU_EVENTS", 0x8040_ae9f),
            ("KVM_GET_XSAVE2", 0x9000_aecf),
            ("KVM_SET_XCRS", 0x4188_aea7),
            ("KVM_PRE_FAULT_MEMORY", 0xc040_aed5),
            ("KVM_SET_GUEST_DEBUG", 0x4048_ae9b),
            ("KVM_GET_SREGS2", 0x8140_aecc),
            ("KVM_SMI", 0x0000_aeb7),
        ];
        for (name, number) in known {
            let row = IOCTLS.iter().find(|row| row.name == name).unwrap();
            assert_eq!(row.number(), number, "{name}");
        }
    }

    #[test]
    fn each_number_stands_once_for_an_object() {
        let kind = |row: &Ioctl| match row.handler {
            Handler::System(_) => 0,
            Handler::Vm(_) => 1,
            Handler::Vcpu(_) | Handler::Run(_) => 2,
        };
        for (i, a) in IOCTLS.iter().enumerate() {
            let twice = IOCTLS[i + 1..].iter().any(|b| (kind(a), a.number()) == (kind(b), b.number()));
            assert!(!twice, "{}", a.name);
        }
    }
}
