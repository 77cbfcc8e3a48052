/*
 * Keeps tiles alive over time: `amx_tasks PROCESSES SECONDS`. Each process has a pattern of its own in all
 * eight tiles, multiplies some, yields and takes signals, and compares what the tiles hold. Prints a line for each and "done".
 * With 0 seconds it goes on until there is a line to read, and prints "tick N" whenever every process has come a round further.
 */
#include <immintrin.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XTILEDATA 18

struct config {
	uint8_t palette, start_row, reserved[14];
	uint16_t bytes[16];
	uint8_t rows[16];
};

static const struct config config = {
	.palette = 1,
	.bytes = { 64, 64, 64, 64, 64, 64, 64, 64 },
	.rows = { 16, 16, 16, 16, 16, 16, 16, 16 },
};

static uint8_t held[8][1024], found[1024];
static int32_t product[16][16];
static volatile sig_atomic_t ticks;

#define PROCESSES 64

/* What the processes share. */
static volatile struct {
	int stop;
	long rounds[PROCESSES];
} *shared;

/* Uses tiles: the interrupted ones must come back from the signal's frame. */
static void tick(int signal)
{
	(void)signal;
	ticks++;
	_tile_loadconfig(&config);
	_tile_zero(0);
	_tile_zero(7);
}

static void fill(unsigned seed)
{
	for (int tile = 0; tile < 8; tile++)
		for (int i = 0; i < 1024; i++)
			held[tile][i] = (seed = seed * 1103515245 + 12345) >> 16;
	for (int row = 0; row < 16; row++)
		for (int column = 0; column < 16; column++) {
			int32_t sum = 0;

			for (int k = 0; k < 64; k++)
				sum += (int8_t)held[1][row * 64 + k] * (int8_t)held[2][k / 4 * 64 + column * 4 + k % 4];
			product[row][column] = sum;
		}
}

#define CHECK(tile, with)                              \
	do {                                           \
		_tile_stored(tile, found, 64);         \
		wrong += memcmp(found, with, 1024) != 0; \
	} while (0)

static long work(unsigned seed, long seconds, volatile long *rounds)
{
	time_t end = time(NULL) + seconds;
	long wrong = 0;

	fill(seed);
	/* The intrinsics do not tell the compiler what they read. */
	__asm__ volatile("" ::: "memory");
	_tile_loadconfig(&config);
	for (*rounds = 0; seconds ? time(NULL) < end : !shared->stop; ++*rounds) {
		_tile_loadd(1, held[1], 64);
		_tile_loadd(2, held[2], 64);
		_tile_loadd(3, held[3], 64);
		_tile_loadd(4, held[4], 64);
		_tile_loadd(5, held[5], 64);
		_tile_loadd(6, held[6], 64);
		_tile_loadd(7, held[7], 64);
		_tile_zero(0);
		_tile_dpbssd(0, 1, 2);
		for (int i = 0; i < 20; i++) {
			sched_yield();
			CHECK(0, product);
			CHECK(1, held[1]);
			CHECK(3, held[3]);
			CHECK(7, held[7]);
		}
	}
	_tile_release();
	return wrong;
}

/* Until there is a line to read. */
static void watch(long processes)
{
	struct pollfd input = { .fd = 0, .events = POLLIN };
	long seen[PROCESSES] = { 0 }, tick = 0, i;

	while (poll(&input, 1, 50) == 0) {
		for (i = 0; i < processes && shared->rounds[i] > seen[i]; i++)
			;
		if (i < processes)
			continue;
		for (i = 0; i < processes; i++)
			seen[i] = shared->rounds[i];
		printf("tick %ld\n", tick++);
		fflush(stdout);
	}
	shared->stop = 1;
}

int main(int argc, char **argv)
{
	long processes = argc > 1 ? atol(argv[1]) : 4, seconds = argc > 2 ? atol(argv[2]) : 1;
	struct itimerval every = { { 0, 7000 }, { 0, 7000 } };
	stack_t stack = { .ss_size = 1 << 16 };
	struct sigaction action = { .sa_handler = tick, .sa_flags = SA_ONSTACK | SA_RESTART };
	int failed = 0, status;

	stack.ss_sp = malloc(stack.ss_size);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (processes < 1 || processes > PROCESSES || shared == MAP_FAILED)
		return 2;
	if (sigaltstack(&stack, NULL) || sigaction(SIGALRM, &action, NULL) ||
	    syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA)) {
		perror("amx_tasks");
		return 2;
	}
	for (long i = 0; i < processes; i++) {
		if (fork() == 0) {
			volatile long *rounds = &shared->rounds[i];
			long wrong;

			setitimer(ITIMER_REAL, &every, NULL);
			wrong = work(i + 1, seconds, rounds);
			printf("process %ld: wrong %ld%s%s\n", i, wrong, *rounds ? "" : ", no rounds",
			       ticks ? "" : ", no signals");
			fflush(stdout);
			_exit(wrong != 0 || !*rounds || !ticks);
		}
	}
	if (!seconds)
		watch(processes);
	for (long i = 0; i < processes; i++)
		failed |= wait(&status) < 0 || status;
	puts(failed ? "failed" : "done");
	return failed;
}
