//! SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD.
//!
//! The host executes the very instruction with the guest's flags loaded, so that a count of zero, flags that a
//! rotate leaves alone and flags that the SDM calls undefined come out as the host's silicon has them.
#![expect(unsafe_code, reason = "inline assembly sets and reads the host's flags")]

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::code::lower::{LowerCtx, gpr, op_base, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::code::thread::next;
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::exec::address::{AnyAddress, with_updated};
use crate::exec::operand::{by_size, gpr_operand, is_immediate, is_memory, operand_size};
use crate::flags::Status;
use crate::mmu::Word;
use crate::state::reg;

/// A shift or rotate at one operand width.
trait Shift<T> {
    /// By one.
    fn one(a: T, status: Status) -> (T, Status);
    /// By `count`, which the host masks as the guest's processor does.
    fn many(a: T, count: u8, status: Status) -> (T, Status);
}

/// A shift or rotate at every width.
trait ShiftOp: Shift<u8> + Shift<u16> + Shift<u32> + Shift<u64> {}
impl<O: Shift<u8> + Shift<u16> + Shift<u32> + Shift<u64>> ShiftOp for O {}

/// A double shift at one operand width.
trait DoubleShift<T> {
    /// Shifts `a` by `count`, filling from `b`.
    fn apply(a: T, b: T, count: u8, status: Status) -> (T, Status);
}

/// A double shift at every width.
trait DoubleShiftOp: DoubleShift<u16> + DoubleShift<u32> + DoubleShift<u64> {}
impl<O: DoubleShift<u16> + DoubleShift<u32> + DoubleShift<u64>> DoubleShiftOp for O {}

/// `add al, 127` overflows exactly if AL is one; SAHF takes the other flags from AH.
macro_rules! shift {
    ($name:ident, $template:literal) => {
        struct $name;
        shift!($name, u8, reg_byte, "", $template);
        shift!($name, u16, reg, ":x", $template);
        shift!($name, u32, reg, ":e", $template);
        shift!($name, u64, reg, ":r", $template);
    };
    ($name:ident, $t:ty, $reg:ident, $m:literal, $template:literal) => {
        impl Shift<$t> for $name {
            #[inline(always)]
            fn one(mut a: $t, status: Status) -> ($t, Status) {
                let mut flags = status.0;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!(
                        "add al, 127", "sahf", concat!($template, " {a", $m, "}, 1"), "lahf", "seto al",
                        a = inout($reg) a, inout("ax") flags,
                        options(pure, nomem, nostack)
                    );
                }
                (a, Status(flags))
            }
            #[inline(always)]
            fn many(mut a: $t, count: u8, status: Status) -> ($t, Status) {
                let mut flags = status.0;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!(
                        "add al, 127", "sahf", concat!($template, " {a", $m, "}, cl"), "lahf", "seto al",
                        a = inout($reg) a, inout("ax") flags, in("cl") count,
                        options(pure, nomem, nostack)
                    );
                }
                (a, Status(flags))
            }
        }
    };
}

shift!(Shl, "shl");
shift!(Shr, "shr");
shift!(Sar, "sar");
shift!(Rol, "rol");
shift!(Ror, "ror");
shift!(Rcl, "rcl");
shift!(Rcr, "rcr");

macro_rules! double_shift {
    ($name:ident, $template:literal) => {
        struct $name;
        double_shift!($name, u16, ":x", $template);
        double_shift!($name, u32, ":e", $template);
        double_shift!($name, u64, ":r", $template);
    };
    ($name:ident, $t:ty, $m:literal, $template:literal) => {
        impl DoubleShift<$t> for $name {
            #[inline(always)]
            fn apply(mut a: $t, b: $t, count: u8, status: Status) -> ($t, Status) {
                let mut flags = status.0;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!(
                        "add al, 127", "sahf",
                        concat!($template, " {a", $m, "}, {b", $m, "}, cl"), "lahf", "seto al",
                        a = inout(reg) a, b = in(reg) b, inout("ax") flags, in("cl") count,
                        options(pure, nomem, nostack)
                    );
                }
                (a, Status(flags))
            }
        }
    };
}

double_shift!(Shld, "shld");
double_shift!(Shrd, "shrd");

/// Where the count comes from.
trait Count {
    fn count(cpu: &Cpu, op: &Op) -> u8;
}

struct Immediate;
impl Count for Immediate {
    #[inline(always)]
    fn count(_: &Cpu, op: &Op) -> u8 {
        op.imm as u8
    }
}

struct Cl;
impl Count for Cl {
    #[inline(always)]
    fn count(cpu: &Cpu, _: &Op) -> u8 {
        cpu.get(reg::RCX)
    }
}

fn reg_one<O: Shift<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let (result, status) = O::one(cpu.get(op.r0), cpu.state.status);
    cpu.set(op.r0, result);
    cpu.state.status = status;
    next(cpu, op)
}

fn reg_many<O: Shift<T>, T: Word, C: Count>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let (result, status) = O::many(cpu.get(op.r0), C::count(cpu, op), cpu.state.status);
    cpu.set(op.r0, result);
    cpu.state.status = status;
    next(cpu, op)
}

fn mem_one<O: Shift<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    with_updated::<AnyAddress, T>(cpu, op, |cpu, _, a: T| O::one(a, cpu.state.status))
}

fn mem_many<O: Shift<T>, T: Word, C: Count>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    with_updated::<AnyAddress, T>(cpu, op, |cpu, op, a: T| O::many(a, C::count(cpu, op), cpu.state.status))
}

fn double_reg<O: DoubleShift<T>, T: Word, C: Count>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let count = C::count(cpu, op);
    let (result, status) = O::apply(cpu.get(op.r0), cpu.get(op.r1), count, cpu.state.status);
    cpu.set(op.r0, result);
    cpu.state.status = status;
    next(cpu, op)
}

fn double_mem<O: DoubleShift<T>, T: Word, C: Count>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    with_updated::<AnyAddress, T>(cpu, op, |cpu, op, a: T| {
        O::apply(a, cpu.get(op.r1), C::count(cpu, op), cpu.state.status)
    })
}

/// How a shift is given.
#[derive(Clone, Copy)]
struct Shape {
    memory: bool,
    size: usize,
    count: Counted,
}

#[derive(Clone, Copy)]
enum Counted {
    One,
    Immediate,
    Cl,
}

fn shift_handler<O: ShiftOp>(shape: Shape) -> Option<Handler> {
    let Shape { memory, size, count } = shape;
    Some(match (count, memory) {
        (Counted::One, false) => by_size!(size, T => reg_one::<O, T>),
        (Counted::One, true) => by_size!(size, T => mem_one::<O, T>),
        (Counted::Immediate, false) => by_size!(size, T => reg_many::<O, T, Immediate>),
        (Counted::Immediate, true) => by_size!(size, T => mem_many::<O, T, Immediate>),
        (Counted::Cl, false) => by_size!(size, T => reg_many::<O, T, Cl>),
        (Counted::Cl, true) => by_size!(size, T => mem_many::<O, T, Cl>),
    })
}

fn double_handler<O: DoubleShiftOp>(shape: Shape) -> Option<Handler> {
    let Shape { memory, size, count } = shape;
    Some(match (count, memory) {
        (Counted::Cl, false) => by_size!(size, T in [u16 u32 u64] => double_reg::<O, T, Cl>),
        (Counted::Cl, true) => by_size!(size, T in [u16 u32 u64] => double_mem::<O, T, Cl>),
        (_, false) => by_size!(size, T in [u16 u32 u64] => double_reg::<O, T, Immediate>),
        (_, true) => by_size!(size, T in [u16 u32 u64] => double_mem::<O, T, Immediate>),
    })
}

/// The shape of the shift, its count (operand `at`) and first operand filled into `op`.
fn shape(ins: &Instruction, op: &mut Op, at: u32) -> Option<Shape> {
    let memory = is_memory(ins, 0);
    if !memory {
        op.r0 = gpr(gpr_operand(ins, 0)?);
    }
    let count = match (is_immediate(ins, at), ins.op_kind(at)) {
        (true, _) if ins.immediate(at) == 1 && at == 1 => Counted::One,
        (true, _) => Counted::Immediate,
        (false, OpKind::Register) => Counted::Cl,
        _ => return None,
    };
    if is_immediate(ins, at) {
        op.imm = ins.immediate(at);
    }
    Some(Shape { memory, size: operand_size(ins, 0), count })
}

/// Lowers this file's instructions.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let single = match ins.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => shift_handler::<Shl>,
        Mnemonic::Shr => shift_handler::<Shr>,
        Mnemonic::Sar => shift_handler::<Sar>,
        Mnemonic::Rol => shift_handler::<Rol>,
        Mnemonic::Ror => shift_handler::<Ror>,
        Mnemonic::Rcl => shift_handler::<Rcl>,
        Mnemonic::Rcr => shift_handler::<Rcr>,
        _ => return lower_double(ins, ctx),
    };
    let mut op = op_base(ins, ctx, undefined);
    let shape = shape(ins, &mut op, 1)?;
    op.handler.set(single(shape)?);
    Some(op)
}

fn lower_double(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let double = match ins.mnemonic() {
        Mnemonic::Shld => double_handler::<Shld>,
        Mnemonic::Shrd => double_handler::<Shrd>,
        _ => return None,
    };
    let mut op = op_base(ins, ctx, undefined);
    let shape = shape(ins, &mut op, 2)?;
    op.r1 = gpr(gpr_operand(ins, 1)?);
    op.handler.set(double(shape)?);
    Some(op)
}

#[cfg(test)]
mod tests {
    use crate::exec::testing::{DATA, Guest};
    use crate::flags::Rflags;
    use crate::state::{CodeSize, reg};

    #[test]
    fn results_and_defined_flags() {
        const NONE: Rflags = Rflags::empty();
        let (cf, of) = (Rflags::CF, Rflags::OF);
        let both = cf | of;
        // Code, RAX, RCX, flags before; RAX, CF and OF after, and which of them are defined (OF is for a count of one).
        let cases: &[(&[u8], u64, u64, Rflags, u64, Rflags, Rflags)] = &[
            (&[0x48, 0xd1, 0xe0], 1 << 63, 0, NONE, 0, cf | of, both),
            (&[0xd0, 0xe0], 0x140, 0, NONE, 0x180, of, both),
            (&[0x48, 0xd1, 0xf8], !0, 0, NONE, !0, cf, both),
            (&[0xd3, 0xe0], 0xffff_ffff_0000_0001, 32, cf | of, 1, cf | of, both),
            (&[0x48, 0xd3, 0xe0], 1, 64, cf | of, 1, cf | of, both),
            (&[0x48, 0xc1, 0xe8, 4], 0x18, 0, NONE, 1, cf, cf),
            (&[0x48, 0xd1, 0xd0], 0, 0, cf, 1, NONE, both),
            (&[0x48, 0xd1, 0xd8], 1, 0, NONE, 0, cf, both),
            (&[0x66, 0xd1, 0xc0], 0x8000, 0, NONE, 1, cf | of, both),
            // rcl al, cl: nine positions are none at all
            (&[0xd2, 0xd0], 0x55, 9, cf, 0x55, cf, cf),
            (&[0x48, 0x0f, 0xa4, 0xd8, 1], 0, 0, NONE, 1, NONE, both),
            (&[0x48, 0x0f, 0xad, 0xd8], 0, 1, NONE, 0, NONE, both),
        ];
        for &(code, rax, rcx, before, result, after, defined) in cases {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.set(reg::RAX, rax).set(reg::RCX, rcx).set(reg::RBX, 1 << 63).set_flags(before);
            guest.finish(code);
            assert_eq!((guest.reg(reg::RAX), guest.flags() & defined), (result, after), "{code:02x?}");
        }
    }

    #[test]
    fn a_count_of_zero_keeps_all_flags() {
        for bits in [Rflags::empty(), Rflags::STATUS, Rflags::OF | Rflags::AF, Rflags::SF | Rflags::CF] {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.put(DATA, &[0x81]);
            guest.set(reg::RCX, 0x20).set(reg::RBX, DATA).set_flags(bits);
            // shl byte [rbx], cl; rcr eax, cl; shld eax, ecx, cl; sar ecx, 0
            guest.finish(&[0xd2, 0x23, 0xd3, 0xd8, 0x0f, 0xa5, 0xc8, 0xc1, 0xf9, 0]);
            assert_eq!((guest.flags(), guest.word(DATA, 1)), (bits, 0x81));
        }
    }
}
