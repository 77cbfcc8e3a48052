//! `cargo xtask vmms`: virtual machine monitors that Debian has no packages of, built from cargo's registry, boot Debian's
//! kernel under `ring3 run`. Too long for CI: they are several hundred crates.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use xtask::images::Initramfs;
use xtask::{Error, at, guest, guest_dir, packages, root, target_dir};

/// How long a guest may take.
const LIMIT: Duration = Duration::from_secs(600);
/// What the guest runs; libkrun ends when the guest reboots.
const SCRIPT: &str = "echo processors: $(grep -c ^processor /proc/cpuinfo)
head -c 1000000 /dev/zero | sha256sum
echo the guest is done
reboot -f
";
/// SHA-256 of a million zero bytes.
const SUM: &str = "d29751f2649b32ff572b5e0a9f541ea660a50f94ff0beedfb0b692b924cc8025";
/// libkrun's number of a bzImage that holds a kernel compressed with zstd.
const IMAGE_ZSTD: &str = "5";

/// A machine of libkrun's.
struct Machine {
    name: &'static str,
    cpus: u32,
    split_irqchip: bool,
}

const MACHINES: &[Machine] = &[
    Machine { name: "in-kernel irqchip, 1 vCPU", cpus: 1, split_irqchip: false },
    Machine { name: "in-kernel irqchip, 2 vCPUs", cpus: 2, split_irqchip: false },
    Machine { name: "split irqchip, 2 vCPUs", cpus: 2, split_irqchip: true },
];

pub(crate) fn run() -> Result<(), Error> {
    let ring3 = ["build", "--release", "--package", "ring3", "--package", "preload"];
    xtask::run(Command::new("cargo").args(ring3).current_dir(root()))?;
    // libkrun describes processors and interrupts with an MP table.
    let kernel = packages::kernel("6.12-full")?;
    let client = build_libkrun()?;
    let initramfs = guest_dir().join("vmms.cpio");
    Initramfs { script: SCRIPT, files: Vec::new() }.build(&kernel, &initramfs)?;
    for machine in MACHINES {
        eprintln!("libkrun: {}", machine.name);
        boot(machine, &client, &kernel.image, &initramfs)?;
    }
    println!("libkrun booted {} on {} machines", kernel.release, MACHINES.len());
    Ok(())
}

/// Builds `tests/clients/libkrun`, a workspace of its own.
fn build_libkrun() -> Result<PathBuf, Error> {
    let target = target_dir().join("vmms");
    let manifest = root().join("tests/clients/libkrun/Cargo.toml");
    eprintln!("building libkrun");
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--locked", "--manifest-path"]).arg(manifest).env("CARGO_TARGET_DIR", &target);
    xtask::run(&mut cargo)?;
    Ok(target.join("debug/libkrun-client"))
}

fn boot(machine: &Machine, client: &Path, kernel: &Path, initramfs: &Path) -> Result<(), Error> {
    let log = guest_dir().join("vmms.log");
    let out = at(&log, std::fs::File::create(&log))?;
    let mut command = Command::new(guest::ring3());
    command.args(["run", "--"]).arg(client).arg(kernel).arg(IMAGE_ZSTD).arg(initramfs);
    command.arg(machine.cpus.to_string()).arg(u32::from(machine.split_irqchip).to_string());
    // Debian warns of its own ITS mitigation: see docs/compatibility.md.
    command.arg("console=ttyS0 reboot=k panic=-1 mitigations=off");
    command.stdin(Stdio::null()).stdout(out).stderr(Stdio::inherit());
    let status = guest::within(&mut command, LIMIT)?;
    let console = at(&log, std::fs::read_to_string(&log))?;
    let processors = format!("processors: {}", machine.cpus);
    let wanted = [processors.as_str(), SUM, "the guest is done"];
    match (status, wanted.iter().find(|line| !console.contains(**line))) {
        (Some(status), None) if status.success() => Ok(()),
        (Some(status), None) => Err(Error::Guest(format!("libkrun, {}: {status}", machine.name))),
        (_, missing) => Err(Error::Guest(format!(
            "libkrun, {}: the guest did not print `{}`; its console is {}",
            machine.name,
            missing.unwrap_or(&"its end"),
            log.display()
        ))),
    }
}
