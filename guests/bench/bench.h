/* What the workloads of `cargo xtask bench` share. See main.c. */
#ifndef BENCH_H
#define BENCH_H
#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef uint64_t u64;
typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;

/* A mark that a tracer of instructions finds by its bytes: nopl disp32(%rax), the displacement being 0x4245
 * and the mark's number. */
#define MARK(id) __asm__ volatile(".byte 0x0f,0x1f,0x80; .word %c0, 0x4245" ::"i"(id) : "memory")
enum { MARK_INIT = 1, MARK_BEGIN, MARK_END, MARK_DONE };

/* Does n units of work; the sum that it gives must not depend on the machine. */
typedef u64 work(u64 n);

/* What a workload needs, and what its sum is worth. */
enum {
	F_FULL = 1,   /* Debian's programs: the full image */
	F_SMP = 2,    /* two processors */
	F_GUEST = 4,  /* ports */
	F_AVX2 = 8,
	F_AES = 16,
	F_NOSUM = 32, /* the sum is left to chance */
	F_FMA = 64,
	F_SSE42 = 128,
};

struct bench {
	const char *name;
	work *fn;
	u64 iters; /* units at scale 1000 */
	const char *unit;
	unsigned flags;
};

/* Adds v to the sum h. */
static inline u64 mix(u64 h, u64 v)
{
	h ^= v;
	h *= 0x9E3779B97F4A7C15ull;
	return h ^ (h >> 29);
}

/* Numbers that look random and are the same every time. */
static inline u32 lcg(u32 *s)
{
	return *s = *s * 1664525u + 1013904223u;
}

/* Keeps the caller on one processor. */
static inline void pin(int cpu)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof set, &set);
}

/* main.c: prints to the console, unbuffered. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* app.c: makes the files that the programs read, unless they are there. */
void prepare_files(void);

work b_list, b_matrix, b_crc, b_state;						   /* int.c */
work b_sieve, b_fib, b_interp, b_qsort;						   /* branch.c */
work b_memcpy, b_memset, b_repmovs, b_smallcpy, b_triad, b_chase_s, b_chase_l;	   /* mem.c */
work b_nbody, b_x87, b_libm, b_divsqrt;						   /* fp.c */
work b_sse2i, b_sse2d, b_avx2i, b_fma, b_aesni, b_crc32i;			   /* simd.c */
work b_getppid, b_clock, b_sig, b_segv, b_pio;					   /* sys.c */
work b_ctx, b_fork, b_exec, b_execdyn, b_fault, b_mprotect, b_cow;		   /* sys.c */
work b_smc, b_cold;								   /* code.c */
work b_atomic1, b_atomic, b_indep, b_mutex;					   /* smp.c */
work a_sha256, a_aes, a_zstd, a_unzstd, a_xz, a_sqlite, a_python, a_shell;	   /* app.c */
#endif
