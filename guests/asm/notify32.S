/* An event window that never opens (CVE-2015-5307): at CPL 3 with alignment checking, a handler of #AC that is at CPL 3 too
   and has the same odd stack. No instruction gets done until the machine's monitor makes the stack even; the handler then
   shows that the fault was delivered once, and that nothing else had got in.
   The machine sends an NMI and an interrupt (vector 0x40) while it loops. */
#include "mode32.h"

#define USER_GATE(vector, handler) \
    mov eax, offset handler; mov [idt + vector * 8], ax; mov word ptr [idt + vector * 8 + 2], USER_CS32; \
    mov word ptr [idt + vector * 8 + 4], 0x8e00; shr eax, 16; mov [idt + vector * 8 + 6], ax
#define KERNEL_GATE(vector, handler) \
    mov eax, offset handler; mov [idt + vector * 8], ax; mov word ptr [idt + vector * 8 + 2], CODE32_CS; \
    mov word ptr [idt + vector * 8 + 4], 0x8e00; shr eax, 16; mov [idt + vector * 8 + 6], ax
#define APIC 0xfee00000

begin32:
    USER_GATE(AC, aligned)
    KERNEL_GATE(2, on_nmi)
    KERNEL_GATE(0x40, on_irq)
    mov dword ptr [APIC + 0xf0], 0x1ff
    mov dword ptr [APIC + 0x80], 0
    /* LINT0 masked: firmware may have left the PIT's tick on, which would come in before the loop. */
    mov dword ptr [APIC + 0x350], 0x10000
    mov eax, cr0
    or eax, CR0_AM
    mov cr0, eax
    BEHAVIOUR(alignment_faults_for_ever)
    /* EFLAGS: AC, IOPL 3 for the ports, IF. */
    ENTER_USER32(0x43202)
    mov [even], esp
    dec esp
at_push:
    push eax
    /* The handler goes on here, at CPL 3. */
aligned:
    EQUAL(dword ptr [esp], 0)
    EQUAL(dword ptr [esp + 4], offset at_push)
    EQUAL(dword ptr [esp + 8], USER_CS32)
    /* One frame, below the place where the monitor has put the stack. */
    lea eax, [esp + 16 + 4]
    EQUAL(eax, [even])
    BEHAVIOUR(what_had_to_wait_comes_once_the_window_opens)
    EQUAL(dword ptr [early], 0)
    sti
    mov ecx, 100000000
1:  cmp dword ptr [nmis], 1
    jne 2f
    cmp dword ptr [irqs], 1
    je 3f
2:  dec ecx
    jnz 1b
3:  EQUAL(dword ptr [nmis], 1)
    EQUAL(dword ptr [irqs], 1)
    PASS32

    /* Where an event came in: in the loop RIP would be at the PUSH. */
on_nmi:
    inc dword ptr ss:[nmis]
    jmp 1f
on_irq:
    inc dword ptr ss:[irqs]
    mov dword ptr ss:[APIC + 0xb0], 0
1:  cmp dword ptr [esp], offset at_push
    jne 2f
    inc dword ptr ss:[early]
2:  iretd

    .section .data
    .balign 16
nmis: .long 0
irqs: .long 0
early: .long 0
even: .long 0
    .section .text
