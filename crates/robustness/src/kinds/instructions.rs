//! Valid instructions with random operands in a sane machine, in every mode.

use conformance::rng::Rng;

use crate::image::Image;
use crate::machine::{Machine, Mode};

pub(super) fn image(rng: &mut Rng, mode: Option<Mode>) -> Image {
    Machine::new(rng, mode, 0).with_random_code(20_000)
}
