//! The notify VM exit, by the numbers of its test plan (V2 to V12).

use super::*;
use crate::cpu::Requests;
use crate::exception::{Exception, vector};
use crate::flags::Rflags;
use crate::state::interruptibility;
use crate::system::deliver::Event;
use crate::system::window::{HOST_LIMIT, Stall, StallSite};
use crate::vmx::{Injection, NOTIFY_WINDOW, Notify};

const THRESHOLD: u32 = 100;
const WINDOW: u32 = 50;
/// The count at the exit: the first tick beyond the limit.
const LIMIT: u64 = (THRESHOLD + WINDOW) as u64 + 1;
const EXIT: Exit = Exit::Notify(Notify { context_invalid: false, nmi_unblocking: false, ticks: LIMIT });
const PUSH: &[u8] = &[0x50];
const STORE: &[u8] = &[0x48, 0x89, 0x03]; // mov [rbx], rax

fn arm(machine: &mut Machine) {
    machine.cpu.event_window.threshold = Some(THRESHOLD);
    machine.cpu.controls.notify_exiting = true;
    machine.cpu.controls.notify_window = WINDOW;
}

/// A level 3 program with alignment checking whose #AC handler has the same odd stack.
fn ac_loop() -> Machine {
    let mut machine = Machine::new(Mode::Protected);
    machine.idt(vector::AC, gate(14, 0, sel::CODE3, Machine::handler(vector::AC), 0));
    machine.set_ring(3);
    machine.cpu.state.cr0 |= cr0::AM;
    machine.cpu.state.rflags_system |= (Rflags::AC | Rflags::IF).bits();
    machine.set(reg::RSP, STACK3 - 1);
    arm(&mut machine);
    machine
}

/// A data breakpoint on the interrupt stack that #DB itself uses.
fn db_loop() -> Machine {
    let mut machine = Machine::new(Mode::Long);
    machine.idt(vector::DB, gate(14, 0, sel::CODE0_64, Machine::handler(vector::DB), 1));
    machine.cpu.state.rflags_system |= Rflags::IF.bits();
    machine.cpu.state.dr[0] = IST1 - 8;
    machine.cpu.state.dr7 = 0x402 | 1 << 16 | 2 << 18;
    machine.set(reg::RBX, IST1 - 8);
    arm(&mut machine);
    machine
}

/// Injects again what the last exit interrupted, as hypervisors do.
fn reinject(machine: &mut Machine) {
    machine.cpu.injection = machine.cpu.idt_vectoring.take().map(|event| match event {
        Event::Exception(e) | Event::Injected(e) => Injection::Exception(e),
        Event::Interrupt(vector) => Injection::Interrupt(vector),
        Event::Nmi => Injection::Nmi,
        Event::Software { vector, .. } => {
            Injection::Software { vector, length: machine.cpu.exit_instruction_length }
        }
        Event::Int1 { .. } => panic!("INT1 is executed again"),
    });
}

/// Goes on after exits that are the host's alone.
fn past_the_host(machine: &mut Machine, mut exit: Exit) -> Exit {
    while exit == Exit::ExternalInterrupt {
        reinject(machine);
        exit = machine.cpu.run();
    }
    exit
}

#[test]
fn v2_the_window_field_keeps_32_bits() {
    let mut machine = Machine::new(Mode::Long);
    let controls = &mut machine.cpu.controls;
    for value in [0, 1, 0xffff_ffff] {
        assert!(controls.write_field(NOTIFY_WINDOW, value | 0xdead << 32));
        assert_eq!((controls.read_field(NOTIFY_WINDOW), controls.notify_window), (Some(value), value as u32));
    }
    assert_eq!((controls.write_field(0x4022, 1), controls.read_field(0x4022)), (false, None));
}

#[test]
fn v3_alignment_faults_for_ever() {
    let mut machine = ac_loop();
    let registers = machine.cpu.state.regs;
    for _ in 0..3 {
        assert_eq!(machine.run(PUSH), EXIT);
        assert_eq!((EXIT.reason(), machine.cpu.state.rip), (75, CODE3));
        assert_eq!(machine.cpu.idt_vectoring, Some(Event::Exception(Exception::AC)));
        assert_eq!(machine.cpu.state.regs[..16], registers[..16], "nothing has moved");
        assert_ne!(machine.cpu.state.rflags_system & Rflags::RF.bits(), 0, "as the frame would have it");
    }
    // As an injected event it loops all the same.
    reinject(&mut machine);
    assert_eq!(machine.cpu.run(), EXIT);
    assert_eq!(machine.cpu.idt_vectoring, Some(Event::Exception(Exception::AC)));
}

#[test]
fn v4_debug_traps_on_their_own_interrupt_stack() {
    let mut machine = db_loop();
    assert_eq!(machine.run(STORE), EXIT);
    for _ in 0..3 {
        let Some(Event::Exception(exception)) = machine.cpu.idt_vectoring else { panic!("no event") };
        assert_eq!((exception.vector, machine.cpu.state.rip), (vector::DB, Machine::handler(vector::DB)));
        assert_eq!(machine.cpu.state.dr6 & 0xf, 1, "its delivery had begun");
        reinject(&mut machine);
        assert_eq!(machine.cpu.run(), EXIT);
    }
}

/// Without an interrupt stack the stack pointer moves on, until it leaves the breakpoint behind.
#[test]
fn debug_traps_come_before_the_handlers_first_instruction() {
    let mut machine = db_loop();
    machine.idt(vector::DB, gate(14, 0, sel::CODE0_64, Machine::handler(vector::DB), 0));
    machine.cpu.state.dr[0] = STACK0 - 0x28;
    machine.set(reg::RBX, STACK0 - 0x28);
    assert_eq!(machine.run(STORE), Exit::Hlt);
    // The frame of the store's trap, whose last word hits the breakpoint, and below it the frame of that trap.
    assert_eq!(machine.reg(reg::RSP), STACK0 - 0x30 - 0x28);
    assert_eq!((machine.vector(), machine.top(0, 8)), (Some(vector::DB), Machine::handler(vector::DB)));
    assert_eq!(machine.cpu.event_window.ticks(), 0);
}

/// Pending interrupts and NMIs ask for a window; there is none before the hypervisor has seen to the stack.
fn v5(mut machine: Machine, code: &[u8], fix: impl Fn(&mut Machine)) {
    machine.cpu.controls.nmi_window_exiting = true;
    let at = machine.code();
    machine.put(at, code);
    // The window before the first instruction is none of the loop's.
    assert_eq!(machine.cpu.run(), Exit::NmiWindow);
    machine.cpu.controls.nmi_window_exiting = false;
    machine.cpu.controls.instruction_limit = u64::MAX;
    assert_eq!(machine.cpu.run(), EXIT);
    machine.cpu.controls.nmi_window_exiting = true;
    machine.cpu.controls.interrupt_window_exiting = true;
    for _ in 0..3 {
        reinject(&mut machine);
        assert_eq!(machine.cpu.run(), EXIT);
    }
    fix(&mut machine);
    reinject(&mut machine);
    let vector = machine.cpu.injection.map(|injection| match injection {
        Injection::Exception(e) => e.vector,
        other => panic!("{other:?}"),
    });
    assert_eq!(machine.cpu.run(), Exit::NmiWindow);
    assert_eq!(machine.vector(), vector, "after the delivery, before the handler");
    machine.cpu.injection = Some(Injection::Nmi);
    machine.cpu.controls.nmi_window_exiting = false;
    machine.cpu.controls.interrupt_window_exiting = false;
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!(machine.vector(), Some(vector::NMI));
}

#[test]
fn v5_no_event_gets_into_the_alignment_loop() {
    v5(ac_loop(), PUSH, |machine| machine.set(reg::RSP, STACK3));
}

#[test]
fn v5_no_event_gets_into_the_debug_loop() {
    v5(db_loop(), STORE, |machine| machine.cpu.set_debug_register(7, 0));
}

#[test]
fn v6_intercepted_exceptions_do_not_loop() {
    for (mut machine, code, number) in [(ac_loop(), PUSH, vector::AC), (db_loop(), STORE, vector::DB)] {
        machine.cpu.controls.exception_bitmap = 1 << number;
        let mut exit = machine.run(code);
        for _ in 0..2 * LIMIT {
            let Exit::Exception(exception) = exit else { panic!("{exit:?}") };
            assert_eq!(exception.vector, number);
            machine.cpu.injection = Some(Injection::Exception(exception));
            exit = machine.cpu.run();
        }
    }
}

#[test]
fn v7_ordinary_faults_of_faults_open_the_window_again() {
    // Two ticks at most: #GP for want of a gate, and #DF.
    let mut machine = Machine::new(Mode::Long);
    machine.idt(vector::UD, 0);
    machine.idt(vector::GP, 0);
    arm(&mut machine);
    machine.cpu.event_window.threshold = Some(0);
    machine.cpu.controls.notify_window = 2;
    for _ in 0..100 {
        machine.set_ring(0);
        assert_eq!(machine.run(&[0x0f, 0x0b]), Exit::Hlt);
        assert_eq!(machine.vector(), Some(vector::DF));
        assert_eq!(machine.cpu.event_window.ticks(), 0);
    }
}

#[test]
fn v8_the_time_to_the_exit_is_the_threshold_and_the_window() {
    for window in [0, 1 << 10, 1 << 16, 1 << 18] {
        let mut machine = ac_loop();
        machine.cpu.controls.notify_window = window;
        let exit = machine.run(PUSH);
        let exit = past_the_host(&mut machine, exit);
        let expected = u64::from(THRESHOLD) + u64::from(window) + 1;
        assert_eq!(exit, Exit::Notify(Notify { ticks: expected, ..Notify::default() }));
    }
}

#[test]
fn v8_the_published_threshold_is_the_measured_one() {
    let published = CpuModel::default().notify_threshold();
    let mut machine = ac_loop();
    machine.cpu.event_window.threshold = published;
    machine.cpu.controls.notify_window = 0;
    let Exit::Notify(notify) = machine.run(PUSH) else { panic!("no notify exit") };
    assert_eq!(Some(notify.ticks), published.map(|threshold| u64::from(threshold) + 1));
}

#[test]
fn v9_without_the_control_the_host_gets_its_thread_back() {
    for (mut machine, code) in [(ac_loop(), PUSH), (db_loop(), STORE)] {
        machine.cpu.controls.notify_exiting = false;
        assert_eq!(machine.run(code), Exit::ExternalInterrupt);
        assert_eq!(machine.cpu.event_window.ticks(), HOST_LIMIT + 1);
        assert!(machine.cpu.idt_vectoring.is_some());
        reinject(&mut machine);
        assert_eq!(machine.cpu.run(), Exit::ExternalInterrupt);
        assert_eq!(machine.cpu.event_window.ticks(), 2 * (HOST_LIMIT + 1), "the window has not opened");
    }
}

#[test]
fn a_kick_gets_into_a_closed_window_and_takes_nothing_away() {
    for (mut machine, code) in [(ac_loop(), PUSH), (db_loop(), STORE)] {
        assert_eq!(machine.run(code), EXIT);
        reinject(&mut machine);
        machine.cpu.requests.post(Requests::KICK);
        // Seen before the injection, or in the closed window.
        let exit = machine.cpu.run();
        assert_eq!(exit, Exit::ExternalInterrupt);
        assert_eq!(machine.cpu.requests.get() & Requests::KICK, 0);
        assert!(machine.cpu.idt_vectoring.is_some() || machine.cpu.pending_debug != 0);
        reinject(&mut machine);
        let Exit::Notify(notify) = machine.cpu.run() else { panic!("no notify exit") };
        assert_eq!(notify.ticks, LIMIT, "the count went on");
    }
}

/// An NMI handler's IRET stalls: its return frame leads to HLT at the level 0 code.
fn in_nmi_handler(ticks: u64) -> Machine {
    let mut machine = Machine::new(Mode::Long);
    arm(&mut machine);
    machine.put(Machine::handler(vector::NMI), &[0x48, 0xcf]); // iretq
    machine.put(CODE0, &[0xf4]);
    let site = StallSite::Iret;
    machine.cpu.event_window.stall =
        Some(Stall { site, ticks, context_invalid: false, nmi_unblocking: false });
    machine.cpu.injection = Some(Injection::Nmi);
    machine
}

#[test]
fn v10_nmis_that_an_unfinished_iret_unblocked() {
    let mut machine = in_nmi_handler(LIMIT + 10);
    let Exit::Notify(notify) = machine.cpu.run() else { panic!("no notify exit") };
    assert_eq!((notify.qualification(), machine.cpu.idt_vectoring), (1 << 12, None));
    assert_eq!(machine.cpu.state.rip, Machine::handler(vector::NMI));
    // Without the fix-up a second NMI would nest.
    assert!(machine.cpu.nmi_allowed());
    machine.cpu.state.interruptibility |= interruptibility::NMI;
    assert!(!machine.cpu.nmi_allowed());
    machine.cpu.controls.nmi_window_exiting = true;
    assert_eq!(machine.cpu.run(), Exit::NmiWindow);
    assert_eq!(machine.cpu.state.rip, CODE0, "once IRET is done");
}

#[test]
fn v10_without_the_fix_up_a_second_nmi_nests() {
    let mut machine = in_nmi_handler(LIMIT + 10);
    assert!(matches!(machine.cpu.run(), Exit::Notify(_)));
    let before = machine.reg(reg::RSP);
    machine.cpu.injection = Some(Injection::Nmi);
    machine.cpu.event_window.stall = None;
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_ne!(machine.word(before - 40, 8), 0, "a second frame below the first");
}

#[test]
fn v11_a_delivery_that_stalls_is_done_once() {
    for injection in [
        Injection::Interrupt(0x40),
        Injection::Nmi,
        Injection::Exception(Exception::pf(0x1234, 6)),
        Injection::Software { vector: 0x41, length: 2 },
    ] {
        let mut machine = Machine::new(Mode::Long);
        arm(&mut machine);
        let number = match injection {
            Injection::Interrupt(number) | Injection::Software { vector: number, .. } => number,
            Injection::Nmi => vector::NMI,
            Injection::Local(vector) => vector,
            Injection::Exception(e) => e.vector,
        };
        machine.put(CODE0, &[0xcd, 0x41, 0xf4]);
        machine.cpu.event_window.stall = Some(Stall {
            site: StallSite::Delivery(number),
            ticks: 3 * LIMIT,
            context_invalid: false,
            nmi_unblocking: true,
        });
        machine.cpu.injection = Some(injection);
        let mut exits = 0;
        loop {
            match machine.cpu.run() {
                Exit::Notify(notify) => assert_eq!(notify.qualification(), 1 << 12, "undefined here"),
                exit => break assert_eq!(exit, Exit::Hlt),
            }
            exits += 1;
            assert_eq!(machine.cpu.state.rip, CODE0);
            reinject(&mut machine);
            assert_eq!(machine.cpu.injection, Some(injection), "error code and length are kept");
        }
        assert_eq!((exits, machine.vector()), (3, Some(number)));
        let frame = usize::from(matches!(injection, Injection::Exception(_)));
        let length = if matches!(injection, Injection::Software { .. }) { 2 } else { 0 };
        assert_eq!(machine.top(frame, 8), CODE0 + length, "one frame, and its return address");
        assert_eq!(machine.reg(reg::RSP), STACK0 - 40 - 8 * frame as u64);
    }
}

#[test]
fn v12_a_lost_context_is_told() {
    let mut machine = Machine::new(Mode::Long);
    arm(&mut machine);
    let site = StallSite::Instruction(CODE0 + 1);
    machine.cpu.event_window.stall =
        Some(Stall { site, ticks: u64::MAX, context_invalid: true, nmi_unblocking: false });
    let Exit::Notify(notify) = machine.run(&[0x90, 0x90]) else { panic!("no notify exit") };
    assert_eq!((notify.qualification(), notify.ticks, machine.cpu.state.rip), (1, LIMIT, CODE0 + 1));
    assert_eq!(machine.cpu.idt_vectoring, None);
}

#[test]
fn an_instruction_that_stalls_is_executed_once() {
    let mut machine = Machine::new(Mode::Long);
    arm(&mut machine);
    let site = StallSite::Instruction(CODE0);
    machine.cpu.event_window.stall =
        Some(Stall { site, ticks: 2 * LIMIT, context_invalid: false, nmi_unblocking: false });
    let mut exit = machine.run(&[0x48, 0xff, 0xc0]); // inc rax
    for _ in 0..2 {
        assert_eq!(exit, EXIT);
        assert_eq!((machine.reg(reg::RAX), machine.cpu.state.rip), (0, CODE0));
        exit = machine.cpu.run();
    }
    assert_eq!((exit, machine.reg(reg::RAX)), (Exit::Hlt, 1));
}
