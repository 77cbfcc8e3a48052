//! The notify VM exit from outside: Linux under load never sees one, and QEMU does what its manual says of
//! `-accel kvm,notify-vmexit=`.

use std::process::Command;

use e2e::qemu::{Qemu, scratch, text};
use e2e::{healthy, linux};
use guests::{NOTIFY_32, NOTIFY_64, Program};
use xtask::run;

/// How long Linux is under load. A nightly run sets it to 60.
fn seconds() -> u32 {
    std::env::var("RING3_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(10)
}

/// Boots Linux and keeps two vCPUs busy with forks, pipes, hashes and memory.
fn no_exits_under_load(window: &str) {
    let script = format!(
        "end=$(($(date +%s) + {}))
for n in 1 2 3; do
    (while [ $(date +%s) -lt $end ]; do dd if=/dev/urandom bs=64k count=8 2>/dev/null | sha256sum >/dev/null; done) &
done
wait
echo load done
",
        seconds()
    );
    let outcome = linux(&format!("notify-{window}"), "6.12", &script, |boot| {
        boot.cpus = 2;
        let host = format!("kvm_intel.notify_window_us={window}");
        boot.extra = ["--stats", "--host", &host].map(String::from).to_vec();
    })
    .unwrap();
    healthy(&outcome);
    assert!(outcome.console.contains("load done"));
    assert!(outcome.stderr.contains("cpuid"), "statistics of exits: {}", outcome.stderr);
    assert!(
        !outcome.stderr.contains("notify") && !outcome.stderr.contains("no event window"),
        "{}",
        outcome.stderr
    );
}

#[test]
fn a9_linux_under_load_never_closes_the_default_window() {
    no_exits_under_load("100");
}

#[test]
fn a9_linux_under_load_never_closes_a_window_of_zero() {
    no_exits_under_load("0");
}

/// QEMU with a guest whose event window never opens, as a 32-bit multiboot image.
fn qemu(program: Program, mode: &str) -> Qemu {
    let name = format!("{}-{mode}", program.name);
    let (wide, narrow) = (scratch(&format!("{name}.elf64")), scratch(&format!("{name}.elf32")));
    std::fs::create_dir_all(xtask::guest_dir()).unwrap();
    std::fs::write(&wide, program.image).unwrap();
    run(Command::new("objcopy").args(["-O", "elf32-i386"]).args([&wide, &narrow])).unwrap();
    let accel = format!("kvm,notify-vmexit={mode}");
    let kernel = text(&narrow);
    let qemu = Qemu::start_with(&name, &accel, "q35", "max", &["-kernel", &kernel, "-m", "64"]).unwrap();
    std::fs::remove_file(wide).unwrap();
    qemu
}

const STATUS: &str = r#"{"execute":"query-status"}"#;

#[test]
fn qemu_warns_once_and_goes_on_in_mode_run() {
    for program in [NOTIFY_32, NOTIFY_64] {
        let mut qemu = qemu(program, "run");
        qemu.wait_for_error("notify exit with valid context").unwrap();
        for _ in 0..20 {
            qemu.until(STATUS, "\"running\"").unwrap();
        }
        assert_eq!(qemu.errors().matches("notify exit").count(), 1);
        qemu.command(r#"{"execute":"stop"}"#).unwrap();
        qemu.until(STATUS, "\"paused\"").unwrap();
        qemu.command(r#"{"execute":"quit"}"#).unwrap();
        qemu.wait().unwrap();
    }
}

#[test]
fn qemu_stops_with_an_internal_error_in_mode_internal_error() {
    for program in [NOTIFY_32, NOTIFY_64] {
        let mut qemu = qemu(program, "internal-error");
        qemu.until(STATUS, "\"internal-error\"").unwrap();
        assert!(qemu.errors().contains("notify exit"), "{}", qemu.errors());
        qemu.command(r#"{"execute":"quit"}"#).unwrap();
        qemu.wait().unwrap();
    }
}

/// Without the capability enabled ring3's own window holds, of which QEMU hears nothing.
#[test]
fn qemu_hears_nothing_in_mode_disable() {
    let mut qemu = qemu(NOTIFY_32, "disable");
    qemu.until(STATUS, "\"running\"").unwrap();
    qemu.wait_for_error("no event window").unwrap();
    assert!(!qemu.errors().contains("notify exit"), "{}", qemu.errors());
    qemu.command(r#"{"execute":"quit"}"#).unwrap();
    qemu.wait().unwrap();
}
