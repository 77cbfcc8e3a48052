//! Operand values that make particular instructions do something: a division that does not overflow, a
//! comparison that is equal, a stack that can be popped.

use iced_x86::{Mnemonic, OpKind};

use crate::address;
use crate::generate::Draft;
use crate::layout::{self, Access, WRITABLE};
use crate::values;

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RSP: usize = 4;
const RBP: usize = 5;

/// RFLAGS.TF would raise a trap in the harness.
const TF: u64 = 1 << 8;

/// Adjusts the state to the instruction.
pub(crate) fn fix_up(draft: &mut Draft<'_>) {
    use Mnemonic::*;
    match draft.ins.mnemonic() {
        Div | Idiv => division(draft),
        Cmpxchg => comparand(draft),
        Cmpxchg8b | Cmpxchg16b => wide_comparand(draft),
        Bt | Bts | Btr | Btc => bit_offset(draft),
        Rol | Ror | Rcl | Rcr | Shl | Sal | Shr | Sar | Shld | Shrd => shift_count(draft),
        Enter | Leave => frame(draft),
        Popf | Popfq | Popfd => {
            let flags = draft.rng.next() & !TF;
            let mut rsp = draft.machine.gpr[RSP];
            // What lies in a read-only page cannot be kept from setting TF.
            if (0..8).any(|i| layout::access(rsp.wrapping_add(i)) == Access::Read) {
                rsp = WRITABLE.start + 0x800;
                draft.machine.gpr[RSP] = rsp;
            }
            draft.patch(rsp, &flags.to_le_bytes());
        }
        Ret => {
            let target = draft.indirect_target();
            let rsp = draft.machine.gpr[RSP];
            draft.patch(rsp, &target.to_le_bytes());
        }
        Jmp | Call => indirect_branch(draft),
        Loop | Loope | Loopne | Jrcxz | Jecxz | Jcxz => {
            let count = draft.rng.pick(&[0, 1, 2, 1 << 32, u64::MAX]);
            draft.machine.gpr[RCX] = count;
        }
        Ldmxcsr | Vldmxcsr => {
            let value = draft.rng.next() & if draft.rng.percent(85) { 0xffff } else { u64::MAX };
            patch_target(draft, &(value as u32).to_le_bytes());
        }
        Xrstor | Xrstor64 | Xsave | Xsave64 | Xsavec | Xsavec64 | Xsaveopt | Xsaveopt64 => {
            extended_state(draft)
        }
        Fxrstor | Fxrstor64 => {
            let image = legacy_image(draft);
            patch_target(draft, &image);
        }
        Xgetbv => {
            let index = if draft.rng.percent(80) { 0 } else { draft.rng.next() };
            draft.set_free(RCX, index);
        }
        Rdpkru | Wrpkru => protection_keys(draft),
        Wrfsbase | Wrgsbase => canonical_register(draft),
        _ => {}
    }
}

fn patch_target(draft: &mut Draft<'_>, bytes: &[u8]) {
    if let Some(target) = draft.target {
        draft.patch(target, bytes);
    }
}

/// Number of operand `i`'s general register, if it is one of at least 16 bits.
fn operand_gpr(draft: &Draft<'_>, i: u32) -> Option<usize> {
    let register = draft.ins.op_register(i);
    let usable = draft.ins.op_kind(i) == OpKind::Register && register.is_gpr() && register.size() > 1;
    usable.then(|| register.number())
}

fn division(draft: &mut Draft<'_>) {
    if !draft.rng.percent(75) {
        return;
    }
    let signed = draft.ins.mnemonic() == Mnemonic::Idiv;
    let byte = matches!(draft.op.op_kind(0), iced_x86::OpCodeOperandKind::r8_or_mem);
    let low = draft.machine.gpr[RAX];
    if byte {
        let high = if signed && low & 0x80 != 0 { 0xff } else { draft.rng.below(3) };
        draft.set_free(RAX, (low & !0xff00) | high << 8);
    } else {
        let negative = signed && draft.rng.percent(50);
        let value = if negative { u64::MAX } else { draft.rng.below(3) };
        draft.set_free(RDX, value);
    }
}

fn comparand(draft: &mut Draft<'_>) {
    if !draft.rng.percent(50) {
        return;
    }
    let accumulator = draft.machine.gpr[RAX];
    if draft.ins.op0_kind() == OpKind::Memory {
        patch_target(draft, &accumulator.to_le_bytes());
    } else if let Some(register) = operand_gpr(draft, 0) {
        draft.machine.gpr[register] = accumulator;
    }
}

fn shift_count(draft: &mut Draft) {
    if draft.rng.percent(60) {
        let count = draft.rng.below(80);
        let rest = draft.machine.gpr[RCX] & !0xff;
        draft.set_free(RCX, rest | count);
    }
}

fn wide_comparand(draft: &mut Draft<'_>) {
    if !draft.rng.percent(50) {
        return;
    }
    let width = if draft.ins.mnemonic() == Mnemonic::Cmpxchg8b { 4 } else { 8 };
    let mut bytes = draft.machine.gpr[RAX].to_le_bytes()[..width].to_vec();
    bytes.extend_from_slice(&draft.machine.gpr[RDX].to_le_bytes()[..width]);
    patch_target(draft, &bytes);
}

/// A register bit offset reaches memory far from the operand's address: keep it in the window.
fn bit_offset(draft: &mut Draft<'_>) {
    if draft.ins.op0_kind() == OpKind::Memory
        && let Some(register) = operand_gpr(draft, 1)
    {
        let offset = draft.rng.below(8192) as i64 - 4096;
        draft.set_free(register, offset as u64);
    }
}

fn frame(draft: &mut Draft<'_>) {
    let pointer = address::stack_pointer(draft.rng);
    draft.machine.gpr[RBP] = pointer;
    if draft.ins.mnemonic() == Mnemonic::Enter && draft.rng.percent(70) {
        let level = draft.rng.below(4);
        draft.ins.set_immediate8_2nd(level as u8);
        let size = draft.rng.below(0x400);
        draft.ins.set_immediate16(size as u16);
    }
}

fn indirect_branch(draft: &mut Draft<'_>) {
    let target = draft.indirect_target();
    if draft.ins.op0_kind() == OpKind::Memory {
        patch_target(draft, &target.to_le_bytes());
    } else if let Some(register) = operand_gpr(draft, 0) {
        draft.machine.gpr[register] = target;
    }
}

/// RDPKRU and WRPKRU want zeros in ECX and EDX. Key 0 stays allowed: all memory has it, the harness's too.
fn protection_keys(draft: &mut Draft<'_>) {
    if draft.rng.percent(80) {
        draft.set_free(RCX, 0);
        draft.set_free(RDX, 0);
    }
    let rights = draft.rng.next() & !3;
    draft.set_free(RAX, rights);
}

fn canonical_register(draft: &mut Draft<'_>) {
    if let Some(register) = operand_gpr(draft, 0) {
        let value = match draft.rng.below(10) {
            0..=5 => draft.rng.next() >> 17,
            6..=7 => (draft.rng.next() >> 17) | 0xffff_8000_0000_0000,
            8 => draft.rng.next(),
            _ => draft.rng.pick(&[0x7fff_ffff_ffff, 0x8000_0000_0000, 0xffff_7fff_ffff_ffff, WRITABLE.start]),
        };
        draft.machine.gpr[register] = value;
    }
}

/// An FXSAVE image that can be loaded (mostly).
fn legacy_image(draft: &mut Draft<'_>) -> Vec<u8> {
    let mut image = vec![0; 512];
    draft.rng.fill(&mut image);
    if draft.rng.percent(85) {
        image[26] = 0;
        image[27] = 0;
    }
    for pointer in image[8..24].chunks_exact_mut(8) {
        let value = u64::from_le_bytes(pointer.try_into().unwrap_or_default());
        pointer.copy_from_slice(&draft.host.canonical(value).to_le_bytes());
    }
    for st in 0..8 {
        let value = values::float80(draft.rng);
        image[32 + 16 * st..][..10].copy_from_slice(&value);
    }
    // No pending x87 exception that the status word does not summarize.
    image[0] |= 0x3f;
    image[2] &= 0x7f;
    image[3] &= 0x7f;
    image
}

/// XSAVE and XRSTOR: which components, and for XRSTOR an image with a valid header (mostly).
fn extended_state(draft: &mut Draft<'_>) {
    let mask = match draft.rng.below(4) {
        0 => u64::MAX,
        1 => 0xe7,
        _ => draft.rng.below(256),
    };
    draft.set_free(RAX, draft.host.hide_components(mask));
    draft.set_free(RDX, 0);
    let asked = draft.machine.gpr[RAX] & 0xffff_ffff | draft.machine.gpr[RDX] << 32;
    // An address register asks for what neither side is to have.
    draft.unsuited |= draft.host.hide_components(asked) != asked;
    let restores = matches!(draft.ins.mnemonic(), Mnemonic::Xrstor | Mnemonic::Xrstor64);
    let mut header = [0u8; 64];
    if restores {
        let mut image = legacy_image(draft);
        image.resize(0xa80, 0);
        draft.rng.fill(&mut image[576..]);
        image[512..576].fill(0);
        let present = 0xe7 & draft.rng.next();
        header[..8].copy_from_slice(&present.to_le_bytes());
        if draft.rng.percent(30) {
            let compact = 1 << 63 | present | 0xe7 & draft.rng.next();
            header[8..16].copy_from_slice(&compact.to_le_bytes());
        }
        if draft.rng.percent(8) {
            let byte = draft.rng.below(64) as usize;
            header[byte] |= 1 << draft.rng.below(8);
            // No PKRU from a random image: it could take the harness's own memory away.
            header[1] &= !2;
            for word in header[..16].chunks_exact_mut(8) {
                let components = u64::from_le_bytes(word.try_into().unwrap_or_default());
                word.copy_from_slice(&draft.host.hide_components(components).to_le_bytes());
            }
        }
        image[512..576].copy_from_slice(&header);
        patch_target(draft, &image);
    } else if let Some(target) = draft.target {
        header[..8].copy_from_slice(&(0xe7 & draft.rng.next()).to_le_bytes());
        draft.patch(target + 512, &header);
    }
}
