//! CPU models as data: what a part offers, how CPUID tells of it, and what of it this machine can execute.

pub mod cpuid;
pub mod feature;
pub mod host;
pub mod models;
pub mod msrs;
mod parse;
pub mod speculation;
pub mod xstate;

use iced_x86::{CpuidFeature as Iced, DecoderOptions, Instruction, Mnemonic};

pub use cpuid::{CpuidEntry, CpuidValues};
pub use feature::{Feature, FeatureSet};
pub use host::Host;
pub use models::{CpuModel, Lost, Why};
pub use parse::ModelError;

use crate::state::{cr4, efer};

/// The features that a CPU offers, in the forms in which instructions, control registers and paging ask.
#[derive(Clone, PartialEq, Eq)]
pub struct Features {
    set: FeatureSet,
    /// The decoder's instruction groups, by number.
    instructions: [u64; 3],
    decoder: u32,
    cr4: u64,
    physical_bits: u8,
    signature: u32,
}

/// CR4 bits that only some CPUs have (SDM vol. 3A, 2.5); older ones are there always.
static CR4_BITS: &[(u64, Feature)] = &[
    (cr4::UMIP, Feature::Umip),
    (cr4::LA57, Feature::La57),
    (cr4::VMXE, Feature::Vmx),
    (cr4::FSGSBASE, Feature::Fsgsbase),
    (cr4::PCIDE, Feature::Pcid),
    (cr4::OSXSAVE, Feature::Xsave),
    (cr4::SMEP, Feature::Smep),
    (cr4::SMAP, Feature::Smap),
    (cr4::PKE, Feature::Pku),
    (cr4::CET, Feature::Shstk),
    (cr4::PKS, Feature::Pks),
];

/// CR4 bits that every CPU has.
const CR4_BASELINE: u64 = cr4::VME
    | cr4::PVI
    | cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT;

/// EFER bits that only some CPUs have.
static EFER_BITS: &[(u64, Feature)] =
    &[(efer::SCE, Feature::Syscall), (efer::LME, Feature::Lm), (efer::NXE, Feature::Nx)];

impl Features {
    /// Physical-address bits of a CPU that does not say (as KVM assumes).
    const PHYSICAL_BITS_UNSAID: u8 = 36;
    /// Family, model and stepping of a CPU that does not say (as KVM assumes).
    const SIGNATURE_UNSAID: u32 = 0x600;

    /// A CPU with exactly `set`, and physical addresses of `physical_bits` bits.
    pub fn new(set: FeatureSet, physical_bits: u8) -> Features {
        let groups = set.iter().flat_map(|f| f.row().instructions).chain(feature::BASELINE);
        let mut instructions = [0u64; 3];
        for &group in groups {
            instructions[group as usize / 64] |= 1 << (group as usize % 64);
        }
        if set.has(Feature::Rtm) || set.has(Feature::Hle) {
            instructions[Iced::HLE_or_RTM as usize / 64] |= 1 << (Iced::HLE_or_RTM as usize % 64);
        }
        let offered = CR4_BITS.iter().filter(|(_, feature)| set.has(*feature));
        Features {
            set,
            instructions,
            decoder: decoder_options(set),
            cr4: offered.fold(CR4_BASELINE, |bits, (bit, _)| bits | bit),
            physical_bits: physical_bits.clamp(32, 52),
            signature: Features::SIGNATURE_UNSAID,
        }
    }

    /// The same with a family, model and stepping.
    pub fn with_signature(self, signature: u32) -> Features {
        Features { signature, ..self }
    }

    /// The features that CPUID enumerates; `find` gives the values of a leaf and subleaf.
    pub fn from_cpuid(find: impl Fn(u32, u32) -> Option<CpuidValues>) -> Features {
        let enumerated = feature::FEATURES.iter().filter(|row| {
            find(row.leaf, row.subleaf).is_some_and(|values| values.get(row.register) & (1 << row.bit) != 0)
        });
        let width = find(0x8000_0008, 0).map_or(0, |values| values.eax as u8);
        let width = if width == 0 { Features::PHYSICAL_BITS_UNSAID } else { width };
        let signature = find(1, 0).map_or(Features::SIGNATURE_UNSAID, |values| values.eax);
        Features::new(enumerated.map(|row| row.feature).collect(), width).with_signature(signature)
    }

    /// Whether the CPU has `feature`.
    #[inline(always)]
    pub fn has(&self, feature: Feature) -> bool {
        self.set.has(feature)
    }

    /// All of them.
    pub fn set(&self) -> FeatureSet {
        self.set
    }

    /// Whether the CPU offers `ins`: it has everything that the instruction belongs to. Encodings that older
    /// CPUs execute as no-operations are offered by all.
    pub fn offers(&self, ins: &Instruction) -> bool {
        is_hint(ins.mnemonic())
            || ins.cpuid_features().iter().all(|&group| {
                self.instructions
                    .get(group as usize / 64)
                    .is_some_and(|w| w >> (group as usize % 64) & 1 != 0)
            })
    }

    /// Options for the instruction decoder: encodings that mean something else on a CPU without the feature.
    pub fn decoder_options(&self) -> u32 {
        self.decoder
    }

    /// Family, model and stepping: CPUID.1:EAX, and RDX after RESET and INIT.
    pub fn signature(&self) -> u32 {
        self.signature
    }

    /// MAXPHYADDR.
    pub fn physical_bits(&self) -> u8 {
        self.physical_bits
    }

    /// Mask of the physical-address bits that the CPU has.
    #[inline(always)]
    pub fn physical_mask(&self) -> u64 {
        (1 << self.physical_bits) - 1
    }

    /// Width of linear addresses: 57 bits with 5-level paging, else 48, whatever mode the CPU is in. MSRs and
    /// segment bases are checked against it (SDM vol. 3A, 4.5.2); memory accesses against the mode's own width.
    #[inline(always)]
    pub fn linear_bits(&self) -> u8 {
        if self.has(Feature::La57) { 57 } else { 48 }
    }

    /// Whether an MSR or base register can hold `address`.
    #[inline(always)]
    pub fn is_canonical(&self, address: u64) -> bool {
        let shift = 64 - self.linear_bits();
        ((address << shift) as i64 >> shift) as u64 == address
    }

    /// CR4 bits that can be set.
    #[inline(always)]
    pub fn cr4_mask(&self) -> u64 {
        self.cr4
    }

    /// IA32_EFER bits that can be set, LMA aside.
    pub fn efer_mask(&self) -> u64 {
        EFER_BITS.iter().filter(|(_, f)| self.has(*f)).fold(0, |bits, (bit, _)| bits | bit)
    }
}

impl Default for Features {
    /// Everything that this machine and we can execute.
    fn default() -> Features {
        Features::new(Host::get().offered, 46)
    }
}

impl std::fmt::Debug for Features {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Features")
            .field("set", &self.set)
            .field("physical_bits", &self.physical_bits)
            .finish_non_exhaustive()
    }
}

/// Instructions that do nothing where the CPU lacks their feature (they are in the reserved-NOP space, SDM
/// vol. 2D, appendix A), or that the CPU refuses or hands to the hypervisor by other rules than CPUID's.
fn is_hint(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Endbr32
            | Mnemonic::Endbr64
            | Mnemonic::Rdsspd
            | Mnemonic::Rdsspq
            | Mnemonic::Cldemote
            | Mnemonic::Prefetch
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetchwt1
            | Mnemonic::Prefetchit0
            | Mnemonic::Prefetchit1
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Vmcall
            | Mnemonic::Vmmcall
    )
}

/// Prefixes that older CPUs ignore: LZCNT is BSR there, TZCNT is BSF, WBNOINVD is WBINVD.
fn decoder_options(set: FeatureSet) -> u32 {
    [
        (Feature::Bmi1, DecoderOptions::NO_MPFX_0FBC),
        (Feature::Abm, DecoderOptions::NO_MPFX_0FBD),
        (Feature::Wbnoinvd, DecoderOptions::NO_WBNOINVD),
        (Feature::LahfLm, DecoderOptions::NO_LAHF_SAHF_64),
    ]
    .iter()
    .filter(|(feature, _)| !set.has(*feature))
    .fold(DecoderOptions::NONE, |options, (_, without)| options | without)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::Decoder;

    fn offers(features: &Features, bytes: &[u8]) -> bool {
        let ins = Decoder::new(64, bytes, features.decoder_options()).decode();
        !ins.is_invalid() && features.offers(&ins)
    }

    #[test]
    fn a_model_refuses_what_it_lacks() {
        let nehalem = CpuModel::parse("nehalem").unwrap().features();
        let haswell = CpuModel::parse("haswell").unwrap().features();
        let cases: &[(&[u8], bool, bool, &str)] = &[
            (&[0x48, 0x01, 0xd8], true, true, "add rax, rbx"),
            (&[0x0f, 0x05], true, true, "syscall"),
            (&[0xf3, 0x0f, 0xb8, 0xc3], true, true, "popcnt"),
            (&[0xc5, 0xf4, 0x58, 0xc2], false, true, "vaddps ymm"),
            (&[0xc4, 0xe2, 0x75, 0x98, 0xc2], false, true, "vfmadd132ps"),
            (&[0xf3, 0x0f, 0xbd, 0xc3], true, true, "lzcnt, or bsr"),
            (&[0xf3, 0x0f, 0x1e, 0xfa], true, true, "endbr64"),
            (&[0x0f, 0x1c, 0x00], true, true, "cldemote, or nop"),
            (&[0x0f, 0x01, 0xc1], true, true, "vmcall"),
            (&[0x0f, 0x01, 0xc4], false, false, "vmxoff"),
            (&[0xc7, 0xf8, 0, 0, 0, 0], false, false, "xbegin"),
            (&[0xc4, 0xe2, 0x7b, 0x49, 0xc0], false, false, "tilezero"),
            (&[0x0f, 0x01, 0xe8], false, false, "serialize"),
        ];
        for (bytes, on_nehalem, on_haswell, what) in cases {
            assert_eq!(offers(&nehalem, bytes), *on_nehalem, "nehalem: {what}");
            assert_eq!(offers(&haswell, bytes), *on_haswell, "haswell: {what}");
        }
    }

    #[test]
    fn lzcnt_decodes_as_bsr_without_abm() {
        let nehalem = CpuModel::parse("nehalem").unwrap().features();
        let ins = Decoder::new(64, &[0xf3, 0x0f, 0xbd, 0xc3], nehalem.decoder_options()).decode();
        assert_eq!(ins.mnemonic(), Mnemonic::Bsr);
    }

    #[test]
    fn features_come_back_from_the_cpuid_table() {
        for name in models::names() {
            let model = CpuModel::parse(name).unwrap();
            let features = model.features();
            let shape = crate::topology::Shape::cores(2);
            let identity = cpuid::Identity { shape, ..cpuid::Identity::default() };
            let table = model.cpuid(&identity);
            let find = |leaf, subleaf| cpuid::read(&table, leaf, subleaf, &cpuid::Dynamic::default());
            let seen = Features::from_cpuid(|leaf, subleaf| {
                // APIC shows only while it is enabled.
                find(leaf, subleaf).map(|mut values| {
                    values.edx |= u32::from(leaf == 1) << Feature::Apic.row().bit;
                    values
                })
            });
            assert_eq!(seen, features, "{name}");
        }
    }

    #[test]
    fn canonical_width_follows_la57() {
        let with = Features::new(FeatureSet::of(&[Feature::La57]), 46);
        let without = Features::new(FeatureSet::EMPTY, 46);
        let address = 0x00ff_8000_0000_0000;
        assert!(with.is_canonical(address) && !without.is_canonical(address));
        assert!(!with.is_canonical(1 << 60) && without.is_canonical(0xffff_8000_0000_0000));
    }

    #[test]
    fn control_bits_follow_features() {
        let none = Features::new(FeatureSet::EMPTY, 46);
        assert_eq!(none.cr4_mask(), CR4_BASELINE);
        assert_eq!(none.efer_mask(), 0);
        let spr = CpuModel::parse("sapphire-rapids").unwrap().features();
        assert_eq!(spr.cr4_mask() & cr4::VMXE, 0);
        assert_ne!(spr.cr4_mask() & cr4::PKE, 0);
        assert_eq!(spr.efer_mask(), efer::SCE | efer::LME | efer::NXE);
    }
}
