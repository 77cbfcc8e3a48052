/* NMIs: delivered one at a time until IRET; a second one waits; a third is merged with it. */
#include "guest.h"
#include "smp.h"

main:
    call enable_apic
    mov qword ptr [continue_at], offset handler
    /* One to ourselves. */
    mov qword ptr [inner], 0
    call send
    REQUIRE_EQ(dword ptr [nmis], 1)

    /* Within the handler two more are sent: none nests, one comes after IRET. */
    mov dword ptr [nmis], 0
    mov qword ptr [inner], 2
    call send
    REQUIRE_EQ(dword ptr [nmis], 2)
    REQUIRE_EQ(dword ptr [deepest], 1)

    /* An exception's IRET within the handler opens the window early, as the manual says. */
    mov dword ptr [nmis], 0
    mov qword ptr [inner], 1
    mov dword ptr [with_exception], 1
    call send
    REQUIRE_EQ(dword ptr [nmis], 2)
    REQUIRE_EQ(dword ptr [deepest], 2)
    mov dword ptr [with_exception], 0

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
