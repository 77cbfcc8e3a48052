//! The processor's packages, cores and threads, and the model-specific registers that each of them has.
//!
//! A virtual CPU is *loaded* on a thread for the time that it runs and *put* when it leaves. Registers that
//! cores and packages share are really shared here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::buffers::{Buffers, Cleared, Enumeration};
use crate::bus_lock::TestCtrl;
use crate::model::msrs::{self, Kept, MSR_TEST_CTRL, MSRS, MsrRow, Scope};
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
    /// A register that is a command cannot be read.
    #[error("MSR {0:#x} can only be written")]
    WriteOnly(u32),
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
    /// IA32_ARCH_CAPABILITIES.
    capabilities: u64,
    test_ctrl: Scope,
}

impl Machine<'_> {
    fn scope(&self, row: &MsrRow) -> Scope {
        if row.index == MSR_TEST_CTRL { self.test_ctrl } else { row.scope }
    }

    fn has(&self, row: &MsrRow) -> bool {
        row.enumerated.there(self.features, self.capabilities)
    }

    fn register(&self, row: &'static MsrRow) -> Register {
        let enumerated = msrs::enumerated_bits(row.index, self.features, self.capabilities);
        let reset = if row.index == msrs::ARCH_CAPABILITIES { self.capabilities } else { row.reset };
        let value = Arc::new(AtomicU64::new(reset));
        Register { row, writable: row.writable & !msrs::defined_bits(row.index) | enumerated, value }
    }
}

/// A register that there is.
#[derive(Debug)]
struct Register {
    row: &'static MsrRow,
    /// Bits that software can write.
    writable: u64,
    value: Arc<AtomicU64>,
}

/// The registers of one thread, core or package.
#[derive(Debug)]
struct MsrFile(Box<[Register]>);

impl MsrFile {
    fn new(scope: Scope, machine: &Machine) -> MsrFile {
        let outside = |row: &&MsrRow| !matches!(row.kept, Kept::State(_)) && machine.has(row);
        let rows = MSRS.iter().filter(|row| machine.scope(row) == scope).filter(outside);
        MsrFile(rows.map(|row| machine.register(row)).collect())
    }

    fn find(&self, index: u32) -> Option<&Register> {
        self.0.binary_search_by_key(&index, |register| register.row.index).ok().map(|i| &self.0[i])
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
    buffers: Mutex<Buffers>,
}

impl Core {
    /// Whose data its buffers hold. Who never says who runs ([`Buffers::enter`]) finds nobody's.
    pub fn buffers(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A logical processor.
#[derive(Debug)]
pub struct Thread {
    core: Arc<Core>,
    msrs: MsrFile,
    uc_lock_is_ac: bool,
    md_clear: bool,
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
        match self.find(index)? {
            Register { row: MsrRow { kept: Kept::Command(_), .. }, .. } => Err(MsrFault::WriteOnly(index)),
            register => Ok(register.value.load(Ordering::Acquire)),
        }
    }

    /// Writes a physical register.
    pub fn write_msr(&self, index: u32, value: u64) -> Result<(), MsrFault> {
        let Register { row, writable, value: cell } = self.find(index)?;
        let checked = |old: u64| ((old ^ value) & !writable == 0).then_some(value);
        if let Kept::Command(clears) = row.kept {
            let command = checked(0).ok_or(MsrFault::Reserved { index, value })?;
            if command != 0 {
                self.core.buffers().clear(clears);
            }
            return Ok(());
        }
        cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, checked)
            .map(|_| ())
            .map_err(|_| MsrFault::Reserved { index, value })
    }

    /// What VERW with a memory operand clears on it now.
    pub fn verw_clears(&self) -> Cleared {
        Enumeration {
            md_clear: self.md_clear,
            arch_capabilities: self.read_msr(msrs::ARCH_CAPABILITIES).unwrap_or(0),
            mcu_opt_ctrl: self.read_msr(msrs::MCU_OPT_CTRL).unwrap_or(0),
        }
        .verw_clears()
    }

    /// VERW with a memory operand, outside guest mode or in it.
    pub fn verw(&self) {
        self.core.buffers().clear(self.verw_clears());
    }

    /// The thread's MSR_TEST_CTRL, for [`Cpu::test_ctrl`](crate::Cpu::test_ctrl); a private one that holds zero if the
    /// processor has none.
    pub fn test_ctrl(&self) -> TestCtrl {
        self.find(MSR_TEST_CTRL).map_or_else(
            |_| TestCtrl::default(),
            |register| TestCtrl::new(Arc::clone(&register.value), self.uc_lock_is_ac),
        )
    }

    fn find(&self, index: u32) -> Result<&Register, MsrFault> {
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
        Topology::build(shape, &Machine { features, capabilities: 0, test_ctrl: Scope::Core })
    }

    /// A machine of `shape` whose processors are of `model`, and have `capabilities` in IA32_ARCH_CAPABILITIES.
    pub fn of(shape: Shape, model: &CpuModel, capabilities: u64) -> Topology {
        let features = model.features();
        let test_ctrl = model.test_ctrl_scope();
        Topology::build(shape, &Machine { features: &features, capabilities, test_ctrl })
    }

    fn build(shape: Shape, machine: &Machine) -> Topology {
        let uc_lock_is_ac = machine.features.has(Feature::UcLockDisable);
        let md_clear = machine.features.has(Feature::MdClear);
        let mut threads = Vec::new();
        for _ in 0..shape.sockets {
            let package = Arc::new(Package { msrs: MsrFile::new(Scope::Package, machine) });
            for _ in 0..shape.cores {
                let msrs = MsrFile::new(Scope::Core, machine);
                let core = Arc::new(Core { package: Arc::clone(&package), msrs, buffers: Mutex::default() });
                for _ in 0..shape.threads {
                    threads.push(Thread {
                        core: Arc::clone(&core),
                        msrs: MsrFile::new(Scope::Thread, machine),
                        uc_lock_is_ac,
                        md_clear,
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

    /// All logical processors.
    pub fn threads(&self) -> &[Thread] {
        &self.threads
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
        let machine = Topology::of(Shape { threads: 2, ..Shape::default() }, &model, 0);
        machine.thread(0).unwrap().write_msr(MSR_TEST_CTRL, 1 << 28).unwrap();
        let seen = [0, 1].map(|i| machine.thread(i).unwrap().test_ctrl());
        assert_eq!(seen.each_ref().map(|ctrl| ctrl.get()), [1 << 28, 0]);
        assert!(seen[0].uc_lock_is_ac(), "CPUID.(7,2):EDX[6]");
        let none = Topology::of(Shape::default(), &CpuModel::parse("haswell").unwrap(), 0);
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

    /// The registers of speculation, where IA32_ARCH_CAPABILITIES says that they are there.
    #[test]
    fn ac_registers_exist_where_they_are_enumerated() {
        use crate::model::speculation::arch_cap::*;
        let set = [Feature::SpecCtrl, Feature::FlushL1d, Feature::ArchCapabilities, Feature::MdClear];
        let features = Features::new(FeatureSet::of(&set), 46);
        let machine = |capabilities| {
            let machine = Machine { features: &features, capabilities, test_ctrl: Scope::Core };
            Topology::build(Shape { threads: 2, ..Shape::cores(2) }, &machine)
        };
        for (bit, index) in [
            (TSX_CTRL, 0x122),
            (MISC_PACKAGE_CTLS, 0xbc),
            (XAPIC_DISABLE_STATUS, 0xbd),
            (OVERCLOCKING_STATUS, 0x195),
            (FB_CLEAR_CTRL, 0x123),
            (GDS_CTRL, 0x123),
        ] {
            assert_eq!(machine(bit).thread(0).unwrap().read_msr(index), Ok(0), "{index:#x}");
            assert_eq!(machine(0).thread(0).unwrap().read_msr(index), Err(MsrFault::Absent(index)));
        }
        let machine = machine(FB_CLEAR | FB_CLEAR_CTRL | MDS_NO);
        let thread = |i| machine.thread(i).unwrap();
        assert_eq!(thread(0).read_msr(0x10a), Ok(FB_CLEAR | FB_CLEAR_CTRL | MDS_NO));
        assert!(thread(0).write_msr(0x10a, 0).is_err(), "read-only");
        let reserved = Err(MsrFault::Reserved { index: 0x123, value: 1 << 4 });
        assert_eq!(thread(0).write_msr(0x123, 1 << 4), reserved, "no GDS_CTRL");
        thread(0).write_msr(0x123, 1 << 3).unwrap();
        assert_eq!([0, 1].map(|i| thread(i).read_msr(0x123).unwrap()), [8, 0]);
        for index in [0x49, 0x10b] {
            assert_eq!(thread(0).read_msr(index), Err(MsrFault::WriteOnly(index)));
            assert!(thread(0).write_msr(index, 2).is_err());
        }
    }

    /// VERW, L1D_FLUSH and IBPB clear what the core has, for both of its threads.
    #[test]
    fn ac_commands_clear_the_buffers_of_their_core() {
        use crate::buffers::{Buffer, Domain};
        use crate::model::speculation::arch_cap::*;
        let set = [Feature::SpecCtrl, Feature::FlushL1d, Feature::ArchCapabilities];
        let features = Features::new(FeatureSet::of(&set), 46);
        let capabilities = FB_CLEAR | FB_CLEAR_CTRL | MDS_NO;
        let machine = Machine { features: &features, capabilities, test_ctrl: Scope::Core };
        let machine = Topology::build(Shape { threads: 2, ..Shape::cores(2) }, &machine);
        let thread = |i| machine.thread(i).unwrap();
        let (victim, other) = (Domain::Vm(1), Domain::Vm(2));
        let stale = |i: u32, buffer| thread(i).core().buffers().foreign(buffer, other).next().is_some();
        for i in [0, 2] {
            thread(i).core().buffers().enter(victim);
        }
        thread(1).write_msr(0x49, 1).unwrap();
        assert_eq!([0, 1, 2].map(|i| stale(i, Buffer::BranchPredictor)), [false, false, true]);
        thread(0).write_msr(0x123, 1 << 3).unwrap();
        thread(0).verw();
        assert!(stale(0, Buffer::Fill), "FB_CLEAR_DIS");
        thread(1).verw();
        assert_eq!([0, 1, 2].map(|i| stale(i, Buffer::Fill)), [false, false, true]);
        assert!(stale(0, Buffer::L1d));
        thread(0).write_msr(0x10b, 0).unwrap();
        assert!(stale(0, Buffer::L1d), "zero is no command");
        thread(0).write_msr(0x10b, 1).unwrap();
        assert!(!stale(0, Buffer::L1d));
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
