//! Loads and stores of guest memory: the first-level TLB lookups, inlined into every handler, and the calls
//! that handlers make. What misses goes to [`super::slow`].
#![expect(unsafe_code, reason = "guest memory is reached through raw host pointers")]

use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::mmu::Word;
use crate::mmu::tlb::{Class, PAGE_MASK, PAGE_SIZE};
use crate::mmu::walk::{Access, Kind};
use crate::state::Seg;

/// A page that instructions can be fetched from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExecPage {
    /// Guest frame number (guest-physical address >> 12).
    pub gfn: u64,
    /// Host address of the page's first byte.
    pub host: u64,
}

impl Cpu {
    /// Loads a word at linear address `lin`; `seg` says whether a non-canonical address is #SS or #GP.
    #[inline(always)]
    pub fn load<T: Word>(&mut self, seg: Seg, lin: u64) -> Result<T, Abort> {
        if let Some(host) = self.mmu.tlb.read_hit(lin, T::SIZE)
            // SAFETY: a hit is a host address of guest memory: a removed region leaves no entry.
            && let Ok(value) = unsafe { T::read(host as *const T) }
        {
            return Ok(value);
        }
        self.load_miss(seg, lin, T::SIZE).map(T::from_u64)
    }

    /// Stores a word at linear address `lin`.
    #[inline(always)]
    pub fn store<T: Word>(&mut self, seg: Seg, lin: u64, value: T) -> Result<(), Abort> {
        if let Some(host) = self.mmu.tlb.write_hit(lin, T::SIZE)
            // SAFETY: as in `load`; a write hit is for writable memory.
            && unsafe { T::write(host as *mut T, value) }.is_ok()
        {
            return Ok(());
        }
        self.store_miss(seg, lin, T::SIZE, value.to_u64())
    }

    /// Reads a word, has `change` compute what to write back and a result, and writes it, with write rights
    /// checked before the read. Not atomic: for instructions without LOCK whose destination is memory. `change`
    /// must have no effects of its own, since an access that leaves guest mode is made again.
    #[inline(always)]
    pub fn update<T: Word, R>(
        &mut self,
        seg: Seg,
        lin: u64,
        change: impl FnOnce(T) -> (T, R),
    ) -> Result<R, Abort> {
        match self.mmu.tlb.write_hit(lin, T::SIZE) {
            Some(host) => {
                // SAFETY: as in `store`.
                let old = unsafe { T::read(host as *const T) };
                let (new, result) = change(self.present(old)?);
                // SAFETY: as in `store`.
                let written = unsafe { T::write(host as *mut T, new) };
                self.present(written)?;
                Ok(result)
            }
            None => {
                let old = T::from_u64(self.load_for_write(seg, lin, T::SIZE)?);
                let (new, result) = change(old);
                self.store_miss(seg, lin, T::SIZE, new.to_u64())?;
                Ok(result)
            }
        }
    }

    /// Host address of `len` bytes at `lin`, for direct use until the end of the instruction, by accesses that
    /// can fail ([`super::host`]): `None` where a
    /// pointer will not do (page crossing, MMIO, code page, watched page) and the byte-wise calls must serve.
    /// Faults as the access would.
    #[inline(always)]
    pub fn host_pointer(
        &mut self,
        seg: Seg,
        lin: u64,
        len: usize,
        write: bool,
    ) -> Result<Option<*mut u8>, Abort> {
        let tlb = &self.mmu.tlb;
        // A length of a page or more could wrap around to the tag of the first page only past 2^64.
        let hit = if write { tlb.write_hit(lin, len) } else { tlb.read_hit(lin, len) };
        match hit {
            Some(host) => Ok(Some(host as *mut u8)),
            None => self.host_pointer_miss(seg, lin, len, write),
        }
    }

    /// Host pointer to the byte at `lin` and how many bytes follow up to the end of its page, for direct use
    /// until the end of the instruction: REP string instructions move a page at a time with it. `None` where
    /// single accesses must serve (MMIO, code page, watched page, alignment checking). Faults as an access to
    /// the byte would. For elements of several bytes the caller must see that one may cross the page's end.
    #[inline]
    pub fn chunk(&mut self, seg: Seg, lin: u64, write: bool) -> Result<Option<(*mut u8, usize)>, Abort> {
        let pointer = self.host_pointer(seg, lin, 1, write)?;
        Ok(pointer.map(|p| (p, (PAGE_SIZE - (lin & PAGE_MASK)) as usize)))
    }

    /// Translates `lin` for an instruction fetch at the current privilege.
    #[inline]
    pub fn fetch_page(&mut self, lin: u64) -> Result<ExecPage, Abort> {
        self.exec_page(lin).map_or_else(|| self.fetch_miss(lin), Ok)
    }

    /// The page at `lin` for fetches, if it is at hand.
    #[inline]
    pub(crate) fn exec_page(&self, lin: u64) -> Option<ExecPage> {
        let hit = self.mmu.tlb.exec_hit(self.state.cpl == 3, lin);
        hit.map(|(gfn, host)| ExecPage { gfn, host })
    }

    /// Reads with supervisor rights whatever the CPL: descriptor tables, TSS, page-fault stacks.
    #[inline]
    pub fn system_load<T: Word>(&mut self, lin: u64) -> Result<T, Abort> {
        self.read_word(Seg::Ds, lin, T::SIZE, Cpu::SYSTEM_READ).map(T::from_u64)
    }

    /// Writes with supervisor rights whatever the CPL.
    #[inline]
    pub fn system_store<T: Word>(&mut self, lin: u64, value: T) -> Result<(), Abort> {
        self.write_word(Seg::Ds, lin, T::SIZE, value.to_u64(), Cpu::SYSTEM_WRITE)
    }

    /// Checks that a write with supervisor rights to `len` bytes at `lin` would succeed; faults as it would.
    pub fn system_probe(&mut self, lin: u64, len: usize, write: bool) -> Result<(), Abort> {
        let access = if write { Cpu::SYSTEM_WRITE } else { Cpu::SYSTEM_READ };
        self.probe_as(Seg::Ds, lin, len, access)
    }

    /// Checks that `len` bytes at `lin` can be accessed, as a store if `write`; faults as the access would.
    pub fn probe(&mut self, seg: Seg, lin: u64, len: usize, write: bool) -> Result<(), Abort> {
        let access = self.explicit(if write { Kind::Write } else { Kind::Read });
        self.probe_as(seg, lin, len, access)
    }

    /// Reads `out.len()` bytes at `lin`.
    pub fn read_bytes(&mut self, seg: Seg, lin: u64, out: &mut [u8]) -> Result<(), Abort> {
        self.read_range(seg, lin, out, self.explicit(Kind::Read))
    }

    /// Writes `data` at `lin`. Nothing is written if any part cannot be.
    pub fn write_bytes(&mut self, seg: Seg, lin: u64, data: &[u8]) -> Result<(), Abort> {
        self.write_range(seg, lin, data, self.explicit(Kind::Write))
    }

    /// An access of the instruction's own at the current privilege.
    pub(crate) fn explicit(&self, kind: Kind) -> Access {
        Access { kind, class: self.mmu.tlb.class() }
    }

    pub(crate) const SYSTEM_READ: Access = Access { kind: Kind::Read, class: Class::Supervisor };
    pub(crate) const SYSTEM_WRITE: Access = Access { kind: Kind::Write, class: Class::Supervisor };
}
