//! What the tasks do, as the machine wants it, and what it hears of it.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::{cpu, tasks};

/// The machine writes them before the start.
const PARAMETERS_AT: u64 = 0x8000;
/// Where the pages are that may be elsewhere.
const LAZY: u64 = 0x1000_0000;
const PAGE: u64 = 4096;
/// Serial port, and the port that ends the machine.
const SERIAL: u16 = 0x3f8;
const EXIT: u16 = 0xf4;
/// Where the results go, in the order of [`Report`]: one word after the other.
const REPORT: u16 = 0xec;

/// What to do.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Parameters {
    /// 1: one task computes, one touches each page once. 2: tasks touch pages in random order. 3: one task touches page 1, which has
    /// failed, and one computes.
    work: u64,
    /// 0 none, 1 the protocol, 2 with #VE, 3 the kernel's.
    pub protocol: u64,
    /// 2^order tokens.
    pub order: u64,
    /// How many pages there are.
    pages: u64,
    /// How many tasks touch them, and how often each.
    tasks: u64,
    touches: u64,
    seed: u64,
    /// Time-stamp ticks for which the computing task is alone first.
    alone: u64,
}

/// What has come of it.
#[derive(Default)]
struct Report {
    events: AtomicU64,
    resolutions: AtomicU64,
    failed: AtomicU64,
    machine_checks: AtomicU64,
    deaths: AtomicU64,
    /// Work and ticks of the computing task, alone and beside the other.
    alone: [AtomicU64; 2],
    beside: [AtomicU64; 2],
    nmis: AtomicU64,
}

static REPORT_: Report = Report {
    events: AtomicU64::new(0),
    resolutions: AtomicU64::new(0),
    failed: AtomicU64::new(0),
    machine_checks: AtomicU64::new(0),
    deaths: AtomicU64::new(0),
    alone: [const { AtomicU64::new(0) }; 2],
    beside: [const { AtomicU64::new(0) }; 2],
    nmis: AtomicU64::new(0),
};
/// Tasks that touch pages and have not ended.
static LEFT: AtomicU64 = AtomicU64::new(0);

pub fn parameters() -> Parameters {
    cpu::read(PARAMETERS_AT)
}

/// Makes the tasks.
pub fn start() {
    let parameters = parameters();
    match parameters.work {
        1 => {
            LEFT.store(1, Ordering::Relaxed);
            tasks::add(1, compute, parameters.alone);
        }
        2 => {
            LEFT.store(parameters.tasks, Ordering::Relaxed);
            (1..=parameters.tasks).for_each(|task| tasks::add(task as usize, wander, task));
        }
        3 => {
            tasks::add(1, survivor, 0);
            tasks::add(2, victim, 1);
        }
        other => fail("unknown work", other),
    }
}

/// A page's first word is its number; whoever touches it adds to the second.
fn touch(page: u64) {
    let at = LAZY + page * PAGE;
    let found: u64 = cpu::read(at);
    if found != page {
        fail("another page's contents", found);
    }
    cpu::write(at + 8, cpu::read::<u64>(at + 8) + 1);
}

extern "C" fn sweep(pages: u64) -> ! {
    (0..pages).for_each(touch);
    LEFT.fetch_sub(1, Ordering::Relaxed);
    tasks::exit()
}

/// A piece of work that can be counted.
fn piece(mut x: u64) -> u64 {
    for _ in 0..256 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
    }
    x
}

/// Computes while `more`; how much, in how many ticks.
fn measure(into: &[AtomicU64; 2], more: impl Fn(u64) -> bool) {
    let (begin, mut count, mut x) = (cpu::rdtsc(), 0, 88_172_645_463_325_252);
    let mut ticks = 0;
    while more(ticks) {
        x = piece(x);
        count += 1;
        ticks = cpu::rdtsc() - begin;
    }
    if x == 0 {
        fail("arithmetic", x);
    }
    into[0].store(count, Ordering::Relaxed);
    into[1].store(ticks, Ordering::Relaxed);
}

extern "C" fn compute(alone: u64) -> ! {
    measure(&REPORT_.alone, |ticks| ticks < alone);
    cpu::without_interrupts(|| tasks::add(2, sweep, parameters().pages));
    measure(&REPORT_.beside, |_| LEFT.load(Ordering::Relaxed) != 0);
    pass()
}

/// Touches pages in an order that follows from the seed.
extern "C" fn wander(task: u64) -> ! {
    let parameters = parameters();
    let mut x = parameters.seed ^ task.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for _ in 0..parameters.touches {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let at = LAZY + (x >> 11) % parameters.pages * PAGE;
        let found: u64 = cpu::read(at);
        if LAZY + found * PAGE != at {
            fail("another page's contents", found);
        }
    }
    if LEFT.fetch_sub(1, Ordering::Relaxed) == 1 {
        // All others have ended, so nothing is on its way.
        let report = [&REPORT_.events, &REPORT_.resolutions].map(|count| count.load(Ordering::Relaxed));
        if report[0] != report[1] {
            fail("events without resolutions", report[0] - report[1]);
        }
        pass()
    }
    tasks::exit()
}

extern "C" fn victim(page: u64) -> ! {
    touch(page);
    fail("a failed page was read", page)
}

extern "C" fn survivor(_: u64) -> ! {
    let mut x = 1;
    while tasks::alive(2) {
        x = piece(x | 1);
    }
    touch(0);
    pass()
}

pub fn count_event() {
    REPORT_.events.fetch_add(1, Ordering::Relaxed);
}

pub fn count_resolution(result: u32) {
    REPORT_.resolutions.fetch_add(1, Ordering::Relaxed);
    REPORT_.failed.fetch_add(result.into(), Ordering::Relaxed);
}

pub fn machine_check(_address: u64) {
    REPORT_.machine_checks.fetch_add(1, Ordering::Relaxed);
}

pub fn died(_task: usize) {
    REPORT_.deaths.fetch_add(1, Ordering::Relaxed);
}

/// The handler of NMIs touches a page, with interrupts off.
pub fn nmi() {
    REPORT_.nmis.fetch_add(1, Ordering::Relaxed);
    let page = parameters().pages;
    let found: u64 = cpu::read(LAZY + page * PAGE);
    if found != page {
        fail("another page's contents", found);
    }
}

fn end(status: u8) -> ! {
    let report = &REPORT_;
    let words = [&report.events, &report.resolutions, &report.failed, &report.machine_checks, &report.deaths];
    let speeds = [&report.alone[0], &report.alone[1], &report.beside[0], &report.beside[1], &report.nmis];
    for word in words.into_iter().chain(speeds) {
        let value = word.load(Ordering::Relaxed);
        cpu::out32(REPORT, value as u32);
        cpu::out32(REPORT, (value >> 32) as u32);
    }
    cpu::out8(EXIT, status);
    loop {
        cpu::halt();
    }
}

fn say(text: &str) {
    text.bytes().for_each(|byte| cpu::out8(SERIAL, byte));
}

fn pass() -> ! {
    say("PASS\n");
    end(0)
}

/// The machine does not have what is wanted.
pub fn skip(what: &str) -> ! {
    say("SKIP ");
    say(what);
    say("\n");
    end(0)
}

pub fn fail(what: &str, value: u64) -> ! {
    say("FAIL ");
    say(what);
    say(" ");
    for shift in (0..16).rev() {
        let digit = (value >> (4 * shift) & 0xf) as usize;
        cpu::out8(SERIAL, b"0123456789abcdef"[digit]);
    }
    say("\n");
    end(1)
}
