//! The translation of one run of instructions under way: what is emitted, where the flags are, what comes behind it.

use std::mem::offset_of;

use iced_x86::code_asm::{AsmRegister64, CodeAssembler, CodeLabel, al, dword_ptr, eax, r14d};
use iced_x86::{
    BlockEncoderOptions, Code, IcedError, Instruction, InstructionInfoFactory, MemoryOperand, Register,
};

use super::Failure;
use super::link::Link;
use super::registers::{ADDRESS, VALUE, field, field16, slot};
use super::routines::Routines;
use super::vector::Live;
use crate::code::op::Op;
use crate::cpu::Cpu;
use crate::hostexec::arena::Arena;
use crate::mmu::host::Recovery;
use crate::mmu::tlb::{PAGE_MASK, Recent};
use crate::state::reg;

/// Why there is no translation: see [`super::Failure`].
pub(super) type Result<T> = std::result::Result<T, Failure>;

impl From<IcedError> for Failure {
    fn from(_: IcedError) -> Self {
        Failure::Unsuited
    }
}

/// Where the guest's status flags are. At the start and the end of every run they are in RAX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flags {
    /// In the host's RFLAGS.
    Host,
    /// In RAX.
    Saved,
    /// In both.
    Both,
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
    pub(super) const ALL: [Kind; Recent::KINDS] = [Kind::Load, Kind::Store, Kind::Lock];
}

/// How a linear address is computed.
#[derive(Clone, Copy)]
pub(super) enum Linear {
    /// That of the memory operand of an instruction.
    Operand(Instruction),
    /// A guest register that is in a host register, plus a displacement.
    Register(AsmRegister64, i32),
}

/// Code that lies behind that of the run.
enum Cold {
    /// The access at `back` is not to the page accessed last.
    LookUp { at: CodeLabel, back: CodeLabel, linear: Linear, recent: usize, routine: u64, index: usize },
    /// The access of an instruction has faulted whose flags are in the state.
    GetFlagsBack { at: CodeLabel, index: usize },
    /// The instruction is the interpreter's.
    Interpret { at: CodeLabel, index: usize },
    /// A link is not valid.
    Unlinked { at: CodeLabel, link: u64 },
    /// Vector registers have to be loaded.
    Raise { at: CodeLabel, back: CodeLabel, routine: u64 },
}

/// A run being translated.
pub(super) struct Emitter<'a> {
    pub(super) a: CodeAssembler,
    pub(super) flags: Flags,
    pub(super) info: InstructionInfoFactory,
    /// Classes of instructions ([`crate::hostexec::class`]) that are known to be allowed.
    pub(super) admitted: u32,
    /// Vector registers that are known to be live.
    pub(super) live: Live,
    arena: &'a mut Arena,
    routines: Routines,
    /// The operations of the block, and where it starts if it may go on to itself.
    ops: &'a [Op],
    start: Option<CodeLabel>,
    cold: Vec<Cold>,
    /// Instructions that may fault: which they are among the assembler's, and the operation.
    faulting: Vec<(usize, usize)>,
    /// Likewise, for instructions before which the flags in RAX have gone to the state: where they are got back from there.
    got_back: Vec<Option<CodeLabel>>,
    /// For each operation the label where it is given to the interpreter.
    interpret: Vec<Option<CodeLabel>>,
}

impl<'a> Emitter<'a> {
    /// A run of the block with these operations, in `arena`. `loops`: it starts with the block, which may go on to itself.
    pub(super) fn new(
        arena: &'a mut Arena,
        routines: Routines,
        ops: &'a [Op],
        loops: bool,
    ) -> Result<Emitter<'a>> {
        let mut a = CodeAssembler::new(64)?;
        let mut start = None;
        if loops {
            let mut label = a.create_label();
            a.set_label(&mut label)?;
            a.zero_bytes()?;
            start = Some(label);
        }
        Ok(Emitter {
            a,
            start,
            flags: Flags::Saved,
            info: InstructionInfoFactory::new(),
            admitted: 0,
            live: Live::Nothing,
            arena,
            routines,
            ops,
            cold: Vec::new(),
            faulting: Vec::new(),
            got_back: vec![None; ops.len()],
            interpret: vec![None; ops.len()],
        })
    }

    /// Instructions of the block.
    fn length(&self) -> usize {
        self.ops.len() - 1
    }

    /// The flags are in RAX; they may be in RFLAGS as well.
    pub(super) fn save_flags(&mut self) -> Result<()> {
        if self.flags == Flags::Host {
            self.a.lahf()?;
            self.a.seto(al)?;
            self.flags = Flags::Both;
        }
        Ok(())
    }

    /// RFLAGS may be overwritten: the flags are in RAX alone.
    pub(super) fn free_host_flags(&mut self) -> Result<()> {
        self.save_flags()?;
        self.flags = Flags::Saved;
        Ok(())
    }

    /// The flags are in RFLAGS; they may be in RAX as well.
    pub(super) fn load_flags(&mut self) -> Result<()> {
        if self.flags == Flags::Saved {
            // AL is one or nothing: less -127 it overflows, or it does not. SAHF sets the others.
            self.a.cmp(al, -127)?;
            self.a.sahf()?;
            self.flags = Flags::Both;
        }
        Ok(())
    }

    /// RAX may be overwritten: the flags are in RFLAGS alone.
    pub(super) fn free_rax(&mut self) -> Result<()> {
        self.load_flags()?;
        self.flags = Flags::Host;
        Ok(())
    }

    /// Emits an instruction made by hand.
    pub(super) fn put(&mut self, ins: Instruction) -> Result<()> {
        Ok(self.a.add_instruction(ins)?)
    }

    /// Notes that the next instruction emitted is the access of operation `index`: if it faults, nothing has happened.
    pub(super) fn may_fault(&mut self, index: usize) {
        debug_assert_ne!(self.flags, Flags::Host);
        self.faulting.push((self.a.instructions().len(), index));
        self.interpreter_label(index);
    }

    /// As [`Emitter::may_fault`], for an access before which the flags in RAX have been stored in the state, and RAX lost.
    pub(super) fn may_fault_without_rax(&mut self, index: usize) {
        self.faulting.push((self.a.instructions().len(), index));
        self.interpreter_label(index);
        let at = self.a.create_label();
        self.got_back[index] = Some(at);
        self.cold.push(Cold::GetFlagsBack { at, index });
    }

    /// Where operation `index` is given to the interpreter; the flags have to be in RAX.
    pub(super) fn interpreter_label(&mut self, index: usize) -> CodeLabel {
        if let Some(label) = self.interpret[index] {
            return label;
        }
        let at = self.a.create_label();
        self.interpret[index] = Some(at);
        self.cold.push(Cold::Interpret { at, index });
        at
    }

    /// Has [`ADDRESS`] be the host address of the access at `linear`, if it is to the page accessed last in the same way or one
    /// that the TLB has; else operation `index` is the interpreter's. [`VALUE`] is lost, and the flags are in RAX.
    pub(super) fn check(
        &mut self,
        linear: Linear,
        way: usize,
        kind: Kind,
        size: usize,
        index: usize,
    ) -> Result<()> {
        let recent =
            offset_of!(Cpu, mmu.tlb.recent) + size_of::<Recent>() * (kind as usize * Recent::WAYS + way);
        self.free_host_flags()?;
        self.linear(&linear)?;
        self.a.xor(ADDRESS, field(recent + offset_of!(Recent, page)))?;
        let routine = self.routines.look_up(kind, size).ok_or(Failure::Unsuited)?;
        let (at, mut back) = (self.a.create_label(), self.a.create_label());
        self.a.cmp(ADDRESS, 4096 - size as i32)?;
        self.a.ja(at)?;
        self.a.add(ADDRESS, field(recent + offset_of!(Recent, host)))?;
        self.a.set_label(&mut back)?;
        self.a.zero_bytes()?;
        self.interpreter_label(index);
        self.cold.push(Cold::LookUp { at, back, linear, recent, routine, index });
        Ok(())
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
        let label = self.interpreter_label(index);
        Ok(self.a.jmp(label)?)
    }

    /// All instructions of the block are done.
    fn count(&mut self) -> Result<()> {
        let length = self.length() as i32;
        Ok(self.a.add(field(offset_of!(Cpu, counters.instructions)), length)?)
    }

    /// What takes back operation `index`, a branch to where nothing can be: RSP less `change` is what it was before, and the
    /// interpreter has the instruction.
    pub(super) fn taken(&self, index: usize, change: i16) -> u64 {
        let op = std::ptr::from_ref(&self.ops[index]) as u64;
        (op & super::POINTER) | u64::from(change as u16) << 48
    }

    /// Ends the block: goes on at `target`, relative to the start of its page. `taken` takes the branch back, if it is one.
    pub(super) fn go_to(&mut self, target: i64, taken: u64) -> Result<()> {
        self.free_host_flags()?;
        self.count()?;
        let link = Link::make(self.arena, target, taken).ok_or(Failure::Full)?;
        let at = self.a.create_label();
        self.cold.push(Cold::Unlinked { at, link });
        self.a.mov(ADDRESS, field(offset_of!(Cpu, translator.requests)))?;
        self.a.cmp(dword_ptr(ADDRESS), 0)?;
        self.a.jne(at)?;
        if target == i64::from(self.ops[0].page_offset)
            && let Some(start) = self.start
        {
            // A block that runs is valid: it needs no link to itself.
            return Ok(self.a.jmp(start)?);
        }
        self.a.mov(ADDRESS, field(offset_of!(Cpu, translator.validity)))?;
        let valid = self.rip_relative(link + Link::VALIDITY);
        self.put(Instruction::with2(Code::Cmp_r64_rm64, Register::from(ADDRESS), valid)?)?;
        self.a.jne(at)?;
        let pages = target & !(PAGE_MASK as i64);
        if pages != 0 {
            let pages = i32::try_from(pages).map_err(|_| Failure::Unsuited)?;
            self.a.add(slot(reg::IP_BASE), pages)?;
        }
        let code = self.rip_relative(link + Link::CODE);
        self.put(Instruction::with1(Code::Jmp_rm64, code)?)
    }

    fn rip_relative(&self, address: u64) -> MemoryOperand {
        MemoryOperand::with_base_displ(Register::RIP, address as i64)
    }

    /// Ends the block: goes on at the address in [`ADDRESS`]. `taken` takes the branch back.
    pub(super) fn go_to_address(&mut self, taken: u64) -> Result<()> {
        self.free_host_flags()?;
        self.count()?;
        self.a.mov(VALUE, taken)?;
        let indirect = self.routines.indirect;
        Ok(self.a.jmp(indirect)?)
    }

    /// Emits what lies behind the run.
    fn put_cold(&mut self) -> Result<()> {
        // Whatever these refer to was noted with them: none asks for another.
        let cold = std::mem::take(&mut self.cold);
        let leave = self.routines.leave;
        for piece in cold {
            match piece {
                Cold::LookUp { mut at, back, linear, recent, routine, index } => {
                    self.a.set_label(&mut at)?;
                    // Computed again, not got back from the page: that would wait for the last access's page.
                    self.linear(&linear)?;
                    self.a.mov(r14d, recent as u32)?;
                    self.a.call(routine)?;
                    self.a.je(back)?;
                    let interpreter = self.interpreter_label(index);
                    self.a.jmp(interpreter)?;
                }
                Cold::GetFlagsBack { mut at, index } => {
                    self.a.set_label(&mut at)?;
                    self.got_back[index] = Some(at);
                    self.a.movzx(eax, field16(offset_of!(Cpu, state.status)))?;
                    let interpreter = self.interpreter_label(index);
                    self.a.jmp(interpreter)?;
                }
                Cold::Interpret { mut at, index } => {
                    self.a.set_label(&mut at)?;
                    self.interpret[index] = Some(at);
                    self.a.mov(ADDRESS, std::ptr::from_ref(&self.ops[index]) as u64)?;
                    self.a.mov(r14d, index as u32)?;
                    self.a.jmp(leave)?;
                }
                Cold::Raise { mut at, back, routine } => {
                    self.a.set_label(&mut at)?;
                    self.a.call(routine)?;
                    self.a.jmp(back)?;
                }
                Cold::Unlinked { mut at, link } => {
                    self.a.set_label(&mut at)?;
                    self.a.mov(ADDRESS, link | super::LEAVE_LINK)?;
                    self.a.jmp(leave)?;
                }
            }
        }
        Ok(())
    }

    /// Where the run is now, with what is to be done about faults in it.
    pub(super) fn finish(mut self, recovery: &mut Recovery) -> Result<u64> {
        self.put_cold()?;
        let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let at = self.arena.next();
        let code = self.a.assemble_options(at, options)?;
        let offsets = &code.inner.new_instruction_offsets;
        let mut entries = Vec::with_capacity(self.faulting.len());
        for (instruction, index) in self.faulting {
            let label = self.got_back[index].or(self.interpret[index]).ok_or(Failure::Unsuited)?;
            let from = offsets.get(instruction).copied().filter(|&offset| offset != u32::MAX);
            let from = from.ok_or(Failure::Unsuited)?;
            entries.push((at + u64::from(from), code.label_ip(&label)?));
        }
        let start = self.arena.add(&code.inner.code_buffer).ok_or(Failure::Full)?;
        debug_assert_eq!(start, at);
        entries.into_iter().for_each(|(from, to)| recovery.add(from, to));
        Ok(start)
    }
}
