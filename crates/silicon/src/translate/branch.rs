//! Instructions that end a block: near jumps, calls and returns of 64-bit mode.

use std::mem::offset_of;

use iced_x86::code_asm::qword_ptr;
use iced_x86::{Code, FlowControl, Instruction, OpKind, Register};

use super::Failure;
use super::edges::Jump;
use super::emit::{Emitter, Kind, Result};
use super::memory::{Rules, suits_memory};
use super::registers::{ADDRESS, At, GUEST_RSP, field, slot};
use crate::cpu::Cpu;
use crate::exec::operand::{condition, is_memory};
use crate::mmu::tlb::PAGE_SIZE;
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
                let to = self.stack(-8, Kind::Store, index)?;
                self.push_return(to, next, index)?;
                let (target, taken) = (ins.near_branch_target() as i64, self.taken(index, -8));
                if returns_to_page(next) { self.call(target, next, taken) } else { self.go_to(target, taken) }
            }
            FlowControl::IndirectBranch => {
                self.target(ins, index)?;
                self.go_to_address(self.taken(index, 0))
            }
            FlowControl::IndirectCall => self.indirect_call(ins, next, index),
            FlowControl::Return => {
                let taken = 8 + if ins.op_count() == 1 { ins.immediate16() as i16 } else { 0 };
                let from = self.stack(0, Kind::Load, index)?.quad();
                self.may_fault(index);
                self.a.mov(ADDRESS, from)?;
                self.a.lea(GUEST_RSP, qword_ptr(GUEST_RSP + i32::from(taken)))?;
                self.return_to_address(self.taken(index, taken))
            }
            _ => Err(Failure::Unsuited),
        }
    }

    fn conditional(&mut self, ins: &Instruction, next: i64, index: usize) -> Result<()> {
        let condition = usize::from(condition(ins).ok_or(Failure::Unsuited)?);
        self.load_flags()?;
        let jumps = [JUMPS[condition & 15], JUMPS[(condition & 15) ^ 1]];
        self.go_either_way(jumps, ins.near_branch_target() as i64, next, self.taken(index, 0))
    }

    /// Stores the return address, which stays in [`ADDRESS`], and takes room for it.
    fn push_return(&mut self, to: At, next: i64, index: usize) -> Result<()> {
        self.a.mov(ADDRESS, slot(reg::IP_BASE))?;
        self.a.lea(ADDRESS, qword_ptr(ADDRESS + next as i32))?;
        self.may_fault(index);
        self.a.mov(to.quad(), ADDRESS)?;
        Ok(self.a.lea(GUEST_RSP, qword_ptr(GUEST_RSP - 8))?)
    }

    /// Loads [`ADDRESS`] with the target of an indirect branch.
    fn target(&mut self, ins: &Instruction, index: usize) -> Result<()> {
        if is_memory(ins, 0) {
            let from = self.access(ins, Kind::Load, Rules::size(8), 0, index)?.quad();
            self.may_fault(index);
            return Ok(self.a.mov(ADDRESS, from)?);
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
        let to = self.stack(-8, Kind::Store, index)?;
        self.push_return(to, next, index)?;
        if returns_to_page(next) {
            return self.call_address(next, self.taken(index, -8));
        }
        self.a.mov(ADDRESS, kept)?;
        self.go_to_address(self.taken(index, -8))
    }
}

/// Whether what a call returns to lies in its page. What is behind the page may be no address that a return can go to, and the
/// return has to find that out.
fn returns_to_page(next: i64) -> bool {
    next < PAGE_SIZE as i64
}

/// Conditional jumps, by the number of the condition. Those of opposite conditions lie next to each other.
const JUMPS: [Jump; 16] = [
    |e, to| Ok(e.a.jo(to)?),
    |e, to| Ok(e.a.jno(to)?),
    |e, to| Ok(e.a.jb(to)?),
    |e, to| Ok(e.a.jae(to)?),
    |e, to| Ok(e.a.je(to)?),
    |e, to| Ok(e.a.jne(to)?),
    |e, to| Ok(e.a.jbe(to)?),
    |e, to| Ok(e.a.ja(to)?),
    |e, to| Ok(e.a.js(to)?),
    |e, to| Ok(e.a.jns(to)?),
    |e, to| Ok(e.a.jp(to)?),
    |e, to| Ok(e.a.jnp(to)?),
    |e, to| Ok(e.a.jl(to)?),
    |e, to| Ok(e.a.jge(to)?),
    |e, to| Ok(e.a.jle(to)?),
    |e, to| Ok(e.a.jg(to)?),
];
