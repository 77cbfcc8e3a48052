/* SMEP, SMAP, UMIP and protection keys: supervisor and user pages beyond the page-table bits. */
#include "guest.h"

/* CPUID leaf 7: skips the section unless the bit is there. */
#define NEEDS(register, bit, label) \
    mov eax, 7; xor ecx, ecx; cpuid; bt register, bit; jnc label

#define SUPERVISOR_PAGE 0x601000

main:
    mov qword ptr [SCRATCH_PTE(1)], SUPERVISOR_PAGE + (P_ | W_)
    invlpg [SUPERVISOR_PAGE]
    mov rbp, SCRATCH
    mov byte ptr [rbp], 0xc3
    mov byte ptr [SUPERVISOR_PAGE], 0xc3

    NEEDS(ebx, 7, no_smep)
    BEHAVIOUR(smep_forbids_fetches_from_user_pages)
    /* SMEP: CPL 0 must not run user pages. The program itself lies in them: so first make those supervisor's. */
    and dword ptr [pd], ~U_
    mov rax, cr3
    mov cr3, rax
    TRY
    call rbp
    PASSES
    mov rax, cr4
    or rax, CR4_SMEP
    mov cr4, rax
    TRY
    call rbp
    FAULTS(PF, 0x11)
    mov ebx, SUPERVISOR_PAGE
    TRY
    call rbx
    PASSES
    mov rax, cr4
    and rax, ~CR4_SMEP
    mov cr4, rax
    or dword ptr [pd], U_
    mov rax, cr3
    mov cr3, rax
no_smep:

    NEEDS(ebx, 20, no_smap)
    BEHAVIOUR(smap_forbids_accesses_to_user_pages)
    /* SMAP: CPL 0 must not touch user pages unless AC is set; implicit accesses never may. */
    and dword ptr [pd], ~U_
    mov rax, cr3
    mov cr3, rax
    mov rax, cr4
    or rax, CR4_SMAP
    mov cr4, rax
    TRY
    mov al, [rbp]
    FAULTS(PF, 1)
    TRY
    mov [rbp], al
    FAULTS(PF, 3)
    stac
    TRY
    mov [rbp], al
    PASSES
    clac
    TRY
    mov al, [rbp]
    FAULTS(PF, 1)
#ifndef QEMU /* which takes AC for implicit accesses too */
    /* A descriptor table in a user page: an implicit access, AC or not. */
    mov rax, 0x0000820000000000 + (SCRATCH << 16) + 0xfff /* an LDT there */
    mov [gdt + SPARE_SEL], rax
    mov qword ptr [gdt + SPARE_SEL + 8], 0
    mov eax, SPARE_SEL
    lldt ax
    stac
    TRY
    mov eax, 4
    mov es, eax
    FAULTS(PF, 1)
    xor eax, eax
    lldt ax
#endif
    clac
    mov rax, cr4
    and rax, ~CR4_SMAP
    mov cr4, rax
    or dword ptr [pd], U_
    mov rax, cr3
    mov cr3, rax
    /* STAC and CLAC are for CPL 0 alone. */
    TRY
    ENTER_USER(2)
    stac
    FAULTS(UD, 0)
no_smap:

    NEEDS(ecx, 2, no_umip)
    BEHAVIOUR(umip_forbids_reading_the_tables_at_cpl_3)
    TRY
    ENTER_USER(2)
    sgdt [user_stack_top - 32]
    sidt [user_stack_top - 32]
    sldt eax
    str eax
    smsw eax
    ud2
    FAULTS(UD, 0)
    mov rax, cr4
    or rax, CR4_UMIP
    mov cr4, rax
    .irp instruction, "sgdt [user_stack_top - 32]", "sidt [user_stack_top - 32]", "sldt eax", "str eax", "smsw eax"
    TRY
    ENTER_USER(2)
    \instruction
    FAULTS(GP, 0)
    .endr
    smsw eax
    mov rax, cr4
    and rax, ~CR4_UMIP
    mov cr4, rax
no_umip:

    NEEDS(ecx, 3, no_pku)
    BEHAVIOUR(protection_keys_limit_accesses_to_user_pages)
    mov rax, cr4
    or rax, CR4_PKE
    mov cr4, rax
    mov eax, 7
    xor ecx, ecx
    cpuid
    bt ecx, 4 /* OSPKE follows CR4.PKE */
    REQUIRE(jc)
    mov rax, 0x2800000000000000 + SCRATCH + (P_ | W_ | U_) /* key 5 */
    mov [SCRATCH_PTE(0)], rax
    invlpg [SCRATCH]
    xor ecx, ecx
    xor edx, edx
    mov eax, 2 << 10 /* key 5: write disable */
    wrpkru
    mov al, [rbp]
    TRY
    mov [rbp], al /* CR0.WP is set: the supervisor heeds it in user pages */
    FAULTS(PF, 0x23)
    TRY
    ENTER_USER(2)
    mov [rbp], al
    FAULTS(PF, 0x27)
    mov rax, cr0
    and rax, ~CR0_WP
    mov cr0, rax
    TRY
    mov [rbp], al
    PASSES
    mov rax, cr0
    or rax, CR0_WP
    mov cr0, rax
    xor ecx, ecx
    xor edx, edx
    mov eax, 1 << 10 /* access disable */
    wrpkru
    TRY
    mov al, [rbp]
    FAULTS(PF, 0x21)
    TRY
    ENTER_USER(2)
    mov al, [rbp]
    FAULTS(PF, 0x25)
    xor ecx, ecx
    rdpkru
    REQUIRE_EQ(eax, 1 << 10)
    TRY
    mov ecx, 1
    rdpkru
    FAULTS(GP, 0)
    /* A fetch heeds no key. */
    xor ecx, ecx
    xor edx, edx
    xor eax, eax
    wrpkru
    mov byte ptr [rbp], 0xc3
    mov eax, 3 << 10
    wrpkru
    TRY
    call rbp
    PASSES
    xor eax, eax
    wrpkru
    mov rax, cr4
    and rax, ~CR4_PKE
    mov cr4, rax
    TRY
    xor ecx, ecx
    rdpkru
    FAULTS(UD, 0)
no_pku:
    PASS
