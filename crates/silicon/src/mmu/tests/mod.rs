//! Tests of translation and memory access, on a CPU with a little memory.
#![expect(unsafe_code, reason = "guest memory is host memory that is reached by pointer")]

mod access;
mod coherence;
mod random;
mod smm;
mod walk;

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::Arc;

use crate::cpu::{Cpu, Pending};
use crate::exception::{Abort, Exception};
use crate::mmu::Word;
use crate::mmu::ept::{Ept, Region};
use crate::model::Features;
use crate::state::{CodeSize, cr0, cr4, efer};

/// Guest memory at guest-physical address 0.
pub(super) struct Memory {
    host: *mut u8,
    size: usize,
}

// SAFETY: plain memory; the tests reach it with single host accesses only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 4096).unwrap()
    }

    pub(super) fn new(size: usize) -> Memory {
        // SAFETY: the size is not zero.
        Memory { host: unsafe { alloc_zeroed(Memory::layout(size)) }, size }
    }

    pub(super) fn region(&self) -> Region {
        Region { gpa: 0, size: self.size as u64, host: self.host as u64, readonly: false }
    }

    pub(super) fn read<T: Word>(&self, gpa: u64) -> T {
        assert!(gpa as usize + T::SIZE <= self.size);
        // SAFETY: within the memory.
        unsafe { T::read(self.host.add(gpa as usize).cast()) }.unwrap()
    }

    pub(super) fn write<T: Word>(&self, gpa: u64, value: T) {
        assert!(gpa as usize + T::SIZE <= self.size);
        // SAFETY: within the memory.
        unsafe { T::write(self.host.add(gpa as usize).cast(), value) }.unwrap();
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.host, Memory::layout(self.size)) }
    }
}

/// Where `Machine::long_mode` puts the page tables.
pub(super) const PML4: u64 = 0x1000;
pub(super) const PDPT: u64 = 0x2000;
pub(super) const PD: u64 = 0x3000;
pub(super) const PT: u64 = 0x4000;
/// Present, writable, user.
pub(super) const PWU: u64 = 7;
pub(super) const NX: u64 = 1 << 63;

/// A CPU and its memory.
pub(super) struct Machine {
    pub(super) cpu: Cpu,
    pub(super) memory: Arc<Memory>,
}

impl Machine {
    /// Flat 32-bit protected mode without paging; 1 MiB of memory.
    pub(super) fn new() -> Machine {
        let memory = Arc::new(Memory::new(0x10_0000));
        let ept = Arc::new(Ept::new());
        ept.set_regions(vec![memory.region()]);
        Machine::with(ept, memory)
    }

    pub(super) fn with(ept: Arc<Ept>, memory: Arc<Memory>) -> Machine {
        let mut cpu = Cpu::new(Features::default(), ept);
        cpu.state.cr0 = cr0::PE | cr0::NE | cr0::ET;
        cpu.state.segs[1].attributes = 0xc09b;
        cpu.state.segs[1].base = 0;
        cpu.refresh_mode();
        Machine { cpu, memory }
    }

    /// 64-bit mode. The first 2 MiB of linear addresses go through `PT`, whose entry i maps page i; everything
    /// is present, writable and for users.
    pub(super) fn long_mode() -> Machine {
        let mut machine = Machine::new();
        machine.enter_long_mode();
        machine
    }

    pub(super) fn enter_long_mode(&mut self) {
        for (table, next) in [(PML4, PDPT), (PDPT, PD), (PD, PT)] {
            self.memory.write(table, next | PWU);
        }
        for i in 0..256 {
            self.memory.write(PT + i * 8, i << 12 | PWU);
        }
        let state = &mut self.cpu.state;
        state.cr3 = PML4;
        state.cr4 = cr4::PAE | cr4::PGE;
        state.efer = efer::LME | efer::LMA | efer::NXE;
        state.cr0 |= cr0::PG | cr0::WP;
        state.segs[1].attributes = 0xa09b;
        self.cpu.refresh_mode();
        self.cpu.sync_registers();
        assert_eq!(self.cpu.state.code_size, CodeSize::Bits64);
    }

    /// Changes registers and tells the MMU of it.
    pub(super) fn change(&mut self, change: impl FnOnce(&mut crate::state::CpuState)) {
        change(&mut self.cpu.state);
        self.cpu.refresh_mode();
        self.cpu.sync_registers();
    }

    /// Writes a page-table entry and flushes everything.
    pub(super) fn entry(&mut self, gpa: u64, value: u64) {
        self.memory.write(gpa, value);
        self.cpu.flush_all(false);
    }

    /// The exception that `result` is about.
    pub(super) fn exception<T: std::fmt::Debug>(&mut self, result: Result<T, Abort>) -> Exception {
        assert!(result.is_err(), "{result:?}");
        match std::mem::replace(&mut self.cpu.pending, Pending::None) {
            Pending::Exception(exception) => exception,
            other => panic!("{other:?}"),
        }
    }

    /// The exit that `result` is about.
    pub(super) fn exit<T: std::fmt::Debug>(&mut self, result: Result<T, Abort>) -> crate::vmx::Exit {
        assert!(result.is_err(), "{result:?}");
        match std::mem::replace(&mut self.cpu.pending, Pending::None) {
            Pending::Exit(exit) => exit,
            other => panic!("{other:?}"),
        }
    }
}
