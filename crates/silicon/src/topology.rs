//! The processor's packages, cores and threads, and the model-specific registers that each of them has.
//!
//! A virtual CPU is *loaded* on a thread for the time that it runs and *put* when it leaves. Registers that
//! cores and packages share are really shared here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bus_lock::TestCtrl;
use crate::model::msrs::{Kept, MSR_TEST_CTRL, MSRS, MsrRow, Scope};
use crate::model::{CpuModel, Feature, Features};

/// How many sockets, cores in each, and threads in each core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Packages.
    pub sockets: u32,
    /// Cores in a package.
    pub cores: u32,
    /// Threads in a core: 2 with SMT.
    pub threads: u32,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape { sockets: 1, cores: 1, threads: 1 }
    }
}

impl Shape {
    /// `count` single-threaded cores in one package.
    pub fn cores(count: u32) -> Shape {
        Shape { cores: count.max(1), ..Shape::default() }
    }

    /// Logical processors in a package.
    pub fn per_package(&self) -> u32 {
        self.cores * self.threads
    }

    /// Logical processors.
    pub fn count(&self) -> u32 {
        self.sockets * self.per_package()
    }

    /// Bits of an APIC ID that number the thread in its core.
    pub fn smt_shift(&self) -> u32 {
        self.threads.max(1).next_power_of_two().trailing_zeros()
    }

    /// Bits of an APIC ID that number the thread in its package.
    pub fn package_shift(&self) -> u32 {
        self.smt_shift() + self.cores.max(1).next_power_of_two().trailing_zeros()
    }

    /// x2APIC ID of logical processor `index`, counted through threads, then cores, then packages.
    pub fn apic_id(&self, index: u32) -> u32 {
        let (threads, cores) = (self.threads.max(1), self.cores.max(1));
        let (thread, core) = (index % threads, index / threads % cores);
        let package = index / threads / cores;
        package << self.package_shift() | core << self.smt_shift() | thread
    }
}

/// An access that the register does not allow: #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MsrFault {
    /// The processor has no such register.
    #[error("no MSR {0:#x}")]
    Absent(u32),
    /// The value changes bits that cannot be written.
    #[error("reserved bits in {value:#x} for MSR {index:#x}")]
    Reserved {
        /// Register.
        index: u32,
        /// Value.
        value: u64,
    },
}

/// What the registers of a machine depend on.
struct Machine<'a> {
    features: &'a Features,
    test_ctrl: Scope,
}

impl Machine<'_> {
    fn scope(&self, row: &MsrRow) -> Scope {
        if row.index == MSR_TEST_CTRL { self.test_ctrl } else { row.scope }
    }
}

/// The registers of one thread, core or package.
#[derive(Debug)]
struct MsrFile(Box<[(&'static MsrRow, Arc<AtomicU64>)]>);

impl MsrFile {
    fn new(scope: Scope, machine: &Machine) -> MsrFile {
        let rows = MSRS.iter().filter(|row| machine.scope(row) == scope && row.kept == Kept::Physical);
        let present = rows.filter(|row| row.feature.is_none_or(|feature| machine.features.has(feature)));
        MsrFile(present.map(|row| (row, Arc::new(AtomicU64::new(row.reset)))).collect())
    }

    fn find(&self, index: u32) -> Option<&(&'static MsrRow, Arc<AtomicU64>)> {
        self.0.binary_search_by_key(&index, |(row, _)| row.index).ok().map(|i| &self.0[i])
    }
}

/// A package: what all of its cores share.
#[derive(Debug)]
pub struct Package {
    msrs: MsrFile,
}

/// A core: what its threads share.
#[derive(Debug)]
pub struct Core {
    package: Arc<Package>,
    msrs: MsrFile,
}

/// A logical processor.
#[derive(Debug)]
pub struct Thread {
    core: Arc<Core>,
    msrs: MsrFile,
    uc_lock_is_ac: bool,
    apic_id: u32,
    loads: AtomicU64,
    puts: AtomicU64,
}

/// A virtual CPU is on the thread; dropping this takes it off.
#[derive(Debug)]
pub struct Loaded<'a>(&'a Thread);

impl Thread {
    /// x2APIC ID.
    pub fn apic_id(&self) -> u32 {
        self.apic_id
    }

    /// The core that it belongs to.
    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Puts a virtual CPU on the thread.
    pub fn load(&self) -> Loaded<'_> {
        self.loads.fetch_add(1, Ordering::Relaxed);
        Loaded(self)
    }

    /// How often virtual CPUs were loaded and put.
    pub fn switches(&self) -> (u64, u64) {
        (self.loads.load(Ordering::Relaxed), self.puts.load(Ordering::Relaxed))
    }

    /// Reads a physical register.
    pub fn read_msr(&self, index: u32) -> Result<u64, MsrFault> {
        let (_, cell) = self.find(index)?;
        Ok(cell.load(Ordering::Acquire))
    }

    /// Writes a physical register.
    pub fn write_msr(&self, index: u32, value: u64) -> Result<(), MsrFault> {
        let (row, cell) = self.find(index)?;
        let checked = |old: u64| ((old ^ value) & !row.writable == 0).then_some(value);
        cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, checked)
            .map(|_| ())
            .map_err(|_| MsrFault::Reserved { index, value })
    }

    /// The thread's MSR_TEST_CTRL, for [`Cpu::test_ctrl`](crate::Cpu::test_ctrl); a private one that holds zero if the
    /// processor has none.
    pub fn test_ctrl(&self) -> TestCtrl {
        self.find(MSR_TEST_CTRL).map_or_else(
            |_| TestCtrl::default(),
            |(_, cell)| TestCtrl::new(Arc::clone(cell), self.uc_lock_is_ac),
        )
    }

    fn find(&self, index: u32) -> Result<&(&'static MsrRow, Arc<AtomicU64>), MsrFault> {
        let core = &self.core;
        [&self.msrs, &core.msrs, &core.package.msrs]
            .into_iter()
            .find_map(|file| file.find(index))
            .ok_or(MsrFault::Absent(index))
    }
}

impl Drop for Loaded<'_> {
    fn drop(&mut self) {
        self.0.puts.fetch_add(1, Ordering::Relaxed);
    }
}

/// All threads of a machine.
#[derive(Debug)]
pub struct Topology {
    shape: Shape,
    threads: Box<[Thread]>,
}

impl Topology {
    /// A machine of `shape` whose processors have `features`, and MSR_TEST_CTRL at its own scope.
    pub fn new(shape: Shape, features: &Features) -> Topology {
        Topology::build(shape, &Machine { features, test_ctrl: Scope::Core })
    }

    /// A machine of `shape` whose processors are of `model`.
    pub fn of(shape: Shape, model: &CpuModel) -> Topology {
        let features = model.features();
        Topology::build(shape, &Machine { features: &features, test_ctrl: model.test_ctrl_scope() })
    }

    fn build(shape: Shape, machine: &Machine) -> Topology {
        let uc_lock_is_ac = machine.features.has(Feature::UcLockDisable);
        let mut threads = Vec::new();
        for _ in 0..shape.sockets {
            let package = Arc::new(Package { msrs: MsrFile::new(Scope::Package, machine) });
            for _ in 0..shape.cores {
                let msrs = MsrFile::new(Scope::Core, machine);
                let core = Arc::new(Core { package: Arc::clone(&package), msrs });
                for _ in 0..shape.threads {
                    threads.push(Thread {
                        core: Arc::clone(&core),
                        msrs: MsrFile::new(Scope::Thread, machine),
                        uc_lock_is_ac,
                        apic_id: shape.apic_id(threads.len() as u32),
                        loads: AtomicU64::new(0),
                        puts: AtomicU64::new(0),
                    });
                }
            }
        }
        Topology { shape, threads: threads.into() }
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Logical processor `index`.
    pub fn thread(&self, index: u32) -> Option<&Thread> {
        self.threads.get(index as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::FeatureSet;

    fn two_cores_with_smt() -> Topology {
        let features = Features::new(FeatureSet::of(&[Feature::CoreCapability, Feature::TscAdjust]), 46);
        Topology::new(Shape { sockets: 1, cores: 2, threads: 2 }, &features)
    }

    #[test]
    fn registers_live_at_their_scope() {
        const TSC_ADJUST: u32 = 0x3b;
        let machine = two_cores_with_smt();
        let thread = |i| machine.thread(i).unwrap();
        thread(0).write_msr(MSR_TEST_CTRL, 1 << 29).unwrap();
        thread(0).write_msr(TSC_ADJUST, 7).unwrap();
        let seen = |msr| [0, 1, 2, 3].map(|i| thread(i).read_msr(msr).unwrap());
        assert_eq!(seen(MSR_TEST_CTRL), [1 << 29, 1 << 29, 0, 0]);
        assert_eq!(seen(TSC_ADJUST), [7, 0, 0, 0]);
    }

    #[test]
    fn sl_b14_siblings_share_the_live_test_control() {
        let machine = two_cores_with_smt();
        let seen = machine.thread(1).unwrap().test_ctrl();
        let other = machine.thread(2).unwrap().test_ctrl();
        machine.thread(0).unwrap().write_msr(MSR_TEST_CTRL, 1 << 29).unwrap();
        assert_eq!((seen.get(), other.get()), (1 << 29, 0));
        assert!(!seen.uc_lock_is_ac());
    }

    #[test]
    fn sl_b14_the_test_control_can_be_per_thread() {
        let model = CpuModel::parse("max,test-ctrl=thread").unwrap();
        let machine = Topology::of(Shape { threads: 2, ..Shape::default() }, &model);
        machine.thread(0).unwrap().write_msr(MSR_TEST_CTRL, 1 << 28).unwrap();
        let seen = [0, 1].map(|i| machine.thread(i).unwrap().test_ctrl());
        assert_eq!(seen.each_ref().map(|ctrl| ctrl.get()), [1 << 28, 0]);
        assert!(seen[0].uc_lock_is_ac(), "CPUID.(7,2):EDX[6]");
        let none = Topology::of(Shape::default(), &CpuModel::parse("haswell").unwrap());
        assert_eq!(none.thread(0).unwrap().test_ctrl().get(), 0);
    }

    #[test]
    fn faults() {
        let machine = two_cores_with_smt();
        let thread = machine.thread(0).unwrap();
        assert_eq!(thread.write_msr(0x33, 1), Err(MsrFault::Reserved { index: 0x33, value: 1 }));
        assert_eq!(thread.read_msr(0x1c4), Err(MsrFault::Absent(0x1c4)), "no XFD");
        assert_eq!(thread.read_msr(0xc000_0080), Err(MsrFault::Absent(0xc000_0080)), "the CPU's own state");
        assert!(machine.thread(4).is_none());
    }

    #[test]
    fn loads_and_puts_are_counted() {
        let machine = two_cores_with_smt();
        let thread = machine.thread(1).unwrap();
        let loaded = thread.load();
        assert_eq!(thread.switches(), (1, 0));
        drop(loaded);
        assert_eq!(thread.switches(), (1, 1));
    }

    #[test]
    fn apic_ids_leave_gaps_for_powers_of_two() {
        let shape = Shape { sockets: 2, cores: 3, threads: 2 };
        let ids: Vec<u32> = (0..shape.count()).map(|i| shape.apic_id(i)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
    }
}
