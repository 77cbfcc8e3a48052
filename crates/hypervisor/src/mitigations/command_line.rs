//! The part that the host has and the mitigations that its kernel's command line asks for (kernel:
//! Documentation/admin-guide/hw-vuln and kernel-parameters.txt).

use silicon::model::CpuModel;
use silicon::model::speculation::{SpeculationRow, part};

use super::selected::{Flush, Hardware, Selected};
use crate::host::{HostParams, Row, module_bool, put};

/// `mitigations=`: what the others are by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum All {
    /// On.
    #[default]
    Auto,
    /// On, and SMT off where a bug needs that.
    AutoNosmt,
    /// Off.
    Off,
}

/// `mds=`, `tsx_async_abort=`, `mmio_stale_data=`: buffers are cleared with VERW.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clear {
    /// On.
    Full,
    /// On, and SMT off.
    FullNosmt,
    /// Off.
    Off,
}

/// `l1tf=`: what a hypervisor does about L1 terminal fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum L1tf {
    /// Nothing.
    Off,
    /// Flushes when it is needed, and does not warn.
    FlushNowarn,
    /// Flushes when it is needed.
    Flush,
    /// The same, and SMT off.
    FlushNosmt,
    /// Always flushes, and SMT off.
    Full,
    /// The same whatever `kvm_intel.vmentry_l1d_flush` says.
    FullForce,
}

/// `kvm_intel.vmentry_l1d_flush=`, which can be written while VMs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum L1dFlush {
    /// What `l1tf=` says.
    #[default]
    Auto,
    /// Not at all.
    Never,
    /// At entries before which something may have come into the cache.
    Cond,
    /// At every entry.
    Always,
}

/// `tsx=`: transactional memory on parts with IA32_TSX_CTRL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Tsx {
    /// There is none (Debian's default).
    #[default]
    Off,
    /// There is.
    On,
    /// There is on parts without TSX asynchronous abort.
    Auto,
}

/// `ring3.fb_clear_dis=`: when IA32_MCU_OPT_CTRL.FB_CLEAR_DIS is written for guests that are not to be slowed down by VERW.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FbClearDis {
    /// RDMSR and WRMSR before every entry, WRMSR after every exit, for guests that the kernel chooses (kernel: `vmx_disable_fb_clear`).
    Upstream,
    /// When a vCPU is loaded and when it is put.
    Load,
    /// When what the guest is to have differs from what the thread has, and before host user space runs.
    #[default]
    Cached,
}

/// `ring3.l1d_flush_promise=`: a guest that has been told SKIP_L1DFL_VMENTRY, and `vmentry_l1d_flush=never` after that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Promise {
    /// Its VM is flushed for as long as there is one.
    #[default]
    Keep,
    /// Writing the parameter fails with EBUSY as long as there are such VMs.
    Refuse,
}

/// What the command line says.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CommandLine {
    /// `ring3.part=`: the part whose speculation bugs the host has; `None`: its processors do not speculate.
    pub part: Option<Part>,
    /// `mitigations=`.
    pub all: All,
    /// `mds=`.
    pub mds: Option<Clear>,
    /// `tsx_async_abort=`.
    pub taa: Option<Clear>,
    /// `mmio_stale_data=`.
    pub mmio_stale_data: Option<Clear>,
    /// `reg_file_data_sampling=`.
    pub rfds: Option<bool>,
    /// `l1tf=`.
    pub l1tf: Option<L1tf>,
    /// `gather_data_sampling=off` or `force`; false: off.
    pub gds: Option<bool>,
    /// `spectre_v2=off`, `on` or `auto`; false: off.
    pub spectre_v2: Option<bool>,
    /// `tsx=`.
    pub tsx: Tsx,
    /// `kvm_intel.vmentry_l1d_flush=`.
    pub l1d_flush: L1dFlush,
    /// `ring3.fb_clear_dis=`.
    pub fb_clear_dis: FbClearDis,
    /// `ring3.l1d_flush_promise=`.
    pub promise: Promise,
}

impl CommandLine {
    /// What VM entries do about L1 terminal fault.
    pub fn flush(&self) -> Flush {
        let hardware = Hardware::of(&CpuModel::default(), self);
        Selected::of(&hardware, self).flush(&hardware, self.l1d_flush)
    }
}

/// A part of [`silicon::model::speculation`]'s table.
#[derive(Clone, Copy, Debug)]
pub struct Part(pub &'static SpeculationRow);

impl PartialEq for Part {
    fn eq(&self, other: &Part) -> bool {
        self.0.name == other.0.name
    }
}

impl Eq for Part {}

/// The value that `text` names.
fn named<T: Copy>(names: &[(&str, T)], text: &str) -> Option<T> {
    names.iter().find(|(name, _)| *name == text).map(|(_, value)| *value)
}

fn clear(text: &str) -> Option<Clear> {
    named(&[("full", Clear::Full), ("full,nosmt", Clear::FullNosmt), ("off", Clear::Off)], text)
}

fn on_off(text: &str) -> Option<bool> {
    named(&[("on", true), ("off", false)], text)
}

impl L1dFlush {
    const NAMES: [(&str, L1dFlush); 4] = [
        ("auto", L1dFlush::Auto),
        ("never", L1dFlush::Never),
        ("cond", L1dFlush::Cond),
        ("always", L1dFlush::Always),
    ];

    /// `auto`, `never`, `cond`, `always`; as in the kernel a switch is a value, too: on is `cond`, off is `never`.
    pub fn parse(text: &str) -> Option<L1dFlush> {
        let switch = || module_bool(text).map(|on| if on { L1dFlush::Cond } else { L1dFlush::Never });
        named(&L1dFlush::NAMES, text).or_else(switch)
    }
}

const CLEAR: &str = "full|full,nosmt|off";

/// Sets a field of the command line.
macro_rules! row {
    ($name:literal, $values:expr, $field:ident = $parse:expr) => {
        Row {
            name: $name,
            values: $values,
            set: |p: &mut HostParams, v| put(&mut p.mitigations.$field, ($parse)(v)),
        }
    };
}

/// The parameters.
pub(crate) static PARAMS: &[Row] = &[
    row!(
        "ring3.part",
        "none|skylake-sp|cascade-lake|ice-lake-sp|tremont-d|tremont|alder-lake|sapphire-rapids",
        part = |v| if v == "none" { Some(None) } else { part(v).map(|row| Some(Part(row))) }
    ),
    row!(
        "mitigations",
        "auto|auto,nosmt|off",
        all = |v| named(&[("auto", All::Auto), ("auto,nosmt", All::AutoNosmt), ("off", All::Off)], v)
    ),
    row!("mds", CLEAR, mds = |v| clear(v).map(Some)),
    row!("tsx_async_abort", CLEAR, taa = |v| clear(v).map(Some)),
    row!("mmio_stale_data", CLEAR, mmio_stale_data = |v| clear(v).map(Some)),
    row!("reg_file_data_sampling", "on|off", rfds = |v| on_off(v).map(Some)),
    row!(
        "l1tf",
        "off|flush|flush,nosmt|flush,nowarn|full|full,force",
        l1tf = |v| {
            let names = [
                ("off", L1tf::Off),
                ("flush", L1tf::Flush),
                ("flush,nosmt", L1tf::FlushNosmt),
                ("flush,nowarn", L1tf::FlushNowarn),
                ("full", L1tf::Full),
                ("full,force", L1tf::FullForce),
            ];
            named(&names, v).map(Some)
        }
    ),
    row!(
        "gather_data_sampling",
        "off|force",
        gds = |v| named(&[("off", Some(false)), ("force", Some(true))], v)
    ),
    row!(
        "spectre_v2",
        "on|off|auto",
        spectre_v2 = |v| named(&[("on", Some(true)), ("auto", None), ("off", Some(false))], v)
    ),
    row!(
        "tsx",
        "on|off|auto",
        tsx = |v| named(&[("on", Tsx::On), ("off", Tsx::Off), ("auto", Tsx::Auto)], v)
    ),
    row!("kvm_intel.vmentry_l1d_flush", "auto|never|cond|always", l1d_flush = L1dFlush::parse),
    row!(
        "ring3.fb_clear_dis",
        "upstream|load|cached",
        fb_clear_dis = |v| {
            let names = [
                ("upstream", FbClearDis::Upstream),
                ("load", FbClearDis::Load),
                ("cached", FbClearDis::Cached),
            ];
            named(&names, v)
        }
    ),
    row!(
        "ring3.l1d_flush_promise",
        "keep|refuse",
        promise = |v| named(&[("keep", Promise::Keep), ("refuse", Promise::Refuse)], v)
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ac_the_mitigation_command_line() {
        let line = "ring3.part=skylake-sp mds=full,nosmt l1tf=full,force kvm-intel.vmentry-l1d-flush=off \
                    reg_file_data_sampling=off mitigations=auto,nosmt ring3.fb_clear_dis=load tsx=auto";
        let line = HostParams::parse(line).unwrap().mitigations;
        assert_eq!(line.part.unwrap().0.name, "skylake-sp");
        assert_eq!((line.mds, line.taa), (Some(Clear::FullNosmt), None));
        assert_eq!((line.l1tf, line.l1d_flush), (Some(L1tf::FullForce), L1dFlush::Never));
        assert_eq!((line.rfds, line.all, line.tsx), (Some(false), All::AutoNosmt, Tsx::Auto));
        assert_eq!(line.fb_clear_dis, FbClearDis::Load);
        assert_eq!(HostParams::default().mitigations, CommandLine::default());
        for wrong in ["ring3.part=zen", "mds=on", "l1tf=", "vmentry_l1d_flush=cond", "spectre_v2=retpoline"] {
            assert!(HostParams::parse(wrong).is_err(), "{wrong}");
        }
        let known = HostParams::parse("x=y").unwrap_err().to_string();
        for row in silicon::model::speculation::PARTS {
            assert!(known.contains(row.name), "the message lists {}", row.name);
        }
    }
}
