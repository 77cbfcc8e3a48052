/* One processor changes the code that another one runs. After the change is announced (and the other has serialized),
   the other runs the new code; without any announcement it runs either the old or the new, never a mixture. */
#include "guest.h"
#include "smp.h"

#define ROUNDS 2000

main:
    call enable_apic
    mov edi, 1
    call start_others
    BEHAVIOUR(announced_changes_are_executed_by_the_other_processor)
    /* Announced: write, then publish the number; the other serializes by CPUID. */
    xor ebx, ebx
1:  inc ebx
    mov [function + 1], ebx
    mov [published], ebx
2:  pause
    cmp [seen], ebx
    jb 2b
    cmp ebx, ROUNDS
    jne 1b
    REQUIRE_EQ(dword ptr [wrong], 0)

    BEHAVIOUR(unannounced_changes_are_seen_whole)
    /* Unannounced: the four aligned bytes of the immediate change while the other runs them. */
    mov dword ptr [phase], 1
    mov ecx, 10000
1:  mov dword ptr [aligned_immediate], 0x11111111
    mov dword ptr [aligned_immediate], 0x22222222
    loop 1b
    mov dword ptr [phase], 2
2:  pause
    cmp dword ptr [phase], 3
    jne 2b
    REQUIRE_EQ(dword ptr [wrong], 0)
    REQUIRE_EQ(dword ptr [last], 0x22222222)
    PASS

ap_main:
    xor ebp, ebp
1:  pause
    cmp [published], ebp
    je 1b
    mov ebp, [published]
    xor eax, eax
    cpuid
    call function
    cmp eax, ebp
    jae 2f
    inc dword ptr [wrong]
2:  mov [seen], ebp
    cmp ebp, ROUNDS
    jne 1b
1:  pause
    cmp dword ptr [phase], 0
    je 1b
1:  call aligned_function
    cmp eax, 0x11111111
    je 2f
    cmp eax, 0x22222222
    je 2f
    inc dword ptr [wrong]
2:  cmp dword ptr [phase], 2
    jne 1b
    xor eax, eax
    cpuid
    call aligned_function
    mov [last], eax
    mov dword ptr [phase], 3
    ret

    .balign 64
function:
    mov eax, 0
    ret
    .balign 64
    .skip 3, 0x90
aligned_function:
    .byte 0xb8
aligned_immediate:
    .long 0x22222222
    ret

    .section .data
    .balign 8
published: .quad 0
seen: .quad 0
wrong: .quad 0
phase: .quad 0
last: .quad 0
