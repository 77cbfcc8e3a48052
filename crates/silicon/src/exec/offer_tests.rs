//! What CPUID offers is executed: every form of every offered instruction group has a handler.

use iced_x86::{
    Code, Decoder, Encoder, Instruction, Mnemonic, OpCodeInfo, OpCodeOperandKind, OpKind, Register,
};

use crate::code::lower::LowerCtx;
use crate::hostexec::stub::Stubs;
use crate::model::feature::{FEATURES, Means};
use crate::model::{CpuModel, FeatureSet, Features};
use crate::state::CodeSize;

/// Operand `i` of `kind`, in code of `bits`; memory rather than a register where there is a choice and `memory` is set.
fn set_operand(ins: &mut Instruction, i: u32, kind: OpCodeOperandKind, bits: u32, memory: bool) {
    use OpCodeOperandKind as K;
    let by_size = |kinds: [OpKind; 3]| match bits {
        16 => kinds[0],
        32 => kinds[1],
        _ => kinds[2],
    };
    let name = format!("{kind:?}");
    let choose = |ins: &mut Instruction, register: Register| {
        ins.set_op_kind(i, OpKind::Register);
        ins.set_op_register(i, register);
    };
    if name == "mem_offs" {
        ins.set_op_kind(i, OpKind::Memory);
        ins.set_memory_displ_size(bits / 8);
        return ins.set_memory_displacement64(0x100);
    }
    if name.starts_with("mem") || name == "sibmem" || memory && name.contains("_or_mem") {
        ins.set_op_kind(i, OpKind::Memory);
        ins.set_memory_base(match bits {
            16 => Register::BX,
            32 => Register::EBX,
            _ => Register::RBX,
        });
        if let Some(vector) = name.strip_prefix("mem_vsib") {
            let index = match vector.as_bytes()[2] {
                b'x' => Register::XMM3,
                b'y' => Register::YMM3,
                _ => Register::ZMM3,
            };
            // There are no 16-bit addresses with vector registers.
            ins.set_memory_base(if bits == 64 { Register::RBX } else { Register::EBX });
            ins.set_memory_index(index);
        }
        return;
    }
    match kind {
        K::seg_rSI => {
            ins.set_op_kind(i, by_size([OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI]))
        }
        K::es_rDI => {
            ins.set_op_kind(i, by_size([OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI]));
        }
        K::seg_rDI => {
            ins.set_op_kind(i, by_size([OpKind::MemorySegDI, OpKind::MemorySegEDI, OpKind::MemorySegRDI]));
        }
        K::seg_rBX_al => {
            ins.set_op_kind(i, OpKind::Memory);
            ins.set_memory_base(match bits {
                16 => Register::BX,
                32 => Register::EBX,
                _ => Register::RBX,
            });
            ins.set_memory_index(Register::AL);
        }
        K::br16_1 | K::br16_2 => ins.set_op_kind(i, OpKind::NearBranch16),
        K::br32_1 | K::br32_4 => ins.set_op_kind(i, OpKind::NearBranch32),
        K::br64_1 | K::br64_4 => ins.set_op_kind(i, OpKind::NearBranch64),
        K::xbegin_2 | K::xbegin_4 => {
            ins.set_op_kind(i, by_size([OpKind::NearBranch16, OpKind::NearBranch32, OpKind::NearBranch64]));
        }
        K::farbr2_2 => ins.set_op_kind(i, OpKind::FarBranch16),
        K::farbr4_2 => ins.set_op_kind(i, OpKind::FarBranch32),
        K::imm8 if i > 0 && is_immediate(ins.op_kind(i - 1)) => ins.set_op_kind(i, OpKind::Immediate8_2nd),
        K::imm8 | K::imm4_m2z => ins.set_op_kind(i, OpKind::Immediate8),
        K::imm8_const_1 => {
            ins.set_op_kind(i, OpKind::Immediate8);
            ins.set_immediate8(1);
        }
        K::imm8sex16 => ins.set_op_kind(i, OpKind::Immediate8to16),
        K::imm8sex32 => ins.set_op_kind(i, OpKind::Immediate8to32),
        K::imm8sex64 => ins.set_op_kind(i, OpKind::Immediate8to64),
        K::imm16 => ins.set_op_kind(i, OpKind::Immediate16),
        K::imm32 => ins.set_op_kind(i, OpKind::Immediate32),
        K::imm32sex64 => ins.set_op_kind(i, OpKind::Immediate32to64),
        K::imm64 => ins.set_op_kind(i, OpKind::Immediate64),
        _ => choose(ins, register(&name, i)),
    }
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(kind, OpKind::Immediate8 | OpKind::Immediate16)
}

/// A register of the class that an operand kind's name begins with, another one for each operand.
fn register(name: &str, i: u32) -> Register {
    let class = name.split('_').next().unwrap_or_default();
    let is_named = |register: &Register| class != "r8" && format!("{register:?}").to_lowercase() == class;
    if let Some(fixed) = Register::values().find(is_named) {
        return fixed;
    }
    // XCHG of the accumulator with itself would be NOP.
    let i = i + u32::from(name.ends_with("_opcode"));
    match class {
        "r8" => Register::AL + i,
        "r16" => Register::AX + i,
        "r32" => Register::EAX + i,
        "r64" => Register::RAX + i,
        "seg" => Register::ES,
        "k" | "kp1" => Register::K2 + i,
        "mm" => Register::MM0 + i,
        "xmm" | "xmmp3" => Register::XMM0 + 4 * (i & 1) + i / 2,
        "ymm" => Register::YMM0 + 4 * (i & 1) + i / 2,
        "zmm" | "zmmp3" => Register::ZMM0 + 4 * (i & 1) + i / 2,
        "tmm" => Register::TMM0 + i,
        "bnd" => Register::BND0 + i,
        "cr" => Register::CR0,
        "dr" => Register::DR0,
        "sti" => Register::ST0 + i,
        _ => Register::None,
    }
}

/// `code` as it is decoded in a mode of `bits`, if it is an instruction there.
fn decoded(code: Code, bits: u32, memory: bool, options: u32) -> Option<Instruction> {
    let info = code.op_code();
    let mut ins = Instruction::default();
    ins.set_code(code);
    for (i, kind) in (0..).zip(info.op_kinds()) {
        set_operand(&mut ins, i, *kind, bits, memory);
    }
    if info.require_op_mask_register() {
        ins.set_op_mask(Register::K1);
    }
    let mut encoder = Encoder::new(bits);
    encoder.encode(&ins, 0).ok()?;
    let bytes = encoder.take_buffer();
    let ins = Decoder::new(bits, &bytes, options).decode();
    (ins.code() == code && ins.len() == bytes.len()).then_some(ins)
}

/// Modes in which Intel processors have the form.
fn modes(info: &OpCodeInfo) -> impl Iterator<Item = (u32, CodeSize)> {
    let modes = [
        (64, CodeSize::Bits64, info.mode64() && info.intel_decoder64()),
        (32, CodeSize::Bits32, info.mode32() && info.intel_decoder32()),
        (16, CodeSize::Bits16, info.mode16() && info.intel_decoder16()),
    ];
    modes.into_iter().filter(|mode| mode.2).map(|(bits, size, _)| (bits, size))
}

/// Forms that are #UD by definition.
fn is_refused(code: Code) -> bool {
    use Mnemonic::*;
    matches!(code.mnemonic(), Ud0 | Ud1 | Ud2)
}

/// The forms without a handler, and those that could not be made.
fn missing(features: &Features) -> (Vec<Code>, Vec<Code>) {
    let stubs = Stubs::with_room(64 << 20);
    let (mut unexecuted, mut unmade) = (Vec::new(), Vec::new());
    for code in Code::values() {
        let info = code.op_code();
        if !info.is_instruction() || info.fwait() || is_refused(code) {
            continue;
        }
        let mut form = Instruction::default();
        form.set_code(code);
        if !features.offers(&form) {
            continue;
        }
        let mut made = 0;
        let mut exists = false;
        for (bits, code_size) in modes(info) {
            exists = true;
            // VEX and EVEX instructions are #UD in real mode: their handlers say so.
            for memory in [false, true] {
                let Some(ins) = decoded(code, bits, memory, features.decoder_options()) else { continue };
                made += 1;
                let ctx = LowerCtx { code_size, features, stubs: &stubs };
                if super::lower(&ins, &ctx).is_none() {
                    unexecuted.push(code);
                }
            }
        }
        if exists && made == 0 {
            unmade.push(code);
        }
    }
    unexecuted.dedup();
    (unexecuted, unmade)
}

#[test]
fn every_offered_form_is_executed() {
    for model in crate::model::models::names() {
        let features = CpuModel::parse(model).unwrap().features();
        let (unexecuted, unmade) = missing(&features);
        assert!(unexecuted.is_empty(), "{model} offers, but does not execute: {unexecuted:?}");
        assert!(unmade.is_empty(), "{model}: not made by this test: {unmade:?}");
    }
}

/// The same on a machine whose own CPU has all that we know how to use.
#[test]
fn every_form_that_any_host_could_offer_is_executed() {
    let executed = FEATURES.iter().filter(|row| row.means != Means::Nobody).map(|row| row.feature);
    let features = Features::new(FeatureSet::of(&executed.collect::<Vec<_>>()), 46);
    let (unexecuted, unmade) = missing(&features);
    assert!(unexecuted.is_empty(), "offered, but not executed: {unexecuted:?}");
    assert!(unmade.is_empty(), "not made by this test: {unmade:?}");
}

/// An offered CPUID bit that stands for instruction groups brings forms of each of them.
#[test]
fn every_offered_feature_bit_brings_its_instructions() {
    let features = CpuModel::default().features();
    for row in FEATURES.iter().filter(|row| features.has(row.feature)) {
        for group in row.instructions {
            let brought = Code::values().any(|code| {
                let mut form = Instruction::default();
                form.set_code(code);
                code.cpuid_features().contains(group) && features.offers(&form)
            });
            assert!(brought, "{}: {group:?}", row.name);
        }
    }
}
