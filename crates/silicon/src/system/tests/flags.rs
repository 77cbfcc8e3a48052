//! RFLAGS instructions, shadows, HLT.

use super::*;
use crate::cpu::Requests;
use crate::exception::vector::GP;
use crate::flags::{Rflags, Status};
use crate::state::{Activity, interruptibility};
use crate::vmx::Injection;

#[test]
fn popf_changes_what_the_level_allows() {
    let all = 0x3f_7fd5 & !Rflags::TF.bits();
    let system = Rflags::VM | Rflags::RF | Rflags::VIF | Rflags::VIP;
    // (ring, IOPL, operand bytes, flags that stay)
    let table = [
        (0, 0, 8, system),
        (3, 3, 8, system | Rflags::IOPL),
        (3, 0, 8, system | Rflags::IOPL | Rflags::IF),
        (0, 0, 2, system | Rflags::AC | Rflags::ID),
    ];
    for (ring, iopl, size, kept) in table {
        let mut machine = Machine::new(Mode::Long);
        machine.set_ring(ring);
        machine.cpu.state.rflags_system = 2 | (iopl << 12);
        machine.stack(size, &[all]);
        machine.cpu.controls.instruction_limit = 1;
        let code: &[u8] = if size == 8 { &[0x9d] } else { &[0x66, 0x9d] };
        assert_eq!(machine.run(code), Exit::Budget);
        let expected = (all & !kept.bits()) | (iopl << 12) | 2;
        assert_eq!(machine.cpu.state.rflags(), expected, "ring {ring} iopl {iopl} size {size}");
    }
}

#[test]
fn pushf_hides_vm_and_rf() {
    let mut machine = Machine::new(Mode::Protected);
    machine.cpu.state.rflags_system |= (Rflags::RF | Rflags::AC | Rflags::IOPL).bits();
    machine.finish(&[0x9c]);
    assert_eq!(machine.top(0, 4), 2 | (Rflags::AC | Rflags::IOPL).bits());
}

#[test]
fn cli_and_sti_need_iopl() {
    for code in [0xfa, 0xfb] {
        let mut machine = Machine::new(Mode::Long);
        machine.set_ring(3);
        assert_eq!(machine.fault(&[code]), (GP, Some(0)));
        machine.set_ring(3);
        machine.cpu.state.rflags_system |= Rflags::IOPL.bits();
        machine.finish_ring3(&[code]);
        assert_eq!(machine.top(2, 8) & Rflags::IF.bits() != 0, code == 0xfb);
    }
}

#[test]
fn single_flags_and_ah() {
    let mut machine = Machine::new(Mode::Long);
    machine.finish(&[0xf9, 0xfd]); // stc; std
    assert!(machine.cpu.state.status.cf() && machine.cpu.state.flag(Rflags::DF));
    machine.finish(&[0xf5, 0xfc]); // cmc; cld
    assert!(!machine.cpu.state.status.cf() && !machine.cpu.state.flag(Rflags::DF));
    machine.cpu.state.status = Status::from_rflags(0x8d5);
    machine.finish(&[0x9f]); // lahf
    assert_eq!(machine.reg(reg::RAX), 0xd700);
    machine.set(reg::RAX, 0);
    machine.finish(&[0x9e]); // sahf
    assert_eq!(machine.cpu.state.status.to_rflags(), Rflags::OF.bits());
}

#[test]
fn the_sti_shadow_covers_one_instruction() {
    // sti; nop; nop with an interrupt window asked for: it opens after the first nop.
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.controls.interrupt_window_exiting = true;
    assert_eq!(machine.run(&[0xfb, 0x90, 0x90]), Exit::InterruptWindow);
    assert_eq!(machine.cpu.state.rip, CODE0 + 2);
    // Interrupts already enabled: no shadow.
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.state.rflags_system |= Rflags::IF.bits();
    machine.finish(&[0xfb]);
    assert_eq!(machine.cpu.state.interruptibility, 0);
    // sti; cli never opens it, sti; nop; cli does.
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.controls.interrupt_window_exiting = true;
    assert_eq!(machine.run(&[0xfb, 0xfa, 0x90]), Exit::Hlt);
    machine.set_ring(0);
    assert_eq!(machine.run(&[0xfb, 0x90, 0xfa]), Exit::InterruptWindow);
    assert_eq!(machine.cpu.state.rip, CODE0 + 2);
    // A kick between STI and HLT shows the shadow.
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.controls.instruction_limit = 1;
    assert_eq!(machine.run(&[0xfb]), Exit::Budget);
    assert_eq!(machine.cpu.state.interruptibility, interruptibility::STI);
    assert!(!machine.cpu.interrupt_allowed());
    machine.cpu.controls.instruction_limit = u64::MAX;
    machine.cpu.requests.post(Requests::KICK);
    assert_eq!(machine.cpu.run(), Exit::ExternalInterrupt);
    assert_eq!(machine.cpu.state.interruptibility, interruptibility::STI);
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    machine.cpu.skip_instruction();
    assert!(machine.cpu.interrupt_allowed());
}

#[test]
fn the_mov_ss_shadow_covers_one_instruction() {
    let mut machine = Machine::new(Mode::Protected);
    machine.set(reg::RAX, u64::from(sel::DATA0));
    machine.cpu.state.rflags_system |= Rflags::IF.bits();
    machine.cpu.requests.take(!0);
    // mov ss, eax; nop: the window was open before.
    machine.cpu.controls.instruction_limit = 1;
    assert_eq!(machine.run(&[0x8e, 0xd0, 0x90]), Exit::Budget);
    assert_eq!(machine.cpu.state.interruptibility, interruptibility::MOV_SS);
    machine.cpu.controls.instruction_limit = u64::MAX;
    machine.cpu.controls.interrupt_window_exiting = true;
    machine.cpu.controls.nmi_window_exiting = true;
    assert_eq!(machine.cpu.run(), Exit::NmiWindow);
    assert_eq!(machine.cpu.state.rip, CODE0 + 3);
}

#[test]
fn hlt_exits_or_waits() {
    let mut machine = Machine::new(Mode::Long);
    assert_eq!(machine.run(&[]), Exit::Hlt);
    assert_eq!((machine.cpu.state.rip, machine.cpu.exit_instruction_length), (CODE0, 1));
    machine.cpu.controls.hlt_exiting = false;
    machine.cpu.requests.post(Requests::KICK);
    assert_eq!(machine.cpu.run(), Exit::ExternalInterrupt);
    let requests = machine.cpu.requests.clone();
    let kicker = std::thread::spawn(move || {
        while requests.get() & Requests::LOCAL == 0 {
            std::thread::yield_now();
        }
        requests.post(Requests::KICK);
    });
    assert_eq!(machine.cpu.run(), Exit::ExternalInterrupt);
    kicker.join().unwrap();
    assert_eq!((machine.cpu.state.rip, machine.cpu.state.activity), (CODE0 + 1, Activity::Halted));
    machine.cpu.controls.hlt_exiting = true;
    machine.cpu.injection = Some(Injection::Interrupt(0x40));
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(0, 8)), (Some(0x40), CODE0 + 1));
    let mut machine = Machine::new(Mode::Long);
    machine.set_ring(3);
    assert_eq!(machine.fault(&[0xf4]), (GP, Some(0)));
}
