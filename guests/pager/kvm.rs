//! The kernel's asynchronous page faults (Documentation/virt/kvm/x86/msr.rst), for comparison: #PF with a token in CR2, and one interrupt and
//! acknowledgement for each page.

use crate::tasks::{self, Frame};
use crate::{cpu, vector, work};

const ENABLE: u32 = 0x4b56_4d02;
const INTERRUPT: u32 = 0x4b56_4d06;
const ACKNOWLEDGE: u32 = 0x4b56_4d07;
/// Enabled, at CPL 0 too, by interrupt.
const BITS: u64 = 0b1011;
/// `struct kvm_vcpu_pv_apf_data`.
const DATA_AT: u64 = 0x9000;
const FLAGS: u64 = DATA_AT;
const TOKEN: u64 = DATA_AT + 4;
const BROADCAST: u32 = !0;

pub fn enable() {
    if cpu::cpuid(0x4000_0001)[0] & (1 << 4 | 1 << 14) != 1 << 4 | 1 << 14 {
        work::skip("asynchronous page faults");
    }
    cpu::wrmsr(INTERRUPT, vector::READY);
    cpu::wrmsr(ENABLE, DATA_AT | BITS);
}

/// Whether a #PF is no page fault.
pub fn is_event() -> bool {
    cpu::read::<u32>(FLAGS) == 1
}

pub fn not_present(frame: &mut Frame) -> *mut Frame {
    let token = cpu::cr2() as u32;
    cpu::write(FLAGS, 0u32);
    work::count_event();
    tasks::wait(frame, token)
}

pub fn ready(frame: &mut Frame) -> *mut Frame {
    cpu::apic_eoi();
    let token: u32 = cpu::read(TOKEN);
    let mut woken = None;
    match token {
        0 => {}
        BROADCAST => tasks::wake_all(),
        token => {
            work::count_resolution(0);
            woken = tasks::wake(token, 0);
        }
    }
    cpu::write(TOKEN, 0u32);
    cpu::wrmsr(ACKNOWLEDGE, 1);
    tasks::prefer(frame, woken)
}
