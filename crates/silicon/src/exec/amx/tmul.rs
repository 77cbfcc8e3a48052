//! The matrix unit. Every product is one of two kernels, sums of pairs of 16-bit integers or of single-precision
//! numbers, over sources that have been brought into the form which the kernel takes ([`Planes`]). There are three of
//! each, to the same bits: of plain Rust, for AVX2, and for AVX-512 ([`super::simd`]).
//!
//! VDPBF16PS is of no use to TDPBF16PS, though both multiply pairs of BF16: it adds both products of a pair to one sum,
//! one after the other, where TDPBF16PS keeps a sum of the even and one of the odd products until the end. (SDM vol. 2,
//! TDPBF16PS, VDPBF16PS.)

use super::simd;
use super::softfloat::{add, from_half, is_nan, multiply_add};
use crate::hostexec;
use crate::tiles::{ROWS, Row, Tile};

/// What is multiplied with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Product {
    /// TDPBSSD.
    SignedSigned,
    /// TDPBSUD.
    SignedUnsigned,
    /// TDPBUSD.
    UnsignedSigned,
    /// TDPBUUD.
    UnsignedUnsigned,
    /// TDPBF16PS.
    Bf16,
    /// TDPFP16PS.
    Fp16,
    /// TCMMRLFP16PS: real part of the product of complex numbers.
    ComplexReal,
    /// TCMMIMFP16PS: imaginary part.
    ComplexImaginary,
}

impl Product {
    pub(super) const ALL: [Product; 8] = [
        Product::SignedSigned,
        Product::SignedUnsigned,
        Product::UnsignedSigned,
        Product::UnsignedUnsigned,
        Product::Bf16,
        Product::Fp16,
        Product::ComplexReal,
        Product::ComplexImaginary,
    ];

    /// The product whose `as u8` is `number`.
    #[inline]
    pub(super) fn from_number(number: u8) -> Option<Product> {
        Product::ALL.get(usize::from(number)).copied()
    }

    /// Elements of the first and of the second source.
    fn elements(self) -> (Elements, Elements) {
        use Elements::{Signed, Unsigned};
        match self {
            Product::SignedSigned => (Signed, Signed),
            Product::SignedUnsigned => (Signed, Unsigned),
            Product::UnsignedSigned => (Unsigned, Signed),
            Product::UnsignedUnsigned => (Unsigned, Unsigned),
            Product::Bf16 => (Elements::Bf16, Elements::Bf16),
            Product::Fp16 | Product::ComplexReal | Product::ComplexImaginary => {
                (Elements::Fp16, Elements::Fp16)
            }
        }
    }
}

/// What the elements of a source are, four or two in a doubleword.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Elements {
    /// Signed bytes.
    Signed,
    /// Unsigned bytes.
    Unsigned,
    /// BF16.
    Bf16,
    /// FP16.
    Fp16,
}

/// Rows and columns of the destination, and how many products each of its elements is the sum of (the rows of the second
/// source): all 1 to 16, in doublewords.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// A source, each doubleword of it made two: of bytes the even and the odd ones as pairs of 16-bit integers, of 16-bit
/// numbers the even and the odd one in single precision.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Planes(pub(super) [[Row; ROWS]; 2]);

impl Planes {
    pub(super) const ZERO: Planes = Planes([Tile::ZERO.0; 2]);

    /// Planes of the first `rows` rows of `tile`.
    fn of(tile: &Tile, elements: Elements, rows: usize) -> Planes {
        let mut planes = Planes::ZERO;
        let [even, odd] = &mut planes.0;
        for (row, (even, odd)) in tile.0.iter().zip(even.iter_mut().zip(odd)).take(rows) {
            for (word, (even, odd)) in row.iter().zip(even.iter_mut().zip(odd)) {
                (*even, *odd) = split(*word, elements);
            }
        }
        planes
    }
}

/// The doubleword of each plane.
fn split(word: u32, elements: Elements) -> (u32, u32) {
    let pair = |low: i16, high: i16| u32::from(low as u16) | u32::from(high as u16) << 16;
    let bytes = word.to_le_bytes();
    match elements {
        Elements::Signed => {
            let [a, b, c, d] = bytes.map(|byte| i16::from(byte as i8));
            (pair(a, c), pair(b, d))
        }
        Elements::Unsigned => {
            let [a, b, c, d] = bytes.map(i16::from);
            (pair(a, c), pair(b, d))
        }
        Elements::Bf16 => (word << 16, word & 0xffff_0000),
        Elements::Fp16 => (from_half(word as u16), from_half((word >> 16) as u16)),
    }
}

/// Which kernels to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// Plain Rust.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 with VNNI.
    Avx512,
}

impl Engine {
    #[cfg(test)]
    pub(super) const ALL: [Engine; 3] = [Engine::Portable, Engine::Avx2, Engine::Avx512];

    /// Whether this machine has it.
    #[inline]
    pub(super) fn available(self) -> bool {
        match self {
            Engine::Portable => true,
            Engine::Avx2 => simd::has_avx2(),
            Engine::Avx512 => simd::has_avx512(),
        }
    }

    /// The fastest that this machine has.
    #[inline]
    fn best() -> Engine {
        if Engine::Avx512.available() {
            Engine::Avx512
        } else if Engine::Avx2.available() {
            Engine::Avx2
        } else {
            Engine::Portable
        }
    }
}

/// Adds the product of `a` and `b` to `c`, and zeroes what is beyond its rows and columns.
#[inline]
pub(super) fn multiply(product: Product, c: &mut Tile, a: &Tile, b: &Tile, shape: Shape) {
    multiply_with(Engine::best(), product, c, a, b, shape);
}

/// As [`multiply`], with the kernels of `engine`, which this machine has.
pub(super) fn multiply_with(
    engine: Engine,
    product: Product,
    c: &mut Tile,
    a: &Tile,
    b: &Tile,
    shape: Shape,
) {
    let (of_a, _) = product.elements();
    if engine == Engine::Portable || matches!(of_a, Elements::Signed | Elements::Unsigned) {
        compute(engine, product, c, a, b, shape);
    } else {
        // The guest's MXCSR sees none of the flags, not even those of conversions.
        hostexec::flushing_denormals(|| compute(engine, product, c, a, b, shape));
    }
}

fn compute(engine: Engine, product: Product, c: &mut Tile, a: &Tile, b: &Tile, shape: Shape) {
    let (of_a, of_b) = product.elements();
    let planes = |tile: &Tile, elements: Elements, rows: usize| match engine {
        Engine::Portable => Planes::of(tile, elements, rows),
        Engine::Avx2 | Engine::Avx512 => simd::planes(tile, elements, rows),
    };
    let (mut a, b) = (planes(a, of_a, shape.m), planes(b, of_b, shape.k));
    match product {
        Product::ComplexReal => a.0[1].as_flattened_mut().iter_mut().for_each(|odd| *odd ^= 1 << 31),
        Product::ComplexImaginary => a.0.swap(0, 1),
        _ => {}
    }
    match of_a {
        Elements::Signed | Elements::Unsigned => match engine {
            Engine::Portable => integer(c, &a, &b, shape),
            Engine::Avx2 => simd::integer_avx2(c, &a, &b, shape),
            Engine::Avx512 => simd::integer_avx512(c, &a, &b, shape),
        },
        Elements::Bf16 | Elements::Fp16 => match engine {
            Engine::Portable => float(c, &a, &b, shape),
            Engine::Avx2 => float_by(simd::float_avx2, c, &a, &b, shape),
            Engine::Avx512 => float_by(simd::float_avx512, c, &a, &b, shape),
        },
    }
    c.crop(shape.m, 4 * shape.n);
}

/// The sum of the products of two pairs, wrapped.
fn pair_product(a: u32, b: u32) -> u32 {
    let half = |x: u32, shift: u32| i32::from((x >> shift) as u16 as i16);
    // Each product has 17 bits and a sign, so that only the addition to the destination can wrap.
    (half(a, 0) * half(b, 0) + half(a, 16) * half(b, 16)) as u32
}

fn integer(c: &mut Tile, a: &Planes, b: &Planes, shape: Shape) {
    for (m, row) in c.0.iter_mut().enumerate().take(shape.m) {
        for k in 0..shape.k {
            for plane in 0..2 {
                let (a, b) = (a.0[plane][m][k], &b.0[plane][k]);
                for (sum, &b) in row.iter_mut().zip(b).take(shape.n) {
                    *sum = sum.wrapping_add(pair_product(a, b));
                }
            }
        }
    }
}

/// One element of the destination, which is `before`.
fn element(before: u32, a: &Planes, b: &Planes, (m, n): (usize, usize), k: usize) -> u32 {
    let sum = |plane: usize| (0..k).fold(0, |sum, k| multiply_add(a.0[plane][m][k], b.0[plane][k][n], sum));
    add(before, add(sum(0), sum(1)))
}

fn float(c: &mut Tile, a: &Planes, b: &Planes, shape: Shape) {
    for m in 0..shape.m {
        for n in 0..shape.n {
            c.0[m][n] = element(c.0[m][n], a, b, (m, n), shape.k);
        }
    }
}

/// By a kernel that says whether any element became a NaN. Which NaN it is that comes out
/// of several depends on the maker of the host's CPU: these elements are computed anew.
fn float_by(
    kernel: fn(&mut Tile, &Planes, &Planes, Shape) -> bool,
    c: &mut Tile,
    a: &Planes,
    b: &Planes,
    shape: Shape,
) {
    let before = *c;
    if !kernel(c, a, b, shape) {
        return;
    }
    for m in 0..shape.m {
        for n in 0..shape.n {
            if is_nan(c.0[m][n]) {
                c.0[m][n] = element(before.0[m][n], a, b, (m, n), shape.k);
            }
        }
    }
}
