//! What Debian's kernel says of the bugs of its processor, byte for byte, on each of the processors that were measured
//! ([`hypervisor::mitigations::measured`]) and on hosts with the bugs of real parts.
//!
//! CI boots some of them; `RING3_ALL_ROWS=1 cargo test --release -p e2e --test vulnerabilities` boots all.

use std::collections::{BTreeMap, BTreeSet};
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

/// A name in /proc/cpuinfo, the file that tells of the bug, and whether with this content the processor has it.
type Told = (&'static str, &'static str, fn(&str) -> bool);

/// All that a processor of Intel's has here.
const BUGS: [Told; 20] = [
    ("cpu_meltdown", "meltdown", affected),
    ("l1tf", "l1tf", affected),
    ("mds", "mds", affected),
    ("taa", "tsx_async_abort", affected),
    ("mmio_stale_data", "mmio_stale_data", |text| affected(text) && !unknown_to_the_kernel(text)),
    ("mmio_unknown", "mmio_stale_data", unknown_to_the_kernel),
    ("rfds", "reg_file_data_sampling", affected),
    ("gds", "gather_data_sampling", affected),
    ("srbds", "srbds", affected),
    ("its", "indirect_target_selection", affected),
    ("itlb_multihit", "itlb_multihit", affected),
    ("retbleed", "retbleed", affected),
    ("spec_store_bypass", "spec_store_bypass", affected),
    ("spectre_v1", "spectre_v1", affected),
    ("swapgs", "spectre_v1", |text| text.contains("swapgs")),
    ("spectre_v2", "spectre_v2", affected),
    ("eibrs_pbrsb", "spectre_v2", |text| !text.contains("PBRSB-eIBRS: Not affected")),
    ("bhi", "spectre_v2", |text| !text.contains("BHI: Not affected")),
    ("srso", "spec_rstack_overflow", affected),
    ("vmscape", "vmscape", affected),
];

fn affected(text: &str) -> bool {
    text != "Not affected"
}

fn unknown_to_the_kernel(text: &str) -> bool {
    text == "Unknown: No mitigations"
}

/// The names are those of which files tell, and no others.
fn bugs_agree(what: &str, outcome: &Outcome, files: &BTreeMap<&str, &str>) {
    let mut bugs: BTreeSet<&str> = section(outcome, "bugs").split_whitespace().collect();
    // No file tells of this one: it is a kind of ITS.
    if bugs.remove("its_native_only") {
        assert!(bugs.contains("its"), "{what}: {bugs:?}");
    }
    let told = BUGS.iter().filter(|(_, file, has)| has(files[file])).map(|(bug, ..)| *bug);
    assert_eq!(bugs, told.collect(), "{what}");
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

/// The switches of the guest's own command line.
const OFF: &str = "mds=off tsx_async_abort=off mmio_stale_data=off reg_file_data_sampling=off";

const CLEARED: &str = "Mitigation: Clear CPU buffers; SMT Host state unknown";
const OPEN: &str = "Vulnerable";
/// Only the file of MDS tells of the sibling even where nothing is done (kernel: `mds_show_state`).
const MDS_OPEN: &str = "Vulnerable; SMT Host state unknown";
const NO_TSX: &str = "Mitigation: TSX disabled";
const NA: &str = "Not affected";

/// Boots each row with parameters for its kernel, and compares the files of [`LOGGED`], in its order.
fn with_parameters(cases: &[(&str, &str, [&str; 4])]) {
    each(cases, |(row, parameters, expected)| {
        let what = format!("{row} {parameters}");
        let outcome = boot(&find(row).unwrap().cpu(), "", parameters);
        let files = files(&outcome);
        assert_eq!(LOGGED.map(|(_, file)| files[file]), *expected, "{what}");
        log_agrees(&what, &outcome, &files);
        bugs_agree(&what, &outcome, &files);
    });
}

/// Where transactions are off, `tsx_async_abort=off` leaves nothing open.
#[test]
fn ac_flags_of_the_guest_leave_it_vulnerable() {
    let with_tsx = format!("tsx=on {OFF}");
    with_parameters(&[
        ("A4", OFF, [MDS_OPEN, NO_TSX, OPEN, NA]),
        ("A4", &with_tsx, [MDS_OPEN, OPEN, OPEN, NA]),
        ("C3", OFF, [NA, NA, NA, OPEN]),
    ]);
}

/// The two cells of section 4 that are not what Debian's kernel says by default are what it says with transactions left on.
#[test]
fn ac_rows_with_tsx_ctrl_where_the_guest_leaves_transactions_on() {
    with_parameters(&[
        ("A4", "tsx=on", [CLEARED, CLEARED, CLEARED, NA]),
        ("N3", "tsx=on", [NA, CLEARED, CLEARED, "Vulnerable: No microcode"]),
    ]);
}
