//! What the host kernel does on a hardware thread for the buffers of its core when a vCPU is loaded, entered, left and put (kernel:
//! `vmx_vcpu_load_vmcs`, `vmx_l1d_flush`, `vmx_disable_fb_clear`, `vmx_vcpu_enter_exit` in arch/x86/kvm/vmx/vmx.c).
//!
//! With [`FbClearDis::Cached`], IA32_MCU_OPT_CTRL is what Sean Christopherson's fourth item in the thread asks for: the thread's value
//! is known without being read, and it is written only if the next guest is to have another one, or host user space runs.

use silicon::buffers::mcu_opt_ctrl::FB_CLEAR_DIS;
use silicon::buffers::{Buffer, Cleared, Domain};
use silicon::model::msrs::{FLUSH_CMD, MCU_OPT_CTRL, PRED_CMD};
use silicon::model::speculation::Bug;
use silicon::model::speculation::arch_cap::*;
use silicon::topology::Thread;

use super::Mitigations;
use super::command_line::FbClearDis;
use super::selected::{Flush, Hardware, Selected};

/// A vCPU as the host's thread sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Its number: no two vCPUs of a host have the same.
    pub vcpu: u64,
    /// Its VM's number.
    pub vm: u64,
    /// What its entries do about L1 terminal fault.
    pub flush: Flush,
    /// A memory slot of its VM maps MMIO of the host's.
    pub maps_mmio: bool,
    /// IA32_ARCH_CAPABILITIES as it has been told.
    pub arch_capabilities: u64,
    /// What VERW clears, as it has been told.
    pub verw_clears: Cleared,
}

/// What it has cost, and what has gone wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Costs {
    /// VM entries.
    pub entries: u64,
    /// Those of another vCPU than the one before on the thread.
    pub guest_switches: u64,
    /// RDMSRs of IA32_MCU_OPT_CTRL.
    pub msr_reads: u64,
    /// WRMSRs of it.
    pub msr_writes: u64,
    /// VERWs before entries.
    pub buffer_clears: u64,
    /// L1D_FLUSHes before entries.
    pub l1d_flushes: u64,
    /// IBPBs when vCPUs were loaded.
    pub branch_barriers: u64,
    /// Entries with data of somebody else in a buffer that the processor leaks from.
    pub stale_entries: u64,
    /// Exits since whose entry the guest has executed VERW, been told that it clears fill buffers, and been told wrongly.
    pub vain_clears: u64,
}

/// Modelled cycles. The processor underneath spends none; these are round numbers of the order that such instructions take, the same for
/// all parts.
pub mod cycles {
    /// RDMSR of IA32_MCU_OPT_CTRL.
    pub const RDMSR: u64 = 100;
    /// WRMSR of it.
    pub const WRMSR: u64 = 250;
    /// VERW that clears.
    pub const VERW: u64 = 500;
    /// L1D_FLUSH.
    pub const L1D_FLUSH: u64 = 4000;
    /// IBPB.
    pub const IBPB: u64 = 4000;
}

impl Costs {
    /// Modelled cycles of all of it.
    pub fn cycles(&self) -> u64 {
        self.msr_reads * cycles::RDMSR
            + self.msr_writes * cycles::WRMSR
            + self.buffer_clears * cycles::VERW
            + self.l1d_flushes * cycles::L1D_FLUSH
            + self.branch_barriers * cycles::IBPB
    }
}

/// A hardware thread and its host kernel.
#[derive(Clone, Copy, Debug)]
pub struct Host<'a> {
    /// The thread.
    pub thread: &'a Thread,
    /// What the kernel does.
    pub mitigations: &'a Mitigations,
}

/// What the kernel keeps per thread.
///
/// Two vCPUs that are on a thread at the same time, which the scheduler of a real host would have take turns, are counted as if each
/// ran in one piece from its entry to its exit.
#[derive(Debug)]
pub struct Control {
    /// IA32_MCU_OPT_CTRL as the host has it, read once at boot; `None`: there is no such register.
    host: Option<u64>,
    /// And as it is now.
    now: u64,
    /// The vCPU that was entered last.
    last: Option<u64>,
}

impl Control {
    /// For a thread on which nothing has run.
    pub fn new(thread: &Thread) -> Control {
        let host = thread.read_msr(MCU_OPT_CTRL).ok();
        Control { host, now: host.unwrap_or(0), last: None }
    }

    /// A vCPU is loaded.
    pub fn load(&mut self, host: Host, guest: &Guest, costs: &mut Costs) {
        if self.last.is_some_and(|last| last != guest.vcpu) && host.mitigations.selected.branch_barrier {
            let _ = host.thread.write_msr(PRED_CMD, 1);
            costs.branch_barriers += 1;
        }
        if host.mitigations.fb_clear_dis == FbClearDis::Load {
            self.want(host, wants_no_clears(host.mitigations, guest), costs);
        }
    }

    /// It is entered. `touched`: something may have come into the L1 data cache since the last entry.
    pub fn enter(&mut self, host: Host, guest: &Guest, touched: bool, costs: &mut Costs) {
        let mitigations = host.mitigations;
        if mitigations.fb_clear_dis == FbClearDis::Cached {
            self.want(host, wants_no_clears(mitigations, guest), costs);
        }
        let flush = guest.flush == Flush::Always || guest.flush == Flush::Cond && touched;
        if flush {
            let _ = host.thread.write_msr(FLUSH_CMD, 1);
            costs.l1d_flushes += 1;
        }
        let selected = &mitigations.selected;
        // The flush clears what VERW does.
        if selected.clear_buffers || selected.clear_for_mmio && guest.maps_mmio && !flush {
            host.thread.verw();
            costs.buffer_clears += 1;
        }
        if mitigations.fb_clear_dis == FbClearDis::Upstream && upstream_disables(mitigations, guest) {
            costs.msr_reads += 1;
            self.write(host, self.now | FB_CLEAR_DIS, costs);
        }
        costs.stale_entries += u64::from(stale(host, guest).is_some());
        costs.entries += 1;
        costs.guest_switches += u64::from(self.last.is_some_and(|last| last != guest.vcpu));
        self.last = Some(guest.vcpu);
        host.thread.core().buffers().enter(Domain::Vm(guest.vm));
    }

    /// It has exited, and has itself cleared `cleared` as it was told that it would.
    pub fn exit(&mut self, host: Host, guest: &Guest, cleared: Cleared, costs: &mut Costs) {
        if cleared.has(Buffer::BranchPredictor) {
            let _ = host.thread.write_msr(PRED_CMD, 1);
        }
        if cleared.has(Buffer::L1d) {
            let _ = host.thread.write_msr(FLUSH_CMD, 1);
        } else if cleared.has(Buffer::Fill) || cleared.has(Buffer::RegisterFile) {
            host.thread.verw();
            costs.vain_clears += u64::from(cleared.has(Buffer::Fill) && self.now & FB_CLEAR_DIS != 0);
        }
        let mut buffers = host.thread.core().buffers();
        buffers.enter(Domain::Vm(guest.vm));
        buffers.enter(Domain::HostKernel);
        drop(buffers);
        if host.mitigations.fb_clear_dis == FbClearDis::Upstream && self.now & FB_CLEAR_DIS != 0 {
            self.write(host, self.host.unwrap_or(0), costs);
        }
    }

    /// It is put: the thread may go to another task of the host's.
    pub fn put(&mut self, host: Host, costs: &mut Costs) {
        if host.mitigations.fb_clear_dis == FbClearDis::Load {
            self.want(host, false, costs);
        }
    }

    /// Host user space runs, which can execute VERW, too.
    pub fn return_to_user(&mut self, host: Host, costs: &mut Costs) {
        self.want(host, false, costs);
        if host.mitigations.selected.clear_buffers {
            host.thread.verw();
        }
        host.thread.core().buffers().enter(Domain::HostUser);
    }

    /// FB_CLEAR_DIS is to be set, or what the host has.
    fn want(&mut self, host: Host, disable: bool, costs: &mut Costs) {
        let Some(base) = self.host else { return };
        let value = if disable { base | FB_CLEAR_DIS } else { base };
        if value != self.now {
            self.write(host, value, costs);
        }
    }

    fn write(&mut self, host: Host, value: u64, costs: &mut Costs) {
        if host.thread.write_msr(MCU_OPT_CTRL, value).is_ok() {
            self.now = value;
            costs.msr_writes += 1;
        }
    }
}

/// Whether FB_CLEAR_DIS is to be set for a guest: the host's own VERWs do not need fill buffers cleared, and the guest has not been
/// told that its own clear them (F6, F8).
pub fn wants_no_clears(mitigations: &Mitigations, guest: &Guest) -> bool {
    let Mitigations { hardware, selected, .. } = mitigations;
    let host_clears = selected.clear_buffers || selected.clear_for_mmio && guest.maps_mmio;
    disables(hardware) && !host_clears && !guest.verw_clears.has(Buffer::Fill)
}

/// The same as the kernel decides it (`vmx_update_fb_clear_dis`): of a guest that lacks FB_CLEAR it knows that VERW need not clear, even
/// if it has been told that it has MDS and that VERW helps.
pub fn upstream_disables(mitigations: &Mitigations, guest: &Guest) -> bool {
    const IMMUNE: u64 = MDS_NO | TAA_NO | MMIO_IMMUNE;
    let Mitigations { hardware, selected, .. } = mitigations;
    let told = guest.arch_capabilities;
    let needed = selected.clear_buffers || hardware.bugs.has(Bug::Mds) || hardware.bugs.has(Bug::Taa);
    disables(hardware) && !needed && told & FB_CLEAR == 0 && told & IMMUNE != IMMUNE
}

fn disables(hardware: &Hardware) -> bool {
    hardware.arch_capabilities & FB_CLEAR_CTRL != 0
}

/// The buffers that the processor leaks from into a guest, by the bug that they leak by.
static LEAKS: &[(Bug, Buffer)] = &[
    (Bug::Mds, Buffer::Fill),
    (Bug::Mds, Buffer::Store),
    (Bug::Mds, Buffer::LoadPort),
    (Bug::Taa, Buffer::Fill),
    (Bug::MmioStaleData, Buffer::Fill),
    (Bug::L1tf, Buffer::L1d),
    (Bug::Rfds, Buffer::RegisterFile),
    (Bug::SpectreV2, Buffer::BranchPredictor),
];

/// A buffer that the guest could sample, and whose data it would find there.
pub fn stale(host: Host, guest: &Guest) -> Option<(Buffer, Domain)> {
    let hardware = &host.mitigations.hardware;
    let leaks = |bug: Bug| match bug {
        Bug::Taa => hardware.taa(),
        // It takes MMIO to bring data there.
        Bug::MmioStaleData => hardware.bugs.has(bug) && guest.maps_mmio,
        bug => hardware.bugs.has(bug),
    };
    let buffers = host.thread.core().buffers();
    let found = |&(bug, buffer): &(Bug, Buffer)| {
        // Branches of the host's kernel are kept apart by IBRS and retpolines.
        let matters = |owner: &Domain| buffer != Buffer::BranchPredictor || matches!(owner, Domain::Vm(_));
        let owner = leaks(bug).then(|| buffers.foreign(buffer, Domain::Vm(guest.vm)).find(matters))?;
        Some((buffer, owner?))
    };
    LEAKS.iter().find_map(found)
}

/// What each entry of a guest does on this host, in words.
pub fn at_entry(hardware: &Hardware, selected: &Selected, flush: Flush) -> [(&'static str, &'static str); 4] {
    let when = |always, sometimes: Option<&'static str>| match (always, sometimes) {
        (true, _) => "every entry",
        (false, Some(when)) => when,
        (false, None) => "never",
    };
    let cond =
        (flush == Flush::Cond).then_some("entries after the host has touched data, or was in user space");
    let mmio = selected.clear_for_mmio.then_some("entries of VMs with host MMIO in a memory slot");
    [
        ("VERW", when(selected.clear_buffers, mmio)),
        ("L1D flush", when(flush == Flush::Always, cond)),
        ("IBPB", when(false, selected.branch_barrier.then_some("when another vCPU comes onto the thread"))),
        (
            "FB_CLEAR_DIS",
            if disables(hardware) && !selected.clear_buffers {
                "as the guest wants it"
            } else {
                "left alone"
            },
        ),
    ]
}

#[cfg(test)]
mod tests;
