//! Exceptions as the SDM numbers them (vol. 3A, table 6-1), and the token that says "this instruction did not
//! complete".

/// An exception vector with what is pushed and recorded for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector number, 0 to 31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// Vector-specific payload: CR2 for #PF, the DR6 bits to set for #DB, otherwise zero.
    pub payload: u64,
}

/// Names of the vectors.
pub mod vector {
    #![allow(missing_docs, reason = "the names are the SDM's mnemonics")]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
    pub const VE: u8 = 20;
    pub const CP: u8 = 21;
}

impl Exception {
    const fn plain(vector: u8) -> Exception {
        Exception { vector, error_code: None, payload: 0 }
    }
    const fn coded(vector: u8, code: u32) -> Exception {
        Exception { vector, error_code: Some(code), payload: 0 }
    }
    /// #DE, divide error.
    pub const DE: Exception = Exception::plain(vector::DE);
    /// #BR, BOUND range exceeded.
    pub const BR: Exception = Exception::plain(vector::BR);
    /// #UD, invalid opcode.
    pub const UD: Exception = Exception::plain(vector::UD);
    /// #NM, device not available.
    pub const NM: Exception = Exception::plain(vector::NM);
    /// #MF, x87 floating-point error.
    pub const MF: Exception = Exception::plain(vector::MF);
    /// #XM, SIMD floating-point error.
    pub const XM: Exception = Exception::plain(vector::XM);
    /// #VE, virtualization exception.
    pub const VE: Exception = Exception::plain(vector::VE);
    /// #AC(0), alignment check.
    pub const AC: Exception = Exception::coded(vector::AC, 0);
    /// #DF(0), double fault.
    pub const DF: Exception = Exception::coded(vector::DF, 0);

    /// #DB with the DR6 bits that its delivery sets.
    pub const fn db(dr6: u64) -> Exception {
        Exception { vector: vector::DB, error_code: None, payload: dr6 }
    }
    /// #TS, invalid TSS.
    pub const fn ts(code: u32) -> Exception {
        Exception::coded(vector::TS, code)
    }
    /// #NP, segment not present.
    pub const fn np(code: u32) -> Exception {
        Exception::coded(vector::NP, code)
    }
    /// #SS, stack fault.
    pub const fn ss(code: u32) -> Exception {
        Exception::coded(vector::SS, code)
    }
    /// #GP, general protection.
    pub const fn gp(code: u32) -> Exception {
        Exception::coded(vector::GP, code)
    }
    /// #PF at linear address `cr2` with `code` as in SDM vol. 3A, figure 4-12.
    pub const fn pf(cr2: u64, code: u32) -> Exception {
        Exception { vector: vector::PF, error_code: Some(code), payload: cr2 }
    }

    /// #DB with instruction-independent trap semantics, #BP and #OF are traps; the rest are faults here.
    pub const fn is_contributory(vector: u8) -> bool {
        matches!(vector, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP | vector::CP)
    }
}

/// The instruction did not complete; why is in [`Cpu::pending`](crate::Cpu::pending): an exception to
/// deliver or an exit from guest mode. Only [`Cpu::raise`](crate::Cpu::raise) and
/// [`Cpu::exit`](crate::Cpu::exit) make one, so a handler that returns it has left a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abort(());

impl Abort {
    /// For `Cpu` alone: the reason has been stored.
    pub(crate) fn stored() -> Abort {
        Abort(())
    }
}
