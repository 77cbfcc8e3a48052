//! Virtual-8086 mode, with and without VME; PVI.

use super::*;
use crate::exception::vector::GP;
use crate::flags::Rflags;

/// A virtual-8086 program at CODE3 with its stack below 0x28000, IOPL `iopl`, CR4 `cr4`.
fn machine(iopl: u64, cr4: u64) -> Machine {
    let mut machine = Machine::new(Mode::Protected);
    machine.cpu.state.cr4 |= cr4;
    machine.cpu.state.rflags_system = 2 | Rflags::VM.bits() | (iopl << 12) | Rflags::IF.bits();
    machine.cpu.state.cpl = 3;
    for seg in Seg::ALL {
        machine.cpu.state.segs[seg as usize] = Segment::v8086((CODE3 >> 4) as u16);
    }
    machine.cpu.state.rip = 0;
    machine.set(reg::RSP, 0x8000);
    machine.cpu.refresh_mode();
    for vector in 0..=255 {
        machine.put_word(4 * vector, 4, ((HANDLERS >> 4) << 16) | (16 * vector));
    }
    machine
}

/// What one instruction came to: the next IP, or the fault's vector and error code.
type Outcome = Result<u64, (u8, u32)>;

fn outcome(machine: &mut Machine, code: &[u8]) -> Outcome {
    machine.cpu.controls.exception_bitmap = !0;
    machine.cpu.controls.instruction_limit = machine.cpu.counters.instructions + 1;
    match machine.run(code) {
        Exit::Budget => Ok(machine.cpu.state.rip),
        Exit::Exception(e) => Err((e.vector, e.error_code.unwrap_or(0))),
        exit => panic!("{exit:?}"),
    }
}

#[test]
fn interrupts_leave_virtual_8086_mode() {
    let mut machine = machine(3, 0);
    machine.idt(0x40, gate(14, 3, sel::CODE0, Machine::handler(0x40), 0));
    let flags = machine.cpu.state.rflags();
    assert_eq!(machine.run(&[0xcd, 0x40]), Exit::Hlt);
    assert_eq!(machine.vector(), Some(0x40));
    let frame: Vec<u64> = (0..9).map(|n| machine.top(n, 4)).collect();
    let data = CODE3 >> 4;
    assert_eq!(frame, [2, data, flags, 0x8000, data, data, data, data, data]);
    let state = &machine.cpu.state;
    assert!(!state.v8086() && state.cpl == 0);
    for seg in [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
        assert!(state.segs[seg as usize].unusable());
    }
    // And IRETD goes back.
    machine.put(Machine::handler(0x40), &[0xcf]);
    machine.put(CODE3 + 2, &[0xcd, 0x40]);
    machine.cpu.controls.instruction_limit = machine.cpu.counters.instructions + 1;
    assert_eq!(machine.cpu.run(), Exit::Budget);
    let state = &machine.cpu.state;
    assert!(state.v8086() && state.cpl == 3);
    assert_eq!((state.rip, state.rflags(), machine.reg(reg::RSP)), (2, flags, 0x8000));
    assert_eq!(state.segs[1], Segment::v8086(data as u16));
}

#[test]
fn handlers_must_be_at_level_0() {
    for selector in [sel::CONFORMING0, sel::CODE3] {
        let mut machine = machine(3, 0);
        machine.idt(0x40, gate(14, 3, selector, Machine::handler(0x40), 0));
        assert_eq!(outcome(&mut machine, &[0xcd, 0x40]), Err((GP, u32::from(selector & !3))));
    }
}

#[test]
fn sensitive_instructions_need_iopl_3() {
    let gp = Err((GP, 0));
    // (code, IOPL 3, IOPL 0, IOPL 0 with VME)
    let table: [(&[u8], Outcome, Outcome, Outcome); 8] = [
        (&[0xfa], Ok(1), gp, Ok(1)),
        (&[0xfb], Ok(1), gp, Ok(1)),
        (&[0x9c], Ok(1), gp, Ok(1)),
        (&[0x9d], Ok(1), gp, Ok(1)),
        (&[0x66, 0x9c], Ok(2), gp, gp),
        (&[0x66, 0x9d], Ok(2), gp, gp),
        (&[0x66, 0xcf], Ok(0), gp, gp),
        (&[0xcd, 0x40], Err((GP, 0x202)), gp, Ok(0x400)),
    ];
    for (code, all, none, vme) in table {
        assert_eq!(outcome(&mut machine(3, 0), code), all, "{code:x?} IOPL 3");
        assert_eq!(outcome(&mut machine(0, 0), code), none, "{code:x?} IOPL 0");
        assert_eq!(outcome(&mut machine(0, cr4::VME), code), vme, "{code:x?} VME");
    }
    assert_eq!(outcome(&mut machine(3, 0), &[0xf4]), gp, "HLT");
}

#[test]
fn vme_gives_vif_for_if() {
    let mut machine = machine(0, cr4::VME);
    outcome(&mut machine, &[0xfb]).unwrap();
    assert!(machine.cpu.state.flag(Rflags::VIF));
    machine.cpu.state.rip = 0;
    outcome(&mut machine, &[0x9c]).unwrap();
    let image = machine.top(0, 2);
    assert_eq!(image & 0x3200, 0x3200, "IF is VIF, IOPL reads 3");
    machine.cpu.state.rip = 0;
    outcome(&mut machine, &[0xfa]).unwrap();
    assert!(!machine.cpu.state.flag(Rflags::VIF) && machine.cpu.state.flag(Rflags::IF));
    // POPF sets VIF from IF; IF and IOPL stay.
    machine.cpu.state.rip = 0;
    outcome(&mut machine, &[0x9d]).unwrap();
    assert!(machine.cpu.state.flag(Rflags::VIF) && machine.cpu.state.iopl() == 0);
    // With VIP set, enabling faults; so does TF.
    for (code, pushed, vip) in [(0xfb, 0, true), (0x9d, 0x200, true), (0x9d, 0x100, false)] {
        let mut machine = self::machine(0, cr4::VME);
        if vip {
            machine.cpu.state.rflags_system |= Rflags::VIP.bits();
        }
        machine.stack(2, &[pushed]);
        assert_eq!(outcome(&mut machine, &[code]), Err((GP, 0)), "{code:x} {pushed:x} {vip}");
    }
}

#[test]
fn vme_redirects_software_interrupts() {
    // (IOPL, redirection bit, IP after or fault, IF or VIF cleared)
    for (iopl, bit, expected) in
        [(0, 0, Ok(0x400)), (3, 0, Ok(0x400)), (0, 1, Err((GP, 0))), (3, 1, Err((GP, 0x202)))]
    {
        let mut machine = machine(iopl, cr4::VME);
        machine.cpu.state.rflags_system |= Rflags::VIF.bits();
        machine.put(TSS + 136 - 32 + 8, &[bit]);
        let flags = machine.cpu.state.rflags();
        assert_eq!(outcome(&mut machine, &[0xcd, 0x40]), expected, "{iopl} {bit}");
        if expected.is_err() {
            continue;
        }
        let state = &machine.cpu.state;
        assert_eq!(state.segs[1], Segment::v8086((HANDLERS >> 4) as u16));
        assert_eq!((machine.top(0, 2), machine.top(1, 2)), (2, CODE3 >> 4));
        assert_eq!(machine.top(2, 2), flags & 0xffff | if iopl == 0 { 0x3200 } else { 0 });
        assert_eq!(state.flag(Rflags::VIF), iopl == 3);
        assert_eq!(state.flag(Rflags::IF), iopl == 0);
        // IRET goes back and sets it again.
        let at = state.rip;
        machine.put(HANDLERS + at, &[0xcf]);
        machine.cpu.controls.instruction_limit += 1;
        assert_eq!(machine.cpu.run(), Exit::Budget);
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.rflags()), (2, flags));
    }
    // A map that does not fit the TSS.
    let mut machine = machine(0, cr4::VME);
    machine.cpu.state.tr.limit = 102;
    assert_eq!(outcome(&mut machine, &[0xcd, 0x40]), Err((GP, 0)));
}

#[test]
fn pvi_gives_vif_to_cli_and_sti_alone() {
    let pvi = |ring| {
        let mut machine = Machine::new(Mode::Protected);
        machine.set_ring(ring);
        machine.cpu.state.cr4 |= cr4::PVI;
        machine.cpu.state.rflags_system |= Rflags::IF.bits();
        machine
    };
    let mut machine = pvi(3);
    assert!(outcome(&mut machine, &[0xfb]).is_ok());
    assert!(machine.cpu.state.flag(Rflags::VIF));
    machine.cpu.state.rflags_system |= Rflags::VIP.bits();
    assert_eq!(outcome(&mut machine, &[0xfb]), Err((GP, 0)));
    assert!(outcome(&mut machine, &[0xfa]).is_ok());
    assert!(!machine.cpu.state.flag(Rflags::VIF) && machine.cpu.state.flag(Rflags::IF));
    // POPF without the right to IF leaves both alone.
    machine.stack(4, &[2]);
    assert!(outcome(&mut machine, &[0x9d]).is_ok());
    assert!(machine.cpu.state.flag(Rflags::IF));
    let mut machine = pvi(3);
    machine.cpu.state.cr4 = 0;
    assert_eq!(outcome(&mut machine, &[0xfa]), Err((GP, 0)));
}
