use silicon::buffers::Enumeration;
use silicon::model::CpuModel;
use silicon::topology::{Shape, Topology};

use super::*;
use crate::host::HostParams;

/// A host with one thread.
struct Machine {
    topology: Topology,
    mitigations: Mitigations,
    control: Control,
    costs: Costs,
}

impl Machine {
    fn new(line: &str) -> Machine {
        let line = HostParams::parse(line).unwrap().mitigations;
        let part = line.part.unwrap().0;
        let model = line.model(CpuModel::default());
        let topology = Topology::of(Shape::default(), &model, part.arch_capabilities);
        let mitigations = Mitigations::new(&model, &line);
        let control = Control::new(topology.thread(0).unwrap());
        Machine { topology, mitigations, control, costs: Costs::default() }
    }

    fn host(&self) -> Host<'_> {
        Host { thread: self.topology.thread(0).unwrap(), mitigations: &self.mitigations }
    }

    fn guest(&self, vm: u64, arch_capabilities: u64) -> Guest {
        let verw_clears = Enumeration { md_clear: true, arch_capabilities, mcu_opt_ctrl: 0 }.verw_clears();
        let flush = self.mitigations.flush();
        Guest { vcpu: vm << 32, vm, flush, maps_mmio: false, arch_capabilities, verw_clears }
    }

    /// A time slice: loaded, so many exits that the kernel handles, put. Whether the last entry was with stale data.
    fn slice(&mut self, guest: &Guest, exits: u32) -> Option<(Buffer, Domain)> {
        let mut found = None;
        for at in 0..exits {
            let host = Host { thread: self.topology.thread(0).unwrap(), mitigations: &self.mitigations };
            if at == 0 {
                self.control.load(host, guest, &mut self.costs);
            }
            let before = self.costs.stale_entries;
            // What is in the buffers just before the guest's own data comes.
            self.control.enter(host, guest, at == 0, &mut self.costs);
            found = (self.costs.stale_entries != before).then_some((Buffer::Fill, Domain::HostKernel));
            self.control.exit(host, guest, Cleared::NOTHING, &mut self.costs);
        }
        let host = Host { thread: self.topology.thread(0).unwrap(), mitigations: &self.mitigations };
        self.control.put(host, &mut self.costs);
        found
    }

    fn user(&mut self) {
        let host = Host { thread: self.topology.thread(0).unwrap(), mitigations: &self.mitigations };
        self.control.return_to_user(host, &mut self.costs);
    }
}

/// Told that it needs no clears, and that it needs them.
const IMMUNE: u64 = RDCL_NO | MDS_NO | TAA_NO | MMIO_IMMUNE;
const OLD: u64 = RDCL_NO | MDS_NO | TAA_NO;
const WITH_CLEARS: u64 = OLD | FB_CLEAR;
const HAS_MDS: u64 = RDCL_NO;

/// F4, F5: no write where the wanted value is there already; one for each switch between guests that differ.
#[test]
fn ac_v6_writes_only_between_guests_that_differ() {
    let mut machine = Machine::new("ring3.part=ice-lake-sp");
    let (old, old_too, clears) =
        (machine.guest(1, OLD), machine.guest(2, OLD), machine.guest(3, WITH_CLEARS));
    machine.slice(&old, 1_000_000);
    assert_eq!(
        (machine.costs.msr_writes, machine.costs.msr_reads),
        (1, 0),
        "a million exits of a lone guest"
    );
    for _ in 0..100 {
        machine.slice(&old, 3);
        machine.slice(&old_too, 3);
    }
    assert_eq!(machine.costs.msr_writes, 1, "guests alike");
    let before = machine.costs;
    for _ in 0..100 {
        machine.slice(&clears, 3);
        machine.slice(&old, 3);
    }
    assert_eq!(machine.costs.msr_writes - before.msr_writes, 200);
    assert_eq!(machine.costs.guest_switches - before.guest_switches, 200, "one for each switch");
}

/// What upstream does: RDMSR and two WRMSRs for every exit.
#[test]
fn ac_v6_the_aggressive_toggle() {
    let mut machine = Machine::new("ring3.part=ice-lake-sp ring3.fb_clear_dis=upstream");
    let old = machine.guest(1, OLD);
    machine.slice(&old, 1000);
    assert_eq!((machine.costs.msr_writes, machine.costs.msr_reads), (2000, 1000));
    let clears = machine.guest(2, WITH_CLEARS);
    machine.slice(&clears, 1000);
    assert_eq!(machine.costs.msr_writes, 2000, "a guest that is to have its clears");
}

/// F3: none for entering the same vCPU again.
#[test]
fn ac_f3_writes_where_a_vcpu_is_loaded_and_put() {
    let mut machine = Machine::new("ring3.part=ice-lake-sp ring3.fb_clear_dis=load");
    let old = machine.guest(1, OLD);
    for _ in 0..10 {
        machine.slice(&old, 1000);
    }
    assert_eq!((machine.costs.msr_writes, machine.costs.msr_reads), (20, 0));
}

/// F4b: what host user space finds is the host's.
#[test]
fn ac_f4b_host_user_space_has_its_own_value() {
    for policy in ["upstream", "load", "cached"] {
        let mut machine = Machine::new(&format!("ring3.part=ice-lake-sp ring3.fb_clear_dis={policy}"));
        let old = machine.guest(1, OLD);
        machine.slice(&old, 10);
        let value = |machine: &Machine| machine.host().thread.read_msr(MCU_OPT_CTRL).unwrap();
        assert_eq!(value(&machine), if policy == "cached" { FB_CLEAR_DIS } else { 0 }, "{policy}");
        machine.user();
        assert_eq!(value(&machine), 0, "{policy}");
        assert!(machine.host().thread.verw_clears().has(Buffer::Fill), "{policy}");
    }
}

/// F5: bits that nobody here knows stay as they were.
#[test]
fn ac_f5_other_bits_of_the_register_are_kept() {
    let mut machine = Machine::new("ring3.part=ice-lake-sp");
    machine.host().thread.write_msr(MCU_OPT_CTRL, 1 << 4).unwrap();
    machine.control = Control::new(machine.topology.thread(0).unwrap());
    let old = machine.guest(1, OLD);
    machine.slice(&old, 1);
    assert_eq!(machine.host().thread.read_msr(MCU_OPT_CTRL), Ok(1 << 4 | FB_CLEAR_DIS));
    machine.user();
    assert_eq!(machine.host().thread.read_msr(MCU_OPT_CTRL), Ok(1 << 4));
}

/// F6, F8, H4: who is told that VERW clears gets clears; upstream's rule has guests with MDS clear in vain.
#[test]
fn ac_f6_guests_are_not_lied_to() {
    for (policy, told, vain) in [
        ("cached", HAS_MDS, 0),
        ("load", HAS_MDS, 0),
        ("upstream", HAS_MDS, 1),
        ("upstream", WITH_CLEARS, 0),
        ("cached", WITH_CLEARS, 0),
    ] {
        let mut machine = Machine::new(&format!("ring3.part=ice-lake-sp ring3.fb_clear_dis={policy}"));
        let guest = machine.guest(1, told);
        assert!(guest.verw_clears.has(Buffer::Fill));
        let host = Host { thread: machine.topology.thread(0).unwrap(), mitigations: &machine.mitigations };
        machine.control.load(host, &guest, &mut machine.costs);
        machine.control.enter(host, &guest, true, &mut machine.costs);
        machine.control.exit(host, &guest, guest.verw_clears, &mut machine.costs);
        assert_eq!(machine.costs.vain_clears, vain, "{policy} {told:#x}");
    }
}

/// Over all that a guest can be told: FB_CLEAR_DIS is never set for one whose VERW is to clear.
#[test]
fn ac_f8_the_decision_over_all_that_guests_are_told() {
    let machine = Machine::new("ring3.part=ice-lake-sp");
    let bits = [FB_CLEAR, MDS_NO, TAA_NO, PSDP_NO, FBSDP_NO, SBDR_SSDP_NO];
    for set in 0..1u32 << (bits.len() + 2) {
        let told =
            bits.iter().enumerate().filter(|(i, _)| set >> i & 1 != 0).fold(0, |all, (_, bit)| all | bit);
        let (md_clear, maps_mmio) = (set >> bits.len() & 1 != 0, set >> (bits.len() + 1) & 1 != 0);
        let verw_clears = Enumeration { md_clear, arch_capabilities: told, mcu_opt_ctrl: 0 }.verw_clears();
        let guest = Guest { maps_mmio, verw_clears, ..machine.guest(1, told) };
        let clears = told & FB_CLEAR != 0 || md_clear && told & MDS_NO == 0;
        assert_eq!(wants_no_clears(&machine.mitigations, &guest), !clears && !maps_mmio, "{set:#x}");
        let immune = told & (MDS_NO | TAA_NO | MMIO_IMMUNE) == MDS_NO | TAA_NO | MMIO_IMMUNE;
        assert_eq!(upstream_disables(&machine.mitigations, &guest), told & FB_CLEAR == 0 && !immune);
    }
    for part in ["skylake-sp", "cascade-lake", "alder-lake", "sapphire-rapids"] {
        let machine = Machine::new(&format!("ring3.part={part}"));
        let guest = machine.guest(1, IMMUNE);
        assert!(
            !wants_no_clears(&machine.mitigations, &guest),
            "{part}: no FB_CLEAR_DIS, or the host clears"
        );
    }
}

/// F2: MMIO of the host's in a slot has buffers cleared, whoever put it there.
#[test]
fn ac_f2_clears_before_entries_of_vms_with_host_mmio() {
    let mut machine = Machine::new("ring3.part=ice-lake-sp");
    let plain = machine.guest(1, OLD);
    let mmio = Guest { maps_mmio: true, ..machine.guest(2, OLD) };
    machine.slice(&plain, 10);
    assert_eq!(machine.costs.buffer_clears, 0);
    assert!(machine.slice(&mmio, 10).is_none(), "cleared, though the guest before wanted FB_CLEAR_DIS");
    assert_eq!((machine.costs.buffer_clears, machine.costs.stale_entries), (10, 0));
    let mut off = Machine::new("ring3.part=ice-lake-sp mmio_stale_data=off");
    off.slice(&plain, 1);
    assert!(off.slice(&mmio, 1).is_some(), "data of the VM before is in the fill buffers");
}

/// A missing clear is data of somebody else in a buffer, not only a number that does not rise.
#[test]
fn ac_stale_data_is_found_where_nothing_is_cleared() {
    for (line, stale) in [
        ("ring3.part=skylake-sp l1tf=full", false),
        ("ring3.part=skylake-sp l1tf=full mitigations=off", true),
        ("ring3.part=skylake-sp l1tf=full mds=off tsx_async_abort=off mmio_stale_data=off", false),
        ("ring3.part=skylake-sp mds=off tsx_async_abort=off mmio_stale_data=off l1tf=off", true),
        ("ring3.part=skylake-sp l1tf=off", true),
        ("ring3.part=cascade-lake tsx=on", false),
        ("ring3.part=cascade-lake tsx=on tsx_async_abort=off mmio_stale_data=off", true),
        ("ring3.part=alder-lake", false),
        ("ring3.part=alder-lake reg_file_data_sampling=off", true),
        ("ring3.part=sapphire-rapids", false),
        ("ring3.part=sapphire-rapids spectre_v2=off", true),
    ] {
        let mut machine = Machine::new(line);
        let (one, two) = (machine.guest(1, IMMUNE), machine.guest(2, IMMUNE));
        machine.slice(&one, 2);
        machine.user();
        let found = machine.slice(&two, 1).is_some();
        assert_eq!(found, stale, "{line}");
    }
}

/// `cond` flushes after the vCPU has been loaded, not at each entry.
#[test]
fn ac_conditional_flushes() {
    for (line, flushes) in [("", 3), ("l1tf=full", 30), ("l1tf=off", 0)] {
        let mut machine = Machine::new(&format!("ring3.part=skylake-sp {line}"));
        let guest = machine.guest(1, 0);
        for _ in 0..3 {
            machine.slice(&guest, 10);
        }
        assert_eq!(machine.costs.l1d_flushes, flushes, "{line}");
    }
}

/// Another vCPU on the thread: one barrier.
#[test]
fn ac_branch_barriers_between_vcpus() {
    let mut machine = Machine::new("ring3.part=sapphire-rapids");
    let (one, two) = (machine.guest(1, 0), machine.guest(2, 0));
    for guest in [&one, &one, &two, &one] {
        machine.slice(guest, 5);
    }
    assert_eq!(machine.costs.branch_barriers, 2);
}
