/*
 * Makes one split lock in the kernel, without a module: a BPF program, which the kernel compiles, adds atomically to a word in two cache
 * lines. Only in arenas (Linux 6.9) may atomic operations be unaligned. Prints "sum N", or what failed; if the kernel
 * has killed it for the lock, nothing.
 */
#include <errno.h>
#include <linux/bpf.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Newer than some headers. */
#define MAP_TYPE_ARENA 33
#define ADDR_SPACE_CAST 1
#define TO_KERNEL 1

static long bpf(int command, union bpf_attr *attr)
{
	return syscall(SYS_bpf, command, attr, sizeof(*attr));
}

static int failed(const char *what)
{
	printf("%s: %s\n", what, strerror(errno));
	return 2;
}

int main(void)
{
	union bpf_attr map = { .map_type = MAP_TYPE_ARENA, .max_entries = 1, .map_flags = BPF_F_MMAPABLE };
	int arena = bpf(BPF_MAP_CREATE, &map);
	if (arena < 0)
		return failed("arena");
	char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, arena, 0);
	if (page == MAP_FAILED)
		return failed("mmap");
	volatile uint64_t *word = (void *)(page + 60);
	*word = 41;

	struct bpf_insn program[] = {
		/* r1 = the map, which makes it the program's arena */
		{ .code = BPF_LD | BPF_IMM | BPF_DW, .dst_reg = 1, .src_reg = BPF_PSEUDO_MAP_FD, .imm = arena },
		{ 0 },
		/* r2 = word */
		{ .code = BPF_LD | BPF_IMM | BPF_DW, .dst_reg = 2, .imm = (int)(uintptr_t)word },
		{ .imm = (int)((uintptr_t)word >> 32) },
		{ .code = BPF_ALU64 | BPF_MOV | BPF_X, .dst_reg = 2, .src_reg = 2, .off = ADDR_SPACE_CAST, .imm = TO_KERNEL },
		/* r3 = 1; lock *r2 += r3 */
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 3, .imm = 1 },
		{ .code = BPF_STX | BPF_ATOMIC | BPF_DW, .dst_reg = 2, .src_reg = 3, .imm = BPF_ADD },
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	static char log[1 << 16];
	union bpf_attr load = {
		/* Of the kinds that may be run on demand, this one runs where its process can be killed. */
		.prog_type = BPF_PROG_TYPE_SYSCALL,
		.prog_flags = BPF_F_SLEEPABLE,
		.insns = (uintptr_t)program,
		.insn_cnt = sizeof(program) / sizeof(program[0]),
		.license = (uintptr_t)"GPL",
		.log_buf = (uintptr_t)log,
		.log_size = sizeof(log),
		.log_level = 1,
	};
	int fd = bpf(BPF_PROG_LOAD, &load);
	if (fd < 0) {
		fputs(log, stdout);
		return failed("program");
	}
	union bpf_attr run = { .test = { .prog_fd = fd } };
	if (bpf(BPF_PROG_TEST_RUN, &run))
		return failed("run");
	printf("sum %llu\n", (unsigned long long)*word);
	return 0;
}
