// SPDX-License-Identifier: Apache-2.0
/*
 * What two lock owners hold, by lock_owner.c and by one byte of memory for each offset: the same
 * after any row of locks and unlocks, and what the host grants is what the model grants.  Then two
 * requests of one owner at once, of which one has waited.
 * Arguments: a file to lock, a seed.  Exit status 0: it held.
 */
#include "file.h"
#include "inode.h"
#include "lock_owner.h"

#include <stdarg.h>
#include <stdio.h>
#include <sys/syscall.h>

#define OFFSETS 64
#define STEPS 20000
#define FREE 9
#define NODE 7

static const char *path;
static uint8_t model[2][OFFSETS];

/* Stand-ins for the share around it. */
struct vf_inode *vf_inode_get(struct vf_share *share, uint64_t nodeid)
{
	(void)nodeid;
	return (struct vf_inode *)share;
}

void vf_inode_put(struct vf_share *share, struct vf_inode *inode)
{
	(void)share;
	(void)inode;
}

int vf_inode_open(struct vf_share *share, struct vf_inode *inode, int flags)
{
	int fd = open(path, flags | O_CLOEXEC);

	(void)share;
	(void)inode;
	return fd < 0 ? -errno : fd;
}

bool vf_open_budget_take(struct vf_share *share)
{
	(void)share;
	return true;
}

void vf_open_budget_give(struct vf_share *share)
{
	(void)share;
}

static void fail(const char *what, int step)
{
	fprintf(stderr, "step %d: %s\n", step, what);
	exit(1);
}

static bool model_refuses(int other, const struct lock_range *range)
{
	for (uint64_t i = range->start; i <= range->end && range->type != F_UNLCK; i++) {
		if (model[other][i] == F_WRLCK ||
		    (model[other][i] == F_RDLCK && range->type == F_WRLCK))
			return true;
	}
	return false;
}

static void compare(const struct lock_owner *owner, const uint8_t *expected, int step)
{
	uint8_t held[OFFSETS];

	memset(held, FREE, sizeof(held));
	for (uint32_t i = 0; i < owner->n_ranges; i++) {
		const struct lock_range *range = &owner->ranges[i];

		if (range->start > range->end || range->end >= OFFSETS)
			fail("a range is out of bounds", step);
		if (i && range->start <= range[-1].end)
			fail("ranges overlap", step);
		if (i && range->start == range[-1].end + 1 && range->type == range[-1].type)
			fail("neighbours of one type were not joined", step);
		memset(held + range->start, (int)range->type, range->end - range->start + 1);
	}
	if (memcmp(held, expected, sizeof(held)))
		fail("held ranges differ from the model", step);
}

/* ---- two requests at once ------------------------------------------------ */

static struct granted {
	pthread_t thread;
	bool wanted;
	struct vf_lock_waiters *locks;
	struct lock_owner *owner;
} granted;

static void *grant(void *unused)
{
	const struct lock_range range = {.start = 30, .end = 32, .type = F_WRLCK};

	(void)unused;
	if (lock_owner_granted(granted.locks, granted.owner, &range))
		fail("a lock that was waited for is not written down", STEPS);
	return NULL;
}

/* While one request asks the host, another one of the same owner is granted what it waited for. */
int fcntl(int fd, int command, ...)
{
	struct timespec soon;
	struct flock *fl;
	va_list args;

	va_start(args, command);
	fl = va_arg(args, struct flock *);
	va_end(args);
	if (granted.wanted) {
		granted.wanted = false;
		pthread_create(&granted.thread, NULL, grant, NULL);
		/* As far as it comes before this one is written down. */
		clock_gettime(CLOCK_REALTIME, &soon);
		soon.tv_sec += soon.tv_nsec / 900000000;
		soon.tv_nsec += 100000000;
		if (soon.tv_nsec >= 1000000000) {
			soon.tv_nsec -= 1000000000;
			soon.tv_sec++;
		}
		if (pthread_timedjoin_np(granted.thread, NULL, &soon) == 0)
			granted.thread = 0;
	}
	return (int)syscall(SYS_fcntl, fd, command, fl);
}

static void two_requests_at_once_find_room(struct vf_lock_waiters *locks)
{
	static const struct lock_range rows[] = {
	    {.start = 0, .end = 9, .type = F_RDLCK},
	    {.start = 20, .end = 63, .type = F_RDLCK},
	    {.start = 22, .end = 24, .type = F_WRLCK},
	};
	int error;

	granted.locks = locks;
	granted.owner = lock_owner_use(locks, NODE, 2, true, &error);
	if (!granted.owner)
		fail("no owner", STEPS);
	for (int i = 0; i < 3; i++) {
		granted.wanted = i == 2;
		if (lock_owner_set(locks, granted.owner, &rows[i]))
			fail("a lock that nobody else has was refused", STEPS);
	}
	if (granted.thread)
		pthread_join(granted.thread, NULL);
	if (granted.owner->n_ranges != 6 || granted.owner->room < 6)
		fail("two requests at once have shared the room that one had reserved", STEPS);
	vf_locks_release_owner(locks->share, NODE, 2);
	lock_owner_end_use(locks, granted.owner, true);
}

int main(int argc, char **argv)
{
	static struct vf_lock_waiters locks;
	static struct vf_share share;
	struct lock_owner *owners[2];
	int error;

	if (argc != 3)
		return 2;
	path = argv[1];
	srand((unsigned int)atoi(argv[2]));
	memset(model, FREE, sizeof(model));
	share.locks = &locks;
	locks.share = &share;
	pthread_mutex_init(&locks.lock, NULL);
	for (int i = 0; i < 2; i++) {
		owners[i] = lock_owner_use(&locks, NODE, (uint64_t)i, true, &error);
		if (!owners[i])
			fail("no owner", 0);
	}
	for (int step = 0; step < STEPS; step++) {
		static const uint32_t types[] = {F_RDLCK, F_WRLCK, F_UNLCK};
		int who = rand() % 2;
		struct lock_range range = {.start = (uint64_t)(rand() % OFFSETS),
					   .type = types[rand() % 3]};
		uint64_t length = (uint64_t)(rand() % (rand() % 4 ? 6 : OFFSETS));
		bool refused;

		range.end = range.start + length < OFFSETS ? range.start + length : OFFSETS - 1;
		refused = model_refuses(!who, &range);
		error = lock_owner_set(&locks, owners[who], &range);
		if (error != (refused ? -EAGAIN : 0))
			fail("the host decided otherwise than the model", step);
		if (!refused)
			memset(model[who] + range.start,
			       range.type == F_UNLCK ? FREE : (int)range.type,
			       range.end - range.start + 1);
		compare(owners[who], model[who], step);
		if (locks.n_ranges != owners[0]->n_ranges + owners[1]->n_ranges)
			fail("the count of ranges is wrong", step);
	}
	for (int i = 0; i < 2; i++) {
		vf_locks_release_owner(&share, NODE, (uint64_t)i);
		if (owners[i]->n_ranges)
			fail("a released owner still holds ranges", STEPS);
		lock_owner_end_use(&locks, owners[i], true);
	}
	two_requests_at_once_find_room(&locks);
	if (locks.n_ranges || atomic_load(&locks.n_owners))
		fail("something was left", STEPS);
	return 0;
}
