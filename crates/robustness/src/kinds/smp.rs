//! Two vCPUs on the same memory: random instructions, locked operations, stores into each other's code and page
//! tables, and interrupts between them.

use conformance::rng::Rng;

use crate::image::Image;
use crate::machine::{CODE, DATA, Machine, TABLES};
use crate::stream::Stream;

pub(super) fn image(rng: &mut Rng) -> Image {
    let spoil = rng.pick(&[0, 10]);
    let mut machine = Machine::new(rng, None, spoil);
    let bits = machine.mode.bits();
    let near = [DATA, CODE, CODE, TABLES + 0x3000, 0xfee0_0300];
    let code = Stream::new(machine.rng, bits, &near).code(CODE, 0x1000);
    machine.put(CODE, &code);
    let mut image = machine.finish(20_000);
    image.irqchip = rng.percent(60);
    let Some(mut second) = image.cpus.first().cloned() else { return image };
    if let Some(regs) = &mut second.regs {
        // Near each other, so that they meet on the same data, but not in step.
        regs.rip = CODE + rng.below(0x800);
        regs.rsp -= 0x400;
        regs.rcx = rng.next() & 0xff;
        for register in [&mut regs.rbx, &mut regs.rdi] {
            *register = rng.pick(&[DATA, CODE, 0xfee0_0300]) + rng.below(0x40);
        }
    }
    if image.irqchip && rng.percent(30) {
        // Waits for INIT and SIPI.
        second = crate::image::Start::default();
    }
    image.cpus.push(second);
    image
}
