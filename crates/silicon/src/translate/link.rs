//! Links: where a block goes on after a direct branch out of its region; and where computed branches go on.
//!
//! A link holds while its number is the [`Translator`](super::Translator)'s, which stands for everything that it depends
//! on: the epoch that bytes were compared in, no block dropped since, and, unless it leads to what certainly lies in its page, the
//! address space and mode.
#![expect(unsafe_code, reason = "links are written in the arena's writable view")]

use std::mem::offset_of;

use crate::code::INSTRUCTION_LONGEST;
use crate::hostexec::arena::Arena;
use crate::mmu::tlb::PAGE_SIZE;

/// A link, in the data of an arena. Zero is no valid number, so a new link goes nowhere.
#[repr(C)]
pub(super) struct Link {
    validity: u64,
    code: u64,
    /// The target, relative to the start of the page that the branch lies in.
    target: i64,
    /// What takes the branch back (`Emitter::taken`); 0: the block just ends.
    taken: u64,
}

impl Link {
    pub(super) const VALIDITY: u64 = offset_of!(Link, validity) as u64;
    pub(super) const CODE: u64 = offset_of!(Link, code) as u64;

    /// Whether what begins at `target`, relative to the start of a page, lies in the page whatever it is. Then a link within the page
    /// holds in all address spaces: who gets to it has found the page there.
    pub(super) fn stays_in_page(target: i64) -> bool {
        (0..=(PAGE_SIZE - INSTRUCTION_LONGEST as u64) as i64).contains(&target)
    }

    /// A new link; the address at which code reads it.
    pub(super) fn make(arena: &mut Arena, target: i64, taken: u64) -> Option<u64> {
        let data = arena.data(size_of::<Link>())?;
        // SAFETY: just made, writable, of this size, and aligned: arenas hand out multiples of eight.
        unsafe { data.writable.cast::<Link>().write(Link { validity: 0, code: 0, target, taken }) };
        Some(data.address)
    }

    /// The target of the link that code reads at `address`, and what takes the branch back.
    pub(super) fn target(arena: &Arena, address: u64) -> Option<(i64, u64)> {
        let data = arena.data_at(address)?;
        // SAFETY: code names no address that `make` has not returned.
        let link = unsafe { data.writable.cast::<Link>().read() };
        Some((link.target, link.taken))
    }

    /// From now on, while `validity` holds, the branch goes to `code`.
    pub(super) fn set(arena: &Arena, address: u64, validity: u64, code: u64) {
        if let Some(data) = arena.data_at(address) {
            let link = data.writable.cast::<Link>().as_ptr();
            // SAFETY: as above; nobody has a reference, and the code that reads it runs on this thread.
            unsafe {
                (*link).code = code;
                (*link).validity = validity;
            }
        }
    }
}

/// Where code at a linear address was found to be: what computed branches look at.
#[derive(Clone, Copy, Default)]
#[repr(C, align(32))]
pub(super) struct Jump {
    pub(super) lin: u64,
    /// As a link's.
    pub(super) validity: u64,
    pub(super) code: u64,
}

impl Jump {
    /// Entries of the cache.
    pub(super) const ENTRIES: usize = 1 << 12;
    /// How far the address is shifted for the other half of its hash.
    pub(super) const SHIFT: u32 = 15;

    /// An empty cache: zero is no valid number.
    pub(super) fn cache() -> Box<[Jump]> {
        vec![Jump::default(); Jump::ENTRIES].into_boxed_slice()
    }

    /// The entry for `lin`.
    pub(super) fn of(cache: &mut [Jump], lin: u64) -> &mut Jump {
        &mut cache[(lin ^ (lin >> Jump::SHIFT)) as usize & (Jump::ENTRIES - 1)]
    }
}
