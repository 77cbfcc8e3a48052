//! `cargo xtask test`: everything that CI runs.

use std::process::Command;
use std::time::Instant;

use clap::Args;
use xtask::{Error, packages};

/// Options of `cargo xtask test`.
#[derive(Args)]
pub(crate) struct Options {
    /// Without the Linux guests, and with fewer generated cases.
    #[arg(long)]
    quick: bool,
}

/// Thirty programs are linked; optimising each as a whole would take longer than they run. What is tested is the same code.
const LTO: (&str, &str) = ("CARGO_PROFILE_RELEASE_LTO", "off");

/// Generated instruction cases that CI compares with the host's CPU, and their seed.
const CONFORMANCE: [&str; 4] = ["--seed", "1", "--cases", "1000000"];
const CONFORMANCE_QUICK: [&str; 4] = ["--seed", "1", "--cases", "50000"];

/// Programs of such instructions, which run on the host's CPU and on both engines.
const BLOCKS: [&str; 5] = ["--blocks", "--seed", "1", "--cases", "30000"];
const BLOCKS_QUICK: [&str; 5] = ["--blocks", "--seed", "1", "--cases", "3000"];

/// The unit tests of the processor.
const PROCESSOR: &[&str] = &["test", "--quiet", "--release", "--package", "silicon", "--lib"];

/// Random guest images, and the number of the first.
const IMAGES: [&str; 4] = ["--seed", "1", "--images", "10000"];
const IMAGES_QUICK: [&str; 4] = ["--seed", "1", "--images", "1000"];

/// The variable that says how guest code is executed, and the engines that steps ask for: the interpreter alone, and
/// translation of all that can be translated, from its first run on. The others take the default.
const ENGINE: &str = "RING3_ENGINE";
const INTERPRETER: &str = "interp";
const TRANSLATOR: &str = "translate:0";

/// One step: what it is, cargo's arguments, whether `--quick` leaves it out, and the engine.
struct Step {
    title: &'static str,
    cargo: Vec<&'static str>,
    slow: bool,
    engine: Option<&'static str>,
}

impl Step {
    fn on(self, engine: &'static str) -> Step {
        Step { engine: Some(engine), ..self }
    }
}

/// A run of one of the generators' commands.
fn generator(title: &'static str, package: &'static str, arguments: &[&'static str]) -> Step {
    let cargo = ["run", "--release", "--quiet", "--package", package, "--"];
    Step { title, cargo: cargo.iter().chain(arguments).copied().collect(), slow: false, engine: None }
}

fn steps(quick: bool) -> Vec<Step> {
    let step =
        |title, cargo: &[&'static str], slow| Step { title, cargo: cargo.to_vec(), slow, engine: None };
    let cases = if quick { &CONFORMANCE_QUICK } else { &CONFORMANCE };
    let blocks = if quick { &BLOCKS_QUICK } else { &BLOCKS };
    let images = if quick { &IMAGES_QUICK } else { &IMAGES };
    let seconds = if quick { "5" } else { "60" };
    vec![
        step("formatting", &["fmt", "--all", "--check"], false),
        step("lints", &["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"], false),
        step("build", &["build", "--quiet", "--release", "--workspace"], false),
        step(
            "unit tests",
            &["test", "--quiet", "--release", "--workspace", "--exclude", "e2e", "--no-fail-fast"],
            false,
        ),
        step("processor, interpreted", PROCESSOR, false).on(INTERPRETER),
        step("processor, translated", PROCESSOR, false).on(TRANSLATOR),
        generator("conformance, interpreted", "conformance", cases).on(INTERPRETER),
        generator("conformance, translated", "conformance", cases).on(TRANSLATOR),
        generator("conformance, blocks", "conformance", blocks),
        generator("robustness, interpreted", "robustness", images).on(INTERPRETER),
        generator("robustness, translated", "robustness", images).on(TRANSLATOR),
        step(
            "random ioctls",
            &[
                "run",
                "--release",
                "--quiet",
                "--package",
                "robustness",
                "--bin",
                "ioctls",
                "--",
                "--seconds",
                seconds,
            ],
            false,
        ),
        step(
            "kvm-ioctls' tests",
            &["run", "--release", "--quiet", "--package", "xtask", "--", "kvm-ioctls"],
            true,
        ),
        step(
            "KVM selftests",
            &["run", "--release", "--quiet", "--package", "xtask", "--", "selftests", "--passing"],
            true,
        ),
        step("Linux guests", &["test", "--quiet", "--release", "--package", "e2e", "--no-fail-fast"], true),
    ]
}

pub(crate) fn run(options: &Options) -> Result<(), Error> {
    packages::require(&[
        ("cc", "gcc"),
        ("/usr/include/stdio.h", "libc6-dev"),
        ("mke2fs", "e2fsprogs"),
        ("xz", "xz-utils"),
        ("dpkg-deb", "dpkg"),
        ("chroot", "coreutils"),
    ])?;
    let mut table = Vec::new();
    let mut failed = Vec::new();
    for step in steps(options.quick) {
        if step.slow && options.quick {
            continue;
        }
        eprintln!("==> {}: cargo {}", step.title, step.cargo.join(" "));
        let started = Instant::now();
        let mut command = Command::new("cargo");
        command.args(&step.cargo).env(LTO.0, LTO.1).current_dir(xtask::root());
        command.envs(step.engine.map(|engine| (ENGINE, engine)));
        let passed = command.status().is_ok_and(|s| s.success());
        table.push((step.title, passed, started.elapsed().as_secs()));
        if !passed {
            failed.push(step.title);
        }
    }
    println!();
    for (title, passed, seconds) in table {
        println!("{title:<26} {:<7} {seconds:>5} s", if passed { "ok" } else { "FAILED" });
    }
    if failed.is_empty() { Ok(()) } else { Err(Error::Guest(format!("failed: {}", failed.join(", ")))) }
}
