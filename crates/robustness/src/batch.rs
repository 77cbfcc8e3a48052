//! Many images in a row.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::kinds::{Generators, Kind};
use crate::process::Held;
use crate::run::{Bench, Totals};
use crate::watch::Watchdog;

/// Time that a guest gets before it is kicked, and that a kernel gets, which touches much memory.
const PATIENCE: Duration = Duration::from_millis(15);
const KERNEL_PATIENCE: Duration = Duration::from_millis(100);
/// Time that it then has to come back, on a machine with much else to do.
const GRACE: Duration = Duration::from_secs(20);
/// Images before the process holds all that it needs: at least so many, and one of so many.
const WARM_UP: u64 = 300;
const WARM_UP_SHARE: u64 = 5;

/// Which images to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Number of the first image.
    pub seed: u64,
    /// How many.
    pub images: u64,
    /// Only this kind.
    pub kind: Option<Kind>,
    /// From one image to the next.
    pub stride: u64,
}

/// What a batch tells as it goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// An image begins.
    Begins(Kind, u64),
    /// An image did what no guest may do.
    Failed(Kind, u64, String),
    /// The process holds more than before.
    Grew(String),
}

/// Totals by the names of the kinds, and the watchdog's record.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// By kind.
    pub kinds: BTreeMap<&'static str, Totals>,
    /// Guests that were kicked.
    pub kicks: u64,
    /// The longest time that one took to come back, and which it was.
    pub slowest: (Duration, String),
    /// Resident memory in KiB after the first images and at the end, if there were enough of them.
    pub resident: (u64, u64),
}

/// The command that runs one image again.
pub fn reproducer(kind: Kind, seed: u64) -> String {
    format!("cargo run -p robustness --release -- --seed {seed} --kind {kind}")
}

/// Runs the images of `plan`. `kernel` is the bzImage for [`Kind::Kernel`].
pub fn run(plan: &Plan, kernel: Option<&Path>, mut tell: impl FnMut(Event)) -> Result<Summary, String> {
    let generators = Generators::new(kernel).map_err(|e| e.to_string())?;
    let bench = Bench::new(Watchdog::start(GRACE))?;
    let mut summary = Summary::default();
    let mut held = None;
    for i in 0..plan.images {
        let seed = plan.seed.wrapping_add(i * plan.stride);
        let kind = plan.kind.unwrap_or_else(|| Kind::of(seed));
        tell(Event::Begins(kind, seed));
        let image = generators.image(kind, seed);
        let patience = if kind == Kind::Kernel { KERNEL_PATIENCE } else { PATIENCE };
        match bench.run(&image, seed, &format!("--seed {seed} --kind {kind}"), patience) {
            Ok(totals) => summary.kinds.entry(kind.name()).or_default().add(&totals),
            Err(failure) => tell(Event::Failed(kind, seed, failure.to_string())),
        }
        drop(image);
        if i + 1 == WARM_UP.max(plan.images / WARM_UP_SHARE) {
            held = Some(Held::now());
        }
    }
    if let Some(before) = held {
        let after = Held::now();
        summary.resident = (before.resident, after.resident);
        after.growth(&before).map(Event::Grew).into_iter().for_each(tell);
    }
    (summary.kicks, summary.slowest) = bench.watchdog().kicks();
    Ok(summary)
}
