//! PUSHF, POPF, CLI, STI, and HLT (SDM vol. 2; vol. 3B, 20.3 and 20.4 for VME
//! and PVI).

use iced_x86::{Code, Instruction};

use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::flags::Rflags;
use crate::mmu::Word;
use crate::state::{Activity, cr4, interruptibility};
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

    /// Whether PUSHF and POPF of `size` bytes act on VIF: in virtual-8086 mode below IOPL 3. #GP(0) where they
    /// may not be used at all.
    fn check_virtual_stack_flags(&mut self, size: usize) -> Result<bool, Abort> {
        let restricted = self.state.v8086() && self.state.iopl() < 3;
        if restricted && (self.state.cr4 & cr4::VME == 0 || size != 2) {
            return Err(self.raise(Exception::gp(0)));
        }
        Ok(restricted)
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
            self.mode_changed();
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

fn pushf<T: Word>(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    let mut flags = cpu.state.rflags() & !(Rflags::VM | Rflags::RF).bits();
    if cpu.check_virtual_stack_flags(T::SIZE)? {
        flags = cpu.flags_with_virtual_interrupt(flags);
    }
    cpu.push(T::from_u64(flags))?;
    Ok(Flow::Next)
}

fn popf<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let restricted = cpu.check_virtual_stack_flags(T::SIZE)?;
    let flags = cpu.peek::<T>(0)?.to_u64();
    let mut mask = ANY16;
    if T::SIZE != 2 {
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
    cpu.set_sp(cpu.rsp().wrapping_add(T::SIZE as u64));
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
    let handler: Handler = match ins.code() {
        Code::Pushfw => pushf::<u16>,
        Code::Pushfd => pushf::<u32>,
        Code::Pushfq => pushf::<u64>,
        Code::Popfw => popf::<u16>,
        Code::Popfd => popf::<u32>,
        Code::Popfq => popf::<u64>,
        Code::Cli => cli,
        Code::Sti => sti,
        Code::Hlt => hlt,
        _ => return None,
    };
    Some(op_base(ins, ctx, handler))
}
