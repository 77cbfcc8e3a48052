//! Split locks and bus locks of guests in protected mode: the processor's own accesses to descriptors, which an instruction or
//! the delivery of an event makes, and the traps that a guest has asked for (docs/features/split-lock.md).

mod guest;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use guest::{CODE, Guest};
use hypervisor::split_lock::{Policy, VmPolicy};
use hypervisor::{HostParams, System, Vcpu, VcpuExit};
use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment};
use silicon::model::CpuModel;

/// The GDT; its entry 8 lies in two cache lines.
const GDT: u64 = 0x503a;
const IDT: u64 = 0x6000;
const TSS: u64 = 0x6800;
/// Where handlers are.
const HANDLER: u64 = 0x4000;
/// Where code for CPL 3 is.
const USER: u64 = 0x3000;
/// The doubleword that is incremented: its bytes lie in two cache lines.
const WORD: u64 = 0x203e;
/// Where the handler of #DB stores DR6 and the EIP of its frame.
const SEEN: u64 = 0x2200;
/// Selector of the entry that lies in two cache lines.
const SPLIT: u16 = 0x40;

/// Detection is on whatever guests do, and what it refuses is done all the same.
const EMULATE: &str = "split_lock_detect=fatal ring3.split_lock_policy=emulate";
/// Every way for a split lock of a guest without detection to be executed.
const EXECUTING: [&str; 4] =
    ["split_lock_detect=off", "split_lock_detect=warn kernel.split_lock_mitigate=0", "smt=on", EMULATE];

const HLT: u8 = 0xf4;
/// `mov ax, 0x40; mov ds, ax`
const LOAD: &[u8] = &[0x66, 0xb8, 0x40, 0, 0x8e, 0xd8];
/// `mov ax, 0x40; ltr ax`
const LTR: &[u8] = &[0x66, 0xb8, 0x40, 0, 0x0f, 0x00, 0xd8];
/// `ud2`
const UD2: &[u8] = &[0x0f, 0x0b];
/// `int 0x30`
const INT: &[u8] = &[0xcd, 0x30];
/// `lock inc dword ss:[0x203e]`
const LOCK: &[u8] = &[0x36, 0xf0, 0xff, 0x05, 0x3e, 0x20, 0, 0];
/// IA32_DEBUGCTL := 4: `mov ecx, 0x1d9; xor edx, edx; mov eax, 4; wrmsr`
const DETECT_BUS_LOCKS: &[u8] = &[0xb9, 0xd9, 0x01, 0, 0, 0x31, 0xd2, 0xb8, 4, 0, 0, 0, 0x0f, 0x30];
/// Stores DR6 and EIP at [`SEEN`] (DS is null after IRET to CPL 3): `mov eax, dr6; mov ss:[0x2200], eax; mov eax, [esp];
/// mov ss:[0x2204], eax; hlt`
const LOOK: &[u8] =
    &[0x0f, 0x21, 0xf0, 0x36, 0xa3, 0x00, 0x22, 0, 0, 0x8b, 0x04, 0x24, 0x36, 0xa3, 0x04, 0x22, 0, 0, HLT];

struct Machine {
    system: Arc<System>,
    guest: Guest,
    vcpu: Vcpu,
}

/// A descriptor of 4 GiB from 0, or of a TSS.
fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> [u8; 8] {
    let value = limit & 0xffff | (base & 0xff_ffff) << 16 | access << 40 | (limit >> 16) << 48 | flags << 52;
    value.to_le_bytes()
}

fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

impl Machine {
    /// A guest at CPL 0 with a program, whose entry 8 of the GDT has this access byte.
    fn new(host: &str, program: &[&[u8]], access: u8) -> Machine {
        let system = System::new(CpuModel::parse("max").unwrap(), HostParams::parse(host).unwrap());
        let guest = Guest::new(system.create_vm().unwrap(), &program.concat(), 0);
        let tss = descriptor(TSS, 0x67, 0x8b, 0);
        let flat = |access| descriptor(0, 0xf_ffff, access, 0xc);
        let gdt = [
            [0; 8],
            flat(0x9b),
            flat(0x93),
            flat(0xfb),
            flat(0xf3),
            tss,
            [0; 8],
            [0; 8],
            flat(access.into()),
        ];
        let mut vcpu = guest.vcpu(0);
        vcpu.set_cpuid2(&system.supported_cpuid()).unwrap();
        let mut sregs = vcpu.sregs();
        sregs.cr0 |= 1;
        sregs.cs = segment(8, 11);
        for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            *data = segment(0x10, 3);
        }
        sregs.tr = kvm_segment { base: TSS, limit: 0x67, s: 0, g: 0, db: 0, ..segment(0x28, 11) };
        sregs.gdt = kvm_dtable { base: GDT, limit: 0x47, ..Default::default() };
        sregs.idt = kvm_dtable { base: IDT, limit: 0x3ff, ..Default::default() };
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&kvm_regs { rip: CODE, rsp: 0x8000, rflags: 2, ..Default::default() });
        let machine = Machine { system, guest, vcpu };
        machine.write(GDT, &gdt.concat());
        // Stack of CPL 0.
        machine.write(TSS + 4, &[0, 0x90, 0, 0, 0x10, 0]);
        machine
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        assert!(self.guest.vm.memory().write(at, bytes));
    }

    fn word(&self, at: u64) -> u32 {
        let mut word = [0; 4];
        assert!(self.guest.vm.memory().read(at, &mut word));
        u32::from_le_bytes(word)
    }

    /// A vector's handler, by an interrupt gate.
    fn handler(&self, vector: u64, selector: u16, code: &[u8]) {
        let gate = HANDLER & 0xffff | u64::from(selector) << 16 | 0x8e << 40;
        self.write(IDT + 8 * vector, &gate.to_le_bytes());
        self.write(HANDLER, code);
    }

    /// Access byte of the entry that lies in two cache lines.
    fn access(&self) -> u8 {
        self.guest.byte(GDT + u64::from(SPLIT) + 5)
    }

    fn emulated(&self) -> u64 {
        self.vcpu.handle().stats.split_locks_emulated.load(Ordering::Relaxed)
    }

    /// Runs to HLT; where that is, and that detection is as it was.
    fn halts_at(&mut self, address: u64) {
        let bit = || self.system.processors().test_ctrl(self.guest.vm.place()).get();
        let before = bit();
        assert_eq!(self.vcpu.run().unwrap(), VcpuExit::Hlt, "at {:#x}", self.vcpu.regs().rip);
        assert_eq!((self.vcpu.regs().rip, bit()), (address + 1, before));
    }
}

/// B8: accessed and busy bits that an instruction sets.
#[test]
fn sl_b8_descriptors_that_instructions_load_are_emulated() {
    for (program, before, after) in [(LOAD, 0x92, 0x93), (LTR, 0x89, 0x8b)] {
        let mut machine = Machine::new(EMULATE, &[program, &[HLT]], before);
        machine.halts_at(CODE + program.len() as u64);
        assert_eq!((machine.access(), machine.emulated()), (after, 1));
        // It is set already: no lock, nothing to emulate.
        let mut machine = Machine::new(EMULATE, &[LOAD, &[HLT]], 0x93);
        machine.halts_at(CODE + LOAD.len() as u64);
        assert_eq!(machine.emulated(), 0);
    }
}

/// What the guest does to descriptors does not take detection away from anybody for a moment: somebody looks all the time.
#[test]
fn sl_e6_detection_is_on_while_descriptor_accesses_are_emulated() {
    // mov ecx, 5000; mov byte ss:[GDT + 0x45], 0x92; load DS; dec ecx; jnz; hlt
    let clear = [&[0x36, 0xc6, 0x05][..], &(GDT as u32 + 0x45).to_le_bytes(), &[0x92]].concat();
    let program: &[&[u8]] = &[&[0xb9, 0x88, 0x13, 0, 0], &clear, LOAD, &[0x49, 0x75, 0xef, HLT]];
    let Machine { system, guest, mut vcpu } = Machine::new(EMULATE, program, 0x92);
    let bit = system.processors().test_ctrl(guest.vm.place());
    let handle = vcpu.handle();
    std::thread::scope(|scope| {
        let running = scope.spawn(move || vcpu.run().map_err(|error| error.errno()));
        while !running.is_finished() {
            assert_eq!(bit.get(), 1 << 29);
        }
        assert_eq!(running.join().unwrap(), Ok(VcpuExit::Hlt));
    });
    assert_eq!(handle.stats.split_locks_emulated.load(Ordering::Relaxed), 5000);
}

/// The client of a VM that is to exit hears that it was no operand.
#[test]
fn sl_b8_descriptor_accesses_exit_as_implicit() {
    let mut machine = Machine::new("split_lock_detect=fatal", &[LOAD, &[HLT]], 0x92);
    let policy = VmPolicy { policy: Policy::Exit, enforced: false };
    machine.guest.vm.set_split_lock_policy(policy.bits().into()).unwrap();
    let Ok(VcpuExit::SplitLock(exit)) = machine.vcpu.run() else { panic!("no exit") };
    let at = GDT + u64::from(SPLIT);
    assert_eq!((exit.implicit, exit.linear_address, exit.gpa, exit.size), (true, at, at, 8));
    assert_eq!((exit.rip, machine.access()), (CODE + 4, 0x92));
}

/// Events of every kind whose gate leads to a code segment that has not been accessed. Each access costs one emulation, and
/// the event is delivered once.
#[test]
fn sl_b8_descriptor_accesses_during_the_delivery_of_events_are_emulated() {
    for (name, program, vector, return_to) in [
        ("fault", UD2, 6, CODE),
        ("software interrupt", INT, 0x30, CODE + 2),
        ("external interrupt", &[0x90][..], 0x31, CODE),
        ("NMI", &[0x90][..], 2, CODE),
    ] {
        let mut machine = Machine::new(EMULATE, &[program, &[HLT]], 0x9a);
        machine.handler(vector, SPLIT, LOOK);
        let regs = machine.vcpu.regs();
        machine.vcpu.set_regs(&kvm_regs { rflags: 0x202, ..regs });
        match vector {
            0x31 => machine.vcpu.interrupt(0x31).unwrap(),
            2 => machine.vcpu.nmi(),
            _ => {}
        }
        machine.halts_at(HANDLER + LOOK.len() as u64 - 1);
        assert_eq!((machine.access(), machine.emulated()), (0x9b, 1), "{name}");
        assert_eq!(u64::from(machine.word(SEEN + 4)), return_to, "{name}");
        assert_eq!(machine.vcpu.regs().rsp, 0x8000 - 12, "{name}: one frame");
    }
}

/// A split lock may be executed, and then an event splits: each needs its own permission.
#[test]
fn sl_b8_permission_does_not_reach_from_an_instruction_into_an_event() {
    let mut machine = Machine::new(EMULATE, &[LOCK, UD2], 0x9a);
    machine.handler(6, SPLIT, LOOK);
    machine.halts_at(HANDLER + LOOK.len() as u64 - 1);
    assert_eq!((machine.access(), machine.emulated(), machine.word(WORD)), (0x9b, 2, 1));
}

/// A machine whose program asks for traps of bus locks, does `first`, and goes on at CPL 3 with `rflags`.
fn at_user(host: &str, first: &[u8], rflags: u32, user: &[u8]) -> Machine {
    // push 0x23; push 0x8800; push RFLAGS; push 0x1b; push USER; iret
    let frame = [
        &[0x6a, 0x23, 0x68, 0x00, 0x88, 0, 0, 0x68][..],
        &rflags.to_le_bytes(),
        &[0x6a, 0x1b, 0x68],
        &(USER as u32).to_le_bytes(),
        &[0xcf],
    ]
    .concat();
    let machine = Machine::new(host, &[DETECT_BUS_LOCKS, first, &frame], 0x93);
    machine.write(USER, user);
    machine.handler(1, 8, LOOK);
    machine
}

/// Bits of DR6 that say what has happened; the one of bus locks is active low.
const BUS_LOCK: u32 = 1 << 11;
const STEP: u32 = 1 << 14;
const CAUSES: u32 = 0xf | BUS_LOCK | STEP | 1 << 13 | 1 << 15;

/// B5: nothing at CPL 0; at CPL 3 one #DB behind the instruction.
#[test]
fn sl_b5_bus_lock_traps_of_a_guest() {
    for host in EXECUTING {
        let mut machine = at_user(host, LOCK, 2, &[LOCK, &[0x90]].concat());
        machine.halts_at(HANDLER + LOOK.len() as u64 - 1);
        assert_eq!(machine.word(SEEN) & CAUSES, 0, "{host}: a bus lock alone");
        assert_eq!((machine.word(SEEN + 4), machine.word(WORD)), (USER as u32 + 8, 2), "{host}");
    }
}

/// Without the guest's bit there is no trap: the next instruction faults.
#[test]
fn sl_b5_no_trap_that_the_guest_has_not_asked_for() {
    let mut machine = Machine::new("split_lock_detect=off", &[LOCK, UD2], 0x93);
    machine.handler(6, 8, LOOK);
    machine.halts_at(HANDLER + LOOK.len() as u64 - 1);
    assert_eq!((machine.word(SEEN) & CAUSES, machine.word(WORD)), (BUS_LOCK, 1));
}

/// B6: one #DB for the bus lock, the single step and a breakpoint on the operand.
#[test]
fn sl_b6_bus_lock_traps_come_with_other_traps() {
    for host in EXECUTING {
        let mut machine = at_user(host, &[], 0x102, LOCK);
        machine.halts_at(HANDLER + LOOK.len() as u64 - 1);
        assert_eq!(machine.word(SEEN) & CAUSES, STEP, "{host}");
        assert_eq!((machine.word(SEEN + 4), machine.word(WORD)), (USER as u32 + 8, 1), "{host}");
        // DR0: two bytes at 0x203e, written.
        let mut machine = at_user(host, &[], 0x102, LOCK);
        let dr7 = 0x5_0401;
        let regs = kvm_debugregs { db: [WORD, 0, 0, 0], dr7, ..machine.vcpu.debugregs() };
        machine.vcpu.set_debugregs(&regs).unwrap();
        machine.halts_at(HANDLER + LOOK.len() as u64 - 1);
        assert_eq!(machine.word(SEEN) & CAUSES, STEP | 1, "{host}");
        assert_eq!((machine.word(SEEN + 4), machine.word(WORD)), (USER as u32 + 8, 1), "{host}");
    }
}
