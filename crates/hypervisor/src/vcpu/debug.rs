//! KVM_SET_GUEST_DEBUG: a debugger of the client's (Documentation/virt/kvm/api.rst, 4.87), and KVM_TRANSLATE.
//!
//! Its breakpoints are in the processor's debug registers only while guest mode runs; the guest's own are in the state
//! otherwise, and the guest's accesses to them exit. Single steps are the monitor-trap flag's, which the guest cannot see.

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug,
    kvm_translation,
};
use silicon::exception::{Exception, vector};
use silicon::state::{CodeSize, CpuState};

use super::{Vcpu, VcpuExit};
use crate::error::Error;

/// Flags of `kvm_guest_debug.control` that KVM takes (KVM_CAP_SET_GUEST_DEBUG2).
pub const GUEST_DEBUG_FLAGS: u32 = KVM_GUESTDBG_ENABLE
    | KVM_GUESTDBG_SINGLESTEP
    | KVM_GUESTDBG_USE_SW_BP
    | KVM_GUESTDBG_USE_HW_BP
    | KVM_GUESTDBG_INJECT_DB
    | KVM_GUESTDBG_INJECT_BP
    | KVM_GUESTDBG_BLOCKIRQ;
/// DR6 bits that read as one unless what they stand for happens.
const DR6_ACTIVE_LOW: u64 = 0xffff_0ff0;
/// DR6.BS: single step.
const DR6_BS: u64 = 1 << 14;

/// What KVM_EXIT_DEBUG tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DebugExit {
    /// #DB or #BP.
    pub exception: u32,
    /// Linear address of the next instruction.
    pub pc: u64,
    /// As #DB would have set it; zero for #BP.
    pub dr6: u64,
    /// The debugger's or the guest's; zero for #BP.
    pub dr7: u64,
}

/// The debugger of one vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GuestDebug {
    control: u32,
    dr: [u64; 4],
    dr7: u64,
    /// An instruction has been completed without the processor's help since the last entry.
    pub(super) stepped: bool,
}

impl GuestDebug {
    fn has(&self, flag: u32) -> bool {
        self.control & flag != 0
    }

    /// Interrupts and NMIs are not to be injected.
    pub(super) fn blocks_interrupts(&self) -> bool {
        self.has(KVM_GUESTDBG_BLOCKIRQ)
    }

    pub(super) fn single_step(&self) -> bool {
        self.has(KVM_GUESTDBG_SINGLESTEP)
    }

    /// The exceptions that it wants to hear of, as an exception bitmap.
    pub(super) fn intercepts(&self) -> u32 {
        let has = |flag: u32, vector: u8| if self.has(flag) { 1 << vector } else { 0 };
        has(KVM_GUESTDBG_USE_SW_BP, vector::BP)
            | has(KVM_GUESTDBG_USE_HW_BP | KVM_GUESTDBG_SINGLESTEP, vector::DB)
    }

    /// Puts the debugger's breakpoints in the place of the guest's, or the guest's back.
    pub(super) fn exchange(&mut self, state: &mut CpuState) {
        if self.has(KVM_GUESTDBG_USE_HW_BP) {
            std::mem::swap(&mut self.dr, &mut state.dr);
            std::mem::swap(&mut self.dr7, &mut state.dr7);
        }
    }
}

impl Vcpu {
    /// KVM_SET_GUEST_DEBUG. EBUSY for an exception to inject while another one waits.
    pub fn set_guest_debug(&mut self, given: &kvm_guest_debug) -> Result<(), Error> {
        if given.control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP) != 0 {
            if self.events.raised.is_some() {
                return Err(Error::Busy("an exception waits"));
            }
            let debug = given.control & KVM_GUESTDBG_INJECT_DB != 0;
            let number = if debug { vector::DB } else { vector::BP };
            self.events.raise_without_payload(Exception { vector: number, error_code: None, payload: 0 });
        }
        let registers = given.arch.debugreg;
        let control = if given.control & KVM_GUESTDBG_ENABLE != 0 { given.control } else { 0 };
        self.debug = GuestDebug {
            control,
            dr: [registers[0], registers[1], registers[2], registers[3]],
            dr7: registers[7],
            stepped: false,
        };
        let controls = &mut self.cpu.controls;
        controls.mov_dr_exiting = control & KVM_GUESTDBG_USE_HW_BP != 0;
        controls.monitor_trap_flag = control & KVM_GUESTDBG_SINGLESTEP != 0;
        Ok(())
    }

    /// KVM_TRANSLATE: the page tables as the guest's kernel reads through them. As with KVM, `writeable` is always set
    /// and `usermode` never.
    pub fn translate(&mut self, linear_address: u64) -> kvm_translation {
        // All ones is KVM's "no such address" (`INVALID_GPA`), also where it is what a linear address maps to.
        let found = self.cpu.translate(linear_address).filter(|(gpa, ..)| *gpa != u64::MAX);
        kvm_translation {
            linear_address,
            physical_address: found.map_or(u64::MAX, |(gpa, ..)| gpa),
            valid: found.is_some().into(),
            writeable: 1,
            usermode: 0,
            pad: [0; 5],
        }
    }

    /// Linear address of the next instruction.
    pub(super) fn linear_rip(&self) -> u64 {
        let state = &self.cpu.state;
        match state.code_size {
            CodeSize::Bits64 => state.rip,
            _ => state.rip.wrapping_add(state.segs[1].base) & 0xffff_ffff,
        }
    }

    /// An exception that the exception bitmap selects.
    pub(super) fn exception_exit(&mut self, exception: Exception) -> Option<VcpuExit> {
        match exception.vector {
            vector::BP => {
                self.software_length = self.cpu.exit_instruction_length;
                let pc = self.linear_rip();
                Some(VcpuExit::Debug(DebugExit { exception: vector::BP.into(), pc, dr6: 0, dr7: 0 }))
            }
            vector::DB => Some(self.debug_exit(exception.payload)),
            _ => self.refused_or_raised(exception),
        }
    }

    /// The monitor-trap flag, or an instruction that was completed here.
    pub(super) fn step_exit(&mut self) -> VcpuExit {
        self.debug_exit(DR6_BS)
    }

    fn debug_exit(&self, dr6: u64) -> VcpuExit {
        let hardware = self.debug.has(KVM_GUESTDBG_USE_HW_BP);
        VcpuExit::Debug(DebugExit {
            exception: vector::DB.into(),
            pc: self.linear_rip(),
            dr6: dr6 | DR6_ACTIVE_LOW,
            dr7: if hardware { self.debug.dr7 } else { self.cpu.state.dr7 },
        })
    }

    /// MOV to or from a debug register, which the debugger uses: the guest gets at its own (kernel: `handle_dr`).
    pub(super) fn debug_register_access(&mut self, dr: u8, register: u8, read: bool) -> Option<VcpuExit> {
        let slot = usize::from(register & 15);
        let wide = self.cpu.state.code_size == CodeSize::Bits64;
        let mask = if wide { u64::MAX } else { 0xffff_ffff };
        if read {
            self.cpu.state.regs[slot] = self.cpu.debug_register(dr) & mask;
        } else {
            let value = self.cpu.state.regs[slot] & mask;
            if dr >= 4 && value >> 32 != 0 {
                self.inject_gp();
                return None;
            }
            self.cpu.set_debug_register(dr, value);
        }
        self.skip_instruction();
        None
    }

    /// Moves on behind the instruction that exited.
    pub(super) fn skip_instruction(&mut self) {
        self.cpu.skip_instruction();
        self.debug.stepped = true;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Program;
    use super::*;

    fn control(control: u32) -> kvm_guest_debug {
        kvm_guest_debug { control: control | KVM_GUESTDBG_ENABLE, ..Default::default() }
    }

    fn debug(exit: VcpuExit) -> DebugExit {
        match exit {
            VcpuExit::Debug(debug) => debug,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn steps_stop_after_each_instruction_whoever_completes_it() {
        // nop; cpuid; out 0x10, al; nop
        let mut program = Program::new(&[0x90, 0x0f, 0xa2, 0xe6, 0x10, 0x90]);
        let vcpu = &mut program.vcpu;
        vcpu.set_guest_debug(&control(KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ)).unwrap();
        for at in [1, 3] {
            let seen = debug(vcpu.run().unwrap());
            assert_eq!((seen.pc, seen.dr6, seen.exception), (Program::CODE + at, 0xffff_4ff0, 1));
        }
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::Io { port: 0x10, .. }));
        assert_eq!(debug(vcpu.run().unwrap()).pc, Program::CODE + 5);
        assert_eq!(debug(vcpu.run().unwrap()).pc, Program::CODE + 6);
    }

    #[test]
    fn software_breakpoints_stop_at_int3_and_can_be_given_to_the_guest() {
        let mut program = Program::new(&[0x90, 0xcc, 0x90]);
        let vcpu = &mut program.vcpu;
        vcpu.set_guest_debug(&control(KVM_GUESTDBG_USE_SW_BP)).unwrap();
        let seen = debug(vcpu.run().unwrap());
        assert_eq!((seen.pc, seen.exception), (Program::CODE + 1, 3));
        vcpu.set_guest_debug(&control(KVM_GUESTDBG_USE_SW_BP | KVM_GUESTDBG_INJECT_BP)).unwrap();
        assert!(
            vcpu.set_guest_debug(&control(KVM_GUESTDBG_INJECT_DB)).is_err_and(|e| e.errno() == libc::EBUSY)
        );
    }

    #[test]
    fn hardware_breakpoints_leave_the_guests_registers_alone() {
        // mov eax, 0x1234; mov dr0, eax; mov ebx, dr0; nop; hlt
        let code = [0x66, 0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x23, 0xc0, 0x0f, 0x21, 0xc3, 0x90, 0xf4];
        let mut program = Program::new(&code);
        let vcpu = &mut program.vcpu;
        let mut request = control(KVM_GUESTDBG_USE_HW_BP);
        request.arch.debugreg[0] = Program::CODE + 12;
        request.arch.debugreg[7] = 0x401;
        vcpu.set_guest_debug(&request).unwrap();
        let seen = debug(vcpu.run().unwrap());
        assert_eq!((seen.pc, seen.dr6, seen.dr7), (Program::CODE + 12, 0xffff_0ff1, 0x401));
        assert_eq!((vcpu.regs().rbx, vcpu.debugregs().db[0]), (0x1234, 0x1234));
        assert_eq!(vcpu.debugregs().dr7, 0x400);
    }

    #[test]
    fn translations() {
        let mut program = Program::new(&[0x90]);
        let found = program.vcpu.translate(0x1234);
        assert_eq!((found.physical_address, found.valid, found.writeable), (0x1234, 1, 1));
    }
}
