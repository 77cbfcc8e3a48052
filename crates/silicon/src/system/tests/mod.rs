//! A small machine for tests of everything that goes through descriptor tables: GDT, IDT whose every handler
//! is a HLT at a known address, TSS, flat code and data at levels 0 and 3, identity paging in IA-32e mode.

mod bus_locks;
mod debug;
mod delivery;
mod flags;
mod notify;
mod random;
mod segments;
mod smm;
mod tasks;
mod transfers;
mod v8086;
mod ve;

use std::sync::Arc;

use crate::cpu::Cpu;
use crate::mmu::ept::{Ept, Region};
use crate::model::CpuModel;
use crate::state::{Seg, Segment, TableRegister, cr0, cr4, efer, reg};
use crate::vmx::Exit;

const MEMORY: usize = 4 << 20;
/// Tables.
pub(super) const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
pub(super) const LDT: u64 = 0x3000;
pub(super) const TSS: u64 = 0x4000;
pub(super) const TSS2: u64 = 0x5000;
/// Level 0: code and initial stack pointer.
pub(super) const CODE0: u64 = 0x1_0000;
pub(super) const STACK0: u64 = 0x1_8000;
/// Level 3.
pub(super) const CODE3: u64 = 0x2_0000;
pub(super) const STACK3: u64 = 0x2_8000;
/// What the TSS gives for level 0, and its first interrupt stack.
pub(super) const TSS_STACK: u64 = 0x3_8000;
pub(super) const IST1: u64 = 0x4_8000;
/// Handler of vector v is at `HANDLERS + 16 * v`.
pub(super) const HANDLERS: u64 = 0x5_0000;
/// Free memory.
pub(super) const DATA: u64 = 0x6_0000;
const TABLES: u64 = 0x10_0000;

/// Selectors of the descriptors that every machine has.
pub(super) mod sel {
    pub(crate) const CODE0: u16 = 0x08;
    pub(crate) const DATA0: u16 = 0x10;
    pub(crate) const CODE3: u16 = 0x1b;
    pub(crate) const DATA3: u16 = 0x23;
    pub(crate) const CODE0_64: u16 = 0x28;
    pub(crate) const CODE3_64: u16 = 0x33;
    pub(crate) const CODE0_16: u16 = 0x38;
    pub(crate) const CONFORMING0: u16 = 0x40;
    pub(crate) const ABSENT_DATA0: u16 = 0x48;
    pub(crate) const TSS: u16 = 0x50;
    pub(crate) const TSS2: u16 = 0x60;
    pub(crate) const LDT: u16 = 0x70;
    pub(crate) const READ_ONLY0: u16 = 0x80;
    pub(crate) const EXECUTE_ONLY0: u16 = 0x88;
    pub(crate) const ABSENT_CODE0: u16 = 0x90;
    pub(crate) const DATA0_16: u16 = 0x98;
    /// Free, 16 bytes.
    pub(crate) const GATE: u16 = 0xa0;
    pub(crate) const LAST: u16 = 0xaf;
    /// Beyond the limit.
    pub(crate) const OUTSIDE: u16 = 0x100;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Real,
    Protected,
    Long,
}

/// An 8-byte descriptor; `rights` is byte 5, `flags` the G, D/B, L, AVL nibble.
pub(super) fn descriptor(base: u64, limit: u64, rights: u64, flags: u64) -> u64 {
    (limit & 0xffff)
        | ((base & 0xff_ffff) << 16)
        | (rights << 40)
        | ((limit & 0xf_0000) << 32)
        | (flags << 52)
        | ((base & 0xff00_0000) << 32)
}

/// The first eight bytes of a gate of `kind` to `selector:offset`.
pub(super) fn gate(kind: u64, dpl: u64, selector: u16, offset: u64, extra: u64) -> u64 {
    (offset & 0xffff)
        | (u64::from(selector) << 16)
        | (extra << 32)
        | ((0x80 | (dpl << 5) | kind) << 40)
        | ((offset & 0xffff_0000) << 32)
}

pub(super) struct Machine {
    pub(super) cpu: Cpu,
    memory: Box<[u64]>,
    mode: Mode,
}

impl Machine {
    pub(super) fn new(mode: Mode) -> Machine {
        let memory = vec![0; MEMORY / 8].into_boxed_slice();
        let ept = Arc::new(Ept::new());
        let cpu = Cpu::new(CpuModel::default().features(), ept.clone());
        // Guest-physical page 0 lies on a host page boundary within the allocation.
        let mut machine = Machine { cpu, memory, mode };
        let host = machine.base();
        let size = MEMORY as u64 - 4096;
        ept.set_regions(vec![Region { gpa: 0, size, host, readonly: false }]);
        machine.build_tables();
        machine.enter();
        machine
    }

    pub(super) fn base(&self) -> u64 {
        (self.memory.as_ptr() as u64).next_multiple_of(4096)
    }

    fn byte_offset(&self, gpa: u64) -> usize {
        (self.base() - self.memory.as_ptr() as u64 + gpa) as usize
    }

    pub(super) fn put(&mut self, gpa: u64, bytes: &[u8]) {
        let at = self.byte_offset(gpa);
        for (i, byte) in bytes.iter().enumerate() {
            let (word, shift) = ((at + i) / 8, 8 * ((at + i) % 8));
            self.memory[word] = (self.memory[word] & !(0xff << shift)) | (u64::from(*byte) << shift);
        }
    }

    pub(super) fn put_word(&mut self, gpa: u64, size: usize, value: u64) {
        self.put(gpa, &value.to_le_bytes()[..size]);
    }

    pub(super) fn word(&self, gpa: u64, size: usize) -> u64 {
        let at = self.byte_offset(gpa);
        (0..size).fold(0, |value, i| {
            let byte = (self.memory[(at + i) / 8] >> (8 * ((at + i) % 8))) & 0xff;
            value | (byte << (8 * i))
        })
    }

    /// Writes a GDT entry.
    pub(super) fn gdt(&mut self, selector: u16, low: u64) {
        self.put_word(GDT + u64::from(selector & !7), 8, low);
    }

    pub(super) fn gdt_entry(&self, selector: u16) -> u64 {
        self.word(GDT + u64::from(selector & !7), 8)
    }

    /// Writes an IDT entry; in IA-32e mode its upper half is zero.
    pub(super) fn idt(&mut self, vector: u8, low: u64) {
        let size = if self.mode == Mode::Long { 16 } else { 8 };
        self.put_word(IDT + u64::from(vector) * size, 8, low);
    }

    /// The handler's address.
    pub(super) fn handler(vector: u8) -> u64 {
        HANDLERS + 16 * u64::from(vector)
    }

    fn build_tables(&mut self) {
        let flat = |rights, flags| descriptor(0, 0xf_ffff, rights, flags);
        for (selector, low) in [
            (sel::CODE0, flat(0x9b, 0xc)),
            (sel::DATA0, flat(0x93, 0xc)),
            (sel::CODE3, flat(0xfb, 0xc)),
            (sel::DATA3, flat(0xf3, 0xc)),
            (sel::CODE0_64, flat(0x9b, 0xa)),
            (sel::CODE3_64, flat(0xfb, 0xa)),
            (sel::CODE0_16, descriptor(0, 0xffff, 0x9b, 0)),
            (sel::CONFORMING0, flat(0x9f, 0xc)),
            (sel::ABSENT_DATA0, flat(0x13, 0xc)),
            (sel::TSS, descriptor(TSS, 0x1ff, 0x8b, 0)),
            (sel::TSS2, descriptor(TSS2, 0x67, 0x89, 0)),
            (sel::LDT, descriptor(LDT, 0xff, 0x82, 0)),
            (sel::READ_ONLY0, flat(0x91, 0xc)),
            (sel::EXECUTE_ONLY0, flat(0x99, 0xc)),
            (sel::ABSENT_CODE0, flat(0x1b, 0xc)),
            (sel::DATA0_16, descriptor(0, 0xffff, 0x93, 0)),
        ] {
            self.gdt(selector, low);
        }
        let code = if self.mode == Mode::Long { sel::CODE0_64 } else { sel::CODE0 };
        for vector in 0..=255 {
            self.put(Machine::handler(vector), &[0xf4]);
            if self.mode == Mode::Real {
                let entry = ((HANDLERS >> 4) << 16) | (16 * u64::from(vector));
                self.put_word(4 * u64::from(vector), 4, entry);
            } else {
                self.idt(vector, gate(14, 0, code, Machine::handler(vector), 0));
            }
        }
        if self.mode == Mode::Long {
            self.put_word(TSS + 4, 8, TSS_STACK);
            self.put_word(TSS + 36, 8, IST1);
        } else {
            self.put_word(TSS + 4, 4, TSS_STACK);
            self.put_word(TSS + 8, 4, u64::from(sel::DATA0));
        }
        self.put_word(TSS + 102, 2, 136);
        // Identity map with a page table: user, writable.
        self.put_word(TABLES, 8, (TABLES + 0x1000) | 7);
        self.put_word(TABLES + 0x1000, 8, (TABLES + 0x2000) | 7);
        for n in 0..2 {
            self.put_word(TABLES + 0x2000 + 8 * n, 8, (TABLES + 0x3000 + 0x1000 * n) | 7);
        }
        for page in 0..(MEMORY as u64 / 4096 - 1) {
            self.put_word(TABLES + 0x3000 + 8 * page, 8, (page << 12) | 7);
        }
    }

    /// Removes the page of `lin` from the identity map (IA-32e mode).
    pub(super) fn unmap(&mut self, lin: u64) {
        self.put_word(TABLES + 0x3000 + 8 * (lin >> 12), 8, 0);
        self.cpu.flush_all(false);
    }

    /// Makes the page of `lin` a supervisor's (IA-32e mode).
    pub(super) fn supervisor(&mut self, lin: u64) {
        self.put_word(TABLES + 0x3000 + 8 * (lin >> 12), 8, (lin & !0xfff) | 3);
        self.cpu.flush_all(false);
    }

    fn enter(&mut self) {
        let state = &mut self.cpu.state;
        state.gdtr = TableRegister { base: GDT, limit: sel::LAST };
        state.idtr = match self.mode {
            Mode::Real => TableRegister { base: 0, limit: 0x3ff },
            Mode::Protected => TableRegister { base: IDT, limit: 0x7ff },
            Mode::Long => TableRegister { base: IDT, limit: 0xfff },
        };
        state.tr = Segment { base: TSS, limit: 0x1ff, attributes: 0x8b, selector: sel::TSS };
        state.ldtr = Segment::null(0, 0);
        if self.mode == Mode::Real {
            let data = Segment { base: 0, limit: 0xffff, attributes: 0x93, selector: 0 };
            state.segs = [data; 6];
            state.segs[1] = Segment { attributes: 0x9b, ..data }.real((CODE0 >> 4) as u16);
            state.segs[2] = data.real(((STACK0 - 0x8000) >> 4) as u16);
            state.rip = 0;
            state.regs[usize::from(reg::RSP)] = 0x8000;
            self.cpu.refresh_mode();
            return;
        }
        state.cr0 = cr0::PE | cr0::ET | cr0::NE;
        if self.mode == Mode::Long {
            state.cr0 |= cr0::PG;
            state.cr3 = TABLES;
            state.cr4 = cr4::PAE;
            state.efer = efer::LME | efer::LMA | efer::SCE;
        }
        self.cpu.paging_changed();
        self.cpu.cr3_loaded(false);
        self.set_ring(0);
    }

    /// Flat code and data of `cpl`; RIP and RSP at that level's.
    pub(super) fn set_ring(&mut self, cpl: u8) {
        let (code, data) = match (self.mode, cpl) {
            (Mode::Long, 0) => (sel::CODE0_64, sel::DATA0),
            (Mode::Long, _) => (sel::CODE3_64, sel::DATA3),
            (_, 0) => (sel::CODE0, sel::DATA0),
            (_, _) => (sel::CODE3, sel::DATA3),
        };
        self.set_code(code);
        let data = self.segment(data);
        self.cpu.state.segs[Seg::Ss as usize] = data;
        for seg in [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
            self.cpu.state.segs[seg as usize] = data;
        }
        self.cpu.state.rip = if cpl == 0 { CODE0 } else { CODE3 };
        self.cpu.state.regs[usize::from(reg::RSP)] = if cpl == 0 { STACK0 } else { STACK3 };
        self.cpu.refresh_mode();
    }

    /// Puts `selector`'s descriptor into CS as it is.
    pub(super) fn set_code(&mut self, selector: u16) {
        self.cpu.state.segs[Seg::Cs as usize] = self.segment(selector);
        self.cpu.state.cpl = (selector & 3) as u8;
        self.cpu.refresh_mode();
    }

    /// The segment register that `selector` gives.
    pub(super) fn segment(&self, selector: u16) -> Segment {
        let low = self.gdt_entry(selector);
        crate::system::segment::Descriptor { low, high: 0, address: 0 }.segment(selector)
    }

    /// Loads a data segment register as it is.
    pub(super) fn set_segment(&mut self, seg: Seg, selector: u16) {
        let segment = self.segment(selector);
        self.cpu.set_segment(seg, segment);
    }

    pub(super) fn reg(&self, register: u8) -> u64 {
        self.cpu.state.regs[usize::from(register)]
    }

    pub(super) fn set(&mut self, register: u8, value: u64) {
        self.cpu.state.regs[usize::from(register)] = value;
    }

    pub(super) fn selector(&self, seg: Seg) -> u16 {
        self.cpu.state.segs[seg as usize].selector
    }

    /// Linear address of the next instruction.
    fn code(&self) -> u64 {
        self.cpu.code_linear()
    }

    /// Puts words of `size` bytes on the stack, the first one on top.
    pub(super) fn stack(&mut self, size: usize, words: &[u64]) {
        let top = self.reg(reg::RSP) - (size * words.len()) as u64;
        let base = if self.mode == Mode::Long { 0 } else { self.cpu.state.segs[Seg::Ss as usize].base };
        for (i, word) in words.iter().enumerate() {
            self.put_word(base + top + (size * i) as u64, size, *word);
        }
        self.set(reg::RSP, top);
    }

    /// The word `n` of `size` bytes from the top of the stack.
    pub(super) fn top(&self, n: usize, size: usize) -> u64 {
        let long = self.cpu.state.code_size.bits() == 64;
        let base = if long { 0 } else { self.cpu.state.segs[Seg::Ss as usize].base };
        self.word(base + self.reg(reg::RSP) + (n * size) as u64, size)
    }

    /// Runs `code` at RIP; a HLT follows it.
    pub(super) fn run(&mut self, code: &[u8]) -> Exit {
        let at = self.code();
        self.put(at, code);
        self.put(at + code.len() as u64, &[0xf4]);
        self.cpu.run()
    }

    /// Runs `code`, which must come to its end.
    pub(super) fn finish(&mut self, code: &[u8]) {
        let end = self.code() + code.len() as u64;
        let exit = self.run(code);
        assert_eq!((exit, self.code()), (Exit::Hlt, end), "{code:02x?}");
    }

    /// The vector whose handler the CPU is in.
    pub(super) fn vector(&self) -> Option<u8> {
        let at = self.code().checked_sub(HANDLERS)?;
        if at % 16 == 0 { u8::try_from(at / 16).ok() } else { None }
    }

    /// Runs `code`, whose first instruction must fault; vector and error code.
    pub(super) fn fault(&mut self, code: &[u8]) -> (u8, Option<u64>) {
        let (at, selector) = (self.cpu.state.rip, self.selector(Seg::Cs));
        let exit = self.run(code);
        assert_eq!(exit, Exit::Hlt, "{code:02x?}");
        let Some(vector) = self.vector() else {
            panic!("{code:02x?}: no handler, but {:#x}", self.cpu.state.rip)
        };
        let size = match self.mode {
            Mode::Real => 2,
            Mode::Protected => 4,
            Mode::Long => 8,
        };
        let has_code = matches!(vector, 8 | 10..=14 | 17) && self.mode != Mode::Real;
        let frame = usize::from(has_code);
        assert_eq!(self.top(frame, size), at, "{code:02x?}: vector {vector}, return address");
        assert_eq!(self.top(frame + 1, size), u64::from(selector), "{code:02x?}: vector {vector}, CS");
        (vector, has_code.then(|| self.top(0, size)))
    }
}

/// Little-endian bytes of a far pointer with a 32-bit offset.
pub(super) fn far32(offset: u64, selector: u16) -> Vec<u8> {
    [&(offset as u32).to_le_bytes()[..], &selector.to_le_bytes()].concat()
}
