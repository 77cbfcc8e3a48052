//! Segmentation: descriptors, the checks on every access, and what loading each segment register demands
//! (SDM vol. 3A, chapters 3 and 5).

use crate::cpu::Cpu;
use crate::exception::{Abort, Exception};
use crate::state::{CodeSize, CpuState, Seg, Segment, cr4};

/// Descriptor types of system segments and gates (SDM vol. 3A, table 3-2).
pub(crate) mod kind {
    pub(crate) const TSS16: u8 = 1;
    pub(crate) const LDT: u8 = 2;
    pub(crate) const TSS16_BUSY: u8 = 3;
    pub(crate) const CALL_GATE16: u8 = 4;
    pub(crate) const TASK_GATE: u8 = 5;
    pub(crate) const INTERRUPT_GATE16: u8 = 6;
    pub(crate) const TRAP_GATE16: u8 = 7;
    pub(crate) const TSS: u8 = 9;
    pub(crate) const TSS_BUSY: u8 = 11;
    pub(crate) const CALL_GATE: u8 = 12;
    pub(crate) const INTERRUPT_GATE: u8 = 14;
    pub(crate) const TRAP_GATE: u8 = 15;
}

/// The error code that names a selector (SDM vol. 3A, 6.13).
pub(crate) fn code(selector: u16) -> u32 {
    u32::from(selector & !3)
}

/// Whether the selector is null: index 0 of the GDT.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Requested privilege level.
pub(crate) fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// A descriptor as it lies in its table (SDM vol. 3A, figures 3-8, 5-8 and 6-8).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    /// The first eight bytes.
    pub(crate) low: u64,
    /// The second eight bytes of a 16-byte descriptor (IA-32e mode); otherwise zero.
    pub(crate) high: u64,
    /// Linear address.
    pub(crate) address: u64,
}

impl Descriptor {
    /// Access rights in the layout of [`Segment::attributes`].
    pub(crate) fn attributes(&self) -> u32 {
        (self.low >> 40) as u32 & 0xf0ff
    }
    pub(crate) fn kind(&self) -> u8 {
        (self.low >> 40) as u8 & 15
    }
    pub(crate) fn is_system(&self) -> bool {
        self.low & (1 << 44) == 0
    }
    pub(crate) fn dpl(&self) -> u8 {
        (self.low >> 45) as u8 & 3
    }
    pub(crate) fn present(&self) -> bool {
        self.low & (1 << 47) != 0
    }
    pub(crate) fn long(&self) -> bool {
        self.low & (1 << 53) != 0
    }
    pub(crate) fn big(&self) -> bool {
        self.low & (1 << 54) != 0
    }
    pub(crate) fn is_code(&self) -> bool {
        !self.is_system() && self.kind() & 8 != 0
    }
    pub(crate) fn is_conforming_code(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }
    pub(crate) fn is_writable_data(&self) -> bool {
        !self.is_system() && self.kind() & 0b1010 == 0b0010
    }
    pub(crate) fn is_readable(&self) -> bool {
        !self.is_system() && self.kind() & 0b1010 != 0b1000
    }
    /// Segment limit in bytes.
    pub(crate) fn limit(&self) -> u32 {
        let raw = (self.low & 0xffff) as u32 | ((self.low >> 32) as u32 & 0xf_0000);
        if self.low & (1 << 55) != 0 { (raw << 12) | 0xfff } else { raw }
    }
    /// Segment base; the upper half is that of a 16-byte descriptor.
    pub(crate) fn base(&self) -> u64 {
        ((self.low >> 16) & 0xff_ffff) | ((self.low >> 32) & 0xff00_0000) | (self.high << 32)
    }
    /// Target selector of a gate.
    pub(crate) fn gate_selector(&self) -> u16 {
        (self.low >> 16) as u16
    }
    /// Target offset of a gate: 16 bits of a 16-bit gate, 64 of a 16-byte one.
    pub(crate) fn gate_offset(&self) -> u64 {
        let low = self.low & 0xffff;
        if self.kind() & 8 == 0 { low } else { low | ((self.low >> 32) & 0xffff_0000) | (self.high << 32) }
    }
    /// Parameter count of a call gate.
    pub(crate) fn gate_parameters(&self) -> u64 {
        (self.low >> 32) & 31
    }
    /// Interrupt stack table index of an IDT gate in IA-32e mode.
    pub(crate) fn gate_ist(&self) -> u64 {
        (self.low >> 32) & 7
    }

    /// The hidden part that loading this code or data descriptor gives.
    pub(crate) fn segment(&self, selector: u16) -> Segment {
        let accessed = u32::from(!self.is_system());
        Segment { base: self.base(), limit: self.limit(), attributes: self.attributes() | accessed, selector }
    }
}

impl Segment {
    /// A null segment register with `selector`, whose DPL field says `dpl`.
    pub(crate) fn null(selector: u16, dpl: u8) -> Segment {
        Segment { base: 0, limit: 0, attributes: Segment::UNUSABLE | (u32::from(dpl) << 5), selector }
    }

    /// What a segment load gives in virtual-8086 mode (SDM vol. 3B, 20.2.1).
    pub(crate) fn v8086(selector: u16) -> Segment {
        Segment { base: u64::from(selector) << 4, limit: 0xffff, attributes: 0xf3, selector }
    }

    /// What a segment load gives in real-address mode: limit and access rights stay.
    pub(crate) fn real(self, selector: u16) -> Segment {
        let base = u64::from(selector) << 4;
        if self.unusable() {
            return Segment { base, limit: 0xffff, attributes: 0x93, selector };
        }
        Segment { base, selector, ..self }
    }

    /// A flat segment as SYSCALL and SYSENTER make them.
    pub(crate) fn flat(selector: u16, attributes: u32) -> Segment {
        Segment { base: 0, limit: u32::MAX, attributes, selector }
    }

    /// Whether `size` bytes at `offset` lie within the limit. An access that wraps around a 4 GiB limit is
    /// let through (SDM vol. 3A, 5.3: implementation-specific).
    #[inline]
    pub(crate) fn covers(&self, offset: u64, size: u64) -> bool {
        let last = offset.saturating_add(size.saturating_sub(1));
        if self.attributes & 0b1_1100 == 0b1_0100 {
            let top = if self.big() { 0xffff_ffff } else { 0xffff };
            return offset > u64::from(self.limit) && last <= top;
        }
        last <= u64::from(self.limit) || (self.limit == u32::MAX && offset <= 0xffff_ffff)
    }

    /// Whether the type allows a write, or a read (SDM vol. 3A, 5.4).
    #[inline]
    pub(crate) fn permits(&self, write: bool) -> bool {
        if self.unusable() {
            return false;
        }
        let code = self.attributes & 8 != 0;
        let second = self.attributes & 2 != 0;
        if write { !code && second } else { !code || second }
    }
}

impl CpuState {
    /// Whether `address` is canonical for the paging mode in force (SDM vol. 1, 3.3.7.1).
    #[inline]
    pub(crate) fn canonical(&self, address: u64) -> bool {
        let unused = if self.cr4 & cr4::LA57 != 0 { 7 } else { 16 };
        (((address << unused) as i64) >> unused) as u64 == address
    }

    /// Segment selectors are plain paragraphs: real-address or virtual-8086 mode.
    #[inline]
    pub(crate) fn real_or_v8086(&self) -> bool {
        self.real_mode() || self.v8086()
    }
}

impl Cpu {
    /// Linear address of `offset` in `seg` for an access of `size` bytes, with the segment's limit and type
    /// checked outside 64-bit mode (SDM vol. 3A, 5.3 to 5.5).
    #[inline]
    pub fn linearize(&mut self, seg: Seg, offset: u64, size: usize, write: bool) -> Result<u64, Abort> {
        if self.state.code_size == CodeSize::Bits64 {
            return Ok(self.state.ea_base[seg as usize].wrapping_add(offset));
        }
        let segment = &self.state.segs[seg as usize];
        let permitted = if self.state.real_mode() { !segment.unusable() } else { segment.permits(write) };
        if permitted && segment.covers(offset, size as u64) {
            return Ok(segment.base.wrapping_add(offset) & 0xffff_ffff);
        }
        Err(self.raise(if seg == Seg::Ss { Exception::ss(0) } else { Exception::gp(0) }))
    }

    /// The descriptor that `selector` names, or `None` beyond its table's limit.
    pub(crate) fn descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Abort> {
        let (base, limit) = if selector & 4 == 0 {
            (self.state.gdtr.base, u32::from(self.state.gdtr.limit))
        } else if self.state.ldtr.unusable() {
            return Ok(None);
        } else {
            (self.state.ldtr.base, self.state.ldtr.limit)
        };
        let offset = u32::from(selector & !7);
        if limit < 7 || offset > limit - 7 {
            return Ok(None);
        }
        let address = self.system_linear(base, u64::from(offset));
        let low = self.system_load(address)?;
        Ok(Some(Descriptor { low, high: 0, address }))
    }

    /// As [`Cpu::descriptor`], raising `fault` beyond the table's limit.
    pub(crate) fn descriptor_or(&mut self, selector: u16, fault: Exception) -> Result<Descriptor, Abort> {
        match self.descriptor(selector)? {
            Some(descriptor) => Ok(descriptor),
            None => Err(self.raise(fault)),
        }
    }

    /// In IA-32e mode, adds the second half of a 16-byte system descriptor. `fault` is for one that reaches
    /// beyond the table or whose upper type field is not zero (SDM vol. 3A, 5.8.3.1 and 7.2.3).
    pub(crate) fn widen(
        &mut self,
        selector: u16,
        mut descriptor: Descriptor,
        fault: Exception,
    ) -> Result<Descriptor, Abort> {
        if !self.state.long_mode() {
            return Ok(descriptor);
        }
        let limit = if selector & 4 == 0 { u32::from(self.state.gdtr.limit) } else { self.state.ldtr.limit };
        if limit < 15 || u32::from(selector & !7) > limit - 15 {
            return Err(self.raise(fault));
        }
        descriptor.high = self.system_load(descriptor.address.wrapping_add(8))?;
        if descriptor.high & 0x1f00_0000_0000 != 0 {
            return Err(self.raise(fault));
        }
        Ok(descriptor)
    }

    /// Address of a byte in a system table: 64 bits in IA-32e mode, otherwise 32.
    pub(crate) fn system_linear(&self, base: u64, offset: u64) -> u64 {
        let lin = base.wrapping_add(offset);
        if self.state.long_mode() { lin } else { lin & 0xffff_ffff }
    }

    /// Sets the accessed bit of a code or data descriptor in memory, if it is clear.
    pub(crate) fn touch_descriptor(&mut self, descriptor: &Descriptor) -> Result<(), Abort> {
        if descriptor.is_system() || descriptor.kind() & 1 != 0 {
            return Ok(());
        }
        self.change_descriptor_type(descriptor, |kind| kind | 1)
    }

    /// Changes the type byte of a descriptor in memory (accessed and busy bits), by a locked access to its eight bytes.
    pub(crate) fn change_descriptor_type(
        &mut self,
        descriptor: &Descriptor,
        change: impl Fn(u8) -> u8,
    ) -> Result<(), Abort> {
        self.system_locked(descriptor.address, |old: u64| {
            let mut bytes = old.to_le_bytes();
            bytes[5] = change(bytes[5]);
            Some(u64::from_le_bytes(bytes))
        })?;
        Ok(())
    }

    /// Loads `seg` (not CS) with `selector`, with every check that the mode asks for.
    pub(crate) fn load_segment(&mut self, seg: Seg, selector: u16) -> Result<(), Abort> {
        let segment = self.check_segment(seg, selector)?;
        self.set_segment(seg, segment);
        Ok(())
    }

    /// What loading `seg` (not CS) with `selector` would put there (SDM vol. 2, MOV).
    pub(crate) fn check_segment(&mut self, seg: Seg, selector: u16) -> Result<Segment, Abort> {
        if self.state.v8086() {
            return Ok(Segment::v8086(selector));
        }
        if self.state.real_mode() {
            return Ok(self.state.segs[seg as usize].real(selector));
        }
        if is_null(selector) {
            return self.check_null(seg, selector);
        }
        let fault = Exception::gp(code(selector));
        let descriptor = self.descriptor_or(selector, fault)?;
        let cpl = self.state.cpl;
        let (allowed, absent) = if seg == Seg::Ss {
            let allowed = rpl(selector) == cpl && descriptor.is_writable_data() && descriptor.dpl() == cpl;
            (allowed, Exception::ss(code(selector)))
        } else {
            let privilege = descriptor.is_conforming_code() || descriptor.dpl() >= cpl.max(rpl(selector));
            (descriptor.is_readable() && privilege, Exception::np(code(selector)))
        };
        if !allowed {
            return Err(self.raise(fault));
        }
        if !descriptor.present() {
            return Err(self.raise(absent));
        }
        self.touch_descriptor(&descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// A null selector: harmless in a data segment register until it is used; in SS only for 64-bit code
    /// below privilege level 3.
    fn check_null(&mut self, seg: Seg, selector: u16) -> Result<Segment, Abort> {
        let cpl = self.state.cpl;
        if seg != Seg::Ss {
            return Ok(Segment::null(selector, 0));
        }
        if self.state.code_size == CodeSize::Bits64 && cpl != 3 && rpl(selector) == cpl {
            return Ok(Segment::null(selector, cpl));
        }
        Err(self.raise(Exception::gp(0)))
    }

    /// Replaces a segment register (not CS) and what is derived from it.
    pub(crate) fn set_segment(&mut self, seg: Seg, segment: Segment) {
        let state = &mut self.state;
        state.segs[seg as usize] = segment;
        if seg == Seg::Ss {
            state.stack32 = segment.big();
        }
        let ignored = state.code_size == CodeSize::Bits64 && (seg as usize) < Seg::Fs as usize;
        state.ea_base[seg as usize] = if ignored { 0 } else { segment.base };
    }

    /// On a return to an outer privilege level: data segments that the new level may not use become null
    /// (SDM vol. 2, RET, RETURN-TO-OUTER-PRIVILEGE-LEVEL). `cpl` is the new level.
    pub(crate) fn drop_privileged_segments(&mut self, cpl: u8) {
        for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
            let segment = self.state.segs[seg as usize];
            let conforming = segment.attributes & 0b1_1100 == 0b1_1100;
            if !segment.unusable() && !conforming && segment.dpl() < cpl {
                self.set_segment(seg, Segment::null(0, 0));
            }
        }
    }
}
