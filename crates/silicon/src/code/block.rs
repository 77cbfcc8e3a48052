//! Blocks: what is decoded at once, and host code made of it.
#![expect(unsafe_code, reason = "blocks are referenced by raw pointer while they run; see `BlockRef`")]

use std::cell::{Cell, RefCell};
use std::num::NonZeroU64;
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::Rc;

use super::{PAGE, thread};
use crate::code::op::Op;
use crate::mmu::access::ExecPage;
use crate::mmu::host::{self, Absent};
use crate::translate;

/// How often a block is translated together with others at most: as more of them become known, more are.
const JOINED_OFTEN: u8 = 2;

/// A run of decoded instructions that ends at a control transfer, a page end, or an instruction that needs a
/// fresh look at the machine.
#[derive(Debug)]
pub(crate) struct Block {
    /// Epoch in which `source` was last compared.
    pub(super) checked: Cell<u64>,
    /// Where the host code from the block's beginning is ([`crate::translate`]); 0: there is none.
    pub(super) translation: Cell<u64>,
    pub(super) ops: Box<[Op]>,
    /// The bytes that were decoded.
    pub(super) source: Box<[u8]>,
    /// Where in the page the blocks lie that host code may go on to without asking, if there is host code.
    pub(super) others: RefCell<Option<Rc<[Range<usize>]>>>,
    /// How often it has been translated together with others.
    pub(super) joined: Cell<u8>,
    /// Where `source` is in host memory (the part in the first page).
    pub(super) host: u64,
    /// Its one instruction reaches into the next page, which was this one.
    pub(super) next: Option<ExecPage>,
}

impl Block {
    /// Where it begins in its page.
    pub(super) fn offset(&self) -> usize {
        usize::from(self.ops[0].page_offset)
    }

    /// Where it lies in its page, or reaches beyond.
    pub(super) fn range(&self) -> Range<usize> {
        self.offset()..self.offset() + self.source.len()
    }

    /// Whether it depends on bytes `from..to` of its page.
    pub(super) fn depends_on(&self, from: usize, to: usize) -> bool {
        let overlaps = |range: &Range<usize>| range.start < to && range.end > from;
        let others = self.others.borrow();
        overlaps(&self.range()) || others.iter().flat_map(|others| others.iter()).any(overlaps)
    }

    /// The part of its bytes that lies in its page, and the part behind that.
    pub(super) fn parts(&self) -> (&[u8], &[u8]) {
        self.source.split_at(self.source.len().min(PAGE as usize - self.offset()))
    }

    /// Whether it was decoded from the page at `page`, with the page at `next` behind it if it reaches into that.
    pub(super) fn lies_in(&self, page: ExecPage, next: Option<ExecPage>) -> bool {
        self.host == page.host + self.offset() as u64 && self.next == next
    }

    /// Whether its bytes are what they were.
    ///
    /// # Safety
    ///
    /// The pages that it [lies in](Block::lies_in) have just been found to be at those host addresses.
    pub(super) unsafe fn is_unchanged(&self) -> Result<bool, Absent> {
        let (here, beyond) = self.parts();
        // SAFETY: the caller's promise.
        Ok(unsafe {
            host::same(self.host, here)?
                && self.next.map_or(Ok(true), |next| host::same(next.host, beyond))?
        })
    }

    /// There is no host code any more; it may be translated again. It depends on its own bytes alone then.
    pub(super) fn forget_translation(&self) {
        // Host code may begin within it, so that only `others` says that there is some.
        let joined = self.others.take().is_some();
        if self.translation.take() != 0 || joined {
            for op in &self.ops[..self.ops.len() - 1] {
                op.handler.set(thread::interpreted(op));
                op.translation.set(0);
            }
            self.ops[0].handler.set(translate::count);
        }
    }
}

/// A block that outlives its use: blocks are only freed by [`CodeCache::reclaim`](super::CodeCache), which runs between blocks.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct BlockRef(NonNull<Block>);

impl BlockRef {
    /// A reference to a block of the cache.
    pub(super) fn to(block: &Block) -> BlockRef {
        BlockRef(NonNull::from(block))
    }

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

    /// There is host code for it from its beginning.
    pub(crate) fn set_translation(&self, at: u64) {
        // SAFETY: as above.
        unsafe { self.0.as_ref().translation.set(at) };
    }

    /// Epoch in which its bytes were last compared.
    #[inline(always)]
    pub(super) fn checked(&self) -> u64 {
        // SAFETY: as above.
        unsafe { self.0.as_ref().checked.get() }
    }

    /// It may be translated together with others: if it has been already, not too often.
    pub(crate) fn may_join(&self) -> bool {
        self.translation().is_none() || self.block().joined.get() < JOINED_OFTEN
    }

    /// Where in its page the blocks begin that its host code goes on to without asking, itself among them; nothing, if there is none.
    pub(crate) fn region(&self) -> Vec<u16> {
        let others = self.block().others.borrow();
        others.iter().flat_map(|others| others.iter()).map(|range| range.start as u16).collect()
    }

    /// Its translation does not count as one together with others.
    pub(crate) fn has_not_joined(&self) {
        self.block().joined.set(0);
    }

    /// Bytes of code.
    pub(super) fn len(&self) -> u64 {
        // SAFETY: as above.
        unsafe { self.0.as_ref().source.len() as u64 }
    }

    pub(super) fn block(&self) -> &Block {
        // SAFETY: as above.
        unsafe { self.0.as_ref() }
    }
}
