//! Every vector, MMX and x87 form that this machine offers, against the host's own execution of the same bytes.

mod faults;
mod generate;
mod native;
mod xsave;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use self::generate::{BASE, Random};
use self::native::{Native, Pages, Thunk};
use crate::code::lower::LowerCtx;
use crate::code::op::Op;
use crate::exception::vector;
use crate::exec::testing::{CODE, DATA, Guest, UNMAPPED};
use crate::exec::{fpu, vector as simd};
use crate::flags::{Rflags, Status};
use crate::state::{CodeSize, X87, cr4};
use crate::vmx::Exit;

/// Bytes of memory around the operand, half of them in a page, half in the next.
const MEMORY: usize = 0x1000;
/// Offset of that window in the two pages.
const WINDOW: u64 = 0x800;

/// One form's instruction, decoded and lowered.
fn decode(guest: &Guest, bytes: &[u8]) -> Option<(Instruction, Op)> {
    let ins = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
    if ins.is_invalid() || ins.len() != bytes.len() || !guest.cpu.features.offers(&ins) {
        return None;
    }
    let stubs = &guest.cpu.hostexec.stubs;
    let ctx = LowerCtx { code_size: CodeSize::Bits64, features: &guest.cpu.features, stubs };
    let op = simd::lower(&ins, &ctx).or_else(|| fpu::lower(&ins, &ctx))?;
    Some((ins, op))
}

fn guest() -> Guest {
    let mut guest = Guest::new(CodeSize::Bits64);
    guest.cpu.state.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    guest.cpu.state.xcr0 = 0xe7;
    guest.cpu.refresh_mode();
    guest
}

/// Bytes that make floating-point values of all kinds likely.
fn interesting(random: &mut Random, out: &mut [u8]) {
    const F32: [u32; 12] = [
        0,
        0x8000_0000,
        0x3f80_0000,
        0xbf80_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0001,
        0x7f80_0001,
        1,
        0x007f_ffff,
        0x7f7f_ffff,
        0x4f00_0000,
    ];
    const F64: [u64; 8] = [
        0,
        1,
        0x3ff0_0000_0000_0000,
        0x7ff0_0000_0000_0000,
        0xfff8_0000_0000_0001,
        0x7ff0_0000_0000_0001,
        0x7fef_ffff_ffff_ffff,
        0x000f_ffff_ffff_ffff,
    ];
    for chunk in out.chunks_mut(8) {
        let value = match random.below(5) {
            0 => F64[random.below(8) as usize],
            1 => u64::from(F32[random.below(12) as usize]) << 32 | u64::from(F32[random.below(12) as usize]),
            2 => (random.below(2000) as f64 / 7.0).to_bits(),
            3 => u64::from((random.below(2000) as f32 / 3.0).to_bits()) << 32 | random.below(1 << 20),
            _ => random.next(),
        };
        chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
    }
}

/// Random register contents.
fn registers(random: &mut Random) -> Native {
    let mut native = Native::new();
    for zmm in &mut native.zmm {
        interesting(random, zmm);
    }
    for k in &mut native.k {
        *k = random.next();
    }
    for gpr in &mut native.gpr {
        *gpr = random.next() >> random.below(64);
    }
    native.flags = 0x202 | random.next() & Rflags::STATUS.bits();
    let fcw = 0x7f | (random.below(16) as u16) << 8;
    let fsw = (random.next() as u16) & 0x7f7f;
    native.fx[0..2].copy_from_slice(&fcw.to_le_bytes());
    native.fx[2..4].copy_from_slice(&fsw.to_le_bytes());
    native.fx[4] = random.next() as u8 | random.next() as u8;
    let mxcsr = 0x1f80 | (random.next() as u32 & 0xe07f);
    native.fx[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for st in native.fx[32..160].chunks_exact_mut(16) {
        interesting(random, &mut st[..8]);
        let exponent = match random.below(4) {
            0 => 0x3fff + random.below(70) as u16,
            1 => 0,
            2 => 0x7fff,
            _ => random.next() as u16,
        };
        st[8..10].copy_from_slice(&(exponent | (random.below(2) as u16) << 15).to_le_bytes());
        if random.below(4) != 0 {
            st[7] |= 0x80;
        }
    }
    native
}

fn to_guest(native: &Native, guest: &mut Guest) {
    let state = &mut guest.cpu.state;
    for (zmm, value) in state.zmm.iter_mut().zip(native.zmm) {
        zmm.0 = value;
    }
    state.k = native.k;
    state.regs[..16].copy_from_slice(&native.gpr);
    state.status = Status::from_rflags(native.flags);
    state.mxcsr = u32::from_le_bytes(native.fx[24..28].try_into().unwrap());
    let half = |at: usize| u16::from_le_bytes([native.fx[at], native.fx[at + 1]]);
    state.x87 = X87 { fcw: half(0), fsw: half(2), ftw: native.fx[4], ..X87::INIT };
    state.x87.st.as_flattened_mut().copy_from_slice(&native.fx[32..160]);
}

/// What differs after execution.
fn differences(ins: &Instruction, native: &Native, guest: &Guest) -> Vec<String> {
    let state = &guest.cpu.state;
    let mut found = Vec::new();
    let mut check = |name: String, host: String, ours: String| {
        if host != ours {
            found.push(format!("{name}: host {host}, ours {ours}"));
        }
    };
    for (i, (host, ours)) in native.zmm.iter().zip(&state.zmm).enumerate() {
        check(format!("zmm{i}"), format!("{host:02x?}"), format!("{:02x?}", ours.0));
    }
    for (i, (host, ours)) in native.k.iter().zip(state.k).enumerate() {
        check(format!("k{i}"), format!("{host:x}"), format!("{ours:x}"));
    }
    let skip = |i: usize| matches!(i, 3 | 4 | 7 | 15);
    for i in (0..16).filter(|&i| !skip(i)) {
        check(format!("gpr{i}"), format!("{:x}", native.gpr[i]), format!("{:x}", state.regs[i]));
    }
    let undefined = u64::from(iced_undefined(ins));
    let flags = native.flags & Rflags::STATUS.bits() & !undefined;
    check("flags".into(), format!("{flags:x}"), format!("{:x}", state.status.to_rflags() & !undefined));
    check("mxcsr".into(), format!("{:x?}", &native.fx[24..28]), format!("{:x?}", state.mxcsr.to_le_bytes()));
    let x87 = &state.x87;
    let ours = (x87.fcw, x87.fsw, x87.ftw);
    let half = |at: usize| u16::from_le_bytes([native.fx[at], native.fx[at + 1]]);
    check("x87 control".into(), format!("{:x?}", (half(0), half(2), native.fx[4])), format!("{ours:x?}"));
    check("x87 stack".into(), format!("{:x?}", &native.fx[32..160]), format!("{:x?}", x87.st.as_flattened()));
    found
}

fn iced_undefined(ins: &Instruction) -> u32 {
    if ins.rflags_undefined() == 0 { 0 } else { Rflags::STATUS.bits() as u32 }
}

/// Fields of an environment image that hold addresses of code and data.
fn blank_pointers(ins: &Instruction, image: &mut [u8]) {
    let fields = match ins.memory_size().size() {
        28 | 108 => 12..26,
        14 | 94 => 6..14,
        _ => 0..0,
    };
    if matches!(ins.mnemonic(), Mnemonic::Fnstenv | Mnemonic::Fnsave) {
        let end = image.len();
        image[fields.start.min(end)..fields.end.min(end)].fill(0);
    }
}

/// One guest, one harness, and memory for both.
struct Bench {
    guest: Guest,
    thunk: Thunk,
    pages: Pages,
    random: Random,
}

impl Bench {
    fn new(seed: u64) -> Bench {
        Bench { guest: guest(), thunk: Thunk::new(), pages: Pages::new(), random: Random(seed) }
    }

    /// Runs one case in both worlds; what differs. With `edge` the page that follows the operand's is not
    /// there.
    fn compare(&mut self, bytes: &[u8], ins: &Instruction, op: &Op, edge: bool) -> Vec<String> {
        let Bench { guest, thunk, pages, random } = self;
        let mut native = registers(random);
        let window = WINDOW as usize..WINDOW as usize + MEMORY;
        interesting(random, &mut pages.bytes()[window.clone()]);
        // The operand lies in one page or across two.
        let mut at = if edge || random.one_in(3) { 0xf80 } else { 0x900 }
            + 64 * random.below(if edge { 2 } else { 4 });
        if op.r2 == 0 {
            at += random.below(64);
        }
        if matches!(ins.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr) {
            let mxcsr = 0x1f80 | (random.next() as u32 & 0xffff);
            pages.bytes()[at as usize..][..4].copy_from_slice(&mxcsr.to_le_bytes());
        }
        if ins.memory_index().is_vector_register() {
            small_indices(ins, &mut native);
        }
        let base = if edge { UNMAPPED - 0x1000 } else { DATA };
        let size = if edge { MEMORY / 2 } else { MEMORY };
        guest.put(base + WINDOW, &pages.bytes()[window.clone()][..size]);
        native.gpr[4] = 0;
        let mut host = native.clone();
        for register in [BASE, Register::RDI] {
            native.gpr[register.number()] = base + at;
            host.gpr[register.number()] = pages.address() + at;
        }
        to_guest(&native, guest);
        if edge {
            pages.take_second();
        }
        let faulted = thunk.run(bytes, &mut host);
        let exit = guest.run(bytes);
        let end = CODE + if faulted { 0 } else { bytes.len() as u64 };
        let vector = if faulted { vector::PF } else { vector::UD };
        if guest.cpu.state.rip != end || !matches!(exit, Exit::Exception(e) if e.vector == vector) {
            return vec![format!("host faulted: {faulted}; ours {exit:?} at {:#x}", guest.cpu.state.rip)];
        }
        if faulted && ins.memory_index().is_vector_register() {
            // Which elements are done when one faults is the implementation's choice.
            return Vec::new();
        }
        if faulted {
            keep_early_effects(ins, guest, &mut host);
        }
        let mut found = differences(ins, &host, guest);
        if faulted && op.size == 10 {
            // The host writes ten bytes in two parts, and may have written one.
            return found;
        }
        let mut ours = guest.bytes(base + WINDOW, size);
        blank_pointers(ins, &mut ours[at as usize - WINDOW as usize..]);
        let theirs = pages.bytes();
        blank_pointers(ins, &mut theirs[at as usize..]);
        if let Some(i) = (0..size).find(|&i| theirs[window.start + i] != ours[i]) {
            found.push(format!("memory at operand + {}", i as i64 + WINDOW as i64 - at as i64));
        }
        found
    }
}

/// Before a store faults, the host has already set MXCSR's flags (VCVTPS2PH) or gone over to MMX (TOP = 0),
/// which the instruction does again anyway when it is restarted.
fn keep_early_effects(ins: &Instruction, guest: &Guest, host: &mut Native) {
    if ins.mnemonic() == Mnemonic::Vcvtps2ph {
        host.fx[24..28].copy_from_slice(&guest.cpu.state.mxcsr.to_le_bytes());
    }
    if (0..ins.op_count()).any(|i| ins.op_register(i).is_mm()) {
        host.fx[2..4].copy_from_slice(&guest.cpu.state.x87.fsw.to_le_bytes());
        host.fx[32..160].copy_from_slice(guest.cpu.state.x87.st.as_flattened());
    }
}

/// Makes gathers and scatters stay near their base.
fn small_indices(ins: &Instruction, native: &mut Native) {
    let wide = format!("{:?}", ins.mnemonic()).contains("erq");
    for (i, byte) in native.zmm[ins.memory_index().number()].iter_mut().enumerate() {
        let lowest = if wide { i % 8 == 0 } else { i % 4 == 0 };
        *byte = if lowest { *byte & 0x3f } else { 0 };
    }
}

/// Forms of ours that the machine offers, each tried `cases` times; how many there are, and what differs.
fn sweep(seed: u64, cases: usize, edge: bool) -> (usize, Vec<String>) {
    let mut bench = Bench::new(seed);
    let (mut tested, mut failures) = (0, Vec::new());
    for code in Code::values() {
        let info = code.op_code();
        if !info.is_instruction() || !info.mode64() {
            continue;
        }
        let mut done = 0;
        for _ in 0..cases * 4 {
            let Some(bytes) = generate::instruction(code, &mut bench.random) else { continue };
            let Some((ins, op)) = decode(&bench.guest, &bytes) else { continue };
            let memory = ins.op_kinds().any(|kind| kind == OpKind::Memory);
            if ins.code() != code || ins.mnemonic() == Mnemonic::Wait || edge && !memory {
                continue;
            }
            let found = bench.compare(&bytes, &ins, &op, edge);
            if !found.is_empty() {
                failures.push(format!("{code:?} {bytes:02x?}\n  {}", found.join("\n  ")));
            }
            done += 1;
            if done == cases {
                break;
            }
        }
        tested += usize::from(done > 0);
    }
    (tested, failures)
}

/// Whether the host can serve as the reference.
fn host_is_reference() -> bool {
    std::arch::is_x86_feature_detected!("avx512bw")
}

#[test]
fn every_offered_form_does_what_the_host_does() {
    if host_is_reference() {
        let (tested, failures) = sweep(1, 3, false);
        assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
        assert!(tested > 2000, "{tested} forms");
    }
}

#[test]
fn every_offered_form_faults_where_the_host_does() {
    if host_is_reference() {
        let (tested, failures) = sweep(2, 3, true);
        assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
        assert!(tested > 1000, "{tested} forms");
    }
}
