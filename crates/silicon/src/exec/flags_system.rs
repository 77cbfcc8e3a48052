//! Instructions on RFLAGS as a whole or on single flags, and HLT (SDM vol. 2; vol. 3B, 20.3 and 20.4 for VME
//! and PVI).

use iced_x86::{Code, Instruction};

use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::flags::{Rflags, Status};
use crate::state::{Activity, cr4, interruptibility, reg};
use crate::system::stack::Stack;
use crate::vmx::Exit;

/// What POPF with a 16-bit operand can change at any level.
const ANY16: Rflags = Rflags::STATUS.union(Rflags::TF).union(Rflags::DF).union(Rflags::NT);
/// What wider operands can change besides.
const ANY32: Rflags = Rflags::AC.union(Rflags::ID);

impl Cpu {
    /// #GP(0) where a virtual-8086 program may not load `flags` under VME: TF, or IF while VIP is set.
    pub(crate) fn check_virtual_flags(&mut self, flags: u64) -> Result<(), Abort> {
        let enables = flags & Rflags::IF.bits() != 0 && self.state.flag(Rflags::VIP);
        if enables || flags & Rflags::TF.bits() != 0 {
            return Err(self.raise(Exception::gp(0)));
        }
        Ok(())
    }

    /// Sets VIF.
    pub(crate) fn set_virtual_interrupt(&mut self, on: bool) {
        self.set_system_flag(Rflags::VIF, on);
    }

    fn set_system_flag(&mut self, flag: Rflags, on: bool) {
        if on {
            self.state.rflags_system |= flag.bits();
        } else {
            self.state.rflags_system &= !flag.bits();
        }
    }

    /// Ends the block after `op`.
    pub(crate) fn end_after(&mut self, op: &Op) -> Flow {
        self.state.rip = self.next_ip(op);
        Flow::End
    }

    /// After system flags were `old`: whether the block has to end after `op` for what changed.
    fn system_flags_changed(&mut self, op: &Op, old: u64) -> Flow {
        let changed = Rflags::from_bits_retain(old ^ self.state.rflags_system);
        if changed.intersects(Rflags::AC) {
            self.refresh_mode();
        }
        if changed.intersects(Rflags::TF) {
            self.refresh_local();
        }
        // An event waits for IF only if a request says so.
        let window = changed.intersects(Rflags::IF) && self.requests.any();
        if window || changed.intersects(Rflags::TF | Rflags::AC) { self.end_after(op) } else { Flow::Next }
    }

    /// Privilege over IF: real mode, or CPL (3 in virtual-8086 mode) not above IOPL.
    fn owns_interrupt_flag(&self) -> bool {
        self.state.real_mode() || self.state.cpl <= self.state.iopl()
    }

    /// CLI and STI act on VIF: VME in virtual-8086 mode, PVI at level 3 of protected mode.
    fn owns_virtual_interrupt_flag(&self) -> bool {
        let enable = if self.state.v8086() { cr4::VME } else { cr4::PVI };
        self.state.cpl == 3 && self.state.cr4 & enable != 0
    }
}

fn pushf(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let mut flags = cpu.state.rflags() & !(Rflags::VM | Rflags::RF).bits();
    if cpu.state.v8086() && cpu.state.iopl() < 3 {
        if cpu.state.cr4 & cr4::VME == 0 || op.size != 2 {
            return Err(cpu.raise(Exception::gp(0)));
        }
        flags = cpu.flags_with_virtual_interrupt(flags);
    }
    let mut stack = Stack::current(&cpu.state);
    stack.push(cpu, u64::from(op.size), flags)?;
    stack.commit_pointer(cpu);
    Ok(Flow::Next)
}

fn popf(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let restricted = cpu.state.v8086() && cpu.state.iopl() < 3;
    if restricted && (cpu.state.cr4 & cr4::VME == 0 || op.size != 2) {
        return Err(cpu.raise(Exception::gp(0)));
    }
    let mut stack = Stack::current(&cpu.state);
    let flags = stack.pop(cpu, u64::from(op.size))?;
    let mut mask = ANY16;
    if op.size != 2 {
        mask |= ANY32;
    }
    if restricted {
        cpu.check_virtual_flags(flags)?;
    } else {
        if cpu.owns_interrupt_flag() {
            mask |= Rflags::IF;
        }
        if cpu.state.cpl == 0 {
            mask |= Rflags::IOPL;
        }
    }
    stack.commit_pointer(cpu);
    let old = cpu.state.rflags_system;
    let kept = cpu.state.rflags() & !mask.bits() & !Rflags::RF.bits();
    cpu.state.set_rflags(kept | (flags & mask.bits()));
    if restricted {
        cpu.set_virtual_interrupt(flags & Rflags::IF.bits() != 0);
    }
    Ok(cpu.system_flags_changed(op, old))
}

fn cli(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    if cpu.owns_interrupt_flag() {
        cpu.set_system_flag(Rflags::IF, false);
    } else if cpu.owns_virtual_interrupt_flag() {
        cpu.set_virtual_interrupt(false);
    } else {
        return Err(cpu.raise(Exception::gp(0)));
    }
    Ok(Flow::Next)
}

fn sti(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.owns_interrupt_flag() {
        if cpu.state.flag(Rflags::IF) {
            return Ok(Flow::Next);
        }
        cpu.set_system_flag(Rflags::IF, true);
        cpu.state.interruptibility |= interruptibility::STI;
        cpu.refresh_local();
        return Ok(cpu.end_after(op));
    }
    if !cpu.owns_virtual_interrupt_flag() || cpu.state.flag(Rflags::VIP) {
        return Err(cpu.raise(Exception::gp(0)));
    }
    cpu.set_virtual_interrupt(true);
    Ok(Flow::Next)
}

fn cld(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    cpu.set_system_flag(Rflags::DF, false);
    Ok(Flow::Next)
}

fn std(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    cpu.set_system_flag(Rflags::DF, true);
    Ok(Flow::Next)
}

fn clc(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    cpu.state.status = cpu.state.status.with(Rflags::CF, false);
    Ok(Flow::Next)
}

fn stc(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    cpu.state.status = cpu.state.status.with(Rflags::CF, true);
    Ok(Flow::Next)
}

fn cmc(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    let status = cpu.state.status;
    cpu.state.status = status.with(Rflags::CF, !status.cf());
    Ok(Flow::Next)
}

/// AH := SF:ZF:0:AF:0:PF:1:CF.
fn lahf(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    let low = (cpu.state.status.to_rflags() & 0xd5) | Rflags::FIXED.bits();
    let rax = &mut cpu.state.regs[usize::from(reg::RAX)];
    *rax = (*rax & !0xff00) | (low << 8);
    Ok(Flow::Next)
}

/// The five low status flags from AH; OF stays.
fn sahf(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    let ah = (cpu.state.regs[usize::from(reg::RAX)] >> 8) & 0xd5;
    let overflow = cpu.state.status.to_rflags() & Rflags::OF.bits();
    cpu.state.status = Status::from_rflags(ah | overflow);
    Ok(Flow::Next)
}

fn hlt(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.state.cpl != 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    if cpu.controls.hlt_exiting {
        return Err(cpu.exit(Exit::Hlt));
    }
    cpu.state.activity = Activity::Halted;
    cpu.refresh_local();
    Ok(cpu.end_after(op))
}

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let (handler, size): (Handler, u8) = match ins.code() {
        Code::Pushfw => (pushf, 2),
        Code::Pushfd => (pushf, 4),
        Code::Pushfq => (pushf, 8),
        Code::Popfw => (popf, 2),
        Code::Popfd => (popf, 4),
        Code::Popfq => (popf, 8),
        Code::Cli => (cli, 0),
        Code::Sti => (sti, 0),
        Code::Cld => (cld, 0),
        Code::Std => (std, 0),
        Code::Clc => (clc, 0),
        Code::Stc => (stc, 0),
        Code::Cmc => (cmc, 0),
        Code::Lahf => (lahf, 0),
        Code::Sahf => (sahf, 0),
        Code::Hlt => (hlt, 0),
        _ => return None,
    };
    let mut op = op_base(ins, ctx, handler);
    op.size = size;
    Some(op)
}
