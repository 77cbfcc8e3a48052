/* Exceptions in 32-bit protected mode: vectors, error codes, return addresses; segment limits and types; stack switches
   and what they push; call gates that copy parameters. */
#include "mode32.h"

#define IDT_ERROR(vector) ((vector) * 8 + 2)
#define SMALL SPARE_SEL            /* data, limit 0xfff */
#define DOWN (SPARE_SEL + 8)       /* data, expand down: from 0x1000 on */
#define READ_ONLY (SPARE_SEL + 16) /* data */
#define EXECUTE (SPARE_SEL + 24)   /* code that cannot be read */
#define SHORT_CODE (SPARE_SEL + 32)/* code, limit 0x1fffff */
#define CONFORMING (SPARE_SEL + 40)
#define ABSENT (SPARE_SEL + 48)
#define GATE (SPARE_SEL + 56)
#define CODE_1 (SPARE_SEL + 64)    /* code and data of level 1 */
#define DATA_1 (SPARE_SEL + 72)
#define SET_SEGMENT(selector, low, high) mov dword ptr [gdt + selector], low; mov dword ptr [gdt + selector + 4], high

begin32:
    SET_SEGMENT(SMALL, 0x00000fff, 0x0040f300)
    SET_SEGMENT(DOWN, 0x00000fff, 0x0040f700)
    SET_SEGMENT(READ_ONLY, 0x0000ffff, 0x00cff100)
    SET_SEGMENT(EXECUTE, 0x0000ffff, 0x00cf9900)
    SET_SEGMENT(SHORT_CODE, 0x000001ff, 0x00c09b00)
    SET_SEGMENT(CONFORMING, 0x0000ffff, 0x00cf9f00)
    SET_SEGMENT(ABSENT, 0x0000ffff, 0x00cf7300)
    SET_SEGMENT(CODE_1, 0x0000ffff, 0x00cfbb00)
    SET_SEGMENT(DATA_1, 0x0000ffff, 0x00cfb300)

    BEHAVIOUR(faults_report_the_instruction_traps_the_next)
    /* Faults report the instruction, traps the next one. */
    TRY32
    xor ecx, ecx
at_de:
    div ecx
    FAULTS32_AT(DE, 0, at_de)
    TRY32
    mov eax, 0x80000000
    cdq
    mov ecx, -1
    idiv ecx
    FAULTS32(DE, 0)
    TRY32
    int3
after_int3:
    FAULTS32_AT(BP, 0, after_int3)
    TRY32
    xor eax, eax
    into
    PASSES32
    TRY32
    mov eax, 0x7fffffff
    inc eax
    into
after_into:
    FAULTS32_AT(OF, 0, after_into)
    mov dword ptr [bounds], -5
    mov dword ptr [bounds + 4], 5
    TRY32
    mov eax, -5
    bound eax, [bounds]
    mov eax, 5
    bound eax, [bounds]
    PASSES32
    TRY32
    mov eax, -6
at_bound:
    bound eax, [bounds]
    FAULTS32_AT(BR, 0, at_bound)
    TRY32
at_ud:
    ud2
    FAULTS32_AT(UD, 0, at_ud)
    test dword ptr [got_rflags], 0x10000
    REQUIRE32(jnz)
    TRY32
    .byte 0x0f, 0x05 /* SYSCALL, which Intel processors have in 64-bit mode alone */
    FAULTS32(UD, 0)
    TRY32
    .byte 0xf1
after_int1:
    FAULTS32_AT(DB, 0, after_int1)
    TRY32
    pushfd
    or dword ptr [esp], 0x100
    popfd
    nop
after_step:
    FAULTS32_AT(DB, 0, after_step)
    mov eax, cr0
    or eax, CR0_TS | CR0_NE
    mov cr0, eax
    TRY32
    fnop
    FAULTS32(NM, 0)
    clts

    BEHAVIOUR(floating_point_exceptions_of_32_bit_code)
    /* #MF with the next waiting instruction; #XM at once, if CR4 says so, else #UD. */
    fninit
    mov word ptr [word32], 0x37b
    fldcw [word32]
    fld1
    fldz
    TRY32
    fdivp st(1), st
    nop
at_wait:
    wait
    FAULTS32_AT(MF, 0, at_wait)
    fninit
    mov eax, CR4_OSFXSR
    mov cr4, eax
    mov dword ptr [word32], 0x1f80 & ~0x200
    ldmxcsr [word32]
    xorps xmm0, xmm0
    TRY32
    divss xmm0, xmm0
    PASSES32 /* 0 / 0 is invalid, not a division by zero */
    mov eax, 1
    cvtsi2ss xmm1, eax
    xorps xmm0, xmm0
    TRY32
at_unsupported:
    divss xmm1, xmm0
    FAULTS32_AT(UD, 0, at_unsupported)
    mov eax, CR4_OSFXSR | CR4_OSXMMEXCPT
    mov cr4, eax
    TRY32
at_divss:
    divss xmm1, xmm0
    FAULTS32_AT(XM, 0, at_divss)

    BEHAVIOUR(segment_registers_fault_with_the_selector)
    /* Segment registers: #NP, #SS, #GP with the selector. */
    TRY32
    mov eax, ABSENT
    mov fs, eax
    FAULTS32(NP, ABSENT)
    TRY32
    mov eax, ABSENT | 3
    mov ss, eax /* RPL before presence */
    FAULTS32(GP, ABSENT)
    mov byte ptr [gdt + ABSENT + 5], 0x13
    TRY32
    mov eax, ABSENT
    mov ss, eax
    FAULTS32(SS, ABSENT)
    TRY32
    xor eax, eax
    mov ss, eax /* null */
    FAULTS32(GP, 0)
    TRY32
    mov eax, READ_ONLY
    mov ss, eax
    FAULTS32(GP, READ_ONLY)
    TRY32
    mov eax, EXECUTE
    mov ds, eax
    FAULTS32(GP, EXECUTE)
    TRY32
    jmp ABSENT:0
    FAULTS32(GP, ABSENT)
    mov byte ptr [gdt + ABSENT + 5], 0x1b
    TRY32
    jmp ABSENT:0
    FAULTS32(NP, ABSENT)
    TRY32
    jmp 0:0
    FAULTS32(GP, 0)

    BEHAVIOUR(segment_limits)
    /* Limits: the last byte is good, beyond it #GP(0), #SS(0) through SS; expand-down is the other way round. */
    mov eax, SMALL
    mov fs, eax
    mov eax, DOWN
    mov gs, eax
    TRY32
    mov al, fs:[0xfff]
    mov eax, fs:[0xffc]
    mov al, gs:[0x1000]
    mov eax, gs:[0x1000]
    PASSES32
    .irp where, "al, fs:[0x1000]", "eax, fs:[0xffd]", "ax, fs:[0xfff]", "eax, fs:[0xffffffff]", "al, gs:[0xfff]", "eax, gs:[0xffd]"
    TRY32
    mov \where
    FAULTS32(GP, 0)
    .endr
    xor eax, eax
    mov fs, eax
    TRY32
    mov al, fs:[0]
    FAULTS32(GP, 0)
    BEHAVIOUR(segment_types)
    /* Types. */
    mov eax, READ_ONLY
    mov fs, eax
    TRY32
    mov eax, fs:[0x100000]
    PASSES32
    TRY32
    mov fs:[0x100000], eax
    FAULTS32(GP, 0)
    TRY32
    mov cs:[word32], eax
    FAULTS32(GP, 0)
    TRY32
    lock add dword ptr cs:[word32], 0
    FAULTS32(GP, 0)
    BEHAVIOUR(the_limit_of_the_code_segment)
    /* The code segment's limit: a far and a near jump beyond it fault where they are. */
    TRY32
    jmp SHORT_CODE:0x200000
    FAULTS32(GP, 0)
    TRY32
    jmp SHORT_CODE:1f
1:  mov eax, 0x200000
at_beyond:
    jmp eax
    FAULTS32_AT(GP, 0, at_beyond)
    EQUAL(dword ptr [got_cs], SHORT_CODE)
    TRY32
    jmp EXECUTE:1f
1:  mov eax, cs:[word32]
    FAULTS32(GP, 0)

    BEHAVIOUR(bad_gates_of_32_bits)
    /* The IDT: beyond its end, absent gates, gates that are none. EXT for events from outside the program. */
    lidt [short_idt]
    TRY32
    int 0x80
    FAULTS32(GP, IDT_ERROR(0x80))
    lidt [idt32_pointer]
    mov byte ptr [idt + 0x70 * 8 + 5], 0x0e
    TRY32
    int 0x70
    FAULTS32(NP, IDT_ERROR(0x70))
    mov byte ptr [idt + 0x70 * 8 + 5], 0x8c
    TRY32
    int 0x70
    FAULTS32(GP, IDT_ERROR(0x70))
    mov byte ptr [idt + UD * 8 + 5], 0x0e
    TRY32
    ud2
    FAULTS32(NP, IDT_ERROR(UD) + 1)
    mov byte ptr [idt + UD * 8 + 5], 0x8e
    mov byte ptr [idt + DE * 8 + 5], 0x0e
    TRY32
    xor ecx, ecx
    div ecx
    FAULTS32(DF, 0)
    mov byte ptr [idt + DE * 8 + 5], 0x8e

    BEHAVIOUR(an_outer_level_gets_the_stack_of_the_tss)
    /* From CPL 3: the stack of the TSS, with the user's SS and ESP on it. */
    TRY32
    ENTER_USER32(0x202)
user_int3:
    int3
user_after_int3:
    FAULTS32_AT(BP, 0, user_after_int3)
    EQUAL(dword ptr [got_cs], USER_CS32)
    EQUAL(dword ptr [got_ss], USER_DS)
    cmp dword ptr [got_rsp], offset user_stack_top
    REQUIRE32(je)
    test dword ptr [got_rflags], 0x200
    REQUIRE32(jnz)
    cmp dword ptr [got_handler_rsp], offset ring0_stack_top - 20
    REQUIRE32(je)
    TRY32
    ENTER_USER32(2)
    int 0x71
    FAULTS32(GP, IDT_ERROR(0x71))
    .irp instruction, "hlt", "cli", "lgdt [word32]", "mov eax, cr0", "mov dr7, eax", "clts", "invd", "wrmsr", "in al, 0x80", "ltr ax"
    TRY32
    ENTER_USER32(2)
    \instruction
    FAULTS32(GP, 0)
    .endr
    TRY32
    ENTER_USER32(2)
    mov eax, KERNEL_DS
    mov ds, eax
    FAULTS32(GP, KERNEL_DS)
    BEHAVIOUR(the_io_permission_bitmap)
    /* The I/O permission bitmap allows single ports. */
    mov dword ptr [tss32 + 104], 0xffff7fff /* ports 8 to 15: 15 */
    mov word ptr [gdt + TSS32_SEL], 107
    mov byte ptr [gdt + TSS32_SEL + 5], 0x89
    mov eax, TSS32_SEL
    ltr ax
    TRY32
    ENTER_USER32(2)
    in al, 15
    ud2
    FAULTS32(UD, 0)
    TRY32
    ENTER_USER32(2)
    in ax, 15
    FAULTS32(GP, 0)
    TRY32
    ENTER_USER32(2)
    in al, 14
    FAULTS32(GP, 0)
    BEHAVIOUR(stack_limits_and_alignment_at_cpl_3)
    /* #SS(0) for the user's own small stack; #AC. */
    TRY32
    ENTER_USER32(2)
    mov eax, SMALL | 3
    mov ss, eax
    mov esp, 0x2000
at_push:
    push eax
    FAULTS32_AT(SS, 0, at_push)
    mov eax, cr0
    or eax, CR0_AM
    mov cr0, eax
    TRY32
    ENTER_USER32(0x40002)
    mov eax, [user_stack_top - 30]
    FAULTS32(AC, 0)
    TRY32
    ENTER_USER32(0x40002)
    mov ax, [user_stack_top - 30]
    ud2
    FAULTS32(UD, 0)

    BEHAVIOUR(a_bad_stack_in_the_tss)
    /* To level 1 by an interrupt gate, whose stack in the TSS is bad: #TS, #SS with its selector. */
    mov word ptr [idt + 0x72 * 8 + 2], CODE_1 | 1
    mov byte ptr [idt + 0x72 * 8 + 5], 0xee
    mov dword ptr [tss32 + 12], offset user_stack_top - 1024
    .irp stack, 0x1000, KERNEL_DS, DATA_1
    mov dword ptr [tss32 + 16], \stack
    TRY32
    ENTER_USER32(2)
    int 0x72
    FAULTS32(TS, \stack)
    .endr
    mov dword ptr [tss32 + 16], 0
    TRY32
    ENTER_USER32(2)
    int 0x72
    FAULTS32(TS, 0)
    mov byte ptr [gdt + DATA_1 + 5], 0x33
    mov dword ptr [tss32 + 16], DATA_1 | 1
    TRY32
    ENTER_USER32(2)
    int 0x72
    FAULTS32(SS, DATA_1)

    BEHAVIOUR(a_call_gate_copies_parameters)
    /* A call gate from CPL 3 copies three words; RET n drops them from both stacks. */
    mov eax, offset through_gate
    mov [gdt + GATE], ax
    mov word ptr [gdt + GATE + 2], CODE32_CS
    mov word ptr [gdt + GATE + 4], 0xec03
    shr eax, 16
    mov [gdt + GATE + 6], ax
    TRY32
    ENTER_USER32(2)
    push 0x33
    push 0x22
    push 0x11
    call (GATE | 3):0
after_gate:
    ud2
through_gate:
    mov ebp, esp
    mov eax, KERNEL_DS
    mov ds, eax
    cmp esp, offset ring0_stack_top - 28
    REQUIRE32(je)
    cmp dword ptr [ebp], offset after_gate
    REQUIRE32(je)
    EQUAL(dword ptr [ebp + 4], USER_CS32)
    EQUAL(dword ptr [ebp + 8], 0x11)
    EQUAL(dword ptr [ebp + 12], 0x22)
    EQUAL(dword ptr [ebp + 16], 0x33)
    cmp dword ptr [ebp + 20], offset user_stack_top - 12
    REQUIRE32(je)
    EQUAL(dword ptr [ebp + 24], USER_DS)
    lret 12
    FAULTS32_AT(UD, 0, after_gate)
    cmp dword ptr [got_rsp], offset user_stack_top
    REQUIRE32(je)
    EQUAL(dword ptr [got_cs], USER_CS32)

    BEHAVIOUR(a_conforming_segment_runs_at_the_callers_level)
    /* A conforming segment runs at the caller's level. */
    TRY32
    ENTER_USER32(2)
    call CONFORMING:1f
1:  mov eax, cs
    mov ebx, eax
    cli
    FAULTS32(GP, 0)
    EQUAL(ebx, CONFORMING | 3)
    EQUAL(dword ptr [got_cs], CONFORMING | 3)

    BEHAVIOUR(lar_lsl_verr_and_verw)
    /* What selectors are asked for. */
    mov ecx, KERNEL_DS
    lar eax, ecx
    REQUIRE32(je)
    and eax, 0xf0fe00
    EQUAL(eax, 0xc09200)
    lsl eax, ecx
    REQUIRE32(je)
    EQUAL(eax, -1)
    mov ecx, SMALL
    lsl eax, ecx
    EQUAL(eax, 0xfff)
    verw cx
    REQUIRE32(je)
    mov ecx, READ_ONLY
    verr cx
    REQUIRE32(je)
    verw cx
    REQUIRE32(jne)
    mov ecx, EXECUTE
    verr cx
    REQUIRE32(jne)
    mov ecx, 0x1000
    mov eax, 0x1234
    lar eax, ecx
    REQUIRE32(jne)
    EQUAL(eax, 0x1234)
    mov eax, 0x20
    mov ecx, 3
    arpl ax, cx
    REQUIRE32(je)
    EQUAL(eax, 0x23)
    PASS32

    .section .data
    .balign 8
bounds: .quad 0
word32: .quad 0
short_idt:
    .word 0x20 * 8 - 1
    .long idt
