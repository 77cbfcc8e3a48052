//! vCPUs for unit tests.

use std::sync::Arc;

use silicon::model::CpuModel;

use super::Vcpu;
use crate::{HostParams, System, Vm};

/// A VM without interrupt controllers and memory.
pub(super) fn vm() -> Arc<Vm> {
    System::new(CpuModel::default(), HostParams::default()).create_vm().unwrap()
}

/// A vCPU of such a VM.
pub(super) fn vcpu() -> Vcpu {
    vm().create_vcpu(0).unwrap()
}

/// A vCPU with an in-kernel local APIC.
pub(super) fn vcpu_with_apic() -> Vcpu {
    let vm = vm();
    vm.create_irqchip().unwrap();
    vm.create_vcpu(0).unwrap()
}

/// A vCPU in real mode with 64 KiB of memory, about to execute a program at [`Program::CODE`]. The interrupt vectors
/// lead to a HLT at 0.
pub(super) struct Program {
    pub(super) vcpu: Vcpu,
    // Goes after the vCPU, which has its address.
    _memory: Box<[Page]>,
}

/// Memory that slots can have.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

impl Program {
    pub(super) const CODE: u64 = 0x1000;
    const SIZE: u64 = 0x1_0000;

    pub(super) fn new(code: &[u8]) -> Program {
        Program::on(vm(), code)
    }

    /// In a VM that may have interrupt controllers.
    pub(super) fn on(vm: Arc<Vm>, code: &[u8]) -> Program {
        let mut memory = vec![Page([0; 4096]); (Program::SIZE / 4096) as usize].into_boxed_slice();
        // Interrupt vectors 0:0x500, where HLT is.
        memory[0].0[..0x400].as_chunks_mut().0.iter_mut().for_each(|vector| *vector = [0, 5, 0, 0]);
        memory[0].0[0x500] = 0xf4;
        vm.set_user_memory_region(kvm_bindings::kvm_userspace_memory_region {
            memory_size: Program::SIZE,
            userspace_addr: memory.as_mut_ptr() as u64,
            ..Default::default()
        })
        .unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.sregs();
        for segment in [&mut sregs.cs, &mut sregs.ss, &mut sregs.ds, &mut sregs.es] {
            (segment.base, segment.selector) = (0, 0);
        }
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&kvm_bindings::kvm_regs {
            rip: Program::CODE,
            rsp: 0x8000,
            rflags: 2,
            ..Default::default()
        });
        let program = Program { vcpu, _memory: memory };
        program.patch(code);
        program
    }

    /// Replaces the program.
    pub(super) fn patch(&self, code: &[u8]) {
        assert!(self.vcpu.vm.memory().write(Program::CODE, code));
    }
}
