//! VMs leave nothing behind. The only test of its file, since it counts what the process has.

mod guest;

use std::any::Any;
use std::fs;
use std::os::fd::AsRawFd;

use guest::{Guest, run_to_hlt, system};
use hypervisor::VcpuExit;
use kvm_bindings::{KVM_IRQFD_FLAG_RESAMPLE, kvm_irqfd, kvm_pit_config};
use vmm_sys_util::eventfd::EventFd;

/// out 0x10, al; jmp back
const PROGRAM: &[u8] = &[0xe6, 0x10, 0xeb, 0xfc];
/// hlt
const HALT: &[u8] = &[0xf4];
const VMS: usize = 64;
const ROUNDS: usize = 100;
const WARM_UP: usize = 10;

fn entries(directory: &str) -> usize {
    fs::read_dir(directory).unwrap().count()
}

/// Resident and mapped pages.
fn pages() -> (u64, usize) {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    let resident = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    (resident, fs::read_to_string("/proc/self/maps").unwrap().lines().count())
}

/// One VM with all that brings threads, descriptors and memory, run for a moment.
fn one(number: usize) -> Box<dyn Any> {
    let vm = system().create_vm().unwrap();
    if number.is_multiple_of(2) {
        let guest = Guest::new(vm, HALT, 0);
        let mut vcpu = guest.vcpu(0);
        run_to_hlt(&mut vcpu);
        return Box::new((vcpu, guest));
    }
    vm.create_irqchip().unwrap();
    vm.create_pit2(kvm_pit_config::default()).unwrap();
    let [event, resample] = [(); 2].map(|()| EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let irqfd = kvm_irqfd {
        fd: event.as_raw_fd() as u32,
        gsi: 5,
        flags: KVM_IRQFD_FLAG_RESAMPLE,
        resamplefd: resample.as_raw_fd() as u32,
        ..Default::default()
    };
    vm.irqfd(&irqfd).unwrap();
    event.write(1).unwrap();
    let stats = vm.stats_descriptor().unwrap();
    let guest = Guest::new(vm, PROGRAM, 0);
    let mut vcpus = [0, 1].map(|id| guest.vcpu(id));
    let vcpu_stats = vcpus[0].handle().stats_descriptor().unwrap();
    for _ in 0..3 {
        assert!(matches!(vcpus[0].run().unwrap(), VcpuExit::Io { port: 0x10, .. }));
    }
    Box::new((vcpus, guest, stats, vcpu_stats, event, resample))
}

#[test]
fn vms_leave_no_descriptor_thread_or_memory_behind() {
    let state = || (entries("/proc/self/fd"), entries("/proc/self/task"));
    // What is made once per process is made now, and the allocator finds out how much there is to keep.
    for _ in 0..WARM_UP {
        drop((0..VMS).map(one).collect::<Vec<_>>());
    }
    let (before, (resident, maps)) = (state(), pages());
    for _ in 0..ROUNDS {
        drop((0..VMS).map(one).collect::<Vec<_>>());
    }
    assert_eq!(state(), before);
    let (resident_after, maps_after) = pages();
    // The allocator may keep a little; a leak of one page per VM would be 6400.
    assert!(resident_after < resident + 1000, "{resident} pages, then {resident_after}");
    assert!(maps_after < maps + 20, "{maps} mappings, then {maps_after}");
}
