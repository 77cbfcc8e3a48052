//! Locked accesses: the fast way on a host pointer, and the one place that every other locked access goes through.
//!
//! That place decides in this order (the SDM does not order them further):
//! 1. Legacy alignment checking: #AC(0), before translation.
//! 2. Translation for a write: #PF wins over what follows. So accessed, dirty and dirty-log marks of a refused access may be
//!    set, but no device has been touched.
//! 3. Split-lock detection: #AC(0) if the bytes lie in two cache lines, at any CPL, whatever CR0.AM and RFLAGS.AC say.
//! 4. UC-lock disable: #AC(0) or #GP(0) if the memory is not write-back. Devices are not.
//! 5. The access. A split one is made while the other CPUs of the VM stand still between blocks, so it is atomic among CPUs,
//!    and a plain or locked access of another CPU sees it as a whole. (Devices' threads may see its halves.) With
//!    MSR_TEST_CTRL\[31\] it is made without that care, and is no bus lock.
//! 6. Only then is it a bus lock: counted, and reported as [`crate::bus_lock`] says.
//!
//! Page-walk updates of accessed and dirty flags do not come here: aligned, they are never split, and no mechanism looks at
//! them.
#![expect(unsafe_code, reason = "guest memory is reached through raw host pointers")]

use crate::bus_lock::{LockKind, LockedAccess};
use crate::cpu::{Cpu, Pending};
use crate::exception::Abort;
use crate::mmu::Word;
use crate::mmu::ept::SMM_SPACE;
use crate::mmu::host::Absent;
use crate::mmu::slow::{Place, exchange_host, first_part};
use crate::mmu::tlb::{Class, PAGE_MASK};
use crate::mmu::walk::{Access, Kind};
use crate::mmu::word::compare_exchange_16;
use crate::state::Seg;

/// Bytes in a cache line, the guest's and the host's.
const LINE: u64 = 64;

/// Whether `size` bytes at `address`, host, linear or physical, lie in one cache line.
#[inline(always)]
fn in_line(address: u64, size: usize) -> bool {
    (address & (LINE - 1)) + size as u64 <= LINE
}

/// A locked access that has been checked.
struct Checked {
    /// Where it goes, if all of it is in one page.
    place: Option<Place>,
    /// The bus lock that it is, if it is one.
    lock: Option<LockedAccess>,
}

impl Cpu {
    /// Reads, changes and writes a word atomically (LOCK prefix). `change` gives the new value, or `None` to
    /// leave memory as it is; the write permission is needed in either case. Returns the old value. `change` may
    /// be called several times, and must have no effects of its own.
    #[inline]
    pub fn locked<T: Word>(
        &mut self,
        seg: Seg,
        lin: u64,
        mut change: impl FnMut(T) -> Option<T>,
    ) -> Result<T, Abort> {
        if let Some(pointer) = self.locked_pointer::<T>(seg, lin)? {
            return self.present(exchange_loop(pointer, change));
        }
        // An unchanged value is written back, as hardware does.
        let mut change = |old| Some(change(T::from_u64(old)).map_or(old, T::to_u64));
        self.locked_slow(seg, lin, T::SIZE, &mut change).map(T::from_u64)
    }

    /// Host pointer on which one locked host instruction of `T`'s size does what the guest's does: writable write-back
    /// memory, within one cache line, valid until the end of the instruction. `None` where [`Cpu::locked`] must serve.
    /// Faults as the access would, lock detection aside.
    #[inline(always)]
    pub fn locked_pointer<T: Word>(&mut self, seg: Seg, lin: u64) -> Result<Option<*mut T>, Abort> {
        let host = match self.mmu.tlb.locked_hit(lin, T::SIZE) {
            Some(host) => host,
            None => match self.locked_pointer_miss(seg, lin, T::SIZE)? {
                Some(pointer) => pointer as u64,
                None => return Ok(None),
            },
        };
        Ok(in_line(host, T::SIZE).then_some(host as *mut T))
    }

    /// CMPXCHG16B's access: compares and swaps 16 bytes atomically, returns the old value. The caller has
    /// checked that `lin` is a multiple of 16.
    pub fn locked_compare_exchange_16(
        &mut self,
        seg: Seg,
        lin: u64,
        expected: u128,
        new: u128,
    ) -> Result<u128, Abort> {
        let pointer = match self.mmu.tlb.locked_hit(lin, 16) {
            Some(host) => Some(host as *mut u8),
            None => self.locked_pointer_miss(seg, lin, 16)?,
        };
        if let Some(pointer) = pointer
            && pointer as u64 & 15 == 0
        {
            // SAFETY: 16 aligned bytes of writable guest memory.
            let old = unsafe { compare_exchange_16(pointer.cast(), expected, new) };
            return self.present(old);
        }
        let Checked { lock, .. } = self.check_lock(seg, lin, 16)?;
        let old = self.exclusive(|cpu| {
            cpu.probe(seg, lin, 16, true)?;
            let mut bytes = [0; 16];
            cpu.read_bytes(seg, lin, &mut bytes)?;
            let old = u128::from_le_bytes(bytes);
            // An unchanged value is written back, as hardware does.
            let value = if old == expected { new } else { old };
            cpu.write_bytes(seg, lin, &value.to_le_bytes())?;
            Ok(old)
        })?;
        self.record_bus_lock(lock);
        Ok(old)
    }

    /// Atomically changes a word with supervisor rights whatever the CPL: the busy and accessed bits of
    /// descriptors. As [`Cpu::locked`] otherwise, but never given up for another attempt because other CPUs are in the way:
    /// the task switch that it may be part of cannot begin again.
    pub fn system_locked<T: Word>(
        &mut self,
        lin: u64,
        mut change: impl FnMut(T) -> Option<T>,
    ) -> Result<T, Abort> {
        let class = self.mmu.tlb.class();
        self.mmu.tlb.set_class(Class::Supervisor);
        let implicit = std::mem::replace(&mut self.mmu.implicit, true);
        let mut change = |old| change(T::from_u64(old)).map(T::to_u64);
        let result = loop {
            let result = self.locked_slow(Seg::Ds, lin, T::SIZE, &mut change);
            if result.is_ok() || self.pending != Pending::Retry || self.awaits_step() {
                break result;
            }
        };
        self.mmu.implicit = implicit;
        self.mmu.tlb.set_class(class);
        result.map(T::from_u64)
    }

    /// [`Cpu::locked_pointer`] where the first level misses, or the memory is not write-back.
    #[cold]
    #[inline(never)]
    fn locked_pointer_miss(&mut self, seg: Seg, lin: u64, len: usize) -> Result<Option<*mut u8>, Abort> {
        let access = self.explicit(Kind::Write);
        self.check_alignment(seg, lin, len, access)?;
        if first_part(lin, len) < len {
            return Ok(None);
        }
        let place = self.place(seg, lin, access)?;
        let direct = !place.watched && access.class != Class::Checked && !place.coded && !place.uncached;
        Ok(place.target().filter(|_| direct).map(|host| host as *mut u8))
    }

    /// [`Cpu::locked`] where no single host instruction will do.
    #[cold]
    #[inline(never)]
    fn locked_slow(
        &mut self,
        seg: Seg,
        lin: u64,
        size: usize,
        change: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> Result<u64, Abort> {
        let access = self.explicit(Kind::Write);
        let Checked { place, lock } = self.check_lock(seg, lin, size)?;
        if let Some(place) = place
            && let Some(host) = place.target()
            && in_line(host, size)
        {
            let old = self.present(exchange_host(host, size, change))?;
            if place.coded {
                self.code_written(place.gpa, size);
            }
            self.watch(place, lin, size, access);
            self.record_bus_lock(lock);
            return Ok(old);
        }
        let mut exchange = |cpu: &mut Cpu| {
            let old = cpu.read_word(seg, lin, size, access)?;
            let new = change(old).unwrap_or(old);
            cpu.write_word(seg, lin, size, new, access)?;
            Ok(old)
        };
        if lock.is_some_and(|lock| lock.kind == LockKind::Split) && self.lock_is_suppressed() {
            return exchange(self);
        }
        // A split lock, or a device: nobody else may come between the read and the write.
        let old = self.exclusive(exchange)?;
        self.record_bus_lock(lock);
        Ok(old)
    }

    /// Checks a locked access as far as the decision to make it; see the order above.
    fn check_lock(&mut self, seg: Seg, lin: u64, size: usize) -> Result<Checked, Abort> {
        let access = self.explicit(Kind::Write);
        self.check_alignment(seg, lin, size, access)?;
        let (first, place) = if first_part(lin, size) == size {
            let place = self.place(seg, lin, access)?;
            (place, Some(place))
        } else {
            self.probe_as(seg, lin, size, access)?;
            (self.place(seg, lin, access)?, None)
        };
        let kind = if !in_line(lin, size) {
            LockKind::Split
        } else if first.uncached {
            LockKind::Uncached
        } else {
            return Ok(Checked { place, lock: None });
        };
        let uncached =
            first.uncached || (place.is_none() && self.second_page_uncached(seg, lin, size, access)?);
        let implicit = self.mmu.implicit;
        let gpa = first.gpa & !SMM_SPACE;
        let lock = LockedAccess { lin, gpa, size: size as u8, kind, implicit };
        self.claim_bus_lock(lock, uncached)?;
        Ok(Checked { place, lock: Some(lock) })
    }

    /// Whether the second page of an access that crosses into it is not write-back.
    fn second_page_uncached(
        &mut self,
        seg: Seg,
        lin: u64,
        size: usize,
        access: Access,
    ) -> Result<bool, Abort> {
        let next = self.advance(lin, first_part(lin, size), access);
        Ok(self.place(seg, next & !PAGE_MASK, access)?.uncached)
    }
}

/// Changes the word at `pointer` by compare-and-exchange until nobody came between; returns the old value.
#[inline(always)]
fn exchange_loop<T: Word>(pointer: *mut T, mut change: impl FnMut(T) -> Option<T>) -> Result<T, Absent> {
    // SAFETY: callers pass a pointer that `locked_pointer` gave: writable guest memory within one line.
    let mut old = unsafe { T::read(pointer) }?;
    loop {
        // An unchanged value is written back, as hardware does.
        let new = change(old).unwrap_or(old);
        // SAFETY: as above.
        let found = unsafe { T::compare_exchange(pointer, old, new) }?;
        if found == old {
            return Ok(old);
        }
        old = found;
    }
}
