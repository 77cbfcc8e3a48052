/* What is watched: ports, data of each length, instructions; what single step does to instructions of other kinds; and
   what the shadows of MOV SS and STI hold back. */
#include "guest.h"

#define DR6_CLEAR xor eax, eax; mov dr6, rax
#define DR6_IS(bits) mov rax, dr6; and eax, 0xe00f; REQUIRE_EQ(eax, bits)
#define DR7_SET(value) mov eax, value; mov dr7, rax
#define TF_ON pushfq; or qword ptr [rsp], 0x100; popfq
#define LENGTH_1 0
#define LENGTH_2 1
#define LENGTH_4 3
#define LENGTH_8 2
#define WRITES 1
#define PORTS 2
#define ANY 3
#define WATCH0(kind, length) DR7_SET(0x402 | (kind) << 16 | (length) << 18)

/* A watched range of `length` bytes: each byte in it hits, those beside it do not; a quad across its ends does. */
    .macro lengths code, length
    DR6_CLEAR
    mov rax, SCRATCH + 0x40
    mov dr0, rax
    WATCH0(WRITES, \code)
    TRY
    mov byte ptr [SCRATCH + 0x3f], 1
    mov byte ptr [SCRATCH + 0x40 + \length], 1
    mov rax, [SCRATCH + 0x40]
    PASSES
    mov rbx, SCRATCH + 0x40
1:  DR6_CLEAR
    TRY
    mov [rbx], al
    nop
    FAULTS(DB, 0)
    DR6_IS(1)
    inc rbx
    cmp rbx, SCRATCH + 0x40 + \length
    jne 1b
    DR6_CLEAR
    TRY
    mov [SCRATCH + 0x39], rax
    nop
    FAULTS(DB, 0)
    TRY
    mov [SCRATCH + 0x40 + \length - 1], rax
    nop
    FAULTS(DB, 0)
    WATCH0(ANY, \code)
    TRY
    mov ax, [SCRATCH + 0x3f]
    nop
    FAULTS(DB, 0)
    DR6_IS(1)
    .endm

main:
    BEHAVIOUR(data_breakpoints_of_each_length)
    lengths LENGTH_1, 1
    lengths LENGTH_2, 2
    lengths LENGTH_4, 4
    lengths LENGTH_8, 8
    BEHAVIOUR(a_breakpoint_address_is_aligned_to_its_length)
    /* The address is aligned down to the length. */
    mov rax, SCRATCH + 0x47
    mov dr0, rax
    WATCH0(WRITES, LENGTH_4)
    TRY
    mov [SCRATCH + 0x44], al
    nop
    FAULTS(DB, 0)
    BEHAVIOUR(implicit_accesses_are_watched)
    /* Implicit accesses of an instruction are watched too: a push, a string's iteration. */
    lea rax, [rsp - 8]
    mov dr0, rax
    WATCH0(WRITES, LENGTH_8)
    TRY
    push 1
after_push:
    nop
    FAULTS_AT(DB, 0, after_push)
    DR7_SET(0x400)

    BEHAVIOUR(port_breakpoints)
    /* Ports, with CR4.DE: a trap, after the port was read. */
    mov rax, cr4
    or rax, CR4_DE
    mov cr4, rax
    DR6_CLEAR
    mov eax, 0x80
    mov dr2, rax
    DR7_SET(0x400 | 2 << 4 | PORTS << 24)
    TRY
    out 0x81, al
    in al, 0x7f
    PASSES
    TRY
    in al, 0x80
after_in:
    FAULTS_AT(DB, 0, after_in)
    DR6_IS(4)
    DR6_CLEAR
    TRY
    out 0x80, al
after_out:
    FAULTS_AT(DB, 0, after_out)
    DR6_IS(4)
    TRY
    in eax, 0x7f /* four bytes from 0x7f on */
after_wide:
    FAULTS_AT(DB, 0, after_wide)
    DR7_SET(0x400)

    BEHAVIOUR(a_data_breakpoint_of_mov_ss_waits_for_the_next_instruction)
    /* MOV SS with a watched operand: the trap waits until the next instruction is done. */
    DR6_CLEAR
    mov rax, SCRATCH + 0x80
    mov dr0, rax
    mov word ptr [SCRATCH + 0x80], KERNEL_DS
    WATCH0(ANY, LENGTH_2)
    mov ecx, 1
    TRY
    mov ss, word ptr [SCRATCH + 0x80]
    inc ecx
after_shadow:
    inc ecx
    FAULTS_AT(DB, 0, after_shadow)
    DR6_IS(1)
    REQUIRE_EQ(ecx, 2)
    DR7_SET(0x400)
    BEHAVIOUR(an_instruction_breakpoint_in_a_shadow_is_lost)
    /* An instruction breakpoint in that shadow is held back for good. */
    DR6_CLEAR
    mov rax, offset in_shadow
    mov dr0, rax
    WATCH0(0, 0)
    mov ecx, KERNEL_DS
    TRY
    mov ss, ecx
in_shadow:
    nop
    nop
    PASSES
    BEHAVIOUR(rf_lets_an_instruction_run_once)
    /* Without the shadow it hits; RF from IRET's image lets the instruction run once. */
    TRY
    jmp in_shadow
    FAULTS_AT(DB, 0, in_shadow)
    mov rax, offset resumed
    mov dr0, rax
    TRY
    push KERNEL_DS
    lea rax, [rsp + 8]
    push rax
    push 0x10002
    push KERNEL_CS
    push offset resumed
    iretq
resumed:
    nop
    PASSES
    pushfq
    pop rax
    test eax, 0x10000 /* PUSHF stores RF as zero */
    REQUIRE(jz)
    BEHAVIOUR(two_breakpoints_at_once)
    /* Breakpoints on two of an instruction's kinds at once: DR6 says both. */
    DR6_CLEAR
    mov rax, SCRATCH
    mov dr0, rax
    mov dr3, rax
    DR7_SET(0x482 | WRITES << 16 | ANY << 28)
    TRY
    mov [SCRATCH], al
    nop
    FAULTS(DB, 0)
    DR6_IS(9)
    DR7_SET(0x400)

    BEHAVIOUR(a_step_over_a_branch_reports_its_target)
    /* Single step. After a taken branch: at its target. */
    DR6_CLEAR
    TRY
    TF_ON
    jmp 1f
    ud2
1:
step_target:
    nop
    FAULTS_AT(DB, 0, step_target)
    DR6_IS(0x4000)
    BEHAVIOUR(a_fault_comes_without_its_step)
    /* A fault before the instruction is done comes alone, with TF in its image. */
    DR6_CLEAR
    TRY
    TF_ON
at_ud:
    ud2
    FAULTS_AT(UD, 0, at_ud)
    DR6_IS(0)
    test dword ptr [got_rflags], 0x100
    REQUIRE(jnz)
    BEHAVIOUR(int_n_is_no_step)
    /* INT n clears TF: no step before its handler's first instruction; the image has TF. */
    TRY
    TF_ON
    int3
after_int3:
    FAULTS_AT(BP, 0, after_int3)
    test dword ptr [got_rflags], 0x100
    REQUIRE(jnz)
    DR6_IS(0)
    /* MOV SS holds the step back by one instruction. */
    mov ecx, KERNEL_DS
    TRY
    TF_ON
    mov ss, ecx
    nop
after_ss:
    nop
    FAULTS_AT(DB, 0, after_ss)
    BEHAVIOUR(repeats_of_nothing_and_exits_are_steps)
    /* REP that does nothing is one step; CPUID and port instructions, which leave guest mode, are steps as others are. */
    xor ecx, ecx
    TRY
    TF_ON
    rep movsb
after_rep:
    nop
    FAULTS_AT(DB, 0, after_rep)
    TRY
    TF_ON
    cpuid
after_cpuid:
    nop
    FAULTS_AT(DB, 0, after_cpuid)
    TRY
    TF_ON
    out 0x81, al
after_port:
    nop
    FAULTS_AT(DB, 0, after_port)
    TRY
    TF_ON
    cli
after_cli:
    nop
    FAULTS_AT(DB, 0, after_cli)
    BEHAVIOUR(popf_and_iret_change_tf_after_their_step)
    /* POPF that clears TF is stepped itself; IRET that sets it lets one instruction run. */
    TRY
    push 2
    TF_ON
    popfq
after_popf:
    nop
    FAULTS_AT(DB, 0, after_popf)
    mov ecx, 5
    TRY
    push KERNEL_DS
    lea rax, [rsp + 8]
    push rax
    push 0x102
    push KERNEL_CS
    push offset 1f
    iretq
1:  inc ecx
after_iret:
    inc ecx
    FAULTS_AT(DB, 0, after_iret)
    REQUIRE_EQ(ecx, 6)
    BEHAVIOUR(a_step_and_a_watched_write_are_one_exception)
    /* A step and a watched write at once: one exception, both bits. */
    DR6_CLEAR
    mov rax, SCRATCH
    mov dr0, rax
    WATCH0(WRITES, LENGTH_8)
    TRY
    TF_ON
    mov [SCRATCH], al
after_both:
    nop
    FAULTS_AT(DB, 0, after_both)
    DR6_IS(0x4001)
    DR7_SET(0x400)
    PASS
