/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The hiprio queue and a request queue whose thread sees to it while it is awake, against a driver
 * of our own: whoever of them looks, everything is answered, and the guest kicks when it has to.
 */
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "../ring.h"
#include "share.h"

#define MEMORY (1u << 20)
#define QUEUE_MEMORY (MEMORY / 2) /* of each of the two */
#define USER_BASE 0x7e0000000000u
#define SIZE 64u
#define SLOT 512u
#define AT_SLOTS 0x4000u
#define HIPRIO 0u
#define REQUEST 2u
#define HANG_NS 60000000000u

struct queue {
	struct vf_device *device;
	uint32_t index;
	uint64_t at; /* in guest memory */
	uint8_t *memory;
	struct vring ring;
	uint16_t avail;
	bool event_idx;
	int kick_fd, call_fd, err_fd;
	uint64_t n_kicks, n_batches;
};

struct machine {
	struct vf_device *device;
	uint8_t *memory;
	struct queue queues[2];
};

static void open_machine(struct machine *m, struct guest *g, bool event_idx)
{
	int fd = memfd_create("guest", MFD_CLOEXEC), error;
	struct vf_region region = {.size = MEMORY, .user_addr = USER_BASE};

	memset(m, 0, sizeof(*m));
	CHECK_EQ(ftruncate(fd, MEMORY), 0);
	m->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(m->memory != MAP_FAILED);
	m->device = vf_device_new(g->share, 3, &error);
	CHECK(m->device);
	CHECK_EQ(vf_device_set_memory(m->device, &region, &fd, 1), 0);
	close(fd);
	for (uint32_t i = 0; i < 2; i++) {
		struct queue *q = &m->queues[i];

		q->device = m->device;
		q->index = i ? REQUEST : HIPRIO;
		q->at = i * QUEUE_MEMORY;
		q->memory = m->memory + q->at;
		q->event_idx = event_idx;
		vring_init(&q->ring, SIZE, q->memory, 4096);
		q->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		q->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		q->err_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	}
}

static void close_machine(struct machine *m)
{
	vf_device_free(m->device);
	for (uint32_t i = 0; i < 2; i++) {
		close(m->queues[i].kick_fd);
		close(m->queues[i].call_fd);
		close(m->queues[i].err_fd);
	}
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

/* One request in slot i; header_size: of its first descriptor. */
static void describe(struct queue *q, uint32_t i, uint32_t header_size)
{
	bool forget = q->index == HIPRIO;
	uint64_t at = q->at + AT_SLOTS + i * SLOT;
	uint8_t *slot = q->memory + AT_SLOTS + i * SLOT;
	struct fuse_in_header header = {
	    .len = (uint32_t)sizeof(header) +
		   (forget ? sizeof(struct fuse_forget_in) : sizeof(struct fuse_getattr_in)),
	    .opcode = forget ? FUSE_FORGET : FUSE_GETATTR,
	    .unique = 2,
	    .nodeid = forget ? 0x1234 : FUSE_ROOT_ID,
	};
	uint32_t size = header_size ? header_size : header.len;

	memset(slot, 0, SLOT);
	memcpy(slot, &header, sizeof(header));
	q->ring.desc[2 * i] =
	    (struct vring_desc){at, size, forget ? 0 : VRING_DESC_F_NEXT, (uint16_t)(2 * i + 1)};
	q->ring.desc[2 * i + 1] =
	    (struct vring_desc){at + 256, 16 + sizeof(struct fuse_attr_out), VRING_DESC_F_WRITE, 0};
}

static void add(struct queue *q, uint32_t n, uint32_t header_size)
{
	uint16_t old = q->avail;
	uint64_t one = 1;
	bool wanted;

	for (uint32_t i = 0; i < n; i++) {
		uint32_t slot = q->avail % (SIZE / 2);

		describe(q, slot, header_size);
		q->ring.avail->ring[q->avail++ % SIZE] = (uint16_t)(2 * slot);
	}
	__atomic_store_n(&q->ring.avail->idx, q->avail, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (q->event_idx)
		wanted = vring_need_event(*(volatile uint16_t *)&vring_avail_event(&q->ring),
					  q->avail, old);
	else
		wanted = !(*(volatile uint16_t *)&q->ring.used->flags & VRING_USED_F_NO_NOTIFY);
	q->n_batches++;
	q->n_kicks += wanted;
	if (wanted)
		CHECK_EQ(write(q->kick_fd, &one, sizeof(one)), sizeof(one));
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
	struct queue *hiprio = &m.queues[0], *request = &m.queues[1];
	uint64_t begun_ns = vf_now_ns();
	unsigned int seed = 1;

	open_machine(&m, g, event_idx);
	start(hiprio);
	start(request);
	/* At least so long that some FORGETs need no kick, since the other thread looks. */
	for (uint32_t i = 0; i < 30000 || hiprio->n_kicks == hiprio->n_batches; i++) {
		uint32_t what = (uint32_t)rand_r(&seed), pause = (uint32_t)rand_r(&seed) % 64;

		CHECK(vf_now_ns() - begun_ns < HANG_NS);
		if (what & 3)
			add(request, 1 + (what >> 8) % 4, 0);
		if (what & 12)
			add(hiprio, 1 + (what >> 12) % 4, 0);
		if (what & 16)
			wait_until_used(request);
		wait_until_used(hiprio);
		wait_until_used(request);
		/* From at once to when everybody sleeps. */
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
	unsigned int seed = 2;

	while (!atomic_load(&traffic->stopping)) {
		add(traffic->queue, 1 + (uint32_t)rand_r(&seed) % 3, 0);
		wait_until_used(traffic->queue);
		pass_time((uint32_t)rand_r(&seed) % 20000);
	}
	return NULL;
}

/* The one is started, used and stopped while the other is in use. */
static void one_ends_while_the_other_goes_on(struct guest *g, uint32_t which)
{
	struct machine m;
	struct queue *comes;
	struct traffic traffic;
	unsigned int seed = 3;

	open_machine(&m, g, true);
	comes = &m.queues[which];
	traffic = (struct traffic){.queue = &m.queues[!which]};
	start(traffic.queue);
	CHECK_EQ(pthread_create(&traffic.thread, NULL, drive, &traffic), 0);
	for (int i = 0; i < 400; i++) {
		start(comes);
		for (int k = 0; k < 40; k++) {
			add(comes, 1, 0);
			wait_until_used(comes);
			pass_time((uint32_t)rand_r(&seed) % 4000);
		}
		stop(comes);
	}
	atomic_store(&traffic.stopping, true);
	CHECK_EQ(pthread_join(traffic.thread, NULL), 0);
	close_machine(&m);
}

static void hiprio_ends(struct guest *g)
{
	one_ends_while_the_other_goes_on(g, 0);
}

static void request_ends(struct guest *g)
{
	one_ends_while_the_other_goes_on(g, 1);
}

/* A chain that cannot be answered, whichever thread comes upon it. */
static void a_broken_hiprio_queue_is_reported_and_the_other_goes_on(struct guest *g)
{
	for (int i = 0; i < 100; i++) {
		struct pollfd reported;
		struct traffic traffic;
		struct machine m;

		open_machine(&m, g, true);
		traffic = (struct traffic){.queue = &m.queues[1]};
		start(&m.queues[0]);
		start(&m.queues[1]);
		CHECK_EQ(pthread_create(&traffic.thread, NULL, drive, &traffic), 0);
		for (int k = 0; k < i; k++) {
			add(&m.queues[0], 1, 0);
			wait_until_used(&m.queues[0]);
		}
		add(&m.queues[0], 1, 3);
		reported = (struct pollfd){.fd = m.queues[0].err_fd, .events = POLLIN};
		CHECK_EQ(poll(&reported, 1, (int)(HANG_NS / 1000000)), 1);
		atomic_store(&traffic.stopping, true);
		CHECK_EQ(pthread_join(traffic.thread, NULL), 0);
		add(&m.queues[1], 3, 0);
		wait_until_used(&m.queues[1]);
		close_machine(&m);
	}
}

int main(void)
{
	set_up();
	RUN(with_event_idx, VF_HANDLES_NEVER, 5000);
	RUN(without_event_idx, VF_HANDLES_NEVER, 5000);
	RUN(hiprio_ends, VF_HANDLES_NEVER, 5000);
	RUN(request_ends, VF_HANDLES_NEVER, 5000);
	RUN(a_broken_hiprio_queue_is_reported_and_the_other_goes_on, VF_HANDLES_NEVER, 5000);
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
