//! Runs many cases in worker processes, so that even a crash of the harness is reported with its case.
#![expect(unsafe_code, reason = "forks worker processes that share a page of progress counters")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use iced_x86::Code;
use silicon::model::Features;

use crate::bench::Bench;
use crate::capabilities::Capabilities;
use crate::forms::{Class, Form};
use crate::generate::Generator;
use crate::host::HostError;
use crate::machine::Event;
use crate::report::{self, FormResult};

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Seed of all cases.
    pub seed: u64,
    /// Cases of each form.
    pub cases_per_form: u64,
    /// Forms to run.
    pub forms: Vec<Form>,
    /// Worker processes.
    pub workers: usize,
    /// Differences told in full for each form; the rest is counted.
    pub told_per_form: u64,
    /// First case number of each form.
    pub first: u64,
}

/// What came out.
#[derive(Debug, Default)]
pub struct Summary {
    /// By form, in the plan's order.
    pub forms: Vec<FormResult>,
    /// Full text of differences.
    pub told: Vec<String>,
    /// Cases that a row of [`crate::vendor::ROWS`] excepts, by its index.
    pub excepted: BTreeMap<usize, u64>,
    /// Workers that died, with the case that they were at.
    pub crashes: Vec<String>,
}

impl Summary {
    /// Cases run.
    pub fn cases(&self) -> u64 {
        self.forms.iter().map(|f| f.cases).sum()
    }
    /// Cases with a difference.
    pub fn differences(&self) -> u64 {
        self.forms.iter().map(|f| f.different).sum()
    }
}

/// Why a run did not come to an end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The host executor cannot work here.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A system call failed.
    #[error("{0}: {1}")]
    System(&'static str, #[source] io::Error),
}

/// Progress that workers share with their parent.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Progress {
    pub(crate) done: AtomicU64,
    /// Index of the form in the plan and case number, so that a dead worker's case is known.
    form: AtomicU64,
    pub(crate) number: AtomicU64,
}

/// Runs `plan`; `tick` is called now and then with the number of cases done.
pub fn run(plan: &Plan, features: &Features, tick: impl FnMut(u64)) -> Result<Summary, RunError> {
    let mut summary =
        Summary { forms: plan.forms.iter().map(|f| FormResult::new(f.code)).collect(), ..Summary::default() };
    let task =
        |worker: usize, progress: &Progress, out: &mut dyn Write| work(plan, features, worker, progress, out);
    for end in in_workers(plan.workers, task, tick)? {
        report::merge(&mut summary, &end.text);
        if end.status != 0 {
            summary.crashes.push(crash(plan, end.progress, end.status));
        }
    }
    Ok(summary)
}

/// How a worker ended.
pub(crate) struct WorkerEnd {
    /// What it has written.
    pub(crate) text: String,
    /// Its wait status.
    pub(crate) status: i32,
    /// How far it came.
    pub(crate) progress: &'static Progress,
}

/// Runs `task` in so many processes, and waits for all.
pub(crate) fn in_workers(
    count: usize,
    task: impl Fn(usize, &Progress, &mut dyn Write) -> Result<(), RunError>,
    mut tick: impl FnMut(u64),
) -> Result<Vec<WorkerEnd>, RunError> {
    let all = shared(count)?;
    let mut workers = Vec::new();
    for (i, progress) in all.iter().enumerate() {
        let file = memory_file()?;
        // SAFETY: this process has one thread, so the child may go on as the parent would.
        match unsafe { libc::fork() } {
            -1 => return Err(RunError::System("fork", io::Error::last_os_error())),
            0 => child(|out| task(i, progress, out), file),
            pid => workers.push((pid, progress, file)),
        }
    }
    let mut ends = Vec::new();
    while !workers.is_empty() {
        std::thread::sleep(Duration::from_millis(20));
        tick(all.iter().map(|p| p.done.load(Ordering::Relaxed)).sum());
        let mut left = Vec::new();
        for (pid, progress, mut file) in workers {
            let mut status = 0;
            // SAFETY: our own child.
            if unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) } == 0 {
                left.push((pid, progress, file));
                continue;
            }
            let text = read_all(&mut file).map_err(|e| RunError::System("reading results", e))?;
            ends.push(WorkerEnd { text, status, progress });
        }
        workers = left;
    }
    Ok(ends)
}

fn crash(plan: &Plan, progress: &Progress, status: i32) -> String {
    let form = plan.forms.get(progress.form.load(Ordering::Relaxed) as usize);
    let code = form.map_or(Code::INVALID, |f| f.code);
    let number = progress.number.load(Ordering::Relaxed);
    format!("a worker died (wait status {status:#x}) at --seed {} --case {code:?}:{number}", plan.seed)
}

fn shared(workers: usize) -> Result<&'static [Progress], RunError> {
    let size = workers * size_of::<Progress>();
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new anonymous mapping, zeroed, never unmapped; the type is all atomics.
    unsafe {
        let pointer = libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0);
        if pointer == libc::MAP_FAILED {
            return Err(RunError::System("mmap", io::Error::last_os_error()));
        }
        Ok(std::slice::from_raw_parts(pointer.cast(), workers))
    }
}

fn memory_file() -> Result<File, RunError> {
    // SAFETY: a valid name; the descriptor is new and ours.
    unsafe {
        match libc::memfd_create(c"conformance".as_ptr(), libc::MFD_CLOEXEC) {
            -1 => Err(RunError::System("memfd_create", io::Error::last_os_error())),
            fd => Ok(File::from_raw_fd(fd)),
        }
    }
}

fn read_all(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The worker process: results as text into `file`.
fn child(task: impl FnOnce(&mut dyn Write) -> Result<(), RunError>, file: File) -> ! {
    std::panic::set_hook(Box::new(|_| {}));
    let mut out = BufWriter::new(file);
    let status = match task(&mut out) {
        Ok(()) => 0,
        Err(e) => {
            let _ = writeln!(out, "T {e}");
            1
        }
    };
    let _ = out.flush();
    // SAFETY: ends the child without running the parent's exit handlers.
    unsafe { libc::_exit(status) }
}

/// Every `workers`th form, all its cases.
fn work(
    plan: &Plan,
    features: &Features,
    worker: usize,
    progress: &Progress,
    out: &mut dyn Write,
) -> Result<(), RunError> {
    let mut bench = Bench::new(features.clone(), plan.seed)?;
    let mut generator = Generator::new(Capabilities::of_host()?);
    let failed = |e| RunError::System("writing results", e);
    let mut excepted = BTreeMap::<usize, u64>::new();
    for (index, form) in plan.forms.iter().enumerate().filter(|(i, _)| i % plan.workers == worker) {
        progress.form.store(index as u64, Ordering::Relaxed);
        let mut result = FormResult::new(form.code);
        for number in plan.first..plan.first + plan.cases_per_form {
            progress.number.store(number, Ordering::Relaxed);
            let Some(case) = generator.case(form.code, plan.seed, number) else { continue };
            let outcome = bench.run(&case);
            progress.done.fetch_add(1, Ordering::Relaxed);
            result.cases += 1;
            match outcome.host.0 {
                Event::Completed => result.completed += 1,
                _ => result.faulted += 1,
            }
            result.undefined += u64::from(outcome.difference.undefined);
            result.excepted += u64::from(!outcome.difference.excepted.is_empty());
            for row in &outcome.difference.excepted {
                *excepted.entry(*row).or_default() += 1;
            }
            if !outcome.difference.defined.is_empty() {
                result.different += 1;
                if result.different <= plan.told_per_form {
                    writeln!(out, "T {}", report::tell(plan.seed, number, &case, &outcome))
                        .map_err(failed)?;
                }
            }
        }
        writeln!(out, "F {index} {}", result.to_line()).map_err(failed)?;
    }
    for (row, cases) in excepted {
        writeln!(out, "E {row} {cases}").map_err(failed)?;
    }
    Ok(())
}

/// The forms that a plan runs: those that are compared at least in part.
pub fn comparable(forms: &[Form]) -> Vec<Form> {
    let runs = |f: &&Form| matches!(f.class, Class::Compared | Class::FaultCompared);
    forms.iter().filter(runs).copied().collect()
}
