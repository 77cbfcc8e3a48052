//! Delivery of exceptions and interrupts through the IDT (SDM vol. 3A, chapter 6; vol. 2, INT n).

use crate::cpu::{Cpu, Pending, Requests};
use crate::exception::{Abort, Exception, vector};
use crate::flags::Rflags;
use crate::state::{Activity, CodeSize, Seg, Segment, cr0, interruptibility};
use crate::system::debug::{DR6_BD, DR6_BUS_LOCK, DR6_TRAPS, dr7};
use crate::system::segment::{Descriptor, code, is_null, kind};
use crate::system::stack::Stack;
use crate::system::task::{Nesting, TaskEntry};
use crate::system::window::StallSite;
use crate::vmx::{Exit, Notify, Space};

/// What is delivered through the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A fault, trap or abort that the processor detected. RIP is already where the handler returns to.
    Exception(Exception),
    /// An exception that VM entry injects. As on VMX, CR2, DR6, DR7.GD and RFLAGS.RF are the hypervisor's to
    /// set beforehand (SDM vol. 3C, 26.6.1.1): delivery neither changes them nor looks at the payload.
    Injected(Exception),
    /// An external interrupt.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// INT n, INT3 or INTO: gates are checked against CPL. `next_ip` is the return address; RIP still points
    /// at the instruction.
    Software {
        /// Vector.
        vector: u8,
        /// RIP after the instruction.
        next_ip: u64,
    },
    /// INT1: #DB from an instruction, without a check of the gate's DPL.
    Int1 {
        /// RIP after the instruction.
        next_ip: u64,
    },
}

impl Event {
    /// Vector number.
    pub fn vector(&self) -> u8 {
        match *self {
            Event::Exception(e) | Event::Injected(e) => e.vector,
            Event::Interrupt(vector) | Event::Software { vector, .. } => vector,
            Event::Nmi => vector::NMI,
            Event::Int1 { .. } => vector::DB,
        }
    }

    /// The error code that is pushed.
    pub fn error_code(&self) -> Option<u32> {
        match *self {
            Event::Exception(e) | Event::Injected(e) => e.error_code,
            _ => None,
        }
    }

    /// EXT: a fault met in the delivery was not caused by a software interrupt (SDM vol. 3A, 6.13).
    fn external(&self) -> bool {
        !matches!(self, Event::Software { .. })
    }

    /// The exception, if that is what it is.
    fn exception(&self) -> Option<Exception> {
        match *self {
            Event::Exception(e) | Event::Injected(e) => Some(e),
            _ => None,
        }
    }
}

/// What becomes of an exception met while `Event` is delivered (SDM vol. 3A, table 6-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Combination {
    /// The new exception is delivered instead.
    Serial,
    /// #DF.
    DoubleFault,
    /// Shutdown.
    TripleFault,
}

fn combine(first: Option<Exception>, second: u8) -> Combination {
    let contributory = Exception::is_contributory(second);
    let page_fault = matches!(second, vector::PF | vector::VE);
    match first.map(|e| e.vector) {
        Some(vector::DF) if contributory || page_fault => Combination::TripleFault,
        Some(vector::PF | vector::VE) if contributory || page_fault => Combination::DoubleFault,
        Some(first) if Exception::is_contributory(first) && contributory => Combination::DoubleFault,
        _ => Combination::Serial,
    }
}

/// What delivery pushes: captured before anything changes.
struct Frame {
    event: Event,
    flags: u64,
    cs: u16,
    ip: u64,
}

impl Cpu {
    /// Delivers `event`, and whatever faults its delivery meets in turn: contributory faults become #DF,
    /// a fault in that a triple fault. Iterative, so that no guest can make the host recurse.
    ///
    /// Interrupts and NMIs are benign (SDM vol. 3A, 6.15): a fault in their delivery is delivered in their place, for
    /// the interrupted instruction, and they are lost for the processor as they are on hardware, where the APIC has
    /// handed them over. Only an intercepted fault hands them to the hypervisor, as IDT-vectoring information.
    ///
    /// A benign fault that its own delivery causes again (#AC for a user-mode handler on an odd stack) goes on for
    /// ever: nothing but what [`super::window`] says ends it.
    pub(crate) fn deliver(&mut self, event: Event) -> Result<(), Exit> {
        // Bus locks of the delivery are looked at right after it.
        self.stepping = true;
        let delivered = self.deliver_serially(event);
        self.stepping = false;
        self.end_lock_permission();
        delivered?;
        if self.bus_lock_is_due() { Err(Exit::BusLock) } else { Ok(()) }
    }

    fn deliver_serially(&mut self, event: Event) -> Result<(), Exit> {
        let mut current = event;
        self.mmu.take_debug_hits();
        loop {
            self.still_closed(Some(current), Notify::default())?;
            self.stalled(StallSite::Delivery(current.vector()), Some(current))?;
            if self.deliver_once(current).is_ok() {
                // Watched words that the delivery itself pushed to: a trap before the handler's first instruction.
                self.pending_debug |= self.mmu.take_debug_hits();
                match self.pending_debug {
                    0 => self.event_window.open(),
                    _ => self.event_window.tick(),
                }
                return Ok(());
            }
            match std::mem::replace(&mut self.pending, Pending::None) {
                Pending::Exception(met) => {
                    self.event_window.tick();
                    current = self.met_in_delivery(current, met)?;
                }
                Pending::Exit(exit) => {
                    self.cut_short(Some(current));
                    return Err(self.delivery_exit(exit));
                }
                Pending::Retry | Pending::None => {
                    let bits = Requests::FLUSH | Requests::MAIL | Requests::EXCLUSIVE;
                    let requests = self.requests.take(bits);
                    self.mmu_requests(requests);
                }
            }
        }
    }

    /// The event to deliver after exception `met` in the delivery of `current`.
    fn met_in_delivery(&mut self, current: Event, met: Exception) -> Result<Event, Exit> {
        let met = met.with_ext(current.external());
        let intercepted = |vector: u8, bitmap: u32| bitmap & (1 << vector) != 0;
        let bitmap = self.controls.exception_bitmap;
        if intercepted(met.vector, bitmap) {
            self.cut_short(Some(current));
            return Err(Exit::Exception(met));
        }
        self.refused_lock = None;
        match combine(current.exception(), met.vector) {
            Combination::Serial => Ok(Event::Exception(met)),
            Combination::TripleFault => Err(Exit::TripleFault),
            Combination::DoubleFault => {
                if met.vector == vector::PF {
                    self.state.cr2 = met.payload;
                }
                if intercepted(vector::DF, bitmap) {
                    self.cut_short(Some(current));
                    return Err(Exit::Exception(Exception::DF));
                }
                Ok(Event::Exception(Exception::DF))
            }
        }
    }

    /// An access of the delivery itself left guest mode: it cannot be completed and repeated like an
    /// instruction's, so a stack or table in MMIO is an emulation failure.
    fn delivery_exit(&mut self, exit: Exit) -> Exit {
        self.replay.waiting = None;
        self.replay.done.clear();
        self.replay.cursor = 0;
        match exit {
            Exit::EptViolation(access) if access.space == Space::Memory => {
                Exit::FetchFailed { gpa: access.address }
            }
            exit => exit,
        }
    }

    /// Delivers an event that the running instruction is: INT n, INT3, INTO, INT1. A fault in it is the
    /// instruction's own.
    pub(crate) fn deliver_instruction(&mut self, event: Event) -> Result<(), Abort> {
        let result = self.deliver_once(event);
        match &mut self.pending {
            Pending::Exception(met) if result.is_err() => {
                *met = met.with_ext(event.external());
                self.idt_vectoring = Some(event);
            }
            _ => {}
        }
        self.refresh_local();
        result
    }

    /// One attempt at delivery. On `Err` the guest's registers are as they were.
    pub(crate) fn deliver_once(&mut self, event: Event) -> Result<(), Abort> {
        self.record_payload(event);
        let ip = match event {
            Event::Software { next_ip, .. } | Event::Int1 { next_ip } => next_ip,
            _ => self.state.rip,
        };
        let mut flags = self.state.rflags();
        match event {
            // SDM vol. 3B, 17.3.1.1: faults return with RF set, but for instruction breakpoints, which leave
            // that to their handler.
            Event::Exception(e) if e.sets_resume_flag() => flags |= Rflags::RF.bits(),
            Event::Software { .. } | Event::Int1 { .. } => flags &= !Rflags::RF.bits(),
            _ => {}
        }
        let frame = Frame { event, flags, cs: self.state.segs[Seg::Cs as usize].selector, ip };
        if event == Event::Nmi {
            self.state.interruptibility |= interruptibility::NMI;
        }
        self.delivering = true;
        let delivered = match self.state.cr0 & cr0::PE {
            0 => self.deliver_real(&frame),
            _ => self.deliver_protected(&frame),
        };
        self.delivering = false;
        delivered?;
        self.state.interruptibility &= !(interruptibility::STI | interruptibility::MOV_SS);
        self.state.activity = Activity::Active;
        self.trap_after = false;
        match event {
            Event::Exception(_) | Event::Injected(_) => self.counters.exceptions += 1,
            Event::Interrupt(_) | Event::Nmi => self.counters.interrupts += 1,
            Event::Software { .. } | Event::Int1 { .. } => {}
        }
        Ok(())
    }

    /// CR2 for a page fault, DR6 and DR7 for a debug exception.
    pub(crate) fn record_payload(&mut self, event: Event) {
        let Event::Exception(e) = event else { return };
        match e.vector {
            vector::PF => self.state.cr2 = e.payload,
            vector::DB => {
                let kept = self.state.dr6 & !(DR6_TRAPS | e.payload & DR6_BUS_LOCK);
                self.state.dr6 = kept | e.payload & !DR6_BUS_LOCK;
                self.state.dr7 &= !dr7::GD;
            }
            _ => {}
        }
    }

    /// Real-address mode: the interrupt vector table (SDM vol. 3B, 20.1.4).
    fn deliver_real(&mut self, frame: &Frame) -> Result<(), Abort> {
        let entry = u64::from(frame.event.vector()) * 4;
        if entry + 3 > u64::from(self.state.idtr.limit) {
            return Err(self.raise(Exception::gp(idt_code(frame.event.vector()))));
        }
        let entry: u32 = self.system_load(self.system_linear(self.state.idtr.base, entry))?;
        let mut stack = Stack::current(&self.state);
        stack.reserve(self, 3, 2)?;
        stack.push(self, 2, frame.flags)?;
        stack.push(self, 2, u64::from(frame.cs))?;
        stack.push(self, 2, frame.ip)?;
        stack.commit_pointer(self);
        let clear = Rflags::IF | Rflags::TF | Rflags::AC | Rflags::RF;
        self.state.rflags_system &= !clear.bits();
        let cs = self.state.segs[Seg::Cs as usize].real((entry >> 16) as u16);
        self.transfer(cs, 0, u64::from(entry & 0xffff));
        Ok(())
    }

    fn deliver_protected(&mut self, frame: &Frame) -> Result<(), Abort> {
        let gate = self.idt_gate(frame.event)?;
        if gate.kind() == kind::TASK_GATE {
            return self.deliver_to_task(frame, &gate);
        }
        let (cs, cpl) = self.handler_segment(&gate)?;
        let size = match gate.kind() {
            _ if self.state.long_mode() => 8,
            kind::INTERRUPT_GATE16 | kind::TRAP_GATE16 => 2,
            _ => 4,
        };
        let from_v8086 = self.state.v8086();
        let inner = cpl < self.state.cpl;
        let (mut stack, full) = if self.state.long_mode() {
            (self.handler_stack64(&gate, cpl)?, true)
        } else if inner {
            (self.tss_stack(cpl)?, true)
        } else {
            (Stack::current(&self.state), false)
        };
        let error_code = frame.event.error_code();
        let slots = 3 + 2 * u64::from(full) + 4 * u64::from(from_v8086) + u64::from(error_code.is_some());
        stack.reserve(self, slots, size)?;
        self.check_far_target(&cs, gate.gate_offset())?;

        let old = self.state.segs;
        if from_v8086 {
            for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
                stack.push(self, size, u64::from(old[seg as usize].selector))?;
            }
        }
        if full {
            stack.push(self, size, u64::from(old[Seg::Ss as usize].selector))?;
            stack.push(self, size, self.rsp())?;
        }
        stack.push(self, size, frame.flags)?;
        stack.push(self, size, u64::from(frame.cs))?;
        stack.push(self, size, frame.ip)?;
        if let Some(error_code) = error_code {
            stack.push(self, size, u64::from(error_code))?;
        }

        let mut clear = Rflags::TF | Rflags::NT | Rflags::VM | Rflags::RF;
        if gate.kind() & 1 == 0 {
            clear |= Rflags::IF;
        }
        self.state.rflags_system &= !clear.bits();
        if inner {
            stack.commit(self);
        } else {
            stack.commit_pointer(self);
        }
        if from_v8086 {
            for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
                self.set_segment(seg, Segment::null(0, 0));
            }
        }
        self.transfer(cs, cpl, gate.gate_offset());
        Ok(())
    }

    /// The IDT's gate for `event`, checked.
    fn idt_gate(&mut self, event: Event) -> Result<Descriptor, Abort> {
        let long = self.state.long_mode();
        let vector = event.vector();
        let size = if long { 16 } else { 8 };
        let offset = u64::from(vector) * size;
        let fault = Exception::gp(idt_code(vector));
        if offset + size - 1 > u64::from(self.state.idtr.limit) {
            return Err(self.raise(fault));
        }
        let address = self.system_linear(self.state.idtr.base, offset);
        let low = self.system_load(address)?;
        let high = if long { self.system_load(address.wrapping_add(8))? } else { 0 };
        let gate = Descriptor { low, high, address };
        let valid = match gate.kind() {
            kind::INTERRUPT_GATE | kind::TRAP_GATE => true,
            kind::INTERRUPT_GATE16 | kind::TRAP_GATE16 | kind::TASK_GATE => !long,
            _ => false,
        };
        let software = matches!(event, Event::Software { .. });
        if !gate.is_system() || !valid || (software && gate.dpl() < self.state.cpl) {
            return Err(self.raise(fault));
        }
        if !gate.present() {
            return Err(self.raise(Exception::np(idt_code(vector))));
        }
        Ok(gate)
    }

    /// The handler's code segment and the privilege level that it runs at.
    fn handler_segment(&mut self, gate: &Descriptor) -> Result<(Segment, u8), Abort> {
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(self.raise(Exception::gp(0)));
        }
        let fault = Exception::gp(code(selector));
        let descriptor = self.descriptor_or(selector, fault)?;
        let wrong_size = self.state.long_mode() && (!descriptor.long() || descriptor.big());
        if !descriptor.is_code() || descriptor.dpl() > self.state.cpl || wrong_size {
            return Err(self.raise(fault));
        }
        if !descriptor.present() {
            return Err(self.raise(Exception::np(code(selector))));
        }
        let cpl = if descriptor.is_conforming_code() { self.state.cpl } else { descriptor.dpl() };
        if self.state.v8086() && cpl != 0 {
            return Err(self.raise(fault));
        }
        self.touch_descriptor(&descriptor)?;
        let mut cs = descriptor.segment(selector);
        cs.selector = (selector & !3) | u16::from(cpl);
        Ok((cs, cpl))
    }

    /// IA-32e mode: the interrupt stack table, the inner level's stack, or the one in use; aligned to 16
    /// bytes (SDM vol. 3A, 6.14.2 to 6.14.5).
    fn handler_stack64(&mut self, gate: &Descriptor, cpl: u8) -> Result<Stack, Abort> {
        let inner = cpl < self.state.cpl;
        let mut stack = match (gate.gate_ist(), inner) {
            (0, false) => Stack::current64(&self.state),
            (0, true) => self.tss_stack(cpl)?,
            (ist, _) => Stack::inner64(self.tss_rsp(28 + 8 * ist)?, cpl),
        };
        stack.pointer &= !15;
        Ok(stack)
    }

    /// A task gate in the IDT.
    fn deliver_to_task(&mut self, frame: &Frame, gate: &Descriptor) -> Result<(), Abort> {
        let entry = TaskEntry { nesting: Nesting::Nested, return_ip: frame.ip, flags: frame.flags };
        let late = self.switch_through_gate(gate, entry)?;
        if let Some(fault) = late {
            return Err(self.raise_again(fault));
        }
        if let Some(error_code) = frame.event.error_code() {
            let size = if self.tss_is_wide() { 4 } else { 2 };
            let mut stack = Stack::current(&self.state);
            stack.push(self, size, u64::from(error_code))?;
            stack.commit_pointer(self);
        }
        let cs = self.state.segs[Seg::Cs as usize];
        self.check_far_target(&cs, self.state.rip)
    }

    /// Continues at `ip` in `cs` with privilege level `cpl`.
    pub(crate) fn transfer(&mut self, cs: Segment, cpl: u8, ip: u64) {
        // From 64-bit code to 64-bit code only the privilege level changes.
        let stays = self.state.code_size == CodeSize::Bits64 && cs.long();
        self.state.segs[Seg::Cs as usize] = cs;
        self.state.cpl = cpl;
        self.state.rip = ip;
        if stays {
            self.state.stack32 = self.state.segs[Seg::Ss as usize].big();
            self.mode_changed();
        } else {
            self.refresh_mode();
        }
    }

    /// #GP(0) unless `ip` lies in `cs`: canonical for 64-bit code, otherwise within the limit.
    pub(crate) fn check_far_target(&mut self, cs: &Segment, ip: u64) -> Result<(), Abort> {
        let inside = if self.state.long_mode() && cs.long() {
            self.state.canonical(ip)
        } else {
            ip <= u64::from(cs.limit)
        };
        if inside { Ok(()) } else { Err(self.raise(Exception::gp(0))) }
    }

    /// Redirection of INT n in virtual-8086 mode with VME (SDM vol. 3B, 20.3.3): to the interrupt vector
    /// table of the 8086 program at linear address 0.
    pub(crate) fn redirect_v8086(&mut self, vector: u8, next_ip: u64) -> Result<(), Abort> {
        let entry: u32 = self.system_load(u64::from(vector) * 4)?;
        let mut flags = self.state.rflags() & !Rflags::RF.bits();
        let virtual_if = self.state.iopl() < 3;
        if virtual_if {
            flags = self.flags_with_virtual_interrupt(flags);
        }
        let mut stack = Stack::current(&self.state);
        stack.reserve(self, 3, 2)?;
        stack.push(self, 2, flags)?;
        stack.push(self, 2, u64::from(self.state.segs[Seg::Cs as usize].selector))?;
        stack.push(self, 2, next_ip)?;
        stack.commit_pointer(self);
        let masked = if virtual_if { Rflags::VIF } else { Rflags::IF };
        self.state.rflags_system &= !(masked | Rflags::TF | Rflags::RF).bits();
        self.trap_after = false;
        self.transfer(Segment::v8086((entry >> 16) as u16), 3, u64::from(entry & 0xffff));
        Ok(())
    }

    /// Whether the TSS's interrupt redirection bitmap sends INT `vector` of a virtual-8086 program through
    /// the protected-mode IDT (a set bit). Under VME only.
    pub(crate) fn v8086_uses_idt(&mut self, vector: u8) -> Result<bool, Abort> {
        let tss = self.state.tr;
        let limit = u64::from(tss.limit);
        if !self.tss_is_wide() || limit < 103 {
            return Err(self.raise(Exception::gp(0)));
        }
        let io_map: u16 = self.system_load(self.system_linear(tss.base, 102))?;
        let at = (u64::from(io_map) + u64::from(vector >> 3)).wrapping_sub(32);
        if at > limit {
            return Err(self.raise(Exception::gp(0)));
        }
        let byte: u8 = self.system_load(self.system_linear(tss.base, at))?;
        Ok(byte & (1 << (vector & 7)) != 0)
    }

    /// FLAGS as a virtual-8086 program with IOPL below 3 sees them under VME: IF is VIF, IOPL reads 3.
    pub(crate) fn flags_with_virtual_interrupt(&self, flags: u64) -> u64 {
        let enabled = if self.state.flag(Rflags::VIF) { Rflags::IF.bits() } else { 0 };
        (flags & !Rflags::IF.bits()) | enabled | Rflags::IOPL.bits()
    }
}

/// Error code that names an IDT entry.
fn idt_code(vector: u8) -> u32 {
    (u32::from(vector) << 3) | 2
}

impl Exception {
    /// With EXT set in the error code, for the vectors whose error code has that bit.
    fn with_ext(mut self, external: bool) -> Exception {
        if external
            && matches!(self.vector, vector::TS | vector::NP | vector::SS | vector::GP)
            && let Some(code) = &mut self.error_code
        {
            *code |= 1;
        }
        self
    }

    /// Whether the flags image that its delivery pushes has RF set: fault-class exceptions. #DB is a fault
    /// only for instruction breakpoints (which leave RF alone) and general detect.
    pub(crate) fn sets_resume_flag(&self) -> bool {
        match self.vector {
            vector::DB => self.payload & DR6_BD != 0,
            vector::DF | vector::MC | vector::BP | vector::OF => false,
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_combine_as_table_6_5_says() {
        use Combination::{DoubleFault, Serial, TripleFault};
        let benign = None;
        let gp = Some(Exception::gp(0));
        let pf = Some(Exception::pf(0, 0));
        let df = Some(Exception::DF);
        let table = [
            (benign, vector::GP, Serial),
            (benign, vector::PF, Serial),
            (Some(Exception::UD), vector::NP, Serial),
            (gp, vector::NP, DoubleFault),
            (gp, vector::PF, Serial),
            (gp, vector::UD, Serial),
            (pf, vector::PF, DoubleFault),
            (pf, vector::TS, DoubleFault),
            (pf, vector::UD, Serial),
            (df, vector::GP, TripleFault),
            (df, vector::PF, TripleFault),
        ];
        for (first, second, expected) in table {
            assert_eq!(combine(first, second), expected, "{first:?} then {second}");
        }
    }
}
