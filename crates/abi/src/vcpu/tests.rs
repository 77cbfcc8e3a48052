//! The calls as a client makes them, with its structures in memory.
#![expect(unsafe_code, reason = "addresses of fields of kvm_run")]

use hypervisor::{HostParams, System};
use kvm_bindings::*;

use crate::ioctl::{IOCTLS, ioctl};
use crate::run::{RunArea, field};
use crate::{Argument, Created, Errno, Object, Reply};

struct Client {
    vcpu: Object,
    vm: std::sync::Arc<hypervisor::Vm>,
}

impl Client {
    /// A vCPU without in-kernel interrupt controllers.
    fn new() -> Client {
        let system = System::new(silicon::model::CpuModel::default(), HostParams::default());
        let vm = system.create_vm().unwrap();
        let Created { object: vcpu, .. } = Created::vcpu(vm.create_vcpu(0).unwrap()).unwrap();
        Client { vcpu, vm }
    }

    fn value(&self, name: &str, argument: u64) -> Result<i32, Errno> {
        let row = IOCTLS.iter().find(|row| row.name == name && row.handler.takes(&self.vcpu)).unwrap();
        match ioctl(&self.vcpu, row.number(), Argument(argument))? {
            Reply::Value(value) => Ok(value),
            _ => Ok(0),
        }
    }

    fn call<T: ?Sized>(&self, name: &str, argument: &mut T) -> Result<i32, Errno> {
        self.value(name, std::ptr::from_mut(argument).cast::<u8>() as u64)
    }

    fn area(&self) -> &RunArea {
        match &self.vcpu {
            Object::Vcpu(vcpu) => &vcpu.run,
            _ => unreachable!(),
        }
    }

    fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<i32, Errno> {
        let mut table = vec![0u32; 2 + 10 * entries.len()];
        table[0] = entries.len() as u32;
        for (place, e) in table[2..].chunks_exact_mut(10).zip(entries) {
            place.copy_from_slice(&[e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx, 0, 0, 0]);
        }
        self.call("KVM_SET_CPUID2", table.as_mut_slice())
    }
}

#[test]
fn cpuid_tables_tell_how_much_room_they_need() {
    let client = Client::new();
    let supported = client.vm.system().supported_cpuid();
    assert_eq!(client.set_cpuid(&supported), Ok(0));
    let mut table = vec![0u32; 2 + 10 * 256];
    table[0] = supported.len() as u32 - 1;
    assert_eq!(client.call("KVM_GET_CPUID2", table.as_mut_slice()), Err(Errno::TOO_BIG));
    table[0] = 256;
    assert_eq!(client.call("KVM_GET_CPUID2", table.as_mut_slice()), Ok(0));
    assert_eq!((table[0] as usize, table[2]), (supported.len(), supported[0].function));
    table[0] = 257;
    assert_eq!(client.call("KVM_SET_CPUID2", table.as_mut_slice()), Err(Errno::TOO_BIG));
    // The old form has no subleaves.
    let mut old = [1, 0, 0, 7, 8, 9, 10, 0u32];
    assert_eq!(client.call("KVM_SET_CPUID", &mut old), Ok(0));
    table[0] = 256;
    assert_eq!(client.call("KVM_GET_CPUID2", table.as_mut_slice()), Ok(0));
    assert_eq!((table[0], table[5]), (1, 7));
}

#[test]
fn extended_state_goes_in_and_out() {
    let client = Client::new();
    let size = client.vm.system().xsave_size();
    assert_eq!(client.set_cpuid(&client.vm.system().supported_cpuid()), Ok(0));
    let mut area = vec![0xffu8; size + 8];
    assert_eq!(client.call("KVM_GET_XSAVE2", area.as_mut_slice()), Ok(0));
    assert!(area[size..].iter().all(|&byte| byte == 0xff), "no more than its size");
    let first = client.call("KVM_GET_XSAVE", area.as_mut_slice());
    assert_eq!(first, if size > 4096 { Err(Errno::INVALID) } else { Ok(0) });
    area[..size].fill(0);
    assert_eq!(client.call("KVM_SET_XSAVE", area.as_mut_slice()), Ok(0));
    area[519] = 0x80;
    assert_eq!(client.call("KVM_SET_XSAVE", area.as_mut_slice()), Err(Errno::INVALID));
    let mut xcrs = kvm_xcrs::default();
    assert_eq!(client.call("KVM_GET_XCRS", &mut xcrs), Ok(0));
    assert_eq!((xcrs.nr_xcrs, client.call("KVM_SET_XCRS", &mut xcrs)), (1, Ok(0)));
}

#[test]
fn every_structure_that_can_be_read_can_be_written() {
    let client = Client::new();
    for (get, set) in [
        ("KVM_GET_REGS", "KVM_SET_REGS"),
        ("KVM_GET_SREGS", "KVM_SET_SREGS"),
        ("KVM_GET_SREGS2", "KVM_SET_SREGS2"),
        ("KVM_GET_FPU", "KVM_SET_FPU"),
        ("KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS"),
        ("KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS"),
        ("KVM_GET_MP_STATE", "KVM_SET_MP_STATE"),
    ] {
        let (mut before, mut after) = ([0u64; 64], [0u64; 64]);
        assert_eq!(client.call(get, &mut before), Ok(0), "{get}");
        assert_eq!(client.call(set, &mut before), Ok(0), "{set}");
        assert_eq!(client.call(get, &mut after), Ok(0), "{get}");
        assert_eq!(before, after, "{get}");
        assert_eq!(client.value(get, 8), Err(Errno::FAULT), "{get}");
        assert_eq!(client.value(set, 8), Err(Errno::FAULT), "{set}");
    }
}

#[test]
fn without_a_local_apic_its_calls_are_einval_whatever_the_pointer() {
    let client = Client::new();
    for name in ["KVM_GET_LAPIC", "KVM_SET_LAPIC", "KVM_SET_VAPIC_ADDR"] {
        assert_eq!(client.value(name, 8), Err(Errno::INVALID), "{name}");
    }
    assert_eq!(client.value("KVM_KVMCLOCK_CTRL", 0), Err(Errno::INVALID), "no clock page");
}

#[test]
fn attributes_and_capabilities_of_a_vcpu() {
    let client = Client::new();
    let mut value = 0u64;
    let mut attribute = kvm_device_attr { addr: std::ptr::from_mut(&mut value) as u64, ..Default::default() };
    for name in ["KVM_HAS_DEVICE_ATTR", "KVM_GET_DEVICE_ATTR", "KVM_SET_DEVICE_ATTR"] {
        assert_eq!(client.call(name, &mut attribute), Ok(0), "{name}");
    }
    assert_ne!(value, 0);
    attribute.addr = 8;
    assert_eq!(client.call("KVM_GET_DEVICE_ATTR", &mut attribute), Err(Errno::FAULT));
    attribute.group = 9;
    assert_eq!(client.call("KVM_GET_DEVICE_ATTR", &mut attribute), Err(Errno::NXIO));
    for (cap, flags, result) in [
        (KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 0, Ok(0)),
        (KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1, Err(Errno::INVALID)),
        (KVM_CAP_SPLIT_IRQCHIP, 0, Err(Errno::INVALID)),
    ] {
        let mut request = kvm_enable_cap { cap, flags, args: [1, 0, 0, 0], ..Default::default() };
        assert_eq!(client.call("KVM_ENABLE_CAP", &mut request), result, "{cap} {flags}");
    }
}

#[test]
fn kvm_run_carries_registers_to_and_fro() {
    let client = Client::new();
    let area = client.area();
    area.set(field!(area, immediate_exit), 1);
    for wrong in [KVM_SYNC_X86_VALID_FIELDS << 1, 1 << 31] {
        area.set(field!(area, kvm_valid_regs), wrong.into());
        assert_eq!(client.value("KVM_RUN", 0), Err(Errno::INVALID));
        area.set(field!(area, kvm_valid_regs), 0);
        area.set(field!(area, kvm_dirty_regs), wrong.into());
        assert_eq!(client.value("KVM_RUN", 0), Err(Errno::INVALID));
        area.set(field!(area, kvm_dirty_regs), 0);
    }
    area.set(field!(area, kvm_valid_regs), KVM_SYNC_X86_VALID_FIELDS.into());
    assert_eq!(client.value("KVM_RUN", 0), Err(Errno::INTERRUPTED));
    let mut regs = area.get(field!(area, s.regs.regs));
    assert_eq!(regs.rip, 0xfff0);
    regs.rbx = 0x1234;
    area.set(field!(area, s.regs.regs), regs);
    let mut sregs = area.get(field!(area, s.regs.sregs));
    sregs.cr2 = 0x5678;
    area.set(field!(area, s.regs.sregs), sregs);
    let fields = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
    area.set(field!(area, kvm_dirty_regs), fields.into());
    assert_eq!(client.value("KVM_RUN", 0), Err(Errno::INTERRUPTED));
    assert_eq!(area.get(field!(area, kvm_dirty_regs)), 0);
    let mut seen = kvm_regs::default();
    assert_eq!(client.call("KVM_GET_REGS", &mut seen), Ok(0));
    let mut system = kvm_sregs::default();
    assert_eq!(client.call("KVM_GET_SREGS", &mut system), Ok(0));
    assert_eq!((seen.rbx, system.cr2), (0x1234, 0x5678));
    // What no processor can be in ends the call, and nothing runs.
    sregs.cr0 |= 1 << 63;
    area.set(field!(area, s.regs.sregs), sregs);
    area.set(field!(area, kvm_dirty_regs), KVM_SYNC_X86_SREGS.into());
    assert_eq!(client.value("KVM_RUN", 0), Err(Errno::INVALID));
}

#[test]
fn a_wrong_cr8_is_refused_where_the_client_has_the_local_apic() {
    let client = Client::new();
    let area = client.area();
    area.set(field!(area, immediate_exit), 1);
    area.set(field!(area, cr8), 16);
    assert_eq!(client.value("KVM_RUN", 0), Err(Errno::INVALID));
    area.set(field!(area, cr8), 7);
    assert_eq!(client.value("KVM_RUN", 0), Err(Errno::INTERRUPTED));
    let mut sregs = kvm_sregs::default();
    assert_eq!(client.call("KVM_GET_SREGS", &mut sregs), Ok(0));
    assert_eq!(sregs.cr8, 7);
}

#[test]
fn kvm_run_says_that_the_vcpu_is_in_smm() {
    let client = Client::new();
    let area = client.area();
    for (smm, flags) in [(1, KVM_RUN_X86_SMM), (0, 0)] {
        let mut events = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SMM, ..Default::default() };
        events.smi.smm = smm;
        assert_eq!(client.call("KVM_SET_VCPU_EVENTS", &mut events), Ok(0));
        area.set(field!(area, immediate_exit), 1);
        assert_eq!(client.value("KVM_RUN", 0), Err(Errno::INTERRUPTED));
        assert_eq!(u32::from(area.get(field!(area, flags))), flags);
    }
}

#[test]
fn an_smi_without_smram_is_the_end_of_the_vm() {
    let client = Client::new();
    assert_eq!(client.value("KVM_SMI", 0), Ok(0));
    assert_eq!(client.value("KVM_RUN", 0), Err(Errno::IO));
    assert_eq!(client.call("KVM_GET_REGS", &mut kvm_regs::default()), Err(Errno::IO));
    let vm = Object::Vm(client.vm.clone());
    assert!(matches!(ioctl(&vm, 0xae03, Argument(0)), Err(Errno::IO)));
    assert!(matches!(ioctl(&vm, 0xffff, Argument(0)), Err(Errno::IO)));
}
