//! EPT-violation #VE, by the numbers of its test plan (V1 to V7).

use super::*;
use crate::exception::{Exception, vector};
use crate::mmu::ept::Lazy;
use crate::translate::{Engine, Translator};
use crate::vmx::Injection;

/// Pages that are elsewhere, and whose entries allow #VE.
const GONE: u64 = DATA + 0x2000;
const GONE_TOO: u64 = DATA + 0x3000;
const AREA: u64 = DATA + 0x1000;
const INDEX: u16 = 7;

/// With everything there but the pages that are gone.
fn machine(mode: Mode) -> Machine {
    let mut machine = Machine::new(mode);
    let ept = machine.cpu.ept.clone();
    assert!(ept.set_lazy(0, Lazy::Own));
    (0..MEMORY as u64 - 4096).step_by(4096).for_each(|page| ept.mark_present(page));
    for page in [GONE, GONE_TOO] {
        assert!(ept.evict(page, 4096) && ept.set_suppress_ve(page, 4096, false));
    }
    let controls = &mut machine.cpu.controls;
    (controls.ept_violation_ve, controls.ve_information, controls.eptp_index) = (true, AREA, INDEX);
    machine
}

/// mov rax, [rbx]
const LOAD: &[u8] = &[0x48, 0x8b, 0x03];
/// mov [rbx], rax
const STORE: &[u8] = &[0x48, 0x89, 0x03];
/// jmp rbx
const JUMP: &[u8] = &[0xff, 0xe3];

fn handled(machine: &Machine) -> bool {
    machine.cpu.state.rip == Machine::handler(vector::VE)
}

#[test]
fn ve_v1_the_information_area_says_what_was_accessed() {
    let access = 1 << 7 | 1 << 8;
    for (name, code, qualification) in
        [("read", LOAD, access | 1), ("write", STORE, access | 2), ("fetch", JUMP, access | 4)]
    {
        let mut machine = machine(Mode::Long);
        machine.set(reg::RBX, GONE + 0x123);
        assert_eq!(machine.run(code), Exit::Hlt, "{name}");
        assert!(handled(&machine), "{name}");
        let frame = machine.cpu.state.regs[usize::from(reg::RSP)];
        let rip = if name == "fetch" { GONE + 0x123 } else { CODE0 };
        assert_eq!(machine.word(frame, 8), rip, "a fault, with no error code: {name}");
        assert_eq!(machine.word(AREA, 4), 48);
        assert_eq!(machine.word(AREA + 4, 4), 0xffff_ffff);
        assert_eq!(machine.word(AREA + 8, 8), qualification, "{name}");
        assert_eq!((machine.word(AREA + 16, 8), machine.word(AREA + 24, 8)), (GONE + 0x123, GONE + 0x123));
        assert_eq!(machine.word(AREA + 32, 4), u64::from(INDEX), "and nothing behind it");
        assert_eq!(machine.cpu.counters.exceptions, 1);
    }
}

/// The page table of the address is what is gone: its translation, not the address itself, is in the area.
/// What the interpreter attempts beforehand, where engines are compared, does not write the area.
#[test]
fn ve_v1_engines_that_are_compared_convert_it_once() {
    for code in [LOAD, STORE] {
        let mut machine = machine(Mode::Long);
        machine.cpu.translator = Translator::new(Engine::Check);
        machine.set(reg::RBX, GONE + 0x123);
        assert_eq!(machine.run(code), Exit::Hlt);
        assert!(handled(&machine));
        assert_eq!((machine.word(AREA, 4), machine.cpu.counters.exceptions), (48, 1));
    }
}

#[test]
fn ve_v1_page_walks_say_so() {
    let mut machine = machine(Mode::Long);
    let ept = machine.cpu.ept.clone();
    // The second of the page tables that map memory: nothing else is mapped by it here.
    let (table, lin) = (TABLES + 0x4000, 2 << 20);
    assert!(ept.evict(table, 4096) && ept.set_suppress_ve(table, 4096, false));
    machine.set(reg::RBX, lin + 0x5008);
    assert_eq!(machine.run(LOAD), Exit::Hlt);
    assert!(handled(&machine));
    assert_eq!(machine.word(AREA + 8, 8), 1 << 7 | 1);
    assert_eq!((machine.word(AREA + 16, 8), machine.word(AREA + 24, 8)), (lin + 0x5008, table + 8 * 5));
}

/// Runs a load from the page that is gone, which is to exit.
fn exits(machine: &mut Machine, why: &str) {
    machine.set(reg::RBX, GONE);
    let exit = machine.run(LOAD);
    assert!(matches!(exit, Exit::MemoryElsewhere { address: GONE, .. }), "{why}: {exit:?}");
    assert_eq!((exit.reason(), machine.cpu.state.rip), (48, CODE0), "{why}");
}

#[test]
fn ve_v2_v3_a_busy_area_and_the_suppress_bit_make_it_an_exit() {
    let mut busy = machine(Mode::Long);
    busy.put_word(AREA + 4, 4, 1);
    exits(&mut busy, "busy");
    assert_eq!(busy.word(AREA, 4), 0);
    let mut suppressed = machine(Mode::Long);
    assert!(suppressed.cpu.ept.set_suppress_ve(GONE, 4096, true));
    exits(&mut suppressed, "suppressed");
    let mut off = machine(Mode::Long);
    off.cpu.controls.ept_violation_ve = false;
    exits(&mut off, "the control is off");
    let mut nowhere = machine(Mode::Long);
    nowhere.cpu.controls.ve_information = 1 << 40;
    exits(&mut nowhere, "no information area");
    let mut gone = machine(Mode::Long);
    gone.cpu.controls.ve_information = GONE_TOO;
    exits(&mut gone, "the area is elsewhere itself");
    // A new page has the bit set (kernel: SHADOW_NONPRESENT_VALUE).
    let mut default = machine(Mode::Long);
    let ept = default.cpu.ept.clone();
    assert!(ept.evict(DATA, 4096));
    default.set(reg::RBX, DATA);
    assert!(matches!(default.run(LOAD), Exit::MemoryElsewhere { address: DATA, .. }));
}

#[test]
fn ve_v4_neither_real_mode_nor_the_delivery_of_an_event_converts() {
    let mut real = machine(Mode::Real);
    // mov ax, GONE >> 4; mov ds, ax; mov al, [0]
    let exit = real.run(&[0xb8, (GONE >> 4) as u8, (GONE >> 12) as u8, 0x8e, 0xd8, 0xa0, 0, 0]);
    assert!(matches!(exit, Exit::MemoryElsewhere { address: GONE, .. }), "{exit:?}");
    let mut delivery = machine(Mode::Long);
    delivery.set(reg::RSP, GONE + 0x800);
    delivery.cpu.injection = Some(Injection::Nmi);
    let exit = delivery.run(&[0x90]);
    assert!(matches!(exit, Exit::MemoryElsewhere { .. }), "{exit:?}");
    assert!(delivery.cpu.idt_vectoring.is_some());
    // INT n is an event, too.
    let mut software = machine(Mode::Long);
    software.set(reg::RSP, GONE + 0x800);
    let exit = software.run(&[0xcd, 0x30]);
    assert!(matches!(exit, Exit::MemoryElsewhere { .. }), "{exit:?}");
}

#[test]
fn ve_v5_addresses_without_memory_never_convert() {
    let mut machine = machine(Mode::Long);
    let beyond = MEMORY as u64 - 4096;
    machine.put_word(TABLES + 0x3000, 8, beyond | 7);
    machine.cpu.flush_all(false);
    machine.set(reg::RBX, 0x10);
    assert!(matches!(machine.run(LOAD), Exit::EptViolation(_)));
    assert_eq!(machine.word(AREA, 4), 0);
}

#[test]
fn ve_v6_the_exception_bitmap_intercepts_it() {
    let mut machine = machine(Mode::Long);
    machine.cpu.controls.exception_bitmap = 1 << vector::VE;
    machine.set(reg::RBX, GONE);
    assert_eq!(machine.run(LOAD), Exit::Exception(Exception::VE));
    assert_eq!(machine.word(AREA + 4, 4), 0xffff_ffff, "the area has been written");
}

/// The race of the thread: the handler says that it is done and has not returned yet, when an NMI comes and takes a #VE on the
/// same stack, where the first one's frame is lost. While the busy word is set the NMI's access exits.
#[test]
fn ve_v7_a_handler_that_is_done_can_be_entered_again_before_it_returns() {
    for cleared in [true, false] {
        let mut machine = machine(Mode::Long);
        // #VE on IST 1; its handler: mov dword [AREA + 4], 0 (or NOPs); nop; iretq
        let mut handler = vec![0xc7, 0x04, 0x25];
        handler.extend((AREA as u32 + 4).to_le_bytes());
        handler.extend([0, 0, 0, 0]);
        if !cleared {
            handler.fill(0x90);
        }
        let at = CODE0 + 0x800;
        handler.extend([0x90, 0x48, 0xcf]);
        machine.put(at, &handler);
        machine.idt(vector::VE, gate(14, 0, sel::CODE0_64, at, 1));
        // The NMI's: mov rax, [GONE_TOO]; hlt
        let mut nmi = vec![0x48, 0x8b, 0x04, 0x25];
        nmi.extend((GONE_TOO as u32).to_le_bytes());
        nmi.push(0xf4);
        let nmi_at = CODE0 + 0x900;
        machine.put(nmi_at, &nmi);
        machine.idt(vector::NMI, gate(14, 0, sel::CODE0_64, nmi_at, 0));
        machine.set(reg::RBX, GONE);
        let before_nop = if cleared { 1 } else { 11 };
        machine.cpu.controls.instruction_limit = machine.cpu.instructions() + before_nop;
        assert_eq!(machine.run(LOAD), Exit::Budget);
        machine.cpu.controls.instruction_limit = u64::MAX;
        assert_eq!(machine.word(IST1 - 40, 8), CODE0, "the frame of the first");
        machine.cpu.injection = Some(Injection::Nmi);
        if !cleared {
            let exit = machine.cpu.run();
            assert!(matches!(exit, Exit::MemoryElsewhere { address: GONE_TOO, .. }), "{exit:?}");
            assert_eq!(machine.word(IST1 - 40, 8), CODE0);
            continue;
        }
        machine.cpu.controls.instruction_limit = machine.cpu.instructions() + 1;
        assert_eq!(machine.cpu.run(), Exit::Budget);
        assert_eq!(machine.word(AREA + 24, 8), GONE_TOO, "a second one");
        assert_eq!(machine.word(IST1 - 40, 8), nmi_at, "the first frame is lost");
    }
}
