//! The host kernel that we stand in for: its boot command line and module parameters, as far as guests and clients
//! of KVM can see their effect. (Kernel: Documentation/admin-guide/kernel-parameters.txt.)

use std::str::FromStr;

use silicon::topology::Shape;

use crate::mitigations::command_line::{self, CommandLine};
use crate::notify::{DEFAULT_THROTTLE_MS, DEFAULT_WINDOW_US, LONGEST_WINDOW_US};
use crate::split_lock::Policy;

/// `split_lock_detect=`: what happens to split locks (kernel: arch/x86/kernel/cpu/intel.c; what it means for guests is in
/// [`split_lock`](crate::split_lock)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SplitLockDetect {
    /// Nothing.
    Off,
    /// A warning, and the culprit is slowed down.
    #[default]
    Warn,
    /// SIGBUS.
    Fatal,
    /// Detection is off; so many bus locks a second, 1 to 1000, and who makes more has to wait.
    RateLimit(u32),
}

impl SplitLockDetect {
    /// `off`, `warn`, `fatal`, `ratelimit:N`.
    fn parse(text: &str) -> Option<SplitLockDetect> {
        Some(match text {
            "off" => SplitLockDetect::Off,
            "warn" => SplitLockDetect::Warn,
            "fatal" => SplitLockDetect::Fatal,
            _ => match text.strip_prefix("ratelimit:")?.parse() {
                Ok(rate @ 1..=1000) => SplitLockDetect::RateLimit(rate),
                _ => return None,
            },
        })
    }
}

/// `ring3.xfd=`: how the host kernel keeps a vCPU's extended state, with the guest's IA32_XFD, across preemption and its own use of the FPU
/// ([`vcpu`](crate::vcpu)'s `host_fpu`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum XfdOption {
    /// It stays in the vCPU: nothing has to be saved, and nothing is lost.
    #[default]
    Native,
    /// With XSAVES under the guest's IA32_XFD, as the kernel does: what it disables is lost.
    Upstream,
    /// IA32_XFD is cleared at an exit with tiles in use, and set again before the entry.
    Option1,
    /// IA32_XFD is cleared around XSAVES and XRSTORS.
    Option2,
}

impl XfdOption {
    fn parse(text: &str) -> Option<XfdOption> {
        Some(match text {
            "native" => XfdOption::Native,
            "upstream" => XfdOption::Upstream,
            "option1" => XfdOption::Option1,
            "option2" => XfdOption::Option2,
            _ => return None,
        })
    }
}

/// The parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostParams {
    /// `smt=on|off`: two threads to a core. (The kernel has `nosmt`.)
    pub smt: bool,
    /// `split_lock_detect=off|warn|fatal|ratelimit:N`.
    pub split_lock_detect: SplitLockDetect,
    /// `kernel.split_lock_mitigate=0|1`: in warn mode split locks are slowed down. A sysctl: this is what it is at first,
    /// [`System::set_split_lock_mitigate`](crate::System::set_split_lock_mitigate) sets it later.
    pub split_lock_mitigate: bool,
    /// `ring3.split_lock_policy=efault|kill|forward|emulate`: what VMs begin with (ring3's own parameter).
    pub split_lock_policy: Policy,
    /// `kvm.ignore_msrs=0|1`: accesses to unknown MSRs read zero and write nothing instead of #GP.
    pub ignore_msrs: bool,
    /// `kvm.report_ignored_msrs=0|1`: and are logged.
    pub report_ignored_msrs: bool,
    /// `kvm_intel.notify_window_us=N|off`: the window of the notify VM exit of VMs that ask for none, in microseconds. VMs
    /// that exist keep theirs ([`System::set_notify_window`](crate::System::set_notify_window)).
    pub notify_window_us: Option<u32>,
    /// `kvm_intel.notify_throttle_ms=N`: how long a vCPU that makes no progress from one notify VM exit to the next is held
    /// back at most; 0: not at all.
    pub notify_throttle_ms: u32,
    /// `ring3.xfd=native|upstream|option1|option2`: what becomes of tiles that IA32_XFD disables.
    pub xfd: XfdOption,
    /// `ring3.preempt_exits=N`: a vCPU's thread is preempted after every Nth exit; 0: only when KVM_RUN returns or the vCPU
    /// sleeps. Without `ring3.xfd` nothing comes of it.
    pub preempt_exits: u32,
    /// `ring3.softirq_exits=N`: a softirq uses the FPU after every Nth exit.
    pub softirq_exits: u32,
    /// Speculation bugs and what is done about them.
    pub mitigations: CommandLine,
}

impl Default for HostParams {
    fn default() -> HostParams {
        HostParams {
            smt: false,
            split_lock_detect: SplitLockDetect::default(),
            split_lock_mitigate: true,
            split_lock_policy: Policy::default(),
            ignore_msrs: false,
            report_ignored_msrs: true,
            notify_window_us: Some(DEFAULT_WINDOW_US),
            notify_throttle_ms: DEFAULT_THROTTLE_MS,
            xfd: XfdOption::default(),
            preempt_exits: 0,
            softirq_exits: 0,
            mitigations: CommandLine::default(),
        }
    }
}

/// What is wrong with a parameter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostParamError {
    /// No such parameter.
    #[error("unknown host parameter '{name}'; known parameters: {known}")]
    Unknown {
        /// What was given.
        name: String,
        /// All of them, with the values that they take.
        known: String,
    },
    /// A parameter that cannot have this value.
    #[error("host parameter {name}: '{value}' is not one of {values}")]
    Value {
        /// The parameter.
        name: &'static str,
        /// What was given.
        value: String,
        /// What it takes.
        values: &'static str,
    },
}

/// One known parameter.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// The values that it takes, as messages show them.
    pub(crate) values: &'static str,
    /// Sets it; false: not a value.
    pub(crate) set: fn(&mut HostParams, &str) -> bool,
}

static PARAMS: &[Row] = &[
    Row { name: "smt", values: "on|off", set: |p, v| put(&mut p.smt, switch(v)) },
    Row {
        name: "split_lock_detect",
        values: "off|warn|fatal|ratelimit:1..1000",
        set: |p, v| put(&mut p.split_lock_detect, SplitLockDetect::parse(v)),
    },
    Row {
        name: "kernel.split_lock_mitigate",
        values: "0|1",
        set: |p, v| put(&mut p.split_lock_mitigate, module_bool(v)),
    },
    Row {
        name: "ring3.split_lock_policy",
        values: "efault|kill|forward|emulate",
        // A client that has not asked for the exit does not know it.
        set: |p, v| put(&mut p.split_lock_policy, Policy::parse(v).filter(|&policy| policy != Policy::Exit)),
    },
    Row { name: "kvm.ignore_msrs", values: "0|1", set: |p, v| put(&mut p.ignore_msrs, module_bool(v)) },
    Row {
        name: "kvm.report_ignored_msrs",
        values: "0|1",
        set: |p, v| put(&mut p.report_ignored_msrs, module_bool(v)),
    },
    Row {
        name: "kvm_intel.notify_window_us",
        values: "off|0..171798691",
        set: |p, v| {
            let window = if v == "off" { Some(None) } else { v.parse().ok().map(Some) };
            let fits = window.filter(|w: &Option<u32>| w.is_none_or(|us| us <= LONGEST_WINDOW_US));
            put(&mut p.notify_window_us, fits)
        },
    },
    Row {
        name: "kvm_intel.notify_throttle_ms",
        values: "0..10000",
        set: |p, v| put(&mut p.notify_throttle_ms, v.parse().ok().filter(|ms| *ms <= 10_000)),
    },
    Row {
        name: "ring3.xfd",
        values: "native|upstream|option1|option2",
        set: |p, v| put(&mut p.xfd, XfdOption::parse(v)),
    },
    Row {
        name: "ring3.preempt_exits",
        values: "0..4294967295",
        set: |p, v| put(&mut p.preempt_exits, v.parse().ok()),
    },
    Row {
        name: "ring3.softirq_exits",
        values: "0..4294967295",
        set: |p, v| put(&mut p.softirq_exits, v.parse().ok()),
    },
];

/// Every parameter.
fn rows() -> impl Iterator<Item = &'static Row> {
    PARAMS.iter().chain(command_line::PARAMS)
}

pub(crate) fn put<T>(place: &mut T, value: Option<T>) -> bool {
    value.map(|value| *place = value).is_some()
}

fn switch(value: &str) -> Option<bool> {
    match value {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

/// As module parameters of type bool read (kernel: `kstrtobool`).
pub(crate) fn module_bool(value: &str) -> Option<bool> {
    match value {
        "0" | "n" | "N" | "off" => Some(false),
        "1" | "y" | "Y" | "on" => Some(true),
        _ => None,
    }
}

impl HostParams {
    /// Reads a command line: `name=value` separated by white space; the last one counts.
    pub fn parse(line: &str) -> Result<HostParams, HostParamError> {
        let mut params = HostParams::default();
        line.split_whitespace().try_for_each(|item| params.set(item))?;
        Ok(params)
    }

    /// How `cpus` logical processors are arranged in one package: two to a core with SMT, if they come out even.
    pub fn shape(&self, cpus: u32) -> Shape {
        if self.smt && cpus.is_multiple_of(2) {
            Shape { threads: 2, ..Shape::cores(cpus / 2) }
        } else {
            Shape::cores(cpus)
        }
    }

    /// Sets one parameter, `name=value`. As on a kernel command line `-` and `_` are the same in names.
    pub fn set(&mut self, item: &str) -> Result<(), HostParamError> {
        let (name, value) = item.split_once('=').unwrap_or((item, ""));
        let plain = name.replace('-', "_");
        let row = rows().find(|row| row.name == plain).ok_or_else(|| HostParamError::Unknown {
            name: name.into(),
            known: rows().map(|r| format!("{}={}", r.name, r.values)).collect::<Vec<_>>().join(" "),
        })?;
        if (row.set)(self, value) {
            Ok(())
        } else {
            Err(HostParamError::Value { name: row.name, value: value.into(), values: row.values })
        }
    }
}

impl FromStr for HostParams {
    type Err = HostParamError;

    fn from_str(line: &str) -> Result<HostParams, HostParamError> {
        HostParams::parse(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line() {
        let params = HostParams::parse("smt=on  split-lock-detect=fatal kvm.ignore_msrs=1 smt=off").unwrap();
        let expected = HostParams {
            smt: false,
            split_lock_detect: SplitLockDetect::Fatal,
            ignore_msrs: true,
            ..HostParams::default()
        };
        assert_eq!(params, expected);
        assert_eq!(HostParams::parse(""), Ok(HostParams::default()));
    }

    #[test]
    fn parameters_of_split_locks() {
        let line =
            "split_lock_detect=ratelimit:1000 kernel.split_lock_mitigate=0 ring3.split_lock_policy=emulate";
        let params = HostParams::parse(line).unwrap();
        assert_eq!(params.split_lock_detect, SplitLockDetect::RateLimit(1000));
        assert_eq!((params.split_lock_mitigate, params.split_lock_policy), (false, Policy::Emulate));
        assert_eq!(HostParams::default().split_lock_policy, Policy::Efault);
        for wrong in ["ratelimit", "ratelimit:", "ratelimit:0", "ratelimit:1001", "ratelimit:-1", "on", ""] {
            assert!(HostParams::parse(&format!("split_lock_detect={wrong}")).is_err(), "{wrong}");
        }
        assert!(HostParams::parse("ring3.split_lock_policy=exit").is_err(), "only who knows it asks for it");
    }

    #[test]
    fn the_notify_window_is_microseconds_or_off() {
        let window = |line: &str| HostParams::parse(line).map(|params| params.notify_window_us);
        assert_eq!(window(""), Ok(Some(100)));
        assert_eq!(window("kvm_intel.notify_window_us=off"), Ok(None));
        assert_eq!(window("kvm-intel.notify-window-us=0"), Ok(Some(0)));
        assert_eq!(window("kvm_intel.notify_window_us=171798691"), Ok(Some(171_798_691)));
        for wrong in ["171798692", "-1", "", "1ms"] {
            let line = format!("kvm_intel.notify_window_us={wrong}");
            assert!(window(&line).is_err(), "{wrong}");
        }
        assert!(HostParams::parse("kvm_intel.notify_throttle_ms=10001").is_err());
    }

    #[test]
    fn smt_pairs_threads() {
        let shape = |line, cpus| HostParams::parse(line).unwrap().shape(cpus);
        assert_eq!(shape("", 4), Shape { sockets: 1, cores: 4, threads: 1 });
        assert_eq!(shape("smt=on", 4), Shape { sockets: 1, cores: 2, threads: 2 });
        assert_eq!(shape("smt=on", 3), Shape { sockets: 1, cores: 3, threads: 1 });
    }

    #[test]
    fn errors_list_what_there_is() {
        let unknown = HostParams::parse("mitigation=off").unwrap_err().to_string();
        let known = "unknown host parameter 'mitigation'; known parameters: smt=on|off \
             split_lock_detect=off|warn|fatal|ratelimit:1..1000 kernel.split_lock_mitigate=0|1 \
             ring3.split_lock_policy=efault|kill|forward|emulate kvm.ignore_msrs=0|1 kvm.report_ignored_msrs=0|1 \
             kvm_intel.notify_window_us=off|0..171798691 kvm_intel.notify_throttle_ms=0..10000 \
             ring3.xfd=native|upstream|option1|option2 ring3.preempt_exits=0..4294967295 \
             ring3.softirq_exits=0..4294967295 ring3.part=none|";
        assert!(unknown.starts_with(known), "{unknown}");
        let value = HostParams::parse("smt=maybe").unwrap_err().to_string();
        assert_eq!(value, "host parameter smt: 'maybe' is not one of on|off");
        assert!(HostParams::parse("kvm.ignore_msrs").is_err());
    }
}
