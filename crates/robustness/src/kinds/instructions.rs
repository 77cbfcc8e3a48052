//! Valid instructions with random operands in a sane machine, in every mode.

use conformance::rng::Rng;

use crate::image::Image;
use crate::machine::Machine;

pub(super) fn image(rng: &mut Rng) -> Image {
    Machine::new(rng, 0).with_random_code(20_000)
}
