//! Task switching (SDM vol. 3A, chapter 7).

use crate::cpu::{Cpu, Pending};
use crate::exception::{Abort, Exception};
use crate::flags::Rflags;
use crate::state::{Seg, Segment, cr0, cr4, reg};
use crate::system::debug::{DR6_BT, dr7};
use crate::system::segment::{Descriptor, code, is_null, kind, rpl};
use crate::vmx::{Exit, Space};

/// How a task switch relates the two tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nesting {
    /// JMP: the old task is left.
    Jump,
    /// CALL, interrupt or exception: the new task's back link leads to the old one.
    Nested,
    /// IRET with NT set: back along the link.
    Return,
}

/// How a task switch begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TaskEntry {
    /// Relation of the tasks.
    pub(crate) nesting: Nesting,
    /// EIP that the old task goes on at.
    pub(crate) return_ip: u64,
    /// EFLAGS that are saved for the old task.
    pub(crate) flags: u64,
}

/// Where a TSS keeps things (SDM vol. 3A, figures 7-2 and 7-10).
struct Layout {
    /// Bytes that the dynamic part needs, less one.
    limit: u32,
    /// Width of EIP, EFLAGS and the general registers.
    word: u64,
    /// EIP, followed by EFLAGS and the eight general registers.
    ip: u64,
    /// ES, followed by CS, SS, DS (and FS, GS) one `word` apart.
    segments: u64,
    /// How many segment registers there are.
    segment_count: usize,
    /// LDT selector.
    ldt: u64,
}

const WIDE: Layout = Layout { limit: 0x67, word: 4, ip: 0x20, segments: 0x48, segment_count: 6, ldt: 0x60 };
const NARROW: Layout = Layout { limit: 0x2b, word: 2, ip: 0xe, segments: 0x22, segment_count: 4, ldt: 0x2a };
/// CR3 in a 32-bit TSS.
const TSS_CR3: u64 = 0x1c;
/// The debug trap flag of a 32-bit TSS, bit 0.
const TSS_TRAP: u64 = 0x64;

fn layout(kind: u8) -> &'static Layout {
    if kind & 8 != 0 { &WIDE } else { &NARROW }
}

/// The dynamic part of a TSS.
struct Image {
    cr3: Option<u32>,
    ip: u64,
    flags: u64,
    regs: [u64; 8],
    segments: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Cpu {
    /// Switches to the task of a task gate that has itself been checked. The result is that of
    /// [`Cpu::switch_task`].
    pub(crate) fn switch_through_gate(
        &mut self,
        gate: &Descriptor,
        entry: TaskEntry,
    ) -> Result<Option<Exception>, Abort> {
        let selector = gate.gate_selector();
        let fault = Exception::gp(code(selector));
        if selector & 4 != 0 {
            return Err(self.raise(fault));
        }
        let tss = self.descriptor_or(selector, fault)?;
        if !tss.is_system() || !matches!(tss.kind(), kind::TSS16 | kind::TSS) {
            return Err(self.raise(fault));
        }
        if !tss.present() {
            return Err(self.raise(Exception::np(code(selector))));
        }
        self.switch_task(selector, &tss, entry)
    }

    /// Switches to the task of `tss`, whose type, privilege and presence have been checked. `Err` is a fault in
    /// the old task, which goes on unchanged; `Ok(Some(fault))` one in the new task, before its first
    /// instruction.
    pub(crate) fn switch_task(
        &mut self,
        selector: u16,
        tss: &Descriptor,
        entry: TaskEntry,
    ) -> Result<Option<Exception>, Abort> {
        let new = layout(tss.kind());
        if tss.limit() < new.limit {
            return Err(self.raise(Exception::ts(code(selector))));
        }
        let old = self.state.tr;
        if old.limit < layout(old.kind()).limit {
            return Err(self.raise(Exception::ts(code(old.selector))));
        }
        // Once the task has changed there is no going back to make this a single step.
        self.step_for_bus_locks()?;
        let mut image = self.read_tss(tss.base(), new)?;
        self.save_task(&entry)?;
        if entry.nesting != Nesting::Nested
            && let Some(descriptor) = self.descriptor(old.selector)?
        {
            self.change_descriptor_type(&descriptor, |kind| kind & !2)?;
        }
        if entry.nesting == Nesting::Nested {
            self.system_store(self.system_linear(tss.base(), 0), old.selector)?;
            image.flags |= Rflags::NT.bits();
        }
        if entry.nesting != Nesting::Return {
            self.change_descriptor_type(tss, |kind| kind | 2)?;
        }

        let mut tr = tss.segment(selector);
        tr.attributes = tss.attributes() | 2;
        self.state.tr = tr;
        self.state.cr0 |= cr0::TS;
        if image.trap {
            self.pending_debug |= DR6_BT;
        }
        let loaded = self.load_task(&image);
        self.refresh_mode();
        self.refresh_local();
        Ok(match loaded {
            Ok(()) => None,
            Err(_) => Some(self.fault_in_new_task()?),
        })
    }

    /// The fault that loading the new task met. There is no instruction to repeat any more, so an access that
    /// leaves guest mode cannot be completed.
    fn fault_in_new_task(&mut self) -> Result<Exception, Abort> {
        match std::mem::replace(&mut self.pending, Pending::None) {
            Pending::Exception(fault) => Ok(fault),
            Pending::Exit(Exit::EptViolation(access)) if access.space == Space::Memory => {
                self.replay.waiting = None;
                Err(self.exit(Exit::FetchFailed { gpa: access.address }))
            }
            Pending::Exit(exit) => Err(self.exit(exit)),
            Pending::Retry | Pending::None => Err(self.retry()),
        }
    }

    fn read_tss(&mut self, base: u64, layout: &Layout) -> Result<Image, Abort> {
        let word = layout.word;
        let mut image = Image {
            cr3: None,
            ip: self.tss_word(base, layout.ip, word)?,
            flags: self.tss_word(base, layout.ip + word, word)?,
            regs: [0; 8],
            segments: [0; 6],
            ldt: self.tss_word(base, layout.ldt, 2)? as u16,
            trap: false,
        };
        for (i, value) in image.regs.iter_mut().enumerate() {
            *value = self.tss_word(base, layout.ip + word * (2 + i as u64), word)?;
        }
        for (i, selector) in image.segments.iter_mut().enumerate().take(layout.segment_count) {
            *selector = self.tss_word(base, layout.segments + word * i as u64, 2)? as u16;
        }
        if word == 4 {
            image.cr3 = Some(self.tss_word(base, TSS_CR3, 4)? as u32);
            image.trap = self.tss_word(base, TSS_TRAP, 2)? & 1 != 0;
        }
        Ok(image)
    }

    fn tss_word(&mut self, base: u64, offset: u64, size: u64) -> Result<u64, Abort> {
        let lin = self.system_linear(base, offset);
        Ok(match size {
            2 => u64::from(self.system_load::<u16>(lin)?),
            _ => u64::from(self.system_load::<u32>(lin)?),
        })
    }

    fn store_tss_word(&mut self, base: u64, offset: u64, size: u64, value: u64) -> Result<(), Abort> {
        let lin = self.system_linear(base, offset);
        match size {
            2 => self.system_store(lin, value as u16),
            _ => self.system_store(lin, value as u32),
        }
    }

    /// Saves the running task in its TSS.
    fn save_task(&mut self, entry: &TaskEntry) -> Result<(), Abort> {
        let base = self.state.tr.base;
        let Layout { word, ip, segments, segment_count, .. } = *layout(self.state.tr.kind());
        let mut flags = entry.flags;
        if entry.nesting == Nesting::Return {
            flags &= !Rflags::NT.bits();
        }
        self.store_tss_word(base, ip, word, entry.return_ip)?;
        self.store_tss_word(base, ip + word, word, flags)?;
        for i in 0..8 {
            self.store_tss_word(base, ip + word * (2 + i), word, self.state.regs[i as usize])?;
        }
        for i in 0..segment_count {
            let selector = u64::from(self.state.segs[i].selector);
            self.store_tss_word(base, segments + word * i as u64, 2, selector)?;
        }
        Ok(())
    }

    /// Loads the new task's state. Selectors come first, all of them without descriptors; then each is
    /// qualified, in the order of SDM vol. 3A, table 7-1.
    fn load_task(&mut self, image: &Image) -> Result<(), Abort> {
        self.state.set_rflags(image.flags);
        self.state.rip = image.ip;
        self.state.regs[..8].copy_from_slice(&image.regs);
        self.state.dr7 &= !dr7::LOCAL;
        self.debug_changed();
        for seg in Seg::ALL {
            self.state.segs[seg as usize] = Segment::null(image.segments[seg as usize], 0);
        }
        self.state.ldtr = Segment::null(image.ldt, 0);
        let v8086 = image.flags & Rflags::VM.bits() != 0;
        self.state.cpl = if v8086 { 3 } else { rpl(image.segments[Seg::Cs as usize]) };
        self.refresh_mode();
        if let Some(cr3) = image.cr3
            && self.state.cr0 & cr0::PG != 0
        {
            self.load_task_cr3(u64::from(cr3))?;
        }
        let ldt = self.check_task_ldt(image.ldt)?;
        if v8086 {
            self.load_task_ldt(ldt, image.ldt)?;
            for seg in Seg::ALL {
                self.state.segs[seg as usize] = Segment::v8086(image.segments[seg as usize]);
            }
        } else {
            self.load_task_segments(image, ldt)?;
        }
        self.refresh_mode();
        let cs = self.state.segs[Seg::Cs as usize];
        self.check_far_target(&cs, image.ip)
    }

    fn load_task_cr3(&mut self, cr3: u64) -> Result<(), Abort> {
        if self.state.cr4 & cr4::PAE != 0 {
            self.load_pdptrs(cr3)?;
        }
        self.state.cr3 = cr3;
        self.cr3_loaded(false);
        Ok(())
    }

    /// The LDT of the new task must be one; whether it is present comes later.
    fn check_task_ldt(&mut self, selector: u16) -> Result<Option<Descriptor>, Abort> {
        if is_null(selector) {
            return Ok(None);
        }
        let fault = Exception::ts(code(selector));
        if selector & 4 != 0 {
            return Err(self.raise(fault));
        }
        let ldt = self.descriptor_or(selector, fault)?;
        if !ldt.is_system() || ldt.kind() != kind::LDT {
            return Err(self.raise(fault));
        }
        // Selectors with TI set are looked up in it from here on.
        self.state.ldtr = ldt.segment(selector);
        Ok(Some(ldt))
    }

    fn load_task_ldt(&mut self, ldt: Option<Descriptor>, selector: u16) -> Result<(), Abort> {
        if let Some(ldt) = ldt
            && !ldt.present()
        {
            self.state.ldtr = Segment::null(selector, 0);
            return Err(self.raise(Exception::ts(code(selector))));
        }
        Ok(())
    }

    fn load_task_segments(&mut self, image: &Image, ldt: Option<Descriptor>) -> Result<(), Abort> {
        let cpl = self.state.cpl;
        let cs_selector = image.segments[Seg::Cs as usize];
        let ss_selector = image.segments[Seg::Ss as usize];
        let (bad_cs, bad_ss) = (Exception::ts(code(cs_selector)), Exception::ts(code(ss_selector)));

        let cs = if is_null(cs_selector) { None } else { self.descriptor(cs_selector)? };
        if let Some(cs) = cs
            && cs.is_code()
            && (if cs.is_conforming_code() { cs.dpl() > cpl } else { cs.dpl() != cpl })
        {
            return Err(self.raise(bad_cs));
        }
        if is_null(ss_selector) {
            return Err(self.raise(bad_ss));
        }
        let ss = self.descriptor_or(ss_selector, bad_ss)?;
        if !ss.is_writable_data() {
            return Err(self.raise(bad_ss));
        }
        if !ss.present() {
            return Err(self.raise(Exception::ss(code(ss_selector))));
        }
        if ss.dpl() != cpl {
            return Err(self.raise(bad_ss));
        }
        self.load_task_ldt(ldt, image.ldt)?;
        let Some(cs) = cs.filter(Descriptor::is_code) else { return Err(self.raise(bad_cs)) };
        if !cs.present() {
            return Err(self.raise(Exception::np(code(cs_selector))));
        }
        if rpl(ss_selector) != cpl {
            return Err(self.raise(bad_ss));
        }
        self.touch_descriptor(&cs)?;
        self.state.segs[Seg::Cs as usize] = cs.segment(cs_selector);
        self.touch_descriptor(&ss)?;
        self.set_segment(Seg::Ss, ss.segment(ss_selector));
        for seg in [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
            self.load_task_data(seg, image.segments[seg as usize])?;
        }
        Ok(())
    }

    fn load_task_data(&mut self, seg: Seg, selector: u16) -> Result<(), Abort> {
        if is_null(selector) {
            return Ok(());
        }
        let fault = Exception::ts(code(selector));
        let descriptor = self.descriptor_or(selector, fault)?;
        if !descriptor.is_readable() {
            return Err(self.raise(fault));
        }
        if !descriptor.present() {
            return Err(self.raise(Exception::np(code(selector))));
        }
        let level = self.state.cpl.max(rpl(selector));
        if !descriptor.is_conforming_code() && descriptor.dpl() < level {
            return Err(self.raise(fault));
        }
        self.touch_descriptor(&descriptor)?;
        self.set_segment(seg, descriptor.segment(selector));
        Ok(())
    }

    /// Hands a fault of the new task to the engine, which delivers it before the task's first instruction.
    pub(crate) fn defer(&mut self, fault: Option<Exception>) {
        self.deferred = fault;
        self.refresh_local();
    }

    /// The general register that a far transfer's stack pointer lives in.
    pub(crate) fn rsp(&self) -> u64 {
        self.state.regs[usize::from(reg::RSP)]
    }
}
