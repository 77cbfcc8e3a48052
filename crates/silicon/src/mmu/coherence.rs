//! What one CPU does that others must see: entering and leaving guest mode, exclusive sections, mail, and the
//! coherence of decoded code with stores (SDM vol. 3A, 9.1.3 and 13.6).
//!
//! Two words per page say which CPUs hold decoded code of it and which may store to it without looking. A CPU
//! that wants to store sets its bit in the one and then looks at the other; a CPU that decodes does it the other
//! way round. So at least one of them notices:
//! - The storing CPU finds code: it gets no permission, and each of its stores tells the CPUs with code.
//! - The decoding CPU finds writers: its blocks of the page are compared with memory at each use until all
//!   writers have given up their permissions, which they are asked to do by mail. Nobody ever waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::cpu::{Cpu, Requests};
use crate::exception::Abort;
use crate::mmu::ept::Ept;
use crate::mmu::tlb::{PAGE_MASK, PAGE_SHIFT};
use crate::mmu::world::{Mail, Member};

/// The bit that all CPUs from number 63 on share. It is never cleared, because others may need it.
const SHARED: u32 = 63;

/// Entries of the page-modification log at which it counts as full. The hardware's has 512 and cannot grow; here an
/// instruction may go on for some pages before it comes to its end.
const PAGE_LOG_ENTRIES: usize = 256;

/// A CPU's membership in its VM.
#[derive(Debug)]
pub(crate) struct Link {
    ept: Arc<Ept>,
    number: usize,
    member: Arc<Member>,
}

impl Link {
    pub(crate) fn new(ept: Arc<Ept>, requests: Arc<Requests>) -> Link {
        let (number, member) = ept.world.join(requests);
        Link { ept, number, member }
    }

    /// This CPU's bit in page masks.
    fn bit(&self) -> u64 {
        1 << bit_of(self.number)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.ept.world.part(self.number);
    }
}

fn bit_of(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(SHARED).min(SHARED)
}

/// Clears a CPU's bit if it is its own.
fn clear(mask: &AtomicU64, bit: u64) {
    if bit != 1 << SHARED {
        mask.fetch_and(!bit, Ordering::SeqCst);
    }
}

impl Link {
    /// Sends `mail` to the other CPUs whose bits are set in `mask`, and clears the bits of CPUs that are gone.
    /// False if nobody was left to tell.
    fn tell(&self, mask: &AtomicU64, mail: Mail) -> bool {
        let mut told = false;
        let set = mask.load(Ordering::SeqCst);
        for number in (0..64u32).filter(|n| set & (1 << n) != 0) {
            let wanted = |other: usize| other != self.number && bit_of(other) == number;
            if self.ept.world.send_where(wanted, mail) != 0 {
                told = true;
            } else if number != bit_of(self.number) {
                clear(mask, 1 << number);
            }
        }
        told
    }
}

impl Cpu {
    /// Enters guest mode; waits while the world is stopped.
    pub(crate) fn mmu_enter(&mut self) {
        self.ept.world.enter();
        self.mmu.inside = true;
        // A request to stop that has come since stays for the first block boundary.
        let requests = self.requests.take(Requests::FLUSH | Requests::MAIL);
        self.mmu_requests(requests);
        self.sync_registers();
    }

    /// Leaves guest mode.
    pub(crate) fn mmu_leave(&mut self) {
        self.mmu.inside = false;
        self.ept.world.leave();
    }

    /// Serves the requests that concern translation: [`Requests::FLUSH`], [`Requests::MAIL`] and
    /// [`Requests::EXCLUSIVE`]. The CPU is between blocks.
    pub(crate) fn mmu_requests(&mut self, bits: u32) {
        let mut bits = bits;
        if bits & Requests::EXCLUSIVE != 0 && self.mmu.inside {
            self.ept.world.step_aside();
            // Whoever stopped the world may have left orders.
            bits |= self.requests.take(Requests::FLUSH | Requests::MAIL);
        }
        if bits & Requests::FLUSH != 0 {
            self.forget_everything();
        }
        if bits & Requests::MAIL != 0 {
            for mail in self.mmu.link.member.take_mail() {
                self.read_mail(mail);
            }
        }
    }

    /// Runs `work` while all other CPUs of the VM stand still between blocks. If another CPU is first, the
    /// instruction is given up for another attempt.
    pub(crate) fn exclusive<R>(
        &mut self,
        work: impl FnOnce(&mut Cpu) -> Result<R, Abort>,
    ) -> Result<R, Abort> {
        let ept = self.ept.clone();
        if !self.mmu.inside {
            return ept.world.stop(|_| work(self));
        }
        match ept.world.stop_from_inside(|_| work(&mut *self)) {
            Some(result) => result,
            None => {
                // Let the other pass here and now: the next boundary may lie beyond this instruction, if it is
                // being replayed. Nothing of the instruction has been done, and no pointer is held.
                let bits = self.requests.take(Requests::FLUSH | Requests::MAIL | Requests::EXCLUSIVE);
                self.mmu_requests(bits | Requests::EXCLUSIVE);
                Err(self.retry())
            }
        }
    }

    fn read_mail(&mut self, mail: Mail) {
        match mail {
            Mail::Flush => self.forget_everything(),
            Mail::DropWrites => self.mmu.tlb.drop_writes(),
            Mail::DropWritesTo { gfn, asker } => {
                self.mmu.tlb.drop_writes_to(gfn);
                let own = self.mmu.link.bit();
                if let Some(writers) = self.page_masks(gfn).map(|(_, writers)| writers) {
                    clear(writers, own);
                }
                self.ept.world.send_where(|number| number == asker, Mail::WritesDropped { gfn });
            }
            Mail::WritesDropped { gfn } => self.settle(gfn),
            Mail::Written { gfn, from, to } => self.drop_code(gfn, from, to),
            Mail::AllWritten => self.code.clear(),
            Mail::CompareCode => self.code.new_epoch(),
        }
    }

    fn forget_everything(&mut self) {
        self.code.clear();
        self.mmu.tlb.flush_all(false);
        self.mmu.tlb.clear_first_level();
    }

    /// The words of page `gfn`: CPUs with decoded code, and CPUs that may store.
    fn page_masks(&mut self, gfn: u64) -> Option<(&AtomicU64, &AtomicU64)> {
        let gpa = gfn << PAGE_SHIFT;
        let backing = self.backing(gpa)?;
        let page = backing.page(gpa);
        backing.pages.code(page).zip(backing.pages.writers(page))
    }

    /// Decoded code of page `gfn` is cached now: stores to it must be noticed.
    pub(crate) fn mark_code_page(&mut self, gfn: u64) {
        let own = self.mmu.link.bit();
        let Some((code, writers)) = self.page_masks(gfn) else { return };
        code.fetch_or(own, Ordering::SeqCst);
        if writers.load(Ordering::SeqCst) == 0 {
            return self.settle(gfn);
        }
        clear(writers, own);
        self.mmu.tlb.drop_writes_to(gfn);
        let backing = self.mmu.map.get(self.mmu.last);
        let page = backing.map(|b| b.page(gfn << PAGE_SHIFT));
        if let Some(writers) = backing.zip(page).and_then(|(b, page)| b.pages.writers(page)) {
            self.mmu.link.tell(writers, Mail::DropWritesTo { gfn, asker: self.mmu.link.number });
        }
        self.settle(gfn);
    }

    /// The blocks of page `gfn` must be compared at each use as long as another CPU may store to it.
    fn settle(&mut self, gfn: u64) {
        let Some((_, writers)) = self.page_masks(gfn) else { return };
        let unstable = writers.load(Ordering::SeqCst) != 0;
        self.code.set_unstable(gfn, unstable);
    }

    /// Whether this CPU may store to `gpa`'s page, which memory backs, without looking at it again until it
    /// reads its mail.
    pub(crate) fn claim_writes(&mut self, gpa: u64) -> bool {
        let own = self.mmu.link.bit();
        let Some((code, writers)) = self.page_masks(gpa >> PAGE_SHIFT) else { return false };
        if code.load(Ordering::Relaxed) != 0 {
            return false;
        }
        if writers.load(Ordering::Relaxed) & own == 0 {
            writers.fetch_or(own, Ordering::SeqCst);
            if code.load(Ordering::SeqCst) != 0 {
                clear(writers, own);
                return false;
            }
        }
        true
    }

    /// `gpa`'s page has just been marked in the dirty log: it goes to the page-modification log, which asks for an exit
    /// when it is full (SDM vol. 3C, "Page-Modification Logging").
    #[cold]
    pub(crate) fn log_modified(&mut self, gpa: u64) {
        if !self.controls.page_modification_logging {
            return;
        }
        self.modified_pages.push(gpa & !PAGE_MASK);
        if self.page_log_full() {
            self.requests.post(Requests::KICK);
        }
    }

    /// Whether [`Cpu::modified_pages`] wants to be emptied.
    pub(crate) fn page_log_full(&self) -> bool {
        self.modified_pages.len() >= PAGE_LOG_ENTRIES
    }

    /// Whether what [`Cpu::claim_writes`] gave for `gpa`'s page is still good, and the page is in the dirty log.
    pub(crate) fn holds_writes(&mut self, gpa: u64) -> bool {
        let own = self.mmu.link.bit();
        let Some(backing) = self.backing(gpa) else { return false };
        let page = backing.page(gpa);
        let set = |mask: Option<&AtomicU64>| mask.map_or(0, |mask| mask.load(Ordering::Relaxed));
        set(backing.pages.writers(page)) & own != 0
            && set(backing.pages.code(page)) == 0
            && backing.dirty.as_ref().is_none_or(|log| log.holds(page))
    }

    /// Tells all CPUs with decoded code that `len` bytes at `gpa`, within one page, have just been written
    /// without permission from [`Cpu::claim_writes`].
    pub(crate) fn code_written(&mut self, gpa: u64, len: usize) {
        // The store comes before the look, as for whoever decodes the mark comes before the look.
        fence(Ordering::SeqCst);
        let gfn = gpa >> PAGE_SHIFT;
        let from = (gpa & PAGE_MASK) as usize;
        let to = from + len;
        let own = self.mmu.link.bit();
        let Some((code, _)) = self.page_masks(gfn) else { return };
        let holders = code.load(Ordering::SeqCst);
        if holders & !own != 0 || own == 1 << SHARED {
            let backing = self.mmu.map.get(self.mmu.last);
            if let Some(code) = backing.and_then(|b| b.pages.code(b.page(gpa))) {
                self.mmu.link.tell(code, Mail::Written { gfn, from, to });
            }
        }
        if holders & own != 0 {
            self.drop_code(gfn, from, to);
        }
    }

    /// Drops own blocks of page `gfn` that hold bytes `from..to`, and the mark when none is left.
    fn drop_code(&mut self, gfn: u64, from: usize, to: usize) {
        self.counters.blocks_invalidated += self.code.written(gfn, from, to) as u64;
        if !self.code.holds(gfn) {
            let own = self.mmu.link.bit();
            if let Some((code, _)) = self.page_masks(gfn) {
                clear(code, own);
            }
        }
    }
}
