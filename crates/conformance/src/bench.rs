//! The two processors side by side, with the memory that a case may change put back after it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use silicon::model::Features;

use crate::compare::{self, Difference};
use crate::generate::Case;
use crate::guest::Guest;
use crate::host::{self, Host, HostError};
use crate::layout::{self, Access, Contents, DATA, PAGE};
use crate::machine::{Event, Machine};

/// How both ended a case.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The host's end and state.
    pub host: (Event, Machine),
    /// The guest's; `None` if the software processor panicked.
    pub guest: Option<(Event, Machine)>,
    /// What differs.
    pub difference: Difference,
}

/// Host and guest, ready for cases.
#[derive(Debug)]
pub struct Bench {
    host: Host,
    guest: Guest,
    contents: Contents,
    features: Features,
    components: u64,
}

impl Bench {
    /// Sets both up; memory is filled from `seed`.
    pub fn new(features: Features, seed: u64) -> Result<Bench, HostError> {
        let contents = Contents::new(seed);
        let components = host::components()?;
        let mut guest = Guest::new(features.clone(), host::selectors(), components);
        guest.prepare(&contents);
        let mut host = Host::new()?;
        host.prepare(&contents)?;
        Ok(Bench { host, guest, contents, features, components })
    }

    /// Runs one case on both and compares.
    pub fn run(&mut self, case: &Case) -> Outcome {
        for (address, bytes) in &case.patches {
            self.write(*address, bytes);
        }
        self.write(case.machine.rip, &case.bytes);
        let next = case.machine.rip + case.bytes.len() as u64;
        let returns = case.direct_return && self.host.put_return(next);
        let host = self.host.run(&case.machine, next);
        if returns {
            self.host.remove_return(next);
        }
        let stepping = case.stepping;
        let guest = catch_unwind(AssertUnwindSafe(|| self.guest.run(&case.machine, stepping))).ok();
        let mut difference = match &guest {
            Some(guest) => compare::compare(case, &host, guest),
            None => Difference { defined: vec!["end / panicked".into()], undefined: false },
        };
        if guest.is_none() {
            self.guest = Guest::new(self.features.clone(), host::selectors(), self.components);
            self.guest.prepare(&self.contents);
        }
        self.compare_memory(&mut difference);
        Outcome { host, guest, difference }
    }

    /// Writes to both memories what lies in writable pages.
    fn write(&mut self, address: u64, bytes: &[u8]) {
        for (i, chunk) in split(address, bytes) {
            if layout::access(i) == Access::Write {
                self.host.bytes_mut(i, chunk.len()).copy_from_slice(chunk);
                self.guest.bytes_mut(i, chunk.len()).copy_from_slice(chunk);
            }
        }
    }

    /// Compares the windows and puts the initial contents back.
    fn compare_memory(&mut self, difference: &mut Difference) {
        for (address, initial) in self.contents.pages() {
            let host = self.host.bytes(*address, PAGE as usize);
            let guest = self.guest.bytes(*address, PAGE as usize);
            if host == guest && host == &initial[..] {
                continue;
            }
            if host != guest {
                let first = host.iter().zip(guest).position(|(h, g)| h != g).unwrap_or(0);
                let name = format!("memory at {:#x}+", address + first as u64);
                compare::bytes(&mut difference.defined, &name, &host[first..], &guest[first..]);
            }
            self.guest.bytes_mut(*address, PAGE as usize).copy_from_slice(initial);
            if layout::access(*address) == Access::Write {
                self.host.bytes_mut(*address, PAGE as usize).copy_from_slice(initial);
            }
        }
    }
}

/// Cuts `bytes` at `address` at page boundaries.
fn split(address: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let first = ((PAGE - address % PAGE) as usize).min(bytes.len());
    let (head, tail) = bytes.split_at(first);
    let rest = (1u64..).zip(tail.chunks(PAGE as usize));
    let start = address - address % PAGE;
    std::iter::once((address, head)).chain(rest.map(move |(i, chunk)| (start.wrapping_add(i * PAGE), chunk)))
}

const _: () = assert!(DATA.is_multiple_of(PAGE));
