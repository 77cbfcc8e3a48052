//! Tables of test results in documents: what is expected of foreign test suites, test by test.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use xtask::{Error, at};

/// Lines between which a document has its table.
const TABLE: (&str, &str) = ("<!-- results -->\n", "<!-- end of results -->\n");

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    Skip,
    Fail,
}

/// A test's verdict with the reason that it gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) verdict: Verdict,
    pub(crate) reason: String,
}

impl Outcome {
    /// A test that failed, and what it said last.
    pub(crate) fn fail(reason: &str) -> Outcome {
        Outcome { verdict: Verdict::Fail, reason: cell(reason) }
    }

    /// A test that found something missing.
    pub(crate) fn skip(reason: &str) -> Outcome {
        Outcome { verdict: Verdict::Skip, reason: cell(reason) }
    }

    /// A test that passed.
    pub(crate) fn pass() -> Outcome {
        Outcome { verdict: Verdict::Pass, reason: String::new() }
    }
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
pub(crate) type Results = BTreeMap<String, Outcome>;

/// The table of `doc`.
pub(crate) fn expected(doc: &Path) -> Result<Results, Error> {
    Ok(parse(&at(doc, std::fs::read_to_string(doc))?))
}

/// Prints the results, and compares them with the table of `doc` or (`update`) writes them there. `complete`: every
/// test of the table was to run.
pub(crate) fn conclude(doc: &Path, results: Results, update: bool, complete: bool) -> Result<(), Error> {
    for (name, outcome) in &results {
        println!("{name:<52} {:<5} {}", outcome.verdict, outcome.reason);
    }
    println!("\n{}", sums(&results));
    let text = at(doc, std::fs::read_to_string(doc))?;
    let mut expected = parse(&text);
    if update {
        if complete {
            expected.clear();
        }
        expected.extend(results);
        return at(doc, std::fs::write(doc, render(&text, &expected)));
    }
    let missing = expected.keys().find(|name| complete && !results.contains_key(*name));
    if let Some(name) = missing {
        return Err(Error::Guest(format!("{name} is in {} but did not run", doc.display())));
    }
    compare(&expected, &results)
}

fn sums(results: &Results) -> String {
    let count = |verdict| results.values().filter(|o| o.verdict == verdict).count();
    let (passed, failed, skipped) = (count(Verdict::Pass), count(Verdict::Fail), count(Verdict::Skip));
    format!("{passed} passed, {failed} failed, {skipped} skipped")
}

/// Fails unless every test gave what the table says.
fn compare(expected: &Results, results: &Results) -> Result<(), Error> {
    let verdict = |of: Option<&Outcome>| of.map_or("nothing".into(), |o| o.verdict.to_string());
    let differ: Vec<String> = (results.iter())
        .filter(|(name, outcome)| expected.get(*name).map(|e| &e.verdict) != Some(&outcome.verdict))
        .map(|(name, outcome)| {
            let (was, is) = (verdict(expected.get(name)), verdict(Some(outcome)));
            format!("{name}: {is} ({}), where the table says {was}", outcome.reason)
        })
        .collect();
    if differ.is_empty() {
        return Ok(());
    }
    let advice = "Mend what got worse; with --update what got better is written into the table";
    Err(Error::Guest(format!("{}\n{advice}", differ.join("\n"))))
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
    let mut table = format!("{}.\n\n| test | result | reason |\n| --- | --- | --- |\n", sums(results));
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
        let results = Results::from([
            ("a".to_string(), Outcome::pass()),
            ("x/b".to_string(), Outcome::skip("one | two")),
            ("c".to_string(), Outcome::fail("why")),
        ]);
        let text = format!("before\n{}old\n{}after\n", TABLE.0, TABLE.1);
        let rendered = render(&text, &results);
        assert_eq!(parse(&rendered), results);
        assert!(rendered.starts_with("before\n") && rendered.ends_with("after\n"));
        assert!(compare(&results, &results).is_ok());
        let worse = Results::from([("a".to_string(), Outcome::fail("broke"))]);
        assert!(compare(&results, &worse).unwrap_err().to_string().contains("a: fail (broke)"));
    }
}
