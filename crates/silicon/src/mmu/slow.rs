//! Accesses that miss the first-level TLB: translation, MMIO, page crossings, code pages, data breakpoints,
//! alignment checks. Locked ones are in [`super::lock`].
#![expect(unsafe_code, reason = "guest memory is reached through raw host pointers")]

use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::mmu::Word;
use crate::mmu::access::ExecPage;
use crate::mmu::ept::SMM_SPACE;
use crate::mmu::host::{self, Absent};
use crate::mmu::tlb::{Class, Leaf, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE};
use crate::mmu::ve::Violation;
use crate::mmu::walk::{Access, Kind};
use crate::state::{CodeSize, Seg, cr4};
use crate::vmx::{BusAccess, Exit, Space};

/// Where an access goes, as far as the end of the page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Guest-physical address, with the CPU's [`Cpu::space`].
    pub(super) gpa: u64,
    /// Host address, if memory backs it.
    host: Option<u64>,
    /// Stores may be done to the memory; false for read-only regions.
    writable: bool,
    /// Decoded code may be in the page: stores must be told. Means nothing for reads.
    pub(super) coded: bool,
    /// The page has a data breakpoint, so each access must be seen.
    pub(super) watched: bool,
    /// Not write-back memory, or none: a locked access is a bus lock.
    pub(super) uncached: bool,
}

impl Place {
    /// The memory that a store goes to; `None`: over the bus.
    pub(super) fn target(&self) -> Option<u64> {
        self.host.filter(|_| self.writable)
    }
}

/// Bits of a word of `size` bytes.
fn word_mask(size: usize) -> u64 {
    u64::MAX >> (64 - 8 * size.clamp(1, 8))
}

/// Length of the first part of an access of `len` bytes at `lin`: up to the end of the page.
pub(super) fn first_part(lin: u64, len: usize) -> usize {
    len.min((PAGE_SIZE - (lin & PAGE_MASK)) as usize)
}

/// Largest access that the bus makes of the next `len` bytes: 8, 4, 2 or 1.
fn piece(len: usize) -> usize {
    match len {
        8.. => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

impl Cpu {
    /// [`Cpu::load`] where the first level misses.
    #[cold]
    #[inline(never)]
    pub(crate) fn load_miss(&mut self, seg: Seg, lin: u64, size: usize) -> Result<u64, Abort> {
        self.read_word(seg, lin, size, self.explicit(Kind::Read))
    }

    /// [`Cpu::store`] where the first level misses.
    #[cold]
    #[inline(never)]
    pub(crate) fn store_miss(&mut self, seg: Seg, lin: u64, size: usize, value: u64) -> Result<(), Abort> {
        self.write_word(seg, lin, size, value, self.explicit(Kind::Write))
    }

    /// Reads a word that is going to be written: faults are those of a write.
    #[cold]
    #[inline(never)]
    pub(crate) fn load_for_write(&mut self, seg: Seg, lin: u64, size: usize) -> Result<u64, Abort> {
        self.read_word(seg, lin, size, self.explicit(Kind::Write))
    }

    /// Reads a word of `size` bytes.
    pub(crate) fn read_word(
        &mut self,
        seg: Seg,
        lin: u64,
        size: usize,
        access: Access,
    ) -> Result<u64, Abort> {
        self.check_alignment(seg, lin, size, access)?;
        if first_part(lin, size) < size {
            let mut bytes = [0; 8];
            self.read_range(seg, lin, &mut bytes[..size.min(8)], access)?;
            return Ok(u64::from_le_bytes(bytes));
        }
        let place = self.place(seg, lin, access)?;
        let value = match place.host {
            Some(host) => self.present(read_host(host, size))?,
            None => self.bus(memory(place.gpa, size, None))?,
        };
        self.watch(place, lin, size, access);
        Ok(value & word_mask(size))
    }

    /// Writes a word of `size` bytes.
    pub(crate) fn write_word(
        &mut self,
        seg: Seg,
        lin: u64,
        size: usize,
        value: u64,
        access: Access,
    ) -> Result<(), Abort> {
        self.check_alignment(seg, lin, size, access)?;
        if first_part(lin, size) < size {
            return self.write_range(seg, lin, &value.to_le_bytes()[..size.min(8)], access);
        }
        let place = self.place(seg, lin, access)?;
        match place.target() {
            Some(host) => {
                self.present(write_host(host, size, value))?;
                if place.coded {
                    self.code_written(place.gpa, size);
                }
            }
            None => {
                self.bus(memory(place.gpa, size, Some(value & word_mask(size))))?;
            }
        }
        self.watch(place, lin, size, access);
        Ok(())
    }

    /// Reads bytes, page by page.
    pub(crate) fn read_range(
        &mut self,
        seg: Seg,
        lin: u64,
        out: &mut [u8],
        access: Access,
    ) -> Result<(), Abort> {
        self.check_alignment(seg, lin, out.len(), access)?;
        if first_part(lin, out.len()) < out.len() {
            // Faults come before any access to a device.
            self.probe_as(seg, lin, out.len(), access)?;
        }
        let mut at = 0;
        while at < out.len() {
            let here = self.advance(lin, at, access);
            let count = first_part(here, out.len() - at);
            let place = self.place(seg, here, access)?;
            let part = &mut out[at..at + count];
            match place.host {
                Some(host) => {
                    // SAFETY: `place` gave the host address of `here`, and the part ends with the page.
                    let copied = unsafe { host::copy(host as *const u8, part.as_mut_ptr(), count) };
                    self.present(copied)?;
                }
                None => self.read_pieces(place.gpa, part)?,
            }
            self.watch(place, here, count, access);
            at += count;
        }
        Ok(())
    }

    /// Writes bytes, after all pages have been checked. Devices are written first: they leave guest mode, and
    /// when the instruction is executed again no memory must have changed.
    pub(crate) fn write_range(
        &mut self,
        seg: Seg,
        lin: u64,
        data: &[u8],
        access: Access,
    ) -> Result<(), Abort> {
        self.check_alignment(seg, lin, data.len(), access)?;
        let crossing = first_part(lin, data.len()) < data.len();
        if crossing {
            self.probe_as(seg, lin, data.len(), access)?;
            self.touch_range(seg, lin, data.len(), access)?;
        }
        let passes: &[(bool, bool)] =
            if crossing { &[(true, false), (false, true)] } else { &[(true, true)] };
        for &(devices, memory) in passes {
            let mut at = 0;
            while at < data.len() {
                let here = self.advance(lin, at, access);
                let count = first_part(here, data.len() - at);
                let part = &data[at..at + count];
                let place = self.place(seg, here, access)?;
                match place.target() {
                    Some(host) if memory => {
                        // SAFETY: `place` gave the writable host address of `here`, and the part ends with the
                        // page.
                        let copied = unsafe { host::copy(part.as_ptr(), host as *mut u8, count) };
                        self.present(copied)?;
                        if place.coded {
                            self.code_written(place.gpa, count);
                        }
                        self.watch(place, here, count, access);
                    }
                    None if devices => {
                        self.write_pieces(place.gpa, part)?;
                        self.watch(place, here, count, access);
                    }
                    _ => {}
                }
                at += count;
            }
        }
        Ok(())
    }

    /// Checks every page of an access.
    pub(crate) fn probe_as(&mut self, seg: Seg, lin: u64, len: usize, access: Access) -> Result<(), Abort> {
        let mut at = 0;
        while at < len {
            let here = self.advance(lin, at, access);
            self.place(seg, here, access)?;
            at += first_part(here, len - at);
        }
        Ok(())
    }

    /// Checks that the host has memory for every page of a write: an instruction that reads, changes and writes
    /// may not be cut short after it has written the first.
    fn touch_range(&mut self, seg: Seg, lin: u64, len: usize, access: Access) -> Result<(), Abort> {
        let mut at = 0;
        while at < len {
            let here = self.advance(lin, at, access);
            if let Some(host) = self.place(seg, here, access)?.target() {
                // SAFETY: `place` gave the writable host address of `here`.
                let touched = unsafe { host::touch(host as *mut u8) };
                self.present(touched)?;
            }
            at += first_part(here, len - at);
        }
        Ok(())
    }

    /// [`Cpu::host_pointer`] where the first level misses.
    #[cold]
    #[inline(never)]
    pub(crate) fn host_pointer_miss(
        &mut self,
        seg: Seg,
        lin: u64,
        len: usize,
        write: bool,
    ) -> Result<Option<*mut u8>, Abort> {
        let access = self.explicit(if write { Kind::Write } else { Kind::Read });
        self.check_alignment(seg, lin, len, access)?;
        if first_part(lin, len) < len {
            self.probe_as(seg, lin, len, access)?;
            return Ok(None);
        }
        let place = self.place(seg, lin, access)?;
        let direct = !place.watched && access.class != Class::Checked && !(write && place.coded);
        let host = if write { place.target() } else { place.host };
        Ok(host.filter(|_| direct).map(|host| host as *mut u8))
    }

    /// [`Cpu::fetch_page`] where the fetch array misses.
    #[cold]
    #[inline(never)]
    pub(crate) fn fetch_miss(&mut self, lin: u64) -> Result<ExecPage, Abort> {
        let user = self.state.cpl == 3;
        let class = if user { Class::User } else { Class::Supervisor };
        let access = Access { kind: Kind::Execute, class };
        let lin = self.checked(Seg::Cs, lin)?;
        let (leaf, walked) = self.leaf(lin, access)?;
        let Some(backing) = self.backing(leaf.page()) else {
            let gpa = leaf.page() & !SMM_SPACE | (lin & PAGE_MASK);
            return Err(self.exit(Exit::FetchFailed { gpa }));
        };
        let host = backing.host(leaf.page());
        if backing.is_elsewhere(leaf.page()) {
            let violation = Violation { kind: Kind::Execute, lin, walk: false };
            return Err(self.absent(host::elsewhere(host | lin & PAGE_MASK, violation)));
        }
        if backing.log_access(leaf.page(), false) {
            self.log_modified(leaf.page());
        }
        let gfn = leaf.page() >> PAGE_SHIFT;
        if walked {
            // A new mapping may be how the guest learns that a device has written the page.
            self.code.revalidate(gfn);
        }
        self.mmu.tlb.exec_fill(user, lin, leaf, host);
        Ok(ExecPage { gfn, host })
    }

    /// The translation of `lin` with rights for `access`, and whether it took a walk.
    fn leaf(&mut self, lin: u64, access: Access) -> Result<(Leaf, bool), Abort> {
        if let Some(leaf) = self.mmu.tlb.lookup(lin)
            && self.permits(leaf, access).is_ok()
            && (access.kind != Kind::Write || leaf.has(Leaf::DIRTY))
        {
            return Ok((leaf, false));
        }
        // Rights are refused only by a fresh walk: what is cached may be from before the guest granted more.
        let leaf = self.walk(lin, access)?;
        self.mmu.tlb.insert(lin, leaf);
        Ok((leaf, true))
    }

    /// Translates `lin`, raises what it must, and enters the first level if nothing speaks against it.
    pub(super) fn place(&mut self, seg: Seg, lin: u64, access: Access) -> Result<Place, Abort> {
        let lin = self.checked(seg, lin)?;
        let (leaf, _) = self.leaf(lin, access)?;
        let gpa = leaf.page() | (lin & PAGE_MASK);
        let write = access.kind == Kind::Write;
        let Some(backing) = self.backing(gpa) else {
            let watched = self.watches(lin);
            return Ok(Place { gpa, host: None, writable: false, coded: false, watched, uncached: true });
        };
        let (host, writable) = (backing.host(gpa), !backing.region.readonly);
        if backing.is_elsewhere(gpa) {
            let violation = Violation { kind: access.kind, lin, walk: false };
            return Err(self.absent(host::elsewhere(host, violation)));
        }
        if backing.log_access(gpa, write) {
            self.log_modified(gpa);
        }
        let claimed = writable
            && if write { self.claim_writes(gpa) } else { self.stores_freely(leaf, access.class, gpa) };
        let watched = self.watches(lin);
        if !watched && access.class != Class::Checked {
            let page_host = host.wrapping_sub(lin & PAGE_MASK);
            self.mmu.tlb.fill(access.class, lin, leaf, page_host, claimed);
        }
        let uncached = leaf.has(Leaf::UNCACHED);
        Ok(Place { gpa, host: Some(host), writable, coded: !claimed, watched, uncached })
    }

    /// Whether a store to `gpa`'s page, through `leaf`, needs nothing done that an earlier store has not done.
    fn stores_freely(&mut self, leaf: Leaf, class: Class, gpa: u64) -> bool {
        leaf.has(Leaf::WRITE | Leaf::DIRTY)
            && self.permits(leaf, Access { kind: Kind::Write, class }).is_ok()
            && self.holds_writes(gpa)
    }

    /// Linear address `at` bytes on from `lin`: it wraps at 4 GiB outside 64-bit mode.
    pub(super) fn advance(&self, lin: u64, at: usize, access: Access) -> u64 {
        let next = lin.wrapping_add(at as u64);
        let implicit = access.class == Class::Supervisor && self.state.cpl == 3;
        let narrow = self.state.code_size != CodeSize::Bits64 && !(implicit && self.state.long_mode());
        if narrow && lin >> 32 == 0 { next & 0xffff_ffff } else { next }
    }

    /// `lin` if it is canonical (#GP(0) or #SS(0) otherwise); truncated to 32 bits outside IA-32e mode.
    pub(crate) fn checked(&mut self, seg: Seg, lin: u64) -> Result<u64, Abort> {
        if !self.state.long_mode() {
            return Ok(lin & 0xffff_ffff);
        }
        let unused = if self.state.cr4 & cr4::LA57 != 0 { 64 - 57 } else { 64 - 48 };
        if ((lin << unused) as i64) >> unused == lin as i64 {
            return Ok(lin);
        }
        Err(self.raise(if seg == Seg::Ss { Exception::ss(0) } else { Exception::gp(0) }))
    }

    /// #AC(0) if alignment checking is in force and `size` bytes at `lin` are a misaligned operand (SDM vol. 3A,
    /// table 7-7; operands of 16 bytes and more have rules of their own). The silicon looks at this before it
    /// translates, so that it comes before a page fault.
    pub(super) fn check_alignment(
        &mut self,
        seg: Seg,
        lin: u64,
        size: usize,
        access: Access,
    ) -> Result<(), Abort> {
        let alignment = match size {
            2 | 4 | 8 => size as u64,
            10 => 8,
            _ => 1,
        };
        if access.class == Class::Checked && lin & (alignment - 1) != 0 {
            self.checked(seg, lin)?;
            return Err(self.raise(Exception::AC));
        }
        Ok(())
    }

    fn read_pieces(&mut self, gpa: u64, out: &mut [u8]) -> Result<(), Abort> {
        let mut at = 0;
        while at < out.len() {
            let size = piece(out.len() - at);
            let value = self.bus(memory(gpa + at as u64, size, None))?;
            out[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
            at += size;
        }
        Ok(())
    }

    fn write_pieces(&mut self, gpa: u64, data: &[u8]) -> Result<(), Abort> {
        let mut at = 0;
        while at < data.len() {
            let size = piece(data.len() - at);
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(&data[at..at + size]);
            self.bus(memory(gpa + at as u64, size, Some(u64::from_le_bytes(bytes))))?;
            at += size;
        }
        Ok(())
    }

    /// Reads a paging-structure entry of 8 or 4 bytes; `None` if no region has it.
    pub(crate) fn peek_entry(&mut self, gpa: u64, wide: bool) -> Result<Option<u64>, Absent> {
        let gpa = gpa | self.space();
        let Some(backing) = self.backing(gpa) else { return Ok(None) };
        let host = backing.host(gpa);
        if backing.is_elsewhere(gpa) {
            let violation = Violation { kind: Kind::Read, lin: self.mmu.walking, walk: true };
            return Err(host::elsewhere(host, violation));
        }
        if backing.log_access(gpa, false) {
            self.log_modified(gpa);
        }
        read_host(host, if wide { 8 } else { 4 }).map(Some)
    }

    /// Reads a byte of memory with no effect on the guest and no regard to rights; `None` if none is there.
    pub(crate) fn peek_byte(&mut self, lin: u64) -> Option<u8> {
        let gpa = self.translate(lin)?.0 | self.space();
        let host = self.backing(gpa)?.host(gpa);
        read_host(host, 1).ok().map(|byte| byte as u8)
    }

    /// Replaces a paging-structure entry if it is still `old`. One that cannot be written stays as it is.
    pub(crate) fn exchange_entry(&mut self, gpa: u64, old: u64, new: u64, wide: bool) -> Result<bool, Abort> {
        let gpa = gpa | self.space();
        let Some(backing) = self.backing(gpa) else { return Ok(true) };
        if backing.region.readonly {
            return Ok(true);
        }
        let (host, size) = (backing.host(gpa), if wide { 8 } else { 4 });
        if backing.log_access(gpa, true) {
            self.log_modified(gpa);
        }
        let found = self.present(exchange_host(host, size, &mut |now| (now == old).then_some(new)))?;
        if found != old {
            return Ok(false);
        }
        self.code_written(gpa, size);
        Ok(true)
    }

    /// Whether the page of `lin` has an enabled data breakpoint.
    fn watches(&self, lin: u64) -> bool {
        self.state.watched(lin & !PAGE_MASK, PAGE_SIZE, true) != 0
    }

    /// Records the data breakpoints that an access has hit.
    pub(super) fn watch(&mut self, place: Place, lin: u64, size: usize, access: Access) {
        if place.watched {
            self.mmu.debug_hits |= self.state.watched(lin, size as u64, access.kind == Kind::Write);
        }
    }
}

fn memory(address: u64, size: usize, write: Option<u64>) -> BusAccess {
    BusAccess { space: Space::Memory, address: address & !SMM_SPACE, size: size as u8, write }
}

/// One host load of 1, 2, 4 or 8 bytes from guest memory.
fn read_host(host: u64, size: usize) -> Result<u64, Absent> {
    // SAFETY: callers pass an address that `Backing::host` or `place` gave, and a size within the page. Entries
    // and words never reach past their page, which is guest memory as a whole.
    unsafe {
        match size {
            1 => u8::read(host as *const u8).map(Word::to_u64),
            2 => u16::read(host as *const u16).map(Word::to_u64),
            4 => u32::read(host as *const u32).map(Word::to_u64),
            _ => u64::read(host as *const u64),
        }
    }
}

/// One host store of 1, 2, 4 or 8 bytes to guest memory.
fn write_host(host: u64, size: usize, value: u64) -> Result<(), Absent> {
    // SAFETY: as in `read_host`, and the region is writable.
    unsafe {
        match size {
            1 => u8::write(host as *mut u8, value as u8),
            2 => u16::write(host as *mut u16, value as u16),
            4 => u32::write(host as *mut u32, value as u32),
            _ => u64::write(host as *mut u64, value),
        }
    }
}

/// Changes a word of guest memory by compare-and-exchange; returns the old value.
pub(super) fn exchange_host(
    host: u64,
    size: usize,
    change: &mut dyn FnMut(u64) -> Option<u64>,
) -> Result<u64, Absent> {
    let mut old = read_host(host, size)?;
    loop {
        let Some(new) = change(old) else { return Ok(old) };
        // SAFETY: as in `write_host`.
        let found = unsafe {
            match size {
                1 => u8::compare_exchange(host as *mut u8, old as u8, new as u8).map(Word::to_u64),
                2 => u16::compare_exchange(host as *mut u16, old as u16, new as u16).map(Word::to_u64),
                4 => u32::compare_exchange(host as *mut u32, old as u32, new as u32).map(Word::to_u64),
                _ => u64::compare_exchange(host as *mut u64, old, new),
            }
        }?;
        if found == old {
            return Ok(old);
        }
        old = found;
    }
}
