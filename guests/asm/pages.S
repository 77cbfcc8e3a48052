/* Page-table bits: what each forbids, the error code it gives, and how Accessed and Dirty are set. */
#include "guest.h"

/* Sets the entry of scratch page 0 and drops its translation. */
#define ENTRY(bits) \
    mov rax, bits; \
    mov [SCRATCH_PTE(0)], rax; \
    invlpg [SCRATCH]

#ifdef QEMU /* whose error code lacks the present bit */
#define RESERVED 8
#else
#define RESERVED 9
#endif
#define ALL (SCRATCH + (P_ | W_ | U_))

main:
    mov rbp, SCRATCH
    BEHAVIOUR(pages_that_are_not_present)
    /* Not present: 0 for a read, 2 for a write, 0x10 for a fetch with NX on. CR2 is the address. */
    ENTRY(0)
    TRY
    mov al, [rbp + 0x123]
    FAULTS(PF, 0)
    REQUIRE_EQ(qword ptr [got_cr2], SCRATCH + 0x123)
    TRY
    mov [rbp + 4], al
    FAULTS(PF, 2)
    TRY
    call rbp
    FAULTS(PF, 0x10)
    REQUIRE_EQ(qword ptr [got_rip], SCRATCH)
#ifndef QEMU
    TRY
    lock add dword ptr [rbp], 1 /* a locked operation is a write */
    FAULTS(PF, 2)
#endif
    TRY
    cmp dword ptr [rbp], 1
    FAULTS(PF, 0)
    /* An access across two pages reports the page that is missing. */
    TRY
    mov rax, [rbp - 3]
    FAULTS(PF, 0)
    REQUIRE_EQ(qword ptr [got_cr2], SCRATCH)

    BEHAVIOUR(page_faults_at_cpl_3_have_the_user_bit)
    /* The same at CPL 3: with the user bit, and the fetch of the user's code. */
    TRY
    ENTER_USER(2)
    mov al, [rbp]
    FAULTS(PF, 4)
    TRY
    ENTER_USER(2)
    mov [rbp], al
    FAULTS(PF, 6)
    TRY
    ENTER_USER(2)
    jmp rbp
    FAULTS(PF, 0x14)

    BEHAVIOUR(read_only_pages_and_write_protect)
    /* Read-only: CR0.WP decides for the supervisor, not for the user. */
    ENTRY(SCRATCH + (P_ | U_))
    TRY
    mov [rbp], al
    FAULTS(PF, 3)
    TRY
    ENTER_USER(2)
    mov [rbp], al
    FAULTS(PF, 7)
    mov rax, cr0
    and rax, ~CR0_WP
    mov cr0, rax
    TRY
    mov [rbp], al
    PASSES
    TRY
    ENTER_USER(2)
    mov [rbp], al
    FAULTS(PF, 7)
    mov rax, cr0
    or rax, CR0_WP
    mov cr0, rax

    BEHAVIOUR(supervisor_pages_are_closed_to_the_user)
    /* A supervisor page at CPL 3. */
    ENTRY(SCRATCH + (P_ | W_))
    TRY
    ENTER_USER(2)
    mov al, [rbp]
    FAULTS(PF, 5)
    TRY
    mov al, [rbp]
    PASSES

    BEHAVIOUR(a_right_must_be_given_at_every_level)
    /* A right must be given at every level. */
    ENTRY(ALL)
    and dword ptr [pd + 3 * 8], ~W_
    invlpg [SCRATCH]
    TRY
    mov [rbp], al
    FAULTS(PF, 3)
    or dword ptr [pd + 3 * 8], W_
    and dword ptr [pd + 3 * 8], ~U_
    invlpg [SCRATCH]
    TRY
    ENTER_USER(2)
    mov al, [rbp]
    FAULTS(PF, 5)
    or dword ptr [pd + 3 * 8], U_
    invlpg [SCRATCH]

    BEHAVIOUR(execute_disable_forbids_fetches_alone)
    /* NX forbids the fetch only. */
    mov rax, 0x8000000000000000 + SCRATCH + (P_ | W_ | U_)
    mov [SCRATCH_PTE(0)], rax
    invlpg [SCRATCH]
    mov byte ptr [rbp], 0xc3 /* ret */
    TRY
    call rbp
    FAULTS(PF, 0x11)
    TRY
    ENTER_USER(2)
    jmp rbp
    FAULTS(PF, 0x15)
    ENTRY(ALL)
    TRY
    call rbp
    PASSES
    /* Without EFER.NXE the bit is reserved, and a fetch has no bit of its own in the error code. */
    mov ecx, EFER
    rdmsr
    and eax, ~EFER_NXE
    wrmsr
    mov rax, 0x8000000000000000 + SCRATCH + (P_ | W_ | U_)
    mov [SCRATCH_PTE(0)], rax
    invlpg [SCRATCH]
    TRY
    mov al, [rbp]
    FAULTS(PF, RESERVED)
    mov qword ptr [SCRATCH_PTE(0)], 0
    invlpg [SCRATCH]
    TRY
    call rbp
    FAULTS(PF, 0)
    mov ecx, EFER
    rdmsr
    or eax, EFER_NXE
    wrmsr

    BEHAVIOUR(reserved_bits_of_an_entry)
    /* A reserved bit: an address beyond the physical width. */
    mov rax, 0x0008000000000000 + SCRATCH + (P_ | W_ | U_)
    mov [SCRATCH_PTE(0)], rax
    invlpg [SCRATCH]
    TRY
    mov al, [rbp]
    FAULTS(PF, RESERVED)
    TRY
    mov [rbp], al
    FAULTS(PF, RESERVED + 2)

    BEHAVIOUR(accessed_and_dirty_are_set_by_use)
    /* Accessed with the first use, Dirty with the first write; a fault sets neither. */
    ENTRY(ALL)
    mov al, [rbp]
    REQUIRE_EQ(qword ptr [SCRATCH_PTE(0)], ALL + A_)
    mov [rbp], al
    REQUIRE_EQ(qword ptr [SCRATCH_PTE(0)], ALL + A_ + D_)
    ENTRY(ALL)
    mov [rbp], al
    REQUIRE_EQ(qword ptr [SCRATCH_PTE(0)], ALL + A_ + D_)
    ENTRY(ALL)
    mov byte ptr [rbp], 0xc3
    ENTRY(ALL)
    call rbp
    REQUIRE_EQ(qword ptr [SCRATCH_PTE(0)], ALL + A_)
    ENTRY(ALL + A_)
    mov al, [rbp]
    mov [rbp], al /* the translation is cached without D: it must be set all the same */
    REQUIRE_EQ(qword ptr [SCRATCH_PTE(0)], ALL + A_ + D_)
    ENTRY(SCRATCH + (P_ | U_))
    TRY
    mov [rbp], al
    FAULTS(PF, 3)
    test dword ptr [SCRATCH_PTE(0)], D_
    REQUIRE(jz)
    /* A compare-and-exchange that does not exchange writes all the same. */
    ENTRY(ALL)
    xor eax, eax
    mov ecx, [rbp]
    not ecx
    mov eax, ecx
    cmpxchg [rbp], ecx
    REQUIRE_EQ(qword ptr [SCRATCH_PTE(0)], ALL + A_ + D_)
    /* The upper levels are marked accessed, never dirty. */
    and dword ptr [pd + 3 * 8], ~A_
    ENTRY(ALL)
    mov [rbp], al
    mov eax, [pd + 3 * 8]
    and eax, A_ | D_
    REQUIRE_EQ(eax, A_)

    BEHAVIOUR(large_pages_have_accessed_dirty_and_reserved_bits)
    /* A large page: Accessed and Dirty in its entry; bits 20:13 are reserved. */
    mov qword ptr [pd + 4 * 8], 0x800000 + (P_ | W_ | U_ | PS_)
    invlpg [0x800000]
    mov [0x800000], al
    REQUIRE_EQ(qword ptr [pd + 4 * 8], 0x800000 + (P_ | W_ | U_ | PS_ | A_ | D_))
    mov qword ptr [pd + 4 * 8], 0x802000 + (P_ | W_ | U_ | PS_)
    invlpg [0x800000]
    TRY
    mov al, [0x800000]
    FAULTS(PF, RESERVED)
    mov qword ptr [pd + 4 * 8], 0x800000 + (P_ | W_ | U_ | PS_)
    invlpg [0x800000]

    BEHAVIOUR(cached_translations_are_dropped_when_asked)
    /* A cached translation stays until it is dropped: INVLPG, MOV CR3 (not for a global page), CR4.PGE. */
    ENTRY(ALL)
    mov dword ptr [0x601000], 0x1111
    mov dword ptr [rbp], 0x2222
    mov rax, 0x601000 + (P_ | W_ | U_)
    mov [SCRATCH_PTE(0)], rax
    mov rax, cr3
    mov cr3, rax
    REQUIRE_EQ(dword ptr [rbp], 0x1111)
    ENTRY(ALL)
    REQUIRE_EQ(dword ptr [rbp], 0x2222)
    mov rax, cr4
    or rax, CR4_PGE
    mov cr4, rax
    ENTRY(ALL + G_)
    REQUIRE_EQ(dword ptr [rbp], 0x2222)
    mov rax, 0x601000 + (P_ | W_ | U_ | G_)
    mov [SCRATCH_PTE(0)], rax
    mov rax, cr4
    mov rcx, rax
    and rcx, ~CR4_PGE
    mov cr4, rcx
    mov cr4, rax
    REQUIRE_EQ(dword ptr [rbp], 0x1111)

    BEHAVIOUR(an_entry_that_is_rewritten_is_walked_anew)
    /* A page table in a page that is itself written through a mapping: no stale walk. */
    ENTRY(ALL)
    mov ecx, 1000
1:  mov rax, 0x601000 + (P_ | W_ | U_)
    mov [SCRATCH_PTE(0)], rax
    invlpg [SCRATCH]
    REQUIRE_EQ(dword ptr [rbp], 0x1111)
    ENTRY(ALL)
    REQUIRE_EQ(dword ptr [rbp], 0x2222)
    dec ecx
    jnz 1b
    PASS
