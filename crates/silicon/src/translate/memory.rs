//! Memory operands: linear addresses, and the checks that make host addresses of them.

use std::collections::HashMap;
use std::mem::offset_of;

use iced_x86::code_asm::{CodeLabel, qword_ptr, rbp};
use iced_x86::{Code, Instruction, MemoryOperand, Mnemonic, OpKind, Register};

use super::Failure;
use super::emit::{Emitter, Kind, Linear, Result};
use super::flags::written;
use super::registers::{ADDRESS, At, GUEST_RSP, Place, VALUE, displacement_size, field, place_of, slot};
use crate::cpu::Cpu;
use crate::mmu::tlb::{PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Recent};
use crate::state::{Seg, reg};

/// Which way ([`Recent::WAYS`]) an access by this operand goes: operands with the same registers whose displacements are in the same
/// page are likely to lie in one page. Code in the page of number `code` has its constants in pages of their own.
pub(super) fn way(ins: &Instruction, kind: Kind, code: u64) -> usize {
    let base = match (ins.memory_segment(), ins.memory_base()) {
        (Register::FS, _) => 17,
        (Register::GS, _) => 18,
        (_, Register::RIP) => 16,
        (_, Register::None) => 19,
        (_, base) => base.number(),
    };
    let index = if ins.memory_index() == Register::None { 0 } else { 1 + ins.memory_index().number() };
    let page = (ins.memory_displacement64().wrapping_add(PAGE_SIZE / 2) >> PAGE_SHIFT) as usize;
    let mix = |number: usize| number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let top = |number: usize, count: usize| number >> (usize::BITS - count.trailing_zeros());
    let like = base + 32 * index + 1024 * page;
    match kind {
        Kind::Lock => top(mix(like), Recent::WAYS[2]),
        Kind::Load if base == 16 => {
            let page = (ins.memory_displacement64() >> PAGE_SHIFT) as usize;
            FEW + top(mix(page.wrapping_add(mix(code as usize) >> 32)), FEW)
        }
        _ if base < 16 && index == 0 && page == 0 => base,
        _ => FEW / 2 + top(mix(like), FEW / 2),
    }
}

/// Ways of stores, and of loads but for those of constants: a way for each base register, and as many for everything else.
const FEW: usize = Recent::WAYS[1];

/// What is known of ways in a run: to which page of those around the code the last access of constants by them went.
pub(super) type Constants = HashMap<usize, i64>;

fn segment_base(seg: Seg) -> usize {
    offset_of!(Cpu, state.ea_base) + 8 * seg as usize
}

/// 64-bit addresses whose displacement fits.
pub(super) fn suits_memory(ins: &Instruction) -> bool {
    let wide = |register: Register| register == Register::None || register.size() == 8;
    let (base, index) = (ins.memory_base(), ins.memory_index());
    let absolute = base == Register::None && index == Register::None;
    wide(base)
        && wide(index)
        && !(absolute && ins.memory_displ_size() != 8)
        && i32::try_from(ins.memory_displacement64() as i64).is_ok()
}

/// Whether the instruction, a MOV, takes something from memory.
fn reads_memory(ins: &Instruction) -> bool {
    ins.mnemonic() == Mnemonic::Pop || ins.op_kinds().nth(1) == Some(OpKind::Memory)
}

impl Emitter<'_> {
    /// Where the page accessed last in this way is, in the [`Cpu`].
    pub(super) fn recent(&self, kind: Kind, way: usize) -> usize {
        let before =
            usize::from(self.user) * Recent::ALL + Recent::WAYS[..kind as usize].iter().sum::<usize>();
        offset_of!(Cpu, mmu.tlb.recent) + size_of::<Recent>() * (before + way)
    }

    /// Loads [`ADDRESS`] with the offset part of the memory operand. Changes [`VALUE`], and no flags.
    pub(super) fn offset(&mut self, ins: &Instruction) -> Result<()> {
        let mut lea =
            Instruction::with2(Code::Lea_r64_m, ADDRESS.into(), MemoryOperand::with_base(ADDRESS.into()))?;
        self.operand(ins, &mut lea)?;
        self.put(lea)
    }

    /// Has the memory operand of `host`, an LEA, be that of `ins` in host registers. Changes [`ADDRESS`] and [`VALUE`], and no flags.
    pub(super) fn operand(&mut self, ins: &Instruction, host: &mut Instruction) -> Result<()> {
        let displacement = ins.memory_displacement64() as i64;
        i32::try_from(displacement).map_err(|_| Failure::Unsuited)?;
        let base = match ins.memory_base() {
            Register::None => Register::None,
            Register::RIP => {
                self.a.mov(ADDRESS, slot(reg::IP_BASE))?;
                ADDRESS.into()
            }
            base => self.in_register(base, ADDRESS)?.into(),
        };
        let index = match ins.memory_index() {
            Register::None => Register::None,
            index => self.in_register(index, VALUE)?.into(),
        };
        host.set_segment_prefix(Register::None);
        host.set_memory_base(base);
        host.set_memory_index(index);
        host.set_memory_index_scale(ins.memory_index_scale());
        host.set_memory_displ_size(displacement_size(base, displacement));
        host.set_memory_displacement64(displacement as u64);
        Ok(())
    }

    /// Loads [`ADDRESS`] with a linear address. Changes [`VALUE`] and flags.
    pub(super) fn linear(&mut self, linear: &Linear) -> Result<()> {
        let ins = match linear {
            Linear::Register(base, displacement) => {
                return Ok(self.a.lea(ADDRESS, qword_ptr(*base + *displacement))?);
            }
            Linear::Operand(ins) => ins,
        };
        self.offset(ins)?;
        match ins.memory_segment() {
            Register::FS => self.a.add(ADDRESS, field(segment_base(Seg::Fs)))?,
            Register::GS => self.a.add(ADDRESS, field(segment_base(Seg::Gs)))?,
            _ => {}
        }
        Ok(())
    }

    /// Where the memory operand is, if the access is to the page accessed last in the same way or one that the TLB has and
    /// suits `rules`; else operation `index` is the interpreter's. `free` scratch registers have to be left, one at most. The
    /// flags are in RAX.
    pub(super) fn access(
        &mut self,
        ins: &Instruction,
        kind: Kind,
        rules: Rules,
        free: usize,
        index: usize,
    ) -> Result<At> {
        let plain = !matches!(ins.memory_segment(), Register::FS | Register::GS)
            && ins.memory_index() == Register::None
            && !matches!(ins.memory_base(), Register::RIP | Register::None);
        let displacement =
            i32::try_from(ins.memory_displacement64() as i64).map_err(|_| Failure::Unsuited)?;
        let linear = match place_of(ins.memory_base()) {
            Place::Host(base) if plain => Linear::Register(base, displacement),
            _ => Linear::Operand(*ins),
        };
        if let Some(at) = self.access_steady(&linear, free, index)? {
            return Ok(at);
        }
        let way = way(ins, kind, self.code_page);
        if let Some(at) = self.access_shared(Some(ins), linear, way, index)? {
            return Ok(at);
        }
        if kind != Kind::Lock && self.is_scattered(ins) {
            return self.find(linear, kind, rules, index);
        }
        let recent = self.recent(kind, way);
        let constant = kind != Kind::Lock
            && !(kind == Kind::Store && self.shared.in_cluster())
            && ins.memory_base() == Register::RIP
            && !matches!(ins.memory_segment(), Register::FS | Register::GS);
        let page = i64::from(displacement) >> PAGE_SHIFT;
        let within = (displacement & PAGE_MASK as i32) as usize;
        let lies_well = within + rules.size <= PAGE_SIZE as usize && within as u8 & rules.alignment == 0;
        if constant && lies_well && self.constants.get(&recent) == Some(&page) {
            return self.in_known_page(displacement, recent, free);
        }
        let rules = Rules { is_noted: constant && lies_well, ..rules };
        let at = self.check(linear, recent, kind, rules, free, index)?;
        if constant && lies_well {
            self.constants.insert(recent, page);
        }
        Ok(at)
    }

    /// Where the constant is that lies `displacement` bytes from the start of the code's page, in a page that has been accessed in this
    /// way before: nothing is to be checked.
    fn in_known_page(&mut self, displacement: i32, recent: usize, free: usize) -> Result<At> {
        self.a.mov(ADDRESS, slot(reg::IP_BASE))?;
        self.a.mov(VALUE, field(recent + offset_of!(Recent, addend)))?;
        if free == 0 {
            return Ok(At::Sum(ADDRESS, displacement));
        }
        self.a.lea(ADDRESS, qword_ptr(ADDRESS + VALUE + displacement))?;
        Ok(At::Address)
    }

    /// Whether what the operand points to is likely to be in another page each time: its address has come from memory.
    pub(super) fn is_scattered(&self, ins: &Instruction) -> bool {
        let segment = matches!(ins.memory_segment(), Register::FS | Register::GS);
        let loaded =
            |register: Register| register.is_gpr() && self.pointers & 1 << (register.number() & 15) != 0;
        !segment && (loaded(ins.memory_base()) || loaded(ins.memory_index()))
    }

    /// Notes which registers the instruction, which has just been translated, has loaded from memory.
    pub(super) fn note_pointers(&mut self, ins: &Instruction) {
        let written = written(&mut self.info, ins);
        self.pointers &= !written;
        // What is extended from less is more likely to be an index into something small.
        if matches!(ins.mnemonic(), Mnemonic::Mov | Mnemonic::Movsxd | Mnemonic::Pop) && reads_memory(ins) {
            self.pointers |= written & !(1 << reg::RSP);
        }
    }

    /// Where the word at RSP plus `offset` is; [`ADDRESS`] is free. The flags are in RAX.
    pub(super) fn stack(&mut self, offset: i32, kind: Kind, index: usize) -> Result<At> {
        let linear = Linear::Register(GUEST_RSP, offset);
        if let Some(at) = self.access_steady(&linear, 1, index)? {
            return Ok(at);
        }
        if let Some(at) = self.access_shared(None, linear, usize::from(reg::RSP), index)? {
            return Ok(at);
        }
        let recent = self.recent(kind, usize::from(reg::RSP));
        self.check(linear, recent, kind, Rules::size(8), 1, index)
    }

    /// Where the word at RBP is, likewise.
    pub(super) fn saved_rbp(&mut self, index: usize) -> Result<At> {
        let linear = Linear::Register(rbp, 0);
        let recent = self.recent(Kind::Load, usize::from(reg::RBP));
        self.check(linear, recent, Kind::Load, Rules::size(8), 1, index)
    }
}

/// What an access must be, besides within a page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Bytes.
    pub(super) size: usize,
    /// Bits of the address that must be clear.
    pub(super) alignment: u8,
    /// It must not be split between two cache lines.
    pub(super) within_line: bool,
    /// Where to go if it lies in two pages; else the interpreter has to see to it.
    pub(super) split: Option<CodeLabel>,
    /// Accesses behind it go to the page noted as the one accessed last: where pages are not noted it is the interpreter's.
    pub(super) is_noted: bool,
}

impl Rules {
    /// No more than that it has this size.
    pub(super) fn size(size: usize) -> Rules {
        Rules { size, alignment: 0, within_line: false, split: None, is_noted: false }
    }
}
