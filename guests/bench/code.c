/* Code that changes, and code that is new. */
#include "bench.h"

#include <sys/mman.h>

/* Writes the immediate of "mov $imm, %eax; add $1, %eax; ret" and calls it, over and over. */
u64 b_smc(u64 n)
{
	int all = PROT_READ | PROT_WRITE | PROT_EXEC;
	u8 *p = mmap(0, 4096, all, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return 1;
	static const u8 c[] = {0xb8, 0, 0, 0, 0, 0x05, 1, 0, 0, 0, 0xc3};
	memcpy(p, c, sizeof c);
	u64 h = 0;
	int (*f)(void) = (int (*)(void))p;
	for (u64 k = 0; k < n * 1000; k++) {
		*(volatile u32 *)(p + 1) = (u32)k;
		h += f();
	}
	munmap(p, 4096);
	return h;
}

/* Writes 64 KiB of code in a straight line, runs it twice and drops it. */
u64 b_cold(u64 n)
{
	size_t Z = 64 << 10;
	u32 s = 77;
	u64 h = 0;
	for (u64 k = 0; k < n; k++) {
		u8 *p = mmap(0, Z, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		size_t i = 0;
		p[i++] = 0x31;
		p[i++] = 0xc0;
		p[i++] = 0x31;
		p[i++] = 0xd2;
		while (i < Z - 32) {
			u32 r = lcg(&s);
			switch ((r >> 28) & 3) {
			case 0: /* add $imm, %eax */
				p[i++] = 0x05;
				memcpy(p + i, &r, 4);
				i += 4;
				break;
			case 1: /* xor %rax, %rdx */
				p[i++] = 0x48;
				p[i++] = 0x31;
				p[i++] = 0xc2;
				break;
			case 2: /* lea d(%rax,%rdx,4), %eax */
				p[i++] = 0x8d;
				p[i++] = 0x44;
				p[i++] = 0x90;
				p[i++] = (u8)(r >> 20);
				break;
			default: /* cmp $imm, %edx; je +2; xor %edx, %eax */
				p[i++] = 0x83;
				p[i++] = 0xfa;
				p[i++] = (u8)(r >> 20);
				p[i++] = 0x74;
				p[i++] = 0x02;
				p[i++] = 0x31;
				p[i++] = 0xd0;
			}
		}
		p[i++] = 0xc3;
		mprotect(p, Z, PROT_READ | PROT_EXEC);
		int (*f)(void) = (int (*)(void))p;
		h = mix(h, f());
		h = mix(h, f());
		munmap(p, Z);
	}
	return h;
}
