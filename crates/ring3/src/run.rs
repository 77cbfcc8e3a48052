//! `ring3 run`: a KVM client with `libring3.so` in front of its C library.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use thiserror::Error;

use crate::cli::RunArguments;
use crate::client::{self, ClientError};

/// File name of the library.
const LIBRARY: &str = "libring3.so";

/// Why a command is not run.
#[derive(Debug, Error)]
pub(crate) enum RunError {
    /// The program is not fit for it.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The library is not there.
    #[error(
        "{LIBRARY} is not beside the ring3 command ({0}); from a source tree, `cargo build --release --workspace` \
         makes both"
    )]
    NoLibrary(PathBuf),
    /// `LD_PRELOAD` cannot name it.
    #[error(
        "the loader takes no library whose path has a space or a colon in it: {0}; install ring3 elsewhere"
    )]
    Unnameable(PathBuf),
    /// exec(2) failed, or our own path is not to be had.
    #[error("cannot run {what}: {source}")]
    Exec {
        /// What could not be run.
        what: String,
        /// Why.
        source: io::Error,
    },
}

/// Replaces this process by the client. Comes back only with the reason why it could not.
pub(crate) fn run(arguments: &RunArguments) -> RunError {
    match prepare(arguments) {
        Ok(mut command) => {
            let source = command.exec();
            RunError::Exec { what: command.get_program().display().to_string(), source }
        }
        Err(error) => error,
    }
}

fn prepare(arguments: &RunArguments) -> Result<Command, RunError> {
    let Some((name, rest)) = arguments.command.split_first() else {
        return Err(ClientError::NotFound(String::new()).into());
    };
    let program = client::find(name)?;
    client::check(&program)?;
    let library = library()?;
    let mut command = Command::new(&program);
    command.arg0(name).args(rest).env("LD_PRELOAD", preload(&library, env::var_os("LD_PRELOAD"))?);
    let settings =
        [("RING3_CPU", &arguments.cpu), ("RING3_HOST", &arguments.host), ("RING3_LOG", &arguments.log)];
    for (variable, value) in settings {
        if let Some(value) = value {
            command.env(variable, value);
        }
    }
    Ok(command)
}

/// `libring3.so`: beside the command, or where an installation puts libraries.
pub(crate) fn library() -> Result<PathBuf, RunError> {
    let own = env::current_exe().map_err(|source| RunError::Exec { what: "ring3".into(), source })?;
    let directory = own.parent().unwrap_or(Path::new("/"));
    let places = [
        directory.join(LIBRARY),
        directory.join("../lib/ring3").join(LIBRARY),
        directory.join("../lib").join(LIBRARY),
    ];
    let found = places.into_iter().find(|place| place.is_file());
    found.ok_or_else(|| RunError::NoLibrary(directory.to_path_buf()))
}

/// The library before those that are to be loaded anyway.
fn preload(library: &Path, others: Option<OsString>) -> Result<OsString, RunError> {
    if library.as_os_str().as_bytes().iter().any(|&byte| byte == b':' || byte.is_ascii_whitespace()) {
        return Err(RunError::Unnameable(library.into()));
    }
    let mut value = OsString::from(library);
    // `ring3 run` under `ring3 run`: once is enough.
    let others = others.unwrap_or_default();
    let is_other = |entry: &&[u8]| !entry.is_empty() && *entry != library.as_os_str().as_bytes();
    for other in others.as_bytes().split(|&byte| byte == b':' || byte == b' ').filter(is_other) {
        value.push(":");
        value.push(OsStr::from_bytes(other));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_preloaded_libraries_are_kept() {
        let library = Path::new("/opt/libring3.so");
        let value = |others: Option<&str>| preload(library, others.map(OsString::from)).unwrap();
        assert_eq!(value(None), "/opt/libring3.so");
        assert_eq!(value(Some("")), "/opt/libring3.so");
        assert_eq!(value(Some("liba.so:libb.so")), "/opt/libring3.so:liba.so:libb.so");
        assert_eq!(value(Some("/opt/libring3.so liba.so")), "/opt/libring3.so:liba.so");
        assert!(matches!(preload(Path::new("/a b/libring3.so"), None), Err(RunError::Unnameable(_))));
    }
}
