//! KVM_EXIT_INTERNAL_ERROR: what cannot be executed (kernel: `prepare_emulation_failure_exit` in arch/x86/kvm/x86.c,
//! `__vmx_handle_exit` in arch/x86/kvm/vmx/vmx.c).

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
};
use silicon::exception::{Exception, vector};
use silicon::system::deliver::Event;

use super::{Vcpu, VcpuExit};
use crate::error::Error;

/// Bytes of the longest instruction.
const INSTRUCTION_LONGEST: usize = 15;
/// What pads the bytes of the instruction.
const NOP: u8 = 0x90;
/// VMX's exit reasons: EPT violation, EPT misconfiguration (which is how KVM has MMIO exit).
const REASON_EPT_VIOLATION: u64 = 48;
const REASON_EPT_MISCONFIGURATION: u64 = 49;
/// Exit qualification of an instruction fetch at a valid linear address (SDM vol. 3C, table 28-7).
const QUALIFICATION_FETCH: u64 = 1 << 2 | 1 << 7 | 1 << 8;

/// The contents of `kvm_run.internal`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InternalError {
    /// KVM_INTERNAL_ERROR_*.
    pub suberror: u32,
    /// How many words of `data` count.
    pub ndata: u32,
    /// What they mean depends on the suberror.
    pub data: [u64; 8],
    /// Guest-physical address that could not be accessed.
    pub gpa: u64,
}

/// IDT-vectoring information (SDM vol. 3C, 25.9.3).
pub(super) fn vectoring_information(event: Event) -> u32 {
    let (number, kind, error_code) = match event {
        Event::Interrupt(vector) => (vector, 0, false),
        Event::Nmi => (vector::NMI, 2, false),
        Event::Exception(e) | Event::Injected(e) => (e.vector, 3, e.error_code.is_some()),
        Event::Software { vector, .. } => (vector, if vector <= vector::OF { 6 } else { 4 }, false),
        Event::Int1 { .. } => (vector::DB, 5, false),
    };
    information(number, kind, error_code)
}

/// VM-exit interruption information of a hardware exception (SDM vol. 3C, 25.9.2).
fn interruption_information(exception: Exception) -> u32 {
    information(exception.vector, 3, exception.error_code.is_some())
}

fn information(vector: u8, kind: u32, error_code: bool) -> u32 {
    const VALID: u32 = 1 << 31;
    u32::from(vector) | kind << 8 | u32::from(error_code) << 11 | VALID
}

/// KVM_INTERNAL_ERROR_SIMUL_EX: `exception` exits, and was met in the delivery of `event` (kernel: `handle_exception_nmi`).
pub(super) fn simultaneous_exceptions(event: Event, exception: Exception) -> VcpuExit {
    let vectoring = vectoring_information(event).into();
    let interruption = interruption_information(exception).into();
    // The last word is the host's processor, which is not ours to know.
    let words = [vectoring, interruption, exception.error_code.unwrap_or(0).into(), 0];
    internal_error(KVM_INTERNAL_ERROR_SIMUL_EX, &words, 0)
}

impl Vcpu {
    /// The processor found no host memory for a page that a slot has (kernel: `kvm_handle_error_pfn`, which fills
    /// in no KVM_EXIT_MEMORY_FAULT: that is for memory that is or should be private). `failed`: where the client has it, and
    /// the host says that it has failed. The instruction is executed again, or the event delivered again, by the next
    /// KVM_RUN.
    pub(super) fn memory_absent(&mut self, gpa: u64, failed: Option<u64>) -> Error {
        self.requeue_vectored();
        match failed {
            None => Error::MemoryAbsent { gpa },
            Some(host) => Error::MemoryFailed { gpa, host },
        }
    }

    /// The processor could not execute the instruction at RIP, or deliver an event, because there is no memory at `gpa`.
    pub(super) fn fetch_failed(&mut self, gpa: u64) -> Option<VcpuExit> {
        if let Some(event) = self.requeue_vectored() {
            let words = [vectoring_information(event).into(), REASON_EPT_MISCONFIGURATION, 0, gpa, 0];
            return Some(internal_error(KVM_INTERNAL_ERROR_DELIVERY_EV, &words, gpa));
        }
        let wanted = self.vm.policy().exits_on_emulation_failure();
        if !wanted {
            self.events.raise(Exception::UD);
            // What it had read from the client has no use any more, and must not hold the exception back.
            self.cpu.abandon_access();
            if self.cpu.state.cpl != 0 {
                return None;
            }
        }
        Some(self.emulation_error(gpa, [REASON_EPT_VIOLATION, QUALIFICATION_FETCH]))
    }

    /// The instruction at RIP reaches for a device with an instruction that KVM's emulator does not know (kernel:
    /// arch/x86/kvm/emulate.c). We could do it, but a client that has asked for these exits does it itself.
    pub(super) fn emulation_failed(&mut self, gpa: u64) -> VcpuExit {
        self.cpu.abandon_access();
        self.emulation_error(gpa, [REASON_EPT_MISCONFIGURATION, 0])
    }

    /// `exit`: reason and qualification.
    fn emulation_error(&mut self, gpa: u64, exit: [u64; 2]) -> VcpuExit {
        let (length, bytes) = self.instruction_bytes();
        let info = [exit[0], exit[1], 0, 0, 0];
        let mut words = Vec::with_capacity(8);
        if length == 0 {
            words.push(0);
        } else {
            let mut packed = [0; 16];
            packed[0] = length;
            packed[1..].copy_from_slice(&bytes);
            words.push(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES.into());
            words.extend(packed.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)));
        }
        words.extend(info);
        internal_error(KVM_INTERNAL_ERROR_EMULATION, &words, gpa)
    }

    /// What can be read of the instruction at RIP, and how many bytes that are.
    fn instruction_bytes(&mut self) -> (u8, [u8; INSTRUCTION_LONGEST]) {
        let mut bytes = [NOP; INSTRUCTION_LONGEST];
        let mut length = 0;
        let start = self.linear_rip();
        for (byte, at) in bytes.iter_mut().zip(start..) {
            let Some((gpa, ..)) = self.cpu.translate(at) else { break };
            if !self.vm.memory().read_in(self.space(), gpa, std::slice::from_mut(byte)) {
                break;
            }
            length += 1;
        }
        (length, bytes)
    }
}

fn internal_error(suberror: u32, words: &[u64], gpa: u64) -> VcpuExit {
    let mut data = [0; 8];
    data.iter_mut().zip(words).for_each(|(place, word)| *place = *word);
    VcpuExit::InternalError(InternalError { suberror, ndata: words.len().min(8) as u32, data, gpa })
}

#[cfg(test)]
mod tests {
    use super::super::testing::Program;
    use super::*;

    /// A REP MOVSB from a device that lost its page tables took #UD for ever: what it had read kept it from delivery, and
    /// KVM_RUN from returning.
    #[test]
    fn an_instruction_that_cannot_go_on_forgets_what_it_has_read() {
        // in al, 0x10
        let mut program = Program::new(&[0xe4, 0x10]);
        let vcpu = &mut program.vcpu;
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::Io { .. }));
        vcpu.complete(1);
        assert!(vcpu.cpu.access_pending());
        vcpu.cpu.state.cpl = 3;
        assert_eq!(vcpu.fetch_failed(0xdead_0000), None);
        assert!(!vcpu.cpu.access_pending());
    }

    fn run(program: &mut Program) -> InternalError {
        match program.vcpu.run().unwrap() {
            VcpuExit::InternalError(error) => error,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn code_where_no_memory_is() {
        // jmp 0x5000:0
        let mut program = Program::new(&[0xea, 0, 0, 0, 0x50]);
        let error = run(&mut program);
        assert_eq!((error.suberror, error.ndata, error.gpa), (KVM_INTERNAL_ERROR_EMULATION, 6, 0x5_0000));
        assert_eq!(error.data[..3], [0, REASON_EPT_VIOLATION, QUALIFICATION_FETCH]);
    }

    #[test]
    fn a_client_that_asks_for_emulation_failures_gets_x87_on_devices() {
        // mov ax, 0x5000; mov ds, ax; fld dword [0]; mov al, [0]
        let code = [0xb8, 0, 0x50, 0x8e, 0xd8, 0xd9, 0x06, 0, 0, 0xa0, 0, 0];
        let is_read = |exit| matches!(exit, VcpuExit::Mmio { gpa: 0x5_0000, write: None, .. });
        assert!(is_read(Program::new(&code).vcpu.run().unwrap()), "it can be done");
        let mut program = Program::new(&code);
        program.vcpu.vm.set_exit_on_emulation_failure(1).unwrap();
        let error = run(&mut program);
        assert_eq!((error.suberror, error.gpa), (KVM_INTERNAL_ERROR_EMULATION, 0x5_0000));
        assert_eq!(error.data[..2], [1, u64::from_le_bytes([15, 0xd9, 0x06, 0, 0, 0xa0, 0, 0])]);
        let mut regs = program.vcpu.regs();
        regs.rip += 4;
        program.vcpu.set_regs(&regs);
        assert!(is_read(program.vcpu.run().unwrap()), "other instructions are done all the same");
    }

    #[test]
    fn an_event_that_cannot_be_delivered() {
        // mov ax, 0x5000; mov ss, ax; int 0x30
        let mut program = Program::new(&[0xb8, 0, 0x50, 0x8e, 0xd0, 0xcd, 0x30]);
        program.vcpu.events.interrupt = None;
        let mut regs = program.vcpu.regs();
        regs.rflags |= 1 << 9;
        program.vcpu.set_regs(&regs);
        program.vcpu.interrupt(0x31).unwrap();
        let mut sregs = program.vcpu.sregs();
        sregs.ss.base = 0x5_0000;
        program.vcpu.set_sregs(&sregs).unwrap();
        program.vcpu.interrupt(0x31).unwrap();
        let error = run(&mut program);
        assert_eq!(error.suberror, KVM_INTERNAL_ERROR_DELIVERY_EV);
        assert_eq!(error.data[..2], [0x8000_0031, REASON_EPT_MISCONFIGURATION]);
        assert_eq!(program.vcpu.vcpu_events().interrupt.injected, 1, "it waits for another attempt");
    }

    /// The length was lost, so that INT n would have returned to itself after the second attempt.
    #[test]
    fn a_software_interrupt_that_cannot_be_delivered_keeps_its_length() {
        let mut program = Program::new(&[0xcd, 0x31]);
        let mut sregs = program.vcpu.sregs();
        sregs.ss.base = 0x5_0000;
        program.vcpu.set_sregs(&sregs).unwrap();
        let interrupt = Some(super::super::events::Acknowledged { vector: 0x31, software: Some(2) });
        program.vcpu.events.interrupt = interrupt;
        run(&mut program);
        assert_eq!(program.vcpu.events.interrupt, interrupt);
    }
}
