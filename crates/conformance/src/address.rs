//! Memory operands: picks the linear address first, then registers, scale and displacement that give it.

use iced_x86::{MemorySize, Mnemonic, OpCodeOperandKind, OpKind, Register};

use crate::generate::Draft;
use crate::layout::{DATA, PAGE, WRITABLE};
use crate::rng::Rng;
use crate::values;

/// Bytes for operands whose size iced-x86 does not know: a whole XSAVE area.
const UNKNOWN_SIZE: u64 = 0xa80;

/// A stack pointer in the writable part of the data window.
pub(crate) fn stack_pointer(rng: &mut Rng) -> u64 {
    match rng.below(100) {
        0..70 => rng.range(WRITABLE.start + 0x200, WRITABLE.end - 0x200) & !15,
        70..85 => rng.range(WRITABLE.start + 0x200, WRITABLE.end - 0x200),
        85..88 => WRITABLE.start + rng.below(16),
        88..91 => WRITABLE.end - rng.below(24),
        91..96 => WRITABLE.start + PAGE + rng.below(32) - 16,
        96 => DATA + rng.below(10 * PAGE),
        97 => 1 << 47,
        _ => rng.range(WRITABLE.start + 0x200, WRITABLE.end - 0x200) & !7,
    }
}

/// Where an operand of `size` bytes goes: mostly into writable memory, sometimes to the edges of it.
pub(crate) fn place(rng: &mut Rng, size: u64, align: u64) -> u64 {
    let size = size.max(1);
    let room = WRITABLE.end - size;
    let aligned = |rng: &mut Rng| rng.range(WRITABLE.start, room + 1) & !(align - 1);
    let before = |rng: &mut Rng, edge: u64| edge - rng.range(0, size + 1);
    match rng.below(1000) {
        0..560 => aligned(rng).max(WRITABLE.start),
        560..800 => rng.range(WRITABLE.start, room + 1),
        800..850 => before(rng, WRITABLE.start + PAGE),
        850..900 => before(rng, WRITABLE.start + 2 * PAGE),
        900..930 => before(rng, WRITABLE.end),
        930..945 => before(rng, WRITABLE.start),
        945..950 => DATA + 4 * PAGE + rng.below(PAGE),
        950..962 => (DATA + 5 * PAGE + rng.below(PAGE - size.min(PAGE - 1))) & !(align - 1),
        962..970 => before(rng, DATA + 8 * PAGE),
        970..976 => before(rng, DATA + 9 * PAGE),
        976..980 => before(rng, DATA + 6 * PAGE),
        980..990 => 1 << 47 | aligned(rng),
        990..995 => (1u64 << 47).wrapping_sub(rng.range(0, size)) | 1 << 63,
        _ => aligned(rng),
    }
}

fn natural_alignment(size: u64) -> u64 {
    match size {
        0..=64 if size.is_power_of_two() => size,
        512 => 16,
        _ if size > 512 => 64,
        _ => 1,
    }
}

/// The linear address of the memory operand, and what lies there.
fn choose_target(draft: &mut Draft<'_>) -> u64 {
    let memory_size = draft.memory_size();
    let size = match memory_size {
        MemorySize::Unknown | MemorySize::Xsave | MemorySize::Xsave64 => UNKNOWN_SIZE,
        known => known.size() as u64,
    };
    let size =
        if draft.op.memory_size() == MemorySize::Unknown && !draft.op.is_save_restore() { 8 } else { size };
    let mut target = place(draft.rng, size, natural_alignment(size));
    // A locked access across cache lines is dear on the host: few of them.
    let locks = draft.ins.has_lock_prefix() || draft.ins.mnemonic() == Mnemonic::Xchg;
    if locks && target / 64 != (target + size - 1) / 64 && !draft.rng.percent(1) {
        target &= !(natural_alignment(size) - 1);
    }
    if size <= 128 {
        let mut bytes = vec![0; size as usize];
        let kind = values::Kind::of(memory_size).unwrap_or(draft.kind);
        values::fill(draft.rng, kind, &mut bytes);
        draft.patch(target, &bytes);
    }
    draft.target = Some(target);
    target
}

/// Picks a segment override and gives the segment's base.
fn segment(draft: &mut Draft<'_>, address32: bool) -> u64 {
    match draft.rng.below(100) {
        0..8 if draft.host.fsgsbase => {
            if address32 {
                draft.machine.fs_base = draft.rng.below(DATA);
            }
            draft.ins.set_segment_prefix(Register::FS);
            draft.machine.fs_base
        }
        8..14 if draft.host.fsgsbase => {
            draft.ins.set_segment_prefix(Register::GS);
            draft.machine.gs_base
        }
        14..18 => {
            let ignored = [Register::ES, Register::CS, Register::SS, Register::DS];
            draft.ins.set_segment_prefix(draft.rng.pick(&ignored));
            0
        }
        _ => 0,
    }
}

/// An ordinary memory operand. LOCK and broadcast are decided here.
pub(crate) fn memory(draft: &mut Draft<'_>, i: u32) {
    let op = draft.op;
    if op.can_use_lock_prefix() && i == 0 && draft.rng.percent(40) {
        draft.ins.set_has_lock_prefix(true);
    }
    if op.can_broadcast() && draft.rng.percent(40) {
        draft.ins.set_is_broadcast(true);
    }
    draft.ins.set_op_kind(i, OpKind::Memory);
    let address32 = draft.rng.percent(12);
    let base = segment(draft, address32);
    let target = choose_target(draft);
    let offset = target.wrapping_sub(base);
    if address32 && offset > u64::from(u32::MAX) {
        return registers(draft, offset, false);
    }
    match draft.rng.below(100) {
        0..12 if !address32 && (offset as i64 - draft.machine.rip as i64).abs() < 0x7000_0000 => {
            draft.ins.set_memory_base(Register::RIP);
            draft.ins.set_memory_displacement64(offset);
            draft.ins.set_memory_displ_size(8);
        }
        12..14 if address32 => {
            draft.ins.set_memory_base(Register::EIP);
            draft.ins.set_memory_displacement64(offset);
            draft.ins.set_memory_displ_size(4);
        }
        14..18 if offset < 1 << 31 => {
            draft.ins.set_memory_displacement64(offset);
            draft.ins.set_memory_displ_size(if address32 { 4 } else { 8 });
        }
        _ => registers(draft, offset, address32),
    }
}

/// Base, index, scale and displacement that sum up to `offset`.
fn registers(draft: &mut Draft<'_>, offset: u64, address32: bool) {
    let first = if address32 { Register::EAX } else { Register::RAX };
    let mask = if address32 { 0xffff_ffff } else { u64::MAX };
    let scale = 1 << draft.rng.below(4);
    let mut displacement = match draft.rng.below(4) {
        0 => 0,
        1 => draft.rng.below(256) as i64 - 128,
        2 => (draft.rng.below(64) as i64 - 32) * 64,
        _ => i64::from(draft.rng.next() as i32 >> draft.rng.below(20)),
    };
    let shape = draft.rng.below(10);
    let base = draft.rng.below(16) as usize;
    let index = loop {
        let index = draft.rng.below(16) as usize;
        if index != 4 {
            break index;
        }
    };
    let junk = if address32 { draft.rng.next() << 32 } else { 0 };
    if shape < 5 {
        draft.ins.set_memory_base(first + base as u32);
        draft.machine.gpr[base] = (offset.wrapping_sub(displacement as u64) & mask) | junk;
        draft.address_registers |= 1 << base;
    } else if shape < 9 && base != index {
        draft.ins.set_memory_base(first + base as u32);
        set_index(draft, first, index, scale);
        let index_value = draft.machine.gpr[index];
        let sum = index_value.wrapping_mul(scale).wrapping_add(displacement as u64);
        draft.machine.gpr[base] = (offset.wrapping_sub(sum) & mask) | junk;
        draft.address_registers |= 1 << base | 1 << index;
    } else {
        // Index alone, or the same register twice: what scale does not divide goes into the displacement.
        let same = shape < 9 && base != 4;
        let factor = if same { scale + 1 } else { scale };
        displacement = (offset % factor) as i64;
        if same {
            draft.ins.set_memory_base(first + base as u32);
        }
        let index = if same { base } else { index };
        set_index(draft, first, index, scale);
        draft.machine.gpr[index] = ((offset / factor) & mask) | junk;
        draft.address_registers |= 1 << index;
    }
    draft.ins.set_memory_displacement64(displacement as u64 & mask);
    let no_base = draft.ins.memory_base() == Register::None;
    let displ_size = if no_base { if address32 { 4 } else { 8 } } else { u32::from(displacement != 0) };
    draft.ins.set_memory_displ_size(displ_size);
}

fn set_index(draft: &mut Draft<'_>, first: Register, index: usize, scale: u64) {
    draft.ins.set_memory_index(first + index as u32);
    draft.ins.set_memory_index_scale(scale as u32);
}

/// MOV's absolute 64-bit (or, with an address-size prefix, 32-bit) address.
pub(crate) fn absolute(draft: &mut Draft<'_>, i: u32) {
    draft.ins.set_op_kind(i, OpKind::Memory);
    let base = segment(draft, false);
    let offset = choose_target(draft).wrapping_sub(base);
    let address32 = offset < 1 << 32 && draft.rng.percent(30);
    draft.ins.set_memory_displacement64(offset);
    draft.ins.set_memory_displ_size(if address32 { 4 } else { 8 });
}

/// Gather and scatter: elements of the index register spread around one place.
pub(crate) fn vector_indexed(draft: &mut Draft<'_>, i: u32, first: Register) {
    draft.ins.set_op_kind(i, OpKind::Memory);
    let evex = draft.op.encoding() == iced_x86::EncodingKind::EVEX;
    let number = draft.rng.below(if evex { 32 } else { 16 });
    let scale = 1 << draft.rng.below(4);
    draft.ins.set_memory_index(first + number as u32);
    draft.ins.set_memory_index_scale(scale);
    let base = draft.rng.below(16) as usize;
    draft.ins.set_memory_base(Register::RAX + base as u32);
    let segment_base = segment(draft, false);
    let centre = match draft.rng.below(10) {
        0 => WRITABLE.end - 16,
        1 => WRITABLE.start + 16,
        _ => WRITABLE.start + PAGE + draft.rng.below(PAGE),
    };
    let displacement = if draft.rng.percent(50) { 0 } else { draft.rng.below(256) as i64 - 128 };
    draft.ins.set_memory_displacement64(displacement as u64);
    draft.ins.set_memory_displ_size(u32::from(displacement != 0));
    draft.machine.gpr[base] = centre.wrapping_sub(segment_base).wrapping_sub(displacement as u64);
    draft.address_registers |= 1 << base;
    let wide = matches!(
        draft.op.op_kind(i),
        OpCodeOperandKind::mem_vsib64x | OpCodeOperandKind::mem_vsib64y | OpCodeOperandKind::mem_vsib64z
    );
    let stray = draft.rng.percent(10);
    let width = if wide { 8 } else { 4 };
    for element in 0..64 / width {
        let mut value = draft.rng.below(512) as i64 - 256;
        if stray && draft.rng.percent(20) {
            value = draft.rng.below(1 << 13) as i64 - (1 << 12);
        }
        let slot = &mut draft.machine.vectors.zmm[number as usize][element * width..][..width];
        slot.copy_from_slice(&value.to_le_bytes()[..width]);
    }
}

/// Operands of string instructions: RSI or RDI, with 32-bit forms. RCX is set for the repetition.
pub(crate) fn string(draft: &mut Draft<'_>, i: u32, kind: OpCodeOperandKind) {
    use OpCodeOperandKind::{es_rDI, seg_rDI, seg_rSI};
    // Both operands have the same address size: the first decides.
    let address32 = match i {
        0 => draft.rng.percent(12),
        _ => {
            matches!(draft.ins.op0_kind(), OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI)
        }
    };
    let (op_kind, register) = match (kind, address32) {
        (seg_rSI, false) => (OpKind::MemorySegRSI, 6),
        (seg_rSI, true) => (OpKind::MemorySegESI, 6),
        (es_rDI, false) => (OpKind::MemoryESRDI, 7),
        (es_rDI, true) => (OpKind::MemoryESEDI, 7),
        (seg_rDI, false) => (OpKind::MemorySegRDI, 7),
        _ => (OpKind::MemorySegEDI, 7),
    };
    draft.ins.set_op_kind(i, op_kind);
    let base = if kind == es_rDI { 0 } else { segment(draft, address32) };
    let element = draft.op.memory_size().size().max(1) as u64;
    let repeats = draft.ins.has_rep_prefix() || draft.ins.has_repne_prefix();
    let mut span = element;
    if repeats && i == 0 {
        let count = match draft.rng.below(10) {
            0 => 0,
            1 => draft.rng.below(600),
            _ => draft.rng.below(24),
        };
        draft.machine.gpr[1] = count | if address32 { draft.rng.next() << 32 } else { 0 };
    }
    if repeats {
        span = element * (draft.machine.gpr[1] & 0xffff).max(1);
    }
    let start = place(draft.rng, span.min(PAGE), element);
    let backwards = draft.machine.rflags & (1 << 10) != 0;
    let linear = if backwards && span > element { start + span - element } else { start };
    let offset = linear.wrapping_sub(base);
    let junk = if address32 { draft.rng.next() << 32 } else { 0 };
    draft.machine.gpr[register] = if address32 { offset & 0xffff_ffff | junk } else { offset };
    draft.address_registers |= 1 << register | 1 << 1;
    if kind == seg_rDI {
        draft.target = Some(linear);
    }
}

/// XLAT: RBX plus zero-extended AL.
pub(crate) fn table_lookup(draft: &mut Draft<'_>, i: u32) {
    draft.ins.set_op_kind(i, OpKind::Memory);
    let address32 = draft.rng.percent(12);
    let base = segment(draft, address32);
    let target = choose_target(draft);
    let offset = target.wrapping_sub(base).wrapping_sub(draft.machine.gpr[0] & 0xff);
    draft.ins.set_memory_base(if address32 { Register::EBX } else { Register::RBX });
    draft.ins.set_memory_index(Register::AL);
    draft.machine.gpr[3] = offset;
    draft.address_registers |= 1 << 3 | 1;
}
