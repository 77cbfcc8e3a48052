//! A KVM client with two VMs: the guest of one makes split locks as fast as it can, that of the other copies memory. Run by
//! `cargo xtask bench split-locks` under `ring3 run`, once for each mode of the host.
//!
//! Prints how fast the neighbour was next to the other one, relative to alone, and how many split locks a second were made.
#![expect(unsafe_code, reason = "guest memory is given to KVM by address")]

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::signal::register_signal_handler;

const MEMORY: usize = 0x1_0000;
/// Where guest code begins.
const CODE: usize = 0x1000;
/// The doubleword that is incremented, across two cache lines.
const WORD: usize = 0x203e;
/// Seconds that each phase takes, and phases of each kind, one after the other.
const PHASE: Duration = Duration::from_secs(2);
const PHASES: u32 = 5;

/// LOCK INC DWORD [0x203e] for ever.
const SPLIT_LOOP: &[u8] = &[0xf0, 0x66, 0xff, 0x06, 0x3e, 0x20, 0xeb, 0xf8];
/// 64 times 8 KiB from 0x4000 to 0xa000 by REP MOVSW; OUT 0x10, AL; for ever.
const COPY_LOOP: &[u8] = &[
    0xbd, 0x40, 0x00, // MOV BP, 64
    0xbe, 0x00, 0x40, 0xbf, 0x00, 0xa0, 0xb9, 0x00, 0x10, 0xf3, 0xa5, // SI, DI, CX; REP MOVSW
    0x4d, 0x75, 0xf2, // DEC BP; JNZ
    0xe6, 0x10, 0xeb, 0xeb, // OUT; JMP
];

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// A VM that runs `code` in real mode, and its memory.
fn machine(kvm: &Kvm, code: &[u8]) -> Outcome<(VmFd, VcpuFd, *const u8)> {
    let vm = kvm.create_vm()?;
    let layout = std::alloc::Layout::from_size_align(MEMORY, 4096)?;
    // SAFETY: a fresh allocation of zero bytes that is never freed.
    let bytes = unsafe {
        let at = std::alloc::alloc_zeroed(layout);
        assert!(!at.is_null(), "no memory");
        std::slice::from_raw_parts_mut(at, MEMORY)
    };
    bytes[CODE..CODE + code.len()].copy_from_slice(code);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: bytes.as_ptr() as u64,
    };
    // SAFETY: the memory is never freed.
    unsafe { vm.set_user_memory_region(region)? };
    let vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        (segment.base, segment.selector) = (0, 0);
    }
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rsp, regs.rflags) = (CODE as u64, 0x8000, 2);
    vcpu.set_regs(&regs)?;
    Ok((vm, vcpu, bytes.as_ptr()))
}

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Rounds of the neighbour in one phase.
fn copy(vcpu: &mut VcpuFd) -> Outcome<u64> {
    let (begun, mut rounds) = (Instant::now(), 0);
    while begun.elapsed() < PHASE {
        vcpu.run()?;
        rounds += 1;
    }
    Ok(rounds)
}

/// The split locks that a guest makes while `meanwhile` runs, with its result.
fn hammer<T>(kvm: &Kvm, meanwhile: impl FnOnce() -> Outcome<T>) -> Outcome<(T, u32)> {
    let (_vm, mut vcpu, memory) = machine(kvm, SPLIT_LOOP)?;
    let (over, thread) = (&AtomicBool::new(false), &AtomicU64::new(0));
    let result = std::thread::scope(|scope| {
        // Whoever is refused ends; whoever is interrupted asks whether it is over.
        let splitter = scope.spawn(move || {
            // SAFETY: no arguments.
            thread.store(unsafe { libc::pthread_self() }, Ordering::SeqCst);
            while !over.load(Ordering::SeqCst) {
                match vcpu.run() {
                    Err(error) if error.errno() != libc::EINTR => break,
                    _ => {}
                }
            }
        });
        let result = meanwhile();
        over.store(true, Ordering::SeqCst);
        while !splitter.is_finished() {
            let id = thread.load(Ordering::SeqCst);
            if id != 0 {
                // SAFETY: the thread has not been joined.
                unsafe { libc::pthread_kill(id, libc::SIGUSR1) };
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        result
    })?;
    // SAFETY: memory of ours, of a VM that nobody runs.
    let made = unsafe { memory.add(WORD).cast::<u32>().read_unaligned() };
    Ok((result, made))
}

fn main() -> Outcome<()> {
    register_signal_handler(libc::SIGUSR1, ignore)?;
    let kvm = Kvm::new()?;
    let (_vm, mut vcpu, _) = machine(&kvm, COPY_LOOP)?;
    copy(&mut vcpu)?;
    let (mut alone, mut together, mut locks) = (0, 0, 0);
    for _ in 0..PHASES {
        alone += copy(&mut vcpu)?;
        let (rounds, made) = hammer(&kvm, || copy(&mut vcpu))?;
        together += rounds;
        locks += u64::from(made);
    }
    let seconds = PHASE.as_secs_f64() * f64::from(PHASES);
    println!("{:.3} {:.0}", together as f64 / alone as f64, locks as f64 / seconds);
    Ok(())
}
