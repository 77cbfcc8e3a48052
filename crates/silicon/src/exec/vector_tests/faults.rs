//! What keeps an instruction from running, and what it leaves behind then.

use super::guest;
use crate::exception::vector::{GP, MF, NM, PF, UD, XM};
use crate::exec::testing::{CODE, DATA, GP0, Guest, UNMAPPED};
use crate::hostexec::stub::Stubs;
use crate::model::{Feature, Host};
use crate::state::{CodeSize, X87, cr0, cr4, reg};
use crate::vmx::Exit;

const ADDPS: &[u8] = &[0x0f, 0x58, 0xc1];
const PADDB_MMX: &[u8] = &[0x0f, 0xfc, 0xc1];
const VADDPS: &[u8] = &[0xc5, 0xf0, 0x58, 0xc2];
const VADDPS_512: &[u8] = &[0x62, 0xf1, 0x74, 0x48, 0x58, 0xc2];
const KMOVW: &[u8] = &[0xc5, 0xf8, 0x90, 0xca];
const FLD1: &[u8] = &[0xd9, 0xe8];
const FNINIT: &[u8] = &[0xdb, 0xe3];
const WAIT: &[u8] = &[0x9b];
const FXSAVE: &[u8] = &[0x0f, 0xae, 0x03];
const XSAVE: &[u8] = &[0x0f, 0xae, 0x23];
const LDMXCSR: &[u8] = &[0x0f, 0xae, 0x13];

/// Whether the host lacks what executes `code`, which is then #UD whatever else is asked for.
fn is_undefined_here(code: &[u8]) -> bool {
    (code[0] == 0x62 || code == KMOVW) && !Host::get().offered.has(Feature::Avx512f)
}

#[test]
fn control_bits_gate_each_class() {
    let off = |bits: u64| move |g: &mut Guest| g.cpu.state.cr4 &= !bits;
    let set = |bits: u64| move |g: &mut Guest| g.cpu.state.cr0 |= bits;
    let xcr0 = |value: u64| move |g: &mut Guest| g.cpu.state.xcr0 = value;
    type Change = Box<dyn Fn(&mut Guest)>;
    let rows: Vec<(&str, Change, &[u8], Option<u8>)> = vec![
        ("em", Box::new(set(cr0::EM)), ADDPS, Some(UD)),
        ("em", Box::new(set(cr0::EM)), PADDB_MMX, Some(UD)),
        ("em", Box::new(set(cr0::EM)), VADDPS, None),
        ("em", Box::new(set(cr0::EM)), FLD1, Some(NM)),
        ("em", Box::new(set(cr0::EM)), FNINIT, Some(NM)),
        ("em", Box::new(set(cr0::EM)), FXSAVE, Some(NM)),
        ("em", Box::new(set(cr0::EM)), LDMXCSR, Some(UD)),
        ("em and ts", Box::new(set(cr0::EM | cr0::TS)), ADDPS, Some(UD)),
        ("ts", Box::new(set(cr0::TS)), ADDPS, Some(NM)),
        ("ts", Box::new(set(cr0::TS)), PADDB_MMX, Some(NM)),
        ("ts", Box::new(set(cr0::TS)), VADDPS, Some(NM)),
        ("ts", Box::new(set(cr0::TS)), VADDPS_512, Some(NM)),
        ("ts", Box::new(set(cr0::TS)), KMOVW, Some(NM)),
        ("ts", Box::new(set(cr0::TS)), FLD1, Some(NM)),
        ("ts", Box::new(set(cr0::TS)), WAIT, None),
        ("ts, mp", Box::new(set(cr0::TS | cr0::MP)), WAIT, Some(NM)),
        ("ts", Box::new(set(cr0::TS)), XSAVE, Some(NM)),
        ("osfxsr", Box::new(off(cr4::OSFXSR)), ADDPS, Some(UD)),
        ("osfxsr", Box::new(off(cr4::OSFXSR)), PADDB_MMX, None),
        ("osfxsr", Box::new(off(cr4::OSFXSR)), VADDPS, None),
        ("osxsave", Box::new(off(cr4::OSXSAVE)), VADDPS, Some(UD)),
        ("osxsave", Box::new(off(cr4::OSXSAVE)), KMOVW, Some(UD)),
        ("osxsave", Box::new(off(cr4::OSXSAVE)), XSAVE, Some(UD)),
        ("xcr0 3", Box::new(xcr0(3)), VADDPS, Some(UD)),
        ("xcr0 3", Box::new(xcr0(3)), ADDPS, None),
        ("xcr0 7", Box::new(xcr0(7)), VADDPS, None),
        ("xcr0 7", Box::new(xcr0(7)), VADDPS_512, Some(UD)),
        ("xcr0 7", Box::new(xcr0(7)), KMOVW, Some(UD)),
    ];
    for (name, change, code, expected) in rows {
        let mut guest = guest();
        guest.cpu.state.x87 = X87::INIT;
        guest.set(reg::RBX, DATA).put(DATA, &0x1f80u32.to_le_bytes());
        change(&mut guest);
        guest.cpu.refresh_mode();
        let expected = if is_undefined_here(code) { Some(UD) } else { expected };
        match expected {
            Some(vector) => assert_eq!(guest.fault(code), (vector, None), "{name} {code:02x?}"),
            None => guest.finish(code),
        }
    }
}

#[test]
fn alignment_is_checked_where_the_form_asks_for_it() {
    let rows: &[(&[u8], bool)] = &[
        (&[0x0f, 0x28, 0x03], true),                    // movaps xmm0, [rbx]
        (&[0x0f, 0x29, 0x03], true),                    // movaps [rbx], xmm0
        (&[0x0f, 0x10, 0x03], false),                   // movups xmm0, [rbx]
        (&[0x66, 0x0f, 0xfe, 0x03], true),              // paddd xmm0, [rbx]
        (&[0xc5, 0xf9, 0xfe, 0x03], false),             // vpaddd xmm0, xmm0, [rbx]
        (&[0xc5, 0xfc, 0x28, 0x03], true),              // vmovaps ymm0, [rbx]
        (&[0x66, 0x0f, 0x3a, 0x63, 0x03, 0], false),    // pcmpistri xmm0, [rbx], 0
        (&[0xf2, 0x0f, 0xf0, 0x03], false),             // lddqu xmm0, [rbx]
        (&[0x62, 0xf1, 0x7d, 0x48, 0x6f, 0x03], true),  // vmovdqa32 zmm0, [rbx]
        (&[0x62, 0xf1, 0x7d, 0x49, 0x6f, 0x03], true),  // the same with a mask
        (&[0x62, 0xf1, 0x7e, 0x48, 0x6f, 0x03], false), // vmovdqu32 zmm0, [rbx]
        (&[0x0f, 0xae, 0x03], true),                    // fxsave [rbx]
    ];
    for &(code, checked) in rows {
        let mut guest = guest();
        guest.set(reg::RBX, DATA + 8);
        guest.cpu.state.k[1] = 1;
        if is_undefined_here(code) {
            assert_eq!(guest.fault(code), (UD, None), "{code:02x?}");
        } else if checked {
            assert_eq!(guest.fault(code), GP0, "{code:02x?}");
        } else {
            guest.finish(code);
        }
    }
}

#[test]
fn unmasked_simd_exceptions_are_the_hosts() {
    let bits = |v: f32| v.to_bits();
    let (snan, denormal, big) = (0x7f80_0001, 1, bits(3e38));
    let (two, one) = (bits(2.0), bits(1.0));
    let smallest = 0x0080_0000; // 2^-126
    // Unmasked exceptions, FTZ, two elements of each operand of MULPS; flags afterwards and whether it traps.
    let rows: &[(u32, [u32; 2], [u32; 2], u32, bool)] = &[
        (0x08, [big, one], [two, one], 0x08, true),
        (0x00, [big, one], [two, one], 0x28, false),
        (0x20, [big, one], [two, one], 0x28, true),
        (0x10, [smallest, one], [bits(0.5), one], 0x10, true),
        (0x01, [snan, big], [two, two], 0x01, true),
        (0x01, [snan, denormal], [two, two], 0x03, true),
        (0x02, [snan, denormal], [two, two], 0x03, true),
        (0x04, [big, one], [two, one], 0x28, false),
    ];
    for &(unmasked, a, b, flags, traps) in rows {
        let mut guest = guest();
        for (i, (x, y)) in a.into_iter().zip(b).enumerate() {
            guest.cpu.state.zmm[0].0[4 * i..4 * i + 4].copy_from_slice(&x.to_le_bytes());
            guest.cpu.state.zmm[1].0[4 * i..4 * i + 4].copy_from_slice(&y.to_le_bytes());
        }
        let before = guest.cpu.state.zmm[0];
        guest.cpu.state.mxcsr = 0x1f80 & !(unmasked << 7);
        let mulps = &[0x0f, 0x59, 0xc1];
        if traps {
            assert_eq!(guest.fault(mulps), (XM, None), "{unmasked:x}");
            assert_eq!(guest.cpu.state.zmm[0], before);
        } else {
            guest.finish(mulps);
        }
        assert_eq!(guest.cpu.state.mxcsr & 0x3f, flags, "{unmasked:x} {a:x?} {b:x?}");
        assert_eq!(guest.cpu.state.mxcsr >> 7, (0x1f80 & !(unmasked << 7)) >> 7);
    }
    let mut guest = guest();
    guest.cpu.state.cr4 &= !cr4::OSXMMEXCPT;
    guest.cpu.state.mxcsr = 0x1d80;
    guest.cpu.state.zmm[0].0[..4].copy_from_slice(&one.to_le_bytes());
    assert_eq!(guest.fault(&[0x0f, 0x5e, 0xc1]), (UD, None));
}

/// The engine lives in other people's processes: their signal handlers are none of its business.
#[test]
fn unmasked_simd_exceptions_need_no_signal_handler() {
    let mut guest = guest();
    guest.cpu.state.mxcsr = 0;
    guest.cpu.state.zmm[0].0[..4].copy_from_slice(&1f32.to_bits().to_le_bytes());
    assert_eq!(guest.fault(&[0x0f, 0x5e, 0xc1]), (XM, None)); // divps xmm0, xmm1: 1 / 0
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim();
    let caught = u64::from_str_radix(caught, 16).unwrap();
    assert_eq!(caught >> (libc::SIGFPE - 1) & 1, 0);
}

/// A fault leaves the MMX register alone, but not TOP.
#[test]
fn an_unmasked_exception_of_an_mmx_conversion_has_gone_over_to_mmx() {
    let mut guest = guest();
    guest.cpu.state.mxcsr = 0x1f00; // #I unmasked
    guest.cpu.state.x87.fsw = 3 << 11;
    guest.cpu.state.x87.st[5][..8].fill(0x5a); // MM0, with TOP = 3
    guest.cpu.state.zmm[0].0[..4].copy_from_slice(&f32::NAN.to_bits().to_le_bytes());
    assert_eq!(guest.fault(&[0x0f, 0x2d, 0xc0]), (XM, None)); // cvtps2pi mm0, xmm0
    assert_eq!(guest.cpu.state.x87.fsw >> 11 & 7, 0);
    assert_eq!(guest.cpu.state.x87.st[0][..8], [0x5a; 8]);
}

#[test]
fn an_unmasked_x87_exception_waits_for_the_next_waiting_instruction() {
    let mut guest = guest();
    // fninit; fldcw [rbx]; fld1; fldz; fdivp; fnstsw ax; fld1
    guest.put(DATA, &0x037bu16.to_le_bytes());
    let code = [0xdb, 0xe3, 0xd9, 0x2b, 0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, 0xdf, 0xe0, 0xd9, 0xe8];
    guest.set(reg::RBX, DATA);
    let exit = guest.run(&code);
    assert_eq!(exit, crate::vmx::Exit::Exception(crate::exception::Exception::MF), "{MF}");
    assert_eq!(guest.cpu.state.rip, CODE + 12);
    assert_eq!(guest.reg(reg::RAX) & 0xffff, 0xb084);
    let x87 = &guest.cpu.state.x87;
    assert_eq!((x87.fsw, x87.fcw, x87.fop, x87.fip), (0xb084, 0x037b, 0x6f9, CODE + 8));
    assert_eq!(x87.ftw, 0xc0, "both operands stay on the stack");
    // FNCLEX takes the exception back.
    guest.finish(&[0xdb, 0xe2, 0xd9, 0xe8]);
}

#[test]
fn mxcsr_and_fxrstor_refuse_reserved_bits() {
    let mut guest = guest();
    guest.set(reg::RBX, DATA).put(DATA, &0x1_0000u32.to_le_bytes());
    assert_eq!(guest.fault(LDMXCSR), (GP, Some(0)));
    guest.put(DATA + 24, &0x1_0000u32.to_le_bytes());
    assert_eq!(guest.fault(&[0x0f, 0xae, 0x0b]), (GP, Some(0)));
}

#[test]
fn masked_out_elements_do_not_fault() {
    // vmovdqu32 zmm0{k1}, [rbx]; vmovdqu32 [rbx]{k1}, zmm0; vpexpandd zmm0{k1}, [rbx]
    let rows: &[(&[u8], u64)] = &[
        (&[0x62, 0xf1, 0x7e, 0x49, 0x6f, 0x03], 0x000f),
        (&[0x62, 0xf1, 0x7e, 0x49, 0x7f, 0x03], 0x000f),
        (&[0x62, 0xf2, 0x7d, 0x49, 0x89, 0x03], 0xf000),
    ];
    for &(code, mask) in rows {
        for (mask, faults) in [(mask, false), (0x1f, true), (0, false)] {
            let mut guest = guest();
            guest.set(reg::RBX, UNMAPPED - 16).put(UNMAPPED - 16, &[7; 16]);
            guest.cpu.state.k[1] = mask;
            if is_undefined_here(code) {
                assert_eq!(guest.fault(code), (UD, None), "{code:02x?}");
            } else if faults {
                assert_eq!(guest.fault(code).0, PF, "{code:02x?} {mask:x}");
                assert_eq!(guest.bytes(UNMAPPED - 16, 16), [7; 16]);
            } else {
                guest.finish(code);
            }
        }
    }
    let mut guest = guest();
    guest.set(reg::RBX, UNMAPPED);
    // vmaskmovps ymm0, ymm1, [rbx]
    guest.finish(&[0xc4, 0xe2, 0x75, 0x2c, 0x03]);
    // vaddps zmm0{k1}, zmm0, dword [rbx]{1to16}
    let broadcast = &[0x62, 0xf1, 0x7c, 0x59, 0x58, 0x03];
    if !is_undefined_here(broadcast) {
        guest.finish(broadcast);
        // vpshufb zmm0{k1}, zmm0, [rbx] reads its operand whatever the mask (exception type E4NF).
        assert_eq!(guest.fault(&[0x62, 0xf2, 0x7d, 0x49, 0x00, 0x03]).0, PF);
    }
}

/// The upper half comes first, and its address wraps at 4 GiB.
#[test]
fn maskmovdqu_with_a_32_bit_address_wraps() {
    let mut guest = guest();
    guest.set(reg::RDI, 0xffff_fff8).put(0, &[7; 8]);
    guest.cpu.state.zmm[1].0[8..16].fill(0x80);
    let code = [0x67, 0x66, 0x0f, 0xf7, 0xc1]; // maskmovdqu xmm0, xmm1
    let Exit::Exception(fault) = guest.run(&code) else { panic!() };
    assert_eq!((fault.vector, fault.payload), (PF, 0xffff_fff8));
    assert_eq!(guest.bytes(0, 8), [7; 8]);
}

#[test]
fn a_gather_that_faults_has_done_the_elements_before() {
    // vpgatherdd xmm0{k1}, [rbx + xmm1]; vpgatherdd xmm0, [rbx + xmm1], xmm2
    let rows: [&[u8]; 2] =
        [&[0x62, 0xf2, 0x7d, 0x09, 0x90, 0x04, 0x0b], &[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x0b]];
    for code in rows.into_iter().filter(|code| !is_undefined_here(code)) {
        let mut guest = guest();
        guest.set(reg::RBX, DATA).put(DATA, &0x1111_1111u32.to_le_bytes());
        let state = &mut guest.cpu.state;
        for (i, offset) in [0, (UNMAPPED - DATA) as u32, 0, 0].into_iter().enumerate() {
            state.zmm[1].0[4 * i..4 * i + 4].copy_from_slice(&offset.to_le_bytes());
        }
        state.k[1] = 0xf;
        state.zmm[2].0[..16].fill(0xff);
        assert_eq!(guest.fault(code).0, PF, "{code:02x?}");
        let state = &guest.cpu.state;
        assert_eq!(state.zmm[0].0[..8], [0x11, 0x11, 0x11, 0x11, 0, 0, 0, 0]);
        if code[0] == 0x62 {
            assert_eq!(state.k[1], 0xe);
        } else {
            assert_eq!(state.zmm[2].0[..8], [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        }
    }
}

#[test]
fn a_full_arena_is_emptied_and_refilled() {
    let mut guest = guest();
    guest.cpu.hostexec.stubs = Stubs::with_room(4096);
    let mut code = Vec::new();
    for source in 0..8u8 {
        for target in 0..8u8 {
            code.extend_from_slice(&[0x66, 0x0f, 0xfc, 0xc0 | target << 3 | source]);
        }
    }
    // dec ecx; jnz back
    code.extend_from_slice(&[0xff, 0xc9, 0x0f, 0x85]);
    let back = -(code.len() as i32 + 4);
    code.extend_from_slice(&back.to_le_bytes());
    guest.set(reg::RCX, 3);
    guest.cpu.state.zmm[0].0[0] = 1;
    guest.finish(&code);
    let (mut xmm, mut rounds) = ([1u8, 0, 0, 0, 0, 0, 0, 0], 3);
    while rounds > 0 {
        for source in 0..8 {
            for target in 0..8 {
                xmm[target] = xmm[target].wrapping_add(xmm[source]);
            }
        }
        rounds -= 1;
    }
    let ours: Vec<u8> = guest.cpu.state.zmm[..8].iter().map(|z| z.0[0]).collect();
    assert_eq!(ours, xmm);
}

#[test]
fn narrow_modes_use_the_same_stubs() {
    for size in [CodeSize::Bits32, CodeSize::Bits16] {
        let mut guest = Guest::new(size);
        guest.cpu.state.cr4 |= cr4::OSFXSR;
        guest.cpu.refresh_mode();
        guest.cpu.state.x87 = X87::INIT;
        let data = if size == CodeSize::Bits32 { DATA } else { 0x600 };
        guest.put(data, &0x4045_0000_0000_0000u64.to_le_bytes());
        guest.set(reg::RBX, data).set(reg::RDI, data + 8).set(reg::RCX, 0xffff_ffff_0000_0005);
        // movsd xmm0, [(e)bx or (di)]; cvtsi2sd xmm1, ecx; addsd xmm0, xmm1; cvttsd2si edx, xmm0;
        // fld qword [..]; fistp dword [..]
        let (b, d) = if size == CodeSize::Bits32 { (0x03, 0x07) } else { (0x07, 0x05) };
        let code = [
            &[0xf2, 0x0f, 0x10, b][..],
            &[0xf2, 0x0f, 0x2a, 0xc9],
            &[0xf2, 0x0f, 0x58, 0xc1],
            &[0xf2, 0x0f, 0x2c, 0xd0],
            &[0xdd, b],
            &[0xdb, 0x18 | d],
        ];
        guest.finish(&code.concat());
        assert_eq!(guest.reg(reg::RDX), 47, "{size:?}");
        assert_eq!(guest.word(data + 8, 4), 42, "{size:?}");
    }
}

#[test]
fn environments_have_the_formats_of_their_modes() {
    let image = |size: CodeSize, code: &[u8], length: usize| {
        let mut guest = Guest::new(size);
        guest.cpu.state.x87 =
            X87 { fsw: 0x3800, ftw: 0x80, fop: 0x6f9, fip: 0x5_4321, fdp: 0xa_8765, ..X87::INIT };
        guest.cpu.state.x87.st[0][7..10].copy_from_slice(&[0x80, 0xff, 0x3f]);
        guest.set(reg::RBX, 0x600);
        guest.finish(code);
        // It comes back as it was, but for the masks that FNSTENV sets.
        let (before, load) =
            (guest.cpu.state.x87, [&code[..code.len() - 1], &[code[code.len() - 1] - 0x10]].concat());
        guest.cpu.state.x87 = X87::INIT;
        guest.finish(&load);
        let after = guest.cpu.state.x87;
        assert_eq!((after.fcw, after.fsw, after.ftw), (before.fcw, before.fsw, before.ftw));
        guest.bytes(0x600, length)
    };
    // Tags: register 7 valid, the others empty. fnstenv [bx] and fldenv [bx] differ in the reg field.
    let real = image(CodeSize::Bits16, &[0xd9, 0x37], 14);
    assert_eq!(real, [0x7f, 0x03, 0, 0x38, 0xff, 0x3f, 0x21, 0x43, 0xf9, 0x56, 0x65, 0x87, 0, 0xa0]);
    let real_wide = image(CodeSize::Bits16, &[0x66, 0xd9, 0x37], 28);
    assert_eq!(real_wide[12..], [0x21, 0x43, 0, 0, 0xf9, 0x56, 0, 0, 0x65, 0x87, 0, 0, 0, 0xa0, 0, 0]);
    let protected = image(CodeSize::Bits32, &[0xd9, 0x33], 28);
    assert_eq!(protected[..12], [0x7f, 0x03, 0xff, 0xff, 0, 0x38, 0xff, 0xff, 0xff, 0x3f, 0xff, 0xff]);
    assert_eq!(protected[12..], [0x21, 0x43, 5, 0, 0, 0, 0xf9, 6, 0x65, 0x87, 0xa, 0, 0, 0, 0xff, 0xff]);
    let narrow = image(CodeSize::Bits32, &[0x66, 0xd9, 0x33], 14);
    assert_eq!(narrow[6..], [0x21, 0x43, 0, 0, 0x65, 0x87, 0, 0]);
}
