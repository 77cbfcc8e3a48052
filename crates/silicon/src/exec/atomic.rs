//! XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B, with and without LOCK; MOVDIRI and MOVDIR64B.
#![expect(unsafe_code, reason = "inline assembly reads the host's flags")]

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic};

use crate::code::lower::{LowerCtx, gpr, op_base, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::exec::alu::{Arithmetic, add};
use crate::exec::operand::{by_size, gpr_operand, is_memory, operand_size};
use crate::flags::{Rflags, Status};
use crate::mmu::Word;
use crate::state::{Seg, reg};

/// CMPXCHG on the host: destination, source and the accumulator's whole register; gives the new destination,
/// the new accumulator and the flags.
trait CompareExchange: Word {
    fn apply(dest: u64, source: Self, accumulator: u64) -> (u64, u64, Status);
}

macro_rules! compare_exchange {
    ($t:ty, $class:ident, $dm:literal, $m:literal) => {
        impl CompareExchange for $t {
            #[inline(always)]
            fn apply(dest: u64, source: $t, accumulator: u64) -> (u64, u64, Status) {
                let (mut new, mut rax) = (dest, accumulator);
                let flags: u16;
                // SAFETY: register arithmetic only; MOV leaves the flags alone.
                unsafe {
                    asm!(
                        concat!("cmpxchg {d", $dm, "}, {s", $m, "}"),
                        "mov {f:r}, rax", "lahf", "seto al", "xchg {f:r}, rax",
                        d = inout(reg) new, s = in($class) source, inout("rax") rax,
                        f = out(reg) flags,
                        options(pure, nomem, nostack)
                    );
                }
                (new, rax, Status(flags))
            }
        }
    };
}
compare_exchange!(u8, reg_byte, ":l", "");
compare_exchange!(u16, reg, ":x", ":x");
compare_exchange!(u32, reg, ":e", ":e");
compare_exchange!(u64, reg, ":r", ":r");

/// CMPXCHG with a register. Bytes may be high ones, so that only the byte itself is taken and put back.
fn cmpxchg_reg<T: CompareExchange>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let accumulator = cpu.get(reg::RAX);
    let old = if T::SIZE == 1 { u64::from(cpu.get::<u8>(op.r0)) } else { cpu.get::<u64>(op.r0) };
    let (new, rax, status) = T::apply(old, cpu.get(op.r1), accumulator);
    // The accumulator first: as destination it always compares equal and is exchanged.
    cpu.set(reg::RAX, rax);
    if T::SIZE == 1 {
        cpu.set(op.r0, new as u8);
    } else {
        cpu.set(op.r0, new);
    }
    cpu.state.status = status;
    Ok(Flow::Next)
}

fn cmpxchg_mem<T: CompareExchange>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let lin = cpu.ea(op, T::SIZE, true)?;
    let seg = cpu.op_seg(op);
    let accumulator: u64 = cpu.get(reg::RAX);
    let source: T = cpu.get(op.r1);
    let (rax, status) = if op.has(Op::LOCK) {
        let mut after = (accumulator, Status::default());
        cpu.locked(seg, lin, |old: T| {
            let (_, rax, status) = T::apply(old.to_u64(), source, accumulator);
            after = (rax, status);
            status.zf().then_some(source)
        })?;
        after
    } else {
        cpu.update(seg, lin, |old: T| {
            let (new, rax, status) = T::apply(old.to_u64(), source, accumulator);
            (T::from_u64(new), (rax, status))
        })?
    };
    cpu.set(reg::RAX, rax);
    cpu.state.status = status;
    Ok(Flow::Next)
}

fn xadd_reg<T: Arithmetic>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let old: T = cpu.get(op.r0);
    let (sum, status) = add(old, cpu.get(op.r1));
    cpu.set(op.r1, old);
    cpu.set(op.r0, sum);
    cpu.state.status = status;
    Ok(Flow::Next)
}

fn xadd_mem<T: Arithmetic>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let lin = cpu.ea(op, T::SIZE, true)?;
    let (seg, addend): (Seg, T) = (cpu.op_seg(op), cpu.get(op.r1));
    let (old, status) = if op.has(Op::LOCK) {
        let mut after = Status::default();
        let old = cpu.locked(seg, lin, |old: T| {
            let (sum, status) = add(old, addend);
            after = status;
            Some(sum)
        })?;
        (old, after)
    } else {
        cpu.update(seg, lin, |old: T| {
            let (sum, status) = add(old, addend);
            (sum, (old, status))
        })?
    };
    cpu.set(op.r1, old);
    cpu.state.status = status;
    Ok(Flow::Next)
}

fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let lin = cpu.ea(op, 8, true)?;
    let pair =
        |cpu: &Cpu, high, low| (u64::from(cpu.get::<u32>(high)) << 32) | u64::from(cpu.get::<u32>(low));
    let expected = pair(cpu, reg::RDX, reg::RAX);
    let new = pair(cpu, reg::RCX, reg::RBX);
    let seg = cpu.op_seg(op);
    let old = if op.has(Op::LOCK) {
        cpu.locked(seg, lin, |old: u64| (old == expected).then_some(new))?
    } else {
        cpu.update(seg, lin, |old: u64| (if old == expected { new } else { old }, old))?
    };
    if old != expected {
        cpu.set(reg::RAX, old as u32);
        cpu.set(reg::RDX, (old >> 32) as u32);
    }
    cpu.state.status = cpu.state.status.with(Rflags::ZF, old == expected);
    Ok(Flow::Next)
}

fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let lin = cpu.ea(op, 16, true)?;
    if lin & 15 != 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    let pair =
        |cpu: &Cpu, high, low| (u128::from(cpu.get::<u64>(high)) << 64) | u128::from(cpu.get::<u64>(low));
    let expected = pair(cpu, reg::RDX, reg::RAX);
    let new = pair(cpu, reg::RCX, reg::RBX);
    let old = cpu.locked_compare_exchange_16(cpu.op_seg(op), lin, expected, new)?;
    if old != expected {
        cpu.set(reg::RAX, old as u64);
        cpu.set(reg::RDX, (old >> 64) as u64);
    }
    cpu.state.status = cpu.state.status.with(Rflags::ZF, old == expected);
    Ok(Flow::Next)
}

fn movdiri<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let value: T = cpu.get(op.r1);
    cpu.store_operand(op, value)?;
    Ok(Flow::Next)
}

/// MOVDIR64B: 64 bytes from memory to ES:`r0`, which must be aligned (SDM vol. 2).
fn movdir64b(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let from = cpu.ea(op, 64, false)?;
    let mut data = [0; 64];
    cpu.read_bytes(cpu.op_seg(op), from, &mut data)?;
    let offset = cpu.get::<u64>(op.r0) & op.imm;
    let to = cpu.linearize(Seg::Es, offset, 64, true)?;
    if to & 63 != 0 {
        return Err(cpu.raise(Exception::gp(0)));
    }
    cpu.write_bytes(Seg::Es, to, &data)?;
    Ok(Flow::Next)
}

fn lower_exchange(ins: &Instruction, mut op: Op, compare: bool) -> Option<Op> {
    let size = operand_size(ins, 0);
    op.r1 = gpr(gpr_operand(ins, 1)?);
    let handler: Handler = if is_memory(ins, 0) {
        if compare { by_size!(size, T => cmpxchg_mem::<T>) } else { by_size!(size, T => xadd_mem::<T>) }
    } else {
        op.r0 = gpr(gpr_operand(ins, 0)?);
        if compare { by_size!(size, T => cmpxchg_reg::<T>) } else { by_size!(size, T => xadd_reg::<T>) }
    };
    op.handler.set(handler);
    Some(op)
}

/// Lowers this file's instructions.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let mut op = op_base(ins, ctx, undefined);
    let handler: Handler = match ins.mnemonic() {
        Mnemonic::Cmpxchg => return lower_exchange(ins, op, true),
        Mnemonic::Xadd => return lower_exchange(ins, op, false),
        Mnemonic::Cmpxchg8b => cmpxchg8b,
        Mnemonic::Cmpxchg16b => cmpxchg16b,
        Mnemonic::Movdiri => {
            op.r1 = gpr(gpr_operand(ins, 1)?);
            by_size!(operand_size(ins, 1), T in [u32 u64] => movdiri::<T>)
        }
        Mnemonic::Movdir64b => {
            let register = gpr_operand(ins, 0)?;
            op.r0 = gpr(register);
            op.imm = u64::MAX >> (64 - 8 * register.size());
            movdir64b
        }
        _ => return None,
    };
    op.handler.set(handler);
    Some(op)
}

#[cfg(test)]
mod tests {
    use crate::exec::testing::{DATA, GP0, Guest};
    use crate::flags::Rflags;
    use crate::state::{CodeSize, reg};

    #[test]
    fn cmpxchg_in_memory() {
        // Code, memory and RAX before; memory, RAX and ZF after. RCX is 0x1111_2222_3333_4444.
        let cases: &[(&[u8], u64, u64, u64, u64, bool)] = &[
            (&[0x48, 0x0f, 0xb1, 0x0b], 5, 5, 0x1111_2222_3333_4444, 5, true),
            (&[0xf0, 0x48, 0x0f, 0xb1, 0x0b], 5, 6, 5, 5, false),
            (&[0x0f, 0xb1, 0x0b], 0x9_0000_0005, 0x7_0000_0006, 0x9_0000_0005, 5, false),
            (&[0xf0, 0x0f, 0xb1, 0x0b], 0x9_0000_0005, 5, 0x9_3333_4444, 5, true),
            (&[0xf0, 0x66, 0x0f, 0xb1, 0x0b], 0x9_0005, 0x8_0006, 0x9_0005, 0x8_0005, false),
            (&[0xf0, 0x0f, 0xb0, 0x2b], 0x905, 5, 0x944, 5, true),
        ];
        for &(code, memory, rax, memory_after, rax_after, zf) in cases {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.put(DATA, &memory.to_le_bytes());
            guest.set(reg::RAX, rax).set(reg::RBX, DATA).set(reg::RCX, 0x1111_2222_3333_4444);
            guest.set(reg::RBP, 0x44).finish(code);
            let got = (guest.word(DATA, 8), guest.reg(reg::RAX), guest.flags().contains(Rflags::ZF));
            // The last case stores CH, which is 0x44 too.
            assert_eq!(got, (memory_after, rax_after, zf), "{code:02x?}");
        }
    }

    #[test]
    fn cmpxchg_of_registers() {
        let mut guest = Guest::new(CodeSize::Bits64);
        // cmpxchg bl, cl; equal
        guest.set(reg::RAX, 0x105).set(reg::RBX, 0x205).set(reg::RCX, 0x77).finish(&[0x0f, 0xb0, 0xcb]);
        assert_eq!((guest.reg(reg::RAX), guest.reg(reg::RBX)), (0x105, 0x277));
        // cmpxchg bh, cl; not equal
        guest.set(reg::RBX, 0x9955).finish(&[0x0f, 0xb0, 0xcf]);
        assert_eq!((guest.reg(reg::RAX), guest.reg(reg::RBX)), (0x199, 0x9955));
        // cmpxchg rax, rcx always succeeds
        guest.finish(&[0x48, 0x0f, 0xb1, 0xc8]);
        assert_eq!(guest.reg(reg::RAX), 0x77);
    }

    #[test]
    fn exchange_and_add() {
        for code in [&[0x48, 0x0f, 0xc1, 0x03][..], &[0xf0, 0x48, 0x0f, 0xc1, 0x03]] {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.put(DATA, &(!0u64).to_le_bytes());
            guest.set(reg::RAX, 3).set(reg::RBX, DATA).finish(code);
            assert_eq!((guest.reg(reg::RAX), guest.word(DATA, 8)), (!0, 2));
            assert!(guest.flags().contains(Rflags::CF));
        }
        // xadd eax, eax doubles
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.set(reg::RAX, 21).finish(&[0x0f, 0xc1, 0xc0]);
        assert_eq!(guest.reg(reg::RAX), 42);
    }

    #[test]
    fn double_width() {
        for code in [&[0x0f, 0xc7, 0x0e][..], &[0xf0, 0x0f, 0xc7, 0x0e]] {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.put(DATA, &0x2_0000_0001u64.to_le_bytes());
            guest.set(reg::RSI, DATA).set(reg::RCX, 4).set(reg::RBX, 3).finish(code);
            assert_eq!((guest.reg(reg::RAX), guest.reg(reg::RDX)), (1, 2));
            assert!(!guest.flags().contains(Rflags::ZF));
            guest.finish(code);
            assert_eq!(guest.word(DATA, 8), 0x4_0000_0003);
            assert!(guest.flags().contains(Rflags::ZF));
        }
        let mut guest = Guest::new(CodeSize::Bits64);
        let wide = [0xf0, 0x48, 0x0f, 0xc7, 0x0e];
        guest.set(reg::RSI, DATA).set(reg::RCX, 4).set(reg::RBX, 3).finish(&wide);
        assert_eq!((guest.word(DATA, 8), guest.word(DATA + 8, 8)), (3, 4));
        guest.set(reg::RSI, DATA + 8);
        assert_eq!(guest.fault(&wide), GP0);
    }

    #[test]
    fn direct_stores() {
        let mut guest = Guest::new(CodeSize::Bits64);
        // movdiri [rsi], rax
        guest.set(reg::RSI, DATA).set(reg::RAX, 0x77).finish(&[0x48, 0x0f, 0x38, 0xf9, 0x06]);
        assert_eq!(guest.word(DATA, 8), 0x77);
        // movdir64b rax, [rsi]
        let code = [0x66, 0x0f, 0x38, 0xf8, 0x06];
        guest.set(reg::RAX, DATA + 64).finish(&code);
        assert_eq!(guest.word(DATA + 64, 8), 0x77);
        guest.set(reg::RAX, DATA + 8);
        assert_eq!(guest.fault(&code), GP0);
    }
}
