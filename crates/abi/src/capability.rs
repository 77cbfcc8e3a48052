//! What KVM_CHECK_EXTENSION answers.

use hypervisor::system::VCPUS_MAX;
use kvm_bindings::{
    KVM_CAP_EXT_CPUID, KVM_CAP_HLT, KVM_CAP_IOEVENTFD, KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQCHIP, KVM_CAP_IRQFD,
    KVM_CAP_MAX_VCPUS, KVM_CAP_MP_STATE, KVM_CAP_NR_MEMSLOTS, KVM_CAP_NR_VCPUS, KVM_CAP_PIT2,
    KVM_CAP_READONLY_MEM, KVM_CAP_SIGNAL_MSI, KVM_CAP_USER_MEMORY,
};

/// Capabilities and their answers; what is not listed answers 0 (not supported).
const CAPABILITIES: &[(u32, i32)] = &[
    (KVM_CAP_IRQCHIP, 1),
    (KVM_CAP_HLT, 1),
    (KVM_CAP_USER_MEMORY, 1),
    (KVM_CAP_EXT_CPUID, 1),
    (KVM_CAP_NR_VCPUS, VCPUS_MAX as i32),
    (KVM_CAP_MAX_VCPUS, VCPUS_MAX as i32),
    (KVM_CAP_NR_MEMSLOTS, hypervisor::memory::SLOTS_MAX as i32),
    (KVM_CAP_MP_STATE, 1),
    (KVM_CAP_IRQ_ROUTING, 1),
    (KVM_CAP_IRQFD, 1),
    (KVM_CAP_PIT2, 1),
    (KVM_CAP_IOEVENTFD, 1),
    (KVM_CAP_SIGNAL_MSI, 1),
    (KVM_CAP_READONLY_MEM, 1),
];

/// KVM_CHECK_EXTENSION.
pub fn check_extension(capability: u64) -> i32 {
    CAPABILITIES.iter().find(|(known, _)| u64::from(*known) == capability).map_or(0, |(_, answer)| *answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_capabilities_answer_zero() {
        assert_eq!(check_extension(u64::MAX), 0);
        assert_eq!(check_extension(KVM_CAP_USER_MEMORY.into()), 1);
    }
}
