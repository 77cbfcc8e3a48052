//! The CPU models.

use crate::model::feature::Means;
use crate::model::msrs::Scope;
use crate::model::speculation::{CONTROLS, SpeculationRow};
use crate::model::{Feature, FeatureSet, Features, Host};

/// What a cache holds and who shares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CacheKind {
    /// First level, data.
    Data,
    /// First level, instructions.
    Instruction,
    /// Unified, of one core.
    Private,
    /// Unified, of the package.
    Shared,
}

/// One cache, with 64-byte lines.
#[derive(Debug)]
pub(super) struct Cache {
    pub(super) level: u32,
    pub(super) kind: CacheKind,
    pub(super) bytes: u32,
    pub(super) ways: u32,
}

/// One model: facts of a part.
#[derive(Debug)]
pub struct ModelRow {
    /// Name on the command line.
    pub name: &'static str,
    /// Brand string, 47 characters at most.
    pub brand: &'static str,
    /// Family, model, stepping.
    version: (u32, u32, u32),
    /// The model that this one adds to.
    base: Option<&'static ModelRow>,
    adds: FeatureSet,
    drops: FeatureSet,
    pub(super) caches: &'static [Cache],
    physical_bits: u8,
    pub(super) max_leaf: u32,
    pub(super) base_mhz: u32,
    pub(super) turbo_mhz: u32,
    /// Internal threshold of the notify VM exit in crystal ticks; `None`: the part has no such exit.
    notify_threshold: Option<u32>,
}

impl ModelRow {
    /// CPUID.1:EAX.
    pub fn signature(&self) -> u32 {
        let (family, model, stepping) = self.version;
        stepping | (model & 15) << 4 | family << 8 | (model >> 4) << 16
    }

    /// Everything that the part has.
    fn features(&self) -> FeatureSet {
        let base = self.base.map_or(FeatureSet::EMPTY, ModelRow::features);
        base.union(self.adds).minus(self.drops)
    }
}

use Feature::*;

/// IA32_ARCH_CAPABILITIES: enhanced IBRS.
const IBRS_ALL: u64 = 1 << 1;

/// IA32_ARCH_CAPABILITIES of a processor that does not speculate: what no attack can reach, and enhanced IBRS
/// (SDM vol. 4, table 2-2: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO,
/// SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, FB_CLEAR, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO).
const NOT_VULNERABLE: u64 = 1 << 0
    | IBRS_ALL
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 17
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

const KIB: u32 = 1 << 10;
const MIB: u32 = 1 << 20;

const fn cache(level: u32, kind: CacheKind, bytes: u32, ways: u32) -> Cache {
    Cache { level, kind, bytes, ways }
}

static NEHALEM: ModelRow = ModelRow {
    name: "nehalem",
    brand: "Intel(R) Xeon(R) Processor (Nehalem)",
    version: (6, 26, 5),
    base: None,
    adds: FeatureSet::of(&[
        Fpu,
        Vme,
        De,
        Pse,
        Tsc,
        Msr,
        Pae,
        Mce,
        Cx8,
        Apic,
        Sep,
        Mtrr,
        Pge,
        Mca,
        Cmov,
        Pat,
        Pse36,
        Clflush,
        Mmx,
        Fxsr,
        Sse,
        Sse2,
        Ss,
        Ht,
        Sse3,
        Monitor,
        Ssse3,
        Cx16,
        Sse41,
        Sse42,
        Popcnt,
        LahfLm,
        Syscall,
        Nx,
        Rdtscp,
        Lm,
        InvariantTsc,
    ]),
    drops: FeatureSet::EMPTY,
    caches: &[
        cache(1, CacheKind::Data, 32 * KIB, 8),
        cache(1, CacheKind::Instruction, 32 * KIB, 4),
        cache(2, CacheKind::Private, 256 * KIB, 8),
        cache(3, CacheKind::Shared, 8 * MIB, 16),
    ],
    physical_bits: 40,
    max_leaf: 0xb,
    base_mhz: 2933,
    turbo_mhz: 3333,
    notify_threshold: None,
};

static HASWELL: ModelRow = ModelRow {
    name: "haswell",
    brand: "Intel(R) Xeon(R) Processor (Haswell)",
    version: (6, 63, 2),
    base: Some(&NEHALEM),
    adds: FeatureSet::of(&[
        Pclmulqdq,
        Fma,
        Pcid,
        X2apic,
        Movbe,
        TscDeadline,
        Aes,
        Xsave,
        Avx,
        F16c,
        Rdrand,
        Arat,
        Fsgsbase,
        TscAdjust,
        Bmi1,
        Hle,
        Avx2,
        Smep,
        Bmi2,
        Erms,
        Invpcid,
        Rtm,
        ZeroFcsFds,
        Abm,
        Pdpe1gb,
        Xsaveopt,
    ]),
    drops: FeatureSet::EMPTY,
    caches: &[
        cache(1, CacheKind::Data, 32 * KIB, 8),
        cache(1, CacheKind::Instruction, 32 * KIB, 8),
        cache(2, CacheKind::Private, 256 * KIB, 8),
        cache(3, CacheKind::Shared, 20 * MIB, 20),
    ],
    physical_bits: 46,
    max_leaf: 0xd,
    base_mhz: 2600,
    turbo_mhz: 3300,
    notify_threshold: None,
};

static SKYLAKE: ModelRow = ModelRow {
    name: "skylake",
    brand: "Intel(R) Xeon(R) Processor (Skylake)",
    version: (6, 85, 4),
    base: Some(&HASWELL),
    adds: FeatureSet::of(&[
        FdpExceptionOnly,
        Mpx,
        Avx512f,
        Avx512dq,
        Rdseed,
        Adx,
        Smap,
        Clflushopt,
        Clwb,
        Avx512cd,
        Avx512bw,
        Avx512vl,
        Pku,
        Xsavec,
        Xgetbv1,
        Xsaves,
        Prefetchw,
    ]),
    drops: FeatureSet::EMPTY,
    caches: &[
        cache(1, CacheKind::Data, 32 * KIB, 8),
        cache(1, CacheKind::Instruction, 32 * KIB, 8),
        cache(2, CacheKind::Private, MIB, 16),
        cache(3, CacheKind::Shared, 22 * MIB, 11),
    ],
    physical_bits: 46,
    max_leaf: 0x16,
    base_mhz: 2100,
    turbo_mhz: 3700,
    notify_threshold: None,
};

static SAPPHIRE_RAPIDS: ModelRow = ModelRow {
    name: "sapphire-rapids",
    brand: "Intel(R) Xeon(R) Processor (Sapphire Rapids)",
    version: (6, 143, 8),
    base: Some(&SKYLAKE),
    adds: FeatureSet::of(&[
        Avx512ifma,
        Sha,
        Avx512vbmi,
        Umip,
        Waitpkg,
        Avx512vbmi2,
        Gfni,
        Vaes,
        Vpclmulqdq,
        Avx512vnni,
        Avx512bitalg,
        Avx512vpopcntdq,
        La57,
        Rdpid,
        BusLockDetect,
        Cldemote,
        Movdiri,
        Movdir64b,
        Enqcmd,
        Fsrm,
        MdClear,
        Serialize,
        Tsxldtrk,
        AmxBf16,
        Avx512fp16,
        AmxTile,
        AmxInt8,
        SpecCtrl,
        Stibp,
        FlushL1d,
        ArchCapabilities,
        CoreCapability,
        Ssbd,
        AvxVnni,
        Avx512bf16,
        Fzrm,
        Fsrs,
        Fsrc,
        McdtNo,
        Xfd,
        Wbnoinvd,
    ]),
    drops: FeatureSet::of(&[Mpx]),
    caches: &[
        cache(1, CacheKind::Data, 48 * KIB, 12),
        cache(1, CacheKind::Instruction, 32 * KIB, 8),
        cache(2, CacheKind::Private, 2 * MIB, 16),
        cache(3, CacheKind::Shared, 30 * MIB, 15),
    ],
    physical_bits: 46,
    max_leaf: 0x1f,
    base_mhz: 2100,
    turbo_mhz: 3800,
    notify_threshold: Some(1024),
};

/// Everything that we know of; what is offered is what this machine and we can execute.
static MAX: ModelRow = ModelRow {
    name: "max",
    brand: "Intel(R) Xeon(R) Processor (ring3 max)",
    version: (6, 143, 8),
    base: Some(&SAPPHIRE_RAPIDS),
    adds: FeatureSet::of(&[
        Avx512vp2intersect,
        AmxFp16,
        AmxComplex,
        Sha512,
        Sm3,
        Sm4,
        AvxIfma,
        AvxVnniInt8,
        AvxNeConvert,
        AvxVnniInt16,
        Prefetchiti,
        UcLockDisable,
    ]),
    drops: FeatureSet::of(&[Hle, Rtm, Enqcmd, Tsxldtrk]),
    ..SAPPHIRE_RAPIDS
};

/// All models, the default first.
static MODELS: &[&ModelRow] = &[&SAPPHIRE_RAPIDS, &SKYLAKE, &HASWELL, &NEHALEM, &MAX];

/// Names of the models, the default first.
pub fn names() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|row| row.name)
}

pub(super) fn rows() -> &'static [&'static ModelRow] {
    MODELS
}

/// Why a model's feature is not offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// This machine's CPU does not have it, and it takes the machine's CPU to execute it.
    Host,
    /// Silicon does not execute it.
    NotExecuted,
    /// It needs another feature that is not offered.
    Needs(Feature),
    /// It is offered only if asked for by name.
    OnRequest,
}

/// Features of parts that models do not have unless asked: transactions would all abort.
const ON_REQUEST: FeatureSet = FeatureSet::of(&[Rtm]);

/// A feature of the part that is not offered here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The feature.
    pub feature: Feature,
    /// Why.
    pub why: Why,
}

/// A CPU model as chosen: a part with features added and taken away, less what cannot be executed here.
#[derive(Clone, Debug)]
pub struct CpuModel {
    pub(super) row: &'static ModelRow,
    features: Features,
    lost: Vec<Lost>,
    removed: FeatureSet,
    test_ctrl_scope: Scope,
    /// IA32_ARCH_CAPABILITIES, if somebody has chosen it.
    arch_capabilities: Option<u64>,
}

impl CpuModel {
    /// `row` with `plus` and without `minus`, on `host`.
    pub(super) fn new(row: &'static ModelRow, plus: FeatureSet, minus: FeatureSet, host: &Host) -> CpuModel {
        let wanted = row.features().union(plus).minus(minus).consistent();
        let withheld = ON_REQUEST.minus(plus);
        let offered = wanted.intersection(host.offered).minus(withheld).consistent();
        let lost = wanted.minus(offered).iter().map(|feature| Lost { feature, why: why(feature, offered) });
        let features = Features::new(offered, row.physical_bits).with_signature(row.signature());
        let lost = lost.collect();
        let test_ctrl_scope = Scope::Core;
        CpuModel { row, features, lost, removed: minus, test_ctrl_scope, arch_capabilities: None }
    }

    /// The same with MSR_TEST_CTRL once per `scope`.
    pub(super) fn with_test_ctrl_scope(self, scope: Scope) -> CpuModel {
        CpuModel { test_ctrl_scope: scope, ..self }
    }

    /// The same with a value of somebody's choice in IA32_ARCH_CAPABILITIES.
    pub(super) fn with_arch_capabilities(self, value: Option<u64>) -> CpuModel {
        CpuModel { arch_capabilities: value, ..self }
    }

    /// IA32_ARCH_CAPABILITIES if somebody has chosen it (`arch-cap=`): guests are told that, and nothing is made of it.
    pub fn chosen_arch_capabilities(&self) -> Option<u64> {
        self.arch_capabilities
    }

    /// What MSR_TEST_CTRL exists once per: the core, as on every part so far, or the thread if the model says
    /// `test-ctrl=thread`.
    pub fn test_ctrl_scope(&self) -> Scope {
        self.test_ctrl_scope
    }

    /// Whether the feature was taken away by name: a hypervisor is not to offer it on its own account either.
    pub fn removes(&self, feature: Feature) -> bool {
        self.removed.has(feature)
    }

    /// The part that the model is of.
    pub fn row(&self) -> &'static ModelRow {
        self.row
    }

    /// Name, without the changes made to it.
    pub fn name(&self) -> &'static str {
        self.row.name
    }

    /// Brand string.
    pub fn brand(&self) -> &'static str {
        self.row.brand
    }

    /// The three words of the vendor string, in the order EBX, EDX, ECX.
    pub fn vendor(&self) -> [u32; 3] {
        [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes)
    }

    /// CPUID.1:EAX, also what RDX holds after reset.
    pub fn signature(&self) -> u32 {
        self.features.signature()
    }

    /// What is offered.
    pub fn features(&self) -> Features {
        self.features.clone()
    }

    /// The internal threshold of the notify VM exit, in ticks of the crystal: what the window adds to (vendors keep
    /// theirs to themselves). `None`: the part has no such exit.
    pub fn notify_threshold(&self) -> Option<u32> {
        self.row.notify_threshold
    }

    /// Whether `feature` is offered.
    pub fn has(&self, feature: Feature) -> bool {
        self.features.has(feature)
    }

    /// The same without `features`, and without what needs them.
    pub fn without(&self, features: FeatureSet) -> CpuModel {
        let left = self.features.set().minus(features).consistent();
        let features = Features::new(left, self.features.physical_bits()).with_signature(self.signature());
        CpuModel { features, ..self.clone() }
    }

    /// Model number, with the extended model, and stepping of [`CpuModel::signature`].
    pub fn numbers(&self) -> (u8, u8) {
        let signature = self.signature();
        ((signature >> 4 & 15 | signature >> 12 & 0xf0) as u8, (signature & 15) as u8)
    }

    /// The same with another model number and stepping of family 6 in CPUID.
    pub fn numbered(&self, model: u8, stepping: u8) -> CpuModel {
        let (model, stepping) = (u32::from(model), u32::from(stepping & 15));
        let signature = 6 << 8 | (model & 0xf0) << 12 | (model & 15) << 4 | stepping;
        CpuModel { features: self.features().with_signature(signature), ..self.clone() }
    }

    /// The same with what CPUID says of speculation, its control and transactions on `part`, if those are left on.
    pub fn on_part(&self, part: &SpeculationRow, rtm: bool) -> CpuModel {
        let mut set = self.features.set().minus(CONTROLS).union(part.cpuid.intersection(CONTROLS));
        set.remove(Rtm);
        if rtm {
            set.insert(Rtm);
        }
        let features = Features::new(set, self.features.physical_bits()).with_signature(self.signature());
        CpuModel { features, ..self.clone() }
    }

    /// Features of the part that are not offered on this machine.
    pub fn lost(&self) -> &[Lost] {
        &self.lost
    }

    /// IA32_ARCH_CAPABILITIES: whatever the part, the processor underneath is one that does not speculate. KVM
    /// tells guests of parts without the register the same of its own. Enhanced IBRS is IA32_SPEC_CTRL's, so a part
    /// without that register does not claim it: Linux would write it.
    pub fn arch_capabilities(&self) -> u64 {
        if self.has(Feature::SpecCtrl) { NOT_VULNERABLE } else { NOT_VULNERABLE & !IBRS_ALL }
    }
}

impl Default for CpuModel {
    /// `sapphire-rapids`.
    fn default() -> CpuModel {
        CpuModel::new(&SAPPHIRE_RAPIDS, FeatureSet::EMPTY, FeatureSet::EMPTY, Host::get())
    }
}

/// Why `feature` is not among the offered.
pub(super) fn why(feature: Feature, offered: FeatureSet) -> Why {
    let missing = feature.row().needs.iter().find(|&&need| !offered.has(need));
    match (feature.row().means, missing) {
        (Means::Nobody, _) => Why::NotExecuted,
        (_, Some(&need)) => Why::Needs(need),
        (Means::Own, None) => Why::OnRequest,
        (Means::Host | Means::HostAvx | Means::HostAvx512, None) => Why::Host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_consistent() {
        for row in MODELS {
            assert!(row.brand.len() < 48, "{}", row.name);
            let features = row.features();
            assert_eq!(features.minus(features.consistent()), FeatureSet::EMPTY, "{}", row.name);
            for cache in row.caches {
                assert_eq!(cache.bytes % (64 * cache.ways), 0, "{} level {}", row.name, cache.level);
            }
        }
    }

    #[test]
    fn parts_that_have_the_notify_exit() {
        let with = |row: &&&ModelRow| row.notify_threshold.is_some();
        assert_eq!(
            MODELS.iter().filter(with).map(|row| row.name).collect::<Vec<_>>(),
            ["sapphire-rapids", "max"]
        );
    }

    #[test]
    fn signatures() {
        let expected = [0x806f8, 0x50654, 0x306f2, 0x106a5, 0x806f8];
        assert_eq!(MODELS.iter().map(|row| row.signature()).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_poor_host_takes_features_away_and_says_why() {
        let mut host = *Host::get();
        host.offered.remove(Avx);
        host.offered = host.offered.consistent();
        let model = CpuModel::new(&HASWELL, FeatureSet::EMPTY, FeatureSet::EMPTY, &host);
        assert!(!model.has(Avx) && !model.has(Avx2) && model.has(Bmi2));
        let why = |feature| model.lost().iter().find(|l| l.feature == feature).map(|l| l.why);
        assert_eq!(why(Avx), Some(Why::Host));
        assert_eq!(why(Avx2), Some(Why::Needs(Avx)));
        assert_eq!((why(Rtm), why(Hle)), (Some(Why::OnRequest), Some(Why::NotExecuted)));
        assert_eq!(why(Bmi2), None);
    }
}
