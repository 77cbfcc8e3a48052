/* Interprocessor interrupts: fixed, to self, to all, to the others, NMI; INIT and SIPI start a processor again. */
#include "guest.h"
#include "smp.h"

#define COUNT(vector) dword ptr [interrupt_counts + 4 * (vector)]
#define UNTIL(a, b) 95: pause; cmp a, b

main:
#ifdef X2APIC
    mov eax, 1
    cpuid
    bt ecx, 21
    mov rsi, offset text_x2apic
    jnc skip
#endif
    mov qword ptr [on_interrupt], offset end_of_interrupt
    call enable_apic
    mov edi, 3
    call start_others
    sti

    BEHAVIOUR(fixed_interrupts_reach_one_self_all_and_others)
    IPI(1, ICR_FIXED | 0x41)
    UNTIL(COUNT(0x41), 1); jne 95b
    IPI(0, ICR_FIXED | ICR_SELF | 0x42)
    UNTIL(COUNT(0x42), 1); jne 95b
    IPI(0, ICR_FIXED | ICR_ALL | 0x43)
    UNTIL(COUNT(0x43), 4); jne 95b
    IPI(0, ICR_FIXED | ICR_OTHERS | 0x44)
    UNTIL(COUNT(0x44), 3); jne 95b
    BEHAVIOUR(logical_destinations)
    /* Logical destination, flat (x2APIC: cluster 0): bits 1 and 3. */
#ifdef X2APIC
    IPI(0xa, ICR_FIXED | 0x800 | 0x45)
#else
    mov ecx, APIC
    mov eax, 0x0a000000
    mov [rcx + APIC_ICR_HIGH], eax
    mov dword ptr [rcx + APIC_ICR], ICR_FIXED | 0x800 | 0x45
#endif
    UNTIL(COUNT(0x45), 2); jne 95b

    BEHAVIOUR(interrupts_in_a_row_are_all_delivered)
    /* A hundred in a row, each waited for, then a burst of which at least one arrives. */
    xor ebx, ebx
1:  IPI(2, ICR_FIXED | 0x46)
    inc ebx
2:  pause
    cmp COUNT(0x46), ebx
    jne 2b
    cmp ebx, 100
    jne 1b
    mov ebx, 100
1:  IPI(2, ICR_FIXED | 0x47)
    dec ebx
    jnz 1b
    UNTIL(COUNT(0x47), 1); jb 95b

    BEHAVIOUR(an_nmi_wakes_a_halted_processor)
    /* An NMI arrives though interrupts are off, and wakes from HLT. */
    mov qword ptr [continue_at], offset nmi
    IPI(3, ICR_NMI)
    UNTIL(dword ptr [nmis], 1); jne 95b
    mov qword ptr [continue_at], 0

    BEHAVIOUR(init_stops_and_sipi_starts_a_processor)
    /* INIT stops a processor; SIPI starts it again at the trampoline. */
    mov eax, [others_running]
    REQUIRE_EQ(eax, 3)
    IPI(1, ICR_INIT)
    mov edi, 1000
    call wait_microseconds
    IPI(1, ICR_FIXED | 0x48) /* not taken while it waits for SIPI */
    mov edi, 1000
    call wait_microseconds
    REQUIRE_EQ(COUNT(0x48), 0)
    IPI(1, ICR_STARTUP | TRAMPOLINE >> 12)
    UNTIL(dword ptr [others_running], 4); jne 95b
    IPI(1, ICR_FIXED | 0x49)
    UNTIL(COUNT(0x49), 1); jne 95b
#ifdef X2APIC
    BEHAVIOUR(x2apic_registers_and_what_they_refuse)
    /* Registers of their own: the IDs, an interrupt to oneself, what cannot be written or read. */
    mov ecx, 0x802
    rdmsr
    or eax, edx
    REQUIRE_EQ(eax, 0)
    mov ecx, 0x80d
    rdmsr
    REQUIRE_EQ(eax, 1)
    X2_WRITE(0x83f, 0x4a, 0)
    UNTIL(COUNT(0x4a), 1); jne 95b
    cli
    .irp number, 0x802, 0x80d, 0x831, 0x80e
    TRY
    X2_WRITE(\number, 0, 0)
    FAULTS(GP, 0)
    .endr
    .irp number, 0x83f, 0x80b, 0x831, 0x80e
    TRY
    mov ecx, \number
    rdmsr
    FAULTS(GP, 0)
    .endr
    TRY
    X2_WRITE(0x80b, 1, 0) /* EOI takes zero alone */
    FAULTS(GP, 0)
    TRY
    X2_WRITE(0x808, 0x100, 0)
    FAULTS(GP, 0)
    BEHAVIOUR(x2apic_is_left_through_the_disabled_state)
    /* From x2APIC mode the way back leads through the disabled state. */
    mov ecx, 0x1b
    rdmsr
    mov ebx, eax
    TRY
    and eax, ~(1 << 10)
    wrmsr
    FAULTS(GP, 0)
    mov ecx, 0x1b
    xor edx, edx
    mov eax, ebx
    and eax, ~(3 << 10)
    wrmsr
    TRY
    mov ecx, 0x802
    rdmsr
    FAULTS(GP, 0)
    mov ecx, 0x1b
    xor edx, edx
    mov eax, ebx
    and eax, ~(1 << 10)
    wrmsr
    mov ecx, APIC
    mov eax, [rcx + APIC_ID]
    REQUIRE_EQ(eax, 0)
#endif
    PASS

ap_main:
#ifndef X2APIC
    /* Logical ID: one bit for each processor. */
    mov ecx, APIC
    mov eax, [rcx + APIC_ID]
    shr eax, 24
    xchg eax, ecx
    mov edx, 1
    shl edx, cl
    shl edx, 24
    mov ecx, APIC
    mov [rcx + 0xd0], edx
    mov dword ptr [rcx + 0xe0], 0xffffffff
#endif
1:  sti
    hlt
    jmp 1b

end_of_interrupt:
    push rcx
    EOI
    pop rcx
    ret

nmi:
    lock inc dword ptr [nmis]
    jmp return_from_exception

    .section .data
    .balign 8
nmis: .quad 0
#ifdef X2APIC
text_x2apic: .asciz "x2APIC"
#endif
