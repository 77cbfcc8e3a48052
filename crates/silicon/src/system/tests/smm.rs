//! System management mode: when an SMI can be taken, and the state that its handler begins in.

use super::{CODE0, DATA, Machine, Mode};
use crate::flags::Rflags;
use crate::mmu::ept::{Logging, Region, SMM_SPACE};
use crate::state::{Seg, TableRegister, cr0, interruptibility, reg};
use crate::vmx::{BusAccess, Exit, Injection, Space};

impl Machine {
    /// Makes the whole memory SMRAM, too.
    fn share_with_smm(&mut self) {
        let region = self.cpu.ept.find(0).unwrap();
        let smram = Region { gpa: SMM_SPACE, ..region };
        assert!(self.cpu.ept.change_region(None, Some((smram, Logging::Off))));
    }
}

#[test]
fn an_smi_is_taken_between_instructions() {
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.controls.smi_exiting = true;
    assert_eq!(machine.run(&[0x90]), Exit::Smi);
    assert_eq!((machine.cpu.state.rip, machine.cpu.exit_instruction_length), (CODE0, 0));
    // An event that is injected comes first; no instruction of its handler does.
    machine.cpu.injection = Some(Injection::Interrupt(0x40));
    assert_eq!(machine.cpu.run(), Exit::Smi);
    assert_eq!(machine.vector(), Some(0x40));
    // An interrupt shadow does not hold it back.
    machine.cpu.state.interruptibility = interruptibility::STI;
    assert_eq!(machine.cpu.run(), Exit::Smi);
    assert_eq!(machine.cpu.state.interruptibility, interruptibility::STI);
}

#[test]
fn an_smi_waits_for_the_trap_of_the_last_instruction() {
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.state.rflags_system |= Rflags::TF.bits();
    assert_eq!(machine.run(&[0x0f, 0xa2, 0x90]), Exit::Cpuid);
    machine.cpu.skip_instruction();
    machine.cpu.controls.smi_exiting = true;
    assert!(!machine.cpu.smi_allowed());
    assert_eq!(machine.cpu.run(), Exit::Smi);
    assert_eq!(machine.vector(), Some(1));
}

#[test]
fn an_smi_waits_for_the_end_of_an_instruction_that_left_guest_mode() {
    let mut machine = Machine::new(Mode::Long);
    let exit = machine.run(&[0xe4, 0x10, 0x90]);
    assert!(matches!(exit, Exit::Io(BusAccess { space: Space::Port, address: 0x10, .. })));
    assert!(!machine.cpu.smi_allowed());
    machine.cpu.complete_read(5);
    assert!(!machine.cpu.smi_allowed());
    machine.cpu.controls.smi_exiting = true;
    assert_eq!(machine.cpu.run(), Exit::Smi);
    assert_eq!((machine.cpu.state.rip, machine.reg(reg::RAX)), (CODE0 + 2, 5));
}

#[test]
fn the_handler_begins_in_the_state_of_the_sdm() {
    let mut machine = Machine::new(Mode::Long);
    machine.share_with_smm();
    machine.set(reg::RBX, 0x1234);
    let (gdtr, tr) = (machine.cpu.state.gdtr, machine.cpu.state.tr);
    // mov [0x60000], ebx (16-bit code with prefixes); rsm
    machine.put(0x3_8000, &[0x67, 0x66, 0x89, 0x1d, 0, 0, 6, 0, 0x0f, 0xaa]);
    machine.cpu.enter_smm(0x3_0000);
    let state = &machine.cpu.state;
    assert_eq!((state.rip, state.rflags(), state.cr4, state.efer), (0x8000, 2, 0, 0));
    assert_eq!(state.cr0 & (cr0::PE | cr0::PG | cr0::ET), cr0::ET);
    assert_eq!((state.dr7, state.idtr), (0x400, TableRegister { base: 0, limit: 0 }));
    assert_eq!((state.gdtr, state.tr.base, state.interruptibility), (gdtr, tr.base, interruptibility::NMI));
    let cs = &state.segs[Seg::Cs as usize];
    assert_eq!((cs.selector, cs.base, cs.limit, cs.attributes), (0x3000, 0x3_0000, u32::MAX, 0x8093));
    assert_eq!((state.segs[Seg::Ss as usize].base, state.segs[Seg::Ds as usize].limit), (0, u32::MAX));
    assert_eq!(machine.cpu.run(), Exit::Rsm);
    assert_eq!((machine.cpu.state.rip, machine.word(DATA, 4)), (0x8008, 0x1234));
    assert_eq!(machine.cpu.exit_instruction_length, 2);
    machine.cpu.controls.smi_exiting = true;
    assert!(!machine.cpu.smi_allowed());
    assert_eq!(machine.cpu.run(), Exit::Rsm, "no SMI in SMM");
}

#[test]
fn rsm_elsewhere_is_undefined() {
    for mode in [Mode::Real, Mode::Protected, Mode::Long] {
        assert_eq!(Machine::new(mode).fault(&[0x0f, 0xaa]), (6, None), "{mode:?}");
    }
    let mut machine = Machine::new(Mode::Long);
    machine.set_ring(3);
    assert_eq!(machine.fault(&[0x0f, 0xaa]).0, 6);
}
