//! The XSAVE state components (SDM vol. 1, 13.1 and 13.5), and the sizes that CPUID leaf 0DH gives for them.

use std::arch::x86_64::{__cpuid, __cpuid_count};

use crate::model::cpuid::CpuidValues;
use crate::model::{Feature, Features};

/// One state component.
#[derive(Debug)]
pub struct Component {
    /// Bit in XCR0 or IA32_XSS.
    pub bit: u8,
    /// Bytes in the XSAVE area.
    pub size: u32,
    /// Offset in the standard format; 0 for supervisor components.
    pub offset: u32,
    /// Managed by IA32_XSS instead of XCR0.
    pub supervisor: bool,
    /// Starts at a multiple of 64 in the compacted format.
    pub aligned: bool,
    /// IA32_XFD can disable it.
    pub xfd: bool,
    /// What brings it.
    pub feature: Feature,
}

/// The components beyond the legacy area (x87 and SSE, bits 0 and 1).
pub static COMPONENTS: &[Component] = &[
    extended(2, 256, 576, Feature::Avx),
    extended(5, 64, 1088, Feature::Avx512f),
    extended(6, 512, 1152, Feature::Avx512f),
    extended(7, 1024, 1664, Feature::Avx512f),
    extended(9, 8, 2688, Feature::Pku),
    Component { aligned: true, ..extended(17, 64, 2752, Feature::AmxTile) },
    Component { aligned: true, xfd: true, ..extended(18, 8192, 2816, Feature::AmxTile) },
];

const fn extended(bit: u8, size: u32, offset: u32, feature: Feature) -> Component {
    Component { bit, size, offset, supervisor: false, aligned: false, xfd: false, feature }
}

/// Features whose XSAVE components the host's own CPUID describes otherwise than [`COMPONENTS`], or not at all. A program
/// that executes CPUID itself lays out the components of these wrongly (QEMU does, for the guest's CPUID).
pub fn foreign_to_host() -> impl Iterator<Item = Feature> {
    let highest = __cpuid(0).eax;
    let differs = move |c: &Component| {
        let host = (highest >= 0xd).then(|| __cpuid_count(0xd, c.bit.into()));
        host.is_none_or(|h| (h.eax, h.ebx) != (c.size, c.offset))
    };
    COMPONENTS.iter().filter(move |c| differs(c)).map(|c| c.feature)
}

/// x87 state.
pub const X87: u64 = 1 << 0;
/// XMM registers and MXCSR.
pub const SSE: u64 = 1 << 1;
/// Upper halves of YMM0 to YMM15.
pub const AVX: u64 = 1 << 2;
/// Mask registers, upper halves of ZMM0 to ZMM15, ZMM16 to ZMM31.
pub const AVX512: u64 = 7 << 5;
/// PKRU.
pub const PKRU: u64 = 1 << 9;
/// AMX's tile configuration and tile data.
pub const AMX: u64 = TILECFG | TILEDATA;
/// AMX's tile configuration.
pub const TILECFG: u64 = 1 << 17;
/// AMX's tiles.
pub const TILEDATA: u64 = 1 << 18;

/// Bytes of the legacy area and the XSAVE header.
pub const LEGACY_AND_HEADER: u32 = 576;

impl Features {
    /// The XCR0 bits that can be set.
    pub fn xcr0_mask(&self) -> u64 {
        if !self.has(Feature::Xsave) {
            return 0;
        }
        self.components().filter(|c| !c.supervisor).fold(X87 | SSE, |bits, c| bits | 1 << c.bit)
    }

    /// The IA32_XSS bits that can be set.
    pub fn xss_mask(&self) -> u64 {
        if !self.has(Feature::Xsaves) {
            return 0;
        }
        self.components().filter(|c| c.supervisor).fold(0, |bits, c| bits | 1 << c.bit)
    }

    /// The bits of IA32_XFD that can be set: CPUID.(0DH,i).ECX\[2\].
    pub fn xfd_mask(&self) -> u64 {
        if !self.has(Feature::Xfd) {
            return 0;
        }
        self.components().filter(|c| c.xfd).fold(0, |bits, c| bits | 1 << c.bit)
    }

    /// Whether XSETBV can write `value` to XCR0 (SDM vol. 1, 13.3).
    pub fn valid_xcr0(&self, value: u64) -> bool {
        let all_or_none = |group| value & group == 0 || value & group == group;
        value & X87 != 0
            && value & !self.xcr0_mask() == 0
            && (value & AVX == 0 || value & SSE != 0)
            && all_or_none(AVX512)
            && (value & AVX512 == 0 || value & AVX != 0)
            && all_or_none(AMX)
    }

    fn components(&self) -> impl Iterator<Item = &'static Component> {
        COMPONENTS.iter().filter(|c| self.has(c.feature))
    }

    /// CPUID leaf 0DH as it is with every component enabled; sizes that follow XCR0 are [`size_standard`]'s and
    /// [`size_compacted`]'s business. Ends after the last component.
    pub(super) fn xsave_leaves(&self) -> Vec<(u32, CpuidValues)> {
        let (xcr0, xss) = (self.xcr0_mask(), self.xss_mask());
        let size = size_standard(xcr0);
        let main = CpuidValues { eax: xcr0 as u32, ebx: size, ecx: size, edx: (xcr0 >> 32) as u32 };
        let extended = CpuidValues {
            eax: 0,
            ebx: if self.has(Feature::Xsavec) { size_compacted(xcr0 | xss) } else { 0 },
            ecx: xss as u32,
            edx: (xss >> 32) as u32,
        };
        let components = self.components().map(|c| {
            let xfd = c.xfd && self.has(Feature::Xfd);
            let flags = u32::from(c.supervisor) | u32::from(c.aligned) << 1 | u32::from(xfd) << 2;
            (u32::from(c.bit), CpuidValues { eax: c.size, ebx: c.offset, ecx: flags, edx: 0 })
        });
        [(0, main), (1, extended)].into_iter().chain(components).collect()
    }
}

/// Bytes of an XSAVE area in the standard format that holds the components of `xcr0`.
pub fn size_standard(xcr0: u64) -> u32 {
    let ends = COMPONENTS.iter().filter(|c| xcr0 >> c.bit & 1 != 0).map(|c| c.offset + c.size);
    ends.max().unwrap_or(LEGACY_AND_HEADER).max(LEGACY_AND_HEADER)
}

/// Bytes of an XSAVE area in the compacted format that holds `components` (bits of XCR0 and IA32_XSS).
pub fn size_compacted(components: u64) -> u32 {
    COMPONENTS.iter().filter(|c| components >> c.bit & 1 != 0).fold(LEGACY_AND_HEADER, |end, c| {
        let start = if c.aligned { end.next_multiple_of(64) } else { end };
        start + c.size
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::FeatureSet;

    fn features(list: &[Feature]) -> Features {
        Features::new(FeatureSet::of(list), 46)
    }

    #[test]
    fn xcr0_rules() {
        let avx512 = features(&[Feature::Xsave, Feature::Avx, Feature::Avx512f, Feature::Pku]);
        for (value, valid) in [
            (0x1, true),
            (0x3, true),
            (0x7, true),
            (0xe7, true),
            (0x2e7, true),
            (0x201, true),
            (0x0, false),
            (0x2, false),
            (0x5, false),
            (0x27, false),
            (0xe3, false),
            (0x8 | 0x3, false),
            (0x6_0003, false),
            (1 << 63 | 1, false),
        ] {
            assert_eq!(avx512.valid_xcr0(value), valid, "{value:#x}");
        }
        assert!(!features(&[Feature::Avx]).valid_xcr0(1), "without XSAVE there is no XCR0");
    }

    #[test]
    fn amx_t2_tiles_are_enabled_with_their_configuration_or_not_at_all() {
        let amx = features(&[Feature::Xsave, Feature::Avx, Feature::AmxTile, Feature::Xfd]);
        for (value, valid) in [
            (0x2_0003, false),
            (0x4_0003, false),
            (0x6_0003, true),
            (0x6_0001, true),
            (0x6_0007, true),
            (0x6_0002, false),
            (0xe_0003, false),
        ] {
            assert_eq!(amx.valid_xcr0(value), valid, "{value:#x}");
        }
        assert_eq!(amx.xfd_mask(), TILEDATA);
        assert_eq!(features(&[Feature::Xsave, Feature::AmxTile]).xfd_mask(), 0, "without XFD");
        assert_eq!(features(&[Feature::Xsave, Feature::Xfd]).xfd_mask(), 0, "without tiles");
    }

    #[test]
    fn sizes() {
        assert_eq!(size_standard(3), 576);
        assert_eq!(size_standard(7), 832);
        assert_eq!(size_standard(0xe7), 2688);
        assert_eq!(size_standard(0x2e7), 2696);
        assert_eq!(size_compacted(0x2e7), 2440);
        assert_eq!(size_compacted(0x6_02e7), 10752);
        assert_eq!(size_standard(0x6_02e7), 11008);
        assert_eq!(size_compacted(1 << 18), 8768);
    }
}
