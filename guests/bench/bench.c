/* Workloads that `cargo xtask bench` runs as the guest's /init, under ring3 and under QEMU's TCG.
 *
 * For each: "BEGIN name", the work, "END name checksum". The host measures CPU time between the two lines; the
 * checksum shows that both did the same work. Built by `cargo xtask bench` with gcc -O2 -static. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t state = 88172645463325252ull;
static uint64_t xorshift(void)
{
	state ^= state << 13, state ^= state >> 7, state ^= state << 17;
	return state;
}

static uint64_t int_sieve(void)
{
	static uint8_t composite[1 << 20];
	uint64_t primes = 0;
	for (int round = 0; round < 4; round++) {
		memset(composite, 0, sizeof composite);
		for (uint32_t i = 2; i < sizeof composite; i++) {
			if (composite[i])
				continue;
			primes++;
			for (uint64_t j = (uint64_t)i * i; j < sizeof composite; j += i)
				composite[j] = 1;
		}
	}
	return primes;
}

static int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
static uint64_t int_fib(void) { return fib(31); }

static uint64_t int_crc(void)
{
	uint32_t crc = ~0u;
	for (int i = 0; i < 3000000; i++) {
		crc ^= i & 255;
		for (int k = 0; k < 8; k++)
			crc = crc >> 1 ^ (0xedb88320 & -(crc & 1));
	}
	return crc;
}

/* Ten register instructions an iteration, nothing else: the rate of simple instructions. */
static uint64_t int_simple(void)
{
	uint64_t a = 1, b = 2, c = 3, n = 20000000;
	__asm__ volatile("1: add %1, %0; xor %2, %1; lea 5(%2,%0), %2; mov %0, %%rax; shr $3, %%rax;"
			 "sub %%rax, %1; and $0x7fffffff, %2; add $7, %0; dec %3; jnz 1b"
			 : "+r"(a), "+r"(b), "+r"(c), "+r"(n)::"rax", "cc");
	return a ^ b ^ c;
}

static int compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return x < y ? -1 : x > y;
}
static uint64_t int_qsort(void)
{
	static uint32_t v[1 << 18];
	for (size_t i = 0; i < sizeof v / sizeof *v; i++)
		v[i] = xorshift();
	qsort(v, sizeof v / sizeof *v, sizeof *v, compare);
	return v[12345];
}

static uint64_t mem_chase(void)
{
	static uint32_t next[1 << 20];
	uint32_t n = sizeof next / sizeof *next, at = 0;
	for (uint32_t i = 0; i < n; i++)
		next[i] = (i * 1664525u + 1013904223u) & (n - 1);
	for (int i = 0; i < 6000000; i++)
		at = next[at];
	return at;
}

static uint64_t mem_sum(void)
{
	static uint64_t v[1 << 18];
	uint64_t sum = 0;
	for (int round = 0; round < 60; round++)
		for (size_t i = 0; i < sizeof v / sizeof *v; i++)
			sum += v[i] += i;
	return sum;
}

static uint64_t rep_movs(void)
{
	static uint8_t a[1 << 20], b[1 << 20];
	for (int i = 0; i < 400; i++) {
		void *d = i & 1 ? a : b;
		const void *s = i & 1 ? b : a;
		size_t n = sizeof a;
		__asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(n)::"memory");
	}
	return a[77];
}

static uint64_t rep_stos(void)
{
	static uint8_t a[1 << 20];
	for (int i = 0; i < 400; i++) {
		void *d = a;
		size_t n = sizeof a / 8;
		__asm__ volatile("rep stosq" : "+D"(d), "+c"(n) : "a"(i * 0x0101010101010101ull) : "memory");
	}
	return a[77];
}

static uint64_t fp_nbody(void)
{
	double p[5][3], v[5][3] = { { 0 } }, m[5];
	for (int i = 0; i < 5; i++) {
		m[i] = 1.0 / (i + 1);
		for (int k = 0; k < 3; k++)
			p[i][k] = (i * 3 + k) * 0.7 + 0.1 * k * k;
	}
	for (int step = 0; step < 60000; step++) {
		for (int i = 0; i < 5; i++)
			for (int j = i + 1; j < 5; j++) {
				double d[3], r = 0;
				for (int k = 0; k < 3; k++)
					d[k] = p[i][k] - p[j][k], r += d[k] * d[k];
				double f = 0.001 / (r * sqrt(r));
				for (int k = 0; k < 3; k++)
					v[i][k] -= d[k] * m[j] * f, v[j][k] += d[k] * m[i] * f;
			}
		for (int i = 0; i < 5; i++)
			for (int k = 0; k < 3; k++)
				p[i][k] += 0.001 * v[i][k];
	}
	uint64_t bits;
	memcpy(&bits, &p[2][1], 8);
	return bits;
}

static uint64_t fp_x87(void)
{
	volatile long double x = 0.5L;
	for (int i = 0; i < 600000; i++)
		x = x * 1.000001L + 1.0L / (i + 1) - x * 0.000002L;
	uint64_t bits;
	long double last = x;
	memcpy(&bits, &last, 8);
	return bits;
}

static uint64_t simd_sse2(void)
{
	__m128i a = _mm_set1_epi32(1), b = _mm_set1_epi32(0x1234567), c = a;
	for (int i = 0; i < 1500000; i++) {
		a = _mm_add_epi32(_mm_mullo_epi16(a, b), c);
		b = _mm_xor_si128(_mm_srli_epi32(b, 3), a);
		c = _mm_sub_epi16(_mm_shuffle_epi32(c, 0x1b), b);
	}
	return _mm_cvtsi128_si64(_mm_xor_si128(a, _mm_xor_si128(b, c)));
}

__attribute__((target("avx2,fma"))) static uint64_t simd_avx2(void)
{
	__m256d a = _mm256_set1_pd(1.5), b = _mm256_set1_pd(0.999), c = _mm256_set1_pd(1e-3);
	__m256i x = _mm256_set1_epi32(77), y = _mm256_set1_epi32(0x1234567);
	for (int i = 0; i < 1500000; i++) {
		a = _mm256_fmadd_pd(a, b, c);
		x = _mm256_add_epi32(_mm256_mullo_epi32(x, y), _mm256_set1_epi32(i));
		y = _mm256_xor_si256(_mm256_srli_epi32(y, 5), x);
	}
	return _mm256_extract_epi64(_mm256_xor_si256(x, _mm256_castpd_si256(a)), 1);
}

static uint64_t sys_getppid(void)
{
	uint64_t sum = 0;
	for (int i = 0; i < 200000; i++)
		sum += syscall(SYS_getppid);
	return sum;
}

static uint64_t mm_fault(void)
{
	uint64_t sum = 0;
	for (int round = 0; round < 10; round++) {
		size_t size = 4 << 20;
		volatile uint8_t *p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		for (size_t i = 0; i < size; i += 4096)
			p[i] = i >> 12, sum += p[i];
		munmap((void *)p, size);
	}
	return sum;
}

static uint64_t proc_fork(void)
{
	uint64_t sum = 0;
	for (int i = 0; i < 150; i++) {
		pid_t pid = fork();
		int status;
		if (!pid)
			_exit(i & 63);
		waitpid(pid, &status, 0);
		sum += WEXITSTATUS(status);
	}
	return sum;
}

static const struct {
	const char *name;
	uint64_t (*run)(void);
} work[] = {
	{ "int.simple", int_simple }, { "int.sieve", int_sieve }, { "int.fib", int_fib },	{ "int.crc", int_crc },
	{ "int.qsort", int_qsort },   { "mem.chase", mem_chase }, { "mem.sum", mem_sum },	{ "rep.movs", rep_movs },
	{ "rep.stos", rep_stos },     { "fp.nbody", fp_nbody },	  { "fp.x87", fp_x87 },		{ "simd.sse2", simd_sse2 },
	{ "simd.avx2", simd_avx2 },   { "sys.getppid", sys_getppid }, { "mm.fault", mm_fault }, { "proc.fork", proc_fork },
};

int main(int argc, char **argv)
{
	setvbuf(stdout, 0, _IONBF, 0);
	if (getpid() == 1) {
		mkdir("/dev", 0755);
		mount("dev", "/dev", "devtmpfs", 0, 0);
		int console = open("/dev/console", O_RDWR);
		if (console >= 0)
			dup2(console, 0), dup2(console, 1), dup2(console, 2);
	}
	printf("INIT\n");
	for (size_t i = 0; i < sizeof work / sizeof *work; i++) {
		if (argc > 1 && getpid() != 1 && !strstr(argv[1], work[i].name))
			continue;
		printf("BEGIN %s\n", work[i].name);
		uint64_t check = work[i].run();
		printf("END %s %016llx\n", work[i].name, (unsigned long long)check);
	}
	printf("DONE\n");
	if (getpid() == 1)
		reboot(RB_POWER_OFF);
	return 0;
}
