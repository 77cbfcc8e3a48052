//! The translation of a region under way: what is emitted, where the flags are, what comes behind it.

use std::collections::HashMap;
use std::mem::offset_of;
use std::ops::Range;

use iced_x86::code_asm::{
    AsmMemoryOperand, AsmRegister64, CodeAssembler, CodeLabel, eax, qword_ptr, r14b, r14d, r15b, r15d, rsp,
};
use iced_x86::{FlowControl, IcedError, Instruction, InstructionInfoFactory};

use super::edges::Way;
use super::flags::{Flags, Rax, Wanted};
use super::groups::Groups;
use super::layout::Layout;
use super::link::Jump;
use super::memory::{Constants, Rules};
use super::region::{Member, Start};
use super::registers::{ADDRESS, At, VALUE, field, field16};
use super::routines::{Routines, notes};
use super::shared::{Apart, Shared};
use super::steady::{Steady, Windows};
use super::string::Shape;
use super::vector::{Known, Live};
use super::{Failure, Family};
use crate::code::op::Op;
use crate::cpu::Cpu;
use crate::hostexec::arena::Arena;
use crate::mmu::host::Recovery;
use crate::mmu::tlb::{Found, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Recent};
use crate::model::Features;

/// Bytes in a cache line.
const LINE: i32 = 64;

/// Why there is no translation: see [`super::Failure`].
pub(super) type Result<T> = std::result::Result<T, Failure>;

impl From<IcedError> for Failure {
    fn from(_: IcedError) -> Self {
        Failure::Unsuited
    }
}

/// What is done with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Load = 0,
    /// Perhaps after a load.
    Store = 1,
    /// Both at once; not in memory that is not write-back.
    Lock = 2,
}

impl Kind {
    /// All of them, in order.
    pub(super) const ALL: [Kind; Recent::WAYS.len()] = [Kind::Load, Kind::Store, Kind::Lock];
}

/// How a linear address is computed.
#[derive(Clone, Copy)]
pub(super) enum Linear {
    /// That of the memory operand of an instruction.
    Operand(Instruction),
    /// A guest register that is in a host register, plus a displacement.
    Register(AsmRegister64, i32),
}

/// Code that lies behind that of the region.
pub(super) enum Cold<'a> {
    /// The access at `back` is not to the page accessed last.
    LookUp {
        at: CodeLabel,
        back: Back,
        linear: Linear,
        recent: usize,
        routine: u64,
        rules: Rules,
        interpreter: CodeLabel,
    },
    /// An instruction is the interpreter's, but the flags are not in RAX.
    SaveFlags { at: CodeLabel, flags: Flags, interpreter: CodeLabel },
    /// An access has faulted whose flags are in the state.
    GetFlagsBack { at: CodeLabel, interpreter: CodeLabel },
    /// A string instruction has faulted on its way.
    StringFaulted { at: CodeLabel, shape: Shape, interpreter: CodeLabel },
    /// An instruction is the interpreter's.
    Interpret { at: CodeLabel, op: u64, index: usize, owed: i32 },
    /// A link is not valid.
    Unlinked { at: CodeLabel, link: u64 },
    /// Somebody wants something: the region ends before it goes backwards.
    Polled { at: CodeLabel, flags: Flags, owed: i32, link: u64 },
    /// It is time to look for requests where the region is left.
    Stop { at: CodeLabel, back: CodeLabel, way: Way },
    /// Likewise where a loop begins anew, with so many instructions counted beforehand.
    Rest { at: CodeLabel, back: CodeLabel, flags: Flags, counted: i32, link: u64 },
    /// The page of the access before `back` is not among those found.
    Find {
        at: CodeLabel,
        back: CodeLabel,
        linear: Linear,
        routine: u64,
        rules: Rules,
        interpreter: CodeLabel,
    },
    /// Vector registers have to be loaded.
    Raise { at: CodeLabel, back: CodeLabel, routine: u64 },
    /// Whoever comes in from elsewhere does so here.
    Entry { at: CodeLabel, target: Target<'a> },
    /// The block ends here and goes on outside the region.
    Exit { at: CodeLabel, flags: Flags, owed: i32, target: i64, taken: u64 },
    /// There is no more room for return addresses.
    Deep { at: CodeLabel, back: CodeLabel },
    /// The return address is not the one on top of the stack.
    ReturnMissed { at: CodeLabel, taken: u64 },
    /// There is no code at hand for a computed target, which is in [`ADDRESS`], or, where it is `overwritten`, in the [`Jump`] that
    /// [`VALUE`] points to.
    NoJump { at: CodeLabel, overwritten: bool, taken: u64 },
}

/// Where an access goes on whose page has been looked up.
#[derive(Clone, Copy)]
pub(super) enum Back {
    /// It is checked again.
    Check(CodeLabel),
    /// [`VALUE`] is the page's addend.
    Value(CodeLabel),
    /// [`ADDRESS`] is the host address.
    Address(CodeLabel),
}

/// A block of the region, for others to go on at.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    ops: &'a [Op],
    pub(super) label: CodeLabel,
    /// Where it is entered from elsewhere.
    pub(super) entry: CodeLabel,
    pub(super) start: Start,
}

impl Target<'_> {
    /// It goes on at `label` instead.
    pub(super) fn at(self, label: CodeLabel) -> Self {
        Target { label, ..self }
    }
}

/// Where host code comes in from elsewhere.
struct Entry {
    /// The block, and the first operation of the run.
    member: usize,
    index: usize,
    at: CodeLabel,
}

/// A region being translated.
pub(super) struct Emitter<'a> {
    pub(super) a: CodeAssembler,
    pub(super) flags: Flags,
    /// It is better to compute them again, if that can be, than to save them.
    pub(super) recomputes: bool,
    pub(super) info: InstructionInfoFactory,
    /// What is known of vector and x87 registers.
    pub(super) known: Known,
    /// General registers that have been loaded from memory in this run: bit per number. What they point to may be anywhere.
    pub(super) pointers: u16,
    /// Of which constants the page is known in this run.
    pub(super) constants: Constants,
    /// Which accesses have one check together.
    pub(super) shared: Shared,
    /// Number of the page that the code is in.
    pub(super) code_page: u64,
    /// It is for privilege level 3; else for the others.
    pub(super) user: bool,
    features: &'a Features,
    pub(super) arena: &'a mut Arena,
    pub(super) routines: Routines,
    /// The blocks that branches may go on to, by where they begin in the page.
    pub(super) targets: HashMap<i64, Target<'a>>,
    /// The operations of the block at hand.
    pub(super) ops: &'a [Op],
    /// Instructions executed but not counted when the block began.
    pub(super) owed: i32,
    /// The block that comes behind the run.
    pub(super) follower: Option<i64>,
    pub(super) cold: Vec<Cold<'a>>,
    /// Second translations that lie behind that of the region.
    pub(super) apart: Vec<Apart<'a>>,
    /// Loops that have a second translation there.
    steady: Vec<Steady<'a>>,
    /// While one is made: its windows.
    pub(super) windows: Windows,
    /// What holds where the block at hand begins.
    start: Start,
    entries: Vec<Entry>,
    /// Which of the assembler's instructions labels are at.
    placed: HashMap<CodeLabel, usize>,
    /// Instructions that may fault: which they are among the assembler's, and where to go on.
    faulting: Vec<(usize, CodeLabel)>,
    /// For each operation of the run the label where it is given to the interpreter.
    pub(super) interpret: Vec<Option<CodeLabel>>,
    /// Likewise, where the flags are not in RAX.
    pub(super) unsaved: Vec<Option<(Flags, CodeLabel)>>,
}

impl<'a> Emitter<'a> {
    /// A region of `members` in `arena`, whose code is in the page of this number, and for user mode or not.
    pub(super) fn new(
        arena: &'a mut Arena,
        routines: Routines,
        members: &'a [Member],
        (code_page, user): (u64, bool),
        features: &'a Features,
    ) -> Result<Emitter<'a>> {
        let mut a = CodeAssembler::new(64)?;
        let mut targets = HashMap::new();
        for member in members.iter().filter(|member| member.begins()) {
            let label = a.create_label();
            let entry = if member.start.is_like_entry() { label } else { a.create_label() };
            let ops = member.block.ops();
            targets.insert(member.offset(), Target { ops, label, entry, start: member.start });
        }
        Ok(Emitter {
            a,
            flags: Flags::SAVED,
            recomputes: false,
            info: InstructionInfoFactory::new(),
            known: Known::NOTHING,
            pointers: 0,
            constants: Constants::new(),
            shared: Shared::default(),
            code_page,
            user,
            features,
            arena,
            routines,
            targets,
            ops: &[],
            owed: 0,
            follower: None,
            cold: Vec::new(),
            apart: Vec::new(),
            steady: Vec::new(),
            windows: Windows::default(),
            start: Start::ENTRY,
            entries: Vec::new(),
            placed: HashMap::new(),
            faulting: Vec::new(),
            interpret: Vec::new(),
            unsaved: Vec::new(),
        })
    }

    /// Begins the run at operation `index` of a block, member number `number`, that `follower` comes behind.
    pub(super) fn begin(
        &mut self,
        ops: &'a [Op],
        number: usize,
        index: usize,
        follower: Option<i64>,
    ) -> Result<()> {
        (self.ops, self.follower) = (ops, follower);
        self.interpret = vec![None; ops.len()];
        self.unsaved = vec![None; ops.len()];
        self.pointers = 0;
        self.constants.clear();
        let target = self.targets.get(&i64::from(ops[0].page_offset)).copied().filter(|_| index == 0);
        let target = target.unwrap_or_else(|| {
            let label = self.a.create_label();
            Target { ops, label, entry: label, start: Start::ENTRY }
        });
        if target.entry != target.label {
            self.cold.push(Cold::Entry { at: target.entry, target });
        }
        self.entries.push(Entry { member: number, index, at: target.entry });
        self.place(target.label)?;
        let Start { flags, owed, known, .. } = target.start;
        (self.flags, self.owed, self.known, self.start) = (Flags::at(flags), owed, known, target.start);
        Ok(())
    }

    /// The block at hand is a loop by itself.
    fn begin_first(&mut self, instructions: &'a [Instruction], run: &Range<usize>) -> Result<()> {
        let body = self.a.create_label();
        let windows = if *run == (0..instructions.len()) { Windows::of(instructions) } else { None };
        let Some(windows) = windows else { return self.begin_loop(body, body) };
        let at = self.a.create_label();
        let (run, ops, start) = (run.clone(), self.ops, self.start);
        self.steady.push(Steady { instructions, run, ops, start, windows, at, back: body });
        self.begin_loop(body, at)
    }

    /// Emits a run of the block, and how it goes on.
    pub(super) fn run(&mut self, instructions: &'a [Instruction], run: Range<usize>) -> Result<()> {
        if self.start.is_loop {
            self.begin_first(instructions, &run)?;
        }
        self.shared = Shared::new(Groups::of(instructions, run.clone()));
        for index in run.clone() {
            self.begin_cluster(index);
            self.step(instructions, index)?;
            self.end_cluster(instructions, index)?;
        }
        match instructions.get(run.end) {
            Some(_) => self.interpret(run.end),
            None if instructions[run.end - 1].flow_control() != FlowControl::Next => Ok(()),
            None => self.go_to(i64::from(self.ops[run.end].page_offset), 0),
        }
    }

    /// Translates operation `index`.
    pub(super) fn step(&mut self, instructions: &[Instruction], index: usize) -> Result<()> {
        let ins = &instructions[index];
        let loses_flags = self.keep_flags_from(&instructions[index..])?;
        self.land_apart(index)?;
        let marks = self.mark_before(&instructions[index..])?;
        match Family::of(ins, self.features).ok_or(Failure::Unsuited)? {
            Family::Integer => self.instruction(ins, index)?,
            Family::Vector => self.vector(ins, index)?,
            Family::Branch => self.branch(ins, index)?,
            Family::String => self.string(ins, index)?,
        }
        if loses_flags {
            self.flags = Flags::HOST;
        }
        if marks {
            self.flags.rax = Rax::Marked;
        }
        self.note_pointers(ins);
        Ok(())
    }

    /// Has whoever comes in from elsewhere find what the block expects.
    fn make_up(&mut self, target: &Target<'a>) -> Result<()> {
        let Start { flags, owed, known, .. } = target.start;
        (self.flags, self.owed, self.known) = (Flags::SAVED, owed, Known::NOTHING);
        if owed != 0 {
            self.a.sub(instructions(), owed)?;
        }
        if known != Known::NOTHING {
            self.interpret = vec![None];
            self.unsaved = vec![None];
            self.ops = target.ops;
            self.admit(&known, 0)?;
        }
        if flags == Some(Wanted::Host) {
            self.load_flags()?;
        }
        Ok(self.a.jmp(target.label)?)
    }

    /// The label is here.
    pub(super) fn place(&mut self, mut label: CodeLabel) -> Result<()> {
        self.placed.insert(label, self.a.instructions().len());
        self.a.set_label(&mut label)?;
        Ok(self.a.zero_bytes()?)
    }

    /// Instructions of the block.
    pub(super) fn length(&self) -> i32 {
        self.ops.len() as i32 - 1
    }

    /// Emits an instruction made by hand.
    pub(super) fn put(&mut self, ins: Instruction) -> Result<()> {
        Ok(self.a.add_instruction(ins)?)
    }

    /// Notes that the next instruction emitted is the access of operation `index`: if it faults, nothing has happened.
    pub(super) fn may_fault(&mut self, index: usize) {
        let interpreter = self.interpreter_label(index);
        self.may_fault_to(interpreter);
    }

    /// Notes that the next instruction emitted may fault, and goes on at `to` then.
    pub(super) fn may_fault_to(&mut self, to: CodeLabel) {
        self.faulting.push((self.a.instructions().len(), to));
    }

    /// As [`Emitter::may_fault`], for an access before which the flags in RAX have been stored in the state, and RAX lost.
    pub(super) fn may_fault_without_rax(&mut self, index: usize) {
        let interpreter = self.saved_interpreter_label(index);
        let at = self.a.create_label();
        self.may_fault_to(at);
        self.cold.push(Cold::GetFlagsBack { at, interpreter });
    }

    /// Where operation `index` is given to the interpreter with the flags in RAX.
    pub(super) fn saved_interpreter_label(&mut self, index: usize) -> CodeLabel {
        if let Some(label) = self.interpret[index] {
            return label;
        }
        let at = self.a.create_label();
        self.interpret[index] = Some(at);
        let op = std::ptr::from_ref(&self.ops[index]) as u64;
        self.cold.push(Cold::Interpret { at, op, index, owed: self.owed });
        at
    }

    /// Where the access at `linear` is, if it is to the page accessed last in the same way or one that the TLB has, and suits
    /// `rules`; else operation `index` is the interpreter's. `free` scratch registers are left, none or one, and the flags are in RAX.
    pub(super) fn check(
        &mut self,
        linear: Linear,
        recent: usize,
        kind: Kind,
        rules: Rules,
        free: usize,
        index: usize,
    ) -> Result<At> {
        self.constants.remove(&recent);
        let page = field(recent + offset_of!(Recent, page));
        let addend = field(recent + offset_of!(Recent, addend));
        let routine = self.routines.look_up(kind, rules.size).ok_or(Failure::Unsuited)?;
        self.free_host_flags()?;
        let sum = match linear {
            Linear::Register(base, displacement) => At::Sum(base, displacement),
            Linear::Operand(_) => At::Sum(ADDRESS, 0),
        };
        if let Linear::Operand(_) = linear {
            self.linear(&linear)?;
        }
        let (at, back) = (self.a.create_label(), self.a.create_label());
        let interpreter = self.interpreter_label(index);
        let is_ruled = rules.alignment != 0 || rules.within_line && rules.size > 1;
        let is_sum = free == 0 || matches!(linear, Linear::Register(..));
        if is_ruled {
            self.place(back)?;
        }
        match linear {
            Linear::Register(base, displacement) if displacement != 0 => {
                self.a.lea(VALUE, qword_ptr(base + displacement))?;
                self.a.xor(VALUE, page)?;
            }
            Linear::Register(at, _) => {
                self.a.mov(VALUE, page)?;
                self.a.xor(VALUE, at)?;
            }
            Linear::Operand(_) => {
                self.a.mov(VALUE, page)?;
                self.a.xor(VALUE, ADDRESS)?;
            }
        }
        self.a.cmp(VALUE, 4096 - rules.size as i32)?;
        self.a.ja(at)?;
        if rules.alignment != 0 {
            self.a.test(r14b, i32::from(rules.alignment))?;
            self.a.jne(interpreter)?;
        }
        if rules.within_line && rules.size > 1 {
            self.a.and(r14d, LINE - 1)?;
            self.a.cmp(r14d, LINE - rules.size as i32)?;
            self.a.ja(interpreter)?;
        }
        if is_sum {
            self.a.mov(VALUE, addend)?;
        } else {
            self.a.add(ADDRESS, addend)?;
        }
        let back = match (is_ruled, is_sum) {
            (true, _) => Back::Check(back),
            (false, true) => Back::Value(back),
            (false, false) => Back::Address(back),
        };
        if let Back::Value(back) | Back::Address(back) = back {
            self.place(back)?;
        }
        self.cold.push(Cold::LookUp { at, back, linear, recent, routine, rules, interpreter });
        Ok(if is_sum { sum } else { At::Address })
    }

    /// As [`Emitter::check`], for an operand that is likely to be in another page each time: one scratch register is left.
    pub(super) fn find(&mut self, linear: Linear, kind: Kind, rules: Rules, index: usize) -> Result<At> {
        let routine = self.routines.find(kind, rules.size).ok_or(Failure::Unsuited)?;
        let column = if kind == Kind::Store { size_of::<Found>() * Found::SLOTS } else { 0 };
        let slot = size_of::<Found>().trailing_zeros();
        let (at, back) = (self.a.create_label(), self.a.create_label());
        self.free_host_flags()?;
        let interpreter = self.interpreter_label(index);
        self.linear(&linear)?;
        self.a.mov(VALUE, ADDRESS)?;
        self.a.shr(VALUE, PAGE_SHIFT - slot)?;
        self.a.and(r14d, ((Found::SLOTS - 1) << slot) as i32)?;
        self.a.add(VALUE, field(offset_of!(Cpu, mmu.tlb.found)))?;
        self.a.xor(ADDRESS, qword_ptr(VALUE + column + offset_of!(Found, page)))?;
        self.a.cmp(ADDRESS, 4096 - rules.size as i32)?;
        self.a.ja(at)?;
        if rules.alignment != 0 {
            self.a.test(r15b, i32::from(rules.alignment))?;
            self.a.jne(interpreter)?;
        }
        self.a.add(ADDRESS, qword_ptr(VALUE + column + offset_of!(Found, host)))?;
        self.place(back)?;
        self.cold.push(Cold::Find { at, back, linear, routine, rules, interpreter });
        Ok(At::Address)
    }

    /// Goes where what lies in two pages goes, if there is such a place and the bytes at [`ADDRESS`] do.
    pub(super) fn leave_split(&mut self, rules: &Rules) -> Result<()> {
        let Some(split) = rules.split else { return Ok(()) };
        self.a.mov(r14d, r15d)?;
        self.a.and(r14d, PAGE_MASK as i32)?;
        self.a.cmp(r14d, PAGE_SIZE as i32 - rules.size as i32)?;
        Ok(self.a.ja(split)?)
    }

    /// Where operation `index` begins in its page.
    pub(super) fn page_offset(&self, index: usize) -> u16 {
        self.ops[index].page_offset
    }

    /// At `at`, has vector registers be live, and goes on at `back`.
    pub(super) fn raise_vectors(&mut self, at: CodeLabel, back: CodeLabel, live: Live) {
        let routine = self.routines.raise(live);
        self.cold.push(Cold::Raise { at, back, routine });
    }

    /// Ends the run: the interpreter goes on with operation `index`.
    pub(super) fn interpret(&mut self, index: usize) -> Result<()> {
        self.save_flags()?;
        let label = self.saved_interpreter_label(index);
        Ok(self.a.jmp(label)?)
    }

    /// What takes back operation `index`, a branch to where nothing can be: RSP less `change` is what it was before, and the
    /// interpreter has the instruction.
    pub(super) fn taken(&self, index: usize, change: i16) -> u64 {
        let op = std::ptr::from_ref(&self.ops[index]) as u64;
        (op & super::POINTER) | u64::from(change as u16) << 48
    }

    /// Emits what lies behind the region.
    fn put_cold(&mut self) -> Result<()> {
        for apart in std::mem::take(&mut self.apart) {
            self.put_apart(apart)?;
        }
        for steady in std::mem::take(&mut self.steady) {
            self.put_steady(steady)?;
        }
        while !self.cold.is_empty() {
            // Ends of blocks ask for more.
            for piece in std::mem::take(&mut self.cold) {
                self.put_piece(piece)?;
            }
        }
        Ok(())
    }

    fn put_piece(&mut self, piece: Cold<'a>) -> Result<()> {
        let leave = self.routines.leave;
        let (Cold::LookUp { at, .. }
        | Cold::Find { at, .. }
        | Cold::SaveFlags { at, .. }
        | Cold::GetFlagsBack { at, .. }
        | Cold::StringFaulted { at, .. }
        | Cold::Interpret { at, .. }
        | Cold::Unlinked { at, .. }
        | Cold::Polled { at, .. }
        | Cold::Stop { at, .. }
        | Cold::Rest { at, .. }
        | Cold::Raise { at, .. }
        | Cold::Entry { at, .. }
        | Cold::Exit { at, .. }
        | Cold::Deep { at, .. }
        | Cold::ReturnMissed { at, .. }
        | Cold::NoJump { at, .. }) = piece;
        self.place(at)?;
        match piece {
            Cold::LookUp { back, linear, recent, routine, rules, interpreter, .. } => {
                self.linear(&linear)?;
                self.leave_split(&rules)?;
                // The check would find the same again.
                if matches!(back, Back::Check(_)) || rules.is_noted {
                    self.a.cmp(notes(), 0)?;
                    self.a.je(interpreter)?;
                }
                self.a.mov(r14d, recent as u32)?;
                self.a.call(routine)?;
                match back {
                    Back::Check(back) | Back::Value(back) => self.a.je(back)?,
                    Back::Address(back) => {
                        self.a.jne(interpreter)?;
                        self.a.add(ADDRESS, VALUE)?;
                        return Ok(self.a.jmp(back)?);
                    }
                }
                self.a.jmp(interpreter)?;
            }
            Cold::Find { back, linear, routine, rules, interpreter, .. } => {
                self.linear(&linear)?;
                self.leave_split(&rules)?;
                self.a.call(routine)?;
                self.a.jne(interpreter)?;
                if rules.alignment != 0 {
                    self.a.test(r15b, i32::from(rules.alignment))?;
                    self.a.jne(interpreter)?;
                }
                self.a.jmp(back)?;
            }
            Cold::SaveFlags { flags, interpreter, .. } => {
                self.flags = flags;
                self.save_flags()?;
                self.a.jmp(interpreter)?;
            }
            Cold::GetFlagsBack { interpreter, .. } => {
                self.a.movzx(eax, field16(offset_of!(Cpu, state.status)))?;
                self.a.jmp(interpreter)?;
            }
            Cold::StringFaulted { shape, interpreter, .. } => {
                self.end_string(shape)?;
                self.a.jmp(interpreter)?;
            }
            Cold::Interpret { op, index, owed, .. } => {
                if owed != 0 {
                    self.a.add(instructions(), owed)?;
                }
                self.a.mov(ADDRESS, op)?;
                self.a.mov(r14d, index as u32)?;
                self.a.jmp(leave)?;
            }
            Cold::Stop { back, way, .. } => self.stop(back, way)?,
            Cold::Rest { back, flags, counted, link, .. } => self.rest(back, flags, counted, link)?,
            Cold::Raise { back, routine, .. } => {
                self.a.call(routine)?;
                self.a.jmp(back)?;
            }
            Cold::Unlinked { link, .. } => {
                self.a.mov(ADDRESS, link | super::LEAVE_LINK)?;
                self.a.jmp(leave)?;
            }
            Cold::Polled { flags, owed, link, .. } => {
                self.flags = flags;
                self.settle_flags()?;
                if owed != 0 {
                    self.a.add(instructions(), owed)?;
                }
                self.a.mov(ADDRESS, link | super::LEAVE_LINK)?;
                self.a.jmp(leave)?;
            }
            Cold::Entry { target, .. } => self.make_up(&target)?,
            Cold::Exit { flags, owed, target, taken, .. } => {
                self.flags = flags;
                self.go_out(owed, target, taken)?;
            }
            Cold::Deep { back, .. } => {
                self.a.mov(rsp, field(offset_of!(Cpu, translator.stack)))?;
                self.a.jmp(back)?;
            }
            Cold::ReturnMissed { taken, .. } => {
                self.a.mov(VALUE, taken)?;
                let missed = self.routines.return_missed;
                self.a.jmp(missed)?;
            }
            Cold::NoJump { overwritten, taken, .. } => {
                if overwritten {
                    self.a.mov(ADDRESS, qword_ptr(VALUE + offset_of!(Jump, lin)))?;
                }
                self.a.mov(VALUE, taken)?;
                let no_jump = self.routines.no_jump;
                self.a.jmp(no_jump)?;
            }
        }
        Ok(())
    }

    /// Where the region is now, with what is to be done about faults in it: for each run the number of the block, the operation that it
    /// begins with, and its code.
    pub(super) fn finish(mut self, recovery: &mut Recovery) -> Result<Vec<(usize, usize, u64)>> {
        let near = self.a.instructions().len();
        self.put_cold()?;
        let layout = Layout::new(&mut self.a, self.arena, Some(self.routines.frame), near)?;
        let address =
            |instruction: usize| layout.addresses.get(instruction).copied().ok_or(Failure::Unsuited);
        let placed = |label| address(*self.placed.get(&label).ok_or(Failure::Unsuited)?);
        let faulting =
            self.faulting.iter().map(|&(from, to)| Ok((address(from)?, placed(to)?, from >= near)));
        let faulting = faulting.collect::<Result<Vec<_>>>()?;
        let entries = self.entries.iter().map(|entry| Ok((entry.member, entry.index, placed(entry.at)?)));
        let entries = entries.collect::<Result<Vec<_>>>()?;
        let start = self.arena.add_both(&layout.bytes, &layout.far).ok_or(Failure::Full)?;
        debug_assert_eq!(start, layout.at);
        faulting.into_iter().for_each(|(from, to, seldom)| recovery.add(from, to, seldom));
        Ok(entries)
    }
}

/// Where instructions are counted, in the [`Cpu`].
pub(super) const COUNT: usize = offset_of!(Cpu, counters.instructions);

/// What counts instructions.
pub(super) fn instructions() -> AsmMemoryOperand {
    field(COUNT)
}
