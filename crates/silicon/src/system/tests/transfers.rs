//! Far JMP, CALL, RET, IRET; SYSCALL and SYSENTER.

use super::*;
use crate::exception::vector::{GP, NP, SS, TS, UD};
use crate::flags::Rflags;

/// JMP or CALL ptr16:32.
fn direct(opcode: u8, offset: u64, selector: u16) -> Vec<u8> {
    [&[opcode][..], &far32(offset, selector)].concat()
}

const JMP: u8 = 0xea;
const CALL: u8 = 0x9a;
const TARGET: u64 = HANDLERS + 0x900;

/// A machine with a HLT at TARGET.
fn machine(mode: Mode, ring: u8) -> Machine {
    let mut machine = Machine::new(mode);
    machine.set_ring(ring);
    machine.put(TARGET, &[0xf4]);
    machine
}

#[test]
fn direct_transfers_check_the_code_segment() {
    let e = |selector: u16| Some(u64::from(selector & !3));
    // (ring, selector, offset, fault)
    let table = [
        (0, sel::CODE0, TARGET, None),
        (0, sel::CODE0_16, 0x7000, None),
        (0, 0, TARGET, Some((GP, Some(0)))),
        (0, sel::OUTSIDE, TARGET, Some((GP, e(sel::OUTSIDE)))),
        (0, sel::DATA0, TARGET, Some((GP, e(sel::DATA0)))),
        (0, sel::CODE0 | 3, TARGET, Some((GP, e(sel::CODE0)))),
        (0, sel::CODE3, TARGET, Some((GP, e(sel::CODE3)))),
        (3, sel::CODE0, TARGET, Some((GP, e(sel::CODE0)))),
        (0, sel::ABSENT_CODE0, TARGET, Some((NP, e(sel::ABSENT_CODE0)))),
        (0, sel::CODE0_16, 0x1_0000, Some((GP, Some(0)))),
        (0, sel::LDT, TARGET, Some((GP, e(sel::LDT)))),
    ];
    for opcode in [JMP, CALL] {
        for (ring, selector, offset, expected) in table {
            let mut machine = machine(Mode::Protected, ring);
            machine.put(0x7000, &[0xf4]);
            let (at, sp) = (machine.cpu.state.rip, machine.reg(reg::RSP));
            let code = direct(opcode, offset, selector);
            match expected {
                Some(fault) => assert_eq!(machine.fault(&code), fault, "{opcode:x} {ring} {selector:x}"),
                None => {
                    assert_eq!(machine.run(&code), Exit::Hlt);
                    assert_eq!((machine.cpu.state.rip, machine.selector(Seg::Cs)), (offset, selector));
                    if opcode == CALL {
                        assert_eq!((machine.top(0, 4), machine.top(1, 4)), (at + 7, u64::from(sel::CODE0)));
                        assert_eq!(machine.reg(reg::RSP), sp - 8);
                    }
                }
            }
        }
    }
}

#[test]
fn conforming_code_keeps_the_level() {
    let mut machine = machine(Mode::Protected, 3);
    let at = machine.cpu.state.rip;
    // A HLT at level 3 faults, in the conforming segment.
    let exit = machine.run(&direct(JMP, TARGET, sel::CONFORMING0));
    assert_eq!((exit, machine.vector()), (Exit::Hlt, Some(GP)));
    assert_eq!((machine.top(1, 4), machine.top(2, 4)), (TARGET, u64::from(sel::CONFORMING0 | 3)));
    assert_ne!(machine.top(1, 4), at);
}

#[test]
fn real_mode_far_transfers() {
    let mut machine = Machine::new(Mode::Real);
    machine.put(DATA, &[0xcb]); // retf
    // call far DATA >> 4 : 0
    let code = [&[0x9a, 0, 0][..], &((DATA >> 4) as u16).to_le_bytes()].concat();
    machine.finish(&code);
    assert_eq!((machine.selector(Seg::Cs), machine.reg(reg::RSP)), ((CODE0 >> 4) as u16, 0x8000));
}

#[test]
fn long_mode_reaches_compatibility_mode_and_back() {
    let mut machine = machine(Mode::Long, 0);
    // jmp far [rip]: to 32-bit code that jumps back.
    machine.put(DATA, &direct(JMP, TARGET, sel::CODE0_64));
    let code = [&[0xff, 0x2d, 0, 0, 0, 0][..], &far32(DATA, sel::CODE0)].concat();
    assert_eq!(machine.run(&code), Exit::Hlt);
    assert_eq!((machine.cpu.state.rip, machine.selector(Seg::Cs)), (TARGET, sel::CODE0_64));
    // Both L and D: no code segment at all.
    machine.gdt(sel::GATE, descriptor(0, 0xf_ffff, 0x9b, 0xe));
    machine.set_ring(0);
    let code = [&[0xff, 0x2d, 0, 0, 0, 0][..], &far32(DATA, sel::GATE)].concat();
    assert_eq!(machine.fault(&code), (GP, Some(u64::from(sel::GATE))));
}

#[test]
fn call_gates_to_an_inner_level_copy_parameters() {
    let mut machine = machine(Mode::Protected, 3);
    machine.gdt(sel::GATE, gate(12, 3, sel::CODE0, TARGET, 2));
    machine.stack(4, &[0x1111, 0x2222]);
    let (at, sp) = (machine.cpu.state.rip, machine.reg(reg::RSP));
    assert_eq!(machine.run(&direct(CALL, 0xdead_beef, sel::GATE | 3)), Exit::Hlt);
    let frame: Vec<u64> = (0..6).map(|n| machine.top(n, 4)).collect();
    let expected = [at + 7, u64::from(sel::CODE3), 0x1111, 0x2222, sp, u64::from(sel::DATA3)];
    assert_eq!(frame, expected);
    assert_eq!((machine.cpu.state.cpl, machine.reg(reg::RSP)), (0, TSS_STACK - 24));
    assert_eq!((machine.selector(Seg::Cs), machine.selector(Seg::Ss)), (sel::CODE0, sel::DATA0));
    // RET 8 goes back and drops the parameters on both stacks; DS may not be kept by level 3.
    machine.set_segment(Seg::Ds, sel::DATA0);
    machine.put(TARGET, &[0xca, 8, 0]);
    machine.put(at + 7, &[0xcd, 0x80]);
    machine.idt(0x80, gate(14, 3, sel::CODE0, Machine::handler(0x80), 0));
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!(machine.vector(), Some(0x80));
    assert_eq!((machine.top(0, 4), machine.top(1, 4)), (at + 9, u64::from(sel::CODE3)));
    assert_eq!((machine.top(3, 4), machine.top(4, 4)), (sp + 8, u64::from(sel::DATA3)));
    assert!(machine.cpu.state.segs[Seg::Ds as usize].unusable());
    assert_eq!(machine.selector(Seg::Ds), 0);
    assert_eq!(machine.selector(Seg::Es), sel::DATA3);
}

#[test]
fn sixteen_bit_call_gates_push_words() {
    let mut machine = machine(Mode::Protected, 3);
    machine.put(0x7000, &[0xf4]);
    machine.gdt(sel::GATE, gate(4, 3, sel::CODE0, 0x7000, 1));
    machine.stack(2, &[0x1111]);
    let (at, sp) = (machine.cpu.state.rip, machine.reg(reg::RSP));
    assert_eq!(machine.run(&direct(CALL, 0, sel::GATE | 3)), Exit::Hlt);
    let frame: Vec<u64> = (0..5).map(|n| machine.top(n, 2)).collect();
    let words = [at + 7, u64::from(sel::CODE3), 0x1111, sp, u64::from(sel::DATA3)];
    assert_eq!(frame, words.map(|w| w & 0xffff));
}

#[test]
fn sixty_four_bit_call_gates() {
    let mut machine = machine(Mode::Long, 3);
    machine.gdt(sel::GATE, gate(12, 3, sel::CODE0_64, TARGET, 0));
    machine.gdt(sel::GATE + 8, 0);
    let (at, sp) = (machine.cpu.state.rip, machine.reg(reg::RSP));
    // call far [rip]
    let code = [&[0xff, 0x1d, 0, 0, 0, 0][..], &far32(0, sel::GATE | 3)].concat();
    assert_eq!(machine.run(&code), Exit::Hlt);
    let frame: Vec<u64> = (0..4).map(|n| machine.top(n, 8)).collect();
    assert_eq!(frame, [at + 6, u64::from(sel::CODE3_64), sp, u64::from(sel::DATA3)]);
    assert_eq!((machine.selector(Seg::Ss), machine.reg(reg::RSP)), (0, TSS_STACK - 32));
    // The upper half's type must be zero, and the code 64-bit.
    for (high, code_selector, error) in [(1 << 40, sel::CODE0_64, sel::GATE), (0, sel::CODE0, sel::CODE0)] {
        machine.gdt(sel::GATE, gate(12, 3, code_selector, TARGET, 0));
        machine.gdt(sel::GATE + 8, high);
        machine.set_ring(3);
        assert_eq!(machine.fault(&code), (GP, Some(u64::from(error))));
    }
}

#[test]
fn call_gates_that_cannot_be_used() {
    let absent = 1 << 47;
    let e = |selector: u16| Some(u64::from(selector & !3));
    // (gate, ring, gate's RPL, opcode, fault)
    let table = [
        (gate(12, 0, sel::CODE0, TARGET, 0), 3, 0, CALL, (GP, e(sel::GATE))),
        (gate(12, 2, sel::CODE0, TARGET, 0), 0, 3, CALL, (GP, e(sel::GATE))),
        (gate(12, 3, sel::CODE0, TARGET, 0) & !absent, 0, 0, CALL, (NP, e(sel::GATE))),
        (gate(12, 3, 0, TARGET, 0), 0, 0, CALL, (GP, Some(0))),
        (gate(12, 3, sel::OUTSIDE, TARGET, 0), 0, 0, CALL, (GP, e(sel::OUTSIDE))),
        (gate(12, 3, sel::DATA0, TARGET, 0), 0, 0, CALL, (GP, e(sel::DATA0))),
        (gate(12, 3, sel::CODE3, TARGET, 0), 0, 0, CALL, (GP, e(sel::CODE3))),
        (gate(12, 3, sel::CODE0, TARGET, 0), 3, 3, JMP, (GP, e(sel::CODE0))),
        (gate(12, 3, sel::ABSENT_CODE0, TARGET, 0), 0, 0, CALL, (NP, e(sel::ABSENT_CODE0))),
        (gate(12, 3, sel::CODE0_16, 0x1_0000, 0), 0, 0, CALL, (GP, Some(0))),
    ];
    for (low, ring, rpl, opcode, expected) in table {
        let mut machine = machine(Mode::Protected, ring);
        machine.gdt(sel::GATE, low);
        assert_eq!(machine.fault(&direct(opcode, 0, sel::GATE | rpl)), expected, "{low:x} {ring}");
    }
    // The inner stack of a call: #TS, with no EXT.
    let mut machine = machine(Mode::Protected, 3);
    machine.gdt(sel::GATE, gate(12, 3, sel::CODE0, TARGET, 0));
    machine.put_word(TSS + 8, 2, u64::from(sel::DATA3));
    machine.cpu.controls.exception_bitmap = 1 << TS;
    let exit = machine.run(&direct(CALL, 0, sel::GATE | 3));
    let error = u32::from(sel::DATA3 & !3);
    assert_eq!(exit, Exit::Exception(crate::exception::Exception::ts(error)));
}

#[test]
fn far_returns_check_both_segments() {
    const RETF: &[u8] = &[0xcb];
    let e = |selector: u16| Some(u64::from(selector & !3));
    let (code3, data3) = (u64::from(sel::CODE3), u64::from(sel::DATA3));
    let stack = |cs: u16, ss: u16| vec![TARGET, u64::from(cs), STACK3, u64::from(ss)];
    // (ring, stack, fault)
    let table = [
        (0, stack(0, 0), (GP, Some(0))),
        (0, stack(sel::OUTSIDE, 0), (GP, e(sel::OUTSIDE))),
        (0, stack(sel::DATA0, 0), (GP, e(sel::DATA0))),
        (3, stack(sel::CODE0, 0), (GP, e(sel::CODE0))),
        (0, stack(sel::CODE0 | 3, sel::DATA3), (GP, e(sel::CODE0))),
        (0, stack(sel::ABSENT_CODE0, 0), (NP, e(sel::ABSENT_CODE0))),
        (0, vec![0x1_0000, u64::from(sel::CODE0_16)], (GP, Some(0))),
        (0, stack(sel::CODE3, 0), (GP, Some(0))),
        (0, stack(sel::CODE3, sel::OUTSIDE), (GP, e(sel::OUTSIDE))),
        (0, stack(sel::CODE3, sel::DATA0), (GP, e(sel::DATA0))),
        (0, stack(sel::CODE3, sel::DATA0 | 3), (GP, e(sel::DATA0))),
        (0, stack(sel::CODE3, sel::CODE3), (GP, e(sel::CODE3))),
    ];
    for (ring, words, expected) in table {
        let mut machine = machine(Mode::Protected, ring);
        machine.stack(4, &words);
        assert_eq!(machine.fault(RETF), expected, "{ring} {words:x?}");
    }
    let mut machine = machine(Mode::Protected, 0);
    machine.gdt(sel::GATE, descriptor(0, 0xf_ffff, 0x73, 0xc));
    machine.stack(4, &[TARGET, code3, STACK3, u64::from(sel::GATE | 3)]);
    assert_eq!(machine.fault(RETF), (SS, e(sel::GATE)));
    // A good one: level 3, whose HLT faults.
    machine.set_ring(0);
    machine.stack(4, &[TARGET, code3, STACK3, data3]);
    assert_eq!(machine.run(RETF), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(1, 4), machine.top(2, 4)), (Some(GP), TARGET, code3));
    assert_eq!((machine.top(4, 4), machine.top(5, 4)), (STACK3, data3));
}

#[test]
fn iret_restores_what_the_level_may_change() {
    const ALL: u64 = 0x3f_7fd5;
    // (old level, IOPL, flags that stay as they were)
    let table = [
        (0, 0, Rflags::VM),
        (3, 3, Rflags::VM | Rflags::IOPL | Rflags::VIF | Rflags::VIP),
        (3, 0, Rflags::VM | Rflags::IOPL | Rflags::VIF | Rflags::VIP | Rflags::IF),
    ];
    for (ring, iopl, kept) in table {
        for size in [8, 2] {
            let mut machine = machine(Mode::Long, ring);
            let (cs, ss) = (machine.selector(Seg::Cs), machine.selector(Seg::Ss));
            machine.cpu.state.rflags_system = 2 | (iopl << 12);
            let sp = machine.reg(reg::RSP);
            let image = ALL & !Rflags::TF.bits() & !Rflags::VM.bits();
            machine.put(0x7000, &[0xf4]);
            machine.stack(size, &[0x7000, u64::from(cs), image, sp & 0xffff, u64::from(ss)]);
            let op: &[u8] = if size == 8 { &[0x48, 0xcf] } else { &[0x66, 0xcf] };
            machine.cpu.controls.exception_bitmap = !0;
            machine.run(op);
            let width = if size == 2 { 0xffff } else { ALL };
            let mask = (ALL & width & !kept.bits()) & !Rflags::RF.bits() & !Rflags::TF.bits();
            assert_eq!(
                machine.cpu.state.rflags() & !Rflags::RF.bits(),
                (image & mask) | (iopl << 12) & !mask | 2,
                "ring {ring} iopl {iopl} size {size}"
            );
            assert_eq!(machine.cpu.state.rip, 0x7000);
        }
    }
}

#[test]
fn iretq_always_pops_the_stack() {
    let mut machine = machine(Mode::Long, 0);
    machine.stack(8, &[TARGET, u64::from(sel::CODE0_64), 2, 0x1_2340, 0]);
    assert_eq!(machine.run(&[0x48, 0xcf]), Exit::Hlt);
    assert_eq!(
        (machine.cpu.state.rip, machine.reg(reg::RSP), machine.selector(Seg::Ss)),
        (TARGET, 0x1_2340, 0)
    );
    // To level 3 with a null SS, or 32-bit code with one: #GP(0).
    for cs in [sel::CODE3_64, sel::CODE0] {
        machine.set_ring(0);
        machine.stack(8, &[TARGET, u64::from(cs), 2, STACK3, u64::from(cs & 3)]);
        assert_eq!(machine.fault(&[0x48, 0xcf]), (GP, Some(0)), "{cs:x}");
    }
    // Non-canonical target.
    machine.set_ring(0);
    machine.stack(8, &[1 << 47, u64::from(sel::CODE0_64), 2, STACK0, 0]);
    assert_eq!(machine.fault(&[0x48, 0xcf]), (GP, Some(0)));
    // NT: no task to go back to in IA-32e mode.
    machine.set_ring(0);
    machine.cpu.state.rflags_system |= Rflags::NT.bits();
    assert_eq!(machine.fault(&[0x48, 0xcf]), (GP, Some(0)));
}

#[test]
fn iret_to_an_outer_level_drops_privileged_segments() {
    let mut machine = machine(Mode::Long, 0);
    for seg in [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
        machine.set_segment(seg, sel::DATA0);
    }
    machine.set_segment(Seg::Es, sel::DATA3);
    machine.cpu.state.segs[Seg::Gs as usize] = Segment { base: 0x1234, ..Segment::null(0, 0) };
    machine.stack(8, &[TARGET, u64::from(sel::CODE3_64), 2, STACK3, u64::from(sel::DATA3)]);
    machine.cpu.controls.exception_bitmap = !0;
    machine.run(&[0x48, 0xcf]);
    let selectors = [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs].map(|seg| machine.selector(seg));
    assert_eq!(selectors, [0, sel::DATA3, 0, 0]);
    assert_eq!(machine.cpu.state.segs[Seg::Gs as usize].base, 0x1234, "a null segment keeps its base");
    assert_eq!((machine.cpu.state.cpl, machine.cpu.state.rip), (3, TARGET));
}

#[test]
fn iret_to_16_bit_stacks_keeps_the_upper_half_of_esp() {
    let mut machine = machine(Mode::Protected, 0);
    machine.gdt(sel::GATE, descriptor(0, 0xffff, 0xf3, 0));
    machine.stack(4, &[TARGET, u64::from(sel::CODE3), 2, 0xffff_8000, u64::from(sel::GATE | 3)]);
    machine.cpu.controls.exception_bitmap = !0;
    machine.run(&[0xcf]);
    assert_eq!(machine.reg(reg::RSP), (STACK0 & 0xffff_0000) | 0x8000);
}

fn with_syscall(ring: u8) -> Machine {
    let mut machine = machine(Mode::Long, ring);
    machine.cpu.state.star = (0x18 << 48) | (u64::from(sel::CODE0_64) << 32);
    machine.cpu.state.lstar = TARGET;
    machine.cpu.state.sfmask = (Rflags::IF | Rflags::DF).bits();
    machine
}

#[test]
fn syscall_and_sysret() {
    let mut machine = with_syscall(3);
    machine.cpu.state.rflags_system |= (Rflags::IF | Rflags::DF | Rflags::ID).bits();
    let flags = machine.cpu.state.rflags();
    machine.put(CODE3 + 2, &[0xcd, 0x80]);
    machine.put(TARGET, &[0xf4]);
    assert_eq!(machine.run(&[0x0f, 0x05]), Exit::Hlt);
    let state = &machine.cpu.state;
    assert_eq!((state.rip, state.cpl), (TARGET, 0));
    assert_eq!((machine.reg(reg::RCX), machine.reg(reg::R11)), (CODE3 + 2, flags));
    assert_eq!(state.rflags(), flags & !(Rflags::IF | Rflags::DF).bits());
    assert_eq!(state.segs[1], Segment::flat(sel::CODE0_64, 0xa09b));
    assert_eq!(state.segs[2], Segment::flat(sel::CODE0_64 + 8, 0xc093));
    assert_eq!(machine.reg(reg::RSP), STACK3, "SYSCALL leaves the stack pointer");
    // SYSRETQ and SYSRETD.
    for (code, cs, attributes) in [(&[0x48, 0x0f, 0x07][..], 0x2b, 0xa0fb), (&[0x0f, 0x07], 0x1b, 0xc0fb)] {
        let mut machine = with_syscall(0);
        machine.set(reg::RCX, CODE3 | if code.len() == 2 { 1 << 40 } else { 0 });
        machine.set(reg::R11, 0x3f_ffff & !Rflags::TF.bits());
        machine.cpu.controls.exception_bitmap = !0;
        machine.put(CODE3, &[0xf4]);
        machine.run(code);
        let state = &machine.cpu.state;
        assert_eq!((state.rip, state.cpl), (CODE3, 3));
        assert_eq!(state.segs[1], Segment::flat(cs, attributes));
        assert_eq!(state.segs[2], Segment::flat(0x23, 0xc0f3));
        assert_eq!(state.rflags(), 0x3c_7fd7 & !Rflags::TF.bits());
    }
}

#[test]
fn syscall_and_sysret_faults() {
    let syscall: &[u8] = &[0x0f, 0x05];
    let sysretq: &[u8] = &[0x48, 0x0f, 0x07];
    let mut machine = with_syscall(3);
    machine.cpu.state.efer &= !efer::SCE;
    assert_eq!(machine.fault(syscall), (UD, None));
    machine.set_ring(0);
    assert_eq!(machine.fault(sysretq), (UD, None));
    let mut machine = with_syscall(3);
    assert_eq!(machine.fault(sysretq), (GP, Some(0)));
    // From compatibility mode: #UD on Intel's processors.
    machine.set_ring(3);
    machine.set_code(sel::CODE3);
    assert_eq!(machine.fault(syscall), (UD, None));
    // A non-canonical RCX faults in level 0.
    let mut machine = with_syscall(0);
    machine.set(reg::RCX, 1 << 47);
    assert_eq!(machine.fault(sysretq), (GP, Some(0)));
    assert_eq!(machine.top(1, 8), CODE0);
    let mut machine = Machine::new(Mode::Protected);
    machine.cpu.state.efer = efer::SCE;
    assert_eq!(machine.fault(syscall), (UD, None));
}

#[test]
fn sysenter_and_sysexit() {
    for mode in [Mode::Protected, Mode::Long] {
        let mut machine = machine(mode, 3);
        let state = &mut machine.cpu.state;
        state.sysenter_eip = TARGET;
        state.sysenter_esp = 0x1_2340;
        state.rflags_system |= Rflags::IF.bits();
        machine.set_ring(3);
        assert_eq!(machine.fault(&[0x0f, 0x34]), (GP, Some(0)), "{mode:?}: no SYSENTER_CS");
        machine.set_ring(3);
        machine.cpu.state.sysenter_cs = 0x8 | 3;
        machine.cpu.state.rflags_system |= Rflags::IF.bits();
        assert_eq!(machine.run(&[0x0f, 0x34]), Exit::Hlt);
        let state = &machine.cpu.state;
        let code = if mode == Mode::Long { 0xa09b } else { 0xc09b };
        assert_eq!((state.segs[1], state.segs[2]), (Segment::flat(0x8, code), Segment::flat(0x10, 0xc093)));
        assert_eq!((state.rip, machine.reg(reg::RSP), state.cpl), (TARGET, 0x1_2340, 0));
        assert!(!state.flag(Rflags::IF));

        machine.set_ring(0);
        machine.set(reg::RCX, STACK3);
        machine.set(reg::RDX, TARGET);
        machine.cpu.controls.exception_bitmap = !0;
        let (op, selector, code): (&[u8], u16, u32) = match mode {
            Mode::Long => (&[0x48, 0x0f, 0x35], 0x2b, 0xa0fb),
            _ => (&[0x0f, 0x35], 0x1b, 0xc0fb),
        };
        machine.run(op);
        let state = &machine.cpu.state;
        assert_eq!(state.segs[1], Segment::flat(selector, code));
        assert_eq!(state.segs[2], Segment::flat(selector + 8, 0xc0f3));
        assert_eq!((state.rip, machine.reg(reg::RSP), state.cpl), (TARGET, STACK3, 3));
        machine.cpu.controls.exception_bitmap = 0;
        machine.set_ring(3);
        assert_eq!(machine.fault(op), (GP, Some(0)), "SYSEXIT is for level 0");
        if mode == Mode::Long {
            machine.set_ring(0);
            machine.set(reg::RDX, 1 << 63);
            assert_eq!(machine.fault(op), (GP, Some(0)));
        }
    }
    assert_eq!(Machine::new(Mode::Real).fault(&[0x0f, 0x34]), (GP, None));
}
