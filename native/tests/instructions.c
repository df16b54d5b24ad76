// SPDX-License-Identifier: Apache-2.0
/*
 * What an operation costs in instructions, from the descriptor chain to the used ring: run by
 * scripts/instructions under callgrind, which counts what happens in served().
 *
 *   instructions OPERATION COUNT
 *
 * The queue is driven by the calling thread, so that the count is the same each time.
 */
#define run run_of_queue
#include "../request_queue.c"
#undef run
#include "../polling.h"
#include "share.h"

#include <sys/mman.h>

#define MEMORY (4u << 20)
#define RING_SIZE 256u
#define AT_DESC 0u
#define AT_AVAIL 0x4000u
#define AT_USED 0x8000u
#define AT_TABLES 0x10000u
#define AT_REQUESTS 0x20000u
#define AT_REPLIES 0x100000u
#define AT_DATA 0x200000u
#define SLOT 4096u
#define DEPTH 16u
#define PAGE 4096u
#define LARGE (32 * PAGE)

struct machine {
	uint8_t *memory;
	struct vf_device *device;
	struct vf_queue *queue;
	struct vf_thread thread;
	uint16_t avail;
};

static void start(struct machine *m, struct vf_share *share)
{
	int fd = memfd_create("guest", 0), error;
	struct vf_region region = {.size = MEMORY, .user_addr = 0x10000000};
	struct vf_queue_config config = {
	    .size = RING_SIZE,
	    .desc_addr = region.user_addr + AT_DESC,
	    .avail_addr = region.user_addr + AT_AVAIL,
	    .used_addr = region.user_addr + AT_USED,
	    .event_idx = true,
	    .indirect = true,
	};

	memset(m, 0, sizeof(*m));
	CHECK_EQ(ftruncate(fd, MEMORY), 0);
	m->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(m->memory != MAP_FAILED);
	m->device = vf_device_new(share, 1, &error);
	CHECK(m->device);
	CHECK_EQ(vf_device_set_memory(m->device, &region, &fd, 1), 0);
	m->queue = calloc(1, sizeof(*m->queue));
	m->queue->device = m->device;
	m->queue->call_fd = m->queue->err_fd = -1;
	pthread_mutex_init(&m->queue->lock, NULL);
	m->queue->mem = vf_mem_get(m->device->mem);
	m->queue->mem_version = atomic_load(&m->device->mem_version);
	CHECK_EQ(vf_ring_init(&m->queue->ring, m->queue->mem, &config), 0);
	CHECK_EQ(vf_thread_enter(&m->thread, share, "queue"), 0);
}

/* Adds data to a chain page by page, none beside its neighbour, as a guest's page cache has them.
 */
static uint32_t add_pages(struct vring_desc *table, uint32_t n, uint32_t bytes, uint16_t flags)
{
	for (uint32_t page = bytes / PAGE; page--;)
		table[n++] = (struct vring_desc){AT_DATA + page * PAGE, PAGE, flags, 0};
	return n;
}

/* Puts a request into the ring as Linux does; data_in and data_out are bytes of whole pages. */
static uint8_t *offer(struct machine *m, uint32_t slot, uint32_t opcode, uint64_t nodeid,
		      const void *args, uint32_t size, uint32_t reply, uint32_t data_in,
		      uint32_t data_out)
{
	struct vring_desc *table = (void *)(m->memory + AT_TABLES + slot * SLOT);
	struct vring_desc *desc = (void *)(m->memory + AT_DESC);
	uint16_t *avail = (void *)(m->memory + AT_AVAIL);
	uint8_t *request = m->memory + AT_REQUESTS + slot * SLOT;
	struct fuse_in_header header = {
	    .len = (uint32_t)sizeof(header) + size + data_in,
	    .opcode = opcode,
	    .unique = 2,
	    .nodeid = nodeid,
	};
	uint32_t n = 0;

	memcpy(request, &header, sizeof(header));
	memcpy(request + sizeof(header), args, size);
	table[n++] = (struct vring_desc){AT_REQUESTS + slot * SLOT, sizeof(header), 0, 0};
	if (size)
		table[n++] =
		    (struct vring_desc){AT_REQUESTS + slot * SLOT + sizeof(header), size, 0, 0};
	n = add_pages(table, n, data_in, 0);
	if (opcode != FUSE_FORGET)
		table[n++] = (struct vring_desc){AT_REPLIES + slot * SLOT, 16 + reply,
						 VRING_DESC_F_WRITE, 0};
	n = add_pages(table, n, data_out, VRING_DESC_F_WRITE);
	for (uint32_t i = 0; i + 1 < n; i++) {
		table[i].flags |= VRING_DESC_F_NEXT;
		table[i].next = (uint16_t)(i + 1);
	}
	desc[slot] = (struct vring_desc){AT_TABLES + slot * SLOT, n * (uint32_t)sizeof(*table),
					 VRING_DESC_F_INDIRECT, 0};
	avail[2 + m->avail++ % RING_SIZE] = (uint16_t)slot;
	__atomic_store_n(&avail[1], m->avail, __ATOMIC_RELEASE);
	return m->memory + AT_REPLIES + slot * SLOT;
}

/* What is counted. */
static __attribute__((noinline)) void served(struct machine *m)
{
	vf_queue_drain(m->queue, &m->thread, UINT32_MAX);
	CHECK(!m->queue->broken);
}

/* One request alone; its reply's payload. */
static void *ask(struct machine *m, uint32_t opcode, uint64_t nodeid, const void *args,
		 uint32_t size, uint32_t reply, int error)
{
	uint8_t *out = offer(m, 0, opcode, nodeid, args, size, reply, 0, 0);

	served(m);
	if (opcode != FUSE_FORGET)
		CHECK_EQ(((struct fuse_out_header *)out)->error, error);
	return out + 16;
}

/* ---- operations ------------------------------------------------------------------ */

static void do_getattr(struct machine *m)
{
	ask(m, FUSE_GETATTR, 1, &(struct fuse_getattr_in){0}, 16, sizeof(struct fuse_attr_out), 0);
}

static void do_getattr_batch(struct machine *m)
{
	for (uint32_t i = 0; i < DEPTH; i++)
		offer(m, i, FUSE_GETATTR, 1, &(struct fuse_getattr_in){0}, 16,
		      sizeof(struct fuse_attr_out), 0, 0);
	served(m);
}

static void do_statfs(struct machine *m)
{
	ask(m, FUSE_STATFS, 1, "", 0, sizeof(struct fuse_statfs_out), 0);
}

static struct fuse_entry_out *look_up(struct machine *m, const char *name, int error)
{
	return ask(m, FUSE_LOOKUP, 1, name, (uint32_t)strlen(name) + 1,
		   sizeof(struct fuse_entry_out), error);
}

static void do_forget(struct machine *m, uint64_t nodeid)
{
	ask(m, FUSE_FORGET, nodeid, &(struct fuse_forget_in){1}, sizeof(struct fuse_forget_in), 0,
	    0);
}

static void do_lookup(struct machine *m)
{
	look_up(m, "held", 0);
}

static void do_lookup_cold(struct machine *m)
{
	do_forget(m, look_up(m, "other", 0)->nodeid);
}

static void do_lookup_miss(struct machine *m)
{
	look_up(m, "nothing", -ENOENT);
}

static uint64_t held, held_fh;

static uint64_t open_file(struct machine *m, uint64_t nodeid)
{
	struct fuse_open_in in = {.flags = O_RDWR};
	struct fuse_open_out *out =
	    ask(m, FUSE_OPEN, nodeid, &in, sizeof(in), sizeof(struct fuse_open_out), 0);

	return out->fh;
}

static void release_file(struct machine *m, uint64_t nodeid, uint64_t fh)
{
	struct fuse_release_in in = {.fh = fh};

	ask(m, FUSE_RELEASE, nodeid, &in, sizeof(in), 0, 0);
}

static void do_open(struct machine *m)
{
	release_file(m, held, open_file(m, held));
}

static void read_from(struct machine *m, uint32_t size)
{
	struct fuse_read_in in = {.fh = held_fh, .size = size};
	struct fuse_out_header *out =
	    (void *)offer(m, 0, FUSE_READ, held, &in, sizeof(in), 0, 0, size);

	served(m);
	CHECK_EQ(out->len, 16 + size);
}

static void do_read(struct machine *m)
{
	read_from(m, PAGE);
}

static void do_read_large(struct machine *m)
{
	read_from(m, LARGE);
}

static void write_to(struct machine *m, uint64_t nodeid, uint64_t fh, uint32_t size)
{
	struct fuse_write_in in = {.fh = fh, .size = size};
	struct fuse_out_header *out =
	    (void *)offer(m, 0, FUSE_WRITE, nodeid, &in, sizeof(in), 8, size, 0);

	served(m);
	CHECK_EQ(out->error, 0);
}

static void do_write(struct machine *m)
{
	write_to(m, held, held_fh, PAGE);
}

static void do_write_large(struct machine *m)
{
	write_to(m, held, held_fh, LARGE);
}

static void do_create(struct machine *m)
{
	struct {
		struct fuse_create_in in;
		char name[4];
	} create = {{.flags = O_RDWR | O_CREAT, .mode = 0644}, "new"};
	struct {
		struct fuse_entry_out entry;
		struct fuse_open_out open;
	} *out = ask(m, FUSE_CREATE, 1, &create, sizeof(create), sizeof(*out), 0);
	uint64_t nodeid = out->entry.nodeid, fh = out->open.fh;

	write_to(m, nodeid, fh, PAGE);
	release_file(m, nodeid, fh);
	ask(m, FUSE_UNLINK, 1, "new", 4, 0, 0);
	do_forget(m, nodeid);
}

static const struct {
	const char *name;
	void (*run)(struct machine *m);
} operations[] = {
    {"getattr", do_getattr},
    {"getattr_batch16", do_getattr_batch},
    {"statfs", do_statfs},
    {"lookup", do_lookup},
    {"lookup_forget", do_lookup_cold},
    {"lookup_miss", do_lookup_miss},
    {"open_release", do_open},
    {"read4k", do_read},
    {"read128k", do_read_large},
    {"write4k", do_write},
    {"write128k", do_write_large},
    {"create_write_release_unlink_forget", do_create},
};
#define N_OPERATIONS (sizeof(operations) / sizeof(operations[0]))

int main(int argc, char **argv)
{
	struct vf_share *share;
	struct machine m;
	uint32_t n = argc == 3 ? (uint32_t)atoi(argv[2]) : 0;

	if (argc == 1) {
		for (size_t i = 0; i < N_OPERATIONS; i++)
			puts(operations[i].name);
		return 0;
	}
	set_up();
	host_write("held", "");
	host_write("other", "");
	share = open_share(VF_HANDLES_NEVER, 100);
	/* As a guest's session without extensions of creating requests. */
	vf_share_start_session(share, FUSE_DONT_MASK, 1 << 20);
	start(&m, share);
	vf_thread_reply(&m.thread, 8192);
	held = look_up(&m, "held", 0)->nodeid;
	held_fh = open_file(&m, held);
	write_to(&m, held, held_fh, LARGE);
	for (size_t i = 0; i < N_OPERATIONS; i++)
		if (!strcmp(operations[i].name, argv[1]))
			for (uint32_t k = 0; k < n; k++)
				operations[i].run(&m);
	host_clean();
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
