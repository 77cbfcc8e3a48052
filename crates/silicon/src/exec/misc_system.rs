//! CPUID, the time-stamp counter, MONITOR and MWAIT and their user-mode forms, hypercalls, SERIALIZE, RDPMC, RSM.

use iced_x86::{Code, Instruction, Register};

use super::control::{allowed_if, defined_if, edx_eax, finish, set_edx_eax};
use crate::clock::guest_tsc;
use crate::code::lower::{LowerCtx, gpr, op_base, seg_index};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::flags::Status;
use crate::model::Features;
use crate::state::{Seg, cr0, cr4, reg};
use crate::vmx::Exit;

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let handler: Handler = match ins.code() {
        Code::Cpuid => cpuid,
        Code::Rdtsc => rdtsc,
        Code::Rdtscp => rdtscp,
        Code::Rdpid_r32 | Code::Rdpid_r64 => rdpid,
        Code::Rdpmc => rdpmc,
        Code::Vmcall => vmcall,
        Code::Vmmcall => vmmcall,
        Code::Monitorw | Code::Monitord | Code::Monitorq => monitor,
        Code::Mwait => mwait,
        Code::Umonitor_r16 | Code::Umonitor_r32 | Code::Umonitor_r64 => umonitor,
        Code::Umwait_r32 | Code::Umwait_r64 | Code::Tpause_r32 | Code::Tpause_r64 => user_wait,
        Code::Serialize => serialize,
        Code::Rsm => rsm,
        _ => return None,
    };
    let mut op = op_base(ins, ctx, handler);
    if ins.op_count() > 0 && ins.op0_register().is_gpr() {
        op.r0 = gpr(ins.op0_register());
    }
    match ins.code() {
        Code::Monitorw | Code::Umonitor_r16 => implicit_address(&mut op, ins, Op::ADDR16),
        Code::Monitord | Code::Umonitor_r32 => implicit_address(&mut op, ins, Op::ADDR32),
        Code::Monitorq | Code::Umonitor_r64 => implicit_address(&mut op, ins, 0),
        _ => {}
    }
    Some(op)
}

/// MONITOR and UMONITOR take an address in a register, DS unless a prefix says otherwise.
fn implicit_address(op: &mut Op, ins: &Instruction, size: u8) {
    op.flags |= size;
    op.seg = match ins.segment_prefix() {
        Register::None => Seg::Ds as u8,
        prefix => seg_index(prefix),
    };
}

fn cpuid(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    Err(cpu.exit(Exit::Cpuid))
}

fn vmcall(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    Err(cpu.exit(Exit::Vmcall))
}

fn vmmcall(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    Err(cpu.exit(Exit::Vmmcall))
}

/// #UD outside of system management mode.
fn rsm(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    let in_smm = cpu.state.smm;
    defined_if(cpu, in_smm)?;
    Err(cpu.exit(Exit::Rsm))
}

impl Cpu {
    /// The time-stamp counter as the guest sees it now.
    pub fn tsc(&self) -> u64 {
        let ticks = self.clock.ticks(self.counters.instructions);
        guest_tsc(ticks, self.controls.tsc_multiplier, self.controls.tsc_offset)
    }

    /// Replaces what the CPU offers. Decoded code was decoded for the old features, so it goes.
    pub fn set_features(&mut self, features: Features) {
        self.features = features;
        self.code.clear();
        self.paging_changed();
    }
}

/// #GP(0) if CR4.TSD keeps user mode from the counter; an exit if the hypervisor wants one.
fn tsc_allowed(cpu: &mut Cpu) -> Result<(), Abort> {
    let allowed = cpu.state.cr4 & cr4::TSD == 0 || cpu.state.cpl == 0;
    allowed_if(cpu, allowed)?;
    if cpu.controls.rdtsc_exiting { Err(cpu.exit(Exit::Rdtsc)) } else { Ok(()) }
}

/// Ends the block, so that a clock that counts instructions has moved when the counter is read again.
fn rdtsc(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    tsc_allowed(cpu)?;
    let value = cpu.tsc();
    set_edx_eax(cpu, value);
    finish(cpu, op)
}

fn rdtscp(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    tsc_allowed(cpu)?;
    let value = cpu.tsc();
    set_edx_eax(cpu, value);
    cpu.state.regs[usize::from(reg::RCX)] = cpu.state.tsc_aux & 0xffff_ffff;
    finish(cpu, op)
}

fn rdpid(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.set(op.r0, cpu.state.tsc_aux);
    Ok(Flow::Next)
}

/// There are no performance counters: without an exit every counter number is wrong.
fn rdpmc(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    let state = &cpu.state;
    let allowed = state.cpl == 0 || state.cr4 & cr4::PCE != 0 || state.cr0 & cr0::PE == 0;
    let exiting = cpu.controls.rdpmc_exiting;
    allowed_if(cpu, allowed && exiting)?;
    Err(cpu.exit(Exit::Rdpmc))
}

fn monitor(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let kernel = cpu.state.cpl == 0;
    defined_if(cpu, kernel)?;
    if cpu.controls.mwait_exiting {
        return Err(cpu.exit(Exit::Monitor));
    }
    let no_extensions = cpu.state.regs[usize::from(reg::RCX)] as u32 == 0;
    allowed_if(cpu, no_extensions)?;
    watch(cpu, op, reg::RAX)?;
    Ok(Flow::Next)
}

/// MWAIT may end at any time for any reason; without an exit it ends at once.
fn mwait(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let kernel = cpu.state.cpl == 0;
    defined_if(cpu, kernel)?;
    if cpu.controls.mwait_exiting {
        return Err(cpu.exit(Exit::Mwait));
    }
    let known_extensions = cpu.state.regs[usize::from(reg::RCX)] as u32 & !1 == 0;
    allowed_if(cpu, known_extensions)?;
    finish(cpu, op)
}

fn umonitor(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    watch(cpu, op, op.r0)?;
    Ok(Flow::Next)
}

/// Checks the address in `register` as a load of a byte would.
fn watch(cpu: &mut Cpu, op: &Op, register: u8) -> Result<(), Abort> {
    let offset = cpu.state.regs[usize::from(register & 15)] & op.addr_mask();
    let seg = cpu.op_seg(op);
    let lin = cpu.linearize(seg, offset, 1, false)?;
    cpu.probe(seg, lin, 1, false)
}

/// UMWAIT and TPAUSE: wait until the counter reaches EDX:EAX, or less. They wait for one turn of the host's
/// scheduler; the carry flag would say that the system's time limit ended the wait.
fn user_wait(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let reserved = cpu.get::<u32>(op.r0) & !1 != 0;
    let forbidden = cpu.state.cr4 & cr4::TSD != 0 && cpu.state.cpl != 0;
    allowed_if(cpu, !reserved && !forbidden)?;
    if cpu.tsc() < edx_eax(cpu) {
        std::thread::yield_now();
    }
    cpu.state.status = Status::default();
    finish(cpu, op)
}

/// The block ends, so that mail is read: what other CPUs have changed is told. (What devices have written as code is seen at
/// interrupts, exits and new mappings, as with the other serializing instructions: kernels execute this after each of the
/// thousands of patches that they make of themselves.)
fn serialize(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    finish(cpu, op)
}
