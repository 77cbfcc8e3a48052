//! Hypercalls (Documentation/virt/kvm/x86/hypercalls.rst; kernel: `kvm_emulate_hypercall` in arch/x86/kvm/x86.c).

use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::KVM_X86_QUIRK_FIX_HYPERCALL_INSN;
use silicon::exception::Exception;
use silicon::state::{CodeSize, reg};

use super::{Vcpu, VcpuExit};
use crate::cpuid::pv;
use crate::irqchip::bus::{DeliveryMode, Message};
use crate::tsc;

/// Errors (include/uapi/linux/kvm_para.h).
mod error {
    pub(super) const EPERM: i64 = -1;
    pub(super) const EFAULT: i64 = -14;
    pub(super) const EINVAL: i64 = -22;
    pub(super) const EOPNOTSUPP: i64 = -95;
    pub(super) const ENOSYS: i64 = -1000;
}

/// Numbers.
mod number {
    pub(super) const VAPIC_POLL_IRQ: u64 = 1;
    pub(super) const KICK_CPU: u64 = 5;
    pub(super) const CLOCK_PAIRING: u64 = 9;
    pub(super) const SEND_IPI: u64 = 10;
    pub(super) const SCHED_YIELD: u64 = 11;
    pub(super) const MAP_GPA_RANGE: u64 = 12;
}

const PAGE_SIZE: u64 = 4096;
/// VMCALL and VMMCALL: two bytes in common, and the third.
const OPCODE: [u8; 2] = [0x0f, 0x01];
const VMCALL: u8 = 0xc1;
const VMMCALL: u8 = 0xd9;
/// Page-fault error code: present, write, user.
const FAULT_WRITE: u32 = 0b011;
const FAULT_USER: u32 = 0b100;
/// ICR: logical destination; destination shorthand.
const ICR_LOGICAL: u64 = 1 << 11;
const ICR_SHORTHAND: u64 = 3 << 18;
const ICR_ASSERT: u32 = 1 << 14;
/// KVM_CLOCK_PAIRING_WALLCLOCK.
const PAIRING_WALLCLOCK: u64 = 0;

/// What KVM_EXIT_HYPERCALL tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HypercallExit {
    /// Number.
    pub nr: u64,
    /// RBX, RCX, RDX, RSI.
    pub args: [u64; 4],
    /// The guest is in 64-bit mode.
    pub long_mode: bool,
}

impl Vcpu {
    /// VMCALL, or VMMCALL if `amd`. The other vendor's is none: KVM replaces it in memory by the processor's own, unless
    /// the client has switched that off (kernel: `emulator_fix_hypercall`).
    pub(super) fn hypercall_instruction(&mut self, amd: bool) -> Option<VcpuExit> {
        let native = self.vm.system().model().vendor()[0] == u32::from_le_bytes(*b"Auth");
        if amd != native {
            if !self.vm.has_quirk(KVM_X86_QUIRK_FIX_HYPERCALL_INSN) {
                self.events.raise(Exception::UD);
                return None;
            }
            // A kernel that protects its code, and has been told the other vendor's name (QEMU's `max` on AMD's hosts), cannot be
            // helped by a fault that it does not expect: it gets what it asks for.
            let patched = self.patch_hypercall(if native { VMMCALL } else { VMCALL });
            if let Err(fault) = patched
                && self.cpu.state.cpl != 0
            {
                self.events.raise(fault);
                return None;
            }
        }
        self.hypercall()
    }

    fn patch_hypercall(&mut self, last: u8) -> Result<(), Exception> {
        let user = self.cpu.state.cpl == 3;
        for (at, byte) in (self.linear_rip()..).zip([OPCODE[0], OPCODE[1], last]) {
            let fault = FAULT_WRITE | if user { FAULT_USER } else { 0 };
            match self.cpu.translate(at) {
                Some((gpa, true, allows_user)) if allows_user || !user => {
                    self.vm.memory().write_in(self.space(), gpa, &[byte]);
                }
                _ => return Err(Exception::pf(at, fault)),
            }
        }
        Ok(())
    }

    fn hypercall(&mut self) -> Option<VcpuExit> {
        let regs = &self.cpu.state.regs;
        let long_mode = self.cpu.state.code_size == CodeSize::Bits64;
        let mask = if long_mode { u64::MAX } else { 0xffff_ffff };
        let [nr, a0, a1, a2, a3] =
            [reg::RAX, reg::RBX, reg::RCX, reg::RDX, reg::RSI].map(|at| regs[usize::from(at)] & mask);
        let args = [a0, a1, a2, a3];
        let result = if self.cpu.state.cpl != 0 {
            error::EPERM
        } else {
            match nr {
                number::VAPIC_POLL_IRQ => 0,
                number::KICK_CPU if self.pv_has(pv::UNHALT) => self.kick_processor(a1 as u32),
                number::CLOCK_PAIRING => self.pair_clocks(a0, a1),
                number::SEND_IPI if self.pv_has(pv::SEND_IPI) => self.send_ipis(args, long_mode),
                number::SCHED_YIELD if self.pv_has(pv::SCHED_YIELD) => {
                    std::thread::yield_now();
                    0
                }
                number::MAP_GPA_RANGE if self.vm.policy().exits_on_hypercall(nr) => {
                    if a0 % PAGE_SIZE == 0 && a1 != 0 && (a0 / PAGE_SIZE).checked_add(a1).is_some() {
                        self.hypercall_pending = true;
                        return Some(VcpuExit::Hypercall(HypercallExit {
                            nr,
                            args: [a0, a1, a2, 0],
                            long_mode,
                        }));
                    }
                    error::EINVAL
                }
                _ => error::ENOSYS,
            }
        };
        self.finish_hypercall(result as u64);
        None
    }

    fn finish_hypercall(&mut self, result: u64) {
        let long_mode = self.cpu.state.code_size == CodeSize::Bits64;
        let result = if long_mode { result } else { result & 0xffff_ffff };
        self.cpu.state.regs[usize::from(reg::RAX)] = result;
        self.skip_instruction();
    }

    /// Gives the result of the hypercall that the last exit told of.
    pub fn complete_hypercall(&mut self, result: u64) {
        if std::mem::take(&mut self.hypercall_pending) {
            self.finish_hypercall(result);
        }
    }

    /// Whether the guest may use a paravirtual feature ([`pv`]).
    pub(super) fn pv_has(&self, bit: u8) -> bool {
        !self.pv_enforced || self.pv_features & (1 << bit) != 0
    }

    /// KVM_HC_KICK_CPU: ends the paravirtual halt of the vCPU with this APIC ID.
    fn kick_processor(&mut self, apic_id: u32) -> i64 {
        if let Some(chip) = self.vm.irqchip() {
            let kick = Message { mode: DeliveryMode::RemoteRead, ..Message::from_icr(ICR_ASSERT, apic_id) };
            chip.bus().deliver(None, &kick);
        }
        0
    }

    /// KVM_HC_SEND_IPI: the ICR of `args[3]` to the APIC IDs from `args[2]` on that the bitmap in `args[0]` and `args[1]`
    /// has; how many got it.
    fn send_ipis(&mut self, args: [u64; 4], long_mode: bool) -> i64 {
        let [low, high, first, icr] = args;
        let (Some(chip), Ok(first)) = (self.vm.irqchip(), u32::try_from(first)) else { return error::EINVAL };
        let set = u128::from(high) << if long_mode { 64 } else { 32 } | u128::from(low);
        // Physical destinations only, and no shorthand.
        if icr & (ICR_LOGICAL | ICR_SHORTHAND) != 0 {
            return error::EINVAL;
        }
        i64::from(chip.bus().send_to_set(&Message::from_icr(icr as u32, 0), first, set))
    }

    /// KVM_HC_CLOCK_PAIRING: wall-clock time and the guest's TSC at the same moment, written to `gpa`.
    fn pair_clocks(&mut self, gpa: u64, kind: u64) -> i64 {
        if kind != PAIRING_WALLCLOCK {
            return error::EOPNOTSUPP;
        }
        let ticks = tsc::rdtsc();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // struct kvm_clock_pairing: seconds, nanoseconds, TSC, flags, padding.
        let mut pairing = [0; 64];
        pairing[0..8].copy_from_slice(&now.as_secs().to_le_bytes());
        pairing[8..16].copy_from_slice(&u64::from(now.subsec_nanos()).to_le_bytes());
        pairing[16..24].copy_from_slice(&self.guest_tsc(ticks).to_le_bytes());
        if self.vm.memory().write(gpa, &pairing) { 0 } else { error::EFAULT }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Program;
    use super::*;

    /// Calls with RAX, RBX, RCX, RDX, RSI; the result in RAX.
    fn call(program: &mut Program, registers: [u64; 5]) -> u32 {
        let mut regs = program.vcpu.regs();
        [regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi] = registers;
        regs.rip = Program::CODE;
        program.vcpu.set_regs(&regs);
        assert_eq!(program.vcpu.run().unwrap(), VcpuExit::Hlt);
        program.vcpu.regs().rax as u32
    }

    #[test]
    fn results() {
        let mut program = Program::new(&[0x0f, 0x01, 0xc1, 0xf4]);
        let hypercall = |program: &mut Program, registers| call(program, registers) as i32 as i64;
        assert_eq!(hypercall(&mut program, [1, 0, 0, 0, 0]), 0);
        assert_eq!(hypercall(&mut program, [99, 0, 0, 0, 0]), error::ENOSYS);
        assert_eq!(hypercall(&mut program, [12, 0, 1, 0, 0]), error::ENOSYS, "nobody wants the exit");
        assert_eq!(hypercall(&mut program, [9, 0x2000, 0, 0, 0]), 0);
        assert_eq!(hypercall(&mut program, [9, 0xfff_0000, 0, 0, 0]), error::EFAULT);
        assert_eq!(hypercall(&mut program, [9, 0x2000, 1, 0, 0]), error::EOPNOTSUPP);
        program.vcpu.enforce_pv_features(true);
        assert_eq!(hypercall(&mut program, [11, 0, 0, 0, 0]), error::ENOSYS);
    }

    #[test]
    fn the_other_vendors_instruction_is_replaced() {
        let mut program = Program::new(&[0x0f, 0x01, 0xd9, 0xf4]);
        assert_eq!(call(&mut program, [1, 0, 0, 0, 0]), 0);
        let mut bytes = [0; 3];
        program.vcpu.vm.memory().read(Program::CODE, &mut bytes);
        assert_eq!(bytes, [0x0f, 0x01, 0xc1]);
    }

    #[test]
    fn the_client_answers() {
        let mut program = Program::new(&[0x0f, 0x01, 0xc1, 0xf4]);
        program.vcpu.vm.set_exit_hypercalls(1 << 12).unwrap();
        assert_eq!(call(&mut program, [12, 0x1001, 1, 0, 0]) as i32 as i64, error::EINVAL);
        let mut regs = program.vcpu.regs();
        [regs.rax, regs.rbx, regs.rcx, regs.rdx] = [12, 0x1000, 1, 3];
        regs.rip = Program::CODE;
        program.vcpu.set_regs(&regs);
        let args = [0x1000, 1, 3, 0];
        let expected = VcpuExit::Hypercall(HypercallExit { nr: 12, args, long_mode: false });
        assert_eq!(program.vcpu.run().unwrap(), expected);
        program.vcpu.complete_hypercall(7);
        assert_eq!(program.vcpu.run().unwrap(), VcpuExit::Hlt);
        assert_eq!(program.vcpu.regs().rax, 7);
    }
}
