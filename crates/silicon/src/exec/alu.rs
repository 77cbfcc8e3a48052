//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST, INC, DEC, NEG, NOT.
//!
//! The arithmetic runs on the host's ALU; see [`crate::flags`] for how the flags come back.
#![expect(unsafe_code, reason = "inline assembly reads the host's flags")]

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic};

use crate::code::lower::{LowerCtx, gpr, op_base, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::code::thread::next;
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::exec::address::{Address, AnyAddress, with_loaded, with_updated};
use crate::exec::operand::{Form, by_address, by_size, form, gpr_operand, is_memory, operand_size};
use crate::flags::Status;
use crate::mmu::Word;

/// A two-operand operation at one operand width. It writes all six status flags.
trait Binary<T> {
    /// Whether the result goes to the destination (false for CMP and TEST).
    const WRITES: bool;
    /// Computes `a op b` with the incoming status (for carry in).
    fn apply(a: T, b: T, status: Status) -> (T, Status);
}

/// A one-operand operation at one operand width.
trait Unary<T> {
    /// Computes `op a`; flags that the operation leaves alone come from `status`.
    fn apply(a: T, status: Status) -> (T, Status);
}

/// A two-operand operation at every width.
trait BinaryOp: Binary<u8> + Binary<u16> + Binary<u32> + Binary<u64> {}
impl<O: Binary<u8> + Binary<u16> + Binary<u32> + Binary<u64>> BinaryOp for O {}

/// A one-operand operation at every width.
trait UnaryOp: Unary<u8> + Unary<u16> + Unary<u32> + Unary<u64> {}
impl<O: Unary<u8> + Unary<u16> + Unary<u32> + Unary<u64>> UnaryOp for O {}

/// Declares operations at all widths: the register class and modifier are the width's.
macro_rules! all_widths {
    ($make:ident, $name:ident, $($args:tt)*) => {
        struct $name;
        $make!($name, u8, reg_byte, "", $($args)*);
        $make!($name, u16, reg, ":x", $($args)*);
        $make!($name, u32, reg, ":e", $($args)*);
        $make!($name, u64, reg, ":r", $($args)*);
    };
}

macro_rules! binary {
    ($name:ident, $t:ty, $reg:ident, $m:literal, $template:literal, $writes:literal) => {
        impl Binary<$t> for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn apply(mut a: $t, b: $t, _: Status) -> ($t, Status) {
                let flags: u16;
                // SAFETY: register arithmetic only; LAHF and SETO read the flags.
                unsafe {
                    asm!(
                        concat!($template, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                        a = inout($reg) a, b = in($reg) b, lateout("ax") flags,
                        options(pure, nomem, nostack)
                    );
                }
                (a, Status(flags))
            }
        }
    };
}

macro_rules! binary_with_carry {
    ($name:ident, $t:ty, $reg:ident, $m:literal, $template:literal) => {
        impl Binary<$t> for $name {
            const WRITES: bool = true;
            #[inline(always)]
            fn apply(mut a: $t, b: $t, status: Status) -> ($t, Status) {
                let flags: u16;
                // SAFETY: register arithmetic only; BT loads the carry, LAHF and SETO read the flags.
                unsafe {
                    asm!(
                        "bt {s:e}, 8",
                        concat!($template, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                        s = in(reg) u32::from(status.0),
                        a = inout($reg) a, b = in($reg) b, lateout("ax") flags,
                        options(pure, nomem, nostack)
                    );
                }
                (a, Status(flags))
            }
        }
    };
}

macro_rules! unary {
    ($name:ident, $t:ty, $reg:ident, $m:literal, $template:literal) => {
        impl Unary<$t> for $name {
            #[inline(always)]
            fn apply(mut a: $t, status: Status) -> ($t, Status) {
                let flags: u16;
                // SAFETY: register arithmetic only; BT loads the carry that INC and DEC keep, LAHF and SETO
                // read the flags.
                unsafe {
                    asm!(
                        "bt {s:e}, 8",
                        concat!($template, " {a", $m, "}"), "lahf", "seto al",
                        s = in(reg) u32::from(status.0),
                        a = inout($reg) a, lateout("ax") flags,
                        options(pure, nomem, nostack)
                    );
                }
                (a, Status(flags))
            }
        }
    };
}

macro_rules! complement {
    ($name:ident, $t:ty, $reg:ident, $m:literal, ) => {
        impl Unary<$t> for $name {
            #[inline(always)]
            fn apply(a: $t, status: Status) -> ($t, Status) {
                (!a, status)
            }
        }
    };
}

all_widths!(binary, Add, "add", true);
all_widths!(binary, Or, "or", true);
all_widths!(binary_with_carry, Adc, "adc");
all_widths!(binary_with_carry, Sbb, "sbb");
all_widths!(binary, And, "and", true);
all_widths!(binary, Sub, "sub", true);
all_widths!(binary, Xor, "xor", true);
all_widths!(binary, Cmp, "cmp", false);
all_widths!(binary, Test, "test", false);
all_widths!(unary, Inc, "inc");
all_widths!(unary, Dec, "dec");
all_widths!(unary, Neg, "neg");
all_widths!(complement, Not,);

/// Flags and sum of `a + b`; for instructions that add besides doing something else.
#[inline(always)]
pub(crate) fn add<T: Arithmetic>(a: T, b: T) -> (T, Status) {
    T::sum(a, b)
}

/// Flags of `a - b`, likewise.
#[inline(always)]
pub(crate) fn compare<T: Arithmetic>(a: T, b: T) -> Status {
    T::difference(a, b)
}

/// A word that the host's ALU adds and compares.
pub(crate) trait Arithmetic: Word {
    /// ADD.
    fn sum(a: Self, b: Self) -> (Self, Status);
    /// CMP.
    fn difference(a: Self, b: Self) -> Status;
}

macro_rules! arithmetic {
    ($($t:ty)*) => {$(
        impl Arithmetic for $t {
            #[inline(always)]
            fn sum(a: Self, b: Self) -> (Self, Status) {
                <Add as Binary<$t>>::apply(a, b, Status::default())
            }
            #[inline(always)]
            fn difference(a: Self, b: Self) -> Status {
                <Cmp as Binary<$t>>::apply(a, b, Status::default()).1
            }
        }
    )*};
}
arithmetic!(u8 u16 u32 u64);

fn reg_reg<O: Binary<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let (result, status) = O::apply(cpu.get(op.r0), cpu.get(op.r1), cpu.state.status);
    if O::WRITES {
        cpu.set(op.r0, result);
    }
    cpu.state.status = status;
    next(cpu, op)
}

fn reg_imm<O: Binary<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let (result, status) = O::apply(cpu.get(op.r0), T::from_u64(op.imm), cpu.state.status);
    if O::WRITES {
        cpu.set(op.r0, result);
    }
    cpu.state.status = status;
    next(cpu, op)
}

fn reg_mem<O: Binary<T>, T: Word, A: Address>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    with_loaded::<A, T>(cpu, op, |cpu, op, b: T| {
        let (result, status) = O::apply(cpu.get(op.r0), b, cpu.state.status);
        if O::WRITES {
            cpu.set(op.r0, result);
        }
        cpu.state.status = status;
    })
}

fn mem_reg<O: Binary<T>, T: Word, A: Address>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if O::WRITES {
        with_updated::<A, T>(cpu, op, |cpu, op, a: T| O::apply(a, cpu.get(op.r1), cpu.state.status))
    } else {
        with_loaded::<A, T>(cpu, op, |cpu, op, a: T| {
            cpu.state.status = O::apply(a, cpu.get(op.r1), cpu.state.status).1;
        })
    }
}

fn mem_imm<O: Binary<T>, T: Word, A: Address>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    if O::WRITES {
        with_updated::<A, T>(cpu, op, |cpu, op, a: T| O::apply(a, T::from_u64(op.imm), cpu.state.status))
    } else {
        with_loaded::<A, T>(cpu, op, |cpu, op, a: T| {
            cpu.state.status = O::apply(a, T::from_u64(op.imm), cpu.state.status).1;
        })
    }
}

fn lock_mem_reg<O: Binary<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let b = cpu.get(op.r1);
    lock_mem::<T>(cpu, op, |a, status| O::apply(a, b, status))
}

fn lock_mem_imm<O: Binary<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let b = T::from_u64(op.imm);
    lock_mem::<T>(cpu, op, |a, status| O::apply(a, b, status))
}

#[inline(always)]
fn lock_mem<T: Word>(
    cpu: &mut Cpu,
    op: &Op,
    apply: impl Fn(T, Status) -> (T, Status),
) -> Result<Flow, Abort> {
    cpu.at(op);
    let lin = cpu.ea(op, T::SIZE, true)?;
    let before = cpu.state.status;
    let mut after = before;
    cpu.locked(cpu.op_seg(op), lin, |a| {
        let (result, status) = apply(a, before);
        after = status;
        Some(result)
    })?;
    cpu.state.status = after;
    next(cpu, op)
}

fn unary_reg<O: Unary<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let (result, status) = O::apply(cpu.get(op.r0), cpu.state.status);
    cpu.set(op.r0, result);
    cpu.state.status = status;
    next(cpu, op)
}

fn unary_mem<O: Unary<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    with_updated::<AnyAddress, T>(cpu, op, |cpu, _, a: T| O::apply(a, cpu.state.status))
}

fn unary_lock_mem<O: Unary<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    lock_mem::<T>(cpu, op, O::apply)
}

/// Status after a zero result without carries: ZF and PF.
const ZERO_FLAGS: Status = Status(0x4400);

/// XOR of a 32-bit or 64-bit register with itself: zero, whatever was there.
fn zero(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.set(op.r0, 0u64);
    cpu.state.status = ZERO_FLAGS;
    next(cpu, op)
}

fn binary_handler<O: BinaryOp>(form: Form, size: usize, op: &Op) -> Option<Handler> {
    Some(match (form, op.has(Op::LOCK)) {
        (Form::RegReg, _) => by_size!(size, T => reg_reg::<O, T>),
        (Form::RegImm, _) => by_size!(size, T => reg_imm::<O, T>),
        (Form::RegMem, _) => by_address!(op, A => by_size!(size, T => reg_mem::<O, T, A>)),
        (Form::MemReg, false) => by_address!(op, A => by_size!(size, T => mem_reg::<O, T, A>)),
        (Form::MemImm, false) => by_address!(op, A => by_size!(size, T => mem_imm::<O, T, A>)),
        (Form::MemReg, true) => by_size!(size, T => lock_mem_reg::<O, T>),
        (Form::MemImm, true) => by_size!(size, T => lock_mem_imm::<O, T>),
    })
}

fn unary_handler<O: UnaryOp>(memory: bool, size: usize, lock: bool) -> Option<Handler> {
    Some(match (memory, lock) {
        (false, _) => by_size!(size, T => unary_reg::<O, T>),
        (true, false) => by_size!(size, T => unary_mem::<O, T>),
        (true, true) => by_size!(size, T => unary_lock_mem::<O, T>),
    })
}

/// Lowers this file's instructions.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let binary = match ins.mnemonic() {
        Mnemonic::Add => binary_handler::<Add>,
        Mnemonic::Or => binary_handler::<Or>,
        Mnemonic::Adc => binary_handler::<Adc>,
        Mnemonic::Sbb => binary_handler::<Sbb>,
        Mnemonic::And => binary_handler::<And>,
        Mnemonic::Sub => binary_handler::<Sub>,
        Mnemonic::Xor => binary_handler::<Xor>,
        Mnemonic::Cmp => binary_handler::<Cmp>,
        Mnemonic::Test => binary_handler::<Test>,
        _ => return lower_unary(ins, ctx),
    };
    let mut op = op_base(ins, ctx, undefined);
    let form = form(ins, &mut op)?;
    let size = operand_size(ins, 0);
    op.handler.set(binary(form, size, &op)?);
    let clears = matches!(ins.mnemonic(), Mnemonic::Xor);
    if clears && form == Form::RegReg && op.r0 == op.r1 && size >= 4 {
        op.handler.set(zero);
    }
    Some(op)
}

fn lower_unary(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let unary = match ins.mnemonic() {
        Mnemonic::Inc => unary_handler::<Inc>,
        Mnemonic::Dec => unary_handler::<Dec>,
        Mnemonic::Neg => unary_handler::<Neg>,
        Mnemonic::Not => unary_handler::<Not>,
        _ => return None,
    };
    let mut op = op_base(ins, ctx, undefined);
    let memory = is_memory(ins, 0);
    if !memory {
        op.r0 = gpr(gpr_operand(ins, 0)?);
    }
    op.handler.set(unary(memory, operand_size(ins, 0), op.has(Op::LOCK))?);
    Some(op)
}

#[cfg(test)]
mod tests {
    use crate::exec::testing::{DATA, Guest, PF_READ, PF_WRITE, UNMAPPED};
    use crate::flags::Rflags;
    use crate::state::{CodeSize, reg};

    const CF: Rflags = Rflags::CF;
    const PF: Rflags = Rflags::PF;
    const AF: Rflags = Rflags::AF;
    const ZF: Rflags = Rflags::ZF;
    const SF: Rflags = Rflags::SF;
    const OF: Rflags = Rflags::OF;

    #[test]
    fn register_forms_give_result_and_flags() {
        let none = Rflags::empty();
        // Code, RAX and RBX before, flags before, RAX and flags after.
        let cases: &[(&[u8], u64, u64, Rflags, u64, Rflags)] = &[
            (&[0x48, 0x01, 0xd8], !0, 1, none, 0, CF | PF | AF | ZF),
            (&[0x01, 0xd8], 0x1_7fff_ffff, 1, none, 0x8000_0000, PF | AF | SF | OF),
            (&[0x66, 0x01, 0xd8], 0x1234_ffff, 2, none, 0x1234_0001, CF | AF),
            (&[0x00, 0xd8], 0x12ff, 1, none, 0x1200, CF | PF | AF | ZF),
            // add ah, bl
            (&[0x00, 0xdc], 0xff_ff11, 1, none, 0xff_0011, CF | PF | AF | ZF),
            (&[0x48, 0x11, 0xd8], 1, 1, CF, 3, PF),
            (&[0x48, 0x19, 0xd8], 0, 0, CF, !0, CF | PF | AF | SF),
            (&[0x48, 0x29, 0xd8], 5, 5, CF, 0, PF | ZF),
            (&[0x48, 0x39, 0xd8], 4, 5, none, 4, CF | PF | AF | SF),
            (&[0x31, 0xc0], !0, 0, CF | OF, 0, PF | ZF),
            (&[0x48, 0x21, 0xd8], 0xff, 0x80, CF, 0x80, none),
            (&[0x84, 0xd8], 0xff, 0x80, CF, 0xff, SF),
            (&[0x48, 0xff, 0xc0], !0, 0, CF, 0, CF | PF | AF | ZF),
            (&[0xff, 0xc8], 0, 0, none, 0xffff_ffff, PF | AF | SF),
            (&[0xfe, 0xc0], 0x7f, 0, CF, 0x80, CF | AF | SF | OF),
            (&[0x48, 0xf7, 0xd8], 1, 0, none, !0, CF | PF | AF | SF),
            (&[0x48, 0xf7, 0xd0], 1, 0, CF | OF, !1, CF | OF),
            // sub rax, -1; and eax, imm32; cmp al, imm8
            (&[0x48, 0x83, 0xe8, 0xff], 0, 0, none, 1, CF | AF),
            (&[0x25, 0, 0, 0, 0x80], !0, 0, none, 0x8000_0000, PF | SF),
            (&[0x3c, 0x80], 0x7f, 0, none, 0x7f, CF | PF | SF | OF),
        ];
        for &(code, rax, rbx, before, result, after) in cases {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.set(reg::RAX, rax).set(reg::RBX, rbx).set_flags(before).finish(code);
            assert_eq!((guest.reg(reg::RAX), guest.flags()), (result, after), "{code:02x?}");
        }
    }

    #[test]
    fn memory_forms_read_and_write_memory() {
        // Code, memory before, RAX before, memory and RAX after. RBX points to the memory.
        let cases: &[(&[u8], u64, u64, u64, u64)] = &[
            (&[0x48, 0x01, 0x03], 5, 6, 11, 6),
            (&[0x48, 0x03, 0x03], 5, 6, 5, 11),
            (&[0x03, 0x03], 0x1_0000_0005, !0, 0x1_0000_0005, 4),
            (&[0xf0, 0x01, 0x03], 0x1_ffff_ffff, 1, 0x1_0000_0000, 1),
            (&[0xf0, 0x48, 0x83, 0x0b, 0x70], 7, 1, 0x77, 1),
            (&[0x80, 0x33, 0xff], 0x1200, 1, 0x12ff, 1),
            (&[0x66, 0xff, 0x0b], 0x1_0000, 1, 0x1_ffff, 1),
            (&[0xf0, 0x48, 0xff, 0x03], 9, 1, 10, 1),
            (&[0xf0, 0x48, 0xf7, 0x13], 9, 1, !9, 1),
            (&[0x48, 0x39, 0x03], 9, 1, 9, 1),
        ];
        for &(code, memory, rax, memory_after, rax_after) in cases {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.put(DATA, &memory.to_le_bytes());
            guest.set(reg::RAX, rax).set(reg::RBX, DATA).finish(code);
            assert_eq!((guest.word(DATA, 8), guest.reg(reg::RAX)), (memory_after, rax_after), "{code:02x?}");
        }
    }

    #[test]
    fn faults_change_nothing() {
        let mut guest = Guest::new(CodeSize::Bits64);
        guest.set(reg::RBX, UNMAPPED).set(reg::RCX, 2).set_flags(CF | ZF);
        // add [rbx], rax; lock add [rbx], rax; inc [rbx]; neg [rbx]; shl [rbx], cl; xadd, cmpxchg, xchg, bts
        let writes: [&[u8]; 9] = [
            &[0x48, 0x01, 0x03],
            &[0xf0, 0x48, 0x01, 0x03],
            &[0xfe, 0x03],
            &[0xf7, 0x1b],
            &[0xd3, 0x23],
            &[0x0f, 0xc1, 0x03],
            &[0x0f, 0xb1, 0x03],
            &[0x87, 0x03],
            &[0x0f, 0xab, 0x0b],
        ];
        for code in writes {
            assert_eq!(guest.fault(code), PF_WRITE, "{code:02x?}");
        }
        // add rax, [rbx]; cmp [rbx], rax; test [rbx], al; cmovc (condition false is no excuse), mul, div, popcnt
        let reads: [&[u8]; 7] = [
            &[0x48, 0x03, 0x03],
            &[0x48, 0x39, 0x03],
            &[0x84, 0x03],
            &[0x0f, 0x43, 0x03],
            &[0xf7, 0x23],
            &[0xf7, 0x33],
            &[0xf3, 0x0f, 0xb8, 0x03],
        ];
        for code in reads {
            assert_eq!(guest.fault(code), PF_READ, "{code:02x?}");
        }
    }
}
