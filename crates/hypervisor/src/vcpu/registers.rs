//! KVM_GET/SET_REGS, SREGS, FPU and DEBUGREGS: the architectural state in KVM's structures.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_SREGS2_FLAGS_PDPTRS_VALID, kvm_debugregs, kvm_dtable, kvm_fpu, kvm_regs,
    kvm_segment, kvm_sregs, kvm_sregs2,
};
use silicon::model::Features;
use silicon::state::{CpuState, Segment, TableRegister, cr0, cr4, efer, reg};

use super::events::Acknowledged;
use super::{APIC_BASE_BSP, Vcpu};
use crate::error::Error;

fn segment_out(seg: &Segment) -> kvm_segment {
    let bit = |n: u32| ((seg.attributes >> n) & 1) as u8;
    kvm_segment {
        base: seg.base,
        limit: seg.limit,
        selector: seg.selector,
        type_: seg.kind(),
        present: bit(7),
        dpl: seg.dpl(),
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: bit(16),
        padding: 0,
    }
}

fn segment_in(seg: &kvm_segment) -> Segment {
    let bit = |value: u8, n: u32| u32::from(value & 1) << n;
    // A segment that is not present is unusable to the processor, as KVM treats it.
    let unusable = seg.unusable != 0 || seg.present == 0;
    let attributes = u32::from(seg.type_ & 15)
        | bit(seg.s, 4)
        | u32::from(seg.dpl & 3) << 5
        | bit(seg.present, 7)
        | bit(seg.avl, 12)
        | bit(seg.l, 13)
        | bit(seg.db, 14)
        | bit(seg.g, 15)
        | if unusable { Segment::UNUSABLE } else { 0 };
    Segment { base: seg.base, limit: seg.limit, attributes, selector: seg.selector }
}

fn table_out(table: &TableRegister) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, padding: [0; 3] }
}

/// Whether `sregs` is a state that the processor can be in (kernel: `kvm_is_valid_sregs`).
fn valid(sregs: &kvm_sregs, features: &Features) -> bool {
    let long = sregs.efer & efer::LMA != 0;
    if sregs.efer & efer::LME != 0 && sregs.cr0 & cr0::PG != 0 {
        if sregs.cr4 & cr4::PAE == 0 || !long || sregs.cr3 & !features.physical_mask() != 0 {
            return false;
        }
    } else if long || sregs.cs.l != 0 {
        return false;
    }
    sregs.cr4 & !features.cr4_mask() == 0 && valid_cr0(sregs.cr0)
}

/// Whether the bits of CR0 go together (kernel: `kvm_is_valid_cr0`).
pub(super) fn valid_cr0(value: u64) -> bool {
    let without = |bit, needs| value & bit != 0 && value & needs == 0;
    value >> 32 == 0 && !without(cr0::PG, cr0::PE) && !without(cr0::NW, cr0::CD)
}

/// The CPL that goes with the other registers: SS.DPL (SDM vol. 3C, 25.4.1); real mode runs at 0 and virtual-8086 mode
/// at 3.
pub(super) fn level(state: &CpuState) -> u8 {
    if state.real_mode() {
        0
    } else if state.v8086() {
        3
    } else {
        state.segs[2].dpl()
    }
}

/// What `kvm_sregs2` has in common with `kvm_sregs`.
fn common(sregs2: &kvm_sregs2) -> kvm_sregs {
    let &kvm_sregs2 { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, .. } = sregs2;
    let &kvm_sregs2 { cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } = sregs2;
    let interrupt_bitmap = [0; 4];
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        interrupt_bitmap,
    }
}

fn pae_paging(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && efer & efer::LMA == 0
}

impl Vcpu {
    /// KVM_GET_REGS.
    pub fn regs(&self) -> kvm_regs {
        let r = &self.cpu.state.regs;
        kvm_regs {
            rax: r[usize::from(reg::RAX)],
            rbx: r[usize::from(reg::RBX)],
            rcx: r[usize::from(reg::RCX)],
            rdx: r[usize::from(reg::RDX)],
            rsi: r[usize::from(reg::RSI)],
            rdi: r[usize::from(reg::RDI)],
            rsp: r[usize::from(reg::RSP)],
            rbp: r[usize::from(reg::RBP)],
            r8: r[8],
            r9: r[9],
            r10: r[10],
            r11: r[11],
            r12: r[12],
            r13: r[13],
            r14: r[14],
            r15: r[15],
            rip: self.cpu.state.rip,
            rflags: self.cpu.state.rflags(),
        }
    }

    /// KVM_SET_REGS. Drops an exception that is not injected yet, as KVM does.
    pub fn set_regs(&mut self, regs: &kvm_regs) {
        if regs.rip != self.cpu.state.rip {
            // The instruction whose access the client was asked for is not the next one any more.
            self.cpu.abandon_access();
            self.locks.forget_step();
            self.user_access = false;
            self.read_ahead = super::ports::ReadAhead::default();
        }
        let r = &mut self.cpu.state.regs;
        let low = [regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi];
        let high = [regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15];
        r[..8].copy_from_slice(&low);
        r[8..16].copy_from_slice(&high);
        self.cpu.state.rip = regs.rip;
        self.cpu.state.set_rflags(regs.rflags);
        self.events.raised = None;
        self.cpu.refresh_mode();
    }

    /// KVM_GET_SREGS.
    pub fn sregs(&mut self) -> kvm_sregs {
        self.deliver_payload_early();
        let s = &self.cpu.state;
        let [es, cs, ss, ds, fs, gs] = s.segs.each_ref().map(segment_out);
        let mut interrupt_bitmap = [0; 4];
        if let Some(Acknowledged { vector, software: None }) = self.events.interrupt {
            interrupt_bitmap[usize::from(vector / 64)] = 1 << (vector % 64);
        }
        kvm_sregs {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr: segment_out(&s.tr),
            ldt: segment_out(&s.ldtr),
            gdt: table_out(&s.gdtr),
            idt: table_out(&s.idtr),
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: self.cr8(),
            efer: s.efer,
            apic_base: self.apic_base(),
            interrupt_bitmap,
        }
    }

    /// KVM_SET_SREGS. EINVAL for a state that no processor can be in; nothing is changed then.
    pub fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), Error> {
        self.put_sregs(sregs)?;
        let pending = sregs.interrupt_bitmap.iter().enumerate().find(|(_, word)| **word != 0);
        if let Some((i, word)) = pending {
            let vector = (i as u32 * 64 + word.trailing_zeros()) as u8;
            self.events.interrupt = Some(Acknowledged { vector, software: None });
        }
        self.cpu.reload_pdptrs();
        self.cpu.paging_changed();
        Ok(())
    }

    /// KVM_GET_SREGS2.
    pub fn sregs2(&mut self) -> kvm_sregs2 {
        let kvm_sregs { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, .. } = self.sregs();
        let kvm_sregs { cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } = self.sregs();
        let pae = pae_paging(cr0, cr4, efer);
        let (flags, pdptrs) =
            if pae { (KVM_SREGS2_FLAGS_PDPTRS_VALID.into(), self.cpu.state.pdptr) } else { (0, [0; 4]) };
        kvm_sregs2 {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt,
            idt,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            flags,
            pdptrs,
        }
    }

    /// KVM_SET_SREGS2. EINVAL as for KVM_SET_SREGS, for flags that do not exist, and for PDPTEs without PAE paging.
    pub fn set_sregs2(&mut self, sregs2: &kvm_sregs2) -> Result<(), Error> {
        let valid_flag = u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID);
        let with_pdptrs = sregs2.flags & valid_flag != 0;
        let pae = pae_paging(sregs2.cr0, sregs2.cr4, sregs2.efer);
        if sregs2.flags & !valid_flag != 0 || with_pdptrs && !pae {
            return Err(Error::Invalid("flags of kvm_sregs2"));
        }
        self.put_sregs(&common(sregs2))?;
        if with_pdptrs {
            self.cpu.state.pdptr = sregs2.pdptrs;
        } else {
            self.cpu.reload_pdptrs();
        }
        self.cpu.paging_changed();
        Ok(())
    }

    /// Sets all but the interrupt and the PDPTEs.
    fn put_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), Error> {
        if !valid(sregs, &self.cpu.features) {
            return Err(Error::Invalid("CR0, CR4, EFER and CS.L contradict each other"));
        }
        self.set_apic_base(sregs.apic_base)?;
        self.notify.context_given();
        let s = &mut self.cpu.state;
        s.segs = [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs].map(segment_in);
        s.tr = segment_in(&sregs.tr);
        s.ldtr = segment_in(&sregs.ldt);
        s.gdtr = TableRegister { base: sregs.gdt.base, limit: sregs.gdt.limit };
        s.idtr = TableRegister { base: sregs.idt.base, limit: sregs.idt.limit };
        s.cr0 = sregs.cr0 | cr0::ET;
        s.cr2 = sregs.cr2;
        s.cr3 = sregs.cr3;
        s.cr4 = sregs.cr4;
        s.efer = sregs.efer;
        s.cpl = level(s);
        self.set_cr8(sregs.cr8);
        let s = &self.cpu.state;
        let reset_vector = s.rip == 0xfff0 && s.segs[1].selector == 0xf000 && s.segs[1].base == 0xffff_0000;
        if self.apic_base() & APIC_BASE_BSP != 0 && reset_vector && s.real_mode() {
            // Clients that do not know of KVM_SET_MP_STATE reset a halted vCPU like this.
            self.mp_state = KVM_MP_STATE_RUNNABLE;
        }
        self.cpu.refresh_mode();
        Ok(())
    }

    /// KVM_GET_FPU.
    pub fn fpu(&self) -> kvm_fpu {
        let s = &self.cpu.state;
        let mut fpu = kvm_fpu {
            fpr: s.x87.st,
            fcw: s.x87.fcw,
            fsw: s.x87.fsw,
            ftwx: s.x87.ftw,
            last_opcode: s.x87.fop,
            last_ip: s.x87.fip,
            last_dp: s.x87.fdp,
            mxcsr: s.mxcsr,
            ..kvm_fpu::default()
        };
        for (out, zmm) in fpu.xmm.iter_mut().zip(&s.zmm) {
            out.copy_from_slice(&zmm.0[..16]);
        }
        fpu
    }

    /// KVM_SET_FPU.
    pub fn set_fpu(&mut self, fpu: &kvm_fpu) {
        let s = &mut self.cpu.state;
        s.x87.st = fpu.fpr;
        s.x87.fcw = fpu.fcw;
        s.x87.fsw = fpu.fsw;
        s.x87.ftw = fpu.ftwx;
        s.x87.fop = fpu.last_opcode;
        s.x87.fip = fpu.last_ip;
        s.x87.fdp = fpu.last_dp;
        s.mxcsr = fpu.mxcsr & 0xffff;
        for (xmm, zmm) in fpu.xmm.iter().zip(&mut s.zmm) {
            zmm.0[..16].copy_from_slice(xmm);
        }
    }

    /// KVM_GET_DEBUGREGS.
    pub fn debugregs(&mut self) -> kvm_debugregs {
        self.deliver_payload_early();
        let s = &self.cpu.state;
        kvm_debugregs { db: s.dr, dr6: s.dr6, dr7: s.dr7, flags: 0, reserved: [0; 9] }
    }

    /// KVM_SET_DEBUGREGS. EINVAL for flags or for upper halves of DR6 and DR7.
    pub fn set_debugregs(&mut self, regs: &kvm_debugregs) -> Result<(), Error> {
        if regs.flags != 0 || regs.dr6 >> 32 != 0 || regs.dr7 >> 32 != 0 {
            return Err(Error::Invalid("flags, or bits 63:32 of DR6 or DR7"));
        }
        let s = &mut self.cpu.state;
        s.dr = regs.db;
        s.dr6 = regs.dr6;
        s.dr7 = regs.dr7;
        self.cpu.paging_changed();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{vcpu, vcpu_with_apic};
    use super::*;

    fn refused(result: Result<(), Error>) -> bool {
        result.is_err_and(|error| error.errno() == libc::EINVAL)
    }

    /// A guest that computes without FNINIT got exceptions, which it does not with KVM.
    #[test]
    fn x87_exceptions_are_masked_in_the_beginning() {
        let fpu = vcpu().fpu();
        assert_eq!((fpu.fcw, fpu.fsw, fpu.ftwx, fpu.mxcsr), (0x37f, 0, 0, 0x1f80));
    }

    #[test]
    fn sregs_are_checked_against_the_guests_cpuid() {
        let mut vcpu = vcpu();
        let table = vcpu.vm.system().supported_cpuid();
        vcpu.set_cpuid2(&table).unwrap();
        let good = vcpu.sregs();
        let changes: &[(&str, fn(&mut kvm_sregs))] = &[
            ("paging without protection", |s| s.cr0 |= cr0::PG),
            ("NW without CD", |s| s.cr0 = s.cr0 & !cr0::CD | cr0::NW),
            ("a high bit of CR0", |s| s.cr0 |= 1 << 40),
            ("LMA without LME", |s| s.efer |= efer::LMA),
            ("CS.L outside long mode", |s| s.cs.l = 1),
            ("VMXE", |s| s.cr4 |= cr4::VMXE),
            ("a reserved bit of CR4", |s| s.cr4 |= 1 << 31),
            ("long mode without PAE", |s| {
                s.cr0 |= cr0::PG | cr0::PE;
                s.efer |= efer::LME | efer::LMA;
            }),
            ("CR3 beyond MAXPHYADDR", |s| {
                s.cr0 |= cr0::PG | cr0::PE;
                s.cr4 |= cr4::PAE;
                s.cr3 = 1 << 60;
                s.efer |= efer::LME | efer::LMA;
            }),
            ("APIC base", |s| s.apic_base |= 1),
        ];
        for (name, change) in changes {
            let mut sregs = good;
            change(&mut sregs);
            assert!(refused(vcpu.set_sregs(&sregs)), "{name}");
            assert_eq!(vcpu.sregs(), good, "{name}");
        }
        vcpu.set_sregs(&good).unwrap();
    }

    #[test]
    fn pdptes_are_set_with_pae_paging_only() {
        let mut vcpu = vcpu();
        let mut sregs2 = vcpu.sregs2();
        assert_eq!(sregs2.flags, 0);
        sregs2.flags = KVM_SREGS2_FLAGS_PDPTRS_VALID.into();
        assert!(refused(vcpu.set_sregs2(&sregs2)));
        sregs2.cr0 |= cr0::PG | cr0::PE;
        sregs2.cr4 |= cr4::PAE;
        sregs2.pdptrs = [0x1001, 0x2001, 0, 0x3001];
        vcpu.set_sregs2(&sregs2).unwrap();
        assert_eq!(vcpu.sregs2(), sregs2);
        sregs2.flags = 2;
        assert!(refused(vcpu.set_sregs2(&sregs2)));
    }

    #[test]
    fn interrupts_in_the_bitmap_are_injected() {
        let mut vcpu = vcpu();
        let mut sregs = vcpu.sregs();
        sregs.interrupt_bitmap[1] = 1 << 3;
        vcpu.set_sregs(&sregs).unwrap();
        assert_eq!(vcpu.sregs().interrupt_bitmap, [0, 1 << 3, 0, 0]);
        assert_eq!(vcpu.vcpu_events().interrupt.nr, 67);
    }

    #[test]
    fn the_bootstrap_processor_is_woken_by_its_reset_state() {
        let mut vcpu = vcpu_with_apic();
        let sregs = vcpu.sregs();
        let halted = kvm_bindings::kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_HALTED };
        vcpu.set_mp_state(halted).unwrap();
        vcpu.set_sregs(&sregs).unwrap();
        assert_eq!(vcpu.mp_state().mp_state, KVM_MP_STATE_RUNNABLE);
    }
}
