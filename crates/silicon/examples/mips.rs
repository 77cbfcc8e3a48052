//! How fast the interpreter is on a few small loops, in millions of guest instructions per second of CPU time:
//! `cargo run --release -p silicon --example mips [NAME] [ROUNDS]`. With the name `lock-detection`: what it costs locked
//! accesses that are not split that the detection of split locks and bus locks is on.
#![expect(
    unsafe_code,
    reason = "guest memory is written through its host pointer, the CPU clock read from libc"
)]

use std::sync::Arc;
use std::time::Duration;

use silicon::Cpu;
use silicon::bus_lock::{debugctl, test_ctrl};
use silicon::mmu::ept::{Ept, Region};
use silicon::model::Features;
use silicon::state::{CodeSize, Segment, cr0, cr4, efer, reg};
use silicon::vmx::Exit;

/// Where the code is.
const CODE: u64 = 0x10_0000;
/// Where its data are.
const DATA: u64 = 0x20_0000;
/// Page tables: PML4, PDPT, PD.
const TABLES: u64 = 0x1000;
/// Guest memory in bytes.
const MEMORY: usize = 16 << 20;

/// A loop that leaves by `out 0xf4, al`; ECX holds the number of rounds.
struct Program {
    name: &'static str,
    rounds: u64,
    code: &'static [u8],
}

const PROGRAMS: &[Program] = &[
    Program {
        name: "arithmetic",
        rounds: 20_000_000,
        // add rax, rcx; lea rdx, [rax+rcx*2+5]; xor rbx, rdx; shl rdx, 3; sub rax, rdx; or rdi, rax; dec; jnz
        code: &[
            0x48, 0x01, 0xc8, 0x48, 0x8d, 0x54, 0x48, 0x05, 0x48, 0x31, 0xd3, 0x48, 0xc1, 0xe2, 0x03, 0x48,
            0x29, 0xd0, 0x48, 0x09, 0xc7, 0xff, 0xc9, 0x75, 0xe7, 0xe6, 0xf4,
        ],
    },
    Program {
        name: "memory",
        rounds: 20_000_000,
        // mov edx, ecx; and edx, 0xfff; add rax, [rsi+rdx*8]; mov [rdi+rdx*8], rax; add [rsi], ecx; dec; jnz
        code: &[
            0x89, 0xca, 0x81, 0xe2, 0xff, 0x0f, 0, 0, 0x48, 0x03, 0x04, 0xd6, 0x48, 0x89, 0x04, 0xd7, 0x01,
            0x0e, 0xff, 0xc9, 0x75, 0xea, 0xe6, 0xf4,
        ],
    },
    Program {
        name: "calls",
        rounds: 15_000_000,
        // 1: call f; dec ecx; jnz 1b; out; f: push rbp; mov rbp, rsp; add rax, 1; pop rbp; ret
        code: &[
            0xe8, 0x06, 0, 0, 0, 0xff, 0xc9, 0x75, 0xf7, 0xe6, 0xf4, 0x55, 0x48, 0x89, 0xe5, 0x48, 0x83,
            0xc0, 0x01, 0x5d, 0xc3,
        ],
    },
    Program {
        name: "branches",
        rounds: 15_000_000,
        // imul eax, eax, 1103515245; add eax, 12345; test eax, 1 << 16; jz +3; inc rbx; test eax, 1 << 17;
        // jz +3; dec rbx; dec ecx; jnz
        code: &[
            0x69, 0xc0, 0x6d, 0x4e, 0xc6, 0x41, 0x05, 0x39, 0x30, 0, 0, 0xa9, 0, 0, 1, 0, 0x74, 0x03, 0x48,
            0xff, 0xc3, 0xa9, 0, 0, 2, 0, 0x74, 0x03, 0x48, 0xff, 0xcb, 0xff, 0xc9, 0x75, 0xdd, 0xe6, 0xf4,
        ],
    },
    Program {
        name: "bytes",
        rounds: 20_000_000,
        // movzx edx, cl; mov al, [rsi+rdx]; xor al, dl; mov [rdi+rdx], al; cmp al, 7; sete bl; dec; jnz
        code: &[
            0x0f, 0xb6, 0xd1, 0x8a, 0x04, 0x16, 0x30, 0xd0, 0x88, 0x04, 0x17, 0x3c, 0x07, 0x0f, 0x94, 0xc3,
            0xff, 0xc9, 0x75, 0xec, 0xe6, 0xf4,
        ],
    },
    Program {
        name: "rep-movs-64k",
        rounds: 20_000,
        // mov r8d, ecx; mov r9, rsi; mov r10, rdi; mov ecx, 65536; rep movsb; mov rsi, r9; mov rdi, r10;
        // mov ecx, r8d; dec ecx; jnz
        code: &[
            0x41, 0x89, 0xc8, 0x49, 0x89, 0xf1, 0x49, 0x89, 0xfa, 0xb9, 0, 0, 1, 0, 0xf3, 0xa4, 0x4c, 0x89,
            0xce, 0x4c, 0x89, 0xd7, 0x44, 0x89, 0xc1, 0xff, 0xc9, 0x75, 0xe3, 0xe6, 0xf4,
        ],
    },
    LOCKED,
];

/// Uncontended locked accesses within a line.
const LOCKED: Program = Program {
    name: "locked",
    rounds: 5_000_000,
    // lock inc dword [rsi]; lock xadd [rsi+8], rax; xchg [rdi], rdx; lock cmpxchg [rdi+8], rdx; dec; jnz
    code: &[
        0xf0, 0xff, 0x06, 0xf0, 0x48, 0x0f, 0xc1, 0x46, 0x08, 0x48, 0x87, 0x17, 0xf0, 0x48, 0x0f, 0xb1, 0x57,
        0x08, 0xff, 0xc9, 0x75, 0xea, 0xe6, 0xf4,
    ],
};

/// Pairs of runs that `lock-detection` makes.
const PAIRS: usize = 100;

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

/// Copies `bytes` into guest memory.
fn put(memory: &mut [Page], gpa: u64, bytes: &[u8]) {
    assert!(gpa as usize + bytes.len() <= memory.len() * 4096);
    let base = memory.as_mut_ptr().cast::<u8>();
    // SAFETY: within the slice, as asserted.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), base.add(gpa as usize), bytes.len()) };
}

/// A CPU in 64-bit mode with the first GiB identity-mapped by large pages.
fn cpu(memory: &mut [Page]) -> Cpu {
    put(memory, TABLES, &(TABLES + 0x1003).to_le_bytes());
    put(memory, TABLES + 0x1000, &(TABLES + 0x2003).to_le_bytes());
    for page in 0..512u64 {
        put(memory, TABLES + 0x2000 + page * 8, &((page << 21) | 0x83).to_le_bytes());
    }
    let ept = Arc::new(Ept::new());
    let host = memory.as_ptr() as u64;
    ept.set_regions(vec![Region { gpa: 0, size: MEMORY as u64, host, readonly: false }]);
    let mut cpu = Cpu::new(Features::default(), ept);
    let segment = |selector, attributes| Segment { base: 0, limit: !0, attributes, selector };
    cpu.state.segs = [segment(16, 0xc093); 6];
    cpu.state.segs[1] = segment(8, 0xa09b);
    cpu.state.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET;
    cpu.state.cr3 = TABLES;
    cpu.state.cr4 = cr4::PAE;
    cpu.state.efer = efer::LME | efer::LMA;
    cpu.refresh_mode();
    assert_eq!(cpu.state.code_size, CodeSize::Bits64);
    cpu
}

/// CPU time of this thread.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills in the structure that it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Runs `program` on a CPU that `prepare` has had; instructions, and seconds of CPU time.
fn measure(program: &Program, rounds: Option<u64>, prepare: impl Fn(&mut Cpu)) -> (u64, f64) {
    let mut memory = vec![Page([0; 4096]); MEMORY / 4096];
    let mut cpu = cpu(&mut memory);
    put(&mut memory, CODE, program.code);
    cpu.state.rip = CODE;
    cpu.state.regs[usize::from(reg::RCX)] = rounds.unwrap_or(program.rounds);
    cpu.state.regs[usize::from(reg::RSP)] = DATA;
    cpu.state.regs[usize::from(reg::RSI)] = DATA;
    cpu.state.regs[usize::from(reg::RDI)] = DATA + 0x10_0000;
    prepare(&mut cpu);
    let begin = cpu_time();
    let exit = cpu.run();
    let seconds = (cpu_time() - begin).as_secs_f64();
    assert!(matches!(exit, Exit::Io(_)), "{}: {exit:?} at {:#x}", program.name, cpu.state.rip);
    (cpu.instructions(), seconds)
}

/// Everything that looks for split locks and bus locks is on.
fn detect(cpu: &mut Cpu) {
    cpu.test_ctrl.set(test_ctrl::SPLIT_LOCK_DETECT | test_ctrl::UC_LOCK_DISABLE);
    cpu.state.debugctl = debugctl::BUS_LOCK_DETECT;
    cpu.controls.bus_lock_detection = true;
}

/// The same loop with and without detection, in turn and in changing order. The least time of each is compared: other
/// load on the machine only ever adds to it.
fn lock_detection(rounds: Option<u64>) {
    let rounds = Some(rounds.unwrap_or(LOCKED.rounds / 20));
    let (mut off, mut on) = (f64::MAX, f64::MAX);
    for n in 0..2 * PAIRS {
        if (n / 2 + n) % 2 == 0 {
            off = off.min(measure(&LOCKED, rounds, |_| ()).1);
        } else {
            on = on.min(measure(&LOCKED, rounds, detect).1);
        }
    }
    let percent = (on / off - 1.0) * 100.0;
    println!("locked accesses: {off:.5} s with detection off, {on:.5} s with it on: {percent:+.2} %");
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let wanted = arguments.next();
    let rounds: Option<u64> = arguments.next().and_then(|text| text.parse().ok());
    if wanted.as_deref() == Some("lock-detection") {
        return lock_detection(rounds);
    }
    for program in PROGRAMS {
        if wanted.as_ref().is_some_and(|name| name != program.name) {
            continue;
        }
        let (instructions, seconds) = measure(program, rounds, |_| ());
        println!("{:14} {:8.1} MIPS  {:.3} s", program.name, instructions as f64 / seconds / 1e6, seconds);
    }
}
