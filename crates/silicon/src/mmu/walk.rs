//! Page walks: 32-bit, PAE, 4-level and 5-level paging (SDM vol. 3A, chapter 5).
//!
//! A walk reads the entries from the top down and stops at one that is not present or has a reserved bit set.
//! Then it checks the access against the rights of all of them, and only then sets accessed and dirty flags,
//! by compare-and-exchange as hardware does: if an entry has changed meanwhile the walk starts again.

use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::mmu::Caching;
use crate::mmu::tlb::{Class, Leaf, PAGE_MASK};
use crate::model::Feature;
use crate::state::{cr0, cr4, efer};
use crate::vmx::Exit;

/// Bits of paging-structure entries (SDM vol. 3A, tables 5-5 to 5-20).
mod entry {
    pub(super) const PRESENT: u64 = 1 << 0;
    pub(super) const WRITE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    pub(super) const PWT: u64 = 1 << 3;
    pub(super) const PCD: u64 = 1 << 4;
    pub(super) const ACCESSED: u64 = 1 << 5;
    pub(super) const DIRTY: u64 = 1 << 6;
    pub(super) const SIZE: u64 = 1 << 7;
    /// Of an entry that maps a 4-KiB page.
    pub(super) const PAT: u64 = 1 << 7;
    /// Of an entry that maps a larger page.
    pub(super) const PAT_LARGE: u64 = 1 << 12;
    pub(super) const GLOBAL: u64 = 1 << 8;
    pub(super) const NO_EXECUTE: u64 = 1 << 63;
    pub(super) const KEY_SHIFT: u32 = 59;
}

/// Page-fault error code (SDM vol. 3A, figure 5-12).
pub(crate) mod code {
    /// The entries are present: a matter of rights or reserved bits.
    pub(crate) const PRESENT: u32 = 1 << 0;
    /// A write.
    pub(crate) const WRITE: u32 = 1 << 1;
    /// A user-mode access.
    pub(crate) const USER: u32 = 1 << 2;
    /// A reserved bit is set.
    pub(crate) const RESERVED: u32 = 1 << 3;
    /// An instruction fetch.
    pub(crate) const FETCH: u32 = 1 << 4;
    /// A protection key forbids the access.
    pub(crate) const KEY: u32 = 1 << 5;
}

/// Walks that lose the race for an entry this often give the instruction up for another attempt.
const RESTARTS: usize = 16;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Data read.
    Read,
    /// Data write, or a read-modify-write.
    Write,
    /// Instruction fetch.
    Execute,
}

/// A memory access as translation sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) kind: Kind,
    pub(crate) class: Class,
}

/// Shape of the paging structures in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// Two levels of 32-bit entries.
    Legacy,
    /// Two levels of 64-bit entries under four PDPTEs in registers.
    Pae,
    /// Four or five levels of 64-bit entries.
    Long(u32),
}

/// The entries that a walk used, top level first, with their guest-physical addresses.
#[derive(Clone, Copy, Debug, Default)]
struct Path {
    entries: [(u64, u64); 5],
    length: usize,
}

impl Path {
    fn push(&mut self, gpa: u64, value: u64) {
        if let Some(slot) = self.entries.get_mut(self.length) {
            *slot = (gpa, value);
            self.length += 1;
        }
    }
}

/// Why the entries translate nothing.
enum Miss {
    /// #PF with these error-code bits.
    Fault(u32),
    /// An entry could not be read now.
    Abort(Abort),
}

/// Reads the entry at a guest-physical address, 8 bytes wide if true, else 4.
type Reader = fn(&mut Cpu, u64, bool) -> Result<u64, Abort>;

impl Cpu {
    /// Translates `lin` for `access`, setting accessed and dirty flags; raises the #PF that it meets. The page has the
    /// CPU's [`Cpu::space`].
    pub(crate) fn walk(&mut self, lin: u64, access: Access) -> Result<Leaf, Abort> {
        self.mmu.walking = lin;
        if self.state.cr0 & cr0::PG == 0 {
            return Ok(Leaf(self.identity(lin).0 | self.space()));
        }
        self.counters.page_walks += 1;
        for _ in 0..RESTARTS {
            let (path, leaf) = match self.descend(lin, Cpu::read_entry) {
                Ok(found) => found,
                Err(Miss::Abort(abort)) => return Err(abort),
                Err(Miss::Fault(bits)) => return Err(self.page_fault(lin, access, bits)),
            };
            if let Err(bits) = self.permits(leaf, access) {
                return Err(self.page_fault(lin, access, code::PRESENT | bits));
            }
            if self.set_flags(&path, access.kind == Kind::Write)? {
                let dirty = if access.kind == Kind::Write { Leaf::DIRTY } else { 0 };
                return Ok(Leaf(leaf.0 | dirty | self.space()));
            }
        }
        Err(self.retry())
    }

    /// The translation of `lin` without paging: write-back unless CR0.CD says otherwise.
    fn identity(&self, lin: u64) -> Leaf {
        let uncached = if Caching::of(self) == Caching::Off { Leaf::UNCACHED } else { 0 };
        Leaf((lin & !PAGE_MASK) | Leaf::USER | Leaf::WRITE | Leaf::DIRTY | uncached)
    }

    /// Translates `lin` with no effect on the guest and no regard to rights: guest-physical address, writable,
    /// user-accessible. `None` if nothing is mapped there. For debuggers.
    pub fn translate(&mut self, lin: u64) -> Option<(u64, bool, bool)> {
        let leaf = if self.state.cr0 & cr0::PG == 0 {
            self.identity(lin)
        } else {
            self.descend(lin, |cpu, gpa, wide| Ok(cpu.peek_entry(gpa, wide).ok().flatten().unwrap_or(0)))
                .ok()?
                .1
        };
        Some((leaf.page() | (lin & PAGE_MASK), leaf.has(Leaf::WRITE), leaf.has(Leaf::USER)))
    }

    /// Loads the four PDPTEs that PAE paging keeps in registers from the table at `cr3` (SDM vol. 3A, 5.4.1).
    /// #GP(0), with nothing changed, if a present one has a reserved bit set. MOV to CR3, and MOV to CR0 and CR4
    /// where they change the paging mode, call this before they change anything.
    pub fn load_pdptrs(&mut self, cr3: u64) -> Result<(), Abort> {
        let table = cr3 & 0xffff_ffe0;
        let reserved = 0x1e6 | !self.features.physical_mask() & !PAGE_MASK;
        let mut loaded = [0; 4];
        for (i, pdpte) in loaded.iter_mut().enumerate() {
            *pdpte = self.read_entry(table + i as u64 * 8, true)?;
            if *pdpte & entry::PRESENT != 0 && *pdpte & reserved != 0 {
                return Err(self.raise(Exception::gp(0)));
            }
        }
        self.state.pdptr = loaded;
        Ok(())
    }

    /// Loads the PDPTEs after somebody outside guest mode has set CR0, CR3, CR4 and EFER; nothing happens if PAE paging
    /// is off. False, with nothing changed, if the table is not in memory or has reserved bits set.
    pub fn reload_pdptrs(&mut self) -> bool {
        if self.state.cr0 & cr0::PG == 0 || self.paging_format() != Format::Pae {
            return true;
        }
        let table = self.state.cr3 & 0xffff_ffe0;
        let reserved = 0x1e6 | !self.features.physical_mask() & !PAGE_MASK;
        let mut loaded = [0; 4];
        for (i, pdpte) in loaded.iter_mut().enumerate() {
            match self.peek_entry(table + i as u64 * 8, true) {
                Ok(Some(value)) if value & entry::PRESENT == 0 || value & reserved == 0 => *pdpte = value,
                _ => return false,
            }
        }
        self.state.pdptr = loaded;
        true
    }

    /// Whether `leaf` allows `access`; if not, the error-code bits that say why (besides P).
    pub(crate) fn permits(&self, leaf: Leaf, access: Access) -> Result<(), u32> {
        let state = &self.state;
        if state.cr0 & cr0::PG == 0 {
            return Ok(());
        }
        let user_page = leaf.has(Leaf::USER);
        let user = access.class.user();
        let enforced = user || state.cr0 & cr0::WP != 0;
        let allowed = match access.kind {
            _ if user && !user_page => false,
            Kind::Execute => {
                let smep = !user && user_page && state.cr4 & cr4::SMEP != 0;
                !leaf.has(Leaf::NO_EXECUTE) && !smep
            }
            kind => {
                let smap = user_page && access.class == Class::Supervisor && state.cr4 & cr4::SMAP != 0;
                let readonly = kind == Kind::Write && enforced && !leaf.has(Leaf::WRITE);
                !smap && !readonly
            }
        };
        // Protection keys are reported even where something else forbids the access too.
        let keyed = access.kind != Kind::Execute && user_page && self.keys_in_force();
        let rights = (state.pkru >> (2 * leaf.key())) & 3;
        let key_denies =
            keyed && (rights & 1 != 0 || (rights & 2 != 0 && access.kind == Kind::Write && enforced));
        match (allowed, key_denies) {
            (true, false) => Ok(()),
            (_, true) => Err(code::KEY),
            (false, false) => Err(0),
        }
    }

    /// CR4.PKE in IA-32e mode.
    pub(crate) fn keys_in_force(&self) -> bool {
        self.state.cr4 & cr4::PKE != 0 && self.state.efer & efer::LMA != 0
    }

    /// #PF at `lin`.
    fn page_fault(&mut self, lin: u64, access: Access, bits: u32) -> Abort {
        let state = &self.state;
        let pae_nx = state.cr4 & cr4::PAE != 0 && state.efer & efer::NXE != 0;
        let tells_fetches = pae_nx || state.cr4 & cr4::SMEP != 0;
        let mut error = bits;
        if access.class.user() {
            error |= code::USER;
        }
        match access.kind {
            Kind::Write => error |= code::WRITE,
            Kind::Execute if tells_fetches => error |= code::FETCH,
            _ => {}
        }
        self.raise(Exception::pf(lin, error))
    }

    fn paging_format(&self) -> Format {
        let state = &self.state;
        if state.cr4 & cr4::PAE == 0 {
            Format::Legacy
        } else if state.efer & efer::LMA == 0 {
            Format::Pae
        } else {
            Format::Long(if state.cr4 & cr4::LA57 != 0 { 5 } else { 4 })
        }
    }

    fn descend(&mut self, lin: u64, read: Reader) -> Result<(Path, Leaf), Miss> {
        match self.paging_format() {
            Format::Legacy => self.descend_legacy(lin, read),
            format => self.descend_wide(lin, format, read),
        }
    }

    fn descend_wide(&mut self, lin: u64, format: Format, read: Reader) -> Result<(Path, Leaf), Miss> {
        let mask = self.features.physical_mask() & !PAGE_MASK;
        let (mut table, mut level) = match format {
            Format::Long(levels) => (self.state.cr3 & mask, levels),
            _ => {
                let pdpte = self.state.pdptr[(lin >> 30) as usize & 3];
                if pdpte & entry::PRESENT == 0 {
                    return Err(Miss::Fault(0));
                }
                (pdpte & mask, 2)
            }
        };
        let mut path = Path::default();
        // AND of the rights that are granted, OR of the one that is denied.
        let (mut granted, mut denied) = (u64::MAX, 0);
        loop {
            let shift = 12 + 9 * (level - 1);
            let gpa = table + ((lin >> shift) & 511) * 8;
            let value = read(self, gpa, true).map_err(Miss::Abort)?;
            if value & entry::PRESENT == 0 {
                return Err(Miss::Fault(0));
            }
            let last = level == 1 || (level <= 3 && value & entry::SIZE != 0);
            if value & self.reserved(format, level, last && level > 1) != 0 {
                return Err(Miss::Fault(code::PRESENT | code::RESERVED));
            }
            path.push(gpa, value);
            granted &= value;
            denied |= value;
            if last {
                let within = ((1u64 << shift) - 1) & !PAGE_MASK;
                let page = (value & mask & !within) | (lin & within);
                let key = if matches!(format, Format::Long(_)) { value >> entry::KEY_SHIFT & 15 } else { 0 };
                return Ok((path, self.make_leaf(page, value, granted, denied, level, key)));
            }
            table = value & mask;
            level -= 1;
        }
    }

    /// Bits of a present 64-bit entry at `level` that must be zero; `large`: it maps a large page.
    fn reserved(&self, format: Format, level: u32, large: bool) -> u64 {
        let mut bits = !self.features.physical_mask();
        bits &= match format {
            Format::Long(_) => (1 << 52) - 1,
            _ => (1 << 63) - 1,
        };
        if self.state.efer & efer::NXE == 0 {
            bits |= entry::NO_EXECUTE;
        }
        bits | match level {
            4 | 5 => entry::SIZE,
            3 if large && !self.features.has(Feature::Pdpe1gb) => entry::SIZE,
            3 if large => 0x3fff_e000,
            2 if large => 0x1f_e000,
            _ => 0,
        }
    }

    fn descend_legacy(&mut self, lin: u64, read: Reader) -> Result<(Path, Leaf), Miss> {
        let mut path = Path::default();
        let gpa = (self.state.cr3 & 0xffff_f000) + ((lin >> 22) & 1023) * 4;
        let pde = read(self, gpa, false).map_err(Miss::Abort)?;
        if pde & entry::PRESENT == 0 {
            return Err(Miss::Fault(0));
        }
        path.push(gpa, pde);
        if pde & entry::SIZE != 0 && self.state.cr4 & cr4::PSE != 0 {
            // PSE-36: bits 20:13 hold address bits 39:32, as far as there are that many; the rest is reserved.
            let high = self.features.physical_bits().clamp(32, 40) - 32;
            if pde & (0x3f_e000 & !(((1 << high) - 1) << 13)) != 0 {
                return Err(Miss::Fault(code::PRESENT | code::RESERVED));
            }
            let page = (pde & 0xffc0_0000) | ((pde >> 13) & 0xff) << 32 | (lin & 0x3f_f000);
            return Ok((path, self.make_leaf(page, pde, pde, 0, 2, 0)));
        }
        let gpa = (pde & 0xffff_f000) + ((lin >> 12) & 1023) * 4;
        let pte = read(self, gpa, false).map_err(Miss::Abort)?;
        if pte & entry::PRESENT == 0 {
            return Err(Miss::Fault(0));
        }
        path.push(gpa, pte);
        Ok((path, self.make_leaf(pte & 0xffff_f000, pte, pde & pte, 0, 1, 0)))
    }

    fn make_leaf(&self, page: u64, last: u64, granted: u64, denied: u64, level: u32, key: u64) -> Leaf {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        Leaf(
            page | bit(granted & entry::USER != 0, Leaf::USER)
                | bit(granted & entry::WRITE != 0, Leaf::WRITE)
                | bit(denied & entry::NO_EXECUTE != 0, Leaf::NO_EXECUTE)
                | bit(last & entry::DIRTY != 0, Leaf::DIRTY)
                | bit(last & entry::GLOBAL != 0 && self.state.cr4 & cr4::PGE != 0, Leaf::GLOBAL)
                | bit(level > 1, Leaf::LARGE)
                | bit(level > 2, Leaf::HUGE)
                | bit(Caching::of(self).uncached(pat_index(last, level)), Leaf::UNCACHED)
                | key << Leaf::KEY_SHIFT,
        )
    }

    /// Sets the accessed flags of the entries of `path`, and the dirty flag of the last one if `dirty`. False if
    /// an entry is no longer what the walk read.
    fn set_flags(&mut self, path: &Path, dirty: bool) -> Result<bool, Abort> {
        let wide = self.paging_format() != Format::Legacy;
        let entries = path.entries.iter().take(path.length);
        for (i, &(gpa, value)) in entries.enumerate() {
            let last = i + 1 == path.length;
            let wanted = value | entry::ACCESSED | if last && dirty { entry::DIRTY } else { 0 };
            if wanted != value && !self.exchange_entry(gpa, value, wanted, wide)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads an entry for a walk. Tables that no memory backs cannot be walked: nobody answers for a device here, as
    /// with EPT, where KVM gives up on such an access.
    fn read_entry(&mut self, gpa: u64, wide: bool) -> Result<u64, Abort> {
        let entry = self.peek_entry(gpa, wide);
        self.present(entry)?.ok_or_else(|| self.exit(Exit::FetchFailed { gpa }))
    }
}

/// Which entry of IA32_PAT an entry that maps a page at `level` selects (SDM vol. 3A, table 12-11).
fn pat_index(entry: u64, level: u32) -> u64 {
    let pat = if level > 1 { entry::PAT_LARGE } else { entry::PAT };
    u64::from(entry & entry::PWT != 0)
        | u64::from(entry & entry::PCD != 0) << 1
        | u64::from(entry & pat != 0) << 2
}
