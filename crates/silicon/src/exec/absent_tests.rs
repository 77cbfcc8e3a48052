//! Instructions that meet host memory that is not there: each leaves guest mode with nothing done, or as far as a
//! repeated one has come, and completes as if nothing had been once the memory is back.
#![expect(unsafe_code, reason = "takes pages of the guest's memory away")]

use crate::exec::testing::{CODE, DATA, Guest};
use crate::mmu::host;
use crate::model::Features;
use crate::state::{CodeSize, CpuState, reg};
use crate::vmx::Exit;

/// The page that goes.
const GONE: u64 = DATA + 0x1000;

/// Changes what the host allows of the page at `gpa`.
fn protect(guest: &Guest, gpa: u64, protection: libc::c_int) {
    host::install();
    let page = guest.host(gpa & !0xfff);
    // SAFETY: one page of the guest's memory, which is reached through the engine until it is given back.
    assert_eq!(unsafe { libc::mprotect(page as *mut libc::c_void, 4096, protection) }, 0);
}

fn guest(registers: &[(u8, u64)]) -> Guest {
    let mut guest = Guest::new(CodeSize::Bits64);
    guest.cpu.features = Features::default();
    // XMM and x87 instructions, XSAVE.
    guest.cpu.state.cr4 |= 1 << 9 | 1 << 10 | 1 << 18;
    guest.cpu.state.xcr0 = 7;
    guest.cpu.refresh_mode();
    for page in [DATA, GONE, GONE + 0x1000] {
        let bytes: Vec<u8> = (0..4096u64).map(|i| (i * 7 + page) as u8).collect();
        guest.put(page, &bytes);
    }
    for &(register, value) in registers {
        guest.set(register, value);
    }
    for (i, zmm) in guest.cpu.state.zmm.iter_mut().enumerate() {
        zmm.0[..32].fill(i as u8 + 1);
    }
    guest
}

/// The state that an instruction can change, as text.
fn shown(state: &CpuState) -> String {
    format!("{:x?} {:#x} {:#x} {:?} {:?}", &state.regs[..16], state.rip, state.rflags(), state.zmm, state.x87)
}

/// Runs `code` once with all memory there and once with `GONE` away (`protection`) until it has been met; both must
/// come to the same. What of the first attempt's state differs from before it, other than by what is allowed.
fn interrupted(
    name: &str,
    code: &[u8],
    registers: &[(u8, u64)],
    protection: libc::c_int,
) -> (String, String) {
    let mut whole = guest(registers);
    whole.finish(code);
    let mut guest = guest(registers);
    guest.cpu.state.rip = CODE;
    let before = shown(&guest.cpu.state);
    protect(&guest, GONE, protection);
    let exit = guest.run(code);
    let host = guest.host(GONE);
    assert_eq!(exit, Exit::MemoryAbsent { gpa: GONE, host, failed: false }, "{name}");
    assert_eq!(guest.cpu.state.rip, CODE, "{name}");
    let after = shown(&guest.cpu.state);
    // Nothing changes that: it stays absent.
    assert_eq!(guest.cpu.run(), exit, "{name}");
    assert_eq!(shown(&guest.cpu.state), after, "{name}");
    protect(&guest, GONE, libc::PROT_READ | libc::PROT_WRITE);
    guest.cpu.run();
    assert_eq!(shown(&guest.cpu.state), shown(&whole.cpu.state), "{name}");
    assert_eq!(guest.bytes(DATA - 0x1000, 0x4000), whole.bytes(DATA - 0x1000, 0x4000), "{name}");
    (before, after)
}

type Case = (&'static str, &'static [u8], &'static [(u8, u64)]);

/// Cases that read.
const READS: &[Case] = &[
    ("mov al, [rbx]", &[0x8a, 0x03], &[(reg::RBX, GONE)]),
    ("mov ax, [rbx]", &[0x66, 0x8b, 0x03], &[(reg::RBX, GONE)]),
    ("mov eax, [rbx]", &[0x8b, 0x03], &[(reg::RBX, GONE)]),
    ("mov rax, [rbx]", &[0x48, 0x8b, 0x03], &[(reg::RBX, GONE)]),
    ("mov rax, [rbx], into the page", &[0x48, 0x8b, 0x03], &[(reg::RBX, GONE - 4)]),
    ("mov rax, [rbx], out of the page", &[0x48, 0x8b, 0x03], &[(reg::RBX, GONE + 0xffc)]),
    ("add rax, [rbx]", &[0x48, 0x03, 0x03], &[(reg::RBX, GONE), (reg::RAX, 5)]),
    ("cmp [rbx], rax", &[0x48, 0x39, 0x03], &[(reg::RBX, GONE), (reg::RAX, 5)]),
    ("mul qword [rbx]", &[0x48, 0xf7, 0x23], &[(reg::RBX, GONE), (reg::RAX, 5)]),
    ("pop rax", &[0x58], &[(reg::RSP, GONE)]),
    ("leave", &[0xc9], &[(reg::RBP, GONE)]),
    ("movdqu xmm0, [rbx]", &[0xf3, 0x0f, 0x6f, 0x03], &[(reg::RBX, GONE)]),
    ("movq xmm0, [rbx]", &[0xf3, 0x0f, 0x7e, 0x03], &[(reg::RBX, GONE)]),
    ("movd xmm0, [rbx]", &[0x66, 0x0f, 0x6e, 0x03], &[(reg::RBX, GONE)]),
    ("paddd xmm0, [rbx]", &[0x66, 0x0f, 0xfe, 0x03], &[(reg::RBX, GONE)]),
    ("popcnt rax, [rbx]", &[0xf3, 0x48, 0x0f, 0xb8, 0x03], &[(reg::RBX, GONE)]),
    ("fld qword [rbx]", &[0xdd, 0x03], &[(reg::RBX, GONE)]),
    ("fadd qword [rbx]", &[0xdc, 0x03], &[(reg::RBX, GONE)]),
    ("sqrtps xmm0, [rbx]", &[0x0f, 0x51, 0x03], &[(reg::RBX, GONE)]),
    ("lodsq", &[0x48, 0xad], &[(reg::RSI, GONE)]),
    ("repe cmpsb", &[0xf3, 0xa6], &[(reg::RSI, GONE), (reg::RDI, DATA), (reg::RCX, 16)]),
    ("repne scasb", &[0xf2, 0xae], &[(reg::RDI, GONE), (reg::RCX, 600), (reg::RAX, 0x55)]),
];

/// Cases that write, or read and write.
const WRITES: &[Case] = &[
    ("mov [rbx], al", &[0x88, 0x03], &[(reg::RBX, GONE)]),
    ("mov [rbx], ax", &[0x66, 0x89, 0x03], &[(reg::RBX, GONE)]),
    ("mov [rbx], eax", &[0x89, 0x03], &[(reg::RBX, GONE)]),
    ("mov [rbx], rax", &[0x48, 0x89, 0x03], &[(reg::RBX, GONE)]),
    ("mov [rbx], rax, into the page", &[0x48, 0x89, 0x03], &[(reg::RBX, GONE - 4)]),
    ("inc qword [rbx], into the page", &[0x48, 0xff, 0x03], &[(reg::RBX, GONE - 4)]),
    ("inc qword [rbx], out of the page", &[0x48, 0xff, 0x03], &[(reg::RBX, GONE + 0xffc)]),
    ("lock inc qword [rbx], into the page", &[0xf0, 0x48, 0xff, 0x03], &[(reg::RBX, GONE - 4)]),
    ("add [rbx], rax", &[0x48, 0x01, 0x03], &[(reg::RBX, GONE), (reg::RAX, 5)]),
    ("shl qword [rbx], 3", &[0x48, 0xc1, 0x23, 0x03], &[(reg::RBX, GONE)]),
    ("lock add [rbx], rax", &[0xf0, 0x48, 0x01, 0x03], &[(reg::RBX, GONE), (reg::RAX, 5)]),
    ("lock xadd [rbx], rax", &[0xf0, 0x48, 0x0f, 0xc1, 0x03], &[(reg::RBX, GONE), (reg::RAX, 5)]),
    ("xchg [rbx], eax", &[0x87, 0x03], &[(reg::RBX, GONE), (reg::RAX, 5)]),
    ("lock cmpxchg16b [rbx]", &[0xf0, 0x48, 0x0f, 0xc7, 0x0b], &[(reg::RBX, GONE)]),
    ("bts [rbx], rax", &[0x48, 0x0f, 0xab, 0x03], &[(reg::RBX, GONE), (reg::RAX, 77)]),
    ("push rax", &[0x50], &[(reg::RSP, GONE + 0x800), (reg::RAX, 5)]),
    ("enter 16, 1", &[0xc8, 0x10, 0x00, 0x01], &[(reg::RSP, GONE + 8), (reg::RBP, DATA + 64)]),
    ("movdqu [rbx], xmm1", &[0xf3, 0x0f, 0x7f, 0x0b], &[(reg::RBX, GONE)]),
    ("movdqu [rbx], xmm1, into the page", &[0xf3, 0x0f, 0x7f, 0x0b], &[(reg::RBX, GONE - 8)]),
    ("movq [rbx], xmm1", &[0x66, 0x0f, 0xd6, 0x0b], &[(reg::RBX, GONE)]),
    ("movd [rbx], xmm1", &[0x66, 0x0f, 0x7e, 0x0b], &[(reg::RBX, GONE)]),
    ("movhps [rbx], xmm1", &[0x0f, 0x17, 0x0b], &[(reg::RBX, GONE)]),
    ("fstcw [rbx]", &[0xd9, 0x3b], &[(reg::RBX, GONE)]),
    ("fxsave [rbx]", &[0x0f, 0xae, 0x03], &[(reg::RBX, GONE)]),
    ("xsave [rbx]", &[0x0f, 0xae, 0x23], &[(reg::RBX, GONE), (reg::RAX, 7)]),
    ("stosq", &[0x48, 0xab], &[(reg::RDI, GONE), (reg::RAX, 5)]),
    ("rep movsq", &[0xf3, 0x48, 0xa5], &[(reg::RSI, DATA), (reg::RDI, GONE), (reg::RCX, 16)]),
    ("rep stosb", &[0xf3, 0xaa], &[(reg::RDI, GONE), (reg::RCX, 100), (reg::RAX, 0x33)]),
    ("rep stosd", &[0xf3, 0xab], &[(reg::RDI, GONE), (reg::RCX, 100), (reg::RAX, 0x1234_5678)]),
];

#[test]
fn an_instruction_whose_memory_is_absent_changes_nothing_and_completes_later() {
    for &(name, code, registers) in READS.iter().chain(WRITES) {
        let (before, after) = interrupted(name, code, registers, libc::PROT_NONE);
        assert_eq!(before, after, "{name}");
    }
}

#[test]
fn a_write_to_memory_that_may_only_be_read_is_one_to_absent_memory() {
    for &(name, code, registers) in WRITES {
        let (before, after) = interrupted(name, code, registers, libc::PROT_READ);
        assert_eq!(before, after, "{name}");
    }
    for &(name, code, registers) in READS {
        let mut guest = guest(registers);
        protect(&guest, GONE, libc::PROT_READ);
        guest.finish(code);
        protect(&guest, GONE, libc::PROT_READ | libc::PROT_WRITE);
        assert_ne!(guest.cpu.state.rip, CODE, "{name}");
    }
}

#[test]
fn a_repeated_instruction_stops_at_the_element_that_is_absent() {
    const COUNT: u64 = 96;
    // std
    const DOWN: &[u8] = &[0xfd];
    let near = GONE - 8 * 10;
    for (name, code, set, left) in [
        ("movsq to", &[0xf3, 0x48, 0xa5][..], [(reg::RSI, DATA), (reg::RDI, near)], COUNT - 10),
        ("movsq from", &[0xf3, 0x48, 0xa5], [(reg::RSI, near), (reg::RDI, DATA)], COUNT - 10),
        ("movsw to", &[0xf3, 0x66, 0xa5], [(reg::RSI, DATA), (reg::RDI, near)], COUNT - 40),
        // It feeds on itself.
        ("movsb to", &[0xf3, 0xa4], [(reg::RSI, near - 3), (reg::RDI, near)], COUNT - 80),
        ("stosq", &[0xf3, 0x48, 0xab], [(reg::RSI, 0), (reg::RDI, near)], COUNT - 10),
        ("stosb", &[0xf3, 0xaa], [(reg::RSI, 0), (reg::RDI, near)], COUNT - 80),
    ] {
        let registers = [set[0], set[1], (reg::RCX, COUNT), (reg::RAX, 0x1234)];
        interrupted(name, code, &registers, libc::PROT_NONE);
        let mut guest = guest(&registers);
        protect(&guest, GONE, libc::PROT_NONE);
        guest.run(code);
        assert_eq!(guest.reg(reg::RCX), left, "{name}");
        protect(&guest, GONE, libc::PROT_READ | libc::PROT_WRITE);
    }
    // Downwards, out of the page above.
    let above = GONE + 0x1000 + 8 * 9;
    for (name, code, set) in [
        ("movsq", &[0xf3, 0x48, 0xa5][..], [(reg::RSI, DATA + 0x800), (reg::RDI, above)]),
        ("stosq", &[0xf3, 0x48, 0xab], [(reg::RSI, 0), (reg::RDI, above)]),
    ] {
        let registers = [set[0], set[1], (reg::RCX, COUNT), (reg::RAX, 0x1234)];
        let mut guest = guest(&registers);
        protect(&guest, GONE, libc::PROT_NONE);
        let all = [DOWN, code].concat();
        assert!(matches!(guest.run(&all), Exit::MemoryAbsent { gpa: GONE, .. }), "{name}");
        assert_eq!((guest.reg(reg::RCX), guest.reg(reg::RDI)), (COUNT - 10, GONE + 0xff8), "{name}");
        protect(&guest, GONE, libc::PROT_READ | libc::PROT_WRITE);
        guest.cpu.run();
        assert_eq!(guest.reg(reg::RCX), 0, "{name}");
    }
}

#[test]
fn code_that_is_absent_is_fetched_later() {
    // jmp rbx; what is there: inc eax; ud2
    for before_that in [false, true] {
        let mut guest = guest(&[(reg::RBX, GONE)]);
        guest.put(GONE, &[0xff, 0xc0, 0x0f, 0x0b]);
        if before_that {
            guest.run(&[0xff, 0xe3]);
            guest.set(reg::RAX, 0);
        }
        protect(&guest, GONE, libc::PROT_NONE);
        let exit = guest.run(&[0xff, 0xe3]);
        assert!(matches!(exit, Exit::MemoryAbsent { gpa: GONE, .. }), "{exit:?}");
        assert_eq!(guest.cpu.state.rip, GONE);
        protect(&guest, GONE, libc::PROT_READ | libc::PROT_WRITE);
        guest.cpu.run();
        assert_eq!(guest.reg(reg::RAX), 1);
    }
    // An instruction across the pages: mov eax, imm32.
    let mut guest = guest(&[(reg::RBX, GONE - 2)]);
    guest.put(GONE - 2, &[0xb8, 1, 2, 3, 4, 0x0f, 0x0b]);
    protect(&guest, GONE, libc::PROT_NONE);
    let exit = guest.run(&[0xff, 0xe3]);
    assert!(matches!(exit, Exit::MemoryAbsent { gpa: GONE, .. }), "{exit:?}");
    assert_eq!((guest.cpu.state.rip, guest.reg(reg::RAX)), (GONE - 2, 0));
    protect(&guest, GONE, libc::PROT_READ | libc::PROT_WRITE);
    guest.cpu.run();
    assert_eq!(guest.reg(reg::RAX), 0x0403_0201);
}

#[test]
fn page_tables_that_are_absent_are_walked_later() {
    for (table, protection) in
        [(0x4_0000, libc::PROT_NONE), (0x4_3000, libc::PROT_NONE), (0x4_3000, libc::PROT_READ)]
    {
        let mut guest = guest(&[(reg::RBX, GONE)]);
        protect(&guest, table, protection);
        // mov [rbx], rax
        let exit = guest.run(&[0x48, 0x89, 0x03]);
        assert!(matches!(exit, Exit::MemoryAbsent { gpa, .. } if gpa == table), "{exit:?}");
        assert_eq!(guest.cpu.state.rip, CODE);
        protect(&guest, table, libc::PROT_READ | libc::PROT_WRITE);
        guest.cpu.run();
        assert_eq!((guest.cpu.state.rip, guest.word(GONE, 8)), (CODE + 3, 0));
    }
}

#[test]
fn an_event_whose_stack_or_table_is_absent_is_delivered_later() {
    let handler = CODE + 0x800;
    let gate = (handler & 0xffff) | 8 << 16 | 0x8e00 << 32;
    for absent in [GONE, GONE + 0x1000] {
        let mut guest = guest(&[(reg::RSP, GONE + 0x800)]);
        guest.put(CODE + 0x600, &[0; 1]);
        // The IDT; the descriptor of the code segment, for the gates.
        guest.put(GONE + 0x1000, &[0; 256]);
        guest.put(GONE + 0x1000 + 6 * 16, &gate.to_le_bytes());
        guest.put(DATA + 0x100 + 8, &0x00af_9b00_0000_ffffu64.to_le_bytes());
        guest.cpu.state.idtr.base = GONE + 0x1000;
        guest.cpu.state.idtr.limit = 255;
        guest.cpu.state.gdtr.base = DATA + 0x100;
        guest.cpu.state.gdtr.limit = 31;
        guest.cpu.controls.exception_bitmap = 0;
        guest.put(handler, &[0xf4]);
        let before = guest.reg(reg::RSP);
        protect(&guest, absent, libc::PROT_NONE);
        // ud2
        let exit = guest.run(&[0x0f, 0x0b]);
        assert!(matches!(exit, Exit::MemoryAbsent { gpa, .. } if gpa == absent), "{exit:?}");
        assert_eq!((guest.cpu.state.rip, guest.reg(reg::RSP)), (CODE, before));
        assert!(guest.cpu.idt_vectoring.is_some(), "the hypervisor hears which event it was");
        protect(&guest, absent, libc::PROT_READ | libc::PROT_WRITE);
        assert_eq!(guest.cpu.run(), Exit::Hlt);
        assert_eq!((guest.cpu.state.rip, guest.word(guest.reg(reg::RSP), 8)), (handler, CODE));
    }
}

#[test]
fn a_page_that_goes_after_its_translation_is_known_is_met_all_the_same() {
    let mut guest = guest(&[(reg::RBX, GONE), (reg::RAX, 1)]);
    // add [rbx], rax; movdqu [rbx], xmm1; paddd xmm0, [rbx]
    let code = [0x48, 0x01, 0x03, 0xf3, 0x0f, 0x7f, 0x0b, 0x66, 0x0f, 0xfe, 0x03];
    guest.finish(&code);
    for start in [0, 3, 7] {
        protect(&guest, GONE, libc::PROT_NONE);
        guest.cpu.state.rip = CODE + start;
        let exit = guest.cpu.run();
        assert!(matches!(exit, Exit::MemoryAbsent { gpa: GONE, .. }), "{exit:?}");
        assert_eq!(guest.cpu.state.rip, CODE + start);
        protect(&guest, GONE, libc::PROT_READ | libc::PROT_WRITE);
        guest.cpu.run();
        assert_eq!(guest.cpu.state.rip, CODE + 11);
    }
}
