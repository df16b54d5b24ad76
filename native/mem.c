/* SPDX-License-Identifier: Apache-2.0 */
/* Guest memory map; see mem.h.  vhost-user specification, "Memory region description". */
#include <signal.h>
#include <sys/mman.h>

#include "mem.h"

struct mapping {
	atomic_uint refs;
	struct vf_region region;
	uint8_t *host; /* of region.guest_addr */
	void *base;    /* what mmap returned */
	size_t length;
	uint32_t slot; /* in the SIGBUS table */
};

struct vf_mem {
	atomic_uint refs;
	uint32_t n;
	struct mapping *maps[]; /* by guest address */
};

/*
 * What the SIGBUS handler may repair.  Process-wide because a signal handler
 * has no other way to find it; entries are published with release stores.
 */
#define SIGBUS_SLOTS (2 * VF_MAX_REGIONS)
static struct {
	_Atomic(uintptr_t) base;
	_Atomic(size_t) length;
} sigbus_table[SIGBUS_SLOTS];
static pthread_mutex_t sigbus_lock = PTHREAD_MUTEX_INITIALIZER;

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	uintptr_t address = (uintptr_t)info->si_addr;
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);

	(void)context;
	for (uint32_t i = 0; i < SIGBUS_SLOTS; i++) {
		uintptr_t base = atomic_load_explicit(&sigbus_table[i].base, memory_order_acquire);
		size_t length = atomic_load_explicit(&sigbus_table[i].length, memory_order_relaxed);

		if (!base || address < base || address - base >= length)
			continue;
		/* From the page on: the rest of a truncated file is gone as well. */
		address &= ~(page - 1);
		if (mmap((void *)address, base + length - address, PROT_READ | PROT_WRITE,
			 MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
			 0) != MAP_FAILED)
			return;
		break;
	}
	/* Not ours: the default action, as soon as the instruction is repeated. */
	sigaction(signal, &(struct sigaction){.sa_handler = SIG_DFL}, NULL);
}

int vf_mem_catch_sigbus(void)
{
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};

	return sigaction(SIGBUS, &action, NULL) ? -errno : 0;
}

static int watch_mapping(struct mapping *map)
{
	int error = -ENOSPC;

	pthread_mutex_lock(&sigbus_lock);
	for (uint32_t i = 0; i < SIGBUS_SLOTS; i++) {
		if (atomic_load_explicit(&sigbus_table[i].base, memory_order_relaxed))
			continue;
		atomic_store_explicit(&sigbus_table[i].length, map->length, memory_order_relaxed);
		atomic_store_explicit(&sigbus_table[i].base, (uintptr_t)map->base,
				      memory_order_release);
		map->slot = i;
		error = 0;
		break;
	}
	pthread_mutex_unlock(&sigbus_lock);
	return error;
}

static void mapping_put(struct mapping *map)
{
	if (atomic_fetch_sub(&map->refs, 1) != 1)
		return;
	pthread_mutex_lock(&sigbus_lock);
	atomic_store_explicit(&sigbus_table[map->slot].base, 0, memory_order_release);
	pthread_mutex_unlock(&sigbus_lock);
	munmap(map->base, map->length);
	free(map);
}

static int mapping_new(const struct vf_region *region, int fd, struct mapping **result)
{
	uint64_t align = (uint64_t)sysconf(_SC_PAGESIZE);
	uint64_t end, first;
	struct mapping *map;
	struct stat st;
	int error;

	if (!region->size || __builtin_add_overflow(region->mmap_offset, region->size, &end) ||
	    region->guest_addr + region->size < region->guest_addr ||
	    region->user_addr + region->size < region->user_addr || end > INT64_MAX)
		return -EINVAL;
	if (fstat(fd, &st))
		return -errno;
	if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size < end)
		return -EINVAL;
	/* hugetlbfs maps whole huge pages only, and says their size here. */
	if (st.st_blksize > 0 && (uint64_t)st.st_blksize > align &&
	    !(st.st_blksize & (st.st_blksize - 1)))
		align = (uint64_t)st.st_blksize;
	first = region->mmap_offset & ~(align - 1);
	map = calloc(1, sizeof(*map));
	if (!map)
		return -ENOMEM;
	atomic_init(&map->refs, 1);
	map->region = *region;
	map->length = (size_t)((end - first + align - 1) & ~(align - 1));
	map->base = mmap(NULL, map->length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
			 (off_t)first);
	if (map->base == MAP_FAILED) {
		error = -errno;
		free(map);
		return error;
	}
	madvise(map->base, map->length, MADV_DONTDUMP);
	map->host = (uint8_t *)map->base + (region->mmap_offset - first);
	error = watch_mapping(map);
	if (error) {
		munmap(map->base, map->length);
		free(map);
		return error;
	}
	*result = map;
	return 0;
}

static int by_guest_addr(const void *a, const void *b)
{
	uint64_t x = (*(struct mapping *const *)a)->region.guest_addr;
	uint64_t y = (*(struct mapping *const *)b)->region.guest_addr;

	return x < y ? -1 : x > y;
}

static struct vf_mem *mem_alloc(uint32_t n)
{
	struct vf_mem *mem = calloc(1, sizeof(*mem) + n * sizeof(mem->maps[0]));

	if (mem)
		atomic_init(&mem->refs, 1);
	return mem;
}

struct vf_mem *vf_mem_extend(struct vf_mem *base, const struct vf_region *regions, const int *fds,
			     uint32_t n, int *error)
{
	uint32_t kept = base ? base->n : 0;
	struct vf_mem *mem;

	*error = -EINVAL;
	if (n > VF_MAX_REGIONS || kept + n > VF_MAX_REGIONS)
		return NULL;
	mem = mem_alloc(kept + n);
	if (!mem) {
		*error = -ENOMEM;
		return NULL;
	}
	for (uint32_t i = 0; i < kept; i++) {
		mem->maps[mem->n] = base->maps[i];
		atomic_fetch_add(&mem->maps[mem->n++]->refs, 1);
	}
	for (uint32_t i = 0; i < n; i++) {
		*error = mapping_new(&regions[i], fds[i], &mem->maps[mem->n]);
		if (*error) {
			vf_mem_put(mem);
			return NULL;
		}
		mem->n++;
	}
	qsort(mem->maps, mem->n, sizeof(mem->maps[0]), by_guest_addr);
	for (uint32_t i = 1; i < mem->n; i++) {
		const struct vf_region *before = &mem->maps[i - 1]->region;

		if (mem->maps[i]->region.guest_addr - before->guest_addr < before->size) {
			*error = -EINVAL;
			vf_mem_put(mem);
			return NULL;
		}
	}
	*error = 0;
	return mem;
}

struct vf_mem *vf_mem_without(struct vf_mem *base, const struct vf_region *region, int *error)
{
	struct vf_mem *mem;
	uint32_t found = UINT32_MAX;

	*error = -ENOENT;
	for (uint32_t i = 0; base && i < base->n; i++) {
		const struct vf_region *have = &base->maps[i]->region;

		/* The specification: guest address, user address and size name a region. */
		if (have->guest_addr == region->guest_addr && have->size == region->size &&
		    have->user_addr == region->user_addr)
			found = i;
	}
	if (found == UINT32_MAX)
		return NULL;
	mem = mem_alloc(base->n - 1);
	if (!mem) {
		*error = -ENOMEM;
		return NULL;
	}
	for (uint32_t i = 0; i < base->n; i++) {
		if (i == found)
			continue;
		mem->maps[mem->n] = base->maps[i];
		atomic_fetch_add(&mem->maps[mem->n++]->refs, 1);
	}
	*error = 0;
	return mem;
}

struct vf_mem *vf_mem_get(struct vf_mem *mem)
{
	atomic_fetch_add_explicit(&mem->refs, 1, memory_order_relaxed);
	return mem;
}

void vf_mem_put(struct vf_mem *mem)
{
	if (!mem || atomic_fetch_sub_explicit(&mem->refs, 1, memory_order_acq_rel) != 1)
		return;
	for (uint32_t i = 0; i < mem->n; i++)
		mapping_put(mem->maps[i]);
	free(mem);
}

bool vf_mem_find(const struct vf_mem *mem, uint64_t guest_addr, struct vf_mem_window *window)
{
	uint32_t low = 0, high = mem->n;

	/* The last region that starts at or below the address. */
	while (low < high) {
		uint32_t middle = (low + high) / 2;

		if (mem->maps[middle]->region.guest_addr <= guest_addr)
			low = middle + 1;
		else
			high = middle;
	}
	if (!low)
		return false;
	const struct mapping *map = mem->maps[low - 1];

	if (guest_addr - map->region.guest_addr >= map->region.size)
		return false;
	*window = (struct vf_mem_window){map->region.guest_addr, map->region.size, map->host};
	return true;
}

void *vf_mem_at_user(const struct vf_mem *mem, uint64_t user_addr, uint64_t size)
{
	for (uint32_t i = 0; i < mem->n; i++) {
		const struct mapping *map = mem->maps[i];
		uint64_t offset = user_addr - map->region.user_addr;

		if (user_addr >= map->region.user_addr && offset < map->region.size)
			return map->region.size - offset >= size ? map->host + offset : NULL;
	}
	return NULL;
}
