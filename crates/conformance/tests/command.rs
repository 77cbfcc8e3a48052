//! The `conformance` command as a person uses it.

use std::process::{Command, Output};

fn conformance(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_conformance")).args(arguments).output().expect("the command starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn all_forms_of_an_extension_are_compared() {
    let output = conformance(&["--filter", "BMI1", "--cases", "1600"]);
    let stdout = text(&output.stdout);
    assert!(output.status.success(), "{stdout}");
    assert!(stdout.contains("0 different, 0 forms untested, 0 workers crashed"), "{stdout}");
    assert!(stdout.lines().any(|line| line.starts_with("BMI1 ")), "the table: {stdout}");
}

#[test]
fn a_case_can_be_repeated() {
    let (first, second) = (
        conformance(&["--seed", "3", "--case", "Add_rm32_r32:17"]),
        conformance(&["--seed", "3", "--case", "Add_rm32_r32:17"]),
    );
    assert!(first.status.success());
    assert_eq!(first.stdout, second.stdout);
    assert!(text(&first.stdout).contains("--seed 3 --case Add_rm32_r32:17"));
}

#[test]
fn wrong_arguments_are_said_to_be_wrong() {
    for arguments in [
        ["--case", "Nonsense:1"],
        ["--case", "Add_rm32_r32"],
        ["--filter", "nonsense"],
        ["--cpu", "nonsense"],
        ["--blocks", "--case=nonsense"],
        ["--blocks", "--plant=nonsense"],
    ] {
        let output = conformance(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output.stderr).starts_with("conformance: "), "{arguments:?}");
    }
}

#[test]
fn programs_end_and_do_the_same_everywhere() {
    let output = conformance(&["--blocks", "--seed", "5", "--cases", "1500"]);
    let stdout = text(&output.stdout);
    assert!(output.status.success(), "{stdout}");
    assert!(stdout.contains("1500 programs of "), "{stdout}");
    assert!(stdout.contains("0 different, 0 endless, 0 workers crashed"), "{stdout}");
}

#[test]
fn a_planted_difference_is_found_and_shrunk() {
    let output = conformance(&["--blocks", "--cases", "600", "--plant", "Adc_rm32_r32", "--tell", "1"]);
    let stdout = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{stdout}");
    let first =
        stdout.lines().find(|line| line.starts_with("DIFFERENT --blocks --seed 1 --case ")).expect("one");
    let case = first.split("--case ").nth(1).and_then(|rest| rest.split(':').next()).expect("a number");
    let again = conformance(&["--blocks", "--case", case, "--plant", "Adc_rm32_r32"]);
    let stdout = text(&again.stdout);
    let told: Vec<&str> = stdout.lines().skip_while(|line| !line.starts_with("DIFFERENT ")).collect();
    let instructions = told.iter().filter(|line| line.starts_with("  0x")).count();
    assert!((1..=3).contains(&instructions) && stdout.contains(" adc "), "{stdout}");
    assert!(told.iter().any(|line| line.starts_with("  run 0 of 1: ")), "{stdout}");
}
