//! MOVS, STOS, LODS, SCAS, CMPS, alone and repeated.
//!
//! A repeated instruction works through guest memory in runs: as many elements as lie in one page of each
//! operand, reached by host pointer. What a run leaves behind is what the same number of single elements would
//! have left, overlapping operands included. Memory that no pointer leads to (MMIO, code, an element across two
//! pages) is done by the element. Registers are up to date after each run, so a fault or an interrupt finds the
//! instruction at the element where it has to go on (SDM vol. 2, REP).
#![expect(unsafe_code, reason = "runs of elements are moved through host pointers")]

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::code::lower::{LowerCtx, op_base, seg_index, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::{Cpu, Pending};
use crate::exception::Abort;
use crate::exec::alu::{Arithmetic, compare};
use crate::flags::{Rflags, Status};
use crate::mmu::Word;
use crate::mmu::host::Absent;
use crate::state::{CodeSize, Seg, reg};

/// Bytes in a page.
const PAGE: u64 = 4096;
/// DR7 bits that enable breakpoints.
const DR7_ENABLES: u64 = 0xff;

/// What one go at a string instruction has done.
pub(super) struct Progress {
    /// Elements done.
    done: u64,
    /// The condition of REPE or REPNE ends the repetition.
    stop: bool,
    /// Flags after the last element, for the instructions that compare.
    status: Option<Status>,
}

impl Progress {
    /// `done` elements, nothing compared.
    pub(super) fn of(done: u64) -> Progress {
        Progress { done, stop: false, status: None }
    }
}

/// Elements that a host pointer reaches.
#[derive(Clone, Copy)]
struct Run {
    /// The first element.
    host: *mut u8,
    /// How many, in the direction of travel.
    elements: u64,
}

impl Cpu {
    /// Runs a string instruction, repeated if its prefix says so. `go` does between one and the given number
    /// of elements and moves RSI and RDI. `cleared` are the registers whose upper half a repetition with
    /// 32-bit addresses clears even if no element is done, which depends on the instruction's microcode.
    #[inline(always)]
    pub(super) fn repeat(
        &mut self,
        op: &Op,
        cleared: &[u8],
        mut go: impl FnMut(&mut Cpu, &Op, u64) -> Result<Progress, Abort>,
    ) -> Result<Flow, Abort> {
        if !op.has(Op::REP) && !op.has(Op::REPNE) {
            let progress = go(self, op, 1)?;
            self.state.status = progress.status.unwrap_or(self.state.status);
            return Ok(Flow::Next);
        }
        let mask = op.addr_mask();
        let mut count = self.state.regs[usize::from(reg::RCX)] & mask;
        if mask == 0xffff_ffff {
            for &register in cleared {
                self.state.regs[usize::from(register & 15)] &= mask;
            }
        }
        // A debugger sees every iteration.
        let watched = self.state.flag(Rflags::TF) || self.state.dr7 & DR7_ENABLES != 0;
        while count != 0 {
            let progress = go(self, op, if watched { 1 } else { count })?;
            count -= progress.done;
            self.set_masked(reg::RCX, count, mask);
            self.commit_bus();
            let over = count == 0 || progress.stop;
            if over || watched {
                // A fault in between finds the flags of before the instruction.
                self.state.status = progress.status.unwrap_or(self.state.status);
            }
            if over {
                break;
            }
            if watched {
                self.state.rip = self.ip_of(op);
                return Ok(Flow::End);
            }
            if self.requests.any() {
                // An interrupt between iterations pushes RF set (SDM vol. 3B, 18.3.1.1).
                self.state.rflags_system |= Rflags::RF.bits();
                return Err(self.retry());
            }
        }
        Ok(Flow::Next)
    }

    /// Writes a count or index register at the address size: 16 bits are merged, 32 bits zero-extended.
    #[inline(always)]
    fn set_masked(&mut self, register: u8, value: u64, mask: u64) {
        let slot = &mut self.state.regs[usize::from(register & 15)];
        *slot = if mask == 0xffff { (*slot & !mask) | (value & mask) } else { value & mask };
    }

    /// Offset in RSI or RDI, at the address size.
    #[inline(always)]
    pub(super) fn string_offset(&self, register: u8, op: &Op) -> u64 {
        self.state.regs[usize::from(register & 15)] & op.addr_mask()
    }

    /// Moves RSI or RDI past `elements` elements in the direction of travel.
    #[inline(always)]
    pub(super) fn step_index<T: Word>(&mut self, register: u8, op: &Op, elements: u64) {
        let bytes = elements * T::SIZE as u64;
        let old = self.state.regs[usize::from(register & 15)];
        let new = if self.downward() { old.wrapping_sub(bytes) } else { old.wrapping_add(bytes) };
        self.set_masked(register, new, op.addr_mask());
    }

    /// RFLAGS.DF.
    #[inline(always)]
    fn downward(&self) -> bool {
        self.state.flag(Rflags::DF)
    }

    /// Linear address of an operand at `offset`.
    #[inline(always)]
    pub(super) fn string_linear(
        &mut self,
        seg: Seg,
        offset: u64,
        size: usize,
        write: bool,
    ) -> Result<u64, Abort> {
        if self.state.code_size == CodeSize::Bits64 {
            return Ok(offset.wrapping_add(self.state.ea_base[seg as usize]));
        }
        self.linearize(seg, offset, size, write)
    }

    /// The run of at most `most` elements from `offset` on. `None` if the first has to be done by itself.
    /// Faults as the access to the first would.
    fn run_at<T: Word>(
        &mut self,
        op: &Op,
        seg: Seg,
        offset: u64,
        most: u64,
        write: bool,
    ) -> Result<Option<Run>, Abort> {
        let size = T::SIZE as u64;
        let lin = self.string_linear(seg, offset, T::SIZE, write)?;
        let down = self.downward();
        let in_page = lin & (PAGE - 1);
        let in_page = if down { in_page / size + 1 } else { (PAGE - in_page) / size };
        let before_wrap = if down { offset } else { op.addr_mask() - offset } / size;
        let mut elements = most.min(in_page).min(before_wrap.saturating_add(1));
        let Some(host) = self.host_pointer(seg, lin, T::SIZE, write)? else { return Ok(None) };
        if self.state.code_size != CodeSize::Bits64 && elements > 1 {
            let lowest = if down { offset - (elements - 1) * size } else { offset };
            if self.linearize(seg, lowest, (elements * size) as usize, write).is_err() {
                // The segment ends within the run: up to there by the element.
                self.pending = Pending::None;
                elements = 1;
            }
        }
        Ok((elements != 0).then_some(Run { host, elements }))
    }

    /// After a run: if the host had no memory for its first element, the instruction cannot go on.
    #[inline(always)]
    fn some_done(&mut self, done: u64) -> Result<(), Abort> {
        if done == 0 { Err(self.absent(Absent)) } else { Ok(()) }
    }
}

/// Element `i` of a run.
#[inline(always)]
fn element<T: Word>(host: *mut u8, i: u64, down: bool) -> *mut T {
    let bytes = (i as usize) * T::SIZE;
    if down { host.wrapping_sub(bytes) } else { host.wrapping_add(bytes) }.cast()
}

/// Copies `n` elements as one after the other would be copied; how many are known to be copied. It is less than `n` if
/// host memory is absent.
fn copy_run<T: Word>(from: *mut u8, to: *mut u8, n: u64, down: bool) -> u64 {
    let len = n as usize * T::SIZE;
    let distance = (to as usize).wrapping_sub(from as usize);
    // Where the elements to be read lie behind the ones being written, the copies feed on each other.
    let feeds = if down { distance.wrapping_neg() } else { distance };
    if !down && (feeds == 0 || feeds >= len) {
        // SAFETY: `run_at` says that `n` elements from each pointer on are guest memory.
        n - unsafe { T::copy_up(from, to, n as usize) } as u64
    } else if down && feeds >= len && distance >= len {
        // They do not overlap: the order does not matter, and what was copied is copied again if the rest is absent.
        let back = (n as usize - 1) * T::SIZE;
        // SAFETY: as above, in the direction of travel.
        let left = unsafe { T::copy_up(from.wrapping_sub(back), to.wrapping_sub(back), n as usize) };
        if left == 0 { n } else { 0 }
    } else if !down && feeds >= T::SIZE {
        // The result repeats the bytes between the two pointers.
        // SAFETY: as above; the lengths make source and destination disjoint.
        let mut left = unsafe { u8::copy_up(from, to, feeds) };
        let mut filled = feeds - left;
        while filled < len && left == 0 {
            let more = filled.min(len - filled);
            // SAFETY: as above.
            left = unsafe { u8::copy_up(to, to.add(filled), more) };
            filled += more - left;
        }
        (filled / T::SIZE) as u64
    } else {
        let copied = (0..n).take_while(|&i| {
            // SAFETY: as above.
            unsafe { T::read(element(from, i, down)).and_then(|v| T::write(element(to, i, down), v)) }.is_ok()
        });
        copied.count() as u64
    }
}

/// Stores `value` in `n` elements; how many are known to be stored, as for [`copy_run`].
fn fill_run<T: Word>(to: *mut u8, value: T, n: u64, down: bool) -> u64 {
    let lowest = if down { to.wrapping_sub((n as usize - 1) * T::SIZE) } else { to };
    // SAFETY: `run_at` says that these elements are guest memory.
    let left = unsafe { T::fill_up(lowest, value, n as usize) } as u64;
    match down {
        true if left != 0 => 0,
        _ => n - left,
    }
}

fn movs<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.repeat(op, &[reg::RCX, reg::RSI, reg::RDI], movs_go::<T>)
}

fn movs_go<T: Word>(cpu: &mut Cpu, op: &Op, most: u64) -> Result<Progress, Abort> {
    let (seg, from) = (cpu.op_seg(op), cpu.string_offset(reg::RSI, op));
    let to = cpu.string_offset(reg::RDI, op);
    let mut done = 1;
    if most > 1
        && let Some(source) = cpu.run_at::<T>(op, seg, from, most, false)?
        && let Some(dest) = cpu.run_at::<T>(op, Seg::Es, to, source.elements, true)?
    {
        done = copy_run::<T>(source.host, dest.host, dest.elements, cpu.downward());
        cpu.some_done(done)?;
    } else {
        let lin = cpu.string_linear(seg, from, T::SIZE, false)?;
        let value: T = cpu.load(seg, lin)?;
        let lin = cpu.string_linear(Seg::Es, to, T::SIZE, true)?;
        cpu.store(Seg::Es, lin, value)?;
    }
    cpu.step_index::<T>(reg::RSI, op, done);
    cpu.step_index::<T>(reg::RDI, op, done);
    Ok(Progress::of(done))
}

fn stos<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.repeat(op, &[reg::RCX, reg::RDI], stos_go::<T>)
}

fn stos_go<T: Word>(cpu: &mut Cpu, op: &Op, most: u64) -> Result<Progress, Abort> {
    let value: T = cpu.get(reg::RAX);
    let to = cpu.string_offset(reg::RDI, op);
    let mut done = 1;
    if most > 1
        && let Some(dest) = cpu.run_at::<T>(op, Seg::Es, to, most, true)?
    {
        done = fill_run(dest.host, value, dest.elements, cpu.downward());
        cpu.some_done(done)?;
    } else {
        let lin = cpu.string_linear(Seg::Es, to, T::SIZE, true)?;
        cpu.store(Seg::Es, lin, value)?;
    }
    cpu.step_index::<T>(reg::RDI, op, done);
    Ok(Progress::of(done))
}

/// LODS. Repeating it makes little sense and gets no fast way.
fn lods<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.repeat(op, &[], |cpu, op, _| {
        let (seg, from) = (cpu.op_seg(op), cpu.string_offset(reg::RSI, op));
        let lin = cpu.string_linear(seg, from, T::SIZE, false)?;
        let value: T = cpu.load(seg, lin)?;
        cpu.set(reg::RAX, value);
        cpu.step_index::<T>(reg::RSI, op, 1);
        Ok(Progress::of(1))
    })
}

/// Whether a comparison with this outcome ends the repetition.
#[inline(always)]
fn stops(op: &Op, equal: bool) -> bool {
    (op.has(Op::REP) && !equal) || (op.has(Op::REPNE) && equal)
}

fn scas<T: Arithmetic>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.repeat(op, &[], scas_go::<T>)
}

fn scas_go<T: Arithmetic>(cpu: &mut Cpu, op: &Op, most: u64) -> Result<Progress, Abort> {
    let wanted: T = cpu.get(reg::RAX);
    let at = cpu.string_offset(reg::RDI, op);
    let (mut done, mut last) = (0, wanted);
    if most > 1
        && let Some(run) = cpu.run_at::<T>(op, Seg::Es, at, most, false)?
    {
        let down = cpu.downward();
        while done < run.elements {
            // SAFETY: `run_at` says that this element is guest memory.
            let Ok(found) = (unsafe { T::read(element(run.host, done, down)) }) else { break };
            last = found;
            done += 1;
            if stops(op, last == wanted) {
                break;
            }
        }
        cpu.some_done(done)?;
    } else {
        let lin = cpu.string_linear(Seg::Es, at, T::SIZE, false)?;
        last = cpu.load(Seg::Es, lin)?;
        done = 1;
    }
    cpu.step_index::<T>(reg::RDI, op, done);
    Ok(Progress { done, stop: stops(op, last == wanted), status: Some(compare(wanted, last)) })
}

/// CMPS reads the operand at RDI first, as the host's silicon does.
fn cmps<T: Arithmetic>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.repeat(op, &[reg::RCX], cmps_go::<T>)
}

fn cmps_go<T: Arithmetic>(cpu: &mut Cpu, op: &Op, most: u64) -> Result<Progress, Abort> {
    let (seg, left_at) = (cpu.op_seg(op), cpu.string_offset(reg::RSI, op));
    let right_at = cpu.string_offset(reg::RDI, op);
    let (mut done, mut left, mut right) = (0, T::default(), T::default());
    if most > 1
        && let Some(rights) = cpu.run_at::<T>(op, Seg::Es, right_at, most, false)?
        && let Some(lefts) = cpu.run_at::<T>(op, seg, left_at, rights.elements, false)?
    {
        let down = cpu.downward();
        while done < lefts.elements {
            // SAFETY: `run_at` says that these elements are guest memory.
            let found = unsafe {
                (T::read(element(lefts.host, done, down)), T::read(element(rights.host, done, down)))
            };
            let (Ok(a), Ok(b)) = found else { break };
            (left, right) = (a, b);
            done += 1;
            if stops(op, left == right) {
                break;
            }
        }
        cpu.some_done(done)?;
    } else {
        let lin = cpu.string_linear(Seg::Es, right_at, T::SIZE, false)?;
        right = cpu.load(Seg::Es, lin)?;
        let lin = cpu.string_linear(seg, left_at, T::SIZE, false)?;
        left = cpu.load(seg, lin)?;
        done = 1;
    }
    cpu.step_index::<T>(reg::RSI, op, done);
    cpu.step_index::<T>(reg::RDI, op, done);
    Ok(Progress { done, stop: stops(op, left == right), status: Some(compare(left, right)) })
}

/// `op_base` for a string instruction: the source's segment and the address size come from the operands.
pub(super) fn string_op(ins: &Instruction, ctx: &LowerCtx) -> Op {
    let mut op = op_base(ins, ctx, undefined);
    op.seg = seg_index(ins.memory_segment());
    if ctx.code_size == CodeSize::Bits64 && op.seg < Seg::Fs as u8 {
        // 64-bit mode ignores the other overrides, also in the choice between #SS and #GP.
        op.seg = Seg::Ds as u8;
    }
    for kind in ins.op_kinds() {
        match kind {
            OpKind::MemorySegSI | OpKind::MemoryESDI => op.flags |= Op::ADDR16,
            OpKind::MemorySegESI | OpKind::MemoryESEDI => op.flags |= Op::ADDR32,
            _ => {}
        }
    }
    op
}

/// Lowers this file's instructions.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    // MOVSD and CMPSD are also the names of SSE2 instructions.
    if !ins.is_string_instruction() {
        return None;
    }
    let handler: Handler = match ins.mnemonic() {
        Mnemonic::Movsb => movs::<u8>,
        Mnemonic::Movsw => movs::<u16>,
        Mnemonic::Movsd => movs::<u32>,
        Mnemonic::Movsq => movs::<u64>,
        Mnemonic::Stosb => stos::<u8>,
        Mnemonic::Stosw => stos::<u16>,
        Mnemonic::Stosd => stos::<u32>,
        Mnemonic::Stosq => stos::<u64>,
        Mnemonic::Lodsb => lods::<u8>,
        Mnemonic::Lodsw => lods::<u16>,
        Mnemonic::Lodsd => lods::<u32>,
        Mnemonic::Lodsq => lods::<u64>,
        Mnemonic::Scasb => scas::<u8>,
        Mnemonic::Scasw => scas::<u16>,
        Mnemonic::Scasd => scas::<u32>,
        Mnemonic::Scasq => scas::<u64>,
        Mnemonic::Cmpsb => cmps::<u8>,
        Mnemonic::Cmpsw => cmps::<u16>,
        Mnemonic::Cmpsd => cmps::<u32>,
        Mnemonic::Cmpsq => cmps::<u64>,
        _ => return None,
    };
    let op = string_op(ins, ctx);
    op.handler.set(handler);
    Some(op)
}

#[cfg(test)]
mod tests {
    use crate::cpu::Requests;
    use crate::exception::Exception;
    use crate::exec::testing::{CODE, DATA, Guest, PF_WRITE, UNMAPPED};
    use crate::flags::Rflags;
    use crate::state::{CodeSize, reg};
    use crate::vmx::Exit;

    fn guest(rsi: u64, rdi: u64, rcx: u64) -> Guest {
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.set(reg::RSI, rsi).set(reg::RDI, rdi).set(reg::RCX, rcx);
        guest
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
    }

    /// What MOVS does by the element.
    fn model(memory: &mut [u8], from: usize, to: usize, size: usize, count: usize, down: bool) {
        for i in 0..count {
            let move_by = |at: usize| if down { at - i * size } else { at + i * size };
            let element = memory[move_by(from)..move_by(from) + size].to_vec();
            memory[move_by(to)..move_by(to) + size].copy_from_slice(&element);
        }
    }

    #[test]
    fn moves_equal_single_elements_whatever_the_overlap() {
        let codes: [(&[u8], usize); 4] =
            [(&[0xf3, 0xa4], 1), (&[0xf3, 0x66, 0xa5], 2), (&[0xf3, 0xa5], 4), (&[0xf3, 0x48, 0xa5], 8)];
        for (code, size) in codes {
            for distance in [-4100i64, -9, -8, -3, -1, 0, 1, 2, 3, 5, 8, 11, 16, 100, 4097] {
                for down in [false, true] {
                    let count = 9000 / size;
                    let (area, len) = (DATA, 0x8000);
                    let from = if down { 0x5003 } else { 0x2003 };
                    let to = from + distance;
                    let mut expected = pattern(len);
                    let mut guest = guest(area + from as u64, area + to as u64, count as u64);
                    guest.put(area, &expected);
                    model(&mut expected, from as usize, to as usize, size, count, down);
                    guest.cpu.state.rflags_system |= if down { Rflags::DF.bits() } else { 0 };
                    guest.finish(code);
                    assert!(guest.bytes(area, len) == expected, "{size} {distance} {down}");
                    let moved = (count * size) as u64;
                    let end = |at: i64| {
                        let at = area + at as u64;
                        if down { at - moved } else { at + moved }
                    };
                    assert_eq!(guest.reg(reg::RCX), 0);
                    assert_eq!((guest.reg(reg::RSI), guest.reg(reg::RDI)), (end(from), end(to)));
                }
            }
        }
    }

    #[test]
    fn stores_fill() {
        for (code, size) in [(&[0xf3, 0xaa][..], 1), (&[0xf3, 0x66, 0xab], 2), (&[0xf3, 0x48, 0xab], 8)] {
            for (rax, down) in [(0u64, false), (0x1122_3344_5566_7788, false), (0x0102_0304_0506_0708, true)]
            {
                let start = DATA + 0x1ffb;
                let mut guest = guest(0, start, 3);
                guest.cpu.state.rflags_system |= if down { Rflags::DF.bits() } else { 0 };
                guest.set(reg::RAX, rax).put(DATA, &[0xee; 0x4000]);
                guest.finish(code);
                let lowest = if down { start - 2 * size } else { start };
                for i in 0..3 {
                    let mask = u64::MAX >> (64 - 8 * size);
                    assert_eq!(guest.word(lowest + i * size, size as usize), rax & mask);
                }
                assert_eq!(guest.word(lowest - 1, 1), 0xee);
                assert_eq!(guest.word(lowest + 3 * size, 1), 0xee);
            }
        }
    }

    #[test]
    fn comparisons_stop_where_they_should() {
        let mut guest = guest(0, DATA, 100);
        guest.put(DATA, b"hello, world");
        // repne scasb
        guest.set(reg::RAX, u64::from(b'w')).finish(&[0xf2, 0xae]);
        assert_eq!((guest.reg(reg::RCX), guest.reg(reg::RDI)), (92, DATA + 8));
        assert!(guest.flags().contains(Rflags::ZF));
        // repe cmpsb
        guest.put(DATA + 0x100, b"hello, there");
        guest.set(reg::RSI, DATA).set(reg::RDI, DATA + 0x100).set(reg::RCX, 12).finish(&[0xf3, 0xa6]);
        assert_eq!((guest.reg(reg::RCX), guest.reg(reg::RSI)), (4, DATA + 8));
        assert!(!guest.flags().contains(Rflags::ZF | Rflags::CF));
        // A count of zero changes nothing.
        guest.set(reg::RCX, 0).set_flags(Rflags::OF).finish(&[0xf3, 0xa6]);
        assert_eq!((guest.flags(), guest.reg(reg::RSI)), (Rflags::OF, DATA + 8));
    }

    #[test]
    fn a_fault_finds_the_iteration_it_happened_in() {
        let mut guest = guest(DATA, UNMAPPED - 20, 10);
        let Exit::Exception(fault) = guest.run(&[0xf3, 0x48, 0xa5]) else { panic!("no fault") };
        // The third element begins four bytes before the page that is not there.
        assert_eq!((fault.vector, fault.error_code), PF_WRITE);
        assert_eq!(fault.payload, UNMAPPED);
        assert_eq!(guest.cpu.state.rip, CODE);
        assert_eq!(guest.reg(reg::RCX), 8);
        assert_eq!((guest.reg(reg::RSI), guest.reg(reg::RDI)), (DATA + 16, UNMAPPED - 4));
        // Flags of a comparison that faults are those of before it.
        guest.set(reg::RSI, DATA).set(reg::RDI, UNMAPPED - 2).set(reg::RCX, 5).set_flags(Rflags::CF);
        assert!(matches!(guest.run(&[0xf3, 0xa6]), Exit::Exception(_)));
        assert_eq!((guest.reg(reg::RCX), guest.flags()), (3, Rflags::CF));
    }

    #[test]
    fn single_step_stops_after_each_element() {
        let mut guest = guest(DATA, DATA + 0x100, 2);
        guest.cpu.state.rflags_system |= Rflags::TF.bits();
        assert_eq!(guest.run(&[0xf3, 0xa4]), Exit::Exception(Exception::db(1 << 14)));
        assert_eq!((guest.cpu.state.rip, guest.reg(reg::RCX)), (CODE, 1));
        assert_eq!(guest.cpu.run(), Exit::Exception(Exception::db(1 << 14)));
        assert_eq!((guest.cpu.state.rip, guest.reg(reg::RCX)), (CODE + 2, 0));
    }

    #[test]
    fn sixteen_bit_offsets_wrap() {
        let mut guest = Guest::new(CodeSize::Bits16);
        guest.put(0x8000, &pattern(16));
        // rep movsb to the end of the segment and on at its beginning
        guest.set(reg::RSI, 0x5_8000).set(reg::RDI, 0x6_fff8).set(reg::RCX, 0x7_0010);
        guest.finish(&[0xf3, 0xa4]);
        assert_eq!(guest.bytes(0xfff8, 8), pattern(16)[..8]);
        assert_eq!(guest.bytes(0, 8), pattern(16)[8..]);
        assert_eq!(guest.reg(reg::RCX), 0x7_0000);
        assert_eq!((guest.reg(reg::RSI), guest.reg(reg::RDI)), (0x5_8010, 0x6_0008));
    }

    #[test]
    fn thirty_two_bit_counts_clear_the_upper_half() {
        let mut guest = guest(!0 << 32 | DATA, !0 << 32 | (DATA + 0x100), !0 << 32 | 4);
        guest.put(DATA, &pattern(4));
        guest.finish(&[0x67, 0xf3, 0xa4]);
        assert_eq!(guest.bytes(DATA + 0x100, 4), pattern(4));
        let after = (guest.reg(reg::RSI), guest.reg(reg::RDI), guest.reg(reg::RCX));
        assert_eq!(after, (DATA + 4, DATA + 0x104, 0));
    }

    #[test]
    fn a_request_interrupts_between_runs() {
        let mut guest = guest(DATA, DATA + 0x4000, 0x3000);
        guest.put(DATA, &pattern(0x3000));
        guest.cpu.requests.post(Requests::KICK);
        assert_eq!(guest.run(&[0xf3, 0xa4]), Exit::ExternalInterrupt);
        assert_eq!(guest.reg(reg::RCX), 0x3000);
        // A limit that is never reached makes the engine look around all the time.
        guest.cpu.controls.instruction_limit = u64::MAX - 1;
        guest.finish(&[0xf3, 0xa4]);
        assert_eq!((guest.reg(reg::RCX), guest.cpu.instructions()), (0, 1));
        assert_eq!(guest.bytes(DATA + 0x4000, 0x3000), pattern(0x3000));
    }
}
