use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_msr_entry, kvm_userspace_memory_region};
use silicon::buffers::Buffer;
use silicon::buffers::mcu_opt_ctrl::FB_CLEAR_DIS;
use silicon::model::CpuModel;
use silicon::model::msrs::{ARCH_CAPABILITIES, MCU_OPT_CTRL};
use silicon::model::speculation::arch_cap::*;

use super::super::testing::Program;
use super::*;
use crate::host::HostParams;
use crate::mitigations::command_line::L1dFlush;
use crate::mitigations::selected::Flush;
use crate::system::System;
use crate::vcpu::VcpuExit;

/// A host with the bugs of a part.
fn host(line: &str) -> Arc<System> {
    System::new(CpuModel::default(), HostParams::parse(line).unwrap())
}

/// A program of a guest of that host, whose VM has the host's thread 0 like the one before it.
fn program(host: &Arc<System>, code: &[u8]) -> Program {
    while host.processors().number_vm() % 16 != 15 {}
    let mut program = Program::on(host.create_vm().unwrap(), code);
    let table = host.supported_cpuid();
    program.vcpu.set_cpuid2(&table).unwrap();
    program
}

fn set(program: &mut Program, value: u64) -> usize {
    program.vcpu.set_msrs(&[kvm_msr_entry { index: ARCH_CAPABILITIES, data: value, ..Default::default() }])
}

fn get(program: &mut Program) -> u64 {
    let mut entry = [kvm_msr_entry { index: ARCH_CAPABILITIES, ..Default::default() }];
    assert_eq!(program.vcpu.get_msrs(&mut entry), 1);
    entry[0].data
}

/// `mov ecx, count; l: push cx; cpuid; pop cx; loop l; hlt` in 16-bit code with a 32-bit counter.
fn cpuid_loop(count: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xbe];
    code.extend(count.to_le_bytes());
    // l: xor eax, eax; cpuid; dec esi; jnz l; hlt
    code.extend([0x66, 0x31, 0xc0, 0x0f, 0xa2, 0x66, 0x4e, 0x75, 0xf7, 0xf4]);
    code
}

/// V3, B3: the parameter changes between two vCPUs of a VM; they are told the same.
#[test]
fn ac_v3_all_vcpus_of_a_vm_agree() {
    let host = host("ring3.part=skylake-sp");
    let vm = host.create_vm().unwrap();
    let told = |id| {
        let mut vcpu = vm.create_vcpu(id).unwrap();
        let mut entry = [kvm_msr_entry { index: ARCH_CAPABILITIES, ..Default::default() }];
        assert_eq!(vcpu.get_msrs(&mut entry), 1);
        entry[0].data
    };
    let first = told(0);
    host.set_vmentry_l1d_flush(L1dFlush::Never).unwrap();
    assert_eq!(told(1), first);
    assert!(first & SKIP_L1DFL_VMENTRY != 0);
    let mut entry = [kvm_msr_entry { index: ARCH_CAPABILITIES, ..Default::default() }];
    assert_eq!(host.get_msrs(&mut entry), 1);
    assert_eq!(entry[0].data, first & !SKIP_L1DFL_VMENTRY, "new VMs are told something else");
}

/// V4, B4: who has been told that it need not flush is flushed for as long as it lives.
#[test]
fn ac_v4_a_guest_that_skips_flushes_keeps_being_flushed() {
    let host = host("ring3.part=skylake-sp kvm_intel.vmentry_l1d_flush=always");
    let code = cpuid_loop(10);
    let mut told = program(&host, &code);
    host.set_vmentry_l1d_flush(L1dFlush::Never).unwrap();
    let mut plain = program(&host, &code);
    assert_eq!(get(&mut told) & !get(&mut plain), SKIP_L1DFL_VMENTRY);
    assert_eq!(told.vcpu.run().unwrap(), VcpuExit::Hlt);
    assert_eq!(plain.vcpu.run().unwrap(), VcpuExit::Hlt);
    assert_eq!(told.vcpu.buffer_costs().l1d_flushes, 11);
    let costs = plain.vcpu.buffer_costs();
    assert_eq!((costs.l1d_flushes, costs.stale_entries), (0, 11), "the host has not flushed, and it shows");
    let value = get(&mut plain) | SKIP_L1DFL_VMENTRY;
    assert_eq!(set(&mut plain, value), 0, "too late: it has run");
    let mut late = program(&host, &code);
    assert_eq!(set(&mut late, value), 1);
    assert_eq!(late.vcpu.run().unwrap(), VcpuExit::Hlt);
    assert_eq!(late.vcpu.buffer_costs().l1d_flushes, 1, "conditionally, since its client told it so");
}

/// The policy that refuses, with real VMs: the parameter is free again when they are gone.
#[test]
fn ac_b4_the_parameter_waits_for_the_last_vm() {
    let host = host("ring3.part=skylake-sp ring3.l1d_flush_promise=refuse");
    let vm = host.create_vm().unwrap();
    assert_eq!(host.set_vmentry_l1d_flush(L1dFlush::Never).unwrap_err().errno(), libc::EBUSY);
    drop(vm);
    host.set_vmentry_l1d_flush(L1dFlush::Never).unwrap();
    let mut unaware = program(&host, &[0xf4]);
    assert_eq!(unaware.vcpu.vm.flush(), Flush::Never);
    let lie = get(&mut unaware) | SKIP_L1DFL_VMENTRY;
    assert_eq!(set(&mut unaware, lie), 0);
}

/// V6: the register is written once for a million exits of a guest that runs alone, and once more when it returns to user space.
#[test]
fn ac_v6_a_million_exits_of_a_lone_guest() {
    let host = host("ring3.part=ice-lake-sp");
    let mut guest = program(&host, &cpuid_loop(1_000_000));
    assert_eq!(set(&mut guest, RDCL_NO | MDS_NO | TAA_NO), 1);
    assert_eq!(guest.vcpu.run().unwrap(), VcpuExit::Hlt);
    let costs = guest.vcpu.buffer_costs();
    assert!(costs.entries > 1_000_000);
    assert_eq!((costs.msr_reads, costs.msr_writes), (0, 2));
}

/// F4b: after KVM_RUN the thread's VERW does what the host's does.
#[test]
fn ac_f4b_user_space_gets_the_hosts_value_back() {
    let host = host("ring3.part=ice-lake-sp");
    let mut guest = program(&host, &cpuid_loop(3));
    assert_eq!(set(&mut guest, RDCL_NO | MDS_NO | TAA_NO), 1);
    assert_eq!(guest.vcpu.run().unwrap(), VcpuExit::Hlt);
    let thread = host.processors().thread(guest.vcpu.locks.thread()).unwrap();
    assert_eq!(thread.read_msr(MCU_OPT_CTRL), Ok(0));
    assert!(thread.verw_clears().has(Buffer::Fill));
}

/// V7, F2: a page of the host's devices in a slot has buffers cleared before entries; MMIO that the client emulates does not.
#[test]
fn ac_v7_host_mmio_in_a_slot_and_emulated_mmio() {
    let host = host("ring3.part=ice-lake-sp");
    // mov ax, [0xfe00] with DS.base = 0x10000: outside of memory; cpuid; hlt
    let code = [0xa1, 0x00, 0xfe, 0x31, 0xc0, 0x0f, 0xa2, 0xf4];
    for mapped in [false, true] {
        let mut guest = program(&host, &code);
        let vm = guest.vcpu.vm.clone();
        let mut sregs = guest.vcpu.sregs();
        sregs.ds.base = 0x1_0000;
        guest.vcpu.set_sregs(&sregs).unwrap();
        let mut slot = kvm_userspace_memory_region {
            slot: 1,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: 0x10_0000,
            memory_size: 4096,
            userspace_addr: crate::memory::kernel_page(),
        };
        if mapped {
            vm.set_user_memory_region(slot).unwrap();
        }
        assert!(matches!(guest.vcpu.run().unwrap(), VcpuExit::Mmio { gpa: 0x1_fe00, .. }));
        guest.vcpu.complete(0);
        assert_eq!(guest.vcpu.run().unwrap(), VcpuExit::Hlt);
        let costs = guest.vcpu.buffer_costs();
        assert_eq!(costs.buffer_clears, if mapped { costs.entries } else { 0 }, "{mapped}");
        assert_eq!(costs.stale_entries, 0);
        if mapped {
            slot.memory_size = 0;
            vm.set_user_memory_region(slot).unwrap();
            assert!(!vm.memory().maps_host_mmio());
        }
    }
}

/// Data of the VM before on the thread, on a host that is told to clear nothing.
#[test]
fn ac_data_of_one_vm_is_found_on_entry_to_another() {
    for (line, stale) in [("", false), ("mitigations=off", true)] {
        let host = host(&format!("ring3.part=skylake-sp l1tf=full {line}"));
        let mut costs = Costs::default();
        for _ in 0..2 {
            let mut guest = program(&host, &cpuid_loop(5));
            assert_eq!(guest.vcpu.run().unwrap(), VcpuExit::Hlt);
            costs = guest.vcpu.buffer_costs();
        }
        assert_eq!(costs.stale_entries != 0, stale, "{line}");
        assert_eq!(costs.branch_barriers, u64::from(!stale), "{line}");
    }
}

/// A guest that has been told of MDS and of VERW: its VERW clears, whatever the thread was set to for others; not so upstream.
#[test]
fn ac_h4_verw_does_what_the_guest_was_told() {
    // verw [0x600]; cpuid; hlt, in protected mode. Real mode has no VERW.
    for (policy, vain) in [("cached", 0), ("upstream", 1)] {
        let host = host(&format!("ring3.part=ice-lake-sp ring3.fb_clear_dis={policy}"));
        let mut guest = program(&host, &[0x0f, 0x00, 0x2e, 0x00, 0x06, 0xf4]);
        assert_eq!(set(&mut guest, RDCL_NO), 1);
        guest.vcpu.update_verw();
        let mut sregs = guest.vcpu.sregs();
        sregs.cr0 |= 1;
        guest.vcpu.set_sregs(&sregs).unwrap();
        assert_eq!(guest.vcpu.run().unwrap(), VcpuExit::Hlt);
        assert_eq!(guest.vcpu.cpu.counters.fb_clears, 1, "{policy}");
        assert_eq!(guest.vcpu.buffer_costs().vain_clears, vain, "{policy}");
    }
}

/// M5, F7: the register is each vCPU's own, and INIT, saving and restoring leave it as it is.
#[test]
fn ac_m5_fb_clear_dis_is_each_vcpus_own() {
    let vm = host("").create_vm().unwrap();
    vm.create_irqchip().unwrap();
    // mov ecx, 0x123; mov eax, esi; xor edx, edx; wrmsr; verw [0x600]; out 0x10, al
    let code = [
        0x66, 0xb9, 0x23, 1, 0, 0, 0x66, 0x89, 0xf0, 0x66, 0x31, 0xd2, 0x0f, 0x30, 0x0f, 0x00, 0x2e, 0x00,
        0x06, 0xe6, 0x10,
    ];
    let mut program = Program::on(vm.clone(), &code);
    let mut other = vm.create_vcpu(1).unwrap();
    other.set_mp_state(kvm_bindings::kvm_mp_state { mp_state: 0 }).unwrap();
    let (mut sregs, regs) = (program.vcpu.sregs(), program.vcpu.regs());
    sregs.cr0 |= 1;
    let entry = |index, data| [kvm_msr_entry { index, data, ..Default::default() }];
    let written = |vcpu: &mut crate::Vcpu| {
        let mut entries = entry(MCU_OPT_CTRL, 0);
        assert_eq!(vcpu.get_msrs(&mut entries), 1);
        entries[0].data
    };
    let table = vm.system().supported_cpuid();
    for (vcpu, disable) in [(&mut program.vcpu, FB_CLEAR_DIS), (&mut other, 0)] {
        vcpu.set_cpuid2(&table).unwrap();
        let told = MDS_NO | FB_CLEAR | FB_CLEAR_CTRL;
        assert_eq!(vcpu.set_msrs(&entry(ARCH_CAPABILITIES, told)), 1);
        sregs.apic_base = vcpu.sregs().apic_base;
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&kvm_bindings::kvm_regs { rsi: disable, ..regs });
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::Io { port: 0x10, .. }));
        assert_eq!(vcpu.cpu.counters.fb_clears, u64::from(disable == 0));
        assert_eq!(written(vcpu), disable);
    }
    assert_eq!((written(&mut program.vcpu), written(&mut other)), (FB_CLEAR_DIS, 0));
    // Restored on the other, and taken through INIT.
    assert_eq!(other.set_msrs(&entry(MCU_OPT_CTRL, FB_CLEAR_DIS)), 1);
    other.lapic.as_ref().unwrap().post_init();
    other.mp_state();
    assert_eq!(other.mp_state().mp_state, kvm_bindings::KVM_MP_STATE_INIT_RECEIVED);
    assert_eq!((written(&mut program.vcpu), written(&mut other)), (FB_CLEAR_DIS, FB_CLEAR_DIS));
    assert!(!other.cpu.verw_clears.has(Buffer::Fill));
}
