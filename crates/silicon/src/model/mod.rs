//! CPU models as data: what a part offers.

use iced_x86::Instruction;

/// The features that a CPU offers.
#[derive(Clone, Debug, Default)]
pub struct Features {}

impl Features {
    /// Whether the CPU offers `ins`.
    pub fn offers(&self, _ins: &Instruction) -> bool {
        true
    }
}
