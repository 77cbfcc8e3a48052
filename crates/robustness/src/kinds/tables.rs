//! Random instructions in a machine whose page tables, descriptors, gates and task states are partly spoiled.

use conformance::rng::Rng;

use crate::image::Image;
use crate::machine::{Machine, Mode};

pub(super) fn image(rng: &mut Rng, mode: Option<Mode>) -> Image {
    let spoil = rng.pick(&[5, 20, 50, 100]);
    Machine::new(rng, mode, spoil).with_random_code(20_000)
}
