//! MOV, MOVZX, MOVSX, MOVSXD, LEA, XCHG, CMOVcc, SETcc, BSWAP, MOVBE, XLAT, the CBW family, MOVNTI, the no-ops
//! and the fences.
#![expect(unsafe_code, reason = "BSWAP of 16 bits is what the host makes of it")]

use std::arch::asm;
use std::sync::atomic::{Ordering, fence};

use iced_x86::{Code, Instruction, Mnemonic};

use crate::code::lower::{LowerCtx, gpr, op_base, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::code::thread::next;
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::exec::address::{Address, AnyAddress, store_and_go, with_loaded};
use crate::exec::operand::{
    Form, by_address, by_condition, by_size, condition, form, gpr_operand, is_memory, operand_size,
};
use crate::mmu::Word;
use crate::state::reg;
use crate::vmx::Exit;

/// Sign-extends `value` to 64 bits.
#[inline(always)]
pub(crate) fn sign_extend<T: Word>(value: T) -> u64 {
    let shift = 64 - 8 * T::SIZE as u32;
    ((value.to_u64() << shift) as i64 >> shift) as u64
}

fn mov_reg_reg<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.set::<T>(op.r0, cpu.get(op.r1));
    next(cpu, op)
}

fn mov_reg_imm<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.set(op.r0, T::from_u64(op.imm));
    next(cpu, op)
}

fn mov_reg_mem<T: Word, A: Address>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    with_loaded::<A, T>(cpu, op, |cpu, op, value: T| cpu.set(op.r0, value))
}

fn mov_mem_reg<T: Word, A: Address>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let value: T = cpu.get(op.r1);
    store_and_go::<A, T>(cpu, op, value)
}

fn mov_mem_imm<T: Word, A: Address>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    store_and_go::<A, T>(cpu, op, T::from_u64(op.imm))
}

fn movzx_reg<S: Word, D: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let value: S = cpu.get(op.r1);
    cpu.set(op.r0, D::from_u64(value.to_u64()));
    next(cpu, op)
}

fn movzx_mem<S: Word, D: Word, A: Address>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    with_loaded::<A, S>(cpu, op, |cpu, op, value: S| cpu.set(op.r0, D::from_u64(value.to_u64())))
}

fn movsx_reg<S: Word, D: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let value: S = cpu.get(op.r1);
    cpu.set(op.r0, D::from_u64(sign_extend(value)));
    next(cpu, op)
}

fn movsx_mem<S: Word, D: Word, A: Address>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    with_loaded::<A, S>(cpu, op, |cpu, op, value: S| cpu.set(op.r0, D::from_u64(sign_extend(value))))
}

fn lea<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.set(op.r0, T::from_u64(cpu.offset(op)));
    next(cpu, op)
}

/// LEA whose address size is smaller than its operand size.
fn lea_masked<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.set(op.r0, T::from_u64(cpu.offset(op) & op.addr_mask()));
    next(cpu, op)
}

fn xchg_reg_reg<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let (a, b): (T, T) = (cpu.get(op.r0), cpu.get(op.r1));
    cpu.set(op.r0, b);
    cpu.set(op.r1, a);
    next(cpu, op)
}

/// XCHG with memory is locked with or without the prefix.
fn xchg_mem_reg<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let lin = cpu.ea(op, T::SIZE, true)?;
    let new: T = cpu.get(op.r1);
    let old = cpu.locked(cpu.op_seg(op), lin, |_| Some(new))?;
    cpu.set(op.r1, old);
    next(cpu, op)
}

fn cmov_reg<T: Word, const CC: u8>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let source = if cpu.state.status.condition(CC) { op.r1 } else { op.r0 };
    // Written in either case: a 32-bit CMOV clears the upper half even when the condition is false.
    cpu.set::<T>(op.r0, cpu.get(source));
    next(cpu, op)
}

fn cmov_mem<T: Word, const CC: u8>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    with_loaded::<AnyAddress, T>(cpu, op, |cpu, op, value: T| {
        let old: T = cpu.get(op.r0);
        cpu.set(op.r0, if cpu.state.status.condition(CC) { value } else { old });
    })
}

fn set_reg<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.set(op.r0, u8::from(cpu.state.status.condition(CC)));
    next(cpu, op)
}

fn set_mem<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let value = u8::from(cpu.state.status.condition(CC));
    store_and_go::<AnyAddress, _>(cpu, op, value)
}

fn bswap16(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let mut value: u16 = cpu.get(op.r0);
    // SAFETY: register arithmetic only: BSWAP AX, which the SDM leaves undefined and assemblers refuse.
    unsafe {
        asm!(".byte 0x66, 0x0f, 0xc8", inout("ax") value, options(pure, nomem, nostack, preserves_flags))
    };
    cpu.set(op.r0, value);
    next(cpu, op)
}

fn bswap32(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.set(op.r0, cpu.get::<u32>(op.r0).swap_bytes());
    next(cpu, op)
}

fn bswap64(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.set(op.r0, cpu.get::<u64>(op.r0).swap_bytes());
    next(cpu, op)
}

#[inline(always)]
fn swap_bytes<T: Word>(value: T) -> T {
    T::from_u64(value.to_u64().swap_bytes() >> (64 - 8 * T::SIZE))
}

fn movbe_load<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    with_loaded::<AnyAddress, T>(cpu, op, |cpu, op, value: T| cpu.set(op.r0, swap_bytes(value)))
}

fn movbe_store<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let value = swap_bytes::<T>(cpu.get(op.r1));
    store_and_go::<AnyAddress, _>(cpu, op, value)
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let al: u8 = cpu.get(reg::RAX);
    let offset = cpu.offset(op).wrapping_add(u64::from(al));
    let lin = cpu.ea_at(op, offset, 1, false)?;
    let value: u8 = cpu.load(cpu.op_seg(op), lin)?;
    cpu.set(reg::RAX, value);
    next(cpu, op)
}

/// CBW, CWDE, CDQE.
fn widen_rax<S: Word, D: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let value: S = cpu.get(reg::RAX);
    cpu.set(reg::RAX, D::from_u64(sign_extend(value)));
    next(cpu, op)
}

/// CWD, CDQ, CQO.
fn sign_to_rdx<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let value: T = cpu.get(reg::RAX);
    let sign = (sign_extend(value) as i64 >> 63) as u64;
    cpu.set(reg::RDX, T::from_u64(sign));
    next(cpu, op)
}

fn nop(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    next(cpu, op)
}

fn pause(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    if cpu.controls.pause_exiting {
        return Err(cpu.exit(Exit::Pause));
    }
    std::hint::spin_loop();
    next(cpu, op)
}

/// Guest accesses are host accesses, so the host's own fence orders them.
fn full_fence(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    fence(Ordering::SeqCst);
    next(cpu, op)
}

fn lower_mov(ins: &Instruction, mut op: Op) -> Option<Op> {
    let size = operand_size(ins, 0);
    let handler: Handler = match form(ins, &mut op)? {
        Form::RegReg => by_size!(size, T => mov_reg_reg::<T>),
        Form::RegImm => by_size!(size, T => mov_reg_imm::<T>),
        Form::RegMem => by_address!(&op, A => by_size!(size, T => mov_reg_mem::<T, A>)),
        Form::MemReg => by_address!(&op, A => by_size!(size, T => mov_mem_reg::<T, A>)),
        Form::MemImm => by_address!(&op, A => by_size!(size, T => mov_mem_imm::<T, A>)),
    };
    op.handler.set(handler);
    Some(op)
}

fn lower_extend(ins: &Instruction, mut op: Op, signed: bool) -> Option<Op> {
    let (to, from) = (operand_size(ins, 0), operand_size(ins, 1));
    let memory = form(ins, &mut op)? == Form::RegMem;
    macro_rules! pick {
        ($s:ty) => {
            match (signed, memory) {
                (false, false) => by_size!(to, D in [u16 u32 u64] => movzx_reg::<$s, D>),
                (false, true) => by_address!(&op, A => by_size!(to, D in [u16 u32 u64] => movzx_mem::<$s, D, A>)),
                (true, false) => by_size!(to, D in [u16 u32 u64] => movsx_reg::<$s, D>),
                (true, true) => by_address!(&op, A => by_size!(to, D in [u16 u32 u64] => movsx_mem::<$s, D, A>)),
            }
        };
    }
    op.handler.set(match from {
        1 => pick!(u8),
        2 => pick!(u16),
        4 => pick!(u32),
        _ => return None,
    });
    Some(op)
}

fn lower_lea(ins: &Instruction, mut op: Op) -> Option<Op> {
    let size = operand_size(ins, 0);
    op.r0 = gpr(gpr_operand(ins, 0)?);
    let masked = (op.has(Op::ADDR32) && size == 8) || (op.has(Op::ADDR16) && size > 2);
    op.handler.set(if masked {
        by_size!(size, T in [u16 u32 u64] => lea_masked::<T>)
    } else {
        by_size!(size, T in [u16 u32 u64] => lea::<T>)
    });
    Some(op)
}

fn lower_xchg(ins: &Instruction, mut op: Op) -> Option<Op> {
    let size = operand_size(ins, 0);
    let form = form(ins, &mut op)?;
    op.handler.set(match form {
        Form::MemReg => by_size!(size, T => xchg_mem_reg::<T>),
        _ => by_size!(size, T => xchg_reg_reg::<T>),
    });
    Some(op)
}

fn lower_movbe(ins: &Instruction, mut op: Op) -> Option<Op> {
    let size = operand_size(ins, 0);
    let form = form(ins, &mut op)?;
    op.handler.set(match form {
        Form::RegMem => by_size!(size, T in [u16 u32 u64] => movbe_load::<T>),
        _ => by_size!(size, T in [u16 u32 u64] => movbe_store::<T>),
    });
    Some(op)
}

fn is_cmov(code: Code) -> bool {
    (Code::Cmovo_r16_rm16..=Code::Cmovg_r64_rm64).contains(&code)
}

fn is_set(code: Code) -> bool {
    (Code::Seto_rm8..=Code::Setg_rm8).contains(&code)
}

fn lower_cmov(ins: &Instruction, mut op: Op) -> Option<Op> {
    let size = operand_size(ins, 0);
    let cc = condition(ins)?;
    let form = form(ins, &mut op)?;
    op.handler.set(match form {
        Form::RegMem => by_condition!(cc, CC => by_size!(size, T in [u16 u32 u64] => cmov_mem::<T, CC>)),
        _ => by_condition!(cc, CC => by_size!(size, T in [u16 u32 u64] => cmov_reg::<T, CC>)),
    });
    Some(op)
}

fn lower_set(ins: &Instruction, mut op: Op) -> Option<Op> {
    let cc = condition(ins)?;
    if is_memory(ins, 0) {
        op.handler.set(by_condition!(cc, CC => set_mem::<CC>));
    } else {
        op.r0 = gpr(gpr_operand(ins, 0)?);
        op.handler.set(by_condition!(cc, CC => set_reg::<CC>));
    }
    Some(op)
}

/// Instructions that do nothing at all.
pub(crate) fn is_nop(ins: &Instruction) -> bool {
    matches!(
        ins.mnemonic(),
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        // RDSSP is a no-op as long as shadow stacks are off, and this processor has none.
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        | Mnemonic::Cldemote
    )
}

/// Instructions that do nothing but order memory, or nothing at all.
fn lower_nop(ins: &Instruction) -> Option<Handler> {
    Some(match ins.mnemonic() {
        _ if is_nop(ins) => nop,
        Mnemonic::Pause => pause,
        Mnemonic::Mfence | Mnemonic::Lfence | Mnemonic::Sfence => full_fence,
        _ => return None,
    })
}

/// Lowers this file's instructions.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let mut op = op_base(ins, ctx, undefined);
    let handler: Handler = match ins.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movnti => return lower_mov(ins, op),
        Mnemonic::Movzx => return lower_extend(ins, op, false),
        Mnemonic::Movsx => return lower_extend(ins, op, true),
        Mnemonic::Movsxd if operand_size(ins, 1) == operand_size(ins, 0) => return lower_mov(ins, op),
        Mnemonic::Movsxd => return lower_extend(ins, op, true),
        Mnemonic::Lea => return lower_lea(ins, op),
        Mnemonic::Xchg => return lower_xchg(ins, op),
        Mnemonic::Movbe => return lower_movbe(ins, op),
        Mnemonic::Bswap => {
            op.r0 = gpr(gpr_operand(ins, 0)?);
            match operand_size(ins, 0) {
                2 => bswap16,
                4 => bswap32,
                _ => bswap64,
            }
        }
        Mnemonic::Xlatb => {
            // iced-x86 names AL as the index; it is added by the handler, being a byte.
            op.index = reg::ZERO;
            xlat
        }
        Mnemonic::Cbw => widen_rax::<u8, u16>,
        Mnemonic::Cwde => widen_rax::<u16, u32>,
        Mnemonic::Cdqe => widen_rax::<u32, u64>,
        Mnemonic::Cwd => sign_to_rdx::<u16>,
        Mnemonic::Cdq => sign_to_rdx::<u32>,
        Mnemonic::Cqo => sign_to_rdx::<u64>,
        _ if is_cmov(ins.code()) => return lower_cmov(ins, op),
        _ if is_set(ins.code()) => return lower_set(ins, op),
        _ => lower_nop(ins)?,
    };
    op.handler.set(handler);
    Some(op)
}

#[cfg(test)]
mod tests {
    use crate::exec::testing::{DATA, Guest};
    use crate::flags::Rflags;
    use crate::state::{CodeSize, reg};

    #[test]
    fn results_in_rax() {
        // Code, RAX before, RBX before, flags before, RAX after. Memory at DATA holds 0x8899aabbccddeeff.
        let none = Rflags::empty();
        let cases: &[(&[u8], u64, u64, Rflags, u64)] = &[
            (&[0x48, 0x89, 0xd8], 1, 2, none, 2),
            (&[0x89, 0xd8], !0, 0x1_0000_0002, none, 2),
            (&[0x88, 0xdc], 0x1111, 0x22, none, 0x2211),
            (&[0x88, 0xf8], 0x1111, 0x2233, none, 0x1122),
            (&[0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8], 0, 0, none, 0x0807_0605_0403_0201),
            (&[0x48, 0xc7, 0xc0, 0xfe, 0xff, 0xff, 0xff], 0, 0, none, !1),
            (&[0x0f, 0xb6, 0x03], !0, DATA, none, 0xff),
            (&[0x66, 0x0f, 0xb6, 0x03], 0x11_0000, DATA, none, 0x11_00ff),
            (&[0x48, 0x0f, 0xbe, 0x03], 0, DATA, none, !0),
            (&[0x0f, 0xbf, 0x03], 0, DATA, none, 0xffff_eeff),
            (&[0x48, 0x63, 0x03], 0, DATA, none, 0xffff_ffff_ccdd_eeff),
            (&[0x0f, 0xb6, 0xc7], 0, 0x1234, none, 0x12),
            (&[0x48, 0x8d, 0x44, 0x9b, 4], 0, 3, none, 19),
            (&[0x67, 0x48, 0x8d, 0x43, 0xff], 0, 0, none, 0xffff_ffff),
            (&[0x0f, 0xc8], 0x1122_3344, 0, none, 0x4433_2211),
            (&[0x48, 0x0f, 0xc8], 0x11, 0, none, 0x11 << 56),
            (&[0x0f, 0x38, 0xf0, 0x03], 0, DATA, none, 0xffee_ddcc),
            (&[0x0f, 0x44, 0xc3], !0, 7, none, 0xffff_ffff),
            (&[0x0f, 0x44, 0xc3], !0, 7, Rflags::ZF, 7),
            (&[0x48, 0x0f, 0x4c, 0xc3], 9, 7, Rflags::SF, 7),
            (&[0x48, 0x0f, 0x4c, 0xc3], 9, 7, Rflags::SF | Rflags::OF, 9),
            (&[0x0f, 0x97, 0xc0], 0x100, 0, none, 0x101),
            (&[0x0f, 0x97, 0xc4], 0x1ff, 0, Rflags::CF, 0xff),
            (&[0x98], 0xffff_0000_8000, 0, none, 0xffff_8000),
            (&[0x66, 0x98], 0x1_0080, 0, none, 0x1_ff80),
            (&[0x48, 0x98], 0x8000_0000, 0, none, 0xffff_ffff_8000_0000),
            (&[0xd7], 1, DATA, none, 0xee),
            (&[0x48, 0x87, 0x03], 1, DATA, none, 0x8899_aabb_ccdd_eeff),
            (&[0x93], 1, !0, none, 0xffff_ffff),
            (&[0x90], !0, 0, none, !0),
            (&[0x48, 0xa1, 0, 0x80, 0, 0, 0, 0, 0, 0], 0, 0, none, 0x8899_aabb_ccdd_eeff),
        ];
        for &(code, rax, rbx, flags, after) in cases {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.put(DATA, &0x8899_aabb_ccdd_eeff_u64.to_le_bytes());
            guest.set(reg::RAX, rax).set(reg::RBX, rbx).set_flags(flags).finish(code);
            assert_eq!(guest.reg(reg::RAX), after, "{code:02x?}");
            assert_eq!(guest.flags(), flags, "{code:02x?}");
        }
    }

    #[test]
    fn sign_goes_to_rdx() {
        for (code, rax, rdx) in [
            (&[0x48, 0x99][..], 1 << 63, !0),
            (&[0x99], 1 << 31, 0xffff_ffff),
            (&[0x66, 0x99], 0x8000, 0x5555_5555_5555_ffff),
            (&[0x99], 1, 0),
        ] {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.set(reg::RAX, rax).set(reg::RDX, 0x5555_5555_5555_5555).finish(code);
            assert_eq!(guest.reg(reg::RDX), rdx, "{code:02x?}");
        }
    }

    #[test]
    fn sixteen_bit_addresses_wrap() {
        let mut guest = Guest::new(CodeSize::Bits16);
        guest.put(0x8010, &[0x5a]);
        // mov al, [bx+si]
        guest.set(reg::RBX, 0xffff).set(reg::RSI, 0x8011).finish(&[0x8a, 0x00]);
        assert_eq!(guest.reg(reg::RAX) & 0xff, 0x5a);
    }
}
