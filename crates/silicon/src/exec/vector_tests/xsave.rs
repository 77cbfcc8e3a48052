//! The XSAVE family: formats against the host's, what XRSTOR refuses, and the initial configurations.

use super::generate::Random;
use super::native::Thunk;
use super::{guest, registers, to_guest};
use crate::exception::vector::PF;
use crate::exec::testing::{DATA, GP0, Guest, PF_READ, UNMAPPED};
use crate::state::{X87, Zmm, reg};

const AREA: usize = 2688;
const ALL: u64 = 0xe7;

const FXSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x03];
const FXRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x0b];
const XSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x23];
const XSAVEOPT64: &[u8] = &[0x48, 0x0f, 0xae, 0x33];
const XSAVEC64: &[u8] = &[0x48, 0x0f, 0xc7, 0x23];
const XSAVES64: &[u8] = &[0x48, 0x0f, 0xc7, 0x2b];
const XRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x2b];
const XRSTORS64: &[u8] = &[0x48, 0x0f, 0xc7, 0x1b];

#[repr(C, align(64))]
struct Area([u8; 4096]);

fn with_mask(guest: &mut Guest, mask: u64) {
    guest.set(reg::RBX, DATA).set(reg::RAX, mask).set(reg::RDX, 0);
}

/// Host instruction and x87 data pointers mean nothing, and AMD's processors have one more bit in MXCSR_MASK.
fn blank(image: &mut [u8]) {
    image[6..24].fill(0);
    image[28..32].fill(0);
}

/// Bytes of the standard format that are alike on Intel's and the host's processors: AMD's have the components beyond AVX elsewhere.
fn standard_alike() -> usize {
    const OPMASK: u32 = 5;
    if std::arch::x86_64::__cpuid_count(0xd, OPMASK).ebx == 1088 { AREA } else { 832 }
}

#[test]
fn images_are_the_hosts() {
    if !std::arch::is_x86_feature_detected!("avx512bw") {
        return;
    }
    let mut random = Random(7);
    let mut thunk = Thunk::new();
    for code in [FXSAVE64, XSAVE64, XSAVEC64] {
        for mask in [ALL, 3, 7, 1, 2, 4, 0xe0, 0x85, 0] {
            let mut guest = guest();
            let mut native = registers(&mut random);
            let mut area = Box::new(Area([0; 4096]));
            (native.gpr[0], native.gpr[2], native.gpr[3]) = (mask, 0, area.0.as_ptr() as u64);
            to_guest(&native, &mut guest);
            with_mask(&mut guest, mask);
            thunk.run(code, &mut native);
            guest.finish(code);
            let mut ours = guest.bytes(DATA, AREA);
            blank(&mut ours);
            blank(&mut area.0);
            let compared = if code == XSAVE64 { standard_alike() } else { AREA };
            let differs = (0..compared).find(|&i| ours[i] != area.0[i]);
            assert_eq!(differs, None, "{code:02x?} mask {mask:x}");
        }
    }
}

#[test]
fn state_comes_back() {
    let pairs = [
        (FXSAVE64, FXRSTOR64, 3),
        (XSAVE64, XRSTOR64, ALL),
        (XSAVEOPT64, XRSTOR64, ALL),
        (XSAVEC64, XRSTOR64, ALL),
        (XSAVES64, XRSTORS64, ALL),
        (XSAVEC64, XRSTORS64, 0xa5),
        (XSAVE64, XRSTOR64, 0x42),
    ];
    let mut random = Random(11);
    for (save, restore, mask) in pairs {
        let mut guest = guest();
        let native = registers(&mut random);
        to_guest(&native, &mut guest);
        with_mask(&mut guest, mask);
        // An area that straddles two pages.
        guest.set(reg::RBX, DATA + 0x800);
        guest.finish(save);
        let before = guest.cpu.state.clone();
        let state = &mut guest.cpu.state;
        state.zmm = [Zmm([0xee; 64]); 32];
        state.k = [!0; 8];
        state.x87 = X87 { fcw: 0x27f, ..X87::INIT };
        state.mxcsr = 0x1fa0;
        guest.finish(restore);
        let state = &guest.cpu.state;
        let bytes = |bit: u32, range: std::ops::Range<usize>, rows: std::ops::Range<usize>| {
            for row in rows {
                let expected = if mask & (1 << bit) != 0 { before.zmm[row].0 } else { [0xee; 64] };
                assert_eq!(state.zmm[row].0[range.clone()], expected[range.clone()], "{mask:x} zmm{row}");
            }
        };
        bytes(1, 0..16, 0..16);
        bytes(2, 16..32, 0..16);
        bytes(6, 32..64, 0..16);
        bytes(7, 0..64, 16..32);
        assert_eq!(state.k, if mask & 0x20 != 0 { before.k } else { [!0; 8] });
        // The standard format has MXCSR with SSE or AVX, the compacted one with SSE alone.
        let with_mxcsr = if save == XSAVEC64 || save == XSAVES64 { 2 } else { 6 };
        assert_eq!(state.mxcsr, if mask & with_mxcsr != 0 { before.mxcsr } else { 0x1fa0 }, "{mask:x}");
        assert_eq!(state.x87.st, if mask & 1 != 0 { before.x87.st } else { [[0; 16]; 8] });
    }
}

#[test]
fn what_is_not_in_the_area_gets_its_initial_configuration() {
    let mut guest = guest();
    to_guest(&registers(&mut Random(3)), &mut guest);
    with_mask(&mut guest, ALL);
    // A compacted area that holds nothing, laid out for SSE alone.
    guest.put(DATA, &[0; 576]);
    guest.put(DATA + 520, &(1u64 << 63 | 2).to_le_bytes());
    guest.finish(XRSTOR64);
    let state = &guest.cpu.state;
    assert!(state.zmm.iter().all(|z| z.0 == [0; 64]) && state.k == [0; 8]);
    assert_eq!((state.x87, state.mxcsr), (X87::INIT, 0x1f80));
    // XGETBV(1): nothing is in use; XSAVEC writes the header alone.
    guest.set(reg::RCX, 1);
    guest.finish(&[0x0f, 0x01, 0xd0]);
    assert_eq!(guest.reg(reg::RAX), 0);
    with_mask(&mut guest, ALL);
    guest.put(DATA, &[0x55; 576]);
    guest.finish(XSAVEC64);
    assert_eq!((guest.word(DATA + 512, 8), guest.word(DATA + 520, 8)), (0, 1 << 63 | ALL));
    assert_eq!(guest.bytes(DATA, 512), [0x55; 512]);
    assert_eq!(guest.bytes(DATA + 528, 48), [0x55; 48]);
    // XSAVEOPT of what is initial writes MXCSR and XSTATE_BV, and keeps the bits that were not asked for.
    guest.put(DATA + 512, &0x44u64.to_le_bytes());
    with_mask(&mut guest, 7);
    guest.finish(XSAVEOPT64);
    assert_eq!(guest.word(DATA + 512, 8), 0x40);
    assert_eq!(guest.word(DATA + 24, 8), 0xffff_0000_1f80);
    assert_eq!(guest.bytes(DATA + 32, 128), [0x55; 128]);
}

#[test]
fn malformed_areas_are_refused() {
    // Instruction, offset and value of one word of an otherwise empty area.
    let compacted = 1u64 << 63;
    let rows: &[(&[u8], u64, u64, u64)] = &[
        (XRSTOR64, 512, 1 << 9, 0),
        (XRSTOR64, 520, 1, 0),
        (XRSTOR64, 528, 1, 0),
        (XRSTOR64, 24, 0x1_0000, 0),
        (XRSTOR64, 512, 2, compacted | 1),
        (XRSTOR64, 512, 0, compacted | 1 << 9),
        (XRSTOR64, 568, 1, compacted | 7),
        (XRSTORS64, 512, 1, 0),
        (XRSTORS64, 512, 1, compacted),
        (XRSTORS64, 528, 1, compacted | 7),
    ];
    for &(code, at, value, layout) in rows {
        let mut guest = guest();
        with_mask(&mut guest, ALL);
        guest.put(DATA, &[0; AREA]);
        guest.put(DATA + 520, &layout.to_le_bytes());
        guest.put(DATA + at, &value.to_le_bytes());
        assert_eq!(guest.fault(code), GP0, "{code:02x?} {at} {value:x} {layout:x}");
    }
    let mut guest = guest();
    with_mask(&mut guest, ALL);
    guest.set(reg::RBX, DATA + 32);
    for code in [XSAVE64, XSAVEC64, XSAVES64, XRSTOR64, XRSTORS64] {
        assert_eq!(guest.fault(code), GP0, "{code:02x?}");
    }
}

#[test]
fn a_fault_in_the_second_page_leaves_the_first_alone() {
    let mut guest = guest();
    to_guest(&registers(&mut Random(5)), &mut guest);
    with_mask(&mut guest, ALL);
    let area = UNMAPPED - 1024;
    guest.set(reg::RBX, area).put(area, &[0x77; 1024]);
    for code in [XSAVE64, XSAVEC64] {
        assert_eq!(guest.fault(code).0, PF);
        assert_eq!(guest.bytes(area, 1024), [0x77; 1024]);
    }
    // What is not asked for is not touched.
    guest.set(reg::RAX, 3);
    guest.put(area, &[0; 1024]);
    guest.finish(XSAVE64);
}

/// The silicon looks at the end of the area that the requested components would take, whichever are in it.
#[test]
fn a_restore_whose_area_reaches_into_a_missing_page_faults_before_its_header_counts() {
    let area = UNMAPPED - 1024;
    // Header (XSTATE_BV, XCOMP_BV), requested components, and whether the missing page is touched.
    let rows = [
        ([0, 0], ALL, true),
        ([1 << 63, 0], ALL, true),         // an invalid header
        ([0, 1 << 1], ALL, true),          // another
        ([0, 0], 7, false),                // AVX ends at 832
        ([0, 1 << 63 | 0x27], ALL, false), // compacted: AVX and the mask registers
        ([0, 1 << 63 | ALL], ALL, true),
        ([0, 1 << 63 | ALL], 7, false),
    ];
    for (header, mask, faults) in rows {
        let mut guest = guest();
        with_mask(&mut guest, mask);
        guest.set(reg::RBX, area);
        guest.put(area + 512, &header.map(u64::to_le_bytes).concat());
        if faults {
            assert_eq!(guest.fault(XRSTOR64), PF_READ, "{header:x?} {mask:#x}");
        } else {
            guest.finish(XRSTOR64);
        }
    }
    // A component of the compacted format that is not enabled is refused first.
    let mut guest = guest();
    with_mask(&mut guest, ALL);
    guest.set(reg::RBX, area);
    guest.put(area + 520, &(1u64 << 63 | 1 << 40 | ALL).to_le_bytes());
    assert_eq!(guest.fault(XRSTOR64), GP0);
}
