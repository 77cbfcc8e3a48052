//! What is between the drawn instructions of a program: branches, loops, calls, and what changes base registers and flags.

use iced_x86::{Code, Instruction, MemoryOperand, Register};

use super::operands::{CONSTANTS, COUNTERS, RSP, gpr32, gpr64};
use super::program::{Item, Label};
use super::writer::{Writer, base_page, branch};
use crate::address;
use crate::layout::{PAGE, WRITABLE};
use crate::machine::Machine;

/// Conditional branches.
const CONDITIONAL: [Code; 16] = [
    Code::Jo_rel32_64,
    Code::Jno_rel32_64,
    Code::Jb_rel32_64,
    Code::Jae_rel32_64,
    Code::Je_rel32_64,
    Code::Jne_rel32_64,
    Code::Jbe_rel32_64,
    Code::Ja_rel32_64,
    Code::Js_rel32_64,
    Code::Jns_rel32_64,
    Code::Jp_rel32_64,
    Code::Jnp_rel32_64,
    Code::Jl_rel32_64,
    Code::Jge_rel32_64,
    Code::Jle_rel32_64,
    Code::Jg_rel32_64,
];

/// RFLAGS.AC.
const AC: u64 = 1 << 18;

impl Writer<'_> {
    /// A branch to a place ahead, with something that it depends on before it, often.
    pub(super) fn branch_ahead(&mut self, ahead: &mut Vec<(Label, u64)>) {
        if self.rng.percent(50) {
            self.compare_something();
        }
        let label = match self.rng.percent(8).then(|| self.outer_label()).flatten() {
            Some(outer) => outer,
            None if !ahead.is_empty() && self.rng.percent(30) => {
                ahead[self.rng.below(ahead.len() as u64) as usize].0
            }
            None => self.ahead(ahead),
        };
        let code = match self.rng.below(20) {
            0..=17 => self.rng.pick(&CONDITIONAL),
            18 => Code::Jmp_rel32_64,
            _ => return self.count_branch(ahead),
        };
        let short = self.rng.percent(80);
        self.push(Item { short, ..Item::to(branch(code), label) });
    }

    fn ahead(&mut self, ahead: &mut Vec<(Label, u64)>) -> Label {
        let label = self.label();
        ahead.push((label, self.rng.range(1, 6)));
        label
    }

    /// JRCXZ or JECXZ; they have no long form.
    fn count_branch(&mut self, ahead: &mut Vec<(Label, u64)>) {
        let label = self.label();
        ahead.push((label, 1));
        let code = self.rng.pick(&[Code::Jrcxz_rel8_64, Code::Jecxz_rel8_64]);
        self.push(Item::to(branch(code), label));
    }

    /// CMP or TEST of registers, or of memory at a base register.
    fn compare_something(&mut self) {
        let [one, other] = [0, 1].map(|_| self.rng.below(16) as usize);
        let memory = MemoryOperand::with_base_displ(gpr64(self.bases[0]), self.clusters[0]);
        let instruction = match self.rng.below(6) {
            0 => Instruction::with2(Code::Cmp_r64_rm64, gpr64(one), gpr64(other)),
            1 => Instruction::with2(Code::Cmp_r32_rm32, gpr32(one), gpr32(other)),
            2 => Instruction::with2(Code::Test_rm32_r32, gpr32(one), gpr32(one)),
            3 => Instruction::with2(Code::Cmp_r32_rm32, gpr32(one), memory),
            4 => Instruction::with2(Code::Cmp_rm32_imm8, memory, self.rng.below(128) as i32),
            _ => Instruction::with2(Code::Cmp_rm64_imm32, gpr64(one), self.rng.next() as i32),
        };
        self.add(instruction);
    }

    /// A loop: its count is in a register that nothing else writes, or in memory of the program's own.
    pub(super) fn repeat(&mut self, count: u64, length: u64, depth: usize) {
        let slot = COUNTERS + 64 * depth as u64;
        let register = self.counter(depth).filter(|_| self.rng.percent(75));
        match register {
            Some(register) => self.load(register, count),
            None => {
                let memory = MemoryOperand::with_displ(slot, 8);
                self.add(Instruction::with2(Code::Mov_rm32_imm32, memory, count as i32));
            }
        }
        let (top, past) = (self.label(), self.label());
        self.place_top(top);
        self.enter_scope(past);
        self.scope(length, depth);
        self.leave_scope();
        self.define_flags();
        match register {
            Some(register) => self.count_down(register, top),
            None => {
                let memory = MemoryOperand::with_displ(slot, 8);
                self.add(Instruction::with1(Code::Dec_rm32, memory));
                self.push(Item { short: true, ..Item::to(branch(Code::Jg_rel32_64), top) });
            }
        }
        self.place(past);
    }

    fn count_down(&mut self, register: usize, top: Label) {
        let (wide, half) = (gpr64(register), gpr32(register));
        let near = self.program.items.len() - self.program.labels[top] < 8;
        let code = match self.rng.below(5) {
            0 if register == 1 && near => {
                return self.push(Item::to(branch(Code::Loop_rel8_64_RCX), top));
            }
            0 | 1 => {
                self.add(Instruction::with1(Code::Dec_rm64, wide));
                Code::Jne_rel32_64
            }
            2 => {
                self.add(Instruction::with2(Code::Sub_rm32_imm8, half, 1));
                Code::Jg_rel32_64
            }
            3 => {
                self.add(Instruction::with2(Code::Lea_r64_m, wide, MemoryOperand::with_base_displ(wide, -1)));
                self.add(Instruction::with2(Code::Test_rm64_r64, wide, wide));
                Code::Jne_rel32_64
            }
            _ => {
                self.add(Instruction::with2(Code::Add_rm64_imm8, wide, -1));
                Code::Jne_rel32_64
            }
        };
        self.push(Item { short: true, ..Item::to(branch(code), top) });
    }

    /// A call: direct, by a register, or by a table.
    pub(super) fn call(&mut self) {
        let function = self.callee(self.balanced);
        match self.rng.below(4) {
            0 => {
                let register = self.address_of(function);
                self.add(Instruction::with1(Code::Call_rm64, gpr64(register)));
            }
            1 => {
                let Some(at) = self.table(&[function]) else { return };
                let memory = MemoryOperand::with_displ(at, 8);
                self.add(Instruction::with1(Code::Call_rm64, memory));
            }
            _ => self.push(Item::to(branch(Code::Call_rel32_64), function)),
        }
    }

    /// A register with the address of a label.
    fn address_of(&mut self, label: Label) -> usize {
        let register = self.free();
        let instruction = if self.rng.percent(50) {
            let memory = MemoryOperand::with_base_displ(Register::RIP, 0x1000_0000);
            Instruction::with2(Code::Lea_r64_m, gpr64(register), memory)
        } else {
            Instruction::with2(Code::Mov_r64_imm64, gpr64(register), 0u64)
        };
        if let Ok(instruction) = instruction {
            self.push(Item::to(instruction, label));
        }
        register
    }

    /// Addresses of labels in memory.
    fn table(&mut self, labels: &[Label]) -> Option<u64> {
        let at = self.constant(&vec![0; 8 * labels.len()])?;
        self.program.tables.extend((0..).zip(labels).map(|(i, label)| (at + 8 * i, *label)));
        Some(at)
    }

    /// A jump to a place ahead by a register, a table, or a return address.
    pub(super) fn indirect(&mut self, ahead: &mut Vec<(Label, u64)>) {
        match self.rng.below(4) {
            0 => {
                let label = self.ahead(ahead);
                let register = self.address_of(label);
                self.add(Instruction::with1(Code::Jmp_rm64, gpr64(register)));
            }
            1 => {
                let label = self.ahead(ahead);
                let register = self.address_of(label);
                self.add(Instruction::with1(Code::Push_r64, gpr64(register)));
                self.push(Item::plain(Instruction::with(Code::Retnq)));
            }
            _ => {
                let labels: Vec<Label> = (0..4).map(|_| self.ahead(ahead)).collect();
                let Some(at) = self.table(&labels) else { return };
                let register = self.free();
                self.add(Instruction::with2(Code::And_rm32_imm8, gpr32(register), 3));
                let memory = MemoryOperand::new(
                    Register::None,
                    gpr64(register),
                    8,
                    at as i64,
                    8,
                    false,
                    Register::None,
                );
                self.add(Instruction::with1(Code::Jmp_rm64, memory));
            }
        }
    }

    /// A base register moves on, or points elsewhere.
    pub(super) fn move_base(&mut self) {
        let base = self.rng.below(self.bases.len() as u64) as usize;
        let register = gpr64(self.bases[base]);
        let step = self.rng.pick(&[1, 8, 16, 64, 64, 0x78, -8, -64, -16, 0x400]);
        match self.rng.below(8) {
            0..=3 => self.add(Instruction::with2(Code::Add_rm64_imm32, register, step)),
            4 => self.add(Instruction::with2(Code::Sub_rm64_imm32, register, step)),
            5 => {
                let memory = MemoryOperand::with_base_displ(register, i64::from(step));
                self.add(Instruction::with2(Code::Lea_r64_m, register, memory));
            }
            6 => {
                let value = self.page() + self.low_bits[base];
                self.load(self.bases[base], value);
            }
            _ => {
                let value = self.page() + self.low_bits[base];
                let Some(at) = self.constant(&value.to_le_bytes()) else { return };
                self.add(Instruction::with2(Code::Mov_r64_rm64, register, MemoryOperand::with_displ(at, 8)));
            }
        }
    }

    /// A page to point to, whatever the run.
    fn page(&mut self) -> u64 {
        if self.rng.percent(8) { base_page(self.rng) } else { WRITABLE.start + PAGE * self.rng.below(3) }
    }

    /// A pointer is loaded from memory, and what it points to is used.
    pub(super) fn pointer(&mut self) {
        let value = self.page() + (self.rng.below(PAGE) & !7);
        let Some(at) = self.constant(&value.to_le_bytes()) else { return };
        let [pointer, other] = [0, 1].map(|_| self.free());
        let from = MemoryOperand::with_displ(at, 8);
        self.add(Instruction::with2(Code::Mov_r64_rm64, gpr64(pointer), from));
        for _ in 0..self.rng.range(1, 4) {
            let displacement = self.rng.below(0x80) as i64 & !7;
            let memory = MemoryOperand::with_base_displ(gpr64(pointer), displacement);
            let instruction = match self.rng.below(4) {
                0 if other != pointer => Instruction::with2(Code::Mov_r64_rm64, gpr64(other), memory),
                1 if other != pointer => Instruction::with2(Code::Add_r32_rm32, gpr32(other), memory),
                2 => Instruction::with2(Code::Mov_rm64_r64, memory, gpr64(other)),
                _ => Instruction::with2(Code::Add_rm32_imm8, memory, 1),
            };
            self.add(instruction);
        }
    }

    /// Flags from memory, or from AH, or of one instruction.
    pub(super) fn set_flags(&mut self) {
        match self.rng.below(6) {
            0 if !self.balanced => {
                let flags = self.rng.below(0x1000) & 0x8d5 | 2;
                self.add(Instruction::with1(Code::Pushq_imm32, flags as i32));
                self.push(Item::plain(Instruction::with(Code::Popfq)));
            }
            1 if self.protected & 1 == 0 => {
                self.push(Item::plain(Instruction::with(Code::Lahf)));
                self.draw();
                self.push(Item::plain(Instruction::with(Code::Sahf)));
            }
            2 => self.push(Item::plain(Instruction::with(Code::Stc))),
            3 => self.push(Item::plain(Instruction::with(Code::Cmc))),
            4 => {
                let code = self.rng.pick(&[Code::Std, Code::Cld, Code::Clc]);
                self.push(Item::plain(Instruction::with(code)));
            }
            _ => self.compare_something(),
        }
    }

    /// Another rounding mode, or, seldom, unmasked exceptions.
    pub(super) fn set_control(&mut self) {
        let mxcsr = 0x1f80 | (self.rng.below(4) << 13) | if self.rng.percent(20) { 0x8040 } else { 0 };
        let mxcsr = if self.rng.percent(10) { mxcsr & !(1 << self.rng.range(7, 13)) } else { mxcsr };
        let Some(at) = self.constant(&mxcsr.to_le_bytes()) else { return };
        let instruction = Instruction::with1(Code::Ldmxcsr_m32, MemoryOperand::with_displ(at, 8));
        self.add(instruction);
    }

    /// The state that a run starts from. The first runs go well, mostly, so that blocks are translated; the last ones have other
    /// pages at hand, or none, and exceptions that are not masked.
    pub(super) fn machine(&mut self, calm: bool) -> Machine {
        let mut machine = self.any_case().machine;
        for (i, base) in self.bases.clone().into_iter().enumerate() {
            let moved = self.rng.percent(25);
            machine.gpr[base] = match calm {
                true => self.first_base(base),
                false if moved => base_page(self.rng) + self.rng.below(PAGE),
                false => base_page(self.rng) + self.low_bits[i],
            };
        }
        machine.gpr[RSP] = match self.calls {
            // Nothing else writes return addresses; the page below is missing.
            true => CONSTANTS - 16 - (self.rng.below(8) << self.rng.below(5)),
            false if calm => WRITABLE.start + 2 * PAGE + self.rng.below(0x200) * 8,
            false => address::stack_pointer(self.rng),
        };
        [machine.fs_base, machine.gs_base] = self.segment_bases;
        if calm || !self.rng.percent(10) {
            machine.rflags &= !AC;
        }
        if calm || self.rng.percent(80) {
            machine.vectors.mxcsr |= 0x1f80;
        }
        if calm || self.rng.percent(80) {
            machine.vectors.fcw |= 0x3f;
            machine.vectors.fsw &= !0x8080;
        }
        machine
    }
}
