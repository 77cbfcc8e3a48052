//! What the workloads say (`guests/bench/main.c`), and what a run comes to.

use std::collections::BTreeMap;

/// A line that means something.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Line<'a> {
    /// The program has started.
    Init,
    /// A workload begins.
    Begin(&'a str),
    /// It has ended.
    End(&'a str),
    /// A figure of it.
    Result { name: &'a str, field: &'a str, value: &'a str, unit: &'a str },
    /// It cannot be run, and why.
    Skip(&'a str, &'a str),
    /// Something went wrong.
    Fail(&'a str),
    /// That was all.
    Done,
}

impl<'a> Line<'a> {
    /// Reads a line of the console.
    pub(super) fn parse(text: &'a str) -> Option<Line<'a>> {
        let text = text.trim();
        // Firmware and kernel may have left the cursor anywhere.
        if text.contains("INIT tsc=") {
            return Some(Line::Init);
        }
        let words: Vec<&str> = text.split_whitespace().collect();
        match words[..] {
            ["BEGIN", name] => Some(Line::Begin(name)),
            ["END", name] => Some(Line::End(name)),
            ["RESULT", figure, value, unit] => {
                let (name, field) = figure.rsplit_once('.')?;
                Some(Line::Result { name, field, value, unit })
            }
            ["SKIP", name, why] => Some(Line::Skip(name, why)),
            ["FAIL", ..] => Some(Line::Fail(text)),
            ["DONE", ..] => Some(Line::Done),
            _ => None,
        }
    }
}

/// Figures of one workload in one run.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Figures {
    /// CPU seconds of the host.
    pub(super) cpu: f64,
    /// Seconds by the guest's clock.
    pub(super) time: f64,
    /// Units of work.
    pub(super) units: f64,
    /// What a unit is.
    pub(super) unit: String,
    /// The sum.
    pub(super) check: String,
}

/// What one run comes to.
#[derive(Clone, Debug, Default)]
pub(super) struct Run {
    /// CPU seconds from process start to /init.
    pub(super) boot: Option<f64>,
    /// By workload.
    pub(super) figures: BTreeMap<String, Figures>,
    /// What could not be run, and why.
    pub(super) skipped: BTreeMap<String, String>,
    /// What went wrong.
    pub(super) failed: Vec<String>,
    /// Resident MiB at the end: of the process, and of guest memory.
    pub(super) resident: Option<(u64, u64)>,
    /// CPU seconds when the workload that runs began.
    pub(super) begun: f64,
}

impl Run {
    /// Takes in a line, which came when `cpu` seconds had been used.
    pub(super) fn hear(&mut self, line: Line, cpu: f64) {
        match line {
            Line::Init => self.boot = Some(cpu),
            Line::Begin(_) => self.begun = cpu,
            Line::End(name) => self.of(name).cpu = cpu - self.begun,
            Line::Result { name, field, value, unit } => {
                let figures = self.of(name);
                match field {
                    "time" => figures.time = value.parse().unwrap_or_default(),
                    "check" => figures.check = value.to_string(),
                    "n" => {
                        figures.units = value.parse().unwrap_or_default();
                        figures.unit = unit.to_string();
                    }
                    _ => {}
                }
            }
            Line::Skip(name, why) => drop(self.skipped.insert(name.to_string(), why.to_string())),
            Line::Fail(text) => self.failed.push(text.to_string()),
            Line::Done => {}
        }
    }

    fn of(&mut self, name: &str) -> &mut Figures {
        self.figures.entry(name.to_string()).or_default()
    }

    /// Takes in another run with other workloads. The first one's way to /init counts: its image is the smaller one.
    pub(super) fn join(&mut self, other: Run) {
        self.boot = self.boot.or(other.boot);
        self.figures.extend(other.figures);
        self.skipped.extend(other.skipped);
        self.failed.extend(other.failed);
        self.resident = self.resident.max(other.resident);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_told_apart_from_what_the_kernel_says() {
        assert_eq!(Line::parse("\x1b[2J INIT tsc=123\r"), Some(Line::Init));
        assert_eq!(Line::parse("BEGIN int.list\r"), Some(Line::Begin("int.list")));
        assert_eq!(Line::parse("SKIP sys.pio guest-only"), Some(Line::Skip("sys.pio", "guest-only")));
        assert_eq!(Line::parse("DONE reboot"), Some(Line::Done));
        assert_eq!(Line::parse("FAIL mm.cow status b"), Some(Line::Fail("FAIL mm.cow status b")));
        assert_eq!(Line::parse("[    0.1] reboot: Restarting system"), None);
        assert_eq!(Line::parse("RESULT without a number"), None);
    }

    #[test]
    fn a_run_is_what_its_lines_say() {
        let text = "INIT tsc=1\nBEGIN int.list\nEND int.list\nRESULT int.list.time 0.250000 s\n\
                    RESULT int.list.rate 96000 pass/s\nRESULT int.list.n 24000 pass\n\
                    RESULT int.list.check 00000000deadbeef hash\nSKIP smp.indep2 1-cpu\nDONE reboot\n";
        let mut run = Run::default();
        for (second, line) in text.lines().filter_map(Line::parse).enumerate() {
            run.hear(line, second as f64);
        }
        assert_eq!(run.boot, Some(0.0));
        let (unit, check) = ("pass".into(), "00000000deadbeef".into());
        let figures = Figures { cpu: 1.0, time: 0.25, units: 24000.0, unit, check };
        assert_eq!(run.figures["int.list"], figures);
        assert_eq!(run.skipped["smp.indep2"], "1-cpu");
    }

    #[test]
    fn the_small_images_way_to_init_counts() {
        let mut run = Run { boot: Some(1.0), ..Run::default() };
        run.join(Run { boot: Some(2.0), resident: Some((3, 1)), ..Run::default() });
        assert_eq!((run.boot, run.resident), (Some(1.0), Some((3, 1))));
    }
}
