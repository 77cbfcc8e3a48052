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
/* When the vCPU is held for it, or for another page. */
#define BRING_WHEN_HELD(n) mov eax, (n) | 0x80000000; out 0xec, eax
/* An access that is left out if it has to wait; three bytes. The address is in R10. */
#define TOUCH mov eax, [r10]
#define INTERRUPTS_IN sti; nop; cli
/* One more page comes: it may be there for a while before its event is. */
#define ONE_MORE_COMES inc dword ptr [before]; sti; 7: mov eax, [came]; cmp eax, [before]; jne 7b; cli
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
    cmp dword ptr [leave_out], 0
    je 3f
    add qword ptr [rsp + 24], 3
    jmp return_from_exception
3:  /* Something else is done until it comes. */
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
    REQUIRE_EQ(dword ptr [user_word], 6)
    REQUIRE_EQ(dword ptr [told], 2)

    BEHAVIOUR(apf_t4_a_page_that_is_on_its_way_gets_no_second_token)
    ON(ENABLED | BY_INTERRUPT | SEND_ALWAYS)
    INTERRUPTS_IN
    mov dword ptr [leave_out], 1
    mov r10d, PAGE(8)
    sti
    nop
    TOUCH
    cli
    REQUIRE_EQ(dword ptr [told], 3)
    BRING_WHEN_HELD(8)
    sti
    nop
    TOUCH
    cli
    REQUIRE_EQ(eax, 8)
    REQUIRE_EQ(dword ptr [told], 3)
    mov eax, [last_token]
    REQUIRE_EQ(eax, [token])

    BEHAVIOUR(apf_t5_sixty_four_pages_are_told_of_and_no_more)
    mov r10d, PAGE(9)
1:  sti
    nop
    TOUCH
    cli
    add r10d, 4096
    cmp r10d, PAGE(73)
    jne 1b
    REQUIRE_EQ(dword ptr [told], 67)
    BRING_WHEN_HELD(73)
    sti
    nop
    TOUCH
    cli
    REQUIRE_EQ(eax, 73)
    REQUIRE_EQ(dword ptr [told], 67)
    mov eax, [came]
    add eax, 64
    mov [before], eax
    mov r11d, 9
1:  mov eax, r11d
    out 0xec, eax
    inc r11d
    cmp r11d, 73
    jne 1b
    sti
1:  mov eax, [came]
    cmp eax, [before]
    jne 1b
    cli

    BEHAVIOUR(apf_t6_the_next_page_waits_until_the_token_is_read_and_acknowledged)
    mov dword ptr [unread], 1
    mov r10d, PAGE(74)
    sti
    nop
    TOUCH
    cli
    mov r10d, PAGE(75)
    sti
    nop
    TOUCH
    cli
    REQUIRE_EQ(dword ptr [told], 69)
    mov eax, [came]
    mov [before], eax
    BRING(74)
    BRING(75)
    mov eax, [PAGE(74)] /* both have come */
    mov eax, [PAGE(75)]
    ONE_MORE_COMES
    mov dword ptr [data + 4], 0
    out 0xed, al /* the host looks */
    INTERRUPTS_IN
    mov eax, [came]
    REQUIRE_EQ(eax, [before])
    WRITE(ACKNOWLEDGE, 1)
    ONE_MORE_COMES
    mov dword ptr [data + 4], 0
    WRITE(ACKNOWLEDGE, 1)
    mov dword ptr [unread], 0

    BEHAVIOUR(apf_t7_nothing_comes_after_the_events_have_been_switched_off)
    mov r10d, PAGE(76)
    sti
    nop
    TOUCH
    cli
    REQUIRE_EQ(dword ptr [told], 70)
    WRITE(ENABLE, 0)
    BRING(76)
    mov eax, [PAGE(76)]
    REQUIRE_EQ(eax, 76)
    INTERRUPTS_IN
    mov eax, [came]
    REQUIRE_EQ(eax, [before])
    mov qword ptr [continue_at], 0
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
    cmp dword ptr [unread], 0
    jne 1f
    mov dword ptr [data + 4], 0
    WRITE(ACKNOWLEDGE, 1)
1:  pop rdx
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
leave_out: .long 0
unread: .long 0
work: .quad 0
