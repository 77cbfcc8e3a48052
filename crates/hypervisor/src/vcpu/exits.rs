//! What is done on each exit from guest mode (kernel: the exit handlers of arch/x86/kvm/vmx/vmx.c).

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS, KVM_X86_QUIRK_OUT_7E_INC_RIP};
use silicon::exception::Exception;
use silicon::model::Feature;
use silicon::state::reg;
use silicon::vmx::{BusAccess, Exit};

use super::{Vcpu, VcpuExit};
use crate::error::Error;
use crate::eventfd::IoSpace;

/// The port whose OUT is complete when the client hears of it.
const PORT_SMI: u16 = 0x7e;

impl Vcpu {
    /// Acts on an exit: `Some` if it concerns user space.
    ///
    /// # Errors
    ///
    /// KVM_RUN fails if the client has no memory where the guest wants it.
    pub(super) fn handle_exit(&mut self, exit: Exit) -> Result<Option<VcpuExit>, Error> {
        Ok(match exit {
            Exit::MemoryAbsent { .. } | Exit::MemoryElsewhere { .. } => self.page_absent(exit)?,
            Exit::InterruptWindow | Exit::NmiWindow | Exit::Smi => None,
            Exit::ExternalInterrupt | Exit::PageLogFull => {
                self.requeue_vectored();
                None
            }
            Exit::Notify(notify) => self.notify_exit(notify),
            // That there was one is noted of every exit, since another may have come in its place.
            Exit::BusLock => None,
            Exit::Rsm => self.rsm(),
            Exit::MonitorTrap => Some(self.step_exit()),
            Exit::Io(access) => self.port_access(access),
            Exit::EptViolation(access) => self.memory_access(access),
            Exit::Cpuid => self.cpuid_exit(),
            Exit::Rdmsr { index } => {
                self.count_xfd_exit(index);
                self.rdmsr(index)
            }
            Exit::Wrmsr { index, value } => {
                self.prepare_xfd_write(index, value)?;
                self.wrmsr(index, value)
            }
            Exit::Hlt => self.hlt(),
            Exit::Cr8 { register, read } => self.cr8_access(register, read),
            Exit::Xsetbv { index, value } => self.xsetbv(index, value)?,
            Exit::Vmcall => self.hypercall_instruction(false),
            Exit::Vmmcall => self.hypercall_instruction(true),
            // No instruction of these changes anything that this machine has: caches are coherent, MWAIT may
            // always return at once, PAUSE is a hint (KVM treats them the same way).
            Exit::Wbinvd | Exit::Invd | Exit::Pause => {
                self.skip_instruction();
                None
            }
            Exit::Monitor | Exit::Mwait => self.monitor(),
            Exit::Rdtsc => {
                let tsc = self.cpu.tsc();
                self.set_pair(tsc);
                self.skip_instruction();
                None
            }
            Exit::Rdpmc => {
                self.inject_gp();
                None
            }
            Exit::VmxInstruction(_) => {
                self.events.raise(Exception::UD);
                None
            }
            Exit::MovDr { dr, register, read } => self.debug_register_access(dr, register, read),
            Exit::Exception(exception) => self.exception_exit(exception),
            Exit::TripleFault => Some(VcpuExit::Shutdown),
            Exit::FetchFailed { gpa } => self.fetch_failed(gpa),
            Exit::StateNeeded { .. } => {
                self.reserve_tiles()?;
                None
            }
            Exit::Budget => Some(VcpuExit::Budget),
        })
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
        if let Some(value) = self.read_ahead(&access) {
            self.cpu.complete_read(value);
            return None;
        }
        self.user_access = true;
        if port == PORT_SMI && access.write.is_some() && self.vm.has_quirk(KVM_X86_QUIRK_OUT_7E_INC_RIP) {
            // Clients rely on RIP being behind this one (kernel: `kvm_fast_pio_out`).
            self.complete(0);
            let _ = self.finish_access();
        }
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
        if self.vm.policy().exits_on_emulation_failure() && self.cpu.at_x87_instruction() {
            return Some(self.emulation_failed(access.address));
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
        let [eax, ebx, ecx, edx] = self.cpuid_values(leaf, subleaf);
        let regs = &mut self.cpu.state.regs;
        regs[usize::from(reg::RAX)] = u64::from(eax);
        regs[usize::from(reg::RBX)] = u64::from(ebx);
        regs[usize::from(reg::RCX)] = u64::from(ecx);
        regs[usize::from(reg::RDX)] = u64::from(edx);
        self.skip_instruction();
        None
    }

    fn hlt(&mut self) -> Option<VcpuExit> {
        self.skip_instruction();
        if self.lapic.is_none() {
            return Some(VcpuExit::Hlt);
        }
        self.mp_state = KVM_MP_STATE_HALTED;
        None
    }

    /// MONITOR and MWAIT, which do nothing here. A processor without them has no such instructions, but KVM never said
    /// so (kernel: `kvm_emulate_monitor_mwait`).
    fn monitor(&mut self) -> Option<VcpuExit> {
        let lenient = self.vm.has_quirk(KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS);
        let there = self.cpuid_values(1, 0)[2] & 1 << Feature::Monitor.row().bit != 0;
        if lenient || there {
            self.skip_instruction();
        } else {
            self.events.raise(Exception::UD);
        }
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
        self.skip_instruction();
        // A client that has the local APIC may have an interrupt for this priority.
        (lowered && self.lapic.is_none()).then_some(VcpuExit::SetTpr)
    }

    fn xsetbv(&mut self, index: u32, value: u64) -> Result<Option<VcpuExit>, Error> {
        if index != 0 || !self.cpu.features.valid_xcr0(value) {
            self.inject_gp();
            return Ok(None);
        }
        self.make_room(value, self.cpu.state.xfd)?;
        self.cpu.state.xcr0 = value;
        self.cpu.refresh_mode();
        self.skip_instruction();
        Ok(None)
    }
}
