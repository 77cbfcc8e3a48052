/* Split-lock detection, UC-lock disable and bus-lock traps: what each locked access meets. */
#include "guest.h"

#define MSR_TEST_CTRL 0x33
#define MSR_CORE_CAPABILITIES 0xcf
#define MSR_DEBUGCTL 0x1d9
#define SPLIT_LOCK_DETECT (1 << 29)
#define UC_LOCK_DISABLE (1 << 28)
#define BUS_LOCK_DETECT (1 << 2)

#define WRITE_MSR(index, value) mov ecx, index; mov eax, value; xor edx, edx; wrmsr
#define DETECT(value) WRITE_MSR(MSR_TEST_CTRL, value)
#define DR6_SET(value) mov eax, value; mov dr6, rax
#define DR6_IS(value) mov rax, dr6; REQUIRE_EQ(eax, value)
/* Back to CPL 0. */
#define LEAVE_USER TRY; ud2; FAULTS(UD, 0)

/* The last bytes of one line and the first of the next. */
#define LINE_END (SCRATCH + 0x140)
#define SPLIT (LINE_END - 2)
/* A descriptor of the copied GDT that lies across two lines, and its place if the copy begins at 64n + `base`. */
#define SPLIT_SEL 0x80

/* `insn` is refused, and nothing has changed. */
    .macro REFUSED insn:vararg
    mov rax, [LINE_END - 8]
    mov [before], rax
    mov rax, [LINE_END]
    mov [before + 8], rax
    mov eax, 0x12345678
    TRY
    stc
96: \insn
    FAULTS_AT(AC, 0, 96b)
    test dword ptr [got_rflags], 1
    REQUIRE(jnz)
    cmp eax, 0x12345678
    REQUIRE(je)
    mov rax, [LINE_END - 8]
    REQUIRE_EQ(rax, [before])
    mov rax, [LINE_END]
    REQUIRE_EQ(rax, [before + 8])
    .endm

    .macro GOES insn:vararg
    TRY
    \insn
    PASSES
    .endm

/* An addition of `size` bytes, `k` before the end of the line. `aligned`: misaligned operands are #AC too. */
    .macro ADD_AT k, size, reg, pointer, aligned
    mov rbx, LINE_END - \k
    .if (\k > 0 && \size > \k) || (\aligned && (\k % \size) != 0)
    REFUSED lock add \pointer ptr [rbx], \reg
    .else
    GOES lock add \pointer ptr [rbx], \reg
    .endif
    .endm

    .macro ADDS aligned
    .irp k, 0, 1, 2, 3, 4, 5, 6, 7
    ADD_AT \k, 1, cl, byte, \aligned
    ADD_AT \k, 2, cx, word, \aligned
    ADD_AT \k, 4, ecx, dword, \aligned
    ADD_AT \k, 8, rcx, qword, \aligned
    .endr
    .endm

/* The same at CPL 3, which each fault leaves. */
    .macro USER_ADDS flags, aligned
    .irp k, 0, 1, 2, 3, 4, 5, 6, 7
    ENTER_USER(\flags)
    ADD_AT \k, 1, cl, byte, \aligned
    ENTER_USER(\flags)
    ADD_AT \k, 2, cx, word, \aligned
    ENTER_USER(\flags)
    ADD_AT \k, 4, ecx, dword, \aligned
    ENTER_USER(\flags)
    ADD_AT \k, 8, rcx, qword, \aligned
    .endr
    LEAVE_USER
    .endm

main:
    mov eax, 0
    cpuid
    cmp eax, 7
    jb 1f
    mov eax, 7
    xor ecx, ecx
    cpuid
    mov [leaf7_ecx], ecx
    mov [leaf7_edx], edx
1:
    BEHAVIOUR(sl_b7_dr6_has_a_bit_for_bus_locks_where_they_are_detected)
    DR6_SET(0)
    mov ebx, 0xffff0ff0
    mov esi, 0xffffefff
    test dword ptr [leaf7_ecx], 1 << 24
    jz 1f
    mov ebx, 0xffff07f0
1:  DR6_IS(ebx)
    DR6_SET(0xffffffff)
    mov rax, dr6
    or eax, 1 << 16 /* RTM */
    REQUIRE_EQ(eax, esi)
    DR6_SET(0xffff0ff0)

    mov rsi, offset text_detection
    test dword ptr [leaf7_edx], 1 << 30
    jz skip
    test dword ptr [leaf7_ecx], 1 << 24
    jz skip
    mov ecx, MSR_CORE_CAPABILITIES
    rdmsr
    mov [capabilities], eax
    test eax, 1 << 5
    jz skip

    BEHAVIOUR(sl_b1_the_registers_read_back_what_was_written)
    .irp value, SPLIT_LOCK_DETECT, 0
    DETECT(\value)
    mov ecx, MSR_TEST_CTRL
    rdmsr
    REQUIRE_EQ(eax, \value)
    REQUIRE_EQ(edx, 0)
    .endr
    mov ecx, MSR_TEST_CTRL
    mov eax, 1
    xor edx, edx
    TRY
    wrmsr
    FAULTS(GP, 0)
    xor eax, eax
    mov edx, 1
    TRY
    wrmsr
    FAULTS(GP, 0)
    mov ecx, MSR_CORE_CAPABILITIES
    mov eax, [capabilities]
    xor eax, 1 << 5
    xor edx, edx
    TRY
    wrmsr
    FAULTS(GP, 0)

    BEHAVIOUR(sl_b2_split_words_are_refused_at_cpl_0)
    DETECT(SPLIT_LOCK_DETECT)
    mov rcx, 0x0101010101010101
    ADDS 0
    /* Alignment checks are not for CPL 0. */
    mov rax, cr0
    or eax, CR0_AM
    mov cr0, rax
    push 0x40002
    popfq
    ADDS 0
    push 2
    popfq
    BEHAVIOUR(sl_b2_split_words_are_refused_at_cpl_3)
    mov rcx, 0x0101010101010101
    USER_ADDS 2, 0
    BEHAVIOUR(sl_b2_alignment_checks_refuse_more_at_cpl_3)
    USER_ADDS 0x40002, 1
    mov rax, cr0
    and eax, ~CR0_AM
    mov cr0, rax
    USER_ADDS 0x40002, 0
    push 2
    popfq

    BEHAVIOUR(sl_b3_every_locked_operation_is_refused)
    mov rbx, LINE_END - 1
    mov ecx, 5
    mov edx, 3
    .irp operation, add, adc, and, or, sbb, sub, xor, btc, btr, bts, cmpxchg, xadd
    REFUSED lock \operation word ptr [rbx], cx
    REFUSED lock \operation dword ptr [rbx], ecx
    REFUSED lock \operation qword ptr [rbx], rcx
    .endr
    .irp operation, add, adc, and, or, sbb, sub, xor, btc, btr, bts
    REFUSED lock \operation dword ptr [rbx], 7
    .endr
    .irp operation, inc, dec, neg, not
    REFUSED lock \operation word ptr [rbx]
    REFUSED lock \operation dword ptr [rbx]
    REFUSED lock \operation qword ptr [rbx]
    .endr
    REFUSED lock cmpxchg8b qword ptr [rbx]
    REFUSED xchg word ptr [rbx], cx
    REFUSED xchg dword ptr [rbx], ecx
    REFUSED xchg qword ptr [rbx], rcx
    REFUSED .byte 0xf0, 0x66, 0x01, 0x0b
    REFUSED .byte 0x66, 0xf0, 0x01, 0x0b
    /* A comparison that fails: the lock is taken before it is known. */
    mov dword ptr [LINE_END - 4], 0
    mov dword ptr [LINE_END], 0
    REFUSED lock cmpxchg dword ptr [rbx], ecx
    BEHAVIOUR(sl_b3_bit_strings_are_looked_at_where_the_bit_is)
    mov rbx, LINE_END - 62
    mov ecx, 15 * 32
    REFUSED lock bts dword ptr [rbx], ecx
    mov ecx, 15 * 32 - 1
    GOES lock bts dword ptr [rbx], ecx
    mov rbx, LINE_END + 2
    mov ecx, -1
    REFUSED lock btr dword ptr [rbx], ecx
    xor ecx, ecx
    GOES lock btr dword ptr [rbx], ecx

    BEHAVIOUR(sl_b4_accesses_without_a_lock_are_let_through)
    mov rbx, LINE_END - 1
    GOES add dword ptr [rbx], ecx
    GOES bts dword ptr [rbx], ecx
    GOES cmpxchg dword ptr [rbx], ecx
    GOES movups [rbx], xmm0

    BEHAVIOUR(sl_b5_bus_locks_trap_at_cpl_3_alone)
    DETECT(0)
    WRITE_MSR(MSR_DEBUGCTL, BUS_LOCK_DETECT)
    mov dword ptr [SPLIT], 0
    GOES lock inc dword ptr [SPLIT]
    ENTER_USER(2)
    TRY
    lock inc dword ptr [SPLIT]
after_bus_lock:
    inc dword ptr [SPLIT]
    FAULTS_AT(DB, 0, after_bus_lock)
    DR6_IS(0xffff07f0)
    REQUIRE_EQ(dword ptr [SPLIT], 2)

    BEHAVIOUR(sl_b6_a_trap_has_all_its_causes)
    DR6_SET(0xffff0ff0)
    ENTER_USER(2)
    TRY
    pushfq
    or qword ptr [rsp], 0x100
    popfq
    lock inc dword ptr [SPLIT]
after_step:
    FAULTS_AT(DB, 0, after_step)
    DR6_IS(0xffff47f0)
    DR6_SET(0xffff0ff0)
    mov eax, SPLIT
    mov dr0, rax
    mov eax, 0x402 | 1 << 16
    mov dr7, rax
    ENTER_USER(2)
    TRY
    lock inc dword ptr [SPLIT]
after_watched:
    FAULTS_AT(DB, 0, after_watched)
    DR6_IS(0xffff07f1)
    mov eax, 0x400
    mov dr7, rax
    /* Another trap leaves the bit as it is. */
    WRITE_MSR(MSR_DEBUGCTL, 0)
    DR6_SET(0xffff0ff0)
    ENTER_USER(2)
    TRY
    pushfq
    or qword ptr [rsp], 0x100
    popfq
    lock inc dword ptr [SPLIT]
    FAULTS(DB, 0)
    DR6_IS(0xffff4ff0)

    BEHAVIOUR(sl_b8_descriptor_updates_are_refused)
    DETECT(SPLIT_LOCK_DETECT)
    .irp base, 58, 60
    call copy_gdt_\base
    mov rbx, offset split_gdt + \base + SPLIT_SEL
    mov ecx, SPLIT_SEL
    mov rax, 0x00cf92000000ffff
    mov [rbx], rax
    TRY
96: mov fs, ecx
    FAULTS_AT(AC, 0, 96b)
    REQUIRE_EQ(byte ptr [rbx + 5], 0x92)
    mov byte ptr [rbx + 5], 0x93
    GOES mov fs, ecx
    /* LSL reads, and updates nothing. */
    mov byte ptr [rbx + 5], 0x92
    GOES lsl edx, ecx
    REQUIRE_EQ(edx, -1)
    /* A far call. */
    mov rax, 0x00af9a000000ffff
    mov [rbx], rax
    TRY
96: call fword ptr [far_pointer]
    FAULTS_AT(AC, 0, 96b)
    /* The code segment of a gate: #AC(0) comes up in the delivery, for the same instruction. */
    mov word ptr [idt + 0x30 * 16 + 2], SPLIT_SEL
    TRY
96: int 0x30
    FAULTS_AT(AC, 0, 96b)
    mov byte ptr [rbx + 5], 0x9b
    GOES call fword ptr [far_pointer]
    /* The busy bit of a TSS. */
    mov rax, [gdt + TSS_SEL]
    mov [rbx], rax
    mov byte ptr [rbx + 5], 0x89
    mov qword ptr [rbx + 8], 0
    TRY
96: ltr cx
    FAULTS_AT(AC, 0, 96b)
    REQUIRE_EQ(byte ptr [rbx + 5], 0x89)
    .endr
    lgdt [gdt_pointer]
    xor eax, eax
    mov fs, eax

    BEHAVIOUR(sl_b9_locks_on_uncacheable_memory_are_bus_locks)
    mov rbx, SCRATCH + 0x3000
    or qword ptr [SCRATCH_PTE(3)], 0x18
    invlpg [rbx]
    mov dword ptr [rbx], 0
    GOES lock inc dword ptr [rbx]
    WRITE_MSR(MSR_DEBUGCTL, BUS_LOCK_DETECT)
    DR6_SET(0xffff0ff0)
    ENTER_USER(2)
    TRY
    lock inc dword ptr [rbx]
after_uncached:
    FAULTS_AT(DB, 0, after_uncached)
    DR6_IS(0xffff07f0)
    REQUIRE_EQ(dword ptr [rbx], 2)
    WRITE_MSR(MSR_DEBUGCTL, 0)
    test dword ptr [capabilities], 1 << 4
    jz 3f
    BEHAVIOUR(sl_b9_locks_on_uncacheable_memory_can_be_refused)
    mov eax, 7
    mov ecx, 2
    push rbx
    cpuid
    pop rbx
    mov [leaf7_2_edx], edx
    DETECT(UC_LOCK_DISABLE)
    TRY
at_uncached:
    lock inc dword ptr [rbx]
    ud2
99: mov qword ptr [resume], 0
    cmp qword ptr [got_rip], offset at_uncached
    REQUIRE(je)
    REQUIRE_EQ(qword ptr [got_error], 0)
    mov eax, AC
    mov ecx, GP
    test dword ptr [leaf7_2_edx], 1 << 6
    cmovz eax, ecx
    REQUIRE_EQ(eax, dword ptr [got_vector])
    REQUIRE_EQ(dword ptr [rbx], 2)
    GOES lock inc dword ptr [SCRATCH]
3:  and qword ptr [SCRATCH_PTE(3)], ~0x18
    invlpg [rbx]

    BEHAVIOUR(sl_b10_page_walks_and_cmpxchg16b_never_split)
    DETECT(SPLIT_LOCK_DETECT)
    and dword ptr [SCRATCH_PTE(4)], ~(A_ | D_)
    mov rbx, SCRATCH + 0x4000
    invlpg [rbx]
    GOES mov dword ptr [rbx], ecx
    mov eax, [SCRATCH_PTE(4)]
    and eax, A_ | D_
    REQUIRE_EQ(eax, A_ | D_)
    mov rbx, LINE_END - 8
    TRY
    lock cmpxchg16b [rbx]
    FAULTS(GP, 0)
    DETECT(0)
    PASS

/* A copy of the GDT across the lines. */
    .irp base, 58, 60
copy_gdt_\base:
    mov rsi, offset gdt
    mov rdi, offset split_gdt + \base
    mov ecx, offset gdt_end - gdt
    cld
    rep movsb
    lgdt [split_gdt_pointer_\base]
    ret
    .endr

    .section .data
text_detection: .asciz "split-lock detection"
    .balign 8
far_pointer:
    .long far_return
    .word SPLIT_SEL
    .balign 8
before: .quad 0, 0
leaf7_ecx: .long 0
leaf7_edx: .long 0
leaf7_2_edx: .long 0
capabilities: .long 0
    .irp base, 58, 60
split_gdt_pointer_\base:
    .word gdt_end - gdt - 1
    .quad split_gdt + \base
    .endr
    .section .bss
    .balign 64
split_gdt: .skip 512
    .section .text
far_return:
    .byte 0xcb /* retf */
