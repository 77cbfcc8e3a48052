/*
 * Pages that are elsewhere, by the memory device of `ring3 boot --page-out` (crates/vmm/src/devices/memory.rs).
 *
 * pages stalls COUNT [hold]   a task of real-time priority touches COUNT pages, another one counts meanwhile: how often the count had
 *                             moved when the page was there. `hold`: each page comes only when the other task has counted on.
 * pages copy COUNT            read(2) and write(2) with buffers whose pages are elsewhere
 * pages poison                a task touches failed memory, another one counts on
 * pages told                  a task hears of failed memory that it has not touched
 * pages shared                of two tasks that have failed memory mapped one touches it
 * pages fault                 write(2) and read(2) with buffers that are failed memory
 * pages killed                a task is killed while it waits for a page that is held
 * pages wait                  touches a page that is held
 * pages wanted                how many pages somebody waits for
 * pages release               lets pages that are held come
 * pages bench MILLISECONDS COUNT
 *                             what a task that computes gets done beside one that touches COUNT pages, of which, as of all memory, a part
 *                             has gone, over and over
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 0x700, COUNT = 0x704, COMMAND = 0x708, WANTED = 0x70c, BROUGHT = 0x710 };
enum { EVICT = 1, EVICT_PART, POISON, POISON_TOLD, HOLD, RELEASE };

#define SIZE 4096UL
/* How far the other task counts before a held page comes. */
#define COUNT_ON 1000

/* What the tasks share. */
static struct shared {
	volatile uint64_t count;
	volatile uint32_t turn; /* which page is held: its release is the other task's, once */
	volatile uint32_t stop;
} *shared;

static void fail(const char *what)
{
	perror(what);
	exit(2);
}

static uint32_t command(uint32_t page, uint32_t count, uint32_t number)
{
	outl(page, PAGE);
	outl(count, COUNT);
	outl(number, COMMAND);
	return inl(COMMAND);
}

/* The number of the guest-physical page at an address. */
static uint32_t frame(const void *address)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	uint64_t entry = 0;

	if (fd < 0 || pread(fd, &entry, 8, (uintptr_t)address / SIZE * 8) != 8 || !(entry >> 63))
		fail("pagemap");
	close(fd);
	return (uint32_t)(entry & ((1UL << 55) - 1));
}

/* Pages of which each begins with its number. */
static char *pages(unsigned long count)
{
	char *memory = mmap(NULL, count * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		fail("mmap");
	madvise(memory, count * SIZE, MADV_NOHUGEPAGE);
	for (unsigned long i = 0; i < count; i++)
		*(uint64_t *)(memory + i * SIZE) = i + 1;
	return memory;
}

static void evict(const char *memory, unsigned long count)
{
	uint32_t *frames = calloc(count, 4);

	if (!frames)
		fail("calloc");
	for (unsigned long i = 0; i < count; i++)
		frames[i] = frame(memory + i * SIZE);
	for (unsigned long i = 0; i < count; i++)
		if (command(frames[i], 1, EVICT) != 1)
			printf("page %lu did not go\n", i);
	free(frames);
}

/* The task that counts. It lets each held page come when it has counted on. */
static pid_t start_counting(void)
{
	pid_t pid = fork();

	if (pid < 0)
		fail("fork");
	if (pid)
		return pid;
	for (uint32_t released = 0; !shared->stop;) {
		uint32_t turn = shared->turn;

		if (turn != released && inl(WANTED)) {
			for (int i = 0; i < COUNT_ON; i++)
				shared->count++;
			released = turn;
			outl(RELEASE, COMMAND);
		}
		shared->count++;
	}
	_exit(0);
}

static void stop_counting(pid_t pid)
{
	shared->stop = 1;
	waitpid(pid, NULL, 0);
}

static void stalls(unsigned long count, int hold)
{
	struct sched_param parameters = { .sched_priority = 1 };
	char *memory = pages(count);
	unsigned long moved = 0, right = 0;
	pid_t other;

	evict(memory, count);
	other = start_counting();
	if (sched_setscheduler(0, SCHED_FIFO, &parameters))
		fail("sched_setscheduler");
	for (unsigned long i = 0; i < count; i++) {
		uint64_t before;

		if (hold) {
			command(0, 0, HOLD);
			shared->turn = i + 1;
		}
		before = shared->count;
		right += *(volatile uint64_t *)(memory + i * SIZE) == i + 1;
		moved += shared->count - before >= (hold ? COUNT_ON : 1);
	}
	parameters.sched_priority = 0;
	sched_setscheduler(0, SCHED_OTHER, &parameters);
	stop_counting(other);
	printf("stalls %lu moved %lu right %lu\n", count, moved, right);
}

/* All of it goes through a pipe, both of whose ends have buffers that are elsewhere. */
static void copy(unsigned long count)
{
	char *from = pages(count), *to = pages(count);
	unsigned long right = 0;
	int ends[2];

	memset(to, 0xff, count * SIZE);
	evict(from, count);
	evict(to, count);
	if (pipe(ends))
		fail("pipe");
	for (unsigned long i = 0; i < count; i++) {
		if (write(ends[1], from + i * SIZE, SIZE) != (long)SIZE)
			fail("write");
		if (read(ends[0], to + i * SIZE, SIZE) != (long)SIZE)
			fail("read");
	}
	for (unsigned long i = 0; i < count; i++)
		right += !memcmp(from + i * SIZE, to + i * SIZE, SIZE) && *(uint64_t *)(to + i * SIZE) == i + 1;
	printf("copied %lu right %lu\n", count, right);
}

static const char *poisoned;

static void handler(int signal, siginfo_t *info, void *context)
{
	(void)context;
	printf("signal %d code %d page %ld\n", signal, info->si_code,
	       (long)((uintptr_t)info->si_addr - (uintptr_t)poisoned) / (long)SIZE);
	fflush(stdout);
	_exit(0);
}

/* Of three pages the middle one fails. */
static void poison(int told)
{
	struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO };
	pid_t other = start_counting(), victim;
	uint64_t before = shared->count;

	fflush(stdout);
	victim = fork();
	if (victim < 0)
		fail("fork");
	if (!victim) {
		char *memory = pages(3);

		poisoned = memory;
		if (sigaction(SIGBUS, &action, NULL))
			fail("sigaction");
		if (told && prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0))
			fail("prctl");
		if (command(frame(memory + SIZE), 1, told ? POISON_TOLD : POISON) != 1)
			fail("poison");
		if (told)
			pause();
		for (int i = 0; i < 3; i++)
			printf("page %d holds %lu\n", i, *(volatile uint64_t *)(memory + i * SIZE));
		_exit(1);
	}
	waitpid(victim, NULL, 0);
	while (shared->count - before < COUNT_ON)
		;
	stop_counting(other);
	printf("the other goes on\n");
}

/* Both have the page mapped. One is killed, the other has not touched it. */
static void shared_page(void)
{
	volatile uint64_t *page = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t other, victim;
	int status;

	if (page == MAP_FAILED)
		fail("mmap");
	*page = 1;
	other = fork();
	if (!other) {
		/* Mapped here as well. */
		shared->count = *page;
		pause();
	}
	while (!shared->count)
		;
	victim = fork();
	if (!victim) {
		if (*page != 1 || command(frame((char *)page), 1, POISON) != 1)
			fail("poison");
		_exit(*page != 0);
	}
	waitpid(victim, &status, 0);
	printf("who touches it: signal %d\n", WTERMSIG(status));
	printf("the other: %s\n", waitpid(other, &status, WNOHANG) ? "has gone" : "goes on");
	kill(other, SIGKILL);
	waitpid(other, &status, 0);
}

static void fault(void)
{
	char *memory = pages(2);
	long written, got;
	int ends[2];

	if (pipe(ends))
		fail("pipe");
	for (int i = 0; i < 2; i++)
		if (command(frame(memory + i * SIZE), 1, POISON) != 1)
			fail("poison");
	written = write(ends[1], memory, SIZE);
	printf("write %ld %s\n", written, written < 0 ? strerror(errno) : "");
	if (write(ends[1], "abc", 3) != 3)
		fail("write");
	got = read(ends[0], memory + SIZE, SIZE);
	printf("read %ld %s\n", got, got < 0 ? strerror(errno) : "");
}

static void killed(void)
{
	/* Ours as well: what a task leaves behind somebody else gets, and would wait for it. */
	char *page = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t victim;
	int status;

	if (page == MAP_FAILED)
		fail("mmap");
	*page = 1;
	evict(page, 1);
	victim = fork();
	if (!victim) {
		command(0, 0, HOLD);
		_exit(*(volatile char *)page);
	}
	while (!inl(WANTED))
		;
	kill(victim, SIGKILL);
	waitpid(victim, &status, 0);
	printf("signal %d, pages wanted %u\n", WTERMSIG(status), inl(WANTED));
	outl(RELEASE, COMMAND);
}

static void wait_for_held(void)
{
	char *memory = pages(1);

	evict(memory, 1);
	command(0, 0, HOLD);
	printf("came with %lu\n", *(volatile uint64_t *)memory);
}

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec * 1e-9;
}

/* Passes over the memory, of which a part goes before each. */
static void bench(double least, unsigned long count)
{
	char *memory = pages(count);
	pid_t other = start_counting();
	double alone, start, passes = 0;
	uint64_t before, counted = 0;
	unsigned long wrong = 0, touched = 0;
	uint32_t brought = 0;

	sleep(1);
	before = shared->count;
	start = seconds();
	usleep((useconds_t)(least * 1e6));
	alone = (double)(shared->count - before) / (seconds() - start);
	while (passes < least) {
		uint32_t came;

		command(0, ~0U, EVICT_PART);
		came = inl(BROUGHT);
		before = shared->count;
		start = seconds();
		for (unsigned long i = 0; i < count; i++)
			wrong += *(volatile uint64_t *)(memory + i * SIZE) != i + 1;
		passes += seconds() - start;
		counted += shared->count - before;
		brought += inl(BROUGHT) - came;
		touched += count;
	}
	stop_counting(other);
	printf("wrong %lu\n", wrong);
	printf("compute %.4f\n", (double)counted / passes / alone);
	printf("touch %.0f\n", (double)touched / passes);
	printf("bring %.0f\n", (double)brought / passes);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	unsigned long number = argc > 2 ? strtoul(argv[2], NULL, 0) : 0;

	setvbuf(stdout, NULL, _IONBF, 0);
	shared = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED || ioperm(PAGE, 20, 1))
		fail("ioperm");
	if (!strcmp(what, "stalls"))
		stalls(number, argc > 3);
	else if (!strcmp(what, "copy"))
		copy(number);
	else if (!strcmp(what, "poison") || !strcmp(what, "told"))
		poison(!strcmp(what, "told"));
	else if (!strcmp(what, "shared"))
		shared_page();
	else if (!strcmp(what, "fault"))
		fault();
	else if (!strcmp(what, "killed"))
		killed();
	else if (!strcmp(what, "wait"))
		wait_for_held();
	else if (!strcmp(what, "wanted"))
		printf("%u\n", inl(WANTED));
	else if (!strcmp(what, "release"))
		outl(RELEASE, COMMAND);
	else if (!strcmp(what, "bench") && argc > 3)
		bench((double)number / 1000, strtoul(argv[3], NULL, 0));
	else
		return 2;
	return 0;
}
