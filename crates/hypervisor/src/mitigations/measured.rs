//! What Debian's kernel 6.12.117 printed on 23 processors, one vCPU, with the default command line: measured with capability words and
//! IA32_ARCH_CAPABILITIES set by a debugger. Two cells are not what was measured but what a kernel prints whose IA32_TSX_CTRL does
//! something: that of A4 and N3 for TSX asynchronous abort, since Debian's kernel switches transactions off. [`linux`](super::linux) is held to it, and so are guests that boot on the same processors here.

/// A processor, and what was printed.
#[derive(Debug)]
pub struct Row {
    /// Name in the page where they were written down.
    pub name: &'static str,
    /// Model number of family 6.
    pub model: u8,
    /// Stepping.
    pub stepping: u8,
    /// Bits of IA32_ARCH_CAPABILITIES; `None`: there is no such register.
    pub capabilities: Option<&'static [u8]>,
    /// Features beside those that do not matter here.
    pub features: &'static [&'static str],
    /// The contents of [`FILES`].
    pub files: [&'static str; 6],
    /// Meltdown is mitigated by page-table isolation, and L1 terminal fault by inverted entries; else neither is there.
    pub meltdown: bool,
}

/// The files whose contents differ from row to row.
pub const FILES: [&str; 6] = [
    "mds",
    "mmio_stale_data",
    "tsx_async_abort",
    "reg_file_data_sampling",
    "gather_data_sampling",
    "indirect_target_selection",
];

/// Features that matter, and whose absence has to be asked for.
const CONTROLS: [&str; 8] =
    ["spec_ctrl", "stibp", "ssbd", "md_clear", "flush_l1d", "srbds_ctrl", "bhi_ctrl", "rrsba_ctrl"];

impl Row {
    /// IA32_ARCH_CAPABILITIES.
    pub fn arch_capabilities(&self) -> u64 {
        self.capabilities.unwrap_or_default().iter().fold(0, |bits, bit| bits | 1 << bit)
    }

    /// The processor as `--cpu` takes it.
    pub fn cpu(&self) -> String {
        let mut cpu = format!("skylake,model={},stepping={}", self.model, self.stepping);
        CONTROLS.iter().for_each(|name| cpu += &format!(",-{name}"));
        self.features.iter().for_each(|name| cpu += &format!(",+{name}"));
        match self.capabilities {
            Some(_) => cpu + &format!(",arch-cap={:#x}", self.arch_capabilities()),
            None => cpu + ",-arch_capabilities",
        }
    }
}

const MICROCODE: &[&str] = &["spec_ctrl", "stibp", "ssbd", "md_clear", "flush_l1d"];
const MICROCODE_RTM: &[&str] = &["spec_ctrl", "stibp", "ssbd", "md_clear", "flush_l1d", "rtm"];

const NA: &str = "Not affected";
const UNKNOWN: &str = "Unknown: Dependent on hypervisor status";
const ALIGNED: &str = "Mitigation: Aligned branch/return thunks";
const CCB: &str = "Mitigation: Clear CPU buffers; SMT Host state unknown";
const UCODE: &str = "Vulnerable: Clear CPU buffers attempted, no microcode; SMT Host state unknown";
const OLD: &str = "Vulnerable: No microcode";
const NO_TSX: &str = "Mitigation: TSX disabled";
const CLEARED: &str = "Mitigation: Clear Register File";
const NONE: &str = "Unknown: No mitigations";

const J1: &[u8] = &[0, 1, 3, 5, 6, 8, 17, 19];
const J4: &[u8] = &[0, 1, 3, 5, 6, 7, 17, 19, 26, 62];

const fn row(
    name: &'static str,
    (model, stepping): (u8, u8),
    capabilities: Option<&'static [u8]>,
    features: &'static [&'static str],
    files: [&'static str; 6],
    meltdown: bool,
) -> Row {
    Row { name, model, stepping, capabilities, features, files, meltdown }
}

/// The rows.
#[rustfmt::skip]
pub static ROWS: &[Row] = &[
    row("A0", (85, 4), None, &[], [UCODE, UCODE, NA, NA, UNKNOWN, ALIGNED], true),
    row("A1", (85, 4), Some(&[]), &["spec_ctrl", "stibp", "ssbd", "md_clear"], [CCB, UCODE, NA, NA, UNKNOWN, ALIGNED], true),
    row("A2", (85, 4), Some(&[]), MICROCODE, [CCB, CCB, NA, NA, UNKNOWN, ALIGNED], true),
    row("A4", (85, 4), Some(&[3, 6, 7]), MICROCODE_RTM, [CCB, CCB, NO_TSX, NA, UNKNOWN, ALIGNED], true),
    row("A5", (85, 4), Some(&[3, 6]), MICROCODE_RTM, [CCB, CCB, CCB, NA, UNKNOWN, ALIGNED], true),
    row("J7", (85, 4), Some(&[3, 6]), &["spec_ctrl", "stibp", "ssbd", "flush_l1d", "rtm"], [UCODE, UCODE, UCODE, NA, UNKNOWN, ALIGNED], true),
    row("A6", (85, 4), Some(&[3, 5, 6]), MICROCODE, [NA, UCODE, NA, NA, UNKNOWN, ALIGNED], true),
    row("A7", (85, 4), Some(&[3, 5, 6, 17]), MICROCODE, [NA, CCB, NA, NA, UNKNOWN, ALIGNED], true),
    row("A8", (85, 4), Some(&[0, 3, 4, 5, 6, 8, 13, 14, 15, 20, 24, 26, 27, 62]), MICROCODE, [NA; 6], false),
    row("J1", (106, 6), Some(J1), MICROCODE, [NA, CCB, NA, NA, UNKNOWN, ALIGNED], false),
    row("J2", (106, 6), Some(&[0, 1, 3, 5, 6, 8, 17, 19, 24, 26, 62]), MICROCODE, [NA, CCB, NA, NA, NA, NA], false),
    row("J6", (106, 6), Some(&[0, 1, 3, 5, 6, 8, 19, 24, 26, 62]), MICROCODE, [NA, UCODE, NA, NA, NA, NA], false),
    row("J3", (106, 6), Some(&[0, 1, 3, 5, 6, 17, 19, 26, 62]), MICROCODE_RTM, [NA, CCB, UCODE, NA, NA, NA], false),
    row("J4", (106, 6), Some(J4), MICROCODE, [NA, CCB, NO_TSX, NA, NA, NA], false),
    row("N1", (134, 6), Some(J1), MICROCODE, [NA, CCB, NA, OLD, NA, ALIGNED], false),
    row("N3", (134, 6), Some(J4), MICROCODE_RTM, [NA, CCB, NO_TSX, OLD, NA, NA], false),
    row("C1", (143, 4), Some(&[0, 1, 3, 5, 6, 8, 13, 14, 15, 17, 19, 24, 26, 27, 62]),
        &["spec_ctrl", "stibp", "ssbd", "md_clear", "flush_l1d", "bhi_ctrl", "rrsba_ctrl"], [NA; 6], false),
    row("C2", (143, 4), Some(&[0, 1, 3, 5, 6, 8, 13, 14, 15, 17, 19, 24]), MICROCODE, [NA, NA, NA, NA, NA, ALIGNED], false),
    row("C3", (143, 4), Some(&[0, 1, 3, 5, 6, 8, 13, 14, 15, 17, 19, 24, 26, 28, 62]), MICROCODE, [NA, NA, NA, CLEARED, NA, NA], false),
    row("C4", (143, 4), Some(&[]), MICROCODE, [CCB, NONE, NA, NA, NA, ALIGNED], true),
    row("D1", (151, 2), Some(&[0, 1, 3, 5, 6, 8, 13, 14, 15, 17, 19, 24, 26, 62]), MICROCODE, [NA, NA, NA, OLD, NA, NA], false),
    row("D2", (151, 2), Some(&[0, 1, 3, 5, 6, 8, 13, 14, 15, 17, 19, 24, 26, 28, 62]), MICROCODE, [NA, NA, NA, CLEARED, NA, NA], false),
    row("J5", (158, 12), Some(&[]), MICROCODE, [CCB, CCB, NA, NA, UNKNOWN, ALIGNED], true),
];

/// The row called `name`.
pub fn find(name: &str) -> Option<&'static Row> {
    ROWS.iter().find(|row| row.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mitigations::linux::{Processor, report};
    use silicon::model::CpuModel;

    #[test]
    fn ac_the_measured_rows() {
        for row in ROWS {
            let model = CpuModel::parse(&row.cpu()).unwrap();
            assert_eq!(model.chosen_arch_capabilities(), row.capabilities.map(|_| row.arch_capabilities()));
            // Whatever the machine of the test has.
            let cpu = Processor { avx: true, random: true, ..Processor::of(&model, row.arch_capabilities()) };
            let all = report(&cpu);
            let file = |name| all.iter().find(|(file, _)| *file == name).unwrap().1.as_str();
            assert_eq!(FILES.map(file), row.files, "{}", row.name);
            let pair = if row.meltdown { ["Mitigation: PTI", "Mitigation: PTE Inversion"] } else { [NA, NA] };
            assert_eq!(["meltdown", "l1tf"].map(file), pair, "{}", row.name);
            for same in ["vmscape", "tsa", "spec_rstack_overflow"] {
                assert_eq!(file(same), NA, "{}", row.name);
            }
            assert_eq!(file("srbds"), if row.name == "J5" { UNKNOWN } else { NA }, "{}", row.name);
        }
        assert!(find("J5").is_some() && find("J8").is_none());
    }
}
