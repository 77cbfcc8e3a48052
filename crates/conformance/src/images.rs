//! Robustness: random guest images, each run for a bounded number of instructions. Whatever a guest does, the
//! software processor must not panic, crash, hang or keep memory.
//!
//! Kinds of images: random bytes from reset; random bytes in flat 32-bit and in 64-bit mode; and, if there is a
//! kernel, its early code with random mutations. An image is a function of seed and number.
#![expect(unsafe_code, reason = "guest memory is mapped, and dropped by the kernel after each image")]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::null_mut;
use std::sync::Arc;

use silicon::Cpu;
use silicon::mmu::ept::{Ept, Region};
use silicon::model::CpuModel;
use silicon::state::{Segment, TableRegister, cr0, cr4, efer, reg};
use silicon::vmx::{Exit, Injection};

use crate::rng::{Rng, mix};

/// Guest-physical memory in bytes; only what is touched costs anything.
const MEMORY: u64 = 256 << 20;
/// The ROM at the reset vector.
const ROM: u64 = 0xffff_0000;
const ROM_SIZE: u64 = 0x1_0000;
/// Instructions that an image may complete.
const INSTRUCTIONS: u64 = 20_000;
/// Exits (exceptions among them) that an image may cause.
const EXITS: u32 = 3_000;
/// Where a bzImage's protected-mode part goes, and its 64-bit entry in it (Documentation/arch/x86/boot.rst).
const KERNEL: u64 = 0x10_0000;
const ENTRY_64: u64 = KERNEL + 0x200;
const ZERO_PAGE: u64 = 0x1_0000;
const PAGE_TABLES: u64 = 0x2_0000;
const GDT: u64 = 0x3_0000;
const STACK: u64 = 0x8_0000;

/// A kernel to mutate: its boot header, and its protected-mode part in a file that is mapped anew for each image.
#[derive(Debug)]
pub struct Kernel {
    header: Vec<u8>,
    file: File,
    size: u64,
}

impl Kernel {
    /// Takes a bzImage apart; `None` if it is none.
    pub fn parse(image: &[u8]) -> io::Result<Option<Kernel>> {
        if image.get(0x202..0x206) != Some(b"HdrS".as_slice()) {
            return Ok(None);
        }
        let sectors = if image[0x1f1] == 0 { 4 } else { usize::from(image[0x1f1]) };
        let Some(payload) = image.get((sectors + 1) * 512..) else { return Ok(None) };
        let header = image.get(0x1f1..0x290).unwrap_or_default().to_vec();
        // SAFETY: a valid name; the descriptor is new and ours.
        let mut file = unsafe {
            match libc::memfd_create(c"kernel".as_ptr(), libc::MFD_CLOEXEC) {
                -1 => return Err(io::Error::last_os_error()),
                fd => File::from_raw_fd(fd),
            }
        };
        file.write_all(payload)?;
        Ok(Some(Kernel { header, file, size: payload.len() as u64 }))
    }
}

/// Guest memory at a fixed place in this process, emptied between images.
struct Memory {
    low: *mut u8,
    rom: *mut u8,
}

impl Memory {
    fn new() -> io::Result<Memory> {
        Ok(Memory { low: map(null_mut(), MEMORY, None)?, rom: map(null_mut(), ROM_SIZE, None)? })
    }

    /// All zero again, with `kernel` in its place.
    fn reset(&mut self, kernel: Option<&Kernel>) -> io::Result<()> {
        map(self.low, MEMORY, None)?;
        map(self.rom, ROM_SIZE, None)?;
        if let Some(kernel) = kernel {
            // SAFETY: inside the mapping.
            let place = unsafe { self.low.add(KERNEL as usize) };
            map(place, kernel.size, Some(&kernel.file))?;
        }
        Ok(())
    }

    fn slice(&mut self, from: u64, length: u64) -> &mut [u8] {
        let from = from.min(MEMORY);
        let length = length.min(MEMORY - from);
        // SAFETY: inside the mapping; no guest runs while `&mut self` is held.
        unsafe { std::slice::from_raw_parts_mut(self.low.add(from as usize), length as usize) }
    }

    fn rom(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.rom, ROM_SIZE as usize) }
    }

    fn put(&mut self, address: u64, value: u64) {
        self.slice(address, 8).copy_from_slice(&value.to_le_bytes());
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; no guest knows them any more.
        unsafe {
            libc::munmap(self.low.cast(), MEMORY as usize);
            libc::munmap(self.rom.cast(), ROM_SIZE as usize);
        }
    }
}

/// Maps private memory, zero or a copy of `file`; over what is at `place` unless that is null.
fn map(place: *mut u8, length: u64, file: Option<&File>) -> io::Result<*mut u8> {
    let fixed = if place.is_null() { 0 } else { libc::MAP_FIXED };
    let backing = if file.is_some() { 0 } else { libc::MAP_ANONYMOUS };
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | fixed | backing;
    let fd = file.map_or(-1, AsRawFd::as_raw_fd);
    // SAFETY: a fixed mapping goes over one of our own, which nothing uses now.
    let got = unsafe {
        libc::mmap(place.cast(), length as usize, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0)
    };
    if got == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(got.cast()) }
}

/// Runs images one after the other.
pub struct Images {
    model: CpuModel,
    memory: Memory,
    kernel: Option<Kernel>,
}

impl std::fmt::Debug for Images {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Images").field("kernel", &self.kernel).finish_non_exhaustive()
    }
}

/// How an image ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// The instruction limit.
    Instructions,
    /// The exit limit: mostly exceptions in exception handlers.
    Exits,
    /// Triple fault.
    TripleFault,
    /// Halted with interrupts off, or ran where no memory is.
    Stopped,
}

impl Images {
    /// For processors of `model`; with `kernel`, every fourth image is a mutation of it.
    pub fn new(model: CpuModel, kernel: Option<Kernel>) -> io::Result<Images> {
        Ok(Images { model, memory: Memory::new()?, kernel })
    }

    /// Makes image `number` of `seed` and runs it.
    pub fn run(&mut self, seed: u64, number: u64) -> io::Result<End> {
        let mut rng = Rng::new(mix(seed ^ mix(number ^ 0x696d_6167_6573)));
        let kind = number % 4;
        let kernel = self.kernel.as_ref().filter(|_| kind == 3);
        self.memory.reset(kernel)?;
        let ept = Arc::new(Ept::new());
        ept.set_regions(vec![
            Region { gpa: 0, size: MEMORY, host: self.memory.low as u64, readonly: false },
            Region { gpa: ROM, size: ROM_SIZE, host: self.memory.rom as u64, readonly: true },
        ]);
        let mut cpu = Cpu::new(self.model.features(), ept);
        match (kind, kernel.map(|k| k.size)) {
            (3, Some(size)) => self.mutated_kernel(&mut cpu, &mut rng, size),
            (1, _) => self.flat_32(&mut cpu, &mut rng),
            (2, _) => self.long_mode(&mut cpu, &mut rng),
            _ => self.from_reset(&mut rng),
        }
        cpu.refresh_mode();
        Ok(execute(&mut cpu, &mut rng))
    }

    fn from_reset(&mut self, rng: &mut Rng) {
        rng.fill(self.memory.slice(0, 0x1_0000));
        rng.fill(self.memory.rom());
    }

    fn flat_32(&mut self, cpu: &mut Cpu, rng: &mut Rng) {
        rng.fill(self.memory.slice(0, 0x2_0000));
        let state = &mut cpu.state;
        state.cr0 = cr0::PE | cr0::ET | rng.next() & (cr0::MP | cr0::NE | cr0::AM | cr0::WP);
        flat_segments(&mut state.segs, 0xc09b);
        random_registers(state, rng);
    }

    fn long_mode(&mut self, cpu: &mut Cpu, rng: &mut Rng) {
        rng.fill(self.memory.slice(0x1_0000, 0x1_0000));
        self.identity_tables();
        enter_long_mode(cpu);
        let random = rng.next() & (cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::DE | cr4::PGE);
        cpu.state.cr4 |= random & cpu.features.cr4_mask();
        cpu.state.xcr0 = if rng.percent(50) { 7 } else { 1 };
        random_registers(&mut cpu.state, rng);
    }

    /// The state that the 64-bit boot protocol wants, and a few bytes of the early code changed.
    fn mutated_kernel(&mut self, cpu: &mut Cpu, rng: &mut Rng, size: u64) {
        self.identity_tables();
        enter_long_mode(cpu);
        if let Some(kernel) = &self.kernel {
            let header = kernel.header.clone();
            self.memory.slice(ZERO_PAGE + 0x1f1, header.len() as u64).copy_from_slice(&header);
        }
        self.memory.slice(ZERO_PAGE + 0x210, 1)[0] = 0xff;
        self.memory.slice(ZERO_PAGE + 0x1e8, 1)[0] = 1;
        self.memory.put(ZERO_PAGE + 0x2d0 + 8, MEMORY);
        self.memory.slice(ZERO_PAGE + 0x2d0 + 16, 1)[0] = 1;
        cpu.state.rip = ENTRY_64;
        cpu.state.regs[usize::from(reg::RSI)] = ZERO_PAGE;
        cpu.state.regs[usize::from(reg::RSP)] = STACK;
        let tail = size.min(0x2_0000);
        for _ in 0..rng.range(1, 64) {
            // The entry code is at the start; what it relocates and calls is behind the compressed part.
            let at = if rng.percent(50) { rng.below(0x600) } else { size - tail + rng.below(tail) };
            let byte = rng.next() as u8;
            if let Some(slot) = self.memory.slice(KERNEL + at, 1).first_mut() {
                *slot = if rng.percent(50) { byte } else { *slot ^ (1 << (byte & 7)) };
            }
        }
    }

    /// The first 4 GiB by 2 MiB pages, one to one.
    fn identity_tables(&mut self) {
        self.memory.put(PAGE_TABLES, (PAGE_TABLES + 0x1000) | 7);
        for i in 0..4 {
            self.memory.put(PAGE_TABLES + 0x1000 + i * 8, (PAGE_TABLES + 0x2000 + i * 0x1000) | 7);
        }
        for i in 0..2048 {
            self.memory.put(PAGE_TABLES + 0x2000 + i * 8, (i << 21) | 0x87);
        }
        self.memory.put(GDT + 0x10, 0x00af_9b00_0000_ffff);
        self.memory.put(GDT + 0x18, 0x00cf_9300_0000_ffff);
    }
}

fn flat_segments(segments: &mut [Segment; 6], code: u32) {
    for (i, segment) in segments.iter_mut().enumerate() {
        let (attributes, selector) = if i == 1 { (code, 0x10) } else { (0xc093, 0x18) };
        *segment = Segment { base: 0, limit: u32::MAX, attributes, selector };
    }
}

fn enter_long_mode(cpu: &mut Cpu) {
    let state = &mut cpu.state;
    state.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::PG;
    state.cr3 = PAGE_TABLES;
    state.cr4 = cr4::PAE;
    state.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
    state.gdtr = TableRegister { base: GDT, limit: 0x1f };
    state.idtr = TableRegister { base: 0, limit: 0xfff };
    flat_segments(&mut state.segs, 0xa09b);
}

fn random_registers(state: &mut silicon::state::CpuState, rng: &mut Rng) {
    for register in &mut state.regs[..16] {
        *register = if rng.percent(70) { rng.below(0x4_0000) } else { rng.next() };
    }
    state.rip = 0x1_0000 + rng.below(0x8000);
    state.set_rflags(rng.next() & 0x25_0fd5);
}

/// Runs until a limit or a dead end; answers exits with random values.
fn execute(cpu: &mut Cpu, rng: &mut Rng) -> End {
    cpu.controls.exception_bitmap = u32::MAX;
    cpu.controls.instruction_limit = cpu.instructions() + INSTRUCTIONS;
    for _ in 0..EXITS {
        if cpu.injection.is_none() && rng.percent(1) && cpu.interrupt_allowed() {
            cpu.injection = Some(Injection::Interrupt(rng.next() as u8));
        } else if cpu.injection.is_none() && rng.percent(1) && cpu.nmi_allowed() {
            cpu.injection = Some(Injection::Nmi);
        }
        match cpu.run() {
            Exit::Budget => return End::Instructions,
            Exit::TripleFault => return End::TripleFault,
            Exit::FetchFailed { .. } => return End::Stopped,
            Exit::Exception(exception) => cpu.injection = Some(Injection::Exception(exception)),
            Exit::Io(_) | Exit::EptViolation(_) => cpu.complete_read(rng.next()),
            Exit::Hlt if !cpu.interrupt_allowed() => return End::Stopped,
            Exit::Cpuid | Exit::Rdmsr { .. } => {
                for register in [reg::RAX, reg::RDX] {
                    cpu.state.regs[usize::from(register)] = u64::from(rng.next() as u32);
                }
                cpu.skip_instruction();
            }
            Exit::ExternalInterrupt | Exit::InterruptWindow | Exit::NmiWindow | Exit::MonitorTrap => {}
            _ => cpu.skip_instruction(),
        }
    }
    End::Exits
}

/// Resident memory of this process in bytes.
pub fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    pages * 4096
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_ends_the_same_way_each_time() {
        let mut images = Images::new(CpuModel::default(), None).unwrap();
        for number in 0..40 {
            let first = images.run(1, number).unwrap();
            assert_eq!(images.run(1, number).unwrap(), first, "image {number}");
        }
    }

    #[test]
    fn what_is_no_bzimage_is_no_kernel() {
        assert!(Kernel::parse(b"").unwrap().is_none());
        assert!(Kernel::parse(&[0; 4096]).unwrap().is_none());
    }
}
