/* Locked operations of four processors on the same words: no increment is lost, also across cache lines and pages. */
#include "guest.h"
#include "smp.h"

#define ROUNDS 5000
#define OTHERS 3

#define SPLIT_LINE (SCRATCH + 62)
#define SPLIT_PAGE (SCRATCH + 0x1000 - 2)

main:
    call enable_apic
    mov edi, OTHERS
    call start_others
    mov dword ptr [go], 1
    BEHAVIOUR(each_processor_owns_its_bit_of_a_shared_word)
    xor edi, edi
    call work
1:  pause
    cmp dword ptr [finished], OTHERS + 1
    jne 1b
    mov edx, ROUNDS * (OTHERS + 1)
    BEHAVIOUR(locked_increments_are_atomic)
    REQUIRE_EQ(dword ptr [by_inc], edx)
    BEHAVIOUR(locked_additions_are_atomic)
    REQUIRE_EQ(dword ptr [by_add], edx)
    BEHAVIOUR(exchange_and_add_is_atomic)
    REQUIRE_EQ(dword ptr [by_xadd], edx)
    BEHAVIOUR(compare_and_exchange_is_atomic)
    REQUIRE_EQ(dword ptr [by_cmpxchg], edx)
    BEHAVIOUR(operations_across_cache_lines_are_atomic)
    REQUIRE_EQ(dword ptr [SPLIT_LINE], edx)
    BEHAVIOUR(operations_across_pages_are_atomic)
    REQUIRE_EQ(dword ptr [SPLIT_PAGE], edx)
    BEHAVIOUR(compare_and_exchange_of_16_bytes_is_atomic)
    REQUIRE_EQ(dword ptr [by_cmpxchg16b], edx)
    REQUIRE_EQ(dword ptr [by_cmpxchg16b + 8], edx)
    BEHAVIOUR(compare_and_exchange_of_8_bytes_is_atomic)
    REQUIRE_EQ([by_cmpxchg8b], rdx)
    BEHAVIOUR(locked_decrements_and_subtractions_are_atomic)
    REQUIRE_EQ(dword ptr [by_subtraction], -2 * ROUNDS * (OTHERS + 1))
    BEHAVIOUR(locked_logic_is_atomic)
    REQUIRE_EQ(dword ptr [by_xor], 0)
    REQUIRE_EQ(dword ptr [by_or_and], 0x80000000)
    BEHAVIOUR(a_lock_by_exchange_excludes)
    REQUIRE_EQ(dword ptr [by_spinlock], edx)
    REQUIRE_EQ(dword ptr [by_bts], 0)
    BEHAVIOUR(locked_bytes_and_words_are_atomic)
    REQUIRE_EQ(byte ptr [by_byte], dl)
    REQUIRE_EQ(word ptr [by_word], dx)
    BEHAVIOUR(each_ticket_is_handed_out_once)
    /* Every value of the XADD counter was handed out once: their sum is n(n-1)/2. */
    mov eax, edx
    lea rcx, [rax - 1]
    imul rax, rcx
    shr rax, 1
    REQUIRE_EQ([tickets], rax)
    PASS

ap_main:
1:  pause
    cmp dword ptr [go], 0
    je 1b

work:
    mov r15d, edi
    mov r14d, ROUNDS
    xor r13d, r13d
1:  lock inc dword ptr [by_inc]
    lock add dword ptr [by_add], 1
    lock inc byte ptr [by_byte]
    lock add word ptr [by_word], 1
    lock inc dword ptr [SPLIT_LINE]
    mov ecx, 1
    lock xadd dword ptr [SPLIT_PAGE], ecx
    mov ecx, 1
    lock xadd [by_xadd], ecx
    add r13, rcx
    mov eax, [by_cmpxchg]
2:  lea ecx, [rax + 1]
    lock cmpxchg [by_cmpxchg], ecx
    jne 2b
    mov rax, [by_cmpxchg16b]
    mov rdx, [by_cmpxchg16b + 8]
2:  lea rbx, [rax + 1]
    lea rcx, [rdx + 1]
    lock cmpxchg16b [by_cmpxchg16b]
    jne 2b
    mov eax, [by_cmpxchg8b]
    mov edx, [by_cmpxchg8b + 4]
2:  mov ebx, eax
    mov ecx, edx
    add ebx, 1
    adc ecx, 0
    lock cmpxchg8b [by_cmpxchg8b]
    jne 2b
    lock dec dword ptr [by_subtraction]
    lock sub dword ptr [by_subtraction], 1
    /* Each processor toggles, sets and clears bits of its own; nobody touches bit 31, which is set from the start. */
    mov ecx, r15d
    mov eax, 1
    shl eax, cl
    lock xor [by_xor], eax
    lock or [by_or_and], eax
    mov dword ptr [source_line], __LINE__
    test [by_or_and], eax
    jz fail
    not eax
    lock and [by_or_and], eax
    /* A lock by XCHG around a plain increment. */
2:  mov eax, 1
    xchg [spinlock], eax
    test eax, eax
    jz 3f
    pause
    jmp 2b
3:  inc dword ptr [by_spinlock]
    mov dword ptr [spinlock], 0
    /* Each processor's own bit of a shared word. */
    lock bts [by_bts], r15d
    mov dword ptr [source_line], __LINE__
    jc fail
    lock btr [by_bts], r15d
    jnc fail
    dec r14d
    jnz 1b
    lock add [tickets], r13
    lock inc dword ptr [finished]
    ret

    .section .data
    .balign 64
go: .quad 0
finished: .quad 0
spinlock: .quad 0
    .balign 64
by_inc: .quad 0
by_add: .quad 0
by_xadd: .quad 0
by_cmpxchg: .quad 0
by_byte: .quad 0
by_word: .quad 0
by_bts: .quad 0
by_spinlock: .quad 0
by_cmpxchg8b: .quad 0
by_subtraction: .quad 0
by_xor: .quad 0
by_or_and: .quad 0x80000000
tickets: .quad 0
    .balign 16
by_cmpxchg16b: .quad 0, 0
