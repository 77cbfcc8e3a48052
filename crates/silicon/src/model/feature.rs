//! The table of processor features: what each is called, where CPUID enumerates it, which instructions hang on
//! it, who executes it, and what it builds on. (Intel SDM vol. 2A, CPUID; names as in `/proc/cpuinfo`.)

use iced_x86::CpuidFeature as Iced;

/// A register of CPUID's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuidRegister {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Who executes what a feature stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// We do, with no help from the host's own feature.
    Own,
    /// The host's CPU runs the instructions: it must have the feature.
    Host,
    /// As [`Means::Host`], on YMM registers: the host's system must have enabled them.
    HostAvx,
    /// As [`Means::Host`], on ZMM and mask registers.
    HostAvx512,
    /// Nobody: known by name, offered by no CPU.
    Nobody,
}

impl Means {
    /// The XCR0 bits that the host's system must have set.
    pub const fn host_state(self) -> u64 {
        match self {
            Means::HostAvx => 0x06,
            Means::HostAvx512 => 0xe6,
            Means::Own | Means::Host | Means::Nobody => 0,
        }
    }
}

/// One row of the feature table.
#[derive(Debug)]
pub struct FeatureRow {
    /// The feature.
    pub feature: Feature,
    /// Name in `/proc/cpuinfo`.
    pub name: &'static str,
    /// Other spellings (QEMU's, the SDM's).
    pub aliases: &'static [&'static str],
    /// CPUID leaf.
    pub leaf: u32,
    /// CPUID subleaf.
    pub subleaf: u32,
    /// Result register.
    pub register: CpuidRegister,
    /// Bit in it.
    pub bit: u8,
    /// Who executes it.
    pub means: Means,
    /// The decoder's names of the instruction groups that it brings.
    pub instructions: &'static [Iced],
    /// Features that it cannot be without.
    pub needs: &'static [Feature],
}

macro_rules! features {
    ($($feature:ident $name:literal $([$($alias:literal)*])? ($leaf:literal $subleaf:literal $register:ident $bit:literal)
        $means:ident $({$($iced:ident)*})? $(needs $($needs:ident)*)?;)*) => {
        /// A processor feature that one CPUID bit enumerates.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Feature {
            $(#[doc = concat!("`", $name, "`")] $feature,)*
        }

        /// Every feature, in the order of [`Feature`].
        pub static FEATURES: &[FeatureRow] = &[$(FeatureRow {
            feature: Feature::$feature,
            name: $name,
            aliases: &[$($($alias),*)?],
            leaf: $leaf,
            subleaf: $subleaf,
            register: CpuidRegister::$register,
            bit: $bit,
            means: Means::$means,
            instructions: &[$($(Iced::$iced),*)?],
            needs: &[$($(Feature::$needs),*)?],
        }),*];
    };
}

features! {
    Fpu "fpu" (1 0 Edx 0) Host {FPU FPU287 FPU387};
    Vme "vme" (1 0 Edx 1) Own;
    De "de" (1 0 Edx 2) Own;
    Pse "pse" (1 0 Edx 3) Own;
    Tsc "tsc" (1 0 Edx 4) Own {TSC};
    Msr "msr" (1 0 Edx 5) Own {MSR};
    Pae "pae" (1 0 Edx 6) Own;
    Mce "mce" (1 0 Edx 7) Own;
    Cx8 "cx8" (1 0 Edx 8) Own {CX8};
    Apic "apic" (1 0 Edx 9) Own;
    Sep "sep" (1 0 Edx 11) Own {SEP};
    Mtrr "mtrr" (1 0 Edx 12) Own;
    Pge "pge" (1 0 Edx 13) Own;
    Mca "mca" (1 0 Edx 14) Own;
    Cmov "cmov" (1 0 Edx 15) Own {CMOV};
    Pat "pat" (1 0 Edx 16) Own;
    Pse36 "pse36" (1 0 Edx 17) Own needs Pse;
    Clflush "clflush" ["clfsh"] (1 0 Edx 19) Own {CLFSH};
    Dts "dts" ["ds"] (1 0 Edx 21) Nobody;
    Acpi "acpi" (1 0 Edx 22) Nobody;
    Mmx "mmx" (1 0 Edx 23) Host {MMX} needs Fpu;
    Fxsr "fxsr" (1 0 Edx 24) Own {FXSR} needs Fpu;
    Sse "sse" (1 0 Edx 25) Host {SSE} needs Fxsr;
    Sse2 "sse2" (1 0 Edx 26) Host {SSE2} needs Sse;
    Ss "ss" (1 0 Edx 27) Own;
    Ht "ht" (1 0 Edx 28) Own;
    Tm "tm" (1 0 Edx 29) Nobody;
    Pbe "pbe" (1 0 Edx 31) Nobody;

    Sse3 "pni" ["sse3"] (1 0 Ecx 0) Host {SSE3} needs Sse2;
    Pclmulqdq "pclmulqdq" (1 0 Ecx 1) Host {PCLMULQDQ} needs Sse2;
    Dtes64 "dtes64" (1 0 Ecx 2) Nobody;
    Monitor "monitor" ["mwait"] (1 0 Ecx 3) Own {MONITOR};
    DsCpl "ds_cpl" (1 0 Ecx 4) Nobody;
    Vmx "vmx" (1 0 Ecx 5) Nobody;
    Smx "smx" (1 0 Ecx 6) Nobody;
    Est "est" (1 0 Ecx 7) Nobody;
    Tm2 "tm2" (1 0 Ecx 8) Nobody;
    Ssse3 "ssse3" (1 0 Ecx 9) Host {SSSE3} needs Sse3;
    Fma "fma" (1 0 Ecx 12) HostAvx {FMA} needs Avx;
    Cx16 "cx16" ["cmpxchg16b"] (1 0 Ecx 13) Host {CMPXCHG16B} needs Cx8;
    Xtpr "xtpr" (1 0 Ecx 14) Nobody;
    Pdcm "pdcm" (1 0 Ecx 15) Nobody;
    Pcid "pcid" (1 0 Ecx 17) Own needs Lm;
    Dca "dca" (1 0 Ecx 18) Nobody;
    Sse41 "sse4_1" (1 0 Ecx 19) Host {SSE4_1} needs Ssse3;
    Sse42 "sse4_2" (1 0 Ecx 20) Host {SSE4_2} needs Sse41;
    X2apic "x2apic" (1 0 Ecx 21) Own needs Apic;
    Movbe "movbe" (1 0 Ecx 22) Own {MOVBE};
    Popcnt "popcnt" (1 0 Ecx 23) Host {POPCNT};
    TscDeadline "tsc_deadline_timer" ["tsc-deadline"] (1 0 Ecx 24) Own needs Tsc Apic;
    Aes "aes" (1 0 Ecx 25) Host {AES} needs Sse2;
    Xsave "xsave" (1 0 Ecx 26) Own {XSAVE} needs Fxsr;
    Avx "avx" (1 0 Ecx 28) HostAvx {AVX} needs Xsave Sse42;
    F16c "f16c" (1 0 Ecx 29) HostAvx {F16C} needs Avx;
    Rdrand "rdrand" (1 0 Ecx 30) Host {RDRAND};
    Hypervisor "hypervisor" (1 0 Ecx 31) Own;

    Arat "arat" (6 0 Eax 2) Own needs Apic;

    Fsgsbase "fsgsbase" (7 0 Ebx 0) Own {FSGSBASE} needs Lm;
    TscAdjust "tsc_adjust" (7 0 Ebx 1) Own needs Tsc;
    Sgx "sgx" (7 0 Ebx 2) Nobody {SGX1};
    Bmi1 "bmi1" (7 0 Ebx 3) Host {BMI1};
    Hle "hle" (7 0 Ebx 4) Nobody;
    Avx2 "avx2" (7 0 Ebx 5) HostAvx {AVX2} needs Avx;
    FdpExceptionOnly "fdp_excptn_only" (7 0 Ebx 6) Own needs Fpu;
    Smep "smep" (7 0 Ebx 7) Own;
    Bmi2 "bmi2" (7 0 Ebx 8) Host {BMI2};
    Erms "erms" (7 0 Ebx 9) Own;
    Invpcid "invpcid" (7 0 Ebx 10) Own {INVPCID};
    Rtm "rtm" (7 0 Ebx 11) Own {RTM};
    Cqm "cqm" (7 0 Ebx 12) Nobody;
    ZeroFcsFds "zero_fcs_fds" (7 0 Ebx 13) Own needs Fpu;
    Mpx "mpx" (7 0 Ebx 14) Nobody {MPX};
    RdtA "rdt_a" (7 0 Ebx 15) Nobody;
    Avx512f "avx512f" (7 0 Ebx 16) HostAvx512 {AVX512F} needs Avx2 Fma F16c;
    Avx512dq "avx512dq" (7 0 Ebx 17) HostAvx512 {AVX512DQ} needs Avx512f;
    Rdseed "rdseed" (7 0 Ebx 18) Host {RDSEED};
    Adx "adx" (7 0 Ebx 19) Own {ADX};
    Smap "smap" (7 0 Ebx 20) Own {SMAP};
    Avx512ifma "avx512ifma" (7 0 Ebx 21) HostAvx512 {AVX512_IFMA} needs Avx512f;
    Clflushopt "clflushopt" (7 0 Ebx 23) Own {CLFLUSHOPT} needs Clflush;
    Clwb "clwb" (7 0 Ebx 24) Own {CLWB} needs Clflush;
    IntelPt "intel_pt" (7 0 Ebx 25) Nobody;
    Avx512pf "avx512pf" (7 0 Ebx 26) Nobody {AVX512PF};
    Avx512er "avx512er" (7 0 Ebx 27) Nobody {AVX512ER};
    Avx512cd "avx512cd" (7 0 Ebx 28) HostAvx512 {AVX512CD} needs Avx512f;
    Sha "sha_ni" ["sha"] (7 0 Ebx 29) Host {SHA} needs Sse2;
    Avx512bw "avx512bw" (7 0 Ebx 30) HostAvx512 {AVX512BW} needs Avx512f;
    Avx512vl "avx512vl" (7 0 Ebx 31) HostAvx512 {AVX512VL} needs Avx512f;

    Avx512vbmi "avx512vbmi" (7 0 Ecx 1) HostAvx512 {AVX512_VBMI} needs Avx512bw;
    Umip "umip" (7 0 Ecx 2) Own;
    Pku "pku" (7 0 Ecx 3) Own {PKU} needs Xsave Lm;
    Waitpkg "waitpkg" (7 0 Ecx 5) Own {WAITPKG} needs Tsc;
    Avx512vbmi2 "avx512_vbmi2" ["avx512vbmi2"] (7 0 Ecx 6) HostAvx512 {AVX512_VBMI2} needs Avx512bw;
    Shstk "shstk" (7 0 Ecx 7) Nobody {CET_SS};
    Gfni "gfni" (7 0 Ecx 8) Host {GFNI} needs Sse2;
    Vaes "vaes" (7 0 Ecx 9) HostAvx {VAES} needs Avx Aes;
    Vpclmulqdq "vpclmulqdq" (7 0 Ecx 10) HostAvx {VPCLMULQDQ} needs Avx Pclmulqdq;
    Avx512vnni "avx512_vnni" ["avx512vnni"] (7 0 Ecx 11) HostAvx512 {AVX512_VNNI} needs Avx512f;
    Avx512bitalg "avx512_bitalg" ["avx512bitalg"] (7 0 Ecx 12) HostAvx512 {AVX512_BITALG} needs Avx512bw;
    Tme "tme" (7 0 Ecx 13) Nobody;
    Avx512vpopcntdq "avx512_vpopcntdq" ["avx512-vpopcntdq"] (7 0 Ecx 14) HostAvx512 {AVX512_VPOPCNTDQ} needs Avx512f;
    La57 "la57" (7 0 Ecx 16) Own needs Lm;
    Rdpid "rdpid" (7 0 Ecx 22) Own {RDPID};
    KeyLocker "kl" (7 0 Ecx 23) Nobody {KL};
    BusLockDetect "bus_lock_detect" (7 0 Ecx 24) Own;
    Cldemote "cldemote" (7 0 Ecx 25) Own {CLDEMOTE};
    Movdiri "movdiri" (7 0 Ecx 27) Own {MOVDIRI};
    Movdir64b "movdir64b" (7 0 Ecx 28) Own {MOVDIR64B};
    Enqcmd "enqcmd" (7 0 Ecx 29) Nobody {ENQCMD};
    SgxLc "sgx_lc" (7 0 Ecx 30) Nobody;
    Pks "pks" (7 0 Ecx 31) Nobody;

    Avx512_4vnniw "avx512_4vnniw" (7 0 Edx 2) Nobody {AVX512_4VNNIW};
    Avx512_4fmaps "avx512_4fmaps" (7 0 Edx 3) Nobody {AVX512_4FMAPS};
    Fsrm "fsrm" (7 0 Edx 4) Own;
    Uintr "uintr" (7 0 Edx 5) Nobody {UINTR};
    Avx512vp2intersect "avx512_vp2intersect" (7 0 Edx 8) HostAvx512 {AVX512_VP2INTERSECT} needs Avx512f;
    SrbdsCtrl "srbds_ctrl" (7 0 Edx 9) Own;
    MdClear "md_clear" (7 0 Edx 10) Own;
    Serialize "serialize" (7 0 Edx 14) Own {SERIALIZE};
    Tsxldtrk "tsxldtrk" (7 0 Edx 16) Nobody {TSXLDTRK};
    Pconfig "pconfig" (7 0 Edx 18) Nobody {PCONFIG};
    ArchLbr "arch_lbr" (7 0 Edx 19) Nobody;
    Ibt "ibt" (7 0 Edx 20) Nobody {CET_IBT};
    AmxBf16 "amx_bf16" (7 0 Edx 22) Own {AMX_BF16} needs AmxTile;
    Avx512fp16 "avx512_fp16" (7 0 Edx 23) HostAvx512 {AVX512_FP16} needs Avx512bw;
    AmxTile "amx_tile" (7 0 Edx 24) Own {AMX_TILE} needs Xsaves Xgetbv1 Xfd;
    AmxInt8 "amx_int8" (7 0 Edx 25) Own {AMX_INT8} needs AmxTile;
    SpecCtrl "spec_ctrl" ["ibrs" "ibpb"] (7 0 Edx 26) Own;
    Stibp "stibp" ["intel_stibp"] (7 0 Edx 27) Own needs SpecCtrl;
    FlushL1d "flush_l1d" (7 0 Edx 28) Own;
    ArchCapabilities "arch_capabilities" (7 0 Edx 29) Own;
    CoreCapability "core_capability" ["core_capabilities"] (7 0 Edx 30) Own;
    Ssbd "ssbd" ["spec_ctrl_ssbd"] (7 0 Edx 31) Own needs SpecCtrl;

    Sha512 "sha512" (7 1 Eax 0) HostAvx {SHA512} needs Avx2;
    Sm3 "sm3" (7 1 Eax 1) HostAvx {SM3} needs Avx;
    Sm4 "sm4" (7 1 Eax 2) HostAvx {SM4} needs Avx2;
    AvxVnni "avx_vnni" (7 1 Eax 4) HostAvx {AVX_VNNI} needs Avx2;
    Avx512bf16 "avx512_bf16" (7 1 Eax 5) HostAvx512 {AVX512_BF16} needs Avx512bw;
    Cmpccxadd "cmpccxadd" (7 1 Eax 7) Nobody {CMPCCXADD};
    Fzrm "fzrm" (7 1 Eax 10) Own;
    Fsrs "fsrs" (7 1 Eax 11) Own;
    Fsrc "fsrc" (7 1 Eax 12) Own;
    Fred "fred" (7 1 Eax 17) Nobody {FRED};
    Lkgs "lkgs" (7 1 Eax 18) Nobody {LKGS};
    Wrmsrns "wrmsrns" (7 1 Eax 19) Nobody {WRMSRNS};
    AmxFp16 "amx_fp16" (7 1 Eax 21) Own {AMX_FP16} needs AmxTile;
    AvxIfma "avx_ifma" (7 1 Eax 23) HostAvx {AVX_IFMA} needs Avx2;
    Lam "lam" (7 1 Eax 26) Nobody;
    AvxVnniInt8 "avx_vnni_int8" (7 1 Edx 4) HostAvx {AVX_VNNI_INT8} needs Avx2;
    AvxNeConvert "avx_ne_convert" (7 1 Edx 5) HostAvx {AVX_NE_CONVERT} needs Avx2;
    AmxComplex "amx_complex" (7 1 Edx 8) Own {AMX_COMPLEX} needs AmxTile;
    AvxVnniInt16 "avx_vnni_int16" (7 1 Edx 10) HostAvx {AVX_VNNI_INT16} needs Avx2;
    Prefetchiti "prefetchiti" (7 1 Edx 14) Own {PREFETCHITI};
    Psfd "intel_psfd" ["psfd"] (7 2 Edx 0) Own needs SpecCtrl;
    IpredCtrl "ipred_ctrl" (7 2 Edx 1) Own needs SpecCtrl;
    RrsbaCtrl "rrsba_ctrl" (7 2 Edx 2) Own needs SpecCtrl;
    DdpdU "ddpd_u" (7 2 Edx 3) Own needs SpecCtrl;
    BhiCtrl "bhi_ctrl" (7 2 Edx 4) Own needs SpecCtrl;
    McdtNo "mcdt_no" (7 2 Edx 5) Own;
    UcLockDisable "uc_lock_disable" ["uc_lock_dis"] (7 2 Edx 6) Own needs CoreCapability;

    Xsaveopt "xsaveopt" (0xd 1 Eax 0) Own {XSAVEOPT} needs Xsave;
    Xsavec "xsavec" (0xd 1 Eax 1) Own {XSAVEC} needs Xsave;
    Xgetbv1 "xgetbv1" (0xd 1 Eax 2) Own needs Xsave;
    Xsaves "xsaves" (0xd 1 Eax 3) Own {XSAVES} needs Xsavec;
    Xfd "xfd" (0xd 1 Eax 4) Own needs Xsaves Xgetbv1;

    Ptwrite "ptwrite" (0x14 0 Ebx 4) Nobody {PTWRITE};

    LahfLm "lahf_lm" (0x8000_0001 0 Ecx 0) Own needs Lm;
    Svm "svm" (0x8000_0001 0 Ecx 2) Nobody;
    Abm "abm" ["lzcnt"] (0x8000_0001 0 Ecx 5) Host {LZCNT};
    Sse4a "sse4a" (0x8000_0001 0 Ecx 6) Nobody {SSE4A};
    Prefetchw "3dnowprefetch" ["prefetchw"] (0x8000_0001 0 Ecx 8) Own {PREFETCHW};
    Syscall "syscall" (0x8000_0001 0 Edx 11) Own {SYSCALL} needs Lm;
    Nx "nx" (0x8000_0001 0 Edx 20) Own needs Pae;
    Pdpe1gb "pdpe1gb" (0x8000_0001 0 Edx 26) Own needs Lm;
    Rdtscp "rdtscp" (0x8000_0001 0 Edx 27) Own {RDTSCP} needs Tsc;
    Lm "lm" (0x8000_0001 0 Edx 29) Own needs Pae;
    InvariantTsc "invtsc" ["constant_tsc" "nonstop_tsc"] (0x8000_0007 0 Edx 8) Own needs Tsc;
    Wbnoinvd "wbnoinvd" (0x8000_0008 0 Ebx 9) Own {WBNOINVD};
}

/// Instruction groups that every CPU has: no CPUID bit stands for them.
pub(super) static BASELINE: &[Iced] = &[
    Iced::INTEL8086,
    Iced::INTEL186,
    Iced::INTEL286,
    Iced::INTEL386,
    Iced::INTEL486,
    Iced::X64,
    Iced::CPUID,
    Iced::MULTIBYTENOP,
    Iced::PAUSE,
    Iced::RDPMC,
    Iced::SMM,
];

impl Feature {
    /// The feature's row.
    pub fn row(self) -> &'static FeatureRow {
        &FEATURES[self as usize]
    }

    /// Name as in `/proc/cpuinfo`.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The feature called `name`: the kernel's, QEMU's or the SDM's spelling, with `_`, `-` and `.` alike.
    pub fn from_name(name: &str) -> Option<Feature> {
        let wanted = plain(name);
        let called = |row: &&FeatureRow| {
            plain(row.name) == wanted || row.aliases.iter().any(|alias| plain(alias) == wanted)
        };
        FEATURES.iter().find(called).map(|row| row.feature)
    }
}

/// A name without what spellings differ in.
fn plain(name: &str) -> String {
    name.chars().filter(|c| !matches!(c, '_' | '-' | '.')).flat_map(char::to_lowercase).collect()
}

impl std::fmt::Display for Feature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of features.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct FeatureSet([u64; 3]);

const _: () = assert!(FEATURES.len() <= 3 * 64);

impl FeatureSet {
    /// No feature.
    pub const EMPTY: FeatureSet = FeatureSet([0; 3]);

    /// The set of `features`.
    pub const fn of(features: &[Feature]) -> FeatureSet {
        let mut set = FeatureSet::EMPTY;
        let mut i = 0;
        while i < features.len() {
            let index = features[i] as usize;
            set.0[index >> 6] |= 1 << (index & 63);
            i += 1;
        }
        set
    }

    /// Whether `feature` is in the set.
    #[inline(always)]
    pub const fn has(&self, feature: Feature) -> bool {
        let index = feature as usize;
        self.0[index >> 6] & (1 << (index & 63)) != 0
    }

    /// Adds `feature`.
    pub fn insert(&mut self, feature: Feature) {
        *self = self.union(FeatureSet::of(&[feature]));
    }

    /// Takes `feature` out.
    pub fn remove(&mut self, feature: Feature) {
        *self = self.minus(FeatureSet::of(&[feature]));
    }

    /// What is in either.
    pub const fn union(self, other: FeatureSet) -> FeatureSet {
        FeatureSet([self.0[0] | other.0[0], self.0[1] | other.0[1], self.0[2] | other.0[2]])
    }

    /// What is in both.
    pub const fn intersection(self, other: FeatureSet) -> FeatureSet {
        FeatureSet([self.0[0] & other.0[0], self.0[1] & other.0[1], self.0[2] & other.0[2]])
    }

    /// What is in `self` but not in `other`.
    pub const fn minus(self, other: FeatureSet) -> FeatureSet {
        FeatureSet([self.0[0] & !other.0[0], self.0[1] & !other.0[1], self.0[2] & !other.0[2]])
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        *self == FeatureSet::EMPTY
    }

    /// The features, in table order.
    pub fn iter(&self) -> impl Iterator<Item = Feature> + use<> {
        let set = *self;
        FEATURES.iter().map(|row| row.feature).filter(move |&feature| set.has(feature))
    }

    /// Adds everything that the members need.
    pub fn with_needs(mut self) -> FeatureSet {
        loop {
            let needs = self.iter().fold(self, |all, f| all.union(FeatureSet::of(f.row().needs)));
            if needs == self {
                return self;
            }
            self = needs;
        }
    }

    /// Drops every member that needs something that is not in the set.
    pub fn consistent(mut self) -> FeatureSet {
        loop {
            let orphan = self.iter().find(|f| f.row().needs.iter().any(|&need| !self.has(need)));
            match orphan {
                Some(feature) => self.remove(feature),
                None => return self,
            }
        }
    }
}

impl FromIterator<Feature> for FeatureSet {
    fn from_iter<I: IntoIterator<Item = Feature>>(features: I) -> FeatureSet {
        let mut set = FeatureSet::EMPTY;
        features.into_iter().for_each(|feature| set.insert(feature));
        set
    }
}

impl std::fmt::Debug for FeatureSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_in_the_order_of_the_enum_and_no_bit_has_two() {
        for (i, row) in FEATURES.iter().enumerate() {
            assert_eq!(row.feature as usize, i, "{}", row.name);
            let twin = FEATURES[i + 1..].iter().find(|other| {
                (other.leaf, other.subleaf, other.register, other.bit)
                    == (row.leaf, row.subleaf, row.register, row.bit)
            });
            assert!(twin.is_none(), "{} and {:?}", row.name, twin.map(|t| t.name));
        }
    }

    #[test]
    fn every_spelling_leads_to_one_feature() {
        for row in FEATURES {
            for name in row.aliases.iter().chain([&row.name]) {
                assert_eq!(Feature::from_name(name), Some(row.feature), "{name}");
            }
        }
        assert_eq!(Feature::from_name("SSE4.2"), Some(Feature::Sse42));
        assert_eq!(Feature::from_name("avx512-vbmi2"), Some(Feature::Avx512vbmi2));
        assert_eq!(Feature::from_name("avx5"), None);
    }

    #[test]
    fn dropping_a_base_drops_what_stands_on_it() {
        let mut set = FeatureSet::of(&[Feature::Avx512vbmi]).with_needs();
        assert!(set.has(Feature::Avx512bw) && set.has(Feature::Xsave) && set.has(Feature::Sse2));
        set.remove(Feature::Avx);
        let left = set.consistent();
        assert!(!left.has(Feature::Avx2) && !left.has(Feature::Avx512f) && left.has(Feature::Sse42));
    }
}
