//! `cargo xtask fuzz`: the generators of the test suite with other seeds, for as long as wanted.

use std::process::Command;

use clap::{Args, ValueEnum};
use xtask::{Error, packages};

/// Options of `cargo xtask fuzz`.
#[derive(Args)]
pub(crate) struct Options {
    /// How long to go on.
    #[arg(long, default_value_t = 10)]
    minutes: u32,
    /// First seed; by default the time of day.
    #[arg(long)]
    seed: Option<u64>,
    /// What to generate.
    #[arg(long, value_enum, default_value = "instructions")]
    kind: Kind,
    /// Only instructions whose name contains this.
    #[arg(long)]
    filter: Option<String>,
}

/// What the generators make.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    /// Instructions, compared with the host's CPU.
    Instructions,
    /// Whole random guests, which must not harm the host.
    Images,
}

pub(crate) fn run(options: &Options) -> Result<(), Error> {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seed = options.seed.unwrap_or(clock.as_secs());
    let mut command = Command::new("cargo");
    command.args(["run", "--release", "--quiet", "--package", "conformance", "--"]);
    command.args(["--seed", &seed.to_string(), "--minutes", &options.minutes.to_string()]);
    if let Kind::Images = options.kind {
        command.args(["--images", "10000", "--kernel"]).arg(packages::kernel("6.12")?.image);
    }
    if let Some(filter) = &options.filter {
        command.args(["--filter", filter]);
    }
    let status = command.current_dir(xtask::root()).status().map_err(|e| Error::Guest(e.to_string()))?;
    if status.success() { Ok(()) } else { Err(Error::Guest(format!("something was found; seed {seed}"))) }
}
