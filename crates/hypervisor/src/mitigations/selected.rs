//! What a host kernel makes of its processor's bugs and its command line, and what KVM then offers to guests: pure functions
//! (kernel: the `…_select_mitigation` functions of arch/x86/kernel/cpu/bugs.c, `vmx_setup_l1d_flush` in arch/x86/kvm/vmx/vmx.c,
//! `kvm_get_arch_capabilities` in arch/x86/kvm/x86.c).

use silicon::model::speculation::arch_cap::*;
use silicon::model::speculation::{Bug, Bugs};
use silicon::model::{CpuModel, Feature};

use crate::msr::SETTABLE_ARCH_CAPABILITIES;

use super::command_line::{All, Clear, CommandLine, L1dFlush, L1tf, Tsx};

/// The host's processor, as far as speculation goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// What it has.
    pub bugs: Bugs,
    /// IA32_ARCH_CAPABILITIES.
    pub arch_capabilities: u64,
    /// CPUID.(7,0):EBX.RTM, if the kernel leaves it on.
    pub rtm: bool,
    /// CPUID.(7,0):EDX.MD_CLEAR.
    pub md_clear: bool,
    /// CPUID.(7,0):EDX.SPEC_CTRL: IBRS and IBPB.
    pub spec_ctrl: bool,
}

impl CommandLine {
    /// The processors of a host of `model` that has the named part's bugs.
    pub fn model(&self, model: CpuModel) -> CpuModel {
        match self.part {
            Some(part) => model.on_part(part.0, Hardware::of(&model, self).rtm),
            None => model,
        }
    }
}

impl Hardware {
    /// That of a host whose processors are of `model`, which does not speculate, or have the bugs of the part that `line` names.
    pub fn of(model: &CpuModel, line: &CommandLine) -> Hardware {
        let Some(part) = line.part else {
            return Hardware {
                bugs: Bugs::NONE,
                arch_capabilities: model.arch_capabilities(),
                rtm: model.has(Feature::Rtm),
                md_clear: model.has(Feature::MdClear),
                spec_ctrl: model.has(Feature::SpecCtrl),
            };
        };
        let part = part.0;
        let can_disable = part.arch_capabilities & TSX_CTRL != 0;
        let off = match line.tsx {
            Tsx::Off => true,
            Tsx::On => false,
            Tsx::Auto => part.bugs.has(Bug::Taa),
        };
        Hardware {
            bugs: part.bugs,
            arch_capabilities: part.arch_capabilities,
            rtm: part.cpuid.has(Feature::Rtm) && !(can_disable && off),
            md_clear: part.cpuid.has(Feature::MdClear),
            spec_ctrl: part.cpuid.has(Feature::SpecCtrl),
        }
    }

    fn says(&self, bits: u64) -> bool {
        self.arch_capabilities & bits != 0
    }

    /// Whether TSX asynchronous abort can happen.
    pub fn taa(&self) -> bool {
        self.bugs.has(Bug::Taa) && self.rtm
    }
}

/// What is done about L1 terminal fault at VM entries, the least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Flush {
    /// Nothing has to be.
    NotRequired,
    /// Nothing, though it would have to be.
    Never,
    /// The L1 data cache is flushed if something may have come into it.
    Cond,
    /// It is flushed.
    Always,
}

impl Flush {
    /// As `/sys/module/kvm_intel/parameters/vmentry_l1d_flush` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Flush::NotRequired => "not required",
            Flush::Never => "never",
            Flush::Cond => "cond",
            Flush::Always => "always",
        }
    }

    pub(crate) fn from_bits(bits: u8) -> Flush {
        match bits {
            1 => Flush::Never,
            2 => Flush::Cond,
            3 => Flush::Always,
            _ => Flush::NotRequired,
        }
    }
}

/// What the host does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selected {
    /// VERW before every return to user space and every VM entry (kernel: X86_FEATURE_CLEAR_CPU_BUF).
    pub clear_buffers: bool,
    /// VERW before entries of VMs that have host MMIO in a memory slot (kernel: `mmio_stale_data_clear`).
    pub clear_for_mmio: bool,
    /// `l1tf=`; `None`: the processor does not have it.
    pub l1tf: Option<L1tf>,
    /// Microcode mitigates gather data sampling.
    pub gds_mitigated: bool,
    /// IBPB when another vCPU is loaded.
    pub branch_barrier: bool,
    /// SMT is switched off.
    pub nosmt: bool,
}

impl Selected {
    /// What the command line makes of the processor.
    pub fn of(hardware: &Hardware, line: &CommandLine) -> Selected {
        let has = |bug| hardware.bugs.has(bug);
        let off = line.all == All::Off;
        let default = match line.all {
            All::Auto => Clear::Full,
            All::AutoNosmt => Clear::FullNosmt,
            All::Off => Clear::Off,
        };
        let asked = |affected: bool, said: Option<Clear>| match affected {
            true => said.unwrap_or(default),
            false => Clear::Off,
        };
        let mds = asked(has(Bug::Mds), line.mds);
        let taa = asked(hardware.taa(), line.taa);
        let mmio = asked(has(Bug::MmioStaleData), line.mmio_stale_data);
        let rfds = has(Bug::Rfds) && hardware.says(RFDS_CLEAR) && line.rfds.unwrap_or(!off);
        // MMIO stale data needs what MDS and TAA need, where there are these.
        let shared = mmio != Clear::Off && (has(Bug::Mds) || hardware.taa());
        let clear_buffers = mds != Clear::Off || taa != Clear::Off || shared || rfds;
        let l1tf = has(Bug::L1tf).then(|| {
            let default = match line.all {
                All::Auto => L1tf::Flush,
                All::AutoNosmt => L1tf::FlushNosmt,
                All::Off => L1tf::Off,
            };
            line.l1tf.unwrap_or(default)
        });
        let nosmt =
            [mds, taa, mmio].contains(&Clear::FullNosmt) || l1tf.is_some_and(|l1tf| l1tf >= L1tf::FlushNosmt);
        Selected {
            clear_buffers,
            clear_for_mmio: mmio != Clear::Off && !clear_buffers,
            l1tf,
            gds_mitigated: has(Bug::Gds) && hardware.says(GDS_CTRL) && line.gds.unwrap_or(!off),
            branch_barrier: has(Bug::SpectreV2) && hardware.spec_ctrl && line.spectre_v2.unwrap_or(!off),
            nosmt,
        }
    }

    /// What VM entries do about L1 terminal fault under a value of `kvm_intel.vmentry_l1d_flush`.
    pub fn flush(&self, hardware: &Hardware, parameter: L1dFlush) -> Flush {
        let Some(l1tf) = self.l1tf else { return Flush::NotRequired };
        if hardware.says(SKIP_L1DFL_VMENTRY) {
            return Flush::NotRequired;
        }
        match (parameter, l1tf) {
            (L1dFlush::Auto, L1tf::Off) => Flush::Never,
            (_, L1tf::FullForce) | (L1dFlush::Auto, L1tf::Full) | (L1dFlush::Always, _) => Flush::Always,
            (L1dFlush::Auto | L1dFlush::Cond, _) => Flush::Cond,
            (L1dFlush::Never, _) => Flush::Never,
        }
    }

    /// IA32_ARCH_CAPABILITIES as guests may have it at best: what the host has of the bits that a client may set, and what it can
    /// say besides (kernel: `kvm_get_arch_capabilities`, which leaves FB_CLEAR_CTRL and GDS_CTRL out, since its guests do not have
    /// their register).
    pub fn supported(&self, hardware: &Hardware, flush: Flush) -> u64 {
        let lacks = |bug, bit| if hardware.bugs.has(bug) { 0 } else { bit };
        let mut value = hardware.arch_capabilities & SETTABLE_ARCH_CAPABILITIES | IF_PSCHANGE_MC_NO;
        if flush != Flush::Never {
            value |= SKIP_L1DFL_VMENTRY;
        }
        value |= lacks(Bug::Meltdown, RDCL_NO)
            | lacks(Bug::SpecStoreBypass, SSB_NO)
            | lacks(Bug::Mds, MDS_NO)
            | lacks(Bug::Rfds, RFDS_NO)
            | lacks(Bug::Its, ITS_NO);
        if !hardware.rtm {
            value &= !TAA_NO;
        } else {
            value |= lacks(Bug::Taa, TAA_NO);
        }
        if self.gds_mitigated {
            value |= GDS_NO;
        }
        value | lacks(Bug::Gds, GDS_NO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostParams;

    fn host(line: &str) -> (Hardware, Selected) {
        let line = HostParams::parse(line).unwrap().mitigations;
        let hardware = Hardware::of(&CpuModel::default(), &line);
        let selected = Selected::of(&hardware, &line);
        (hardware, selected)
    }

    /// What is cleared: at every entry, or at entries of VMs with host MMIO.
    #[test]
    fn ac_which_parts_clear_buffers() {
        for (line, every, mmio) in [
            ("", false, false),
            ("ring3.part=skylake-sp", true, false),
            ("ring3.part=skylake-sp mitigations=off", false, false),
            ("ring3.part=skylake-sp mds=off", true, false),
            ("ring3.part=skylake-sp mds=off tsx_async_abort=off mmio_stale_data=off", false, false),
            ("ring3.part=skylake-sp mitigations=off mmio_stale_data=full", true, false),
            ("ring3.part=cascade-lake", false, true),
            ("ring3.part=cascade-lake tsx=on", true, false),
            ("ring3.part=cascade-lake tsx=auto", false, true),
            ("ring3.part=cascade-lake tsx=on tsx_async_abort=off mmio_stale_data=off", false, false),
            ("ring3.part=ice-lake-sp", false, true),
            ("ring3.part=ice-lake-sp mmio_stale_data=off", false, false),
            ("ring3.part=alder-lake", true, false),
            ("ring3.part=alder-lake reg_file_data_sampling=off", false, false),
            ("ring3.part=tremont reg_file_data_sampling=off", false, true),
            ("ring3.part=sapphire-rapids", false, false),
        ] {
            let (_, selected) = host(line);
            assert_eq!((selected.clear_buffers, selected.clear_for_mmio), (every, mmio), "{line}");
        }
    }

    #[test]
    fn ac_the_flush_follows_l1tf_and_the_parameter() {
        use L1dFlush::{Always as A, Auto, Cond as C, Never as N};
        for (line, parameter, flush, skips) in [
            ("", N, Flush::NotRequired, true),
            ("ring3.part=cascade-lake", N, Flush::NotRequired, true),
            ("ring3.part=skylake-sp", Auto, Flush::Cond, true),
            ("ring3.part=skylake-sp", N, Flush::Never, false),
            ("ring3.part=skylake-sp", A, Flush::Always, true),
            ("ring3.part=skylake-sp l1tf=full", Auto, Flush::Always, true),
            ("ring3.part=skylake-sp l1tf=full", C, Flush::Cond, true),
            ("ring3.part=skylake-sp l1tf=full,force", N, Flush::Always, true),
            ("ring3.part=skylake-sp l1tf=off", Auto, Flush::Never, false),
            ("ring3.part=skylake-sp l1tf=off", C, Flush::Cond, true),
            ("ring3.part=skylake-sp mitigations=off", Auto, Flush::Never, false),
        ] {
            let (hardware, selected) = host(line);
            assert_eq!(selected.flush(&hardware, parameter), flush, "{line} {parameter:?}");
            let supported = selected.supported(&hardware, flush);
            assert_eq!(supported & SKIP_L1DFL_VMENTRY != 0, skips, "{line} {parameter:?}");
        }
    }

    #[test]
    fn ac_what_is_supported_is_the_truth() {
        for row in silicon::model::speculation::PARTS {
            for line in ["", "mitigations=off", "tsx=on"] {
                let (hardware, selected) = host(&format!("ring3.part={} {line}", row.name));
                let supported = selected.supported(&hardware, selected.flush(&hardware, L1dFlush::Auto));
                assert_eq!(supported & !SETTABLE_ARCH_CAPABILITIES, 0, "{}", row.name);
                for (bug, no) in [
                    (Bug::Meltdown, RDCL_NO),
                    (Bug::Mds, MDS_NO),
                    (Bug::SpecStoreBypass, SSB_NO),
                    (Bug::Rfds, RFDS_NO),
                    (Bug::Its, ITS_NO),
                    (Bug::MmioStaleData, MMIO_IMMUNE),
                    (Bug::Taa, TAA_NO),
                ] {
                    assert!(!(row.bugs.has(bug) && supported & no == no), "{} {bug:?}", row.name);
                }
                let gds = supported & GDS_NO != 0;
                assert_eq!(gds, !row.bugs.has(Bug::Gds) || selected.gds_mitigated, "{}", row.name);
                // FB_CLEAR is passed through, never made up.
                assert_eq!(supported & FB_CLEAR, row.arch_capabilities & FB_CLEAR, "{}", row.name);
            }
        }
        let (hardware, selected) = host("");
        let model = CpuModel::default();
        let expected = model.arch_capabilities() & !TAA_NO;
        assert_eq!(selected.supported(&hardware, Flush::NotRequired), expected, "no RTM, so no TAA_NO");
    }

    #[test]
    fn ac_smt_goes_where_it_must() {
        for (line, nosmt) in [
            ("ring3.part=skylake-sp", false),
            ("ring3.part=skylake-sp mitigations=auto,nosmt", true),
            ("ring3.part=skylake-sp mds=full,nosmt", true),
            ("ring3.part=skylake-sp l1tf=full", true),
            ("ring3.part=sapphire-rapids mitigations=auto,nosmt", false),
        ] {
            assert_eq!(host(line).1.nosmt, nosmt, "{line}");
        }
    }
}
