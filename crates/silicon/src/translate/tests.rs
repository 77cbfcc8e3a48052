//! Random programs on both engines: whatever they do, registers, flags, memory and counts must be the same.

use std::time::Duration;

use iced_x86::code_asm::*;

use super::{Engine, Translator, has_fsgsbase};
use crate::cpu::Requests;
use crate::exception::Exception;
use crate::exec::testing::{CODE, DATA, Guest, STACK, TABLES, UNMAPPED};
use crate::mmu::host;
use crate::state::{CodeSize, cr0, cr4, reg};
use crate::vmx::Exit;

/// A guest in 64-bit mode that may use vector registers.
pub(super) fn guest(engine: Engine) -> Guest {
    host::install();
    let mut guest = Guest::new(CodeSize::Bits64);
    guest.cpu.translator = Translator::new(engine);
    assert_eq!(guest.cpu.translator.code.is_some(), engine != Engine::Interpret && has_fsgsbase());
    let state = &mut guest.cpu.state;
    state.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
    state.kernel_gs_base = 0x1234_5678_0000;
    state.cr0 = (state.cr0 | cr0::MP) & !cr0::TS;
    state.xcr0 = 0xe7;
    guest.cpu.refresh_mode();
    guest
}

/// The same guest on both engines, one of which translates what has run so often: at once, blocks are translated alone; later,
/// together with those that they lead to.
pub(super) fn pair(after: u32) -> [Guest; 2] {
    [Engine::Interpret, Engine::Translate(after)].map(guest)
}

/// What a program leaves behind: registers, RIP, RFLAGS and the count of instructions; vector registers; memory.
fn outcome(guest: &Guest) -> ([u64; 19], Vec<u8>, Vec<u8>) {
    let state = &guest.cpu.state;
    let vectors = state.zmm.iter().flat_map(|zmm| zmm.0).chain(state.k.iter().flat_map(|k| k.to_le_bytes()));
    let mut registers = [0; 19];
    registers[..16].copy_from_slice(&state.regs[..16]);
    registers[16..].copy_from_slice(&[state.rip, state.rflags(), guest.cpu.instructions()]);
    let memory = [guest.bytes(DATA, 0x4000), guest.bytes(STACK - 0x1000, 0x1000)].concat();
    (registers, vectors.collect(), memory)
}

/// Where two memories differ first, and what is there.
fn first_difference(one: &[u8], other: &[u8]) -> Option<(usize, u8, u8)> {
    one.iter()
        .zip(other)
        .enumerate()
        .find(|(_, (one, other))| one != other)
        .map(|(at, (one, other))| (at, *one, *other))
}

/// Runs `code` on both, from the same random registers, and compares; the exit.
pub(super) fn compare(guests: &mut [Guest; 2], code: &[u8], seed: u64) -> Exit {
    let exits = [0, 1].map(|i| {
        let mut random = Random(seed | 1);
        let guest = &mut guests[i];
        for register in 0..16 {
            guest.set(register, random.next());
        }
        guest.set(reg::RSP, STACK - 256).set(reg::RSI, DATA + 64 * (seed % 31)).set(reg::R15, 3 + seed % 5);
        for zmm in &mut guest.cpu.state.zmm {
            zmm.0.fill_with(|| random.next() as u8);
        }
        let content: Vec<u8> = (0..0x4000).map(|_| random.next() as u8).collect();
        guest.put(DATA, &content);
        guest.run(code)
    });
    assert_eq!(exits[0], exits[1], "seed {seed:#x}: {code:02x?}");
    let [(registers, vectors, memory), translated] = [&guests[0], &guests[1]].map(outcome);
    assert_eq!(translated.0, registers, "seed {seed:#x}: {code:02x?}");
    assert_eq!(first_difference(&translated.1, &vectors), None, "vectors; seed {seed:#x}: {code:02x?}");
    assert_eq!(first_difference(&translated.2, &memory), None, "memory; seed {seed:#x}: {code:02x?}");
    exits[0]
}

/// Compares so many programs on the guests; how many of them ended before their end.
pub(super) fn compare_programs(
    guests: &mut [Guest; 2],
    random: &mut Random,
    count: u32,
    program: fn(&mut Random) -> Vec<u8>,
) -> u32 {
    let ends_early = (0..count).filter(|_| {
        let seed = random.next();
        let code = program(random);
        compare(guests, &code, seed) != Exit::Exception(Exception::UD)
    });
    let early = ends_early.count() as u32;
    assert_eq!(guests[1].cpu.translator.unsuited, 0);
    early
}

pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound
    }
    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
    /// A register that programs may change: not RSP, RSI or R15.
    fn register(&mut self) -> u8 {
        self.pick(&[0, 1, 2, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14])
    }
    /// ModRM, with what follows it, of an operand that is a register or memory at RSI; what it adds to REX.
    fn operand(&mut self, register: u8, align: u64) -> (u8, Vec<u8>) {
        let rex = (register >> 3) << 2;
        if self.below(2) == 0 {
            let other = self.register();
            return (rex | other >> 3, vec![0xc0 | (register & 7) << 3 | (other & 7)]);
        }
        let displacement = (self.below(0x2f00) & !(align - 1)) as u32;
        (rex, [vec![0x80 | (register & 7) << 3 | 6], displacement.to_le_bytes().to_vec()].concat())
    }
}

/// Opcodes with ModRM whose operand may be memory.
const PLAIN: [&[u8]; 31] = [
    &[0x00],
    &[0x01],
    &[0x02],
    &[0x03],
    &[0x09],
    &[0x0b],
    &[0x11],
    &[0x13],
    &[0x19],
    &[0x1b],
    &[0x21],
    &[0x23],
    &[0x29],
    &[0x2b],
    &[0x31],
    &[0x33],
    &[0x38],
    &[0x39],
    &[0x3b],
    &[0x63],
    &[0x85],
    &[0x88],
    &[0x89],
    &[0x8b],
    &[0x0f, 0xaf],
    &[0x0f, 0xb6],
    &[0x0f, 0xb7],
    &[0x0f, 0xbe],
    &[0x0f, 0xbf],
    &[0x0f, 0x44],
    &[0x0f, 0x4c],
];
/// Opcodes whose ModRM says what they do: which of its values, and whether a byte follows.
const GROUPS: [(u8, &[u8], bool); 5] = [
    (0xc1, &[0, 1, 2, 3, 4, 5, 7], true),
    (0xd3, &[0, 1, 2, 3, 4, 5, 7], false),
    (0xf7, &[2, 3, 4, 5, 6, 7], false),
    (0xff, &[0, 1], false),
    (0x83, &[0, 1, 2, 3, 4, 5, 6, 7], true),
];
/// SSE: prefix and opcode; memory operands of all but the last three are aligned.
const SSE: [(u8, u8); 12] = [
    (0x66, 0xfe),
    (0x66, 0xef),
    (0x66, 0xd4),
    (0x66, 0x6f),
    (0x66, 0x7f),
    (0xf2, 0x58),
    (0xf3, 0x59),
    (0xf3, 0x6f),
    (0x66, 0x61),
    (0x66, 0x2e),
    (0xf2, 0x10),
    (0xf2, 0x11),
];

/// One random instruction.
fn instruction(random: &mut Random, code: &mut Vec<u8>) {
    let register = random.register();
    let wide = if random.below(3) == 0 { 0x48 } else { 0x40 };
    match random.below(23) {
        0..=8 => {
            let opcode = random.pick(&PLAIN);
            let (rex, rest) = random.operand(register, 1);
            code.push(wide | rex);
            code.extend(opcode);
            code.extend(rest);
        }
        9..=12 => {
            let (opcode, kinds, byte) = random.pick(&GROUPS);
            let (rex, rest) = random.operand(0, 1);
            let kind = random.pick(kinds);
            code.extend([wide | rex, opcode, rest[0] | kind << 3]);
            code.extend(&rest[1..]);
            code.extend(byte.then(|| random.next() as u8));
            if matches!(opcode, 0xc1 | 0xd3) {
                // OF is undefined if the count is not one: cmp eax, ebx makes it something again.
                code.extend([0x39, 0xd8]);
            }
        }
        13 => code.extend([0x40 | register >> 3, 0x0f, 0x90 | random.below(16) as u8, 0xc0 | register & 7]),
        14 => {
            let other = random.register();
            code.extend([0x40 | register >> 3, 0x50 | register & 7, 0x40 | other >> 3, 0x58 | other & 7]);
        }
        15 => code.extend([wide, random.pick(&[0x98, 0x99])]),
        16 => code.extend([0x48 | register >> 3, 0x0f, 0xc8 | register & 7]),
        17 => {
            // To and from a vector register.
            let opcode = random.pick(&[0x6e, 0x7e]);
            let vector = random.below(8) as u8;
            code.extend([0x66, 0x48 | register >> 3, 0x0f, opcode, 0xc0 | vector << 3 | register & 7]);
        }
        18..=20 => {
            // Locked, or not: XADD, XCHG, CMPXCHG, and on memory ADD, DEC, BTS.
            let (lock, opcode): (bool, &[u8]) = random.pick(&[
                (true, &[0x0f, 0xc1][..]),
                (false, &[0x87]),
                (true, &[0x0f, 0xb1]),
                (true, &[0x0f, 0xb0]),
                (true, &[0x01]),
                (false, &[0x86]),
            ]);
            let displacement = (random.below(0x2f00) as u32).to_le_bytes();
            code.extend(lock.then_some(0xf0));
            code.push(wide | (register >> 3) << 2);
            code.extend(opcode);
            code.push(0x80 | (register & 7) << 3 | 6);
            code.extend(displacement);
        }
        _ => {
            let (prefix, opcode) = random.pick(&SSE);
            let vector = random.below(16) as u8;
            let (rex, rest) = random.operand(vector, 64);
            code.extend([prefix, 0x40 | rex, 0x0f, opcode]);
            code.extend(rest);
        }
    }
}

/// A loop of random instructions, with R15 for its count, and conditional jumps over some of them.
pub(super) fn program(random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    for _ in 0..2 + random.below(20) {
        if random.below(5) == 0 {
            let mut skipped = Vec::new();
            instruction(random, &mut skipped);
            code.extend([0x70 | random.below(16) as u8, skipped.len() as u8]);
            code.extend(skipped);
        }
        instruction(random, &mut code);
    }
    // dec r15; jnz to the start
    code.extend([0x49, 0xff, 0xcf, 0x0f, 0x85]);
    let back = -(code.len() as i32 + 4);
    code.extend(back.to_le_bytes());
    code
}

#[test]
fn random_programs_do_the_same() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for after in [0, 1, 2] {
        let mut guests = pair(after);
        for _ in 0..3000 {
            let seed = random.next();
            let code = program(&mut random);
            compare(&mut guests, &code, seed);
        }
        assert!(guests[1].cpu.counters.blocks_translated > 3000);
        assert_eq!(guests[1].cpu.translator.unsuited, 0);
        assert_eq!(guests[0].cpu.counters.blocks_translated, 0);
    }
}

/// Code made with the assembler, on both engines, three times.
fn check(emit: impl Fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> [Guest; 2] {
    let mut a = CodeAssembler::new(64).unwrap();
    emit(&mut a).unwrap();
    let code = a.assemble(CODE).unwrap();
    let [_, _, guests] = [2, 1, 0].map(|after| {
        let mut guests = pair(after);
        for seed in 1..8 {
            compare(&mut guests, &code, seed);
        }
        guests
    });
    guests
}

#[test]
fn loops_end_when_another_thread_asks() {
    // again: inc rax; jne again; jmp again
    let code = [0x48, 0xff, 0xc0, 0x75, 0xfb, 0xeb, 0xf9];
    for after in [0, 2] {
        let mut guest = guest(Engine::Translate(after));
        // However slow the machine is, some time the loop has been translated before it has to end.
        for wait in (0..).map(Duration::from_millis) {
            let requests = guest.cpu.requests.clone();
            let kicker = std::thread::spawn(move || {
                std::thread::sleep(wait);
                requests.post(Requests::KICK);
            });
            assert_eq!(guest.run(&code), Exit::ExternalInterrupt);
            kicker.join().unwrap();
            if guest.cpu.counters.blocks_translated > 0 {
                break;
            }
        }
    }
}

/// A block of two regions, which is dropped because a third one of the first is written, would be missing in the second.
#[test]
fn writing_one_block_drops_no_other_of_its_region() {
    let mut a = CodeAssembler::new(64).unwrap();
    let (mut again, mut middle) = (a.create_label(), a.create_label());
    a.mov(ecx, 50).unwrap();
    a.set_label(&mut again).unwrap();
    a.test(ecx, 1).unwrap();
    a.je(middle).unwrap();
    a.add(eax, 3).unwrap();
    a.set_label(&mut middle).unwrap();
    a.dec(ecx).unwrap();
    a.jne(again).unwrap();
    a.nop().unwrap();
    let code = a.assemble(CODE).unwrap();
    let mut guest = guest(Engine::Translate(2));
    guest.run(&code);
    assert!(guest.cpu.counters.blocks_translated >= 3);
    // The instructions: 5 bytes, 6 (test), 2 (je), 3 (add), 2 (dec), 2 (jne).
    let add = 13;
    let before = guest.cpu.counters.blocks_invalidated;
    let dropped = guest.cpu.code.written(CODE >> 12, add, add + 1);
    assert_eq!((dropped, guest.cpu.counters.blocks_invalidated), (1, before));
    let sum = guest.reg(reg::RAX);
    guest.run(&code);
    assert_eq!(guest.reg(reg::RAX), sum + 75);
}

#[test]
fn system_instructions_that_host_code_executes() {
    check(|a| {
        a.cmp(rax, rbx)?;
        a.pushfq()?;
        a.pop(rcx)?;
        a.stc()?;
        a.cli()?;
        a.pushfq()?;
        a.pop(r11)?;
        a.swapgs()?;
        a.rdgsbase(r9)?;
        a.swapgs()?;
        a.mov(rax, qword_ptr(rsi + 8))?;
        a.cmpxchg(qword_ptr(rsi + 8), r13)?;
        a.setc(dl)?;
        a.cmpxchg(qword_ptr(rsi + 16), r13)?;
        a.pushfq()?;
        a.pop(r14)
    });
}

#[test]
fn calls_and_returns() {
    check(|a| {
        let (mut function, mut over) = (a.create_label(), a.create_label());
        a.mov(rcx, 100u64)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.call(function)?;
        a.lea(rax, qword_ptr(function))?;
        a.call(rax)?;
        a.push(rax)?;
        a.call(qword_ptr(rsp))?;
        a.pop(rbx)?;
        a.dec(rcx)?;
        a.jne(again)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.add(rdx, rcx)?;
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.leave()?;
        a.ret_1(0)?;
        a.set_label(&mut over)?;
        a.nop()
    });
}

/// A page at two addresses, with another one behind it at each: the instruction that reaches into that was the one last decoded.
#[test]
fn an_instruction_across_pages_is_what_the_next_page_makes_it() {
    let [page, behind, alias] = [0x3_0000u64, 0x3_3000, 0x3_2000];
    for engine in [Engine::Interpret, Engine::Translate(0), Engine::Translate(3)] {
        let mut guest = guest(engine);
        guest.put(TABLES + 0x3000 + alias / 4096 * 8, &(page | 3).to_le_bytes());
        // MOV EAX, with the upper half of the number in the next page; RET.
        guest.put(page + 0xffd, &[0xb8, 1, 0]);
        guest.put(page + 0x1000, &[2, 0, 0xc3]).put(behind, &[3, 0, 0xc3]);
        let mut a = CodeAssembler::new(64).unwrap();
        let mut again = a.create_label();
        a.mov(ecx, 40).unwrap();
        a.set_label(&mut again).unwrap();
        for (at, sum) in [(page, rbx), (alias, rdx)] {
            a.mov(rsi, at + 0xffd).unwrap();
            a.call(rsi).unwrap();
            a.add(sum, rax).unwrap();
        }
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
        guest.set(reg::RBX, 0).set(reg::RDX, 0);
        assert_eq!(guest.run(&a.assemble(CODE).unwrap()), Exit::Exception(Exception::UD));
        let sums = [reg::RBX, reg::RDX].map(|register| guest.cpu.state.regs[usize::from(register)]);
        assert_eq!(sums, [40 * 0x2_0001, 40 * 0x3_0001], "{engine:?}");
    }
}

#[test]
fn branches_to_where_nothing_can_be_fault_where_they_are() {
    for address in [0x1234_5678_9abc_def0u64, 1 << 63] {
        for kind in 0..3 {
            let guests = check(|a| {
                a.mov(rax, address)?;
                a.push(rax)?;
                match kind {
                    0 => a.ret(),
                    1 => a.call(qword_ptr(rsp)),
                    _ => a.jmp(rax),
                }
            });
            assert_eq!(guests[1].reg(reg::RSP), STACK - 256 - 8, "the return address is still there");
        }
    }
}

#[test]
fn branches_into_the_canonical_hole_fault_where_they_are() {
    const LAST: u64 = 0x7fff_ffff_f000;
    // jmp, js (of a negative number), call, each past the page; falling off it is the fetch's fault. A call at its end, which
    // returns to what is behind it: ret.
    let mut call_at_end = vec![0xc3];
    call_at_end.resize(0xffb, 0x90);
    call_at_end.extend([0xe8, 0, 0xf0, 0xff, 0xff]);
    for (code, start, at, stack) in [
        (&[0x85, 0xc0, 0xe9, 0, 0x10, 0, 0][..], 0, 2, STACK),
        (&[0x85, 0xc0, 0x0f, 0x88, 0, 0x10, 0, 0], 0, 2, STACK),
        (&[0x85, 0xc0, 0xe8, 0, 0x10, 0, 0], 0, 2, STACK),
        (&call_at_end[..], 0xffb, 0, STACK - 8),
    ] {
        for mut guest in pair(0) {
            let entry = |table: u64, index: u64| TABLES + table * 0x1000 + index * 8;
            guest.put(entry(0, 255), &(TABLES + 0x1003).to_le_bytes());
            guest.put(entry(1, 511), &(TABLES + 0x2003).to_le_bytes());
            guest.put(entry(2, 511), &(TABLES + 0x3003).to_le_bytes());
            guest.put(entry(3, 511), &(CODE | 3).to_le_bytes());
            guest.put(CODE, code).set(reg::RAX, 1 << 31);
            for _ in 0..3 {
                guest.set(reg::RSP, STACK).cpu.state.rip = LAST + start;
                assert_eq!(guest.cpu.run(), Exit::Exception(Exception::gp(0)));
                assert_eq!((guest.cpu.state.rip, guest.reg(reg::RSP)), (LAST + at, stack), "{code:02x?}");
            }
        }
    }
}

#[test]
fn faults_are_precise() {
    // Loads and stores of a page that is not there, of an address that is not canonical, across into an absent page.
    for address in [UNMAPPED, 1 << 63, 0x1234_5678_9abc_def0, UNMAPPED - 4] {
        check(|a| {
            a.mov(rbx, address)?;
            a.add(rdx, rcx)?;
            a.add(qword_ptr(rbx), rdx)?;
            a.mov(rcx, 5u64)
        });
        check(|a| {
            a.mov(rbx, address)?;
            a.stc()?;
            a.adc(rdx, rcx)?;
            a.movups(xmm3, xmmword_ptr(rbx))
        });
    }
    // An operand that has to be aligned.
    check(|a| a.movaps(xmm1, xmmword_ptr(rsi + 8)));
}

type Emit = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

#[test]
fn flags_that_are_computed_again_are_what_they_were() {
    let sources: [Emit; 22] = [
        |a| a.cmp(rdx, rcx),
        |a| a.cmp(dx, -3),
        |a| a.cmp(al, bl),
        |a| a.test(ebp, edi),
        |a| a.and(rdx, rcx),
        |a| a.or(dl, 0x80u32),
        |a| a.xor(eax, edx),
        |a| a.xor(rdx, rdx),
        |a| a.sub(rdx, rcx),
        |a| a.sub(edx, 0x7000_0000),
        |a| a.sub(rcx, rcx),
        |a| a.add(rdx, 0x7fff_ffff),
        |a| a.add(eax, -1),
        |a| a.add(r9, i32::MIN),
        // No register of the host holds these.
        |a| a.cmp(r13, rdx),
        |a| a.cmp(ecx, r11d),
        |a| a.test(r14w, r14w),
        |a| a.cmp(r11b, 5),
        |a| a.and(r13, r14),
        |a| a.xor(r11d, eax),
        |a| a.cmp(r11, r14),
        |a| a.sub(r14, 3),
    ];
    for source in sources {
        // A fault shows them; a branch behind an access reads them; the end of the block passes them on.
        check(|a| {
            source(a)?;
            a.mov(rdi, qword_ptr(UNMAPPED))
        });
        check(|a| {
            let mut past = a.create_label();
            source(a)?;
            a.mov(rdi, qword_ptr(rsi + 8))?;
            a.setb(r8b)?;
            a.mov(qword_ptr(rsi), r10)?;
            a.jle(past)?;
            a.adc(r10, 3)?;
            a.set_label(&mut past)?;
            a.mov(r12, qword_ptr(rsi + 16))
        });
        // What they are computed from is overwritten.
        check(|a| {
            source(a)?;
            a.mov(rdi, qword_ptr(rsi + 8))?;
            a.mov(rdx, rsi)?;
            a.mov(rcx, qword_ptr(rsi))?;
            a.mov(rax, rcx)?;
            a.lea(r11, qword_ptr(rcx + rdx * 2))?;
            a.mov(r13, rax)?;
            a.mov(r14, rdx)?;
            a.mov(r9, UNMAPPED)?;
            a.mov(rdi, qword_ptr(r9))
        });
        // A loop whose accesses, the last of which faults, come before its flags are overwritten.
        check(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(rdi, qword_ptr(rsi))?;
            a.add(rsi, 0x40)?;
            source(a)?;
            a.mov(rbx, rdi)?;
            a.cmp(rsi, 0)?;
            a.jne(again)
        });
    }
}

#[test]
fn mxcsr_is_the_guests() {
    let guests = check(|a| {
        let mut again = a.create_label();
        a.mov(dword_ptr(rsi), 0x7fa0)?;
        a.mov(dword_ptr(rsi + 4), 0x1f80)?;
        a.mov(ecx, 40)?;
        a.set_label(&mut again)?;
        a.ldmxcsr(dword_ptr(rsi))?;
        a.divsd(xmm0, xmm1)?;
        a.stmxcsr(dword_ptr(rsi + 8))?;
        a.ldmxcsr(dword_ptr(rsi + 4))?;
        a.stmxcsr(dword_ptr(rsi + 12))?;
        a.add(eax, dword_ptr(rsi + 8))?;
        a.sub(ecx, 1)?;
        a.jne(again)?;
        // Unmasked, and reserved bits.
        a.mov(dword_ptr(rsi), 0x1f00)?;
        a.ldmxcsr(dword_ptr(rsi))?;
        a.stmxcsr(dword_ptr(rsi + 16))?;
        a.mov(dword_ptr(rsi), 0x1_1f80)?;
        a.ldmxcsr(dword_ptr(rsi))
    });
    let [interpreted, translated] = guests.map(|guest| guest.cpu.state.mxcsr);
    assert_eq!(interpreted, translated);
}

#[test]
fn second_bytes_of_registers() {
    check(|a| {
        a.mov(ah, 5)?;
        a.mov(ah, al)?;
        a.add(al, ah)?;
        a.add(ah, al)?;
        a.add(ah, ah)?;
        a.xor(bh, ch)?;
        a.cmp(dh, ah)?;
        a.adc(ch, bl)?;
        a.test(ah, ah)?;
        a.movzx(ecx, bh)?;
        a.movsx(eax, ah)?;
        a.movzx(edx, dh)?;
        a.mov(byte_ptr(rsi + 3), bh)?;
        a.sub(byte_ptr(rsi + 4), ah)?;
        a.cmp(ch, byte_ptr(rsi + 3))?;
        a.mov(dh, byte_ptr(rsi))?;
        a.not(bh)?;
        a.inc(ah)
    });
}

/// Some of AMD's processors take SHA operands of any alignment; guests have a processor that does not.
#[test]
fn sha_operands_are_aligned() {
    if !is_x86_feature_detected!("sha") {
        return;
    }
    for after in [0, 2] {
        let mut guests = pair(after);
        for displacement in [0, 8] {
            let mut a = CodeAssembler::new(64).unwrap();
            a.mov(eax, 1).unwrap();
            a.sha256msg1(xmm1, xmmword_ptr(rsi + displacement)).unwrap();
            let code = a.assemble(CODE).unwrap();
            for seed in 1..8 {
                let exception = if displacement == 0 { Exception::UD } else { Exception::gp(0) };
                assert_eq!(compare(&mut guests, &code, seed), Exit::Exception(exception));
            }
        }
    }
}

#[test]
fn mmx_registers_are_the_x87s() {
    check(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 40)?;
        a.set_label(&mut again)?;
        a.movq(mm0, qword_ptr(rsi))?;
        a.movd(mm1, r13d)?;
        a.paddb(mm0, mm1)?;
        a.pxor(mm1, qword_ptr(rsi + 8))?;
        a.movq2dq(xmm0, mm1)?;
        a.cvtpi2ps(xmm1, mm0)?;
        a.pmovmskb(r14d, mm0)?;
        a.movntq(qword_ptr(rsi + 16), mm0)?;
        a.movq(qword_ptr(rsi + 24), mm1)?;
        // As tags and TOP are now, and after EMMS.
        a.fnstenv(ptr(rsi + 64))?;
        a.emms()?;
        a.fld1()?;
        a.fadd(qword_ptr(rsi))?;
        a.fstp(tbyte_ptr(rsi + 128))?;
        a.fnstenv(ptr(rsi + 96))?;
        a.add(r13, qword_ptr(rsi + 128))?;
        a.sub(ecx, 1)?;
        a.jne(again)
    });
    let mmx = iced_x86::Instruction::with(iced_x86::Code::Emms);
    assert!(super::Family::of(&mmx, &guest(Engine::Interpret).cpu.features).is_some());
}

#[test]
fn both_operands_of_xadd_may_be_one_register_that_the_host_does_not_hold() {
    check(|a| {
        a.xadd(r11, r11)?;
        a.xadd(r14d, r14d)?;
        a.xchg(r13, r13)?;
        a.xadd(rax, r13)
    });
}

#[test]
fn pushes_of_memory_and_fences() {
    check(|a| {
        a.push(qword_ptr(rsi + 8))?;
        a.push(qword_ptr(rsp))?;
        a.push(-5)?;
        a.mfence()?;
        a.lfence()?;
        a.sfence()?;
        a.prefetcht0(byte_ptr(UNMAPPED))?;
        a.movnti(qword_ptr(rsi), rdi)?;
        a.pop(rax)?;
        a.pop(r14)
    });
}

#[test]
fn every_address_finds_its_own_page() {
    let mut guests = pair(0);
    // mov rax, [rbx] where RBX alternates between pages, RIP-relative and absolute accesses beside it
    let mut a = CodeAssembler::new(64).unwrap();
    let mut again = a.create_label();
    a.mov(rcx, 64u64).unwrap();
    a.mov(rbx, DATA).unwrap();
    a.set_label(&mut again).unwrap();
    a.xor(rbx, 0x1000).unwrap();
    a.add(rax, qword_ptr(rbx + rcx * 8)).unwrap();
    a.add(rax, qword_ptr(rbx + rcx * 8 + 0x1ffc)).unwrap();
    a.add(qword_ptr(DATA + 0x2ffd), rax).unwrap();
    a.add(rax, qword_ptr(again)).unwrap();
    a.dec(rcx).unwrap();
    a.jne(again).unwrap();
    let code = a.assemble(CODE).unwrap();
    for seed in 1..20 {
        assert_eq!(compare(&mut guests, &code, seed), Exit::Exception(Exception::UD));
    }
}

#[test]
fn a_program_that_changes_itself_is_translated_anew() {
    let guests = check(|a| {
        let (mut again, mut place) = (a.create_label(), a.create_label());
        a.mov(rcx, 200u64)?;
        a.set_label(&mut again)?;
        a.lea(rbx, qword_ptr(place))?;
        a.mov(byte_ptr(rbx + 1), cl)?;
        a.add(rdx, rcx)?;
        a.set_label(&mut place)?;
        a.mov(al, 1)?;
        a.movzx(edi, al)?;
        a.add(rdx, rdi)?;
        a.dec(rcx)?;
        a.jne(again)
    });
    assert!(guests[1].cpu.counters.blocks_translated > 100);
}

#[test]
fn a_full_arena_is_emptied() {
    let mut guests = pair(0);
    guests[1].cpu.translator = Translator::with_room(Engine::Translate(0), 64 << 10);
    let mut random = Random(77);
    for _ in 0..300 {
        let seed = random.next();
        let code = program(&mut random);
        compare(&mut guests, &code, seed);
    }
}

#[test]
fn translation_takes_a_bounded_part_of_the_time() {
    let mut guest = guest(Engine::Translate(1));
    let counters = &mut guest.cpu.counters;
    counters.blocks_translated = super::FREE_BLOCKS;
    assert!(!guest.cpu.affords_translation());
    guest.cpu.counters.instructions = super::INSTRUCTIONS_PER_BLOCK;
    assert!(guest.cpu.affords_translation());
}

/// Loops that look for requests before they begin, and behind, on their way to an instruction limit.
#[test]
fn loops_get_on_while_there_is_an_instruction_limit() {
    // again: add rax, 1; cmp rax, rbx; jne again
    let code = [0x48, 0x83, 0xc0, 0x01, 0x48, 0x39, 0xd8, 0x75, 0xf7];
    for after in [0, 2] {
        let mut guest = guest(Engine::Translate(after));
        guest.cpu.controls.instruction_limit = 10_000;
        guest.set(reg::RBX, u64::MAX);
        assert_eq!(guest.run(&code), Exit::Budget);
        assert_eq!(guest.cpu.instructions(), 10_000);
    }
}
