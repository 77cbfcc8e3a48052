//! Task switches.

use super::*;
use crate::exception::Exception;
use crate::exception::vector::{DB, GP, NP, SS, TS};
use crate::flags::Rflags;
use crate::system::deliver::Event;

const ENTRY: u64 = HANDLERS + 0x900;
const NEW_STACK: u64 = 0x7_0000;

/// A second task at ENTRY, whose registers hold 0x11 times their number.
fn machine() -> Machine {
    let mut machine = Machine::new(Mode::Protected);
    machine.put(ENTRY, &[0xf4]);
    for (offset, value) in [(0x1c, 0x10_0000), (0x20, ENTRY), (0x24, 2)] {
        machine.put_word(TSS2 + offset, 4, value);
    }
    for n in 0..8 {
        machine.put_word(TSS2 + 0x28 + 4 * n, 4, if n == 4 { NEW_STACK } else { 0x11 * n });
    }
    for (n, selector) in [sel::DATA0, sel::CODE0, sel::DATA0, sel::DATA0, sel::DATA3, 0].iter().enumerate() {
        machine.put_word(TSS2 + 0x48 + 4 * n as u64, 4, u64::from(*selector));
    }
    machine.put_word(TSS2 + 0x60, 4, 0);
    machine.cpu.state.rflags_system |= Rflags::IF.bits();
    machine
}

fn jump(selector: u16) -> Vec<u8> {
    [&[0xea][..], &far32(0, selector)].concat()
}

fn call(selector: u16) -> Vec<u8> {
    [&[0x9a][..], &far32(0, selector)].concat()
}

fn busy(machine: &Machine, selector: u16) -> bool {
    machine.gdt_entry(selector) & (2 << 40) != 0
}

#[test]
fn jump_to_a_tss() {
    let mut machine = machine();
    for n in 0..8 {
        if n != 4 {
            machine.set(n, 0x100 + u64::from(n));
        }
    }
    assert_eq!(machine.run(&jump(sel::TSS2)), Exit::Hlt);
    let state = &machine.cpu.state;
    assert_eq!((state.rip, state.rflags(), state.tr.selector), (ENTRY, 2, sel::TSS2));
    assert_eq!(state.tr.kind(), 11);
    assert_eq!(state.cr0 & cr0::TS, cr0::TS);
    assert_eq!(state.regs[..8], [0, 0x11, 0x22, 0x33, NEW_STACK, 0x55, 0x66, 0x77]);
    let selectors = Seg::ALL.map(|seg| machine.selector(seg));
    assert_eq!(selectors, [sel::DATA0, sel::CODE0, sel::DATA0, sel::DATA0, sel::DATA3, 0]);
    assert!(!busy(&machine, sel::TSS) && busy(&machine, sel::TSS2));
    // What was saved.
    assert_eq!(machine.word(TSS + 0x20, 4), CODE0 + 7);
    assert_eq!(machine.word(TSS + 0x24, 4), 2 | Rflags::IF.bits());
    for n in 0..8 {
        let expected = if n == 4 { STACK0 } else { 0x100 + n };
        assert_eq!(machine.word(TSS + 0x28 + 4 * n, 4), expected);
    }
    assert_eq!(machine.word(TSS + 0x4c, 2), u64::from(sel::CODE0));
    assert_eq!(machine.word(TSS2, 2), 0, "no back link");
}

#[test]
fn call_and_iret_nest() {
    for through_gate in [false, true] {
        let mut machine = machine();
        machine.gdt(sel::GATE, gate(5, 0, sel::TSS2, 0, 0));
        machine.put(ENTRY, &[0xcf, 0xf4]);
        let target = if through_gate { sel::GATE } else { sel::TSS2 };
        machine.cpu.controls.instruction_limit = 1;
        assert_eq!(machine.run(&call(target)), Exit::Budget);
        assert_eq!(machine.cpu.state.rflags(), 2 | Rflags::NT.bits());
        assert_eq!(machine.word(TSS2, 2), u64::from(sel::TSS));
        assert!(busy(&machine, sel::TSS) && busy(&machine, sel::TSS2));
        machine.cpu.controls.instruction_limit = u64::MAX;
        assert_eq!(machine.cpu.run(), Exit::Hlt);
        assert_eq!((machine.cpu.state.rip, machine.reg(reg::RSP)), (CODE0 + 7, STACK0));
        assert_eq!(machine.cpu.state.rflags(), 2 | Rflags::IF.bits());
        assert!(busy(&machine, sel::TSS) && !busy(&machine, sel::TSS2));
        assert_eq!(machine.word(TSS2 + 0x24, 4) & Rflags::NT.bits(), 0, "saved with NT clear");
        assert_eq!(machine.word(TSS2 + 0x20, 4), ENTRY + 1);
    }
}

#[test]
fn interrupts_through_task_gates() {
    let mut machine = machine();
    machine.idt(GP, gate(5, 0, sel::TSS2, 0, 0));
    machine.set(reg::RAX, u64::from(sel::OUTSIDE));
    assert_eq!(machine.run(&[0x8e, 0xd8]), Exit::Hlt);
    assert_eq!((machine.cpu.state.rip, machine.top(0, 4)), (ENTRY, u64::from(sel::OUTSIDE)));
    assert_eq!(machine.reg(reg::RSP), NEW_STACK - 4);
    assert_eq!(machine.word(TSS + 0x20, 4), CODE0);
    assert_ne!(machine.word(TSS + 0x24, 4) & Rflags::RF.bits(), 0);
    assert!(machine.cpu.state.flag(Rflags::NT));
}

#[test]
fn sixteen_bit_tasks() {
    let mut machine = machine();
    machine.gdt(sel::GATE, descriptor(TSS2, 0x2b, 0x81, 0));
    machine.put(TSS2, &[0; 0x68]);
    machine.put(0x7000, &[0xf4]);
    for (n, value) in [0x7000, 2, 1, 2, 3, 4, 0x6000, 6, 7, 8].iter().enumerate() {
        machine.put_word(TSS2 + 0xe + 2 * n as u64, 2, *value);
    }
    for (n, selector) in [sel::DATA0, sel::CODE0_16, sel::DATA0, sel::DATA0].iter().enumerate() {
        machine.put_word(TSS2 + 0x22 + 2 * n as u64, 2, u64::from(*selector));
    }
    assert_eq!(machine.run(&jump(sel::GATE)), Exit::Hlt);
    assert_eq!(machine.cpu.state.regs[..8], [1, 2, 3, 4, 0x6000, 6, 7, 8]);
    assert_eq!((machine.cpu.state.rip, machine.selector(Seg::Cs)), (0x7000, sel::CODE0_16));
    assert!(machine.cpu.state.segs[Seg::Fs as usize].unusable());
}

#[test]
fn switches_refused_in_the_old_task() {
    let e = |selector: u16| Some(u64::from(selector & !3));
    let absent = 1 << 47;
    // (TSS2 descriptor, gate, ring, target, fault)
    let tss = descriptor(TSS2, 0x67, 0x89, 0);
    let task_gate = gate(5, 0, sel::TSS2, 0, 0);
    let table = [
        (tss | (2 << 40), task_gate, 0, sel::TSS2, (GP, e(sel::TSS2))),
        (tss & !absent, task_gate, 0, sel::TSS2, (NP, e(sel::TSS2))),
        (descriptor(TSS2, 0x66, 0x89, 0), task_gate, 0, sel::TSS2, (TS, e(sel::TSS2))),
        (tss, task_gate, 3, sel::TSS2, (GP, e(sel::TSS2))),
        (tss, task_gate, 0, sel::TSS2 | 3, (GP, e(sel::TSS2))),
        (tss, task_gate, 3, sel::GATE, (GP, e(sel::GATE))),
        (tss, task_gate & !absent, 0, sel::GATE, (NP, e(sel::GATE))),
        (tss | (2 << 40), task_gate, 0, sel::GATE, (GP, e(sel::TSS2))),
        (tss & !absent, task_gate, 0, sel::GATE, (NP, e(sel::TSS2))),
        (tss, gate(5, 0, sel::TSS2 | 4, 0, 0), 0, sel::GATE, (GP, e(sel::TSS2 | 4))),
        (tss, gate(5, 0, sel::OUTSIDE, 0, 0), 0, sel::GATE, (GP, e(sel::OUTSIDE))),
    ];
    for (tss, task_gate, ring, target, expected) in table {
        for code in [jump(target), call(target)] {
            let mut machine = machine();
            machine.gdt(sel::TSS2, tss);
            machine.gdt(sel::GATE, task_gate);
            machine.set_ring(ring);
            assert_eq!(machine.fault(&code), expected, "{tss:x} {task_gate:x} {ring} {target:x}");
            assert_eq!(machine.cpu.state.tr.selector, sel::TSS);
        }
    }
    // IRET to a task that is not busy.
    let mut machine = machine();
    machine.put_word(TSS, 2, u64::from(sel::TSS2));
    machine.cpu.state.rflags_system |= Rflags::NT.bits();
    assert_eq!(machine.fault(&[0xcf]), (TS, e(sel::TSS2)));
}

#[test]
fn faults_in_the_new_task() {
    let e = |selector: u16| u64::from(selector & !3);
    // (TSS offset, value, fault)
    let table = [
        (0x60, u64::from(sel::DATA0), (TS, e(sel::DATA0))),
        (0x60, u64::from(sel::OUTSIDE), (TS, e(sel::OUTSIDE))),
        (0x4c, 0, (TS, 0)),
        (0x4c, u64::from(sel::DATA0), (TS, e(sel::DATA0))),
        (0x4c, u64::from(sel::ABSENT_CODE0), (NP, e(sel::ABSENT_CODE0))),
        (0x4c, u64::from(sel::CODE0 | 3), (TS, e(sel::CODE0))),
        (0x50, 0, (TS, 0)),
        (0x50, u64::from(sel::DATA3), (TS, e(sel::DATA3))),
        (0x50, u64::from(sel::READ_ONLY0), (TS, e(sel::READ_ONLY0))),
        (0x50, u64::from(sel::ABSENT_DATA0), (SS, e(sel::ABSENT_DATA0))),
        (0x54, u64::from(sel::ABSENT_DATA0), (NP, e(sel::ABSENT_DATA0))),
        (0x54, u64::from(sel::DATA0 | 3), (TS, e(sel::DATA0))),
        (0x54, u64::from(sel::EXECUTE_ONLY0), (TS, e(sel::EXECUTE_ONLY0))),
    ];
    for (offset, value, (vector, error)) in table {
        let mut machine = machine();
        machine.put_word(TSS2 + offset, 4, value);
        // Handlers that need nothing of the broken task: tasks themselves.
        machine.gdt(sel::GATE, descriptor(DATA, 0x67, 0x89, 0));
        for n in (0x1c..0x68).step_by(4) {
            let word = machine.word(TSS2 + n, 4);
            machine.put_word(DATA + n, 4, word);
        }
        machine.put_word(
            DATA + offset,
            4,
            match offset {
                0x60 => 0,
                0x4c => u64::from(sel::CODE0),
                _ => u64::from(sel::DATA0),
            },
        );
        machine.idt(vector, gate(5, 0, sel::GATE, 0, 0));
        assert_eq!(machine.run(&jump(sel::TSS2)), Exit::Hlt, "{offset:x} {value:x}");
        assert_eq!(machine.cpu.state.tr.selector, sel::GATE, "{offset:x} {value:x}");
        assert_eq!(machine.top(0, 4), error, "{offset:x} {value:x}");
        assert_eq!(machine.word(TSS2 + 0x20, 4), ENTRY, "the new task goes on at its entry");
        assert_eq!(machine.word(DATA, 2), u64::from(sel::TSS2));
    }
}

#[test]
fn the_debug_trap_bit_traps_before_the_first_instruction() {
    let mut machine = machine();
    machine.put_word(TSS2 + 0x64, 2, 1);
    assert_eq!(machine.run(&jump(sel::TSS2)), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(0, 4)), (Some(DB), ENTRY));
    assert_eq!(machine.cpu.state.dr6, 0xffff_8ff0);
}

#[test]
fn a_task_may_be_a_virtual_8086_program() {
    let mut machine = machine();
    machine.put_word(TSS2 + 0x24, 4, 2 | Rflags::VM.bits() | Rflags::IOPL.bits());
    machine.put_word(TSS2 + 0x20, 4, 0x10);
    machine.put_word(TSS2 + 0x4c, 4, DATA >> 4);
    machine.cpu.controls.exception_bitmap = !0;
    machine.put(DATA + 0x10, &[0xf4]);
    assert_eq!(machine.run(&jump(sel::TSS2)), Exit::Exception(Exception::gp(0)));
    let state = &machine.cpu.state;
    assert!(state.v8086() && state.cpl == 3);
    assert_eq!(state.segs[1], Segment::v8086((DATA >> 4) as u16));
}

#[test]
fn a_double_fault_task() {
    let mut machine = machine();
    machine.idt(8, gate(5, 0, sel::TSS2, 0, 0));
    machine.idt(GP, 0);
    machine.cpu.deliver(Event::Exception(Exception::gp(0))).unwrap();
    assert_eq!((machine.cpu.state.tr.selector, machine.top(0, 4)), (sel::TSS2, 0));
}
