//! State components between [`CpuState`] and their images in memory.
#![expect(unsafe_code, reason = "copies to and from guest memory")]

use std::ops::Range;

use crate::hostexec::MXCSR_DEFINED;
use crate::mmu::host::{self, Absent};
use crate::state::{CpuState, X87};
use crate::tiles::{CONFIG_BYTES, TileConfig};

/// Component numbers (SDM vol. 1, 13.1).
mod component {
    /// Bits 255:128 of YMM0 to YMM15.
    pub(super) const AVX: u8 = 2;
    /// k0 to k7.
    pub(super) const OPMASK: u8 = 5;
    /// Bits 511:256 of ZMM0 to ZMM15.
    pub(super) const ZMM_HI256: u8 = 6;
    /// ZMM16 to ZMM31.
    pub(super) const HI16_ZMM: u8 = 7;
    /// PKRU.
    pub(super) const PKRU: u8 = 9;
    /// AMX's tile configuration.
    pub(super) const TILECFG: u8 = 17;
    /// AMX's tiles.
    pub(super) const TILEDATA: u8 = 18;
}

/// Component number of PKRU.
pub(super) const PKRU: u8 = component::PKRU;
/// Component number of AMX's tiles, which are the CPU's: here they can only be made initial.
pub(super) const TILEDATA: u8 = component::TILEDATA;

/// What to write of the legacy region.
pub(super) struct Legacy {
    pub(super) x87: bool,
    pub(super) sse: bool,
    /// MXCSR and MXCSR_MASK.
    pub(super) mxcsr: bool,
    /// 64-bit instruction and data pointers (REX.W).
    pub(super) wide: bool,
}

/// Copies to guest memory; `mem` has room for `bytes`.
pub(super) fn copy_out(bytes: &[u8], mem: *mut u8) -> Result<(), Absent> {
    // SAFETY: the caller got the pointer from `host_pointer` for this many bytes.
    unsafe { host::copy(bytes.as_ptr(), mem, bytes.len()) }
}

/// Copies from guest memory.
pub(super) fn copy_in(mem: *const u8, bytes: &mut [u8]) -> Result<(), Absent> {
    // SAFETY: the caller got the pointer from `host_pointer` for this many bytes.
    unsafe { host::copy(mem, bytes.as_mut_ptr(), bytes.len()) }
}

/// The first 416 bytes of an FXSAVE image (SDM vol. 1, tables 10-2 and 13-1).
pub(super) fn legacy_image(state: &CpuState, mxcsr: u32, wide: bool) -> [u8; 416] {
    let mut image = [0; 416];
    let x87 = &state.x87;
    image[0..2].copy_from_slice(&x87.fcw.to_le_bytes());
    image[2..4].copy_from_slice(&x87.fsw.to_le_bytes());
    image[4] = x87.ftw;
    image[6..8].copy_from_slice(&x87.fop.to_le_bytes());
    image[8..16].copy_from_slice(&pointer(x87.fip, x87.fcs, wide));
    image[16..24].copy_from_slice(&pointer(x87.fdp, x87.fds, wide));
    image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    image[28..32].copy_from_slice(&MXCSR_DEFINED.to_le_bytes());
    image[32..160].copy_from_slice(x87.st.as_flattened());
    for (slot, zmm) in image[160..].chunks_exact_mut(16).zip(&state.zmm) {
        slot.copy_from_slice(&zmm.0[..16]);
    }
    image
}

/// 64-bit offset, or 32-bit offset and selector.
fn pointer(offset: u64, selector: u16, wide: bool) -> [u8; 8] {
    let narrow = offset & 0xffff_ffff | u64::from(selector) << 32;
    (if wide { offset } else { narrow }).to_le_bytes()
}

/// MXCSR of a legacy image.
pub(super) fn mxcsr(image: &[u8]) -> u32 {
    word(image, 24) as u32
}

/// The x87 part of a legacy image. `selectors`: FCS and FDS exist (SDM vol. 1, 8.1.8).
pub(super) fn x87(image: &[u8], wide: bool, selectors: bool, linear_bits: u8) -> X87 {
    let mut x87 = X87 {
        fcw: word(image, 0) as u16,
        fsw: word(image, 2) as u16,
        ftw: image[4],
        fop: word(image, 6) as u16 & 0x7ff,
        fip: word(image, 8),
        fdp: word(image, 16),
        ..X87::INIT
    };
    if wide {
        // The processor keeps as many bits of the instruction pointer as linear addresses have.
        let unused = 64 - linear_bits.clamp(1, 64);
        x87.fip = ((x87.fip << unused) as i64 >> unused) as u64;
    } else {
        if selectors {
            (x87.fcs, x87.fds) = ((x87.fip >> 32) as u16, (x87.fdp >> 32) as u16);
        }
        x87.fip &= 0xffff_ffff;
        x87.fdp &= 0xffff_ffff;
    }
    for (register, slot) in x87.st.iter_mut().zip(image[32..160].chunks_exact(16)) {
        register[..10].copy_from_slice(&slot[..10]);
    }
    x87
}

/// Eight bytes at `at`.
fn word(image: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&image[at..at + 8]);
    u64::from_le_bytes(bytes)
}

pub(super) fn x87_in_use(state: &CpuState) -> bool {
    let x87 = X87 { mxcsr_slot: 0, mxcsr_mask_slot: 0, ..state.x87 };
    x87 != X87::INIT
}

/// Whether bytes `columns` of any of the vector registers `rows` are not zero.
pub(super) fn rows_in_use(state: &CpuState, rows: Range<usize>, columns: Range<usize>) -> bool {
    let mut all = 0;
    for zmm in &state.zmm[rows] {
        for bytes in zmm.0[columns.clone()].as_chunks().0 {
            all |= u64::from_le_bytes(*bytes);
        }
    }
    all != 0
}

/// Copies bytes `columns` of the vector registers `rows` from consecutive places.
pub(super) fn load_rows(state: &mut CpuState, rows: Range<usize>, columns: Range<usize>, from: &[u8]) {
    let width = columns.len();
    for (zmm, slot) in state.zmm[rows].iter_mut().zip(from.chunks_exact(width)) {
        zmm.0[columns.clone()].copy_from_slice(slot);
    }
}

/// Copies them out; the bytes written.
fn save_rows(state: &CpuState, rows: Range<usize>, columns: Range<usize>, to: &mut [u8]) -> usize {
    let (width, count) = (columns.len(), rows.len());
    for (zmm, slot) in state.zmm[rows].iter().zip(to.chunks_exact_mut(width)) {
        slot.copy_from_slice(&zmm.0[columns.clone()]);
    }
    width * count
}

/// The vector registers and bytes of them that a component is. Outside 64-bit mode the upper registers do not
/// exist: nothing is read or written for them.
fn rows_of(bit: u8, count: usize) -> Option<(Range<usize>, Range<usize>)> {
    match bit {
        component::AVX => Some((0..count, 16..32)),
        component::ZMM_HI256 => Some((0..count, 32..64)),
        component::HI16_ZMM => Some((16..if count == 16 { 32 } else { 16 }, 0..64)),
        _ => None,
    }
}

/// Whether a component is not in its initial configuration. `count` vector registers are visible.
pub(super) fn in_use(state: &CpuState, bit: u8, count: usize) -> bool {
    match (rows_of(bit, count), bit) {
        (Some((rows, columns)), _) => rows_in_use(state, rows, columns),
        (None, component::OPMASK) => state.k.iter().any(|&k| k != 0),
        (None, component::PKRU) => state.pkru != 0,
        (None, component::TILECFG) => state.tile_config.configured(),
        (None, component::TILEDATA) => state.tile_data_used,
        _ => false,
    }
}

/// Writes a component's image; the bytes that count.
pub(super) fn save(state: &CpuState, bit: u8, count: usize, to: &mut [u8]) -> usize {
    match (rows_of(bit, count), bit) {
        (Some((rows, columns)), _) => save_rows(state, rows, columns, to),
        (None, component::OPMASK) => {
            for (slot, k) in to.chunks_exact_mut(8).zip(state.k) {
                slot.copy_from_slice(&k.to_le_bytes());
            }
            64
        }
        (None, component::PKRU) => {
            to[..8].copy_from_slice(&u64::from(state.pkru).to_le_bytes());
            8
        }
        (None, component::TILECFG) => {
            to[..CONFIG_BYTES].copy_from_slice(&state.tile_config.image());
            CONFIG_BYTES
        }
        _ => 0,
    }
}

/// Loads a component from its image; zeroes are the initial configuration of all of them. A tile configuration that
/// LDTILECFG would refuse gives the initial one.
pub(super) fn load(state: &mut CpuState, bit: u8, count: usize, from: &[u8]) {
    match (rows_of(bit, count), bit) {
        (Some((rows, columns)), _) => load_rows(state, rows, columns, from),
        (None, component::OPMASK) => {
            for (k, bytes) in state.k.iter_mut().zip(from.as_chunks().0) {
                *k = u64::from_le_bytes(*bytes);
            }
        }
        (None, component::PKRU) => state.pkru = word(from, 0) as u32,
        (None, component::TILECFG) => {
            let image = from.first_chunk();
            state.tile_config = image.and_then(TileConfig::from_image).unwrap_or_default();
        }
        (None, component::TILEDATA) => state.tile_data_used = false,
        _ => {}
    }
}

/// Gives a component its initial configuration.
pub(super) fn load_initial(state: &mut CpuState, bit: u8, count: usize) {
    const ZEROES: [u8; 1024] = [0; 1024];
    load(state, bit, count, &ZEROES);
}
