/* Interrupts in the middle of repeated string instructions: the registers say exactly how far it came, RF is set in the
   image, and the instruction goes on where it was. Then code that writes over the instructions right behind it, also
   across the end of its page. */
#include "guest.h"
#include "smp.h"

#define VECTOR 0x40
#define SOURCE 0x800000
#define TARGET 0xa00000
#define LENGTH 0x200000
#define WANTED 5 /* interrupts to be seen within each instruction */

/* Runs `code` (which ends in the instruction at the label `at`) until it was interrupted midway often enough. */
    .macro interrupted at, code:vararg
    mov qword ptr [watched], offset \at
    mov dword ptr [midway], 0
1:  mov rsi, SOURCE
    mov rdi, TARGET
    mov r12, rdi
    mov r13d, LENGTH
    mov ecx, LENGTH
    mov al, 0x77
    sti
    \code
    cli
    REQUIRE_EQ(rcx, 0)
    cmp dword ptr [midway], WANTED
    jb 1b
    REQUIRE_EQ(dword ptr [wrong], 0)
    .endm

main:
    cld
    mov qword ptr [on_interrupt], offset tick
    mov rdi, SOURCE
    mov ecx, LENGTH / 8
    mov rax, 0x123456789abcdef
1:  mov [rdi], rax
    add rdi, 8
    lea rax, [rax + rax * 4 + 1]
    loop 1b
    call enable_apic
    mov r8d, APIC
    mov dword ptr [r8 + APIC_DIVIDE], 0xb
    mov dword ptr [r8 + APIC_LVT_TIMER], VECTOR | 0x20000
    mov dword ptr [r8 + APIC_INITIAL], 100000

    BEHAVIOUR(interrupts_within_a_repeated_store)
    interrupted at_stos, at_stos: rep stosb
    REQUIRE_EQ(rdi, TARGET + LENGTH)
    mov rdi, TARGET
    mov ecx, LENGTH
    mov al, 0x77
    repe scasb
    REQUIRE(je)
    BEHAVIOUR(interrupts_within_a_repeated_move)
    interrupted at_movs, at_movs: rep movsb
    REQUIRE_EQ(rsi, SOURCE + LENGTH)
    REQUIRE_EQ(rdi, TARGET + LENGTH)
    BEHAVIOUR(interrupts_within_a_repeated_comparison)
    /* Both are the same now: the comparison runs to its end as well. */
    interrupted at_cmps, at_cmps: repe cmpsb
    REQUIRE_EQ(rsi, SOURCE + LENGTH)
    mov rdi, TARGET
    mov rsi, SOURCE
    mov ecx, LENGTH / 8
    repe cmpsq
    REQUIRE(je)
    mov dword ptr [r8 + APIC_INITIAL], 0
    sti
    nop
    nop
    cli

    BEHAVIOUR(a_repeated_store_writes_over_the_code_behind_it)
    /* A REP STOSB that runs over the instructions behind it, and ends just before those that follow. */
    mov ecx, 50
1:  mov r14d, ecx
    mov al, 0xf4 /* HLT, which must not be run: then NOPs again */
    mov rdi, offset behind
    mov ecx, 8
    rep stosb
    mov al, 0x90
    mov rdi, offset behind
    mov ecx, 8
    rep stosb
behind:
    .skip 8, 0xf4
    mov ecx, r14d
    dec ecx
    jnz 1b

    BEHAVIOUR(a_routine_writes_its_own_continuation)
    /* A routine at the end of a page writes its own continuation at the start of the next one. */
    mov rsi, offset routine
    mov rdi, SCRATCH + 0x1000 - (routine_end - routine)
    mov ecx, offset routine_end - routine
    rep movsb
    mov ebp, SCRATCH + 0x1000
    mov ebx, SCRATCH + 0x1000 - (routine_end - routine)
    mov ecx, 300
1:  mov edx, ecx
    call rbx
    REQUIRE_EQ(eax, ecx)
    loop 1b
    PASS

/* EDX becomes the immediate of the MOV EAX that it writes. */
routine:
    mov byte ptr [rbp], 0xb8
    mov byte ptr [rbp + 5], 0xc3
    mov [rbp + 1], edx
routine_end:

/* In the frame above our return address and RAX: vector, error code, RIP, CS, RFLAGS. */
tick:
    push rdx
    mov rdx, [rsp + 40] /* the RIP */
    cmp rdx, [watched]
    jne 1f
    mov rdx, rdi
    sub rdx, r12
    jz 1f /* before the first iteration, as at any other instruction */
    add rdx, rcx
    cmp rdx, r13
    je 2f
    inc dword ptr [wrong]
2:  bt dword ptr [rsp + 56], 16 /* RF */
    jc 2f
    inc dword ptr [wrong]
2:  inc dword ptr [midway]
1:  push rcx
    EOI
    pop rcx
    pop rdx
    ret

    .section .data
    .balign 8
watched: .quad 0
midway: .quad 0
wrong: .quad 0
