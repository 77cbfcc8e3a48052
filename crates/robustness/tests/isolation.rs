//! What must be found is found: writes that are no guest's, and accesses to memory that is not.

use std::process::Command;

use robustness::isolation::Break;

/// Runs a few guests that do what `broken` says; whether all was well, and what was said.
fn run(broken: Option<&str>) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_isolation"));
    command.args(["--seed", "1", "--kind", "wild", "--guests", "20"]);
    command.args(broken.map(|name| format!("--broken={name}")));
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.success(), said)
}

#[test]
fn guests_change_nothing_outside_their_memory() {
    let (well, said) = run(None);
    assert!(well && said.contains("20 guests") && said.contains(" 0 failures"), "{said}");
}

#[test]
fn what_escapes_is_found() {
    for (broken, name) in Break::ALL {
        let (well, said) = run(Some(name));
        let sign = match broken {
            Break::Heap | Break::Field => "[heap]",
            Break::Stack => "[stack]",
            Break::Constant => "a page that cannot be written",
            Break::Protected => "access to",
            Break::Fresh | Break::Canary | Break::Untold => " rw-p ",
        };
        assert!(!well && said.contains(sign), "{name}: {said}");
        assert!(said.contains("again: cargo run --release -p robustness --bin isolation -- --kind wild"));
    }
}
