/* SPDX-License-Identifier: Apache-2.0 */
/* Whether a queue's thread waits awake; the clock is the test's. */
#include "../polling.h"
#include "guest.h"

#define US 1000u
#define MS 1000000u
#define ROW 8u /* requests that came soon, before the first wait awake */

static uint64_t now_ns;

static struct vf_polling machine(void)
{
	struct vf_polling p;

	vf_polling_init(&p);
	/* A machine of one processor, too, has the thing tested that it does not use. */
	p.possible = true;
	now_ns = 1000 * MS;
	return p;
}

/* The queue is empty; the next request comes after so long.  Was it waited for awake? */
static bool request_after(struct vf_polling *p, uint64_t ns)
{
	uint64_t begun_ns = now_ns, budget_ns = vf_polling_begin(p, now_ns), last_ns = 0;

	if (budget_ns) {
		while (vf_polling_goes_on(p, now_ns, budget_ns, &last_ns)) {
			if (now_ns - begun_ns >= ns) {
				vf_polling_hit(p);
				return true;
			}
			now_ns += US;
		}
	}
	if (now_ns < begun_ns + ns)
		now_ns = begun_ns + ns;
	vf_polling_slept(p, now_ns);
	return budget_ns;
}

static uint32_t requests_until_awake(struct vf_polling *p)
{
	uint32_t n = 0;

	while (!request_after(p, 30 * US)) {
		n++;
		CHECK(n < 10000);
	}
	return n;
}

static void a_row_of_requests_that_come_soon_is_waited_for(void)
{
	struct vf_polling p = machine();

	CHECK_EQ(requests_until_awake(&p), ROW);
	for (int i = 0; i < 1000; i++)
		CHECK(request_after(&p, 30 * US));
}

static void nobody_is_waited_for_who_comes_late(void)
{
	struct vf_polling p = machine();

	for (int i = 0; i < 1000; i++)
		CHECK(!request_after(&p, i % ROW ? 30 * US : 200 * US));
}

static void never_on_a_single_processor(void)
{
	struct vf_polling p = machine();

	p.possible = false;
	for (int i = 0; i < 1000; i++)
		CHECK(!request_after(&p, 30 * US));
}

static void a_wait_ends(void)
{
	struct vf_polling p = machine();
	uint64_t budget_ns, begun_ns, last_ns = 0;

	requests_until_awake(&p);
	begun_ns = now_ns;
	budget_ns = vf_polling_begin(&p, now_ns);
	CHECK(budget_ns >= 30 * US && budget_ns <= 100 * US);
	while (vf_polling_goes_on(&p, now_ns, budget_ns, &last_ns))
		now_ns += US;
	CHECK_EQ(now_ns - begun_ns, budget_ns);
}

static void after_vain_waits_the_next_row_must_be_longer(void)
{
	struct vf_polling p = machine();
	uint32_t row = ROW;

	CHECK_EQ(requests_until_awake(&p), ROW);
	for (int i = 0; i < 20; i++) {
		/* Soon enough to count, but none within a wait. */
		for (int k = 0; k < 3; k++)
			CHECK(request_after(&p, 60 * US));
		if (row < 256)
			row *= 2;
		CHECK_EQ(requests_until_awake(&p), row - 1);
	}
	CHECK_EQ(row, 256);
}

static void a_burst_pays_for_the_pause_behind_it(void)
{
	struct vf_polling p = machine();

	requests_until_awake(&p);
	for (int i = 0; i < 1000; i++) {
		for (int k = 0; k < 20; k++)
			CHECK(request_after(&p, 30 * US));
		/* In vain, and the last for a long while. */
		CHECK(request_after(&p, 5 * MS));
	}
}

static void a_short_burst_does_not(void)
{
	struct vf_polling p = machine();

	requests_until_awake(&p);
	CHECK(request_after(&p, 30 * US));
	CHECK(request_after(&p, 5 * MS));
	CHECK(!request_after(&p, 30 * US));
}

static void a_burst_pays_once(void)
{
	struct vf_polling p = machine();

	requests_until_awake(&p);
	for (int k = 0; k < 20; k++)
		CHECK(request_after(&p, 30 * US));
	CHECK(request_after(&p, 5 * MS));
	CHECK(request_after(&p, 5 * MS));
	CHECK(!request_after(&p, 5 * MS));
}

static void bursts_are_waited_for_even_where_waits_were_vain(void)
{
	struct vf_polling p = machine();

	for (int i = 0; i < 20; i++) {
		requests_until_awake(&p);
		for (int k = 0; k < 3; k++)
			request_after(&p, 60 * US);
	}
	requests_until_awake(&p);
	for (int k = 0; k < 20; k++)
		request_after(&p, 30 * US);
	for (int k = 0; k < 3; k++)
		request_after(&p, 60 * US);
	CHECK(requests_until_awake(&p) <= 2 * ROW);
}

static void who_waited_for_this_processor_gets_it(void)
{
	struct vf_polling p = machine();
	uint64_t begun_ns;

	requests_until_awake(&p);
	/* There as soon as the wait ends, twice. */
	CHECK(request_after(&p, 41 * US));
	begun_ns = now_ns;
	CHECK(request_after(&p, 41 * US));
	while (!request_after(&p, 30 * US))
		CHECK(now_ns - begun_ns < 1000 * MS);
	CHECK(now_ns - begun_ns >= 50 * MS);
	/* The next time it is longer. */
	request_after(&p, 41 * US);
	begun_ns = now_ns;
	CHECK(request_after(&p, 41 * US));
	while (!request_after(&p, 30 * US))
		CHECK(now_ns - begun_ns < 1000 * MS);
	CHECK(now_ns - begun_ns >= 100 * MS);
}

static void once_is_chance(void)
{
	struct vf_polling p = machine();

	requests_until_awake(&p);
	for (int i = 0; i < 1000; i++) {
		CHECK(request_after(&p, 41 * US));
		CHECK(request_after(&p, 30 * US));
	}
}

int main(void)
{
#define RUN(test) (test(), printf("%s ok\n", #test))
	RUN(a_row_of_requests_that_come_soon_is_waited_for);
	RUN(nobody_is_waited_for_who_comes_late);
	RUN(never_on_a_single_processor);
	RUN(a_wait_ends);
	RUN(after_vain_waits_the_next_row_must_be_longer);
	RUN(a_burst_pays_for_the_pause_behind_it);
	RUN(a_short_burst_does_not);
	RUN(a_burst_pays_once);
	RUN(bursts_are_waited_for_even_where_waits_were_vain);
	RUN(who_waited_for_this_processor_gets_it);
	RUN(once_is_chance);
	return 0;
}
