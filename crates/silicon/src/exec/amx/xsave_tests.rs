//! TILECFG and TILEDATA in XSAVE areas, with IA32_XFD set and clear.

use super::tests::{Random, STTILECFG, TILEDATA, TILERELEASE, configured, guest};
use crate::exception::vector;
use crate::exec::testing::{DATA, Guest};
use crate::exec::xstate_image::XstateError;
use crate::state::{cr0, reg};
use crate::tiles::{TILE_BYTES, TILES};
use crate::vmx::Exit;

const NM: (u8, Option<u32>) = (vector::NM, None);
const AMX: u64 = 3 << 17;
/// Where the area is: clear of everything else, and longer than a page.
const AREA: u64 = DATA + 0x1000;
/// End of the standard format.
const LENGTH: usize = 11008;
/// TILEDATA in the standard format, and in a compacted one that has 1 << 18 alone, or 17 and 18.
const STANDARD: usize = 2816;
const COMPACTED_ALONE: usize = 576;
const COMPACTED: usize = 640;
const DATA_BYTES: usize = TILES * TILE_BYTES;

const XSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x23];
const XSAVEOPT64: &[u8] = &[0x48, 0x0f, 0xae, 0x33];
const XSAVEC64: &[u8] = &[0x48, 0x0f, 0xc7, 0x23];
const XSAVES64: &[u8] = &[0x48, 0x0f, 0xc7, 0x2b];
const XRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x2b];
const XRSTORS64: &[u8] = &[0x48, 0x0f, 0xc7, 0x1b];

fn fill_tiles(guest: &mut Guest) -> Vec<u8> {
    let mut random = Random(99);
    for tile in guest.cpu.tiles_mut().unwrap() {
        *tile = random.tile(|random| random.next() as u32);
    }
    let mut image = vec![0; DATA_BYTES];
    guest.cpu.tile_data_image(&mut image);
    image
}

fn area(guest: &mut Guest, mask: u64, byte: u8) {
    guest.put(AREA, &[byte; LENGTH]);
    guest.put(AREA + 512, &[0; 64]);
    guest.set(reg::RBX, AREA).set(reg::RAX, mask).set(reg::RDX, 0);
}

#[test]
fn amx_t6_what_saves_write_with_and_without_xfd() {
    for (code, compacted) in [(XSAVE64, false), (XSAVEOPT64, false), (XSAVEC64, true), (XSAVES64, true)] {
        for (mask, at) in [
            (TILEDATA, if compacted { COMPACTED_ALONE } else { STANDARD }),
            (AMX, if compacted { COMPACTED } else { STANDARD }),
        ] {
            for live in [false, true] {
                for xfd in [0, TILEDATA] {
                    let mut guest = configured();
                    let tiles = if live { fill_tiles(&mut guest) } else { vec![0; DATA_BYTES] };
                    area(&mut guest, mask, 0xaa);
                    guest.cpu.state.xfd = xfd;
                    guest.finish(code);
                    let context = format!("{code:02x?} {mask:#x} live {live} xfd {xfd:#x}");
                    let config = if mask == AMX { 1 << 17 } else { 0 };
                    let present = live && xfd == 0;
                    let used = config | if present { TILEDATA } else { 0 };
                    assert_eq!(guest.word(AREA + 512, 8), used, "XSTATE_BV: {context}");
                    let layout = if compacted { 1 << 63 | mask } else { 0 };
                    assert_eq!(guest.word(AREA + 520, 8), layout, "XCOMP_BV: {context}");
                    let written = guest.bytes(AREA + at as u64, DATA_BYTES);
                    let expected = match (present, code) {
                        (true, _) => tiles.clone(),
                        (false, XSAVE64) => vec![0; DATA_BYTES],
                        (false, _) => vec![0xaa; DATA_BYTES],
                    };
                    assert!(written == expected, "tiles: {context}");
                    // No #NM, and what is live stays live.
                    assert_eq!(
                        (guest.cpu.state.xfd_err, guest.cpu.state.tile_data_used),
                        (0, live),
                        "{context}"
                    );
                }
            }
        }
    }
}

#[test]
fn amx_t7_restores_of_tiles_that_xfd_disables_fault() {
    for (code, compacted) in [(XRSTOR64, false), (XRSTOR64, true), (XRSTORS64, true)] {
        for present in [true, false] {
            let mut guest = configured();
            let tiles = fill_tiles(&mut guest);
            area(&mut guest, TILEDATA, 0x11);
            let used = if present { TILEDATA } else { 0 };
            guest.put(AREA + 512, &used.to_le_bytes());
            if compacted {
                guest.put(AREA + 520, &(1u64 << 63 | TILEDATA).to_le_bytes());
            }
            guest.cpu.state.xfd = TILEDATA;
            if present {
                assert_eq!(guest.fault(code), NM, "{code:02x?} {compacted}");
                assert_eq!(guest.cpu.state.xfd_err, TILEDATA);
                let mut kept = vec![0; DATA_BYTES];
                guest.cpu.tile_data_image(&mut kept);
                assert!(kept == tiles, "a fault changes nothing");
                guest.cpu.state.xfd = 0;
                guest.finish(code);
                guest.cpu.tile_data_image(&mut kept);
                assert!(kept == [0x11; DATA_BYTES]);
            } else {
                guest.finish(code);
                assert_eq!((guest.cpu.state.xfd_err, guest.cpu.state.tile_data_used), (0, false));
            }
        }
    }
}

/// CR0.TS comes before IA32_XFD, and what is not asked for is not looked at.
#[test]
fn amx_t7_only_what_is_restored_matters() {
    let mut guest = configured();
    area(&mut guest, TILEDATA, 0);
    guest.put(AREA + 512, &TILEDATA.to_le_bytes());
    guest.cpu.state.xfd = TILEDATA;
    guest.cpu.state.cr0 |= cr0::TS;
    guest.cpu.refresh_mode();
    assert_eq!(guest.fault(XRSTOR64), NM);
    assert_eq!(guest.cpu.state.xfd_err, 0);
    guest.cpu.state.cr0 &= !cr0::TS;
    guest.cpu.refresh_mode();
    guest.set(reg::RAX, 1 << 17);
    guest.finish(XRSTOR64);
    assert!(!guest.cpu.state.tile_config.configured());
}

#[test]
fn tiles_come_back_from_every_format() {
    for (save, restore) in
        [(XSAVE64, XRSTOR64), (XSAVEOPT64, XRSTOR64), (XSAVEC64, XRSTOR64), (XSAVES64, XRSTORS64)]
    {
        let mut guest = configured();
        let (tiles, config) = (fill_tiles(&mut guest), guest.cpu.state.tile_config);
        area(&mut guest, AMX, 0xaa);
        guest.finish(save);
        guest.finish(TILERELEASE);
        guest.cpu.release_tile_data();
        assert_eq!(guest.run(restore), Exit::StateNeeded { components: TILEDATA }, "no room");
        assert!(!guest.cpu.state.tile_config.configured(), "nothing has happened yet");
        guest.cpu.reserve_tile_data().unwrap();
        guest.finish(restore);
        let mut back = vec![0; DATA_BYTES];
        guest.cpu.tile_data_image(&mut back);
        assert!(back == tiles, "{save:02x?}");
        assert_eq!(guest.cpu.state.tile_config, config);
    }
}

#[test]
fn a_restored_configuration_that_cannot_be_is_the_initial_one() {
    let mut guest = configured();
    area(&mut guest, 1 << 17, 0);
    guest.put(AREA + 512, &(1u64 << 17).to_le_bytes());
    guest.put(AREA + 2752, &[1, 0, 0, 0, 9]);
    guest.finish(XRSTOR64);
    guest.finish(STTILECFG);
    assert_eq!(guest.bytes(AREA, 64), [0; 64]);
}

/// Images for a hypervisor: live tiles whatever IA32_XFD says, and as XSAVE would save them.
#[test]
fn images_carry_live_tiles_under_xfd_if_they_are_asked_for() {
    let mut guest = configured();
    let tiles = fill_tiles(&mut guest);
    guest.cpu.state.xfd = TILEDATA;
    let mut image = vec![0xff; LENGTH];
    let state = &guest.cpu.state;
    guest.cpu.save_xstate(AMX, &mut image);
    assert_eq!(image[512..520], AMX.to_le_bytes());
    assert!(image[STANDARD..] == tiles[..]);
    let mut as_xsave = vec![0xff; LENGTH];
    guest.cpu.save_xstate(AMX & !state.xfd_disabled(), &mut as_xsave);
    assert_eq!(as_xsave[512..520], (1u64 << 17).to_le_bytes());
    assert!(as_xsave[STANDARD..] == [0; DATA_BYTES]);
    // Into a CPU that has no room for tiles yet.
    let mut other = self::guest();
    other.cpu.release_tile_data();
    other.cpu.state.xfd = TILEDATA;
    other.cpu.load_xstate(AMX | 3, &image).unwrap();
    assert_eq!((other.cpu.tile_data_bytes(), other.cpu.state.xfd), (8192, TILEDATA));
    assert_eq!(other.cpu.state.tile_config, guest.cpu.state.tile_config);
    let mut back = vec![0; DATA_BYTES];
    other.cpu.tile_data_image(&mut back);
    assert!(back == tiles);
    other.cpu.load_xstate(AMX | 3, &as_xsave).unwrap();
    assert!(!other.cpu.state.tile_data_used && other.cpu.state.tile_config.configured());
    assert_eq!(other.cpu.load_xstate(3, &image), Err(XstateError::Components(AMX)));
}
