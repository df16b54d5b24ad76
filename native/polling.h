/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whether a queue's thread waits for the next request awake, and for how long.
 *
 * To sleep and to be woken costs the server some microseconds, and the guest
 * a kick, so when requests follow each other faster than that, looking at the
 * ring for a moment is cheaper for both.  It is done only after a row of
 * requests that nearly all came so fast, ends after a few vain waits in a row (the next row of
 * requests must be longer), and stays off for a while when the thread finds that somebody else
 * needed its processor: it was taken away, or who was waited for could run only
 * when it was given up.
 */
#ifndef VHOSTFS_POLLING_H
#define VHOSTFS_POLLING_H

#include <stdbool.h>
#include <stdint.h>

struct vf_polling {
	bool possible;	     /* there is another processor for the guest to run on */
	bool paid;	     /* many that something came in preceded the last vain wait */
	uint32_t fast;	     /* requests that came soon, less what the others cost */
	uint32_t wanted;     /* so many, before it is tried */
	uint32_t vain;	     /* waits in a row that nothing came in */
	uint32_t hits;	     /* waits in a row that something came in */
	uint32_t starved;    /* vain waits, since the last hit, for who was there just after */
	long switches;	     /* times that the thread had made room for another, at the last look */
	uint64_t ended_ns;   /* when the queue was last empty */
	uint64_t gave_up_ns; /* when a vain wait ended, if the thread then slept; else 0 */
	uint64_t off_until_ns;
	uint64_t penalty_ns; /* of the last time that the processor was taken away */
};

/* now_ns: vf_now_ns(). */
void vf_polling_init(struct vf_polling *p);
/* The queue has just become empty: how long may be waited awake?  Nanoseconds, or 0. */
uint64_t vf_polling_begin(struct vf_polling *p, uint64_t now_ns);
/*
 * Once in each turn of the loop that looks at the ring: is there time left?  budget_ns is what
 * vf_polling_begin() gave; *last_ns, 0 to begin with and after other work, is for its use.
 */
bool vf_polling_goes_on(struct vf_polling *p, uint64_t now_ns, uint64_t budget_ns,
			uint64_t *last_ns);
/* Something came while waiting awake. */
void vf_polling_hit(struct vf_polling *p);
/* The thread has slept, and something came. */
void vf_polling_slept(struct vf_polling *p, uint64_t now_ns);

#endif
