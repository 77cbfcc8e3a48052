/* An event window that never opens (CVE-2015-8104): a data breakpoint on the interrupt stack that #DB uses, so that each
   delivery sets off the next. No instruction gets done until the machine's monitor disarms the breakpoint; the handler then
   runs for the trap that was being delivered. The machine sends an NMI and an interrupt (vector 0x40) while it loops. */
#include "guest.h"
#include "smp.h"

main:
    call enable_apic
    /* LINT0 masked: firmware may have left the PIT's tick on, which would come in before the loop. */
    mov dword ptr [rcx + APIC_LVT_LINT0], 0x10000
    mov qword ptr [continue_at], offset handler
    mov qword ptr [on_interrupt], offset interrupt
    mov byte ptr [idt + DB * 16 + 4], 1
    mov rax, offset ist1_stack_top - 8
    mov rbx, rax
    mov dr0, rax
    mov eax, 0x402 | 1 << 16 | 2 << 18 /* 8 bytes, written */
    mov dr7, rax
    sti
    BEHAVIOUR(debug_traps_for_ever)
    mov [rbx], rax
    /* The last trap's return address is the handler's own beginning: it goes back to where the breakpoint was met. */
after:
    BEHAVIOUR(what_had_to_wait_comes_once_the_window_opens)
    mov ecx, 100000000
1:  cmp dword ptr [nmis], 1
    jne 2f
    cmp dword ptr [irqs], 1
    je 3f
2:  dec ecx
    jnz 1b
3:  REQUIRE_EQ(dword ptr [nmis], 1)
    REQUIRE_EQ(dword ptr [irqs], 1)
    REQUIRE_EQ(dword ptr [traps], 1)
    ret

handler:
    cmp qword ptr [got_vector], 2
    je 1f
    REQUIRE_EQ(qword ptr [got_vector], DB)
    inc dword ptr [traps]
    mov rax, dr6
    and eax, 0xf
    REQUIRE_EQ(eax, 1)
    /* The frame is the last of many in the same place: where the handler begins. */
    mov rax, offset stubs + DB * 16
    REQUIRE_EQ([got_rip], rax)
    REQUIRE_EQ(qword ptr [got_cs], KERNEL_CS)
    mov rsp, offset boot_stack_top - 8
    sti
    jmp after
1:  inc dword ptr [nmis]
    jmp return_from_exception

interrupt:
    inc dword ptr [irqs]
    EOI
    ret

    .section .data
    .balign 16
nmis: .long 0
irqs: .long 0
traps: .long 0
    .section .text
