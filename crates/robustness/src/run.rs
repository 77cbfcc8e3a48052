//! Runs one image.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use conformance::rng::Rng;
use hypervisor::{Error, HostParams, System, Vcpu, VcpuExit, Vm};
use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry, kvm_pit_config, kvm_userspace_memory_region};
use silicon::model::CpuModel;

use crate::image::{Image, Start};
use crate::memory::GuestMemory;
use crate::watch::Watchdog;

/// Processor models that guests run on.
pub(crate) const MODELS: [&str; 5] = ["max", "sapphire-rapids", "skylake", "haswell", "nehalem"];
/// Exits to user space that a guest may make.
const EXITS_MAX: u32 = 4000;
/// Every word of the guards beside a vCPU.
const CANARY: u64 = 0xfeed_5eed_c0de_d00d;

/// What is wrong with the processor: no guest may cause any of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A panic.
    #[error("panic: {0}")]
    Panic(String),
    /// A write beside guest memory.
    #[error("host memory beside slot {0} was written")]
    GuestGuard(usize),
    /// A write beside the vCPU.
    #[error("host memory beside vCPU {0} was written")]
    CpuGuard(usize),
    /// A call that must succeed did not.
    #[error("{0}")]
    Refused(String),
}

/// What images did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Images run.
    pub images: u64,
    /// Instructions completed.
    pub instructions: u64,
    /// Exceptions delivered.
    pub exceptions: u64,
    /// Exits to user space.
    pub exits: u64,
    /// Images that ended by a triple fault.
    pub shutdowns: u64,
}

impl Totals {
    /// Adds another count.
    pub fn add(&mut self, other: &Totals) {
        self.images += other.images;
        self.instructions += other.instructions;
        self.exceptions += other.exceptions;
        self.exits += other.exits;
        self.shutdowns += other.shutdowns;
    }
}

/// A vCPU between guards.
#[repr(C)]
struct Guarded {
    before: [u64; 64],
    vcpu: Vcpu,
    after: [u64; 64],
}

impl Guarded {
    fn new(vcpu: Vcpu) -> Box<Guarded> {
        Box::new(Guarded { before: [CANARY; 64], vcpu, after: [CANARY; 64] })
    }

    fn intact(&self) -> bool {
        let (before, after) = (std::hint::black_box(&self.before), std::hint::black_box(&self.after));
        before.iter().chain(after).all(|word| *word == CANARY)
    }
}

/// What images run on.
pub struct Bench {
    systems: Vec<Arc<System>>,
    watchdog: Watchdog,
}

impl Bench {
    /// Machines of all models.
    pub fn new(watchdog: Watchdog) -> Result<Bench, String> {
        let system =
            |name: &&str| CpuModel::parse(name).map(|model| System::new(model, HostParams::default()));
        let systems = MODELS.iter().map(system).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
        Ok(Bench { systems, watchdog })
    }

    /// The watchdog.
    pub fn watchdog(&self) -> &Watchdog {
        &self.watchdog
    }

    /// Runs `image`; everything else that is random comes from `seed`. `label` names it in messages. It is kicked
    /// after `patience`.
    pub fn run(&self, image: &Image, seed: u64, label: &str, patience: Duration) -> Result<Totals, Failure> {
        let mut rng = Rng::new(seed ^ 0x72756e);
        let system = if rng.percent(60) { &self.systems[0] } else { &self.systems[rng.below(5) as usize] };
        let refused = |e: &dyn std::fmt::Display| Failure::Refused(e.to_string());
        let memory =
            (image.slots.iter().map(|slot| GuestMemory::new(&slot.contents)).collect::<Result<Vec<_>, _>>())
                .map_err(|e| refused(&e))?;
        let vm = machine(system, image, &memory).map_err(|e| refused(&e))?;
        let mut vcpus = Vec::new();
        for (id, start) in (0..).zip(&image.cpus) {
            let mut vcpu = vm.create_vcpu(id).map_err(|e| refused(&e))?;
            prepare(&mut vcpu, system, start, image, &mut rng);
            vcpus.push(Guarded::new(vcpu));
        }
        self.watchdog.watch(label, vm.vcpus(), patience);
        let totals = run_all(&vm, &mut vcpus, &mut rng);
        self.watchdog.done();
        let mut totals = totals?;
        totals.images = 1;
        if let Some(i) = vcpus.iter().position(|vcpu| !vcpu.intact()) {
            return Err(Failure::CpuGuard(i));
        }
        drop((vcpus, vm));
        match memory.iter().position(|memory| !memory.canaries_live()) {
            Some(i) => Err(Failure::GuestGuard(i)),
            None => Ok(totals),
        }
    }
}

pub(crate) fn machine(system: &Arc<System>, image: &Image, memory: &[GuestMemory]) -> Result<Arc<Vm>, Error> {
    let vm = system.create_vm()?;
    for (slot, (what, memory)) in (0..).zip(image.slots.iter().zip(memory)) {
        vm.set_user_memory_region(kvm_userspace_memory_region {
            slot,
            flags: if what.readonly { kvm_bindings::KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: what.gpa,
            memory_size: memory.size(),
            userspace_addr: memory.host(),
        })?;
    }
    if image.irqchip {
        vm.create_irqchip()?;
        vm.create_pit2(kvm_pit_config::default())?;
    }
    Ok(vm)
}

/// Gives the vCPU its starting state. The setters may refuse what is no valid state.
pub(crate) fn prepare(vcpu: &mut Vcpu, system: &System, start: &Start, image: &Image, rng: &mut Rng) {
    let mut cpuid = system.supported_cpuid();
    for entry in &mut cpuid {
        if rng.percent(image.cripple) {
            cripple(entry, rng);
        }
    }
    // One that contradicts itself is refused, and the processor stays as it is.
    let _ = vcpu.set_cpuid2(&cpuid);
    if let Some(sregs) = &start.sregs {
        let mut sregs = **sregs;
        sregs.apic_base = vcpu.sregs().apic_base;
        let _ = vcpu.set_sregs(&sregs);
    }
    for &(index, data) in &start.msrs {
        vcpu.set_msrs(&[kvm_msr_entry { index, data, ..kvm_msr_entry::default() }]);
    }
    if let Some(fpu) = &start.fpu {
        vcpu.set_fpu(fpu);
    }
    if let Some(debugregs) = &start.debugregs {
        let _ = vcpu.set_debugregs(debugregs);
    }
    let cpu = vcpu.cpu_mut();
    if let Some(xcr0) = start.xcr0.filter(|xcr0| cpu.features.valid_xcr0(*xcr0)) {
        cpu.state.xcr0 = xcr0;
    }
    if let Some(seed) = start.vectors {
        let mut rng = Rng::new(seed);
        cpu.state.zmm.iter_mut().for_each(|register| rng.fill(&mut register.0));
        cpu.state.k.iter_mut().for_each(|mask| *mask = rng.next());
    }
    cpu.refresh_mode();
    cpu.controls.instruction_limit = image.limit;
    if let Some(regs) = &start.regs {
        vcpu.set_regs(regs);
    }
}

/// Takes bits away.
fn cripple(entry: &mut kvm_cpuid_entry2, rng: &mut Rng) {
    match rng.below(4) {
        0 => entry.eax &= rng.next() as u32,
        1 => entry.ebx &= rng.next() as u32,
        2 => entry.ecx &= rng.next() as u32,
        _ => entry.edx &= rng.next() as u32,
    }
}

/// Runs all vCPUs, each on its own thread if there are several.
fn run_all(vm: &Vm, vcpus: &mut [Box<Guarded>], rng: &mut Rng) -> Result<Totals, Failure> {
    if let [only] = vcpus {
        return guarded(|| run_one(vm, &mut only.vcpu, rng.clone()));
    }
    let mut totals = Totals::default();
    thread::scope(|scope| {
        let threads: Vec<_> = (vcpus.iter_mut())
            .map(|cpu| {
                let rng = Rng::new(rng.next());
                scope.spawn(move || {
                    let result = guarded(|| run_one(vm, &mut cpu.vcpu, rng));
                    // The others may wait for it.
                    vm.vcpus().iter().for_each(|handle| handle.interrupt());
                    result
                })
            })
            .collect();
        for thread in threads {
            let result = thread.join().unwrap_or_else(|panic| Err(Failure::Panic(message(&*panic))));
            totals.add(&result?);
        }
        Ok(totals)
    })
}

fn guarded(run: impl FnOnce() -> Totals) -> Result<Totals, Failure> {
    // What a panic leaves behind is only dropped.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run))
        .map_err(|panic| Failure::Panic(message(&*panic)))
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_string()
}

/// Runs a vCPU as a client does that answers everything with random data.
fn run_one(vm: &Vm, vcpu: &mut Vcpu, mut rng: Rng) -> Totals {
    let mut totals = Totals::default();
    for _ in 0..EXITS_MAX {
        match vcpu.run() {
            Ok(VcpuExit::Io { .. } | VcpuExit::Mmio { .. }) => vcpu.complete(answer(&mut rng)),
            Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => {}
            Ok(VcpuExit::Shutdown) => {
                totals.shutdowns += 1;
                // A client may well go on.
                if !rng.percent(30) {
                    break;
                }
                if rng.percent(50) {
                    vcpu.reset();
                }
            }
            Ok(VcpuExit::InternalError(_)) if rng.percent(20) => {}
            _ => break,
        }
        totals.exits += 1;
        match rng.below(64) {
            0 => vcpu.nmi(),
            // Refused with in-kernel controllers, or while another waits.
            1 | 2 => drop(vcpu.interrupt(rng.next() as u8)),
            3 => drop(vm.irq_line(rng.below(24) as u32, rng.percent(50))),
            _ => {}
        }
    }
    let counters = vcpu.cpu_mut().counters;
    totals.instructions = counters.instructions;
    totals.exceptions = counters.exceptions;
    totals
}

pub(crate) fn answer(rng: &mut Rng) -> u64 {
    match rng.below(3) {
        0 => 0,
        1 => !0,
        _ => rng.next(),
    }
}
