//! SYSCALL, SYSRET, SYSENTER, SYSEXIT (SDM vol. 2; vol. 3A, 5.8.7 and 5.8.8), as Intel's processors do them.

use iced_x86::{Code, Instruction};

use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::flags::Rflags;
use crate::state::{CodeSize, Seg, Segment, cr0, efer, reg};
use crate::system::debug::DR6_BS;

/// Access rights of a flat accessed code segment: present, granular, type 11.
const CODE: u32 = 0x809b;
/// Access rights of a flat accessed stack segment: present, granular, big, type 3.
const STACK: u32 = 0xc093;
/// L: 64-bit code.
const LONG: u32 = 1 << 13;
/// D: 32-bit code.
const BIG: u32 = 1 << 14;
/// Shift of the DPL field.
const DPL: u32 = 5;

const RCX: usize = reg::RCX as usize;
const RDX: usize = reg::RDX as usize;
const RSP: usize = reg::RSP as usize;
const R11: usize = reg::R11 as usize;

impl Cpu {
    /// Enters level `cpl` with flat segments: code `selector`, 64-bit or 32-bit, and stack `ss_selector`.
    fn enter_flat(&mut self, cpl: u8, selector: u64, ss_selector: u64, long: bool, ip: u64) {
        let level = u32::from(cpl) << DPL;
        let code = CODE | level | if long { LONG } else { BIG };
        let ring = |selector: u64| (selector as u16 & !3) | u16::from(cpl);
        self.state.segs[Seg::Ss as usize] = Segment::flat(ring(ss_selector), STACK | level);
        self.transfer(Segment::flat(ring(selector), code), cpl, ip);
        self.refresh_local();
    }
}

fn syscall(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let state = &cpu.state;
    if state.code_size != CodeSize::Bits64 || state.efer & efer::SCE == 0 {
        return Err(cpu.raise(Exception::UD));
    }
    let flags = state.rflags() & !Rflags::RF.bits();
    let selector = (state.star >> 32) & 0xffff;
    let (mask, target, next_ip) = (state.sfmask, state.lstar, cpu.next_ip(op));
    cpu.state.regs[RCX] = next_ip;
    cpu.state.regs[R11] = flags;
    cpu.state.set_rflags(flags & !mask);
    // Whether a single-step trap follows is decided by the flags that SYSCALL leaves.
    cpu.trap_after &= cpu.state.flag(Rflags::TF);
    cpu.enter_flat(0, selector, selector + 8, true, target);
    Ok(Flow::End)
}

/// SYSRET; `op.size` is 8 for the return to 64-bit code.
fn sysret(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let state = &cpu.state;
    if state.code_size != CodeSize::Bits64 || state.efer & efer::SCE == 0 {
        return Err(cpu.raise(Exception::UD));
    }
    let long = op.size == 8;
    let target = state.regs[RCX];
    if state.cpl != 0 || (long && !state.canonical(target)) {
        return Err(cpu.raise(Exception::gp(0)));
    }
    let selector = (state.star >> 48) & 0xffff;
    let code = selector + if long { 16 } else { 0 };
    // RF and VM read as zero.
    let flags = state.regs[R11] & 0x3c_7fd7;
    cpu.state.set_rflags(flags);
    // A TF that SYSRET loads traps before the first instruction at the target.
    cpu.trap_after = false;
    if cpu.state.flag(Rflags::TF) {
        cpu.pending_debug |= DR6_BS;
    }
    cpu.enter_flat(3, code, selector + 8, long, if long { target } else { target & 0xffff_ffff });
    Ok(Flow::End)
}

fn sysenter(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    let state = &mut cpu.state;
    let selector = state.sysenter_cs & 0xfffc;
    if state.cr0 & cr0::PE == 0 || selector == 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    let long = state.long_mode();
    let width = if long { u64::MAX } else { 0xffff_ffff };
    state.rflags_system &= !(Rflags::VM | Rflags::IF).bits();
    state.regs[RSP] = state.sysenter_esp & width;
    let target = state.sysenter_eip & width;
    cpu.enter_flat(0, selector, selector + 8, long, target);
    Ok(Flow::End)
}

/// SYSEXIT; `op.size` is 8 for the return to 64-bit code.
fn sysexit(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let state = &mut cpu.state;
    let selector = state.sysenter_cs & 0xfffc;
    if state.cr0 & cr0::PE == 0 || selector == 0 || state.cpl != 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    let (sp, target) = (state.regs[RCX], state.regs[RDX]);
    let long = op.size == 8;
    if long && !(state.canonical(sp) && state.canonical(target)) {
        return Err(cpu.raise(Exception::gp(0)));
    }
    let width = if long { u64::MAX } else { 0xffff_ffff };
    state.regs[RSP] = sp & width;
    let code = selector + if long { 32 } else { 16 };
    cpu.enter_flat(3, code, code + 8, long, target & width);
    Ok(Flow::End)
}

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let (handler, size): (Handler, u8) = match ins.code() {
        Code::Syscall => (syscall, 8),
        Code::Sysretd => (sysret, 4),
        Code::Sysretq => (sysret, 8),
        Code::Sysenter => (sysenter, 8),
        Code::Sysexitd => (sysexit, 4),
        Code::Sysexitq => (sysexit, 8),
        _ => return None,
    };
    let mut op = op_base(ins, ctx, handler);
    op.size = size;
    Some(op)
}
