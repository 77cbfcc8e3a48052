//! Random machine states: a mode with its registers, descriptor tables and page tables, mostly sane and partly
//! spoiled, so that guests get far before they meet something strange.

use conformance::rng::Rng;
use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};

use crate::image::{Contents, Image, Slot, Start};
use crate::stream::Stream;

/// Bytes of memory at address 0.
pub const RAM: u64 = 1 << 20;
/// Where tables and code lie.
pub const GDT: u64 = 0x1000;
/// Interrupt descriptor table; the real-mode vector table lies at 0.
pub const IDT: u64 = 0x2000;
/// Task state segments, with I/O bitmaps.
pub const TSS: u64 = 0x3000;
/// Exception handlers.
pub const HANDLERS: u64 = 0x6000;
/// Page tables.
pub const TABLES: u64 = 0x1_0000;
/// Code.
pub const CODE: u64 = 0x8000;
/// Data.
pub const DATA: u64 = 0x4_0000;
/// Initial stack pointer.
pub const STACK: u64 = 0xf000;

/// Modes of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real-address mode.
    Real,
    /// Virtual-8086 mode.
    Virtual8086,
    /// Protected mode, 16-bit code.
    Protected16,
    /// Protected mode, 32-bit code.
    Protected32,
    /// Compatibility mode, 32-bit code.
    Compatibility,
    /// 64-bit mode.
    Long,
}

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 6] = [
        Mode::Real,
        Mode::Virtual8086,
        Mode::Protected16,
        Mode::Protected32,
        Mode::Compatibility,
        Mode::Long,
    ];

    /// Code size.
    pub fn bits(self) -> u32 {
        match self {
            Mode::Real | Mode::Virtual8086 | Mode::Protected16 => 16,
            Mode::Protected32 | Mode::Compatibility => 32,
            Mode::Long => 64,
        }
    }

    fn ia32e(self) -> bool {
        matches!(self, Mode::Compatibility | Mode::Long)
    }

    /// Code size of exception handlers.
    fn handler_bits(self) -> u32 {
        match self {
            Mode::Real => 16,
            Mode::Compatibility | Mode::Long => 64,
            _ => 32,
        }
    }
}

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA_LME: u64 = 0x500;
/// A task switch's new TSS, and the 64 KiB segment selectors of the GDT.
const CODE32: u16 = 0x08;
const DATA32: u16 = 0x10;
const CODE16: u16 = 0x18;
const DATA16: u16 = 0x20;
const CODE64: u16 = 0x28;
const TSS_BUSY: u16 = 0x50;

/// A machine while it is made.
pub struct Machine<'a> {
    /// Source of everything random.
    pub rng: &'a mut Rng,
    /// Mode of the first instruction.
    pub mode: Mode,
    /// Memory at address 0.
    pub ram: Vec<u8>,
    /// In percent: how much of the tables is spoiled.
    pub spoil: u64,
    cpl: u8,
}

impl<'a> Machine<'a> {
    /// A machine in `mode`, or else in a random one.
    pub fn new(rng: &'a mut Rng, mode: Option<Mode>, spoil: u64) -> Machine<'a> {
        let mode = mode.unwrap_or_else(|| rng.pick(&Mode::ALL));
        Machine::in_mode(rng, mode, spoil)
    }

    /// A machine in `mode`.
    pub fn in_mode(rng: &'a mut Rng, mode: Mode, spoil: u64) -> Machine<'a> {
        let cpl = match mode {
            Mode::Real => 0,
            Mode::Virtual8086 => 3,
            _ if rng.percent(70) => 0,
            _ => 3,
        };
        Machine { rng, mode, ram: vec![0; RAM as usize], spoil, cpl }
    }

    /// Puts bytes into memory.
    pub fn put(&mut self, gpa: u64, bytes: &[u8]) {
        let from = gpa.min(RAM) as usize;
        let to = (from + bytes.len()).min(RAM as usize);
        self.ram[from..to].copy_from_slice(&bytes[..to - from]);
    }

    fn put_quad(&mut self, gpa: u64, value: u64) {
        self.put(gpa, &value.to_le_bytes());
    }

    /// Fills code memory with random instructions of the mode's code size and gives the image.
    pub fn with_random_code(mut self, limit: u64) -> Image {
        let bits = self.mode.bits();
        let code = Stream::new(self.rng, bits, &[DATA, STACK, CODE, TABLES, GDT]).code(CODE, 0x1000);
        self.put(CODE, &code);
        // The end of the first 64 KiB, and of the page that is mapped at the end of the address space.
        let top = Stream::new(self.rng, bits, &[DATA, STACK]).code(0, 0x80);
        self.put(0xff80, &top);
        let at_the_end = self.rng.percent(8);
        let end = match self.mode {
            Mode::Real | Mode::Virtual8086 | Mode::Protected16 => 0xffff,
            Mode::Protected32 | Mode::Compatibility => 0xffff_ffff,
            Mode::Long => self.rng.pick(&[!0, 0x7fff_ffff_ffff]),
        };
        let mut image = self.finish(limit);
        if let Some(Contents::Bytes(ram)) = image.slots.first_mut().map(|slot| &mut slot.contents) {
            let page = DATA as usize + 0xf80;
            ram[page..page + 0x80].copy_from_slice(&top);
        }
        if let Some(regs) = image.cpus.first_mut().and_then(|cpu| cpu.regs.as_mut()).filter(|_| at_the_end) {
            regs.rip = end - 0x7f;
        }
        image
    }

    /// Writes the tables and gives the image.
    pub fn finish(mut self, limit: u64) -> Image {
        let mut data = [0; 0x2000];
        self.rng.fill(&mut data);
        self.put(DATA, &data);
        let sregs = self.system();
        let start = Start {
            regs: Some(self.registers()),
            sregs: Some(Box::new(sregs)),
            fpu: self.rng.percent(50).then(|| Box::new(self.fpu())),
            debugregs: self.rng.percent(10).then(|| self.debug_registers()),
            msrs: self.msrs(),
            xcr0: self.rng.percent(70).then(|| self.rng.pick(&[1, 3, 7, 0xe7, 0x2e7, 0x6_02e7])),
            vectors: self.rng.percent(50).then(|| self.rng.next()),
        };
        let mut slots = vec![Slot::ram(0, self.ram)];
        if self.rng.percent(30) {
            slots.push(Slot::rom(RAM, vec![0x90; 0x4000]));
        }
        let mut image = Image::new(slots, start, limit);
        image.irqchip = self.rng.percent(15);
        image.cripple = if self.rng.percent(20) { 10 } else { 0 };
        image
    }

    /// Random MSRs that bear on control transfers.
    fn msrs(&mut self) -> Vec<(u32, u64)> {
        let code = self.rng.next();
        [(0xc000_0081, code << 32), (0x174, 8), (0x175, STACK), (0x176, CODE), (0xc000_0082, CODE)]
            .into_iter()
            .chain([(0xc000_0084, code >> 13), (0xc000_0100, DATA), (0xc000_0101, DATA), (0xc000_0102, code)])
            .filter(|_| self.rng.percent(60))
            .collect()
    }

    fn registers(&mut self) -> kvm_regs {
        let mut draw = || {
            let rng = &mut *self.rng;
            match rng.below(9) {
                0 => rng.next(),
                1 => rng.below(64),
                // Around the ends of the address spaces.
                8 => rng.pick(&[!0, 0xffff_ffff, 0xffff, 0x7fff_ffff_ffff]) - rng.below(96),
                2 => rng.pick(&[0, 1, !0, 1 << 63, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, 0xfee0_0000]),
                3 => CODE + rng.below(0x1000),
                _ => DATA + rng.below(0x2000),
            }
        };
        let mut regs = kvm_regs {
            rax: draw(),
            rbx: draw(),
            rcx: draw() & 0xffff,
            rdx: draw(),
            rsi: draw(),
            rdi: draw(),
            rbp: draw(),
            r8: draw(),
            r9: draw(),
            r10: draw(),
            r11: draw(),
            r12: draw(),
            r13: draw(),
            r14: draw(),
            r15: draw(),
            rsp: STACK,
            rip: CODE,
            rflags: 2,
        };
        regs.rflags |= self.rng.next() & 0xcd5;
        for (percent, bits) in
            [(40, 0x200), (5, 0x100), (20, 0x3000), (5, 0x4000), (5, 0x4_0000), (5, 0x1_0000)]
        {
            if self.rng.percent(percent) {
                regs.rflags |= bits;
            }
        }
        if self.mode == Mode::Virtual8086 {
            regs.rflags |= 1 << 17;
        }
        regs
    }

    fn fpu(&mut self) -> kvm_fpu {
        let rng = &mut *self.rng;
        let (fcw, mxcsr) = (rng.next() as u16, rng.next() as u32 & 0xffff);
        let mut fpu = kvm_fpu {
            fcw: rng.pick(&[0x37f, 0x27f, 0x37f & (fcw | !0x3f), fcw]),
            fsw: rng.next() as u16,
            ftwx: rng.next() as u8,
            mxcsr: rng.pick(&[0x1f80, 0, mxcsr]),
            ..kvm_fpu::default()
        };
        fpu.fpr.iter_mut().for_each(|register| rng.fill(register));
        fpu.xmm.iter_mut().for_each(|register| rng.fill(register));
        fpu
    }

    fn debug_registers(&mut self) -> kvm_debugregs {
        let rng = &mut *self.rng;
        let mut db = [0; 4];
        db.iter_mut().for_each(|address| *address = rng.pick(&[CODE, DATA, STACK]) + rng.below(0x100));
        kvm_debugregs {
            db,
            dr6: 0xffff_0ff0,
            dr7: rng.next() & 0xffff_ffff | 0x400,
            ..kvm_debugregs::default()
        }
    }

    /// System registers, with the tables that they refer to.
    fn system(&mut self) -> kvm_sregs {
        let mut sregs = kvm_sregs::default();
        self.handlers();
        let handlers = self.mode.handler_bits();
        if handlers == 16 {
            self.real_vectors()
        } else {
            self.gates(handlers)
        }
        self.descriptors();
        self.task_state();
        self.segments(&mut sregs);
        let short = self.rng.below(0x1000) as u16;
        let limit = if self.rng.percent(self.spoil) { self.rng.pick(&[0xffff, 0x67, short]) } else { 0xfff };
        let idt = if self.mode == Mode::Real { 0 } else { IDT };
        sregs.gdt = kvm_dtable { base: GDT, limit: 0xff, ..kvm_dtable::default() };
        sregs.idt = kvm_dtable { base: idt, limit, ..kvm_dtable::default() };
        self.control_registers(&mut sregs);
        sregs
    }

    fn control_registers(&mut self, sregs: &mut kvm_sregs) {
        let rng = &mut *self.rng;
        // NE, MP, ET always make sense; WP, AM, TS, EM, CD and NW at random.
        sregs.cr0 = 0x32 | (rng.next() & 0x5_0000);
        if rng.percent(15) {
            sregs.cr0 |= rng.next() & 0x6000_000c;
        }
        // OSFXSR, OSXMMEXCPT, OSXSAVE and at random all others.
        sregs.cr4 = 0x4_0600;
        if rng.percent(60) {
            sregs.cr4 |= rng.next() & 0x77_079f;
        }
        sregs.efer = if rng.percent(70) { 0x801 } else { 0 };
        let paging = match self.mode {
            Mode::Real => false,
            Mode::Compatibility | Mode::Long => true,
            _ => rng.percent(70),
        };
        let pae = self.mode.ia32e() || rng.percent(50);
        if self.mode != Mode::Real {
            sregs.cr0 |= CR0_PE;
        }
        if pae {
            sregs.cr4 |= CR4_PAE;
        }
        if self.mode.ia32e() {
            sregs.efer |= EFER_LMA_LME;
            sregs.cr4 |= if rng.percent(20) { CR4_LA57 } else { 0 };
        }
        if paging {
            sregs.cr0 |= CR0_PG;
        }
        sregs.cr3 = TABLES | if rng.percent(20) { rng.below(0x1000) } else { 0 };
        self.page_tables(sregs.cr4);
    }

    /// Identity-maps the first 2 MiB at least, by tables of the kind that CR4 and the mode ask for, then spoils
    /// some entries.
    fn page_tables(&mut self, cr4: u64) {
        let wide = self.mode.ia32e() || cr4 & CR4_PAE != 0;
        let levels = match (self.mode.ia32e(), wide) {
            (true, _) if cr4 & CR4_LA57 != 0 => 5,
            (true, _) => 4,
            (false, true) => 3,
            (false, false) => 2,
        };
        let mut table = TABLES;
        for level in (2..=levels).rev() {
            // PAE's top level has only the present bit.
            let rights = if level == 3 && levels == 3 { 1 } else { 7 };
            self.entry(wide, table, 0, (table + 0x1000) | rights);
            if level == 4 {
                // The upper half and a table that maps itself.
                self.entry(wide, table, 511, (table + 0x1000) | 7);
                self.entry(wide, table, 510, table | 7);
            }
            table += 0x1000;
        }
        for page in 0..512 {
            self.entry(wide, table, page, page << 12 | 7);
        }
        self.map_top(wide, levels);
        let entries = 512 * levels;
        for _ in 0..entries * self.spoil / 400 {
            let (slot, entry) = (self.rng.below(entries), self.spoiled_entry());
            // The first pages hold tables and code; without them nothing runs at all.
            if slot >= 512 * (levels - 1) + 32 || self.rng.percent(4) {
                self.entry(wide, TABLES + (slot & !511) * 8, slot & 511, entry);
            }
        }
    }

    /// Maps the last page of the address space to data, so that accesses and code can run over its end.
    fn map_top(&mut self, wide: bool, levels: u64) {
        let last = if wide { 511 } else { 1023 };
        for level in 0..levels {
            let table = TABLES + level * 0x1000;
            let top_of_pae = level == 0 && levels == 3;
            let next = if level + 1 == levels { DATA } else { table + 0x1000 };
            let rights = if top_of_pae { 1 } else { 7 };
            self.entry(wide, table, if top_of_pae { 3 } else { last }, next | rights);
        }
    }

    fn spoiled_entry(&mut self) -> u64 {
        let rng = &mut *self.rng;
        match rng.below(5) {
            0 => rng.next(),
            1 => rng.below(RAM) & !0xfff | rng.below(0x200),
            2 => rng.below(RAM) & !0xfff | rng.below(0x200) | rng.next() & 0xf800_0000_0000_0000,
            3 => rng.next() & 0xf_ffff_f000 | 0x87,
            _ => (TABLES + (rng.below(6) << 12)) | 7 | (rng.next() & 0x80),
        }
    }

    fn entry(&mut self, wide: bool, table: u64, index: u64, value: u64) {
        if wide {
            self.put_quad(table + index * 8, value);
        } else {
            // A table of 1024 entries; the second half maps what follows.
            self.put(table + index * 4, &(value as u32).to_le_bytes());
        }
    }

    /// Exception handlers that step over a byte and return, or random code.
    fn handlers(&mut self) {
        let random = self.rng.percent(self.spoil / 2);
        let bits = self.mode.handler_bits();
        for vector in 0..256u64 {
            let at = HANDLERS + vector * 16;
            if random {
                let code = Stream::new(self.rng, bits, &[DATA, STACK]).code(at, 16);
                self.put(at, &code);
                continue;
            }
            let error_code = matches!(vector, 8 | 10..=14 | 17 | 21);
            let mut code: Vec<u8> = match (bits, error_code) {
                (64, true) => vec![0x48, 0x83, 0xc4, 8], // add rsp, 8
                (32, true) => vec![0x83, 0xc4, 4],       // add esp, 4
                _ => Vec::new(),
            };
            code.extend_from_slice(match bits {
                64 => &[0x48, 0xff, 0x04, 0x24, 0x48, 0xcf], // inc qword [rsp]; iretq
                32 => &[0xff, 0x04, 0x24, 0xcf],             // inc dword [esp]; iretd
                _ => &[0x55, 0x89, 0xe5, 0xff, 0x46, 0x02, 0x5d, 0xcf], // inc word [bp + 2] …; iret
            });
            self.put(at, &code);
        }
    }

    fn real_vectors(&mut self) {
        for vector in 0..256u64 {
            let target = HANDLERS + vector * 16;
            let far = if self.rng.percent(self.spoil / 3) { self.rng.next() as u32 } else { target as u32 };
            self.put(vector * 4, &far.to_le_bytes());
        }
    }

    fn gates(&mut self, bits: u32) {
        for vector in 0..256u64 {
            let offset = HANDLERS + vector * 16;
            let kind = self.rng.pick(&[0xeu64, 0xe, 0xe, 0xf]);
            let dpl = if self.rng.percent(50) { 3 } else { 0u64 };
            let ist = if bits == 64 && self.rng.percent(10) { self.rng.below(8) } else { 0 };
            let selector = if bits == 64 { CODE64 } else { CODE32 };
            let mut low = offset & 0xffff
                | u64::from(selector) << 16
                | ist << 32
                | (0x80 | dpl << 5 | kind) << 40
                | (offset >> 16 & 0xffff) << 48;
            if self.rng.percent(self.spoil / 2) {
                low = self.spoiled_gate(low);
            }
            if bits == 64 {
                self.put(IDT + vector * 16, &u128::from(low).to_le_bytes());
            } else {
                self.put_quad(IDT + vector * 8, low);
            }
        }
    }

    fn spoiled_gate(&mut self, good: u64) -> u64 {
        let rng = &mut *self.rng;
        match rng.below(4) {
            0 => rng.next(),
            // Another type: task gate, call gate, 16-bit gate …
            1 => good & !(0xf << 40) | rng.below(16) << 40,
            // Another selector.
            2 => good & !(0xffff << 16) | rng.below(0x60) << 16,
            _ => good ^ 1 << rng.below(64),
        }
    }

    fn descriptors(&mut self) {
        let table = [
            0,
            0x00cf_9b00_0000_ffff, // 08: 32-bit code
            0x00cf_9300_0000_ffff, // 10: 32-bit data
            0x000f_9b00_0000_ffff, // 18: 16-bit code
            0x000f_9300_0000_ffff, // 20: 16-bit data
            0x00af_9b00_0000_ffff, // 28: 64-bit code
            0x00cf_fb00_0000_ffff, // 30: 32-bit code, DPL 3
            0x00cf_f300_0000_ffff, // 38: 32-bit data, DPL 3
            0x00af_fb00_0000_ffff, // 40: 64-bit code, DPL 3
            0x0000_ec00_0008_6000, // 48: call gate
            0x0000_8b00_3000_0fff, // 50: busy TSS, two slots
            0,
            0x0000_8900_5000_0067, // 60: available TSS, two slots
            0,
            0x0000_8200_1000_00ff, // 70: LDT, two slots
            0,
        ];
        for i in 0..32u64 {
            let mut entry = table.get(i as usize).copied().unwrap_or_else(|| self.rng.next());
            if self.rng.percent(self.spoil / 3) {
                entry = if self.rng.percent(50) { self.rng.next() } else { entry ^ 1 << self.rng.below(64) };
            }
            self.put_quad(GDT + i * 8, entry);
        }
    }

    /// The task state: stacks for every level in both layouts, an I/O bitmap, and a task to switch to.
    fn task_state(&mut self) {
        let rng = &mut *self.rng;
        let mut tss = [0; 0x1000];
        rng.fill(&mut tss[..0x1000]);
        if self.mode.ia32e() {
            for at in (4..0x5c).step_by(8) {
                tss[at..at + 8].copy_from_slice(&(STACK - 0x800).to_le_bytes());
            }
        } else {
            for level in 0..3 {
                let at = 4 + level * 8;
                tss[at..at + 4].copy_from_slice(&(STACK as u32 - 0x800).to_le_bytes());
                tss[at + 4..at + 8].copy_from_slice(&u32::from(DATA32).to_le_bytes());
            }
        }
        tss[0x66..0x68].copy_from_slice(&(rng.pick(&[0x68u16, 0x68, 0xfff, 0x1000, 0xffff])).to_le_bytes());
        let mut other = [0u32; 26];
        let registers = [TABLES as u32, CODE as u32, 2, 1, 2, 3, 4, STACK as u32, 5, 6, 7];
        other[7..18].copy_from_slice(&registers);
        for (i, slot) in other[18..24].iter_mut().enumerate() {
            *slot = u32::from(if i == 1 { CODE32 } else { DATA32 });
        }
        let other: Vec<u8> = other.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.put(TSS, &tss);
        self.put(0x5000, &other);
    }

    fn segments(&mut self, sregs: &mut kvm_sregs) {
        let real =
            |base| kvm_segment { base, limit: 0xffff, type_: 3, present: 1, s: 1, ..kvm_segment::default() };
        if matches!(self.mode, Mode::Real | Mode::Virtual8086) {
            let dpl = self.cpl;
            let segment = |base: u64| kvm_segment { dpl, selector: (base >> 4) as u16, ..real(base) };
            let elsewhere = self.rng.below(0xf000) << 4;
            (sregs.cs, sregs.ss, sregs.es) = (segment(0), segment(0), segment(elsewhere));
            (sregs.ds, sregs.fs, sregs.gs) = (segment(0x3_8000), segment(elsewhere), segment(0));
        } else {
            let flat = |selector: u16, type_, db, l| kvm_segment {
                limit: !0,
                selector: selector | u16::from(self.cpl),
                type_,
                present: 1,
                dpl: self.cpl,
                s: 1,
                g: 1,
                db,
                l,
                ..kvm_segment::default()
            };
            let user = if self.cpl == 3 { 0x28 } else { 0 };
            sregs.cs = match self.mode {
                Mode::Protected16 => kvm_segment { limit: 0xf_ffff, g: 0, ..flat(CODE16, 11, 0, 0) },
                Mode::Long => flat(if user != 0 { 0x40 } else { CODE64 }, 11, 0, 1),
                _ => flat(CODE32 + user, 11, 1, 0),
            };
            let data = match self.mode {
                Mode::Protected16 => kvm_segment { limit: 0xf_ffff, g: 0, ..flat(DATA16, 3, 0, 0) },
                _ => flat(DATA32 + user, 3, 1, 0),
            };
            (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
        }
        sregs.tr = kvm_segment {
            base: TSS,
            limit: 0xfff,
            selector: TSS_BUSY,
            type_: 11,
            present: 1,
            ..kvm_segment::default()
        };
        sregs.ldt = kvm_segment {
            base: GDT,
            limit: 0xff,
            selector: 0x70,
            type_: 2,
            present: 1,
            ..kvm_segment::default()
        };
        if self.rng.percent(self.spoil / 2) {
            let segment = self.rng.below(4);
            let chosen = match segment {
                0 => &mut sregs.ds,
                1 => &mut sregs.es,
                2 => &mut sregs.fs,
                _ => &mut sregs.ss,
            };
            spoil_segment(self.rng, chosen);
        }
    }
}

fn spoil_segment(rng: &mut Rng, segment: &mut kvm_segment) {
    match rng.below(5) {
        0 => segment.base = rng.next(),
        1 => segment.limit = rng.next() as u32,
        2 => segment.type_ = rng.below(16) as u8,
        3 => segment.unusable = 1,
        _ => segment.db ^= 1,
    }
}
