//! KVM structures with random contents: what a hostile or broken client of the KVM API may hand over.

use conformance::rng::Rng;
use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_fpu, kvm_segment};

use crate::image::Image;
use crate::machine::{Machine, Mode};

pub(super) fn image(rng: &mut Rng, mode: Option<Mode>) -> Image {
    let spoil = rng.pick(&[0, 30]);
    let mut image = Machine::new(rng, mode, spoil).with_random_code(10_000);
    let Some(cpu) = image.cpus.first_mut() else { return image };
    if let Some(sregs) = &mut cpu.sregs {
        for _ in 0..1 + rng.below(4) {
            let value = rng.next() >> rng.below(64);
            match rng.below(14) {
                0 => sregs.cs = segment(rng),
                1 => sregs.ss = segment(rng),
                2 => sregs.ds = segment(rng),
                3 => sregs.tr = segment(rng),
                4 => sregs.ldt = segment(rng),
                5 => sregs.gdt = kvm_dtable { base: value, limit: rng.next() as u16, padding: [0; 3] },
                6 => sregs.idt = kvm_dtable { base: value, limit: rng.next() as u16, padding: [0; 3] },
                7 => sregs.cr0 ^= value & 0xffff_ffff,
                8 => sregs.cr3 = value,
                9 => sregs.cr4 ^= value,
                10 => sregs.efer ^= value,
                11 => sregs.cr8 = value,
                12 => sregs.interrupt_bitmap[rng.below(4) as usize] = value,
                _ => sregs.cr2 = value,
            }
        }
    }
    if let Some(regs) = cpu.regs.as_mut().filter(|_| rng.percent(50)) {
        regs.rflags = rng.next();
        regs.rip = if rng.percent(30) { rng.next() } else { regs.rip };
        regs.rsp = rng.next();
    }
    let mut fpu = kvm_fpu {
        fcw: rng.next() as u16,
        fsw: rng.next() as u16,
        ftwx: rng.next() as u8,
        mxcsr: rng.next() as u32,
        last_opcode: rng.next() as u16,
        last_ip: rng.next(),
        last_dp: rng.next(),
        ..kvm_fpu::default()
    };
    fpu.fpr.iter_mut().for_each(|register| rng.fill(register));
    fpu.xmm.iter_mut().for_each(|register| rng.fill(register));
    cpu.fpu = Some(Box::new(fpu));
    cpu.debugregs = Some(kvm_debugregs {
        db: [rng.next(), rng.next(), rng.next(), rng.next()],
        dr6: rng.next() >> 32,
        dr7: rng.next() >> 32,
        ..kvm_debugregs::default()
    });
    cpu.xcr0 = Some(rng.next() >> rng.below(64));
    cpu.msrs.extend((0..16).map(|_| (rng.next() as u32 >> rng.below(32), rng.next() >> rng.below(64))));
    image.cripple = rng.below(60);
    image
}

fn segment(rng: &mut Rng) -> kvm_segment {
    let bits = rng.next();
    kvm_segment {
        base: rng.next() >> rng.below(64),
        limit: rng.next() as u32 >> rng.below(32),
        selector: rng.next() as u16,
        type_: bits as u8,
        present: (bits >> 8 & 1) as u8,
        dpl: (bits >> 16) as u8,
        db: (bits >> 9 & 1) as u8,
        s: (bits >> 10 & 1) as u8,
        l: (bits >> 11 & 1) as u8,
        g: (bits >> 12 & 1) as u8,
        avl: (bits >> 13 & 1) as u8,
        unusable: (bits >> 14 & 1) as u8,
        padding: 0,
    }
}
