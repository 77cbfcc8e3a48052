//! `cargo xtask fuzz`: the generators of the test suite with other seeds, for as long as wanted.

use std::process::Command;

use clap::Args;
use xtask::Error;

/// Options of `cargo xtask fuzz`.
#[derive(Args)]
pub(crate) struct Options {
    /// How long to go on.
    #[arg(long, default_value_t = 10)]
    minutes: u32,
    /// First seed; by default the time of day.
    #[arg(long)]
    seed: Option<u64>,
    /// Only instructions whose name contains this.
    #[arg(long)]
    filter: Option<String>,
}

pub(crate) fn run(options: &Options) -> Result<(), Error> {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seed = options.seed.unwrap_or(clock.as_secs());
    let mut command = Command::new("cargo");
    command.args(["run", "--release", "--quiet", "--package", "conformance", "--"]);
    command.args(["--seed", &seed.to_string(), "--minutes", &options.minutes.to_string()]);
    if let Some(filter) = &options.filter {
        command.args(["--filter", filter]);
    }
    let status = command.current_dir(xtask::root()).status().map_err(|e| Error::Guest(e.to_string()))?;
    if status.success() { Ok(()) } else { Err(Error::Guest(format!("differences found; seed {seed}"))) }
}
