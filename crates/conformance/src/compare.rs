//! What must be equal after a test case, and how a difference is told.

use iced_x86::{Instruction, MemorySize, Mnemonic, OpKind, RflagsBits};

use crate::capabilities::Capabilities;
use crate::forms::{Tolerance, tolerance};
use crate::generate::Case;
use crate::layout::PAGE;
use crate::machine::{Event, Machine};

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// RFLAGS bits that are compared: all that user code sees and can change. IF and IOPL are the operating
/// system's, TF is never set, RF is only ever seen in saved images.
const COMPARED_FLAGS: u64 = 0x24_4cd5;

/// iced-x86's flag bits, RFLAGS bits.
const FLAG_BITS: [(u32, u64); 8] = [
    (RflagsBits::OF, 1 << 11),
    (RflagsBits::SF, 1 << 7),
    (RflagsBits::ZF, 1 << 6),
    (RflagsBits::AF, 1 << 4),
    (RflagsBits::CF, 1 << 0),
    (RflagsBits::PF, 1 << 2),
    (RflagsBits::DF, 1 << 10),
    (RflagsBits::AC, 1 << 18),
];

/// iced-x86's condition code bits of the x87 status word, and theirs.
const CONDITION_BITS: [(u32, u16); 4] = [
    (RflagsBits::C0, 1 << 8),
    (RflagsBits::C1, 1 << 9),
    (RflagsBits::C2, 1 << 10),
    (RflagsBits::C3, 1 << 14),
];

/// The outcome of a comparison.
#[derive(Clone, Debug, Default)]
pub struct Difference {
    /// What must be equal and is not, one item each: `name host guest`.
    pub defined: Vec<String>,
    /// Whether bits that the architecture leaves undefined differ.
    pub undefined: bool,
    /// What differs and is known to, on this maker's processors: indices into [`crate::vendor::ROWS`].
    pub excepted: Vec<usize>,
}

impl Difference {
    /// Whether FOP, FIP or FDP differ, or memory if that `shows` them.
    pub fn names_pointers(&self, shows: bool) -> bool {
        let names = |item: &String| ["fop ", "fip ", "fdp "].iter().any(|name| item.starts_with(name));
        self.defined.iter().any(|item| names(item) || shows && item.starts_with("memory "))
    }
}

/// Compares how the host and the guest ended `case`; memory is compared by the caller.
pub fn compare(
    case: &Case,
    host: &(Event, Machine),
    guest: &(Event, Machine),
    capabilities: &Capabilities,
) -> Difference {
    let mut difference = Difference::default();
    let out = &mut difference.defined;
    let instruction = &case.instruction;
    if comparable(&host.0, instruction) != comparable(&guest.0, instruction) {
        out.push(format!("end {} / {}", host.0, guest.0));
    }
    let allowed = tolerance(case.instruction.mnemonic());
    let undefined = case.instruction.rflags_undefined();
    let loose = Loose {
        flags: flags(undefined) | allowed.flags,
        conditions: conditions(undefined),
        registers: (0..16)
            .filter(|i| tolerated(&allowed, &case.instruction, *i))
            .fold(0, |all, i| all | 1 << i),
        pointers: !capabilities.knows_pointers(&host.1.vectors),
    };
    let (h, g) = (&host.1, &guest.1);
    states(out, h, g, &loose);
    let status = h.vectors.fsw ^ g.vectors.fsw;
    let differ = (h.rflags ^ g.rflags) & COMPARED_FLAGS & loose.flags & !allowed.flags;
    difference.undefined = differ != 0 || status & loose.conditions != 0;
    difference
}

/// What of two states need not be equal.
#[derive(Clone, Copy, Debug, Default)]
pub struct Loose {
    /// RFLAGS bits.
    pub flags: u64,
    /// Condition codes of the x87 status word.
    pub conditions: u16,
    /// General registers by encoding number, as a bit mask.
    pub registers: u16,
    /// FOP, FIP and FDP.
    pub pointers: bool,
}

/// What differs between two states, one item each: `name one / other`.
pub fn states(out: &mut Vec<String>, h: &Machine, g: &Machine, loose: &Loose) {
    number(out, "rip", h.rip, g.rip);
    for (i, name) in NAMES.iter().enumerate().filter(|(i, _)| loose.registers & 1 << i == 0) {
        number(out, name, h.gpr[i], g.gpr[i]);
    }
    number(out, "fs_base", h.fs_base, g.fs_base);
    number(out, "gs_base", h.gs_base, g.gs_base);
    if (h.rflags ^ g.rflags) & COMPARED_FLAGS & !loose.flags != 0 {
        out.push(format!("rflags {:#x} / {:#x}", h.rflags & COMPARED_FLAGS, g.rflags & COMPARED_FLAGS));
    }
    if (h.vectors.fsw ^ g.vectors.fsw) & !loose.conditions != 0 {
        out.push(format!("fsw {:#x} / {:#x}", h.vectors.fsw, g.vectors.fsw));
    }
    vectors(out, h, g, !loose.pointers);
}

/// RFLAGS bits of iced-x86's.
pub fn flags(set: u32) -> u64 {
    FLAG_BITS.iter().filter(|(bit, _)| set & bit != 0).fold(0, |all, (_, bit)| all | bit)
}

/// x87 condition codes of iced-x86's bits.
pub fn conditions(set: u32) -> u16 {
    CONDITION_BITS.iter().filter(|(bit, _)| set & bit != 0).fold(0, |all, (_, bit)| all | bit)
}

/// First address above user space. Linux says for all faults there that the page is present.
const USER_END: u64 = 0x7fff_ffff_f000;

/// The event, less what cannot be compared: the present bit of page faults above user space, and where in a page
/// an `instruction` that makes many accesses faults first.
pub fn comparable(event: &Event, instruction: &Instruction) -> Event {
    let Event::Fault { vector: 14, mut error, mut address } = *event else { return *event };
    if address >= USER_END {
        error &= !1;
    }
    let size = instruction.memory_size();
    let many = size.size() > 64
        || instruction.is_save_restore_instruction()
        || matches!(size, MemorySize::FpuEnv14 | MemorySize::FpuEnv28);
    if many || is_masked(instruction) {
        address &= !(PAGE - 1);
    }
    Event::Fault { vector: 14, error, address }
}

/// Whether a mask says which parts of the memory operand are accessed.
fn is_masked(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let name = instruction.mnemonic();
    instruction.has_op_mask()
        || matches!(name, Maskmovq | Maskmovdqu | Vmaskmovdqu | Vmaskmovps | Vmaskmovpd)
        || matches!(name, Vpmaskmovd | Vpmaskmovq)
}

fn tolerated(allowed: &Tolerance, instruction: &Instruction, register: usize) -> bool {
    let destination = allowed.destination
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register().full_register().number() == register;
    destination || allowed.gpr & (1 << register) != 0
}

fn number(out: &mut Vec<String>, name: &str, host: u64, guest: u64) {
    if host != guest {
        out.push(format!("{name} {host:#x} / {guest:#x}"));
    }
}

fn vectors(out: &mut Vec<String>, h: &Machine, g: &Machine, pointers: bool) {
    let (h, g) = (&h.vectors, &g.vectors);
    if h == g {
        return;
    }
    number(out, "mxcsr", h.mxcsr.into(), g.mxcsr.into());
    number(out, "pkru", h.pkru.into(), g.pkru.into());
    number(out, "fcw", h.fcw.into(), g.fcw.into());
    number(out, "ftw", h.ftw.into(), g.ftw.into());
    if pointers {
        number(out, "fop", h.fop.into(), g.fop.into());
        number(out, "fip", h.fip, g.fip);
        number(out, "fdp", h.fdp, g.fdp);
    }
    for i in 0..8 {
        bytes(out, &format!("st({i})"), &h.st[i], &g.st[i]);
        number(out, &format!("k{i}"), h.k[i], g.k[i]);
    }
    for i in 0..32 {
        bytes(out, &format!("zmm{i}"), &h.zmm[i], &g.zmm[i]);
    }
}

/// Tells the part that differs, most significant byte first.
pub fn bytes(out: &mut Vec<String>, name: &str, host: &[u8], guest: &[u8]) {
    let Some(first) = host.iter().zip(guest).position(|(h, g)| h != g) else { return };
    let last = host.iter().zip(guest).rposition(|(h, g)| h != g).unwrap_or(first);
    let last = last.min(first + 31);
    let hex = |bytes: &[u8]| bytes[first..=last].iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
    out.push(format!("{name}[{last}:{first}] {} / {}", hex(host), hex(guest)));
}
