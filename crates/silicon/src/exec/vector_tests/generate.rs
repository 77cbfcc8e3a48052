//! Random instructions of a given form, from iced-x86's tables.

use iced_x86::{Code, CodeSize, Encoder, EncodingKind, Instruction, OpKind, Register, RoundingControl};

/// SplitMix64.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub(super) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// Base register of memory operands; never a register operand.
pub(super) const BASE: Register = Register::RBX;
/// General registers that operands use, by number.
const GPRS: [usize; 8] = [0, 1, 2, 5, 6, 8, 9, 13];

fn nth(first: Register, n: usize) -> Register {
    Register::values().nth(first as usize + n).unwrap()
}

/// A random instruction of form `code`; `None` where the choice cannot be encoded or the form is not for us.
pub(super) fn instruction(code: Code, random: &mut Random) -> Option<Vec<u8>> {
    let info = code.op_code();
    let mut ins = Instruction::default();
    ins.set_code(code);
    ins.set_code_size(CodeSize::Code64);
    let evex = info.encoding() == EncodingKind::EVEX;
    let (mut memory, mut immediates) = (false, 0);
    for (i, kind) in info.op_kinds().iter().enumerate() {
        let name = format!("{kind:?}");
        let i = i as u32;
        if name == "mem" || name.starts_with("mem_vsib") || name.ends_with("_or_mem") && random.one_in(2) {
            memory = true;
            ins.set_op_kind(i, OpKind::Memory);
            ins.set_memory_base(BASE);
            if let Some(vsib) = name.strip_prefix("mem_vsib") {
                let first = match vsib.as_bytes()[2] {
                    b'x' => Register::XMM0,
                    b'y' => Register::YMM0,
                    _ => Register::ZMM0,
                };
                ins.set_memory_index(nth(first, random.below(if evex { 32 } else { 16 }) as usize));
                ins.set_memory_index_scale(1 << random.below(4));
            }
        } else if name == "seg_rDI" {
            ins.set_op_kind(i, OpKind::MemorySegRDI);
        } else if name.starts_with("imm") {
            let value = random.next() as u8;
            immediates += 1;
            match (immediates, name.as_str()) {
                (1, "imm8") => {
                    ins.set_op_kind(i, OpKind::Immediate8);
                    ins.set_immediate8(value);
                }
                (2, "imm8") => {
                    ins.set_op_kind(i, OpKind::Immediate8_2nd);
                    ins.set_immediate8_2nd(value);
                }
                _ => return None,
            }
        } else {
            ins.set_op_kind(i, OpKind::Register);
            ins.set_op_register(i, register(&name, evex, random)?);
        }
    }
    if info.can_use_op_mask_register() && (info.require_op_mask_register() || random.one_in(2)) {
        ins.set_op_mask(nth(Register::K1, random.below(7) as usize));
        ins.set_zeroing_masking(info.can_use_zeroing_masking() && random.one_in(2));
    }
    if memory && info.can_broadcast() {
        ins.set_is_broadcast(random.one_in(2));
    }
    if evex && !memory && info.can_use_rounding_control() && random.one_in(2) {
        ins.set_rounding_control(random.pick(&[
            RoundingControl::RoundToNearest,
            RoundingControl::RoundDown,
            RoundingControl::RoundUp,
            RoundingControl::RoundTowardZero,
        ]));
    } else if evex && !memory && info.can_suppress_all_exceptions() {
        ins.set_suppress_all_exceptions(random.one_in(2));
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&ins, 0).ok()?;
    Some(encoder.take_buffer())
}

fn register(name: &str, evex: bool, random: &mut Random) -> Option<Register> {
    let vector = random.below(if evex { 32 } else { 16 }) as usize;
    let general = random.pick(&GPRS);
    let class = name.split('_').next()?;
    Some(match class {
        "xmm" => nth(Register::XMM0, vector),
        "ymm" => nth(Register::YMM0, vector),
        "zmm" => nth(Register::ZMM0, vector),
        "k" => nth(Register::K0, random.below(8) as usize),
        "mm" => nth(Register::MM0, random.below(8) as usize),
        "r32" => nth(Register::EAX, general),
        "r64" => nth(Register::RAX, general),
        "sti" => nth(Register::ST0, random.below(8) as usize),
        "st0" => Register::ST0,
        "ax" => Register::AX,
        _ => return None,
    })
}
