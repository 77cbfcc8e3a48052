//! A vCPU: KVM_RUN and the state that belongs to it.

mod exits;
mod handle;
mod registers;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
    kvm_cpuid_entry2, kvm_mp_state, kvm_msr_entry,
};
use silicon::Cpu;
use silicon::exception::Exception;
use silicon::flags::Rflags;
use silicon::model::feature::Feature;
use silicon::state::{Activity, CpuState, interruptibility};
use silicon::vmx::{Exit, Injection};

use crate::cpuid::Cpuid;
use crate::error::Error;
use crate::irqchip::lapic::{ApicFeatures, Lapic};
use crate::kvmclock::ClockPage;
use crate::msr::MsrState;
use crate::tsc;
use crate::vm::Vm;

pub use handle::VcpuHandle;

/// IA32_APIC_BASE.BSP.
const APIC_BASE_BSP: u64 = 1 << 8;

/// Why KVM_RUN returned (kernel: the KVM_EXIT_* reasons of `struct kvm_run`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuExit {
    /// KVM_EXIT_IO. A read is answered with [`Vcpu::complete`] before the next run.
    Io {
        /// Port number.
        port: u16,
        /// Bytes: 1, 2 or 4.
        size: u8,
        /// Value of an OUT; `None` for IN.
        write: Option<u32>,
    },
    /// KVM_EXIT_MMIO. A read is answered with [`Vcpu::complete`].
    Mmio {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes: 1, 2, 4 or 8.
        size: u8,
        /// Value of a write.
        write: Option<u64>,
    },
    /// KVM_EXIT_HLT: only without in-kernel interrupt controllers.
    Hlt,
    /// KVM_EXIT_SHUTDOWN: triple fault.
    Shutdown,
    /// KVM_EXIT_IRQ_WINDOW_OPEN: the client asked to be told when it can inject.
    IrqWindowOpen,
    /// KVM_EXIT_INTERNAL_ERROR, emulation: the instruction at RIP cannot be executed where it is.
    InternalError {
        /// Guest-physical address that could not be fetched from.
        gpa: u64,
    },
    /// The instruction limit of [`silicon::vmx::Controls`] was reached (tests and tools only).
    Budget,
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

/// A virtual CPU, owned by the thread that runs it.
pub struct Vcpu {
    /// The processor underneath.
    pub(crate) cpu: Cpu,
    vm: Arc<Vm>,
    handle: Arc<VcpuHandle>,
    lapic: Option<Arc<Lapic>>,
    cpuid: Cpuid,
    pv_features: u32,
    msrs: MsrState,
    clock_page: ClockPage,
    /// Changes of the VM's clock that the clock page has.
    clock_changes: u32,
    mp_state: u32,
    /// NMIs that wait for their window; hardware holds one, KVM two.
    nmis: u32,
    /// An access to user space was reported and awaits its result.
    user_access: bool,
    reset_state: Box<CpuState>,
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu")
            .field("id", &self.handle.id())
            .field("rip", &self.cpu.state.rip)
            .finish_non_exhaustive()
    }
}

impl Vcpu {
    pub(crate) fn new(vm: Arc<Vm>, id: u32, bsp: bool) -> Result<Vcpu, Error> {
        let model = vm.system().model();
        let cpuid = Cpuid::default();
        let mut cpu = Cpu::new(model.features(), vm.memory().ept().clone());
        cpu.controls.tsc_offset = vm.initial_tsc_offset();
        let handle = Arc::new(VcpuHandle::new(id, cpu.requests.clone())?);
        let lapic = vm.irqchip().map(|chip| chip.create_lapic(id, bsp)).transpose()?;
        if let Some(lapic) = &lapic {
            lapic.set_waker(handle.clone());
        }
        let mp_state =
            if !bsp && lapic.is_some() { KVM_MP_STATE_UNINITIALIZED } else { KVM_MP_STATE_RUNNABLE };
        let reset_state = Box::new(cpu.state.clone());
        let msrs = MsrState::new(model, vm.system().host());
        Ok(Vcpu {
            cpu,
            vm,
            handle,
            lapic,
            cpuid,
            pv_features: 0,
            msrs,
            clock_page: ClockPage::default(),
            clock_changes: 0,
            mp_state,
            nmis: 0,
            user_access: false,
            reset_state,
        })
    }

    /// What other threads use to stop and watch this vCPU.
    pub fn handle(&self) -> Arc<VcpuHandle> {
        self.handle.clone()
    }

    /// The processor's architectural state, for inspection.
    pub fn state(&self) -> &CpuState {
        &self.cpu.state
    }

    /// The processor itself: for tools and tests that need its controls and counters.
    pub fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }

    /// KVM_SET_CPUID2: what the guest sees, and what the processor offers it from now on.
    pub fn set_cpuid2(&mut self, entries: &[kvm_cpuid_entry2]) -> Result<(), Error> {
        self.cpuid = Cpuid::from_entries(entries)?;
        self.pv_features = self.cpuid.pv_features();
        self.cpu.set_features(self.cpuid.features());
        if let Some(lapic) = &self.lapic {
            let has = |feature| self.cpu.features.has(feature);
            lapic.set_features(ApicFeatures {
                x2apic: has(Feature::X2apic),
                tsc_deadline: has(Feature::TscDeadline),
                cmci: false,
                physical_address_bits: self.cpu.features.physical_bits(),
            });
        }
        Ok(())
    }

    /// KVM_GET_MP_STATE.
    pub fn mp_state(&self) -> kvm_mp_state {
        kvm_mp_state { mp_state: self.mp_state }
    }

    /// KVM_SET_MP_STATE. EINVAL for states that this VM cannot be in.
    pub fn set_mp_state(&mut self, state: kvm_mp_state) -> Result<(), Error> {
        match state.mp_state {
            KVM_MP_STATE_RUNNABLE => {}
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_HALTED | KVM_MP_STATE_INIT_RECEIVED
                if self.lapic.is_some() => {}
            _ => return Err(Error::Invalid("mp_state")),
        }
        self.mp_state = state.mp_state;
        Ok(())
    }

    /// KVM_NMI.
    pub fn nmi(&mut self) {
        self.nmis = (self.nmis + 1).min(self.nmi_limit());
    }

    /// One NMI may wait behind the one in progress; two if none is (kernel: process_nmi in arch/x86/kvm/x86.c).
    fn nmi_limit(&self) -> u32 {
        let blocked = self.cpu.state.interruptibility & interruptibility::NMI != 0;
        if blocked || self.cpu.injection == Some(Injection::Nmi) { 1 } else { 2 }
    }

    /// KVM_INTERRUPT, for VMs without in-kernel interrupt controllers.
    pub fn interrupt(&mut self, vector: u8) -> Result<(), Error> {
        if self.lapic.is_some() {
            return Err(Error::Missing("a user-space interrupt controller"));
        }
        if self.cpu.injection.is_some() {
            return Err(Error::Exists("an event to inject"));
        }
        self.cpu.injection = Some(Injection::Interrupt(vector));
        Ok(())
    }

    /// Answers the access that the last exit reported (the value is ignored for a write).
    pub fn complete(&mut self, value: u64) {
        if std::mem::take(&mut self.user_access) {
            self.cpu.complete_read(value);
        }
    }

    /// KVM_SET_MSRS: how many were set before the first that was refused.
    pub fn set_msrs(&mut self, entries: &[kvm_msr_entry]) -> usize {
        let refused = entries.iter().position(|e| self.write_msr(e.index, e.data, true).is_err());
        refused.unwrap_or(entries.len())
    }

    /// KVM_GET_MSRS: fills in the values; how many were read before the first that was refused.
    pub fn get_msrs(&mut self, entries: &mut [kvm_msr_entry]) -> usize {
        for (done, entry) in entries.iter_mut().enumerate() {
            match self.read_msr(entry.index, true) {
                Ok(value) => entry.data = value,
                Err(_) => return done,
            }
        }
        entries.len()
    }

    /// The guest's TSC frequency in kHz (KVM_GET_TSC_KHZ).
    pub fn tsc_khz(&self) -> u32 {
        tsc::host_khz()
    }

    pub(crate) fn apic_base(&self) -> u64 {
        self.lapic.as_ref().map_or(0xfee0_0000 | 1 << 11, |lapic| lapic.apic_base())
    }

    pub(crate) fn set_apic_base(&mut self, value: u64) -> Result<(), Error> {
        match &self.lapic {
            Some(lapic) if lapic.apic_base() != value => {
                lapic.set_apic_base(value, true).map_err(|_| Error::Invalid("IA32_APIC_BASE"))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn cr8(&self) -> u64 {
        self.lapic.as_ref().map_or(self.cpu.state.cr8, |lapic| lapic.cr8())
    }

    pub(crate) fn set_cr8(&mut self, value: u64) {
        self.cpu.state.cr8 = value & 15;
        if let Some(lapic) = &self.lapic {
            lapic.set_cr8(value & 15);
        }
    }

    /// KVM_RUN: runs the guest until something concerns the caller.
    pub fn run(&mut self) -> Result<VcpuExit, Error> {
        self.complete(0);
        let result = self.run_inner();
        self.handle.stats.instructions.store(self.cpu.instructions(), Ordering::Relaxed);
        match result {
            Ok(_) => self.handle.stats.user_exits.count(),
            Err(_) => self.handle.stats.signal_exits.count(),
        }
        result
    }

    fn run_inner(&mut self) -> Result<VcpuExit, Error> {
        // The VMM may have written memory since the last call; between exits that stay here it has no turn.
        let mut enter: fn(&mut Cpu) -> Exit = Cpu::run;
        loop {
            if self.handle.interrupted() {
                // KVM finishes a pending access even then, so that the registers can be saved.
                self.finish_access();
                return Err(Error::Interrupted);
            }
            self.take_apic_events();
            if self.mp_state != KVM_MP_STATE_RUNNABLE {
                self.sleep();
                continue;
            }
            self.update_clock();
            self.prepare_events();
            let exit = enter(&mut self.cpu);
            enter = Cpu::resume;
            self.handle.stats.exit(&exit);
            if let Some(user) = self.handle_exit(exit) {
                return Ok(user);
            }
        }
    }

    /// Executes the one instruction whose access has just been answered.
    fn finish_access(&mut self) {
        if self.cpu.access_pending() {
            let limit = std::mem::replace(&mut self.cpu.controls.instruction_limit, 0);
            let _ = self.cpu.run();
            self.cpu.controls.instruction_limit = limit;
        }
    }

    /// INIT, SIPI and NMIs that the LAPIC has received.
    fn take_apic_events(&mut self) {
        let Some(lapic) = self.lapic.clone() else { return };
        let events = lapic.take_events();
        self.nmis = (self.nmis + events.nmi).min(self.nmi_limit());
        if events.init {
            self.cpu.init_reset();
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
        let halted = self.mp_state == KVM_MP_STATE_HALTED;
        if halted {
            self.handle.stats.halts.fetch_add(1, Ordering::Relaxed);
        }
        let interrupts = halted && self.cpu.interrupt_allowed();
        let nmi = halted && (self.nmis != 0 && self.cpu.nmi_allowed() || self.cpu.pending_debug != 0);
        let (lapic, chip) = (self.lapic.as_deref(), self.vm.irqchip());
        let runnable = || match (lapic, chip) {
            (Some(lapic), Some(chip)) => nmi || interrupts && chip.has_interrupt(lapic),
            _ => true,
        };
        self.handle.sleep_until(|| runnable() || lapic.is_some_and(Lapic::has_events));
        // An NMI that has just come is taken from the events first; the next round finds it here.
        if halted && runnable() {
            self.mp_state = KVM_MP_STATE_RUNNABLE;
        }
    }

    /// Decides what to inject at the next entry, or which window to wait for.
    fn prepare_events(&mut self) {
        self.cpu.controls.nmi_window_exiting = false;
        self.cpu.controls.interrupt_window_exiting = false;
        if self.cpu.injection.is_none() && self.nmis != 0 {
            if self.cpu.nmi_allowed() {
                self.nmis -= 1;
                self.cpu.injection = Some(Injection::Nmi);
                self.handle.stats.nmis.fetch_add(1, Ordering::Relaxed);
            }
            // One may be left, or have to wait.
            self.cpu.controls.nmi_window_exiting = self.nmis != 0;
        }
        if !self.interrupt_pending() {
            return;
        }
        if self.cpu.injection.is_some() || !self.cpu.interrupt_allowed() {
            self.cpu.controls.interrupt_window_exiting = true;
            return;
        }
        if let Some(vector) = self.acknowledge_interrupt() {
            self.cpu.injection = Some(Injection::Interrupt(vector));
            self.handle.stats.interrupts.fetch_add(1, Ordering::Relaxed);
        }
        // One more may wait behind it.
        self.cpu.controls.interrupt_window_exiting = self.interrupt_pending();
    }

    fn interrupt_pending(&self) -> bool {
        let (Some(lapic), Some(chip)) = (&self.lapic, self.vm.irqchip()) else { return false };
        chip.has_interrupt(lapic)
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.vm.irqchip()?.acknowledge(self.lapic.as_ref()?)
    }

    fn update_clock(&mut self) {
        let changes = self.vm.clock_changes();
        if std::mem::take(&mut self.msrs.clock_changed) || self.clock_changes != changes {
            self.clock_changes = changes;
            self.clock_page.msr = self.msrs.system_time();
            let base = *self.vm.clock();
            let (offset, khz) = (self.cpu.controls.tsc_offset, self.tsc_khz());
            self.clock_page.update(self.vm.memory(), &base, offset, khz);
        }
    }

    /// What `kvm_run` says of the vCPU after each KVM_RUN.
    pub fn run_state(&self) -> RunState {
        let interrupt_flag = self.cpu.state.flag(Rflags::IF);
        RunState {
            interrupt_flag,
            // The kernel says so whenever its interrupt controllers do the injecting.
            ready_for_interrupt: self.lapic.is_some()
                || self.cpu.injection.is_none() && self.cpu.interrupt_allowed(),
            cr8: self.cr8(),
            apic_base: self.apic_base(),
        }
    }

    /// Back to the state after power-up (not an ioctl: our VMM's reset).
    pub fn reset(&mut self) {
        // Drops what an unfinished instruction left behind.
        self.cpu.init_reset();
        self.cpu.state = (*self.reset_state).clone();
        self.cpu.injection = None;
        self.msrs.reset();
        self.cpu.refresh_mode();
        self.cpu.paging_changed();
    }

    /// #GP(0) for the instruction that exited. Injection leaves RF to us, as VM entry does.
    fn inject_gp(&mut self) {
        self.cpu.state.rflags_system |= Rflags::RF.bits();
        self.cpu.injection = Some(Injection::Exception(Exception::gp(0)));
    }
}
