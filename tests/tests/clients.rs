//! A KVM client that knows nothing of ring3, under `ring3 run`: one test for each thing that the kernel does around the
//! ioctls of a device (descriptors, fork, signals, cancellation), and for what else the client's process sees.
//! The client is `clients/client.c`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use xtask::{root, run};

fn ring3() -> PathBuf {
    root().join("target/release/ring3")
}

/// Compiles the client once, dynamically linked.
fn client() -> &'static Path {
    static CLIENT: OnceLock<PathBuf> = OnceLock::new();
    CLIENT.get_or_init(|| compile("client", &[]))
}

fn compile(name: &str, options: &[&str]) -> PathBuf {
    let directory = root().join("target/clients");
    std::fs::create_dir_all(&directory).unwrap();
    let program = directory.join(name);
    let source = root().join("tests/clients/client.c");
    run(Command::new("cc").args(["-O1", "-Wall", "-pthread", "-o"]).arg(&program).arg(source).args(options))
        .unwrap();
    program
}

fn output(command: &mut Command) -> Output {
    command.output().unwrap()
}

/// The client's behaviour holds under ring3.
fn holds(behaviour: &str) {
    holds_on("", behaviour);
}

/// It holds on a host with these parameters.
fn holds_on(host: &str, behaviour: &str) {
    let mut command = Command::new(ring3());
    // The host's messages of split locks are warnings.
    command.args(["run", "--log", "error"]).env("RING3_HOST", host);
    let output = output(command.arg("--").arg(client()).arg(behaviour));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{behaviour}: {}\n{said}", output.status);
    assert_eq!(said, "", "{behaviour}: nothing is said to the client's stderr");
}

macro_rules! behaviours {
    ($($(#[$attribute:meta])* $name:ident,)*) => {$(
        $(#[$attribute])*
        #[test]
        fn $name() {
            holds(stringify!($name));
        }
    )*};
}

behaviours! {
    exits,
    descriptors,
    unseen_descriptors,
    passed_descriptors,
    forked,
    forked_during_first_use,
    inherited,
    signals,
    signal_storm,
    signal_while_halted,
    signal_while_waiting,
    handler_that_jumps,
    handler_for_one_time,
    immediate_exit,
    immediate_exit_in_handler,
    signal_mask,
    cancel_deferred,
    cancel_asynchronous,
    own_faults,
    absent_memory,
    memory_taken_while_running,
    absent_memory_and_handlers,
    absent_memory_and_blocked_signals,
    a_sent_fault_signal,
    faults_without_handlers,
    failed_memory,
    memory_registered_later,
    files,
    system_calls,
    other_ioctls,
    thread_masks,
    no_leaks,
}

/// AMX is there for who asks for it, whatever the machine has.
#[test]
fn amx_p1_guest_permissions() {
    let mut command = Command::new(ring3());
    command
        .args(["run", "--cpu", "sapphire-rapids,+xfd,+amx_tile", "--"])
        .arg(client())
        .arg("guest_permissions");
    let output = output(&mut command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A host in fatal mode, where split locks fail KVM_RUN.
const FATAL: &str = "split_lock_detect=fatal";

#[test]
fn sl_k1_split_lock_efault() {
    holds_on(FATAL, "split_lock_efault");
}

#[test]
fn sl_split_lock_exit() {
    holds_on(FATAL, "split_lock_exit");
}

#[test]
fn sl_k2_split_lock_kill() {
    holds_on(FATAL, "split_lock_kill");
}

#[test]
fn sl_k2_split_lock_kill_is_forced() {
    holds_on(&format!("{FATAL} ring3.split_lock_policy=kill"), "split_lock_kill_is_forced");
}

#[test]
fn sl_g4_clients_read_the_modelled_hosts_sysctl() {
    holds_on("kernel.split_lock_mitigate=0", "split_lock_mitigate");
}

#[test]
fn exit_status_and_arguments_are_the_clients() {
    let output = output(Command::new(ring3()).args([
        "run",
        "--",
        "sh",
        "-c",
        "echo $1 $LD_PRELOAD; exit 7",
        "-",
        "--cpu",
    ]));
    assert_eq!(output.status.code(), Some(7));
    let printed = String::from_utf8_lossy(&output.stdout).to_string();
    assert!(printed.starts_with("--cpu /") && printed.trim_end().ends_with("/libring3.so"), "{printed}");
}

#[test]
fn the_cpu_model_is_the_one_asked_for() {
    let refused = output(Command::new(ring3()).args(["run", "--cpu", "no-such-model", "true"]));
    assert_eq!(refused.status.code(), Some(2));
    // In the library, too, which may be preloaded by hand.
    let library = root().join("target/release/libring3.so");
    let mut command = Command::new(client());
    let by_hand = output(command.arg("exits").env("LD_PRELOAD", library).env("RING3_CPU", "no-such-model"));
    let said = String::from_utf8_lossy(&by_hand.stderr);
    assert!(
        !by_hand.status.success() && said.contains("no-such-model") && said.contains("No such device"),
        "{said}"
    );
}

#[test]
fn static_clients_are_refused() {
    let program = compile("client-static", &["-static"]);
    let refused = output(Command::new(ring3()).args(["run", "--"]).arg(&program).arg("exits"));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("statically linked") && said.contains("x86_64-unknown-linux-gnu"), "{said}");
    let examined = output(Command::new(ring3()).arg("doctor").arg(&program));
    assert_eq!(examined.status.code(), Some(1));
}

#[test]
fn the_doctor_finds_a_dynamic_client_fit() {
    let examined = output(Command::new(ring3()).arg("doctor").arg(client()));
    let report = String::from_utf8_lossy(&examined.stdout);
    assert!(report.contains("dynamic, can be run") && report.contains("ok engine"), "{report}");
}
