//! What a client of the KVM API may hand over: every structure with random contents. It is taken or refused, and
//! what is read back afterwards does not panic either.
#![expect(unsafe_code, reason = "fills C structures with random bytes")]

use std::sync::Arc;

use conformance::rng::Rng;
use hypervisor::{HostParams, System, Vcpu, Vm};
use kvm_bindings::*;
use silicon::model::CpuModel;

/// Structures for which every bit pattern is a value.
///
/// # Safety
/// The type has integer fields only.
unsafe trait Plain: Default {}

macro_rules! plain {
    ($($type:ty)*) => {
        // SAFETY: C structures of integers and unions of such.
        $(unsafe impl Plain for $type {})*
    };
}

plain!(kvm_regs kvm_sregs kvm_fpu kvm_debugregs kvm_mp_state kvm_msr_entry kvm_cpuid_entry2 kvm_irqchip
    kvm_pit_state2 kvm_pit_state kvm_msi kvm_irq_routing_entry kvm_userspace_memory_region kvm_ioeventfd);

/// A structure of random bytes, many of them zero.
fn random<T: Plain>(rng: &mut Rng) -> T {
    let mut value = T::default();
    // SAFETY: the bytes of a value that every bit pattern is valid for.
    let bytes = unsafe { std::slice::from_raw_parts_mut((&raw mut value).cast::<u8>(), size_of::<T>()) };
    rng.fill(bytes);
    let zeros = rng.below(100);
    for word in bytes.chunks_mut(4) {
        if rng.percent(zeros) {
            word.fill(0);
        }
    }
    value
}

fn machine(irqchip: bool) -> (Arc<Vm>, Vcpu) {
    let system = System::new(CpuModel::parse("max").unwrap(), HostParams::default());
    let vm = system.create_vm().unwrap();
    if irqchip {
        vm.create_irqchip().unwrap();
        vm.create_pit2(kvm_pit_config::default()).unwrap();
    }
    let vcpu = vm.create_vcpu(0).unwrap();
    (vm, vcpu)
}

fn set_everything(rng: &mut Rng, vcpu: &mut Vcpu) {
    vcpu.set_regs(&random(rng));
    let mut sregs: kvm_sregs = random(rng);
    if rng.percent(50) {
        sregs.apic_base = vcpu.sregs().apic_base;
    }
    if rng.percent(70) {
        // Not refused at once.
        (sregs.cr0, sregs.efer, sregs.cs.l) = (sregs.cr0 & 0x7fff_ffff, sregs.efer & !0x500, 0);
    }
    let _ = vcpu.set_sregs(&sregs);
    vcpu.set_fpu(&random(rng));
    let _ = vcpu.set_debugregs(&random(rng));
    let mut msrs: Vec<kvm_msr_entry> = (0..20).map(|_| random(rng)).collect();
    for msr in &mut msrs {
        msr.index >>= rng.below(32);
    }
    for msr in &msrs {
        vcpu.set_msrs(std::slice::from_ref(msr));
    }
    vcpu.get_msrs(&mut msrs);
    let mut cpuid = vcpu_cpuid(rng);
    if rng.percent(30) {
        cpuid = (0..rng.below(100)).map(|_| random(rng)).collect();
    }
    let _ = vcpu.set_cpuid2(&cpuid);
    let _ = vcpu.set_mp_state(kvm_mp_state { mp_state: rng.below(12) as u32 });
}

/// The supported CPUID with random entries in it.
fn vcpu_cpuid(rng: &mut Rng) -> Vec<kvm_cpuid_entry2> {
    let model = CpuModel::parse("max").unwrap();
    let mut entries = System::new(model, HostParams::default()).supported_cpuid();
    for entry in &mut entries {
        if rng.percent(10) {
            *entry = kvm_cpuid_entry2 { function: entry.function, index: entry.index, ..random(rng) };
        }
    }
    entries
}

#[test]
fn random_vcpu_state_is_taken_or_refused() {
    let rng = &mut Rng::new(21);
    for i in 0..60 {
        let (vm, mut vcpu) = machine(i % 2 == 0);
        for _ in 0..8 {
            set_everything(rng, &mut vcpu);
            let _ = (vcpu.regs(), vcpu.sregs(), vcpu.fpu(), vcpu.debugregs(), vcpu.mp_state());
            // No memory: whatever the state, the guest comes to nothing, but at once.
            let limit = vcpu.cpu_mut().instructions() + 100;
            vcpu.cpu_mut().controls.instruction_limit = limit;
            let _ = vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE });
            vm.vcpus()[0].interrupt();
            let _ = vcpu.run();
        }
    }
}

#[test]
fn random_interrupt_controller_state_is_taken_or_refused() {
    let rng = &mut Rng::new(22);
    let (vm, mut vcpu) = machine(true);
    let chip = vm.irqchip().unwrap().clone();
    let lapic = chip.lapic(0).unwrap();
    for _ in 0..400 {
        let mut page = kvm_lapic_state::default();
        page.regs.iter_mut().for_each(|byte| *byte = rng.next() as _);
        let _ = lapic.set_state(&page);
        let mut image: kvm_irqchip = random(rng);
        image.chip_id = rng.below(4) as u32;
        let _ = chip.set_chip_state(&image);
        let _ = chip.chip_state(rng.below(4) as u32);
        if let Some(pit) = chip.pit() {
            pit.set_state(&random(rng));
            pit.set_channels(&random(rng));
            let _ = (pit.state(), pit.channels());
        }
        for _ in 0..20 {
            let (address, mut data) = (rng.below(0x1000), rng.next().to_le_bytes());
            let size = rng.pick(&[1, 2, 4, 8]);
            chip.mmio_write(&lapic, rng.pick(&[0xfee0_0000, 0xfec0_0000]) + address, &data[..size]);
            chip.mmio_read(&lapic, rng.pick(&[0xfee0_0000, 0xfec0_0000]) + address, &mut data[..size]);
            chip.pio_write(
                rng.pick(&[0x20, 0x40, 0xa0, 0x4d0, 0x60]) + rng.below(4) as u16,
                rng.next() as u32,
                size,
            );
            chip.pio_read(rng.pick(&[0x20, 0x40, 0xa0, 0x4d0, 0x60]) + rng.below(4) as u16, size);
        }
        let _ = vm.irq_line(rng.next() as u32 >> rng.below(32), rng.percent(50));
        let _ = vm.signal_msi(&random(rng));
        let entries: Vec<kvm_irq_routing_entry> = (0..rng.below(6))
            .map(|_| {
                let mut entry: kvm_irq_routing_entry = random(rng);
                (entry.gsi, entry.type_) = (rng.below(30) as u32, rng.below(5) as u32);
                entry
            })
            .collect();
        let _ = vm.set_gsi_routing(&entries);
        vm.vcpus()[0].interrupt();
        let _ = vcpu.run();
        let _ = lapic.state();
    }
}

#[test]
fn random_memory_slots_and_ioeventfds_are_taken_or_refused() {
    let rng = &mut Rng::new(23);
    let (vm, _vcpu) = machine(true);
    for _ in 0..2000 {
        let mut region: kvm_userspace_memory_region = random(rng);
        if rng.percent(60) {
            region.slot &= 7;
            region.flags &= 3;
            region.guest_phys_addr &= !0xfff;
            region.memory_size = (region.memory_size >> rng.below(64)) & !0xfff;
            region.userspace_addr &= 0x7fff_ffff_f000;
        }
        let _ = vm.set_user_memory_region(region);
        let mut request: kvm_ioeventfd = random(rng);
        request.fd = -1;
        let _ = vm.ioeventfd(&request);
        let _ = vm.memory().ept().find(rng.next());
    }
}
