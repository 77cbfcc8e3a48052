/* The 8259s, the 8254 and the I/O APIC: edge and level, masks, priorities, end of interrupt. A word written to port 0x500
   moves a line: its number, and its level in bit 8 (tests/programs.rs). */
#include "guest.h"
#include "smp.h"

#define COUNT(vector) dword ptr [interrupt_counts + 4 * (vector)]
#define LINE(number, level) mov edx, 0x500; mov eax, (number) | (level) << 8; out dx, eax
#define WINDOW sti; nop; nop; nop; cli
#define OUTB(port, value) mov al, value; out port, al
/* Interrupts that the first 8259 lets through (2 is the way to the second one). */
#define ALLOW(lines) OUTB(0x21, 0xff & ~((lines) | 4))

#define IOAPIC 0xfec00000
#define LEVEL 0x8000
#define MASKED 0x10000
#define REMOTE_IRR 0x4000
/* Redirection entry of `pin`: to APIC ID 0. */
#define REDIRECT(pin, low) \
    mov ecx, IOAPIC; \
    mov dword ptr [rcx], 0x11 + 2 * (pin); mov dword ptr [rcx + 16], 0; \
    mov dword ptr [rcx], 0x10 + 2 * (pin); mov dword ptr [rcx + 16], low

main:
    call enable_apic
    mov ecx, APIC
    mov dword ptr [rcx + 0x350], 0x700 /* LINT0: the 8259s */
    mov qword ptr [on_interrupt], offset end_pic
    OUTB(0x20, 0x11)
    OUTB(0x21, 0x20)
    OUTB(0x21, 4)
    OUTB(0x21, 1)
    OUTB(0xa0, 0x11)
    OUTB(0xa1, 0x28)
    OUTB(0xa1, 2)
    OUTB(0xa1, 1)
    OUTB(0xa1, 0xff & ~(1 << 2))
    ALLOW(1 << 3 | 1 << 5)

    BEHAVIOUR(an_edge_interrupts_once_for_each_rise)
    /* Edge: once for each rise. */
    LINE(5, 1)
    WINDOW
    REQUIRE_EQ(COUNT(0x25), 1)
    LINE(5, 1)
    WINDOW
    REQUIRE_EQ(COUNT(0x25), 1)
    LINE(5, 0)
    LINE(5, 1)
    WINDOW
    REQUIRE_EQ(COUNT(0x25), 2)
    LINE(5, 0)
    BEHAVIOUR(a_masked_line_waits)
    /* Masked, it waits. */
    ALLOW(1 << 3)
    LINE(5, 1)
    WINDOW
    REQUIRE_EQ(COUNT(0x25), 2)
    ALLOW(1 << 3 | 1 << 5)
    WINDOW
    REQUIRE_EQ(COUNT(0x25), 3)
    LINE(5, 0)
    BEHAVIOUR(a_waiting_interrupt_wakes_hlt)
    /* IF clear: it waits too, and wakes HLT as soon as STI's shadow is over. */
    LINE(5, 1)
    sti
    hlt
    cli
    REQUIRE_EQ(COUNT(0x25), 4)
    LINE(5, 0)
    BEHAVIOUR(the_lower_line_comes_first)
    /* The lower number first. */
    mov dword ptr [order], 0
    LINE(5, 1)
    LINE(3, 1)
    WINDOW
    REQUIRE_EQ(dword ptr [order], 0x2325)
    LINE(5, 0)
    LINE(3, 0)
    BEHAVIOUR(a_line_in_service_holds_lower_ones_back)
    /* Until its end, 3 holds back 5; the in-service register shows it. */
    mov qword ptr [on_interrupt], offset nothing
    LINE(3, 1)
    WINDOW
    REQUIRE_EQ(COUNT(0x23), 2)
    OUTB(0x20, 0x0b)
    in al, 0x20
    REQUIRE_EQ(al, 8)
    LINE(5, 1)
    WINDOW
    REQUIRE_EQ(COUNT(0x25), 5)
    OUTB(0x20, 0x0a) /* the request register shows 5 */
    in al, 0x20
    test al, 1 << 5
    REQUIRE(jnz)
    OUTB(0x20, 0x20)
    WINDOW
    REQUIRE_EQ(COUNT(0x25), 6)
    OUTB(0x20, 0x20)
    LINE(3, 0)
    LINE(5, 0)
    mov qword ptr [on_interrupt], offset end_pic
    BEHAVIOUR(interrupts_of_the_second_8259)
    /* Through the second 8259. */
    LINE(10, 1)
    WINDOW
    REQUIRE_EQ(COUNT(0x2a), 1)
    LINE(10, 0)
    BEHAVIOUR(a_level_interrupts_until_its_line_is_low)
    /* Level: again after each end until the line is low. */
    mov edx, 0x4d0
    mov al, 1 << 5
    out dx, al
    mov dword ptr [rounds], 3
    mov qword ptr [on_interrupt], offset end_pic_level
    LINE(5, 1)
    WINDOW
    REQUIRE_EQ(COUNT(0x25), 9)
    WINDOW
    REQUIRE_EQ(COUNT(0x25), 9)

    BEHAVIOUR(counter_0_of_the_8254)
    /* The 8254's counter 0: again and again in mode 2, once in mode 0. */
    mov qword ptr [on_interrupt], offset end_pic
    OUTB(0x43, 0x34)
    OUTB(0x40, 0xa9)
    OUTB(0x40, 0x04)
    ALLOW(1)
1:  sti
    hlt
    cli
    cmp COUNT(0x20), 4
    jb 1b
    OUTB(0x43, 0x30)
    WINDOW
    mov ebx, COUNT(0x20)
    OUTB(0x40, 0xa9)
    OUTB(0x40, 0x04)
1:  sti
    hlt
    cli
    cmp COUNT(0x20), ebx
    je 1b
    inc ebx
    mov edi, 5000
    call wait_microseconds
    WINDOW
    REQUIRE_EQ(COUNT(0x20), ebx)
    OUTB(0x21, 0xff)
    OUTB(0xa1, 0xff)

    BEHAVIOUR(the_io_apic_begins_masked)
    /* The I/O APIC has 24 pins, all masked. */
    mov ecx, IOAPIC
    mov dword ptr [rcx], 1
    mov eax, [rcx + 16]
    shr eax, 16
    and eax, 0xff
    REQUIRE_EQ(eax, 23)
    mov dword ptr [rcx], 0x10 + 2 * 10
    test dword ptr [rcx + 16], MASKED
    REQUIRE(jnz)
    BEHAVIOUR(an_edge_at_the_io_apic)
    /* Edge. */
    mov qword ptr [on_interrupt], offset end_apic
    REDIRECT(10, 0x51)
    LINE(10, 1)
    WINDOW
    REQUIRE_EQ(COUNT(0x51), 1)
    LINE(10, 1)
    WINDOW
    REQUIRE_EQ(COUNT(0x51), 1)
    LINE(10, 0)
    LINE(10, 1)
    WINDOW
    REQUIRE_EQ(COUNT(0x51), 2)
    LINE(10, 0)
    REDIRECT(10, MASKED)
    BEHAVIOUR(a_level_at_the_io_apic_and_its_remote_irr)
    /* Level: remote IRR from delivery to EOI, again until the line is low. */
    mov qword ptr [on_interrupt], offset end_apic_level
    mov dword ptr [rounds], 3
    REDIRECT(11, 0x52 | LEVEL)
    LINE(11, 1)
    WINDOW
    REQUIRE_EQ(COUNT(0x52), 3)
    REQUIRE_EQ(dword ptr [seen_remote_irr], 3)
    mov ecx, IOAPIC
    test dword ptr [rcx + 16], REMOTE_IRR
    REQUIRE(jz)
    BEHAVIOUR(a_pin_unmasked_with_its_line_high_interrupts)
    /* Masked while the line is high: it comes when the mask goes. */
    REDIRECT(11, 0x52 | LEVEL | MASKED)
    mov dword ptr [rounds], 1
    LINE(11, 1)
    WINDOW
    REQUIRE_EQ(COUNT(0x52), 3)
    REDIRECT(11, 0x52 | LEVEL)
    WINDOW
    REQUIRE_EQ(COUNT(0x52), 4)
    BEHAVIOUR(the_task_priority_holds_its_class_back)
    /* The task priority holds back its class and those below. */
    mov qword ptr [on_interrupt], offset end_apic
    REDIRECT(10, 0x51)
    REDIRECT(12, 0x61)
    mov eax, 5
    mov cr8, rax
    mov dword ptr [order], 0
    LINE(10, 1)
    LINE(12, 1)
    WINDOW
    REQUIRE_EQ(dword ptr [order], 0x61)
    xor eax, eax
    mov cr8, rax
    WINDOW
    REQUIRE_EQ(dword ptr [order], 0x6151)
    LINE(12, 0)
    BEHAVIOUR(delivery_mode_nmi_ignores_if)
    /* Delivery mode NMI: with IF clear, at once. */
    REDIRECT(12, 0x400)
    mov qword ptr [continue_at], offset nmi
    LINE(12, 1)
    nop
    REQUIRE_EQ(dword ptr [nmis], 1)
    PASS

/* RAX: vector. */
note:
    shl dword ptr [order], 8
    or [order], eax
nothing:
    ret
end_pic:
    call note
    cmp eax, 0x28
    jb 1f
    OUTB(0xa0, 0x20)
1:  OUTB(0x20, 0x20)
    ret
lower:
    dec dword ptr [rounds]
    jnz 1f
    push rdx
    mov edx, 0x500
    out dx, eax
    pop rdx
1:  ret
end_pic_level:
    mov eax, 5
    call lower
    OUTB(0x20, 0x20)
    ret
end_apic:
    call note
    push rcx
    EOI
    pop rcx
    ret
end_apic_level:
    push rcx
    mov ecx, IOAPIC
    mov dword ptr [rcx], 0x10 + 2 * 11
    test dword ptr [rcx + 16], REMOTE_IRR
    jz 1f
    inc dword ptr [seen_remote_irr]
1:  mov eax, 11
    call lower
    EOI
    pop rcx
    ret
nmi:
    inc dword ptr [nmis]
    jmp return_from_exception

    .section .data
    .balign 8
order: .quad 0
rounds: .quad 0
nmis: .quad 0
seen_remote_irr: .quad 0
