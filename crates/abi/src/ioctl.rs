//! The ioctls that the hypervisor has typed calls for (kernel: include/uapi/linux/kvm.h).

use kvm_bindings::{
    kvm_cpuid2, kvm_debugregs, kvm_fpu, kvm_interrupt, kvm_ioeventfd, kvm_irq_level, kvm_irq_routing,
    kvm_irqfd, kvm_mp_state, kvm_msi, kvm_msrs, kvm_pit_config, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region,
};

/// KVM's ioctl type byte.
pub const KVMIO: u8 = 0xae;

/// What kind of file descriptor an ioctl belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Object {
    /// `/dev/kvm`.
    System,
    /// What KVM_CREATE_VM returns.
    Vm,
    /// What KVM_CREATE_VCPU returns.
    Vcpu,
    /// What KVM_CREATE_DEVICE returns.
    Device,
}

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

/// One row of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ioctl {
    /// The kernel's name.
    pub name: &'static str,
    /// The object that takes it.
    pub object: Object,
    /// Low byte of the number.
    pub nr: u8,
    /// Direction of the structure.
    pub direction: Direction,
    /// Size of the structure in bytes (of its fixed part, where entries follow).
    pub size: usize,
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
    ($($name:ident $object:ident $nr:literal $direction:ident $structure:ty;)*) => {
        /// Every ioctl that is served.
        pub const IOCTLS: &[Ioctl] = &[$(Ioctl {
            name: stringify!($name),
            object: Object::$object,
            nr: $nr,
            direction: Direction::$direction,
            size: size_of::<$structure>(),
        }),*];
    };
}

ioctls! {
    KVM_GET_API_VERSION         System 0x00 Value ();
    KVM_CREATE_VM               System 0x01 Value ();
    KVM_CHECK_EXTENSION         System 0x03 Value ();
    KVM_GET_VCPU_MMAP_SIZE      System 0x04 Value ();
    KVM_GET_SUPPORTED_CPUID     System 0x05 InOut kvm_cpuid2;
    KVM_CREATE_VCPU             Vm     0x41 Value ();
    KVM_SET_USER_MEMORY_REGION  Vm     0x46 In    kvm_userspace_memory_region;
    KVM_CREATE_IRQCHIP          Vm     0x60 Value ();
    KVM_IRQ_LINE                Vm     0x61 In    kvm_irq_level;
    KVM_SET_GSI_ROUTING         Vm     0x6a In    kvm_irq_routing;
    KVM_IRQFD                   Vm     0x76 In    kvm_irqfd;
    KVM_CREATE_PIT2             Vm     0x77 In    kvm_pit_config;
    KVM_IOEVENTFD               Vm     0x79 In    kvm_ioeventfd;
    KVM_SIGNAL_MSI              Vm     0xa5 In    kvm_msi;
    KVM_RUN                     Vcpu   0x80 Value ();
    KVM_GET_REGS                Vcpu   0x81 Out   kvm_regs;
    KVM_SET_REGS                Vcpu   0x82 In    kvm_regs;
    KVM_GET_SREGS               Vcpu   0x83 Out   kvm_sregs;
    KVM_SET_SREGS               Vcpu   0x84 In    kvm_sregs;
    KVM_INTERRUPT               Vcpu   0x86 In    kvm_interrupt;
    KVM_GET_MSRS                Vcpu   0x88 InOut kvm_msrs;
    KVM_SET_MSRS                Vcpu   0x89 In    kvm_msrs;
    KVM_GET_FPU                 Vcpu   0x8c Out   kvm_fpu;
    KVM_SET_FPU                 Vcpu   0x8d In    kvm_fpu;
    KVM_SET_CPUID2              Vcpu   0x90 In    kvm_cpuid2;
    KVM_GET_MP_STATE            Vcpu   0x98 Out   kvm_mp_state;
    KVM_SET_MP_STATE            Vcpu   0x99 In    kvm_mp_state;
    KVM_NMI                     Vcpu   0x9a Value ();
    KVM_GET_DEBUGREGS           Vcpu   0xa1 Out   kvm_debugregs;
    KVM_SET_DEBUGREGS           Vcpu   0xa2 In    kvm_debugregs;
    KVM_GET_TSC_KHZ             Vcpu   0xa3 Value ();
}

/// The row for `number` on `object`. `None` is ENOTTY to the client.
pub fn lookup(object: Object, number: u32) -> Option<&'static Ioctl> {
    IOCTLS.iter().find(|row| row.object == object && row.number() == number)
}

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
            ("KVM_RUN", 0x0000_ae80),
            ("KVM_GET_REGS", 0x8090_ae81),
            ("KVM_SET_SREGS", 0x4138_ae84),
            ("KVM_GET_MSRS", 0xc008_ae88),
            ("KVM_SET_CPUID2", 0x4008_ae90),
        ];
        for (name, number) in known {
            let row = IOCTLS.iter().find(|row| row.name == name).unwrap();
            assert_eq!(row.number(), number, "{name}");
        }
    }

    #[test]
    fn each_number_stands_once() {
        for (i, a) in IOCTLS.iter().enumerate() {
            assert!(
                IOCTLS[i + 1..].iter().all(|b| (a.object, a.number()) != (b.object, b.number())),
                "{}",
                a.name
            );
        }
        assert_eq!(lookup(Object::Vm, IOCTLS[0].number()), None, "a system ioctl on a VM is ENOTTY");
    }
}
