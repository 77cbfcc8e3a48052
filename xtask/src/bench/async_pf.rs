//! `cargo xtask bench async-pf`: two tasks of a Debian guest on one processor, of which one touches memory that has gone, the other
//! computes (`tests/programs/pages.c`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use xtask::guest::Boot;
use xtask::images::Initramfs;
use xtask::packages::{self, Kernel};
use xtask::{Error, at, guest_dir, root};

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
    println!("{table}");
    options.output.as_ref().map_or(Ok(()), |path| at(path, std::fs::write(path, &table)))
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
