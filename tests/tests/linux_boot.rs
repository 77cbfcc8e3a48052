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
