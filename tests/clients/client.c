/* A KVM client for the end-to-end tests: one behaviour per name, `client NAME`. Exit status 0: it holds.
 * Nothing here knows that it does not talk to a kernel. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                                     \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            fprintf(stderr, "%s:%d: %s (errno %d: %s)\n", __FILE__, __LINE__, #condition,    \
                    errno, strerror(errno));                                                 \
            exit(1);                                                                         \
        }                                                                                    \
    } while (0)

#define MEMORY 0x10000
#define CODE 0x1000

struct machine {
    int kvm, vm, vcpu;
    struct kvm_run *run;
    unsigned char *memory;
};

/* A VM with one vCPU in real mode at CODE. */
static struct machine machine(const void *code, size_t size)
{
    struct machine m;
    m.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    CHECK(m.kvm >= 0);
    CHECK(ioctl(m.kvm, KVM_GET_API_VERSION, 0) == 12);
    m.vm = ioctl(m.kvm, KVM_CREATE_VM, 0);
    CHECK(m.vm >= 0);
    m.memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(m.memory != MAP_FAILED);
    memcpy(m.memory + CODE, code, size);
    struct kvm_userspace_memory_region region = {
        .slot = 0, .guest_phys_addr = 0, .memory_size = MEMORY, .userspace_addr = (unsigned long)m.memory
    };
    CHECK(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    m.vcpu = ioctl(m.vm, KVM_CREATE_VCPU, 0);
    CHECK(m.vcpu >= 0);
    int length = ioctl(m.kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    CHECK(length >= (int)sizeof(struct kvm_run));
    m.run = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, m.vcpu, 0);
    CHECK(m.run != MAP_FAILED);
    struct kvm_sregs sregs;
    CHECK(ioctl(m.vcpu, KVM_GET_SREGS, &sregs) == 0);
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    CHECK(ioctl(m.vcpu, KVM_SET_SREGS, &sregs) == 0);
    struct kvm_regs regs = { .rip = CODE, .rflags = 2, .rax = 0x41, .rdx = 0x3f8, .rsp = 0x8000 };
    CHECK(ioctl(m.vcpu, KVM_SET_REGS, &regs) == 0);
    return m;
}

/* out dx, al; hlt */
static const unsigned char OUT_HLT[] = { 0xee, 0xf4 };
/* Counts for ever, so that one can see that it runs: inc word [COUNTER]; jmp CODE */
#define COUNTER 0x2000
static const unsigned char LOOP[] = { 0xff, 0x06, 0x00, 0x20, 0xeb, 0xfa };
#define IN_LOOP(rip) ((rip) == CODE || (rip) == CODE + 4)

static struct machine looping(void) { return machine(LOOP, sizeof LOOP); }

static void expect_out(struct machine *m)
{
    CHECK(ioctl(m->vcpu, KVM_RUN, 0) == 0);
    CHECK(m->run->exit_reason == KVM_EXIT_IO);
    CHECK(m->run->io.direction == KVM_EXIT_IO_OUT && m->run->io.port == 0x3f8 && m->run->io.size == 1);
    CHECK(*((unsigned char *)m->run + m->run->io.data_offset) == 0x41);
}

static void exits(void)
{
    static const unsigned char code[] = {
        0xee,                         /* out dx, al */
        0xec,                         /* in al, dx */
        0xbb, 0x00, 0x20,             /* mov bx, 0x2000 */
        0x88, 0x07,                   /* mov [bx], al */
        0x67, 0xa2, 0x00, 0x00, 0x02, 0x00, /* mov [0x20000], al */
        0x67, 0xa0, 0x04, 0x00, 0x02, 0x00, /* mov al, [0x20004] */
        0xf4,                         /* hlt */
    };
    struct machine m = machine(code, sizeof code);
    /* Beyond 64 KiB in real mode needs a segment with a wide limit. */
    struct kvm_sregs sregs;
    CHECK(ioctl(m.vcpu, KVM_GET_SREGS, &sregs) == 0);
    sregs.ds.limit = 0xffffffff;
    sregs.ds.g = 1;
    CHECK(ioctl(m.vcpu, KVM_SET_SREGS, &sregs) == 0);
    expect_out(&m);
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0);
    CHECK(m.run->exit_reason == KVM_EXIT_IO && m.run->io.direction == KVM_EXIT_IO_IN);
    *((unsigned char *)m.run + m.run->io.data_offset) = 0x5a;
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0);
    CHECK(m.memory[0x2000] == 0x5a);
    CHECK(m.run->exit_reason == KVM_EXIT_MMIO && m.run->mmio.is_write);
    CHECK(m.run->mmio.phys_addr == 0x20000 && m.run->mmio.len == 1 && m.run->mmio.data[0] == 0x5a);
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0);
    CHECK(m.run->exit_reason == KVM_EXIT_MMIO && !m.run->mmio.is_write && m.run->mmio.phys_addr == 0x20004);
    m.run->mmio.data[0] = 0x77;
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0);
    CHECK(m.run->exit_reason == KVM_EXIT_HLT);
    struct kvm_regs regs;
    CHECK(ioctl(m.vcpu, KVM_GET_REGS, &regs) == 0);
    CHECK((regs.rax & 0xff) == 0x77);
}

static void descriptors(void)
{
    struct machine m = machine(OUT_HLT, sizeof OUT_HLT);
    /* Any duplicate will do, and the others may be closed. */
    int copies[] = { dup(m.vcpu), fcntl(m.vcpu, F_DUPFD_CLOEXEC, 100), dup2(m.vcpu, 200), dup3(m.vcpu, 2000, O_CLOEXEC),
                     syscall(SYS_dup, m.vcpu) };
    close(m.vcpu);
    errno = 0;
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == -1 && errno == EBADF);
    for (size_t i = 0; i < sizeof copies / sizeof *copies; i++) {
        struct kvm_regs regs;
        CHECK(ioctl(copies[i], KVM_GET_REGS, &regs) == 0 && regs.rip == CODE);
    }
    close_range(copies[2], ~0u, 0);
    CHECK(ioctl(copies[2], KVM_RUN, 0) == -1 && errno == EBADF);
    /* A number that means something else now. */
    int null = open("/dev/null", O_RDWR);
    CHECK(dup2(null, copies[1]) == copies[1]);
    CHECK(ioctl(copies[1], KVM_RUN, 0) == -1 && errno == ENOTTY);
    CHECK(fcntl(m.vm, F_GETFD) == FD_CLOEXEC);
    m.vcpu = copies[0];
    expect_out(&m);
    close(m.vm);
    close(m.kvm);
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0 && m.run->exit_reason == KVM_EXIT_HLT);
    CHECK(ioctl(copies[4], KVM_RUN, 1) == -1 && errno == EINVAL);
    /* The area stays, whatever is tried. */
    CHECK(ftruncate(m.vcpu, 0) == -1);
}

/* Duplicates and closes that nobody but the kernel sees. */
static long kernel(long number, long a, long b)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "0"(number), "D"(a), "S"(b) : "rcx", "r11", "memory");
    return result;
}

static void unseen_descriptors(void)
{
    struct machine m = machine(OUT_HLT, sizeof OUT_HLT);
    int copy = kernel(SYS_dup, m.vcpu, 0);
    CHECK(copy >= 0);
    close(m.vcpu);
    m.vcpu = copy;
    expect_out(&m);
    /* Closed behind our back, and the number used again. */
    kernel(SYS_close, copy, 0);
    CHECK(kernel(SYS_dup2, m.vm, copy) == copy);
    struct kvm_regs regs;
    CHECK(ioctl(copy, KVM_GET_REGS, &regs) == -1 && errno == ENOTTY);
    CHECK(ioctl(copy, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
}

static void passed_descriptors(void)
{
    struct machine m = machine(OUT_HLT, sizeof OUT_HLT);
    int ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    char byte = 0, control[CMSG_SPACE(sizeof(int))] = { 0 };
    struct iovec data = { &byte, 1 };
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control
    };
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &m.vcpu, sizeof(int));
    CHECK(sendmsg(ends[0], &message, 0) == 1);
    close(m.vcpu);
    int filler = open("/dev/null", O_RDONLY);
    CHECK(recvmsg(ends[1], &message, 0) == 1);
    memcpy(&m.vcpu, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
    CHECK(m.vcpu != filler);
    expect_out(&m);
}

static void forked(void)
{
    struct machine m = machine(OUT_HLT, sizeof OUT_HLT);
    pid_t child = fork();
    if (child == 0) {
        struct kvm_regs regs;
        CHECK(ioctl(m.vcpu, KVM_RUN, 0) == -1 && errno == EIO);
        CHECK(ioctl(m.vcpu, KVM_GET_REGS, &regs) == -1 && errno == EIO);
        CHECK(ioctl(m.vm, KVM_CREATE_VCPU, 1) == -1 && errno == EIO);
        CHECK(ioctl(m.kvm, KVM_CREATE_VM, 0) >= 0);
        close(m.vcpu);
        close(m.vm);
        struct machine own = machine(OUT_HLT, sizeof OUT_HLT);
        expect_out(&own);
        exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    expect_out(&m);
    /* A vfork child has our memory, but not our descriptors. */
    child = vfork();
    if (child == 0) {
        close(m.vcpu);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0 && m.run->exit_reason == KVM_EXIT_HLT);
}

static void *first_use(void *nothing)
{
    struct machine m = machine(OUT_HLT, sizeof OUT_HLT);
    expect_out(&m);
    return nothing;
}

/* What a thread has begun and a fork cuts off does not keep the child from doing it. */
static void forked_during_first_use(void)
{
    for (int round = 0; round < 60; round++) {
        pid_t fresh = fork();
        if (fresh == 0) {
            /* Nobody in this process has opened /dev/kvm before. */
            pthread_t thread;
            CHECK(pthread_create(&thread, NULL, first_use, NULL) == 0);
            for (int child = 0; child < 4; child++) {
                usleep(round * 50);
                pid_t pid = fork();
                if (pid == 0) {
                    alarm(120);
                    first_use(NULL);
                    exit(0);
                }
                int status;
                CHECK(waitpid(pid, &status, 0) == pid && status == 0);
            }
            CHECK(pthread_join(thread, NULL) == 0);
            exit(0);
        }
        int status;
        CHECK(waitpid(fresh, &status, 0) == fresh && status == 0);
    }
}

/* /dev/kvm stays what it is over exec(2); a VM belongs to the program that made it. */
static void inherited(void)
{
    struct machine m = machine(OUT_HLT, sizeof OUT_HLT);
    int kvm = open("/dev/kvm", O_RDWR);
    char first[16], second[16];
    snprintf(first, sizeof first, "%d", kvm);
    snprintf(second, sizeof second, "%d", dup(m.vm));
    execl("/proc/self/exe", "client", "after_exec", first, second, NULL);
    CHECK(0);
}

static int after_exec(int kvm, int vm)
{
    CHECK(ioctl(kvm, KVM_GET_API_VERSION, 0) == 12);
    CHECK(ioctl(vm, KVM_CREATE_VCPU, 1) == -1 && errno == EIO);
    CHECK(ioctl(ioctl(kvm, KVM_CREATE_VM, 0), KVM_CREATE_VCPU, 0) >= 0);
    return 0;
}

static struct machine shared;
static volatile sig_atomic_t handled;
static volatile unsigned long long rip_in_handler;

/* Uses the vCPU, which a handler may: it does not run inside of KVM_RUN. */
static void handler(int signal, siginfo_t *info, void *context)
{
    (void)context;
    struct kvm_regs regs;
    CHECK(info->si_signo == signal && info->si_pid == getpid());
    CHECK(ioctl(shared.vcpu, KVM_GET_REGS, &regs) == 0);
    rip_in_handler = regs.rip;
    handled++;
}

static void install(int signal, void (*function)(int, siginfo_t *, void *), int flags)
{
    struct sigaction action = { .sa_sigaction = function, .sa_flags = flags | SA_SIGINFO }, shown;
    CHECK(sigaction(signal, &action, NULL) == 0);
    CHECK(sigaction(signal, NULL, &shown) == 0);
    CHECK(shown.sa_sigaction == function && !((shown.sa_flags ^ action.sa_flags) & (SA_SIGINFO | SA_RESTART | SA_RESETHAND)));
}

static unsigned short counter(void) { return *(volatile unsigned short *)(shared.memory + COUNTER); }

/* Until the guest has gone on: its thread is in KVM_RUN then. */
static void wait_for_guest(unsigned short before)
{
    while (counter() == before)
        usleep(1000);
}

static pthread_t target;
static unsigned short counter_before;

/* Sends one signal, or two: the second is in the second byte. */
static void *kick_later(void *signals)
{
    wait_for_guest(counter_before);
    for (long rest = (long)signals; rest; rest >>= 8)
        CHECK(pthread_kill(target, rest & 0xff) == 0);
    return NULL;
}

/* Sends `signal` to this thread once it is in KVM_RUN. */
static pthread_t kicker(int signal)
{
    pthread_t thread;
    target = pthread_self();
    counter_before = counter();
    CHECK(pthread_create(&thread, NULL, kick_later, (void *)(long)signal) == 0);
    return thread;
}

static void signals(void)
{
    shared = looping();
    install(SIGUSR1, handler, SA_RESTART);
    install(SIGRTMIN + 3, handler, SA_NODEFER);
    int signals[] = { SIGUSR1, SIGRTMIN + 3, SIGUSR1 };
    for (int i = 0; i < 3; i++) {
        pthread_t thread = kicker(signals[i]);
        CHECK(ioctl(shared.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
        CHECK(handled == i + 1 && IN_LOOP(rip_in_handler));
        CHECK(shared.run->exit_reason == KVM_EXIT_INTR);
        pthread_join(thread, NULL);
        sigset_t mask;
        CHECK(pthread_sigmask(SIG_BLOCK, NULL, &mask) == 0);
        CHECK(!sigismember(&mask, signals[i]));
    }
}

/* Sent to a thread that is waiting for its vCPU. */
static void signal_while_halted(void)
{
    static const unsigned char code[] = { 0xff, 0x06, 0x00, 0x20, 0xf4 }; /* inc word [COUNTER]; hlt */
    struct machine m;
    shared = machine(code, sizeof code);
    m = shared;
    close(m.vcpu);
    m.vm = ioctl(m.kvm, KVM_CREATE_VM, 0);
    CHECK(ioctl(m.vm, KVM_CREATE_IRQCHIP, 0) == 0);
    struct kvm_userspace_memory_region region = {
        .slot = 0, .guest_phys_addr = 0, .memory_size = MEMORY, .userspace_addr = (unsigned long)m.memory
    };
    CHECK(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    m.vcpu = ioctl(m.vm, KVM_CREATE_VCPU, 0);
    struct kvm_sregs sregs;
    CHECK(ioctl(m.vcpu, KVM_GET_SREGS, &sregs) == 0);
    sregs.cs.base = sregs.cs.selector = 0;
    CHECK(ioctl(m.vcpu, KVM_SET_SREGS, &sregs) == 0);
    struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
    CHECK(ioctl(m.vcpu, KVM_SET_REGS, &regs) == 0);
    shared = m;
    install(SIGUSR1, handler, SA_RESTART);
    pthread_t thread = kicker(SIGUSR1);
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    CHECK(handled == 1 && (rip_in_handler == CODE + 4 || rip_in_handler == CODE + 5));
    pthread_join(thread, NULL);
}

static sigjmp_buf jump;
static void jump_away(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)info, (void)context;
    siglongjmp(jump, 1);
}

static void once(int signal, siginfo_t *info, void *context);
static volatile int first_is_back;

static void *run_first(void *unused)
{
    (void)unused;
    CHECK(ioctl(shared.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    first_is_back = 1;
    return NULL;
}

static void *run_second(void *unused)
{
    (void)unused;
    CHECK(ioctl(shared.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    return NULL;
}

/* Two threads want the same vCPU: a signal for the one that waits is not lost when the other one leaves. */
static void signal_while_waiting(void)
{
    shared = looping();
    install(SIGUSR1, once, 0);
    for (int i = 0; i < 20; i++) {
        pthread_t first, second;
        first_is_back = 0;
        CHECK(pthread_create(&first, NULL, run_first, NULL) == 0);
        wait_for_guest(counter());
        CHECK(pthread_create(&second, NULL, run_second, NULL) == 0);
        usleep(i * 200);
        pthread_kill(second, SIGUSR1);
        if (!first_is_back)
            pthread_kill(first, SIGUSR1);
        /* One that comes before its thread is in KVM_RUN interrupts nothing. */
        while (pthread_tryjoin_np(second, NULL) != 0) {
            pthread_kill(second, SIGUSR1);
            usleep(1000);
        }
        pthread_join(first, NULL);
    }
}

static void handler_that_jumps(void)
{
    shared = looping();
    install(SIGUSR1, jump_away, 0);
    for (volatile int i = 0; i < 3; i++) {
        pthread_t thread = kicker(SIGUSR1);
        if (sigsetjmp(jump, 1) == 0) {
            ioctl(shared.vcpu, KVM_RUN, 0);
            CHECK(0);
        }
        pthread_join(thread, NULL);
    }
    struct kvm_regs regs;
    CHECK(ioctl(shared.vcpu, KVM_GET_REGS, &regs) == 0 && IN_LOOP(regs.rip));
}

static void once(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)info, (void)context;
    handled++;
}

static void handler_for_one_time(void)
{
    shared = looping();
    install(SIGWINCH, once, SA_RESETHAND);
    pthread_t thread = kicker(SIGWINCH);
    CHECK(ioctl(shared.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    pthread_join(thread, NULL);
    CHECK(handled == 1);
    struct sigaction shown;
    CHECK(sigaction(SIGWINCH, NULL, &shown) == 0 && shown.sa_handler == SIG_DFL);
    /* signal(2) shows what was before, too. */
    CHECK(signal(SIGWINCH, SIG_IGN) == SIG_DFL);
    CHECK(signal(SIGWINCH, SIG_DFL) == SIG_IGN);
}

/* None of many signals is lost, wherever each one meets the thread. */
enum { STORM = 3000 };
static volatile sig_atomic_t arrived, last;

static void count(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)context;
    last = info->si_value.sival_int;
    /* What comes before KVM_RUN does not interrupt it. */
    if (++arrived == STORM)
        shared.run->immediate_exit = 1;
}

static void *storm(void *unused)
{
    (void)unused;
    union sigval value;
    for (value.sival_int = 1; value.sival_int <= STORM; value.sival_int++) {
        while (pthread_sigqueue(target, SIGRTMIN + 1, value) == EAGAIN)
            usleep(100);
        if (value.sival_int % 16 == 0)
            usleep(200);
    }
    return NULL;
}

static void signal_storm(void)
{
    shared = looping();
    install(SIGRTMIN + 1, count, 0);
    target = pthread_self();
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, storm, NULL) == 0);
    for (int i = 0; arrived < STORM; i++) {
        struct kvm_regs regs;
        if (i % 2)
            CHECK(ioctl(shared.vcpu, KVM_GET_REGS, &regs) == 0);
        else
            CHECK(ioctl(shared.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    }
    pthread_join(thread, NULL);
    CHECK(arrived == STORM && last > 0);
}

static void immediate_exit(void)
{
    struct machine m = looping();
    m.run->immediate_exit = 1;
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
}

/* As most VMMs do it: the handler sets immediate_exit. */
static void exit_from_handler(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)info, (void)context;
    shared.run->immediate_exit = 1;
}

static void immediate_exit_in_handler(void)
{
    shared = looping();
    install(SIGUSR1, exit_from_handler, 0);
    raise(SIGUSR1);
    CHECK(ioctl(shared.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    shared.run->immediate_exit = 0;
    pthread_t thread = kicker(SIGUSR1);
    CHECK(ioctl(shared.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    pthread_join(thread, NULL);
}

static void set_signal_mask(int vcpu, int unblocked)
{
    struct {
        struct kvm_signal_mask head;
        unsigned char set[8];
    } __attribute__((packed)) mask = { .head = { .len = 8 } };
    unsigned long set = ~0ul & ~(1ul << (unblocked - 1));
    memcpy(mask.set, &set, sizeof set);
    CHECK(ioctl(vcpu, KVM_SET_SIGNAL_MASK, &mask) == 0);
    mask.head.len = 16;
    CHECK(ioctl(vcpu, KVM_SET_SIGNAL_MASK, &mask) == -1 && errno == EINVAL);
    CHECK(ioctl(vcpu, KVM_SET_SIGNAL_MASK, 1) == -1 && errno == EFAULT);
}

static void signal_mask(void)
{
    shared = looping();
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
    set_signal_mask(shared.vcpu, SIGUSR1);
    struct timespec now = { 0 };
    /* One that is pending already, then one that comes; the action is to end the process. */
    for (int i = 0; i < 3; i++) {
        pthread_t thread = 0;
        if (i == 0)
            pthread_kill(pthread_self(), SIGUSR1);
        else
            thread = kicker(SIGUSR1);
        CHECK(ioctl(shared.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
        siginfo_t info;
        CHECK(sigtimedwait(&set, &info, &now) == SIGUSR1);
        CHECK(sigtimedwait(&set, &info, &now) == -1 && errno == EAGAIN);
        if (thread)
            pthread_join(thread, NULL);
    }
    /* One that the mask blocks and the thread does not, waits for the end of KVM_RUN. */
    install(SIGUSR2, handler, 0);
    pthread_t thread = kicker(SIGUSR2 | SIGUSR1 << 8);
    CHECK(ioctl(shared.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    CHECK(sigtimedwait(&set, NULL, &now) == SIGUSR1);
    CHECK(handled == 1);
    pthread_join(thread, NULL);
    CHECK(ioctl(shared.vcpu, KVM_SET_SIGNAL_MASK, NULL) == 0);
}

static void *run_for_ever(void *type)
{
    pthread_setcanceltype((int)(long)type, NULL);
    int result = ioctl(shared.vcpu, KVM_RUN, 0);
    CHECK(result == -1 && errno == EINTR);
    pthread_testcancel();
    CHECK(0);
    return NULL;
}

static void cancel(int type)
{
    shared = looping();
    for (int i = 0; i < 3; i++) {
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, run_for_ever, (void *)(long)type) == 0);
        wait_for_guest(counter());
        CHECK(pthread_cancel(thread) == 0);
        void *result;
        CHECK(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED);
    }
    struct kvm_regs regs;
    CHECK(ioctl(shared.vcpu, KVM_GET_REGS, &regs) == 0 && IN_LOOP(regs.rip));
}

static void cancel_deferred(void) { cancel(PTHREAD_CANCEL_DEFERRED); }
static void cancel_asynchronous(void) { cancel(PTHREAD_CANCEL_ASYNCHRONOUS); }

static volatile unsigned long fault_address;
static void segv(int signal, siginfo_t *info, void *context)
{
    (void)context;
    CHECK(signal == SIGSEGV);
    fault_address = (unsigned long)info->si_addr;
    siglongjmp(jump, 1);
}

static void own_faults(void)
{
    install(SIGSEGV, segv, SA_NODEFER);
    shared = machine(OUT_HLT, sizeof OUT_HLT);
    expect_out(&shared);
    if (sigsetjmp(jump, 1) == 0) {
        *(volatile int *)0x1234 = 1;
        CHECK(0);
    }
    CHECK(fault_address == 0x1234);
    CHECK(ioctl(shared.vcpu, KVM_RUN, 0) == 0 && shared.run->exit_reason == KVM_EXIT_HLT);
}

/* KVM_CAP_MEMORY_FAULT_INFO, which older headers have not. */
#define CAP_MEMORY_FAULT_INFO 232
/* inc word [COUNTER]; hlt */
static const unsigned char INC_HLT[] = { 0xff, 0x06, 0x00, 0x20, 0xf4 };
static int backing; /* The file that is the guest's memory. */

/* A machine whose memory is a file's. */
static struct machine from_file(const unsigned char *code, size_t size)
{
    struct machine m = machine(code, size);
    backing = memfd_create("memory", MFD_CLOEXEC);
    CHECK(backing >= 0 && write(backing, m.memory, MEMORY) == MEMORY);
    CHECK(mmap(m.memory, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, backing, 0) == m.memory);
    return m;
}

static void take_away(struct machine *m, int how)
{
    unsigned char *page = m->memory + COUNTER;
    switch (how) {
    case 0: CHECK(munmap(page, 4096) == 0); break;
    case 1: CHECK(mprotect(page, 4096, PROT_NONE) == 0); break;
    case 2: CHECK(mprotect(page, 4096, PROT_READ) == 0); break;
    case 3: CHECK(ftruncate(backing, COUNTER) == 0); break;
    }
}

static void repair(struct machine *m)
{
    CHECK(ftruncate(backing, MEMORY) == 0);
    CHECK(mmap(m->memory, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, backing, 0) == m->memory);
}

static void rewind_to(struct machine *m, unsigned long rip)
{
    struct kvm_regs regs;
    CHECK(ioctl(m->vcpu, KVM_GET_REGS, &regs) == 0);
    regs.rip = rip;
    CHECK(ioctl(m->vcpu, KVM_SET_REGS, &regs) == 0);
}

static void expect_absent(struct machine *m)
{
    struct kvm_regs regs;
    for (int i = 0; i < 2; i++) {
        m->run->exit_reason = 77;
        errno = 0;
        CHECK(ioctl(m->vcpu, KVM_RUN, 0) == -1 && errno == EFAULT);
        CHECK(m->run->exit_reason == KVM_EXIT_UNKNOWN);
        CHECK(ioctl(m->vcpu, KVM_GET_REGS, &regs) == 0 && regs.rip == CODE);
    }
}

static void expect_halt(struct machine *m)
{
    CHECK(ioctl(m->vcpu, KVM_RUN, 0) == 0 && m->run->exit_reason == KVM_EXIT_HLT);
}

static void absent_memory(void)
{
    struct machine m = from_file(INC_HLT, sizeof INC_HLT);
    CHECK(ioctl(m.kvm, KVM_CHECK_EXTENSION, CAP_MEMORY_FAULT_INFO) == 1);
    for (int round = 0; round < 3; round++) {
        for (int how = 0; how < 4; how++) {
            take_away(&m, how);
            expect_absent(&m);
            repair(&m);
            unsigned char before = m.memory[COUNTER];
            expect_halt(&m);
            CHECK(m.memory[COUNTER] == before + 1);
            rewind_to(&m, CODE);
        }
    }
    CHECK(ioctl(m.vcpu, KVM_GET_VCPU_MMAP_SIZE, 0) == -1);
}

static void *take_it_away(void *page)
{
    while (counter() < 1000)
        ;
    CHECK(munmap(page, 4096) == 0);
    return NULL;
}

static void memory_taken_while_running(void)
{
    shared = looping();
    for (int i = 0; i < 20; i++) {
        pthread_t thread;
        void *page = shared.memory + COUNTER;
        CHECK(pthread_create(&thread, NULL, take_it_away, page) == 0);
        errno = 0;
        CHECK(ioctl(shared.vcpu, KVM_RUN, 0) == -1 && errno == EFAULT);
        CHECK(pthread_join(thread, NULL) == 0);
        CHECK(mmap(page, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == page);
    }
}

static volatile int bus_code;
static void *volatile bus_address;
static void bus(int signal, siginfo_t *info, void *context)
{
    (void)context;
    CHECK(signal == SIGBUS);
    bus_code = info->si_code;
    bus_address = info->si_addr;
}

static void own_fault(void)
{
    fault_address = 0;
    if (sigsetjmp(jump, 1) == 0) {
        *(volatile int *)0x1234 = 1;
        CHECK(0);
    }
    CHECK(fault_address == 0x1234);
}

static void absent_memory_and_handlers(void)
{
    /* Handlers from before the VM. */
    install(SIGSEGV, segv, SA_NODEFER);
    install(SIGBUS, bus, 0);
    struct machine m = from_file(INC_HLT, sizeof INC_HLT);
    for (int how = 0; how < 4; how++) {
        take_away(&m, how);
        expect_absent(&m);
        CHECK(fault_address == 0 && bus_code == 0);
        repair(&m);
    }
    own_fault();
    /* None; and others. */
    struct sigaction action = { .sa_handler = SIG_DFL }, shown;
    CHECK(sigaction(SIGSEGV, &action, &shown) == 0 && shown.sa_sigaction == segv);
    CHECK(sigaction(SIGSEGV, NULL, &shown) == 0 && shown.sa_handler == SIG_DFL);
    take_away(&m, 1);
    expect_absent(&m);
    install(SIGSEGV, segv, SA_NODEFER);
    expect_absent(&m);
    own_fault();
    expect_absent(&m);
    repair(&m);
    expect_halt(&m);
}

static void absent_memory_and_blocked_signals(void)
{
    struct machine m = from_file(INC_HLT, sizeof INC_HLT);
    sigset_t all, none, now;
    sigfillset(&all);
    sigemptyset(&none);
    for (int how = 0; how < 4; how++) {
        take_away(&m, how);
        expect_absent(&m);
        CHECK(pthread_sigmask(SIG_SETMASK, &all, NULL) == 0);
        expect_absent(&m);
        CHECK(pthread_sigmask(SIG_SETMASK, NULL, &now) == 0 && sigismember(&now, SIGSEGV) && sigismember(&now, SIGBUS));
        CHECK(sigpending(&now) == 0 && !sigismember(&now, SIGSEGV) && !sigismember(&now, SIGBUS));
        repair(&m);
        /* One that waits goes on waiting, and keeps nobody from running. */
        CHECK(pthread_kill(pthread_self(), SIGBUS) == 0);
        expect_halt(&m);
        rewind_to(&m, CODE);
        CHECK(sigpending(&now) == 0 && sigismember(&now, SIGBUS));
        CHECK(sigwaitinfo(&all, NULL) == SIGBUS);
        CHECK(pthread_sigmask(SIG_SETMASK, &none, NULL) == 0);
    }
    struct { __u32 length; unsigned char set[8]; } mask = { 8, { 255, 255, 255, 255, 255, 255, 255, 255 } };
    CHECK(ioctl(m.vcpu, KVM_SET_SIGNAL_MASK, &mask) == 0);
    take_away(&m, 3);
    expect_absent(&m);
}

static void *send_bus(void *thread)
{
    while (counter() < 1000)
        ;
    CHECK(pthread_kill(*(pthread_t *)thread, SIGBUS) == 0);
    return NULL;
}

static void a_sent_fault_signal(void)
{
    install(SIGBUS, bus, 0);
    shared = looping();
    pthread_t thread, self = pthread_self();
    CHECK(pthread_create(&thread, NULL, send_bus, &self) == 0);
    errno = 0;
    CHECK(ioctl(shared.vcpu, KVM_RUN, 0) == -1 && errno == EINTR && shared.run->exit_reason == KVM_EXIT_INTR);
    CHECK(bus_code == SI_TKILL);
    CHECK(pthread_join(thread, NULL) == 0);
}

/* How a child ends that takes memory away, sees it absent, and then does something. */
static int end_of(void (*deed)(void))
{
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        struct machine m = from_file(INC_HLT, sizeof INC_HLT);
        take_away(&m, 0);
        expect_absent(&m);
        deed();
        repair(&m);
        expect_halt(&m);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    return WIFSIGNALED(status) ? WTERMSIG(status) : -WEXITSTATUS(status);
}

static void touch_nothing(void) { *(volatile int *)0x1234 = 1; }
static void send_segv(void) { kill(getpid(), SIGSEGV); }
static void ignore_and_send(void) { signal(SIGSEGV, SIG_IGN), kill(getpid(), SIGSEGV); }
static void ignore_and_touch(void) { signal(SIGSEGV, SIG_IGN), touch_nothing(); }
static void touch_beyond_the_file(void)
{
    int fd = memfd_create("empty", 0);
    *(volatile int *)mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) = 1;
}

static void faults_without_handlers(void)
{
    CHECK(end_of(touch_nothing) == SIGSEGV);
    CHECK(end_of(send_segv) == SIGSEGV);
    CHECK(end_of(ignore_and_send) == 0);
    CHECK(end_of(ignore_and_touch) == SIGSEGV);
    CHECK(end_of(touch_beyond_the_file) == SIGBUS);
}

/* Has accesses to the page fail as if its memory had failed: UFFDIO_POISON. False if the host does not let us. */
static int poison(unsigned char *page)
{
    unsigned long api[] = { 0xaa, 1 << 14, 0 }, where[] = { (unsigned long)page, 4096, 1, 0 },
                  what[] = { (unsigned long)page, 4096, 0, 0 };
    int fd = syscall(SYS_userfaultfd, 1 | O_CLOEXEC);
    CHECK(mmap(page, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == page);
    return fd >= 0 && ioctl(fd, 0xc018aa3f, api) == 0 && ioctl(fd, 0xc020aa00, where) == 0
        && ioctl(fd, 0xc020aa08, what) == 0;
}

static void failed_memory(void)
{
    install(SIGBUS, bus, 0);
    struct machine m = from_file(INC_HLT, sizeof INC_HLT);
    if (!poison(m.memory + COUNTER))
        return;
    for (int i = 0; i < 2; i++) {
        bus_code = 0;
        errno = 0;
        CHECK(ioctl(m.vcpu, KVM_RUN, 0) == -1 && errno == EINTR && m.run->exit_reason == KVM_EXIT_INTR);
        CHECK(bus_code == BUS_MCEERR_AR && bus_address == m.memory + COUNTER);
    }
    struct { __u64 gpa, size, flags, padding[5]; } range = { .gpa = COUNTER, .size = 4096 };
    bus_code = 0;
    CHECK(ioctl(m.vcpu, 0xc040aed5, &range) == -1 && errno == EINTR && bus_code == BUS_MCEERR_AR);
    munmap(m.memory + COUNTER, 4096);
    repair(&m);
    expect_halt(&m);
}

/* A counter of a vCPU, by its name (KVM_GET_STATS_FD). */
static unsigned long counter_named(int vcpu, const char *wanted)
{
    struct { __u32 flags, name_size, count, id, descriptions, data; } header;
    struct { __u32 flags; __s16 exponent; __u16 size; __u32 offset, bucket; char name[64]; } row;
    int fd = ioctl(vcpu, KVM_GET_STATS_FD, 0);
    unsigned long value = ~0UL;
    CHECK(fd >= 0 && pread(fd, &header, sizeof header, 0) == sizeof header && header.name_size <= 64);
    for (unsigned i = 0; i < header.count; i++) {
        size_t size = 16 + header.name_size;
        CHECK(pread(fd, &row, size, header.descriptions + i * size) == (ssize_t)size);
        if (!strcmp(row.name, wanted))
            CHECK(pread(fd, &value, 8, header.data + row.offset) == 8);
    }
    close(fd);
    return value;
}

static unsigned char *later;
static void *bring_later(void *fd)
{
    static unsigned char content[4096];
    unsigned long message[4];
    CHECK(read((int)(long)fd, message, 32) == 32 && (message[2] & ~4095UL) == (unsigned long)later);
    memset(content, 0x41, sizeof content);
    unsigned long copy[] = { (unsigned long)later, (unsigned long)content, 4096, 0, 0 };
    CHECK(ioctl((int)(long)fd, 0xc028aa03, copy) == 0);
    return NULL;
}

/* Post-copy migration: the memory of a slot that is there is registered with a userfaultfd. The vCPU does not wait in its access. */
static void memory_registered_later(void)
{
    /* mov ax, 0xffff; mov ds, ax; mov al, [0x10]: at 1 MiB; out dx, al; hlt */
    static const unsigned char code[] = { 0xb8, 0xff, 0xff, 0x8e, 0xd8, 0xa0, 0x10, 0x00, 0xee, 0xf4 };
    enum { SIZE = 4 << 20 };
    struct machine m = machine(code, sizeof code);
    later = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(later != MAP_FAILED);
    struct kvm_userspace_memory_region region = {
        .slot = 1, .guest_phys_addr = 1 << 20, .memory_size = SIZE, .userspace_addr = (unsigned long)later
    };
    CHECK(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    unsigned long api[] = { 0xaa, 0, 0 }, where[] = { (unsigned long)later, SIZE, 1, 0 };
    int fd = syscall(SYS_userfaultfd, 1 | O_CLOEXEC);
    if (fd < 0)
        return;
    CHECK(ioctl(fd, 0xc018aa3f, api) == 0 && ioctl(fd, 0xc020aa00, where) == 0);
    pthread_t server;
    CHECK(pthread_create(&server, NULL, bring_later, (void *)(long)fd) == 0);
    expect_out(&m);
    CHECK(pthread_join(server, NULL) == 0);
    CHECK(counter_named(m.vcpu, "async_pf_faults") == 1);
}

/* lock inc word [0x203f]; hlt: the word's bytes lie in two cache lines. */
static const unsigned char SPLIT_HLT[] = { 0xf0, 0xff, 0x06, 0x3f, 0x20, 0xf4 };
#define SPLIT_BYTE 0x203f
/* ring3's own: the capability that says what becomes of split locks, and an exit. */
#define CAP_SPLIT_LOCK_POLICY 0x52330001
#define EXIT_SPLIT_LOCK 0x52330001
enum policy { POLICY_EXIT = 2, POLICY_KILL = 4, POLICY_EMULATE = 16 };

static void set_policy(struct machine *m, enum policy policy)
{
    struct kvm_enable_cap cap = { .cap = CAP_SPLIT_LOCK_POLICY, .args = { policy } };
    CHECK(ioctl(m->vm, KVM_ENABLE_CAP, &cap) == 0);
}

/* The instruction has done nothing. */
static void expect_refused(struct machine *m)
{
    struct kvm_regs regs;
    CHECK(ioctl(m->vcpu, KVM_GET_REGS, &regs) == 0 && regs.rip == CODE);
    CHECK(m->memory[SPLIT_BYTE] == 0);
}

static void expect_killed(struct machine *m)
{
    bus_code = 0;
    bus_address = m;
    m->run->exit_reason = 0;
    CHECK(ioctl(m->vcpu, KVM_RUN, 0) == 0);
    CHECK(m->run->exit_reason == KVM_EXIT_EXCEPTION);
    CHECK(m->run->ex.exception == 17 && m->run->ex.error_code == 0);
    CHECK(bus_code == BUS_ADRALN && bus_address == NULL);
    expect_refused(m);
}

/* The host is in fatal mode, here and below. */
static void split_lock_efault(void)
{
    install(SIGBUS, bus, 0);
    struct machine m = machine(SPLIT_HLT, sizeof SPLIT_HLT);
    for (int i = 0; i < 2; i++) {
        errno = 0;
        CHECK(ioctl(m.vcpu, KVM_RUN, 0) == -1 && errno == EFAULT);
        expect_refused(&m);
    }
    CHECK(bus_code == 0);
    set_policy(&m, POLICY_EMULATE);
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0 && m.run->exit_reason == KVM_EXIT_HLT && m.memory[SPLIT_BYTE] == 1);
}

static void split_lock_exit(void)
{
    struct machine m = machine(SPLIT_HLT, sizeof SPLIT_HLT);
    set_policy(&m, POLICY_EXIT);
    CHECK(ioctl(m.vcpu, KVM_RUN, 0) == 0 && m.run->exit_reason == EXIT_SPLIT_LOCK);
    struct {
        __u64 rip, linear_address, gpa;
        __u32 size, flags;
        __u8 cpl, length, instruction[15];
    } record;
    memcpy(&record, (char *)m.run + 32, sizeof record);
    CHECK(record.rip == CODE && record.linear_address == SPLIT_BYTE && record.gpa == SPLIT_BYTE);
    CHECK(record.size == 2 && record.flags == 0 && record.cpl == 0);
    CHECK(record.length == 5 && memcmp(record.instruction, SPLIT_HLT, 5) == 0);
    expect_refused(&m);
}

/* By the capability, where efault is what the host has. */
static void split_lock_kill(void)
{
    install(SIGBUS, bus, 0);
    struct machine m = machine(SPLIT_HLT, sizeof SPLIT_HLT);
    set_policy(&m, POLICY_KILL);
    expect_killed(&m);
    expect_killed(&m);
    sigset_t now;
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &now) == 0 && !sigismember(&now, SIGBUS));
}

/* A child's end that makes a split lock after `deed`. */
static int end_of_splitter(void (*deed)(void))
{
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        struct machine m = machine(SPLIT_HLT, sizeof SPLIT_HLT);
        deed();
        ioctl(m.vcpu, KVM_RUN, 0);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    return WIFSIGNALED(status) ? WTERMSIG(status) : -1;
}

static void do_nothing(void) {}
static void ignore_bus(void) { signal(SIGBUS, SIG_IGN); }
static void block_bus(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
}
static void handle_and_block_bus(void) { install(SIGBUS, bus, 0), block_bus(); }

/* The signal is forced: nobody evades it. The host's own policy is kill. */
static void split_lock_kill_is_forced(void)
{
    CHECK(end_of_splitter(do_nothing) == SIGBUS);
    CHECK(end_of_splitter(ignore_bus) == SIGBUS);
    CHECK(end_of_splitter(block_bus) == SIGBUS);
    CHECK(end_of_splitter(handle_and_block_bus) == SIGBUS);
    install(SIGBUS, bus, 0);
    struct machine m = machine(SPLIT_HLT, sizeof SPLIT_HLT);
    expect_killed(&m);
}

static void read_file(const char *path, char *text, size_t size)
{
    FILE *file = fopen(path, "r");
    CHECK(file && fgets(text, size, file));
    fclose(file);
}

static void files(void)
{
    struct stat by_path, by_fd;
    CHECK(stat("/dev/kvm", &by_path) == 0 && S_ISCHR(by_path.st_mode));
    CHECK(by_path.st_rdev == makedev(10, 232));
    CHECK(access("/dev/kvm", R_OK | W_OK) == 0);
    int kvm = openat(AT_FDCWD, "/dev/kvm", O_RDWR);
    CHECK(fstat(kvm, &by_fd) == 0 && by_fd.st_rdev == by_path.st_rdev);
    CHECK(fcntl(kvm, F_GETFD) == 0);
    int dev = open("/dev", O_RDONLY | O_DIRECTORY);
    int relative = openat(dev, "kvm", O_RDWR | O_CLOEXEC);
    CHECK(fcntl(relative, F_GETFD) == FD_CLOEXEC);
    CHECK(ioctl(relative, KVM_GET_API_VERSION, 0) == 12);

    char text[16];
    read_file("/sys/module/kvm/parameters/force_emulation_prefix", text, sizeof text);
    CHECK(strcmp(text, "0\n") == 0);
    read_file("/sys/module/kvm_intel/parameters/ept", text, sizeof text);
    CHECK(strcmp(text, "Y\n") == 0);
    read_file("/proc/sys/kernel/split_lock_mitigate", text, sizeof text);
    CHECK(strcmp(text, "1\n") == 0);
    CHECK(open("/proc/sys/kernel/split_lock_mitigate", O_WRONLY) == -1 && errno == EACCES);
    CHECK(open("/sys/module/kvm_amd/parameters/npt", O_RDONLY) == -1 && errno == ENOENT);
    CHECK(open("/sys/module/kvm/parameters/ignore_msrs", O_WRONLY) == -1 && errno == EACCES);
    int ept = open("/sys/module/kvm_intel/parameters/ept", O_RDONLY);
    CHECK(pread(ept, text, 1, 0) == 1 && text[0] == 'Y');
}

/* With kernel.split_lock_mitigate=0. */
static void split_lock_mitigate(void)
{
    char text[16];
    read_file("/proc/sys/kernel/split_lock_mitigate", text, sizeof text);
    CHECK(strcmp(text, "0\n") == 0);
}

/* The same calls by syscall(2). */
static void system_calls(void)
{
    int kvm = syscall(SYS_openat, AT_FDCWD, "/dev/kvm", O_RDWR, 0);
    CHECK(kvm >= 0);
    CHECK(syscall(SYS_ioctl, kvm, KVM_GET_API_VERSION, 0) == 12);
    unsigned long long how[3] = { O_RDWR | O_CLOEXEC, 0, 0 };
    int second = syscall(SYS_openat2, AT_FDCWD, "/dev/kvm", how, sizeof how);
    CHECK(second >= 0 && ioctl(second, KVM_GET_API_VERSION, 0) == 12);
    CHECK(fcntl(second, F_GETFD) == FD_CLOEXEC && close(second) == 0);
    CHECK(syscall(SYS_openat2, AT_FDCWD, "/dev/kvm", how, 8L) == -1 && errno == EINVAL);
    CHECK(syscall(SYS_openat2, AT_FDCWD, "/dev/kvm", (void *)8, sizeof how) == -1 && errno == EFAULT);
    int null = syscall(SYS_openat2, AT_FDCWD, "/dev/null", how, sizeof how);
    CHECK(null >= 0 && close(null) == 0);
    CHECK(syscall(SYS_close, kvm) == 0);
    CHECK(syscall(SYS_ioctl, kvm, KVM_GET_API_VERSION, 0) == -1 && errno == EBADF);
    /* Six arguments arrive. */
    void *at = (void *)syscall(SYS_mmap, NULL, 4096L, (long)PROT_READ, (long)(MAP_PRIVATE | MAP_ANONYMOUS), -1L, 0L);
    CHECK(at != MAP_FAILED && *(char *)at == 0);
    CHECK(syscall(SYS_gettid) == getpid());
    CHECK(syscall(SYS_read, -1, NULL, 0L) == -1 && errno == EBADF);
    struct {
        void (*handler)(int);
        unsigned long flags;
        void (*restorer)(void);
        unsigned long mask;
    } action = { SIG_IGN, 0, NULL, 0 }, old;
    CHECK(syscall(SYS_rt_sigaction, SIGUSR1, &action, NULL, 8L) == 0);
    CHECK(syscall(SYS_rt_sigaction, SIGUSR1, NULL, &old, 8L) == 0 && old.handler == SIG_IGN);
    unsigned long supported = 0;
    CHECK(syscall(SYS_arch_prctl, 0x1021L, &supported) == 0 && (supported & 3) == 3);
    CHECK(syscall(SYS_arch_prctl, 0x1025L, 99L) == -1 && errno == EINVAL);
    unsigned long fs = 0;
    CHECK(syscall(SYS_arch_prctl, 0x1003L, &fs) == 0 && fs != 0);
}

/* What is no business of ours goes its way. */
static void other_ioctls(void)
{
    int pipes[2], ready = -1;
    CHECK(pipe(pipes) == 0 && write(pipes[1], "abc", 3) == 3);
    CHECK(ioctl(pipes[0], FIONREAD, &ready) == 0 && ready == 3);
    CHECK(ioctl(pipes[0], KVM_GET_API_VERSION, 0) == -1 && errno == ENOTTY);
    CHECK(ioctl(-1, KVM_RUN, 0) == -1 && errno == EBADF);
    CHECK(open("/dev/no-such-device", O_RDWR) == -1 && errno == ENOENT);
}

static void *sum_up(void *handled_by)
{
    (void)handled_by;
    sigset_t mask;
    pthread_sigmask(SIG_BLOCK, NULL, &mask);
    return (void *)(long)sigismember(&mask, SIGUSR1);
}

/* Threads of the client's have the mask that it gave them; ours take none of its signals. */
static void thread_masks(void)
{
    shared = machine(OUT_HLT, sizeof OUT_HLT);
    install(SIGUSR1, once, 0);
    expect_out(&shared);
    pthread_t thread;
    void *blocked;
    CHECK(pthread_create(&thread, NULL, sum_up, NULL) == 0 && pthread_join(thread, &blocked) == 0);
    CHECK(!blocked);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
    int vm = ioctl(shared.kvm, KVM_CREATE_VM, 0);
    CHECK(ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0);
    kill(getpid(), SIGUSR1);
    usleep(50000);
    CHECK(handled == 0);
    sigset_t pending;
    CHECK(sigpending(&pending) == 0 && sigismember(&pending, SIGUSR1));
}

static int count_descriptors(void)
{
    int count = 0;
    for (int fd = 0; fd < 4096; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static void no_leaks(void)
{
    struct machine first = machine(OUT_HLT, sizeof OUT_HLT);
    int before = 0;
    for (int i = 0; i < 200; i++) {
        struct machine m = machine(OUT_HLT, sizeof OUT_HLT);
        expect_out(&m);
        munmap(m.run, ioctl(m.kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
        munmap(m.memory, MEMORY);
        close(m.vcpu);
        close(m.vm);
        close(m.kvm);
        if (i == 0)
            before = count_descriptors();
    }
    CHECK(count_descriptors() == before);
    expect_out(&first);
}

enum { GET_SUPPORTED = 0x1021, GET_GUEST = 0x1024, REQUEST_GUEST = 0x1025, TILES = 18 };

/* What guests may use. */
static unsigned long guest_permission(void)
{
    unsigned long permitted = 0;
    CHECK(syscall(SYS_arch_prctl, (long)GET_GUEST, &permitted) == 0);
    return permitted >> TILES & 1;
}

static int permission_after_exec(void)
{
    CHECK(guest_permission() == 0);
    shared = machine(OUT_HLT, sizeof OUT_HLT);
    CHECK(syscall(SYS_arch_prctl, (long)REQUEST_GUEST, (long)TILES) == -1 && errno == EBUSY);
    return 0;
}

/* Permission to give guests tiles is inherited by children, ends with the program, and is frozen by the first vCPU. */
static void guest_permissions(void)
{
    unsigned long supported = 0;
    CHECK(syscall(SYS_arch_prctl, (long)GET_SUPPORTED, &supported) == 0 && (supported >> 17 & 3) == 3);
    CHECK(guest_permission() == 0);
    CHECK(syscall(SYS_arch_prctl, (long)REQUEST_GUEST, 17L) == -1 && errno == EOPNOTSUPP);
    CHECK(syscall(SYS_arch_prctl, (long)REQUEST_GUEST, 19L) == -1 && errno == EINVAL);
    int kvm = open("/dev/kvm", O_RDWR);
    CHECK(ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2) == 4096);
    CHECK(syscall(SYS_arch_prctl, (long)REQUEST_GUEST, (long)TILES) == 0 && guest_permission() == 1);
    CHECK(ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2) == 11008);
    pid_t child = fork();
    if (child == 0) {
        CHECK(guest_permission() == 1);
        execl("/proc/self/exe", "client", "permission_after_exec", NULL);
        _exit(3);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    shared = machine(OUT_HLT, sizeof OUT_HLT);
    CHECK(syscall(SYS_arch_prctl, (long)REQUEST_GUEST, (long)TILES) == 0);
}

static const struct {
    const char *name;
    void (*run)(void);
} behaviours[] = {
    { "exits", exits },
    { "descriptors", descriptors },
    { "unseen_descriptors", unseen_descriptors },
    { "passed_descriptors", passed_descriptors },
    { "forked", forked },
    { "forked_during_first_use", forked_during_first_use },
    { "inherited", inherited },
    { "signals", signals },
    { "signal_storm", signal_storm },
    { "signal_while_halted", signal_while_halted },
    { "signal_while_waiting", signal_while_waiting },
    { "handler_that_jumps", handler_that_jumps },
    { "handler_for_one_time", handler_for_one_time },
    { "immediate_exit", immediate_exit },
    { "immediate_exit_in_handler", immediate_exit_in_handler },
    { "signal_mask", signal_mask },
    { "cancel_deferred", cancel_deferred },
    { "cancel_asynchronous", cancel_asynchronous },
    { "own_faults", own_faults },
    { "absent_memory", absent_memory },
    { "memory_taken_while_running", memory_taken_while_running },
    { "absent_memory_and_handlers", absent_memory_and_handlers },
    { "absent_memory_and_blocked_signals", absent_memory_and_blocked_signals },
    { "a_sent_fault_signal", a_sent_fault_signal },
    { "faults_without_handlers", faults_without_handlers },
    { "failed_memory", failed_memory },
    { "memory_registered_later", memory_registered_later },
    { "split_lock_efault", split_lock_efault },
    { "split_lock_exit", split_lock_exit },
    { "split_lock_kill", split_lock_kill },
    { "split_lock_kill_is_forced", split_lock_kill_is_forced },
    { "split_lock_mitigate", split_lock_mitigate },
    { "files", files },
    { "system_calls", system_calls },
    { "other_ioctls", other_ioctls },
    { "guest_permissions", guest_permissions },
    { "thread_masks", thread_masks },
    { "no_leaks", no_leaks },
};

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "after_exec") == 0)
        return after_exec(atoi(argv[2]), atoi(argv[3]));
    CHECK(argc == 2);
    if (strcmp(argv[1], "permission_after_exec") == 0)
        return permission_after_exec();
    for (size_t i = 0; i < sizeof behaviours / sizeof *behaviours; i++) {
        if (strcmp(behaviours[i].name, argv[1]) == 0) {
            alarm(300); /* An end to what would hang. */
            behaviours[i].run();
            return 0;
        }
    }
    fprintf(stderr, "no behaviour %s\n", argv[1]);
    return 2;
}
