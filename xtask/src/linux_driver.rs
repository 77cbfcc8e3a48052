//! `cargo xtask linux-driver`: builds the Linux guest driver of the page-not-present protocol (`guests/linux`) for Debian's kernel, and runs
//! it: tasks that wait for pages, and memory that fails. Not in CI, for it needs the kernel's headers.

use std::path::{Path, PathBuf};
use std::process::Command;

use xtask::guest::{Boot, Outcome};
use xtask::images::Initramfs;
use xtask::packages::{self, Kernel};
use xtask::{Error, at, guest_dir, root};

/// Loads the driver, runs the commands of the kernel command line's `run=`, and shows its counters and how often the kernel's own events came.
const SCRIPT: &str = "commands=$(sed -n 's/.* run=\"\\([^\"]*\\)\".*/\\1/p' /proc/cmdline)
sysctl -q -w kernel.sched_rt_runtime_us=-1
hyp() { awk '/HYP:/ { for (i = 2; $i ~ /^[0-9]+$/; i++) sum += $i; print sum + 0 }' /proc/interrupts; }
insmod /driver/ring3_pnp.ko
hyp=$(hyp)
eval \"$commands\" 2>&1
cd /sys/module/ring3_pnp/parameters
for counter in events resolutions failures in_kernel; do echo $counter $(cat $counter); done
echo hyp $(($(hyp) - hyp))
rmmod ring3_pnp && echo unloaded
echo after
pages stalls 2
dmesg | grep -e ring3_pnp -e 'BUG' -e 'Oops'
echo end
";

/// A guest: what it runs, on how many processors, and what has to be on its console, in any order.
struct Case {
    name: &'static str,
    commands: &'static str,
    delay: u32,
    cpus: u32,
    says: &'static [&'static str],
    counts: fn(&dyn Fn(&str) -> u64) -> bool,
}

const CASES: &[Case] = &[
    Case {
        name: "a task goes on while another one waits",
        commands: "pages stalls 32 hold",
        delay: 0,
        cpus: 1,
        says: &["stalls 32 moved 32 right 32"],
        counts: |of| of("events") >= 32 && of("events") == of("resolutions") && of("failures") == 0,
    },
    Case {
        name: "the kernel's own accesses",
        commands: "pages copy 64",
        delay: 100,
        cpus: 1,
        says: &["copied 64 right 64"],
        counts: |_| true,
    },
    Case {
        name: "half of all memory goes, over and over",
        commands: "pages bench 1500 512",
        delay: 20,
        cpus: 2,
        says: &["wrong 0"],
        counts: |of| of("events") > 100,
    },
    Case {
        name: "a page that has failed kills the task that touches it",
        commands: "pages poison",
        delay: 0,
        cpus: 2,
        says: &["page 0 holds 1", "signal 7 code 4 page 1", "the other goes on"],
        counts: |of| of("failures") >= 1,
    },
];

pub(crate) fn run() -> Result<(), Error> {
    xtask::run(Command::new("cargo").args(["build", "--release", "--package", "ring3"]).current_dir(root()))?;
    let kernel = packages::kernel("6.12")?;
    let initrd = initrd(&kernel, &build(&kernel)?)?;
    for case in CASES {
        eprintln!("{}", case.name);
        let boot = Boot {
            kernel: kernel.image.clone(),
            initrd: Some(initrd.clone()),
            append: format!("console=ttyS0 quiet panic=-1 run=\"{}\"", case.commands),
            memory: 256,
            cpus: case.cpus,
            extra: ["--page-out", "half", "--page-delay", &case.delay.to_string()].map(String::from).to_vec(),
            ..Boot::default()
        };
        judge(case, &boot.run()?)?;
    }
    println!("the driver runs on {}", kernel.release);
    Ok(())
}

/// Builds the module; the path of `ring3_pnp.ko`.
fn build(kernel: &Kernel) -> Result<PathBuf, Error> {
    packages::require(&[
        ("make", "make"),
        ("cc", "gcc"),
        ("/usr/lib/x86_64-linux-gnu/libc.a", "libc6-dev"),
        // What kernel modules are checked with.
        ("/usr/lib/x86_64-linux-gnu/libelf.so.1", "libelf1"),
    ])?;
    let tree = packages::kernel_headers(kernel)?;
    let dir = guest_dir().join("driver");
    at(&dir, std::fs::create_dir_all(&dir))?;
    for name in ["ring3_pnp.c", "Kbuild"] {
        let from = root().join("guests/linux").join(name);
        at(&from, std::fs::copy(&from, dir.join(name)))?;
    }
    xtask::run(
        Command::new("make").arg("-sC").arg(&tree).arg(format!("M={}", dir.display())).arg("modules"),
    )?;
    Ok(dir.join("ring3_pnp.ko"))
}

fn initrd(kernel: &Kernel, module: &Path) -> Result<PathBuf, Error> {
    let program = guest_dir().join("pages");
    let source = root().join("tests/programs/pages.c");
    xtask::run(Command::new("cc").args(["-O1", "-static", "-o"]).arg(&program).arg(source))?;
    let files = vec![
        ("bin/pages".to_string(), 0o755, at(&program, std::fs::read(&program))?),
        ("driver/ring3_pnp.ko".to_string(), 0o644, at(module, std::fs::read(module))?),
    ];
    let path = guest_dir().join("linux-driver.cpio");
    Initramfs { script: SCRIPT, files }.build(kernel, &path)?;
    Ok(path)
}

fn judge(case: &Case, outcome: &Outcome) -> Result<(), Error> {
    let lines: Vec<&str> = outcome.console.lines().collect();
    let count = |name: &str| {
        let found = lines.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        found.unwrap_or(u64::MAX)
    };
    let said = case.says.iter().chain(&["unloaded", "end"]).all(|text| lines.iter().any(|line| line == text));
    // The counters are read one after the other, and pages may come between: those read later may have counted more.
    let all = count("events") <= count("resolutions") && count("hyp") == 0;
    if said && all && (case.counts)(&count) {
        return Ok(());
    }
    Err(Error::Guest(format!("{}: the guest says\n{}\n{}", case.name, outcome.console, outcome.stderr)))
}
