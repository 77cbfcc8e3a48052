//! What the project's tasks share with the end-to-end tests: Debian packages, guest images, running guests.

pub mod cpio;
pub mod guest;
pub mod images;
pub mod packages;

use std::path::{Path, PathBuf};
use std::process::Command;

use thiserror::Error;

/// Why a task could not be done; the text says what to do about it.
#[derive(Debug, Error)]
pub enum Error {
    /// A program is missing and cannot be installed by us.
    #[error("`{tool}` is missing. Install it with: apt-get install {package}")]
    MissingTool {
        /// What was looked for.
        tool: String,
        /// The Debian package that has it.
        package: String,
    },
    /// A command failed.
    #[error("`{command}` failed ({status})\n{output}")]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The end of what it printed.
        output: String,
    },
    /// A Debian package is not to be had.
    #[error(
        "Debian package {0} was not found; run `apt-get update` as root and look at your package sources"
    )]
    Package(String),
    /// A file operation.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// A guest did not do what it should have.
    #[error("{0}")]
    Guest(String),
}

/// Attaches the path to an I/O error.
pub fn at<T>(path: &Path, result: std::io::Result<T>) -> Result<T, Error> {
    result.map_err(|source| Error::File { path: path.to_path_buf(), source })
}

/// Runs a command to its end and gives what it printed on stdout; a failure carries the end of its output.
pub fn run(command: &mut Command) -> Result<String, Error> {
    let text = format!("{command:?}").replace('"', "");
    let output = command.output().map_err(|e| Error::Command {
        command: text.clone(),
        status: "not started".into(),
        output: e.to_string(),
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let mut all = String::from_utf8_lossy(&output.stdout).into_owned();
    all.push_str(&String::from_utf8_lossy(&output.stderr));
    let tail: Vec<&str> = all.lines().rev().take(30).collect();
    let output_text = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
    Err(Error::Command { command: text, status: output.status.to_string(), output: output_text })
}

/// The root of the checkout.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Where fetched packages and built guest images are kept.
pub fn guest_dir() -> PathBuf {
    target_dir().join("guest")
}

/// Cargo's target directory.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}
