//! A KVM client that measures what leaving and entering a guest costs, through the ioctls like any other client. Run by
//! `cargo xtask bench exits` under `ring3 run`; on a machine with hardware virtualization it runs on its own, too.
//!
//! Prints a line for each kind of exit: its name and the median time in nanoseconds.
#![expect(unsafe_code, reason = "guest memory is given to KVM by address")]

use std::error::Error;
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

const MEMORY: usize = 0x1_0000;
/// Where guest code begins.
const CODE: usize = 0x1000;
/// Timed runs; their median counts.
const RUNS: usize = 41;
/// Exits in one timed run.
const EXITS: u32 = 5_000;
/// CPUIDs that a guest executes before it says so.
const CPUIDS: u16 = 1_000;

/// Interrupt line, and the vector that the guest gives its controller for it.
const LINE: u32 = 5;
const VECTOR: usize = 0x20 + 5;

/// OUT 0x10, AL for ever.
const PORT_LOOP: &[u8] = &[0xe6, 0x10, 0xeb, 0xfc];
/// MOV AX, 0xffff; MOV DS, AX; and for ever MOV [0x1000], AL (guest-physical 0x100ff0 with A20).
const MMIO_LOOP: &[u8] = &[0xb8, 0xff, 0xff, 0x8e, 0xd8, 0xa2, 0x00, 0x10, 0xeb, 0xfb];
/// MOV BP, 1000; 1: XOR EAX, EAX; CPUID; DEC BP; JNZ 1b; OUT 0x10, AL; again.
const CPUID_LOOP: &[u8] = &[
    0xbd,
    (CPUIDS & 0xff) as u8,
    (CPUIDS >> 8) as u8,
    0x66,
    0x31,
    0xc0,
    0x0f,
    0xa2,
    0x4d,
    0x75,
    0xf8,
    0xe6,
    0x10,
    0xeb,
    0xf1,
];
/// JMP to itself.
const ENDLESS: &[u8] = &[0xeb, 0xfe];
/// Sets the 8259 up (vectors from 0x20, only line 5 unmasked), then halts for ever with interrupts enabled.
const HALT_LOOP: &[u8] = &[
    0xb0, 0x11, 0xe6, 0x20, // ICW1
    0xb0, 0x20, 0xe6, 0x21, // ICW2: vectors from 0x20
    0xb0, 0x04, 0xe6, 0x21, // ICW3
    0xb0, 0x01, 0xe6, 0x21, // ICW4
    0xb0, 0xdf, 0xe6, 0x21, // mask
    0xe6, 0x11, // OUT 0x11, AL: ready
    0xfb, 0xf4, 0xeb, 0xfd, // STI; 1: HLT; JMP 1b
];
/// OUT 0x10, AL; end of interrupt; IRET.
const HANDLER: &[u8] = &[0xe6, 0x10, 0xb0, 0x20, 0xe6, 0x20, 0xcf];
const HANDLER_AT: usize = 0x2000;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Guest memory for as long as the program runs.
fn memory() -> &'static mut [u8] {
    let layout =
        std::alloc::Layout::from_size_align(MEMORY, 4096).unwrap_or(std::alloc::Layout::new::<u64>());
    // SAFETY: a fresh allocation of MEMORY zero bytes that is never freed; the layout above is valid.
    unsafe {
        let at = std::alloc::alloc_zeroed(layout);
        assert!(!at.is_null(), "no memory");
        std::slice::from_raw_parts_mut(at, MEMORY)
    }
}

/// A VM that begins with `code` in real mode.
fn machine(kvm: &Kvm, code: &[u8], irqchip: bool) -> Outcome<(VmFd, VcpuFd)> {
    let vm = kvm.create_vm()?;
    if irqchip {
        vm.create_irq_chip()?;
        vm.create_pit2(kvm_pit_config::default())?;
    }
    let bytes = memory();
    bytes[CODE..CODE + code.len()].copy_from_slice(code);
    bytes[HANDLER_AT..HANDLER_AT + HANDLER.len()].copy_from_slice(HANDLER);
    bytes[VECTOR * 4..VECTOR * 4 + 2].copy_from_slice(&(HANDLER_AT as u16).to_le_bytes());
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: bytes.as_ptr() as u64,
    };
    // SAFETY: the memory is never freed.
    unsafe { vm.set_user_memory_region(region)? };
    let vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        (segment.base, segment.selector) = (0, 0);
    }
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rsp, regs.rflags) = (CODE as u64, 0x8000, 2);
    vcpu.set_regs(&regs)?;
    Ok((vm, vcpu))
}

/// Runs until the guest has left `exits` times.
fn leave(vcpu: &mut VcpuFd, exits: u32) -> Outcome<()> {
    for _ in 0..exits {
        match vcpu.run()? {
            VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
            other => return Err(format!("unexpected exit: {other:?}").into()),
        }
    }
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Nanoseconds of one of `each` things that happen between exits.
fn time_exits(kvm: &Kvm, code: &[u8], exits: u32, each: u32) -> Outcome<f64> {
    let (_vm, mut vcpu) = machine(kvm, code, false)?;
    leave(&mut vcpu, exits)?;
    let mut times = Vec::new();
    for _ in 0..RUNS {
        let started = Instant::now();
        leave(&mut vcpu, exits)?;
        times.push(started.elapsed().as_nanos() as f64 / f64::from(exits * each));
    }
    Ok(median(times))
}

/// From the write to an irqfd to the exit that the handler makes, the vCPU being halted before.
fn time_wake(kvm: &Kvm) -> Outcome<f64> {
    let (vm, mut vcpu) = machine(kvm, HALT_LOOP, true)?;
    let event = EventFd::new(0)?;
    vm.register_irqfd(&event, LINE)?;
    leave(&mut vcpu, 1)?;
    let ((ask, asked), (tell, told)) = (mpsc::channel::<()>(), mpsc::channel());
    let raiser = std::thread::spawn(move || {
        while asked.recv().is_ok() {
            // Long enough for the vCPU to halt; how long does not enter the measurement.
            std::thread::sleep(Duration::from_micros(200));
            let now = Instant::now();
            if event.write(1).is_err() || tell.send(now).is_err() {
                break;
            }
        }
        event.as_raw_fd()
    });
    let mut times = Vec::new();
    for _ in 0..500 {
        ask.send(())?;
        leave(&mut vcpu, 1)?;
        let left = Instant::now();
        times.push(left.duration_since(told.recv()?).as_nanos() as f64);
    }
    drop(ask);
    let _ = raiser.join();
    Ok(median(times))
}

/// From a signal to the thread that runs a guest which never leaves by itself, to KVM_RUN's return.
fn time_kick(kvm: &Kvm) -> Outcome<f64> {
    let (_vm, mut vcpu) = machine(kvm, ENDLESS, false)?;
    Ok(median(e2e::kick::latencies(&mut vcpu, 500)?))
}

fn main() -> Outcome<()> {
    let kvm = Kvm::new()?;
    println!("port {:.0}", time_exits(&kvm, PORT_LOOP, EXITS, 1)?);
    println!("mmio {:.0}", time_exits(&kvm, MMIO_LOOP, EXITS, 1)?);
    println!("cpuid {:.0}", time_exits(&kvm, CPUID_LOOP, 20, CPUIDS.into())?);
    println!("wake {:.0}", time_wake(&kvm)?);
    println!("kick {:.0}", time_kick(&kvm)?);
    Ok(())
}
