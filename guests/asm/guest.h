/*
 * What every guest program begins with: a multiboot-1 header, the way into long mode, descriptor tables,
 * exception handlers that note what happened, and a word on the serial port at the end.
 *
 * A program defines `main`, which runs in 64-bit mode at CPL 0 with the first 4 GiB mapped one to one,
 * interrupts off. It ends by PASS or FAIL; the status also goes to the debug-exit port (0xf4): 0 or 1.
 *
 * An instruction that is to fault is written between TRY and FAULTS(vector, error): the handler returns to
 * FAULTS at CPL 0 with the stack pointer that TRY saw. Registers are what they were at the fault.
 */

#define KERNEL_CS   0x08
#define KERNEL_DS   0x10
#define CODE32_CS   0x18
#define USER_CS32   0x23
#define USER_DS     0x2b
#define USER_CS     0x33
#define CODE16_CS   0x38
#define DATA16_DS   0x40
#define TSS_SEL     0x48
#define SPARE_SEL   0x60 /* sixteen spare descriptors from here on */

#define CR0_PE (1 << 0)
#define CR0_MP (1 << 1)
#define CR0_EM (1 << 2)
#define CR0_TS (1 << 3)
#define CR0_NE (1 << 5)
#define CR0_WP (1 << 16)
#define CR0_AM (1 << 18)
#define CR0_PG (1 << 31)
#define CR4_DE (1 << 3)
#define CR4_PSE (1 << 4)
#define CR4_PAE (1 << 5)
#define CR4_PGE (1 << 7)
#define CR4_OSFXSR (1 << 9)
#define CR4_OSXMMEXCPT (1 << 10)
#define CR4_UMIP (1 << 11)
#define CR4_SMEP (1 << 20)
#define CR4_SMAP (1 << 21)
#define CR4_PKE (1 << 22)

#define EFER 0xc0000080
#define EFER_SCE (1 << 0)
#define EFER_LME (1 << 8)
#define EFER_NXE (1 << 11)

#define DE 0
#define DB 1
#define BP 3
#define OF 4
#define BR 5
#define UD 6
#define NM 7
#define DF 8
#define TS 10
#define NP 11
#define SS 12
#define GP 13
#define PF 14
#define MF 16
#define AC 17
#define XM 19
/* How a failure at CPL 3 comes to CPL 0. */
#define FAIL_VECTOR 0x3f

/* Page-table bits. */
#define P_ 1
#define W_ 2
#define U_ 4
#define A_ 0x20
#define D_ 0x40
#define PS_ 0x80
#define G_ 0x100

/* Fails with the source line unless the condition of the jump holds. */
#define REQUIRE(jcc) mov dword ptr [source_line], __LINE__; jcc 98f; jmp fail; 98:
#define REQUIRE_EQ(a, b) cmp a, b; REQUIRE(je)

#define TRY \
    mov qword ptr [got_vector], -1; \
    mov [resume_rsp], rsp; \
    mov qword ptr [resume], offset 99f

#define FAULTS(vector, error) \
    99: mov qword ptr [resume], 0; \
    REQUIRE_EQ(qword ptr [got_vector], vector); \
    REQUIRE_EQ(dword ptr [got_error], error)

#define FAULTS_AT(vector, error, address) \
    FAULTS(vector, error); \
    cmp qword ptr [got_rip], offset address; REQUIRE(je)

/* Nothing faulted since TRY. */
#define PASSES \
    99: mov qword ptr [resume], 0; \
    REQUIRE_EQ(qword ptr [got_vector], -1)

/* Goes on at CPL 3 behind it, with the stack at user_stack_top. */
#define ENTER_USER(flags) \
    push USER_DS; push offset user_stack_top; push flags; push USER_CS; push offset 97f; iretq; 97:

#define PASS jmp pass

/* What follows shows this behaviour: tells the machine, at port 0xea, by the source line. All modes, CPL 0, a stack. */
#define BEHAVIOUR(name) push ax; mov ax, __LINE__; out 0xea, ax; pop ax

    .intel_syntax noprefix
    .section .multiboot, "ax"
    .balign 4
multiboot_header:
    .long 0x1badb002, 0, -0x1badb002

    .section .text
    .code32
    .global _start
_start:
    cli
    mov esp, offset boot_stack_top
    lgdt [gdt_pointer]
#ifdef MODE32
    jmp CODE32_CS:offset 1f
1:  mov eax, KERNEL_DS
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov fs, eax
    mov gs, eax
    jmp main32
#endif
    call build_page_tables
    mov eax, CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, EFER
    rdmsr
    or eax, EFER_LME | EFER_NXE
    wrmsr
    mov eax, CR0_PE | CR0_MP | CR0_NE | CR0_WP | CR0_PG | 0x10
    mov cr0, eax
    jmp KERNEL_CS:offset start64

/* One to one, 2 MiB pages, user-accessible below 1 GiB; but 0x600000 to 0x7fffff by 4 KiB pages in `scratch_pt`. */
build_page_tables:
    mov edi, offset pml4
    mov ecx, (page_tables_end - pml4) / 4
    xor eax, eax
    rep stosd
    mov dword ptr [pml4], offset pdpt + (P_ | W_ | U_)
    mov edi, offset pdpt
    mov eax, offset pd + (P_ | W_ | U_)
    mov ecx, 4
1:  mov [edi], eax
    add eax, 4096
    add edi, 8
    loop 1b
    mov edi, offset pd
    mov eax, P_ | W_ | U_ | PS_
    mov ecx, 2048
1:  mov [edi], eax
    add eax, 0x200000
    add edi, 8
    loop 1b
    mov dword ptr [pd + 3 * 8], offset scratch_pt + (P_ | W_ | U_)
    mov edi, offset scratch_pt
    mov eax, 0x600000 + (P_ | W_ | U_)
    mov ecx, 512
1:  mov [edi], eax
    add eax, 4096
    add edi, 8
    loop 1b
    ret

#define SCRATCH 0x600000
#define SCRATCH_PTE(n) (scratch_pt + 8 * (n))

    .code64
start64:
    mov al, 0xff /* no interrupts from the 8259s */
    out 0x21, al
    out 0xa1, al
    mov eax, KERNEL_DS
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov rsp, offset boot_stack_top
    call build_idt
    lidt [idt_pointer]
    mov rax, offset tss
    mov rdi, offset gdt + TSS_SEL
    mov word ptr [rdi], 103
    mov [rdi + 2], ax
    shr rax, 16
    mov [rdi + 4], al
    mov byte ptr [rdi + 5], 0x89
    mov byte ptr [rdi + 6], 0
    mov [rdi + 7], ah
    mov qword ptr [rdi + 8], 0
    mov qword ptr [tss + 4], offset ring0_stack_top
    mov qword ptr [tss + 0x24], offset ist1_stack_top
    mov word ptr [tss + 102], 104
    mov eax, TSS_SEL
    ltr ax
    call main
    PASS

/* 64-bit interrupt gates for the 32 exceptions and vectors up to 0x40; #DF runs on IST 1. */
build_idt:
    mov rdi, offset idt
    mov rsi, offset stubs
    mov ecx, 256
1:  mov rax, rsi
    mov [rdi], ax
    mov word ptr [rdi + 2], KERNEL_CS
    mov word ptr [rdi + 4], 0x8e00
    shr rax, 16
    mov [rdi + 6], ax
    shr rax, 16
    mov [rdi + 8], eax
    mov dword ptr [rdi + 12], 0
    add rdi, 16
    add rsi, 16
    loop 1b
    mov byte ptr [idt + DF * 16 + 4], 1
    mov byte ptr [idt + BP * 16 + 5], 0xee
    mov byte ptr [idt + OF * 16 + 5], 0xee
    mov byte ptr [idt + FAIL_VECTOR * 16 + 5], 0xee
    ret

/* Where all vectors lead: a program may have a handler of its own for them. */
#ifndef CAUGHT
#define CAUGHT caught
#endif

    .balign 16
stubs:
    .set vector_number, 0
    .rept 256
    .balign 16
    .if vector_number == 8 || (vector_number >= 10 && vector_number <= 14) || vector_number == 17 || vector_number == 21
    nop
    nop
    .else
    push 0
    .endif
    push vector_number
    .byte 0xe9
    .long CAUGHT - . - 4
    .set vector_number, vector_number + 1
    .endr

/* Stack: vector, error code, RIP, CS, RFLAGS, RSP, SS. */
caught:
    push rax
    mov rax, [rsp + 8]
    cmp rax, 32
    jae 2f
    mov [got_vector], rax
    mov rax, [rsp + 16]
    mov [got_error], rax
    mov rax, [rsp + 24]
    mov [got_rip], rax
    mov rax, [rsp + 32]
    mov [got_cs], rax
    mov rax, [rsp + 40]
    mov [got_rflags], rax
    mov rax, [rsp + 48]
    mov [got_rsp], rax
    mov rax, [rsp + 56]
    mov [got_ss], rax
    mov [got_handler_rsp], rsp
    mov rax, cr2
    mov [got_cr2], rax
    inc qword ptr [got_count]
    cmp qword ptr [continue_at], 0
    jne 3f
    cmp qword ptr [resume], 0
    je unexpected
    mov eax, KERNEL_DS
    mov ss, eax
    pop rax
    mov rsp, [resume_rsp]
    jmp qword ptr [resume]
2:  /* An interrupt: its vector's counter. */
    cmp eax, FAIL_VECTOR
    je fail
    lock inc dword ptr [interrupt_counts + rax * 4]
    cmp qword ptr [on_interrupt], 0
    je 4f
    call qword ptr [on_interrupt]
4:  pop rax
    add rsp, 16
    iretq
3:  /* A handler of the program's own, which returns with IRETQ itself: the stack is as the CPU left it, with the
       error code (or zero) and the vector on top, and RAX. */
    jmp qword ptr [continue_at]

/* Stack as at 3 above. Returns to where the exception was. */
return_from_exception:
    pop rax
    add rsp, 16
    iretq

unexpected:
    mov rsi, offset text_unexpected
    call print
    mov rax, [got_vector]
    call print_hex
    mov rax, [got_error]
    call print_hex
    mov rax, [got_rip]
    call print_hex
    mov rax, [got_cr2]
    call print_hex
    mov dword ptr [source_line], 0
    jmp fail

pass:
    mov rsi, offset text_pass
    call print
    xor eax, eax
    mov edx, 0xf4
    out dx, eax
    hlt
    jmp pass

/* Skipped: the processor does not offer what the program is about. RSI: what. */
skip:
    push rsi
    mov rsi, offset text_skip
    call print
    pop rsi
    call print
    mov rsi, offset text_newline
    call print
    xor eax, eax
    mov edx, 0xf4
    out dx, eax
    hlt
    jmp skip

fail:
    mov eax, cs
    test al, 3
    jz 1f
    int FAIL_VECTOR
1:  mov rsi, offset text_fail
    call print
    mov eax, [source_line]
    call print_decimal
    mov rsi, offset text_got
    call print
    mov rax, [got_vector]
    call print_hex
    mov rax, [got_error]
    call print_hex
    mov rax, [got_rip]
    call print_hex
    mov rax, [got_cr2]
    call print_hex
    mov rsi, offset text_newline
    call print
    mov eax, 1
    mov edx, 0xf4
    out dx, eax
    hlt
    jmp fail

print:
    cld
    mov edx, 0x3f8
1:  lodsb
    test al, al
    jz 2f
    out dx, al
    jmp 1b
2:  ret

print_hex:
    mov ecx, 16
    mov edx, 0x3f8
    mov rbx, rax
    mov al, ' '
    out dx, al
1:  rol rbx, 4
    mov al, bl
    and al, 15
    add al, '0'
    cmp al, '9'
    jbe 2f
    add al, 'a' - '9' - 1
2:  out dx, al
    loop 1b
    ret

print_decimal:
    mov rbx, 10
    xor ecx, ecx
1:  xor edx, edx
    div rbx
    push rdx
    inc ecx
    test eax, eax
    jnz 1b
    mov edx, 0x3f8
2:  pop rax
    add al, '0'
    out dx, al
    loop 2b
    ret

    .section .data
text_pass: .asciz "PASS\n"
text_skip: .asciz "SKIP: this processor does not offer "
text_fail: .asciz "FAIL at line "
text_got: .asciz "; last exception: vector, error, rip, cr2"
text_unexpected: .asciz "unexpected exception: vector, error, rip, cr2"
text_newline: .asciz "\n"

    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff /* 08 64-bit code */
    .quad 0x00cf93000000ffff /* 10 data */
    .quad 0x00cf9b000000ffff /* 18 32-bit code */
    .quad 0x00cffb000000ffff /* 20 user 32-bit code */
    .quad 0x00cff3000000ffff /* 28 user data */
    .quad 0x00affb000000ffff /* 30 user 64-bit code */
    .quad 0x00009b000000ffff /* 38 16-bit code */
    .quad 0x000093000000ffff /* 40 16-bit data */
    .quad 0, 0               /* 48 TSS */
    .quad 0
    .fill 16, 8, 0           /* 60 spare */
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 4095
    .quad idt

    .balign 8
resume: .quad 0
resume_rsp: .quad 0
continue_at: .quad 0
on_interrupt: .quad 0
got_vector: .quad -1
got_error: .quad 0
got_rip: .quad 0
got_cs: .quad 0
got_rflags: .quad 0
got_rsp: .quad 0
got_ss: .quad 0
got_cr2: .quad 0
got_handler_rsp: .quad 0
got_count: .quad 0
source_line: .quad 0

    .section .bss
    .balign 4096
pml4: .skip 4096
pdpt: .skip 4096
pd: .skip 4 * 4096
scratch_pt: .skip 4096
page_tables_end:
idt: .skip 4096
interrupt_counts: .skip 1024
    .balign 16
tss: .skip 256
    .skip 8192
boot_stack_top: .skip 16
    .skip 4096
ring0_stack_top: .skip 16
    .skip 4096
ist1_stack_top: .skip 16
    .skip 4096
user_stack_top: .skip 16

    .section .text
