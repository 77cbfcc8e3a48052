//! Counters of a vCPU, readable by other threads while it runs.

use std::sync::atomic::{AtomicU64, Ordering};

use silicon::vmx::Exit;

/// Exit reasons counted one by one (SDM vol. 3D, appendix C, has fewer than this).
const REASONS: usize = 80;

/// What one vCPU has done.
#[derive(Debug)]
pub struct VcpuStats {
    exits: [AtomicU64; REASONS],
    names: [std::sync::OnceLock<&'static str>; REASONS],
    /// Instructions completed, as of the last exit.
    pub instructions: AtomicU64,
    /// KVM_RUN calls that returned to the caller.
    pub user_exits: AtomicU64,
    /// External interrupts injected.
    pub interrupts: AtomicU64,
    /// NMIs injected.
    pub nmis: AtomicU64,
    /// Times the vCPU went to sleep in HLT.
    pub halts: AtomicU64,
}

impl Default for VcpuStats {
    fn default() -> VcpuStats {
        VcpuStats {
            exits: [const { AtomicU64::new(0) }; REASONS],
            names: [const { std::sync::OnceLock::new() }; REASONS],
            instructions: AtomicU64::new(0),
            user_exits: AtomicU64::new(0),
            interrupts: AtomicU64::new(0),
            nmis: AtomicU64::new(0),
            halts: AtomicU64::new(0),
        }
    }
}

impl VcpuStats {
    /// Counts an exit.
    pub(crate) fn exit(&self, exit: &Exit) {
        let reason = usize::from(exit.reason()).min(REASONS - 1);
        self.exits[reason].fetch_add(1, Ordering::Relaxed);
        self.names[reason].get_or_init(|| exit.name());
    }

    /// Exits by reason: name and count, the frequent ones first.
    pub fn exits(&self) -> Vec<(&'static str, u64)> {
        let mut rows: Vec<_> = (self.exits.iter().zip(&self.names))
            .filter_map(|(count, name)| Some((*name.get()?, count.load(Ordering::Relaxed))))
            .collect();
        rows.sort_by_key(|&(name, count)| (std::cmp::Reverse(count), name));
        rows
    }
}
