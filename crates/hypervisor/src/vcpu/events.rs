//! Events on their way into the guest: exceptions, NMIs, interrupts. KVM_GET/SET_VCPU_EVENTS, KVM_INTERRUPT, KVM_NMI.
//! (Kernel: `kvm_check_and_inject_events` and `kvm_multiple_exception` in arch/x86/kvm/x86.c.)

use kvm_bindings::{
    KVM_MP_STATE_INIT_RECEIVED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_vcpu_events,
};
use silicon::exception::{Exception, vector};
use silicon::flags::Rflags;
use silicon::state::interruptibility;
use silicon::system::deliver::Event;
use silicon::vmx::Injection;

use super::Vcpu;
use crate::error::Error;

/// Flags of `kvm_vcpu_events` that KVM_SET_VCPU_EVENTS takes.
const FLAGS: u32 = KVM_VCPUEVENT_VALID_NMI_PENDING
    | KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | KVM_VCPUEVENT_VALID_SHADOW
    | KVM_VCPUEVENT_VALID_SMM
    | KVM_VCPUEVENT_VALID_PAYLOAD
    | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
/// DR7.GD: cleared when a debug exception is delivered.
const DR7_GD: u64 = 1 << 13;
/// DR6.B0 to B3, which each debug exception replaces, and bit 12, which only the payload has.
const DR6_TRAPS: u64 = 0xf;
const DR6_ENABLED: u64 = 1 << 12;
/// DR6 bits that read as one: BLD and RTM among them, whose meaning is inverted.
const DR6_FIXED: u64 = 0xfffe_07f0;
const DR6_RTM: u64 = 1 << 16;
const DR6_ACTIVE_LOW: u64 = 0xffff_0ff0;

/// An exception that was raised and is not injected yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Raised {
    pub(super) exception: Exception,
    /// CR2, or the bits for DR6, that injection will set.
    pub(super) payload: Option<u64>,
}

/// A maskable interrupt that was acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Acknowledged {
    pub(super) vector: u8,
    /// It is an INT n of this length.
    pub(super) software: Option<u8>,
}

/// What waits to be injected at the next entry to guest mode.
#[derive(Clone, Debug, Default)]
pub(super) struct Events {
    /// An exception whose effects on CR2, DR6 and RFLAGS.RF are still to come.
    pub(super) raised: Option<Raised>,
    /// An exception whose delivery has begun: it goes in again as it is.
    pub(super) injected: Option<Exception>,
    /// An NMI whose delivery has begun.
    pub(super) nmi_injected: bool,
    /// NMIs that wait for their window; hardware holds one, KVM two.
    pub(super) nmis: u32,
    /// An interrupt that was acknowledged and has to go in.
    pub(super) interrupt: Option<Acknowledged>,
    /// Split irqchip: the vector of user space's 8259.
    pub(super) external: Option<u8>,
    /// The processor shuts down at the next entry.
    pub(super) triple_fault: bool,
    /// An SMI has come that nobody has seen yet (kernel: `KVM_REQ_SMI`).
    pub(super) smi_requested: bool,
    /// An SMI waits to be taken; hardware holds one, too.
    pub(super) smi_pending: bool,
    /// NMIs were blocked already when the SMI was taken whose handler runs: they stay so after it.
    pub(super) smm_inside_nmi: bool,
}

impl Events {
    /// An event has been taken and not delivered: no other may come before it (kernel:
    /// `kvm_event_needs_reinjection`).
    pub(super) fn reinjects(&self) -> bool {
        self.injected.is_some() || self.nmi_injected || self.interrupt.is_some()
    }

    /// Whether an exception waits.
    pub(super) fn has_exception(&self) -> bool {
        self.raised.is_some() || self.injected.is_some()
    }

    /// Raises an exception whose CR2 or DR6 has been set.
    pub(super) fn raise_without_payload(&mut self, exception: Exception) {
        self.raise(exception);
        if let Some(raised) = &mut self.raised {
            raised.payload = None;
        }
    }

    /// Raises an exception; on top of another one it may become a double or a triple fault (SDM vol. 3A, table 6-5).
    pub(super) fn raise(&mut self, exception: Exception) {
        let payload = matches!(exception.vector, vector::PF | vector::DB).then_some(exception.payload);
        let before = self.raised.map(|raised| raised.exception).or(self.injected);
        let exception = match before.map(|before| before.vector) {
            Some(vector::DF) => {
                self.triple_fault = true;
                return;
            }
            Some(first) if doubles(first, exception.vector) => {
                Raised { exception: Exception::DF, payload: None }
            }
            _ => Raised { exception, payload },
        };
        self.injected = None;
        self.raised = Some(exception);
    }

    /// An exit came while `event` was delivered: it is to be injected again.
    pub(super) fn requeue(&mut self, event: Event, length: u8) {
        match event {
            Event::Interrupt(vector) => self.interrupt = Some(Acknowledged { vector, software: None }),
            Event::Nmi => self.nmi_injected = true,
            Event::Exception(exception) | Event::Injected(exception) => self.injected = Some(exception),
            Event::Software { vector, .. } => {
                self.interrupt = Some(Acknowledged { vector, software: Some(length) });
            }
            // The instruction is executed again.
            Event::Int1 { .. } => {}
        }
    }
}

fn doubles(first: u8, second: u8) -> bool {
    let contributory = Exception::is_contributory;
    let page_fault = |number| matches!(number, vector::PF | vector::VE);
    contributory(first) && contributory(second)
        || page_fault(first) && (contributory(second) || page_fault(second))
}

/// INT3 and INTO: their injection needs the length of the instruction, which the API has no field for.
fn is_software(number: u8) -> bool {
    matches!(number, vector::BP | vector::OF)
}

/// Faults other than #DB push RFLAGS.RF (kernel: `exception_type`).
fn is_fault(number: u8) -> bool {
    !matches!(number, vector::DB | vector::BP | vector::OF | vector::DF | vector::MC)
}

impl Vcpu {
    /// #GP(0) for the instruction that exited.
    pub(super) fn inject_gp(&mut self) {
        self.events.raise(Exception::gp(0));
    }

    /// KVM_NMI.
    pub fn nmi(&mut self) {
        self.queue_nmis(1);
    }

    /// Adds NMIs to those that wait (kernel: `process_nmi`): one may wait behind the one in progress; two if none is.
    pub(super) fn queue_nmis(&mut self, count: u32) {
        let blocked = self.cpu.state.interruptibility & interruptibility::NMI != 0;
        let limit = if blocked || self.events.nmi_injected { 1 } else { 2 };
        self.events.nmis = self.events.nmis.saturating_add(count).min(limit);
    }

    /// KVM_INTERRUPT, for VMs whose 8259 is the client's. With in-kernel local APICs the vector waits for LINT0 to let
    /// it through; EEXIST if one waits already.
    pub fn interrupt(&mut self, vector: u8) -> Result<(), Error> {
        match self.vm.irqchip() {
            None => self.events.interrupt = Some(Acknowledged { vector, software: None }),
            Some(chip) if !chip.is_split() => {
                return Err(Error::Missing("a user-space interrupt controller"));
            }
            Some(_) if self.events.external.is_some() => return Err(Error::Exists("an interrupt to inject")),
            Some(_) => self.events.external = Some(vector),
        }
        Ok(())
    }

    /// KVM_GET_VCPU_EVENTS.
    pub fn vcpu_events(&mut self) -> kvm_vcpu_events {
        self.take_nmis();
        self.process_smi();
        self.deliver_payload_early();
        let mut out = kvm_vcpu_events::default();
        let with_payload = self.exception_payload();
        let waiting = self.events.raised.map(|raised| (raised.exception, true));
        if let Some((exception, pending)) = waiting.or(self.events.injected.map(|e| (e, false))) {
            if !is_software(exception.vector) {
                out.exception.pending = pending.into();
                // Without the payload, clients know of injected exceptions only.
                out.exception.injected = (!pending || !with_payload).into();
            }
            out.exception.nr = exception.vector;
            out.exception.has_error_code = exception.error_code.is_some().into();
            out.exception.error_code = exception.error_code.unwrap_or(0);
        }
        if let Some(payload) = self.events.raised.and_then(|raised| raised.payload) {
            out.exception_has_payload = 1;
            out.exception_payload = payload;
        }
        if let Some(interrupt) = self.events.interrupt {
            out.interrupt.injected = interrupt.software.is_none().into();
            out.interrupt.nr = interrupt.vector;
        }
        let blocking = self.cpu.state.interruptibility;
        let shadow = |bit, flag: u32| if blocking & bit != 0 { flag as u8 } else { 0 };
        out.interrupt.shadow = shadow(interruptibility::STI, KVM_X86_SHADOW_INT_STI)
            | shadow(interruptibility::MOV_SS, KVM_X86_SHADOW_INT_MOV_SS);
        out.nmi.injected = self.events.nmi_injected.into();
        out.nmi.pending = self.events.nmis as u8;
        out.nmi.masked = (blocking & interruptibility::NMI != 0).into();
        out.smi.smm = self.cpu.state.smm.into();
        out.smi.pending = self.events.smi_pending.into();
        out.smi.smm_inside_nmi = self.events.smm_inside_nmi.into();
        out.smi.latched_init = self.lapic.as_ref().is_some_and(|lapic| lapic.events().init).into();
        out.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
        if with_payload {
            out.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
        }
        if self.triple_fault_event() {
            out.triple_fault.pending = self.events.triple_fault.into();
            out.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        }
        out
    }

    /// KVM_SET_VCPU_EVENTS. EINVAL for flags that do not exist or were not enabled, for vectors that are no exceptions,
    /// and for system management mode of a vCPU that waits for a start-up IPI.
    pub fn set_vcpu_events(&mut self, given: &kvm_vcpu_events) -> Result<(), Error> {
        let has = |flag: u32| given.flags & flag != 0;
        if given.flags & !FLAGS != 0
            || has(KVM_VCPUEVENT_VALID_PAYLOAD) && !self.exception_payload()
            || has(KVM_VCPUEVENT_VALID_TRIPLE_FAULT) && !self.triple_fault_event()
        {
            return Err(Error::Invalid("flags of kvm_vcpu_events"));
        }
        let raised = has(KVM_VCPUEVENT_VALID_PAYLOAD) && given.exception.pending != 0;
        let injected = !raised && given.exception.injected != 0;
        let nr = given.exception.nr;
        if (raised || injected) && (nr > 31 || nr == vector::NMI) {
            return Err(Error::Invalid("the vector is no exception's"));
        }
        let smi = &given.smi;
        // INIT is blocked there.
        let waits = self.mp_state == KVM_MP_STATE_INIT_RECEIVED;
        if has(KVM_VCPUEVENT_VALID_SMM) && (smi.smm | smi.pending) != 0 && waits {
            return Err(Error::Invalid("system management mode: the vCPU waits for a start-up IPI"));
        }
        self.take_nmis();
        let error_code = (given.exception.has_error_code != 0).then_some(given.exception.error_code);
        let payload = (raised && given.exception_has_payload != 0).then_some(given.exception_payload);
        let exception = Exception { vector: nr, error_code, payload: payload.unwrap_or(0) };
        self.events.raised = raised.then_some(Raised { exception, payload });
        self.events.injected = injected.then_some(exception);
        self.events.interrupt = (given.interrupt.injected != 0).then(|| Acknowledged {
            vector: given.interrupt.nr,
            software: (given.interrupt.soft != 0).then_some(self.software_length),
        });
        let blocking = &mut self.cpu.state.interruptibility;
        if has(KVM_VCPUEVENT_VALID_SHADOW) {
            *blocking &= !(interruptibility::STI | interruptibility::MOV_SS);
            let shadow = u32::from(given.interrupt.shadow);
            if shadow & KVM_X86_SHADOW_INT_MOV_SS != 0 {
                *blocking |= interruptibility::MOV_SS;
            } else if shadow & KVM_X86_SHADOW_INT_STI != 0 {
                *blocking |= interruptibility::STI;
            }
        }
        let masked = if given.nmi.masked != 0 { interruptibility::NMI } else { 0 };
        *blocking = *blocking & !interruptibility::NMI | masked;
        self.events.nmi_injected = given.nmi.injected != 0;
        if has(KVM_VCPUEVENT_VALID_NMI_PENDING) {
            self.events.nmis = 0;
            self.queue_nmis(given.nmi.pending.into());
        }
        if has(KVM_VCPUEVENT_VALID_SMM) {
            self.put_smm(smi.smm != 0);
            self.events.smi_pending = smi.pending != 0;
            if smi.smm != 0 {
                self.events.smm_inside_nmi = smi.smm_inside_nmi != 0;
            }
        }
        if let Some(lapic) = &self.lapic {
            if has(KVM_VCPUEVENT_VALID_SIPI_VECTOR) {
                self.sipi_vector = given.sipi_vector as u8;
            }
            if has(KVM_VCPUEVENT_VALID_SMM) {
                lapic.latch_init(smi.latched_init != 0);
            }
        }
        if has(KVM_VCPUEVENT_VALID_TRIPLE_FAULT) {
            self.events.triple_fault = given.triple_fault.pending != 0;
        }
        Ok(())
    }

    fn exception_payload(&self) -> bool {
        self.vm.policy().exception_payload()
    }

    fn triple_fault_event(&self) -> bool {
        self.vm.policy().triple_fault_event()
    }

    /// NMIs that other vCPUs and devices have sent.
    fn take_nmis(&mut self) {
        let count = self.lapic.as_ref().map_or(0, |lapic| lapic.take_nmis());
        self.queue_nmis(count);
    }

    /// KVM_CAP_EXCEPTION_PAYLOAD is off: a client that saves state that the payload belongs to sees it already set
    /// (kernel: `kvm_handle_exception_payload_quirk`).
    pub(super) fn deliver_payload_early(&mut self) {
        if !self.exception_payload() {
            self.deliver_payload();
        }
    }

    /// Sets CR2 or DR6 for the exception that waits.
    fn deliver_payload(&mut self) {
        let Some(raised) = &mut self.events.raised else { return };
        let Some(payload) = raised.payload.take() else { return };
        let state = &mut self.cpu.state;
        match raised.exception.vector {
            vector::PF => state.cr2 = payload,
            vector::DB => {
                let set = (state.dr6 & !DR6_TRAPS | DR6_RTM) & !(payload & DR6_ACTIVE_LOW)
                    | payload & !DR6_ACTIVE_LOW;
                state.dr6 = set & !DR6_ENABLED | DR6_FIXED;
            }
            _ => {}
        }
    }

    /// Decides what to inject at the next entry, or which window to wait for.
    pub(super) fn prepare_events(&mut self) {
        self.cpu.controls.smi_exiting = false;
        self.cpu.controls.nmi_window_exiting = false;
        self.cpu.controls.interrupt_window_exiting = false;
        self.cpu.injection = self.next_injection();
        if self.debug.blocks_interrupts() {
            return;
        }
        let free = self.cpu.injection.is_none() && !self.events.reinjects();
        if self.events.smi_pending && !self.cpu.state.smm {
            if !free || !self.cpu.smi_allowed() {
                // Nothing else is injected before it.
                self.cpu.controls.smi_exiting = true;
                return;
            }
            self.take_smi();
        }
        if free && self.events.nmis != 0 && self.cpu.nmi_allowed() {
            self.events.nmis -= 1;
            self.cpu.injection = Some(Injection::Nmi);
            self.handle.stats.nmis.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        // One may be left, or have to wait.
        self.cpu.controls.nmi_window_exiting = self.events.nmis != 0;
        if self.interrupt_pending() {
            let free = self.cpu.injection.is_none() && !self.events.reinjects();
            if free
                && self.cpu.interrupt_allowed()
                && let Some(vector) = self.acknowledge_interrupt()
            {
                self.cpu.injection = Some(self.injection_of_interrupt(vector));
                self.handle.stats.interrupts.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
        // One more may wait behind it, or the client has one.
        self.cpu.controls.interrupt_window_exiting =
            self.interrupt_pending() || self.window_requested && self.takes_client_interrupts();
    }

    /// An interrupt that has been acknowledged. The timer tells of nothing that others have written, and other processors tell of no
    /// more than what has come from outside, which this one may know already.
    fn injection_of_interrupt(&mut self, vector: u8) -> Injection {
        let timer = self.lapic.as_ref().and_then(|lapic| lapic.timer_vector());
        let outside = self.vm.irqchip().map(|chip| chip.bus().outside());
        if timer == Some(vector) || outside.is_some() && outside == self.outside {
            return Injection::Local(vector);
        }
        self.outside = outside;
        Injection::Interrupt(vector)
    }

    /// The event that has to go in before any other.
    pub(super) fn next_injection(&mut self) -> Option<Injection> {
        if let Some(exception) = self.events.injected.take() {
            return Some(self.injection_of(exception));
        }
        if self.events.raised.is_some() {
            self.deliver_payload();
            let exception = self.events.raised.take()?.exception;
            if is_fault(exception.vector) {
                self.cpu.state.rflags_system |= Rflags::RF.bits();
            }
            if exception.vector == vector::DB {
                self.cpu.state.dr7 &= !DR7_GD;
            }
            return Some(self.injection_of(exception));
        }
        if std::mem::take(&mut self.events.nmi_injected) {
            return Some(Injection::Nmi);
        }
        let interrupt = self.events.interrupt.take()?;
        Some(match interrupt.software {
            Some(length) => Injection::Software { vector: interrupt.vector, length },
            None => Injection::Interrupt(interrupt.vector),
        })
    }

    fn injection_of(&self, exception: Exception) -> Injection {
        match exception.vector {
            vector if is_software(vector) => Injection::Software { vector, length: self.software_length },
            _ => Injection::Exception(exception),
        }
    }

    /// Takes back what the last entry did not deliver.
    pub(super) fn take_back_events(&mut self) {
        let length = self.cpu.exit_instruction_length;
        match self.cpu.injection.take() {
            None => {}
            Some(Injection::Interrupt(vector) | Injection::Local(vector)) => {
                self.events.requeue(Event::Interrupt(vector), length)
            }
            Some(Injection::Nmi) => self.events.requeue(Event::Nmi, length),
            Some(Injection::Exception(exception)) => self.events.requeue(Event::Injected(exception), length),
            Some(Injection::Software { vector, length }) => {
                self.events.requeue(Event::Software { vector, next_ip: 0 }, length);
            }
        }
    }

    /// The event whose delivery the last exit cut short is to be injected again; the event, if there was one.
    pub(super) fn requeue_vectored(&mut self) -> Option<Event> {
        let event = self.cpu.idt_vectoring.take()?;
        if let Event::Exception(exception) = event
            && is_fault(exception.vector)
        {
            // As the exit of a processor leaves it: what the delivery would have pushed (SDM vol. 3C, 28.3.3).
            self.cpu.state.rflags_system |= Rflags::RF.bits();
        }
        if event == Event::Nmi {
            // Blocking begins anew with the delivery (kernel: `vmx_complete_interrupts`).
            self.cpu.state.interruptibility &= !interruptibility::NMI;
        }
        self.events.requeue(event, self.cpu.exit_instruction_length);
        Some(event)
    }

    /// An interrupt of the interrupt controllers waits.
    pub(super) fn interrupt_pending(&self) -> bool {
        let (Some(lapic), Some(chip)) = (&self.lapic, self.vm.irqchip()) else { return false };
        chip.has_interrupt(lapic) || self.events.external.is_some() && lapic.accepts_pic()
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        let lapic = self.lapic.as_ref()?;
        if self.events.external.is_some() && lapic.accepts_pic() {
            return self.events.external.take();
        }
        self.vm.irqchip()?.acknowledge(lapic)
    }

    /// The 8259 is the client's, and reaches this vCPU.
    pub(super) fn takes_client_interrupts(&self) -> bool {
        match (&self.lapic, self.vm.irqchip()) {
            (Some(lapic), Some(chip)) => chip.is_split() && lapic.accepts_pic(),
            _ => true,
        }
    }

    /// KVM_INTERRUPT would be taken at once (kernel: `kvm_vcpu_ready_for_interrupt_injection`).
    pub(super) fn ready_for_interrupt(&self) -> bool {
        self.takes_client_interrupts()
            && self.cpu.interrupt_allowed()
            && !self.events.reinjects()
            && self.events.raised.is_none()
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_msi;

    use super::super::testing::{vcpu, vcpu_with_apic};
    use super::*;
    use crate::irqchip::bus::Message;

    fn given(change: impl Fn(&mut kvm_vcpu_events)) -> kvm_vcpu_events {
        let mut events = kvm_vcpu_events::default();
        change(&mut events);
        events
    }

    #[test]
    fn what_is_set_comes_back() {
        let mut vcpu = vcpu_with_apic();
        let events = given(|e| {
            e.exception.injected = 1;
            e.exception.nr = vector::PF;
            e.exception.has_error_code = 1;
            e.exception.error_code = 2;
            e.interrupt.injected = 1;
            e.interrupt.nr = 0x30;
            e.interrupt.shadow = KVM_X86_SHADOW_INT_STI as u8;
            e.nmi.injected = 1;
            e.nmi.pending = 1;
            e.nmi.masked = 1;
            e.smi.latched_init = 1;
            e.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
        });
        vcpu.set_vcpu_events(&events).unwrap();
        assert_eq!(vcpu.vcpu_events(), events);
    }

    /// Each interrupt of another vCPU had all code compared anew: programs that take turns were three times as slow.
    #[test]
    fn interrupts_of_other_vcpus_tell_of_what_has_come_from_outside_alone() {
        let mut vcpu = vcpu_with_apic();
        let (vm, lapic) = (vcpu.vm.clone(), vcpu.lapic.clone().unwrap());
        let bus = vm.irqchip().unwrap().bus();
        assert_eq!(
            vcpu.injection_of_interrupt(0x41),
            Injection::Interrupt(0x41),
            "nothing has been compared"
        );
        assert_eq!(vcpu.injection_of_interrupt(0x41), Injection::Local(0x41));
        bus.deliver(Some(&lapic), &Message::from_icr(0x4041, 0));
        assert_eq!(vcpu.injection_of_interrupt(0x41), Injection::Local(0x41));
        let events: [(&str, &dyn Fn()); 3] = [
            ("an MSI", &|| {
                let msi = kvm_msi { address_lo: 0xfee0_0000, data: 0x43, ..Default::default() };
                vm.signal_msi(&msi).unwrap();
            }),
            ("a line", &|| vm.irq_line(5, true).unwrap()),
            ("KVM_RUN of another vCPU", &|| bus.note_outside()),
        ];
        for (name, event) in events {
            event();
            assert_eq!(vcpu.injection_of_interrupt(0x41), Injection::Interrupt(0x41), "{name}");
            assert_eq!(vcpu.injection_of_interrupt(0x41), Injection::Local(0x41), "{name}");
        }
    }

    #[test]
    fn flags_say_which_fields_count() {
        let mut vcpu = vcpu_with_apic();
        let all = given(|e| {
            e.exception.pending = 1;
            e.interrupt.shadow = 1;
            e.nmi.pending = 1;
            e.smi.latched_init = 1;
        });
        vcpu.set_vcpu_events(&all).unwrap();
        let expected = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
        assert_eq!(vcpu.vcpu_events(), given(|e| e.flags = expected));
    }

    #[test]
    fn wrong_events_are_einval() {
        let mut vcpu = vcpu();
        let cases: &[(&str, fn(&mut kvm_vcpu_events))] = &[
            ("flag", |e| e.flags = 1 << 6),
            ("payload is not enabled", |e| e.flags = KVM_VCPUEVENT_VALID_PAYLOAD),
            ("triple fault is not enabled", |e| e.flags = KVM_VCPUEVENT_VALID_TRIPLE_FAULT),
            ("vector", |e| (e.exception.injected, e.exception.nr) = (1, 32)),
            ("NMI is no exception", |e| (e.exception.injected, e.exception.nr) = (1, 2)),
        ];
        for (name, change) in cases {
            let result = vcpu.set_vcpu_events(&given(change)).map_err(|e| e.errno());
            assert_eq!(result, Err(libc::EINVAL), "{name}");
        }
    }

    #[test]
    fn the_payload_is_delivered_early_unless_the_client_knows_of_it() {
        let mut vcpu = vcpu();
        vcpu.events.raise(Exception::pf(0x1234, 6));
        let events = vcpu.vcpu_events();
        assert_eq!((events.exception.injected, events.exception.pending), (1, 1));
        assert_eq!((events.exception_has_payload, vcpu.sregs().cr2), (0, 0x1234));
        vcpu.vm.set_exception_payload(1).unwrap();
        vcpu.vm.set_triple_fault_event(1).unwrap();
        vcpu.events.raised = None;
        vcpu.events.raise(Exception::pf(0x5678, 6));
        let mut events = vcpu.vcpu_events();
        assert_eq!((events.exception.injected, events.exception.pending), (0, 1));
        assert_eq!((events.exception_payload, vcpu.sregs().cr2), (0x5678, 0x1234));
        events.triple_fault.pending = 1;
        vcpu.set_vcpu_events(&events).unwrap();
        assert_eq!(vcpu.vcpu_events(), events);
        assert_eq!(vcpu.run().unwrap(), crate::VcpuExit::Shutdown);
    }

    #[test]
    fn exceptions_on_top_of_exceptions() {
        let mut events = Events::default();
        events.raise(Exception::gp(0));
        events.raise(Exception::np(8));
        assert_eq!(events.raised.map(|raised| raised.exception), Some(Exception::DF));
        events.raise(Exception::gp(0));
        assert!(events.triple_fault);
        let mut events = Events { injected: Some(Exception::UD), ..Events::default() };
        events.raise(Exception::pf(1, 0));
        assert_eq!(events.raised.map(|raised| raised.exception), Some(Exception::pf(1, 0)));
        assert_eq!(events.injected, None);
    }

    #[test]
    fn interrupts_of_the_client() {
        let mut none = vcpu();
        none.interrupt(0x20).unwrap();
        none.interrupt(0x21).unwrap();
        assert_eq!(none.vcpu_events().interrupt.nr, 0x21);
        assert_eq!(vcpu_with_apic().interrupt(0x20).unwrap_err().errno(), libc::ENXIO);
        let vm = super::super::testing::vm();
        vm.split_irqchip(24).unwrap();
        let mut split = vm.create_vcpu(0).unwrap();
        split.interrupt(0x20).unwrap();
        assert_eq!(split.interrupt(0x21).unwrap_err().errno(), libc::EEXIST);
        assert_eq!(split.vcpu_events().interrupt.injected, 0, "it waits for LINT0");
    }

    #[test]
    fn two_nmis_wait_at_most() {
        let mut vcpu = vcpu();
        (0..4).for_each(|_| vcpu.nmi());
        assert_eq!(vcpu.vcpu_events().nmi.pending, 2);
        let masked = given(|e| {
            e.nmi.masked = 1;
            e.nmi.pending = 5;
            e.flags = KVM_VCPUEVENT_VALID_NMI_PENDING;
        });
        vcpu.set_vcpu_events(&masked).unwrap();
        assert_eq!(vcpu.vcpu_events().nmi.pending, 1);
    }
}
