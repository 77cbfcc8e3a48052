/* String instructions that fault midway: the registers say how far they came, and they can be gone on with. */
#include "guest.h"

#define MISSING (SCRATCH + 0x1000)

/* Page 1 is there or not. */
#define PAGE1(bits) mov qword ptr [SCRATCH_PTE(1)], MISSING * ((bits) & 1) + (bits); invlpg [MISSING]
#define ALL (P_ | W_ | U_)

main:
    cld
    /* Source and destination patterns. */
    mov rdi, SCRATCH
    mov ecx, 0x2000
1:  mov [rdi], cl
    inc rdi
    loop 1b

    BEHAVIOUR(a_move_stops_where_its_destination_is_missing_and_goes_on)
    /* MOVSB up into the missing page. */
    PAGE1(0)
    mov rsi, SCRATCH
    mov rdi, MISSING - 100
    mov ecx, 300
    TRY
at_movsb:
    rep movsb
    FAULTS_AT(PF, 2, at_movsb)
    REQUIRE_EQ(qword ptr [got_cr2], MISSING)
    REQUIRE_EQ(rcx, 200)
    REQUIRE_EQ(rsi, SCRATCH + 100)
    REQUIRE_EQ(rdi, MISSING)
    PAGE1(ALL)
    rep movsb
    REQUIRE_EQ(rcx, 0)
    mov rsi, SCRATCH
    mov rdi, MISSING - 100
    mov ecx, 300
    repe cmpsb
    REQUIRE(je)

    BEHAVIOUR(an_element_across_the_edge_is_not_moved_in_part)
    /* MOVSQ whose element lies across the edge: it is not done in part. */
    PAGE1(0)
    mov rsi, SCRATCH
    mov rdi, MISSING - 20
    mov ecx, 10
    mov rax, [MISSING - 4 - 8 + 8 - 8]
    mov ebx, [MISSING - 4]
    TRY
    rep movsq
    FAULTS(PF, 2)
    REQUIRE_EQ(rcx, 8)
    REQUIRE_EQ(rdi, MISSING - 4)
    REQUIRE_EQ(ebx, [MISSING - 4])
    REQUIRE_EQ(qword ptr [got_cr2], MISSING)

    BEHAVIOUR(a_downward_move_stops_where_its_destination_is_missing)
    /* Downwards, from a page above that is there into the missing one. */
    PAGE1(0)
    std
    mov rsi, SCRATCH + 0x800
    mov rdi, MISSING + 0x1000 + 49
    mov ecx, 100
    TRY
    rep movsb
    FAULTS(PF, 2)
    REQUIRE_EQ(rcx, 50)
    REQUIRE_EQ(rdi, MISSING + 0xfff)
    REQUIRE_EQ(rsi, SCRATCH + 0x800 - 50)
    REQUIRE_EQ(qword ptr [got_cr2], MISSING + 0xfff)
    cld

    BEHAVIOUR(a_move_stops_where_its_source_is_missing)
    /* The source faults: error code of a read. */
    mov rsi, MISSING - 7
    mov rdi, SCRATCH
    mov ecx, 100
    TRY
    rep movsb
    FAULTS(PF, 0)
    REQUIRE_EQ(rcx, 93)
    REQUIRE_EQ(rdi, SCRATCH + 7)

    BEHAVIOUR(stores_loads_scans_and_comparisons_stop_at_a_missing_page)
    /* STOSD, LODSW, SCASB, CMPSB. */
    mov rdi, MISSING - 40
    mov ecx, 100
    mov eax, 0x12345678
    TRY
    rep stosd
    FAULTS(PF, 2)
    REQUIRE_EQ(rcx, 90)
    REQUIRE_EQ(dword ptr [MISSING - 4], 0x12345678)
    mov rsi, MISSING - 40
    mov ecx, 100
    TRY
    rep lodsw
    FAULTS(PF, 0)
    REQUIRE_EQ(rcx, 80)
    REQUIRE_EQ(ax, 0x1234)
    mov rdi, MISSING - 40
    mov ecx, 100
    mov al, 0xee
    TRY
    repne scasb
    FAULTS(PF, 0)
    REQUIRE_EQ(rcx, 60)
    mov rsi, SCRATCH
    mov rdi, SCRATCH + 0xffc
    mov eax, [rdi]
    mov [rsi], eax
    mov ecx, 100
    TRY
    repe cmpsb
    FAULTS(PF, 0)
    REQUIRE_EQ(rcx, 96)
    REQUIRE_EQ(rsi, SCRATCH + 4)

    BEHAVIOUR(a_count_of_zero_touches_nothing)
    /* A count of zero touches nothing; 32-bit addresses count in ECX and wrap. */
    mov rdi, MISSING
    xor ecx, ecx
    TRY
    rep stosb
    PASSES
    mov rcx, 0x100000000
    TRY
    .byte 0x67
    rep stosb
    PASSES
    REQUIRE_EQ(ecx, 0) /* whether the upper half stays depends on the processor */

    BEHAVIOUR(a_move_goes_on_when_the_handler_has_mapped_the_page)
    /* The handler maps the page and returns: the instruction goes on by itself. */
    mov qword ptr [continue_at], offset map_page
    PAGE1(0)
    mov rsi, SCRATCH
    mov rdi, SCRATCH + 0x800
    mov ecx, 0x1000
    rep movsb
    mov qword ptr [continue_at], 0
    REQUIRE_EQ(rdi, SCRATCH + 0x1800)
    REQUIRE_EQ(rcx, 0)

    BEHAVIOUR(overlapping_moves_propagate_byte_by_byte)
    /* Overlapping moves propagate as byte-wise copies do. */
    mov byte ptr [SCRATCH], 0x5a
    mov rsi, SCRATCH
    mov rdi, SCRATCH + 1
    mov ecx, 5000
    rep movsb
    mov rdi, SCRATCH
    mov ecx, 5001
    mov al, 0x5a
    repe scasb
    REQUIRE(je)
    /* A distance of 3 bytes. */
    mov dword ptr [SCRATCH], 0x00030201
    mov rsi, SCRATCH
    mov rdi, SCRATCH + 3
    mov ecx, 3000
    rep movsb
    REQUIRE_EQ(dword ptr [SCRATCH + 2997], 0x01030201)
    PASS

map_page:
    PAGE1(ALL)
    jmp return_from_exception
