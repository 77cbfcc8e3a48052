//! Very many events of the page-not-present protocol, with tasks that fault, wait and go on, pages that come after random times and in
//! random order, some of them failed, NMIs and interrupts: no lost wake-up, no double delivery, no leak of tokens (P8 to P15, R4, R9).
//!
//! The guest's kernel is the test: real-mode handlers exit, and the test switches tasks as a kernel would. A seed makes all choices but
//! the host's own timing.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use silicon::mmu::ept::Lazy;

use super::super::RunRequest;
use super::super::testing::{Program, vm};
use super::*;
use crate::async_pf::PageSource;
use crate::irqchip::bus::Message;
use crate::msr::page_not_present::{DATA, RING, VECTORS};

const LAZY: u64 = 0x10_0000;
/// Pages of tasks, and one that NMIs touch, which never fails.
const PAGES: u64 = 15;
const NMI_PAGE: u64 = PAGES;
const PNP_DATA: u64 = 0x2000;
const PNP_RING: u64 = 0x3000;
const EVENT: u64 = 0x61;
const INTERRUPT: u64 = 0x51;
/// Another interrupt, of a device.
const DEVICE: u32 = 0x41;
const TASKS: usize = 6;

/// A task: mov al, [bx]; out 0x92, al; again. Idle: sti; hlt; out 0x93, al; again.
const TASK: (u64, &[u8]) = (Program::CODE, &[0x8a, 0x07, 0xe6, 0x92, 0xeb, 0xfa]);
const IDLE: (u64, &[u8]) = (0x1100, &[0xfb, 0xf4, 0xe6, 0x93, 0xeb, 0xfa]);
/// Handlers: out PORT, al; iret. The NMI's touches its page first.
const HANDLERS: [(u64, u64, &[u8]); 4] = [
    (EVENT, 0x600, &[0xe6, 0x90, 0xcf]),
    (INTERRUPT, 0x700, &[0xe6, 0x91, 0xcf]),
    (DEVICE as u64, 0x800, &[0xe6, 0x95, 0xcf]),
    // mov al, [0xf000]
    (2, 0x900, &[0xa0, 0x00, 0xf0, 0xe6, 0x94, 0xcf]),
];

/// xorshift64*.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_shr(32) % end
    }
}

/// Brings pages at random times; one in `fails` has failed.
#[derive(Debug)]
struct Pages {
    seed: u64,
    asked: AtomicU64,
    fails: u64,
}

impl PageSource for Pages {
    fn bring(&self, gpa: u64, _: u64) -> Outcome {
        let mut random = Random(
            self.seed ^ self.asked.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
        );
        random.below(2);
        match random.below(8) {
            0 => thread::sleep(Duration::from_micros(random.below(100))),
            1 | 2 => thread::yield_now(),
            _ => (0..random.below(200)).for_each(|_| std::hint::spin_loop()),
        }
        let fails = self.fails != 0 && (gpa - LAZY) / 4096 != NMI_PAGE && random.below(self.fails) == 0;
        if fails { Outcome::Failed } else { Outcome::Came }
    }
}

struct Storm {
    program: Program,
    random: Random,
    /// Where each task is while it does not run, the idle one last.
    contexts: Vec<kvm_regs>,
    current: usize,
    /// Tasks that wait, by token.
    waiting: HashMap<u32, usize>,
    /// Resolved tokens whose event has not come yet.
    early: HashMap<u32, u32>,
    /// `inuse` is left set for a while.
    lingers: bool,
    fails: u64,
    tokens: u64,
    events: u64,
    failed: u64,
    nmis: u64,
    progress: Arc<AtomicU64>,
    _lazy: Vec<u8>,
}

impl Storm {
    fn new(seed: u64, fails: u64) -> Storm {
        // Where pages fail no task may touch a failed one while no token is free.
        let order = if fails == 0 { 2 } else { 3 };
        let vm = vm();
        vm.create_irqchip().unwrap();
        vm.set_page_source(Arc::new(Pages { seed, asked: AtomicU64::new(0), fails })).unwrap();
        let mut program = Program::on(vm.clone(), TASK.1);
        let mut lazy = vec![0; (PAGES as usize + 2) * 4096];
        let start = (lazy.as_ptr() as usize).next_multiple_of(4096) - lazy.as_ptr() as usize;
        // Each page has its number in it.
        lazy[start..start + (PAGES as usize + 1) * 4096]
            .chunks_mut(4096)
            .zip(0u8..)
            .for_each(|(page, n)| page.fill(n));
        vm.set_user_memory_region(kvm_userspace_memory_region {
            slot: 1,
            guest_phys_addr: LAZY,
            memory_size: (PAGES + 1) * 4096,
            userspace_addr: lazy[start..].as_ptr() as u64,
            ..Default::default()
        })
        .unwrap();
        vm.set_lazy(LAZY, Lazy::Own).unwrap();
        for (vector, at, code) in HANDLERS {
            assert!(vm.memory().write(vector * 4, &(at as u32).to_le_bytes()) && vm.memory().write(at, code));
        }
        assert!(vm.memory().write(IDLE.0, IDLE.1));
        let vcpu = &mut program.vcpu;
        let table = vm.system().supported_cpuid();
        vcpu.set_cpuid2(&table).unwrap();
        let mut sregs = vcpu.sregs();
        sregs.ds.base = LAZY;
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.lapic.as_ref().unwrap().mmio_write(0xf0, &0x1ffu32.to_le_bytes());
        for (index, value) in
            [(VECTORS, INTERRUPT << 8 | EVENT), (RING, PNP_RING | order), (DATA, PNP_DATA | 1)]
        {
            vcpu.write_msr(index, value, false).unwrap();
        }
        let context = |index: u64, rip| kvm_regs {
            rip,
            rsp: 0x8000 + 0x800 * index,
            rflags: 0x202,
            ..kvm_regs::default()
        };
        let mut contexts: Vec<_> = (1..=TASKS as u64).map(|index| context(index, TASK.0)).collect();
        contexts.push(context(TASKS as u64 + 1, IDLE.0));
        let first = contexts[0];
        program.vcpu.set_regs(&first);
        Storm {
            program,
            random: Random(seed | 1),
            contexts,
            current: 0,
            waiting: HashMap::new(),
            early: HashMap::new(),
            lingers: false,
            fails,
            tokens: 1 << order,
            events: 0,
            failed: 0,
            nmis: 0,
            progress: Arc::default(),
            _lazy: lazy,
        }
    }

    fn word(&self, at: u64) -> u32 {
        let mut word = [0; 4];
        assert!(self.program.vcpu.vm.memory().read(at, &mut word));
        u32::from_le_bytes(word)
    }

    fn set_word(&self, at: u64, value: u32) {
        assert!(self.program.vcpu.vm.memory().write(at, &value.to_le_bytes()));
    }

    fn end_of_interrupt(&self) {
        self.program.vcpu.lapic.as_ref().unwrap().end_of_interrupt();
    }

    /// A page for the task that runs: most are taken away first.
    fn next_page(&mut self) {
        let page = self.random.below(PAGES);
        let gpa = LAZY + page * 4096;
        if self.random.below(8) != 0 {
            self.program.vcpu.vm.evict(gpa, 4096).unwrap();
        }
        let mut regs = self.program.vcpu.regs();
        (regs.rbx, regs.rip) = (page * 4096 + self.random.below(4096), TASK.0);
        self.program.vcpu.set_regs(&regs);
    }

    /// The event's handler: the task waits, unless its page has come already.
    fn event(&mut self) {
        let vcpu = &self.program.vcpu;
        assert_eq!(self.word(PNP_DATA), 1, "it is in use");
        let token = self.word(PNP_DATA + 4);
        let gpa = u64::from(self.word(PNP_DATA + 8));
        assert_ne!(self.current, TASKS, "the idle task touches nothing");
        assert_eq!(gpa, LAZY + self.program.vcpu.regs().rbx, "{token:#x}");
        assert!(!vcpu.state().flag(silicon::flags::Rflags::IF));
        self.events += 1;
        // A failed page that cannot be told would be the end of the guest.
        self.lingers = self.fails == 0 && self.random.below(16) == 0;
        if !self.lingers {
            self.set_word(PNP_DATA, 0);
        }
        self.end_of_interrupt();
        match self.early.remove(&token) {
            Some(result) => self.resolved(self.current, result),
            None => {
                let other = self.waiting.insert(token, self.current);
                assert_eq!(other, None, "token {token:#x} was given twice");
                self.switch();
            }
        }
    }

    /// A failed page: the task takes another one, behind its handler.
    fn resolved(&mut self, task: usize, result: u32) {
        if result == 0 {
            return;
        }
        self.failed += 1;
        let page = self.random.below(PAGES);
        if task == self.current {
            let mut regs = self.program.vcpu.regs();
            regs.rbx = page * 4096;
            self.program.vcpu.set_regs(&regs);
        } else {
            self.contexts[task].rbx = page * 4096;
        }
    }

    /// Another task that can run, or the idle one.
    fn switch(&mut self) {
        self.contexts[self.current] = self.program.vcpu.regs();
        let blocked: Vec<usize> = self.waiting.values().copied().collect();
        let free: Vec<usize> = (0..TASKS).filter(|task| !blocked.contains(task)).collect();
        let next = match free.len() {
            0 => TASKS,
            count => free[self.random.below(count as u64) as usize],
        };
        self.current = next;
        let mut regs = self.contexts[next];
        if next == TASKS && !(IDLE.0..IDLE.0 + 6).contains(&regs.rip) {
            // It was interrupted: it begins again.
            regs = kvm_regs { rip: IDLE.0, rsp: 0x8000 + 0x800 * (TASKS as u64 + 1), rflags: 2, ..regs };
        }
        self.program.vcpu.set_regs(&regs);
    }

    /// The interrupt's handler.
    fn interrupt(&mut self) {
        let (head, mut tail) =
            (self.word(PNP_RING + self.tokens * 8), self.word(PNP_RING + self.tokens * 8 + 4));
        assert!(head.wrapping_sub(tail) <= self.tokens as u32);
        while tail != head {
            let entry = PNP_RING + 8 * (u64::from(tail) % self.tokens);
            let (result, token) = (self.word(entry), self.word(entry + 4));
            match self.waiting.remove(&token) {
                Some(task) => self.resolved(task, result),
                None => assert_eq!(self.early.insert(token, result), None, "{token:#x} was resolved twice"),
            }
            tail = tail.wrapping_add(1);
        }
        self.set_word(PNP_RING + self.tokens * 8 + 4, tail);
        self.end_of_interrupt();
        if self.current == TASKS || self.random.below(2) == 0 {
            self.switch();
        }
    }

    fn disturb(&mut self) {
        if self.lingers && self.random.below(2) == 0 {
            self.lingers = false;
            self.set_word(PNP_DATA, 0);
        }
        match self.random.below(32) {
            0 => {
                self.program.vcpu.vm.evict(LAZY + NMI_PAGE * 4096, 4096).unwrap();
                self.program.vcpu.nmi();
            }
            1 => {
                self.program.vcpu.lapic.as_ref().unwrap().accept(&Message::from_icr(DEVICE, 0));
            }
            _ => {}
        }
    }

    /// Until there have been so many events, and nothing is on its way.
    fn run(&mut self, events: u64) {
        loop {
            self.progress.fetch_add(1, Ordering::Relaxed);
            let exit = self.program.vcpu.run();
            // The OUT is complete before the test looks at the registers.
            let complete = RunRequest { immediate_exit: true, ..RunRequest::default() };
            assert!(matches!(self.program.vcpu.run_request(complete), Err(Error::Interrupted)));
            match exit {
                Ok(VcpuExit::Io { port: 0x90, .. }) => self.event(),
                Ok(VcpuExit::Io { port: 0x91, .. }) => self.interrupt(),
                Ok(VcpuExit::Io { port: 0x92, write: Some(value), .. }) => {
                    let regs = self.program.vcpu.regs();
                    assert_eq!(u64::from(value), regs.rbx / 4096, "the page's contents");
                    if self.events >= events {
                        if self.waiting.is_empty() {
                            return;
                        }
                        // Only those that wait go on; this one has nothing to do.
                        self.program.vcpu.set_regs(&kvm_regs { rip: TASK.0, ..regs });
                    } else {
                        self.next_page();
                        if self.random.below(4) == 0 {
                            self.switch();
                        }
                    }
                }
                Ok(VcpuExit::Io { port: 0x93, .. }) => self.switch(),
                Ok(VcpuExit::Io { port: 0x94, write: Some(value), .. }) => {
                    assert_eq!(u64::from(value), NMI_PAGE);
                    self.nmis += 1;
                }
                Ok(VcpuExit::Io { port: 0x95, .. }) => self.end_of_interrupt(),
                other => panic!(
                    "{other:x?} after {} events, waiting {:x?}, current {}: {:x?}",
                    self.events,
                    self.waiting,
                    self.current,
                    self.program.vcpu.regs()
                ),
            }
            self.disturb();
        }
    }

    /// Nothing is left over.
    fn check(&self) {
        let count = |counter: &crate::stats::page::Counter| counter.load(Ordering::Relaxed);
        let stats = &self.program.vcpu.handle.stats;
        assert_eq!((count(&stats.pnp_events), count(&stats.pnp_resolutions)), (self.events, self.events));
        assert!(self.waiting.is_empty() && self.early.is_empty());
        assert_eq!(
            self.word(PNP_RING + self.tokens * 8),
            self.word(PNP_RING + self.tokens * 8 + 4),
            "all are read"
        );
        assert!(self.nmis != 0 && count(&stats.async_pf_holds) != 0);
    }
}

fn storm(seed: u64, fails: u64, events: u64) {
    let begin = Instant::now();
    let mut storm = Storm::new(seed, fails);
    let (handle, progress, over) =
        (storm.program.vcpu.handle(), storm.progress.clone(), Arc::new(AtomicBool::new(false)));
    let watch = {
        let over = over.clone();
        thread::spawn(move || {
            let (mut seen, mut since) = (0, Instant::now());
            while !over.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(50));
                let now = progress.load(Ordering::Relaxed);
                if now != seen {
                    (seen, since) = (now, Instant::now());
                } else if since.elapsed() > Duration::from_secs(60) {
                    // A wake-up was lost: KVM_RUN returns, and the test fails there.
                    handle.interrupt();
                }
            }
        })
    };
    storm.run(events);
    storm.check();
    over.store(true, Ordering::Relaxed);
    watch.join().unwrap();
    println!(
        "seed {seed}: {} events, {} failed pages, {} NMIs, {} s",
        storm.events,
        storm.failed,
        storm.nmis,
        begin.elapsed().as_secs()
    );
}

/// A million events, half of them with pages that fail.
#[test]
fn pnp_r9_a_million_events_and_none_is_lost_or_comes_twice() {
    const EVENTS: u64 = if cfg!(debug_assertions) { 5_000 } else { 500_000 };
    storm(1, 0, EVENTS);
    storm(2, 40, EVENTS);
}
