//! The model-specific registers of the processor, in one table: what each is called, which of package, core
//! and thread it belongs to, its value after reset, which bits can be written, what enumerates it, and who
//! keeps it. (Intel SDM vol. 4, chapter 2.)

use crate::buffers::{Cleared, mcu_opt_ctrl};
use crate::bus_lock::{core_capabilities, test_ctrl};
use crate::model::speculation::arch_cap;
use crate::model::{Feature, Features};

/// What a register exists once per.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Logical processor.
    Thread,
    /// Core: its threads share the register.
    Core,
    /// Package.
    Package,
}

/// A register that is part of [`CpuState`](crate::state::CpuState): silicon executes RDMSR and WRMSR of it
/// without an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateMsr {
    /// IA32_TIME_STAMP_COUNTER; writes exit.
    Tsc,
    /// IA32_SYSENTER_CS.
    SysenterCs,
    /// IA32_SYSENTER_ESP.
    SysenterEsp,
    /// IA32_SYSENTER_EIP.
    SysenterEip,
    /// IA32_PAT.
    Pat,
    /// IA32_XFD.
    Xfd,
    /// IA32_XFD_ERR.
    XfdErr,
    /// IA32_XSS.
    Xss,
    /// IA32_EFER.
    Efer,
    /// IA32_STAR.
    Star,
    /// IA32_LSTAR.
    Lstar,
    /// IA32_CSTAR.
    Cstar,
    /// IA32_FMASK.
    Fmask,
    /// IA32_FS_BASE.
    FsBase,
    /// IA32_GS_BASE.
    GsBase,
    /// IA32_KERNEL_GS_BASE.
    KernelGsBase,
    /// IA32_TSC_AUX.
    TscAux,
}

/// Who keeps a register's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The running CPU's state.
    State(StateMsr),
    /// The thread, core or package, outside guest mode: a guest's access exits, and the hypervisor decides what
    /// the guest gets ([`crate::topology`]).
    Physical,
    /// Nobody: writing 1 is a command that clears these buffers, and reading it is #GP.
    Command(Cleared),
}

/// What says that a register, or a bit of one, exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enumerated {
    /// Every model has it.
    Always,
    /// A CPUID bit.
    By(Feature),
    /// Any of these bits of IA32_ARCH_CAPABILITIES.
    ByCapability(u64),
    /// A CPUID bit, or any of these bits of IA32_ARCH_CAPABILITIES.
    ByEither(Feature, u64),
}

impl Enumerated {
    /// Whether it exists where CPUID has `features` and IA32_ARCH_CAPABILITIES is `capabilities` (0: there is none).
    pub fn there(self, features: &Features, capabilities: u64) -> bool {
        match self {
            Enumerated::Always => true,
            Enumerated::By(feature) => features.has(feature),
            Enumerated::ByCapability(bits) => capabilities & bits != 0,
            Enumerated::ByEither(feature, bits) => features.has(feature) || capabilities & bits != 0,
        }
    }
}

/// One row of the table.
#[derive(Debug)]
pub struct MsrRow {
    /// Number.
    pub index: u32,
    /// The SDM's name.
    pub name: &'static str,
    /// What it exists once per.
    pub scope: Scope,
    /// Value after reset.
    pub reset: u64,
    /// Bits that software can write; the others must keep their value.
    pub writable: u64,
    /// What enumerates it.
    pub enumerated: Enumerated,
    /// Who keeps it.
    pub kept: Kept,
}

const fn state(index: u32, name: &'static str, enumerated: Enumerated, msr: StateMsr) -> MsrRow {
    let reset = if matches!(msr, StateMsr::Pat) { PAT_RESET } else { 0 };
    let (scope, writable) = (Scope::Thread, u64::MAX);
    MsrRow { index, name, scope, reset, writable, enumerated, kept: Kept::State(msr) }
}

/// Bit 0 is the command.
const fn command(index: u32, name: &'static str, enumerated: Enumerated, clears: Cleared) -> MsrRow {
    let scope = Scope::Thread;
    MsrRow { index, name, scope, reset: 0, writable: 1, enumerated, kept: Kept::Command(clears) }
}

const fn physical(
    index: u32,
    name: &'static str,
    scope: Scope,
    reset: u64,
    writable: u64,
    enumerated: Enumerated,
) -> MsrRow {
    MsrRow { index, name, scope, reset, writable, enumerated, kept: Kept::Physical }
}

/// MSR_TEST_CTRL, which later manuals call MSR_MEMORY_CTRL.
pub const MSR_TEST_CTRL: u32 = 0x33;

/// IA32_SPEC_CTRL.
pub const SPEC_CTRL: u32 = 0x48;
/// IA32_PRED_CMD.
pub const PRED_CMD: u32 = 0x49;
/// IA32_ARCH_CAPABILITIES.
pub const ARCH_CAPABILITIES: u32 = 0x10a;
/// IA32_FLUSH_CMD.
pub const FLUSH_CMD: u32 = 0x10b;
/// IA32_TSX_CTRL.
pub const TSX_CTRL: u32 = 0x122;
/// IA32_MCU_OPT_CTRL.
pub const MCU_OPT_CTRL: u32 = 0x123;

/// Bits of IA32_TSX_CTRL.
pub mod tsx_ctrl {
    /// Transactions abort at once.
    pub const RTM_DISABLE: u64 = 1 << 0;
    /// CPUID enumerates neither RTM nor HLE.
    pub const CPUID_CLEAR: u64 = 1 << 1;
}

/// IA32_PAT after reset: WB, WT, UC-, UC, twice.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// Bits of MSR_TEST_CTRL that exist.
const TEST_CTRL_WRITABLE: u64 =
    test_ctrl::UC_LOCK_DISABLE | test_ctrl::SPLIT_LOCK_DETECT | test_ctrl::SUPPRESS_LOCK;

/// IA32_CORE_CAPABILITIES of every part that has it.
const CORE_CAPABILITIES: u64 = core_capabilities::UC_LOCK_DISABLE | core_capabilities::SPLIT_LOCK_DETECT;

/// Bits of registers that something of their own enumerates: register, bits, what says that they exist (SDM vol. 4, table 2-2). Other
/// bits come with their register.
pub static BITS: &[(u32, u64, Enumerated)] = &[
    (SPEC_CTRL, 1 << 0, By(F::SpecCtrl)),
    (SPEC_CTRL, 1 << 1, By(F::Stibp)),
    (SPEC_CTRL, 1 << 2, By(F::Ssbd)),
    (SPEC_CTRL, 1 << 3 | 1 << 4, By(F::IpredCtrl)),
    (SPEC_CTRL, 1 << 5 | 1 << 6, By(F::RrsbaCtrl)),
    (SPEC_CTRL, 1 << 7, By(F::Psfd)),
    (SPEC_CTRL, 1 << 8, By(F::DdpdU)),
    (SPEC_CTRL, 1 << 10, By(F::BhiCtrl)),
    (MCU_OPT_CTRL, mcu_opt_ctrl::RNGDS_MITG_DIS, By(F::SrbdsCtrl)),
    (MCU_OPT_CTRL, mcu_opt_ctrl::FB_CLEAR_DIS, ByCapability(arch_cap::FB_CLEAR_CTRL)),
    (MCU_OPT_CTRL, mcu_opt_ctrl::GDS_MITG_DIS, ByCapability(arch_cap::GDS_CTRL)),
];

/// Bits of MSR `index` that software can write, of those that [`BITS`] has, where CPUID has `features` and
/// IA32_ARCH_CAPABILITIES is `capabilities`.
pub fn enumerated_bits(index: u32, features: &Features, capabilities: u64) -> u64 {
    let there = |row: &&(u32, u64, Enumerated)| row.0 == index && row.2.there(features, capabilities);
    BITS.iter().filter(there).fold(0, |bits, row| bits | row.1)
}

/// All bits of MSR `index` that [`BITS`] has.
pub const fn defined_bits(index: u32) -> u64 {
    let (mut bits, mut i) = (0, 0);
    while i < BITS.len() {
        if BITS[i].0 == index {
            bits |= BITS[i].1;
        }
        i += 1;
    }
    bits
}

use Enumerated::{Always, By, ByCapability, ByEither};
use Feature as F;
use Scope::{Core, Package, Thread};

/// All registers, by number.
pub static MSRS: &[MsrRow] = &[
    state(0x10, "IA32_TIME_STAMP_COUNTER", By(F::Tsc), StateMsr::Tsc),
    physical(0x1b, "IA32_APIC_BASE", Thread, 0xfee0_0800, 0x000f_ffff_ffff_fd00, By(F::Apic)),
    physical(MSR_TEST_CTRL, "MSR_TEST_CTRL", Core, 0, TEST_CTRL_WRITABLE, By(F::CoreCapability)),
    physical(0x3a, "IA32_FEATURE_CONTROL", Thread, 1, 0, Always),
    physical(0x3b, "IA32_TSC_ADJUST", Thread, 0, u64::MAX, By(F::TscAdjust)),
    physical(SPEC_CTRL, "IA32_SPEC_CTRL", Thread, 0, defined_bits(SPEC_CTRL), By(F::SpecCtrl)),
    command(PRED_CMD, "IA32_PRED_CMD", By(F::SpecCtrl), Cleared::IBPB),
    physical(0x8b, "IA32_BIOS_SIGN_ID", Core, 0x1_0000_0000, u64::MAX, Always),
    physical(0xbc, "IA32_MISC_PACKAGE_CTLS", Package, 0, 1, ByCapability(arch_cap::MISC_PACKAGE_CTLS)),
    physical(0xbd, "IA32_XAPIC_DISABLE_STATUS", Package, 0, 0, ByCapability(arch_cap::XAPIC_DISABLE_STATUS)),
    physical(0xce, "MSR_PLATFORM_INFO", Package, 1 << 31, 0, Always),
    physical(0xcf, "IA32_CORE_CAPABILITIES", Core, CORE_CAPABILITIES, 0, By(F::CoreCapability)),
    physical(0xe1, "IA32_UMWAIT_CONTROL", Thread, 0, 0xffff_fffd, By(F::Waitpkg)),
    physical(0xfe, "IA32_MTRRCAP", Package, 0x508, 0, By(F::Mtrr)),
    // After reset: what the part is ([`crate::topology`]).
    physical(ARCH_CAPABILITIES, "IA32_ARCH_CAPABILITIES", Package, 0, 0, By(F::ArchCapabilities)),
    command(FLUSH_CMD, "IA32_FLUSH_CMD", By(F::FlushL1d), Cleared::L1D_FLUSH),
    physical(
        TSX_CTRL,
        "IA32_TSX_CTRL",
        Thread,
        0,
        tsx_ctrl::RTM_DISABLE | tsx_ctrl::CPUID_CLEAR,
        ByCapability(arch_cap::TSX_CTRL),
    ),
    physical(
        MCU_OPT_CTRL,
        "IA32_MCU_OPT_CTRL",
        Thread,
        0,
        defined_bits(MCU_OPT_CTRL),
        ByEither(F::SrbdsCtrl, arch_cap::FB_CLEAR_CTRL | arch_cap::GDS_CTRL),
    ),
    state(0x174, "IA32_SYSENTER_CS", By(F::Sep), StateMsr::SysenterCs),
    state(0x175, "IA32_SYSENTER_ESP", By(F::Sep), StateMsr::SysenterEsp),
    state(0x176, "IA32_SYSENTER_EIP", By(F::Sep), StateMsr::SysenterEip),
    physical(0x195, "IA32_OVERCLOCKING_STATUS", Package, 0, 0, ByCapability(arch_cap::OVERCLOCKING_STATUS)),
    physical(0x1a0, "IA32_MISC_ENABLE", Core, 0x0085_0089, 0x0000_0004_0044_0009, Always),
    state(0x1c4, "IA32_XFD", By(F::Xfd), StateMsr::Xfd),
    state(0x1c5, "IA32_XFD_ERR", By(F::Xfd), StateMsr::XfdErr),
    state(0x277, "IA32_PAT", By(F::Pat), StateMsr::Pat),
    physical(0x6e0, "IA32_TSC_DEADLINE", Thread, 0, u64::MAX, By(F::TscDeadline)),
    state(0xda0, "IA32_XSS", By(F::Xsaves), StateMsr::Xss),
    state(0xc000_0080, "IA32_EFER", Always, StateMsr::Efer),
    state(0xc000_0081, "IA32_STAR", By(F::Syscall), StateMsr::Star),
    state(0xc000_0082, "IA32_LSTAR", By(F::Syscall), StateMsr::Lstar),
    state(0xc000_0083, "IA32_CSTAR", By(F::Syscall), StateMsr::Cstar),
    state(0xc000_0084, "IA32_FMASK", By(F::Syscall), StateMsr::Fmask),
    state(0xc000_0100, "IA32_FS_BASE", By(F::Lm), StateMsr::FsBase),
    state(0xc000_0101, "IA32_GS_BASE", By(F::Lm), StateMsr::GsBase),
    state(0xc000_0102, "IA32_KERNEL_GS_BASE", By(F::Lm), StateMsr::KernelGsBase),
    state(0xc000_0103, "IA32_TSC_AUX", Always, StateMsr::TscAux),
];

/// The row of MSR `index`.
pub fn find(index: u32) -> Option<&'static MsrRow> {
    MSRS.binary_search_by_key(&index, |row| row.index).ok().map(|i| &MSRS[i])
}

/// Whether IA32_PAT can hold `value`: eight memory types, none of them reserved (SDM vol. 3A, table 12-10).
pub fn valid_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorted_and_found() {
        assert!(MSRS.is_sorted_by(|a, b| a.index < b.index));
        for row in MSRS {
            assert_eq!(find(row.index).map(|found| found.name), Some(row.name));
        }
        assert!(find(0x11).is_none());
    }

    #[test]
    fn pat_types() {
        assert!(valid_pat(PAT_RESET) && valid_pat(0x0100_0506_0007_0406));
        assert!(!valid_pat(0x2) && !valid_pat(0x0300_0000_0000_0000) && !valid_pat(0x8));
    }
}
