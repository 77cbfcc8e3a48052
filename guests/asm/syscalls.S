/* SYSCALL, SYSRET, SYSENTER, SYSEXIT, and calls through gates between privilege levels. */
#include "guest.h"

#define STAR 0xc0000081
#define LSTAR 0xc0000082
#define CSTAR 0xc0000083
#define SFMASK 0xc0000084
#define SYSENTER_CS 0x174
#define SYSENTER_ESP 0x175
#define SYSENTER_EIP 0x176
#define WRITE_MSR(number, low, high) mov ecx, number; mov eax, low; mov edx, high; wrmsr

main:
    mov ecx, EFER
    rdmsr
    and eax, ~EFER_SCE
    wrmsr
    TRY
    syscall
    FAULTS(UD, 0)
    mov ecx, EFER
    rdmsr
    or eax, EFER_SCE
    wrmsr
    BEHAVIOUR(system_calls_and_their_return)
    /* Kernel CS 08, SS 10; user base 0x20 | 3: SYSRET gives SS 2b, CS 33 (64 bits) or 23. */
    WRITE_MSR(STAR, 0, 0x00230008)
    WRITE_MSR(LSTAR, offset from_syscall, 0)
    WRITE_MSR(SFMASK, 0x40701, 0)

    TRY
    ENTER_USER(0x4c03) /* CF, DF, OF, NT */
    mov r12d, 0x1234
    syscall
after_syscall:
    ud2 /* SYSRET comes back here */
from_syscall:
    mov [kernel_flags_from_r11], r11
    mov rsp, offset boot_stack_top
    pushfq
    pop rax
    mov [flags_inside], rax
    mov eax, cs
    mov [cs_inside], eax
    mov eax, ss
    mov [ss_inside], eax
    mov [rcx_inside], rcx
    mov rsp, offset user_stack_top
    sysretq
    FAULTS_AT(UD, 0, after_syscall)
    REQUIRE_EQ(dword ptr [got_cs], USER_CS)
    REQUIRE_EQ(dword ptr [got_ss], USER_DS)
    REQUIRE_EQ(dword ptr [cs_inside], KERNEL_CS)
    REQUIRE_EQ(dword ptr [ss_inside], KERNEL_DS)
    cmp qword ptr [rcx_inside], offset after_syscall
    REQUIRE(je)
    mov eax, [flags_inside]
    and eax, 0x4f01
#ifdef QEMU /* which drops the status flags */
    or eax, 0x800
#endif
    REQUIRE_EQ(eax, 0x4800) /* NT and OF stay: they are not masked; CF and DF are */
    mov eax, [kernel_flags_from_r11]
    and eax, 0x4c01
    REQUIRE_EQ(eax, 0x4c01)
    cld

    BEHAVIOUR(sysret_to_an_address_that_is_not_canonical)
    /* SYSRET to an address that is not canonical: #GP at CPL 0. */
    TRY
    mov rcx, 0x800000000000
    mov r11d, 2
    sysretq
    FAULTS(GP, 0)
#ifndef QEMU
    REQUIRE_EQ(dword ptr [got_cs], KERNEL_CS)
#endif

    BEHAVIOUR(sysenter_and_sysexit)
    /* SYSENTER: CS from the MSR, flags IF and VM cleared; SYSEXIT to CPL 3. */
#ifndef QEMU
    TRY
    WRITE_MSR(SYSENTER_CS, 0, 0)
    sysenter
    FAULTS(GP, 0)
#endif
    WRITE_MSR(SYSENTER_CS, KERNEL_CS, 0)
    WRITE_MSR(SYSENTER_ESP, offset boot_stack_top, 0)
    WRITE_MSR(SYSENTER_EIP, offset from_sysenter, 0)
    /* SYSEXIT wants user 64-bit code at CS + 32 and data at CS + 40: 28 and 30 here, so bring those there. */
    mov rax, [gdt + 0x30]
    mov rbx, [gdt + 0x28]
    mov [saved], rax
    mov [saved + 8], rbx
    mov [gdt + 0x28], rax
    mov [gdt + 0x30], rbx
    TRY
    mov rdx, offset to_user
    mov rcx, offset user_stack_top
    sysexitq
to_user:
    mov eax, cs
    mov ebx, ss
    sysenter
from_sysenter:
    mov [cs_inside], eax
    mov [ss_inside], ebx
    pushfq
    pop rcx
    mov [flags_inside], rcx
    ud2
    FAULTS(UD, 0)
    mov rax, [saved]
    mov [gdt + 0x30], rax
    mov rax, [saved + 8]
    mov [gdt + 0x28], rax
    REQUIRE_EQ(dword ptr [cs_inside], 0x2b)
    REQUIRE_EQ(dword ptr [ss_inside], 0x33)
    REQUIRE_EQ(dword ptr [got_cs], KERNEL_CS)
    test dword ptr [flags_inside], 0x200
    REQUIRE(jz)

    BEHAVIOUR(a_call_gate_switches_to_the_stack_of_the_tss)
    /* A 64-bit call gate from CPL 3: the stack of the TSS, SS null, the return address pushed. */
    mov rax, offset through_gate
    mov rdi, offset gdt + SPARE_SEL
    mov [rdi], ax
    mov word ptr [rdi + 2], KERNEL_CS
    mov word ptr [rdi + 4], 0xec00
    shr rax, 16
    mov [rdi + 6], ax
    shr rax, 16
    mov [rdi + 8], eax
    mov dword ptr [rdi + 12], 0
    mov dword ptr [gate_pointer + 4], SPARE_SEL
    TRY
    ENTER_USER(2)
    call fword ptr [gate_pointer]
after_gate:
    ud2
through_gate:
    mov [rsp_inside], rsp
    mov eax, cs
    mov [cs_inside], eax
    mov eax, ss
    mov [ss_inside], eax
    mov rax, [rsp]
    mov [rcx_inside], rax
    mov rax, [rsp + 24]
    mov [stacked_ss], rax
    rex.w lret
    FAULTS_AT(UD, 0, after_gate)
    cmp qword ptr [rsp_inside], offset ring0_stack_top - 32
    REQUIRE(je)
    REQUIRE_EQ(dword ptr [cs_inside], KERNEL_CS)
    REQUIRE_EQ(dword ptr [ss_inside], 0)
    cmp qword ptr [rcx_inside], offset after_gate
    REQUIRE(je)
    REQUIRE_EQ(dword ptr [stacked_ss], USER_DS)
    REQUIRE_EQ(dword ptr [got_cs], USER_CS)
    cmp qword ptr [got_rsp], offset user_stack_top
    REQUIRE(je)

    BEHAVIOUR(a_bad_call_gate_faults_with_its_selector)
    /* The gate's DPL, its presence, and the code segment it names. */
    mov byte ptr [gdt + SPARE_SEL + 5], 0x8c
    TRY
    ENTER_USER(2)
    call fword ptr [gate_pointer]
    FAULTS(GP, SPARE_SEL)
    mov byte ptr [gdt + SPARE_SEL + 5], 0x6c
    TRY
    ENTER_USER(2)
    call fword ptr [gate_pointer]
    FAULTS(NP, SPARE_SEL)
    mov byte ptr [gdt + SPARE_SEL + 5], 0xec
    mov word ptr [gdt + SPARE_SEL + 2], 0
    TRY
    ENTER_USER(2)
    call fword ptr [gate_pointer]
    FAULTS(GP, 0)
    mov word ptr [gdt + SPARE_SEL + 2], CODE32_CS
    TRY
    ENTER_USER(2)
    call fword ptr [gate_pointer]
    FAULTS(GP, CODE32_CS)

    BEHAVIOUR(compatibility_mode_by_far_returns)
    /* Compatibility mode and back, by far returns; INTO and BOUND live there. */
    TRY
    push USER_DS
    push offset user_stack_top
    push 2
    push USER_CS32
    push offset compatibility
    iretq
    .code32
compatibility:
    mov ecx, 0x7fffffff
    inc ecx /* 40+r is INC here */
    into
    .code64
after_into:
    FAULTS_AT(OF, 0, after_into)
    REQUIRE_EQ(dword ptr [got_cs], USER_CS32)
    TRY
    mov eax, USER_DS /* compatibility mode uses it, and a DPL of 0 would make it null on the way to CPL 3 */
    mov ds, eax
    push USER_DS
    push offset user_stack_top
    push 2
    push USER_CS32
    push offset compatibility2
    iretq
    .code32
compatibility2:
    mov dword ptr [scratch_bounds], 1
    mov dword ptr [scratch_bounds + 4], 10
    mov eax, 10
    bound eax, [scratch_bounds]
    mov eax, 11
at_bound:
    bound eax, [scratch_bounds]
    .code64
    FAULTS_AT(BR, 0, at_bound)
    PASS

    .section .data
    .balign 8
kernel_flags_from_r11: .quad 0
flags_inside: .quad 0
cs_inside: .quad 0
ss_inside: .quad 0
rcx_inside: .quad 0
rsp_inside: .quad 0
stacked_ss: .quad 0
saved: .quad 0, 0
gate_pointer: .quad 0
scratch_bounds: .quad 0
