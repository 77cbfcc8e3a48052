//! The registers that KVM knows, one row each.

use silicon::bus_lock::debugctl;
use silicon::model::Feature;
use silicon::model::msrs::{self, Kept, MSR_TEST_CTRL};

use super::{
    CPUID_FAULT, FEATURE_CONTROL_LMCE, FEATURE_CONTROL_LOCKED, FEATURE_CONTROL_SUPPORTED, MISC_ENABLE_EMON,
    MISC_ENABLE_PMU, MsrEnv, MsrState, PLATFORM_INFO_CPUID_FAULT,
};
use super::{async_pf, page_not_present, speculation};
use crate::cpuid::{own, pv};

pub(super) const UCODE_REV: u32 = 0x8b;
pub(super) const CORE_CAPABILITIES: u32 = 0xcf;
pub(super) const ARCH_CAPABILITIES: u32 = 0x10a;
/// IA32_TSX_CTRL.
pub(super) const TSX_CTRL: u32 = 0x122;
/// IA32_MCU_OPT_CTRL.
pub(crate) const MCU_OPT_CTRL: u32 = 0x123;
pub(super) const PERF_CAPABILITIES: u32 = 0x345;

/// Registers that are one stored value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    TestControl,
    SmiCount,
    FeatureControl,
    TscAdjust,
    SpecCtrl,
    UcodeRevision,
    Smbase,
    PlatformInfo,
    CoreCapabilities,
    UmwaitControl,
    ArchCapabilities,
    TsxControl,
    McuOptControl,
    MiscFeatures,
    MiscEnable,
    PowerControl,
    PerfCapabilities,
    HardwareConfiguration,
    SystemTime,
    WallClock,
    StealTime,
    PollControl,
    AsyncPfEnable,
    AsyncPfInterrupt,
    PnpVectors,
    PnpRing,
    PnpData,
    PnpRequest,
}

impl Slot {
    pub(super) const COUNT: usize = Slot::PnpRequest as usize + 1;
}

type ReadCall = fn(&MsrState, u32, bool, &mut dyn MsrEnv) -> Option<u64>;
type WriteCall = fn(&mut MsrState, u32, u64, bool, &mut dyn MsrEnv) -> bool;

/// What a read does.
#[derive(Clone, Copy)]
pub(super) enum Read {
    /// Not supported.
    No,
    /// The stored value.
    Slot(Slot),
    /// The stored value, for the client only.
    Host(Slot),
    /// Always this.
    Value(u64),
    /// Something else: state, register, from the client. `None`: refused.
    Call(ReadCall),
}

/// What a write does.
#[derive(Clone, Copy)]
pub(super) enum Write {
    /// Not supported.
    No,
    /// Nothing.
    Ignore,
    /// Stores, for the client only.
    Host(Slot),
    /// Stores the client's value; the guest's is ignored.
    HostElseIgnore(Slot),
    /// Stores a value that has no other bits.
    Bits(Slot, u64),
    /// Something else: state, register, value, from the client. False: refused.
    Call(WriteCall),
}

/// A register, or a range of them that are alike.
pub(super) struct Row {
    pub(super) first: u32,
    pub(super) last: u32,
    #[cfg_attr(not(test), expect(dead_code, reason = "names are for readers and tests"))]
    pub(super) name: &'static str,
    pub(super) read: Read,
    pub(super) write: Write,
    /// The guest must have it.
    pub(super) feature: Option<Feature>,
    /// The guest must be told of this paravirtual feature; without it the register does not exist.
    pub(super) pv: Option<u8>,
    /// Likewise of these features of ring3's own; the client has the register all the same.
    pub(super) own: u32,
    /// KVM_GET_MSR_INDEX_LIST has it.
    pub(super) listed: bool,
    /// It exists where split-lock detection is offered.
    pub(super) split_lock: bool,
}

const fn row(index: u32, name: &'static str, read: Read, write: Write) -> Row {
    range(index, index, name, read, write)
}

const fn range(first: u32, last: u32, name: &'static str, read: Read, write: Write) -> Row {
    Row { first, last, name, read, write, feature: None, pv: None, own: 0, listed: false, split_lock: false }
}

const fn slot(index: u32, name: &'static str, slot: Slot) -> Row {
    row(index, name, Read::Slot(slot), Write::Bits(slot, u64::MAX))
}

impl Row {
    const fn needs(mut self, feature: Feature) -> Row {
        self.feature = Some(feature);
        self
    }
    const fn pv(mut self, bit: u8) -> Row {
        self.pv = Some(bit);
        self
    }
    const fn own(mut self, bits: u32) -> Row {
        self.own = bits;
        self
    }
    const fn split_lock(mut self) -> Row {
        self.split_lock = true;
        self
    }
    const fn listed(mut self) -> Row {
        self.listed = true;
        self
    }
}

/// Reads zero, writes do nothing.
const fn quiet(first: u32, last: u32, name: &'static str) -> Row {
    range(first, last, name, Read::Value(0), Write::Ignore)
}

/// Reads zero, writes are not supported.
const fn zero(first: u32, last: u32, name: &'static str) -> Row {
    range(first, last, name, Read::Value(0), Write::No)
}

const MCE_READ: Read = Read::Call(|state, index, host, _| state.mce.read(index, host));
/// IA32_MCG_EXT_CTL: the guest needs IA32_FEATURE_CONTROL.LMCE for it.
const LMCE_READ: Read = Read::Call(|state, index, host, _| {
    state.mce.read(index, host || state.get(Slot::FeatureControl) & FEATURE_CONTROL_LMCE != 0)
});
const LMCE_WRITE: Write = Write::Call(|state, index, value, host, _| {
    state.mce.write(index, value, host || state.get(Slot::FeatureControl) & FEATURE_CONTROL_LMCE != 0)
});
const MCE_WRITE: Write = Write::Call(|state, index, value, host, _| state.mce.write(index, value, host));
const MTRR_READ: Read = Read::Call(|state, index, _, _| state.mtrrs.read(index));
const MTRR_WRITE: Write = Write::Call(|state, index, value, _, env| {
    let physical = env.features().physical_mask();
    state.mtrrs.write(index, value, physical)
});

/// Sorted by number.
static ROWS: &[Row] = &[
    zero(0x0, 0x1, "IA32_P5_MC_ADDR, IA32_P5_MC_TYPE"),
    row(0x11, "MSR_KVM_WALL_CLOCK", Read::Slot(Slot::WallClock), Write::Call(write_wall_clock))
        .pv(pv::CLOCKSOURCE)
        .listed(),
    row(0x12, "MSR_KVM_SYSTEM_TIME", Read::Slot(Slot::SystemTime), Write::Call(write_system_time))
        .pv(pv::CLOCKSOURCE)
        .listed(),
    zero(0x17, 0x17, "IA32_PLATFORM_ID"),
    row(
        0x1b,
        "IA32_APIC_BASE",
        Read::Call(|_, _, _, env| Some(env.apic_base())),
        Write::Call(|_, _, value, host, env| env.set_apic_base(value, host)),
    ),
    zero(0x2a, 0x2a, "MSR_EBL_CR_POWERON"),
    row(0x2c, "MSR_EBC_FREQUENCY_ID", Read::Value(1 << 24), Write::No),
    row(MSR_TEST_CTRL, "MSR_TEST_CTRL", Read::Slot(Slot::TestControl), Write::Call(write_test_control))
        .needs(Feature::CoreCapability)
        .split_lock()
        .listed(),
    row(0x34, "MSR_SMI_COUNT", Read::Slot(Slot::SmiCount), Write::Host(Slot::SmiCount)).listed(),
    row(0x3a, "IA32_FEATURE_CONTROL", Read::Slot(Slot::FeatureControl), Write::Call(write_feature_control))
        .listed(),
    row(0x3b, "IA32_TSC_ADJUST", Read::Slot(Slot::TscAdjust), Write::Call(write_tsc_adjust)).listed(),
    row(
        msrs::SPEC_CTRL,
        "IA32_SPEC_CTRL",
        Read::Call(|state, _, host, env| (spec_ctrl_bits(host, env) != 0).then(|| state.get(Slot::SpecCtrl))),
        Write::Call(write_spec_ctrl),
    )
    .listed(),
    row(msrs::PRED_CMD, "IA32_PRED_CMD", Read::No, Write::Call(write_command)).needs(Feature::SpecCtrl),
    row(0x79, "IA32_BIOS_UPDT_TRIG", Read::No, Write::Ignore),
    row(
        UCODE_REV,
        "IA32_BIOS_SIGN_ID",
        Read::Slot(Slot::UcodeRevision),
        Write::HostElseIgnore(Slot::UcodeRevision),
    )
    .listed(),
    row(0x9e, "IA32_SMBASE", Read::Host(Slot::Smbase), Write::Host(Slot::Smbase)).listed(),
    quiet(0xc1, 0xc2, "MSR_P6_PERFCTR0, 1"),
    row(0xcd, "MSR_FSB_FREQ", Read::Value(3), Write::No),
    row(0xce, "MSR_PLATFORM_INFO", Read::Slot(Slot::PlatformInfo), Write::Call(write_platform_info)).listed(),
    row(
        CORE_CAPABILITIES,
        "IA32_CORE_CAPABILITIES",
        Read::Slot(Slot::CoreCapabilities),
        Write::Call(write_core_capabilities),
    )
    .needs(Feature::CoreCapability)
    .split_lock()
    .listed(),
    row(
        0xe1,
        "IA32_UMWAIT_CONTROL",
        Read::Slot(Slot::UmwaitControl),
        Write::Bits(Slot::UmwaitControl, 0xffff_fffd),
    )
    .needs(Feature::Waitpkg)
    .listed(),
    row(0xfe, "IA32_MTRRCAP", MTRR_READ, Write::No),
    row(
        ARCH_CAPABILITIES,
        "IA32_ARCH_CAPABILITIES",
        Read::Slot(Slot::ArchCapabilities),
        Write::Call(write_arch_capabilities),
    )
    .needs(Feature::ArchCapabilities)
    .listed(),
    row(msrs::FLUSH_CMD, "IA32_FLUSH_CMD", Read::No, Write::Call(write_command)).needs(Feature::FlushL1d),
    row(0x11e, "MSR_BBL_CR_CTL3", Read::Value(0xbe70_2111), Write::Ignore),
    row(
        TSX_CTRL,
        "IA32_TSX_CTRL",
        Read::Call(|state, _, host, env| state.tsx_ctrl_exists(host, env).then(|| state.tsx_ctrl())),
        Write::Call(write_tsx_ctrl),
    )
    .listed(),
    row(
        MCU_OPT_CTRL,
        "IA32_MCU_OPT_CTRL",
        Read::Call(|state, _, host, env| {
            let bits = state.mcu_opt_ctrl_bits(host, env);
            (bits != 0).then(|| state.mcu_opt_ctrl() & bits)
        }),
        Write::Call(write_mcu_opt_ctrl),
    )
    .listed(),
    row(0x140, "MSR_MISC_FEATURES_ENABLES", Read::Slot(Slot::MiscFeatures), Write::Call(write_misc_features))
        .listed(),
    row(0x179, "IA32_MCG_CAP", MCE_READ, Write::No),
    range(0x17a, 0x17b, "IA32_MCG_STATUS, IA32_MCG_CTL", MCE_READ, MCE_WRITE).listed(),
    quiet(0x186, 0x187, "MSR_P6_EVNTSEL0, 1"),
    // The values of a 1 GHz part that runs at four times its bus.
    row(0x198, "IA32_PERF_STATUS", Read::Value(1000 | 4 << 40), Write::No),
    zero(0x199, 0x199, "IA32_PERF_CTL"),
    row(0x1a0, "IA32_MISC_ENABLE", Read::Slot(Slot::MiscEnable), Write::Call(write_misc_enable)).listed(),
    row(
        0x1d9,
        "IA32_DEBUGCTL",
        Read::Call(|_, _, _, env| Some(*env.debugctl())),
        Write::Call(write_debug_control),
    )
    .listed(),
    zero(0x1db, 0x1de, "MSR_LASTBRANCHFROMIP to MSR_LASTINTTOIP").listed(),
    slot(0x1fc, "MSR_POWER_CTL", Slot::PowerControl).listed(),
    range(0x200, 0x26f, "IA32_MTRR_PHYSBASE0 to IA32_MTRR_FIX4K_F8000", MTRR_READ, MTRR_WRITE),
    range(0x280, 0x29f, "IA32_MC0_CTL2 to IA32_MC31_CTL2", MCE_READ, MCE_WRITE),
    row(0x2ff, "IA32_MTRR_DEF_TYPE", MTRR_READ, MTRR_WRITE),
    // There is no performance unit.
    row(
        PERF_CAPABILITIES,
        "IA32_PERF_CAPABILITIES",
        Read::Slot(Slot::PerfCapabilities),
        Write::Call(|_, _, value, host, _| host && value == 0),
    )
    .needs(Feature::Pdcm)
    .listed(),
    range(0x400, 0x47f, "IA32_MC0_CTL to IA32_MC31_MISC", MCE_READ, MCE_WRITE),
    row(0x4d0, "IA32_MCG_EXT_CTL", LMCE_READ, LMCE_WRITE).listed(),
    zero(0x606, 0x606, "MSR_RAPL_POWER_UNIT"),
    zero(0x611, 0x611, "MSR_PKG_ENERGY_STATUS"),
    zero(0x619, 0x619, "MSR_DRAM_ENERGY_STATUS"),
    zero(0x639, 0x639, "MSR_PP0_ENERGY_STATUS"),
    zero(0x641, 0x641, "MSR_PP1_ENERGY_STATUS"),
    row(
        0x6e0,
        "IA32_TSC_DEADLINE",
        Read::Call(|_, _, _, env| Some(env.tsc_deadline())),
        Write::Call(|_, _, value, _, env| {
            env.set_tsc_deadline(value);
            true
        }),
    )
    .listed(),
    range(
        0x800,
        0x8ff,
        "x2APIC",
        Read::Call(|_, index, _, env| env.x2apic(index)),
        Write::Call(|_, index, value, _, env| env.set_x2apic(index, value)),
    ),
    row(0x4b56_4d00, "MSR_KVM_WALL_CLOCK_NEW", Read::Slot(Slot::WallClock), Write::Call(write_wall_clock))
        .pv(pv::CLOCKSOURCE2)
        .listed(),
    row(0x4b56_4d01, "MSR_KVM_SYSTEM_TIME_NEW", Read::Slot(Slot::SystemTime), Write::Call(write_system_time))
        .pv(pv::CLOCKSOURCE2)
        .listed(),
    row(
        async_pf::ENABLE,
        "MSR_KVM_ASYNC_PF_EN",
        Read::Slot(Slot::AsyncPfEnable),
        Write::Call(async_pf::write_enable),
    )
    .pv(pv::ASYNC_PF)
    .listed(),
    row(
        0x4b56_4d03,
        "MSR_KVM_STEAL_TIME",
        Read::Slot(Slot::StealTime),
        // Bits 5:1 are reserved.
        Write::Bits(Slot::StealTime, !0x3e),
    )
    .pv(pv::STEAL_TIME)
    .listed(),
    row(
        0x4b56_4d05,
        "MSR_KVM_POLL_CONTROL",
        Read::Slot(Slot::PollControl),
        Write::Bits(Slot::PollControl, 1),
    )
    .pv(pv::POLL_CONTROL)
    .listed(),
    row(
        async_pf::INTERRUPT,
        "MSR_KVM_ASYNC_PF_INT",
        Read::Slot(Slot::AsyncPfInterrupt),
        Write::Call(async_pf::write_interrupt),
    )
    .pv(pv::ASYNC_PF_INT)
    .listed(),
    // Bit 0; what comes of it is the vCPU's.
    row(async_pf::ACKNOWLEDGE, "MSR_KVM_ASYNC_PF_ACK", Read::Value(0), Write::Call(|_, _, _, _, _| true))
        .pv(pv::ASYNC_PF_INT)
        .listed(),
    row(
        page_not_present::VECTORS,
        "PNP_VECTORS",
        Read::Slot(Slot::PnpVectors),
        Write::Call(page_not_present::write_vectors),
    )
    .own(own::PAGE_NOT_PRESENT)
    .listed(),
    row(
        page_not_present::RING,
        "PNP_RING",
        Read::Slot(Slot::PnpRing),
        Write::Call(page_not_present::write_ring),
    )
    .own(own::PAGE_NOT_PRESENT)
    .listed(),
    row(
        page_not_present::DATA,
        "PNP_DATA",
        Read::Slot(Slot::PnpData),
        Write::Call(page_not_present::write_data),
    )
    .own(own::PAGE_NOT_PRESENT)
    .listed(),
    row(
        page_not_present::REQUEST,
        "PNP_REQUEST",
        Read::Slot(Slot::PnpRequest),
        Write::Call(page_not_present::write_request),
    )
    .own(own::PAGE_NOT_PRESENT)
    .listed(),
    // AMD's, which KVM answers on Intel too.
    quiet(0xc001_0000, 0xc001_0007, "K7_EVNTSEL0 to 3, K7_PERFCTR0 to 3"),
    zero(0xc001_0010, 0xc001_0010, "SYSCFG"),
    row(0xc001_0015, "HWCR", Read::Slot(Slot::HardwareConfiguration), Write::Call(write_hwcr)).listed(),
    row(0xc001_001b, "K7_CLK_CTL", Read::Value(0x2000_0000), Write::Ignore),
    quiet(0xc001_001f, 0xc001_001f, "NB_CFG"),
    row(0xc001_0020, "PATCH_LOADER", Read::No, Write::Ignore),
    zero(0xc001_0055, 0xc001_0055, "INT_PENDING_MSG"),
    row(0xc001_0058, "MMIO_CONF_BASE", Read::Value(0), Write::Call(|_, _, value, _, _| value == 0)),
    zero(0xc001_0112, 0xc001_0113, "TSEG_ADDR, TSEG_MASK"),
    quiet(0xc001_0117, 0xc001_0117, "VM_HSAVE_PA"),
    quiet(0xc001_1022, 0xc001_1023, "DC_CFG, TW_CFG"),
    quiet(0xc001_102a, 0xc001_102a, "BU_CFG2"),
    quiet(0xc001_102c, 0xc001_102c, "F15H_EX_CFG"),
];

/// All rows.
pub(super) fn rows() -> &'static [Row] {
    ROWS
}

/// The row that has `index`.
pub(super) fn find(index: u32) -> Option<&'static Row> {
    let at = ROWS.partition_point(|row| row.last < index);
    ROWS.get(at).filter(|row| row.first <= index)
}

/// Whether KVM_GET_MSR_INDEX_LIST can have `index`.
pub(super) fn advertised(index: u32) -> bool {
    super::state_msr(index).is_some() || find(index).is_some_and(|row| row.listed)
}

fn write_wall_clock(state: &mut MsrState, _: u32, value: u64, _: bool, _: &mut dyn MsrEnv) -> bool {
    state.put(Slot::WallClock, value);
    state.wall_clock_changed = true;
    true
}

fn write_system_time(state: &mut MsrState, _: u32, value: u64, _: bool, _: &mut dyn MsrEnv) -> bool {
    state.put(Slot::SystemTime, value);
    state.clock_changed = true;
    true
}

fn write_feature_control(state: &mut MsrState, _: u32, value: u64, host: bool, _: &mut dyn MsrEnv) -> bool {
    let locked = state.get(Slot::FeatureControl) & FEATURE_CONTROL_LOCKED != 0;
    let lmce = if state.mce.has_lmce() { FEATURE_CONTROL_LMCE } else { 0 };
    let valid = if host { FEATURE_CONTROL_SUPPORTED } else { FEATURE_CONTROL_LOCKED | lmce };
    let allowed = (host || !locked) && value & !valid == 0;
    if allowed {
        state.put(Slot::FeatureControl, value);
    }
    allowed
}

/// The guest's write moves the counter by as much; the client's only sets the register.
fn write_tsc_adjust(state: &mut MsrState, _: u32, value: u64, host: bool, env: &mut dyn MsrEnv) -> bool {
    if env.features().has(Feature::TscAdjust) {
        if !host {
            env.shift_tsc(value.wrapping_sub(state.get(Slot::TscAdjust)));
            state.clock_changed = true;
        }
        state.put(Slot::TscAdjust, value);
    }
    true
}

/// IA32_PRED_CMD, IA32_FLUSH_CMD: a guest's command clears what the processor says that it does; a client's is nothing to do.
fn write_command(_: &mut MsrState, index: u32, value: u64, host: bool, env: &mut dyn MsrEnv) -> bool {
    let clears = msrs::find(index).map(|row| row.kept);
    if let (Some(Kept::Command(clears)), 1, false) = (clears, value, host) {
        env.clear_buffers(clears);
    }
    value & !1 == 0
}

/// Bits of IA32_SPEC_CTRL that can be written; without any there is no such register (SDM vol. 4, table 2-2).
fn spec_ctrl_bits(host: bool, env: &dyn MsrEnv) -> u64 {
    if host {
        msrs::defined_bits(msrs::SPEC_CTRL)
    } else {
        msrs::enumerated_bits(msrs::SPEC_CTRL, env.features(), 0)
    }
}

/// Each bit as far as the guest has it; the kernel asks what the host has.
fn write_spec_ctrl(state: &mut MsrState, _: u32, value: u64, host: bool, env: &mut dyn MsrEnv) -> bool {
    let bits = spec_ctrl_bits(host, env);
    let valid = bits != 0 && value & !bits == 0;
    if valid {
        state.put(Slot::SpecCtrl, value);
    }
    valid
}

/// What the client may set: what only tells the guest something, and what enumerates registers that there are.
fn write_arch_capabilities(state: &mut MsrState, _: u32, value: u64, host: bool, _: &mut dyn MsrEnv) -> bool {
    let valid = host && value & !speculation::SETTABLE == 0;
    if valid {
        state.put(Slot::ArchCapabilities, value);
    }
    valid
}

fn write_tsx_ctrl(state: &mut MsrState, _: u32, value: u64, host: bool, env: &mut dyn MsrEnv) -> bool {
    let bits = msrs::tsx_ctrl::RTM_DISABLE | msrs::tsx_ctrl::CPUID_CLEAR;
    let valid = state.tsx_ctrl_exists(host, env) && value & !bits == 0;
    if valid {
        state.put(Slot::TsxControl, value);
    }
    valid
}

fn write_mcu_opt_ctrl(state: &mut MsrState, _: u32, value: u64, host: bool, env: &mut dyn MsrEnv) -> bool {
    let bits = state.mcu_opt_ctrl_bits(host, env);
    let valid = bits != 0 && value & !bits == 0;
    if valid {
        state.put(Slot::McuOptControl, value);
    }
    valid
}

/// CPUID faulting cannot be taken away while it is enabled.
fn write_platform_info(state: &mut MsrState, _: u32, value: u64, host: bool, _: &mut dyn MsrEnv) -> bool {
    let allowed = host && (value & PLATFORM_INFO_CPUID_FAULT != 0 || !state.cpuid_faulting());
    if allowed {
        state.put(Slot::PlatformInfo, value);
    }
    allowed
}

fn write_misc_features(state: &mut MsrState, _: u32, value: u64, _: bool, _: &mut dyn MsrEnv) -> bool {
    let supported = state.get(Slot::PlatformInfo) & PLATFORM_INFO_CPUID_FAULT != 0;
    let allowed = value & !CPUID_FAULT == 0 && (supported || value == 0);
    if allowed {
        state.put(Slot::MiscFeatures, value);
    }
    allowed
}

fn write_misc_enable(state: &mut MsrState, _: u32, value: u64, host: bool, _: &mut dyn MsrEnv) -> bool {
    let old = state.get(Slot::MiscEnable);
    let allowed = host || (old ^ value) & MISC_ENABLE_PMU == 0;
    if allowed {
        let kept = if host { 0 } else { MISC_ENABLE_EMON };
        state.put(Slot::MiscEnable, value & !kept | old & kept);
    }
    allowed
}

/// What the guest writes is kept; [`crate::vcpu`] makes of it what the host allows.
fn write_test_control(state: &mut MsrState, _: u32, value: u64, _: bool, _: &mut dyn MsrEnv) -> bool {
    let valid = value & !state.test_ctrl_bits() == 0;
    if valid {
        state.put(Slot::TestControl, value);
    }
    valid
}

/// The client may take capabilities away. What they enumerated is off then.
fn write_core_capabilities(state: &mut MsrState, _: u32, value: u64, host: bool, _: &mut dyn MsrEnv) -> bool {
    let valid = host && value & !state.core_capabilities_offered == 0;
    if valid {
        state.put(Slot::CoreCapabilities, value);
        let bits = state.test_ctrl_bits();
        state.put(Slot::TestControl, state.get(Slot::TestControl) & bits);
    }
    valid
}

/// BLD alone is supported, where the guest has it. Last-branch records and branch single-stepping are accepted and dropped,
/// as KVM does for old kernels (kernel: `vmx_get_supported_debugctl`).
fn write_debug_control(_: &mut MsrState, _: u32, value: u64, host: bool, env: &mut dyn MsrEnv) -> bool {
    let bld = host || env.features().has(Feature::BusLockDetect);
    let supported = if bld { debugctl::BUS_LOCK_DETECT } else { 0 };
    let valid = value & !(supported | 0b11) == 0;
    if valid {
        *env.debugctl() = value & supported;
    }
    valid
}

/// McStatusWrEn and TscFreqSel can be set; three others are ignored.
fn write_hwcr(state: &mut MsrState, _: u32, value: u64, _: bool, _: &mut dyn MsrEnv) -> bool {
    let value = value & !(1 << 3 | 1 << 6 | 1 << 8);
    let allowed = value & !(1 << 18 | 1 << 24) == 0;
    if allowed {
        state.put(Slot::HardwareConfiguration, value);
    }
    allowed
}
