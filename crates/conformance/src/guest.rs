//! Runs one instruction on the software processor, in 64-bit mode at CPL 3, with the windows of
//! [`crate::layout`] mapped by four-level page tables to scattered physical pages.
#![expect(unsafe_code, reason = "guest-physical memory is host memory that the processor knows by address")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::sync::Arc;

use silicon::Cpu;
use silicon::flags::Rflags;
use silicon::mmu::ept::{Ept, Region};
use silicon::model::Features;
use silicon::state::{Segment, TableRegister, cr0, cr4, efer};
use silicon::translate::Engine;
use silicon::vmx::Exit;

use crate::host::{self, arrived_at_filler};
use crate::layout::{self, Access, CODE, CODE_SIZE, Contents, DATA, DATA_PAGES, PAGE};
use crate::machine::{Event, Machine};

/// Guest-physical memory in bytes.
const MEMORY: u64 = 64 * PAGE;
const PML4: u64 = PAGE;
const PDPT: u64 = 2 * PAGE;
const DIRECTORY: u64 = 3 * PAGE;
const CODE_TABLE: u64 = 4 * PAGE;
const DATA_TABLE: u64 = 5 * PAGE;
const SYSTEM_TABLE: u64 = 6 * PAGE;
/// Physical page of the task-state segment.
const TASK: u64 = 7 * PAGE;
/// Where the TSS lies; supervisor only.
const TASK_LINEAR: u64 = 0x3000_0000;
/// Physical pages of the windows start here.
const WINDOWS: u64 = 16 * PAGE;

/// Page-table entry bits.
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const NX: u64 = 1 << 63;

/// The guest runs at most this many instructions in a case.
const LIMIT: u64 = 100_000;
/// A limit close enough that the engine steps instruction by instruction.
const STEPPING_LIMIT: u64 = 16;

/// The software processor as an executor of test cases.
pub struct Guest {
    cpu: Cpu,
    memory: Memory,
    /// Selectors of ES to GS.
    selectors: [u16; 6],
    xcr0: u64,
}

/// Guest-physical memory. The processor writes it through its own pointer, so there is no Rust reference to it
/// while the guest runs.
struct Memory(*mut u8);

impl Memory {
    const LAYOUT: Layout = match Layout::from_size_align(MEMORY as usize, PAGE as usize) {
        Ok(layout) => layout,
        Err(_) => panic!("a power of two"),
    };

    fn new() -> Memory {
        // SAFETY: the layout's size is not zero.
        let pointer = unsafe { alloc_zeroed(Memory::LAYOUT) };
        if pointer.is_null() {
            handle_alloc_error(Memory::LAYOUT);
        }
        Memory(pointer)
    }

    fn get(&self, gpa: u64, length: usize) -> &[u8] {
        assert!(gpa + length as u64 <= MEMORY);
        // SAFETY: inside the allocation; the guest does not run while `&self` is held.
        unsafe { std::slice::from_raw_parts(self.0.add(gpa as usize), length) }
    }

    fn get_mut(&mut self, gpa: u64, length: usize) -> &mut [u8] {
        assert!(gpa + length as u64 <= MEMORY);
        // SAFETY: as in `get`, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(gpa as usize), length) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.0, Memory::LAYOUT) };
    }
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("xcr0", &self.xcr0).finish_non_exhaustive()
    }
}

/// Physical page of the window page at `address`: neighbours in one space are not neighbours in the other.
fn physical(address: u64) -> u64 {
    let index = if address >= DATA { 2 + (address - DATA) / PAGE } else { (address - CODE) / PAGE };
    WINDOWS + (index * 7 % 13) * 2 * PAGE + address % PAGE
}

impl Guest {
    /// A processor with `features`, the user selectors of the host and the state components `xcr0`.
    pub fn new(features: Features, selectors: [u16; 6], xcr0: u64) -> Guest {
        Guest::with_engine(features, selectors, xcr0, Engine::configured())
    }

    /// The same with an engine of its own.
    pub fn with_engine(features: Features, selectors: [u16; 6], xcr0: u64, engine: Engine) -> Guest {
        let memory = Memory::new();
        let ept = Arc::new(Ept::new());
        let host = memory.0 as u64;
        ept.set_regions(vec![Region { gpa: 0, size: MEMORY, host, readonly: false }]);
        let mut guest = Guest { cpu: Cpu::with_engine(features, ept, engine), memory, selectors, xcr0 };
        guest.build_tables();
        guest.system_state();
        guest
    }

    fn build_tables(&mut self) {
        let all = PRESENT | WRITE | USER;
        self.put(PML4, PDPT | all);
        self.put(PDPT, DIRECTORY | all);
        self.put(DIRECTORY + (CODE >> 21) * 8, CODE_TABLE | all);
        self.put(DIRECTORY + (DATA >> 21) * 8, DATA_TABLE | all);
        self.put(DIRECTORY + (TASK_LINEAR >> 21) * 8, SYSTEM_TABLE | all);
        self.put(SYSTEM_TABLE, TASK | PRESENT | WRITE | NX);
        // The I/O permission bitmap lies beyond the segment's end, as Linux has it: no port is allowed.
        self.put(TASK + 0x60, 0x8000 << 48);
        for (address, access) in layout::mapped_pages() {
            let table = if address >= DATA { DATA_TABLE } else { CODE_TABLE };
            let entry = table + (address >> 12 & 511) * 8;
            let write = if access == Access::Write { WRITE } else { 0 };
            let nx = if address >= DATA { NX } else { 0 };
            self.put(entry, physical(address) | PRESENT | USER | write | nx);
        }
    }

    fn put(&mut self, address: u64, value: u64) {
        self.memory.get_mut(address, 8).copy_from_slice(&value.to_le_bytes());
    }

    fn system_state(&mut self) {
        let state = &mut self.cpu.state;
        state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        state.cr3 = PML4;
        let wanted = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE | cr4::UMIP;
        let keys = if self.xcr0 & 1 << 9 != 0 { cr4::PKE } else { 0 };
        state.cr4 = (wanted | keys) & self.cpu.features.cr4_mask();
        state.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        state.xcr0 = self.xcr0;
        state.cpl = 3;
        state.gdtr = TableRegister { base: 0, limit: 0 };
        state.idtr = TableRegister { base: 0, limit: 0 };
        state.tr = Segment { base: TASK_LINEAR, limit: 0x67, attributes: 0x8b, selector: 0x40 };
        for (i, selector) in self.selectors.into_iter().enumerate() {
            let attributes = match i {
                1 => 0xa0fb,
                _ if selector & !3 == 0 => Segment::UNUSABLE,
                _ => 0xc0f3,
            };
            state.segs[i] = Segment { base: 0, limit: u32::MAX, attributes, selector };
        }
        self.cpu.controls.exception_bitmap = u32::MAX;
    }

    /// `length` bytes of window memory, within one page.
    pub fn bytes_mut(&mut self, address: u64, length: usize) -> &mut [u8] {
        self.memory.get_mut(physical(address), length)
    }

    /// As [`Guest::bytes_mut`], to read.
    pub fn bytes(&self, address: u64, length: usize) -> &[u8] {
        self.memory.get(physical(address), length)
    }

    /// Writes the initial contents.
    pub fn prepare(&mut self, contents: &Contents) {
        for (address, bytes) in contents.pages() {
            self.bytes_mut(*address, PAGE as usize).copy_from_slice(bytes);
        }
    }

    /// Runs from `machine` until an exception or another exit. With `stepping` the engine looks around after
    /// every instruction, else it runs blocks.
    pub fn run(&mut self, machine: &Machine, stepping: bool) -> (Event, Machine) {
        let limit = if stepping { STEPPING_LIMIT } else { LIMIT };
        self.run_to(machine, self.cpu.instructions() + limit)
    }

    /// As [`Guest::run`], but with no count of instructions to end it: only so does host code go on by itself. The clock does.
    pub fn run_freely(&mut self, machine: &Machine) -> (Event, Machine) {
        let _watch = host::watch(&self.cpu.requests);
        self.run_to(machine, u64::MAX)
    }

    /// Instructions executed so far.
    pub fn instructions(&self) -> u64 {
        self.cpu.instructions()
    }

    fn run_to(&mut self, machine: &Machine, limit: u64) -> (Event, Machine) {
        self.load(machine);
        self.cpu.controls.instruction_limit = limit;
        let event = match self.cpu.run() {
            Exit::Exception(e) => {
                let address = if e.vector == 14 { e.payload } else { 0 };
                Event::Fault { vector: e.vector, error: e.error_code.unwrap_or(0), address }
            }
            Exit::Budget | Exit::ExternalInterrupt => Event::Endless,
            other => Event::Exit(other.name()),
        };
        let after = self.take();
        let event = match event {
            Event::Fault { vector: 6, .. }
                if arrived_at_filler(after.rip, machine.rip, |rip| self.bytes(rip, 1)[0]) =>
            {
                Event::Completed
            }
            other => other,
        };
        (event, after)
    }

    fn load(&mut self, machine: &Machine) {
        let state = &mut self.cpu.state;
        state.regs[..16].copy_from_slice(&machine.gpr);
        state.rip = machine.rip;
        state.set_rflags(machine.rflags | Rflags::IF.bits());
        state.segs[4].base = machine.fs_base;
        state.segs[5].base = machine.gs_base;
        let v = &machine.vectors;
        let x = &mut state.x87;
        (x.fcw, x.fsw, x.ftw, x.fop, x.fip, x.fdp) = (v.fcw, v.fsw, v.ftw, v.fop, v.fip, v.fdp);
        // The host loads its state by XRSTOR64, whose image has no selectors.
        (x.fcs, x.fds) = (0, 0);
        for (slot, st) in x.st.iter_mut().zip(&v.st) {
            *slot = [0; 16];
            slot[..10].copy_from_slice(st);
        }
        state.mxcsr = v.mxcsr;
        state.k = v.k;
        state.pkru = v.pkru;
        for (slot, zmm) in state.zmm.iter_mut().zip(&v.zmm) {
            slot.0 = *zmm;
        }
        self.cpu.refresh_mode();
    }

    fn take(&self) -> Machine {
        let state = &self.cpu.state;
        let mut machine = Machine { rip: state.rip, rflags: state.rflags(), ..Machine::default() };
        machine.gpr.copy_from_slice(&state.regs[..16]);
        machine.fs_base = state.segs[4].base;
        machine.gs_base = state.segs[5].base;
        let v = &mut machine.vectors;
        let x = &state.x87;
        (v.fcw, v.fsw, v.ftw, v.fop, v.fip, v.fdp) = (x.fcw, x.fsw, x.ftw, x.fop, x.fip, x.fdp);
        for (slot, st) in v.st.iter_mut().zip(&x.st) {
            slot.copy_from_slice(&st[..10]);
        }
        v.mxcsr = state.mxcsr;
        v.k = state.k;
        v.pkru = state.pkru;
        for (slot, zmm) in v.zmm.iter_mut().zip(&state.zmm) {
            *slot = zmm.0;
        }
        machine
    }
}

const _: () = assert!(WINDOWS / PAGE + 13 * 2 <= MEMORY / PAGE && DATA_PAGES.len() + 2 <= 13);
const _: () = assert!(CODE_SIZE == 2 * PAGE);
