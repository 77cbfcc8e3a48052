//! Effective addresses, register operands and memory operands.
#![expect(unsafe_code, reason = "memory operands are reached by the host pointers that the TLB gives")]

use crate::code::op::{Flow, Op};
use crate::code::thread::next;
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::flags::Status;
use crate::mmu::Word;
use crate::mmu::host::Absent;
use crate::state::{Seg, reg};

impl Cpu {
    /// Linear address of `op`'s memory operand, `size` bytes long. Checks the segment where there is something
    /// to check (not in 64-bit mode); paging and canonical checks come with the access.
    #[inline(always)]
    pub(crate) fn ea(&mut self, op: &Op, size: usize, write: bool) -> Result<u64, Abort> {
        let offset = self.offset(op);
        self.ea_at(op, offset, size, write)
    }

    /// As [`Cpu::ea`], for an instruction that forms the offset itself.
    #[inline(always)]
    pub(crate) fn ea_at(&mut self, op: &Op, offset: u64, size: usize, write: bool) -> Result<u64, Abort> {
        if op.has(Op::SLOW_EA) {
            return self.ea_slow(op, offset & op.addr_mask(), size, write);
        }
        Ok(offset.wrapping_add(self.state.ea_base[usize::from(op.seg & 7)]))
    }

    /// Offset part of `op`'s memory operand, not yet truncated to the address size.
    #[inline(always)]
    pub(crate) fn offset(&self, op: &Op) -> u64 {
        let base = self.state.regs[usize::from(op.base & 31)];
        let index = self.state.regs[usize::from(op.index & 31)];
        base.wrapping_add(index << (op.scale & 3)).wrapping_add(op.disp as u64)
    }

    /// Segment of `op`'s memory operand.
    #[inline(always)]
    pub(crate) fn op_seg(&self, op: &Op) -> Seg {
        Seg::from_index(op.seg)
    }

    #[cold]
    fn ea_slow(&mut self, op: &Op, offset: u64, size: usize, write: bool) -> Result<u64, Abort> {
        self.linearize(Seg::from_index(op.seg), offset, size, write)
    }

    /// Reads a general register; for bytes, bit 4 of `r` selects AH, CH, DH, BH.
    #[inline(always)]
    pub(crate) fn get<T: Word>(&self, r: u8) -> T {
        let value = self.state.regs[usize::from(r & 15)];
        T::from_u64(if T::SIZE == 1 { value >> ((r & 16) >> 1) } else { value })
    }

    /// Writes a general register: 32-bit results are zero-extended, 8 and 16-bit results merged.
    #[inline(always)]
    pub(crate) fn set<T: Word>(&mut self, r: u8, value: T) {
        let slot = &mut self.state.regs[usize::from(r & 15)];
        match T::SIZE {
            1 => {
                let shift = (r & 16) >> 1;
                *slot = (*slot & !(0xff << shift)) | (value.to_u64() << shift);
            }
            2 => *slot = (*slot & !0xffff) | value.to_u64(),
            _ => *slot = value.to_u64(),
        }
    }

    /// Loads `op`'s memory operand.
    #[inline(always)]
    pub(crate) fn load_operand<T: Word>(&mut self, op: &Op) -> Result<T, Abort> {
        let lin = self.ea(op, T::SIZE, false)?;
        self.load(self.op_seg(op), lin)
    }

    /// Stores to `op`'s memory operand.
    #[inline(always)]
    pub(crate) fn store_operand<T: Word>(&mut self, op: &Op, value: T) -> Result<(), Abort> {
        let lin = self.ea(op, T::SIZE, true)?;
        self.store(self.op_seg(op), lin, value)
    }
}

/// How a handler forms its operand's linear address.
pub(crate) trait Address {
    /// The address, if it takes no segment check and no truncation.
    fn linear(cpu: &Cpu, op: &Op) -> Option<u64>;
}

/// Any form of address.
pub(crate) struct AnyAddress;

impl Address for AnyAddress {
    #[inline(always)]
    fn linear(cpu: &Cpu, op: &Op) -> Option<u64> {
        if op.has(Op::SLOW_EA) {
            return None;
        }
        Some(cpu.offset(op).wrapping_add(cpu.state.ea_base[usize::from(op.seg & 7)]))
    }
}

/// Base and displacement in a flat segment of 64-bit mode: the commonest form.
pub(crate) struct BaseAddress;

impl BaseAddress {
    /// Whether `op`'s address has this form.
    pub(crate) fn serves(op: &Op) -> bool {
        !op.has(Op::SLOW_EA) && op.index == reg::ZERO && op.seg <= Seg::Ds as u8
    }
}

impl Address for BaseAddress {
    #[inline(always)]
    fn linear(cpu: &Cpu, op: &Op) -> Option<u64> {
        Some(cpu.state.regs[usize::from(op.base & 31)].wrapping_add(op.disp as u64))
    }
}

/// Ways to memory operands for threaded handlers. What the first-level TLB knows is done inline; all else goes
/// on in a function of its own, called in tail position, so that the handlers need no stack frame.
impl Cpu {
    /// Loads the word at `lin` if that needs no more than the TLB and the host has the memory.
    #[inline(always)]
    pub(crate) fn quick_load<T: Word>(&self, lin: u64) -> Option<T> {
        let host = self.mmu.tlb.read_hit(lin, T::SIZE)? as *const T;
        // SAFETY: a TLB hit leads to `T::SIZE` bytes of guest memory that may be read.
        unsafe { T::read(host) }.ok()
    }

    /// Stores the word at `lin` if that needs no more than the TLB and the host has the memory; whether it has.
    #[inline(always)]
    pub(crate) fn quick_store<T: Word>(&mut self, lin: u64, value: T) -> bool {
        let Some(host) = self.mmu.tlb.write_hit(lin, T::SIZE) else { return false };
        // SAFETY: a TLB hit leads to `T::SIZE` bytes of guest memory that may be written.
        unsafe { T::write(host as *mut T, value) }.is_ok()
    }
}

/// A handler that loads its memory operand, does something that cannot fail with it, and goes on.
#[inline(always)]
pub(crate) fn with_loaded<A: Address, T: Word>(
    cpu: &mut Cpu,
    op: &Op,
    then: impl FnOnce(&mut Cpu, &Op, T),
) -> Result<Flow, Abort> {
    let Some(value) = A::linear(cpu, op).and_then(|lin| cpu.quick_load::<T>(lin)) else {
        return with_loaded_slow(cpu, op, then);
    };
    then(cpu, op, value);
    next(cpu, op)
}

#[cold]
#[inline(never)]
fn with_loaded_slow<T: Word>(
    cpu: &mut Cpu,
    op: &Op,
    then: impl FnOnce(&mut Cpu, &Op, T),
) -> Result<Flow, Abort> {
    cpu.at(op);
    let value = cpu.load_operand(op)?;
    then(cpu, op, value);
    next(cpu, op)
}

/// A handler that stores `value` to its memory operand and goes on.
#[inline(always)]
pub(crate) fn store_and_go<A: Address, T: Word>(cpu: &mut Cpu, op: &Op, value: T) -> Result<Flow, Abort> {
    if let Some(lin) = A::linear(cpu, op)
        && cpu.quick_store(lin, value)
    {
        return next(cpu, op);
    }
    store_and_go_slow(cpu, op, value)
}

#[cold]
#[inline(never)]
fn store_and_go_slow<T: Word>(cpu: &mut Cpu, op: &Op, value: T) -> Result<Flow, Abort> {
    cpu.at(op);
    cpu.store_operand(op, value)?;
    next(cpu, op)
}

/// A handler that changes its memory operand, not atomically, sets the flags and goes on.
#[inline(always)]
pub(crate) fn with_updated<A: Address, T: Word>(
    cpu: &mut Cpu,
    op: &Op,
    change: impl FnOnce(&Cpu, &Op, T) -> (T, Status),
) -> Result<Flow, Abort> {
    let Some(host) = A::linear(cpu, op).and_then(|lin| cpu.mmu.tlb.write_hit(lin, T::SIZE)) else {
        return with_updated_slow(cpu, op, change);
    };
    let host = host as *mut T;
    // SAFETY: a TLB hit for a store leads to `T::SIZE` bytes of guest memory that may be read and written.
    let Ok(old) = (unsafe { T::read(host) }) else { return absent(cpu, op) };
    let (value, status) = change(cpu, op, old);
    // SAFETY: as above.
    if unsafe { T::write(host, value) }.is_err() {
        return absent(cpu, op);
    }
    cpu.state.status = status;
    next(cpu, op)
}

/// The access that `op` has just made found no host memory.
#[cold]
#[inline(never)]
fn absent(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    Err(cpu.absent(Absent))
}

#[cold]
#[inline(never)]
fn with_updated_slow<T: Word>(
    cpu: &mut Cpu,
    op: &Op,
    change: impl FnOnce(&Cpu, &Op, T) -> (T, Status),
) -> Result<Flow, Abort> {
    cpu.at(op);
    let lin = cpu.ea(op, T::SIZE, true)?;
    let seg = cpu.op_seg(op);
    let old = T::from_u64(cpu.load_for_write(seg, lin, T::SIZE)?);
    let (value, status) = change(cpu, op, old);
    cpu.store(seg, lin, value)?;
    cpu.state.status = status;
    next(cpu, op)
}
