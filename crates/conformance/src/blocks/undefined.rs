//! What the architecture leaves undefined, followed through a program, so that it neither decides anything nor is compared.
//!
//! A program is made such that no instruction reads a flag that may be undefined there, by whatever way, and that all flags are
//! defined at calls, returns and computed jumps. Condition codes of the x87 status word that any instruction leaves undefined are
//! not compared at all, and not read either.

use iced_x86::{FlowControl, Instruction, Mnemonic};

use super::program::{Item, Program};
use crate::compare;

/// What is undefined in a program.
#[derive(Clone, Debug, Default)]
pub struct Undefined {
    /// RFLAGS bits that may be undefined before each item, and at the end.
    before: Vec<u64>,
    /// x87 condition codes anywhere.
    pub conditions: u16,
}

impl Undefined {
    /// `None` if something undefined could be seen.
    pub fn of(program: &Program) -> Option<Undefined> {
        let mut before = vec![0; program.items.len() + 1];
        while follow(program, &mut before) {}
        let sees = |(item, before): (&Item, &u64)| match kind(&item.instruction) {
            Kind::Elsewhere => *before != 0,
            _ => reads(&item.instruction) & before != 0,
        };
        if program.items.iter().zip(&before).any(sees) {
            return None;
        }
        let conditions = program.items.iter().fold(0, |all, item| all | conditions(&item.instruction));
        let reads_status = program.items.iter().any(|item| reads_conditions(&item.instruction));
        (conditions == 0 || !reads_status).then_some(Undefined { before, conditions })
    }

    /// RFLAGS bits that are undefined if `program` ends at its item `at`, or behind the last.
    pub fn at(&self, program: &Program, at: Option<usize>) -> u64 {
        let Some(at) = at else { return 0 };
        let own = program.items.get(at).map_or(0, |item| compare::flags(item.instruction.rflags_undefined()));
        own | self.before.get(at).copied().unwrap_or_default()
    }
}

/// Goes through the program once. Returns whether that has found anything new.
fn follow(program: &Program, before: &mut [u64]) -> bool {
    let mut found = false;
    for (i, item) in program.items.iter().enumerate() {
        let flags = after(before[i], &item.instruction);
        let kind = kind(&item.instruction);
        let next = (kind != Kind::Jump && kind != Kind::Elsewhere).then_some(i + 1);
        let target = item.target.filter(|_| kind != Kind::Next).map(|label| program.labels[label]);
        for to in next.into_iter().chain(target) {
            found |= flags & !before[to] != 0;
            before[to] |= flags;
        }
    }
    found
}

/// Where an instruction leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// To the next.
    Next,
    /// To its label.
    Jump,
    /// To its label or the next.
    Conditional,
    /// Somewhere else.
    Elsewhere,
}

/// Where `instruction` leads.
pub fn kind(instruction: &Instruction) -> Kind {
    match instruction.flow_control() {
        FlowControl::Next | FlowControl::Exception => Kind::Next,
        FlowControl::UnconditionalBranch => Kind::Jump,
        FlowControl::ConditionalBranch => Kind::Conditional,
        _ => Kind::Elsewhere,
    }
}

/// Undefined flags after an instruction.
pub fn after(before: u64, instruction: &Instruction) -> u64 {
    let undefined = compare::flags(instruction.rflags_undefined());
    let written = instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set();
    let written = if may_leave_flags(instruction) { 0 } else { compare::flags(written) };
    before & !written | undefined
}

/// Flags that an instruction reads.
pub fn reads(instruction: &Instruction) -> u64 {
    compare::flags(instruction.rflags_read())
}

/// x87 condition codes that it leaves undefined.
pub fn conditions(instruction: &Instruction) -> u16 {
    compare::conditions(instruction.rflags_undefined())
}

/// Whether the x87 condition codes can be seen after it.
pub fn reads_conditions(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let stores = matches!(instruction.mnemonic(), Fnstsw | Fnstenv | Fnsave | Fxsave | Fxsave64);
    stores || matches!(instruction.mnemonic(), Xsave | Xsave64 | Xsavec | Xsavec64 | Xsaveopt | Xsaveopt64)
}

/// Counts of zero change no flags.
fn may_leave_flags(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let shifts =
        matches!(instruction.mnemonic(), Rol | Ror | Rcl | Rcr | Shl | Sal | Shr | Sar | Shld | Shrd);
    shifts || instruction.has_rep_prefix() || instruction.has_repne_prefix()
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, Register};

    use super::*;

    const AF: u64 = 1 << 4;

    #[test]
    fn undefined_flags_stay_until_they_are_written() {
        let two = |code, one, other: Register| Instruction::with2(code, one, other).expect("encodable");
        let and = two(Code::And_r32_rm32, Register::EAX, Register::EBX);
        let cmp = two(Code::Cmp_r32_rm32, Register::EAX, Register::EBX);
        let shift = two(Code::Shl_rm32_CL, Register::EAX, Register::CL);
        let load = two(Code::Mov_r32_rm32, Register::EAX, Register::EBX);
        assert_eq!(after(0, &and), AF);
        assert_eq!(after(AF, &load), AF);
        assert_eq!(after(after(AF, &shift), &cmp), 0);
        assert_ne!(after(1, &shift) & 1, 0, "a count of zero leaves CF");
        assert_eq!(reads(&Instruction::with(Code::Lahf)) & AF, AF);
    }
}
