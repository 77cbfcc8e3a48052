//! Kinds of images: one generator each.

mod bytes;
mod instructions;
mod kernel;
mod selfmod;
mod setters;
mod smp;
mod state;
mod strings;
mod tables;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use conformance::rng::{Rng, mix};

use crate::image::Image;
use crate::machine::Mode;

pub use kernel::{Kernel, KernelError};

/// A kind of image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Random bytes from reset.
    Bytes,
    /// A booting Linux kernel with some bytes changed.
    Kernel,
    /// Valid instructions with random operands, in every mode.
    Instructions,
    /// The same with spoiled page tables, descriptors, gates and task states.
    Tables,
    /// String instructions with huge counts.
    Strings,
    /// Code that writes over itself.
    Selfmod,
    /// MSRs and XSAVE images.
    State,
    /// Two vCPUs on the same memory, with interrupts.
    Smp,
    /// KVM structures with random contents, then random code.
    Setters,
}

impl Kind {
    /// All of them, and their shares of a mixed run in percent.
    pub const ALL: [(Kind, u64); 9] = [
        (Kind::Bytes, 20),
        (Kind::Kernel, 10),
        (Kind::Instructions, 20),
        (Kind::Tables, 20),
        (Kind::Strings, 6),
        (Kind::Selfmod, 6),
        (Kind::State, 6),
        (Kind::Smp, 6),
        (Kind::Setters, 6),
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Bytes => "bytes",
            Kind::Kernel => "kernel",
            Kind::Instructions => "instructions",
            Kind::Tables => "tables",
            Kind::Strings => "strings",
            Kind::Selfmod => "selfmod",
            Kind::State => "state",
            Kind::Smp => "smp",
            Kind::Setters => "setters",
        }
    }

    /// The kind of image `seed` in a mixed run.
    pub fn of(seed: u64) -> Kind {
        let mut left = mix(seed ^ 0x6b69_6e64) % 100;
        for (kind, share) in Kind::ALL {
            match left.checked_sub(share) {
                Some(rest) => left = rest,
                None => return kind,
            }
        }
        Kind::Bytes
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Kind, String> {
        let names = || Kind::ALL.map(|(kind, _)| kind.name()).join(", ");
        (Kind::ALL.iter().map(|(kind, _)| *kind).find(|kind| kind.name() == text))
            .ok_or_else(|| format!("'{text}' is none of {}", names()))
    }
}

/// Makes images.
#[derive(Debug, Default)]
pub struct Generators {
    kernel: Option<Kernel>,
}

impl Generators {
    /// All kinds; that of kernels needs a bzImage.
    pub fn new(kernel: Option<&Path>) -> Result<Generators, KernelError> {
        Ok(Generators { kernel: kernel.map(Kernel::open).transpose()? })
    }

    /// The image of `kind` with number `seed`. Without a kernel, random bytes take the place of mutated kernels.
    pub fn image(&self, kind: Kind, seed: u64) -> Image {
        self.image_in(kind, seed, None)
    }

    /// Likewise; those of random instructions begin in `mode`.
    pub fn image_in(&self, kind: Kind, seed: u64, mode: Option<Mode>) -> Image {
        let rng = &mut Rng::new(mix(seed) ^ kind as u64);
        match (kind, &self.kernel) {
            (Kind::Kernel, Some(kernel)) => kernel.image(rng),
            (Kind::Bytes | Kind::Kernel, _) => bytes::image(rng),
            (Kind::Instructions, _) => instructions::image(rng, mode),
            (Kind::Tables, _) => tables::image(rng, mode),
            (Kind::Strings, _) => strings::image(rng, mode),
            (Kind::Selfmod, _) => selfmod::image(rng, mode),
            (Kind::State, _) => state::image(rng),
            (Kind::Smp, _) => smp::image(rng),
            (Kind::Setters, _) => setters::image(rng, mode),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_percentages_and_every_kind_occurs() {
        assert_eq!(Kind::ALL.iter().map(|(_, share)| share).sum::<u64>(), 100);
        for (kind, _) in Kind::ALL {
            assert!((0..500).any(|seed| Kind::of(seed) == kind), "{kind}");
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("nonsense".parse::<Kind>().is_err());
    }

    #[test]
    fn the_same_seed_gives_the_same_image() {
        let generators = Generators::default();
        for (kind, _) in Kind::ALL {
            let text = |seed| format!("{:?}", generators.image(kind, seed));
            assert_eq!(text(5), text(5), "{kind}");
            assert_ne!(text(5), text(6), "{kind}");
        }
    }
}
