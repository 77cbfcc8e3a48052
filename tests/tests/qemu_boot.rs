//! QEMU with `-accel kvm` under `ring3 run` boots Debian's kernel on its three machines.

use e2e::qemu::{APPEND, Qemu, text};
use e2e::{Guest, guest};

const SCRIPT: &str = "echo BEGIN state
uname -r
echo cpus $(grep -c ^processor /proc/cpuinfo)
echo clocksource $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
head -c 4096 /dev/hwrng | wc -c
if [ -e /dev/vda ]; then sha256sum < /dev/vda; fi
echo END state
";

/// Boots and returns what the guest said of itself.
fn boots(name: &str, machine: &str, cpu: &str, cpus: u32, devices: &[&str]) -> String {
    let Guest { kernel, initrd } = guest(name, "6.12", SCRIPT).unwrap();
    let (kernel, initrd, smp) = (text(&kernel), text(&initrd), cpus.to_string());
    let mut arguments = vec!["-m", "512", "-smp", &smp, "-kernel", &kernel, "-initrd", &initrd, "-no-reboot"];
    arguments.extend(["-append", APPEND]);
    arguments.extend(devices);
    let mut qemu = Qemu::start(name, machine, cpu, &arguments).unwrap();
    qemu.wait_for("END state", 1).unwrap();
    qemu.wait().unwrap();
    qemu.healthy();
    let console = qemu.console();
    let from = console.find("BEGIN state").unwrap();
    let state = console[from..].to_string();
    assert!(state.contains(&format!("cpus {cpus}\n")), "{state}");
    assert!(state.contains("\n4096\n"), "virtio-rng: {state}");
    state
}

#[test]
fn pc_skylake_client_1_vcpu() {
    boots("qemu-pc", "pc", "Skylake-Client", 1, &["-device", "virtio-rng-pci"]);
}

#[test]
fn q35_icelake_server_4_vcpus() {
    boots("qemu-q35", "q35", "Icelake-Server", 4, &["-device", "virtio-rng-pci"]);
}

#[test]
fn microvm_host_4_vcpus() {
    boots("qemu-microvm", "microvm", "host", 4, &["-device", "virtio-rng-device"]);
}

#[test]
fn pc_max_4_vcpus() {
    boots("qemu-pc-max", "pc", "max", 4, &["-device", "virtio-rng-pci"]);
}

#[test]
fn q35_host_1_vcpu() {
    boots("qemu-q35-host", "q35", "host", 1, &["-device", "virtio-rng-pci"]);
}
