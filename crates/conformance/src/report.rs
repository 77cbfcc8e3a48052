//! Reports: one line for a difference, one table for coverage.

use std::collections::BTreeMap;
use std::fmt::Write;

use iced_x86::{Code, Formatter, IntelFormatter};

use crate::bench::Outcome;
use crate::capabilities::Capabilities;
use crate::forms::{Class, Form};
use crate::generate::Case;
use crate::run::Summary;
use crate::vendor::ROWS;

/// Counts for one form.
#[derive(Clone, Copy, Debug)]
pub struct FormResult {
    /// The form.
    pub code: Code,
    /// Cases run.
    pub cases: u64,
    /// Cases that completed on the host.
    pub completed: u64,
    /// Cases that faulted on the host.
    pub faulted: u64,
    /// Cases in which undefined bits differ.
    pub undefined: u64,
    /// Cases with a difference.
    pub different: u64,
    /// Cases that differ, but only as this host's maker is known to ([`crate::vendor`]).
    pub excepted: u64,
}

impl FormResult {
    /// Nothing run yet.
    pub fn new(code: Code) -> FormResult {
        FormResult { code, cases: 0, completed: 0, faulted: 0, undefined: 0, different: 0, excepted: 0 }
    }

    /// As six numbers.
    pub fn to_line(&self) -> String {
        let FormResult { cases, completed, faulted, undefined, different, excepted, .. } = self;
        format!("{cases} {completed} {faulted} {undefined} {different} {excepted}")
    }
}

/// Takes a worker's output into `summary`: lines `F index counts`, `E row count` and `T text`.
pub fn merge(summary: &mut Summary, text: &str) {
    for line in text.lines() {
        if let Some(told) = line.strip_prefix("T ") {
            summary.told.push(told.to_owned());
        } else if let Some(counts) = line.strip_prefix("F ") {
            let numbers: Vec<u64> = counts.split(' ').filter_map(|n| n.parse().ok()).collect();
            if let [index, cases, completed, faulted, undefined, different, excepted] = numbers[..]
                && let Some(result) = summary.forms.get_mut(index as usize)
            {
                *result = FormResult { cases, completed, faulted, undefined, different, excepted, ..*result };
            }
        } else if let Some(counts) = line.strip_prefix("E ") {
            let numbers: Vec<u64> = counts.split(' ').filter_map(|n| n.parse().ok()).collect();
            if let [row, cases] = numbers[..] {
                *summary.excepted.entry(row as usize).or_default() += cases;
            }
        }
    }
}

/// The bytes of `case` in hexadecimal.
pub fn hex(case: &Case) -> String {
    case.bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The instruction in Intel's syntax.
pub fn disassemble(case: &Case) -> String {
    let mut text = String::new();
    IntelFormatter::new().format(&case.instruction, &mut text);
    text
}

/// One line: reproducer, bytes, disassembly, differences as `name host / guest`.
pub fn tell(seed: u64, number: u64, case: &Case, outcome: &Outcome) -> String {
    format!(
        "--seed {seed} --case {:?}:{number} [{}] {} at {:#x}: {}",
        case.instruction.code(),
        hex(case),
        disassemble(case),
        case.machine.rip,
        outcome.difference.defined.join("; "),
    )
}

#[derive(Default)]
struct Group {
    offered: usize,
    tested: usize,
    fault_only: usize,
    guests: usize,
    cases: u64,
    different: u64,
}

/// The coverage table by extension group, then what is not compared and why.
pub fn coverage(forms: &[Form], summary: &Summary, host: &Capabilities) -> String {
    let results: BTreeMap<usize, &FormResult> = summary.forms.iter().map(|r| (r.code as usize, r)).collect();
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    let mut reasons: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut untested = Vec::new();
    let mut never_completed = Vec::new();
    let mut always_excepted = Vec::new();
    for form in forms.iter().filter(|f| !matches!(f.class, Class::OtherMode | Class::NotOffered)) {
        let group = groups.entry(form.group()).or_default();
        group.offered += 1;
        if let Class::Guests(reason) = form.class {
            group.guests += 1;
            reasons.entry(reason).or_default().push(format!("{:?}", form.code));
            continue;
        }
        let Some(result) = results.get(&(form.code as usize)) else { continue };
        group.cases += result.cases;
        group.different += result.different;
        if result.cases > 0 && result.excepted == result.cases {
            always_excepted.push(format!("{:?}", form.code));
        }
        match form.class {
            _ if result.cases == 0 => untested.push(format!("{:?}", form.code)),
            Class::FaultCompared => group.fault_only += 1,
            _ => {
                group.tested += 1;
                if result.completed == 0 {
                    never_completed.push(format!("{:?}", form.code));
                }
            }
        }
    }
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{:<34} {:>7} {:>8} {:>11} {:>7} {:>9} {:>9}",
        "extension", "offered", "compared", "fault at 3", "guests", "cases", "different"
    );
    let mut all = Group::default();
    for (name, g) in &groups {
        row(&mut text, name, g);
        all.offered += g.offered;
        all.tested += g.tested;
        all.fault_only += g.fault_only;
        all.guests += g.guests;
        all.cases += g.cases;
        all.different += g.different;
    }
    row(&mut text, "all", &all);
    for (reason, codes) in reasons {
        let _ =
            writeln!(text, "\nnot comparable here ({} forms): {reason}\n  {}", codes.len(), codes.join(" "));
    }
    for what in host.not_comparable() {
        let _ = writeln!(text, "\nnot comparable here: {what}");
    }
    for (row, cases) in &summary.excepted {
        if let Some(row) = ROWS.get(*row) {
            let _ = writeln!(text, "\nthis host's maker differs ({cases} cases): {}", row.what);
        }
    }
    list(&mut text, "offered but untested", &untested);
    list(&mut text, "compared, but every case is one in which this host's maker differs", &always_excepted);
    list(&mut text, "compared, but every case faulted", &never_completed);
    text
}

fn row(text: &mut String, name: &str, g: &Group) {
    let _ = writeln!(
        text,
        "{name:<34} {:>7} {:>8} {:>11} {:>7} {:>9} {:>9}",
        g.offered, g.tested, g.fault_only, g.guests, g.cases, g.different
    );
}

fn list(text: &mut String, title: &str, items: &[String]) {
    if !items.is_empty() {
        let _ = writeln!(text, "\n{title} ({}): {}", items.len(), items.join(" "));
    }
}

/// Forms of which the model offers, this run compares, and no case could be made.
pub fn untested(summary: &Summary) -> usize {
    summary.forms.iter().filter(|r| r.cases == 0).count()
}
