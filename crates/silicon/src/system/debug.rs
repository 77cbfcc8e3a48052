//! Debug registers: breakpoints and the state that debug exceptions leave (SDM vol. 3B, chapter 17).

use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::flags::Rflags;
use crate::model::Feature;
use crate::state::{CpuState, cr4, interruptibility};
use crate::vmx::Space;

/// DR6.B0 to B3: the breakpoints that were met. Every debug exception replaces them.
pub(crate) const DR6_TRAPS: u64 = 0xf;
/// DR6.BLD: a bus lock was taken. Inverted in DR6, and kept there by every other debug exception; not inverted in payloads
/// and pending debug exceptions, as in the VMCS.
pub(crate) const DR6_BUS_LOCK: u64 = 1 << 11;
/// DR6.BD: access to a debug register under DR7.GD.
pub(crate) const DR6_BD: u64 = 1 << 13;
/// DR6.BS: single step.
pub(crate) const DR6_BS: u64 = 1 << 14;
/// DR6.BT: switch to a task whose TSS has the T bit.
pub(crate) const DR6_BT: u64 = 1 << 15;
/// DR6 bits that MOV can change; BLD too where there is bus-lock detection.
pub(crate) const DR6_WRITABLE: u64 = DR6_TRAPS | DR6_BD | DR6_BS | DR6_BT;
/// DR6 bits that read as one: among them RTM, whose meaning is inverted, and BLD where there is no bus-lock detection.
pub(crate) const DR6_FIXED: u64 = 0xffff_0ff0;

/// DR7 bits.
pub(crate) mod dr7 {
    /// Local and global enables of breakpoints 0 to 3.
    pub(crate) const ENABLES: u64 = 0xff;
    /// The local enables among them, and LE: what a task switch clears.
    pub(crate) const LOCAL: u64 = 0x155;
    /// General detect.
    pub(crate) const GD: u64 = 1 << 13;
    /// Bits that MOV can change.
    pub(crate) const WRITABLE: u64 = 0xffff_23ff;
    /// Bits that read as one.
    pub(crate) const FIXED: u64 = 0x400;
}

/// What a breakpoint watches: the R/W field of DR7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    Execution = 0,
    Write = 1,
    Port = 2,
    ReadWrite = 3,
}

impl CpuState {
    /// DR6 bits of the enabled breakpoints for which `hit(watch, first, length)` holds.
    fn breakpoints(&self, hit: impl Fn(Watch, u64, u64) -> bool) -> u64 {
        (0..4)
            .filter(|i| self.dr7 & (3 << (2 * i)) != 0)
            .filter(|&i| {
                let field = self.dr7 >> (16 + 4 * i);
                let watch = match field & 3 {
                    0 => Watch::Execution,
                    1 => Watch::Write,
                    2 => Watch::Port,
                    _ => Watch::ReadWrite,
                };
                let length = [1, 2, 8, 4][(field >> 2) as usize & 3];
                hit(watch, self.dr[i as usize] & !(length - 1), length)
            })
            .fold(0, |bits, i| bits | (1 << i))
    }

    /// Whether any breakpoint is enabled.
    #[inline]
    pub(crate) fn any_breakpoint(&self) -> bool {
        self.dr7 & dr7::ENABLES != 0
    }

    /// DR6 bits of the data breakpoints that an access of `len` bytes at linear address `lin` meets.
    pub fn watched(&self, lin: u64, len: u64, write: bool) -> u64 {
        if !self.any_breakpoint() {
            return 0;
        }
        self.breakpoints(|watch, first, length| {
            let kind = watch == Watch::ReadWrite || (write && watch == Watch::Write);
            kind && overlaps(first, length, lin, len)
        })
    }

    /// DR6 bits of the I/O breakpoints that an access of `len` bytes at `port` meets (under CR4.DE).
    pub fn watched_port(&self, port: u64, len: u64) -> u64 {
        if !self.any_breakpoint() || self.cr4 & cr4::DE == 0 {
            return 0;
        }
        self.breakpoints(|watch, first, length| watch == Watch::Port && overlaps(first, length, port, len))
    }

    /// DR6 bits of the instruction breakpoints at linear address `lin`.
    pub(crate) fn watched_code(&self, lin: u64) -> u64 {
        if !self.any_breakpoint() {
            return 0;
        }
        self.breakpoints(|watch, first, _| watch == Watch::Execution && first == lin)
    }
}

fn overlaps(a: u64, a_len: u64, b: u64, b_len: u64) -> bool {
    b.wrapping_sub(a) < a_len || a.wrapping_sub(b) < b_len
}

impl Cpu {
    /// The fault of an instruction breakpoint at RIP, unless RF or a MOV SS shadow suppresses it.
    pub(crate) fn check_code_breakpoint(&mut self) -> Result<(), Abort> {
        let suppressed = self.state.flag(Rflags::RF)
            || self.state.interruptibility & interruptibility::MOV_SS != 0
            || !self.replay.done.is_empty();
        if suppressed || !self.state.any_breakpoint() {
            return Ok(());
        }
        match self.state.watched_code(self.code_linear()) {
            0 => Ok(()),
            hits => Err(self.raise(Exception::db(hits))),
        }
    }

    /// Notes the I/O breakpoints that the port accesses of the instruction have met; before the replay log
    /// that remembers them is cleared.
    #[cold]
    pub(crate) fn note_port_breakpoints(&mut self) {
        for (access, _) in &self.replay.done {
            if access.space == Space::Port {
                self.pending_debug |= self.state.watched_port(access.address, u64::from(access.size));
            }
        }
    }

    /// Reads a debug register as MOV does; DR4 and DR5 are DR6 and DR7 here.
    pub fn debug_register(&self, number: u8) -> u64 {
        match number {
            0..=3 => self.state.dr[usize::from(number & 3)],
            4 | 6 => self.state.dr6,
            _ => self.state.dr7,
        }
    }

    /// Writes a debug register as MOV does: reserved bits keep their fixed values.
    pub fn set_debug_register(&mut self, number: u8, value: u64) {
        match number {
            0..=3 => self.state.dr[usize::from(number & 3)] = value,
            4 | 6 => {
                let own = if self.features.has(Feature::BusLockDetect) { DR6_BUS_LOCK } else { 0 };
                self.state.dr6 = (value & (DR6_WRITABLE | own)) | (DR6_FIXED & !own);
            }
            _ => self.state.dr7 = (value & dr7::WRITABLE) | dr7::FIXED,
        }
        self.debug_changed();
        self.refresh_local();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Breakpoint 1 on `address`, with the R/W and LEN fields.
    fn armed(address: u64, rw: u64, len: u64) -> CpuState {
        let mut state = CpuState::reset(0);
        state.dr[1] = address;
        state.dr7 = 0x400 | (1 << 2) | (rw << 20) | (len << 22);
        state
    }

    #[test]
    fn data_breakpoints_match_by_overlap_and_direction() {
        // (address, rw, len field, access, bytes, write, hit)
        let table = [
            (0x1000, 1, 3, 0x1000, 4, true, true),
            (0x1000, 1, 3, 0x1003, 1, true, true),
            (0x1000, 1, 3, 0x1004, 1, true, false),
            (0x1000, 1, 3, 0xffd, 4, true, true),
            (0x1000, 1, 3, 0xffc, 4, true, false),
            (0x1000, 1, 3, 0x1000, 4, false, false),
            (0x1000, 3, 3, 0x1000, 4, false, true),
            (0x1003, 1, 3, 0x1000, 1, true, true),
            (0x1000, 1, 2, 0x1007, 1, true, true),
            (0x1000, 0, 0, 0x1000, 1, false, false),
        ];
        for (address, rw, len, at, bytes, write, hit) in table {
            let state = armed(address, rw, len);
            let bits = if hit { 2 } else { 0 };
            assert_eq!(
                state.watched(at, bytes, write),
                bits,
                "{address:x} {rw} {len} {at:x} {bytes} {write}"
            );
        }
    }

    #[test]
    fn port_breakpoints_need_cr4_de() {
        let mut state = armed(0x80, 2, 0);
        assert_eq!(state.watched_port(0x80, 1), 0);
        state.cr4 |= cr4::DE;
        assert_eq!(state.watched_port(0x80, 1), 2);
        assert_eq!(state.watched_port(0x7f, 2), 2);
        assert_eq!(state.watched_port(0x81, 1), 0);
    }

    #[test]
    fn code_breakpoints_match_the_first_byte() {
        let state = armed(0x1234, 0, 0);
        assert_eq!(state.watched_code(0x1234), 2);
        assert_eq!(state.watched_code(0x1235), 0);
        assert_eq!(state.watched(0x1234, 1, true), 0);
    }
}
