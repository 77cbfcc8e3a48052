//! The interpreter's main loop: guest mode from entry to exit.

use crate::code::BlockRef;
use crate::code::op::Flow;
use crate::cpu::{Cpu, Pending, Requests};
use crate::exception::{Abort, Exception};
use crate::flags::Rflags;
use crate::state::{Activity, interruptibility};
use crate::system::deliver::Event;
use crate::vmx::{Exit, Injection};

/// DR6.BS: single step.
const DR6_BS: u64 = 1 << 14;
/// DR7 bits that enable breakpoints 0 to 3, locally or globally.
const DR7_ENABLES: u64 = 0xff;
/// A block has at most this many instructions; closer to the limit we step.
const BLOCK_LONGEST: u64 = 64;

/// What to run next.
enum Next {
    /// A block.
    Block,
    /// One instruction, then look again.
    Step,
}

impl Cpu {
    /// Enters guest mode and stays there until something exits (VM entry to VM exit).
    ///
    /// Before it: registers, [`Cpu::controls`], [`Cpu::injection`], and [`Cpu::complete_read`] if the last exit
    /// carried an access. After it: RIP is at the instruction that exited, not past it, and
    /// [`Cpu::exit_instruction_length`] is its length.
    pub fn run(&mut self) -> Exit {
        self.mmu_enter();
        self.code.new_epoch();
        self.refresh_local();
        self.hostexec_enter();
        let exit = self.run_guest();
        self.hostexec_leave();
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
                    Err(exit) => return exit,
                }
            } else {
                false
            };
            let result = match self.find_block(step) {
                Ok(_) if step => self.step(),
                Ok(block) => self.execute(block).map(|_| ()),
                Err(abort) => {
                    self.exit_instruction_length = 0;
                    Err(abort)
                }
            };
            if result.is_err()
                && let Err(exit) = self.unwind()
            {
                return exit;
            }
        }
    }

    /// Runs a block to its end, or to the instruction that aborts.
    #[inline(always)]
    fn execute(&mut self, block: BlockRef) -> Result<Flow, Abort> {
        let ops = block.ops();
        for (done, op) in ops.iter().enumerate() {
            match (op.handler.get())(self, op) {
                Ok(Flow::Next) => {}
                Ok(Flow::End) => {
                    self.counters.instructions += done as u64 + 1;
                    return Ok(Flow::End);
                }
                Err(abort) => {
                    self.counters.instructions += done as u64;
                    self.state.rip = self.ip_of(op);
                    self.exit_instruction_length = op.length;
                    return Err(abort);
                }
            }
        }
        Ok(Flow::End)
    }

    /// Runs one instruction with everything that hangs on instruction boundaries: single-step traps,
    /// interrupt shadows, the replay of exited accesses.
    fn step(&mut self) -> Result<(), Abort> {
        let trap = self.state.flag(Rflags::TF);
        let shadow = self.state.interruptibility & (interruptibility::STI | interruptibility::MOV_SS);
        let block = self.find_block(true)?;
        // What an instruction hit that then did not complete is not reported.
        self.mmu.take_debug_hits();
        let result = self.execute(block);
        if result.is_ok() || !matches!(self.pending, Pending::Exit(_) | Pending::Retry) {
            self.replay.done.clear();
            self.replay.cursor = 0;
        }
        result?;
        // A shadow that this very instruction began stays; the one it ran under is over.
        self.state.interruptibility &= !shadow;
        self.state.rflags_system &= !Rflags::RF.bits();
        let mov_ss = self.state.interruptibility & interruptibility::MOV_SS != 0;
        let mut dr6 = self.mmu.take_debug_hits();
        if trap && !mov_ss {
            dr6 |= DR6_BS;
        }
        self.refresh_local();
        if dr6 != 0 {
            self.exit_instruction_length = 0;
            return Err(self.raise(Exception::db(dr6)));
        }
        if self.controls.monitor_trap_flag {
            return Err(self.exit(Exit::MonitorTrap));
        }
        Ok(())
    }

    /// Deals with why an instruction did not complete: delivers its exception, or leaves guest mode.
    #[cold]
    fn unwind(&mut self) -> Result<(), Exit> {
        match std::mem::replace(&mut self.pending, Pending::None) {
            Pending::Exit(exit) => Err(exit),
            Pending::Exception(exception) => {
                self.replay.done.clear();
                self.replay.cursor = 0;
                if self.controls.exception_bitmap & (1 << exception.vector) != 0 {
                    return Err(Exit::Exception(exception));
                }
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
        self.code.new_epoch();
        let event = match injection {
            Injection::Interrupt(vector) => Event::Interrupt(vector),
            Injection::Nmi => Event::Nmi,
            Injection::Exception(exception) => Event::Exception(exception),
            Injection::Software { vector, length } => {
                let next_ip = self.state.rip.wrapping_add(u64::from(length)) & self.state.ip_mask();
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
        let requests =
            self.requests.take(Requests::KICK | Requests::FLUSH | Requests::MAIL | Requests::EXCLUSIVE);
        self.mmu_requests(requests);
        if requests & Requests::KICK != 0 {
            self.exit_instruction_length = 0;
            return Err(Exit::ExternalInterrupt);
        }
        if self.counters.instructions >= self.controls.instruction_limit {
            return Err(Exit::Budget);
        }
        if self.controls.nmi_window_exiting && self.nmi_allowed() {
            return Err(Exit::NmiWindow);
        }
        if self.controls.interrupt_window_exiting && self.interrupt_allowed() {
            return Err(Exit::InterruptWindow);
        }
        let close_to_limit = self.controls.instruction_limit - self.counters.instructions < BLOCK_LONGEST;
        let step = self.state.flag(Rflags::TF)
            || self.state.interruptibility & (interruptibility::STI | interruptibility::MOV_SS) != 0
            || self.state.dr7 & DR7_ENABLES != 0
            || self.controls.monitor_trap_flag
            || close_to_limit;
        if step { Ok(Next::Step) } else { Ok(Next::Block) }
    }

    /// Whether an external interrupt could be delivered before the next instruction.
    pub fn interrupt_allowed(&self) -> bool {
        let blocking = interruptibility::STI | interruptibility::MOV_SS;
        self.state.flag(Rflags::IF)
            && self.state.interruptibility & blocking == 0
            && self.replay.done.is_empty()
            && self.replay.waiting.is_none()
    }

    /// Whether an NMI could be delivered before the next instruction.
    pub fn nmi_allowed(&self) -> bool {
        let blocking = interruptibility::STI | interruptibility::MOV_SS | interruptibility::NMI;
        self.state.interruptibility & blocking == 0
            && self.replay.done.is_empty()
            && self.replay.waiting.is_none()
    }

    /// Recomputes whether block boundaries need a look at our own state. Called by everything that changes TF,
    /// IF, an interrupt shadow or DR7; such instructions also end their block.
    pub(crate) fn refresh_local(&mut self) {
        let controls = &self.controls;
        let local = self.state.flag(Rflags::TF)
            || self.state.interruptibility & (interruptibility::STI | interruptibility::MOV_SS) != 0
            || self.state.dr7 & DR7_ENABLES != 0
            || controls.interrupt_window_exiting
            || controls.nmi_window_exiting
            || controls.monitor_trap_flag
            || controls.instruction_limit != u64::MAX
            || !self.replay.done.is_empty();
        if local {
            self.requests.post(Requests::LOCAL);
        } else {
            self.requests.take(Requests::LOCAL);
        }
    }
}
