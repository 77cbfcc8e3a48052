/*
 * Multiplies matrices with Debian's oneDNN, bytes and bf16, and compares with plain C: "int8 equal", "bf16 equal". What oneDNN has
 * run it says itself with ONEDNN_VERBOSE=1. All values are small integers, so that single precision has all sums exactly,
 * in whatever order they are added.
 */
#include <oneapi/dnnl/dnnl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { M = 67, K = 200, N = 83 };

static int small(int row, int column, int salt)
{
	return (row * 31 + column * 17 + row * column * salt) % 15 - 7;
}

static void check(dnnl_status_t status, const char *what)
{
	if (status != dnnl_success) {
		printf("%s: status %d\n", what, status);
		exit(3);
	}
}

static dnnl_memory_t matrix(dnnl_engine_t engine, long rows, long columns, dnnl_data_type_t type, void *data)
{
	dnnl_dims_t dims = { rows, columns };
	dnnl_memory_desc_t desc;
	dnnl_memory_t memory;

	check(dnnl_memory_desc_init_by_tag(&desc, 2, dims, type, dnnl_ab), "descriptor");
	check(dnnl_memory_create(&memory, &desc, engine, data), "memory");
	return memory;
}

/* destination = source * weights, by a kernel that oneDNN chooses; 0 if it has none for this processor. */
static int multiply(dnnl_engine_t engine, dnnl_stream_t stream, dnnl_memory_t source, dnnl_memory_t weights,
		    dnnl_memory_t destination)
{
	const dnnl_memory_desc_t *s, *w, *d;
	dnnl_primitive_desc_t chosen;
	dnnl_matmul_desc_t wanted;
	dnnl_primitive_t primitive;
	dnnl_status_t status;
	dnnl_exec_arg_t arguments[] = {
		{ DNNL_ARG_SRC, source }, { DNNL_ARG_WEIGHTS, weights }, { DNNL_ARG_DST, destination },
	};

	check(dnnl_memory_get_memory_desc(source, &s), "source");
	check(dnnl_memory_get_memory_desc(weights, &w), "weights");
	check(dnnl_memory_get_memory_desc(destination, &d), "destination");
	check(dnnl_matmul_desc_init(&wanted, s, w, NULL, d), "product");
	status = dnnl_primitive_desc_create(&chosen, &wanted, NULL, engine, NULL);
	if (status == dnnl_unimplemented)
		return 0;
	check(status, "kernel");
	check(dnnl_primitive_create(&primitive, chosen), "primitive");
	check(dnnl_primitive_execute(primitive, stream, 3, arguments), "execution");
	check(dnnl_stream_wait(stream), "end");
	dnnl_primitive_destroy(primitive);
	dnnl_primitive_desc_destroy(chosen);
	return 1;
}

static uint8_t bytes_a[M][K];
static int8_t bytes_b[K][N];
static int32_t sums[M][N];
static uint16_t halves_a[M][K], halves_b[K][N];
static float products[M][N];

static uint16_t bf16(float value)
{
	uint32_t bits;

	memcpy(&bits, &value, sizeof(bits));
	return bits >> 16;
}

int main(void)
{
	int wrong_bytes = 0, wrong_halves = 0, have_bytes, have_halves;
	dnnl_engine_t engine;
	dnnl_stream_t stream;

	for (int k = 0; k < K; k++) {
		for (int m = 0; m < M; m++) {
			bytes_a[m][k] = small(m, k, 3) + 7;
			halves_a[m][k] = bf16(small(m, k, 3) + 7);
		}
		for (int n = 0; n < N; n++) {
			bytes_b[k][n] = small(k, n, 5);
			halves_b[k][n] = bf16(small(k, n, 5));
		}
	}
	check(dnnl_engine_create(&engine, dnnl_cpu, 0), "engine");
	check(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags), "stream");
	have_bytes = multiply(engine, stream, matrix(engine, M, K, dnnl_u8, bytes_a),
			      matrix(engine, K, N, dnnl_s8, bytes_b), matrix(engine, M, N, dnnl_s32, sums));
	have_halves = multiply(engine, stream, matrix(engine, M, K, dnnl_bf16, halves_a),
			       matrix(engine, K, N, dnnl_bf16, halves_b), matrix(engine, M, N, dnnl_f32, products));
	for (int m = 0; m < M; m++)
		for (int n = 0; n < N; n++) {
			int32_t sum = 0;

			for (int k = 0; k < K; k++)
				sum += bytes_a[m][k] * bytes_b[k][n];
			wrong_bytes += have_bytes && sums[m][n] != sum;
			wrong_halves += have_halves && products[m][n] != (float)sum;
		}
	printf("int8 %s\n", !have_bytes ? "unavailable" : wrong_bytes ? "differs" : "equal");
	printf("bf16 %s\n", !have_halves ? "unavailable" : wrong_halves ? "differs" : "equal");
	return wrong_bytes || wrong_halves;
}
