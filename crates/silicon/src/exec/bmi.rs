//! BMI1 and BMI2: ANDN, BEXTR, BLSI, BLSMSK, BLSR, BZHI, MULX, PDEP, PEXT, RORX, SARX, SHLX, SHRX.
//!
//! The CPU model offers them only where the host has them, and the host executes them.
#![expect(unsafe_code, reason = "inline assembly sets and reads the host's flags")]

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic};

use crate::code::lower::{LowerCtx, gpr, op_base, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::code::thread::next;
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::exec::operand::{by_size, gpr_operand, is_memory, operand_size};
use crate::flags::Status;
use crate::mmu::Word;
use crate::state::reg;

/// An operation with a register or memory operand `x` and a register or immediate operand `y`, in the order of
/// the host's mnemonic that the template gives.
trait Bmi<T> {
    fn apply(x: T, y: T, status: Status) -> (T, Status);
}

macro_rules! bmi {
    ($($name:ident $template:literal)*) => {$(
        struct $name;
        bmi!(@ $name, $template, u32, ":e");
        bmi!(@ $name, $template, u64, ":r");
    )*};
    (@ $name:ident, $template:literal, $t:ty, $m:literal) => {
        impl Bmi<$t> for $name {
            #[inline(always)]
            fn apply(x: $t, y: $t, status: Status) -> ($t, Status) {
                let mut flags = status.0;
                let result: $t;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!(
                        // Names `y` also where the instruction itself has no use for it.
                        concat!("mov {d", $m, "}, {y", $m, "}"),
                        "add al, 127", "sahf",
                        concat!($template, " {d", $m, "}", bmi!(@operands $name, $m)),
                        "lahf", "seto al",
                        x = in(reg) x, y = in(reg) y, d = out(reg) result, inout("ax") flags,
                        options(pure, nomem, nostack)
                    );
                }
                (result, Status(flags))
            }
        }
    };
    // The register operand comes first.
    (@operands Andn, $m:literal) => { bmi!(@yx $m) };
    (@operands Pdep, $m:literal) => { bmi!(@yx $m) };
    (@operands Pext, $m:literal) => { bmi!(@yx $m) };
    // There is no second operand.
    (@operands Blsi, $m:literal) => { bmi!(@x $m) };
    (@operands Blsr, $m:literal) => { bmi!(@x $m) };
    (@operands Blsmsk, $m:literal) => { bmi!(@x $m) };
    // The register or memory operand comes first.
    (@operands $name:ident, $m:literal) => { bmi!(@xy $m) };
    (@yx $m:literal) => { concat!(", {y", $m, "}, {x", $m, "}") };
    (@xy $m:literal) => { concat!(", {x", $m, "}, {y", $m, "}") };
    (@x $m:literal) => { concat!(", {x", $m, "}") };
}
bmi!(Andn "andn" Pdep "pdep" Pext "pext" Blsi "blsi" Blsr "blsr" Blsmsk "blsmsk"
     Bextr "bextr" Bzhi "bzhi" Sarx "sarx" Shlx "shlx" Shrx "shrx");

/// Destination `r0`, register operand `r1`, register operand `r2`.
fn bmi_reg<O: Bmi<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let (result, status) = O::apply(cpu.get(op.r1), cpu.get(op.r2), cpu.state.status);
    cpu.set(op.r0, result);
    cpu.state.status = status;
    next(cpu, op)
}

fn bmi_mem<O: Bmi<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let x = cpu.load_operand(op)?;
    let (result, status) = O::apply(x, cpu.get(op.r2), cpu.state.status);
    cpu.set(op.r0, result);
    cpu.state.status = status;
    next(cpu, op)
}

fn source<T: Word>(cpu: &mut Cpu, op: &Op, memory: bool) -> Result<T, Abort> {
    if memory { cpu.load_operand(op) } else { Ok(cpu.get(op.r1)) }
}

fn rorx<T: Word, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let x: T = source(cpu, op, MEMORY)?;
    let bits = 8 * T::SIZE as u32;
    let count = op.imm as u32 % bits;
    let value = x.to_u64();
    let rotated = if count == 0 { value } else { (value >> count) | (value << (bits - count)) };
    cpu.set(op.r0, T::from_u64(rotated));
    next(cpu, op)
}

/// MULX: RDX times the source, high half to `r0`, low half to `r2`; if they are the same, the high half stays.
fn mulx<T: Word, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let x: T = source(cpu, op, MEMORY)?;
    let d: T = cpu.get(reg::RDX);
    let product = u128::from(x.to_u64()) * u128::from(d.to_u64());
    cpu.set(op.r2, T::from_u64(product as u64));
    cpu.set(op.r0, T::from_u64((product >> (8 * T::SIZE)) as u64));
    next(cpu, op)
}

/// Lowers this file's instructions.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    // Which operands are the register-or-memory one and the register one.
    let (rm, vvvv) = match ins.mnemonic() {
        Mnemonic::Andn | Mnemonic::Pdep | Mnemonic::Pext | Mnemonic::Mulx => (2, Some(1)),
        Mnemonic::Bextr | Mnemonic::Bzhi | Mnemonic::Sarx | Mnemonic::Shlx | Mnemonic::Shrx => (1, Some(2)),
        Mnemonic::Blsi | Mnemonic::Blsr | Mnemonic::Blsmsk | Mnemonic::Rorx => (1, None),
        _ => return None,
    };
    let mut op = op_base(ins, ctx, undefined);
    op.r0 = gpr(gpr_operand(ins, 0)?);
    op.r2 = match vvvv {
        Some(i) => gpr(gpr_operand(ins, i)?),
        None => op.r0,
    };
    let memory = is_memory(ins, rm);
    if !memory {
        op.r1 = gpr(gpr_operand(ins, rm)?);
    }
    if ins.mnemonic() == Mnemonic::Rorx {
        op.imm = u64::from(ins.immediate8());
    }
    op.handler.set(handler(ins.mnemonic(), memory, operand_size(ins, 0))?);
    Some(op)
}

fn handler(mnemonic: Mnemonic, memory: bool, size: usize) -> Option<Handler> {
    macro_rules! pick {
        ($o:ty) => {
            if memory {
                by_size!(size, T in [u32 u64] => bmi_mem::<$o, T>)
            } else {
                by_size!(size, T in [u32 u64] => bmi_reg::<$o, T>)
            }
        };
    }
    Some(match mnemonic {
        Mnemonic::Andn => pick!(Andn),
        Mnemonic::Pdep => pick!(Pdep),
        Mnemonic::Pext => pick!(Pext),
        Mnemonic::Blsi => pick!(Blsi),
        Mnemonic::Blsr => pick!(Blsr),
        Mnemonic::Blsmsk => pick!(Blsmsk),
        Mnemonic::Bextr => pick!(Bextr),
        Mnemonic::Bzhi => pick!(Bzhi),
        Mnemonic::Sarx => pick!(Sarx),
        Mnemonic::Shlx => pick!(Shlx),
        Mnemonic::Shrx => pick!(Shrx),
        Mnemonic::Rorx if memory => by_size!(size, T in [u32 u64] => rorx::<T, true>),
        Mnemonic::Rorx => by_size!(size, T in [u32 u64] => rorx::<T, false>),
        Mnemonic::Mulx if memory => by_size!(size, T in [u32 u64] => mulx::<T, true>),
        Mnemonic::Mulx => by_size!(size, T in [u32 u64] => mulx::<T, false>),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use crate::exec::testing::{DATA, Guest};
    use crate::flags::Rflags;
    use crate::state::{CodeSize, reg};

    #[test]
    fn results() {
        // Code; RAX after. RBX = 0xff00, RCX = 0x0804, RDX = 0x0ff0; memory at RSI holds 0xff00.
        let cases: &[(&[u8], u64)] = &[
            // andn rax, rdx, rbx and from memory
            (&[0xc4, 0xe2, 0xe8, 0xf2, 0xc3], 0xf000),
            (&[0xc4, 0xe2, 0xe8, 0xf2, 0x06], 0xf000),
            // bextr rax, rbx, rcx: 8 bits from bit 4
            (&[0xc4, 0xe2, 0xf0, 0xf7, 0xc3], 0xf0),
            // blsi, blsmsk, blsr rax, rbx
            (&[0xc4, 0xe2, 0xf8, 0xf3, 0xdb], 0x100),
            (&[0xc4, 0xe2, 0xf8, 0xf3, 0xd3], 0x1ff),
            (&[0xc4, 0xe2, 0xf8, 0xf3, 0xcb], 0xfe00),
            // bzhi rax, rbx, rcx: below bit 4
            (&[0xc4, 0xe2, 0xf0, 0xf5, 0xc3], 0),
            // pext and pdep rax, rbx, rdx
            (&[0xc4, 0xe2, 0xe2, 0xf5, 0xc2], 0xf0),
            (&[0xc4, 0xe2, 0xe3, 0xf5, 0xc2], 0),
            // shlx, shrx, sarx eax, ebx, ecx
            (&[0xc4, 0xe2, 0x71, 0xf7, 0xc3], 0xf_f000),
            (&[0xc4, 0xe2, 0x73, 0xf7, 0xc3], 0xff0),
            (&[0xc4, 0xe2, 0x72, 0xf7, 0xc3], 0xff0),
            // rorx eax, ebx, 12
            (&[0xc4, 0xe3, 0x7b, 0xf0, 0xc3, 12], 0xf000_000f),
            // mulx rax, rdi, rbx
            (&[0xc4, 0xe2, 0xc3, 0xf6, 0xc3], 0),
        ];
        for &(code, result) in cases {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.put(DATA, &0xff00u64.to_le_bytes());
            guest.set(reg::RBX, 0xff00).set(reg::RCX, 0x804).set(reg::RDX, 0xff0).set(reg::RSI, DATA);
            guest.set(reg::RAX, !0).finish(code);
            assert_eq!(guest.reg(reg::RAX), result, "{code:02x?}");
        }
    }

    #[test]
    fn shifts_without_flags_keep_them() {
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.set_flags(Rflags::STATUS).finish(&[0xc4, 0xe2, 0x71, 0xf7, 0xc3]);
        assert_eq!(guest.flags(), Rflags::STATUS);
    }

    #[test]
    fn mulx_halves() {
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.set(reg::RDX, 1 << 63).set(reg::RBX, 6).finish(&[0xc4, 0xe2, 0xc3, 0xf6, 0xc3]);
        assert_eq!((guest.reg(reg::RAX), guest.reg(reg::RDI)), (3, 0));
    }
}
