/* Paging of 32-bit protected mode: 4 KiB and 4 MiB pages without PAE; then PAE with its four entries that CR3's load
   brings into the processor, 2 MiB pages and the execute-disable bit. */
#include "mode32.h"

#define WINDOW 0x40000000 /* linear addresses by 4 KiB pages, from SCRATCH on */
#define LARGE 0x80000000  /* a large page, of physical addresses from 4 MiB on */
#define ALL (P_ | W_ | U_)
#define PTE dword ptr [scratch_pt]
#define PDE(linear) dword ptr [page_directory + ((linear) >> 22) * 4]
#define ENTRY(bits) mov PTE, bits; invlpg [WINDOW]
#define SET_PDE(linear, value) mov PDE(linear), value; mov eax, cr3; mov cr3, eax
#define FAULT_AT(address) cmp dword ptr [got_cr2], address; REQUIRE32(je)

begin32:
    /* The first 4 MiB, the program, by 4 KiB pages; SCRATCH's 4 MiB by a large page; and the window. */
    mov edi, offset low_table
    mov eax, ALL
    mov ecx, 1024
    cld
1:  stosd
    add eax, 4096
    loop 1b
    mov edi, offset page_directory
    mov ecx, 1024
    xor eax, eax
    rep stosd
    mov edi, offset scratch_pt
    mov ecx, 1024
    rep stosd
    mov eax, offset low_table + ALL
    mov [page_directory], eax
    mov dword ptr [page_directory + 4], 0x400000 + (ALL | PS_)
    mov eax, offset scratch_pt + ALL
    mov PDE(WINDOW), eax
    mov PTE, SCRATCH + ALL
    mov eax, CR4_PSE
    mov cr4, eax
    mov eax, offset page_directory
    mov cr3, eax
    mov eax, cr0
    or eax, CR0_PG | CR0_WP
    mov cr0, eax

    mov dword ptr [SCRATCH], 0x600df00d
    EQUAL(dword ptr [WINDOW], 0x600df00d)
    BEHAVIOUR(error_codes_without_execute_disable)
    /* Error codes; a fetch has no bit of its own. */
    ENTRY(0)
    TRY32
    mov al, [WINDOW + 0x123]
    FAULTS32(PF, 0)
    FAULT_AT(WINDOW + 0x123)
    TRY32
    mov [WINDOW], al
    FAULTS32(PF, 2)
    TRY32
    mov eax, WINDOW
    jmp eax
    FAULTS32_AT(PF, 0, WINDOW)
    TRY32
    ENTER_USER32(2)
    mov [WINDOW], al
    FAULTS32(PF, 6)
    TRY32
    ENTER_USER32(2)
    mov eax, WINDOW
    jmp eax
    FAULTS32(PF, 4)
    TRY32
    mov eax, [0xfffffffe] /* across the end of the address space: the first page is missing */
    FAULTS32(PF, 0)
    FAULT_AT(0xfffffffe)
    ENTRY(SCRATCH + (P_ | U_))
    TRY32
    mov [WINDOW], al
    FAULTS32(PF, 3)
    mov eax, cr0
    and eax, ~CR0_WP
    mov cr0, eax
    TRY32
    mov [WINDOW], al
    PASSES32
    mov eax, cr0
    or eax, CR0_WP
    mov cr0, eax
    TRY32
    ENTER_USER32(2)
    mov [WINDOW], al
    FAULTS32(PF, 7)
    ENTRY(SCRATCH + (P_ | W_))
    TRY32
    ENTER_USER32(2)
    mov al, [WINDOW]
    FAULTS32(PF, 5)
    BEHAVIOUR(accessed_and_dirty_of_32_bit_entries)
    /* Accessed and Dirty. */
    ENTRY(SCRATCH + ALL)
    and PDE(WINDOW), ~A_
    mov al, [WINDOW]
    EQUAL(PTE, SCRATCH + ALL + A_)
    mov [WINDOW], al
    EQUAL(PTE, SCRATCH + ALL + A_ + D_)
    mov eax, PDE(WINDOW)
    and eax, A_ | D_
    EQUAL(eax, A_)

    BEHAVIOUR(pages_of_4_mib)
    /* 4 MiB pages: their own A and D, bit 21 reserved. */
    SET_PDE(LARGE, 0x400000 + (ALL | PS_))
    mov eax, [LARGE + 0x200000]
    EQUAL(PDE(LARGE), 0x400000 + (ALL | PS_ | A_))
    mov dword ptr [LARGE + 0x200000], 0x1234
    EQUAL(PDE(LARGE), 0x400000 + (ALL | PS_ | A_ | D_))
    EQUAL(dword ptr [SCRATCH], 0x1234)
    SET_PDE(LARGE, 0x600000 + (ALL | PS_))
    TRY32
    mov eax, [LARGE]
    FAULTS32(PF, 9)
    SET_PDE(LARGE, 0x400000 + (P_ | U_ | PS_))
    TRY32
    mov [LARGE], eax
    FAULTS32(PF, 3)
    BEHAVIOUR(the_page_size_bit_needs_cr4_pse)
    /* Without CR4.PSE the bit means nothing. */
    or PDE(WINDOW), PS_
    mov eax, 0
    mov cr4, eax
    EQUAL(dword ptr [WINDOW], 0x1234)
    and PDE(WINDOW), ~PS_

    BEHAVIOUR(pae_refuses_reserved_bits_of_its_four_entries)
    /* PAE. Reserved bits in a PDPTE are #GP when CR0.PG loads them, and when CR3 does. */
    mov eax, cr0
    and eax, ~CR0_PG
    mov cr0, eax
    call build_pae
    mov eax, CR4_PAE
    mov cr4, eax
    mov eax, offset pdptes
    mov cr3, eax
    or dword ptr [pdptes + 24], W_
    TRY32
    mov eax, cr0
    or eax, CR0_PG
    mov cr0, eax
    FAULTS32(GP, 0)
    mov eax, cr0
    test eax, eax
    REQUIRE32(jns)
    and dword ptr [pdptes + 24], ~W_
    or eax, CR0_PG
    mov cr0, eax
    or dword ptr [pdptes + 24], U_
    mov eax, cr3
    TRY32
    mov cr3, eax
    FAULTS32(GP, 0)
    and dword ptr [pdptes + 24], ~U_
    /* One that is not present may hold anything. */
    mov dword ptr [pdptes + 24], 0xfffffffe
    mov cr3, eax
    TRY32
    mov al, [0xc0000000]
    FAULTS32(PF, 0)
    EQUAL(dword ptr [WINDOW], 0x1234)
    BEHAVIOUR(pae_keeps_its_four_entries_until_cr3_is_loaded)
    /* The processor holds the four entries: memory's count from the next load of CR3 on. */
    mov dword ptr [pdptes + 8], 0
    invlpg [WINDOW]
    EQUAL(dword ptr [WINDOW], 0x1234)
    mov eax, cr3
    mov cr3, eax
    TRY32
    mov eax, [WINDOW]
    FAULTS32(PF, 0)
    mov eax, offset pae_window + P_
    mov [pdptes + 8], eax
    mov eax, cr3
    mov cr3, eax
    EQUAL(dword ptr [WINDOW], 0x1234)
    BEHAVIOUR(pae_pages_of_2_mib)
    /* 2 MiB pages. */
    mov dword ptr [pae_window + 8], 0x600000 + (ALL | PS_)
    mov [WINDOW + 0x200000], eax
    EQUAL(dword ptr [pae_window + 8], 0x600000 + (ALL | PS_ | A_ | D_))
    mov dword ptr [pae_window + 8], 0x602000 + (ALL | PS_)
    invlpg [WINDOW + 0x200000]
    TRY32
    mov eax, [WINDOW + 0x200000]
    FAULTS32(PF, 9)
    BEHAVIOUR(pae_execute_disable)
    /* Bit 62 is reserved, bit 63 is until EFER.NXE makes it forbid fetches. */
    mov byte ptr [WINDOW], 0xc3
    mov dword ptr [scratch_pt + 4], 0x40000000
    invlpg [WINDOW]
    TRY32
    mov al, [WINDOW]
    FAULTS32(PF, 9)
    mov dword ptr [scratch_pt + 4], 0x80000000
    invlpg [WINDOW]
    TRY32
    mov al, [WINDOW]
    FAULTS32(PF, 9)
    mov ecx, EFER
    rdmsr
    or eax, EFER_NXE
    wrmsr
    TRY32
    mov al, [WINDOW]
    PASSES32
    mov eax, WINDOW
    TRY32
    call eax
    FAULTS32_AT(PF, 0x11, WINDOW)
    mov dword ptr [scratch_pt + 4], 0
    invlpg [WINDOW]
    mov eax, WINDOW
    TRY32
    call eax
    PASSES32
    PASS32

/* Directories for the first GiB (8 MiB of it, by large pages) and for the window. */
build_pae:
    mov edi, offset pdptes
    mov ecx, (pae_end - pdptes) / 4
    xor eax, eax
    cld
    rep stosd
    mov edi, offset scratch_pt
    mov ecx, 1024
    rep stosd
    mov eax, offset pae_low + P_
    mov [pdptes], eax
    mov eax, offset pae_window + P_
    mov [pdptes + 8], eax
    mov eax, offset pae_low + P_
    mov [pdptes + 24], eax
    mov dword ptr [pae_low], ALL | PS_
    mov dword ptr [pae_low + 8], 0x200000 + (ALL | PS_)
    mov dword ptr [pae_low + 16], 0x400000 + (ALL | PS_)
    mov dword ptr [pae_low + 24], 0x600000 + (ALL | PS_)
    mov eax, offset scratch_pt + ALL
    mov [pae_window], eax
    mov dword ptr [scratch_pt], SCRATCH + ALL
    ret

    .section .bss
    .balign 4096
page_directory: .skip 4096
low_table: .skip 4096
pdptes: .skip 4096
pae_low: .skip 4096
pae_window: .skip 4096
pae_end:
    .section .text
