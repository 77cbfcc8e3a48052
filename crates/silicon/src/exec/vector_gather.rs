//! Gathers and scatters: one access per element, lowest first. The mask bit of an element is cleared when the
//! element is done, so that after a fault the instruction goes on where it stopped (SDM vol. 2C, VPGATHERDD).

use iced_x86::{EncodingKind, Instruction, Mnemonic, Register};

use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::exec::vector::admitted;
use crate::exec::vector_masked::{read_part, write_part};

/// [`Op::flags`] is full; these are bits of [`Op::extra`].
const QWORD_INDEX: u32 = 1 << 8;
/// Elements of eight bytes.
const QWORD_DATA: u32 = 1 << 9;

/// Bytes of an index and of an element.
fn sizes(name: Mnemonic) -> Option<(usize, usize)> {
    use Mnemonic::*;
    Some(match name {
        Vpgatherdd | Vgatherdps | Vpscatterdd | Vscatterdps => (4, 4),
        Vpgatherdq | Vgatherdpd | Vpscatterdq | Vscatterdpd => (4, 8),
        Vpgatherqd | Vgatherqps | Vpscatterqd | Vscatterqps => (8, 4),
        Vpgatherqq | Vgatherqpd | Vpscatterqq | Vscatterqpd => (8, 8),
        _ => return None,
    })
}

/// r0: data register; r1: index register; r2: mask (vector register or k); size: elements; imm: bytes of the
/// longer of data and index register.
pub(super) fn lower(ins: &Instruction, base: Op) -> Option<Op> {
    let (index_size, data_size) = sizes(ins.mnemonic())?;
    let scatters = ins.op0_register() == Register::None;
    let data = if scatters { ins.op1_register() } else { ins.op0_register() };
    let index = ins.memory_index();
    let evex = ins.encoding() == EncodingKind::EVEX;
    let mask = if evex { ins.op_mask() } else { ins.op2_register() };
    let (d, i, m) = (data.number() as u8, index.number() as u8, mask.number() as u8);
    let clash = if evex { !scatters && d == i } else { d == i || d == m || i == m };
    if clash || mask == Register::None {
        return None;
    }
    let count = (index.size() / index_size).min(data.size() / data_size) as u8;
    let handler: Handler = match (scatters, evex) {
        (true, _) => scatter,
        (false, true) => gather_evex,
        (false, false) => gather_vex,
    };
    let imm = index.size().max(data.size()) as u64;
    let mut op = Op { imm, r0: d, r1: i, r2: m, size: count, ..base };
    op.handler.set(handler);
    op.extra |= if index_size == 8 { QWORD_INDEX } else { 0 } | if data_size == 8 { QWORD_DATA } else { 0 };
    Some(op)
}

/// Linear address of element `i`.
fn element_address(cpu: &mut Cpu, op: &Op, i: usize, write: bool) -> Result<u64, Abort> {
    let indices = &cpu.state.zmm[usize::from(op.r1 & 31)];
    let index =
        if op.extra & QWORD_INDEX != 0 { get(&indices.0, i, 8) } else { sign_extend(get(&indices.0, i, 4)) };
    let offset = cpu.offset(op).wrapping_add(index << (op.scale & 3)) & op.addr_mask();
    if op.has(Op::SLOW_EA) {
        return cpu.linearize(cpu.op_seg(op), offset, data_size(op), write);
    }
    Ok(offset.wrapping_add(cpu.state.ea_base[usize::from(op.seg & 7)]))
}

fn data_size(op: &Op) -> usize {
    if op.extra & QWORD_DATA != 0 { 8 } else { 4 }
}

fn sign_extend(value: u64) -> u64 {
    value as u32 as i32 as i64 as u64
}

/// Element `i` of `size` bytes.
fn get(register: &[u8; 64], i: usize, size: usize) -> u64 {
    let at = (i * size).min(64 - size);
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(&register[at..at + size]);
    u64::from_le_bytes(bytes)
}

fn put(register: &mut [u8; 64], i: usize, size: usize, value: u64) {
    let at = (i * size).min(64 - size);
    register[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
}

fn gather_element(cpu: &mut Cpu, op: &Op, i: usize) -> Result<(), Abort> {
    let (lin, seg) = (element_address(cpu, op, i, false)?, cpu.op_seg(op));
    let mut bytes = [0; 8];
    read_part(cpu, seg, lin, &mut bytes[..data_size(op)])?;
    let value = u64::from_le_bytes(bytes);
    put(&mut cpu.state.zmm[usize::from(op.r0 & 31)].0, i, data_size(op), value);
    let length = (op.imm as usize).min(64);
    cpu.state.zmm[usize::from(op.r0 & 31)].0[length..].fill(0);
    cpu.commit_bus();
    Ok(())
}

/// Zeroes what lies above the gathered elements. Above the vector length it is zero with the first of them.
fn zero_above(cpu: &mut Cpu, op: &Op) {
    let used = (usize::from(op.size) * data_size(op)).min(64);
    cpu.state.zmm[usize::from(op.r0 & 31)].0[used..].fill(0);
}

fn gather_evex(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let k = usize::from(op.r2 & 7);
    for i in 0..usize::from(op.size) {
        if cpu.state.k[k] & (1 << i) != 0 {
            gather_element(cpu, op, i)?;
            cpu.state.k[k] &= !(1 << i);
        }
    }
    cpu.state.k[k] = 0;
    zero_above(cpu, op);
    Ok(Flow::Next)
}

/// Makes each element of the mask all ones or all zeroes, and zeroes what has no element.
fn widen_mask(cpu: &mut Cpu, op: &Op) {
    let (mask, size) = (&mut cpu.state.zmm[usize::from(op.r2 & 31)].0, data_size(op));
    let length = (op.imm as usize).min(64);
    for i in 0..length / size {
        let set = get(mask, i, size) >> (8 * size - 1) != 0;
        put(mask, i, size, if set { u64::MAX } else { 0 });
    }
    mask[length..].fill(0);
}

fn gather_vex(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let (mask, size) = (usize::from(op.r2 & 31), data_size(op));
    widen_mask(cpu, op);
    for i in 0..usize::from(op.size) {
        if get(&cpu.state.zmm[mask].0, i, size) >> (8 * size - 1) != 0 {
            gather_element(cpu, op, i)?;
            put(&mut cpu.state.zmm[mask].0, i, size, 0);
        }
    }
    cpu.state.zmm[mask].0.fill(0);
    zero_above(cpu, op);
    Ok(Flow::Next)
}

fn scatter(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let (k, seg) = (usize::from(op.r2 & 7), cpu.op_seg(op));
    for i in 0..usize::from(op.size) {
        if cpu.state.k[k] & (1 << i) == 0 {
            continue;
        }
        let lin = element_address(cpu, op, i, true)?;
        let value = get(&cpu.state.zmm[usize::from(op.r0 & 31)].0, i, data_size(op));
        write_part(cpu, seg, lin, &value.to_le_bytes()[..data_size(op)])?;
        cpu.commit_bus();
        cpu.state.k[k] &= !(1 << i);
    }
    cpu.state.k[k] = 0;
    Ok(Flow::Next)
}
