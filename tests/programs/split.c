/*
 * Makes split locks. `split COUNT [THREADS]`: every thread increments a word that lies in two cache lines COUNT times; at the end,
 * "sum N". SIGBUS ends it with "signal S code C value N".
 */
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static char lines[192] __attribute__((aligned(64)));
static volatile uint32_t *word = (volatile uint32_t *)(lines + 62);
static long count;

static void handler(int signal, siginfo_t *info, void *context)
{
	(void)context;
	printf("signal %d code %d value %u\n", signal, info->si_code, *word);
	fflush(stdout);
	_exit(100 + signal);
}

static void *work(void *argument)
{
	for (long i = 0; i < count; i++)
		__asm__ volatile("lock incl %0" : "+m"(*word) : : "memory");
	return argument;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO };
	long threads = argc > 2 ? atol(argv[2]) : 1;
	pthread_t ids[16];

	setvbuf(stdout, NULL, _IONBF, 0);
	count = argc > 1 ? atol(argv[1]) : 1;
	if (threads < 1 || threads > 16 || sigaction(SIGBUS, &action, NULL))
		return 2;
	if (threads == 1) {
		work(NULL);
	} else {
		for (long i = 0; i < threads; i++)
			if (pthread_create(&ids[i], NULL, work, NULL))
				return 2;
		for (long i = 0; i < threads; i++)
			pthread_join(ids[i], NULL);
	}
	printf("sum %u\n", *word);
	return 0;
}
