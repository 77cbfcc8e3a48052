//! The commonest SSE moves without a stub: registers are memory of ours, so a move is a copy.
//!
//! VEX and EVEX moves stay with the stubs: a 32-byte register that was written in two halves is slow to read
//! back as one.
#![expect(unsafe_code, reason = "copies between guest memory and registers")]

use std::ptr;

use iced_x86::{Code, Instruction, OpKind};

use crate::code::lower::gpr;
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::exec::vector::{alignment, is_same_register, memory_operand};
use crate::hostexec::class;
use crate::mmu::Word;

/// Bytes of an XMM register.
const XMM: usize = 16;

/// `base` as a plain copy, if `ins` is one. r0: destination, r1: source.
pub(super) fn lower(ins: &Instruction, base: Op) -> Option<Op> {
    let handler = handler(ins)?;
    let number = |i: u32| match ins.op_kind(i) {
        OpKind::Register if ins.op_register(i).is_gpr() => gpr(ins.op_register(i)),
        OpKind::Register => ins.op_register(i).number() as u8,
        _ => 0,
    };
    let op = Op { r0: number(0), r1: number(1), r2: alignment(ins), extra: class::SSE, ..base };
    op.handler.set(handler);
    Some(op)
}

fn handler(ins: &Instruction) -> Option<Handler> {
    use Code::*;
    let memory = memory_operand(ins).is_some();
    let handler: Handler = match ins.code() {
        Movaps_xmm_xmmm128 | Movapd_xmm_xmmm128 | Movdqa_xmm_xmmm128 | Movups_xmm_xmmm128
        | Movupd_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Lddqu_xmm_m128
            if memory =>
        {
            load::<16>
        }
        Movaps_xmmm128_xmm | Movapd_xmmm128_xmm | Movdqa_xmmm128_xmm | Movups_xmmm128_xmm
        | Movupd_xmmm128_xmm | Movdqu_xmmm128_xmm
            if memory =>
        {
            store::<16>
        }
        Movntps_m128_xmm | Movntpd_m128_xmm | Movntdq_m128_xmm => store::<16>,
        Movaps_xmm_xmmm128 | Movapd_xmm_xmmm128 | Movdqa_xmm_xmmm128 | Movups_xmm_xmmm128
        | Movupd_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Movaps_xmmm128_xmm | Movapd_xmmm128_xmm
        | Movdqa_xmmm128_xmm | Movups_xmmm128_xmm | Movupd_xmmm128_xmm | Movdqu_xmmm128_xmm => copy::<16>,
        Movsd_xmm_xmmm64 | Movq_xmm_xmmm64 if memory => load::<8>,
        Movss_xmm_xmmm32 if memory => load::<4>,
        Movd_xmm_rm32 if memory => load::<4>,
        Movq_xmm_rm64 if memory => load::<8>,
        Movsd_xmmm64_xmm | Movq_xmmm64_xmm | Movq_rm64_xmm if memory => store::<8>,
        Movlps_m64_xmm | Movlpd_m64_xmm => store::<8>,
        Movss_xmmm32_xmm | Movd_rm32_xmm if memory => store::<4>,
        Movq_xmm_xmmm64 | Movq_xmmm64_xmm => copy::<8>,
        Movd_xmm_rm32 => from_general::<u32>,
        Movq_xmm_rm64 => from_general::<u64>,
        Movd_rm32_xmm => to_general::<u32>,
        Movq_rm64_xmm => to_general::<u64>,
        Pxor_xmm_xmmm128 | Xorps_xmm_xmmm128 | Xorpd_xmm_xmmm128 if is_same_register(ins) => zero,
        _ => return None,
    };
    Some(handler)
}

#[inline(always)]
fn admitted(cpu: &mut Cpu, op: &Op) -> Result<(), Abort> {
    if cpu.hostexec.gate & op.extra == 0 { Ok(()) } else { cpu.admit(op.extra) }
}

#[inline(always)]
fn address<const SIZE: usize>(cpu: &mut Cpu, op: &Op, write: bool) -> Result<u64, Abort> {
    let lin = cpu.ea(op, SIZE, write)?;
    if lin & u64::from(op.r2) != 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    Ok(lin)
}

/// Low 128 bits of a register.
#[inline(always)]
fn set_xmm(cpu: &mut Cpu, register: u8, value: [u8; XMM]) {
    let zmm = &mut cpu.state.zmm[usize::from(register & 31)].0;
    if let Some(low) = zmm.first_chunk_mut::<XMM>() {
        *low = value;
    }
}

#[inline(always)]
fn xmm(cpu: &Cpu, register: u8) -> [u8; XMM] {
    let zmm = &cpu.state.zmm[usize::from(register & 31)].0;
    zmm.first_chunk::<XMM>().copied().unwrap_or_default()
}

/// Loads `SIZE` bytes and zeroes the rest of the 128 bits.
fn load<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let lin = address::<SIZE>(cpu, op, false)?;
    let mut value = [0; XMM];
    match cpu.host_pointer(cpu.op_seg(op), lin, SIZE, false)? {
        // SAFETY: `SIZE` bytes, at most 16, can be read at the pointer.
        Some(mem) => unsafe { ptr::copy_nonoverlapping(mem, value.as_mut_ptr(), SIZE) },
        None => cpu.read_bytes(cpu.op_seg(op), lin, &mut value[..SIZE])?,
    }
    set_xmm(cpu, op.r0, value);
    Ok(Flow::Next)
}

fn store<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let lin = address::<SIZE>(cpu, op, true)?;
    let value = xmm(cpu, op.r1);
    match cpu.host_pointer(cpu.op_seg(op), lin, SIZE, true)? {
        // SAFETY: `SIZE` bytes, at most 16, can be written at the pointer.
        Some(mem) => unsafe { ptr::copy_nonoverlapping(value.as_ptr(), mem, SIZE) },
        None => cpu.write_bytes(cpu.op_seg(op), lin, &value[..SIZE])?,
    }
    Ok(Flow::Next)
}

/// Copies `SIZE` bytes and zeroes the rest of the 128 bits.
fn copy<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let mut value = xmm(cpu, op.r1);
    value[SIZE..].fill(0);
    set_xmm(cpu, op.r0, value);
    Ok(Flow::Next)
}

fn from_general<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let value = u128::from(cpu.get::<T>(op.r1).to_u64());
    set_xmm(cpu, op.r0, value.to_le_bytes());
    Ok(Flow::Next)
}

fn to_general<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let value = u128::from_le_bytes(xmm(cpu, op.r1)) as u64;
    cpu.set::<T>(op.r0, T::from_u64(value));
    Ok(Flow::Next)
}

/// An exclusive or of a register with itself.
fn zero(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    set_xmm(cpu, op.r0, [0; XMM]);
    Ok(Flow::Next)
}
