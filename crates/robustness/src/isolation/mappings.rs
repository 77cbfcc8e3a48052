//! What is mapped (`/proc/self/maps`), and which pages there are (`/proc/self/pagemap`): proc(5), proc_pid_pagemap(5). Nothing here
//! allocates, so that asking changes nothing that is looked at.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::own::{Buffer, Own};

pub(super) const PAGE: u64 = 4096;

/// Addresses from one to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Span {
    pub(super) fn contains(self, at: u64) -> bool {
        (self.start..self.end).contains(&at)
    }
    pub(super) fn size(self) -> usize {
        (self.end - self.start) as usize
    }
    /// The pages that lie in it as a whole.
    pub(super) fn whole_pages(self) -> Span {
        Span { start: self.start.next_multiple_of(PAGE), end: self.end & !(PAGE - 1) }
    }
}

impl From<std::ops::Range<u64>> for Span {
    fn from(range: std::ops::Range<u64>) -> Span {
        Span { start: range.start, end: range.end }
    }
}

/// A line of `/proc/self/maps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) span: Span,
    pub(super) readable: bool,
    pub(super) writable: bool,
    pub(super) private: bool,
    pub(super) of_file: bool,
    /// The kernel's clock, which changes by itself: vvar and the pages beside it.
    pub(super) clock: bool,
}

impl Mapping {
    fn parse(line: &str) -> Option<Mapping> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let number = |digits| u64::from_str_radix(digits, 16).ok();
        let span = Span { start: number(start)?, end: number(end)? };
        let [r, w, _, p] = *words.next()?.as_bytes() else { return None };
        let of_file = words.nth(2)? != "0";
        let clock = words.next().is_some_and(|name| name.starts_with("[vvar") || name == "[vsyscall]");
        let (readable, writable, private) = (r == b'r', w == b'w', p == b'p');
        Some(Mapping { span, readable, writable, private, of_file, clock })
    }
}

/// The two files, and room for what they say.
#[derive(Debug)]
pub(super) struct Proc {
    maps: File,
    pagemap: File,
    text: Buffer<u8>,
    entries: Buffer<u8>,
}

/// Pages that are asked for at once.
const ENTRIES: usize = 1 << 15;
/// Bits of an entry: the page is there, or in swap.
const THERE: u64 = 1 << 63 | 1 << 62;

impl Proc {
    pub(super) fn open(own: &mut Own) -> io::Result<Proc> {
        let (maps, pagemap) = (File::open("/proc/self/maps")?, File::open("/proc/self/pagemap")?);
        Ok(Proc { maps, pagemap, text: Buffer::new(own, 1 << 20), entries: Buffer::new(own, 8 * ENTRIES) })
    }

    /// All that is mapped.
    pub(super) fn mappings(&mut self, out: &mut Buffer<Mapping>) {
        out.clear();
        self.text.read(self.maps.as_raw_fd(), 0, usize::MAX);
        let text = std::str::from_utf8(&self.text).unwrap_or_default();
        text.lines().filter_map(Mapping::parse).for_each(|mapping| out.push(mapping));
    }

    /// Adds those pages of `span` that there are.
    pub(super) fn pages_there(&mut self, span: Span, out: &mut Buffer<Span>) {
        let mut from = span.start;
        while from < span.end {
            let pages = ENTRIES.min(((span.end - from) / PAGE) as usize);
            self.entries.read(self.pagemap.as_raw_fd(), from / PAGE * 8, 8 * pages);
            let (entries, _) = self.entries.as_chunks::<8>();
            assert_eq!(entries.len(), pages, "the kernel says of every page whether it is there");
            for (number, entry) in (0..).zip(entries) {
                if u64::from_ne_bytes(*entry) & THERE == 0 {
                    continue;
                }
                let start = from + number * PAGE;
                match out.last_mut().filter(|last| last.end == start) {
                    Some(last) => last.end += PAGE,
                    None => out.push(Span { start, end: start + PAGE }),
                }
            }
            from += pages as u64 * PAGE;
        }
    }
}

/// The name of what lies at `at`. Allocates.
pub(super) fn name_at(at: u64) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let line = maps.lines().find(|line| Mapping::parse(line).is_some_and(|m| m.span.contains(at)));
    line.map_or("nothing".into(), |line| line.split_ascii_whitespace().collect::<Vec<_>>().join(" "))
}

/// What of `span` is left without the whole pages that lie in one of `excluded`, which are in order.
pub(super) fn without(span: Span, excluded: &[Span], mut give: impl FnMut(Span)) {
    let mut from = span.start;
    for pages in excluded.iter().map(|span| span.whole_pages()).filter(|pages| pages.start < pages.end) {
        if pages.end <= from || pages.start >= span.end {
            continue;
        }
        if pages.start > from {
            give(Span { start: from, end: pages.start });
        }
        from = pages.end;
    }
    if from < span.end {
        give(Span { start: from, end: span.end });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let heap = Mapping::parse("00400000-00402000 rw-p 00000000 00:00 0          [heap]").unwrap();
        let span = Span { start: 0x40_0000, end: 0x40_2000 };
        let wanted =
            Mapping { span, readable: true, writable: true, private: true, of_file: false, clock: false };
        assert_eq!(heap, wanted);
        let text = Mapping::parse("7f00-8f00 r-xs 00001000 fe:00 77   /usr/lib/a b").unwrap();
        assert!(text.of_file && !text.private && !text.writable);
        assert!(Mapping::parse("7f00-8f00 r--p 00000000 00:00 0 [vvar_vclock]").unwrap().clock);
    }

    #[test]
    fn only_whole_pages_are_left_out() {
        let excluded = [(0x1800, 0x1900), (0x2800, 0x4800), (0x5000, 0x9000)];
        let excluded = excluded.map(|(start, end)| Span { start, end });
        let mut left = Vec::new();
        without(Span { start: 0x1000, end: 0x7000 }, &excluded, |span| left.push((span.start, span.end)));
        assert_eq!(left, [(0x1000, 0x3000), (0x4000, 0x5000)]);
    }

    #[test]
    fn touched_pages_are_there() {
        let mut own = Own::new(16 << 20).unwrap();
        let mut proc = Proc::open(&mut own).unwrap();
        let mut pages = Buffer::new(&mut own, 64);
        let mut memory: Buffer<u8> = Buffer::new(&mut own, 4 * PAGE as usize);
        let start = memory.as_ptr() as u64;
        (0..2 * PAGE).for_each(|_| memory.push(1));
        proc.pages_there(Span { start, end: start + 4 * PAGE }, &mut pages);
        assert_eq!(&*pages, [Span { start, end: start + 2 * PAGE }]);
    }
}
