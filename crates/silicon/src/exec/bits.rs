//! BT, BTS, BTR, BTC, BSF, BSR, POPCNT, LZCNT, TZCNT, CRC32, ADCX, ADOX, RDRAND, RDSEED.
//!
//! As with shifts, the host executes the very instruction with the guest's flags and the guest's old destination
//! loaded, so that what the SDM leaves undefined comes out as the host's silicon has it.
#![expect(unsafe_code, reason = "inline assembly sets and reads the host's flags")]

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic};

use crate::code::lower::{LowerCtx, gpr, op_base, undefined};
use crate::code::op::{Flow, Handler, Op};
use crate::code::thread::next;
use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::exec::mov::sign_extend;
use crate::exec::operand::{by_size, gpr_operand, is_immediate, is_memory, operand_size};
use crate::flags::Status;
use crate::mmu::Word;

/// An operation on a bit string's word.
trait BitTest<T> {
    /// Whether the word is written.
    const WRITES: bool;
    /// Tests bit `bit` (below the width) and changes it.
    fn apply(a: T, bit: T, status: Status) -> (T, Status);
}

trait BitTestOp: BitTest<u16> + BitTest<u32> + BitTest<u64> {}
impl<O: BitTest<u16> + BitTest<u32> + BitTest<u64>> BitTestOp for O {}

macro_rules! bit_test {
    ($name:ident, $template:literal, $writes:literal) => {
        struct $name;
        bit_test!($name, $template, $writes, u16, ":x");
        bit_test!($name, $template, $writes, u32, ":e");
        bit_test!($name, $template, $writes, u64, ":r");
    };
    ($name:ident, $template:literal, $writes:literal, $t:ty, $m:literal) => {
        impl BitTest<$t> for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn apply(mut a: $t, bit: $t, status: Status) -> ($t, Status) {
                let mut flags = status.0;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!(
                        "add al, 127", "sahf", concat!($template, " {a", $m, "}, {b", $m, "}"),
                        "lahf", "seto al",
                        a = inout(reg) a, b = in(reg) bit, inout("ax") flags,
                        options(pure, nomem, nostack)
                    );
                }
                (a, Status(flags))
            }
        }
    };
}
bit_test!(Bt, "bt", false);
bit_test!(Bts, "bts", true);
bit_test!(Btr, "btr", true);
bit_test!(Btc, "btc", true);

fn bit_reg_reg<O: BitTest<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    bit_reg::<O, T>(cpu, op, cpu.get(op.r1))
}

fn bit_reg_imm<O: BitTest<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    bit_reg::<O, T>(cpu, op, T::from_u64(op.imm))
}

#[inline(always)]
fn bit_reg<O: BitTest<T>, T: Word>(cpu: &mut Cpu, op: &Op, bit: T) -> Result<Flow, Abort> {
    let (result, status) = O::apply(cpu.get(op.r0), bit, cpu.state.status);
    if O::WRITES {
        cpu.set(op.r0, result);
    }
    cpu.state.status = status;
    next(cpu, op)
}

/// A register bit offset is signed and reaches beyond the addressed word.
fn bit_mem_reg<O: BitTest<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let bit: T = cpu.get(op.r1);
    let words = (sign_extend(bit) as i64) >> (3 + T::SIZE.trailing_zeros());
    let offset = cpu.offset(op).wrapping_add((words * T::SIZE as i64) as u64);
    bit_mem::<O, T>(cpu, op, offset, bit)
}

fn bit_mem_imm<O: BitTest<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let offset = cpu.offset(op);
    bit_mem::<O, T>(cpu, op, offset, T::from_u64(op.imm))
}

#[inline(always)]
fn bit_mem<O: BitTest<T>, T: Word>(cpu: &mut Cpu, op: &Op, offset: u64, bit: T) -> Result<Flow, Abort> {
    cpu.at(op);
    let lin = cpu.ea_at(op, offset, T::SIZE, O::WRITES)?;
    let (seg, before) = (cpu.op_seg(op), cpu.state.status);
    cpu.state.status = if !O::WRITES {
        O::apply(cpu.load(seg, lin)?, bit, before).1
    } else if op.has(Op::LOCK) {
        let mut after = before;
        cpu.locked(seg, lin, |a| {
            let (result, status) = O::apply(a, bit, before);
            after = status;
            Some(result)
        })?;
        after
    } else {
        cpu.update(seg, lin, |a| O::apply(a, bit, before))?
    };
    next(cpu, op)
}

/// An operation from a source to a register that may keep some of its old contents: the whole 64-bit register
/// goes in and comes out.
trait Scan<T> {
    fn apply(dest: u64, source: T, status: Status) -> (u64, Status);
}

macro_rules! scan {
    ($name:ident, $template:literal $(, $t:ty, $d:literal, $reg:ident, $s:literal)*) => {
        struct $name;
        $(impl Scan<$t> for $name {
            #[inline(always)]
            fn apply(mut dest: u64, source: $t, status: Status) -> (u64, Status) {
                let mut flags = status.0;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!(
                        "add al, 127", "sahf", concat!($template, " {d", $d, "}, {s", $s, "}"),
                        "lahf", "seto al",
                        d = inout(reg) dest, s = in($reg) source, inout("ax") flags,
                        options(pure, nomem, nostack)
                    );
                }
                (dest, Status(flags))
            }
        })*
    };
}

macro_rules! scan_words {
    ($($name:ident $template:literal)*) => {$(
        scan!($name, $template, u16, ":x", reg, ":x", u32, ":e", reg, ":e", u64, ":r", reg, ":r");
    )*};
}
scan_words!(Bsf "bsf" Bsr "bsr" Popcnt "popcnt" Lzcnt "lzcnt" Tzcnt "tzcnt");
scan!(Adcx, "adcx", u32, ":e", reg, ":e", u64, ":r", reg, ":r");
scan!(Adox, "adox", u32, ":e", reg, ":e", u64, ":r", reg, ":r");
scan!(Crc32, "crc32", u8, ":e", reg_byte, "", u16, ":e", reg, ":x", u32, ":e", reg, ":e");
// Of a 64-bit destination only the low half counts.
scan!(Crc32Wide, "crc32", u8, ":r", reg_byte, "", u64, ":r", reg, ":r");

fn scan_reg<O: Scan<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let source: T = cpu.get(op.r1);
    scan_value::<O, T>(cpu, op, source)
}

fn scan_mem<O: Scan<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    let source: T = cpu.load_operand(op)?;
    scan_value::<O, T>(cpu, op, source)
}

#[inline(always)]
fn scan_value<O: Scan<T>, T: Word>(cpu: &mut Cpu, op: &Op, source: T) -> Result<Flow, Abort> {
    let (result, status) = O::apply(cpu.get(op.r0), source, cpu.state.status);
    cpu.set(op.r0, result);
    cpu.state.status = status;
    next(cpu, op)
}

/// RDRAND and RDSEED: random bits are the host's.
trait Random<T> {
    fn apply(dest: u64, status: Status) -> (u64, Status);
}

macro_rules! random {
    ($name:ident, $template:literal) => {
        struct $name;
        random!($name, $template, u16, ":x");
        random!($name, $template, u32, ":e");
        random!($name, $template, u64, ":r");
    };
    ($name:ident, $template:literal, $t:ty, $m:literal) => {
        impl Random<$t> for $name {
            fn apply(mut dest: u64, status: Status) -> (u64, Status) {
                let mut flags = status.0;
                // SAFETY: writes one register and the flags. Not `pure`: every execution gives another value.
                unsafe {
                    asm!(
                        "add al, 127", "sahf", concat!($template, " {d", $m, "}"), "lahf", "seto al",
                        d = inout(reg) dest, inout("ax") flags,
                        options(nomem, nostack)
                    );
                }
                (dest, Status(flags))
            }
        }
    };
}
random!(Rdrand, "rdrand");
random!(Rdseed, "rdseed");

fn random<O: Random<T>, T: Word>(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    let (value, status) = O::apply(cpu.get(op.r0), cpu.state.status);
    cpu.set(op.r0, value);
    cpu.state.status = status;
    next(cpu, op)
}

fn bit_test_handler<O: BitTestOp>(memory: bool, immediate: bool, size: usize) -> Option<Handler> {
    Some(match (memory, immediate) {
        (false, false) => by_size!(size, T in [u16 u32 u64] => bit_reg_reg::<O, T>),
        (false, true) => by_size!(size, T in [u16 u32 u64] => bit_reg_imm::<O, T>),
        (true, false) => by_size!(size, T in [u16 u32 u64] => bit_mem_reg::<O, T>),
        (true, true) => by_size!(size, T in [u16 u32 u64] => bit_mem_imm::<O, T>),
    })
}

fn lower_bit_test(ins: &Instruction, mut op: Op) -> Option<Op> {
    let handler = match ins.mnemonic() {
        Mnemonic::Bt => bit_test_handler::<Bt>,
        Mnemonic::Bts => bit_test_handler::<Bts>,
        Mnemonic::Btr => bit_test_handler::<Btr>,
        _ => bit_test_handler::<Btc>,
    };
    let (memory, immediate) = (is_memory(ins, 0), is_immediate(ins, 1));
    if !memory {
        op.r0 = gpr(gpr_operand(ins, 0)?);
    }
    if immediate {
        op.imm = ins.immediate(1);
    } else {
        op.r1 = gpr(gpr_operand(ins, 1)?);
    }
    op.handler.set(handler(memory, immediate, operand_size(ins, 0))?);
    Some(op)
}

fn lower_scan(ins: &Instruction, mut op: Op) -> Option<Op> {
    op.r0 = gpr(gpr_operand(ins, 0)?);
    let memory = is_memory(ins, 1);
    if !memory {
        op.r1 = gpr(gpr_operand(ins, 1)?);
    }
    let size = operand_size(ins, 1);
    macro_rules! pick {
        ($o:ty, [$($t:ident)*]) => {
            if memory {
                by_size!(size, T in [$($t)*] => scan_mem::<$o, T>)
            } else {
                by_size!(size, T in [$($t)*] => scan_reg::<$o, T>)
            }
        };
    }
    op.handler.set(match ins.mnemonic() {
        Mnemonic::Bsf => pick!(Bsf, [u16 u32 u64]),
        Mnemonic::Bsr => pick!(Bsr, [u16 u32 u64]),
        Mnemonic::Popcnt => pick!(Popcnt, [u16 u32 u64]),
        Mnemonic::Lzcnt => pick!(Lzcnt, [u16 u32 u64]),
        Mnemonic::Tzcnt => pick!(Tzcnt, [u16 u32 u64]),
        Mnemonic::Adcx => pick!(Adcx, [u32 u64]),
        Mnemonic::Adox => pick!(Adox, [u32 u64]),
        Mnemonic::Crc32 if operand_size(ins, 0) == 8 => pick!(Crc32Wide, [u8 u64]),
        Mnemonic::Crc32 => pick!(Crc32, [u8 u16 u32]),
        _ => return None,
    });
    Some(op)
}

fn lower_random(ins: &Instruction, mut op: Op) -> Option<Op> {
    op.r0 = gpr(gpr_operand(ins, 0)?);
    let size = operand_size(ins, 0);
    op.handler.set(if ins.mnemonic() == Mnemonic::Rdrand {
        by_size!(size, T in [u16 u32 u64] => random::<Rdrand, T>)
    } else {
        by_size!(size, T in [u16 u32 u64] => random::<Rdseed, T>)
    });
    Some(op)
}

/// Lowers this file's instructions.
pub(crate) fn lower(ins: &Instruction, ctx: &LowerCtx) -> Option<Op> {
    match ins.mnemonic() {
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => {
            lower_bit_test(ins, op_base(ins, ctx, undefined))
        }
        Mnemonic::Bsf
        | Mnemonic::Bsr
        | Mnemonic::Popcnt
        | Mnemonic::Lzcnt
        | Mnemonic::Tzcnt
        | Mnemonic::Adcx
        | Mnemonic::Adox
        | Mnemonic::Crc32 => lower_scan(ins, op_base(ins, ctx, undefined)),
        Mnemonic::Rdrand | Mnemonic::Rdseed => lower_random(ins, op_base(ins, ctx, undefined)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use crate::exec::testing::{DATA, Guest};
    use crate::flags::Rflags;
    use crate::state::{CodeSize, reg};

    #[test]
    fn bit_tests() {
        // Code, RAX before; RAX and CF after. RBX is 65.
        let cases: &[(&[u8], u64, u64, bool)] = &[
            (&[0x48, 0x0f, 0xa3, 0xd8], 2, 2, true),
            (&[0x48, 0x0f, 0xab, 0xd8], 0, 2, false),
            (&[0x48, 0x0f, 0xb3, 0xd8], 3, 1, true),
            (&[0x48, 0x0f, 0xba, 0xf8, 63], 1 << 63, 0, true),
            (&[0x0f, 0xba, 0xe8, 31], 1 << 63, 1 << 31, false),
        ];
        for &(code, rax, result, cf) in cases {
            for flags in [Rflags::empty(), Rflags::ZF | Rflags::CF] {
                let mut guest = Guest::new(CodeSize::Bits64);
                guest.set(reg::RAX, rax).set(reg::RBX, 65).set_flags(flags).finish(code);
                assert_eq!(guest.reg(reg::RAX), result, "{code:02x?}");
                assert_eq!(guest.flags().contains(Rflags::CF), cf, "{code:02x?}");
                assert_eq!(guest.flags() & Rflags::ZF, flags & Rflags::ZF, "{code:02x?}");
            }
        }
    }

    #[test]
    fn bit_strings_reach_both_ways() {
        // Code, bit offset, byte changed.
        let cases: &[(&[u8], i64, u64)] = &[
            (&[0x48, 0x0f, 0xab, 0x03], 1, DATA),
            (&[0x48, 0x0f, 0xab, 0x03], 64 * 2 + 9, DATA + 17),
            (&[0x48, 0x0f, 0xab, 0x03], -63, DATA - 8),
            (&[0x0f, 0xab, 0x03], -31, DATA - 4),
            (&[0xf0, 0x66, 0x0f, 0xab, 0x03], -15, DATA - 2),
            (&[0x66, 0x0f, 0xab, 0x03], 0x1_0001, DATA),
        ];
        for &(code, bit, byte) in cases {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.set(reg::RAX, bit as u64).set(reg::RBX, DATA).finish(code);
            assert_eq!(guest.word(byte, 1), 2, "{code:02x?} {bit}");
            assert!(!guest.flags().contains(Rflags::CF));
        }
    }

    #[test]
    fn scans_and_counts() {
        // Code, RAX before, RBX; RAX, ZF and CF after.
        let cases: &[(&[u8], u64, u64, u64, Rflags)] = &[
            (&[0x48, 0x0f, 0xbc, 0xc3], 7, 0x50, 4, Rflags::empty()),
            (&[0x48, 0x0f, 0xbc, 0xc3], 7, 0, 7, Rflags::ZF),
            (&[0x48, 0x0f, 0xbd, 0xc3], 7, 0x50, 6, Rflags::empty()),
            (&[0xf3, 0x48, 0x0f, 0xb8, 0xc3], 7, !0, 64, Rflags::empty()),
            (&[0xf3, 0x66, 0x0f, 0xb8, 0xc3], 0x7_0000, 0xf_ffff, 0x7_0010, Rflags::empty()),
            (&[0xf3, 0x0f, 0xbc, 0xc3], !0, 0, 32, Rflags::CF),
            (&[0xf3, 0x0f, 0xbd, 0xc3], !0, 1 << 31, 0, Rflags::ZF),
        ];
        for &(code, rax, rbx, result, flags) in cases {
            let mut guest = Guest::new(CodeSize::Bits64);
            guest.set(reg::RAX, rax).set(reg::RBX, rbx).finish(code);
            assert_eq!(guest.reg(reg::RAX), result, "{code:02x?}");
            let defined = if matches!(code.last(), Some(0xc3)) && code[0] == 0xf3 {
                Rflags::ZF | Rflags::CF
            } else {
                Rflags::ZF
            };
            assert_eq!(guest.flags() & defined, flags, "{code:02x?}");
        }
    }

    #[test]
    fn crc32_and_carry_chains() {
        let mut guest = Guest::new(CodeSize::Bits64);
        // crc32 eax, bl over "123456789", one byte at a time, gives the check value of CRC-32C.
        guest.set(reg::RAX, 0xffff_ffff);
        for byte in *b"123456789" {
            guest.set(reg::RBX, u64::from(byte)).finish(&[0xf2, 0x0f, 0x38, 0xf0, 0xc3]);
        }
        assert_eq!(guest.reg(reg::RAX) ^ 0xffff_ffff, 0xe306_9283);
        // adcx rax, rbx: carry in and out of CF only
        guest.set(reg::RAX, !0).set(reg::RBX, 0).set_flags(Rflags::STATUS);
        guest.finish(&[0x66, 0x48, 0x0f, 0x38, 0xf6, 0xc3]);
        assert_eq!((guest.reg(reg::RAX), guest.flags()), (0, Rflags::STATUS));
        // adox eax, ebx
        guest.set(reg::RAX, 1).set(reg::RBX, 1).set_flags(Rflags::OF | Rflags::CF);
        guest.finish(&[0xf3, 0x0f, 0x38, 0xf6, 0xc3]);
        assert_eq!((guest.reg(reg::RAX), guest.flags()), (3, Rflags::CF));
    }
}
