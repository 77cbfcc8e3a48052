//! Control registers, MSRs and the smaller system instructions, one instruction at a time.

use std::sync::Arc;

use iced_x86::Decoder;

use super::testing::{CODE, DATA, GP0, Guest, UNMAPPED};
use crate::code::lower::{LowerCtx, lower};
use crate::code::op::Flow;
use crate::cpu::{Cpu, Pending};
use crate::exception::{Exception, vector};
use crate::mmu::ept::Ept;
use crate::model::CpuModel;
use crate::state::{CodeSize, Segment, cr0, cr4, efer, reg};
use crate::vmx::Exit;

const GP: Pending = Pending::Exception(Exception::gp(0));
const UD: Pending = Pending::Exception(Exception::UD);

/// A `sapphire-rapids` in 64-bit mode at CPL 0.
fn long_mode() -> Cpu {
    let model = CpuModel::default();
    let mut cpu = Cpu::new(model.features(), Arc::new(Ept::new()));
    cpu.state.regs = [0; 32];
    cpu.state.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP;
    cpu.state.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR;
    cpu.state.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    cpu.state.segs[1] = Segment { attributes: 0xa09b, limit: u32::MAX, ..Segment::default() };
    cpu.refresh_mode();
    assert_eq!(cpu.state.code_size, CodeSize::Bits64);
    cpu
}

/// 32-bit protected mode without paging, 64-bit mode prepared.
fn protected() -> Cpu {
    let mut cpu = long_mode();
    cpu.state.cr0 = cr0::PE | cr0::ET;
    cpu.state.efer = efer::LME;
    cpu.state.segs[1].attributes = 0xc09b;
    cpu.refresh_mode();
    assert_eq!(cpu.state.code_size, CodeSize::Bits32);
    cpu
}

/// Executes one instruction; what became pending if it did not complete.
fn run(cpu: &mut Cpu, bytes: &[u8]) -> Result<Flow, Pending> {
    let features = cpu.features.clone();
    let code_size = cpu.state.code_size;
    let ctx = LowerCtx { code_size, features: &features, stubs: &cpu.hostexec.stubs };
    let mut decoder = Decoder::new(code_size.bits(), bytes, features.decoder_options());
    let op = lower(&decoder.decode(), &ctx);
    (op.handler.get())(cpu, &op).map_err(|_| cpu.pending)
}

fn set(cpu: &mut Cpu, register: u8, value: u64) {
    cpu.state.regs[usize::from(register)] = value;
}

fn get(cpu: &Cpu, register: u8) -> u64 {
    cpu.state.regs[usize::from(register)]
}

const TO_CR0: &[u8] = &[0x0f, 0x22, 0xc0];
const TO_CR3: &[u8] = &[0x0f, 0x22, 0xd8];
const TO_CR4: &[u8] = &[0x0f, 0x22, 0xe0];
const TO_CR8: &[u8] = &[0x44, 0x0f, 0x22, 0xc0];
const FROM_CR3: &[u8] = &[0x0f, 0x20, 0xd8];

#[test]
fn cr0_in_long_mode() {
    let base = cr0::PE | cr0::PG | cr0::ET;
    for (value, valid) in [
        (base, true),
        (base | cr0::CD, true),
        (base | cr0::CD | cr0::NW, true),
        (base | cr0::NW, false),
        (base | 1 << 32, false),
        (base & !cr0::PG, false),
        (cr0::PG, false),
        (base | 1 << 10, true),
    ] {
        let mut cpu = long_mode();
        let before = cpu.state.cr0;
        set(&mut cpu, reg::RAX, value);
        let result = run(&mut cpu, TO_CR0);
        if valid {
            assert_eq!(result, Ok(Flow::End), "{value:#x}");
            assert_eq!(cpu.state.cr0, value & !(1 << 10), "{value:#x}");
        } else {
            assert_eq!((result, cpu.state.cr0), (Err(GP), before), "{value:#x}");
        }
    }
}

#[test]
fn entering_and_leaving_long_mode() {
    let mut cpu = protected();
    set(&mut cpu, reg::RAX, cr0::PE | cr0::PG);
    assert_eq!(run(&mut cpu, TO_CR0), Ok(Flow::End));
    assert_eq!(cpu.state.efer & efer::LMA, efer::LMA);
    assert_eq!(cpu.state.code_size, CodeSize::Bits32, "compatibility mode until CS.L is loaded");
    set(&mut cpu, reg::RAX, cr0::PE);
    assert_eq!(run(&mut cpu, TO_CR0), Ok(Flow::End));
    assert_eq!(cpu.state.efer & efer::LMA, 0);

    let refuse: [fn(&mut Cpu); 3] = [
        |cpu| cpu.state.cr4 &= !cr4::PAE,
        |cpu| cpu.state.segs[1].attributes |= 1 << 13,
        |cpu| cpu.state.tr.attributes = 0x83,
    ];
    for (i, spoil) in refuse.iter().enumerate() {
        let mut cpu = protected();
        spoil(&mut cpu);
        set(&mut cpu, reg::RAX, cr0::PE | cr0::PG);
        assert_eq!(run(&mut cpu, TO_CR0), Err(GP), "case {i}");
        assert_eq!(cpu.state.cr0 & cr0::PG, 0);
    }
}

#[test]
fn cr4_checks() {
    let base = cr4::PAE | cr4::PGE;
    for (value, valid) in [
        (base, true),
        (base | cr4::SMEP | cr4::SMAP | cr4::UMIP | cr4::PKE | cr4::FSGSBASE | cr4::OSXSAVE, true),
        (base | cr4::PCIDE, true),
        (cr4::PGE, false),
        (base | cr4::VMXE, false),
        (base | cr4::CET, false),
        (base | cr4::LA57, false),
        (base | 1 << 15, false),
        (base | 1 << 32, false),
    ] {
        let mut cpu = long_mode();
        set(&mut cpu, reg::RAX, value);
        let expected = if valid { Ok(Flow::End) } else { Err(GP) };
        assert_eq!(run(&mut cpu, TO_CR4), expected, "{value:#x}");
    }
    let mut cpu = long_mode();
    cpu.state.cr3 = 0x1001;
    set(&mut cpu, reg::RAX, base | cr4::PCIDE);
    assert_eq!(run(&mut cpu, TO_CR4), Err(GP), "a PCID is set");
    let mut cpu = protected();
    set(&mut cpu, reg::RAX, base | cr4::PCIDE);
    assert_eq!(run(&mut cpu, TO_CR4), Err(GP), "not in IA-32e mode");
    set(&mut cpu, reg::RAX, base | cr4::LA57);
    assert_eq!(run(&mut cpu, TO_CR4), Ok(Flow::End), "before IA-32e mode");
}

#[test]
fn cr3_reserved_bits_and_no_flush() {
    let mut cpu = long_mode();
    for (value, valid) in [(0x1000, true), (1 << 45, true), (1 << 46, false), (1 << 63 | 0x1000, false)] {
        set(&mut cpu, reg::RAX, value);
        let expected = if valid { Ok(Flow::End) } else { Err(GP) };
        assert_eq!(run(&mut cpu, TO_CR3), expected, "{value:#x}");
    }
    cpu.state.cr4 |= cr4::PCIDE;
    set(&mut cpu, reg::RAX, 1 << 63 | 0x5001);
    assert_eq!(run(&mut cpu, TO_CR3), Ok(Flow::End));
    assert_eq!(run(&mut cpu, FROM_CR3), Ok(Flow::Next));
    assert_eq!(get(&cpu, reg::RAX), 0x5001, "bit 63 is not stored");
}

#[test]
fn cr8_exits_unless_virtualized() {
    let mut cpu = long_mode();
    set(&mut cpu, reg::RAX, 5);
    assert_eq!(run(&mut cpu, TO_CR8), Err(Pending::Exit(Exit::Cr8 { register: 0, read: false })));
    cpu.controls.cr8_exiting = false;
    assert_eq!(run(&mut cpu, TO_CR8), Ok(Flow::End));
    assert_eq!(cpu.state.cr8, 5);
    set(&mut cpu, reg::RAX, 16);
    assert_eq!(run(&mut cpu, TO_CR8), Err(GP));
}

#[test]
fn user_mode_may_not() {
    let privileged: &[&[u8]] = &[
        TO_CR0,
        FROM_CR3,
        &[0x0f, 0x06],       // clts
        &[0x0f, 0x01, 0xf0], // lmsw ax
        &[0x0f, 0x32],       // rdmsr
        &[0x0f, 0x30],       // wrmsr
        &[0x0f, 0x01, 0xf8], // swapgs
        &[0x0f, 0x01, 0x38], // invlpg [rax]
        &[0x0f, 0x08],       // invd
        &[0x0f, 0x09],       // wbinvd
        &[0x0f, 0x33],       // rdpmc
    ];
    for bytes in privileged {
        let mut cpu = long_mode();
        cpu.state.cpl = 3;
        assert_eq!(run(&mut cpu, bytes), Err(GP), "{bytes:x?}");
    }
    // clac, stac, monitor, mwait
    for last in [0xca, 0xcb, 0xc8, 0xc9] {
        let mut cpu = long_mode();
        cpu.state.cpl = 3;
        assert_eq!(run(&mut cpu, &[0x0f, 0x01, last]), Err(UD), "{last:x}");
    }
}

#[test]
fn lmsw_sets_but_does_not_clear_pe() {
    let mut cpu = protected();
    set(&mut cpu, reg::RAX, cr0::TS | cr0::MP);
    assert_eq!(run(&mut cpu, &[0x0f, 0x01, 0xf0]), Ok(Flow::End));
    assert_eq!(cpu.state.cr0, cr0::PE | cr0::TS | cr0::MP | cr0::ET);
    assert_eq!(run(&mut cpu, &[0x0f, 0x06]), Ok(Flow::End));
    assert_eq!(cpu.state.cr0, cr0::PE | cr0::MP | cr0::ET);
}

#[test]
fn smsw_and_umip() {
    const SMSW_RAX: &[u8] = &[0x48, 0x0f, 0x01, 0xe0];
    let mut cpu = long_mode();
    cpu.state.cpl = 3;
    assert_eq!(run(&mut cpu, SMSW_RAX), Ok(Flow::Next));
    assert_eq!(get(&cpu, reg::RAX), cpu.state.cr0);
    cpu.state.cr4 |= cr4::UMIP;
    assert_eq!(run(&mut cpu, SMSW_RAX), Err(GP));
}

#[test]
fn xcr_access() {
    const XGETBV: &[u8] = &[0x0f, 0x01, 0xd0];
    const XSETBV: &[u8] = &[0x0f, 0x01, 0xd1];
    let mut cpu = long_mode();
    assert_eq!(run(&mut cpu, XGETBV), Err(UD));
    assert_eq!(run(&mut cpu, XSETBV), Err(UD));
    cpu.state.cr4 |= cr4::OSXSAVE;
    cpu.state.xcr0 = 7;
    assert_eq!(run(&mut cpu, XGETBV), Ok(Flow::Next));
    assert_eq!((get(&cpu, reg::RDX), get(&cpu, reg::RAX)), (0, 7));
    set(&mut cpu, reg::RCX, 1);
    assert_eq!(run(&mut cpu, XGETBV), Ok(Flow::Next));
    assert_eq!(get(&cpu, reg::RAX) & 4, 0, "no YMM register is in use");
    cpu.state.zmm[3].0[31] = 1;
    assert_eq!(run(&mut cpu, XGETBV), Ok(Flow::Next));
    assert_eq!(get(&cpu, reg::RAX) & 4, 4, "one is");
    set(&mut cpu, reg::RCX, 2);
    assert_eq!(run(&mut cpu, XGETBV), Err(GP));
    set(&mut cpu, reg::RCX, 0);
    set(&mut cpu, reg::RAX, 0xe7);
    assert_eq!(run(&mut cpu, XSETBV), Err(Pending::Exit(Exit::Xsetbv { index: 0, value: 0xe7 })));
    cpu.state.cpl = 3;
    assert_eq!(run(&mut cpu, XSETBV), Err(GP));
}

#[test]
fn protection_key_rights() {
    const RDPKRU: &[u8] = &[0x0f, 0x01, 0xee];
    const WRPKRU: &[u8] = &[0x0f, 0x01, 0xef];
    let mut cpu = long_mode();
    assert_eq!(run(&mut cpu, RDPKRU), Err(UD));
    cpu.state.cr4 |= cr4::PKE;
    set(&mut cpu, reg::RAX, 0x5555_5554);
    assert_eq!(run(&mut cpu, WRPKRU), Ok(Flow::End));
    assert_eq!(cpu.state.pkru, 0x5555_5554);
    set(&mut cpu, reg::RDX, 1);
    assert_eq!(run(&mut cpu, WRPKRU), Err(GP));
    assert_eq!(run(&mut cpu, RDPKRU), Ok(Flow::Next));
    assert_eq!((get(&cpu, reg::RDX), get(&cpu, reg::RAX)), (0, 0x5555_5554));
    set(&mut cpu, reg::RCX, 1);
    assert_eq!(run(&mut cpu, RDPKRU), Err(GP));
}

#[test]
fn fs_and_gs_bases() {
    const WRGSBASE_RAX: &[u8] = &[0xf3, 0x48, 0x0f, 0xae, 0xd8];
    const RDGSBASE_EAX: &[u8] = &[0xf3, 0x0f, 0xae, 0xc8];
    let mut cpu = long_mode();
    assert_eq!(run(&mut cpu, WRGSBASE_RAX), Err(UD));
    cpu.state.cr4 |= cr4::FSGSBASE;
    set(&mut cpu, reg::RAX, 0xffff_8880_1234_5678);
    assert_eq!(run(&mut cpu, WRGSBASE_RAX), Ok(Flow::Next));
    assert_eq!(cpu.state.ea_base[5], 0xffff_8880_1234_5678);
    assert_eq!(run(&mut cpu, RDGSBASE_EAX), Ok(Flow::Next));
    assert_eq!(get(&cpu, reg::RAX), 0x1234_5678);
    set(&mut cpu, reg::RAX, 1 << 57);
    assert_eq!(run(&mut cpu, WRGSBASE_RAX), Err(GP));
    cpu.state.kernel_gs_base = 0x7000;
    assert_eq!(run(&mut cpu, &[0x0f, 0x01, 0xf8]), Ok(Flow::Next));
    assert_eq!((cpu.state.segs[5].base, cpu.state.ea_base[5]), (0x7000, 0x7000));
    assert_eq!(cpu.state.kernel_gs_base, 0xffff_8880_1234_5678);
}

fn wrmsr(cpu: &mut Cpu, index: u32, value: u64) -> Result<Flow, Pending> {
    set(cpu, reg::RCX, u64::from(index));
    set(cpu, reg::RAX, value & 0xffff_ffff);
    set(cpu, reg::RDX, value >> 32);
    run(cpu, &[0x0f, 0x30])
}

#[test]
fn msrs_of_the_state() {
    let kernel = 0xffff_ffff_8100_0000;
    for (index, value, valid) in [
        (0xc000_0081, 0x0023_0010_0000_0000, true),
        (0xc000_0082, kernel, true),
        (0xc000_0082, 1 << 57, false),
        (0xc000_0084, 0x4_7700, true),
        (0xc000_0084, 1 << 32, false),
        (0xc000_0100, 0x7fff_0000, true),
        (0xc000_0102, 1 << 63, false),
        (0xc000_0103, 3, true),
        (0xc000_0103, 1 << 32, false),
        (0x174, 0x10, true),
        (0x175, kernel, true),
        (0x176, 0x0f00_0000_0000_0000, false),
        (0x277, 0x0407_0506_0007_0106, true),
        (0x277, 0x0200_0000_0000_0000, false),
        (0xda0, 0, true),
        (0xda0, 1 << 11, false),
        (0xc000_0080, efer::SCE | efer::LME | efer::LMA, true),
        (0xc000_0080, efer::SCE | efer::NXE, false),
        (0xc000_0080, efer::LME | 1 << 12, false),
    ] {
        let mut cpu = long_mode();
        let expected = if valid { Ok(Flow::End) } else { Err(GP) };
        assert_eq!(wrmsr(&mut cpu, index, value), expected, "{index:#x} {value:#x}");
        if valid {
            set(&mut cpu, reg::RCX, u64::from(index));
            assert_eq!(run(&mut cpu, &[0x0f, 0x32]), Ok(Flow::End));
            assert_eq!(get(&cpu, reg::RDX) << 32 | get(&cpu, reg::RAX), value, "{index:#x}");
        }
    }
}

#[test]
fn other_msrs_exit() {
    let mut cpu = long_mode();
    let exit = Exit::Wrmsr { index: 0x6e0, value: 1 << 40 | 5 };
    assert_eq!(wrmsr(&mut cpu, 0x6e0, 1 << 40 | 5), Err(Pending::Exit(exit)));
    let exit = Exit::Wrmsr { index: 0x10, value: 7 };
    assert_eq!(wrmsr(&mut cpu, 0x10, 7), Err(Pending::Exit(exit)), "the TSC's offset is the hypervisor's");
    set(&mut cpu, reg::RCX, 0x1b);
    assert_eq!(run(&mut cpu, &[0x0f, 0x32]), Err(Pending::Exit(Exit::Rdmsr { index: 0x1b })));
    cpu.controls.msr_exiting = true;
    let exit = Exit::Wrmsr { index: 0xc000_0082, value: 0 };
    assert_eq!(wrmsr(&mut cpu, 0xc000_0082, 0), Err(Pending::Exit(exit)));
}

#[test]
fn the_model_decides_which_msrs_there_are() {
    let features = CpuModel::parse("nehalem").unwrap().features();
    let mut cpu = long_mode();
    cpu.set_features(features);
    assert!(matches!(wrmsr(&mut cpu, 0xda0, 0), Err(Pending::Exit(Exit::Wrmsr { .. }))), "no XSAVES");
}

#[test]
fn time_stamp_counter() {
    const RDTSC: &[u8] = &[0x0f, 0x31];
    const RDTSCP: &[u8] = &[0x0f, 0x01, 0xf9];
    let mut cpu = long_mode();
    let (hz, instructions_per_second) = (3_000_000_000, 1_000_000_000);
    cpu.clock = crate::clock::Clock::Virtual { hz, instructions_per_second, skipped: 0 };
    cpu.counters.instructions = 1 << 32;
    cpu.controls.tsc_offset = 7;
    cpu.state.tsc_aux = 42;
    assert_eq!(run(&mut cpu, RDTSCP), Ok(Flow::End));
    assert_eq!((get(&cpu, reg::RDX), get(&cpu, reg::RAX), get(&cpu, reg::RCX)), (3, 7, 42));
    cpu.state.cpl = 3;
    cpu.state.cr4 |= cr4::TSD;
    assert_eq!(run(&mut cpu, RDTSC), Err(GP));
    cpu.state.cpl = 0;
    cpu.controls.rdtsc_exiting = true;
    assert_eq!(run(&mut cpu, RDTSC), Err(Pending::Exit(Exit::Rdtsc)));
}

#[test]
fn instructions_that_exit() {
    let cases: &[(&[u8], Exit)] = &[
        (&[0x0f, 0xa2], Exit::Cpuid),
        (&[0x0f, 0x01, 0xc1], Exit::Vmcall),
        (&[0x0f, 0x01, 0xd9], Exit::Vmmcall),
        (&[0x0f, 0x01, 0xc8], Exit::Monitor),
        (&[0x0f, 0x01, 0xc9], Exit::Mwait),
        (&[0x0f, 0x08], Exit::Invd),
        (&[0x0f, 0x09], Exit::Wbinvd),
        (&[0xf3, 0x0f, 0x09], Exit::Wbinvd),
        (&[0x0f, 0x33], Exit::Rdpmc),
    ];
    for (bytes, exit) in cases {
        assert_eq!(run(&mut long_mode(), bytes), Err(Pending::Exit(*exit)), "{bytes:x?}");
    }
}

#[test]
fn instructions_that_no_model_has() {
    let cases: &[&[u8]] = &[
        &[0x0f, 0x01, 0xc4],       // vmxoff
        &[0x0f, 0x01, 0xc2],       // vmlaunch
        &[0x0f, 0x01, 0xd8],       // vmrun
        &[0x0f, 0x37],             // getsec
        &[0x0f, 0x0b],             // ud2
        &[0x0f, 0xb9, 0xc0],       // ud1
        &[0x0f, 0xff, 0xc0],       // ud0
        &[0x0f, 0x22, 0xc8],       // mov cr1
        &[0xf3, 0x0f, 0xc7, 0xf0], // senduipi
    ];
    for bytes in cases {
        assert_eq!(run(&mut long_mode(), bytes), Err(UD), "{bytes:x?}");
    }
}

#[test]
fn rsm_is_for_system_management_mode() {
    const RSM: &[u8] = &[0x0f, 0xaa];
    let mut cpu = long_mode();
    assert_eq!(run(&mut cpu, RSM), Err(UD));
    cpu.set_smm(true);
    assert_eq!(run(&mut cpu, RSM), Err(Pending::Exit(Exit::Rsm)));
}

#[test]
fn user_waits_end_at_once() {
    const TPAUSE_EBX: &[u8] = &[0x66, 0x0f, 0xae, 0xf3];
    let mut cpu = long_mode();
    cpu.state.set_rflags(0x8d5);
    assert_eq!(run(&mut cpu, TPAUSE_EBX), Ok(Flow::End));
    assert_eq!(cpu.state.status.to_rflags(), 0);
    set(&mut cpu, reg::RBX, 2);
    assert_eq!(run(&mut cpu, TPAUSE_EBX), Err(GP));
}

/// A 64-bit guest whose page of [`DATA`] is `flags`.
fn guest_with_page(flags: u64) -> Guest {
    let mut guest = Guest::new(CodeSize::Bits64);
    map(&mut guest, DATA, flags);
    guest
}

/// Page-table entry of the page at [`DATA`], which belongs to the table at 0x43000.
fn map(guest: &mut Guest, to: u64, flags: u64) {
    guest.put(0x4_3000 + (DATA >> 12) * 8, &(to | flags).to_le_bytes());
    // The tables above must allow what the entry allows.
    for table in [0x4_0000u64, 0x4_1000, 0x4_2000] {
        guest.put(table, &((table + 0x1000) | 7).to_le_bytes());
    }
}

/// mov rbx, [DATA]
const LOAD: &[u8] = &[0x48, 0x8b, 0x1c, 0x25, 0x00, 0x80, 0x00, 0x00];
/// invlpg [DATA]
const INVLPG: &[u8] = &[0x0f, 0x01, 0x3c, 0x25, 0x00, 0x80, 0x00, 0x00];
/// mov rax, cr3; mov cr3, rax
const RELOAD_CR3: &[u8] = &[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8];

#[test]
fn translations_are_forgotten_when_told() {
    for forget in [INVLPG, RELOAD_CR3] {
        let mut guest = guest_with_page(3);
        guest.put(DATA, &1u64.to_le_bytes());
        guest.put(0x9000, &2u64.to_le_bytes());
        guest.finish(LOAD);
        assert_eq!(guest.reg(reg::RBX), 1);
        map(&mut guest, 0x9000, 3);
        guest.finish(&[forget, LOAD].concat());
        assert_eq!(guest.reg(reg::RBX), 2, "{forget:x?}");
    }
}

#[test]
fn invpcid_descriptors() {
    // invpcid rax, [0xa000]
    const INVPCID: &[u8] = &[0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0x00, 0xa0, 0x00, 0x00];
    for (kind, pcid, address, pcide, valid) in [
        (0, 0, DATA, false, true),
        (0, 0, 1 << 57, false, false),
        (0, 1, DATA, false, false),
        (0, 1, DATA, true, true),
        (1, 1, 1 << 57, true, true),
        (1, 1, 0, false, false),
        (2, 1, 0, false, true),
        (2, 1 << 12, 0, true, false),
        (3, 0, 0, false, true),
        (4, 0, 0, false, false),
        (1 << 32, 0, 0, false, false),
    ] {
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.cpu.state.cr4 |= if pcide { cr4::PCIDE } else { 0 };
        guest.put(0xa000, &u64::to_le_bytes(pcid));
        guest.put(0xa008, &u64::to_le_bytes(address));
        guest.set(reg::RAX, kind);
        if valid {
            guest.finish(INVPCID);
        } else {
            assert_eq!(guest.fault(INVPCID), GP0, "type {kind:#x}, PCID {pcid:#x}, {address:#x}");
        }
    }
}

#[test]
fn smap_and_its_override() {
    let mut guest = guest_with_page(7);
    guest.cpu.state.cr4 |= cr4::SMAP;
    assert_eq!(guest.fault(LOAD), (vector::PF, Some(1)));
    const STAC: &[u8] = &[0x0f, 0x01, 0xcb];
    const CLAC: &[u8] = &[0x0f, 0x01, 0xca];
    guest.finish(&[STAC, LOAD].concat());
    let exit = guest.run(&[STAC, LOAD, CLAC, LOAD].concat());
    assert!(matches!(exit, Exit::Exception(Exception { vector: vector::PF, .. })), "{exit:?}");
    assert_eq!(guest.cpu.state.rip, CODE + 3 + LOAD.len() as u64 + 3);
}

#[test]
fn protection_keys_follow_wrpkru() {
    // xor ecx, ecx; xor edx, edx; mov eax, IMM; wrpkru; mov rbx, [DATA]
    let wrpkru = |rights: u8| {
        let mut code = vec![0x31, 0xc9, 0x31, 0xd2, 0xb8, rights, 0, 0, 0, 0x0f, 0x01, 0xef];
        code.extend(LOAD);
        code
    };
    let mut guest = guest_with_page(7 | 1 << 59);
    guest.cpu.state.cr4 |= cr4::PKE;
    guest.finish(&wrpkru(0));
    let exit = guest.run(&wrpkru(0b0100));
    let denied = Exit::Exception(Exception::pf(DATA, 1 | 1 << 5));
    assert_eq!(exit, denied, "access disabled for key 1");
    guest.finish(&wrpkru(0b1000));
}

#[test]
fn cache_lines_are_checked_as_byte_loads() {
    // clflush, clflushopt, clwb of [UNMAPPED]
    for prefix in [&[0x0f, 0xae, 0x3c][..], &[0x66, 0x0f, 0xae, 0x3c], &[0x66, 0x0f, 0xae, 0x34]] {
        let at = |address: u64| [prefix, &[0x25], &(address as u32).to_le_bytes()].concat();
        let mut guest = Guest::new(CodeSize::Bits64);
        assert_eq!(guest.fault(&at(UNMAPPED)), (vector::PF, Some(0)), "{prefix:x?}");
        guest.finish(&at(DATA + 63));
        guest.finish(&[&[0x0f, 0x1c, 0x04, 0x25][..], &(UNMAPPED as u32).to_le_bytes()].concat());
    }
}

#[test]
fn direct_stores() {
    let line: Vec<u8> = (0..64).collect();
    // movdir64b rax, [DATA]
    const MOVDIR64B: &[u8] = &[0x66, 0x0f, 0x38, 0xf8, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00];
    let mut guest = Guest::new(CodeSize::Bits64);
    guest.put(DATA, &line);
    guest.set(reg::RAX, DATA + 0x1040).finish(MOVDIR64B);
    assert_eq!(guest.bytes(DATA + 0x1040, 64), line);
    assert_eq!(guest.set(reg::RAX, DATA + 0x1048).fault(MOVDIR64B), GP0, "not aligned");
    // movdiri [DATA], rax
    guest.set(reg::RAX, 0x1122_3344_5566_7788);
    guest.finish(&[0x48, 0x0f, 0x38, 0xf9, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00]);
    assert_eq!(guest.word(DATA, 8), 0x1122_3344_5566_7788);
}

#[test]
fn machine_status_word_in_memory() {
    let mut guest = Guest::new(CodeSize::Bits64);
    guest.put(DATA, &[0xff; 8]);
    // smsw [DATA]: 16 bits whatever the operand size
    guest.finish(&[0x48, 0x0f, 0x01, 0x24, 0x25, 0x00, 0x80, 0x00, 0x00]);
    assert_eq!(guest.word(DATA, 8), 0xffff_ffff_ffff_0000 | guest.cpu.state.cr0 & 0xffff);
    guest.put(DATA, &(cr0::TS as u16).to_le_bytes());
    // lmsw [DATA]
    guest.finish(&[0x0f, 0x01, 0x34, 0x25, 0x00, 0x80, 0x00, 0x00]);
    assert_ne!(guest.cpu.state.cr0 & cr0::TS, 0);
}

#[test]
fn from_real_mode_to_long_mode() {
    let mut guest = Guest::new(CodeSize::Bits64);
    let code_segment = Segment { attributes: 0x9b, limit: 0xffff, ..Segment::default() };
    guest.cpu.state.cr0 = cr0::ET;
    guest.cpu.state.efer = 0;
    guest.cpu.state.cr4 = 0;
    guest.cpu.state.segs[1] = code_segment;
    guest.cpu.refresh_mode();
    #[rustfmt::skip]
    guest.finish(&[
        0x66, 0xb8, 0x20, 0, 0, 0,       // mov eax, CR4.PAE
        0x0f, 0x22, 0xe0,                // mov cr4, eax
        0x66, 0xb8, 0, 0, 4, 0,          // mov eax, 0x40000
        0x0f, 0x22, 0xd8,                // mov cr3, eax
        0x66, 0xb9, 0x80, 0, 0, 0xc0,    // mov ecx, IA32_EFER
        0x66, 0xb8, 0, 1, 0, 0,          // mov eax, EFER.LME
        0x66, 0x31, 0xd2,                // xor edx, edx
        0x0f, 0x30,                      // wrmsr
        0x66, 0xb8, 1, 0, 0, 0x80,       // mov eax, CR0.PG | CR0.PE
        0x0f, 0x22, 0xc0,                // mov cr0, eax
        0x0f, 0x32,                      // rdmsr
    ]);
    assert_eq!(guest.reg(reg::RAX), efer::LME | efer::LMA);
    assert_eq!(guest.cpu.state.code_size, CodeSize::Bits16, "16-bit compatibility mode");
}

#[test]
fn page_directory_pointers_are_loaded_and_checked() {
    let mut guest = Guest::new(CodeSize::Bits32);
    guest.cpu.state.cr4 = cr4::PAE;
    // mov cr3, eax; mov cr0, ebx
    const TURN_ON: &[u8] = &[0x0f, 0x22, 0xd8, 0x0f, 0x22, 0xc3];
    guest.set(reg::RAX, 0xb000).set(reg::RBX, cr0::PE | cr0::PG);
    guest.put(0xb000, &0x4_2001u64.to_le_bytes());
    guest.put(0x4_2000, &0x83u64.to_le_bytes());
    guest.put(0xb008, &0x1e6u64.to_le_bytes());
    guest.finish(TURN_ON);
    assert_eq!(guest.cpu.state.pdptr, [0x4_2001, 0x1e6, 0, 0], "reserved bits count in present entries only");
    guest.put(0xb008, &0x1e7u64.to_le_bytes());
    assert_eq!(guest.fault(&[0x0f, 0x22, 0xd8]), GP0);
    assert_eq!(guest.cpu.state.pdptr[1], 0x1e6, "nothing is loaded then");
}
