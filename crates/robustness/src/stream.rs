//! Valid instructions with random operands, from iced-x86's tables, for each code size.

use std::sync::OnceLock;

use conformance::rng::Rng;
use iced_x86::{
    Code, Encoder, EncodingKind, FlowControl, Instruction, OpCodeInfo, OpCodeOperandKind, OpKind, Register,
};

/// Forms of one code size.
struct Forms {
    all: Vec<Code>,
    /// Neither VEX nor EVEX.
    legacy: Vec<Code>,
    /// What touches more than data: privileged, control flow, stack, strings, segments, ports.
    system: Vec<Code>,
}

fn encodable(op: &OpCodeInfo, bits: u32) -> bool {
    let mode = match bits {
        16 => op.mode16(),
        32 => op.mode32(),
        _ => op.mode64(),
    };
    op.is_instruction() && mode && !op.fwait()
}

fn is_system(code: Code) -> bool {
    use OpCodeOperandKind::*;
    let op = code.op_code();
    let special =
        |k: &OpCodeOperandKind| matches!(k, seg_reg | cr_reg | dr_reg | tr_reg | ss | ds | es | fs | gs);
    op.must_be_cpl0()
        || op.is_input_output()
        || code.is_string_instruction()
        || code.is_stack_instruction()
        || code.flow_control() != FlowControl::Next
        || op.op_kinds().iter().any(special)
        || matches!(op.memory_size(), iced_x86::MemorySize::Xsave | iced_x86::MemorySize::Xsave64)
}

fn forms(bits: u32) -> &'static Forms {
    static FORMS: [OnceLock<Forms>; 3] = [const { OnceLock::new() }; 3];
    let slot = match bits {
        16 => 0,
        32 => 1,
        _ => 2,
    };
    FORMS[slot].get_or_init(|| {
        let all: Vec<Code> = Code::values().filter(|code| encodable(code.op_code(), bits)).collect();
        let legacy =
            (all.iter().copied()).filter(|c| c.op_code().encoding() == EncodingKind::Legacy).collect();
        let system = all.iter().copied().filter(|c| is_system(*c)).collect();
        Forms { all, legacy, system }
    })
}

/// Makes instructions for one code size.
pub struct Stream<'a> {
    rng: &'a mut Rng,
    bits: u32,
    encoder: Encoder,
    /// Addresses that operands often lie near.
    near: Vec<u64>,
}

impl<'a> Stream<'a> {
    /// A generator for code of `bits`, whose operands prefer the neighbourhood of the addresses `near`.
    pub fn new(rng: &'a mut Rng, bits: u32, near: &[u64]) -> Stream<'a> {
        Stream { rng, bits, encoder: Encoder::new(bits), near: near.to_vec() }
    }

    /// Instructions in a row, as many as fit in `length` bytes, for execution at `ip`.
    pub fn code(&mut self, ip: u64, length: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(length + 16);
        while out.len() < length {
            let at = ip.wrapping_add(out.len() as u64);
            out.extend(self.instruction(at));
        }
        out.truncate(length);
        out
    }

    /// One instruction for execution at `ip`.
    pub fn instruction(&mut self, ip: u64) -> Vec<u8> {
        loop {
            let forms = forms(self.bits);
            let code = match self.rng.below(10) {
                0..=3 => self.rng.pick(&forms.legacy),
                4..=6 => self.rng.pick(&forms.system),
                _ => self.rng.pick(&forms.all),
            };
            if let Some(mut bytes) = self.form(code, ip) {
                if self.rng.percent(6) {
                    let prefix = self.rng.pick(&[0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x26, 0x36, 0x64, 0x65, 0x48]);
                    bytes.insert(0, prefix);
                }
                return bytes;
            }
        }
    }

    /// One instruction of form `code`; `None` if its operands do not go together.
    pub fn form(&mut self, code: Code, ip: u64) -> Option<Vec<u8>> {
        let op = code.op_code();
        let mut ins = Instruction::default();
        ins.set_code(code);
        if op.can_use_rep_prefix() && self.rng.percent(50) {
            ins.set_has_rep_prefix(true);
        } else if op.can_use_repne_prefix() && self.rng.percent(50) {
            ins.set_has_repne_prefix(true);
        }
        if op.can_use_op_mask_register() && (op.require_op_mask_register() || self.rng.percent(50)) {
            ins.set_op_mask(Register::K1 + self.rng.below(7) as u32);
            ins.set_zeroing_masking(op.can_use_zeroing_masking() && self.rng.percent(40));
        }
        for (i, kind) in (0..).zip(op.op_kinds()) {
            self.operand(&mut ins, i, *kind, ip);
        }
        let memory = ins.op_kinds().any(|kind| kind == OpKind::Memory);
        ins.set_has_lock_prefix(memory && op.can_use_lock_prefix() && self.rng.percent(30));
        ins.set_is_broadcast(memory && op.can_broadcast() && self.rng.percent(30));
        self.encoder.encode(&ins, ip).ok()?;
        Some(self.encoder.take_buffer())
    }

    /// An address that is likely to mean something.
    fn address(&mut self) -> u64 {
        match self.rng.below(8) {
            0 => self.rng.next(),
            1 => self.rng.below(1 << 20),
            _ => {
                let near = self.rng.pick(&self.near);
                near.wrapping_add(self.rng.below(256)).wrapping_sub(128)
            }
        }
    }

    fn memory(&mut self, ins: &mut Instruction, i: u32, index: Option<Register>) {
        let wide = self.bits == 64 && self.rng.percent(90);
        let general = if wide { Register::RAX } else { Register::EAX };
        let count = if self.bits == 64 { 16 } else { 8 };
        let mut pick = |percent| {
            let register = general + self.rng.below(count) as u32;
            if self.rng.percent(percent) { register } else { Register::None }
        };
        let (mut base, mut second) = (pick(80), pick(30));
        if self.bits == 16 && index.is_none() && self.rng.percent(80) {
            base = self.rng.pick(&[Register::BX, Register::BP, Register::None]);
            second = self.rng.pick(&[Register::SI, Register::DI]);
        } else {
            ins.set_memory_index_scale(1 << self.rng.below(4));
        }
        if let Some(first) = index {
            second = first + self.rng.below(if self.bits == 64 { 16 } else { 8 }) as u32;
        }
        let absolute = base == Register::None;
        let displacement = if absolute { self.address() as i32 as i64 as u64 } else { self.rng.below(512) };
        ins.set_op_kind(i, OpKind::Memory);
        ins.set_memory_base(base);
        ins.set_memory_index(second);
        ins.set_memory_displ_size(match (absolute || displacement > 127, self.bits) {
            (false, _) => 1,
            (true, 16) => 2,
            (true, 64) if wide => 8,
            (true, _) => 4,
        });
        ins.set_memory_displacement64(displacement);
        if self.rng.percent(15) {
            ins.set_segment_prefix(Register::ES + self.rng.below(6) as u32);
        }
    }

    fn operand(&mut self, ins: &mut Instruction, i: u32, kind: OpCodeOperandKind, ip: u64) {
        use OpCodeOperandKind::*;
        let or_memory = self.rng.percent(60);
        let (address, width) = (self.address(), self.bits);
        match kind {
            mem_offs => {
                ins.set_op_kind(i, OpKind::Memory);
                ins.set_memory_displ_size(width / 8);
                ins.set_memory_displacement64(address & (!0 >> (64 - width)));
            }
            mem | mem_mib | mem_mpx | sibmem => self.memory(ins, i, Option::None),
            mem_vsib32x | mem_vsib64x => self.memory(ins, i, Some(Register::XMM0)),
            mem_vsib32y | mem_vsib64y => self.memory(ins, i, Some(Register::YMM0)),
            mem_vsib32z | mem_vsib64z => self.memory(ins, i, Some(Register::ZMM0)),
            r8_or_mem | r16_or_mem | r32_or_mem | r32_or_mem_mpx | r64_or_mem | r64_or_mem_mpx
            | mm_or_mem | xmm_or_mem | ymm_or_mem | zmm_or_mem | bnd_or_mem_mpx | k_or_mem
                if or_memory =>
            {
                self.memory(ins, i, Option::None);
            }
            seg_rSI => ins.set_op_kind(
                i,
                sized(width, OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI),
            ),
            es_rDI => {
                ins.set_op_kind(i, sized(width, OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI))
            }
            seg_rDI => ins.set_op_kind(
                i,
                sized(width, OpKind::MemorySegDI, OpKind::MemorySegEDI, OpKind::MemorySegRDI),
            ),
            seg_rBX_al => {
                ins.set_op_kind(i, OpKind::Memory);
                let base = match width {
                    16 => Register::BX,
                    32 => Register::EBX,
                    _ => Register::RBX,
                };
                ins.set_memory_base(base);
                ins.set_memory_index(Register::AL);
            }
            imm4_m2z | imm8 | imm8_const_1 | imm8sex16 | imm8sex32 | imm8sex64 | imm16 | imm32
            | imm32sex64 | imm64 => self.immediate(ins, i, kind),
            br16_1 | br16_2 | br32_1 | br32_4 | br64_1 | br64_4 | xbegin_2 | xbegin_4 => {
                let near = ip.wrapping_add(self.rng.below(200)).wrapping_sub(90);
                let kind = match kind {
                    br16_1 | br16_2 => OpKind::NearBranch16,
                    br32_1 | br32_4 => OpKind::NearBranch32,
                    br64_1 | br64_4 => OpKind::NearBranch64,
                    _ if width == 64 => OpKind::NearBranch64,
                    _ => OpKind::NearBranch32,
                };
                ins.set_op_kind(i, kind);
                ins.set_near_branch64(near);
            }
            farbr2_2 => {
                ins.set_op_kind(i, OpKind::FarBranch16);
                ins.set_far_branch16(address as u16);
                ins.set_far_branch_selector(self.rng.below(0x60) as u16);
            }
            farbr4_2 => {
                ins.set_op_kind(i, OpKind::FarBranch32);
                ins.set_far_branch32(address as u32);
                ins.set_far_branch_selector(self.rng.below(0x60) as u16);
            }
            _ => {
                let evex = ins.code().op_code().encoding() == EncodingKind::EVEX;
                let (first, mut count) = registers(kind);
                // High registers need a REX, VEX or EVEX prefix of 64-bit code.
                if width != 64 {
                    count = count.min(8);
                } else if count == 32 && !evex {
                    count = 16;
                }
                ins.set_op_kind(i, OpKind::Register);
                ins.set_op_register(i, first + self.rng.below(count) as u32);
            }
        }
    }

    fn immediate(&mut self, ins: &mut Instruction, i: u32, kind: OpCodeOperandKind) {
        use OpCodeOperandKind::*;
        let value = match self.rng.below(4) {
            0 => self.rng.next(),
            1 => self.address(),
            2 => self.rng.below(256),
            _ => self.rng.pick(&[0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, !0]),
        };
        let second = i > 0 && matches!(ins.op_kind(i - 1), OpKind::Immediate16 | OpKind::Immediate8);
        let (kind, value) = match kind {
            imm8 if second => (OpKind::Immediate8_2nd, value & 0xff),
            imm4_m2z => (OpKind::Immediate8, value & 3),
            imm8_const_1 => (OpKind::Immediate8, 1),
            imm8 => (OpKind::Immediate8, value & 0xff),
            imm8sex16 => (OpKind::Immediate8to16, value as i8 as i64 as u64),
            imm8sex32 => (OpKind::Immediate8to32, value as i8 as i64 as u64),
            imm8sex64 => (OpKind::Immediate8to64, value as i8 as i64 as u64),
            imm16 => (OpKind::Immediate16, value & 0xffff),
            imm32 => (OpKind::Immediate32, value & 0xffff_ffff),
            imm32sex64 => (OpKind::Immediate32to64, value as i32 as i64 as u64),
            _ => (OpKind::Immediate64, value),
        };
        ins.set_op_kind(i, kind);
        ins.set_immediate_u64(i, value);
    }
}

fn sized(bits: u32, word: OpKind, double: OpKind, quad: OpKind) -> OpKind {
    match bits {
        16 => word,
        32 => double,
        _ => quad,
    }
}

/// First register of an operand kind, and how many there are.
fn registers(kind: OpCodeOperandKind) -> (Register, u64) {
    use OpCodeOperandKind::*;
    match kind {
        r8_or_mem | r8_reg | r8_opcode => (Register::AL, 20),
        r16_or_mem | r16_reg | r16_reg_mem | r16_rm | r16_opcode => (Register::AX, 16),
        r32_or_mem | r32_or_mem_mpx | r32_reg | r32_reg_mem | r32_rm | r32_opcode | r32_vvvv => {
            (Register::EAX, 16)
        }
        r64_or_mem | r64_or_mem_mpx | r64_reg | r64_reg_mem | r64_rm | r64_opcode | r64_vvvv => {
            (Register::RAX, 16)
        }
        seg_reg => (Register::ES, 6),
        k_or_mem | k_reg | k_rm | k_vvvv | kp1_reg => (Register::K0, 8),
        mm_or_mem | mm_reg | mm_rm => (Register::MM0, 8),
        xmm_or_mem | xmm_reg | xmm_rm | xmm_vvvv | xmmp3_vvvv => (Register::XMM0, 32),
        ymm_or_mem | ymm_reg | ymm_rm | ymm_vvvv => (Register::YMM0, 32),
        zmm_or_mem | zmm_reg | zmm_rm | zmm_vvvv | zmmp3_vvvv => (Register::ZMM0, 32),
        // iced-x86 takes it badly if a register does not fit the immediate byte.
        xmm_is4 | xmm_is5 => (Register::XMM0, 8),
        ymm_is4 | ymm_is5 => (Register::YMM0, 8),
        tmm_reg | tmm_rm | tmm_vvvv => (Register::TMM0, 8),
        bnd_reg | bnd_or_mem_mpx => (Register::BND0, 4),
        cr_reg => (Register::CR0, 9),
        dr_reg => (Register::DR0, 8),
        tr_reg => (Register::TR0, 8),
        sti_opcode => (Register::ST0, 8),
        st0 => (Register::ST0, 1),
        es => (Register::ES, 1),
        cs => (Register::CS, 1),
        ss => (Register::SS, 1),
        ds => (Register::DS, 1),
        fs => (Register::FS, 1),
        gs => (Register::GS, 1),
        al => (Register::AL, 1),
        cl => (Register::CL, 1),
        ax => (Register::AX, 1),
        dx => (Register::DX, 1),
        eax => (Register::EAX, 1),
        rax => (Register::RAX, 1),
        _ => (Register::None, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_forms_can_be_made_in_every_code_size() {
        let mut rng = Rng::new(3);
        for bits in [16, 32, 64] {
            let mut stream = Stream::new(&mut rng, bits, &[0x1000]);
            let all = &forms(bits).all;
            let made =
                all.iter().filter(|code| (0..40).any(|_| stream.form(**code, 0x2000).is_some())).count();
            let missing: Vec<_> = all
                .iter()
                .filter(|code| (0..40).all(|_| stream.form(**code, 0x2000).is_none()))
                .take(40)
                .collect();
            assert!(made * 100 >= all.len() * 98, "{bits}: {made} of {}: lacks {missing:?}", all.len());
        }
    }

    #[test]
    fn code_has_the_length_asked_for() {
        let mut rng = Rng::new(4);
        assert_eq!(Stream::new(&mut rng, 32, &[0]).code(0x100, 333).len(), 333);
    }
}
