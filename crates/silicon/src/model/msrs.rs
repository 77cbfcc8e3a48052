//! The model-specific registers of the processor, in one table: what each is called, which of package, core
//! and thread it belongs to, its value after reset, which bits can be written, what enumerates it, and who
//! keeps it. (Intel SDM vol. 4, chapter 2.)

use crate::bus_lock::{core_capabilities, test_ctrl};
use crate::model::Feature;

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
    /// What enumerates it; `None`: every model has it.
    pub feature: Option<Feature>,
    /// Who keeps it.
    pub kept: Kept,
}

const fn state(index: u32, name: &'static str, feature: Option<Feature>, msr: StateMsr) -> MsrRow {
    let reset = if matches!(msr, StateMsr::Pat) { PAT_RESET } else { 0 };
    MsrRow { index, name, scope: Scope::Thread, reset, writable: u64::MAX, feature, kept: Kept::State(msr) }
}

const fn physical(
    index: u32,
    name: &'static str,
    scope: Scope,
    reset: u64,
    writable: u64,
    feature: Option<Feature>,
) -> MsrRow {
    MsrRow { index, name, scope, reset, writable, feature, kept: Kept::Physical }
}

/// MSR_TEST_CTRL, which later manuals call MSR_MEMORY_CTRL.
pub const MSR_TEST_CTRL: u32 = 0x33;

/// IA32_PAT after reset: WB, WT, UC-, UC, twice.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// Bits of MSR_TEST_CTRL that exist.
const TEST_CTRL_WRITABLE: u64 =
    test_ctrl::UC_LOCK_DISABLE | test_ctrl::SPLIT_LOCK_DETECT | test_ctrl::SUPPRESS_LOCK;

/// IA32_CORE_CAPABILITIES of every part that has it.
const CORE_CAPABILITIES: u64 = core_capabilities::UC_LOCK_DISABLE | core_capabilities::SPLIT_LOCK_DETECT;

/// Bits of IA32_SPEC_CTRL that exist: IBRS, STIBP, SSBD, IPRED_DIS_U, IPRED_DIS_S, RRSBA_DIS_U, RRSBA_DIS_S, PSFD, DDPD_U,
/// BHI_DIS_S.
const SPEC_CTRL_WRITABLE: u64 = 0x5ff;

use Feature as F;
use Scope::{Core, Package, Thread};

/// All registers, by number.
pub static MSRS: &[MsrRow] = &[
    state(0x10, "IA32_TIME_STAMP_COUNTER", Some(F::Tsc), StateMsr::Tsc),
    physical(0x1b, "IA32_APIC_BASE", Thread, 0xfee0_0800, 0x000f_ffff_ffff_fd00, Some(F::Apic)),
    physical(MSR_TEST_CTRL, "MSR_TEST_CTRL", Core, 0, TEST_CTRL_WRITABLE, Some(F::CoreCapability)),
    physical(0x3a, "IA32_FEATURE_CONTROL", Thread, 1, 0, None),
    physical(0x3b, "IA32_TSC_ADJUST", Thread, 0, u64::MAX, Some(F::TscAdjust)),
    physical(0x48, "IA32_SPEC_CTRL", Thread, 0, SPEC_CTRL_WRITABLE, Some(F::SpecCtrl)),
    physical(0x8b, "IA32_BIOS_SIGN_ID", Core, 0x1_0000_0000, u64::MAX, None),
    physical(0xce, "MSR_PLATFORM_INFO", Package, 1 << 31, 0, None),
    physical(0xcf, "IA32_CORE_CAPABILITIES", Core, CORE_CAPABILITIES, 0, Some(F::CoreCapability)),
    physical(0xe1, "IA32_UMWAIT_CONTROL", Thread, 0, 0xffff_fffd, Some(F::Waitpkg)),
    physical(0xfe, "IA32_MTRRCAP", Package, 0x508, 0, Some(F::Mtrr)),
    physical(0x10a, "IA32_ARCH_CAPABILITIES", Package, 0, 0, Some(F::ArchCapabilities)),
    physical(0x123, "IA32_MCU_OPT_CTRL", Core, 0, 0b11_1001, None),
    state(0x174, "IA32_SYSENTER_CS", Some(F::Sep), StateMsr::SysenterCs),
    state(0x175, "IA32_SYSENTER_ESP", Some(F::Sep), StateMsr::SysenterEsp),
    state(0x176, "IA32_SYSENTER_EIP", Some(F::Sep), StateMsr::SysenterEip),
    physical(0x1a0, "IA32_MISC_ENABLE", Core, 0x0085_0089, 0x0000_0004_0044_0009, None),
    state(0x1c4, "IA32_XFD", Some(F::Xfd), StateMsr::Xfd),
    state(0x1c5, "IA32_XFD_ERR", Some(F::Xfd), StateMsr::XfdErr),
    state(0x277, "IA32_PAT", Some(F::Pat), StateMsr::Pat),
    physical(0x6e0, "IA32_TSC_DEADLINE", Thread, 0, u64::MAX, Some(F::TscDeadline)),
    state(0xda0, "IA32_XSS", Some(F::Xsaves), StateMsr::Xss),
    state(0xc000_0080, "IA32_EFER", None, StateMsr::Efer),
    state(0xc000_0081, "IA32_STAR", Some(F::Syscall), StateMsr::Star),
    state(0xc000_0082, "IA32_LSTAR", Some(F::Syscall), StateMsr::Lstar),
    state(0xc000_0083, "IA32_CSTAR", Some(F::Syscall), StateMsr::Cstar),
    state(0xc000_0084, "IA32_FMASK", Some(F::Syscall), StateMsr::Fmask),
    state(0xc000_0100, "IA32_FS_BASE", Some(F::Lm), StateMsr::FsBase),
    state(0xc000_0101, "IA32_GS_BASE", Some(F::Lm), StateMsr::GsBase),
    state(0xc000_0102, "IA32_KERNEL_GS_BASE", Some(F::Lm), StateMsr::KernelGsBase),
    state(0xc000_0103, "IA32_TSC_AUX", None, StateMsr::TscAux),
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
