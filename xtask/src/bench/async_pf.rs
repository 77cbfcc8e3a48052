//! `cargo xtask bench async-pf`: two tasks of a guest on one processor, of which one touches memory that is elsewhere, the other computes. A Debian
//! guest half of whose memory has gone (`tests/programs/pages.c`), and a bare-metal guest whose memory arrives for the first time
//! (`guests/examples/lazy_restore.rs`), by each of the protocols.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use xtask::guest::Boot;
use xtask::images::Initramfs;
use xtask::packages::{self, Kernel};
use xtask::{Error, at, guest_dir, root, target_dir};

use super::{Options, median};

/// How long a page takes, in microseconds: memory of another machine, a slow disk.
const DELAYS: [u32; 3] = [100, 1_000, 10_000];
/// With the events, and without.
const PARAMETERS: [&str; 2] = ["", "no-kvmapf"];
/// The passes last at least so many milliseconds, over so many pages.
const PASSES: &str = "pages bench 3000 4096";
/// What the program says: the computing task's speed, of that beside a sleeping one; pages touched a second; pages brought a second.
const FIGURES: [&str; 3] = ["compute", "touch", "bring"];

pub(super) fn run(options: &Options) -> Result<(), Error> {
    packages::require(&[("cc", "gcc"), ("/usr/lib/x86_64-linux-gnu/libc.a", "libc6-dev")])?;
    xtask::run(Command::new("cargo").args(["build", "--release", "--package", "ring3"]))?;
    let kernel = packages::kernel(&options.kernel)?;
    let initrd = initrd(&kernel)?;
    let mut figures: BTreeMap<_, Vec<f64>> = BTreeMap::new();
    for _ in 0..options.runs {
        for delay in DELAYS {
            for parameters in PARAMETERS {
                let measured = measure(&kernel, &initrd, parameters, delay)?;
                for (name, value) in FIGURES.into_iter().zip(measured) {
                    figures.entry((delay, parameters, name)).or_default().push(value);
                }
            }
        }
    }
    let middle = |delay, parameters, name| {
        let values = figures.get(&(delay, parameters, name)).into_iter().flatten().copied();
        median(values)
    };
    let mut table =
        format!("Guest kernel {}, medians of {} interleaved runs.\n\n", kernel.release, options.runs);
    table += "| a page takes, us | figure | async page faults | no-kvmapf | ratio |\n| ---: | --- | ---: | ---: | ---: |\n";
    for delay in DELAYS {
        for name in FIGURES {
            let [with, without] = PARAMETERS.map(|parameters| middle(delay, parameters, name));
            let (title, decimals) = match name {
                "compute" => ("computing task's speed, of that alone", 2),
                "touch" => ("pages that the other touches, a second", 0),
                _ => ("of which brought", 0),
            };
            let ratio = with / without;
            let _ = writeln!(
                table,
                "| {delay} | {title} | {with:.decimals$} | {without:.decimals$} | {ratio:.2} |"
            );
        }
    }
    table += &restore(options.runs)?;
    println!("{table}");
    options.output.as_ref().map_or(Ok(()), |path| at(path, std::fs::write(path, &table)))
}

/// How a bare-metal guest hears of pages.
const PROTOCOLS: [(&str, &str); 4] = [
    ("none", "not at all: the processor waits"),
    ("kvm", "the kernel's asynchronous page faults"),
    ("protocol", "the page-not-present protocol"),
    ("ve", "the same, by #VE"),
];
/// Memory that arrives, in MiB: for comparison, and as much as is asked for. A page takes a millisecond, and comes after the one before.
const SMALL: u32 = 16;
const LARGE: u32 = 1024;
const PAGE_DELAY: u32 = 1_000;

/// What a task keeps of its speed while the memory of another one arrives.
fn restore(runs: u32) -> Result<String, Error> {
    let example = ["build", "--release", "--package", "guests", "--example", "lazy_restore"];
    xtask::run(Command::new("cargo").args(example).current_dir(root()))?;
    let mut shares = [const { Vec::new() }; PROTOCOLS.len()];
    for _ in 0..runs {
        for ((protocol, _), shares) in PROTOCOLS.iter().zip(&mut shares) {
            shares.push(arrive(protocol, SMALL)?.1);
        }
    }
    let mut table = format!(
        "\nBare metal, {SMALL} MiB arrive at {PAGE_DELAY} us a page, medians of {runs} interleaved runs.\n\n\
         | the guest hears by | computing task's speed, of that alone |\n| --- | ---: |\n"
    );
    for ((_, title), shares) in PROTOCOLS.iter().zip(shares) {
        let _ = writeln!(table, "| {title} | {:.3} |", median(shares.into_iter()));
    }
    eprintln!("{LARGE} MiB arrive: about five minutes");
    let (seconds, share) = arrive("protocol", LARGE)?;
    let _ = writeln!(table, "| the page-not-present protocol, {LARGE} MiB, in {seconds:.0} s | {share:.3} |");
    Ok(table)
}

/// Seconds until all memory has arrived, and the share.
fn arrive(protocol: &str, mebibytes: u32) -> Result<(f64, f64), Error> {
    let program = target_dir().join("release/examples/lazy_restore");
    let said =
        xtask::run(Command::new(program).arg(protocol).args([mebibytes, PAGE_DELAY].map(|n| n.to_string())))?;
    let words: Vec<f64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    match words[..] {
        [_, seconds, share, ..] => Ok((seconds, share)),
        _ => Err(Error::Guest(format!("no figures: {said}"))),
    }
}

fn initrd(kernel: &Kernel) -> Result<PathBuf, Error> {
    let dir = guest_dir();
    at(&dir, std::fs::create_dir_all(&dir))?;
    let (program, initrd) = (dir.join("bench-pages"), dir.join("bench-pages.cpio"));
    let source = root().join("tests/programs/pages.c");
    xtask::run(Command::new("cc").args(["-O1", "-static", "-o"]).arg(&program).arg(source))?;
    let files = vec![("bin/pages".into(), 0o755, at(&program, std::fs::read(&program))?)];
    let script = format!("echo BEGIN pages\n{PASSES}\necho END pages\n");
    Initramfs { script: &script, files }.build(kernel, &initrd)?;
    Ok(initrd)
}

/// The figures of one run.
fn measure(
    kernel: &Kernel,
    initrd: &Path,
    parameters: &str,
    delay: u32,
) -> Result<[f64; FIGURES.len()], Error> {
    let boot = Boot {
        kernel: kernel.image.clone(),
        initrd: Some(initrd.to_path_buf()),
        append: format!("console=ttyS0 quiet panic=-1 {parameters}"),
        memory: 256,
        extra: ["--page-out", "half", "--page-delay", &delay.to_string()].map(String::from).to_vec(),
        ..Boot::default()
    };
    let outcome = boot.run()?;
    let wrong = || Error::Guest(format!("no figures: {}\n{}", outcome.stderr, outcome.console));
    let said = outcome.section("pages").filter(|said| said.starts_with("wrong 0\n")).ok_or_else(wrong)?;
    let mut figures = [0.0; FIGURES.len()];
    for (figure, name) in figures.iter_mut().zip(FIGURES) {
        let line = said.lines().find_map(|line| line.strip_prefix(name)).ok_or_else(wrong)?;
        *figure = line.trim().parse().map_err(|_| wrong())?;
    }
    Ok(figures)
}
