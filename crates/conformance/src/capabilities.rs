//! What of the host's processor and operating system bears on what can be run and compared here.

use std::arch::x86_64::__cpuid;

use crate::host::{self, HostError};
use crate::machine::{Machine, Vectors};

/// Whose processor the host's is, as far as differences are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Intel, whose processors the models are: nothing is excepted.
    Intel,
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
            fsgsbase: host::has_fsgsbase(),
            keeps_pointers: vendor != Vendor::Amd,
            vendor,
        })
    }

    /// Everything that a case can use, on a processor like those that the models are of.
    pub fn all() -> Capabilities {
        Capabilities {
            components: host::COMPONENTS,
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
    VENDORS.iter().find(|(string, _)| string[..] == name).map_or(Vendor::Other, |row| row.1)
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
    fn pointers_are_known_where_they_are_kept_or_an_exception_is_pending() {
        let host = Capabilities { keeps_pointers: false, ..Capabilities::all() };
        let mut v = Vectors::default();
        assert!(!host.knows_pointers(&v));
        v.fsw = 0x8081;
        assert!(host.knows_pointers(&v));
    }
}
