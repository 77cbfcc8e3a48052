//! `ring3 mitigations`: what a guest will be told, will say of itself, and will cost, on a machine that need not be at hand.

use std::fmt::Write as _;

use hypervisor::HostParams;
use hypervisor::mitigations::command_line::FbClearDis;
use hypervisor::mitigations::entry::Costs;
use hypervisor::mitigations::report::{EXITS, Report, SLICE, Schedule, report};
use silicon::model::CpuModel;
use silicon::model::speculation::arch_cap;
use silicon::model::speculation::{PARTS, SpeculationRow};

use crate::cli::MitigationsArguments;

/// Columns of the text.
const WIDTH: usize = 110;

/// The table for one part, or the list of parts.
pub(crate) fn show(arguments: &MitigationsArguments) -> String {
    let mut line = arguments.host.mitigations.clone();
    line.part = arguments.part.or(line.part);
    match line.part {
        None if arguments.cpu.is_none() && arguments.host == HostParams::default() => list(),
        part => {
            let guest = arguments.cpu.clone().unwrap_or_else(|| guest_of(part.map(|part| part.0)));
            page(part.map(|part| part.0), &guest, &report(&guest, &line))
        }
    }
}

/// The model of a guest that has the host's own processor.
fn guest_of(part: Option<&SpeculationRow>) -> CpuModel {
    part.map_or_else(CpuModel::default, |part| {
        CpuModel::default().numbered(part.model, *part.steppings.end())
    })
}

/// All parts, a line each.
fn list() -> String {
    let mut text = String::from("Hosts that can be asked about, with the default command line:\n\n");
    let _ = writeln!(text, "  {:<16} {:>5}  {:<12} {:<44} bugs", "part", "model", "L1D flush", "VERW at");
    for row in PARTS {
        let line = HostParams::parse(&format!("ring3.part={}", row.name)).unwrap_or_default().mitigations;
        let report = report(&guest_of(Some(row)), &line);
        let (name, model, flush, verw) = (row.name, row.model, report.flush.name(), report.at_entry[0].1);
        let bugs = row.bugs.names().count();
        let _ = writeln!(text, "  {name:<16} {model:>5}  {flush:<12} {verw:<44} {bugs:>4}");
    }
    text + "\nNext: ring3 mitigations skylake-sp --host 'mds=off l1tf=full', or ring3 mitigations --help\n"
}

/// Everything about guests on one host.
fn page(part: Option<&SpeculationRow>, guest: &CpuModel, report: &Report) -> String {
    let mut text = String::new();
    let section = |text: &mut String, title: &str| {
        let _ = writeln!(text, "{}{title}", if text.is_empty() { "" } else { "\n" });
    };
    section(&mut text, "Host");
    let mut bugs: Vec<&str> = report.hardware.bugs.names().collect();
    if bugs.is_empty() {
        bugs.push("none");
    }
    row(&mut text, "processor", part.map_or("one that does not speculate", |part| part.name));
    words(&mut text, "bugs", &bugs);
    capabilities(&mut text, "10AH", report.hardware.arch_capabilities);
    row(&mut text, "SMT", if report.selected.nosmt { "off: a mitigation asks for it" } else { "as it is" });
    section(&mut text, "What guests are told");
    capabilities(&mut text, "10AH", report.supported);
    let (host, told) = (report.hardware.arch_capabilities, report.supported);
    capabilities(&mut text, "made up", told & !host);
    capabilities(&mut text, "held back", host & !told);
    let (model, stepping) = guest.numbers();
    let title = format!(
        "What a Linux 6.12 guest of model {model}, stepping {stepping} will say (/sys/devices/system/cpu/vulnerabilities)"
    );
    section(&mut text, &title);
    for (file, says) in &report.vulnerabilities {
        wrapped(&mut text, 26, file, says.split_inclusive("; "));
    }
    section(&mut text, "What each VM entry does");
    report.at_entry.iter().for_each(|(what, when)| row(&mut text, what, when));
    costs(&mut text, &report.costs);
    text
}

fn row(text: &mut String, name: &str, value: &str) {
    let _ = writeln!(text, "  {name:<14} {value}");
}

fn words(text: &mut String, name: &str, words: &[&str]) {
    let spaced: Vec<String> = words.iter().map(|word| format!("{word} ")).collect();
    wrapped(text, 14, name, spaced.iter().map(String::as_str));
}

/// A name and pieces of text, on as many lines as they need.
fn wrapped<'a>(text: &mut String, column: usize, name: &str, pieces: impl Iterator<Item = &'a str>) {
    let mut line = format!("  {name:<column$} ");
    let indent = line.len();
    for piece in pieces {
        if line.len() > indent && line.len() + piece.len() > WIDTH {
            let _ = writeln!(text, "{}", line.trim_end());
            line = " ".repeat(indent);
        }
        line += piece;
    }
    let _ = writeln!(text, "{}", line.trim_end());
}

fn capabilities(text: &mut String, name: &str, value: u64) {
    let names = arch_cap::names(value);
    let mut all = vec![format!("{value:#x}")];
    all.extend(names);
    words(text, name, &all.iter().map(String::as_str).collect::<Vec<_>>());
}

/// RDMSRs and WRMSRs of IA32_MCU_OPT_CTRL, and modelled cycles of all that is done, per exit.
fn costs(text: &mut String, schedules: &[Schedule]) {
    let name = |policy| match policy {
        FbClearDis::Upstream => "upstream",
        FbClearDis::Load => "load",
        FbClearDis::Cached => "cached",
    };
    let _ = writeln!(
        text,
        "\nWhat it costs per exit: reads + writes of IA32_MCU_OPT_CTRL, modelled cycles of everything above\n\
         ({EXITS} exits, turns of {SLICE}; columns: ring3.fb_clear_dis=)"
    );
    let _ = write!(text, "  {:<36}", "");
    if let Some(first) = schedules.first() {
        first.costs.iter().for_each(|(policy, _)| {
            let _ = write!(text, "{:>24}", name(*policy));
        });
    }
    for schedule in schedules {
        let _ = write!(text, "\n  {:<36}", schedule.name);
        for (_, costs) in &schedule.costs {
            let _ = write!(text, "{:>24}", per_exit(costs));
        }
    }
    text.push('\n');
}

fn per_exit(costs: &Costs) -> String {
    let each = |count: u64| count as f64 / f64::from(EXITS);
    format!("{:.2} + {:.2}, {:.0}", each(costs.msr_reads), each(costs.msr_writes), each(costs.cycles()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    use crate::cli::{Arguments, Command};

    fn shown(arguments: &[&str]) -> String {
        let all = ["ring3", "mitigations"].iter().chain(arguments);
        match Arguments::try_parse_from(all).unwrap().command {
            Command::Mitigations(arguments) => show(&arguments),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ac_the_list_and_the_page() {
        let list = shown(&[]);
        assert!(PARTS.iter().all(|row| list.contains(row.name)), "{list}");
        let page = shown(&["ice-lake-sp", "--host", "mmio_stale_data=off"]);
        assert!(page.contains("guest of model 106"), "{page}");
        assert!(page.lines().all(|line| line.len() <= WIDTH + 4), "{page}");
        assert!(page.contains("1.00 + 2.00, 600"), "{page}");
        let unaffected = shown(&["--cpu", "skylake"]);
        assert!(unaffected.contains("does not speculate") && unaffected.contains("guest of model 85"));
    }

    #[test]
    fn ac_an_unknown_part_is_told() {
        let error = Arguments::try_parse_from(["ring3", "mitigations", "zen"]).unwrap_err().to_string();
        assert!(error.contains("cascade-lake"), "{error}");
    }
}
