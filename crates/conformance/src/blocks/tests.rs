use iced_x86::Code;
use silicon::model::CpuModel;

use super::forms::Forms;
use super::program::Program;
use super::run::{Plan, run};
use super::shrink::shrink;
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
fn programs_end_and_engines_do_the_same() {
    let features = CpuModel::parse("max").expect("a model").features();
    let forms = forms::all(&features);
    let plan = Plan { seed: 3, first: 0, programs: 300, forms, workers: 1, told: 2 };
    let summary = run(&plan, &features, |_| {}).expect("workers");
    assert!(summary.is_clean(), "{summary:?}");
    assert_eq!((summary.programs, summary.endless), (300, 0));
    assert!(summary.native > 300 && summary.faults > 30 && summary.instructions > 30_000, "{summary:?}");
}

#[test]
fn a_difference_is_shrunk_to_what_it_takes() {
    let mut programs = programs();
    let calls = |program: &Program| {
        program.items.iter().filter(|item| item.instruction.code() == Code::Call_rel32_64).count()
    };
    let program = (0..).map(|number| programs.program(4, number)).find(|program| calls(program) > 0);
    let smallest = shrink(&program.expect("one that calls"), |candidate| calls(candidate) > 0);
    assert_eq!((smallest.items.len(), smallest.machines.len()), (1, 1));
}
