//! Random tables, selectors and code: whatever a guest puts there, the processor goes on or shuts down.

use super::*;
use crate::state::CodeSize;
use crate::vmx::Injection;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    /// A selector of the machine's, or any.
    fn selector(&mut self) -> u16 {
        if self.one_in(8) { self.next() as u16 } else { (self.below(24) * 8 + self.below(4)) as u16 }
    }
    /// An address where something is, or any.
    fn address(&mut self) -> u64 {
        let places = [CODE0, CODE3, STACK0, STACK3, TSS_STACK, HANDLERS, DATA, GDT, TSS, TSS2];
        match self.below(8) {
            0 => self.next(),
            1 => self.next() as u32 as u64,
            _ => places[self.below(places.len() as u64) as usize],
        }
    }
    /// A descriptor or gate: of the machine's kinds with a bit or two flipped, or any.
    fn descriptor(&mut self) -> u64 {
        let mut low = match self.below(4) {
            0 => self.next(),
            1 => gate(self.below(16), self.below(4), self.selector(), self.address(), self.below(32)),
            2 => descriptor(self.address(), self.below(1 << 20), 0x80 | self.below(32), self.below(16)),
            _ => descriptor(0, 0xf_ffff, 0x90 | self.below(16) | (self.below(4) << 5), self.below(16)),
        };
        if self.one_in(3) {
            low ^= 1 << self.below(64);
        }
        low
    }
}

/// Instructions that transfer control or load segments; pointers follow where they take one.
const CODE: [&[u8]; 24] = [
    &[0xcf],
    &[0x48, 0xcf],
    &[0x66, 0xcf],
    &[0xcb],
    &[0x48, 0xcb],
    &[0xca, 4, 0],
    &[0xea],
    &[0x9a],
    &[0xff, 0x2d, 0, 0, 0, 0],
    &[0xff, 0x1d, 0, 0, 0, 0],
    &[0xcd, 0x40],
    &[0xcc],
    &[0xf1],
    &[0x0f, 0x05],
    &[0x48, 0x0f, 0x07],
    &[0x0f, 0x07],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x8e, 0xd8],
    &[0x8e, 0xd0],
    &[0x0f, 0x00, 0xd8],
    &[0x0f, 0x00, 0xd0],
    &[0x9d],
    &[0x0f, 0x23, 0xf8],
];

fn scramble(machine: &mut Machine, random: &mut Random) {
    for _ in 0..random.below(4) {
        let (selector, low) = (random.selector() & 0xf8, random.descriptor());
        machine.gdt(selector, low);
    }
    for _ in 0..random.below(4) {
        let vector = [0x40, 1, 3, 8, 10, 11, 12, 13, 14][random.below(9) as usize];
        let low = random.descriptor();
        machine.idt(vector, low);
    }
    for _ in 0..random.below(4) {
        let (offset, value) = (random.below(0x68), random.address());
        machine.put_word(TSS + offset, 8, value);
    }
    for offset in (0..0x68).step_by(4) {
        let value = if random.one_in(2) { random.address() } else { u64::from(random.selector()) };
        machine.put_word(TSS2 + offset, 4, value);
    }
    let state = &mut machine.cpu.state;
    for register in 0..16 {
        if random.one_in(3) {
            state.regs[register] =
                if random.one_in(2) { random.address() } else { u64::from(random.selector()) };
        }
    }
    state.cr4 ^= random.next() & (cr4::VME | cr4::PVI | cr4::DE | cr4::UMIP);
    state.star = random.next();
    (state.lstar, state.sfmask) = (random.address(), random.next());
    state.sysenter_cs = u64::from(random.selector());
    (state.sysenter_eip, state.sysenter_esp) = (random.address(), random.address());
    for breakpoint in &mut state.dr {
        *breakpoint = random.address();
    }
    if random.one_in(4) {
        state.dr7 = 0x400 | random.next() & 0xffff_23ff;
    }
    if random.one_in(2) {
        let flags = random.next() & 0x3d_7fd5;
        state.set_rflags(flags);
    }
    state.tr.limit = if random.one_in(8) { random.below(0x70) as u32 } else { 0x1ff };
}

#[test]
fn no_table_makes_it_panic() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut shutdowns = 0;
    for _ in 0..1500 {
        let mode = [Mode::Real, Mode::Protected, Mode::Long][random.below(3) as usize];
        let mut machine = Machine::new(mode);
        machine.set_ring_if_protected(if random.one_in(2) { 3 } else { 0 });
        scramble(&mut machine, &mut random);
        let mut code = Vec::new();
        for _ in 0..4 {
            code.extend_from_slice(CODE[random.below(CODE.len() as u64) as usize]);
            if matches!(code.last(), Some(0xea | 0x9a | 0)) {
                let (offset, selector) = (random.address(), random.selector());
                code.extend(far32(offset, selector));
            }
        }
        let stack: Vec<u64> = (0..9)
            .map(|n| match n {
                1 | 4 => u64::from(random.selector()),
                2 => random.next() & 0x3f_ffff,
                _ => random.address(),
            })
            .collect();
        let size = [2, 4, 8][mode as usize];
        let at = machine.code();
        machine.put(at, &code);
        let top = machine.reg(reg::RSP) & 0x3_ffff;
        for (n, word) in stack.iter().enumerate() {
            machine.put_word(top + (n * size) as u64, size, *word);
        }
        if random.one_in(4) {
            machine.cpu.injection = Some(Injection::Interrupt(random.next() as u8));
        }
        machine.cpu.controls.instruction_limit = 200;
        for _ in 0..8 {
            match machine.cpu.run() {
                Exit::TripleFault => {
                    shutdowns += 1;
                    break;
                }
                Exit::Io(_) | Exit::EptViolation(_) => machine.cpu.complete_read(random.next()),
                Exit::Budget | Exit::FetchFailed { .. } => break,
                _ => machine.cpu.skip_instruction(),
            }
        }
        let state = &machine.cpu.state;
        assert!(state.cpl <= 3);
        let long = state.long_mode() && state.segs[1].long();
        assert_eq!(state.code_size == CodeSize::Bits64, long);
    }
    assert!(shutdowns > 0);
}

impl Machine {
    fn set_ring_if_protected(&mut self, cpl: u8) {
        if self.mode != Mode::Real {
            self.set_ring(cpl);
        }
    }
}
