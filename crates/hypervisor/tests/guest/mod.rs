//! A VM of one page-aligned piece of memory, for programs in real mode.
#![allow(dead_code, reason = "each test uses a part")]

use std::sync::Arc;

use hypervisor::{HostParams, System, Vcpu, VcpuExit, Vm};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use silicon::model::CpuModel;

/// Where programs begin.
pub(crate) const CODE: u64 = 0x1000;
/// Bytes of memory, from address 0.
pub(crate) const SIZE: u64 = 0x10_0000;

/// A VM and its memory.
pub(crate) struct Guest {
    pub(crate) vm: Arc<Vm>,
    memory: Vec<u8>,
}

impl Guest {
    /// A VM with a program, and with slot 0 for its memory.
    pub(crate) fn new(vm: Arc<Vm>, program: &[u8], flags: u32) -> Guest {
        let mut memory = vec![0u8; (SIZE + 4096) as usize];
        let start = memory.as_ptr().align_offset(4096);
        memory[start + CODE as usize..][..program.len()].copy_from_slice(program);
        let userspace_addr = memory[start..].as_ptr() as u64;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags,
            guest_phys_addr: 0,
            memory_size: SIZE,
            userspace_addr,
        };
        vm.set_user_memory_region(region).unwrap();
        Guest { vm, memory }
    }

    /// A vCPU at the beginning of the program.
    pub(crate) fn vcpu(&self, id: u32) -> Vcpu {
        let mut vcpu = self.vm.create_vcpu(id).unwrap();
        let mut sregs = vcpu.sregs();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() });
        vcpu
    }

    /// Where guest-physical address `gpa` lies in this process.
    pub(crate) fn host(&self, gpa: u64) -> u64 {
        self.memory[self.memory.as_ptr().align_offset(4096)..].as_ptr() as u64 + gpa
    }

    /// The byte at a guest-physical address.
    pub(crate) fn byte(&self, gpa: u64) -> u8 {
        let mut byte = [0];
        assert!(self.vm.memory().read(gpa, &mut byte));
        byte[0]
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Whoever still has the VM finds no memory that is not there.
        let gone = kvm_userspace_memory_region { slot: 0, ..Default::default() };
        let _ = self.vm.set_user_memory_region(gone);
        self.memory.clear();
    }
}

/// The system that VMs are made on.
pub(crate) fn system() -> Arc<System> {
    System::new(CpuModel::default(), HostParams::default())
}

/// Runs to the next exit, which is to be HLT.
pub(crate) fn run_to_hlt(vcpu: &mut Vcpu) {
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
}
