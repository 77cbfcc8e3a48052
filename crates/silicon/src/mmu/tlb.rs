//! The software TLB: two levels for data, one small array for instruction fetches.
//!
//! **First level.** One direct-mapped array per access class (user, supervisor, supervisor with SMAP overridden).
//! An entry has a tag for reads, a tag for writes, and an addend; a hit is one comparison and one addition. The
//! tag that an access looks for is made of the page of its *last* byte while the slot is chosen by its first, so
//! an access that crosses into the next page misses by itself. Behind each array lies a smaller one for entries that others have
//! displaced: a stack and a heap whose pages share a slot have one each.
//!
//! **Second level.** Translations with their rights, independent of the access class, set-associative.
//!
//! **In front of it**, for translated code: the page that was accessed last by way of operands that look alike ([`Recent`]).
//! It holds for what is current, and is forgotten when anything of that changes.
//!
//! **Address spaces.** The low 12 bits of a tag hold a number that stands for the address space. Each PCID has
//! one, and global pages have one of their own in the second level. Flushing gives out a new number: entries
//! with the old one can no longer match. When the numbers are used up everything is cleared.
#![expect(unsafe_code, reason = "the current first-level table is reached by pointer")]

use std::hash::{BuildHasher, RandomState};
use std::ptr::NonNull;

/// log2 of the page size.
pub(crate) const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub(crate) const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Selects the offset within a page.
pub(crate) const PAGE_MASK: u64 = PAGE_SIZE - 1;

/// Slots of one first-level table.
pub(crate) const L1_SLOTS: usize = 4096;
/// Slots behind them for displaced entries.
pub(crate) const L1_DISPLACED: usize = 1024;
/// Entries of one first-level table.
const L1_ENTRIES: usize = L1_SLOTS + L1_DISPLACED;
/// First-level tables: one per [`Class`].
const L1_TABLES: usize = 4;
/// Sets of the second level.
const L2_SETS: usize = 2048;
/// Ways of a set.
const L2_WAYS: usize = 4;
/// Slots for instruction fetches, per privilege.
const EXEC_SLOTS: usize = 256;
/// Numbers of address spaces: what a tag's low bits can hold. Zero is never given out, so that a cleared
/// entry matches nothing.
const SPACES: u64 = PAGE_SIZE;

/// With which rights an access is made; selects the first-level table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Class {
    /// CPL 3.
    User = 0,
    /// Supervisor, SMAP in force (if CR4 enables it); all implicit supervisor accesses.
    Supervisor = 1,
    /// Supervisor with CR4.SMAP set and overridden by RFLAGS.AC.
    Override = 2,
    /// CPL 3 with alignment checking in force: never cached, every access takes the slow path.
    Checked = 3,
}

impl Class {
    /// Made with user rights.
    pub(crate) fn user(self) -> bool {
        matches!(self, Class::User | Class::Checked)
    }
}

/// Final translation of a 4 KiB page: guest-physical page address and, in the low 12 bits, rights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Leaf(pub(crate) u64);

impl Leaf {
    /// User accesses are allowed (U/S set at every level).
    pub(crate) const USER: u64 = 1 << 0;
    /// Writes are allowed (R/W set at every level).
    pub(crate) const WRITE: u64 = 1 << 1;
    /// Execution is forbidden (XD set at some level).
    pub(crate) const NO_EXECUTE: u64 = 1 << 2;
    /// The dirty flag is set.
    pub(crate) const DIRTY: u64 = 1 << 3;
    /// Global page.
    pub(crate) const GLOBAL: u64 = 1 << 4;
    /// Part of a page of 2 MiB or more.
    pub(crate) const LARGE: u64 = 1 << 5;
    /// Part of a page of 1 GiB.
    pub(crate) const HUGE: u64 = 1 << 6;
    /// Not write-back memory.
    pub(crate) const UNCACHED: u64 = 1 << 7;
    /// Position of the protection key.
    pub(crate) const KEY_SHIFT: u32 = 8;

    /// Guest-physical address of the page.
    pub(crate) fn page(self) -> u64 {
        self.0 & !PAGE_MASK
    }
    /// Whether all of `bits` are set.
    pub(crate) fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }
    /// Protection key.
    pub(crate) fn key(self) -> u32 {
        (self.0 >> Leaf::KEY_SHIFT) as u32 & 15
    }
}

/// First-level entry. A tag is the linear page address plus the number of the address space; 0 matches nothing.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Entry {
    /// Tag for loads.
    pub(crate) read: u64,
    /// Tag for stores.
    pub(crate) write: u64,
    /// Host address minus linear address.
    pub(crate) addend: u64,
    /// Guest frame number, and [`Entry::UNCACHED`].
    pub(crate) frame: u64,
}

impl Entry {
    /// In `frame`: not write-back memory, locked accesses miss. The sign bit, which is quick to test.
    const UNCACHED: u64 = 1 << 63;

    fn gfn(&self) -> u64 {
        self.frame & !Entry::UNCACHED
    }
}

/// The page that translated code accessed last in one way: an access at `lin` is to it if `lin ^ page` is less than the
/// page's size, and goes to `lin` plus `addend`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Recent {
    /// Linear address of the page.
    pub(crate) page: u64,
    /// Host address minus linear address.
    pub(crate) addend: u64,
}

impl Recent {
    /// Ways of access, of loads, stores, and locked accesses in turn: operands that look alike go the same way.
    pub(crate) const WAYS: [usize; 3] = [64, 32, 8];
    /// All of them.
    pub(crate) const ALL: usize = Recent::WAYS[0] + Recent::WAYS[1] + Recent::WAYS[2];

    /// No page. Every number is the address of some page, so this has one that is not canonical, at a host address that is
    /// the kernel's: the access faults, and is made again by the interpreter ([`super::host::recover`]). Which of them is
    /// random, so that where nobody recovers from faults no guest can find it.
    fn none() -> Recent {
        let random = RandomState::new().hash_one(0);
        let page = (random & !PAGE_MASK | 1 << 63) & !(1 << 56);
        Recent { page, addend: 0xffff_8000_0000_0000_u64.wrapping_sub(page) }
    }
}

/// A page that translated code has accessed, found by its address: where operands lie in many pages, the one accessed last is
/// seldom the next one. An access at `lin` is to it if `lin ^ page` is less than the page's size, and goes to that plus `host`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Found {
    /// Linear address of the page.
    pub(crate) page: u64,
    /// Host address of the page.
    pub(crate) host: u64,
}

impl Found {
    /// Slots for loads, and for stores: a page goes by the low bits of its number.
    pub(crate) const SLOTS: usize = 256;

    /// No page, as [`Recent::none`].
    fn none(recent: Recent) -> Found {
        Found { page: recent.page, host: recent.page.wrapping_add(recent.addend) }
    }
}

/// Pages found: for loads, and for stores.
type Founds = [[Found; Found::SLOTS]; 2];

/// A page for each way of each kind.
type Recents = [Recent; Recent::ALL];

/// Second-level entry.
#[derive(Clone, Copy, Debug, Default)]
struct Wide {
    tag: u64,
    leaf: Leaf,
}

/// Instruction-fetch entry.
#[derive(Clone, Copy, Debug, Default)]
struct Exec {
    tag: u64,
    gfn: u64,
    host: u64,
}

/// A set of numbers that may answer yes too often but never no too often: a Bloom filter with two hashes.
#[derive(Debug)]
struct Filter(Box<[u64]>);

impl Filter {
    const BITS: usize = 1 << 15;

    fn new() -> Filter {
        Filter(vec![0; Filter::BITS / 64].into_boxed_slice())
    }
    /// The two bits that stand for `number`.
    fn places(number: u64) -> [usize; 2] {
        let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        [mixed >> 49, mixed >> 34].map(|hash| hash as usize & (Filter::BITS - 1))
    }
    fn add(&mut self, number: u64) {
        for place in Filter::places(number) {
            self.0[place / 64] |= 1 << (place % 64);
        }
    }
    fn may_hold(&self, number: u64) -> bool {
        Filter::places(number).iter().all(|place| self.0[place / 64] & (1 << (place % 64)) != 0)
    }
    fn clear(&mut self) {
        self.0.fill(0);
    }
}

/// The TLB of one CPU.
#[derive(Debug)]
pub(crate) struct Tlb {
    /// The first-level table of the current access class.
    pub(crate) table: NonNull<Entry>,
    /// Number of the current address space.
    pub(crate) space: u64,
    /// Pages that were loaded from last, stored to, and accessed with a lock: with a supervisor's rights, and with a user's.
    pub(crate) recent: [Recents; 2],
    /// What stands there for no page.
    no_recent: Recent,
    /// The pages found with the current rights: one of `founds`.
    pub(crate) found: NonNull<Founds>,
    /// Whether pages accessed are noted: with SMAP overridden they are not, for a supervisor may not always access them.
    pub(crate) notes: bool,
    /// Pages found with a supervisor's rights, and with a user's.
    founds: Box<[Founds; 2]>,
    /// What [`Tlb::code_space`] returns for the lower and the upper half of the address space.
    code_spaces: [u64; 2],
    /// A fetch from the upper half has been translated by an entry that is not global.
    upper_is_private: bool,
    class: Class,
    l1: Box<[Entry]>,
    l2: Box<[[Wide; L2_WAYS]]>,
    exec: Box<[Exec]>,
    /// Number of the space of each PCID; 0: none yet.
    spaces: Box<[u16]>,
    pcid: u16,
    /// Number under which global pages are kept in the second level.
    global_space: u64,
    next_space: u64,
    /// Counts the flushes of single pages that code may have run from, and the clearings.
    code_flushes: u64,
    victim: usize,
    /// 2 MiB regions that some entry of a large page lies in.
    large: Filter,
    /// 1 GiB regions that some entry of a huge page lies in.
    huge: Filter,
    /// Pages whose translation for fetches has been given out.
    executed: Filter,
    /// Protection keys of user pages that the first level may hold: bit per key.
    keys: u16,
}

// SAFETY: `table` and `found` point into `l1` and `founds`, which the structure owns and never reallocates.
unsafe impl Send for Tlb {}

impl Default for Tlb {
    fn default() -> Tlb {
        let mut l1 = vec![Entry::default(); L1_ENTRIES * L1_TABLES].into_boxed_slice();
        let no_recent = Recent::none();
        let table = NonNull::from(&mut l1[Class::Supervisor as usize * L1_ENTRIES]);
        let mut founds = Box::new([[[Found::none(no_recent); Found::SLOTS]; 2]; 2]);
        let mut tlb = Tlb {
            table,
            space: 1,
            recent: [[no_recent; Recent::ALL]; 2],
            no_recent,
            found: NonNull::from(&mut founds[0]),
            notes: true,
            founds,
            code_spaces: [0; 2],
            upper_is_private: false,
            class: Class::Supervisor,
            l1,
            l2: vec![[Wide::default(); L2_WAYS]; L2_SETS].into_boxed_slice(),
            exec: vec![Exec::default(); EXEC_SLOTS * 2].into_boxed_slice(),
            spaces: vec![0; SPACES as usize].into_boxed_slice(),
            pcid: 0,
            global_space: 1,
            next_space: 1,
            code_flushes: 0,
            victim: 0,
            large: Filter::new(),
            huge: Filter::new(),
            executed: Filter::new(),
            keys: 0,
        };
        tlb.flush_all(false);
        tlb
    }
}

impl Tlb {
    /// Where the pages found with the current rights are noted.
    pub(crate) fn found_lie_at(&self) -> std::ops::Range<u64> {
        let start = self.found.as_ptr() as u64;
        start..start + size_of::<Founds>() as u64
    }
    /// First-level entry of the current class for an access to `lin`'s page, if it is one that `is_hit` likes.
    #[inline(always)]
    fn entry(&self, lin: u64, is_hit: impl Fn(&Entry) -> bool) -> Option<&Entry> {
        let page = (lin >> PAGE_SHIFT) as usize;
        // SAFETY: `table` points at the first of `L1_ENTRIES` entries inside `l1` (see `set_class`).
        let at = |index: usize| unsafe { self.table.add(index).as_ref() };
        let entry = at(page & (L1_SLOTS - 1));
        if is_hit(entry) {
            return Some(entry);
        }
        let displaced = at(L1_SLOTS + (page & (L1_DISPLACED - 1)));
        is_hit(displaced).then_some(displaced)
    }

    /// Host address of `size` bytes at `lin` for a load of the current class.
    #[inline(always)]
    pub(crate) fn read_hit(&self, lin: u64, size: usize) -> Option<u64> {
        let tag = self.tag(lin.wrapping_add(size as u64 - 1));
        let entry = self.entry(lin, |entry| entry.read == tag)?;
        Some(entry.addend.wrapping_add(lin))
    }

    /// Host address of `size` bytes at `lin` for a store of the current class.
    #[inline(always)]
    pub(crate) fn write_hit(&self, lin: u64, size: usize) -> Option<u64> {
        let tag = self.tag(lin.wrapping_add(size as u64 - 1));
        let entry = self.entry(lin, |entry| entry.write == tag)?;
        Some(entry.addend.wrapping_add(lin))
    }

    /// Host address of `size` bytes at `lin` for a locked access of the current class, to write-back memory.
    #[inline(always)]
    pub(crate) fn locked_hit(&self, lin: u64, size: usize) -> Option<u64> {
        let tag = self.tag(lin.wrapping_add(size as u64 - 1));
        let entry = self.entry(lin, |entry| entry.write == tag && entry.frame & Entry::UNCACHED == 0)?;
        Some(entry.addend.wrapping_add(lin))
    }

    #[inline(always)]
    fn tag(&self, lin: u64) -> u64 {
        (lin & !PAGE_MASK) | self.space
    }

    /// Current access class.
    #[inline(always)]
    pub(crate) fn class(&self) -> Class {
        self.class
    }

    /// Selects the first-level table for what follows.
    #[inline]
    pub(crate) fn set_class(&mut self, class: Class) {
        if class == self.class {
            return;
        }
        self.class = class;
        self.table = NonNull::from(&mut self.l1[class as usize * L1_ENTRIES]);
        self.found = NonNull::from(&mut self.founds[usize::from(class.user())]);
        // What a supervisor may access it may access with SMAP overridden, but not the other way round.
        self.notes = matches!(class, Class::User | Class::Supervisor);
        if class == Class::Checked {
            self.recent[1] = [self.no_recent; Recent::ALL];
            self.founds[1] = [[Found::none(self.no_recent); Found::SLOTS]; 2];
        }
    }

    /// Forgets which pages were accessed.
    #[inline]
    fn forget_accessed(&mut self) {
        self.forget_recent();
        *self.founds = [[[Found::none(self.no_recent); Found::SLOTS]; 2]; 2];
    }

    /// Forgets which pages were accessed last.
    #[inline]
    fn forget_recent(&mut self) {
        self.recent = [[self.no_recent; Recent::ALL]; 2];
    }

    /// Forgets which pages were stored to.
    fn forget_stored(&mut self) {
        self.forget_recent();
        for rights in self.founds.iter_mut() {
            rights[1] = [Found::none(self.no_recent); Found::SLOTS];
        }
    }

    /// A number that stands for the linear-to-physical mapping of code around `lin`: while it is the same, so is
    /// the mapping. In the upper half, where systems keep themselves in global pages, switching the address space
    /// does not change it as long as all code there is global.
    #[inline(always)]
    pub(crate) fn code_space(&self, lin: u64) -> u64 {
        self.code_spaces[(lin >> 63) as usize]
    }

    /// Cached translation of `lin` in the current address space.
    pub(crate) fn lookup(&self, lin: u64) -> Option<Leaf> {
        let page = lin & !PAGE_MASK;
        let (own, global) = (page | self.space, page | self.global_space);
        let set = &self.l2[set_index(lin)];
        set.iter().find(|way| way.tag == own || way.tag == global).map(|way| way.leaf)
    }

    /// Keeps a translation that a walk has found.
    pub(crate) fn insert(&mut self, lin: u64, leaf: Leaf) {
        let page = lin & !PAGE_MASK;
        let (own, global) = (page | self.space, page | self.global_space);
        let set = &mut self.l2[set_index(lin)];
        let victim = &mut self.victim;
        let way = set.iter().position(|way| way.tag == own || way.tag == global).unwrap_or_else(|| {
            *victim = victim.wrapping_add(1);
            *victim % L2_WAYS
        });
        set[way] = Wide { tag: if leaf.has(Leaf::GLOBAL) { global } else { own }, leaf };
        if leaf.has(Leaf::LARGE) {
            self.large.add(lin >> 21);
        }
        if leaf.has(Leaf::HUGE) {
            self.huge.add(lin >> 30);
        }
    }

    /// Fills the first level of `class` so that loads, and stores if `write`, hit. `host` is where `lin`'s page
    /// is in host memory.
    pub(crate) fn fill(&mut self, class: Class, lin: u64, leaf: Leaf, host: u64, write: bool) {
        if leaf.has(Leaf::USER) {
            self.keys |= 1 << leaf.key();
        }
        let tag = self.tag(lin);
        let addend = host.wrapping_sub(lin & !PAGE_MASK);
        let [index, displaced] = first_level(class as usize, lin);
        let keeps_write = [index, displaced].into_iter().any(|at| {
            let entry = &self.l1[at];
            entry.write == tag && entry.addend == addend
        });
        let write = if write || keeps_write { tag } else { 0 };
        let uncached = if leaf.has(Leaf::UNCACHED) { Entry::UNCACHED } else { 0 };
        let entry = Entry { read: tag, write, addend, frame: leaf.page() >> PAGE_SHIFT | uncached };
        let old = std::mem::replace(&mut self.l1[index], entry);
        if old.read != tag && old.read & PAGE_MASK == self.space {
            self.l1[displaced] = old;
        } else if self.l1[displaced].read == tag {
            self.l1[displaced] = Entry::default();
        }
    }

    /// Cached translation for a fetch: guest frame number and host address of the page.
    #[inline]
    pub(crate) fn exec_hit(&self, user: bool, lin: u64) -> Option<(u64, u64)> {
        let entry = &self.exec[exec_index(user, lin)];
        (entry.tag == self.tag(lin)).then_some((entry.gfn, entry.host))
    }

    /// Keeps a translation for fetches.
    pub(crate) fn exec_fill(&mut self, user: bool, lin: u64, leaf: Leaf, host: u64) {
        self.executed.add(lin >> PAGE_SHIFT);
        self.exec[exec_index(user, lin)] = Exec { tag: self.tag(lin), gfn: leaf.page() >> PAGE_SHIFT, host };
        if lin >> 63 != 0 && !leaf.has(Leaf::GLOBAL) && !self.upper_is_private {
            self.upper_is_private = true;
            self.select();
        }
    }

    /// Gives out a number for an address space.
    fn new_space(&mut self) -> u64 {
        self.next_space += 1;
        if self.next_space >= SPACES {
            self.clear();
        }
        self.next_space
    }

    /// Forgets everything and starts to number address spaces anew.
    fn clear(&mut self) {
        self.clear_first_level();
        self.l2.fill([Wide::default(); L2_WAYS]);
        self.exec.fill(Exec::default());
        self.spaces.fill(0);
        self.large.clear();
        self.huge.clear();
        self.executed.clear();
        self.upper_is_private = false;
        self.code_flushes += 1;
        self.global_space = 1;
        self.next_space = 2;
    }

    /// Makes the space of the current PCID, which gets a number if it has none, the current one.
    fn select(&mut self) {
        let pcid = usize::from(self.pcid) & (SPACES as usize - 1);
        if self.spaces[pcid] == 0 {
            let space = self.new_space();
            self.spaces[pcid] = space as u16;
        }
        let space = u64::from(self.spaces[pcid]);
        if space != self.space {
            self.space = space;
            self.forget_accessed();
        }
        let upper = if self.upper_is_private { self.space } else { self.global_space };
        self.code_spaces = [self.space, upper].map(|space| (self.code_flushes << PAGE_SHIFT) | space);
    }

    /// Switches to the address space of `pcid`.
    pub(crate) fn switch(&mut self, pcid: u16) {
        self.pcid = pcid;
        self.select();
    }

    /// Forgets the translations of `pcid`, global ones excepted.
    pub(crate) fn flush_context(&mut self, pcid: u16) {
        self.spaces[usize::from(pcid) & (SPACES as usize - 1)] = 0;
        self.select();
    }

    /// Forgets the translations of all PCIDs, and the global ones too unless `keep_global`.
    pub(crate) fn flush_all(&mut self, keep_global: bool) {
        self.spaces.fill(0);
        if !keep_global {
            // Every space gets a new number: nothing that was entered or given out so far can match any more.
            self.large.clear();
            self.huge.clear();
            self.executed.clear();
            self.upper_is_private = false;
            self.global_space = self.new_space();
        }
        self.select();
    }

    /// Forgets the translation of `lin` in the current address space, and a global one.
    pub(crate) fn flush_page(&mut self, lin: u64) {
        self.flush_page_of(self.space, lin, true);
    }

    /// Forgets the translation of `lin` in the address space of `pcid`, a global one excepted.
    pub(crate) fn flush_page_in(&mut self, pcid: u16, lin: u64) {
        let space = u64::from(self.spaces[usize::from(pcid) & (SPACES as usize - 1)]);
        self.flush_page_of(space, lin, false);
    }

    fn flush_page_of(&mut self, space: u64, lin: u64, global: bool) {
        if self.large.may_hold(lin >> 21) || self.huge.may_hold(lin >> 30) {
            // Any page of a large page may be cached; they all go.
            return self.flush_all(false);
        }
        self.forget_recent();
        let page = lin & !PAGE_MASK;
        let slot = (lin >> PAGE_SHIFT) as usize & (Found::SLOTS - 1);
        for kind in self.founds.iter_mut().flatten() {
            kind[slot] = Found::none(self.no_recent);
        }
        for at in (0..L1_TABLES).flat_map(|table| first_level(table, lin)) {
            self.l1[at] = Entry::default();
        }
        for user in [false, true] {
            self.exec[exec_index(user, lin)] = Exec::default();
        }
        let (own, shared) = (page | space, page | self.global_space);
        for way in &mut self.l2[set_index(lin)] {
            if way.tag == own || (global && way.tag == shared) {
                *way = Wide::default();
            }
        }
        if self.executed.may_hold(lin >> PAGE_SHIFT) {
            self.code_flushes += 1;
            self.select();
        }
    }

    /// Empties the first level: what may be cached there has changed, the translations have not.
    pub(crate) fn clear_first_level(&mut self) {
        self.forget_accessed();
        self.l1.fill(Entry::default());
        self.keys = 0;
    }

    /// Takes back all permissions to store without looking.
    pub(crate) fn drop_writes(&mut self) {
        self.forget_stored();
        for entry in &mut self.l1 {
            entry.write = 0;
        }
    }

    /// Takes back the permissions to store to page `gfn` without looking.
    pub(crate) fn drop_writes_to(&mut self, gfn: u64) {
        self.forget_stored();
        for entry in &mut self.l1 {
            if entry.gfn() == gfn {
                entry.write = 0;
            }
        }
    }

    /// Protection keys that entries of the first level may depend on: bit per key.
    pub(crate) fn keys(&self) -> u16 {
        self.keys
    }
}

/// Where an entry for `lin` in a first-level table lies, if no other has displaced it, and if one has.
fn first_level(table: usize, lin: u64) -> [usize; 2] {
    let page = (lin >> PAGE_SHIFT) as usize;
    [page & (L1_SLOTS - 1), L1_SLOTS + (page & (L1_DISPLACED - 1))].map(|at| table * L1_ENTRIES + at)
}

fn set_index(lin: u64) -> usize {
    let page = lin >> PAGE_SHIFT;
    (page ^ (page >> 11) ^ (page >> 22)) as usize & (L2_SETS - 1)
}

fn exec_index(user: bool, lin: u64) -> usize {
    ((lin >> PAGE_SHIFT) as usize & (EXEC_SLOTS - 1)) + if user { EXEC_SLOTS } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIN: u64 = 0x7000_1000;
    const LEAF: Leaf = Leaf(0x5000 | Leaf::USER | Leaf::WRITE | Leaf::DIRTY);

    fn filled(leaf: Leaf) -> Tlb {
        let mut tlb = Tlb::default();
        tlb.insert(LIN, leaf);
        tlb.fill(Class::Supervisor, LIN, leaf, 0x10_0000, true);
        tlb.exec_fill(false, LIN, leaf, 0x10_0000);
        tlb
    }

    fn cached(tlb: &Tlb) -> [bool; 3] {
        [tlb.write_hit(LIN, 1).is_some(), tlb.lookup(LIN).is_some(), tlb.exec_hit(false, LIN).is_some()]
    }

    #[test]
    fn accesses_that_cross_pages_miss() {
        let mut tlb = filled(LEAF);
        tlb.fill(Class::Supervisor, LIN + PAGE_SIZE, LEAF, 0x20_0000, true);
        assert_eq!(tlb.read_hit(LIN + 0xff8, 8), Some(0x10_0ff8));
        assert_eq!(tlb.read_hit(LIN + 0xff9, 8), None);
        assert_eq!(tlb.write_hit(LIN + 0xfff, 2), None);
        assert_eq!(tlb.read_hit(LIN + 0x1000, 8), Some(0x20_0000));
    }

    #[test]
    fn reads_do_not_permit_writes_and_keep_them() {
        let mut tlb = Tlb::default();
        tlb.fill(Class::Supervisor, LIN, LEAF, 0x10_0000, false);
        assert!(tlb.read_hit(LIN, 1).is_some() && tlb.write_hit(LIN, 1).is_none());
        tlb.fill(Class::Supervisor, LIN, LEAF, 0x10_0000, true);
        tlb.fill(Class::Supervisor, LIN, LEAF, 0x10_0000, false);
        assert!(tlb.write_hit(LIN, 1).is_some());
        tlb.fill(Class::Supervisor, LIN, LEAF, 0x20_0000, false);
        assert!(tlb.write_hit(LIN, 1).is_none(), "another page needs its own permission");
    }

    /// A stack and a heap in one slot displaced each other at each access: Python took twice as long.
    #[test]
    fn two_pages_in_one_slot_are_both_there() {
        let other = LIN + L1_SLOTS as u64 * PAGE_SIZE;
        let pages = [(LIN, 0x10_0000), (other, 0x20_0000)];
        let mut tlb = Tlb::default();
        for (lin, host) in [pages[0], pages[1], pages[0]] {
            tlb.fill(Class::Supervisor, lin, LEAF, host, true);
        }
        let hits = |tlb: &Tlb| pages.map(|(lin, _)| (tlb.read_hit(lin, 8), tlb.write_hit(lin, 8)));
        assert_eq!(hits(&tlb), pages.map(|(_, host)| (Some(host), Some(host))));
        // For loads alone: the permission to store is kept, wherever the entry was.
        tlb.fill(Class::Supervisor, other, LEAF, 0x20_0000, false);
        assert_eq!(hits(&tlb), pages.map(|(_, host)| (Some(host), Some(host))));
        tlb.fill(Class::Supervisor, LIN, LEAF, 0x30_0000, false);
        assert_eq!(hits(&tlb)[0], (Some(0x30_0000), None), "the old entry is gone");
        tlb.drop_writes();
        assert_eq!(hits(&tlb).map(|(_, write)| write), [None; 2]);
        for lin in [LIN, other] {
            tlb.flush_page(lin);
            assert_eq!(tlb.read_hit(lin, 1), None);
        }
    }

    #[test]
    fn classes_are_apart() {
        let mut tlb = filled(LEAF);
        for class in [Class::User, Class::Override, Class::Checked] {
            tlb.set_class(class);
            assert_eq!(tlb.read_hit(LIN, 1), None);
        }
        tlb.set_class(Class::Supervisor);
        assert!(tlb.read_hit(LIN, 1).is_some());
    }

    #[test]
    fn pcids_keep_their_entries() {
        let mut tlb = filled(LEAF);
        let home = tlb.code_space(LIN);
        tlb.switch(7);
        assert_eq!(cached(&tlb), [false; 3]);
        assert_ne!(tlb.code_space(LIN), home);
        tlb.switch(0);
        assert_eq!(cached(&tlb), [true; 3]);
        assert_eq!(tlb.code_space(LIN), home);
        tlb.flush_context(7);
        assert_eq!(cached(&tlb), [true; 3]);
        tlb.flush_context(0);
        assert_eq!(cached(&tlb), [false; 3]);
        assert_ne!(tlb.code_space(LIN), home);
    }

    #[test]
    fn global_code_of_the_upper_half_is_one_space() {
        const UPPER: u64 = !0xffff;
        let global = Leaf(LEAF.0 | Leaf::GLOBAL);
        let mut tlb = Tlb::default();
        tlb.exec_fill(false, UPPER, global, 0x10_0000);
        let home = tlb.code_space(UPPER);
        for (change, same) in [
            ((|tlb| tlb.switch(5)) as fn(&mut Tlb), true),
            (|tlb| tlb.flush_context(5), true),
            (|tlb| tlb.flush_all(true), true),
            (|tlb| tlb.flush_page(UPPER - PAGE_SIZE), true),
            (|tlb| tlb.flush_page(UPPER), false),
            (|tlb| tlb.flush_all(false), false),
        ] {
            change(&mut tlb);
            assert_eq!(tlb.code_space(UPPER) == home, same);
        }
        // One private page, and switching matters.
        tlb.exec_fill(false, UPPER - PAGE_SIZE, LEAF, 0x20_0000);
        let home = tlb.code_space(UPPER);
        tlb.switch(6);
        assert_ne!(tlb.code_space(UPPER), home);
        tlb.switch(5);
        assert_eq!(tlb.code_space(UPPER), home);
    }

    #[test]
    fn global_entries_survive_what_they_should() {
        let global = Leaf(LEAF.0 | Leaf::GLOBAL);
        let mut tlb = filled(global);
        tlb.flush_context(0);
        assert_eq!(tlb.lookup(LIN), Some(global));
        tlb.switch(9);
        assert_eq!(tlb.lookup(LIN), Some(global));
        tlb.flush_all(true);
        assert_eq!(tlb.lookup(LIN), Some(global));
        tlb.flush_page_in(9, LIN);
        assert_eq!(tlb.lookup(LIN), Some(global));
        tlb.flush_page(LIN);
        assert_eq!(tlb.lookup(LIN), None);
        tlb.insert(LIN, global);
        tlb.flush_all(false);
        assert_eq!(tlb.lookup(LIN), None);
    }

    #[test]
    fn flushing_one_page_spares_the_others() {
        let mut tlb = filled(LEAF);
        let home = tlb.code_space(LIN);
        tlb.flush_page(LIN + PAGE_SIZE);
        assert_eq!(cached(&tlb), [true; 3]);
        assert_eq!(tlb.code_space(LIN), home, "no code ran from that page");
        tlb.flush_page(LIN + 123);
        assert_eq!(cached(&tlb), [false; 3]);
        assert_ne!(tlb.code_space(LIN), home);
    }

    #[test]
    fn flushing_any_part_of_a_large_page_flushes_it_all() {
        for (bits, size) in [(Leaf::LARGE, 1u64 << 21), (Leaf::LARGE | Leaf::HUGE, 1 << 30)] {
            let mut tlb = filled(Leaf(LEAF.0 | bits));
            tlb.flush_page((LIN & !(size - 1)) + size - 1);
            assert_eq!(cached(&tlb), [false; 3]);
        }
    }

    #[test]
    fn spaces_can_be_used_up() {
        let mut tlb = filled(LEAF);
        let mut seen = std::collections::HashSet::from([tlb.code_space(LIN)]);
        for _ in 0..3 * SPACES {
            tlb.flush_context(0);
            assert!(seen.insert(tlb.code_space(LIN)));
            assert_eq!(cached(&tlb), [false; 3]);
            tlb.fill(Class::Supervisor, LIN, LEAF, 0x10_0000, true);
        }
        tlb.switch(3);
        assert_eq!(cached(&tlb), [false; 3]);
    }

    #[test]
    fn write_permissions_are_dropped() {
        let mut tlb = filled(LEAF);
        tlb.drop_writes_to(6);
        assert!(tlb.write_hit(LIN, 1).is_some());
        tlb.drop_writes_to(5);
        assert!(tlb.write_hit(LIN, 1).is_none() && tlb.read_hit(LIN, 1).is_some());
        tlb.fill(Class::Supervisor, LIN, LEAF, 0x10_0000, true);
        tlb.drop_writes();
        assert!(tlb.write_hit(LIN, 1).is_none() && tlb.read_hit(LIN, 1).is_some());
    }
}
