//! Accesses that are checked together ([`super::groups`]): the first of a group is checked for all, and what the check has found is
//! kept in the [frame](super::frame) for the others.
//!
//! The bytes of a group may lie in two pages. The instructions from its first access to its last have a second translation for that,
//! with a check for each access, behind the region: [`Apart`]. Groups that overlap have one together.

use std::ops::Range;

use iced_x86::code_asm::{AsmRegister64, CodeLabel};
use iced_x86::{Code, Instruction, Register};

use super::Failure;
use super::emit::{Emitter, Kind, Linear, Result};
use super::flags::Flags;
use super::groups::Groups;
use super::memory::{Constants, Rules};
use super::registers::{ADDRESS, At, VALUE};
use super::routines::Routines;
use super::vector::Known;
use crate::code::op::Op;

/// What is known of the groups of the run at hand.
#[derive(Default)]
pub(super) struct Shared {
    groups: Groups,
    /// By number, what has been found of a group whose first access has been emitted.
    found: Vec<Found>,
    /// Ways from the cluster at hand to its second translation.
    ways: Vec<Way>,
    /// How the cluster at hand began.
    began: Option<Began>,
    /// The group that was accessed last, the register that its place in the frame was loaded into then, and how many instructions had
    /// been emitted.
    fresh: Option<(usize, AsmRegister64, usize)>,
    /// This is a second translation, which every access has its check in.
    apart: bool,
    /// In a second translation: where its ways come in, and where the flags are there.
    landings: Vec<(Way, CodeLabel, Flags)>,
}

/// What the check of a group has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// The addend of the page.
    Addend,
    /// The host address of the lowest byte.
    Lowest,
}

/// A way to a second translation: instead of operation `index`, whose check has found that the bytes lie in two pages.
struct Way {
    index: usize,
    at: CodeLabel,
    flags: Flags,
}

/// What the emitter knew before a cluster.
struct Began {
    flags: Flags,
    known: Known,
    pointers: u16,
    constants: Constants,
}

/// The second translation of a cluster.
pub(super) struct Apart<'a> {
    instructions: &'a [Instruction],
    cluster: Range<usize>,
    ops: &'a [Op],
    owed: i32,
    began: Began,
    ways: Vec<Way>,
    /// Where it ends, and where the flags have to be then.
    back: CodeLabel,
    flags: Flags,
}

impl Shared {
    /// For a run with these groups.
    pub(super) fn new(groups: Groups) -> Shared {
        Shared { groups, ..Shared::default() }
    }

    /// For a second translation that these ways come to.
    fn apart(ways: Vec<Way>) -> Shared {
        Shared { apart: true, ways, ..Shared::default() }
    }

    /// Operations are being translated for which there are two translations: neither may know more than the other behind them.
    pub(super) fn in_cluster(&self) -> bool {
        self.apart || self.began.is_some()
    }
}

impl<'a> Emitter<'a> {
    /// Operation `index` is about to be translated: notes what is known, if a cluster begins with it.
    pub(super) fn begin_cluster(&mut self, index: usize) {
        let begins = self.shared.groups.cluster(index).is_some_and(|cluster| cluster.start == index);
        if !begins {
            return;
        }
        // Its accesses change what is known of pages of constants in ways that they may share with others.
        let stores = self.recent(Kind::Store, 0);
        self.constants.retain(|&way, _| way < stores);
        let constants = self.constants.clone();
        let (flags, known, pointers) = (self.flags, self.known, self.pointers);
        self.shared.began = Some(Began { flags, known, pointers, constants });
    }

    /// Operation `index` has been translated: has the second translation be made, if a cluster ends with it.
    pub(super) fn end_cluster(&mut self, instructions: &'a [Instruction], index: usize) -> Result<()> {
        let cluster = self.shared.groups.cluster(index).filter(|cluster| cluster.end == index + 1).cloned();
        let Some(cluster) = cluster else { return Ok(()) };
        let began = self.shared.began.take().ok_or(Failure::Unsuited)?;
        let back = self.a.create_label();
        self.place(back)?;
        let ways = std::mem::take(&mut self.shared.ways);
        let (ops, owed, flags) = (self.ops, self.owed, self.flags);
        let apart = Apart { instructions, cluster, ops, owed, began, ways, back, flags };
        self.apart.push(apart);
        Ok(())
    }

    /// Where the memory is that operation `index` accesses by `linear`, if that is of a group. `ins` is the instruction if it has a memory
    /// operand. One scratch register is left.
    pub(super) fn access_shared(
        &mut self,
        ins: Option<&Instruction>,
        linear: Linear,
        way: usize,
        index: usize,
    ) -> Result<Option<At>> {
        let Some((group, offset)) = self.shared.groups.member(index) else { return Ok(None) };
        match self.shared.found.get(group) {
            Some(&found) => self.load_found(group, found)?,
            None => self.check_group(ins, linear, way, index)?,
        }
        Ok(Some(match (self.shared.found[group], linear) {
            (Found::Addend, Linear::Register(base, displacement)) => At::Sum(base, displacement),
            _ => At::Near(offset),
        }))
    }

    /// The first access of a group: checks all that the group accesses.
    fn check_group(
        &mut self,
        ins: Option<&Instruction>,
        linear: Linear,
        way: usize,
        index: usize,
    ) -> Result<()> {
        let (number, offset) = self.shared.groups.member(index).ok_or(Failure::Unsuited)?;
        let group = self.shared.groups.groups[number].clone();
        let linear = match linear {
            Linear::Register(base, displacement) => Linear::Register(base, displacement - offset),
            Linear::Operand(mut ins) => {
                ins.set_memory_displ_size(8);
                ins.set_memory_displacement64(i64::from(group.low) as u64);
                Linear::Operand(ins)
            }
        };
        let size = Routines::round_up(group.size).ok_or(Failure::Unsuited)?;
        let at = self.a.create_label();
        let rules = Rules { split: Some(at), ..Rules::size(size) };
        let found = if ins.is_some_and(|ins| self.is_scattered(ins)) {
            self.find(linear, group.kind, rules, index)?;
            Found::Lowest
        } else {
            let recent = self.recent(group.kind, way);
            match self.check(linear, recent, group.kind, rules, 1, index)? {
                At::Sum(..) => Found::Addend,
                _ => Found::Lowest,
            }
        };
        self.shared.ways.push(Way { index, at, flags: self.flags });
        debug_assert_eq!(self.shared.found.len(), number, "groups are met in their order");
        self.shared.found.push(found);
        let slot = self.routines.frame.shared(group.slot);
        self.put(Instruction::with2(Code::Mov_rm64_r64, slot, Register::from(found.register()))?)?;
        self.shared.fresh = Some((number, found.register(), self.a.instructions().len()));
        Ok(())
    }

    /// Loads what is known of a group, unless that is where it was loaded for the access before.
    fn load_found(&mut self, number: usize, found: Found) -> Result<()> {
        let register = found.register();
        let is_fresh = self.shared.fresh.is_some_and(|(group, loaded, since)| {
            let touches = |ins: &Instruction| {
                // A label: others come here.
                let label = ins.code() == Code::Zero_bytes;
                label || (0..ins.op_count()).any(|at| ins.op_register(at).full_register() == loaded.into())
            };
            group == number && loaded == register && !self.a.instructions()[since..].iter().any(touches)
        });
        if !is_fresh {
            let slot = self.routines.frame.shared(self.shared.groups.groups[number].slot);
            self.put(Instruction::with2(Code::Mov_r64_rm64, Register::from(register), slot)?)?;
            self.shared.fresh = Some((number, register, self.a.instructions().len()));
        }
        Ok(())
    }

    /// In a second translation operation `index` is about to be emitted, and its flags are kept: where ways to it come in.
    pub(super) fn land_apart(&mut self, index: usize) -> Result<()> {
        let ends = self.shared.apart && self.shared.ways.first().is_some_and(|way| way.index == index);
        if ends {
            let here = self.a.create_label();
            self.place(here)?;
            let way = self.shared.ways.remove(0);
            self.shared.landings.push((way, here, self.flags));
        }
        Ok(())
    }

    /// Behind the region: a second translation.
    pub(super) fn put_apart(&mut self, apart: Apart<'a>) -> Result<()> {
        let Apart { instructions, cluster, ops, owed, began, ways, back, flags } = apart;
        (self.ops, self.owed, self.shared) = (ops, owed, Shared::apart(ways));
        (self.interpret, self.unsaved) = (vec![None; ops.len()], vec![None; ops.len()]);
        (self.flags, self.known, self.pointers, self.constants) =
            (began.flags, began.known, began.pointers, began.constants);
        for index in cluster {
            self.step(instructions, index)?;
        }
        self.flags_as(&flags)?;
        self.a.jmp(back)?;
        for (way, here, flags) in std::mem::take(&mut self.shared.landings) {
            self.place(way.at)?;
            self.flags = way.flags;
            self.flags_as(&flags)?;
            self.a.jmp(here)?;
        }
        Ok(())
    }
}

impl Found {
    /// The register that it is loaded into.
    fn register(self) -> AsmRegister64 {
        match self {
            Found::Addend => VALUE,
            Found::Lowest => ADDRESS,
        }
    }
}
