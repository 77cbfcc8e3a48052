//! What of the host's processor and operating system bears on what can be run and compared here.

use std::arch::x86_64::{__cpuid, __cpuid_count};

use crate::host::{self, HostError};
use crate::machine::{Machine, Vectors};

/// Whose processor the host's is, as far as differences are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Intel, whose processors the models are: nothing is excepted.
    Intel,
    /// Intel's servers of the generation before the models' (Skylake, Cascade Lake, Cooper Lake: family 6, model 85).
    Skylake,
    /// AMD and Hygon.
    Amd,
    /// Any other: nothing is excepted.
    Other,
}

/// What the host can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// State components (XCR0 bits) that cases load and that are compared.
    pub components: u64,
    /// State components that the host's XCR0 has besides (MPX, AMX): programs must not ask for them.
    pub other_components: u64,
    /// Bits of a linear address, 48 or 57. FXRSTOR and XRSTOR with REX.W sign-extend FIP and FDP from there.
    pub linear_bits: u32,
    /// Whether user code can set FS and GS bases.
    pub fsgsbase: bool,
    /// XSAVE and FXSAVE store FOP, FIP and FDP as they are. Where not (AMD), they are stored as zero unless an
    /// unmasked x87 exception is pending (AMD64 APM volume 2, FXSAVE), so they are known only then.
    pub keeps_pointers: bool,
    /// The processor's maker.
    pub vendor: Vendor,
}

/// The vendor strings of CPUID leaf 0, in the order EBX, EDX, ECX.
const VENDORS: &[(&[u8; 12], Vendor)] =
    &[(b"GenuineIntel", Vendor::Intel), (b"AuthenticAMD", Vendor::Amd), (b"HygonGenuine", Vendor::Amd)];

impl Capabilities {
    /// Those of the host that this runs on.
    pub fn of_host() -> Result<Capabilities, HostError> {
        let vendor = vendor();
        Ok(Capabilities {
            components: host::components()?,
            other_components: host::other_components()?,
            linear_bits: if __cpuid_count(7, 0).ecx & 1 << 16 != 0 { 57 } else { 48 },
            fsgsbase: host::has_fsgsbase(),
            keeps_pointers: vendor != Vendor::Amd,
            vendor,
        })
    }

    /// Everything that a case can use, on a processor like those that the models are of.
    pub fn all() -> Capabilities {
        Capabilities {
            components: host::COMPONENTS,
            other_components: 0,
            linear_bits: 57,
            fsgsbase: true,
            keeps_pointers: true,
            vendor: Vendor::Intel,
        }
    }

    /// Puts into its initial state what the host does not have: neither side gets it.
    pub fn limit(&self, machine: &mut Machine) {
        if !self.fsgsbase {
            (machine.fs_base, machine.gs_base) = (0, 0);
        }
        limit_vectors(self.components, &mut machine.vectors);
    }

    /// What XCR0 and the like, read by the instruction, are without what programs here do not get.
    pub fn hide_components(&self, value: u64) -> u64 {
        value & !self.other_components
    }

    /// An x87 pointer that the host keeps as it is.
    pub fn canonical(&self, pointer: u64) -> u64 {
        let unused = 64 - self.linear_bits;
        ((pointer << unused) as i64 >> unused) as u64
    }

    /// Whether the host's x87 pointers in `after` are what the processor holds.
    pub fn knows_pointers(&self, after: &Vectors) -> bool {
        self.keeps_pointers || after.pending()
    }

    /// What cannot be compared on this host though the processor modelled has it, for the report.
    pub fn not_comparable(&self) -> Vec<&'static str> {
        let missing = |bit: u64| self.components & bit != bit;
        let rows = [
            (missing(0xe0), "AVX-512 state (ZMM0-31, K0-7): the host's XCR0 does not have it"),
            (!self.fsgsbase, "FS and GS bases: the host's kernel does not let user code set them"),
            (
                !self.keeps_pointers,
                "x87 FOP, FIP and FDP without a pending unmasked exception: XSAVE stores them as 0 here",
            ),
        ];
        rows.into_iter().filter_map(|(applies, text)| applies.then_some(text)).collect()
    }
}

fn limit_vectors(components: u64, v: &mut Vectors) {
    for (i, zmm) in v.zmm.iter_mut().enumerate() {
        match i {
            0..16 if components & 1 << 6 == 0 => zmm[32..].fill(0),
            16.. if components & 1 << 7 == 0 => zmm.fill(0),
            _ => {}
        }
    }
    if components & 1 << 5 == 0 {
        v.k = [0; 8];
    }
    if components & 1 << 9 == 0 {
        v.pkru = 0;
    }
}

fn vendor() -> Vendor {
    let leaf = __cpuid(0);
    let name: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].iter().flat_map(|r| r.to_le_bytes()).collect();
    let maker = VENDORS.iter().find(|(string, _)| string[..] == name).map_or(Vendor::Other, |row| row.1);
    // Family, and both parts of the model.
    let signature = __cpuid(1).eax & 0x0fff_0ff0;
    if maker == Vendor::Intel && signature == 0x0005_0650 { Vendor::Skylake } else { maker }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Machine {
        let mut machine = Machine { fs_base: 1, gs_base: 1, ..Machine::default() };
        machine.vectors.zmm = [[0xff; 64]; 32];
        machine.vectors.k = [u64::MAX; 8];
        machine.vectors.pkru = 0xc;
        machine
    }

    #[test]
    fn a_host_with_everything_is_given_everything() {
        let mut machine = full();
        Capabilities::all().limit(&mut machine);
        assert_eq!(machine, full());
        assert!(Capabilities::all().knows_pointers(&machine.vectors));
        assert!(Capabilities::all().not_comparable().is_empty());
    }

    #[test]
    fn a_host_without_avx512_is_given_none_of_it() {
        let host = Capabilities { components: 7, fsgsbase: false, ..Capabilities::all() };
        let mut machine = full();
        host.limit(&mut machine);
        let v = &machine.vectors;
        assert_eq!((v.k, v.pkru, v.zmm[16..].as_flattened().iter().max()), ([0; 8], 0, Some(&0)));
        assert_eq!((v.zmm[15][31], v.zmm[15][32], machine.fs_base), (0xff, 0, 0));
        assert_eq!(host.not_comparable().len(), 2);
    }

    #[test]
    fn what_the_host_has_besides_is_hidden() {
        let host = Capabilities { other_components: 0x18, linear_bits: 48, ..Capabilities::all() };
        assert_eq!(host.hide_components(0x2ff), 0x2e7);
        assert_eq!(host.canonical(0x1234_8000_0000_0000), 0xffff_8000_0000_0000);
        assert_eq!(Capabilities::all().canonical(0x1234_8000_0000_0000), 0x0034_8000_0000_0000);
    }

    #[test]
    fn pointers_are_known_where_they_are_kept_or_an_exception_is_pending() {
        let host = Capabilities { keeps_pointers: false, ..Capabilities::all() };
        let mut v = Vectors::default();
        assert!(!host.knows_pointers(&v));
        v.fsw = 0x8081;
        assert!(host.knows_pointers(&v));
    }
}
