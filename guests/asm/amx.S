/* AMX and IA32_XFD as a system that enables them meets them: the processor's own checks, its #NM, XSAVE's formats. */
#include "guest.h"

#define CR4_OSXSAVE (1 << 18)
#define XFD 0x1c4
#define XFD_ERR 0x1c5
#define TILEDATA (1 << 18)
#define TILES 0x602000 /* what is loaded */
#define STORED 0x603000 /* what is stored */
#define AREA 0x610000 /* an XSAVE area */
#define TILEDATA_AT 2816 /* in its standard format */

/* IA32_XFD or IA32_XFD_ERR becomes EAX. */
#define WRITE(msr, value) mov ecx, msr; mov eax, value; xor edx, edx; wrmsr
#define READS(msr, value) mov ecx, msr; rdmsr; REQUIRE_EQ(eax, value); REQUIRE_EQ(edx, 0)
/* XSETBV of the value and what comes of it. */
#define SET_XCR0(value) xor ecx, ecx; mov eax, value; xor edx, edx; xsetbv
/* CPUID leaf and subleaf. */
#define LEAF(leaf, subleaf) mov eax, leaf; mov ecx, subleaf; cpuid
/* #NM of the instruction, for IA32_XFD; the handler clears IA32_XFD_ERR. */
#define DISABLED(...) \
    TRY; __VA_ARGS__; FAULTS(NM, 0); \
    READS(XFD_ERR, TILEDATA); WRITE(XFD_ERR, 0)

main:
    LEAF(7, 0)
    mov rsi, offset text_amx
    bt edx, 24
    jnc skip

    BEHAVIOUR(amx_t1_cpuid_tells_of_tiles_and_of_the_sizes_that_xcr0_makes)
    mov rax, cr4
    or rax, CR4_OSXSAVE
    mov cr4, rax
    LEAF(0xd, 0)
    REQUIRE_EQ(ebx, 576)
    and eax, 0x60000
    REQUIRE_EQ(eax, 0x60000)
    LEAF(0xd, 1)
    bt eax, 4
    REQUIRE(jc)
    LEAF(0xd, 17)
    REQUIRE_EQ(eax, 64)
    REQUIRE_EQ(ebx, 2752)
    REQUIRE_EQ(ecx, 2)
    LEAF(0xd, 18)
    REQUIRE_EQ(eax, 8192)
    REQUIRE_EQ(ebx, TILEDATA_AT)
    REQUIRE_EQ(ecx, 6)
    LEAF(0x1d, 0)
    REQUIRE_EQ(eax, 1)
    LEAF(0x1d, 1)
    REQUIRE_EQ(eax, 0x04002000)
    REQUIRE_EQ(ebx, 0x00080040)
    REQUIRE_EQ(ecx, 16)
    LEAF(0x1e, 0)
    REQUIRE_EQ(ebx, 0x4010)

    BEHAVIOUR(amx_t12_tiles_are_undefined_before_xcr0_enables_them)
    TRY
    ldtilecfg [tile_config]
    FAULTS(UD, 0)
    TRY
    tilerelease
    FAULTS(UD, 0)

    BEHAVIOUR(amx_t2_xcr0_takes_both_tile_components_or_none)
    TRY
    SET_XCR0(0x20003)
    FAULTS(GP, 0)
    TRY
    SET_XCR0(0x40003)
    FAULTS(GP, 0)
    TRY
    SET_XCR0(0xe0003)
    FAULTS(GP, 0)
    xor ecx, ecx
    xgetbv
    REQUIRE_EQ(eax, 1)
    SET_XCR0(0x60003)
    LEAF(0xd, 0)
    REQUIRE_EQ(ebx, 11008)
    LEAF(0xd, 1)
    REQUIRE_EQ(ebx, 8832)

    BEHAVIOUR(amx_t3_xfd_is_zero_at_reset_and_takes_one_bit)
    READS(XFD, 0)
    READS(XFD_ERR, 0)
    TRY
    WRITE(XFD, 1 << 17)
    FAULTS(GP, 0)
    TRY
    WRITE(XFD, 1 << 19)
    FAULTS(GP, 0)
    TRY
    mov ecx, XFD
    xor eax, eax
    mov edx, 1 << 31
    wrmsr
    FAULTS(GP, 0)
    READS(XFD, 0)

    BEHAVIOUR(amx_t9_configurations_are_checked_before_anything_changes)
    ldtilecfg [tile_config]
    mov byte ptr [bad_config + 48], 17
    TRY
    ldtilecfg [bad_config]
    FAULTS(GP, 0)
    sttilecfg [STORED]
    mov rsi, STORED
    mov rdi, offset tile_config
    mov ecx, 8
    repe cmpsq
    REQUIRE(je)

    BEHAVIOUR(amx_t4_xfd_makes_the_use_of_tiles_fault)
    mov edx, 64
    mov r12, TILES
    WRITE(XFD, TILEDATA)
    mov edx, 64
    ldtilecfg [tile_config]
    sttilecfg [STORED]
    DISABLED(tilezero tmm1)
    DISABLED(tileloadd tmm0, [r12 + rdx])
    DISABLED(tileloaddt1 tmm0, [r12 + rdx])
    DISABLED(tilestored [r12 + rdx], tmm0)
    DISABLED(tdpbssd tmm1, tmm2, tmm3)
    DISABLED(tdpbsud tmm1, tmm2, tmm3)
    DISABLED(tdpbusd tmm1, tmm2, tmm3)
    DISABLED(tdpbuud tmm1, tmm2, tmm3)
    DISABLED(tdpbf16ps tmm1, tmm2, tmm3)
    tilerelease
    ldtilecfg [tile_config]
    READS(XFD_ERR, 0)

    BEHAVIOUR(amx_t5_xfd_err_is_sticky_and_a_task_switched_fault_leaves_it_alone)
    TRY
    tilezero tmm1
    FAULTS(NM, 0)
    mov rax, cr0
    or rax, CR0_TS
    mov cr0, rax
    TRY
    fld1
    FAULTS(NM, 0)
    clts
    READS(XFD_ERR, TILEDATA)
    WRITE(XFD_ERR, 0)
    mov rax, cr0
    or rax, CR0_TS
    mov cr0, rax
    TRY
    fld1
    FAULTS(NM, 0)
    clts
    READS(XFD_ERR, 0)
    WRITE(XFD, 0)

    BEHAVIOUR(amx_t10_a_load_that_faults_goes_on_where_it_stopped)
    mov ecx, 1024
    mov rdi, TILES
1:  mov [rdi], cx
    imul eax, ecx, 77
    mov [rdi], ax
    add rdi, 2
    loop 1b
    mov dword ptr [SCRATCH_PTE(3)], 0
    invlpg [TILES + 4096]
    mov r12, TILES + 4096 - 5 * 64
    mov edx, 64
    TRY
    tileloadd tmm0, [r12 + rdx]
    FAULTS(PF, 0)
    mov rax, [got_cr2]
    REQUIRE_EQ(rax, TILES + 4096)
    sttilecfg [STORED + 4096]
    REQUIRE_EQ(byte ptr [STORED + 4096 + 1], 5)
    mov dword ptr [SCRATCH_PTE(3)], 0x603000 + (P_ | W_)
    invlpg [TILES + 4096]
    tileloadd tmm0, [r12 + rdx]
    sttilecfg [STORED + 4096]
    REQUIRE_EQ(byte ptr [STORED + 4096 + 1], 0)

    BEHAVIOUR(amx_t8_live_tiles_outlast_xfd)
    mov r12, TILES
    mov edx, 64
    tileloadd tmm2, [r12 + rdx]
    WRITE(XFD, TILEDATA)
    mov ebp, 10000
1:  mov eax, ebp
    out 0x80, al
    mov ecx, 1
    xgetbv
    bt eax, 18
    REQUIRE(jc)
    dec ebp
    jnz 1b
    WRITE(XFD, 0)
    mov r13, STORED
    mov edx, 64
    tilestored [r13 + rdx], tmm2
    mov rsi, TILES
    mov rdi, STORED
    mov ecx, 128
    repe cmpsq
    REQUIRE(je)

    BEHAVIOUR(amx_t6_saves_leave_out_what_xfd_disables)
    WRITE(XFD, TILEDATA)
    call blank_area
    mov eax, 0x60000
    xor edx, edx
    xsavec64 [AREA]
    REQUIRE_EQ(dword ptr [AREA + 512], 0x20000)
    REQUIRE_EQ(dword ptr [AREA + 520], 0x60000)
    REQUIRE_EQ(dword ptr [AREA + 640], 0xaaaaaaaa)
    call blank_area
    mov eax, 0x60000
    xor edx, edx
    xsave64 [AREA]
    REQUIRE_EQ(dword ptr [AREA + 512], 0x20000)
    mov rdi, AREA + TILEDATA_AT
    mov ecx, 1024
    xor eax, eax
    repe scasq
    REQUIRE(je)
    WRITE(XFD, 0)
    call blank_area
    mov eax, 0x60000
    xor edx, edx
    xsave64 [AREA]
    REQUIRE_EQ(dword ptr [AREA + 512], 0x60000)
    mov rsi, TILES
    mov rdi, AREA + TILEDATA_AT + 2 * 1024
    mov ecx, 128
    repe cmpsq
    REQUIRE(je)

    BEHAVIOUR(amx_t7_restores_of_what_xfd_disables_fault)
    WRITE(XFD, TILEDATA)
    mov eax, 0x40000
    xor edx, edx
    TRY
    xrstor64 [AREA]
    FAULTS(NM, 0)
    READS(XFD_ERR, TILEDATA)
    WRITE(XFD_ERR, 0)
    mov dword ptr [AREA + 512], 0
    mov eax, 0x40000
    xor edx, edx
    xrstor64 [AREA]
    READS(XFD_ERR, 0)
    WRITE(XFD, 0)
    mov ecx, 1
    xgetbv
    bt eax, 18
    REQUIRE(jnc)

    BEHAVIOUR(amx_t11_products_of_small_matrices)
    /* Each byte of the first source is 3, of the second -2: 64 products in each sum. */
    tilezero tmm1
    mov rdi, TILES
    mov al, 3
    mov ecx, 1024
    rep stosb
    mov rdi, STORED
    mov al, -2
    mov ecx, 1024
    rep stosb
    mov r12, TILES
    mov r13, STORED
    mov edx, 64
    tileloadd tmm2, [r12 + rdx]
    tileloadd tmm3, [r13 + rdx]
    tdpbssd tmm1, tmm2, tmm3
    tdpbsud tmm1, tmm2, tmm3
    tdpbusd tmm1, tmm3, tmm2
    tdpbuud tmm1, tmm2, tmm3
    tilestored [r12 + rdx], tmm1
    /* 64 * 3 * (-2 + 254 + 254 + 254) */
    mov eax, 64 * 3 * 760
    mov rdi, TILES
    mov ecx, 256
    repe scasd
    REQUIRE(je)
    /* BF16: 1.5 * -2.0, 32 times, twice. */
    tilezero tmm1
    mov rdi, TILES
    mov ax, 0x3fc0
    mov ecx, 512
    rep stosw
    mov rdi, STORED
    mov ax, 0xc000
    mov ecx, 512
    rep stosw
    tileloadd tmm2, [r12 + rdx]
    tileloadd tmm3, [r13 + rdx]
    tdpbf16ps tmm1, tmm2, tmm3
    tdpbf16ps tmm1, tmm2, tmm3
    tilestored [r12 + rdx], tmm1
    mov eax, 0xc3400000 /* -192 */
    mov rdi, TILES
    mov ecx, 256
    repe scasd
    REQUIRE(je)
    tilerelease
    PASS

blank_area:
    mov rdi, AREA
    mov eax, 0xaaaaaaaa
    mov ecx, 11008 / 4
    rep stosd
    mov rdi, AREA + 512
    xor eax, eax
    mov ecx, 16
    rep stosd
    ret

    .section .data
text_amx: .asciz "AMX"
    .balign 64
/* Palette 1, eight tiles of sixteen rows of 64 bytes. */
tile_config:
    .byte 1, 0
    .fill 14, 1, 0
    .fill 8, 2, 64
    .fill 16, 1, 0
    .fill 8, 1, 16
    .fill 8, 1, 0
bad_config:
    .byte 1, 0
    .fill 14, 1, 0
    .fill 8, 2, 64
    .fill 16, 1, 0
    .fill 8, 1, 16
    .fill 8, 1, 0
