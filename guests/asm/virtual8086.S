/* Virtual-8086 mode under 32-bit protected mode: 16-bit segments, IOPL-sensitive instructions, interrupts to the
   monitor with the data segments on its stack. */
#define MODE32
#include "guest.h"

#define REQUIRE32(jcc) mov dword ptr [source_line], __LINE__; jcc 98f; jmp fail32; 98:
#define EQUAL(a, b) cmp a, b; REQUIRE32(je)
#define LOW 0x7000
#define LOW_OF(label) (label - low_begin + LOW)

/* Runs the 16-bit code at `label` with IOPL in `flags`, until it faults. */
#define RUN(label, flags) \
    mov dword ptr [resume], offset 99f; mov [resume_rsp], esp; \
    push 0x4444; push 0x3333; push 0x2222; push 0x1111; push 0x500; push 0x8000; \
    push 0x20002 | flags; push LOW >> 4; push label - low_begin; iretd; 99:

    .code32
main32:
    mov esi, offset low_begin
    mov edi, LOW
    mov ecx, offset low_end - low_begin
    rep movsb
    mov eax, offset tss32
    mov word ptr [gdt + SPARE_SEL], 103
    mov [gdt + SPARE_SEL + 2], ax
    shr eax, 16
    mov [gdt + SPARE_SEL + 4], al
    mov byte ptr [gdt + SPARE_SEL + 5], 0x89
    mov [gdt + SPARE_SEL + 7], ah
    mov dword ptr [tss32 + 4], offset ring0_stack_top
    mov dword ptr [tss32 + 8], KERNEL_DS
    mov word ptr [tss32 + 102], 104
    mov eax, SPARE_SEL
    ltr ax
    mov ecx, 256
    mov edi, offset idt
    mov edx, offset stubs32
1:  mov eax, edx
    mov [edi], ax
    mov word ptr [edi + 2], CODE32_CS
    mov word ptr [edi + 4], 0xee00
    shr eax, 16
    mov [edi + 6], ax
    add edi, 8
    add edx, 16
    loop 1b
    lidt [idt32_pointer]

    BEHAVIOUR(segments_are_paragraph_numbers)
    /* Segments are paragraph numbers: the code runs at LOW and sees what it should. */
    RUN(addressing, 0)
    EQUAL(dword ptr [got_vector], UD)
    EQUAL(dword ptr [got_cs], LOW >> 4)
    EQUAL(dword ptr [got_rip], at_ud - low_begin)
    EQUAL(dword ptr [got_ss], 0x500)
    EQUAL(dword ptr [saved_es], 0x1111)
    EQUAL(dword ptr [saved_es + 4], LOW >> 4)
    EQUAL(dword ptr [saved_es + 8], 0x3333)
    EQUAL(dword ptr [saved_es + 12], 0x4444)
    test dword ptr [got_rflags], 0x20000
    REQUIRE32(jnz)
    EQUAL(word ptr [LOW + word_16 - low_begin], 0x1234)
    BEHAVIOUR(the_monitor_gets_null_data_segments)
    /* The monitor's data segments are null. */
    EQUAL(dword ptr [handler_ds], 0)

    BEHAVIOUR(sensitive_instructions_need_iopl_3)
    /* With IOPL below 3, CLI, STI, PUSHF, POPF, INT n, IRET are #GP(0); with IOPL 3 they work. */
    RUN(sensitive_cli, 0)
    EQUAL(dword ptr [got_vector], GP)
    EQUAL(dword ptr [got_error], 0)
    RUN(sensitive_pushf, 0)
    EQUAL(dword ptr [got_vector], GP)
    RUN(sensitive_int, 0)
    EQUAL(dword ptr [got_vector], GP)
    RUN(sensitive_iret, 0)
    EQUAL(dword ptr [got_vector], GP)
    RUN(sensitive_hlt, 0x3000)
    EQUAL(dword ptr [got_vector], GP)
    RUN(sensitive_cli, 0x3000)
    EQUAL(dword ptr [got_vector], UD)
    RUN(sensitive_pushf, 0x3000)
    EQUAL(dword ptr [got_vector], UD)
    RUN(sensitive_int, 0x3000)
    EQUAL(dword ptr [got_vector], 0x70)
    BEHAVIOUR(limits_and_instructions_of_protected_mode_alone)
    /* Offsets beyond 0xffff are #GP (#SS for the stack); LAR and its like are #UD. */
#ifndef QEMU /* which checks no limits */
    RUN(beyond, 0)
    EQUAL(dword ptr [got_vector], GP)
    RUN(beyond_stack, 0)
    EQUAL(dword ptr [got_vector], SS)
#endif
    RUN(protected_only, 0)
    EQUAL(dword ptr [got_vector], UD)
    BEHAVIOUR(ac_m4_verw_is_undefined_in_virtual_8086_mode)
    RUN(verify_register, 0)
    EQUAL(dword ptr [got_vector], UD)
    RUN(verify_memory, 0)
    EQUAL(dword ptr [got_vector], UD)
    mov esi, offset text_pass
    call print32
    xor eax, eax
    mov edx, 0xf4
    out dx, eax
    hlt

    .balign 16
low_begin:
    .code16
addressing:
    mov ax, cs
    mov ds, ax
    mov word ptr [word_16 - low_begin], 0x1234
    push ax
    pop bx
    cmp ax, bx
    jne sensitive_hlt
    call 2f
2:  pop ax
    cmp ax, offset 2b - low_begin
    jne sensitive_hlt
at_ud:
    ud2
sensitive_cli:
    cli
    ud2
sensitive_pushf:
    pushf
    ud2
sensitive_int:
    int 0x70
sensitive_iret:
    iret
sensitive_hlt:
    hlt
beyond:
    mov ebx, 0x10000
    mov al, [ebx]
beyond_stack:
    mov sp, 1
    mov ebp, 0xffff
    mov ax, [ebp]
protected_only:
    lar ax, bx
    hlt
verify_register:
    verw ax
    hlt
verify_memory:
    verw word ptr cs:[word_16 - low_begin]
    hlt
word_16: .word 0
low_end:
    .code32

    .balign 16
stubs32:
    .set vector_number32, 0
    .rept 256
    .balign 16
    .if vector_number32 == 8 || (vector_number32 >= 10 && vector_number32 <= 14) || vector_number32 == 17
    nop
    nop
    .else
    push 0
    .endif
    push vector_number32
    .byte 0xe9
    .long caught32 - . - 4
    .set vector_number32, vector_number32 + 1
    .endr

caught32:
    mov ecx, ds
    mov eax, KERNEL_DS
    mov ds, eax
    mov es, eax
    mov [handler_ds], ecx
    pop dword ptr [got_vector]
    pop dword ptr [got_error]
    pop dword ptr [got_rip]
    pop dword ptr [got_cs]
    pop dword ptr [got_rflags]
    pop dword ptr [got_rsp]
    pop dword ptr [got_ss]
    pop dword ptr [saved_es]
    pop dword ptr [saved_es + 4]
    pop dword ptr [saved_es + 8]
    pop dword ptr [saved_es + 12]
    cmp dword ptr [resume], 0
    je fail32
    mov esp, [resume_rsp]
    jmp [resume]

fail32:
    mov esi, offset text_fail
    call print32
    mov eax, [source_line]
    mov ebx, 10
    xor ecx, ecx
1:  xor edx, edx
    div ebx
    push edx
    inc ecx
    test eax, eax
    jnz 1b
    mov edx, 0x3f8
2:  pop eax
    add al, '0'
    out dx, al
    loop 2b
    mov esi, offset text_newline
    call print32
    mov eax, 1
    mov edx, 0xf4
    out dx, eax
    hlt

print32:
    cld
    mov edx, 0x3f8
1:  lodsb
    test al, al
    jz 2f
    out dx, al
    jmp 1b
2:  ret

    .code64
main:
    ret

    .section .data
    .balign 16
saved_es: .long 0, 0, 0, 0
handler_ds: .long 0
tss32: .fill 32, 4, 0
idt32_pointer:
    .word 256 * 8 - 1
    .long idt
