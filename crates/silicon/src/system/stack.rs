//! The stack of a far control transfer: pushed to and popped from before anything else changes, so that a
//! fault on it leaves the machine as it was.

use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::state::{CodeSize, CpuState, Seg, Segment, reg};
use crate::system::segment::{code, is_null, kind, rpl};

/// A stack segment and pointer in use by an unfinished control transfer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    /// The stack segment; unused in 64-bit mode.
    pub(crate) segment: Segment,
    /// The stack pointer, within `mask`.
    pub(crate) pointer: u64,
    /// How far the pointer reaches: 16, 32 or 64 bits.
    mask: u64,
    /// Error code of a #SS on this stack.
    error: u32,
    /// The stack is that of an inner privilege level.
    inner: bool,
}

impl Stack {
    /// The stack in use.
    pub(crate) fn current(state: &CpuState) -> Stack {
        let mask = match (state.code_size, state.stack32) {
            (CodeSize::Bits64, _) => u64::MAX,
            (_, true) => 0xffff_ffff,
            (_, false) => 0xffff,
        };
        let segment = state.segs[Seg::Ss as usize];
        let pointer = state.regs[usize::from(reg::RSP)] & mask;
        Stack { segment, pointer, mask, error: 0, inner: false }
    }

    /// The stack in use, addressed with 64 bits: what IA-32e mode pushes events to.
    pub(crate) fn current64(state: &CpuState) -> Stack {
        Stack { pointer: state.regs[usize::from(reg::RSP)], mask: u64::MAX, ..Stack::current(state) }
    }

    /// A stack at 64-bit address `pointer`, of level `cpl`, whose selector is null.
    pub(crate) fn inner64(pointer: u64, cpl: u8) -> Stack {
        let segment = Segment::null(u16::from(cpl), cpl);
        Stack { segment, pointer, mask: u64::MAX, error: 0, inner: cpl < 3 }
    }

    /// A stack of an inner privilege level in `segment`.
    pub(crate) fn inner(segment: Segment, pointer: u64) -> Stack {
        let mask = if segment.big() { 0xffff_ffff } else { 0xffff };
        Stack { segment, pointer: pointer & mask, mask, error: code(segment.selector), inner: true }
    }

    /// This stack with the pointer at `pointer`.
    pub(crate) fn at(self, pointer: u64) -> Stack {
        Stack { pointer: pointer & self.mask, ..self }
    }

    /// Linear address of `size` bytes at `pointer`, if the stack holds them.
    fn linear(&self, cpu: &mut Cpu, pointer: u64, size: u64, write: bool) -> Result<u64, Abort> {
        if self.mask == u64::MAX {
            let last = pointer.wrapping_add(size - 1);
            if cpu.state.canonical(pointer) && cpu.state.canonical(last) {
                return Ok(pointer);
            }
        } else if (cpu.state.real_mode() || self.segment.permits(write)) && self.segment.covers(pointer, size)
        {
            return Ok(self.segment.base.wrapping_add(pointer) & 0xffff_ffff);
        }
        Err(cpu.raise(Exception::ss(self.error)))
    }

    /// Checks that `count` pushes of `size` bytes stay within the segment.
    pub(crate) fn reserve(&self, cpu: &mut Cpu, count: u64, size: u64) -> Result<(), Abort> {
        for n in 1..=count {
            self.linear(cpu, self.pointer.wrapping_sub(n * size) & self.mask, size, true)?;
        }
        Ok(())
    }

    /// Pushes the low `size` bytes (2, 4 or 8) of `value`.
    pub(crate) fn push(&mut self, cpu: &mut Cpu, size: u64, value: u64) -> Result<(), Abort> {
        let pointer = self.pointer.wrapping_sub(size) & self.mask;
        let lin = self.linear(cpu, pointer, size, true)?;
        match (self.inner, size) {
            (true, 2) => cpu.system_store(lin, value as u16),
            (true, 4) => cpu.system_store(lin, value as u32),
            (true, _) => cpu.system_store(lin, value),
            (false, 2) => cpu.store(Seg::Ss, lin, value as u16),
            (false, 4) => cpu.store(Seg::Ss, lin, value as u32),
            (false, _) => cpu.store(Seg::Ss, lin, value),
        }?;
        self.pointer = pointer;
        Ok(())
    }

    /// Reads `size` bytes `depth` bytes above the pointer.
    pub(crate) fn peek(&self, cpu: &mut Cpu, depth: u64, size: u64) -> Result<u64, Abort> {
        let lin = self.linear(cpu, self.pointer.wrapping_add(depth) & self.mask, size, false)?;
        Ok(match size {
            2 => u64::from(cpu.load::<u16>(Seg::Ss, lin)?),
            4 => u64::from(cpu.load::<u32>(Seg::Ss, lin)?),
            _ => cpu.load::<u64>(Seg::Ss, lin)?,
        })
    }

    /// Pops `size` bytes.
    pub(crate) fn pop(&mut self, cpu: &mut Cpu, size: u64) -> Result<u64, Abort> {
        let value = self.peek(cpu, 0, size)?;
        self.skip(size);
        Ok(value)
    }

    /// Drops `bytes` from the top.
    pub(crate) fn skip(&mut self, bytes: u64) {
        self.pointer = self.pointer.wrapping_add(bytes) & self.mask;
    }

    /// Makes this the stack in use: the pointer only. Bits of RSP beyond the stack's width stay.
    pub(crate) fn commit_pointer(&self, cpu: &mut Cpu) {
        let rsp = &mut cpu.state.regs[usize::from(reg::RSP)];
        *rsp = match self.mask {
            0xffff => (*rsp & !0xffff) | self.pointer,
            _ => self.pointer,
        };
    }

    /// Makes this the stack in use: segment and pointer.
    pub(crate) fn commit(&self, cpu: &mut Cpu) {
        self.commit_pointer(cpu);
        cpu.set_segment(Seg::Ss, self.segment);
    }
}

impl Cpu {
    /// The stack that the current TSS holds for inner level `cpl`, checked (SDM vol. 2, CALL,
    /// MORE-PRIVILEGE, and INT n, INTER-PRIVILEGE-LEVEL-INTERRUPT).
    pub(crate) fn tss_stack(&mut self, cpl: u8) -> Result<Stack, Abort> {
        let tss = self.state.tr;
        let fault = Exception::ts(code(tss.selector));
        if self.state.long_mode() {
            return Ok(Stack::inner64(self.tss_rsp(4 + 8 * u64::from(cpl))?, cpl));
        }
        let wide = tss.kind() & 8 != 0;
        let (at, size) = if wide { (4 + 8 * u64::from(cpl), 6) } else { (2 + 4 * u64::from(cpl), 4) };
        if at + size - 1 > u64::from(tss.limit) {
            return Err(self.raise(fault));
        }
        let at = self.system_linear(tss.base, at);
        let pointer = if wide {
            u64::from(self.system_load::<u32>(at)?)
        } else {
            u64::from(self.system_load::<u16>(at)?)
        };
        let selector: u16 = self.system_load(at.wrapping_add(if wide { 4 } else { 2 }))?;
        let segment = self.check_inner_ss(selector, cpl)?;
        Ok(Stack::inner(segment, pointer))
    }

    /// A stack pointer of the 64-bit TSS: RSP0 to RSP2 at 4, IST1 to IST7 at 36 (SDM vol. 3A, figure 7-11).
    pub(crate) fn tss_rsp(&mut self, offset: u64) -> Result<u64, Abort> {
        let tss = self.state.tr;
        if offset + 7 > u64::from(tss.limit) {
            return Err(self.raise(Exception::ts(code(tss.selector))));
        }
        self.system_load(self.system_linear(tss.base, offset))
    }

    fn check_inner_ss(&mut self, selector: u16, cpl: u8) -> Result<Segment, Abort> {
        let fault = Exception::ts(code(selector));
        if is_null(selector) {
            return Err(self.raise(Exception::ts(0)));
        }
        let descriptor = self.descriptor_or(selector, fault)?;
        if rpl(selector) != cpl || descriptor.dpl() != cpl || !descriptor.is_writable_data() {
            return Err(self.raise(fault));
        }
        if !descriptor.present() {
            return Err(self.raise(Exception::ss(code(selector))));
        }
        self.touch_descriptor(&descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Whether the current TSS is a 32-bit (or 64-bit) one.
    pub(crate) fn tss_is_wide(&self) -> bool {
        matches!(self.state.tr.kind(), kind::TSS | kind::TSS_BUSY)
    }
}
