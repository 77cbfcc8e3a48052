//! The guest's x87 and MMX registers in the host's FPU.
//!
//! They are loaded by the first x87 or MMX instruction and stay until someone needs the image in
//! [`CpuState`](crate::state::CpuState) or guest mode is left. The host runs with the guest's own control word: an unmasked
//! x87 exception is not a trap but a pending one, reported by the *next* waiting instruction, and the host
//! never gets to execute one while the status word shows an exception summary ([`Cpu::admit`] looks first). So
//! results, stack and flags of unmasked exceptions are the hardware's.
//!
//! The instruction and data pointers are the guest's and are kept by the x87 handlers.
#![expect(unsafe_code, reason = "loads and stores the host's FPU")]

use std::arch::asm;

use super::stmxcsr;
use crate::cpu::Cpu;
use crate::state::X87;

/// FSW.ES: an unmasked exception is pending.
pub(crate) const FSW_ES: u16 = 1 << 7;

/// An FXSAVE64 image.
#[repr(C, align(64))]
pub(super) struct Image([u8; 512]);

impl Default for Image {
    fn default() -> Image {
        Image([0; 512])
    }
}

impl Image {
    /// The host's FPU, which stays as it is.
    pub(super) fn of_host() -> Image {
        let mut image = Image::default();
        // SAFETY: a 512-byte aligned image of our own.
        unsafe { asm!("fxsave64 [{}]", in(reg) &raw mut image, options(nostack, preserves_flags)) };
        image
    }

    /// Loads the host's FPU; MXCSR stays as it is.
    pub(super) fn load(mut self) {
        self.0[MXCSR..MXCSR + 4].copy_from_slice(&stmxcsr().to_le_bytes());
        // SAFETY: a 512-byte image with the host's present MXCSR; the XMM registers that it loads are declared.
        unsafe {
            asm!(
                "fxrstor64 [{}]", in(reg) &raw const self.0,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                options(nostack, preserves_flags)
            );
        }
    }
}

/// Where FXSAVE64 puts the parts that are the registers'.
const FCW: usize = 0;
const FSW: usize = 2;
const FTW: usize = 4;
const MXCSR: usize = 24;
const ST: usize = 32;

impl Cpu {
    /// Loads the guest's x87 state into the host's FPU, if it is not there.
    pub(crate) fn load_x87(&mut self) {
        if self.hostexec.x87_live {
            return;
        }
        let x87 = &self.state.x87;
        let mut image = Image::default();
        image.0[FCW..FCW + 2].copy_from_slice(&x87.fcw.to_le_bytes());
        image.0[FSW..FSW + 2].copy_from_slice(&x87.fsw.to_le_bytes());
        image.0[FTW] = x87.ftw;
        image.0[ST..ST + 128].copy_from_slice(x87.st.as_flattened());
        image.load();
        self.hostexec.x87_live = true;
        self.hostexec.refresh(&self.state);
    }

    /// Whether the guest's x87 registers are in the host's FPU.
    pub(crate) fn x87_is_live(&self) -> bool {
        self.hostexec.x87_live
    }

    /// Brings `state.x87` up to date and gives the FPU back to the host.
    pub(crate) fn sync_x87(&mut self) {
        if !self.hostexec.x87_live {
            return;
        }
        let Image(image) = Image::of_host();
        // SAFETY: the state has been saved. FNINIT is what the host's ABI expects to find.
        unsafe { asm!("fninit", options(nomem, nostack, preserves_flags)) };
        let x87 = &mut self.state.x87;
        x87.fcw = u16::from_le_bytes([image[FCW], image[FCW + 1]]);
        x87.fsw = u16::from_le_bytes([image[FSW], image[FSW + 1]]);
        x87.ftw = image[FTW];
        x87.st.as_flattened_mut().copy_from_slice(&image[ST..ST + 128]);
        self.hostexec.x87_live = false;
        self.hostexec.refresh(&self.state);
    }

    /// Replaces the x87 state. Reserved control bits and the exception summary become what the FPU makes of them.
    pub(crate) fn set_x87(&mut self, new: X87) {
        self.sync_x87();
        self.state.x87 = new;
        self.state.x87.fcw = (new.fcw & 0x1f3f) | 0x40;
        self.state.x87.settle_summary();
        self.hostexec.refresh(&self.state);
    }

    /// MMX register `index`, which is physical x87 register `index`.
    pub(crate) fn mmx(&mut self, index: usize) -> [u8; 8] {
        self.sync_x87();
        let top = usize::from(self.state.x87.fsw >> 11) & 7;
        let register = &self.state.x87.st[index.wrapping_sub(top) & 7];
        std::array::from_fn(|i| register[i])
    }

    /// TOP becomes 0, as MMX instructions leave it; what a store to memory that faults has already done.
    pub(crate) fn reset_top(&mut self) {
        self.sync_x87();
        let x87 = &mut self.state.x87;
        let top = usize::from(x87.fsw >> 11) & 7;
        x87.st.rotate_right(top);
        x87.fsw &= !(7 << 11);
    }

    /// What every MMX instruction does to the x87 state: TOP becomes 0 and all registers valid.
    pub(crate) fn enter_mmx(&mut self) {
        self.load_x87();
        let mut sink = 0u64;
        // SAFETY: stores MM0 to eight bytes of our own; no exception is pending, which the caller has checked.
        unsafe { asm!("movq [{}], mm0", in(reg) &raw mut sink, options(nostack, preserves_flags)) };
    }

    /// Whether an unmasked x87 exception waits to be reported.
    pub(crate) fn x87_exception_pending(&self) -> bool {
        let status = if self.hostexec.x87_live { fnstsw() } else { self.state.x87.fsw };
        status & FSW_ES != 0
    }

    /// The x87 control word may have changed.
    pub(crate) fn x87_control_changed(&mut self) {
        if self.hostexec.x87_live {
            self.state.x87.fcw = fnstcw();
        }
        self.hostexec.refresh(&self.state);
    }
}

impl X87 {
    /// ES and B follow from the exception flags and masks.
    pub(crate) fn settle_summary(&mut self) {
        let pending = self.fsw & !self.fcw & 0x3f != 0;
        self.fsw = (self.fsw & 0x7f7f) | if pending { 0x8080 } else { 0 };
    }
}

pub(crate) fn fnstsw() -> u16 {
    let status: u16;
    // SAFETY: reads the status word, does not wait.
    unsafe { asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags)) };
    status
}

fn fnstcw() -> u16 {
    let mut control = 0u16;
    // SAFETY: writes two bytes of our own, does not wait.
    unsafe { asm!("fnstcw [{}]", in(reg) &raw mut control, options(nostack, preserves_flags)) };
    control
}
