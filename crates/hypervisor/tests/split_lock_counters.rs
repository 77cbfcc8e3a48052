//! Split locks in the counters that a client reads from the descriptor of KVM_GET_STATS_FD.

mod guest;

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use guest::Guest;
use hypervisor::split_lock::{Policy, VmPolicy};
use hypervisor::{HostParams, System, VcpuExit};
use silicon::model::CpuModel;

/// `lock inc word [0x203f]`, three times, and HLT.
const PROGRAM: [u8; 16] =
    [0xf0, 0xff, 0x06, 0x3f, 0x20, 0xf0, 0xff, 0x06, 0x3f, 0x20, 0xf0, 0xff, 0x06, 0x3f, 0x20, 0xf4];

/// The counter `name`, found as a client finds it (kernel: Documentation/virt/kvm/api.rst 4.133).
fn counter(stats: OwnedFd, name: &str) -> Option<u64> {
    let mut bytes = Vec::new();
    File::from(stats).read_to_end(&mut bytes).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let (name_size, count, descriptions, data) = (word(4), word(8), word(16), word(20));
    (0..count).find_map(|index| {
        let at = descriptions + index * (16 + name_size);
        let text = &bytes[at + 16..at + 16 + name_size];
        let found = text.split(|&byte| byte == 0).next() == Some(name.as_bytes());
        let value = data + word(at + 8);
        found.then(|| u64::from_le_bytes(bytes[value..value + 8].try_into().unwrap()))
    })
}

#[test]
fn sl_counters_are_read_through_their_descriptor() {
    for (host, policy, name, count) in [
        ("warn kernel.split_lock_mitigate=0", Policy::Efault, "split_locks_warned", 1),
        ("fatal", Policy::Emulate, "split_locks_emulated", 3),
        ("fatal", Policy::Efault, "split_locks_efault", 1),
        ("fatal", Policy::Exit, "split_locks_exit", 1),
        ("fatal", Policy::Kill, "split_locks_killed", 1),
    ] {
        let host = HostParams::parse(&format!("split_lock_detect={host}")).unwrap();
        let vm = System::new(CpuModel::parse("max").unwrap(), host).create_vm().unwrap();
        vm.set_split_lock_policy(VmPolicy { policy, enforced: false }.bits().into()).unwrap();
        let guest = Guest::new(vm, &PROGRAM, 0);
        let mut vcpu = guest.vcpu(0);
        let ended = vcpu.run();
        assert_eq!(
            matches!(ended, Ok(VcpuExit::Hlt)),
            count == 3 || name == "split_locks_warned",
            "{ended:?}"
        );
        let read = |name| counter(vcpu.handle().stats_descriptor().unwrap(), name);
        assert_eq!(read(name), Some(count), "{name}");
        assert_eq!(read("bus_locks"), Some(if matches!(ended, Ok(VcpuExit::Hlt)) { 3 } else { 0 }), "{name}");
        assert_eq!(read("no_such"), None);
    }
}
