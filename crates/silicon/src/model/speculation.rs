//! Which speculation bugs real parts have, and what their IA32_ARCH_CAPABILITIES and CPUID say of them.
//!
//! These are facts of a *host* that somebody chooses to look at. What ring3's own guests are told is another matter: the processor
//! underneath does not speculate ([`CpuModel::arch_capabilities`](crate::model::CpuModel::arch_capabilities)).
//!
//! Bug lists are Intel's list of affected processors, as the kernel keeps it (`cpu_vuln_whitelist`, `cpu_vuln_blacklist` and
//! `cpu_set_bug_bits` in arch/x86/kernel/cpu/common.c). Values of the register are put together bit by bit, for microcode of 2024
//! or later: they agree with the bug lists, but have been neither read on the parts nor checked against a dump of one. Bits that
//! only enumerate registers (10 to 12, 21, 23) are the least certain.

use crate::model::{Feature, FeatureSet};

/// Bits of IA32_ARCH_CAPABILITIES, MSR 10AH (SDM vol. 4, table 2-2).
pub mod arch_cap {
    macro_rules! bits {
        ($($(#[$doc:meta])* $name:ident $bit:literal;)*) => {
            $($(#[$doc])* pub const $name: u64 = 1 << $bit;)*

            /// All of them with their names, the lowest first.
            pub static NAMES: &[(u64, &str)] = &[$(($name, stringify!($name))),*];
        };
    }

    bits! {
        /// No rogue data cache load (Meltdown), no L1 terminal fault.
        RDCL_NO 0;
        /// Enhanced IBRS.
        IBRS_ALL 1;
        /// RET may take its target from another predictor than the return-stack buffer.
        RSBA 2;
        /// A hypervisor need not flush the L1 data cache at VM entry.
        SKIP_L1DFL_VMENTRY 3;
        /// No speculative store bypass.
        SSB_NO 4;
        /// No microarchitectural data sampling.
        MDS_NO 5;
        /// No machine check when a page changes its size.
        IF_PSCHANGE_MC_NO 6;
        /// IA32_TSX_CTRL exists.
        TSX_CTRL 7;
        /// No TSX asynchronous abort.
        TAA_NO 8;
        /// IA32_MCU_CONTROL exists.
        MCU_CONTROL 9;
        /// IA32_MISC_PACKAGE_CTLS exists.
        MISC_PACKAGE_CTLS 10;
        /// IA32_MISC_PACKAGE_CTLS.ENERGY_FILTERING_ENABLE can be written.
        ENERGY_FILTERING_CTL 11;
        /// Data-operand-independent timing can be switched on.
        DOITM 12;
        /// No shared-buffers data read, no sideband stale-data propagator.
        SBDR_SSDP_NO 13;
        /// No fill-buffer stale-data propagator.
        FBSDP_NO 14;
        /// No primary stale-data propagator.
        PSDP_NO 15;
        /// VERW overwrites fill buffers whatever MDS_NO says.
        FB_CLEAR 17;
        /// IA32_MCU_OPT_CTRL.FB_CLEAR_DIS exists.
        FB_CLEAR_CTRL 18;
        /// RSBA's behaviour can be restricted.
        RRSBA 19;
        /// No branch-history injection.
        BHI_NO 20;
        /// IA32_XAPIC_DISABLE_STATUS exists.
        XAPIC_DISABLE_STATUS 21;
        /// IA32_OVERCLOCKING_STATUS exists.
        OVERCLOCKING_STATUS 23;
        /// No post-barrier return-stack-buffer predictions.
        PBRSB_NO 24;
        /// IA32_MCU_OPT_CTRL.GDS_MITG_DIS and GDS_MITG_LOCKED exist.
        GDS_CTRL 25;
        /// No gather data sampling.
        GDS_NO 26;
        /// No register-file data sampling.
        RFDS_NO 27;
        /// VERW clears the register file.
        RFDS_CLEAR 28;
        /// No indirect target selection. No part sets it: hypervisors do, to say so to guests.
        ITS_NO 62;
    }

    /// The three that together say that there is no MMIO stale data.
    pub const MMIO_IMMUNE: u64 = SBDR_SSDP_NO | FBSDP_NO | PSDP_NO;

    /// The names of the bits of `value`; of those without a name the number.
    pub fn names(value: u64) -> Vec<String> {
        let name =
            |bit: u64| NAMES.iter().find(|(known, _)| *known == bit).map(|(_, name)| (*name).to_string());
        let bits = (0..64).filter(|n| value >> n & 1 != 0);
        bits.map(|n| name(1 << n).unwrap_or_else(|| format!("bit {n}"))).collect()
    }
}

macro_rules! bugs {
    ($($(#[$doc:meta])* $bug:ident $name:literal;)*) => {
        /// A speculation bug, or what limits one.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Bug {
            $($(#[$doc])* $bug,)*
        }

        impl Bug {
            /// All of them, with the kernel's names.
            pub const NAMES: &[(Bug, &str)] = &[$((Bug::$bug, $name)),*];
        }
    };
}

bugs! {
    /// Bounds-check bypass.
    SpectreV1 "spectre_v1";
    /// Branch-target injection.
    SpectreV2 "spectre_v2";
    /// Speculative store bypass.
    SpecStoreBypass "spec_store_bypass";
    /// SWAPGS as a Spectre v1 gadget.
    Swapgs "swapgs";
    /// Rogue data cache load.
    Meltdown "cpu_meltdown";
    /// L1 terminal fault.
    L1tf "l1tf";
    /// Microarchitectural data sampling.
    Mds "mds";
    /// TSX asynchronous abort.
    Taa "taa";
    /// Special-register buffer data sampling, or shared-buffers data sampling, which is treated the same.
    Srbds "srbds";
    /// Machine check when the size of an executable page changes.
    ItlbMultihit "itlb_multihit";
    /// Processor MMIO stale data.
    MmioStaleData "mmio_stale_data";
    /// Processor MMIO stale data by shared buffers.
    MmioSbds "mmio_sbds";
    /// RET predicted from the branch-target buffer.
    Retbleed "retbleed";
    /// Enhanced IBRS leaves a prediction behind a VM exit.
    EibrsPbrsb "eibrs_pbrsb";
    /// Gather data sampling.
    Gds "gds";
    /// Register-file data sampling.
    Rfds "rfds";
    /// Branch-history injection.
    Bhi "bhi";
    /// Indirect target selection.
    Its "its";
    /// Indirect target selection does not cross from guest to host.
    ItsNativeOnly "its_native_only";
    /// Branch predictions of a guest that its user-space VMM is subject to.
    Vmscape "vmscape";
}

/// A set of bugs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bugs(u32);

impl Bugs {
    /// None.
    pub const NONE: Bugs = Bugs(0);

    /// Those of `bugs`.
    pub const fn of(bugs: &[Bug]) -> Bugs {
        let (mut set, mut i) = (0, 0);
        while i < bugs.len() {
            set |= 1 << bugs[i] as u32;
            i += 1;
        }
        Bugs(set)
    }

    /// Whether `bug` is one of them.
    pub const fn has(self, bug: Bug) -> bool {
        self.0 & 1 << bug as u32 != 0
    }

    /// The kernel's names of them.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Bug::NAMES.iter().filter(move |(bug, _)| self.has(*bug)).map(|(_, name)| *name)
    }

    /// Those of both.
    pub const fn union(self, other: Bugs) -> Bugs {
        Bugs(self.0 | other.0)
    }
}

/// What one part is subject to and how it says so.
#[derive(Debug)]
pub struct SpeculationRow {
    /// Name on the command line.
    pub name: &'static str,
    /// Model number of family 6.
    pub model: u8,
    /// The steppings that the row is of.
    pub steppings: std::ops::RangeInclusive<u8>,
    /// What it has.
    pub bugs: Bugs,
    /// IA32_ARCH_CAPABILITIES.
    pub arch_capabilities: u64,
    /// CPUID bits that concern speculation and its control, with the transactional memory of the part.
    pub cpuid: FeatureSet,
}

use Feature as F;
use arch_cap::*;

/// CPUID bits that tell of controls for speculation.
pub const CONTROLS: FeatureSet = EVERYWHERE.union(FeatureSet::of(&[
    F::SrbdsCtrl,
    F::Psfd,
    F::IpredCtrl,
    F::RrsbaCtrl,
    F::DdpdU,
    F::BhiCtrl,
    F::McdtNo,
]));

/// CPUID of every part here.
const EVERYWHERE: FeatureSet =
    FeatureSet::of(&[F::SpecCtrl, F::Stibp, F::Ssbd, F::FlushL1d, F::MdClear, F::ArchCapabilities]);

/// Bugs of every part here.
const COMMON: Bugs = Bugs::of(&[Bug::SpectreV1, Bug::SpectreV2, Bug::SpecStoreBypass, Bug::Swapgs]);

/// What every part since Cascade Lake says.
const FIXED_2019: u64 = RDCL_NO | IBRS_ALL | SKIP_L1DFL_VMENTRY | MDS_NO;

const SKYLAKE_BUGS: Bugs = COMMON.union(Bugs::of(&[
    Bug::Meltdown,
    Bug::L1tf,
    Bug::Mds,
    Bug::Taa,
    Bug::ItlbMultihit,
    Bug::MmioStaleData,
    Bug::Retbleed,
    Bug::Gds,
    Bug::Vmscape,
]));

const CASCADE_LAKE_BUGS: Bugs = COMMON.union(Bugs::of(&[
    Bug::Taa,
    Bug::ItlbMultihit,
    Bug::MmioStaleData,
    Bug::Retbleed,
    Bug::EibrsPbrsb,
    Bug::Gds,
    Bug::Bhi,
    Bug::Its,
    Bug::Vmscape,
]));

const ICE_LAKE_BUGS: Bugs = COMMON.union(Bugs::of(&[
    Bug::MmioStaleData,
    Bug::EibrsPbrsb,
    Bug::Gds,
    Bug::Bhi,
    Bug::Its,
    Bug::ItsNativeOnly,
]));

const TREMONT_BUGS: Bugs = COMMON.union(Bugs::of(&[Bug::MmioStaleData, Bug::Rfds, Bug::Bhi]));
const TREMONT_CAPABILITIES: u64 = FIXED_2019 | IF_PSCHANGE_MC_NO | TAA_NO | FB_CLEAR | RFDS_CLEAR;

/// What the two newest share.
const SPR_ADL_BUGS: Bugs = COMMON.union(Bugs::of(&[Bug::EibrsPbrsb, Bug::Bhi, Bug::Vmscape]));
const SPR_ADL_CAPABILITIES: u64 =
    FIXED_2019 | IF_PSCHANGE_MC_NO | TAA_NO | DOITM | MMIO_IMMUNE | FB_CLEAR | RRSBA | GDS_NO;

/// The parts.
pub static PARTS: &[SpeculationRow] = &[
    SpeculationRow {
        name: "skylake-sp",
        model: 85,
        steppings: 0..=5,
        bugs: SKYLAKE_BUGS,
        arch_capabilities: RSBA | MISC_PACKAGE_CTLS | ENERGY_FILTERING_CTL | GDS_CTRL | RFDS_NO,
        cpuid: EVERYWHERE.union(FeatureSet::of(&[F::Rtm, F::Hle])),
    },
    SpeculationRow {
        name: "cascade-lake",
        model: 85,
        steppings: 6..=7,
        bugs: CASCADE_LAKE_BUGS,
        arch_capabilities: FIXED_2019
            | TSX_CTRL
            | MISC_PACKAGE_CTLS
            | ENERGY_FILTERING_CTL
            | FB_CLEAR
            | RRSBA
            | GDS_CTRL
            | RFDS_NO,
        cpuid: EVERYWHERE.union(FeatureSet::of(&[F::Rtm, F::Hle])),
    },
    SpeculationRow {
        name: "ice-lake-sp",
        model: 106,
        steppings: 0..=15,
        bugs: ICE_LAKE_BUGS,
        arch_capabilities: FIXED_2019
            | IF_PSCHANGE_MC_NO
            | TAA_NO
            | MISC_PACKAGE_CTLS
            | ENERGY_FILTERING_CTL
            | DOITM
            | FB_CLEAR
            | FB_CLEAR_CTRL
            | RRSBA
            | GDS_CTRL
            | RFDS_NO,
        cpuid: EVERYWHERE.union(FeatureSet::of(&[F::Rtm, F::Hle])),
    },
    SpeculationRow {
        name: "tremont-d",
        model: 134,
        steppings: 0..=15,
        bugs: TREMONT_BUGS,
        arch_capabilities: TREMONT_CAPABILITIES,
        cpuid: EVERYWHERE,
    },
    SpeculationRow {
        name: "tremont",
        model: 150,
        steppings: 0..=15,
        bugs: TREMONT_BUGS.union(Bugs::of(&[Bug::Srbds, Bug::MmioSbds])),
        arch_capabilities: TREMONT_CAPABILITIES,
        cpuid: EVERYWHERE.union(FeatureSet::of(&[F::SrbdsCtrl])),
    },
    SpeculationRow {
        name: "alder-lake",
        model: 151,
        steppings: 0..=15,
        bugs: SPR_ADL_BUGS.union(Bugs::of(&[Bug::Rfds])),
        arch_capabilities: SPR_ADL_CAPABILITIES | RFDS_CLEAR | OVERCLOCKING_STATUS,
        cpuid: EVERYWHERE.union(FeatureSet::of(&[F::RrsbaCtrl, F::BhiCtrl])),
    },
    SpeculationRow {
        name: "sapphire-rapids",
        model: 143,
        steppings: 0..=15,
        bugs: SPR_ADL_BUGS,
        arch_capabilities: SPR_ADL_CAPABILITIES
            | TSX_CTRL
            | MISC_PACKAGE_CTLS
            | ENERGY_FILTERING_CTL
            | XAPIC_DISABLE_STATUS
            | RFDS_NO,
        cpuid: EVERYWHERE.union(FeatureSet::of(&[F::Rtm, F::RrsbaCtrl, F::BhiCtrl])),
    },
];

/// The part called `name`.
pub fn part(name: &str) -> Option<&'static SpeculationRow> {
    PARTS.iter().find(|row| row.name == name)
}

/// The part with this model number and stepping of family 6.
pub fn part_of(model: u8, stepping: u8) -> Option<&'static SpeculationRow> {
    PARTS.iter().find(|row| row.model == model && row.steppings.contains(&stepping))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A part does not claim to be free of a bug that it has, and says how it can be dealt with.
    #[test]
    fn ac_parts_do_not_contradict_themselves() {
        for row in PARTS {
            let says = |bits| row.arch_capabilities & bits == bits;
            for (bug, no) in [
                (Bug::Meltdown, RDCL_NO),
                (Bug::L1tf, RDCL_NO),
                (Bug::Mds, MDS_NO),
                (Bug::Taa, TAA_NO),
                (Bug::SpecStoreBypass, SSB_NO),
                (Bug::ItlbMultihit, IF_PSCHANGE_MC_NO),
                (Bug::MmioStaleData, MMIO_IMMUNE),
                (Bug::EibrsPbrsb, PBRSB_NO),
                (Bug::Gds, GDS_NO),
                (Bug::Rfds, RFDS_NO),
                (Bug::Bhi, BHI_NO),
                (Bug::Its, ITS_NO),
            ] {
                assert!(!(row.bugs.has(bug) && says(no)), "{}: {bug:?}", row.name);
            }
            let clears = says(FB_CLEAR) || !says(MDS_NO) && row.cpuid.has(F::MdClear);
            assert!(!row.bugs.has(Bug::MmioStaleData) || clears, "{}", row.name);
            assert_eq!(row.bugs.has(Bug::Rfds), says(RFDS_CLEAR), "{}", row.name);
            assert_eq!(row.bugs.has(Bug::Gds), says(GDS_CTRL), "{}", row.name);
            assert_eq!(row.bugs.has(Bug::Srbds), row.cpuid.has(F::SrbdsCtrl), "{}", row.name);
            assert!(!row.bugs.has(Bug::Taa) || row.cpuid.has(F::Rtm), "{}", row.name);
            assert!(!row.bugs.has(Bug::EibrsPbrsb) || says(IBRS_ALL), "{}", row.name);
            assert!(!row.bugs.has(Bug::Meltdown) || row.bugs.has(Bug::L1tf), "{}", row.name);
        }
    }

    #[test]
    fn ac_parts_are_found_by_model_and_stepping() {
        let name = |model, stepping| part_of(model, stepping).map(|row| row.name);
        assert_eq!(name(85, 4), Some("skylake-sp"));
        assert_eq!(name(85, 7), Some("cascade-lake"));
        assert_eq!([106, 134, 150].map(|m| name(m, 1)), ["ice-lake-sp", "tremont-d", "tremont"].map(Some));
        assert_eq!([151, 143].map(|m| name(m, 2)), ["alder-lake", "sapphire-rapids"].map(Some));
        assert_eq!((name(85, 11), name(26, 5)), (None, None));
        for row in PARTS {
            assert!(std::ptr::eq(part(row.name).unwrap(), row));
        }
        assert!(part("zen").is_none());
    }
}
