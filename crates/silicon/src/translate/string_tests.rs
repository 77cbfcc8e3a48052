//! MOVS and STOS in host code: what they do, wherever pages end and whatever flags are waiting.

use iced_x86::code_asm::*;

use super::string::stores;
use super::tests::{Random, compare, compare_programs, pair};
use crate::exception::Exception;
use crate::exec::testing::{CODE, DATA, UNMAPPED};
use crate::vmx::Exit;

#[test]
fn bytes_stored_are_known_within_a_page() {
    type Emit = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let cases: [(Emit, u64, u64, Option<usize>); 8] = [
        (|a| a.rep().movsb(), 16, DATA, Some(16)),
        (|a| a.rep().stosq(), 512, DATA, Some(4096)),
        (|a| a.rep().stosq(), 513, DATA, None),
        (|a| a.rep().stosq(), 512, DATA + 1, None),
        (|a| a.rep().movsd(), 0, DATA, Some(0)),
        (|a| a.rep().movsd(), u64::MAX, DATA, None),
        // RCX does not count here.
        (|a| a.stosw(), u64::MAX, DATA + 0xffe, Some(2)),
        (|a| a.movsd_2(xmm0, xmm1), 1, DATA, None),
    ];
    for (number, (emit, count, to, expected)) in cases.into_iter().enumerate() {
        let mut a = CodeAssembler::new(64).unwrap();
        emit(&mut a).unwrap();
        assert_eq!(stores(&a.instructions()[0], count, to), expected, "case {number}");
    }
}

/// A string instruction, repeated or not.
fn string(random: &mut Random, a: &mut CodeAssembler) {
    let repeats = random.below(4) != 0;
    let plain: [fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>; 8] = [
        |a| a.movsb(),
        |a| a.movsw(),
        |a| a.movsd(),
        |a| a.movsq(),
        |a| a.stosb(),
        |a| a.stosw(),
        |a| a.stosd(),
        |a| a.stosq(),
    ];
    random.pick(&plain)(if repeats { a.rep() } else { a }).unwrap();
}

/// Some of them, at pages' ends, over each other and over what is not there, between instructions that make and use flags.
fn program(random: &mut Random) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    for _ in 0..1 + random.below(4) {
        let near = DATA + 0x1000 * (1 + random.below(2));
        let places = [near, near, near + 0x800, UNMAPPED, near - 64];
        let count: u64 = random.pick(&[0, 1, 3, 8, 40, 200, 512, 700, 4096]);
        for register in [rdi, rsi] {
            let around = random.pick(&[0, 1, 8, 100, 4096]) * random.below(3);
            a.mov(register, random.pick(&places) - around).unwrap();
        }
        if random.below(2) == 0 {
            a.lea(rdi, qword_ptr(rsi + random.pick(&[0, 1, 4, 8, 13, 256]))).unwrap();
        }
        a.mov(rcx, count).unwrap();
        if random.below(8) == 0 {
            a.std().unwrap();
        }
        match random.below(3) {
            0 => a.cmp(rax, rdx).unwrap(),
            1 => a.add(r8, r9).unwrap(),
            _ => a.cmp(rsi, rdi).unwrap(),
        }
        string(random, &mut a);
        a.setb(bl).unwrap();
        a.adc(r12, rdi).unwrap();
        a.cmovs(r10, rsi).unwrap();
        if random.below(2) == 0 {
            a.mov(rax, qword_ptr(rdi - 64)).unwrap();
        }
    }
    a.assemble(CODE).unwrap()
}

#[test]
fn strings_do_what_the_interpreter_does() {
    let mut random = Random(0x0dd0_5eed_1234_5678);
    for after in [0, 1] {
        let mut guests = pair(after);
        let faults = compare_programs(&mut guests, &mut random, 2000, program);
        assert!((300..1700).contains(&faults), "{faults} programs ended early");
    }
}

/// A page of code that is stored to is the interpreter's, and is translated anew.
#[test]
fn strings_over_code_change_it() {
    for length in [1, 8, 64] {
        let mut a = CodeAssembler::new(64).unwrap();
        let (mut again, mut changed) = (a.create_label(), a.create_label());
        a.mov(r15d, 3).unwrap();
        a.set_label(&mut again).unwrap();
        a.lea(rdi, qword_ptr(changed)).unwrap();
        a.mov(ecx, length).unwrap();
        a.mov(eax, 0x9090_9090_u32).unwrap();
        a.inc(rdx).unwrap();
        a.rep().stosb().unwrap();
        a.set_label(&mut changed).unwrap();
        // Once; then it is NOPs.
        a.inc(rdx).unwrap();
        for _ in 0..64 {
            a.nop().unwrap();
        }
        a.dec(r15).unwrap();
        a.jne(again).unwrap();
        let code = a.assemble(CODE).unwrap();
        for after in [0, 1] {
            assert_eq!(compare(&mut pair(after), &code, 7), Exit::Exception(Exception::UD));
        }
    }
}
