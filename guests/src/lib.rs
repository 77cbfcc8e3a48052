//! Bare-metal guest programs: what the host cannot show. Each program in `asm` checks itself and says PASS, SKIP or
//! FAIL with its source line on the serial port, then writes 0 or 1 to the debug-exit port (0xf4). They are multiboot
//! images, so any virtual machine monitor can run them; [`machine`] is a small one over the hypervisor's calls.

pub mod elf;
pub mod lazy;
pub mod machine;
pub mod pager;

/// A guest program.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Name of its source file without `.S`.
    pub name: &'static str,
    /// The ELF image.
    pub image: &'static [u8],
    /// vCPUs that it wants.
    pub cpus: u32,
    source: &'static str,
}

impl Program {
    /// The behaviours that it shows, in the order of its source: the line of each `BEHAVIOUR(name)`, which it tells
    /// [`machine`] when it comes there, and its name.
    pub fn behaviours(&self) -> impl Iterator<Item = (u16, &'static str)> {
        (1..).zip(self.source.lines()).filter_map(|(line, text)| {
            let name = text.trim().strip_prefix("BEHAVIOUR(")?.strip_suffix(')')?;
            Some((line, name))
        })
    }
}

/// The kernel in Rust (`pager/`): tasks that go on while pages of others are elsewhere. Its parameters are in memory.
pub const PAGER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pager.elf"));

macro_rules! programs {
    ($($(#[$doc:meta])* $constant:ident $name:literal $cpus:literal $source:literal;)*) => {
        $(
            $(#[$doc])*
            pub const $constant: Program = Program {
                name: $name,
                image: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".elf")),
                cpus: $cpus,
                source: include_str!(concat!("../asm/", $source, ".S")),
            };
        )*
        /// All programs.
        pub const PROGRAMS: &[Program] = &[$($constant),*];
    };
}

programs! {
    /// Every exception that software can cause.
    EXCEPTIONS "exceptions" 1 "exceptions";
    /// Page-table bits, error codes, Accessed and Dirty.
    PAGES "pages" 1 "pages";
    /// AMX's tiles and IA32_XFD.
    AMX "amx" 1 "amx";
    /// SMEP, SMAP, UMIP, protection keys.
    PROTECTION "protection" 1 "protection";
    /// Single step, breakpoints, DR6 and DR7.
    DEBUG "debug" 1 "debug";
    /// String instructions that fault midway.
    STRINGS "strings" 1 "strings";
    /// Code that changes itself.
    SELF_MODIFY "smc" 1 "smc";
    /// Code that another processor changes.
    CROSS_MODIFY "cross_modify" 2 "cross_modify";
    /// SYSCALL, SYSENTER, call gates, compatibility mode.
    SYSCALLS "syscalls" 1 "syscalls";
    /// Hardware task switches.
    TASKS "tasks" 1 "tasks";
    /// Real, protected, compatibility and long mode one after the other.
    MODES "modes" 1 "modes";
    /// Virtual-8086 mode.
    VIRTUAL_8086 "virtual8086" 1 "virtual8086";
    /// The local APIC's timer and priorities.
    APIC_TIMER "apic_timer" 1 "apic_timer";
    /// Interprocessor interrupts, INIT and SIPI.
    IPI "ipi" 4 "ipi";
    /// NMI blocking and interrupt shadows.
    NMI "nmi" 1 "nmi";
    /// Locked operations of four processors.
    ATOMICS "atomics" 4 "atomics";
    /// Ports and memory-mapped registers: wants the devices of `tests/devices.rs`.
    BUS "bus" 1 "bus";
    /// The 8259s, the 8254 and the I/O APIC: wants the devices of `tests/programs.rs`.
    INTERRUPTS "interrupts" 1 "interrupts";
    /// 1 GiB pages, PCIDs, five levels.
    PAGES_64 "pages64" 1 "pages64";
    /// I/O breakpoints, breakpoint lengths, what single step does to other instructions, interrupt shadows.
    WATCH "watch" 1 "watch";
    /// Exceptions in 32-bit protected mode, segment limits, stack switches, call gates.
    EXCEPTIONS_32 "exceptions32" 1 "exceptions32";
    /// 32-bit paging with 4 MiB pages, and PAE.
    PAGES_32 "pages32" 1 "pages32";
    /// Interrupts within repeated string instructions, and code that writes over what follows it.
    REPEAT "repeat" 1 "repeat";
    /// Asynchronous page faults. Its monitor has memory whose pages come when they are asked for.
    ASYNC_PF "async_pf" 1 "async_pf";
    /// IA32_ARCH_CAPABILITIES and what it enumerates, VERW. Tells at port 0xeb when counters are to be looked at.
    SPECULATION "speculation" 1 "speculation";
    /// Split-lock detection, UC-lock disable, bus-lock traps.
    SPLIT_LOCK "split_lock" 1 "split_lock";
    /// A user-mode #AC handler with an odd stack: its monitor has to mend it.
    NOTIFY_32 "notify32" 1 "notify32";
    /// A data breakpoint on the stack of #DB: likewise.
    NOTIFY_64 "notify64" 1 "notify64";
    /// Long work that is no attack.
    NOTIFY_LEGAL "notify_legal" 2 "notify_legal";
    /// The local APIC in x2APIC mode.
    X2APIC "x2apic" 4 "ipi";
}
