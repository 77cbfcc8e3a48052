//! x87 instructions, run by the host's FPU (see [`crate::hostexec::x87`]).
//!
//! Everything but the state images is a stub around the very instruction. The guest's instruction pointer is
//! noted here, because the host's means nothing to the guest; the opcode and the data pointer are noted when
//! an unmasked exception arises, as on processors with FDP_EXCPTN_ONLY (SDM vol. 1, 8.1.8).
//!
//! CR0.NE = 0 (FERR# to an external interrupt controller) is taken for 1, as in VMX operation, where CR0.NE is
//! fixed to 1 (SDM vol. 3C, A.7).
#![expect(unsafe_code, reason = "calls stubs with pointers to guest memory")]

use std::ptr;

use iced_x86::{Encoder, EncodingKind, Instruction, Mnemonic, OpCodeTableKind};

use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::{Cpu, Pending};
use crate::exception::{Abort, Exception, vector};
use crate::exec::fpu_image;
use crate::exec::vector::{check_small_alignment, direct, is_store, memory_operand};
use crate::hostexec::stub::Stub;
use crate::hostexec::x87::{FSW_ES, fnstsw};
use crate::hostexec::{class, make_room};
use crate::state::{Seg, cr0};

/// Position of the opcode (FOP) in [`Op::extra`].
const FOP: u32 = 16;
/// Exceptions that keep a store from being done: all but precision.
const NO_STORE: u16 = 0x1f;
/// Bytes in a page.
const PAGE: u64 = 4096;

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    if !is_x87(ins) {
        return None;
    }
    let base = |handler: Handler| {
        let fop = opcode(ins, ctx.code_size.bits());
        Op { extra: class::X87 | u32::from(fop) << FOP, ..op_base(ins, ctx, handler) }
    };
    if ins.mnemonic() == Mnemonic::Wait {
        return Some(base(wait));
    }
    if let Some(handler) = fpu_image::handler(ins.mnemonic()) {
        let mut op = base(handler);
        op.size = u8::try_from(ins.memory_size().size()).ok()?;
        return Some(op);
    }
    let imm = match ctx.stubs.get(ins) {
        Stub::At(address) => address,
        Stub::Full => return Some(base(make_room)),
        Stub::Impossible => return None,
    };
    let memory = memory_operand(ins);
    let stores = memory.is_some_and(|operand| is_store(ins, operand));
    let handler: Handler = match (ins.mnemonic(), memory.is_some(), stores) {
        (Mnemonic::Fninit, ..) => initialize,
        (Mnemonic::Fnclex | Mnemonic::Fneni | Mnemonic::Fndisi | Mnemonic::Fnsetpm, ..) => control,
        (Mnemonic::Fnstsw | Mnemonic::Fnstcw, false, _) => control,
        (Mnemonic::Fnstsw | Mnemonic::Fnstcw, true, _) => control_store,
        (Mnemonic::Fldcw, ..) => load_control,
        (_, false, _) => register,
        (_, true, false) => load,
        (_, true, true) => store,
    };
    let size = u8::try_from(ins.memory_size().size()).ok()?;
    Some(Op { imm, size, ..base(handler) })
}

/// Opcodes D8 to DF, and 9B.
pub(crate) fn is_x87(ins: &Instruction) -> bool {
    let code = ins.op_code();
    let first = if code.op_code_len() == 2 { code.op_code() >> 8 } else { code.op_code() };
    ins.encoding() == EncodingKind::Legacy
        && code.table() == OpCodeTableKind::Normal
        && (matches!(first, 0xd8..=0xdf) || ins.mnemonic() == Mnemonic::Wait)
}

/// What FOP holds for `ins`: the low three bits of the first opcode byte, then the second byte.
fn opcode(ins: &Instruction, bits: u32) -> u16 {
    let mut encoder = Encoder::new(bits);
    if encoder.encode(ins, ins.ip()).is_err() {
        return 0;
    }
    let bytes = encoder.take_buffer();
    let at = bytes.iter().position(|byte| matches!(byte, 0xd8..=0xdf));
    match at.map(|i| (bytes.get(i), bytes.get(i + 1))) {
        Some((Some(first), Some(second))) => u16::from(first & 7) << 8 | u16::from(*second),
        _ => 0,
    }
}

/// Checks that a waiting instruction may run; true if exceptions are unmasked.
#[inline(always)]
fn admitted(cpu: &mut Cpu) -> Result<bool, Abort> {
    if cpu.hostexec.gate & class::X87 == 0 {
        return Ok(false);
    }
    cpu.admit(class::X87)?;
    Ok(cpu.hostexec.gate & class::X87 != 0)
}

/// Checks that a control instruction, which does not wait, may run, and loads the FPU.
pub(super) fn admitted_nowait(cpu: &mut Cpu) -> Result<(), Abort> {
    if cpu.hostexec.gate & class::X87 == 0 {
        return Ok(());
    }
    if cpu.state.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(cpu.raise(Exception::NM));
    }
    cpu.load_x87();
    Ok(())
}

/// The pointers of the last non-control instruction: FIP, FDP, FCS, FDS.
type Pointers = (u64, u64, u16, u16);

/// Notes the instruction pointer of a non-control instruction, before it runs; the pointers before.
#[inline(always)]
fn note_pointer(cpu: &mut Cpu, op: &Op) -> Pointers {
    let x87 = &cpu.state.x87;
    let before = (x87.fip, x87.fdp, x87.fcs, x87.fds);
    cpu.state.x87.fip = cpu.ip_of(op);
    if cpu.hostexec.x87_data_pointer | cpu.hostexec.x87_selectors {
        note_older(cpu, op);
    }
    before
}

/// What processors before the SDM's FDP_EXCPTN_ONLY and the deprecation of FCS and FDS note.
#[cold]
fn note_older(cpu: &mut Cpu, op: &Op) {
    if cpu.hostexec.x87_selectors {
        cpu.state.x87.fcs = cpu.state.segs[Seg::Cs as usize].selector;
    }
    if cpu.hostexec.x87_data_pointer {
        note_data_pointer(cpu, op);
    }
}

fn note_data_pointer(cpu: &mut Cpu, op: &Op) {
    if op.seg < 6 {
        cpu.state.x87.fdp = cpu.offset(op) & op.addr_mask();
        if cpu.hostexec.x87_selectors {
            cpu.state.x87.fds = cpu.state.segs[usize::from(op.seg)].selector;
        }
    }
}

/// After an instruction with exceptions unmasked: notes what raised one.
#[cold]
fn note_exception(cpu: &mut Cpu, op: &Op) {
    if fnstsw() & FSW_ES != 0 {
        cpu.state.x87.fop = (op.extra >> FOP) as u16 & 0x7ff;
        note_data_pointer(cpu, op);
    }
}

/// A form without memory operand.
fn register(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let unmasked = admitted(cpu)?;
    note_pointer(cpu, op);
    // SAFETY: `lower` gave the operation its stub; there is no memory operand.
    unsafe { cpu.call_stub(op, ptr::null_mut())? };
    if unmasked {
        note_exception(cpu, op);
    }
    Ok(Flow::Next)
}

/// A form that reads memory.
fn load(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.hostexec.gate & class::X87 == 0
        && let Some(mem) = direct(cpu, op, usize::from(op.size), false)
    {
        // SAFETY: `size` bytes can be read at the pointer, and the stub reads no more.
        unsafe { cpu.call_stub(op, mem)? };
        note_pointer(cpu, op);
        return Ok(Flow::Next);
    }
    load_slowly(cpu, op)
}

#[inline(never)]
fn load_slowly(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let unmasked = admitted(cpu)?;
    load_operand(cpu, op)?;
    note_pointer(cpu, op);
    if unmasked {
        note_exception(cpu, op);
    }
    Ok(Flow::Next)
}

#[inline(always)]
fn load_operand(cpu: &mut Cpu, op: &Op) -> Result<(), Abort> {
    let size = usize::from(op.size);
    let lin = cpu.ea(op, size, false)?;
    match cpu.host_pointer(cpu.op_seg(op), lin, size, false)? {
        Some(mem) => {
            // SAFETY: `size` bytes can be read at the pointer, and the stub reads no more.
            unsafe { cpu.call_stub(op, mem)? };
        }
        None => {
            let mut copy = [0u8; 16];
            cpu.read_bytes(cpu.op_seg(op), lin, &mut copy[..size.min(16)])?;
            // SAFETY: the copy is as long as the longest operand, ten bytes.
            unsafe { cpu.call_stub(op, copy.as_mut_ptr())? };
        }
    }
    Ok(())
}

/// A form that writes memory.
fn store(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if cpu.hostexec.gate & class::X87 == 0
        && let Some(mem) = direct(cpu, op, usize::from(op.size), true)
    {
        // SAFETY: `size` bytes can be written at the pointer, and the stub writes no more.
        unsafe { cpu.call_stub(op, mem)? };
        note_pointer(cpu, op);
        return Ok(Flow::Next);
    }
    store_slowly(cpu, op)
}

#[inline(never)]
fn store_slowly(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let unmasked = admitted(cpu)?;
    let pointers = note_pointer(cpu, op);
    cpu.sync_x87();
    let before = cpu.state.x87;
    cpu.load_x87();
    let mut copy = [0u8; 16];
    // SAFETY: the copy is as long as the longest operand, ten bytes.
    unsafe { cpu.call_stub(op, copy.as_mut_ptr())? };
    // With an unmasked exception nothing is stored, and the operand's address does not matter.
    if !(unmasked && fnstsw() & !cpu.state.x87.fcw & NO_STORE != 0)
        && let Err(abort) = store_copy(cpu, op, &copy)
    {
        cpu.set_x87(before);
        let x87 = &mut cpu.state.x87;
        (x87.fip, x87.fdp, x87.fcs, x87.fds) = pointers;
        return Err(abort);
    }
    if unmasked {
        note_exception(cpu, op);
    }
    Ok(Flow::Next)
}

fn store_copy(cpu: &mut Cpu, op: &Op, copy: &[u8; 16]) -> Result<(), Abort> {
    let (seg, size) = (cpu.op_seg(op), usize::from(op.size).min(16));
    let lin = cpu.ea(op, size, true)?;
    check_small_alignment(cpu, op, lin)?;
    let written = cpu.write_bytes(seg, lin, &copy[..size]);
    if matches!(cpu.pending, Pending::Exception(e) if e.vector == vector::PF) && written.is_err() {
        store_first_eight(cpu, op, lin, copy);
    }
    written
}

/// Ten bytes are stored as eight and two: where the two miss their page, the eight are stored all the same.
fn store_first_eight(cpu: &mut Cpu, op: &Op, lin: u64, copy: &[u8; 16]) {
    let fault = cpu.pending;
    let here = PAGE - (lin & (PAGE - 1));
    if op.size == 10 && (8..10).contains(&here) {
        // If that fails too, nothing has been stored, and the first fault stands.
        let _ = cpu.write_bytes(cpu.op_seg(op), lin, &copy[..8]);
    }
    cpu.pending = fault;
}

/// FNCLEX, FNSTSW AX and the 8087's and 80287's no-operations.
fn control(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted_nowait(cpu)?;
    // SAFETY: `lower` gave the operation its stub; there is no memory operand.
    unsafe { cpu.call_stub(op, ptr::null_mut())? };
    Ok(Flow::Next)
}

/// FNSTCW and FNSTSW to memory.
fn control_store(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted_nowait(cpu)?;
    let lin = cpu.ea(op, 2, true)?;
    let mut word = [0u8; 2];
    // SAFETY: the operand has two bytes.
    unsafe { cpu.call_stub(op, word.as_mut_ptr())? };
    cpu.store::<u16>(cpu.op_seg(op), lin, u16::from_le_bytes(word))?;
    Ok(Flow::Next)
}

/// FNINIT.
fn initialize(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted_nowait(cpu)?;
    // SAFETY: `lower` gave the operation its stub; there is no memory operand.
    unsafe { cpu.call_stub(op, ptr::null_mut())? };
    let x87 = &mut cpu.state.x87;
    (x87.fip, x87.fdp, x87.fop, x87.fcs, x87.fds) = (0, 0, 0, 0, 0);
    cpu.x87_control_changed();
    Ok(Flow::Next)
}

/// FLDCW.
fn load_control(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu)?;
    load_operand(cpu, op)?;
    cpu.x87_control_changed();
    Ok(Flow::Next)
}

/// WAIT: #NM if CR0.MP and CR0.TS, then #MF if an exception is pending.
fn wait(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    if cpu.state.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
        return Err(cpu.raise(Exception::NM));
    }
    if cpu.x87_exception_pending() {
        return Err(cpu.raise(Exception::MF));
    }
    Ok(Flow::Next)
}
