//! Accesses that are checked together: which they are, and that they do what they did alone, wherever pages end.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::emit::Kind;
use super::groups::Groups;
use super::tests::{Random, compare_programs, pair};
use crate::exec::testing::{CODE, DATA, UNMAPPED};

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// The groups of some instructions: the kind, the lowest byte and the size of each, with the operations that are members.
fn groups(emit: Emit) -> Vec<(Kind, i32, usize, Vec<usize>)> {
    let mut a = CodeAssembler::new(64).unwrap();
    emit(&mut a).unwrap();
    let instructions = a.instructions();
    let groups = Groups::of(instructions, 0..instructions.len());
    let members = |number| {
        let of = |&index: &usize| groups.member(index).is_some_and(|(group, _)| group == number);
        (0..instructions.len()).filter(of).collect()
    };
    let all = groups.groups.iter().enumerate();
    all.map(|(number, group)| (group.kind, group.low, group.size, members(number))).collect()
}

#[test]
fn groups_are_accesses_by_the_same_registers() {
    let cases: [(Emit, &[(Kind, i32, usize, &[usize])]); 9] = [
        (
            |a| {
                a.mov(rax, qword_ptr(rbx + 8))?;
                a.mov(ecx, dword_ptr(rbx + 16))
            },
            &[(Kind::Load, 8, 12, &[0, 1])],
        ),
        // Alone, and by other registers.
        (
            |a| {
                a.mov(rax, qword_ptr(rbx + 8))?;
                a.mov(rax, qword_ptr(rbx + rcx))?;
                a.mov(rax, qword_ptr(rbx + rcx * 2))
            },
            &[],
        ),
        // Pushes, and a store to what they have made room for.
        (
            |a| {
                a.push(rbp)?;
                a.push(rbx)?;
                a.sub(rsp, 24)?;
                a.mov(qword_ptr(rsp + 8), rdi)
            },
            &[(Kind::Store, -32, 32, &[0, 1, 3])],
        ),
        // Who stores may load.
        (
            |a| {
                a.mov(rax, qword_ptr(rdi + rcx * 8))?;
                a.mov(qword_ptr(rdi + rcx * 8), rdx)
            },
            &[(Kind::Store, 0, 8, &[0, 1])],
        ),
        // The base is another one afterwards, by an access or not; nor does an index move.
        (
            |a| {
                a.mov(rbx, qword_ptr(rbx))?;
                a.mov(rbx, qword_ptr(rbx))?;
                a.mov(rax, qword_ptr(rdi + rcx))?;
                a.inc(rcx)?;
                a.mov(rax, qword_ptr(rdi + rcx))
            },
            &[],
        ),
        // Too far apart; the last is with the second.
        (
            |a| {
                a.mov(rax, qword_ptr(rbx))?;
                a.mov(rax, qword_ptr(rbx + 0x800))?;
                a.mov(rax, qword_ptr(rbx + 0x808))
            },
            &[(Kind::Load, 0x800, 16, &[1, 2])],
        ),
        // Two that overlap.
        (
            |a| {
                a.movups(xmm0, xmmword_ptr(rsi))?;
                a.movups(xmm1, xmmword_ptr(rdi))?;
                a.movups(xmm0, xmmword_ptr(rsi + 16))?;
                a.movups(xmmword_ptr(rdi + 16), xmm1)
            },
            &[(Kind::Load, 0, 32, &[0, 2]), (Kind::Store, 0, 32, &[1, 3])],
        ),
        // Locked accesses and segments with a base are checked alone.
        (
            |a| {
                a.lock().add(qword_ptr(rbx), rax)?;
                a.mov(rax, qword_ptr(rbx).fs())?;
                a.mov(rax, qword_ptr(rbx))
            },
            &[],
        ),
        // A base that moves by as much as wraps.
        (
            |a| {
                a.mov(rax, qword_ptr(rbx + 0x7fff_fff0))?;
                a.add(rbx, 0x7fff_ffff)?;
                a.mov(rax, qword_ptr(rbx + 0x7fff_fff0))
            },
            &[],
        ),
    ];
    for (number, (emit, expected)) in cases.into_iter().enumerate() {
        let expected = expected.iter().map(|(kind, low, size, of)| (*kind, *low, *size, of.to_vec()));
        assert_eq!(groups(emit), expected.collect::<Vec<_>>(), "case {number}");
    }
}

/// A displacement of accesses near each other.
fn near(random: &mut Random) -> i32 {
    random.below(200) as i32 - 60
}

/// One random instruction that accesses memory, moves a base, or computes flags.
fn instruction(random: &mut Random, a: &mut CodeAssembler) -> Result<(), IcedError> {
    let register = random.pick(&[rax, rdx, r8, r9, r10, r11, r13, r14]);
    let vector = random.pick(&[xmm0, xmm1, xmm2]);
    let displacement = near(random);
    let base = random.pick(&[rbx, rbx, rbx, rdi, r12, rsp]);
    let at = qword_ptr(base + displacement);
    match random.below(18) {
        0 | 1 => a.mov(register, at),
        2 | 3 => a.mov(at, register),
        4 => a.add(at, register),
        5 => a.adc(register, at),
        6 => a.cmp(register, at),
        7 => a.movups(vector, xmmword_ptr(base + displacement)),
        8 => a.movups(xmmword_ptr(base + displacement), vector),
        9 => a.mov(register, qword_ptr(rbx + rcx * 2 + displacement)),
        10 => a.add(qword_ptr(rbx + rcx * 2 + displacement), 77),
        11 => a.add(rbx, displacement / 8),
        12 => a.lea(rbx, qword_ptr(rbx + displacement / 4)),
        13 => a.push(register),
        14 => a.pop(register),
        15 => a.shl(at, 1u32),
        // An address that has been loaded: it is looked for among all pages.
        16 => {
            a.push(rbx)?;
            a.pop(random.pick(&[rdi, r12]))
        }
        _ => a.cmp(register, random.pick(&[rax, rdx, r8])),
    }
}

/// A loop of such instructions about the end of a page, with R15 for its count.
fn program(random: &mut Random) -> Vec<u8> {
    let end = random.pick(&[DATA + 0x1000, DATA + 0x2000, DATA + 0x2000, UNMAPPED]);
    let mut a = CodeAssembler::new(64).unwrap();
    let mut again = a.create_label();
    a.mov(rbx, end - random.below(300)).unwrap();
    a.lea(rdi, qword_ptr(rbx + 32)).unwrap();
    a.lea(r12, qword_ptr(rbx - 32)).unwrap();
    a.mov(rsp, DATA + 0x3000 + 32 - 8 * random.below(16)).unwrap();
    a.mov(ecx, random.below(40) as u32).unwrap();
    a.set_label(&mut again).unwrap();
    for _ in 0..2 + random.below(14) {
        instruction(random, &mut a).unwrap();
        if random.below(8) == 0 {
            let mut past = a.create_label();
            a.jb(past).unwrap();
            instruction(random, &mut a).unwrap();
            a.set_label(&mut past).unwrap();
            a.nop().unwrap();
        }
    }
    a.dec(r15).unwrap();
    a.jne(again).unwrap();
    a.assemble(CODE).unwrap()
}

#[test]
fn accesses_that_are_checked_together_do_what_they_did_alone() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for after in [0, 1, 2] {
        let mut guests = pair(after);
        let faults = compare_programs(&mut guests, &mut random, 2000, program);
        assert!((100..1900).contains(&faults), "{faults} programs ended early");
    }
}
