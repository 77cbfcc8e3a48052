//! `cargo xtask bench guests`: the workloads of `guests/bench` under ring3, under QEMU's TCG and without a guest, in
//! interleaved runs on this machine.
//!
//! What is compared is CPU time of the whole process (user and system), because this may be a shared machine: between the
//! BEGIN and END lines of each workload, per unit of its work, and from process start to the guest's init.

mod launch;
mod measure;
mod plot;
mod protocol;
mod report;
mod results;
mod tree;
mod workloads;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use xtask::packages::{self, Kernel};
use xtask::{Error, at, guest_dir};

use launch::{Launcher, Machine};
use protocol::{Line, Run};
use results::Results;
use workloads::{BOOT, Image, NEED_ROOT, Workloads, image_of, wanted};

/// Options for guests.
#[derive(Args)]
#[command(next_help_heading = "Options for guests")]
pub(super) struct Options {
    /// What runs the workloads, in turn.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "native,tcg,ring3",
        value_name = "LAUNCHER,…"
    )]
    with: Vec<Launcher>,
    /// Benchmarks: names and globs, with a `-` to take away: 'int.*', 'all,-mem.*', boot. Without this all but smp.*; with
    /// --smp those.
    #[arg(long, value_name = "LIST", allow_hyphen_values = true)]
    bench: Option<String>,
    /// Amount of work, per mille, for all or by launcher: 100, or tcg:20,ring3:100 [default: native:300, tcg:60, ring3:300, kvm:300].
    #[arg(long, value_name = "N|LAUNCHER:N,…", value_delimiter = ',')]
    scale: Vec<Scale>,
    /// Guests with two processors; elapsed time is compared.
    #[arg(long)]
    smp: bool,
    /// Draw the slow-downs against native: bench.svg and bench.png in this directory.
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
}

/// Amount of work, of one launcher or of all.
#[derive(Clone, Debug, PartialEq)]
struct Scale {
    launcher: Option<Launcher>,
    per_mille: u32,
}

impl std::str::FromStr for Scale {
    type Err = String;

    fn from_str(text: &str) -> Result<Scale, String> {
        let (launcher, number) = match text.split_once(':') {
            Some((name, number)) => (Some(<Launcher as clap::ValueEnum>::from_str(name, false)?), number),
            None => (None, text),
        };
        match number.parse() {
            Ok(per_mille) if per_mille > 0 => Ok(Scale { launcher, per_mille }),
            _ => Err(format!("`{number}` is not a number from 1 on")),
        }
    }
}

impl Options {
    fn scale(&self, launcher: Launcher) -> u32 {
        let own = self.scale.iter().find(|scale| scale.launcher == Some(launcher));
        let all = self.scale.iter().find(|scale| scale.launcher.is_none());
        own.or(all).map_or(launcher.scale(), |scale| scale.per_mille)
    }

    fn list(&self) -> &str {
        self.bench.as_deref().unwrap_or(if self.smp { "smp.*" } else { "all,-smp.*" })
    }
}

/// How long KVM has to get a guest to /init.
const KVM_TRIAL: Duration = Duration::from_secs(60);

pub(super) fn run(options: &super::Options) -> Result<(), Error> {
    let own = &options.guests;
    let workloads = Workloads::build()?;
    let names = workloads.select(own.list())?;
    let mut launchers = own.with.clone();
    launchers.sort();
    launchers.dedup();
    if launchers.iter().any(|launcher| launcher.is_qemu()) {
        packages::require(&[("qemu-system-x86_64", "qemu-system-x86")])?;
    }
    if own.plot.is_some() {
        let comparable = launchers.contains(&Launcher::Native) && launchers.len() > 1;
        if !comparable {
            return Err(Error::Guest("--plot compares with native: have it and another in --with".into()));
        }
        plot::require()?;
    }
    let kernel = packages::kernel(&options.kernel)?;
    let machine = prepare(&kernel, &workloads, &names, if own.smp { 2 } else { 1 }, &launchers)?;
    launchers.retain(|&launcher| launcher != Launcher::Kvm || kvm_works(&machine));
    if launchers.contains(&Launcher::Ring3) {
        let build = ["build", "--release", "--package", "ring3"];
        xtask::run(Command::new("cargo").args(build).current_dir(xtask::root()))?;
    }

    let runs = run_all(own, &machine, &launchers, &names, options.runs)?;
    let results = Results { runs, names, smp: own.smp };
    let scales: Vec<String> = launchers.iter().map(|&l| format!("{} {}", l.name(), own.scale(l))).collect();
    let about = report::About { kernel: &kernel.release, cpu: &cpu_name(), scales: &scales.join(", ") };
    let mut text = report::report(&results, &about);
    if launchers.contains(&Launcher::Ring3) && !own.smp {
        let first = measure::first_instruction()?;
        text += &format!("\nProcess start to the end of a one-instruction guest: {first:.1} ms.\n");
    }
    println!("{text}");
    if let Some(path) = &options.output {
        at(path, std::fs::write(path, &text))?;
    }
    own.plot.as_ref().map_or(Ok(()), |dir| plot::draw(&results, &about, dir))
}

/// Makes the images that the workloads called `names` take.
fn prepare(
    kernel: &Kernel,
    workloads: &Workloads,
    names: &[String],
    cpus: u32,
    launchers: &[Launcher],
) -> Result<Machine, Error> {
    let mut machine = Machine::new(kernel, cpus, workloads.program.clone());
    let guests = launchers.iter().any(|&launcher| launcher != Launcher::Native);
    for image in [Image::Min, Image::Full] {
        if guests && names.iter().any(|name| image_of(name) == image) {
            machine.images.push((image, workloads::pack(&workloads.tree(image)?, image)?));
        }
    }
    let programs = names.iter().any(|name| wanted(NEED_ROOT, name));
    if launchers.contains(&Launcher::Native) && programs {
        if packages::is_root() {
            machine.root = Some(workloads::unpack(&workloads.tree(Image::Full)?)?);
        } else {
            eprintln!("native {NEED_ROOT} are left out: to run them here takes root, for chroot");
        }
    }
    Ok(machine)
}

/// Whether the host's KVM gets a guest to /init; says so if it does not.
fn kvm_works(machine: &Machine) -> bool {
    let absent = std::fs::File::options().read(true).write(true).open("/dev/kvm").err();
    if let Some(error) = absent {
        eprintln!("kvm is left out: /dev/kvm: {error}");
        return false;
    }
    let image = machine.images.first().map_or(Image::Min, |(image, _)| *image);
    let command = machine.guest(Launcher::Kvm, image, BOOT, 1);
    let log = guest_dir().join("bench/kvm.log");
    let works = measure::guest(command, &log, KVM_TRIAL, &mut |_| {}).is_ok();
    if !works {
        let seconds = KVM_TRIAL.as_secs();
        eprintln!(
            "kvm is left out: /dev/kvm is there, but the kernel did not get to /init in {seconds} s with it ({})",
            log.display()
        );
    }
    works
}

/// All runs, interleaved.
fn run_all(
    options: &Options,
    machine: &Machine,
    launchers: &[Launcher],
    names: &[String],
    count: u32,
) -> Result<Vec<(Launcher, Vec<Run>)>, Error> {
    let template = "{elapsed_precise} [{bar:30}] {pos}/{len} {msg}";
    let style = ProgressStyle::with_template(template).unwrap_or(ProgressStyle::default_bar());
    let steps = count as usize * launchers.len() * names.len();
    let bar = ProgressBar::new(steps as u64).with_style(style);
    bar.enable_steady_tick(Duration::from_secs(1));
    let mut runs: Vec<_> = launchers.iter().map(|&launcher| (launcher, Vec::new())).collect();
    for turn in 1..=count {
        for (launcher, runs) in &mut runs {
            let show =
                |name: &str| bar.set_message(format!("run {turn} of {count}, {}: {name}", launcher.title()));
            let scale = options.scale(*launcher);
            show(BOOT);
            runs.push(match launcher {
                Launcher::Native => native(machine, names, scale, &bar, &show)?,
                _ => guest(machine, *launcher, names, scale, &bar, &show)?,
            });
        }
    }
    bar.finish_and_clear();
    Ok(runs)
}

/// One run without a guest.
fn native(
    machine: &Machine,
    names: &[String],
    scale: u32,
    bar: &ProgressBar,
    show: &dyn Fn(&str),
) -> Result<Run, Error> {
    let possible = |name: &str| name != BOOT && (machine.root.is_some() || !wanted(NEED_ROOT, name));
    if machine.root.is_some() {
        // Makes the files that the programs read.
        measure::native(machine.native("app.shell", 1), 0.0)?;
    }
    let overhead = measure::overhead(|| machine.native("none", 1))?;
    let mut run = Run::default();
    for name in names {
        show(name);
        if possible(name) {
            run.join(measure::native(machine.native(name, scale), overhead)?);
        }
        bar.inc(1);
    }
    Ok(run)
}

/// One run of a guest, or one with each image.
fn guest(
    machine: &Machine,
    launcher: Launcher,
    names: &[String],
    scale: u32,
    bar: &ProgressBar,
    show: &dyn Fn(&str),
) -> Result<Run, Error> {
    let log = guest_dir().join(format!("bench/{}.log", launcher.name()));
    let mut run = Run::default();
    for (image, _) in &machine.images {
        let members: Vec<&str> =
            names.iter().map(String::as_str).filter(|name| image_of(name) == *image).collect();
        let command = machine.guest(launcher, *image, &members.join(","), scale);
        let mut on_line = |line: Line| match line {
            Line::Begin(name) => show(name),
            Line::End(_) | Line::Skip(..) => bar.inc(1),
            Line::Init if members.contains(&BOOT) => bar.inc(1),
            _ => {}
        };
        run.join(measure::guest(command, &log, measure::STUCK, &mut on_line)?);
    }
    Ok(run)
}

/// What the host's processor calls itself.
fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or("unknown processor".into(), |(_, name)| name.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_for_one_launcher_or_all() {
        assert_eq!("100".parse(), Ok(Scale { launcher: None, per_mille: 100 }));
        assert_eq!("tcg-tuned:20".parse(), Ok(Scale { launcher: Some(Launcher::TcgTuned), per_mille: 20 }));
        assert!("bochs:3".parse::<Scale>().is_err() && "tcg:0".parse::<Scale>().is_err());
    }
}
