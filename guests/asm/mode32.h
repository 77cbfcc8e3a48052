/*
 * What programs that stay in 32-bit protected mode include instead of guest.h: the same frame, with gates of 32 bits for
 * all 256 vectors, a TSS for stack switches, and TRY32, FAULTS32 as guest.h has TRY, FAULTS. Such a program defines
 * `begin32`, which runs at CPL 0 with paging off, and ends by PASS32.
 */

#define MODE32
#include "guest.h"

#define TSS32_SEL 0x48

#define REQUIRE32(jcc) mov dword ptr ss:[source_line], __LINE__; jcc 98f; jmp fail32; 98:
#define EQUAL(a, b) cmp a, b; REQUIRE32(je)
#define TRY32 \
    mov dword ptr [got_vector], -1; mov [resume_rsp], esp; mov dword ptr [resume], offset 99f
#define FAULTS32(vector, error) \
    99: mov dword ptr [resume], 0; \
    EQUAL(dword ptr [got_vector], vector); EQUAL(dword ptr [got_error], error)
#define FAULTS32_AT(vector, error, address) \
    FAULTS32(vector, error); cmp dword ptr [got_rip], offset address; REQUIRE32(je)
#define PASSES32 99: mov dword ptr [resume], 0; EQUAL(dword ptr [got_vector], -1)
/* Goes on at CPL 3 with the user's flat data segments. */
#define ENTER_USER32(flags) \
    push USER_DS; push offset user_stack_top; push flags; push USER_CS32; push offset 97f; iretd; \
    97: mov eax, USER_DS; mov ds, eax; mov es, eax
#define PASS32 jmp pass32

    .code32
main32:
    mov eax, offset tss32
    mov word ptr [gdt + TSS32_SEL], 103
    mov [gdt + TSS32_SEL + 2], ax
    shr eax, 16
    mov [gdt + TSS32_SEL + 4], al
    mov byte ptr [gdt + TSS32_SEL + 5], 0x89
    mov byte ptr [gdt + TSS32_SEL + 6], 0
    mov [gdt + TSS32_SEL + 7], ah
    mov dword ptr [tss32 + 4], offset ring0_stack_top
    mov dword ptr [tss32 + 8], KERNEL_DS
    mov word ptr [tss32 + 102], 104
    mov eax, TSS32_SEL
    ltr ax
    mov ecx, 256
    mov edi, offset idt
    mov edx, offset stubs32
1:  mov eax, edx
    mov [edi], ax
    mov word ptr [edi + 2], CODE32_CS
    mov word ptr [edi + 4], 0x8e00
    shr eax, 16
    mov [edi + 6], ax
    add edi, 8
    add edx, 16
    loop 1b
    mov byte ptr [idt + BP * 8 + 5], 0xee
    mov byte ptr [idt + OF * 8 + 5], 0xee
    lidt [idt32_pointer]
    jmp begin32

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

/* Stack: vector, error code, EIP, CS, EFLAGS, and from an outer level ESP and SS. */
caught32:
    push eax
    mov eax, KERNEL_DS
    mov ds, eax
    mov es, eax
    mov ss, eax
    pop eax
    pop dword ptr [got_vector]
    pop dword ptr [got_error]
    mov [got_handler_rsp], esp
    pop dword ptr [got_rip]
    pop dword ptr [got_cs]
    pop dword ptr [got_rflags]
    pop dword ptr [got_rsp]
    pop dword ptr [got_ss]
    push eax
    mov eax, cr2
    mov [got_cr2], eax
    pop eax
    cmp dword ptr [resume], 0
    je fail32
    mov esp, [resume_rsp]
    jmp dword ptr [resume]

pass32:
    mov esi, offset text_pass
    call print32
    xor eax, eax
    jmp end32

fail32:
    mov eax, KERNEL_DS
    mov ds, eax
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
    mov esi, offset text_got
    call print32
    mov ebx, [got_vector]
    call print_hex32
    mov ebx, [got_error]
    call print_hex32
    mov ebx, [got_rip]
    call print_hex32
    mov ebx, [got_cr2]
    call print_hex32
    mov esi, offset text_newline
    call print32
    mov eax, 1
end32:
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

print_hex32:
    mov ecx, 8
    mov edx, 0x3f8
    mov al, ' '
    out dx, al
1:  rol ebx, 4
    mov al, bl
    and al, 15
    add al, '0'
    cmp al, '9'
    jbe 2f
    add al, 'a' - '9' - 1
2:  out dx, al
    loop 1b
    ret

    .code64
main:
    ret

    .section .data
    .balign 16
tss32: .fill 32, 4, 0
idt32_pointer:
    .word 256 * 8 - 1
    .long idt
    .section .text
    .code32
