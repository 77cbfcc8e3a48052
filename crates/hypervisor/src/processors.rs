//! The host's processors: the threads that vCPUs are loaded on while they run, and what the host kernel keeps in
//! MSR_TEST_CTRL and for the buffers of their cores.
//!
//! A vCPU has one thread for life: number `16 v + id` of [`THREADS`], counted round, for the vCPU `id` of the `v`th VM. So
//! the vCPUs of a VM are on different threads (up to [`THREADS`] of them), neighbours share a core where there is SMT, and VMs of
//! up to 16 vCPUs have cores of their own until there are more of them than the machine has room for.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use silicon::bus_lock::{TestCtrl, test_ctrl};
use silicon::model::CpuModel;
use silicon::model::msrs::{MSR_TEST_CTRL, Scope};
use silicon::topology::{Loaded, Thread, Topology};

use crate::host::HostParams;
use crate::mitigations::entry::Control;
use crate::split_lock::host_test_ctrl;

/// Logical processors of the host.
pub const THREADS: u32 = 256;
/// From one VM's first thread to the next one's.
const STRIDE: u32 = 16;

/// What vCPUs want of MSR_TEST_CTRL while they are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// That split locks execute (host in warn mode).
    SplitLocks,
    /// That locks on memory that is not write-back fault.
    UcLockFaults,
}

/// How many vCPUs want what.
#[derive(Debug, Default)]
struct Wanted {
    split_locks: u32,
    uc_lock_faults: u32,
}

/// The host's processors.
#[derive(Debug)]
pub struct Processors {
    topology: Topology,
    /// What the host kernel has in MSR_TEST_CTRL while no vCPU wants anything else.
    test_ctrl: u64,
    /// Threads that share an MSR_TEST_CTRL.
    sharers: u32,
    /// One for each MSR_TEST_CTRL.
    wanted: Box<[Mutex<Wanted>]>,
    /// One for each thread.
    controls: Box<[Mutex<Control>]>,
    vms: AtomicU32,
}

impl Processors {
    /// A machine of processors of `model` with `arch_capabilities`, booted with `host`.
    pub fn new(model: &CpuModel, arch_capabilities: u64, host: &HostParams) -> Processors {
        let topology = Topology::of(host.shape(THREADS), model, arch_capabilities);
        let sharers = match model.test_ctrl_scope() {
            Scope::Thread => 1,
            Scope::Core | Scope::Package => topology.shape().threads,
        };
        let processors = Processors {
            test_ctrl: host_test_ctrl(host.split_lock_detect),
            sharers,
            wanted: (0..THREADS / sharers).map(|_| Mutex::default()).collect(),
            controls: topology.threads().iter().map(|thread| Mutex::new(Control::new(thread))).collect(),
            topology,
            vms: AtomicU32::new(0),
        };
        for register in 0..THREADS / sharers {
            processors.write(register, &Wanted::default());
        }
        processors
    }

    /// A number for a new VM.
    pub(crate) fn number_vm(&self) -> u32 {
        self.vms.fetch_add(1, Ordering::Relaxed)
    }

    /// The thread of vCPU 0 of a VM.
    pub(crate) fn place_of(vm: u32) -> u32 {
        vm.wrapping_mul(STRIDE) % THREADS
    }

    /// The thread of vCPU `id` of the VM at `place`.
    pub(crate) fn thread_of(place: u32, id: u32) -> u32 {
        place.wrapping_add(id) % THREADS
    }

    /// Logical processor `thread`, counted round.
    pub fn thread(&self, thread: u32) -> Option<&Thread> {
        self.topology.thread(thread % THREADS)
    }

    /// What the host kernel keeps for the buffers of a thread's core.
    pub(crate) fn control(&self, thread: u32) -> Option<MutexGuard<'_, Control>> {
        let control = self.controls.get((thread % THREADS) as usize)?;
        Some(control.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Loads a vCPU on `thread`; dropping the result puts it.
    pub(crate) fn load(&self, thread: u32) -> Option<Loaded<'_>> {
        self.thread(thread).map(Thread::load)
    }

    /// MSR_TEST_CTRL as `thread` sees it.
    pub fn test_ctrl(&self, thread: u32) -> TestCtrl {
        self.thread(thread).map_or_else(TestCtrl::default, Thread::test_ctrl)
    }

    /// Changes what is wanted of a register. Counting it in one place is why no vCPU's end can undo another one's wish, nor
    /// leave detection off (the kernel's delayed work did: commit c929d08df8be).
    fn change(&self, register: u32, change: impl FnOnce(&mut Wanted)) {
        let Some(wanted) = self.wanted.get(register as usize) else { return };
        let mut wanted = wanted.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut wanted);
        self.write(register, &wanted);
    }

    fn write(&self, register: u32, wanted: &Wanted) {
        let split = if wanted.split_locks != 0 { test_ctrl::SPLIT_LOCK_DETECT } else { 0 };
        let uc = if wanted.uc_lock_faults != 0 { test_ctrl::UC_LOCK_DISABLE } else { 0 };
        if let Some(thread) = self.topology.thread(register * self.sharers) {
            // Models without the register have nothing to be written.
            let _ = thread.write_msr(MSR_TEST_CTRL, self.test_ctrl & !split | uc);
        }
    }
}

/// A vCPU wants something of its MSR_TEST_CTRL, as long as this exists.
#[derive(Debug)]
pub(crate) struct Claim {
    processors: Arc<Processors>,
    register: u32,
    want: Want,
}

impl Claim {
    /// The vCPU on `thread` wants it.
    pub(crate) fn new(processors: &Arc<Processors>, thread: u32, want: Want) -> Claim {
        let claim =
            Claim { processors: processors.clone(), register: thread % THREADS / processors.sharers, want };
        claim.count(1);
        claim
    }

    fn count(&self, by: i32) {
        self.processors.change(self.register, |wanted| {
            let count = match self.want {
                Want::SplitLocks => &mut wanted.split_locks,
                Want::UcLockFaults => &mut wanted.uc_lock_faults,
            };
            *count = count.saturating_add_signed(by);
        });
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.count(-1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processors(host: &str) -> Arc<Processors> {
        Arc::new(Processors::new(&CpuModel::default(), 0, &HostParams::parse(host).unwrap()))
    }

    #[test]
    fn the_host_sets_every_core() {
        for (host, bit) in [("off", 0), ("warn", 1), ("fatal", 1), ("ratelimit:5", 0)] {
            let processors = processors(&format!("split_lock_detect={host}"));
            assert!((0..THREADS).all(|thread| processors.test_ctrl(thread).get() >> 29 == bit), "{host}");
        }
    }

    /// What the kernel's one delayed work item got wrong (G5).
    #[test]
    fn detection_comes_back_when_the_last_claim_of_a_core_goes() {
        let processors = processors("smt=on split_lock_detect=warn");
        let seen = || [0, 1, 2, 3].map(|thread| processors.test_ctrl(thread).get() >> 29);
        let claim = |thread| Claim::new(&processors, thread, Want::SplitLocks);
        let (first, second, other) = (claim(0), claim(1), claim(2));
        assert_eq!(seen(), [0, 0, 0, 0]);
        drop(other);
        assert_eq!(seen(), [0, 0, 1, 1]);
        drop(first);
        assert_eq!(seen(), [0, 0, 1, 1], "the other thread of the core still wants it");
        drop(second);
        assert_eq!(seen(), [1, 1, 1, 1]);
    }

    #[test]
    fn vms_have_places_of_their_own() {
        let processors = processors("");
        let places: Vec<u32> = (0..17).map(|_| Processors::place_of(processors.number_vm())).collect();
        assert_eq!((places[0], places[1], places[16]), (0, 16, 0));
        assert_eq!(Processors::thread_of(240, 17), 1);
    }
}
