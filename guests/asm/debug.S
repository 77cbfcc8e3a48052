/* Debug exceptions: single step, breakpoints on instructions and data, what DR6 says and when RF matters. */
#include "guest.h"

#define DR6_CLEAR xor eax, eax; mov dr6, rax
#define DR6_IS(bits) mov rax, dr6; and eax, 0xe00f; REQUIRE_EQ(eax, bits)
#define DR7_SET(value) mov eax, value; mov dr7, rax

main:
    BEHAVIOUR(a_single_step_traps_behind_the_next_instruction)
    /* Single step: the trap comes after the instruction behind POPF. */
    DR6_CLEAR
    TRY
    pushfq
    or qword ptr [rsp], 0x100
    popfq
    nop
after_step:
    FAULTS_AT(DB, 0, after_step)
    DR6_IS(0x4000)
    pushfq
    pop rax
    test eax, 0x100 /* the handler runs without TF */
    REQUIRE(jz)
    test dword ptr [got_rflags], 0x100
    REQUIRE(jnz)

    BEHAVIOUR(each_iteration_of_a_repeated_move_is_a_step)
    /* Steps are counted: one for each instruction, one for each iteration of REP. */
    mov qword ptr [continue_at], offset count_steps
    mov qword ptr [steps], 0
    mov ecx, 5
    mov rsi, SCRATCH
    mov rdi, SCRATCH + 64
    cld
    pushfq
    or qword ptr [rsp], 0x100
    popfq
    rep movsb
    nop
    pushfq
    and qword ptr [rsp], ~0x100
    popfq
    mov qword ptr [continue_at], 0
    /* rep movsb: 5; nop, pushfq, and: 1 each; popfq clears TF, but it began with TF set: 1. */
    REQUIRE_EQ(qword ptr [steps], 9)

    BEHAVIOUR(mov_ss_holds_a_step_back)
    /* MOV SS holds the trap back for one instruction. */
    mov qword ptr [continue_at], offset count_steps
    mov qword ptr [steps], 0
    mov ecx, KERNEL_DS
    pushfq
    or qword ptr [rsp], 0x100
    popfq
    mov ss, ecx
    nop
    nop
    pushfq
    and qword ptr [rsp], ~0x100
    popfq
    mov qword ptr [continue_at], 0
#ifndef QEMU
    REQUIRE_EQ(qword ptr [steps], 5)
#endif

    BEHAVIOUR(instruction_breakpoints_are_faults_that_rf_suppresses)
    /* An instruction breakpoint is a fault, RF in the image lets it go on. */
    DR6_CLEAR
    mov rax, offset at_breakpoint
    mov dr0, rax
    DR7_SET(0x402)
    TRY
    nop
at_breakpoint:
    nop
    FAULTS_AT(DB, 0, at_breakpoint)
    DR6_IS(1)
    test dword ptr [got_rflags], 0x10000 /* of all faults, this one alone has RF clear in its image */
    REQUIRE(jz)
    DR6_CLEAR
    mov qword ptr [continue_at], offset count_steps
    mov qword ptr [steps], 0
    mov ecx, 3
1:  mov rax, offset at_loop
    mov dr0, rax
    nop
at_loop:
    nop
    dec ecx
    jnz 1b
    mov qword ptr [continue_at], 0
    REQUIRE_EQ(qword ptr [steps], 3)
    DR7_SET(0x400)

    BEHAVIOUR(data_breakpoints_are_traps)
    /* A write breakpoint is a trap; a read does not hit it; all sizes and overlaps. */
    DR6_CLEAR
    mov rax, SCRATCH + 8
    mov dr1, rax
    DR7_SET(0x400 | 8 | 1 << 20 | 3 << 22) /* DR1, global, write, 4 bytes */
    mov eax, [SCRATCH + 8]
    mov [SCRATCH + 12], eax
    mov [SCRATCH + 7], al
    DR6_IS(0)
    TRY
    mov [SCRATCH + 11], al
after_write:
    FAULTS_AT(DB, 0, after_write)
    DR6_IS(2)
    DR6_CLEAR
    TRY
    mov [SCRATCH + 1], rax
after_wide:
    FAULTS_AT(DB, 0, after_wide)
    DR6_IS(2)
    /* Read or write: a read hits. */
    DR6_CLEAR
    DR7_SET(0x400 | 8 | 3 << 20 | 3 << 22)
    TRY
    mov eax, [SCRATCH + 8]
after_read:
    FAULTS_AT(DB, 0, after_read)
    DR6_IS(2)
    BEHAVIOUR(a_repeated_move_stops_at_a_data_breakpoint)
    /* REP MOVS stops behind the iteration that hit. */
    DR6_CLEAR
    DR7_SET(0x400 | 8 | 1 << 20 | 3 << 22)
    mov rsi, SCRATCH + 256
    mov rdi, SCRATCH
    mov ecx, 64
    TRY
at_rep:
    rep movsb
    FAULTS_AT(DB, 0, at_rep)
#ifndef QEMU
    cmp ecx, 64 - 9
    REQUIRE(jbe) /* fast string moves may report it with the next group of iterations */
#endif
    DR7_SET(0x400)
    /* Without an enable bit, DR6 may note the hit but nothing is raised. */
    TRY
    mov [SCRATCH + 8], eax
    PASSES

#ifndef QEMU /* which has no general detect */
    BEHAVIOUR(general_detect)
    /* General detect: MOV DR with GD set faults before it does anything, and clears GD for the handler. */
    DR6_CLEAR
    DR7_SET(0x2400)
    TRY
at_gd:
    mov rax, dr0
    FAULTS_AT(DB, 0, at_gd)
    DR6_IS(0x2000)
    mov rax, dr7
    test eax, 0x2000
    REQUIRE(jz)

#endif
    BEHAVIOUR(debug_register_aliases_and_privileges)
    /* DR4 and DR5 are DR6 and DR7 unless CR4.DE; reserved high bits are #GP; CPL 3 may not. */
    mov rax, cr4
    or rax, CR4_DE
    mov cr4, rax
    TRY
    .byte 0x0f, 0x21, 0xe0 /* mov rax, dr4 */
    FAULTS(UD, 0)
    mov rax, 1 << 32
    TRY
    mov dr7, rax
    FAULTS(GP, 0)
    TRY
    ENTER_USER(2)
    mov rax, dr7
    FAULTS(GP, 0)
    DR7_SET(0)
    mov rax, dr7
    REQUIRE_EQ(eax, 0x400) /* bit 10 reads as one */
    PASS

/* Counts exceptions; sets RF in the image so that an instruction breakpoint goes on. */
count_steps:
    inc qword ptr [steps]
    or qword ptr [rsp + 40], 0x10000
    mov rax, dr6
    jmp return_from_exception

    .section .data
    .balign 8
steps: .quad 0
