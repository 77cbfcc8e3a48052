//! A machine of memory, vCPUs, in-kernel interrupt controllers, a serial port that collects and a debug-exit port.
#![expect(unsafe_code, reason = "guest memory is host memory that the processor knows by address")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hypervisor::permissions::Beneficiary;
use hypervisor::{HostParams, System, Vcpu, VcpuExit, Vm};
use kvm_bindings::{kvm_pit_config, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use silicon::model::{CpuModel, Feature};

use crate::elf;

/// Bytes of guest memory.
pub const MEMORY: usize = 16 << 20;
/// Serial port.
const SERIAL: u16 = 0x3f8;
/// Line status: transmitter empty.
const SERIAL_STATUS: u16 = 0x3fd;
const STATUS_EMPTY: u64 = 0x60;
/// Debug-exit port.
const EXIT_PORT: u16 = 0xf4;
/// Where a program says which behaviour it is about to show.
const BEHAVIOUR_PORT: u16 = 0xea;
/// What EAX holds at a multiboot entry.
const MULTIBOOT_MAGIC: u64 = 0x2bad_b002;

/// What a guest left behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What it wrote to the serial port.
    pub console: String,
    /// What it wrote to the debug-exit port.
    pub status: Option<u32>,
    /// Why it ended without writing there.
    pub stopped: Option<String>,
    /// Source lines of the behaviours that it came to, in its order.
    pub behaviours: Vec<u16>,
}

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hypervisor refused something.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// The image is not one of ours.
    #[error("the image is no ELF file that fits into memory")]
    Image,
}

/// Which address space an access is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// I/O ports.
    Port,
    /// Guest-physical addresses where no memory is.
    Memory,
}

/// An access that the hypervisor reported to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Its address space.
    pub space: Space,
    /// Port or guest-physical address.
    pub address: u64,
    /// Bytes.
    pub size: u8,
    /// What is written; `None` for a read.
    pub write: Option<u64>,
}

/// What stands at the ports and addresses that are not the machine's own.
pub trait Devices: Sync {
    /// Does an access; the result answers a read.
    fn access(&self, vm: &Vm, access: Access) -> u64;
}

/// No devices: reads give ones, as from an empty bus.
#[derive(Clone, Copy, Debug)]
pub struct Nothing;

impl Devices for Nothing {
    fn access(&self, _: &Vm, _: Access) -> u64 {
        u64::MAX
    }
}

/// Zeroed, page-aligned memory.
#[derive(Debug)]
struct Memory(*mut u8);

impl Memory {
    const LAYOUT: Layout = match Layout::from_size_align(MEMORY, 4096) {
        Ok(layout) => layout,
        Err(_) => panic!("a power of two"),
    };

    fn new() -> Memory {
        // SAFETY: the size is not zero.
        let pointer = unsafe { alloc_zeroed(Memory::LAYOUT) };
        if pointer.is_null() {
            handle_alloc_error(Memory::LAYOUT);
        }
        Memory(pointer)
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Error> {
        let address = usize::try_from(address).map_err(|_| Error::Image)?;
        if address.checked_add(bytes.len()).is_none_or(|end| end > MEMORY) {
            return Err(Error::Image);
        }
        // SAFETY: inside the allocation, and no guest runs yet.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(address), bytes.len()) };
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.0, Memory::LAYOUT) };
    }
}

#[derive(Default)]
struct Shared {
    report: Mutex<Report>,
    over: AtomicBool,
    ended: Condvar,
}

impl Shared {
    fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, change: impl FnOnce(&mut Report)) {
        let mut report = self.report();
        if !self.over.swap(true, Ordering::SeqCst) {
            change(&mut report);
        }
        self.ended.notify_all();
    }
}

/// Runs a multiboot image on `cpus` processors of `model` until it ends, or `patience` is over.
pub fn run(image: &[u8], cpus: u32, model: CpuModel, patience: Duration) -> Result<Report, Error> {
    run_with(image, cpus, model, patience, &Nothing)
}

/// The same with devices.
pub fn run_with(
    image: &[u8],
    cpus: u32,
    model: CpuModel,
    patience: Duration,
    devices: &dyn Devices,
) -> Result<Report, Error> {
    // Programs make split locks by the thousand; a host that warns need not make each of them wait.
    let host = HostParams { split_lock_mitigate: false, ..HostParams::default() };
    let machine = build(image, cpus, model, host)?;
    Ok(run_vcpus(&machine.vm, machine.vcpus, patience, devices))
}

/// A machine that has not run yet.
#[derive(Debug)]
pub struct Machine {
    /// The vCPUs, the first one at the image's entry.
    pub vcpus: Vec<Vcpu>,
    /// The VM.
    pub vm: Arc<Vm>,
    // Goes after the VM, which has its address.
    _memory: Memory,
}

/// Makes a machine for whoever runs its vCPUs himself.
pub fn build(image: &[u8], cpus: u32, model: CpuModel, host: HostParams) -> Result<Machine, Error> {
    let mut memory = Memory::new();
    let image = elf::parse(image).ok_or(Error::Image)?;
    for segment in &image.segments {
        memory.write(segment.address, segment.bytes)?;
    }
    let offers_deadline = model.features().has(Feature::TscDeadline);
    let system = System::new(model, host);
    system.permissions().request_all(Beneficiary::Guests);
    let vm = system.create_vm()?;
    vm.set_user_memory_region(kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.0 as u64,
    })?;
    vm.create_irqchip()?;
    vm.create_pit2(kvm_pit_config::default())?;
    let mut vcpus = Vec::new();
    for id in 0..cpus {
        let mut vcpu = vm.create_vcpu(id)?;
        let mut cpuid = system.supported_cpuid();
        // KVM leaves it to a capability whether the local APIC's timer has this mode.
        for leaf in cpuid.iter_mut().filter(|leaf| leaf.function == 1 && offers_deadline) {
            leaf.ecx |= 1 << 24;
        }
        vcpu.set_cpuid2(&cpuid)?;
        if id == 0 {
            enter_protected_mode(&mut vcpu, image.entry)?;
        }
        vcpus.push(vcpu);
    }
    Ok(Machine { vcpus, vm, _memory: memory })
}

/// The state that the multiboot specification (version 0.6.96, 3.2) wants.
fn enter_protected_mode(vcpu: &mut Vcpu, entry: u64) -> Result<(), Error> {
    let mut sregs = vcpu.sregs();
    let flat = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = kvm_segment { selector: 8, type_: 11, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (flat, flat, flat, flat, flat);
    sregs.cr0 = 0x11;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rax: MULTIBOOT_MAGIC, rip: entry, rflags: 2, ..kvm_regs::default() });
    Ok(())
}

/// Runs all vCPUs until the program ends, or `patience` is over.
pub fn run_vcpus(vm: &Arc<Vm>, vcpus: Vec<Vcpu>, patience: Duration, devices: &dyn Devices) -> Report {
    let shared = Shared::default();
    std::thread::scope(|scope| {
        for vcpu in vcpus {
            scope.spawn(|| run_vcpu(vm, vcpu, &shared, devices));
        }
        let report = shared.report();
        let (mut report, timeout) = shared
            .ended
            .wait_timeout_while(report, patience, |_| !shared.over.load(Ordering::SeqCst))
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() && !shared.over.swap(true, Ordering::SeqCst) {
            report.stopped = Some(format!("did not end in {} s", patience.as_secs()));
        }
        drop(report);
        for handle in vm.vcpus() {
            handle.interrupt();
        }
    });
    shared.report.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn run_vcpu(vm: &Vm, mut vcpu: Vcpu, shared: &Shared, devices: &dyn Devices) {
    while !shared.over.load(Ordering::SeqCst) {
        match vcpu.run() {
            Ok(VcpuExit::Io { port: SERIAL, write: Some(value), .. }) => {
                shared.report().console.push(char::from(value as u8));
            }
            Ok(VcpuExit::Io { port: BEHAVIOUR_PORT, size: 2, write: Some(line) }) => {
                shared.report().behaviours.push(line as u16);
            }
            Ok(VcpuExit::Io { port: EXIT_PORT, write: Some(value), .. }) => {
                shared.end(|report| report.status = Some(value));
            }
            Ok(VcpuExit::Io { port: SERIAL_STATUS, write: None, .. }) => vcpu.complete(STATUS_EMPTY),
            Ok(VcpuExit::Io { port, size, write }) => {
                let (address, write) = (u64::from(port), write.map(u64::from));
                vcpu.complete(devices.access(vm, Access { space: Space::Port, address, size, write }));
            }
            Ok(VcpuExit::Mmio { gpa: address, size, write }) => {
                vcpu.complete(devices.access(vm, Access { space: Space::Memory, address, size, write }));
            }
            Ok(exit) => stop(&vcpu, shared, format!("{exit:?}")),
            Err(hypervisor::Error::Interrupted | hypervisor::Error::Again) => {}
            Err(error) => stop(&vcpu, shared, error.to_string()),
        }
    }
}

fn stop(vcpu: &Vcpu, shared: &Shared, why: String) {
    let state = vcpu.state();
    let text = format!(
        "vCPU {}: {why}; rip {:#x} cs {:#x} rflags {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} \
         registers {:x?}",
        vcpu.handle().id(),
        state.rip,
        state.segs[1].selector,
        state.rflags(),
        state.cr0,
        state.cr2,
        state.cr3,
        state.cr4,
        state.efer,
        &state.regs[..16],
    );
    shared.end(|report| report.stopped = Some(text));
}
