//! Split locks and bus locks of a Linux guest: what Debian's kernel says and does under each of its modes, on hosts in each
//! of theirs. The programs that make them are `programs/split.c` and, in the kernel, `programs/kernel_split.c`.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use e2e::{in_one_piece, section};
use xtask::guest::{Boot, Outcome};
use xtask::images::Initramfs;
use xtask::{packages, root, run};

/// A model that does not say that there is a hypervisor: Linux has split-lock detection only then.
const BARE: &str = "sapphire-rapids,-hypervisor";
/// It has bus-lock detection and nothing else.
const BUS_LOCKS: &str = "sapphire-rapids,-hypervisor,-core_capability";

/// Compiles the program `name`.
fn program(name: &str) -> Vec<u8> {
    let source = root().join(format!("tests/programs/{name}.c"));
    let target = in_one_piece(name, |target| {
        run(Command::new("cc").args(["-O1", "-static", "-pthread", "-o"]).arg(target).arg(source)).unwrap();
    });
    std::fs::read(target).unwrap()
}

/// The initramfs runs the commands of its kernel command line's `run=`, between BEGIN and END, and shows the log.
fn initrd() -> &'static PathBuf {
    static INITRD: OnceLock<PathBuf> = OnceLock::new();
    INITRD.get_or_init(|| {
        let script = "commands=$(sed -n 's/.* run=\"\\([^\"]*\\)\".*/\\1/p' /proc/cmdline)
echo BEGIN flags
tr ' ' '\\n' < /proc/cpuinfo | grep -x -e split_lock_detect -e bus_lock_detect | sort | uniq
echo END flags
echo BEGIN program
eval \"$commands\" 2>&1
echo END program
echo BEGIN log
dmesg | grep -o -e 'x86/split lock.*' -e 'Unhandled.*' -e 'unchecked.*' -e 'Oops: .*'
echo END log
";
        let programs = ["split", "kernel_split"];
        let files = programs.map(|name| (format!("bin/{name}"), 0o755, program(name))).to_vec();
        let kernel = packages::kernel("6.12").unwrap();
        in_one_piece("split-lock.cpio", |path| {
            Initramfs { script, files }.build(&kernel, path).map(drop).unwrap()
        })
    })
}

/// Boots a guest of `model` on `host`, with `parameters` for its kernel, that runs `commands`.
fn linux(model: &str, host: &str, parameters: &str, commands: &str, cpus: u32) -> Outcome {
    let boot = Boot {
        kernel: packages::kernel("6.12").unwrap().image,
        initrd: Some(initrd().clone()),
        append: format!("console=ttyS0 quiet panic=-1 {parameters} run=\"{commands}\""),
        memory: 256,
        cpus,
        extra: ["--cpu", model, "--host", host, "--stats"].map(String::from).to_vec(),
        ..Boot::default()
    };
    let outcome = boot.run().unwrap();
    assert_eq!(outcome.status, Some(0), "{}\n{}", outcome.stderr, outcome.console);
    outcome
}

/// Lines of the kernel's log that have `text`.
fn logged(outcome: &Outcome, text: &str) -> usize {
    section(outcome, "log").lines().filter(|line| line.contains(text)).count()
}

const BANNER: &str = "x86/split lock detection: #AC: crashing the kernel on kernel split_locks and";

/// Whoever sees that there is a hypervisor has no detection, though it is enumerated. Bus locks are detected.
#[test]
fn sl_l1_a_stock_guest_has_no_split_lock_detection() {
    let outcome = linux("sapphire-rapids", "split_lock_detect=warn", "", "split 3", 1);
    assert_eq!(section(&outcome, "flags"), "bus_lock_detect\n");
    assert_eq!(logged(&outcome, "#AC"), 0, "{}", section(&outcome, "log"));
    assert_eq!(logged(&outcome, "#DB: warning on user-space bus_locks"), 1);
    assert_eq!(logged(&outcome, "took a bus_lock trap at address: 0x"), 3);
    assert_eq!(section(&outcome, "program"), "sum 3\n");
    let said = &outcome.stderr;
    assert!(said.contains("took a split_lock trap at address: 0x") && said.contains("(f0 ff"), "{said}");
    assert!(said.contains("split locks warned     3"), "{said}");
}

/// Rows 2 to 4 of the table from within: the guest warns.
#[test]
fn sl_l2_the_guest_warns() {
    let outcome = linux(BARE, "split_lock_detect=warn", "split_lock_detect=warn", "split 3", 1);
    assert_eq!(section(&outcome, "flags"), "bus_lock_detect\nsplit_lock_detect\n");
    assert_eq!(logged(&outcome, &format!("{BANNER} warning on user-space split_locks")), 1);
    assert_eq!(logged(&outcome, "#AC: split/"), 1, "{}", section(&outcome, "log"));
    assert_eq!(logged(&outcome, "took a split_lock trap at address: 0x"), 1);
    assert_eq!(logged(&outcome, "unchecked"), 0);
    assert_eq!(section(&outcome, "program"), "sum 3\n");
}

/// Rows 4 and 7: SIGBUS with BUS_ADRALN, whatever the host does.
#[test]
fn sl_l3_the_guest_is_fatal() {
    for host in ["split_lock_detect=warn", "split_lock_detect=fatal"] {
        let outcome = linux(BARE, host, "split_lock_detect=fatal", "split 3; echo status $?", 1);
        assert_eq!(logged(&outcome, &format!("{BANNER} sending SIGBUS on user-space split_locks")), 1);
        assert_eq!(section(&outcome, "program"), "signal 7 code 1 value 0\nstatus 107\n", "{host}");
    }
}

/// Row 6: the guest warns, and the host lets nothing through.
#[test]
fn sl_l2_the_guest_warns_on_a_fatal_host_that_emulates() {
    let host = "split_lock_detect=fatal ring3.split_lock_policy=emulate";
    let outcome = linux(BARE, host, "split_lock_detect=warn", "split 3", 1);
    assert_eq!(logged(&outcome, "took a split_lock trap at address: 0x"), 1);
    assert_eq!(section(&outcome, "program"), "sum 3\n");
    assert!(outcome.stderr.contains("split locks emulated"), "{}", outcome.stderr);
}

/// A split lock of the kernel's own is a bug of it in every mode but off.
#[test]
fn sl_l4_the_kernel_itself() {
    let lock = "kernel_split; echo status $?";
    for (host, guest) in [("warn", "warn"), ("fatal", "fatal")] {
        let (host, guest) = (format!("split_lock_detect={host}"), format!("split_lock_detect={guest}"));
        let outcome = linux(BARE, &host, &guest, lock, 1);
        assert_eq!(logged(&outcome, "Oops: Split lock detected"), 1, "{guest}: {}", outcome.console);
        // The oops, on the console, and then the end of the process whose system call it was.
        let program = section(&outcome, "program");
        assert!(program.ends_with("status 139\n") && !program.contains("sum 4"), "{guest}: {program}");
    }
    // Who does not detect them gets what the host says.
    for host in ["split_lock_detect=warn", "split_lock_detect=fatal ring3.split_lock_policy=emulate"] {
        let outcome = linux("sapphire-rapids", host, "", lock, 1);
        assert_eq!(section(&outcome, "program"), "sum 42\nstatus 0\n", "{host}");
        assert_eq!(logged(&outcome, "Oops"), 0);
    }
}

/// Row 5 with the policy to forward: a kernel that has not asked for detection takes the exception for a warning, waits its
/// 10 ms, and executes the instruction again, for ever; the culprit can be killed.
#[test]
fn sl_l6_an_unaware_guest_that_gets_the_exception_loops_and_can_be_stopped() {
    // Whether the shell itself says "Killed" depends on who is first, the end or the wait.
    let commands = "split 1 & sleep 1; kill -9 $!; wait $! 2>/dev/null; echo status $?";
    let host = "split_lock_detect=fatal ring3.split_lock_policy=forward";
    let outcome = linux("sapphire-rapids", host, "", commands, 1);
    assert_eq!(section(&outcome, "program"), "status 137\n", "{}", outcome.console);
    assert_eq!(logged(&outcome, "took a split_lock trap at address: 0x"), 1, "each task once");
    let (_, forwarded) = outcome.stderr.split_once("split locks forwarded").unwrap();
    let forwarded: u64 = forwarded.split_whitespace().next().unwrap().parse().unwrap();
    assert!(forwarded >= 2, "{forwarded}");
}

#[test]
fn sl_l5_bus_locks_warn() {
    let outcome = linux(BUS_LOCKS, "split_lock_detect=off", "split_lock_detect=warn", "split 2", 1);
    assert_eq!(section(&outcome, "flags"), "bus_lock_detect\n");
    assert_eq!(logged(&outcome, "#DB: warning on user-space bus_locks"), 1);
    assert_eq!(logged(&outcome, "#DB: split/"), 2);
    assert_eq!(section(&outcome, "program"), "sum 2\n");
}

/// The trap comes behind the instruction: the word has been incremented.
#[test]
fn sl_l5_bus_locks_fatal() {
    let outcome = linux(BUS_LOCKS, "split_lock_detect=off", "split_lock_detect=fatal", "split 2", 1);
    assert_eq!(logged(&outcome, "#DB: sending SIGBUS on user-space bus_locks"), 1);
    assert_eq!(section(&outcome, "program"), "signal 7 code 1 value 1\n");
}

#[test]
fn sl_l5_bus_locks_ratelimit() {
    let commands = "start=$(cut -d. -f1 /proc/uptime); split 12; \
                    end=$(cut -d. -f1 /proc/uptime); test $((end - start)) -ge 2 && echo slow";
    let outcome = linux(BUS_LOCKS, "split_lock_detect=off", "split_lock_detect=ratelimit:5", commands, 1);
    assert_eq!(logged(&outcome, "#DB: setting system wide bus lock rate limit to 5/sec"), 1);
    assert_eq!(section(&outcome, "program"), "sum 12\nslow\n", "five a second by the guest's clock");
}

#[test]
fn sl_l5_bus_locks_off() {
    let outcome = linux(BUS_LOCKS, "split_lock_detect=off", "split_lock_detect=off", "split 2", 1);
    assert_eq!(logged(&outcome, "disabled"), 1);
    assert_eq!((logged(&outcome, "#DB"), section(&outcome, "program")), (0, "sum 2\n"));
}

/// Threads on all processors, with and without the guest's own mitigation; nothing is lost, and nobody is stuck.
#[test]
fn sl_l7_mitigation_of_the_guest_on_four_processors() {
    for (mitigate, count) in [(1, 5), (0, 100)] {
        let commands =
            format!("sysctl -q -w kernel.split_lock_mitigate={mitigate}; split {count} 4; split 1");
        let outcome = linux(BARE, "split_lock_detect=warn", "split_lock_detect=warn", &commands, 4);
        assert_eq!(section(&outcome, "program"), format!("sum {}\nsum 1\n", 4 * count));
        assert_eq!(outcome.alarms(), Vec::<&str>::new(), "{}", outcome.console);
    }
}
