//! Decoded code: blocks keyed by guest-physical page, offset and mode, per CPU.
//!
//! A block stays valid as long as the bytes that it was decoded from do not change. Guest stores to a page that
//! holds decoded code take the MMU's slow path and call [`Cpu::code_written`]. Writes that nobody tells us of
//! (devices, other threads, the host kernel) become visible at an *epoch* change: an entry to guest mode, an
//! interrupt, a new executable mapping. The first use of a block in a new epoch compares its bytes.
#![expect(unsafe_code, reason = "blocks are referenced by raw pointer while they run; see `BlockRef`")]

pub(crate) mod lower;
pub(crate) mod op;
pub(crate) mod thread;

use std::cell::Cell;
use std::collections::HashMap;
use std::num::NonZeroU64;
use std::ptr::NonNull;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Encoder, FlowControl, Instruction};

use crate::code::lower::{LowerCtx, op_base};
use crate::code::op::{Flow, Op};
use crate::cpu::{Cpu, Pending};
use crate::exception::{Abort, Exception};
use crate::exec::fpu;
use crate::mmu::access::ExecPage;
use crate::mmu::host;
use crate::state::{CodeSize, reg};

/// Instructions in a block at most.
const BLOCK_MAX: usize = 48;
/// Operations in all blocks of a CPU at most; past that the cache is emptied (about 30 MiB).
const CACHE_OPS_MAX: usize = 400_000;
/// Entries of the jump cache.
pub(crate) const JUMP_ENTRIES: usize = 1 << 14;
/// Bytes in a page.
const PAGE: u64 = 4096;

/// A run of decoded instructions that ends at a control transfer, a page end, or an instruction that needs a
/// fresh look at the machine.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Block {
    /// Epoch in which `source` was last compared.
    pub(crate) checked: Cell<u64>,
    /// Where the host code for the whole block is ([`crate::translate`]); 0: there is none.
    pub(crate) translation: Cell<u64>,
    ops: Box<[Op]>,
    /// The bytes that were decoded.
    source: Box<[u8]>,
    /// Where those bytes are in host memory (the part in the first page).
    host: u64,
    /// The last instruction reaches into the next page: never cached in the jump cache, compared at each use.
    crossing: bool,
}

/// A block that outlives its use: blocks are only freed by [`CodeCache::reclaim`], which runs between blocks.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct BlockRef(NonNull<Block>);

impl BlockRef {
    /// Its operations.
    pub(crate) fn ops(&self) -> &[Op] {
        // SAFETY: blocks are freed only in `reclaim`, which the engine calls while it holds no `BlockRef`.
        unsafe { &self.0.as_ref().ops }
    }

    /// Its first operation.
    #[inline(always)]
    pub(crate) fn first(&self) -> &Op {
        // SAFETY: as above; and `decode_block` makes no block without a `fall_through` at its end.
        unsafe { self.0.as_ref().ops.get_unchecked(0) }
    }

    /// The bytes that it was decoded from.
    pub(crate) fn source(&self) -> &[u8] {
        // SAFETY: as above.
        unsafe { &self.0.as_ref().source }
    }

    /// Where the host code for all of it is, if there is any.
    #[inline(always)]
    pub(crate) fn translation(&self) -> Option<NonZeroU64> {
        // SAFETY: as above.
        NonZeroU64::new(unsafe { self.0.as_ref().translation.get() })
    }

    /// There is host code for all of it.
    pub(crate) fn set_translation(&self, at: u64) {
        // SAFETY: as above.
        unsafe { self.0.as_ref().translation.set(at) };
    }

    /// Epoch in which its bytes were last compared.
    #[inline(always)]
    fn checked(&self) -> u64 {
        // SAFETY: as above.
        unsafe { self.0.as_ref().checked.get() }
    }

    /// Bytes of code.
    fn len(&self) -> u64 {
        // SAFETY: as above.
        unsafe { self.0.as_ref().source.len() as u64 }
    }
}

/// Entry of the jump cache. Translated code looks at it, too.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct JumpEntry {
    pub(crate) lin: u64,
    pub(crate) context: u64,
    /// [`CodeCache::generation`] when the entry was made: the block has not been dropped as long as it is the same.
    pub(crate) generation: u64,
    pub(crate) block: Option<BlockRef>,
}

#[derive(Default)]
struct CodePage {
    /// Key: page offset | code size << 12 | single << 14.
    blocks: HashMap<u16, Box<Block>, BuildMixer>,
    /// Other CPUs may still write this page without telling: compare at each use.
    unstable: bool,
    /// The 64-byte lines, bit per line, that bytes of blocks lie in; perhaps more.
    lines: u64,
    /// Stores to other lines since blocks were last decoded here, or since `purges` last changed.
    misses: u32,
    /// How often all blocks were dropped because of such stores.
    purges: u32,
}

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
        self.pages.get(&gfn).is_some_and(|page| !page.blocks.is_empty())
    }

    /// Other CPUs hold write mappings of `gfn`: its blocks are compared at each use until this is taken back.
    pub(crate) fn set_unstable(&mut self, gfn: u64, unstable: bool) {
        if let Some(page) = self.pages.get_mut(&gfn)
            && page.unstable != unstable
        {
            page.unstable = unstable;
            self.generation += 1;
            // What was compared while the page was unstable may have changed since.
            self.epoch += 1;
        }
    }

    /// The page may have been written unseen: compare its blocks at their next use through a new mapping.
    pub(crate) fn revalidate(&mut self, gfn: u64) {
        if let Some(page) = self.pages.get_mut(&gfn) {
            for block in page.blocks.values() {
                block.checked.set(0);
            }
        }
    }

    /// Drops the blocks of `gfn` that bytes `from..to` of the page belong to; the number dropped.
    pub(crate) fn written(&mut self, gfn: u64, from: usize, to: usize) -> usize {
        let Some(page) = self.pages.get_mut(&gfn) else { return 0 };
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
        let stale: Vec<u16> = (page.blocks.iter())
            .filter(|(key, block)| {
                let start = usize::from(**key & 0xfff);
                start < to && start + block.source.len() > from
            })
            .map(|(key, _)| *key)
            .collect();
        for key in &stale {
            if let Some(block) = page.blocks.remove(key) {
                self.ops -= block.ops.len();
                retire(&mut self.graveyard, block);
            }
        }
        if page.blocks.is_empty() {
            page.lines = 0;
        }
        if !stale.is_empty() {
            self.generation += 1;
        }
        stale.len()
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
fn resync(cpu: &mut Cpu, op: &Op) -> Result<Flow, Abort> {
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

    /// The block at `lin` if the jump cache has it, after comparing its bytes anew if that has not been done in this epoch.
    #[inline(always)]
    pub(crate) fn block_to_go_on(&mut self, lin: u64) -> Option<BlockRef> {
        if let Some(block) = self.block_at_hand(lin) {
            return Some(block);
        }
        let compared = self.compared_block(lin);
        if compared.is_err() {
            // The engine will find out again, where it matters.
            self.pending = Pending::None;
        }
        compared.ok().flatten()
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
        let page = self.fetch_page(lin)?;
        let Some(reference) = self.entered(&entry, lin) else { return Ok(None) };
        // SAFETY: `entered` says that the block has not been dropped.
        let block = unsafe { reference.0.as_ref() };
        let host = page.host + (lin & (PAGE - 1));
        // SAFETY: `fetch_page` gave the page's host address just now, and no block in the jump cache goes beyond
        // its page.
        let same = unsafe { host::same(host, &block.source) };
        if block.host != host || !self.present(same)? {
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

    /// The block that begins with `first`, an operation at RIP that is about to run, if it lies within its page.
    pub(crate) fn block_of(&mut self, first: &Op) -> Option<BlockRef> {
        let lin = self.ip_of(first);
        let page = self.mmu.tlb.exec_hit(self.state.cpl == 3, lin)?.0;
        let key = first.page_offset | ((self.state.code_size as u16) << 12);
        let block = self.code.pages.get_mut(&page)?.blocks.get_mut(&key)?;
        let whole = !block.crossing && std::ptr::eq(block.ops.as_ptr(), first);
        whole.then(|| BlockRef(NonNull::from(&mut **block)))
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
        self.code.ops += block.ops.len();
        self.counters.blocks_decoded += 1;
        let crossing = block.crossing;
        let code = &mut self.code;
        let code_page = code.pages.entry(page.gfn).or_default();
        let fresh = code_page.blocks.is_empty();
        code_page.lines |= lines(usize::from(offset), usize::from(offset) + block.source.len());
        if let Some(old) = code_page.blocks.insert(key, Box::new(block)) {
            code.ops -= old.ops.len();
            code.generation += 1;
            retire(&mut code.graveyard, old);
        }
        if fresh {
            // Marked after decoding, so what was written in between is found by the comparison that the
            // first use makes.
            self.mark_code_page(page.gfn);
        }
        let found = self.code.pages.get_mut(&page.gfn).and_then(|p| p.blocks.get_mut(&key));
        let Some(block) = found else { return Err(self.retry()) };
        block.checked.set(0);
        let reference = BlockRef(NonNull::from(&mut **block));
        if crossing {
            Ok(reference)
        } else {
            self.cached_block(page, key, lin)?.map_or_else(|| Err(self.retry()), Ok)
        }
    }

    /// The cached block for `key`, if its bytes are what they were; enters it into the jump cache.
    fn cached_block(&mut self, page: ExecPage, key: u16, lin: u64) -> Result<Option<BlockRef>, Abort> {
        let context = self.fetch_context(lin);
        let Some(code_page) = self.code.pages.get_mut(&page.gfn) else { return Ok(None) };
        let unstable = code_page.unstable;
        let Some(block) = code_page.blocks.get_mut(&key) else { return Ok(None) };
        let (reference, crossing) = (BlockRef(NonNull::from(&mut **block)), block.crossing);
        if block.checked.get() != self.code.epoch || unstable || crossing {
            let valid = if crossing {
                let source = block.source.clone();
                let mut now = [0; 16];
                self.fetch_bytes(lin, &mut now[..source.len()])? && now[..source.len()] == *source
            } else {
                let (host, known) = (page.host + (lin & (PAGE - 1)), block.host);
                // SAFETY: `fetch_page` gave the page's host address just now, and a block that does not cross
                // lies within it.
                let same = unsafe { host::same(host, &block.source) };
                self.present(same)? && known == host
            };
            let code = &mut self.code;
            let Some(code_page) = code.pages.get_mut(&page.gfn) else { return Ok(None) };
            if !valid {
                if let Some(old) = code_page.blocks.remove(&key) {
                    code.ops -= old.ops.len();
                    code.generation += 1;
                    retire(&mut code.graveyard, old);
                    self.counters.blocks_invalidated += 1;
                }
                return Ok(None);
            }
            if let Some(block) = code_page.blocks.get_mut(&key) {
                block.checked.set(code.epoch);
            }
        }
        if !unstable && !crossing && key & (1 << 14) == 0 {
            let generation = self.code.generation;
            self.code.jump[jump_index(lin)] = JumpEntry { lin, context, generation, block: Some(reference) };
        }
        Ok(Some(reference))
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
        let mut crossing = false;
        let limit = if single { 1 } else { BLOCK_MAX };
        loop {
            let ctx = LowerCtx { code_size, features: &self.features, stubs: &self.hostexec.stubs };
            let (ins, truncated) = decode_one(&bytes[at..available], at, &ctx);
            if truncated {
                if !ops.is_empty() {
                    break;
                }
                if available - at < 15 && !crossing {
                    // The instruction goes on in the next page: fetching that may fault.
                    let next = self.fetch_page((lin & !(PAGE - 1)).wrapping_add(PAGE))?;
                    self.copy_code(next.host, &mut bytes[PAGE as usize..PAGE as usize + 15])?;
                    available = PAGE as usize + 15;
                    crossing = true;
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
            if ends || crossing || ops.len() >= limit || at >= PAGE as usize {
                break;
            }
        }
        if !single && !crossing {
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
            crossing,
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
