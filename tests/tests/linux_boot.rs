//! Debian's cloud kernels boot unmodified to an initramfs shell.

use e2e::{healthy, linux};

const SCRIPT: &str = "echo BEGIN state
uname -r
echo cpus $(grep -c ^processor /proc/cpuinfo)
echo clocksource $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
echo END state
";

fn boots(series: &str, cpus: u32) {
    let name = format!("boot{cpus}");
    let outcome = linux(&name, series, SCRIPT, |boot| boot.cpus = cpus).unwrap();
    healthy(&outcome);
    let state = outcome.section("state").unwrap_or_default();
    assert!(state.starts_with(series), "kernel release: {state}");
    assert!(state.contains(&format!("cpus {cpus}\n")), "{state}");
}

#[test]
fn debian_6_12_boots_with_1_vcpu() {
    boots("6.12", 1);
}

#[test]
fn debian_6_12_boots_with_2_vcpus() {
    boots("6.12", 2);
}

#[test]
fn debian_6_12_boots_with_4_vcpus() {
    boots("6.12", 4);
}

#[test]
fn debian_6_12_boots_with_8_vcpus() {
    boots("6.12", 8);
}

#[test]
fn debian_6_1_boots_with_1_vcpu() {
    boots("6.1", 1);
}

#[test]
fn debian_6_1_boots_with_2_vcpus() {
    boots("6.1", 2);
}

#[test]
fn debian_6_1_boots_with_4_vcpus() {
    boots("6.1", 4);
}

/// RING3_ENGINE=check: everything that is translated does what the interpreter does, or the process ends.
#[test]
fn both_engines_do_the_same_while_debian_6_12_boots() {
    let outcome = linux("engines", "6.12", SCRIPT, |boot| {
        boot.cpus = 1;
        boot.environment = vec![("RING3_ENGINE", "check"), ("RING3_LOG", "silicon=info")];
    })
    .unwrap();
    healthy(&outcome);
    let compared = outcome.stderr.split_once("both engines did the same in ").map(|(_, rest)| rest);
    let runs = compared.and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
    assert!(runs > Some(100_000), "{}", outcome.stderr);
}
