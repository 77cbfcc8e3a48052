//! A KVM client that measures what a guest whose event window never opens takes from another one, both on one processor of
//! the host, and how soon its thread can be had back. Run by `cargo xtask bench notify` under `ring3 run`.
//!
//! Prints a name and a number a line: what the other guest keeps of the work that it does alone, in percent; the loop's share
//! of the processor, in percent; the longest and the median time from a signal to KVM_RUN's return, in microseconds.
#![expect(unsafe_code, reason = "guest memory is given to KVM by address; threads are signalled and timed")]

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::signal::register_signal_handler;

const MEMORY: usize = 0x1_0000;
const CODE: u64 = 0x2000;
const GDT: u64 = 0x800;
const IDT: u64 = 0x1000;
/// Pairs of measurements, alone and together.
const PAIRS: usize = 5;
/// One measurement. Longer than the longest pause, so that each has its share of windows.
const TURN: Duration = Duration::from_millis(4000);
/// Signals.
const SIGNALS: usize = 100;

/// MOV ECX, 100000; 1: DEC ECX; JNZ 1b; OUT 0x10, AL; again, in real mode.
const WORK: &[u8] = &[0x66, 0xb9, 0xa0, 0x86, 0x01, 0x00, 0x66, 0x49, 0x75, 0xfc, 0xe6, 0x10, 0xeb, 0xf2];

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// A VM with memory that is never freed.
fn machine(kvm: &Kvm, bytes: &[(u64, &[u8])]) -> Outcome<(VmFd, VcpuFd)> {
    let vm = kvm.create_vm()?;
    let layout = std::alloc::Layout::from_size_align(MEMORY, 4096)?;
    // SAFETY: the size is not zero.
    let start = unsafe { std::alloc::alloc_zeroed(layout) };
    if start.is_null() {
        return Err("no memory".into());
    }
    for (at, bytes) in bytes {
        // SAFETY: the tables and programs above lie in the fresh allocation.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start.add(*at as usize), bytes.len()) };
    }
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY as u64,
        userspace_addr: start as u64,
        ..Default::default()
    };
    // SAFETY: the memory is never freed.
    unsafe { vm.set_user_memory_region(region)? };
    let vcpu = vm.create_vcpu(0)?;
    Ok((vm, vcpu))
}

/// A guest that says when it has done a piece of work.
fn worker(kvm: &Kvm) -> Outcome<(VmFd, VcpuFd)> {
    let (vm, vcpu) = machine(kvm, &[(CODE, WORK)])?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (CODE, 2);
    vcpu.set_regs(&regs)?;
    Ok((vm, vcpu))
}

/// A guest at level 3 whose #AC handler is at level 3 too and has the same odd stack (CVE-2015-5307).
fn looper(kvm: &Kvm) -> Outcome<(VmFd, VcpuFd)> {
    let segments: Vec<u8> =
        [0u64, 0x00cf_fb00_0000_ffff, 0x00cf_f300_0000_ffff].iter().flat_map(|d| d.to_le_bytes()).collect();
    let gate = 0x0000_8e00_000b_3000u64.to_le_bytes();
    // PUSH EAX.
    let (vm, vcpu) = machine(kvm, &[(GDT, &segments), (IDT + 17 * 8, &gate), (CODE, &[0x50])])?;
    let mut sregs = vcpu.get_sregs()?;
    let flat = kvm_segment {
        limit: u32::MAX,
        selector: 0x13,
        type_: 3,
        dpl: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    (sregs.ds, sregs.es, sregs.ss) = (flat, flat, flat);
    sregs.cs = kvm_segment { selector: 0xb, type_: 11, ..flat };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 23);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 18 * 8 - 1);
    sregs.cr0 = 1 << 18 | 1 << 5 | 1 << 4 | 1;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rsp, regs.rflags) = (CODE, 0x8001, 1 << 18 | 2);
    vcpu.set_regs(&regs)?;
    Ok((vm, vcpu))
}

/// Keeps the calling thread on the first processor that it may use.
fn pin() -> Outcome<()> {
    // SAFETY: both calls only use the set on our stack.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let size = size_of::<libc::cpu_set_t>();
        if libc::sched_getaffinity(0, size, &raw mut set) != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        let first = (0..libc::CPU_SETSIZE as usize).find(|cpu| libc::CPU_ISSET(*cpu, &set)).unwrap_or(0);
        libc::CPU_ZERO(&mut set);
        libc::CPU_SET(first, &mut set);
        if libc::sched_setaffinity(0, size, &raw const set) != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
    }
    Ok(())
}

/// Processor time of the calling thread.
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes to our local alone.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// What the threads tell each other.
#[derive(Default)]
struct Shared {
    /// The looping guest may run.
    go: AtomicBool,
    over: AtomicBool,
    /// The looping guest's thread is not in KVM_RUN.
    parked: AtomicBool,
    thread: AtomicU64,
    /// Processor time that it has spent in KVM_RUN, in nanoseconds, as of when it was last parked.
    used: AtomicU64,
    /// Pieces of work done.
    done: AtomicU64,
    /// When KVM_RUN of the looping guest last returned, in nanoseconds since `start`.
    returned: AtomicU64,
}

fn run_looper(vcpu: &mut VcpuFd, shared: &Shared, start: Instant) -> Outcome<()> {
    pin()?;
    // SAFETY: no preconditions.
    shared.thread.store(unsafe { libc::pthread_self() }, Ordering::SeqCst);
    while !shared.over.load(Ordering::SeqCst) {
        if !shared.go.load(Ordering::SeqCst) {
            shared.parked.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        shared.parked.store(false, Ordering::SeqCst);
        let before = thread_time();
        match vcpu.run() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => return Err(format!("unexpected exit: {other:?}").into()),
        }
        shared.returned.store(start.elapsed().as_nanos() as u64, Ordering::SeqCst);
        shared.used.fetch_add((thread_time() - before).as_nanos() as u64, Ordering::SeqCst);
    }
    Ok(())
}

/// Parks the looping guest; the time that it took in microseconds.
fn park(shared: &Shared, start: Instant) -> f64 {
    let before = shared.returned.load(Ordering::SeqCst);
    shared.go.store(false, Ordering::SeqCst);
    let sent = start.elapsed().as_nanos() as u64;
    // SAFETY: the thread lives until `over` is set.
    unsafe { libc::pthread_kill(shared.thread.load(Ordering::SeqCst), libc::SIGUSR1) };
    while !shared.parked.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    let returned = shared.returned.load(Ordering::SeqCst);
    if returned == before { 0.0 } else { returned.saturating_sub(sent) as f64 / 1e3 }
}

/// Lets it run, and waits until it does.
fn unpark(shared: &Shared) {
    shared.go.store(true, Ordering::SeqCst);
    while shared.parked.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
}

fn measure(shared: &Shared, start: Instant) {
    let turn = || {
        let (before, since) = (shared.done.load(Ordering::Relaxed), Instant::now());
        std::thread::sleep(TURN);
        (shared.done.load(Ordering::Relaxed) - before) as f64 / since.elapsed().as_secs_f64()
    };
    while shared.thread.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    // To the longest pause: 1 ms, 2 ms, 4 ms …
    unpark(shared);
    std::thread::sleep(2 * TURN);
    park(shared, start);
    let (mut kept, mut share) = (Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let alone = turn();
        let (used, since) = (shared.used.load(Ordering::SeqCst), Instant::now());
        unpark(shared);
        let together = turn();
        park(shared, start);
        let used = shared.used.load(Ordering::SeqCst) - used;
        share.push(100.0 * used as f64 / since.elapsed().as_nanos() as f64);
        kept.push(100.0 * together / alone);
    }
    let mut times = Vec::new();
    for turn in 0..SIGNALS {
        unpark(shared);
        std::thread::sleep(Duration::from_millis(1 + turn as u64 % 13));
        times.push(park(shared, start));
    }
    for list in [&mut kept, &mut share, &mut times] {
        list.sort_by(f64::total_cmp);
    }
    println!("kept {:.2}", kept[kept.len() / 2]);
    println!("share {:.3}", share[share.len() / 2]);
    println!("kill-longest {:.1}", times[times.len() - 1]);
    println!("kill {:.1}", times[times.len() / 2]);
}

fn main() -> Outcome<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(libc::SIGUSR1, nothing)?;
    let kvm = Kvm::new()?;
    let ((_vm, mut work), (_other, mut endless)) = (worker(&kvm)?, looper(&kvm)?);
    let (shared, start) = (Shared::default(), Instant::now());
    std::thread::scope(|scope| {
        let looping = scope.spawn(|| run_looper(&mut endless, &shared, start));
        let working = scope.spawn(|| -> Outcome<()> {
            pin()?;
            while !shared.over.load(Ordering::SeqCst) {
                match work.run()? {
                    VcpuExit::IoOut(..) => shared.done.fetch_add(1, Ordering::Relaxed),
                    other => return Err(format!("unexpected exit: {other:?}").into()),
                };
            }
            Ok(())
        });
        measure(&shared, start);
        shared.over.store(true, Ordering::SeqCst);
        [looping, working]
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
    })
}
