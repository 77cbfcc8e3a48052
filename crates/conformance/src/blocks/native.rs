//! Which programs the host's processor can be the reference of.
//!
//! A program computes addresses as it likes, so it may reach memory of this process that is no window. The interpreter goes
//! first, for it has nothing but the windows: what ends there, or at an address at which this process has nothing, ends so on the host.

use iced_x86::{EncodingKind, Instruction, Mnemonic};

use crate::capabilities::{Capabilities, Vendor};
use crate::layout::{CODE, DATA, DATA_PAGES, PAGE};
use crate::machine::Event;

/// Whether an end that the interpreter found is one that the host comes to without touching anything but the windows.
pub fn stays_in_windows(end: &Event) -> bool {
    match *end {
        Event::Fault { vector: 14, address, .. } => {
            (CODE..CODE + 0x1_0000).contains(&address)
                || (DATA..DATA + PAGE * DATA_PAGES.len() as u64).contains(&address)
                || address >= 0x7fff_ffff_f000
        }
        Event::Completed | Event::Fault { .. } => true,
        Event::Endless | Event::Exit(_) => false,
    }
}

/// Whether this host does with the instruction what the model does, as part of a program.
pub fn compares(instruction: &Instruction, host: &Capabilities) -> bool {
    !depends_on_system(instruction) && (host.vendor != Vendor::Amd || !differs_on_amd(instruction))
}

/// What the operating system's XCR0, or state that it saves for itself, has a part in.
fn depends_on_system(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        instruction.mnemonic(),
        Xsave | Xsave64 | Xsavec | Xsavec64 | Xsaveopt | Xsaveopt64 | Xrstor | Xrstor64 | Xgetbv | Fxrstor64
    )
}

/// Instructions that rows of [`crate::vendor::ROWS`] are about, whatever their operands are.
fn differs_on_amd(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let name = format!("{:?}", instruction.mnemonic());
    let short = instruction.encoding() == EncodingKind::EVEX && instruction.memory_size().size() < 16;
    let x87 = name.starts_with('F');
    let mmx = (0..instruction.op_count()).any(|i| instruction.op_register(i).is_mm());
    x87 || mmx
        || (short && instruction.memory_size().size() != 0)
        || instruction.is_vsib()
        || instruction.is_string_instruction()
        || ["Sha", "Vreduce", "Vmaskmov", "Vcvtps2ph", "Vcvtph2ps"]
            .iter()
            .any(|start| name.starts_with(start))
        || matches!(instruction.mnemonic(), Maskmovdqu | Maskmovq | Movsxd | Bt | Bts | Btr | Btc | Ud0 | Ud1)
        || name.starts_with("Reservednop")
}

/// What no program contains: what is not the same twice, takes rights to memory away, waits, or sets TF.
pub fn unsuited(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Rdtsc
            | Rdtscp
            | Rdpid
            | Rdrand
            | Rdseed
            | Wrpkru
            | Umonitor
            | Umwait
            | Tpause
            | Popf
            | Popfd
            | Popfq
            | Ud0
            | Ud1
            | Ud2
    )
}

/// Whether this host does with RFLAGS that a program starts with what the model does. AMD's processors check the alignment of more
/// accesses with AC.
pub fn compares_flags(rflags: u64, host: &Capabilities) -> bool {
    host.vendor != Vendor::Amd || rflags & 1 << 18 == 0
}
