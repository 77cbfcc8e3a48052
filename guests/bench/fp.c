/* Floating point: scalar SSE2, x87, the C library's functions. */
#include "bench.h"
#include <math.h>

/* The bits of a number: sums are of bits, since results have to be the same to the last. */
static u64 dbits(double d)
{
	u64 u;
	memcpy(&u, &d, 8);
	return u;
}

/* The sun and four planets, a hundred steps. */
u64 b_nbody(u64 n)
{
	double x[5] = {0, 4.84143144246472090, 8.34336671824457987, 12.8943695621391310,
		       15.3796971148509165};
	double y[5] = {0, -1.16032004402742839, 4.12479856412430479, -15.1111514016986312,
		       -25.9193146099879641};
	double z[5] = {0, -0.103622044471123109, -0.403523417114321381, -0.223307578892655734,
		       0.179258772950371181};
	double vx[5] = {0, 0.606326392995832, -1.01077434617879, 1.08279100644153,
			0.979090732243898};
	double vy[5] = {0, 2.81198684491626, 1.82566237123041, 0.868713018169608,
			0.594698998647676};
	double vz[5] = {0, -0.0252183616598876, 0.00841576137658415, -0.0108326374013636,
			-0.034755955504078};
	double m[5] = {39.47841760435743, 0.03769367487038949, 0.011286326131968767,
		       0.0017237240570597112, 0.0020336868699246304};
	for (u64 k = 0; k < n * 100; k++) {
		for (int i = 0; i < 5; i++)
			for (int j = i + 1; j < 5; j++) {
				double dx = x[i] - x[j], dy = y[i] - y[j], dz = z[i] - z[j];
				double d = dx * dx + dy * dy + dz * dz;
				double g = 0.001 / (d * sqrt(d));
				vx[i] -= dx * m[j] * g;
				vy[i] -= dy * m[j] * g;
				vz[i] -= dz * m[j] * g;
				vx[j] += dx * m[i] * g;
				vy[j] += dy * m[i] * g;
				vz[j] += dz * m[i] * g;
			}
		for (int i = 0; i < 5; i++) {
			x[i] += 0.001 * vx[i];
			y[i] += 0.001 * vy[i];
			z[i] += 0.001 * vz[i];
		}
	}
	return mix(dbits(x[0]), dbits(vz[4]));
}

/* 1000 iterations of z^2 + c in 80-bit numbers. */
u64 b_x87(u64 n)
{
	u64 it = 0;
	long double acc = 0;
	for (u64 k = 0; k < n; k++) {
		long double cr = -0.75L + (long double)(k % 97) * 0.011L;
		long double ci = 0.1L + (long double)(k % 53) * 0.003L;
		long double zr = 0, zi = 0;
		for (int i = 0; i < 1000; i++) {
			long double a = zr * zr, b = zi * zi;
			if (a + b > 4.0L) {
				zr = zr / (a + b);
				zi = zi / (a + b);
			}
			long double t = a - b + cr;
			zi = 2 * zr * zi + ci;
			zr = t;
			it++;
		}
		acc += sqrtl(zr * zr + zi * zi);
	}
	return mix(it, dbits((double)acc));
}

/* Sine, cosine, exponential, logarithm, power. */
u64 b_libm(u64 n)
{
	double a = 0;
	for (u64 k = 0; k < n; k++) {
		double t = 1e-3 * (double)(k % 4096) + 0.01;
		for (int i = 0; i < 16; i++) {
			t += 0.37;
			a += sin(t) * exp(-t * 0.1) + log(t) * cos(t);
			a = a * 0.999 + pow(t, 0.3);
		}
	}
	return dbits((double)(float)a) >> 32;
}

/* Divisions and square roots each of which waits for the one before. */
u64 b_divsqrt(u64 n)
{
	double a = 1.5, b = 0;
	float f = 1.25f;
	for (u64 k = 0; k < n * 1000; k++) {
		a = sqrt(a + 2.0) / (1.0 + b);
		b = a * 0.5;
		f = f / 1.0001f + 0.5f;
	}
	return mix(dbits(a), dbits(f));
}
