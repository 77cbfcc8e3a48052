//! Split locks and bus locks as clients see them in `kvm_run`.
#![expect(unsafe_code, reason = "addresses of fields of kvm_run, and memory of a guest")]

use std::sync::Arc;

use hypervisor::{HostParams, System, Vm};
use kvm_bindings::*;
use silicon::model::CpuModel;

use crate::capability;
use crate::ioctl::{IOCTLS, ioctl};
use crate::ring3::{RING3_CAP_SPLIT_LOCK_POLICY, RING3_EXIT_SPLIT_LOCK, SplitLockRecord};
use crate::run::{RunArea, field};
use crate::{Argument, Created, Errno, Object, Reply};

#[repr(C, align(4096))]
struct Memory([u8; 0x4000]);

/// A client of a vCPU in real mode: it runs `lock inc word [0x203f]; in al, 0x10; hlt` from 0x1000 on.
struct Client {
    vcpu: Object,
    vm: Arc<Vm>,
    memory: Box<Memory>,
}

const PROGRAM: &[u8] = &[0xf0, 0xff, 0x06, 0x3f, 0x20, 0xe4, 0x10, 0xf4];

impl Client {
    fn new(host: &str) -> Client {
        let host = HostParams::parse(host).unwrap();
        let vm = System::new(CpuModel::default(), host).create_vm().unwrap();
        let mut memory = Box::new(Memory([0; 0x4000]));
        memory.0[0x1000..0x1000 + PROGRAM.len()].copy_from_slice(PROGRAM);
        vm.set_user_memory_region(kvm_userspace_memory_region {
            memory_size: 0x4000,
            userspace_addr: memory.0.as_mut_ptr() as u64,
            ..Default::default()
        })
        .unwrap();
        let Created { object: vcpu, .. } = Created::vcpu(vm.create_vcpu(0).unwrap()).unwrap();
        let client = Client { vcpu, vm, memory };
        let mut sregs = kvm_sregs::default();
        client.call("KVM_GET_SREGS", &mut sregs);
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        client.call("KVM_SET_SREGS", &mut sregs);
        client.call("KVM_SET_REGS", &mut kvm_regs { rip: 0x1000, rflags: 2, ..Default::default() });
        client
    }

    fn call<T>(&self, name: &str, argument: &mut T) {
        self.ioctl(name, std::ptr::from_mut(argument) as u64).unwrap();
    }

    fn ioctl(&self, name: &str, argument: u64) -> Result<Reply, Errno> {
        let row = IOCTLS.iter().find(|row| row.name == name && row.handler.takes(&self.vcpu)).unwrap();
        ioctl(&self.vcpu, row.number(), Argument(argument))
    }

    fn run(&self) -> Result<Reply, Errno> {
        self.ioctl("KVM_RUN", 0)
    }

    fn enable(&self, cap: u32, argument: u64) {
        let request = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() };
        capability::enable(&self.vm, &request).unwrap();
    }

    fn area(&self) -> &RunArea {
        match &self.vcpu {
            Object::Vcpu(vcpu) => &vcpu.run,
            _ => unreachable!(),
        }
    }

    fn exit(&self) -> (u32, u16) {
        let area = self.area();
        (area.get(field!(area, exit_reason)), area.get(field!(area, flags)))
    }

    fn split_word(&self) -> u8 {
        // SAFETY: memory of ours, which no vCPU runs on now.
        unsafe { (&raw const self.memory.0[0x203f]).read_volatile() }
    }
}

const FATAL: &str = "split_lock_detect=fatal";

#[test]
fn sl_k1_efault() {
    let client = Client::new(FATAL);
    for _ in 0..2 {
        assert_eq!(client.run().map(|_| ()), Err(Errno::FAULT));
        assert_eq!(client.split_word(), 0);
    }
}

#[test]
fn sl_k2_kill_is_sigbus_and_an_exception_exit() {
    let client = Client::new(FATAL);
    client.enable(RING3_CAP_SPLIT_LOCK_POLICY, 4);
    assert!(matches!(client.run(), Ok(Reply::AlignmentError)));
    let area = client.area();
    let [vector, error] =
        [field!(area, __bindgen_anon_1.ex.exception), field!(area, __bindgen_anon_1.ex.error_code)]
            .map(|field| area.get(field));
    assert_eq!((client.exit(), vector, error), ((KVM_EXIT_EXCEPTION, 0), 17, 0));
    assert_eq!(client.split_word(), 0);
}

#[test]
fn sl_k_the_exit_of_its_own_says_what_was_refused() {
    let client = Client::new(FATAL);
    client.enable(RING3_CAP_SPLIT_LOCK_POLICY, 2);
    assert!(matches!(client.run(), Ok(Reply::Value(0))));
    assert_eq!(client.exit(), (RING3_EXIT_SPLIT_LOCK, 0));
    let area = client.area();
    let record: SplitLockRecord = area.get(field!(area, __bindgen_anon_1).cast());
    let mut instruction = [0; 15];
    instruction[..5].copy_from_slice(&PROGRAM[..5]);
    let expected = SplitLockRecord {
        rip: 0x1000,
        linear_address: 0x203f,
        gpa: 0x203f,
        size: 2,
        instruction_length: 5,
        instruction,
        ..SplitLockRecord::default()
    };
    assert_eq!(record, expected);
    client.enable(RING3_CAP_SPLIT_LOCK_POLICY, 16);
    assert!(matches!(client.run(), Ok(Reply::Value(0))));
    assert_eq!((client.exit().0, client.split_word()), (KVM_EXIT_IO, 1));
}

/// B12: a bus lock beside another exit of the same KVM_RUN shows in `kvm_run.flags`.
#[test]
fn sl_b12_a_bus_lock_beside_another_exit() {
    let client = Client::new("split_lock_detect=off");
    client.enable(KVM_CAP_X86_BUS_LOCK_EXIT, 2);
    let control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
    client.call("KVM_SET_GUEST_DEBUG", &mut kvm_guest_debug { control, ..Default::default() });
    client.run().unwrap();
    assert_eq!(client.exit(), (KVM_EXIT_DEBUG, KVM_RUN_X86_BUS_LOCK as u16));
    assert_eq!(client.split_word(), 1);
    client.run().unwrap();
    assert_eq!(client.exit(), (KVM_EXIT_IO, 0), "the next KVM_RUN has none");
}

#[test]
fn bus_locks_exit_when_they_are_enabled() {
    let client = Client::new("split_lock_detect=off");
    client.enable(KVM_CAP_X86_BUS_LOCK_EXIT, 2);
    client.run().unwrap();
    assert_eq!(client.exit(), (KVM_EXIT_X86_BUS_LOCK, KVM_RUN_X86_BUS_LOCK as u16));
    client.run().unwrap();
    assert_eq!(client.exit(), (KVM_EXIT_IO, 0));
    let client = Client::new("split_lock_detect=off");
    client.run().unwrap();
    assert_eq!(client.exit(), (KVM_EXIT_IO, 0), "nobody has asked");
}
