/*
 * Multiplies matrices with AMX, signed bytes and bfloat16, of sizes that are no multiples of a tile's, and compares with plain C. The
 * bfloat16 numbers are small integers, whose sums are exact in any order. Prints "int8 equal", "bf16 equal".
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XTILEDATA 18

enum { M = 100, N = 75, K = 300, ROWS = 16, BYTES = 64 };
enum { MP = (M + 15) / 16 * 16, NP = (N + 15) / 16 * 16, KP = (K + 63) / 64 * 64 };

struct config {
	uint8_t palette, start_row, reserved[14];
	uint16_t bytes[16];
	uint8_t rows[16];
};

static int8_t a8[M][KP], b8[K][N];
static uint16_t a16[M][KP], b16[K][N];
/* The second matrix as the instructions want it: rows of four bytes, or two numbers, of each column. */
static uint32_t packed[KP / 2][NP];
static int32_t c32[MP][NP], expected32[M][N];
static float cf[MP][NP], expectedf[M][N];

static uint32_t next(void)
{
	static uint32_t state = 12345;

	state = state * 1664525 + 1013904223;
	return state >> 8;
}

static uint16_t bf16(int value)
{
	float number = value;
	uint32_t bits;

	memcpy(&bits, &number, 4);
	return bits >> 16;
}

/* Tile 0 is rows x columns of the result, tile 1 of the first matrix, tile 2 of the second. */
static void configure(int rows, int columns, int depth)
{
	/* The intrinsics do not tell the compiler what they read. */
	__asm__ volatile("" ::: "memory");
	struct config config = { .palette = 1 };

	config.rows[0] = config.rows[1] = rows;
	config.bytes[0] = config.bytes[2] = columns * 4;
	config.bytes[1] = depth;
	config.rows[2] = depth / 4;
	__asm__ volatile("" : : "m"(config));
	_tile_loadconfig(&config);
}

static int least(int a, int b)
{
	return a < b ? a : b;
}

static void multiply8(void)
{
	for (int i = 0; i < M; i += ROWS)
		for (int j = 0; j < N; j += ROWS) {
			configure(least(ROWS, M - i), least(ROWS, N - j), BYTES);
			_tile_zero(0);
			for (int k = 0; k < KP; k += BYTES) {
				_tile_loadd(1, &a8[i][k], KP);
				_tile_loadd(2, &packed[k / 4][j], NP * 4);
				_tile_dpbssd(0, 1, 2);
			}
			_tile_stored(0, &c32[i][j], NP * 4);
		}
	_tile_release();
}

static void multiply16(void)
{
	for (int i = 0; i < M; i += ROWS)
		for (int j = 0; j < N; j += ROWS) {
			configure(least(ROWS, M - i), least(ROWS, N - j), BYTES);
			_tile_zero(0);
			for (int k = 0; k < KP; k += BYTES / 2) {
				_tile_loadd(1, &a16[i][k], KP * 2);
				_tile_loadd(2, &packed[k / 2][j], NP * 4);
				_tile_dpbf16ps(0, 1, 2);
			}
			_tile_stored(0, &cf[i][j], NP * 4);
		}
	_tile_release();
}

int main(void)
{
	int wrong8 = 0, wrong16 = 0;

	if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA)) {
		puts("no permission");
		return 2;
	}
	for (int k = 0; k < K; k++) {
		for (int i = 0; i < M; i++) {
			a8[i][k] = next();
			a16[i][k] = bf16((int)(next() % 17) - 8);
		}
		for (int j = 0; j < N; j++) {
			b8[k][j] = next();
			b16[k][j] = bf16((int)(next() % 17) - 8);
		}
	}
	for (int i = 0; i < M; i++)
		for (int j = 0; j < N; j++)
			for (int k = 0; k < K; k++) {
				uint32_t x = (uint32_t)a16[i][k] << 16, y = (uint32_t)b16[k][j] << 16;
				float u, v;

				memcpy(&u, &x, 4);
				memcpy(&v, &y, 4);
				expected32[i][j] += a8[i][k] * b8[k][j];
				expectedf[i][j] += u * v;
			}
	for (int k = 0; k < K; k++)
		for (int j = 0; j < N; j++)
			packed[k / 4][j] |= (uint32_t)(uint8_t)b8[k][j] << 8 * (k % 4);
	multiply8();
	memset(packed, 0, sizeof(packed));
	for (int k = 0; k < K; k++)
		for (int j = 0; j < N; j++)
			packed[k / 2][j] |= (uint32_t)b16[k][j] << 16 * (k % 2);
	multiply16();
	for (int i = 0; i < M; i++)
		for (int j = 0; j < N; j++) {
			wrong8 += c32[i][j] != expected32[i][j];
			wrong16 += memcmp(&cf[i][j], &expectedf[i][j], 4) != 0;
		}
	printf("int8 %s\nbf16 %s\n", wrong8 ? "differs" : "equal", wrong16 ? "differs" : "equal");
	return wrong8 || wrong16;
}
