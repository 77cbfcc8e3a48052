//! The extended state of a vCPU as a host kernel has it: in the registers of a hardware thread, with the guest's IA32_XFD, from where the
//! kernel saves it with XSAVES and brings it back with XRSTORS.
//!
//! ring3 needs none of that: the state stays in the vCPU, and nothing is lost. But what hypervisors on hardware do, they
//! can try here. With IA32_XFD\[18\] set XSAVES does not save tiles that are in use, which is what the thread "Thoughts of AMX
//! KVM support based on latest kernel" (kvm, 2021-11-10) is about: they can be lost (a) when the vCPU's thread is preempted or KVM_RUN
//! returns, and (b) when a softirq uses the FPU (`kernel_fpu_begin`). Its Option 1 clears IA32_XFD at the exit if tiles are in use,
//! Option 2 clears it around XSAVES and XRSTORS. The kernel does neither, and declares the loss legal (kernel:
//! `fpu_update_guest_xfd` in arch/x86/kernel/fpu/core.c).

use std::sync::atomic::Ordering;

use silicon::Cpu;
use silicon::model::xstate::TILEDATA;

use super::Vcpu;
use crate::host::{HostParams, XfdOption};
use crate::stats::VcpuStats;

/// What the host kernel does with a vCPU's extended state.
#[derive(Debug)]
pub(super) struct HostFpu {
    option: XfdOption,
    /// After so many exits the thread is preempted, or a softirq uses the FPU, each time; 0: never.
    preempt_every: u32,
    softirq_every: u32,
    exits: u32,
    /// IA32_XFD of the hardware thread.
    thread_xfd: u64,
    /// The save area.
    image: Vec<u8>,
}

impl HostFpu {
    /// `None` where the state stays in the vCPU.
    pub(super) fn new(host: &HostParams, area: usize) -> Option<Box<HostFpu>> {
        let kernel = || HostFpu {
            option: host.xfd,
            preempt_every: host.preempt_exits,
            softirq_every: host.softirq_exits,
            exits: 0,
            thread_xfd: 0,
            image: vec![0; area],
        };
        (host.xfd != XfdOption::Native).then(|| Box::new(kernel()))
    }

    fn write_xfd(&mut self, value: u64, stats: &VcpuStats) {
        if self.thread_xfd != value {
            self.thread_xfd = value;
            stats.host_xfd_writes.count();
        }
    }

    /// The guest is entered: its IA32_XFD must be there.
    fn enter(&mut self, cpu: &Cpu, stats: &VcpuStats) {
        if !cpu.controls.xfd_exiting {
            self.write_xfd(cpu.state.xfd, stats);
        }
    }

    /// The guest has exited, and may have written IA32_XFD.
    fn exit(&mut self, cpu: &mut Cpu, stats: &VcpuStats) {
        if !cpu.controls.xfd_exiting {
            self.thread_xfd = cpu.state.xfd;
            if self.option != XfdOption::Option2 {
                stats.host_xfd_reads.count();
            }
            if self.option == XfdOption::Option1
                && self.thread_xfd & TILEDATA != 0
                && cpu.state.tile_data_used
            {
                self.write_xfd(self.thread_xfd & !TILEDATA, stats);
            }
        }
        self.exits = self.exits.wrapping_add(1);
        let due = |every: u32| every != 0 && self.exits.is_multiple_of(every);
        for due in [due(self.preempt_every), due(self.softirq_every)] {
            if due {
                self.switch(cpu, stats);
            }
        }
    }

    /// Somebody else uses the registers: the guest's are saved, and restored when it is the vCPU's turn again.
    fn switch(&mut self, cpu: &mut Cpu, stats: &VcpuStats) {
        let guest = self.thread_xfd;
        if self.option == XfdOption::Option2 && !cpu.controls.xfd_exiting {
            stats.host_xfd_reads.count();
            self.write_xfd(guest & !TILEDATA, stats);
        }
        stats.host_xsaves.count();
        cpu.save_xstate(!self.thread_xfd, &mut self.image);
        let other = vec![0; self.image.len()];
        // What was there is allowed to be there, and the room for tiles is there too.
        let lost = cpu.load_xstate(u64::MAX, &other).and_then(|()| cpu.load_xstate(u64::MAX, &self.image));
        stats.host_xrstors.count();
        if let Err(error) = lost {
            tracing::error!("XRSTORS of a guest's state: {error}");
        }
        self.write_xfd(guest, stats);
    }
}

impl Vcpu {
    /// Guest mode is about to be entered.
    pub(super) fn host_fpu_enter(&mut self) {
        if let Some(fpu) = &mut self.host_fpu {
            fpu.enter(&self.cpu, &self.handle.stats);
        }
    }

    /// Guest mode has been left.
    pub(super) fn host_fpu_exit(&mut self) {
        if let Some(fpu) = &mut self.host_fpu {
            fpu.exit(&mut self.cpu, &self.handle.stats);
        }
    }

    /// KVM_RUN returns, or the vCPU sleeps.
    pub(super) fn host_fpu_put(&mut self) {
        if let Some(fpu) = &mut self.host_fpu {
            fpu.switch(&mut self.cpu, &self.handle.stats);
        }
    }

    /// What the host kernel has done for the extended state: XSAVES, XRSTORS, reads and writes of IA32_XFD.
    pub fn host_fpu_costs(&self) -> [(&'static str, u64); 4] {
        let stats = &self.handle.stats;
        [
            ("XSAVES", &stats.host_xsaves),
            ("XRSTORS", &stats.host_xrstors),
            ("reads of IA32_XFD", &stats.host_xfd_reads),
            ("writes of IA32_XFD", &stats.host_xfd_writes),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }
}
