//! The event window: how long the processor has been without a boundary at which an event could get in, and what it
//! does when that takes too long (notify VM exit, which newer SDMs call instruction timeout).
//!
//! An *event window* is an instruction boundary at which NMIs and interrupts would be recognized if they were not
//! masked: after an instruction, between the iterations of a string instruction, after a delivery that leaves no debug
//! trap behind. A debug trap of what has just been done comes before NMIs and interrupts (SDM vol. 3A, table 7-2), so
//! the end of a delivery that leaves one is not a window. Masking has no part in it, nor has a halted CPU.
//!
//! Between two windows the processor counts **virtual crystal ticks** of [`CRYSTAL_HZ`]: one for each attempt to deliver
//! an event that has not opened the window. That is about what a delivery takes on hardware, and unlike host time it
//! makes every run the same. The sequences that go on for ever consist of such attempts and nothing else: a benign fault
//! that its own delivery causes again (CVE-2015-5307), a debug trap that its own delivery sets off (CVE-2015-8104).
//! Everything else inside of an instruction ends by itself.
//!
//! With [`Controls::notify_exiting`](crate::vmx::Controls) the count may reach the part's internal threshold
//! ([`CpuModel::notify_threshold`](crate::model::CpuModel)) plus the window; then guest mode ends with [`Exit::Notify`].
//! Inside of a closed window nothing is polled but this limit and what keeps the host in command, which hardware has not:
//! a kick, and a number of attempts after which a look around is due anyhow. Those exits look like an external
//! interrupt in the middle of a delivery, and the count goes on after them.

use crate::cpu::{Cpu, Requests};
use crate::flags::Rflags;
use crate::system::deliver::Event;
use crate::vmx::{Exit, Notify};

/// Frequency of the crystal that the window is counted in: CPUID.15H:ECX of the parts that have the control.
pub const CRYSTAL_HZ: u32 = 25_000_000;
/// Attempts in a closed window after which the host has a look, control or not: some ten milliseconds.
pub const HOST_LIMIT: u64 = 1 << 15;
/// Attempts before anything is looked at: ordinary combinations of faults end by themselves after three.
const ORDINARY: u64 = 16;

/// The count of one processor.
#[derive(Clone, Debug, Default)]
pub struct EventWindow {
    /// The internal threshold in ticks; `None`: the part has no such exit.
    pub threshold: Option<u32>,
    /// Ticks since the last window.
    ticks: u64,
    /// What it was at the last entry to guest mode.
    at_entry: u64,
    /// The last exit was the host's alone: the window is still closed.
    held: bool,
    /// A stall that a test has asked for.
    #[cfg(any(test, feature = "testing"))]
    pub stall: Option<Stall>,
}

/// Where a stall takes place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StallSite {
    /// Before the instruction at this RIP.
    Instruction(u64),
    /// In IRET, which has unblocked NMIs already.
    Iret,
    /// In the delivery of this vector.
    Delivery(u8),
}

/// A stall: what no program can cause on this processor, for tests of what hypervisors do then.
#[cfg(any(test, feature = "testing"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    /// Where.
    pub site: StallSite,
    /// For how many ticks; it is over then.
    pub ticks: u64,
    /// The exit says that the guest's context is lost.
    pub context_invalid: bool,
    /// The exit says that NMIs were unblocked, whether they were or not.
    pub nmi_unblocking: bool,
}

impl EventWindow {
    /// Ticks since the last event window.
    pub fn ticks(&self) -> u64 {
        self.ticks
    }

    /// The processor is at an event window.
    #[inline]
    pub(crate) fn open(&mut self) {
        self.ticks = 0;
    }

    /// An attempt has not opened it.
    pub(crate) fn tick(&mut self) {
        self.ticks += 1;
    }

    /// Guest mode is entered.
    pub(crate) fn enter(&mut self) {
        if !std::mem::take(&mut self.held) {
            self.ticks = 0;
        }
        self.at_entry = self.ticks;
    }

    /// The host has ended guest mode while a debug trap waits.
    pub(crate) fn hold(&mut self) {
        self.held = self.ticks != 0;
    }

    /// A test has asked for a stall before an instruction.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn stalls_instructions(&self) -> bool {
        matches!(self.stall, Some(Stall { site: StallSite::Instruction(_), .. }))
    }

    #[cfg(not(any(test, feature = "testing")))]
    #[inline(always)]
    pub(crate) fn stalls_instructions(&self) -> bool {
        false
    }
}

impl Cpu {
    /// In a closed window, before the next attempt: whether it may go on. `event` is what is being delivered.
    pub(crate) fn still_closed(&mut self, event: Option<Event>, exit: Notify) -> Result<(), Exit> {
        let window = &self.event_window;
        let exiting = self.controls.notify_exiting;
        if let Some(threshold) = window.threshold.filter(|_| exiting)
            && window.ticks > u64::from(threshold) + u64::from(self.controls.notify_window)
        {
            let ticks = window.ticks;
            self.cut_short(event);
            return Err(Exit::Notify(Notify { ticks, ..exit }));
        }
        let here = window.ticks - window.at_entry;
        if here <= ORDINARY {
            return Ok(());
        }
        // Other CPUs may wait for this one; the guest sees nothing of it.
        let others = self.requests.get() & (Requests::FLUSH | Requests::MAIL | Requests::EXCLUSIVE);
        if others != 0 {
            let requests = self.requests.take(others);
            self.mmu_requests(requests);
        }
        if here > HOST_LIMIT || self.requests.get() & Requests::KICK != 0 {
            self.requests.take(Requests::KICK);
            self.event_window.held = true;
            self.cut_short(event);
            return Err(if self.page_log_full() { Exit::PageLogFull } else { Exit::ExternalInterrupt });
        }
        Ok(())
    }

    /// Guest mode ends in the delivery of `event`: what its begin has done is to be seen, and the event goes into the
    /// IDT-vectoring information (SDM vol. 3C, 28.2.4, and 28.3.3 for RF).
    pub(crate) fn cut_short(&mut self, event: Option<Event>) {
        self.exit_instruction_length = 0;
        match event {
            Some(Event::Software { next_ip, .. } | Event::Int1 { next_ip }) => {
                self.exit_instruction_length = next_ip.wrapping_sub(self.state.rip) as u8;
            }
            Some(Event::Exception(exception)) => {
                self.record_payload(Event::Exception(exception));
                if exception.sets_resume_flag() {
                    self.state.rflags_system |= Rflags::RF.bits();
                }
            }
            _ => {}
        }
        self.idt_vectoring = event;
    }

    /// Where a test may have asked for a stall in a delivery or before an instruction.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn stalled(&mut self, site: StallSite, event: Option<Event>) -> Result<(), Exit> {
        while let Some(stall) = self.event_window.stall.as_mut().filter(|stall| stall.site == site) {
            if stall.ticks == 0 {
                self.event_window.stall = None;
                self.event_window.open();
                break;
            }
            stall.ticks -= 1;
            let Stall { context_invalid, nmi_unblocking, .. } = *stall;
            self.event_window.tick();
            self.still_closed(event, Notify { context_invalid, nmi_unblocking, ticks: 0 })?;
        }
        Ok(())
    }

    #[cfg(not(any(test, feature = "testing")))]
    #[inline(always)]
    pub(crate) fn stalled(&mut self, _: StallSite, _: Option<Event>) -> Result<(), Exit> {
        Ok(())
    }

    /// The same within IRET, which has unblocked NMIs if `unblocked`. What other CPUs want is not done in the middle of
    /// a block: the instruction is given up for it.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn stalled_in_iret(&mut self, unblocked: bool) -> Result<(), crate::exception::Abort> {
        let foreign = Requests::FLUSH | Requests::MAIL | Requests::EXCLUSIVE | Requests::KICK;
        if let Some(stall) = &mut self.event_window.stall {
            stall.nmi_unblocking |= unblocked && stall.site == StallSite::Iret;
        }
        if self.requests.get() & foreign != 0 {
            return Err(self.retry());
        }
        self.stalled(StallSite::Iret, None).map_err(|exit| self.exit(exit))
    }

    #[cfg(not(any(test, feature = "testing")))]
    #[inline(always)]
    pub(crate) fn stalled_in_iret(&mut self, _: bool) -> Result<(), crate::exception::Abort> {
        Ok(())
    }
}
