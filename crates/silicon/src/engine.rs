//! The interpreter's main loop: guest mode from entry to exit.

use std::time::Duration;

use crate::code::BlockRef;
use crate::code::op::Op;
use crate::cpu::{Cpu, Pending, Requests};
use crate::exception::{Abort, Exception};
use crate::flags::Rflags;
use crate::state::{Activity, interruptibility};
use crate::system::debug::DR6_BS;
use crate::system::deliver::Event;
use crate::system::window::StallSite;
use crate::vmx::{Exit, Injection};

/// The interrupt shadows of STI and MOV SS.
const SHADOWS: u32 = interruptibility::STI | interruptibility::MOV_SS;
/// Between two looks at the requests at most so many instructions are executed, in a block or a region of translated code; closer to
/// the limit we step.
const BLOCK_LONGEST: u64 = 320;

/// How long a CPU that waits in guest mode sleeps between looks at its requests.
const WAIT: Duration = Duration::from_micros(20);

/// What to run next.
enum Next {
    /// A block.
    Block,
    /// One instruction, then look again.
    Step,
    /// Nothing: look again at once.
    Again,
    /// Nothing: the CPU is not active, and waits for a request in guest mode.
    Wait,
}

impl Cpu {
    /// Enters guest mode and stays there until something exits (VM entry to VM exit).
    ///
    /// Before it: registers, [`Cpu::controls`], [`Cpu::injection`], and [`Cpu::complete_read`] if the last exit
    /// carried an access. After it: RIP is at the instruction that exited, not past it, and
    /// [`Cpu::exit_instruction_length`] is its length.
    ///
    /// What devices, or anyone else, have written to memory since the last exit is seen as code from now on.
    pub fn run(&mut self) -> Exit {
        self.code.new_epoch();
        self.resume()
    }

    /// [`Cpu::run`] after an exit that the hypervisor has dealt with by itself: code that was written by others
    /// meanwhile may be executed as it was, until an interrupt or a new mapping tells the guest of it.
    pub fn resume(&mut self) -> Exit {
        self.mmu_enter();
        self.idt_vectoring = None;
        self.event_window.enter();
        self.refused_lock = None;
        self.refresh_local();
        self.hostexec_enter();
        let exit = self.run_guest();
        self.translator_leave();
        self.hostexec_leave();
        self.exit_bus_lock = std::mem::take(&mut self.bus_lock_taken) && self.controls.bus_lock_detection;
        self.mmu_leave();
        self.replay.cursor = 0;
        exit
    }

    fn run_guest(&mut self) -> Exit {
        if self.replay.done.is_empty()
            && let Some(injection) = self.injection.take()
            && let Err(exit) = self.inject(injection)
        {
            return exit;
        }
        loop {
            let step = if self.requests.any() {
                match self.attend() {
                    Ok(Next::Block) => false,
                    Ok(Next::Step) => true,
                    Ok(Next::Again) => continue,
                    Ok(Next::Wait) => {
                        std::thread::sleep(WAIT);
                        continue;
                    }
                    Err(exit) => return exit,
                }
            } else {
                false
            };
            let result = if step {
                self.step()
            } else {
                self.fetch(false).and_then(|block| self.run_block(block, true))
            };
            if result.is_err()
                && let Err(exit) = self.unwind()
            {
                return exit;
            }
        }
    }

    /// The block at RIP; a fault in fetching it is not an instruction's.
    #[inline(always)]
    fn fetch(&mut self, single: bool) -> Result<BlockRef, Abort> {
        let block = self.find_block(single);
        if block.is_err() {
            self.exit_instruction_length = 0;
        }
        block
    }

    /// Runs one instruction with everything that hangs on instruction boundaries: breakpoints, single-step
    /// traps, interrupt shadows, the replay of exited accesses.
    fn step(&mut self) -> Result<(), Abort> {
        self.check_code_breakpoint()?;
        self.trap_after = self.state.flag(Rflags::TF);
        let shadow = self.state.interruptibility & SHADOWS;
        let rip = self.state.rip;
        self.stalled(StallSite::Instruction(rip), None).map_err(|exit| self.exit(exit))?;
        let block = self.fetch(true)?;
        // What an instruction hit that then did not complete is not reported.
        self.mmu.take_debug_hits();
        // RF holds for one instruction; IRET and task switches give a new one.
        let resume = self.state.rflags_system & Rflags::RF.bits();
        self.state.rflags_system &= !Rflags::RF.bits();
        self.stepping = true;
        let result = self.run_block(block, false);
        self.stepping = false;
        let undone = result.is_err();
        if undone {
            self.state.rflags_system |= resume;
        }
        if !undone || !matches!(self.pending, Pending::Exit(_) | Pending::Retry) {
            self.note_port_breakpoints();
            self.replay.done.clear();
            self.replay.cursor = 0;
            self.end_lock_permission();
        }
        result?;
        // A shadow that this very instruction began stays; the one it ran under is over.
        self.state.interruptibility &= !shadow;
        let repeats = block.first().has(Op::REP) || block.first().has(Op::REPNE);
        if repeats && self.state.rip == rip {
            // Between the iterations of a string instruction its breakpoint is not met again.
            self.state.rflags_system |= Rflags::RF.bits();
        }
        self.pending_debug |= self.mmu.take_debug_hits();
        let mov_ss = self.state.interruptibility & interruptibility::MOV_SS != 0;
        if self.trap_after && !mov_ss {
            self.pending_debug |= DR6_BS;
        }
        let bus_lock = self.bus_lock_is_due();
        self.refresh_local();
        if bus_lock && !self.controls.monitor_trap_flag {
            self.exit_instruction_length = 0;
            return Err(self.exit(Exit::BusLock));
        }
        self.raise_pending_debug()?;
        if self.controls.monitor_trap_flag {
            return Err(self.exit(Exit::MonitorTrap));
        }
        Ok(())
    }

    /// Debug traps of the previous instruction, unless a MOV SS shadow holds them back; before them the fault
    /// of a task switch.
    fn raise_pending_debug(&mut self) -> Result<(), Abort> {
        if let Some(fault) = self.deferred.take() {
            self.exit_instruction_length = 0;
            return Err(self.raise_again(fault));
        }
        let held = self.state.interruptibility & interruptibility::MOV_SS != 0;
        if self.pending_debug == 0 || held {
            return Ok(());
        }
        self.exit_instruction_length = 0;
        let dr6 = std::mem::take(&mut self.pending_debug);
        Err(self.raise(Exception::db(dr6)))
    }

    /// The hypervisor completed the instruction that exited: what its completion means for shadows and traps.
    pub(crate) fn instruction_skipped(&mut self) {
        self.state.interruptibility &= !SHADOWS;
        self.state.rflags_system &= !Rflags::RF.bits();
        if self.state.flag(Rflags::TF) {
            self.pending_debug |= DR6_BS;
        }
        self.state.activity = Activity::Active;
        self.end_lock_permission();
    }

    /// Deals with why an instruction did not complete: delivers its exception, or leaves guest mode.
    #[cold]
    fn unwind(&mut self) -> Result<(), Exit> {
        match std::mem::replace(&mut self.pending, Pending::None) {
            Pending::Exit(exit) => Err(exit),
            Pending::Exception(exception) => {
                self.replay.done.clear();
                self.replay.cursor = 0;
                self.end_lock_permission();
                if self.controls.exception_bitmap & (1 << exception.vector) != 0 {
                    return Err(Exit::Exception(exception));
                }
                self.idt_vectoring = None;
                self.refused_lock = None;
                self.deliver(Event::Exception(exception))?;
                self.refresh_local();
                Ok(())
            }
            Pending::Retry | Pending::None => {
                self.replay.cursor = 0;
                Ok(())
            }
        }
    }

    fn inject(&mut self, injection: Injection) -> Result<(), Exit> {
        if matches!(injection, Injection::Interrupt(_) | Injection::Nmi) {
            self.code.new_epoch();
        }
        let event = match injection {
            Injection::Interrupt(vector) | Injection::Local(vector) => Event::Interrupt(vector),
            Injection::Nmi => Event::Nmi,
            Injection::Exception(exception) => Event::Injected(exception),
            Injection::Software { vector, length } => {
                let next_ip = self.state.rip.wrapping_add(u64::from(length)) & self.state.eip_mask();
                Event::Software { vector, next_ip }
            }
        };
        self.state.activity = Activity::Active;
        self.deliver(event)?;
        self.refresh_local();
        Ok(())
    }

    /// Between blocks: everything that asked for attention.
    #[cold]
    fn attend(&mut self) -> Result<Next, Exit> {
        if !self.replay.done.is_empty() {
            return Ok(Next::Step);
        }
        if self.requests.get() & Requests::FOREIGN != 0 {
            let requests = self.requests.take(Requests::FOREIGN);
            self.mmu_requests(requests);
            if requests & Requests::KICK != 0 {
                self.exit_instruction_length = 0;
                if self.pending_debug != 0 {
                    self.event_window.hold();
                }
                let full = self.page_log_full();
                return Err(if full { Exit::PageLogFull } else { Exit::ExternalInterrupt });
            }
        }
        if self.counters.instructions >= self.controls.instruction_limit {
            return Err(Exit::Budget);
        }
        if self.raise_pending_debug().is_err() {
            self.unwind()?;
            if self.pending_debug != 0 {
                // Its delivery has set off the next one, which comes before the handler's first instruction.
                return Ok(Next::Again);
            }
        }
        if self.controls.smi_exiting && self.smi_allowed() {
            self.exit_instruction_length = 0;
            return Err(Exit::Smi);
        }
        if self.controls.nmi_window_exiting && self.nmi_allowed() {
            return Err(Exit::NmiWindow);
        }
        if self.controls.interrupt_window_exiting && self.interrupt_allowed() {
            return Err(Exit::InterruptWindow);
        }
        if self.state.activity != Activity::Active {
            return Ok(Next::Wait);
        }
        let close_to_limit = self.controls.instruction_limit - self.counters.instructions < BLOCK_LONGEST;
        let window = self.controls.interrupt_window_exiting || self.controls.nmi_window_exiting;
        let shadow = self.state.interruptibility & SHADOWS != 0;
        if self.state.flag(Rflags::TF)
            || self.state.any_breakpoint()
            || self.pending_debug != 0
            || self.controls.monitor_trap_flag
            || self.event_window.stalls_instructions()
            || self.step_next
            || self.permitted_lock.is_some()
            || close_to_limit
            // Whoever has to decide whether the instruction can wait for memory sees that it runs in a shadow.
            || (shadow && (window || self.ept.is_lazy()))
        {
            return Ok(Next::Step);
        }
        // Nothing looks at the boundary after the next instruction, and a block runs at least one: the shadow
        // is over and RF has done its work by the next boundary that anybody sees.
        self.state.interruptibility &= !SHADOWS;
        self.state.rflags_system &= !Rflags::RF.bits();
        self.refresh_local();
        Ok(Next::Block)
    }

    /// Whether an external interrupt could be delivered before the next instruction.
    pub fn interrupt_allowed(&self) -> bool {
        self.state.flag(Rflags::IF)
            && self.state.interruptibility & SHADOWS == 0
            && self.pending_debug == 0
            && self.replay.done.is_empty()
            && self.replay.waiting.is_none()
    }

    /// Whether an NMI could be delivered before the next instruction.
    pub fn nmi_allowed(&self) -> bool {
        let blocking = SHADOWS | interruptibility::NMI;
        self.state.interruptibility & blocking == 0
            && self.pending_debug == 0
            && self.replay.done.is_empty()
            && self.replay.waiting.is_none()
    }

    /// Recomputes whether block boundaries need a look at our own state. Called by everything that changes TF,
    /// IF, an interrupt shadow or DR7; such instructions also end their block.
    pub(crate) fn refresh_local(&mut self) {
        let controls = &self.controls;
        let local = self.state.flag(Rflags::TF | Rflags::RF)
            || self.state.interruptibility & SHADOWS != 0
            || self.state.activity != Activity::Active
            || self.pending_debug != 0
            || self.deferred.is_some()
            || self.state.any_breakpoint()
            || controls.interrupt_window_exiting
            || controls.nmi_window_exiting
            || controls.smi_exiting
            || controls.monitor_trap_flag
            || self.event_window.stalls_instructions()
            || self.step_next
            || self.permitted_lock.is_some()
            || !self.replay.done.is_empty();
        let limit = controls.instruction_limit != u64::MAX;
        // Nobody else changes these bits, so they are written only when they have to be.
        for (on, bit) in [(local, Requests::LOCAL), (limit, Requests::LIMIT)] {
            if on && self.requests.get() & bit == 0 {
                self.requests.post(bit);
            } else if !on && self.requests.get() & bit != 0 {
                self.requests.take(bit);
            }
        }
    }
}
