//! From the interpreter into host code and back: the handlers of translated operations.
#![expect(unsafe_code, reason = "calls host code, and reaches operations by what it returns")]

use std::arch::asm;
use std::ptr::NonNull;

use super::link::{Jump, Link};
use super::{Code, Failure, LEAVE_INDIRECT, LEAVE_LINK, POINTER, Translator};
use crate::code::op::{Flow, Op};
use crate::code::thread::interpreted;
use crate::code::{BLOCK_MAX, resync};
use crate::cpu::{Cpu, Requests};
use crate::exception::Abort;
use crate::mmu::tlb::PAGE_MASK;
use crate::state::reg;

/// Handler of the first operation of a block that has not been translated: translates it when it has run often enough.
pub(crate) fn count(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let times = op.translation.get() + 1;
    op.translation.set(times);
    if times <= u64::from(cpu.translator.after) || !cpu.affords_translation() {
        return (interpreted(op))(cpu, op);
    }
    match cpu.translate_block(op) {
        Ok(()) => {}
        Err(Failure::Unsuited) => {
            cpu.translator.unsuited += 1;
            op.handler.set(interpreted(op));
        }
        Err(Failure::Later) => {
            op.translation.set(0);
            return resync(cpu, op);
        }
        Err(Failure::Full) => {
            cpu.at(op);
            cpu.code.clear();
            if cpu.translator.code.as_mut().and_then(Code::clear).is_none() {
                cpu.translator.code = None;
            }
            return Err(cpu.retry());
        }
    }
    (op.handler.get())(cpu, op)
}

/// Handler of the first operation of a run that has been translated for user mode or not: goes on in host code, and then with what is
/// the interpreter's. (That call must be in tail position: nothing else is done here.)
pub(super) fn enter<const USER: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.is_user() != USER {
        return (interpreted(op))(cpu, op);
    }
    match run(cpu, op) {
        // SAFETY: host code names operations of blocks that are not dropped while they run.
        Some(next) => unsafe { (interpreted(next.as_ref()))(cpu, next.as_ref()) },
        None => Ok(Flow::End),
    }
}

/// Goes on in host code from `op` until it leaves for an operation that is the interpreter's, or for the engine.
#[inline(never)]
fn run(cpu: &mut Cpu, op: &Op) -> Option<NonNull<Op>> {
    let way_in = cpu.translator.code.as_ref().map(|code| code.routines.enter);
    // Who asks for attention gets it between any two blocks.
    let asked = cpu.requests.get() & Requests::FOREIGN != 0;
    let Some(way_in) = way_in.filter(|_| !cpu.stepping && !asked) else {
        return Some(NonNull::from(op));
    };
    if !cpu.translator.has_gs {
        cpu.prepare_host();
    }
    cpu.prepare(cpu.state.regs[usize::from(reg::IP_BASE)]);
    // Where something is asked for all the time, host code looks at once; but a block that is a loop by itself looks before it begins, and
    // must get on.
    let slice = match cpu.requests.get() {
        0 => u64::from(cpu.translator.slice),
        asked if asked & Requests::LIMIT != 0 => BLOCK_MAX as u64 + 1,
        _ => 0,
    };
    cpu.translator.stop = cpu.counters.instructions.wrapping_add(slice);
    let mut code = op.translation.get();
    loop {
        // SAFETY: `translate_block` has put the address of a run that begins with this operation there, or it is a block's
        // translation; both are gone as soon as the arena is cleared. Where engines are checked there is one call alone.
        let (exit, extra) = unsafe {
            if cpu.translator.observed { cpu.observed_call(way_in, code, op) } else { call(way_in, code) }
        };
        let ip_base = cpu.state.regs[usize::from(reg::IP_BASE)];
        let link = if exit == LEAVE_INDIRECT {
            if !cpu.state.canonical(cpu.state.rip) {
                return Some(take_back(cpu, extra));
            }
            None
        } else if exit & LEAVE_LINK != 0 {
            let link = exit & !LEAVE_LINK;
            let found = cpu.translator.code.as_ref().and_then(|code| Link::target(&code.arena, link));
            let (target, taken) = found.unwrap_or_default();
            cpu.state.rip = ip_base.wrapping_add_signed(target);
            if taken != 0 && !cpu.state.canonical(cpu.state.rip) {
                return Some(take_back(cpu, taken));
            }
            Some((link, target))
        } else {
            let next = NonNull::new(exit as *mut Op)?;
            // SAFETY: host code names operations of its own blocks, which are not dropped while it runs.
            cpu.at(unsafe { next.as_ref() });
            cpu.block_start = cpu.current_op - extra as usize * size_of::<Op>();
            return Some(next);
        };
        let at_hand = go_on(cpu);
        let Some(translation) = at_hand else {
            cpu.end_at_rip(op);
            return None;
        };
        code = translation;
        note(cpu, ip_base, link, code);
    }
}

/// Host code has left for RIP: what it can go on with there.
fn go_on(cpu: &mut Cpu) -> Option<u64> {
    cpu.requests.settle();
    let rip = cpu.state.rip;
    let one_block = cfg!(debug_assertions) || cpu.translator.checks.is_some();
    if !cpu.state.canonical(rip) || cpu.requests.any() || one_block {
        return None;
    }
    let translation = cpu.block_to_go_on(rip)?.translation()?.get();
    // What is for other privilege levels is not for this one.
    (translation >> 63 << 63 == cpu.mark()).then_some(translation & POINTER)
}

/// Host code goes on at RIP, in `code`: next time it finds that by itself, by the link and its target or by the address. It came from a
/// page at `from`.
fn note(cpu: &mut Cpu, from: u64, link: Option<(u64, i64)>, code: u64) {
    let rip = cpu.state.rip;
    cpu.state.regs[usize::from(reg::IP_BASE)] = rip & !PAGE_MASK;
    let link = link.filter(|_| (from ^ rip) >> 63 == 0);
    // Finding the block may have dropped others: host code must not go by what held before.
    cpu.prepare(rip);
    let Translator { validity, validity_within, .. } = cpu.translator;
    let Some(translated) = &mut cpu.translator.code else { return };
    match link {
        Some((link, target)) => {
            let validity = if Link::stays_in_page(target) { validity_within } else { validity };
            Link::set(&translated.arena, link, validity, code);
        }
        None => *Jump::of(&mut translated.jumps, rip) = Jump { lin: rip, validity, code },
    }
}

/// Takes back a branch to an address that nothing can be at: the operation, for the interpreter to have it fault.
#[cold]
fn take_back(cpu: &mut Cpu, extra: u64) -> NonNull<Op> {
    let op = (extra & POINTER) as *mut Op;
    // SAFETY: host code names operations of its own blocks, which are not dropped while it runs.
    let op = unsafe { &*op };
    let taken = i64::from((extra >> 48) as u16 as i16);
    let rsp = &mut cpu.state.regs[usize::from(reg::RSP)];
    *rsp = rsp.wrapping_add_signed(-taken);
    cpu.at(op);
    // The operation ends its block, whose instructions host code has counted; the interpreter counts from here.
    cpu.block_start = cpu.current_op;
    cpu.counters.instructions = cpu.counters.instructions.wrapping_sub(1);
    NonNull::from(op)
}

/// Runs host code at `code` until it leaves; the two words that it leaves with.
///
/// # Safety
///
/// `way_in` and `code` are of one translator, whose CPU the GS base points to, and which is not borrowed.
pub(super) unsafe fn call(way_in: u64, code: u64) -> (u64, u64) {
    let (exit, extra);
    // SAFETY: the code changes what the operands say, RBX and RBP, which are saved here, its CPU and guest memory.
    unsafe {
        asm!(
            "push rbx", "push rbp", "call rax", "pop rbp", "pop rbx",
            inout("rax") way_in => exit, inout("rdi") code => _, out("rdx") extra,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _, clobber_abi("sysv64"),
        );
    }
    (exit, extra)
}
