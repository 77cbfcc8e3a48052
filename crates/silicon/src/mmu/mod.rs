//! Address translation and memory access.
//!
//! Every access takes the same way: effective address → linear address → software TLB → host pointer, or the
//! slow path (page walk, code page, dirty logging, MMIO, access that crosses a page).
//!
//! # What instruction handlers use ([`access`])
//! - [`Cpu::load`], [`Cpu::store`]: one word.
//! - [`Cpu::update`]: read, change, write back one word without LOCK, with write rights from the start.
//! - [`Cpu::locked`], [`Cpu::locked_pointer`], [`Cpu::locked_compare_exchange_16`]: LOCK ([`lock`]).
//! - [`Cpu::read_bytes`], [`Cpu::write_bytes`], [`Cpu::host_pointer`]: larger operands.
//! - [`Cpu::chunk`]: REP strings, as much of a page as there is.
//! - [`Cpu::system_load`], [`Cpu::system_store`]: the processor's own accesses to its tables.
//!
//! Host memory may be absent ([`host`]); an access then leaves guest mode.
//!
//! # Who calls what when state changes
//! | change | call |
//! |---|---|
//! | CPL, RFLAGS.AC, CR0.AM | [`Cpu::mode_changed`] (a few instructions; [`Cpu::refresh_mode`] includes it) |
//! | MOV CR3, task switch | [`Cpu::load_pdptrs`] first if PAE paging is on; then set CR3 and [`Cpu::cr3_loaded`] |
//! | CR0, CR4, EFER, IA32_PAT | [`Cpu::load_pdptrs`] first if PAE paging is on after it; then [`Cpu::paging_changed`] |
//! | INVLPG | [`Cpu::flush_page`] |
//! | INVPCID type 0, 1, 2, 3 | [`Cpu::flush_page_in`], [`Cpu::flush_context`], `flush_all(false)`, `flush_all(true)` |
//! | PKRU (WRPKRU, XRSTOR) | [`Cpu::pkru_changed`] |
//! | DR0 to DR3, DR7 | [`Cpu::debug_changed`] |
//!
//! All of these may be called when nothing changed. State that is set from outside guest mode needs none of
//! them: [`Cpu::run`] compares.

use std::sync::Arc;

use crate::cpu::{Cpu, Requests};
use crate::flags::Rflags;
use crate::model::Feature;
use crate::state::{cr0, cr4, efer};

use self::coherence::Link;
use self::ept::{Backing, Ept, Map, SMM_SPACE};
use self::tlb::{Class, Tlb};

pub mod access;
mod coherence;
pub mod ept;
pub mod host;
mod lock;
pub(crate) mod page_set;
mod presence;
mod slow;
pub(crate) mod tlb;
mod ve;
mod walk;
mod word;
mod world;

pub use self::word::Word;

/// Translation state of one CPU.
#[derive(Debug)]
pub struct Mmu {
    /// The linear address of the last page walk.
    walking: u64,
    pub(crate) tlb: Tlb,
    /// The map of guest-physical memory that this CPU uses, its generation, and the region last used.
    map: Arc<Map>,
    generation: u64,
    last: usize,
    /// The registers that cached translations were made under.
    under: Registers,
    /// DR6 bits of data breakpoints hit.
    debug_hits: u64,
    /// In guest mode.
    inside: bool,
    /// The locked access under way is the processor's own ([`Cpu::system_locked`]).
    implicit: bool,
    link: Link,
}

/// What memory types depend on besides the paging structures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caching {
    /// Everything is write-back ([`Controls::ignore_pat`](crate::vmx::Controls::ignore_pat)).
    WriteBack,
    /// Nothing is (CR0.CD).
    Off,
    /// IA32_PAT says what is.
    Pat(u64),
}

impl Default for Caching {
    fn default() -> Caching {
        Caching::Pat(0)
    }
}

impl Caching {
    fn of(cpu: &Cpu) -> Caching {
        match () {
            () if cpu.controls.ignore_pat => Caching::WriteBack,
            () if cpu.state.cr0 & cr0::CD != 0 => Caching::Off,
            () => Caching::Pat(cpu.state.pat),
        }
    }

    /// Whether memory whose entry selects `index` of IA32_PAT is not write-back.
    fn uncached(self, index: u64) -> bool {
        const WRITE_BACK: u8 = 6;
        match self {
            Caching::WriteBack => false,
            Caching::Off => true,
            Caching::Pat(pat) => pat.to_le_bytes()[index as usize & 7] != WRITE_BACK,
        }
    }
}

/// What cached translations depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Registers {
    /// What address spaces as a whole depend on, down to the CPU's MAXPHYADDR, 1 GiB pages, memory types and SMM.
    layout: (u64, u64, u64, u8, bool, Caching, bool),
    /// What only rights depend on.
    rights: (u64, u64),
    cr3: u64,
    pdptr: [u64; 4],
    pkru: u32,
    debug: [u64; 5],
}

impl Registers {
    const CR4_LAYOUT: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::LA57 | cr4::PCIDE | cr4::SMEP;

    fn of(cpu: &Cpu) -> Registers {
        let state = &cpu.state;
        let [dr0, dr1, dr2, dr3] = state.dr;
        Registers {
            layout: (
                state.cr0 & cr0::PG,
                state.cr4 & Registers::CR4_LAYOUT,
                state.efer & (efer::LMA | efer::NXE),
                cpu.features.physical_bits(),
                cpu.features.has(Feature::Pdpe1gb),
                Caching::of(cpu),
                state.smm,
            ),
            rights: (state.cr0 & cr0::WP, state.cr4 & (cr4::SMAP | cr4::PKE)),
            cr3: state.cr3,
            pdptr: state.pdptr,
            pkru: state.pkru,
            debug: [dr0, dr1, dr2, dr3, state.dr7 & !0xff00],
        }
    }
}

impl Mmu {
    /// For a CPU that joins the VM whose memory is `ept`.
    pub(crate) fn new(ept: &Arc<Ept>, requests: &Arc<Requests>) -> Mmu {
        Mmu {
            walking: 0,
            tlb: Tlb::default(),
            map: ept.map(),
            generation: ept.generation(),
            last: 0,
            under: Registers::default(),
            debug_hits: 0,
            inside: false,
            implicit: false,
            link: Link::new(ept.clone(), requests.clone()),
        }
    }

    /// A number that stands for the current linear-to-physical mapping of code in `lin`'s half of the address
    /// space: as long as it is the same, so are the translations. Going back to an address space of which
    /// nothing was flushed brings its number back.
    #[inline(always)]
    pub fn address_space(&self, lin: u64) -> u64 {
        self.tlb.code_space(lin)
    }

    /// DR6 bits of the data breakpoints that the last instruction hit; forgets them.
    #[inline(always)]
    pub(crate) fn take_debug_hits(&mut self) -> u64 {
        std::mem::take(&mut self.debug_hits)
    }
}

impl Cpu {
    /// CPL, RFLAGS.AC, CR0.AM or CR4.SMAP may have changed.
    #[inline]
    pub fn mode_changed(&mut self) {
        let state = &self.state;
        let ac = state.flag(Rflags::AC);
        let class = match state.cpl {
            3 if ac && state.cr0 & cr0::AM != 0 => Class::Checked,
            3 => Class::User,
            _ if ac && state.cr4 & cr4::SMAP != 0 => Class::Override,
            _ => Class::Supervisor,
        };
        self.mmu.tlb.set_class(class);
    }

    /// CR3 has been written. `preserve`: its bit 63 said to keep the translations of the new PCID.
    pub fn cr3_loaded(&mut self, preserve: bool) {
        self.mmu.under.cr3 = self.state.cr3;
        self.mmu.under.pdptr = self.state.pdptr;
        let pcid = self.pcid();
        self.mmu.tlb.switch(pcid);
        if !preserve {
            self.mmu.tlb.flush_context(pcid);
        }
    }

    /// CR0, CR4 or EFER has been written: forgets what the change makes invalid (SDM vol. 3A, 5.10.4.1).
    pub fn paging_changed(&mut self) {
        let (now, under) = (Registers::of(self), self.mmu.under);
        if now.layout != under.layout {
            self.flush_all(false);
        } else if now.rights != under.rights {
            self.mmu.tlb.clear_first_level();
        }
        self.mmu.under = Registers { layout: now.layout, rights: now.rights, ..under };
        self.mmu.tlb.switch(self.pcid());
        self.mode_changed();
    }

    /// Forgets the translation of `lin` in the current address space, and a global one (INVLPG).
    pub fn flush_page(&mut self, lin: u64) {
        self.mmu.tlb.flush_page(lin);
    }

    /// Forgets the translation of `lin` in the address space of `pcid`, a global one excepted (INVPCID type 0).
    pub fn flush_page_in(&mut self, pcid: u16, lin: u64) {
        self.mmu.tlb.flush_page_in(pcid, lin);
    }

    /// Forgets the translations of `pcid`, global ones excepted (INVPCID type 1).
    pub fn flush_context(&mut self, pcid: u16) {
        self.mmu.tlb.flush_context(pcid);
    }

    /// Forgets the translations of all PCIDs, and the global ones too unless `keep_global` (INVPCID types 3
    /// and 2).
    pub fn flush_all(&mut self, keep_global: bool) {
        self.mmu.tlb.flush_all(keep_global);
    }

    /// PKRU has been written.
    #[inline]
    pub fn pkru_changed(&mut self) {
        let changed = std::mem::replace(&mut self.mmu.under.pkru, self.state.pkru) ^ self.state.pkru;
        if changed != 0 && self.keys_in_force() {
            let keys = self.mmu.tlb.keys();
            let matters = (0..16).any(|key| (changed >> (2 * key)) & 3 != 0 && keys & (1 << key) != 0);
            if matters {
                self.mmu.tlb.clear_first_level();
            }
        }
    }

    /// DR0 to DR3 or DR7 has been written. Pages with data breakpoints are not cached in the first level.
    pub fn debug_changed(&mut self) {
        let debug = Registers::of(self).debug;
        if std::mem::replace(&mut self.mmu.under.debug, debug) != debug {
            self.mmu.tlb.clear_first_level();
        }
    }

    /// Makes the cached translations fit registers that may have been set without telling.
    fn sync_registers(&mut self) {
        let (now, under) = (Registers::of(self), self.mmu.under);
        self.debug_changed();
        self.pkru_changed();
        self.paging_changed();
        if (now.cr3, now.pdptr) != (under.cr3, under.pdptr) {
            self.cr3_loaded(false);
        }
    }

    fn pcid(&self) -> u16 {
        if self.state.cr4 & cr4::PCIDE != 0 { self.state.cr3 as u16 & 0xfff } else { 0 }
    }

    /// What the address of an access has above what translation gives: [`SMM_SPACE`] in system management mode.
    #[inline]
    pub(crate) fn space(&self) -> u64 {
        if self.state.smm { SMM_SPACE } else { 0 }
    }

    /// The region that holds `gpa`, which has its [`Cpu::space`].
    #[inline]
    fn backing(&mut self, gpa: u64) -> Option<&Backing> {
        let mmu = &mut self.mmu;
        let generation = self.ept.generation();
        if mmu.generation != generation {
            mmu.generation = generation;
            mmu.map = self.ept.map();
            mmu.tlb.flush_all(false);
        }
        if !mmu.map.get(mmu.last).is_some_and(|b| b.holds(gpa)) {
            mmu.last = mmu.map.position(gpa)?;
        }
        mmu.map.get(mmu.last)
    }
}

#[cfg(test)]
mod tests;
