//! Code that all translated blocks of a CPU share: the way in, the way out, looking up pages and indirect targets.

use std::mem::offset_of;

use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, ax, dword_ptr, eax, ecx, edx, qword_ptr, r12, r13, r14, r15, rax, rcx, rdi, rdx,
};
use iced_x86::{BlockEncoderOptions, IcedError};

use super::LEAVE_INDIRECT;
use super::emit::Kind;
use super::registers::{ADDRESS, HELD, VALUE, field, field16, slot};
use super::vector::{self, Live};
use crate::code::{Block, JUMP_ENTRIES, JumpEntry};
use crate::cpu::Cpu;
use crate::flags::Status;
use crate::hostexec::arena::Arena;
use crate::mmu::tlb::{Entry, L1_SLOTS, PAGE_MASK, PAGE_SHIFT, Recent};
use crate::state::reg;

/// Addresses of the shared code.
#[derive(Clone, Copy, Debug)]
pub(super) struct Routines {
    /// `extern fn(code in RAX)`, called with GS set; see [`super::call`].
    pub(super) enter: u64,
    /// Jumped to, to leave: [`ADDRESS`] and [`VALUE`] are what [`super::call`] returns, RAX holds the flags.
    pub(super) leave: u64,
    /// Jumped to with a target in [`ADDRESS`]: goes on there, or leaves.
    pub(super) indirect: u64,
    /// Those that [`Routines::look_up`] gives, by what they are for.
    pages: [[u64; SIZES.len()]; Recent::KINDS],
    /// Those that [`Routines::raise`] gives.
    raise: [u64; Live::SOME.len()],
}

/// Sizes of accesses in bytes.
const SIZES: [usize; 8] = [1, 2, 4, 8, 10, 16, 32, 64];

impl Routines {
    /// Makes them; `None` without room.
    pub(super) fn new(arena: &mut Arena) -> Option<Routines> {
        let enter = assemble(arena, enter)?;
        let leave = assemble(arena, leave)?;
        let indirect = assemble(arena, |a| indirect(a, leave))?;
        let mut pages = [[0; SIZES.len()]; Recent::KINDS];
        for (kind, routines) in Kind::ALL.into_iter().zip(&mut pages) {
            for (size, routine) in SIZES.into_iter().zip(routines) {
                *routine = assemble(arena, |a| look_up_page(a, kind, size))?;
            }
        }
        let mut raise = [0; Live::SOME.len()];
        for (live, routine) in Live::SOME.into_iter().zip(&mut raise) {
            *routine = assemble(arena, |a| vector::raise(a, live))?;
        }
        Some(Routines { enter, leave, indirect, pages, raise })
    }

    /// To be called where an access is not to the page accessed last: [`ADDRESS`] holds the linear address,
    /// [`VALUE`] the offset of its [`Recent`] in the [`Cpu`]. Returns ZF set with the host address in [`ADDRESS`], or
    /// ZF clear. Changes nothing else but flags and [`VALUE`].
    pub(super) fn look_up(&self, kind: Kind, size: usize) -> Option<u64> {
        let at = SIZES.iter().position(|&known| known == size)?;
        Some(self.pages[kind as usize][at])
    }

    /// To be called to have vector registers be live, where they are not; changes flags alone.
    pub(super) fn raise(&self, live: Live) -> u64 {
        self.raise[(live as usize).saturating_sub(1)]
    }
}

fn assemble(
    arena: &mut Arena,
    emit: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Option<u64> {
    let mut a = CodeAssembler::new(64).ok()?;
    emit(&mut a).ok()?;
    let code = a.assemble_options(arena.next(), BlockEncoderOptions::NONE).ok()?;
    arena.add(&code.inner.code_buffer)
}

/// Loads the guest's registers and goes on at RDI.
fn enter(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for saved in [r12, r13, r14, r15] {
        a.push(saved)?;
    }
    a.mov(r15, rdi)?;
    a.movzx(eax, field16(offset_of!(Cpu, state.status)))?;
    a.and(eax, u32::from(Status::MASK))?;
    for (number, host) in HELD {
        a.mov(host, slot(number))?;
    }
    a.jmp(r15)
}

/// Stores the guest's registers and returns [`ADDRESS`] in RAX, [`VALUE`] in RDX.
fn leave(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(field16(offset_of!(Cpu, state.status)), ax)?;
    vector::store_all(a)?;
    for (number, host) in HELD {
        a.mov(slot(number), host)?;
    }
    a.mov(rax, ADDRESS)?;
    a.mov(rdx, VALUE)?;
    for saved in [r15, r14, r13, r12] {
        a.pop(saved)?;
    }
    a.ret()
}

/// Asks the jump cache, as `Cpu::block_at_hand` does. [`VALUE`] is kept for whoever has to take the jump back.
fn indirect(a: &mut CodeAssembler, leave: u64) -> Result<(), IcedError> {
    let mut out = a.create_label();
    a.mov(field(offset_of!(Cpu, state.rip)), ADDRESS)?;
    a.push(rcx)?;
    a.push(rdx)?;
    a.mov(rcx, field(offset_of!(Cpu, translator.requests)))?;
    a.cmp(dword_ptr(rcx), 0)?;
    a.jne(out)?;
    // The context is that of one half of the address space.
    a.mov(rcx, ADDRESS)?;
    a.xor(rcx, slot(reg::IP_BASE))?;
    a.js(out)?;
    a.mov(rdx, ADDRESS)?;
    a.shr(rdx, 15)?;
    a.xor(rdx, ADDRESS)?;
    a.and(edx, (JUMP_ENTRIES - 1) as u32)?;
    a.shl(edx, size_of::<JumpEntry>().trailing_zeros())?;
    a.add(rdx, field(offset_of!(Cpu, code.jump)))?;
    a.cmp(qword_ptr(rdx + offset_of!(JumpEntry, lin)), ADDRESS)?;
    a.jne(out)?;
    for (held, of_entry) in [
        (offset_of!(Cpu, translator.context), offset_of!(JumpEntry, context)),
        (offset_of!(Cpu, code.generation), offset_of!(JumpEntry, generation)),
    ] {
        a.mov(rcx, field(held))?;
        a.cmp(qword_ptr(rdx + of_entry), rcx)?;
        a.jne(out)?;
    }
    a.mov(rdx, qword_ptr(rdx + offset_of!(JumpEntry, block)))?;
    a.mov(rcx, field(offset_of!(Cpu, code.epoch)))?;
    a.cmp(qword_ptr(rdx + offset_of!(Block, checked)), rcx)?;
    a.jne(out)?;
    a.mov(rcx, qword_ptr(rdx + offset_of!(Block, translation)))?;
    a.test(rcx, rcx)?;
    a.je(out)?;
    a.mov(rdx, ADDRESS)?;
    a.and(rdx, !(PAGE_MASK as i32))?;
    a.mov(slot(reg::IP_BASE), rdx)?;
    a.mov(ADDRESS, rcx)?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.jmp(ADDRESS)?;
    a.set_label(&mut out)?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.mov(ADDRESS, LEAVE_INDIRECT)?;
    a.jmp(leave)
}

/// Looks for a page in the first level of the TLB, and keeps it as the one accessed last.
fn look_up_page(a: &mut CodeAssembler, kind: Kind, size: usize) -> Result<(), IcedError> {
    let tag = if kind == Kind::Load { offset_of!(Entry, read) } else { offset_of!(Entry, write) };
    let recent = |offset: usize| qword_ptr(VALUE + offset).gs();
    let mut out: CodeLabel = a.create_label();
    a.push(rcx)?;
    a.push(rdx)?;
    a.lea(rcx, qword_ptr(ADDRESS + (size - 1)))?;
    a.and(rcx, !(PAGE_MASK as i32))?;
    a.or(rcx, field(offset_of!(Cpu, mmu.tlb.space)))?;
    let entry = size_of::<Entry>().trailing_zeros();
    a.mov(rdx, ADDRESS)?;
    a.shr(rdx, PAGE_SHIFT - entry)?;
    a.and(edx, ((L1_SLOTS - 1) << entry) as u32)?;
    a.add(rdx, field(offset_of!(Cpu, mmu.tlb.table)))?;
    a.cmp(rcx, qword_ptr(rdx + tag))?;
    a.jne(out)?;
    if kind == Kind::Lock {
        // The sign says that the memory is not write-back; ZF is clear then.
        a.cmp(qword_ptr(rdx + offset_of!(Entry, frame)), 0)?;
        a.js(out)?;
    }
    a.mov(rcx, ADDRESS)?;
    a.and(rcx, !(PAGE_MASK as i32))?;
    a.mov(recent(offset_of!(Recent, page)), rcx)?;
    a.add(rcx, qword_ptr(rdx + offset_of!(Entry, addend)))?;
    a.mov(recent(offset_of!(Recent, host)), rcx)?;
    a.add(ADDRESS, qword_ptr(rdx + offset_of!(Entry, addend)))?;
    a.cmp(ecx, ecx)?;
    a.set_label(&mut out)?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.ret()
}

/// Fields are reached by displacements.
const _: () = assert!(size_of::<Cpu>() < i32::MAX as usize);
