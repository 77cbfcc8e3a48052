/* Vector instructions, by intrinsics. */
#include "bench.h"
#include <immintrin.h>
#include <wmmintrin.h>

#define ALIGNED __attribute__((aligned(64)))

/* Two sources and a destination. */
static u8 A[4096] ALIGNED;
static u8 B[4096] ALIGNED;
static u8 D[4096] ALIGNED;

static void fill(void)
{
	u32 s = 21;
	for (int i = 0; i < 4096; i++) {
		A[i] = lcg(&s) >> 24;
		B[i] = lcg(&s) >> 23;
	}
}

static u64 sum(void)
{
	u64 h = 0;
	for (int i = 0; i < 4096; i += 8) {
		u64 v;
		memcpy(&v, D + i, 8);
		h = mix(h, v);
	}
	return h;
}

/* SSE2, integers: an alpha blend of bytes through 16 bits. */
u64 b_sse2i(u64 n)
{
	fill();
	__m128i z = _mm_setzero_si128(), w = _mm_set1_epi16(77), v = _mm_set1_epi16(179);
	for (u64 k = 0; k < n; k++) {
		for (int i = 0; i < 4096; i += 16) {
			__m128i a = _mm_load_si128((void *)(A + i));
			__m128i b = _mm_load_si128((void *)(B + i));
			__m128i l = _mm_add_epi16(_mm_mullo_epi16(_mm_unpacklo_epi8(a, z), w),
						  _mm_mullo_epi16(_mm_unpacklo_epi8(b, z), v));
			__m128i h = _mm_add_epi16(_mm_mullo_epi16(_mm_unpackhi_epi8(a, z), w),
						  _mm_mullo_epi16(_mm_unpackhi_epi8(b, z), v));
			__m128i r = _mm_packus_epi16(_mm_srli_epi16(l, 8), _mm_srli_epi16(h, 8));
			r = _mm_max_epu8(r, _mm_subs_epu8(a, b));
			_mm_store_si128((void *)(D + i), r);
		}
		A[k & 4095] = D[(k + 1) & 4095];
	}
	return sum();
}

/* SSE2, doubles: a product of 32x32 matrices. */
u64 b_sse2d(u64 n)
{
	enum { N = 32 };
	static double a[N][N] ALIGNED;
	static double b[N][N] ALIGNED;
	static double c[N][N] ALIGNED;
	for (int i = 0; i < N; i++)
		for (int j = 0; j < N; j++) {
			a[i][j] = 1.0 / (i + j + 1);
			b[i][j] = (i - j) * 0.01;
		}
	for (u64 k = 0; k < n; k++) {
		for (int i = 0; i < N; i++)
			for (int j = 0; j < N; j += 4) {
				__m128d s0 = _mm_setzero_pd(), s1 = s0;
				for (int q = 0; q < N; q++) {
					__m128d x = _mm_set1_pd(a[i][q]);
					s0 = _mm_add_pd(s0, _mm_mul_pd(x, _mm_load_pd(&b[q][j])));
					s1 = _mm_add_pd(s1,
							_mm_mul_pd(x, _mm_load_pd(&b[q][j + 2])));
				}
				_mm_store_pd(&c[i][j], s0);
				_mm_store_pd(&c[i][j + 2], s1);
			}
		a[k % N][0] = c[0][k % N] * 0.5;
	}
	u64 h = 0;
	for (int i = 0; i < N; i++)
		for (int j = 0; j < N; j++) {
			u64 u;
			memcpy(&u, &c[i][j], 8);
			h = mix(h, u);
		}
	return h;
}

/* AVX2, integers: the blend, of shuffled bytes. */
__attribute__((target("avx2"))) u64 b_avx2i(u64 n)
{
	fill();
	__m256i z = _mm256_setzero_si256(), w = _mm256_set1_epi16(77), v = _mm256_set1_epi16(179);
	__m256i sh = _mm256_setr_epi8(3, 1, 2, 0, 7, 5, 6, 4, 11, 9, 10, 8, 15, 13, 14, 12,
				      3, 1, 2, 0, 7, 5, 6, 4, 11, 9, 10, 8, 15, 13, 14, 12);
	for (u64 k = 0; k < n; k++) {
		for (int i = 0; i < 4096; i += 32) {
			__m256i a = _mm256_load_si256((void *)(A + i));
			__m256i b = _mm256_shuffle_epi8(_mm256_load_si256((void *)(B + i)), sh);
			__m256i l = _mm256_add_epi16(_mm256_mullo_epi16(_mm256_unpacklo_epi8(a, z), w),
						     _mm256_mullo_epi16(_mm256_unpacklo_epi8(b, z), v));
			__m256i h = _mm256_add_epi16(_mm256_mullo_epi16(_mm256_unpackhi_epi8(a, z), w),
						     _mm256_mullo_epi16(_mm256_unpackhi_epi8(b, z), v));
			__m256i r = _mm256_packus_epi16(_mm256_srli_epi16(l, 8),
							_mm256_srli_epi16(h, 8));
			r = _mm256_max_epu8(r, _mm256_subs_epu8(a, b));
			_mm256_store_si256((void *)(D + i), r);
		}
		A[k & 4095] = D[(k + 1) & 4095];
	}
	return sum();
}

/* FMA: the matrix product. */
__attribute__((target("avx2,fma"))) u64 b_fma(u64 n)
{
	enum { N = 32 };
	static double a[N][N] ALIGNED;
	static double b[N][N] ALIGNED;
	static double c[N][N] ALIGNED;
	for (int i = 0; i < N; i++)
		for (int j = 0; j < N; j++) {
			a[i][j] = 1.0 / (i + j + 1);
			b[i][j] = (i - j) * 0.01;
		}
	for (u64 k = 0; k < n; k++) {
		for (int i = 0; i < N; i++)
			for (int j = 0; j < N; j += 8) {
				__m256d s0 = _mm256_setzero_pd(), s1 = s0;
				for (int q = 0; q < N; q++) {
					__m256d x = _mm256_broadcast_sd(&a[i][q]);
					s0 = _mm256_fmadd_pd(x, _mm256_load_pd(&b[q][j]), s0);
					s1 = _mm256_fmadd_pd(x, _mm256_load_pd(&b[q][j + 4]), s1);
				}
				_mm256_store_pd(&c[i][j], s0);
				_mm256_store_pd(&c[i][j + 4], s1);
			}
		a[k % N][0] = c[0][k % N] * 0.5;
	}
	u64 h = 0;
	for (int i = 0; i < N; i++)
		for (int j = 0; j < N; j++) {
			u64 u;
			memcpy(&u, &c[i][j], 8);
			h = mix(h, u);
		}
	return h;
}

/* AES-128 in counter mode. */
__attribute__((target("aes,sse4.1"))) u64 b_aesni(u64 n)
{
	fill();
	__m128i rk[11];
	for (int i = 0; i < 11; i++)
		rk[i] = _mm_load_si128((void *)(B + 16 * i));
	__m128i ctr = _mm_setzero_si128(), one = _mm_set_epi32(0, 0, 0, 1);
	for (u64 k = 0; k < n; k++)
		for (int i = 0; i < 4096; i += 64) {
			__m128i x[4];
			for (int q = 0; q < 4; q++) {
				x[q] = _mm_xor_si128(ctr, rk[0]);
				ctr = _mm_add_epi64(ctr, one);
			}
			for (int r = 1; r < 10; r++)
				for (int q = 0; q < 4; q++)
					x[q] = _mm_aesenc_si128(x[q], rk[r]);
			for (int q = 0; q < 4; q++) {
				x[q] = _mm_aesenclast_si128(x[q], rk[10]);
				__m128i text = _mm_load_si128((void *)(A + i + 16 * q));
				_mm_store_si128((void *)(D + i + 16 * q), _mm_xor_si128(x[q], text));
			}
		}
	return sum();
}

/* CRC32 and POPCNT. */
__attribute__((target("sse4.2"))) u64 b_crc32i(u64 n)
{
	fill();
	u64 c = ~0ull;
	for (u64 k = 0; k < n; k++)
		for (int i = 0; i < 4096; i += 8)
			c = _mm_crc32_u64(c, *(u64 *)(A + i)) + __builtin_popcountll(c);
	return c;
}
