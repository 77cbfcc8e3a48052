//! `cargo xtask fuzz`: the generators of the test suite with other seeds, for as long as wanted.

use std::process::Command;

use clap::{Args, ValueEnum};
use xtask::Error;

/// Options of `cargo xtask fuzz`.
#[derive(Args)]
pub(crate) struct Options {
    /// How long to go on; the kinds share it.
    #[arg(long, default_value_t = 10)]
    minutes: u32,
    /// First seed; by default the time of day.
    #[arg(long)]
    seed: Option<u64>,
    /// What to generate; by default all kinds in turn.
    #[arg(long, value_enum)]
    kind: Option<Kind>,
    /// Only instructions whose name contains this.
    #[arg(long)]
    filter: Option<String>,
}

/// What the generators make.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    /// Instructions, compared with the host's CPU.
    Instructions,
    /// Programs of such instructions, compared with the host's CPU and between the engines.
    Blocks,
    /// Whole random guests, which must not harm the host.
    Images,
    /// Random calls of the KVM API.
    Ioctls,
}

impl Kind {
    /// The package and the program of its generator.
    fn program(self) -> (&'static str, &'static str) {
        match self {
            Kind::Instructions | Kind::Blocks => ("conformance", "conformance"),
            Kind::Images => ("robustness", "robustness"),
            Kind::Ioctls => ("robustness", "ioctls"),
        }
    }
}

pub(crate) fn run(options: &Options) -> Result<(), Error> {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seed = options.seed.unwrap_or(clock.as_secs());
    // A filter names instructions.
    let only = options.kind.or(options.filter.as_ref().map(|_| Kind::Instructions));
    let kinds =
        only.map_or(vec![Kind::Instructions, Kind::Blocks, Kind::Images, Kind::Ioctls], |kind| vec![kind]);
    let minutes = options.minutes.div_ceil(kinds.len() as u32);
    let mut failed = Vec::new();
    for kind in kinds {
        let (package, program) = kind.program();
        let mut command = Command::new("cargo");
        command.args(["run", "--release", "--quiet", "--package", package, "--bin", program, "--"]);
        command.args(["--seed", &seed.to_string(), "--minutes", &minutes.to_string()]);
        if let Kind::Blocks = kind {
            command.arg("--blocks");
        }
        if let (Kind::Instructions | Kind::Blocks, Some(filter)) = (kind, &options.filter) {
            command.args(["--filter", filter]);
        }
        let status = command.current_dir(xtask::root()).status().map_err(|e| Error::Guest(e.to_string()))?;
        if !status.success() {
            failed.push(program);
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::Guest(format!("{} found something; seed {seed}", failed.join(" and "))))
}
