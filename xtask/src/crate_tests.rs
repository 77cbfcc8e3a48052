//! `cargo xtask kvm-ioctls`: the test suite of the published `kvm-ioctls` crate, run under `ring3 run`. What each test is
//! expected to give is the table of docs/kvm-ioctls-tests.md.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Args;
use xtask::{Error, at, guest_dir, root, target_dir};

use crate::verdicts::{Outcome, Results, conclude};

/// The crate, and the version whose tests are run.
const CRATE: (&str, &str) = ("kvm-ioctls", "0.25.1");
/// How long the whole suite may take before a test counts as hanging.
const LIMIT: Duration = Duration::from_secs(600);

/// Options of `cargo xtask kvm-ioctls`.
#[derive(Args)]
pub(crate) struct Options {
    /// Write the results into docs/kvm-ioctls-tests.md instead of comparing with it.
    #[arg(long)]
    update: bool,
}

pub(crate) fn run(options: &Options) -> Result<(), Error> {
    let ring3 = ["build", "--release", "--package", "ring3", "--package", "preload"];
    xtask::run(Command::new("cargo").args(ring3).current_dir(root()))?;
    let program = build()?;
    let log = guest_dir().join("kvm-ioctls.log");
    let out = at(&log, std::fs::File::create(&log))?;
    let mut command = Command::new(target_dir().join("release/ring3"));
    command.args(["run", "--"]).arg(&program).arg("--test-threads=1");
    command.stdin(Stdio::null()).stdout(out).stderr(Stdio::null());
    xtask::guest::within(&mut command, LIMIT)?;
    let text = at(&log, std::fs::read_to_string(&log))?;
    conclude(&root().join("docs/kvm-ioctls-tests.md"), parse(&text), options.update, true)
}

/// Builds the crate's test program from the registry's source, in a directory of its own.
fn build() -> Result<PathBuf, Error> {
    let dir = guest_dir().join(format!("{}-{}", CRATE.0, CRATE.1));
    if !dir.join("Cargo.toml").exists() {
        copy_tree(&registry_source()?, &dir)?;
    }
    let manifest = dir.join("Cargo.toml");
    let mut cargo = Command::new("cargo");
    cargo.args(["test", "--lib", "--no-run", "--message-format=json", "--manifest-path"]).arg(&manifest);
    let messages = xtask::run(cargo.env("CARGO_TARGET_DIR", dir.join("target")).current_dir(&dir))?;
    let executable = messages.lines().rev().find_map(|line| {
        let (_, rest) = line.split_once("\"executable\":\"")?;
        rest.split_once('"').map(|(path, _)| PathBuf::from(path))
    });
    executable.ok_or_else(|| Error::Guest(format!("{} has no test program", CRATE.0)))
}

/// Where cargo keeps the crate's source: an otherwise empty package that depends on it has it fetched.
fn registry_source() -> Result<PathBuf, Error> {
    let dir = guest_dir().join("fetch-crate");
    at(&dir, std::fs::create_dir_all(dir.join("src")))?;
    let manifest = dir.join("Cargo.toml");
    let text = format!(
        "[package]\nname = \"fetch-crate\"\nedition = \"2024\"\n[dependencies]\n{} = \"={}\"\n[workspace]\n",
        CRATE.0, CRATE.1
    );
    at(&manifest, std::fs::write(&manifest, text))?;
    at(&dir, std::fs::write(dir.join("src/lib.rs"), ""))?;
    let mut cargo = Command::new("cargo");
    cargo.args(["metadata", "--format-version", "1", "--manifest-path"]).arg(&manifest);
    let metadata = xtask::run(cargo.current_dir(&dir))?;
    let marker = format!("{}-{}/Cargo.toml", CRATE.0, CRATE.1);
    let path = metadata.split('"').find(|text| text.ends_with(&marker)).map(PathBuf::from);
    path.and_then(|path| path.parent().map(Path::to_path_buf))
        .ok_or_else(|| Error::Guest(format!("cargo did not say where {} is", CRATE.0)))
}

/// Copies the source, as a workspace of its own.
fn copy_tree(from: &Path, to: &Path) -> Result<(), Error> {
    let _ = std::fs::remove_dir_all(to);
    xtask::run(Command::new("cp").arg("-r").arg(from).arg(to))?;
    let manifest = to.join("Cargo.toml");
    let text = at(&manifest, std::fs::read_to_string(&manifest))?;
    at(&manifest, std::fs::write(&manifest, format!("{text}\n[workspace]\n")))
}

/// The results in what the test program prints: `test NAME ... ok`, `FAILED` or `ignored`. A line that was never
/// finished is the test that the program died in.
fn parse(text: &str) -> Results {
    let mut results = Results::new();
    for line in text.lines() {
        let Some((name, said)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) else {
            continue;
        };
        let outcome = match said {
            "ok" => Outcome::pass(),
            said if said.starts_with("ignored") => Outcome::skip("ignored by the crate"),
            "FAILED" => Outcome::fail(&panic_of(text, name)),
            _ => Outcome::fail("the program died in it"),
        };
        results.insert(name.trim_end_matches(" - should panic").to_string(), outcome);
    }
    results
}

/// The second line of a failed test's output: the panic's message.
fn panic_of(text: &str, name: &str) -> String {
    let section = text.split_once(&format!("---- {name} stdout ----")).map_or("", |(_, rest)| rest);
    let mut lines = section.lines().skip_while(|line| !line.contains("panicked at"));
    let place =
        lines.next().unwrap_or_default().rsplit("panicked at ").next().unwrap_or_default().to_string();
    format!("{place} {}", lines.next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdicts::Verdict;

    #[test]
    fn results_are_read_from_the_output() {
        let text = "test a::b ... ok\ntest c ... FAILED\ntest d - should panic ... ok\ntest e ... \n\n---- c stdout ----\n\
                    thread 'c' panicked at src/x.rs:1:2:\nno such thing\n";
        let results = parse(text);
        let of = |name: &str| (results[name].verdict, results[name].reason.as_str());
        assert_eq!(of("a::b"), (Verdict::Pass, ""));
        assert_eq!(of("c"), (Verdict::Fail, "src/x.rs:1:2: no such thing"));
        assert_eq!(of("d").0, Verdict::Pass);
        assert_eq!(of("e"), (Verdict::Fail, "the program died in it"));
    }
}
