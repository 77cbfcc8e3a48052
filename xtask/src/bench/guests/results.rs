//! Medians and ratios of all runs, and the bars that ring3 is held to.

use std::collections::BTreeSet;

use super::super::median;
use super::launch::Launcher;
use super::protocol::{Figures, Run};
use super::workloads::{BOOT, wanted};

/// Native CPU seconds below which the guest's clock, which has a finer grain, is used instead.
const SHORT: f64 = 0.02;

/// What a bar is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Measure {
    /// ring3's speed, of TCG's: at least.
    Speed,
    /// ring3's time, of native: at most.
    Slowdown,
    /// ring3's CPU time to /init, of TCG's: at most.
    Boot,
}

/// What ring3 is held to in a group of workloads.
#[derive(Debug)]
pub(super) struct Bar {
    /// The group.
    pub(super) title: &'static str,
    /// Its workloads.
    pub(super) list: &'static str,
    /// What of them.
    pub(super) measure: Measure,
    /// How much.
    pub(super) bar: f64,
}

const SYSTEM: &str = "sys.getppid,sys.clock,sys.signal,sys.segv,proc.*,mm.*";
const COMPUTE: &str = "int.*,branch.*,mem.*,fp.*,simd.*";

const fn bar(title: &'static str, list: &'static str, measure: Measure, bar: f64) -> Bar {
    Bar { title, list, measure, bar }
}

/// All bars.
pub(super) const BARS: &[Bar] = &[
    bar("integer and branches", "int.*,branch.*", Measure::Speed, 4.0),
    bar("memory", "mem.*", Measure::Speed, 10.0),
    bar("floating point and SIMD", "fp.*,simd.*", Measure::Speed, 20.0),
    bar("programs", "app.*", Measure::Speed, 5.0),
    bar("system", SYSTEM, Measure::Speed, 2.0),
    bar("code that is new or changes", "code.*", Measure::Speed, 5.0),
    bar("compute", COMPUTE, Measure::Slowdown, 2.0),
    bar("boot to /init", BOOT, Measure::Boot, 0.5),
];

impl Bar {
    /// Whether a value is on the right side.
    pub(super) fn met(&self, value: f64) -> bool {
        match self.measure {
            Measure::Speed => value >= self.bar,
            Measure::Slowdown | Measure::Boot => value <= self.bar,
        }
    }
}

/// Which time is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clock {
    /// CPU time of the launcher.
    Cpu,
    /// Elapsed time, as the workload measured it.
    Guest,
}

/// Whether launchers that did the same amount of work came to the same sum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// No two did the same amount.
    Alone,
    /// They did.
    Same,
    /// They did not; the sums.
    Differ(String),
}

/// All runs.
#[derive(Debug, Default)]
pub(super) struct Results {
    /// Launchers in the order of the tables, with their runs.
    pub(super) runs: Vec<(Launcher, Vec<Run>)>,
    /// Workloads in the order of the tables.
    pub(super) names: Vec<String>,
    /// Several processors: elapsed time is what counts.
    pub(super) smp: bool,
}

/// The geometric mean; of nothing, none.
pub(super) fn geomean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let logarithms: Vec<f64> = values.map(f64::ln).collect();
    let count = logarithms.len() as f64;
    (count > 0.0).then(|| (logarithms.iter().sum::<f64>() / count).exp())
}

impl Results {
    /// The runs of a launcher.
    pub(super) fn of(&self, launcher: Launcher) -> &[Run] {
        self.runs.iter().find(|(l, _)| *l == launcher).map_or(&[], |(_, runs)| runs)
    }

    /// The median over a launcher's runs of what `value` takes from each.
    pub(super) fn median(&self, launcher: Launcher, value: impl Fn(&Run) -> Option<f64>) -> Option<f64> {
        let values: Vec<f64> = self.of(launcher).iter().filter_map(value).collect();
        (!values.is_empty()).then(|| median(values.into_iter()))
    }

    fn seconds(&self, launcher: Launcher, name: &str, value: impl Fn(&Figures) -> f64) -> Option<f64> {
        self.median(launcher, |run| run.figures.get(name).map(&value))
    }

    /// The time by which a workload is compared with native.
    pub(super) fn clock(&self, name: &str) -> Clock {
        let native = self.seconds(Launcher::Native, name, |figures| figures.cpu);
        if self.smp || native.is_some_and(|seconds| seconds < SHORT) { Clock::Guest } else { Clock::Cpu }
    }

    /// Seconds that a unit of a workload takes.
    pub(super) fn unit(&self, launcher: Launcher, name: &str, clock: Clock) -> Option<f64> {
        self.seconds(launcher, name, |figures| match clock {
            Clock::Cpu => figures.cpu / figures.units,
            Clock::Guest => figures.time / figures.units,
        })
    }

    /// How many times native's time a launcher takes for a workload.
    pub(super) fn slowdown(&self, launcher: Launcher, name: &str) -> Option<f64> {
        let clock = self.clock(name);
        Some(self.unit(launcher, name, clock)? / self.unit(Launcher::Native, name, clock)?)
    }

    /// ring3's speed, of that of `other`.
    pub(super) fn speed(&self, other: Launcher, name: &str) -> Option<f64> {
        let clock = if self.smp { Clock::Guest } else { Clock::Cpu };
        Some(self.unit(other, name, clock)? / self.unit(Launcher::Ring3, name, clock)?)
    }

    /// CPU seconds to /init.
    pub(super) fn boot(&self, launcher: Launcher) -> Option<f64> {
        self.median(launcher, |run| run.boot)
    }

    /// The workloads of a list for which `value` has one, with it.
    pub(super) fn members(&self, list: &str, value: impl Fn(&str) -> Option<f64>) -> Vec<(&str, f64)> {
        let names = self.names.iter().filter(|name| wanted(list, name));
        names.filter_map(|name| Some((name.as_str(), value(name)?))).collect()
    }

    /// What a bar measures, with ring3 against `other`, by workload.
    pub(super) fn measured(&self, bar: &Bar, other: Launcher) -> Vec<(&str, f64)> {
        match bar.measure {
            Measure::Speed => self.members(bar.list, |name| self.speed(other, name)),
            Measure::Slowdown => self.members(bar.list, |name| self.slowdown(Launcher::Ring3, name)),
            Measure::Boot => {
                self.members(bar.list, |_| Some(self.boot(Launcher::Ring3)? / self.boot(other)?))
            }
        }
    }

    /// Compares the sums of a workload.
    pub(super) fn check(&self, name: &str) -> Check {
        let all: Vec<(&str, u64, &str)> = (self.runs.iter())
            .flat_map(|(launcher, runs)| runs.iter().map(|run| (launcher.name(), run)))
            .filter_map(|(launcher, run)| Some((launcher, run.figures.get(name)?)))
            .map(|(launcher, figures)| (launcher, figures.units as u64, figures.check.as_str()))
            .collect();
        let pairs = || all.iter().flat_map(|a| all.iter().map(move |b| (a, b)));
        let compared = pairs().any(|(a, b)| a.0 != b.0 && a.1 == b.1);
        if pairs().any(|(a, b)| a.1 == b.1 && a.2 != b.2) {
            let sums: BTreeSet<String> =
                all.iter().map(|(launcher, units, sum)| format!("{launcher} {sum} ({units})")).collect();
            return Check::Differ(sums.into_iter().collect::<Vec<_>>().join(", "));
        }
        if compared { Check::Same } else { Check::Alone }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, cpu: f64, time: f64, units: f64, check: &str) -> Run {
        let figures = Figures { cpu, time, units, unit: "pass".into(), check: check.into() };
        Run { figures: [(name.to_string(), figures)].into(), ..Run::default() }
    }

    fn results(runs: Vec<(Launcher, Vec<Run>)>, name: &str) -> Results {
        Results { runs, names: vec![name.into()], smp: false }
    }

    #[test]
    fn means_are_geometric() {
        assert_eq!(geomean(std::iter::empty()), None);
        let mean = geomean([1.0, 4.0, 16.0].into_iter()).unwrap();
        assert!((mean - 4.0).abs() < 1e-9);
    }

    #[test]
    fn ratios_are_of_medians_per_unit() {
        let native = [1.0, 3.0, 2.0].map(|cpu| run("int.list", cpu, 0.1, 10.0, "a")).to_vec();
        let tcg = vec![run("int.list", 2.0, 0.1, 1.0, "b")];
        let ring3 = vec![run("int.list", 4.0, 0.1, 10.0, "a")];
        let all = results(
            vec![(Launcher::Native, native), (Launcher::Tcg, tcg), (Launcher::Ring3, ring3)],
            "int.list",
        );
        assert_eq!(all.slowdown(Launcher::Tcg, "int.list"), Some(10.0));
        assert_eq!(all.slowdown(Launcher::Ring3, "int.list"), Some(2.0));
        assert_eq!(all.speed(Launcher::Tcg, "int.list"), Some(5.0));
        assert_eq!(all.speed(Launcher::TcgTuned, "int.list"), None);
        assert_eq!(all.check("int.list"), Check::Same);
        assert_eq!(all.measured(&BARS[0], Launcher::Tcg), [("int.list", 5.0)]);
    }

    #[test]
    fn short_times_are_the_guests() {
        let native = vec![run("code.smc", 0.01, 0.002, 1.0, "a")];
        let ring3 = vec![run("code.smc", 0.5, 0.004, 1.0, "b")];
        let all = results(vec![(Launcher::Native, native), (Launcher::Ring3, ring3)], "code.smc");
        assert_eq!(all.slowdown(Launcher::Ring3, "code.smc"), Some(2.0));
        let Check::Differ(sums) = all.check("code.smc") else { panic!("the sums differ") };
        assert_eq!(sums, "native a (1), ring3 b (1)");
    }

    #[test]
    fn sums_of_other_amounts_are_not_compared() {
        let native = vec![run("int.crc", 1.0, 1.0, 300.0, "a")];
        let tcg = vec![run("int.crc", 1.0, 1.0, 60.0, "b")];
        let all = results(vec![(Launcher::Native, native), (Launcher::Tcg, tcg)], "int.crc");
        assert_eq!(all.check("int.crc"), Check::Alone);
    }

    #[test]
    fn bars_have_a_right_side() {
        let of = |measure| BARS.iter().find(|bar| bar.measure == measure).unwrap();
        assert!(of(Measure::Speed).met(4.0) && !of(Measure::Speed).met(3.9));
        assert!(of(Measure::Slowdown).met(2.0) && !of(Measure::Slowdown).met(2.1));
        assert!(of(Measure::Boot).met(0.5) && !of(Measure::Boot).met(0.51));
    }

    #[test]
    fn every_group_is_in_one_bar_of_speed() {
        let names = ["int.list", "branch.fib", "mem.triad", "fp.x87", "simd.fma", "sys.segv", "proc.ctx"];
        for name in names.into_iter().chain(["mm.cow", "code.smc", "app.xz1"]) {
            let bars = BARS.iter().filter(|bar| bar.measure == Measure::Speed && wanted(bar.list, name));
            assert_eq!(bars.count(), 1, "{name}");
        }
    }
}
