//! The commonest SSE moves without a stub: registers are memory of ours, so a move is a copy.
//!
//! VEX and EVEX moves stay with the stubs: a 32-byte register that was written in two halves is slow to read
//! back as one.
#![expect(unsafe_code, reason = "copies between guest memory and registers")]

use std::arch::asm;
use std::arch::x86_64::{
    __m128i, _mm_cvtsi64_si128, _mm_cvtsi128_si64, _mm_load_si128, _mm_loadl_epi64, _mm_loadu_si128,
    _mm_setzero_si128, _mm_store_si128, _mm_storeu_si128,
};

use iced_x86::{Code, Instruction, OpKind};

use crate::code::lower::gpr;
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::exec::vector::{alignment, direct, is_same_register, memory_operand};
use crate::hostexec::class;
use crate::mmu::Word;
use crate::mmu::host::{Absent, on_fault, on_fault_zero};

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

/// The instruction may not simply run: says why, or runs it after all.
#[cold]
#[inline(never)]
fn again(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.admit(op.extra)?;
    // `admit` has opened the gate for SSE.
    (op.handler.get())(cpu, op)
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
fn set_xmm(cpu: &mut Cpu, register: u8, value: __m128i) {
    let zmm = &mut cpu.state.zmm[usize::from(register & 31)].0;
    // SAFETY: the register is 64 bytes at a multiple of 64.
    unsafe { _mm_store_si128(zmm.as_mut_ptr().cast(), value) };
}

#[inline(always)]
fn xmm(cpu: &Cpu, register: u8) -> __m128i {
    let zmm = &cpu.state.zmm[usize::from(register & 31)].0;
    // SAFETY: the register is 64 bytes at a multiple of 64.
    unsafe { _mm_load_si128(zmm.as_ptr().cast()) }
}

/// Reads `SIZE` bytes (4, 8 or 16) and zeroes the rest, in one host register: two halves in memory would be
/// slow to read back as one.
///
/// # Safety
///
/// `SIZE` bytes at `mem` can be read, or are guest memory.
#[inline(always)]
unsafe fn read<const SIZE: usize>(mem: *const u8) -> Result<__m128i, Absent> {
    let value: __m128i;
    let after: *const u8;
    macro_rules! load {
        ($instruction:literal) => {
            // SAFETY: the caller's promise; if the instruction faults, it goes on with `after` null.
            unsafe {
                asm!(
                    concat!("2: ", $instruction), "3:", on_fault_zero!("{p:e}"),
                    v = out(xmm_reg) value, p = inout(reg) mem => after,
                    options(nostack, preserves_flags, readonly)
                )
            }
        };
    }
    match SIZE {
        16 => load!("movdqu {v}, xmmword ptr [{p}]"),
        8 => load!("movq {v}, qword ptr [{p}]"),
        _ => load!("movd {v}, dword ptr [{p}]"),
    }
    if after.is_null() { Err(Absent) } else { Ok(value) }
}

/// Writes the low `SIZE` bytes (4, 8 or 16).
///
/// # Safety
///
/// `SIZE` bytes at `mem` can be written, or are guest memory.
#[inline(always)]
unsafe fn write<const SIZE: usize>(mem: *mut u8, value: __m128i) -> Result<(), Absent> {
    macro_rules! store {
        ($instruction:literal) => {
            // SAFETY: the caller's promise; if the instruction faults, it goes on at the label.
            unsafe {
                asm!(
                    concat!("2: ", $instruction), on_fault!("2b" => "{absent}"),
                    v = in(xmm_reg) value, p = in(reg) mem, absent = label { return Err(Absent) },
                    options(nostack, preserves_flags)
                )
            }
        };
    }
    match SIZE {
        16 => store!("movdqu xmmword ptr [{p}], {v}"),
        8 => store!("movq qword ptr [{p}], {v}"),
        _ => store!("movd dword ptr [{p}], {v}"),
    }
    Ok(())
}

/// Loads `SIZE` bytes and zeroes the rest of the 128 bits.
fn load<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.hostexec.gate & op.extra == 0
        && let Some(mem) = direct(cpu, op, SIZE, false)
    {
        // SAFETY: `SIZE` bytes at the pointer are guest memory that can be read.
        let value = unsafe { read::<SIZE>(mem) };
        let value = cpu.present(value)?;
        set_xmm(cpu, op.r0, value);
        return Ok(Flow::Next);
    }
    load_slowly::<SIZE>(cpu, op)
}

#[inline(never)]
fn load_slowly<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let lin = address::<SIZE>(cpu, op, false)?;
    let value = match cpu.host_pointer(cpu.op_seg(op), lin, SIZE, false)? {
        Some(mem) => {
            // SAFETY: `SIZE` bytes at the pointer are guest memory that can be read.
            let value = unsafe { read::<SIZE>(mem) };
            cpu.present(value)?
        }
        None => load_copy(cpu, op, lin, SIZE)?,
    };
    set_xmm(cpu, op.r0, value);
    Ok(Flow::Next)
}

#[cold]
fn load_copy(cpu: &mut Cpu, op: &Op, lin: u64, size: usize) -> Result<__m128i, Abort> {
    let mut bytes = [0; XMM];
    cpu.read_bytes(cpu.op_seg(op), lin, &mut bytes[..size])?;
    // SAFETY: an XMM register's bytes.
    Ok(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

fn store<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.hostexec.gate & op.extra == 0
        && let Some(mem) = direct(cpu, op, SIZE, true)
    {
        // SAFETY: `SIZE` bytes at the pointer are guest memory that can be written.
        let written = unsafe { write::<SIZE>(mem, xmm(cpu, op.r1)) };
        cpu.present(written)?;
        return Ok(Flow::Next);
    }
    store_slowly::<SIZE>(cpu, op)
}

#[inline(never)]
fn store_slowly<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let lin = address::<SIZE>(cpu, op, true)?;
    match cpu.host_pointer(cpu.op_seg(op), lin, SIZE, true)? {
        Some(mem) => {
            // SAFETY: `SIZE` bytes at the pointer are guest memory that can be written.
            let written = unsafe { write::<SIZE>(mem, xmm(cpu, op.r1)) };
            cpu.present(written)?;
        }
        None => store_copy(cpu, op, lin, SIZE)?,
    }
    Ok(Flow::Next)
}

#[cold]
fn store_copy(cpu: &mut Cpu, op: &Op, lin: u64, size: usize) -> Result<(), Abort> {
    let mut bytes = [0; XMM];
    // SAFETY: an XMM register's bytes.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), xmm(cpu, op.r1)) };
    cpu.write_bytes(cpu.op_seg(op), lin, &bytes[..size])
}

/// Copies `SIZE` bytes and zeroes the rest of the 128 bits.
fn copy<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.hostexec.gate & op.extra != 0 {
        return again(cpu, op);
    }
    let source = &cpu.state.zmm[usize::from(op.r1 & 31)].0;
    // SAFETY: a register has more than 16 bytes; SIZE is 8 or 16.
    let value = unsafe {
        match SIZE {
            16 => _mm_loadu_si128(source.as_ptr().cast()),
            _ => _mm_loadl_epi64(source.as_ptr().cast()),
        }
    };
    set_xmm(cpu, op.r0, value);
    Ok(Flow::Next)
}

fn from_general<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.hostexec.gate & op.extra != 0 {
        return again(cpu, op);
    }
    let value = cpu.get::<T>(op.r1).to_u64();
    // SAFETY: SSE2 is part of x86-64.
    set_xmm(cpu, op.r0, unsafe { _mm_cvtsi64_si128(value as i64) });
    Ok(Flow::Next)
}

fn to_general<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.hostexec.gate & op.extra != 0 {
        return again(cpu, op);
    }
    // SAFETY: SSE2 is part of x86-64.
    let value = unsafe { _mm_cvtsi128_si64(xmm(cpu, op.r1)) } as u64;
    cpu.set::<T>(op.r0, T::from_u64(value));
    Ok(Flow::Next)
}

/// An exclusive or of a register with itself.
fn zero(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.hostexec.gate & op.extra != 0 {
        return again(cpu, op);
    }
    // SAFETY: SSE2 is part of x86-64.
    set_xmm(cpu, op.r0, unsafe { _mm_setzero_si128() });
    Ok(Flow::Next)
}
