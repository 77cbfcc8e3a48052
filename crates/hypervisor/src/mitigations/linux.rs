//! What a Linux guest will say of its processor's bugs, in `/sys/devices/system/cpu/vulnerabilities`, without booting one: Debian's 6.12
//! (6.12.117) on an Intel processor, with one CPU, no VMX and the default command line. (Kernel: `cpu_set_bug_bits` in
//! arch/x86/kernel/cpu/common.c; the `…_select_mitigation` and `…_show_state` functions in bugs.c.)

use silicon::model::speculation::arch_cap::*;
use silicon::model::{CpuModel, Feature};

/// What Linux looks at: family 6, and these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Processor {
    /// CPUID.1: model, with the extended model.
    pub model: u8,
    /// CPUID.1: stepping.
    pub stepping: u8,
    /// IA32_ARCH_CAPABILITIES; 0 where there is none.
    pub arch_capabilities: u64,
    /// CPUID.1:ECX\[31\].
    pub hypervisor: bool,
    /// CPUID.(7,0):EDX\[26\]: IBRS and IBPB.
    pub spec_ctrl: bool,
    /// CPUID.(7,0):EDX\[31\].
    pub ssbd: bool,
    /// CPUID.(7,0):EDX\[10\].
    pub md_clear: bool,
    /// CPUID.(7,0):EDX\[28\].
    pub flush_l1d: bool,
    /// CPUID.(7,0):EDX\[9\].
    pub srbds_ctrl: bool,
    /// CPUID.(7,0):EBX\[11\].
    pub rtm: bool,
    /// CPUID.(7,2):EDX\[4\].
    pub bhi_ctrl: bool,
    /// CPUID.(7,2):EDX\[2\].
    pub rrsba_ctrl: bool,
    /// CPUID.1:ECX\[28\].
    pub avx: bool,
    /// RDRAND or RDSEED.
    pub random: bool,
}

/// Why a model and its steppings are in the kernel's lists of what has bugs and what has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listed {
    Mmio,
    /// The kind of MMIO stale data that also comes as SRBDS.
    Sbds,
    Srbds,
    Retbleed,
    Gds,
    Rfds,
    Its,
    /// Not in a guest.
    Vmscape,
    NoMmio,
    NoItlbMultihit,
    NoPbrsb,
    NoSwapgs,
    NoMds,
    NoL1tf,
}

/// A row of the kernel's lists: model, first and last stepping, what it is listed for.
type Row = (u8, u8, u8, &'static [Listed]);

const ANY: u8 = 15;

/// Intel's models of family 6 that [`crate`]'s processors can be, and near relations (kernel: `cpu_vuln_whitelist`,
/// `cpu_vuln_blacklist`). The first row that fits counts.
const MODELS: &[Row] = {
    use Listed::*;
    &[
        (0x2d, 0, ANY, &[Vmscape]),
        (0x2a, 0, ANY, &[Vmscape]),
        (0x3e, 0, ANY, &[Vmscape]),
        (0x3a, 0, ANY, &[Srbds, Vmscape]),
        (0x3c, 0, ANY, &[Srbds, Vmscape]),
        (0x45, 0, ANY, &[Srbds, Vmscape]),
        (0x46, 0, ANY, &[Srbds, Vmscape]),
        (0x3f, 0, ANY, &[Mmio, Vmscape]),
        (0x56, 0, ANY, &[Mmio, Vmscape]),
        (0x4f, 0, ANY, &[Mmio, Vmscape]),
        (0x47, 0, ANY, &[Srbds, Vmscape]),
        (0x3d, 0, ANY, &[Srbds, Vmscape]),
        (0x55, 0, 5, &[Mmio, Retbleed, Gds, Vmscape]),
        (0x55, 6, ANY, &[Mmio, Retbleed, Gds, Its, Vmscape]),
        (0x4e, 0, ANY, &[Mmio, Retbleed, Gds, Srbds, Vmscape]),
        (0x5e, 0, ANY, &[Mmio, Retbleed, Gds, Srbds, Vmscape]),
        (0x8e, 0, 0xb, &[Mmio, Retbleed, Gds, Srbds, Vmscape]),
        (0x8e, 0xc, ANY, &[Mmio, Retbleed, Gds, Srbds, Its, Vmscape]),
        (0x9e, 0, 0xc, &[Mmio, Retbleed, Gds, Srbds, Vmscape]),
        (0x9e, 0xd, ANY, &[Mmio, Retbleed, Gds, Srbds, Its, Vmscape]),
        (0x7e, 0, ANY, &[Mmio, Sbds, Retbleed, Gds, Its]),
        (0x6c, 0, ANY, &[Mmio, Gds, Its]),
        (0x6a, 0, ANY, &[Mmio, Gds, Its]),
        (0xa5, 0, ANY, &[Mmio, Sbds, Retbleed, Gds, Its, Vmscape]),
        (0x8c, 0, ANY, &[NoMmio, Gds, Its]),
        (0x8d, 0, ANY, &[NoMmio, Gds, Its]),
        (0xa7, 0, ANY, &[Mmio, Retbleed, Gds, Its]),
        (0x97, 0, ANY, &[NoMmio, Rfds, Vmscape]),
        (0x9a, 0, ANY, &[NoMmio, Rfds, Vmscape]),
        (0xb7, 0, ANY, &[Rfds, Vmscape]),
        (0xba, 0, ANY, &[Rfds, Vmscape]),
        (0xbf, 0, ANY, &[Rfds, Vmscape]),
        (0x8f, 0, ANY, &[Vmscape]),
        (0xcf, 0, ANY, &[Vmscape]),
        (0xad, 0, ANY, &[Vmscape]),
        (0x96, 0, ANY, &[Mmio, Sbds, Rfds, NoPbrsb]),
        (0x86, 0, ANY, &[Mmio, Rfds, NoItlbMultihit, NoPbrsb]),
        (0x9c, 0, ANY, &[Mmio, Sbds, Rfds, NoPbrsb]),
        (0x5c, 0, ANY, &[Rfds, NoMds, NoL1tf, NoSwapgs, NoItlbMultihit, NoMmio]),
        (0x5f, 0, ANY, &[Rfds, NoMds, NoL1tf, NoSwapgs, NoItlbMultihit, NoMmio]),
        (0x7a, 0, ANY, &[Rfds, NoMds, NoL1tf, NoSwapgs, NoItlbMultihit, NoMmio, NoPbrsb]),
    ]
};

/// How Linux keeps branches from being mistrained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SpectreV2 {
    Eibrs,
    Ibrs,
    Retpolines,
}

const NOT_AFFECTED: &str = "Not affected";
const CLEARS: &str = "Mitigation: Clear CPU buffers";
const NO_MICROCODE: &str = "Vulnerable: Clear CPU buffers attempted, no microcode";
const HYPERVISOR_KNOWS: &str = "Unknown: Dependent on hypervisor status";

impl Processor {
    /// A guest of `model` that has been told `arch_capabilities`.
    pub fn of(model: &CpuModel, arch_capabilities: u64) -> Processor {
        let has = |feature| model.has(feature);
        let (number, stepping) = model.numbers();
        Processor {
            model: number,
            stepping,
            arch_capabilities: if has(Feature::ArchCapabilities) { arch_capabilities } else { 0 },
            hypervisor: true,
            spec_ctrl: has(Feature::SpecCtrl),
            ssbd: has(Feature::Ssbd),
            md_clear: has(Feature::MdClear),
            flush_l1d: has(Feature::FlushL1d),
            srbds_ctrl: has(Feature::SrbdsCtrl),
            rtm: has(Feature::Rtm),
            bhi_ctrl: has(Feature::BhiCtrl),
            rrsba_ctrl: has(Feature::RrsbaCtrl),
            avx: has(Feature::Avx),
            random: has(Feature::Rdrand) || has(Feature::Rdseed),
        }
    }

    fn listed(&self, why: Listed) -> bool {
        let fits = |row: &&Row| row.0 == self.model && (row.1..=row.2).contains(&self.stepping);
        MODELS.iter().find(fits).is_some_and(|row| row.3.contains(&why))
    }

    fn cap(&self, bits: u64) -> bool {
        self.arch_capabilities & bits == bits
    }

    /// What is known of the sibling thread.
    fn smt(&self) -> &'static str {
        if self.hypervisor { "; SMT Host state unknown" } else { "; SMT disabled" }
    }

    fn meltdown(&self) -> bool {
        !self.cap(RDCL_NO)
    }

    fn mmio(&self) -> bool {
        !self.cap(MMIO_IMMUNE) && self.listed(Listed::Mmio)
    }

    fn retbleed(&self) -> bool {
        self.listed(Listed::Retbleed) || self.cap(RSBA)
    }

    fn spectre_v2(&self) -> SpectreV2 {
        if self.cap(IBRS_ALL) {
            SpectreV2::Eibrs
        } else if self.retbleed() && self.spec_ctrl {
            SpectreV2::Ibrs
        } else {
            SpectreV2::Retpolines
        }
    }

    fn branch_history(&self) -> &'static str {
        if !self.cap(IBRS_ALL) && !self.hypervisor {
            return "; BHI: Not affected";
        }
        let rrsba_disabled = !self.cap(RRSBA) || self.rrsba_ctrl;
        if self.spectre_v2() == SpectreV2::Retpolines && rrsba_disabled {
            "; BHI: Retpoline"
        } else if self.bhi_ctrl {
            "; BHI: BHI_DIS_S"
        } else {
            "; BHI: SW loop, KVM: SW loop"
        }
    }

    fn spectre_v2_text(&self) -> String {
        let mode = self.spectre_v2();
        let name = match mode {
            SpectreV2::Eibrs => "Mitigation: Enhanced / Automatic IBRS",
            SpectreV2::Ibrs => "Mitigation: IBRS",
            SpectreV2::Retpolines => "Mitigation: Retpolines",
        };
        let ibpb = if self.spec_ctrl { "; IBPB: conditional" } else { "" };
        let firmware = if mode == SpectreV2::Retpolines && self.spec_ctrl { "; IBRS_FW" } else { "" };
        let threads = if mode == SpectreV2::Eibrs { "" } else { "; STIBP: disabled; RSB filling" };
        let affected = self.cap(IBRS_ALL) && !self.cap(PBRSB_NO) && !self.listed(Listed::NoPbrsb);
        let barrier = if affected { "SW sequence" } else { NOT_AFFECTED };
        format!("{name}{ibpb}{firmware}{threads}; PBRSB-eIBRS: {barrier}{}", self.branch_history())
    }

    fn mds_text(&self) -> String {
        if self.cap(MDS_NO) || self.listed(Listed::NoMds) {
            return NOT_AFFECTED.into();
        }
        let text = if self.md_clear { CLEARS } else { NO_MICROCODE };
        format!("{text}{}", self.smt())
    }

    /// Debian's kernel switches transactions off where it can (CONFIG_X86_INTEL_TSX_MODE_OFF).
    fn transactions(&self) -> bool {
        self.rtm && !self.cap(TSX_CTRL)
    }

    fn taa_text(&self) -> String {
        if self.cap(TAA_NO) || !self.rtm && !self.cap(TSX_CTRL) {
            return NOT_AFFECTED.into();
        }
        if !self.transactions() {
            return "Mitigation: TSX disabled".into();
        }
        // VERW is not sure to clear where there is no MDS.
        let clears = self.md_clear && !self.cap(MDS_NO);
        format!("{}{}", if clears { CLEARS } else { NO_MICROCODE }, self.smt())
    }

    fn mmio_text(&self) -> String {
        if self.cap(MMIO_IMMUNE) || !self.mmio() && self.listed(Listed::NoMmio) {
            return NOT_AFFECTED.into();
        }
        if !self.mmio() {
            return "Unknown: No mitigations".into();
        }
        let clears = self.cap(FB_CLEAR) || self.md_clear && self.flush_l1d && !self.cap(MDS_NO);
        format!("{}{}", if clears { CLEARS } else { NO_MICROCODE }, self.smt())
    }

    fn rfds_text(&self) -> &'static str {
        match (self.cap(RFDS_NO), self.cap(RFDS_CLEAR), self.listed(Listed::Rfds)) {
            (false, true, _) => "Mitigation: Clear Register File",
            (false, false, true) => "Vulnerable: No microcode",
            _ => NOT_AFFECTED,
        }
    }

    fn gds_text(&self) -> &'static str {
        if !self.listed(Listed::Gds) || self.cap(GDS_NO) || !self.avx {
            NOT_AFFECTED
        } else if self.hypervisor {
            HYPERVISOR_KNOWS
        } else if self.cap(GDS_CTRL) {
            "Mitigation: Microcode"
        } else {
            "Vulnerable: No microcode"
        }
    }

    fn its_text(&self) -> &'static str {
        let affected = !self.cap(ITS_NO) && !self.bhi_ctrl && (self.hypervisor || self.listed(Listed::Its));
        if affected { "Mitigation: Aligned branch/return thunks" } else { NOT_AFFECTED }
    }

    fn srbds_text(&self) -> &'static str {
        let listed = self.listed(Listed::Srbds) || self.listed(Listed::Sbds);
        if !listed || !self.random {
            NOT_AFFECTED
        } else if self.cap(MDS_NO) && !self.transactions() && !self.mmio() {
            "Mitigation: TSX disabled"
        } else if self.hypervisor {
            HYPERVISOR_KNOWS
        } else if self.srbds_ctrl {
            "Mitigation: Microcode"
        } else {
            "Vulnerable: No microcode"
        }
    }

    fn retbleed_text(&self) -> &'static str {
        match (self.retbleed(), self.spectre_v2()) {
            (false, _) => NOT_AFFECTED,
            (true, SpectreV2::Ibrs) => "Mitigation: IBRS",
            (true, SpectreV2::Eibrs) => "Mitigation: Enhanced IBRS",
            (true, SpectreV2::Retpolines) => "Vulnerable",
        }
    }

    fn store_bypass_text(&self) -> &'static str {
        match (self.cap(SSB_NO), self.ssbd) {
            (true, _) => NOT_AFFECTED,
            (false, true) => "Mitigation: Speculative Store Bypass disabled via prctl",
            (false, false) => "Vulnerable",
        }
    }

    fn multihit_text(&self) -> &'static str {
        let none = self.cap(IF_PSCHANGE_MC_NO) || self.listed(Listed::NoItlbMultihit);
        if none { NOT_AFFECTED } else { "KVM: Mitigation: VMX unsupported" }
    }

    fn vmscape_text(&self) -> &'static str {
        let affected = self.listed(Listed::Vmscape) && !self.hypervisor;
        if affected { "Mitigation: IBPB before exit to userspace" } else { NOT_AFFECTED }
    }
}

/// The files, in alphabetical order, with their contents without the end of the line.
pub fn report(cpu: &Processor) -> Vec<(&'static str, String)> {
    let l1tf = cpu.meltdown() && !cpu.listed(Listed::NoL1tf);
    let swapgs = if cpu.listed(Listed::NoSwapgs) { "usercopy" } else { "usercopy/swapgs" };
    let v1 = format!("Mitigation: {swapgs} barriers and __user pointer sanitization");
    vec![
        ("gather_data_sampling", cpu.gds_text().into()),
        ("indirect_target_selection", cpu.its_text().into()),
        ("itlb_multihit", cpu.multihit_text().into()),
        ("l1tf", if l1tf { "Mitigation: PTE Inversion" } else { NOT_AFFECTED }.into()),
        ("mds", cpu.mds_text()),
        ("meltdown", if cpu.meltdown() { "Mitigation: PTI" } else { NOT_AFFECTED }.into()),
        ("mmio_stale_data", cpu.mmio_text()),
        ("reg_file_data_sampling", cpu.rfds_text().into()),
        ("retbleed", cpu.retbleed_text().into()),
        ("spec_rstack_overflow", NOT_AFFECTED.into()),
        ("spec_store_bypass", cpu.store_bypass_text().into()),
        ("spectre_v1", v1),
        ("spectre_v2", cpu.spectre_v2_text()),
        ("srbds", cpu.srbds_text().into()),
        ("tsa", NOT_AFFECTED.into()),
        ("tsx_async_abort", cpu.taa_text()),
        ("vmscape", cpu.vmscape_text().into()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const NA: &str = NOT_AFFECTED;

    fn bits(list: &[u8]) -> u64 {
        list.iter().fold(0, |bits, bit| bits | 1 << bit)
    }

    fn guest(model: u8, stepping: u8, arch_capabilities: u64) -> Processor {
        Processor {
            model,
            stepping,
            arch_capabilities,
            hypervisor: true,
            avx: true,
            random: true,
            ..Processor::default()
        }
    }

    fn with_spec(cpu: Processor) -> Processor {
        Processor { spec_ctrl: true, ssbd: true, ..cpu }
    }

    /// With what current microcode adds to CPUID.
    fn current(model: u8, stepping: u8, arch_capabilities: u64) -> Processor {
        let cpu = with_spec(guest(model, stepping, arch_capabilities));
        Processor { md_clear: true, flush_l1d: true, ..cpu }
    }

    fn file(cpu: &Processor, name: &str) -> String {
        report(cpu).into_iter().find(|(file, _)| *file == name).unwrap().1
    }

    const J1: &[u8] = &[0, 1, 3, 5, 6, 8, 17, 19];
    const J2: &[u8] = &[0, 1, 3, 5, 6, 8, 17, 19, 24, 26, 62];
    const C1: &[u8] = &[0, 1, 3, 5, 6, 8, 13, 14, 15, 17, 19, 24, 26, 27, 62];

    #[test]
    fn ac_branches() {
        let old =
            "Mitigation: Retpolines; STIBP: disabled; RSB filling; PBRSB-eIBRS: Not affected; BHI: Retpoline";
        assert_eq!(file(&guest(85, 4, 0), "spectre_v2"), old);
        let ibrs = file(&current(85, 4, 0), "spectre_v2");
        assert!(
            ibrs.starts_with("Mitigation: IBRS; IBPB: conditional; STIBP: disabled; RSB filling; "),
            "{ibrs}"
        );
        let eibrs = |cpu: Processor| file(&cpu, "spectre_v2");
        let text = |barrier, history| {
            format!(
                "Mitigation: Enhanced / Automatic IBRS; IBPB: conditional; PBRSB-eIBRS: {barrier}; BHI: {history}"
            )
        };
        let loops = "SW loop, KVM: SW loop";
        assert_eq!(eibrs(current(106, 6, bits(J1))), text("SW sequence", loops));
        assert_eq!(eibrs(current(106, 6, bits(J2))), text(NA, loops));
        assert_eq!(eibrs(current(134, 6, bits(J1))), text(NA, loops));
        let c1 = Processor { bhi_ctrl: true, rrsba_ctrl: true, ..current(143, 4, bits(C1)) };
        assert_eq!(eibrs(c1), text(NA, "BHI_DIS_S"));
        // BHI_NO changes nothing.
        assert_eq!(eibrs(current(143, 4, bits(C1) | BHI_NO)), text(NA, loops));
        assert_eq!(file(&guest(85, 4, 0), "retbleed"), "Vulnerable");
        assert_eq!(file(&current(85, 4, 0), "retbleed"), "Mitigation: IBRS");
        for newer in [106, 143, 151] {
            assert_eq!(file(&current(newer, 6, bits(J1)), "retbleed"), NA);
        }
    }

    #[test]
    fn ac_what_hangs_on_one_bit() {
        let multihit = |caps| file(&current(85, 4, caps), "itlb_multihit");
        assert_eq!(
            (multihit(0), multihit(IF_PSCHANGE_MC_NO)),
            ("KVM: Mitigation: VMX unsupported".into(), NA.into())
        );
        let bypass = |cpu: Processor| file(&cpu, "spec_store_bypass");
        assert_eq!(bypass(guest(85, 4, 0)), "Vulnerable");
        assert_eq!(bypass(current(85, 4, 0)), "Mitigation: Speculative Store Bypass disabled via prctl");
        assert_eq!(bypass(current(85, 4, SSB_NO)), NA);
    }
}
