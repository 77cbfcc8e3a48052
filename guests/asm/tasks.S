/* Hardware task switches in 32-bit protected mode: by JMP, CALL, IRET and through a task gate, with what they save,
   load and mark; and the exceptions of bad TSSs. Runs in 32-bit mode. */
#define MODE32
#include "guest.h"

#define TSS_A 0x60
#define TSS_B 0x68
#define TSS_C 0x70
#define GATE_B 0x78
#define LDT_X 0x80

#define REQUIRE32(jcc) mov dword ptr [source_line], __LINE__; jcc 98f; jmp fail32; 98:
#define EQUAL(a, b) cmp a, b; REQUIRE32(je)

/* A descriptor: 32-bit available TSS of 104 bytes at `address`. */
#define DESCRIBE(selector, address, type) \
    mov eax, offset address; mov word ptr [gdt + selector], 103; mov [gdt + selector + 2], ax; \
    shr eax, 16; mov [gdt + selector + 4], al; mov byte ptr [gdt + selector + 5], type; \
    mov byte ptr [gdt + selector + 6], 0; mov [gdt + selector + 7], ah

#define T_LINK 0
#define T_ESP0 4
#define T_SS0 8
#define T_CR3 28
#define T_EIP 32
#define T_EFLAGS 36
#define T_EAX 40
#define T_ECX 44
#define T_ESP 56
#define T_ES 72
#define T_CS 76
#define T_SS 80
#define T_DS 84
#define T_FS 88
#define T_GS 92
#define T_LDT 96
#define T_IOMAP 102

    .code32
main32:
    DESCRIBE(TSS_A, tss_a, 0x89)
    DESCRIBE(TSS_B, tss_b, 0x89)
    DESCRIBE(TSS_C, tss_c, 0x89)
    mov dword ptr [gdt + GATE_B], TSS_B << 16
    mov dword ptr [gdt + GATE_B + 4], 0x8500
    mov edi, offset tss_b
    call fill_tss
    mov dword ptr [tss_b + T_EIP], offset task_b
    mov dword ptr [tss_b + T_ESP], offset task_b_stack_top
    mov edi, offset tss_c
    call fill_tss
    /* 32-bit interrupt gates for the faults that are looked at. */
    mov ecx, 32
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
    lidt [idt32_pointer]
    mov eax, TSS_A
    ltr ax
    EQUAL(byte ptr [gdt + TSS_A + 5], 0x8b) /* busy */

    BEHAVIOUR(a_call_nests_and_iret_comes_back)
    /* CALL: the new task is nested and linked, both are busy; IRET comes back. */
    mov eax, 0x11111111
    mov ecx, 0x22222222
    mov ebp, esp
    pushfd
    call TSS_B:0
    EQUAL(dword ptr [seen_link], TSS_A)
    test dword ptr [seen_flags], 0x4000
    REQUIRE32(jnz)
    EQUAL(byte ptr [seen_busy], 0x8b)
    EQUAL(byte ptr [seen_busy + 1], 0x8b)
    test dword ptr [seen_cr0], CR0_TS
    REQUIRE32(jnz)
    EQUAL(eax, 0x11111111)
    EQUAL(ecx, 0x22222222)
    EQUAL(dword ptr [tss_a + T_EAX], 0x11111111)
    EQUAL(byte ptr [gdt + TSS_B + 5], 0x89) /* available again */
    EQUAL(byte ptr [gdt + TSS_A + 5], 0x8b)
    pushfd
    pop eax
    test eax, 0x4000
    REQUIRE32(jz)
    mov esp, ebp
    BEHAVIOUR(a_task_goes_on_where_it_left)
    /* The task goes on where it left. */
    call TSS_B:0
    EQUAL(dword ptr [times], 2)
    BEHAVIOUR(a_task_gate_switches_tasks)
    /* Through a task gate: the same. */
    call GATE_B:0
    EQUAL(dword ptr [times], 3)

    BEHAVIOUR(a_jump_leaves_the_old_task_available)
    /* JMP: no nesting; the old task is available. */
    mov dword ptr [tss_c + T_EIP], offset task_c
    jmp TSS_C:0
back_from_c:
    EQUAL(byte ptr [seen_busy], 0x89)
    EQUAL(byte ptr [seen_busy + 1], 0x8b)
    EQUAL(byte ptr [gdt + TSS_C + 5], 0x89)
    EQUAL(byte ptr [gdt + TSS_A + 5], 0x8b)

    BEHAVIOUR(an_interrupt_through_a_task_gate)
    /* An interrupt through a task gate. */
    mov dword ptr [idt + 0x1e * 8], TSS_B << 16
    mov dword ptr [idt + 0x1e * 8 + 4], 0x8500
    int 0x1e
    EQUAL(dword ptr [times], 4)

    BEHAVIOUR(busy_absent_and_short_tasks_fault)
    /* To a busy task: #GP; to an absent one: #NP; to one too short: #TS. */
    mov dword ptr [resume], offset 1f
    jmp TSS_A:0
1:  EQUAL(dword ptr [got_vector], GP)
    EQUAL(dword ptr [got_error], TSS_A)
    mov byte ptr [gdt + TSS_C + 5], 0x09
    mov dword ptr [resume], offset 1f
    jmp TSS_C:0
1:  EQUAL(dword ptr [got_vector], NP)
    EQUAL(dword ptr [got_error], TSS_C)
    mov byte ptr [gdt + TSS_C + 5], 0x89
    mov word ptr [gdt + TSS_C], 102
    mov dword ptr [resume], offset 1f
    jmp TSS_C:0
1:  EQUAL(dword ptr [got_vector], TS)
    EQUAL(dword ptr [got_error], TSS_C)
    mov word ptr [gdt + TSS_C], 103
    BEHAVIOUR(a_nested_return_to_what_is_no_busy_task_faults)
    /* IRET with NT and a link to what is no busy TSS: #TS. */
    mov dword ptr [tss_a + T_LINK], TSS_B
    pushfd
    or dword ptr [esp], 0x4000
    popfd
    mov dword ptr [resume], offset 1f
    iretd
1:  EQUAL(dword ptr [got_vector], TS)
    EQUAL(dword ptr [got_error], TSS_B)
    pushfd
    and dword ptr [esp], ~0x4000
    popfd
    BEHAVIOUR(a_bad_segment_faults_in_the_new_task)
    /* A bad segment in the new task is a fault in its context: #NP or #TS with that selector. */
    mov dword ptr [tss_c + T_DS], 0x1000
    mov dword ptr [resume], offset 1f
    mov dword ptr [tss_c + T_EIP], offset task_c
    jmp TSS_C:0
1:  EQUAL(dword ptr [got_vector], TS)
    EQUAL(dword ptr [got_error], 0x1000)
    str eax
    EQUAL(ax, TSS_C) /* the switch has happened */
    EQUAL(byte ptr [gdt + TSS_A + 5], 0x89)
    mov esi, offset text_pass
    call print32
    xor eax, eax
    mov edx, 0xf4
    out dx, eax
    hlt

/* A task that is entered again and again by CALL. */
task_b:
    mov eax, [tss_b + T_LINK]
    mov [seen_link], eax
    pushfd
    pop eax
    mov [seen_flags], eax
    mov al, [gdt + TSS_A + 5]
    mov ah, [gdt + TSS_B + 5]
    mov [seen_busy], ax
    mov eax, cr0
    mov [seen_cr0], eax
    clts
    inc dword ptr [times]
    iretd
    jmp task_b

task_c:
    mov al, [gdt + TSS_A + 5]
    mov ah, [gdt + TSS_C + 5]
    mov [seen_busy], ax
    jmp TSS_A:0

/* EDI: TSS. Flat segments, the current CR3, a stack. */
fill_tss:
    mov dword ptr [edi + T_CS], CODE32_CS
    mov dword ptr [edi + T_SS], KERNEL_DS
    mov dword ptr [edi + T_DS], KERNEL_DS
    mov dword ptr [edi + T_ES], KERNEL_DS
    mov dword ptr [edi + T_EFLAGS], 2
    mov dword ptr [edi + T_ESP], offset task_c_stack_top
    mov word ptr [edi + T_IOMAP], 104
    ret

    .balign 16
stubs32:
    .set vector_number32, 0
    .rept 32
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
    push eax
    mov eax, KERNEL_DS
    mov ds, eax
    mov es, eax
    pop eax
    pop dword ptr [got_vector]
    pop dword ptr [got_error]
    add esp, 12
    cmp dword ptr [resume], 0
    je fail32
    push dword ptr [resume]
    mov dword ptr [resume], 0
    ret

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
tss_a: .fill 26, 4, 0
tss_b: .fill 26, 4, 0
tss_c: .fill 26, 4, 0
seen_link: .long 0
seen_flags: .long 0
seen_busy: .long 0
seen_cr0: .long 0
times: .long 0
idt32_pointer:
    .word 32 * 8 - 1
    .long idt
    .section .bss
    .balign 16
    .skip 1024
task_b_stack_top: .skip 1024
task_c_stack_top: .skip 16
