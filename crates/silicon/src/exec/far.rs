//! Far JMP, CALL and RET: to code segments, through call gates, and to tasks (SDM vol. 2, the three
//! instructions' operation; vol. 3A, 5.8).

use iced_x86::{Code, Instruction};

use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::flags::Rflags;
use crate::state::{CodeSize, Seg, Segment, cr0};
use crate::system::segment::{Descriptor, code, is_null, kind, rpl};
use crate::system::stack::Stack;
use crate::system::task::{Nesting, TaskEntry};

/// A far pointer.
#[derive(Clone, Copy)]
struct Pointer {
    selector: u16,
    offset: u64,
}

/// How a far transfer pushes its return address.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Transfer {
    Jump,
    Call,
}

/// The pointer in memory: offset of `op.size` bytes, then the selector.
fn memory_pointer(cpu: &mut Cpu, op: &Op) -> Result<Pointer, Abort> {
    let (lin, seg) = (cpu.ea(op, usize::from(op.size) + 2, false)?, cpu.op_seg(op));
    cpu.far_pointer(seg, lin, op.size).map(|(selector, offset)| Pointer { selector, offset })
}

impl Cpu {
    /// Reads a far pointer: selector and offset of `size` bytes.
    pub(crate) fn far_pointer(&mut self, seg: Seg, lin: u64, size: u8) -> Result<(u16, u64), Abort> {
        let offset = match size {
            2 => u64::from(self.load::<u16>(seg, lin)?),
            4 => u64::from(self.load::<u32>(seg, lin)?),
            _ => self.load::<u64>(seg, lin)?,
        };
        let at = self.wrap_linear(lin.wrapping_add(u64::from(size)));
        Ok((self.load::<u16>(seg, at)?, offset))
    }

    /// Wraps a linear address at 4 GiB outside 64-bit mode.
    pub(crate) fn wrap_linear(&self, lin: u64) -> u64 {
        if self.state.code_size == CodeSize::Bits64 { lin } else { lin & 0xffff_ffff }
    }
}

fn jump_direct(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    transfer(cpu, op, Pointer { selector: op.extra as u16, offset: op.imm }, Transfer::Jump)
}

fn call_direct(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    transfer(cpu, op, Pointer { selector: op.extra as u16, offset: op.imm }, Transfer::Call)
}

fn jump_memory(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let target = memory_pointer(cpu, op)?;
    transfer(cpu, op, target, Transfer::Jump)
}

fn call_memory(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let target = memory_pointer(cpu, op)?;
    transfer(cpu, op, target, Transfer::Call)
}

fn transfer(cpu: &mut Cpu, op: &Op, target: Pointer, how: Transfer) -> Result<Flow, Abort> {
    if cpu.state.real_or_v8086() {
        return transfer_real(cpu, op, target, how);
    }
    if is_null(target.selector) {
        return Err(cpu.raise(Exception::gp(0)));
    }
    let fault = Exception::gp(code(target.selector));
    let descriptor = cpu.descriptor_or(target.selector, fault)?;
    if !descriptor.is_system() {
        let cs = code_segment(cpu, target.selector, &descriptor)?;
        return transfer_same(cpu, op, how, u64::from(op.size), (cs, target.offset), &descriptor);
    }
    let long = cpu.state.long_mode();
    match descriptor.kind() {
        kind::CALL_GATE => call_gate(cpu, op, target.selector, descriptor, how),
        kind::CALL_GATE16 if !long => call_gate(cpu, op, target.selector, descriptor, how),
        kind::TASK_GATE | kind::TSS16 | kind::TSS if !long => {
            task(cpu, op, target.selector, &descriptor, how)
        }
        _ => Err(cpu.raise(fault)),
    }
}

fn transfer_real(cpu: &mut Cpu, op: &Op, target: Pointer, how: Transfer) -> Result<Flow, Abort> {
    let old = cpu.state.segs[Seg::Cs as usize];
    let cs = if cpu.state.v8086() { Segment::v8086(target.selector) } else { old.real(target.selector) };
    let mut stack = Stack::current(&cpu.state);
    let size = u64::from(op.size);
    if how == Transfer::Call {
        stack.reserve(cpu, 2, size)?;
    }
    cpu.check_far_target(&cs, target.offset)?;
    if how == Transfer::Call {
        stack.push(cpu, size, u64::from(old.selector))?;
        stack.push(cpu, size, cpu.next_ip(op))?;
        stack.commit_pointer(cpu);
    }
    let cpl = cpu.state.cpl;
    cpu.transfer(cs, cpl, target.offset);
    Ok(Flow::End)
}

/// The code segment of a direct transfer, which keeps the privilege level.
fn code_segment(cpu: &mut Cpu, selector: u16, descriptor: &Descriptor) -> Result<Segment, Abort> {
    let cpl = cpu.state.cpl;
    let allowed = if descriptor.is_conforming_code() {
        descriptor.dpl() <= cpl
    } else {
        descriptor.is_code() && rpl(selector) <= cpl && descriptor.dpl() == cpl
    };
    let both_sizes = cpu.state.long_mode() && descriptor.long() && descriptor.big();
    if !allowed || both_sizes {
        return Err(cpu.raise(Exception::gp(code(selector))));
    }
    if !descriptor.present() {
        return Err(cpu.raise(Exception::np(code(selector))));
    }
    Ok(descriptor.segment((selector & !3) | u16::from(cpl)))
}

/// Goes to `target` at the same privilege level, pushing words of `size` bytes for a call.
fn transfer_same(
    cpu: &mut Cpu,
    op: &Op,
    how: Transfer,
    size: u64,
    (cs, ip): (Segment, u64),
    descriptor: &Descriptor,
) -> Result<Flow, Abort> {
    let mut stack = Stack::current(&cpu.state);
    if how == Transfer::Call {
        stack.reserve(cpu, 2, size)?;
    }
    cpu.check_far_target(&cs, ip)?;
    if how == Transfer::Call {
        let old = cpu.state.segs[Seg::Cs as usize].selector;
        stack.push(cpu, size, u64::from(old))?;
        stack.push(cpu, size, cpu.next_ip(op))?;
    }
    cpu.touch_descriptor(descriptor)?;
    if how == Transfer::Call {
        stack.commit_pointer(cpu);
    }
    let cpl = cpu.state.cpl;
    cpu.transfer(cs, cpl, ip);
    Ok(Flow::End)
}

/// Whether the gate or TSS descriptor `selector` may be used here: #GP and #NP as the SDM has them.
fn check_gate(cpu: &mut Cpu, selector: u16, gate: &Descriptor) -> Result<(), Abort> {
    if gate.dpl() < cpu.state.cpl || gate.dpl() < rpl(selector) {
        return Err(cpu.raise(Exception::gp(code(selector))));
    }
    if !gate.present() {
        return Err(cpu.raise(Exception::np(code(selector))));
    }
    Ok(())
}

fn call_gate(
    cpu: &mut Cpu,
    op: &Op,
    gate_selector: u16,
    gate: Descriptor,
    how: Transfer,
) -> Result<Flow, Abort> {
    let gate = cpu.widen(gate_selector, gate, Exception::gp(code(gate_selector)))?;
    check_gate(cpu, gate_selector, &gate)?;
    let selector = gate.gate_selector();
    if is_null(selector) {
        return Err(cpu.raise(Exception::gp(0)));
    }
    let fault = Exception::gp(code(selector));
    let descriptor = cpu.descriptor_or(selector, fault)?;
    let (cpl, long) = (cpu.state.cpl, cpu.state.long_mode());
    let conforming = descriptor.is_conforming_code();
    let level_fits = match how {
        Transfer::Jump if !conforming => descriptor.dpl() == cpl,
        _ => descriptor.dpl() <= cpl,
    };
    let wrong_size = long && (!descriptor.long() || descriptor.big());
    if !descriptor.is_code() || !level_fits || wrong_size {
        return Err(cpu.raise(fault));
    }
    if !descriptor.present() {
        return Err(cpu.raise(Exception::np(code(selector))));
    }
    let size = match gate.kind() {
        _ if long => 8,
        kind::CALL_GATE16 => 2,
        _ => 4,
    };
    let new_cpl = if conforming { cpl } else { descriptor.dpl() };
    let cs = descriptor.segment((selector & !3) | u16::from(new_cpl));
    if new_cpl == cpl {
        return transfer_same(cpu, op, how, size, (cs, gate.gate_offset()), &descriptor);
    }

    // MORE-PRIVILEGE: the caller's stack pointer, parameters and return address go to the inner stack.
    let mut stack = cpu.tss_stack(new_cpl)?;
    let parameters = if long { 0 } else { gate.gate_parameters() };
    stack.reserve(cpu, 4 + parameters, size)?;
    cpu.check_far_target(&cs, gate.gate_offset())?;
    let old_stack = Stack::current(&cpu.state);
    let old = cpu.state.segs;
    stack.push(cpu, size, u64::from(old[Seg::Ss as usize].selector))?;
    stack.push(cpu, size, cpu.rsp())?;
    for n in (0..parameters).rev() {
        let parameter = old_stack.peek(cpu, n * size, size)?;
        stack.push(cpu, size, parameter)?;
    }
    stack.push(cpu, size, u64::from(old[Seg::Cs as usize].selector))?;
    stack.push(cpu, size, cpu.next_ip(op))?;
    cpu.touch_descriptor(&descriptor)?;
    stack.commit(cpu);
    cpu.transfer(cs, new_cpl, gate.gate_offset());
    Ok(Flow::End)
}

/// A task gate or a TSS descriptor as the target.
fn task(
    cpu: &mut Cpu,
    op: &Op,
    selector: u16,
    descriptor: &Descriptor,
    how: Transfer,
) -> Result<Flow, Abort> {
    check_gate(cpu, selector, descriptor)?;
    let nesting = if how == Transfer::Call { Nesting::Nested } else { Nesting::Jump };
    let entry = TaskEntry { nesting, return_ip: cpu.next_ip(op), flags: cpu.state.rflags() };
    let late = if descriptor.kind() == kind::TASK_GATE {
        cpu.switch_through_gate(descriptor, entry)?
    } else if selector & 4 != 0 {
        return Err(cpu.raise(Exception::gp(code(selector))));
    } else {
        cpu.switch_task(selector, descriptor, entry)?
    };
    cpu.defer(late);
    Ok(Flow::End)
}

/// RET far; `op.imm` more bytes are dropped.
fn return_far(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let size = u64::from(op.size);
    let mut stack = Stack::current(&cpu.state);
    let ip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    if cpu.state.real_or_v8086() {
        let old = cpu.state.segs[Seg::Cs as usize];
        let cs = if cpu.state.v8086() { Segment::v8086(selector) } else { old.real(selector) };
        cpu.check_far_target(&cs, ip)?;
        stack.skip(op.imm);
        stack.commit_pointer(cpu);
        let cpl = cpu.state.cpl;
        cpu.transfer(cs, cpl, ip);
        return Ok(Flow::End);
    }
    let cs = cpu.return_segment(selector)?;
    let cpl = rpl(selector);
    stack.skip(op.imm);
    if cpl == cpu.state.cpl {
        cpu.check_far_target(&cs.segment(selector), ip)?;
        cpu.touch_descriptor(&cs)?;
        stack.commit_pointer(cpu);
        cpu.transfer(cs.segment(selector), cpl, ip);
        return Ok(Flow::End);
    }
    let pointer = stack.pop(cpu, size)?;
    let ss_selector = stack.pop(cpu, size)? as u16;
    let ss = cpu.return_stack(ss_selector, cpl, cs.long())?;
    cpu.check_far_target(&cs.segment(selector), ip)?;
    cpu.touch_descriptor(&cs)?;
    cpu.enter_outer(cs.segment(selector), ip, ss, pointer);
    // The parameters are dropped from the outer stack too.
    let mut stack = Stack::current(&cpu.state);
    stack.skip(op.imm);
    stack.commit_pointer(cpu);
    Ok(Flow::End)
}

impl Cpu {
    /// The code segment that RET far or IRET goes back to (SDM vol. 2, RET, PROTECTED-MODE).
    pub(crate) fn return_segment(&mut self, selector: u16) -> Result<Descriptor, Abort> {
        if is_null(selector) {
            return Err(self.raise(Exception::gp(0)));
        }
        let fault = Exception::gp(code(selector));
        let cs = self.descriptor_or(selector, fault)?;
        let level = rpl(selector);
        let fits = if cs.is_conforming_code() { cs.dpl() <= level } else { cs.dpl() == level };
        let both_sizes = self.state.long_mode() && cs.long() && cs.big();
        if !cs.is_code() || level < self.state.cpl || !fits || both_sizes {
            return Err(self.raise(fault));
        }
        if !cs.present() {
            return Err(self.raise(Exception::np(code(selector))));
        }
        Ok(cs)
    }

    /// The stack segment of a return to level `cpl` whose code is 64-bit if `long`.
    pub(crate) fn return_stack(&mut self, selector: u16, cpl: u8, long: bool) -> Result<Segment, Abort> {
        if is_null(selector) {
            if self.state.long_mode() && long && cpl != 3 && rpl(selector) == cpl {
                return Ok(Segment::null(selector, cpl));
            }
            return Err(self.raise(Exception::gp(0)));
        }
        let fault = Exception::gp(code(selector));
        let ss = self.descriptor_or(selector, fault)?;
        if rpl(selector) != cpl || ss.dpl() != cpl || !ss.is_writable_data() {
            return Err(self.raise(fault));
        }
        if !ss.present() {
            return Err(self.raise(Exception::ss(code(selector))));
        }
        self.touch_descriptor(&ss)?;
        Ok(ss.segment(selector))
    }

    /// Commits a return: code, stack, and (to an outer level) the data segments that it may not keep.
    pub(crate) fn enter_outer(&mut self, cs: Segment, ip: u64, ss: Segment, pointer: u64) {
        let cpl = rpl(cs.selector);
        let outer = cpl > self.state.cpl;
        self.state.segs[Seg::Ss as usize] = ss;
        self.transfer(cs, cpl, ip);
        Stack::current(&self.state).at(pointer).commit_pointer(self);
        if outer {
            self.drop_privileged_segments(cpl);
        }
    }

    /// IRET with NT set: back to the task that the back link names.
    pub(crate) fn return_to_task(&mut self, op: &Op) -> Result<Flow, Abort> {
        let link = self.system_linear(self.state.tr.base, 0);
        let selector: u16 = self.system_load(link)?;
        let fault = Exception::ts(code(selector));
        if selector & 4 != 0 {
            return Err(self.raise(fault));
        }
        let tss = self.descriptor_or(selector, fault)?;
        if !tss.is_system() || !matches!(tss.kind(), kind::TSS16_BUSY | kind::TSS_BUSY) {
            return Err(self.raise(fault));
        }
        if !tss.present() {
            return Err(self.raise(Exception::np(code(selector))));
        }
        let flags = self.state.rflags();
        let entry = TaskEntry { nesting: Nesting::Return, return_ip: self.next_ip(op), flags };
        let late = self.switch_task(selector, &tss, entry)?;
        self.defer(late);
        Ok(Flow::End)
    }

    /// In protected mode (not virtual-8086): CR0.PE set, VM clear.
    pub(crate) fn protected(&self) -> bool {
        self.state.cr0 & cr0::PE != 0 && !self.state.flag(Rflags::VM)
    }
}

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let (handler, size): (Handler, u8) = match ins.code() {
        Code::Jmp_ptr1616 => (jump_direct, 2),
        Code::Jmp_ptr1632 => (jump_direct, 4),
        Code::Call_ptr1616 => (call_direct, 2),
        Code::Call_ptr1632 => (call_direct, 4),
        Code::Jmp_m1616 => (jump_memory, 2),
        Code::Jmp_m1632 => (jump_memory, 4),
        Code::Jmp_m1664 => (jump_memory, 8),
        Code::Call_m1616 => (call_memory, 2),
        Code::Call_m1632 => (call_memory, 4),
        Code::Call_m1664 => (call_memory, 8),
        Code::Retfw | Code::Retfw_imm16 => (return_far, 2),
        Code::Retfd | Code::Retfd_imm16 => (return_far, 4),
        Code::Retfq | Code::Retfq_imm16 => (return_far, 8),
        _ => return None,
    };
    let mut op = op_base(ins, ctx, handler);
    op.size = size;
    match ins.code() {
        Code::Jmp_ptr1616 | Code::Call_ptr1616 => {
            op.imm = u64::from(ins.far_branch16());
            op.extra = u32::from(ins.far_branch_selector());
        }
        Code::Jmp_ptr1632 | Code::Call_ptr1632 => {
            op.imm = u64::from(ins.far_branch32());
            op.extra = u32::from(ins.far_branch_selector());
        }
        Code::Retfw_imm16 | Code::Retfd_imm16 | Code::Retfq_imm16 => op.imm = u64::from(ins.immediate16()),
        _ => {}
    }
    Some(op)
}
