//! Memory operands: linear addresses, and the checks that make host addresses of them.

use std::mem::offset_of;

use iced_x86::code_asm::{qword_ptr, r14d, r15d};
use iced_x86::{Instruction, Register};

use super::Failure;
use super::emit::{Emitter, Kind, Linear, Result};
use super::registers::{ADDRESS, GUEST_RSP, VALUE, field, slot};
use crate::cpu::Cpu;
use crate::state::{Seg, reg};

/// Bytes in a cache line.
const LINE: i32 = 64;

/// Ways of access besides those by a general register: see [`Recent::WAYS`].
const IP: usize = 16;
const NO_BASE: usize = 17;
const FS: usize = 18;
const GS: usize = 19;

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

impl Emitter<'_> {
    /// Loads [`ADDRESS`] with the offset part of the memory operand. Changes [`VALUE`], and no flags.
    pub(super) fn offset(&mut self, ins: &Instruction) -> Result<()> {
        let displacement = ins.memory_displacement64() as i64;
        let displacement = i32::try_from(displacement).map_err(|_| Failure::Unsuited)?;
        let (base, index) = (ins.memory_base(), ins.memory_index());
        let base = match base {
            Register::None => None,
            Register::RIP => {
                self.a.mov(ADDRESS, slot(reg::IP_BASE))?;
                Some(ADDRESS)
            }
            base => Some(self.in_register(base, ADDRESS)?),
        };
        let index = match index {
            Register::None => None,
            index => Some((self.in_register(index, VALUE)?, ins.memory_index_scale() as i32)),
        };
        match (base, index) {
            (None, None) => self.a.mov(ADDRESS, i64::from(displacement))?,
            (Some(base), None) => self.a.lea(ADDRESS, qword_ptr(base + displacement))?,
            (None, Some((index, scale))) => self.a.lea(ADDRESS, qword_ptr(index * scale + displacement))?,
            (Some(base), Some((index, scale))) => {
                self.a.lea(ADDRESS, qword_ptr(base + index * scale + displacement))?;
            }
        }
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

    /// Has [`ADDRESS`] be the host address of the memory operand. [`VALUE`] is lost, and the flags are in RAX.
    pub(super) fn access(&mut self, ins: &Instruction, kind: Kind, size: usize, index: usize) -> Result<()> {
        let way = match (ins.memory_segment(), ins.memory_base()) {
            (Register::FS, _) => FS,
            (Register::GS, _) => GS,
            (_, Register::RIP) => IP,
            (_, Register::None) => NO_BASE,
            (_, base) => base.number(),
        };
        self.check(Linear::Operand(*ins), way, kind, size, index)
    }

    /// Has [`ADDRESS`] be the host address of the word at RSP plus `offset`. [`VALUE`] is lost, and the flags are in RAX.
    pub(super) fn stack(&mut self, offset: i32, kind: Kind, index: usize) -> Result<()> {
        self.check(Linear::Register(GUEST_RSP, offset), usize::from(reg::RSP), kind, 8, index)
    }

    /// A locked access at [`ADDRESS`] is the interpreter's if it is split between two cache lines. Changes [`VALUE`].
    pub(super) fn within_line(&mut self, size: usize, index: usize) -> Result<()> {
        if size > 1 {
            self.a.mov(r14d, r15d)?;
            self.a.and(r14d, LINE - 1)?;
            self.a.cmp(r14d, LINE - size as i32)?;
            let split = self.interpreter_label(index);
            self.a.ja(split)?;
        }
        Ok(())
    }
}
