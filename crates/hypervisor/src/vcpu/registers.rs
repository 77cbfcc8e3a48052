//! KVM_GET/SET_REGS, SREGS, FPU and DEBUGREGS: the architectural state in KVM's structures.

use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use silicon::state::{Segment, TableRegister, cr0, cr4, efer, reg};

use super::Vcpu;
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
fn valid(sregs: &kvm_sregs) -> bool {
    let long = sregs.efer & efer::LMA != 0;
    if sregs.efer & efer::LME != 0 && sregs.cr0 & cr0::PG != 0 {
        if sregs.cr4 & cr4::PAE == 0 || !long {
            return false;
        }
    } else if long || sregs.cs.l != 0 {
        return false;
    }
    let paging_needs_pe = sregs.cr0 & cr0::PG == 0 || sregs.cr0 & cr0::PE != 0;
    paging_needs_pe && sregs.cr0 >> 32 == 0
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

    /// KVM_SET_REGS. Drops a pending exception, as KVM does.
    pub fn set_regs(&mut self, regs: &kvm_regs) {
        let r = &mut self.cpu.state.regs;
        let low = [regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi];
        let high = [regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15];
        r[..8].copy_from_slice(&low);
        r[8..16].copy_from_slice(&high);
        self.cpu.state.rip = regs.rip;
        self.cpu.state.set_rflags(regs.rflags);
        self.cpu.injection = None;
        self.cpu.refresh_mode();
    }

    /// KVM_GET_SREGS.
    pub fn sregs(&self) -> kvm_sregs {
        let s = &self.cpu.state;
        let [es, cs, ss, ds, fs, gs] = s.segs.each_ref().map(segment_out);
        let mut interrupt_bitmap = [0; 4];
        if let Some(silicon::vmx::Injection::Interrupt(vector)) = self.cpu.injection {
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
        if !valid(sregs) {
            return Err(Error::Invalid("CR0, CR4, EFER and CS.L contradict each other"));
        }
        self.set_apic_base(sregs.apic_base)?;
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
        // SS.DPL is the CPL (SDM vol. 3C, 25.4.1); real mode runs at 0 and virtual-8086 mode at 3.
        s.cpl = if s.real_mode() {
            0
        } else if s.v8086() {
            3
        } else {
            s.segs[2].dpl()
        };
        self.set_cr8(sregs.cr8);
        let pending = sregs.interrupt_bitmap.iter().enumerate().find(|(_, word)| **word != 0);
        if let Some((i, word)) = pending {
            let vector = (i as u32 * 64 + word.trailing_zeros()) as u8;
            self.cpu.injection = Some(silicon::vmx::Injection::Interrupt(vector));
        }
        self.cpu.refresh_mode();
        self.cpu.paging_changed();
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
    pub fn debugregs(&self) -> kvm_debugregs {
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
