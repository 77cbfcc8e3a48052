//! A guest kernel with preemptible tasks that go on while pages of others are elsewhere: how a guest uses the page-not-present
//! protocol (docs/features/page-not-present.md), to be read, and what its tests and benchmarks run.
//!
//! One processor, identity-mapped memory, everything at CPL 0. An interrupt saves the task on its own stack ([`tasks::Frame`]) and returns the
//! frame to go on with; that is all there is of a scheduler. The protocol is in [`pnp`]; [`kvm`] is the kernel's older interface, for comparison.
//!
//! The machine gives parameters and takes results in memory ([`work::Parameters`], [`work::Report`]).
#![no_std]
#![no_main]

mod cpu;
mod kvm;
mod pnp;
mod tasks;
mod work;

use tasks::Frame;

/// Vectors of our choice.
mod vector {
    pub const TIMER: u64 = 0x40;
    pub const RESOLVED: u64 = 0x51;
    /// Its class is the highest, so that it can come while another interrupt is handled.
    pub const NOT_PRESENT: u64 = 0x61;
    pub const READY: u64 = 0x71;
    pub const SPURIOUS: u64 = 0xff;
}

/// Where `boot.S` goes once the processor is in long mode, with interrupts off.
#[unsafe(no_mangle)]
extern "C" fn kernel() -> ! {
    cpu::apic_enable(vector::SPURIOUS as u32);
    let parameters = work::parameters();
    match parameters.protocol {
        0 => {}
        1 | 2 => pnp::enable(parameters.protocol == 2, parameters.order),
        _ => kvm::enable(),
    }
    work::start();
    // About a millisecond: the timer counts nanoseconds.
    cpu::apic_timer(vector::TIMER as u32, 1_000_000);
    tasks::begin()
}

/// Where all interrupts and exceptions come, with interrupts off. The frame that it returns is what the processor goes on with.
#[unsafe(no_mangle)]
extern "C" fn interrupted(frame: &mut Frame) -> *mut Frame {
    match frame.vector {
        2 => pnp::around_nmi(work::nmi),
        14 if kvm::is_event() => return kvm::not_present(frame),
        18 => return pnp::machine_check(frame),
        20 => return pnp::virtualization_exception(frame),
        vector::TIMER => {
            cpu::apic_eoi();
            return tasks::preempt(frame);
        }
        vector::NOT_PRESENT => return pnp::not_present(frame),
        vector::RESOLVED => return pnp::resolved(frame),
        vector::READY => return kvm::ready(frame),
        vector::SPURIOUS => {}
        _ => work::fail("unexpected vector", frame.vector),
    }
    frame
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    work::fail("panic in line", info.location().map_or(0, |at| at.line().into()))
}
