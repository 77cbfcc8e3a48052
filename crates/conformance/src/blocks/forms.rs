//! Which forms programs are drawn from.

use iced_x86::{Code, EncodingKind, OpCodeOperandKind};

use super::native::unsuited;
use super::undefined::{Kind, kind};
use crate::forms::{Class, Form};
use crate::rng::Rng;

/// Forms of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Family {
    /// What programs have most of.
    Usual,
    General,
    X87,
    Mmx,
    Sse,
    Vex,
    Evex,
}

const FAMILIES: [Family; 7] =
    [Family::Usual, Family::General, Family::X87, Family::Mmx, Family::Sse, Family::Vex, Family::Evex];

/// Forms that compilers use most.
const USUAL: &[&str] = &[
    "Mov_",
    "Movzx_",
    "Movsx_",
    "Movsxd_r64",
    "Lea_",
    "Add_",
    "Sub_",
    "Cmp_",
    "Test_",
    "And_",
    "Or_",
    "Xor_",
    "Adc_",
    "Sbb_",
    "Inc_",
    "Dec_",
    "Push_r64",
    "Pop_r64",
    "Imul_r",
    "Shl_",
    "Shr_",
    "Sar_",
    "Set",
    "Cmov",
    "Movups_",
    "Movaps_",
    "Movdqu_",
    "Movdqa_",
    "Movq_",
    "Movsd_xmm",
    "Xadd_",
    "Xchg_",
    "Cmpxchg_",
    "Bt_",
    "Bswap_",
    "Neg_",
    "Not_",
];

/// The forms that programs are drawn from, by family.
#[derive(Debug)]
pub struct Forms {
    families: Vec<Vec<Code>>,
}

impl Forms {
    /// Those of `forms` that are compared and suit programs.
    pub fn new(forms: &[Form]) -> Forms {
        let suits = |form: &&Form| {
            let mut instruction = iced_x86::Instruction::default();
            instruction.set_code(form.code);
            form.class == Class::Compared
                && !unsuited(form.code.mnemonic())
                && kind(&instruction) == Kind::Next
        };
        let codes: Vec<Code> = forms.iter().filter(suits).map(|form| form.code).collect();
        let of = |family: &Family| codes.iter().copied().filter(|code| belongs(*code, *family)).collect();
        Forms { families: FAMILIES.iter().map(of).collect() }
    }

    /// How many forms there are.
    pub fn count(&self) -> usize {
        self.families[1..].iter().map(Vec::len).sum()
    }

    /// A mixture of families for one program: one of its draws in ten is of any form.
    pub fn mixture(&self, rng: &mut Rng) -> Vec<usize> {
        let there = |family: &usize| !self.families[*family].is_empty();
        let all: Vec<usize> = (0..self.families.len()).filter(there).collect();
        let mut drawn: Vec<usize> = (0..7).map(|_| rng.pick(&all)).collect();
        let general = [0, 0, 0, 1, 1];
        drawn.extend(general.into_iter().filter(|family| there(family)));
        let kinds = rng.range(1, 4) as usize;
        let (few, rest) = drawn.split_at(kinds);
        let mut mixture: Vec<usize> = rest[7 - kinds..].to_vec();
        mixture.extend(few.iter().flat_map(|family| [*family; 2]));
        mixture.push(rng.pick(&all));
        mixture
    }

    /// One form.
    pub fn draw(&self, rng: &mut Rng, mixture: &[usize]) -> Code {
        let family = rng.pick(mixture);
        rng.pick(&self.families[family])
    }
}

fn belongs(code: Code, family: Family) -> bool {
    use OpCodeOperandKind::*;
    let op = code.op_code();
    let any = |kinds: &[OpCodeOperandKind]| op.op_kinds().iter().any(|kind| kinds.contains(kind));
    let x87 = code.cpuid_features().iter().any(|feature| format!("{feature:?}").starts_with("FPU"));
    let vector = any(&[xmm_or_mem, xmm_reg, xmm_rm, xmm_vvvv, ymm_reg, ymm_or_mem]);
    let of = match op.encoding() {
        EncodingKind::EVEX => Family::Evex,
        EncodingKind::VEX if vector => Family::Vex,
        EncodingKind::VEX => Family::General,
        _ if x87 => Family::X87,
        _ if any(&[mm_or_mem, mm_reg, mm_rm]) => Family::Mmx,
        _ if vector => Family::Sse,
        _ => Family::General,
    };
    let usual = || {
        let name = format!("{code:?}");
        matches!(of, Family::General | Family::Sse) && USUAL.iter().any(|start| name.starts_with(start))
    };
    if family == Family::Usual { usual() } else { of == family }
}
