//! AMX in a Linux guest: the kernel's own test of it, matrices, and tiles that stay what they are. The machine needs no AMX.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use e2e::qemu::{APPEND, Qemu, scratch, text};
use e2e::{in_one_piece, section};
use xtask::guest::{self, Boot, Outcome, ring3};
use xtask::images::Initramfs;
use xtask::{packages, root, run};

const MODEL: &str = "sapphire-rapids";

/// How long tiles have to stay: `RING3_SOAK_SECONDS`, or a few seconds.
fn seconds() -> u64 {
    std::env::var("RING3_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(4)
}

/// Compiles `source` for the guest.
fn program(name: &str, source: &Path, include: Option<&Path>) -> (String, u32, Vec<u8>) {
    let target = in_one_piece(name, |target| {
        let mut cc = Command::new("cc");
        cc.args(["-O2", "-w", "-static", "-pthread", "-mamx-tile", "-mamx-int8", "-mamx-bf16"]);
        cc.args(include.map(|dir| format!("-I{}", dir.display())));
        run(cc.arg("-o").arg(target).arg(source)).unwrap();
    });
    (format!("bin/{name}"), 0o755, std::fs::read(target).unwrap())
}

/// An initramfs with `files` that runs the commands of its kernel command line's `run=`.
fn initramfs(name: &str, files: Vec<(String, u32, Vec<u8>)>) -> PathBuf {
    let script = "commands=$(sed -n 's/.* run=\"\\([^\"]*\\)\".*/\\1/p' /proc/cmdline)
echo BEGIN flags
tr ' ' '\\n' < /proc/cpuinfo | grep -x -e 'amx_.*' | sort | uniq
echo END flags
echo BEGIN log
dmesg | grep -o -e 'x86/fpu: .*AMX.*' -e 'x86/fpu: Enabled xstate.*'
echo END log
echo BEGIN program
eval \"$commands\" 2>&1
echo END program
";
    let kernel = packages::kernel("6.12").unwrap();
    in_one_piece(name, |path| Initramfs { script, files }.build(&kernel, path).map(drop).unwrap())
}

/// The initramfs with all programs that need no libraries.
fn initrd() -> &'static PathBuf {
    static INITRD: OnceLock<PathBuf> = OnceLock::new();
    INITRD.get_or_init(|| {
        let selftests = packages::kernel_source().unwrap().join("tools/testing/selftests");
        let ours = |name: &str| program(name, &root().join(format!("tests/programs/{name}.c")), None);
        let mut files = vec![program("amx", &selftests.join("x86/amx.c"), Some(&selftests))];
        files.extend(["amx_matmul", "amx_tasks", "amx_signal"].map(ours));
        initramfs("amx.cpio", files)
    })
}

/// Boots a guest that runs `commands`.
fn linux(model: &str, commands: &str, cpus: u32, extra: &[&str]) -> Outcome {
    linux_with(initrd(), model, commands, cpus, extra)
}

fn linux_with(initrd: &Path, model: &str, commands: &str, cpus: u32, extra: &[&str]) -> Outcome {
    let options = [&["--cpu", model, "--stats"], extra].concat();
    let boot = Boot {
        kernel: packages::kernel("6.12").unwrap().image,
        initrd: Some(initrd.to_path_buf()),
        append: format!("console=ttyS0 quiet panic=-1 run=\"{commands}\""),
        memory: 512,
        cpus,
        extra: options.into_iter().map(String::from).collect(),
        ..Boot::default()
    };
    let outcome = boot.run().unwrap();
    assert_eq!(outcome.status, Some(0), "{}\n{}", outcome.stderr, outcome.console);
    assert_eq!(outcome.alarms(), Vec::<&str>::new(), "{}", outcome.console);
    outcome
}

/// Permission, first use, sigaltstack, fork, context switches, ptrace: the kernel's `tools/testing/selftests/x86/amx.c`.
#[test]
fn amx_linux_passes_its_own_test() {
    for cpus in [1, 2] {
        let outcome = linux(MODEL, "amx; echo status $?", cpus, &[]);
        assert_eq!(section(&outcome, "flags"), "amx_bf16\namx_int8\namx_tile\n");
        let log = section(&outcome, "log");
        assert!(log.contains("'AMX Tile config'") && log.contains("'AMX Tile data'"), "{log}");
        // The host executes AVX-512, so guests have its registers where the host does.
        let context = if is_x86_feature_detected!("avx512f") {
            "0x602e7, context size is 10752"
        } else {
            "0x60207, context size is 9152"
        };
        assert!(log.contains(&format!("Enabled xstate features {context} bytes")), "{log}");
        let said = section(&outcome, "program");
        assert!(said.ends_with("status 0\n") && !said.contains("[FAIL]"), "{cpus} processors: {said}");
        assert!(said.matches("[OK]").count() >= 5, "{said}");
    }
}

#[test]
fn amx_linux_multiplies_matrices() {
    let outcome = linux(MODEL, "amx_matmul; echo status $?", 1, &[]);
    assert_eq!(section(&outcome, "program"), "int8 equal\nbf16 equal\nstatus 0\n");
}

/// Debian's oneDNN, a program of ours that has it multiply, and all libraries, in /bin.
fn onednn() -> PathBuf {
    let packages = ["libdnnl-dev", "libdnnl2", "ocl-icd-libopencl1", "libgomp1", "libstdc++6"];
    let unpacked = packages.map(|package| packages::unpacked(package).unwrap());
    let libraries = unpacked.each_ref().map(|dir| dir.join("usr/lib/x86_64-linux-gnu"));
    let program = in_one_piece("amx_onednn", |target| {
        let mut cc = Command::new("cc");
        cc.arg("-O2").arg("-I").arg(unpacked[0].join("usr/include")).arg("-o").arg(target);
        cc.arg(root().join("tests/programs/amx_onednn.c")).arg(libraries[1].join("libdnnl.so.2"));
        run(cc.arg("-Wl,--allow-shlib-undefined")).unwrap();
    });
    let path = libraries.map(|dir| text(&dir)).join(":");
    let listed = run(Command::new("ldd").arg(&program).env("LD_LIBRARY_PATH", path)).unwrap();
    let mut wanted: Vec<&Path> =
        listed.split_whitespace().filter(|w| w.starts_with('/')).map(Path::new).collect();
    wanted.push(&program);
    let read = |path: &Path| {
        let name = path.file_name().unwrap().to_string_lossy();
        (format!("bin/{name}"), 0o755, std::fs::read(path).unwrap())
    };
    initramfs("onednn.cpio", wanted.into_iter().map(read).collect())
}

/// oneDNN takes AMX only together with AVX-512, which the guest has if the machine has it, and multiplies bf16 only with that.
/// A processor that has AMX without AVX-512 it takes for one that has both (KMOVQ), unless it is told what to use.
#[test]
fn amx_linux_has_onednn_use_it() {
    let initrd = onednn();
    for model in [MODEL, "sapphire-rapids,-avx512f"] {
        let commands = "grep -q -w avx512_bf16 /proc/cpuinfo && echo AVX-512 || export ONEDNN_MAX_CPU_ISA=AVX2; \
             ONEDNN_VERBOSE=1 ld-linux-x86-64.so.2 --library-path /bin /bin/amx_onednn; echo status $?";
        let outcome = linux_with(&initrd, model, commands, 1, &[]);
        let said = section(&outcome, "program");
        if !said.starts_with("AVX-512\n") {
            assert!(said.ends_with("int8 equal\nbf16 unavailable\nstatus 0\n"), "{said}");
            continue;
        }
        assert!(said.ends_with("int8 equal\nbf16 equal\nstatus 0\n"), "{said}");
        for kernel in ["matmul,brg:avx512_core_amx_int8,", "matmul,brg:avx512_core_amx_bf16,"] {
            assert!(said.contains(kernel), "no {kernel}: {said}");
        }
    }
}

/// Without XSAVES Linux does not use AMX, and nobody gets it.
#[test]
fn amx_linux_without_xsaves_has_none() {
    let outcome = linux("sapphire-rapids,-xsaves", "amx_matmul; echo status $?", 1, &[]);
    assert_eq!(section(&outcome, "flags"), "");
    assert_eq!(section(&outcome, "program"), "no permission\nstatus 2\n");
}

fn all_right(processes: u32) -> String {
    (0..processes).map(|i| format!("process {i}: wrong 0\n")).collect::<String>() + "done\n"
}

fn sorted(text: &str) -> String {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable_by_key(|line| (*line == "done", *line));
    lines.join("\n") + "\n"
}

/// Four processes with patterns of their own on two virtual CPUs, whose state is saved, overwritten and restored ten times and more.
#[test]
fn amx_linux_keeps_tiles_when_virtual_cpus_move() {
    let per_minute = (60 * 20 / seconds()).to_string();
    let commands = format!("amx_tasks 4 {}", seconds());
    let outcome = linux(MODEL, &commands, 2, &["--moves-per-minute", &per_minute]);
    assert_eq!(sorted(section(&outcome, "program")), all_right(4));
    let (_, moves) = outcome.stderr.split_once("virtual CPUs moved").expect("moves in the figures");
    let moves: u64 = moves.split_whitespace().next().unwrap().replace(',', "").parse().unwrap();
    assert!(moves >= 20, "{moves} moves");
}

/// More processes than processors, each with tiles of its own, with signals whose handlers use tiles.
#[test]
fn amx_linux_keeps_the_tiles_of_many_processes() {
    let outcome = linux(MODEL, &format!("amx_tasks 6 {}", seconds()), 2, &[]);
    assert_eq!(sorted(section(&outcome, "program")), all_right(6));
}

/// SIGILL without permission, and tiles in the frames of signals.
#[test]
fn amx_linux_has_tiles_in_signal_frames() {
    let outcome = linux(MODEL, "amx_signal; echo status $?", 1, &[]);
    let expected = "refused: signal 4 code 1, frame without tiles
allowed: signal 0
frame: size full, in use 1, same 1, changed 1
released: in use 0
status 0
";
    assert_eq!(section(&outcome, "program"), expected);
}

/// How often the machine with tiles is saved and restored.
const SAVES: usize = 10;

/// QEMU's machine with four processes that have tiles on two processors.
fn qemu_with_tiles(disk: &Path) -> Qemu {
    let library = in_one_piece("qemu_tiles.so", |target| {
        let source = root().join("tests/programs/qemu_tiles.c");
        run(Command::new("cc").args(["-O2", "-shared", "-fPIC", "-o"]).arg(target).arg(source)).unwrap();
    });
    let mut command = Command::new(ring3());
    command.env("LD_PRELOAD", library).args([
        "run",
        "--cpu",
        "sapphire-rapids,+xfd,+amx_tile,+amx_int8,+amx_bf16",
    ]);
    let (kernel, initrd) = (text(&packages::kernel("6.12").unwrap().image), text(initrd()));
    let append = format!("{APPEND} quiet run=\"amx_tasks 4 0 < /dev/ttyS0\"");
    let drive = format!("if=none,id=d,format=qcow2,file={}", text(disk));
    let arguments = ["-m", "256", "-smp", "2", "-kernel", &kernel, "-initrd", &initrd, "-append", &append];
    let arguments = [&arguments[..], &["-drive", &drive, "-no-reboot"]].concat();
    Qemu::start_on(&mut command, "qemu-amx", "kvm", "q35", "host", &arguments).unwrap()
}

/// Waits until every process of the guest has come `more` times further than now.
fn go_on(qemu: &mut Qemu, more: usize) {
    let so_far = qemu.console().matches("tick ").count();
    qemu.wait_for("tick ", so_far + more).unwrap();
}

/// Four processes with tiles of their own on two processors; the machine is saved and restored ten times.
#[test]
fn amx_linux_keeps_tiles_over_snapshots() {
    packages::require(&[("qemu-img", "qemu-utils")]).unwrap();
    let disk = scratch("amx-snapshot.qcow2");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("64M")).unwrap();
    let mut qemu = qemu_with_tiles(&disk);
    qemu.wait_for("tick 0\n", 1).unwrap();
    let (started, all) = (Instant::now(), Duration::from_secs(seconds()));
    for save in 1..=SAVES {
        while started.elapsed() < all * save as u32 / SAVES as u32 {
            go_on(&mut qemu, 1);
        }
        go_on(&mut qemu, 2);
        qemu.human("savevm tiles").unwrap();
        go_on(&mut qemu, 2);
        qemu.human("loadvm tiles").unwrap();
    }
    go_on(&mut qemu, 2);
    qemu.say("\n").unwrap();
    qemu.wait_for("END program", 1).unwrap();
    qemu.wait().unwrap();
    qemu.healthy();
    assert!(!qemu.errors().contains("no table"), "{}", qemu.errors());
    let console = qemu.console();
    let program: String = guest::section(&console, "program")
        .unwrap()
        .lines()
        // A snapshot can cut a tick's line.
        .filter(|l| l.starts_with("process") || ["done", "failed"].contains(l))
        .fold(String::new(), |text, line| text + line + "\n");
    assert!(console.contains("amx_bf16\namx_int8\namx_tile\n"), "{console}");
    assert_eq!(sorted(program.trim_start()), all_right(4), "{console}");
    let _ = std::fs::remove_file(disk);
}
