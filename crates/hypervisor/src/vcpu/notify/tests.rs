//! Notify VM exits of stalls that silicon makes on demand. The loops that guests can make are in the guests crate.

use std::io::Write;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_vcpu_events;
use silicon::model::CpuModel;
use silicon::system::window::{Stall, StallSite};

use super::super::testing::Program;
use super::*;
use crate::notify::LogLimit;
use crate::time::HostTime;
use crate::vcpu::VcpuHandle;
use crate::{HostParams, System, Vm};

const ENABLED: u64 = 1;
const USER: u64 = 2;
/// Ticks of the window.
const WINDOW: u64 = 50;
const FOREVER: u64 = u64::MAX;

fn vm(bits: u64) -> Arc<Vm> {
    let host = HostParams::parse("kvm_intel.notify_throttle_ms=0").unwrap();
    let vm = System::with_time(CpuModel::default(), host, Box::<Waited>::default()).create_vm().unwrap();
    vm.set_notify(WINDOW << 32 | bits).unwrap();
    vm
}

/// Time that passes when somebody waits for it.
#[derive(Clone, Debug, Default)]
struct Waited(Arc<AtomicU64>);

impl HostTime for Waited {
    fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
    fn wait(&self, deadline: u64, vcpu: &VcpuHandle) {
        if !vcpu.interrupted() {
            self.0.fetch_max(deadline, Ordering::Relaxed);
        }
    }
}

fn stall(vcpu: &mut Vcpu, site: StallSite, ticks: u64) -> &mut Stall {
    let stall = Stall { site, ticks, context_invalid: false, nmi_unblocking: false };
    vcpu.cpu.event_window.stall.insert(stall)
}

fn limit(vcpu: &Vcpu) -> u64 {
    u64::from(vcpu.cpu.event_window.threshold.unwrap()) + WINDOW + 1
}

fn notified(vcpu: &mut Vcpu) -> NotifyExit {
    match vcpu.run().unwrap() {
        VcpuExit::Notify(exit) => exit,
        other => panic!("{other:?}"),
    }
}

fn count(vcpu: &Vcpu) -> u64 {
    vcpu.handle.stats.notify_window_exits.load(Ordering::Relaxed)
}

/// What `work` puts into the log.
fn log(work: impl FnOnce()) -> Vec<String> {
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);
    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, work);
    let bytes = lines.0.lock().unwrap();
    String::from_utf8_lossy(&bytes).lines().map(String::from).collect()
}

#[test]
fn nr11_a_stall_that_ends_is_survived_and_the_client_hears_nothing() {
    // nop; hlt
    let mut program = Program::on(vm(ENABLED), &[0x90, 0xf4]);
    let vcpu = &mut program.vcpu;
    let ticks = 3 * limit(vcpu);
    stall(vcpu, StallSite::Instruction(Program::CODE), ticks);
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
    assert_eq!((count(vcpu), vcpu.regs().rip), (3, Program::CODE + 2));
}

#[test]
fn nr9_a_warning_has_the_vcpu_its_rip_and_its_instruction() {
    let mut program = Program::on(vm(ENABLED | USER), &[0x90, 0xf4]);
    let vcpu = &mut program.vcpu;
    let limit = limit(vcpu);
    stall(vcpu, StallSite::Instruction(Program::CODE), FOREVER);
    let lines = log(|| {
        let expected = NotifyExit { rip: Program::CODE, ticks: limit, repeats: 1, ..NotifyExit::default() };
        assert_eq!(notified(vcpu), expected);
        assert_eq!(notified(vcpu), NotifyExit { repeats: 2, ..expected });
    });
    assert_eq!(lines.len(), 2);
    let text =
        format!("vCPU 0: no event window for {limit} ticks at RIP 0x1000; instruction 90; vectoring 0x0");
    assert!(lines[0].contains(&text), "{}", lines[0]);
    assert!(lines[1].contains("at RIP 0x1000, no progress; "), "{}", lines[1]);
}

#[test]
fn a6_a_thousand_exits_at_one_rip_are_flagged_and_the_log_is_bounded() {
    let mut program = Program::on(vm(ENABLED | USER), &[0x90, 0xf4]);
    let vcpu = &mut program.vcpu;
    stall(vcpu, StallSite::Instruction(Program::CODE), FOREVER);
    let lines = log(|| (1..=1000).for_each(|n| assert_eq!(notified(vcpu).repeats, n)));
    assert_eq!(lines.len() as u32, LogLimit::BURST, "the host's time stands still");
    assert_eq!(count(vcpu), 1000);
}

#[test]
fn a6_a_thousand_exits_at_moving_rips_are_counted_alone() {
    let mut program = Program::on(vm(ENABLED | USER), &[0x90; 1000]);
    let vcpu = &mut program.vcpu;
    let ticks = limit(vcpu);
    let lines = log(|| {
        for n in 0..1000 {
            stall(vcpu, StallSite::Instruction(Program::CODE + n), ticks);
            let exit = notified(vcpu);
            assert_eq!((exit.rip, exit.repeats), (Program::CODE + n, 1));
        }
    });
    assert!(lines.iter().all(|line| !line.contains("no progress")));
    assert_eq!(count(vcpu), 1000);
}

/// NMI handler at 0:0x500 that stalls in its IRET; the program is HLT.
fn in_nmi_handler(bits: u64) -> Program {
    let mut program = Program::on(vm(bits), &[0xf4]);
    assert!(program.vcpu.vm.memory().write(0x500, &[0xcf]));
    let ticks = limit(&program.vcpu);
    stall(&mut program.vcpu, StallSite::Iret, ticks);
    program.vcpu.nmi();
    program
}

#[test]
fn v10_nmis_stay_blocked_until_iret_is_done() {
    let mut program = in_nmi_handler(ENABLED | USER);
    let vcpu = &mut program.vcpu;
    assert_eq!(notified(vcpu).qualification, 1 << 12);
    assert_eq!(vcpu.vcpu_events().nmi.masked, 1, "although the processor had unblocked them");
    vcpu.nmi();
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
    assert_eq!((vcpu.regs().rip, vcpu.regs().rsp), (Program::CODE + 1, 0x8000), "one after the other");
    assert_eq!(vcpu.vcpu_events().nmi.pending, 0);
}

/// NG8: with an event in the IDT-vectoring information bit 12 says nothing.
#[test]
fn v11_the_nmi_bit_means_nothing_in_a_delivery() {
    let mut program = Program::on(vm(ENABLED | USER), &[0x90, 0xf4]);
    let vcpu = &mut program.vcpu;
    let ticks = limit(vcpu);
    stall(vcpu, StallSite::Delivery(0x30), ticks).nmi_unblocking = true;
    vcpu.interrupt(0x30).unwrap();
    let exit = notified(vcpu);
    assert_eq!((exit.qualification, exit.vectoring), (1 << 12, 0x8000_0030));
    assert_eq!(vcpu.vcpu_events().nmi.masked, 0);
}

#[test]
fn v11_a_delivery_is_done_once_whatever_is_delivered() {
    let cases: &[(&str, u8, u32, fn(&mut kvm_vcpu_events))] = &[
        ("interrupt", 0x30, 0x8000_0030, |e| (e.interrupt.injected, e.interrupt.nr) = (1, 0x30)),
        ("exception", 14, 0x8000_0b0e, |e| {
            (e.exception.injected, e.exception.nr) = (1, 14);
            (e.exception.has_error_code, e.exception.error_code) = (1, 6);
        }),
        ("NMI", 2, 0x8000_0202, |e| e.nmi.injected = 1),
    ];
    for (name, number, vectoring, set) in cases {
        let mut program = Program::on(vm(ENABLED | USER), &[0x90, 0xf4]);
        let vcpu = &mut program.vcpu;
        let mut events = kvm_vcpu_events::default();
        set(&mut events);
        vcpu.set_vcpu_events(&events).unwrap();
        let ticks = 2 * limit(vcpu);
        stall(vcpu, StallSite::Delivery(*number), ticks);
        for _ in 0..2 {
            let exit = notified(vcpu);
            assert_eq!((exit.vectoring, exit.rip), (*vectoring, Program::CODE), "{name}");
            assert_eq!(exit.error_code, events.exception.error_code, "{name}");
            // A7: saved and restored, it is the same.
            let saved = vcpu.vcpu_events();
            assert_eq!(saved.exception, events.exception, "{name}");
            assert_eq!(saved.interrupt.nr, events.interrupt.nr, "{name}");
            assert_eq!((saved.nmi.injected, saved.nmi.masked), (events.nmi.injected, 0), "{name}");
            vcpu.set_vcpu_events(&saved).unwrap();
        }
        assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt, "{name}");
        assert_eq!((vcpu.regs().rip, vcpu.regs().rsp), (0x501, 0x8000 - 6), "{name}: one frame");
    }
}

#[test]
fn v12_a_lost_context_is_not_resumed() {
    for bits in [ENABLED, ENABLED | USER] {
        let mut program = Program::on(vm(bits), &[0x90, 0xf4]);
        let vcpu = &mut program.vcpu;
        stall(vcpu, StallSite::Instruction(Program::CODE), FOREVER).context_invalid = true;
        let exit = notified(vcpu);
        assert_eq!((exit.context_invalid, exit.qualification), (true, 1), "the client is told in any case");
        assert_eq!(count(vcpu), 1);
        vcpu.cpu.event_window.stall = None;
        for _ in 0..2 {
            assert_eq!(vcpu.run().map_err(|e| e.errno()), Err(libc::EIO));
        }
        assert_eq!(vcpu.regs().rip, Program::CODE, "nothing has run");
        // The client can shut it down,
        vcpu.events.triple_fault = true;
        assert_eq!(vcpu.run().unwrap(), VcpuExit::Shutdown);
        assert_eq!(vcpu.run().map_err(|e| e.errno()), Err(libc::EIO));
        // or give it new registers.
        let sregs = vcpu.sregs();
        vcpu.set_sregs(&sregs).unwrap();
        assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
    }
}

#[test]
fn nr4_a_vm_keeps_the_parameter_that_it_was_created_with() {
    let system = System::new(CpuModel::default(), HostParams::default());
    let first = system.create_vm().unwrap();
    let a = first.create_vcpu(0).unwrap();
    system.set_notify_window(Some(7)).unwrap();
    let (b, second) = (first.create_vcpu(1).unwrap(), system.create_vm().unwrap());
    system.set_notify_window(None).unwrap();
    let third = system.create_vm().unwrap();
    for (mut vcpu, enabled, window) in [
        (a, true, 2500),
        (b, true, 2500),
        (second.create_vcpu(0).unwrap(), true, 175),
        (third.create_vcpu(0).unwrap(), false, 0),
    ] {
        vcpu.update_intercepts();
        let controls = &vcpu.cpu.controls;
        assert_eq!((controls.notify_exiting, controls.notify_window), (enabled, window));
    }
    assert!(system.set_notify_window(Some(u32::MAX)).is_err());
}

#[test]
fn nr5_a_running_vm_takes_a_new_window_at_its_next_entry() {
    let mut program = Program::on(vm(ENABLED | USER), &[0x90, 0xf4]);
    let vcpu = &mut program.vcpu;
    let threshold = limit(vcpu) - WINDOW;
    stall(vcpu, StallSite::Instruction(Program::CODE), FOREVER);
    for window in [WINDOW, 0, 5000] {
        vcpu.vm.set_notify(window << 32 | ENABLED | USER).unwrap();
        assert_eq!(notified(vcpu).ticks, threshold + window);
    }
    // Off: the stall goes on until something else is to be done.
    vcpu.vm.set_notify(0).unwrap();
    vcpu.handle().interrupt();
    assert!(matches!(vcpu.run(), Err(Error::Interrupted)));
    assert_eq!(count(vcpu), 3);
}

#[test]
fn a_processor_without_the_exit_does_not_promise_it() {
    let system = System::new(CpuModel::parse("nehalem").unwrap(), HostParams::default());
    let vm = system.create_vm().unwrap();
    assert!(!system.has_notify_exit() && !vm.policy().notify().enabled);
    assert!(vm.set_notify_vmexit(ENABLED).is_err() && vm.set_notify(ENABLED).is_err());
    assert!(vm.set_notify(0).is_ok());
}

#[test]
fn ng10_a_vcpu_without_progress_is_held_back_longer_and_longer() {
    const MS: u64 = 1_000_000;
    let host = HostParams::parse("kvm_intel.notify_throttle_ms=5").unwrap();
    let time = Waited::default();
    let vm = System::with_time(CpuModel::default(), host, Box::new(time.clone())).create_vm().unwrap();
    vm.set_notify(WINDOW << 32 | ENABLED | USER).unwrap();
    let mut program = Program::on(vm, &[0x90, 0xf4]);
    let vcpu = &mut program.vcpu;
    stall(vcpu, StallSite::Instruction(Program::CODE), FOREVER);
    // The first exit may be a mistake; the pause that an exit brings comes before the next entry.
    for milliseconds in [0, 0, 1, 3, 7, 12, 17] {
        notified(vcpu);
        assert_eq!(time.now(), milliseconds * MS);
    }
    // Signals do not get round it,
    vcpu.handle().interrupt();
    for _ in 0..3 {
        assert!(matches!(vcpu.run(), Err(Error::Interrupted)));
    }
    vcpu.handle().settle();
    assert_eq!(time.now(), 17 * MS);
    notified(vcpu);
    assert_eq!(time.now(), 22 * MS);
    assert_eq!(vcpu.handle.stats.notify_throttle.load(Ordering::Relaxed), 22 * MS);
    // and progress ends it.
    let ticks = limit(vcpu);
    stall(vcpu, StallSite::Instruction(Program::CODE + 1), ticks);
    notified(vcpu);
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
    assert_eq!(time.now(), 27 * MS);
}
