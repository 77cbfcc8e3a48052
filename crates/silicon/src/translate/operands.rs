//! Register operands: the host's registers in place of the guest's.

use iced_x86::code_asm::AsmRegister64;
use iced_x86::{Instruction, Mnemonic, OpAccess, OpCodeOperandKind, OpKind, Register};

use super::Failure;
use super::emit::{Emitter, Result};
use super::registers::{At, Place, is_high_byte, place_of, set_memory, sized, slot, slot_offset};
use crate::hostexec::stub::writes;

/// What is still to be done after an instruction with redirected operands.
pub(super) struct Redirected {
    /// Scratch registers that belong in the state, and the numbers of the guest's registers.
    stored: [Option<(AsmRegister64, u8)>; 2],
    /// The register whose second byte is where its first belongs.
    turned: Option<AsmRegister64>,
}

/// Scratch registers for operands.
struct Scratch {
    free: &'static [AsmRegister64],
    /// For each that is in use the guest register in the state that it stands for, if it does.
    used: [Option<Option<u8>>; 2],
}

impl Scratch {
    /// One for something else than a guest register.
    fn take(&mut self) -> Result<AsmRegister64> {
        let at = self.unused()?;
        self.used[at] = Some(None);
        Ok(self.free[at])
    }

    /// Which of them stands for a guest register, and whether it does so only now.
    fn of(&mut self, number: u8) -> Result<(usize, bool)> {
        if let Some(at) = self.used.iter().position(|used| *used == Some(Some(number))) {
            return Ok((at, false));
        }
        let at = self.unused()?;
        self.used[at] = Some(Some(number));
        Ok((at, true))
    }

    fn unused(&self) -> Result<usize> {
        let at = self.used.iter().position(Option::is_none).filter(|&at| at < self.free.len());
        at.ok_or(Failure::Unsuited)
    }
}

/// The register whose second byte the instruction changes.
fn turned(ins: &Instruction, access: &[OpAccess]) -> Option<AsmRegister64> {
    let changes = ins.op0_kind() == OpKind::Register && is_high_byte(ins.op0_register()) && writes(access[0]);
    match place_of(ins.op0_register()) {
        Place::Host(full) if changes => Some(full),
        _ => None,
    }
}

impl Emitter<'_> {
    /// After the instruction: registers are where they belong.
    pub(super) fn settle(&mut self, redirected: Redirected) -> Result<()> {
        for (scratch, guest) in redirected.stored.into_iter().flatten() {
            self.a.mov(slot(guest), scratch)?;
        }
        if let Some(register) = redirected.turned {
            self.a.rorx(register, register, 56)?;
        }
        Ok(())
    }

    /// Redirects the general-register operands of `host`, and loads those that are in the state into `free` registers.
    /// `in_place`: one may become a memory operand.
    pub(super) fn redirect(
        &mut self,
        ins: &Instruction,
        host: &mut Instruction,
        access: &[OpAccess],
        free: &'static [AsmRegister64],
        mut in_place: bool,
    ) -> Result<Redirected> {
        let mut scratch = Scratch { free, used: [None; 2] };
        let mut written = [false; 2];
        let turned = turned(ins, access);
        for operand in 0..ins.op_count() {
            let register = ins.op_register(operand);
            if ins.op_kind(operand) != OpKind::Register || !register.is_gpr() {
                continue;
            }
            let writes = writes(access[operand as usize]);
            match place_of(register) {
                Place::Host(full) if turned == Some(full) && operand == 0 => {
                    host.set_op_register(operand, part(full, 1)?);
                }
                Place::Host(full) if is_high_byte(register) || turned == Some(full) => {
                    let copy = scratch.take()?;
                    if is_high_byte(register) {
                        self.a.rorx(copy, full, 8)?;
                    } else {
                        self.a.mov(copy, full)?;
                    }
                    host.set_op_register(operand, part(copy, 1)?);
                }
                Place::Host(full) => {
                    let part = part(full, register.size())?;
                    if part != host.op_register(operand) {
                        host.set_op_register(operand, part);
                    }
                }
                Place::State(number) if in_place && can_be_memory(host, operand, writes) => {
                    set_memory(host, operand, At::Field(slot_offset(number)));
                    in_place = false;
                }
                Place::State(number) => {
                    let (at, new) = scratch.of(number)?;
                    let held = scratch.free[at];
                    if new && !overwrites(ins, operand, access) {
                        self.a.mov(held, slot(number))?;
                    }
                    written[at] |= writes;
                    host.set_op_register(operand, part(held, register.size())?);
                }
            }
        }
        if let Some(register) = turned {
            self.a.rorx(register, register, 8)?;
        }
        let stored = [0, 1].map(|at| {
            let guest = scratch.used[at].flatten().filter(|_| written[at]);
            guest.map(|guest| (scratch.free[at], guest))
        });
        Ok(Redirected { stored, turned })
    }

    /// The host register that holds a guest register: its own, or `scratch`, which it is loaded into.
    pub(super) fn in_register(
        &mut self,
        register: Register,
        scratch: AsmRegister64,
    ) -> Result<AsmRegister64> {
        match place_of(register) {
            Place::Host(host) => Ok(host),
            Place::State(number) => {
                self.a.mov(scratch, slot(number))?;
                Ok(scratch)
            }
        }
    }
}

/// Whether nothing of what the register operand was before matters.
fn overwrites(ins: &Instruction, operand: u32, access: &[OpAccess]) -> bool {
    let register = ins.op_register(operand);
    let same = |other: u32| {
        ins.op_kind(other) == OpKind::Register
            && ins.op_register(other).full_register() == register.full_register()
    };
    let alone = (0..ins.op_count()).filter(|&other| same(other)).count() == 1;
    alone && access[operand as usize] == OpAccess::Write && register.size() >= 4
}

/// Scratch registers that the register operands of an instruction with a memory operand may need: one at most has to be left.
pub(super) fn wanted(ins: &Instruction) -> usize {
    let wants = |operand: u32| {
        let register = ins.op_register(operand);
        ins.op_kind(operand) == OpKind::Register
            && register.is_gpr()
            && (matches!(place_of(register), Place::State(_)) || is_high_byte(register))
    };
    usize::from((0..ins.op_count()).any(wants))
}

/// The low `size` bytes of `full`.
pub(super) fn part(full: AsmRegister64, size: usize) -> Result<Register> {
    let like = match size {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    sized(full.into(), like).ok_or(Failure::Unsuited)
}

/// Whether the register operand can be memory instead, and what is written there is what the register would hold: 32-bit
/// results clear the upper half of a register, XCHG and XADD write both their operands, which may be one register, and BT and its
/// kin go beyond memory operands. Nor is a part of it written alone: loads of the whole would have to wait for that.
fn can_be_memory(ins: &Instruction, operand: u32, written: bool) -> bool {
    use Mnemonic::*;
    let is_part = written && ins.op_register(operand).size() < 8;
    let other = matches!(ins.mnemonic(), Xchg | Xadd | Bt | Btc | Btr | Bts);
    let kind = ins.op_code().op_kind(operand);
    let encodable = matches!(
        kind,
        OpCodeOperandKind::r8_or_mem
            | OpCodeOperandKind::r16_or_mem
            | OpCodeOperandKind::r32_or_mem
            | OpCodeOperandKind::r64_or_mem
    );
    encodable && !is_part && !other
}
