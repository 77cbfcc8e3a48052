//! Debug registers, breakpoints, single step.

use super::*;
use crate::exception::vector::{DB, GP, PF, UD};
use crate::flags::Rflags;
use crate::vmx::{BusAccess, Space};

const TO_DR7: &[u8] = &[0x0f, 0x23, 0xf8]; // mov dr7, eax
const FROM_DR6: &[u8] = &[0x0f, 0x21, 0xf0];

/// Runs `code`, whose debug exception is due at `ip`; DR6.
fn trap(machine: &mut Machine, code: &[u8], ip: u64) -> u64 {
    assert_eq!(machine.run(code), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(0, 8)), (Some(DB), ip), "{code:02x?}");
    machine.cpu.state.dr6
}

/// Level 0 in 64-bit mode with breakpoint 0 on `address`, R/W `rw`, LEN `len`.
fn armed(address: u64, rw: u64, len: u64) -> Machine {
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.state.dr[0] = address;
    machine.cpu.state.dr7 = 0x402 | (rw << 16) | (len << 18);
    machine
}

#[test]
fn debug_registers_and_their_reserved_bits() {
    let mut machine = Machine::new(Mode::Long);
    machine.set(reg::RAX, 0xffff_ffff);
    machine.finish(&[0x0f, 0x23, 0xf0]); // mov dr6, rax
    assert_eq!(machine.cpu.state.dr6, 0xffff_eff0 | 0xf);
    machine.set(reg::RAX, 0xffff_0000);
    machine.finish(TO_DR7);
    assert_eq!(machine.cpu.state.dr7, 0xffff_0400);
    machine.finish(FROM_DR6);
    assert_eq!(machine.reg(reg::RAX), 0xffff_efff);
    machine.set(reg::RAX, 1 << 32);
    assert_eq!(machine.fault(TO_DR7), (GP, Some(0)));
    // DR4 is DR6 unless CR4.DE says that it does not exist.
    machine.set_ring(0);
    machine.finish(&[0x0f, 0x21, 0xe0]);
    assert_eq!(machine.reg(reg::RAX), 0xffff_efff);
    machine.cpu.state.cr4 |= cr4::DE;
    assert_eq!(machine.fault(&[0x0f, 0x21, 0xe0]), (UD, None));
    machine.set_ring(3);
    assert_eq!(machine.fault(FROM_DR6), (GP, Some(0)));
    machine.set_ring(0);
    assert_eq!(machine.fault(&[0x44, 0x0f, 0x21, 0xc0]), (UD, None), "DR8");
}

#[test]
fn general_detect_faults_and_clears_itself() {
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.state.dr7 |= 1 << 13;
    assert_eq!(trap(&mut machine, FROM_DR6, CODE0), 0xffff_2ff0);
    assert_eq!(machine.cpu.state.dr7, 0x400);
}

#[test]
fn single_step_traps_after_each_instruction() {
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.state.rflags_system |= Rflags::TF.bits();
    assert_eq!(trap(&mut machine, &[0x90, 0x90], CODE0 + 1), 0xffff_4ff0);
    assert!(!machine.cpu.state.flag(Rflags::TF));
    assert_ne!(machine.top(2, 8) & Rflags::TF.bits(), 0);
    // POPF that sets TF traps after the next instruction.
    let mut machine = Machine::new(Mode::Long);
    machine.stack(8, &[0x102]);
    trap(&mut machine, &[0x9d, 0x90, 0x90], CODE0 + 2);
    // A software interrupt leaves no trap behind.
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.state.rflags_system |= Rflags::TF.bits();
    assert_eq!(machine.run(&[0xcd, 0x40]), Exit::Hlt);
    assert_eq!(machine.vector(), Some(0x40));
    // A fault comes first, and its handler is not stepped.
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.state.rflags_system |= Rflags::TF.bits();
    assert_eq!(machine.fault(&[0x0f, 0x0b]), (UD, None));
    // An instruction that the hypervisor completes.
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.state.rflags_system |= Rflags::TF.bits();
    assert_eq!(machine.run(&[0x0f, 0xa2, 0x90]), Exit::Cpuid);
    machine.cpu.skip_instruction();
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(0, 8)), (Some(DB), CODE0 + 2));
}

#[test]
fn stack_loads_hold_debug_traps_back() {
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.state.rflags_system |= Rflags::TF.bits();
    machine.set(reg::RAX, u64::from(sel::DATA0));
    trap(&mut machine, &[0x8e, 0xd0, 0x90, 0x90], CODE0 + 3);
    // mov ss, [DATA] from a watched word, then INT: the trap is taken in the handler.
    let mut machine = armed(DATA, 3, 1);
    machine.put_word(DATA, 2, u64::from(sel::DATA0));
    machine.set(reg::RAX, DATA);
    assert_eq!(trap(&mut machine, &[0x8e, 0x10, 0xcd, 0x40], Machine::handler(0x40)), 0xffff_0ff1);
}

#[test]
fn syscall_and_sysret_decide_by_the_new_tf() {
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.state.star = 0x18 << 48 | u64::from(sel::CODE0_64) << 32;
    machine.cpu.state.lstar = Machine::handler(0x40);
    machine.cpu.state.sfmask = Rflags::TF.bits();
    machine.cpu.state.rflags_system |= Rflags::TF.bits();
    assert_eq!(machine.run(&[0x0f, 0x05]), Exit::Hlt);
    assert_eq!(machine.vector(), Some(0x40));
    machine.set_ring(0);
    machine.set(reg::RCX, CODE3);
    machine.set(reg::R11, 0x102);
    trap(&mut machine, &[0x48, 0x0f, 0x07], CODE3);
}

#[test]
fn instruction_breakpoints_are_faults_that_rf_suppresses() {
    let mut machine = armed(CODE0 + 1, 0, 0);
    assert_eq!(trap(&mut machine, &[0x90, 0x90], CODE0 + 1), 0xffff_0ff1);
    assert_eq!(machine.top(2, 8) & Rflags::RF.bits(), 0, "the handler has to set RF");
    // It does, and goes back: the instruction runs.
    let flags = machine.top(2, 8) | Rflags::RF.bits();
    machine.put_word(machine.reg(reg::RSP) + 16, 8, flags);
    machine.put(Machine::handler(DB), &[0x48, 0xcf]);
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!(machine.cpu.state.rip, CODE0 + 2);
    assert!(!machine.cpu.state.flag(Rflags::RF));
    // Not enabled, not taken; and nothing on the second byte of an instruction.
    let mut machine = armed(CODE0 + 1, 0, 0);
    machine.cpu.state.dr7 &= !3;
    machine.finish(&[0x90, 0x90]);
    armed(CODE0 + 1, 0, 0).finish(&[0x66, 0x90]);
}

#[test]
fn data_breakpoints_trap_after_the_access() {
    let store = |at: u64| [&[0xa3][..], &at.to_le_bytes()].concat(); // mov [at], eax
    let read = |at: u64| [&[0xa1][..], &at.to_le_bytes()].concat();
    let next = CODE0 + 9;
    assert_eq!(trap(&mut armed(DATA, 1, 3), &store(DATA + 2), next), 0xffff_0ff1);
    assert_eq!(trap(&mut armed(DATA, 3, 3), &read(DATA), next), 0xffff_0ff1);
    armed(DATA, 1, 3).finish(&read(DATA));
    armed(DATA, 1, 3).finish(&store(DATA + 4));
    // Together with single step, in one exception.
    let mut machine = armed(DATA, 1, 3);
    machine.cpu.state.rflags_system |= Rflags::TF.bits();
    assert_eq!(trap(&mut machine, &store(DATA), next), 0xffff_4ff1);
    // The next exception of another breakpoint replaces B0.
    let mut machine = armed(DATA, 1, 3);
    machine.cpu.state.dr6 |= 0xe;
    assert_eq!(trap(&mut machine, &store(DATA), next), 0xffff_0ff1);
    // An access that faults has not happened.
    let mut machine = armed(DATA, 1, 3);
    machine.unmap(DATA);
    assert_eq!(machine.fault(&store(DATA)).0, PF);
    assert_eq!(machine.cpu.state.dr6, 0xffff_0ff0);
}

#[test]
fn io_breakpoints_trap_after_the_access() {
    let mut machine = armed(0x80, 2, 0);
    machine.cpu.state.cr4 |= cr4::DE;
    let access = BusAccess { space: Space::Port, address: 0x80, size: 1, write: Some(0) };
    assert_eq!(machine.run(&[0xe6, 0x80, 0x90]), Exit::Io(access));
    machine.cpu.complete_read(0);
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(0, 8)), (Some(DB), CODE0 + 2));
    assert_eq!(machine.cpu.state.dr6, 0xffff_0ff1);
}

#[test]
fn faults_push_rf_so_that_breakpoints_are_not_met_twice() {
    let mut machine = Machine::new(Mode::Long);
    machine.unmap(DATA);
    // The instruction faults first, with its breakpoint disabled; then its handler maps the page and enables it.
    let code = [&[0xa1][..], &DATA.to_le_bytes()].concat();
    assert_eq!(machine.fault(&code).0, PF);
    machine.put_word(TABLES + 0x3000 + 8 * (DATA >> 12), 8, DATA | 7);
    machine.cpu.flush_all(false);
    machine.cpu.state.dr[0] = CODE0;
    machine.cpu.state.dr7 = 0x402;
    machine.put(Machine::handler(PF), &[0x58, 0x48, 0xcf]); // pop rax; iretq
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!(machine.cpu.state.rip, CODE0 + 9);
}

#[test]
fn string_instructions_trap_between_iterations() {
    // rep stosb into a watched byte: trap after the second iteration, RIP still at the instruction.
    let mut machine = armed(DATA + 1, 1, 0);
    machine.set(reg::RDI, DATA);
    machine.set(reg::RCX, 4);
    assert_eq!(trap(&mut machine, &[0xf3, 0xaa], CODE0), 0xffff_0ff1);
    assert_eq!(machine.reg(reg::RCX), 2);
    assert_ne!(machine.top(2, 8) & Rflags::RF.bits(), 0);
    // Its own instruction breakpoint is met once.
    let mut machine = armed(CODE0 + 1, 0, 0);
    machine.set(reg::RDI, DATA);
    machine.set(reg::RCX, 4);
    trap(&mut machine, &[0x90, 0xf3, 0xaa], CODE0 + 1);
    let flags = machine.top(2, 8) | Rflags::RF.bits();
    machine.put_word(machine.reg(reg::RSP) + 16, 8, flags);
    machine.put(Machine::handler(DB), &[0x48, 0xcf]);
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!((machine.cpu.state.rip, machine.reg(reg::RCX)), (CODE0 + 3, 0));
}

#[test]
fn delivery_itself_meets_data_breakpoints() {
    let mut machine = armed(STACK0 - 8, 1, 2);
    assert_eq!(trap(&mut machine, &[0xcd, 0x40], Machine::handler(0x40)), 0xffff_0ff1);
    let mut machine = armed(STACK0 - 8, 1, 2);
    assert_eq!(trap(&mut machine, &[0x0f, 0x0b], Machine::handler(UD)), 0xffff_0ff1);
}

#[test]
fn a_breakpoint_comes_before_the_fault_of_its_fetch() {
    let mut machine = armed(CODE3, 0, 0);
    machine.unmap(CODE3);
    machine.cpu.state.rip = CODE3;
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(0, 8)), (Some(DB), CODE3));
}
