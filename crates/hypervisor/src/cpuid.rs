//! KVM's part of CPUID: what KVM_GET_SUPPORTED_CPUID answers for a processor model, the table that
//! KVM_SET_CPUID2 gives a vCPU, and how the guest reads it. (Kernel: arch/x86/kvm/cpuid.c;
//! Documentation/virt/kvm/x86/cpuid.rst.)

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use silicon::bus_lock::core_capabilities;
use silicon::model::cpuid::{CpuidEntry, CpuidValues, Dynamic, Identity, read};
use silicon::model::xstate::{TILEDATA, size_compacted, size_standard};
use silicon::model::{CpuModel, Feature, FeatureSet, Features};
use silicon::state::CpuState;

use crate::host::HostParams;
use crate::split_lock;

/// First leaf of the hypervisor: "KVMKVMKVM".
pub const KVM_CPUID_SIGNATURE: u32 = 0x4000_0000;
/// Leaf of the paravirtual features.
pub const KVM_CPUID_FEATURES: u32 = 0x4000_0001;
/// Entries that KVM_SET_CPUID2 takes (kernel: KVM_MAX_CPUID_ENTRIES).
pub const CPUID_ENTRIES_MAX: usize = 256;
/// IA32_APIC_BASE, global enable.
const APIC_BASE_ENABLE: u64 = 1 << 11;

/// Paravirtual features, by their bit in [`KVM_CPUID_FEATURES`]:EAX.
pub mod pv {
    /// kvmclock at the old MSR numbers.
    pub const CLOCKSOURCE: u8 = 0;
    /// Port I/O needs no delay.
    pub const NOP_IO_DELAY: u8 = 1;
    /// kvmclock.
    pub const CLOCKSOURCE2: u8 = 3;
    /// MSR_KVM_ASYNC_PF_EN.
    pub const ASYNC_PF: u8 = 4;
    /// MSR_KVM_STEAL_TIME.
    pub const STEAL_TIME: u8 = 5;
    /// A paravirtual halt that KVM_HC_KICK_CPU ends.
    pub const UNHALT: u8 = 7;
    /// Asynchronous page faults as exits, for a hypervisor in the guest.
    pub const ASYNC_PF_VMEXIT: u8 = 10;
    /// KVM_HC_SEND_IPI.
    pub const SEND_IPI: u8 = 11;
    /// MSR_KVM_POLL_CONTROL.
    pub const POLL_CONTROL: u8 = 12;
    /// KVM_HC_SCHED_YIELD.
    pub const SCHED_YIELD: u8 = 13;
    /// MSR_KVM_ASYNC_PF_INT and _ACK.
    pub const ASYNC_PF_INT: u8 = 14;
    /// Readings of kvmclock on different vCPUs can be compared.
    pub const CLOCKSOURCE_STABLE: u8 = 24;
    /// What we have.
    pub const SUPPORTED: u32 = 1 << CLOCKSOURCE
        | 1 << NOP_IO_DELAY
        | 1 << CLOCKSOURCE2
        | 1 << ASYNC_PF
        | 1 << ASYNC_PF_VMEXIT
        | 1 << ASYNC_PF_INT
        | 1 << STEAL_TIME
        | 1 << UNHALT
        | 1 << SEND_IPI
        | 1 << POLL_CONTROL
        | 1 << SCHED_YIELD
        | 1 << CLOCKSOURCE_STABLE;
}

/// First leaf of ring3's own: "ring3ring3".
pub const RING3_CPUID_SIGNATURE: u32 = 0x4000_0100;
/// Leaf that says what of ring3's the guest has: EAX is the version of the layout, EBX has the bits of [`own`].
pub const RING3_CPUID_FEATURES: u32 = 0x4000_0101;

/// ring3's own features, by their bit in [`RING3_CPUID_FEATURES`]:EBX.
pub mod own {
    /// Version of the layout, in EAX.
    pub const VERSION: u32 = 1;
    /// Split locks never execute, whatever the guest writes to MSR_TEST_CTRL. A guest that sets bit 29 there gets #AC(0) for
    /// them; for one that does not, the VM's policy decides.
    pub const SPLIT_LOCK_FORCED_ON: u32 = 1 << 0;
    /// The page-not-present protocol: PNP_VECTORS, PNP_RING, PNP_DATA (docs/features/page-not-present.md).
    pub const PAGE_NOT_PRESENT: u32 = 1 << 1;
    /// PNP_DATA.VE and PNP_REQUEST: the processor delivers its events, as #VE.
    pub const PAGE_NOT_PRESENT_VE: u32 = 1 << 2;
}

/// Features that KVM emulates whether the processor has them or not.
const EMULATED: [Feature; 3] = [Feature::X2apic, Feature::TscAdjust, Feature::ArchCapabilities];
/// Features that KVM leaves to the client to switch on: they depend on the VM (MONITOR on mwait exits being off,
/// the deadline timer on an in-kernel APIC, HT on the topology).
const LEFT_TO_THE_CLIENT: [Feature; 3] = [Feature::Monitor, Feature::TscDeadline, Feature::Ht];

/// Why KVM_SET_CPUID2 refuses a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuidError {
    /// E2BIG.
    #[error("{0} CPUID entries, at most {CPUID_ENTRIES_MAX}")]
    TooMany(usize),
    /// EINVAL.
    #[error("CPUID leaf 0x80000008 gives {0} bits of linear address; 48 and 57 can be")]
    LinearBits(u8),
    /// EPERM.
    #[error(
        "CPUID leaf 0xd has XSAVE components {0:#x}, which guests may not use: ask for them with \
         arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM) before the first vCPU is created"
    )]
    NotPermitted(u64),
}

impl CpuidError {
    /// The errno of KVM_SET_CPUID2.
    pub fn errno(self) -> i32 {
        match self {
            CpuidError::TooMany(_) => libc::E2BIG,
            CpuidError::LinearBits(_) => libc::EINVAL,
            CpuidError::NotPermitted(_) => libc::EPERM,
        }
    }
}

fn entry(from: &CpuidEntry) -> kvm_cpuid_entry2 {
    let CpuidValues { eax, ebx, ecx, edx } = from.values;
    let flags = if from.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
    kvm_cpuid_entry2 { function: from.leaf, index: from.subleaf, flags, eax, ebx, ecx, edx, padding: [0; 3] }
}

fn set_bit(entries: &mut [CpuidEntry], feature: Feature, on: bool) {
    let row = feature.row();
    let found = entries.iter_mut().find(|e| (e.leaf, e.subleaf) == (row.leaf, row.subleaf));
    if let Some(entry) = found {
        let word = entry.values.get_mut(row.register);
        let bit = 1 << row.bit;
        *word = if on { *word | bit } else { *word & !bit };
    }
}

/// ring3's own leaves on a host that forces split-lock detection on, or does not.
fn own_leaves(forced_on: bool) -> [CpuidEntry; 2] {
    let [ebx, ecx, edx] = [*b"ring", *b"3rin", *b"g3\0\0"].map(u32::from_le_bytes);
    let forced = if forced_on { own::SPLIT_LOCK_FORCED_ON } else { 0 };
    let features = forced | own::PAGE_NOT_PRESENT | own::PAGE_NOT_PRESENT_VE;
    let row = |leaf, values| CpuidEntry { leaf, subleaf: 0, indexed: false, values };
    [
        row(RING3_CPUID_SIGNATURE, CpuidValues { eax: RING3_CPUID_FEATURES, ebx, ecx, edx }),
        row(RING3_CPUID_FEATURES, CpuidValues { eax: own::VERSION, ebx: features, ..CpuidValues::default() }),
    ]
}

/// Adds what KVM emulates, unless the model is to be without.
fn emulate(table: &mut [CpuidEntry], model: &CpuModel) {
    let wanted = EMULATED.iter().filter(|&&feature| !model.removes(feature));
    wanted.for_each(|&feature| set_bit(table, feature, true));
}

/// Leaves out what the host does not let guests of this kind have, and adds ring3's own leaves.
fn apply_host(table: &mut Vec<CpuidEntry>, model: &CpuModel, host: &HostParams) {
    let capabilities = split_lock::capabilities(model, host, false);
    if capabilities == 0 {
        set_bit(table, Feature::CoreCapability, false);
    }
    if capabilities & core_capabilities::UC_LOCK_DISABLE == 0 {
        set_bit(table, Feature::UcLockDisable, false);
    }
    let forced = capabilities != 0 && split_lock::forced_on(host.split_lock_detect, false);
    table.extend(own_leaves(forced));
}

/// The hypervisor's leaves.
fn paravirtual() -> [CpuidEntry; 2] {
    let [ebx, ecx, edx] = [*b"KVMK", *b"VMKV", *b"M\0\0\0"].map(u32::from_le_bytes);
    let row = |leaf, values| CpuidEntry { leaf, subleaf: 0, indexed: false, values };
    [
        row(KVM_CPUID_SIGNATURE, CpuidValues { eax: KVM_CPUID_FEATURES, ebx, ecx, edx }),
        row(KVM_CPUID_FEATURES, CpuidValues { eax: pv::SUPPORTED, ..CpuidValues::default() }),
    ]
}

/// Leaves of leaf 0DH only what describes the components of `xcr0`. Other leaves tell of a feature whether its components
/// may be used or not (kernel: `__do_cpuid_func`).
fn limit_components(table: &mut Vec<CpuidEntry>, xcr0: u64) {
    let kept = |e: &CpuidEntry| e.values.ecx & 1 != 0 || xcr0 >> e.subleaf.min(63) & 1 != 0;
    table.retain(|e| e.leaf != 0xd || e.subleaf < 2 || kept(e));
    for entry in table.iter_mut().filter(|e| e.leaf == 0xd) {
        let values = &mut entry.values;
        match entry.subleaf {
            0 => {
                (values.eax, values.edx) = (values.eax & xcr0 as u32, values.edx & (xcr0 >> 32) as u32);
                (values.ebx, values.ecx) = (size_standard(xcr0), size_standard(xcr0));
            }
            1 if values.ebx != 0 => {
                let xss = u64::from(values.edx) << 32 | u64::from(values.ecx);
                values.ebx = size_compacted(xcr0 | xss);
            }
            _ => {}
        }
    }
}

/// KVM_GET_SUPPORTED_CPUID, where guests may use the components of `xcr0`.
pub fn supported(model: &CpuModel, host: &HostParams, xcr0: u64) -> Vec<kvm_cpuid_entry2> {
    let mut table = model.cpuid(&Identity::default());
    if model.has(Feature::Xsave) {
        limit_components(&mut table, xcr0);
    }
    emulate(&mut table, model);
    LEFT_TO_THE_CLIENT.iter().for_each(|&feature| set_bit(&mut table, feature, false));
    // No topology, and clocks are the client's to tell.
    table.retain(|e| !(matches!(e.leaf, 0xb | 0x1f) && e.subleaf != 0));
    for entry in &mut table {
        match entry.leaf {
            5 | 0xb | 0x15 | 0x16 | 0x1f => entry.values = CpuidValues::default(),
            6 => entry.values = CpuidValues { eax: 1 << Feature::Arat.row().bit, ..CpuidValues::default() },
            0x8000_0008 => entry.values.eax |= (entry.values.eax & 0xff) << 16,
            _ => {}
        }
    }
    fill_gaps(&mut table);
    table.extend(paravirtual());
    apply_host(&mut table, model, host);
    table.sort_by_key(|e| (e.leaf, e.subleaf));
    table.iter().map(entry).collect()
}

/// KVM_GET_EMULATED_CPUID: MOVBE, and RDPID where there is IA32_TSC_AUX (kernel: `__do_cpuid_func_emulated`).
pub fn emulated(model: &CpuModel) -> Vec<kvm_cpuid_entry2> {
    let row = |leaf, values| CpuidEntry { leaf, subleaf: 0, indexed: leaf == 7, values };
    let mut table = [
        row(0, CpuidValues { eax: 7, ..CpuidValues::default() }),
        row(1, CpuidValues::default()),
        row(7, CpuidValues::default()),
    ];
    set_bit(&mut table, Feature::Movbe, true);
    set_bit(&mut table, Feature::Rdpid, model.has(Feature::Rdtscp));
    table.iter().map(entry).collect()
}

/// KVM lists every leaf up to the highest, empty ones too.
fn fill_gaps(table: &mut Vec<CpuidEntry>) {
    let highest = |class: u32| table.iter().find(|e| e.leaf == class).map_or(class, |e| e.values.eax);
    for leaf in (0..=highest(0)).chain(0x8000_0000..=highest(0x8000_0000)) {
        if !table.iter().any(|e| e.leaf == leaf) {
            table.push(CpuidEntry { leaf, ..CpuidEntry::default() });
        }
    }
}

/// The table that our own machine gives the vCPU `identity`: the model's, with what KVM adds and with the features
/// that an in-kernel APIC allows. A model with `-hypervisor` does not say that there is one: Linux has split-lock detection
/// only then.
pub fn for_machine(model: &CpuModel, host: &HostParams, identity: &Identity) -> Vec<kvm_cpuid_entry2> {
    let mut table = model.cpuid(identity);
    emulate(&mut table, model);
    set_bit(&mut table, Feature::TscDeadline, true);
    let shown = !model.removes(Feature::Hypervisor);
    set_bit(&mut table, Feature::Hypervisor, shown);
    set_bit(&mut table, Feature::Monitor, false);
    table.iter_mut().filter(|e| e.leaf == 5).for_each(|e| e.values = CpuidValues::default());
    if shown {
        table.extend(paravirtual());
    }
    apply_host(&mut table, model, host);
    table.iter().map(entry).collect()
}

/// What of a vCPU shows in CPUID besides the processor's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidState {
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// IA32_MISC_ENABLE's MONITOR enable, where CPUID follows it.
    pub mwait: Option<bool>,
}

impl CpuidState {
    fn dynamic(&self, state: &CpuState) -> Dynamic {
        Dynamic::of(state, self.apic_base & APIC_BASE_ENABLE != 0, self.mwait)
    }
}

/// A vCPU's CPUID table.
#[derive(Clone, Debug, Default)]
pub struct Cpuid {
    entries: Vec<CpuidEntry>,
}

impl Cpuid {
    /// KVM_SET_CPUID2's table, checked as KVM does (kernel: `kvm_check_cpuid`).
    pub fn from_entries(entries: &[kvm_cpuid_entry2]) -> Result<Cpuid, CpuidError> {
        if entries.len() > CPUID_ENTRIES_MAX {
            return Err(CpuidError::TooMany(entries.len()));
        }
        let cpuid = Cpuid { entries: entries.iter().map(silicon_entry).collect() };
        let linear_bits = cpuid.raw(0x8000_0008, 0).map_or(0, |values| (values.eax >> 8) as u8);
        match linear_bits {
            0 | 48 | 57 => Ok(cpuid),
            other => Err(CpuidError::LinearBits(other)),
        }
    }

    /// The table as given, without the bits that follow the vCPU's state.
    pub fn raw(&self, leaf: u32, subleaf: u32) -> Option<CpuidValues> {
        let found = self.entries.iter().find(|e| e.leaf == leaf && (!e.indexed || e.subleaf == subleaf));
        found.map(|e| e.values)
    }

    /// KVM_GET_CPUID2: the table with the bits that follow the vCPU's state.
    pub fn entries(&self, state: &CpuState, runtime: &CpuidState) -> Vec<kvm_cpuid_entry2> {
        let dynamic = runtime.dynamic(state);
        let current = |e: &CpuidEntry| {
            let values = read(std::slice::from_ref(e), e.leaf, e.subleaf, &dynamic).unwrap_or(e.values);
            entry(&CpuidEntry { values, ..*e })
        };
        self.entries.iter().map(current).collect()
    }

    /// What the guest's CPUID returns: EAX, EBX, ECX, EDX (kernel: `kvm_cpuid`).
    pub fn lookup(&self, leaf: u32, subleaf: u32, state: &CpuState, runtime: &CpuidState) -> [u32; 4] {
        let dynamic = runtime.dynamic(state);
        let leaf = self.effective_leaf(leaf, subleaf);
        let values = read(&self.entries, leaf, subleaf, &dynamic).unwrap_or_default();
        [values.eax, values.ebx, values.ecx, values.edx]
    }

    /// Intel's rule for leaves beyond the highest of their range: the highest basic leaf. AMD has no such rule.
    /// (Kernel: `get_out_of_range_cpuid_entry`.)
    fn effective_leaf(&self, leaf: u32, subleaf: u32) -> u32 {
        if self.raw(leaf, subleaf).is_some() {
            return leaf;
        }
        let Some(basic) = self.raw(0, 0) else { return leaf };
        if [*b"Auth", *b"Hygo"].map(u32::from_le_bytes).contains(&basic.ebx) {
            return leaf;
        }
        let class = match leaf {
            0x4000_0000..=0x4fff_ffff => leaf & 0xffff_ff00,
            0xc000_0000.. => 0xc000_0000,
            _ => leaf & 0x8000_0000,
        };
        match self.raw(class, 0) {
            Some(values) if leaf <= values.eax => leaf,
            _ => basic.eax,
        }
    }

    /// What the table says that the processor has. What works with XSAVE components that leaf 0DH lacks, can never be
    /// enabled (kernel: `guest_supported_xcr0`).
    pub fn features(&self) -> Features {
        let features = Features::from_cpuid(|leaf, subleaf| self.raw(leaf, subleaf));
        if self.xcr0() & TILEDATA != 0 || !features.has(Feature::AmxTile) {
            return features;
        }
        let left = features.set().minus(FeatureSet::of(&[Feature::AmxTile])).consistent();
        Features::new(left, features.physical_bits()).with_signature(features.signature())
    }

    /// The XSAVE components that leaf 0DH has.
    pub fn xcr0(&self) -> u64 {
        self.raw(0xd, 0).map_or(0, |values| u64::from(values.edx) << 32 | u64::from(values.eax))
    }

    /// The paravirtual features that the guest is told of ([`pv`]).
    pub fn pv_features(&self) -> u32 {
        self.pv_leaf().and_then(|leaf| self.raw(leaf, 0)).map_or(0, |values| values.eax)
    }

    /// Features of ring3's own that the guest is told of ([`own`]).
    pub fn own_features(&self) -> u32 {
        let [signature, _] = own_leaves(false);
        let ours = |v: &CpuidValues| {
            (v.ebx, v.ecx, v.edx) == (signature.values.ebx, signature.values.ecx, signature.values.edx)
        };
        let there = self.raw(RING3_CPUID_SIGNATURE, 0).as_ref().is_some_and(ours);
        self.raw(RING3_CPUID_FEATURES, 0)
            .filter(|values| there && values.eax == own::VERSION)
            .map_or(0, |values| values.ebx)
    }

    /// Tells the guest of none of these paravirtual features.
    pub fn hide_pv_features(&mut self, bits: u32) {
        let leaf = self.pv_leaf();
        let hidden = self.entries.iter_mut().filter(|entry| Some(entry.leaf) == leaf);
        hidden.for_each(|entry| entry.values.eax &= !bits);
    }

    /// The leaf that follows KVM's signature, wherever in the hypervisor's range the client has put it.
    fn pv_leaf(&self) -> Option<u32> {
        let ours = paravirtual()[0].values;
        let same = |v: &CpuidValues| (v.ebx, v.ecx, v.edx) == (ours.ebx, ours.ecx, ours.edx);
        let mut bases = (KVM_CPUID_SIGNATURE..KVM_CPUID_SIGNATURE + 0x1_0000).step_by(0x100);
        let base = bases.find(|&leaf| self.raw(leaf, 0).as_ref().is_some_and(same));
        base.map(|leaf| leaf | 1)
    }
}

fn silicon_entry(from: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        leaf: from.function,
        subleaf: from.index,
        indexed: from.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
        values: CpuidValues { eax: from.eax, ebx: from.ebx, ecx: from.ecx, edx: from.edx },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use silicon::state::cr4;

    fn cpuid(model: &str) -> Cpuid {
        Cpuid::from_entries(&supported(&CpuModel::parse(model).unwrap(), &HostParams::default(), u64::MAX))
            .unwrap()
    }

    fn look(cpuid: &Cpuid, leaf: u32, subleaf: u32) -> [u32; 4] {
        let runtime = CpuidState { apic_base: APIC_BASE_ENABLE, mwait: None };
        cpuid.lookup(leaf, subleaf, &CpuState::reset(0), &runtime)
    }

    #[test]
    fn kvm_adds_what_it_emulates_and_hides_what_depends_on_the_vm() {
        let nehalem = cpuid("nehalem").features();
        assert!(EMULATED.iter().all(|&f| nehalem.has(f)));
        let spr = cpuid("sapphire-rapids").features();
        assert!(!LEFT_TO_THE_CLIENT.iter().any(|&f| spr.has(f)));
        assert!(spr.has(Feature::La57) && spr.has(Feature::Pku) && !spr.has(Feature::Hypervisor));
    }

    #[test]
    fn every_leaf_is_listed() {
        let table = supported(&CpuModel::default(), &HostParams::default(), u64::MAX);
        let leaves: Vec<u32> = table.iter().map(|e| e.function).collect();
        assert!((0..=0x1f).chain(0x8000_0000..=0x8000_0008).all(|leaf| leaves.contains(&leaf)));
        assert!(leaves.is_sorted());
        let topology = table.iter().filter(|e| e.function == 0xb).collect::<Vec<_>>();
        assert_eq!(topology.len(), 1);
        assert_eq!(topology[0].ebx, 0);
    }

    #[test]
    fn signature_and_paravirtual_features() {
        let spr = cpuid("sapphire-rapids");
        let [eax, ebx, ecx, edx] = look(&spr, KVM_CPUID_SIGNATURE, 0);
        let name: Vec<u8> = [ebx, ecx, edx].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!((eax, &name[..9]), (KVM_CPUID_FEATURES, &b"KVMKVMKVM"[..]));
        assert_eq!(spr.pv_features(), pv::SUPPORTED);
        let mut moved = supported(&CpuModel::default(), &HostParams::default(), u64::MAX);
        moved.iter_mut().filter(|e| e.function >> 28 == 4).for_each(|e| e.function += 0x100);
        assert_eq!(Cpuid::from_entries(&moved).unwrap().pv_features(), pv::SUPPORTED);
        assert_eq!(Cpuid::default().pv_features(), 0);
    }

    /// SL-E1, SL-E2, SL-H1: by host mode and SMT, whether detection is enumerated, and forced on.
    #[test]
    fn sl_h1_what_the_host_offers_is_enumerated() {
        for (host, offered, forced) in [
            ("", true, false),
            ("smt=on", false, false),
            ("split_lock_detect=off", false, false),
            ("split_lock_detect=ratelimit:9", false, false),
            ("split_lock_detect=fatal", true, true),
            ("split_lock_detect=fatal smt=on", true, true),
        ] {
            let host = HostParams::parse(host).unwrap();
            let model = CpuModel::default();
            let machine = for_machine(&model, &host, &Identity::default());
            for table in [supported(&model, &host, u64::MAX), machine] {
                let table = Cpuid::from_entries(&table).unwrap();
                assert_eq!(table.features().has(Feature::CoreCapability), offered, "{host:?}");
                let [eax, ebx, ecx, edx] = look(&table, RING3_CPUID_SIGNATURE, 0);
                let name: Vec<u8> = [ebx, ecx, edx].iter().flat_map(|w| w.to_le_bytes()).collect();
                assert_eq!((eax, &name[..]), (RING3_CPUID_FEATURES, &b"ring3ring3\0\0"[..]));
                let features = look(&table, RING3_CPUID_FEATURES, 0);
                let expected = u32::from(forced) | own::PAGE_NOT_PRESENT | own::PAGE_NOT_PRESENT_VE;
                assert_eq!(features, [own::VERSION, expected, 0, 0], "{host:?}");
            }
        }
        let host = HostParams::parse("split_lock_detect=fatal").unwrap();
        let old =
            Cpuid::from_entries(&supported(&CpuModel::parse("nehalem").unwrap(), &host, u64::MAX)).unwrap();
        let features = look(&old, RING3_CPUID_FEATURES, 0)[1];
        assert_eq!(features & own::SPLIT_LOCK_FORCED_ON, 0, "nothing to be forced on");
    }

    #[test]
    fn leaves_out_of_range() {
        let spr = cpuid("sapphire-rapids");
        let last = look(&spr, 0x1f, 0);
        assert_eq!(look(&spr, 0x20, 0), last);
        assert_eq!(look(&spr, 0x8000_0009, 0), last);
        assert_eq!(look(&spr, 0x4000_0002, 0), last);
        assert_eq!(look(&spr, 0xc000_0000, 0), last);
        let mut amd = supported(&CpuModel::default(), &HostParams::default(), u64::MAX);
        amd[0].ebx = u32::from_le_bytes(*b"Auth");
        assert_eq!(look(&Cpuid::from_entries(&amd).unwrap(), 0x20, 0), [0; 4]);
        assert_eq!(look(&Cpuid::default(), 1, 0), [0; 4], "no table");
    }

    #[test]
    fn state_shows() {
        let spr = cpuid("sapphire-rapids");
        let mut state = CpuState::reset(0);
        state.cr4 = cr4::OSXSAVE | cr4::PKE;
        state.xcr0 = 7;
        assert_eq!(spr.lookup(1, 0, &state, &CpuidState::default())[2] >> 27 & 1, 1);
        assert_eq!(spr.lookup(1, 0, &state, &CpuidState::default())[3] >> 9 & 1, 0, "APIC off");
        assert_eq!(spr.lookup(7, 0, &state, &CpuidState::default())[2] >> 4 & 1, 1);
        let entries = spr.entries(&state, &CpuidState::default());
        let leaf_d = entries.iter().find(|e| (e.function, e.index) == (0xd, 0)).unwrap();
        assert_eq!(leaf_d.ebx, 832);
    }

    #[test]
    fn tables_that_kvm_refuses() {
        let mut table = supported(&CpuModel::default(), &HostParams::default(), u64::MAX);
        table.iter_mut().filter(|e| e.function == 0x8000_0008).for_each(|e| e.eax = 46 | 40 << 8);
        assert_eq!(Cpuid::from_entries(&table).err(), Some(CpuidError::LinearBits(40)));
        let many = vec![kvm_cpuid_entry2::default(); CPUID_ENTRIES_MAX + 1];
        assert_eq!(Cpuid::from_entries(&many).err(), Some(CpuidError::TooMany(CPUID_ENTRIES_MAX + 1)));
    }

    #[test]
    fn the_hypervisor_can_be_hidden() {
        let host = HostParams::default();
        for (name, shown) in [("sapphire-rapids", true), ("sapphire-rapids,-hypervisor", false)] {
            let model = CpuModel::parse(name).unwrap();
            let table = for_machine(&model, &host, &Identity::default());
            let table = Cpuid::from_entries(&table).unwrap();
            assert_eq!(table.features().has(Feature::Hypervisor), shown);
            assert_eq!(table.raw(KVM_CPUID_SIGNATURE, 0).is_some(), shown);
            assert!(table.raw(RING3_CPUID_SIGNATURE, 0).is_some());
        }
    }

    #[test]
    fn our_machine_has_the_deadline_timer() {
        let model = CpuModel::default();
        let identity = Identity { tsc_hz: 2_100_000_000, crystal_hz: 1_000_000_000, ..Identity::default() };
        let cpuid = Cpuid::from_entries(&for_machine(&model, &HostParams::default(), &identity)).unwrap();
        let features = cpuid.features();
        assert!(features.has(Feature::TscDeadline) && features.has(Feature::Hypervisor));
        assert_eq!(look(&cpuid, 0x15, 0), [10, 21, 1_000_000_000, 0]);
    }
}
