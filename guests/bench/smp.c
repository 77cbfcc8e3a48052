/* Two threads, each on a processor of its own (but for atomic1). */
#include "bench.h"

#include <pthread.h>

static volatile u64 ctr __attribute__((aligned(128)));
static u64 rounds;
static volatile int go;

/* Both count with one variable. */
static void *count(void *a)
{
	pin((int)(long)a);
	while (!go)
		sched_yield();
	for (u64 k = 0; k < rounds; k++)
		__atomic_add_fetch(&ctr, 1, __ATOMIC_SEQ_CST);
	return 0;
}

/* Registers only. */
static void *compute(void *a)
{
	pin((int)(long)a);
	while (!go)
		sched_yield();
	u64 x = (u64)(long)a + 1;
	for (u64 k = 0; k < rounds * 4; k++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
	}
	return (void *)x;
}

static pthread_mutex_t mx = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cv = PTHREAD_COND_INITIALIZER;
static int turn;

/* They take turns. */
static void *take_turns(void *a)
{
	int me = (int)(long)a;
	pin(me);
	for (u64 k = 0; k < rounds; k++) {
		pthread_mutex_lock(&mx);
		while (turn != me)
			pthread_cond_wait(&cv, &mx);
		turn = !me;
		ctr++;
		pthread_cond_signal(&cv);
		pthread_mutex_unlock(&mx);
	}
	return 0;
}

/* Runs f in two threads, which start together. */
static u64 two(void *(*f)(void *), u64 n)
{
	pthread_t t[2];
	void *r[2];
	rounds = n;
	go = 0;
	ctr = 0;
	turn = 0;
	for (long i = 0; i < 2; i++)
		pthread_create(&t[i], 0, f, (void *)i);
	go = 1;
	for (int i = 0; i < 2; i++)
		pthread_join(t[i], &r[i]);
	return ctr + (u64)r[0] + (u64)r[1];
}

/* Locked instructions of one thread. */
u64 b_atomic1(u64 n)
{
	u64 c = 0;
	for (u64 k = 0; k < n * 1000; k++) {
		__atomic_add_fetch(&ctr, 1, __ATOMIC_SEQ_CST);
		u64 e = c;
		__atomic_compare_exchange_n(&c, &e, k, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
	}
	return c;
}

u64 b_atomic(u64 n)
{
	return two(count, n * 1000);
}

u64 b_indep(u64 n)
{
	return two(compute, n * 1000);
}

u64 b_mutex(u64 n)
{
	return two(take_turns, n * 1000);
}
