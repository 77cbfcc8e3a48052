/* What a processor tells of speculation, and the registers and instructions that control it: each as it is enumerated. */
#include "guest.h"

#define ARCH_CAPABILITIES 0x10a
#define SPEC_CTRL 0x48
#define PRED_CMD 0x49
#define FLUSH_CMD 0x10b
#define TSX_CTRL 0x122
#define MCU_OPT_CTRL 0x123
/* IA32_ARCH_CAPABILITIES */
#define TSX_CTRL_BIT 7
#define FB_CLEAR_CTRL_BIT 18
#define GDS_CTRL_BIT 25
/* IA32_MCU_OPT_CTRL */
#define RNGDS_MITG_DIS (1 << 0)
#define FB_CLEAR_DIS (1 << 3)
#define GDS_MITG_DIS (1 << 4)
/* IA32_TSX_CTRL */
#define RTM_DISABLE 1
#define CPUID_CLEAR 2
/* Tells the monitor that it may look at the counters. */
#define LOOK out 0xeb, al

/* ECX is the register. */
#define READ rdmsr
#define WRITE(low, high) mov eax, low; mov edx, high; wrmsr
#define READ_REFUSED TRY; READ; FAULTS(GP, 0)
#define WRITE_REFUSED(low, high) TRY; WRITE(low, high); FAULTS(GP, 0)
#define WRITE_TAKEN(low) TRY; WRITE(low, 0); PASSES; READ; REQUIRE_EQ(eax, low); REQUIRE_EQ(edx, 0)
/* Whether IA32_ARCH_CAPABILITIES has a bit of its lower half: CF. */
#define TOLD(bit) bt dword ptr [told], bit

/* VERW of the selector in AX, with ZF as given. */
    .macro VERIFIES writable
    mov [selector], ax
    .if \writable
    xor ebx, ebx
    inc ebx /* ZF is clear before */
    verw ax
    REQUIRE(jz)
    xor ebx, ebx
    inc ebx
    verw word ptr [selector]
    REQUIRE(jz)
    .else
    xor ebx, ebx /* ZF is set before */
    verw ax
    REQUIRE(jnz)
    xor ebx, ebx
    verw word ptr [selector]
    REQUIRE(jnz)
    .endif
    .endm

/* Back to CPL 0. */
#define LEAVE_USER TRY; ud2; FAULTS(UD, 0)

main:
    xor eax, eax
    cpuid
    cmp eax, 7
    jb 1f
    mov eax, 7
    xor ecx, ecx
    cpuid
    mov [leaf7_ebx], ebx
    mov [leaf7_edx], edx
    cmp eax, 2
    jb 1f
    mov eax, 7
    mov ecx, 2
    cpuid
    mov [leaf7_2_edx], edx
1:
    BEHAVIOUR(ac_m1_capabilities_are_read_where_they_are_enumerated_and_never_written)
    mov ecx, ARCH_CAPABILITIES
    test dword ptr [leaf7_edx], 1 << 29
    jz 2f
    TRY
    READ
    PASSES
    mov [told], eax
    mov [told + 4], edx
    TRY
    mov eax, [told]
    mov edx, [told + 4]
    wrmsr
    FAULTS(GP, 0)
    jmp 3f
2:  READ_REFUSED
3:  WRITE_REFUSED(0, 0)
    WRITE_REFUSED(-1, -1)

    BEHAVIOUR(ac_m2_each_capability_has_its_register)
    /* No guest is told of registers that there are not. */
    mov eax, [told]
    and eax, 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 21 | 1 << 23
    REQUIRE_EQ(eax, 0)
    .irp index, 0xbc, 0xbd, 0x195
    mov ecx, \index
    READ_REFUSED
    WRITE_REFUSED(0, 0)
    .endr
    mov ecx, TSX_CTRL
    TOLD(TSX_CTRL_BIT)
    jnc 4f
    WRITE_TAKEN(RTM_DISABLE)
    WRITE_TAKEN(CPUID_CLEAR)
    WRITE_TAKEN(0)
    WRITE_REFUSED(4, 0)
    WRITE_REFUSED(0, 1)
    jmp 5f
4:  READ_REFUSED
    WRITE_REFUSED(0, 0)
5:  /* The bits of IA32_MCU_OPT_CTRL that there are. */
    xor ebx, ebx
    test dword ptr [leaf7_edx], 1 << 9
    jz 6f
    or ebx, RNGDS_MITG_DIS
6:  TOLD(FB_CLEAR_CTRL_BIT)
    jnc 7f
    or ebx, FB_CLEAR_DIS
7:  TOLD(GDS_CTRL_BIT)
    jnc 8f
    or ebx, GDS_MITG_DIS
8:  mov [mcu_bits], ebx
    mov ecx, MCU_OPT_CTRL
    test ebx, ebx
    jnz 9f
    READ_REFUSED
    WRITE_REFUSED(0, 0)
    WRITE_REFUSED(FB_CLEAR_DIS, 0)
    jmp 11f
9:  mov esi, 1 /* each bit */
10: mov edi, esi
    and edi, ebx
    TRY
    WRITE(esi, 0)
    99: mov qword ptr [resume], 0
    mov rax, -1 /* none */
    mov edx, GP
    test edi, edi
    cmovz rax, rdx
    REQUIRE_EQ([got_vector], rax)
    add esi, esi
    jnz 10b
    WRITE_REFUSED(0, 1)
    WRITE_TAKEN(ebx)
    WRITE_TAKEN(0)
11:
    BEHAVIOUR(ac_m3_commands_and_prediction_controls_by_their_enumeration)
    .irp command, FLUSH_CMD, PRED_CMD
    mov ecx, \command
    READ_REFUSED
    WRITE_REFUSED(2, 0)
    WRITE_REFUSED(1 << 31, 0)
    WRITE_REFUSED(1, 1)
    .endr
    mov ecx, FLUSH_CMD
    test dword ptr [leaf7_edx], 1 << 28
    jz 12f
    TRY
    WRITE(1, 0)
    PASSES
    TRY
    WRITE(0, 0)
    PASSES
    jmp 13f
12: WRITE_REFUSED(1, 0)
13: mov ecx, PRED_CMD
    test dword ptr [leaf7_edx], 1 << 26
    jz 14f
    TRY
    WRITE(1, 0)
    PASSES
    jmp 15f
14: WRITE_REFUSED(1, 0)
15: /* The bits of IA32_SPEC_CTRL that there are. */
    xor ebx, ebx
    mov edx, [leaf7_edx]
    .macro BY word, bit, bits
    bt dword ptr [\word], \bit
    jnc 16f
    or ebx, \bits
16:
    .endm
    BY leaf7_edx, 26, 1 << 0
    BY leaf7_edx, 27, 1 << 1
    BY leaf7_edx, 31, 1 << 2
    BY leaf7_2_edx, 1, 3 << 3
    BY leaf7_2_edx, 2, 3 << 5
    BY leaf7_2_edx, 0, 1 << 7
    BY leaf7_2_edx, 3, 1 << 8
    BY leaf7_2_edx, 4, 1 << 10
    mov ecx, SPEC_CTRL
    test ebx, ebx
    jnz 17f
    READ_REFUSED
    WRITE_REFUSED(0, 0)
    jmp 19f
17: mov esi, 1
18: mov edi, esi
    and edi, ebx
    TRY
    WRITE(esi, 0)
    99: mov qword ptr [resume], 0
    mov rax, -1
    mov edx, GP
    test edi, edi
    cmovz rax, rdx
    REQUIRE_EQ([got_vector], rax)
    add esi, esi
    jnz 18b
    WRITE_REFUSED(0, 1)
    WRITE_TAKEN(ebx)
    WRITE_TAKEN(0)
19:
    BEHAVIOUR(ac_m4_verw_says_at_cpl_0_what_can_be_written)
    /* A read-only and a conforming descriptor among the spare ones. */
    mov rax, [gdt + KERNEL_DS]
    btr rax, 41
    mov [gdt + SPARE_SEL], rax
    mov rax, [gdt + KERNEL_DS]
    btr rax, 47 /* not present: only what it is counts */
    mov [gdt + SPARE_SEL + 8], rax
    mov eax, KERNEL_DS
    VERIFIES 1
    mov eax, USER_DS
    VERIFIES 1
    mov eax, SPARE_SEL + 8
    VERIFIES 1
    mov eax, 0
    VERIFIES 0
    mov eax, 3
    VERIFIES 0
    mov eax, KERNEL_CS
    VERIFIES 0
    mov eax, TSS_SEL
    VERIFIES 0
    mov eax, SPARE_SEL
    VERIFIES 0
    mov eax, KERNEL_DS | 3 /* RPL above DPL */
    VERIFIES 0
    mov eax, 0xfff8 /* beyond the table */
    VERIFIES 0

    BEHAVIOUR(ac_m4_verw_says_at_cpl_3_what_can_be_written)
    ENTER_USER(2)
    mov eax, USER_DS
    VERIFIES 1
    mov eax, KERNEL_DS
    VERIFIES 0
    mov eax, USER_CS
    VERIFIES 0
    mov eax, 0
    VERIFIES 0
    LEAVE_USER

    BEHAVIOUR(ac_m4_verw_clears_by_its_memory_form_alone)
    mov word ptr [selector], 0
    LOOK
    mov eax, KERNEL_DS
    verw ax
    LOOK
    verw word ptr [selector]
    verw word ptr [selector]
    LOOK
    ENTER_USER(2)
    verw word ptr [selector]
    LEAVE_USER
    LOOK
    /* Nothing is cleared by one that faults. */
    TRY
    mov rax, 0x8000000000000000
    verw word ptr [rax]
    FAULTS(GP, 0)
    LOOK
    test dword ptr [mcu_bits], FB_CLEAR_DIS
    jz 20f
    mov ecx, MCU_OPT_CTRL
    WRITE_TAKEN(FB_CLEAR_DIS)
    verw word ptr [selector]
    verw word ptr [selector]
    LOOK
    WRITE_TAKEN(0)
    verw word ptr [selector]
20: LOOK

    BEHAVIOUR(ac_m6_tsx_ctrl_takes_transactions_out_of_cpuid)
    TOLD(TSX_CTRL_BIT)
    jnc 21f
    mov esi, [leaf7_ebx]
    and esi, 1 << 4 | 1 << 11
    mov ecx, TSX_CTRL
    WRITE_TAKEN(RTM_DISABLE)
    mov ebp, esi /* disabled, and still enumerated */
    call transactions_are
    mov ecx, TSX_CTRL
    WRITE_TAKEN(RTM_DISABLE | CPUID_CLEAR)
    xor ebp, ebp
    call transactions_are
    mov ecx, TSX_CTRL
    WRITE_TAKEN(0)
    mov ebp, esi
    call transactions_are
21: PASS

/* CPUID has HLE and RTM as EBP says. */
transactions_are:
    mov eax, 7
    xor ecx, ecx
    cpuid
    and ebx, 1 << 4 | 1 << 11
    REQUIRE_EQ(ebx, ebp)
    ret

    .section .data
    .balign 8
told: .quad 0
leaf7_ebx: .long 0
leaf7_edx: .long 0
leaf7_2_edx: .long 0
mcu_bits: .long 0
selector: .word 0
