//! Comparing engines: it finds nothing where there is nothing, follows branches within regions, and tells what differs.

use std::panic::{AssertUnwindSafe, catch_unwind};

use iced_x86::code_asm::*;

use super::Engine;
use super::check::{Bounds, Outcome};
use super::tests::{Random, compare, guest, program};
use super::trial::{Place, Trial};
use crate::exec::testing::{CODE, DATA, Guest};
use crate::state::reg;

fn guests() -> [Guest; 2] {
    [Engine::Interpret, Engine::Check].map(guest)
}

/// Executions compared, instructions of them, and branches within regions.
fn compared(guest: &Guest) -> [u64; 3] {
    let checks = guest.cpu.translator.checks.as_ref().unwrap();
    [checks.compared, checks.instructions, checks.branches]
}

fn assemble(emit: impl Fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    emit(&mut a).unwrap();
    a.assemble(CODE).unwrap()
}

/// A loop of three blocks; the second one adds 0x12345678 to RBX and stores it.
fn three_blocks() -> Vec<u8> {
    assemble(|a| {
        let (mut again, mut even) = (a.create_label(), a.create_label());
        a.mov(ecx, 40)?;
        a.mov(edx, DATA as u32)?;
        a.set_label(&mut again)?;
        a.add(rax, rcx)?;
        a.test(ecx, 1)?;
        a.je(even)?;
        a.add(rbx, 0x1234_5678)?;
        a.mov(qword_ptr(rdx), rbx)?;
        a.set_label(&mut even)?;
        a.dec(ecx)?;
        a.jne(again)
    })
}

#[test]
fn programs_show_no_difference() {
    let mut guests = guests();
    let mut random = Random(0x1234_5678_9abc_def1);
    for _ in 0..1000 {
        let seed = random.next();
        let code = program(&mut random);
        compare(&mut guests, &code, seed);
    }
    let [executions, instructions, branches] = compared(&guests[1]);
    assert!(executions > 3000, "{executions}");
    assert!(instructions > 5 * executions, "{instructions} in {executions}");
    assert!(3 * branches > executions, "{branches} in {executions}");
}

#[test]
fn a_branch_to_where_nothing_can_be_is_no_difference() {
    let mut guests = guests();
    // mov rax, 1 << 47; jmp rax
    let code = [0x48, 0xb8, 0, 0, 0, 0, 0, 0x80, 0, 0, 0xff, 0xe0];
    compare(&mut guests, &code, 1);
}

/// Loops that look for requests by a load that faults, by the count, and as a block that is a loop by itself, some more than once around.
#[test]
fn loops_are_followed() {
    let by_load = assemble(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 100)?;
        a.set_label(&mut again)?;
        a.adc(rax, rbx)?;
        a.dec(ecx)?;
        a.jne(again)
    });
    let alone = assemble(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 100)?;
        a.set_label(&mut again)?;
        a.add(rax, rbx)?;
        a.cmp(ecx, 1)?;
        a.lea(ecx, dword_ptr(rcx - 1))?;
        a.ja(again)
    });
    for code in [by_load, alone, three_blocks()] {
        let mut guests = guests();
        for seed in 1..20 {
            compare(&mut guests, &code, seed);
        }
        let [executions, _, branches] = compared(&guests[1]);
        assert!(2 * branches > executions, "{branches} in {executions}: {code:02x?}");
    }
}

#[test]
fn what_is_wrong_in_the_second_block_of_a_region_is_told() {
    let mut guests = guests();
    for seed in 1..5 {
        compare(&mut guests, &three_blocks(), seed);
    }
    let translator = &mut guests[1].cpu.translator;
    translator.checks.as_mut().unwrap().forget();
    let arena = &mut translator.code.as_mut().unwrap().arena;
    assert!(arena.replace(&[0x78, 0x56, 0x34, 0x12], &[0x79, 0x56, 0x34, 0x12]) > 0);
    let run = AssertUnwindSafe(|| guests[1].run(&three_blocks()));
    let told = *catch_unwind(run).unwrap_err().downcast::<String>().unwrap();
    assert!(told.contains("  rbx      interpreted 0x"), "{told}");
    assert!(told.contains(&format!("  [{DATA:#x}] ")), "{told}");
    assert!(told.contains("->0x"), "no branch within the region: {told}");
}

/// The trial of some code, all of one block, by the interpreter.
fn trial(guest: &mut Guest, code: &[u8]) -> (super::trial::Snapshot, Trial) {
    guest.run(code);
    guest.cpu.state.rip = CODE;
    let block = guest.cpu.find_block(false).unwrap();
    let bounds = Bounds { count: 0, laps: 0 };
    let before = guest.cpu.snapshot();
    let trial = guest.cpu.attempt(&[block], Place { block, index: 0 }, &before, bounds);
    (before, trial)
}

#[test]
fn the_count_says_what_must_have_been_done() {
    let mut guest = guest(Engine::Interpret);
    // inc rax; inc rbx; mov [0x9000], rax; inc rax; jmp to the next
    let code = [
        &[0x48, 0xff, 0xc0, 0x48, 0xff, 0xc3][..],
        &[0x48, 0x89, 0x04, 0x25, 0, 0x90, 0, 0, 0x48, 0xff, 0xc0, 0xeb, 0],
    ]
    .concat();
    let (before, trial) = trial(&mut guest, &code);
    assert_eq!(trial.steps.len(), 5);
    let mut told = |done, rip| {
        let outcome = Outcome { done, rip: CODE + rip };
        guest.cpu.compare(&before, &trial, &outcome).err().unwrap_or_default()
    };
    assert_eq!(told(5, 19), "");
    assert!(told(5, 17).contains("rip "));
    assert!(told(4, 17).contains("rip ") || told(4, 17).is_empty());
    assert!(told(3, 14).contains("rax "), "one instruction was not counted");
    assert!(
        told(6, 19).contains("stopped before number 5"),
        "host code went on where the interpreter stopped"
    );
    assert!(told(usize::MAX, 19).contains("did -1 instructions"));
    assert!(told(2, 6).contains("[0x9000]"), "what was not to be stored yet is there");
}

#[test]
fn attempts_are_taken_back() {
    let mut guest = guest(Engine::Interpret);
    guest.put(0x9000, &[7; 8]).set(reg::RBX, 5);
    // add [0x9000], rbx twice
    let code = [0x48, 0x01, 0x1c, 0x25, 0, 0x90, 0, 0].repeat(2);
    let (before, trial) = trial(&mut guest, &code);
    let stored = guest.word(0x9000, 8);
    guest.cpu.take_back_trial(&before, &trial);
    assert_eq!(guest.word(0x9000, 8), stored - 10);
    assert_eq!(guest.cpu.compare(&before, &trial, &Outcome { done: 0, rip: CODE }), Ok(()));
    guest.set(reg::R9, 5);
    guest.cpu.state.zmm[7].0[9] = 1;
    let told = guest.cpu.compare(&before, &trial, &Outcome { done: 0, rip: CODE }).unwrap_err();
    assert!(told.contains("r9 ") && told.contains("zmm7.1"), "{told}");
}

#[test]
fn the_interpreter_goes_on_until_host_code_has_left() {
    let bounds = Bounds { count: 100, laps: 2 };
    let mut late = 0;
    let ends: Vec<bool> = [10, 300, 356, 360, 364].map(|executed| bounds.ends(executed, &mut late)).to_vec();
    assert_eq!(ends, [false, false, false, false, true]);
}

/// What is translated alone at its first run is translated again with what it leads to.
#[test]
fn regions_grow_as_they_would_without_comparing() {
    let mut guests = guests();
    let code = assemble(|a| {
        let (mut one, mut other) = (a.create_label(), a.create_label());
        a.test(r15, r15)?;
        a.je(one)?;
        a.add(rax, rbx)?;
        a.jmp(other)?;
        a.set_label(&mut one)?;
        a.sub(rax, rbx)?;
        a.set_label(&mut other)?;
        a.inc(rcx)
    });
    for seed in 1..40 {
        compare(&mut guests, &code, seed);
    }
    let cpu = &mut guests[1].cpu;
    cpu.state.rip = CODE;
    let block = cpu.find_block(false).unwrap();
    assert!(block.region().len() >= 3, "{:?}", block.region());
    assert!(compared(&guests[1])[2] > 0);
}
