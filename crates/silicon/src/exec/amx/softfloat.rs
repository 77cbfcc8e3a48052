//! Single-precision arithmetic by integers, as the matrix unit does it: round to nearest even, denormals taken for zero
//! and results flushed to zero, no MXCSR, no exceptions. While guest code runs the host's MXCSR is the guest's, so that
//! plain floating-point operations would do as the guest has set it.

const SIGN: u32 = 1 << 31;
const ABSOLUTE: u32 = !SIGN;
const INFINITY: u32 = 0x7f80_0000;
/// A NaN's bit that makes it a quiet one.
const QUIET: u32 = 1 << 22;
/// What invalid operations give.
const DEFAULT_NAN: u32 = 0xffc0_0000;
/// Bits of a significand.
const PRECISION: i32 = 24;
/// A number is its significand times two to the power of its biased exponent less this.
const BIAS: i32 = 150;
/// Further than this to the left of the other term, the product only rounds as if there were more below it. Likewise
/// the addend. Both leave room in 128 bits.
const PRODUCT_FAR: i32 = 72;
const ADDEND_FAR: i32 = 96;

pub(super) fn is_nan(x: u32) -> bool {
    x & ABSOLUTE > INFINITY
}

fn is_zero(x: u32) -> bool {
    x & ABSOLUTE == 0
}

fn is_infinite(x: u32) -> bool {
    x & ABSOLUTE == INFINITY
}

fn denormal_as_zero(x: u32) -> u32 {
    if x & INFINITY == 0 { x & SIGN } else { x }
}

/// Significand and biased exponent of a normal number.
fn parts(x: u32) -> (i128, i32) {
    (i128::from(x & 0x7f_ffff | 0x80_0000), ((x & INFINITY) >> 23) as i32)
}

/// `magnitude` × 2^`exponent`, rounded. `magnitude` is not zero.
fn round(sign: u32, magnitude: u128, exponent: i32) -> u32 {
    let excess = 128 - magnitude.leading_zeros() as i32 - PRECISION;
    let (mut significand, mut biased) = if excess > 0 {
        let (kept, lost) = (magnitude >> excess, magnitude & ((1 << excess) - 1));
        let half = 1u128 << (excess - 1);
        let up = lost > half || lost == half && kept & 1 != 0;
        (kept as u32 + u32::from(up), exponent + excess + BIAS)
    } else {
        ((magnitude << -excess) as u32, exponent + excess + BIAS)
    };
    if significand >> PRECISION != 0 {
        (significand, biased) = (significand >> 1, biased + 1);
    }
    match biased {
        ..=0 => sign,
        255.. => sign | INFINITY,
        _ => sign | (biased as u32) << 23 | significand & 0x7f_ffff,
    }
}

/// a × b + c, rounded once. Of several NaNs the first counts, in the order a, b, c.
pub(super) fn multiply_add(a: u32, b: u32, c: u32) -> u32 {
    if let Some(nan) = [a, b, c].into_iter().find(|&x| is_nan(x)) {
        return nan | QUIET;
    }
    let [a, b, c] = [a, b, c].map(denormal_as_zero);
    let sign = (a ^ b) & SIGN;
    if is_infinite(a) || is_infinite(b) {
        let invalid = is_zero(a) || is_zero(b) || is_infinite(c) && (c & SIGN) != sign;
        return if invalid { DEFAULT_NAN } else { sign | INFINITY };
    }
    if is_infinite(c) {
        return c;
    }
    if is_zero(a) || is_zero(b) {
        // The sum of two zeroes of different sign is positive.
        return if is_zero(c) { sign & c } else { c };
    }
    let ((ma, ea), (mb, eb)) = (parts(a), parts(b));
    let (product, exponent) = (ma * mb, ea + eb - 2 * BIAS);
    if is_zero(c) {
        return round(sign, product.unsigned_abs(), exponent);
    }
    let (addend, addend_exponent) = parts(c);
    let addend_exponent = addend_exponent - BIAS;
    let distance = exponent - addend_exponent;
    let (product, addend, exponent) = if distance > PRODUCT_FAR {
        (product << PRODUCT_FAR, 1, exponent - PRODUCT_FAR)
    } else if distance >= 0 {
        (product << distance, addend, addend_exponent)
    } else if distance >= -ADDEND_FAR {
        (product, addend << -distance, exponent)
    } else {
        (1, addend << ADDEND_FAR, addend_exponent - ADDEND_FAR)
    };
    let signed = |negative: bool, magnitude: i128| if negative { -magnitude } else { magnitude };
    let sum = signed(sign != 0, product) + signed(c & SIGN != 0, addend);
    match sum {
        0 => 0,
        _ => round(if sum < 0 { SIGN } else { 0 }, sum.unsigned_abs(), exponent),
    }
}

/// a + b. Of two NaNs the first counts.
pub(super) fn add(a: u32, b: u32) -> u32 {
    multiply_add(a, 0x3f80_0000, b)
}

/// A half-precision number, its denormals included, in single precision. NaNs become quiet.
pub(super) fn from_half(half: u16) -> u32 {
    let sign = u32::from(half & 0x8000) << 16;
    let (exponent, fraction) = (u32::from(half >> 10 & 31), u32::from(half & 0x3ff));
    match (exponent, fraction) {
        (0, 0) => sign,
        (31, 0) => sign | INFINITY,
        (31, _) => sign | INFINITY | QUIET | fraction << 13,
        (0, _) => {
            let shift = fraction.leading_zeros() - 21;
            sign | (113 - shift) << 23 | (fraction << shift & 0x3ff) << 13
        }
        _ => sign | (exponent + 112) << 23 | fraction << 13,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fma(a: f32, b: f32, c: f32) -> f32 {
        f32::from_bits(multiply_add(a.to_bits(), b.to_bits(), c.to_bits()))
    }

    #[test]
    fn sums_and_products() {
        assert_eq!(fma(3.0, 5.0, 7.0), 22.0);
        assert_eq!(fma(-3.0, 5.0, 15.0).to_bits(), 0, "exact cancellation is +0");
        assert_eq!(fma(1e30, 1e30, -1.0), f32::INFINITY);
        assert_eq!(fma(1e-30, 1e-30, 1.0), 1.0);
        assert_eq!(fma(-1e-30, 1e-30, 0.0).to_bits(), SIGN, "flushed with its sign");
        assert_eq!(fma(1.0, 1.0, -f32::EPSILON / 4.0), 1.0 - f32::EPSILON / 4.0 * 2.0 * 0.0, "rounded once");
        // 4097² = 2^24 + 2^13 + 1: the last bit is lost in a product, but not before the sum.
        assert_eq!(fma(4097.0, 4097.0, -16_785_408.0), 1.0);
        assert_eq!(f32::from_bits(add(1.5f32.to_bits(), 2.25f32.to_bits())), 3.75);
    }

    #[test]
    fn denormals_are_zero() {
        let tiny = f32::from_bits(1);
        assert_eq!(fma(tiny, f32::MAX, 0.0), 0.0);
        assert_eq!(fma(1.0, 0.0, tiny), 0.0);
        assert_eq!(fma(f32::MIN_POSITIVE, 1.0, 0.0), f32::MIN_POSITIVE);
        assert_eq!(fma(f32::MIN_POSITIVE, 0.5, 0.0), 0.0);
        assert_eq!(fma(f32::MIN_POSITIVE, 1.5, -f32::MIN_POSITIVE), 0.0, "a denormal difference");
    }

    #[test]
    fn nans_and_infinities() {
        let bits = |a, b, c| multiply_add(a, b, c);
        let (one, snan, qnan) = (0x3f80_0000, 0x7f80_0001, 0xffc1_2345);
        assert_eq!(bits(snan, qnan, one), snan | QUIET);
        assert_eq!(bits(one, qnan, snan), qnan);
        assert_eq!(bits(INFINITY, 0, snan), snan | QUIET);
        assert_eq!(bits(INFINITY, 0, one), DEFAULT_NAN);
        assert_eq!(bits(INFINITY, one, INFINITY | SIGN), DEFAULT_NAN);
        assert_eq!(bits(INFINITY | SIGN, one, one), INFINITY | SIGN);
        assert_eq!(bits(one, one, INFINITY), INFINITY);
    }

    #[test]
    fn half_precision() {
        for (half, single) in [
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0001, 2f32.powi(-24)),
            (0x03ff, 1023.0 * 2f32.powi(-24)),
            (0x0400, 2f32.powi(-14)),
            (0x7c00, f32::INFINITY),
            (0x8000, -0.0),
        ] {
            assert_eq!(from_half(half), single.to_bits(), "{half:#x}");
        }
        assert_eq!(from_half(0xfc01), 0xffc0_2000);
        assert_eq!(from_half(0x7e00), 0x7fc0_0000);
    }
}
