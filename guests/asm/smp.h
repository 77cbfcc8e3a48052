/*
 * Starting the other processors, and the local APIC. A program includes it behind guest.h and defines
 * `ap_main`, which every started processor runs in 64-bit mode on its own stack with its number (1, 2, …) in EDI.
 */

#define APIC 0xfee00000
#define APIC_ID 0x20
#define APIC_TPR 0x80
#define APIC_EOI 0xb0
#define APIC_SPURIOUS 0xf0
#define APIC_ISR 0x100
#define APIC_IRR 0x200
#define APIC_ICR 0x300
#define APIC_ICR_HIGH 0x310
#define APIC_LVT_TIMER 0x320
#define APIC_LVT_LINT0 0x350
#define APIC_INITIAL 0x380
#define APIC_CURRENT 0x390
#define APIC_DIVIDE 0x3e0

#define ICR_FIXED 0x4000
#define ICR_NMI 0x4400
#define ICR_INIT 0x4500
#define ICR_STARTUP 0x4600
#define ICR_SELF 0x40000
#define ICR_ALL 0x80000
#define ICR_OTHERS 0xc0000

#define TRAMPOLINE 0x8000

    .weak ap_main

/* Sends: destination APIC ID in `to`, command word `what`. With X2APIC defined, everything goes through MSRs. */
#ifdef X2APIC
#define X2_WRITE(number, low, high) mov ecx, number; mov eax, low; mov edx, high; wrmsr
#define COMMAND(what) X2_WRITE(0x830, what, 0)
#define IPI(to, what) X2_WRITE(0x830, what, to)
#define EOI push rdx; X2_WRITE(0x80b, 0, 0); pop rdx
#else
#define COMMAND(what) mov ecx, APIC; mov dword ptr [rcx + APIC_ICR], what
#define IPI(to, what) mov eax, to; shl eax, 24; mov ecx, APIC; mov [rcx + APIC_ICR_HIGH], eax; COMMAND(what)
#define EOI mov ecx, APIC; mov dword ptr [rcx + APIC_EOI], 0
#endif

/* Enables the APIC with spurious vector 0xff and takes interrupts of all priorities. */
enable_apic:
#ifdef X2APIC
    mov ecx, 0x1b
    rdmsr
    or eax, 1 << 10
    wrmsr
    X2_WRITE(0x80f, 0x1ff, 0)
    X2_WRITE(0x808, 0, 0)
#else
    mov ecx, APIC
    mov dword ptr [rcx + APIC_SPURIOUS], 0x1ff
    mov dword ptr [rcx + APIC_TPR], 0
#endif
    ret

/* Starts all other processors by INIT, SIPI, SIPI and waits until `others` of them run. EDI: how many. */
start_others:
    push rdi
    mov rsi, offset trampoline
    mov edi, TRAMPOLINE
    mov ecx, offset trampoline_end - trampoline
    cld
    rep movsb
    COMMAND(ICR_OTHERS | ICR_INIT)
    mov edi, 10000
    call wait_microseconds
    COMMAND(ICR_OTHERS | ICR_STARTUP | TRAMPOLINE >> 12)
    mov edi, 1000
    call wait_microseconds
    pop rdi
1:  pause
    cmp [others_running], edi
    jb 1b
    ret

/* By the PIT's counter 2: 1193182 ticks a second. */
wait_microseconds:
    push rbx
    push rcx
    push rsi
    imul rax, rdi, 1193
    xor edx, edx
    mov ecx, 1000
    div rcx
    mov rdi, rax
    in al, 0x61
    and al, 0xfc
    or al, 1
    out 0x61, al
    mov al, 0xb4 /* counter 2, mode 2, both bytes */
    out 0x43, al
    mov al, 0xff
    out 0x42, al
    out 0x42, al
    mov esi, 0xffff
1:  mov al, 0x80
    out 0x43, al
    in al, 0x42
    mov bl, al
    in al, 0x42
    mov bh, al
    movzx ebx, bx
    mov eax, esi
    sub eax, ebx
    movzx eax, ax
    mov esi, ebx
    sub rdi, rax
    ja 1b
    pop rsi
    pop rcx
    pop rbx
    ret

    .balign 16
    .code16
trampoline:
    cli
    xor ax, ax
    mov ds, ax
    lgdt [TRAMPOLINE + trampoline_gdt - trampoline]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp fword ptr cs:[trampoline_far - trampoline]
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_far:
    .long ap32
    .word CODE32_CS
trampoline_end:

    .code32
ap32:
    mov eax, KERNEL_DS
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov eax, CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, EFER
    rdmsr
    or eax, EFER_LME | EFER_NXE
    wrmsr
    mov eax, CR0_PE | CR0_MP | CR0_NE | CR0_WP | CR0_PG | 0x10
    mov cr0, eax
    jmp KERNEL_CS:offset ap64
    .code64
ap64:
    lidt [idt_pointer]
    mov edi, 1
    lock xadd [others_started], edi
    inc edi
    mov eax, edi
    shl eax, 12
    lea rsp, [ap_stacks + rax]
    push rdi
    call enable_apic
    pop rdi
    lock inc dword ptr [others_running]
    call ap_main
1:  cli
    hlt
    jmp 1b

    .section .data
    .balign 8
others_started: .quad 0
others_running: .quad 0
    .section .bss
    .balign 4096
ap_stacks: .skip 16 * 4096
    .section .text
