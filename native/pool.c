/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads for requests that may block on storage.  The queue is bounded by
 * the rings: a request waiting here occupies a descriptor chain of its guest.
 *
 * What is offered to them, too, is work that need not wait: READs of much
 * data with others behind them, which copy on another processor while the
 * queue's own thread copies what follows.  Nobody has to take an offer: what
 * no thread here has begun the queue's thread takes back when it has nothing
 * else to do.  Nor is any taken for a while when a thread lost its processor
 * amid one.
 *
 * And files to close that the host frees with that, one at a time, when
 * nothing else is to be done: nobody waits for it.
 */
#include <sched.h>
#include <stdio.h>
#include <sys/resource.h>

#include "core.h"

/* More copy no faster: memory is what they wait for. */
#define MAX_HELPERS 3u
/*
 * Longer than this for one whose thread lost its processor meanwhile says that others want the
 * processors.  To copy 1 MiB takes up to 250 us.
 */
#define LATE_NS 600000u
/* The same where the thread does not know: a virtual processor may be taken away as a whole. */
#define TOO_LONG_NS 2400000u
#define MIN_PENALTY_NS 5000000u
#define MAX_PENALTY_NS 800000000u

/* More are not kept open for it. */
#define MAX_TO_CLOSE 64u

struct vf_pool {
	struct vf_share *share;
	pthread_mutex_t lock;
	pthread_cond_t work;
	struct vf_req *first, **last;
	struct vf_offer *offers, **last_offer;
	uint32_t n_offers;
	uint32_t helping;     /* threads at work on what was offered */
	uint32_t max_helpers; /* of them, and of offers that wait */
	uint32_t idle;	      /* threads that wait for work */
	uint32_t woken;	      /* of these, told that there is some */
	uint64_t off_until_ns, penalty_ns;
	int to_close[MAX_TO_CLOSE];
	uint32_t n_to_close;
	bool closing; /* a thread is at it */
	bool stopping;
	pthread_cond_t started; /* all threads, or an error */
	uint32_t n_started;
	int error;
	uint32_t n_threads;
	pthread_t threads[];
};

/* With the lock. */
static void wake_one(struct vf_pool *pool)
{
	if (pool->woken < pool->idle)
		pool->woken++;
	pthread_cond_signal(&pool->work);
}

/* ---- what is offered ---------------------------------------------------- */

/* With the lock: the thread of an offer lost its processor. */
static void stay_off(struct vf_pool *pool, uint64_t now_ns)
{
	if (now_ns < pool->off_until_ns)
		return;
	pool->off_until_ns = now_ns + pool->penalty_ns;
	if (pool->penalty_ns < MAX_PENALTY_NS)
		pool->penalty_ns *= 2;
}

static long n_switches(void)
{
	struct rusage usage;

	return getrusage(RUSAGE_THREAD, &usage) ? 0 : usage.ru_nivcsw;
}

/* With the lock: *at is taken out of the offers. */
static struct vf_offer *take_offer(struct vf_pool *pool, struct vf_offer **at)
{
	struct vf_offer *offer = *at;

	*at = offer->next;
	if (!*at)
		pool->last_offer = at;
	pool->n_offers--;
	return offer;
}

/* With the lock, which is let go of in between. */
static void help(struct vf_pool *pool, struct vf_thread *t)
{
	struct vf_offer *offer = take_offer(pool, &pool->offers);
	uint64_t begun_ns = vf_now_ns(), ended_ns;
	long switches;
	bool late;

	pool->helping++;
	pthread_mutex_unlock(&pool->lock);
	switches = n_switches();
	/* What would have to wait for storage goes the way of all that has to. */
	t->may_block = false;
	offer->run(t, offer);
	t->may_block = true;
	ended_ns = vf_now_ns();
	late = ended_ns - begun_ns > TOO_LONG_NS ||
	       (ended_ns - begun_ns > LATE_NS && n_switches() != switches);
	pthread_mutex_lock(&pool->lock);
	pool->helping--;
	if (late)
		stay_off(pool, ended_ns);
	else if (pool->penalty_ns > MIN_PENALTY_NS)
		pool->penalty_ns -= pool->penalty_ns / 1024;
}

bool vf_pool_offer(struct vf_pool *pool, struct vf_offer *offer)
{
	bool taken, to_idle;

	offer->offered_ns = vf_now_ns();
	offer->next = NULL;
	pthread_mutex_lock(&pool->lock);
	to_idle = pool->helping + pool->woken < pool->max_helpers && pool->woken < pool->idle;
	taken = pool->n_offers < pool->max_helpers && offer->offered_ns >= pool->off_until_ns &&
		(to_idle || pool->helping || pool->woken);
	if (taken) {
		*pool->last_offer = offer;
		pool->last_offer = &offer->next;
		pool->n_offers++;
		if (to_idle)
			wake_one(pool);
	}
	pthread_mutex_unlock(&pool->lock);
	return taken;
}

struct vf_offer *vf_pool_take_back(struct vf_pool *pool, const void *owner, uint64_t before_ns)
{
	struct vf_offer **at, *offer = NULL;

	pthread_mutex_lock(&pool->lock);
	for (at = &pool->offers; *at; at = &(*at)->next)
		if ((*at)->owner == owner && (*at)->offered_ns < before_ns)
			break;
	if (*at)
		offer = take_offer(pool, at);
	pthread_mutex_unlock(&pool->lock);
	return offer;
}

/* ---- what is closed ------------------------------------------------------ */

/* With the lock, which is let go of in between. */
static void close_one(struct vf_pool *pool)
{
	int fd = pool->to_close[--pool->n_to_close];

	pool->closing = true;
	pthread_mutex_unlock(&pool->lock);
	close(fd);
	pthread_mutex_lock(&pool->lock);
	pool->closing = false;
}

void vf_pool_close(struct vf_pool *pool, int fd)
{
	bool taken;

	pthread_mutex_lock(&pool->lock);
	taken = pool->n_threads && pool->n_to_close < MAX_TO_CLOSE;
	if (taken) {
		pool->to_close[pool->n_to_close++] = fd;
		if (!pool->closing)
			wake_one(pool);
	}
	pthread_mutex_unlock(&pool->lock);
	if (!taken)
		close(fd);
}

/* ---- the threads -------------------------------------------------------- */

static void *pool_main(void *arg)
{
	struct vf_pool *pool = arg;
	struct vf_thread t = {.may_block = true};
	int error = vf_thread_enter(&t, pool->share, "vhostfs-pool");

	pthread_mutex_lock(&pool->lock);
	pool->n_started++;
	if (error)
		pool->error = error;
	pthread_cond_signal(&pool->started);
	while (!error) {
		if (pool->first) {
			struct vf_req *r = pool->first;

			pool->first = r->next;
			if (!pool->first)
				pool->last = &pool->first;
			pthread_mutex_unlock(&pool->lock);
			vf_req_run_in_pool(&t, r);
			pthread_mutex_lock(&pool->lock);
		} else if (pool->offers && pool->helping < pool->max_helpers) {
			help(pool, &t);
		} else if (pool->n_to_close && !pool->closing) {
			close_one(pool);
		} else if (pool->stopping) {
			break;
		} else {
			pool->idle++;
			pthread_cond_wait(&pool->work, &pool->lock);
			pool->idle--;
			if (pool->woken)
				pool->woken--;
		}
	}
	pthread_mutex_unlock(&pool->lock);
	if (!error)
		vf_thread_leave(&t);
	return NULL;
}

/* One for each processor but that of the queue's thread. */
static uint32_t find_max_helpers(uint32_t n_threads)
{
	uint32_t n = n_threads < MAX_HELPERS ? n_threads : MAX_HELPERS;
	cpu_set_t allowed;

	CPU_ZERO(&allowed);
	/* More processors than such a mask has room for: an error. */
	if (!sched_getaffinity(0, sizeof(allowed), &allowed) && (uint32_t)CPU_COUNT(&allowed) <= n)
		n = (uint32_t)CPU_COUNT(&allowed) - 1;
	return n;
}

struct vf_pool *vf_pool_new(struct vf_share *share, uint32_t n_threads, int *error)
{
	struct vf_pool *pool = calloc(1, sizeof(*pool) + n_threads * sizeof(pool->threads[0]));

	*error = -ENOMEM;
	if (!pool)
		return NULL;
	*error = 0;
	pool->share = share;
	pthread_mutex_init(&pool->lock, NULL);
	pthread_cond_init(&pool->work, NULL);
	pthread_cond_init(&pool->started, NULL);
	pool->last = &pool->first;
	pool->last_offer = &pool->offers;
	pool->max_helpers = find_max_helpers(n_threads);
	pool->penalty_ns = MIN_PENALTY_NS;
	while (pool->n_threads < n_threads && !*error) {
		*error = -pthread_create(&pool->threads[pool->n_threads], NULL, pool_main, pool);
		if (!*error)
			pool->n_threads++;
	}
	pthread_mutex_lock(&pool->lock);
	while (pool->n_started < pool->n_threads)
		pthread_cond_wait(&pool->started, &pool->lock);
	if (!*error)
		*error = pool->error;
	pthread_mutex_unlock(&pool->lock);
	if (!*error)
		return pool;
	vf_pool_free(pool);
	return NULL;
}

void vf_pool_free(struct vf_pool *pool)
{
	if (!pool)
		return;
	pthread_mutex_lock(&pool->lock);
	pool->stopping = true;
	pthread_cond_broadcast(&pool->work);
	pthread_mutex_unlock(&pool->lock);
	for (uint32_t i = 0; i < pool->n_threads; i++)
		pthread_join(pool->threads[i], NULL);
	pthread_cond_destroy(&pool->work);
	pthread_cond_destroy(&pool->started);
	pthread_mutex_destroy(&pool->lock);
	free(pool);
}

void vf_pool_submit(struct vf_pool *pool, struct vf_req *r)
{
	r->next = NULL;
	pthread_mutex_lock(&pool->lock);
	*pool->last = r;
	pool->last = &r->next;
	wake_one(pool);
	pthread_mutex_unlock(&pool->lock);
}
