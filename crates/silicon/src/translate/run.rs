//! From the interpreter into host code and back: the handlers of translated operations.
#![expect(unsafe_code, reason = "calls host code, and reaches operations by what it returns")]

use std::arch::asm;

use super::link::Link;
use super::{Code, Failure, LEAVE_INDIRECT, LEAVE_LINK, POINTER};
use crate::code::op::{Flow, Op};
use crate::code::thread::interpreted;
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::mmu::tlb::PAGE_MASK;
use crate::state::reg;

/// Handler of the first operation of a block that has not been translated: translates it when it has run often enough.
pub(super) fn count(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let times = op.translation.get() + 1;
    op.translation.set(times);
    if times <= u64::from(cpu.translator.after) || !cpu.affords_translation() {
        return (interpreted(op))(cpu, op);
    }
    match cpu.translate_block(op) {
        Ok(()) => {}
        Err(Failure::Unsuited) => op.handler.set(interpreted(op)),
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

/// Handler of the first operation of a translated run: goes on in host code.
pub(super) fn enter(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let (Some(way_in), true) = (cpu.translator.code.as_ref().map(|code| code.routines.enter), !cpu.stepping)
    else {
        return (interpreted(op))(cpu, op);
    };
    let ip_base = cpu.state.regs[usize::from(reg::IP_BASE)];
    cpu.prepare(ip_base);
    let mut code = op.translation.get();
    loop {
        // SAFETY: `translate_block` has put the address of a run that begins with this operation there, or it is a block's
        // translation; both are gone as soon as the arena is cleared. Where engines are checked there is one call alone.
        let (exit, extra) = unsafe {
            if cpu.translator.checks.is_some() {
                cpu.checked_call(way_in, code, op)
            } else {
                call(way_in, code)
            }
        };
        let link = if exit == LEAVE_INDIRECT {
            let rip = cpu.state.rip;
            if !cpu.state.canonical(rip) {
                return take_back(cpu, extra);
            }
            None
        } else if exit & LEAVE_LINK != 0 {
            let link = exit & !LEAVE_LINK;
            let found = cpu.translator.code.as_ref().and_then(|code| Link::target(&code.arena, link));
            let (target, taken) = found.unwrap_or_default();
            let ip_base = cpu.state.regs[usize::from(reg::IP_BASE)];
            cpu.state.rip = ip_base.wrapping_add_signed(target);
            if taken != 0 && !cpu.state.canonical(cpu.state.rip) {
                return take_back(cpu, taken);
            }
            Some((link, ip_base))
        } else {
            // SAFETY: host code names operations of its own block, which is not dropped while it runs.
            let op = unsafe { &*(exit as *const Op) };
            cpu.at(op);
            cpu.block_start = cpu.current_op - extra as usize * size_of::<Op>();
            return (interpreted(op))(cpu, op);
        };
        let rip = cpu.state.rip;
        let one_block = cfg!(debug_assertions) || cpu.translator.checks.is_some();
        if !cpu.state.canonical(rip) || cpu.requests.any() || one_block {
            return cpu.end_at_rip(op);
        }
        let Some(block) = cpu.block_to_go_on(rip) else { return cpu.end_at_rip(op) };
        let Some(translation) = block.translation() else { return cpu.end_at_rip(op) };
        code = translation.get();
        cpu.state.regs[usize::from(reg::IP_BASE)] = rip & !PAGE_MASK;
        match link {
            Some((link, from)) if (from ^ rip) >> 63 == 0 => {
                let validity = cpu.translator.validity;
                if let Some(translated) = &cpu.translator.code {
                    Link::set(&translated.arena, link, validity, code);
                }
            }
            _ => cpu.prepare(rip),
        }
    }
}

/// Takes back a branch to an address that nothing can be at, and gives it to the interpreter to fault.
#[cold]
fn take_back(cpu: &mut Cpu, extra: u64) -> Result<Flow, Abort> {
    // SAFETY: as in `enter`.
    let op = unsafe { &*((extra & POINTER) as *const Op) };
    let taken = i64::from((extra >> 48) as u16 as i16);
    let rsp = &mut cpu.state.regs[usize::from(reg::RSP)];
    *rsp = rsp.wrapping_add_signed(-taken);
    cpu.at(op);
    // The operation ends its block, whose instructions host code has counted; the interpreter counts from here.
    cpu.block_start = cpu.current_op;
    cpu.counters.instructions = cpu.counters.instructions.wrapping_sub(1);
    (interpreted(op))(cpu, op)
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
