//! What must be found is found: writes that are no guest's, and accesses to memory that is not.

use std::process::Command;

use robustness::isolation::Break;

/// Runs a few guests that do what `broken` says; whether all was well, and what was said.
fn run(broken: Option<&str>) -> (bool, String) {
    let mut arguments = vec!["--seed", "1", "--kind", "wild", "--guests", "20"];
    let broken = broken.map(|name| format!("--broken={name}"));
    arguments.extend(broken.as_deref());
    run_with(&arguments)
}

fn run_with(arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_isolation"));
    command.args(arguments);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.success(), said)
}

#[test]
fn guests_change_nothing_outside_their_memory() {
    let (well, said) = run(None);
    assert!(well && said.contains("20 guests") && said.contains(" 0 failures"), "{said}");
}

/// With SMAP overridden pages are not noted, but constants behind a first one went to the page that was noted last: none.
#[test]
fn constants_go_to_no_page_that_was_not_noted() {
    for seed in ["1795833104", "1795834277"] {
        let (well, said) = run_with(&["--kind", "wild", "--seed", seed, "--after", "0"]);
        assert!(well && said.contains(" 0 failures"), "{said}");
    }
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
