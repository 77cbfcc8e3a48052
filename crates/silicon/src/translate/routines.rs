//! Code that all translated blocks of a CPU share: the way in, the way out, looking up pages and indirect targets.

use std::mem::offset_of;

use iced_x86::IcedError;
use iced_x86::code_asm::{
    AsmMemoryOperand, AsmRegister32, AsmRegister64, CodeAssembler, CodeLabel, ax, byte_ptr, dword_ptr, eax,
    ecx, edx, qword_ptr, r12, r13, r14, r14d, r15, rax, rcx, rdi, rdx, rsp,
};

use super::emit::{Kind, instructions};
use super::frame::{Frame, STOP};
use super::layout::Layout;
use super::link::Jump;
use super::registers::{ADDRESS, HELD, VALUE, field, field16, slot};
use super::vector::{self, Live};
use super::{LEAVE_INDIRECT, SLICE};
use crate::cpu::{Cpu, Requests};
use crate::flags::Status;
use crate::hostexec::arena::Arena;
use crate::mmu::tlb::{Entry, Found, L1_DISPLACED, L1_SLOTS, PAGE_MASK, PAGE_SHIFT, Recent};
use crate::state::reg;

/// Addresses of the shared code.
#[derive(Clone, Copy, Debug)]
pub(super) struct Routines {
    /// `extern fn(code in RAX)`, called with GS set; see [`super::run::call`].
    pub(super) enter: u64,
    /// What host code keeps in memory near itself.
    pub(super) frame: Frame,
    /// Jumped to, to leave: [`ADDRESS`] and [`VALUE`] are what [`super::run::call`] returns, RAX holds the flags.
    pub(super) leave: u64,
    /// Jumped to, to leave for the target in [`ADDRESS`]; [`VALUE`] takes the branch back.
    pub(super) no_jump: u64,
    /// To be called when the count is not negative. Returns ZF set if nobody wants anything, but perhaps this CPU itself. Changes flags
    /// alone.
    pub(super) renew: u64,
    /// Likewise, if not even this CPU wants anything.
    pub(super) renew_wholly: u64,
    /// Likewise, for returns to another address than the one on top of the host's stack.
    pub(super) return_missed: u64,
    /// Those that [`Routines::look_up`] gives, by what they are for.
    pages: [[u64; SIZES.len()]; Recent::WAYS.len()],
    /// Those that [`Routines::find`] gives.
    finds: [[u64; SIZES.len()]; 2],
    /// Those that [`Routines::raise`] gives.
    raise: [u64; Live::SOME.len()],
}

/// Sizes in bytes, of accesses and of groups of them.
const SIZES: [usize; 10] = [1, 2, 4, 8, 10, 16, 32, 64, 128, 256];

impl Routines {
    /// Makes them, `wide` for a host that has AVX-512; `None` without room.
    pub(super) fn new(arena: &mut Arena, wide: bool) -> Option<Routines> {
        let frame = Frame::new(arena)?;
        let leave = assemble(arena, |a| leave(a, frame, wide))?;
        let renew = |arena: &mut Arena, bits| assemble_near(arena, |a| renew(a, bits), Some(frame));
        let (renew, renew_wholly) = (renew(arena, !Requests::LOCAL)?, renew(arena, !0)?);
        let no_jump = assemble(arena, |a| no_jump(a, leave))?;
        let indirect = assemble_near(arena, |a| indirect(a, no_jump), Some(frame))?;
        let bottom = assemble(arena, |a| bottom(a, indirect))?;
        let enter = assemble(arena, |a| enter(a, bottom, frame))?;
        let return_missed = assemble(arena, |a| return_missed(a, indirect))?;
        let mut pages = [[0; SIZES.len()]; Recent::WAYS.len()];
        for (kind, routines) in Kind::ALL.into_iter().zip(&mut pages) {
            for (size, routine) in SIZES.into_iter().zip(routines) {
                *routine = assemble(arena, |a| look_up_page(a, kind, size))?;
            }
        }
        let mut finds = [[0; SIZES.len()]; 2];
        for (kind, routines) in [Kind::Load, Kind::Store].into_iter().zip(&mut finds) {
            for (size, routine) in SIZES.into_iter().zip(routines) {
                *routine = assemble(arena, |a| find_page(a, kind, size))?;
            }
        }
        let mut raise = [0; Live::SOME.len()];
        for (live, routine) in Live::SOME.into_iter().zip(&mut raise) {
            *routine = assemble(arena, |a| vector::raise(a, live, wide))?;
        }
        Some(Routines {
            enter,
            frame,
            leave,
            no_jump,
            renew,
            renew_wholly,
            return_missed,
            pages,
            finds,
            raise,
        })
    }

    /// To be called where an access is not to the page accessed last: [`ADDRESS`] holds the linear address,
    /// [`VALUE`] the offset of its [`Recent`] in the [`Cpu`], which is of its page afterwards if pages are noted. Returns ZF set with the
    /// page's addend in [`VALUE`], or ZF clear. Changes nothing else but flags and [`VALUE`].
    pub(super) fn look_up(&self, kind: Kind, size: usize) -> Option<u64> {
        let at = SIZES.iter().position(|&known| known == size)?;
        Some(self.pages[kind as usize][at])
    }

    /// To be called where the page of an access is not among those found: [`ADDRESS`] holds the linear address. Returns ZF set
    /// with the host address there, or ZF clear. Changes nothing else but flags and [`VALUE`]. No locked accesses.
    pub(super) fn find(&self, kind: Kind, size: usize) -> Option<u64> {
        let at = SIZES.iter().position(|&known| known == size)?;
        Some(self.finds.get(kind as usize)?[at])
    }

    /// The least of the sizes that the routines for pages know which is no less than `size`.
    pub(super) fn round_up(size: usize) -> Option<usize> {
        SIZES.into_iter().find(|&known| known >= size)
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
    assemble_near(arena, emit, None)
}

/// Assembles code that uses the frame, if there is one, for what is in it.
fn assemble_near(
    arena: &mut Arena,
    emit: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    frame: Option<Frame>,
) -> Option<u64> {
    let mut a = CodeAssembler::new(64).ok()?;
    emit(&mut a).ok()?;
    let layout = Layout::new(&mut a, arena, frame, usize::MAX).ok()?;
    arena.add(&layout.bytes)
}

/// Bytes of the host's stack for return addresses: two for each call, the guest's and below it the host's own.
pub(super) const RETURNS: i32 = 4096;

/// Loads the guest's registers and goes on at RDI. No return has come from a call yet: what stands for that is `bottom`.
fn enter(a: &mut CodeAssembler, bottom: u64, frame: Frame) -> Result<(), IcedError> {
    for saved in [r12, r13, r14, r15] {
        a.push(saved)?;
    }
    a.mov(r14, bottom)?;
    a.push(0)?;
    a.push(r14)?;
    a.mov(field(offset_of!(Cpu, translator.stack)), rsp)?;
    a.lea(r14, qword_ptr(rsp - RETURNS))?;
    a.mov(field(offset_of!(Cpu, translator.stack_limit)), r14)?;
    a.mov(r15, rdi)?;
    a.movzx(eax, field16(offset_of!(Cpu, state.status)))?;
    a.and(eax, u32::from(Status::MASK))?;
    frame.load(a)?;
    for (number, host) in HELD {
        a.mov(host, slot(number))?;
    }
    a.jmp(r15)
}

/// The guest returns to address 0, and what there is on the stack is no call's: it stays there.
fn bottom(a: &mut CodeAssembler, indirect: u64) -> Result<(), IcedError> {
    a.lea(rsp, qword_ptr(rsp - 8))?;
    a.jmp(indirect)
}

/// Whoever has called in vain is forgotten, for the next one may be whom the guest returns to.
fn return_missed(a: &mut CodeAssembler, indirect: u64) -> Result<(), IcedError> {
    a.cmp(rsp, field(offset_of!(Cpu, translator.stack)))?;
    a.je(indirect)?;
    a.lea(rsp, qword_ptr(rsp + 16))?;
    a.cmp(ADDRESS, qword_ptr(rsp + 8))?;
    a.jne(indirect)?;
    a.ret()
}

/// Stores the guest's registers and returns [`ADDRESS`] in RAX, [`VALUE`] in RDX.
fn leave(a: &mut CodeAssembler, frame: Frame, wide: bool) -> Result<(), IcedError> {
    a.mov(field16(offset_of!(Cpu, state.status)), ax)?;
    vector::store_all(a, wide)?;
    for (number, host) in HELD {
        a.mov(slot(number), host)?;
    }
    frame.store(a)?;
    a.mov(rax, ADDRESS)?;
    a.mov(rdx, VALUE)?;
    a.mov(rsp, field(offset_of!(Cpu, translator.stack)))?;
    a.lea(rsp, qword_ptr(rsp + 16))?;
    for saved in [r15, r14, r13, r12] {
        a.pop(saved)?;
    }
    a.ret()
}

/// Has the count be negative again if there are no requests; ZF says that there are none of `bits`.
fn renew(a: &mut CodeAssembler, bits: u32) -> Result<(), IcedError> {
    let mut asked = a.create_label();
    a.push(r15)?;
    a.mov(r15, field(offset_of!(Cpu, translator.requests)))?;
    a.cmp(dword_ptr(r15), 0)?;
    a.jne(asked)?;
    a.add(field(STOP), SLICE as i32)?;
    a.sub(instructions(), SLICE as i32)?;
    a.set_label(&mut asked)?;
    a.test(dword_ptr(r15), bits)?;
    a.pop(r15)?;
    a.ret()
}

/// The engine has to find out what is at the target in [`ADDRESS`].
fn no_jump(a: &mut CodeAssembler, leave: u64) -> Result<(), IcedError> {
    a.mov(field(offset_of!(Cpu, state.rip)), ADDRESS)?;
    a.mov(ADDRESS, LEAVE_INDIRECT)?;
    a.jmp(leave)
}

/// Has `entry` point to the [`Jump`] for the address in [`ADDRESS`]. Goes to `unknown` if that is for another one, or to `invalid`, with
/// [`ADDRESS`] lost, if it does not hold. Changes flags.
pub(super) fn find_jump(
    a: &mut CodeAssembler,
    (entry, low): (AsmRegister64, AsmRegister32),
    unknown: CodeLabel,
    invalid: CodeLabel,
) -> Result<(), IcedError> {
    a.mov(entry, ADDRESS)?;
    a.shr(entry, Jump::SHIFT)?;
    a.xor(entry, ADDRESS)?;
    a.and(low, (Jump::ENTRIES - 1) as i32)?;
    a.shl(low, size_of::<Jump>().trailing_zeros())?;
    a.add(entry, field(offset_of!(Cpu, translator.jumps)))?;
    a.cmp(ADDRESS, qword_ptr(entry + offset_of!(Jump, lin)))?;
    a.jne(unknown)?;
    a.and(ADDRESS, !(PAGE_MASK as i32))?;
    a.mov(slot(reg::IP_BASE), ADDRESS)?;
    a.mov(ADDRESS, field(offset_of!(Cpu, translator.validity)))?;
    a.cmp(ADDRESS, qword_ptr(entry + offset_of!(Jump, validity)))?;
    a.jne(invalid)
}

/// Where a return goes that no call is known for: asks the cache of [`Jump`]s. [`VALUE`] is kept for whoever has to take the
/// jump back.
fn indirect(a: &mut CodeAssembler, no_jump: u64) -> Result<(), IcedError> {
    let (mut out, mut invalid) = (a.create_label(), a.create_label());
    let of_entry = |offset: usize| qword_ptr(rcx + offset);
    a.push(rcx)?;
    find_jump(a, (rcx, ecx), out, invalid)?;
    a.mov(ADDRESS, of_entry(offset_of!(Jump, code)))?;
    a.pop(rcx)?;
    a.jmp(ADDRESS)?;
    a.set_label(&mut invalid)?;
    a.mov(ADDRESS, of_entry(offset_of!(Jump, lin)))?;
    a.set_label(&mut out)?;
    a.pop(rcx)?;
    a.jmp(no_jump)
}

/// Loads RDX with the entry of the first level of the TLB for the access at [`ADDRESS`], or goes to `out` with ZF clear. Changes RCX.
///
/// The entry of a page that another one has displaced is behind all slots.
fn first_level(a: &mut CodeAssembler, kind: Kind, size: usize, out: CodeLabel) -> Result<(), IcedError> {
    let tag = if kind == Kind::Load { offset_of!(Entry, read) } else { offset_of!(Entry, write) };
    a.lea(rcx, qword_ptr(ADDRESS + (size - 1)))?;
    a.and(rcx, !(PAGE_MASK as i32))?;
    a.or(rcx, field(offset_of!(Cpu, mmu.tlb.space)))?;
    let entry = size_of::<Entry>().trailing_zeros();
    let mut found = a.create_label();
    a.mov(rdx, ADDRESS)?;
    a.shr(rdx, PAGE_SHIFT - entry)?;
    a.and(edx, ((L1_SLOTS - 1) << entry) as u32)?;
    a.add(rdx, field(offset_of!(Cpu, mmu.tlb.table)))?;
    a.cmp(rcx, qword_ptr(rdx + tag))?;
    a.je(found)?;
    a.mov(rdx, ADDRESS)?;
    a.shr(rdx, PAGE_SHIFT - entry)?;
    a.and(edx, ((L1_DISPLACED - 1) << entry) as u32)?;
    a.add(rdx, field(offset_of!(Cpu, mmu.tlb.table)))?;
    a.add(rdx, (L1_SLOTS << entry) as i32)?;
    a.cmp(rcx, qword_ptr(rdx + tag))?;
    a.jne(out)?;
    a.set_label(&mut found)
}

/// Looks for a page in the first level of the TLB, and notes it as the one accessed last.
fn look_up_page(a: &mut CodeAssembler, kind: Kind, size: usize) -> Result<(), IcedError> {
    let recent = |offset: usize| qword_ptr(VALUE + offset).gs();
    let (mut out, mut unnoted) = (a.create_label(), a.create_label());
    a.push(rcx)?;
    a.push(rdx)?;
    first_level(a, kind, size, out)?;
    if kind == Kind::Lock {
        // The sign says that the memory is not write-back; ZF is clear then.
        a.cmp(qword_ptr(rdx + offset_of!(Entry, frame)), 0)?;
        a.js(out)?;
    }
    a.mov(rdx, qword_ptr(rdx + offset_of!(Entry, addend)))?;
    a.cmp(notes(), 0)?;
    a.je(unnoted)?;
    a.mov(rcx, ADDRESS)?;
    a.and(rcx, !(PAGE_MASK as i32))?;
    a.mov(recent(offset_of!(Recent, page)), rcx)?;
    a.mov(recent(offset_of!(Recent, addend)), rdx)?;
    a.set_label(&mut unnoted)?;
    a.mov(VALUE, rdx)?;
    a.cmp(ecx, ecx)?;
    a.set_label(&mut out)?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.ret()
}

/// Whether pages accessed are noted.
pub(super) fn notes() -> AsmMemoryOperand {
    byte_ptr(offset_of!(Cpu, mmu.tlb.notes) as u64).gs()
}

/// Looks for a page in the first level of the TLB, and notes it among those found.
fn find_page(a: &mut CodeAssembler, kind: Kind, size: usize) -> Result<(), IcedError> {
    let column = if kind == Kind::Store { size_of::<Found>() * Found::SLOTS } else { 0 };
    let slot = size_of::<Found>().trailing_zeros();
    let (mut out, mut unnoted) = (a.create_label(), a.create_label());
    a.push(rcx)?;
    a.push(rdx)?;
    first_level(a, kind, size, out)?;
    a.mov(rdx, qword_ptr(rdx + offset_of!(Entry, addend)))?;
    a.cmp(notes(), 0)?;
    a.je(unnoted)?;
    a.mov(VALUE, ADDRESS)?;
    a.shr(VALUE, PAGE_SHIFT - slot)?;
    a.and(r14d, ((Found::SLOTS - 1) << slot) as u32)?;
    a.add(VALUE, field(offset_of!(Cpu, mmu.tlb.found)))?;
    a.mov(rcx, ADDRESS)?;
    a.and(rcx, !(PAGE_MASK as i32))?;
    a.mov(qword_ptr(VALUE + column + offset_of!(Found, page)), rcx)?;
    a.add(rcx, rdx)?;
    a.mov(qword_ptr(VALUE + column + offset_of!(Found, host)), rcx)?;
    a.set_label(&mut unnoted)?;
    a.add(ADDRESS, rdx)?;
    a.cmp(ecx, ecx)?;
    a.set_label(&mut out)?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.ret()
}

/// Fields are reached by displacements.
const _: () = assert!(size_of::<Cpu>() < i32::MAX as usize);

#[cfg(test)]
mod tests {
    use super::*;

    /// On hosts without AVX-512 nothing was translated, and nobody was told.
    #[test]
    fn hosts_without_avx512_translate_too() {
        for wide in [false, true] {
            let mut arena = Arena::new(1 << 20).unwrap();
            assert!(Routines::new(&mut arena, wide).is_some(), "{wide}");
        }
    }
}
