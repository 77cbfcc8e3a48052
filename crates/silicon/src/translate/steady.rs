//! Loops whose addresses move by constants: pages are looked up once for as many iterations as stay in them.
//!
//! A block that is a loop by itself has a second translation, apart. It is entered where the first one has looked for requests, so that
//! loops which soon end seldom come to it; those that do are left alone for a while. Before it its *windows* are looked up: accesses by
//! registers that an iteration only moves by constants, or leaves alone. How far it is to the ends of their pages says how many iterations
//! may follow; the count of instructions at which requests are looked for is set to that, so that the loop asks for nothing else. Then
//! it looks again.
//!
//! What a window's lookup has found holds all the while: nothing takes it back but what host code is left for.

use std::collections::HashMap;
use std::ops::Range;

use iced_x86::code_asm::{CodeLabel, qword_ptr, r14, r14d, r15, r15d};
use iced_x86::{Code, Instruction, InstructionInfoFactory, OpKind, Register};

use super::emit::{Emitter, Kind, Linear, Result, instructions};
use super::flags::{Flags, bit, written};
use super::frame::{Frame, STOP};
use super::groups::{Access, Registers, moves};
use super::memory::{Rules, way};
use super::region::Start;
use super::registers::{ADDRESS, At, GUEST_RSP, VALUE, field};
use super::routines::Routines;
use super::shared::Shared;
use super::{Failure, SLICE};
use crate::code::op::Op;
use crate::mmu::tlb::{PAGE_MASK, PAGE_SHIFT, PAGE_SIZE};
use crate::state::reg;

/// Bytes from the lowest to the highest of a window, at most.
const WIDEST: i64 = 256;
/// Bytes that it moves by, at most: else too few iterations stay in a page.
const FARTHEST: i64 = 64;
/// How often a loop that has ended before its windows did is not looked at again where requests are looked for.
const PATIENCE: i32 = 8;
/// Bits behind the point in reciprocals of strides: exact for offsets in pages.
const POINT: i32 = 24;

/// Accesses of a loop by the same registers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Window {
    registers: Registers,
    /// An instruction with such an operand; none, if there is none but of the stack.
    operand: Option<Instruction>,
    /// Stores, if one of them is: who may store may load.
    kind: Kind,
    /// The lowest byte, and that behind the highest, from the address that the registers give where an iteration begins.
    low: i64,
    high: i64,
    /// Bytes that an iteration moves it by.
    stride: i64,
}

/// The windows of a loop.
#[derive(Clone, Debug, Default)]
pub(super) struct Windows {
    windows: Vec<Window>,
    /// By operation, its window.
    members: HashMap<usize, usize>,
}

impl Windows {
    /// Those of a loop of these instructions; `None` without any.
    pub(super) fn of(loop_: &[Instruction]) -> Option<Windows> {
        let mut info = InstructionInfoFactory::new();
        let (mut moved, mut spoilt) = ([0i64; 16], 0u16);
        for ins in loop_ {
            let by = moves(ins);
            spoilt |= written(&mut info, ins) & !by.map_or(0, |(register, _)| bit(register));
            if let Some((register, by)) = by {
                moved[register.number() & 15] = moved[register.number() & 15].wrapping_add(by);
            }
        }
        let strides = moved;
        let mut windows = Windows::default();
        moved = [0; 16];
        for (index, ins) in loop_.iter().enumerate() {
            if let Some(access) = Access::of(ins, &mut info)
                && access.registers.bits() & spoilt == 0
            {
                windows.note(index, ins, &access, &moved, &strides);
            }
            if let Some((register, by)) = moves(ins) {
                moved[register.number() & 15] = moved[register.number() & 15].wrapping_add(by);
            }
        }
        (!windows.windows.is_empty()).then_some(windows)
    }

    /// Of each the bytes from the lowest to the highest, and by how much an iteration moves it.
    #[cfg(test)]
    pub(super) fn ranges(&self) -> impl Iterator<Item = (i64, i64, i64)> {
        self.windows.iter().map(|window| (window.low, window.high, window.stride))
    }

    /// An access, before which registers have moved by `moved`, and do so by `strides` in an iteration.
    fn note(
        &mut self,
        index: usize,
        ins: &Instruction,
        access: &Access,
        moved: &[i64; 16],
        strides: &[i64; 16],
    ) {
        let Some(moved) = access.registers.sum(moved) else { return };
        let Some(stride) = access.registers.sum(strides).filter(|stride| stride.abs() <= FARTHEST) else {
            return;
        };
        let Some(low) = moved.checked_add(access.displacement) else { return };
        let Some(high) = low.checked_add(access.size as i64) else { return };
        let operand = Some(*ins).filter(|ins| ins.op_kinds().any(|kind| kind == OpKind::Memory));
        if i32::try_from(low).is_err() || i32::try_from(high).is_err() {
            return;
        }
        for (number, window) in self.windows.iter_mut().enumerate() {
            let (low, high) = (window.low.min(low), window.high.max(high));
            if window.registers == access.registers && high - low <= WIDEST {
                (window.low, window.high) = (low, high);
                window.operand = window.operand.or(operand);
                if access.kind == Kind::Store {
                    window.kind = Kind::Store;
                }
                self.members.insert(index, number);
                return;
            }
        }
        if self.windows.len() < Frame::WINDOWS {
            self.members.insert(index, self.windows.len());
            let (registers, kind) = (access.registers, access.kind);
            self.windows.push(Window { registers, operand, kind, low, high, stride });
        }
    }
}

/// A loop that has a second translation.
pub(super) struct Steady<'a> {
    pub(super) instructions: &'a [Instruction],
    pub(super) run: Range<usize>,
    pub(super) ops: &'a [Op],
    pub(super) start: Start,
    pub(super) windows: Windows,
    /// Where the windows are looked up. An iteration has been counted.
    pub(super) at: CodeLabel,
    /// Where the first translation goes on with such an iteration.
    pub(super) back: CodeLabel,
}

impl<'a> Emitter<'a> {
    /// Where the access of operation `index` is, if that is of a window. `free` scratch registers are left, none or one. Changes no flags.
    pub(super) fn access_steady(&mut self, linear: &Linear, free: usize, index: usize) -> Result<Option<At>> {
        let Some(&window) = self.windows.members.get(&index) else { return Ok(None) };
        if let Linear::Operand(_) = linear {
            self.linear(linear)?;
        }
        let found = self.routines.frame.window(window);
        self.put(Instruction::with2(Code::Mov_r64_rm64, Register::from(VALUE), found)?)?;
        Ok(Some(match *linear {
            Linear::Register(base, displacement) => At::Sum(base, displacement),
            Linear::Operand(_) if free == 0 => At::Sum(ADDRESS, 0),
            Linear::Operand(_) => {
                self.a.lea(ADDRESS, qword_ptr(ADDRESS + VALUE))?;
                At::Address
            }
        }))
    }

    /// Behind the region: the second translation of a loop.
    pub(super) fn put_steady(&mut self, steady: Steady<'a>) -> Result<()> {
        let Steady { instructions, run, ops, start, windows, at, back } = steady;
        (self.ops, self.follower) = (ops, None);
        (self.interpret, self.unsaved) = (vec![None; ops.len()], vec![None; ops.len()]);
        (self.pointers, self.shared) = (0, Shared::default());
        self.constants.clear();
        (self.flags, self.known) = (Flags::at(start.flags), start.known);
        let (body, rested, look) = (self.a.create_label(), self.a.create_label(), self.a.create_label());
        let patience =
            self.routines.frame.patience(self.code_page << PAGE_SHIFT | u64::from(ops[0].page_offset));
        self.place(at)?;
        self.put(Instruction::with2(Code::Sub_rm64_imm8, patience, 1)?)?;
        self.a.jns(back)?;
        self.put(Instruction::with2(Code::Mov_rm64_imm32, patience, PATIENCE)?)?;
        self.a.jmp(look)?;
        self.place(rested)?;
        self.put(Instruction::with2(Code::Mov_rm64_imm32, patience, 0)?)?;
        self.place(look)?;
        self.look_windows_up(&windows, body, back)?;
        self.windows = windows;
        // Its branch back is to where it begins.
        let offset = i64::from(ops[0].page_offset);
        let again = self.a.create_label();
        let first = self.targets.get(&offset).copied().ok_or(Failure::Unsuited)?;
        self.targets.insert(offset, first.at(again));
        self.place(again)?;
        self.owed = start.owed;
        self.begin_loop(body, rested)?;
        for index in run {
            self.step(instructions, index)?;
        }
        self.targets.insert(offset, first);
        self.windows = Windows::default();
        Ok(())
    }

    /// Looks up the pages of the windows and goes on at `body`, with a count that ends where the first of them leaves its page; or at
    /// `back`, if one is not at hand or lies in two, or if there is something to look for.
    fn look_windows_up(&mut self, windows: &Windows, body: CodeLabel, back: CodeLabel) -> Result<()> {
        let frame = self.routines.frame;
        let length = self.length();
        let split = self.a.create_label();
        // What this CPU wants itself does not end a loop, but is looked for as soon as it has ended: the count stays.
        self.a.cmp(instructions(), 0)?;
        self.a.jns(back)?;
        self.a.mov(r14d, SLICE / length.max(1) as u32)?;
        self.put(Instruction::with2(Code::Mov_rm64_r64, frame.iterations(), Register::R14)?)?;
        for (number, window) in windows.windows.iter().enumerate() {
            self.look_window_up(number, window, split, back)?;
        }
        // The count that is negative for so many iterations more.
        self.put(Instruction::with2(Code::Mov_r64_rm64, Register::R14, frame.iterations())?)?;
        self.a.imul_3(r14, r14, length)?;
        self.a.add(r14, 1)?;
        self.stop_after_r14()?;
        self.a.jmp(body)?;
        // The next iteration looks again.
        self.place(split)?;
        self.a.mov(r14d, 1)?;
        self.stop_after_r14()?;
        Ok(self.a.jmp(back)?)
    }

    /// Requests are looked for after R14 instructions.
    fn stop_after_r14(&mut self) -> Result<()> {
        self.a.mov(r15, instructions())?;
        self.a.add(r15, r14)?;
        self.a.add(field(STOP), r15)?;
        self.a.neg(r14)?;
        Ok(self.a.mov(instructions(), r14)?)
    }

    fn look_window_up(
        &mut self,
        number: usize,
        window: &Window,
        split: CodeLabel,
        back: CodeLabel,
    ) -> Result<()> {
        let frame = self.routines.frame;
        let low = i32::try_from(window.low).map_err(|_| Failure::Unsuited)?;
        let (linear, way) = match window.operand {
            None => (Linear::Register(GUEST_RSP, low), usize::from(reg::RSP)),
            Some(mut ins) => {
                ins.set_memory_displ_size(8);
                ins.set_memory_displacement64(window.low as u64);
                (Linear::Operand(ins), way(&ins, window.kind, self.code_page))
            }
        };
        let size = Routines::round_up((window.high - window.low) as usize).ok_or(Failure::Unsuited)?;
        let routine = self.routines.look_up(window.kind, size).ok_or(Failure::Unsuited)?;
        self.linear(&linear)?;
        self.leave_split(&Rules { split: Some(split), ..Rules::size(size) })?;
        let recent = self.recent(window.kind, way);
        self.a.mov(r14d, recent as u32)?;
        self.a.call(routine)?;
        self.a.jne(back)?;
        self.put(Instruction::with2(Code::Mov_rm64_r64, frame.window(number), Register::R14)?)?;
        if window.stride == 0 {
            return Ok(());
        }
        self.a.and(r15d, PAGE_MASK as i32)?;
        if window.stride > 0 {
            self.a.neg(r15)?;
            self.a.add(r15, PAGE_SIZE as i32 - size as i32)?;
        }
        let stride = window.stride.unsigned_abs();
        if stride.is_power_of_two() {
            self.a.shr(r15, stride.trailing_zeros())?;
        } else {
            self.a.imul_3(r15, r15, (1u64 << POINT).div_ceil(stride) as i32)?;
            self.a.shr(r15, POINT)?;
        }
        let enough = self.a.create_label();
        self.put(Instruction::with2(Code::Cmp_r64_rm64, Register::R15, frame.iterations())?)?;
        self.a.jae(enough)?;
        self.put(Instruction::with2(Code::Mov_rm64_r64, frame.iterations(), Register::R15)?)?;
        self.place(enough)
    }
}
