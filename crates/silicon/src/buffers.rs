//! The buffers of a core that stale data can be sampled from, what clears them, and whose data they hold.
//!
//! No data is kept, only whose it is: each buffer has the set of [`Domain`]s that have run since it was cleared. It is updated when
//! another domain begins to run, never per access, so it costs guest code nothing.

use crate::model::speculation::arch_cap;

/// Bits of IA32_MCU_OPT_CTRL, MSR 123H.
pub mod mcu_opt_ctrl {
    /// RDRAND and RDSEED do not overwrite the buffer of special registers.
    pub const RNGDS_MITG_DIS: u64 = 1 << 0;
    /// VERW does not overwrite fill buffers.
    pub const FB_CLEAR_DIS: u64 = 1 << 3;
    /// Gathers are not mitigated.
    pub const GDS_MITG_DIS: u64 = 1 << 4;
}

/// A structure that keeps data of whoever ran before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Buffer {
    /// Line fill buffers.
    Fill,
    /// Store buffers.
    Store,
    /// Load ports.
    LoadPort,
    /// First-level data cache.
    L1d,
    /// Vector and floating-point register file.
    RegisterFile,
    /// Indirect branch predictors.
    BranchPredictor,
}

impl Buffer {
    /// All of them.
    pub const ALL: [Buffer; 6] = [
        Buffer::Fill,
        Buffer::Store,
        Buffer::LoadPort,
        Buffer::L1d,
        Buffer::RegisterFile,
        Buffer::BranchPredictor,
    ];
}

/// A set of buffers: what an instruction or a command clears.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleared(u8);

impl Cleared {
    /// No buffer.
    pub const NOTHING: Cleared = Cleared(0);
    /// What IA32_FLUSH_CMD.L1D_FLUSH clears: the cache, and with it the buffers that feed it.
    pub const L1D_FLUSH: Cleared = Cleared::of(&[Buffer::L1d, Buffer::Fill, Buffer::Store, Buffer::LoadPort]);
    /// What IA32_PRED_CMD.IBPB clears.
    pub const IBPB: Cleared = Cleared::of(&[Buffer::BranchPredictor]);

    /// Those of `buffers`.
    pub const fn of(buffers: &[Buffer]) -> Cleared {
        let (mut set, mut i) = (0, 0);
        while i < buffers.len() {
            set |= 1 << buffers[i] as u8;
            i += 1;
        }
        Cleared(set)
    }

    /// Whether `buffer` is cleared.
    pub const fn has(self, buffer: Buffer) -> bool {
        self.0 & 1 << buffer as u8 != 0
    }

    /// What either clears.
    pub const fn union(self, other: Cleared) -> Cleared {
        Cleared(self.0 | other.0)
    }
}

/// What a processor, or a guest's virtual one, says of VERW.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Enumeration {
    /// CPUID.(7,0):EDX.MD_CLEAR.
    pub md_clear: bool,
    /// IA32_ARCH_CAPABILITIES; 0 if there is no such register.
    pub arch_capabilities: u64,
    /// IA32_MCU_OPT_CTRL; what it has no enumerated bit for does not count.
    pub mcu_opt_ctrl: u64,
}

impl Enumeration {
    /// What VERW with a memory operand clears. A processor that says that it has MDS and MD_CLEAR is believed, whatever
    /// FB_CLEAR_DIS says: that bit suppresses only what FB_CLEAR promises.
    pub fn verw_clears(self) -> Cleared {
        let says = |bit| self.arch_capabilities & bit != 0;
        let disabled = says(arch_cap::FB_CLEAR_CTRL) && self.mcu_opt_ctrl & mcu_opt_ctrl::FB_CLEAR_DIS != 0;
        let mut cleared = Cleared::NOTHING;
        if self.md_clear && !says(arch_cap::MDS_NO) {
            cleared = cleared.union(Cleared::of(&[Buffer::Fill, Buffer::Store, Buffer::LoadPort]));
        }
        if says(arch_cap::FB_CLEAR) && !disabled {
            cleared = cleared.union(Cleared::of(&[Buffer::Fill]));
        }
        if says(arch_cap::RFDS_CLEAR) {
            cleared = cleared.union(Cleared::of(&[Buffer::RegisterFile]));
        }
        cleared
    }
}

/// Whose data it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Domain {
    /// The host's kernel.
    HostKernel,
    /// The host's user space.
    HostUser,
    /// A virtual machine, by its number.
    Vm(u64),
}

/// Whose data each buffer of a core holds.
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    dirty: [Vec<Domain>; Buffer::ALL.len()],
}

impl Buffers {
    /// `domain` begins to run: from now on its data is in every buffer.
    pub fn enter(&mut self, domain: Domain) {
        for owners in &mut self.dirty {
            if !owners.contains(&domain) {
                owners.push(domain);
            }
        }
    }

    /// Buffers are cleared.
    pub fn clear(&mut self, what: Cleared) {
        for buffer in Buffer::ALL {
            if what.has(buffer) {
                self.dirty[buffer as usize].clear();
            }
        }
    }

    /// Whose data `domain` could find in `buffer`, its own aside.
    pub fn foreign(&self, buffer: Buffer, domain: Domain) -> impl Iterator<Item = Domain> + '_ {
        self.dirty[buffer as usize].iter().copied().filter(move |&owner| owner != domain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// F6, F8: all combinations of the six bits that decide.
    #[test]
    fn ac_m4_what_verw_clears_over_all_enumerations() {
        for bits in 0..64u64 {
            let bit = |n: u32| bits >> n & 1 != 0;
            let (md_clear, mds_no, fb_clear) = (bit(0), bit(1), bit(2));
            let (fb_ctrl, fb_dis, rfds_clear) = (bit(3), bit(4), bit(5));
            let capabilities = [
                (mds_no, arch_cap::MDS_NO),
                (fb_clear, arch_cap::FB_CLEAR),
                (fb_ctrl, arch_cap::FB_CLEAR_CTRL),
                (rfds_clear, arch_cap::RFDS_CLEAR),
            ];
            let arch_capabilities =
                capabilities.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
            let mcu_opt_ctrl = if fb_dis { mcu_opt_ctrl::FB_CLEAR_DIS } else { 0 };
            let got = Enumeration { md_clear, arch_capabilities, mcu_opt_ctrl }.verw_clears();
            let mds = md_clear && !mds_no;
            let suppressed = fb_ctrl && fb_dis;
            assert_eq!(got.has(Buffer::Fill), mds || fb_clear && !suppressed, "{bits:06b}");
            assert_eq!(got.has(Buffer::Store), mds, "{bits:06b}");
            assert_eq!(got.has(Buffer::LoadPort), mds, "{bits:06b}");
            assert_eq!(got.has(Buffer::RegisterFile), rfds_clear, "{bits:06b}");
            assert!(!got.has(Buffer::L1d) && !got.has(Buffer::BranchPredictor));
        }
    }

    #[test]
    fn ac_a_missing_clear_is_seen_as_data_of_somebody_else() {
        let mut buffers = Buffers::default();
        let (one, two) = (Domain::Vm(1), Domain::Vm(2));
        let seen = |buffers: &Buffers, buffer| buffers.foreign(buffer, two).collect::<Vec<_>>();
        buffers.enter(Domain::HostKernel);
        buffers.enter(one);
        assert_eq!(seen(&buffers, Buffer::Fill), [Domain::HostKernel, one]);
        buffers.clear(Cleared::L1D_FLUSH);
        for buffer in [Buffer::Fill, Buffer::Store, Buffer::LoadPort, Buffer::L1d] {
            assert_eq!(seen(&buffers, buffer), [], "{buffer:?}");
        }
        for buffer in [Buffer::RegisterFile, Buffer::BranchPredictor] {
            assert_eq!(seen(&buffers, buffer), [Domain::HostKernel, one], "{buffer:?}");
        }
        buffers.clear(Cleared::IBPB);
        assert_eq!(seen(&buffers, Buffer::BranchPredictor), []);
        buffers.enter(two);
        buffers.enter(two);
        assert_eq!(seen(&buffers, Buffer::Fill), [], "its own data is nothing foreign");
        assert_eq!(buffers.foreign(Buffer::Fill, one).collect::<Vec<_>>(), [two]);
    }
}
