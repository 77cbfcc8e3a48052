//! syscall(2), for clients that go around the C library's functions but not around the C library.
#![expect(unsafe_code, reason = "a function that takes its arguments as the C library's does")]

use std::arch::naked_asm;

use abi::Argument;
use abi::xcomp;
use libc::{c_int, c_long, sigaction as SigAction};

use crate::open::answered;
use crate::raw::{self, SIGNAL_SET_SIZE, SignalSet};
use crate::{descriptor, interpose, ioctl, open, process, signal, stat, thread};

/// Words of the bitmap: system calls up to 511.
const WORDS: usize = 16;

/// The calls that we want to see; all others go straight to the kernel.
static WANTED: [u32; WORDS] = {
    let numbers = [
        libc::SYS_open,
        libc::SYS_close,
        libc::SYS_stat,
        libc::SYS_fstat,
        libc::SYS_lstat,
        libc::SYS_rt_sigaction,
        libc::SYS_ioctl,
        libc::SYS_access,
        libc::SYS_dup,
        libc::SYS_dup2,
        libc::SYS_sendmsg,
        libc::SYS_fcntl,
        libc::SYS_arch_prctl,
        libc::SYS_openat,
        libc::SYS_newfstatat,
        libc::SYS_faccessat,
        libc::SYS_dup3,
        libc::SYS_statx,
        libc::SYS_close_range,
        libc::SYS_openat2,
        libc::SYS_faccessat2,
    ];
    let mut words = [0; WORDS];
    let mut i = 0;
    while i < numbers.len() {
        let number = numbers[i] as usize;
        words[number / 32] |= 1 << (number % 32);
        i += 1;
    }
    words
};

/// The kernel's `struct sigaction`.
#[repr(C)]
struct KernelAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: SignalSet,
}

/// SA_RESTORER.
const SA_RESTORER: u64 = 0x0400_0000;

/// A system call with six arguments, as the C library makes it: -1 and `errno`, or the result. Calls that may come back
/// twice or on another stack (clone, vfork) work, for nothing is kept on the stack.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
#[cfg_attr(test, allow(dead_code, reason = "the C library's callers come here, tests do not"))]
unsafe extern "C-unwind" fn syscall(_number: c_long) -> c_long {
    naked_asm!(
        "cmp rdi, {numbers}",
        "jae 2f",
        "lea r11, [rip + {wanted}]",
        "bt dword ptr [r11], edi",
        "jc {handled}",
        "2:",
        "mov rax, rdi",
        "mov rdi, rsi",
        "mov rsi, rdx",
        "mov rdx, rcx",
        "mov r10, r8",
        "mov r8, r9",
        "mov r9, [rsp + 8]",
        "syscall",
        "cmp rax, -4095",
        "jae 3f",
        "ret",
        "3:",
        "mov rdi, rax",
        "jmp {failed}",
        numbers = const WORDS * 32,
        wanted = sym WANTED,
        handled = sym handled,
        failed = sym failed,
    )
}

unsafe extern "C-unwind" fn failed(result: c_long) -> c_long {
    raw::set_errno(-result as c_int);
    -1
}

/// One of [`WANTED`].
///
/// # Safety
///
/// The arguments are those of the call; there are as many as it has, the others are anything.
unsafe extern "C-unwind" fn handled(
    number: c_long,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    _: usize,
) -> c_long {
    let (a_fd, b_fd) = (a as c_int, b as c_int);
    // SAFETY: the client's arguments, of the types that the call has.
    let result = unsafe {
        match number {
            libc::SYS_open => open::open(a as _, b as _, c as _),
            libc::SYS_openat => open::openat(a_fd, b as _, c as _, d as _),
            libc::SYS_openat2 => return open::openat2(a_fd, b as _, c, d),
            libc::SYS_close => descriptor::close(a_fd),
            libc::SYS_close_range => descriptor::close_range(a as _, b as _, c as _),
            libc::SYS_dup => descriptor::dup(a_fd),
            libc::SYS_dup2 => descriptor::dup2(a_fd, b_fd),
            libc::SYS_dup3 => descriptor::dup3(a_fd, b_fd, c as _),
            libc::SYS_fcntl => descriptor::fcntl(a_fd, b as _, c as _),
            libc::SYS_sendmsg => return descriptor::sendmsg(a_fd, b as _, c as _) as c_long,
            libc::SYS_ioctl => ioctl::ioctl(a_fd, b as _, c as _),
            libc::SYS_stat => stat::stat(a as _, b as _),
            libc::SYS_lstat => stat::lstat(a as _, b as _),
            libc::SYS_fstat => stat::fstat(a_fd, b as _),
            libc::SYS_newfstatat => stat::fstatat(a_fd, b as _, c as _, d as _),
            libc::SYS_statx => stat::statx(a_fd, b as _, c as _, d as _, e as _),
            libc::SYS_access => stat::access(a as _, b as _),
            libc::SYS_faccessat => stat::faccessat(a_fd, b as _, c as _, 0),
            libc::SYS_faccessat2 => stat::faccessat(a_fd, b as _, c as _, d as _),
            libc::SYS_arch_prctl => return make_arch_prctl(a, b),
            _ => return rt_sigaction(a_fd, b as _, c as _, d),
        }
    };
    result.into()
}

fn make_arch_prctl(code: usize, argument: usize) -> c_long {
    let ours = || {
        let system = process::system().ok()?;
        xcomp::arch_prctl(&system, code as u64, Argument(argument as u64))
    };
    // The codes in question are 0x1021 to 0x1025; others, such as those for FS, are made without a detour.
    if code >> 4 == 0x102
        && !thread::is_inside()
        && let Some(result) = answered(ours)
    {
        return result.into();
    }
    // SAFETY: the client's arguments.
    finish(unsafe { raw::syscall(libc::SYS_arch_prctl, [code, argument, 0, 0]) })
}

/// The result of a system call, as the C library gives it.
pub(crate) fn finish(result: isize) -> c_long {
    if result < 0 {
        raw::set_errno(-result as c_int);
        return -1;
    }
    result as c_long
}

/// # Safety
///
/// The arguments of rt_sigaction(2).
unsafe fn rt_sigaction(
    number: c_int,
    new: *const KernelAction,
    old: *mut KernelAction,
    size: usize,
) -> c_long {
    // The C library keeps two signals for itself and has its own ways to reach the kernel for them.
    if size != SIGNAL_SET_SIZE || matches!(number, 32 | 33) || thread::is_inside() {
        let arguments = [number as usize, new as usize, old as usize, size];
        // SAFETY: the client's arguments.
        return finish(unsafe { raw::syscall(libc::SYS_rt_sigaction, arguments) });
    }
    // SAFETY: null or the client's structures.
    let (new, old) = unsafe { (new.as_ref().map(KernelAction::to_library), old.as_mut()) };
    let mut before = KernelAction { handler: 0, flags: 0, restorer: 0, mask: 0 }.to_library();
    let result = signal::change(number, new, Some(&mut before));
    if let Some(old) = old.filter(|_| result == 0) {
        *old = KernelAction::from_library(&before);
    }
    result.into()
}

impl KernelAction {
    fn to_library(&self) -> SigAction {
        // SAFETY: all bytes zero is a valid value.
        let mut action: SigAction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = self.handler;
        // The way back from the handler is the C library's own.
        action.sa_flags = (self.flags & !SA_RESTORER) as c_int;
        // SAFETY: the library's set begins with the kernel's.
        unsafe { (&raw mut action.sa_mask).cast::<SignalSet>().write(self.mask) };
        action
    }

    fn from_library(action: &SigAction) -> KernelAction {
        // SAFETY: the library's set begins with the kernel's.
        let mask = unsafe { (&raw const action.sa_mask).cast::<SignalSet>().read() };
        let restorer = action.sa_restorer.map_or(0, |function| function as usize);
        KernelAction { handler: action.sa_sigaction, flags: action.sa_flags as u32 as u64, restorer, mask }
    }
}

interpose! {
    // glibc has it, though no header declares it.
    fn arch_prctl(code: c_int, argument: usize) -> c_int {
        make_arch_prctl(code as usize, argument) as c_int
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_survive_the_conversion() {
        let action = KernelAction { handler: 0x1234, flags: 0x1800_0004, restorer: 0, mask: 1 << 63 | 5 };
        let back = KernelAction::from_library(&action.to_library());
        assert_eq!((back.handler, back.flags, back.mask), (action.handler, action.flags, action.mask));
    }
}
