//! The kernel in Rust (`pager/`) from the machine's side: its parameters and what it reports.

use std::sync::Arc;

use hypervisor::{HostParams, Vcpu, VcpuExit, Vm};
use kvm_bindings::kvm_userspace_memory_region;
use silicon::model::CpuModel;

use crate::machine::{self, Machine};

/// Where the pages are that its tasks touch.
pub const LAZY: u64 = 0x1000_0000;
/// Where it finds its parameters.
const PARAMETERS: u64 = 0x8000;
/// Ports: a word of the report, the serial port, the end.
const REPORT: u16 = 0xec;
const SERIAL: u16 = 0x3f8;
const EXIT: u16 = 0xf4;

/// What its tasks do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Work {
    /// One computes, first alone, then while one touches each page once.
    Duet = 1,
    /// Many touch pages in random order.
    Wander = 2,
    /// One touches page 1, which has failed; another one computes until it has died.
    Poison = 3,
}

/// How it hears of pages that are elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Protocol {
    /// Not at all.
    None = 0,
    /// By the page-not-present protocol.
    NotPresent = 1,
    /// The same, with #VE.
    Ve = 2,
    /// By the kernel's asynchronous page faults.
    Kvm = 3,
}

/// What the kernel is to do.
#[derive(Clone, Copy, Debug)]
pub struct Parameters {
    /// The tasks.
    pub work: Work,
    /// How they hear.
    pub protocol: Protocol,
    /// 2^order tokens.
    pub order: u64,
    /// Pages.
    pub pages: u64,
    /// [`Work::Wander`]: tasks, and how often each touches a page.
    pub tasks: u64,
    /// Likewise.
    pub touches: u64,
    /// Where the order of its pages comes from.
    pub seed: u64,
    /// [`Work::Duet`]: for how many ticks of the time-stamp counter the computing task is alone.
    pub alone: u64,
}

/// What it reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Pages that it was told of.
    pub events: u64,
    /// Of which it was told what has become.
    pub resolutions: u64,
    /// They have failed.
    pub failed: u64,
    /// Machine checks.
    pub machine_checks: u64,
    /// Tasks that were killed while they ran.
    pub deaths: u64,
    /// Pieces of work of the computing task, and ticks: alone.
    pub alone: [u64; 2],
    /// Beside the other.
    pub beside: [u64; 2],
    /// NMIs.
    pub nmis: u64,
}

impl Report {
    /// The computing task's speed beside the other, of that alone.
    pub fn share(&self) -> f64 {
        let speed = |[work, ticks]: [u64; 2]| work as f64 / ticks as f64;
        speed(self.beside) / speed(self.alone)
    }
}

/// A machine with the kernel, whose pages at [`LAZY`] are `size` bytes at the host address `host`. `prepare` comes before they are there.
///
/// # Errors
///
/// As [`machine::build`].
pub fn machine(
    parameters: &Parameters,
    host: u64,
    size: u64,
    prepare: impl FnOnce(&Arc<Vm>) -> Result<(), hypervisor::Error>,
) -> Result<Machine, machine::Error> {
    let machine = machine::build(crate::PAGER, 1, CpuModel::default(), HostParams::default())?;
    prepare(&machine.vm)?;
    machine.vm.set_user_memory_region(kvm_userspace_memory_region {
        slot: 1,
        flags: 0,
        guest_phys_addr: LAZY,
        memory_size: size,
        userspace_addr: host,
    })?;
    let Parameters { work, protocol, order, pages, tasks, touches, seed, alone } = *parameters;
    let words = [work as u64, protocol as u64, order, pages, tasks, touches, seed, alone];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    machine.vm.memory().write(PARAMETERS, &bytes);
    Ok(machine)
}

/// Runs the kernel to its end.
///
/// # Errors
///
/// What it said other than that all is well, or why it stopped.
pub fn run(vcpu: &mut Vcpu) -> Result<Report, String> {
    let (mut console, mut halves) = (String::new(), Vec::new());
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Io { port: REPORT, write: Some(half), .. }) => halves.push(u64::from(half)),
            Ok(VcpuExit::Io { port: SERIAL, write: Some(value), .. }) => {
                console.push(char::from(value as u8))
            }
            Ok(VcpuExit::Io { port: EXIT, .. }) => break,
            other => return Err(format!("{other:x?} at {:#x}; {console}", vcpu.state().rip)),
        }
    }
    let words: Vec<u64> = halves.as_chunks().0.iter().map(|[low, high]| low | high << 32).collect();
    let [events, resolutions, failed, machine_checks, deaths, work, ticks, other_work, other_ticks, nmis] =
        words[..]
    else {
        return Err(format!("{} words; {console}", words.len()));
    };
    let (alone, beside) = ([work, ticks], [other_work, other_ticks]);
    let report = Report { events, resolutions, failed, machine_checks, deaths, alone, beside, nmis };
    if console == "PASS\n" { Ok(report) } else { Err(format!("{console}{report:?}")) }
}
