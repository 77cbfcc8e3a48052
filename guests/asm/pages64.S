/* Long mode's larger things: 1 GiB pages, PCIDs and INVPCID, five-level paging. Each part runs if CPUID offers it. */
#include "guest.h"

#define CR4_LA57 (1 << 12)
#define CR4_PCIDE (1 << 17)
#define GIB 0x40000000
#define ALL (P_ | W_ | U_)
#define HEADER 0x100000
#define MAGIC 0x1badb002
/* Points the entry of scratch page 0 elsewhere, and drops nothing. */
#define MAP(address) mov rax, (address) + ALL; mov [SCRATCH_PTE(0)], rax
#define INVPCID(type) mov eax, type; invpcid rax, [descriptor]
#define CR3_SET(value) mov rax, value; mov cr3, rax

main:
    BEHAVIOUR(pages_of_1_gib)
    /* 1 GiB: the second one of linear addresses becomes the first one of physical addresses. */
    mov eax, 0x80000001
    cpuid
    bt edx, 26
    mov rax, ALL | PS_
    mov [pdpt + 8], rax
    mov rbx, cr3
    mov cr3, rbx
    jnc no_gib
    cmp dword ptr [GIB + HEADER], MAGIC
    REQUIRE(je)
    REQUIRE_EQ(dword ptr [pdpt + 8], ALL | PS_ | A_)
    mov [GIB + SCRATCH], eax
    REQUIRE_EQ(dword ptr [pdpt + 8], ALL | PS_ | A_ | D_)
    mov dword ptr [pdpt + 8], ALL | PS_ | 1 << 13 /* bits 29 to 13 are reserved */
    mov cr3, rbx
    TRY
    mov eax, [GIB]
    FAULTS(PF, 9)
    mov dword ptr [pdpt + 8], P_ | U_ | PS_
    mov cr3, rbx
    TRY
    mov [GIB + SCRATCH], eax
    FAULTS(PF, 3)
    jmp 1f
no_gib: /* where the bit is reserved itself */
    TRY
    mov eax, [GIB]
    FAULTS(PF, 9)
1:  mov rax, offset pd + 4096 + ALL
    mov [pdpt + 8], rax
    mov cr3, rbx
    mov dword ptr [SCRATCH], 0x2222
    mov dword ptr [SCRATCH + 0x1000], 0x1111

    /* PCIDs. */
    mov eax, 1
    cpuid
    bt ecx, 17
    jnc no_pcid
    BEHAVIOUR(process_context_identifiers_need_a_clean_cr3)
    /* Bits 11 to 0 of CR3 must be zero when they become one. */
    mov rbx, cr3
    lea rax, [rbx + 8]
    mov cr3, rax
    mov rax, cr4
    or rax, CR4_PCIDE
    TRY
    mov cr4, rax
    FAULTS(GP, 0)
    mov cr3, rbx
    mov cr4, rax
    BEHAVIOUR(translations_belong_to_their_pcid)
    /* A translation of one PCID is not another's; loading CR3 with bit 63 clear drops the PCID's own. */
    lea r8, [rbx + 1]
    lea r9, [rbx + 2]
    mov cr3, r8
    REQUIRE_EQ(dword ptr [SCRATCH], 0x2222)
    MAP(SCRATCH + 0x1000)
    mov cr3, r9
    REQUIRE_EQ(dword ptr [SCRATCH], 0x1111)
    mov cr3, r8
    REQUIRE_EQ(dword ptr [SCRATCH], 0x1111)
    bts r9, 63
    mov cr3, r9 /* bit 63 is a request: it is not stored */
    mov rax, cr3
    btr r9, 63
    REQUIRE_EQ(rax, r9)
    REQUIRE_EQ(dword ptr [SCRATCH], 0x1111)
    BEHAVIOUR(cr3_refuses_bits_beyond_the_physical_width)
    /* Bits beyond the physical width are reserved. */
    mov rax, r8
    bts rax, 62
    TRY
    mov cr3, rax
    FAULTS(GP, 0)
    BEHAVIOUR(paging_cannot_be_left_with_pcids_on)
    /* Paging cannot be left with PCIDs on. */
    mov rax, cr0
    btr rax, 31
    TRY
    mov cr0, rax
    FAULTS(GP, 0)
    /* INVPCID drops an address, a PCID, everything, everything that is not global. */
    mov eax, 7
    xor ecx, ecx
    cpuid
    bt ebx, 10
    jnc no_invpcid
    BEHAVIOUR(invpcid_drops_what_it_names)
    mov r15d, 0
1:  MAP(SCRATCH)
    mov qword ptr [descriptor], 2
    mov qword ptr [descriptor + 8], SCRATCH
    mov eax, r15d
    invpcid rax, [descriptor]
    REQUIRE_EQ(dword ptr [SCRATCH], 0x2222)
    MAP(SCRATCH + 0x1000)
    mov eax, r15d
    invpcid rax, [descriptor]
    REQUIRE_EQ(dword ptr [SCRATCH], 0x1111)
    inc r15d
    cmp r15d, 1 /* types 1 to 3 ignore or forbid an address */
    jne 2f
2:  cmp r15d, 4
    jb 1b
    TRY
    INVPCID(4)
    FAULTS(GP, 0)
    mov qword ptr [descriptor], 0x1000
    TRY
    INVPCID(0)
    FAULTS(GP, 0)
    mov qword ptr [descriptor], 2
    mov rax, 1 << 62 /* canonical for no processor: how many levels are in use does not count here */
    mov [descriptor + 8], rax
    TRY
    INVPCID(0)
    FAULTS(GP, 0)
    TRY
    ENTER_USER(2)
    INVPCID(2)
    FAULTS(GP, 0)
no_invpcid:
    mov rax, cr3
    and rax, ~0xfff
    mov cr3, rax
    mov rax, cr4
    and rax, ~CR4_PCIDE
    mov cr4, rax
no_pcid:
    MAP(SCRATCH)
    mov rax, cr3
    mov cr3, rax
    REQUIRE_EQ(dword ptr [SCRATCH], 0x2222)

    BEHAVIOUR(invlpg_drops_global_pages)
    /* Global pages outlive a CR3 load at most, never INVLPG. */
    mov rax, cr4
    or rax, CR4_PGE
    mov cr4, rax
    mov ecx, 100
1:  mov qword ptr [SCRATCH_PTE(0)], SCRATCH + 0x1000 + (ALL | G_)
    invlpg [SCRATCH]
    REQUIRE_EQ(dword ptr [SCRATCH], 0x1111)
    mov qword ptr [SCRATCH_PTE(0)], SCRATCH + (ALL | G_)
    invlpg [SCRATCH]
    REQUIRE_EQ(dword ptr [SCRATCH], 0x2222)
    loop 1b

    /* Five levels: turned on with paging off alone. */
    mov eax, 7
    xor ecx, ecx
    cpuid
    bt ecx, 16
    jnc no_la57
    BEHAVIOUR(five_levels_are_turned_on_with_paging_off)
    mov rax, cr4
    or rax, CR4_LA57
    TRY
    mov cr4, rax
    FAULTS(GP, 0)
    mov rax, offset pml4 + ALL
    mov [pml5], rax
    mov [pml5 + 8], rax /* linear 1 << 48 is linear 0 */
    mov [pml5 + 511 * 8], rax
    mov dword ptr [next_cr3], offset pml5
    mov dword ptr [next_la57], CR4_LA57
    call change_levels
    mov rax, cr4
    test eax, CR4_LA57
    REQUIRE(jnz)
    mov rax, 1 << 48
    cmp dword ptr [rax + HEADER], MAGIC
    REQUIRE(je)
    mov rax, 0xffff000000000000
    cmp dword ptr [rax + HEADER], MAGIC
    REQUIRE(je)
    test dword ptr [pml5 + 8], A_
    REQUIRE(jnz)
    mov rax, 2 << 48 /* canonical, but not mapped */
    TRY
    mov ecx, [rax]
    FAULTS(PF, 0)
    mov rax, 2 << 48
    REQUIRE_EQ([got_cr2], rax)
    mov rax, 1 << 56 /* not canonical */
    TRY
    mov ecx, [rax]
    FAULTS(GP, 0)
    /* A page of 512 GiB or more there is not: PS is reserved. */
    mov rax, ALL | PS_
    mov [pml5 + 8], rax
    mov rax, cr3
    mov cr3, rax
    mov rax, 1 << 48
    TRY
    mov ecx, [rax]
    FAULTS(PF, 9)
    mov rax, cr4
    and rax, ~CR4_LA57
    TRY
    mov cr4, rax
    FAULTS(GP, 0)
    mov dword ptr [next_cr3], offset pml4
    mov dword ptr [next_la57], 0
    call change_levels
    mov rax, 1 << 48
    TRY
    mov ecx, [rax]
    FAULTS(GP, 0)
no_la57:
    PASS

/* Out of long mode and back into it with CR3 and CR4.LA57 as `next_cr3` and `next_la57` say. */
change_levels:
    mov eax, KERNEL_DS /* IRET to CPL 3 has emptied DS, which 64-bit code does not mind */
    mov ds, eax
    push CODE32_CS
    push offset 1f
    rex.w lret
    .code32
1:  mov eax, cr0
    and eax, ~CR0_PG
    mov cr0, eax
    mov eax, cr4
    and eax, ~CR4_LA57
    or eax, [next_la57]
    mov cr4, eax
    mov eax, [next_cr3]
    mov cr3, eax
    mov eax, cr0
    or eax, CR0_PG
    mov cr0, eax
    jmp KERNEL_CS:offset 1f
    .code64
1:  ret

    .section .data
    .balign 16
descriptor: .quad 0, 0
next_cr3: .quad 0
next_la57: .quad 0
    .section .bss
    .balign 4096
pml5: .skip 4096
    .section .text
