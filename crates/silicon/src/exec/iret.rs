//! IRET in all its forms (SDM vol. 2, IRET/IRETD/IRETQ).

use iced_x86::{Code, Instruction};

use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::flags::Rflags;
use crate::state::{CodeSize, Seg, Segment, cr4, interruptibility};
use crate::system::segment::rpl;
use crate::system::stack::Stack;

/// Flags that IRET loads whatever the privilege level, with a 16-bit operand.
const ANY16: Rflags = Rflags::STATUS.union(Rflags::TF).union(Rflags::DF).union(Rflags::NT);
/// What wider operands load besides.
const ANY32: Rflags = Rflags::RF.union(Rflags::AC).union(Rflags::ID);

fn iret(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    // NMIs are unblocked even if the instruction faults (SDM vol. 3C, 25.3).
    let unblocked = cpu.state.interruptibility & interruptibility::NMI != 0;
    cpu.state.interruptibility &= !interruptibility::NMI;
    cpu.stalled_in_iret(unblocked)?;
    let flow = if cpu.state.real_mode() {
        iret_real(cpu, op)
    } else if cpu.state.v8086() {
        iret_v8086(cpu, op)
    } else if cpu.state.flag(Rflags::NT) {
        if cpu.state.long_mode() {
            return Err(cpu.raise(Exception::gp(0)));
        }
        cpu.return_to_task(op)
    } else {
        iret_protected(cpu, op)
    }?;
    cpu.refresh_local();
    Ok(flow)
}

/// Replaces the flags in `mask` by those of `image`.
fn load_flags(cpu: &mut Cpu, image: u64, mask: Rflags) {
    let old = cpu.state.rflags();
    cpu.state.set_rflags((old & !mask.bits()) | (image & mask.bits()));
}

fn iret_real(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let size = u64::from(op.size);
    let mut stack = Stack::current(&cpu.state);
    let ip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    let flags = stack.pop(cpu, size)?;
    let cs = cpu.state.segs[Seg::Cs as usize].real(selector);
    cpu.check_far_target(&cs, ip)?;
    stack.commit_pointer(cpu);
    let narrow = ANY16 | Rflags::IF | Rflags::IOPL;
    load_flags(cpu, flags, if op.size == 2 { narrow } else { narrow | ANY32 });
    cpu.transfer(cs, 0, ip);
    Ok(Flow::End)
}

/// In virtual-8086 mode: with IOPL 3 as in real mode but for IOPL; below that only the 16-bit form under VME,
/// where IF means VIF.
fn iret_v8086(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let virtual_if = cpu.state.iopl() < 3;
    if virtual_if && (cpu.state.cr4 & cr4::VME == 0 || op.size != 2) {
        return Err(cpu.raise(Exception::gp(0)));
    }
    let size = u64::from(op.size);
    let mut stack = Stack::current(&cpu.state);
    let ip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    let flags = stack.pop(cpu, size)?;
    if virtual_if {
        cpu.check_virtual_flags(flags)?;
    }
    let cs = Segment::v8086(selector);
    cpu.check_far_target(&cs, ip)?;
    stack.commit_pointer(cpu);
    if virtual_if {
        load_flags(cpu, flags, ANY16);
        cpu.set_virtual_interrupt(flags & Rflags::IF.bits() != 0);
    } else {
        let narrow = ANY16 | Rflags::IF;
        load_flags(cpu, flags, if op.size == 2 { narrow } else { narrow | ANY32 });
    }
    cpu.transfer(cs, 3, ip);
    Ok(Flow::End)
}

fn iret_protected(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let size = u64::from(op.size);
    let mut stack = Stack::current(&cpu.state);
    let ip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    let flags = stack.pop(cpu, size)?;
    let old_cpl = cpu.state.cpl;
    if flags & Rflags::VM.bits() != 0 && size == 4 && old_cpl == 0 && !cpu.state.long_mode() {
        return return_to_v8086(cpu, stack, (selector, ip), flags);
    }
    let cs = cpu.return_segment(selector)?;
    let cpl = rpl(selector);
    // 64-bit mode pops SS:RSP always, the others for an outer level only.
    let full = cpl != old_cpl || cpu.state.code_size == CodeSize::Bits64;
    let outer = if full {
        let pointer = stack.pop(cpu, size)?;
        let ss_selector = stack.pop(cpu, size)? as u16;
        Some((cpu.return_stack(ss_selector, cpl, cs.long())?, pointer))
    } else {
        None
    };
    let segment = cs.segment(selector);
    cpu.check_far_target(&segment, ip)?;
    cpu.touch_descriptor(&cs)?;
    let mut mask = ANY16;
    if size != 2 {
        mask |= ANY32;
    }
    if old_cpl <= cpu.state.iopl() {
        mask |= Rflags::IF;
    }
    if old_cpl == 0 {
        mask |= Rflags::IOPL;
        if size != 2 {
            mask |= Rflags::VIF | Rflags::VIP;
        }
    }
    load_flags(cpu, flags, mask);
    match outer {
        Some((ss, pointer)) => cpu.enter_outer(segment, ip, ss, pointer),
        None => {
            stack.commit_pointer(cpu);
            cpu.transfer(segment, cpl, ip);
        }
    }
    Ok(Flow::End)
}

/// RETURN-TO-VIRTUAL-8086-MODE, from privilege level 0.
fn return_to_v8086(
    cpu: &mut Cpu,
    mut stack: Stack,
    (selector, ip): (u16, u64),
    flags: u64,
) -> Result<Flow, Abort> {
    let pointer = stack.pop(cpu, 4)?;
    let mut popped = [0; 5];
    for selector in &mut popped {
        *selector = stack.pop(cpu, 4)? as u16;
    }
    let cs = Segment::v8086(selector);
    cpu.check_far_target(&cs, ip)?;
    cpu.state.set_rflags(flags);
    for (seg, selector) in [Seg::Ss, Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs].into_iter().zip(popped) {
        cpu.state.segs[seg as usize] = Segment::v8086(selector);
    }
    cpu.state.regs[usize::from(crate::state::reg::RSP)] = pointer;
    cpu.transfer(cs, 3, ip);
    Ok(Flow::End)
}

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let size = match ins.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        Code::Iretq => 8,
        _ => return None,
    };
    let mut op = op_base(ins, ctx, iret);
    op.size = size;
    Some(op)
}
