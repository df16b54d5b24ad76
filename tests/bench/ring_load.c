/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inner loop of a guest's virtio-fs driver under load: rows of prepared FUSE
 * requests go out, `depth` rows at a time, replies are checked, and what one
 * request needs of the reply before (a nodeid, a file handle) is copied over.
 * Knows nothing of vhost-user or of what the requests mean: tests/bench/ring_load.py
 * lays everything out in guest memory.  virtio 1.2, section 2.7.
 *
 * As in a guest, the loop sleeps on the call eventfd when nothing has come back,
 * and kicks only when the device asks for it (EVENT_IDX).
 */
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags, next;
};
#define DESC_INDIRECT 4

struct used_elem {
	uint32_t id, len;
};

/* The ring in this process's memory. */
struct queue {
	struct desc *desc;
	volatile uint16_t *avail; /* flags, index, ring[size], used_event */
	volatile uint16_t *used;  /* flags, index, then elements, avail_event */
	uint32_t size;
	int kick_fd, call_fd;
	uint16_t next_avail, next_used;
};

struct step {
	uint8_t *request;
	const uint8_t *reply;
	uint64_t table; /* guest address of the chain's indirect table */
	uint32_t table_size;
	uint32_t min_reply; /* bytes that the used ring must tell; 0: no reply */
	int32_t error;	    /* what the reply's header must say */
};

/* Written into a request before the first step of a row; i counts rows. */
enum { FIELD_SEQUENTIAL, FIELD_RANDOM, FIELD_TABLE };
struct field {
	uint32_t kind, step, offset;
	uint32_t size; /* of an entry of the table */
	uint64_t count, stride;
	const uint8_t *table;
};

/* From the reply of one step to the request of a later one. */
struct copy {
	uint32_t from_step, from_offset, to_step, to_offset, size;
};

struct load {
	struct queue queue;
	struct step *steps; /* [depth][n_steps] */
	uint32_t depth, n_steps;
	const struct field *fields;
	uint32_t n_fields;
	const struct copy *copies;
	uint32_t n_copies;
	uint64_t row; /* counts on from one run to the next */
	uint64_t random;
	/* What run() found. */
	uint64_t rows, elapsed_ns, kicks, sleeps;
	uint32_t *latency_ns; /* of the first `room` rows */
	uint64_t room, n_latency;
	int32_t bad_step, bad_error;
	uint32_t bad_size;
};

/* A row on its way. */
struct slot {
	uint32_t step;
	uint64_t since_ns;
};

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static volatile uint16_t *avail_event(const struct queue *q)
{
	return &q->used[2 + q->size * 4];
}

static void offer(struct queue *q, uint32_t head)
{
	q->avail[2 + (q->next_avail++ & (q->size - 1))] = (uint16_t)head;
}

/* Makes what was offered since `before` visible; true: it kicked. */
static bool publish(struct queue *q, uint16_t before)
{
	uint64_t one = 1;

	if (before == q->next_avail)
		return false;
	__atomic_store_n(&q->avail[1], q->next_avail, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if ((uint16_t)(q->next_avail - *avail_event(q) - 1) >= (uint16_t)(q->next_avail - before))
		return false;
	return write(q->kick_fd, &one, sizeof(one)) == sizeof(one);
}

/* Waits until the device has used something; false: it did not in ten seconds. */
static bool await_used(struct queue *q, uint64_t *sleeps)
{
	struct pollfd call = {.fd = q->call_fd, .events = POLLIN};
	uint64_t count;

	for (;;) {
		q->avail[2 + q->size] = q->next_used; /* used_event */
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		if (__atomic_load_n(&q->used[1], __ATOMIC_ACQUIRE) != q->next_used)
			return true;
		++*sleeps;
		if (poll(&call, 1, 10000) <= 0)
			return false;
		if (read(q->call_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
			return false;
	}
}

static void submit(struct load *l, struct slot *slots, uint32_t i)
{
	const struct step *step = &l->steps[i * l->n_steps + slots[i].step];

	l->queue.desc[i] = (struct desc){step->table, step->table_size, DESC_INDIRECT, 0};
	offer(&l->queue, i);
}

static void begin_row(struct load *l, struct slot *slots, uint32_t i)
{
	uint64_t row = l->row++;

	for (uint32_t f = 0; f < l->n_fields; f++) {
		const struct field *field = &l->fields[f];
		uint8_t *to = l->steps[i * l->n_steps + field->step].request + field->offset;
		uint64_t n = row, value;

		if (field->kind == FIELD_RANDOM) {
			l->random ^= l->random << 13;
			l->random ^= l->random >> 7;
			l->random ^= l->random << 17;
			n = l->random;
		}
		n %= field->count;
		value = n * field->stride;
		if (field->kind == FIELD_TABLE)
			memcpy(to, field->table + n * field->size, field->size);
		else
			memcpy(to, &value, sizeof(value));
	}
	slots[i].step = 0;
	slots[i].since_ns = now_ns();
	submit(l, slots, i);
}

/* Is the reply what it should be? */
static bool check(struct load *l, const struct step *step, uint32_t i, uint32_t size)
{
	int32_t error = 0;

	if (step->min_reply)
		memcpy(&error, step->reply + 4, sizeof(error));
	if (size >= step->min_reply && (error == step->error || !step->min_reply))
		return true;
	l->bad_step = (int32_t)i;
	l->bad_error = error;
	l->bad_size = size;
	return false;
}

static void end_step(struct load *l, struct slot *slots, uint32_t i)
{
	struct step *row = &l->steps[i * l->n_steps];

	for (uint32_t c = 0; c < l->n_copies; c++) {
		const struct copy *copy = &l->copies[c];

		if (copy->from_step == slots[i].step)
			memcpy(row[copy->to_step].request + copy->to_offset,
			       row[copy->from_step].reply + copy->from_offset, copy->size);
	}
	slots[i].step++;
}

/* Runs rows for this long; 0, -ETIMEDOUT or -EPROTO (see bad_*). */
int ring_load_run(struct load *l, uint64_t duration_ns)
{
	struct slot *slots = calloc(l->depth, sizeof(*slots));
	struct queue *q = &l->queue;
	uint64_t start = now_ns(), end = start + duration_ns, now = start;
	uint32_t in_flight = l->depth;
	uint16_t before = q->next_avail;
	int result = 0;

	l->rows = l->kicks = l->sleeps = l->n_latency = 0;
	if (!slots)
		return -ENOMEM;
	for (uint32_t i = 0; i < l->depth; i++)
		begin_row(l, slots, i);
	l->kicks += publish(q, before);
	while (in_flight) {
		uint16_t used;

		if (!await_used(q, &l->sleeps)) {
			result = -ETIMEDOUT;
			break;
		}
		before = q->next_avail;
		used = __atomic_load_n(&q->used[1], __ATOMIC_ACQUIRE);
		for (; q->next_used != used; q->next_used++) {
			const volatile struct used_elem *elements =
			    (const volatile struct used_elem *)(q->used + 2);
			const volatile struct used_elem *e =
			    &elements[q->next_used & (q->size - 1)];
			uint32_t i = e->id;
			struct step *step;

			if (i >= l->depth) {
				result = -EPROTO;
				break;
			}
			step = &l->steps[i * l->n_steps + slots[i].step];
			if (!check(l, step, slots[i].step, e->len))
				result = -EPROTO;
			end_step(l, slots, i);
			if (slots[i].step < l->n_steps && !result) {
				submit(l, slots, i);
				continue;
			}
			now = now_ns();
			l->rows++;
			if (l->n_latency < l->room)
				l->latency_ns[l->n_latency++] = (uint32_t)(now - slots[i].since_ns);
			if (now < end && !result)
				begin_row(l, slots, i);
			else
				in_flight--;
		}
		if (result == -EPROTO && l->bad_step < 0)
			break;
		l->kicks += publish(q, before);
	}
	l->elapsed_ns = now - start;
	free(slots);
	return result;
}

static int by_value(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

/* Sorts, so that the caller finds percentiles. */
void ring_load_sort(uint32_t *values, uint64_t n)
{
	qsort(values, n, sizeof(*values), by_value);
}

/*
 * The driver's side of a notification queue whose `buffers` chains are descriptors 0 to
 * buffers - 1: takes elements and gives their buffers back until `count` have come or none came
 * for ten seconds.  *elapsed_ns: from the first to the last; *lost: elements with this bit of the
 * mask, at byte 32 behind the header.
 */
uint64_t ring_load_take(struct queue *q, uint8_t *const *buffers, uint64_t count, uint64_t lost_bit,
			uint64_t *elapsed_ns, uint64_t *lost)
{
	uint64_t taken = 0, first = 0, last = 0, sleeps = 0;

	*lost = 0;
	while (taken < count && await_used(q, &sleeps)) {
		uint16_t before = q->next_avail;
		uint16_t used = __atomic_load_n(&q->used[1], __ATOMIC_ACQUIRE);

		if (!first)
			first = now_ns();
		for (; q->next_used != used; q->next_used++) {
			const volatile struct used_elem *elements =
			    (const volatile struct used_elem *)(q->used + 2);
			uint32_t id = elements[q->next_used & (q->size - 1)].id;
			uint64_t mask;

			memcpy(&mask, buffers[id] + 32, sizeof(mask));
			*lost += !!(mask & lost_bit);
			offer(q, id);
			taken++;
		}
		last = now_ns();
		publish(q, before);
	}
	*elapsed_ns = last - first;
	return taken;
}
