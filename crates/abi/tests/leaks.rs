//! Objects leave nothing behind: descriptors, mappings of what they share with the client, threads. The only test of its
//! file, since it counts what the process has.

use std::fs;

use abi::ioctl::{IOCTLS, ioctl};
use abi::{Argument, Created, Object, Reply};
use hypervisor::{HostParams, System};
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, kvm_enable_cap};
use silicon::model::CpuModel;

const VMS: usize = 64;
const ROUNDS: usize = 20;

fn call(object: &Object, name: &str, argument: u64) -> Reply {
    let row = IOCTLS.iter().find(|row| row.name == name).expect("a name of the table");
    ioctl(object, row.number(), Argument(argument)).expect("a call that works")
}

fn created(reply: Reply) -> Created {
    match reply {
        Reply::Created(created) => created,
        other => panic!("no object: {other:?}"),
    }
}

/// A VM with a dirty ring, interrupt controllers and two vCPUs.
fn one(system: &Created) -> Vec<Created> {
    let vm = created(call(&system.object, "KVM_CREATE_VM", 0));
    let cap = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING, args: [0x4000, 0, 0, 0], ..Default::default() };
    call(&vm.object, "KVM_ENABLE_CAP", (&raw const cap) as u64);
    call(&vm.object, "KVM_CREATE_IRQCHIP", 0);
    let [first, second] = [0, 1].map(|id| created(call(&vm.object, "KVM_CREATE_VCPU", id)));
    // The vCPU of the one lives longer than the VM's descriptor, as clients have it.
    vec![first, vm, second]
}

#[test]
fn objects_leave_nothing_behind() {
    let entries = |directory| fs::read_dir(directory).expect("proc(5)").count();
    let mappings = || fs::read_to_string("/proc/self/maps").expect("proc(5)").lines().count();
    let system = System::new(CpuModel::default(), HostParams::default());
    let system = Created::system(system).expect("a descriptor");
    let round = || drop((0..VMS).map(|_| one(&system)).collect::<Vec<_>>());
    round();
    let before = (entries("/proc/self/fd"), entries("/proc/self/task"));
    let mapped = mappings();
    (0..ROUNDS).for_each(|_| round());
    assert_eq!((entries("/proc/self/fd"), entries("/proc/self/task")), before);
    // The allocator may map a little more; each VM has a dozen mappings.
    assert!(mappings() < mapped + VMS, "{mapped} mappings, then {}", mappings());
}
