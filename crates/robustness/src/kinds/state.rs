//! MSRs by number and value, and XSAVE images from random memory, at CPL 0.

use conformance::rng::Rng;

use crate::image::Image;
use crate::machine::{CODE, DATA, Machine, Mode};

pub(super) fn image(rng: &mut Rng) -> Image {
    let mode = rng.pick(&[Mode::Long, Mode::Long, Mode::Protected32]);
    let mut machine = Machine::in_mode(rng, mode, 0);
    let mut code = Vec::new();
    while code.len() < 0x1000 {
        if machine.rng.percent(50) { msr(machine.rng, &mut code) } else { area(machine.rng, mode, &mut code) }
    }
    code.truncate(0x1000);
    machine.put(CODE, &code);
    let header = xsave_header(machine.rng);
    let image_at = DATA + machine.rng.below(4) * 64;
    let mut image = machine.finish(20_000);
    if let Some(crate::image::Contents::Bytes(ram)) = image.slots.first_mut().map(|slot| &mut slot.contents) {
        let at = image_at as usize + 512;
        ram[at..at + 64].copy_from_slice(&header);
        if rng.percent(70) {
            // An MXCSR without reserved bits.
            ram[image_at as usize + 24..][..4].copy_from_slice(&(rng.next() as u32 & 0xffff).to_le_bytes());
        }
    }
    if let Some(cpu) = image.cpus.first_mut() {
        cpu.msrs.extend((0..4).map(|_| (index(rng), rng.next() >> rng.below(64))));
        if let Some(regs) = &mut cpu.regs {
            (regs.rbx, regs.rsi) = (image_at, DATA + rng.below(0x1000));
        }
    }
    image
}

/// XSTATE_BV, XCOMP_BV and the reserved part, mostly good.
fn xsave_header(rng: &mut Rng) -> [u8; 64] {
    let mut header = [0; 64];
    let (any, present) = (rng.next(), rng.next());
    let components = rng.pick(&[any, 0x7, 0xe7, 0x2e7, 0x6_02ff, 0]);
    header[..8].copy_from_slice(&(components & present).to_le_bytes());
    if rng.percent(50) {
        header[8..16].copy_from_slice(&(1 << 63 | components).to_le_bytes());
    }
    if rng.percent(10) {
        rng.fill(&mut header[8..]);
    }
    header
}

/// The number of an MSR that probably exists.
fn index(rng: &mut Rng) -> u32 {
    let known = hypervisor::msr::feature_index_list(u64::MAX);
    match rng.below(10) {
        0 => rng.next() as u32,
        1 => 0xc000_0080 + rng.below(8) as u32,
        2 => 0xc000_0100 + rng.below(4) as u32,
        3 => 0x200 + rng.below(0x100) as u32,
        4 => 0x400 + rng.below(0x80) as u32,
        5 => 0x800 + rng.below(0x40) as u32,
        6 => 0x4b56_4d00 + rng.below(8) as u32,
        7 if !known.is_empty() => rng.pick(&known),
        8 => {
            rng.pick(&[0x10, 0x1b, 0x3a, 0x3b, 0x174, 0x175, 0x176, 0x1a0, 0x277, 0x2ff, 0x6e0, 0xda0, 0x6a0])
        }
        _ => rng.below(0x300) as u32,
    }
}

/// mov ecx, index; mov eax, value; cdq or mov edx, value; rdmsr, wrmsr or xsetbv.
fn msr(rng: &mut Rng, code: &mut Vec<u8>) {
    let number = index(rng);
    code.push(0xb9);
    code.extend_from_slice(&number.to_le_bytes());
    code.push(0xb8);
    code.extend_from_slice(&((rng.next() >> rng.below(64)) as u32).to_le_bytes());
    code.push(0x99);
    code.extend_from_slice(match rng.below(8) {
        0..=2 => &[0x0f, 0x32],
        3..=6 => &[0x0f, 0x30],
        _ => &[0x31, 0xc9, 0x0f, 0x01, 0xd1],
    });
}

/// A save or restore at [rbx] with random EDX:EAX.
fn area(rng: &mut Rng, mode: Mode, code: &mut Vec<u8>) {
    code.push(0xb8);
    let any = rng.next() as u32;
    code.extend_from_slice(&rng.pick(&[!0, 7, 0xe7, 0x202e7, any]).to_le_bytes());
    code.push(rng.pick(&[0x99, 0x90]));
    if mode == Mode::Long && rng.percent(50) {
        code.push(0x48);
    }
    // Modifier /0 to /7 of 0F AE and 0F C7, memory at [rbx], [rbx + 64] or [rsi].
    let (map, modifier) = (rng.pick(&[0xae, 0xae, 0xc7]), rng.below(8) as u8);
    match rng.below(6) {
        0 => code.extend_from_slice(&[0x0f, map, modifier << 3 | 6]),
        1 => code.extend_from_slice(&[0x0f, map, 0x40 | modifier << 3 | 3, 64]),
        _ => code.extend_from_slice(&[0x0f, map, modifier << 3 | 3]),
    }
}
