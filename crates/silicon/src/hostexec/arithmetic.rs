//! Which SIMD instructions raise floating-point exceptions, and what those that can overflow or underflow compute.
//!
//! The rules are read off the mnemonics, which are regular: an operation and a format, such as `VFMADD213PS`.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};
use once_cell::race::OnceBox;

use super::rounding::{Control, DOUBLE, Exact, Format, HALF, SINGLE};
use super::unmasked::{self, decide, flag};
use crate::mmu::Word;
use crate::state::Zmm;

/// Operations whose instructions raise SIMD floating-point exceptions. `CVT` and `FM` stand for all that begin so.
const RAISING: [&str; 27] = [
    "add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "comi", "ucomi", "round", "addsub", "hadd",
    "hsub", "dp", "cvt", "fm", "fnm", "scalef", "getexp", "getmant", "range", "reduce", "rndscale",
    "fixupimm", "comx", "ucomx",
];

/// Suffixes of instructions on floating-point elements.
const SUFFIXES: [&str; 6] = ["ps", "pd", "ss", "sd", "ph", "sh"];

/// The mnemonic in lower case without the V of VEX and EVEX.
fn plain(mnemonic: Mnemonic) -> String {
    let name = format!("{mnemonic:?}").to_lowercase();
    name.strip_prefix('v').map_or(name.clone(), str::to_owned)
}

/// Whether instructions called so may raise SIMD floating-point exceptions.
pub(crate) fn may_raise(mnemonic: Mnemonic) -> bool {
    static TABLE: OnceBox<Vec<bool>> = OnceBox::new();
    let raises = |mnemonic: Mnemonic| {
        let name = plain(mnemonic);
        // Those of complex numbers set flags, but never fault, whatever is unmasked (measured: Intel, model 207).
        let is_complex = name.ends_with("cph") || name.ends_with("csh");
        let arithmetic = !is_complex && RAISING.iter().any(|operation| name.starts_with(operation));
        arithmetic && (name.contains("cvt") || SUFFIXES.iter().any(|suffix| name.ends_with(suffix)))
    };
    let table = TABLE.get_or_init(|| Box::new(Mnemonic::values().map(raises).collect()));
    table.get(mnemonic as usize).copied().unwrap_or(true)
}

/// What an instruction computes from its sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Add,
    Subtract,
    Multiply,
    Divide,
    /// Odd elements are added, even ones subtracted.
    AddSubtract,
    /// Neighbours are added.
    HorizontalAdd,
    /// Neighbours are subtracted.
    HorizontalSubtract,
    /// Products are added in two further steps.
    Dot,
    Scale,
    /// Sources by position for the product and the addend; which of them are negated.
    Fused {
        factors: [u32; 2],
        addend: u32,
        negate_product: bool,
        negate_addend: Sign,
    },
    /// Conversion from a wider format.
    Narrow {
        from: Format,
    },
    /// Conversion from integers.
    Integer {
        bits: u32,
        signed: bool,
    },
}

/// Which elements of an addend are negated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sign {
    None,
    All,
    Even,
    Odd,
}

/// What a mnemonic says about an instruction whose results can overflow or be tiny.
#[derive(Clone, Copy, Debug)]
struct Kind {
    operation: Operation,
    /// Of the results.
    format: Format,
    packed: bool,
}

/// An instruction whose results can overflow or be tiny.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arithmetic {
    instruction: Instruction,
    operation: Operation,
    format: Format,
    packed: bool,
}

/// What an instruction reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inputs<'a> {
    pub(super) zmm: &'a [Zmm; 32],
    pub(super) k: &'a [u64; 8],
    pub(super) memory: &'a [u8; 64],
}

/// The format that a suffix stands for, and whether it is a packed one.
fn format(suffix: &str) -> Option<(Format, bool)> {
    Some(match suffix {
        "ps" => (SINGLE, true),
        "pd" => (DOUBLE, true),
        "ph" => (HALF, true),
        "ss" => (SINGLE, false),
        "sd" => (DOUBLE, false),
        "sh" => (HALF, false),
        _ => return None,
    })
}

/// `fmadd213` and its like.
fn fused(stem: &str) -> Option<Operation> {
    let (name, order) = stem.split_at_checked(stem.len().checked_sub(3)?)?;
    let (negate_product, negate_addend) = match name {
        "fmadd" => (false, Sign::None),
        "fmsub" => (false, Sign::All),
        "fnmadd" => (true, Sign::None),
        "fnmsub" => (true, Sign::All),
        "fmaddsub" => (false, Sign::Even),
        "fmsubadd" => (false, Sign::Odd),
        _ => return None,
    };
    let (factors, addend) = match order {
        "132" => ([0, 2], 1),
        "213" => ([1, 0], 2),
        "231" => ([1, 2], 0),
        _ => return None,
    };
    Some(Operation::Fused { factors, addend, negate_product, negate_addend })
}

/// The conversions that `cvt` is followed by, as source and result.
fn conversion(names: &str) -> Option<(Operation, Format, bool)> {
    let (from, to) = names.split_once('2')?;
    let (result, packed) = format(to.trim_end_matches('x'))?;
    let integer = |bits, signed| Operation::Integer { bits, signed };
    let operation = match from {
        "w" => integer(16, true),
        "uw" => integer(16, false),
        "dq" => integer(32, true),
        "udq" => integer(32, false),
        "qq" => integer(64, true),
        "uqq" => integer(64, false),
        _ => Operation::Narrow { from: format(from)?.0 },
    };
    Some((operation, result, packed))
}

impl Kind {
    /// `None` for instructions that neither overflow nor underflow, and those of complex numbers.
    fn of(mnemonic: Mnemonic) -> Option<Kind> {
        let name = plain(mnemonic);
        if let Some(names) = name.strip_prefix("cvt") {
            let (operation, format, packed) = conversion(names)?;
            return Some(Kind { operation, format, packed });
        }
        let (stem, suffix) = name.split_at_checked(name.len().checked_sub(2)?)?;
        let operation = match stem {
            "add" => Operation::Add,
            "sub" => Operation::Subtract,
            "mul" => Operation::Multiply,
            "div" => Operation::Divide,
            "addsub" => Operation::AddSubtract,
            "hadd" => Operation::HorizontalAdd,
            "hsub" => Operation::HorizontalSubtract,
            "dp" => Operation::Dot,
            "scalef" => Operation::Scale,
            _ => fused(stem)?,
        };
        let (format, packed) = format(suffix)?;
        Some(Kind { operation, format, packed })
    }
}

impl Arithmetic {
    /// `None` for instructions that neither overflow nor underflow, and those of complex numbers.
    pub(super) fn of(instruction: Instruction) -> Option<Arithmetic> {
        static TABLE: OnceBox<Vec<Option<Kind>>> = OnceBox::new();
        let table = TABLE.get_or_init(|| Box::new(Mnemonic::values().map(Kind::of).collect()));
        let Kind { operation, format, packed } = (*table.get(instruction.mnemonic() as usize)?)?;
        Some(Arithmetic { instruction, operation, format, packed })
    }

    /// The flags that the instruction sets, where a masked run found `found` (see [`super::unmasked`]).
    pub(super) fn flags(&self, found: u32, control: Control, inputs: &Inputs<'_>) -> u32 {
        match (self.operation, self.format) {
            (Operation::Dot, SINGLE) => {
                self.dot(control, inputs, unmasked::multiply_single, unmasked::add_single)
            }
            (Operation::Dot, _) => self.dot(control, inputs, unmasked::multiply_double, unmasked::add_double),
            // Half-precision results are never flushed to zero, so that tininess does not show.
            (_, HALF) if control.unmasked() & flag::UNDERFLOW != 0 => {
                let before = found & flag::BEFORE;
                let all = before | self.element_flags(control.without_flushing(), inputs);
                decide(all, control, || all & !flag::BEFORE)
            }
            _ => decide(found, control, || self.element_flags(control, inputs)),
        }
    }

    /// Post-computation flags of all elements.
    fn element_flags(&self, control: Control, inputs: &Inputs<'_>) -> u32 {
        let control = if self.format == HALF { control.without_flushing() } else { control };
        let control = match self.own_rounding() {
            Some(rounding) => control.with_rounding(rounding),
            None => control,
        };
        (0..self.count())
            .filter(|&i| self.selects(i, inputs))
            .filter_map(|i| self.exact(i, control, inputs))
            .fold(0, |flags, exact| flags | self.result_flags(exact, control))
    }

    /// Post-computation flags of one result. Measured: VCVTPS2PH takes every denormal source for inexact. AVX512-FP16 (Intel, model
    /// 207) takes integers that overflow for inexact, and tiny results as they are when underflow is masked.
    fn result_flags(&self, exact: Exact, control: Control) -> u32 {
        let from_single = self.instruction.mnemonic() == Mnemonic::Vcvtps2ph;
        let flags = exact.flags(self.format, control);
        let is_integer = matches!(self.operation, Operation::Integer { .. });
        let inexact = match self.format {
            HALF if from_single => exact.is_denormal_in(SINGLE),
            HALF if flags & flag::OVERFLOW != 0 => is_integer,
            HALF if flags & flag::UNDERFLOW != 0 => {
                return flag::UNDERFLOW | exact.precision_of_denormal(HALF, control);
            }
            _ => false,
        };
        flags | if inexact { flag::PRECISION } else { 0 }
    }

    /// The rounding control in VCVTPS2PH's immediate, unless it defers to MXCSR.
    fn own_rounding(&self) -> Option<u32> {
        let immediate = self.instruction.immediate8();
        (self.instruction.mnemonic() == Mnemonic::Vcvtps2ph && immediate & 4 == 0).then(|| immediate.into())
    }

    /// Bytes of the vectors that the elements stand in.
    fn vector_length(&self) -> usize {
        match self.instruction.encoding() {
            EncodingKind::Legacy => 16,
            _ => 16 << self.instruction.op_code().l().min(2),
        }
    }

    /// Bits of a source element.
    fn source_width(&self) -> u32 {
        match self.operation {
            Operation::Narrow { from } => from.width,
            Operation::Integer { bits, .. } => bits,
            _ => self.format.width,
        }
    }

    /// Computations that the instruction makes.
    fn count(&self) -> usize {
        let widest = self.source_width().max(self.format.width) as usize / 8;
        if self.packed { self.vector_length() / widest } else { 1 }
    }

    /// Whether the mask selects element `i`.
    fn selects(&self, i: usize, inputs: &Inputs<'_>) -> bool {
        let mask = self.instruction.op_mask();
        mask == Register::None || inputs.k[mask.number() & 7] >> i & 1 != 0
    }

    /// Bits of element `i` of operand `operand`.
    fn element(&self, operand: u32, i: usize, inputs: &Inputs<'_>) -> u64 {
        let width = self.source_width() as usize / 8;
        let (bytes, at) = match self.instruction.op_kind(operand) {
            OpKind::Memory if self.instruction.is_broadcast() => (inputs.memory, 0),
            OpKind::Memory => (inputs.memory, i * width),
            _ => (&inputs.zmm[self.instruction.op_register(operand).number() & 31].0, i * width),
        };
        let mut value = [0; 8];
        if let Some(element) = bytes.get(at..at + width) {
            value[..width].copy_from_slice(element);
        }
        u64::from_le_bytes(value)
    }

    /// Operand numbers of the first and second source of an operation with two.
    fn sources(&self) -> (u32, u32) {
        if self.instruction.encoding() == EncodingKind::Legacy { (0, 1) } else { (1, 2) }
    }

    /// The operand that a conversion converts: the last one that is no immediate.
    fn converted(&self) -> u32 {
        let is_value = |&i: &u32| matches!(self.instruction.op_kind(i), OpKind::Register | OpKind::Memory);
        (1..self.instruction.op_count()).rev().find(is_value).unwrap_or(1)
    }

    /// The exact result of computation `i`, `None` if it is not a finite one.
    fn exact(&self, i: usize, control: Control, inputs: &Inputs<'_>) -> Option<Exact> {
        let zeros = control.denormals_are_zeros() && self.format != HALF;
        let value = |operand, i| self.format.decode(self.element(operand, i, inputs), zeros);
        let (first, second) = self.sources();
        let odd = !i.is_multiple_of(2);
        Some(match self.operation {
            Operation::Add => value(first, i)?.add(value(second, i)?),
            Operation::Subtract => value(first, i)?.add(value(second, i)?.negate_if(true)),
            Operation::Multiply | Operation::Dot => value(first, i)?.multiply(value(second, i)?),
            Operation::Divide => value(first, i)?.divide(value(second, i)?)?,
            Operation::AddSubtract => value(first, i)?.add(value(second, i)?.negate_if(!odd)),
            Operation::HorizontalAdd | Operation::HorizontalSubtract => {
                let half = self.count() / 2;
                let (source, at) = if i < half { (first, i) } else { (second, i - half) };
                let subtract = self.operation == Operation::HorizontalSubtract;
                value(source, 2 * at)?.add(value(source, 2 * at + 1)?.negate_if(subtract))
            }
            Operation::Scale => value(first, i)?.scale(value(second, i)?),
            Operation::Fused { factors: [a, b], addend, negate_product, negate_addend } => {
                let negate = match negate_addend {
                    Sign::None => false,
                    Sign::All => true,
                    Sign::Even => !odd,
                    Sign::Odd => odd,
                };
                let product = value(a, i)?.multiply(value(b, i)?).negate_if(negate_product);
                product.add(value(addend, i)?.negate_if(negate))
            }
            Operation::Narrow { from } => {
                from.decode(self.element(self.converted(), i, inputs), control.denormals_are_zeros())?
            }
            Operation::Integer { bits, signed } => {
                let raw = self.element(self.converted(), i, inputs);
                let shift = 64 - bits;
                let value = raw << shift;
                Exact::integer(match signed {
                    true => (value as i64 >> shift).into(),
                    false => (value >> shift).into(),
                })
            }
        })
    }

    /// DPPS and DPPD: products, then sums of neighbours until one is left, each step with its own exceptions. An
    /// unmasked one ends the instruction.
    fn dot<T: Word>(
        &self,
        control: Control,
        inputs: &Inputs<'_>,
        multiply: fn(T, T) -> T,
        add: fn(T, T) -> T,
    ) -> u32 {
        let (first, second) = self.sources();
        let selected = self.instruction.immediate8() >> 4;
        let lane = 128 / self.format.width as usize;
        let factors = |operand: u32| -> Vec<T> {
            let factor = |i: usize| match selected >> (i % lane) & 1 {
                0 => T::from_u64(0),
                _ => T::from_u64(self.element(operand, i, inputs)),
            };
            (0..self.count()).map(factor).collect()
        };
        let (mut a, mut b) = (factors(first), factors(second));
        let (mut step, mut is_product, mut flags) = (multiply, true, 0);
        loop {
            let pairs = || a.iter().copied().zip(b.iter().copied());
            let (results, found) =
                unmasked::host_flags(control, || pairs().map(|(x, y)| step(x, y)).collect::<Vec<T>>());
            flags |= decide(found, control, || {
                let exact = |(x, y): (T, T)| {
                    let zeros = control.denormals_are_zeros();
                    let (x, y) =
                        (self.format.decode(x.to_u64(), zeros)?, self.format.decode(y.to_u64(), zeros)?);
                    Some(if is_product { x.multiply(y) } else { x.add(y) })
                };
                pairs().filter_map(exact).fold(0, |all, exact| all | exact.flags(self.format, control))
            });
            let sums_left = results.len() > self.count() / lane;
            if flags & control.unmasked() != 0 || !sums_left {
                return flags;
            }
            a = results.iter().copied().step_by(2).collect();
            b = results.iter().copied().skip(1).step_by(2).collect();
            (step, is_product) = (add, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    /// The flags that hardware sets, where a masked run finds `found`, for 16-bit or 32-bit elements of XMM1 and XMM2.
    fn flags(code: &[u8], mxcsr: u32, found: u32, first: u32, second: u32) -> u32 {
        let instruction = Decoder::new(64, code, DecoderOptions::NONE).decode();
        let mut zmm = [Zmm([0; 64]); 32];
        zmm[1].0[..4].copy_from_slice(&first.to_le_bytes());
        zmm[2].0[..4].copy_from_slice(&second.to_le_bytes());
        let inputs = Inputs { zmm: &zmm, k: &[0; 8], memory: &[0; 64] };
        Arithmetic::of(instruction).unwrap().flags(found, Control::new(mxcsr), &inputs)
    }

    /// Found on the first processor with AVX512-FP16 that ran the comparison.
    #[test]
    fn half_precision_exceptions_are_as_measured() {
        const BOTH: u32 = flag::OVERFLOW | flag::PRECISION;
        // vcvtdq2ph xmm0, xmm1: 2^20 is exact with an unbounded exponent, but inexact all the same.
        let convert = &[0x62, 0xf5, 0x7c, 0x08, 0x5b, 0xc1];
        assert_eq!(flags(convert, 0x1b80, BOTH, 1 << 20, 0), BOTH);
        // vmulph xmm0, xmm1, xmm2: a product of 2^-15 that loses its last bit as a denormal number, one that does not.
        let multiply = &[0x62, 0xf5, 0x74, 0x08, 0x59, 0xc2];
        assert_eq!(flags(multiply, 0x1780, 0x30, 0x0401, 0x3800), flag::UNDERFLOW | flag::PRECISION);
        assert_eq!(flags(multiply, 0x1780, 0, 0x0402, 0x3800), flag::UNDERFLOW);
        // 2^15 * 2: exact but for the exponent.
        assert_eq!(flags(multiply, 0x1b80, BOTH, 0x7800, 0x4000), flag::OVERFLOW);
    }

    #[test]
    fn complex_numbers_never_fault() {
        for (mnemonic, raises) in [
            (Mnemonic::Vfmulcph, false),
            (Mnemonic::Vfcmulcsh, false),
            (Mnemonic::Vfcmaddcph, false),
            (Mnemonic::Vfmaddcsh, false),
            (Mnemonic::Vmulph, true),
            (Mnemonic::Vfmadd213sh, true),
            (Mnemonic::Vcmpph, true),
        ] {
            assert_eq!(may_raise(mnemonic), raises, "{mnemonic:?}");
        }
    }
}
