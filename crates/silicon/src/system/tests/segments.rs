//! Segment loads, limits, descriptor-table instructions.

use super::*;
use crate::exception::vector::{GP, NP, SS, UD};
use crate::state::interruptibility;

const MOV_DS_AX: &[u8] = &[0x8e, 0xd8];
const MOV_SS_AX: &[u8] = &[0x8e, 0xd0];
const MOV_FS_AX: &[u8] = &[0x8e, 0xe0];

fn load(mode: Mode, ring: u8, code: &[u8], selector: u16) -> Result<Machine, (u8, Option<u64>)> {
    let mut machine = Machine::new(mode);
    machine.set_ring(ring);
    machine.set(reg::RAX, u64::from(selector));
    let (before, end) = (machine.cpu.state.segs, machine.cpu.state.rip + code.len() as u64);
    if ring != 0 {
        // HLT is not for level 3: an INT 0x80 that is allowed ends the test there.
        machine.idt(0x80, gate(14, 3, machine_code(mode), Machine::handler(0x80), 0));
        let code = [code, &[0xcd, 0x80]].concat();
        assert_eq!(machine.run(&code), Exit::Hlt);
        if machine.vector() == Some(0x80) {
            return Ok(machine);
        }
    } else {
        assert_eq!(machine.run(code), Exit::Hlt);
        if machine.cpu.state.rip == end {
            return Ok(machine);
        }
    }
    let size = if mode == Mode::Long { 8 } else { 4 };
    for seg in [Seg::Ds, Seg::Fs] {
        assert_eq!(machine.cpu.state.segs[seg as usize], before[seg as usize]);
    }
    Err((machine.vector().unwrap(), Some(machine.top(0, size))))
}

fn machine_code(mode: Mode) -> u16 {
    if mode == Mode::Long { sel::CODE0_64 } else { sel::CODE0 }
}

#[test]
fn data_segment_loads_check_what_the_sdm_says() {
    let e = |selector: u16| Some(u64::from(selector & !3));
    for mode in [Mode::Protected, Mode::Long] {
        // (ring, selector, expected fault)
        let table = [
            (0, sel::DATA0, None),
            (0, sel::DATA3, None),
            (0, sel::DATA0 | 3, Some((GP, e(sel::DATA0)))),
            (3, sel::DATA3, None),
            (3, sel::DATA3 & !3, None),
            (3, sel::DATA0, Some((GP, e(sel::DATA0)))),
            (0, sel::CODE0, None),
            (3, sel::CODE0, Some((GP, e(sel::CODE0)))),
            (3, sel::CONFORMING0, None),
            (0, sel::EXECUTE_ONLY0, Some((GP, e(sel::EXECUTE_ONLY0)))),
            (0, sel::ABSENT_DATA0, Some((NP, e(sel::ABSENT_DATA0)))),
            (0, sel::TSS, Some((GP, e(sel::TSS)))),
            (0, sel::OUTSIDE, Some((GP, e(sel::OUTSIDE)))),
            (0, sel::DATA0 | 4, Some((GP, e(sel::DATA0 | 4)))),
            (0, 0, None),
            (3, 3, None),
        ];
        for (ring, selector, expected) in table {
            for code in [MOV_DS_AX, MOV_FS_AX] {
                let result = load(mode, ring, code, selector);
                assert_eq!(result.err(), expected, "{mode:?} ring {ring} {selector:#x}");
            }
        }
    }
}

#[test]
fn stack_segment_loads_check_what_the_sdm_says() {
    let e = |selector: u16| Some(u64::from(selector & !3));
    // (mode, ring, selector, expected fault)
    let table = [
        (Mode::Protected, 0, sel::DATA0, None),
        (Mode::Protected, 3, sel::DATA3, None),
        (Mode::Protected, 0, 0, Some((GP, Some(0)))),
        (Mode::Long, 0, 0, None),
        (Mode::Long, 3, 3, Some((GP, Some(0)))),
        (Mode::Long, 0, 1, Some((GP, Some(0)))),
        (Mode::Protected, 0, sel::DATA3, Some((GP, e(sel::DATA3)))),
        (Mode::Protected, 0, sel::DATA0 | 1, Some((GP, e(sel::DATA0)))),
        (Mode::Protected, 0, sel::READ_ONLY0, Some((GP, e(sel::READ_ONLY0)))),
        (Mode::Protected, 0, sel::CODE0, Some((GP, e(sel::CODE0)))),
        (Mode::Protected, 0, sel::ABSENT_DATA0, Some((SS, e(sel::ABSENT_DATA0)))),
        (Mode::Protected, 0, sel::OUTSIDE, Some((GP, e(sel::OUTSIDE)))),
    ];
    for (mode, ring, selector, expected) in table {
        let result = load(mode, ring, MOV_SS_AX, selector);
        assert_eq!(result.err(), expected, "{mode:?} ring {ring} {selector:#x}");
    }
}

#[test]
fn a_load_sets_the_accessed_bit_and_the_hidden_part() {
    let mut machine = Machine::new(Mode::Protected);
    machine.gdt(sel::GATE, descriptor(0x1234_5678, 0xfff, 0x92, 0x4));
    machine.set(reg::RAX, u64::from(sel::GATE));
    machine.finish(MOV_DS_AX);
    let ds = machine.cpu.state.segs[Seg::Ds as usize];
    let expected = Segment { base: 0x1234_5678, limit: 0xfff, attributes: 0x4093, selector: sel::GATE };
    assert_eq!(ds, expected);
    assert_eq!(machine.cpu.state.ea_base[Seg::Ds as usize], 0x1234_5678);
    assert_eq!((machine.gdt_entry(sel::GATE) >> 40) & 0xff, 0x93);
}

#[test]
fn null_fs_has_base_zero_and_faults_outside_64_bit_mode() {
    let machine = load(Mode::Long, 0, MOV_FS_AX, 0).ok().unwrap();
    let fs = machine.cpu.state.segs[Seg::Fs as usize];
    assert!(fs.unusable() && fs.base == 0);
    let mut machine = load(Mode::Protected, 0, MOV_FS_AX, 0).ok().unwrap();
    // mov eax, fs:[0]
    assert_eq!(machine.fault(&[0x64, 0xa1, 0, 0, 0, 0]), (GP, Some(0)));
}

#[test]
fn limits_bound_accesses() {
    // (descriptor, offset, allowed); mov al, ds:[offset] and, at 0x..., four bytes
    let up = descriptor(DATA, 0xfff, 0x93, 0x4);
    let down = descriptor(DATA, 0xfff, 0x97, 0x4);
    let down16 = descriptor(DATA, 0xfff, 0x97, 0);
    let flat = descriptor(0, 0xf_ffff, 0x93, 0xc);
    let table = [
        (up, 0xffc_u32, true),
        (up, 0xffd, false),
        (up, 0x1000, false),
        (up, 0xffff_fffe, false),
        (down, 0xfff, false),
        (down, 0x1000, true),
        (down, 0x10_0000, true),
        (down16, 0xfffc, true),
        (down16, 0xfffd, false),
        (flat, 0x1_0000, true),
    ];
    for (low, offset, allowed) in table {
        let mut machine = Machine::new(Mode::Protected);
        machine.gdt(sel::GATE, low);
        machine.set_segment(Seg::Ds, sel::GATE);
        let code = [&[0xa1][..], &offset.to_le_bytes()].concat();
        if allowed {
            machine.finish(&code);
        } else {
            assert_eq!(machine.fault(&code), (GP, Some(0)), "{low:x} {offset:x}");
        }
    }
}

#[test]
fn types_bound_accesses() {
    // mov [DATA], eax
    let store = [&[0xa3][..], &(DATA as u32).to_le_bytes()].concat();
    // mov eax, [DATA]
    let read = [&[0xa1][..], &(DATA as u32).to_le_bytes()].concat();
    for (selector, readable, writable) in [
        (sel::DATA0, true, true),
        (sel::READ_ONLY0, true, false),
        (sel::CODE0, true, false),
        (sel::EXECUTE_ONLY0, false, false),
    ] {
        for (code, allowed) in [(&read, readable), (&store, writable)] {
            let mut machine = Machine::new(Mode::Protected);
            machine.set_segment(Seg::Ds, selector);
            if allowed {
                machine.finish(code);
            } else {
                assert_eq!(machine.fault(code), (GP, Some(0)), "{selector:#x}");
            }
        }
    }
}

#[test]
fn a_stack_beyond_its_limit_is_a_stack_fault() {
    let mut machine = Machine::new(Mode::Protected);
    machine.gdt(sel::GATE, descriptor(0, 0xfff, 0x93, 0x4));
    machine.set_segment(Seg::Ss, sel::GATE);
    machine.set(reg::RSP, 0x800);
    // mov eax, ss:[0x1000]
    assert_eq!(machine.fault(&[0x36, 0xa1, 0, 0x10, 0, 0]), (SS, Some(0)));
}

#[test]
fn real_mode_loads_change_the_base_only() {
    let mut machine = Machine::new(Mode::Real);
    machine.cpu.state.segs[Seg::Ds as usize].limit = u32::MAX;
    machine.set(reg::RAX, 0x1234);
    machine.finish(MOV_DS_AX);
    let ds = machine.cpu.state.segs[Seg::Ds as usize];
    assert_eq!((ds.base, ds.limit, ds.selector), (0x1_2340, u32::MAX, 0x1234));
    // A word at 0xffff of a 64 KiB segment: #GP, which pushes no error code here. mov ax, es:[0xffff]
    assert_eq!(machine.fault(&[0x26, 0xa1, 0xff, 0xff]), (GP, None));
}

#[test]
fn far_pointer_loads() {
    let mut machine = Machine::new(Mode::Protected);
    machine.put(DATA, &far32(0x1_7000, sel::DATA0));
    // lss esp, [DATA]
    machine.finish(&[&[0x0f, 0xb2, 0x25][..], &(DATA as u32).to_le_bytes()].concat());
    assert_eq!((machine.selector(Seg::Ss), machine.reg(reg::RSP)), (sel::DATA0, 0x1_7000));
    assert_eq!(machine.cpu.state.interruptibility & interruptibility::MOV_SS, 0);
    // lds ecx, [DATA] with a bad selector leaves ECX.
    machine.put(DATA, &far32(0x1_7000, sel::OUTSIDE));
    machine.set(reg::RCX, 5);
    let code = [&[0xc5, 0x0d][..], &(DATA as u32).to_le_bytes()].concat();
    assert_eq!(machine.fault(&code), (GP, Some(u64::from(sel::OUTSIDE))));
    assert_eq!(machine.reg(reg::RCX), 5);
}

#[test]
fn pop_of_a_segment_register() {
    let mut machine = Machine::new(Mode::Protected);
    machine.stack(4, &[u64::from(sel::DATA3)]);
    machine.finish(&[0x1f]); // pop ds
    assert_eq!((machine.selector(Seg::Ds), machine.reg(reg::RSP)), (sel::DATA3, STACK0));
    machine.stack(4, &[u64::from(sel::OUTSIDE)]);
    let sp = machine.reg(reg::RSP);
    assert_eq!(machine.fault(&[0x1f]), (GP, Some(u64::from(sel::OUTSIDE))));
    assert_eq!(machine.reg(reg::RSP), sp - 16, "the stack pointer is what it was before the fault");
}

#[test]
fn mov_of_a_selector_to_a_register() {
    let mut machine = Machine::new(Mode::Long);
    machine.set(reg::RAX, u64::MAX);
    machine.finish(&[0x8c, 0xc8]); // mov eax, cs
    assert_eq!(machine.reg(reg::RAX), u64::from(sel::CODE0_64));
    machine.set(reg::RAX, u64::MAX);
    machine.finish(&[0x66, 0x8c, 0xc8]); // mov ax, cs
    assert_eq!(machine.reg(reg::RAX), 0xffff_ffff_ffff_0000 | u64::from(sel::CODE0_64));
    assert_eq!(machine.fault(&[0x8e, 0xc8]), (UD, None)); // mov cs, eax
}

#[test]
fn task_register_and_ldt_loads() {
    const LTR_AX: &[u8] = &[0x0f, 0x00, 0xd8];
    const LLDT_AX: &[u8] = &[0x0f, 0x00, 0xd0];
    let e = |selector: u16| Some(u64::from(selector & !3));
    for mode in [Mode::Protected, Mode::Long] {
        let table = [
            (LTR_AX, sel::TSS2, None),
            (LTR_AX, sel::TSS, Some((GP, e(sel::TSS)))),
            (LTR_AX, 0, Some((GP, Some(0)))),
            (LTR_AX, sel::TSS2 | 4, Some((GP, e(sel::TSS2 | 4)))),
            (LTR_AX, sel::LDT, Some((GP, e(sel::LDT)))),
            (LTR_AX, sel::OUTSIDE, Some((GP, e(sel::OUTSIDE)))),
            (LLDT_AX, sel::LDT, None),
            (LLDT_AX, 0, None),
            (LLDT_AX, sel::TSS, Some((GP, e(sel::TSS)))),
            (LLDT_AX, sel::OUTSIDE, Some((GP, e(sel::OUTSIDE)))),
        ];
        for (code, selector, expected) in table {
            let mut machine = Machine::new(mode);
            machine.set(reg::RAX, u64::from(selector));
            if mode == Mode::Long {
                machine.gdt(sel::TSS2 + 8, 0);
                machine.gdt(sel::LDT + 8, 0);
            }
            match expected {
                None => machine.finish(code),
                Some(fault) => assert_eq!(machine.fault(code), fault, "{mode:?} {selector:#x}"),
            }
            if code == LTR_AX && expected.is_none() {
                assert_eq!(machine.cpu.state.tr.kind(), 11);
                assert_eq!((machine.gdt_entry(selector) >> 40) & 15, 11);
            }
        }
        let mut machine = Machine::new(mode);
        machine.set_ring(3);
        assert_eq!(machine.fault(LTR_AX), (GP, Some(0)));
    }
    assert_eq!(Machine::new(Mode::Real).fault(LTR_AX), (UD, None));
}

#[test]
fn descriptors_with_64_bit_bases() {
    let mut machine = Machine::new(Mode::Long);
    machine.gdt(sel::LDT + 8, 0xffff_8000);
    machine.set(reg::RAX, u64::from(sel::LDT));
    machine.finish(&[0x0f, 0x00, 0xd0]);
    assert_eq!(machine.cpu.state.ldtr.base, 0xffff_8000_0000_0000 | LDT);
    for high in [0x0100_0000_0000, 0x8000_0000] {
        machine.gdt(sel::LDT + 8, high);
        machine.set_ring(0);
        assert_eq!(machine.fault(&[0x0f, 0x00, 0xd0]), (GP, Some(u64::from(sel::LDT))), "{high:x}");
    }
}

#[test]
fn questions_about_descriptors() {
    const LAR: &[u8] = &[0x0f, 0x02, 0xc1]; // lar eax, ecx
    const LSL: &[u8] = &[0x0f, 0x03, 0xc1];
    const VERR: &[u8] = &[0x0f, 0x00, 0xe1]; // verr cx
    const VERW: &[u8] = &[0x0f, 0x00, 0xe9];
    // (code, selector, ZF and EAX)
    let table = [
        (LAR, sel::CODE3, Some(0x00cf_fb00)),
        (LAR, sel::TSS, Some(0x0000_8b00)),
        (LAR, 0, None),
        (LAR, sel::OUTSIDE, None),
        (LAR, sel::DATA0 | 3, None),
        (LSL, sel::CODE3, Some(0xffff_ffff)),
        (LSL, sel::TSS, Some(0x1ff)),
        (LSL, sel::DATA0 | 3, None),
        (VERR, sel::DATA0, Some(0)),
        (VERR, sel::EXECUTE_ONLY0, None),
        (VERR, sel::CONFORMING0 | 3, Some(0)),
        (VERR, sel::TSS, None),
        (VERW, sel::DATA0, Some(0)),
        (VERW, sel::READ_ONLY0, None),
        (VERW, sel::CODE0, None),
    ];
    for (code, selector, expected) in table {
        let mut machine = Machine::new(Mode::Protected);
        machine.set(reg::RCX, u64::from(selector));
        machine.finish(code);
        assert_eq!(machine.cpu.state.status.zf(), expected.is_some(), "{code:x?} {selector:#x}");
        assert_eq!(machine.reg(reg::RAX), expected.unwrap_or(0), "{code:x?} {selector:#x}");
    }
    assert_eq!(Machine::new(Mode::Real).fault(LAR), (UD, None));
    // In IA-32e mode 16-bit TSS types mean nothing.
    for (mode, known) in [(Mode::Protected, true), (Mode::Long, false)] {
        let mut machine = Machine::new(mode);
        machine.gdt(sel::GATE, descriptor(TSS2, 0x2b, 0x81, 0));
        machine.set(reg::RCX, u64::from(sel::GATE));
        machine.finish(LSL);
        assert_eq!(machine.cpu.state.status.zf(), known);
    }
}

#[test]
fn arpl_raises_the_rpl() {
    for (destination, source, result, zf) in [(0x10, 0x3, 0x13, true), (0x13, 0x1, 0x13, false)] {
        let mut machine = Machine::new(Mode::Protected);
        machine.set(reg::RAX, destination);
        machine.set(reg::RCX, source);
        machine.finish(&[0x63, 0xc8]);
        assert_eq!((machine.reg(reg::RAX), machine.cpu.state.status.zf()), (result, zf));
    }
}

#[test]
fn table_registers() {
    let mut machine = Machine::new(Mode::Protected);
    machine.put(DATA, &[0x34, 0x12, 0x78, 0x56, 0x34, 0x12]);
    let at = (DATA as u32).to_le_bytes();
    machine.finish(&[&[0x0f, 0x01, 0x1d][..], &at].concat()); // lidt
    assert_eq!(machine.cpu.state.idtr, TableRegister { base: 0x1234_5678, limit: 0x1234 });
    machine.finish(&[&[0x66, 0x0f, 0x01, 0x1d][..], &at].concat());
    assert_eq!(machine.cpu.state.idtr, TableRegister { base: 0x34_5678, limit: 0x1234 });
    machine.put(DATA, &[0xaa; 16]);
    machine.finish(&[&[0x66, 0x0f, 0x01, 0x05][..], &at].concat()); // sgdt
    assert_eq!(machine.word(DATA, 8), 0xaaaa_0000_1000_0000 | u64::from(sel::LAST) | (GDT & 0xffff) << 16);

    let mut machine = Machine::new(Mode::Long);
    machine.put_word(DATA, 2, 0xfff);
    machine.put_word(DATA + 2, 8, 1 << 60);
    machine.set(reg::RAX, DATA);
    assert_eq!(machine.fault(&[0x0f, 0x01, 0x18]), (GP, Some(0)));
    machine.set_ring(3);
    machine.finish_ring3(&[0x0f, 0x01, 0x00]);
    assert_eq!(machine.word(DATA + 2, 8), GDT);
    machine.set_ring(3);
    machine.cpu.state.cr4 |= cr4::UMIP;
    assert_eq!(machine.fault(&[0x0f, 0x01, 0x00]), (GP, Some(0)));
}

impl Machine {
    /// Runs `code` at level 3 to its end, where INT 0x80 leaves that level.
    pub(super) fn finish_ring3(&mut self, code: &[u8]) {
        let handler = machine_code(self.mode);
        self.idt(0x80, gate(14, 3, handler, Machine::handler(0x80), 0));
        assert_eq!(self.run(&[code, &[0xcd, 0x80]].concat()), Exit::Hlt);
        assert_eq!(self.vector(), Some(0x80), "{code:02x?} {:#x}", self.cpu.state.rip);
    }
}

#[test]
fn code_runs_to_the_limit_and_not_beyond() {
    // (bytes that end at the limit of 64 KiB or cross it, IP of the fault)
    let table: [(&[u8], u64, u64); 3] = [
        (&[0x90, 0x90], 0xfffe, 0),            // two nops, then nothing
        (&[0x90, 0xb8, 0x34], 0xfffd, 0xfffe), // mov ax, imm16 that crosses
        (&[0xeb, 0x00], 0xfffe, 0xfffe),       // a jump to IP 0x10000, truncated to 0
    ];
    for (code, ip, fault) in table {
        let mut machine = Machine::new(Mode::Real);
        machine.cpu.state.rip = ip;
        machine.put(CODE0 + 0x1_0000, &[0x12, 0xf4]);
        machine.put(CODE0, &[0xf4]);
        machine.put(CODE0 + ip, code);
        assert_eq!(machine.cpu.run(), Exit::Hlt, "{code:x?}");
        if code[0] == 0xeb {
            assert_eq!(machine.cpu.state.rip, 0);
            continue;
        }
        assert_eq!((machine.vector(), machine.top(0, 2)), (Some(GP), fault), "{code:x?}");
    }
    // The same bytes under a larger limit.
    let mut machine = Machine::new(Mode::Protected);
    machine.gdt(sel::GATE, descriptor(CODE0, 0x1f, 0x9b, 0x4));
    machine.put(CODE0, &[0x90; 0x40]);
    machine.put(CODE0 + 0x40, &[0xf4]);
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!(machine.cpu.state.rip, CODE0 + 0x40);
    machine.set_code(sel::GATE);
    machine.cpu.state.rip = 0;
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!((machine.vector(), machine.top(1, 4)), (Some(GP), 0x20));
}
