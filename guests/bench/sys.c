/* The kernel: system calls, signals, processes, memory management; and port reads. */
#include "bench.h"

#include <signal.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

/* Private memory of n bytes that is not there until it is touched. */
static u8 *anonymous(size_t n)
{
	return mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/* The shortest system call. */
u64 b_getppid(u64 n)
{
	for (u64 k = 0; k < n * 1000; k++)
		syscall(SYS_getppid);
	return 0;
}

/* The clock through the vDSO. */
u64 b_clock(u64 n)
{
	struct timespec t;
	for (u64 k = 0; k < n * 1000; k++)
		clock_gettime(CLOCK_MONOTONIC, &t);
	return 0;
}

static volatile int hits;

static void onsig(int s)
{
	(void)s;
	hits++;
}

/* Signals to oneself. */
u64 b_sig(u64 n)
{
	struct sigaction a = {0};
	a.sa_handler = onsig;
	sigaction(SIGUSR1, &a, 0);
	hits = 0;
	pid_t me = getpid();
	for (u64 k = 0; k < n * 1000; k++)
		syscall(SYS_kill, me, SIGUSR1);
	return (u64)hits - n * 1000;
}

static u8 *guard;

static void onsegv(int s)
{
	(void)s;
	hits++;
	mprotect(guard, 4096, PROT_READ | PROT_WRITE);
}

/* Faults that a handler repairs with mprotect. */
u64 b_segv(u64 n)
{
	struct sigaction a = {0};
	a.sa_handler = onsegv;
	sigaction(SIGSEGV, &a, 0);
	hits = 0;
	guard = anonymous(4096);
	guard[0] = 1;
	for (u64 k = 0; k < n * 1000; k++) {
		mprotect(guard, 4096, PROT_READ);
		*(volatile u8 *)guard = k;
	}
	munmap(guard, 4096);
	signal(SIGSEGV, SIG_DFL);
	return (u64)hits - n * 1000;
}

/* Bytes to and fro between two processes on one processor. */
u64 b_ctx(u64 n)
{
	int a[2], b[2];
	if (pipe(a) || pipe(b))
		return 1;
	pin(0);
	pid_t p = fork();
	char c = 0;
	if (!p) {
		for (u64 k = 0; k < n * 1000; k++) {
			if (read(a[0], &c, 1) != 1)
				_exit(1);
			c++;
			if (write(b[1], &c, 1) != 1)
				_exit(1);
		}
		_exit(0);
	}
	for (u64 k = 0; k < n * 1000; k++) {
		if (write(a[1], &c, 1) != 1 || read(b[0], &c, 1) != 1)
			break;
	}
	int st;
	waitpid(p, &st, 0);
	close(a[0]);
	close(a[1]);
	close(b[0]);
	close(b[1]);
	return (u8)c;
}

/* fork, exit, wait. */
u64 b_fork(u64 n)
{
	int st;
	u64 h = 0;
	pin(0);
	for (u64 k = 0; k < n * 10; k++) {
		pid_t p = fork();
		if (!p)
			_exit(k & 63);
		waitpid(p, &st, 0);
		h += WEXITSTATUS(st);
	}
	return h;
}

/* vfork, exec, exit, wait. */
static u64 doexec(u64 n, const char *path)
{
	int st;
	u64 h = 0;
	pin(0);
	for (u64 k = 0; k < n * 10; k++) {
		pid_t p = vfork();
		if (!p) {
			execl(path, "true", (char *)0);
			_exit(127);
		}
		waitpid(p, &st, 0);
		h += WEXITSTATUS(st);
	}
	return h;
}

u64 b_exec(u64 n)
{
	return doexec(n, "/bin/strue");
}

u64 b_execdyn(u64 n)
{
	return doexec(n, "/bin/true");
}

/* First touches of 4 MiB, page by page. */
u64 b_fault(u64 n)
{
	size_t Z = 4 << 20;
	u64 h = 0;
	for (u64 k = 0; k < n; k++) {
		u8 *p = anonymous(Z);
		madvise(p, Z, MADV_NOHUGEPAGE);
		for (size_t i = 0; i < Z; i += 4096)
			p[i] = i >> 12;
		h += p[4096 * (k & 511)];
		munmap(p, Z);
	}
	return h;
}

/* Takes the write permission of 64 KiB and gives it back. */
u64 b_mprotect(u64 n)
{
	u8 *p = anonymous(64 << 10);
	memset(p, 1, 64 << 10);
	for (u64 k = 0; k < n * 1000; k++) {
		mprotect(p, 64 << 10, PROT_READ);
		mprotect(p, 64 << 10, PROT_READ | PROT_WRITE);
		*(volatile u8 *)(p + 4096) = k;
	}
	munmap(p, 64 << 10);
	return 0;
}

/* A child that writes to each page of 4 MiB of its parent's. */
u64 b_cow(u64 n)
{
	size_t Z = 4 << 20;
	u8 *p = anonymous(Z);
	madvise(p, Z, MADV_NOHUGEPAGE);
	memset(p, 1, Z);
	u64 h = 0;
	int st;
	pin(0);
	for (u64 k = 0; k < n; k++) {
		pid_t c = fork();
		if (!c) {
			for (size_t i = 0; i < Z; i += 4096)
				p[i]++;
			_exit(p[0]);
		}
		waitpid(c, &st, 0);
		h += WEXITSTATUS(st);
	}
	munmap(p, Z);
	return h;
}

/* Reads of the serial port's line status. */
u64 b_pio(u64 n)
{
	u64 h = 0;
	if (ioperm(0x3f8, 8, 1))
		return 1;
	for (u64 k = 0; k < n * 1000; k++)
		h |= inb(0x3fd) & 0x80;
	ioperm(0x3f8, 8, 0);
	return h;
}
