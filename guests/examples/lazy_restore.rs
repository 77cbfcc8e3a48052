//! A guest whose memory arrives page by page from a slow place, as when a snapshot is restored lazily: how much of its speed a task keeps
//! while another waits for its pages. `cargo xtask bench async-pf` runs it.
//!
//! Prints one line: protocol, pages, seconds, the share of the computing task's speed, events and resolutions.

use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use guests::lazy::{LazyMemory, PAGE};
use guests::pager::{self, Parameters, Protocol, Work};

const PROTOCOLS: [(&str, Protocol); 4] = [
    ("none", Protocol::None),
    ("protocol", Protocol::NotPresent),
    ("ve", Protocol::Ve),
    ("kvm", Protocol::Kvm),
];

/// Brings pages one after the other, each after `delay`.
fn serve(memory: &LazyMemory, delay: Duration) {
    let mut content = [0; PAGE];
    while let Ok(page) = memory.next() {
        thread::sleep(delay);
        content[..8].copy_from_slice(&page.to_le_bytes());
        if let Err(error) = memory.bring(page, &content) {
            eprintln!("page {page} cannot be brought: {error}");
        }
    }
}

fn run(protocol: &str, mebibytes: u64, delay: Duration) -> Result<String, String> {
    let known = PROTOCOLS.iter().find(|(name, _)| *name == protocol);
    let &(name, protocol) = known.ok_or("the protocol is none, protocol, ve or kvm")?;
    hypervisor::memory::catch_absence();
    let memory = LazyMemory::new((mebibytes << 20) as usize).map_err(|error| {
        format!("no userfaultfd ({error}): run as root, or allow it by sysctl vm.unprivileged_userfaultfd=1")
    })?;
    let memory = Arc::new(memory);
    let pages = memory.size() / PAGE as u64;
    // The computing task is alone for about as long as sixteen mebibytes take at a millisecond a page.
    let alone = 12_500_000_000;
    let parameters =
        Parameters { work: Work::Duet, protocol, order: 6, pages, tasks: 0, touches: 0, seed: 0, alone };
    let mut machine = pager::machine(&parameters, memory.host(), memory.size(), |_| Ok(()))
        .map_err(|error| error.to_string())?;
    let served = memory.clone();
    thread::spawn(move || serve(&served, delay));
    let begin = Instant::now();
    let report = pager::run(&mut machine.vcpus[0])?;
    Ok(format!(
        "{name} {pages} {:.1} {:.3} {} {}",
        begin.elapsed().as_secs_f64(),
        report.share(),
        report.events,
        report.resolutions
    ))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [protocol, mebibytes, microseconds] = &arguments[..] else {
        eprintln!("usage: lazy_restore none|protocol|ve|kvm MEBIBYTES MICROSECONDS");
        return ExitCode::from(2);
    };
    let (Ok(mebibytes), Ok(microseconds)) = (mebibytes.parse(), microseconds.parse()) else {
        eprintln!("sizes and times are numbers");
        return ExitCode::from(2);
    };
    match run(protocol, mebibytes, Duration::from_micros(microseconds)) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}
