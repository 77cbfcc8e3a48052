//! Where other processors are known to do otherwise than those that the models are of, Intel's since Sapphire Rapids.
//!
//! [`ROWS`] is the whole list. A row says on whose hosts it holds, which cases it is about, which parts of the
//! outcome are then the host's own business, and why. It is looked at only if a case differs: the parts are taken
//! over from the host, and what is left must be equal. On hosts like the models no row holds.
//!
//! Sources: AMD64 Architecture Programmer's Manual (APM), volume and section; "measured" where it is silent, on
//! family 19h unless something else is said.

use std::ops::Range;

use iced_x86::{Code, EncodingKind, FlowControl, Instruction, Mnemonic, OpKind, Register};

use crate::capabilities::{Capabilities, Vendor};
use crate::generate::Case;
use crate::machine::{Event, Machine};

/// A part of an outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Everything.
    All,
    /// RFLAGS.
    Flags,
    /// Bits 63:32 of these general registers, as a bit mask by encoding number.
    UpperHalves(u16),
    /// MXCSR.
    Mxcsr,
    /// x87 status, tags and registers.
    X87,
    /// AVX-512 state and PKRU.
    BeyondAvx,
    /// The vector registers that are operands.
    VectorOperands,
    /// These bytes of the memory operand.
    Operand(Range<u64>),
    /// The reserved four of the eight bytes of PKRU in an area that XSAVEC writes.
    CompactPkru,
    /// The eight bytes below the stack pointer that the case starts with.
    Pushed,
}

/// A case with how both ended it.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// The case.
    pub case: &'a Case,
    /// The host's end.
    pub host: &'a (Event, Machine),
    /// The guest's end.
    pub guest: &'a (Event, Machine),
}

/// One difference between makers.
#[derive(Debug)]
pub struct Row {
    /// Whose hosts do otherwise.
    pub vendor: Vendor,
    /// What they do, and how that is known.
    pub what: &'static str,
    applies: fn(&Seen<'_>) -> bool,
    parts: &'static [Part],
}

impl Row {
    /// Whether the row is about this case on a host like this one.
    pub fn holds(&self, capabilities: &Capabilities, seen: &Seen<'_>) -> bool {
        self.vendor == capabilities.vendor && (self.applies)(seen)
    }

    /// Parts that are then not compared.
    pub fn parts(&self) -> &'static [Part] {
        self.parts
    }
}

const RCX_RSI_RDI: u16 = 1 << 1 | 1 << 6 | 1 << 7;

/// All known differences.
pub const ROWS: &[Row] = &[
    Row {
        vendor: Vendor::Amd,
        what: "66 makes near branches 16 bits wide in 64-bit mode (APM vol. 3, JMP, Jcc, CALL, RET; Intel ignores it there)",
        applies: |seen| seen.case.has_prefix(&[0x66]) && branches_near(&seen.case.instruction),
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "LOOPE and LOOPNE follow F3 and F2, not their opcode (measured)",
        applies: |seen| {
            matches!(seen.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne)
                && seen.case.has_prefix(&[0xf2, 0xf3])
        },
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "a CALL to an address that is not canonical faults before it pushes (measured)",
        applies: |seen| {
            seen.case.instruction.flow_control() == FlowControl::IndirectCall && seen.host_faults(&[13])
        },
        parts: &[Part::Pushed],
    },
    Row {
        vendor: Vendor::Amd,
        what: "UD0 and UD1 do not fetch what follows their opcode (measured)",
        applies: |seen| {
            matches!(seen.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1)
                && seen.host_faults(&[6])
                && seen.guest_faults(&[14])
        },
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "0F 0D with a register is undefined, not a NOP (APM vol. 3, PREFETCH)",
        applies: |seen| {
            use Code::*;
            let code = seen.case.instruction.code();
            matches!(code, Reservednop_rm16_r16_0F0D | Reservednop_rm32_r32_0F0D | Reservednop_rm64_r64_0F0D)
                && seen.host_faults(&[6])
        },
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "MOVSXD to a 16-bit register reads 32 bits of memory (measured; SDM: 16)",
        applies: |seen| {
            seen.case.instruction.code() == Code::Movsxd_r16_rm16
                && seen.operand_in_memory()
                && seen.host_faults(MEMORY_FAULTS)
        },
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "BT and its like with an offset in a register check their address before FS or GS is added (measured)",
        applies: |seen| bit_string_beyond(seen),
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "REP with 32-bit addresses that makes no step leaves bits 63:32 of RCX, RSI and RDI (measured)",
        applies: |seen| {
            let steps = seen.host.1.gpr[1] != seen.case.machine.gpr[1];
            repeats(&seen.case.instruction) && seen.case.has_prefix(&[0x67]) && !steps
        },
        parts: &[Part::UpperHalves(RCX_RSI_RDI)],
    },
    Row {
        vendor: Vendor::Amd,
        what: "REP CMPS and REP SCAS that fault leave the flags of the last comparison (measured)",
        applies: |seen| repeats(&seen.case.instruction) && seen.host_faults(MEMORY_FAULTS),
        parts: &[Part::Flags],
    },
    Row {
        vendor: Vendor::Amd,
        what: "CMPS looks at the operand at RDI first, and at the alignment of both before it reads them (measured on family 1Ah)",
        applies: |seen| {
            let compares = matches!(seen.mnemonic(), Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq);
            compares && seen.host_faults(MEMORY_FAULTS) && seen.guest_faults(MEMORY_FAULTS)
        },
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "EVEX instructions take memory operands of less than 16 bytes of any alignment (measured on family 1Ah)",
        applies: |seen| {
            let instruction = &seen.case.instruction;
            let short = instruction.encoding() == EncodingKind::EVEX && instruction.memory_size().size() < 16;
            short && seen.guest_faults(&[17]) && !seen.host_faults(&[17])
        },
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "VREDUCE gives a denormal although MXCSR.FZ is set, if underflow is unmasked, and calls it exact (measured on family 1Ah)",
        applies: |seen| {
            const UM: u32 = 1 << 11;
            let reduces = format!("{:?}", seen.mnemonic()).starts_with("Vreduce");
            reduces && seen.case.machine.vectors.mxcsr & UM == 0
        },
        parts: &[Part::VectorOperands, Part::Mxcsr],
    },
    Row {
        vendor: Vendor::Amd,
        what: "XRSTOR that finds a reserved bit of MXCSR has restored nothing (measured on family 1Ah)",
        applies: |seen| restores(seen) && seen.host_faults(&[13]) && seen.guest_faults(&[13]),
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "RFLAGS.AC checks vector operands of 16 bytes and more, and half-precision ones (APM vol. 4, exceptions)",
        applies: |seen| {
            let checked = seen.case.instruction.memory_size().size() >= 16
                || matches!(seen.mnemonic(), Mnemonic::Vcvtph2ps | Mnemonic::Vcvtps2ph);
            checked && seen.host_faults(&[17]) && !seen.guest_faults(&[17])
        },
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "SHA1 and SHA256 instructions take operands of any alignment (measured)",
        applies: |seen| {
            let sha = format!("{:?}", seen.mnemonic()).starts_with("Sha");
            sha && seen.case.target.is_some_and(|target| target % 16 != 0) && seen.guest_faults(&[13])
        },
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "XSAVE areas that are not aligned are #GP before anything else (measured)",
        applies: |seen| {
            seen.case.instruction.is_save_restore_instruction()
                && seen.case.target.is_some_and(|target| target % 64 != 0)
                && seen.host_faults(&[13])
                && seen.guest_faults(&[12, 17])
        },
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "XRSTOR judges its header before it looks at the rest of its area (measured)",
        applies: |seen| restores(seen) && seen.host_faults(&[13]) && seen.guest_faults(&[14]),
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "XSAVE areas on pages of which more than one faults are looked at in another order (measured)",
        applies: |seen| {
            let family = seen.case.instruction.is_save_restore_instruction();
            family && seen.host_faults(&[14]) && seen.guest_faults(&[14])
        },
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "the standard format ends sooner, with the components beyond AVX at other offsets (CPUID leaf 0DH)",
        applies: |seen| {
            (restores(seen) || saves_standard(seen))
                && seen.requested(BEYOND_AVX)
                && seen.host.0 == Event::Completed
                && seen.guest_faults(&[14])
        },
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "XSAVE has the components beyond AVX at other offsets (CPUID leaf 0DH)",
        applies: |seen| saves_standard(seen) && seen.requested(BEYOND_AVX),
        parts: &[Part::Operand(0x340..0xa88)],
    },
    Row {
        vendor: Vendor::Amd,
        what: "XRSTOR has the components beyond AVX at other offsets (CPUID leaf 0DH)",
        applies: |seen| {
            restores(seen)
                && seen.requested(BEYOND_AVX)
                && seen.host.0 == Event::Completed
                && seen.guest.0 == Event::Completed
        },
        parts: &[Part::BeyondAvx],
    },
    Row {
        vendor: Vendor::Amd,
        what: "PKRU is saved as four bytes of its eight (measured)",
        applies: |seen| {
            matches!(seen.mnemonic(), Mnemonic::Xsavec | Mnemonic::Xsavec64)
                && seen.requested(PKRU)
                && !seen.requested(AVX)
        },
        parts: &[Part::Operand(0x244..0x248)],
    },
    Row {
        vendor: Vendor::Amd,
        what: "PKRU is saved as four bytes of its eight, behind AVX state (measured)",
        applies: |seen| {
            matches!(seen.mnemonic(), Mnemonic::Xsavec | Mnemonic::Xsavec64)
                && seen.requested(PKRU)
                && seen.requested(AVX)
        },
        parts: &[Part::Operand(0x344..0x348)],
    },
    Row {
        vendor: Vendor::Skylake,
        what: "PKRU is saved as four bytes of its eight (measured)",
        applies: |seen| saves_standard(seen) && seen.requested(PKRU),
        parts: &[Part::Operand(0xa84..0xa88)],
    },
    Row {
        vendor: Vendor::Skylake,
        what: "PKRU is saved as four bytes of its eight, by XSAVEC too (measured)",
        applies: |seen| {
            matches!(seen.mnemonic(), Mnemonic::Xsavec | Mnemonic::Xsavec64) && seen.requested(PKRU)
        },
        parts: &[Part::CompactPkru],
    },
    Row {
        vendor: Vendor::Skylake,
        what: "XRSTOR has loaded components when it finds that MXCSR or the header will not do (measured)",
        applies: |seen| restores(seen) && seen.host_faults(&[13]) && seen.guest_faults(&[13]),
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "MXCSR has the bit MM, so MXCSR_MASK has it (APM vol. 2, MXCSR)",
        applies: |seen| seen.case.instruction.is_save_restore_instruction(),
        parts: &[Part::Operand(30..31)],
    },
    Row {
        vendor: Vendor::Amd,
        what: "FOP, FIP and FDP are saved as 0 unless an unmasked x87 exception is pending (APM vol. 2, FXSAVE)",
        applies: |seen| seen.case.instruction.is_save_restore_instruction() && !seen.host.1.vectors.pending(),
        parts: &[Part::Operand(6..8), Part::Operand(8..24)],
    },
    Row {
        vendor: Vendor::Amd,
        what: "stores of x87 values look at their memory before they raise an unmasked exception (measured)",
        applies: |seen| {
            stores_x87(seen) && seen.guest.0 == Event::Completed && seen.guest.1.vectors.pending()
        },
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "stores of ten bytes of which the last two fault write nothing (measured)",
        applies: |seen| stores_x87(seen) && seen.case.instruction.memory_size().size() == 10,
        parts: &[Part::Operand(0..10)],
    },
    Row {
        vendor: Vendor::Amd,
        what: "an MMX instruction whose store faults has not gone to MMX state yet (measured)",
        applies: |seen| {
            let operands = 0..seen.case.instruction.op_count();
            let mmx = |i| seen.case.instruction.op_register(i).is_mm();
            seen.operand_in_memory() && operands.into_iter().any(mmx) && seen.host_faults(MEMORY_FAULTS)
        },
        parts: &[Part::X87],
    },
    Row {
        vendor: Vendor::Amd,
        what: "VCVTPS2PH to memory that faults leaves MXCSR (measured)",
        applies: |seen| converts_to_memory(seen),
        parts: &[Part::Mxcsr],
    },
    Row {
        vendor: Vendor::Amd,
        what: "VCVTPS2PH looks at its memory before it raises an unmasked exception (measured)",
        applies: |seen| converts_to_memory(seen) && seen.guest_faults(&[19]),
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "VCVTPS2PH with underflow unmasked takes a denormal source for inexact only if it is (measured)",
        applies: |seen| inexact_denormal(seen) && seen.host_faults(&[19]),
        parts: &[Part::Mxcsr],
    },
    Row {
        vendor: Vendor::Amd,
        what: "VCVTPS2PH with underflow unmasked does not fault for an exact denormal source (measured)",
        applies: |seen| inexact_denormal(seen) && seen.host.0 == Event::Completed,
        parts: &[Part::All],
    },
    Row {
        vendor: Vendor::Amd,
        what: "a gather that faults leaves other elements done and the upper half as it was (measured)",
        applies: |seen| seen.case.instruction.is_vsib() && seen.host_faults(MEMORY_FAULTS),
        parts: &[Part::VectorOperands],
    },
    Row {
        vendor: Vendor::Amd,
        what: "MASKMOVDQU faults for bytes that its mask leaves out (APM vol. 4: up to the implementation)",
        applies: |seen| {
            use Mnemonic::*;
            matches!(seen.mnemonic(), Maskmovdqu | Vmaskmovdqu | Maskmovq) && seen.host_faults(MEMORY_FAULTS)
        },
        parts: &[Part::All],
    },
];

/// XCR0 bits: AVX; protection keys; AVX-512 and protection keys.
const AVX: u64 = 1 << 2;
const PKRU: u64 = 1 << 9;
/// Components before PKRU, and their sizes in bytes (SDM vol. 1, 13.4.3; CPUID leaf 0DH).
const COMPACT_SIZES: [(u32, u64); 4] = [(2, 0x100), (5, 0x40), (6, 0x200), (7, 0x400)];
const BEYOND_AVX: u64 = 7 << 5 | PKRU;

/// Exceptions of memory accesses: #SS, #GP, #PF, #AC.
const MEMORY_FAULTS: &[u8] = &[12, 13, 14, 17];

impl Seen<'_> {
    fn host_faults(&self, vectors: &[u8]) -> bool {
        is_fault(&self.host.0, vectors)
    }

    fn guest_faults(&self, vectors: &[u8]) -> bool {
        is_fault(&self.guest.0, vectors)
    }

    fn mnemonic(&self) -> Mnemonic {
        self.case.instruction.mnemonic()
    }

    /// Whether EDX:EAX asks XSAVE or XRSTOR for any of `components`.
    fn requested(&self, components: u64) -> bool {
        let gpr = &self.case.machine.gpr;
        let mask = gpr[0] & 0xffff_ffff | gpr[2] << 32;
        mask & components != 0
    }

    fn operand_in_memory(&self) -> bool {
        self.case.instruction.op_kinds().any(|kind| kind == OpKind::Memory)
    }
}

fn is_fault(event: &Event, vectors: &[u8]) -> bool {
    matches!(event, Event::Fault { vector, .. } if vectors.contains(vector))
}

fn branches_near(instruction: &Instruction) -> bool {
    use FlowControl::*;
    let flow = instruction.flow_control();
    matches!(flow, UnconditionalBranch | IndirectBranch | ConditionalBranch | Return | Call | IndirectCall)
}

fn repeats(instruction: &Instruction) -> bool {
    instruction.is_string_instruction() && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
}

fn stores_x87(seen: &Seen<'_>) -> bool {
    use Mnemonic::*;
    let store = matches!(seen.mnemonic(), Fst | Fstp | Fist | Fistp | Fisttp | Fbstp);
    store && seen.operand_in_memory() && seen.host_faults(MEMORY_FAULTS)
}

fn converts_to_memory(seen: &Seen<'_>) -> bool {
    seen.mnemonic() == Mnemonic::Vcvtps2ph && seen.operand_in_memory() && seen.host_faults(MEMORY_FAULTS)
}

fn restores(seen: &Seen<'_>) -> bool {
    matches!(seen.mnemonic(), Mnemonic::Xrstor | Mnemonic::Xrstor64)
}

fn saves_standard(seen: &Seen<'_>) -> bool {
    use Mnemonic::*;
    matches!(seen.mnemonic(), Xsave | Xsave64 | Xsaveopt | Xsaveopt64)
}

/// VCVTPS2PH with underflow unmasked that raises #XM on Intel's processors.
fn inexact_denormal(seen: &Seen<'_>) -> bool {
    const UM: u32 = 1 << 11;
    seen.mnemonic() == Mnemonic::Vcvtps2ph
        && seen.case.machine.vectors.mxcsr & UM == 0
        && seen.guest_faults(&[19])
}

/// A bit string's access whose address is canonical only with the base of FS or GS.
fn bit_string_beyond(seen: &Seen<'_>) -> bool {
    use Mnemonic::*;
    let base = match seen.case.instruction.segment_prefix() {
        Register::FS => seen.case.machine.fs_base,
        Register::GS => seen.case.machine.gs_base,
        _ => return false,
    };
    let bits = matches!(seen.mnemonic(), Bt | Bts | Btr | Btc)
        && seen.case.instruction.op1_kind() == OpKind::Register;
    let Event::Fault { vector: 14, address, .. } = seen.guest.0 else { return false };
    let offset = address.wrapping_sub(base);
    let canonical = (offset << 16) as i64 >> 16 == offset as i64;
    bits && seen.host_faults(&[13]) && !canonical
}

/// Takes `part` over from the host.
pub fn adopt(part: &Part, case: &Case, host: &(Event, Machine), guest: &mut (Event, Machine)) {
    let (h, g) = (&host.1, &mut guest.1);
    match part {
        Part::All => *guest = host.clone(),
        Part::Flags => g.rflags = h.rflags,
        Part::UpperHalves(registers) => {
            for i in (0..16).filter(|i| registers & 1 << i != 0) {
                g.gpr[i] = g.gpr[i] & 0xffff_ffff | h.gpr[i] & !0xffff_ffff;
            }
        }
        Part::Mxcsr => g.vectors.mxcsr = h.vectors.mxcsr,
        Part::X87 => {
            let (from, to) = (&h.vectors, &mut g.vectors);
            (to.fsw, to.ftw, to.st) = (from.fsw, from.ftw, from.st);
        }
        Part::BeyondAvx => {
            let (from, to) = (&h.vectors, &mut g.vectors);
            (to.k, to.pkru) = (from.k, from.pkru);
            for (i, (to, from)) in to.zmm.iter_mut().zip(&from.zmm).enumerate() {
                let first = if i < 16 { 32 } else { 0 };
                to[first..].copy_from_slice(&from[first..]);
            }
        }
        Part::VectorOperands => {
            let operands = (0..case.instruction.op_count()).map(|i| case.instruction.op_register(i));
            for register in operands.filter(|r| r.is_vector_register()) {
                g.vectors.zmm[register.number()] = h.vectors.zmm[register.number()];
            }
        }
        Part::Operand(_) | Part::CompactPkru | Part::Pushed => {}
    }
}

/// The memory that `part` is: first address and length.
pub fn memory(part: &Part, case: &Case) -> Option<(u64, u64)> {
    match part {
        Part::Operand(range) => {
            case.target.map(|target| (target.wrapping_add(range.start), range.end - range.start))
        }
        Part::CompactPkru => {
            let mask = case.machine.gpr[0];
            let before = COMPACT_SIZES.iter().filter(|(component, _)| mask & 1 << component != 0);
            let offset = 0x244 + before.map(|(_, size)| size).sum::<u64>();
            case.target.map(|target| (target.wrapping_add(offset), 4))
        }
        Part::Pushed => Some((case.machine.gpr[4].wrapping_sub(8), 8)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::Generator;

    #[test]
    fn nothing_is_excepted_on_the_processors_that_are_modelled() {
        assert!(ROWS.iter().all(|row| row.vendor != Vendor::Intel && row.vendor != Vendor::Other));
        let case = Generator::new(Capabilities::all()).case(Code::Ud1_r32_rm32, 1, 0).expect("encodable");
        let end = |vector| (Event::Fault { vector, error: 0, address: 0 }, case.machine.clone());
        let seen = Seen { case: &case, host: &end(6), guest: &end(14) };
        let holds = |vendor| {
            let host = Capabilities { vendor, ..Capabilities::all() };
            ROWS.iter().filter(|row| row.holds(&host, &seen)).count()
        };
        assert_eq!([holds(Vendor::Intel), holds(Vendor::Other), holds(Vendor::Amd)], [0, 0, 1]);
    }

    #[test]
    fn a_row_takes_over_its_parts_and_no_others() {
        let case = Generator::new(Capabilities::all()).case(Code::Movsd_m32_m32, 1, 0).expect("encodable");
        let mut host = (Event::Completed, Machine::default());
        host.1.gpr = [0x1111_2222_3333_4444; 16];
        host.1.rflags = 0x855;
        let mut guest = (Event::Completed, Machine::default());
        adopt(&Part::UpperHalves(1 << 1), &case, &host, &mut guest);
        assert_eq!((guest.1.gpr[0], guest.1.gpr[1], guest.1.rflags), (0, 0x1111_2222_0000_0000, 0));
    }
}
