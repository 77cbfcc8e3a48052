//! EPT-violation #VE (SDM vol. 3C, 26.5.7): a violation that the guest gets as an exception, without an exit, where the hypervisor allows it.
//!
//! Of what the hypervisor's map can violate, pages that are elsewhere are entries that are not present, which convert unless their bit 63
//! suppresses it. Addresses without memory are what KVM makes misconfigurations, which never do.
#![expect(unsafe_code, reason = "the information area is guest memory")]

use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::mmu::ept::SMM_SPACE;
use crate::mmu::host;
use crate::mmu::walk::Kind;
use crate::state::cr0;

/// The exit reason in the information area: EPT violation.
const REASON: u32 = 48;
/// What the processor writes to the busy word.
const BUSY: u32 = !0;
/// Bytes of the information area; the busy word in it.
const AREA: usize = 34;
const BUSY_AT: u64 = 4;
/// Exit qualification (SDM vol. 3C, table 28-7): the access; the linear address is valid, and it is its translation's, not a page walk's.
const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const FETCH: u64 = 1 << 2;
const LINEAR_VALID: u64 = 1 << 7;
const TRANSLATED: u64 = 1 << 8;

/// What was accessed that is elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) kind: Kind,
    /// Linear address of the access, or whose walk it is.
    pub(crate) lin: u64,
    /// It is a page walk.
    pub(crate) walk: bool,
}

impl Violation {
    fn qualification(self) -> u64 {
        let access = match self.kind {
            Kind::Read => READ,
            Kind::Write => WRITE,
            Kind::Execute => FETCH,
        };
        access | LINEAR_VALID | if self.walk { 0 } else { TRANSLATED }
    }
}

impl Cpu {
    /// Raises #VE in the place of the exit for an access to `address`, if it converts.
    pub(crate) fn convert_violation(&mut self, address: u64, violation: Violation) -> Option<Abort> {
        let convertible = self.controls.ept_violation_ve
            && self.state.cr0 & cr0::PE != 0
            && !self.delivering
            && !self.state.smm
            && self.backing(address).is_some_and(|backing| !backing.suppresses_ve(address));
        let area = convertible.then(|| self.information_area()).flatten()?;
        let mut busy = [0; 4];
        // SAFETY: the area lies in one page of a region.
        unsafe { host::read(area + BUSY_AT, &mut busy) }.ok().filter(|()| busy == [0; 4])?;
        let mut bytes = [0; AREA];
        bytes[..4].copy_from_slice(&REASON.to_le_bytes());
        bytes[4..8].copy_from_slice(&BUSY.to_le_bytes());
        bytes[8..16].copy_from_slice(&violation.qualification().to_le_bytes());
        bytes[16..24].copy_from_slice(&violation.lin.to_le_bytes());
        bytes[24..32].copy_from_slice(&(address & !SMM_SPACE).to_le_bytes());
        bytes[32..].copy_from_slice(&self.controls.eptp_index.to_le_bytes());
        // SAFETY: as above.
        unsafe { host::write(area, &bytes) }.ok()?;
        Some(self.raise(Exception::VE))
    }

    /// Host address of the area, if it is in memory that can be written now.
    fn information_area(&mut self) -> Option<u64> {
        let at = self.controls.ve_information;
        let backing = self.backing(at)?;
        let usable = !backing.region.readonly && !backing.is_elsewhere(at);
        let host = backing.host(at);
        if usable && backing.log_access(at, true) {
            self.log_modified(at);
        }
        usable.then_some(host)
    }
}
