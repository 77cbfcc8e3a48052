//! What is done on each exit from guest mode (kernel: the exit handlers of arch/x86/kvm/vmx/vmx.c).

use kvm_bindings::KVM_MP_STATE_HALTED;
use silicon::exception::Exception;
use silicon::state::reg;
use silicon::vmx::{BusAccess, Exit};

use super::tsc::IA32_TSC;
use super::{Vcpu, VcpuExit};
use crate::eventfd::IoSpace;
use crate::msr::{CpuEnv, MsrError, MsrState};

/// Errors of hypercalls (include/uapi/linux/kvm_para.h).
const KVM_ENOSYS: i64 = -1000;
/// Hypercall that does nothing (KVM_HC_VAPIC_POLL_IRQ).
const HC_VAPIC_POLL_IRQ: u64 = 1;

impl Vcpu {
    /// Acts on an exit: `Some` if it concerns user space.
    pub(super) fn handle_exit(&mut self, exit: Exit) -> Option<VcpuExit> {
        match exit {
            Exit::ExternalInterrupt | Exit::InterruptWindow | Exit::NmiWindow | Exit::MonitorTrap => None,
            Exit::Io(access) => self.port_access(access),
            Exit::EptViolation(access) => self.memory_access(access),
            Exit::Cpuid => self.cpuid_exit(),
            Exit::Rdmsr { index } => self.rdmsr(index),
            Exit::Wrmsr { index, value } => self.wrmsr(index, value),
            Exit::Hlt => self.hlt(),
            Exit::Cr8 { register, read } => self.cr8_access(register, read),
            Exit::Xsetbv { index, value } => self.xsetbv(index, value),
            Exit::Vmcall => self.hypercall(),
            // No instruction of these changes anything that this machine has: caches are coherent, MWAIT may
            // always return at once, PAUSE is a hint (KVM treats them the same way).
            Exit::Wbinvd | Exit::Invd | Exit::Monitor | Exit::Mwait | Exit::Pause => {
                self.cpu.skip_instruction();
                None
            }
            Exit::Rdtsc => {
                let tsc = self.cpu.tsc();
                self.set_pair(tsc);
                self.cpu.skip_instruction();
                None
            }
            Exit::Rdpmc => {
                self.inject_gp();
                None
            }
            Exit::VmxInstruction(_) | Exit::MovDr { .. } => {
                self.events.raise(Exception::UD);
                None
            }
            Exit::Exception(exception) => {
                self.events.raise(exception);
                None
            }
            Exit::TripleFault => Some(VcpuExit::Shutdown),
            Exit::FetchFailed { gpa } => Some(VcpuExit::InternalError { gpa }),
            Exit::Budget => Some(VcpuExit::Budget),
        }
    }

    /// Whether a write is done with by signalling an ioeventfd or by putting it off.
    fn absorbed(&mut self, space: IoSpace, access: &BusAccess) -> bool {
        let Some(value) = access.write else { return false };
        let data = &value.to_le_bytes()[..usize::from(access.size.min(8))];
        let absorbed = self.vm.absorbs_write(space, access.address, data);
        if absorbed {
            self.cpu.complete_read(0);
        }
        absorbed
    }

    fn port_access(&mut self, access: BusAccess) -> Option<VcpuExit> {
        let (port, size) = (access.address as u16, usize::from(access.size));
        let ours = self.vm.irqchip().and_then(|chip| match access.write {
            Some(value) => chip.pio_write(port, value as u32, size).then_some(0),
            None => chip.pio_read(port, size),
        });
        if let Some(value) = ours {
            self.cpu.complete_read(u64::from(value));
            return None;
        }
        if self.absorbed(IoSpace::Pio, &access) {
            return None;
        }
        self.user_access = true;
        Some(VcpuExit::Io { port, size: access.size, write: access.write.map(|v| v as u32) })
    }

    fn memory_access(&mut self, access: BusAccess) -> Option<VcpuExit> {
        let mut data = access.write.unwrap_or(0).to_le_bytes();
        let bytes = &mut data[..usize::from(access.size.min(8))];
        let ours = match (&self.lapic, self.vm.irqchip()) {
            (Some(lapic), Some(chip)) if access.write.is_some() => {
                chip.mmio_write(lapic, access.address, bytes)
            }
            (Some(lapic), Some(chip)) => chip.mmio_read(lapic, access.address, bytes),
            _ => false,
        };
        if ours {
            self.cpu.complete_read(u64::from_le_bytes(data));
            return None;
        }
        if self.absorbed(IoSpace::Mmio, &access) {
            return None;
        }
        self.user_access = true;
        Some(VcpuExit::Mmio { gpa: access.address, size: access.size, write: access.write })
    }

    fn cpuid_exit(&mut self) -> Option<VcpuExit> {
        if self.msrs.cpuid_faulting() && self.cpu.state.cpl > 0 {
            self.inject_gp();
            return None;
        }
        let regs = &self.cpu.state.regs;
        let (leaf, subleaf) = (regs[usize::from(reg::RAX)] as u32, regs[usize::from(reg::RCX)] as u32);
        let [eax, ebx, ecx, edx] = self.cpuid.lookup(leaf, subleaf, &self.cpu.state, self.apic_base());
        let regs = &mut self.cpu.state.regs;
        regs[usize::from(reg::RAX)] = u64::from(eax);
        regs[usize::from(reg::RBX)] = u64::from(ebx);
        regs[usize::from(reg::RCX)] = u64::from(ecx);
        regs[usize::from(reg::RDX)] = u64::from(edx);
        self.cpu.skip_instruction();
        None
    }

    fn set_pair(&mut self, value: u64) {
        self.cpu.state.regs[usize::from(reg::RAX)] = value & 0xffff_ffff;
        self.cpu.state.regs[usize::from(reg::RDX)] = value >> 32;
    }

    fn rdmsr(&mut self, index: u32) -> Option<VcpuExit> {
        match self.read_msr(index, false) {
            Ok(value) => {
                self.set_pair(value);
                self.cpu.skip_instruction();
            }
            Err(_) => self.inject_gp(),
        }
        None
    }

    fn wrmsr(&mut self, index: u32, value: u64) -> Option<VcpuExit> {
        match self.write_msr(index, value, false) {
            Ok(()) => self.cpu.skip_instruction(),
            Err(_) => self.inject_gp(),
        }
        None
    }

    fn hlt(&mut self) -> Option<VcpuExit> {
        self.cpu.skip_instruction();
        if self.lapic.is_none() {
            return Some(VcpuExit::Hlt);
        }
        self.mp_state = KVM_MP_STATE_HALTED;
        None
    }

    fn cr8_access(&mut self, register: u8, read: bool) -> Option<VcpuExit> {
        let slot = usize::from(register & 15);
        let before = self.cr8();
        let mut lowered = false;
        if read {
            self.cpu.state.regs[slot] = before;
        } else {
            let value = self.cpu.state.regs[slot];
            if value > 15 {
                self.inject_gp();
                return None;
            }
            self.set_cr8(value);
            lowered = value < before;
        }
        self.cpu.skip_instruction();
        // A client that has the local APIC may have an interrupt for this priority.
        (lowered && self.lapic.is_none()).then_some(VcpuExit::SetTpr)
    }

    fn xsetbv(&mut self, index: u32, value: u64) -> Option<VcpuExit> {
        if index != 0 || !self.cpu.features.valid_xcr0(value) {
            self.inject_gp();
            return None;
        }
        self.cpu.state.xcr0 = value;
        self.cpu.refresh_mode();
        self.cpu.skip_instruction();
        None
    }

    /// VMCALL and VMMCALL (Documentation/virt/kvm/x86/hypercalls.rst). Outside 64-bit mode the registers are
    /// 32 bits wide.
    fn hypercall(&mut self) -> Option<VcpuExit> {
        if self.cpu.state.cpl != 0 {
            self.cpu.state.regs[usize::from(reg::RAX)] = -1i64 as u64; // -KVM_EPERM
            self.cpu.skip_instruction();
            return None;
        }
        let number = self.cpu.state.regs[usize::from(reg::RAX)];
        let result = if number == HC_VAPIC_POLL_IRQ { 0 } else { KVM_ENOSYS };
        self.cpu.state.regs[usize::from(reg::RAX)] = result as u64;
        self.cpu.skip_instruction();
        None
    }

    /// The registers that KVM keeps, with what they act on.
    pub(super) fn msrs(&mut self) -> (&mut MsrState, CpuEnv<'_>) {
        let env = CpuEnv {
            tsc_khz: self.tsc_khz,
            apic_base: &mut self.apic_base,
            cpu: &mut self.cpu,
            lapic: self.lapic.as_deref(),
            pv_features: if self.pv_enforced { self.pv_features } else { u32::MAX },
        };
        (&mut self.msrs, env)
    }

    /// Reads an MSR as RDMSR (or KVM_GET_MSRS, `host`) does.
    pub(super) fn read_msr(&mut self, index: u32, host: bool) -> Result<u64, MsrError> {
        let (msrs, mut env) = self.msrs();
        msrs.read(index, host, &mut env)
    }

    /// Writes an MSR as WRMSR (or KVM_SET_MSRS, `host`) does.
    pub(super) fn write_msr(&mut self, index: u32, value: u64, host: bool) -> Result<(), MsrError> {
        if host && index == IA32_TSC {
            self.write_tsc(value);
            return Ok(());
        }
        let (msrs, mut env) = self.msrs();
        msrs.write(index, value, host, &mut env)?;
        if std::mem::take(&mut self.msrs.wall_clock_changed) {
            self.vm.clock().write_wall_clock(self.vm.memory(), self.msrs.wall_clock());
        }
        Ok(())
    }
}
