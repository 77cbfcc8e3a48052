//! The page-not-present protocol: an event when this processor touches a page that is elsewhere, and a ring of tokens whose pages have come or
//! have failed.

use core::sync::atomic::{Ordering, fence};

use crate::tasks::{self, Frame};
use crate::{cpu, vector, work};

/// Registers.
const VECTORS: u32 = 0x5233_0100;
const RING: u32 = 0x5233_0101;
const DATA: u32 = 0x5233_0102;
const REQUEST: u32 = 0x5233_0103;
const ENABLED: u64 = 1 << 0;
const VE: u64 = 1 << 1;
const MC: u64 = 1 << 2;

/// ring3's CPUID leaves.
const SIGNATURE: u32 = 0x4000_0100;
const FEATURES: u32 = 0x4000_0101;
const VERSION: u32 = 1;
const OFFERED: u32 = 1 << 1;
const OFFERED_VE: u32 = 1 << 2;

/// Where our structures are: below the kernel, which begins at 1 MiB.
const DATA_AT: u64 = 0x9000;
const RING_AT: u64 = 0xa000;
/// `page_not_present_data`.
const IN_USE: u64 = DATA_AT;
const TOKEN: u64 = DATA_AT + 4;
const GPA: u64 = DATA_AT + 8;
const GVA: u64 = DATA_AT + 16;
const FLAGS: u64 = DATA_AT + 24;
const GVA_KNOWN: u32 = 1 << 0;
/// The virtualization-exception information area, in its place: the busy word and the guest-physical address.
const BUSY: u64 = DATA_AT + 4;
const VE_GPA: u64 = DATA_AT + 24;
/// The answer to REQUEST.
const NO_TOKEN: u64 = 1;
const THERE: u64 = 2;
const FAILED: u64 = 3;

const BROADCAST: u32 = !0;
/// IA32_MCG_STATUS, and the address of bank 0.
const MCG_STATUS: u32 = 0x17a;
const MC0_STATUS: u32 = 0x401;
const MC0_ADDR: u32 = 0x402;

/// Entries of the ring.
fn tokens() -> u64 {
    1 << work::parameters().order
}

/// Has this processor told of pages that are elsewhere; by #VE if `ve`.
pub fn enable(ve: bool, order: u64) {
    let [_, ebx, ecx, edx] = cpu::cpuid(SIGNATURE);
    let [version, features, ..] = cpu::cpuid(FEATURES);
    let ours = [ebx, ecx, edx] == [*b"ring", *b"3rin", *b"g3\0\0"].map(u32::from_le_bytes);
    let wanted = if ve { OFFERED | OFFERED_VE } else { OFFERED };
    if !ours || version != VERSION || features & wanted != wanted {
        work::skip("the page-not-present protocol");
    }
    cpu::wrmsr(VECTORS, vector::RESOLVED << 8 | vector::NOT_PRESENT);
    cpu::wrmsr(RING, RING_AT | order);
    cpu::wrmsr(DATA, DATA_AT | ENABLED | MC | if ve { VE } else { 0 });
}

/// The event. It has interrupted a task whose access has not been made: the task waits, and makes it again when it goes on. What there is to
/// know is copied before `inuse` is cleared, for the next event may overwrite it: not before this handler returns, since it
/// runs with interrupts off.
pub fn not_present(frame: &mut Frame) -> *mut Frame {
    if cpu::read::<u32>(IN_USE) != 1 {
        work::fail("an event without data", 0);
    }
    fence(Ordering::Acquire);
    let token: u32 = cpu::read(TOKEN);
    let (gpa, gva): (u64, u64) = (cpu::read(GPA), cpu::read(GVA));
    // One to one.
    if cpu::read::<u32>(FLAGS) & GVA_KNOWN != 0 && gva != gpa {
        work::fail("another linear address", gva);
    }
    fence(Ordering::Release);
    cpu::write(IN_USE, 0u32);
    cpu::apic_eoi();
    work::count_event();
    tasks::wait(frame, token)
}

/// Tokens have been resolved. There may be none: one interrupt may stand for several, and another come after all have been read.
pub fn resolved(frame: &mut Frame) -> *mut Frame {
    let head_at = RING_AT + 8 * tokens();
    let tail_at = head_at + 4;
    let mut woken = None;
    loop {
        let (head, tail): (u32, u32) = (cpu::read(head_at), cpu::read(tail_at));
        if head == tail {
            break;
        }
        fence(Ordering::Acquire);
        let entry = RING_AT + 8 * (u64::from(tail) % tokens());
        let (result, token): (u32, u32) = (cpu::read(entry), cpu::read(entry + 4));
        fence(Ordering::Release);
        cpu::write(tail_at, tail.wrapping_add(1));
        if token == BROADCAST {
            tasks::wake_all();
            continue;
        }
        work::count_resolution(result);
        woken = tasks::wake(token, result).or(woken);
    }
    cpu::apic_eoi();
    tasks::prefer(frame, woken)
}

/// What the handler of NMIs does. A #VE in it leaves the busy word set (see below), which is cleared here, unless it was set before: then the NMI has
/// come into the handler of another #VE, which is not done, and what it touched was an exit.
pub fn around_nmi(handler: impl FnOnce()) {
    let ve = work::parameters().protocol == 2;
    let busy = ve && cpu::read::<u32>(BUSY) != 0;
    handler();
    if ve && !busy {
        cpu::write(BUSY, 0u32);
    }
}

/// #VE, in the place of the event. The token has to be asked for.
pub fn virtualization_exception(frame: &mut Frame) -> *mut Frame {
    if !frame.takes_interrupts() {
        // Whoever it was cannot wait. With the busy word set the access, made again, exits, and the vCPU is held until the page comes.
        return frame;
    }
    let gpa: u64 = cpu::read(VE_GPA);
    cpu::wrmsr(REQUEST, gpa);
    let answer = cpu::rdmsr(REQUEST);
    // From here on another #VE may come: an NMI between this and IRETQ would take it on the same stack, which is deep enough.
    cpu::write(BUSY, 0u32);
    match (answer >> 32, answer as u32) {
        (0, token) => {
            // Another task may wait for the page: it has the same token.
            if !tasks::is_awaited(token) {
                work::count_event();
            }
            tasks::wait(frame, token)
        }
        // The access is made again: the page is there, or the processor exits and is held.
        (NO_TOKEN, _) => tasks::preempt(frame),
        (THERE, _) => frame,
        (FAILED, _) => tasks::kill(frame),
        (status, _) => work::fail("an answer", status),
    }
}

/// #MC: a failed page that could not be told.
pub fn machine_check(frame: &mut Frame) -> *mut Frame {
    work::machine_check(cpu::rdmsr(MC0_ADDR));
    cpu::wrmsr(MC0_STATUS, 0);
    cpu::wrmsr(MCG_STATUS, 0);
    tasks::kill(frame)
}
