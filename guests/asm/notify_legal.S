/* Legal work that takes long, none of which closes the event window: the machine counts notify VM exits, and there must be
   none. */
#include "guest.h"
#include "smp.h"

#define SOURCE 0x800000
#define TARGET 0xa00000

main:
    call enable_apic
    cld
    BEHAVIOUR(a_megabyte_moved_by_one_instruction)
    mov rsi, SOURCE
    mov rdi, TARGET
    mov ecx, 1 << 20
    rep movsb
    REQUIRE_EQ(ecx, 0)
    BEHAVIOUR(wbinvd)
    mov ecx, 100
1:  wbinvd
    loop 1b
    BEHAVIOUR(a_loop_of_cpuid)
    mov r15d, 20000
1:  mov eax, 1
    cpuid
    dec r15d
    jnz 1b
    BEHAVIOUR(xsave_and_fxsave)
    mov ecx, 20000
1:  fxsave [SOURCE]
    fxrstor [SOURCE]
    loop 1b
    BEHAVIOUR(a_spin_with_interrupts_off)
    cli
    mov ecx, 20000000
1:  dec ecx
    jnz 1b
    BEHAVIOUR(a_spin_with_nmis_blocked)
    mov qword ptr [continue_at], offset handler
    IPI(0, ICR_SELF | ICR_NMI)
    REQUIRE_EQ(dword ptr [nmis], 1)
    BEHAVIOUR(a_halt_with_interrupts_off)
    /* NMIs end it, which the other processor sends. */
    mov edi, 1
    call start_others
    mov dword ptr [halted], 1
    cli
    hlt
    cmp dword ptr [nmis], 2
    REQUIRE(jae)
    mov dword ptr [done], 1
1:  pause
    cmp dword ptr [done], 2
    jne 1b
    BEHAVIOUR(walks_of_cold_page_tables)
    mov r15d, 200
2:  mov rax, cr3
    mov cr3, rax
    mov rdi, SCRATCH
    mov ecx, 512
1:  inc dword ptr [rdi]
    add rdi, 4096
    loop 1b
    dec r15d
    jnz 2b
    BEHAVIOUR(many_faults_of_faults)
    /* #UD whose gate is not present: #NP in its place, each time. */
    mov byte ptr [idt + UD * 16 + 5], 0x0e
    mov qword ptr [continue_at], 0
    mov r15d, 5000
1:  TRY
    ud2
    FAULTS(NP, UD * 8 + 3)
    dec r15d
    jnz 1b
    ret

/* The other processor. */
ap_main:
1:  pause
    cmp dword ptr [halted], 1
    jne 1b
2:  mov ecx, 100000
3:  loop 3b
    cmp dword ptr [done], 1
    je 4f
    IPI(0, ICR_NMI)
    jmp 2b
4:  mov dword ptr [done], 2
    cli
    hlt
    jmp 4b

handler:
    REQUIRE_EQ(qword ptr [got_vector], 2)
    inc dword ptr [nmis]
    cmp dword ptr [halted], 1
    je 2f
    push rcx
    mov ecx, 20000000
1:  dec ecx
    jnz 1b
    pop rcx
2:  jmp return_from_exception

    .section .data
    .balign 16
nmis: .long 0
halted: .long 0
done: .long 0
    .section .text
