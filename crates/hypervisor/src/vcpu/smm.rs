//! System management mode: SMIs, and the state-save area in SMRAM (SDM vol. 3C, chapter 31; kernel: arch/x86/kvm/smm.c).
//!
//! The area's layout is KVM's, which firmware knows: the P6's for a guest without long mode, the AMD64's for others.
//! RSM neither looks at the fields for restarting I/O and HLT, nor does an SMI fill them in.

use silicon::model::Feature;
use silicon::model::msrs::StateMsr;
use silicon::state::{Seg, Segment, TableRegister, cr0, cr4, efer, interruptibility};

use super::registers::{level, valid_cr0};
use super::{Vcpu, VcpuExit};
use crate::memory::Space;

/// Where the state-save area begins, from SMBASE, and how long it is.
const AREA: u64 = 0xfe00;
const AREA_SIZE: usize = 512;
/// The revisions of its layouts, which say that SMBASE can be relocated.
const REVISION_32: u32 = 0x2_0000;
const REVISION_64: u32 = 0x2_0064;
/// Bits of the access rights that are in the area.
const RIGHTS: u32 = 0xf0ff;
const PRESENT: u32 = 1 << 7;
/// CR0 bits that exist.
const CR0_DEFINED: u64 = 0xe005_003f;
const CR3_PCID: u64 = 0xfff;
const DR6_BS: u64 = 1 << 14;

/// Offsets from SMBASE in the layout of guests without long mode; four bytes each unless something else is said.
mod area32 {
    pub(super) const SMBASE: u64 = 0xfef8;
    pub(super) const REVISION: u64 = 0xfefc;
    pub(super) const CR4: u64 = 0xff14;
    /// One byte.
    pub(super) const INTERRUPT_SHADOW: u64 = 0xff1a;
    pub(super) const IDTR: u64 = 0xff50;
    pub(super) const TR: u64 = 0xff5c;
    pub(super) const GDTR: u64 = 0xff6c;
    pub(super) const LDTR: u64 = 0xff78;
    /// Rights, limit, base of ES, CS, SS, DS, FS, GS.
    pub(super) const SEGMENTS: [u64; 6] = [0xff84, 0xff90, 0xff9c, 0xff2c, 0xff38, 0xff44];
    /// Selectors in the same order.
    pub(super) const SELECTORS: u64 = 0xffa8;
    pub(super) const LDTR_SELECTOR: u64 = 0xffc0;
    pub(super) const TR_SELECTOR: u64 = 0xffc4;
    pub(super) const DR7: u64 = 0xffc8;
    pub(super) const DR6: u64 = 0xffcc;
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI.
    pub(super) const REGISTERS: u64 = 0xffd0;
    pub(super) const EIP: u64 = 0xfff0;
    pub(super) const EFLAGS: u64 = 0xfff4;
    pub(super) const CR3: u64 = 0xfff8;
    pub(super) const CR0: u64 = 0xfffc;
}

/// Offsets from SMBASE in the layout of guests with long mode; eight bytes each unless something else is said.
mod area64 {
    /// Selector and rights (two bytes each), limit (four), base of ES, CS, SS, DS, FS, GS.
    pub(super) const SEGMENTS: u64 = 0xfe00;
    pub(super) const GDTR: u64 = 0xfe60;
    pub(super) const LDTR: u64 = 0xfe70;
    pub(super) const IDTR: u64 = 0xfe80;
    pub(super) const TR: u64 = 0xfe90;
    /// One byte.
    pub(super) const INTERRUPT_SHADOW: u64 = 0xfecb;
    pub(super) const EFER: u64 = 0xfed0;
    /// Four bytes, as is the next.
    pub(super) const REVISION: u64 = 0xfefc;
    pub(super) const SMBASE: u64 = 0xff00;
    pub(super) const CR4: u64 = 0xff48;
    pub(super) const CR3: u64 = 0xff50;
    pub(super) const CR0: u64 = 0xff58;
    pub(super) const DR7: u64 = 0xff60;
    pub(super) const DR6: u64 = 0xff68;
    pub(super) const RFLAGS: u64 = 0xff70;
    pub(super) const RIP: u64 = 0xff78;
    /// R15 down to RAX.
    pub(super) const REGISTERS: u64 = 0xff80;
}

/// The registers in the area do not go together: the processor shuts down (SDM vol. 3C, 31.8.2).
struct Shutdown;

fn require(good: bool) -> Result<(), Shutdown> {
    if good { Ok(()) } else { Err(Shutdown) }
}

/// A copy of the state-save area.
struct Area([u8; AREA_SIZE]);

impl Area {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let start = (at - AREA) as usize;
        self.0[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let start = (at - AREA) as usize;
        std::array::from_fn(|i| self.0[start + i])
    }

    fn put32(&mut self, at: u64, value: u64) {
        self.put(at, &(value as u32).to_le_bytes());
    }

    fn put64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    fn u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.get(at))
    }

    fn u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.get(at))
    }

    fn put_segment32(&mut self, at: u64, selector: u64, segment: &Segment) {
        self.put32(selector, segment.selector.into());
        self.put32(at, u64::from(rights_out(segment)) << 8);
        self.put32(at + 4, segment.limit.into());
        self.put32(at + 8, segment.base);
    }

    fn segment32(&self, at: u64, selector: u64) -> Segment {
        Segment {
            base: self.u32(at + 8).into(),
            limit: self.u32(at + 4),
            attributes: rights_in(self.u32(at) >> 8),
            selector: self.u32(selector) as u16,
        }
    }

    fn put_segment64(&mut self, at: u64, segment: &Segment) {
        self.put32(at, u64::from(segment.selector) | u64::from(rights_out(segment)) << 16);
        self.put32(at + 4, segment.limit.into());
        self.put64(at + 8, segment.base);
    }

    fn segment64(&self, at: u64) -> Segment {
        let word = self.u32(at);
        Segment {
            base: self.u64(at + 8),
            limit: self.u32(at + 4),
            attributes: rights_in(word >> 16),
            selector: word as u16,
        }
    }

    fn put_table(&mut self, at: u64, wide: bool, table: &TableRegister) {
        self.put32(at + 4, table.limit.into());
        if wide { self.put64(at + 8, table.base) } else { self.put32(at + 8, table.base) }
    }

    fn table(&self, at: u64, wide: bool) -> TableRegister {
        let base = if wide { self.u64(at + 8) } else { self.u32(at + 8).into() };
        TableRegister { base, limit: self.u32(at + 4) as u16 }
    }
}

/// What the area has of a segment's attributes; one that is unusable is not present.
fn rights_out(segment: &Segment) -> u32 {
    let absent = if segment.attributes & Segment::UNUSABLE != 0 { PRESENT } else { 0 };
    segment.attributes & RIGHTS & !absent
}

fn rights_in(rights: u32) -> u32 {
    let unusable = if rights & PRESENT == 0 { Segment::UNUSABLE } else { 0 };
    rights & RIGHTS | unusable
}

impl Vcpu {
    /// KVM_SMI.
    pub fn smi(&mut self) {
        self.events.smi_requested = true;
    }

    /// The address space that the vCPU's accesses are made in.
    pub(super) fn space(&self) -> Space {
        Space::of_vcpu(self.cpu.state.smm)
    }

    /// SMIs that have come wait to be taken from now on.
    pub(super) fn process_smi(&mut self) {
        let sent = self.lapic.as_ref().is_some_and(|lapic| lapic.take_smi());
        self.events.smi_pending |= std::mem::take(&mut self.events.smi_requested) | sent;
    }

    /// Enters or leaves system management mode and does nothing else (kernel: `kvm_smm_changed`).
    pub(super) fn put_smm(&mut self, on: bool) {
        if self.cpu.state.smm != on {
            self.cpu.set_smm(on);
            self.cpu.paging_changed();
            self.events.smm_inside_nmi = false;
        }
    }

    /// What the guest's CPUID says decides on the layout; one without CPUID has the old one.
    fn has_long_mode(&self) -> bool {
        let [.., edx] = self.cpuid_values(0x8000_0001, 0);
        edx & 1 << Feature::Lm.row().bit != 0
    }

    /// Takes the SMI that waits (kernel: `enter_smm`). Without memory for the state the VM is lost.
    pub(super) fn take_smi(&mut self) {
        self.events.smi_pending = false;
        self.msrs.count_smi();
        let mut area = Area([0; AREA_SIZE]);
        if self.has_long_mode() {
            self.save64(&mut area)
        } else {
            self.save32(&mut area)
        }
        let smbase = self.msrs.smbase();
        if !self.vm.memory().write_in(Space::Smm, smbase.wrapping_add(AREA), &area.0) {
            return self.vm.kill();
        }
        self.events.smm_inside_nmi = self.cpu.state.interruptibility & interruptibility::NMI != 0;
        self.cpu.enter_smm(smbase);
    }

    /// The interrupt shadow, as the area has it: that of MOV SS in bit 0, of STI in bit 1.
    fn shadow_out(&self) -> u8 {
        let blocking = self.cpu.state.interruptibility;
        u8::from(blocking & interruptibility::MOV_SS != 0)
            | u8::from(blocking & interruptibility::STI != 0) << 1
    }

    fn put_shadow(&mut self, shadow: u8) {
        let blocking = &mut self.cpu.state.interruptibility;
        *blocking &= !(interruptibility::STI | interruptibility::MOV_SS);
        if shadow & 1 != 0 {
            *blocking |= interruptibility::MOV_SS;
        } else if shadow & 2 != 0 {
            *blocking |= interruptibility::STI;
        }
    }

    fn save32(&self, area: &mut Area) {
        let s = &self.cpu.state;
        area.put32(area32::CR0, s.cr0);
        area.put32(area32::CR3, s.cr3);
        area.put32(area32::CR4, s.cr4);
        area.put32(area32::EFLAGS, s.rflags());
        area.put32(area32::EIP, s.rip);
        (0..8).for_each(|i| area.put32(area32::REGISTERS + i * 4, s.regs[i as usize]));
        area.put32(area32::DR6, s.dr6);
        area.put32(area32::DR7, s.dr7);
        area.put_segment32(area32::TR, area32::TR_SELECTOR, &s.tr);
        area.put_segment32(area32::LDTR, area32::LDTR_SELECTOR, &s.ldtr);
        for (i, (at, segment)) in area32::SEGMENTS.into_iter().zip(&s.segs).enumerate() {
            area.put_segment32(at, area32::SELECTORS + i as u64 * 4, segment);
        }
        area.put_table(area32::GDTR, false, &s.gdtr);
        area.put_table(area32::IDTR, false, &s.idtr);
        area.put32(area32::REVISION, REVISION_32.into());
        area.put32(area32::SMBASE, self.msrs.smbase());
        area.put(area32::INTERRUPT_SHADOW, &[self.shadow_out()]);
    }

    fn save64(&self, area: &mut Area) {
        let s = &self.cpu.state;
        (0..16).for_each(|i| area.put64(area64::REGISTERS + i * 8, s.regs[15 - i as usize]));
        area.put64(area64::RIP, s.rip);
        area.put64(area64::RFLAGS, s.rflags());
        area.put64(area64::DR6, s.dr6);
        area.put64(area64::DR7, s.dr7);
        area.put64(area64::CR0, s.cr0);
        area.put64(area64::CR3, s.cr3);
        area.put64(area64::CR4, s.cr4);
        area.put64(area64::EFER, s.efer);
        area.put32(area64::SMBASE, self.msrs.smbase());
        area.put32(area64::REVISION, REVISION_64.into());
        for (i, segment) in (0..).zip(&s.segs) {
            area.put_segment64(area64::SEGMENTS + i * 16, segment);
        }
        area.put_segment64(area64::TR, &s.tr);
        area.put_segment64(area64::LDTR, &s.ldtr);
        area.put_table(area64::GDTR, true, &s.gdtr);
        area.put_table(area64::IDTR, true, &s.idtr);
        area.put(area64::INTERRUPT_SHADOW, &[self.shadow_out()]);
    }

    /// RSM (kernel: `emulator_leave_smm`). A state that no processor can be in makes it shut down, with as much of it
    /// loaded as was found good.
    pub(super) fn rsm(&mut self) -> Option<VcpuExit> {
        let mut area = Area([0; AREA_SIZE]);
        let at = self.msrs.smbase().wrapping_add(AREA);
        if !self.vm.memory().read_in(self.space(), at, &mut area.0) {
            self.skip_instruction();
            self.events.triple_fault = true;
            return None;
        }
        let stepped = self.cpu.state.flag(silicon::flags::Rflags::TF);
        if !self.events.smm_inside_nmi {
            self.cpu.state.interruptibility &= !interruptibility::NMI;
        }
        self.put_smm(false);
        self.back_to_real_mode();
        let loaded = if self.has_long_mode() { self.load64(&area) } else { self.load32(&area) };
        self.cpu.state.cpl = level(&self.cpu.state);
        self.cpu.refresh_mode();
        self.cpu.paging_changed();
        self.debug.stepped = true;
        match loaded {
            Ok(()) if stepped && !self.debug.single_step() => {
                self.events.raise(silicon::exception::Exception::db(DR6_BS));
            }
            Ok(()) => {}
            Err(Shutdown) => self.events.triple_fault = true,
        }
        None
    }

    /// What the control registers are loaded on top of.
    fn back_to_real_mode(&mut self) {
        let long_mode = self.has_long_mode();
        let s = &mut self.cpu.state;
        s.cr0 &= !(cr0::PG | cr0::PE);
        s.efer &= !efer::LMA;
        if long_mode {
            s.cr4 &= !(cr4::PCIDE | cr4::PAE);
            s.efer = 0;
            s.segs[Seg::Cs as usize] = Segment { base: 0, limit: 0, attributes: 0x809b, selector: 0 };
        }
    }

    fn load32(&mut self, area: &Area) -> Result<(), Shutdown> {
        let s = &mut self.cpu.state;
        s.set_rflags(area.u32(area32::EFLAGS).into());
        s.rip = area.u32(area32::EIP).into();
        (0..8).for_each(|i| s.regs[i as usize] = area.u32(area32::REGISTERS + i * 4).into());
        s.dr6 = area.u32(area32::DR6).into();
        s.dr7 = area.u32(area32::DR7).into();
        s.tr = area.segment32(area32::TR, area32::TR_SELECTOR);
        s.ldtr = area.segment32(area32::LDTR, area32::LDTR_SELECTOR);
        s.gdtr = area.table(area32::GDTR, false);
        s.idtr = area.table(area32::IDTR, false);
        for (i, (at, segment)) in area32::SEGMENTS.into_iter().zip(&mut s.segs).enumerate() {
            *segment = area.segment32(at, area32::SELECTORS + i as u64 * 4);
        }
        self.msrs.set_smbase(area.u32(area32::SMBASE));
        let [cr0, cr3, cr4] = [area32::CR0, area32::CR3, area32::CR4].map(|at| u64::from(area.u32(at)));
        self.load_controls(cr0, cr3, cr4)?;
        let [shadow] = area.get(area32::INTERRUPT_SHADOW);
        self.put_shadow(shadow);
        Ok(())
    }

    fn load64(&mut self, area: &Area) -> Result<(), Shutdown> {
        let s = &mut self.cpu.state;
        (0..16).for_each(|i| s.regs[15 - i as usize] = area.u64(area64::REGISTERS + i * 8));
        s.rip = area.u64(area64::RIP);
        s.set_rflags(area.u64(area64::RFLAGS));
        for (at, register) in [(area64::DR6, &mut s.dr6), (area64::DR7, &mut s.dr7)] {
            require(area.u64(at) >> 32 == 0)?;
            *register = area.u64(at);
        }
        self.msrs.set_smbase(area.u32(area64::SMBASE));
        // Whether long mode is active follows from CR0.
        let enables = area.u64(area64::EFER) & !efer::LMA;
        require(self.cpu.write_state_msr(StateMsr::Efer, enables).is_ok())?;
        let s = &mut self.cpu.state;
        s.tr = area.segment64(area64::TR);
        s.idtr = area.table(area64::IDTR, true);
        s.ldtr = area.segment64(area64::LDTR);
        s.gdtr = area.table(area64::GDTR, true);
        self.load_controls(area.u64(area64::CR0), area.u64(area64::CR3), area.u64(area64::CR4))?;
        for (i, segment) in (0..).zip(&mut self.cpu.state.segs) {
            *segment = area.segment64(area64::SEGMENTS + i * 16);
        }
        let [shadow] = area.get(area64::INTERRUPT_SHADOW);
        self.put_shadow(shadow);
        Ok(())
    }

    /// Loads the control registers in the order in which each can be checked: CR3, CR4, CR0, and what needs long mode
    /// after them (kernel: `rsm_enter_protected_mode`).
    fn load_controls(&mut self, cr0: u64, cr3: u64, cr4: u64) -> Result<(), Shutdown> {
        let (addresses, cr4_mask) = (self.cpu.features.physical_mask(), self.cpu.features.cr4_mask());
        let with_pcid = cr4 & cr4::PCIDE != 0;
        let pcid = if with_pcid { cr3 & CR3_PCID } else { 0 };
        let s = &mut self.cpu.state;
        require((cr3 ^ pcid) & !addresses == 0)?;
        s.cr3 = cr3 ^ pcid;
        require(cr4 & !cr4::PCIDE & !cr4_mask == 0)?;
        s.cr4 = cr4 & !cr4::PCIDE;
        require(valid_cr0(cr0))?;
        let paging = cr0 & cr0::PG != 0;
        let long_mode = paging && s.efer & efer::LME != 0;
        require(!long_mode || cr4 & cr4::PAE != 0)?;
        let before = std::mem::replace(&mut s.cr0, cr0 & CR0_DEFINED | cr0::ET);
        if long_mode {
            s.efer |= efer::LMA;
        } else if !self.cpu.reload_pdptrs() {
            self.cpu.state.cr0 = before;
            return Err(Shutdown);
        }
        if with_pcid {
            require(long_mode && cr4 & !cr4_mask == 0)?;
            self.cpu.state.cr4 = cr4;
            self.cpu.state.cr3 = cr3;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
