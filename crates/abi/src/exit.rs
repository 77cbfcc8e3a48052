//! Why KVM_RUN returned, as `kvm_run` says it, and where the client's answer is.
#![expect(unsafe_code, reason = "addresses of fields of memory that is shared with the client")]

use hypervisor::split_lock::Policy;
use hypervisor::vcpu::{DebugExit, HypercallExit, InternalError, MsrExit};
use hypervisor::{Vcpu, VcpuExit};
use kvm_bindings::*;

use crate::ring3::{NotifyRecord, RING3_EXIT_SPLIT_LOCK, RING3_SPLIT_LOCK_IMPLICIT, SplitLockRecord};
use crate::run::{PIO_DATA, RunArea, field};

/// `kvm_run.hypercall.flags`: the guest is in 64-bit mode.
const KVM_EXIT_HYPERCALL_LONG_MODE: u64 = 1 << 0;

/// `kvm_run.ex.exception`: #AC.
const AC: u32 = 17;

/// Says why KVM_RUN returned; `reads`: how many reads of a port it is for.
pub(crate) fn report(area: &RunArea, exit: &VcpuExit, reads: u32) {
    let reason = match *exit {
        VcpuExit::Io { port, size, write } => {
            let io = field!(area, __bindgen_anon_1.io);
            let direction = if write.is_some() { KVM_EXIT_IO_OUT } else { KVM_EXIT_IO_IN } as u8;
            let access = kvm_run__bindgen_ty_1__bindgen_ty_4 {
                direction,
                size,
                port,
                count: if write.is_some() { 1 } else { reads },
                data_offset: PIO_DATA as u64,
            };
            area.set(io, access);
            area.set(area.pio_data(), write.unwrap_or(0).into());
            KVM_EXIT_IO
        }
        VcpuExit::Mmio { gpa, size, write } => {
            let mmio = kvm_run__bindgen_ty_1__bindgen_ty_6 {
                phys_addr: gpa,
                data: write.unwrap_or(0).to_le_bytes(),
                len: size.into(),
                is_write: write.is_some().into(),
            };
            area.set(field!(area, __bindgen_anon_1.mmio), mmio);
            KVM_EXIT_MMIO
        }
        VcpuExit::Hlt => KVM_EXIT_HLT,
        VcpuExit::Shutdown => KVM_EXIT_SHUTDOWN,
        VcpuExit::Crash(crash) => {
            let data = [crash.reason as u64, crash.gpa, crash.rip];
            area.set(field!(area, __bindgen_anon_1.system_event.type_), KVM_SYSTEM_EVENT_CRASH);
            area.set(field!(area, __bindgen_anon_1.system_event.ndata), data.len() as u32);
            area.set(field!(area, __bindgen_anon_1.system_event.__bindgen_anon_1.data).cast(), data);
            KVM_EXIT_SYSTEM_EVENT
        }
        VcpuExit::DirtyRingFull => KVM_EXIT_DIRTY_RING_FULL,
        VcpuExit::IrqWindowOpen => KVM_EXIT_IRQ_WINDOW_OPEN,
        VcpuExit::SetTpr => KVM_EXIT_SET_TPR,
        VcpuExit::IoapicEoi { vector } => {
            area.set(field!(area, __bindgen_anon_1.eoi.vector), vector);
            KVM_EXIT_IOAPIC_EOI
        }
        VcpuExit::InternalError(InternalError { suberror, ndata, data, .. }) => {
            let mut failure = kvm_run__bindgen_ty_1__bindgen_ty_13 { suberror, ndata, ..Default::default() };
            failure.data[..data.len()].copy_from_slice(&data);
            area.set(field!(area, __bindgen_anon_1.internal), failure);
            KVM_EXIT_INTERNAL_ERROR
        }
        VcpuExit::Msr(MsrExit { index, reason, write }) => {
            let data = write.unwrap_or(0);
            let msr = kvm_run__bindgen_ty_1__bindgen_ty_23 { reason, index, data, ..Default::default() };
            area.set(field!(area, __bindgen_anon_1.msr), msr);
            if write.is_some() { KVM_EXIT_X86_WRMSR } else { KVM_EXIT_X86_RDMSR }
        }
        VcpuExit::Hypercall(HypercallExit { nr, args, long_mode }) => {
            let mut call = kvm_run__bindgen_ty_1__bindgen_ty_8 { nr, ..Default::default() };
            call.args[..4].copy_from_slice(&args);
            call.__bindgen_anon_1.flags = if long_mode { KVM_EXIT_HYPERCALL_LONG_MODE } else { 0 };
            area.set(field!(area, __bindgen_anon_1.hypercall), call);
            KVM_EXIT_HYPERCALL
        }
        VcpuExit::Debug(DebugExit { exception, pc, dr6, dr7 }) => {
            let arch = kvm_debug_exit_arch { exception, pad: 0, pc, dr6, dr7 };
            area.set(field!(area, __bindgen_anon_1.debug.arch), arch);
            KVM_EXIT_DEBUG
        }
        VcpuExit::BusLock => KVM_EXIT_X86_BUS_LOCK,
        VcpuExit::SplitLock(exit) if exit.policy == Policy::Exit => {
            let (instruction, instruction_length) = exit.instruction;
            let split = SplitLockRecord {
                rip: exit.rip,
                linear_address: exit.linear_address,
                gpa: exit.gpa,
                size: exit.size.into(),
                flags: if exit.implicit { RING3_SPLIT_LOCK_IMPLICIT } else { 0 },
                cpl: exit.cpl,
                instruction_length,
                instruction,
                ..SplitLockRecord::default()
            };
            area.set(field!(area, __bindgen_anon_1).cast(), split);
            RING3_EXIT_SPLIT_LOCK
        }
        // The thread gets SIGBUS besides.
        VcpuExit::SplitLock(_) => {
            area.set(field!(area, __bindgen_anon_1.ex.exception), AC);
            area.set(field!(area, __bindgen_anon_1.ex.error_code), 0);
            KVM_EXIT_EXCEPTION
        }
        VcpuExit::Notify(exit) => {
            // The client may know of the first word alone.
            area.set(field!(area, __bindgen_anon_1).cast(), NotifyRecord::of(&exit));
            KVM_EXIT_NOTIFY
        }
        // Only tools set a limit.
        VcpuExit::Budget => KVM_EXIT_UNKNOWN,
    };
    area.set(field!(area, exit_reason), reason);
}

/// Where the client puts the answer to the last exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Answer {
    /// No answer is awaited.
    #[default]
    None,
    /// IN, INS: this many bytes of the port data, so many times.
    Port(u8, u32),
    /// A read: this many bytes of `kvm_run.mmio.data`.
    Mmio(u8),
    /// `kvm_run.msr`: data and error.
    Msr,
    /// `kvm_run.hypercall.ret`.
    Hypercall,
}

impl Answer {
    /// What the client has to answer to `exit`.
    pub(crate) fn to(exit: &VcpuExit, reads: u32) -> Answer {
        match *exit {
            VcpuExit::Io { size, write: None, .. } => Answer::Port(size, reads),
            VcpuExit::Mmio { size, write: None, .. } => Answer::Mmio(size),
            VcpuExit::Msr(_) => Answer::Msr,
            VcpuExit::Hypercall(_) => Answer::Hypercall,
            _ => Answer::None,
        }
    }

    /// Completes with what the client has put there.
    pub(crate) fn give(self, vcpu: &mut Vcpu, area: &RunArea) {
        match self {
            Answer::None => vcpu.complete(0),
            Answer::Port(size, count) => vcpu.complete_port_reads(&port_data(area, size, count)),
            Answer::Mmio(size) => {
                let data = u64::from_le_bytes(area.get(field!(area, __bindgen_anon_1.mmio.data)));
                vcpu.complete(if size < 8 { data & ((1 << (size * 8)) - 1) } else { data });
            }
            Answer::Msr => {
                let error = area.get(field!(area, __bindgen_anon_1.msr.error)) != 0;
                vcpu.complete_msr(error, area.get(field!(area, __bindgen_anon_1.msr.data)));
            }
            Answer::Hypercall => {
                vcpu.complete_hypercall(area.get(field!(area, __bindgen_anon_1.hypercall.ret)));
            }
        }
    }
}

/// What the client has put into the page of port data.
fn port_data(area: &RunArea, size: u8, count: u32) -> Vec<u64> {
    let place = area.pio_data().cast::<u8>();
    let element = |i: u32| {
        let byte =
            |j: u8| u64::from(area.get(place.wrapping_add((i * u32::from(size) + u32::from(j)) as usize)));
        (0..size).fold(0, |value, j| value | byte(j) << (8 * j))
    };
    (0..count).map(element).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_the_width_of_the_access() {
        let fd = crate::object::memfd(c"test", RunArea::SIZE as u64).unwrap();
        let area = RunArea::map(&fd).unwrap();
        area.set(area.pio_data(), 0x1122_3344_5566_7788);
        assert_eq!(port_data(&area, 1, 3), [0x88, 0x77, 0x66]);
        assert_eq!(port_data(&area, 4, 1), [0x5566_7788]);
    }
}
