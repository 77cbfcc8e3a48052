//! What the machine that we run on can execute: its CPUID, and the register state that its system has enabled.
#![expect(unsafe_code, reason = "XGETBV has no safe wrapper that works without compile-time features")]

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};

use once_cell::race::OnceBox;

use crate::model::feature::{CpuidRegister, FEATURES, FeatureRow, FeatureSet, Means};

/// CPUID.1:ECX.OSXSAVE.
const OSXSAVE: u32 = 1 << 27;

/// What the host offers to guest code that runs on its own execution units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Features that we can offer here: our own, and those of the host's CPU.
    pub offered: FeatureSet,
    /// XCR0 of the host.
    pub xcr0: u64,
}

impl Host {
    /// The machine that we run on.
    pub fn get() -> &'static Host {
        static HOST: OnceBox<Host> = OnceBox::new();
        HOST.get_or_init(|| Box::new(Host::detect()))
    }

    fn detect() -> Host {
        let xcr0 = host_xcr0();
        let offered = FEATURES.iter().filter(|row| executable(row, xcr0)).map(|row| row.feature);
        Host { offered: offered.collect::<FeatureSet>().consistent(), xcr0 }
    }
}

fn executable(row: &FeatureRow, xcr0: u64) -> bool {
    match row.means {
        Means::Own => true,
        Means::Nobody => false,
        Means::Host | Means::HostAvx | Means::HostAvx512 => {
            let state = row.means.host_state();
            xcr0 & state == state && host_bit(row)
        }
    }
}

fn host_bit(row: &FeatureRow) -> bool {
    let highest = __cpuid(row.leaf & 0x8000_0000).eax;
    if row.leaf > highest || row.subleaf > 0 && row.leaf == 7 && row.subleaf > __cpuid_count(7, 0).eax {
        return false;
    }
    let result = __cpuid_count(row.leaf, row.subleaf);
    let word = match row.register {
        CpuidRegister::Eax => result.eax,
        CpuidRegister::Ebx => result.ebx,
        CpuidRegister::Ecx => result.ecx,
        CpuidRegister::Edx => result.edx,
    };
    word & (1 << row.bit) != 0
}

fn host_xcr0() -> u64 {
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: XGETBV of XCR0 reads a register; CPUID says that the system has enabled the instruction.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Feature;

    #[test]
    fn what_nobody_executes_is_never_offered() {
        let host = Host::get();
        assert!(host.offered.has(Feature::Sse2) && host.offered.has(Feature::Pku));
        assert!(host.offered.iter().all(|feature| feature.row().means != Means::Nobody));
    }
}
