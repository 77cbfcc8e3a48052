//! The generator's programs, without any processor to run them.

use iced_x86::Mnemonic;
use silicon::model::CpuModel;

use super::forms::Forms;
use super::shrink::shrink;
use super::undefined::Undefined;
use super::writer::Programs;
use crate::capabilities::Capabilities;
use crate::forms;

fn programs() -> Programs {
    let features = CpuModel::parse("max").expect("a model").features();
    Programs::new(Capabilities::of_host().expect("a host"), Forms::new(&forms::all(&features)))
}

#[test]
fn a_program_is_a_function_of_its_numbers() {
    let [mut first, mut again, mut other] =
        [(5, 9), (5, 9), (5, 10)].map(|(seed, number)| programs().program(seed, number));
    assert_eq!(first.disassemble(), again.disassemble());
    assert_eq!(first.machines, again.machines);
    assert_ne!(first.disassemble(), other.disassemble());
}

#[test]
fn programs_have_blocks_that_share_base_registers() {
    let mut programs = programs();
    let (mut branches, mut repeated, mut length) = (0, 0, 0);
    for number in 0..200 {
        let program = programs.program(2, number);
        length += program.items.len();
        branches += program.items.iter().filter(|item| item.target.is_some()).count();
        let bases = program.items.iter().map(|item| item.instruction.memory_base());
        let mut counts = [0; 16];
        bases.filter(|base| base.is_gpr64()).for_each(|base| counts[base.number()] += 1);
        repeated += usize::from(counts.into_iter().any(|count| count >= 3));
    }
    assert!(length > 200 * 20 && branches > 200 * 3 && repeated > 100, "{length} {branches} {repeated}");
}

#[test]
fn nothing_undefined_is_seen() {
    let mut programs = programs();
    for number in 0..300 {
        assert!(Undefined::of(&programs.program(3, number)).is_some());
    }
}

#[test]
fn the_smallest_program_has_what_makes_it_differ() {
    let mut programs = programs();
    let wanted = |mnemonic| move |item: &super::program::Item| item.instruction.mnemonic() == mnemonic;
    let program = (0..)
        .map(|number| programs.program(4, number))
        .find(|program| {
            program.items.iter().any(wanted(Mnemonic::Cmp)) && program.items.iter().any(wanted(Mnemonic::Jmp))
        })
        .expect("one of them");
    let mut smallest = shrink(&program, |candidate| {
        [Mnemonic::Cmp, Mnemonic::Jmp].into_iter().all(|name| candidate.items.iter().any(wanted(name)))
    });
    assert_eq!((smallest.items.len(), smallest.machines.len()), (2, 1));
    assert!(smallest.assemble().is_some(), "labels are where they can be");
}
