/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The hiprio queue and request queues whose threads see to it while they are awake, against a
 * driver of our own: whoever of them looks, everything is answered, and the guest kicks when it
 * has to.
 */
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "../queue.h"
#include "share.h"
#include "vring.h"

#define QUEUE_MEMORY (1u << 19)
#define MEMORY (3 * QUEUE_MEMORY)
#define USER_BASE 0x7e0000000000u
#define SIZE 64u
#define SLOT 512u
#define AT_SLOTS 0x4000u
#define HIPRIO 0u
#define FIRST 2u /* request queue; 1 is left free */
/* The indices of the rings wrap soon. */
#define FIRST_INDEX 0xff00u
#define HANG_NS 20000000000u

struct queue {
	struct vf_device *device;
	uint32_t index;
	uint64_t at; /* in guest memory */
	uint8_t *memory;
	struct vring ring;
	uint16_t avail;
	bool event_idx;
	int kick_fd, call_fd, err_fd;
	unsigned int seed;
	uint64_t n_kicks;
};

struct machine {
	struct vf_device *device;
	uint8_t *memory;
	struct queue hiprio, requests[2];
};

static void open_queue(struct machine *m, struct queue *q, uint32_t index, bool event_idx)
{
	*q = (struct queue){.device = m->device,
			    .index = index,
			    .at = (index ? index - FIRST + 1 : 0) * QUEUE_MEMORY,
			    .event_idx = event_idx,
			    .seed = index,
			    .avail = FIRST_INDEX};
	q->memory = m->memory + q->at;
	vring_init(&q->ring, SIZE, q->memory, 4096);
	q->ring.avail->idx = q->ring.used->idx = q->avail;
	q->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	q->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	q->err_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

/* Nobody takes back what was lent. */
static void open_machine(struct machine *m, struct guest *g, bool event_idx)
{
	int fd = memfd_create("guest", MFD_CLOEXEC), error;
	struct vf_region region = {.size = MEMORY, .user_addr = USER_BASE};

	memset(m, 0, sizeof(*m));
	CHECK_EQ(ftruncate(fd, MEMORY), 0);
	m->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(m->memory != MAP_FAILED);
	m->device = vf_device_new(g->share, FIRST + 2, &error);
	CHECK(m->device);
	m->device->lending.take_back_ns = 0;
	CHECK_EQ(vf_device_set_memory(m->device, &region, &fd, 1), 0);
	close(fd);
	open_queue(m, &m->hiprio, HIPRIO, event_idx);
	for (uint32_t i = 0; i < 2; i++)
		open_queue(m, &m->requests[i], FIRST + i, event_idx);
}

static void close_queue(struct queue *q)
{
	close(q->kick_fd);
	close(q->call_fd);
	close(q->err_fd);
}

static void close_machine(struct machine *m)
{
	vf_device_free(m->device);
	close_queue(&m->hiprio);
	close_queue(&m->requests[0]);
	close_queue(&m->requests[1]);
	munmap(m->memory, MEMORY);
}

static void start(struct queue *q)
{
	uint64_t base = USER_BASE + q->at;
	struct vf_queue_config config = {
	    .index = q->index,
	    .role = q->index == HIPRIO ? VF_QUEUE_HIPRIO : VF_QUEUE_REQUEST,
	    .size = SIZE,
	    .base = q->avail,
	    .desc_addr = base + (uint64_t)((uint8_t *)q->ring.desc - q->memory),
	    .avail_addr = base + (uint64_t)((uint8_t *)q->ring.avail - q->memory),
	    .used_addr = base + (uint64_t)((uint8_t *)q->ring.used - q->memory),
	    .event_idx = q->event_idx,
	    .kick_fd = q->kick_fd,
	    .call_fd = q->call_fd,
	    .err_fd = q->err_fd,
	};

	CHECK_EQ(vf_queue_start(q->device, &config), 0);
}

static void stop(struct queue *q)
{
	CHECK_EQ(vf_queue_stop(q->device, q->index), q->avail);
}

/*
 * One request in slot i: FORGET; or GETATTR, now and then LOOKUP, which may have to wait, or
 * UNLINK, after which nothing is lent; or that opcode, if not 0.  header_size: of its first
 * descriptor; 0: what it is.
 */
static void describe(struct queue *q, uint32_t i, uint32_t header_size, uint32_t opcode)
{
	uint64_t at = q->at + AT_SLOTS + i * SLOT;
	uint8_t *slot = q->memory + AT_SLOTS + i * SLOT;
	uint32_t what = (uint32_t)rand_r(&q->seed) % 32;
	struct fuse_in_header header = {.opcode = FUSE_GETATTR,
					.len = sizeof(header) + sizeof(struct fuse_getattr_in),
					.unique = 2,
					.nodeid = FUSE_ROOT_ID};

	memset(slot, 0, SLOT);
	if (q->index == HIPRIO) {
		header.opcode = FUSE_FORGET;
		header.len = sizeof(header) + sizeof(struct fuse_forget_in);
		header.nodeid = 0x1234;
	} else if (opcode ? opcode != FUSE_GETATTR : what < 4) {
		header.opcode = opcode ? opcode : what ? FUSE_LOOKUP : FUSE_UNLINK;
		memcpy(slot + sizeof(header), "nothing", sizeof("nothing"));
		header.len = sizeof(header) + sizeof("nothing");
	}
	memcpy(slot, &header, sizeof(header));
	q->ring.desc[2 * i] =
	    (struct vring_desc){at, header_size ? header_size : header.len,
				q->index == HIPRIO ? 0 : VRING_DESC_F_NEXT, (uint16_t)(2 * i + 1)};
	q->ring.desc[2 * i + 1] = (struct vring_desc){at + 256, 16 + sizeof(struct fuse_entry_out),
						      VRING_DESC_F_WRITE, 0};
}

static void add_these(struct queue *q, uint32_t n, uint32_t header_size, uint32_t opcode)
{
	uint16_t old = q->avail;
	uint64_t one = 1;
	bool wanted;

	for (uint32_t i = 0; i < n; i++) {
		uint32_t slot = q->avail % (SIZE / 2);

		describe(q, slot, header_size, opcode);
		q->ring.avail->ring[q->avail++ % SIZE] = (uint16_t)(2 * slot);
	}
	wanted = vring_publish(&q->ring, q->event_idx, old, q->avail);
	if (wanted)
		CHECK_EQ(write(q->kick_fd, &one, sizeof(one)), sizeof(one));
	q->n_kicks += wanted;
}

static void add(struct queue *q, uint32_t n, uint32_t header_size)
{
	add_these(q, n, header_size, 0);
}

static void wait_until_used(struct queue *q)
{
	uint64_t ends_ns = vf_now_ns() + HANG_NS;

	while (__atomic_load_n(&q->ring.used->idx, __ATOMIC_ACQUIRE) != q->avail) {
		CHECK(vf_now_ns() < ends_ns);
		for (int i = 0; i < 20; i++)
			vf_relax();
		sched_yield();
	}
}

static void ask(struct queue *q, uint32_t opcode)
{
	add_these(q, 1, 0, opcode);
	wait_until_used(q);
}

static bool is_lent(struct machine *m)
{
	return atomic_load(&m->device->lending.lent);
}

/* And its own thread is done with that. */
static void await_lent(struct machine *m, bool lent)
{
	uint64_t ends_ns = vf_now_ns() + HANG_NS;

	while (is_lent(m) != lent) {
		CHECK(vf_now_ns() < ends_ns);
		sched_yield();
	}
	CHECK_EQ(pthread_mutex_lock(&m->device->lending.lock), 0);
	CHECK_EQ(pthread_mutex_unlock(&m->device->lending.lock), 0);
}

static void await_error(struct queue *q)
{
	struct pollfd reported = {.fd = q->err_fd, .events = POLLIN};

	CHECK_EQ(poll(&reported, 1, (int)(HANG_NS / 1000000)), 1);
}

static void pass_time(uint32_t ns)
{
	uint64_t ends_ns = vf_now_ns() + ns;

	while (vf_now_ns() < ends_ns)
		vf_relax();
}

/* ---- tests ------------------------------------------------------------------- */

static void everything_is_answered(struct guest *g, bool event_idx)
{
	struct machine m;
	unsigned int seed = 1;

	open_machine(&m, g, event_idx);
	start(&m.hiprio);
	start(&m.requests[0]);
	for (uint32_t i = 0; i < 30000; i++) {
		uint32_t what = (uint32_t)rand_r(&seed), pause = (uint32_t)rand_r(&seed) % 64;

		if (what & 3)
			add(&m.requests[0], (i % 2000 < 1500 ? 2 : 1) + (what >> 8) % 4, 0);
		if (what & 12)
			add(&m.hiprio, 1 + (what >> 12) % 4, 0);
		if (what & 16)
			wait_until_used(&m.requests[0]);
		wait_until_used(&m.hiprio);
		wait_until_used(&m.requests[0]);
		/* From at once to when everybody sleeps; that seldom for a time, so that they wait
		 * awake. */
		if (i % 2000 < 1500)
			pause %= 16;
		if (pause < 60)
			pass_time(pause * pause * 10);
		else
			usleep(pause * 5);
	}
	close_machine(&m);
}

static void with_event_idx(struct guest *g)
{
	everything_is_answered(g, true);
}

static void without_event_idx(struct guest *g)
{
	everything_is_answered(g, false);
}

struct traffic {
	struct queue *queue;
	atomic_bool stopping;
	pthread_t thread;
};

static void *drive(void *arg)
{
	struct traffic *traffic = arg;
	unsigned int seed = traffic->queue->index;

	while (!atomic_load(&traffic->stopping)) {
		add(traffic->queue, 2 + (uint32_t)rand_r(&seed) % 3, 0);
		wait_until_used(traffic->queue);
		pass_time((uint32_t)rand_r(&seed) % 20000);
	}
	return NULL;
}

static void begin_traffic(struct traffic *traffic, struct queue *q)
{
	*traffic = (struct traffic){.queue = q};
	start(q);
	CHECK_EQ(pthread_create(&traffic->thread, NULL, drive, traffic), 0);
}

static void end_traffic(struct traffic *traffic)
{
	atomic_store(&traffic->stopping, true);
	CHECK_EQ(pthread_join(traffic->thread, NULL), 0);
}

/* One is started, used and stopped while others are in use. */
static void comes_and_goes(struct queue *comes)
{
	unsigned int seed = 3;

	for (int i = 0; i < 300; i++) {
		start(comes);
		for (int k = 0; k < 40; k++) {
			add(comes, 1, 0);
			wait_until_used(comes);
			pass_time((uint32_t)rand_r(&seed) % 4000);
		}
		stop(comes);
	}
}

static void hiprio_ends(struct guest *g)
{
	struct traffic traffic;
	struct machine m;

	open_machine(&m, g, true);
	begin_traffic(&traffic, &m.requests[0]);
	comes_and_goes(&m.hiprio);
	end_traffic(&traffic);
	close_machine(&m);
}

static void a_request_queue_ends(struct guest *g)
{
	struct traffic traffic;
	struct machine m;

	open_machine(&m, g, true);
	begin_traffic(&traffic, &m.hiprio);
	comes_and_goes(&m.requests[0]);
	end_traffic(&traffic);
	close_machine(&m);
}

static void one_of_two_request_queues_ends(struct guest *g)
{
	struct traffic traffic[2];
	struct machine m;

	open_machine(&m, g, false);
	begin_traffic(&traffic[0], &m.hiprio);
	begin_traffic(&traffic[1], &m.requests[0]);
	comes_and_goes(&m.requests[1]);
	end_traffic(&traffic[0]);
	end_traffic(&traffic[1]);
	close_machine(&m);
}

/* A queue whose thread is the test, which is awake when it says so. */
static void start_lent_to(struct machine *m, struct vf_queue *q)
{
	q->device = m->device;
	vf_hiprio_awake(q);
	start(&m->hiprio);
}

/* True: somebody was kicked for it. */
static bool is_kicked_for(struct queue *q)
{
	uint64_t before = q->n_kicks;

	add(q, 1, 0);
	return q->n_kicks > before;
}

static void who_is_awake_sees_to_it(struct guest *g)
{
	struct vf_queue me = {.index = FIRST}, another = {.index = FIRST + 1};
	struct machine m;

	open_machine(&m, g, true);
	start_lent_to(&m, &me);
	await_lent(&m, true);
	another.device = m.device;
	for (int i = 0; i < 100; i++) {
		CHECK(!is_kicked_for(&m.hiprio));
		CHECK(!vf_hiprio_serve(&another, &g->thread));
		CHECK(vf_hiprio_serve(&me, &g->thread));
		wait_until_used(&m.hiprio);
		CHECK(!vf_hiprio_serve(&me, &g->thread));
	}
	/* Not so many at once that requests would have to wait. */
	add(&m.hiprio, SIZE / 2, 0);
	CHECK(vf_hiprio_serve(&me, &g->thread));
	CHECK(m.hiprio.ring.used->idx != m.hiprio.avail);
	while (vf_hiprio_serve(&me, &g->thread))
		;
	wait_until_used(&m.hiprio);
	/* What it has not seen is its own thread's. */
	CHECK(!is_kicked_for(&m.hiprio));
	vf_hiprio_asleep(&me);
	CHECK(!vf_hiprio_serve(&me, &g->thread));
	wait_until_used(&m.hiprio);
	close_machine(&m);
}

static void after_a_removal_it_is_given_back(struct guest *g)
{
	struct vf_queue me = {.index = FIRST + 1};
	struct machine m;

	open_machine(&m, g, true);
	start_lent_to(&m, &me);
	await_lent(&m, true);
	start(&m.requests[0]);
	for (int i = 0; i < 100; i++) {
		ask(&m.requests[0], FUSE_GETATTR);
		CHECK(is_lent(&m));
		ask(&m.requests[0], FUSE_UNLINK);
		CHECK(!is_lent(&m));
		CHECK(is_kicked_for(&m.hiprio));
		wait_until_used(&m.hiprio);
		await_lent(&m, true);
	}
	close_machine(&m);
}

/* It has been lent out, and whom it was lent to does not come back to it. */
static void who_does_not_look_is_not_trusted(struct guest *g)
{
	struct vf_queue stuck = {.index = FIRST};
	struct machine m;

	open_machine(&m, g, true);
	m.device->lending.take_back_ns = 1000000;
	start_lent_to(&m, &stuck);
	add(&m.hiprio, 1, 0);
	wait_until_used(&m.hiprio);
	await_lent(&m, false);
	for (int i = 0; i < 100; i++) {
		add(&m.hiprio, 1, 0);
		wait_until_used(&m.hiprio);
		CHECK(!is_lent(&m));
	}
	close_machine(&m);
}

/* A chain that cannot be answered, whichever thread comes upon it. */
static void a_broken_hiprio_queue_is_reported_and_the_other_goes_on(struct guest *g)
{
	for (int i = 0; i < 100; i++) {
		struct traffic traffic;
		struct machine m;

		open_machine(&m, g, true);
		m.device->lending.take_back_ns = 1000000;
		start(&m.hiprio);
		begin_traffic(&traffic, &m.requests[0]);
		for (int k = 0; k < i; k++) {
			add(&m.hiprio, 1, 0);
			wait_until_used(&m.hiprio);
		}
		add(&m.hiprio, 1, 3);
		await_error(&m.hiprio);
		end_traffic(&traffic);
		add(&m.requests[0], 3, 0);
		wait_until_used(&m.requests[0]);
		close_machine(&m);
	}
}

static void who_is_awake_may_break_it(struct guest *g)
{
	struct vf_queue me = {.index = FIRST};
	struct machine m;

	open_machine(&m, g, true);
	m.device->lending.take_back_ns = 300000000;
	start_lent_to(&m, &me);
	await_lent(&m, true);
	add(&m.hiprio, 2, 3);
	vf_hiprio_serve(&me, &g->thread);
	CHECK(!vf_hiprio_serve(&me, &g->thread));
	/* By its own thread, at the latest when it takes the queue back. */
	await_error(&m.hiprio);
	close_machine(&m);
}

/* What the broken queue's thread was to see to is seen to by another. */
static void a_broken_request_queue_gives_the_hiprio_queue_back(struct guest *g)
{
	for (int i = 0; i < 100; i++) {
		struct machine m;

		open_machine(&m, g, true);
		start(&m.hiprio);
		start(&m.requests[0]);
		/* So that it is lent, where there is a second processor. */
		for (int k = 0; k < 60 + i; k++) {
			add(&m.requests[0], 2, 0);
			wait_until_used(&m.requests[0]);
			add(&m.hiprio, 1, 0);
			wait_until_used(&m.hiprio);
		}
		add(&m.requests[0], 1, 3);
		await_error(&m.requests[0]);
		for (int k = 0; k < 20; k++) {
			add(&m.hiprio, 1, 0);
			wait_until_used(&m.hiprio);
		}
		close_machine(&m);
	}
}

int main(void)
{
	/* A queue's thread that may have to wait is lent nothing. */
	pool_threads = 2;
	set_up();
	RUN(with_event_idx, VF_HANDLES_NEVER, 5000);
	RUN(without_event_idx, VF_HANDLES_NEVER, 5000);
	RUN(who_is_awake_sees_to_it, VF_HANDLES_NEVER, 5000);
	RUN(after_a_removal_it_is_given_back, VF_HANDLES_NEVER, 5000);
	RUN(hiprio_ends, VF_HANDLES_NEVER, 5000);
	RUN(a_request_queue_ends, VF_HANDLES_NEVER, 5000);
	RUN(one_of_two_request_queues_ends, VF_HANDLES_NEVER, 5000);
	RUN(who_does_not_look_is_not_trusted, VF_HANDLES_NEVER, 5000);
	RUN(a_broken_hiprio_queue_is_reported_and_the_other_goes_on, VF_HANDLES_NEVER, 5000);
	RUN(who_is_awake_may_break_it, VF_HANDLES_NEVER, 5000);
	RUN(a_broken_request_queue_gives_the_hiprio_queue_back, VF_HANDLES_NEVER, 5000);
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
