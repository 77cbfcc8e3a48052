//! The matrix unit's kernels for AVX2 and AVX-512.
//!
//! They compute whole rows of sixteen, and as many rows as one step takes: what is too much is cropped by the caller, and
//! can only be NaNs too many. The floating-point ones expect an MXCSR that rounds to nearest and takes denormals for
//! zero; each is a function of its own that reads its operands from memory, so that nothing of it is done before MXCSR is
//! what it is to be.
#![expect(unsafe_code, reason = "vector intrinsics, called where the CPU has them")]

use std::arch::x86_64::*;

use super::tmul::{Elements, Planes, Shape};
use crate::tiles::{Row, Tile};

/// Whether the AVX2 kernels can run.
#[inline]
pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// Whether the AVX-512 kernels can run.
#[inline]
pub(super) fn has_avx512() -> bool {
    has_avx2() && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")
}

/// [`Planes`] of the first `rows` rows of a tile.
pub(super) fn planes(tile: &Tile, elements: Elements, rows: usize) -> Planes {
    assert!(has_avx2());
    // SAFETY: the CPU has what the function needs.
    unsafe { planes_256(tile, elements, rows) }
}

pub(super) fn integer_avx2(c: &mut Tile, a: &Planes, b: &Planes, shape: Shape) {
    assert!(has_avx2());
    // SAFETY: the CPU has what the function needs.
    unsafe { integer_256(c, a, b, shape) }
}

pub(super) fn integer_avx512(c: &mut Tile, a: &Planes, b: &Planes, shape: Shape) {
    assert!(has_avx512());
    // SAFETY: the CPU has what the function needs.
    unsafe { integer_512(c, a, b, shape) }
}

/// Whether any element became a NaN.
pub(super) fn float_avx2(c: &mut Tile, a: &Planes, b: &Planes, shape: Shape) -> bool {
    assert!(has_avx2());
    // SAFETY: the CPU has what the function needs.
    unsafe { float_256(c, a, b, shape) }
}

/// Whether any element became a NaN.
pub(super) fn float_avx512(c: &mut Tile, a: &Planes, b: &Planes, shape: Shape) -> bool {
    assert!(has_avx512());
    // SAFETY: the CPU has what the function needs.
    unsafe { float_512(c, a, b, shape) }
}

/// Half `half` of a row.
#[inline]
#[target_feature(enable = "avx2")]
fn load_256(row: &Row, half: usize) -> __m256i {
    let (halves, _) = row.as_chunks::<8>();
    // SAFETY: eight doublewords.
    unsafe { _mm256_loadu_si256(halves[half].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_ps(row: &Row, half: usize) -> __m256 {
    _mm256_castsi256_ps(load_256(row, half))
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_256(row: &mut Row, half: usize, value: __m256i) {
    let (halves, _) = row.as_chunks_mut::<8>();
    // SAFETY: eight doublewords.
    unsafe { _mm256_storeu_si256(halves[half].as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx2,f16c")]
fn planes_256(tile: &Tile, elements: Elements, rows: usize) -> Planes {
    match elements {
        Elements::Signed => split_all(tile, rows, |x| split_signed(x)),
        Elements::Unsigned => split_all(tile, rows, |x| split_unsigned(x)),
        Elements::Bf16 => split_all(tile, rows, |x| split_bf16(x)),
        Elements::Fp16 => split_all(tile, rows, |x| split_fp16(x)),
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn split_all(tile: &Tile, rows: usize, split: impl Fn(__m256i) -> (__m256i, __m256i)) -> Planes {
    let mut planes = Planes::ZERO;
    for (row, words) in tile.0.iter().enumerate().take(rows) {
        for half in 0..2 {
            let (even, odd) = split(load_256(words, half));
            store_256(&mut planes.0[0][row], half, even);
            store_256(&mut planes.0[1][row], half, odd);
        }
    }
    planes
}

#[inline]
#[target_feature(enable = "avx2")]
fn split_signed(x: __m256i) -> (__m256i, __m256i) {
    (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)), _mm256_srai_epi16::<8>(x))
}

#[inline]
#[target_feature(enable = "avx2")]
fn split_unsigned(x: __m256i) -> (__m256i, __m256i) {
    (_mm256_and_si256(x, _mm256_set1_epi16(0xff)), _mm256_srli_epi16::<8>(x))
}

#[inline]
#[target_feature(enable = "avx2")]
fn split_bf16(x: __m256i) -> (__m256i, __m256i) {
    (_mm256_slli_epi32::<16>(x), _mm256_and_si256(x, _mm256_set1_epi32(-0x1_0000)))
}

/// VCVTPH2PS takes no notice of MXCSR's denormals-are-zero.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn split_fp16(x: __m256i) -> (__m256i, __m256i) {
    (widen(_mm256_and_si256(x, _mm256_set1_epi32(0xffff))), widen(_mm256_srli_epi32::<16>(x)))
}

/// The half-precision numbers in the low words of `x` in single precision.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn widen(x: __m256i) -> __m256i {
    let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(x, x));
    _mm256_castps_si256(_mm256_cvtph_ps(_mm256_castsi256_si128(packed)))
}

/// Four rows at a time.
#[target_feature(enable = "avx2")]
fn integer_256(c: &mut Tile, a: &Planes, b: &Planes, shape: Shape) {
    let [a_even, a_odd] = &a.0;
    for (block, rows) in c.0.as_chunks_mut::<4>().0.iter_mut().enumerate().take(shape.m.div_ceil(4)) {
        let mut sums = [[_mm256_setzero_si256(); 2]; 4];
        for (sum, row) in sums.iter_mut().zip(&*rows) {
            *sum = [load_256(row, 0), load_256(row, 1)];
        }
        for k in 0..shape.k {
            let (even, odd) = (&b.0[0][k], &b.0[1][k]);
            let (e0, e1, o0, o1) = (load_256(even, 0), load_256(even, 1), load_256(odd, 0), load_256(odd, 1));
            for (r, sum) in sums.iter_mut().enumerate() {
                let even = _mm256_set1_epi32(a_even[4 * block + r][k] as i32);
                let odd = _mm256_set1_epi32(a_odd[4 * block + r][k] as i32);
                let low = _mm256_add_epi32(_mm256_madd_epi16(even, e0), _mm256_madd_epi16(odd, o0));
                let high = _mm256_add_epi32(_mm256_madd_epi16(even, e1), _mm256_madd_epi16(odd, o1));
                *sum = [_mm256_add_epi32(sum[0], low), _mm256_add_epi32(sum[1], high)];
            }
        }
        for (sum, row) in sums.iter().zip(rows) {
            store_256(row, 0, sum[0]);
            store_256(row, 1, sum[1]);
        }
    }
}

/// Two rows at a time.
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
fn float_256(c: &mut Tile, a: &Planes, b: &Planes, shape: Shape) -> bool {
    let [a_even, a_odd] = &a.0;
    let mut nan = _mm256_setzero_ps();
    for (block, rows) in c.0.as_chunks_mut::<2>().0.iter_mut().enumerate().take(shape.m.div_ceil(2)) {
        let mut sums = [[_mm256_setzero_ps(); 4]; 2];
        for k in 0..shape.k {
            let (even, odd) = (&b.0[0][k], &b.0[1][k]);
            let (e0, e1) = (load_ps(even, 0), load_ps(even, 1));
            let (o0, o1) = (load_ps(odd, 0), load_ps(odd, 1));
            for (r, sum) in sums.iter_mut().enumerate() {
                let even = _mm256_set1_ps(f32::from_bits(a_even[2 * block + r][k]));
                let odd = _mm256_set1_ps(f32::from_bits(a_odd[2 * block + r][k]));
                *sum = [
                    _mm256_fmadd_ps(even, e0, sum[0]),
                    _mm256_fmadd_ps(even, e1, sum[1]),
                    _mm256_fmadd_ps(odd, o0, sum[2]),
                    _mm256_fmadd_ps(odd, o1, sum[3]),
                ];
            }
        }
        for (sum, row) in sums.iter().zip(rows) {
            for half in 0..2 {
                let before = load_ps(row, half);
                let after = _mm256_add_ps(before, _mm256_add_ps(sum[half], sum[2 + half]));
                nan = _mm256_or_ps(nan, _mm256_cmp_ps::<_CMP_UNORD_Q>(after, after));
                store_256(row, half, _mm256_castps_si256(after));
            }
        }
    }
    _mm256_movemask_ps(nan) != 0
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_512(row: &Row) -> __m512i {
    // SAFETY: sixteen doublewords.
    unsafe { _mm512_loadu_si512(row.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_512(row: &mut Row, value: __m512i) {
    // SAFETY: sixteen doublewords.
    unsafe { _mm512_storeu_si512(row.as_mut_ptr().cast(), value) }
}

/// Eight rows at a time. VPDPWSSD wraps as the matrix unit does.
#[target_feature(enable = "avx512f,avx512vnni")]
fn integer_512(c: &mut Tile, a: &Planes, b: &Planes, shape: Shape) {
    let [a_even, a_odd] = &a.0;
    for (block, rows) in c.0.as_chunks_mut::<8>().0.iter_mut().enumerate().take(shape.m.div_ceil(8)) {
        let mut sums = [_mm512_setzero_si512(); 8];
        for (sum, row) in sums.iter_mut().zip(&*rows) {
            *sum = load_512(row);
        }
        for k in 0..shape.k {
            let (even, odd) = (load_512(&b.0[0][k]), load_512(&b.0[1][k]));
            for (r, sum) in sums.iter_mut().enumerate() {
                let first = _mm512_set1_epi32(a_even[8 * block + r][k] as i32);
                let second = _mm512_set1_epi32(a_odd[8 * block + r][k] as i32);
                *sum = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(*sum, first, even), second, odd);
            }
        }
        for (sum, row) in sums.iter().zip(rows) {
            store_512(row, *sum);
        }
    }
}

/// Eight rows at a time.
#[inline(never)]
#[target_feature(enable = "avx512f")]
fn float_512(c: &mut Tile, a: &Planes, b: &Planes, shape: Shape) -> bool {
    let [a_even, a_odd] = &a.0;
    let mut nan = 0;
    for (block, rows) in c.0.as_chunks_mut::<8>().0.iter_mut().enumerate().take(shape.m.div_ceil(8)) {
        let mut sums = [[_mm512_setzero_ps(); 2]; 8];
        for k in 0..shape.k {
            let even = _mm512_castsi512_ps(load_512(&b.0[0][k]));
            let odd = _mm512_castsi512_ps(load_512(&b.0[1][k]));
            for (r, sum) in sums.iter_mut().enumerate() {
                let first = _mm512_set1_ps(f32::from_bits(a_even[8 * block + r][k]));
                let second = _mm512_set1_ps(f32::from_bits(a_odd[8 * block + r][k]));
                *sum = [_mm512_fmadd_ps(first, even, sum[0]), _mm512_fmadd_ps(second, odd, sum[1])];
            }
        }
        for (sum, row) in sums.iter().zip(rows) {
            let before = _mm512_castsi512_ps(load_512(row));
            let after = _mm512_add_ps(before, _mm512_add_ps(sum[0], sum[1]));
            nan |= _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(after, after);
            store_512(row, _mm512_castps_si512(after));
        }
    }
    nan != 0
}
