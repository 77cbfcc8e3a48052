//! The matrix unit as the SDM's pseudo-code has it, element by element, for tests: what every kernel is compared with.
//! Its arithmetic is double precision's, rounded twice in a way that cannot be told from once.

use super::tmul::{Product, Shape};
use crate::tiles::Tile;

const QUIET: u32 = 1 << 22;

fn byte(tile: &Tile, row: usize, i: usize) -> u8 {
    tile.0[row][i / 4].to_le_bytes()[i % 4]
}

fn half(tile: &Tile, row: usize, i: usize) -> u16 {
    (tile.0[row][i / 2] >> (16 * (i % 2))) as u16
}

/// A BF16 number.
fn bf16(tile: &Tile, row: usize, i: usize) -> f32 {
    f32::from_bits(u32::from(half(tile, row, i)) << 16)
}

/// An FP16 number, by its definition.
fn fp16(tile: &Tile, row: usize, i: usize) -> f32 {
    let bits = half(tile, row, i);
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f32::from(bits & 0x3ff));
    let magnitude = match exponent {
        0 => fraction * 2f32.powi(-24),
        31 if fraction == 0.0 => f32::INFINITY,
        31 => f32::from_bits(0x7fc0_0000 | u32::from(bits & 0x3ff) << 13),
        _ => (1024.0 + fraction) * 2f32.powi(exponent - 25),
    };
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

/// Denormals are zeroes.
fn daz(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// The multiplication and addition of DAZ = FTZ = 1.
pub(super) fn fma32(sum: f32, a: f32, b: f32) -> f32 {
    if let Some(nan) = [a, b, sum].into_iter().find(|x| x.is_nan()) {
        return f32::from_bits(nan.to_bits() | QUIET);
    }
    let [sum, a, b] = [sum, a, b].map(|x| f64::from(daz(x)));
    // Exact: 48 bits.
    let product = a * b;
    let total = product + sum;
    if total.is_nan() {
        return f32::from_bits(0xffc0_0000);
    }
    if total.is_infinite() {
        return total as f32;
    }
    // What the addition lost (Knuth's TwoSum), made to show in the last bit: rounding to odd, after which rounding to
    // fewer bits gives what rounding the exact sum would.
    let part = total - product;
    let lost = (product - (total - part)) + (sum - part);
    let odd = if lost != 0.0 && total.to_bits() & 1 == 0 {
        let away = (lost > 0.0) == (total > 0.0);
        f64::from_bits(if away { total.to_bits() + 1 } else { total.to_bits() - 1 })
    } else {
        total
    };
    // Tiny is what would be below the normal numbers after rounding to 24 bits.
    if odd.abs() < 2f64.powi(-126) - 2f64.powi(-151) {
        return 0f32.copysign(odd as f32);
    }
    odd as f32
}

fn add32(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        return f32::from_bits(a.to_bits() | QUIET);
    }
    fma32(b, a, 1.0)
}

/// The factors that element `k` of a row of the first source and element `n` of row `k` of the second contribute to the
/// even and the odd sum.
fn factors(product: Product, (a, m): (&Tile, usize), (b, n): (&Tile, usize), k: usize) -> [(f32, f32); 2] {
    match product {
        Product::Bf16 => [0, 1].map(|odd| (bf16(a, m, 2 * k + odd), bf16(b, k, 2 * n + odd))),
        Product::Fp16 => [0, 1].map(|odd| (fp16(a, m, 2 * k + odd), fp16(b, k, 2 * n + odd))),
        Product::ComplexReal => {
            [(fp16(a, m, 2 * k), fp16(b, k, 2 * n)), (-fp16(a, m, 2 * k + 1), fp16(b, k, 2 * n + 1))]
        }
        _ => [(fp16(a, m, 2 * k + 1), fp16(b, k, 2 * n)), (fp16(a, m, 2 * k), fp16(b, k, 2 * n + 1))],
    }
}

fn integer_factor(signed: bool, byte: u8) -> i32 {
    if signed { i32::from(byte as i8) } else { i32::from(byte) }
}

/// What the destination is after the product.
pub(super) fn multiply(product: Product, c: &Tile, a: &Tile, b: &Tile, shape: Shape) -> Tile {
    let mut result = Tile::ZERO;
    for m in 0..shape.m {
        for n in 0..shape.n {
            let before = c.0[m][n];
            let signs = match product {
                Product::SignedSigned => Some((true, true)),
                Product::SignedUnsigned => Some((true, false)),
                Product::UnsignedSigned => Some((false, true)),
                Product::UnsignedUnsigned => Some((false, false)),
                _ => None,
            };
            result.0[m][n] = if let Some((signed_a, signed_b)) = signs {
                (0..4 * shape.k).fold(before as i32, |sum, i| {
                    let x = integer_factor(signed_a, byte(a, m, i));
                    let y = integer_factor(signed_b, byte(b, i / 4, 4 * n + i % 4));
                    sum.wrapping_add(x * y)
                }) as u32
            } else {
                let mut sums = [0f32; 2];
                for k in 0..shape.k {
                    for (sum, (x, y)) in sums.iter_mut().zip(factors(product, (a, m), (b, n), k)) {
                        *sum = fma32(*sum, x, y);
                    }
                }
                add32(f32::from_bits(before), add32(sums[0], sums[1])).to_bits()
            };
        }
    }
    result
}
