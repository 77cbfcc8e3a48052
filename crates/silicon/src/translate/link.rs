//! Links: where a block goes on after a direct branch.
//!
//! A link holds while its number is [`Translator::validity`](super::Translator), which stands for everything that it depends
//! on: the address space and mode, the epoch that bytes were compared in, and no block dropped since.
#![expect(unsafe_code, reason = "links are written in the arena's writable view")]

use std::mem::offset_of;

use crate::hostexec::arena::Arena;

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
