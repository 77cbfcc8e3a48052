/* The workloads of `cargo xtask bench`, as a guest's /init and as a program of the host.
 *
 * As /init it takes from the kernel's command line bench=LIST (names and globs with commas between; -NAME takes away;
 * "boot" is none, "shell" a shell, cat:FILE a file's contents), scale=PER-MILLE of the work, reps=N, and
 * exit=reboot|poweroff|halt|PORT. As a program: bench [-s PER-MILLE] [-r REPS] [LIST]; bench -l lists the names.
 *
 * It says INIT, INFO; for each workload BEGIN NAME, END NAME and RESULT NAME.{time,rate,n,tsc,check} VALUE UNIT, or
 * SKIP NAME WHY, or FAIL; and DONE. The host measures between BEGIN and END. */
#include "bench.h"

#include <fcntl.h>
#include <stdarg.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <x86intrin.h>

static const struct bench benches[] = {
	{"int.list", b_list, 24000, "pass", 0},
	{"int.matrix", b_matrix, 16000, "pass", 0},
	{"int.crc", b_crc, 120000, "pass", 0},
	{"int.state", b_state, 600000, "pass", 0},
	{"branch.sieve", b_sieve, 1000, "pass", 0},
	{"branch.fib", b_fib, 16000, "fib22", 0},
	{"branch.interp", b_interp, 180000, "pass", 0},
	{"branch.qsort", b_qsort, 400, "pass", 0},
	{"mem.memcpy", b_memcpy, 6000, "2MiB", 0},
	{"mem.memset", b_memset, 5000, "2MiB", 0},
	{"mem.repmovs", b_repmovs, 100000, "64KiB", 0},
	{"mem.smallcpy", b_smallcpy, 100000, "1000cpy", 0},
	{"mem.triad", b_triad, 3000, "pass", 0},
	{"mem.chase16k", b_chase_s, 1000000, "1000ld", 0},
	{"mem.chase64m", b_chase_l, 10000, "1000ld", 0},
	{"fp.nbody", b_nbody, 60000, "100step", 0},
	{"fp.x87", b_x87, 80000, "1000it", 0},
	{"fp.libm", b_libm, 500000, "16it", 0},
	{"fp.divsqrt", b_divsqrt, 150000, "1000it", 0},
	{"simd.sse2i", b_sse2i, 2000000, "4KiB", 0},
	{"simd.sse2d", b_sse2d, 80000, "mm32", 0},
	{"simd.avx2i", b_avx2i, 2000000, "4KiB", F_AVX2},
	{"simd.fma", b_fma, 80000, "mm32", F_FMA},
	{"simd.aesni", b_aesni, 300000, "4KiB", F_AES},
	{"simd.crc32", b_crc32i, 300000, "4KiB", F_SSE42},
	{"sys.getppid", b_getppid, 8000, "1000", 0},
	{"sys.clock", b_clock, 60000, "1000", 0},
	{"sys.signal", b_sig, 200, "1000", 0},
	{"sys.segv", b_segv, 60, "1000", 0},
	{"sys.pio", b_pio, 1000, "1000", F_GUEST},
	{"proc.ctx", b_ctx, 60, "1000rt", 0},
	{"proc.fork", b_fork, 200, "10", 0},
	{"proc.exec", b_exec, 100, "10", 0},
	{"proc.execdyn", b_execdyn, 50, "10", F_FULL},
	{"mm.fault", b_fault, 300, "4MiB", 0},
	{"mm.mprotect", b_mprotect, 100, "1000", 0},
	{"mm.cow", b_cow, 100, "4MiB", 0},
	{"code.smc", b_smc, 600, "1000", 0},
	{"code.cold", b_cold, 300, "64KiB", 0},
	{"smp.atomic1", b_atomic1, 120000, "1000", 0},
	{"smp.atomic2", b_atomic, 15000, "1000x2", F_SMP},
	{"smp.indep2", b_indep, 60000, "1000x2", F_SMP},
	{"smp.mutex2", b_mutex, 60, "1000x2", F_SMP | F_NOSUM},
	{"app.sha256", a_sha256, 32, "16MiB", F_FULL},
	{"app.aescbc", a_aes, 30, "16MiB", F_FULL},
	{"app.zstd3", a_zstd, 10, "16MiB", F_FULL},
	{"app.unzstd", a_unzstd, 30, "16MiB", F_FULL},
	{"app.xz1", a_xz, 6, "2MiB", F_FULL},
	{"app.sqlite", a_sqlite, 300, "1000row", F_FULL},
	{"app.python", a_python, 800, "pass", F_FULL},
	{"app.shell", a_shell, 200, "iter", F_FULL},
};
enum { BENCHES = sizeof benches / sizeof *benches };

void say(const char *format, ...)
{
	char text[512];
	va_list arguments;
	va_start(arguments, format);
	int n = vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	for (char *p = text; n > 0;) {
		ssize_t w = write(1, p, n);
		if (w <= 0)
			break;
		p += w;
		n -= w;
	}
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

/* Whether name fits a pattern, in which * stands for anything. */
static int fits(const char *pattern, const char *name)
{
	for (; *pattern; pattern++, name++) {
		if (*pattern == '*') {
			if (!pattern[1])
				return 1;
			for (; *name; name++)
				if (fits(pattern + 1, name))
					return 1;
			return fits(pattern + 1, name);
		}
		if (*pattern != *name)
			return 0;
	}
	return !*name;
}

/* Whether a list has name: the last pattern that fits decides. */
static int wanted(const char *list, const char *name)
{
	char copy[1024];
	snprintf(copy, sizeof copy, "%s", list);
	int yes = 0;
	for (char *t = strtok(copy, ","); t; t = strtok(0, ",")) {
		int without = *t == '-';
		if (fits(t + without, name) || !strcmp(t + without, "all"))
			yes = !without;
	}
	return yes;
}

/* Why a benchmark cannot be run here; null if it can. */
static const char *obstacle(const struct bench *b, int guest)
{
	struct stat st;
	__builtin_cpu_init();
	if ((b->flags & F_FULL) && stat("/usr/bin/openssl", &st))
		return "min-initrd";
	if ((b->flags & F_SMP) && sysconf(_SC_NPROCESSORS_ONLN) < 2)
		return "1-cpu";
	if ((b->flags & F_GUEST) && !guest)
		return "guest-only";
	if ((b->flags & F_SSE42) && !__builtin_cpu_supports("sse4.2"))
		return "no-sse4.2";
	if ((b->flags & F_AES) && !__builtin_cpu_supports("aes"))
		return "no-aes";
	if ((b->flags & F_FMA) && !__builtin_cpu_supports("fma"))
		return "no-fma";
	if ((b->flags & F_AVX2) && !__builtin_cpu_supports("avx2"))
		return "no-avx2";
	return 0;
}

/* In the child: does the work and says how long it took. */
static void measure(const struct bench *b, u64 scale)
{
	u64 n = b->iters * scale / 1000;
	if (!n)
		n = 1;
	say("BEGIN %s\n", b->name);
	tcdrain(1);
	u64 t0 = __rdtsc();
	double begin = now();
	MARK(MARK_BEGIN);
	u64 sum = b->fn(n);
	MARK(MARK_END);
	double seconds = now() - begin;
	u64 cycles = __rdtsc() - t0;
	say("END %s\n", b->name);
	tcdrain(1);
	say("RESULT %s.time %.6f s\n", b->name, seconds);
	say("RESULT %s.rate %.4g %s/s\n", b->name, n / seconds, b->unit);
	say("RESULT %s.n %llu %s\n", b->name, (unsigned long long)n, b->unit);
	say("RESULT %s.tsc %llu cyc\n", b->name, (unsigned long long)cycles);
	sum = b->flags & F_NOSUM ? 0 : sum;
	say("RESULT %s.check %016llx hash\n", b->name, (unsigned long long)sum);
	tcdrain(1);
}

/* Each benchmark has a fresh child, so that their order does not matter. */
static void run(const struct bench *b, u64 scale, int guest)
{
	const char *why = obstacle(b, guest);
	if (why) {
		say("SKIP %s %s\n", b->name, why);
		return;
	}
	if (b->flags & F_FULL)
		prepare_files();
	pid_t child = fork();
	if (!child) {
		measure(b, scale);
		_exit(0);
	}
	int status;
	waitpid(child, &status, 0);
	if (status)
		say("FAIL %s status %x\n", b->name, status);
}

static void run_all(const char *list, u64 scale, int reps, int guest)
{
	for (int r = 0; r < reps; r++)
		for (unsigned i = 0; i < BENCHES; i++)
			if (wanted(list, benches[i].name))
				run(&benches[i], scale, guest);
}

/* Reads the first line of a file, cut to what there is room for. */
static void read_line(const char *path, char *line, size_t size)
{
	line[0] = 0;
	int f = open(path, O_RDONLY);
	if (f < 0)
		return;
	ssize_t n = read(f, line, size - 1);
	line[n > 0 ? n : 0] = 0;
	line[strcspn(line, "\n")] = 0;
	close(f);
}

static void shell(void)
{
	if (!fork())
		execl("/bin/busybox", "sh", "-i", (char *)0);
	wait(0);
}

static void cat(const char *path)
{
	static char buffer[65536];
	int f = open(path, O_RDONLY);
	ssize_t n;
	while ((n = read(f, buffer, sizeof buffer)) > 0)
		for (ssize_t done = 0; done < n;) {
			ssize_t w = write(1, buffer + done, n - done);
			if (w <= 0)
				break;
			done += w;
		}
}

/* Ends the machine. */
static void leave(const char *how)
{
	say("DONE %s\n", how);
	tcdrain(1);
	MARK(MARK_DONE);
	if (!strncmp(how, "0x", 2)) {
		int port = strtol(how, 0, 16);
		if (!ioperm(port, 4, 1))
			outl(0, port);
	} else if (!strcmp(how, "poweroff"))
		reboot(RB_POWER_OFF);
	else if (!strcmp(how, "halt"))
		reboot(RB_HALT_SYSTEM);
	reboot(RB_AUTOBOOT);
	for (;;)
		pause();
}

static void guest(void)
{
	MARK(MARK_INIT);
	say("INIT tsc=%llu\n", (unsigned long long)__rdtsc());
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mkdir("/tmp", 0755);
	mount("p", "/proc", "proc", 0, 0);
	mount("s", "/sys", "sysfs", 0, 0);
	mount("d", "/dev", "devtmpfs", 0, 0);

	static char line[4096];
	const char *list = "boot", *how = "reboot";
	u64 scale = 1000;
	int reps = 1;
	read_line("/proc/cmdline", line, sizeof line);
	for (char *t = strtok(line, " "); t; t = strtok(0, " ")) {
		if (!strncmp(t, "bench=", 6))
			list = t + 6;
		else if (!strncmp(t, "scale=", 6))
			scale = strtoull(t + 6, 0, 10);
		else if (!strncmp(t, "reps=", 5))
			reps = atoi(t + 5);
		else if (!strncmp(t, "exit=", 5))
			how = t + 5;
	}

	char clock[64];
	read_line("/sys/devices/system/clocksource/clocksource0/current_clocksource", clock, sizeof clock);
	int cpus = sysconf(_SC_NPROCESSORS_ONLN);
	say("INFO cpus=%d clocksource=%s uptime=%.3f\n", cpus, clock, now());
	if (!strcmp(list, "shell"))
		shell();
	else if (!strncmp(list, "cat:", 4))
		cat(list + 4);
	else if (strcmp(list, "boot"))
		run_all(list, scale, reps, 1);
	leave(how);
}

int main(int argc, char **argv)
{
	if (getpid() == 1)
		guest();

	u64 scale = 1000;
	int reps = 1, list = 0, option;
	while ((option = getopt(argc, argv, "s:r:l")) != -1) {
		if (option == 's')
			scale = strtoull(optarg, 0, 10);
		else if (option == 'r')
			reps = atoi(optarg);
		else if (option == 'l')
			list = 1;
	}
	if (list) {
		for (unsigned i = 0; i < BENCHES; i++)
			puts(benches[i].name);
		return 0;
	}
	say("INIT tsc=%llu\n", (unsigned long long)__rdtsc());
	run_all(optind < argc ? argv[optind] : "all", scale, reps, 0);
	say("DONE exit\n");
	return 0;
}
