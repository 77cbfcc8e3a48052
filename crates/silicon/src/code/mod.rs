//! Decoded code: blocks keyed by guest-physical page, offset and mode, per CPU.
//!
//! A block stays valid as long as the bytes that it was decoded from do not change. Guest stores to a page that
//! holds decoded code take the MMU's slow path and call [`Cpu::code_written`]. Writes that nobody tells us of
//! (devices, other threads, the host kernel) become visible at an *epoch* change (an entry to guest mode after the hypervisor's client had
//! its turn, an interrupt) and at a new executable mapping. The first use of a page's blocks after that compares the page
//! with a copy.
#![expect(unsafe_code, reason = "blocks are referenced by raw pointer while they run; see `BlockRef`")]

mod block;
pub(crate) mod lower;
pub(crate) mod op;
pub(crate) mod thread;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Encoder, FlowControl, Instruction};

use crate::code::block::Block;
pub(crate) use crate::code::block::BlockRef;
use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Op};
use crate::cpu::{Cpu, Pending};
use crate::exception::{Abort, Exception};
use crate::exec::fpu;
use crate::mmu::access::ExecPage;
use crate::mmu::host;
use crate::state::{CodeSize, reg};

/// Instructions in a block at most.
pub(crate) const BLOCK_MAX: usize = 48;
/// Operations in all blocks of a CPU at most; past that the cache is emptied (about 30 MiB).
const CACHE_OPS_MAX: usize = 400_000;
/// Entries of the jump cache.
const JUMP_ENTRIES: usize = 1 << 14;
/// Bytes in a page.
const PAGE: u64 = 4096;
/// Bytes in an instruction at most.
pub(crate) const INSTRUCTION_LONGEST: usize = 15;

/// Entry of the jump cache.
#[derive(Clone, Copy)]
pub(crate) struct JumpEntry {
    pub(crate) lin: u64,
    pub(crate) context: u64,
    /// [`CodeCache::generation`] when the entry was made: the block has not been dropped as long as it is the same.
    pub(crate) generation: u64,
    pub(crate) block: Option<BlockRef>,
}

#[derive(Default)]
struct CodePage {
    /// What the page holds, the epoch in which that was last compared, and where the page is in host memory.
    copy: Option<Box<PageBytes>>,
    checked: u64,
    host: u64,
    /// Key: page offset | code size << 12 | single << 14.
    blocks: HashMap<u16, Box<Block>, BuildMixer>,
    /// Blocks of other pages that reach into this one: their pages and keys. They may have been dropped since.
    reaching: Vec<(u64, u16)>,
    /// Other CPUs may still write this page without telling: compare at each use.
    unstable: bool,
    /// The 64-byte lines, bit per line, that bytes of blocks lie in; perhaps more.
    lines: u64,
    /// Stores to other lines since blocks were last decoded here, or since `purges` last changed.
    misses: u32,
    /// How often all blocks were dropped because of such stores.
    purges: u32,
}

/// All bytes of a page.
type PageBytes = [u8; PAGE as usize];

/// Stores beside the code of a page before its blocks are dropped to make such stores fast; twice as many after
/// each time.
const PATIENCE: u32 = 64;

/// The 64-byte lines of a page, bit per line, that bytes `from..to` lie in; bytes past the page do not count.
fn lines(from: usize, to: usize) -> u64 {
    let last = to.saturating_sub(1).min(PAGE as usize - 1) / 64;
    (u64::MAX << ((from / 64) & 63)) & (u64::MAX >> (63 - last))
}

/// Slot of the jump cache.
#[inline(always)]
fn jump_index(lin: u64) -> usize {
    (lin ^ (lin >> 15)) as usize & (JUMP_ENTRIES - 1)
}

/// Multiplicative hasher for small integer keys.
#[derive(Clone, Default)]
pub(crate) struct Mixer(u64);
type BuildMixer = std::hash::BuildHasherDefault<Mixer>;

impl std::hash::Hasher for Mixer {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u16(&mut self, value: u16) {
        self.write_u64(u64::from(value));
    }
    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// All decoded code of one CPU.
pub(crate) struct CodeCache {
    pages: HashMap<u64, CodePage, BuildMixer>,
    pub(crate) jump: Box<[JumpEntry; JUMP_ENTRIES]>,
    pub(crate) epoch: u64,
    /// Counts what makes entries of the jump cache void: blocks dropped, pages become unstable.
    pub(crate) generation: u64,
    ops: usize,
    #[expect(clippy::vec_box, reason = "a block that is running is pointed to, so it must not move")]
    graveyard: Vec<Box<Block>>,
}

// SAFETY: the raw pointers lead into boxes that the cache itself owns; a CPU is used by one thread at a time.
unsafe impl Send for CodeCache {}

impl CodeCache {
    pub(crate) fn new() -> CodeCache {
        let empty = JumpEntry { lin: 0, context: 0, generation: 0, block: None };
        CodeCache {
            pages: HashMap::default(),
            // Made on the heap: too large to pass over the stack.
            jump: vec![empty; JUMP_ENTRIES].into_boxed_slice().try_into().unwrap_or_else(|_| unreachable!()),
            epoch: 1,
            generation: 1,
            ops: 0,
            graveyard: Vec::new(),
        }
    }

    /// Memory may have changed behind our back: compare each block's bytes at its next use.
    #[inline]
    pub(crate) fn new_epoch(&mut self) {
        self.epoch += 1;
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        for (_, page) in self.pages.drain() {
            for (_, block) in page.blocks {
                retire(&mut self.graveyard, block);
            }
        }
        self.ops = 0;
        self.generation += 1;
    }

    /// Frees dropped blocks. No [`BlockRef`] may be held.
    fn reclaim(&mut self) {
        if !self.graveyard.is_empty() {
            self.graveyard.clear();
        }
    }

    /// Whether any code of page `gfn` is decoded here.
    pub(crate) fn holds(&self, gfn: u64) -> bool {
        self.pages.get(&gfn).is_some_and(|page| !page.blocks.is_empty() || !page.reaching.is_empty())
    }

    /// Other CPUs hold write mappings of `gfn`: its blocks are compared at each use until this is taken back.
    pub(crate) fn set_unstable(&mut self, gfn: u64, unstable: bool) {
        if let Some(page) = self.pages.get_mut(&gfn)
            && page.unstable != unstable
        {
            page.unstable = unstable;
            // Host code looks at its bytes less often than at each use. (It may be translated anew when the page is stable.)
            self.blocks_in(gfn).for_each(Block::forget_translation);
            self.generation += 1;
            // What was compared while the page was unstable may have changed since.
            self.epoch += 1;
        }
    }

    /// The page may have been written unseen: compare its blocks at their next use through a new mapping.
    pub(crate) fn revalidate(&mut self, gfn: u64) {
        self.blocks_in(gfn).for_each(|block| block.checked.set(0));
        if let Some(page) = self.pages.get_mut(&gfn) {
            page.checked = 0;
        }
    }

    /// Page `gfn`, at `host`, has been found to hold `bytes`: drops what was decoded from other bytes or another place.
    fn page_holds(&mut self, gfn: u64, host: u64, bytes: &PageBytes) -> usize {
        let epoch = self.epoch;
        let Some(page) = self.pages.get_mut(&gfn) else { return 0 };
        page.checked = epoch;
        if page.host == host && page.copy.as_deref() == Some(bytes) {
            return 0;
        }
        page.host = host;
        page.copy = Some(Box::new(*bytes));
        let is_stale = |block: &Block| {
            let offset = block.offset();
            block.host != host + offset as u64 || !bytes[offset..].starts_with(block.parts().0)
        };
        let stale: Vec<Range<usize>> =
            page.blocks.values().filter(|block| is_stale(block)).map(|block| block.range()).collect();
        let reaching = page.reaching.clone();
        let mut dropped = stale.into_iter().map(|range| self.drop_bytes(gfn, range.start, range.end)).sum();
        for (other, key) in reaching {
            let block = self.pages.get(&other).and_then(|page| page.blocks.get(&key));
            let is_stale = |block: &Block| {
                block.next.is_some_and(|next| next.host != host || !bytes.starts_with(block.parts().1))
            };
            let Some(block) = block.filter(|block| is_stale(block)) else { continue };
            let offset = block.offset();
            dropped += self.drop_bytes(other, offset, offset + 1);
        }
        dropped
    }

    /// Bytes `from..to` of page `gfn` have been written, and told of.
    fn note_bytes(&mut self, gfn: u64, from: usize, to: usize) {
        let Some(page) = self.pages.get_mut(&gfn) else { return };
        let to = to.min(PAGE as usize);
        if let Some(copy) = &mut page.copy {
            let host = page.host + from as u64;
            // SAFETY: the page was there when it was compared last, and is guest memory.
            if unsafe { host::copy(host as *const u8, copy[from..to].as_mut_ptr(), to - from) }.is_err() {
                page.copy = None;
            }
        }
    }

    /// The blocks that lie in page `gfn` or reach into it.
    fn blocks_in(&self, gfn: u64) -> impl Iterator<Item = &Block> {
        let page = self.pages.get(&gfn);
        let own = page.into_iter().flat_map(|page| page.blocks.values());
        let reaching = page.into_iter().flat_map(|page| &page.reaching);
        let reaching = reaching.filter_map(|(gfn, key)| self.pages.get(gfn)?.blocks.get(key));
        own.chain(reaching).map(|block| &**block)
    }

    /// Drops the blocks of `gfn` that bytes `from..to` of the page belong to; the number dropped.
    pub(crate) fn written(&mut self, gfn: u64, from: usize, to: usize) -> usize {
        self.note_bytes(gfn, from, to);
        let Some(page) = self.pages.get_mut(&gfn) else { return 0 };
        let reaching =
            if from < INSTRUCTION_LONGEST { std::mem::take(&mut page.reaching) } else { Vec::new() };
        if !reaching.is_empty() {
            let other = self.written(gfn, from, to);
            let dropped = reaching.into_iter().map(|(gfn, key)| {
                let offset = usize::from(key & 0xfff);
                self.drop_bytes(gfn, offset, offset + 1)
            });
            return other + dropped.sum::<usize>();
        }
        let (mut from, mut to) = (from, to);
        if page.lines & lines(from, to) == 0 {
            page.misses += 1;
            if page.misses < PATIENCE << page.purges.min(16) {
                return 0;
            }
            // The page may have become data, its code never to run again. If not, it is decoded anew.
            (page.misses, page.purges) = (0, page.purges.saturating_add(1));
            (from, to) = (0, PAGE as usize);
        }
        self.drop_bytes(gfn, from, to)
    }

    /// The block for `key` in page `gfn`, and whether it has to be compared at each use.
    fn find(&self, gfn: u64, key: u16) -> Option<(BlockRef, bool)> {
        let page = self.pages.get(&gfn)?;
        let block = page.blocks.get(&key)?;
        let next = block.next.and_then(|next| self.pages.get(&next.gfn));
        let unstable = page.unstable || next.is_some_and(|next| next.unstable);
        Some((BlockRef::to(block), unstable))
    }

    /// Drops the blocks of `gfn` that bytes `from..to` belong to, and host code that depends on them; the number of blocks.
    fn drop_bytes(&mut self, gfn: u64, from: usize, to: usize) -> usize {
        let Some(page) = self.pages.get_mut(&gfn) else { return 0 };
        let mut changed = false;
        let stale = page.blocks.extract_if(|_, block| {
            if !block.depends_on(from, to) {
                return false;
            }
            changed = true;
            block.forget_translation();
            // Without host code it depends on its own bytes alone.
            block.depends_on(from, to)
        });
        let stale: Vec<(u16, Box<Block>)> = stale.collect();
        let dropped = stale.len();
        for (_, block) in stale {
            self.ops -= block.ops.len();
            retire(&mut self.graveyard, block);
        }
        if page.blocks.is_empty() {
            page.lines = 0;
        }
        if changed {
            self.generation += 1;
        }
        dropped
    }

    /// Host code goes from each of these blocks, of one page, to the others without asking.
    pub(crate) fn join(blocks: impl Iterator<Item = BlockRef> + Clone) {
        let pieces: Rc<[Range<usize>]> = blocks.clone().map(|block| block.block().range()).collect();
        for block in blocks {
            let block = block.block();
            block.others.replace(Some(pieces.clone()));
            block.joined.set(block.joined.get().saturating_add(1));
        }
    }
}

/// Makes a dropped block stop at its next instruction if it is running, and keeps it until `reclaim`.
#[expect(clippy::vec_box, reason = "a block that is running is pointed to, so it must not move")]
fn retire(graveyard: &mut Vec<Box<Block>>, block: Box<Block>) {
    for op in &block.ops {
        op.handler.set(resync);
    }
    graveyard.push(block);
}

/// The block that held this operation was dropped: look the code up again.
pub(crate) fn resync(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    cpu.at(op);
    cpu.state.rip = cpu.ip_of(op);
    // The engine counts this operation as one more, which may be the first of all.
    cpu.counters.instructions = cpu.counters.instructions.wrapping_sub(1);
    Ok(Flow::End)
}

/// The block ended without a control transfer.
fn fall_through(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
    resync(cpu, op)
}

/// #GP(0): instruction longer than 15 bytes.
fn too_long(cpu: &mut Cpu, _: &Op) -> Result<Flow, Abort> {
    Err(cpu.raise(Exception::gp(0)))
}

impl Cpu {
    /// Linear address of the next instruction.
    #[inline(always)]
    pub(crate) fn code_linear(&self) -> u64 {
        match self.state.code_size {
            CodeSize::Bits64 => self.state.rip,
            _ => self.state.rip.wrapping_add(self.state.segs[1].base) & 0xffff_ffff,
        }
    }

    /// The block at RIP; `single` asks for a block of one instruction.
    #[inline(always)]
    pub(crate) fn find_block(&mut self, single: bool) -> Result<BlockRef, Abort> {
        let lin = self.code_linear();
        let single = single || self.near_code_limit();
        self.state.regs[usize::from(reg::IP_BASE)] = self.state.rip.wrapping_sub(lin & (PAGE - 1));
        match self.block_at_hand(lin) {
            Some(block) if !single => Ok(block),
            _ => self.find_block_slow(lin, single),
        }
    }

    /// The block at `lin`, if the jump cache has it.
    #[inline(always)]
    pub(crate) fn block_at_hand(&self, lin: u64) -> Option<BlockRef> {
        let entry = &self.code.jump[jump_index(lin)];
        self.entered(entry, lin).filter(|block| block.checked() == self.code.epoch)
    }

    /// The block at `lin` in 64-bit code, if it has been decoded, after comparing its bytes anew if that has not been done in this epoch.
    /// Whoever asks may be running a block, even one that has been dropped.
    #[inline(always)]
    pub(crate) fn block_to_go_on(&mut self, lin: u64) -> Option<BlockRef> {
        self.block_at_hand(lin).or_else(|| self.decoded_block(lin))
    }

    #[inline(never)]
    fn decoded_block(&mut self, lin: u64) -> Option<BlockRef> {
        let key = (lin & (PAGE - 1)) as u16 | (CodeSize::Bits64 as u16) << 12;
        let found = match self.compared_block(lin) {
            // In this address space nobody has been there yet. (A page that is not at hand is the engine's, as is one that an instruction
            // may reach into: to look for it may have effects that are not to be forgotten.)
            Ok(None) if lin & (PAGE - 1) <= PAGE - INSTRUCTION_LONGEST as u64 => match self.exec_page(lin) {
                Some(page) => self.cached_block(page, key, lin),
                None => Ok(None),
            },
            found => found,
        };
        if found.is_err() {
            // The engine will find out again, where it matters.
            self.pending = Pending::None;
        }
        found.ok().flatten()
    }

    /// The block of an entry of the jump cache, if it is for `lin` and not void; its bytes may have changed.
    #[inline(always)]
    fn entered(&self, entry: &JumpEntry, lin: u64) -> Option<BlockRef> {
        let hit = entry.lin == lin
            && entry.context == self.fetch_context(lin)
            && entry.generation == self.code.generation;
        if hit { entry.block } else { None }
    }

    /// The block at `lin`, if the jump cache has it and its bytes, compared anew, are what they were.
    fn compared_block(&mut self, lin: u64) -> Result<Option<BlockRef>, Abort> {
        let entry = self.code.jump[jump_index(lin)];
        if self.entered(&entry, lin).is_none() {
            return Ok(None);
        }
        let Some(block) = entry.block else { return Ok(None) };
        let crossing = block.block().next.is_some();
        let (page, next) = self.fetch_pages(lin, crossing)?;
        self.compare_page(page)?;
        next.map_or(Ok(()), |next| self.compare_page(next))?;
        let Some(reference) = self.entered(&entry, lin) else { return Ok(None) };
        let block = reference.block();
        if !block.lies_in(page, next) {
            return Ok(None);
        }
        block.checked.set(self.code.epoch);
        Ok(Some(reference))
    }

    /// Identifies the address space and mode that instruction fetches from `lin` use.
    #[inline(always)]
    pub(crate) fn fetch_context(&self, lin: u64) -> u64 {
        let user = u64::from(self.state.cpl == 3);
        (self.mmu.address_space(lin) << 3) | ((self.state.code_size as u64) << 1) | user
    }

    /// Has the page of `lin`, where code runs, be in the TLB and compared: what runs may have been found without either. False: it
    /// cannot be, or blocks have been dropped.
    pub(crate) fn page_at_hand(&mut self, lin: u64) -> bool {
        let generation = self.code.generation;
        let page = self.fetch_page(lin).and_then(|page| self.compare_page(page));
        if page.is_err() {
            // The engine will find out again, where it matters.
            self.pending = Pending::None;
        }
        page.is_ok() && self.code.generation == generation
    }

    /// The block that begins with `first`, an operation at RIP that is about to run, if it need not be compared at each use, and
    /// whether it lies within one page.
    pub(crate) fn block_of(&self, first: &Op) -> Option<(BlockRef, bool)> {
        let block = self.block_in_page_of(first, first.page_offset)?;
        std::ptr::eq(block.first(), first).then(|| (block, block.block().next.is_none()))
    }

    /// The block at `offset` of the page that `first`, an operation at RIP, lies in, likewise; its bytes are what they were.
    pub(crate) fn block_in_page_of(&self, first: &Op, offset: u16) -> Option<BlockRef> {
        let lin = self.ip_of(first);
        let page = self.exec_page(lin)?;
        let key = offset | ((self.state.code_size as u16) << 12);
        let (found, _) = self.code.find(page.gfn, key).filter(|(_, unstable)| !unstable)?;
        let block = found.block();
        let next =
            if block.next.is_some() { self.exec_page((lin & !(PAGE - 1)).wrapping_add(PAGE)) } else { None };
        if !block.lies_in(page, next) {
            return None;
        }
        let current = |page: ExecPage| {
            let known = self.code.pages.get(&page.gfn);
            known.is_some_and(|known| known.checked == self.code.epoch && known.host == page.host)
        };
        if block.checked.get() != self.code.epoch {
            if !current(page) || !next.is_none_or(current) {
                return None;
            }
            block.checked.set(self.code.epoch);
        }
        Some(found)
    }

    /// A block from here might reach beyond the limit of CS: instructions are taken one by one, and each is
    /// checked. (With a limit of 4 GiB, EIP wraps.)
    #[inline(always)]
    fn near_code_limit(&self) -> bool {
        let limit = self.state.segs[1].limit;
        self.state.code_size != CodeSize::Bits64
            && limit != u32::MAX
            && self.state.rip.saturating_add(PAGE + 15) > u64::from(limit)
    }

    #[inline(never)]
    fn find_block_slow(&mut self, lin: u64, single: bool) -> Result<BlockRef, Abort> {
        if !single && let Some(block) = self.compared_block(lin)? {
            return Ok(block);
        }
        if !self.near_code_limit() {
            return self.look_up_block(lin, single);
        }
        let limit = u64::from(self.state.segs[1].limit);
        if self.state.rip <= limit {
            let block = self.look_up_block(lin, single)?;
            if self.state.rip + block.len() - 1 <= limit {
                return Ok(block);
            }
        }
        Err(self.raise(Exception::gp(0)))
    }

    fn look_up_block(&mut self, lin: u64, single: bool) -> Result<BlockRef, Abort> {
        self.code.reclaim();
        if self.code.ops > CACHE_OPS_MAX {
            self.code.clear();
            self.code.reclaim();
        }
        let page = self.fetch_page(lin)?;
        let offset = (lin & (PAGE - 1)) as u16;
        let key = offset | ((self.state.code_size as u16) << 12) | (u16::from(single) << 14);
        if let Some(found) = self.cached_block(page, key, lin)? {
            return Ok(found);
        }
        let block = self.decode_block(page, lin, offset, single)?;
        self.enter_code(page, key, block);
        self.cached_block(page, key, lin)?.map_or_else(|| Err(self.retry()), Ok)
    }

    /// Keeps a block that has just been decoded.
    fn enter_code(&mut self, page: ExecPage, key: u16, block: Block) {
        self.counters.blocks_decoded += 1;
        let (offset, next) = (block.offset(), block.next);
        let code = &mut self.code;
        if code.pages.get(&page.gfn).is_some_and(|page| page.blocks.contains_key(&key)) {
            code.drop_bytes(page.gfn, offset, offset + 1);
        }
        code.ops += block.ops.len();
        let mut fresh = [None; 2];
        let code_page = code.pages.entry(page.gfn).or_default();
        fresh[0] = code_page.blocks.is_empty().then_some(page.gfn);
        code_page.lines |= lines(offset, offset + block.source.len());
        code_page.blocks.insert(key, Box::new(block));
        if let Some(next) = next {
            let fresh_next = !code.holds(next.gfn);
            code.pages.entry(next.gfn).or_default().reaching.push((page.gfn, key));
            fresh[1] = fresh_next.then_some(next.gfn);
        }
        for gfn in fresh.into_iter().flatten() {
            // Marked after decoding, so what was written in between is found by the comparison that the first use makes.
            self.mark_code_page(gfn);
        }
    }

    /// Blocks of the page are what the page holds, from now on until something is written without telling.
    fn compare_page(&mut self, page: ExecPage) -> Result<(), Abort> {
        let known = self.code.pages.get(&page.gfn);
        if known.is_none_or(|known| known.checked == self.code.epoch && known.host == page.host) {
            return Ok(());
        }
        let mut bytes = [0; PAGE as usize];
        self.copy_code(page.host, &mut bytes)?;
        self.counters.blocks_invalidated += self.code.page_holds(page.gfn, page.host, &bytes) as u64;
        Ok(())
    }

    /// The page of `lin`, and if asked for the one behind it.
    fn fetch_pages(&mut self, lin: u64, both: bool) -> Result<(ExecPage, Option<ExecPage>), Abort> {
        let page = self.fetch_page(lin)?;
        let next = if both { Some(self.fetch_page((lin & !(PAGE - 1)).wrapping_add(PAGE))?) } else { None };
        Ok((page, next))
    }

    /// The cached block for `key`, if its bytes are what they were; enters it into the jump cache.
    fn cached_block(&mut self, page: ExecPage, key: u16, lin: u64) -> Result<Option<BlockRef>, Abort> {
        let context = self.fetch_context(lin);
        let Some((mut found, mut unstable)) = self.code.find(page.gfn, key) else { return Ok(None) };
        // Behind the page there may be another one at each address that it has.
        let crosses = found.block().next.is_some();
        if found.checked() != self.code.epoch || unstable || crosses {
            let (page, next) = self.fetch_pages(lin, crosses)?;
            if !unstable {
                self.compare_page(page)?;
                next.map_or(Ok(()), |next| self.compare_page(next))?;
            }
            // What that has done may have dropped it.
            let Some(again) = self.code.find(page.gfn, key) else { return Ok(None) };
            (found, unstable) = (again.0, unstable || again.1);
            let block = found.block();
            // SAFETY: the pages are there, just now.
            let same = if unstable { unsafe { block.is_unchanged() } } else { Ok(true) };
            if !block.lies_in(page, next) || !self.present(same)? {
                let offset = block.offset();
                let dropped = self.code.drop_bytes(page.gfn, offset, offset + 1);
                self.counters.blocks_invalidated += dropped as u64;
                return Ok(None);
            }
            block.checked.set(self.code.epoch);
        }
        if !unstable && key & (1 << 14) == 0 {
            let generation = self.code.generation;
            self.code.jump[jump_index(lin)] = JumpEntry { lin, context, generation, block: Some(found) };
        }
        Ok(Some(found))
    }

    /// Whether the instruction at RIP, which an exit has just left there, is one of the x87's. For hypervisors whose clients
    /// count on some instructions being beyond an emulator.
    pub fn at_x87_instruction(&mut self) -> bool {
        let mut bytes = [0; 15];
        let lin = self.code_linear();
        let fetched = self.fetch_bytes(lin, &mut bytes);
        self.pending = Pending::None;
        let ctx = LowerCtx {
            code_size: self.state.code_size,
            features: &self.features,
            stubs: &self.hostexec.stubs,
        };
        fetched.is_ok() && fpu::is_x87(&decode_one(&bytes, 0, &ctx).0)
    }

    /// Copies instruction bytes that may cross into the next page. False if the next page cannot be fetched
    /// (its fault is the instruction's fault, found when it is decoded again).
    fn fetch_bytes(&mut self, lin: u64, out: &mut [u8]) -> Result<bool, Abort> {
        let first = ((PAGE - (lin & (PAGE - 1))) as usize).min(out.len());
        let page = self.fetch_page(lin)?;
        self.copy_code(page.host + (lin & (PAGE - 1)), &mut out[..first])?;
        if first < out.len() {
            let Ok(next) = self.fetch_page(lin.wrapping_add(first as u64)) else { return Ok(false) };
            self.copy_code(next.host, &mut out[first..])?;
        }
        Ok(true)
    }

    /// Decodes the block at page offset `offset`.
    fn decode_block(&mut self, page: ExecPage, lin: u64, offset: u16, single: bool) -> Result<Block, Abort> {
        let start = usize::from(offset);
        let mut bytes = [0u8; PAGE as usize + 16];
        let mut available = PAGE as usize;
        self.copy_code(page.host + offset as u64, &mut bytes[start..available])?;
        let code_size = self.state.code_size;
        let mut ops: Vec<Op> = Vec::new();
        let mut at = start;
        let mut next = None;
        let limit = if single { 1 } else { BLOCK_MAX };
        loop {
            let ctx = LowerCtx { code_size, features: &self.features, stubs: &self.hostexec.stubs };
            let (ins, truncated) = decode_one(&bytes[at..available], at, &ctx);
            if truncated {
                if !ops.is_empty() {
                    break;
                }
                if available - at < INSTRUCTION_LONGEST && next.is_none() {
                    // The instruction goes on in the next page: fetching that may fault.
                    let page = self.fetch_page((lin & !(PAGE - 1)).wrapping_add(PAGE))?;
                    available = PAGE as usize + INSTRUCTION_LONGEST;
                    self.copy_code(page.host, &mut bytes[PAGE as usize..available])?;
                    next = Some(page);
                    continue;
                }
                let mut op = op_base(&ins, &ctx, too_long);
                thread::thread(&mut op);
                ops.push(op);
                at += 1;
                break;
            }
            let mut op = lower::lower(&ins, &ctx);
            thread::thread(&mut op);
            ops.push(op);
            at += ins.len().max(1);
            // Instructions that change the machine end the block by what their handlers return.
            let ends = ins.flow_control() != FlowControl::Next;
            if ends || next.is_some() || ops.len() >= limit || at >= PAGE as usize {
                break;
            }
        }
        if !single {
            self.watch_block(&ops);
        }
        let mut tail = op_base(
            &Instruction::default(),
            &LowerCtx { code_size, features: &self.features, stubs: &self.hostexec.stubs },
            fall_through,
        );
        tail.page_offset = at as u16;
        ops.push(tail);
        Ok(Block {
            ops: ops.into_boxed_slice(),
            source: bytes[start..at].into(),
            host: page.host + u64::from(offset),
            checked: Cell::new(0),
            translation: Cell::new(0),
            others: RefCell::new(None),
            joined: Cell::new(0),
            next,
        })
    }

    /// Copies bytes from inside a page that `fetch_page` returned.
    fn copy_code(&mut self, host: u64, out: &mut [u8]) -> Result<(), Abort> {
        // SAFETY: callers pass an address inside a page that `fetch_page` returned and a length within it.
        let copied = unsafe { host::copy(host as *const u8, out.as_mut_ptr(), out.len()) };
        self.present(copied)
    }
}

/// Makes the decoder's and encoder's tables, which exist once in a process and are otherwise made on first use: a process
/// forked just then could never use them.
pub fn make_tables() {
    let nop = Decoder::new(64, &[0x90], DecoderOptions::NONE).decode();
    std::hint::black_box((nop.op_code(), Encoder::new(64).encode(&nop, 0).is_ok()));
}

/// Decodes one instruction; true if only missing bytes kept it from being decoded.
pub(crate) fn decode_one(bytes: &[u8], at: usize, ctx: &LowerCtx) -> (Instruction, bool) {
    let bytes = &bytes[..bytes.len().min(15)];
    let options = ctx.features.decoder_options();
    let mut decoder = Decoder::with_ip(ctx.code_size.bits(), bytes, at as u64, options);
    let ins = decoder.decode();
    (ins, decoder.last_error() == DecoderError::NoMoreBytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_page() {
        for (from, to, expected) in [
            (0, 1, 1),
            (63, 64, 1),
            (63, 65, 3),
            (64, 128, 2),
            (4095, 4096, 1 << 63),
            (4090, 4100, 1 << 63),
            (0, 4096, u64::MAX),
        ] {
            assert_eq!(lines(from, to), expected, "{from}..{to}");
        }
    }
}
