//! What is done at a notify VM exit: no event window for too long (kernel: `handle_notify` in arch/x86/kvm/vmx/vmx.c).

use std::sync::atomic::Ordering;

use silicon::exception::{Exception, vector};
use silicon::state::interruptibility;
use silicon::system::deliver::Event;
use silicon::vmx::{Injection, Notify};

use super::failure::{simultaneous_exceptions, vectoring_information};
use super::{Vcpu, VcpuExit};
use crate::error::Error;
use crate::notify::{FIRST_PAUSE_NS, Setting};

/// What is known of a notify VM exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NotifyExit {
    /// The guest's context is lost: the registers are not the guest's. KVM_RUN fails with EIO until they have been set.
    pub context_invalid: bool,
    /// RIP of the instruction that has not come to its end, or where the interrupted delivery would return to.
    pub rip: u64,
    /// Exit qualification.
    pub qualification: u64,
    /// IDT-vectoring information (SDM vol. 3C, 25.9.3); the event will be injected again.
    pub vectoring: u32,
    /// IDT-vectoring error code.
    pub error_code: u32,
    /// How long there has been no event window, in ticks of the crystal.
    pub ticks: u64,
    /// How many exits in a row had this RIP, this one included.
    pub repeats: u32,
}

/// What a vCPU remembers of its notify VM exits.
#[derive(Debug, Default)]
pub(super) struct NotifyState {
    /// RIP of the last one, and how many in a row were there.
    last: Option<(u64, u32)>,
    /// The guest's registers are lost.
    context_lost: bool,
    /// #AC was met in the delivery of #AC: that one is not intercepted again.
    alignment_loop: bool,
    /// How long the vCPU was held back after the last exit, in nanoseconds, and until when it is, by the host's time.
    pause: u64,
    until: u64,
}

impl NotifyState {
    /// The client, or INIT, has given the vCPU another context.
    pub(super) fn context_given(&mut self) {
        self.context_lost = false;
    }
}

impl Vcpu {
    /// Before each entry: what the VM's setting says now, and which exceptions exit.
    ///
    /// The kernel intercepts #AC and #DB always, since nothing else ends the loops of XSA-156 on its processors. Here the
    /// notify VM exit does, so with it the exceptions are the guest's own business. Without it #AC exits, for the loop to end
    /// as it does on the kernel; #DB need not, as its loop leaves the processor now and then by itself
    /// ([`HOST_LIMIT`](silicon::system::window::HOST_LIMIT)), which looks the same: endless exits, and a thread that can be
    /// stopped. Split-lock detection has #AC exit in any case.
    pub(super) fn update_intercepts(&mut self) {
        let Setting { enabled, window, .. } = self.vm.policy().notify();
        let mut bitmap = self.debug.intercepts() | self.locks.intercepted();
        if !enabled {
            bitmap |= 1 << vector::AC;
        }
        let injects_ac =
            matches!(self.cpu.injection, Some(Injection::Exception(e)) if e.vector == vector::AC);
        if enabled && self.notify.alignment_loop && injects_ac {
            bitmap &= !(1 << vector::AC);
        }
        let controls = &mut self.cpu.controls;
        controls.notify_exiting = enabled;
        controls.notify_window = window;
        controls.exception_bitmap = bitmap;
    }

    /// An exception that exits and is the guest's after all. #AC met in the delivery of `event` is what the kernel calls
    /// simultaneous exceptions; with the notify VM exit the second one in a row is left to the processor, whose window closes
    /// over it.
    pub(super) fn raise_in_delivery(
        &mut self,
        event: Option<Event>,
        exception: Exception,
    ) -> Option<VcpuExit> {
        let alignment = exception.vector == vector::AC;
        self.notify.alignment_loop = alignment && event.is_some_and(|event| event.vector() == vector::AC);
        match event {
            Some(event) if alignment && !self.vm.policy().notify().enabled => {
                Some(simultaneous_exceptions(event, exception))
            }
            _ => {
                self.events.raise(exception);
                None
            }
        }
    }

    /// A notify VM exit. The guest goes on unless its context is lost: all that is known is that the host has not had a turn.
    pub(super) fn notify_exit(&mut self, notify: Notify) -> Option<VcpuExit> {
        self.handle.stats.notify_window_exits.count();
        let event = self.requeue_vectored();
        self.notify.alignment_loop &= event.is_some_and(|event| event.vector() == vector::AC);
        let exit = self.note(notify, event);
        self.report_notify(&exit);
        if exit.context_invalid {
            self.lose_context();
            return Some(VcpuExit::Notify(exit));
        }
        // With an event the bit is undefined (SDM vol. 3C, 28.2.3; the kernel tests it elsewhere, but not here).
        if notify.nmi_unblocking && event.is_none() {
            self.cpu.state.interruptibility |= interruptibility::NMI;
        }
        self.slow_down(exit.repeats);
        self.vm.policy().notify().user.then_some(VcpuExit::Notify(exit))
    }

    fn note(&mut self, notify: Notify, event: Option<Event>) -> NotifyExit {
        let rip = self.linear_rip();
        let repeats = match self.notify.last {
            Some((last, repeats)) if last == rip => repeats.saturating_add(1),
            _ => 1,
        };
        self.notify.last = Some((rip, repeats));
        NotifyExit {
            context_invalid: notify.context_invalid,
            rip: self.cpu.state.rip,
            qualification: notify.qualification(),
            vectoring: event.map_or(0, vectoring_information),
            error_code: event.and_then(|event| event.error_code()).unwrap_or(0),
            ticks: notify.ticks,
            repeats,
        }
    }

    fn report_notify(&mut self, exit: &NotifyExit) {
        let Some(suppressed) = self.vm.notify_log().allows(self.vm.system().time().now()) else { return };
        let bytes: Vec<_> = self.cpu.instruction_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let what = match *exit {
            NotifyExit { context_invalid: true, .. } => ", context lost",
            NotifyExit { repeats: 2.., .. } => ", no progress",
            _ => "",
        };
        let before =
            if suppressed == 0 { String::new() } else { format!(" ({suppressed} before it not shown)") };
        tracing::warn!(
            "vCPU {}: no event window for {} ticks at RIP {:#x}{what}; instruction {}; vectoring {:#x}{before}",
            self.handle.id(),
            exit.ticks,
            exit.rip,
            if bytes.is_empty() { "not readable".into() } else { bytes.join(" ") },
            exit.vectoring,
        );
    }

    /// What is left of the guest is not worth an entry.
    fn lose_context(&mut self) {
        self.events = super::events::Events { external: self.events.external, ..Default::default() };
        self.cpu.abandon_access();
        self.forget_accesses();
        self.notify.context_lost = true;
    }

    /// EIO while the guest's context is lost.
    pub(super) fn require_context(&self) -> Result<(), Error> {
        if self.notify.context_lost { Err(Error::ContextLost) } else { Ok(()) }
    }

    /// A vCPU that makes no progress gets the processor less and less often.
    fn slow_down(&mut self, repeats: u32) {
        let system = self.vm.system();
        let longest = u64::from(system.host().notify_throttle_ms) * 1_000_000;
        self.notify.pause = match repeats {
            0 | 1 => 0,
            2 => FIRST_PAUSE_NS.min(longest),
            _ => (2 * self.notify.pause).min(longest),
        };
        self.notify.until = system.time().now().saturating_add(self.notify.pause);
    }

    /// Before an entry: whether the vCPU is held back. Waits until that is over, or something else is to be done.
    pub(super) fn is_held_back(&mut self) -> bool {
        if self.notify.pause == 0 {
            return false;
        }
        let time = self.vm.system().time();
        let since = time.now();
        if since >= self.notify.until {
            return false;
        }
        time.wait(self.notify.until, &self.handle);
        let nanoseconds = time.now().saturating_sub(since);
        self.handle.stats.notify_throttle.fetch_add(nanoseconds, Ordering::Relaxed);
        true
    }
}

#[cfg(test)]
mod tests;
