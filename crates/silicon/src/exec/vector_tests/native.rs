//! Runs an instruction directly on the host: all registers are loaded, the very bytes executed, all registers
//! stored. This is what stubs are compared with.
#![expect(unsafe_code, reason = "executes machine code made for the purpose")]

use std::mem::offset_of;

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register};

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

    /// Executes `bytes`, which must not fault, on the registers of `native`.
    pub(super) fn run(&mut self, bytes: &[u8], native: &mut Native) {
        let code = wrap(bytes);
        assert!(code.len() <= PAGE);
        // SAFETY: the page is ours and big enough; the code keeps to the System V calling convention.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.0, code.len());
            let call: extern "sysv64" fn(*mut Native) = std::mem::transmute(self.0);
            call(native);
        }
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

/// `bytes` between the loading and the storing of all registers.
fn wrap(bytes: &[u8]) -> Vec<u8> {
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
    e.take_buffer()
}
