/* Memory: the C library's copies, string instructions, streams, chains of loads. */
#include "bench.h"

/* A buffer of at least n bytes, of pages that are there. */
static u8 *big(size_t n)
{
	static u8 *p;
	static size_t z;
	if (z < n) {
		free(p);
		p = aligned_alloc(4096, n);
		z = n;
		memset(p, 0x5a, n);
	}
	return p;
}

/* 2 MiB, by the C library. */
u64 b_memcpy(u64 n)
{
	enum { Z = 2 << 20 };
	u8 *p = big(2 * Z);
	for (u64 k = 0; k < n; k++) {
		p[k % Z] = k;
		memcpy(p + Z, p, Z);
		__asm__ volatile("" ::: "memory");
	}
	return p[Z + (n - 1) % Z];
}

/* 2 MiB, by the C library. */
u64 b_memset(u64 n)
{
	enum { Z = 2 << 20 };
	u8 *p = big(Z);
	for (u64 k = 0; k < n; k++) {
		memset(p, (int)k, Z);
		__asm__ volatile("" ::: "memory");
	}
	return p[Z - 1];
}

/* REP MOVSB of 64 KiB. */
u64 b_repmovs(u64 n)
{
	enum { Z = 64 << 10 };
	u8 *p = big(2 * Z);
	for (u64 k = 0; k < n; k++) {
		void *d = p + Z, *s = p;
		size_t c = Z;
		p[k % Z] = k;
		__asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(c) : : "memory");
	}
	return p[Z + (n - 1) % Z];
}

/* A thousand copies of 0 to 127 bytes. */
u64 b_smallcpy(u64 n)
{
	static u8 a[8192], d[8192];
	u32 s = 11;
	u64 h = 0;
	void *(*volatile cpy)(void *, const void *, size_t) = memcpy;
	for (int i = 0; i < 8192; i++)
		a[i] = i;
	for (u64 k = 0; k < n; k++) {
		for (int i = 0; i < 1000; i++) {
			u32 r = lcg(&s);
			size_t z = (r >> 25);
			cpy(d + ((r >> 8) & 4095), a + ((r >> 13) & 4095), z);
		}
		h = mix(h, d[k & 4095]);
	}
	return h;
}

/* Two streams of 1 MiB in, one out. */
__attribute__((optimize("no-tree-vectorize"))) u64 b_triad(u64 n)
{
	enum { N = 1 << 17 };
	u64 *a = (u64 *)big(3 * N * 8), *b = a + N, *c = b + N;
	for (int i = 0; i < N; i++) {
		b[i] = i;
		c[i] = 3 * i;
	}
	u64 h = 0;
	for (u64 k = 0; k < n; k++) {
		for (int i = 0; i < N; i++)
			a[i] = b[i] + 5 * c[i] + k;
		h = mix(h, a[k % N]);
	}
	return h;
}

/* Loads each of which has the next one's address: one word in each of N lines of 64 bytes, in a random cycle (Sattolo). */
static u64 chase(u64 n, u32 N)
{
	u32 *p = (u32 *)big((size_t)N * 64);
	for (u32 i = 0; i < N; i++)
		p[i * 16] = i;
	u32 s = 99;
	for (u32 i = N - 1; i > 0; i--) {
		u32 j = (u32)(((u64)lcg(&s) * i) >> 32);
		u32 t = p[i * 16];
		p[i * 16] = p[j * 16];
		p[j * 16] = t;
	}
	u32 x = 0;
	for (u64 k = 0; k < n * 1000; k++)
		x = p[x * 16];
	return x;
}

/* 16 KiB. */
u64 b_chase_s(u64 n)
{
	return chase(n, 256);
}

/* 64 MiB. */
u64 b_chase_l(u64 n)
{
	return chase(n, 1 << 20);
}
