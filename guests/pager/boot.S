/* Into long mode as all guest programs; vectors save everything on the stack of the task that runs, for `interrupted` in Rust. */
#define CAUGHT entered
#include "../asm/guest.h"

main:
    mov rax, cr4
    or rax, 1 << 6 /* CR4.MCE */
    mov cr4, rax
    jmp kernel

/* The processor has aligned the stack and pushed SS, RSP, RFLAGS, CS, RIP, the vector's entry an error code or zero, and the vector; with what
   follows the stack is aligned again. */
entered:
    push rax
    push rbx
    push rcx
    push rdx
    push rsi
    push rdi
    push rbp
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    sub rsp, 512
    fxsave64 [rsp]
    cld
    mov rdi, rsp
    call interrupted
resume_task_here:
    mov rsp, rax
    fxrstor64 [rsp]
    add rsp, 512
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rbp
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rbx
    pop rax
    add rsp, 16
    iretq

/* Goes on where the frame in RDI says, for ever. */
    .global resume_task
resume_task:
    mov rax, rdi
    jmp resume_task_here

/* What the compiler calls. */
    .global memset
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret

    .global memcpy
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
