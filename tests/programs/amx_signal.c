/*
 * Tiles and signals: SIGILL for who may not have tiles, and what of them is in a signal's frame, before and after permission.
 */
#include <cpuid.h>
#include <immintrin.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XTILEDATA 18

/* In the part of the XSAVE area that is left to software, and in the header. */
#define XSTATE_SIZE 480
#define XSTATE_BV 512

static const struct {
	uint8_t palette, start_row, reserved[14];
	uint16_t bytes[16];
	uint8_t rows[16];
} config = { .palette = 1, .bytes = { 64, 64 }, .rows = { 16, 16 } };

static uint8_t pattern[1024], found[1024];
static uint32_t offset, frame_size;
static int number, code, in_use, same;
static sigjmp_buf back;

static void handler(int signal, siginfo_t *info, void *context)
{
	uint8_t *frame = (uint8_t *)((ucontext_t *)context)->uc_mcontext.fpregs;

	number = signal;
	code = info->si_code;
	memcpy(&frame_size, frame + XSTATE_SIZE, sizeof(frame_size));
	in_use = frame[XSTATE_BV + XTILEDATA / 8] >> XTILEDATA % 8 & 1;
	if (signal == SIGILL)
		siglongjmp(back, 1);
	same = in_use && memcmp(frame + offset, pattern, sizeof(pattern)) == 0;
	/* What the handler writes there is in the tile afterwards. */
	if (in_use)
		frame[offset + 5] ^= 0xff;
}

int main(void)
{
	struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO };
	uint32_t size, c, d;

	__cpuid_count(0xd, XTILEDATA, size, offset, c, d);
	sigaction(SIGILL, &action, NULL);
	sigaction(SIGUSR1, &action, NULL);
	for (int i = 0; i < 1024; i++)
		pattern[i] = i * 7 + 1;
	__asm__ volatile("" ::: "memory");

	if (!sigsetjmp(back, 1)) {
		_tile_loadconfig(&config);
		_tile_loadd(0, pattern, 64);
		puts("tiles without permission");
		return 1;
	}
	printf("refused: signal %d code %d, frame %s\n", number, code,
	       frame_size <= offset ? "without tiles" : "with tiles");

	if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA))
		return 2;
	number = 0;
	_tile_loadconfig(&config);
	_tile_loadd(0, pattern, 64);
	printf("allowed: signal %d\n", number);
	_tile_loadd(0, pattern, 64);
	raise(SIGUSR1);
	_tile_stored(0, found, 64);
	__asm__ volatile("" ::: "memory");
	pattern[5] ^= 0xff;
	printf("frame: size %s, in use %d, same %d, changed %d\n", frame_size >= offset + size ? "full" : "short", in_use,
	       same, memcmp(found, pattern, sizeof(pattern)) == 0);

	_tile_release();
	raise(SIGUSR1);
	printf("released: in use %d\n", in_use);
	return 0;
}
