//! A vCPU: KVM_RUN and the state that belongs to it.

mod apic;
mod async_pf;
mod buffers;
mod cpuid;
mod debug;
mod dirty_ring;
mod events;
mod exits;
mod failure;
mod handle;
mod host_fpu;
mod hypercall;
mod mce;
mod msr;
mod notify;
mod ports;
mod pre_fault;
mod registers;
mod run;
mod smm;
mod split_lock;
mod steal;
#[cfg(test)]
mod testing;
mod tsc;
pub(crate) mod xstate;

use std::fmt;
use std::sync::Arc;

use kvm_bindings::{
    KVM_MP_STATE_AP_RESET_HOLD, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_X86_DISABLE_EXITS_HLT,
    KVM_X86_DISABLE_EXITS_MWAIT, KVM_X86_QUIRK_STUFF_FEATURE_MSRS, kvm_mp_state,
};
use silicon::Cpu;
use silicon::model::xstate::size_standard;
use silicon::state::{CpuState, X87};

use crate::cpuid::Cpuid;
use crate::dirty_ring::DirtyRing;
use crate::error::Error;
use crate::irqchip::lapic::Lapic;
use crate::kvmclock::ClockPage;
use crate::msr::{MsrEnv, MsrState};
use crate::vm::Vm;
use async_pf::AsyncPf;
use buffers::HostBuffers;
use debug::GuestDebug;
use events::Events;
use host_fpu::HostFpu;
use notify::NotifyState;
use ports::ReadAhead;
use split_lock::Locks;
use steal::StealTime;

pub use async_pf::{Crash, CrashReason};
pub use debug::{DebugExit, GUEST_DEBUG_FLAGS};
pub use failure::InternalError;
pub use handle::VcpuHandle;
pub use hypercall::HypercallExit;
pub use msr::MsrExit;
pub use notify::NotifyExit;
pub use run::{RunRequest, RunState};
pub use split_lock::SplitLockExit;
pub use tsc::TscSync;
pub use xstate::XSAVE_SIZE;

/// IA32_APIC_BASE after reset, and its bits: enabled, bootstrap processor.
const APIC_BASE_DEFAULT: u64 = 0xfee0_0000 | 1 << 11;
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
    /// KVM_EXIT_DIRTY_RING_FULL: the client has to read the vCPU's dirty ring first.
    DirtyRingFull,
    /// KVM_EXIT_SHUTDOWN: triple fault.
    Shutdown,
    /// KVM_EXIT_SYSTEM_EVENT, KVM_SYSTEM_EVENT_CRASH: the guest cannot go on, for a reason that has to do with its memory. It is
    /// the result of every KVM_RUN until the vCPU is reset.
    Crash(Crash),
    /// KVM_EXIT_SET_TPR: the guest has lowered CR8, and the local APIC is the client's.
    SetTpr,
    /// KVM_EXIT_IOAPIC_EOI: split irqchip, the client's IOAPIC waits for the EOI of this vector.
    IoapicEoi {
        /// Vector.
        vector: u8,
    },
    /// KVM_EXIT_IRQ_WINDOW_OPEN: the client asked to be told when it can inject.
    IrqWindowOpen,
    /// KVM_EXIT_INTERNAL_ERROR: the instruction at RIP cannot be executed where it is, or an event cannot be delivered.
    InternalError(InternalError),
    /// KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR. Answered with [`Vcpu::complete_msr`].
    Msr(MsrExit),
    /// KVM_EXIT_HYPERCALL. Answered with [`Vcpu::complete_hypercall`].
    Hypercall(HypercallExit),
    /// KVM_EXIT_DEBUG: a breakpoint or single step of the client's debugger.
    Debug(DebugExit),
    /// KVM_EXIT_X86_BUS_LOCK (KVM_CAP_X86_BUS_LOCK_EXIT): the guest has taken a bus lock, and is behind it.
    BusLock,
    /// A split lock that must not be executed, under [`Policy::Exit`](crate::split_lock::Policy) (RING3_EXIT_SPLIT_LOCK) or
    /// [`Policy::Kill`](crate::split_lock::Policy): the thread is to get SIGBUS, and KVM_EXIT_EXCEPTION says why.
    SplitLock(SplitLockExit),
    /// KVM_EXIT_NOTIFY: no event window for too long. Only if the client has asked for it, or with the guest's context lost.
    Notify(NotifyExit),
    /// The instruction limit of [`silicon::vmx::Controls`] was reached (tests and tools only).
    Budget,
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
    own_features: u32,
    /// The guest may use no paravirtual feature that its CPUID does not enumerate.
    pv_enforced: bool,
    msrs: MsrState,
    clock_page: ClockPage,
    dirty_ring: Option<Arc<DirtyRing>>,
    /// Changes of the VM's clock that the clock page has.
    clock_changes: u32,
    /// IA32_APIC_BASE where the local APIC is the client's.
    apic_base: u64,
    vapic_address: u64,
    mp_state: u32,
    /// Where the next start-up IPI that a client restores begins.
    sipi_vector: u8,
    events: Events,
    /// Length of the INT3 or INTO that exited last, for injecting it again.
    software_length: u8,
    /// The EOI of this vector is to be told to the client.
    ioapic_eoi: Option<u8>,
    /// The client wants to know when it can inject an interrupt.
    window_requested: bool,
    /// What had come from outside ([`ApicBus::outside`](crate::irqchip::bus::ApicBus::outside)) when code was last to be compared.
    outside: Option<u64>,
    /// An access to user space was reported and awaits its result.
    user_access: bool,
    /// Likewise for an access to an MSR, and for a hypercall.
    msr_pending: Option<MsrExit>,
    hypercall_pending: bool,
    /// A paravirtual halt has been ended by another vCPU.
    unhalted: bool,
    debug: GuestDebug,
    read_ahead: ReadAhead,
    steal: StealTime,
    locks: Locks,
    notify: NotifyState,
    /// Dynamically enabled XSAVE components that KVM_SET_CPUID2 has given the vCPU, for good.
    dynamic_xcr0: u64,
    host_fpu: Option<Box<HostFpu>>,
    buffers: Option<Box<HostBuffers>>,
    async_pf: AsyncPf,
    /// The guest has been entered.
    has_run: bool,
    tsc_khz: u32,
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
        cpu.event_window.threshold = model.notify_threshold();
        // KVM begins with what FNINIT leaves (fpu_alloc_guest_fpstate in arch/x86/kernel/fpu/core.c), not with the SDM's reset state.
        cpu.state.x87 = X87::INIT;
        // Until the guest has a use for tiles.
        cpu.controls.xfd_exiting = true;
        vm.system().permissions().freeze();
        let tsc_khz = vm.tsc_khz();
        vm.tsc_sync().begin(&mut cpu.controls, tsc_khz)?;
        let exits = |disabled: u32| vm.policy().disabled_exits() & disabled == 0;
        cpu.controls.hlt_exiting = exits(KVM_X86_DISABLE_EXITS_HLT);
        cpu.controls.mwait_exiting = exits(KVM_X86_DISABLE_EXITS_MWAIT);
        let handle = Arc::new(VcpuHandle::new(id, cpu.requests.clone())?);
        let lapic = vm.irqchip().map(|chip| chip.create_lapic(id, bsp)).transpose()?;
        if let Some(lapic) = &lapic {
            lapic.set_waker(handle.clone());
        }
        let mp_state =
            if !bsp && lapic.is_some() { KVM_MP_STATE_UNINITIALIZED } else { KVM_MP_STATE_RUNNABLE };
        let apic_base = APIC_BASE_DEFAULT | if bsp { APIC_BASE_BSP } else { 0 };
        let reset_state = Box::new(cpu.state.clone());
        let mut msrs = MsrState::new(vm.arch_capabilities(), vm.system().host());
        if !vm.has_quirk(KVM_X86_QUIRK_STUFF_FEATURE_MSRS) {
            msrs.clear_feature_msrs();
        }
        msrs.offer_core_capabilities(vm.core_capabilities());
        let locks = Locks::new(&vm, id);
        cpu.test_ctrl = vm.system().processors().test_ctrl(locks.thread());
        cpu.controls.exception_bitmap = locks.intercepted();
        let host_fpu = HostFpu::new(vm.system().host(), size_standard(model.features().xcr0_mask()) as usize);
        let buffers = HostBuffers::new(&vm, id);
        Ok(Vcpu {
            cpu,
            vm,
            handle,
            lapic,
            cpuid,
            pv_features: 0,
            own_features: 0,
            pv_enforced: false,
            msrs,
            clock_page: ClockPage::default(),
            dirty_ring: None,
            clock_changes: 0,
            apic_base,
            vapic_address: 0,
            mp_state,
            sipi_vector: 0,
            events: Events::default(),
            software_length: 1,
            ioapic_eoi: None,
            window_requested: false,
            outside: None,
            user_access: false,
            msr_pending: None,
            hypercall_pending: false,
            unhalted: false,
            debug: GuestDebug::default(),
            read_ahead: ReadAhead::default(),
            steal: StealTime::default(),
            locks,
            notify: NotifyState::default(),
            dynamic_xcr0: 0,
            host_fpu,
            buffers,
            async_pf: AsyncPf::default(),
            has_run: false,
            tsc_khz,
            reset_state,
        })
    }

    /// The VM that the vCPU belongs to.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
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

    /// KVM_GET_MP_STATE. Takes INIT and start-up IPIs that wait, so it comes before the registers.
    pub fn mp_state(&mut self) -> kvm_mp_state {
        self.take_apic_events();
        kvm_mp_state { mp_state: self.mp_state }
    }

    /// Whether the vCPU has never got INIT: KVM_RUN only waits for it then.
    pub fn awaits_init(&self) -> bool {
        self.mp_state == KVM_MP_STATE_UNINITIALIZED
    }

    /// KVM_SET_MP_STATE. EINVAL for states that this VM cannot be in, and for INIT and start-up IPIs where system management
    /// mode blocks them.
    pub fn set_mp_state(&mut self, state: kvm_mp_state) -> Result<(), Error> {
        let starts = matches!(state.mp_state, KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED);
        if starts && (self.cpu.state.smm || self.events.smi_pending) {
            return Err(Error::Invalid("mp_state: INIT is blocked"));
        }
        match (state.mp_state, &self.lapic) {
            (KVM_MP_STATE_RUNNABLE, _) => {}
            (KVM_MP_STATE_SIPI_RECEIVED, Some(lapic)) => {
                self.mp_state = KVM_MP_STATE_INIT_RECEIVED;
                lapic.post_sipi(self.sipi_vector);
                return Ok(());
            }
            (
                KVM_MP_STATE_UNINITIALIZED
                | KVM_MP_STATE_HALTED
                | KVM_MP_STATE_AP_RESET_HOLD
                | KVM_MP_STATE_INIT_RECEIVED,
                Some(_),
            ) => {}
            _ => return Err(Error::Invalid("mp_state")),
        }
        self.mp_state = state.mp_state;
        Ok(())
    }

    /// KVM_CAP_ENFORCE_PV_FEATURE_CPUID: whether the guest may use only the paravirtual features that its CPUID
    /// enumerates. Without it, it may use all that there are.
    pub fn enforce_pv_features(&mut self, enforce: bool) {
        self.pv_enforced = enforce;
    }

    /// KVM_KVMCLOCK_CTRL: tells the guest that it was stopped. EINVAL if it does not use the clock.
    pub fn kvmclock_ctrl(&mut self) -> Result<(), Error> {
        if self.msrs.system_time() & 1 == 0 {
            return Err(Error::Invalid("the guest has no clock page"));
        }
        self.clock_page.guest_stopped = true;
        self.msrs.clock_changed = true;
        Ok(())
    }

    /// Answers the access that the last exit reported (the value is ignored for a write).
    pub fn complete(&mut self, value: u64) {
        if std::mem::take(&mut self.user_access) {
            self.cpu.complete_read(value);
        }
    }

    pub(crate) fn apic_base(&self) -> u64 {
        self.lapic.as_ref().map_or(self.apic_base, |lapic| lapic.apic_base())
    }

    pub(crate) fn set_apic_base(&mut self, value: u64) -> Result<(), Error> {
        if value == self.apic_base() || self.msrs().1.set_apic_base(value, true) {
            Ok(())
        } else {
            Err(Error::Invalid("IA32_APIC_BASE"))
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

    /// Back to the state after power-up (not an ioctl: our VMM's reset).
    pub fn reset(&mut self) {
        // Drops what an unfinished instruction left behind.
        self.cpu.init_reset();
        self.cpu.state = (*self.reset_state).clone();
        self.cpu.injection = None;
        self.events = Events::default();
        self.forget_accesses();
        self.notify = NotifyState::default();
        self.async_pf.clear();
        self.msrs.reset();
        self.cpu.refresh_mode();
        self.cpu.paging_changed();
    }

    /// What the client has been asked for is not wanted any more.
    pub(super) fn forget_accesses(&mut self) {
        self.user_access = false;
        self.msr_pending = None;
        self.hypercall_pending = false;
        self.locks.forget_step();
        self.read_ahead = ReadAhead::default();
    }
}
