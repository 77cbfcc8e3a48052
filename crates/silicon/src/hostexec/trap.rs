//! Unmasked SIMD floating-point exceptions.
//!
//! Which exception flags an operation sets depends on which exceptions are unmasked (SDM vol. 1, 11.5): an
//! unmasked pre-computation exception keeps the post-computation ones from being looked for, and unmasked
//! underflow is tininess alone. The host knows; so while the guest has exceptions unmasked, floating-point
//! instructions run with the guest's own MXCSR. Where the host then traps, SIGFPE's handler returns from the
//! stub with 1 before the stub has stored anything.
#![expect(unsafe_code, reason = "a signal handler that ends a stub")]

use std::cell::Cell;
use std::sync::Once;

use super::{MXCSR_MASKS, ldmxcsr, stmxcsr};
use crate::code::op::Op;
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::state::cr4;

thread_local! {
    /// A stub is running that may trap.
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

static INSTALL: Once = Once::new();

impl Cpu {
    /// As [`Cpu::call_stub`], with the guest's exceptions unmasked: #XM, or #UD if the guest has not enabled it.
    ///
    /// # Safety
    ///
    /// As for [`Cpu::call_stub`].
    #[cold]
    #[inline(never)]
    pub(crate) unsafe fn call_stub_unmasked(&mut self, op: &Op, mem: *mut u8) -> Result<(), Abort> {
        INSTALL.call_once(install);
        let controls = self.mxcsr();
        EXPECTED.set(true);
        ldmxcsr(controls);
        // SAFETY: the caller's promise. A trap ends the stub early, which leaves registers and memory as they were.
        let trapped = unsafe { self.call_stub(op, mem) } != 0;
        let after = stmxcsr();
        EXPECTED.set(false);
        ldmxcsr(after | MXCSR_MASKS);
        self.state.mxcsr = after;
        if !trapped {
            return Ok(());
        }
        let enabled = self.state.cr4 & cr4::OSXMMEXCPT != 0;
        Err(self.raise(if enabled { Exception::XM } else { Exception::UD }))
    }
}

fn install() {
    // SAFETY: an all-zero sigaction is a valid value; `handler` has the signature that SA_SIGINFO asks for.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        if libc::sigaction(libc::SIGFPE, &raw const action, std::ptr::null_mut()) != 0 {
            tracing::error!("no SIGFPE handler: {}", std::io::Error::last_os_error());
        }
    }
}

/// Returns from the stub that trapped, with 1. A SIGFPE from elsewhere gets its default action.
extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if !EXPECTED.replace(false) {
        // SAFETY: async-signal-safe; the trap happens again on return and ends the process.
        unsafe { libc::signal(libc::SIGFPE, libc::SIG_DFL) };
        return;
    }
    // SAFETY: the kernel passes a ucontext. Stubs use no stack, so RSP is at the return address.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rsp = registers[libc::REG_RSP as usize];
        registers[libc::REG_RIP as usize] = *(rsp as *const i64);
        registers[libc::REG_RSP as usize] = rsp + 8;
        registers[libc::REG_RAX as usize] = 1;
    }
}
