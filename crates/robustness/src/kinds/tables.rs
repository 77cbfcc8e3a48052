//! Random instructions in a machine whose page tables, descriptors, gates and task states are partly spoiled.

use conformance::rng::Rng;

use crate::image::Image;
use crate::machine::Machine;

pub(super) fn image(rng: &mut Rng) -> Image {
    let spoil = rng.pick(&[5, 20, 50, 100]);
    Machine::new(rng, spoil).with_random_code(20_000)
}
