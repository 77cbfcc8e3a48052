//! The notify VM exit as clients see it, by the numbers of its test plan (A1 to A7).
#![expect(unsafe_code, reason = "addresses of fields of kvm_run")]

use std::sync::Arc;

use hypervisor::{HostParams, System, Vm};
use kvm_bindings::*;
use silicon::model::CpuModel;
use silicon::system::window::{Stall, StallSite};

use crate::capability::{check_extension, enable};
use crate::ioctl::{IOCTLS, ioctl};
use crate::ring3::{NotifyRecord, RING3_CAP_NOTIFY, RING3_CAP_NOTIFY_WINDOW, RING3_NOTIFY_THERE};
use crate::run::{RunArea, field};
use crate::{Argument, Created, Errno, Object, Reply};

const ENABLED: u64 = KVM_X86_NOTIFY_VMEXIT_ENABLED as u64;
const USER: u64 = KVM_X86_NOTIFY_VMEXIT_USER as u64;
const WINDOW: u64 = 500;
const LOOP: u64 = WINDOW << 32 | ENABLED | USER;
/// Where the program is, its #AC handler, and its odd stack.
const CODE: u64 = 0x2000;
const HANDLER: u64 = 0x3000;
const STACK: u64 = 0x8001;
const GDT: u64 = 0x800;
const IDT: u64 = 0x1000;
const MEMORY: usize = 0x1_0000;
/// IDT-vectoring information of #AC: hardware exception with an error code.
const VECTORING: u32 = 1 << 31 | 1 << 11 | 3 << 8 | 17;

fn system(model: &str) -> Arc<System> {
    let host = HostParams::parse("kvm_intel.notify_throttle_ms=0").unwrap();
    System::new(CpuModel::parse(model).unwrap(), host)
}

fn request(cap: u32, argument: u64) -> kvm_enable_cap {
    kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() }
}

/// A level 3 program with alignment checking, whose #AC handler is at level 3 too and has the same odd stack:
/// CVE-2015-5307. The handler writes to port 0x10.
struct Loop {
    vcpu: Object,
    vm: Arc<Vm>,
    _memory: Vec<u8>,
}

impl Loop {
    fn new(setting: u64) -> Loop {
        Loop::on(system("sapphire-rapids").create_vm().unwrap(), |vm| {
            enable(vm, &request(KVM_CAP_X86_NOTIFY_VMEXIT, setting)).unwrap();
        })
    }

    fn on(vm: Arc<Vm>, prepare: impl FnOnce(&Vm)) -> Loop {
        prepare(&vm);
        enable(&vm, &request(KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)).unwrap();
        let memory = vec![0u8; MEMORY + 4096];
        let userspace_addr = (memory.as_ptr() as u64 + 4095) & !4095;
        let memory_size = MEMORY as u64;
        vm.set_user_memory_region(kvm_userspace_memory_region {
            memory_size,
            userspace_addr,
            ..Default::default()
        })
        .unwrap();
        let write = |at: u64, bytes: &[u8]| assert!(vm.memory().write(at, bytes));
        write(GDT + 8, &0x00cf_fb00_0000_ffffu64.to_le_bytes());
        write(GDT + 16, &0x00cf_f300_0000_ffffu64.to_le_bytes());
        write(IDT + 17 * 8, &(0x0000_8e00_000b_0000 | HANDLER).to_le_bytes());
        write(CODE, &[0x50]);
        write(HANDLER, &[0xe6, 0x10]);
        let Created { object: vcpu, .. } = Created::vcpu(vm.create_vcpu(0).unwrap()).unwrap();
        let this = Loop { vcpu, vm, _memory: memory };
        let mut sregs = kvm_sregs::default();
        this.call("KVM_GET_SREGS", &mut sregs);
        let flat = kvm_segment {
            limit: u32::MAX,
            selector: 0x13,
            type_: 3,
            dpl: 3,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        (sregs.ds, sregs.es, sregs.ss) = (flat, flat, flat);
        sregs.cs = kvm_segment { selector: 0xb, type_: 11, ..flat };
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 23);
        (sregs.idt.base, sregs.idt.limit) = (IDT, 18 * 8 - 1);
        sregs.cr0 = 1 << 18 | 1 << 5 | 1 << 4 | 1;
        this.call("KVM_SET_SREGS", &mut sregs);
        let mut regs =
            kvm_regs { rip: CODE, rsp: STACK, rflags: 1 << 18 | 3 << 12 | 2, ..Default::default() };
        this.call("KVM_SET_REGS", &mut regs);
        this
    }

    fn try_call(&self, name: &str, argument: u64) -> Result<(), Errno> {
        let row = IOCTLS.iter().find(|row| row.name == name && row.handler.takes(&self.vcpu)).unwrap();
        ioctl(&self.vcpu, row.number(), Argument(argument))
            .map(|reply| assert!(matches!(reply, Reply::Value(0))))
    }

    fn call<T>(&self, name: &str, argument: &mut T) {
        self.try_call(name, std::ptr::from_mut(argument) as u64).unwrap();
    }

    fn area(&self) -> &RunArea {
        match &self.vcpu {
            Object::Vcpu(vcpu) => &vcpu.run,
            _ => unreachable!(),
        }
    }

    /// KVM_RUN; the exit reason.
    fn run(&self) -> u32 {
        self.try_call("KVM_RUN", 0).unwrap();
        self.area().get(field!(self.area(), exit_reason))
    }

    /// The record of KVM_EXIT_NOTIFY.
    fn record(&self) -> NotifyRecord {
        let area = self.area();
        let at = field!(area, __bindgen_anon_1);
        assert_eq!(at as usize - area.structure() as usize, 32);
        area.get(at.cast())
    }

    fn regs(&self) -> kvm_regs {
        let mut regs = kvm_regs::default();
        self.call("KVM_GET_REGS", &mut regs);
        regs
    }

    fn events(&self) -> kvm_vcpu_events {
        let mut events = kvm_vcpu_events::default();
        self.call("KVM_GET_VCPU_EVENTS", &mut events);
        events
    }
}

#[test]
fn a1_the_capability_is_the_kernels() {
    for (model, there) in [("sapphire-rapids", 1), ("nehalem", 0)] {
        let system = system(model);
        let vm = system.create_vm().unwrap();
        assert_eq!(check_extension(&system, Some(&vm), KVM_CAP_X86_NOTIFY_VMEXIT.into()), there);
        let set = |value| enable(&vm, &request(KVM_CAP_X86_NOTIFY_VMEXIT, value));
        for value in [0, USER, 4, 4 | ENABLED, 1 << 32] {
            assert_eq!(set(value), Err(Errno::INVALID), "{value:#x}");
        }
        let expected = if there == 1 { Ok(()) } else { Err(Errno::INVALID) };
        for value in [ENABLED, ENABLED | USER, 7 << 32 | ENABLED, u64::from(u32::MAX) << 32 | ENABLED] {
            assert_eq!(set(value), expected, "{value:#x} may be set again and again");
        }
        let _vcpu = vm.create_vcpu(0).unwrap();
        assert_eq!(set(ENABLED), Err(Errno::INVALID), "vCPUs exist");
    }
}

/// NG2.
#[test]
fn a_live_vm_tells_its_setting_and_takes_another() {
    let system = system("sapphire-rapids");
    let vm = system.create_vm().unwrap();
    let _vcpu = vm.create_vcpu(0).unwrap();
    let read = |vm| {
        let check = |cap: u32| check_extension(&system, vm, cap.into()) as u32;
        (check(RING3_CAP_NOTIFY), check(RING3_CAP_NOTIFY_WINDOW))
    };
    assert_eq!(read(None), (RING3_NOTIFY_THERE | 1, 2500), "the default, 100 us");
    assert_eq!(read(Some(&vm)), read(None));
    let set = |value| enable(&vm, &request(RING3_CAP_NOTIFY, value));
    for (value, flags, window) in
        [(LOOP, 3, 500), (0, 0, 0), (u64::from(u32::MAX) << 32 | ENABLED, 1, u32::MAX)]
    {
        assert_eq!(set(value), Ok(()));
        assert_eq!(read(Some(&vm)), (RING3_NOTIFY_THERE | flags, window));
    }
    for value in [USER, 4, 8 | ENABLED] {
        assert_eq!(set(value), Err(Errno::INVALID));
    }
    assert_eq!(enable(&vm, &request(RING3_CAP_NOTIFY_WINDOW, 1)), Err(Errno::INVALID), "to be read only");
}

#[test]
fn a3_the_client_gets_an_exit_for_each_window() {
    let guest = Loop::new(LOOP);
    let registers = guest.regs();
    for repeats in 1..=5 {
        assert_eq!(guest.run(), KVM_EXIT_NOTIFY);
        let threshold = u64::from(CpuModel::default().notify_threshold().unwrap());
        let expected = NotifyRecord {
            flags: 0,
            vectoring: VECTORING,
            error_code: 0,
            repeats,
            rip: CODE,
            qualification: 0,
            ticks: threshold + WINDOW + 1,
        };
        assert_eq!(guest.record(), expected);
        let at = field!(guest.area(), __bindgen_anon_1.notify.flags);
        assert_eq!(guest.area().get(at), 0, "all that the kernel tells");
        let now = guest.regs();
        assert_eq!((now.rip, now.rsp), (registers.rip, registers.rsp));
    }
}

#[test]
fn a3_a_client_that_mends_the_stack_has_a_guest_that_goes_on() {
    let guest = Loop::new(LOOP);
    assert_eq!(guest.run(), KVM_EXIT_NOTIFY);
    let mut regs = guest.regs();
    regs.rsp -= 1;
    guest.call("KVM_SET_REGS", &mut regs);
    assert_eq!(guest.run(), KVM_EXIT_IO);
    let regs = guest.regs();
    assert_eq!((regs.rip, regs.rsp), (HANDLER, 0x8000 - 16), "one frame with an error code");
    let mut frame = [0; 16];
    assert!(guest.vm.memory().read(0x8000 - 16, &mut frame));
    let words: Vec<u32> = frame.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    assert_eq!(words, [0, CODE as u32, 0xb, 1 << 18 | 1 << 16 | 3 << 12 | 2], "RF as a fault has it");
}

#[test]
fn a4_a_client_can_shut_the_vcpu_down() {
    let guest = Loop::new(LOOP);
    assert_eq!(guest.run(), KVM_EXIT_NOTIFY);
    let mut events = guest.events();
    events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    events.triple_fault.pending = 1;
    guest.call("KVM_SET_VCPU_EVENTS", &mut events);
    assert_eq!(guest.run(), KVM_EXIT_SHUTDOWN);
}

#[test]
fn a7_the_interrupted_event_moves_to_another_vm() {
    let source = Loop::new(LOOP);
    assert_eq!(source.run(), KVM_EXIT_NOTIFY);
    let mut events = source.events();
    assert_eq!((events.exception.injected, events.exception.nr), (1, 17));
    assert_eq!((events.exception.has_error_code, events.exception.error_code), (1, 0));
    let target = Loop::new(LOOP);
    let mut regs = source.regs();
    // Where the fault came from would fault no more: only the event leads to the handler.
    regs.rip = CODE + 0x100;
    regs.rsp -= 1;
    target.call("KVM_SET_REGS", &mut regs);
    target.call("KVM_SET_VCPU_EVENTS", &mut events);
    assert_eq!(target.run(), KVM_EXIT_IO);
    assert_eq!((target.regs().rip, target.regs().rsp), (HANDLER, 0x8000 - 16));
}

#[test]
fn v12_a_lost_context_is_an_exit_for_every_client() {
    let guest = Loop::new(WINDOW << 32 | ENABLED);
    let stall = Stall {
        site: StallSite::Instruction(CODE),
        ticks: u64::MAX,
        context_invalid: true,
        nmi_unblocking: false,
    };
    if let Object::Vcpu(vcpu) = &guest.vcpu {
        vcpu.lock().cpu_mut().event_window.stall = Some(stall);
    }
    assert_eq!(guest.run(), KVM_EXIT_NOTIFY);
    assert_eq!((guest.record().flags, guest.record().qualification), (KVM_NOTIFY_CONTEXT_INVALID, 1));
    for _ in 0..2 {
        assert_eq!(guest.try_call("KVM_RUN", 0), Err(Errno(libc::EIO)));
    }
    let mut events = guest.events();
    events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    events.triple_fault.pending = 1;
    guest.call("KVM_SET_VCPU_EVENTS", &mut events);
    assert_eq!(guest.run(), KVM_EXIT_SHUTDOWN);
}

/// Where nothing else ends the loop, it ends as on the kernel.
#[test]
fn without_the_exit_the_loop_is_an_internal_error() {
    let off = Loop::new(LOOP);
    enable(&off.vm, &request(RING3_CAP_NOTIFY, 0)).unwrap();
    let old = Loop::on(system("nehalem").create_vm().unwrap(), |_| {});
    for guest in [off, old] {
        for _ in 0..2 {
            assert_eq!(guest.run(), KVM_EXIT_INTERNAL_ERROR);
            let error = guest.area().get(field!(guest.area(), __bindgen_anon_1.internal));
            assert_eq!((error.suberror, error.ndata), (KVM_INTERNAL_ERROR_SIMUL_EX, 4));
            assert_eq!(error.data[..3], [VECTORING.into(), VECTORING.into(), 0]);
        }
        // An #AC whose delivery does not fault is the guest's business.
        let mut regs = guest.regs();
        regs.rsp -= 1;
        guest.call("KVM_SET_REGS", &mut regs);
        assert_eq!(guest.run(), KVM_EXIT_IO);
    }
}
