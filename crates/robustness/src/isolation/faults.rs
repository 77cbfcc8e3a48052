//! Faults in host code. Those that the translator has made provision for are taken for the guest's ([`host::recover`]); here they are
//! looked at more closely, for an address outside guest memory is what an access that escapes most probably has.
#![expect(unsafe_code, reason = "handles signals, and reads what the kernel says of them")]

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use hypervisor::VcpuHandle;
use iced_x86::{Decoder, DecoderOptions, OpKind, Register};
use libc::{c_int, c_void, siginfo_t, ucontext_t};
use silicon::mmu::host;

use super::mappings::Span;
use super::own::{Buffer, Own};

/// A signal that came while host code ran.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    signal: c_int,
    code: c_int,
    address: u64,
    rip: u64,
    /// By the numbers that instructions have for them.
    registers: [u64; 16],
}

/// Faults of one stay.
#[derive(Debug)]
pub(super) struct Faults {
    seen: Buffer<Fault>,
    listening: bool,
    /// Of all stays.
    pub(super) count: u64,
}

/// More than that is not remembered of one stay.
const MOST: usize = 64;
/// `si_code` of a #GP.
const GENERAL_PROTECTION: c_int = 0x80;
/// The general registers in the order of their numbers.
const ORDER: [c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Who wants to know.
static LISTENER: AtomicPtr<Faults> = AtomicPtr::new(ptr::null_mut());
/// The vCPU that the alarm interrupts.
static ALARMED: AtomicPtr<VcpuHandle> = AtomicPtr::new(ptr::null_mut());

impl Faults {
    pub(super) fn new(own: &mut Own) -> Faults {
        Faults { seen: Buffer::new(own, MOST), listening: false, count: 0 }
    }

    /// Host code is about to run.
    pub(super) fn listen(&mut self) {
        self.seen.clear();
        self.listening = true;
    }

    /// Host code has left. What it should not have touched, if all that it may touch is `guest`.
    pub(super) fn strays(&mut self, guest: &[Span]) -> Option<(Fault, u64)> {
        self.listening = false;
        self.count += self.seen.len() as u64;
        self.seen.iter().find_map(|fault| fault.stray(guest).map(|address| (*fault, address)))
    }

    fn hear(&mut self, fault: Fault) {
        if self.listening && self.seen.len() < MOST {
            self.seen.push(fault);
        }
    }
}

impl Fault {
    /// The host address that it tells of an access to, if there is no reason for that access.
    fn stray(&self, guest: &[Span]) -> Option<u64> {
        let in_guest = |at: u64| guest.iter().any(|span| span.contains(at));
        if self.code != GENERAL_PROTECTION {
            // Loops end by a load from address 0 (`silicon::cpu::Requests`).
            return (self.address != 0 && !in_guest(self.address)).then_some(self.address);
        }
        // A vector that is not aligned; or an address that is not canonical.
        let (address, size) = self.operand().unwrap_or((self.rip, 0));
        let aligned = size != 0 && address.is_multiple_of(size);
        (aligned || !in_guest(address) || !in_guest(address.wrapping_add(size).wrapping_sub(1)))
            .then_some(address)
    }

    /// Address and size of the memory operand of the instruction.
    fn operand(&self) -> Option<(u64, u64)> {
        // SAFETY: an instruction of host code, which lies in an arena; what comes behind it, too.
        let bytes = unsafe { std::slice::from_raw_parts(self.rip as *const u8, 15) };
        let ins = Decoder::with_ip(64, bytes, self.rip, DecoderOptions::NONE).decode();
        let operand = (0..ins.op_count()).find(|&i| ins.op_kind(i) == OpKind::Memory)?;
        let address = ins.virtual_address(operand, 0, |register, _, _| match register {
            Register::ES | Register::CS | Register::SS | Register::DS => Some(0),
            other if other.is_gpr64() => Some(self.registers[other.number()]),
            _ => None,
        });
        Some((address?, ins.memory_size().size() as u64))
    }

    /// For messages.
    pub(super) fn describe(&self) -> String {
        let Fault { signal, code, address, rip, .. } = self;
        format!("signal {signal}, code {code}, address {address:#x}, at {rip:#x}: {:x?}", self.registers)
    }
}

/// From now on faults are told to `faults`.
///
/// # Safety
///
/// It is never freed, and the running thread alone uses it.
pub(super) unsafe fn tell(faults: *mut Faults) {
    LISTENER.store(faults, Ordering::SeqCst);
    handle(libc::SIGSEGV, on_fault as *const () as usize);
    handle(libc::SIGBUS, on_fault as *const () as usize);
    host::announce_recovery();
    handle(libc::SIGALRM, on_alarm as *const () as usize);
}

/// Signals are handled on this stack.
///
/// # Safety
///
/// Nobody else uses it.
pub(super) unsafe fn set_signal_stack(start: *mut u8, size: usize) {
    let stack = libc::stack_t { ss_sp: start.cast(), ss_flags: 0, ss_size: size };
    // SAFETY: the caller's promise.
    unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) };
}

fn handle(signal: c_int, handler: usize) {
    // SAFETY: all bytes zero is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the structure is ours, and the handlers do nothing that handlers must not.
    unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
}

extern "C" fn on_fault(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel's own structures; nobody else has references to them.
    let (about, registers) = unsafe { (&*info, &(*context.cast::<ucontext_t>()).uc_mcontext.gregs) };
    // SAFETY: a signal of an access has an address, or zero there.
    let address = unsafe { about.si_addr() } as u64;
    let rip = registers[libc::REG_RIP as usize] as u64;
    let registers = ORDER.map(|number| registers[number as usize] as u64);
    let fault = Fault { signal, code: about.si_code, address, rip, registers };
    // SAFETY: whoever called `tell` has promised so, and does not run while this does.
    if let Some(faults) = unsafe { LISTENER.load(Ordering::SeqCst).as_mut() } {
        faults.hear(fault);
    }
    // SAFETY: the kernel's arguments.
    if !unsafe { host::recover(signal, info, context) } {
        // The instruction faults again, and the process ends.
        // SAFETY: the default action.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

extern "C" fn on_alarm(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: `alarm_for` has got a handle that lives until it is called again.
    if let Some(handle) = unsafe { ALARMED.load(Ordering::SeqCst).as_ref() } {
        handle.interrupt();
    }
}

/// The alarm interrupts this vCPU, or nobody.
///
/// # Safety
///
/// The handle lives until the next call.
pub(super) unsafe fn alarm_for(handle: Option<&VcpuHandle>) {
    set_alarm(0);
    ALARMED
        .store(handle.map_or(ptr::null_mut(), |handle| ptr::from_ref(handle).cast_mut()), Ordering::SeqCst);
}

/// There is an alarm in so many microseconds, or none for 0.
pub(super) fn set_alarm(microseconds: i64) {
    let once = libc::timeval { tv_sec: 0, tv_usec: microseconds };
    let timer = libc::itimerval { it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 }, it_value: once };
    // SAFETY: the structure is ours.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_outside_guest_memory_are_strays() {
        let guest = [Span { start: 0x10_0000, end: 0x20_0000 }];
        // movaps xmm0, [r15]
        let code: [u8; 15] =
            [0x41, 0x0f, 0x28, 0x07, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90];
        let fault = |code_of_signal, address, r15| {
            let mut registers = [0; 16];
            registers[15] = r15;
            let rip = code.as_ptr() as u64;
            Fault { signal: libc::SIGSEGV, code: code_of_signal, address, rip, registers }
        };
        for (code_of_signal, address, r15, stray) in [
            (1, 0, 0, None),
            (1, 0x10_0008, 0, None),
            (2, 0x20_0000, 0, Some(0x20_0000)),
            (GENERAL_PROTECTION, 0, 0x10_0008, None),
            (GENERAL_PROTECTION, 0, 0x10_0010, Some(0x10_0010)),
            (GENERAL_PROTECTION, 0, 0x1f_fff8, Some(0x1f_fff8)),
            (GENERAL_PROTECTION, 0, 1 << 47, Some(1 << 47)),
        ] {
            assert_eq!(fault(code_of_signal, address, r15).stray(&guest), stray, "{address:#x} {r15:#x}");
        }
    }
}
