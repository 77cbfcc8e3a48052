//! KVM_RUN (kernel: `kvm_arch_vcpu_ioctl_run`, `vcpu_run`, `vcpu_block` in arch/x86/kvm/x86.c).

use std::sync::atomic::Ordering;

use kvm_bindings::{
    KVM_MP_STATE_AP_RESET_HOLD, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
};
use silicon::Cpu;
use silicon::flags::Rflags;
use silicon::state::Activity;
use silicon::vmx::Exit;

use super::events::Events;
use super::{APIC_BASE_BSP, Vcpu, VcpuExit};
use crate::error::Error;
use crate::irqchip::lapic::Lapic;

/// What the client says with KVM_RUN, in `kvm_run`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunRequest {
    /// Return once a pending access is complete, before any other instruction.
    pub immediate_exit: bool,
    /// Return as soon as the client could inject an interrupt.
    pub interrupt_window: bool,
    /// CR8, where the local APIC is the client's.
    pub cr8: u64,
}

/// State that `kvm_run` carries after every KVM_RUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunState {
    /// RFLAGS.IF.
    pub interrupt_flag: bool,
    /// KVM_INTERRUPT would be taken at once.
    pub ready_for_interrupt: bool,
    /// CR8.
    pub cr8: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
}

impl Vcpu {
    /// Runs the guest until something concerns the caller: KVM_RUN with nothing asked for.
    ///
    /// # Errors
    ///
    /// As [`Vcpu::run_request`].
    pub fn run(&mut self) -> Result<VcpuExit, Error> {
        let cr8 = self.cr8();
        self.run_request(RunRequest { cr8, ..RunRequest::default() })
    }

    /// KVM_RUN.
    ///
    /// # Errors
    ///
    /// [`Error::Interrupted`] for [`RunRequest::immediate_exit`] and [`VcpuHandle::interrupt`](super::VcpuHandle),
    /// [`Error::Again`] once a vCPU that waited for INIT has got it, [`Error::Invalid`] for a CR8 that there is not.
    pub fn run_request(&mut self, request: RunRequest) -> Result<VcpuExit, Error> {
        self.complete(0);
        self.complete_msr(false, 0);
        self.complete_hypercall(0);
        let result = self.run_inner(request);
        self.handle.stats.instructions.store(self.cpu.instructions(), Ordering::Relaxed);
        match result {
            Ok(_) => self.handle.stats.user_exits.count(),
            Err(_) => self.handle.stats.signal_exits.count(),
        }
        result
    }

    fn run_inner(&mut self, request: RunRequest) -> Result<VcpuExit, Error> {
        if self.mp_state == KVM_MP_STATE_UNINITIALIZED {
            return Err(self.wait_for_init(request));
        }
        if self.lapic.is_none() {
            if request.cr8 > 15 {
                return Err(Error::Invalid("CR8"));
            }
            self.set_cr8(request.cr8);
        }
        self.window_requested = request.interrupt_window && self.client_has_pic();
        // KVM finishes a pending access before anything else, so that the registers can be saved and events injected.
        if (request.immediate_exit || self.events.reinjects() || self.handle.interrupted())
            && let Some(exit) = self.finish_access()
        {
            return Ok(exit);
        }
        if request.immediate_exit {
            return Err(Error::Interrupted);
        }
        if std::mem::take(&mut self.debug.stepped) && self.debug.single_step() {
            // The client's answer has completed the instruction.
            return Ok(self.step_exit());
        }
        self.has_run = true;
        self.record_steal_time();
        let result = self.run_guest();
        self.note_preemption();
        result
    }

    /// Guest mode and what exits from it that does not concern the client.
    fn run_guest(&mut self) -> Result<VcpuExit, Error> {
        // The VMM may have written memory since the last call; between exits that stay here it has no turn.
        let mut enter: fn(&mut Cpu) -> Exit = Cpu::run;
        loop {
            if self.handle.interrupted() {
                return match self.finish_access() {
                    Some(exit) => Ok(exit),
                    None => Err(Error::Interrupted),
                };
            }
            self.take_apic_events();
            if let Some(vector) = self.ioapic_eoi.take() {
                return Ok(VcpuExit::IoapicEoi { vector });
            }
            if self.mp_state != KVM_MP_STATE_RUNNABLE {
                self.sleep();
                continue;
            }
            if std::mem::take(&mut self.events.triple_fault) {
                return Ok(VcpuExit::Shutdown);
            }
            self.update_clock();
            if self.list_modified_pages() {
                return Ok(VcpuExit::DirtyRingFull);
            }
            self.prepare_events();
            self.update_msr_exiting();
            let exit = self.enter(enter);
            enter = Cpu::resume;
            if let Some(user) = self.handle_exit(exit) {
                self.debug.stepped = false;
                return Ok(user);
            }
            if std::mem::take(&mut self.debug.stepped) && self.debug.single_step() {
                return Ok(self.step_exit());
            }
            if self.window_requested && self.ready_for_interrupt() {
                return Ok(VcpuExit::IrqWindowOpen);
            }
        }
    }

    /// Enters guest mode; events that it leaves undelivered are taken back.
    fn enter(&mut self, enter: fn(&mut Cpu) -> Exit) -> Exit {
        self.sync_to_vapic();
        self.debug.stepped = false;
        self.debug.exchange(&mut self.cpu.state);
        let exit = enter(&mut self.cpu);
        self.debug.exchange(&mut self.cpu.state);
        self.list_modified_pages();
        self.sync_from_vapic();
        self.take_back_events();
        self.handle.stats.exit(&exit);
        exit
    }

    /// KVM_RUN of a vCPU that has not got INIT yet: does nothing but wait for it.
    fn wait_for_init(&mut self, request: RunRequest) -> Error {
        if request.immediate_exit {
            return Error::Interrupted;
        }
        let lapic = self.lapic.clone();
        self.handle.sleep_until(0, || lapic.as_deref().is_none_or(Lapic::has_events));
        self.take_apic_events();
        if self.handle.interrupted() { Error::Interrupted } else { Error::Again }
    }

    /// Executes the one instruction whose access has just been answered; `Some` if it makes another one.
    fn finish_access(&mut self) -> Option<VcpuExit> {
        if !self.cpu.access_pending() {
            return None;
        }
        let limit = std::mem::replace(&mut self.cpu.controls.instruction_limit, 0);
        let mut result = None;
        loop {
            match self.enter(Cpu::run) {
                Exit::Budget => {}
                exit => result = self.handle_exit(exit),
            }
            // What the client has given ahead is part of the answer.
            if result.is_some() || self.read_ahead.is_empty() && !self.cpu.access_pending() {
                break;
            }
            self.cpu.controls.instruction_limit = self.cpu.instructions() + 1;
        }
        self.cpu.controls.instruction_limit = limit;
        result
    }

    /// INIT, SIPI, NMIs and EOIs that the LAPIC has received.
    pub(super) fn take_apic_events(&mut self) {
        let Some(lapic) = self.lapic.clone() else { return };
        if !lapic.has_events() {
            return;
        }
        let events = lapic.take_events();
        self.queue_nmis(events.nmi);
        self.unhalted |= events.unhalt;
        self.ioapic_eoi = events.ioapic_eoi.or(self.ioapic_eoi);
        if events.init {
            self.cpu.init_reset();
            self.events = Events { external: self.events.external, ..Events::default() };
            self.user_access = false;
            self.msr_pending = None;
            self.hypercall_pending = false;
            self.unhalted = false;
            self.msrs.init();
            lapic.reset(true);
            self.mp_state = KVM_MP_STATE_INIT_RECEIVED;
            if lapic.apic_base() & APIC_BASE_BSP != 0 {
                // The bootstrap processor does not wait for a start-up IPI.
                self.cpu.state.activity = Activity::Active;
                self.mp_state = KVM_MP_STATE_RUNNABLE;
            }
        }
        if let Some(vector) = events.sipi
            && self.mp_state == KVM_MP_STATE_INIT_RECEIVED
        {
            self.cpu.startup(vector);
            self.mp_state = KVM_MP_STATE_RUNNABLE;
        }
    }

    /// HLT, wait-for-SIPI: sleeps until there is something to do.
    fn sleep(&mut self) {
        let halted = matches!(self.mp_state, KVM_MP_STATE_HALTED | KVM_MP_STATE_AP_RESET_HOLD);
        if halted {
            self.handle.stats.halts.fetch_add(1, Ordering::Relaxed);
        }
        let interrupts = halted && self.cpu.interrupt_allowed();
        let events = &self.events;
        let waiting =
            events.has_exception() || events.triple_fault || self.unhalted || self.cpu.pending_debug != 0;
        let now = halted && (events.nmis != 0 && self.cpu.nmi_allowed() || waiting);
        let external = events.external.is_some();
        let (lapic, chip) = (self.lapic.as_deref(), self.vm.irqchip());
        let runnable = || match (lapic, chip) {
            (Some(lapic), Some(chip)) => {
                now || interrupts && (chip.has_interrupt(lapic) || external && lapic.accepts_pic())
            }
            _ => true,
        };
        let poll = if halted { self.vm.policy().halt_poll_ns() } else { 0 };
        self.handle.sleep_until(poll, || runnable() || lapic.is_some_and(Lapic::has_events));
        // An NMI that has just come is taken from the events first; the next round finds it here.
        if halted && runnable() {
            self.mp_state = KVM_MP_STATE_RUNNABLE;
            self.unhalted = false;
        }
    }

    fn update_clock(&mut self) {
        let changes = self.vm.clock_changes();
        if std::mem::take(&mut self.msrs.clock_changed) || self.clock_changes != changes {
            self.clock_changes = changes;
            self.clock_page.msr = self.msrs.system_time();
            let base = *self.vm.clock();
            let (khz, tsc) = (self.tsc_khz(), self.guest_tsc(base.tsc()));
            self.clock_page.update(self.vm.memory(), &base, tsc, khz);
        }
    }

    /// The 8259 is the client's.
    fn client_has_pic(&self) -> bool {
        self.vm.irqchip().is_none_or(|chip| chip.is_split())
    }

    /// What `kvm_run` says of the vCPU after each KVM_RUN.
    pub fn run_state(&self) -> RunState {
        RunState {
            interrupt_flag: self.cpu.state.flag(Rflags::IF),
            // The kernel says so whenever its interrupt controllers do the injecting.
            ready_for_interrupt: !self.client_has_pic() || self.ready_for_interrupt(),
            cr8: self.cr8(),
            apic_base: self.apic_base(),
        }
    }
}
