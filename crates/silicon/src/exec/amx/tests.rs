//! AMX's instructions: when they are defined, what IA32_XFD does to them, configuration, restarts, and products. The
//! numbers are those of the feature's test plan.

use super::reference;
use super::softfloat::multiply_add;
use super::tmul::{self, Engine, Product, Shape};
use crate::cpu::Cpu;
use crate::exception::{Exception, vector};
use crate::exec::testing::{CODE, DATA, GP0, Guest, UNMAPPED};
use crate::model::{Feature, FeatureSet, Features};
use crate::state::{CodeSize, cr0, cr4, reg};
use crate::tiles::{ROW_BYTES, TILES, Tile, TileConfig};
use crate::vmx::Exit;

pub(super) const TILEDATA: u64 = 1 << 18;
const UD: (u8, Option<u32>) = (vector::UD, None);
const NM: (u8, Option<u32>) = (vector::NM, None);

pub(super) const LDTILECFG: &[u8] = &[0xc4, 0xe2, 0x78, 0x49, 0x03];
pub(super) const STTILECFG: &[u8] = &[0xc4, 0xe2, 0x79, 0x49, 0x03];
pub(super) const TILERELEASE: &[u8] = &[0xc4, 0xe2, 0x78, 0x49, 0xc0];
const TILEZERO: &[u8] = &[0xc4, 0xe2, 0x7b, 0x49, 0xc8];
pub(super) const TILELOADD: &[u8] = &[0xc4, 0xe2, 0x7b, 0x4b, 0x04, 0x13];
const TILELOADDT1: &[u8] = &[0xc4, 0xe2, 0x79, 0x4b, 0x04, 0x13];
pub(super) const TILESTORED: &[u8] = &[0xc4, 0xe2, 0x7a, 0x4b, 0x04, 0x13];
const WRMSR: &[u8] = &[0x0f, 0x30];
const RDMSR: &[u8] = &[0x0f, 0x32];
const XGETBV: &[u8] = &[0x0f, 0x01, 0xd0];

/// tmm1 += tmm2 × tmm3.
const PRODUCTS: [(Product, &[u8]); 8] = [
    (Product::SignedSigned, &[0xc4, 0xe2, 0x63, 0x5e, 0xca]),
    (Product::SignedUnsigned, &[0xc4, 0xe2, 0x62, 0x5e, 0xca]),
    (Product::UnsignedSigned, &[0xc4, 0xe2, 0x61, 0x5e, 0xca]),
    (Product::UnsignedUnsigned, &[0xc4, 0xe2, 0x60, 0x5e, 0xca]),
    (Product::Bf16, &[0xc4, 0xe2, 0x62, 0x5c, 0xca]),
    (Product::Fp16, &[0xc4, 0xe2, 0x63, 0x5c, 0xca]),
    (Product::ComplexReal, &[0xc4, 0xe2, 0x60, 0x6c, 0xca]),
    (Product::ComplexImaginary, &[0xc4, 0xe2, 0x61, 0x6c, 0xca]),
];

/// Instructions with whether they use TILEDATA.
fn instructions() -> impl Iterator<Item = (&'static [u8], bool)> {
    let single = [
        (LDTILECFG, false),
        (STTILECFG, false),
        (TILERELEASE, false),
        (TILEZERO, true),
        (TILELOADD, true),
        (TILELOADDT1, true),
        (TILESTORED, true),
    ];
    single.into_iter().chain(PRODUCTS.map(|(_, code)| (code, true)))
}

/// A configuration of eight tiles of `rows` rows of `bytes` bytes.
fn square(rows: u8, bytes: u8) -> TileConfig {
    TileConfig { palette: 1, start_row: 0, bytes_per_row: [bytes; TILES], rows: [rows; TILES] }
}

/// A guest with AMX enabled and room for tiles; RBX points to a configuration of eight full tiles, RDX is 64.
pub(super) fn guest() -> Guest {
    let mut guest = Guest::new(CodeSize::Bits64);
    guest.cpu.reserve_tile_data().unwrap();
    guest.cpu.state.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
    guest.cpu.state.xcr0 = 0x6_0007;
    guest.cpu.refresh_mode();
    guest.put(DATA, &square(16, 64).image());
    guest.set(reg::RBX, DATA).set(reg::RDX, 64);
    guest
}

/// The same with the configuration loaded.
pub(super) fn configured() -> Guest {
    let mut guest = guest();
    guest.finish(LDTILECFG);
    guest
}

fn set_pair(guest: &mut Guest, index: u64, value: u64) {
    guest.set(reg::RCX, index).set(reg::RAX, value & 0xffff_ffff).set(reg::RDX, value >> 32);
}

pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn tile(&mut self, mut word: impl FnMut(&mut Random) -> u32) -> Tile {
        let mut tile = Tile::ZERO;
        tile.0.as_flattened_mut().iter_mut().for_each(|slot| *slot = word(self));
        tile
    }
}

#[test]
fn amx_t3_xfd_is_zero_after_reset_and_takes_only_enumerated_bits() {
    let mut guest = guest();
    for index in [0x1c4, 0x1c5] {
        set_pair(&mut guest, index, 0);
        guest.finish(RDMSR);
        assert_eq!((guest.reg(reg::RAX), guest.reg(reg::RDX)), (0, 0));
        for bit in [0, 2, 9, 17, 19, 63] {
            set_pair(&mut guest, index, 1 << bit);
            assert_eq!(guest.fault(WRMSR), GP0, "{index:#x} bit {bit}");
        }
        set_pair(&mut guest, index, TILEDATA);
        guest.finish(WRMSR);
        guest.set(reg::RAX, 0);
        guest.finish(RDMSR);
        assert_eq!(guest.reg(reg::RAX), TILEDATA);
    }
    // Reset clears both; INIT clears neither.
    guest.cpu.init_reset();
    assert_eq!((guest.cpu.state.xfd, guest.cpu.state.xfd_err), (TILEDATA, TILEDATA));
    let fresh = Cpu::new(Features::default(), Default::default());
    assert_eq!((fresh.state.xfd, fresh.state.xfd_err), (0, 0));
}

#[test]
fn amx_t3_without_xfd_in_cpuid_the_registers_are_the_hypervisors_to_refuse() {
    let mut guest = guest();
    let mut features = Features::default().set();
    features.remove(Feature::Xfd);
    guest.cpu.set_features(Features::new(features.consistent(), 46));
    for index in [0x1c4, 0x1c5] {
        set_pair(&mut guest, index, 0);
        assert_eq!(guest.run(RDMSR), Exit::Rdmsr { index: index as u32 });
        assert_eq!(guest.run(WRMSR), Exit::Wrmsr { index: index as u32, value: 0 });
    }
}

#[test]
fn amx_t4_xfd_makes_what_uses_tiles_fault() {
    for (code, uses_tiles) in instructions() {
        let mut guest = configured();
        guest.cpu.state.xfd = TILEDATA;
        if uses_tiles {
            assert_eq!(guest.fault(code), NM, "{code:02x?}");
            assert_eq!(guest.cpu.state.xfd_err, TILEDATA, "{code:02x?}");
            assert_eq!(guest.cpu.counters.xfd_faults, 1);
        } else {
            guest.finish(code);
            assert_eq!((guest.cpu.state.xfd_err, guest.cpu.counters.xfd_faults), (0, 0), "{code:02x?}");
        }
    }
}

/// No AMX instruction looks at CR0.TS, and a #NM for it leaves IA32_XFD_ERR alone.
#[test]
fn amx_t4_task_switched_is_not_amx_business() {
    for (code, _) in instructions() {
        let mut guest = configured();
        guest.cpu.state.cr0 |= cr0::TS;
        guest.cpu.refresh_mode();
        guest.finish(code);
    }
    let mut guest = configured();
    guest.cpu.state.cr0 |= cr0::TS;
    guest.cpu.state.xfd = TILEDATA;
    guest.cpu.refresh_mode();
    assert_eq!(guest.fault(&[0xd9, 0xe8]), NM, "fld1");
    assert_eq!((guest.cpu.state.xfd_err, guest.cpu.counters.xfd_faults), (0, 0));
}

#[test]
fn amx_t4_xfd_has_no_effect_on_what_xcr0_does_not_enable() {
    let mut guest = configured();
    guest.cpu.state.xfd = TILEDATA;
    guest.cpu.state.xcr0 = 7;
    assert_eq!(guest.fault(TILELOADD), UD);
    assert_eq!(guest.cpu.state.xfd_err, 0);
}

/// #UD comes first, then #NM, then what memory has to say.
#[test]
fn amx_t4_the_order_of_faults() {
    let mut guest = guest();
    guest.cpu.state.xfd = TILEDATA;
    assert_eq!(guest.fault(TILELOADD), UD, "not configured");
    guest.finish(LDTILECFG);
    guest.set(reg::RBX, UNMAPPED);
    assert_eq!(guest.fault(TILELOADD), NM);
    assert_eq!(guest.fault(TILESTORED), NM);
    guest.cpu.state.xfd = 0;
    assert_eq!(guest.fault(TILELOADD).0, vector::PF);
    guest.set(reg::RBX, 1 << 63);
    assert_eq!(guest.fault(TILELOADD), GP0);
    assert_eq!(guest.fault(LDTILECFG), GP0);
    assert_eq!(guest.fault(STTILECFG), GP0);
}

#[test]
fn amx_t5_xfd_err_stays_until_it_is_written() {
    let mut guest = configured();
    guest.cpu.state.xfd = TILEDATA;
    assert_eq!(guest.fault(TILELOADD), NM);
    guest.cpu.state.xfd = 0;
    guest.finish(TILELOADD);
    guest.cpu.state.cr0 |= cr0::TS;
    guest.cpu.refresh_mode();
    assert_eq!(guest.fault(&[0xd9, 0xe8]), NM, "fld1");
    assert_eq!(guest.cpu.state.xfd_err, TILEDATA);
    set_pair(&mut guest, 0x1c5, 0);
    guest.finish(WRMSR);
    assert_eq!(guest.cpu.state.xfd_err, 0);
}

#[test]
fn amx_t8_live_tiles_outlast_xfd() {
    let mut guest = configured();
    let pattern: Vec<u8> = (0..1024).map(|i| (i * 7) as u8).collect();
    guest.set(reg::RBX, DATA + 0x1000).put(DATA + 0x1000, &pattern);
    guest.finish(TILELOADD);
    guest.cpu.state.xfd = TILEDATA;
    for _ in 0..100 {
        // XINUSE does not depend on IA32_XFD. Each run is an entry and an exit.
        guest.set(reg::RCX, 1);
        guest.finish(XGETBV);
        assert_eq!(guest.reg(reg::RAX) & 3 << 17, 3 << 17);
    }
    guest.cpu.state.xfd = 0;
    guest.set(reg::RBX, DATA + 0x2000).set(reg::RDX, 64);
    guest.finish(TILESTORED);
    assert_eq!(guest.bytes(DATA + 0x2000, 1024), pattern);
}

#[test]
fn amx_t9_configurations_that_are_refused_change_nothing() {
    let good = square(16, 64).image();
    let mut cases = vec![(0, 2), (0, 0xff), (16, 65), (48, 17), (16, 0), (48, 0), (17, 1)];
    cases.extend((2..16).chain(32..48).chain(56..64).map(|at| (at, 1)));
    for (at, value) in cases {
        let mut guest = configured();
        let mut image = good;
        image[at] = value;
        guest.put(DATA, &image);
        guest.cpu.tiles_mut().unwrap()[0].0[0][0] = 7;
        assert_eq!(guest.fault(LDTILECFG), GP0, "byte {at} = {value}");
        assert_eq!(guest.cpu.state.tile_config, square(16, 64));
        assert_eq!(guest.cpu.tile(0).unwrap().0[0][0], 7, "byte {at}");
    }
}

#[test]
fn amx_t9_palette_0_is_the_initial_state() {
    let mut guest = configured();
    guest.cpu.tiles_mut().unwrap()[0].0[0][0] = 7;
    let mut junk = [0xee; 64];
    junk[0] = 0;
    guest.put(DATA, &junk);
    guest.finish(LDTILECFG);
    assert!(!guest.cpu.state.tile_data_used);
    guest.finish(STTILECFG);
    assert_eq!(guest.bytes(DATA, 64), [0; 64]);
    assert_eq!(guest.fault(TILELOADD), UD);
}

#[test]
fn amx_t9_a_new_configuration_and_tilerelease_make_tiles_initial() {
    for code in [LDTILECFG, TILERELEASE] {
        let mut guest = configured();
        guest.cpu.tiles_mut().unwrap()[3].0[2][1] = 7;
        guest.finish(code);
        guest.set(reg::RCX, 1);
        guest.finish(XGETBV);
        assert_eq!(guest.reg(reg::RAX) >> 17 & 3, u64::from(code == LDTILECFG), "{code:02x?}");
    }
}

#[test]
fn amx_t9_the_start_row_is_kept_and_checked_by_loads_and_stores_alone() {
    let mut guest = guest();
    let mut image = square(4, 64).image();
    image[1] = 4;
    guest.put(DATA, &image);
    guest.finish(LDTILECFG);
    guest.set(reg::RBX, DATA + 64);
    guest.finish(STTILECFG);
    assert_eq!(guest.bytes(DATA + 64, 64), image);
    for code in [TILELOADD, TILESTORED] {
        assert_eq!(guest.fault(code), UD, "start_row = rows");
    }
    guest.cpu.state.tile_config.start_row = 3;
    guest.finish(TILEZERO);
    assert_eq!(guest.cpu.state.tile_config.start_row, 0);
    guest.cpu.state.tile_config = TileConfig { start_row: 9, ..square(16, 64) };
    guest.finish(PRODUCTS[0].1);
    assert_eq!(guest.cpu.state.tile_config.start_row, 0);
}

/// Where the second page is not there, the rows before it are loaded; with it, the instruction goes on.
#[test]
fn amx_t10_a_load_goes_on_at_the_row_that_faulted() {
    let mut guest = configured();
    let pattern: Vec<u8> = (0..1024).map(|i| (i * 5 + i / 256) as u8).collect();
    let base = UNMAPPED - 3 * 64;
    guest.put(base, &pattern).set(reg::RBX, base);
    guest.cpu.tiles_mut().unwrap()[0] = Tile([[!0; 16]; 16]);
    let exit = guest.run(TILELOADD);
    assert_eq!(exit, Exit::Exception(Exception::pf(UNMAPPED, 0)));
    assert_eq!((guest.cpu.state.rip, guest.cpu.state.tile_config.start_row), (CODE, 3));
    let tile = *guest.cpu.tile(0).unwrap();
    assert_eq!(tile.to_bytes()[..192], pattern[..192]);
    assert!(tile.to_bytes()[192..].iter().all(|&byte| byte == 0));
    // What has been loaded is not loaded again.
    guest.put(base, &[0xcc; 64]);
    guest.map_unmapped();
    guest.finish(TILELOADD);
    assert_eq!(guest.cpu.state.tile_config.start_row, 0);
    assert_eq!(guest.cpu.tile(0).unwrap().to_bytes()[..], pattern[..]);
}

#[test]
fn amx_t10_a_store_goes_on_at_the_row_that_faulted() {
    let mut guest = configured();
    let pattern: Vec<u8> = (0..1024).map(|i| (i * 3 + i / 256) as u8).collect();
    guest.put(DATA + 0x1000, &pattern).set(reg::RBX, DATA + 0x1000);
    guest.finish(TILELOADD);
    let base = UNMAPPED - 128 - 32;
    guest.set(reg::RBX, base);
    let exit = guest.run(TILESTORED);
    assert_eq!(exit, Exit::Exception(Exception::pf(UNMAPPED, 2)));
    assert_eq!(guest.cpu.state.tile_config.start_row, 2);
    assert_eq!(guest.bytes(base, 128), pattern[..128]);
    assert_eq!(guest.bytes(base + 128, 32), [0; 32], "a row is stored whole or not at all");
    guest.put(base, &[0xcc; 64]);
    guest.map_unmapped();
    guest.finish(TILESTORED);
    assert_eq!(guest.bytes(base, 64), [0xcc; 64]);
    assert_eq!(guest.bytes(base + 64, 960), pattern[64..]);
    assert_eq!(guest.cpu.state.tile_config.start_row, 0);
}

#[test]
fn tiles_move_by_stride_and_rows_are_cropped() {
    let mut guest = guest();
    let pattern: Vec<u8> = (0..2048).map(|i| (i * 11 + i / 256) as u8).collect();
    guest.put(DATA, &square(5, 12).image()).put(DATA + 0x1000, &pattern);
    guest.finish(LDTILECFG);
    guest.cpu.tiles_mut().unwrap()[0] = Tile([[!0; 16]; 16]);
    guest.set(reg::RBX, DATA + 0x1000).set(reg::RDX, 24);
    // tileloadd tmm0, [rbx+rdx*4+8]
    guest.finish(&[0xc4, 0xe2, 0x7b, 0x4b, 0x44, 0x93, 0x08]);
    for row in 0..16 {
        let mut expected = [0; ROW_BYTES];
        if row < 5 {
            expected[..12].copy_from_slice(&pattern[8 + 96 * row..][..12]);
        }
        assert_eq!(guest.cpu.tile(0).unwrap().row_bytes(row), expected, "row {row}");
    }
    // tilestored [rbx], tmm0, without an index: every row to the same place
    guest.set(reg::RBX, DATA + 0x2000).put(DATA + 0x2000, &[0xaa; 64]);
    guest.finish(&[0xc4, 0xe2, 0x7a, 0x4b, 0x04, 0x23]);
    assert_eq!(guest.bytes(DATA + 0x2000, 12), pattern[8 + 96 * 4..][..12]);
    assert_eq!(guest.bytes(DATA + 0x200c, 52), [0xaa; 52]);
    // A negative stride, and a 32-bit address size, at which all of the address wraps.
    guest.set(reg::RBX, 0xffff_ffff_0000_0000 | (DATA + 0x1000 + 4 * 64)).set(reg::RDX, -64i64 as u64);
    guest.finish(&[0x67, 0xc4, 0xe2, 0x7b, 0x4b, 0x04, 0x13]);
    assert_eq!(guest.cpu.tile(0).unwrap().row_bytes(4)[..12], pattern[..12]);
}

#[test]
fn tiles_that_are_not_there_are_undefined() {
    for (code, _) in instructions().filter(|(_, uses_tiles)| *uses_tiles) {
        let mut guest = guest();
        assert_eq!(guest.fault(code), UD, "not configured: {code:02x?}");
        guest.cpu.state.tile_config = TileConfig { rows: [0; 8], bytes_per_row: [0; 8], ..square(0, 0) };
        assert_eq!(guest.fault(code), UD, "no rows: {code:02x?}");
        guest.cpu.state.tile_config = square(2, 6);
        match code {
            TILEZERO => guest.finish(code),
            _ => assert_eq!(guest.fault(code), UD, "no whole doublewords: {code:02x?}"),
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_undefined() {
    // Rows and bytes of the destination and the sources.
    let rows = [
        ([16, 16, 16], [64, 64, 64], true),
        ([3, 3, 5], [28, 20, 28], true),
        ([1, 1, 1], [4, 4, 4], true),
        ([3, 2, 5], [28, 20, 28], false),
        ([3, 3, 4], [28, 20, 28], false),
        ([3, 3, 5], [24, 20, 28], false),
        ([3, 3, 5], [28, 24, 28], false),
        ([3, 3, 5], [30, 20, 30], false),
        ([3, 3, 5], [28, 22, 28], false),
    ];
    for (rows, bytes, fits) in rows {
        let mut guest = guest();
        let config = &mut guest.cpu.state.tile_config;
        config.palette = 1;
        config.rows[1..4].copy_from_slice(&rows);
        config.bytes_per_row[1..4].copy_from_slice(&bytes);
        for (_, code) in PRODUCTS {
            if fits {
                guest.finish(code);
            } else {
                assert_eq!(guest.fault(code), UD, "{rows:?} {bytes:?}");
            }
        }
    }
}

#[test]
fn encodings_that_are_undefined() {
    let mut codes: Vec<Vec<u8>> = Vec::new();
    for (code, _) in instructions() {
        // VEX.L, VEX.W, and a second prefix.
        for (at, bits) in [(2, 0x04), (2, 0x80)] {
            let mut changed = code.to_vec();
            changed[at] ^= bits;
            codes.push(changed);
        }
        for prefix in [0xf0, 0x66, 0xf2, 0xf3, 0x48] {
            codes.push([&[prefix], code].concat());
        }
        // VEX.vvvv that is not used; tile 8 and above, by VEX.R and by VEX.vvvv.
        let mut changed = code.to_vec();
        changed[2] ^= 0x40;
        codes.push(changed);
    }
    for code in [TILEZERO, TILELOADD, TILESTORED, PRODUCTS[0].1] {
        let mut changed = code.to_vec();
        changed[1] ^= 0x80;
        codes.push(changed);
    }
    // Without SIB; two operands the same.
    codes.push(vec![0xc4, 0xe2, 0x7b, 0x4b, 0x03]);
    codes.push(vec![0xc4, 0xe2, 0x63, 0x5e, 0xc9]);
    codes.push(vec![0xc4, 0xe2, 0x63, 0x5e, 0xdb]);
    codes.push(vec![0xc4, 0xe2, 0x63, 0x5e, 0xcb]);
    for code in codes {
        let mut guest = configured();
        assert_eq!(guest.fault(&code), UD, "{code:02x?}");
    }
}

#[test]
fn amx_t12_outside_64_bit_mode_and_without_the_systems_consent_all_are_undefined() {
    for (code, _) in instructions() {
        let mut guest = configured();
        guest.cpu.state.cr4 &= !cr4::OSXSAVE;
        guest.cpu.refresh_mode();
        assert_eq!(guest.fault(code), UD, "CR4.OSXSAVE: {code:02x?}");
        for xcr0 in [7, 0x2_0007, 0x4_0007] {
            let mut guest = configured();
            guest.cpu.state.xcr0 = xcr0;
            assert_eq!(guest.fault(code), UD, "XCR0 {xcr0:#x}: {code:02x?}");
        }
        for size in [CodeSize::Bits32, CodeSize::Bits16] {
            let mut guest = Guest::new(size);
            guest.cpu.state.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
            guest.cpu.state.xcr0 = 0x6_0007;
            guest.cpu.refresh_mode();
            guest.set(reg::RBX, DATA);
            assert_eq!(guest.fault(code), UD, "{size:?}: {code:02x?}");
        }
        let mut guest = configured();
        let without = FeatureSet::of(&[Feature::AmxTile]);
        guest.cpu.set_features(Features::new(Features::default().set().minus(without).consistent(), 46));
        assert_eq!(guest.fault(code), UD, "CPUID: {code:02x?}");
    }
}

#[test]
fn amx_t13_writes_of_xfd_exit_only_if_asked_for() {
    // mov ecx, 0x1c4; xor edx, edx; xor eax, eax; 1: xor eax, 1 << 18; wrmsr; dec esi; jnz 1b
    let code = [
        0xb9, 0xc4, 0x01, 0, 0, 0x31, 0xd2, 0x31, 0xc0, 0x35, 0, 0, 0x04, 0, 0x0f, 0x30, 0xff, 0xce, 0x75,
        0xf5,
    ];
    let mut guest = guest();
    guest.set(reg::RSI, 100_001);
    guest.finish(&code);
    assert_eq!(guest.cpu.state.xfd, TILEDATA);
    let mut guest = self::guest();
    guest.cpu.controls.xfd_exiting = true;
    guest.set(reg::RSI, 3);
    let mut exit = guest.run(&code);
    let mut exits = 0;
    while let Exit::Wrmsr { index: 0x1c4, value } = exit {
        exits += 1;
        guest.cpu.state.xfd = value;
        guest.cpu.skip_instruction();
        exit = guest.cpu.run();
    }
    assert_eq!((exit, exits), (Exit::Exception(Exception::UD), 3));
    guest.set(reg::RCX, 0x1c4);
    assert_eq!(guest.run(RDMSR), Exit::Rdmsr { index: 0x1c4 });
    guest.set(reg::RCX, 0x1c5);
    guest.finish(RDMSR);
}

/// The exit that a #NM causes finds IA32_XFD_ERR written.
#[test]
fn a_fault_that_exits_has_written_xfd_err() {
    let mut guest = configured();
    guest.cpu.state.xfd = TILEDATA;
    assert_eq!(guest.run(TILELOADD), Exit::Exception(Exception::NM));
    assert_eq!(guest.cpu.state.xfd_err, TILEDATA);
}

#[test]
fn without_room_for_tiles_their_first_use_exits_and_can_be_repeated() {
    for (code, needs_room) in [
        (LDTILECFG, false),
        (STTILECFG, false),
        (TILEZERO, false),
        (TILESTORED, false),
        (TILERELEASE, false),
        (TILELOADD, true),
        (PRODUCTS[0].1, true),
        (PRODUCTS[4].1, true),
    ] {
        let mut guest = configured();
        guest.cpu.release_tile_data();
        if needs_room {
            assert_eq!(guest.run(code), Exit::StateNeeded { components: TILEDATA }, "{code:02x?}");
            assert_eq!((guest.cpu.state.rip, guest.cpu.tile_data_bytes()), (CODE, 0));
            assert!(!guest.cpu.state.tile_data_used);
            guest.cpu.reserve_tile_data().unwrap();
        }
        guest.finish(code);
        assert_eq!(guest.cpu.tile_data_bytes(), if needs_room { 8192 } else { 0 }, "{code:02x?}");
    }
}

/// A tile from a device's registers: each access leaves guest mode, none is made twice.
#[test]
fn a_tile_is_loaded_from_a_device() {
    let mut guest = guest();
    guest.put(DATA, &square(3, 12).image());
    guest.finish(LDTILECFG);
    // The page table's entry of UNMAPPED leads beyond the guest's memory.
    guest.map_device();
    guest.set(reg::RBX, UNMAPPED).set(reg::RDX, 16);
    let mut exit = guest.run(TILELOADD);
    let mut seen = Vec::new();
    while let Exit::EptViolation(access) = exit {
        seen.push((access.address & 0xfff, access.size));
        guest.cpu.complete_read(0x0807_0605_0403_0201 + access.address);
        exit = guest.cpu.run();
    }
    assert_eq!(exit, Exit::Exception(Exception::UD));
    assert_eq!(seen, [(0, 8), (8, 4), (16, 8), (24, 4), (32, 8), (40, 4)]);
    assert_eq!(guest.cpu.state.tile_config.start_row, 0);
    assert_eq!(guest.cpu.tile(0).unwrap().0[2][0] & 0xff, 0x01 + 32);
}

/// What floating-point arithmetic finds hard, as the upper or lower half of a doubleword of the kind.
fn hard_bf16(random: &mut Random) -> u16 {
    const HARD: [u16; 16] = [
        0, 0x8000, 0x3f80, 0xbf80, 0x7f80, 0xff80, 0x7fc0, 0xff81, 0x0001, 0x807f, 0x0080, 0x8080, 0x7f7f,
        0xff7f, 0x1f80, 0x2000,
    ];
    let bits = random.next();
    match bits & 3 {
        0 => HARD[(bits >> 8 & 15) as usize],
        1 => (bits >> 16 & 0x80ff) as u16 | 0x3f00,
        // Products near the smallest normal number.
        2 => (bits >> 16 & 0x81ff) as u16 | 0x1f00,
        _ => (bits >> 32) as u16,
    }
}

fn hard_fp16(random: &mut Random) -> u16 {
    const HARD: [u16; 16] = [
        0, 0x8000, 0x3c00, 0xbc00, 0x7c00, 0xfc00, 0x7e00, 0xfc01, 0x0001, 0x83ff, 0x0400, 0x8400, 0x7bff,
        0xfbff, 0x0200, 0x1000,
    ];
    let bits = random.next();
    match bits & 3 {
        0 => HARD[(bits >> 8 & 15) as usize],
        1 | 2 => (bits >> 16 & 0x87ff) as u16 | 0x3800,
        _ => (bits >> 32) as u16,
    }
}

fn hard_single(random: &mut Random) -> u32 {
    let upper = u32::from(hard_bf16(random)) << 16;
    upper | (random.next() as u32 & if random.next() & 1 == 0 { 0xffff } else { 0 })
}

/// A source for `product`; without `wild` one that gives no NaN or infinity.
fn source(random: &mut Random, product: Product, wild: bool) -> Tile {
    random.tile(|random| {
        let mut half = || match product {
            Product::Bf16 if wild => hard_bf16(random),
            Product::Bf16 => (random.next() & 0x80ff) as u16 | 0x3f00,
            Product::Fp16 | Product::ComplexReal | Product::ComplexImaginary if wild => hard_fp16(random),
            Product::Fp16 | Product::ComplexReal | Product::ComplexImaginary => {
                (random.next() & 0x8fff) as u16 | 0x3000
            }
            _ => random.next() as u16,
        };
        u32::from(half()) | u32::from(half()) << 16
    })
}

fn destination(random: &mut Random, product: Product, wild: bool) -> Tile {
    let integer =
        !matches!(product, Product::Bf16 | Product::Fp16 | Product::ComplexReal | Product::ComplexImaginary);
    random.tile(|random| match (integer, wild) {
        (true, _) => random.next() as u32,
        (false, true) => hard_single(random),
        (false, false) => (random.next() as u32 & 0x81ff_ffff) | 0x3e00_0000,
    })
}

/// One NaN here and there, so that most elements of the product are none.
fn sprinkle(random: &mut Random, product: Product, tile: &mut Tile) {
    let nan = if product == Product::Bf16 { 0x7f81 } else { 0x7c01 };
    let at = random.next() as usize;
    tile.0[at % 16][at / 16 % 16] = nan << (at >> 8 & 16);
}

#[test]
fn amx_t11_every_kernel_gives_the_references_bits() {
    let mut random = Random(0x1234_5678_9abc_def1);
    for round in 0..60 {
        for product in Product::ALL {
            let wild = round % 3 == 1;
            let (mut a, b) = (source(&mut random, product, wild), source(&mut random, product, wild));
            if round % 3 == 2 {
                sprinkle(&mut random, product, &mut a);
            }
            let c = destination(&mut random, product, wild);
            let side = |bits: u64| if round < 6 { 16 } else { 1 + (bits % 16) as usize };
            let bits = random.next();
            let shape = Shape { m: side(bits), n: side(bits >> 8), k: side(bits >> 16) };
            let expected = reference::multiply(product, &c, &a, &b, shape);
            for engine in Engine::ALL.into_iter().filter(|engine| engine.available()) {
                let mut result = c;
                tmul::multiply_with(engine, product, &mut result, &a, &b, shape);
                for (m, (row, expected)) in result.0.iter().zip(&expected.0).enumerate() {
                    assert_eq!(row, expected, "{engine:?} {product:?} {shape:?} row {m} round {round}");
                }
            }
        }
    }
}

#[test]
fn amx_t11_integer_sums_wrap() {
    let all = |byte: u32| Tile([[byte * 0x0101_0101; 16]; 16]);
    let full = Shape { m: 16, n: 16, k: 16 };
    for engine in Engine::ALL.into_iter().filter(|engine| engine.available()) {
        for (product, a, b, sum) in [
            (Product::UnsignedUnsigned, 0xff, 0xff, 64 * 255 * 255),
            (Product::SignedSigned, 0x80, 0x80, 64 * 128 * 128),
            (Product::SignedUnsigned, 0x80, 0xff, -64 * 128 * 255),
            (Product::UnsignedSigned, 0xff, 0x80, -64 * 128 * 255),
        ] {
            for before in [0, i32::MAX, i32::MIN] {
                let mut c = Tile([[before as u32; 16]; 16]);
                tmul::multiply_with(engine, product, &mut c, &all(a), &all(b), full);
                let expected = before.wrapping_add(sum) as u32;
                assert_eq!(c, Tile([[expected; 16]; 16]), "{engine:?} {product:?} {before}");
            }
        }
    }
}

/// The integers' multiply-and-add against double precision's, where they could differ.
#[test]
fn amx_t11_single_steps_round_as_the_reference_does() {
    let mut random = Random(0xfeed_f00d_dead_beef);
    for _ in 0..200_000 {
        let (a, b, c) = (hard_single(&mut random), hard_single(&mut random), hard_single(&mut random));
        // Also sums that cancel, or nearly so.
        let product = f32::from_bits(a) * f32::from_bits(b);
        let near = (-product).to_bits().wrapping_add((random.next() % 5) as u32).wrapping_sub(2);
        for c in [c, near] {
            let expected =
                reference::fma32(f32::from_bits(c), f32::from_bits(a), f32::from_bits(b)).to_bits();
            assert_eq!(multiply_add(a, b, c), expected, "{a:#x} * {b:#x} + {c:#x}");
        }
    }
}

/// Through the instruction, whatever the guest has in MXCSR, which stays as it is.
#[test]
fn amx_t11_mxcsr_is_neither_read_nor_written() {
    let mut random = Random(42);
    for (product, code) in PRODUCTS {
        let (a, b) = (source(&mut random, product, true), source(&mut random, product, true));
        let c = destination(&mut random, product, true);
        let expected = reference::multiply(product, &c, &a, &b, Shape { m: 16, n: 16, k: 16 });
        // Each rounding; denormals kept and flushed; exceptions unmasked.
        for mxcsr in [0x1f80, 0x3f80, 0x5f80, 0x7f80, 0x9fc0, 0x0000] {
            let mut guest = configured();
            guest.cpu.state.mxcsr = mxcsr;
            let tiles = guest.cpu.tiles_mut().unwrap();
            (tiles[1], tiles[2], tiles[3]) = (c, a, b);
            guest.finish(code);
            assert_eq!(*guest.cpu.tile(1).unwrap(), expected, "{product:?} {mxcsr:#x}");
            assert_eq!(guest.cpu.state.mxcsr, mxcsr, "{product:?}");
        }
    }
}

/// What lies beyond the rows and columns of the destination is zeroed, whatever was there.
#[test]
fn amx_t11_products_crop_their_destination() {
    for (product, code) in PRODUCTS {
        let mut guest = configured();
        guest.cpu.state.tile_config = TileConfig { palette: 1, ..square(3, 12) };
        *guest.cpu.tiles_mut().unwrap() = [Tile([[!0; 16]; 16]); 8];
        guest.finish(code);
        let tile = guest.cpu.tile(1).unwrap();
        for (m, row) in tile.0.iter().enumerate() {
            for (n, &word) in row.iter().enumerate() {
                assert_eq!(word == 0, m >= 3 || n >= 3, "{product:?} {m} {n}");
            }
        }
    }
}
