//! RFLAGS and the packed form in which the interpreter keeps the six status flags.
//!
//! Arithmetic runs on the host's own ALU, and its flags are read back with `LAHF; SETO AL`. The resulting AX
//! is what [`Status`] holds: two host instructions store it and every condition is a bit test on it, with no
//! lazy evaluation. (Intel SDM vol. 1, 3.4.3; vol. 2, LAHF.)

use bitflags::bitflags;

bitflags! {
    /// RFLAGS (Intel SDM vol. 1, figure 3-8).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Rflags: u64 {
        /// Carry.
        const CF = 1 << 0;
        /// Always one.
        const FIXED = 1 << 1;
        /// Parity of the low byte.
        const PF = 1 << 2;
        /// Auxiliary (BCD) carry.
        const AF = 1 << 4;
        /// Zero.
        const ZF = 1 << 6;
        /// Sign.
        const SF = 1 << 7;
        /// Trap: single-step.
        const TF = 1 << 8;
        /// Interrupt enable.
        const IF = 1 << 9;
        /// Direction of string instructions.
        const DF = 1 << 10;
        /// Overflow.
        const OF = 1 << 11;
        /// I/O privilege level, two bits.
        const IOPL = 3 << 12;
        /// Nested task.
        const NT = 1 << 14;
        /// Resume: suppresses instruction breakpoints for one instruction.
        const RF = 1 << 16;
        /// Virtual-8086 mode.
        const VM = 1 << 17;
        /// Alignment check, and the SMAP override.
        const AC = 1 << 18;
        /// Virtual interrupt flag.
        const VIF = 1 << 19;
        /// Virtual interrupt pending.
        const VIP = 1 << 20;
        /// CPUID is there.
        const ID = 1 << 21;
    }
}

impl Rflags {
    /// The six flags that arithmetic writes.
    pub const STATUS: Rflags =
        Rflags::CF.union(Rflags::PF).union(Rflags::AF).union(Rflags::ZF).union(Rflags::SF).union(Rflags::OF);
    /// What POPF, IRET and task switches can hold in the low 22 bits.
    pub const DEFINED: u64 = 0x3f_7fd5;
}

/// The six status flags as AX after `LAHF; SETO AL`:
/// bit 0 OF, bit 8 CF, bit 10 PF, bit 12 AF, bit 14 ZF, bit 15 SF. Other bits carry nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Status(pub u16);

impl Status {
    /// The bits that carry something.
    pub(crate) const MASK: u16 = 0xd501;

    /// From RFLAGS bits; bits other than the status flags are ignored.
    #[inline]
    pub fn from_rflags(rflags: u64) -> Status {
        Status((((rflags & 0xd5) as u16) << 8) | ((rflags >> 11) & 1) as u16)
    }

    /// As RFLAGS bits (status flags only).
    #[inline]
    pub fn to_rflags(self) -> u64 {
        let bits = self.0 & Self::MASK;
        u64::from(bits >> 8) | (u64::from(bits & 1) << 11)
    }

    /// Carry flag.
    #[inline(always)]
    pub fn cf(self) -> bool {
        self.0 & (1 << 8) != 0
    }
    /// Parity flag.
    #[inline(always)]
    pub fn pf(self) -> bool {
        self.0 & (1 << 10) != 0
    }
    /// Auxiliary carry flag.
    #[inline(always)]
    pub fn af(self) -> bool {
        self.0 & (1 << 12) != 0
    }
    /// Zero flag.
    #[inline(always)]
    pub fn zf(self) -> bool {
        self.0 & (1 << 14) != 0
    }
    /// Sign flag.
    #[inline(always)]
    pub fn sf(self) -> bool {
        self.0 & (1 << 15) != 0
    }
    /// Overflow flag.
    #[inline(always)]
    pub fn of(self) -> bool {
        self.0 & 1 != 0
    }
    /// Replaces one flag; `bit` is a single status bit of [`Rflags`].
    #[inline]
    pub fn with(self, bit: Rflags, on: bool) -> Status {
        let mask = Status::from_rflags(bit.bits()).0;
        Status(if on { self.0 | mask } else { self.0 & !mask })
    }

    /// Evaluates condition code `cc` (0 = O … 15 = G, SDM vol. 2 appendix B.1.4.7).
    #[inline(always)]
    pub fn condition(self, cc: u8) -> bool {
        let value = match (cc >> 1) & 7 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() | self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() | (self.sf() != self.of()),
        };
        value != (cc & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_round_trips_through_rflags() {
        for bits in 0..64u64 {
            let rflags = (bits & 1)
                | ((bits >> 1) & 1) << 2
                | ((bits >> 2) & 1) << 4
                | ((bits >> 3) & 1) << 6
                | ((bits >> 4) & 1) << 7
                | ((bits >> 5) & 1) << 11;
            assert_eq!(Status::from_rflags(rflags).to_rflags(), rflags);
        }
    }

    #[test]
    fn odd_conditions_negate_even_ones() {
        for bits in 0..=u16::MAX {
            let status = Status(bits);
            for cc in (0..16).step_by(2) {
                assert_ne!(status.condition(cc), status.condition(cc + 1));
            }
        }
    }
}
