//! `ring3 doctor`: what will work on this machine, and what to do about what will not.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;

use hypervisor::{HostParams, System};
use silicon::model::{CpuModel, Feature, Host, models};

use crate::client;
use crate::run;

/// Descriptors that a VMM with some devices needs.
const DESCRIPTORS_WANTED: u64 = 1024;
/// Address space that a VMM needs beside its guest's memory.
const ADDRESS_SPACE_WANTED: u64 = 8 << 30;

/// Features of the host's CPU that decide which models can be had and how fast they are.
static FEATURES: &[(Feature, &str)] = &[
    (Feature::Sse42, "sse4.2"),
    (Feature::Popcnt, "popcnt"),
    (Feature::Aes, "aes"),
    (Feature::Avx, "avx"),
    (Feature::Avx2, "avx2"),
    (Feature::Fma, "fma"),
    (Feature::Bmi2, "bmi2"),
    (Feature::Avx512f, "avx512f"),
    (Feature::Avx512bw, "avx512bw"),
    (Feature::Avx512vl, "avx512vl"),
];

/// One thing that was looked at.
struct Finding {
    about: &'static str,
    text: String,
    /// What to do, if it will not work as it is.
    remedy: Option<String>,
}

impl Finding {
    fn good(about: &'static str, text: impl Into<String>) -> Finding {
        Finding { about, text: text.into(), remedy: None }
    }

    fn bad(about: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { about, text: text.into(), remedy: Some(remedy.into()) }
    }
}

/// Looks at the machine, and at `program` if there is one. The report, and whether all is well.
pub(crate) fn examine(program: Option<&OsStr>) -> (String, bool) {
    let mut findings = vec![
        kernel(),
        processor(),
        models(),
        memory(),
        locked_memory(),
        descriptors(),
        device(),
        library(),
        engine(),
    ];
    findings.extend(program.map(judge));
    let mut report = String::new();
    for Finding { about, text, remedy } in &findings {
        let mark = if remedy.is_some() { "!!" } else { "ok" };
        // Writing to a string cannot fail.
        let _ = writeln!(report, "{mark} {about:<14} {text}");
        if let Some(remedy) = remedy {
            let _ = writeln!(report, "   {:<14} -> {}", "", remedy.replace('\n', &format!("\n{:21}", "")));
        }
    }
    (report, findings.iter().all(|finding| finding.remedy.is_none()))
}

fn read(path: &str) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_string()).unwrap_or_default()
}

fn kernel() -> Finding {
    let release = read("/proc/sys/kernel/osrelease");
    let (major, minor) = version(&release);
    if (major, minor) < (5, 4) {
        let remedy = "ring3 is made for Linux 5.4 and later; older kernels lack calls that it uses";
        return Finding::bad("kernel", format!("Linux {release}"), remedy);
    }
    Finding::good("kernel", format!("Linux {release}"))
}

/// Major and minor number of a kernel's release.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn processor() -> Finding {
    let cpuinfo = read("/proc/cpuinfo");
    let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("");
    let name = name.trim_start_matches([':', ' ', '\t']);
    let offered = Host::get().offered;
    let (has, lacks): (Vec<_>, Vec<_>) = FEATURES.iter().partition(|(feature, _)| offered.has(*feature));
    let names =
        |list: Vec<&(Feature, &'static str)>| list.iter().map(|row| row.1).collect::<Vec<_>>().join(" ");
    let (has, lacks) = (names(has), names(lacks));
    let lacks = if lacks.is_empty() { lacks } else { format!("; without {lacks}") };
    Finding::good("processor", format!("{name}: {has}{lacks}"))
}

/// A model is whole, or goes without what the host's CPU would have to execute.
fn models() -> Finding {
    let described = models::names().filter_map(|name| {
        let model = CpuModel::parse(name).ok()?;
        let lost: Vec<String> = model
            .lost()
            .iter()
            .filter(|lost| lost.why == silicon::model::Why::Host)
            .map(|lost| lost.feature.to_string())
            .collect();
        Some(if lost.is_empty() { name.to_string() } else { format!("{name} (without {})", lost.join(" ")) })
    });
    Finding::good("CPU models", described.collect::<Vec<_>>().join(", "))
}

/// A value of `/proc/meminfo` in bytes.
fn meminfo(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0) << 10
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

fn memory() -> Finding {
    let info = read("/proc/meminfo");
    let (total, available) = (meminfo(&info, "MemTotal"), meminfo(&info, "MemAvailable"));
    let mut text = format!("{} of {} available", gib(available), gib(total));
    if let Ok(limit) = read("/sys/fs/cgroup/memory.max").parse::<u64>() {
        text += &format!(", control group limit {}", gib(limit));
    }
    let address_space = limit("Max address space");
    if address_space < ADDRESS_SPACE_WANTED {
        text += &format!(", address space limited to {}", gib(address_space));
        return Finding::bad("memory", text, "lift the limit: ulimit -v unlimited");
    }
    if read("/proc/sys/vm/overcommit_memory") == "2" {
        let free = meminfo(&info, "CommitLimit").saturating_sub(meminfo(&info, "Committed_AS"));
        text += &format!(", no overcommit: {} can be allocated", gib(free));
        if free < ADDRESS_SPACE_WANTED {
            let remedy = "guest memory counts in full from the start; as root: sysctl vm.overcommit_memory=0";
            return Finding::bad("memory", text, remedy);
        }
    }
    Finding::good("memory", text)
}

/// The soft limit of a row of `/proc/self/limits`; the highest number if there is none.
fn limit(name: &str) -> u64 {
    soft_limit(&read("/proc/self/limits"), name)
}

fn soft_limit(limits: &str, name: &str) -> u64 {
    let row = limits.lines().find_map(|line| line.strip_prefix(name));
    row.and_then(|row| row.split_whitespace().next()?.parse().ok()).unwrap_or(u64::MAX)
}

fn locked_memory() -> Finding {
    let text = match limit("Max locked memory") {
        u64::MAX => "unlimited".to_string(),
        limit => format!("{} (only clients that lock their guest's memory need more)", gib(limit)),
    };
    Finding::good("locked memory", text)
}

fn descriptors() -> Finding {
    let soft = limit("Max open files");
    let text = format!("at most {soft}");
    if soft < DESCRIPTORS_WANTED {
        return Finding::bad("descriptors", text, format!("raise the limit: ulimit -n {DESCRIPTORS_WANTED}"));
    }
    Finding::good("descriptors", text)
}

fn device() -> Finding {
    let text = if fs::metadata("/dev/kvm").is_ok() {
        "there; `ring3 run` takes its place for the programs that it runs"
    } else {
        "not there; `ring3 run` stands in for it"
    };
    Finding::good("/dev/kvm", text)
}

fn library() -> Finding {
    match run::library() {
        Ok(path) => Finding::good("library", path.display().to_string()),
        Err(error) => Finding::bad("library", "not found", error.to_string()),
    }
}

/// Makes what each client makes first.
fn engine() -> Finding {
    let made = || -> Result<(), String> {
        let model = CpuModel::parse("max").map_err(|error| error.to_string())?;
        let vm = System::new(model, HostParams::default()).create_vm().map_err(|error| error.to_string())?;
        vm.create_vcpu(0).map_err(|error| error.to_string())?;
        Ok(())
    };
    match made() {
        Ok(()) => Finding::good("engine", "a VM with a vCPU can be made"),
        Err(error) => {
            let remedy =
                "a security policy (seccomp, SELinux) or a limit may forbid executable or shared memory";
            Finding::bad("engine", error, remedy)
        }
    }
}

fn judge(program: &OsStr) -> Finding {
    match client::find(program).and_then(|file| client::check(&file)) {
        Ok(file) => Finding::good("program", format!("{}: dynamic, can be run", file.display())),
        Err(error) => {
            Finding::bad("program", format!("{}: cannot be run", program.display()), error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found() {
        assert_eq!(version("6.12.38+deb13-amd64"), (6, 12));
        assert_eq!(version("5.4"), (5, 4));
        assert_eq!(version(""), (0, 0));
        assert_eq!(meminfo("MemTotal:  16 kB\nMemFree: 8 kB", "MemFree"), 8192);
        let limits = "Max open files            1024                 4096      files\nMax address space unlimited unlimited bytes";
        assert_eq!(soft_limit(limits, "Max open files"), 1024);
        assert_eq!(soft_limit(limits, "Max address space"), u64::MAX);
    }

    #[test]
    fn a_program_that_cannot_be_run_is_a_problem() {
        let (report, well) = examine(Some(OsStr::new("no-such-program-here")));
        assert!(
            !well && report.contains("!! program") && report.contains("no such program in PATH"),
            "{report}"
        );
        assert!(judge(OsStr::new("sh")).remedy.is_none());
    }
}
