//! Code that the host's kernel writes into guest memory behind our back: a client's preadv(2) over pages that hold code which
//! has been executed before.
#![allow(unsafe_code, reason = "preadv, and memory that a running guest shares")]

mod guest;

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, Ordering};

use guest::{Guest, system};
use hypervisor::VcpuExit;
use vmm_sys_util::tempfile::TempFile;

/// Where the code that is written lies.
const HOT: u64 = 0x3000;
/// How often it is.
const TIMES: u32 = 1000;

/// Calls [`HOT`] a hundred times, says on port 0x10 what it leaves in AL, and begins again.
const CALLS: &[u8] = &[
    0xb9, 0x64, 0x00, // mov cx, 100
    0xe8, 0xfa, 0x1f, // 1: call HOT
    0xe2, 0xfb, // loop 1b
    0xe6, 0x10, // out 0x10, al
    0xeb, 0xf4, // jmp to the start
];

/// Waits for a new number at [`ASKED`], serializes, calls [`HOT`], puts AL to [`RESULT`] and the number to [`ANSWERED`].
const POLLS: &[u8] = &[
    0xa0, 0x00, 0x40, // 1: mov al, [ASKED]
    0x3a, 0x06, 0x02, 0x40, // cmp al, [ANSWERED]
    0x74, 0xf7, // je 1b
    0x66, 0x31, 0xc0, // xor eax, eax
    0x0f, 0xa2, // cpuid
    0xe8, 0xef, 0x1f, // call HOT
    0xa2, 0x01, 0x40, // mov [RESULT], al
    0xa0, 0x00, 0x40, // mov al, [ASKED]
    0xa2, 0x02, 0x40, // mov [ANSWERED], al
    0xeb, 0xe4, // jmp 1b
];
const ASKED: u64 = 0x4000;
const RESULT: u64 = 0x4001;
const ANSWERED: u64 = 0x4002;

/// Has the kernel read `mov al, value; ret` from a file to `host`.
fn load(file: &TempFile, host: u64, value: u8) {
    let code = [0xb0, value, 0xc3];
    file.as_file().write_all_at(&code, 0).unwrap();
    let vector = libc::iovec { iov_base: host as *mut libc::c_void, iov_len: code.len() };
    // SAFETY: the address is one of the guest's memory, which outlives the call.
    let read = unsafe { libc::preadv(file.as_file().as_raw_fd(), &raw const vector, 1, 0) };
    assert_eq!(read, 3);
}

#[test]
fn new_code_by_preadv_over_hot_code_a_thousand_times() {
    let guest = Guest::new(system().create_vm().unwrap(), CALLS, 0);
    let (mut vcpu, file) = (guest.vcpu(0), TempFile::new().unwrap());
    let mut regs = vcpu.regs();
    regs.rsp = 0x8000;
    vcpu.set_regs(&regs);
    for number in 0..TIMES {
        load(&file, guest.host(HOT), number as u8);
        let said = VcpuExit::Io { port: 0x10, size: 1, write: Some(u32::from(number as u8)) };
        assert_eq!(vcpu.run().unwrap(), said, "after {number} times");
    }
}

#[test]
fn a_running_guest_that_serializes_sees_code_by_preadv() {
    let guest = Guest::new(system().create_vm().unwrap(), POLLS, 0);
    let (mut vcpu, file) = (guest.vcpu(0), TempFile::new().unwrap());
    let mut regs = vcpu.regs();
    regs.rsp = 0x8000;
    vcpu.set_regs(&regs);
    let handle = vcpu.handle();
    // SAFETY: bytes of the guest's memory, which outlives the scope; the guest's stores are of single bytes.
    let byte = |gpa| unsafe { AtomicU8::from_ptr(guest.host(gpa) as *mut u8) };
    std::thread::scope(|scope| {
        let running = scope.spawn(move || vcpu.run().unwrap_err().errno());
        for number in 0..TIMES {
            let (value, number) = ((number * 7) as u8, (number % 255) as u8 + 1);
            load(&file, guest.host(HOT), value);
            byte(ASKED).store(number, Ordering::SeqCst);
            while byte(ANSWERED).load(Ordering::SeqCst) != number {
                std::thread::yield_now();
            }
            assert_eq!(byte(RESULT).load(Ordering::SeqCst), value);
        }
        handle.interrupt();
        assert_eq!(running.join().unwrap(), libc::EINTR);
    });
}
