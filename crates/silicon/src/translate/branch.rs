//! Instructions that end a block: near jumps, calls and returns of 64-bit mode.

use std::mem::offset_of;

use iced_x86::code_asm::{CodeLabel, qword_ptr};
use iced_x86::{Code, FlowControl, Instruction, OpKind, Register};

use super::Failure;
use super::emit::{Emitter, Kind, Result};
use super::memory::suits_memory;
use super::registers::{ADDRESS, GUEST_RSP, VALUE, field, slot};
use crate::cpu::Cpu;
use crate::exec::operand::{condition, is_memory};
use crate::state::reg;

/// Whether the branch can be translated.
pub(super) fn suits(ins: &Instruction) -> bool {
    if ins.is_invalid() {
        return false;
    }
    match ins.flow_control() {
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::Call => {
            let near = ins.is_jmp_short_or_near() || ins.is_jcc_short_or_near() || ins.is_call_near();
            near && ins.op0_kind() == OpKind::NearBranch64
        }
        FlowControl::IndirectBranch | FlowControl::IndirectCall => {
            let near = matches!(ins.code(), Code::Jmp_rm64 | Code::Call_rm64);
            near && (!is_memory(ins, 0) || suits_memory(ins))
        }
        FlowControl::Return => match ins.code() {
            Code::Retnq => true,
            Code::Retnq_imm16 => ins.immediate16() < 0x7000,
            _ => false,
        },
        _ => false,
    }
}

impl Emitter<'_> {
    /// Translates operation `index`, a branch that [`suits`] and ends the block.
    pub(super) fn branch(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        let next = ins.next_ip() as i64;
        match ins.flow_control() {
            FlowControl::UnconditionalBranch => {
                self.go_to(ins.near_branch_target() as i64, self.taken(index, 0))
            }
            FlowControl::ConditionalBranch => self.conditional(ins, next, index),
            FlowControl::Call => {
                self.stack(-8, Kind::Store, index)?;
                self.push_return(next, index)?;
                self.go_to(ins.near_branch_target() as i64, self.taken(index, -8))
            }
            FlowControl::IndirectBranch => {
                self.target(ins, index)?;
                self.go_to_address(self.taken(index, 0))
            }
            FlowControl::IndirectCall => self.indirect_call(ins, next, index),
            FlowControl::Return => {
                let taken = 8 + if ins.op_count() == 1 { ins.immediate16() as i16 } else { 0 };
                self.stack(0, Kind::Load, index)?;
                self.may_fault(index);
                self.a.mov(ADDRESS, qword_ptr(ADDRESS))?;
                self.a.lea(GUEST_RSP, qword_ptr(GUEST_RSP + i32::from(taken)))?;
                self.go_to_address(self.taken(index, taken))
            }
            _ => Err(Failure::Unsuited),
        }
    }

    fn conditional(&mut self, ins: &Instruction, next: i64, index: usize) -> Result<()> {
        let condition = condition(ins).ok_or(Failure::Unsuited)?;
        self.load_flags()?;
        self.save_flags()?;
        let flags = self.flags;
        let mut taken = self.a.create_label();
        self.jump_if(condition, taken)?;
        self.go_to(next, 0)?;
        self.flags = flags;
        self.a.set_label(&mut taken)?;
        self.go_to(ins.near_branch_target() as i64, self.taken(index, 0))
    }

    fn jump_if(&mut self, condition: u8, to: CodeLabel) -> Result<()> {
        let a = &mut self.a;
        let jumped = match condition {
            0 => a.jo(to),
            1 => a.jno(to),
            2 => a.jb(to),
            3 => a.jae(to),
            4 => a.je(to),
            5 => a.jne(to),
            6 => a.jbe(to),
            7 => a.ja(to),
            8 => a.js(to),
            9 => a.jns(to),
            10 => a.jp(to),
            11 => a.jnp(to),
            12 => a.jl(to),
            13 => a.jge(to),
            14 => a.jle(to),
            _ => a.jg(to),
        };
        Ok(jumped?)
    }

    /// Stores the return address where [`ADDRESS`] points to, and takes room for it.
    fn push_return(&mut self, next: i64, index: usize) -> Result<()> {
        self.a.mov(VALUE, slot(reg::IP_BASE))?;
        self.a.lea(VALUE, qword_ptr(VALUE + next as i32))?;
        self.may_fault(index);
        self.a.mov(qword_ptr(ADDRESS), VALUE)?;
        Ok(self.a.lea(GUEST_RSP, qword_ptr(GUEST_RSP - 8))?)
    }

    /// Loads [`ADDRESS`] with the target of an indirect branch.
    fn target(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        if is_memory(ins, 0) {
            self.access(ins, Kind::Load, 8, index)?;
            self.may_fault(index);
            return Ok(self.a.mov(ADDRESS, qword_ptr(ADDRESS))?);
        }
        let register: Register = ins.op0_register();
        let target = self.in_register(register, ADDRESS)?;
        if target != ADDRESS {
            self.a.mov(ADDRESS, target)?;
        }
        Ok(())
    }

    fn indirect_call(&mut self, ins: &Instruction, next: i64, index: usize) -> Result<()> {
        let kept = field(offset_of!(Cpu, translator.kept));
        self.target(ins, index)?;
        self.a.mov(kept, ADDRESS)?;
        self.stack(-8, Kind::Store, index)?;
        self.push_return(next, index)?;
        self.a.mov(ADDRESS, kept)?;
        self.go_to_address(self.taken(index, -8))
    }
}
