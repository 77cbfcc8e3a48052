use std::sync::Arc;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SMM, kvm_mp_state, kvm_msr_entry,
    kvm_userspace_memory_region, kvm_vcpu_events,
};

use super::super::testing::{Program, vm};
use super::*;
use crate::Vm;
use crate::error::Error;

const SMBASE: u64 = 0x3_0000;
const HANDLER: u64 = SMBASE + 0x8000;
const RSM: &[u8] = &[0x0f, 0xaa];
const IA32_SMBASE: u32 = 0x9e;
const MSR_SMI_COUNT: u32 = 0x34;

/// A program, and 128 KiB of SMRAM at 0x30000 with a handler.
struct Smm {
    program: Program,
    _smram: Box<[Page]>,
}

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

impl Smm {
    fn new(code: &[u8], handler: &[u8]) -> Smm {
        Smm::on(vm(), code, handler)
    }

    fn on(vm: Arc<Vm>, code: &[u8], handler: &[u8]) -> Smm {
        let mut program = Program::on(vm.clone(), code);
        let table = vm.system().supported_cpuid();
        program.vcpu.set_cpuid2(&table).unwrap();
        let mut smram = vec![Page([0; 4096]); 32].into_boxed_slice();
        vm.set_user_memory_region(kvm_userspace_memory_region {
            slot: 1 << 16,
            guest_phys_addr: SMBASE,
            memory_size: 32 * 4096,
            userspace_addr: smram.as_mut_ptr() as u64,
            ..Default::default()
        })
        .unwrap();
        assert!(vm.memory().write_in(Space::Smm, HANDLER, handler));
        Smm { program, _smram: smram }
    }

    fn vcpu(&mut self) -> &mut Vcpu {
        &mut self.program.vcpu
    }

    /// The area after an SMI of the vCPU as it is.
    fn area(&mut self) -> Area {
        self.vcpu().smi();
        self.vcpu().process_smi();
        self.vcpu().prepare_events();
        assert!(self.vcpu().cpu.state.smm);
        let mut area = Area([0; AREA_SIZE]);
        assert!(self.vcpu().vm.memory().read_in(Space::Smm, SMBASE + AREA, &mut area.0));
        area
    }

    fn patch(&mut self, offset: u64, bytes: &[u8]) {
        assert!(self.vcpu().vm.memory().write_in(Space::Smm, SMBASE + offset, bytes));
    }

    fn msr(&mut self, index: u32) -> u64 {
        let mut entry = [kvm_msr_entry { index, ..Default::default() }];
        assert_eq!(self.vcpu().get_msrs(&mut entry), 1);
        entry[0].data
    }

    fn events(&mut self, change: impl Fn(&mut kvm_vcpu_events)) -> Result<(), i32> {
        let mut events = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SMM, ..Default::default() };
        change(&mut events);
        self.vcpu().set_vcpu_events(&events).map_err(|e| e.errno())
    }
}

/// mov al, 0x55; out 0x10, al; rsm
const TELLING: &[u8] = &[0xb0, 0x55, 0xe6, 0x10, 0x0f, 0xaa];

#[test]
fn an_smi_interrupts_the_program_and_rsm_resumes_it() {
    let mut smm = Smm::new(&[0x40, 0x40, 0xf4], TELLING);
    let before = (smm.vcpu().regs(), smm.vcpu().sregs());
    smm.vcpu().smi();
    let exit = smm.vcpu().run().unwrap();
    assert_eq!(exit, VcpuExit::Io { port: 0x10, size: 1, write: Some(0x55) });
    assert!(smm.vcpu().run_state().smm);
    assert_eq!((smm.vcpu().sregs().cs.base, smm.vcpu().vcpu_events().nmi.masked), (SMBASE, 1));
    assert_eq!(smm.vcpu().run().unwrap(), VcpuExit::Hlt);
    assert!(!smm.vcpu().run_state().smm);
    let regs = smm.vcpu().regs();
    assert_eq!((regs.rax, regs.rip), (2, before.0.rip + 3));
    assert_eq!((smm.vcpu().sregs(), smm.vcpu().vcpu_events().nmi.masked), (before.1, 0));
    assert_eq!(smm.msr(MSR_SMI_COUNT), 1);
}

#[test]
fn the_access_of_the_last_instruction_is_completed_before_an_smi() {
    // in al, 0x20; hlt
    let mut smm = Smm::new(&[0xe4, 0x20, 0xf4], TELLING);
    assert!(matches!(smm.vcpu().run().unwrap(), VcpuExit::Io { port: 0x20, .. }));
    smm.vcpu().complete(7);
    smm.vcpu().smi();
    assert!(matches!(smm.vcpu().run().unwrap(), VcpuExit::Io { port: 0x10, .. }));
    let mut area = Area([0; AREA_SIZE]);
    assert!(smm.vcpu().vm.memory().read_in(Space::Smm, SMBASE + AREA, &mut area.0));
    assert_eq!((area.u64(area64::RIP), area.u64(area64::REGISTERS + 8 * 15)), (Program::CODE + 2, 7));
    assert_eq!(smm.vcpu().run().unwrap(), VcpuExit::Hlt);
}

/// A state with a value of its own for each register.
fn set_up(vcpu: &mut Vcpu) {
    let mut regs = vcpu.regs();
    (regs.rax, regs.rcx, regs.rdi, regs.r8, regs.r15) = (0x11, 0x22, 0x33, 0x44, 0x55);
    regs.rflags = 0x246;
    vcpu.set_regs(&regs);
    let mut sregs = vcpu.sregs();
    (sregs.ds.base, sregs.ds.selector, sregs.ds.limit) = (0x1230, 0x123, 0xfff0);
    sregs.gdt = kvm_bindings::kvm_dtable { base: 0x5678, limit: 0x77, padding: [0; 3] };
    sregs.idt = kvm_bindings::kvm_dtable { base: 0x9abc, limit: 0x3ff, padding: [0; 3] };
    (sregs.cr3, sregs.cr4) = (0x4000, cr4::PSE);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.cpu.state.interruptibility = interruptibility::STI;
}

#[test]
fn the_area_of_a_guest_with_long_mode() {
    let mut smm = Smm::new(&[0xf4], RSM);
    set_up(smm.vcpu());
    let sregs = smm.vcpu().sregs();
    let area = smm.area();
    let words = [
        (0xff80, 0x55), // R15
        (0xffb8, 0x44), // R8
        (0xffc0, 0x33), // RDI
        (0xfff0, 0x22), // RCX
        (0xfff8, 0x11), // RAX
        (0xff78, Program::CODE),
        (0xff70, 0x246),
        (0xff68, 0xffff_0ff0),
        (0xff60, 0x400),
        (0xff58, sregs.cr0),
        (0xff50, 0x4000),
        (0xff48, cr4::PSE),
        (0xfed0, 0),
        (0xfe38, 0x1230), // DS
        (0xfe68, 0x5678), // GDTR
        (0xfe88, 0x9abc), // IDTR
    ];
    for (at, value) in words {
        assert_eq!(area.u64(at), value, "{at:#x}");
    }
    assert_eq!((area.u32(0xfefc), area.u32(0xff00)), (0x2_0064, SMBASE as u32));
    assert_eq!((area.u32(0xfe30), area.u32(0xfe34)), (0x93 << 16 | 0x123, 0xfff0));
    assert_eq!((area.u32(0xfe64), area.get::<1>(0xfecb)), (0x77, [2]));
    assert_eq!((area.u32(0xfec0), area.get::<2>(0xfec8)), (0, [0, 0]), "no restart of I/O or HLT");
    let [before, shadow] = [sregs, smm.vcpu().sregs()];
    assert_ne!(before, shadow);
    smm.vcpu().rsm();
    assert_eq!((smm.vcpu().sregs(), smm.vcpu().vcpu_events().interrupt.shadow), (before, 2));
}

#[test]
fn the_area_of_a_guest_without_long_mode() {
    let mut smm = Smm::new(&[0xf4], RSM);
    let mut table = smm.vcpu().vm.system().supported_cpuid();
    table.iter_mut().filter(|e| e.function == 0x8000_0001).for_each(|e| e.edx &= !(1 << 29));
    smm.vcpu().set_cpuid2(&table).unwrap();
    set_up(smm.vcpu());
    let sregs = smm.vcpu().sregs();
    let area = smm.area();
    let words = [
        (0xffd0, 0x11), // EAX
        (0xffd4, 0x22), // ECX
        (0xffec, 0x33), // EDI
        (0xfff0, Program::CODE),
        (0xfff4, 0x246),
        (0xfff8, 0x4000),
        (0xfffc, sregs.cr0),
        (0xff14, cr4::PSE),
        (0xffc8, 0x400),
        (0xffcc, 0xffff_0ff0),
        (0xffb4, 0x123), // DS
        (0xff2c, 0x9300),
        (0xff30, 0xfff0),
        (0xff34, 0x1230),
        (0xff70, 0x77), // GDTR
        (0xff74, 0x5678),
        (0xff58, 0x9abc), // IDTR
        (0xfefc, 0x2_0000),
        (0xfef8, SMBASE),
    ];
    for (at, value) in words {
        assert_eq!(u64::from(area.u32(at)), value, "{at:#x}");
    }
    assert_eq!(area.get::<1>(0xff1a), [2]);
    smm.vcpu().rsm();
    assert_eq!((smm.vcpu().sregs(), smm.vcpu().vcpu_events().interrupt.shadow), (sregs, 2));
}

/// A long-mode state that RSM takes, with PCIDs on.
fn long_mode(smm: &mut Smm) {
    smm.patch(area64::CR4, &(cr4::PAE | cr4::PCIDE).to_le_bytes());
    smm.patch(area64::CR3, &0x4005_u64.to_le_bytes());
    smm.patch(area64::CR0, &(cr0::PE | cr0::PG).to_le_bytes());
    smm.patch(area64::EFER, &(efer::LME | efer::LMA).to_le_bytes());
    // CS: 64-bit code of level 3; SS: data of level 3.
    smm.patch(area64::SEGMENTS + 16, &[0x33, 0, 0xfb, 0xa0, 0xff, 0xff, 0xff, 0xff]);
    smm.patch(area64::SEGMENTS + 32, &[0x2b, 0, 0xf3, 0xc0, 0xff, 0xff, 0xff, 0xff]);
}

#[test]
fn rsm_enters_long_mode() {
    let mut smm = Smm::new(&[0xf4], RSM);
    smm.area();
    long_mode(&mut smm);
    smm.vcpu().rsm();
    assert!(!smm.vcpu().events.triple_fault);
    let sregs = smm.vcpu().sregs();
    assert_eq!((sregs.efer, sregs.cr3), (efer::LME | efer::LMA, 0x4005));
    assert_eq!((sregs.cr4, sregs.cs.l, smm.vcpu().cpu.state.cpl), (cr4::PAE | cr4::PCIDE, 1, 3));
}

#[test]
fn states_that_do_not_go_together_shut_the_processor_down() {
    let cases: &[(&str, u64, u64)] = &[
        ("DR6", area64::DR6, 1 << 32),
        ("DR7", area64::DR7, 1 << 32),
        ("a bit of EFER that does not exist", area64::EFER, 1 << 7),
        ("CR3 beyond the address width", area64::CR3, 1 << 60),
        ("CR3 whose bit 63 is set", area64::CR3, 1 << 63),
        ("a bit of CR4 that does not exist", area64::CR4, 1 << 31 | cr4::PAE),
        ("VMXE", area64::CR4, cr4::VMXE | cr4::PAE),
        ("long mode without PAE", area64::CR4, 0),
        ("PCIDs without long mode", area64::EFER, 0),
        ("paging without protection", area64::CR0, cr0::PG),
        ("NW without CD", area64::CR0, cr0::PE | cr0::NW),
        ("a high bit of CR0", area64::CR0, 1 << 32),
    ];
    for (name, at, value) in cases {
        let mut smm = Smm::new(&[0xf4], RSM);
        smm.area();
        long_mode(&mut smm);
        smm.patch(*at, &value.to_le_bytes());
        assert_eq!(smm.vcpu().run().unwrap(), VcpuExit::Shutdown, "{name}");
        assert!(!smm.vcpu().run_state().smm, "{name}");
        // Whatever state that is, it can be run.
        let _ =
            smm.vcpu().run_request(crate::vcpu::RunRequest { immediate_exit: true, ..Default::default() });
    }
}

#[test]
fn smbase_is_relocated_by_the_handler() {
    // mov dword [cs:0xff00], 0x38000; rsm
    let relocate = [0x2e, 0x66, 0xc7, 0x06, 0x00, 0xff, 0x00, 0x80, 0x03, 0x00, 0x0f, 0xaa];
    let mut smm = Smm::new(&[0xf4, 0xf4], &relocate);
    smm.patch(0x1_0000, TELLING);
    smm.vcpu().smi();
    assert_eq!(smm.vcpu().run().unwrap(), VcpuExit::Hlt);
    assert_eq!(smm.msr(IA32_SMBASE), 0x3_8000);
    smm.vcpu().smi();
    assert!(matches!(smm.vcpu().run().unwrap(), VcpuExit::Io { port: 0x10, .. }));
    assert_eq!(smm.vcpu().sregs().cs.base, 0x3_8000);
}

#[test]
fn nmis_and_smis_wait_for_the_end_of_the_handler() {
    let mut smm = Smm::new(&[0x90, 0xf4], TELLING);
    smm.vcpu().smi();
    assert!(matches!(smm.vcpu().run().unwrap(), VcpuExit::Io { port: 0x10, .. }));
    smm.vcpu().nmi();
    smm.vcpu().smi();
    // The next handler, and then the NMI's.
    assert!(matches!(smm.vcpu().run().unwrap(), VcpuExit::Io { port: 0x10, .. }));
    assert_eq!((smm.msr(MSR_SMI_COUNT), smm.vcpu().vcpu_events().nmi.pending), (2, 1));
    assert_eq!(smm.vcpu().run().unwrap(), VcpuExit::Hlt);
    assert_eq!(smm.vcpu().regs().rip, 0x501);
}

#[test]
fn an_smi_in_the_handler_of_an_nmi_leaves_nmis_blocked() {
    let mut smm = Smm::new(&[0x90, 0xf4], RSM);
    smm.vcpu().cpu.state.interruptibility = interruptibility::NMI;
    smm.area();
    assert_eq!(smm.vcpu().vcpu_events().smi.smm_inside_nmi, 1);
    smm.vcpu().nmi();
    assert_eq!(smm.vcpu().run().unwrap(), VcpuExit::Hlt);
    let events = smm.vcpu().vcpu_events();
    assert_eq!((events.nmi.pending, events.nmi.masked, events.smi.smm_inside_nmi), (1, 1, 0));
    assert_eq!(smm.vcpu().regs().rip, Program::CODE + 2);
}

fn with_apic(code: &[u8], handler: &[u8]) -> Smm {
    let vm = vm();
    vm.create_irqchip().unwrap();
    Smm::on(vm, code, handler)
}

#[test]
fn init_is_latched_in_smm_and_start_up_ipis_are_lost() {
    let mut smm = with_apic(&[0xf4], TELLING);
    smm.vcpu().smi();
    assert!(matches!(smm.vcpu().run().unwrap(), VcpuExit::Io { port: 0x10, .. }));
    let lapic = smm.vcpu().lapic.clone().unwrap();
    lapic.post_init();
    lapic.post_sipi(0x12);
    assert_eq!(smm.vcpu().mp_state().mp_state, KVM_MP_STATE_RUNNABLE);
    let events = smm.vcpu().vcpu_events();
    assert_eq!((events.smi.smm, events.smi.latched_init), (1, 1));
    assert_eq!(lapic.events().sipi, None);
    let handle = smm.vcpu().handle();
    handle.interrupt();
    smm.vcpu().rsm();
    assert!(matches!(smm.vcpu().run(), Err(Error::Interrupted)));
    smm.vcpu().mp_state();
    assert_eq!(smm.vcpu().sregs().cs.base, 0xffff_0000, "reset by INIT");
    assert_eq!(smm.msr(MSR_SMI_COUNT), 0);
}

#[test]
fn an_smi_of_the_local_apic_ends_a_halt() {
    let mut smm = with_apic(&[0xf4, 0xe6, 0x20], TELLING);
    let halted = kvm_mp_state { mp_state: KVM_MP_STATE_HALTED };
    smm.vcpu().set_mp_state(halted).unwrap();
    let lapic = smm.vcpu().lapic.clone().unwrap();
    // ICR: SMI to itself.
    let _ = lapic.mmio_write(0x300, &0x4_0200_u32.to_le_bytes());
    assert!(lapic.events().smi);
    assert!(matches!(smm.vcpu().run().unwrap(), VcpuExit::Io { port: 0x10, .. }));
}

#[test]
fn an_smi_without_memory_for_the_state_kills_the_vm() {
    let mut program = Program::new(&[0xf4]);
    program.vcpu.smi();
    assert_eq!(program.vcpu.run().unwrap_err().errno(), libc::EIO);
    assert!(program.vcpu.vm.is_dead());
    // Nor does an address that wraps, or that looks like one of the other space, lead anywhere.
    for smbase in [u64::MAX - 0xff, 1 << 52, 1 << 63] {
        let mut smm = Smm::new(&[0xf4], RSM);
        let entry = kvm_msr_entry { index: IA32_SMBASE, data: smbase, ..Default::default() };
        assert_eq!(smm.vcpu().set_msrs(&[entry]), 1);
        smm.vcpu().smi();
        assert_eq!(smm.vcpu().run().unwrap_err().errno(), libc::EIO, "{smbase:#x}");
    }
}

#[test]
fn rsm_without_the_area_is_a_shutdown() {
    let mut smm = Smm::new(&[0xf4], RSM);
    smm.area();
    let entry = kvm_msr_entry { index: IA32_SMBASE, data: 0x100_0000, ..Default::default() };
    assert_eq!(smm.vcpu().set_msrs(&[entry]), 1);
    assert_eq!(smm.vcpu().run().unwrap(), VcpuExit::Shutdown);
    assert!(smm.vcpu().run_state().smm);
}

#[test]
fn events_carry_smm_to_another_vcpu() {
    let mut smm = Smm::new(&[0xf4], RSM);
    smm.area();
    let (events, regs, sregs) = (smm.vcpu().vcpu_events(), smm.vcpu().regs(), smm.vcpu().sregs());
    assert_eq!((events.smi.smm, events.smi.pending), (1, 0));
    smm.events(|e| e.smi.pending = 1).unwrap();
    let seen = smm.vcpu().vcpu_events().smi;
    assert_eq!((seen.smm, seen.pending), (0, 1));
    smm.vcpu().set_sregs(&sregs).unwrap();
    smm.vcpu().set_regs(&regs);
    smm.vcpu().set_vcpu_events(&events).unwrap();
    assert_eq!(smm.vcpu().vcpu_events(), events);
    assert_eq!(smm.vcpu().run().unwrap(), VcpuExit::Hlt);
    assert_eq!(smm.vcpu().regs().rip, Program::CODE + 1);
    // A request that nobody has looked at is not taken back.
    smm.vcpu().smi();
    smm.events(|_| ()).unwrap();
    assert_eq!(smm.vcpu().vcpu_events().smi.pending, 1);
    smm.events(|e| e.flags = KVM_VCPUEVENT_VALID_SHADOW).unwrap();
    assert_eq!(smm.vcpu().vcpu_events().smi.pending, 1);
}

#[test]
fn init_and_system_management_mode_exclude_each_other() {
    let mut smm = with_apic(&[0xf4], RSM);
    let state = |mp_state| kvm_mp_state { mp_state };
    for mp_state in [KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED] {
        smm.events(|e| e.smi.smm = 1).unwrap();
        assert_eq!(smm.vcpu().set_mp_state(state(mp_state)).unwrap_err().errno(), libc::EINVAL);
        smm.events(|e| e.smi.pending = 1).unwrap();
        assert_eq!(smm.vcpu().set_mp_state(state(mp_state)).unwrap_err().errno(), libc::EINVAL);
    }
    smm.vcpu().set_mp_state(state(KVM_MP_STATE_HALTED)).unwrap();
    smm.events(|_| ()).unwrap();
    smm.vcpu().smi();
    smm.vcpu().set_mp_state(state(KVM_MP_STATE_INIT_RECEIVED)).unwrap();
    assert_eq!(smm.events(|e| e.smi.smm = 1), Err(libc::EINVAL));
    assert_eq!(smm.events(|e| e.smi.pending = 1), Err(libc::EINVAL));
    smm.events(|e| e.smi.smm_inside_nmi = 1).unwrap();
}
