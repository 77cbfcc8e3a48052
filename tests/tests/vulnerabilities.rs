//! What Debian's kernel says of the bugs of its processor, byte for byte, on each of the processors that were measured
//! ([`hypervisor::mitigations::measured`]) and on hosts with the bugs of real parts.
//!
//! CI boots some of them; `RING3_ALL_ROWS=1 cargo test --release -p e2e --test vulnerabilities` boots all.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::thread;

use e2e::{Guest, guest, section};
use hypervisor::HostParams;
use hypervisor::mitigations::linux::{Processor, report};
use hypervisor::mitigations::measured::{FILES, ROWS, Row, find};
use hypervisor::mitigations::report::report as on_host;
use silicon::model::CpuModel;
use silicon::model::speculation::PARTS;
use xtask::guest::{Boot, Outcome};

/// Those that CI boots: each has something that no other has.
const IN_CI: [&str; 6] = ["A0", "A4", "J7", "J3", "N1", "C3"];

const SCRIPT: &str = "
echo BEGIN files
cd /sys/devices/system/cpu/vulnerabilities && for file in *; do echo \"$file=$(cat $file)\"; done
echo END files
echo BEGIN bugs
grep -m1 '^bugs' /proc/cpuinfo | cut -d: -f2
echo END bugs
echo BEGIN log
dmesg | grep -o -e 'MDS: .*' -e 'TAA: .*' -e 'MMIO Stale Data: .*' -e 'Register File Data Sampling: .*'
echo END log
";

/// All boots have the same kernel and initramfs, which is made once.
fn machine() -> &'static Guest {
    static MACHINE: OnceLock<Guest> = OnceLock::new();
    MACHINE.get_or_init(|| guest("vulnerabilities", "6.12", SCRIPT).unwrap())
}

/// Boots a guest of `cpu` on `host`, with `parameters` for its kernel.
fn boot(cpu: &str, host: &str, parameters: &str) -> Outcome {
    let machine = machine();
    let boot = Boot {
        kernel: machine.kernel.clone(),
        initrd: Some(machine.initrd.clone()),
        append: format!("console=ttyS0 quiet panic=-1 {parameters}"),
        memory: 256,
        extra: ["--cpu", cpu, "--host", host].map(String::from).to_vec(),
        ..Boot::default()
    };
    let outcome = boot.run().unwrap();
    assert_eq!(outcome.status, Some(0), "{}\n{}", outcome.stderr, outcome.console);
    outcome
}

/// The files and their contents.
fn files(outcome: &Outcome) -> BTreeMap<&str, &str> {
    section(outcome, "files").lines().filter_map(|line| line.split_once('=')).collect()
}

/// What the guest prints is what was foretold, all of it.
fn compare(what: &str, outcome: &Outcome, foretold: &[(&'static str, String)]) {
    let files = files(outcome);
    let expected: BTreeMap<&str, &str> = foretold.iter().map(|(name, text)| (*name, text.as_str())).collect();
    assert_eq!(files, expected, "{what}");
    log_agrees(what, outcome, &files);
    bugs_agree(what, outcome, &files);
}

/// Lines of the log and their files.
const LOGGED: [(&str, &str); 4] = [
    ("MDS", "mds"),
    ("TAA", "tsx_async_abort"),
    ("MMIO Stale Data", "mmio_stale_data"),
    ("Register File Data Sampling", "reg_file_data_sampling"),
];

fn log_agrees(what: &str, outcome: &Outcome, files: &BTreeMap<&str, &str>) {
    for (title, file) in LOGGED {
        let says = files[file].split("; SMT").next().unwrap();
        let prefix = format!("{title}: ");
        let logged: Vec<&str> =
            section(outcome, "log").lines().filter_map(|line| line.strip_prefix(&prefix)).collect();
        let expected: &[&str] = if says == "Not affected" { &[] } else { &[says] };
        assert_eq!(logged, expected, "{what}: {title}");
    }
}

/// Names in /proc/cpuinfo and their files.
const BUGS: [(&str, &str); 9] = [
    ("cpu_meltdown", "meltdown"),
    ("l1tf", "l1tf"),
    ("mds", "mds"),
    ("taa", "tsx_async_abort"),
    ("rfds", "reg_file_data_sampling"),
    ("gds", "gather_data_sampling"),
    ("its", "indirect_target_selection"),
    ("itlb_multihit", "itlb_multihit"),
    ("srbds", "srbds"),
];

fn bugs_agree(what: &str, outcome: &Outcome, files: &BTreeMap<&str, &str>) {
    let bugs: Vec<&str> = section(outcome, "bugs").split_whitespace().collect();
    for (bug, file) in BUGS {
        assert_eq!(bugs.contains(&bug), files[file] != "Not affected", "{what}: {bug} in {bugs:?}");
    }
}

/// Does something with each, two at a time.
fn each<T: Sync>(items: &[T], act: impl Fn(&T) + Sync) {
    let act = &act;
    for pair in items.chunks(2) {
        thread::scope(|scope| pair.iter().for_each(|item| drop(scope.spawn(move || act(item)))));
    }
}

fn all_rows() -> bool {
    std::env::var_os("RING3_ALL_ROWS").is_some()
}

#[test]
fn ac_rows_of_section_4() {
    let rows: Vec<&Row> =
        if all_rows() { ROWS.iter().collect() } else { IN_CI.map(|name| find(name).unwrap()).to_vec() };
    each(&rows, |row| {
        let outcome = boot(&row.cpu(), "", "");
        let files = files(&outcome);
        assert_eq!(FILES.map(|file| files[file]), row.files, "{}", row.name);
        let model = CpuModel::parse(&row.cpu()).unwrap();
        compare(row.name, &outcome, &report(&Processor::of(&model, row.arch_capabilities())));
    });
}

/// What `ring3 mitigations` says of a part, and what a guest on a host with that part's bugs does.
#[test]
fn ac_hosts_with_the_bugs_of_parts() {
    let hosts: Vec<String> = if all_rows() {
        PARTS.iter().map(|part| format!("ring3.part={}", part.name)).collect()
    } else {
        ["skylake-sp kvm_intel.vmentry_l1d_flush=never", "ice-lake-sp"]
            .map(|host| format!("ring3.part={host}"))
            .into()
    };
    each(&hosts, |host| {
        let line = HostParams::parse(host).unwrap().mitigations;
        let part = line.part.unwrap().0;
        let cpu = format!("skylake,model={},stepping={}", part.model, part.steppings.end());
        let foretold = on_host(&CpuModel::parse(&cpu).unwrap(), &line).vulnerabilities;
        compare(host, &boot(&cpu, host, ""), &foretold);
    });
}

/// The guest's own command line.
#[test]
fn ac_flags_of_the_guest_leave_it_vulnerable() {
    let off = "mds=off tsx_async_abort=off mmio_stale_data=off reg_file_data_sampling=off";
    for (name, vulnerable) in
        [("A5", &["mds", "tsx_async_abort", "mmio_stale_data"][..]), ("C3", &["reg_file_data_sampling"])]
    {
        let outcome = boot(&find(name).unwrap().cpu(), "", off);
        let files = files(&outcome);
        for (_, file) in LOGGED {
            let expected = if vulnerable.contains(&file) { "Vulnerable" } else { "Not affected" };
            assert_eq!(files[file].split("; SMT").next().unwrap(), expected, "{name}: {file}");
        }
    }
}
