//! A small guest for the unit tests of the instruction families: code at 0x1000, stack below 0x8000, data from
//! 0x8000, identity-mapped where there is paging. Every exception exits; a run ends with UD2.
#![expect(unsafe_code, reason = "guest memory is read and written through its host pointer")]

use std::sync::Arc;

use crate::cpu::Cpu;
use crate::exception::{Exception, vector};
use crate::flags::{Rflags, Status};
use crate::mmu::ept::{Ept, Region};
use crate::model::Features;
use crate::state::{CodeSize, Segment, cr0, cr4, efer, reg};
use crate::vmx::Exit;

/// Where [`Guest::run`] puts the code.
pub(crate) const CODE: u64 = 0x1000;
/// Initial stack pointer.
pub(crate) const STACK: u64 = 0x8000;
/// Free for data.
pub(crate) const DATA: u64 = 0x8000;
/// A page that no page table maps in 64-bit mode.
pub(crate) const UNMAPPED: u64 = 0x2_0000;
/// Bytes of guest memory.
const MEMORY: usize = 1 << 20;
/// Page tables: PML4, PDPT, PD, PT.
pub(crate) const TABLES: u64 = 0x4_0000;

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

pub(crate) struct Guest {
    pub(crate) cpu: Cpu,
    memory: Vec<Page>,
}

impl Guest {
    /// A guest in 64-bit mode at CPL 0, or in flat 32-bit protected mode, or in real mode.
    pub(crate) fn new(size: CodeSize) -> Guest {
        let memory = vec![Page([0; 4096]); MEMORY / 4096];
        let ept = Arc::new(Ept::new());
        let host = memory.as_ptr() as u64;
        ept.set_regions(vec![Region { gpa: 0, size: MEMORY as u64, host, readonly: false }]);
        let mut cpu = Cpu::new(Features::default(), ept);
        cpu.controls.exception_bitmap = !0;
        let mut guest = Guest { cpu, memory };
        guest.enter(size);
        guest
    }

    fn enter(&mut self, size: CodeSize) {
        let flat = |selector, attributes| Segment { base: 0, limit: !0, attributes, selector };
        let real = |attributes| Segment { base: 0, limit: 0xffff, attributes, selector: 0 };
        let (code, data) = match size {
            CodeSize::Bits64 => (flat(8, 0xa09b), flat(16, 0xc093)),
            CodeSize::Bits32 => (flat(8, 0xc09b), flat(16, 0xc093)),
            CodeSize::Bits16 => (real(0x9b), real(0x93)),
        };
        if size == CodeSize::Bits64 {
            self.put(TABLES, &(TABLES + 0x1003).to_le_bytes());
            self.put(TABLES + 0x1000, &(TABLES + 0x2003).to_le_bytes());
            self.put(TABLES + 0x2000, &(TABLES + 0x3003).to_le_bytes());
            for page in 0..(MEMORY as u64 / 4096) {
                let entry = if page * 4096 == UNMAPPED { 0u64 } else { (page * 4096) | 3 };
                self.put(TABLES + 0x3000 + page * 8, &entry.to_le_bytes());
            }
        }
        let state = &mut self.cpu.state;
        if size != CodeSize::Bits16 {
            state.cr0 |= cr0::PE | cr0::NE | cr0::WP;
        }
        if size == CodeSize::Bits64 {
            state.cr0 |= cr0::PG;
            state.cr3 = TABLES;
            state.cr4 = cr4::PAE;
            state.efer = efer::LME | efer::LMA;
        }
        state.segs = [data; 6];
        state.segs[1] = code;
        state.regs = [0; 32];
        state.regs[usize::from(reg::RSP)] = STACK;
        self.cpu.refresh_mode();
    }

    /// Maps [`UNMAPPED`] to the page that has its address.
    pub(crate) fn map_unmapped(&mut self) {
        self.put(TABLES + 0x3000 + UNMAPPED / 4096 * 8, &(UNMAPPED | 3).to_le_bytes());
    }

    /// Maps [`UNMAPPED`] to guest-physical addresses beyond memory.
    pub(crate) fn map_device(&mut self) {
        self.put(TABLES + 0x3000 + UNMAPPED / 4096 * 8, &(MEMORY as u64 | 3).to_le_bytes());
    }

    /// Writes guest memory.
    pub(crate) fn put(&mut self, gpa: u64, bytes: &[u8]) -> &mut Guest {
        assert!(gpa as usize + bytes.len() <= MEMORY);
        let base = self.memory.as_mut_ptr().cast::<u8>();
        // SAFETY: within the vector, as asserted.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), base.add(gpa as usize), bytes.len()) };
        self
    }

    /// Host address of guest memory.
    pub(crate) fn host(&self, gpa: u64) -> u64 {
        self.memory.as_ptr() as u64 + gpa
    }

    /// Reads guest memory.
    pub(crate) fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        assert!(gpa as usize + len <= MEMORY);
        let base = self.memory.as_ptr().cast::<u8>();
        // SAFETY: within the vector, as asserted.
        unsafe { std::slice::from_raw_parts(base.add(gpa as usize), len) }.to_vec()
    }

    /// Reads a word of guest memory, up to 8 bytes.
    pub(crate) fn word(&self, gpa: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(&self.bytes(gpa, len));
        u64::from_le_bytes(bytes)
    }

    /// A general register.
    pub(crate) fn reg(&self, register: u8) -> u64 {
        self.cpu.state.regs[usize::from(register)]
    }

    /// Sets a general register.
    pub(crate) fn set(&mut self, register: u8, value: u64) -> &mut Guest {
        self.cpu.state.regs[usize::from(register)] = value;
        self
    }

    /// The status flags.
    pub(crate) fn flags(&self) -> Rflags {
        Rflags::from_bits_truncate(self.cpu.state.status.to_rflags())
    }

    /// Sets the status flags.
    pub(crate) fn set_flags(&mut self, flags: Rflags) -> &mut Guest {
        self.cpu.state.status = Status::from_rflags(flags.bits());
        self
    }

    /// Runs `code` from its first byte to whatever exits. UD2 follows it.
    pub(crate) fn run(&mut self, code: &[u8]) -> Exit {
        self.put(CODE, &[0x0f, 0x0b].repeat(32));
        self.put(CODE, code);
        self.put(CODE + code.len() as u64, &[0x0f, 0x0b]);
        self.cpu.state.rip = CODE;
        self.cpu.run()
    }

    /// Runs `code`, which must come to its end.
    pub(crate) fn finish(&mut self, code: &[u8]) {
        let exit = self.run(code);
        let end = CODE + code.len() as u64;
        assert_eq!(exit, Exit::Exception(Exception::UD), "{code:02x?} at {:#x}", self.cpu.state.rip);
        assert_eq!(self.cpu.state.rip, end, "{code:02x?}");
    }

    /// Runs `code`, whose first instruction must fault; no register may have changed.
    pub(crate) fn fault(&mut self, code: &[u8]) -> (u8, Option<u32>) {
        let before = (self.cpu.state.regs, self.cpu.state.rflags());
        let exit = self.run(code);
        let Exit::Exception(exception) = exit else { panic!("{code:02x?}: {exit:?}") };
        assert_eq!(self.cpu.state.rip, CODE, "{code:02x?}");
        let slots = usize::from(reg::ZERO);
        assert_eq!(self.cpu.state.regs[..slots], before.0[..slots], "{code:02x?}");
        assert_eq!(self.cpu.state.rflags(), before.1, "{code:02x?}");
        (exception.vector, exception.error_code)
    }
}

/// #GP(0), as [`Guest::fault`] gives it.
pub(crate) const GP0: (u8, Option<u32>) = (vector::GP, Some(0));
/// #PF of a supervisor's write to a page that is not present.
pub(crate) const PF_WRITE: (u8, Option<u32>) = (vector::PF, Some(2));
/// #PF of a supervisor's read of a page that is not present.
pub(crate) const PF_READ: (u8, Option<u32>) = (vector::PF, Some(0));
/// #SS(0).
pub(crate) const SS0: (u8, Option<u32>) = (vector::SS, Some(0));
