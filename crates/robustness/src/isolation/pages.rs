//! Every writable page of the process, remembered and compared; and once, every page that is not writable.
#![expect(unsafe_code, reason = "reads all memory of the process, whoever it belongs to")]

use std::fmt;
use std::io;

use super::mappings::{Mapping, PAGE, Proc, Span, name_at, without};
use super::own::{Buffer, Own};

/// Pages in a row, and where their copy is.
#[derive(Clone, Copy, Debug)]
struct Copied {
    span: Span,
    copy: *const u8,
}

/// What has changed outside what may change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Host address.
    pub address: u64,
    /// What is mapped there.
    pub place: String,
    /// The rest of the page from there on, sixteen bytes at most, before and after; nothing, if it is about a mapping.
    pub bytes: (Vec<u8>, Vec<u8>),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Change { address, place, bytes: (before, after) } = self;
        write!(f, "{address:#x} in {place} was {before:02x?} and is {after:02x?}")
    }
}

/// The process's memory outside what a stay may write.
#[derive(Debug)]
pub(super) struct Pages {
    proc: Proc,
    mappings: Buffer<Mapping>,
    again: Buffer<Mapping>,
    /// In order.
    excluded: Buffer<Span>,
    outside: Buffer<Span>,
    runs: Buffer<Span>,
    copied: Buffer<Copied>,
    copy: Buffer<u8>,
    /// Pages compared so far.
    pub(super) compared: u64,
}

/// What is remembered at most.
const COPY: usize = 1 << 30;
const RUNS: usize = 1 << 16;

impl Pages {
    pub(super) fn new(own: &mut Own) -> io::Result<Pages> {
        Ok(Pages {
            proc: Proc::open(own)?,
            mappings: Buffer::new(own, RUNS),
            again: Buffer::new(own, RUNS),
            excluded: Buffer::new(own, RUNS),
            outside: Buffer::new(own, RUNS),
            runs: Buffer::new(own, RUNS),
            copied: Buffer::new(own, RUNS),
            copy: Buffer::new(own, COPY),
            compared: 0,
        })
    }

    /// Remembers all pages that are there and writable, but those that lie in `excluded` as a whole. Nothing may be allocated by the
    /// iterator.
    pub(super) fn remember(&mut self, excluded: impl Iterator<Item = Span>) {
        self.excluded.clear();
        excluded.filter(|span| span.start < span.end).for_each(|span| self.excluded.push(span));
        self.excluded.sort_unstable_by_key(|span| span.start);
        self.proc.mappings(&mut self.mappings);
        self.outside.clear();
        self.copied.clear();
        self.copy.clear();
        for mapping in self.mappings.iter().filter(|mapping| mapping.readable && mapping.writable) {
            without(mapping.span, &self.excluded, |span| self.outside.push(span));
            for &span in &*self.outside {
                self.runs.clear();
                // What a file holds is there before it is touched.
                if mapping.of_file && mapping.private {
                    self.runs.push(span);
                } else {
                    self.proc.pages_there(span, &mut self.runs);
                }
                for &span in &*self.runs {
                    self.copied.push(Copied { span, copy: std::ptr::null() });
                }
            }
            self.outside.clear();
        }
        for run in &mut *self.copied {
            // SAFETY: mapped and readable; only this thread runs.
            run.copy = unsafe { self.copy.add(run.span.start, run.span.size()) };
        }
    }

    /// The first byte that is not what it was, outside what was excluded, or the first page that has come.
    pub(super) fn compare(&mut self) -> Option<Change> {
        let mut first = None;
        for run in &*self.copied {
            self.compared += run.span.size() as u64 / PAGE;
            first = first.or_else(|| changed(run, &self.excluded));
        }
        first.or_else(|| self.new_page())
    }

    /// A page that was not there, is not zero, and should not have come.
    fn new_page(&mut self) -> Option<Change> {
        self.proc.mappings(&mut self.again);
        if let Some(mapping) = self.again.iter().find(|mapping| !known(mapping, &self.mappings)) {
            return self.new_mapping(mapping.span);
        }
        for mapping in self.again.iter().filter(|mapping| mapping.readable && mapping.writable) {
            if mapping.of_file && mapping.private {
                continue;
            }
            self.outside.clear();
            without(mapping.span, &self.excluded, |span| self.outside.push(span));
            for &span in &*self.outside {
                self.runs.clear();
                self.proc.pages_there(span, &mut self.runs);
                let new = self.runs.iter().flat_map(|run| (run.start..run.end).step_by(PAGE as usize));
                let mut new = new.filter(|&page| !holds(&self.copied, page));
                let written = new.find_map(|page| {
                    let copy = ZERO.as_ptr();
                    changed(&Copied { span: Span { start: page, end: page + PAGE }, copy }, &self.excluded)
                });
                if written.is_some() {
                    return written;
                }
            }
        }
        None
    }

    /// A mapping has come, or is another than it was. That the stack has grown is no change by itself.
    fn new_mapping(&self, span: Span) -> Option<Change> {
        let place = name_at(span.start);
        (!place.ends_with("[stack]")).then(|| Change {
            address: span.start,
            place,
            bytes: Default::default(),
        })
    }
}

static ZERO: [u8; PAGE as usize] = [0; PAGE as usize];

fn known(mapping: &Mapping, mappings: &[Mapping]) -> bool {
    mappings
        .binary_search_by_key(&mapping.span.start, |known| known.span.start)
        .is_ok_and(|at| mappings[at] == *mapping)
}

fn holds(copied: &[Copied], page: u64) -> bool {
    let behind = copied.partition_point(|run| run.span.start <= page);
    behind > 0 && copied[behind - 1].span.contains(page)
}

/// Where pages differ from their copy, outside `excluded`.
fn changed(run: &Copied, excluded: &[Span]) -> Option<Change> {
    (run.span.start..run.span.end).step_by(PAGE as usize).find_map(|page| {
        let offset = (page - run.span.start) as usize;
        // SAFETY: both pages are mapped and readable, and nobody writes them meanwhile; the copy has as many.
        let [now, before] = unsafe {
            [page as *const u8, run.copy.add(offset)]
                .map(|start| std::slice::from_raw_parts(start, PAGE as usize))
        };
        if now == before {
            return None;
        }
        let at = (0..PAGE as usize).find(|&at| {
            let address = page + at as u64;
            now[at] != before[at] && !excluded.iter().any(|span| span.contains(address))
        })?;
        let address = page + at as u64;
        let end = (at + 16).min(PAGE as usize);
        let bytes = (before[at..end].to_vec(), now[at..end].to_vec());
        Some(Change { address, place: name_at(address), bytes })
    })
}

/// Pages that cannot be written: code, constants, what the linker has relocated.
#[derive(Debug)]
pub(super) struct Frozen {
    copied: Vec<Copied>,
    /// Pages compared so far.
    pub(super) compared: u64,
}

impl Frozen {
    /// All that there are now.
    pub(super) fn new(own: &mut Own) -> io::Result<Frozen> {
        let mut mappings = Buffer::new(own, RUNS);
        Proc::open(own)?.mappings(&mut mappings);
        let frozen = |m: &&Mapping| m.readable && !m.writable && m.private && !m.clock;
        let copied = mappings.iter().filter(frozen).map(|mapping| {
            let mut copy: Buffer<u8> = Buffer::new(own, mapping.span.size());
            // SAFETY: mapped, readable, and written by nobody.
            let copy = unsafe { copy.add(mapping.span.start, mapping.span.size()) };
            Copied { span: mapping.span, copy }
        });
        Ok(Frozen { copied: copied.collect(), compared: 0 })
    }

    /// The first byte that is not what it was.
    pub(super) fn compare(&mut self) -> Option<Change> {
        self.compared += self.copied.iter().map(|run| run.span.size() as u64 / PAGE).sum::<u64>();
        self.copied.iter().find_map(|run| changed(run, &[]))
    }
}
