//! Loops with a second translation: which windows they have, and that they do what they do without, wherever pages end.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::steady::Windows;
use super::tests::{Random, compare_programs, pair};
use crate::exec::testing::{CODE, DATA, UNMAPPED};

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Of each window of these instructions the bytes from the lowest to the highest, and how far an iteration moves it.
fn windows(emit: Emit) -> Vec<(i64, i64, i64)> {
    let mut a = CodeAssembler::new(64).unwrap();
    emit(&mut a).unwrap();
    Windows::of(a.instructions()).map(|windows| windows.ranges().collect()).unwrap_or_default()
}

#[test]
fn windows_are_accesses_whose_registers_move_by_constants() {
    let cases: [(Emit, &[(i64, i64, i64)]); 8] = [
        // Before and behind an addition, and by a register that stays.
        (
            |a| {
                a.mov(rax, qword_ptr(rbx + 8))?;
                a.add(rbx, 16)?;
                a.mov(ecx, dword_ptr(rbx + 8))?;
                a.add(rdx, qword_ptr(rdi))
            },
            &[(8, 28, 16), (0, 8, 0)],
        ),
        // An index that moves, and a base that does.
        (
            |a| {
                a.movups(xmm0, xmmword_ptr(rsi + rcx * 8))?;
                a.add(rcx, 2)?;
                a.movups(xmmword_ptr(rdi + rcx * 8), xmm0)?;
                a.sub(rdi, 4)
            },
            &[(0, 16, 16), (16, 32, 12)],
        ),
        // What is pushed and popped.
        (
            |a| {
                a.push(rax)?;
                a.pop(rdx)
            },
            &[(-8, 0, 0)],
        ),
        // Registers that are written otherwise, even behind the access.
        (
            |a| {
                a.mov(rax, qword_ptr(rbx))?;
                a.mov(rcx, qword_ptr(rdi + rdx))?;
                a.add(ebx, 8)?;
                a.imul_2(rdx, rdx)
            },
            &[],
        ),
        // Too far in one iteration.
        (
            |a| {
                a.mov(rax, qword_ptr(rbx))?;
                a.add(rbx, 4096)
            },
            &[],
        ),
        // Locked, and in a segment with a base.
        (
            |a| {
                a.lock().add(qword_ptr(rbx), rax)?;
                a.mov(rax, qword_ptr(rbx).fs())
            },
            &[],
        ),
        // Too far from each other for one window.
        (
            |a| {
                a.mov(rax, qword_ptr(rbx))?;
                a.mov(rax, qword_ptr(rbx + 0x800))?;
                a.dec(rbx)
            },
            &[(0, 8, -1), (0x800, 0x808, -1)],
        ),
        // Sums that wrap.
        (
            |a| {
                a.mov(rax, qword_ptr(rbx + rcx * 8))?;
                a.add(rcx, 0x7fff_ffff)?;
                a.add(rcx, 0x7fff_ffff)
            },
            &[],
        ),
    ];
    for (number, (emit, expected)) in cases.into_iter().enumerate() {
        assert_eq!(windows(emit), expected, "case {number}");
    }
}

/// One random instruction that accesses memory, moves a register of addresses, or computes flags.
fn instruction(random: &mut Random, a: &mut CodeAssembler) -> Result<(), IcedError> {
    let register = random.pick(&[rax, rdx, r9, r10, r11, r13]);
    let vector = random.pick(&[xmm0, xmm1, xmm2]);
    let displacement = random.below(80) as i32 - 40;
    let base = random.pick(&[rbx, rbx, rdi, r12, r14, rsp]);
    let step = random.below(30) as i32 - 15;
    match random.below(18) {
        0 | 1 => a.mov(register, qword_ptr(base + displacement)),
        2 => a.mov(qword_ptr(base + displacement), register),
        3 => a.add(qword_ptr(base + displacement), register),
        4 => a.adc(register, qword_ptr(base + displacement)),
        5 => a.movups(vector, xmmword_ptr(base + displacement)),
        6 => a.movups(xmmword_ptr(base + displacement), vector),
        7 => a.mov(register, qword_ptr(rbx + rcx * 2 + displacement)),
        8 => a.add(dword_ptr(r12 + r8 * 8 + displacement), 77),
        9 | 10 => a.add(random.pick(&[rbx, rdi, r12, r14]), step),
        11 => a.lea(rbx, qword_ptr(rbx + step)),
        12 => a.inc(rcx),
        13 => a.sub(r8, 1),
        14 => {
            a.push(register)?;
            a.pop(rdx)
        }
        15 => a.movzx(eax, byte_ptr(base + displacement)),
        16 => a.test(register, register),
        _ => a.cmp(register, random.pick(&[rax, rdx])),
    }
}

/// A loop of such instructions that crosses the ends of pages, with RBP for its count.
fn program(random: &mut Random) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut again = a.create_label();
    for register in [rbx, rdi, r12, r14] {
        let place = random.pick(&[DATA + 0x1000, DATA + 0x1800, DATA + 0x2000, DATA + 0x3000, UNMAPPED]);
        a.mov(register, place - random.below(400)).unwrap();
    }
    a.mov(rsp, DATA + 0x3000 + 32 - 8 * random.below(16)).unwrap();
    a.mov(ecx, random.below(40) as u32).unwrap();
    a.mov(r8d, random.below(40) as u32).unwrap();
    a.mov(ebp, 20 + random.below(600) as u32).unwrap();
    a.set_label(&mut again).unwrap();
    for _ in 0..1 + random.below(8) {
        instruction(random, &mut a).unwrap();
    }
    a.sub(rbp, 1).unwrap();
    a.jne(again).unwrap();
    a.assemble(CODE).unwrap()
}

#[test]
fn loops_with_windows_do_what_they_did_without() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for (after, slice) in [(0, 16), (1, 50), (2, 4096)] {
        let mut guests = pair(after);
        guests[1].cpu.translator.slice = slice;
        let faults = compare_programs(&mut guests, &mut random, 1500, program);
        assert!((50..1400).contains(&faults), "{faults} programs ended early");
    }
}
