//! IA32_ARCH_CAPABILITIES on bare metal, by the numbers of its test plan: `asm/speculation.S` on processors that are told everything and
//! nothing, and what the processor counts while it runs. What it checks by itself has tests in `programs.rs`, too.

use guests::SPECULATION;
use guests::machine::{self, Machine};
use hypervisor::{HostParams, VcpuExit};
use silicon::model::CpuModel;
use silicon::model::speculation::arch_cap::*;

/// Fill-buffer clears, register-file clears, L1D flushes and branch barriers.
type Counts = [u64; 4];

/// Runs the program on `cpu`. What had been counted whenever it said that one may look.
fn run(cpu: &str) -> Vec<Counts> {
    let model = CpuModel::parse(cpu).unwrap();
    let mut machine: Machine = machine::build(SPECULATION.image, 1, model, HostParams::default()).unwrap();
    let vcpu = &mut machine.vcpus[0];
    let (mut console, mut seen, mut behaviours) = (String::new(), Vec::new(), 0);
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::Io { port: 0xeb, .. } => {
                let counters = vcpu.cpu_mut().counters;
                seen.push([
                    counters.fb_clears,
                    counters.register_file_clears,
                    counters.l1d_flushes,
                    counters.branch_barriers,
                ]);
            }
            VcpuExit::Io { port: 0xea, .. } => behaviours += 1,
            VcpuExit::Io { port: 0x3f8, write: Some(value), .. } => console.push(char::from(value as u8)),
            VcpuExit::Io { port: 0xf4, .. } => break,
            other => panic!("{cpu}: {other:?} at {:#x}", vcpu.state().rip),
        }
    }
    assert_eq!((console.as_str(), behaviours), ("PASS\n", SPECULATION.behaviours().count()), "{cpu}");
    seen
}

/// M4, F6, F8: the counters rise exactly as the enumeration says, over all combinations of MD_CLEAR, MDS_NO, FB_CLEAR,
/// FB_CLEAR_CTRL, FB_CLEAR_DIS and RFDS_CLEAR.
#[test]
fn ac_m4_clears_are_counted_over_all_enumerations() {
    for set in 0..32u32 {
        let has = |bit: u32| set >> bit & 1 != 0;
        let bits = [(1, MDS_NO), (2, FB_CLEAR), (3, FB_CLEAR_CTRL), (4, RFDS_CLEAR)];
        let told = bits.iter().filter(|(bit, _)| has(*bit)).fold(0, |all, (_, bit)| all | bit);
        let sign = if has(0) { '+' } else { '-' };
        let seen = run(&format!("sapphire-rapids,{sign}md_clear,arch-cap={told:#x}"));
        let mds = has(0) && !has(1);
        let fill = u64::from(mds || has(2));
        let disabled = u64::from(mds);
        let registers = u64::from(has(4));
        // Before; the register form; two of memory; one at CPL 3; one that faults; two with FB_CLEAR_DIS, where there is that.
        let mut verws = vec![(0, 0), (0, 0), (2, 0), (1, 0), (0, 0)];
        if has(3) {
            verws.push((0, 2));
            verws.push((1, 0));
        } else {
            verws.push((0, 0));
        }
        let first = seen[0];
        let (mut plain, mut with_dis) = (0, 0);
        let expected: Vec<Counts> = verws
            .iter()
            .map(|(more, more_with_dis)| {
                (plain, with_dis) = (plain + more, with_dis + more_with_dis);
                let clears = plain * fill + with_dis * disabled;
                [first[0] + clears, first[1] + (plain + with_dis) * registers, first[2], first[3]]
            })
            .collect();
        assert_eq!(seen, expected, "{set:05b}");
    }
}

/// M1 to M3, M6: on processors that have all of it, and each part of it. The program knows what to expect.
#[test]
fn ac_m1_m2_m3_m6_on_processors_that_differ() {
    for cpu in [
        "sapphire-rapids,+rtm,+srbds_ctrl,+bhi_ctrl,+rrsba_ctrl,+ipred_ctrl,+intel_psfd,+ddpd_u,arch-cap=0x2040080",
        "sapphire-rapids,+rtm,arch-cap=0x80",
        "sapphire-rapids,arch-cap=0x40000",
        "sapphire-rapids,arch-cap=0x2000000",
        "sapphire-rapids,+srbds_ctrl,arch-cap=0",
        "sapphire-rapids,-arch_capabilities",
        "sapphire-rapids,-spec_ctrl,-flush_l1d",
        "sapphire-rapids,-ssbd,+bhi_ctrl",
        "skylake",
    ] {
        let seen = run(cpu);
        let model = CpuModel::parse(cpu).unwrap();
        let commands = |feature| u64::from(model.has(feature));
        // One command of each kind is taken, where there is one; zeros command nothing.
        assert_eq!(seen[0][2], commands(silicon::model::Feature::FlushL1d), "{cpu}");
        assert_eq!(seen[0][3], commands(silicon::model::Feature::SpecCtrl), "{cpu}");
    }
}
