//! The two processors side by side, with the memory that a case may change put back after it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use iced_x86::Mnemonic;
use silicon::model::Features;

use crate::capabilities::Capabilities;
use crate::compare::{self, Difference};
use crate::generate::Case;
use crate::guest::Guest;
use crate::host::{self, Host, HostError};
use crate::layout::{self, Access, Contents, DATA, PAGE};
use crate::machine::{Event, Machine};
use crate::vendor::{self, Part, Seen};

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
    capabilities: Capabilities,
}

impl Bench {
    /// Sets both up; memory is filled from `seed`.
    pub fn new(features: Features, seed: u64) -> Result<Bench, HostError> {
        let contents = Contents::new(seed);
        let capabilities = Capabilities::of_host()?;
        let mut guest = Guest::new(features.clone(), host::selectors(), capabilities.components);
        guest.prepare(&contents);
        let mut host = Host::new()?;
        host.prepare(&contents)?;
        Ok(Bench { host, guest, contents, features, capabilities })
    }

    /// Runs one case on both and compares.
    pub fn run(&mut self, case: &Case) -> Outcome {
        let outcome = self.once(case);
        // Where XSAVE does not keep the x87 pointers, the operating system loses them when it switches tasks.
        let shown = matches!(case.instruction.mnemonic(), Mnemonic::Fnstenv | Mnemonic::Fnsave);
        let again = !self.capabilities.keeps_pointers && outcome.difference.names_pointers(shown);
        if again { self.once(case) } else { outcome }
    }

    fn once(&mut self, case: &Case) -> Outcome {
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
        let difference = match &guest {
            Some(guest) => self.judge(case, &host, guest),
            None => Difference { defined: vec!["end / panicked".into()], ..Difference::default() },
        };
        if guest.is_none() {
            self.guest = Guest::new(self.features.clone(), host::selectors(), self.capabilities.components);
            self.guest.prepare(&self.contents);
        }
        self.put_back();
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

    /// What differs; what this maker's processors are known to do otherwise is taken for the guest's.
    fn judge(&mut self, case: &Case, host: &(Event, Machine), guest: &(Event, Machine)) -> Difference {
        let mut difference = self.compare(case, host, guest);
        if difference.defined.is_empty() {
            return difference;
        }
        let seen = Seen { case, host, guest };
        let capabilities = self.capabilities;
        let mut adopted = guest.clone();
        let mut excepted = Vec::new();
        for (index, row) in (0..).zip(vendor::ROWS).filter(|(_, row)| row.holds(&capabilities, &seen)) {
            let before = adopted.clone();
            let mut memory = false;
            for part in row.parts() {
                vendor::adopt(part, case, host, &mut adopted);
                memory |= self.adopt_memory(part, case);
            }
            if memory || adopted != before {
                excepted.push(index);
            }
        }
        if !excepted.is_empty() {
            difference = Difference { excepted, ..self.compare(case, host, &adopted) };
        }
        difference
    }

    fn compare(&self, case: &Case, host: &(Event, Machine), guest: &(Event, Machine)) -> Difference {
        let mut difference = compare::compare(case, host, guest, &self.capabilities);
        for (address, _) in self.contents.pages() {
            let host = self.host.bytes(*address, PAGE as usize);
            let guest = self.guest.bytes(*address, PAGE as usize);
            if host != guest {
                let first = host.iter().zip(guest).position(|(h, g)| h != g).unwrap_or(0);
                let name = format!("memory at {:#x}+", address + first as u64);
                compare::bytes(&mut difference.defined, &name, &host[first..], &guest[first..]);
            }
        }
        difference
    }

    /// Takes the memory of `part` over from the host. Returns whether that changed anything.
    fn adopt_memory(&mut self, part: &Part, case: &Case) -> bool {
        let ranges: Vec<(u64, u64)> = match part {
            Part::All => self.contents.pages().iter().map(|(address, _)| (*address, PAGE)).collect(),
            _ => vendor::memory(part, case).into_iter().collect(),
        };
        let addresses = ranges.into_iter().flat_map(|(start, length)| (0..length).map(move |i| (start, i)));
        let mut changed = false;
        for address in addresses.map(|(start, i)| start.wrapping_add(i)) {
            if layout::access(address) == Access::Write {
                let host = self.host.bytes(address, 1)[0];
                let guest = &mut self.guest.bytes_mut(address, 1)[0];
                changed |= *guest != host;
                *guest = host;
            }
        }
        changed
    }

    /// Puts the initial contents of the windows back.
    fn put_back(&mut self) {
        for (address, initial) in self.contents.pages() {
            let same = |bytes: &[u8]| bytes == &initial[..];
            if same(self.host.bytes(*address, PAGE as usize))
                && same(self.guest.bytes(*address, PAGE as usize))
            {
                continue;
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
