//! CPUID: the table that a model gives for one logical processor, and the reading of such a table with the
//! bits that follow the processor's state. (Intel SDM vol. 2A, CPUID.)

use crate::model::feature::CpuidRegister;
use crate::model::models::{CacheKind, CpuModel};
use crate::model::{Feature, xstate};
use crate::state::{CpuState, cr4};
use crate::tiles::{MAX_PALETTE, ROW_BYTES, ROWS, TILE_BYTES, TILES, TMUL_MAX};
use crate::topology::Shape;

/// CPUID's four result registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidValues {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

impl CpuidValues {
    /// The value of one register.
    pub fn get(&self, register: CpuidRegister) -> u32 {
        match register {
            CpuidRegister::Eax => self.eax,
            CpuidRegister::Ebx => self.ebx,
            CpuidRegister::Ecx => self.ecx,
            CpuidRegister::Edx => self.edx,
        }
    }

    /// One register, to be changed.
    pub fn get_mut(&mut self, register: CpuidRegister) -> &mut u32 {
        match register {
            CpuidRegister::Eax => &mut self.eax,
            CpuidRegister::Ebx => &mut self.ebx,
            CpuidRegister::Ecx => &mut self.ecx,
            CpuidRegister::Edx => &mut self.edx,
        }
    }
}

/// One row of a CPUID table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidEntry {
    /// EAX.
    pub leaf: u32,
    /// ECX, where it matters.
    pub subleaf: u32,
    /// ECX matters.
    pub indexed: bool,
    /// The result.
    pub values: CpuidValues,
}

/// Which logical processor a table is for, and the clocks that it tells of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity {
    /// How many sockets, cores and threads there are.
    pub shape: Shape,
    /// The processor's x2APIC ID.
    pub apic_id: u32,
    /// TSC frequency; 0 leaves it unsaid.
    pub tsc_hz: u64,
    /// Frequency of the clock that drives the TSC and the local APIC's timer; 0 leaves it unsaid.
    pub crystal_hz: u64,
}

/// Leaves in which ECX selects a subleaf.
fn is_indexed(leaf: u32) -> bool {
    matches!(leaf, 4 | 7 | 0xb | 0xd | 0xf | 0x10 | 0x12 | 0x14 | 0x17 | 0x18 | 0x1d | 0x1e | 0x1f)
}

impl CpuModel {
    /// The model's CPUID table as the processor `identity` shows it, state-dependent bits clear; see [`read`].
    pub fn cpuid(&self, identity: &Identity) -> Vec<CpuidEntry> {
        let mut table = Table(Vec::new());
        self.identification(&mut table, identity);
        self.caches(&mut table, identity.shape);
        topology_leaves(&mut table, identity);
        for (subleaf, values) in self.features().xsave_leaves() {
            if self.features().has(Feature::Xsave) {
                *table.at(0xd, subleaf) = values;
            }
        }
        self.clocks(&mut table, identity);
        let features = self.features();
        if features.has(Feature::AmxTile) {
            tile_leaves(&mut table);
        }
        for feature in features.set().iter().filter(|&f| f != Feature::Ht || identity.shape.per_package() > 1)
        {
            let row = feature.row();
            *table.at(row.leaf, row.subleaf).get_mut(row.register) |= 1 << row.bit;
        }
        let highest = |class: u32| {
            table.0.iter().map(|e| e.leaf).filter(|leaf| leaf & 0x8000_0000 == class).max().unwrap_or(class)
        };
        let (basic, extended) = (highest(0), highest(0x8000_0000));
        let subleaves = table.0.iter().filter(|e| e.leaf == 7).map(|e| e.subleaf).max().unwrap_or(0);
        table.at(0, 0).eax = basic;
        table.at(0x8000_0000, 0).eax = extended;
        table.at(7, 0).eax = subleaves;
        table.0.sort_by_key(|e| (e.leaf, e.subleaf));
        table.0
    }

    fn identification(&self, table: &mut Table, identity: &Identity) {
        let [a, b, c] = self.vendor();
        *table.at(0, 0) = CpuidValues { eax: 0, ebx: a, ecx: c, edx: b };
        let logical = identity.shape.per_package().next_power_of_two().min(255);
        *table.at(1, 0) = CpuidValues {
            eax: self.signature(),
            // CLFLUSH line size in 8-byte units, logical processors per package, initial APIC ID.
            ebx: 8 << 8 | logical << 16 | identity.apic_id << 24,
            ecx: 0,
            edx: 0,
        };
        *table.at(7, 0) = CpuidValues::default();
        for leaf in 0x8000_0000..=0x8000_0008 {
            table.at(leaf, 0);
        }
        let mut brand = [0u8; 48];
        for (to, from) in brand.iter_mut().zip(self.brand().bytes()) {
            *to = from;
        }
        for (i, part) in brand.chunks_exact(16).enumerate() {
            let word = |n: usize| u32::from_le_bytes([part[n], part[n + 1], part[n + 2], part[n + 3]]);
            *table.at(0x8000_0002 + i as u32, 0) =
                CpuidValues { eax: word(0), ebx: word(4), ecx: word(8), edx: word(12) };
        }
        let features = self.features();
        table.at(0x8000_0008, 0).eax =
            u32::from(features.physical_bits()) | u32::from(features.linear_bits()) << 8;
    }

    fn caches(&self, table: &mut Table, shape: Shape) {
        // 0xff: the caches are in leaf 4; 0xf0: 64-byte prefetch; the TLBs are nobody's business.
        *table.at(2, 0) = CpuidValues { eax: 0x00fe_ff01, ebx: 0xf0, ecx: 0, edx: 0 };
        for (i, cache) in self.row.caches.iter().enumerate() {
            let sharing = match cache.kind {
                CacheKind::Shared => shape.per_package(),
                _ => shape.threads,
            };
            let kind = match cache.kind {
                CacheKind::Data => 1,
                CacheKind::Instruction => 2,
                CacheKind::Private | CacheKind::Shared => 3,
            };
            let sharing_ids = sharing.next_power_of_two() - 1;
            let core_ids = (shape.cores.next_power_of_two() - 1).min(63);
            let line = 64;
            let sets = cache.bytes / (line * cache.ways);
            *table.at(4, i as u32) = CpuidValues {
                eax: kind | cache.level << 5 | 1 << 8 | sharing_ids << 14 | core_ids << 26,
                ebx: (line - 1) | (cache.ways - 1) << 22,
                ecx: sets - 1,
                edx: 0,
            };
            if cache.level == 2 {
                let ways = match cache.ways {
                    8 => 6,
                    16 => 8,
                    _ => 0xf,
                };
                table.at(0x8000_0006, 0).ecx = line | ways << 12 | (cache.bytes >> 10) << 16;
            }
        }
        *table.at(4, self.row.caches.len() as u32) = CpuidValues::default();
        let features = self.features();
        if features.has(Feature::Monitor) {
            // Smallest and largest monitor line, MWAIT extensions (interrupts break even when masked), one C1 state.
            *table.at(5, 0) = CpuidValues { eax: 64, ebx: 64, ecx: 3, edx: 0x10 };
        } else {
            *table.at(5, 0) = CpuidValues::default();
        }
        // No performance counters.
        *table.at(0xa, 0) = CpuidValues::default();
        *table.at(6, 0) = CpuidValues::default();
    }

    fn clocks(&self, table: &mut Table, identity: &Identity) {
        if self.row.max_leaf < 0x15 {
            return;
        }
        *table.at(0x15, 0) = tsc_ratio(identity);
        let base = if identity.tsc_hz != 0 {
            (identity.tsc_hz / 1_000_000) as u32 & 0xffff
        } else {
            self.row.base_mhz
        };
        *table.at(0x16, 0) = CpuidValues { eax: base, ebx: self.row.turbo_mhz.max(base), ecx: 100, edx: 0 };
    }
}

/// Leaves 1DH, the palettes of tiles, and 1EH, what the matrix unit can multiply.
fn tile_leaves(table: &mut Table) {
    let (tile, tiles, row) = (TILE_BYTES as u32, TILES as u32, ROW_BYTES as u32);
    table.at(0x1d, 0).eax = MAX_PALETTE.into();
    *table.at(0x1d, 1) =
        CpuidValues { eax: (tiles * tile) | (tile << 16), ebx: row | tiles << 16, ecx: ROWS as u32, edx: 0 };
    let (max_k, max_n) = (TMUL_MAX.0 as u32, TMUL_MAX.1 as u32);
    table.at(0x1e, 0).ebx = max_k | max_n << 8;
}

/// Leaf 15H: TSC / crystal as a fraction, and the crystal's frequency. Left unsaid where a 32-bit product of
/// the crystal's kHz and the numerator, which is how kernels compute the TSC's frequency, would overflow.
fn tsc_ratio(identity: &Identity) -> CpuidValues {
    let (tsc, crystal) = (identity.tsc_hz, identity.crystal_hz);
    let divisor = gcd(tsc, crystal);
    if tsc == 0 || crystal == 0 || crystal > u64::from(u32::MAX) {
        return CpuidValues::default();
    }
    let (numerator, denominator) = (tsc / divisor, crystal / divisor);
    if (crystal / 1000).saturating_mul(numerator) > u64::from(u32::MAX) {
        return CpuidValues::default();
    }
    CpuidValues { eax: denominator as u32, ebx: numerator as u32, ecx: crystal as u32, edx: 0 }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Leaves 0BH and 1FH: threads of a core, then logical processors of a package.
fn topology_leaves(table: &mut Table, identity: &Identity) {
    let shape = identity.shape;
    for leaf in [0xb, 0x1f] {
        let levels = [
            (shape.smt_shift(), shape.threads, 1),
            (shape.package_shift(), shape.per_package(), 2),
            (0, 0, 0),
        ];
        for (subleaf, (shift, count, kind)) in levels.into_iter().enumerate() {
            let subleaf = subleaf as u32;
            *table.at(leaf, subleaf) =
                CpuidValues { eax: shift, ebx: count, ecx: subleaf | kind << 8, edx: identity.apic_id };
        }
    }
}

struct Table(Vec<CpuidEntry>);

impl Table {
    /// The row for `leaf` and `subleaf`, made if it is not there.
    fn at(&mut self, leaf: u32, subleaf: u32) -> &mut CpuidValues {
        let found = self.0.iter().position(|e| (e.leaf, e.subleaf) == (leaf, subleaf));
        let index = found.unwrap_or_else(|| {
            let indexed = is_indexed(leaf);
            self.0.push(CpuidEntry { leaf, subleaf, indexed, values: CpuidValues::default() });
            self.0.len() - 1
        });
        &mut self.0[index].values
    }
}

/// The processor state that CPUID shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dynamic {
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// CR4.PKE.
    pub ospke: bool,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// The local APIC is enabled in IA32_APIC_BASE.
    pub apic_enabled: bool,
    /// IA32_MISC_ENABLE allows MONITOR; `None` leaves the table's bit.
    pub monitor_enabled: Option<bool>,
}

impl Dynamic {
    /// What `state` says; the two MSR bits are the hypervisor's.
    pub fn of(state: &CpuState, apic_enabled: bool, monitor_enabled: Option<bool>) -> Dynamic {
        Dynamic {
            osxsave: state.cr4 & cr4::OSXSAVE != 0,
            ospke: state.cr4 & cr4::PKE != 0,
            xcr0: state.xcr0,
            xss: state.xss,
            apic_enabled,
            monitor_enabled,
        }
    }

    fn apply(&self, leaf: u32, subleaf: u32, values: &mut CpuidValues) {
        let put = |word: &mut u32, feature: Feature, on: bool| {
            let bit = 1 << feature.row().bit;
            *word = if on { *word | bit } else { *word & !bit };
        };
        match (leaf, subleaf) {
            (1, _) => {
                if !self.apic_enabled {
                    put(&mut values.edx, Feature::Apic, false);
                }
                if let Some(enabled) = self.monitor_enabled {
                    put(&mut values.ecx, Feature::Monitor, enabled);
                }
                let xsave = values.ecx & 1 << Feature::Xsave.row().bit != 0;
                values.ecx = values.ecx & !(1 << 27) | u32::from(self.osxsave && xsave) << 27;
            }
            (7, 0) => {
                let pku = values.ecx & 1 << Feature::Pku.row().bit != 0;
                values.ecx = values.ecx & !(1 << 4) | u32::from(self.ospke && pku) << 4;
            }
            (0xd, 0) => values.ebx = xstate::size_standard(self.xcr0),
            (0xd, 1) if values.eax & 0b1010 != 0 => {
                values.ebx = xstate::size_compacted(self.xcr0 | self.xss);
            }
            _ => {}
        }
    }
}

/// What CPUID returns for `leaf` and `subleaf` on a processor with the table `entries` and the state `dynamic`.
/// `None`: the table has no such leaf.
pub fn read(entries: &[CpuidEntry], leaf: u32, subleaf: u32, dynamic: &Dynamic) -> Option<CpuidValues> {
    let found = entries.iter().find(|e| e.leaf == leaf && (!e.indexed || e.subleaf == subleaf));
    match found {
        Some(entry) => {
            let mut values = entry.values;
            dynamic.apply(leaf, subleaf, &mut values);
            Some(values)
        }
        None if matches!(leaf, 0xb | 0x1f) => {
            // Levels past the last one: type 0, but the subleaf and the APIC ID are there all the same.
            let first = entries.iter().find(|e| e.leaf == leaf)?;
            Some(CpuidValues { eax: 0, ebx: 0, ecx: subleaf & 0xff, edx: first.values.edx })
        }
        None => entries.iter().any(|e| e.leaf == leaf).then(CpuidValues::default),
    }
}

/// What an Intel CPU returns for any `leaf`: for those beyond the highest, what the highest basic leaf gives.
pub fn read_as_intel(entries: &[CpuidEntry], leaf: u32, subleaf: u32, dynamic: &Dynamic) -> CpuidValues {
    let highest = |class: u32| read(entries, class, 0, dynamic).map_or(0, |values| values.eax);
    let basic = highest(0);
    let class = leaf & 0x8000_0000;
    let leaf = if class == 0 && leaf <= basic || class != 0 && leaf <= highest(class) { leaf } else { basic };
    read(entries, leaf, subleaf, dynamic).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::models;

    fn table(model: &str, identity: Identity) -> Vec<CpuidEntry> {
        CpuModel::parse(model).unwrap().cpuid(&identity)
    }

    fn plain(entries: &[CpuidEntry], leaf: u32, subleaf: u32) -> CpuidValues {
        let dynamic = Dynamic { apic_enabled: true, ..Dynamic::default() };
        read_as_intel(entries, leaf, subleaf, &dynamic)
    }

    #[test]
    fn vendor_signature_and_brand() {
        let cpuid = table("sapphire-rapids", Identity::default());
        let zero = plain(&cpuid, 0, 0);
        assert_eq!((zero.ebx, zero.edx, zero.ecx), (0x756e_6547, 0x4965_6e69, 0x6c65_746e));
        assert_eq!(zero.eax, 0x1f);
        assert_eq!(plain(&cpuid, 1, 0).eax, 0x0008_06f8);
        assert_eq!(plain(&cpuid, 0x8000_0002, 0).eax, u32::from_le_bytes(*b"Inte"));
        assert_eq!(plain(&cpuid, 0x8000_0000, 0).eax, 0x8000_0008);
    }

    #[test]
    fn leaves_out_of_range_give_the_last_basic_leaf() {
        let cpuid = table("sapphire-rapids", Identity::default());
        let last = plain(&cpuid, 0x1f, 0);
        assert_eq!(plain(&cpuid, 0x1234, 0), last);
        assert_eq!(plain(&cpuid, 0x8000_1234, 0), last);
        assert_eq!(plain(&cpuid, 0x4000_0000, 0), last);
        assert_eq!(plain(&cpuid, 3, 0), CpuidValues::default(), "in range and empty");
    }

    #[test]
    fn state_shows_in_cpuid() {
        let cpuid = table("sapphire-rapids", Identity::default());
        let off = Dynamic::default();
        let on = Dynamic {
            osxsave: true,
            ospke: true,
            xcr0: 7,
            xss: 0,
            apic_enabled: true,
            monitor_enabled: Some(false),
        };
        let bits = |leaf, dynamic: &Dynamic| read(&cpuid, leaf, 0, dynamic).unwrap();
        assert_eq!((bits(1, &off).ecx >> 27 & 1, bits(1, &on).ecx >> 27 & 1), (0, 1));
        assert_eq!((bits(1, &off).edx >> 9 & 1, bits(1, &on).edx >> 9 & 1), (0, 1));
        assert_eq!((bits(1, &off).ecx >> 3 & 1, bits(1, &on).ecx >> 3 & 1), (1, 0));
        assert_eq!((bits(7, &off).ecx >> 4 & 1, bits(7, &on).ecx >> 4 & 1), (0, 1));
        assert_eq!((bits(0xd, &off).ebx, bits(0xd, &on).ebx), (576, 832));
        assert_eq!(read(&cpuid, 0xd, 1, &on).unwrap().ebx, 832);
        assert_eq!(read(&cpuid, 0xd, 3, &on), Some(CpuidValues::default()));
    }

    #[test]
    fn amx_t1_what_cpuid_tells_of_tiles() {
        let cpuid = table("sapphire-rapids", Identity::default());
        let values = |leaf, subleaf| {
            let CpuidValues { eax, ebx, ecx, edx } = plain(&cpuid, leaf, subleaf);
            [eax, ebx, ecx, edx]
        };
        assert_eq!(values(0xd, 17), [64, 2752, 0b010, 0]);
        assert_eq!(values(0xd, 18), [8192, 2816, 0b110, 0]);
        assert_eq!(values(0x1d, 0), [1, 0, 0, 0]);
        assert_eq!(values(0x1d, 1), [0x0400_2000, 0x0008_0040, 0x10, 0]);
        assert_eq!(values(0x1d, 2), [0; 4]);
        assert_eq!(values(0x1e, 0), [0, 0x4010, 0, 0]);
        assert_eq!(values(7, 0)[3] >> 22 & 0b1101, 0b1101, "BF16, TILE, INT8");
        assert_eq!(values(0xd, 1)[0] >> 4 & 1, 1, "XFD");
        // The sizes follow XCR0.
        for (xcr0, standard, compacted) in [(1, 576, 576), (0x6_0003, 11008, 8832), (0x6_0207, 11008, 9152)] {
            let dynamic = Dynamic { xcr0, ..Dynamic::default() };
            let size = |subleaf| read(&cpuid, 0xd, subleaf, &dynamic).unwrap().ebx;
            assert_eq!((size(0), size(1)), (standard, compacted), "{xcr0:#x}");
        }
        let max = table("max", Identity::default());
        assert_eq!(
            (plain(&max, 7, 1).eax >> 21 & 1, plain(&max, 7, 1).edx >> 8 & 1),
            (1, 1),
            "FP16, COMPLEX"
        );
    }

    #[test]
    fn amx_t1_a_processor_without_tiles_does_not_tell_of_them() {
        for model in
            ["skylake", "sapphire-rapids,-amx_tile", "sapphire-rapids,-xfd", "sapphire-rapids,-xsaves"]
        {
            let features = CpuModel::parse(model).unwrap().features();
            let any =
                [Feature::AmxTile, Feature::AmxInt8, Feature::AmxBf16].map(|feature| features.has(feature));
            assert_eq!(
                (any, features.xcr0_mask() & xstate::AMX, features.xfd_mask()),
                ([false; 3], 0, 0),
                "{model}"
            );
            let cpuid = table(model, Identity::default());
            for (leaf, subleaf) in [(0xd, 17), (0xd, 18), (0x1d, 0), (0x1d, 1), (0x1e, 0)] {
                assert_eq!(
                    read(&cpuid, leaf, subleaf, &Dynamic::default()).unwrap_or_default(),
                    CpuidValues::default()
                );
            }
        }
    }

    #[test]
    fn topology() {
        let shape = Shape { sockets: 2, cores: 3, threads: 2 };
        let cpuid = table("skylake", Identity { shape, apic_id: 11, ..Identity::default() });
        let smt = plain(&cpuid, 0xb, 0);
        assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (1, 2, 0x100, 11));
        let core = plain(&cpuid, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 11));
        let beyond = plain(&cpuid, 0xb, 7);
        assert_eq!((beyond.eax, beyond.ebx, beyond.ecx, beyond.edx), (0, 0, 7, 11));
        assert_eq!(plain(&cpuid, 1, 0).ebx >> 16, 11 << 8 | 8);
        let caches = plain(&cpuid, 4, 3);
        assert_eq!(caches.eax >> 14 & 0xfff, 7, "the last-level cache is the package's");
    }

    #[test]
    fn tsc_frequency() {
        let say = |tsc_hz, crystal_hz| tsc_ratio(&Identity { tsc_hz, crystal_hz, ..Identity::default() });
        let two_point_one = say(2_100_000_000, 1_000_000_000);
        assert_eq!((two_point_one.eax, two_point_one.ebx, two_point_one.ecx), (10, 21, 1_000_000_000));
        assert_eq!(say(2_099_999_999, 1_000_000_000), CpuidValues::default());
        assert_eq!(say(2_100_000_000, 0), CpuidValues::default());
    }

    #[test]
    fn every_model_has_a_sound_table() {
        for name in models::names() {
            let cpuid = table(name, Identity::default());
            for (i, entry) in cpuid.iter().enumerate() {
                let same = |e: &&CpuidEntry| (e.leaf, e.subleaf) == (entry.leaf, entry.subleaf);
                assert_eq!(cpuid.iter().filter(same).count(), 1, "{name} row {i}");
            }
            assert!(cpuid.len() < 100, "{name}");
        }
    }
}
