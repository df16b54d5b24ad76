/* SPDX-License-Identifier: Apache-2.0 */
/* What is offered to the pool's threads: each is run once, by them or by its owner. */
#include <netinet/in.h>
#include <sched.h>
#include <seccomp.h>
#include <semaphore.h>
#include <sys/wait.h>
#include <time.h>

#include "share.h"

#define N_THREADS 3u
#define HANG_NS 60000000000u

static uint32_t n_helpers; /* threads that help at once, and offers that wait */

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

/* Tries until it is taken: beside other work offers are refused for a while. */
static void offer(struct vf_pool *pool, struct work *work)
{
	uint64_t ends_ns = vf_now_ns() + HANG_NS;

	while (!vf_pool_offer(pool, &work->offer)) {
		CHECK(vf_now_ns() < ends_ns);
		sleep_ms(1);
	}
}

static void wait_until_run(struct work *work)
{
	uint64_t ends_ns = vf_now_ns() + HANG_NS;

	while (!atomic_load(&work->runs)) {
		CHECK(vf_now_ns() < ends_ns);
		sched_yield();
	}
}

static void wait_until_begun(sem_t *begun)
{
	struct timespec end;

	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += HANG_NS / 1000000000;
	CHECK_EQ(sem_timedwait(begun, &end), 0);
}

/* All threads that help, at work until they are told to go on. */
struct hold {
	struct work work[N_THREADS];
	sem_t begun, go;
};

static void hold_begin(struct hold *hold, struct vf_pool *pool)
{
	sem_init(&hold->begun, 0, 0);
	sem_init(&hold->go, 0, 0);
	for (uint32_t i = 0; i < n_helpers; i++) {
		prepare(&hold->work[i], hold);
		hold->work[i].begun = &hold->begun;
		hold->work[i].go = &hold->go;
		offer(pool, &hold->work[i]);
		wait_until_begun(&hold->begun);
	}
}

static void hold_end(struct hold *hold)
{
	for (uint32_t i = 0; i < n_helpers; i++)
		sem_post(&hold->go);
	for (uint32_t i = 0; i < n_helpers; i++)
		wait_until_run(&hold->work[i]);
}

static struct vf_pool *new_pool(struct guest *g)
{
	int error;
	struct vf_pool *pool = vf_pool_new(g->share, N_THREADS, &error);

	CHECK(pool);
	return pool;
}

/* ---- an owner, as a queue's thread is one ---------------------------------- */

struct owner {
	struct vf_pool *pool;
	struct work *work;
	uint32_t taken_back, refused;
};

static void take_back(struct owner *owner)
{
	struct vf_offer *offer;

	while ((offer = vf_pool_take_back(owner->pool, owner, UINT64_MAX))) {
		CHECK(offer->owner == owner);
		owner->taken_back++;
		offer->run(NULL, offer);
	}
}

#define N_WORK 50000u

static void *own(void *arg)
{
	struct owner *owner = arg;

	for (uint32_t i = 0; i < N_WORK; i++) {
		struct work *work = &owner->work[i];

		prepare(work, owner);
		if (!vf_pool_offer(owner->pool, &work->offer)) {
			owner->refused++;
			do_it(NULL, &work->offer);
		}
		for (uint32_t spin = 0; spin < i % 700; spin++)
			vf_relax();
		if (i % 3) /* now and then there is something else to do */
			take_back(owner);
	}
	take_back(owner);
	return NULL;
}

static void many_of_two_owners(struct guest *g, bool *all_their_own)
{
	struct vf_pool *pool = new_pool(g);
	struct owner owners[2];
	pthread_t threads[2];
	uint32_t n_own = 0, n_taken_back = 0;
	struct work more;

	for (int i = 0; i < 2; i++) {
		owners[i] =
		    (struct owner){.pool = pool, .work = calloc(N_WORK, sizeof(struct work))};
		CHECK(owners[i].work);
		CHECK_EQ(pthread_create(&threads[i], NULL, own, &owners[i]), 0);
	}
	for (int i = 0; i < 2; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	/* What nobody takes back the pool runs. */
	prepare(&more, &more);
	offer(pool, &more);
	wait_until_run(&more);
	vf_pool_free(pool);
	for (int i = 0; i < 2; i++) {
		for (uint32_t k = 0; k < N_WORK; k++)
			CHECK_EQ(atomic_load(&owners[i].work[k].runs), 1);
		free(owners[i].work);
		n_taken_back += owners[i].taken_back;
		n_own += owners[i].taken_back + owners[i].refused;
	}
	CHECK(n_taken_back);
	*all_their_own = n_own == 2 * N_WORK;
}

static void each_is_run_once(struct guest *g)
{
	uint64_t ends_ns = vf_now_ns() + HANG_NS;
	bool all_their_own = true;

	/* Beside other work the pool may be left alone for a while. */
	while (all_their_own) {
		CHECK(vf_now_ns() < ends_ns);
		many_of_two_owners(g, &all_their_own);
	}
}

static void what_nobody_begins_is_its_owners(struct guest *g)
{
	struct vf_pool *pool = new_pool(g);
	struct work mine[N_THREADS], other;
	uint64_t before_ns = 0;
	struct hold hold;

	hold_begin(&hold, pool);
	prepare(&other, &other);
	offer(pool, &other);
	CHECK(!vf_pool_take_back(pool, mine, UINT64_MAX));
	CHECK(vf_pool_take_back(pool, &other, UINT64_MAX) == &other.offer);
	CHECK(!vf_pool_take_back(pool, &other, UINT64_MAX));
	/* No more wait than threads help, in order. */
	for (uint32_t i = 0; i < n_helpers; i++) {
		prepare(&mine[i], mine);
		before_ns = vf_now_ns();
		offer(pool, &mine[i]);
	}
	CHECK(!vf_pool_offer(pool, &other.offer));
	for (uint32_t i = 0; i + 1 < n_helpers; i++)
		CHECK(vf_pool_take_back(pool, mine, before_ns) == &mine[i].offer);
	CHECK(!vf_pool_take_back(pool, mine, before_ns));
	CHECK(vf_pool_take_back(pool, mine, UINT64_MAX) == &mine[n_helpers - 1].offer);
	hold_end(&hold);
	vf_pool_free(pool);
	CHECK_EQ(atomic_load(&mine[0].runs), 0);
}

/* As where a thread loses its processor amid an offer. */
static void one_that_lasts_ends_it_for_a_while(struct guest *g)
{
	struct vf_pool *pool = new_pool(g);
	struct work next;
	struct hold hold;
	uint64_t begun_ns, taken_ns;

	begun_ns = vf_now_ns();
	hold_begin(&hold, pool);
	sleep_ms(5);
	hold_end(&hold);
	prepare(&next, &next);
	/* The thread has still to say that it took long. */
	for (;;) {
		uint64_t now_ns = vf_now_ns();

		if (!vf_pool_offer(pool, &next.offer))
			break;
		CHECK(now_ns - begun_ns < HANG_NS);
		if (!vf_pool_take_back(pool, &next, UINT64_MAX))
			wait_until_run(&next);
		atomic_store(&next.runs, 0);
	}
	offer(pool, &next);
	taken_ns = vf_now_ns();
	CHECK(taken_ns - begun_ns > 5000000 + 5000000);
	if (!vf_pool_take_back(pool, &next, UINT64_MAX))
		wait_until_run(&next);
	vf_pool_free(pool);
}

/* A pool that ends runs what it was given first. */
static void the_end(struct guest *g)
{
	for (int i = 0; i < 100; i++) {
		struct vf_pool *pool = new_pool(g);
		struct work work;

		prepare(&work, &work);
		offer(pool, &work);
		vf_pool_free(pool);
		CHECK_EQ(atomic_load(&work.runs), 1);
	}
}

/* A descriptor whose close(2) takes a second: of a socket, with data that nobody reads. */
static int slow_to_close(int *peer)
{
	struct sockaddr_in address = {.sin_family = AF_INET,
				      .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t size = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	static const char data[1 << 16];

	CHECK_EQ(bind(listener, (struct sockaddr *)&address, size), 0);
	CHECK_EQ(listen(listener, 1), 0);
	CHECK_EQ(getsockname(listener, (struct sockaddr *)&address, &size), 0);
	CHECK_EQ(connect(fd, (struct sockaddr *)&address, size), 0);
	*peer = accept(listener, NULL, NULL);
	CHECK(*peer >= 0);
	close(listener);
	while (send(fd, data, sizeof(data), MSG_DONTWAIT) > 0)
		;
	CHECK_EQ(setsockopt(fd, SOL_SOCKET, SO_LINGER,
			    &(struct linger){.l_onoff = 1, .l_linger = 1}, sizeof(struct linger)),
		 0);
	return fd;
}

/* However many there are, one thread is at it. */
static void what_is_slow_to_close_holds_up_nothing(struct guest *g)
{
	struct vf_pool *pool = new_pool(g);
	int peers[N_THREADS + 1];
	uint64_t begun_ns = vf_now_ns();
	struct work work;

	for (uint32_t i = 0; i <= N_THREADS; i++)
		vf_pool_close(pool, slow_to_close(&peers[i]));
	for (int i = 0; i < 100; i++) {
		prepare(&work, &work);
		offer(pool, &work);
		wait_until_run(&work);
	}
	CHECK(vf_now_ns() - begun_ns < 1000000000);
	vf_pool_free(pool);
	CHECK(vf_now_ns() - begun_ns > N_THREADS * 1000000000ULL);
	for (uint32_t i = 0; i <= N_THREADS; i++)
		close(peers[i]);
}

/* Also more than are kept open for it, and where there is no thread. */
static void all_is_closed(struct guest *g)
{
	for (int round = 0; round < 20; round++) {
		int error, fds[2], ends[200];
		struct vf_pool *pool = vf_pool_new(g->share, round % 2 ? N_THREADS : 0, &error);
		char c;

		CHECK(pool);
		for (int i = 0; i < 200; i++) {
			CHECK_EQ(pipe2(fds, O_CLOEXEC), 0);
			ends[i] = fds[0];
			vf_pool_close(pool, fds[1]);
		}
		/* The other end is closed, sooner or later. */
		for (int i = 0; i < 200; i++) {
			CHECK_EQ(read(ends[i], &c, 1), 0);
			close(ends[i]);
		}
		vf_pool_free(pool);
	}
}

/* As in a sandbox that forbids what each thread has to do first. */
static void a_thread_that_cannot_start_is_an_error(struct guest *g)
{
	pid_t child = fork();
	int status, error = 0;

	CHECK(child >= 0);
	if (!child) {
		scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ALLOW);

		CHECK_EQ(seccomp_rule_add(filter, SCMP_ACT_ERRNO(EPERM), SCMP_SYS(unshare), 0), 0);
		CHECK_EQ(seccomp_load(filter), 0);
		CHECK(!vf_pool_new(g->share, N_THREADS, &error));
		CHECK_EQ(error, -EPERM);
		_exit(0);
	}
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(status, 0);
}

int main(void)
{
	cpu_set_t allowed;

	CPU_ZERO(&allowed);
	CHECK_EQ(sched_getaffinity(0, sizeof(allowed), &allowed), 0);
	n_helpers = (uint32_t)CPU_COUNT(&allowed) - 1;
	if (n_helpers > N_THREADS)
		n_helpers = N_THREADS;
	if (!n_helpers) {
		fprintf(stderr,
			"test_pool: NOT RUN: needs two processors, with one nothing is taken\n");
		return getenv("CI") != NULL;
	}
	set_up();
	RUN(each_is_run_once, VF_HANDLES_NEVER, 5000);
	RUN(what_nobody_begins_is_its_owners, VF_HANDLES_NEVER, 5000);
	RUN(one_that_lasts_ends_it_for_a_while, VF_HANDLES_NEVER, 5000);
	RUN(the_end, VF_HANDLES_NEVER, 5000);
	RUN(what_is_slow_to_close_holds_up_nothing, VF_HANDLES_NEVER, 5000);
	RUN(all_is_closed, VF_HANDLES_NEVER, 5000);
	RUN(a_thread_that_cannot_start_is_an_error, VF_HANDLES_NEVER, 5000);
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
