//! String instructions with huge counts, over mapped and unmapped memory, wrapping segments and ports.

use conformance::rng::Rng;

use crate::image::Image;
use crate::machine::{CODE, DATA, Machine, Mode, RAM};

pub(super) fn image(rng: &mut Rng, mode: Option<Mode>) -> Image {
    let spoil = rng.pick(&[0, 10, 40]);
    let mut machine = Machine::new(rng, mode, spoil);
    let mut code = Vec::new();
    while code.len() < 0x800 {
        strings(machine.rng, machine.mode.bits(), &mut code);
    }
    machine.put(CODE, &code);
    let mut image = machine.finish(20_000);
    if let Some(regs) = image.cpus.first_mut().and_then(|cpu| cpu.regs.as_mut()) {
        regs.rcx = rng.pick(&[!0, 1 << 63, 1 << 40, 0xffff_ffff, 0x10_0000, 0xffff]);
        regs.rsi = address(rng);
        regs.rdi = address(rng);
        regs.rflags |= rng.below(2) << 10;
    }
    image
}

fn address(rng: &mut Rng) -> u64 {
    match rng.below(7) {
        0 => rng.next(),
        1 => CODE + rng.below(0x800),
        2 => RAM - rng.below(64),
        3 => rng.below(RAM),
        // Around the local APIC and just below 4 GiB: device memory.
        4 => rng.pick(&[0xfee0_0000, 0xfec0_0000, 0xffff_fff0, !15]) + rng.below(16),
        _ => DATA + rng.below(0x2000),
    }
}

/// Loads a count and addresses, then repeats a string instruction.
fn strings(rng: &mut Rng, bits: u32, code: &mut Vec<u8>) {
    const OPCODES: [u8; 14] =
        [0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, 0x6c, 0x6d, 0x6e, 0x6f];
    for register in [1, 6, 7] {
        if rng.percent(40) {
            let value = match register {
                1 => rng.next() >> rng.below(64),
                _ => address(rng),
            };
            if bits == 64 {
                code.push(0x48);
            }
            code.push(0xb8 + register);
            code.extend_from_slice(&value.to_le_bytes()[..bits as usize / 8]);
        }
    }
    if rng.percent(20) {
        code.push(rng.pick(&[0xfc, 0xfd]));
    }
    for (percent, prefix) in [(15, 0x66), (15, 0x67), (10, 0x65), (90, rng.pick(&[0xf2, 0xf3]))] {
        if rng.percent(percent) {
            code.push(prefix);
        }
    }
    if bits == 64 && rng.percent(30) {
        code.push(0x48);
    }
    code.push(rng.pick(&OPCODES));
}
