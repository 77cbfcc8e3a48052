/* Debian's programs, on files that are made here. Their sum is the length of their output. */
#include "bench.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define DATA "/tmp/data"
#define SMALL "/tmp/data2"
#define PACKED "/tmp/data.zst"

/* In the child: input from `in`, nowhere for messages, an environment that is the same everywhere. */
static void exec_program(char *const argv[], const char *in)
{
	int f = open(in ? in : "/dev/null", O_RDONLY);
	if (f >= 0)
		dup2(f, 0);
	f = open("/dev/null", O_WRONLY);
	if (f >= 0)
		dup2(f, 2);
	/* This one is let through: it takes processor features from OpenSSL. */
	char *cap = getenv("OPENSSL_ia32cap");
	cap = cap ? strdup(cap) : 0;
	clearenv();
	if (cap)
		setenv("OPENSSL_ia32cap", cap, 1);
	setenv("PATH", "/bin:/usr/bin", 1);
	execv(argv[0], argv);
	_exit(127);
}

/* Runs a program to its end and gives the length of its output. */
static u64 run(char *const argv[], const char *in)
{
	static u8 buffer[65536];
	int p[2];
	if (pipe(p))
		return 0;
	pid_t child = fork();
	if (!child) {
		dup2(p[1], 1);
		close(p[0]);
		close(p[1]);
		exec_program(argv, in);
	}
	close(p[1]);
	u64 total = 0;
	ssize_t r;
	while ((r = read(p[0], buffer, sizeof buffer)) > 0)
		total += r;
	close(p[0]);
	int status;
	waitpid(child, &status, 0);
	if (status)
		say("FAIL %s status %x\n", argv[0], status);
	return total;
}

/* Runs a program n times. */
static u64 repeat(u64 n, char *const argv[])
{
	u64 total = 0;
	for (u64 i = 0; i < n; i++)
		total += run(argv, 0);
	return total;
}

static void write_file(const char *path, const char *bytes, size_t n)
{
	int f = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0644);
	if (write(f, bytes, n) != (ssize_t)n)
		say("FAIL prep\n");
	close(f);
}

/* n bytes of text: words of 2 to 9 letters, some of them frequent, in lines. The buffer is a bit longer. */
static char *text(size_t n)
{
	static char words[4096][12];
	u32 r = 5;
	for (int i = 0; i < 4096; i++) {
		int l = 2 + ((lcg(&r) >> 16) % 8);
		for (int j = 0; j < l; j++)
			words[i][j] = "etaoinshrdlucmfw"[lcg(&r) >> 28];
		words[i][l] = ' ';
		words[i][l + 1] = 0;
	}
	char *b = malloc(n + 64);
	size_t i = 0;
	while (i < n) {
		u32 k = lcg(&r) >> 8;
		k = (k & 1) ? (k >> 1) & 127 : (k >> 1) & 4095;
		for (const char *w = words[k]; *w; w++)
			b[i++] = *w;
		if ((lcg(&r) >> 24) == 0)
			b[i++] = '\n';
	}
	return b;
}

void prepare_files(void)
{
	struct stat s;
	if (!stat(DATA, &s))
		return;
	mkdir("/tmp", 0755);
	char *b = text(16 << 20);
	write_file(DATA, b, 16 << 20);
	write_file(SMALL, b, 2 << 20);
	free(b);
	run((char *[]){"/usr/bin/zstd", "-q", "-f", "-3", "--single-thread", "-o", PACKED, DATA, 0}, 0);
}

/* One process over n files. */
u64 a_sha256(u64 n)
{
	char **argv = calloc(n + 4, sizeof *argv);
	argv[0] = "/usr/bin/openssl";
	argv[1] = "dgst";
	argv[2] = "-sha256";
	for (u64 i = 0; i < n; i++)
		argv[3 + i] = DATA;
	u64 r = run(argv, 0);
	free(argv);
	return r;
}

u64 a_aes(u64 n)
{
	return repeat(n, (char *[]){
		"/usr/bin/openssl", "enc", "-aes-128-cbc",
		"-K", "00112233445566778899aabbccddeeff",
		"-iv", "000102030405060708090a0b0c0d0e0f",
		"-in", DATA, "-out", "/dev/null", 0,
	});
}

u64 a_zstd(u64 n)
{
	return repeat(n, (char *[]){"/usr/bin/zstd", "-q", "-3", "--single-thread", "-c", DATA, 0});
}

u64 a_unzstd(u64 n)
{
	return repeat(n, (char *[]){"/usr/bin/zstd", "-q", "-t", PACKED, 0});
}

u64 a_xz(u64 n)
{
	return repeat(n, (char *[]){"/usr/bin/xz", "-1", "-T1", "-c", SMALL, 0});
}

/* A table in memory of n thousand rows. */
u64 a_sqlite(u64 n)
{
	static const char sql[] =
		"PRAGMA cache_size=-100000;\n"
		"CREATE TABLE t(a INTEGER PRIMARY KEY,b INT,c TEXT);\n"
		"BEGIN;\n"
		"WITH RECURSIVE r(x) AS (VALUES(1) UNION ALL SELECT x+1 FROM r WHERE x<%llu) "
		"INSERT INTO t SELECT x,(x*7919)%%10007,'row'||(x*31%%977) FROM r;\n"
		"CREATE INDEX i ON t(b);\n"
		"COMMIT;\n"
		"SELECT count(*),sum(b),count(DISTINCT c) FROM t;\n"
		"SELECT sum(b) FROM t WHERE c LIKE '%%7%%';\n"
		"SELECT count(*) FROM t x JOIN t y ON x.a=y.b WHERE x.b<5000;\n"
		"UPDATE t SET b=b+1 WHERE b%%3=0;\n"
		"SELECT c,count(*) FROM t GROUP BY c ORDER BY 2 DESC,1 LIMIT 5;\n";
	const char *f = "/tmp/s.sql";
	FILE *o = fopen(f, "w");
	fprintf(o, sql, (unsigned long long)n * 1000);
	fclose(o);
	return run((char *[]){"/usr/bin/sqlite3", ":memory:", 0}, f);
}

u64 a_python(u64 n)
{
	char b[32];
	snprintf(b, 32, "%llu", (unsigned long long)n);
	return run((char *[]){"/usr/bin/python3.11", "-S", "-E", "-I", "/bench.py", b, 0}, 0);
}

u64 a_shell(u64 n)
{
	char b[32];
	snprintf(b, 32, "%llu", (unsigned long long)n);
	return run((char *[]){"/bin/busybox", "sh", "/bench.sh", b, 0}, 0);
}
