/* Every exception that software can cause: its vector, its error code, the RIP it reports. */
#include "guest.h"

#ifdef QEMU /* whose error codes for IDT entries of long mode are double */
#define IDT_ERROR(vector) ((vector) * 16 + 2)
#define EXT 0
#else
#define IDT_ERROR(vector) ((vector) * 8 + 2)
#define EXT 1
#endif

main:
    BEHAVIOUR(a_divide_error_reports_the_division)
    /* #DE: divide by zero, and a quotient that does not fit. */
    TRY
    xor ecx, ecx
    mov eax, 1
    cdq
at_de:
    div ecx
    FAULTS_AT(DE, 0, at_de)
    TRY
    mov edx, 5
    mov ecx, 5
    div ecx
    FAULTS(DE, 0)
    /* The registers are what they were. */
    REQUIRE_EQ(edx, 5)

    BEHAVIOUR(breakpoint_traps_report_the_next_instruction)
    /* #BP and INT n report the next instruction. */
    TRY
    int3
after_int3:
    FAULTS_AT(BP, 0, after_int3)
    TRY
    int 3
after_int_3:
    FAULTS_AT(BP, 0, after_int_3)

#ifndef QEMU /* which has no INT1 */
    /* #DB by INT1 is a trap; DR6.BS stays clear. */
    xor eax, eax
    mov dr6, rax
    TRY
    .byte 0xf1
after_int1:
    FAULTS_AT(DB, 0, after_int1)
    mov rax, dr6
    test eax, 1 << 14
    REQUIRE(jz)
#endif

    BEHAVIOUR(undefined_opcodes)
    /* #UD in its ways. */
    TRY
at_ud2:
    ud2
    FAULTS_AT(UD, 0, at_ud2)
    TRY
    .byte 0x06 /* push es */
    FAULTS(UD, 0)
    TRY
    .byte 0x0f, 0x20, 0xc8 /* mov rax, cr1 */
    FAULTS(UD, 0)
    TRY
    .byte 0x8c, 0xf8 /* mov eax, segment register 7 */
    FAULTS(UD, 0)
    TRY
    .byte 0x8e, 0xc8 /* mov cs, eax */
    FAULTS(UD, 0)

    BEHAVIOUR(device_not_available_and_emulation)
    /* #NM: x87 with TS, SSE with TS, WAIT with MP and TS; EM makes SSE #UD. */
    mov rbx, cr0
    mov rax, rbx
    or rax, CR0_TS
    mov cr0, rax
    TRY
    fnop
    FAULTS(NM, 0)
    TRY
    xorps xmm0, xmm0
    FAULTS(NM, 0)
    TRY
    wait
    FAULTS(NM, 0)
    mov rax, rbx
    or rax, CR0_EM
    mov cr0, rax
    TRY
    fnop
    FAULTS(NM, 0)
    TRY
    xorps xmm0, xmm0
    FAULTS(UD, 0)
    mov cr0, rbx

    BEHAVIOUR(segment_loads_fault_with_their_selector)
    /* #NP and #GP by selectors: the error code is the selector without its RPL. */
    mov rax, 0x00cf13000000ffff /* data, not present */
    mov [gdt + SPARE_SEL], rax
    TRY
    mov eax, SPARE_SEL
    mov ds, eax
    FAULTS(NP, SPARE_SEL)
    TRY
    mov eax, SPARE_SEL
    mov ss, eax
    FAULTS(SS, SPARE_SEL)
    TRY
    mov eax, 0x1000
    mov ds, eax
    FAULTS(GP, 0x1000)
    TRY
    mov eax, SPARE_SEL | 4 /* in the LDT, of which there is none */
    mov ds, eax
    FAULTS(GP, SPARE_SEL | 4)
    TRY
    mov eax, USER_DS /* DPL and RPL must be CPL for SS */
    mov ss, eax
    FAULTS(GP, USER_DS & ~3)
    TRY
    mov eax, TSS_SEL
    mov es, eax
    FAULTS(GP, TSS_SEL)
    TRY
    mov eax, KERNEL_CS /* readable code: good in DS */
    mov ds, eax
    PASSES
    mov eax, KERNEL_DS
    mov ds, eax
    TRY
    mov eax, 0 /* null in SS at CPL 0, 64-bit: allowed */
    mov ss, eax
    PASSES
    mov eax, KERNEL_DS
    mov ss, eax

    BEHAVIOUR(addresses_that_are_not_canonical)
    /* Addresses that are not canonical: #GP, or #SS by a stack register. */
    mov rax, 0x800000000000
    mov rbp, rax
    TRY
    mov ecx, [rax]
    FAULTS(GP, 0)
#ifndef QEMU
    TRY
    mov ecx, [rbp]
    FAULTS(SS, 0)
    TRY
    mov ecx, fs:[rbp]
    FAULTS(GP, 0)
#endif
    TRY
    mov rsp, rax
    push rax /* the stack fault cannot be pushed either: #DF on its own stack */
    FAULTS(DF, 0)
    TRY
    jmp rax
    FAULTS(GP, 0)

    BEHAVIOUR(bad_gates_fault_with_their_idt_error_code)
    /* INT n beyond the table, with an absent gate, with a gate that is none. */
    lidt [short_idt]
    TRY
    int 0x80
    FAULTS(GP, IDT_ERROR(0x80))
    lidt [idt_pointer]
    mov byte ptr [idt + 0x70 * 16 + 5], 0x0e
    TRY
    int 0x70
    FAULTS(NP, IDT_ERROR(0x70))
    mov byte ptr [idt + 0x70 * 16 + 5], 0x85
    TRY
    int 0x70
    FAULTS(GP, IDT_ERROR(0x70))
    mov byte ptr [idt + 0x70 * 16 + 5], 0x8e

    BEHAVIOUR(privileged_instructions_and_gates_at_cpl_3)
    /* From CPL 3 a gate of DPL 0 is #GP, INT3's gate is of DPL 3; privileged instructions are #GP(0). */
    TRY
    ENTER_USER(2)
    int 0x70
    FAULTS(GP, IDT_ERROR(0x70))
    REQUIRE_EQ(dword ptr [got_cs], USER_CS)
    TRY
    ENTER_USER(2)
    int3
    FAULTS(BP, 0)
    TRY
    ENTER_USER(2)
    hlt
    FAULTS(GP, 0)
    TRY
    ENTER_USER(2)
    cli
    FAULTS(GP, 0)
    TRY
    ENTER_USER(2)
    in al, 0x80
    FAULTS(GP, 0)
    TRY
    ENTER_USER(2)
    mov rax, cr0
    FAULTS(GP, 0)
    TRY
    ENTER_USER(2)
    rdmsr
    FAULTS(GP, 0)
    TRY
    ENTER_USER(0x3002) /* IOPL 3: CLI, STI and ports are allowed */
    cli
    in al, 0x80
    ud2
    FAULTS(UD, 0)

#ifndef QEMU /* which checks no alignment */
    BEHAVIOUR(alignment_checks_at_cpl_3)
    /* #AC: at CPL 3 with CR0.AM and RFLAGS.AC. */
    mov rax, cr0
    or rax, CR0_AM
    mov cr0, rax
    TRY
    ENTER_USER(0x40002)
    mov eax, [user_stack_top - 31]
    FAULTS(AC, 0)
    TRY
    ENTER_USER(0x40002)
    mov eax, [user_stack_top - 32]
    ud2
    FAULTS(UD, 0)

#endif
    BEHAVIOUR(floating_point_exceptions_are_reported_where_they_belong)
    /* #MF comes with the next waiting instruction, #XM at once. */
    fninit
    mov word ptr [scratch_word], 0x37b /* zero divide unmasked */
    fldcw [scratch_word]
    fld1
    fldz
    TRY
    fdivp st(1), st
after_fdiv:
    nop
at_wait:
    wait
    FAULTS_AT(MF, 0, at_wait)
    fninit
#ifndef QEMU /* which raises no #XM */
    mov dword ptr [scratch_word], 0x1f80 & ~0x200
    ldmxcsr [scratch_word]
    xorps xmm1, xmm1
    mov eax, 1
    cvtsi2ss xmm0, eax
    TRY
at_divss:
    divss xmm0, xmm1
    FAULTS_AT(XM, 0, at_divss)
#endif
    mov dword ptr [scratch_word], 0x1f80
    ldmxcsr [scratch_word]

    BEHAVIOUR(a_fault_while_a_fault_is_delivered_is_a_double_fault)
    /* #DF: a contributory exception while another is delivered; on IST 1, with error code 0. */
    mov byte ptr [idt + UD * 16 + 5], 0x0e /* #UD's gate is absent: #NP, then #DF is not due (#UD is benign) */
    TRY
    ud2
    FAULTS(NP, IDT_ERROR(UD) + EXT)
    mov byte ptr [idt + UD * 16 + 5], 0x8e
    mov byte ptr [idt + DE * 16 + 5], 0x0e /* #DE is contributory: #NP in its delivery is a double fault */
    TRY
    xor ecx, ecx
    div ecx
    FAULTS(DF, 0)
    mov rax, [got_handler_rsp]
    cmp rax, offset ist1_stack_top
    REQUIRE(jb)
    cmp rax, offset ist1_stack_top - 128
    REQUIRE(ja)
    mov byte ptr [idt + DE * 16 + 5], 0x8e
    /* EXT (above) is set when an exception finds a bad gate; INT3 has it clear. */
    mov byte ptr [idt + BP * 16 + 5], 0x6e
    TRY
    int3
    FAULTS(NP, IDT_ERROR(BP))
    PASS

    .section .data
    .balign 8
scratch_word: .quad 0
short_idt:
    .word 0x20 * 16 - 1
    .quad idt
