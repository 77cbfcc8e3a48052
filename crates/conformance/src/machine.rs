//! The architectural state that a test case starts from and ends in, as the host and the guest both know it.

/// x87, SSE, AVX and AVX-512 state, and PKRU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vectors {
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word.
    pub fsw: u16,
    /// Abridged tag word.
    pub ftw: u8,
    /// Last opcode.
    pub fop: u16,
    /// Last instruction pointer.
    pub fip: u64,
    /// Last data pointer.
    pub fdp: u64,
    /// ST(0) to ST(7), ten bytes each.
    pub st: [[u8; 10]; 8],
    /// SSE control and status.
    pub mxcsr: u32,
    /// Mask registers.
    pub k: [u64; 8],
    /// Vector registers.
    pub zmm: [[u8; 64]; 32],
    /// Protection keys' rights.
    pub pkru: u32,
}

impl Vectors {
    /// Whether an unmasked x87 exception is pending (FSW.ES).
    pub fn pending(&self) -> bool {
        self.fsw & 1 << 7 != 0
    }
}

impl Default for Vectors {
    fn default() -> Vectors {
        Vectors {
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            st: [[0; 10]; 8],
            mxcsr: 0x1f80,
            k: [0; 8],
            zmm: [[0; 64]; 32],
            pkru: 0,
        }
    }
}

/// Registers of one logical processor in 64-bit mode at CPL 3.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// RAX to R15 in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// Everything that XSAVE saves.
    pub vectors: Vectors,
}

/// How a test case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The instruction completed and execution arrived at a filler byte.
    Completed,
    /// An exception.
    Fault {
        /// Vector.
        vector: u8,
        /// Error code (0 for vectors that have none).
        error: u32,
        /// CR2 for a page fault, else 0.
        address: u64,
    },
    /// It did not end in time.
    Endless,
    /// The guest left guest mode for this reason, which the host has no counterpart for.
    Exit(&'static str),
}

/// Names of the exception vectors, for reports.
pub fn vector_name(vector: u8) -> &'static str {
    const NAMES: [&str; 22] = [
        "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "9", "#TS", "#NP", "#SS", "#GP",
        "#PF", "15", "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
    ];
    NAMES.get(usize::from(vector)).copied().unwrap_or("?")
}

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Event::Completed => f.write_str("completed"),
            Event::Fault { vector: 14, error, address } => write!(f, "#PF({error:#x}) at {address:#x}"),
            Event::Fault { vector, error, .. } => write!(f, "{}({error:#x})", vector_name(vector)),
            Event::Endless => f.write_str("endless"),
            Event::Exit(reason) => write!(f, "exit {reason}"),
        }
    }
}
