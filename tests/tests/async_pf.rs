//! Pages of a Linux guest that are elsewhere: Debian's kernel with the asynchronous page faults that it knows of, without them, and with
//! memory that fails. The tasks are those of `programs/pages.c`.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use e2e::{healthy, in_one_piece, section};
use xtask::guest::{Boot, Outcome};
use xtask::images::Initramfs;
use xtask::{packages, root, run};

/// The initramfs runs the commands of its kernel command line's `run=`, and shows how often the kernel was told of pages, and its log.
fn initrd() -> &'static PathBuf {
    static INITRD: OnceLock<PathBuf> = OnceLock::new();
    INITRD.get_or_init(|| {
        let script = "commands=$(sed -n 's/.* run=\"\\([^\"]*\\)\".*/\\1/p' /proc/cmdline)
sysctl -q -w kernel.sched_rt_runtime_us=-1
told() { awk '/HYP:/ { for (i = 2; $i ~ /^[0-9]+$/; i++) sum += $i; print sum + 0 }' /proc/interrupts; }
before=$(told)
eval \"$commands\" > /tmp/said 2>&1
echo BEGIN program
cat /tmp/said
echo END program
echo BEGIN told
echo $(($(told) - before))
echo END told
echo BEGIN log
dmesg
echo END log
";
        let source = root().join("tests/programs/pages.c");
        let program = in_one_piece("pages", |target| {
            run(Command::new("cc").args(["-O1", "-static", "-o"]).arg(target).arg(source)).unwrap();
        });
        let files = vec![("bin/pages".to_string(), 0o755, std::fs::read(program).unwrap())];
        let kernel = packages::kernel("6.12").unwrap();
        in_one_piece("async-pf.cpio", |path| {
            Initramfs { script, files }.build(&kernel, path).map(drop).unwrap()
        })
    })
}

/// Boots a guest with `parameters` for its kernel that runs `commands`; a page is back after `delay` microseconds. `None` where nobody may
/// have a userfaultfd.
fn linux(parameters: &str, commands: &str, delay: u32, cpus: u32) -> Option<Outcome> {
    let boot = Boot {
        kernel: packages::kernel("6.12").unwrap().image,
        initrd: Some(initrd().clone()),
        append: format!("console=ttyS0 quiet panic=-1 {parameters} run=\"{commands}\""),
        memory: 256,
        cpus,
        extra: ["--page-out", "half", "--page-delay", &delay.to_string(), "--stats"]
            .map(String::from)
            .to_vec(),
        ..Boot::default()
    };
    let outcome = boot.run().unwrap();
    if outcome.stderr.contains("--page-out needs a userfaultfd") {
        eprintln!("{}", outcome.stderr);
        return None;
    }
    healthy(&outcome);
    Some(outcome)
}

/// How often the kernel was told that a page has come.
fn told(outcome: &Outcome) -> u64 {
    section(outcome, "told").trim().parse().unwrap()
}

/// Lines of the kernel's log that have `text`.
fn logged(outcome: &Outcome, text: &str) -> usize {
    section(outcome, "log").lines().filter(|line| line.contains(text)).count()
}

/// A task waits for its page, and the other one, of less priority, is who lets it come: that it runs is not a matter of time.
#[test]
fn apf_l1_another_task_goes_on_while_a_page_comes() {
    let Some(outcome) = linux("", "pages stalls 32 hold", 0, 1) else { return };
    assert_eq!(section(&outcome, "program"), "stalls 32 moved 32 right 32\n");
    assert!(told(&outcome) >= 32, "{}", told(&outcome));
}

/// Without, the processor stands still, but for interrupts: nobody of less priority runs.
#[test]
fn apf_l1_nobody_goes_on_without() {
    let Some(outcome) = linux("no-kvmapf", "pages stalls 8", 100_000, 1) else { return };
    let program = section(&outcome, "program");
    let numbers: Vec<u64> = program.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    // A kernel lets the others run for a moment after a second of somebody of real-time priority.
    assert!(numbers[0] == 8 && numbers[1] <= 2 && numbers[2] == 8, "{program}");
    assert_eq!(told(&outcome), 0);
}

/// A kernel's own accesses to user memory: it takes no such event, and the processor is held.
#[test]
fn apf_l2_system_calls_with_buffers_that_are_elsewhere() {
    for parameters in ["", "no-kvmapf"] {
        let Some(outcome) = linux(parameters, "pages copy 64", 100, 1) else { return };
        assert_eq!(section(&outcome, "program"), "copied 64 right 64\n");
    }
}

/// Everything of the guest's goes, over and over, its kernel too, and comes back.
#[test]
fn apf_l3_half_of_all_memory_goes() {
    for cpus in [1, 2] {
        let Some(outcome) = linux("", "pages bench 1500 512", 20, cpus) else { return };
        assert!(section(&outcome, "program").starts_with("wrong 0\n"), "{}", section(&outcome, "program"));
        assert_ne!(told(&outcome), 0);
    }
}

/// The task that touches failed memory is told, and nobody else is harmed.
#[test]
fn apf_l4_failed_memory_is_a_signal_for_the_task() {
    // Machine checks for one processor, and, as before there were such, for all.
    for (parameters, cpus) in [("", 1), ("", 2), ("mce=no_lmce", 2)] {
        let Some(outcome) = linux(parameters, "pages poison", 0, cpus) else { return };
        let expected = "page 0 holds 1\nsignal 7 code 4 page 1\nthe other goes on\n";
        assert_eq!(section(&outcome, "program"), expected, "{}", outcome.console);
        assert_eq!(logged(&outcome, "mce: Uncorrected hardware memory error in user-access"), 1);
        assert_eq!(logged(&outcome, "recovery action for dirty LRU page: Recovered"), 1);
    }
}

/// Action optional: a task that wants to hears of it before it touches the memory.
#[test]
fn apf_l4_failed_memory_that_nobody_has_touched() {
    let Some(outcome) = linux("", "pages told", 0, 1) else { return };
    let program = section(&outcome, "program");
    assert_eq!(program, "signal 7 code 5 page 1\nthe other goes on\n", "{}", outcome.console);
    assert_eq!(logged(&outcome, "recovery action for dirty LRU page: Recovered"), 1);
}
