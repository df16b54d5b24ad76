/* SPDX-License-Identifier: Apache-2.0 */
/* See polling.h. */
#include <sched.h>
#include <sys/resource.h>

#include "core.h"
#include "polling.h"

/* Longer than this after the last one a request does not come soon. */
#define SOON_NS 100000u
/*
 * How long is waited awake: until a driver that sleeps on an idle processor has been woken, which
 * takes 15 to 25 us, has looked, and has asked again.
 */
#define BUDGET_NS 40000u
/* Requests that came soon, more or less in a row, before the first wait awake. */
#define MIN_FAST 8u
/* Vain waits, after which twice as many fast requests are asked for as before, and no more than: */
#define MAX_VAIN 3u
#define MAX_FAST 256u
/* So many are forgotten for each that did not come soon. */
#define SLOW_COSTS 16u
/*
 * Waits in a row that were not vain, after which MIN_FAST are enough again, and which pay for the
 * vain one behind them: who asks in bursts of so many is waited for in each.
 */
#define MANY_HITS 16u
/*
 * Between two turns of the loop: the processor was that of a thread that works, or (which is seen
 * from switches) nobody's.  Threads of the kernel take it for less, on a quiet machine, too.
 */
#define TAKEN_AWAY_NS 300000u
/*
 * Who is there so soon after this thread has given up may have waited for its processor; who does
 * that again, before anything came to a wait, has.
 */
#define STARVED_NS 12000u
#define MAX_STARVED 2u
#define MIN_PENALTY_NS 50000000u
#define MAX_PENALTY_NS 200000000u

/* Whether another thread has taken this one's processor since the last look. */
static bool was_switched(struct vf_polling *p)
{
	long before = p->switches;
	struct rusage usage;

	if (getrusage(RUSAGE_THREAD, &usage) == 0)
		p->switches = usage.ru_nivcsw;
	return p->switches != before;
}

void vf_polling_init(struct vf_polling *p)
{
	cpu_set_t allowed;

	*p = (struct vf_polling){.penalty_ns = MIN_PENALTY_NS, .wanted = MIN_FAST};
	was_switched(p);
	CPU_ZERO(&allowed);
	/* More processors than such a mask has room for: an error, and certainly another one. */
	p->possible =
	    sched_getaffinity(0, sizeof(allowed), &allowed) != 0 || CPU_COUNT(&allowed) > 1;
}

uint64_t vf_polling_begin(struct vf_polling *p, uint64_t now_ns)
{
	if (!p->possible)
		return 0;
	p->gave_up_ns = 0;
	p->ended_ns = now_ns;
	if (p->fast < p->wanted || p->ended_ns < p->off_until_ns)
		return 0;
	return BUDGET_NS;
}

static void stay_off(struct vf_polling *p, uint64_t now_ns)
{
	p->fast = 0;
	p->starved = 0;
	p->off_until_ns = now_ns + p->penalty_ns;
	if (p->penalty_ns < MAX_PENALTY_NS)
		p->penalty_ns *= 2;
}

bool vf_polling_goes_on(struct vf_polling *p, uint64_t now_ns, uint64_t budget_ns,
			uint64_t *last_ns)
{
	bool taken_away = *last_ns && now_ns - *last_ns > TAKEN_AWAY_NS && was_switched(p);

	*last_ns = now_ns;
	if (taken_away) {
		stay_off(p, now_ns);
		return false;
	}
	if (now_ns - p->ended_ns < budget_ns)
		return true;
	p->gave_up_ns = now_ns;
	p->paid = p->hits >= MANY_HITS;
	p->hits = 0;
	if (++p->vain >= MAX_VAIN) {
		p->fast = 0;
		p->vain = 0;
		if (p->wanted < MAX_FAST)
			p->wanted *= 2;
	}
	return false;
}

void vf_polling_hit(struct vf_polling *p)
{
	p->vain = 0;
	p->starved = 0;
	if (++p->hits >= MANY_HITS)
		p->wanted = MIN_FAST;
	if (p->penalty_ns > MIN_PENALTY_NS)
		p->penalty_ns -= p->penalty_ns / 1024;
}

void vf_polling_slept(struct vf_polling *p, uint64_t now_ns)
{
	uint64_t gave_up_ns = p->gave_up_ns;
	bool paid = gave_up_ns && p->paid;

	p->gave_up_ns = 0;
	if (gave_up_ns && now_ns - gave_up_ns < STARVED_NS && ++p->starved >= MAX_STARVED) {
		stay_off(p, now_ns);
	} else if (now_ns - p->ended_ns > SOON_NS) {
		if (!paid)
			p->fast -= p->fast < SLOW_COSTS ? p->fast : SLOW_COSTS;
	} else if (p->fast < p->wanted) {
		p->fast++;
	}
}
