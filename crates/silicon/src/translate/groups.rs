//! Which accesses of a run have one check together.
//!
//! Compilers access the fields of a structure, and their own stack frame, one after the other by one register. Such accesses are a
//! group: if the bytes from the lowest to the highest lie in one page, where one of them is tells where all are. Their register may move by
//! constants meanwhile (PUSH and POP, additions).

use std::collections::HashMap;
use std::ops::Range;

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

use super::emit::Kind;
use super::flags::{bit, written};
use super::frame::Frame;
use super::{instruction, vector};
use crate::exec::operand::is_immediate;

/// Bytes from the lowest to the highest of a group, at most.
const WIDEST: i64 = 256;

/// An access that may be of a group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub(super) registers: Registers,
    pub(super) displacement: i64,
    /// Bytes.
    pub(super) size: usize,
    /// A load or a store.
    pub(super) kind: Kind,
}

/// What an address is computed from, besides the displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Registers {
    base: Register,
    index: Register,
    scale: u32,
}

impl Registers {
    /// Which they are: bit per number.
    pub(super) fn bits(&self) -> u16 {
        bit(self.base) | bit(self.index)
    }

    /// What numbers for general registers, by number, come to in an address.
    pub(super) fn sum(&self, numbers: &[i64; 16]) -> Option<i64> {
        let of = |register: Register| if register.is_gpr() { numbers[register.number() & 15] } else { 0 };
        of(self.index).checked_mul(i64::from(self.scale))?.checked_add(of(self.base))
    }
}

impl Access {
    /// The word at RSP plus `displacement`.
    pub(super) fn stack(displacement: i64, kind: Kind) -> Access {
        let registers = Registers { base: Register::RSP, index: Register::None, scale: 1 };
        Access { registers, displacement, size: 8, kind }
    }

    /// By the memory operand of the instruction, which is `suits_memory`.
    pub(super) fn operand(ins: &Instruction, kind: Kind) -> Option<Access> {
        let segment = matches!(ins.memory_segment(), Register::FS | Register::GS);
        let (base, index) = (ins.memory_base(), ins.memory_index());
        let size = ins.memory_size().size();
        if segment || size == 0 || !base.is_gpr64() || !(index == Register::None || index.is_gpr64()) {
            return None;
        }
        let registers = Registers { base, index, scale: ins.memory_index_scale() };
        Some(Access { registers, displacement: ins.memory_displacement64() as i64, size, kind })
    }

    /// The access of an instruction that can be translated, if it may be of a group.
    pub(super) fn of(ins: &Instruction, info: &mut InstructionInfoFactory) -> Option<Access> {
        instruction::access(ins, info).or_else(|| vector::access(ins, info))
    }
}

/// By how much the instruction moves a register, if it does nothing else with it.
pub(super) fn moves(ins: &Instruction) -> Option<(Register, i64)> {
    use Mnemonic::*;
    let register = ins.op0_register();
    let to_register = ins.op0_kind() == OpKind::Register && register.is_gpr64();
    let constant = || (to_register && is_immediate(ins, 1)).then(|| ins.immediate(1) as i64);
    match ins.mnemonic() {
        Push => Some((Register::RSP, -8)),
        Pop if to_register && register != Register::RSP => Some((Register::RSP, 8)),
        Add => Some((register, constant()?)),
        Sub => Some((register, constant()?.checked_neg()?)),
        Inc if to_register => Some((register, 1)),
        Dec if to_register => Some((register, -1)),
        Lea if to_register && ins.memory_base() == register && ins.memory_index() == Register::None => {
            Some((register, ins.memory_displacement64() as i64))
        }
        _ => None,
    }
}

/// Accesses that are checked together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// Stores, if one of them is: who may store may load.
    pub(super) kind: Kind,
    /// The lowest byte, from the address that the registers give before the first access.
    pub(super) low: i32,
    /// Bytes from there to the highest.
    pub(super) size: usize,
    /// Where in the [`Frame`] is kept what the check has found.
    pub(super) slot: usize,
}

/// A group being found.
struct Draft {
    registers: Registers,
    kind: Kind,
    low: i64,
    high: i64,
    /// How far the base register has moved since the first access.
    moved: i64,
    /// The operations, and where they access.
    members: Vec<(usize, i64)>,
}

/// The groups of a run.
#[derive(Debug, Default)]
pub(super) struct Groups {
    pub(super) groups: Vec<Group>,
    /// By operation: its group, and where it is from the address that the registers give before the group's first access.
    members: HashMap<usize, (usize, i64)>,
    /// Which operations lie between the first and the last access of a group.
    clusters: Vec<Range<usize>>,
}

impl Groups {
    /// Those of the operations `run`.
    pub(super) fn of(instructions: &[Instruction], run: Range<usize>) -> Groups {
        let mut info = InstructionInfoFactory::new();
        let mut drafts: Vec<Draft> = Vec::new();
        // Those that more may come to.
        let mut open: Vec<usize> = Vec::new();
        for index in run {
            let ins = &instructions[index];
            if let Some(access) = Access::of(ins, &mut info) {
                note(&mut drafts, &mut open, index, &access);
            }
            let moved = moves(ins);
            let written = written(&mut info, ins) & !moved.map_or(0, |(register, _)| bit(register));
            open.retain(|&draft| {
                let Draft { registers: Registers { base, index, .. }, moved: total, .. } = &mut drafts[draft];
                let spoilt = written & (bit(*base) | bit(*index)) != 0;
                match moved {
                    Some((register, _)) if register == *index => return false,
                    Some((register, by)) if register == *base => *total = total.wrapping_add(by),
                    _ => {}
                }
                !spoilt
            });
        }
        Groups::settle(&drafts)
    }

    /// What of the drafts is worth it, in the order of their first accesses.
    fn settle(drafts: &[Draft]) -> Groups {
        let mut groups = Groups::default();
        let mut slot = 0;
        for draft in drafts {
            let (Ok(low), [(first, _), .., (last, _)]) = (i32::try_from(draft.low), &draft.members[..])
            else {
                continue;
            };
            match groups.clusters.last_mut() {
                Some(cluster) if *first < cluster.end => {
                    slot += 1;
                    if slot == Frame::SHARED {
                        slot -= 1;
                        continue;
                    }
                    cluster.end = cluster.end.max(last + 1);
                }
                _ => {
                    slot = 0;
                    groups.clusters.push(*first..last + 1);
                }
            }
            let number = groups.groups.len();
            groups.members.extend(draft.members.iter().map(|&(index, offset)| (index, (number, offset))));
            groups.groups.push(Group {
                kind: draft.kind,
                low,
                size: (draft.high - draft.low) as usize,
                slot,
            });
        }
        groups
    }

    /// The group of the access of operation `index`, and where in the group it is.
    pub(super) fn member(&self, index: usize) -> Option<(usize, i32)> {
        let (number, offset) = *self.members.get(&index)?;
        Some((number, (offset - i64::from(self.groups[number].low)) as i32))
    }

    /// The operations around `index` that lie between the first and the last access of a group, or of several that overlap.
    pub(super) fn cluster(&self, index: usize) -> Option<&Range<usize>> {
        self.clusters.iter().find(|cluster| cluster.contains(&index))
    }
}

/// The access of operation `index` joins a draft that is open, or begins another one.
fn note(drafts: &mut Vec<Draft>, open: &mut Vec<usize>, index: usize, access: &Access) {
    if let Some(at) = open.iter().position(|&draft| drafts[draft].registers == access.registers) {
        let draft = &mut drafts[open[at]];
        let offset = draft.moved.wrapping_add(access.displacement);
        let (low, high) = (draft.low.min(offset), draft.high.max(offset.wrapping_add(access.size as i64)));
        if (0..=WIDEST).contains(&high.wrapping_sub(low)) {
            (draft.low, draft.high) = (low, high);
            draft.members.push((index, offset));
            if access.kind == Kind::Store {
                draft.kind = Kind::Store;
            }
            return;
        }
        open.swap_remove(at);
    }
    open.push(drafts.len());
    drafts.push(Draft {
        registers: access.registers,
        kind: access.kind,
        low: access.displacement,
        high: access.displacement.wrapping_add(access.size as i64),
        moved: 0,
        members: vec![(index, access.displacement)],
    });
}
