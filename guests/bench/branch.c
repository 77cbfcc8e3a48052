/* Branches, calls and indirect jumps. */
#include "bench.h"

/* Primes below 512 Ki. */
u64 b_sieve(u64 n)
{
	enum { N = 1 << 19 };
	static u8 f[N];
	u64 h = 0;
	for (u64 k = 0; k < n; k++) {
		memset(f, 1, N);
		int c = 0;
		for (int i = 2; i < N; i++)
			if (f[i]) {
				c++;
				for (int j = i + i; j < N; j += i)
					f[j] = 0;
			}
		h = mix(h, c + k);
	}
	return h;
}

/* The barriers keep the compiler from unrolling the recursion. */
__attribute__((noinline, noclone)) static u64 fib(u64 n)
{
	__asm__ volatile("" ::: "memory");
	if (n < 2)
		return n;
	u64 a = fib(n - 1);
	__asm__ volatile("" : "+r"(a));
	return a + fib(n - 2);
}

/* fib(22): calls and returns. */
u64 b_fib(u64 n)
{
	u64 h = 0;
	for (u64 k = 0; k < n; k++)
		h = mix(h, fib(22));
	return h;
}

/* An interpreter of bytecode: indirect jumps through a table. */
u64 b_interp(u64 n)
{
	static const u8 P[] = {0, 1, 2, 3, 4, 5, 1, 6, 3, 2, 7, 0, 4, 4, 1, 5, 6, 2, 3, 8};
	u64 a = 1, b = 2, c = 3, h = 0;
	static void *const T[] = {&&o0, &&o1, &&o2, &&o3, &&o4, &&o5, &&o6, &&o7, &&o8};
	for (u64 k = 0; k < n; k++) {
		const u8 *p = P;
		u32 r = 200;
#define NEXT goto *T[*p++]
		NEXT;
o0:
		a += b;
		NEXT;
o1:
		b ^= a >> 3;
		NEXT;
o2:
		c = c * 5 + a;
		NEXT;
o3:
		a = (a << 7) | (a >> 57);
		NEXT;
o4:
		if (c & 1)
			b += 3;
		else
			b -= 1;
		NEXT;
o5:
		c ^= b;
		NEXT;
o6:
		a -= c;
		NEXT;
o7:
		b = b * 3 + 1;
		NEXT;
o8:
		if (--r) {
			p = P;
			NEXT;
		}
		h = mix(h, a ^ b ^ c);
	}
	return h;
#undef NEXT
}

static int cmpu(const void *x, const void *y)
{
	u64 a = *(u64 *)x, b = *(u64 *)y;
	return a < b ? -1 : a > b;
}

/* The C library's qsort over 20,000 numbers. */
u64 b_qsort(u64 n)
{
	enum { N = 20000 };
	static u64 a[N];
	u32 s = 5;
	u64 h = 0;
	for (u64 k = 0; k < n; k++) {
		for (int i = 0; i < N; i++)
			a[i] = ((u64)lcg(&s) << 20) ^ lcg(&s);
		qsort(a, N, 8, cmpu);
		h = mix(h, a[N / 2]);
	}
	return h;
}
