//! The command as a person meets it: what it says to bad input, and how guests and people end a machine.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use vmm_sys_util::tempdir::TempDir;

const BAD_INPUT: i32 = 2;

fn ring3(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ring3"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env_remove("RING3_LOG");
    command
}

fn run(arguments: &[&str]) -> Output {
    ring3(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A multiboot-1 image at 1 MiB with 32-bit machine code.
fn guest(code: &[u8]) -> Vec<u8> {
    const BASE: u32 = 0x10_0000;
    let (magic, flags) = (0x1bad_b002_u32, 0x1_0003_u32);
    let checksum = 0_u32.wrapping_sub(magic).wrapping_sub(flags);
    let mut image: Vec<u8> = [magic, flags, checksum, BASE, BASE, 0, 0, BASE + 32]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    image.extend_from_slice(code);
    image
}

/// Prints "hi\n" on the serial port.
const PRINT: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'h', 0xee, 0xb0, b'i', 0xee, 0xb0, b'\n', 0xee, // mov al, …; out dx, al
];
/// Sends what the serial port receives back, for ever.
const ECHO: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xec, 0xa8, 0x01, 0x74, 0xfb, // wait: in al, dx; test al, 1; jz wait
    0xb2, 0xf8, 0xec, 0xee, // mov dl, 0xf8; in al, dx; out dx, al
    0xeb, 0xf1, // jmp to the start
];
/// ACPI power-off.
const POWER_OFF: &[u8] = &[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, 0xeb, 0xfe];
/// Reset by the keyboard controller.
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];
/// Writes 0x10 to the debug-exit port, then powers off.
const DEBUG_EXIT: &[u8] = &[0xb0, 0x10, 0xe6, 0xf4];
/// UD2 without an interrupt table.
const TRIPLE_FAULT: &[u8] = &[0x0f, 0x0b];
/// Jumps to where there is no memory.
const WILD_JUMP: &[u8] = &[0xb8, 0, 0, 0, 0xd8, 0xff, 0xe0];
const SPIN: &[u8] = &[0xeb, 0xfe];

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Files(TempDir::new().unwrap())
    }

    fn put(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.0.as_path().join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().into()
    }
}

#[test]
fn help_teaches() {
    let text = String::from_utf8(run(&["boot", "--help"]).stdout).unwrap();
    for word in ["Examples:", "Exit status:", "--exit-port", "sapphire-rapids", "Ctrl-A x", "RING3_LOG"] {
        assert!(text.contains(word), "{word} is missing in\n{text}");
    }
    assert_eq!(run(&["--version"]).status.code(), Some(0));
    assert_eq!(run(&[]).status.code(), Some(BAD_INPUT));
}

#[test]
fn bad_arguments_get_a_sentence() {
    let files = Files::new();
    let kernel = files.put("guest.bin", &guest(SPIN));
    let table: &[(&[&str], &[&str])] = &[
        (&["--memory", "0"], &["too little", "at least 2 MiB"]),
        (&["--memory", "512"], &["did you mean 512M"]),
        (&["--memory", "much"], &["'much' is not a size"]),
        (&["--memory", "2000T"], &["too much", "at most 1 TiB"]),
        (&["--memory", "99999999999T"], &["more than there can be"]),
        (&["--memory", "5001K"], &["not a multiple of the page size"]),
        (&["--cpus", "0"], &["1 to 8"]),
        (&["--cpus", "9"], &["1 to 8"]),
        (&["--cpus", "two"], &["'two'", "1 to 8"]),
        (&["--cpu", "skylak"], &["unknown CPU model 'skylak'", "did you mean 'skylake'", "nehalem"]),
        (&["--cpu", "skylake,+smop"], &["unknown CPU feature 'smop'", "did you mean"]),
        (&["--cpu", "skylake,smap"], &["'smap'", "expected +feature, -feature"]),
        (&["--host", "split_lock_detect=maybe"], &["split_lock_detect", "off|warn|fatal"]),
        (&["--host", "colour=blue"], &["unknown host parameter 'colour'"]),
        (&["--serial", "pty"], &["'pty' is not a console target"]),
        (&["--serial", "file:/nonexistent/log"], &["serial output", "/nonexistent/log"]),
        (&["--disk", "/nonexistent/disk.img"], &["cannot open the disk /nonexistent/disk.img"]),
        (&["--disk", "/nonexistent/disk.img,rw"], &["'rw' is not a disk option"]),
        (&["--disk", "/"], &["disk /"]),
        (&["--initrd", "/nonexistent/initrd"], &["cannot open the initrd /nonexistent/initrd"]),
        (&["--append", "a\nb", "--nonsense"], &["--nonsense"]),
    ];
    for (arguments, expected) in table {
        let output = run(&[&["boot", "--kernel", &kernel], *arguments].concat());
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(BAD_INPUT), "{arguments:?}: {text}");
        for words in *expected {
            assert!(text.contains(words), "{arguments:?}: {text:?} lacks {words:?}");
        }
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn what_cannot_be_booted_is_named() {
    let files = Files::new();
    let mut truncated = vec![0; 0x400];
    truncated[0x1fe..0x200].copy_from_slice(b"\x55\xaa");
    truncated[0x202..0x206].copy_from_slice(b"HdrS");
    let table: &[(&str, &[u8], &str)] = &[
        ("empty", b"", "an empty file"),
        ("script", b"#!/bin/sh\n", "a script"),
        ("text", b"hello\n", "a text file"),
        ("gzip", b"\x1f\x8b\x08\0", "gzip-compressed data"),
        ("cpio", b"0707010000", "a cpio archive"),
        ("data", &[1, 2, 3], "unknown data"),
        ("bzimage", &truncated, "Linux"),
        ("elf", b"\x7fELF\x02\x01\x01\0", "cut off"),
    ];
    for (name, bytes, expected) in table {
        let output = run(&["boot", "--kernel", &files.put(name, bytes)]);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(BAD_INPUT), "{name}: {text}");
        assert!(text.contains(expected), "{name}: {text:?} lacks {expected:?}");
    }
    let own = run(&["boot", "--kernel", env!("CARGO_BIN_EXE_ring3")]);
    assert!(stderr(&own).contains("neither a PVH note nor a multiboot-1 header"), "{}", stderr(&own));
    let missing = run(&["boot", "--kernel", "/nonexistent/kernel"]);
    assert!(stderr(&missing).contains("cannot open the kernel /nonexistent/kernel"));
    assert_eq!(run(&["boot", "--kernel", "/"]).status.code(), Some(BAD_INPUT));
}

#[test]
fn an_initrd_that_does_not_fit_is_told_with_sizes() {
    let files = Files::new();
    let kernel = files.put("guest.bin", &guest(SPIN));
    let initrd = files.put("initrd", &vec![0; 8 << 20]);
    let output = run(&["boot", "--kernel", &kernel, "--initrd", &initrd, "--memory", "8M"]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(BAD_INPUT), "{text}");
    assert!(text.contains("does not fit") && text.contains("8 MiB") && text.contains("--memory"), "{text}");
}

#[test]
fn a_locked_disk_is_refused() {
    let files = Files::new();
    let kernel = files.put("guest.bin", &guest(SPIN));
    let disk = files.put("disk.img", &[0; 512]);
    let held = fs::File::open(&disk).unwrap();
    held.lock().unwrap();
    let output = run(&["boot", "--kernel", &kernel, "--disk", &disk]);
    assert_eq!(output.status.code(), Some(BAD_INPUT));
    assert!(stderr(&output).contains("locked"), "{}", stderr(&output));
}

#[test]
fn a_guest_ends_with_the_documented_status() {
    let files = Files::new();
    let table: &[(&[u8], &[&str], i32, &str)] = &[
        (POWER_OFF, &[], 0, ""),
        (RESET, &[], 0, ""),
        (DEBUG_EXIT, &["--exit-port"], 0x21, ""),
        (TRIPLE_FAULT, &["--exit-port"], 4, "triple fault on vCPU 0"),
        (WILD_JUMP, &[], 6, "where there is no memory"),
    ];
    for (code, arguments, status, message) in table {
        let kernel = files.put("guest.bin", &guest(&[PRINT, code].concat()));
        let output = run(&[&["boot", "--kernel", &kernel], *arguments].concat());
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(*status), "{text}");
        assert_eq!(output.stdout, b"hi\n");
        assert!(text.contains(message), "{text}");
        assert_eq!(text.contains("rip 0"), !message.is_empty(), "{text}");
    }
    let kernel = files.put("guest.bin", &guest(&[DEBUG_EXIT, POWER_OFF].concat()));
    assert_eq!(
        run(&["boot", "--kernel", &kernel]).status.code(),
        Some(0),
        "the port is there only if asked for"
    );
}

#[test]
fn statistics_and_logs_go_to_stderr() {
    let files = Files::new();
    let kernel = files.put("guest.bin", &guest(&[PRINT, POWER_OFF].concat()));
    let output = ring3(&["boot", "--kernel", &kernel, "--stats"]).env("RING3_LOG", "info").output().unwrap();
    assert_eq!(output.stdout, b"hi\n");
    for words in ["instructions", "start-up", "exits", "the guest powered off"] {
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
}

#[test]
fn the_console_can_go_to_a_file() {
    let files = Files::new();
    let kernel = files.put("guest.bin", &guest(&[PRINT, POWER_OFF].concat()));
    let log = files.0.as_path().join("log");
    let target = format!("file:{}", log.display());
    let output = run(&["boot", "--kernel", &kernel, "--serial", &target]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 0));
    assert_eq!(fs::read(&log).unwrap(), b"hi\n");
    let output = run(&["boot", "--kernel", &kernel, "--serial", "none"]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 0));
}

/// Starts a guest that has printed "hi\n".
fn start(kernel: &str, arguments: &[&str]) -> Child {
    let mut command = ring3(&[&["boot", "--kernel", kernel], arguments].concat());
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut greeting = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"hi\n");
    child
}

/// Waits for the end, but not for ever.
fn status(mut child: Child) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    panic!("the machine does not end");
}

#[test]
fn signals_end_the_machine() {
    let files = Files::new();
    let kernel = files.put("guest.bin", &guest(&[PRINT, SPIN].concat()));
    for (signal, expected) in [(libc::SIGTERM, 143), (libc::SIGINT, 130)] {
        for cpus in ["1", "4"] {
            let child = start(&kernel, &["--cpus", cpus]);
            send_signal(&child, signal);
            assert_eq!(status(child), Some(expected), "{cpus} CPUs");
        }
    }
}

#[test]
fn a_reader_who_stops_does_not_keep_the_machine_alive() {
    let files = Files::new();
    let forever: &[u8] = &[0xb0, b'\n', 0xee, 0xeb, 0xfb]; // again: mov al, '\n'; out dx, al; jmp again
    let kernel = files.put("guest.bin", &guest(&[PRINT, forever].concat()));
    let child = start(&kernel, &[]);
    // Long enough to fill the pipe, which nobody reads any more.
    std::thread::sleep(Duration::from_millis(300));
    send_signal(&child, libc::SIGTERM);
    assert_eq!(status(child), Some(143));
}

/// Sends a signal by the `kill` program, which needs no unsafe code here.
fn send_signal(child: &Child, signal: i32) {
    let done = Command::new("kill").arg(format!("-{signal}")).arg(child.id().to_string()).status().unwrap();
    assert!(done.success());
}

#[test]
fn input_reaches_the_guest_and_the_escape_key_quits() {
    let files = Files::new();
    let kernel = files.put("guest.bin", &guest(&[PRINT, ECHO].concat()));
    let mut child = start(&kernel, &[]);
    let text: Vec<u8> = (0..300).map(|i| b'a' + (i % 26) as u8).chain(*b"\n").collect();
    child.stdin.as_mut().unwrap().write_all(&text).unwrap();
    let mut echo = vec![0; text.len()];
    child.stdout.as_mut().unwrap().read_exact(&mut echo).unwrap();
    assert_eq!(echo, text);
    child.stdin.as_mut().unwrap().write_all(b"\x01x").unwrap();
    assert_eq!(status(child), Some(0));
}

#[test]
fn closed_standard_streams_are_no_error() {
    let files = Files::new();
    let kernel = files.put("guest.bin", &guest(&[PRINT, POWER_OFF].concat()));
    let shell = |redirection: &str| {
        let line = format!("{} boot --kernel {kernel} {redirection}", env!("CARGO_BIN_EXE_ring3"));
        Command::new("sh").arg("-c").arg(line).stdout(Stdio::null()).status().unwrap().code()
    };
    for redirection in ["<&-", "</dev/null", ">&-", "<&- >&- 2>&-", &format!("<{kernel}")] {
        assert_eq!(shell(redirection), Some(0), "{redirection}");
    }
    assert!(Path::new(&kernel).exists());
}

#[test]
fn the_terminal_is_as_it_was() {
    let files = Files::new();
    let reading: &[u8] = &[
        0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, // wait for a byte on the serial port
    ];
    for (code, status) in [(POWER_OFF, 0), (TRIPLE_FAULT, 4)] {
        let kernel = files.put("guest.bin", &guest(&[PRINT, reading, code].concat()));
        let ring3 = env!("CARGO_BIN_EXE_ring3");
        // In raw mode the key reaches the guest without a line end.
        let line = format!("stty -g; {ring3} boot --kernel {kernel} 2>/dev/null; echo status $?; stty -g");
        let mut script = Command::new("script");
        let mut child = (script.args(["-qec", &line, "/dev/null"]))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut text = String::new();
        let mut chunk = [0; 256];
        let mut typed = false;
        loop {
            let count = stdout.read(&mut chunk).unwrap();
            if count == 0 {
                break;
            }
            text.push_str(&String::from_utf8_lossy(&chunk[..count]));
            if !typed && text.contains("hi") {
                child.stdin.as_mut().unwrap().write_all(b"k").unwrap();
                typed = true;
            }
        }
        child.wait().unwrap();
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert_eq!((lines[0], lines[2]), (lines[3], format!("status {status}").as_str()), "{text}");
    }
}
