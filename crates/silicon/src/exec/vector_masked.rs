//! Memory operands of which only a part is accessed: AVX-512 masking with its fault suppression, expand and
//! compress, VMASKMOV, VPMASKMOV and MASKMOVDQU.
//!
//! Elements that a mask leaves out cannot fault. As long as the whole operand is plain memory there is nothing
//! to suppress; otherwise the elements are moved one by one between guest memory and a copy of the operand.
#![expect(unsafe_code, reason = "calls stubs with pointers to guest memory")]

use iced_x86::{CodeSize, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use crate::code::lower::seg_index;
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::{Cpu, Pending};
use crate::exception::{Abort, Exception};
use crate::exec::vector::{
    Copy64, UNCHECKED, address, admitted, check_small_alignment, execute, memory_operand,
};
use crate::mmu::tlb::Class;
use crate::state::{Seg, reg};

/// How mask bits stand for parts of the memory operand; two bits of [`Op::extra`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Shape {
    /// Bit i: element i.
    Elements = 0,
    /// Any bit: all of it (embedded broadcasts).
    Whole = 1,
    /// As many elements as bits are set, from the start (expand and compress).
    Packed = 2,
    /// Bit i: element i modulo their number (broadcasts of several elements).
    Repeated = 3,
}

/// Position of the shape in [`Op::extra`].
const SHAPE: u32 = 8;
/// Bit of [`Op::extra`]: the whole operand must be accessible whatever the mask.
const NO_SUPPRESSION: u32 = 1 << 10;
/// Position of the number of mask bits.
const COUNT: u32 = 16;
/// [`Op::r0`]: the mask is the sign bits of this vector register, not a mask register.
const SIGN_MASK: u8 = 0x40;

/// The accessed parts of one operand.
struct Parts {
    mask: u64,
    count: u32,
    shape: Shape,
    /// Bytes per element.
    element: usize,
    size: usize,
}

impl Parts {
    fn of(cpu: &Cpu, op: &Op) -> Parts {
        let count = (op.extra >> COUNT) & 0x7f;
        let element = 1 << (op.r1 & 7);
        let all = if count >= 64 { u64::MAX } else { (1 << count) - 1 };
        let mask = all
            & if op.r0 & SIGN_MASK != 0 {
                signs(&cpu.state.zmm[usize::from(op.r0 & 31)].0, element)
            } else {
                cpu.state.k[usize::from(op.r0 & 7)]
            };
        let shape = match (op.extra >> SHAPE) & 3 {
            0 => Shape::Elements,
            1 => Shape::Whole,
            2 => Shape::Packed,
            _ => Shape::Repeated,
        };
        Parts { mask, count, shape, element, size: usize::from(op.size).min(64) }
    }

    /// Offset and length of each accessed part.
    fn ranges(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (mask, element, size) = match self.shape {
            Shape::Elements => (self.mask, self.element, self.size),
            Shape::Whole => (u64::from(self.mask != 0), self.size, self.size),
            Shape::Repeated => (fold(self.mask, self.size / self.element), self.element, self.size),
            Shape::Packed => {
                let set = self.mask.count_ones();
                (if set >= 64 { u64::MAX } else { (1 << set) - 1 }, self.element, self.size)
            }
        };
        let count = self.count as usize;
        (0..count.clamp(1, 64))
            .filter(move |i| mask & (1 << i) != 0)
            .map(move |i| (i * element, element))
            .filter(move |(at, length)| at + length <= size)
    }
}

/// The groups of `width` bits of `mask`, merged.
fn fold(mask: u64, width: usize) -> u64 {
    let width = width.clamp(1, 32);
    (0..64).step_by(width).fold(0, |merged, at| merged | mask >> at) & ((1 << width) - 1)
}

/// Sign bits of the elements, as a mask.
fn signs(register: &[u8; 64], element: usize) -> u64 {
    let tops = register.chunks_exact(element).map(|e| e[element - 1] >> 7);
    tops.enumerate().fold(0, |mask, (i, top)| mask | u64::from(top) << i)
}

/// MASKMOVQ, MASKMOVDQU (the address is DS:rDI, bytes) and VMASKMOV, VPMASKMOV (elements by sign).
pub(super) fn lower_implicit(ins: &Instruction, base: Op) -> Option<Op> {
    use Mnemonic::*;
    match ins.mnemonic() {
        Maskmovq | Maskmovdqu | Vmaskmovdqu => Some(lower_maskmovdqu(ins, base)),
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq => {
            let wide = matches!(ins.mnemonic(), Vmaskmovpd | Vpmaskmovq);
            let stores = memory_operand(ins) == Some(0);
            let size = ins.memory_size().size() as u8;
            let element_shift = if wide { 3 } else { 2 };
            let count = u32::from(size >> element_shift);
            let data = ins.op_register(if stores { 2 } else { 0 }).number() as u8;
            let handler: Handler = if stores { maskmov_store } else { maskmov_load };
            let mut op = Op { size, r0: SIGN_MASK | ins.op_register(1).number() as u8, ..base };
            op.handler.set(handler);
            (op.r1, op.imm) = (element_shift, u64::from(data));
            op.extra |= count << COUNT;
            Some(op)
        }
        _ => None,
    }
}

fn lower_maskmovdqu(ins: &Instruction, base: Op) -> Op {
    let mut op = base;
    op.handler.set(if ins.mnemonic() == Mnemonic::Maskmovq { maskmovq } else { maskmovdqu });
    op.imm = ins.op_register(1).number() as u64;
    op.r0 = SIGN_MASK | ins.op_register(2).number() as u8;
    op.size = if ins.mnemonic() == Mnemonic::Maskmovq { 8 } else { 16 };
    op.extra |= u32::from(op.size) << COUNT;
    // In 64-bit mode only FS and GS can take the place of DS.
    let segment = match (ins.code_size(), ins.memory_segment()) {
        (CodeSize::Code64, segment) if !matches!(segment, Register::FS | Register::GS) => Register::DS,
        (_, segment) => segment,
    };
    (op.base, op.seg) = (reg::RDI, seg_index(segment));
    match ins.op_kind(0) {
        OpKind::MemorySegDI => op.flags |= Op::ADDR16 | Op::SLOW_EA,
        OpKind::MemorySegEDI => op.flags |= Op::ADDR32 | Op::SLOW_EA,
        _ => {}
    }
    op
}

/// Makes `op`, lowered as a plain load or store, one with fault suppression if `ins` has a mask.
pub(super) fn lower_masked(ins: &Instruction, stores: bool, mut op: Op) -> Op {
    let suppresses = suppresses_faults(ins);
    let partial = stores || suppresses;
    if ins.encoding() != EncodingKind::EVEX || !ins.has_op_mask() || !partial {
        return op;
    }
    let element = element_size(ins);
    let name = ins.mnemonic();
    let shape = if is_packed(name) {
        Shape::Packed
    } else if ins.is_broadcast() {
        Shape::Whole
    } else if is_broadcast(name) {
        Shape::Repeated
    } else {
        Shape::Elements
    };
    let count = match shape {
        Shape::Whole | Shape::Repeated => vector_length(ins) / element,
        _ => usize::from(op.size) / element,
    };
    op.handler.set(if stores { masked_store } else { masked_load });
    op.r0 = ins.op_mask().number() as u8;
    op.r1 = element.trailing_zeros() as u8;
    op.extra |= (shape as u32) << SHAPE | (count.clamp(1, 64) as u32) << COUNT;
    op.extra |= if suppresses { 0 } else { NO_SUPPRESSION };
    op
}

/// Bytes of EVEX.L'L.
fn vector_length(ins: &Instruction) -> usize {
    16 << ins.op_code().l().min(2)
}

/// Bytes of memory that one mask bit stands for. The element that iced names is right but where an instruction
/// multiplies parts of its elements, or broadcasts to wider ones.
fn element_size(ins: &Instruction) -> usize {
    use Mnemonic::*;
    match ins.mnemonic() {
        Vpmuldq | Vpmuludq => 8,
        Vpshufbitqmb => 1,
        Vpdpbusd | Vpdpbusds | Vpdpwssd | Vpdpwssds | Vdpbf16ps => 4,
        // Complex numbers.
        Vfmaddcph | Vfcmaddcph | Vfmulcph | Vfcmulcph | Vfmaddcsh | Vfcmaddcsh | Vfmulcsh | Vfcmulcsh => 4,
        Vcvtps2pd | Vcvtps2qq | Vcvtps2uqq | Vcvttps2qq | Vcvttps2uqq | Vcvtdq2pd | Vcvtudq2pd
        | Vcvtph2pd | Vcvtph2qq | Vcvtph2uqq | Vcvttph2qq | Vcvttph2uqq
            if ins.is_broadcast() =>
        {
            8
        }
        Vcvtph2psx | Vcvtph2dq | Vcvtph2udq | Vcvttph2dq | Vcvttph2udq if ins.is_broadcast() => 4,
        _ => ins.memory_size().element_size().clamp(1, 8),
    }
}

fn is_packed(name: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(name, Vcompressps | Vcompresspd | Vexpandps | Vexpandpd)
        || matches!(name, Vpcompressb | Vpcompressw | Vpcompressd | Vpcompressq)
        || matches!(name, Vpexpandb | Vpexpandw | Vpexpandd | Vpexpandq)
}

fn is_broadcast(name: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(name, Vbroadcastss | Vbroadcastsd | Vpbroadcastb | Vpbroadcastw | Vpbroadcastd | Vpbroadcastq)
        || matches!(name, Vbroadcastf32x2 | Vbroadcastf32x4 | Vbroadcastf32x8 | Vbroadcastf64x2)
        || matches!(name, Vbroadcastf64x4 | Vbroadcasti32x2 | Vbroadcasti32x4 | Vbroadcasti32x8)
        || matches!(name, Vbroadcasti64x2 | Vbroadcasti64x4)
}

/// Whether masked-out elements cannot fault: all but the exception types whose names end in NF
/// (SDM vol. 2A, table 2-44 ff.), which read the whole operand.
fn suppresses_faults(ins: &Instruction) -> bool {
    use Mnemonic::*;
    let name = ins.mnemonic();
    let permutes = matches!(name, Valignd | Valignq | Vpalignr | Vpshufb | Vpshufd | Vpshufhw | Vpshuflw)
        || matches!(name, Vpermb | Vpermw | Vpermd | Vpermq | Vpermps | Vpermpd | Vpermilps | Vpermilpd)
        || matches!(name, Vpermi2b | Vpermi2w | Vpermi2d | Vpermi2q | Vpermi2ps | Vpermi2pd)
        || matches!(name, Vpermt2b | Vpermt2w | Vpermt2d | Vpermt2q | Vpermt2ps | Vpermt2pd)
        || matches!(name, Vshufps | Vshufpd | Vshuff32x4 | Vshuff64x2 | Vshufi32x4 | Vshufi64x2)
        || matches!(name, Vunpcklps | Vunpckhps | Vunpcklpd | Vunpckhpd | Vmovddup | Vmovshdup | Vmovsldup)
        || matches!(name, Vpunpcklbw | Vpunpcklwd | Vpunpckldq | Vpunpcklqdq)
        || matches!(name, Vpunpckhbw | Vpunpckhwd | Vpunpckhdq | Vpunpckhqdq);
    let packs = matches!(name, Vpacksswb | Vpackssdw | Vpackuswb | Vpackusdw)
        || matches!(name, Vpmaddubsw | Vpmaddwd | Vdbpsadbw | Vpmultishiftqb)
        || matches!(name, Vgf2p8affineqb | Vgf2p8affineinvqb | Vpconflictd | Vpconflictq | Vcvtne2ps2bf16);
    // Shifts by a count in memory; those of a memory operand by an immediate count do.
    let shifts = ins.op2_kind() == OpKind::Memory
        && matches!(name, Vpsllw | Vpslld | Vpsllq | Vpsrlw | Vpsrld | Vpsrlq | Vpsraw | Vpsrad | Vpsraq);
    let inserts = matches!(name, Vinsertf32x4 | Vinsertf32x8 | Vinsertf64x2 | Vinsertf64x4)
        || matches!(name, Vinserti32x4 | Vinserti32x8 | Vinserti64x2 | Vinserti64x4)
        || matches!(name, Vextractf32x4 | Vextractf32x8 | Vextractf64x2 | Vextractf64x4)
        || matches!(name, Vextracti32x4 | Vextracti32x8 | Vextracti64x2 | Vextracti64x4);
    !(permutes || packs || shifts || inserts)
}

/// Linear address of `length` bytes at `at` in the memory operand.
fn part_address(cpu: &mut Cpu, op: &Op, at: usize, length: usize, write: bool) -> Result<u64, Abort> {
    let offset = cpu.offset(op).wrapping_add(at as u64) & op.addr_mask();
    if op.has(Op::SLOW_EA) {
        return cpu.linearize(cpu.op_seg(op), offset, length, write);
    }
    Ok(offset.wrapping_add(cpu.state.ea_base[usize::from(op.seg & 7)]))
}

/// Reads a part of an operand. Parts are not alignment-checked.
pub(super) fn read_part(cpu: &mut Cpu, seg: Seg, lin: u64, out: &mut [u8]) -> Result<(), Abort> {
    if cpu.mmu.tlb.class() != Class::Checked {
        return cpu.read_bytes(seg, lin, out);
    }
    for (i, byte) in out.iter_mut().enumerate() {
        cpu.read_bytes(seg, lin.wrapping_add(i as u64), std::slice::from_mut(byte))?;
    }
    Ok(())
}

/// Writes a part of an operand, all of it or nothing.
pub(super) fn write_part(cpu: &mut Cpu, seg: Seg, lin: u64, part: &[u8]) -> Result<(), Abort> {
    if cpu.mmu.tlb.class() != Class::Checked {
        return cpu.write_bytes(seg, lin, part);
    }
    cpu.probe(seg, lin, part.len(), true)?;
    for (i, byte) in part.iter().enumerate() {
        cpu.write_bytes(seg, lin.wrapping_add(i as u64), std::slice::from_ref(byte))?;
    }
    Ok(())
}

/// Linear address of the operand.
fn unchecked_address(cpu: &Cpu, op: &Op) -> u64 {
    let base = cpu.state.ea_base[usize::from(op.seg & 7)];
    (cpu.offset(op) & op.addr_mask()).wrapping_add(base)
}

/// Direct pointer to the whole operand, if nothing stands in the way.
fn whole(cpu: &mut Cpu, op: &Op, write: bool) -> Option<*mut u8> {
    let pointer = address(cpu, op, write)
        .and_then(|lin| cpu.host_pointer(cpu.op_seg(op), lin, usize::from(op.size), write));
    if pointer.is_err() {
        cpu.pending = Pending::None;
    }
    pointer.ok().flatten()
}

/// #GP for a misaligned operand of an aligned form, if any of it is accessed.
fn check_alignment(cpu: &mut Cpu, op: &Op) -> Result<(), Abort> {
    if Parts::of(cpu, op).mask == 0 {
        return Ok(());
    }
    let lin = unchecked_address(cpu, op);
    if op.extra & UNCHECKED == 0 {
        check_small_alignment(cpu, op, lin)?;
    }
    if lin & u64::from(op.r2) != 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    Ok(())
}

fn read_parts(cpu: &mut Cpu, op: &Op, parts: &Parts, copy: &mut Copy64) -> Result<(), Abort> {
    for (at, length) in parts.ranges() {
        let lin = part_address(cpu, op, at, length, false)?;
        read_part(cpu, cpu.op_seg(op), lin, &mut copy.0[at..at + length])?;
    }
    Ok(())
}

/// Writes all accessed parts, or none if one faults.
fn write_parts(cpu: &mut Cpu, op: &Op, parts: &Parts, copy: &Copy64) -> Result<(), Abort> {
    for (at, length) in parts.ranges() {
        let lin = part_address(cpu, op, at, length, true)?;
        cpu.probe(cpu.op_seg(op), lin, length, true)?;
    }
    for (at, length) in parts.ranges() {
        let lin = part_address(cpu, op, at, length, true)?;
        write_part(cpu, cpu.op_seg(op), lin, &copy.0[at..at + length])?;
    }
    Ok(())
}

fn masked_load(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let unmasked = admitted(cpu, op)?;
    check_alignment(cpu, op)?;
    if let Some(mem) = whole(cpu, op, false) {
        // SAFETY: the whole operand can be read there.
        unsafe { execute(cpu, op, mem, unmasked)? };
        return Ok(Flow::Next);
    }
    let mut copy = Copy64([0; 64]);
    let parts = Parts::of(cpu, op);
    read_parts(cpu, op, &parts, &mut copy)?;
    // SAFETY: the copy has 64 bytes, the most that an operand has.
    unsafe { execute(cpu, op, copy.0.as_mut_ptr(), unmasked)? };
    Ok(Flow::Next)
}

fn masked_store(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let unmasked = admitted(cpu, op)?;
    check_alignment(cpu, op)?;
    if let Some(mem) = whole(cpu, op, true) {
        // SAFETY: the whole operand can be written there.
        unsafe { execute(cpu, op, mem, unmasked)? };
        return Ok(Flow::Next);
    }
    if op.extra & NO_SUPPRESSION != 0 {
        let lin = address(cpu, op, true)?;
        cpu.probe(cpu.op_seg(op), lin, usize::from(op.size), true)?;
    }
    let mut copy = Copy64([0; 64]);
    let parts = Parts::of(cpu, op);
    // SAFETY: the copy has 64 bytes, the most that an operand has.
    unsafe { execute(cpu, op, copy.0.as_mut_ptr(), unmasked)? };
    write_parts(cpu, op, &parts, &copy)?;
    Ok(Flow::Next)
}

/// VMASKMOV, VPMASKMOV from memory: elements that are left out become zero.
fn maskmov_load(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let parts = Parts::of(cpu, op);
    let mut copy = Copy64([0; 64]);
    read_parts(cpu, op, &parts, &mut copy)?;
    cpu.state.zmm[(op.imm & 31) as usize].0 = copy.0;
    Ok(Flow::Next)
}

/// VMASKMOV, VPMASKMOV to memory.
fn maskmov_store(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let parts = Parts::of(cpu, op);
    let copy = Copy64(cpu.state.zmm[(op.imm & 31) as usize].0);
    write_parts(cpu, op, &parts, &copy)?;
    Ok(Flow::Next)
}

/// MASKMOVDQU. Bytes that are left out may fault all the same, and do.
fn maskmovdqu(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let lin = cpu.ea(op, usize::from(op.size), true)?;
    if lin & 7 != 0 && cpu.mmu.tlb.class() == Class::Checked {
        cpu.checked(cpu.op_seg(op), lin)?;
        return Err(cpu.raise(Exception::AC));
    }
    // It is done in two halves, the upper one first. Each byte's address wraps at the address size.
    for at in (8..16).chain(0..8) {
        let lin = part_address(cpu, op, at, 1, true)?;
        cpu.probe(cpu.op_seg(op), lin, 1, true)?;
    }
    maskmov_store(cpu, op)
}

/// MASKMOVQ: the same with MMX registers.
fn maskmovq(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    admitted(cpu, op)?;
    let (data, mask) = (cpu.mmx((op.imm & 7) as usize), cpu.mmx(usize::from(op.r0 & 7)));
    let mut copy = Copy64([0; 64]);
    copy.0[..8].copy_from_slice(&data);
    let mask = (0..8).fold(0, |m, i| m | u64::from(mask[i] >> 7) << i);
    let parts = Parts { mask, count: 8, shape: Shape::Elements, element: 1, size: 8 };
    // The host goes over to MMX before it stores, and stays there if the store faults.
    cpu.enter_mmx();
    let lin = cpu.ea(op, 8, true)?;
    check_small_alignment(cpu, op, lin)?;
    cpu.probe(cpu.op_seg(op), lin, 8, true)?;
    write_parts(cpu, op, &parts, &copy)?;
    Ok(Flow::Next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    /// What one mask bit stands for was taken from the memory operand's elements alone. Found on a processor with AVX512-FP16.
    #[test]
    fn mask_bits_of_half_precision_stand_for_results_and_complex_numbers() {
        let decode = |code: &[u8]| Decoder::new(64, code, DecoderOptions::NONE).decode();
        for (code, element) in [
            // vcvtph2psx xmm15{k7}, [rbx]{1to4}
            (&[0x62, 0x76, 0x7d, 0x1f, 0x13, 0x3b][..], 4),
            // vcvtph2uqq ymm26{k4}{z}, [rax*8]{1to4}
            (&[0x62, 0x65, 0x7d, 0xbc, 0x79, 0x14, 0xc5, 0, 0, 0, 0], 8),
            // vfcmulcsh xmm3{k7}{z}, xmm30, [r8]
            (&[0x62, 0xd6, 0x0f, 0xc7, 0xd7, 0x18], 4),
        ] {
            assert_eq!(element_size(&decode(code)), element, "{code:x?}");
        }
        // vcvtne2ps2bf16 ymm31{k5}{z}, ymm28, [20003fe9h]: its mask suppresses nothing.
        assert!(!suppresses_faults(&decode(&[0x62, 0x62, 0x1f, 0xa5, 0x72, 0x3d, 0xe3, 0x25, 0, 0x10])));
    }
}
