//! MUL, IMUL, DIV, IDIV.
//!
//! The host multiplies and divides with the guest's flags loaded, so that flags that the SDM calls undefined
//! come out as the host's silicon has them. A division that would fault is found before the host tries it.
#![expect(unsafe_code, reason = "inline assembly sets and reads the host's flags")]

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic};

use crate::code::lower::{LowerCtx, gpr, op_base, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::code::thread::next;
use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::exec::mov::sign_extend;
use crate::exec::operand::{by_size, gpr_operand, is_immediate, is_memory, operand_size};
use crate::flags::Status;
use crate::mmu::Word;
use crate::state::reg;

/// Multiplication and division of a double word in two halves, at one width. For bytes the halves are AL and
/// AH, for the others the A and D registers.
trait Wide: Word {
    /// `a * b` as low half, high half, flags.
    fn mul(a: Self, b: Self, status: Status) -> (Self, Self, Status);
    /// Likewise, signed.
    fn imul(a: Self, b: Self, status: Status) -> (Self, Self, Status);
    /// Quotient and remainder of `high:low / b`, which must not overflow.
    fn div(low: Self, high: Self, b: Self, status: Status) -> (Self, Self, Status);
    /// Likewise, signed.
    fn idiv(low: Self, high: Self, b: Self, status: Status) -> (Self, Self, Status);
    /// The low half of the signed product, and flags (the two-operand IMUL).
    fn imul_low(a: Self, b: Self, status: Status) -> (Self, Status);
}

macro_rules! wide_multiply {
    ($method:ident, $template:literal, $a:literal, $m:literal) => {
        #[inline(always)]
        fn $method(a: Self, b: Self, status: Status) -> (Self, Self, Status) {
            let mut flags = status.0;
            let (low, high): (Self, Self);
            // SAFETY: register arithmetic only. MOV leaves the flags alone.
            unsafe {
                asm!(
                    "add al, 127", "sahf", concat!("mov ", $a, ", {a", $m, "}"),
                    concat!($template, " {b", $m, "}"),
                    concat!("mov {a", $m, "}, ", $a), "lahf", "seto al",
                    a = inout(reg) a => low, b = in(reg) b, inout("ax") flags, out("rdx") high,
                    options(pure, nomem, nostack)
                );
            }
            (low, high, Status(flags))
        }
    };
}

macro_rules! wide_divide {
    ($method:ident, $template:literal, $a:literal, $m:literal) => {
        #[inline(always)]
        fn $method(low: Self, high: Self, b: Self, status: Status) -> (Self, Self, Status) {
            let mut flags = status.0;
            let (quotient, remainder): (Self, Self);
            // SAFETY: register arithmetic only; the caller has seen that the quotient fits.
            unsafe {
                asm!(
                    "add al, 127", "sahf", concat!("mov ", $a, ", {a", $m, "}"),
                    concat!($template, " {b", $m, "}"),
                    concat!("mov {a", $m, "}, ", $a), "lahf", "seto al",
                    a = inout(reg) low => quotient, b = in(reg) b, inout("ax") flags,
                    inout("rdx") high => remainder,
                    options(pure, nomem, nostack)
                );
            }
            (quotient, remainder, Status(flags))
        }
    };
}

macro_rules! imul_low {
    ($m:literal) => {
        #[inline(always)]
        fn imul_low(mut a: Self, b: Self, status: Status) -> (Self, Status) {
            let mut flags = status.0;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!(
                    "add al, 127", "sahf", concat!("imul {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    a = inout(reg) a, b = in(reg) b, inout("ax") flags,
                    options(pure, nomem, nostack)
                );
            }
            (a, Status(flags))
        }
    };
}

macro_rules! wide {
    ($t:ty, $a:literal, $m:literal) => {
        impl Wide for $t {
            wide_multiply!(mul, "mul", $a, $m);
            wide_multiply!(imul, "imul", $a, $m);
            wide_divide!(div, "div", $a, $m);
            wide_divide!(idiv, "idiv", $a, $m);
            imul_low!($m);
        }
    };
}
wide!(u16, "ax", ":x");
wide!(u32, "eax", ":e");
wide!(u64, "rax", ":r");

macro_rules! bytes {
    ($method:ident, $template:literal) => {
        /// AX, and flags.
        #[inline(always)]
        fn $method(ax: u16, b: u8, status: Status) -> (u16, Status) {
            let mut flags = status.0;
            let result: u16;
            // SAFETY: register arithmetic only; callers that divide have seen that the quotient fits.
            unsafe {
                asm!(
                    "add al, 127", "sahf", "mov ax, {a:x}", concat!($template, " {b}"),
                    "mov {a:x}, ax", "lahf", "seto al",
                    a = inout(reg) ax => result, b = in(reg_byte) b, inout("ax") flags,
                    options(pure, nomem, nostack)
                );
            }
            (result, Status(flags))
        }
    };
}
bytes!(mul_bytes, "mul");
bytes!(imul_bytes, "imul");
bytes!(div_bytes, "div");
bytes!(idiv_bytes, "idiv");

impl Wide for u8 {
    #[inline(always)]
    fn mul(a: u8, b: u8, status: Status) -> (u8, u8, Status) {
        let (ax, status) = mul_bytes(u16::from(a), b, status);
        (ax as u8, (ax >> 8) as u8, status)
    }
    #[inline(always)]
    fn imul(a: u8, b: u8, status: Status) -> (u8, u8, Status) {
        let (ax, status) = imul_bytes(u16::from(a), b, status);
        (ax as u8, (ax >> 8) as u8, status)
    }
    #[inline(always)]
    fn div(low: u8, high: u8, b: u8, status: Status) -> (u8, u8, Status) {
        let (ax, status) = div_bytes(u16::from_le_bytes([low, high]), b, status);
        (ax as u8, (ax >> 8) as u8, status)
    }
    #[inline(always)]
    fn idiv(low: u8, high: u8, b: u8, status: Status) -> (u8, u8, Status) {
        let (ax, status) = idiv_bytes(u16::from_le_bytes([low, high]), b, status);
        (ax as u8, (ax >> 8) as u8, status)
    }
    /// There is no such instruction.
    #[inline(always)]
    fn imul_low(a: u8, b: u8, status: Status) -> (u8, Status) {
        let (ax, status) = imul_bytes(u16::from(a), b, status);
        (ax as u8, status)
    }
}

/// Whether `high:low / b` fits, signed.
#[inline(always)]
fn quotient_fits<T: Wide>(low: T, high: T, b: T) -> bool {
    let (l, h, d) = (sign_extend(low) as i64, sign_extend(high) as i64, sign_extend(b) as i64);
    if h == l >> 63 {
        // The dividend is one word, sign-extended: only its negation can fail to fit.
        let least = l == i64::MIN >> (64 - 8 * T::SIZE);
        return d != 0 && !(d == -1 && least);
    }
    quotient_fits_wide::<T>(low, high, b)
}

#[cold]
fn quotient_fits_wide<T: Wide>(low: T, high: T, b: T) -> bool {
    let bits = 8 * T::SIZE;
    let dividend = (i128::from(sign_extend(high) as i64) << bits) | i128::from(low.to_u64());
    let divisor = i128::from(sign_extend(b) as i64);
    let Some(quotient) = dividend.checked_div(divisor) else { return false };
    let limit = 1i128 << (bits - 1);
    (-limit..limit).contains(&quotient)
}

/// Slots of the low and high halves.
#[inline(always)]
fn halves<T: Word>() -> (u8, u8) {
    (reg::RAX, if T::SIZE == 1 { reg::RAX | 16 } else { reg::RDX })
}

/// Where the explicit operand comes from.
trait Source {
    fn value<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<T, Abort>;
}

struct FromReg;
impl Source for FromReg {
    #[inline(always)]
    fn value<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<T, Abort> {
        Ok(cpu.get(op.r1))
    }
}

struct FromMem;
impl Source for FromMem {
    #[inline(always)]
    fn value<T: Word>(cpu: &mut Cpu, op: &Op) -> Result<T, Abort> {
        cpu.load_operand(op)
    }
}

fn mul<T: Wide, S: Source, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let b: T = S::value(cpu, op)?;
    let (low_slot, high_slot) = halves::<T>();
    let (a, status) = (cpu.get(low_slot), cpu.state.status);
    let (low, high, status) = if SIGNED { T::imul(a, b, status) } else { T::mul(a, b, status) };
    cpu.set(low_slot, low);
    cpu.set(high_slot, high);
    cpu.state.status = status;
    next(cpu, op)
}

fn div<T: Wide, S: Source, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let b: T = S::value(cpu, op)?;
    let (low_slot, high_slot) = halves::<T>();
    let (low, high): (T, T) = (cpu.get(low_slot), cpu.get(high_slot));
    let fits = if SIGNED { quotient_fits(low, high, b) } else { high.to_u64() < b.to_u64() };
    if !fits {
        return Err(cpu.raise(Exception::DE));
    }
    let status = cpu.state.status;
    let (quotient, remainder, status) =
        if SIGNED { T::idiv(low, high, b, status) } else { T::div(low, high, b, status) };
    cpu.set(low_slot, quotient);
    cpu.set(high_slot, remainder);
    cpu.state.status = status;
    next(cpu, op)
}

/// IMUL with two operands.
fn imul_two<T: Wide, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let b: T = S::value(cpu, op)?;
    let (result, status) = T::imul_low(cpu.get(op.r0), b, cpu.state.status);
    cpu.set(op.r0, result);
    cpu.state.status = status;
    next(cpu, op)
}

/// IMUL with three operands.
fn imul_three<T: Wide, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let a: T = S::value(cpu, op)?;
    let (result, status) = T::imul_low(a, T::from_u64(op.imm), cpu.state.status);
    cpu.set(op.r0, result);
    cpu.state.status = status;
    next(cpu, op)
}

/// MUL, DIV, IDIV, and IMUL with one operand.
fn one_operand(ins: &Instruction, memory: bool) -> Option<Handler> {
    let size = operand_size(ins, 0);
    Some(match (ins.mnemonic(), memory) {
        (Mnemonic::Mul, false) => by_size!(size, T => mul::<T, FromReg, false>),
        (Mnemonic::Mul, true) => by_size!(size, T => mul::<T, FromMem, false>),
        (Mnemonic::Imul, false) => by_size!(size, T => mul::<T, FromReg, true>),
        (Mnemonic::Imul, true) => by_size!(size, T => mul::<T, FromMem, true>),
        (Mnemonic::Div, false) => by_size!(size, T => div::<T, FromReg, false>),
        (Mnemonic::Div, true) => by_size!(size, T => div::<T, FromMem, false>),
        (Mnemonic::Idiv, false) => by_size!(size, T => div::<T, FromReg, true>),
        (Mnemonic::Idiv, true) => by_size!(size, T => div::<T, FromMem, true>),
        _ => return None,
    })
}

fn lower_imul(ins: &Instruction, mut op: Op) -> Option<Op> {
    let size = operand_size(ins, 0);
    op.r0 = gpr(gpr_operand(ins, 0)?);
    let memory = is_memory(ins, 1);
    if !memory {
        op.r1 = gpr(gpr_operand(ins, 1)?);
    }
    let three = ins.op_count() == 3 && is_immediate(ins, 2);
    if three {
        op.imm = ins.immediate(2);
    }
    op.handler.set(match (three, memory) {
        (false, false) => by_size!(size, T in [u16 u32 u64] => imul_two::<T, FromReg>),
        (false, true) => by_size!(size, T in [u16 u32 u64] => imul_two::<T, FromMem>),
        (true, false) => by_size!(size, T in [u16 u32 u64] => imul_three::<T, FromReg>),
        (true, true) => by_size!(size, T in [u16 u32 u64] => imul_three::<T, FromMem>),
    });
    Some(op)
}

/// Lowers this file's instructions.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    if !matches!(ins.mnemonic(), Mnemonic::Mul | Mnemonic::Imul | Mnemonic::Div | Mnemonic::Idiv) {
        return None;
    }
    let mut op = op_base(ins, ctx, undefined);
    if ins.op_count() > 1 {
        return lower_imul(ins, op);
    }
    let memory = is_memory(ins, 0);
    if !memory {
        op.r1 = gpr(gpr_operand(ins, 0)?);
    }
    op.handler.set(one_operand(ins, memory)?);
    Some(op)
}

#[cfg(test)]
mod tests {
    use crate::exception::vector;
    use crate::exec::testing::{DATA, Guest};
    use crate::flags::Rflags;
    use crate::state::{CodeSize, reg};

    #[test]
    fn products() {
        // Code, RAX, RBX; RAX, RDX, overflow after. RDX is 0x55 before.
        let cases: &[(&[u8], u64, u64, u64, u64, bool)] = &[
            (&[0x48, 0xf7, 0xe3], 1 << 63, 4, 0, 2, true),
            (&[0xf7, 0xe3], 0x1_0000_0003, 5, 15, 0, false),
            (&[0x66, 0xf7, 0xe3], 0x1_ffff, 0xffff, 0x1_0001, 0xfffe, true),
            (&[0xf6, 0xe3], 0x1_1110, 0x10, 0x1_0100, 0x55, true),
            (&[0xf6, 0xe7], 0x02, 0x300, 6, 0x55, false),
            (&[0x48, 0xf7, 0xeb], !0, 3, !2, !0, false),
            (&[0xf6, 0xeb], 0xff, 3, 0xfffd, 0x55, false),
            (&[0x48, 0x0f, 0xaf, 0xc3], 1 << 62, 4, 0, 0x55, true),
            (&[0x6b, 0xc3, 0xfe], 0, 3, 0xffff_fffa, 0x55, false),
        ];
        for &(code, rax, rbx, a, d, overflow) in cases {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.set(reg::RAX, rax).set(reg::RBX, rbx).set(reg::RDX, 0x55).finish(code);
            assert_eq!((guest.reg(reg::RAX), guest.reg(reg::RDX)), (a, d), "{code:02x?}");
            let both = Rflags::CF | Rflags::OF;
            assert_eq!(guest.flags() & both, if overflow { both } else { Rflags::empty() }, "{code:02x?}");
        }
    }

    #[test]
    fn quotients() {
        // Code, RAX, RDX, RBX; RAX and RDX after, or #DE.
        type Case = (&'static [u8], u64, u64, u64, Option<(u64, u64)>);
        let cases: &[Case] = &[
            (&[0x48, 0xf7, 0xf3], 7, 0, 2, Some((3, 1))),
            (&[0x48, 0xf7, 0xf3], 0, 1, 2, Some((1 << 63, 0))),
            (&[0x48, 0xf7, 0xf3], 0, 2, 2, None),
            (&[0x48, 0xf7, 0xf3], 0, 0, 0, None),
            (&[0xf7, 0xf3], 0xffff_0000_0007, 0xffff_0000_0000, 2, Some((3, 1))),
            (&[0x66, 0xf7, 0xf3], 0x1_0001, 0x2_0001, 0x10, Some((0x1_1000, 0x2_0001))),
            (&[0xf6, 0xf3], 0x10_0107, 0, 0x10, Some((0x10_0710, 0))),
            (&[0xf6, 0xf3], 0x1000, 0, 0x10, None),
            (&[0x48, 0xf7, 0xfb], -7i64 as u64, !0, 2, Some((-3i64 as u64, -1i64 as u64))),
            (&[0x48, 0xf7, 0xfb], 1 << 63, !0, !0, None),
            (&[0x48, 0xf7, 0xfb], 1 << 63, !0, 1, Some((1 << 63, 0))),
            (&[0x48, 0xf7, 0xfb], 0, 1, 2, None),
            (&[0x48, 0xf7, 0xfb], 0, 1, 4, Some((1 << 62, 0))),
            (&[0xf7, 0xfb], 0x8000_0000, 0xffff_ffff, 0xffff_ffff, None),
            (&[0x66, 0xf7, 0xfb], 0x8000, 0xffff, 0xffff, None),
            (&[0xf6, 0xfb], 0xff80, 0, 0xff, None),
            (&[0xf6, 0xfb], 0xff80, 0, 0x01, Some((0x80, 0))),
            (&[0xf6, 0xfb], 0xff80, 0, 0, None),
        ];
        for &(code, rax, rdx, rbx, after) in cases {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.set(reg::RAX, rax).set(reg::RBX, rbx).set(reg::RDX, rdx);
            match after {
                Some(after) => {
                    guest.finish(code);
                    assert_eq!((guest.reg(reg::RAX), guest.reg(reg::RDX)), after, "{code:02x?} {rax:#x}");
                }
                None => assert_eq!(guest.fault(code), (vector::DE, None), "{code:02x?} {rax:#x}"),
            }
        }
    }

    #[test]
    fn memory_operands() {
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.put(DATA, &6u64.to_le_bytes());
        // mul qword [rbx]; div dword [rbx]; imul eax, [rbx], 100
        guest.set(reg::RAX, 7).set(reg::RBX, DATA);
        guest.finish(&[0x48, 0xf7, 0x23, 0xf7, 0x33, 0x6b, 0x0b, 100]);
        assert_eq!((guest.reg(reg::RAX), guest.reg(reg::RCX)), (7, 600));
    }
}
