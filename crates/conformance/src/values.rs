//! Operand values: random ones, and those at which instructions behave in special ways.

use iced_x86::MemorySize;

use crate::rng::Rng;

/// What the elements of a vector are taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Integers of any width.
    Integer,
    /// Half precision.
    Float16,
    /// Single precision.
    Float32,
    /// Double precision.
    Float64,
    /// x87 extended precision.
    Float80,
}

impl Kind {
    /// By the element type of a memory operand; `None` if it says nothing.
    pub fn of(size: MemorySize) -> Option<Kind> {
        match size.element_type() {
            MemorySize::Float16 | MemorySize::BFloat16 => Some(Kind::Float16),
            MemorySize::Float32 => Some(Kind::Float32),
            MemorySize::Float64 => Some(Kind::Float64),
            MemorySize::Float80 => Some(Kind::Float80),
            MemorySize::Unknown => None,
            _ => Some(Kind::Integer),
        }
    }
}

const FLOAT16: [u16; 14] = [
    0, 0x8000, 0x3c00, 0xbc00, 0x7c00, 0xfc00, 0x7e00, 0xfe01, 0x7d00, 0xfd55, 0x0001, 0x03ff, 0x0400, 0x7bff,
];

const FLOAT32: [u32; 28] = [
    0,
    0x8000_0000, // zeros
    0x3f80_0000,
    0xbf80_0000,
    0x3f00_0000,
    0x4000_0000,
    0x3fc0_0000, // 1, -1, 0.5, 2, 1.5
    0x7f80_0000,
    0xff80_0000, // infinities
    0x7fc0_0000,
    0xffc0_0001,
    0x7fff_ffff, // quiet NaNs
    0x7f80_0001,
    0xff80_1234,
    0x7fbf_ffff, // signalling NaNs
    0x0000_0001,
    0x8000_0001,
    0x007f_ffff,
    0x8040_0000, // denormals
    0x0080_0000,
    0x8080_0000, // least normals
    0x7f7f_ffff,
    0xff7f_ffff, // greatest
    0x4eff_ffff,
    0x4f00_0000,
    0xcf00_0000,
    0x5f00_0000,
    0xdf00_0001, // around integer limits
];

const FLOAT64: [u64; 30] = [
    0,
    1 << 63,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x3fe0_0000_0000_0000,
    0x4000_0000_0000_0000,
    0x3ff8_0000_0000_0000,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0xfff8_0000_0000_0001,
    0x7fff_ffff_ffff_ffff,
    0x7ff0_0000_0000_0001,
    0xfff0_0000_1234_5678,
    0x7ff7_ffff_ffff_ffff,
    1,
    0x8000_0000_0000_0001,
    0x000f_ffff_ffff_ffff,
    0x8008_0000_0000_0000,
    0x0010_0000_0000_0000,
    0x8010_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0xffef_ffff_ffff_ffff,
    0x41df_ffff_ffc0_0000,
    0x41e0_0000_0000_0000,
    0xc1e0_0000_0000_0000,
    0x43df_ffff_ffff_ffff,
    0x43e0_0000_0000_0000,
    0xc3e0_0000_0000_0000,
    0x47ef_ffff_f000_0000,
];

/// Sign and exponent, significand.
const FLOAT80: [(u16, u64); 26] = [
    (0, 0),
    (0x8000, 0), // zeros
    (0x3fff, 1 << 63),
    (0xbfff, 1 << 63),
    (0x3ffe, 1 << 63),
    (0x4000, 0xc90f_daa2_2168_c235), // 1, -1, 0.5, pi
    (0x7fff, 1 << 63),
    (0xffff, 1 << 63), // infinities
    (0x7fff, 3 << 62),
    (0xffff, 0xc000_0000_0000_0001),
    (0xffff, u64::MAX), // quiet NaNs
    (0x7fff, 0x8000_0000_0000_0001),
    (0xffff, 0xa000_0000_0000_0000), // signalling NaNs
    (0, 1),
    (0x8000, 0x7fff_ffff_ffff_ffff), // denormals
    (0, 1 << 63),
    (0x8000, 0x8000_0000_0000_0001), // pseudo-denormals
    (0x3fff, 0x7000_0000_0000_0000),
    (0xc123, 1),
    (0x7fff, 0),
    (0x7fff, 0x4000_0000_0000_0000), // unsupported
    (1, 1 << 63),
    (0x7ffe, u64::MAX),
    (0xfffe, u64::MAX), // extremes
    (0x403e, 1 << 63),
    (0xc03e, 1 << 63), // integer limits
];

/// Words whose bit patterns are boundaries of some integer width.
pub fn integer(rng: &mut Rng) -> u64 {
    const EDGES: [u64; 22] = [
        0,
        1,
        2,
        3,
        0x7f,
        0x80,
        0xff,
        0x100,
        0x7fff,
        0x8000,
        0xffff,
        0x1_0000,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x1_0000_0000,
        0x7fff_ffff_ffff_ffff,
        1 << 63,
        u64::MAX - 1,
        u64::MAX,
        0x8080_8080_8080_8080,
        0x5555_5555_5555_5555,
    ];
    match rng.below(10) {
        0..=2 => rng.pick(&EDGES),
        3 => rng.below(70),
        4 => 0u64.wrapping_sub(rng.below(70)),
        5 => 1 << rng.below(64),
        6 => u64::from(rng.next() as u32),
        _ => rng.next(),
    }
}

/// Ten bytes of an x87 value.
pub fn float80(rng: &mut Rng) -> [u8; 10] {
    let (exponent, significand) = match rng.below(10) {
        0..=3 => rng.pick(&FLOAT80),
        4 => (rng.next() as u16, rng.next()),
        5 => (rng.next() as u16, rng.next() | 1 << 63),
        6 => (0x4000 + rng.below(80) as u16, rng.next() | 1 << 63),
        7 => (0xbf80 + rng.below(160) as u16, rng.next() | 1 << 63),
        _ => (0x3fc0 + rng.below(100) as u16, (rng.next() | 1 << 63) & (u64::MAX << rng.below(64))),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&exponent.to_le_bytes());
    bytes
}

/// A significand's stored bits, mostly few of them, so that results may be exact.
fn fraction(rng: &mut Rng, bits: u32) -> u64 {
    let fraction = rng.next() & ((1 << bits) - 1);
    if rng.percent(60) { fraction & (u64::MAX << rng.below(u64::from(bits) + 1)) } else { fraction }
}

fn float32(rng: &mut Rng) -> u32 {
    match rng.below(12) {
        0..=3 => rng.pick(&FLOAT32),
        4 => rng.next() as u32,
        // Exponents whose sums and differences are about the limits.
        10..=11 => {
            let exponent = rng.pick(&[0, 1, 2, 30, 63, 64, 65, 127, 128, 150, 190, 191, 192, 230, 253, 254]);
            (rng.below(2) as u32) << 31 | exponent << 23 | fraction(rng, 23) as u32
        }
        5 => ((rng.below(2000) as i64 - 1000) as f32 / 8.0).to_bits(),
        // Moderate exponents, so that results are ordinary numbers.
        _ => ((rng.next() as u32) & 0x807f_ffff) | ((0x6f + rng.below(32) as u32) << 23),
    }
}

fn float64(rng: &mut Rng) -> u64 {
    match rng.below(12) {
        0..=3 => rng.pick(&FLOAT64),
        4 => rng.next(),
        10..=11 => {
            let exponent = rng.pick(&[
                0, 1, 2, 100, 510, 511, 512, 874, 895, 896, 897, 1023, 1024, 1150, 1151, 1534, 1535, 2045,
                2046,
            ]);
            rng.below(2) << 63 | exponent << 52 | fraction(rng, 52)
        }
        5 => ((rng.below(2000) as i64 - 1000) as f64 / 8.0).to_bits(),
        _ => (rng.next() & 0x800f_ffff_ffff_ffff) | ((0x3ef + rng.below(32)) << 52),
    }
}

fn float16(rng: &mut Rng) -> u16 {
    if rng.percent(40) { rng.pick(&FLOAT16) } else { rng.next() as u16 }
}

/// Fills a register or memory operand with elements of `kind`.
pub fn fill(rng: &mut Rng, kind: Kind, out: &mut [u8]) {
    if rng.percent(6) {
        let byte = rng.pick(&[0, 0xff, 0x80, 0x7f, 1]);
        out.fill(byte);
        return;
    }
    match kind {
        Kind::Integer => match rng.below(3) {
            0 => rng.fill(out),
            1 => out.chunks_mut(8).for_each(|c| c.copy_from_slice(&integer(rng).to_le_bytes()[..c.len()])),
            _ => {
                let width = rng.pick(&[1, 2, 4]);
                out.chunks_mut(width).for_each(|c| c.copy_from_slice(&integer(rng).to_le_bytes()[..c.len()]));
            }
        },
        Kind::Float16 => {
            out.chunks_mut(2).for_each(|c| c.copy_from_slice(&float16(rng).to_le_bytes()[..c.len()]));
        }
        Kind::Float32 => {
            out.chunks_mut(4).for_each(|c| c.copy_from_slice(&float32(rng).to_le_bytes()[..c.len()]));
        }
        Kind::Float64 => {
            out.chunks_mut(8).for_each(|c| c.copy_from_slice(&float64(rng).to_le_bytes()[..c.len()]));
        }
        Kind::Float80 => out.chunks_mut(10).for_each(|c| c.copy_from_slice(&float80(rng)[..c.len()])),
    }
}
