/* The local APIC's timer: one-shot, periodic, masked, TSC deadline; and priorities. */
#include "guest.h"
#include "smp.h"

#define VECTOR 0x40
#define COUNT(vector) dword ptr [interrupt_counts + 4 * (vector)]

main:
    mov qword ptr [on_interrupt], offset end_of_interrupt
    call enable_apic
    mov r8d, APIC
    mov dword ptr [r8 + APIC_DIVIDE], 0xb /* by 1 */

    BEHAVIOUR(one_shot_fires_once)
    /* One-shot: counts down, fires once, stays at zero. */
    mov dword ptr [r8 + APIC_LVT_TIMER], VECTOR
    mov dword ptr [r8 + APIC_INITIAL], 2000000
    mov eax, [r8 + APIC_CURRENT]
    cmp eax, 2000000
    REQUIRE(jbe)
    sti
1:  hlt
    cmp COUNT(VECTOR), 0
    je 1b
    cli
    REQUIRE_EQ(dword ptr [r8 + APIC_CURRENT], 0)
    sti
    mov edi, 20000
    call wait_microseconds
    cli
    REQUIRE_EQ(COUNT(VECTOR), 1)

    BEHAVIOUR(a_masked_timer_counts_and_fires_nothing)
    /* Masked: counts, fires nothing. */
    mov dword ptr [r8 + APIC_LVT_TIMER], VECTOR | 0x10000
    mov dword ptr [r8 + APIC_INITIAL], 1000
    sti
    mov edi, 10000
    call wait_microseconds
    cli
    REQUIRE_EQ(COUNT(VECTOR), 1)
    REQUIRE_EQ(dword ptr [r8 + APIC_CURRENT], 0)

    BEHAVIOUR(an_initial_count_of_zero_stops_the_timer)
    /* Writing zero stops it. */
    mov dword ptr [r8 + APIC_LVT_TIMER], VECTOR
    mov dword ptr [r8 + APIC_INITIAL], 100000000
    mov dword ptr [r8 + APIC_INITIAL], 0
    REQUIRE_EQ(dword ptr [r8 + APIC_CURRENT], 0)

    BEHAVIOUR(periodic_fires_again_and_again)
    /* Periodic: again and again. */
    mov dword ptr [r8 + APIC_LVT_TIMER], VECTOR | 0x20000
    mov dword ptr [r8 + APIC_INITIAL], 500000
    sti
1:  hlt
    cmp COUNT(VECTOR), 6
    jb 1b
    cli
    mov dword ptr [r8 + APIC_INITIAL], 0

    BEHAVIOUR(the_task_priority_holds_an_interrupt_back)
    /* The task priority holds it back; it waits in IRR. */
    mov edi, 10000
    call wait_microseconds
    sti
    nop
    cli
    mov ebx, COUNT(VECTOR)
    mov dword ptr [r8 + APIC_TPR], 0x40
    mov dword ptr [r8 + APIC_LVT_TIMER], VECTOR
    mov dword ptr [r8 + APIC_INITIAL], 1000
    sti
    mov edi, 10000
    call wait_microseconds
    cli
    REQUIRE_EQ(COUNT(VECTOR), ebx)
    mov r8d, APIC
    test dword ptr [r8 + APIC_IRR + 0x20], 1 /* vector 0x40: bit 0 of the third word */
    REQUIRE(jnz)
    mov rax, cr8
    REQUIRE_EQ(eax, 4)
    sti
    xor eax, eax
    mov cr8, rax
    nop
    cli
    inc ebx
    REQUIRE_EQ(COUNT(VECTOR), ebx)

    BEHAVIOUR(the_higher_of_two_waiting_vectors_comes_first)
    /* Two wait: the higher vector comes first, and holds the lower one back until EOI. */
    mov dword ptr [first], 0
    mov qword ptr [on_interrupt], offset note_order
    IPI(0, ICR_SELF | ICR_FIXED | 0x50)
    IPI(0, ICR_SELF | ICR_FIXED | 0x61)
    sti
    nop
    nop
    cli
    REQUIRE_EQ(dword ptr [first], 0x6150)
    mov qword ptr [on_interrupt], offset end_of_interrupt

    /* TSC deadline, if there is one. */
    mov eax, 1
    cpuid
    bt ecx, 24
    jnc no_deadline
    BEHAVIOUR(tsc_deadline_fires_once_and_disarms)
    mov r8d, APIC
    mov ebx, COUNT(0x41)
    mov dword ptr [r8 + APIC_LVT_TIMER], 0x41 | 0x40000
    mfence
    rdtsc
    shl rdx, 32
    or rax, rdx
    add rax, 3000000
    mov r9, rax
    mov rdx, rax
    shr rdx, 32
    mov ecx, 0x6e0
    wrmsr
    rdmsr
    shl rdx, 32
    or rax, rdx
    REQUIRE_EQ(rax, r9)
    sti
1:  hlt
    cmp COUNT(0x41), ebx
    je 1b
    cli
    rdtsc
    shl rdx, 32
    or rax, rdx
    cmp rax, r9
    REQUIRE(jae)
    mov ecx, 0x6e0
    rdmsr
    or eax, edx
    REQUIRE_EQ(eax, 0)
    /* A deadline that has passed fires at once. */
    mov eax, 1
    xor edx, edx
    wrmsr
    sti
    nop
    nop
    cli
    add ebx, 2
    mov edi, 1000
    sti
    call wait_microseconds
    cli
    REQUIRE_EQ(COUNT(0x41), ebx)
no_deadline:
    PASS

/* RAX: vector. */
end_of_interrupt:
    push rcx
    EOI
    pop rcx
    ret

note_order:
    shl dword ptr [first], 8
    or [first], eax
    push rcx
    EOI
    pop rcx
    ret

    .section .data
    .balign 8
first: .quad 0
