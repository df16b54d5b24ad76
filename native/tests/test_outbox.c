/* SPDX-License-Identifier: Apache-2.0 */
/* The queue of elements that wait for the guest, with a sink of our own; and the trace. */
#include <poll.h>
#include <sys/resource.h>
#include <time.h>

#include "../events.h"
#include "guest.h"

/* ---- a guest that takes elements ------------------------------------------- */

#define KEPT 300000u

struct taker {
	struct vf_sink sink;
	atomic_uint buffers;
	atomic_uint n;
	uint32_t done; /* calls */
	uint32_t since_done;
	bool detached;
	struct {
		uint64_t nodeid, mask;
		uint32_t cookie, namelen;
		char name[8];
	} got[KEPT];
};

static bool take(struct vf_sink *sink, const struct vf_fsnotify_out *element, const char *name)
{
	struct taker *t = (struct taker *)sink;
	uint32_t n = atomic_load(&t->n);

	CHECK(!t->detached);
	if (!atomic_load(&t->buffers))
		return false;
	atomic_fetch_sub(&t->buffers, 1);
	CHECK(n < KEPT);
	t->got[n].nodeid = element->nodeid;
	t->got[n].mask = element->mask;
	t->got[n].cookie = element->cookie;
	t->got[n].namelen = element->namelen;
	memcpy(t->got[n].name, name, element->namelen < 8 ? element->namelen : 8);
	t->since_done++;
	atomic_store(&t->n, n + 1);
	return true;
}

static void taker_done(struct vf_sink *sink)
{
	struct taker *t = (struct taker *)sink;

	CHECK(!t->detached);
	CHECK(t->since_done);
	t->since_done = 0;
	t->done++;
}

static uint32_t taker_buffers(struct vf_sink *sink)
{
	return atomic_load(&((struct taker *)sink)->buffers);
}

static struct taker *taker_new(uint32_t buffers)
{
	struct taker *t = calloc(1, sizeof(*t));

	CHECK(t);
	t->sink = (struct vf_sink){take, taker_done, taker_buffers};
	t->buffers = buffers;
	return t;
}

/* ---- the host's side --------------------------------------------------------- */

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static struct vf_outgoing event(uint64_t nodeid, uint64_t mask, const char *name)
{
	return (struct vf_outgoing){
	    .element = {.nodeid = nodeid, .mask = mask, .namelen = (uint32_t)strlen(name)},
	    .name = name,
	    .seen_ns = now_ns(),
	};
}

static void push(struct vf_outbox *o, uint64_t nodeid, uint64_t mask, const char *name)
{
	struct vf_outgoing out = event(nodeid, mask, name);

	vf_outbox_push(o, &out, 1);
}

static void push_rename(struct vf_outbox *o, uint64_t nodeid, uint32_t cookie)
{
	struct vf_outgoing pair[] = {event(nodeid, VF_FS_MOVED_FROM, "old"),
				     event(nodeid, VF_FS_MOVED_TO, "new")};

	pair[0].element.cookie = pair[1].element.cookie = cookie;
	pair[0].element.flags = pair[1].element.flags = VF_FSNOTIFY_SPLIT_RENAME;
	vf_outbox_push(o, pair, 2);
}

static struct vf_events_stats stats_of(struct vf_outbox *o)
{
	struct vf_events_stats stats;

	memset(&stats, 0, sizeof(stats));
	vf_outbox_get_stats(o, &stats);
	return stats;
}

struct bench {
	struct vf_trace *trace;
	struct vf_outbox *outbox;
	struct taker *taker;
};

static struct bench bench_new(uint32_t max, uint32_t buffers)
{
	struct bench b;
	int error;

	b.trace = vf_trace_new(&error);
	CHECK(b.trace);
	b.outbox = vf_outbox_new(max, b.trace, &error);
	CHECK(b.outbox);
	b.taker = taker_new(buffers);
	CHECK_EQ(vf_outbox_attach(b.outbox, &b.taker->sink), 0);
	return b;
}

static void bench_free(struct bench *b)
{
	vf_outbox_free(b->outbox);
	vf_trace_free(b->trace);
	free(b->taker);
}

/* ---- order ------------------------------------------------------------------- */

static void elements_leave_in_order_as_buffers_come(void)
{
	struct bench b = bench_new(1000, 0);

	for (uint64_t i = 1; i <= 100; i++)
		push(b.outbox, i, VF_FS_CREATE, i % 2 ? "a" : "bcdef");
	CHECK_EQ(stats_of(b.outbox).depth, 100);
	for (uint32_t round = 0; b.taker->n < 100; round++) {
		uint32_t before = b.taker->n;

		b.taker->buffers = 7;
		vf_outbox_flush(b.outbox);
		CHECK_EQ(b.taker->n - before, before + 7 <= 100 ? 7 : 100 - before);
		CHECK_EQ(b.taker->done, round + 1);
	}
	for (uint32_t i = 0; i < 100; i++) {
		CHECK_EQ(b.taker->got[i].nodeid, i + 1);
		CHECK_EQ(b.taker->got[i].namelen, i % 2 ? 5 : 1);
		CHECK(!memcmp(b.taker->got[i].name, i % 2 ? "bcdef" : "a", i % 2 ? 5 : 1));
	}
	CHECK_EQ(stats_of(b.outbox).depth, 0);
	CHECK_EQ(stats_of(b.outbox).delivered, 100);
	CHECK_EQ(stats_of(b.outbox).max_depth, 100);
	bench_free(&b);
}

static void nothing_is_signalled_when_nothing_left(void)
{
	struct bench b = bench_new(10, 0);

	vf_outbox_flush(b.outbox);
	push(b.outbox, 1, VF_FS_CREATE, "a");
	vf_outbox_flush(b.outbox);
	CHECK_EQ(b.taker->done, 0);
	bench_free(&b);
}

static void a_long_flush_signals_on_the_way(void)
{
	struct bench b = bench_new(1000, 1000);

	for (uint64_t i = 1; i <= 200; i++)
		push(b.outbox, i, VF_FS_CREATE, "a");
	vf_outbox_flush(b.outbox);
	CHECK(b.taker->done > 1);
	CHECK_EQ(b.taker->since_done, 0);
	bench_free(&b);
}

/* ---- merging ------------------------------------------------------------------- */

static void identical_neighbours_merge(void)
{
	struct bench b = bench_new(100, 0);
	struct vf_outgoing out = event(5, VF_FS_MODIFY, "f");

	vf_outbox_push(b.outbox, &out, 1);
	vf_outbox_push(b.outbox, &out, 1);
	CHECK_EQ(stats_of(b.outbox).depth, 1);
	CHECK_EQ(stats_of(b.outbox).merged, 1);
	/* Anything that differs keeps them apart. */
	struct vf_outgoing others[] = {out, out, out, out, out, out, out};

	others[0].element.nodeid = 6;
	others[1].element.generation = 1;
	others[2].element.mask = VF_FS_ATTRIB;
	others[3].name = "g";
	others[4].element.namelen = 0;
	others[5].element.child_nodeid = 9;
	others[6].element.child_generation = 9;
	for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
		vf_outbox_push(b.outbox, &others[i], 1);
		CHECK_EQ(stats_of(b.outbox).depth, 2 + 2 * i);
		vf_outbox_push(b.outbox, &out, 1);
		CHECK_EQ(stats_of(b.outbox).depth, 3 + 2 * i);
	}
	CHECK_EQ(stats_of(b.outbox).merged, 1);
	bench_free(&b);
}

static void renames_never_merge(void)
{
	struct bench b = bench_new(100, 0);
	struct vf_outgoing half = event(5, VF_FS_MOVED_TO, "f");

	half.element.cookie = 7;
	vf_outbox_push(b.outbox, &half, 1);
	vf_outbox_push(b.outbox, &half, 1);
	push_rename(b.outbox, 1, 8);
	push_rename(b.outbox, 1, 8);
	CHECK_EQ(stats_of(b.outbox).depth, 6);
	CHECK_EQ(stats_of(b.outbox).merged, 0);
	bench_free(&b);
}

static void what_was_delivered_is_not_merged_with(void)
{
	struct bench b = bench_new(100, 10);

	for (int i = 0; i < 3; i++) {
		push(b.outbox, 5, VF_FS_MODIFY, "f");
		vf_outbox_flush(b.outbox);
	}
	CHECK_EQ(b.taker->n, 3);
	CHECK_EQ(stats_of(b.outbox).merged, 0);
	bench_free(&b);
}

static void a_full_queue_still_merges(void)
{
	struct bench b = bench_new(1, 0);

	push(b.outbox, 5, VF_FS_MODIFY, "f");
	push(b.outbox, 5, VF_FS_MODIFY, "f");
	CHECK_EQ(stats_of(b.outbox).lost, 0);
	CHECK_EQ(stats_of(b.outbox).merged, 1);
	bench_free(&b);
}

/* ---- loss ---------------------------------------------------------------------- */

static void a_loss_is_told_once_behind_what_waits(void)
{
	struct bench b = bench_new(3, 0);

	for (uint64_t i = 1; i <= 10; i++)
		push(b.outbox, i, VF_FS_CREATE, "a");
	CHECK_EQ(stats_of(b.outbox).depth, 4);
	CHECK_EQ(stats_of(b.outbox).lost, 7);
	CHECK_EQ(stats_of(b.outbox).overflows, 0);
	/* There is room for one more, and it does not wait for the overflow to be told. */
	b.taker->buffers = 1;
	vf_outbox_flush(b.outbox);
	push(b.outbox, 11, VF_FS_CREATE, "a");
	push(b.outbox, 12, VF_FS_CREATE, "a");
	CHECK_EQ(stats_of(b.outbox).depth, 4);
	CHECK_EQ(stats_of(b.outbox).lost, 8);
	b.taker->buffers = 100;
	vf_outbox_flush(b.outbox);
	CHECK_EQ(b.taker->n, 5);
	CHECK_EQ(b.taker->got[2].nodeid, 3);
	CHECK_EQ(b.taker->got[3].nodeid, 0);
	CHECK_EQ(b.taker->got[3].mask, VF_FS_Q_OVERFLOW);
	CHECK_EQ(b.taker->got[3].namelen, 0);
	CHECK_EQ(b.taker->got[4].nodeid, 11);
	CHECK_EQ(stats_of(b.outbox).overflows, 1);
	/* The next loss is told again. */
	b.taker->buffers = 0;
	for (uint64_t i = 1; i <= 4; i++)
		push(b.outbox, i, VF_FS_CREATE, "a");
	b.taker->buffers = 100;
	vf_outbox_flush(b.outbox);
	CHECK_EQ(b.taker->n, 9);
	CHECK_EQ(b.taker->got[8].mask, VF_FS_Q_OVERFLOW);
	CHECK_EQ(stats_of(b.outbox).overflows, 2);
	bench_free(&b);
}

static void nothing_is_lost_while_there_are_buffers(void)
{
	struct bench b = bench_new(3, 1000);

	for (uint64_t i = 1; i <= 100; i++)
		push(b.outbox, i, VF_FS_CREATE, "a");
	vf_outbox_flush(b.outbox);
	CHECK_EQ(b.taker->n, 100);
	CHECK_EQ(stats_of(b.outbox).lost, 0);
	bench_free(&b);
}

static void a_large_batch_begins_to_leave_before_its_end(void)
{
	struct bench b = bench_new(1000, 1000);

	for (uint64_t i = 1; i <= 500; i++)
		push(b.outbox, i, VF_FS_CREATE, "a");
	CHECK(b.taker->n > 300);
	vf_outbox_flush(b.outbox);
	for (uint32_t i = 0; i < 500; i++)
		CHECK_EQ(b.taker->got[i].nodeid, i + 1);
	bench_free(&b);
}

static void a_loss_on_the_host_is_told_once(void)
{
	struct bench b = bench_new(3, 0);

	vf_outbox_push_overflow(b.outbox);
	vf_outbox_push_overflow(b.outbox);
	for (uint64_t i = 1; i <= 4; i++)
		push(b.outbox, i, VF_FS_CREATE, "a");
	CHECK_EQ(stats_of(b.outbox).depth, 4);
	b.taker->buffers = 100;
	vf_outbox_flush(b.outbox);
	CHECK_EQ(b.taker->got[0].mask, VF_FS_Q_OVERFLOW);
	CHECK_EQ(b.taker->n, 4);
	CHECK_EQ(stats_of(b.outbox).lost, 1);
	bench_free(&b);
}

static void both_halves_of_a_rename_or_none(void)
{
	struct bench b = bench_new(3, 0);

	push(b.outbox, 1, VF_FS_CREATE, "a");
	push(b.outbox, 2, VF_FS_CREATE, "a");
	push_rename(b.outbox, 3, 33);
	CHECK_EQ(stats_of(b.outbox).lost, 2);
	/* A single one still has room. */
	push(b.outbox, 4, VF_FS_CREATE, "a");
	b.taker->buffers = 100;
	vf_outbox_flush(b.outbox);
	CHECK_EQ(b.taker->n, 4);
	CHECK_EQ(b.taker->got[2].mask, VF_FS_Q_OVERFLOW);
	CHECK_EQ(b.taker->got[3].nodeid, 4);
	push_rename(b.outbox, 5, 55);
	vf_outbox_flush(b.outbox);
	CHECK_EQ(b.taker->n, 6);
	CHECK_EQ(b.taker->got[4].mask, VF_FS_MOVED_FROM);
	CHECK_EQ(b.taker->got[5].mask, VF_FS_MOVED_TO);
	CHECK_EQ(b.taker->got[5].cookie, 55);
	bench_free(&b);
}

/* A taker with one buffer gets both halves, one after the other. */
static void a_rename_passes_through_one_buffer(void)
{
	struct bench b = bench_new(10, 0);

	push_rename(b.outbox, 3, 33);
	for (int i = 0; i < 2; i++) {
		b.taker->buffers = 1;
		vf_outbox_flush(b.outbox);
		CHECK_EQ(b.taker->n, i + 1);
	}
	bench_free(&b);
}

static void clearing_forgets_what_waits_and_the_loss(void)
{
	struct bench b = bench_new(3, 0);

	for (uint64_t i = 1; i <= 10; i++)
		push(b.outbox, i, VF_FS_CREATE, "a");
	vf_outbox_clear(b.outbox);
	CHECK_EQ(stats_of(b.outbox).depth, 0);
	b.taker->buffers = 100;
	vf_outbox_flush(b.outbox);
	CHECK_EQ(b.taker->n, 0);
	b.taker->buffers = 0;
	for (uint64_t i = 1; i <= 4; i++)
		push(b.outbox, i, VF_FS_CREATE, "a");
	b.taker->buffers = 100;
	vf_outbox_flush(b.outbox);
	CHECK_EQ(b.taker->n, 4);
	CHECK_EQ(b.taker->got[0].nodeid, 1);
	CHECK_EQ(b.taker->got[3].mask, VF_FS_Q_OVERFLOW);
	bench_free(&b);
}

/* ---- memory --------------------------------------------------------------------- */

static uint64_t mapped_kib(void)
{
	char line[256];
	unsigned long pages = 0;
	FILE *f = fopen("/proc/self/statm", "r");

	CHECK(f && fgets(line, sizeof(line), f));
	CHECK_EQ(sscanf(line, "%lu", &pages), 1);
	fclose(f);
	return pages * 4;
}

static void memory_grows_and_shrinks_with_what_waits(void)
{
	char longest[256];
	struct bench b = bench_new(100000, 0);
	uint64_t before = mapped_kib(), full;

	memset(longest, 'n', 255);
	longest[255] = 0;
	for (uint64_t i = 1; i <= 150000; i++)
		push(b.outbox, i, VF_FS_CREATE, longest);
	full = mapped_kib();
	CHECK(full - before > 100000 * 320 / 1024);
	CHECK(full - before < 100000 * 330 / 1024);
	CHECK_EQ(stats_of(b.outbox).lost, 50000);
	b.taker->buffers = 200000;
	vf_outbox_flush(b.outbox);
	CHECK_EQ(b.taker->n, 100001);
	CHECK(mapped_kib() - before < 512);
	/* One in, one out: it stays so. */
	for (uint64_t i = 1; i <= 50000; i++) {
		push(b.outbox, i, VF_FS_CREATE, longest);
		vf_outbox_flush(b.outbox);
	}
	CHECK(mapped_kib() - before < 512);
	for (uint32_t i = 0; i < 100000; i++)
		CHECK_EQ(b.taker->got[i].nodeid, i + 1);
	bench_free(&b);
}

static void failing_memory_is_a_loss(void)
{
	struct bench b = bench_new(100000, 0);
	struct rlimit limit, none;

	CHECK_EQ(getrlimit(RLIMIT_AS, &limit), 0);
	push(b.outbox, 1, VF_FS_CREATE, "a");
	none = (struct rlimit){0, limit.rlim_max};
	CHECK_EQ(setrlimit(RLIMIT_AS, &none), 0);
	for (uint64_t i = 2; i <= 2000; i++)
		push(b.outbox, i, VF_FS_CREATE, "a");
	CHECK_EQ(setrlimit(RLIMIT_AS, &limit), 0);
	CHECK(stats_of(b.outbox).lost > 0);
	CHECK(stats_of(b.outbox).depth > 100);
	/* For the overflow there is always room. */
	b.taker->buffers = 5000;
	vf_outbox_flush(b.outbox);
	CHECK_EQ(stats_of(b.outbox).overflows, 1);
	CHECK_EQ(b.taker->got[b.taker->n - 1].mask, VF_FS_Q_OVERFLOW);
	bench_free(&b);
}

/* ---- counting -------------------------------------------------------------------- */

static void latency_is_counted_in_powers_of_two(void)
{
	struct bench b = bench_new(10, 10);
	struct vf_outgoing out = event(1, VF_FS_CREATE, "a");
	struct vf_events_stats stats;
	uint64_t total = 0;

	out.seen_ns = now_ns() - 5000000; /* 5 ms: below 8192 us unless we are held up */
	vf_outbox_push(b.outbox, &out, 1);
	out.seen_ns = 0; /* since the machine's start */
	out.element.nodeid = 2;
	vf_outbox_push(b.outbox, &out, 1);
	vf_outbox_flush(b.outbox);
	stats = stats_of(b.outbox);
	for (int i = 0; i < 24; i++)
		total += stats.latency[i];
	CHECK_EQ(total, 2);
	CHECK_EQ(stats.latency[23], 1);
	for (int i = 0; i < 13; i++)
		CHECK_EQ(stats.latency[i], 0);
	CHECK_EQ(stats.buffers, 8);
	bench_free(&b);
}

static bool readable(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	return poll(&p, 1, 0) == 1;
}

static void the_trace_tells_what_became_of_each(void)
{
	struct bench b = bench_new(1, 0);
	static const uint32_t fates[] = {VF_EVENT_MERGED, VF_EVENT_LOST, VF_EVENT_DELIVERED,
					 VF_EVENT_OVERFLOW};
	struct vf_event_trace record;

	push(b.outbox, 1, VF_FS_CREATE, "before");
	CHECK(!readable(vf_trace_fd(b.trace)));
	CHECK_EQ(vf_trace_set(b.trace, true), 0);
	push(b.outbox, 1, VF_FS_CREATE, "before");
	CHECK(readable(vf_trace_fd(b.trace)));
	push(b.outbox, 2, VF_FS_DELETE, "lost");
	b.taker->buffers = 2;
	vf_outbox_flush(b.outbox);
	for (int i = 0; i < 4; i++) {
		CHECK(readable(vf_trace_fd(b.trace)));
		CHECK_EQ(vf_trace_next(b.trace, &record), 1);
		CHECK_EQ(record.fate, fates[i]);
		CHECK_EQ(record.skipped, 0);
		CHECK_EQ(record.namelen, i == 1 ? 4 : i == 3 ? 0 : 6);
	}
	CHECK(!readable(vf_trace_fd(b.trace)));
	CHECK_EQ(vf_trace_next(b.trace, &record), 0);
	bench_free(&b);
}

static void a_slow_reader_of_the_trace_learns_what_it_missed(void)
{
	struct bench b = bench_new(100000, 100000);
	struct vf_event_trace record;
	uint32_t n = 0;

	CHECK_EQ(vf_trace_set(b.trace, true), 0);
	vf_trace_notice(b.trace, "a line");
	for (uint64_t i = 1; i <= 10000; i++)
		push(b.outbox, i, VF_FS_CREATE, "a");
	vf_outbox_flush(b.outbox);
	while (vf_trace_next(b.trace, &record)) {
		if (!n)
			CHECK_EQ(record.nodeid, 1 + record.skipped);
		else
			CHECK_EQ(record.skipped, 0);
		n++;
	}
	CHECK(n > 1000 && n < 10000);
	CHECK_EQ(record.nodeid, 10000);
	char text[200];

	CHECK(readable(vf_trace_fd(b.trace)));
	CHECK_EQ(vf_trace_next_notice(b.trace, text, sizeof(text)), 1);
	CHECK(!strcmp(text, "a line"));
	CHECK(!readable(vf_trace_fd(b.trace)));
	CHECK_EQ(vf_trace_next_notice(b.trace, text, sizeof(text)), 0);
	/* Off and on again: nothing old is left. */
	push(b.outbox, 1, VF_FS_CREATE, "a");
	vf_outbox_flush(b.outbox);
	CHECK_EQ(vf_trace_set(b.trace, false), 0);
	CHECK(!readable(vf_trace_fd(b.trace)));
	CHECK_EQ(vf_trace_next(b.trace, &record), 0);
	bench_free(&b);
}

/* ---- threads ----------------------------------------------------------------------- */

struct race {
	struct bench b;
	uint64_t n;
	atomic_bool stop;
};

static void *give_buffers(void *arg)
{
	struct race *race = arg;

	while (!atomic_load(&race->stop)) {
		atomic_fetch_add(&race->b.taker->buffers, 16);
		vf_outbox_flush(race->b.outbox);
		sched_yield();
	}
	return NULL;
}

static void *look(void *arg)
{
	struct race *race = arg;
	struct vf_event_trace record;

	while (!atomic_load(&race->stop)) {
		struct vf_events_stats stats = stats_of(race->b.outbox);

		CHECK_EQ(stats.queued, stats.delivered + stats.depth);
		CHECK_EQ(vf_trace_set(race->b.trace, stats.delivered % 2), 0);
		while (vf_trace_next(race->b.trace, &record))
			;
		sched_yield();
	}
	return NULL;
}

/* The source in this thread, the queue's thread, a person who looks, and a sink that comes and
 * goes: nothing is lost, doubled or out of order. */
static void nothing_is_lost_between_threads(void)
{
	struct race race = {.b = bench_new(200000, 0), .n = 100000};
	pthread_t giver, looker;
	char name[8];

	CHECK_EQ(pthread_create(&giver, NULL, give_buffers, &race), 0);
	CHECK_EQ(pthread_create(&looker, NULL, look, &race), 0);
	for (uint64_t i = 1; i <= race.n; i++) {
		snprintf(name, sizeof(name), "%05u", (unsigned int)(i % 100000));
		push(race.b.outbox, i, VF_FS_CREATE, name);
		if (!(i % 8))
			vf_outbox_flush(race.b.outbox);
		if (!(i % 1000)) {
			vf_outbox_detach(race.b.outbox, &race.b.taker->sink);
			/* Nobody uses it now: else these writes are a race. */
			race.b.taker->detached = true;
			race.b.taker->detached = false;
			CHECK_EQ(vf_outbox_attach(race.b.outbox, &race.b.taker->sink), 0);
			CHECK_EQ(vf_outbox_attach(race.b.outbox, &race.b.taker->sink), -EBUSY);
		}
	}
	while (atomic_load(&race.b.taker->n) < race.n)
		sched_yield();
	atomic_store(&race.stop, true);
	CHECK_EQ(pthread_join(giver, NULL), 0);
	CHECK_EQ(pthread_join(looker, NULL), 0);
	for (uint64_t i = 1; i <= race.n; i++) {
		snprintf(name, sizeof(name), "%05u", (unsigned int)(i % 100000));
		CHECK_EQ(race.b.taker->got[i - 1].nodeid, i);
		CHECK(!memcmp(race.b.taker->got[i - 1].name, name, 5));
	}
	CHECK_EQ(stats_of(race.b.outbox).lost, 0);
	bench_free(&race.b);
}

#define RUN(test)                                                                                  \
	do {                                                                                       \
		fprintf(stderr, "%s ", #test);                                                     \
		test();                                                                            \
		fprintf(stderr, "ok\n");                                                           \
	} while (0)

int main(void)
{
	RUN(elements_leave_in_order_as_buffers_come);
	RUN(nothing_is_signalled_when_nothing_left);
	RUN(a_long_flush_signals_on_the_way);
	RUN(identical_neighbours_merge);
	RUN(renames_never_merge);
	RUN(what_was_delivered_is_not_merged_with);
	RUN(a_full_queue_still_merges);
	RUN(a_loss_is_told_once_behind_what_waits);
	RUN(nothing_is_lost_while_there_are_buffers);
	RUN(a_large_batch_begins_to_leave_before_its_end);
	RUN(a_loss_on_the_host_is_told_once);
	RUN(both_halves_of_a_rename_or_none);
	RUN(a_rename_passes_through_one_buffer);
	RUN(clearing_forgets_what_waits_and_the_loss);
	RUN(memory_grows_and_shrinks_with_what_waits);
	RUN(failing_memory_is_a_loss);
	RUN(latency_is_counted_in_powers_of_two);
	RUN(the_trace_tells_what_became_of_each);
	RUN(a_slow_reader_of_the_trace_learns_what_it_missed);
	RUN(nothing_is_lost_between_threads);
	return 0;
}
