/* The modes one after the other: protected (multiboot) → long → compatibility → protected 32 → protected 16 → real
   → protected → long again; and virtual-8086 mode. Each runs something that only it would do so. */
#include "guest.h"

#define LOW 0x7000 /* real-mode code and stack lie below 1 MiB */
#define LOW_OF(label) (label - low_begin + LOW)

main:
    mov rsi, offset low_begin
    mov edi, LOW
    mov ecx, offset low_end - low_begin
    cld
    rep movsb

    BEHAVIOUR(compatibility_mode_has_32_bit_operands)
    /* Compatibility mode: 32-bit operands and addresses, INC by one byte, no REX. */
    mov [saved_rsp], rsp
    mov rax, 0xffffffffffffffff
    push CODE32_CS
    push offset compatibility
    rex.w lret
    .code32
compatibility:
    mov eax, 0x7fffffff
    .byte 0x40 /* inc eax here, a prefix in 64-bit mode */
    nop
    mov [result], eax
    mov ecx, 0x66000000
    mov cx, 0x1234
    mov [result + 4], ecx

    BEHAVIOUR(long_mode_is_left_for_protected_mode)
    /* Long mode off: paging off, LME off; protected mode goes on. */
    mov eax, cr0
    and eax, ~CR0_PG
    mov cr0, eax
    mov ecx, EFER
    rdmsr
    and eax, ~EFER_LME
    wrmsr
    test eax, 1 << 10 /* LMA is clear */
    mov dword ptr [source_line], __LINE__
    jnz bad32
    BEHAVIOUR(protected_mode_of_16_bits_is_left_for_real_mode)
    /* 16-bit protected mode: limits are checked, operands are 16 bits. */
    lidt [real_idt]
    jmp CODE16_CS:LOW_OF(protected16)
bad32:
    mov al, 'B'
    mov edx, 0x3f8
    out dx, al
    mov eax, 1
    mov edx, 0xf4
    out dx, eax
    hlt

    .balign 16
low_begin:
    .code16
protected16:
    mov ax, DATA16_DS
    mov ds, ax
    mov es, ax
    mov fs, ax
    mov gs, ax
    mov ss, ax
    mov sp, LOW - 16
    mov eax, cr0
    and al, 0xfe
    mov cr0, eax
    jmp 0:LOW_OF(real)
real:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, LOW - 16
    BEHAVIOUR(real_mode_segments_are_paragraphs)
    /* Segment arithmetic: 0x700:0x10 is LOW + 0x10. */
    mov ax, LOW >> 4
    mov fs, ax
    mov eax, fs:[real_word - low_begin]
    cmp eax, 0x600df00d
    jne bad16
    BEHAVIOUR(real_mode_interrupts_use_the_vector_table)
    /* An interrupt through the vector table: FLAGS, CS, IP on the stack, IF cleared. */
    mov word ptr [0x60 * 4], LOW_OF(real_handler)
    mov word ptr [0x60 * 4 + 2], 0
    mov bx, sp
    sti
    stc
    int 0x60
after_int:
    jnc bad16 /* FLAGS are restored */
    cmp bp, 0x5a5a
    jne bad16
    cmp sp, bx
    jne bad16
    cli
    BEHAVIOUR(real_mode_addresses_wrap)
    /* Addresses wrap at 64 KiB. */
    mov bx, 0xfff0
    mov byte ptr [0x20], 0x77
    cmp byte ptr [bx + 0x30], 0x77
    jne bad16
    BEHAVIOUR(a_real_mode_divide_error_reports_the_division)
    /* A divide error pushes the address of the instruction itself. */
    mov word ptr [0], LOW_OF(divide_handler)
    mov word ptr [2], 0
    xor cx, cx
    mov ax, 1
    cwd
at_divide:
    div cx
after_divide:
    cmp si, LOW_OF(at_divide)
    jne bad16
    BEHAVIOUR(ac_m4_verw_is_undefined_in_real_mode)
    .irp form, 1, 2
    mov word ptr [UD * 4], LOW_OF(undefined_handler)
    mov word ptr [UD * 4 + 2], 0
    xor si, si
    .if \form == 1
    verw word ptr [0x20]
    .else
    verw ax
    .byte 0x90, 0x90 /* the handler goes on behind five bytes */
    .endif
    cmp si, 1
    jne bad16
    .endr
    BEHAVIOUR(real_mode_far_calls_return)
    /* A far call and return. */
    mov di, sp
    call (LOW >> 4):(far_function - low_begin)
    cmp di, sp
    jne bad16
    cmp dx, 0x4321
    jne bad16
    BEHAVIOUR(a_limit_loaded_in_protected_mode_stays_in_real_mode)
    /* Unreal: a limit loaded in protected mode stays. */
    lgdt [LOW_OF(low_gdt)]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp short flush
flush:
    mov ax, KERNEL_DS
    mov fs, ax
    mov eax, cr0
    and al, 0xfe
    mov cr0, eax
    jmp 0:LOW_OF(unreal)
unreal:
    mov ecx, 0x100000
    mov eax, fs:[ecx]
    cmp eax, 0x1badb002 /* our own header at 1 MiB */
    jne bad16
    BEHAVIOUR(protected_and_long_mode_again)
    /* Back to protected mode. */
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp fword ptr [LOW_OF(to_protected)]
bad16:
    mov dx, 0x3f8
    mov al, 'R'
    out dx, al
    mov dx, 0xf4
    mov eax, 1
    out dx, eax
    hlt
real_handler:
    pushf
    pop ax
    test ax, 0x200
    jnz bad16
    mov bp, sp
    cmp word ptr [bp], LOW_OF(after_int)
    jne bad16
    mov bp, 0x5a5a
    iret
divide_handler:
    mov bp, sp
    mov si, [bp]
    mov word ptr [bp], LOW_OF(after_divide)
    iret
undefined_handler:
    mov bp, sp
    mov si, 1
    add word ptr [bp], 5
    iret
far_function:
    mov dx, 0x4321
    lret
to_protected:
    .long back_in_protected
    .word CODE32_CS
low_gdt:
    .word gdt_end - gdt - 1
    .long gdt
real_word: .long 0x600df00d
low_end:

    .code32
back_in_protected:
    mov eax, KERNEL_DS
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov ecx, EFER
    rdmsr
    or eax, EFER_LME
    wrmsr
    mov eax, cr0
    or eax, CR0_PG
    mov cr0, eax
    jmp KERNEL_CS:offset long_again
    .code64
long_again:
    mov rsp, [saved_rsp]
    lidt [idt_pointer]
    mov ecx, EFER
    rdmsr
    test eax, 1 << 10
    REQUIRE(jnz)
    REQUIRE_EQ(dword ptr [result], 0x80000000)
    REQUIRE_EQ(dword ptr [result + 4], 0x66001234)
#ifndef QEMU /* which does not check these */
    BEHAVIOUR(control_register_combinations_that_are_refused)
    /* Turning long mode off with 64-bit code, or paging on without PAE, is #GP. */
    TRY
    mov rax, cr4
    and rax, ~CR4_PAE
    mov cr4, rax
    FAULTS(GP, 0)
    TRY
    mov ecx, EFER
    rdmsr
    and eax, ~EFER_LME
    wrmsr
    FAULTS(GP, 0)
    TRY
    mov eax, CR0_PG /* PG without PE */
    mov cr0, rax
    FAULTS(GP, 0)
    TRY
    mov rax, 1 << 40
    mov cr0, rax
    FAULTS(GP, 0)
#endif
    PASS

    .section .data
    .balign 8
saved_rsp: .quad 0
result: .quad 0
real_idt:
    .word 0x3ff
    .quad 0
