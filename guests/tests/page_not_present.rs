//! The page-not-present protocol on bare metal: the kernel in `pager/`, whose tasks touch pages that this test keeps, and brings when and
//! as it wants.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use guests::{PAGER, machine};
use hypervisor::async_pf::{Outcome, PageSource};
use hypervisor::{HostParams, VcpuExit, Vm};
use kvm_bindings::{kvm_msi, kvm_userspace_memory_region};
use silicon::mmu::ept::Lazy;
use silicon::model::CpuModel;

const PAGE: u64 = 4096;
const LAZY: u64 = 0x1000_0000;
const PARAMETERS: u64 = 0x8000;

/// `pager/work.rs`.
#[derive(Clone, Copy, Debug)]
struct Parameters {
    work: u64,
    protocol: u64,
    order: u64,
    pages: u64,
    tasks: u64,
    touches: u64,
    seed: u64,
    alone: u64,
}

const PROTOCOL: u64 = 1;
const VE: u64 = 2;
const KVM: u64 = 3;

/// Messages: an NMI, and the kernel's interrupt for resolutions.
const NMI: u32 = 4 << 8;
const RESOLVED: u32 = 0x51;

/// What the kernel reports.
#[derive(Clone, Debug, Default)]
struct Report {
    console: String,
    words: Vec<u64>,
}

impl Report {
    fn events(&self) -> u64 {
        self.words[0]
    }
    fn resolutions(&self) -> u64 {
        self.words[1]
    }
    fn failed(&self) -> u64 {
        self.words[2]
    }
    fn machine_checks(&self) -> u64 {
        self.words[3]
    }
    fn deaths(&self) -> u64 {
        self.words[4]
    }
    fn nmis(&self) -> u64 {
        self.words[9]
    }
}

/// Brings pages after times that look random, and fails one.
#[derive(Debug)]
struct Source {
    fails: Option<u64>,
    asked: AtomicU64,
}

impl PageSource for Source {
    fn bring(&self, gpa: u64, _: u64) -> Outcome {
        let turn = self.asked.fetch_add(1, Ordering::Relaxed);
        match turn % 7 {
            0 => thread::sleep(Duration::from_micros(turn % 50)),
            1 | 2 => thread::yield_now(),
            _ => {}
        }
        let failed = self.fails == Some((gpa - LAZY) / PAGE);
        if failed { Outcome::Failed } else { Outcome::Came }
    }
}

/// The pages, whose first word is their number.
struct Pages(Vec<u64>);

impl Pages {
    fn new(count: u64) -> Pages {
        let mut words = vec![0; ((count + 1) * PAGE / 8) as usize];
        let start = Pages::start(&words);
        for page in 0..count {
            words[start + (page * PAGE / 8) as usize] = page;
        }
        Pages(words)
    }

    fn start(words: &[u64]) -> usize {
        (words.as_ptr() as usize).next_multiple_of(PAGE as usize) / 8 - words.as_ptr() as usize / 8
    }

    fn host(&self) -> u64 {
        self.0[Pages::start(&self.0)..].as_ptr() as u64
    }
}

/// Runs the kernel; `disturb` is told of the VM while it runs, from another thread.
fn run(parameters: Parameters, fails: Option<u64>, disturb: impl Fn(&Vm) + Sync) -> Report {
    hypervisor::memory::catch_absence();
    // One more, which NMIs touch.
    let pages = Pages::new(parameters.pages + 1);
    let mut machine = machine::build(PAGER, 1, CpuModel::default(), HostParams::default()).unwrap();
    let source = Arc::new(Source { fails, asked: AtomicU64::new(0) });
    machine.vm.set_page_source(source.clone()).unwrap();
    let slot = kvm_userspace_memory_region {
        slot: 1,
        flags: 0,
        guest_phys_addr: LAZY,
        memory_size: (parameters.pages + 1) * PAGE,
        userspace_addr: pages.host(),
    };
    machine.vm.set_user_memory_region(slot).unwrap();
    machine.vm.set_lazy(LAZY, Lazy::Own).unwrap();
    let Parameters { work, protocol, order, pages: count, tasks, touches, seed, alone } = parameters;
    let words = [work, protocol, order, count, tasks, touches, seed, alone];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    assert!(machine.vm.memory().write(PARAMETERS, &bytes));
    let vcpu = &mut machine.vcpus[0];
    vcpu.setup_mce(1 << 24 | 1 << 8 | 10).unwrap();
    let (over, vm) = (AtomicBool::new(false), machine.vm.clone());
    let mut report = Report::default();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                // Before it touches pages the kernel is not ready for NMIs.
                if source.asked.load(Ordering::Relaxed) == 0 {
                    thread::yield_now();
                } else {
                    disturb(&vm);
                }
            }
        });
        let mut halves = Vec::new();
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            loop {
                match vcpu.run().unwrap() {
                    VcpuExit::Io { port: 0xec, write: Some(half), .. } => halves.push(u64::from(half)),
                    VcpuExit::Io { port: 0x3f8, write: Some(value), .. } => {
                        report.console.push(char::from(value as u8));
                    }
                    VcpuExit::Io { port: 0xf4, .. } => break,
                    other => panic!("{other:?} at {:#x}; {}", vcpu.state().rip, report.console),
                }
            }
        }));
        over.store(true, Ordering::Relaxed);
        ended.unwrap();
        report.words = halves.as_chunks().0.iter().map(|[low, high]| low | high << 32).collect();
    });
    assert_eq!(report.console, "PASS\n", "{report:?}");
    report
}

const DUET: Parameters = Parameters {
    work: 1,
    protocol: PROTOCOL,
    order: 4,
    pages: 500,
    tasks: 0,
    touches: 0,
    seed: 0,
    alone: 1_000_000,
};

/// A task computes while another waits for its pages, one after the other, by the protocol, with #VE, and by the kernel's interface.
#[test]
fn pnp_r3_a_task_goes_on_while_another_waits() {
    for protocol in [PROTOCOL, VE, KVM] {
        let report = run(Parameters { protocol, ..DUET }, None, |_| thread::yield_now());
        assert_eq!((report.events(), report.resolutions()), (500, 500), "{report:?}");
        let [.., beside, _, _] = report.words[..] else { panic!("{report:?}") };
        assert_ne!(beside, 0, "it has got on");
    }
}

/// Sixteen tasks, with fewer tokens than that: whoever gets none waits with the whole processor (R4); pages come in any order (R5); NMIs touch pages
/// while events are handled (R9), and interrupts come that nobody has sent for (R12).
#[test]
fn pnp_r4_r5_r9_r12_many_tasks_with_few_tokens() {
    for (protocol, order) in [(PROTOCOL, 0), (PROTOCOL, 2), (PROTOCOL, 5), (VE, 0), (VE, 2), (VE, 5)] {
        let many =
            Parameters { work: 2, protocol, order, pages: 256, tasks: 16, touches: 400, seed: 7, ..DUET };
        let report = run(many, None, |vm| {
            // Nobody takes this page away for good: the kernel's tasks touch the others.
            vm.evict(LAZY, 257 * PAGE).unwrap();
            for data in [NMI, RESOLVED] {
                vm.signal_msi(&kvm_msi { address_lo: 0xfee0_0000, data, ..kvm_msi::default() }).unwrap();
            }
            thread::sleep(Duration::from_micros(300));
        });
        assert_eq!(report.events(), report.resolutions());
        assert!(report.events() > 100 && report.nmis() > 0, "{report:?}");
    }
}

/// A page that has failed kills the task that touches it, and no other.
#[test]
fn pnp_r7_a_failed_page_kills_only_the_task_that_touches_it() {
    for protocol in [PROTOCOL, VE] {
        let poison = Parameters { work: 3, protocol, pages: 4, ..DUET };
        let report = run(poison, Some(1), |_| thread::yield_now());
        assert_eq!((report.failed(), report.machine_checks()), (1, 0), "{report:?}");
        assert_eq!(report.deaths(), 0, "it did not run again");
    }
}
