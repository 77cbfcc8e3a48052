//! The page-not-present protocol on bare metal: the kernel in `pager/`, whose tasks touch pages that this test keeps, and brings when and
//! as it wants.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::Duration;

use guests::lazy::{LazyMemory, PAGE};
use guests::pager::{self, LAZY, Parameters, Protocol, Report, Work};
use hypervisor::Vm;
use hypervisor::async_pf::{Outcome, PageSource};
use kvm_bindings::kvm_msi;
use silicon::mmu::ept::Lazy;

const PAGE_SIZE: u64 = PAGE as u64;

/// Messages: an NMI, and the kernel's interrupt for resolutions.
const NMI: u32 = 4 << 8;
const RESOLVED: u32 = 0x51;

/// Brings pages after times that look random, and fails one.
#[derive(Debug)]
struct Source {
    fails: Option<u64>,
    asked: AtomicU64,
    /// Gets an NMI, and an interrupt that nobody has sent for, with every eighth page.
    disturbed: OnceLock<Weak<Vm>>,
}

impl PageSource for Source {
    fn bring(&self, gpa: u64, _: u64) -> Outcome {
        let turn = self.asked.fetch_add(1, Ordering::Relaxed);
        match turn % 7 {
            0 => thread::sleep(Duration::from_micros(turn % 50)),
            1 | 2 => thread::yield_now(),
            _ => {}
        }
        if turn % 8 == 3
            && let Some(vm) = self.disturbed.get().and_then(Weak::upgrade)
        {
            for data in [NMI, RESOLVED] {
                vm.signal_msi(&kvm_msi { address_lo: 0xfee0_0000, data, ..kvm_msi::default() }).unwrap();
            }
        }
        let failed = self.fails == Some((gpa - LAZY) / PAGE_SIZE);
        if failed { Outcome::Failed } else { Outcome::Came }
    }
}

/// The pages, whose first word is their number.
struct Pages(Vec<u64>);

impl Pages {
    fn new(count: u64) -> Pages {
        let mut words = vec![0; ((count + 1) * PAGE_SIZE / 8) as usize];
        let start = Pages::start(&words);
        for page in 0..count {
            words[start + (page * PAGE_SIZE / 8) as usize] = page;
        }
        Pages(words)
    }

    fn start(words: &[u64]) -> usize {
        (words.as_ptr() as usize).next_multiple_of(PAGE) / 8 - words.as_ptr() as usize / 8
    }

    fn host(&self) -> u64 {
        self.0[Pages::start(&self.0)..].as_ptr() as u64
    }
}

/// Runs the kernel. `disturb`: with NMIs, and pages that go over and over.
fn run(parameters: Parameters, fails: Option<u64>, disturb: bool) -> Report {
    hypervisor::memory::catch_absence();
    // One more, which NMIs touch.
    let pages = Pages::new(parameters.pages + 1);
    let source = Arc::new(Source { fails, asked: AtomicU64::new(0), disturbed: OnceLock::new() });
    let prepare = |vm: &Arc<Vm>| {
        if disturb {
            source.disturbed.get_or_init(|| Arc::downgrade(vm));
        }
        vm.set_page_source(source.clone())
    };
    let size = (parameters.pages + 1) * PAGE_SIZE;
    let mut machine = pager::machine(&parameters, pages.host(), size, prepare).unwrap();
    machine.vm.set_lazy(LAZY, Lazy::Own).unwrap();
    let vcpu = &mut machine.vcpus[0];
    vcpu.setup_mce(1 << 24 | 1 << 8 | 10).unwrap();
    let (over, vm) = (AtomicBool::new(!disturb), machine.vm.clone());
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                vm.evict(LAZY, size).unwrap();
                thread::sleep(Duration::from_micros(300));
            }
        });
        let report = pager::run(vcpu);
        over.store(true, Ordering::Relaxed);
        report.unwrap_or_else(|why| panic!("{parameters:?}: {why}"))
    })
}

const DUET: Parameters = Parameters {
    work: Work::Duet,
    protocol: Protocol::NotPresent,
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
    for protocol in [Protocol::NotPresent, Protocol::Ve, Protocol::Kvm] {
        let report = run(Parameters { protocol, ..DUET }, None, false);
        assert_eq!((report.events, report.resolutions), (500, 500), "{report:?}");
        assert_ne!(report.beside[0], 0, "it has got on");
    }
}

/// Sixteen tasks, with fewer tokens than that: whoever gets none waits with the whole processor (R4); pages come in any order (R5); NMIs touch pages
/// while events are handled (R9), and interrupts come that nobody has sent for (R12).
#[test]
fn pnp_r4_r5_r9_r12_many_tasks_with_few_tokens() {
    for (protocol, order) in
        [Protocol::NotPresent, Protocol::Ve].into_iter().flat_map(|p| [0, 2, 5].map(|o| (p, o)))
    {
        let work = Work::Wander;
        let many = Parameters { work, protocol, order, pages: 256, tasks: 16, touches: 400, seed: 7, ..DUET };
        let report = run(many, None, true);
        assert_eq!(report.events, report.resolutions);
        assert!(report.events > 100 && report.nmis > 0, "{report:?}");
    }
}

/// A page that has failed kills the task that touches it, and no other.
#[test]
fn pnp_r7_a_failed_page_kills_only_the_task_that_touches_it() {
    for protocol in [Protocol::NotPresent, Protocol::Ve] {
        let poison = Parameters { work: Work::Poison, protocol, pages: 4, ..DUET };
        let report = run(poison, Some(1), false);
        assert_eq!((report.failed, report.machine_checks), (1, 0), "{report:?}");
        assert_eq!(report.deaths, 0, "it did not run again");
    }
}

/// The same behind a userfaultfd, with memory that the host kernel says has failed.
#[test]
fn pnp_r7_a_poisoned_page_behind_a_userfaultfd() {
    hypervisor::memory::catch_absence();
    let lazy = match LazyMemory::new(2 << 20) {
        Ok(lazy) => lazy,
        Err(error) => return eprintln!("no userfaultfd: {error}"),
    };
    lazy.bring(0, &[0; PAGE]).unwrap();
    if let Err(error) = lazy.poison(1) {
        return eprintln!("memory cannot be made to fail on this host: {error}");
    }
    for protocol in [Protocol::NotPresent, Protocol::Ve] {
        let poison = Parameters { work: Work::Poison, protocol, pages: 4, ..DUET };
        let mut machine = pager::machine(&poison, lazy.host(), lazy.size(), |_| Ok(())).unwrap();
        let report = pager::run(&mut machine.vcpus[0]);
        assert_eq!(report.unwrap().failed, 1);
    }
}
