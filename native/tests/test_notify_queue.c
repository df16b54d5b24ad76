/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The notification queue against a driver of our own: a ring in shared memory,
 * buffers of several shapes, kicks and interrupts as Virtio 1.2 has them.
 * With an argument: how many elements a second go through.
 */
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>

#include "../events.h"
#include "guest.h"
#include "vring.h"

/* ---- the driver ---------------------------------------------------------------- */

#define GUEST_BASE 0x100000u
#define USER_BASE 0x7e0000000000u
#define MEMORY (8u << 20)
#define MAX_RING 1024u
#define BUFFER 320u
#define SLOT 512u /* of memory for one buffer */

struct driver {
	struct vf_device *device;
	int memory_fd, kick_fd, call_fd, err_fd;
	uint8_t *memory;
	uint32_t size, pieces; /* of the ring; descriptors in a buffer */
	bool event_idx, indirect;
	struct vring ring;
	uint16_t avail, used;
	uint32_t buffer_size;
	uint32_t n_kicks, n_calls;
};

static uint64_t buffer_at(uint32_t i)
{
	return 1u << 20 | i * SLOT;
}

static uint8_t *table_at(struct driver *d, uint32_t i)
{
	return d->memory + (4u << 20) + i * 256;
}

static void set_desc(struct vring_desc *desc, uint64_t offset, uint32_t len, uint16_t flags,
		     uint16_t next)
{
	*desc = (struct vring_desc){GUEST_BASE + offset, len, flags, next};
}

/* Buffer i as a chain of d->pieces descriptors, the first of which is i * pieces in the ring. */
static void describe(struct driver *d, uint32_t i)
{
	struct vring_desc *table = d->indirect ? (void *)table_at(d, i) : d->ring.desc;
	uint32_t first = d->indirect ? 0 : i * d->pieces, at = 0;

	for (uint32_t p = 0; p < d->pieces; p++) {
		uint32_t last = p + 1 == d->pieces;
		/* Odd lengths, with holes between, so that fields straddle the pieces. */
		uint32_t len = last ? d->buffer_size - at : 7 + 13 * p;

		set_desc(&table[first + p], buffer_at(i) + at + p * 8, len,
			 VRING_DESC_F_WRITE | (last ? 0 : VRING_DESC_F_NEXT),
			 (uint16_t)(first + p + 1));
		at += len;
	}
	if (d->indirect)
		set_desc(&d->ring.desc[i], (uint64_t)(table_at(d, i) - d->memory),
			 d->pieces * (uint32_t)sizeof(struct vring_desc), VRING_DESC_F_INDIRECT, 0);
}

static uint16_t head_of(struct driver *d, uint32_t i)
{
	return (uint16_t)(d->indirect ? i : i * d->pieces);
}

static void kick(struct driver *d)
{
	uint64_t one = 1;

	d->n_kicks++;
	CHECK_EQ(write(d->kick_fd, &one, sizeof(one)), sizeof(one));
}

/* Makes n buffers, by these heads, available; kicks when the device asks for it. */
static void add_heads(struct driver *d, const uint16_t *heads, uint32_t n)
{
	uint16_t old = d->avail;

	for (uint32_t i = 0; i < n; i++)
		d->ring.avail->ring[d->avail++ % d->size] = heads[i];
	if (vring_publish(&d->ring, d->event_idx, old, d->avail))
		kick(d);
}

static void add_buffers(struct driver *d, uint32_t first, uint32_t n)
{
	uint16_t heads[MAX_RING];

	for (uint32_t i = 0; i < n; i++) {
		describe(d, first + i);
		heads[i] = head_of(d, first + i);
	}
	add_heads(d, heads, n);
}

struct element {
	uint32_t used_len;
	uint16_t head;
	struct fuse_out_header header;
	struct vf_fsnotify_out out;
	char name[256];
};

/* Reads a buffer's bytes, skipping the holes. */
static void gather(struct driver *d, uint32_t i, void *to, uint32_t size)
{
	uint8_t bytes[SLOT];
	uint32_t at = 0;

	for (uint32_t p = 0; p < d->pieces && at < size; p++) {
		uint32_t len = p + 1 == d->pieces ? size - at : 7 + 13 * p;

		memcpy(bytes + at, d->memory + buffer_at(i) + at + p * 8, len);
		at += len;
	}
	memcpy(to, bytes, size);
}

/* The next element, if there is one. */
static bool take_used(struct driver *d, struct element *e)
{
	struct vring_used_elem u;
	uint32_t i;

	if (__atomic_load_n(&d->ring.used->idx, __ATOMIC_ACQUIRE) == d->used)
		return false;
	u = d->ring.used->ring[d->used++ % d->size];
	i = d->indirect ? u.id : u.id / d->pieces;
	CHECK_EQ(head_of(d, i), u.id);
	e->head = (uint16_t)u.id;
	e->used_len = u.len;
	CHECK(u.len >= 64 && u.len <= BUFFER);
	memset(e->name, 0, sizeof(e->name));
	gather(d, i, &e->header, u.len);
	CHECK_EQ(e->header.len, u.len);
	CHECK_EQ(e->header.error, 0x5800);
	CHECK_EQ(e->header.unique, 0);
	CHECK_EQ(u.len, 64 + e->out.namelen);
	return true;
}

/* Asks for an interrupt at the next element; true: do not sleep, one is there. */
static bool enable_calls(struct driver *d)
{
	if (d->event_idx)
		*(volatile uint16_t *)&vring_used_event(&d->ring) = d->used;
	else
		*(volatile uint16_t *)&d->ring.avail->flags = 0;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return __atomic_load_n(&d->ring.used->idx, __ATOMIC_ACQUIRE) != d->used;
}

static void disable_calls(struct driver *d)
{
	if (!d->event_idx)
		*(volatile uint16_t *)&d->ring.avail->flags = VRING_AVAIL_F_NO_INTERRUPT;
}

/* false: none came in time. */
static bool await_call(struct driver *d, int timeout_ms)
{
	struct pollfd p = {.fd = d->call_fd, .events = POLLIN};
	uint64_t count;

	if (enable_calls(d))
		return true;
	if (poll(&p, 1, timeout_ms) != 1)
		return false;
	CHECK_EQ(read(d->call_fd, &count, sizeof(count)), sizeof(count));
	d->n_calls++;
	return true;
}

static void take(struct driver *d, struct element *e)
{
	while (!take_used(d, e))
		CHECK(await_call(d, 5000));
}

/* ---- the device ------------------------------------------------------------------ */

#define QUEUE 1u

static struct vf_region region_of(uint64_t offset, uint64_t size)
{
	return (struct vf_region){GUEST_BASE + offset, size, USER_BASE + offset, offset};
}

static void start_queue(struct driver *d, uint32_t base)
{
	uint64_t at = USER_BASE;
	struct vf_queue_config config = {
	    .index = QUEUE,
	    .role = VF_QUEUE_NOTIFICATION,
	    .size = d->size,
	    .base = base,
	    .desc_addr = at + (uint64_t)((uint8_t *)d->ring.desc - d->memory),
	    .avail_addr = at + (uint64_t)((uint8_t *)d->ring.avail - d->memory),
	    .used_addr = at + (uint64_t)((uint8_t *)d->ring.used - d->memory),
	    .kick_fd = d->kick_fd,
	    .call_fd = d->call_fd,
	    .err_fd = d->err_fd,
	    .event_idx = d->event_idx,
	    .indirect = d->indirect,
	};

	CHECK_EQ(vf_queue_start(d->device, &config), 0);
}

struct shape {
	uint32_t size, pieces;
	bool event_idx, indirect;
};

static void driver_init(struct driver *d, struct vf_share *share, struct shape shape)
{
	struct vf_region region = region_of(0, MEMORY);
	int error;

	memset(d, 0, sizeof(*d));
	d->size = shape.size;
	d->pieces = shape.pieces;
	d->event_idx = shape.event_idx;
	d->indirect = shape.indirect;
	d->buffer_size = BUFFER;
	d->memory_fd = memfd_create("guest", MFD_CLOEXEC);
	CHECK_EQ(ftruncate(d->memory_fd, MEMORY), 0);
	d->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, d->memory_fd, 0);
	CHECK(d->memory != MAP_FAILED);
	vring_init(&d->ring, d->size, d->memory, 4096);
	d->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	d->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	d->err_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	d->device = vf_device_new(share, 4, &error);
	CHECK(d->device);
	CHECK_EQ(vf_device_set_memory(d->device, &region, &d->memory_fd, 1), 0);
	start_queue(d, 0);
}

static void driver_free(struct driver *d)
{
	vf_device_free(d->device);
	munmap(d->memory, MEMORY);
	close(d->memory_fd);
	close(d->kick_fd);
	close(d->call_fd);
	close(d->err_fd);
}

/* ---- the host ---------------------------------------------------------------------- */

static struct vf_events events; /* only what the queue looks at */

static void push(uint64_t nodeid, const char *name)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	struct vf_outgoing out = {
	    .element = {.nodeid = nodeid,
			.generation = 5,
			.mask = VF_FS_CREATE | VF_FS_ISDIR,
			.namelen = (uint32_t)strlen(name),
			.child_nodeid = ~nodeid,
			.child_generation = 6},
	    .name = name,
	    .seen_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec,
	};

	vf_outbox_push(events.outbox, &out, 1);
}

static struct vf_events_stats events_stats(void)
{
	struct vf_events_stats s;

	memset(&s, 0, sizeof(s));
	vf_outbox_get_stats(events.outbox, &s);
	return s;
}

static void check_element(const struct element *e, uint64_t nodeid, const char *name)
{
	CHECK_EQ(e->out.nodeid, nodeid);
	CHECK_EQ(e->out.generation, 5);
	CHECK_EQ(e->out.mask, VF_FS_CREATE | VF_FS_ISDIR);
	CHECK_EQ(e->out.child_nodeid, ~nodeid);
	CHECK_EQ(e->out.child_generation, 6);
	CHECK(!strcmp(e->name, name));
}

/* ---- what is tested ------------------------------------------------------------------ */

static void elements_fill_buffers_of_any_shape(struct driver *d)
{
	char longest[256];
	struct element e;

	memset(longest, 'x', 255);
	longest[255] = 0;
	add_buffers(d, 0, 4);
	push(1, "");
	push(2, "short");
	push(3, longest);
	vf_outbox_flush(events.outbox);
	take(d, &e);
	check_element(&e, 1, "");
	CHECK_EQ(e.used_len, 64);
	take(d, &e);
	check_element(&e, 2, "short");
	CHECK_EQ(e.used_len, 69);
	take(d, &e);
	check_element(&e, 3, longest);
	CHECK_EQ(e.used_len, 319);
	CHECK(!take_used(d, &e));
	CHECK_EQ(events_stats().buffers, 1);
}

static void buffers_are_taken_only_for_elements(struct driver *d)
{
	add_buffers(d, 0, 4);
	CHECK_EQ(vf_queue_stop(d->device, QUEUE), 0);
	start_queue(d, 0);
	push(1, "a");
	vf_outbox_flush(events.outbox);
	CHECK_EQ(vf_queue_stop(d->device, QUEUE), 1);
	start_queue(d, 1);
}

static void a_buffer_that_comes_later_is_filled_on_the_kick(struct driver *d)
{
	struct element e;

	for (uint64_t i = 1; i <= 50; i++)
		push(i, "late");
	vf_outbox_flush(events.outbox);
	CHECK_EQ(events_stats().depth, 50);
	for (uint64_t i = 1; i <= 50; i++) {
		add_buffers(d, (uint32_t)i % 4, 1);
		take(d, &e);
		check_element(&e, i, "late");
	}
	CHECK_EQ(events_stats().depth, 0);
}

static void with_buffers_in_plenty_nobody_kicks(struct driver *d)
{
	struct element e;
	uint32_t before;

	add_buffers(d, 0, 4);
	push(1, "a");
	vf_outbox_flush(events.outbox);
	take(d, &e);
	before = d->n_kicks;
	for (uint64_t i = 2; i <= 100; i++) {
		push(i, "a");
		vf_outbox_flush(events.outbox);
		take(d, &e);
		check_element(&e, i, "a");
		add_heads(d, &e.head, 1);
	}
	CHECK_EQ(d->n_kicks, before);
}

static void what_waits_survives_a_stop_and_start(struct driver *d)
{
	struct element e;
	uint64_t next = 1;
	int base;

	for (uint64_t i = 1; i <= 20; i++)
		push(i, "waits");
	vf_outbox_flush(events.outbox);
	for (uint32_t round = 0; round < 5; round++) {
		add_buffers(d, 0, 4);
		for (uint32_t i = 0; i < 4; i++) {
			take(d, &e);
			check_element(&e, next++, "waits");
		}
		base = vf_queue_stop(d->device, QUEUE);
		CHECK_EQ(base, d->avail);
		CHECK_EQ(events_stats().buffers, 0);
		vf_outbox_flush(events.outbox); /* nobody is there */
		start_queue(d, (uint32_t)base);
	}
	CHECK_EQ(next, 21);
}

static void expect_fault(struct driver *d, const char *text)
{
	struct pollfd p = {.fd = d->err_fd, .events = POLLIN};
	struct vf_fault fault;

	CHECK_EQ(poll(&p, 1, 5000), 1);
	CHECK_EQ(vf_device_next_fault(d->device, &fault), 1);
	CHECK_EQ(fault.queue, QUEUE);
	if (!strstr(fault.text, text)) {
		fprintf(stderr, "unexpected: %s\n", fault.text);
		abort();
	}
	CHECK_EQ(vf_device_next_fault(d->device, &fault), 0);
}

/* A fault, after which the queue does nothing more and nothing is lost. */
static void check_refused(struct driver *d, const char *text)
{
	uint16_t used = d->ring.used->idx;

	push(1, "refused");
	vf_outbox_flush(events.outbox);
	expect_fault(d, text);
	push(2, "too");
	vf_outbox_flush(events.outbox);
	kick(d);
	CHECK_EQ(events_stats().depth, 2);
	CHECK_EQ(vf_queue_stop(d->device, QUEUE), (uint16_t)(d->avail - 1));
	CHECK_EQ(d->ring.used->idx, used);
}

static void a_short_buffer_is_a_fault(struct driver *d)
{
	d->buffer_size = BUFFER - 1;
	add_buffers(d, 0, 1);
	check_refused(d, "0 readable and 319 writable bytes, where none and at least 320");
}

static void a_readable_buffer_is_a_fault(struct driver *d)
{
	struct vring_desc *desc = d->ring.desc;
	uint16_t head = 0;

	set_desc(desc, buffer_at(0), 16, VRING_DESC_F_NEXT, 1);
	set_desc(desc + 1, buffer_at(1), 400, VRING_DESC_F_WRITE, 0);
	add_heads(d, &head, 1);
	check_refused(d, "16 readable and 400 writable bytes");
}

static void a_buffer_outside_memory_is_a_fault(struct driver *d)
{
	uint16_t head = 0;

	set_desc(d->ring.desc, MEMORY, 400, VRING_DESC_F_WRITE, 0);
	add_heads(d, &head, 1);
	check_refused(d, "outside guest memory");
}

static void a_broken_index_is_a_fault(struct driver *d)
{
	d->ring.avail->idx = (uint16_t)(d->size + 1);
	push(1, "a");
	vf_outbox_flush(events.outbox);
	expect_fault(d, "available index ran ahead");
	CHECK_EQ(vf_queue_stop(d->device, QUEUE), 0);
}

/* Buffers lie in memory that came after the queue was started, and in place of what was there. */
static void memory_comes_and_goes_under_the_queue(struct driver *d)
{
	struct vf_region more = region_of(MEMORY, 1u << 20);
	struct element e;
	uint16_t head = 0;
	int fd[2];

	more.mmap_offset = 0;
	for (int i = 0; i < 2; i++) {
		struct fuse_out_header header;
		struct vf_fsnotify_out out;

		fd[i] = memfd_create("more", MFD_CLOEXEC);
		CHECK_EQ(ftruncate(fd[i], 1 << 20), 0);
		CHECK_EQ(vf_device_add_region(d->device, &more, fd[i]), 0);
		set_desc(d->ring.desc, MEMORY + 4096, 400, VRING_DESC_F_WRITE, 0);
		add_heads(d, &head, 1);
		push(7 + (uint64_t)i, "moved");
		vf_outbox_flush(events.outbox);
		CHECK_EQ(d->ring.used->idx, i + 1);
		CHECK_EQ(pread(fd[i], &header, sizeof(header), 4096), sizeof(header));
		CHECK_EQ(header.len, 69);
		CHECK_EQ(pread(fd[i], &out, sizeof(out), 4096 + sizeof(header)), sizeof(out));
		CHECK_EQ(out.nodeid, 7 + i);
		CHECK_EQ(vf_device_remove_region(d->device, &more), 0);
		close(fd[i]);
	}
	d->used = 2;
	add_buffers(d, 0, 1);
	push(9, "back");
	vf_outbox_flush(events.outbox);
	take(d, &e);
	check_element(&e, 9, "back");
}

static void one_queue_at_a_time(struct driver *d)
{
	struct vf_region region = region_of(0, MEMORY);
	struct vf_queue_config config = {
	    .index = 2,
	    .role = VF_QUEUE_NOTIFICATION,
	    .size = d->size,
	    .desc_addr = region.user_addr,
	    .avail_addr = region.user_addr + 16u * d->size,
	    .used_addr = region.user_addr + 65536,
	    .kick_fd = d->kick_fd,
	    .call_fd = -1,
	    .err_fd = -1,
	};
	CHECK_EQ(vf_queue_start(d->device, &config), -EBUSY);
	CHECK(vf_queue_stop(d->device, QUEUE) >= 0);
	CHECK_EQ(vf_queue_start(d->device, &config), 0);
	CHECK_EQ(vf_queue_stop(d->device, 2), 0);
}

/* ---- many ------------------------------------------------------------------------------ */

struct flood {
	uint64_t n;
	uint32_t batch;
	atomic_uint_fast64_t pushed;
	const atomic_uint_fast64_t *taken;
};

/* The source's thread: batches, each flushed; never more than the outbox holds. */
static void *source(void *arg)
{
	struct flood *f = arg;
	char name[24];

	for (uint64_t i = 1; i <= f->n; i++) {
		snprintf(name, sizeof(name), "file-%llu", (unsigned long long)i);
		push(i, name);
		if (i % f->batch == 0 || i == f->n)
			vf_outbox_flush(events.outbox);
		while (i - atomic_load(f->taken) > 50000)
			nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
	}
	return NULL;
}

/* Takes all elements of a flood in order, giving each buffer back at once, kicking per batch. */
static void drink(struct driver *d, uint64_t n, uint32_t batch, uint64_t stop_every)
{
	atomic_uint_fast64_t taken = 0;
	struct flood f = {.n = n, .batch = batch, .taken = &taken};
	uint16_t heads[MAX_RING];
	uint64_t next = 1, stop_at = stop_every;
	struct element e;
	pthread_t thread;
	char name[24];

	add_buffers(d, 0, d->size / (d->indirect ? 1 : d->pieces));
	CHECK_EQ(pthread_create(&thread, NULL, source, &f), 0);
	while (next <= n) {
		uint32_t n_heads = 0;

		disable_calls(d);
		while (n_heads < MAX_RING && take_used(d, &e)) {
			snprintf(name, sizeof(name), "file-%llu", (unsigned long long)next);
			check_element(&e, next++, name);
			heads[n_heads++] = e.head;
		}
		atomic_store(&taken, next - 1);
		if (n_heads)
			add_heads(d, heads, n_heads);
		else if (!await_call(d, 5000))
			CHECK(!"an interrupt was lost");
		if (stop_every && next >= stop_at) {
			stop_at = next + stop_every;
			int base = vf_queue_stop(d->device, QUEUE);

			CHECK(base >= 0);
			start_queue(d, (uint32_t)base);
		}
	}
	CHECK_EQ(pthread_join(thread, NULL), 0);
	CHECK_EQ(events_stats().lost, 0);
	CHECK_EQ(events_stats().depth, 0);
}

static void a_flood_arrives_whole_and_in_order(struct driver *d)
{
	drink(d, 20000, 16, 0);
}

static void a_flood_survives_stops_and_starts(struct driver *d)
{
	drink(d, 10000, 16, 97);
}

/* ---- main ------------------------------------------------------------------------------ */

static struct vf_share *share; /* the queue serves it, and looks at nothing in it */

static void open_share(void)
{
	struct vf_share_config config = {
	    .root_fd = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC),
	    .proc_fd_dir = open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC),
	};
	int error;

	share = vf_share_new(&config, &error);
	CHECK(share);
	close(config.root_fd);
	close(config.proc_fd_dir);
}

static void with_driver(const char *what, void (*test)(struct driver *), struct shape shape)
{
	struct driver d;
	int error;

	fprintf(stderr, "%s, %u buffers, %u pieces%s%s ", what, shape.size / shape.pieces,
		shape.pieces, shape.event_idx ? ", EVENT_IDX" : "",
		shape.indirect ? ", indirect" : "");
	memset(&events, 0, sizeof(events));
	events.config.notify_buf_size = BUFFER;
	atomic_store(&events.max_element, BUFFER);
	events.trace = vf_trace_new(&error);
	events.outbox = vf_outbox_new(100000, events.trace, &error);
	CHECK(events.trace && events.outbox);
	share->events = &events;
	driver_init(&d, share, shape);
	test(&d);
	driver_free(&d);
	share->events = NULL;
	vf_outbox_free(events.outbox);
	vf_trace_free(events.trace);
	fprintf(stderr, "ok\n");
}

#define RUN(test, ...) with_driver(#test, test, (struct shape){__VA_ARGS__})
#define RUN_SHAPES(test)                                                                           \
	do {                                                                                       \
		RUN(test, 16, 1, false, false);                                                    \
		RUN(test, 16, 1, true, false);                                                     \
		RUN(test, 16, 4, false, false);                                                    \
		RUN(test, 16, 4, true, true);                                                      \
	} while (0)

static uint64_t cpu_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static uint64_t wall_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void measure(struct driver *d)
{
	static const uint32_t batches[] = {1, 32, 1000};
	uint64_t n = 500000;

	for (uint32_t i = 0; i < 3; i++) {
		uint64_t cpu = cpu_us(), wall = wall_us();
		uint32_t kicks = d->n_kicks, calls = d->n_calls;

		if (i) {
			/* The buffers of the run before are still there. */
			CHECK(vf_queue_stop(d->device, QUEUE) >= 0);
			memset(d->memory, 0, MEMORY);
			d->avail = d->used = 0;
			start_queue(d, 0);
		}
		drink(d, n, batches[i], 0);
		wall = wall_us() - wall;
		printf(
		    "%4u buffers, batches of %4u: %8.0f elements/s, %.2f us CPU each (driver and "
		    "source included), %.3f kicks, %.3f interrupts\n",
		    d->size, batches[i], 1e6 * (double)n / (double)wall,
		    (double)(cpu_us() - cpu) / (double)n, (double)(d->n_kicks - kicks) / (double)n,
		    (double)(d->n_calls - calls) / (double)n);
	}
}

int main(int argc, char **argv)
{
	(void)argv;
	open_share();
	if (argc > 1) {
		RUN(measure, 16, 1, true, false);
		RUN(measure, 256, 1, true, false);
		RUN(measure, 16, 1, false, false);
		RUN(measure, 256, 1, false, false);
		return 0;
	}
	RUN_SHAPES(elements_fill_buffers_of_any_shape);
	RUN_SHAPES(buffers_are_taken_only_for_elements);
	RUN_SHAPES(a_buffer_that_comes_later_is_filled_on_the_kick);
	RUN_SHAPES(with_buffers_in_plenty_nobody_kicks);
	RUN_SHAPES(what_waits_survives_a_stop_and_start);
	RUN(a_short_buffer_is_a_fault, 16, 1, true, false);
	RUN(a_short_buffer_is_a_fault, 16, 4, false, true);
	RUN(a_readable_buffer_is_a_fault, 16, 1, true, false);
	RUN(a_buffer_outside_memory_is_a_fault, 16, 1, true, false);
	RUN(a_broken_index_is_a_fault, 16, 1, true, false);
	RUN(memory_comes_and_goes_under_the_queue, 16, 1, true, false);
	RUN(one_queue_at_a_time, 16, 1, true, false);
	RUN_SHAPES(a_flood_arrives_whole_and_in_order);
	RUN(a_flood_arrives_whole_and_in_order, 1, 1, true, false);
	RUN(a_flood_arrives_whole_and_in_order, 1, 1, false, false);
	RUN_SHAPES(a_flood_survives_stops_and_starts);
	vf_share_free(share);
	return 0;
}
