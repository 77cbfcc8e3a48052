//! Effective addresses, register operands and memory operands.

use crate::code::op::Op;
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::mmu::Word;
use crate::state::Seg;

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

    /// Reads, changes and writes `op`'s memory operand; not atomic. It faults as a write does. What `change`
    /// returns beside the new value is returned once the store is done.
    #[inline(always)]
    pub(crate) fn update_operand<T: Word, R>(
        &mut self,
        op: &Op,
        change: impl FnOnce(T) -> (T, R),
    ) -> Result<R, Abort> {
        let lin = self.ea(op, T::SIZE, true)?;
        self.update(self.op_seg(op), lin, change)
    }
}
