//! From iced-x86's decoded instruction to an [`Op`].
//!
//! Each instruction family has a `lower` function beside its handlers; they are asked in turn. An instruction
//! that no family takes, or that the CPU model does not offer, becomes #UD.

use std::cell::Cell;

use iced_x86::{Instruction, OpKind, Register};

use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::hostexec::stub::Stubs;
use crate::model::Features;
use crate::state::{CodeSize, Seg, reg};

/// What lowering depends on besides the bytes. All of it is part of the key under which blocks are cached.
#[derive(Clone, Copy)]
pub(crate) struct LowerCtx<'a> {
    /// Decoding mode.
    pub code_size: CodeSize,
    /// What the CPU offers.
    pub features: &'a Features,
    /// Host code for data-path instructions.
    pub(crate) stubs: &'a Stubs,
}

/// Slot of a general register of any width; for AH, CH, DH, BH bit 4 is set.
pub(crate) fn gpr(register: Register) -> u8 {
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => {
            16 | (register as u8 - Register::AH as u8)
        }
        _ => register.full_register().number() as u8,
    }
}

/// Segment index of a segment register.
pub(crate) fn seg_index(register: Register) -> u8 {
    match register {
        Register::ES => Seg::Es as u8,
        Register::CS => Seg::Cs as u8,
        Register::SS => Seg::Ss as u8,
        Register::DS => Seg::Ds as u8,
        Register::FS => Seg::Fs as u8,
        _ => Seg::Gs as u8,
    }
}

/// The operation for `ins` with `handler` and nothing filled in but the position, prefixes and the memory
/// operand. `ins` was decoded with its page offset as instruction pointer.
pub(crate) fn op_base(ins: &Instruction, ctx: &LowerCtx, handler: Handler) -> Op {
    let mut op = Op {
        handler: Cell::new(handler),
        imm: 0,
        disp: 0,
        base: reg::ZERO,
        index: reg::ZERO,
        scale: 0,
        seg: 6,
        r0: 0,
        r1: 0,
        r2: 0,
        flags: 0,
        page_offset: ins.ip() as u16,
        length: ins.len() as u8,
        size: 0,
        extra: 0,
        body: handler,
        translation: Cell::new(0),
    };
    if ins.has_lock_prefix() {
        op.flags |= Op::LOCK;
    }
    if ins.has_rep_prefix() {
        op.flags |= Op::REP;
    }
    if ins.has_repne_prefix() {
        op.flags |= Op::REPNE;
    }
    if ins.op_kinds().any(|k| k == OpKind::Memory) {
        set_memory(&mut op, ins, ctx);
    }
    op
}

fn set_memory(op: &mut Op, ins: &Instruction, ctx: &LowerCtx) {
    let (base, index) = (ins.memory_base(), ins.memory_index());
    op.seg = seg_index(effective_segment(ins, ctx));
    op.scale = ins.memory_index_scale().trailing_zeros() as u8;
    op.disp = ins.memory_displacement64() as i64;
    op.base = match base {
        Register::None => reg::ZERO,
        Register::RIP | Register::EIP => reg::IP_BASE,
        r => gpr(r),
    };
    if index != Register::None && index.is_gpr() {
        op.index = gpr(index);
    }
    let size = match (base, index) {
        (Register::None, Register::None) => ins.memory_displ_size(),
        (Register::EIP, _) => 4,
        (Register::RIP, _) => 8,
        (Register::None, i) if i.is_gpr() => i.size() as u32,
        (Register::None, _) => ins.memory_displ_size(),
        (b, _) => b.size() as u32,
    };
    match size {
        8 => {}
        4 => op.flags |= Op::ADDR32,
        2 => op.flags |= Op::ADDR16,
        _ => op.flags |= if ctx.code_size == CodeSize::Bits16 { Op::ADDR16 } else { Op::ADDR32 },
    }
    if ctx.code_size == CodeSize::Bits64 && base == Register::None && index == Register::None && size != 8 {
        // disp32 without registers: the address size is the instruction's, the displacement sign-extended.
        let prefix32 = ins.memory_displ_size() == 4;
        op.flags &= !(Op::ADDR32 | Op::ADDR16);
        if prefix32 && !displacement_is_64(ins) {
            op.flags |= Op::ADDR32;
        }
    }
    if ctx.code_size != CodeSize::Bits64 || op.flags & (Op::ADDR32 | Op::ADDR16) != 0 {
        op.flags |= Op::SLOW_EA;
    }
}

/// Segment of the memory operand. 64-bit mode ignores ES, CS, SS and DS prefixes (SDM vol. 1, 3.3.4), also where
/// it decides between #SS and #GP.
fn effective_segment(ins: &Instruction, ctx: &LowerCtx) -> Register {
    let ignored = matches!(ins.segment_prefix(), Register::ES | Register::CS | Register::SS | Register::DS);
    if ctx.code_size != CodeSize::Bits64 || !ignored {
        return ins.memory_segment();
    }
    match ins.memory_base().full_register() {
        Register::RSP | Register::RBP => Register::SS,
        _ => Register::DS,
    }
}

/// For `[disp32]` in 64-bit mode: whether the address size is 64 bits (no 67 prefix).
fn displacement_is_64(ins: &Instruction) -> bool {
    // iced reports 8 for a 64-bit address size even where the encoded displacement has four bytes.
    ins.memory_displ_size() == 8
}

/// Lowers one instruction.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Op {
    if ins.is_invalid() || !ctx.features.offers(ins) {
        return op_base(ins, ctx, undefined);
    }
    crate::exec::lower(ins, ctx).unwrap_or_else(|| op_base(ins, ctx, undefined))
}

/// #UD.
pub(crate) fn undefined(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    Err(cpu.raise(Exception::UD))
}
