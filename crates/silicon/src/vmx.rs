//! Guest mode as VMX defines it: [`Controls`] in, [`Exit`] out. Names and numbers are from the Intel SDM,
//! vol. 3C, chapters 25 to 28 and appendix C.
//!
//! Two things differ from the hardware's VMCS, for a hypervisor's convenience: a port or MMIO exit carries the
//! access itself, and the result goes in with [`Cpu::complete_read`](crate::Cpu::complete_read) before the
//! next entry, which then executes the instruction again.

use crate::exception::Exception;

/// What the hypervisor wants to be told of, and what it sets for the guest (the VMCS control fields).
#[derive(Clone, Debug)]
pub struct Controls {
    /// Exception bitmap: a set bit makes that vector exit instead of being delivered.
    pub exception_bitmap: u32,
    /// Interrupt-window exiting: exit as soon as an external interrupt could be delivered.
    pub interrupt_window_exiting: bool,
    /// NMI-window exiting: exit as soon as an NMI could be delivered.
    pub nmi_window_exiting: bool,
    /// An SMI waits: exit ([`Exit::Smi`]) as soon as it can be taken.
    pub smi_exiting: bool,
    /// HLT exiting.
    pub hlt_exiting: bool,
    /// PAUSE exiting.
    pub pause_exiting: bool,
    /// MWAIT and MONITOR exiting.
    pub mwait_exiting: bool,
    /// RDTSC, RDTSCP exiting.
    pub rdtsc_exiting: bool,
    /// RDPMC exiting.
    pub rdpmc_exiting: bool,
    /// MOV DR exiting.
    pub mov_dr_exiting: bool,
    /// MOV to/from CR8 exiting.
    pub cr8_exiting: bool,
    /// MSR bitmap: the MSRs of [`crate::model`]'s pass-through set that exit all the same.
    pub msr_exiting: bool,
    /// Bus-lock detection (secondary control bit 30): exit with [`Exit::BusLock`] after an instruction or event delivery
    /// that took a bus lock, at any CPL.
    pub bus_lock_detection: bool,
    /// Memory that a region backs is write-back whatever the guest says: the IPAT bit of EPT entries (SDM vol. 3C,
    /// 29.3.7.2) with CR0.CD masked. Otherwise the guest's page tables and IA32_PAT, and CR0.CD, say which memory is
    /// not write-back, as on a processor whose MTRRs say write-back. Nothing but bus locks depends on it.
    pub ignore_pat: bool,
    /// MSR bitmap: RDMSR and WRMSR of IA32_XFD exit. A hypervisor that gives the guest the register only once it needs it
    /// has its first use exit, and stores with [`Cpu::put_state_msr`](crate::Cpu::put_state_msr).
    pub xfd_exiting: bool,
    /// Enable PML: pages newly marked in the dirty log are listed in [`Cpu::modified_pages`](crate::Cpu).
    pub page_modification_logging: bool,
    /// Added to the scaled TSC.
    pub tsc_offset: u64,
    /// TSC scaling: 16.48 fixed-point multiplier (1 << 48 = one).
    pub tsc_multiplier: u64,
    /// Notify VM exiting (bit 31 of the secondary controls): exit with [`Exit::Notify`] when no event window has come for
    /// the part's internal threshold and [`Controls::notify_window`].
    pub notify_exiting: bool,
    /// NOTIFY_WINDOW, field 4024H: ticks of the crystal clock.
    pub notify_window: u32,
    /// Exit after every instruction (monitor trap flag).
    pub monitor_trap_flag: bool,
    /// EPT-violation #VE (secondary processor-based control 18; SDM vol. 3C, 26.5.7).
    pub ept_violation_ve: bool,
    /// Guest-physical address of the virtualization-exception information area (field 202AH has the host's).
    pub ve_information: u64,
    /// EPTP index (field 4).
    pub eptp_index: u16,
    /// Exit with [`Exit::Budget`] once this many instructions have completed (`u64::MAX`: never). Counted
    /// from the CPU's life-time count, [`Cpu::instructions`](crate::Cpu::instructions).
    pub instruction_limit: u64,
}

impl Default for Controls {
    fn default() -> Controls {
        Controls {
            exception_bitmap: 0,
            interrupt_window_exiting: false,
            nmi_window_exiting: false,
            smi_exiting: false,
            hlt_exiting: true,
            pause_exiting: false,
            mwait_exiting: true,
            rdtsc_exiting: false,
            rdpmc_exiting: true,
            mov_dr_exiting: false,
            cr8_exiting: true,
            msr_exiting: false,
            bus_lock_detection: false,
            ignore_pat: false,
            xfd_exiting: false,
            page_modification_logging: false,
            tsc_offset: 0,
            tsc_multiplier: 1 << 48,
            notify_exiting: false,
            notify_window: 0,
            monitor_trap_flag: false,
            ept_violation_ve: false,
            ve_information: 0,
            eptp_index: 0,
            instruction_limit: u64::MAX,
        }
    }
}

/// Encoding of the NOTIFY_WINDOW field.
pub const NOTIFY_WINDOW: u32 = 0x4024;
/// Notify VM exiting among the secondary processor-based controls. A part that has it says so in the upper half of
/// IA32_VMX_PROCBASED_CTLS2 (allowed-1; SDM vol. 3D, A.3.3).
pub const SECONDARY_NOTIFY_EXITING: u32 = 1 << 31;

impl Controls {
    /// VMWRITE of a 32-bit control field: the upper half of the operand is ignored (SDM vol. 3C, VMWRITE). False: these
    /// controls have no such field.
    pub fn write_field(&mut self, encoding: u32, value: u64) -> bool {
        let known = encoding == NOTIFY_WINDOW;
        if known {
            self.notify_window = value as u32;
        }
        known
    }

    /// VMREAD of a control field.
    pub fn read_field(&self, encoding: u32) -> Option<u64> {
        (encoding == NOTIFY_WINDOW).then_some(self.notify_window.into())
    }
}

/// What a notify VM exit tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notify {
    /// The guest's context is lost (bit 0 of the exit qualification): what the guest state says is not where it was.
    pub context_invalid: bool,
    /// The exit came in an IRET that had unblocked NMIs (bit 12). Undefined if the IDT-vectoring information is valid.
    pub nmi_unblocking: bool,
    /// Ticks that the window had been closed for. Hardware does not tell.
    pub ticks: u64,
}

impl Notify {
    /// The exit qualification.
    pub fn qualification(&self) -> u64 {
        u64::from(self.context_invalid) | u64::from(self.nmi_unblocking) << 12
    }
}

/// An event that VM entry injects (VM-entry interruption information, SDM vol. 3C, 25.8.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// External interrupt with this vector. The hypervisor has checked that the guest can take it.
    Interrupt(u8),
    /// The same, from the local APIC's timer or another processor's APIC: it does not tell of anything that a device has written since the
    /// last one that did.
    Local(u8),
    /// Non-maskable interrupt; blocks NMIs until IRET.
    Nmi,
    /// Hardware exception. As on VMX, CR2, DR6, DR7.GD and RFLAGS.RF are the hypervisor's to set before the
    /// entry; the exception's payload is not looked at.
    Exception(Exception),
    /// Software interrupt or exception (INT n, INT3, INTO) whose delivery was cut short by an exit.
    Software {
        /// Vector.
        vector: u8,
        /// Length of the instruction, added to RIP for the return address.
        length: u8,
    },
}

/// Address space of a [`BusAccess`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// I/O ports.
    Port,
    /// Guest-physical memory that no region backs.
    Memory,
}

/// One access that guest mode could not do itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusAccess {
    /// Ports or memory.
    pub space: Space,
    /// Port number or guest-physical address.
    pub address: u64,
    /// Bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// The value of a write, zero-extended; `None` for a read.
    pub write: Option<u64>,
}

/// Why guest mode was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// An exception that the exception bitmap selects (reason 0).
    Exception(Exception),
    /// Another thread asked for the CPU (reason 1, external interrupt).
    ExternalInterrupt,
    /// Triple fault (reason 2).
    TripleFault,
    /// The SMI that [`Controls::smi_exiting`] tells of can be taken now (reason 6, other SMI).
    Smi,
    /// An interrupt can be delivered now (reason 7).
    InterruptWindow,
    /// An NMI can be delivered now (reason 8).
    NmiWindow,
    /// CPUID (reason 10).
    Cpuid,
    /// HLT (reason 12).
    Hlt,
    /// INVD (reason 13).
    Invd,
    /// RDPMC (reason 15).
    Rdpmc,
    /// RSM in system management mode (reason 17). The state that it returns to lies in memory in a layout of the
    /// hypervisor's, which loads it; without the SMM-transfer monitor only the reason is the SDM's.
    Rsm,
    /// RDTSC or RDTSCP with RDTSC exiting (reason 16).
    Rdtsc,
    /// VMCALL (reason 18).
    Vmcall,
    /// VMMCALL, which AMD's processors have in the place of VMCALL. On Intel's it is #UD, which hypervisors look into;
    /// the reason is that of VMCALL.
    Vmmcall,
    /// Another VMX instruction; the value is the SDM's exit reason (19 to 27).
    VmxInstruction(u16),
    /// MOV CR8 (reason 28): register number, and whether the guest reads it.
    Cr8 {
        /// General register, 0 to 15.
        register: u8,
        /// MOV from CR8.
        read: bool,
    },
    /// MOV DR (reason 29).
    MovDr {
        /// Debug register number.
        dr: u8,
        /// General register.
        register: u8,
        /// MOV from DR.
        read: bool,
    },
    /// Port I/O (reason 30).
    Io(BusAccess),
    /// RDMSR of an MSR that the hypervisor keeps (reason 31).
    Rdmsr {
        /// MSR number.
        index: u32,
    },
    /// WRMSR of an MSR that the hypervisor keeps (reason 32).
    Wrmsr {
        /// MSR number.
        index: u32,
        /// EDX:EAX.
        value: u64,
    },
    /// MWAIT (reason 36).
    Mwait,
    /// Monitor trap flag (reason 37).
    MonitorTrap,
    /// MONITOR (reason 39).
    Monitor,
    /// PAUSE (reason 40).
    Pause,
    /// Access to guest-physical memory that no region allows (reason 48, EPT violation).
    EptViolation(BusAccess),
    /// WBINVD or WBNOINVD (reason 54).
    Wbinvd,
    /// XSETBV (reason 55): the hypervisor validates and stores.
    Xsetbv {
        /// ECX.
        index: u32,
        /// EDX:EAX.
        value: u64,
    },
    /// The instruction at RIP cannot be executed in this machine state (an instruction fetch from MMIO, or a
    /// page walk through it).
    /// The SDM has no such exit; KVM reports it as an emulation failure.
    FetchFailed {
        /// Guest-physical address of the fetch, or of the paging-structure entry.
        gpa: u64,
    },
    /// The instruction at RIP needs XSAVE components that this CPU has no room for yet (AMX's tiles): make it with
    /// [`Cpu::reserve_tile_data`](crate::Cpu::reserve_tile_data) and enter again. Nothing has happened yet that the guest
    /// can see. Hardware has room for all of its registers and no such exit; a kernel learns of the first use by an exit
    /// for #NM, whose reason this has.
    StateNeeded {
        /// As in XCR0.
        components: u64,
    },
    /// Guest-physical memory that a region has, and the host has not, or does not let us use so: unmapped, protected,
    /// beyond the end of its file, failed. Nothing has happened; the entry after the host has been repaired executes
    /// the instruction, or delivers the event, again. (The SDM has an EPT violation, reason 48, for it.)
    MemoryAbsent {
        /// Guest-physical address of the page.
        gpa: u64,
        /// Host address of the page.
        host: u64,
        /// The host says that the memory has failed (hardware poison).
        failed: bool,
    },
    /// Guest-physical memory that the host has to bring from somewhere first, of a region that is to be told of
    /// ([`Ept::set_lazy`](crate::mmu::ept::Ept::set_lazy)). Nothing has happened, and nobody has waited. (Reason 48, too.)
    MemoryElsewhere {
        /// Guest-physical address in the map, with [`SMM_SPACE`](crate::mmu::ept::SMM_SPACE).
        address: u64,
        /// Host address of the page.
        host: u64,
        /// Linear address of the access; `None`: a page walk.
        lin: Option<u64>,
        /// It would have written.
        write: bool,
    },
    /// The page-modification log is full (reason 62).
    PageLogFull,
    /// A bus lock was taken ([`Controls::bus_lock_detection`], reason 74): the instruction or event delivery that took it
    /// is complete. Other exits say so with [`Cpu::exit_bus_lock`](crate::Cpu::exit_bus_lock).
    BusLock,
    /// No event window for too long (reason 75).
    Notify(Notify),
    /// [`Controls::instruction_limit`] was reached (the SDM's VMX-preemption timer, reason 52, counted in
    /// instructions).
    Budget,
}

impl Exit {
    /// Basic exit reason (SDM vol. 3D, appendix C).
    pub fn reason(&self) -> u16 {
        match self {
            Exit::Exception(_) | Exit::StateNeeded { .. } => 0,
            Exit::ExternalInterrupt => 1,
            Exit::TripleFault => 2,
            Exit::Smi => 6,
            Exit::InterruptWindow => 7,
            Exit::NmiWindow => 8,
            Exit::Cpuid => 10,
            Exit::Hlt => 12,
            Exit::Invd => 13,
            Exit::Rdpmc => 15,
            Exit::Rdtsc => 16,
            Exit::Rsm => 17,
            Exit::Vmcall | Exit::Vmmcall => 18,
            Exit::VmxInstruction(reason) => *reason,
            Exit::Cr8 { .. } => 28,
            Exit::MovDr { .. } => 29,
            Exit::Io(_) => 30,
            Exit::Rdmsr { .. } => 31,
            Exit::Wrmsr { .. } => 32,
            Exit::Mwait => 36,
            Exit::MonitorTrap => 37,
            Exit::Monitor => 39,
            Exit::Pause => 40,
            Exit::EptViolation(_) | Exit::MemoryAbsent { .. } | Exit::MemoryElsewhere { .. } => 48,
            Exit::FetchFailed { .. } => 49,
            Exit::Budget => 52,
            Exit::Wbinvd => 54,
            Exit::Xsetbv { .. } => 55,
            Exit::PageLogFull => 62,
            Exit::BusLock => 74,
            Exit::Notify(_) => 75,
        }
    }

    /// The SDM's name of the basic exit reason, in the short form that statistics print.
    pub fn name(&self) -> &'static str {
        match self {
            Exit::Exception(_) => "exception",
            Exit::StateNeeded { .. } => "state_needed",
            Exit::ExternalInterrupt => "external_interrupt",
            Exit::TripleFault => "triple_fault",
            Exit::Smi => "smi",
            Exit::InterruptWindow => "interrupt_window",
            Exit::NmiWindow => "nmi_window",
            Exit::Cpuid => "cpuid",
            Exit::Hlt => "hlt",
            Exit::Invd => "invd",
            Exit::Rdpmc => "rdpmc",
            Exit::Rdtsc => "rdtsc",
            Exit::Rsm => "rsm",
            Exit::Vmcall | Exit::Vmmcall => "vmcall",
            Exit::VmxInstruction(_) => "vmx_instruction",
            Exit::Cr8 { .. } => "cr8_access",
            Exit::MovDr { .. } => "dr_access",
            Exit::Io(_) => "io_instruction",
            Exit::Rdmsr { .. } => "rdmsr",
            Exit::Wrmsr { .. } => "wrmsr",
            Exit::Mwait => "mwait",
            Exit::MonitorTrap => "monitor_trap",
            Exit::Monitor => "monitor",
            Exit::Pause => "pause",
            Exit::EptViolation(_) | Exit::MemoryAbsent { .. } | Exit::MemoryElsewhere { .. } => {
                "ept_violation"
            }
            Exit::FetchFailed { .. } => "fetch_failed",
            Exit::Budget => "budget",
            Exit::Wbinvd => "wbinvd",
            Exit::Xsetbv { .. } => "xsetbv",
            Exit::PageLogFull => "page_log_full",
            Exit::BusLock => "bus_lock",
            Exit::Notify(_) => "notify",
        }
    }
}
