//! MMX, SSE, AVX and AVX-512: recognising them, and running them by the host's own silicon.
//!
//! What a form needs is found when it is lowered: its class (which control bits enable it), its stub, the
//! size of its memory operand, and whether that must be aligned.
#![expect(unsafe_code, reason = "calls stubs with pointers to guest memory")]

use std::ptr;

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpAccess, OpKind, Register, RoundingControl};

use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::{Cpu, Pending};
use crate::exception::{Abort, Exception};
use crate::exec::{vector_gather, vector_masked, vector_moves};
use crate::hostexec::arithmetic::may_raise;
use crate::hostexec::stub::Stub;
use crate::hostexec::{MXCSR_DEFINED, class, make_room};
use crate::mmu::tlb::Class;

/// Bit of [`Op::extra`]: the operand is never alignment-checked (exception type 11).
pub(super) const UNCHECKED: u32 = 1 << 11;

/// A memory operand's copy, where no direct pointer can be had.
#[repr(C, align(64))]
pub(super) struct Copy64(pub(super) [u8; 64]);

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let classes = classify(ins)?;
    let base = |handler: Handler| Op { extra: classes, ..op_base(ins, ctx, handler) };
    match ins.mnemonic() {
        Mnemonic::Vzeroupper => return Some(base(zero_upper)),
        Mnemonic::Vzeroall => return Some(base(zero_all)),
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => return Some(base(load_mxcsr)),
        Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => return Some(base(store_mxcsr)),
        _ => {}
    }
    let special = vector_moves::lower(ins, base(load));
    if let Some(op) = special.or_else(|| vector_masked::lower_implicit(ins, base(load))) {
        return Some(op);
    }
    if ins.memory_index().is_vector_register() {
        return vector_gather::lower(ins, base(load));
    }
    let imm = match ctx.stubs.get(ins) {
        Stub::At(address) => address,
        Stub::Full => return Some(base(make_room)),
        Stub::Impossible => return None,
    };
    let Some(memory) = memory_operand(ins) else {
        return Some(Op { imm, ..base(register) });
    };
    let stores = is_store(ins, memory);
    let mut op = Op { imm, r2: alignment(ins), ..base(if stores { store } else { load }) };
    op.size = u8::try_from(ins.memory_size().size()).ok().filter(|&size| size <= 64)?;
    if matches!(ins.mnemonic(), Mnemonic::Vcvtph2ps | Mnemonic::Vcvtps2ph) {
        op.extra |= UNCHECKED;
    }
    Some(vector_masked::lower_masked(ins, stores, op))
}

/// The classes of a vector or MMX instruction, `None` for any other.
pub(crate) fn classify(ins: &Instruction) -> Option<u32> {
    let operand = |is: fn(Register) -> bool| {
        (0..ins.op_count()).any(|i| ins.op_kind(i) == OpKind::Register && is(ins.op_register(i)))
    };
    let vector = operand(Register::is_vector_register) || is_vector_by_name(ins.mnemonic());
    let suppressed = ins.suppress_all_exceptions() || ins.rounding_control() != RoundingControl::None;
    let fp = if may_raise(ins.mnemonic()) && !suppressed { class::FP } else { 0 };
    match ins.encoding() {
        EncodingKind::EVEX => Some(class::AVX512 | fp),
        EncodingKind::VEX if operand(Register::is_k) => Some(class::AVX512),
        EncodingKind::VEX if vector => Some(class::AVX | fp),
        EncodingKind::Legacy => {
            let sse = if vector { class::SSE | fp } else { 0 };
            let mmx =
                if operand(Register::is_mm) || ins.mnemonic() == Mnemonic::Emms { class::MMX } else { 0 };
            Some(sse | mmx).filter(|&classes| classes != 0)
        }
        _ => None,
    }
}

/// Vector instructions some of whose forms have no vector register among their operands.
fn is_vector_by_name(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Cvtss2si | Cvttss2si | Cvtsd2si | Cvttsd2si | Vcvtss2si | Vcvttss2si | Vcvtsd2si | Vcvttsd2si
    ) || matches!(mnemonic, Cvtps2pi | Cvttps2pi | Cvtpd2pi | Cvttpd2pi)
        || matches!(mnemonic, Ldmxcsr | Stmxcsr | Vldmxcsr | Vstmxcsr | Vzeroupper | Vzeroall)
}

/// Index of the memory operand.
pub(super) fn memory_operand(ins: &Instruction) -> Option<u32> {
    (0..ins.op_count()).find(|&i| ins.op_kind(i) == OpKind::Memory)
}

/// Whether both operands are one register.
pub(super) fn is_same_register(ins: &Instruction) -> bool {
    ins.op0_register() == ins.op1_register() && ins.op1_kind() == OpKind::Register
}

/// Whether the instruction writes its memory operand. None of those here also reads it.
pub(super) fn is_store(ins: &Instruction, operand: u32) -> bool {
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let access = factory.info(ins).op_access(operand);
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// Address bits that must be zero, else #GP (SDM vol. 2A, 2.4 and 2.7: exception types 1, 2, 4 of legacy
/// instructions, type 1 and E1 of VEX and EVEX ones).
pub(crate) fn alignment(ins: &Instruction) -> u8 {
    use Mnemonic::*;
    let size = ins.memory_size().size();
    let aligned = match ins.encoding() {
        EncodingKind::Legacy => {
            size == 16
                && !matches!(
                    ins.mnemonic(),
                    Movups | Movupd | Movdqu | Lddqu | Pcmpestri | Pcmpestrm | Pcmpistri | Pcmpistrm
                )
                && !matches!(ins.mnemonic(), Pcmpestri64 | Pcmpestrm64)
        }
        _ => matches!(
            ins.mnemonic(),
            Vmovaps | Vmovapd | Vmovdqa | Vmovdqa32 | Vmovdqa64 | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa
        ),
    };
    if aligned { size as u8 - 1 } else { 0 }
}

/// Checks that the instruction may run; true if SIMD exceptions are unmasked.
#[inline(always)]
pub(super) fn admitted(cpu: &mut Cpu, op: &Op) -> Result<bool, Abort> {
    let attention = cpu.hostexec.gate & op.extra;
    if attention == 0 {
        return Ok(false);
    }
    cpu.admit(op.extra & class::ALL)?;
    Ok(attention & class::FP != 0)
}

/// Runs the stub.
///
/// # Safety
///
/// As for [`Cpu::call_stub`].
#[inline(always)]
pub(super) unsafe fn execute(cpu: &mut Cpu, op: &Op, mem: *mut u8, unmasked: bool) -> Result<(), Abort> {
    if unmasked {
        // SAFETY: the caller's promise.
        return unsafe { cpu.call_stub_unmasked(op, mem) };
    }
    // SAFETY: the caller's promise.
    unsafe { cpu.call_stub(op, mem) }
}

/// A form without memory operand.
fn register(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.hostexec.gate & op.extra != 0 {
        return register_slowly(cpu, op);
    }
    // SAFETY: `lower` gave the operation its stub; there is no memory operand.
    unsafe { cpu.call_stub(op, ptr::null_mut())? };
    Ok(Flow::Next)
}

#[cold]
#[inline(never)]
fn register_slowly(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let unmasked = admitted(cpu, op)?;
    // SAFETY: `lower` gave the operation its stub; there is no memory operand.
    unsafe { execute(cpu, op, ptr::null_mut(), unmasked)? };
    Ok(Flow::Next)
}

/// Linear address of the memory operand, checked for alignment.
#[inline(always)]
pub(super) fn address(cpu: &mut Cpu, op: &Op, write: bool) -> Result<u64, Abort> {
    let lin = cpu.ea(op, usize::from(op.size), write)?;
    if lin & u64::from(op.r2) != 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    Ok(lin)
}

/// #AC(0) for a misaligned operand of two, four or eight bytes, which comes before a page fault.
pub(super) fn check_small_alignment(cpu: &mut Cpu, op: &Op, lin: u64) -> Result<(), Abort> {
    let misaligned = op.size <= 8 && lin & u64::from(op.size).wrapping_sub(1) != 0;
    if misaligned && cpu.mmu.tlb.class() == Class::Checked {
        cpu.checked(cpu.op_seg(op), lin)?;
        return Err(cpu.raise(Exception::AC));
    }
    Ok(())
}

/// Pointer to the memory operand in the common case: nothing to check but the first-level TLB. The slow way
/// is a tail call then, and the handler needs no stack frame.
#[inline(always)]
pub(super) fn direct(cpu: &Cpu, op: &Op, size: usize, write: bool) -> Option<*mut u8> {
    let lin = cpu.offset(op).wrapping_add(cpu.state.ea_base[usize::from(op.seg & 7)]);
    if op.has(Op::SLOW_EA) || lin & u64::from(op.r2) != 0 {
        return None;
    }
    let tlb = &cpu.mmu.tlb;
    let hit = if write { tlb.write_hit(lin, size) } else { tlb.read_hit(lin, size) };
    hit.map(|host| host as *mut u8)
}

/// A form that reads memory.
fn load(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.hostexec.gate & op.extra == 0
        && let Some(mem) = direct(cpu, op, usize::from(op.size), false)
    {
        // SAFETY: `size` bytes can be read at the pointer, and the stub reads no more.
        unsafe { cpu.call_stub(op, mem)? };
        return Ok(Flow::Next);
    }
    load_slowly(cpu, op)
}

#[inline(never)]
fn load_slowly(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let unmasked = admitted(cpu, op)?;
    let lin = address(cpu, op, false)?;
    let (seg, size) = (cpu.op_seg(op), usize::from(op.size));
    if op.extra & UNCHECKED != 0 && cpu.mmu.tlb.class() == Class::Checked {
        load_copy(cpu, op, lin, unmasked)?;
        return Ok(Flow::Next);
    }
    check_small_alignment(cpu, op, lin)?;
    match cpu.host_pointer(seg, lin, size, false)? {
        // SAFETY: `size` bytes can be read at the pointer, and the stub reads no more.
        Some(mem) => unsafe { execute(cpu, op, mem, unmasked)? },
        None => load_copy(cpu, op, lin, unmasked)?,
    }
    Ok(Flow::Next)
}

#[cold]
fn load_copy(cpu: &mut Cpu, op: &Op, lin: u64, unmasked: bool) -> Result<(), Abort> {
    let mut copy = Copy64([0; 64]);
    let size = usize::from(op.size).min(64);
    match op.extra & UNCHECKED {
        0 => cpu.read_bytes(cpu.op_seg(op), lin, &mut copy.0[..size])?,
        _ => vector_masked::read_part(cpu, cpu.op_seg(op), lin, &mut copy.0[..size])?,
    }
    // SAFETY: the copy has 64 bytes, the most that an operand has.
    unsafe { execute(cpu, op, copy.0.as_mut_ptr(), unmasked) }
}

/// A form that writes memory and no register.
fn store(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.hostexec.gate & op.extra == 0
        && let Some(mem) = direct(cpu, op, usize::from(op.size), true)
    {
        // SAFETY: `size` bytes can be written at the pointer, and the stub writes no more.
        unsafe { cpu.call_stub(op, mem)? };
        return Ok(Flow::Next);
    }
    store_slowly(cpu, op)
}

#[inline(never)]
fn store_slowly(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let unmasked = admitted(cpu, op)?;
    let lin = address(cpu, op, true)?;
    let (seg, size) = (cpu.op_seg(op), usize::from(op.size));
    let unchecked = op.extra & UNCHECKED != 0 && cpu.mmu.tlb.class() == Class::Checked;
    if !unchecked && let Err(abort) = check_small_alignment(cpu, op, lin) {
        return Err(store_nowhere(cpu, op, abort));
    }
    if unchecked {
        return store_copy(cpu, op, lin, unmasked).map(|()| Flow::Next);
    }
    match cpu.host_pointer(seg, lin, size, true) {
        // SAFETY: `size` bytes can be written at the pointer, and the stub writes no more.
        Ok(Some(mem)) => unsafe { execute(cpu, op, mem, unmasked)? },
        Ok(None) => store_copy(cpu, op, lin, unmasked)?,
        Err(abort) => return Err(store_nowhere(cpu, op, abort)),
    }
    Ok(Flow::Next)
}

/// A store that cannot be made. Before the processor finds that out, it has gone over to MMX (TOP = 0), or has
/// raised floating-point exceptions (VCVTPS2PH).
#[cold]
fn store_nowhere(cpu: &mut Cpu, op: &Op, abort: Abort) -> Abort {
    if op.extra & class::MMX != 0 {
        cpu.reset_top();
        return abort;
    }
    let fault = cpu.pending;
    if matches!(fault, Pending::Exception(_)) {
        let mut copy = Copy64([0; 64]);
        let unmasked = cpu.hostexec.gate & op.extra & class::FP != 0;
        // SAFETY: the copy has 64 bytes, the most that an operand has; stores write no register.
        if let Err(unmasked) = unsafe { execute(cpu, op, copy.0.as_mut_ptr(), unmasked) } {
            return unmasked;
        }
        cpu.pending = fault;
    }
    abort
}

#[cold]
fn store_copy(cpu: &mut Cpu, op: &Op, lin: u64, unmasked: bool) -> Result<(), Abort> {
    let mut copy = Copy64([0; 64]);
    let size = usize::from(op.size).min(64);
    // SAFETY: the copy has 64 bytes, the most that an operand has.
    unsafe { execute(cpu, op, copy.0.as_mut_ptr(), unmasked)? };
    match op.extra & UNCHECKED {
        0 => cpu.write_bytes(cpu.op_seg(op), lin, &copy.0[..size]),
        _ => vector_masked::write_part(cpu, cpu.op_seg(op), lin, &copy.0[..size]),
    }
}

/// Registers that VZEROUPPER and VZEROALL reach.
fn reachable(cpu: &Cpu) -> usize {
    if cpu.state.code_size == crate::state::CodeSize::Bits64 { 16 } else { 8 }
}

fn zero_upper(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let count = reachable(cpu);
    for zmm in &mut cpu.state.zmm[..count] {
        zmm.0[16..].fill(0);
    }
    Ok(Flow::Next)
}

fn zero_all(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let count = reachable(cpu);
    for zmm in &mut cpu.state.zmm[..count] {
        zmm.0.fill(0);
    }
    Ok(Flow::Next)
}

fn load_mxcsr(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let lin = cpu.ea(op, 4, false)?;
    let value = cpu.load::<u32>(cpu.op_seg(op), lin)?;
    if value & !MXCSR_DEFINED != 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    cpu.set_mxcsr(value);
    Ok(Flow::Next)
}

fn store_mxcsr(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let lin = cpu.ea(op, 4, true)?;
    let value = cpu.mxcsr();
    cpu.store::<u32>(cpu.op_seg(op), lin, value)?;
    Ok(Flow::Next)
}
