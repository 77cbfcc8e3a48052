//! Random ioctls: valid and senseless calls with hostile structures and pointers, from several threads at once, on VMs
//! whose vCPUs run meanwhile.
//!
//! A session makes a system, and lets threads make calls on what they find in a common pool of objects. Guest memory
//! lies in one arena: a client may hand its whole address space to a guest, so what lies outside is left out of
//! the game, or is no user memory at all. Pages of guest memory come and go while guests run.
#![expect(unsafe_code, reason = "maps the arena, and looks at the process's own memory map")]

use std::fs;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use abi::ioctl::{Direction, IOCTLS, Ioctl, ioctl};
use abi::{Argument, Created, Object, Reply, VcpuObject};
use conformance::rng::Rng;
use hypervisor::memory::catch_absence;
use hypervisor::{HostParams, System};
use silicon::model::CpuModel;

/// Bytes of the arena. Its first half is for structures, its second for guest memory.
const ARENA: usize = 8 << 20;
const PAGE: u64 = 4096;
/// Objects that a pool keeps.
const POOL: usize = 24;
/// Threads of a session.
const THREADS: u64 = 3;
/// A call that takes longer hangs; vCPUs are interrupted every few milliseconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often running vCPUs are interrupted.
const TICK: Duration = Duration::from_millis(2);
/// KVM_SET_USER_MEMORY_REGION and KVM_SET_USER_MEMORY_REGION2.
const MEMORY_REGION: [u8; 2] = [0x46, 0x49];
/// KVM_SMI. Without SMRAM it is the end of the VM, which is dull if it happens to all of them soon.
const SMI: u8 = 0xb7;

/// Memory that calls point into, with an inaccessible page behind it.
#[derive(Clone, Copy, Debug)]
pub struct Arena(u64);

impl Arena {
    /// Maps one, for as long as the process lives.
    pub fn new() -> Option<Arena> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // Populated, so that what guests touch of it is not taken for growth.
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        // SAFETY: new mappings at addresses of the kernel's choice; the last page is part of the first one.
        unsafe {
            let at = libc::mmap(std::ptr::null_mut(), ARENA + PAGE as usize, protection, flags, -1, 0);
            let guard = at.cast::<u8>().wrapping_add(ARENA);
            let mapped =
                at != libc::MAP_FAILED && libc::mprotect(guard.cast(), PAGE as usize, libc::PROT_NONE) == 0;
            mapped.then_some(Arena(at as u64))
        }
    }

    /// Makes the guests' half one piece of memory again. What sessions have done to it is theirs, and no growth.
    pub fn mend(self) {
        let (rw, at) = (libc::PROT_READ | libc::PROT_WRITE, self.0 as usize + ARENA / 2);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_POPULATE;
        // SAFETY: part of the arena; between sessions nobody looks at it.
        unsafe { libc::mmap(at as *mut libc::c_void, ARENA / 2, rw, flags, -1, 0) };
    }

    fn range(self) -> Range<u64> {
        self.0..self.0 + ARENA as u64
    }

    /// Writes random bytes, most of them zero or small, to `len` bytes at `at`, which lie in the arena's first half.
    fn scribble(self, rng: &mut Rng, at: u64, len: u64) {
        let noisy = rng.percent(50);
        for word in (0..len.div_ceil(4)).map(|i| at + i * 4).filter(|w| w + 4 <= self.0 + ARENA as u64) {
            let value = match rng.below(if noisy { 8 } else { 24 }) {
                0 => rng.next() as u32,
                1 => u32::MAX,
                2 => rng.below(256) as u32,
                3 => 1 << rng.below(32),
                4 => (rng.below(0x200) * PAGE) as u32,
                _ => 0,
            };
            // SAFETY: the word lies in the arena, which stays mapped; others may write it too, as clients do.
            unsafe { (word as *mut u32).write_volatile(value) };
        }
    }

    fn read(self, at: u64) -> u64 {
        // SAFETY: callers pass addresses of whole words in the arena.
        unsafe { (at as *const u64).read_unaligned() }
    }

    fn write(self, at: u64, value: u64) {
        // SAFETY: as in `read`.
        unsafe { (at as *mut u64).write_unaligned(value) };
    }
}

/// Where the process keeps what no client may see: heap, stacks, libraries.
fn own_memory(arena: Arena) -> Vec<Range<u64>> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let line = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        let range = u64::from_str_radix(from, 16).ok()?..u64::from_str_radix(to, 16).ok()?;
        let ours = range.start < arena.range().end && range.end > arena.range().start;
        (!ours && rest.starts_with('r')).then_some(range)
    };
    maps.lines().filter_map(line).collect()
}

/// What all threads of a session share.
struct Session {
    arena: Arena,
    pool: Mutex<Vec<Object>>,
    hidden: Vec<Range<u64>>,
    /// When each thread's call began, in milliseconds from `started`; 0 for none.
    calling: [AtomicU64; THREADS as usize],
    /// What each thread makes its call on; it may have left the pool.
    objects: [Mutex<Option<Object>>; THREADS as usize],
    started: Instant,
    over: AtomicBool,
    calls: AtomicU64,
    leak: Mutex<Option<String>>,
}

/// What came of a session.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Calls made.
    pub calls: u64,
    /// What went wrong.
    pub failure: Option<String>,
}

/// Runs one session of `calls` calls by each of its threads.
pub fn session(seed: u64, calls: u64, arena: Arena) -> Outcome {
    catch_absence();
    let system = System::new(CpuModel::default(), HostParams::default());
    let Ok(Created { object, .. }) = Created::system(system) else {
        return Outcome { calls: 0, failure: Some("no system".into()) };
    };
    let session = Session {
        arena,
        pool: Mutex::new(vec![object]),
        hidden: own_memory(arena),
        calling: Default::default(),
        objects: Default::default(),
        started: Instant::now(),
        over: AtomicBool::new(false),
        calls: AtomicU64::new(0),
        leak: Mutex::new(None),
    };
    let hang = std::thread::scope(|scope| {
        let watch = scope.spawn(|| session.watch());
        let threads: Vec<_> = (0..THREADS)
            .map(|i| {
                scope.spawn({
                    let session = &session;
                    move || session.thread(&mut Rng::new(seed.wrapping_mul(THREADS) + i), i, calls)
                })
            })
            .collect();
        let died = threads.into_iter().filter_map(|thread| thread.join().err()).count();
        session.over.store(true, Ordering::SeqCst);
        let hang = watch.join().unwrap_or_default();
        if died == 0 { hang } else { Some("a thread panicked".to_string()) }
    });
    let leak = session.leak.lock().unwrap_or_else(PoisonError::into_inner).take();
    Outcome { calls: session.calls.load(Ordering::Relaxed), failure: hang.or(leak) }
}

impl Session {
    fn pool(&self) -> std::sync::MutexGuard<'_, Vec<Object>> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vcpus(&self) -> Vec<Arc<VcpuObject>> {
        let vcpu = |object| if let Some(Object::Vcpu(vcpu)) = object { Some(vcpu) } else { None };
        let objects =
            self.objects.iter().map(|object| object.lock().unwrap_or_else(PoisonError::into_inner).clone());
        objects.filter_map(vcpu).collect()
    }

    /// Interrupts running vCPUs, and ends the process if a call does not come back: nothing less would end it.
    fn watch(&self) -> Option<String> {
        while !self.over.load(Ordering::SeqCst) {
            std::thread::sleep(TICK);
            let vcpus = self.vcpus();
            vcpus.iter().for_each(|vcpu| vcpu.interrupt());
            std::thread::sleep(TICK);
            vcpus.iter().for_each(|vcpu| vcpu.settle());
            let now = self.started.elapsed().as_millis() as u64;
            for began in self.calling.iter().map(|c| c.load(Ordering::SeqCst)).filter(|began| *began != 0) {
                if now.saturating_sub(began) > PATIENCE.as_millis() as u64 {
                    eprintln!("a call does not come back");
                    std::process::exit(crate::watch::HUNG);
                }
            }
        }
        None
    }

    fn thread(&self, rng: &mut Rng, number: u64, calls: u64) {
        for _ in 0..calls {
            let object = {
                let pool = self.pool();
                // New objects are found more often: a pool with an old VM and no vCPU is dull.
                let recent = pool.len() - pool.len().min(6);
                let from = if rng.percent(70) { recent } else { 0 };
                pool[from + rng.below((pool.len() - from) as u64) as usize].clone()
            };
            let began = self.started.elapsed().as_millis() as u64 | 1;
            self.calling[number as usize].store(began, Ordering::SeqCst);
            *self.objects[number as usize].lock().unwrap_or_else(PoisonError::into_inner) =
                Some(object.clone());
            let reply = self.call(rng, number, &object);
            self.calling[number as usize].store(0, Ordering::SeqCst);
            self.objects[number as usize].lock().unwrap_or_else(PoisonError::into_inner).take();
            self.calls.fetch_add(1, Ordering::Relaxed);
            if let Some(Reply::Created(created)) = reply {
                let mut pool = self.pool();
                if pool.len() >= POOL {
                    // The system stays.
                    let gone = 1 + rng.below(pool.len() as u64 - 1) as usize;
                    pool.swap_remove(gone);
                }
                pool.push(created.object);
            }
        }
    }

    /// Takes some of the guests' memory away, or gives it back.
    fn take_memory(&self, rng: &mut Rng) {
        let half = ARENA as u64 / 2;
        let pages = half / PAGE;
        let first = rng.below(pages);
        let size = ((1 + rng.below(64)).min(pages - first) * PAGE) as usize;
        let at = (self.arena.0 + half + first * PAGE) as *mut libc::c_void;
        let (rw, anonymous) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: part of the arena that guests alone reach, and nothing is ever unmapped there: others could get the
        // addresses.
        unsafe {
            match rng.below(5) {
                0 => libc::mprotect(at, size, libc::PROT_NONE),
                1 => libc::mprotect(at, size, libc::PROT_READ),
                2 => {
                    // Beyond the end of a file that is empty.
                    let file = libc::memfd_create(c"empty".as_ptr(), libc::MFD_CLOEXEC);
                    libc::mmap(at, size, rw, libc::MAP_SHARED | libc::MAP_FIXED, file, 0);
                    libc::close(file)
                }
                3 => libc::mprotect(at, size, rw),
                _ => {
                    libc::mmap(at, size, rw, anonymous | libc::MAP_FIXED | libc::MAP_POPULATE, -1, 0);
                    0
                }
            };
        }
    }

    /// Makes one call on `object`.
    fn call(&self, rng: &mut Rng, number: u64, object: &Object) -> Option<Reply> {
        if rng.percent(2) {
            self.take_memory(rng);
        }
        if rng.percent(2) {
            return ioctl(object, rng.next() as u32, Argument(rng.next())).ok();
        }
        let fitting: Vec<&Ioctl> = if rng.percent(90) {
            IOCTLS.iter().filter(|row| row.handler.takes(object)).collect()
        } else {
            IOCTLS.iter().collect()
        };
        let row = fitting[rng.below(fitting.len() as u64) as usize];
        if row.nr == SMI && rng.percent(70) {
            return None;
        }
        let mut command = row.number();
        if rng.percent(2) {
            command ^= 1 << rng.below(32);
        }
        if command != row.number() && MEMORY_REGION.contains(&(command as u8)) {
            return None;
        }
        // Each thread has its own part of the first half, so that structures race only when they are meant to.
        let part = ARENA as u64 / 2 / THREADS / PAGE * PAGE;
        let region = MEMORY_REGION.contains(&(command as u8));
        let owner = if region || rng.percent(95) { number } else { rng.below(THREADS) };
        // Memory regions have a place that nobody else writes: what they were tamed to stays so.
        let buffer = self.arena.0 + owner * part + if region { part / 2 } else { 0 } + rng.below(64) * 16;
        let argument = match (row.direction, rng.below(40)) {
            (_, 0) => rng.next(),
            (_, 1) => 0,
            // The structure ends beyond the arena. (A shorter one may lie within its end, which guests write: a memory
            // region there would be of their making.)
            (_, 2) => self.arena.range().end - rng.below(if region { 24 } else { 64 }),
            (_, 3) => 0xffff_8000_0000_0000 | rng.next() >> 17,
            (Direction::Value, 4) => rng.below(1 << 20),
            (Direction::Value, 5..12) => rng.below(8),
            (Direction::Value, _) => 0,
            _ => buffer,
        };
        let length = row.size as u64 + 512;
        if argument == buffer {
            self.arena.scribble(rng, buffer, length);
            if region {
                self.tame_region(rng, buffer);
            }
        }
        let reply = ioctl(object, command, Argument(argument));
        if argument == buffer && matches!(row.direction, Direction::Out | Direction::InOut) && reply.is_ok() {
            self.look_for_leaks(row.name, buffer, length);
        }
        reply.ok()
    }

    /// Gives a memory region host memory of the arena's second half, or none that a process can have.
    fn tame_region(&self, rng: &mut Rng, at: u64) {
        const SLOT_AND_FLAGS: u64 = 0;
        const GPA: u64 = 8;
        const SIZE: u64 = 16;
        const HOST: u64 = 24;
        let half = ARENA as u64 / 2;
        if rng.percent(70) {
            let space = u64::from(rng.percent(40)) << 16;
            self.arena.write(at + SLOT_AND_FLAGS, space | rng.below(6) | rng.below(4) << 32);
            self.arena.write(at + GPA, rng.below(64) * PAGE * if rng.percent(90) { 16 } else { 0x1_0000 });
            self.arena.write(at + SIZE, rng.below(half / PAGE) * PAGE);
        }
        let size = self.arena.read(at + SIZE);
        let host = match half.checked_sub(size) {
            Some(room) => self.arena.0 + half + rng.below(room / PAGE + 1) * PAGE,
            None => 0xffff_8000_0000_0000,
        };
        self.arena.write(at + HOST, host);
    }

    /// A value that is an address of the process's own memory came from there: the arguments have none.
    fn look_for_leaks(&self, name: &str, buffer: u64, length: u64) {
        for at in (0..length / 8).map(|i| buffer + i * 8) {
            let value = self.arena.read(at);
            if self.hidden.iter().any(|range| range.contains(&value)) {
                let text = format!("{name} gives the address {value:#x} at offset {:#x}", at - buffer);
                *self.leak.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
            }
        }
    }
}
