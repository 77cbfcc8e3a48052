//! What becomes of a guest on a host that need not be at hand: what it is told, what it will say of itself, and what its entries cost.

use silicon::buffers::{Cleared, Enumeration};
use silicon::model::CpuModel;
use silicon::model::speculation::arch_cap::{FB_CLEAR, MDS_NO};
use silicon::topology::{Shape, Topology};

use super::Mitigations;
use super::command_line::{CommandLine, FbClearDis};
use super::entry::{self, Control, Costs, Guest, Host};
use super::linux::{self, Processor};
use super::selected::{Flush, Hardware, Selected};

/// All of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// The host's processor.
    pub hardware: Hardware,
    /// What its kernel does.
    pub selected: Selected,
    /// What entries do about L1 terminal fault.
    pub flush: Flush,
    /// IA32_ARCH_CAPABILITIES of guests.
    pub supported: u64,
    /// The files of `/sys/devices/system/cpu/vulnerabilities` in a Linux guest, and their contents.
    pub vulnerabilities: Vec<(&'static str, String)>,
    /// What entries do, and when.
    pub at_entry: [(&'static str, &'static str); 4],
    /// What that costs.
    pub costs: Vec<Schedule>,
}

/// Who runs on a thread, and what it costs under each policy for FB_CLEAR_DIS.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// Who runs.
    pub name: &'static str,
    /// Costs of [`EXITS`] exits.
    pub costs: [(FbClearDis, Costs); 3],
}

/// Exits that are counted.
pub const EXITS: u32 = 100_000;
/// Exits from one guest's turn on the thread to the next one's.
pub const SLICE: u32 = 10;

const POLICIES: [FbClearDis; 3] = [FbClearDis::Upstream, FbClearDis::Load, FbClearDis::Cached];

/// The report on guests of `cpu` on a host booted with `line`.
pub fn report(cpu: &CpuModel, line: &CommandLine) -> Report {
    let cpu = line.model(cpu.clone());
    let hardware = Hardware::of(&cpu, line);
    let selected = Selected::of(&hardware, line);
    let flush = selected.flush(&hardware, line.l1d_flush);
    let supported = cpu.chosen_arch_capabilities().unwrap_or_else(|| selected.supported(&hardware, flush));
    Report {
        vulnerabilities: linux::report(&Processor::of(&cpu, supported)),
        at_entry: entry::at_entry(&hardware, &selected, flush),
        costs: schedules(&cpu, line, supported),
        hardware,
        selected,
        flush,
        supported,
    }
}

/// Who may run: told what is supported; told so by a client that knows neither FB_CLEAR nor that the guest has no use for it.
fn schedules(cpu: &CpuModel, line: &CommandLine, supported: u64) -> Vec<Schedule> {
    let older = supported & !FB_CLEAR | MDS_NO;
    let told = supported | FB_CLEAR;
    let rows: [(&'static str, &[u64], bool); 5] = [
        ("one guest, told what is supported", &[supported], false),
        ("one guest, told of no FB_CLEAR", &[older], false),
        ("the same, each exit to user space", &[older], true),
        ("two of these, in turns", &[older, older], false),
        ("one of these, one told of FB_CLEAR", &[older, told], false),
    ];
    let schedule = |(name, guests, to_user): (_, &[u64], bool)| Schedule {
        name,
        costs: POLICIES.map(|policy| {
            let line = CommandLine { fb_clear_dis: policy, ..line.clone() };
            (policy, run(cpu, &line, guests, to_user))
        }),
    };
    rows.into_iter().map(schedule).collect()
}

/// What [`EXITS`] exits cost on a thread where guests that have been `told` this take turns.
fn run(cpu: &CpuModel, line: &CommandLine, told: &[u64], to_user: bool) -> Costs {
    let mitigations = Mitigations::new(cpu, line);
    let topology = Topology::of(Shape::default(), cpu, mitigations.hardware().arch_capabilities);
    let Some(thread) = topology.thread(0) else { return Costs::default() };
    let host = Host { thread, mitigations: &mitigations };
    let mut costs = Costs::default();
    let mut control = Control::new(thread);
    let guest = |index: usize| {
        let arch_capabilities = told[index];
        let verw_clears = Enumeration { md_clear: true, arch_capabilities, mcu_opt_ctrl: 0 }.verw_clears();
        let number = index as u64;
        let flush = mitigations.flush();
        Guest { vcpu: number, vm: number, flush, maps_mmio: false, arch_capabilities, verw_clears }
    };
    for exit in 0..EXITS {
        let guest = guest((exit / SLICE) as usize % told.len());
        let (first, last) = (exit % SLICE == 0, exit % SLICE == SLICE - 1);
        let (loaded, put) =
            (to_user || first && (told.len() > 1 || exit == 0), to_user || last && told.len() > 1);
        if loaded {
            control.load(host, &guest, &mut costs);
        }
        control.enter(host, &guest, loaded, &mut costs);
        control.exit(host, &guest, Cleared::NOTHING, &mut costs);
        if put {
            control.put(host, &mut costs);
        }
        if to_user {
            control.return_to_user(host, &mut costs);
        }
    }
    costs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostParams;

    fn of(line: &str) -> Report {
        report(&CpuModel::default(), &HostParams::parse(line).unwrap().mitigations)
    }

    fn writes(report: &Report) -> Vec<[u64; 3]> {
        report.costs.iter().map(|row| row.costs.map(|(_, costs)| costs.msr_writes)).collect()
    }

    /// V6: the numbers that the thread asks for. Two hundred thousand writes become one.
    #[test]
    fn ac_v6_writes_by_schedule_and_policy() {
        let exits = u64::from(EXITS);
        let slices = exits / u64::from(SLICE);
        let expected = [
            [0, 0, 0],
            [2 * exits, 1, 1],
            [2 * exits, 2 * exits, 2 * exits],
            [2 * exits, 2 * slices, 1],
            [exits, slices, slices],
        ];
        assert_eq!(writes(&of("ring3.part=ice-lake-sp")), expected);
        for other in ["", "ring3.part=skylake-sp", "ring3.part=sapphire-rapids"] {
            assert!(writes(&of(other)).iter().flatten().all(|&writes| writes == 0), "{other}");
        }
    }

    /// The model that guests have is that of `--cpu`; what they are told is the host's.
    #[test]
    fn ac_what_a_guest_will_say() {
        let text = |report: &Report, file| {
            report.vulnerabilities.iter().find(|(name, _)| *name == file).unwrap().1.clone()
        };
        let clears = "Mitigation: Clear CPU buffers; SMT Host state unknown";
        let skylake = of("ring3.part=skylake-sp");
        assert_eq!(text(&skylake, "mds"), clears);
        assert_eq!(text(&skylake, "meltdown"), "Mitigation: PTI");
        let modern = of("ring3.part=sapphire-rapids");
        assert_eq!(
            (text(&modern, "mds"), text(&modern, "indirect_target_selection")),
            ("Not affected".into(), "Not affected".into())
        );
    }
}
