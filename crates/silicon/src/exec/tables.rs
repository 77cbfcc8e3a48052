//! Descriptor-table registers and questions about descriptors: LGDT, LIDT, SGDT, SIDT, LLDT, SLDT, LTR, STR,
//! LAR, LSL, VERR, VERW, ARPL (SDM vol. 2).

use iced_x86::{Code, Instruction, OpKind};

use crate::code::lower::{LowerCtx, gpr, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::flags::Rflags;
use crate::state::{CodeSize, Segment, TableRegister, cr4};
use crate::system::segment::{Descriptor, code, is_null, kind, rpl};

/// Bits of a descriptor's second doubleword that LAR gives. The limit's upper bits among them are undefined
/// in the SDM; processors pass them through.
const LAR_MASK: u64 = 0x00ff_ff00;

impl Cpu {
    /// #UD outside protected mode: what LLDT and its kin are there.
    fn require_protected(&mut self) -> Result<(), Abort> {
        if self.protected() { Ok(()) } else { Err(self.raise(Exception::UD)) }
    }

    fn require_cpl0(&mut self) -> Result<(), Abort> {
        if self.state.cpl == 0 { Ok(()) } else { Err(self.raise(Exception::gp(0))) }
    }

    /// User-mode instruction prevention: #GP(0) above level 0 (SDM vol. 3A, 2.5).
    pub(crate) fn check_umip(&mut self) -> Result<(), Abort> {
        if self.state.cr4 & cr4::UMIP != 0 { self.require_cpl0() } else { Ok(()) }
    }
}

fn load_table(cpu: &mut Cpu, op: &Op) -> Result<TableRegister, Abort> {
    cpu.require_cpl0()?;
    let wide = cpu.state.code_size == CodeSize::Bits64;
    let (seg, lin) = (cpu.op_seg(op), cpu.ea(op, if wide { 10 } else { 6 }, false)?);
    let limit = cpu.load(seg, lin)?;
    let at = cpu.wrap_linear(lin.wrapping_add(2));
    let base = match op.size {
        _ if wide => cpu.load::<u64>(seg, at)?,
        2 => u64::from(cpu.load::<u32>(seg, at)? & 0xff_ffff),
        _ => u64::from(cpu.load::<u32>(seg, at)?),
    };
    if !cpu.features.is_canonical(base) {
        return Err(cpu.raise(Exception::gp(0)));
    }
    Ok(TableRegister { base, limit })
}

fn lgdt(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.state.gdtr = load_table(cpu, op)?;
    Ok(Flow::Next)
}

fn lidt(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.state.idtr = load_table(cpu, op)?;
    Ok(Flow::Next)
}

/// SGDT, SIDT. Outside 64-bit mode all 32 bits of the base are stored whatever the operand size.
fn store_table(cpu: &mut Cpu, op: &Op, table: TableRegister) -> Result<Flow, Abort> {
    cpu.check_umip()?;
    let mut image = [0; 10];
    image[..2].copy_from_slice(&table.limit.to_le_bytes());
    image[2..].copy_from_slice(&table.base.to_le_bytes());
    let len = if cpu.state.code_size == CodeSize::Bits64 { 10 } else { 6 };
    let lin = cpu.ea(op, len, true)?;
    cpu.write_bytes(cpu.op_seg(op), lin, &image[..len])?;
    Ok(Flow::Next)
}

fn sgdt(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let table = cpu.state.gdtr;
    store_table(cpu, op, table)
}

fn sidt(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let table = cpu.state.idtr;
    store_table(cpu, op, table)
}

/// The system descriptor that LLDT or LTR loads: of one of `kinds`, in the GDT, present, its base canonical.
fn system_segment(cpu: &mut Cpu, selector: u16, kinds: &[u8]) -> Result<Descriptor, Abort> {
    let fault = Exception::gp(code(selector));
    if selector & 4 != 0 {
        return Err(cpu.raise(fault));
    }
    let descriptor = cpu.descriptor_or(selector, fault)?;
    if !descriptor.is_system() || !kinds.contains(&descriptor.kind()) {
        return Err(cpu.raise(fault));
    }
    if !descriptor.present() {
        return Err(cpu.raise(Exception::np(code(selector))));
    }
    let descriptor = cpu.widen(selector, descriptor, fault)?;
    if !cpu.features.is_canonical(descriptor.base()) {
        return Err(cpu.raise(fault));
    }
    Ok(descriptor)
}

fn lldt(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = cpu.word_operand(op, op.r0)?;
    cpu.state.ldtr = if is_null(selector) {
        Segment::null(selector, 0)
    } else {
        system_segment(cpu, selector, &[kind::LDT])?.segment(selector)
    };
    Ok(Flow::Next)
}

fn ltr(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = cpu.word_operand(op, op.r0)?;
    if is_null(selector) {
        return Err(cpu.raise(Exception::gp(0)));
    }
    let kinds: &[u8] = if cpu.state.long_mode() { &[kind::TSS] } else { &[kind::TSS16, kind::TSS] };
    let tss = system_segment(cpu, selector, kinds)?;
    cpu.change_descriptor_type(&tss, |kind| kind | 2)?;
    let mut tr = tss.segment(selector);
    tr.attributes |= 2;
    cpu.state.tr = tr;
    Ok(Flow::Next)
}

fn sldt(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.require_protected()?;
    cpu.check_umip()?;
    let selector = cpu.state.ldtr.selector;
    cpu.store_word_operand(op, op.r0, selector)?;
    Ok(Flow::Next)
}

fn str(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.require_protected()?;
    cpu.check_umip()?;
    let selector = cpu.state.tr.selector;
    cpu.store_word_operand(op, op.r0, selector)?;
    Ok(Flow::Next)
}

/// The descriptor that `selector` names if code at this level may know of it.
fn visible(cpu: &mut Cpu, selector: u16) -> Result<Option<Descriptor>, Abort> {
    if is_null(selector) {
        return Ok(None);
    }
    let level = cpu.state.cpl.max(rpl(selector));
    let descriptor = cpu.descriptor(selector)?;
    Ok(descriptor.filter(|d| d.is_conforming_code() || d.dpl() >= level))
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    cpu.state.status = cpu.state.status.with(Rflags::ZF, on);
}

/// Writes `value` to register `op.r0` and sets ZF, or clears ZF and leaves the register.
fn answer(cpu: &mut Cpu, op: &Op, value: Option<u64>) -> Result<Flow, Abort> {
    set_zf(cpu, value.is_some());
    match (value, op.size) {
        (Some(value), 2) => cpu.set(op.r0, value as u16),
        (Some(value), 4) => cpu.set(op.r0, value as u32),
        (Some(value), _) => cpu.set(op.r0, value),
        (None, _) => {}
    }
    Ok(Flow::Next)
}

fn lar(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.require_protected()?;
    let selector = cpu.word_operand(op, op.r1)?;
    let long = cpu.state.long_mode();
    let rights = visible(cpu, selector)?.filter(|d| {
        !d.is_system()
            || match d.kind() {
                kind::LDT | kind::TSS | kind::TSS_BUSY | kind::CALL_GATE => true,
                kind::TSS16 | kind::TSS16_BUSY | kind::CALL_GATE16 | kind::TASK_GATE => !long,
                _ => false,
            }
    });
    answer(cpu, op, rights.map(|d| (d.low >> 32) & LAR_MASK))
}

fn lsl(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.require_protected()?;
    let selector = cpu.word_operand(op, op.r1)?;
    let long = cpu.state.long_mode();
    let limited = visible(cpu, selector)?.filter(|d| {
        !d.is_system()
            || match d.kind() {
                kind::LDT | kind::TSS | kind::TSS_BUSY => true,
                kind::TSS16 | kind::TSS16_BUSY => !long,
                _ => false,
            }
    });
    answer(cpu, op, limited.map(|d| u64::from(d.limit())))
}

fn verr(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.require_protected()?;
    let selector = cpu.word_operand(op, op.r0)?;
    let readable = visible(cpu, selector)?.is_some_and(|d| d.is_readable());
    set_zf(cpu, readable);
    Ok(Flow::Next)
}

fn verw(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.require_protected()?;
    let selector = cpu.word_operand(op, op.r0)?;
    let writable = visible(cpu, selector)?.is_some_and(|d| d.is_writable_data());
    set_zf(cpu, writable);
    // Only this form overwrites buffers, whatever the selector is.
    if op.is_memory() {
        cpu.clear_buffers(cpu.verw_clears);
    }
    Ok(Flow::Next)
}

fn arpl(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.require_protected()?;
    let source: u16 = cpu.get(op.r1);
    if op.is_memory() {
        let (seg, lin) = (cpu.op_seg(op), cpu.ea(op, 2, true)?);
        cpu.probe(seg, lin, 2, true)?;
        let old: u16 = cpu.load(seg, lin)?;
        let raise = rpl(old) < rpl(source);
        if raise {
            cpu.store(seg, lin, (old & !3) | (source & 3))?;
        }
        set_zf(cpu, raise);
    } else {
        let old: u16 = cpu.get(op.r0);
        let raise = rpl(old) < rpl(source);
        if raise {
            cpu.set(op.r0, (old & !3) | (source & 3));
        }
        set_zf(cpu, raise);
    }
    Ok(Flow::Next)
}

/// Handler and operand size.
fn form(code: Code) -> Option<(Handler, u8)> {
    Some(match code {
        Code::Lgdt_m1632_16 => (lgdt, 2),
        Code::Lgdt_m1632 => (lgdt, 4),
        Code::Lgdt_m1664 => (lgdt, 8),
        Code::Lidt_m1632_16 => (lidt, 2),
        Code::Lidt_m1632 => (lidt, 4),
        Code::Lidt_m1664 => (lidt, 8),
        Code::Sgdt_m1632_16 | Code::Sgdt_m1632 | Code::Sgdt_m1664 => (sgdt, 0),
        Code::Sidt_m1632_16 | Code::Sidt_m1632 | Code::Sidt_m1664 => (sidt, 0),
        Code::Lldt_rm16 | Code::Lldt_r32m16 | Code::Lldt_r64m16 => (lldt, 2),
        Code::Ltr_rm16 | Code::Ltr_r32m16 | Code::Ltr_r64m16 => (ltr, 2),
        Code::Sldt_rm16 => (sldt, 2),
        Code::Sldt_r32m16 => (sldt, 4),
        Code::Sldt_r64m16 => (sldt, 8),
        Code::Str_rm16 => (str, 2),
        Code::Str_r32m16 => (str, 4),
        Code::Str_r64m16 => (str, 8),
        Code::Lar_r16_rm16 => (lar, 2),
        Code::Lar_r32_r32m16 => (lar, 4),
        Code::Lar_r64_r64m16 => (lar, 8),
        Code::Lsl_r16_rm16 => (lsl, 2),
        Code::Lsl_r32_r32m16 => (lsl, 4),
        Code::Lsl_r64_r64m16 => (lsl, 8),
        Code::Verr_rm16 | Code::Verr_r32m16 | Code::Verr_r64m16 => (verr, 2),
        Code::Verw_rm16 | Code::Verw_r32m16 | Code::Verw_r64m16 => (verw, 2),
        Code::Arpl_rm16_r16 | Code::Arpl_r32m16_r32 => (arpl, 2),
        _ => return None,
    })
}

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let (handler, size) = form(ins.code())?;
    let mut op = op_base(ins, ctx, handler);
    op.size = size;
    if ins.op0_kind() == OpKind::Register {
        op.r0 = gpr(ins.op0_register());
    }
    if ins.op_count() > 1 && ins.op1_kind() == OpKind::Register {
        op.r1 = gpr(ins.op1_register());
    }
    Some(op)
}

#[cfg(test)]
mod tests {
    use crate::buffers::{Buffer, Cleared};
    use crate::exec::testing::{DATA, GP0, Guest, UNMAPPED};
    use crate::state::{CodeSize, reg};

    /// verw [rax]; verw cx
    const MEMORY: &[u8] = &[0x0f, 0x00, 0x28];
    const REGISTER: &[u8] = &[0x0f, 0x00, 0xe9];

    /// Spec M4: only the memory form clears, whatever the selector is; ZF is as ever.
    #[test]
    fn ac_m4_only_verw_with_a_memory_operand_clears() {
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.cpu.verw_clears = Cleared::of(&[Buffer::Fill, Buffer::RegisterFile]);
        guest.set(reg::RAX, DATA);
        guest.finish(REGISTER);
        assert_eq!((guest.cpu.counters.fb_clears, guest.cpu.counters.register_file_clears), (0, 0));
        // A null selector, and one beyond the table.
        for (done, selector) in [(1, 0u16), (2, 0xfff8)] {
            guest.put(DATA, &selector.to_le_bytes());
            guest.finish(MEMORY);
            assert!(!guest.cpu.state.status.zf());
            let counters = guest.cpu.counters;
            assert_eq!((counters.fb_clears, counters.register_file_clears), (done, done));
        }
        guest.cpu.verw_clears = Cleared::NOTHING;
        guest.finish(MEMORY);
        assert_eq!(guest.cpu.counters.fb_clears, 2, "the processor says that it clears nothing");
    }

    #[test]
    fn ac_m4_verw_that_faults_clears_nothing() {
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.cpu.verw_clears = Cleared::of(&[Buffer::Fill]);
        guest.set(reg::RAX, 1 << 63);
        assert_eq!(guest.fault(MEMORY), GP0);
        guest.set(reg::RAX, UNMAPPED);
        assert_eq!(guest.fault(MEMORY).0, crate::exception::vector::PF);
        assert_eq!(guest.cpu.counters.fb_clears, 0);
        let mut real = Guest::new(CodeSize::Bits16);
        real.cpu.verw_clears = Cleared::of(&[Buffer::Fill]);
        // verw [bx+si]
        assert_eq!(real.fault(&[0x0f, 0x00, 0x28]).0, crate::exception::vector::UD);
        assert_eq!(real.cpu.counters.fb_clears, 0);
    }
}
