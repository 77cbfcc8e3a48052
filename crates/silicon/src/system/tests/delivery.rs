//! Delivery through the IDT: frames, stacks, error codes, combinations of faults.

use super::*;
use crate::cpu::Requests;
use crate::exception::{Exception, vector::*};
use crate::flags::Rflags;
use crate::state::interruptibility;
use crate::system::deliver::Event;
use crate::vmx::Injection;

const UD2: &[u8] = &[0x0f, 0x0b];
const INT_40: &[u8] = &[0xcd, 0x40];

/// A machine whose gate 0x40 is `low`, and whose IF is set.
fn with_gate(mode: Mode, low: u64) -> Machine {
    let mut machine = Machine::new(mode);
    machine.idt(0x40, low);
    machine.cpu.state.rflags_system |= Rflags::IF.bits();
    machine
}

#[test]
fn frames_of_every_gate_size_and_privilege() {
    // (mode, gate kind, handler, from ring, words pushed, word size, IF after)
    let table = [
        (Mode::Protected, 14, sel::CODE0, 0, 3, 4, false),
        (Mode::Protected, 15, sel::CODE0, 0, 3, 4, true),
        (Mode::Protected, 6, sel::CODE0, 0, 3, 2, false),
        (Mode::Protected, 7, sel::CODE0, 0, 3, 2, true),
        (Mode::Protected, 14, sel::CODE0, 3, 5, 4, false),
        (Mode::Protected, 6, sel::CODE0, 3, 5, 2, false),
        (Mode::Long, 14, sel::CODE0_64, 0, 5, 8, false),
        (Mode::Long, 15, sel::CODE0_64, 3, 5, 8, true),
    ];
    for (mode, kind, handler, ring, words, size, enabled) in table {
        let case = format!("{mode:?} gate {kind} ring {ring}");
        // Handlers of 16-bit gates lie in the first 64 KiB.
        let offset = if kind < 8 { 0x7000 } else { Machine::handler(0x40) };
        let mut machine = with_gate(mode, gate(kind, 3, handler, offset, 0));
        machine.put(0x7000, &[0xf4]);
        machine.set_ring(ring);
        let before = machine.cpu.state.clone();
        assert_eq!(machine.run(INT_40), Exit::Hlt, "{case}");
        let state = &machine.cpu.state;
        assert_eq!(state.rip, offset, "{case}");
        assert_eq!(state.cpl, 0, "{case}");
        assert_eq!(machine.selector(Seg::Cs), handler, "{case}");
        assert_eq!(state.flag(Rflags::IF), enabled, "{case}");
        let start = if ring == 3 { TSS_STACK } else { STACK0 };
        assert_eq!(machine.reg(reg::RSP), start - words * size as u64, "{case}");
        assert_eq!(machine.top(0, size), (before.rip + 2) & (!0 >> (64 - 8 * size)), "{case}");
        let cs = u64::from(before.segs[1].selector);
        assert_eq!(machine.top(1, size), cs, "{case}");
        assert_eq!(machine.top(2, size), before.rflags(), "{case}");
        if words == 5 {
            let mask = !0 >> (64 - 8 * size);
            assert_eq!(machine.top(3, size), before.regs[4] & mask, "{case}");
            assert_eq!(machine.top(4, size), u64::from(before.segs[2].selector), "{case}");
        }
        let ss = match (mode, ring) {
            (Mode::Long, 3) => 0,
            _ => sel::DATA0,
        };
        assert_eq!(machine.selector(Seg::Ss), ss, "{case}");
        assert_eq!(machine.cpu.counters.exceptions + machine.cpu.counters.interrupts, 0);
    }
}

#[test]
fn sixty_four_bit_stacks_are_aligned_and_ist_is_used() {
    for (ist, start) in [(0, STACK0 - 16), (1, IST1)] {
        let mut machine = with_gate(Mode::Long, gate(14, 0, sel::CODE0_64, Machine::handler(0x40), ist));
        machine.set(reg::RSP, STACK0 - 7);
        assert_eq!(machine.run(INT_40), Exit::Hlt);
        assert_eq!(machine.reg(reg::RSP), start - 40, "ist {ist}");
        assert_eq!(machine.top(3, 8), STACK0 - 7);
        assert_eq!(machine.selector(Seg::Ss), sel::DATA0, "no change of level: SS stays");
    }
}

#[test]
fn real_mode_pushes_six_bytes() {
    let mut machine = Machine::new(Mode::Real);
    machine.cpu.state.rflags_system |= (Rflags::IF | Rflags::TF | Rflags::AC).bits();
    machine.cpu.state.rflags_system &= !Rflags::TF.bits();
    let flags = machine.cpu.state.rflags();
    assert_eq!(machine.run(INT_40), Exit::Hlt);
    assert_eq!(machine.vector(), Some(0x40));
    assert_eq!(machine.reg(reg::RSP), 0x8000 - 6);
    assert_eq!((machine.top(0, 2), machine.top(1, 2), machine.top(2, 2)), (2, CODE0 >> 4, flags & 0xffff));
    assert!(!machine.cpu.state.flag(Rflags::IF | Rflags::AC));
    // A vector beyond the table: #GP, and if that is beyond it too, shutdown.
    let mut machine = Machine::new(Mode::Real);
    machine.cpu.state.idtr.limit = 4 * 0x40 - 1;
    assert_eq!(machine.fault(INT_40), (GP, None));
    machine.cpu.state.idtr.limit = 3;
    assert_eq!(machine.run(&[]), Exit::Hlt);
    let mut machine = Machine::new(Mode::Real);
    machine.cpu.state.idtr.limit = 3;
    assert_eq!(machine.run(INT_40), Exit::TripleFault);
}

#[test]
fn gates_that_cannot_be_used() {
    let idt_code = Some((0x40 << 3) | 2);
    let e = |selector: u16| Some(u64::from(selector & !3));
    let handler = Machine::handler(0x40);
    let absent = 1 << 47;
    // (mode, gate, ring, fault of INT 0x40)
    let table = [
        (Mode::Protected, gate(14, 0, sel::CODE0, handler, 0), 3, (GP, idt_code)),
        (Mode::Protected, gate(14, 3, sel::CODE0, handler, 0) & !absent, 3, (NP, idt_code)),
        (Mode::Protected, gate(12, 3, sel::CODE0, handler, 0), 0, (GP, idt_code)),
        (Mode::Long, gate(6, 3, sel::CODE0_64, handler, 0), 0, (GP, idt_code)),
        (Mode::Long, gate(5, 3, sel::TSS2, handler, 0), 0, (GP, idt_code)),
        (Mode::Protected, gate(14, 3, 0, handler, 0), 0, (GP, Some(0))),
        (Mode::Protected, gate(14, 3, sel::OUTSIDE, handler, 0), 0, (GP, e(sel::OUTSIDE))),
        (Mode::Protected, gate(14, 3, sel::DATA0, handler, 0), 0, (GP, e(sel::DATA0))),
        (Mode::Protected, gate(14, 3, sel::CODE3, handler, 0), 0, (GP, e(sel::CODE3))),
        (Mode::Protected, gate(14, 3, sel::ABSENT_CODE0, handler, 0), 0, (NP, e(sel::ABSENT_CODE0))),
        (Mode::Long, gate(14, 3, sel::CODE0, handler, 0), 0, (GP, e(sel::CODE0))),
        (Mode::Protected, gate(14, 3, sel::CODE0_16, 0x1_0000, 0), 0, (GP, Some(0))),
    ];
    for (mode, low, ring, expected) in table {
        let mut machine = with_gate(mode, low);
        machine.set_ring(ring);
        assert_eq!(machine.fault(INT_40), expected, "{mode:?} {low:x} ring {ring}");
    }
    // Non-canonical handler.
    let mut machine = with_gate(Mode::Long, gate(14, 3, sel::CODE0_64, handler, 0));
    machine.put_word(IDT + 16 * 0x40 + 8, 8, 0x8000);
    assert_eq!(machine.fault(INT_40), (GP, Some(0)));
    // Beyond the limit.
    for mode in [Mode::Protected, Mode::Long] {
        let mut machine = Machine::new(mode);
        machine.cpu.state.idtr.limit = if mode == Mode::Long { 0x40f - 1 } else { 0x207 - 1 };
        assert_eq!(machine.fault(INT_40), (GP, idt_code));
    }
}

#[test]
fn inner_stacks_that_cannot_be_used() {
    let e = |selector: u16| Some(u64::from(selector & !3));
    // (SS0, ESP0, TSS limit, fault of INT 0x40 at level 3, or of the #TS or #SS that it meets)
    let table = [
        (0, TSS_STACK, 0x67, (TS, Some(0))),
        (sel::OUTSIDE, TSS_STACK, 0x67, (TS, e(sel::OUTSIDE))),
        (sel::DATA3, TSS_STACK, 0x67, (TS, e(sel::DATA3))),
        (sel::READ_ONLY0, TSS_STACK, 0x67, (TS, e(sel::READ_ONLY0))),
        (sel::ABSENT_DATA0, TSS_STACK, 0x67, (SS, e(sel::ABSENT_DATA0))),
        (sel::DATA0_16, 8, 0x67, (SS, e(sel::DATA0_16))),
        (sel::DATA0, TSS_STACK, 8, (TS, e(sel::TSS))),
    ];
    for (ss, esp, limit, expected) in table {
        let mut machine = with_gate(Mode::Protected, gate(14, 3, sel::CODE0, Machine::handler(0x40), 0));
        // The stack fault itself is handled by a task-free gate at level 3 in conforming code.
        for vector in [TS, SS, GP] {
            machine.idt(vector, gate(14, 0, sel::CONFORMING0, Machine::handler(vector), 0));
        }
        if ss == sel::DATA0_16 {
            machine.gdt(sel::DATA0_16, descriptor(0, 0xfff, 0x97, 0));
        }
        machine.put_word(TSS + 4, 4, esp);
        machine.put_word(TSS + 8, 4, u64::from(ss));
        machine.cpu.state.tr.limit = limit;
        machine.set_ring(3);
        // HLT in the handler at level 3 is #GP, whose handler's HLT is #GP again: stop at the first.
        machine.cpu.controls.exception_bitmap = 1 << GP;
        let at = machine.cpu.state.rip;
        let exit = machine.run(INT_40);
        assert_eq!(exit, Exit::Exception(Exception::gp(0)), "{ss:#x}");
        assert_eq!((machine.vector(), Some(machine.top(0, 4))), (Some(expected.0), expected.1), "{ss:#x}");
        assert_eq!(machine.top(1, 4), at);
        assert_eq!(machine.reg(reg::RSP), STACK3 - 16);
    }
}

#[test]
fn error_codes_have_ext_for_events_from_outside() {
    for mode in [Mode::Protected, Mode::Long] {
        let size = if mode == Mode::Long { 8 } else { 4 };
        let idt_ext = (0x40 << 3) | 3;
        // External interrupt through a gate that is absent.
        let mut machine = Machine::new(mode);
        machine.idt(0x40, 0);
        machine.cpu.injection = Some(Injection::Interrupt(0x40));
        assert_eq!(machine.run(&[]), Exit::Hlt);
        assert_eq!((machine.vector(), machine.top(0, size)), (Some(GP), idt_ext));
        assert_eq!(machine.top(1, size), CODE0);
        // #UD through a gate to an absent segment.
        let mut machine = Machine::new(mode);
        machine.idt(UD, gate(14, 0, sel::OUTSIDE, 0, 0));
        assert_eq!(machine.run(UD2), Exit::Hlt);
        assert_eq!((machine.vector(), machine.top(0, size)), (Some(GP), u64::from(sel::OUTSIDE) | 1));
        // INT1 counts as external.
        let mut machine = Machine::new(mode);
        machine.idt(DB, 0);
        assert_eq!(machine.fault(&[0xf1]), (GP, Some((1 << 3) | 3)));
    }
}

#[test]
fn software_interrupts_and_their_gates() {
    // (code, vector, privileged gate reachable from level 3)
    let table: [(&[u8], u8, bool); 3] = [(&[0xcc], BP, false), (&[0xce], OF, false), (&[0xf1], DB, true)];
    for (code, vector, reachable) in table {
        for dpl in [0, 3] {
            let mut machine = Machine::new(Mode::Protected);
            machine.idt(vector, gate(15, dpl, sel::CODE0, Machine::handler(vector), 0));
            machine.set_ring(3);
            machine.cpu.state.status = crate::flags::Status::from_rflags(Rflags::OF.bits());
            let next = machine.cpu.state.rip + 1;
            assert_eq!(machine.run(code), Exit::Hlt);
            if dpl == 3 || reachable {
                assert_eq!((machine.vector(), machine.top(0, 4)), (Some(vector), next), "{code:x?}");
            } else {
                assert_eq!(machine.vector(), Some(GP));
                assert_eq!(machine.top(0, 4), (u64::from(vector) << 3) | 2);
                assert_eq!(machine.top(1, 4), next - 1);
            }
        }
    }
    // INTO without OF does nothing.
    Machine::new(Mode::Protected).finish(&[0xce]);
}

#[test]
fn faults_in_delivery_combine() {
    // Handlers removed, event, and where it ends: the vector and its error code, or shutdown.
    type Case = (&'static [u8], Event, Option<(u8, u64)>);
    let gp = Event::Exception(Exception::gp(0));
    let pf = Event::Exception(Exception::pf(0x1234, 2));
    let table: &[Case] = &[
        (&[0x40], Event::Interrupt(0x40), Some((GP, 0x203))),
        (&[UD], Event::Exception(Exception::UD), Some((GP, 0x33))),
        (&[UD, GP], Event::Exception(Exception::UD), Some((DF, 0))),
        (&[GP], gp, Some((DF, 0))),
        (&[GP, DF], gp, None),
        (&[PF], pf, Some((DF, 0))),
        (&[PF, DF], pf, None),
        (&[DF], Event::Exception(Exception::DF), None),
        (&[NMI], Event::Nmi, Some((GP, 0x13))),
        (&[AC], Event::Exception(Exception::AC), Some((GP, 0x8b))),
    ];
    for (removed, event, expected) in table {
        let mut machine = Machine::new(Mode::Long);
        for vector in *removed {
            machine.idt(*vector, 0);
        }
        let result = machine.cpu.deliver(*event);
        let delivered = result.ok().map(|()| (machine.vector().unwrap(), machine.top(0, 8)));
        assert_eq!(delivered, *expected, "{removed:?} {event:?}");
    }
}

#[test]
fn page_faults_in_delivery() {
    // The stack is not mapped: #PF from the push, whose own delivery meets the same, hence #DF (on its IST).
    let mut machine = Machine::new(Mode::Long);
    machine.unmap(STACK0 - 8);
    machine.idt(DF, gate(14, 0, sel::CODE0_64, Machine::handler(DF), 1));
    let before = machine.cpu.state.rip;
    assert_eq!(machine.run(UD2), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(0, 8)), (Some(DF), 0));
    assert_eq!((machine.top(1, 8), machine.top(4, 8)), (before, STACK0));
    assert_eq!(machine.cpu.state.cr2, STACK0 - 8);
    // #PF on an IST of its own: delivered serially, and the error code is a supervisor's write.
    let mut machine = Machine::new(Mode::Long);
    machine.unmap(STACK0 - 8);
    machine.idt(PF, gate(14, 0, sel::CODE0_64, Machine::handler(PF), 1));
    assert_eq!(machine.run(UD2), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(0, 8), machine.top(4, 8)), (Some(PF), 2, STACK0));
}

#[test]
fn a_frame_that_crosses_into_an_unmapped_page_changes_nothing() {
    let mut machine = Machine::new(Mode::Long);
    machine.set(reg::RSP, STACK0 + 0x10);
    machine.unmap(STACK0 - 8);
    machine.idt(PF, gate(14, 0, sel::CODE0_64, Machine::handler(PF), 1));
    let flags = machine.cpu.state.rflags();
    assert_eq!(machine.run(INT_40), Exit::Hlt);
    assert_eq!((machine.vector(), machine.cpu.state.cr2), (Some(PF), STACK0 - 8));
    assert_eq!((machine.top(1, 8), machine.top(4, 8)), (CODE0, STACK0 + 0x10));
    assert_eq!(machine.top(3, 8), flags | Rflags::RF.bits());
}

#[test]
fn system_stacks_are_supervisor_accesses() {
    let mut machine = Machine::new(Mode::Long);
    for page in [TSS_STACK - 8, TSS, GDT, IDT + 16 * 0x40] {
        machine.supervisor(page);
    }
    machine.idt(0x40, gate(14, 3, sel::CODE0_64, Machine::handler(0x40), 0));
    machine.set_ring(3);
    assert_eq!(machine.run(INT_40), Exit::Hlt);
    assert_eq!((machine.vector(), machine.reg(reg::RSP)), (Some(0x40), TSS_STACK - 40));
}

#[test]
fn non_canonical_stacks_are_stack_faults() {
    let mut machine = Machine::new(Mode::Long);
    machine.idt(SS, gate(14, 0, sel::CODE0_64, Machine::handler(SS), 1));
    machine.set(reg::RSP, 0x8000_0000_0000_0000);
    assert_eq!(machine.run(INT_40), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(0, 8)), (Some(SS), 0));
    let mut machine = Machine::new(Mode::Long);
    machine.idt(SS, gate(14, 0, sel::CODE0_64, Machine::handler(SS), 1));
    machine.set(reg::RSP, 0x8000_0000_0000_0000);
    assert_eq!(machine.run(UD2), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(0, 8)), (Some(SS), 1), "EXT");
}

#[test]
fn flags_images_have_rf_for_faults_alone() {
    let rf = Rflags::RF.bits();
    let cases = [
        (Event::Exception(Exception::UD), rf),
        (Event::Exception(Exception::pf(0, 0)), rf),
        (Event::Exception(Exception::db(1)), 0),
        (Event::Exception(Exception::db(1 << 13)), rf),
        (Event::Exception(Exception::db(1 << 14)), 0),
        (Event::Injected(Exception::UD), 0),
        (Event::Interrupt(0x40), 0),
        (Event::Nmi, 0),
        (Event::Exception(Exception::DF), 0),
    ];
    for (event, expected) in cases {
        let mut machine = Machine::new(Mode::Long);
        let code = event.vector() as usize;
        let has_code = usize::from(matches!(code, 8 | 10..=14 | 17) && event != Event::Interrupt(0x40));
        machine.cpu.deliver(event).unwrap();
        assert_eq!(machine.top(2 + has_code, 8) & rf, expected, "{event:?}");
        assert!(!machine.cpu.state.flag(Rflags::RF));
    }
}

#[test]
fn payloads_are_recorded_on_delivery_only() {
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.state.dr7 |= 1 << 13;
    machine.cpu.state.dr6 |= 5;
    machine.cpu.deliver(Event::Exception(Exception::db(1 << 14 | 2))).unwrap();
    assert_eq!((machine.cpu.state.dr6, machine.cpu.state.dr7), (0xffff_4ff2, 0x400));
    machine.cpu.deliver(Event::Exception(Exception::pf(0x1000, 0))).unwrap();
    assert_eq!(machine.cpu.state.cr2, 0x1000);
    machine.cpu.deliver(Event::Injected(Exception::pf(0x2000, 0))).unwrap();
    assert_eq!(machine.cpu.state.cr2, 0x1000);
    assert_eq!(machine.cpu.counters.exceptions, 3);
    // An exception that exits records nothing.
    machine.cpu.controls.exception_bitmap = 1 << PF;
    machine.set_ring(0);
    machine.unmap(DATA);
    // mov eax, [DATA]
    let code = [&[0x8b, 0x04, 0x25][..], &(DATA as u32).to_le_bytes()].concat();
    assert_eq!(machine.run(&code), Exit::Exception(Exception::pf(DATA, 0)));
    assert_eq!((machine.cpu.state.cr2, machine.cpu.state.rip), (0x1000, CODE0));
    assert_eq!(machine.cpu.idt_vectoring, None);
}

#[test]
fn exceptions_in_delivery_exit_with_the_vectoring_event() {
    let mut machine = Machine::new(Mode::Long);
    machine.idt(UD, 0);
    machine.cpu.controls.exception_bitmap = 1 << GP;
    assert_eq!(machine.run(UD2), Exit::Exception(Exception::gp((6 << 3) | 3)));
    assert_eq!(machine.cpu.idt_vectoring, Some(Event::Exception(Exception::UD)));
    assert_eq!(machine.cpu.state.rip, CODE0);
    // Of an instruction's own delivery too.
    let mut machine = Machine::new(Mode::Long);
    machine.idt(0x40, 0);
    machine.cpu.controls.exception_bitmap = 1 << GP;
    assert_eq!(machine.run(INT_40), Exit::Exception(Exception::gp((0x40 << 3) | 2)));
    assert_eq!(machine.cpu.idt_vectoring, Some(Event::Software { vector: 0x40, next_ip: CODE0 + 2 }));
    // #DF by its own bit.
    let mut machine = Machine::new(Mode::Long);
    machine.idt(GP, 0);
    machine.cpu.controls.exception_bitmap = 1 << DF;
    machine.set(reg::RAX, u64::from(sel::OUTSIDE));
    assert_eq!(machine.run(&[0x8e, 0xd8]), Exit::Exception(Exception::DF));
}

#[test]
fn a_stack_in_mmio_is_a_failure_not_a_panic() {
    for (event, code) in [(None, UD2), (Some(Injection::Interrupt(0x40)), UD2)] {
        let mut machine = Machine::new(Mode::Protected);
        machine.set(reg::RSP, 0xfee0_1000);
        machine.cpu.injection = event;
        assert_eq!(machine.run(code), Exit::FetchFailed { gpa: 0xfee0_0ffc });
        assert!(machine.cpu.idt_vectoring.is_some());
        assert_eq!(machine.cpu.state.rip, CODE0);
    }
}

#[test]
fn shadows_and_nmi_blocking() {
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.state.interruptibility = interruptibility::STI;
    machine.cpu.deliver(Event::Nmi).unwrap();
    assert_eq!(machine.cpu.state.interruptibility, interruptibility::NMI);
    assert!(!machine.cpu.nmi_allowed());
    // IRET ends the blocking, even one that faults.
    machine.put(Machine::handler(NMI), &[0x48, 0xcf, 0xf4]);
    assert_eq!(machine.run_here(), Exit::Hlt);
    assert!(machine.cpu.nmi_allowed());
    assert_eq!(machine.cpu.state.rip, CODE0);
    machine.cpu.deliver(Event::Nmi).unwrap();
    machine.put_word(machine.reg(reg::RSP) + 8, 8, u64::from(sel::OUTSIDE));
    assert_eq!(machine.run_here(), Exit::Hlt);
    assert_eq!((machine.vector(), machine.cpu.nmi_allowed()), (Some(GP), true));
}

impl Machine {
    /// Runs what is at RIP, with a HLT at level 0's code.
    fn run_here(&mut self) -> Exit {
        self.put(CODE0, &[0xf4]);
        self.cpu.run()
    }
}

#[test]
fn software_injection_returns_past_the_instruction() {
    let mut machine = Machine::new(Mode::Long);
    machine.idt(BP, gate(15, 3, sel::CODE0_64, Machine::handler(BP), 0));
    machine.set_ring(3);
    machine.cpu.injection = Some(Injection::Software { vector: BP, length: 1 });
    assert_eq!(machine.run(&[0xcc]), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(0, 8)), (Some(BP), CODE3 + 1));
}

#[test]
fn intercepted_software_exceptions_stay_at_the_instruction() {
    for (code, vector) in [(0xcc_u8, BP), (0xf1, DB)] {
        let mut machine = Machine::new(Mode::Long);
        machine.cpu.controls.exception_bitmap = 1 << vector;
        let exit = machine.run(&[code]);
        assert_eq!(exit, Exit::Exception(Exception { vector, error_code: None, payload: 0 }));
        assert_eq!((machine.cpu.state.rip, machine.cpu.exit_instruction_length), (CODE0, 1));
    }
}

/// Found by random guests: on a real processor this takes the core out of service until a hypervisor's intercept
/// of #AC ends it.
#[test]
fn a_kick_ends_alignment_faults_that_their_own_delivery_causes_again() {
    let mut machine = Machine::new(Mode::Protected);
    machine.idt(AC, gate(14, 0, sel::CODE3, Machine::handler(AC), 0));
    machine.set_ring(3);
    machine.cpu.state.cr0 |= cr0::AM;
    machine.cpu.state.rflags_system |= Rflags::AC.bits();
    machine.cpu.state.regs[usize::from(reg::RSP)] -= 1;
    let requests = machine.cpu.requests.clone();
    let kicker = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(5));
        requests.post(Requests::KICK);
    });
    assert_eq!(machine.run(&[0x50]), Exit::ExternalInterrupt); // push eax
    assert_eq!(machine.cpu.state.rip, machine.code());
    kicker.join().unwrap();
}
