//! What ring3 has and the kernel's KVM has not, in a space of numbers of its own: capabilities and exit reasons are
//! 0x5233_0000 ("R3") and up, far from the kernel's, which count from 0. A client that enables none of the capabilities never
//! sees one of the exits. docs/ring3-abi.md is the description for clients.

use hypervisor::vcpu::NotifyExit;
use kvm_bindings::KVM_NOTIFY_CONTEXT_INVALID;

/// KVM_CAP of a VM: what becomes of split locks that must not be executed
/// ([`VmPolicy`](hypervisor::split_lock::VmPolicy)). KVM_CHECK_EXTENSION answers all bits of the argument.
pub const RING3_CAP_SPLIT_LOCK_POLICY: u32 = 0x5233_0001;
/// KVM_CAP of a VM, before its first vCPU: argument 1 declares that vCPUs are pinned and share no core with another VM.
pub const RING3_CAP_PINNED_VCPUS: u32 = 0x5233_0002;

/// KVM_CAP of a VM, at any time, for all VMs of the host: the sysctl `kernel.split_lock_mitigate`, 0 or 1. KVM_CHECK_EXTENSION answers
/// it, with [`RING3_THERE`].
pub const RING3_CAP_SPLIT_LOCK_MITIGATE: u32 = 0x5233_0003;
/// KVM_CAP of a VM, at any time, for all VMs of the host: the module parameter `kvm_intel.vmentry_l1d_flush`, 0 auto, 1 never, 2 cond,
/// 3 always. KVM_CHECK_EXTENSION answers it, with [`RING3_THERE`].
pub const RING3_CAP_VMENTRY_L1D_FLUSH: u32 = 0x5233_0030;
/// KVM_CAP: guests have the page-not-present protocol, if their CPUID has ring3's leaves as KVM_GET_SUPPORTED_CPUID gives them
/// (docs/features/page-not-present.md). KVM_CHECK_EXTENSION answers its version.
pub const RING3_CAP_PAGE_NOT_PRESENT: u32 = 0x5233_0040;
/// In the answer to a capability whose value may be 0.
pub const RING3_THERE: u32 = 1 << 16;

/// `kvm_run.exit_reason`: a split lock that is not executed; [`SplitLockRecord`] is at the beginning of the union.
pub const RING3_EXIT_SPLIT_LOCK: u32 = 0x5233_0001;

/// [`SplitLockRecord`]'s flags: the access is the processor's own, to a descriptor table.
pub const RING3_SPLIT_LOCK_IMPLICIT: u32 = 1 << 0;

/// What stands in the union of `kvm_run` (offset 32) with [`RING3_EXIT_SPLIT_LOCK`]. The access has not been made, and RIP is
/// at the instruction; KVM_RUN tries it again, under the policy of then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SplitLockRecord {
    /// RIP.
    pub rip: u64,
    /// Linear address of the access.
    pub linear_address: u64,
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Its bytes.
    pub size: u32,
    /// RING3_SPLIT_LOCK_*.
    pub flags: u32,
    /// Privilege level that it was made at.
    pub cpl: u8,
    /// How many bytes of the instruction follow.
    pub instruction_length: u8,
    /// They.
    pub instruction: [u8; 15],
    /// Zero.
    pub pad: [u8; 7],
}

/// It fits into the union.
const _: () = assert!(size_of::<SplitLockRecord>() <= 256);

/// The notify VM exit of a VM, at any time. KVM_ENABLE_CAP takes what KVM_CAP_X86_NOTIFY_VMEXIT takes, and no flags for off; each
/// vCPU has it from its next entry to guest mode on. KVM_CHECK_EXTENSION on the VM answers the flags and
/// [`RING3_NOTIFY_THERE`]; on the system, those of new VMs.
pub const RING3_CAP_NOTIFY: u32 = 0x5233_0010;
/// KVM_CHECK_EXTENSION answers the window, in ticks of the crystal (25 MHz), as an unsigned number.
pub const RING3_CAP_NOTIFY_WINDOW: u32 = 0x5233_0011;

/// KVM_CAP of a VM, at any time: with argument 1 KVM_GET_XSAVE2 and KVM_SET_XSAVE carry XSAVE components that IA32_XFD disables
/// (tiles that are live all the same); with 0 they do not, as the kernel's.
pub const RING3_CAP_LIVE_XSTATE: u32 = 0x5233_0020;

/// In the answer to [`RING3_CAP_NOTIFY`]: it is there, whatever is enabled; and KVM_EXIT_NOTIFY comes with a
/// [`NotifyRecord`].
pub const RING3_NOTIFY_THERE: u32 = 1 << 16;

/// What stands in the union of `kvm_run` (offset 32) with KVM_EXIT_NOTIFY. The kernel's structure is its first word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct NotifyRecord {
    /// KVM_NOTIFY_*.
    pub flags: u32,
    /// IDT-vectoring information; 0: the exit did not come in a delivery.
    pub vectoring: u32,
    /// IDT-vectoring error code.
    pub error_code: u32,
    /// How many exits in a row had this RIP, this one included.
    pub repeats: u32,
    /// RIP.
    pub rip: u64,
    /// Exit qualification.
    pub qualification: u64,
    /// Ticks of the crystal without an event window.
    pub ticks: u64,
}

impl NotifyRecord {
    pub(crate) fn of(exit: &NotifyExit) -> NotifyRecord {
        NotifyRecord {
            flags: if exit.context_invalid { KVM_NOTIFY_CONTEXT_INVALID } else { 0 },
            vectoring: exit.vectoring,
            error_code: exit.error_code,
            repeats: exit.repeats,
            rip: exit.rip,
            qualification: exit.qualification,
            ticks: exit.ticks,
        }
    }
}
