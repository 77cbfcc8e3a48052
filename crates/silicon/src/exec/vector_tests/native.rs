//! Runs an instruction directly on the host: all registers are loaded, the very bytes executed, all registers
//! stored. This is what stubs are compared with.
#![expect(unsafe_code, reason = "executes machine code made for the purpose")]

use std::cell::Cell;
use std::mem::offset_of;
use std::sync::Once;

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register};

use crate::mmu::host;

/// Everything that the instructions under test can read or write, but memory.
#[derive(Clone)]
#[repr(C, align(64))]
pub(super) struct Native {
    pub(super) zmm: [[u8; 64]; 32],
    pub(super) fx: [u8; 512],
    pub(super) k: [u64; 8],
    /// R15 and RSP are the harness's own.
    pub(super) gpr: [u64; 16],
    pub(super) flags: u64,
    reset_mxcsr: u32,
}

impl Native {
    pub(super) fn new() -> Native {
        let (zmm, fx) = ([[0; 64]; 32], [0; 512]);
        Native { zmm, fx, k: [0; 8], gpr: [0; 16], flags: 2, reset_mxcsr: 0x1f80 }
    }
}

/// A page that code is written to and run from.
pub(super) struct Thunk(*mut u8);

const PAGE: usize = 4096;

impl Thunk {
    pub(super) fn new() -> Thunk {
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new anonymous mapping.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, protection, flags, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        Thunk(page.cast())
    }

    /// Executes `bytes` on the registers of `native`; true if they fault on memory.
    pub(super) fn run(&mut self, bytes: &[u8], native: &mut Native) -> bool {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(install);
        let (code, after) = wrap(bytes);
        assert!(code.len() <= PAGE);
        RESUME.set(self.0 as u64 + after as u64);
        // SAFETY: the page is ours and big enough; the code keeps to the System V calling convention.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.0, code.len());
            let call: extern "sysv64" fn(*mut Native) = std::mem::transmute(self.0);
            call(native);
        }
        RESUME.replace(0) == 0
    }
}

thread_local! {
    /// Where a memory fault resumes: where all registers are stored. Zero outside the harness and after a fault.
    static RESUME: Cell<u64> = const { Cell::new(0) };
}

fn install() {
    // SAFETY: an all-zero sigaction is a valid value; `handler` has the signature that SA_SIGINFO asks for.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        assert_eq!(libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()), 0);
    }
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let resume = RESUME.replace(0);
    // SAFETY: the kernel passes a siginfo and a ucontext; a fault that is neither the harness's nor that of a guest in another
    // test ends the process on return.
    unsafe {
        if resume == 0 {
            if !host::recover(signal, info, context) {
                libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            }
            return;
        }
        (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] = resume as i64;
    }
}

/// Two pages, of which the second can be taken away.
pub(super) struct Pages(*mut u8);

impl Pages {
    pub(super) fn new() -> Pages {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new anonymous mapping.
        let pages = unsafe { libc::mmap(std::ptr::null_mut(), 2 * PAGE, protection, flags, -1, 0) };
        assert_ne!(pages, libc::MAP_FAILED);
        Pages(pages.cast())
    }

    pub(super) fn address(&self) -> u64 {
        self.0 as u64
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        self.protect(libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: our own two pages, both accessible.
        unsafe { std::slice::from_raw_parts_mut(self.0, 2 * PAGE) }
    }

    /// Makes accesses to the second page fault until [`Pages::bytes`] is called.
    pub(super) fn take_second(&mut self) {
        self.protect(libc::PROT_NONE);
    }

    fn protect(&mut self, protection: libc::c_int) {
        // SAFETY: our own second page.
        assert_eq!(unsafe { libc::mprotect(self.0.add(PAGE).cast(), PAGE, protection) }, 0);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.0.cast(), 2 * PAGE) };
    }
}

impl Drop for Thunk {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.0.cast(), PAGE) };
    }
}

fn nth(first: Register, n: usize) -> Register {
    Register::values().nth(first as usize + n).unwrap()
}

fn at(offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::R15, offset as i64)
}

/// `bytes` between the loading and the storing of all registers, and where the storing begins.
fn wrap(bytes: &[u8]) -> (Vec<u8>, usize) {
    let mut e = Encoder::new(64);
    let mut put = |ins: Instruction| {
        e.encode(&ins, 0).unwrap();
    };
    let saved = [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];
    let gprs = || (0..16).filter(|&n| n != 4 && n != 15);
    let gpr_at = |n: usize| at(offset_of!(Native, gpr) + 8 * n);
    let zmm_at = |n: usize| at(offset_of!(Native, zmm) + 64 * n);
    let k_at = |n: usize| at(offset_of!(Native, k) + 8 * n);
    for register in saved {
        put(Instruction::with1(Code::Push_r64, register).unwrap());
    }
    put(Instruction::with2(Code::Mov_r64_rm64, Register::R15, Register::RDI).unwrap());
    put(Instruction::with1(Code::Fxrstor64_m512byte, at(offset_of!(Native, fx))).unwrap());
    for n in 0..32 {
        let zmm = nth(Register::ZMM0, n);
        put(Instruction::with2(Code::EVEX_Vmovups_zmm_k1z_zmmm512, zmm, zmm_at(n)).unwrap());
    }
    for n in 0..8 {
        put(Instruction::with2(Code::VEX_Kmovq_kr_km64, nth(Register::K0, n), k_at(n)).unwrap());
    }
    put(Instruction::with1(Code::Push_rm64, at(offset_of!(Native, flags))).unwrap());
    put(Instruction::with(Code::Popfq));
    for n in gprs() {
        put(Instruction::with2(Code::Mov_r64_rm64, nth(Register::RAX, n), gpr_at(n)).unwrap());
    }
    for &byte in bytes {
        e.write_u8(byte);
    }
    let before = e.take_buffer();
    let mut put = |ins: Instruction| {
        e.encode(&ins, 0).unwrap();
    };
    for n in gprs() {
        put(Instruction::with2(Code::Mov_rm64_r64, gpr_at(n), nth(Register::RAX, n)).unwrap());
    }
    put(Instruction::with(Code::Pushfq));
    put(Instruction::with1(Code::Pop_rm64, at(offset_of!(Native, flags))).unwrap());
    for n in 0..32 {
        let zmm = nth(Register::ZMM0, n);
        put(Instruction::with2(Code::EVEX_Vmovups_zmmm512_k1z_zmm, zmm_at(n), zmm).unwrap());
    }
    for n in 0..8 {
        put(Instruction::with2(Code::VEX_Kmovq_m64_kr, k_at(n), nth(Register::K0, n)).unwrap());
    }
    put(Instruction::with1(Code::Fxsave64_m512byte, at(offset_of!(Native, fx))).unwrap());
    put(Instruction::with(Code::Fninit));
    put(Instruction::with1(Code::Ldmxcsr_m32, at(offset_of!(Native, reset_mxcsr))).unwrap());
    put(Instruction::with(Code::VEX_Vzeroupper));
    for register in saved.into_iter().rev() {
        put(Instruction::with1(Code::Pop_r64, register).unwrap());
    }
    put(Instruction::with(Code::Retnq));
    let after = before.len();
    ([before, e.take_buffer()].concat(), after)
}
