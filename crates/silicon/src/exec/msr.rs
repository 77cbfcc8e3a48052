//! RDMSR and WRMSR. Registers that are part of the CPU's state are read and written here; all others exit.

use iced_x86::{Code, Instruction};

use super::control::{ecx, edx_eax, finish, privileged, set_edx_eax};
use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::model::Feature;
use crate::model::msrs::{self, Kept, StateMsr, valid_pat};
use crate::state::{Seg, cr0, efer};
use crate::vmx::Exit;

/// An MSR does not take this value: #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("value {value:#x} is not valid for {msr:?}")]
pub struct InvalidMsrValue {
    /// The register.
    pub msr: StateMsr,
    /// The value.
    pub value: u64,
}

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let handler: Handler = match ins.code() {
        Code::Rdmsr => rdmsr,
        Code::Wrmsr => wrmsr,
        _ => return None,
    };
    Some(op_base(ins, ctx, handler))
}

fn rdmsr(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    privileged(cpu)?;
    let index = ecx(cpu);
    match cpu.state_msr(index) {
        Some(msr) => {
            let value = cpu.read_state_msr(msr);
            set_edx_eax(cpu, value);
            finish(cpu, op)
        }
        None => Err(cpu.exit(Exit::Rdmsr { index })),
    }
}

fn wrmsr(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    privileged(cpu)?;
    let (index, value) = (ecx(cpu), edx_eax(cpu));
    match cpu.state_msr(index) {
        // Writing the counter moves the guest's offset, which is the hypervisor's.
        Some(StateMsr::Tsc) | None => Err(cpu.exit(Exit::Wrmsr { index, value })),
        Some(msr) => {
            if cpu.write_state_msr(msr, value).is_err() {
                return Err(cpu.raise(Exception::gp(0)));
            }
            finish(cpu, op)
        }
    }
}

impl Cpu {
    /// The EFER bits that some processor model has.
    pub const EFER_DEFINED: u64 = efer::SCE | efer::LME | efer::LMA | efer::NXE;

    /// The pass-through register with number `index`: one that this CPU has and keeps itself, unless the
    /// hypervisor asks for exits all the same.
    fn state_msr(&self, index: u32) -> Option<StateMsr> {
        if self.controls.msr_exiting {
            return None;
        }
        let row = msrs::find(index)?;
        let present = row.enumerated.there(&self.features, 0);
        match row.kept {
            Kept::State(StateMsr::Tsc) if self.controls.rdtsc_exiting => None,
            Kept::State(StateMsr::Xfd) if self.controls.xfd_exiting => None,
            Kept::State(StateMsr::TscAux) => {
                let used = self.features.has(Feature::Rdtscp) || self.features.has(Feature::Rdpid);
                used.then_some(StateMsr::TscAux)
            }
            Kept::State(msr) if present => Some(msr),
            Kept::State(_) | Kept::Physical | Kept::Command(_) => None,
        }
    }

    /// Value of a register that is part of the state.
    pub fn read_state_msr(&self, msr: StateMsr) -> u64 {
        let state = &self.state;
        match msr {
            StateMsr::Tsc => self.tsc(),
            StateMsr::SysenterCs => state.sysenter_cs,
            StateMsr::SysenterEsp => state.sysenter_esp,
            StateMsr::SysenterEip => state.sysenter_eip,
            StateMsr::Pat => state.pat,
            StateMsr::Xfd => state.xfd,
            StateMsr::XfdErr => state.xfd_err,
            StateMsr::Xss => state.xss,
            StateMsr::Efer => state.efer,
            StateMsr::Star => state.star,
            StateMsr::Lstar => state.lstar,
            StateMsr::Cstar => state.cstar,
            StateMsr::Fmask => state.sfmask,
            StateMsr::FsBase => state.segs[Seg::Fs as usize].base,
            StateMsr::GsBase => state.segs[Seg::Gs as usize].base,
            StateMsr::KernelGsBase => state.kernel_gs_base,
            StateMsr::TscAux => state.tsc_aux,
        }
    }

    /// Writes a register that is part of the state as WRMSR does, with its checks. The counter's value is made
    /// by moving the offset.
    pub fn write_state_msr(&mut self, msr: StateMsr, value: u64) -> Result<(), InvalidMsrValue> {
        if self.valid_state_msr(msr, value) {
            self.put_state_msr(msr, value);
            Ok(())
        } else {
            Err(InvalidMsrValue { msr, value })
        }
    }

    /// Whether WRMSR accepts `value` (SDM vol. 2C, WRMSR; vol. 4, chapter 2).
    pub fn valid_state_msr(&self, msr: StateMsr, value: u64) -> bool {
        match msr {
            StateMsr::SysenterEsp
            | StateMsr::SysenterEip
            | StateMsr::Lstar
            | StateMsr::Cstar
            | StateMsr::FsBase
            | StateMsr::GsBase
            | StateMsr::KernelGsBase => self.features.is_canonical(value),
            StateMsr::Pat => valid_pat(value),
            StateMsr::Xfd | StateMsr::XfdErr => value & !self.features.xfd_mask() == 0,
            StateMsr::Xss => value & !self.features.xss_mask() == 0,
            StateMsr::Fmask | StateMsr::TscAux => value >> 32 == 0,
            StateMsr::Efer => {
                let known = value & !(self.features.efer_mask() | efer::LMA) == 0;
                let mode_kept = (value ^ self.state.efer) & efer::LME == 0;
                known && (mode_kept || self.state.cr0 & cr0::PG == 0)
            }
            StateMsr::Tsc | StateMsr::SysenterCs | StateMsr::Star => true,
        }
    }

    /// Stores a register that is part of the state with no check. EFER.LMA keeps its value.
    pub fn put_state_msr(&mut self, msr: StateMsr, value: u64) {
        let state = &mut self.state;
        match msr {
            StateMsr::Tsc => {
                let now = self.tsc();
                let offset = &mut self.controls.tsc_offset;
                *offset = offset.wrapping_add(value.wrapping_sub(now));
            }
            StateMsr::SysenterCs => state.sysenter_cs = value & 0xffff_ffff,
            StateMsr::SysenterEsp => state.sysenter_esp = value,
            StateMsr::SysenterEip => state.sysenter_eip = value,
            StateMsr::Pat => {
                state.pat = value;
                self.paging_changed();
            }
            StateMsr::Xfd => state.xfd = value,
            StateMsr::XfdErr => state.xfd_err = value,
            StateMsr::Xss => state.xss = value,
            StateMsr::Efer => {
                let old = state.efer;
                state.efer = value & !efer::LMA | old & efer::LMA;
                if (old ^ state.efer) & efer::NXE != 0 {
                    self.paging_changed();
                }
            }
            StateMsr::Star => state.star = value,
            StateMsr::Lstar => state.lstar = value,
            StateMsr::Cstar => state.cstar = value,
            StateMsr::Fmask => state.sfmask = value,
            StateMsr::FsBase => self.put_base(Seg::Fs, value),
            StateMsr::GsBase => self.put_base(Seg::Gs, value),
            StateMsr::KernelGsBase => state.kernel_gs_base = value,
            StateMsr::TscAux => state.tsc_aux = value,
        }
    }

    fn put_base(&mut self, seg: Seg, value: u64) {
        self.state.segs[seg as usize].base = value;
        self.state.ea_base[seg as usize] = value;
    }
}
