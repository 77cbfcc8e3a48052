//! Post-computation exceptions of binary floating-point results: overflow, underflow and inexactness, from the
//! exact result (SDM vol. 1, 4.9.1.4 to 4.9.1.6).

use super::unmasked::{FTZ, flag};
use super::{MXCSR_FLAGS, MXCSR_MASKS};

/// A binary floating-point format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    /// Bits of the encoding.
    pub(super) width: u32,
    /// Bits of the significand, the leading one included.
    precision: u32,
    /// Greatest exponent; the least one of a normal number is `1 - greatest`.
    greatest: i32,
}

pub(super) const HALF: Format = Format { width: 16, precision: 11, greatest: 15 };
pub(super) const SINGLE: Format = Format { width: 32, precision: 24, greatest: 127 };
pub(super) const DOUBLE: Format = Format { width: 64, precision: 53, greatest: 1023 };

impl Format {
    /// The finite number that `bits` encode, `None` for infinities and NaNs.
    pub(super) fn decode(self, bits: u64, denormals_are_zeros: bool) -> Option<Exact> {
        let stored = self.precision - 1;
        let fraction = bits & ((1 << stored) - 1);
        let exponent = (bits >> stored) & ((1 << (self.width - self.precision)) - 1);
        let negative = bits >> (self.width - 1) & 1 != 0;
        let least = 1 - self.greatest - stored as i32;
        let (significand, exponent) = match exponent as i32 {
            0 if denormals_are_zeros => (0, 0),
            0 => (fraction, least),
            e if e > 2 * self.greatest => return None,
            e => (fraction | 1 << stored, least + e - 1),
        };
        Some(Exact { negative, significand: significand.into(), exponent, more: false })
    }
}

/// MXCSR as far as it controls arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Control {
    /// The guest's MXCSR.
    pub(super) mxcsr: u32,
    /// Rounding control: to nearest even, down, up, towards zero.
    rounding: u32,
    flushes: bool,
}

impl Control {
    pub(super) fn new(mxcsr: u32) -> Control {
        Control { mxcsr, rounding: mxcsr >> 13 & 3, flushes: mxcsr & FTZ != 0 }
    }

    /// With a rounding control of the instruction's own.
    pub(super) fn with_rounding(self, rounding: u32) -> Control {
        Control { rounding: rounding & 3, ..self }
    }

    /// Without flushing to zero.
    pub(super) fn without_flushing(self) -> Control {
        Control { flushes: false, ..self }
    }

    /// Exceptions that are unmasked, by their flags.
    pub(super) fn unmasked(self) -> u32 {
        !(self.mxcsr >> 7) & MXCSR_FLAGS
    }

    pub(super) fn denormals_are_zeros(self) -> bool {
        self.mxcsr & 1 << 6 != 0
    }

    /// MXCSR for a run that finds flags: everything masked. With `tells_tininess`, tiny results are flushed to zero
    /// if underflow is unmasked. (VREDUCE, which does not raise underflow, heeds FTZ even then.)
    pub(super) fn rehearsal(self, tells_tininess: bool) -> u32 {
        let flush = tells_tininess && self.unmasked() & flag::UNDERFLOW != 0;
        self.mxcsr & !MXCSR_FLAGS | MXCSR_MASKS | if flush { FTZ } else { 0 }
    }
}

/// A finite number: ± `significand` * 2^`exponent`, and if `more` is set a little further from zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exact {
    negative: bool,
    significand: u128,
    exponent: i32,
    more: bool,
}

/// Where [`Exact::add`] and [`Exact::divide`] put the leading bit.
const LEADING: u32 = 125;

impl Exact {
    /// An integer.
    pub(super) fn integer(value: i128) -> Exact {
        Exact { negative: value < 0, significand: value.unsigned_abs(), exponent: 0, more: false }
    }

    pub(super) fn negate_if(self, condition: bool) -> Exact {
        Exact { negative: self.negative ^ condition, ..self }
    }

    /// The product; both are decoded numbers.
    pub(super) fn multiply(self, other: Exact) -> Exact {
        Exact {
            negative: self.negative ^ other.negative,
            significand: self.significand * other.significand,
            exponent: self.exponent + other.exponent,
            more: false,
        }
    }

    /// The quotient of decoded numbers, `None` if the divisor is zero.
    pub(super) fn divide(self, other: Exact) -> Option<Exact> {
        let dividend = self.leading_at(LEADING);
        let significand = dividend.significand.checked_div(other.significand)?;
        Some(Exact {
            negative: self.negative ^ other.negative,
            significand,
            exponent: dividend.exponent - other.exponent,
            more: dividend.significand != significand * other.significand,
        })
    }

    /// The sum of decoded numbers or products of two.
    pub(super) fn add(self, other: Exact) -> Exact {
        if self.significand == 0 || other.significand == 0 {
            return if self.significand == 0 { other } else { self };
        }
        let (a, b) = (self.leading_at(LEADING), other.leading_at(LEADING));
        let (large, small) =
            if (a.exponent, a.significand) >= (b.exponent, b.significand) { (a, b) } else { (b, a) };
        let distance = (large.exponent - small.exponent) as u32;
        let shifted = small.significand.checked_shr(distance).unwrap_or(0);
        let more = distance > 127 || shifted << distance != small.significand;
        let significand = if large.negative == small.negative {
            large.significand + shifted
        } else {
            // A little less is one less and a little more.
            large.significand - shifted - u128::from(more)
        };
        Exact { significand, more, ..large }
    }

    /// The number times 2 to the power of `floor(power)`.
    pub(super) fn scale(self, power: Exact) -> Exact {
        /// Beyond the exponents of every format.
        const BOUND: i128 = 1 << 20;
        let magnitude = match power.exponent {
            0.. => power.significand.checked_shl(power.exponent as u32).filter(|_| power.exponent < 24),
            _ => Some(power.significand.checked_shr(power.exponent.unsigned_abs()).unwrap_or(0)),
        };
        let whole = magnitude.unwrap_or(BOUND as u128).min(BOUND as u128) as i128;
        let cut = power.exponent < 0
            && power.significand.trailing_zeros() < power.exponent.unsigned_abs()
            && power.significand != 0;
        let floor = if power.negative { -whole - i128::from(cut) } else { whole };
        Exact { exponent: self.exponent + floor as i32, ..self }
    }

    /// The same number with its leading bit at `position`, which is above where it is. Zero stays as it is.
    fn leading_at(self, position: u32) -> Exact {
        if self.significand == 0 {
            return self;
        }
        let shift = self.significand.leading_zeros().saturating_sub(127 - position);
        Exact { significand: self.significand << shift, exponent: self.exponent - shift as i32, ..self }
    }

    /// Rounds to a multiple of 2^`quantum`: the multiple, and whether anything was lost.
    fn round(self, quantum: i32, control: Control) -> (u128, bool) {
        let shift = quantum - self.exponent;
        if shift <= 0 {
            return (self.significand << shift.unsigned_abs().min(127), self.more);
        }
        let kept = self.significand.checked_shr(shift as u32).unwrap_or(0);
        let rest = self.significand - kept.checked_shl(shift as u32).unwrap_or(0);
        let half = if shift > 127 { u128::MAX } else { 1 << (shift - 1) };
        let inexact = rest != 0 || self.more;
        let up = match control.rounding {
            0 => rest > half || rest == half && (self.more || kept & 1 != 0),
            1 => self.negative && inexact,
            2 => !self.negative && inexact,
            _ => false,
        };
        (kept + u128::from(up), inexact)
    }

    /// Exponent of the leading bit. Not of zero.
    fn leading(self) -> i32 {
        self.exponent + 127 - self.significand.leading_zeros() as i32
    }

    /// Whether `format` has this number as a denormal one.
    pub(super) fn is_denormal_in(self, format: Format) -> bool {
        self.significand != 0 && self.leading() < 1 - format.greatest
    }

    /// The precision flag, if this tiny number is no denormal one of `format`.
    pub(super) fn precision_of_denormal(self, format: Format, control: Control) -> u32 {
        let least = 1 - format.greatest;
        let (_, inexact) = self.round(least + 1 - format.precision as i32, control);
        if inexact { flag::PRECISION } else { 0 }
    }

    /// Overflow, underflow and precision flags of this result in `format`.
    pub(super) fn flags(self, format: Format, control: Control) -> u32 {
        if self.significand == 0 {
            return 0;
        }
        let leading = self.leading();
        let precision = |inexact: bool| if inexact { flag::PRECISION } else { 0 };
        let is_unmasked = |flag: u32| control.unmasked() & flag != 0;
        let (rounded, inexact) = self.round(leading + 1 - format.precision as i32, control);
        let exponent = if rounded >> format.precision != 0 { leading + 1 } else { leading };
        if exponent > format.greatest {
            return flag::OVERFLOW | precision(inexact || !is_unmasked(flag::OVERFLOW));
        }
        let least = 1 - format.greatest;
        if exponent >= least {
            return precision(inexact);
        }
        if is_unmasked(flag::UNDERFLOW) {
            return flag::UNDERFLOW | precision(inexact);
        }
        let precision = self.precision_of_denormal(format, control);
        if precision != 0 || control.flushes { flag::UNDERFLOW | flag::PRECISION } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OE: u32 = flag::OVERFLOW;
    const UE: u32 = flag::UNDERFLOW;
    const PE: u32 = flag::PRECISION;

    fn single(value: f32) -> Exact {
        SINGLE.decode(value.to_bits().into(), false).unwrap()
    }

    #[test]
    fn flags_depend_on_what_is_unmasked() {
        let (tiny, huge) = (f32::from_bits(0x0080_0000), f32::MAX);
        let above = single(f32::from_bits(0x0080_0001));
        // Exact result, MXCSR, flags.
        let rows = [
            (single(1.0).add(single(2.0)), 0x1f80, 0),
            (single(1.0).add(single(1e-30)), 0x1f80, PE),
            (single(1.0).add(single(-1e-30)), 0x1f80, PE),
            (single(huge).add(single(huge)), 0x1f80, OE | PE),
            (single(huge).add(single(huge)), 0x1b80, OE),
            (single(huge).multiply(single(huge)), 0x1b80, OE | PE),
            (single(huge).add(single(1.0)), 0x1b80, PE),
            (single(huge).add(single(1.0)), 0x5b80, OE | PE), // rounded up
            (single(tiny).multiply(single(0.5)), 0x1f80, 0),
            (single(tiny).multiply(single(0.5)), 0x9f80, UE | PE), // flushed
            (single(tiny).multiply(single(0.5)), 0x1780, UE),
            (above.multiply(single(0.3)), 0x1780, UE | PE),
            (single(tiny).divide(single(3.0)).unwrap(), 0x1f80, UE | PE),
            // Tiny before rounding, not after it.
            (above.multiply(single(f32::from_bits(0x3f7f_fffe))), 0x1780, PE),
            (single(1.5).scale(single(-200.5)), 0x1f80, UE | PE),
            (single(1.5).scale(single(-148.5)), 0x1780, UE),
            (single(1.5).scale(single(1e30)), 0x1b80, OE),
        ];
        for (exact, mxcsr, flags) in rows {
            assert_eq!(exact.flags(SINGLE, Control::new(mxcsr)), flags, "{exact:x?} {mxcsr:#x}");
        }
    }

    #[test]
    fn numbers_that_cancel_leave_nothing() {
        let zero = single(3.5).add(single(-3.5));
        assert_eq!(zero.flags(SINGLE, Control::new(0)), 0);
        assert_eq!(SINGLE.decode(0x7f80_0000, false), None);
        assert_eq!(SINGLE.decode(1, true).unwrap().flags(SINGLE, Control::new(0)), 0);
    }
}
