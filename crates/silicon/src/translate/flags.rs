//! Where the guest's status flags are, and how they are brought there.
//!
//! Checks of memory accesses change the host's RFLAGS. What is in them then need not be kept if it can be had again: a CMP whose
//! operands are still there is executed once more by whoever wants to know, most often nobody ([`Recipe`]). Other flags go to
//! RAX, as `LAHF; SETO AL` has them.

use iced_x86::code_asm::{CodeLabel, al, eax, rax};
use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic, OpKind, Register,
};

use super::Failure;
use super::emit::{Cold, Emitter, Result};
use super::instruction::{changes_flags, effect_on_flags, general_form, lose_flags, writes_last};
use super::operands::part;
use super::registers::{At, Place, is_high_byte, place_of, set_memory, slot_offset};
use crate::exec::operand::is_immediate;
use crate::hostexec::stub::{STATUS, writes};

/// What RAX is for [`Rax::Marked`]: more than flags can be.
const MARK: i32 = -1;

/// What RAX holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rax {
    /// Nothing that matters.
    Nothing,
    /// The flags.
    Flags,
    /// The flags, or [`MARK`]: the recipe gives them then.
    Marked,
}

/// Where the flags are: in at least one of three places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flags {
    /// In the host's RFLAGS.
    pub(super) host: bool,
    pub(super) rax: Rax,
    /// In the operands of an instruction that gives them again.
    pub(super) recipe: Option<Recipe>,
}

impl Flags {
    /// In RFLAGS alone.
    pub(super) const HOST: Flags = Flags { host: true, rax: Rax::Nothing, recipe: None };
    /// In RAX alone. Where host code is entered and left they are there.
    pub(super) const SAVED: Flags = Flags { host: false, rax: Rax::Flags, recipe: None };

    /// Where they are at the beginning of a block.
    pub(super) fn at(start: Option<Wanted>) -> Flags {
        match start {
            // Nobody will see them.
            None | Some(Wanted::Host) => Flags::HOST,
            Some(Wanted::Saved) => Flags::SAVED,
            Some(Wanted::Marked(recipe)) => Flags { host: false, rax: Rax::Marked, recipe: Some(recipe) },
        }
    }
}

/// Where a block expects the flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// In RFLAGS.
    Host,
    /// In RAX.
    Saved,
    /// In RAX, or where the recipe finds them: it holds until the block overwrites the flags, which it does not read.
    Marked(Recipe),
}

/// An instruction that has computed the flags from registers which still hold what they can be computed from again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Recipe {
    ins: Instruction,
    /// The guest's registers that it needs: bit per number.
    sources: u16,
}

impl Recipe {
    /// Of the flags after `ins`.
    pub(super) fn of(ins: &Instruction) -> Option<Recipe> {
        let plain = |operand: u32| {
            let register = ins.op_register(operand);
            register.is_gpr() && !is_high_byte(register)
        };
        let immediate = ins.op_count() == 2 && is_immediate(ins, 1);
        let operands = (0..ins.op_count()).all(|operand| match ins.op_kind(operand) {
            OpKind::Register => plain(operand),
            _ => operand == 1 && immediate,
        });
        if !operands || ins.has_lock_prefix() {
            return None;
        }
        let registers = (0..ins.op_count()).map(|operand| ins.op_register(operand));
        let registers: Vec<Register> = registers.filter(|register| register.is_gpr()).collect();
        // Those that no register of the host holds.
        let state = registers.iter().filter(|register| matches!(place_of(**register), Place::State(_)));
        let state = state.fold(0, |all, register| all | bit(*register));
        let wide = ins.op0_register().size() >= 4;
        let same = ins.op0_register() == ins.op1_register();
        let suits = match ins.mnemonic() {
            // There is a register to load one of them into.
            Mnemonic::Cmp | Mnemonic::Test => state.count_ones() <= 1,
            Mnemonic::And | Mnemonic::Or | Mnemonic::Xor => true,
            Mnemonic::Sub => wide && !same && state == 0,
            Mnemonic::Add => wide && immediate && state == 0 && ins.immediate(1) as i32 != i32::MIN,
            _ => false,
        };
        if !suits {
            return None;
        }
        let sources = registers.into_iter().fold(0, |all, register| all | bit(register));
        let mut ins = *ins;
        ins.set_ip(0);
        Some(Recipe { ins, sources })
    }

    /// Of the flags after these instructions.
    pub(super) fn after(instructions: &[Instruction]) -> Option<Recipe> {
        let last =
            instructions.iter().rposition(|ins| changes_flags(ins) || ins.rflags_modified() & STATUS != 0)?;
        let recipe = Recipe::of(&instructions[last])?;
        let mut info = InstructionInfoFactory::new();
        let spoils = |ins: &Instruction| written(&mut info, ins) & recipe.sources != 0;
        (!instructions[last + 1..].iter().any(spoils)).then_some(recipe)
    }

    /// Whether it holds in a block of these instructions until they overwrite the flags, and nothing reads them before.
    pub(super) fn lasts(&self, instructions: &[Instruction]) -> bool {
        let mut info = InstructionInfoFactory::new();
        for (at, ins) in instructions.iter().enumerate() {
            let Some(effect) = effect_on_flags(ins) else { return false };
            if effect.overwrites {
                return true;
            }
            if effect.reads {
                return false;
            }
            if written(&mut info, ins) & self.sources != 0 {
                return is_last_to_need_flags(&instructions[at..]);
            }
        }
        false
    }

    /// What the host executes to have the flags again: changes nothing else but RAX.
    fn steps(&self) -> Result<Vec<Instruction>> {
        let ins = &self.ins;
        let mut steps = Vec::new();
        let mut register = |operand: u32| {
            let register = ins.op_register(operand);
            match place_of(register) {
                Place::Host(full) => part(full, register.size()),
                Place::State(number) => {
                    let mut load = Instruction::with2(Code::Mov_r64_rm64, Register::RAX, Register::RAX)?;
                    set_memory(&mut load, 1, At::Field(slot_offset(number)));
                    steps = vec![load];
                    part(rax, register.size())
                }
            }
        };
        let first = register(0)?;
        let mut host = *ins;
        host.set_code(general_form(ins.code()));
        host.set_op0_register(first);
        let bitwise = matches!(ins.mnemonic(), Mnemonic::And | Mnemonic::Or | Mnemonic::Xor);
        if ins.op1_kind() == OpKind::Register && !bitwise {
            host.set_op1_register(register(1)?);
        }
        let wide = first.size() == 8;
        let scratch = if wide { Register::RAX } else { Register::EAX };
        let lea = if wide { Code::Lea_r64_m } else { Code::Lea_r32_m };
        let base = first.full_register();
        steps.extend(match ins.mnemonic() {
            _ if bitwise => {
                let test = match first.size() {
                    1 => Code::Test_rm8_r8,
                    2 => Code::Test_rm16_r16,
                    4 => Code::Test_rm32_r32,
                    _ => Code::Test_rm64_r64,
                };
                vec![Instruction::with2(test, first, first)?]
            }
            // What the difference was taken from is the difference and what was taken.
            Mnemonic::Sub => {
                let sum = match ins.op1_kind() {
                    OpKind::Register => {
                        let index = host.op1_register().full_register();
                        MemoryOperand::with_base_index(base, index)
                    }
                    _ => MemoryOperand::with_base_displ(base, i64::from(ins.immediate(1) as i32)),
                };
                host.set_code(compare_form(host.code())?);
                host.set_op0_register(scratch);
                vec![Instruction::with2(lea, scratch, sum)?, host]
            }
            Mnemonic::Add => {
                let term = i64::from(ins.immediate(1) as i32);
                host.set_op0_register(scratch);
                let difference = MemoryOperand::with_base_displ(base, -term);
                vec![Instruction::with2(lea, scratch, difference)?, host]
            }
            _ => vec![host],
        });
        Ok(steps)
    }
}

/// The comparison with the operands of a subtraction.
fn compare_form(subtraction: Code) -> Result<Code> {
    use Code::*;
    Ok(match subtraction {
        Sub_rm32_r32 => Cmp_rm32_r32,
        Sub_r32_rm32 => Cmp_r32_rm32,
        Sub_rm64_r64 => Cmp_rm64_r64,
        Sub_r64_rm64 => Cmp_r64_rm64,
        Sub_rm32_imm32 => Cmp_rm32_imm32,
        Sub_rm32_imm8 => Cmp_rm32_imm8,
        Sub_rm64_imm32 => Cmp_rm64_imm32,
        Sub_rm64_imm8 => Cmp_rm64_imm8,
        _ => return Err(Failure::Unsuited),
    })
}

/// Whether flags are read or overwritten in the block that goes on with these instructions. At its end they have to be in RAX, but for
/// conditional branches.
fn ends_within(instructions: &[Instruction]) -> bool {
    for ins in instructions {
        match effect_on_flags(ins) {
            None => return ins.flow_control() == FlowControl::ConditionalBranch,
            Some(effect) if effect.reads || effect.overwrites => return true,
            Some(_) => {}
        }
    }
    false
}

/// Whether the flags before the first of these instructions matter only until it is executed, if it writes what they can be computed
/// from.
fn is_last_to_need_flags(instructions: &[Instruction]) -> bool {
    let [ins, rest @ ..] = instructions else { return false };
    writes_last(ins) && effect_on_flags(ins).is_some_and(|effect| !effect.reads) && lose_flags(rest)
}

/// The bit of a general register: per number.
pub(super) fn bit(register: Register) -> u16 {
    if register.is_gpr() { 1 << (register.full_register().number() & 15) } else { 0 }
}

/// The general registers that the instruction writes: bit per number.
pub(super) fn written(info: &mut InstructionInfoFactory, ins: &Instruction) -> u16 {
    let used = info.info(ins).used_registers().iter();
    let written = used.filter(|used| writes(used.access())).map(|used| used.register());
    written.filter(|register| register.is_gpr()).fold(0, |all, register| all | bit(register))
}

impl Emitter<'_> {
    /// The flags are in RAX; they may be in RFLAGS as well.
    pub(super) fn save_flags(&mut self) -> Result<()> {
        if self.flags.rax == Rax::Flags {
            return Ok(());
        }
        let mut saved = self.a.create_label();
        let unclear = self.flags.rax == Rax::Marked && !self.flags.host;
        if unclear {
            self.a.cmp(eax, MARK)?;
            self.a.jne(saved)?;
        }
        if !self.flags.host {
            self.recompute()?;
        }
        // What RAX was does not matter: nothing waits for it.
        self.a.mov(eax, 0)?;
        self.a.lahf()?;
        self.a.seto(al)?;
        if unclear {
            self.a.set_label(&mut saved)?;
            self.a.zero_bytes()?;
        }
        self.flags.rax = Rax::Flags;
        self.flags.host = !unclear;
        Ok(())
    }

    /// RFLAGS may be overwritten: the flags are in RAX, or can be had again.
    pub(super) fn free_host_flags(&mut self) -> Result<()> {
        let again = self.flags.recipe.is_some() && self.recomputes;
        if self.flags.rax == Rax::Nothing && !again {
            self.save_flags()?;
        }
        self.flags.host = false;
        Ok(())
    }

    /// The flags are in RAX, and RFLAGS may be overwritten.
    pub(super) fn settle_flags(&mut self) -> Result<()> {
        self.save_flags()?;
        self.flags.host = false;
        Ok(())
    }

    /// The flags are in RFLAGS; they may be in RAX as well.
    pub(super) fn load_flags(&mut self) -> Result<()> {
        if self.flags.host {
            return Ok(());
        }
        if self.flags.rax == Rax::Nothing {
            self.recompute()?;
        } else {
            self.save_flags()?;
            // AL is one or nothing: less -127 it overflows, or it does not. SAHF sets the others.
            self.a.cmp(al, -127)?;
            self.a.sahf()?;
        }
        self.flags.host = true;
        Ok(())
    }

    /// RAX may be overwritten: the flags are in RFLAGS.
    pub(super) fn free_rax(&mut self) -> Result<()> {
        self.load_flags()?;
        self.flags.rax = Rax::Nothing;
        Ok(())
    }

    /// RFLAGS have the flags again; RAX is lost.
    fn recompute(&mut self) -> Result<()> {
        let recipe = self.flags.recipe.ok_or(Failure::Unsuited)?;
        recipe.steps()?.into_iter().try_for_each(|step| self.put(step))
    }

    /// The flags are wherever `wanted` has them, perhaps elsewhere as well: they are the same flags, by another way.
    pub(super) fn flags_as(&mut self, wanted: &Flags) -> Result<()> {
        if wanted.recipe.is_some() && wanted.recipe != self.flags.recipe {
            return Err(Failure::Unsuited);
        }
        match (wanted.rax, wanted.recipe) {
            (Rax::Nothing, _) => {}
            (Rax::Marked, Some(recipe)) => self.mark_flags(recipe)?,
            (Rax::Marked | Rax::Flags, _) => self.save_flags()?,
        }
        if wanted.host { self.load_flags() } else { Ok(()) }
    }

    /// The flags are where the recipe and RAX say. Keeps RFLAGS.
    pub(super) fn mark_flags(&mut self, recipe: Recipe) -> Result<()> {
        let known = self.flags.recipe == Some(recipe);
        match self.flags.rax {
            Rax::Flags => Ok(()),
            Rax::Marked if known => Ok(()),
            Rax::Nothing if known => {
                self.flags.rax = Rax::Marked;
                Ok(self.a.mov(eax, MARK)?)
            }
            Rax::Marked | Rax::Nothing => self.save_flags(),
        }
    }

    /// The next of these instructions is about to be translated: flags do not depend on a register that it writes. Or they do, and
    /// nobody will see them behind it; true then.
    pub(super) fn keep_flags_from(&mut self, instructions: &[Instruction]) -> Result<bool> {
        let [ins, ..] = instructions else { return Ok(false) };
        let Some(recipe) = self.flags.recipe else { return Ok(false) };
        self.recomputes = ends_within(instructions);
        let overwrites = || effect_on_flags(ins).is_some_and(|effect| effect.overwrites);
        if written(&mut self.info, ins) & recipe.sources == 0 || overwrites() {
            return Ok(false);
        }
        if !self.flags.host && lose_flags(instructions) {
            self.flags = Flags::HOST;
            return Ok(false);
        }
        if is_last_to_need_flags(instructions) {
            return Ok(true);
        }
        if self.flags.host && self.flags.rax == Rax::Marked {
            self.flags.rax = Rax::Nothing;
        } else if !self.flags.host {
            self.save_flags()?;
        }
        self.flags.recipe = None;
        Ok(false)
    }

    /// If a block that the end leads to wants flags marked that the next of these instructions computes, right before the end: RAX
    /// is the mark from now on. (Behind the comparison it would keep the host from fusing it with the branch.)
    pub(super) fn mark_before(&mut self, instructions: &[Instruction]) -> Result<bool> {
        let [ins, last] = instructions else { return Ok(false) };
        let ends = last.flow_control() == FlowControl::ConditionalBranch;
        let Some(recipe) = Recipe::of(ins).filter(|_| ends && changes_flags(ins)) else { return Ok(false) };
        let ways = [last.near_branch_target(), last.next_ip()];
        let wants = |way: &u64| {
            let start = self.targets.get(&(*way as i64)).map(|to| to.start.flags);
            start == Some(Some(Wanted::Marked(recipe)))
        };
        if !ways.iter().any(wants) {
            return Ok(false);
        }
        self.a.mov(eax, MARK)?;
        Ok(true)
    }

    /// The instruction has computed the flags.
    pub(super) fn flags_are_of(&mut self, ins: &Instruction) {
        self.flags = Flags { recipe: Recipe::of(ins), ..Flags::HOST };
    }

    /// Where operation `index` is given to the interpreter, with the flags where they are now. Who gets there by a check must have
    /// [freed](Emitter::free_host_flags) RFLAGS.
    pub(super) fn interpreter_label(&mut self, index: usize) -> CodeLabel {
        let interpreter = self.saved_interpreter_label(index);
        let flags = self.flags;
        if flags.rax == Rax::Flags {
            return interpreter;
        }
        if let Some((_, label)) = self.unsaved[index].filter(|(known, _)| *known == flags) {
            return label;
        }
        let at = self.a.create_label();
        self.unsaved[index] = Some((flags, at));
        self.cold.push(Cold::SaveFlags { at, flags, interpreter });
        at
    }
}
