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
use super::{APIC_BASE_BSP, SplitLockExit, Vcpu, VcpuExit};
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
    /// The guest has taken a bus lock since KVM_RUN began (KVM_RUN_X86_BUS_LOCK); only with KVM_CAP_X86_BUS_LOCK_EXIT.
    pub bus_lock: bool,
    /// The vCPU is in system management mode.
    pub smm: bool,
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
    /// [`Error::Again`] once a vCPU that waited for INIT has got it, [`Error::Invalid`] for a CR8 that there is not,
    /// [`Error::MemoryAbsent`] and [`Error::MemoryFailed`] where the client has no memory for the guest, if the process
    /// has a handler for the signals ([`crate::memory::catch_absence`]), [`Error::NoRoom`] where there is no memory for the
    /// tiles that the guest is about to use.
    pub fn run_request(&mut self, request: RunRequest) -> Result<VcpuExit, Error> {
        self.complete(0);
        self.complete_msr(false, 0);
        self.complete_hypercall(0);
        let result = self.run_loaded(request).and_then(SplitLockExit::or_fault);
        let (stats, counters) = (&self.handle.stats, &self.cpu.counters);
        stats.bus_locks.store(counters.bus_locks, Ordering::Relaxed);
        stats.uc_locks.store(counters.uc_lock_faults, Ordering::Relaxed);
        stats.xfd_faults.store(counters.xfd_faults, Ordering::Relaxed);
        self.handle.stats.instructions.store(self.cpu.instructions(), Ordering::Relaxed);
        match result {
            Ok(_) => self.handle.stats.user_exits.count(),
            Err(_) => self.handle.stats.signal_exits.count(),
        }
        result
    }

    /// KVM_RUN on the vCPU's thread of the host.
    fn run_loaded(&mut self, request: RunRequest) -> Result<VcpuExit, Error> {
        let system = self.vm.system().clone();
        let loaded = system.processors().load(self.locks.thread());
        self.load_locks();
        self.buffers_load();
        let result = self.run_inner(request);
        self.host_fpu_put();
        self.buffers_put(true);
        self.locks.put();
        drop(loaded);
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
        if request.immediate_exit || self.events.reinjects() || self.handle.interrupted() {
            let exit = self.finish_access()?;
            if let Some(exit) = exit.or_else(|| self.bus_lock_exit()) {
                return Ok(exit);
            }
        }
        if request.immediate_exit {
            return Err(Error::Interrupted);
        }
        if std::mem::take(&mut self.debug.stepped) && self.debug.single_step() {
            // The client's answer has completed the instruction.
            return Ok(self.step_exit());
        }
        // The client may have set both.
        self.make_room(self.cpu.state.xcr0, self.cpu.state.xfd)?;
        self.has_run = true;
        self.update_verw();
        self.record_steal_time();
        let result = self.run_guest();
        self.note_preemption();
        result
    }

    /// Guest mode and what exits from it that does not concern the client.
    fn run_guest(&mut self) -> Result<VcpuExit, Error> {
        // The VMM may have written memory since the last call; between exits that stay here it has no turn.
        let mut enter: fn(&mut Cpu) -> Exit = Cpu::run;
        if let Some(chip) = self.vm.irqchip() {
            chip.bus().note_outside();
            self.outside = Some(chip.bus().outside());
        }
        loop {
            if let Some(step) = self.locks.take_step() {
                // Nothing comes between a split lock that may be executed and its execution.
                let exit = self.execute_step(step, enter);
                enter = Cpu::resume;
                match self.finish_exit(exit)? {
                    Some(user) => return Ok(user),
                    None => continue,
                }
            }
            if self.handle.interrupted() {
                let exit = self.finish_access()?;
                return exit.or_else(|| self.bus_lock_exit()).ok_or(Error::Interrupted);
            }
            if self.owes_bus_lock() {
                continue;
            }
            if self.vm.is_dead() {
                return Err(Error::Dead("there was no memory for the state of an SMI"));
            }
            self.process_smi();
            self.take_apic_events();
            if let Some(vector) = self.ioapic_eoi.take() {
                return Ok(VcpuExit::IoapicEoi { vector });
            }
            self.take_pages();
            if self.mp_state != KVM_MP_STATE_RUNNABLE || self.awaits_page() {
                self.sleep();
                continue;
            }
            if let Some(exit) = self.crashed() {
                return Ok(exit);
            }
            if std::mem::take(&mut self.events.triple_fault) {
                return Ok(VcpuExit::Shutdown);
            }
            self.require_context()?;
            if self.is_held_back() {
                continue;
            }
            self.update_clock();
            if self.list_modified_pages() {
                return Ok(VcpuExit::DirtyRingFull);
            }
            self.prepare_events();
            if self.vm.is_dead() {
                continue;
            }
            self.update_msr_exiting();
            self.update_bus_lock_detection();
            let exit = self.enter(enter);
            // A serializing instruction sees all code that was written before it (SDM vol. 3A, 9.3), by whomever. Programs, which
            // ask CPUID dozens of times when they start, see what other vCPUs write anyway.
            let serializes =
                matches!(exit, Exit::Cpuid | Exit::Wbinvd | Exit::Invd) && self.cpu.state.cpl == 0;
            enter = if serializes { Cpu::run } else { Cpu::resume };
            if let Some(user) = self.finish_exit(exit)? {
                return Ok(user);
            }
        }
    }

    /// Acts on an exit: `Some` if KVM_RUN is to return.
    fn finish_exit(&mut self, exit: Exit) -> Result<Option<VcpuExit>, Error> {
        if let Some(user) = self.handle_exit(exit)? {
            self.debug.stepped = false;
            return Ok(Some(user));
        }
        if std::mem::take(&mut self.debug.stepped) && self.debug.single_step() {
            return Ok(Some(self.step_exit()));
        }
        if let Some(user) = self.bus_lock_exit() {
            return Ok(Some(user));
        }
        let window = self.window_requested && self.ready_for_interrupt();
        Ok(window.then_some(VcpuExit::IrqWindowOpen))
    }

    /// Enters guest mode; events that it leaves undelivered are taken back.
    pub(super) fn enter(&mut self, enter: fn(&mut Cpu) -> Exit) -> Exit {
        self.sync_to_vapic();
        self.update_intercepts();
        self.debug.stepped = false;
        self.debug.exchange(&mut self.cpu.state);
        self.host_fpu_enter();
        self.buffers_enter();
        let exit = enter(&mut self.cpu);
        self.buffers_exit(&exit);
        self.host_fpu_exit();
        self.debug.exchange(&mut self.cpu.state);
        self.list_modified_pages();
        self.sync_from_vapic();
        self.take_back_events();
        self.note_bus_lock();
        self.handle.stats.exit(&exit);
        exit
    }

    /// KVM_RUN of a vCPU that has not got INIT yet: does nothing but wait for it.
    fn wait_for_init(&mut self, request: RunRequest) -> Error {
        if request.immediate_exit {
            return Error::Interrupted;
        }
        let lapic = self.lapic.clone();
        let (vm, blocked) = (self.vm.clone(), self.cpu.state.smm);
        let has_events = |lapic: &Lapic| lapic.has_events(blocked);
        self.handle.sleep_until(0, || vm.is_dead() || lapic.as_deref().is_none_or(has_events));
        self.take_apic_events();
        if self.handle.interrupted() { Error::Interrupted } else { Error::Again }
    }

    /// Executes the one instruction whose access has just been answered; `Some` if it makes another one.
    pub(super) fn finish_access(&mut self) -> Result<Option<VcpuExit>, Error> {
        if !self.cpu.access_pending() {
            return Ok(None);
        }
        let limit = std::mem::replace(&mut self.cpu.controls.instruction_limit, 0);
        let mut result = Ok(None);
        let mut first = true;
        loop {
            let ahead = self.read_ahead.len();
            match self.enter(Cpu::run) {
                Exit::Budget => {}
                exit => result = self.handle_exit(exit),
            }
            // What the client has given ahead is part of the answer, as long as its instruction asks for it.
            let asked = first || self.cpu.access_pending() || self.read_ahead.len() != ahead;
            if self.async_pf.held {
                // The rest of the instruction needs a page that is elsewhere.
                break;
            }
            let more = asked && self.read_ahead.is_for(self.cpu.instructions());
            if !matches!(result, Ok(None)) || !more && !self.cpu.access_pending() {
                break;
            }
            first = false;
            self.cpu.controls.instruction_limit = self.cpu.instructions() + 1;
        }
        self.cpu.controls.instruction_limit = limit;
        result
    }

    /// INIT, SIPI, NMIs and EOIs that the LAPIC has received.
    pub(super) fn take_apic_events(&mut self) {
        let Some(lapic) = self.lapic.clone() else { return };
        let blocked = self.cpu.state.smm;
        if !lapic.has_events(blocked) {
            return;
        }
        let events = lapic.take_events(blocked);
        self.queue_nmis(events.nmi);
        self.events.smi_requested |= events.smi;
        self.unhalted |= events.unhalt;
        self.ioapic_eoi = events.ioapic_eoi.or(self.ioapic_eoi);
        if events.init {
            self.cpu.init_reset();
            let Events { external, smi_requested, .. } = self.events;
            self.events = Events { external, smi_requested, ..Events::default() };
            self.forget_accesses();
            self.unhalted = false;
            self.notify.context_given();
            self.msrs.init();
            self.async_pf.clear();
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
        // Whatever else ran on the thread would have the host's settings.
        self.host_fpu_put();
        self.buffers_put(false);
        self.locks.put();
        self.sleep_on_thread();
        self.load_locks();
        self.buffers_load();
    }

    fn sleep_on_thread(&mut self) {
        let halted = matches!(self.mp_state, KVM_MP_STATE_HALTED | KVM_MP_STATE_AP_RESET_HOLD);
        // For a page: what would end a HLT lets the vCPU go on, too.
        let held = self.mp_state == KVM_MP_STATE_RUNNABLE;
        let waits = halted || held;
        if halted {
            self.handle.stats.halts.fetch_add(1, Ordering::Relaxed);
        }
        let undeliverable = self.delivery_awaits_page();
        let interrupts = waits && !undeliverable && self.cpu.interrupt_allowed();
        let events = &self.events;
        let waiting =
            events.has_exception() || events.triple_fault || self.unhalted || self.cpu.pending_debug != 0;
        let smi = events.smi_requested || events.smi_pending && self.cpu.smi_allowed();
        let now = waits && !undeliverable && (events.nmis != 0 && self.cpu.nmi_allowed() || smi || waiting);
        let external = events.external.is_some();
        let (lapic, chip) = (self.lapic.as_deref(), self.vm.irqchip());
        let handle = &self.handle;
        let event = || match (lapic, chip) {
            (Some(lapic), Some(chip)) => {
                now || interrupts && (chip.has_interrupt(lapic) || external && lapic.accepts_pic())
            }
            // Without a local APIC of ours the client halts; what it injects comes between its calls.
            _ => halted,
        };
        let runnable = || event() || handle.has_pages();
        let (vm, blocked) = (&self.vm, self.cpu.state.smm);
        let has_events = |lapic: &Lapic| lapic.has_events(blocked);
        let poll = if halted { self.vm.policy().halt_poll_ns() } else { 0 };
        self.handle.sleep_until(poll, || runnable() || vm.is_dead() || lapic.is_some_and(has_events));
        if held {
            self.async_pf.held = false;
        }
        // An NMI that has just come is taken from the events first; the next round finds it here.
        // A page that has come ends no HLT.
        if halted && event() {
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
            bus_lock: self.locks.bus_lock && self.vm.policy().bus_lock_exit(),
            smm: self.cpu.state.smm,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Program, vm};
    use super::*;

    const WINDOW: RunRequest = RunRequest { immediate_exit: false, interrupt_window: true, cr8: 0 };
    const IMMEDIATE: RunRequest = RunRequest { immediate_exit: true, interrupt_window: false, cr8: 0 };

    #[test]
    fn a_vcpu_without_init_only_waits_for_it() {
        let vm = vm();
        vm.create_irqchip().unwrap();
        let _first = vm.create_vcpu(0).unwrap();
        let mut second = vm.create_vcpu(1).unwrap();
        assert!(second.awaits_init());
        assert!(matches!(second.run_request(IMMEDIATE), Err(Error::Interrupted)));
        second.lapic.as_ref().unwrap().post_init();
        assert!(matches!(second.run(), Err(Error::Again)));
        assert_eq!(second.mp_state().mp_state, KVM_MP_STATE_INIT_RECEIVED);
        second.lapic.as_ref().unwrap().post_sipi(0x12);
        assert_eq!(second.mp_state().mp_state, KVM_MP_STATE_RUNNABLE, "asking takes it");
        assert_eq!((second.sregs().cs.base, second.regs().rip), (0x1_2000, 0));
    }

    #[test]
    fn the_window_opens_after_the_shadow_of_sti() {
        // sti; nop; nop; hlt
        let mut program = Program::new(&[0xfb, 0x90, 0x90, 0xf4]);
        let vcpu = &mut program.vcpu;
        assert!(!vcpu.run_state().ready_for_interrupt);
        assert_eq!(vcpu.run_request(WINDOW).unwrap(), VcpuExit::IrqWindowOpen);
        assert_eq!(vcpu.regs().rip, Program::CODE + 2);
        assert!(vcpu.run_state().ready_for_interrupt && vcpu.run_state().interrupt_flag);
        vcpu.interrupt(0x20).unwrap();
        assert!(!vcpu.run_state().ready_for_interrupt, "one is on its way");
        assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
        assert_eq!(vcpu.regs().rip, 0x501, "in the handler");
    }

    #[test]
    fn an_immediate_exit_completes_the_access_and_nothing_else() {
        // in al, 0x10; nop; hlt
        let mut program = Program::new(&[0xe4, 0x10, 0x90, 0xf4]);
        let vcpu = &mut program.vcpu;
        assert!(matches!(vcpu.run_request(IMMEDIATE), Err(Error::Interrupted)));
        assert_eq!(vcpu.regs().rip, Program::CODE, "nothing has run");
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::Io { port: 0x10, size: 1, write: None }));
        vcpu.complete(0x5a);
        assert!(matches!(vcpu.run_request(IMMEDIATE), Err(Error::Interrupted)));
        assert_eq!((vcpu.regs().rip, vcpu.regs().rax), (Program::CODE + 2, 0x5a));
        vcpu.handle().interrupt();
        assert!(matches!(vcpu.run(), Err(Error::Interrupted)));
        vcpu.handle().settle();
        assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
    }

    #[test]
    fn one_port_is_written_before_the_client_hears_of_it() {
        // out 0x7e, al; out 0x7f, al; hlt
        let code = [0xe6, 0x7e, 0xe6, 0x7f, 0xf4];
        for (quirks, first) in [(0, 2), (u64::from(kvm_bindings::KVM_X86_QUIRK_OUT_7E_INC_RIP), 0)] {
            let mut program = Program::new(&code);
            let vcpu = &mut program.vcpu;
            vcpu.vm.disable_quirks(quirks).unwrap();
            assert!(matches!(vcpu.run().unwrap(), VcpuExit::Io { port: 0x7e, .. }));
            assert_eq!(vcpu.regs().rip, Program::CODE + first);
            assert!(matches!(vcpu.run().unwrap(), VcpuExit::Io { port: 0x7f, .. }));
            assert_eq!(vcpu.regs().rip, Program::CODE + 2);
            assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
        }
    }

    #[test]
    fn an_access_that_leaves_memory_is_split_at_the_page() {
        // mov [0xfe], eax; hlt
        let mut program = Program::new(&[0x66, 0xa3, 0xfe, 0x00, 0xf4]);
        let vcpu = &mut program.vcpu;
        let mut sregs = vcpu.sregs();
        sregs.ds.base = 0xff00;
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.regs();
        regs.rax = 0x4433_2211;
        vcpu.set_regs(&regs);
        let mut outside = 0u64;
        loop {
            match vcpu.run().unwrap() {
                VcpuExit::Mmio { gpa, size, write: Some(value) } => {
                    assert!(gpa >= 0x1_0000 && gpa + u64::from(size) <= 0x1_0002);
                    outside |= value << (8 * (gpa - 0x1_0000));
                }
                exit => break assert_eq!(exit, VcpuExit::Hlt),
            }
        }
        let mut inside = [0; 2];
        vcpu.vm.memory().read(0xfffe, &mut inside);
        assert_eq!((inside, outside), ([0x11, 0x22], 0x4433));
    }

    #[test]
    fn eois_that_the_clients_ioapic_waits_for() {
        let vm = vm();
        vm.split_irqchip(24).unwrap();
        let mut program = Program::on(vm, &[0xf4]);
        program.vcpu.lapic.as_ref().unwrap().post_ioapic_eoi(0x31);
        assert_eq!(program.vcpu.run().unwrap(), VcpuExit::IoapicEoi { vector: 0x31 });
    }

    #[test]
    fn a_paravirtual_kick_ends_a_halt() {
        let vm = vm();
        vm.create_irqchip().unwrap();
        // hlt; out 0x10, al
        let mut program = Program::on(vm, &[0xf4, 0xe6, 0x10]);
        let lapic = program.vcpu.lapic.clone().unwrap();
        let kick = crate::irqchip::bus::Message {
            mode: crate::irqchip::bus::DeliveryMode::RemoteRead,
            ..crate::irqchip::bus::Message::from_icr(1 << 14, 0)
        };
        program.vcpu.vm.irqchip().unwrap().bus().deliver(None, &kick);
        assert!(lapic.has_events(false));
        assert!(matches!(program.vcpu.run().unwrap(), VcpuExit::Io { port: 0x10, .. }));
    }
}
