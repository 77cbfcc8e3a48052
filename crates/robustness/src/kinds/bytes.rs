//! Random bytes from reset: what a machine with a broken firmware does.

use conformance::rng::Rng;

use crate::image::{Image, Slot, Start};

/// The last 64 KiB below 4 GiB, where the reset vector lies.
const FIRMWARE: u64 = 0xffff_0000;
const FIRMWARE_SIZE: usize = 0x1_0000;

pub(super) fn image(rng: &mut Rng) -> Image {
    let mut firmware = vec![0; FIRMWARE_SIZE];
    fill(rng, &mut firmware);
    if rng.percent(70) {
        // A far jump into low memory, or a near one back into the firmware.
        let (offset, segment) = (rng.next() as u16, rng.below(0x1000) as u16);
        let far = rng.percent(50);
        let jump = if far { 0xea } else { 0xe9 };
        let [a, b] = offset.to_le_bytes();
        let [c, d] = segment.to_le_bytes();
        firmware[0xfff0..0xfff5].copy_from_slice(&[jump, a, b, c, d]);
    }
    let mut ram = vec![0; 0x2_0000];
    fill(rng, &mut ram);
    let slots = if rng.percent(50) {
        vec![Slot::ram(0, ram), Slot::rom(FIRMWARE, firmware)]
    } else {
        vec![Slot::ram(0, ram), Slot::ram(FIRMWARE, firmware)]
    };
    let mut image = Image::new(slots, Start::default(), 20_000);
    image.irqchip = rng.percent(20);
    image
}

/// Random bytes, sparse in zeros, or bytes that favour the opcode maps beyond the first.
fn fill(rng: &mut Rng, out: &mut [u8]) {
    rng.fill(out);
    match rng.below(4) {
        0 => out.iter_mut().for_each(|byte| *byte &= if *byte & 3 == 0 { 0 } else { 0xff }),
        1 => {
            const PREFIXES: [u8; 12] =
                [0x0f, 0x0f, 0x66, 0xf2, 0xf3, 0x67, 0xf0, 0x2e, 0x65, 0xc4, 0xc5, 0x62];
            for byte in out.iter_mut().step_by(5) {
                *byte = rng.pick(&PREFIXES);
            }
        }
        _ => {}
    }
}
