/*
 * A library for QEMU: where the tiles' components lie in an XSAVE area. QEMU executes CPUID to learn it, which says nothing on a
 * machine without AMX; it then keeps what its table (`x86_ext_save_areas`) has, where this writes it.
 */
#define _GNU_SOURCE
#include <link.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

struct area {
	uint32_t feature, bits, offset, size, ecx;
};

#define AMX_TILE (1u << 24)

static int search(struct dl_phdr_info *info, size_t size, void *data)
{
	(void)size;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *part = &info->dlpi_phdr[i];
		uintptr_t at = info->dlpi_addr + part->p_vaddr, end = at + part->p_filesz;

		if (part->p_type != PT_LOAD || !(part->p_flags & PF_W))
			continue;
		for (at = (at + 3) & ~3ul; at + 2 * sizeof(struct area) <= end; at += 4) {
			struct area *area = (struct area *)at;

			if (area[0].bits == AMX_TILE && area[0].size == 64 && area[0].offset == 0 &&
			    area[1].bits == AMX_TILE && area[1].size == 8192 && area[1].offset == 0 &&
			    area[0].feature == area[1].feature) {
				area[0].offset = 2752;
				area[0].ecx = 2;
				area[1].offset = 2816;
				area[1].ecx = 6;
				*(int *)data = 1;
			}
		}
	}
	/* The program comes first; its libraries do not matter. */
	return 1;
}

__attribute__((constructor)) static void qemu_tiles(void)
{
	static const char name[] = "/qemu-system-x86_64";
	char path[4096];
	ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
	int found = 0;

	if (length < (ssize_t)sizeof(name))
		return;
	path[length] = 0;
	if (strcmp(path + length - (sizeof(name) - 1), name) != 0)
		return;
	dl_iterate_phdr(search, &found);
	if (!found)
		(void)!write(2, "qemu_tiles: no table\n", 21);
}
