//! Code that writes over itself: stores and string moves whose targets are the code's own pages, in loops.

use conformance::rng::Rng;

use crate::image::Image;
use crate::machine::{CODE, Machine, Mode};
use crate::stream::Stream;

pub(super) fn image(rng: &mut Rng, mode: Option<Mode>) -> Image {
    let spoil = rng.pick(&[0, 0, 20]);
    let mut machine = Machine::new(rng, mode, spoil);
    let bits = machine.mode.bits();
    let mut code = Vec::new();
    while code.len() < 0xc00 {
        let at = CODE + code.len() as u64;
        match machine.rng.below(4) {
            0 => code.extend(Stream::new(machine.rng, bits, &[CODE]).code(at, 12)),
            1 => {
                // A short jump back: loops over what was just changed.
                let back = machine.rng.below(100) as u8;
                code.extend_from_slice(&[machine.rng.pick(&[0xeb, 0x75, 0x72, 0xe2]), back.wrapping_neg()]);
            }
            _ => store(machine.rng, bits, &mut code),
        }
    }
    machine.put(CODE, &code);
    let mut image = machine.finish(30_000);
    if let Some(regs) = image.cpus.first_mut().and_then(|cpu| cpu.regs.as_mut()) {
        regs.rdi = CODE + rng.below(0x1000);
        regs.rsi = CODE + rng.below(0x1000);
        regs.rbx = CODE + rng.below(0x1000);
        regs.rcx = rng.below(0x400);
    }
    image
}

/// A store at [rdi], [rsi] or [rbx] (in 16-bit code at other registers of that encoding), or a string store.
fn store(rng: &mut Rng, bits: u32, code: &mut Vec<u8>) {
    let displacement = rng.next() as u8;
    match rng.below(6) {
        0 => code.extend_from_slice(&[0xf3, rng.pick(&[0xa4, 0xa5, 0xaa, 0xab])]),
        1 => code.extend_from_slice(&[0xf0, 0x83, 0x43, displacement, rng.next() as u8]), // lock add
        2 => code.extend_from_slice(&[0xc6, 0x47, displacement, rng.next() as u8]),       // mov byte
        3 => code.extend_from_slice(&[0x0f, 0x11, 0x47, displacement]),                   // movups
        4 if bits == 64 => code.extend_from_slice(&[0x48, 0x89, 0x46, displacement]),     // mov qword
        _ => code.extend_from_slice(&[0x89, 0x43, displacement]),                         // mov
    }
}
