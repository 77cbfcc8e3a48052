//! A register dump for messages.

use std::fmt::Write;

use hypervisor::Vcpu;
use kvm_bindings::kvm_segment;

/// The registers of a virtual CPU as text, without a line end at the end.
pub(crate) fn dump(vcpu: &mut Vcpu) -> String {
    let (regs, sregs) = (vcpu.regs(), vcpu.sregs());
    let mut text = String::new();
    let general = [
        ("rax", regs.rax, "rbx", regs.rbx, "rcx", regs.rcx, "rdx", regs.rdx),
        ("rsi", regs.rsi, "rdi", regs.rdi, "rsp", regs.rsp, "rbp", regs.rbp),
        ("r8 ", regs.r8, "r9 ", regs.r9, "r10", regs.r10, "r11", regs.r11),
        ("r12", regs.r12, "r13", regs.r13, "r14", regs.r14, "r15", regs.r15),
        ("rip", regs.rip, "flg", regs.rflags, "cr2", sregs.cr2, "cr3", sregs.cr3),
        ("cr0", sregs.cr0, "cr4", sregs.cr4, "cr8", sregs.cr8, "efr", sregs.efer),
    ];
    for (a, av, b, bv, c, cv, d, dv) in general {
        let _ = writeln!(text, "{a} {av:016x}  {b} {bv:016x}  {c} {cv:016x}  {d} {dv:016x}");
    }
    let segments = [
        ("cs ", &sregs.cs),
        ("ss ", &sregs.ss),
        ("ds ", &sregs.ds),
        ("es ", &sregs.es),
        ("fs ", &sregs.fs),
        ("gs ", &sregs.gs),
        ("tr ", &sregs.tr),
        ("ldt", &sregs.ldt),
    ];
    for (name, segment) in segments {
        let _ = writeln!(text, "{name} {}", describe(segment));
    }
    let (gdt, idt) = (&sregs.gdt, &sregs.idt);
    let _ = write!(
        text,
        "gdt {:016x} limit {:04x}  idt {:016x} limit {:04x}",
        gdt.base, gdt.limit, idt.base, idt.limit
    );
    text
}

fn describe(s: &kvm_segment) -> String {
    let width = match (s.l, s.db) {
        (1, _) => "64-bit",
        (_, 1) => "32-bit",
        _ => "16-bit",
    };
    let (usable, present) =
        (if s.unusable == 0 { "" } else { " unusable" }, if s.present == 1 { "" } else { " absent" });
    format!(
        "{:04x} base {:016x} limit {:08x} type {:x} s {} dpl {} {width}{present}{usable}",
        s.selector, s.base, s.limit, s.type_, s.s, s.dpl
    )
}
