//! Counters of VMs and vCPUs, readable by other threads while they run, and by the client through a descriptor
//! (KVM_GET_STATS_FD; kernel: Documentation/virt/kvm/api.rst 4.133). Names are the kernel's where it counts the same.

pub mod page;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use silicon::vmx::Exit;

use page::{Counter, Description, Histogram, Kind, StatsPage};

/// Exit reasons counted one by one (SDM vol. 3D, appendix C, has fewer than this).
const REASONS: usize = 80;

macro_rules! statistics {
    (
        $(#[$about:meta])* $structure:ident $table:ident [$($extra:ident: $type:ty)?];
        $($(#[$doc:meta])* $field:ident $name:literal $kind:ident;)*
    ) => {
        $(#[$about])*
        #[derive(Debug)]
        pub struct $structure {
            page: Arc<StatsPage>,
            $($(#[$doc])* pub $field: statistics!(@type $kind),)*
            $($extra: $type,)?
        }

        static $table: &[Description] = {
            const KINDS: &[Kind] = &[$(Kind::$kind),*];
            const NAMES: &[&str] = &[$($name),*];
            &{
                let mut table =
                    [Description { name: "", kind: Kind::Count, word: 0 }; KINDS.len()];
                let (mut index, mut word) = (0, 0);
                while index < KINDS.len() {
                    table[index] = Description { name: NAMES[index], kind: KINDS[index], word };
                    word += KINDS[index].words();
                    index += 1;
                }
                assert!(word <= StatsPage::WORDS);
                table
            }
        };

        impl $structure {
            /// All zero.
            pub fn new() -> io::Result<$structure> {
                let page = Arc::new(StatsPage::new()?);
                let mut words = $table.iter().map(|description| description.word);
                let mut next = || words.next().unwrap_or(StatsPage::WORDS - 1);
                Ok($structure {
                    $($field: <statistics!(@type $kind)>::new(&page, next()),)*
                    page,
                    $($extra: Default::default(),)?
                })
            }

            /// KVM_GET_STATS_FD: a descriptor that reads header, descriptions and counters. `id` names the object.
            pub fn descriptor(&self, id: &str) -> io::Result<OwnedFd> {
                self.page.open(id, $table)
            }
        }
    };
    (@type DurationHistogram) => { Histogram };
    (@type $kind:ident) => { Counter };
}

/// Exits by reason.
#[derive(Debug)]
struct Reasons {
    counts: [AtomicU64; REASONS],
    names: [std::sync::OnceLock<&'static str>; REASONS],
}

impl Default for Reasons {
    fn default() -> Reasons {
        Reasons {
            counts: [const { AtomicU64::new(0) }; REASONS],
            names: [const { std::sync::OnceLock::new() }; REASONS],
        }
    }
}

statistics! {
    /// What one vCPU has done.
    VcpuStats VCPU_TABLE [reasons: Reasons];
    /// Times that polling (KVM_CAP_HALT_POLL) made a sleep needless.
    successful_polls "halt_successful_poll" Count;
    /// Times that the vCPU polled before it slept.
    polls "halt_attempted_poll" Count;
    /// Times the vCPU left HLT because something had come for it.
    wakeups "halt_wakeup" Count;
    /// Time that it slept in HLT.
    halt_wait "halt_wait_ns" Nanoseconds;
    /// The same, one by one.
    halt_waits "halt_wait_hist" DurationHistogram;
    /// It sleeps.
    blocking "blocking" Flag;
    /// Exits from guest mode.
    all_exits "exits" Count;
    /// Port accesses that left guest mode.
    io_exits "io_exits" Count;
    /// Accesses to memory that is not there.
    mmio_exits "mmio_exits" Count;
    /// KVM_RUN calls that a signal or `immediate_exit` ended.
    signal_exits "signal_exits" Count;
    /// Exits because an interrupt could be taken.
    irq_window_exits "irq_window_exits" Count;
    /// Exits because an NMI could be taken.
    nmi_window_exits "nmi_window_exits" Count;
    /// Times the vCPU went to sleep in HLT.
    halts "halt_exits" Count;
    /// Exits because another thread wanted the vCPU's attention.
    kicks "irq_exits" Count;
    /// Hypercalls.
    hypercalls "hypercalls" Count;
    /// Interrupts injected.
    interrupts "irq_injections" Count;
    /// NMIs injected.
    nmis "nmi_injections" Count;
    /// Instructions completed, as of the last exit.
    instructions "instructions" Count;
    /// KVM_RUN calls that returned to the caller.
    user_exits "user_exits" Count;
    /// Bus locks taken, as of the last exit.
    bus_locks "bus_locks" Count;
    /// Split locks that the guest got #AC for, because it asked for it or by policy.
    split_locks_forwarded "split_locks_forwarded" Count;
    /// Split locks that the host has warned of and let through.
    split_locks_warned "split_locks_warned" Count;
    /// Split locks that were made with the VM's other vCPUs standing still.
    split_locks_emulated "split_locks_emulated" Count;
    /// Split locks that ended KVM_RUN with EFAULT.
    split_locks_efault "split_locks_efault" Count;
    /// Split locks that the client was told of by an exit.
    split_locks_exit "split_locks_exit" Count;
    /// Split locks that the client got SIGBUS for.
    split_locks_killed "split_locks_killed" Count;
    /// Locks on memory that is not write-back that the processor has refused.
    uc_locks "uc_locks_refused" Count;
    /// Time that the vCPU was held back for split locks and bus locks.
    split_lock_throttle "split_lock_throttle_ns" Nanoseconds;
    /// Exits because no event window had come for too long, with a valid context or without.
    notify_window_exits "notify_window_exits" Count;
    /// Time that the vCPU was held back for making no progress between them.
    notify_throttle "notify_throttle_ns" Nanoseconds;
    /// Exits for reads and writes of IA32_XFD, before the guest had a use for tiles.
    xfd_exits "xfd_exits" Count;
    /// #NM that IA32_XFD has caused, as of the last exit.
    xfd_faults "xfd_faults" Count;
    /// Bytes of memory that the vCPU's tiles take.
    tile_bytes "tile_data_bytes" Present;
    /// What the host kernel has done for the vCPU's extended state, where it does not stay in the vCPU.
    host_xsaves "host_xsaves" Count;
    /// Likewise.
    host_xrstors "host_xrstors" Count;
    /// Its reads of IA32_XFD.
    host_xfd_reads "host_xfd_reads" Count;
    /// Its writes of IA32_XFD.
    host_xfd_writes "host_xfd_writes" Count;
    /// Accesses to pages that are elsewhere.
    async_pf_faults "async_pf_faults" Count;
    /// Those of them that page walks made.
    async_pf_walk_faults "async_pf_walk_faults" Count;
    /// Pages that the guest was told of by #PF.
    async_pf_not_present "async_pf_not_present" Count;
    /// Interrupts for pages that have come, and for everybody.
    async_pf_ready "async_pf_ready" Count;
    /// Times that the vCPU was held for one.
    async_pf_holds "async_pf_holds" Count;
    /// Pages that an access itself has waited for.
    async_pf_waits "async_pf_waits" Count;
    /// Pages that were found to have failed.
    async_pf_failed "async_pf_failed" Count;
    /// From the request for a page until the vCPU hears of it.
    async_pf_latency "async_pf_latency_hist" DurationHistogram;
    /// Events of the page-not-present protocol.
    pnp_events "page_not_present_events" Count;
    /// Its tokens that were given on request, after #VE.
    pnp_requests "page_not_present_requests" Count;
    /// Its resolutions.
    pnp_resolutions "page_not_present_resolutions" Count;
    /// #MC for failed pages that could not be told.
    pnp_machine_checks "page_not_present_machine_checks" Count;
    /// Times that the guest could not go on.
    pnp_killed "page_not_present_killed" Count;
    /// L1 data cache flushes before entries.
    l1d_flushes "l1d_flush" Count;
    /// VERWs before entries.
    buffer_clears "buffer_clears" Count;
    /// IBPBs when the vCPU was loaded.
    branch_barriers "branch_barriers" Count;
    /// The host kernel's reads of IA32_MCU_OPT_CTRL for it.
    mcu_opt_ctrl_reads "mcu_opt_ctrl_reads" Count;
    /// And its writes.
    mcu_opt_ctrl_writes "mcu_opt_ctrl_writes" Count;
    /// Entries with somebody else's data in a buffer that the guest could sample.
    stale_entries "stale_entries" Count;
    /// VERWs of the guest that it had been told would clear fill buffers, and that did not.
    vain_clears "vain_clears" Count;
}

statistics! {
    /// What happened to a VM as a whole.
    VmStats VM_TABLE [];
    /// Times that all vCPUs dropped their translations.
    flushes "remote_tlb_flush" Count;
    /// Times that they were asked to.
    flush_requests "remote_tlb_flush_requests" Count;
    /// Memory slots.
    slots "memory_slots" Present;
    /// vCPUs created.
    vcpus "vcpus" Present;
}

impl VcpuStats {
    /// Counts an exit.
    pub(crate) fn exit(&self, exit: &Exit) {
        let reason = usize::from(exit.reason()).min(REASONS - 1);
        self.reasons.counts[reason].fetch_add(1, Ordering::Relaxed);
        self.reasons.names[reason].get_or_init(|| exit.name());
        self.all_exits.count();
        match exit {
            Exit::Io(_) => self.io_exits.count(),
            Exit::EptViolation(_) => self.mmio_exits.count(),
            Exit::InterruptWindow => self.irq_window_exits.count(),
            Exit::NmiWindow => self.nmi_window_exits.count(),
            Exit::ExternalInterrupt => self.kicks.count(),
            Exit::Vmcall | Exit::Vmmcall => self.hypercalls.count(),
            _ => {}
        }
    }

    /// Counts a sleep in HLT.
    pub(crate) fn slept(&self, time: Duration, woken: bool) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.halt_wait.fetch_add(nanoseconds, Ordering::Relaxed);
        self.halt_waits.add(nanoseconds);
        if woken {
            self.wakeups.count();
        }
    }

    /// Split locks by what became of them.
    pub fn split_locks(&self) -> [(&'static str, u64); 6] {
        [
            ("forwarded", &self.split_locks_forwarded),
            ("warned", &self.split_locks_warned),
            ("emulated", &self.split_locks_emulated),
            ("efault", &self.split_locks_efault),
            ("exit", &self.split_locks_exit),
            ("killed", &self.split_locks_killed),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }

    /// Exits by reason: name and count, the frequent ones first.
    pub fn exits(&self) -> Vec<(&'static str, u64)> {
        let mut rows: Vec<_> = (self.reasons.counts.iter().zip(&self.reasons.names))
            .filter_map(|(count, name)| Some((*name.get()?, count.load(Ordering::Relaxed))))
            .collect();
        rows.sort_by_key(|&(name, count)| (std::cmp::Reverse(count), name));
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_well_formed() {
        for table in [VCPU_TABLE, VM_TABLE] {
            let mut word = 0;
            for (i, row) in table.iter().enumerate() {
                assert_eq!(row.word, word, "{}", row.name);
                assert!(row.name.len() < 48 && !table[i + 1..].iter().any(|other| other.name == row.name));
                word += row.kind.words();
            }
        }
    }

    #[test]
    fn fields_and_rows_are_the_same_counters() {
        let stats = VcpuStats::new().unwrap();
        stats.exit(&Exit::InterruptWindow);
        stats.slept(Duration::from_nanos(3), true);
        let value = |name| {
            let row = VCPU_TABLE.iter().find(|row| row.name == name).unwrap();
            stats.page.counter(row.word).load(Ordering::Relaxed)
        };
        assert_eq!(["exits", "irq_window_exits", "io_exits", "halt_wakeup"].map(value), [1, 1, 0, 1]);
        assert_eq!(value("halt_wait_ns"), 3);
        let row = VCPU_TABLE.iter().find(|row| row.name == "halt_wait_hist").unwrap();
        assert_eq!(stats.page.counter(row.word + 2).load(Ordering::Relaxed), 1);
    }
}
