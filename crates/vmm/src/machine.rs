//! The machine: built from a [`Config`], run to its [`Report`].

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hypervisor::permissions::Beneficiary;
use hypervisor::{System, Vcpu, VcpuExit, VcpuHandle, Vm};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_msr_entry, kvm_pit_config, kvm_userspace_memory_region};
use silicon::model::cpuid::Identity;
use silicon::topology::Shape;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::assembly::{Assembly, Buses};
use crate::config::{Config, ConsoleTarget, DEFAULT_COMMAND_LINE, MAX_CPUS, MAX_DISKS};
use crate::devices::bus::{Overlap, lock};
use crate::devices::virtio::block::DiskError;
use crate::devices::{EndRequest, EndSink};
use crate::host::console::OutputHandle;
use crate::host::events::{EventLoop, HostEnd, Input, Signals};
use crate::host::sys;
use crate::host::terminal::RawMode;
use crate::loader::{self, BootSource, Entry, Image, LoadError};
use crate::machine_check::{self, Action, MachineChecks};
use crate::memory::{self, GuestMemory, MemoryError};
use crate::moving::Mover;
use crate::paging::{Paging, PagingError};
use crate::report::{Outcome, Report, Statistics};
use crate::{acpi, boot, mptable, registers};

/// IA32_MTRR_DEF_TYPE: MTRRs enabled, everything write-back, as firmware leaves it.
const MTRR_DEF_TYPE: kvm_msr_entry = kvm_msr_entry { index: 0x2ff, reserved: 0, data: 1 << 11 | 6 };

/// IA32_MISC_ENABLE, and its bit for fast string operations, which firmware sets.
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRING: u64 = 1 << 0;

/// How long the reader of the console may take nothing at the end before the rest is dropped.
const LAST_OUTPUT: Duration = Duration::from_secs(5);

/// Why a machine cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Impossible memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its pages cannot be elsewhere.
    #[error(transparent)]
    Paging(#[from] PagingError),
    /// Nothing to boot.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// No disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A file cannot be opened.
    #[error("cannot open the {what} {}: {error}", path.display())]
    Open {
        /// What it was to be.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        error: io::Error,
    },
    /// Impossible number of CPUs.
    #[error("{0} CPUs are not possible: the machine has 1 to {MAX_CPUS}")]
    Cpus(u8),
    /// Too many disks.
    #[error("{0} disks are too many: the machine takes at most {MAX_DISKS}")]
    Disks(usize),
    /// The hypervisor refused.
    #[error("hypervisor: {0}")]
    Hypervisor(#[from] hypervisor::Error),
    /// Guest memory is not where it should be.
    #[error("guest memory: {0}")]
    GuestMemory(#[from] vm_memory::GuestMemoryError),
    /// Devices collide.
    #[error("device: {0}")]
    Bus(#[from] Overlap),
    /// A virtio queue cannot be made.
    #[error("virtio: {0}")]
    Virtio(#[from] virtio_queue::Error),
    /// The host refused a resource.
    #[error("host: {0}")]
    Host(#[from] io::Error),
}

impl StartError {
    /// Whether the person's input is to blame, rather than us or the host.
    pub fn is_bad_input(&self) -> bool {
        use StartError::{Cpus, Disk, Disks, Load, Memory, Open, Paging};
        matches!(self, Memory(_) | Paging(_) | Load(_) | Disk(_) | Open { .. } | Cpus(_) | Disks(_))
    }
}

/// What ends a machine: the first reason counts, and all threads hear of it.
pub struct Ender {
    outcome: Mutex<Option<Outcome>>,
    ending: AtomicBool,
    event: EventFd,
    cpus: OnceLock<Vec<Arc<VcpuHandle>>>,
    paging: OnceLock<Arc<Paging>>,
}

impl Ender {
    fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            outcome: Mutex::new(None),
            ending: AtomicBool::new(false),
            event: EventFd::new(libc::EFD_NONBLOCK)?,
            cpus: OnceLock::new(),
            paging: OnceLock::new(),
        }))
    }

    /// Ends the machine.
    fn end(&self, outcome: Outcome) {
        lock(&self.outcome).get_or_insert(outcome);
        self.ending.store(true, Ordering::SeqCst);
        if let Err(error) = self.event.write(1) {
            tracing::error!("cannot signal the machine's end: {error}");
        }
        for cpu in self.cpus.get().into_iter().flatten() {
            cpu.interrupt();
        }
        // One of them may wait for a page.
        if let Some(paging) = self.paging.get() {
            paging.end();
        }
    }

    fn ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// The devices' way to end the machine.
    fn sink(self: &Arc<Self>) -> EndSink {
        let ender = self.clone();
        Arc::new(move |request| {
            ender.end(match request {
                EndRequest::PowerOff => Outcome::PowerOff,
                EndRequest::Reset => Outcome::Reset,
                EndRequest::DebugExit(value) => Outcome::DebugExit(value),
            });
        })
    }
}

/// A machine that is ready to run.
pub struct Machine {
    config: Config,
    ender: Arc<Ender>,
    vcpus: Vec<Vcpu>,
    buses: Arc<Buses>,
    outputs: Vec<OutputHandle>,
    pending: Arc<EventFd>,
    input: Option<Input>,
    paging: Option<Arc<Paging>>,
    machine_checks: Arc<MachineChecks>,
    // Declared after everything that may refer to it: the hypervisor holds its address.
    memory: GuestMemory,
}

/// Opens a boot file.
fn open_image(what: &'static str, path: &Path) -> Result<Image<File>, StartError> {
    let fail = |error| StartError::Open { what, path: path.into(), error };
    let file = File::open(path).map_err(fail)?;
    if file.metadata().map_err(fail)?.is_dir() {
        return Err(fail(io::ErrorKind::IsADirectory.into()));
    }
    Image::new(file, path.display().to_string()).map_err(fail)
}

/// Loads kernel and firmware tables.
fn load_guest(config: &Config, virtio_devices: usize, memory: &GuestMemory) -> Result<Entry, StartError> {
    let mut kernel = open_image("kernel", &config.kernel)?;
    let mut initrd = config.initrd.as_deref().map(|path| open_image("initrd", path)).transpose()?;
    let rsdp = acpi::write(memory, &acpi::Inventory { cpus: config.cpus, virtio_devices })?;
    mptable::write(memory, config.cpus)?;
    let default = if loader::is_linux(&kernel) { DEFAULT_COMMAND_LINE } else { "" };
    let seed = match config.rng_seed {
        Some(seed) => seed,
        None => sys::random()?,
    };
    let boot = BootSource {
        command_line: config.command_line.as_deref().unwrap_or(default),
        rsdp,
        rng_seed: Some(seed),
    };
    Ok(loader::load(memory, &mut kernel, initrd.as_mut(), &boot)?)
}

/// Creates the virtual machine with its memory and interrupt controllers.
fn create_vm(system: &Arc<System>, memory: &GuestMemory) -> Result<Arc<Vm>, StartError> {
    let vm = system.create_vm()?;
    for (slot, region) in (0..).zip(memory.iter()) {
        vm.set_user_memory_region(kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        })?;
    }
    vm.create_irqchip()?;
    vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() })?;
    Ok(vm)
}

/// Creates the virtual CPUs as firmware would leave them.
fn create_vcpus(config: &Config, vm: &Arc<Vm>) -> Result<Vec<Vcpu>, StartError> {
    let (cpus, system) = (u32::from(config.cpus), vm.system());
    let shape = if system.host().smt && cpus.is_multiple_of(2) {
        Shape { sockets: 1, cores: cpus / 2, threads: 2 }
    } else {
        Shape::cores(cpus)
    };
    let mut vcpus = Vec::with_capacity(cpus as usize);
    for id in 0..cpus {
        let mut vcpu = vm.create_vcpu(id)?;
        let identity = Identity { shape, apic_id: id, ..Identity::default() };
        vcpu.set_cpuid2(&hypervisor::cpuid::for_machine(system.model(), system.host(), &identity))?;
        set_firmware_msrs(&mut vcpu);
        machine_check::set_up(&mut vcpu)?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// Sets the MSRs that firmware would have set before it starts an operating system.
fn set_firmware_msrs(vcpu: &mut Vcpu) {
    let mut misc = [kvm_msr_entry { index: MISC_ENABLE, ..kvm_msr_entry::default() }];
    let known = vcpu.get_msrs(&mut misc) == misc.len();
    misc[0].data |= FAST_STRING;
    if !known || vcpu.set_msrs(&misc) == 0 || vcpu.set_msrs(&[MTRR_DEF_TYPE]) == 0 {
        tracing::debug!("the CPU model lacks MSRs that firmware sets");
    }
}

impl Machine {
    /// Builds a machine. Everything that bad input can cause is found here.
    pub fn new(config: Config) -> Result<Machine, StartError> {
        if config.cpus == 0 || config.cpus > MAX_CPUS {
            return Err(StartError::Cpus(config.cpus));
        }
        if config.disks.len() > MAX_DISKS {
            return Err(StartError::Disks(config.disks.len()));
        }
        let memory = memory::allocate(config.memory)?;
        let ender = Ender::new()?;
        let system = System::new(config.cpu_model.clone(), config.host.clone());
        system.permissions().request_all(Beneficiary::Guests);
        // Before there are slots: they are made of memory that can be elsewhere.
        let paging = config.paging.map(|paging| Paging::new(&memory, paging)).transpose()?;
        let vm = create_vm(&system, &memory)?;
        let machine_checks = Arc::<MachineChecks>::default();
        let mut assembly = Assembly::new(&config, &vm, &memory, &ender.event, ender.sink())?;
        if let Some(paging) = &paging {
            assembly.attach_memory(&vm, paging, &machine_checks)?;
            ender.paging.get_or_init(|| paging.clone());
        }
        // Reading the kernel and making the CPUs take about the same time, and neither needs the other.
        let (entry, vcpus) = thread::scope(|scope| {
            let loading = scope.spawn(|| load_guest(&config, assembly.virtio_devices, &memory));
            let vcpus = create_vcpus(&config, &vm);
            (loading.join().unwrap_or_else(|panic| resume_unwind(panic)), vcpus)
        });
        let (entry, mut vcpus) = (entry?, vcpus?);
        if let Some(first) = vcpus.first_mut() {
            let (regs, sregs) = boot::registers(&memory, entry, first.sregs())?;
            first.set_sregs(&sregs)?;
            first.set_regs(&regs);
        }
        machine_checks.set_cpus(&vcpus);
        ender.cpus.get_or_init(|| vcpus.iter().map(Vcpu::handle).collect());
        let Assembly { buses, outputs, pending, input, .. } = assembly;
        let buses = Arc::new(buses);
        Ok(Machine { config, ender, vcpus, buses, outputs, pending, input, paging, machine_checks, memory })
    }

    /// Runs the machine to its end. Every thread has ended and the terminal is as it was when this returns.
    pub fn run(mut self) -> Result<Report, StartError> {
        let signals = Signals::catch()?;
        let raw_mode = match (&self.config.serial, self.input.as_ref().and_then(|i| i.source.as_ref())) {
            (ConsoleTarget::Stdio, Some(source)) => RawMode::enter(source)?,
            _ => None,
        };
        let handles: Vec<_> = self.vcpus.iter().map(Vcpu::handle).collect();
        let startup = self.config.started.elapsed();
        let begin = Instant::now();
        let mut threads = Vec::new();
        let quit = EventFd::new(libc::EFD_NONBLOCK)?;
        let pager = self.paging.as_ref().map(|paging| {
            let ender = self.ender.clone();
            let failed =
                move |error| ender.end(internal(0, format!("no pages are brought any more: {error}")));
            paging.start(quit.try_clone()?, failed)
        });
        let pager = pager.transpose()?;
        let mover = Arc::new(Mover::default());
        if let Some(every) = self.config.move_every {
            let (mover, cpus, ender) = (mover.clone(), handles.clone(), self.ender.clone());
            let body = move || mover.run(every, &cpus, || ender.ending());
            threads.push(thread::Builder::new().name("mover".into()).spawn(body)?);
        }
        match self.start_events(signals) {
            Ok(thread) => threads.push(thread),
            Err(error) => self.ender.end(internal(0, format!("cannot start a thread: {error}"))),
        }
        for vcpu in std::mem::take(&mut self.vcpus) {
            let surroundings = Surroundings {
                buses: self.buses.clone(),
                ender: self.ender.clone(),
                mover: mover.clone(),
                machine_checks: self.machine_checks.clone(),
            };
            match start_vcpu(vcpu, surroundings) {
                Ok(thread) => threads.push(thread),
                Err(error) => self.ender.end(internal(0, format!("cannot start a thread: {error}"))),
            }
        }
        for thread in threads {
            // Panics of virtual CPUs are reported where they happen; the event thread has nothing to report.
            if thread.join().is_err() {
                tracing::error!("a thread of the machine panicked");
            }
        }
        let wall = begin.elapsed();
        if let Some(pager) = pager {
            quit.write(1)?;
            if pager.join().is_err() {
                tracing::error!("the pager panicked");
            }
        }
        drop(raw_mode);
        let outcome = lock(&self.ender.outcome).take();
        let outcome = outcome.unwrap_or_else(|| internal(0, "the machine ended without a reason".into()));
        let patience = if matches!(outcome, Outcome::Host(_)) { Duration::ZERO } else { LAST_OUTPUT };
        for output in &self.outputs {
            output.finish(patience);
        }
        let moves = mover.moves.load(Ordering::Relaxed);
        let brought = self.paging.as_ref().map_or(0, |paging| paging.brought());
        let statistics =
            Statistics { moves, brought, ..statistics(&handles, startup, wall, memory_size(&self.memory)) };
        Ok(Report { outcome, statistics })
    }

    fn start_events(&mut self, signals: Signals) -> io::Result<JoinHandle<()>> {
        let ender = self.ender.clone();
        let events = EventLoop {
            stop: self.ender.event.try_clone()?,
            pending: self.pending.clone(),
            outputs: self.outputs.clone(),
            signals,
            input: self.input.take(),
            end: Box::new(move |reason: HostEnd| ender.end(Outcome::Host(reason))),
        };
        thread::Builder::new().name("events".into()).spawn(move || events.run())
    }
}

fn internal(cpu: u32, reason: String) -> Outcome {
    Outcome::InternalError { cpu, reason, registers: String::new() }
}

fn memory_size(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// What a virtual CPU has around it.
struct Surroundings {
    buses: Arc<Buses>,
    ender: Arc<Ender>,
    mover: Arc<Mover>,
    machine_checks: Arc<MachineChecks>,
}

fn start_vcpu(vcpu: Vcpu, surroundings: Surroundings) -> io::Result<JoinHandle<()>> {
    let id = vcpu.handle().id();
    thread::Builder::new().name(format!("vcpu{id}")).spawn(move || {
        let mut vcpu = vcpu;
        let run = catch_unwind(AssertUnwindSafe(|| run_vcpu(&mut vcpu, &surroundings)));
        if let Err(panic) = run {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown");
            let reason = format!("the virtual CPU's thread panicked: {text}");
            let registers = registers::dump(&mut vcpu);
            surroundings.ender.end(Outcome::InternalError { cpu: id, reason, registers });
        }
    })
}

/// Runs a virtual CPU until the machine ends.
fn run_vcpu(vcpu: &mut Vcpu, surroundings: &Surroundings) {
    let Surroundings { buses, ender, mover, machine_checks } = surroundings;
    let cpu = vcpu.handle().id();
    let mut moved = 0;
    while !ender.ending() {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            Err(hypervisor::Error::Interrupted | hypervisor::Error::Again) => {
                vcpu.handle().settle();
                match mover.attend(vcpu, &mut moved).and_then(|()| machine_checks.attend(vcpu)) {
                    Ok(()) => continue,
                    Err(error) => {
                        let reason = format!("its state cannot be set: {error}");
                        let registers = registers::dump(vcpu);
                        return ender.end(Outcome::InternalError { cpu, reason, registers });
                    }
                }
            }
            Err(error) => {
                let told = match error {
                    hypervisor::Error::MemoryFailed { gpa, .. } => {
                        machine_checks.tell(vcpu, gpa, Action::Required)
                    }
                    other => Err(other),
                };
                let Err(error) = told else { continue };
                let registers = registers::dump(vcpu);
                return ender.end(Outcome::InternalError { cpu, reason: error.to_string(), registers });
            }
        };
        let reason = match exit {
            VcpuExit::Io { port, size, write } => {
                let value = access(&buses.ports, port.into(), size, write.map(u64::from));
                vcpu.complete(value);
                if let Err(error) = machine_checks.tell_found(vcpu) {
                    tracing::error!("the guest cannot be told of failed memory: {error}");
                }
                continue;
            }
            VcpuExit::Mmio { gpa, size, write } => {
                let value = access(&buses.memory, gpa, size, write);
                vcpu.complete(value);
                continue;
            }
            VcpuExit::Shutdown => {
                return ender.end(Outcome::TripleFault { cpu, registers: registers::dump(vcpu) });
            }
            VcpuExit::SplitLock(_) => {
                return ender.end(Outcome::Host(HostEnd::Signal(libc::SIGBUS)));
            }
            VcpuExit::InternalError(error) => {
                format!("the guest executes instructions at {:#x}, where there is no memory", error.gpa)
            }
            VcpuExit::Crash(crash) => {
                format!(
                    "the guest cannot go on: {:?} at guest-physical address {:#x}",
                    crash.reason, crash.gpa
                )
            }
            VcpuExit::Notify(exit) => {
                format!("the processor has lost the guest's context at {:#x}", exit.rip)
            }
            _ => format!("unexpected exit {exit:?}"),
        };
        return ender.end(Outcome::InternalError { cpu, reason, registers: registers::dump(vcpu) });
    }
}

fn access(bus: &crate::devices::bus::Bus, address: u64, size: u8, write: Option<u64>) -> u64 {
    match write {
        Some(value) => {
            bus.write(address, size, value);
            0
        }
        None => bus.read(address, size),
    }
}

fn statistics(cpus: &[Arc<VcpuHandle>], startup: Duration, wall: Duration, guest_memory: u64) -> Statistics {
    let mut exits: Vec<(&'static str, u64)> = Vec::new();
    for (name, count) in cpus.iter().flat_map(|cpu| cpu.stats.exits()) {
        match exits.iter_mut().find(|row| row.0 == name) {
            Some(row) => row.1 += count,
            None => exits.push((name, count)),
        }
    }
    exits.sort_by_key(|&(name, count)| (std::cmp::Reverse(count), name));
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    Statistics {
        startup,
        wall,
        cpu: sys::process_cpu_time(),
        instructions: cpus.iter().map(|cpu| load(&cpu.stats.instructions)).collect(),
        exits,
        interrupts: cpus.iter().map(|cpu| load(&cpu.stats.interrupts)).sum(),
        halts: cpus.iter().map(|cpu| load(&cpu.stats.halts)).sum(),
        bus_locks: cpus.iter().map(|cpu| load(&cpu.stats.bus_locks)).sum(),
        split_locks: split_locks(cpus),
        throttled: Duration::from_nanos(cpus.iter().map(|cpu| load(&cpu.stats.split_lock_throttle)).sum()),
        guest_memory,
        moves: 0,
        brought: 0,
        peak_resident: peak_resident(),
    }
}

/// Split locks of all virtual CPUs, by what became of them.
fn split_locks(cpus: &[Arc<VcpuHandle>]) -> Vec<(&'static str, u64)> {
    let mut sum: Vec<(&'static str, u64)> = Vec::new();
    for (name, count) in cpus.iter().flat_map(|cpu| cpu.stats.split_locks()) {
        match sum.iter_mut().find(|row| row.0 == name) {
            Some(row) => row.1 += count,
            None => sum.push((name, count)),
        }
    }
    sum
}

/// The process's high-water mark of resident memory (proc(5), VmHWM).
fn peak_resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// A copy of one of the process's standard streams.
pub(crate) fn duplicate(stream: impl AsFd) -> io::Result<File> {
    Ok(File::from(stream.as_fd().try_clone_to_owned()?))
}
