/* Pages that are elsewhere: the events of asynchronous page faults. Its monitor has a slot at LAZY whose pages come when the program asks
   for them (port 0xec, number of the page in EAX), or at once if nobody waits for them otherwise. */
#include "guest.h"
#include "smp.h"

#define ENABLE 0x4b564d02
#define INTERRUPT 0x4b564d06
#define ACKNOWLEDGE 0x4b564d07
#define ENABLED 1
#define SEND_ALWAYS 2
#define AS_VM_EXIT 4
#define BY_INTERRUPT 8
#define VECTOR 0xf3

#define LAZY 0x10000000
#define PAGE(n) (LAZY + 4096 * (n))
/* What a page holds: its number in each word. */
#define WRITE(msr, value) mov ecx, msr; mov eax, value; xor edx, edx; wrmsr
#define REFUSED(msr, value) TRY; WRITE(msr, value); FAULTS(GP, 0)
#define BRING(n) mov eax, n; out 0xec, eax
#define ON(bits) mov eax, offset data; or eax, bits; mov ecx, ENABLE; xor edx, edx; wrmsr

main:
    mov eax, 0x40000001
    cpuid
    mov rsi, offset text_async
    bt eax, 4
    jnc skip
    bt eax, 14
    jnc skip
    mov r8d, APIC
    mov dword ptr [r8 + APIC_SPURIOUS], 0x1ff /* the local APIC is enabled */

    BEHAVIOUR(apf_t2_the_registers_take_what_they_may)
    REFUSED(ENABLE, 1 << 4)
    REFUSED(ENABLE, 1 << 5)
    REFUSED(INTERRUPT, 0x100)
    REFUSED(ENABLE, 0x8000000 | ENABLED | BY_INTERRUPT) /* no memory there */
    mov ecx, ENABLE
    rdmsr
    REQUIRE_EQ(eax, 0)
    WRITE(ENABLE, ENABLED) /* without the interrupt: nothing comes of it */
    WRITE(INTERRUPT, VECTOR)
    mov ecx, ACKNOWLEDGE
    rdmsr
    REQUIRE_EQ(eax, 0)
    WRITE(ENABLE, 0)

    BEHAVIOUR(apf_t10_enabling_wakes_everybody)
    mov qword ptr [on_interrupt], offset page_came
    ON(ENABLED | BY_INTERRUPT | SEND_ALWAYS)
    sti
    nop
    cli
    REQUIRE_EQ(dword ptr [came], 1)
    REQUIRE_EQ(dword ptr [last_token], -1)

    BEHAVIOUR(apf_t3_a_page_that_is_elsewhere_is_told_and_comes)
    mov qword ptr [continue_at], offset not_present
    mov dword ptr [wanted], 1
    sti
    nop
    mov eax, [PAGE(1)]
    cli
    REQUIRE_EQ(eax, 1)
    REQUIRE_EQ(dword ptr [told], 1)
    REQUIRE_EQ(dword ptr [came], 2)
    mov eax, [last_token]
    REQUIRE_EQ(eax, [token])
    /* It is there now. */
    mov eax, [PAGE(1) + 8]
    REQUIRE_EQ(dword ptr [told], 1)

    BEHAVIOUR(apf_t3_who_takes_no_interrupts_waits)
    mov eax, [PAGE(2)]
    REQUIRE_EQ(eax, 2)
    sti
    mov eax, [PAGE(3)] /* in the shadow of STI */
    cli
    REQUIRE_EQ(eax, 3)
    mov eax, ss
    sti
    nop
    mov ss, eax
    mov eax, [PAGE(4)] /* and of MOV SS */
    cli
    REQUIRE_EQ(eax, 4)
    REQUIRE_EQ(dword ptr [told], 1)

    BEHAVIOUR(apf_t3_user_code_alone_is_told_unless_all_is_wanted)
    ON(ENABLED | BY_INTERRUPT)
    sti
    nop
    REQUIRE_EQ(dword ptr [last_token], -1)
    mov eax, [came]
    mov [before], eax
    mov eax, [PAGE(5)] /* the vCPU is held */
    REQUIRE_EQ(eax, 5)
    REQUIRE_EQ(dword ptr [told], 1)
    mov eax, [before]
    REQUIRE_EQ(eax, [came])
    mov dword ptr [wanted], 6
    ENTER_USER(0x202)
    mov eax, [PAGE(6)]
    mov [user_word], eax
    ud2

/* #PF with a token, or #UD that ends user code. Stack: RAX, vector, error code, RIP … */
not_present:
    cmp qword ptr [got_vector], UD
    jne 1f
    mov eax, KERNEL_DS
    mov ss, eax
    mov rsp, offset boot_stack_top - 256
    jmp user_done
1:  REQUIRE_EQ(qword ptr [got_vector], PF)
    REQUIRE_EQ(qword ptr [got_error], 0)
    REQUIRE_EQ(dword ptr [data], 1)
    mov rax, [got_cr2]
    mov [token], eax
    REQUIRE_EQ(rax, [token]) /* 32 bits */
    test eax, eax
    REQUIRE(jnz)
    mov dword ptr [data], 0
    inc dword ptr [told]
    /* Something else is done until it comes. */
    mov eax, [came]
    mov [before], eax
    BRING([wanted])
    sti
2:  inc qword ptr [work]
    mov eax, [came]
    cmp eax, [before]
    je 2b
    cli
    jmp return_from_exception

user_done:
    cli
    mov qword ptr [continue_at], 0
    REQUIRE_EQ(dword ptr [user_word], 6)
    REQUIRE_EQ(dword ptr [told], 2)
    PASS

/* An interrupt: a page has come. Called with RAX free. */
page_came:
    push rcx
    push rdx
    mov eax, [data + 4]
    mov [last_token], eax
    inc dword ptr [came]
    mov ecx, APIC
    mov dword ptr [rcx + APIC_EOI], 0
    mov dword ptr [data + 4], 0
    WRITE(ACKNOWLEDGE, 1)
    pop rdx
    pop rcx
    ret

    .section .data
text_async: .asciz "asynchronous page faults"
    .balign 64
data: .fill 64, 1, 0
token: .quad 0
last_token: .long 0
came: .long 0
told: .long 0
wanted: .long 0
before: .long 0
user_word: .long 0
work: .quad 0
