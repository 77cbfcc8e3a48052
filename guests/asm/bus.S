/* Ports and memory-mapped registers in every size. The machine's side (tests/devices.rs) keeps a log, and the two lists
   there follow this text line by line. The port answers its n-th read with 0x40302010 + n. */
#include "guest.h"

#define REGISTERS 0xd0000000
#define MISSING (SCRATCH + 0x1000)

main:
    cld
    mov edx, 0x500
    mov eax, 0x12345678
    out dx, al
    in al, dx
    REQUIRE_EQ(eax, 0x12345611)
    mov eax, 0x12345678
    out dx, ax
    in ax, dx
    REQUIRE_EQ(eax, 0x12342012)
    mov rax, 0xffffffff12345678
    out dx, eax
    in eax, dx
    mov ecx, 0x40302013
    REQUIRE_EQ(rax, rcx)

    mov rax, 0x8877665544332211
    mov [SCRATCH], rax
    mov esi, SCRATCH
    mov ecx, 3
    rep outsb
    REQUIRE_EQ(rsi, SCRATCH + 3)
    mov esi, SCRATCH
    mov ecx, 2
    rep outsw
    mov esi, SCRATCH
    mov ecx, 2
    rep outsd
    REQUIRE_EQ(rsi, SCRATCH + 8)
    REQUIRE_EQ(rcx, 0)
    std
    mov esi, SCRATCH + 2
    mov ecx, 3
    rep outsb
    cld
    REQUIRE_EQ(rsi, SCRATCH - 1)

    mov edi, SCRATCH + 16
    mov ecx, 3
    rep insb
    REQUIRE_EQ(rdi, SCRATCH + 19)
    mov eax, [SCRATCH + 16]
    REQUIRE_EQ(eax, 0x161514)
    mov edi, SCRATCH + 16
    mov ecx, 2
    rep insw
    REQUIRE_EQ(dword ptr [SCRATCH + 16], 0x20182017)
    mov edi, SCRATCH + 16
    mov ecx, 2
    rep insd
    REQUIRE_EQ(dword ptr [SCRATCH + 16], 0x40302019)
    REQUIRE_EQ(dword ptr [SCRATCH + 20], 0x4030201a)

    /* Nothing is read from the port that cannot be stored, nothing written that cannot be loaded. */
    mov qword ptr [SCRATCH_PTE(1)], 0
    invlpg [MISSING]
    mov edi, MISSING - 10
    mov ecx, 5
    TRY
at_ins:
    rep insd
    FAULTS_AT(PF, 2, at_ins)
    REQUIRE_EQ(rcx, 3)
    REQUIRE_EQ(rdi, MISSING - 2)
    REQUIRE_EQ(qword ptr [got_cr2], MISSING)
    REQUIRE_EQ(dword ptr [MISSING - 6], 0x4030201c)
    mov word ptr [MISSING - 2], 0xa2a1
    mov esi, MISSING - 2
    mov ecx, 5
    TRY
at_outs:
    rep outsb
    FAULTS_AT(PF, 0, at_outs)
    REQUIRE_EQ(rcx, 3)
    REQUIRE_EQ(rsi, MISSING)

    /* Registers: plain accesses. */
    mov ebp, REGISTERS
    mov rax, 0x1122334455667788
    mov [rbp], al
    mov [rbp + 2], ax
    mov [rbp + 4], eax
    mov [rbp + 8], rax
    xor ecx, ecx
    mov cl, [rbp]
    REQUIRE_EQ(ecx, 0x88)
    mov cx, [rbp + 2]
    REQUIRE_EQ(ecx, 0x7788)
    mov ecx, [rbp + 4]
    REQUIRE_EQ(ecx, 0x55667788)
    mov rcx, [rbp + 8]
    REQUIRE_EQ(rcx, rax)
    movsx ecx, byte ptr [rbp + 8]
    REQUIRE_EQ(ecx, 0xffffff88)
    movzx rcx, word ptr [rbp + 8]
    REQUIRE_EQ(rcx, 0x7788)

    /* Read-modify-write. */
    lock inc dword ptr [rbp + 4]
    add dword ptr [rbp + 4], 0x10
    mov ecx, 1
    xchg [rbp + 4], ecx
    REQUIRE_EQ(ecx, 0x55667799)
    mov ecx, 5
    lock xadd [rbp + 4], ecx
    REQUIRE_EQ(ecx, 1)
    mov eax, 6
    mov ecx, 9
    lock cmpxchg [rbp + 4], ecx
    REQUIRE(je)
    lock bts dword ptr [rbp + 4], 20
    REQUIRE(jnc)
    cmp dword ptr [rbp + 4], 0x100009
    REQUIRE(je)
    test dword ptr [rbp + 4], 8
    REQUIRE(jnz)

    push 0x77
    pop qword ptr [rbp + 16]
    push qword ptr [rbp + 16]
    pop rax
    REQUIRE_EQ(rax, 0x77)

    mov eax, 0xabcdef01
    lea edi, [rbp + 32]
    mov ecx, 2
    rep stosd
    lea esi, [rbp + 32]
    mov ecx, 2
    rep lodsw
    movzx eax, ax
    REQUIRE_EQ(eax, 0xabcd)
    lea esi, [rbp + 32]
    lea edi, [rbp + 64]
    mov ecx, 2
    rep movsd
    lea esi, [rbp + 64]
    mov edi, SCRATCH
    movsq
    mov rax, 0xabcdef01abcdef01
    REQUIRE_EQ([SCRATCH], rax)
    PASS
