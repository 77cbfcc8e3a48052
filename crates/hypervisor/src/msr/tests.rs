use std::collections::HashMap;

use silicon::model::{FeatureSet, Host};

use super::*;
use crate::cpuid::pv;

/// A processor made of a table.
pub(super) struct Fake {
    pub(super) features: Features,
    pv: u32,
    state: HashMap<u32, u64>,
    apic_base: u64,
    tsc: u64,
    deadline: u64,
    debugctl: u64,
    cleared: Cleared,
}

impl Default for Fake {
    fn default() -> Fake {
        let mut features = Host::get().offered;
        features.insert(Feature::ArchCapabilities);
        Fake {
            features: Features::new(features, 46),
            pv: pv::SUPPORTED,
            state: HashMap::new(),
            apic_base: 0xfee0_0900,
            tsc: 1000,
            deadline: 0,
            debugctl: 0,
            cleared: Cleared::NOTHING,
        }
    }
}

impl MsrEnv for Fake {
    fn features(&self) -> &Features {
        &self.features
    }
    fn own_features(&self) -> u32 {
        u32::MAX
    }

    fn pv_features(&self) -> u32 {
        self.pv
    }
    fn has_lapic(&self) -> bool {
        true
    }
    fn debugctl(&mut self) -> &mut u64 {
        &mut self.debugctl
    }
    fn clear_buffers(&mut self, what: Cleared) {
        self.cleared = self.cleared.union(what);
    }
    fn state_msr(&self, msr: StateMsr) -> u64 {
        match msr {
            StateMsr::Tsc => self.tsc,
            _ => self.state.get(&(msr as u32)).copied().unwrap_or(0),
        }
    }
    fn set_state_msr(&mut self, msr: StateMsr, value: u64, _: bool) -> bool {
        self.state.insert(msr as u32, value);
        true
    }
    fn shift_tsc(&mut self, by: u64) {
        self.tsc = self.tsc.wrapping_add(by);
    }
    fn apic_base(&self) -> u64 {
        self.apic_base
    }
    fn set_apic_base(&mut self, value: u64, _: bool) -> bool {
        self.apic_base = value;
        value & 0xff == 0
    }
    fn x2apic(&mut self, index: u32) -> Option<u64> {
        (index != 0x80f).then_some(u64::from(index))
    }
    fn set_x2apic(&mut self, index: u32, _: u64) -> bool {
        index != 0x80f
    }
    fn tsc_deadline(&self) -> u64 {
        self.deadline
    }
    fn set_tsc_deadline(&mut self, value: u64) {
        self.deadline = value;
    }
}

/// IA32_ARCH_CAPABILITIES of the VMs.
const SUPPORTED: u64 = 0x4000_0000_0d11_e07b;

pub(super) fn state() -> MsrState {
    MsrState::new(SUPPORTED, &HostParams::default())
}

pub(super) const GUEST: bool = false;
pub(super) const CLIENT: bool = true;

#[test]
fn rows_are_sorted_and_do_not_overlap() {
    assert!(rows().is_sorted_by(|a, b| a.last < b.first));
    for row in rows() {
        assert!(row.first <= row.last, "{}", row.name);
        assert!((row.first..=row.last).all(|i| state_msr(i).is_none()), "{} is silicon's", row.name);
        assert_eq!(table::find(row.first).map(|r| r.name), Some(row.name));
        assert_eq!(table::find(row.last).map(|r| r.name), Some(row.name));
    }
}

#[test]
fn values_after_reset() {
    let (mut msrs, mut env) = (state(), Fake::default());
    for (index, value) in [
        (0x1b, 0xfee0_0900),
        (0x3a, 0),
        (0x8b, 1 << 32),
        (0xce, 1 << 31),
        (0xfe, 0x508),
        (0x179, 32),
        (0x198, 1000 | 4 << 40),
        (0x1a0, 0x1800),
        (0x2ff, 0),
        (0x606, 0),
        (0xc001_001b, 0x2000_0000),
    ] {
        assert_eq!(msrs.read(index, GUEST, &mut env), Ok(value), "{index:#x}");
    }
    let capabilities = msrs.read(0x10a, GUEST, &mut env).unwrap();
    assert_eq!(capabilities & 0b1_0011_1011, 0b11_1011, "no Meltdown, no MDS; no TSX, so no TAA_NO");
}

/// Writes that the guest (or the client) may or may not do.
#[test]
fn write_rules() {
    let cases: &[(u32, u64, bool, bool)] = &[
        (0x3a, 1, GUEST, true),
        (0x3a, 5, GUEST, false),
        (0x3a, 5, CLIENT, true),
        (0x48, 0b101, GUEST, true),
        (0x48, 1 << 10, GUEST, true),
        (0x48, 1 << 9, GUEST, false),
        (0x49, 1, GUEST, true),
        (0x49, 2, GUEST, false),
        (0x8b, 0, GUEST, true),
        (0x9e, 0x5_0000, GUEST, false),
        (0x9e, 0x5_0000, CLIENT, true),
        (0xce, 0, GUEST, false),
        (0xce, 0, CLIENT, true),
        (0xe1, 0xfffd, GUEST, true),
        (0xe1, 2, GUEST, false),
        (0x10a, 0, GUEST, false),
        (0x10a, 0, CLIENT, true),
        (0x10b, 1, GUEST, true),
        (0x10b, 2, GUEST, false),
        (0x140, 1, GUEST, true),
        (0x140, 2, GUEST, false),
        (0x17a, 4, GUEST, true),
        (0x17b, 0, GUEST, false),
        (0x1a0, 0x1800 | 1 << 18, GUEST, true),
        (0x1a0, 0, GUEST, false),
        (0x1a0, 0, CLIENT, true),
        (0x1d9, 3, GUEST, true),
        (0x1d9, 1 << 2, GUEST, true),
        (0x1d9, 1 << 3, GUEST, false),
        (0x345, 1, CLIENT, false),
        (0x80f, 0, GUEST, false),
        (0x80b, 0, GUEST, true),
        (0x198, 0, GUEST, false),
        (0xc001_0015, 1 << 18 | 8, GUEST, true),
        (0xc001_0015, 1, GUEST, false),
        (0x4b56_4d05, 1, GUEST, true),
        (0x4b56_4d05, 2, GUEST, false),
        (0x33, 0, GUEST, false),
        (0xdead, 0, GUEST, false),
    ];
    for &(index, value, host, allowed) in cases {
        let result = state().write(index, value, host, &mut Fake::default());
        assert_eq!(result.is_ok(), allowed, "{index:#x} = {value:#x}, host {host}: {result:?}");
    }
}

#[test]
fn a_locked_feature_control_stays() {
    let (mut msrs, mut env) = (state(), Fake::default());
    assert_eq!(msrs.write(0x3a, 1, GUEST, &mut env), Ok(()));
    assert_eq!(msrs.write(0x3a, 1, GUEST, &mut env), Err(MsrError::Refused(0x3a)));
    assert_eq!(msrs.write(0x3a, 0, CLIENT, &mut env), Ok(()));
}

/// SeaBIOS writes what QEMU tells it to, and took #GP for it with no IDT.
#[test]
fn firmware_may_enable_local_machine_checks_where_the_client_offers_them() {
    const LMCE_P: u64 = 1 << 27;
    let (mut msrs, mut env) = (state(), Fake::default());
    assert_eq!(msrs.write(0x3a, 1 << 20 | 1, GUEST, &mut env), Err(MsrError::Refused(0x3a)));
    assert_eq!(msrs.write(0x4d0, 1, GUEST, &mut env), Err(MsrError::Refused(0x4d0)));
    assert!(msrs.setup_mce(LMCE_P | 1));
    assert_eq!(msrs.write(0x3a, 1 << 20 | 1, GUEST, &mut env), Ok(()));
    assert_eq!(msrs.write(0x4d0, 1, GUEST, &mut env), Ok(()));
    assert_eq!(msrs.read(0x4d0, GUEST, &mut env), Ok(1));
}

#[test]
fn cpuid_gates_the_guest_but_not_the_client() {
    let mut env = Fake { features: Features::new(FeatureSet::EMPTY, 46), pv: 0, ..Fake::default() };
    let mut msrs = state();
    for index in [0x48, 0x10a, 0xe1, 0xda0, 0xc000_0103] {
        assert_eq!(msrs.read(index, GUEST, &mut env), Err(MsrError::Refused(index)), "{index:#x}");
        assert!(msrs.read(index, CLIENT, &mut env).is_ok(), "{index:#x}");
    }
    for index in [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01] {
        assert_eq!(msrs.read(index, GUEST, &mut env), Err(MsrError::Unsupported(index)));
        assert_eq!(msrs.read(index, CLIENT, &mut env), Ok(0), "advertised, so the client reads zero");
        assert_eq!(msrs.write(index, 0, CLIENT, &mut env), Ok(()));
        assert_eq!(msrs.write(index, 1, CLIENT, &mut env), Err(MsrError::Unsupported(index)));
    }
}

#[test]
fn the_counter_and_its_adjustment() {
    let (mut msrs, mut env) = (state(), Fake::default());
    msrs.write(0x10, 5000, GUEST, &mut env).unwrap();
    assert_eq!((env.tsc, msrs.read(0x3b, GUEST, &mut env)), (5000, Ok(4000)));
    msrs.write(0x3b, 1000, GUEST, &mut env).unwrap();
    assert_eq!(env.tsc, 2000);
    msrs.write(0x3b, 7, CLIENT, &mut env).unwrap();
    assert_eq!(env.tsc, 2000, "the client only restores the register");
    msrs.write(0x10, 9, CLIENT, &mut env).unwrap();
    assert_eq!((env.tsc, msrs.read(0x3b, GUEST, &mut env)), (9, Ok(7)));
    assert!(msrs.clock_changed);
}

#[test]
fn kvmclock_registers_raise_requests() {
    let (mut msrs, mut env) = (state(), Fake::default());
    msrs.write(0x4b56_4d01, 0x1001, GUEST, &mut env).unwrap();
    msrs.write(0x4b56_4d00, 0x2000, GUEST, &mut env).unwrap();
    assert_eq!((msrs.system_time(), msrs.wall_clock()), (0x1001, 0x2000));
    assert!(msrs.clock_changed && msrs.wall_clock_changed);
    assert_eq!(msrs.read(0x12, GUEST, &mut env), Ok(0x1001), "one register under two numbers");
}

#[test]
fn memory_type_ranges() {
    let (mut msrs, mut env) = (state(), Fake::default());
    for (index, value, allowed) in [
        (0x200, 0x8000_0006, true),
        (0x200, 0x8000_0002, false),
        (0x200, 1 << 46, false),
        (0x201, 0x3fff_8000_0800, true),
        (0x201, 0x400, false),
        (0x20f, 0, true),
        (0x210, 0, false),
        (0x250, 0x0606_0606_0606_0606, true),
        (0x250, 0x0306_0606_0606_0606, false),
        (0x251, 0, false),
        (0x258, 0x0101_0101_0101_0101, true),
        (0x259, 0, true),
        (0x268, 0x0505_0505_0505_0505, true),
        (0x26f, 0, true),
        (0x2ff, 0xc06, true),
        (0x2ff, 0xc03, false),
        (0x2ff, 0x1006, false),
        (0xfe, 0, false),
    ] {
        let result = msrs.write(index, value, GUEST, &mut env);
        assert_eq!(result.is_ok(), allowed, "{index:#x} = {value:#x}");
        if allowed {
            assert_eq!(msrs.read(index, GUEST, &mut env), Ok(value), "{index:#x}");
        }
    }
}

#[test]
fn machine_check_banks() {
    let (mut msrs, mut env) = (state(), Fake::default());
    assert!(!msrs.setup_mce(0) && !msrs.setup_mce(33) && !msrs.setup_mce(1 << 9 | 4));
    assert!(msrs.setup_mce(1 << 8 | 4));
    for (index, value, host, allowed) in [
        (0x17b, u64::MAX, GUEST, true),
        (0x17b, 1, GUEST, false),
        (0x400, u64::MAX, GUEST, true),
        (0x400, 5, GUEST, false),
        (0x401, 1, GUEST, false),
        (0x401, 1, CLIENT, true),
        (0x40f, 7, GUEST, true),
        (0x410, 0, GUEST, false),
        (0x280, 1, GUEST, false),
        (0x283, 0, CLIENT, true),
    ] {
        let result = msrs.write(index, value, host, &mut env);
        assert_eq!(result.is_ok(), allowed, "{index:#x} = {value:#x}");
    }
    assert_eq!(msrs.read(0x401, GUEST, &mut env), Ok(1));
    assert!(msrs.read(0x280, GUEST, &mut env).is_err());
}

#[test]
fn unknown_registers_can_be_ignored() {
    let host = HostParams::parse("kvm.ignore_msrs=1").unwrap();
    let (mut msrs, mut env) = (MsrState::new(SUPPORTED, &host), Fake::default());
    assert_eq!(msrs.read(0xdead, GUEST, &mut env), Ok(0));
    assert_eq!(msrs.write(0xdead, 1, GUEST, &mut env), Ok(()));
    assert_eq!(msrs.write(0x1a0, 0, GUEST, &mut env), Err(MsrError::Refused(0x1a0)), "known, and wrong");
}

/// T2 of asynchronous page faults.
#[test]
fn apf_t2_registers_by_their_enumeration() {
    let (mut msrs, mut env) = (state(), Fake::default());
    let mut write = |env: &mut Fake, index, value| msrs.write(index, value, GUEST, env);
    let (enable, interrupt) = (0x4b56_4d02, 0x4b56_4d06);
    for (value, valid) in
        [(0x1009, true), (0x100f, true), (1, true), (0x1010, false), (0x1020, false), (0, true)]
    {
        assert_eq!(write(&mut env, enable, value).is_ok(), valid, "{value:#x}");
    }
    assert_eq!([0, 0xff, 0x100].map(|value| write(&mut env, interrupt, value).is_ok()), [true, true, false]);
    env.pv &= !(1 << pv::ASYNC_PF_VMEXIT);
    assert!(write(&mut env, enable, 0x100d).is_err() && write(&mut env, enable, 0x1009).is_ok());
    env.pv &= !(1 << pv::ASYNC_PF_INT);
    assert!(write(&mut env, enable, 0x1009).is_err() && write(&mut env, enable, 0x1001).is_ok());
    assert_eq!(write(&mut env, interrupt, 0), Err(MsrError::Unsupported(interrupt)));
    env.pv &= !(1 << pv::ASYNC_PF);
    assert_eq!(write(&mut env, enable, 0), Err(MsrError::Unsupported(enable)));
}

#[test]
fn lists() {
    let model = CpuModel::default();
    let list = index_list(&model, 0);
    assert!(!list.contains(&0x33) && !list.contains(&0xcf), "split-lock detection is not offered");
    assert!([0x33, 0xcf].iter().all(|index| index_list(&model, 1 << 5).contains(index)));
    let saved = [0x10, 0x11, 0x12, 0x3b, 0x6e0, 0x174, 0x277, 0x1a0, 0xc000_0081, 0x4b56_4d01];
    for index in saved.into_iter().chain([0x4b56_4d02, 0x4b56_4d06, 0x4b56_4d07]) {
        assert!(list.contains(&index), "{index:#x}");
    }
    assert!(!list.contains(&0xc000_0080) && !list.contains(&0x4b56_4d04));
    let mut env = Fake::default();
    for index in &list {
        assert!(state().read(*index, CLIENT, &mut env).is_ok(), "{index:#x} can be saved");
    }
    for capabilities in [0, 1 << 5] {
        for index in feature_index_list(capabilities) {
            assert!(feature_msr(index, SUPPORTED, capabilities).is_some());
        }
        assert_eq!(
            feature_msr(0xcf, SUPPORTED, capabilities),
            Some(capabilities).filter(|&value| value != 0)
        );
    }
}

/// B1: what is written is read back, other bits are #GP, and without the capability there is no such register.
#[test]
fn sl_b1_the_guests_test_control() {
    let (mut msrs, mut env) = (state(), Fake::default());
    for index in [0x33, 0xcf] {
        assert_eq!(msrs.read(index, GUEST, &mut env), Err(MsrError::Unsupported(index)));
        assert_eq!(msrs.write(index, 0, GUEST, &mut env), Err(MsrError::Unsupported(index)));
    }
    msrs.offer_core_capabilities(1 << 5);
    assert_eq!(msrs.read(0xcf, GUEST, &mut env), Ok(1 << 5));
    assert_eq!(msrs.write(0xcf, 1 << 5, GUEST, &mut env), Err(MsrError::Refused(0xcf)));
    for value in [1 << 29, 0, 1 << 29] {
        assert_eq!(msrs.write(0x33, value, GUEST, &mut env), Ok(()));
        assert_eq!((msrs.read(0x33, GUEST, &mut env), msrs.test_ctrl()), (Ok(value), value));
    }
    for value in [1 << 28, 1 << 31, 1, 1 << 29 | 1 << 30] {
        assert_eq!(msrs.write(0x33, value, GUEST, &mut env), Err(MsrError::Refused(0x33)), "{value:#x}");
    }
    // The client may give less than there is, but not more.
    assert_eq!(msrs.write(0xcf, 1 << 4, CLIENT, &mut env), Err(MsrError::Refused(0xcf)));
    assert_eq!(msrs.write(0xcf, 0, CLIENT, &mut env), Ok(()));
    assert_eq!(msrs.read(0x33, GUEST, &mut env), Ok(0));
    assert_eq!(msrs.write(0x33, 1 << 29, CLIENT, &mut env), Err(MsrError::Refused(0x33)));
}

#[test]
fn sl_b1_a_guest_without_core_capability_has_no_test_control() {
    let (mut msrs, mut env) = (state(), Fake::default());
    msrs.offer_core_capabilities(1 << 5);
    let mut features = Host::get().offered;
    features.remove(Feature::CoreCapability);
    env.features = Features::new(features, 46);
    assert_eq!(msrs.read(0x33, GUEST, &mut env), Err(MsrError::Refused(0x33)));
    assert_eq!(msrs.read(0xcf, GUEST, &mut env), Err(MsrError::Refused(0xcf)));
    assert_eq!(
        msrs.write(0x33, 1 << 29, CLIENT, &mut env),
        Ok(()),
        "the client restores before it sets CPUID"
    );
}

#[test]
fn bus_lock_debug_exceptions_are_switched_by_debugctl() {
    let (mut msrs, mut env) = (state(), Fake::default());
    assert_eq!(msrs.write(0x1d9, 0b111, GUEST, &mut env), Ok(()));
    assert_eq!(msrs.read(0x1d9, GUEST, &mut env), Ok(1 << 2), "LBR and BTF are dropped");
    let mut features = Host::get().offered;
    features.remove(Feature::BusLockDetect);
    env.features = Features::new(features, 46);
    assert_eq!(msrs.write(0x1d9, 1 << 2, GUEST, &mut env), Err(MsrError::Refused(0x1d9)));
    assert_eq!(msrs.write(0x1d9, 1 << 2, CLIENT, &mut env), Ok(()));
}
