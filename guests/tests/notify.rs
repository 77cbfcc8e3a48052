//! Event windows that stay closed, on bare metal, by the numbers of the notify VM exit's test plan. The programs loop until
//! their monitor, which is here, mends what they have broken.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use guests::machine::{self, Machine, Report};
use guests::{NOTIFY_32, NOTIFY_64, NOTIFY_LEGAL, Program};
use hypervisor::notify::ticks;
use hypervisor::vcpu::{NotifyExit, VcpuHandle};
use hypervisor::{HostParams, Vcpu, VcpuExit, Vm};
use kvm_bindings::{KVM_IRQCHIP_PIC_MASTER, kvm_msi};
use silicon::model::CpuModel;

const ENABLED: u64 = 1;
const USER: u64 = 2;
const WINDOW: u64 = 1000;
/// Exits before the guest is mended.
const ROUNDS: u32 = 5;
/// Far more than any program takes on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(300);

fn threshold() -> u64 {
    CpuModel::default().notify_threshold().unwrap().into()
}

fn machine(program: Program, host: &str, setting: u64) -> Machine {
    let host = HostParams::parse(host).unwrap();
    let machine = machine::build(program.image, program.cpus, CpuModel::default(), host).unwrap();
    machine.vm.set_notify(setting).unwrap();
    machine
}

/// A loop whose client hears of each window, with no pauses.
fn looping(program: Program) -> Machine {
    machine(program, "kvm_intel.notify_throttle_ms=0", WINDOW << 32 | ENABLED | USER)
}

/// Runs to the next notify VM exit, or to the program's end.
fn run(vcpu: &mut Vcpu, report: &mut Report) -> Option<NotifyExit> {
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::Notify(exit) => return Some(exit),
            VcpuExit::Io { port: 0x3f8, write: Some(value), .. } => {
                report.console.push(char::from(value as u8));
            }
            VcpuExit::Io { port: 0xf4, write: Some(value), .. } => {
                report.status = Some(value);
                return None;
            }
            VcpuExit::Io { port: 0xea, write: Some(line), .. } => report.behaviours.push(line as u16),
            other => panic!("{other:?} at {:#x}", vcpu.state().rip),
        }
    }
}

/// Sends an NMI and interrupt 0x40, as another processor would.
fn send_events(vm: &Vm) {
    for data in [0x400, 0x40] {
        vm.signal_msi(&kvm_msi { address_lo: 0xfee0_0000, data, ..Default::default() }).unwrap();
    }
}

/// The loop gives control once in each window, with everything where it was; nothing else gets in; then it is mended and
/// shows the rest by itself.
fn loops(program: Program, vectoring: u32, mend: impl Fn(&mut Vcpu)) {
    loops_on(looping(program), program, vectoring, mend);
}

fn loops_on(mut machine: Machine, program: Program, vectoring: u32, mend: impl Fn(&mut Vcpu)) {
    let Machine { vcpus, vm, .. } = &mut machine;
    let vcpu = &mut vcpus[0];
    let mut report = Report::default();
    let mut first = None;
    for repeats in 1..=ROUNDS {
        let exit = run(vcpu, &mut report);
        let exit = exit.unwrap_or_else(|| panic!("it does not loop: {}", report.console));
        let expected = NotifyExit {
            rip: first.get_or_insert(exit).rip,
            vectoring,
            ticks: threshold() + WINDOW + 1,
            repeats,
            ..NotifyExit::default()
        };
        assert_eq!(exit, expected);
        if repeats == 1 {
            send_events(vm);
        }
    }
    mend(vcpu);
    assert_eq!(run(vcpu, &mut report), None);
    assert_eq!(report.console, "PASS\n");
    assert_eq!(report.behaviours.len(), program.behaviours().count());
    assert_eq!(vcpu.handle().stats.notify_window_exits.load(Ordering::Relaxed), u64::from(ROUNDS));
}

fn make_the_stack_even(vcpu: &mut Vcpu) {
    let mut regs = vcpu.regs();
    regs.rsp &= !3;
    vcpu.set_regs(&regs);
}

fn disarm_the_breakpoint(vcpu: &mut Vcpu) {
    let mut registers = vcpu.debugregs();
    registers.dr7 = 0x400;
    vcpu.set_debugregs(&registers).unwrap();
}

/// #AC (17) while #AC is delivered.
const ALIGNMENT: u32 = 0x8000_0b11;
/// #DB (1), a hardware exception.
const DEBUG: u32 = 0x8000_0301;

#[test]
fn v3_v5_alignment_faults_for_ever() {
    loops(NOTIFY_32, ALIGNMENT, make_the_stack_even);
}

#[test]
fn v4_v5_debug_traps_for_ever() {
    loops(NOTIFY_64, DEBUG, disarm_the_breakpoint);
}

/// What SeaBIOS leaves behind: the PIT's tick (IRQ 0, at vector 8) waits at the 8259, LINT0 lets it through.
#[test]
fn a_tick_that_firmware_left_on_does_not_come_in_before_the_loop() {
    for (program, vectoring, mend) in [
        (NOTIFY_32, ALIGNMENT, make_the_stack_even as fn(&mut Vcpu)),
        (NOTIFY_64, DEBUG, disarm_the_breakpoint),
    ] {
        let machine = looping(program);
        let mut master = machine.vm.irqchip_state(KVM_IRQCHIP_PIC_MASTER).unwrap();
        master.chip.pic.irq_base = 8;
        machine.vm.set_irqchip_state(&master).unwrap();
        machine.vm.irq_line(0, true).unwrap();
        loops_on(machine, program, vectoring, mend);
    }
}

/// A guest in the loop on a thread of its own.
fn alone<R>(program: Program, setting: u64, watch: impl FnOnce(&Arc<Vm>, &VcpuHandle) -> R) -> R {
    let Machine { vcpus, vm, .. } = &mut machine(program, "", setting);
    let mut vcpu = vcpus.remove(0);
    let handle = vcpu.handle();
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            loop {
                match vcpu.run() {
                    Ok(VcpuExit::Io { .. }) => {}
                    result => return result,
                }
            }
        });
        let seen = watch(vm, &handle);
        handle.interrupt();
        let result = thread.join().unwrap();
        assert!(matches!(result, Err(hypervisor::Error::Interrupted)), "{result:?}");
        seen
    })
}

#[test]
fn a2_a_client_that_did_not_ask_hears_nothing_and_can_stop_it() {
    for program in [NOTIFY_32, NOTIFY_64] {
        alone(program, WINDOW << 32 | ENABLED, |_, handle| {
            while handle.stats.notify_window_exits.load(Ordering::Relaxed) < 5 {
                std::thread::yield_now();
            }
        });
    }
}

/// NG2: what the loop is subject to can be changed while it runs.
#[test]
fn nr5_the_window_of_a_guest_that_loops_can_be_changed() {
    alone(NOTIFY_64, u64::from(u32::MAX) << 32 | ENABLED, |vm, handle| {
        let exits = || handle.stats.notify_window_exits.load(Ordering::Relaxed);
        while handle.stats.kicks.load(Ordering::Relaxed) < 3 {
            std::thread::yield_now();
        }
        assert_eq!(exits(), 0, "172 s of the processor's time are not over");
        vm.set_notify(ENABLED).unwrap();
        while exits() < 3 {
            std::thread::yield_now();
        }
    });
}

/// With the exit off, as on the kernel: #DB goes on and on, in a thread that can be stopped.
#[test]
fn v9_without_the_exit_a_debug_loop_is_still_the_hosts_to_stop() {
    alone(NOTIFY_64, 0, |_, handle| {
        while handle.stats.kicks.load(Ordering::Relaxed) < 3 {
            std::thread::yield_now();
        }
        assert_eq!(handle.stats.notify_window_exits.load(Ordering::Relaxed), 0);
    });
}

fn legal(setting: u64) {
    no_exits(machine(NOTIFY_LEGAL, "", setting));
}

fn no_exits(machine: Machine) {
    let handles = machine.vm.vcpus();
    let report = machine::run_vcpus(&machine.vm, machine.vcpus, PATIENCE, &machine::Nothing);
    assert_eq!((report.status, report.console.as_str()), (Some(0), "PASS\n"), "{:?}", report.stopped);
    assert_eq!(report.behaviours.len(), NOTIFY_LEGAL.behaviours().count());
    for handle in handles {
        assert_eq!(handle.stats.notify_window_exits.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn v7_legal_work_never_closes_the_default_window() {
    legal(u64::from(ticks(hypervisor::notify::DEFAULT_WINDOW_US)) << 32 | ENABLED);
}

#[test]
fn v7_legal_work_never_closes_a_window_of_zero() {
    legal(ENABLED);
}

/// N-R1: the default does not lean on the vendor's threshold.
#[test]
fn nr1_legal_work_never_closes_the_default_window_on_a_processor_with_no_threshold() {
    let mut machine =
        machine(NOTIFY_LEGAL, "", u64::from(ticks(hypervisor::notify::DEFAULT_WINDOW_US)) << 32 | ENABLED);
    machine.vcpus.iter_mut().for_each(|vcpu| vcpu.cpu_mut().event_window.threshold = Some(0));
    no_exits(machine);
}

/// A8, the part that no machine's speed matters to; the rest is `cargo xtask bench notify`.
#[test]
fn a8_a_loop_is_held_back() {
    alone(NOTIFY_32, u64::from(ticks(100)) << 32 | ENABLED, |_, handle| {
        let start = Instant::now();
        while handle.stats.notify_window_exits.load(Ordering::Relaxed) < 9 {
            std::thread::yield_now();
        }
        // Pauses of 1, 2, 4 … 64 ms lie between the second exit and the ninth.
        assert!(start.elapsed() >= Duration::from_millis(127));
    });
}
