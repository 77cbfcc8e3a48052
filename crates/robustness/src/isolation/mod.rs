//! Isolation: whatever instructions a guest executes, nothing changes outside its memory and what host code may write of its vCPU.
//!
//! Guests run on the translator in a process with one thread. Around stays in host code ([`silicon::translate::Watcher`]) all pages of the
//! process are compared ([`pages`]), and every fault is looked at ([`faults`]). docs/robustness.md says what is left out, and why.
#![expect(unsafe_code, reason = "has vCPUs be watched")]

mod faults;
mod mappings;
mod own;
mod pages;
mod watch;
mod wild;

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use conformance::rng::{Rng, mix};
use hypervisor::{Error, HostParams, System, Vcpu, VcpuExit, Vm};
use silicon::model::CpuModel;

use self::mappings::Span;
pub use self::pages::Change;
pub use self::watch::{Finding, Watched};
use self::watch::{Plant, Watch};
use crate::image::{Contents, Image};
use crate::kinds::{Generators, Kind};
use crate::machine::Mode;
use crate::memory::GuestMemory;
use crate::process::Held;
use crate::run::{MODELS, answer, machine, prepare};

/// Where guests come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Code that translates well, on pointers to everywhere: the process's own memory, addresses that are not canonical, the
    /// ends of pages.
    Wild,
    /// One of the other random guests, mostly in 64-bit mode.
    Image(Kind),
}

impl Source {
    /// Those that come to translated code with one vCPU, and their shares in percent.
    const ALL: [(Source, u64); 7] = [
        (Source::Wild, 54),
        (Source::Image(Kind::Instructions), 10),
        (Source::Image(Kind::Tables), 14),
        (Source::Image(Kind::Selfmod), 8),
        (Source::Image(Kind::State), 4),
        (Source::Image(Kind::Strings), 2),
        (Source::Image(Kind::Kernel), 8),
    ];

    /// The source of guest `seed` in a mixed run.
    pub fn of(seed: u64) -> Source {
        let mut left = mix(seed ^ 0x7769_6c64) % 100;
        let mut fits = |share| {
            let fits = left < share;
            left = left.saturating_sub(share);
            fits
        };
        Source::ALL.iter().find(|(_, share)| fits(*share)).map_or(Source::Wild, |(source, _)| *source)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Wild => f.pad("wild"),
            Source::Image(kind) => f.pad(kind.name()),
        }
    }
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Source, String> {
        let names = || Source::ALL.map(|(source, _)| source.to_string()).join(", ");
        (Source::ALL.iter().map(|(source, _)| *source).find(|source| source.to_string() == text))
            .ok_or_else(|| format!("'{text}' is none of {}", names()))
    }
}

/// What is done on purpose, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// A byte on the heap changes while host code runs.
    Heap,
    /// A byte of the stack above where host code begins.
    Stack,
    /// A field of the vCPU that host code has no business with: CR2.
    Field,
    /// A byte of a page that was never touched.
    Fresh,
    /// A constant of the program.
    Constant,
    /// A byte right before guest memory.
    Canary,
    /// Host code writes guest memory that the watcher has not been told of.
    Untold,
    /// Host code accesses guest memory that the watcher has not been told of, and the host has it protected.
    Protected,
}

impl Break {
    /// All of them, with their names.
    pub const ALL: [(Break, &str); 8] = [
        (Break::Heap, "heap"),
        (Break::Stack, "stack"),
        (Break::Field, "field"),
        (Break::Fresh, "fresh"),
        (Break::Constant, "constant"),
        (Break::Canary, "canary"),
        (Break::Untold, "untold"),
        (Break::Protected, "protected"),
    ];
}

impl FromStr for Break {
    type Err = String;

    fn from_str(text: &str) -> Result<Break, String> {
        let found = Break::ALL.iter().find(|(_, name)| *name == text);
        found.map(|(it, _)| *it).ok_or_else(|| format!("'{text}' cannot be broken"))
    }
}

/// Why a guest is no good.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It has reached what it must not.
    #[error("{0}")]
    Found(#[from] Finding),
    /// It could not be made.
    #[error("{0}")]
    Refused(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Refused(error.to_string())
    }
}

/// A constant to be changed, far from others.
static CONSTANT: [u64; 64] = [0x636f_6e73_7461_6e74; 64];

/// What guests run on. There is one in a process, on its only thread.
pub struct Bench {
    systems: Vec<Arc<System>>,
    generators: Generators,
    watch: &'static mut Watch,
    /// A byte on the heap.
    byte: Box<u8>,
    fresh: GuestMemory,
    /// Instructions completed.
    pub instructions: u64,
}

impl Bench {
    /// Machines of all models. `kernel` is the bzImage for [`Kind::Kernel`].
    pub fn new(kernel: Option<&Path>) -> Result<Bench, String> {
        let system =
            |name: &&str| CpuModel::parse(name).map(|model| System::new(model, HostParams::default()));
        let systems = MODELS.iter().map(system).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
        // Others would write their stacks at any time.
        if Held::now().threads != 1 {
            return Err("there are other threads in this process".into());
        }
        let generators = Generators::new(kernel).map_err(|e| e.to_string())?;
        let watch = Watch::new().map_err(|e| e.to_string())?;
        let fresh = GuestMemory::new(&Contents::Bytes(Vec::new())).map_err(|e| e.to_string())?;
        Ok(Bench { systems, generators, watch, byte: Box::new(0), fresh, instructions: 0 })
    }

    /// What has been watched so far.
    pub fn watched(&self) -> Watched {
        self.watch.totals()
    }

    /// Runs guest `seed` from `source`; with `broken`, it does what it must not. Its stays.
    pub fn run(&mut self, source: Source, seed: u64, broken: Option<Break>) -> Result<u64, Failure> {
        let mut rng = Rng::new(mix(seed) ^ 0x6973_6f6c);
        let mut guest = self.guest(source, seed, broken, &mut rng)?;
        let handle = guest.vcpu.handle();
        let (memory, may_change) = guest.spans(broken);
        self.watch.begin(&memory, &may_change, &handle);
        let mut local = 0u8;
        if let Some(at) = broken.and_then(|broken| self.victim(broken, &mut guest, &mut local)) {
            self.watch.plant(Plant { at, frozen: broken == Some(Break::Constant) });
        }
        // SAFETY: the watcher lives for as long as the process, does not unwind, and runs on this thread alone.
        unsafe { guest.vcpu.cpu_mut().watch_host_code(Some(self.watch.watcher())) };
        self.run_watched(&guest.vm, &mut guest.vcpu, &mut rng);
        std::hint::black_box(&local);
        let found = self.watch.end();
        self.instructions += guest.vcpu.cpu_mut().counters.instructions;
        match found {
            Some(finding) => Err(finding.into()),
            None => Ok(self.watch.stays()),
        }
    }

    /// Makes a guest.
    fn guest(
        &self,
        source: Source,
        seed: u64,
        broken: Option<Break>,
        rng: &mut Rng,
    ) -> Result<Guest, Failure> {
        let mut image = self.image(source, seed, rng);
        let system = if rng.percent(60) { 0 } else { rng.below(MODELS.len() as u64) as usize };
        let system = &self.systems[system];
        let memory = image.slots.iter().map(|slot| GuestMemory::new(&slot.contents));
        let memory =
            memory.collect::<std::io::Result<Vec<_>>>().map_err(|e| Failure::Refused(e.to_string()))?;
        // The guest has its own copy.
        image.slots.iter_mut().for_each(|slot| slot.contents = Contents::Bytes(Vec::new()));
        let vm = machine(system, &image, &memory)?;
        let mut vcpu = Box::new(vm.create_vcpu(0)?);
        if source == Source::Wild {
            wild::aim(&mut image, &memory, std::ptr::from_ref(&*vcpu) as u64, rng);
            guard(&memory, broken, rng);
        }
        prepare(&mut vcpu, system, &image.cpus[0], &image, rng);
        if source == Source::Wild || rng.percent(50) {
            // With a limit, host code leaves at each opportunity.
            vcpu.cpu_mut().controls.instruction_limit = u64::MAX;
        }
        if broken == Some(Break::Protected) {
            memory[wild::POINTERS_SLOT].protect_all();
        }
        let readonly = image.slots.iter().map(|slot| slot.readonly).collect();
        Ok(Guest { vcpu, vm, memory, readonly })
    }

    fn image(&self, source: Source, seed: u64, rng: &mut Rng) -> Image {
        let mode = rng.percent(90).then_some(Mode::Long);
        let mut image = match source {
            Source::Wild => wild::image(rng),
            Source::Image(kind) => self.generators.image_in(kind, seed, mode),
        };
        // Controllers have a thread for their timers.
        image.irqchip = false;
        image
    }

    /// The byte that changes.
    fn victim(&self, broken: Break, guest: &mut Guest, local: &mut u8) -> Option<u64> {
        Some(match broken {
            Break::Heap => std::ptr::from_ref(&*self.byte) as u64,
            Break::Stack => std::ptr::from_mut(local) as u64,
            Break::Field => &raw const guest.vcpu.cpu_mut().state.cr2 as u64,
            Break::Fresh => self.fresh.host() + 77,
            Break::Constant => &raw const CONSTANT[32] as u64,
            Break::Canary => guest.memory[0].host() - 1,
            Break::Untold | Break::Protected => return None,
        })
    }

    /// Runs the vCPU as a client does that answers everything with random data, until it has been watched enough.
    fn run_watched(&mut self, vm: &Vm, vcpu: &mut Vcpu, rng: &mut Rng) {
        let handle = vcpu.handle();
        let (mut idle, mut stays) = (0, 0);
        for _ in 0..EXITS {
            self.watch.wind();
            let exit = vcpu.run();
            if self.watch.is_done() || idle == IDLE {
                return;
            }
            idle = if self.watch.stays() == stays { idle + 1 } else { 0 };
            stays = self.watch.stays();
            match exit {
                Ok(VcpuExit::Io { .. } | VcpuExit::Mmio { .. }) => vcpu.complete(answer(rng)),
                Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => {}
                Err(_) => handle.settle(),
                Ok(VcpuExit::Shutdown) if rng.percent(50) => vcpu.reset(),
                _ => return,
            }
            match rng.below(64) {
                0 => vcpu.nmi(),
                // Refused while another waits.
                1 | 2 => drop(vcpu.interrupt(rng.next() as u8)),
                3 => drop(vm.irq_line(rng.below(24) as u32, rng.percent(50))),
                _ => {}
            }
        }
    }
}

/// A guest; its memory goes last.
struct Guest {
    vcpu: Box<Vcpu>,
    vm: Arc<Vm>,
    memory: Vec<GuestMemory>,
    /// By slot.
    readonly: Vec<bool>,
}

impl Guest {
    /// Its memory, and what may change during stays besides what the vCPU says.
    fn spans(&mut self, broken: Option<Break>) -> (Vec<Span>, Vec<Span>) {
        let span = |memory: &GuestMemory| Span::from(memory.host()..memory.host() + memory.size());
        let mut all: Vec<Span> = self.memory.iter().map(span).collect();
        let writable = all.iter().zip(&self.readonly).filter(|(_, readonly)| !**readonly);
        let mut may_change: Vec<Span> = writable.map(|(span, _)| *span).collect();
        match broken {
            Some(Break::Untold) => may_change.clear(),
            Some(Break::Protected) => all.clear(),
            _ => {}
        }
        may_change.push(bytes_of(Arc::as_ptr(&self.vcpu.cpu_mut().requests)));
        may_change.push(bytes_of(Arc::as_ptr(&self.vcpu.handle())));
        (all, may_change)
    }
}

/// Has accesses beside some slots fault: those that only read are found so, too.
fn guard(memory: &[GuestMemory], broken: Option<Break>, rng: &mut Rng) {
    memory.iter().filter(|_| broken.is_none() && rng.percent(70)).for_each(GuestMemory::protect_canaries);
}

/// Exits that a guest may make, and those in a row without host code.
const EXITS: u32 = 400;
const IDLE: u32 = 8;

fn bytes_of<T>(at: *const T) -> Span {
    Span::from(at as u64..at as u64 + size_of::<T>() as u64)
}
