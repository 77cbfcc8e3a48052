//! `cargo xtask selftests`: the Linux kernel's own KVM tests (tools/testing/selftests/kvm), built from Debian's source
//! package and run under `ring3 run`. What each is expected to give is the table of docs/kvm-selftests.md.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use xtask::{Error, at, guest_dir, packages, root, target_dir};

/// Options of `cargo xtask selftests`.
#[derive(Args)]
pub(crate) struct Options {
    /// Only tests whose name contains one of these.
    only: Vec<String>,
    /// Tests that run at the same time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Seconds that a test may take (the kernel's own harness gives 120).
    #[arg(long, default_value_t = 240)]
    limit: u64,
    /// Write the results into docs/kvm-selftests.md instead of comparing with it.
    #[arg(long)]
    update: bool,
}

/// Lines between which docs/kvm-selftests.md has the table.
const TABLE: (&str, &str) = ("<!-- results -->\n", "<!-- end of results -->\n");

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Pass,
    Skip,
    Fail,
}

/// A test's verdict with the reason that it gave.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outcome {
    verdict: Verdict,
    reason: String,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Pass => "pass",
            Verdict::Skip => "skip",
            Verdict::Fail => "fail",
        })
    }
}

/// What is expected, or what came out, by test.
type Results = BTreeMap<String, Outcome>;

pub(crate) fn run(options: &Options) -> Result<(), Error> {
    let dir = build()?;
    xtask::run(Command::new("cargo").args([
        "build",
        "--release",
        "--package",
        "ring3",
        "--package",
        "preload",
    ]))?;
    let doc = root().join("docs/kvm-selftests.md");
    let text = at(&doc, std::fs::read_to_string(&doc))?;
    let expected = parse(&text);
    let wanted =
        |name: &String| options.only.is_empty() || options.only.iter().any(|o| name.contains(o.as_str()));
    let names: Vec<String> = programs(&dir)?.into_iter().filter(wanted).collect();
    let results = run_all(&dir, names, options)?;
    let mut sums = [0; 3];
    for (name, outcome) in &results {
        sums[outcome.verdict.clone() as usize] += 1;
        println!("{name:<48} {:<5} {}", outcome.verdict, outcome.reason);
    }
    println!("\n{} passed, {} failed, {} skipped", sums[0], sums[2], sums[1]);
    if options.update {
        let mut all = expected;
        all.extend(results);
        return at(&doc, std::fs::write(&doc, render(&text, &all)));
    }
    let missing = expected.keys().find(|name| options.only.is_empty() && !results.contains_key(*name));
    if let Some(name) = missing {
        return Err(Error::Guest(format!("{name} is in docs/kvm-selftests.md but was not built")));
    }
    compare(&expected, &results)
}

/// Fails unless every test gave what the table says.
fn compare(expected: &Results, results: &Results) -> Result<(), Error> {
    let verdict = |of: Option<&Outcome>| of.map_or("nothing".into(), |o| o.verdict.to_string());
    let differ: Vec<String> = (results.iter())
        .filter(|(name, outcome)| expected.get(*name).map(|e| &e.verdict) != Some(&outcome.verdict))
        .map(|(name, outcome)| {
            let (was, is) = (verdict(expected.get(name)), verdict(Some(outcome)));
            format!("{name}: {is} ({}), docs/kvm-selftests.md says {was}", outcome.reason)
        })
        .collect();
    if differ.is_empty() {
        return Ok(());
    }
    Err(Error::Guest(format!(
        "{}\nMend what got worse; `cargo xtask selftests --update` writes down what got better",
        differ.join("\n")
    )))
}

/// Builds the tests once and gives their directory.
fn build() -> Result<PathBuf, Error> {
    packages::require(&[("cc", "gcc"), ("make", "make"), ("xz", "xz-utils")])?;
    let source = packages::kernel_source()?;
    let dir = source.join("tools/testing/selftests/kvm");
    let done = dir.join(".ring3-built");
    if !done.exists() {
        eprintln!("building the kernel's KVM selftests");
        let headers = format!("KHDR_INCLUDES=-isystem {}", source.join("usr/include").display());
        xtask::run(Command::new("make").args(["-s", "headers"]).env("ARCH", "x86").current_dir(&source))?;
        let mut make = Command::new("make");
        make.args(["-s", "-j2", "-C"]).arg(&dir).arg(&headers).env("ARCH", "x86");
        xtask::run(&mut make)?;
        at(&done, std::fs::write(&done, ""))?;
    }
    Ok(dir)
}

/// The programs that the tests' Makefile lists for this architecture.
fn programs(dir: &Path) -> Result<Vec<String>, Error> {
    let makefile = dir.join("Makefile");
    let text = at(&makefile, std::fs::read_to_string(&makefile))?;
    let names = text.lines().filter_map(|line| {
        let (variable, value) = line.split_once('=')?;
        let variable = variable.trim().trim_end_matches('+').trim();
        matches!(variable, "TEST_GEN_PROGS_x86_64" | "TEST_GEN_PROGS_EXTENDED_x86_64").then(|| value.trim())
    });
    Ok(names.filter(|name| dir.join(name).is_file()).map(str::to_string).collect())
}

fn run_all(dir: &Path, names: Vec<String>, options: &Options) -> Result<Results, Error> {
    let logs = guest_dir().join("selftests");
    at(&logs, std::fs::create_dir_all(&logs))?;
    let style = ProgressStyle::with_template("{elapsed_precise} {pos} of {len}: {msg}");
    let bar = ProgressBar::new(names.len() as u64).with_style(style.unwrap_or(ProgressStyle::default_bar()));
    let (queue, results) = (Mutex::new(names.into_iter()), Mutex::new(Results::new()));
    let next = || queue.lock().ok().and_then(|mut names| names.next());
    let worker = || {
        while let Some(name) = next() {
            bar.set_message(name.clone());
            let outcome = run_one(dir, &name, &logs, Duration::from_secs(options.limit));
            if let Ok(mut results) = results.lock() {
                results.insert(name, outcome);
            }
            bar.inc(1);
        }
    };
    std::thread::scope(|scope| (0..options.jobs.max(1)).for_each(|_| drop(scope.spawn(worker))));
    bar.finish_and_clear();
    Ok(results.into_inner().unwrap_or_default())
}

fn run_one(dir: &Path, name: &str, logs: &Path, limit: Duration) -> Outcome {
    let log = logs.join(format!("{}.log", name.replace('/', "-")));
    let fail = |reason: String| Outcome { verdict: Verdict::Fail, reason };
    let (Ok(out), Ok(err)) = (File::create(&log), File::options().append(true).open(&log)) else {
        return fail(format!("{} cannot be written", log.display()));
    };
    let mut command = Command::new(target_dir().join("release/ring3"));
    command.args(["run", "--"]).arg(dir.join(name)).current_dir(dir);
    command.stdin(Stdio::null()).stdout(out).stderr(err);
    let status = xtask::guest::within(&mut command, limit);
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    match status {
        Err(error) => fail(error.to_string()),
        Ok(None) => fail(format!("not done after {} s", limit.as_secs())),
        Ok(Some(status)) => match status.code() {
            Some(0) => Outcome { verdict: Verdict::Pass, reason: String::new() },
            // KSFT_SKIP
            Some(4) => Outcome { verdict: Verdict::Skip, reason: skip_reason(&text) },
            _ => fail(format!("{status}: {}", fail_reason(&text))),
        },
    }
}

/// What a test that skips says of it.
fn skip_reason(log: &str) -> String {
    let said =
        log.lines().rev().find(|line| line.to_lowercase().contains("skip")).unwrap_or("no reason given");
    let text = said.split_once("SKIP").map_or(said, |(_, reason)| reason);
    cell(text.trim_start_matches([' ', '-', ':']))
}

/// The assertion that failed, or the last line.
fn fail_reason(log: &str) -> String {
    let said = log.lines().position(|line| line.contains("Test Assertion Failure"));
    let at = said.and_then(|at| log.lines().nth(at + 1)).or_else(|| log.lines().last()).unwrap_or_default();
    cell(at)
}

/// Text that fits into a cell of a Markdown table.
fn cell(text: &str) -> String {
    text.trim().replace('|', "\\|").chars().take(120).collect()
}

/// The table of the document.
fn parse(text: &str) -> Results {
    let rows =
        text.split_once(TABLE.0).and_then(|(_, rest)| rest.split_once(TABLE.1)).map_or("", |(rows, _)| rows);
    let row = |line: &str| {
        let line = line.replace("\\|", "\u{1}");
        let cells: Vec<String> = line.split('|').map(|c| c.trim().replace('\u{1}', "\\|")).collect();
        let [_, name, verdict, reason, _] = cells.as_slice() else { return None };
        let verdict = match verdict.as_str() {
            "pass" => Verdict::Pass,
            "skip" => Verdict::Skip,
            "fail" => Verdict::Fail,
            _ => return None,
        };
        Some((name.clone(), Outcome { verdict, reason: reason.clone() }))
    };
    rows.lines().filter_map(row).collect()
}

/// The document with `results` as its table.
fn render(text: &str, results: &Results) -> String {
    let count = |verdict| results.values().filter(|o| o.verdict == verdict).count();
    let (passed, skipped, failed) = (count(Verdict::Pass), count(Verdict::Skip), count(Verdict::Fail));
    let mut table = format!(
        "{passed} pass, {skipped} skip, {failed} fail.\n\n| test | result | reason |\n| --- | --- | --- |\n"
    );
    for (name, Outcome { verdict, reason }) in results {
        table += &format!("| {name} | {verdict} | {reason} |\n");
    }
    let (before, rest) = text.split_once(TABLE.0).unwrap_or((text, ""));
    let after = rest.split_once(TABLE.1).map_or("", |(_, after)| after);
    format!("{before}{}{table}{}{after}", TABLE.0, TABLE.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read_as_it_was_written() {
        let outcome = |verdict, reason: &str| Outcome { verdict, reason: reason.into() };
        let results = Results::from([
            ("a".to_string(), outcome(Verdict::Pass, "")),
            ("x/b".to_string(), outcome(Verdict::Skip, "one \\| two")),
            ("c".to_string(), outcome(Verdict::Fail, "why")),
        ]);
        let text = format!("before\n{}old\n{}after\n", TABLE.0, TABLE.1);
        let rendered = render(&text, &results);
        assert_eq!(parse(&rendered), results);
        assert!(rendered.starts_with("before\n") && rendered.ends_with("after\n"));
        assert!(compare(&results, &results).is_ok());
        let worse = Results::from([("a".to_string(), outcome(Verdict::Fail, "broke"))]);
        assert!(compare(&results, &worse).unwrap_err().to_string().contains("a: fail (broke)"));
    }

    #[test]
    fn reasons_are_found_in_logs() {
        assert_eq!(
            skip_reason("x\n1..0 # SKIP - Requirement not met: a || b\n"),
            "Requirement not met: a \\|\\| b"
        );
        assert_eq!(
            fail_reason("==== Test Assertion Failure ====\n  a.c:1: x == y\n  pid=1\n"),
            "a.c:1: x == y"
        );
    }
}
