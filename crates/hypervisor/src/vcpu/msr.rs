//! RDMSR and WRMSR exits, and KVM_GET/SET_MSRS: what the client's filter says, what is refused, and what of that goes to
//! the client (kernel: `kvm_emulate_rdmsr`, `kvm_emulate_wrmsr`, `kvm_msr_user_space` in arch/x86/kvm/x86.c).

use kvm_bindings::{
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, kvm_msr_entry,
};
use silicon::model::msrs::{ARCH_CAPABILITIES, MCU_OPT_CTRL, MSR_TEST_CTRL};
use silicon::state::reg;

use super::tsc::IA32_TSC;
use super::{Vcpu, VcpuExit};
use crate::msr::filter::MsrAccess;
use crate::msr::{CpuEnv, MsrError, MsrState, async_pf, is_immutable, page_not_present};

/// The client may hide it (KVM_CAP_MSR_PLATFORM_INFO).
const MSR_PLATFORM_INFO: u32 = 0xce;

/// What KVM_EXIT_X86_RDMSR and KVM_EXIT_X86_WRMSR tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrExit {
    /// Register.
    pub index: u32,
    /// KVM_MSR_EXIT_REASON_*.
    pub reason: u32,
    /// The value of a write; `None` for a read.
    pub write: Option<u64>,
}

impl Vcpu {
    /// Whether accesses to the registers that the processor keeps have to exit.
    pub(super) fn update_msr_exiting(&mut self) {
        // An invalid value is #GP unless somebody wants to know of it.
        let reports = self.vm.policy().user_space_msrs() & KVM_MSR_EXIT_REASON_INVAL != 0;
        self.cpu.controls.msr_exiting = reports || self.vm.msr_filters().restricts_processor();
    }

    pub(super) fn rdmsr(&mut self, index: u32) -> Option<VcpuExit> {
        let result = match self.vm.msr_filters().allows(index, MsrAccess::Read) {
            false => Err(KVM_MSR_EXIT_REASON_FILTER),
            true => self.read_msr(index, false).map_err(reason),
        };
        match result {
            Ok(value) => {
                self.set_pair(value);
                self.skip_instruction();
                None
            }
            Err(reason) => self.refused(MsrExit { index, reason, write: None }),
        }
    }

    pub(super) fn wrmsr(&mut self, index: u32, value: u64) -> Option<VcpuExit> {
        let result = match self.vm.msr_filters().allows(index, MsrAccess::Write) {
            false => Err(KVM_MSR_EXIT_REASON_FILTER),
            true => self.write_msr(index, value, false).map_err(reason),
        };
        match result {
            Ok(()) => {
                self.skip_instruction();
                None
            }
            Err(reason) => self.refused(MsrExit { index, reason, write: Some(value) }),
        }
    }

    /// #GP, or the client's business.
    fn refused(&mut self, exit: MsrExit) -> Option<VcpuExit> {
        if self.vm.policy().user_space_msrs() & exit.reason == 0 {
            self.inject_gp();
            return None;
        }
        self.msr_pending = Some(exit);
        Some(VcpuExit::Msr(exit))
    }

    /// Gives the result of the access that the last exit told of; `error`: #GP for the guest.
    pub fn complete_msr(&mut self, error: bool, value: u64) {
        let Some(exit) = self.msr_pending.take() else { return };
        if error {
            self.inject_gp();
            return;
        }
        if exit.write.is_none() {
            self.set_pair(value);
        }
        self.skip_instruction();
    }

    /// EDX:EAX.
    pub(super) fn set_pair(&mut self, value: u64) {
        self.cpu.state.regs[usize::from(reg::RAX)] = value & 0xffff_ffff;
        self.cpu.state.regs[usize::from(reg::RDX)] = value >> 32;
    }

    /// KVM_SET_MSRS: how many were set before the first that was refused.
    pub fn set_msrs(&mut self, entries: &[kvm_msr_entry]) -> usize {
        let refused = entries.iter().position(|e| self.write_msr(e.index, e.data, true).is_err());
        refused.unwrap_or(entries.len())
    }

    /// KVM_GET_MSRS: fills in the values; how many were read before the first that was refused.
    pub fn get_msrs(&mut self, entries: &mut [kvm_msr_entry]) -> usize {
        for (done, entry) in entries.iter_mut().enumerate() {
            match self.read_msr(entry.index, true) {
                Ok(value) => entry.data = value,
                Err(_) => return done,
            }
        }
        entries.len()
    }

    /// The registers that KVM keeps, with what they act on.
    pub(super) fn msrs(&mut self) -> (&mut MsrState, CpuEnv<'_>) {
        let env = CpuEnv {
            tsc_khz: self.tsc_khz,
            apic_base: &mut self.apic_base,
            cpu: &mut self.cpu,
            lapic: self.lapic.as_deref(),
            pv_features: if self.pv_enforced { self.pv_features } else { u32::MAX },
            own_features: self.own_features,
        };
        (&mut self.msrs, env)
    }

    /// Reads an MSR as RDMSR (or KVM_GET_MSRS, `host`) does.
    pub(super) fn read_msr(&mut self, index: u32, host: bool) -> Result<u64, MsrError> {
        if index == MSR_PLATFORM_INFO && !host && !self.vm.policy().platform_info() {
            return Err(MsrError::Refused(index));
        }
        let (msrs, mut env) = self.msrs();
        msrs.read(index, host, &mut env)
    }

    /// What VERW clears follows from what the guest has been told and from what it has written.
    pub(super) fn update_verw(&mut self) {
        let (msrs, env) = self.msrs();
        let clears = msrs.verw_clears(&env);
        self.cpu.verw_clears = clears;
    }

    /// Writes an MSR as WRMSR (or KVM_SET_MSRS, `host`) does.
    pub(super) fn write_msr(&mut self, index: u32, value: u64, host: bool) -> Result<(), MsrError> {
        if host && index == IA32_TSC {
            self.write_tsc(value);
            return Ok(());
        }
        if host && self.has_run && is_immutable(index) && self.read_msr(index, true) != Ok(value) {
            return Err(MsrError::Refused(index));
        }
        if host && index == ARCH_CAPABILITIES {
            self.vm.told(value).map_err(|_| MsrError::Refused(index))?;
        }
        let before = self.msrs.async_pf_enable();
        let (msrs, mut env) = self.msrs();
        msrs.write(index, value, host, &mut env)?;
        match index {
            async_pf::ENABLE => self.async_pf_enabled(before)?,
            page_not_present::DATA => self.page_not_present_written(host)?,
            page_not_present::REQUEST if !host => self.page_requested(),
            async_pf::ACKNOWLEDGE if value & 1 != 0 => self.async_pf_acknowledged(),
            _ => {}
        }
        if index == MCU_OPT_CTRL {
            self.update_verw();
        }
        if index == MSR_TEST_CTRL {
            self.test_ctrl_written();
        }
        if std::mem::take(&mut self.msrs.wall_clock_changed) {
            // The lock is not held while guest memory is written.
            let clock = *self.vm.clock();
            clock.write_wall_clock(self.vm.memory(), self.msrs.wall_clock());
        }
        Ok(())
    }
}

fn reason(error: MsrError) -> u32 {
    match error {
        MsrError::Unsupported(_) => KVM_MSR_EXIT_REASON_UNKNOWN,
        MsrError::Refused(_) => KVM_MSR_EXIT_REASON_INVAL,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Program;
    use super::*;
    use crate::msr::filter::{FilterRange, MsrFilter};
    use kvm_bindings::{KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE};

    /// EFER, which the processor keeps; IA32_MISC_ENABLE; a register that there is not.
    const EFER: u32 = 0xc000_0080;
    const MISC_ENABLE: u32 = 0x1a0;
    const NONE: u32 = 0x474f_4f00;

    /// Runs RDMSR or WRMSR and HLT.
    fn run(program: &mut Program, write: bool, index: u32, value: u64) -> VcpuExit {
        program.patch(&[0x0f, if write { 0x30 } else { 0x32 }, 0xf4]);
        let mut regs = program.vcpu.regs();
        (regs.rip, regs.rcx) = (Program::CODE, index.into());
        (regs.rax, regs.rdx) = (value & 0xffff_ffff, value >> 32);
        program.vcpu.set_regs(&regs);
        program.vcpu.run().unwrap()
    }

    #[test]
    fn filters_and_reasons() {
        let mut program = Program::new(&[]);
        let flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;
        let range = |base| FilterRange { flags, base, count: 1, bitmap: vec![0] };
        let filter = MsrFilter::new(0, vec![range(EFER), range(MISC_ENABLE)]).unwrap();
        program.vcpu.vm.msr_filters().set(filter);
        program.vcpu.vm.set_user_space_msrs(7).unwrap();
        for (index, write, value, reason) in [
            (EFER, false, 0, KVM_MSR_EXIT_REASON_FILTER),
            (EFER, true, 1, KVM_MSR_EXIT_REASON_FILTER),
            (MISC_ENABLE, true, 1, KVM_MSR_EXIT_REASON_FILTER),
            (NONE, false, 0, KVM_MSR_EXIT_REASON_UNKNOWN),
            (NONE, true, 5, KVM_MSR_EXIT_REASON_UNKNOWN),
            (0xc000_0102, true, 1 << 62, KVM_MSR_EXIT_REASON_INVAL),
        ] {
            let exit = VcpuExit::Msr(MsrExit { index, reason, write: write.then_some(value) });
            assert_eq!(run(&mut program, write, index, value), exit, "{index:#x} {write}");
            program.vcpu.complete_msr(false, 0x1_0000_0002);
            assert_eq!(program.vcpu.run().unwrap(), VcpuExit::Hlt);
            let regs = program.vcpu.regs();
            if !write {
                assert_eq!((regs.rax, regs.rdx), (2, 1));
            }
        }
        assert!(matches!(run(&mut program, false, EFER, 0), VcpuExit::Msr(_)));
        program.vcpu.complete_msr(true, 0);
        assert_eq!(program.vcpu.vcpu_events().exception.nr, 13);
    }

    #[test]
    fn the_client_takes_only_the_reasons_that_it_asked_for() {
        let mut program = Program::new(&[]);
        program.vcpu.vm.set_user_space_msrs(KVM_MSR_EXIT_REASON_FILTER.into()).unwrap();
        // #GP in real mode goes to address 0 of segment 0, where there is HLT.
        assert_eq!(run(&mut program, false, NONE, 0), VcpuExit::Hlt);
        assert_ne!(program.vcpu.regs().rip, Program::CODE + 3);
    }

    /// What QEMU writes at reset, each of which it insists on.
    #[test]
    fn everything_that_qemu_resets_is_taken() {
        let mut program = Program::new(&[]);
        let vcpu = &mut program.vcpu;
        let table = vcpu.vm.system().supported_cpuid();
        vcpu.set_cpuid2(&table).unwrap();
        vcpu.setup_mce(1 << 24 | 1 << 8 | 10).unwrap();
        let ranges = [
            (0x10, 0x12),
            (0x34, 0x34),
            (0x3b, 0x3b),
            (0x8b, 0x8b),
            (0x174, 0x176),
            (0x17a, 0x17a),
            (0x1a0, 0x1a0),
            (0x200, 0x20f),
            (0x250, 0x250),
            (0x258, 0x259),
            (0x268, 0x26f),
            (0x277, 0x277),
            (0x2ff, 0x2ff),
            (0x400, 0x427),
            (0x6e0, 0x6e0),
            (0x4b56_4d00, 0x4b56_4d01),
            (0xc000_0081, 0xc000_0084),
            (0xc000_0102, 0xc000_0103),
            (0xc001_0117, 0xc001_0117),
        ];
        for index in ranges.into_iter().flat_map(|(first, last)| first..=last) {
            let data = match index {
                0x1a0 => 1,
                0x277 => 0x0007_0406_0007_0406,
                0x400..=0x427 if index & 3 == 0 => u64::MAX,
                _ => 0,
            };
            let entry = kvm_msr_entry { index, data, ..Default::default() };
            assert_eq!(vcpu.set_msrs(&[entry]), 1, "{index:#x}");
        }
        let last = kvm_msr_entry { index: 0x17b, data: u64::MAX, ..Default::default() };
        assert_eq!(vcpu.set_msrs(&[last]), 1);
        // And whatever the index list has comes back as it was read.
        for index in vcpu.vm.system().msr_index_list() {
            let mut entry = [kvm_msr_entry { index, ..Default::default() }];
            assert_eq!((vcpu.get_msrs(&mut entry), vcpu.set_msrs(&entry)), (1, 1), "{index:#x}");
        }
    }
}
