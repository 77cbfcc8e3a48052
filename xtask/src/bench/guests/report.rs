//! The tables.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::launch::Launcher;
use super::results::{BARS, Bar, Check, Clock, Measure, Results, geomean};

/// What was measured on what.
pub(super) struct About<'a> {
    /// `uname -r` of the guests.
    pub(super) kernel: &'a str,
    /// The host's processor.
    pub(super) cpu: &'a str,
    /// Amounts of work, by launcher.
    pub(super) scales: &'a str,
}

/// Three digits, or more before the point.
fn digits(value: f64) -> String {
    let decimals = match value {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

fn or_dash(value: Option<f64>) -> String {
    value.map_or("-".into(), digits)
}

/// All of it, as Markdown.
pub(super) fn report(results: &Results, about: &About) -> String {
    let count = results.runs.first().map_or(0, |(_, runs)| runs.len());
    let mut out = format!(
        "{}, guest kernel {}, medians of {count} interleaved runs. Work per mille: {}.\n\n",
        about.cpu, about.kernel, about.scales
    );
    out += &benchmarks(results);
    out += &groups(results);
    out += &notes(results);
    out
}

/// Launchers that boot guests.
fn guests(results: &Results) -> Vec<Launcher> {
    results.runs.iter().map(|(launcher, _)| *launcher).filter(|&l| l != Launcher::Native).collect()
}

/// TCG in the settings that ring3 is compared with.
fn rivals(results: &Results) -> Vec<Launcher> {
    let ours = !results.of(Launcher::Ring3).is_empty();
    guests(results).into_iter().filter(|launcher| ours && launcher.is_tcg()).collect()
}

fn row(out: &mut String, cells: &[String]) {
    let _ = writeln!(out, "| {} |", cells.join(" | "));
}

fn head(out: &mut String, titles: &[String], texts: &[usize]) {
    row(out, titles);
    let rule = |at: usize| if texts.contains(&at) { "---" } else { "---:" }.to_string();
    row(out, &(0..titles.len()).map(rule).collect::<Vec<_>>());
}

/// The table by benchmark: time of a unit, slow-downs, ring3's speed.
fn benchmarks(results: &Results) -> String {
    let mut out = String::new();
    let native = !results.of(Launcher::Native).is_empty();
    let mut titles = vec!["benchmark".into(), "unit".into()];
    titles.extend(results.runs.iter().map(|(launcher, _)| format!("{}, us", launcher.title())));
    if native {
        titles.extend(guests(results).iter().map(|l| format!("{} / native", l.title())));
    }
    titles.extend(rivals(results).iter().map(|l| format!("ring3's speed, of {}'s", l.title())));
    head(&mut out, &titles, &[0, 1]);
    let empty = out.len();
    for name in &results.names {
        let ran = |(launcher, _): &(Launcher, _)| results.unit(*launcher, name, Clock::Cpu).is_some();
        if !results.runs.iter().any(ran) {
            continue;
        }
        let mut cells = vec![name.clone(), unit(results, name)];
        for (launcher, _) in &results.runs {
            cells.push(time(results, *launcher, name));
        }
        if native {
            cells.extend(guests(results).iter().map(|&l| or_dash(results.slowdown(l, name))));
        }
        cells.extend(rivals(results).iter().map(|&l| or_dash(results.speed(l, name))));
        row(&mut out, &cells);
    }
    if out.len() == empty { String::new() } else { out }
}

/// What a unit of a benchmark is.
fn unit(results: &Results, name: &str) -> String {
    let mut figures = results.runs.iter().flat_map(|(_, runs)| runs).filter_map(|run| run.figures.get(name));
    figures.next().map_or(String::new(), |figures| figures.unit.clone())
}

/// Microseconds of a unit; a star if by the guest's clock where the others are CPU time.
fn time(results: &Results, launcher: Launcher, name: &str) -> String {
    let short = launcher == Launcher::Native && results.clock(name) == Clock::Guest;
    let clock = if short || results.smp { Clock::Guest } else { Clock::Cpu };
    let star = if short && !results.smp { "*" } else { "" };
    results.unit(launcher, name, clock).map_or("-".into(), |unit| format!("{}{star}", digits(unit * 1e6)))
}

/// The table by group: geometric means, and the bars.
fn groups(results: &Results) -> String {
    let mut out = String::from("\n");
    let rivals = rivals(results);
    let guests = guests(results);
    let mut titles = vec!["group".to_string()];
    titles.extend(guests.iter().map(|l| format!("{} / native", l.title())));
    titles.extend(rivals.iter().map(|l| format!("ring3's speed, of {}'s", l.title())));
    titles.extend(["bar", "met", "worst"].map(String::from));
    let last = titles.len() - 1;
    head(&mut out, &titles, &[0, last - 2, last - 1, last]);
    let empty = out.len();
    for bar in BARS {
        let measured = results.measured(bar, Launcher::Tcg);
        let mut cells = vec![bar.title.to_string()];
        let slow = |l: Launcher| results.members(bar.list, |name| results.slowdown(l, name));
        cells.extend(guests.iter().map(|&l| or_dash(mean(&slow(l)))));
        let boot = |l: Launcher| Some(results.boot(l)? / results.boot(Launcher::Ring3)?);
        let speed = |l: Launcher| match bar.measure {
            Measure::Boot => results.members(bar.list, |_| boot(l)),
            _ => results.members(bar.list, |name| results.speed(l, name)),
        };
        cells.extend(rivals.iter().map(|&l| or_dash(mean(&speed(l)))));
        if cells[1..].iter().all(|cell| cell == "-") {
            continue;
        }
        let met = match mean(&measured) {
            Some(value) if bar.met(value) => "yes".into(),
            Some(value) => format!("no: {}", digits(value)),
            None => "-".into(),
        };
        cells.extend([bar_text(bar), met, worst(bar, &measured)]);
        row(&mut out, &cells);
    }
    if out.len() == empty { String::new() } else { out }
}

fn mean(members: &[(&str, f64)]) -> Option<f64> {
    geomean(members.iter().map(|(_, value)| *value))
}

fn bar_text(bar: &Bar) -> String {
    match bar.measure {
        Measure::Speed => format!("at least {} times TCG's speed", bar.bar),
        Measure::Slowdown => format!("at most {} times native's time", bar.bar),
        Measure::Boot => format!("at most {} of TCG's CPU time", bar.bar),
    }
}

/// The member that is farthest on the wrong side.
fn worst(bar: &Bar, measured: &[(&str, f64)]) -> String {
    let sign = if bar.measure == Measure::Speed { 1.0 } else { -1.0 };
    let worst = measured.iter().min_by(|a, b| (sign * a.1).total_cmp(&(sign * b.1)));
    match worst {
        Some((name, value)) if measured.len() > 1 => format!("{name} {}", digits(*value)),
        _ => "-".into(),
    }
}

/// What the tables do not say.
fn notes(results: &Results) -> String {
    let mut out = String::from("\n");
    let clock = if results.smp { "elapsed time by the guest's clock" } else { "CPU time of the process" };
    let _ = writeln!(out, "Times are {clock}, of a unit of work; groups have geometric means.");
    let timed = |name: &&String| {
        results.clock(name) == Clock::Guest && results.slowdown(Launcher::Native, name).is_some()
    };
    if !results.smp && results.names.iter().any(|name| timed(&name)) {
        out += "* Native takes less than 20 ms: it is compared by the guest's clock, not by CPU time.\n";
    }
    out += &boot(results);
    out += &checks(results);
    for (launcher, runs) in &results.runs {
        let failed: BTreeSet<&String> = runs.iter().flat_map(|run| &run.failed).collect();
        for text in failed {
            let _ = writeln!(out, "{}: {text}", launcher.title());
        }
        let skipped: BTreeSet<String> =
            runs.iter().flat_map(|run| &run.skipped).map(|(name, why)| format!("{name} ({why})")).collect();
        if !skipped.is_empty() {
            let skipped = skipped.into_iter().collect::<Vec<_>>().join(", ");
            let _ = writeln!(out, "Not run by {}: {skipped}.", launcher.title());
        }
    }
    out
}

/// CPU time to /init, and memory.
fn boot(results: &Results) -> String {
    let mut out = String::new();
    let text = |launcher: &Launcher| Some(format!("{} {:.3} s", launcher.title(), results.boot(*launcher)?));
    let boots: Vec<String> = guests(results).iter().filter_map(text).collect();
    if !boots.is_empty() {
        let _ = writeln!(out, "Boot to /init, CPU time from process start: {}.", boots.join(", "));
    }
    let resident = |value: fn((u64, u64)) -> u64| {
        results.median(Launcher::Ring3, |run| run.resident.map(|mib| value(mib) as f64))
    };
    if let (Some(all), Some(guest)) = (resident(|mib| mib.0), resident(|mib| mib.1)) {
        let _ = writeln!(
            out,
            "Resident memory of ring3 at the end: {all:.0} MiB, of which {guest:.0} MiB are the guest's."
        );
    }
    out
}

/// Which sums were compared, and which differ.
fn checks(results: &Results) -> String {
    let mut out = String::new();
    let mut same = 0;
    for name in &results.names {
        match results.check(name) {
            Check::Same => same += 1,
            Check::Alone => {}
            Check::Differ(sums) => {
                let _ = writeln!(out, "DIFFERENT SUMS of {name} at equal work: {sums}");
            }
        }
    }
    if same > 0 {
        let _ = writeln!(out, "Sums of {same} benchmarks are the same wherever the amount of work was.");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::protocol::{Figures, Run};
    use super::*;

    fn run(cpu: f64, check: &str) -> Run {
        let figures = Figures { cpu, time: cpu, units: 100.0, unit: "pass".into(), check: check.into() };
        Run { figures: [("int.list".to_string(), figures)].into(), boot: Some(cpu), ..Run::default() }
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([0.123, 1.0, 12.34, 99.96, 1234.5].map(digits), ["0.12", "1.00", "12.3", "100", "1234"]);
    }

    #[test]
    fn tables_have_ratios_and_bars() {
        let runs = vec![
            (Launcher::Native, vec![run(1.0, "a")]),
            (Launcher::Tcg, vec![run(8.0, "a")]),
            (Launcher::Ring3, vec![run(4.0, "b")]),
        ];
        let results = Results { runs, names: vec!["int.list".into()], smp: false };
        let text = report(&results, &About { kernel: "6.12", cpu: "a CPU", scales: "native 300" });
        let line = "| int.list | pass | 10000 | 80000 | 40000 | 8.00 | 4.00 | 2.00 |";
        assert!(text.contains(line), "{text}");
        let line =
            "| integer and branches | 8.00 | 4.00 | 2.00 | at least 4 times TCG's speed | no: 2.00 | - |";
        assert!(text.contains(line), "{text}");
        assert!(text.contains("DIFFERENT SUMS of int.list"), "{text}");
    }
}
