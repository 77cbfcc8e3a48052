//! What the host kernel does for the buffers of the core that the vCPU runs on: calls [`entry`](crate::mitigations::entry) where the vCPU
//! is loaded, entered, left and put. Hosts whose processors do not speculate have nothing to do.

use silicon::buffers::Cleared;
use silicon::vmx::Exit;

use super::Vcpu;
use crate::mitigations::entry::{Control, Costs, Guest, Host};
use crate::stats::VcpuStats;
use crate::vm::Vm;

/// What the host keeps for it.
#[derive(Debug)]
pub(super) struct HostBuffers {
    /// The vCPU's number on the host.
    number: u64,
    /// Something may have come into the L1 data cache since the last entry (kernel: `l1tf_flush_l1d`).
    touched: bool,
    costs: Costs,
}

impl HostBuffers {
    /// `None` where there is nothing to do.
    pub(super) fn new(vm: &Vm, id: u32) -> Option<Box<HostBuffers>> {
        let number = u64::from(vm.number()) << 32 | u64::from(id);
        let buffers = || Box::new(HostBuffers { number, touched: true, costs: Costs::default() });
        vm.system().mitigations().active().then(buffers)
    }
}

/// Whether the host touches data of the guest's or of its own on such an exit (kernel: `x86_emulate_instruction`, and interrupt handlers'
/// `kvm_set_cpu_l1tf_flush_l1d`).
fn touches_data(exit: &Exit) -> bool {
    matches!(exit, Exit::EptViolation(_) | Exit::ExternalInterrupt)
}

impl Vcpu {
    /// The vCPU as the host's thread sees it.
    fn as_guest(&mut self, number: u64) -> Guest {
        let (msrs, env) = self.msrs();
        let (arch_capabilities, verw_clears) = (msrs.told(&env), msrs.verw_clears(&env));
        let vm = &self.vm;
        Guest {
            vcpu: number,
            vm: vm.number().into(),
            flush: vm.flush(),
            maps_mmio: vm.memory().maps_host_mmio(),
            arch_capabilities,
            verw_clears,
        }
    }

    /// Does something on the vCPU's thread.
    fn on_host(&mut self, act: impl FnOnce(&mut Control, Host, &Guest, &mut HostBuffers)) {
        let Some(mut buffers) = self.buffers.take() else { return };
        let guest = self.as_guest(buffers.number);
        let (system, thread) = (self.vm.system(), self.locks.thread());
        let processors = system.processors();
        if let (Some(mut control), Some(thread)) = (processors.control(thread), processors.thread(thread)) {
            act(&mut control, Host { thread, mitigations: system.mitigations() }, &guest, &mut buffers);
        }
        self.buffers = Some(buffers);
    }

    /// The vCPU comes onto its thread.
    pub(super) fn buffers_load(&mut self) {
        self.on_host(|control, host, guest, buffers| {
            buffers.touched = true;
            control.load(host, guest, &mut buffers.costs);
        });
    }

    /// Guest mode is about to be entered.
    pub(super) fn buffers_enter(&mut self) {
        self.on_host(|control, host, guest, buffers| {
            let touched = std::mem::take(&mut buffers.touched);
            control.enter(host, guest, touched, &mut buffers.costs);
        });
    }

    /// Guest mode has been left.
    pub(super) fn buffers_exit(&mut self, exit: &Exit) {
        let cleared = std::mem::replace(&mut self.cpu.cleared, Cleared::NOTHING);
        self.on_host(|control, host, guest, buffers| {
            buffers.touched |= touches_data(exit);
            control.exit(host, guest, cleared, &mut buffers.costs);
        });
    }

    /// The vCPU leaves its thread, and KVM_RUN returns (`to_user`) or it sleeps.
    pub(super) fn buffers_put(&mut self, to_user: bool) {
        self.on_host(|control, host, _, buffers| {
            control.put(host, &mut buffers.costs);
            if to_user {
                control.return_to_user(host, &mut buffers.costs);
            }
        });
        if let Some(buffers) = &self.buffers {
            publish(&buffers.costs, &self.handle.stats);
        }
    }

    /// What all that has cost the host.
    pub fn buffer_costs(&self) -> Costs {
        self.buffers.as_ref().map_or(Costs::default(), |buffers| buffers.costs)
    }
}

fn publish(costs: &Costs, stats: &VcpuStats) {
    for (counter, value) in [
        (&stats.l1d_flushes, costs.l1d_flushes),
        (&stats.buffer_clears, costs.buffer_clears),
        (&stats.branch_barriers, costs.branch_barriers),
        (&stats.mcu_opt_ctrl_reads, costs.msr_reads),
        (&stats.mcu_opt_ctrl_writes, costs.msr_writes),
        (&stats.stale_entries, costs.stale_entries),
        (&stats.vain_clears, costs.vain_clears),
    ] {
        counter.store(value, std::sync::atomic::Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
