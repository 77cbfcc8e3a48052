//! Control registers, XCR0, protection keys, FS and GS bases, translation invalidation, and RFLAGS.AC.
//!
//! Control-register writes check everything before they change anything. (SDM vol. 2B, "MOV—Move to/from
//! Control Registers"; vol. 3A, 2.5, 5.1, 11.8.5.)

use iced_x86::{Code, Instruction, OpKind, Register};

use crate::code::lower::{LowerCtx, gpr, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::flags::Rflags;
use crate::model::Feature;
use crate::state::{CodeSize, Seg, cr0, cr4, efer, reg};
use crate::vmx::Exit;

/// CR0 bits that software can set.
const CR0_WRITABLE: u64 =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;
/// What LMSW writes.
const MACHINE_STATUS: u64 = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
/// Bit 63 of MOV CR3's operand: keep the translations of the PCID.
const CR3_NO_FLUSH: u64 = 1 << 63;
/// PCID in CR3.
const CR3_PCID: u64 = 0xfff;
/// CR4 bits whose change invalidates translations (SDM vol. 3A, 5.10.4.1), or changes what they allow.
const CR4_TRANSLATION: u64 =
    cr4::PSE | cr4::PAE | cr4::PGE | cr4::LA57 | cr4::PCIDE | cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::PKS;
/// Changes of these reload the PDPTEs under PAE paging (SDM vol. 3A, 5.4.1).
const CR4_PDPTE: u64 = cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP;

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let (handler, size): (Handler, u8) = match ins.code() {
        Code::Mov_r32_cr => (read_control(ins.op1_register())?, 4),
        Code::Mov_r64_cr => (read_control(ins.op1_register())?, 8),
        Code::Mov_cr_r32 => (write_control(ins.op0_register())?, 4),
        Code::Mov_cr_r64 => (write_control(ins.op0_register())?, 8),
        Code::Clts => (clts, 0),
        Code::Smsw_rm16 => (smsw, 2),
        Code::Smsw_r32m16 => (smsw, 4),
        Code::Smsw_r64m16 => (smsw, 8),
        Code::Lmsw_rm16 | Code::Lmsw_r32m16 | Code::Lmsw_r64m16 => (lmsw, 2),
        Code::Xgetbv => (xgetbv, 0),
        Code::Xsetbv => (xsetbv, 0),
        Code::Rdpkru => (rdpkru, 0),
        Code::Wrpkru => (wrpkru, 0),
        Code::Clac => (set_ac::<false>, 0),
        Code::Stac => (set_ac::<true>, 0),
        Code::Swapgs => (swapgs, 0),
        Code::Rdfsbase_r32 => (read_base::<4>, 4),
        Code::Rdfsbase_r64 => (read_base::<4>, 8),
        Code::Rdgsbase_r32 => (read_base::<5>, 4),
        Code::Rdgsbase_r64 => (read_base::<5>, 8),
        Code::Wrfsbase_r32 => (write_base::<4>, 4),
        Code::Wrfsbase_r64 => (write_base::<4>, 8),
        Code::Wrgsbase_r32 => (write_base::<5>, 4),
        Code::Wrgsbase_r64 => (write_base::<5>, 8),
        Code::Invlpg_m => (invlpg, 0),
        Code::Invpcid_r32_m128 => (invpcid, 4),
        Code::Invpcid_r64_m128 => (invpcid, 8),
        _ => return None,
    };
    let mut op = op_base(ins, ctx, handler);
    op.size = size;
    for i in 0..ins.op_count() {
        let register = ins.op_register(i);
        if ins.op_kind(i) == OpKind::Register && register.is_gpr() {
            op.r0 = gpr(register);
        }
    }
    Some(op)
}

fn read_control(register: Register) -> Option<Handler> {
    Some(match register {
        Register::CR0 => read_cr::<0>,
        Register::CR2 => read_cr::<2>,
        Register::CR3 => read_cr::<3>,
        Register::CR4 => read_cr::<4>,
        Register::CR8 => read_cr::<8>,
        _ => return None,
    })
}

fn write_control(register: Register) -> Option<Handler> {
    Some(match register {
        Register::CR0 => write_cr::<0>,
        Register::CR2 => write_cr::<2>,
        Register::CR3 => write_cr::<3>,
        Register::CR4 => write_cr::<4>,
        Register::CR8 => write_cr::<8>,
        _ => return None,
    })
}

/// #GP(0) unless CPL is 0.
pub(super) fn privileged(cpu: &mut Cpu) -> Result<(), Abort> {
    if cpu.state.cpl == 0 { Ok(()) } else { Err(cpu.raise(Exception::gp(0))) }
}

/// #UD unless `condition` holds.
pub(super) fn defined_if(cpu: &mut Cpu, condition: bool) -> Result<(), Abort> {
    if condition { Ok(()) } else { Err(cpu.raise(Exception::UD)) }
}

/// #GP(0) unless `condition` holds.
pub(super) fn allowed_if(cpu: &mut Cpu, condition: bool) -> Result<(), Abort> {
    if condition { Ok(()) } else { Err(cpu.raise(Exception::gp(0))) }
}

/// The instruction is done, and the block with it.
pub(super) fn finish(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.state.rip = cpu.next_ip(op);
    Ok(Flow::End)
}

/// A 64-bit value from EDX:EAX.
pub(super) fn edx_eax(cpu: &Cpu) -> u64 {
    let half = |r: u8| cpu.state.regs[usize::from(r)] & 0xffff_ffff;
    half(reg::RDX) << 32 | half(reg::RAX)
}

/// Puts a 64-bit value into EDX:EAX.
pub(super) fn set_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.state.regs[usize::from(reg::RAX)] = value & 0xffff_ffff;
    cpu.state.regs[usize::from(reg::RDX)] = value >> 32;
}

/// ECX.
pub(super) fn ecx(cpu: &Cpu) -> u32 {
    cpu.state.regs[usize::from(reg::RCX)] as u32
}

fn read_cr<const CR: u8>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    privileged(cpu)?;
    let value = match CR {
        0 => cpu.state.cr0,
        2 => cpu.state.cr2,
        3 => cpu.state.cr3,
        4 => cpu.state.cr4,
        _ if cpu.controls.cr8_exiting => {
            return Err(cpu.exit(Exit::Cr8 { register: op.r0, read: true }));
        }
        _ => cpu.state.cr8,
    };
    match op.size {
        4 => cpu.set(op.r0, value as u32),
        _ => cpu.set(op.r0, value),
    }
    Ok(Flow::Next)
}

fn write_cr<const CR: u8>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    privileged(cpu)?;
    let value = match op.size {
        4 => u64::from(cpu.get::<u32>(op.r0)),
        _ => cpu.get::<u64>(op.r0),
    };
    // Leaving protected mode changes the width of RIP; this instruction still ends in the old mode.
    let next = cpu.next_ip(op);
    match CR {
        0 => cpu.write_cr0(value)?,
        2 => cpu.state.cr2 = value,
        3 => cpu.write_cr3(value)?,
        4 => cpu.write_cr4(value)?,
        _ => {
            if cpu.controls.cr8_exiting {
                return Err(cpu.exit(Exit::Cr8 { register: op.r0, read: false }));
            }
            allowed_if(cpu, value < 16)?;
            cpu.state.cr8 = value;
        }
    }
    cpu.state.rip = next;
    Ok(Flow::End)
}

impl Cpu {
    /// Writes CR0 as MOV to CR0 does: #GP(0) for a value that cannot be (SDM vol. 3A, 2.5 and 11.8.5).
    pub fn write_cr0(&mut self, value: u64) -> Result<(), Abort> {
        let new = value & CR0_WRITABLE | cr0::ET;
        let (old, state) = (self.state.cr0, &self.state);
        let has = |bit| new & bit != 0;
        let turns_on = |bit| new & !old & bit != 0;
        let turns_off = |bit| old & !new & bit != 0;
        let long = state.efer & efer::LME != 0;
        let valid = value >> 32 == 0
            && (!has(cr0::PG) || has(cr0::PE))
            && (!has(cr0::NW) || has(cr0::CD))
            && !(turns_on(cr0::PG) && long && !self.can_enter_long_mode())
            && !(turns_off(cr0::PG) && (state.code_size == CodeSize::Bits64 || state.cr4 & cr4::PCIDE != 0))
            && !(turns_off(cr0::WP) && state.cr4 & cr4::CET != 0);
        allowed_if(self, valid)?;
        let changed = old ^ new;
        let pae = has(cr0::PG) && self.state.cr4 & cr4::PAE != 0 && !long;
        if pae && changed & (cr0::PG | cr0::CD | cr0::NW) != 0 {
            self.load_pdptrs(self.state.cr3)?;
        }
        self.state.cr0 = new;
        if turns_on(cr0::PG) && long {
            self.state.efer |= efer::LMA;
        } else if turns_off(cr0::PG) {
            self.state.efer &= !efer::LMA;
        }
        self.refresh_mode();
        if changed & (cr0::PG | cr0::WP | cr0::PE | cr0::AM | cr0::CD) != 0 {
            self.paging_changed();
        }
        Ok(())
    }

    /// The checks on activating IA-32e mode that are not on CR0 itself (SDM vol. 3A, 11.8.5).
    fn can_enter_long_mode(&self) -> bool {
        let old_tss = matches!(self.state.tr.kind(), 1 | 3);
        self.state.cr4 & cr4::PAE != 0 && !self.state.segs[Seg::Cs as usize].long() && !old_tss
    }

    /// Writes CR3 as MOV to CR3 does.
    pub fn write_cr3(&mut self, value: u64) -> Result<(), Abort> {
        let state = &self.state;
        let pcide = state.cr4 & cr4::PCIDE != 0;
        let keep = pcide && value & CR3_NO_FLUSH != 0;
        let value = if pcide { value & !CR3_NO_FLUSH } else { value };
        if state.long_mode() {
            let fits = value & !self.features.physical_mask() == 0;
            allowed_if(self, fits)?;
        } else if state.cr0 & cr0::PG != 0 && state.cr4 & cr4::PAE != 0 {
            self.load_pdptrs(value)?;
        }
        self.state.cr3 = value;
        self.cr3_loaded(keep);
        Ok(())
    }

    /// Writes CR4 as MOV to CR4 does.
    pub fn write_cr4(&mut self, new: u64) -> Result<(), Abort> {
        let (old, state) = (self.state.cr4, &self.state);
        let turns_on = |bit| new & !old & bit != 0;
        let turns_off = |bit| old & !new & bit != 0;
        let long = state.long_mode();
        let valid = new & !self.features.cr4_mask() == 0
            && !(long && new & cr4::PAE == 0)
            && !(turns_on(cr4::PCIDE) && (!long || state.cr3 & CR3_PCID != 0))
            && !(long && (turns_on(cr4::LA57) || turns_off(cr4::LA57)))
            && !(turns_on(cr4::CET) && state.cr0 & cr0::WP == 0);
        allowed_if(self, valid)?;
        let changed = old ^ new;
        let pae = self.state.cr0 & cr0::PG != 0 && new & cr4::PAE != 0 && !long;
        if pae && changed & CR4_PDPTE != 0 {
            self.load_pdptrs(self.state.cr3)?;
        }
        self.state.cr4 = new;
        if changed & CR4_TRANSLATION != 0 {
            self.paging_changed();
        }
        Ok(())
    }
}

fn clts(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    privileged(cpu)?;
    cpu.state.cr0 &= !cr0::TS;
    finish(cpu, op)
}

fn smsw(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let hidden = cpu.state.cr4 & cr4::UMIP != 0 && cpu.state.cpl != 0;
    allowed_if(cpu, !hidden)?;
    let value = cpu.state.cr0;
    if op.seg < 6 {
        let lin = cpu.ea(op, 2, true)?;
        cpu.store(cpu.op_seg(op), lin, value as u16)?;
        return Ok(Flow::Next);
    }
    match op.size {
        2 => cpu.set(op.r0, value as u16),
        4 => cpu.set(op.r0, value as u32),
        _ => cpu.set(op.r0, value),
    }
    Ok(Flow::Next)
}

fn lmsw(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    privileged(cpu)?;
    let source = if op.seg < 6 {
        let lin = cpu.ea(op, 2, false)?;
        cpu.load::<u16>(cpu.op_seg(op), lin)?
    } else {
        cpu.get::<u16>(op.r0)
    };
    // LMSW can set PE but not clear it.
    let old = cpu.state.cr0;
    let new = old & !MACHINE_STATUS | old & cr0::PE | u64::from(source) & MACHINE_STATUS;
    let next = cpu.next_ip(op);
    cpu.write_cr0(new)?;
    cpu.state.rip = next;
    Ok(Flow::End)
}

fn xgetbv(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    let enabled = cpu.state.cr4 & cr4::OSXSAVE != 0;
    defined_if(cpu, enabled)?;
    let value = match ecx(cpu) {
        0 => cpu.state.xcr0,
        1 if cpu.features.has(Feature::Xgetbv1) => cpu.xinuse(cpu.state.xcr0),
        _ => return Err(cpu.raise(Exception::gp(0))),
    };
    set_edx_eax(cpu, value);
    Ok(Flow::Next)
}

/// XSETBV exits after the checks that take priority over the exit; the hypervisor checks the value with
/// [`Features::valid_xcr0`](crate::model::Features::valid_xcr0).
fn xsetbv(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    let enabled = cpu.state.cr4 & cr4::OSXSAVE != 0;
    defined_if(cpu, enabled)?;
    privileged(cpu)?;
    let exit = Exit::Xsetbv { index: ecx(cpu), value: edx_eax(cpu) };
    Err(cpu.exit(exit))
}

fn rdpkru(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    let enabled = cpu.state.cr4 & cr4::PKE != 0;
    defined_if(cpu, enabled)?;
    let valid = ecx(cpu) == 0;
    allowed_if(cpu, valid)?;
    set_edx_eax(cpu, u64::from(cpu.state.pkru));
    Ok(Flow::Next)
}

fn wrpkru(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let enabled = cpu.state.cr4 & cr4::PKE != 0;
    defined_if(cpu, enabled)?;
    let value = edx_eax(cpu);
    let valid = ecx(cpu) == 0 && value >> 32 == 0;
    allowed_if(cpu, valid)?;
    cpu.state.pkru = value as u32;
    cpu.pkru_changed();
    finish(cpu, op)
}

/// STAC and CLAC.
fn set_ac<const ON: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let kernel = cpu.state.cpl == 0;
    defined_if(cpu, kernel)?;
    let ac = Rflags::AC.bits();
    let flags = cpu.state.rflags_system;
    cpu.state.rflags_system = if ON { flags | ac } else { flags & !ac };
    cpu.mode_changed();
    finish(cpu, op)
}

fn swapgs(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    privileged(cpu)?;
    let gs = Seg::Gs as usize;
    std::mem::swap(&mut cpu.state.segs[gs].base, &mut cpu.state.kernel_gs_base);
    cpu.state.ea_base[gs] = cpu.state.segs[gs].base;
    Ok(Flow::Next)
}

/// RDFSBASE and RDGSBASE.
fn read_base<const SEG: usize>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let enabled = cpu.state.cr4 & cr4::FSGSBASE != 0;
    defined_if(cpu, enabled)?;
    let base = cpu.state.segs[SEG].base;
    match op.size {
        4 => cpu.set(op.r0, base as u32),
        _ => cpu.set(op.r0, base),
    }
    Ok(Flow::Next)
}

/// WRFSBASE and WRGSBASE. Unlike WRMSR, they take the width of the current paging mode, as the silicon does.
fn write_base<const SEG: usize>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let enabled = cpu.state.cr4 & cr4::FSGSBASE != 0;
    defined_if(cpu, enabled)?;
    let base = match op.size {
        4 => u64::from(cpu.get::<u32>(op.r0)),
        _ => cpu.get::<u64>(op.r0),
    };
    let canonical = cpu.state.canonical(base);
    allowed_if(cpu, canonical)?;
    cpu.state.segs[SEG].base = base;
    cpu.state.ea_base[SEG] = base;
    Ok(Flow::Next)
}

/// INVLPG: no segment checks, and nothing happens for a non-canonical address.
fn invlpg(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    privileged(cpu)?;
    let offset = cpu.offset(op) & op.addr_mask();
    let lin = offset.wrapping_add(cpu.state.ea_base[usize::from(op.seg & 7)]);
    let lin = if cpu.state.code_size == CodeSize::Bits64 { lin } else { lin & 0xffff_ffff };
    if cpu.features.is_canonical(lin) {
        cpu.flush_page(lin);
    }
    finish(cpu, op)
}

fn invpcid(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    privileged(cpu)?;
    let kind = match op.size {
        4 => u64::from(cpu.get::<u32>(op.r0)),
        _ => cpu.get::<u64>(op.r0),
    };
    let lin = cpu.ea(op, 16, false)?;
    let mut descriptor = [0; 16];
    cpu.read_bytes(cpu.op_seg(op), lin, &mut descriptor)?;
    let descriptor = u128::from_le_bytes(descriptor);
    let (pcid, address) = (descriptor as u64, (descriptor >> 64) as u64);
    let pcide = cpu.state.cr4 & cr4::PCIDE != 0;
    let valid = kind <= 3
        && pcid <= CR3_PCID
        && (kind > 1 || pcide || pcid == 0)
        && (kind != 0 || cpu.features.is_canonical(address));
    allowed_if(cpu, valid)?;
    match kind {
        0 => cpu.flush_page_in(pcid as u16, address),
        1 => cpu.flush_context(pcid as u16),
        2 => cpu.flush_all(false),
        _ => cpu.flush_all(true),
    }
    finish(cpu, op)
}
