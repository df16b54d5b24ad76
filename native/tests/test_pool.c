/* SPDX-License-Identifier: Apache-2.0 */
/* What is offered to the pool's threads: each is run once, by them or by its owner. */
#include <sched.h>
#include <semaphore.h>
#include <time.h>

#include "share.h"

#define N_THREADS 3u

struct work {
	struct vf_offer offer;
	atomic_uint runs;
	sem_t *begun, *go; /* NULL: it ends at once */
};

static void do_it(struct vf_thread *t, struct vf_offer *offer)
{
	struct work *work = vf_container_of(offer, struct work, offer);

	(void)t;
	if (work->begun)
		sem_post(work->begun);
	if (work->go)
		while (sem_wait(work->go))
			;
	atomic_fetch_add(&work->runs, 1);
}

static void prepare(struct work *work, const void *owner)
{
	memset(work, 0, sizeof(*work));
	work->offer.run = do_it;
	work->offer.owner = owner;
}

static void sleep_ms(long ms)
{
	struct timespec time = {ms / 1000, ms % 1000 * 1000000};

	nanosleep(&time, NULL);
}

static bool offer_for(struct vf_pool *pool, struct work *work, long ms)
{
	for (; ms > 0; ms--) {
		if (vf_pool_offer(pool, &work->offer))
			return true;
		sleep_ms(1);
	}
	return false;
}

/* Waits, like the threads of a pool that are at work, until it is told to go on. */
struct hold {
	struct work work[8];
	sem_t begun, go;
	uint32_t n;
};

/* Keeps all threads busy that help: nothing more is begun; how many that are. */
static void hold_begin(struct hold *hold, struct vf_pool *pool)
{
	struct timespec soon;

	sem_init(&hold->begun, 0, 0);
	sem_init(&hold->go, 0, 0);
	for (hold->n = 0; hold->n < 8; hold->n++) {
		struct work *work = &hold->work[hold->n];

		prepare(work, hold);
		work->begun = &hold->begun;
		work->go = &hold->go;
		CHECK(offer_for(pool, work, 10000));
		clock_gettime(CLOCK_REALTIME, &soon);
		soon.tv_nsec += 500000000;
		soon.tv_sec += soon.tv_nsec / 1000000000;
		soon.tv_nsec %= 1000000000;
		if (sem_timedwait(&hold->begun, &soon))
			break;
	}
	CHECK(hold->n && hold->n < 8);
	CHECK(vf_pool_take_back(pool, hold) == &hold->work[hold->n].offer);
	CHECK(!vf_pool_take_back(pool, hold));
}

static void hold_end(struct hold *hold)
{
	for (uint32_t i = 0; i < hold->n; i++)
		sem_post(&hold->go);
	for (uint32_t i = 0; i < hold->n; i++)
		while (!atomic_load(&hold->work[i].runs))
			sched_yield();
}

static void each_is_run_once(struct guest *g)
{
	enum { N = 100000 };
	struct work *work = calloc(N, sizeof(*work));
	uint32_t taken_back = 0, refused = 0;
	int error;
	struct vf_pool *pool = vf_pool_new(g->share, N_THREADS, &error);
	const char *owners = "ab";

	CHECK(pool && work);
	for (int i = 0; i < N; i++) {
		const char *owner = &owners[i % 2];
		struct vf_offer *offer;

		prepare(&work[i], owner);
		if (!vf_pool_offer(pool, &work[i].offer)) {
			refused++;
			do_it(NULL, &work[i].offer);
		}
		for (int spin = 0; spin < i % 700; spin++)
			vf_relax();
		/* As a queue's thread with nothing else to do; now and then it has. */
		while (i % 3 && (offer = vf_pool_take_back(pool, owner))) {
			CHECK(offer->owner == owner);
			taken_back++;
			offer->run(NULL, offer);
		}
	}
	/* However busy the machine is, not all came back. */
	for (struct work more; taken_back + refused == N; refused -= atomic_load(&more.runs)) {
		prepare(&more, &more);
		CHECK(offer_for(pool, &more, 10000));
		sleep_ms(1);
		if (!vf_pool_take_back(pool, &more))
			while (!atomic_load(&more.runs))
				sched_yield();
	}
	for (int i = 0; i < 2; i++) {
		struct vf_offer *offer;

		while ((offer = vf_pool_take_back(pool, &owners[i])))
			offer->run(NULL, offer);
	}
	vf_pool_free(pool);
	for (int i = 0; i < N; i++)
		CHECK_EQ(atomic_load(&work[i].runs), 1);
	CHECK(taken_back);
	free(work);
}

static void what_nobody_begins_is_its_owners(struct guest *g)
{
	struct hold hold;
	struct work mine[3], other;
	int error;
	struct vf_pool *pool = vf_pool_new(g->share, N_THREADS, &error);

	CHECK(pool);
	hold_begin(&hold, pool);
	prepare(&other, &other);
	CHECK(offer_for(pool, &other, 2000));
	CHECK(!vf_pool_take_back(pool, mine));
	CHECK(vf_pool_take_back(pool, &other) == &other.offer);
	CHECK(!vf_pool_take_back(pool, &other));
	/* No more wait than threads help, in order. */
	for (uint32_t i = 0; i < hold.n; i++) {
		prepare(&mine[i], mine);
		CHECK(offer_for(pool, &mine[i], 2000));
	}
	CHECK(!vf_pool_offer(pool, &other.offer));
	for (uint32_t i = 0; i < hold.n; i++)
		CHECK(vf_pool_take_back(pool, mine) == &mine[i].offer);
	hold_end(&hold);
	vf_pool_free(pool);
	CHECK_EQ(atomic_load(&mine[0].runs), 0);
}

static void one_that_is_begun_late_ends_it_for_a_while(struct guest *g)
{
	struct hold hold;
	struct work late, next;
	uint64_t ended_ns;
	int error;
	struct vf_pool *pool = vf_pool_new(g->share, N_THREADS, &error);

	CHECK(pool);
	hold_begin(&hold, pool);
	prepare(&late, &late);
	prepare(&next, &next);
	CHECK(offer_for(pool, &late, 2000));
	sleep_ms(5);
	CHECK(!atomic_load(&late.runs));
	hold_end(&hold);
	while (!atomic_load(&late.runs))
		sched_yield();
	/* Not at once, since the thread has still to say so. */
	ended_ns = vf_now_ns();
	while (vf_pool_offer(pool, &next.offer)) {
		while (!vf_pool_take_back(pool, &next) && !atomic_load(&next.runs))
			sched_yield();
		atomic_store(&next.runs, 0);
		CHECK(vf_now_ns() - ended_ns < 2000000000);
	}
	CHECK(offer_for(pool, &next, 10000));
	CHECK(vf_now_ns() - ended_ns > 50000000);
	while (!vf_pool_take_back(pool, &next) && !atomic_load(&next.runs))
		sched_yield();
	vf_pool_free(pool);
}

/* A pool that ends runs what it was given first. */
static void the_end(struct guest *g)
{
	for (int i = 0; i < 100; i++) {
		struct work work;
		int error;
		struct vf_pool *pool = vf_pool_new(g->share, N_THREADS, &error);

		CHECK(pool);
		prepare(&work, &work);
		if (!vf_pool_offer(pool, &work.offer))
			do_it(NULL, &work.offer);
		vf_pool_free(pool);
		CHECK_EQ(atomic_load(&work.runs), 1);
	}
}

int main(void)
{
	cpu_set_t allowed;

	CPU_ZERO(&allowed);
	CHECK_EQ(sched_getaffinity(0, sizeof(allowed), &allowed), 0);
	if (CPU_COUNT(&allowed) < 2) {
		fprintf(stderr,
			"test_pool: NOT RUN: needs two processors, nothing is offered with one\n");
		return getenv("CI") != NULL;
	}
	set_up();
	RUN(each_is_run_once, VF_HANDLES_NEVER, 5000);
	RUN(what_nobody_begins_is_its_owners, VF_HANDLES_NEVER, 5000);
	RUN(one_that_is_begun_late_ends_it_for_a_while, VF_HANDLES_NEVER, 5000);
	RUN(the_end, VF_HANDLES_NEVER, 5000);
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
