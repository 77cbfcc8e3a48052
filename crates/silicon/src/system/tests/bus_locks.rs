//! Split-lock detection, UC-lock disable, bus-lock traps and exits.

use super::*;
use crate::bus_lock::{LockKind, TestCtrl, debugctl, test_ctrl};
use crate::exception::Exception;
use crate::exception::vector::{AC, DB, GP, PF};
use crate::flags::Rflags;
use crate::system::deliver::Event;
use crate::vmx::{BusAccess, Injection, Space};

/// `lock inc dword [rbx]`.
const LOCK_INC: &[u8] = &[0xf0, 0xff, 0x03];
/// Length of [`LOCK_INC`].
const LOCK_INC_LEN: u64 = LOCK_INC.len() as u64;
/// Where four bytes are split.
const SPLIT: u64 = DATA + 62;
/// Guest-physical memory that no region backs, mapped at this linear address.
const DEVICE: u64 = 0x6_4000;
/// DR6 after a bus-lock trap and nothing else.
const DR6_BLD: u64 = 0xffff_07f0;

/// 64-bit mode at `cpl` with MSR_TEST_CTRL `control`; #AC exits.
fn machine(cpl: u8, control: u64) -> Machine {
    let mut machine = Machine::new(Mode::Long);
    machine.cpu.test_ctrl.set(control);
    machine.cpu.controls.exception_bitmap = 1 << AC;
    machine.set_ring(cpl);
    machine.set(reg::RBX, SPLIT);
    machine
}

/// The same without exits for exceptions, and with DEBUGCTL.BLD.
fn trapping(cpl: u8) -> Machine {
    let mut machine = machine(cpl, 0);
    machine.cpu.controls.exception_bitmap = 0;
    machine.cpu.state.debugctl = debugctl::BUS_LOCK_DETECT;
    machine
}

/// Runs `code` at RIP; CPUID, which exits at every CPL, follows it.
fn go(machine: &mut Machine, code: &[u8]) -> Exit {
    let at = machine.code();
    machine.put(at, code);
    machine.put(at + code.len() as u64, &[0x0f, 0xa2]);
    machine.cpu.run()
}

/// Runs `code`, which must come to its end, and goes back.
fn completes(machine: &mut Machine, code: &[u8], what: &str) {
    let at = machine.cpu.state.rip;
    assert_eq!(go(machine, code), Exit::Cpuid, "{what}: {code:02x?}");
    assert_eq!(machine.cpu.state.rip, at + code.len() as u64, "{what}: {code:02x?}");
    machine.cpu.state.rip = at;
}

/// Runs `code`, whose first instruction must be refused with #AC(0) and without any effect.
fn refused(machine: &mut Machine, code: &[u8], what: &str) -> Option<LockKind> {
    let rip = machine.cpu.state.rip;
    let (regs, flags) = (machine.cpu.state.regs, machine.cpu.state.rflags());
    let memory = [DATA, DATA + 56, DATA + 64].map(|gpa| machine.word(gpa, 8));
    assert_eq!(go(machine, code), Exit::Exception(Exception::AC), "{what}: {code:02x?}");
    assert_eq!(machine.cpu.state.rip, rip, "{what}");
    assert_eq!(usize::from(machine.cpu.exit_instruction_length), code.len(), "{what}");
    assert_eq!(machine.cpu.state.regs[..16], regs[..16], "{what}");
    assert_eq!(machine.cpu.state.rflags(), flags, "{what}");
    assert_eq!([DATA, DATA + 56, DATA + 64].map(|gpa| machine.word(gpa, 8)), memory, "{what}");
    machine.cpu.refused_lock.map(|lock| lock.kind)
}

/// Maps the page of `lin` to `page` with more bits in its entry.
fn map(machine: &mut Machine, lin: u64, page: u64, bits: u64) {
    machine.put_word(TABLES + 0x3000 + 8 * (lin >> 12), 8, (page & !0xfff) | 7 | bits);
    machine.cpu.flush_all(false);
}

/// Copies the GDT to `base` and uses it there.
fn move_gdt(machine: &mut Machine, base: u64) {
    for at in 0..=u64::from(sel::LAST) {
        let byte = machine.word(GDT + at, 1);
        machine.put_word(base + at, 1, byte);
    }
    machine.cpu.state.gdtr.base = base;
}

/// PTE bits of uncacheable memory: PCD and PWT.
const UC: u64 = 0x18;

#[test]
fn sl_b2_every_split_word_is_refused_at_every_privilege() {
    for (cpl, am, ac) in (0..8).map(|n| (if n & 1 != 0 { 3 } else { 0 }, n & 2 != 0, n & 4 != 0)) {
        let mut machine = machine(cpl, test_ctrl::SPLIT_LOCK_DETECT);
        if am {
            machine.cpu.state.cr0 |= cr0::AM;
        }
        if ac {
            machine.cpu.state.rflags_system |= Rflags::AC.bits();
        }
        machine.cpu.refresh_mode();
        machine.set(reg::RCX, 0x0101_0101_0101_0101);
        let adds: [(u64, &[u8]); 4] = [
            (1, &[0xf0, 0x00, 0x0b]),
            (2, &[0x66, 0xf0, 0x01, 0x0b]),
            (4, &[0xf0, 0x01, 0x0b]),
            (8, &[0xf0, 0x48, 0x01, 0x0b]),
        ];
        for (size, code) in adds {
            for k in 0..8 {
                let lin = DATA + 64 - k;
                machine.set(reg::RBX, lin);
                let what = format!("cpl {cpl} am {am} ac {ac} size {size} line_end-{k}");
                let split = (lin & 63) + size > 64;
                let legacy = cpl == 3 && am && ac && !lin.is_multiple_of(size);
                if split || legacy {
                    let cause = refused(&mut machine, code, &what);
                    assert_eq!(cause, (!legacy).then_some(LockKind::Split), "{what}");
                } else {
                    let before = machine.word(lin, size as usize);
                    completes(&mut machine, code, &what);
                    assert_ne!(machine.word(lin, size as usize), before, "{what}");
                    assert_eq!(machine.cpu.refused_lock, None);
                }
            }
        }
    }
}

/// Every lockable operation on dwords at \[rbx\], without its LOCK prefix, and its name.
const OPERATIONS: &[(&[u8], &str)] = &[
    (&[0x01, 0x0b], "add"),
    (&[0x83, 0x03, 0x01], "add imm"),
    (&[0x11, 0x0b], "adc"),
    (&[0x21, 0x0b], "and"),
    (&[0x09, 0x0b], "or"),
    (&[0x19, 0x0b], "sbb"),
    (&[0x29, 0x0b], "sub"),
    (&[0x31, 0x0b], "xor"),
    (&[0x0f, 0xbb, 0x13], "btc"),
    (&[0x0f, 0xb3, 0x13], "btr"),
    (&[0x0f, 0xab, 0x13], "bts"),
    (&[0x0f, 0xba, 0x3b, 0x05], "btc imm"),
    (&[0x0f, 0xba, 0x33, 0x05], "btr imm"),
    (&[0x0f, 0xba, 0x2b, 0x05], "bts imm"),
    (&[0x0f, 0xb1, 0x0b], "cmpxchg"),
    (&[0xff, 0x0b], "dec"),
    (&[0xff, 0x03], "inc"),
    (&[0xf7, 0x1b], "neg"),
    (&[0xf7, 0x13], "not"),
    (&[0x0f, 0xc1, 0x0b], "xadd"),
    (&[0x87, 0x0b], "xchg"),
];

#[test]
fn sl_b3_every_lockable_operation_is_refused() {
    let mut machine = machine(0, test_ctrl::SPLIT_LOCK_DETECT);
    machine.set(reg::RCX, 0x1234_5678_9abc_def1);
    machine.set(reg::RDX, 3);
    let mut check = |code: &[u8], size: u64, name: &str| {
        machine.cpu.test_ctrl.set(test_ctrl::SPLIT_LOCK_DETECT);
        machine.set(reg::RBX, DATA + 63);
        assert_eq!(refused(&mut machine, code, name), Some(LockKind::Split), "{name}");
        let lock = machine.cpu.refused_lock.unwrap();
        assert_eq!((lock.lin, lock.gpa, u64::from(lock.size)), (DATA + 63, DATA + 63, size), "{name}");
        machine.set(reg::RBX, DATA + 64 - size);
        completes(&mut machine, code, name);
        let locks = machine.cpu.counters.bus_locks;
        machine.cpu.test_ctrl.set(0);
        machine.set(reg::RBX, DATA + 63);
        completes(&mut machine, code, name);
        assert_eq!(machine.cpu.counters.bus_locks, locks + 1, "{name}");
    };
    for (operation, name) in OPERATIONS {
        let with = |prefix: &[u8]| [prefix, operation].concat();
        check(&with(&[0xf0]), 4, name);
        check(&with(&[0xf0, 0x48]), 8, name);
        check(&with(&[0x66, 0xf0]), 2, name);
        check(&with(&[0xf0, 0x66]), 2, name);
        if *name == "xchg" {
            check(operation, 4, "xchg without a prefix");
            check(&with(&[0x66]), 2, "xchg without LOCK");
            check(&with(&[0x48]), 8, "xchg without LOCK");
        }
    }
    check(&[0xf0, 0x0f, 0xc7, 0x0b], 8, "cmpxchg8b");
}

#[test]
fn sl_b3_bit_strings_are_looked_at_where_the_bit_is() {
    let mut machine = machine(0, test_ctrl::SPLIT_LOCK_DETECT);
    let bts: &[u8] = &[0xf0, 0x0f, 0xab, 0x0b];
    // (base, bit offset, refused)
    for (base, bit, split) in [
        (DATA + 2, 15 * 32, true),
        (DATA + 2, 14 * 32 + 31, false),
        (DATA + 2, 16 * 32, false),
        (DATA + 66, -1i64, true),
        (DATA + 66, -33, false),
        (DATA + 62, 0, true),
        (DATA + 62, 32, false),
    ] {
        machine.set(reg::RBX, base);
        machine.set(reg::RCX, bit as u64);
        let what = format!("{base:#x} {bit}");
        if split {
            assert_eq!(refused(&mut machine, bts, &what), Some(LockKind::Split), "{what}");
            assert_eq!(machine.cpu.refused_lock.map(|lock| lock.lin), Some(SPLIT), "{what}");
        } else {
            completes(&mut machine, bts, &what);
        }
    }
}

#[test]
fn sl_b4_accesses_without_a_lock_are_let_through() {
    for cpl in [0, 3] {
        let mut machine = machine(cpl, test_ctrl::SPLIT_LOCK_DETECT | test_ctrl::UC_LOCK_DISABLE);
        machine.cpu.state.debugctl = debugctl::BUS_LOCK_DETECT;
        machine.cpu.state.cr4 |= cr4::OSFXSR;
        for code in
            [&[0x01, 0x0b][..], &[0x0f, 0x11, 0x03], &[0x8b, 0x0b], &[0x89, 0x0b], &[0x0f, 0xab, 0x0b]]
        {
            completes(&mut machine, code, "no lock");
        }
        assert_eq!(machine.cpu.counters.bus_locks, 0);
    }
}

#[test]
fn sl_page_faults_win_over_split_lock_detection() {
    let mut machine = machine(0, test_ctrl::SPLIT_LOCK_DETECT);
    machine.set(reg::RBX, DATA + 0xffe);
    machine.unmap(DATA + 0x1000);
    machine.cpu.controls.exception_bitmap = 1 << PF | 1 << AC;
    assert_eq!(go(&mut machine, LOCK_INC), Exit::Exception(Exception::pf(DATA + 0x1000, 2)));
    assert_eq!(machine.cpu.refused_lock, None);
    map(&mut machine, DATA + 0x1000, DATA + 0x1000, 0);
    assert_eq!(go(&mut machine, LOCK_INC), Exit::Exception(Exception::AC));
}

#[test]
fn sl_b5_bus_locks_above_level_0_trap() {
    let mut kernel = trapping(0);
    completes(&mut kernel, LOCK_INC, "level 0");
    let mut user = trapping(3);
    let code = [&[0x90], LOCK_INC, LOCK_INC].concat();
    assert_eq!(user.run(&code), Exit::Hlt);
    assert_eq!((user.vector(), user.top(0, 8)), (Some(DB), CODE3 + 1 + LOCK_INC_LEN));
    assert_eq!((user.cpu.state.dr6, user.word(SPLIT, 4)), (DR6_BLD, 1));
    assert_eq!(user.cpu.counters.bus_locks, 1);
    // Only a bus-lock trap clears the bit, and nothing sets it.
    user.set_ring(3);
    user.cpu.state.dr6 = 0xffff_0ff0;
    user.cpu.state.debugctl = 0;
    user.cpu.state.rflags_system |= Rflags::TF.bits();
    assert_eq!(user.run(LOCK_INC), Exit::Hlt);
    assert_eq!((user.vector(), user.cpu.state.dr6), (Some(DB), 0xffff_4ff0));
    user.set_ring(3);
    user.cpu.state.dr6 = DR6_BLD;
    user.cpu.state.rflags_system |= Rflags::TF.bits();
    assert_eq!(user.run(&[0x90]), Exit::Hlt);
    assert_eq!(user.cpu.state.dr6, DR6_BLD | 1 << 14);
}

#[test]
fn sl_b6_one_trap_has_all_causes() {
    let mut stepped = trapping(3);
    stepped.cpu.state.rflags_system |= Rflags::TF.bits();
    assert_eq!(stepped.run(LOCK_INC), Exit::Hlt);
    assert_eq!((stepped.vector(), stepped.top(0, 8)), (Some(DB), CODE3 + LOCK_INC_LEN));
    assert_eq!(stepped.cpu.state.dr6, DR6_BLD | 1 << 14);
    let mut watched = trapping(3);
    watched.cpu.state.dr[1] = SPLIT & !3;
    watched.cpu.state.dr7 = 0x400 | 1 << 2 | 0b1101 << 20;
    assert_eq!(watched.run(LOCK_INC), Exit::Hlt);
    assert_eq!((watched.vector(), watched.cpu.state.dr6), (Some(DB), DR6_BLD | 2));
}

#[test]
fn sl_b7_mov_to_dr6_with_and_without_bus_lock_detection() {
    for (model, values) in
        [("sapphire-rapids", [0xffff_07f0, 0xffff_eff0 | 0xf]), ("skylake", [0xffff_0ff0, 0xffff_eff0 | 0xf])]
    {
        let mut machine = Machine::new(Mode::Long);
        machine.cpu.set_features(CpuModel::parse(model).unwrap().features());
        for (written, read) in [0, 0xffff_ffff].into_iter().zip(values) {
            machine.set(reg::RAX, written);
            machine.finish(&[0x0f, 0x23, 0xf0, 0x0f, 0x21, 0xf1]); // mov dr6, rax; mov rcx, dr6
            assert_eq!(machine.reg(reg::RCX), read, "{model}");
        }
    }
}

/// Instructions that set a bit in the descriptor that selector 40H names, and that descriptor without and with it.
fn descriptor_loads() -> [(&'static str, &'static [u8], u64, u64); 3] {
    let code = |rights| descriptor(0, 0xf_ffff, rights, 0xa);
    let data = |rights| descriptor(0, 0xf_ffff, rights, 0xc);
    [
        ("mov ds", &[0x8e, 0xd8], data(0x92), data(0x93)),
        // push rax; push the next address; lea of it is in RDX
        ("far return", &[0x50, 0x52, 0x48, 0xcb], code(0x9a), code(0x9b)),
        ("far call", &[0xff, 0x1e], code(0x9a), code(0x9b)),
    ]
}

#[test]
fn sl_b8_descriptor_updates_take_locks_of_eight_bytes() {
    for (offset, split) in [(58, true), (60, true), (56, false), (0, false)] {
        for (name, code, clear, set) in descriptor_loads() {
            for (low, locked) in [(clear, true), (set, false)] {
                let what = format!("{name}, base 64n+{offset}, locked {locked}");
                let mut machine = machine(0, test_ctrl::SPLIT_LOCK_DETECT);
                machine.gdt(0x40, low);
                move_gdt(&mut machine, DATA + offset);
                machine.set(reg::RAX, 0x40);
                machine.set(reg::RDX, CODE0 + 0x100);
                machine.set(reg::RSI, DATA + 0x800);
                machine.put_word(DATA + 0x800, 4, CODE0 + 0x100);
                machine.put_word(DATA + 0x804, 2, 0x40);
                machine.put(CODE0 + 0x100, &[0xf4]);
                let exit = machine.run(code);
                if split && locked {
                    assert_eq!(exit, Exit::Exception(Exception::AC), "{what}");
                    let lock = machine.cpu.refused_lock.unwrap();
                    assert_eq!(
                        (lock.lin, lock.size, lock.implicit),
                        (DATA + offset + 0x40, 8, true),
                        "{what}"
                    );
                    assert_eq!(machine.word(DATA + offset + 0x40, 8), low, "{what}");
                    machine.cpu.test_ctrl.set(0);
                    assert_eq!(machine.cpu.run(), Exit::Hlt, "{what}");
                } else {
                    assert_eq!(exit, Exit::Hlt, "{what}");
                }
                assert_eq!(machine.word(DATA + offset + 0x40, 8), set, "{what}");
                assert_eq!(machine.cpu.counters.bus_locks, u64::from(split && locked), "{what}");
            }
        }
    }
}

#[test]
fn sl_b8_ltr_takes_a_lock_and_lsl_does_not() {
    let mut machine = machine(0, test_ctrl::SPLIT_LOCK_DETECT);
    machine.gdt(0x40, descriptor(TSS, 0x1ff, 0x89, 0));
    machine.gdt(0x48, 0);
    move_gdt(&mut machine, DATA + 58);
    machine.set(reg::RAX, 0x40);
    machine.finish(&[0x0f, 0x03, 0xc8]); // lsl ecx, eax
    assert_eq!(machine.reg(reg::RCX), 0x1ff);
    assert_eq!(machine.run(&[0x0f, 0x00, 0xd8]), Exit::Exception(Exception::AC)); // ltr ax
    assert!(machine.cpu.refused_lock.is_some_and(|lock| lock.implicit && lock.kind == LockKind::Split));
    machine.cpu.permitted_lock = Some(LockKind::Split);
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!((machine.word(DATA + 58 + 0x45, 1), machine.cpu.state.tr.selector), (0x8b, 0x40));
}

#[test]
fn sl_b8_an_event_whose_delivery_splits_is_vectoring() {
    let mut machine = machine(0, test_ctrl::SPLIT_LOCK_DETECT);
    machine.gdt(0x40, descriptor(0, 0xf_ffff, 0x9a, 0xa));
    move_gdt(&mut machine, DATA + 58);
    machine.idt(0x40, gate(14, 0, 0x40, Machine::handler(0x40), 0));
    machine.cpu.state.rflags_system |= Rflags::IF.bits();
    machine.cpu.injection = Some(Injection::Interrupt(0x40));
    assert_eq!(machine.run(&[0x90]), Exit::Exception(Exception::AC));
    assert_eq!(machine.cpu.idt_vectoring, Some(Event::Interrupt(0x40)));
    assert!(machine.cpu.refused_lock.is_some());
    // The permission to make the access covers the delivery that is tried again, and ends with it.
    machine.cpu.permitted_lock = Some(LockKind::Split);
    machine.cpu.injection = Some(Injection::Interrupt(0x40));
    assert_eq!((machine.cpu.run(), machine.vector()), (Exit::Hlt, Some(0x40)));
    assert_eq!(machine.cpu.permitted_lock, None);
    assert_eq!(machine.cpu.counters.bus_locks, 1);
    let at = machine.cpu.state.gdtr.base + 0x45;
    machine.put_word(at, 1, 0x9a);
    machine.cpu.state.rip = CODE0;
    // With detection off the delivery takes a bus lock, which is reported in the handler.
    machine.cpu.test_ctrl.set(0);
    machine.cpu.controls.bus_lock_detection = true;
    machine.cpu.injection = Some(Injection::Interrupt(0x40));
    assert_eq!(machine.cpu.run(), Exit::BusLock);
    assert!(machine.cpu.exit_bus_lock && machine.vector() == Some(0x40));
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert!(!machine.cpu.exit_bus_lock);
    // Not intercepted, #AC is delivered in its place: a benign event's delivery never ends in #DF.
    let mut machine = self::machine(0, test_ctrl::SPLIT_LOCK_DETECT);
    machine.cpu.controls.exception_bitmap = 0;
    machine.gdt(0x40, descriptor(0, 0xf_ffff, 0x9a, 0xa));
    move_gdt(&mut machine, DATA + 58);
    machine.idt(0x40, gate(14, 0, 0x40, Machine::handler(0x40), 0));
    assert_eq!(machine.run(&[0xcd, 0x40]), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(0, 8), machine.top(1, 8)), (Some(AC), 0, CODE0));
}

#[test]
fn sl_b9_locks_on_memory_that_is_not_write_back() {
    const WC_PAT: u64 = 0x0107_0406_0007_0406;
    // (PTE bits, IA32_PAT, not write-back)
    for (bits, pat, uncached) in [
        (0, crate::model::msrs::PAT_RESET, false),
        (UC, crate::model::msrs::PAT_RESET, true),
        (0x10, crate::model::msrs::PAT_RESET, true),
        (0x08, crate::model::msrs::PAT_RESET, true),
        (0x80, crate::model::msrs::PAT_RESET, false),
        (0x98, WC_PAT, true),
        (UC, 0x0606_0606_0606_0606, false),
    ] {
        let what = format!("entry {bits:#x}, PAT {pat:#x}");
        let mut machine = machine(0, test_ctrl::SPLIT_LOCK_DETECT);
        machine.cpu.state.pat = pat;
        machine.set(reg::RBX, DATA);
        machine.set(reg::RDX, 0);
        map(&mut machine, DATA, DATA, bits);
        // A store first, so that the translation is cached with write rights.
        let code = [&[0x89, 0x13], LOCK_INC, LOCK_INC].concat();
        completes(&mut machine, &code, &what);
        assert_eq!(
            (machine.word(DATA, 4), machine.cpu.counters.bus_locks),
            (2, 2 * u64::from(uncached)),
            "{what}"
        );
        machine.cpu.test_ctrl.set(test_ctrl::UC_LOCK_DISABLE);
        machine.cpu.controls.exception_bitmap |= 1 << GP;
        if uncached {
            assert_eq!(go(&mut machine, LOCK_INC), Exit::Exception(Exception::gp(0)), "{what}");
            assert_eq!(machine.cpu.refused_lock.map(|lock| lock.kind), Some(LockKind::Uncached), "{what}");
            machine.cpu.test_ctrl = TestCtrl::new(Arc::default(), true);
            machine.cpu.test_ctrl.set(test_ctrl::UC_LOCK_DISABLE);
            assert_eq!(refused(&mut machine, LOCK_INC, &what), Some(LockKind::Uncached));
            let counters = machine.cpu.counters;
            assert_eq!((counters.uc_lock_faults, counters.split_lock_faults), (2, 0), "{what}");
        }
        machine.cpu.controls.ignore_pat = true;
        completes(&mut machine, LOCK_INC, &what);
    }
}

#[test]
fn sl_b9_locks_on_memory_that_is_not_write_back_are_reported() {
    let mut user = trapping(3);
    user.set(reg::RBX, DATA);
    map(&mut user, DATA, DATA, UC);
    user.cpu.test_ctrl.set(test_ctrl::SPLIT_LOCK_DETECT);
    assert_eq!(user.run(LOCK_INC), Exit::Hlt);
    assert_eq!((user.vector(), user.cpu.state.dr6), (Some(DB), DR6_BLD));
    let mut kernel = machine(0, 0);
    kernel.cpu.controls.bus_lock_detection = true;
    kernel.set(reg::RBX, DATA);
    map(&mut kernel, DATA, DATA, UC);
    assert_eq!(go(&mut kernel, LOCK_INC), Exit::BusLock);
    assert_eq!((kernel.word(DATA, 4), kernel.cpu.state.rip), (1, CODE0 + LOCK_INC_LEN));
    // CR0.CD makes all memory uncacheable, and MOV to CR0 and to IA32_PAT take effect at once.
    let mut machine = machine(0, 0);
    machine.set(reg::RBX, DATA);
    machine.set(reg::RAX, machine.cpu.state.cr0 | cr0::CD);
    let code = [LOCK_INC, &[0x0f, 0x22, 0xc0], LOCK_INC].concat();
    completes(&mut machine, &code, "CR0.CD");
    assert_eq!(machine.cpu.counters.bus_locks, 1);
    // CMPXCHG16B takes bus locks of this kind only.
    machine.set(reg::RAX, 0);
    completes(&mut machine, &[0xf0, 0x48, 0x0f, 0xc7, 0x0b], "cmpxchg16b");
    assert_eq!(machine.cpu.counters.bus_locks, 2);
}

#[test]
fn sl_b9_devices_are_not_write_back() {
    let device = MEMORY as u64;
    let mut machine = machine(0, test_ctrl::UC_LOCK_DISABLE);
    machine.cpu.controls.exception_bitmap |= 1 << GP;
    machine.cpu.controls.ignore_pat = true;
    map(&mut machine, DEVICE, device, 0);
    machine.set(reg::RBX, DEVICE);
    assert_eq!(go(&mut machine, LOCK_INC), Exit::Exception(Exception::gp(0)));
    machine.cpu.test_ctrl.set(0);
    machine.cpu.controls.bus_lock_detection = true;
    let access = |write| BusAccess { space: Space::Memory, address: device, size: 4, write };
    assert_eq!(machine.cpu.run(), Exit::EptViolation(access(None)));
    assert!(!machine.cpu.exit_bus_lock);
    machine.cpu.complete_read(41);
    assert_eq!(machine.cpu.run(), Exit::EptViolation(access(Some(42))));
    machine.cpu.complete_read(0);
    assert_eq!(machine.cpu.run(), Exit::BusLock);
    assert_eq!((machine.cpu.counters.bus_locks, machine.cpu.run()), (1, Exit::Cpuid));
}

#[test]
fn sl_b10_paging_and_cmpxchg16b_never_split() {
    let mut machine = machine(0, test_ctrl::SPLIT_LOCK_DETECT);
    machine.set(reg::RBX, DATA + 56);
    machine.cpu.controls.exception_bitmap |= 1 << GP;
    assert_eq!(go(&mut machine, &[0xf0, 0x48, 0x0f, 0xc7, 0x0b]), Exit::Exception(Exception::gp(0)));
    assert_eq!(machine.cpu.refused_lock, None);
    // Accessed and dirty flags of paging entries in memory that is not write-back.
    map(&mut machine, TABLES + 0x3000, TABLES + 0x3000, UC);
    machine.cpu.test_ctrl.set(test_ctrl::SPLIT_LOCK_DETECT | test_ctrl::UC_LOCK_DISABLE);
    completes(&mut machine, &[0x89, 0x0b], "store");
    assert_eq!(machine.word(TABLES + 0x3000 + 8 * (DATA >> 12), 8) & 0x60, 0x60);
    assert_eq!(machine.cpu.counters.bus_locks, 0);
}

#[test]
fn sl_b11_each_bus_lock_exits_after_its_instruction() {
    for cpl in [0, 3] {
        let mut machine = machine(cpl, 0);
        machine.cpu.controls.bus_lock_detection = true;
        machine.put(machine.code(), &LOCK_INC.repeat(100));
        let start = machine.cpu.state.rip;
        for n in 1..=100 {
            assert_eq!(machine.cpu.run(), Exit::BusLock);
            assert!(machine.cpu.exit_bus_lock);
            assert_eq!((machine.word(SPLIT, 4), machine.cpu.state.rip), (n, start + LOCK_INC_LEN * n));
        }
        assert_eq!(machine.cpu.counters.bus_locks, 100);
    }
}

#[test]
fn sl_b11_the_trap_of_the_same_instruction_follows_the_exit() {
    let mut machine = trapping(3);
    machine.cpu.controls.bus_lock_detection = true;
    assert_eq!(machine.run(LOCK_INC), Exit::BusLock);
    assert_eq!((machine.cpu.state.rip, machine.cpu.pending_debug), (CODE3 + LOCK_INC_LEN, 1 << 11));
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!((machine.vector(), machine.cpu.state.dr6), (Some(DB), DR6_BLD));
    assert!(!machine.cpu.exit_bus_lock);
}

#[test]
fn sl_b12_an_exit_that_wins_carries_the_only_report() {
    // The monitor trap comes in the place of the bus-lock exit.
    let mut machine = machine(0, 0);
    machine.cpu.controls.bus_lock_detection = true;
    machine.cpu.controls.monitor_trap_flag = true;
    assert_eq!(go(&mut machine, LOCK_INC), Exit::MonitorTrap);
    assert!(machine.cpu.exit_bus_lock);
    machine.cpu.controls.monitor_trap_flag = false;
    assert_eq!((machine.cpu.run(), machine.cpu.exit_bus_lock), (Exit::Cpuid, false));
    // A far call that has set the accessed bit and then faults on its stack.
    let mut machine = self::machine(0, 0);
    machine.cpu.controls.bus_lock_detection = true;
    machine.cpu.controls.exception_bitmap = 1 << PF;
    machine.gdt(0x40, descriptor(0, 0xf_ffff, 0x9a, 0xa));
    move_gdt(&mut machine, DATA + 58);
    machine.put_word(DATA + 0x800, 6, 0x40 << 32 | CODE0);
    machine.set(reg::RSI, DATA + 0x800);
    machine.set(reg::RSP, DEVICE + 0x100);
    machine.unmap(DEVICE);
    let exit = machine.run(&[0xff, 0x1e]);
    let taken = machine.cpu.counters.bus_locks == 1;
    assert!(matches!(exit, Exit::Exception(Exception { vector: PF, .. })), "{exit:?}");
    assert_eq!(machine.cpu.exit_bus_lock, taken);
    // A split lock half in memory, half in a device: one report, when it is complete.
    let mut machine = self::machine(0, 0);
    machine.cpu.controls.bus_lock_detection = true;
    map(&mut machine, DEVICE, MEMORY as u64, 0);
    machine.set(reg::RBX, DEVICE - 2);
    let mut exits = Vec::new();
    let mut exit = go(&mut machine, LOCK_INC);
    while let Exit::EptViolation(access) = exit {
        exits.push((access.size, access.write, machine.cpu.exit_bus_lock));
        machine.cpu.complete_read(0);
        exit = machine.cpu.run();
    }
    assert_eq!(exits, [(2, None, false), (2, Some(0), false)]);
    assert_eq!((exit, machine.cpu.exit_bus_lock), (Exit::BusLock, true));
    assert_eq!((machine.word(DEVICE - 2, 2), machine.cpu.counters.bus_locks), (1, 1));
    assert_eq!((machine.cpu.run(), machine.cpu.exit_bus_lock), (Exit::Cpuid, false));
}

#[test]
fn sl_a_permitted_access_is_made_once() {
    let mut machine = machine(3, test_ctrl::SPLIT_LOCK_DETECT | test_ctrl::UC_LOCK_DISABLE);
    let code = LOCK_INC.repeat(2);
    assert_eq!(go(&mut machine, &code), Exit::Exception(Exception::AC));
    machine.cpu.permitted_lock = Some(LockKind::Split);
    assert_eq!(machine.cpu.run(), Exit::Exception(Exception::AC), "the second one");
    assert_eq!((machine.cpu.state.rip, machine.word(SPLIT, 4)), (CODE3 + LOCK_INC_LEN, 1));
    assert_eq!(machine.cpu.permitted_lock, None);
    // It outlasts the exits of a device access, which repeat the instruction, and is a bus lock for whoever asks.
    let device = MEMORY as u64;
    machine.cpu.controls.bus_lock_detection = true;
    map(&mut machine, DEVICE, device, 0);
    machine.set(reg::RBX, DEVICE);
    machine.cpu.permitted_lock = Some(LockKind::Uncached);
    for _ in 0..2 {
        assert!(matches!(machine.cpu.run(), Exit::EptViolation(_)));
        machine.cpu.complete_read(7);
    }
    assert_eq!((machine.cpu.run(), machine.cpu.permitted_lock), (Exit::BusLock, None));
    // The delivery of an event ends it.
    machine.set(reg::RBX, SPLIT);
    machine.set_ring(3);
    machine.cpu.permitted_lock = Some(LockKind::Split);
    machine.cpu.injection = Some(Injection::Interrupt(0x40));
    assert_eq!((go(&mut machine, LOCK_INC), machine.cpu.permitted_lock), (Exit::Hlt, None));
    assert_eq!(machine.vector(), Some(0x40));
}

/// Permission for a split lock once let it through where locks on memory that is not write-back are refused.
#[test]
fn sl_b9_a_permitted_split_lock_is_refused_as_uncached() {
    let mut machine = machine(3, test_ctrl::SPLIT_LOCK_DETECT | test_ctrl::UC_LOCK_DISABLE);
    machine.cpu.controls.exception_bitmap |= 1 << GP;
    map(&mut machine, SPLIT & !0xfff, SPLIT & !0xfff, UC);
    assert_eq!(go(&mut machine, LOCK_INC), Exit::Exception(Exception::AC));
    assert_eq!(machine.cpu.refused_lock.map(|lock| lock.kind), Some(LockKind::Split));
    machine.cpu.permitted_lock = Some(LockKind::Split);
    assert_eq!(machine.cpu.run(), Exit::Exception(Exception::gp(0)));
    assert_eq!(machine.cpu.refused_lock.map(|lock| lock.kind), Some(LockKind::Uncached));
    assert_eq!(machine.word(SPLIT, 4), 0);
    // What may be uncached has been found to be split before.
    machine.cpu.permitted_lock = Some(LockKind::Uncached);
    assert_eq!(machine.cpu.run(), Exit::Cpuid);
    assert_eq!(machine.word(SPLIT, 4), 1);
}

#[test]
fn sl_without_lock_signal_a_split_access_is_no_bus_lock() {
    let mut machine = machine(0, test_ctrl::SUPPRESS_LOCK);
    machine.cpu.controls.bus_lock_detection = true;
    completes(&mut machine, LOCK_INC, "MSR_TEST_CTRL[31]");
    assert_eq!((machine.word(SPLIT, 4), machine.cpu.counters.bus_locks), (1, 0));
    machine.cpu.test_ctrl.set(test_ctrl::SUPPRESS_LOCK | test_ctrl::SPLIT_LOCK_DETECT);
    refused(&mut machine, LOCK_INC, "detection comes first");
}

#[test]
fn sl_a_task_switch_that_takes_bus_locks_is_reported_in_the_new_task() {
    let mut machine = Machine::new(Mode::Protected);
    machine.cpu.controls.bus_lock_detection = true;
    for (offset, value) in [(0x20, CODE0 + 0x100), (0x24, 2), (0x4c, 8), (0x50, 0x10), (0x54, 0x10)] {
        machine.put_word(TSS2 + offset, 4, value);
    }
    // The descriptor of TSS2 lies across lines.
    move_gdt(&mut machine, DATA + 26);
    machine.put(CODE0 + 0x100, &[0xf4]);
    assert_eq!(machine.run(&[&[0xea], &far32(0, sel::TSS2)[..]].concat()), Exit::BusLock);
    assert_eq!((machine.cpu.state.rip, machine.cpu.state.tr.selector), (CODE0 + 0x100, sel::TSS2));
    assert_eq!(machine.word(DATA + 26 + u64::from(sel::TSS2) + 5, 1), 0x8b);
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    // Refused in the old task, which goes on unchanged.
    let mut machine = Machine::new(Mode::Protected);
    machine.cpu.controls.exception_bitmap = 1 << AC;
    machine.cpu.test_ctrl.set(test_ctrl::SPLIT_LOCK_DETECT);
    move_gdt(&mut machine, DATA + 26);
    assert_eq!(machine.run(&[&[0xea], &far32(0, sel::TSS2)[..]].concat()), Exit::Exception(Exception::AC));
    assert_eq!((machine.cpu.state.rip, machine.cpu.state.tr.selector), (CODE0, sel::TSS));
    assert!(machine.cpu.refused_lock.is_some_and(|lock| lock.implicit));
}

/// Two CPUs of one VM add to one counter; `first` and `second` are their loops' locked instructions.
fn hammer(first: &[u8], second: &[u8], rounds: u64, control: u64) -> (Machine, Cpu) {
    let mut a = machine(0, control);
    let mut b = Cpu::new(a.cpu.features.clone(), a.cpu.ept.clone());
    b.state = a.cpu.state.clone();
    b.test_ctrl = a.cpu.test_ctrl.clone();
    b.controls = a.cpu.controls.clone();
    b.refresh_mode();
    for (at, code) in [(CODE0, first), (CODE0 + 0x800, second)] {
        // The access; dec rsi; jnz back; cpuid.
        let back = (-(code.len() as i64) - 5) as u8;
        a.put(at, &[code, &[0x48, 0xff, 0xce, 0x75, back, 0x0f, 0xa2]].concat());
    }
    a.set(reg::RSI, rounds);
    a.set(reg::RCX, 1 << 32);
    b.state.regs = a.cpu.state.regs;
    b.state.rip = CODE0 + 0x800;
    std::thread::scope(|scope| {
        for cpu in [&mut a.cpu, &mut b] {
            scope.spawn(move || {
                // The emulating hypervisor: what is refused is permitted once.
                loop {
                    match cpu.run() {
                        Exit::Exception(Exception::AC) => cpu.permitted_lock = Some(LockKind::Split),
                        exit => break assert_eq!(exit, Exit::Cpuid),
                    }
                }
            });
        }
    });
    (a, b)
}

#[test]
fn sl_b16_a_split_counter_loses_nothing() {
    const ROUNDS: u64 = 3000;
    for control in [0, test_ctrl::SPLIT_LOCK_DETECT] {
        let (machine, other) = hammer(LOCK_INC, LOCK_INC, ROUNDS, control);
        assert_eq!(machine.word(SPLIT, 4), 2 * ROUNDS);
        let faults = machine.cpu.counters.split_lock_faults + other.counters.split_lock_faults;
        assert_eq!(faults, if control == 0 { 0 } else { 2 * ROUNDS });
        assert_eq!(machine.cpu.counters.bus_locks + other.counters.bus_locks, 2 * ROUNDS);
    }
}

#[test]
fn sl_b16_split_and_plain_locked_accesses_do_not_tear() {
    const ROUNDS: u64 = 3000;
    // lock add [rbx-2], rcx, across the line, and lock inc dword [rbx+2], its upper half.
    let (machine, _) = hammer(&[0xf0, 0x48, 0x01, 0x4b, 0xfe], &[0xf0, 0xff, 0x43, 0x02], ROUNDS, 0);
    assert_eq!((machine.word(SPLIT - 2, 4), machine.word(SPLIT + 2, 4)), (0, 2 * ROUNDS));
}

#[test]
fn sl_b14_a_change_of_the_live_register_acts_on_the_next_access() {
    let mut machine = machine(0, 0);
    let sibling = machine.cpu.test_ctrl.clone();
    completes(&mut machine, LOCK_INC, "off");
    sibling.set(test_ctrl::SPLIT_LOCK_DETECT);
    refused(&mut machine, LOCK_INC, "on");
    sibling.set(0);
    completes(&mut machine, LOCK_INC, "off again");
}

#[test]
fn sl_a_client_can_show_the_refused_instruction() {
    let mut machine = machine(0, test_ctrl::SPLIT_LOCK_DETECT);
    machine.set(reg::RBX, DATA + 63);
    refused(&mut machine, &[0x66, 0xf0, 0x0f, 0xc1, 0x0b], "xadd");
    assert_eq!(machine.cpu.instruction_bytes(), [0x66, 0xf0, 0x0f, 0xc1, 0x0b]);
    machine.unmap(CODE0);
    assert_eq!(machine.cpu.instruction_bytes(), []);
}
