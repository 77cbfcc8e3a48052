use super::*;
use crate::host::HostParams;
use silicon::model::CpuModel;

fn vm() -> Arc<Vm> {
    System::new(CpuModel::default(), HostParams::default()).create_vm().unwrap()
}

#[test]
fn a_split_irqchip_is_made_before_vcpus() {
    let late = vm();
    late.create_vcpu(0).unwrap();
    assert_eq!(late.split_irqchip(24).map_err(|e| e.errno()), Err(libc::EEXIST));
    let vm = vm();
    assert_eq!(vm.split_irqchip(25).map_err(|e| e.errno()), Err(libc::EINVAL));
    vm.split_irqchip(24).unwrap();
    assert!(vm.irqchip().is_some_and(|chip| chip.is_split()));
    assert_eq!(vm.create_irqchip().map_err(|e| e.errno()), Err(libc::EEXIST));
    assert_eq!(vm.irqchip_state(0).map(|_| ()).map_err(|e| e.errno()), Err(libc::ENXIO));
    assert_eq!(vm.create_pit2(Default::default()).map_err(|e| e.errno()), Err(libc::ENOENT));
}

#[test]
fn another_vcpu_can_be_the_bootstrap_processor() {
    let vm = vm();
    vm.create_irqchip().unwrap();
    vm.set_boot_cpu_id(1).unwrap();
    let states = [0, 1].map(|id| vm.create_vcpu(id).unwrap().mp_state().mp_state);
    assert_eq!(states, [kvm_bindings::KVM_MP_STATE_UNINITIALIZED, kvm_bindings::KVM_MP_STATE_RUNNABLE]);
}

#[test]
fn as_many_vcpus_as_there_can_be() {
    let vm = vm();
    vm.create_irqchip().unwrap();
    let vcpus: Vec<_> = (0..VCPUS_MAX).map(|id| vm.create_vcpu(4 * id).unwrap()).collect();
    assert_eq!(vm.create_vcpu(1).map(|_| ()).map_err(|e| e.errno()), Err(libc::EINVAL));
    drop(vcpus);
}
