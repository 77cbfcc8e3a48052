/* NMIs: delivered one at a time until IRET; a second one waits; a third is merged with it. */
#include "guest.h"
#include "smp.h"

#define IDT_ERROR(vector) ((vector) * 8 + 2)
#define EXT 1

main:
    call enable_apic
    mov qword ptr [continue_at], offset handler
    BEHAVIOUR(an_nmi_is_delivered_once)
    /* One to ourselves. */
    mov qword ptr [inner], 0
    call send
    REQUIRE_EQ(dword ptr [nmis], 1)

    BEHAVIOUR(nmis_do_not_nest_and_merge)
    /* Within the handler two more are sent: none nests, one comes after IRET. */
    mov dword ptr [nmis], 0
    mov qword ptr [inner], 2
    call send
    REQUIRE_EQ(dword ptr [nmis], 2)
    REQUIRE_EQ(dword ptr [deepest], 1)

    BEHAVIOUR(an_iret_within_the_handler_opens_the_window)
    /* An exception's IRET within the handler opens the window early, as the manual says. */
    mov dword ptr [nmis], 0
    mov qword ptr [inner], 1
    mov dword ptr [with_exception], 1
    call send
    REQUIRE_EQ(dword ptr [nmis], 2)
    REQUIRE_EQ(dword ptr [deepest], 2)
    mov dword ptr [with_exception], 0

    BEHAVIOUR(sti_holds_interrupts_for_one_instruction)
    /* MOV SS and STI hold maskable interrupts for an instruction; HLT behind STI is woken by a waiting one. */
    mov qword ptr [continue_at], 0
    mov ecx, APIC
    mov qword ptr [on_interrupt], offset end_of_interrupt
    IPI(0, ICR_SELF | ICR_FIXED | 0x50)
    mov ebx, 0
    sti
    inc ebx /* runs before the interrupt */
    inc ebx
    cli
    REQUIRE_EQ(dword ptr [at_interrupt], 1)
    IPI(0, ICR_SELF | ICR_FIXED | 0x50)
    mov ebx, 5
    sti
    cli /* the shadow ends with the window closed: nothing is taken */
    inc ebx
    inc ebx
    sti
    nop
    cli
    REQUIRE_EQ(dword ptr [at_interrupt], 7)
    IPI(0, ICR_SELF | ICR_FIXED | 0x50)
    mov ebx, 9
    sti
    hlt
    cli
    REQUIRE_EQ(dword ptr [at_interrupt], 9)

    BEHAVIOUR(an_interrupt_that_cannot_be_delivered_becomes_the_fault_alone)
    /* An interrupt is benign: the fault of its delivery is delivered instead, for the interrupted instruction and with
       EXT, and the interrupt does not come again: the APIC has handed it over. */
    mov qword ptr [on_interrupt], 0
    mov byte ptr [idt + 0x50 * 16 + 5], 0x0e
    TRY
    IPI(0, ICR_SELF | ICR_FIXED | 0x50)
    sti
    nop
interrupted:
    nop
    FAULTS_AT(NP, IDT_ERROR(0x50) + EXT, interrupted)
    cli
    mov byte ptr [idt + 0x50 * 16 + 5], 0x8e
    mov ecx, APIC
    test dword ptr [rcx + APIC_ISR + 0x20], 1 << 16
    REQUIRE(jnz)
    test dword ptr [rcx + APIC_IRR + 0x20], 1 << 16
    REQUIRE(jz)
    mov ebx, [interrupt_counts + 4 * 0x50]
    mov dword ptr [rcx + APIC_EOI], 0
    sti
    nop
    nop
    cli
    REQUIRE_EQ(dword ptr [interrupt_counts + 4 * 0x50], ebx)

    BEHAVIOUR(an_nmi_that_cannot_be_delivered_becomes_the_fault_alone)
    mov byte ptr [idt + 2 * 16 + 5], 0x0e
    TRY
    IPI(0, ICR_NMI)
    mov ecx, 1000
1:  pause
    loop 1b
    FAULTS(NP, IDT_ERROR(2) + EXT)
    mov byte ptr [idt + 2 * 16 + 5], 0x8e
    /* The fault came as any other, so that an IRET opens the window again. */
    push KERNEL_DS
    lea rax, [rsp + 8]
    push rax
    push 2
    push KERNEL_CS
    push offset opened
    iretq
opened:
    mov qword ptr [continue_at], offset handler
    mov dword ptr [nmis], 0
    mov qword ptr [inner], 0
    call send
    mov qword ptr [continue_at], 0
    REQUIRE_EQ(dword ptr [nmis], 1)
    PASS

send:
    IPI(0, ICR_NMI)
    mov ecx, 1000
1:  pause
    loop 1b
    ret

handler:
    cmp dword ptr [got_vector], 2
    jne 3f
    inc dword ptr [nmis]
    inc dword ptr [depth]
    mov eax, [depth]
    cmp eax, [deepest]
    jbe 1f
    mov [deepest], eax
1:  cmp dword ptr [inner], 0
    je 2f
    dec dword ptr [inner]
    push rcx
    IPI(0, ICR_NMI)
    mov ecx, 1000
4:  pause
    loop 4b
    pop rcx
    cmp dword ptr [with_exception], 0
    je 1b
    int3 /* its handler returns with IRET */
    jmp 1b
2:  dec dword ptr [depth]
3:  jmp return_from_exception

end_of_interrupt:
    mov [at_interrupt], ebx
    push rcx
    EOI
    pop rcx
    ret

    .section .data
    .balign 8
nmis: .quad 0
inner: .quad 0
depth: .quad 0
deepest: .quad 0
with_exception: .quad 0
at_interrupt: .quad 0
