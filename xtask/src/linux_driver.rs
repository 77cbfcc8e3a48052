//! `cargo xtask linux-driver`: the Linux driver of the page-not-present protocol (`guests/linux`), built for Debian's kernel and driven in
//! guests whose pages are elsewhere, or lost. The tasks are those of `tests/programs/pages.c`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use xtask::guest::{Boot, alarms, ring3, section, within};
use xtask::images::Initramfs;
use xtask::packages::{self, Kernel};
use xtask::{Error, at, guest_dir, root};

/// How long QEMU's guest may take.
const LIMIT: Duration = Duration::from_secs(600);

/// What the guest runs. A task that waits for a page that is held is seen to by those that go on: none of it is a matter of time, but that a held page
/// comes after ten seconds whatever happens.
const SCRIPT: &str = r#"
counter() { cat /sys/module/ring3_pnp/parameters/$1; }
# Runs it as a section, in which it is said how the counters have changed.
step() {
    name=$1; shift
    e=$(counter events); k=$(counter in_kernel); f=$(counter failed)
    echo BEGIN $name
    "$@"
    echo END $name
    echo counted $name: $(($(counter events) - e)) events, $(($(counter in_kernel) - k)) in the kernel, $(($(counter failed) - f)) failed
}
unloaded() {
    pages wait & task=$!
    until [ "$(pages wanted)" = 1 ]; do :; done
    rmmod ring3_pnp && echo unloaded
    pages release
    wait $task
    insmod /driver/ring3_pnp.ko && echo loaded
}
hotplug() {
    echo 0 > /sys/devices/system/cpu/cpu1/online
    echo 1 > /sys/devices/system/cpu/cpu1/online
    taskset 2 pages stalls 8 hold
}
# Each token that was handed out has been resolved, or will be soon.
balance() {
    for try in $(seq 100); do
        [ $(counter events) = $(counter resolutions) ] && echo all are resolved && return
        sleep 0.1
    done
    echo $(counter events) events, $(counter resolutions) resolutions
}
# Lines of the kernel's must not be among those of the programs.
dmesg -n 1
sysctl -q -w kernel.sched_rt_runtime_us=-1
# The kernel's own events.
own() { awk '/HYP:/ { for (i = 2; $i ~ /^[0-9]+$/; i++) sum += $i; print sum + 0 }' /proc/interrupts; }
echo BEGIN load
insmod /driver/ring3_pnp.ko && echo loaded
echo END load
if [ -d /sys/module/ring3_pnp ]; then
    before=$(own)
    step stalls pages stalls 32 hold
    step copy pages copy 64
    step poison pages poison
    step shared pages shared
    step fault pages fault
    step killed pages killed
    # Before a processor comes: the hypervisor has that interface tell it to wake whoever waits.
    echo BEGIN own
    echo $(($(own) - before)) of the other interface
    echo END own
    [ -e /sys/devices/system/cpu/cpu1/online ] && step hotplug hotplug
    step balance balance
    # It begins to count anew.
    echo BEGIN unloaded
    unloaded
    echo END unloaded
    # Last: what has gone here is held as well if anything is held.
    step bench pages bench 1500 512
    grep ring3_pnp /proc/interrupts
fi
echo BEGIN log
dmesg
echo END log
"#;

/// What sections have to say; `{rest}` is whatever comes.
const EXPECTED: &[(&str, &str)] = &[
    ("load", "loaded\n"),
    // Whoever has less priority goes on while a page comes.
    ("stalls", "stalls 32 moved 32 right 32\n"),
    // The kernel's own accesses.
    ("copy", "copied 64 right 64\n"),
    ("poison", "page 0 holds 1\nsignal 7 code 4 page 1\nthe other goes on\n"),
    ("shared", "who touches it: signal 7\nthe other: goes on\n"),
    ("fault", "write -1 Bad address\nread -1 Bad address\n"),
    // Before its page has come.
    ("killed", "signal 9, pages wanted 1\n"),
    ("hotplug", "stalls 8 moved 8 right 8\n"),
    ("balance", "all are resolved\n"),
    ("own", "0 of the other interface\n"),
    ("unloaded", "unloaded\ncame with 1\nloaded\n"),
    // Half of all memory goes, over and over.
    ("bench", "wrong 0\n{rest}"),
];

/// What was counted meanwhile.
const COUNTED: &[&str] = &[
    "counted stalls: 32 events, 0 in the kernel, 0 failed",
    "counted copy: 128 events, 128 in the kernel, 0 failed",
    "counted poison: 1 events, 0 in the kernel, 1 failed",
];

pub(crate) fn run() -> Result<(), Error> {
    let build = ["build", "--release", "--package", "ring3", "--package", "preload"];
    xtask::run(Command::new("cargo").args(build).current_dir(root()))?;
    let kernel = packages::kernel("6.12")?;
    let module = build_module(&kernel)?;
    let initrd = initramfs(&kernel, &module)?;
    not_offered(&kernel, &initrd)?;
    println!("a hypervisor without the protocol: the driver says so");
    for cpus in [1, 2] {
        drive(&kernel, &initrd, cpus)?;
    }
    Ok(())
}

/// Builds the module, beside the checkout's files and not among them.
fn build_module(kernel: &Kernel) -> Result<PathBuf, Error> {
    let headers = packages::kernel_headers(kernel)?;
    let compiler = compiler(&headers)?;
    packages::require(&[
        (&format!("x86_64-linux-gnu-{compiler}"), &compiler),
        ("cc", "gcc"),
        ("/usr/include/stdio.h", "libc6-dev"),
        ("make", "make"),
        // What kernel modules are checked with.
        ("/usr/lib/x86_64-linux-gnu/libelf.so.1", "libelf1"),
    ])?;
    let dir = guest_dir().join("linux-driver");
    at(&dir, std::fs::create_dir_all(&dir))?;
    for name in ["Kbuild", "Makefile", "ring3_pnp.c"] {
        let from = root().join("guests/linux").join(name);
        at(&from, std::fs::copy(&from, dir.join(name)))?;
    }
    eprintln!("building the driver for {}", kernel.release);
    let tree = format!("KERNEL={}", headers.display());
    xtask::run(Command::new("make").arg("-C").arg(&dir).args(["W=1", "KCFLAGS=-Werror"]).arg(tree))?;
    Ok(dir.join("ring3_pnp.ko"))
}

/// The compiler that the kernel was built with (`CC = ... $(CROSS_COMPILE)gcc-12`), which is the name of its package as well.
fn compiler(headers: &Path) -> Result<String, Error> {
    let path = headers.join(".kernelvariables");
    let text = at(&path, std::fs::read_to_string(&path))?;
    let name = text.lines().find_map(|line| line.strip_prefix("CC = ")?.rsplit_once("$(CROSS_COMPILE)"));
    Ok(name.map_or("gcc", |(_, name)| name).trim().to_string())
}

fn initramfs(kernel: &Kernel, module: &Path) -> Result<PathBuf, Error> {
    let program = guest_dir().join("linux-driver/pages");
    let source = root().join("tests/programs/pages.c");
    xtask::run(Command::new("cc").args(["-O1", "-static", "-o"]).arg(&program).arg(source))?;
    let file = |name: &str, mode, path: &Path| Ok((name.to_string(), mode, at(path, std::fs::read(path))?));
    let files = vec![file("bin/pages", 0o755, &program)?, file("driver/ring3_pnp.ko", 0o644, module)?];
    let initrd = guest_dir().join("linux-driver.cpio");
    Initramfs { script: SCRIPT, files }.build(kernel, &initrd)?;
    Ok(initrd)
}

/// QEMU gives guests none of ring3's CPUID leaves.
fn not_offered(kernel: &Kernel, initrd: &Path) -> Result<(), Error> {
    packages::require(&[("qemu-system-x86_64", "qemu-system-x86")])?;
    let log = guest_dir().join("linux-driver.log");
    let out = at(&log, std::fs::File::create(&log))?;
    let mut command = Command::new(ring3());
    command.args(["run", "--", "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "512"]);
    command.args(["-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio", "-append"]);
    command.arg("console=ttyS0 quiet panic=-1").arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initrd);
    command.stdin(Stdio::null()).stdout(out).stderr(Stdio::inherit());
    let status = within(&mut command, LIMIT)?;
    let console = at(&log, std::fs::read_to_string(&log))?.replace('\r', "");
    let said = section(&console, "log").is_some_and(|log| log.contains("ring3_pnp: not offered"));
    let loaded = section(&console, "load").is_none_or(|text| text.contains("loaded\n"));
    if status.is_some_and(|status| status.success()) && said && !loaded {
        return Ok(());
    }
    Err(Error::Guest(format!(
        "QEMU's guest, which has no protocol, did not refuse the driver; its console is {}",
        log.display()
    )))
}

fn drive(kernel: &Kernel, initrd: &Path, cpus: u32) -> Result<(), Error> {
    let boot = Boot {
        kernel: kernel.image.clone(),
        initrd: Some(initrd.to_path_buf()),
        append: "console=ttyS0 quiet panic=-1".into(),
        memory: 256,
        cpus,
        extra: ["--page-out", "half", "--page-delay", "20", "--stats"].map(String::from).to_vec(),
        ..Boot::default()
    };
    eprintln!("driving it on {cpus} vCPUs");
    let outcome = boot.run()?;
    let console = &outcome.console;
    let fails = |what: String| {
        Err(Error::Guest(format!("{cpus} vCPUs: {what}\n{}\nconsole:\n{console}", outcome.stderr)))
    };
    if outcome.status != Some(0) {
        return fails(format!("the guest ended with {:?}", outcome.status));
    }
    for (name, wanted) in EXPECTED.iter().filter(|(name, _)| cpus > 1 || *name != "hotplug") {
        let said = outcome.section(name).unwrap_or("nothing\n");
        let right = match wanted.strip_suffix("{rest}") {
            Some(start) => said.starts_with(start),
            None => said == *wanted,
        };
        if !right {
            return fails(format!("{name}: `{said}` instead of `{wanted}`"));
        }
    }
    let alarms = alarms(console);
    if !alarms.is_empty() {
        return fails(format!("alarms: {alarms:?}"));
    }
    console
        .lines()
        .filter(|line| line.starts_with("counted "))
        .for_each(|line| println!("{cpus} vCPUs: {line}"));
    // Without the driver, all of it would have come right as well but what follows.
    if let Some(line) = COUNTED.iter().find(|line| !console.contains(**line)) {
        return fails(format!("`{line}` was not said"));
    }
    println!("{cpus} vCPUs: {} sections as expected", EXPECTED.len() - usize::from(cpus == 1));
    Ok(())
}
