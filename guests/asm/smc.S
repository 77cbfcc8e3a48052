/* Code that changes itself: the next instruction is always the new one. */
#include "guest.h"

main:
    BEHAVIOUR(an_instruction_of_the_same_block_is_changed)
    /* The immediate of an instruction further on in the same block, again and again. */
    xor ebx, ebx
    xor ecx, ecx
1:  mov dword ptr [patched + 1], ebx
patched:
    mov eax, 0x11111111
    cmp eax, ebx
    REQUIRE(je)
    add ebx, 0x01010101
    inc ecx
    cmp ecx, 2000
    jne 1b

    BEHAVIOUR(the_very_next_instruction_is_changed)
    /* The very next byte. */
    mov byte ptr [next_byte], 0x40 + 0x50 /* nop */
    mov byte ptr [next_byte], 0xf8 /* clc */
    stc
next_byte:
    nop
    REQUIRE(jnc)

    BEHAVIOUR(a_function_is_written_anew)
    /* A function written to fresh memory, run, written again, run again. */
    mov ecx, 500
    mov rdi, SCRATCH
1:  mov byte ptr [rdi], 0xb8
    mov [rdi + 1], ecx
    mov byte ptr [rdi + 5], 0xc3
    call rdi
    REQUIRE_EQ(eax, ecx)
    loop 1b

    BEHAVIOUR(code_is_replaced_by_a_repeated_move)
    /* By REP MOVSB over running code. */
    mov ecx, 100
1:  push rcx
    mov rdi, offset target
    mov rsi, offset return_1
    test cl, 1
    jz 2f
    mov rsi, offset return_2
2:  and ecx, 1
    lea ebx, [rcx + 1]
    mov ecx, 6
    rep movsb
    call target
    REQUIRE_EQ(eax, ebx)
    pop rcx
    loop 1b

    BEHAVIOUR(code_is_changed_through_another_mapping)
    /* Through another mapping of the same page. */
    mov qword ptr [SCRATCH_PTE(5)], SCRATCH + (P_ | W_ | U_)
    invlpg [SCRATCH + 0x5000]
    mov ecx, 500
1:  mov byte ptr [SCRATCH + 0x5000], 0xb8
    mov [SCRATCH + 0x5001], ecx
    mov byte ptr [SCRATCH + 0x5005], 0xc3
    mov rax, SCRATCH
    call rax
    REQUIRE_EQ(eax, ecx)
    loop 1b

    BEHAVIOUR(the_page_of_an_address_is_exchanged)
    /* The mapping changes, the linear address stays. */
    mov byte ptr [SCRATCH + 0x2000], 0xb8
    mov dword ptr [SCRATCH + 0x2001], 22
    mov byte ptr [SCRATCH + 0x2005], 0xc3
    mov byte ptr [SCRATCH + 0x3000], 0xb8
    mov dword ptr [SCRATCH + 0x3001], 33
    mov byte ptr [SCRATCH + 0x3005], 0xc3
    mov ebp, SCRATCH + 0x6000
    mov ecx, 100
1:  mov qword ptr [SCRATCH_PTE(6)], SCRATCH + 0x2000 + (P_ | W_ | U_)
    invlpg [rbp]
    call rbp
    REQUIRE_EQ(eax, 22)
    mov qword ptr [SCRATCH_PTE(6)], SCRATCH + 0x3000 + (P_ | W_ | U_)
    invlpg [rbp]
    call rbp
    REQUIRE_EQ(eax, 33)
    loop 1b

    BEHAVIOUR(an_instruction_across_two_pages_is_changed)
    /* An instruction across two pages, of which the second one changes. */
    mov ebp, SCRATCH + 0xffd
    mov byte ptr [rbp], 0xb8
    mov byte ptr [rbp + 5], 0xc3
    mov ecx, 500
1:  mov [rbp + 1], ecx
    call rbp
    REQUIRE_EQ(eax, ecx)
    lea eax, [ecx + 0x77000000]
    mov [rbp + 1], eax
    mov edx, eax
    call rbp
    REQUIRE_EQ(eax, edx)
    loop 1b

    BEHAVIOUR(a_push_writes_over_the_instruction_behind_it)
    /* A push that writes over the instruction behind it. */
    mov rbp, rsp
    mov ecx, 100
1:  mov rdi, offset pusher
    lea rsp, [pushed + 8]
    mov rax, 0x90909000000000b8 /* mov eax, imm32; nop; nop; nop */
    movzx edx, cl
    shl rdx, 8
    or rax, rdx
    jmp rdi
after_pushed:
    mov rsp, rbp
    movzx edx, cl
    REQUIRE_EQ(eax, edx)
    loop 1b
    PASS

    .balign 64
target:
    .skip 16, 0x90
return_1:
    mov eax, 1
    ret
return_2:
    mov eax, 2
    ret
    .balign 64
pusher:
    push rax
pushed:
    .skip 8, 0x90
    jmp after_pushed
