//! A boot file: its length, its first bytes, and checked ways to read it or to copy it into guest memory.

use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use crate::memory::{self, GuestMemory};

/// What boot files are read from: a file, or bytes in memory.
pub trait Source: Read + Seek + ReadVolatile {}
impl<T: Read + Seek + ReadVolatile> Source for T {}

/// A kernel or an initial RAM disk before it is loaded.
#[derive(Debug)]
pub struct Image<S> {
    source: S,
    name: String,
    length: u64,
    head: Vec<u8>,
}

/// Bytes at the start of a file that identify it: the Linux setup header, the multiboot header (in the first
/// 8 KiB) and file-system magic numbers lie within.
const HEAD: u64 = 36 << 10;

impl<S: Source> Image<S> {
    /// Reads the first bytes of `source`; `name` is for messages and, with multiboot, for the guest.
    pub fn new(mut source: S, name: impl Into<String>) -> io::Result<Self> {
        let length = source.seek(SeekFrom::End(0))?;
        source.seek(SeekFrom::Start(0))?;
        let mut head = Vec::new();
        source.by_ref().take(HEAD).read_to_end(&mut head)?;
        Ok(Self { source, name: name.into(), length, head })
    }

    /// The file's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Length in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The file's first bytes (all, if it is short).
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// Reads `length` bytes at `offset`. The caller has checked `length` against a sensible limit.
    pub fn read(&mut self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.source.seek(SeekFrom::Start(offset))?;
        self.source.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Copies `length` bytes at `offset` into guest memory, without a stop in between.
    pub fn copy_to(
        &mut self,
        offset: u64,
        length: u64,
        memory: &GuestMemory,
        address: u64,
    ) -> io::Result<()> {
        memory::expect_filling(memory, address, length);
        let length = usize::try_from(length).map_err(io::Error::other)?;
        self.source.seek(SeekFrom::Start(offset))?;
        memory
            .read_exact_volatile_from(GuestAddress(address), &mut self.source, length)
            .map_err(io::Error::other)
    }
}
